"""Whole runs from the command line: files to record, every option, sweeps, a score of one's own, and the README."""

import importlib
import io
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from alignprune_exp.config import DATASET, MODEL
from alignprune_exp.errors import Failed
from alignprune_exp.run import Run
from alignprune_exp.train import main
from harness import CONF, composed, launch, only_run, rows_of, sentence_of, summary_of

REPOSITORY = Path(__file__).parents[1]
PROGRAM = "python -m alignprune_exp.train"
GROUPS = ("dataset", "noise", "pruner", "score", "reference", "learner", "model", "optimizer", "scale", "tracking")
# The smallest run whose trajectories fill their window and whose last epoch anneals.
TINY = ["epochs=5", "score.window=3", "batch_size=32"]
TINY += ["dataset.subset=120", "dataset.test_subset=60", "reference.size=10"]


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd):
    """Run a command line in an empty folder; return its status, what it printed, and what it complained about."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*arguments):
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return run


def _tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def _runs():
    return sorted(path for path in Path("results/runs").iterdir() if path.is_dir())


def _summaries():
    return [summary_of(run) for run in _runs()]


# --- from files to record


COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
FOLDER = ["dataset=image_folder", "dataset.root=images", "dataset.image_size=16", "reference.size=6"]


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("test", 8)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(n):
                pixels = np.clip(np.array(colour) + rng.integers(-30, 31, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_image_folder_from_files_to_record(cli, images):
    status, out, err = cli(*FOLDER, *["noise=sym0.2", "epochs=8", "score.window=3", "batch_size=8"])
    assert (status, err) == (0, "")
    (run,), (summary,) = _runs(), _summaries()
    assert str(run) in out
    assert (summary["status"], summary["dataset"]) == ("finished", "image_folder")
    assert summary["noise_rate"] == pytest.approx(round(0.2 * 54) / 54)
    assert summary["test_accuracy_best"] > 80  # a third by chance
    samples = pd.read_parquet(run / "samples.parquet")
    assert [Path(path).parent.name for path in samples["path"]] == [sorted(COLOURS)[k] for k in samples["clean_label"]]


def test_oracle_without_clean_labels_is_refused(cli, images):
    status, _, err = cli(*FOLDER, "noise=clean", "score=oracle")
    assert status == 2
    assert "score=oracle needs clean labels" in sentence_of(err)
    assert not Path("results").exists()


def test_corrupt_image_of_a_folder_is_named(cli, images):
    (images / "train/red/3.png").write_bytes(b"not an image")
    status, _, err = cli(*FOLDER)
    assert status == 2
    assert "train/red/3.png" in sentence_of(err)
    assert not Path("results").exists()


def test_cifar_with_human_labels_from_parquet_to_record(cli, tmp_path):
    rng = np.random.default_rng(0)
    clean = np.arange(60) % 10
    for split, labels in (("train", clean), ("test", clean[:20])):
        encoded = []
        for k in labels:
            file = io.BytesIO()
            Image.fromarray(rng.integers(20 * k, 20 * k + 20, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            encoded.append({"bytes": file.getvalue(), "path": None})
        pq.write_table(pa.table({"img": encoded, "label": labels}), tmp_path / f"{split}.parquet")
    keys = ("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3")
    torch.save(
        {"clean_label": clean, **dict.fromkeys(keys, (clean + (np.arange(60) % 3 == 0)) % 10)}, tmp_path / "labels.pt"
    )
    data = ["dataset=cifar10", "dataset.root=.", "dataset.subset=null", "dataset.test_subset=null", "reference.size=10"]
    status, _, err = cli(*data, *["noise=real", "noise.file=labels.pt", "epochs=5", "score.window=3"])
    assert (status, err) == (0, "")
    (summary,) = _summaries()
    samples = pd.read_parquet(_runs()[0] / "samples.parquet")
    assert (summary["pairing"], summary["noise"], len(samples)) == ("unverified", "real", 50)
    assert np.array_equal(samples["clean_label"], clean[samples["index"]])
    assert np.array_equal(samples["label"] != samples["clean_label"], samples["index"] % 3 == 0)


# --- every option, and what people add


PHOTOGRAPHS = ("webvision", "clothing1m", "imagenet", "tiny_imagenet", "parquet")  # test_photographs.py runs them
NEEDS_FILES = ("cifar10", "cifar100", "image_folder", "real", "resnet50_pretrained", *PHOTOGRAPHS)
OF_OTHER_TASKS = (  # test_task_*.py run them
    *(name for name in DATASET.builtin if DATASET.find(name).task != "classification"),
    *(name for name, place in MODEL.builtin.items() if isinstance(place, str) and place.startswith("tasks.")),
)


def _bare_options():
    for group in GROUPS:
        for file in sorted((CONF / group).glob("*.yaml")):
            if file.stem in (*NEEDS_FILES, *OF_OTHER_TASKS) or re.fullmatch(r"a?sym0\.\d", file.stem):
                continue  # the latter are rates of options that stay
            slow = file.stem in ("paper", "wandb", "resnet50", "resnet50_large")
            yield pytest.param(group, file.stem, marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("group", "option"), [*_bare_options()])
def test_every_option_runs_on_digits(tmp_path, capfd, group, option, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    size = [*TINY[:-1], "epochs=6"] if group == "reference" else TINY  # with its own size, longer than its warm-up
    without_reference = ["score=loss"] if (group, option) == ("reference", "none") else []
    # In bf16 oneDNN makes NaN of the gradients of ResNet-50's strided convolutions on 1x1 maps, as 8x8 images give.
    exact = ["precision=fp32"] if option.startswith("resnet50") else []
    special = {
        "dividemix": ["learner.warmup=2"],
        "topk": ["pruner.warmup=2"],
        "resnet50_large": ["optimizer.lr=0.01"],
    }.get(option, [])
    assert launch(tmp_path, *without_reference, *exact, *special, f"{group}={option}", base=tuple(size)) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert summary_of(only_run(tmp_path))["status"] == "finished"
    assert "test accuracy" in out


@pytest.mark.parametrize("model", ["small_cnn", "resnet8", "resnet18"])
def test_a_last_batch_of_one_sample_trains(cli, model):
    arguments = "pruner=full epochs=2 dataset.subset=75 dataset.test_subset=20 reference.size=10 batch_size=32"  # 65
    status, _, err = cli(*arguments.split(), f"model={model}", "optimizer.lr=0.001")
    assert (status, err) == (0, "")


def test_score_of_ones_own_is_what_the_record_says(cli, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = """
        from alignprune_exp.pruning import Score

        class Halving(Score):
            def __call__(self, history):
                return history.last_N / 2
    """
    (tmp_path / "own_score_module.py").write_text(textwrap.dedent(code))
    importlib.invalidate_caches()
    status, out, err = cli(*TINY, "score=das", "score.name=own_score_module.Halving")
    assert (status, err) == (0, "")
    (run,), (summary,) = _runs(), _summaries()
    rows = rows_of(run)
    assert [row["ranked_by"] for row in rows[1:4]] == ["Halving"] * 3
    assert "auroc_Halving" in rows[-1]
    assert summary["score"] == "Halving"
    assert "score_Halving" in pd.read_parquet(run / "samples.parquet")
    assert "Halving" in out


def test_finished_run_is_not_run_again_and_force_keeps_the_old_folder(cli):
    assert cli(*TINY)[0] == 0
    (run,) = _runs()
    before = _tree(run)
    status, out, _ = cli(*TINY)
    assert (status, _tree(run)) == (0, before)
    assert "finished" in out
    assert "force=true" in out
    assert cli(*TINY, "force=true")[0] == 0
    assert _runs() == [run, run.with_name(f"{run.name}~1")]


def _next_commands(out):
    lines = out[out.rindex("record  ") :].splitlines()[1:]
    found = [re.sub(r"^next\s+|^\s+", "", line).split("  # ")[0].strip() for line in lines]
    return [shlex.split(line)[3:] for line in found if "-m alignprune_exp.train" in line]


@pytest.mark.parametrize(
    "choice",
    [
        "",
        "score=loss",
        "pruner=full",
        "pruner=random",
        "pruner=topk pruner.warmup=1",
        "pruner=seta pruner.groups=3 score=random",
        "noise=clean score=loss reference=none",
        "method=seta_das",
        "method=sieve saved=0.5",
        "method=infobatch_das_unscaled",
        "method=query",
        "method=sieve_settled recorded=odds",
        "method=rho_loss score.holdout=1",
        "score=das score.name=alignprune_exp.pruning.scores.Loss",
        "score=loss epochs=4",  # which das would leave none to act in
        "pruner=full epochs=3",
    ],
)
def test_next_commands_are_runs_of_their_own(cli, choice, monkeypatch):
    size = [key for key in TINY if not (key.startswith("reference") and "reference=none" in choice)]
    status, out, _ = cli(*size, *choice.split())
    assert status == 0
    commands = [command for command in _next_commands(out) if "dataset.download=true" not in command]
    assert len(commands) >= 2
    folders = _runs()

    def not_trained(self, folder, *_):
        folders.append(folder.path)
        raise Failed("begun")

    monkeypatch.setattr(Run, "train", not_trained)
    for command in commands:
        assert cli(*command)[::2] == (1, "begun\n"), command
        asked, given = composed(*command).pruner, composed(*size, *choice.split()).pruner
        assert asked == given or asked.name != given.name
    assert len(set(folders)) == 1 + len(commands)


# --- sweeps


def test_sweep_runs_full_once_for_both_scores(cli):
    status, out, _ = cli("-m", *TINY, "pruner=full,infobatch", "score=loss,das")
    assert status == 0
    assert sorted((s["pruner"], s["score"] or "") for s in _summaries()) == [
        ("full", ""),
        ("infobatch", "das"),
        ("infobatch", "loss"),
    ]
    assert "3 runs" in out


def test_sweep_runs_the_others_when_one_fails_and_lists_it(cli, tmp_path):
    status, _, err = cli("-m", *TINY, "optimizer.lr=1000", "optimizer.weight_decay=100,0.0005")
    assert status == 1
    assert "Traceback" not in err
    closing = err[err.index("1 of 2") :]
    assert "optimizer.weight_decay=100" in closing
    assert "optimizer.weight_decay=0.0005" not in closing
    assert {summary["status"] for summary in _summaries()} == {"finished", "failed"}
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_sweep_with_a_job_whose_data_are_missing_is_refused_before_the_first(cli):
    status, out, err = cli("-m", *TINY, "dataset=digits,cifar10", "paths.data=nowhere")
    assert (status, out) == (2, "")
    assert "in the job" in sentence_of(err)
    assert "dataset=cifar10" in err
    assert not Path("results").exists()


def test_sweep_with_a_later_job_that_its_data_cannot_serve_is_refused_before_the_first(cli):
    status, out, err = cli("-m", "task=regression", "scale=smoke", "pruner=rs2", "learner=ce,elr")
    assert (status, out) == (2, "")
    assert "learner=elr needs class labels" in sentence_of(err)
    assert "in the job" in err
    assert not Path("results").exists()


# --- the READMEs


OPTIONS = (CONF / "README.md").read_text()
READMES = [file.read_text() for file in REPOSITORY.rglob("README.md") if ".venv" not in file.parts]


def test_every_name_in_the_table_of_options_is_an_option_or_a_key(cli, capfd):
    table = re.findall(
        r"^\| (`.*?) \| (.*) \|$", OPTIONS.split("| group | options |")[1].split("\n\n")[0], re.MULTILINE
    )
    assert {group for cell, _ in table for group in re.findall(r"`(\w+)`", cell)} >= set(GROUPS)
    for cell, text in table:
        files = [file for group in re.findall(r"`(\w+)`", cell) for file in (CONF / group).glob("*.yaml")]
        keys = {key for file in files for key in re.findall(r"^(\w+):", file.read_text(), re.MULTILINE)}
        for quoted in re.findall(r"`([^`]*)`", text):
            if "=" in quoted:
                key = quoted.partition("=")[0].removeprefix("tracking.")
                having = [file.stem for file in files if f"\n{key}:" in file.read_text()]
                chosen = [f"tracking={having[0]}"] if quoted.startswith("tracking.") else []
                assert cli(*chosen, *quoted.split(), "--cfg", "job")[0] == 0, quoted
            elif "/" not in quoted:
                assert quoted in {file.stem for file in files} | keys, quoted


def test_every_command_of_the_readmes_composes(cli):
    joined = [text.replace("\\\n", " ") for text in READMES]
    found = {command for text in joined for command in re.findall(rf"{PROGRAM}( [^`#\n]+)", text)}
    commands = [shlex.split(command) for command in sorted(found)]
    commands = [[a for a in command if a not in ("-m", "--help", "--cfg", "job")] for command in commands]
    assert len(commands) > 3
    for command in commands:
        first_of_each_axis = [re.sub(r",.*", "", a) for a in command]
        status, _, err = cli(*first_of_each_axis, "--cfg", "job")
        assert (status, err) == (0, ""), command
