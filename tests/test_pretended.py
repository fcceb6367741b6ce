"""Runs on a pretended CUDA device: nothing waits within a step or mixes devices, and the numbers are the CPU's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from alignprune_exp import optim
from alignprune_exp.data.batches import Batches, ImageBatches
from alignprune_exp.learners.ce import CrossEntropy
from alignprune_exp.pruning import DynamicPruning, held
from alignprune_exp.pruning.bank import Trajectories
from alignprune_exp.run import Run
from harness import (
    Stop,
    assert_same_results,
    checkpoint_of,
    config_of,
    environment_of,
    metrics_of,
    only_run,
    samples_of,
    trained,
)
from pretended import Mixed, mapped, pretended

TINY = ("threads=1", "epochs=5", "score.window=3", "batch_size=16", "dataset.subset=70", "dataset.test_subset=20")
TINY += ("precision=fp32", "model.width=4", "reference.size=6", "pruner.delta=1.0")
STATIC = tuple(word for word in TINY if not word.startswith("pruner."))
RUNS = {  # between them every learner, score, pruner, kind of reference set and optimizer
    "das": ("score=das",),
    "elr, spearman, seta, mask": ("learner=elr", "score=spearman", "pruner=seta", "score.unseen=mask"),
    "sop, cosine, refresh, lars": ("learner=sop", "score=cosine", "score.unseen=refresh", "optimizer=lars"),
    "dividemix, loss, rs2": ("learner=dividemix", "learner.warmup=2", "score=loss", "pruner=rs2"),
    "refurbish, sieve": ("learner=refurbish", "learner.history=2", "pruner=sieve", "score=cleaning"),
    "posterior": ("learner=posterior", "method=sieve_transition", "pruner.warmup=2"),
    "query": ("pruner=query", "pruner.start=0.2", "pruner.budget=0.6", "pruner.every=1", "score=loss"),
    "query, curriculum": ("pruner=query", "pruner.start=0.2", "pruner.budget=0.6", "score=curriculum"),
    "topk, settled, float16": ("pruner=topk", "pruner.warmup=2", "score=settled", "score.bank=float16"),
    "sieve, odds": ("pruner=sieve", "score=settled", "pruner.exclude=0.3", "pruner.warmup=2", "recorded=odds"),
    "random, smoothed": ("pruner=random", "label_smoothing=0.1", "recorded=smoothed"),
    "full, population": ("pruner=full", "reference=population"),
    "readout": ("method=sieve_readout", "pruner.warmup=2", "score.every=1"),
    "features": ("method=sieve_features", "pruner.warmup=2"),
    "transition": ("method=sieve_transition", "pruner.warmup=2"),
    "reducible": ("method=rho_loss", "score.holdout=1"),
    "ucb, small_loss": ("pruner=ucb", "score=small_loss"),
    "epsilon_greedy, oracle": ("pruner=epsilon_greedy", "score=oracle"),
    "sieve, supervised": ("method=sieve_supervised", "pruner.warmup=2"),
    "sieve, cleaning, group norm": ("pruner=sieve", "score=cleaning", "pruner.warmup=2", "model.norm=group"),
    "pseudo": ("reference=pseudo", "reference.warmup=2", "reference.every=1"),
    "cleanlab, random": ("reference=pseudo_cleanlab", "reference.warmup=2", "reference.every=1", "score=random"),
    "no reference": ("reference=none", "score=loss"),
    "resnet8": ("model=resnet8", "model.width=4", "optimizer=lars", "reference=per_class"),
    **{f"static_{name}": (f"pruner=static_{name}", "pruner.warmup=2") for name in ("el2n", "glister", "prune4rel")},
    **{f"static_{name}": (f"pruner=static_{name}", "pruner.warmup=2") for name in ("grand", "forgetting", "moderate")},
    **{f"static_{name}": (f"pruner=static_{name}", "pruner.warmup=2") for name in ("margin", "small_loss")},
}
WORDS = ("phase", "ranked_by")
EXACT = (*WORDS, "train_loss", "test_accuracy", "kept_fraction", "kept_noise", "samples_seen")
DELTA = ("das", "sop, cosine, refresh, lars", "pseudo", "cleanlab, random", "no reference", "resnet8")  # infobatch's


def line_of(name):
    words = TINY if name in DELTA else STATIC
    given = {word.split("=")[0] for word in RUNS[name]}
    if given & {"reference", "model"}:
        words = tuple(word for word in words if not (word.startswith("model.") and "model" in given))
        if RUNS[name] and any(word in RUNS[name] for word in ("reference=population", "reference=none")):
            words = tuple(word for word in words if not word.startswith("reference."))
    return *words, *RUNS[name]


@pytest.fixture
def steps(monkeypatch):
    """Have the device watched within steps alone, from a run's first batch of an epoch to its last."""

    def watching(device, batches=ImageBatches):
        device.watched, epoch = False, batches.epoch

        def watched(*given, **more):
            for batch in epoch(*given, **more):
                device.watched = True
                yield batch
            device.watched = False

        monkeypatch.setattr(batches, "epoch", watched)

    return watching


def walked(results, device, *line):
    """The folder of a run on the pretended device, whose steps do not wait; it takes them one operation at a time."""
    folder = trained(Run(config_of(results, "device=cuda:0", "graph=false", *line, base=())))
    assert device.noted == []
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_does_not_wait_within_a_step_and_comes_to_what_the_cpu_does(tmp_path, monkeypatch, steps, name):
    monkeypatch.setattr(optim, "_rate", lambda value, device: torch.tensor(value, device=device))  # on both
    with pretended() as device:
        steps(device)
        there = walked(tmp_path / "there", device, *line_of(name))
    here = trained(Run(config_of(tmp_path / "here", "device=cpu", *line_of(name), base=())))
    assert environment_of(there)["device"] == "a pretended device"
    rows, others = metrics_of(there), metrics_of(here)
    for row, other in zip(rows, others, strict=True):
        assert [row[key] for key in EXACT] == [other[key] for key in EXACT]
        numbers = (
            [math.nan if value is None else value for key, value in each.items() if key not in WORDS]
            for each in (row, other)
        )
        np.testing.assert_allclose(*numbers, rtol=1e-5, atol=0.02)  # ties of correlations
    np.testing.assert_array_equal(samples_of(there)["times_selected"], samples_of(here)["times_selected"])


TASKS = {
    "language": ("model.width=8", "model.heads=2", "model.layers=1", "task.length=16", "task.vocabulary=300"),
    "segmentation": ("model.width=2", "dataset.scenes=100", "dataset.flip=true"),
    # A bias ahead of batch norm has no gradient but its rounding, of which AdamW makes whole steps.
    "detection": ("model.width=2", "optimizer=sgd", "dataset.scenes=100", "dataset.side=32", "dataset.flip=true"),
    "regression": ("model.width=4",),
}


@pytest.mark.parametrize("task", TASKS)
def test_another_task_does_not_wait_within_a_step_either(tmp_path, steps, task):
    """With its own optimizer, which is AdamW, but for detection."""
    line = ("threads=1", "epochs=4", "score.window=3", "batch_size=16", "dataset.subset=60", "dataset.test_subset=20")
    line = (f"task={task}", *line, "precision=fp32", "reference.size=6", "pruner.delta=1.0", *TASKS[task])
    with pretended() as device:
        steps(device, Batches)
        there = walked(tmp_path / "there", device, *line)
    here = trained(Run(config_of(tmp_path / "here", "device=cpu", *line, base=())))
    for row, other in zip(metrics_of(there), metrics_of(here), strict=True):
        for key in ("train_loss", "test_loss", "reference_loss", "kept_fraction"):
            assert row[key] == other[key] or row[key] == pytest.approx(other[key], rel=1e-5)
    np.testing.assert_array_equal(samples_of(there)["times_selected"], samples_of(here)["times_selected"])


def test_a_run_stopped_within_an_epoch_goes_on_from_the_very_step(tmp_path):
    line = ("device=cuda:0", "graph=false", "keep_checkpoints=true", *TINY)
    with pretended() as device:
        device.watched = False
        stop = Stop()
        assert stop.run(config_of(tmp_path / "stopped", *line, base=()), 9)
        assert checkpoint_of(only_run(tmp_path / "stopped"))["step"] > 0
        assert not stop.run(config_of(tmp_path / "stopped", *line, base=()))
        whole = trained(Run(config_of(tmp_path / "whole", *line, base=())))
    assert_same_results(only_run(tmp_path / "stopped"), whole)


# What the pretended device finds


def _waiting(self, step, forward):
    plain, training, predicted = self.task.losses(forward(step.inputs), step.targets, self.smoothing)
    if plain.sum() > 0:  # bool(tensor)
        training = training * 1.0
    return plain, training, predicted


def _with(change):
    def losses(self, step, forward):
        outputs = forward(step.inputs)
        return self.task.losses(change(outputs), step.targets, self.smoothing)

    return losses


FAULTS = {  # by what it is: the learner's losses, what is noted, and in which line
    "bool(tensor)": (_waiting, "waits", "if plain.sum() > 0"),
    ".item()": (_with(lambda x: x * x.sum().item() ** 0), "waits", "x.sum().item()"),
    ".cpu()": (_with(lambda x: x + 0 * len(x.detach().cpu())), "waits", "x.detach().cpu()"),
    "nonzero": (_with(lambda x: x + 0 * len(x.detach().nonzero())), "waits", "x.detach().nonzero()"),
    "a mask": (_with(lambda x: x + 0 * len(x.detach()[x.detach() > 0])), "waits", "[x.detach() > 0]"),
    "a blocking copy": (_with(lambda x: x + torch.zeros(10).to(x.device)), "blocks", "torch.zeros(10).to(x.device)"),
    "what has no fixed order": (
        _with(lambda x: x + 0 * F.adaptive_avg_pool2d(x[None], (3, 5)).sum()),
        "refused",
        "return run_backward",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_waits_blocks_or_is_refused_is_found_by_its_line(tmp_path, monkeypatch, steps, fault):
    losses, kind, line = FAULTS[fault]
    monkeypatch.setattr(CrossEntropy, "losses", losses)
    with pretended() as device:
        steps(device)
        with pytest.raises(AssertionError):
            walked(tmp_path, device, *TINY)
    assert {noted[0] for noted in device.noted} == {kind}
    assert fault == "what has no fixed order" or all(line in noted[3] for noted in device.noted)


def test_tensors_of_both_devices_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(CrossEntropy, "losses", _with(lambda x: x + torch.zeros(10)))
    with pretended(), pytest.raises(Mixed, match=r"aten\.add\.Tensor on both devices, in test_pretended\.py"):
        trained(Run(config_of(tmp_path, "device=cuda:0", "graph=false", *TINY, base=())))


def test_numpy_is_refused_and_what_stays_on_the_cpu_is_left_alone():
    with pretended() as device:
        there = torch.ones(3, device="cuda:0")
        assert (there.device, there.is_cuda) == (torch.device("cuda:0"), True)
        with pytest.raises((TypeError, RuntimeError)):
            there.numpy()
        assert torch.ones(3).sum().item() == 3
        assert device.noted == []
        assert (there + torch.tensor(1.0)).cpu().tolist() == [2, 2, 2]  # as CUDA takes numbers
    assert [noted[0] for noted in device.noted] == ["waits"]


def test_a_pruning_lies_where_the_first_loss_does():
    """In a loop of one's own, whose steps wait for nothing."""
    found = []
    for place in ("cuda:0", "cpu"):
        with pretended() as device:
            pruning = DynamicPruning(range(40), 7, window=3, delta=1.0, clean=[True] * 40)
            for epoch in range(6):
                for number, index in enumerate(torch.from_numpy(pruning.order()).split(9)):
                    loss = (index + epoch).float().sin().to(place).requires_grad_()
                    device.noted.clear()
                    pruning.update(index, loss.square()).backward()
                    assert pruning.weights(index).device == torch.device(place)
                    assert device.noted == [] or place == "cpu" or epoch == number == 0
                pruning.end_epoch(1.0 / (1 + epoch))
            assert pruning.trajectories.last_N.device == torch.device(place)
            state = mapped(lambda x: x.cpu(), pruning.state_dict())
            found.append((pruning.ranking, pruning.times_selected, state))
    for mine, other in zip(*found, strict=True):
        if isinstance(mine, np.ndarray):
            np.testing.assert_allclose(mine, other, atol=1e-5)
    for place in ("cuda:0", "cpu"):
        with pretended():
            gone_on = DynamicPruning(range(40), 7, window=3, delta=1.0, clean=[True] * 40)
            gone_on.load_state_dict(mapped(lambda x, place=place: x.to(place), found[0][2]))
            index = torch.from_numpy(gone_on.order())[:5]
            gone_on.update(index, torch.ones(5, device="cuda:0"))
            assert gone_on.trajectories.last_N.cpu()[index].tolist() == [1.0] * 5


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.integers(1, 30), st.booleans())
def test_losses_that_wait_to_be_written_are_those_that_the_cpu_writes_at_once(seed, batch, reads):
    rng = np.random.default_rng(seed)
    order, losses = rng.permutation(50)[:40], rng.random((3, 50), np.float32)
    found, writes = [], 0

    def counting(self, index, losses, write=Trajectories._write):
        nonlocal writes
        writes += 1
        write(self, index, losses)

    for place in ("cuda:0", "cpu"):
        with pretended(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(held, "SAMPLES", 25)
            patch.setattr(Trajectories, "_write", counting)
            bank, writes = Trajectories(50, 3, device=place), 0
            for epoch in losses:
                for part in np.split(order, range(batch, 40, batch)):
                    index, values = torch.tensor(part, device=place), torch.tensor(epoch[part], device=place)
                    bank.record(index, values)
                    if place != "cpu":  # the next step may use its memory again
                        index.zero_(), values.zero_()
                    if reads and part[0] % 2:
                        assert torch.equal(bank.last_N.cpu()[part], torch.tensor(epoch[part]))
                bank.end_epoch(1.0)
            found.append(mapped(lambda x: x.cpu(), bank.state_dict()))
            if place != "cpu" and not reads:
                assert writes <= 3 * 3  # of 40 samples, 25 at a time at the most, in each epoch
    for mine, other in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True, rtol=0, atol=0)


def test_a_pruning_that_stays_on_the_cpu_waits_for_indices_that_come_from_a_card():
    with pretended() as device:
        pruning = DynamicPruning(range(20), 6, "full", "loss", device="cpu")
        for index in torch.from_numpy(pruning.order()).split(5):
            pruning.update(index.to("cuda:0"), index.float().to("cuda:0"))
        pruning.end_epoch()
        assert {kind for kind, *_ in device.noted} == {"waits", "blocks"}
    assert pruning.report()["loss"].tolist() == list(range(20))


def test_a_sample_that_was_not_selected_is_found_at_the_end_of_the_epoch():
    with pretended():
        pruning = DynamicPruning(range(20), 6, "random", "loss", ratio=0.5, seed=1)
        index = torch.arange(20)
        pruning.update(index, torch.ones(20, device="cuda:0"))
        stray = next(k for k in range(20) if k not in pruning.selection.indices)
        with pytest.raises(ValueError, match=f"sample {stray} is not in the selection of epoch 0"):
            pruning.end_epoch()
