"""What only a card can show: ``pytest -m cuda``. With ``CUDA_DRY=1`` the same is walked on the CPU, where it can be."""

import os

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn

from alignprune_exp.data.batches import ImageBatches
from alignprune_exp.distributed import parallel
from alignprune_exp.graph import Graph
from alignprune_exp.loop import Loop
from alignprune_exp.network import Network
from alignprune_exp.pruning import PRUNERS, SCORES, DynamicPruning, Pruner
from alignprune_exp.run import Run
from alignprune_exp.setup import Setup
from harness import Stop, assert_same_results, config_of, environment_of, metrics_of, only_run, trained

DRY = os.environ.get("CUDA_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda:0"
TINY = ("threads=1", "epochs=6", "score.window=3", "batch_size=32", "dataset.subset=300", "dataset.test_subset=100")
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (DRY or torch.cuda.is_available()), reason="no CUDA device is seen (pytest -m cuda shows it)"
    ),
]
LINES = {
    "das, lars": ("optimizer=lars",),
    "elr, refresh": ("learner=elr", "score.unseen=refresh"),
    "sop": ("learner=sop",),
    "dividemix": ("learner=dividemix", "learner.warmup=2"),
    "resnet8": ("model=resnet8", "reference=pseudo", "reference.size=20", "reference.warmup=2", "reference.every=1"),
}


def on(results, *line):
    return config_of(results, f"device={DEVICE}", *TINY, *line, base=())


@pytest.fixture
def strict(monkeypatch):
    """Have whatever waits for the device within a step raise."""
    if not DRY:
        be_strict(monkeypatch)


def be_strict(monkeypatch):
    epoch, record, exchange = ImageBatches.epoch, Graph.record, Loop._exchange

    def watched(*given, **more):
        try:
            for batch in epoch(*given, **more):
                torch.cuda.set_sync_debug_mode("error")
                yield batch
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def recorded(graph, work):  # which begins by waiting, once
        torch.cuda.set_sync_debug_mode("default")
        left = record(graph, work)
        torch.cuda.set_sync_debug_mode("error")
        return left

    def exchanged(loop):  # where the steps end, or a run stops between two
        torch.cuda.set_sync_debug_mode("default")
        return exchange(loop)

    monkeypatch.setattr(Loop, "_exchange", exchanged)
    monkeypatch.setattr(ImageBatches, "epoch", watched)
    monkeypatch.setattr(Graph, "record", recorded)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LINES)
def test_a_run_repeats_and_resumes_to_the_bit_and_waits_within_no_step(tmp_path, strict, name, precision):
    line = (*LINES[name], f"precision={precision}")
    first, second = (trained(Run(on(tmp_path / name, *line))) for name in ("first", "second"))
    assert environment_of(first)["device_type"] == torch.device(DEVICE).type
    assert_same_results(first, second)
    stop = Stop()
    assert stop.run(on(tmp_path / "stopped", *line), 13)
    assert not stop.run(on(tmp_path / "stopped", *line))
    assert_same_results(first, only_run(tmp_path / "stopped"))


@pytest.mark.parametrize("name", ["das, lars", "elr, refresh", "sop"])
def test_replayed_steps_have_the_bits_of_those_that_are_not(tmp_path, name):
    one = Run(on(tmp_path / "replayed", *LINES[name], "graph=auto" if DRY else "graph=true"))
    assert (one.loop.network.replayed is not None) is not DRY
    assert metrics_of(trained(one)) == metrics_of(trained(Run(on(tmp_path / "plain", *LINES[name], "graph=false"))))


@pytest.mark.skipif(DRY, reason="test_experiment.py compiles on the CPU")
def test_a_compiled_step_is_replayed_and_comes_close(tmp_path):
    plain, compiled = (
        metrics_of(trained(Run(on(tmp_path / name, "precision=fp32", f"compile={name}")))) for name in ("false", "true")
    )
    assert plain[0]["train_loss"] == pytest.approx(compiled[0]["train_loss"], rel=1e-3)


@pytest.mark.parametrize("score", [name for name, score in SCORES.items() if name != "random" and not score.by_truth])
def test_scores_are_those_of_the_cpu(score):
    losses, n = torch.rand(7, 3000, generator=torch.Generator().manual_seed(0)), 3000
    found = []
    for device in (DEVICE, "cpu"):
        pruning = DynamicPruning(range(n), 8, "full", score, window=5, device=device, labels=np.arange(n) % 7)
        for epoch, row in enumerate(losses):
            index = torch.from_numpy(pruning.order())
            pruning.update(index, row[index].to(device))
            pruning.end_epoch(1 / (1 + epoch))
        found.append(pruning.scores(score))
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize("pruner", [name for name, kind in PRUNERS.items() if issubclass(kind, Pruner)])
def test_selections_are_those_of_the_cpu(pruner):
    n, chosen = 600, []
    for device in (DEVICE, "cpu"):
        pruning = DynamicPruning(range(n), 8, pruner, "loss", device=device, seed=3)
        for epoch in range(7):
            index = torch.from_numpy(pruning.order())
            pruning.update(index, (index * (epoch + 1) % 97).float().to(device))
            pruning.end_epoch(1.0)
        chosen.append((pruning.selection.indices, pruning.selection.weights, pruning.times_selected))
    for mine, theirs in zip(*chosen, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_fp32_is_fp32(tmp_path):
    Setup.of(on(tmp_path, "precision=fp32"), Run(on(tmp_path)).setup.processes)
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 256, 16, 16, generator=draw), torch.randn(64, 256, 3, 3, generator=draw)
    a = torch.randn(512, 512, generator=draw)
    for work, given in ((nn.functional.conv2d, (x, w)), (torch.matmul, (a, a))):
        exact = work(*(each.double() for each in given))
        found = work(*(each.to(DEVICE) for each in given)).cpu().double()
        assert (found - exact).norm() / exact.norm() < 3e-5  # sums in any order come within it; TF32 is at 3e-4


def test_channels_last_is_kept_through_the_network(tmp_path):
    setup = Setup.of(on(tmp_path, "model=resnet18", "precision=bf16"), Run(on(tmp_path)).setup.processes)
    network, kept = Network(setup, "model"), []
    for module in network.learner.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, given, out: kept.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    images = torch.randn(4, 1, 8, 8, device=DEVICE).to(memory_format=torch.channels_last)
    network.training_logits(images)
    assert len(kept) == 20
    assert all(kept)


def test_a_process_group_of_one_averages_nothing_away(tmp_path):
    model = nn.Linear(5, 3).to(DEVICE)
    x = torch.randn(7, 5, device=DEVICE)
    model(x).square().sum().backward()
    expected = model.weight.grad.clone()
    model.zero_grad()
    where = {"backend": "gloo"} if DRY else {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device(DEVICE)}
    dist.init_process_group(init_method=f"file://{tmp_path}/store", rank=0, world_size=1, **where)
    try:
        together = parallel(model)
        for _ in range(3):
            model.zero_grad()
            together(x).square().sum().backward()
            assert torch.equal(model.weight.grad, expected)
        total = torch.ones(2, device=DEVICE)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1]
    finally:
        dist.destroy_process_group()
