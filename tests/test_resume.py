"""Whatever stops a run, and whatever becomes of its folder meanwhile, it ends with the bits of an undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from itertools import count, groupby

import pytest
import torch

import make_miniature
from alignprune_exp import setup
from alignprune_exp.errors import UsageError
from alignprune_exp.run import Run
from alignprune_exp.runs import RunFolder
from harness import (
    EPOCHS,
    Stop,
    assert_same_results,
    before_the_second_step,
    checkpoint_of,
    checkpoints,
    config_of,
    contents,
    environment_of,
    launch,
    metrics_of,
    missing,
    only_run,
    sentence_of,
    truncate,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# The matrix: what a run is, and how it is stopped

TINY = ("threads=1", "epochs=6", "score.window=3", "batch_size=16", "dataset.subset=100", "dataset.test_subset=40")
TINY += ("checkpoint_seconds=0",)
PSEUDO = ("reference.size=20", "reference.warmup=2", "reference.every=2")
RUNS = {  # by what is to be kept over a stop
    "a bank": (),
    "a refreshed bank": ("score.unseen=refresh",),
    "a masked bank, a warm-up": ("pruner=topk", "pruner.warmup=1", "score=spearman", "score.unseen=mask"),
    "a half bank": ("pruner=seta", "score=cosine", "score.bank=float16"),
    "averages": ("pruner=ucb", "score=loss"),
    "a permutation": ("pruner=rs2", "saved=0.5"),
    "draws": ("score=random",),
    "a target": ("learner=elr",),
    "predictions of each sample": ("learner=refurbish", "learner.history=2"),
    "an outlier of each sample": ("learner=sop",),
    "probabilities of classes": ("learner=posterior",),
    "two networks": ("learner=dividemix", "learner.warmup=3", "learner.rampup=2"),
    "a chosen reference set": ("reference=pseudo", *PSEUDO),
    "a cleaned reference set": ("reference=pseudo_cleanlab", *PSEUDO),
    "a population": ("reference=population",),
    "two phases": ("pruner=static_forgetting", "pruner.warmup=3", "epochs=3"),
    "two phases, a reference": ("pruner=static_glister", "pruner.warmup=3", "epochs=3"),
    "a choice without a warm-up": ("pruner=static_random", "pruner.fraction=0.7"),
    "photographs": (
        *("dataset=imagenet", "dataset.image_size=24", "dataset.subset=30", "reference.size=2", "batch_size=8"),
        *("model=small_cnn", "workers=0"),
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By the name of a run, how it is chosen, its folder where nothing stops it, and the steps of each epoch."""
    data = tmp_path_factory.mktemp("data")
    assert make_miniature.main(["imagenet", str(data / "imagenet"), "--size", "40", "--train", "8"]) == 0

    @cache
    def run(name):
        results, stop, line = tmp_path_factory.mktemp("whole"), Stop(), (*RUNS[name], f"paths.data={data}")
        assert not stop.run(config_of(results, *line, base=TINY))
        return line, only_run(results), [len(list(steps)) for _, steps in groupby(stop.steps, key=lambda step: step[0])]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_stopped_within_an_epoch_a_run_goes_on_from_the_very_step(tmp_path, whole, capsys, name):
    line, folder, steps = whole(name)
    stop, config = Stop(), config_of(tmp_path, *line, base=TINY)
    assert steps[4] > 1
    assert stop.run(config, sum(steps[:4]) + 1)
    assert not (only_run(tmp_path) / "summary.json").exists()
    state = checkpoint_of(only_run(tmp_path))
    assert (state["epoch"], state["step"]) == (4, 1)
    assert not stop.run(config)
    assert "resumed at epoch 4, step 1" in capsys.readouterr().out
    assert len(stop.steps) == sum(steps)
    assert_same_results(only_run(tmp_path), folder)


@pytest.mark.parametrize("name", RUNS)
def test_stopped_between_epochs_a_run_goes_on_with_the_next(tmp_path, whole, name):
    line, folder, steps = whole(name)
    stop, config = Stop(), config_of(tmp_path, *line, base=TINY)
    for epochs in (2, 3):  # the latter is where the second phase has begun, and where DAS ranks first
        assert stop.run(config, sum(steps[:epochs]) - len(stop.steps))
        state = checkpoint_of(only_run(tmp_path))
        assert (state["epoch"], state["step"]) == (epochs, 0)
    assert not stop.run(config)
    assert len(stop.steps) == sum(steps)
    assert_same_results(only_run(tmp_path), folder)


@pytest.mark.parametrize("name", RUNS)
def test_stopped_again_and_again_a_run_ends(tmp_path, whole, name):
    line, folder, steps = whole(name)
    stop, config = Stop(), config_of(tmp_path, *line, base=TINY)
    stops = 0
    while stop.run(config, 5):
        stops += 1
    assert stops == (sum(steps) - 1) // 5
    assert_same_results(only_run(tmp_path), folder)


@pytest.mark.parametrize("name", ["two networks", "a cleaned reference set", "two phases"])
def test_killed_after_a_checkpoint_a_run_goes_on_from_there(tmp_path, nurse, whole, name):
    line, folder, _ = whole(name)
    (pid,) = nurse.start([*TINY, *line, f"paths.results={tmp_path}"], pause=0.05)
    nurse.until(lambda marks: b"." in b"".join(marks.split(b">")[4:]))  # in the epoch after the fourth
    os.kill(pid, signal.SIGKILL)
    assert nurse.ended() == [-signal.SIGKILL]
    assert metrics_of(only_run(tmp_path))[:3] == metrics_of(folder)[:3]
    assert launch(tmp_path, *line, base=TINY) == 0
    assert_same_results(only_run(tmp_path), folder)


# Signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_middle_of_an_epoch_gets_one_sentence(tmp_path, undisturbed, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        before_the_second_step(patch, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            launch(tmp_path)
    assert ended.value.code == 130
    assert signal.getsignal(number) == before
    assert "stopped in epoch 5, step 2 and left a checkpoint" in sentence_of(capsys.readouterr().err)
    assert launch(tmp_path) == 0
    assert_same_results(only_run(tmp_path), undisturbed())


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("when", ["the data loads", "the folder is claimed"])
def test_a_signal_before_training_starts_gets_one_sentence_and_leaves_nothing_in_the_way(
    tmp_path, undisturbed, monkeypatch, capsys, number, when
):
    of, name = {"the data loads": (setup, "open_task"), "the folder is claimed": (RunFolder, "load_checkpoint")}[when]
    work, before = getattr(of, name), signal.getsignal(number)

    def signalled(*arguments):
        os.kill(os.getpid(), number)
        return work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(of, name, signalled)
        with pytest.raises(SystemExit) as ended:
            launch(tmp_path)
    assert ended.value.code == 130
    assert signal.getsignal(number) == before
    said = "stopped at once; the same command goes on from the latest checkpoint, if there is one"
    assert sentence_of(capsys.readouterr().err) == said
    assert not list(tmp_path.rglob("*.*"))
    assert not list(tmp_path.rglob("lock"))
    assert launch(tmp_path) == 0
    assert_same_results(only_run(tmp_path), undisturbed())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_imports_gets_one_sentence(tmp_path, number):
    """As a module of that name is imported, the first that the entry point needs."""
    (tmp_path / "hydra.py").write_text(f"import os; os.kill(os.getpid(), {int(number)}); raise ImportError")
    done = subprocess.run(
        [sys.executable, "-m", "alignprune_exp.train"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130
    assert sentence_of(done.stderr).startswith("stopped at once; the same command goes on")


# Damage


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The results of a run that was stopped in the middle of its sixth epoch."""
    results = tmp_path_factory.mktemp("stopped")
    assert Stop().run(config_of(results), 24)
    return results


@pytest.fixture
def half_done(tmp_path, stopped):
    """The folder, in ``tmp_path``, of a run that was stopped in the middle of its sixth epoch."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    folder = only_run(tmp_path)
    assert len(checkpoints(folder)) == 2
    assert 3 <= len(metrics_of(folder)) < EPOCHS
    return folder


def assert_whole(folder, other):
    """The record is that of another run, but for where it lies."""
    assert_same_results(folder, other)
    written = (other / "config.yaml").read_text().replace(str(other.parents[1]), str(folder.parents[1]))
    assert (folder / "config.yaml").read_text() == written
    assert environment_of(folder)["epochs"] == EPOCHS


@pytest.mark.parametrize("left", ["half", "none"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, half_done, undisturbed, capsys, left):
    newest = checkpoints(half_done)[0]
    truncate(newest) if left == "half" else os.truncate(newest, 0)
    assert launch(tmp_path) == 0
    assert f"{newest.name} is damaged" in capsys.readouterr().out
    assert_same_results(half_done, undisturbed())


def test_no_usable_checkpoint_is_a_mistake_that_names_force(tmp_path, half_done, capsys):
    for path in checkpoints(half_done):
        truncate(path)
    before = contents(half_done)
    with pytest.raises(UsageError, match="force=true"):
        RunFolder(tmp_path, half_done.name).load_checkpoint(lambda line: None)
    assert launch(tmp_path) == 2
    assert "force=true" in sentence_of(capsys.readouterr().err)
    assert contents(half_done) == before
    assert launch(tmp_path, "force=true") == 0
    assert (half_done.parent / f"{half_done.name}~1").is_dir()


def test_a_checkpoint_of_another_run_is_refused(tmp_path, half_done, capsys):
    half_done.rename(half_done.with_name(Run(config_of(tmp_path, "seed=1")).setup.id))
    assert launch(tmp_path, "seed=1") == 2
    assert half_done.name in sentence_of(capsys.readouterr().err)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, half_done, capsys):
    for path in checkpoints(half_done):
        state = torch.load(path, weights_only=True)
        state["model"] = {key.removeprefix("networks.0."): value for key, value in state["model"].items()}
        torch.save(state, path)
    before = contents(half_done)
    assert launch(tmp_path) == 2
    assert "another version" in sentence_of(capsys.readouterr().err)
    assert contents(half_done) == before


def test_resuming_in_another_precision_is_refused(tmp_path, half_done, monkeypatch, capsys):
    was = environment_of(half_done)["precision"]
    here = "fp32" if was == "bf16" else "bf16"
    monkeypatch.setattr("alignprune_exp.setup.resolve_precision", lambda asked, device: here)
    assert launch(tmp_path) == 2
    assert "precision" in sentence_of(capsys.readouterr().err)
    assert environment_of(half_done)["precision"] == was


@pytest.mark.parametrize("content", ["{}", "[]", '{"status": "finished"}'])
def test_a_summary_that_is_damaged_is_a_mistake(tmp_path, half_done, capsys, content):
    (half_done / "summary.json").write_text(content)
    before = contents(half_done)
    assert launch(tmp_path) == 2
    said = sentence_of(capsys.readouterr().err)
    assert missing("summary.json is damaged force=true", said) == []
    assert contents(half_done) == before


RECORD = ("metrics.jsonl", "dynamics.parquet", "config.yaml", "environment.json")


@pytest.mark.parametrize("name", RECORD)
@pytest.mark.parametrize("damage", ["torn", "binary", "another's", "gone"])
def test_a_damaged_record_is_made_whole_on_resume(tmp_path, half_done, undisturbed, name, damage):
    path = half_done / name
    if damage == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        other = (undisturbed("score=loss") / name).read_bytes()
        path.write_bytes({"torn": content[: len(content) // 2], "binary": b"\xff\0[1]\n", "another's": other}[damage])
    assert launch(tmp_path) == 0
    assert_whole(half_done, undisturbed())


def test_metrics_ahead_of_the_checkpoint_are_cut_on_resume(tmp_path, half_done, undisturbed):
    rows = (undisturbed() / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half_done / "metrics.jsonl").write_text("".join(rows[:9]))
    assert launch(tmp_path) == 0
    assert_same_results(half_done, undisturbed())


@pytest.mark.parametrize("damage", ["gone", "replaced"])
def test_what_becomes_of_the_record_while_a_run_goes_on_is_made_good(tmp_path, undisturbed, monkeypatch, damage):
    def disturb():
        for name in RECORD:
            path = only_run(tmp_path) / name
            path.unlink()
            if damage == "replaced":
                path.write_text("{}\n")

    before_the_second_step(monkeypatch, 5, disturb)
    assert launch(tmp_path) == 0
    assert_whole(only_run(tmp_path), undisturbed())


@pytest.mark.parametrize("loss", ["the folder", "the folder, as it writes", "the lock", "its owner"])
def test_a_run_that_loses_its_folder_ends_with_one_sentence(tmp_path, undisturbed, monkeypatch, capsys, loss):
    other = json.dumps({"host": "elsewhere", "pid": 1, "slurm_job_id": None})
    writes, fsync = count(), os.fsync

    def disturb_a_write(descriptor):
        fsync(descriptor)
        if next(writes) == 20:
            disturb()

    def disturb():
        folder = only_run(tmp_path)
        if loss.startswith("the folder"):
            shutil.rmtree(folder.rename(tmp_path / "away"))
        elif loss == "the lock":
            (folder / "lock").unlink()
        else:
            (folder / "lock").write_text(other)

    with monkeypatch.context() as patch:
        if loss == "the folder, as it writes":
            patch.setattr(os, "fsync", disturb_a_write)
        else:
            before_the_second_step(patch, 5, disturb)
        assert launch(tmp_path) == 1
    assert "has lost its folder" in sentence_of(capsys.readouterr().err)
    if loss.startswith("the folder"):
        assert not list((tmp_path / "runs").iterdir())
    if loss == "its owner":
        assert (only_run(tmp_path) / "lock").read_text() == other
        (only_run(tmp_path) / "lock").unlink()
    assert launch(tmp_path) == 0
    assert_same_results(only_run(tmp_path), undisturbed())
