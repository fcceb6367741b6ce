"""One run: its record, its repeatability, and what it does where it diverges or the machine has too little."""

import math
import os
import re
import resource
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from alignprune_exp import record
from alignprune_exp import run as run_module
from alignprune_exp.errors import Failed
from alignprune_exp.network import Network
from alignprune_exp.records import read_record, read_samples
from alignprune_exp.run import Run
from alignprune_exp.runs import RunFolder, Writing
from harness import (
    EPOCHS,
    WINDOW,
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
    only_run,
    rows_of,
    samples_of,
    sentence_of,
    summary_of,
    trained,
)

PRUNING_EPOCHS = 10  # floor(0.875 * 12) epochs are pruned

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
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == list(range(EPOCHS))
    for row in rows:
        assert set(METRICS.split()) <= row.keys()
    assert set(SAMPLES.split()) <= set(samples_of(folder).columns)
    environment = environment_of(folder)
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
    for row in rows_of(folder):
        assert set(METRICS.split()) <= row.keys()
    assert set(SUMMARY.split()) <= summary_of(folder).keys()
    assert set(SAMPLES.split()) <= set(samples_of(folder).columns)


@pytest.mark.parametrize("overrides", [(), ("pruner=seta",), ("pruner=topk", "score=small_loss"), ("pruner=random",)])
def test_the_summary_follows_from_the_metrics(undisturbed, overrides):
    folder = undisturbed(*overrides)
    rows, summary = rows_of(folder), summary_of(folder)
    samples = samples_of(folder)
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


def test_a_shorter_run_counts_what_it_saves_against_the_whole_one(undisturbed):
    folder = undisturbed("pruner=shorter", "saved=0.75")
    summary = summary_of(folder)
    assert (summary["epochs"], summary["planned_epochs"], summary["saved"]) == (EPOCHS // 4, EPOCHS, 0.75)
    assert read_record(folder).summary == summary
    assert read_samples(folder)["times_selected"].eq(EPOCHS // 4).all()


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
        ends.append(reference_loss.mean().item())
        losses.append(pruning.trajectories.last_N.double().numpy().copy())

    pruning.end_epoch = noted
    samples = samples_of(trained(one))
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
    """Listens to a run: the logits of each training step, the loss it went down, and what each epoch recorded."""

    def __init__(self, one):
        self.steps, self.descended, self.epochs = [], [], []
        logits, pruning, network = [], one.loop.pruning, one.loop.network
        network.learner.register_forward_hook(lambda model, _, output: logits.append(output.detach().float()))
        learn, observe, end_epoch = network.learn, pruning.observe, pruning.end_epoch

        def noted_learn(loss):
            self.descended.append(loss.item())
            learn(loss)

        def noted_observe(index, *losses):
            observe(index, *losses)
            weights = dict(zip(pruning.selection.indices, pruning.selection.weights, strict=True))
            self.steps.append((pruning.epoch, index, logits[-1], torch.tensor([weights[int(i)] for i in index])))

        def noted_end(reference_loss):
            end_epoch(reference_loss)
            self.epochs.append(pruning.trajectories.last_N.clone())

        network.learn, pruning.observe, pruning.end_epoch = noted_learn, noted_observe, noted_end


@pytest.mark.parametrize("recorded", ["plain", "smoothed", "doubt", "odds", "disagreement"])
def test_label_smoothing_is_trained_and_what_is_recorded_is_what_was_asked_for(tmp_path, recorded):
    one = Run(config_of(tmp_path, "label_smoothing=0.2", f"recorded={recorded}", "epochs=5", "precision=fp32"))
    seen = Observed(one)
    folder = trained(one)
    labels = torch.from_numpy(one.setup.task.data.train.labels)
    plain_sum = {}
    for (epoch, index, logits, weights), descended in zip(seen.steps, seen.descended, strict=True):
        plain = F.cross_entropy(logits, labels[index], reduction="none")
        smoothed = F.cross_entropy(logits, labels[index], reduction="none", label_smoothing=0.2)
        assert descended == pytest.approx((weights * smoothed).sum().item() / len(index), rel=1e-5)
        others = logits.clone().scatter_(1, labels[index][:, None], -torch.inf).logsumexp(1)
        expected = {
            "plain": plain,
            "smoothed": smoothed,
            "doubt": 1 - logits.softmax(1)[range(len(index)), labels[index]],
            "odds": others - logits[range(len(index)), labels[index]],
            "disagreement": (logits.argmax(1) != labels[index]).float(),
        }[recorded]
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


# Repeating


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


# Ended runs


def test_a_finished_run_is_not_run_again(tmp_path, capsys, monkeypatch):
    assert launch(tmp_path) == 0
    folder = only_run(tmp_path)
    before, at = contents(folder), [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    monkeypatch.setattr(Run, "train", lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    assert launch(tmp_path) == 0
    assert "finished already" in capsys.readouterr().out
    assert contents(folder) == before
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == at


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
    error = sentence_of(capsys.readouterr().err)
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("score=supervised noise=clean", ["score=supervised learns from 5 wrong labels and right ones, and 0 of "]),
        ("score=oracle noise=clean", ["score=oracle ranks all samples alike, since 0 of "]),
        ("score=supervised noise=sym0.5", []),
        ("score=oracle noise=sym0.5", []),
        ("score=settled noise=clean", []),
        ("score=oracle noise=clean pruner=full", []),
    ],
)
def test_a_score_that_the_labels_leave_nothing_to_go_by_is_said(tmp_path, line, said):
    notes = Run(config_of(tmp_path, *line.split())).setup.notes
    assert len(notes) == len(said)
    assert all(note.startswith(words) for note, words in zip(notes, said, strict=True))


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        ("model=resnet18 dataset.subset=30", "set another batch_size, or model.norm=group"),
        ("task=segmentation model=deeplabv3 dataset.scenes=30 dataset.side=32", "set another batch_size"),
    ],
)
def test_a_batch_of_one_sample_that_batch_norm_cannot_take_is_said(tmp_path, capsys, model, remedy):
    line = (*model.split(), "batch_size=1", "reference.size=8", "epochs=1", "pruner=full", "score=loss", "threads=1")
    assert launch(tmp_path, base=line) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"epoch 0, step 0: a batch of one sample has nothing to be normalised by; {remedy}")


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
    sentence_of(capsys.readouterr().err)
    folder = only_run(tmp_path)
    assert summary_of(folder)["status"] == "failed"
    for path in checkpoints(folder):
        state = torch.load(path, weights_only=True)
        assert all(torch.isfinite(value).all() for value in state["model"].values())


# The end of an epoch, which is worked out and written while the next one trains


@pytest.fixture
def beside(monkeypatch):
    """Have something called with the number of each epoch before its dynamics are worked out, from now on."""
    dynamics = record.dynamics

    def calling(happens):
        def noticed(epoch, *given):
            happens(epoch)
            return dynamics(epoch, *given)

        monkeypatch.setattr(record, "dynamics", noticed)

    return calling


def test_the_next_epoch_does_not_wait_for_the_diagnostics(tmp_path, undisturbed, monkeypatch, beside):
    trains = threading.Event()
    before_the_second_step(monkeypatch, 5, trains.set)
    beside(lambda epoch: epoch != 4 or trains.wait(20) or pytest.fail("epoch 5 does not begin"))
    assert launch(tmp_path) == 0
    assert_same_results(only_run(tmp_path), undisturbed())


@pytest.mark.parametrize("steps", [20, 21, 24])
def test_a_checkpoint_has_the_record_of_every_epoch_that_it_is_past(tmp_path, undisturbed, beside, steps):
    stop, saved, save = Stop(), [], RunFolder.save_checkpoint

    def noted(folder, state):
        saved.append((state["epoch"], len(state["record"]["metrics"].splitlines())))
        save(folder, state)

    beside(lambda epoch: time.sleep(0.2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", noted)
        assert stop.run(config_of(tmp_path), steps)
    epochs = [epoch for epoch, _ in saved]
    assert epochs[:4] == [1, 2, 3, 4]
    assert [rows for _, rows in saved] == epochs
    assert len(metrics_of(only_run(tmp_path))) == checkpoint_of(only_run(tmp_path))["epoch"] == epochs[-1]
    assert not stop.run(config_of(tmp_path))
    assert_same_results(only_run(tmp_path), undisturbed())


def test_what_a_kill_leaves_while_diagnostics_are_pending_goes_on_to_the_same_bits(
    tmp_path, undisturbed, monkeypatch, beside
):
    trains, left = threading.Event(), tmp_path / "left"

    def keep(epoch):
        if epoch == 4:
            assert trains.wait(20)
            shutil.copytree(tmp_path / "whole", left, ignore=shutil.ignore_patterns("lock"))

    with monkeypatch.context() as patch:
        before_the_second_step(patch, 5, trains.set)
        beside(keep)
        assert launch(tmp_path / "whole") == 0
    assert len(metrics_of(only_run(left))) == checkpoint_of(only_run(left))["epoch"] == 4
    beside(lambda epoch: None)
    assert launch(left) == 0
    assert environment_of(only_run(left))["resumed_at_epoch"] == 4
    assert_same_results(only_run(left), undisturbed())


@pytest.mark.parametrize("number", [4, EPOCHS - 1])
def test_what_fails_in_the_diagnostics_ends_the_run_and_is_said(tmp_path, undisturbed, beside, capsys, number):
    def failing(error):
        def fail(epoch):
            if epoch == number:
                raise error

        return fail

    beside(failing(RuntimeError("the sizes do not match")))
    with pytest.raises(RuntimeError, match="the sizes do not match") as found:
        launch(tmp_path)
    assert "complete" in [entry.name for entry in found.traceback]
    assert len(metrics_of(only_run(tmp_path))) == number
    beside(failing(MemoryError()))
    assert launch(tmp_path) == 1
    assert sentence_of(capsys.readouterr().err).startswith("this machine has too little free memory")
    assert not (only_run(tmp_path) / "summary.json").exists()
    beside(lambda epoch: None)
    assert launch(tmp_path) == 0
    assert_same_results(only_run(tmp_path), undisturbed())


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
    error = sentence_of(capsys.readouterr().err)
    assert re.search(r"No space left on device \(/.*\); free some space, and the same command goes on", error)
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
        patch.setattr(Writing, "put", lambda writing, write: write())  # what is kept does not change while it is read
        before_the_second_step(patch, 5, fill)
        try:
            assert launch(tmp_path) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = sentence_of(capsys.readouterr().err)
    assert re.search(r"^File too large \(/.*\); raise the limit .*, and the same command goes on", error)
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
        before_the_second_step(patch, 5, happens)
        assert launch(tmp_path) == 1
    error = sentence_of(capsys.readouterr().err)
    assert error.startswith(words)
    assert "batch_size" in error
    folder = only_run(tmp_path)
    assert launch(tmp_path) == 0
    assert_same_results(folder, undisturbed())


def test_a_bug_is_not_taken_for_a_machine_that_has_too_little(tmp_path, monkeypatch):
    def bug():
        raise RuntimeError("the sizes do not match")

    before_the_second_step(monkeypatch, 5, bug)
    with pytest.raises(RuntimeError, match="the sizes do not match"):
        launch(tmp_path)
