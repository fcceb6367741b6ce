"""One run: its record, its repeatability, and what survives a stop, a kill, damage and a diverging loss."""

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.nn import functional as F

from alignprune_exp import run as run_module
from alignprune_exp import setup
from alignprune_exp.commandline import checked, config_dir
from alignprune_exp.errors import Failed, Stopped, UsageError
from alignprune_exp.learners.ce import CrossEntropy
from alignprune_exp.network import Network
from alignprune_exp.pruning import DynamicPruning
from alignprune_exp.run import Run
from alignprune_exp.runs import CHECKPOINTS, RunFolder
from alignprune_exp.train import main

EPOCHS, WINDOW, PRUNING_EPOCHS = 12, 3, 10  # floor(0.875 * 12) epochs are pruned
SMALL = ("threads=1", f"epochs={EPOCHS}", f"score.window={WINDOW}", "dataset.subset=300", "dataset.test_subset=100")
LONG = ("threads=1", "epochs=6", f"score.window={WINDOW}", "batch_size=8")  # long enough to be killed in

# Keys and columns as the design lists them
METRICS = (
    "epoch ranked_by train_loss test_accuracy test_loss lr kept_fraction kept_noise kept_noise_weighted "
    "reference_loss score_mean low_fraction seconds seconds_select seconds_score seconds_reference seconds_test "
    "samples_seen auroc_loss auroc_das auroc_spearman auroc_cosine auroc_small_loss auroc_settled"
)
SUMMARY = (
    "id status dataset noise noise_rate pairing pruner score window seed scale epochs test_accuracy_final "
    "test_accuracy_best saved kept_noise_mean kept_noise_weighted_mean detection_auroc_last seconds_train "
    "seconds_total samples_per_second commit finished_at"
)
SAMPLES = (
    "index path label clean_label predicted loss score_loss score_das score_spearman score_cosine score_small_loss "
    "score_settled times_selected"
)


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def config_of(results, *overrides, base=SMALL):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return checked(compose("train", [*base, f"paths.results={results}", *overrides]))


def launch(results, *overrides, base=SMALL):
    return main([*base, f"paths.results={results}", *overrides])


def only_run(results):
    (folder,) = (p for p in (Path(results) / "runs").iterdir() if "~" not in p.name)
    return folder


def metrics_of(folder, seconds=False):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows if seconds else [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def assert_same_results(folder, other):
    """All that a run computes is equal, bit by bit."""
    assert metrics_of(folder) == metrics_of(other)
    for name in ("dynamics.parquet", "samples.parquet"):
        frames = [pd.read_parquet(f / name) for f in (folder, other)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    measured = ("seconds_train", "seconds_total", "samples_per_second", "finished_at", "commit")
    summaries = [{k: v for k, v in summary_of(f).items() if k not in measured} for f in (folder, other)]
    assert summaries[0] == summaries[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing disturbed, by its overrides."""

    @cache
    def folder(*overrides, base=SMALL):
        results = tmp_path_factory.mktemp("undisturbed")
        before = sys.argv
        assert launch(results, *overrides, base=base) == 0
        sys.argv = before
        return only_run(results)

    return folder


class Stop:
    """Stands in for the signals: asks a run to stop after a chosen number of its training steps."""

    def __init__(self):
        self.event = threading.Event()
        self.steps = []  # (epoch, samples in the batch) of each step

    def run(self, config, steps):
        """Go on with the run of ``config``; return whether it was stopped."""
        before, update = len(self.steps), DynamicPruning.update
        self.event.clear()

        @contextmanager
        def signals():
            yield self.event

        def counted(pruning, index, *args, **kwargs):
            self.steps.append((pruning.epoch, len(index)))
            if len(self.steps) == before + steps:
                self.event.set()
            return update(pruning, index, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "_stop_signals", signals)
            patch.setattr(DynamicPruning, "update", counted)
            try:
                trained(Run(config))
            except Stopped:
                return True
        return False


def in_the_sixth_epoch(monkeypatch, happens):
    """Let something happen before the second step of the sixth epoch."""
    losses = CrossEntropy.losses

    def disturbed(self, step, forward):
        if (step.epoch, step.number) == (5, 1):
            happens()
        return losses(self, step, forward)

    monkeypatch.setattr(CrossEntropy, "losses", disturbed)


def trained(one):
    """Train a run, or go on with it; return its folder."""
    folder = RunFolder(Path(one.setup.config.paths.results), one.setup.id)
    with folder.claim():
        one.train(folder, "test")
    return folder.path


def checkpoints(folder):
    """The checkpoints of a run folder, latest first."""
    paths = [folder / name for name in CHECKPOINTS if (folder / name).exists()]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def truncate(path):
    """Cut a file to half of its length, keeping its time, as a crashed disk would."""
    times = path.stat()
    path.write_bytes(path.read_bytes()[: times.st_size // 2])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def half_done(tmp_path):
    """The folder of a run stopped in the middle of its sixth epoch, and its config."""
    config = config_of(tmp_path)
    assert Stop().run(config, 24)
    folder = only_run(tmp_path)
    assert len(checkpoints(folder)) == 2
    assert 3 <= len(metrics_of(folder)) < EPOCHS
    return folder


# The record


def test_a_run_leaves_the_record_of_the_design_and_nothing_else(undisturbed):
    folder = undisturbed()
    names = {path.name for path in folder.iterdir()} - {"lock"}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "dynamics.parquet",
        "summary.json",
        "samples.parquet",
        "environment.json",
    }
    summary = summary_of(folder)
    assert summary["id"] == folder.name
    assert summary["status"] == "finished"
    assert set(SUMMARY.split()) <= summary.keys()
    rows = metrics_of(folder, seconds=True)
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    for row in rows:
        assert set(METRICS.split()) <= row.keys()
    assert set(SAMPLES.split()) <= set(pd.read_parquet(folder / "samples.parquet").columns)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["threads"] == 1
    assert environment["precision"] in ("bf16", "fp32")
    assert "alignprune_exp.train" in environment["command"]
    assert {"torch", "numpy", "python", "commit", "device"} <= environment.keys()


@pytest.mark.parametrize(
    "overrides",
    [
        ("score=loss", "reference=none"),
        ("pruner=random", "epochs=4"),
        ("pruner=full",),
        ("score=random",),
        ("score=oracle",),
    ],
    ids=" ".join,
)
def test_every_run_has_the_same_columns_empty_where_unknown(undisturbed, overrides):
    folder = undisturbed(*overrides)
    for row in metrics_of(folder, seconds=True):
        assert set(METRICS.split()) <= row.keys()
    assert set(SUMMARY.split()) <= summary_of(folder).keys()
    assert set(SAMPLES.split()) <= set(pd.read_parquet(folder / "samples.parquet").columns)


@pytest.mark.parametrize("overrides", [(), ("pruner=seta",), ("pruner=topk", "score=small_loss"), ("pruner=random",)])
def test_the_summary_follows_from_the_metrics(undisturbed, overrides):
    folder = undisturbed(*overrides)
    rows, summary = metrics_of(folder, seconds=True), summary_of(folder)
    samples = pd.read_parquet(folder / "samples.parquet")
    which, n = overrides[0] if overrides else "", len(samples)
    delta, warmup = {"pruner=seta": 0.875, "": 0.875}.get(which, 1.0), 5 if which == "pruner=topk" else 0
    pruning = [row for row in rows if warmup <= row["epoch"] <= delta * EPOCHS - 1]
    assert n == 297
    assert summary["saved"] == pytest.approx(1 - sum(row["kept_fraction"] for row in rows) / EPOCHS)
    for key in ("kept_noise", "kept_noise_weighted"):
        assert summary[f"{key}_mean"] == pytest.approx(np.mean([row[key] for row in pruning]))
    assert summary["test_accuracy_final"] == rows[-1]["test_accuracy"]
    assert summary["test_accuracy_best"] == max(row["test_accuracy"] for row in rows)
    assert summary["noise_rate"] == round(0.5 * n) / n == (samples["label"] != samples["clean_label"]).mean()
    assert summary["seconds_total"] == pytest.approx(sum(row["seconds"] for row in rows))
    if summary["score"]:
        assert summary["detection_auroc_last"] == rows[-1][f"auroc_{summary['score']}"]
    assert samples["times_selected"].sum() == rows[-1]["samples_seen"]
    assert rows[-1]["samples_seen"] == round(sum(row["kept_fraction"] for row in rows) * n)


def test_each_epoch_says_what_ranked_it(undisturbed):
    by = [row["ranked_by"] for row in metrics_of(undisturbed())]
    assert by == ["loss"] * WINDOW + ["das"] * (PRUNING_EPOCHS - WINDOW) + [None] * (EPOCHS - PRUNING_EPOCHS)
    by = [row["ranked_by"] for row in metrics_of(undisturbed("score=small_loss"))]
    assert by == ["small_loss"] * PRUNING_EPOCHS + [None] * (EPOCHS - PRUNING_EPOCHS)
    by = [row["ranked_by"] for row in metrics_of(undisturbed("pruner=full"))]
    assert by == [None] * EPOCHS


def test_the_last_score_of_a_sample_is_recomputed_from_its_trajectory(tmp_path):
    one = Run(config_of(tmp_path))
    pruning, ends, losses = one.loop.pruning, [], []
    end_epoch = pruning.end_epoch

    def noted(reference_loss):
        end_epoch(reference_loss)
        ends.append(reference_loss)
        losses.append(pruning.trajectories.last_N.double().numpy().copy())

    pruning.end_epoch = noted
    samples = pd.read_parquet(trained(one) / "samples.parquet")
    window, reference = np.stack(losses[-WINDOW:]), np.array(ends[-WINDOW:])
    expected = [np.corrcoef(window[:, i], reference)[0, 1] for i in range(len(samples))]
    np.testing.assert_allclose(samples["score_das"], expected, atol=1e-5)
    np.testing.assert_allclose(samples["loss"], losses[-1], rtol=1e-6)


def test_the_last_epoch_is_always_evaluated(undisturbed):
    rows = metrics_of(undisturbed("eval_every=5"))
    assert [row["epoch"] for row in rows if row["test_accuracy"] is not None] == [4, 9, 11]
    rows = metrics_of(undisturbed("eval_every=100"))
    assert [row["epoch"] for row in rows if row["test_accuracy"] is not None] == [11]


def test_how_often_a_run_evaluates_changes_nothing_else(undisturbed):
    def training(folder):
        return [{k: v for k, v in row.items() if not k.startswith("test_")} for row in metrics_of(folder)]

    assert training(undisturbed("eval_every=5")) == training(undisturbed())


# What is recorded


class Observed:
    """Listens to a run: the logits of each training step, and what each epoch recorded."""

    def __init__(self, one):
        self.steps, self.returned, self.epochs = [], [], []
        logits, pruning = [], one.loop.pruning
        one.loop.network.learner.register_forward_hook(lambda model, _, output: logits.append(output.detach().float()))
        update, end_epoch = pruning.update, pruning.end_epoch

        def noted_update(index, *args, **kwargs):
            loss = update(index, *args, **kwargs)
            weights = dict(zip(pruning.selection.indices, pruning.selection.weights, strict=True))
            self.steps.append((pruning.epoch, index, logits[-1], torch.tensor([weights[int(i)] for i in index])))
            self.returned.append(loss.item())
            return loss

        def noted_end(reference_loss):
            end_epoch(reference_loss)
            self.epochs.append(pruning.trajectories.last_N.clone())

        pruning.update, pruning.end_epoch = noted_update, noted_end


@pytest.mark.parametrize("recorded", ["plain", "smoothed"])
def test_label_smoothing_is_trained_and_the_loss_recorded_is_the_one_asked_for(tmp_path, recorded):
    one = Run(config_of(tmp_path, "label_smoothing=0.2", f"recorded={recorded}", "epochs=5", "precision=fp32"))
    seen = Observed(one)
    folder = trained(one)
    labels = torch.from_numpy(one.setup.task.data.train.labels)
    plain_sum = {}
    for (epoch, index, logits, weights), returned in zip(seen.steps, seen.returned, strict=True):
        plain = F.cross_entropy(logits, labels[index], reduction="none")
        smoothed = F.cross_entropy(logits, labels[index], reduction="none", label_smoothing=0.2)
        assert returned == pytest.approx((weights * smoothed).sum().item() / len(index), rel=1e-5)
        expected = plain if recorded == "plain" else smoothed
        torch.testing.assert_close(seen.epochs[epoch][index], expected, rtol=1e-5, atol=1e-6)
        plain_sum[epoch] = plain_sum.get(epoch, 0) + plain.double().sum().item()
    for row in metrics_of(folder):
        kept = round(row["kept_fraction"] * len(labels))
        assert row["train_loss"] == pytest.approx(plain_sum[row["epoch"]] / kept, rel=1e-5)


def independently(one, images, labels, smoothing=0.0):
    """Losses in eval mode, from the uint8 images, without the batches of the package."""
    data, learner = one.setup.task.data, one.loop.network.learner
    x = (images.double().movedim(-1, 1) if images.shape[-1] == len(data.mean) else images.double()) / 255
    mean, std = (torch.from_numpy(np.asarray(v)).view(1, -1, 1, 1) for v in (data.mean, data.std))
    was_training = learner.training
    learner.eval()
    with torch.no_grad():
        logits = learner(((x - mean) / std).float())
    learner.train(was_training)
    labels = torch.from_numpy(np.asarray(labels))
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("overrides", [(), ("reference.size=60", "reference.noise=0.5", "label_smoothing=0.2")])
def test_the_reference_and_test_losses_equal_an_independent_evaluation(tmp_path, overrides):
    one = Run(config_of(tmp_path, "precision=fp32", "epochs=5", *overrides))
    last = metrics_of(trained(one))[-1]
    reference = one.setup.task.data.reference
    for split, key in ((reference, "reference_loss"), (one.setup.task.data.test, "test_loss")):
        images = torch.stack([split[i][0] for i in range(len(split))])
        assert last[key] == pytest.approx(independently(one, images, split.labels).double().mean().item(), rel=1e-5)
    right = reference.labels == reference.clean_labels
    assert len(right) == (60 if overrides else 3)
    assert (~right).sum() == (30 if overrides else 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_refresh_records_the_evaluated_loss_of_the_unseen_and_leaves_batch_norm_alone(tmp_path, smoothing):
    smoothed = (f"label_smoothing={smoothing}", "recorded=smoothed")
    one = Run(config_of(tmp_path, "score.unseen=refresh", "precision=fp32", "epochs=6", *smoothed))
    train = one.setup.task.data.train
    images = torch.stack([train[i][0] for i in range(len(train))])
    pruning, learner = one.loop.pruning, one.loop.network.learner
    unseen, end_epoch = pruning.unseen, pruning.end_epoch
    expected, refreshed = {}, []

    def noted_unseen():
        samples = unseen()
        expected["buffers"] = {name: value.clone() for name, value in learner.named_buffers()}
        expected["samples"] = samples.clone()
        expected["losses"] = (
            independently(one, images[samples], train.labels[samples], smoothing) if len(samples) else None
        )
        return samples

    def noted_end(reference_loss):
        for name, value in learner.named_buffers():
            assert torch.equal(value, expected["buffers"][name]), name
        selected = pruning.selection.indices
        end_epoch(reference_loss)
        samples = expected["samples"]
        assert sorted([*selected, *samples.tolist()]) == list(range(pruning.n))
        if len(samples):
            recorded = pruning.trajectories.last_N[samples]
            torch.testing.assert_close(recorded, expected["losses"], rtol=1e-4, atol=1e-5)
        refreshed.append(len(samples))

    pruning.unseen, pruning.end_epoch = noted_unseen, noted_end
    trained(one)
    assert refreshed[0] == 0
    assert max(refreshed) > 50
    assert any(name.endswith("num_batches_tracked") for name in expected["buffers"])


def test_carry_and_mask_do_not_forward_the_unseen(undisturbed):
    for overrides in ((), ("score.unseen=mask",)):
        assert {row["samples_refreshed"] for row in metrics_of(undisturbed(*overrides))} == {0}


# The data


def test_the_split_is_the_same_for_every_method_of_a_study(tmp_path):
    def split(*overrides):
        data = Run(config_of(tmp_path, *overrides)).setup.task.data
        return data, tuple(part.rows.tolist() for part in (data.train, data.reference, data.test))

    first, rows = split()
    methods = (
        ("pruner=full",),
        ("pruner=seta", "score=loss"),
        ("pruner=topk", "score=small_loss"),
        ("pruner=random",),
        ("score.window=5", "batch_size=32", "optimizer.lr=0.1", "epochs=15"),
    )
    for overrides in methods:
        other, other_rows = split(*overrides)
        assert other_rows == rows
        assert np.array_equal(other.train.labels, first.train.labels)
    for noise in ("clean", "sym0.2", "asym0.4"):
        other, other_rows = split(f"noise={noise}")
        assert other_rows == rows
        assert np.array_equal(other.train.clean_labels, first.train.clean_labels)
    other, other_rows = split("seed=1")
    assert other_rows[:2] != rows[:2]
    assert other_rows[2] == rows[2]
    train, reference, _ = rows
    assert not set(train) & set(reference)


def test_training_on_the_reference_enlarges_n_by_its_clean_samples(tmp_path):
    apart = Run(config_of(tmp_path, "reference.size=30")).setup
    joined = Run(config_of(tmp_path, "reference.size=30", "reference.train=true")).setup
    assert apart.n == 270
    assert joined.n == 300
    assert apart.id != joined.id
    train, reference = joined.task.data.train, joined.task.data.reference
    assert np.array_equal(reference.rows, apart.task.data.reference.rows)
    assert set(train.rows) == set(apart.task.data.train.rows) | set(reference.rows)
    added = np.isin(train.rows, reference.rows)
    assert np.array_equal(train.labels[added], train.clean_labels[added])
    noisy = dict(zip(apart.task.data.train.rows, apart.task.data.train.labels, strict=True))
    assert all(noisy[row] == label for row, label in zip(train.rows[~added], train.labels[~added], strict=True))


# Repeating and resuming


@pytest.mark.parametrize("overrides", [(), ("pruner=seta", "score.unseen=refresh"), ("score=random",)])
def test_two_runs_of_one_config_are_identical(tmp_path, undisturbed, overrides):
    assert launch(tmp_path, *overrides) == 0
    folder = only_run(tmp_path)
    assert folder != undisturbed(*overrides)
    assert folder.name == undisturbed(*overrides).name
    assert_same_results(folder, undisturbed(*overrides))


def test_the_bank_has_the_precision_that_is_asked_for(tmp_path, undisturbed):
    assert launch(tmp_path, "score.bank=float16") == 0
    assert only_run(tmp_path).name != undisturbed().name
    one = Run(config_of(tmp_path, "score.bank=float16"))
    assert one.loop.pruning.trajectories.losses_WN.dtype == torch.float16


@pytest.mark.parametrize("unseen", ["carry", "refresh"])
def test_stopped_after_any_step_of_an_epoch_a_run_resumes_bit_identically(tmp_path, undisturbed, capsys, unseen):
    setting = f"score.unseen={unseen}"
    stop = Stop()
    assert not stop.run(config_of(tmp_path / "counted", setting), 10**9)
    of_epoch = [i + 1 for i, (epoch, _) in enumerate(stop.steps) if epoch == 5]  # ranked by DAS, some unseen
    assert len(of_epoch) >= 3
    for steps in of_epoch:
        results = tmp_path / str(steps)
        assert stop.run(config_of(results, setting), steps)
        folder = only_run(results)
        assert not (folder / "summary.json").exists()
        state = torch.load(checkpoints(folder)[0], weights_only=True)
        assert (state["epoch"], state["step"]) == ((5, steps - of_epoch[0] + 1) if steps < of_epoch[-1] else (6, 0))
        capsys.readouterr()
        assert not stop.run(config_of(results, setting), 10**9)
        assert "resumed" in capsys.readouterr().out
        assert_same_results(folder, undisturbed(setting))


def test_stopped_again_and_again_a_run_ends_bit_identically(tmp_path, undisturbed):
    stop = Stop()
    setting = ("pruner=topk", "score=spearman", "score.unseen=mask")
    config, stops = config_of(tmp_path, *setting), 0
    while stop.run(config, 3):
        stops += 1
    assert stops > 10
    assert_same_results(only_run(tmp_path), undisturbed(*setting))


def test_stopped_in_the_last_step_a_run_finishes(tmp_path, undisturbed):
    stop = Stop()
    stop.run(config_of(tmp_path / "counted"), 10**9)
    assert not stop.run(config_of(tmp_path / "stopped"), len(stop.steps))
    assert_same_results(only_run(tmp_path / "stopped"), undisturbed())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_an_epoch_leaves_a_checkpoint_there(
    tmp_path, undisturbed, monkeypatch, capsys, number
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        in_the_sixth_epoch(patch, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            launch(tmp_path)
    assert ended.value.code == 130
    assert signal.getsignal(number) == before
    assert "stopped in epoch 5, step 2" in capsys.readouterr().err
    state = torch.load(checkpoints(only_run(tmp_path))[0], weights_only=True)
    assert (state["epoch"], state["step"]) == (5, 2)
    assert launch(tmp_path) == 0
    assert_same_results(only_run(tmp_path), undisturbed())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["the data loads", "the folder is claimed"])
def test_a_signal_before_training_starts_gets_one_sentence_and_leaves_nothing_in_the_way(
    tmp_path, undisturbed, monkeypatch, capsys, number, when
):
    of, name = {"the data loads": (setup, "open_task"), "the folder is claimed": (run_module.Run, "_resume")}[when]
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
    assert capsys.readouterr().err.splitlines() == [
        "stopped at once; the same command goes on from the latest checkpoint, if there is one"
    ]
    assert not list(tmp_path.rglob("*.*"))
    assert not list(tmp_path.rglob("lock"))
    assert launch(tmp_path) == 0
    assert_same_results(only_run(tmp_path), undisturbed())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_gets_one_sentence(tmp_path, number):
    """As a module of that name is imported, the first that the entry point needs."""
    (tmp_path / "hydra.py").write_text(f"import os; os.kill(os.getpid(), {int(number)}); raise ImportError")
    process = subprocess.run(
        [sys.executable, "-m", "alignprune_exp.train"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 130
    assert process.stderr.startswith("stopped at once; the same command goes on")
    assert len(process.stderr.splitlines()) == 1, process.stderr


def run_apart(results, *overrides):
    return subprocess.Popen(
        [sys.executable, "-m", "alignprune_exp.train", *LONG, f"paths.results={results}", *overrides],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, text):
    for line in process.stdout:
        if line.startswith(text):
            return
    pytest.fail(f"{text!r} never came: {process.stderr.read()}")


def test_a_killed_run_resumes_bit_identically(tmp_path, undisturbed):
    epoch, delay = random.SystemRandom().randint(1, 3), random.SystemRandom().uniform(0, 0.15)
    process = run_apart(tmp_path)
    wait_for(process, f"epoch {epoch}/")
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before"
    assert launch(tmp_path, base=LONG) == 0, f"killed {delay} s after epoch {epoch}"
    assert_same_results(only_run(tmp_path), undisturbed(base=LONG))


@pytest.mark.slow
@pytest.mark.parametrize("again", range(2))
def test_killed_more_than_once_a_run_resumes_bit_identically(tmp_path, undisturbed, again):
    for _ in range(3):
        process = run_apart(tmp_path, "score.unseen=refresh")
        wait_for(process, "run")
        time.sleep(random.SystemRandom().uniform(0, 0.4))
        process.kill()
        process.communicate()
    assert launch(tmp_path, "score.unseen=refresh", base=LONG) == 0
    assert_same_results(only_run(tmp_path), undisturbed("score.unseen=refresh", base=LONG))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["true", "reduce-overhead"])
def test_a_compiled_network_computes_the_same_within_tolerance(tmp_path, mode):
    line = ("precision=fp32", "pruner=random")  # which samples are seen does not hang on the losses
    assert launch(tmp_path / "plain", *line) == 0
    assert launch(tmp_path / "compiled", *line, f"compile={mode}") == 0
    plain, compiled = (metrics_of(only_run(tmp_path / name)) for name in ("plain", "compiled"))
    for row, other in zip(plain, compiled, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)
    assert plain[0]["train_loss"] == pytest.approx(compiled[0]["train_loss"], rel=1e-4)


def test_an_interrupted_run_says_so_in_one_sentence_and_resumes_bit_identically(tmp_path, undisturbed):
    process = run_apart(tmp_path)
    wait_for(process, "epoch 3/")
    time.sleep(0.05)  # of an epoch of some tenths of a second
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(errors.strip().splitlines()) == 1, errors
    assert "stopped" in errors
    folder = only_run(tmp_path)
    assert torch.load(checkpoints(folder)[0], weights_only=True)["epoch"] >= 3
    assert not (folder / "summary.json").exists()
    assert launch(tmp_path, base=LONG) == 0
    assert_same_results(folder, undisturbed(base=LONG))


def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, half_done, undisturbed, capsys):
    newest = checkpoints(half_done)[0]
    truncate(newest)
    assert launch(tmp_path) == 0
    assert f"{newest.name} is damaged" in capsys.readouterr().out
    assert_same_results(half_done, undisturbed())


def test_an_empty_checkpoint_falls_back_to_the_one_before(tmp_path, half_done, undisturbed):
    os.truncate(checkpoints(half_done)[0], 0)
    assert launch(tmp_path) == 0
    assert_same_results(half_done, undisturbed())


def test_no_usable_checkpoint_is_a_mistake_that_names_force(tmp_path, half_done, capsys):
    for path in checkpoints(half_done):
        truncate(path)
    before = {p.name: p.read_bytes() for p in half_done.iterdir()}
    with pytest.raises(UsageError, match="force=true"):
        RunFolder(tmp_path, half_done.name).load_checkpoint(lambda line: None)
    assert launch(tmp_path) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert {p.name: p.read_bytes() for p in half_done.iterdir()} == before
    assert launch(tmp_path, "force=true") == 0
    assert (half_done.parent / f"{half_done.name}~1").is_dir()


def test_a_checkpoint_of_another_run_is_refused(tmp_path, half_done, undisturbed, capsys):
    other = half_done.with_name(Run(config_of(tmp_path, "seed=1")).setup.id)
    half_done.rename(other)
    assert launch(tmp_path, "seed=1") == 2
    error = capsys.readouterr().err
    assert half_done.name in error
    assert len(error.strip().splitlines()) == 1


def test_a_checkpoint_of_another_version_is_refused(tmp_path, half_done, capsys):
    for path in checkpoints(half_done):
        state = torch.load(path, weights_only=True)
        state["model"] = {key.removeprefix("networks.0."): value for key, value in state["model"].items()}
        torch.save(state, path)
    before = {path.name: path.read_bytes() for path in half_done.iterdir() if path.is_file()}
    assert launch(tmp_path) == 2
    assert "another version" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in half_done.iterdir() if path.is_file()} == before


def test_resuming_in_another_precision_is_refused(tmp_path, half_done, monkeypatch, capsys):
    was = json.loads((half_done / "environment.json").read_text())["precision"]
    here = "fp32" if was == "bf16" else "bf16"
    monkeypatch.setattr("alignprune_exp.setup.resolve_precision", lambda asked, device: here)
    assert launch(tmp_path) == 2
    assert "precision" in capsys.readouterr().err
    assert json.loads((half_done / "environment.json").read_text())["precision"] == was


@pytest.mark.parametrize("name", ["metrics.jsonl", "dynamics.parquet", "config.yaml", "environment.json"])
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
    assert_same_results(half_done, undisturbed())
    assert (half_done / "config.yaml").read_text() == written(undisturbed(), tmp_path)
    assert json.loads((half_done / "environment.json").read_text())["epochs"] == EPOCHS


def written(folder, results):
    """The config of a run as it is written for another folder of results."""
    return (folder / "config.yaml").read_text().replace(str(folder.parents[1]), str(results))


@pytest.mark.parametrize("damage", ["gone", "replaced"])
def test_what_becomes_of_the_record_while_a_run_goes_on_is_made_good(tmp_path, undisturbed, monkeypatch, damage):
    def disturb():
        for name in ("metrics.jsonl", "dynamics.parquet", "config.yaml", "environment.json"):
            path = only_run(tmp_path) / name
            path.unlink()
            if damage == "replaced":
                path.write_text("{}\n")

    in_the_sixth_epoch(monkeypatch, disturb)
    assert launch(tmp_path) == 0
    folder = only_run(tmp_path)
    assert_same_results(folder, undisturbed())
    assert (folder / "config.yaml").read_text() == written(undisturbed(), tmp_path)
    assert json.loads((folder / "environment.json").read_text())["epochs"] == EPOCHS


@pytest.mark.parametrize("loss", ["the folder", "the lock", "its owner"])
def test_a_run_that_loses_its_folder_ends_with_one_sentence(tmp_path, undisturbed, monkeypatch, capsys, loss):
    other = json.dumps({"host": "elsewhere", "pid": 1, "slurm_job_id": None})

    def disturb():
        folder = only_run(tmp_path)
        if loss == "the folder":
            shutil.rmtree(folder)
        elif loss == "the lock":
            (folder / "lock").unlink()
        else:
            (folder / "lock").write_text(other)

    with monkeypatch.context() as patch:
        in_the_sixth_epoch(patch, disturb)
        assert launch(tmp_path) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert "has lost its folder" in error
    if loss == "the folder":
        assert not list((tmp_path / "runs").iterdir())
    if loss == "its owner":
        assert (only_run(tmp_path) / "lock").read_text() == other
        (only_run(tmp_path) / "lock").unlink()
    assert launch(tmp_path) == 0
    assert_same_results(only_run(tmp_path), undisturbed())


def test_metrics_ahead_of_the_checkpoint_are_cut_on_resume(tmp_path, half_done, undisturbed):
    rows = (undisturbed() / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half_done / "metrics.jsonl").write_text("".join(rows[:9]))
    assert launch(tmp_path) == 0
    assert_same_results(half_done, undisturbed())


# Ended runs


def test_a_finished_run_is_not_run_again(tmp_path, capsys, monkeypatch):
    assert launch(tmp_path) == 0
    folder = only_run(tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    monkeypatch.setattr(Run, "train", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    assert launch(tmp_path) == 0
    assert "finished already" in capsys.readouterr().out
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before


@pytest.mark.parametrize("content", ["{}", "[]", '{"status": "finished"}'])
def test_a_summary_that_is_damaged_is_a_mistake(tmp_path, half_done, capsys, content):
    (half_done / "summary.json").write_text(content)
    before = {p.name: p.read_bytes() for p in half_done.iterdir()}
    assert launch(tmp_path) == 2
    error = capsys.readouterr().err
    assert "summary.json is damaged (" in error
    assert len(error.splitlines()) == 1
    assert {p.name: p.read_bytes() for p in half_done.iterdir()} == before


def test_force_runs_again_and_keeps_the_old_folders(tmp_path):
    assert launch(tmp_path) == 0
    folder = only_run(tmp_path)
    (folder / "note").write_text("first")
    assert launch(tmp_path, "force=true") == 0
    (folder / "note").write_text("second")
    assert launch(tmp_path, "force=true") == 0
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, f"{folder.name}~1", f"{folder.name}~2"]
    assert (folder.with_name(f"{folder.name}~1") / "note").read_text() == "first"
    assert (folder.with_name(f"{folder.name}~2") / "note").read_text() == "second"
    assert not (folder / "note").exists()
    assert_same_results(folder, folder.with_name(f"{folder.name}~1"))
    for path in folder.parent.iterdir():
        assert not (path / "lock").exists()


@pytest.fixture
def diverging(monkeypatch):
    """Let the weights become infinite in the first step."""
    learn = Network.learn

    def ruined(self, loss):
        learn(self, loss)
        with torch.no_grad():
            for weight in self.learner.parameters():
                weight *= math.inf

    monkeypatch.setattr(Network, "learn", ruined)


@pytest.mark.usefixtures("diverging")
def test_a_loss_that_is_not_finite_fails_the_run_and_its_record_says_where(tmp_path, capsys):
    assert launch(tmp_path) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    folder = only_run(tmp_path)
    summary = summary_of(folder)
    assert summary["status"] == "failed"
    assert set(SUMMARY.split()) <= summary.keys()
    assert "epoch 0, step 1" in summary["error"]  # step 0 still has the initial weights
    assert "epoch 0, step 1" in error
    assert checkpoints(folder) == []
    assert not (folder / "metrics.jsonl").exists() or metrics_of(folder) == []


@pytest.mark.usefixtures("diverging")
def test_a_failed_run_says_why_and_force_tries_again(tmp_path, capsys, monkeypatch):
    assert launch(tmp_path) == 1
    folder = only_run(tmp_path)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", lambda *_: pytest.fail("trained again"))
        assert launch(tmp_path) == 1
    error = capsys.readouterr().err
    assert "step 1" in error
    assert "force=true" in error
    assert launch(tmp_path, "force=true") == 1
    assert summary_of(folder.with_name(f"{folder.name}~1"))["status"] == "failed"
    assert summary_of(folder)["status"] == "failed"


def test_a_loss_that_turns_bad_later_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    one = Run(config)
    losses = one.loop.network.learner.losses

    def broken(step, forward):
        plain, smoothed, predicted = losses(step, forward)
        bad = step.epoch == 4 and step.number >= 2
        return (plain * math.nan, smoothed * math.nan, predicted) if bad else (plain, smoothed, predicted)

    one.loop.network.learner.losses = broken
    monkeypatch.setattr(run_module, "Run", lambda config, processes: one)
    with pytest.raises(Failed, match="epoch 4, step 2"):
        run_module.run(config, "test")
    folder = only_run(tmp_path)
    assert summary_of(folder)["status"] == "failed"
    assert [row["epoch"] for row in metrics_of(folder)] == [0, 1, 2, 3]
    for path in checkpoints(folder):
        state = torch.load(path, weights_only=True)
        assert state["epoch"] <= 4
        assert state["step"] == 0
        assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.usefixtures("diverging")
def test_a_stop_after_a_bad_step_leaves_no_checkpoint_of_it(tmp_path):
    stop = Stop()
    with pytest.raises(Failed, match="epoch 0, step 1"):
        stop.run(config_of(tmp_path), 3)
    assert checkpoints(only_run(tmp_path)) == []
    assert summary_of(only_run(tmp_path))["status"] == "failed"


@pytest.mark.parametrize("factor", [1e30, math.inf])
def test_weights_that_the_last_step_of_an_epoch_ruins_fail_the_run(tmp_path, capsys, monkeypatch, factor):
    """No reference set would notice, and only the evaluation sees a loss that is not finite."""
    learn, steps = Network.learn, []

    def ruined(self, loss):
        learn(self, loss)
        steps.append(1)
        with torch.no_grad():
            for weight in self.learner.parameters():
                weight *= factor if len(steps) == 4 else 1

    monkeypatch.setattr(Network, "learn", ruined)
    assert launch(tmp_path, "reference=none", "score=loss", "batch_size=400", "precision=fp32") == 1
    assert len(steps) == 4
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    folder = only_run(tmp_path)
    assert summary_of(folder)["status"] == "failed"
    for path in checkpoints(folder):
        state = torch.load(path, weights_only=True)
        assert all(torch.isfinite(value).all() for value in state["model"].values())


# A machine that has too little


@pytest.mark.parametrize("good", [0, 3, 4, 5, 39, 43, 44])
def test_a_full_disk_stops_with_one_sentence_and_the_run_goes_on_later(
    tmp_path, undisturbed, monkeypatch, capsys, good
):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > good:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert launch(tmp_path) == 1
    error = capsys.readouterr().err
    assert re.search(r"No space left on device \(/.*\); free some space, and the same command goes on", error)
    assert len(error.strip().splitlines()) == 1, error
    folder = only_run(tmp_path)
    assert not (folder / "summary.json").exists()
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert launch(tmp_path) == 0
    assert_same_results(folder, undisturbed())


@pytest.mark.parametrize("limit", [100, 3000, 30_000])
def test_a_disk_that_is_full_before_a_checkpoint_is_whole_keeps_the_ones_before(
    tmp_path, undisturbed, monkeypatch, capsys, limit
):
    before, kept = resource.getrlimit(resource.RLIMIT_FSIZE), {}

    def fill():
        kept.update({path.name: path.read_bytes() for path in checkpoints(only_run(tmp_path))})
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    with monkeypatch.context() as patch:
        in_the_sixth_epoch(patch, fill)
        try:
            assert launch(tmp_path) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert re.search(r"^File too large \(/.*\); raise the limit .*, and the same command goes on", error)
    assert len(error.splitlines()) == 1, error
    folder = only_run(tmp_path)
    assert {path.name: path.read_bytes() for path in checkpoints(folder)} == kept
    assert len(kept) == 2
    assert launch(tmp_path) == 0
    assert_same_results(folder, undisturbed())


def of_cuda():
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 3.00 GiB is "
        "free. See documentation for Memory Management\n(https://pytorch.org/docs/stable/notes/cuda.html)"
    )


def of_python():
    raise MemoryError


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (of_cuda, "the GPU has too little free memory for 20.00 GiB more; "),
        (lambda: torch.empty(10**13), "this machine has too little free memory for 40000000000000 bytes more; "),
        (lambda: np.empty(10**15), "this machine has too little free memory for 7.11 PiB more; "),
        (of_python, "this machine has too little free memory; "),
    ],
    ids=["cuda", "torch", "numpy", "python"],
)
def test_too_little_memory_stops_with_one_sentence_and_the_run_goes_on_later(
    tmp_path, undisturbed, monkeypatch, capsys, happens, words
):
    with monkeypatch.context() as patch:
        in_the_sixth_epoch(patch, happens)
        assert launch(tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith(words)
    assert "batch_size" in error
    assert len(error.splitlines()) == 1, error
    folder = only_run(tmp_path)
    assert launch(tmp_path) == 0
    assert_same_results(folder, undisturbed())


def test_a_bug_is_not_taken_for_a_machine_that_has_too_little(tmp_path, monkeypatch):
    def bug():
        raise RuntimeError("the sizes do not match")

    in_the_sixth_epoch(monkeypatch, bug)
    with pytest.raises(RuntimeError, match="the sizes do not match"):
        launch(tmp_path)
