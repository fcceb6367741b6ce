"""The benchmarks at small sizes, and the step loop watched for whatever would wait for a device."""

import json
import re
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import bench_curate
import bench_data
import bench_prune4rel
import bench_selection
import bench_step
import benchmarking
from alignprune_exp.data.batches import ImageBatches
from alignprune_exp.data.images import Array
from alignprune_exp.data.source import Images
from alignprune_exp.data.split import Split
from alignprune_exp.pruning import PRUNERS, SCORES, DynamicPruning, Selection
from alignprune_exp.pruning.coresets.prune4rel import Prune4ReL
from alignprune_exp.run import Run
from pretended import wrapped

KEYS = ["step", "samples", "seconds", "baseline", "baseline_seconds", "ratio", "peak_mb"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmarking, "memory_bandwidth", lambda: 1e10)
    for bench in (bench_selection, bench_data, bench_step, bench_prune4rel, bench_curate):
        monkeypatch.setattr(bench, "THREADS", 1)
    for bench in (bench_selection, bench_data):
        monkeypatch.setattr(bench, "memory_bandwidth", lambda: 1e10)
    monkeypatch.setattr(bench_selection, "MAIN_JOB", ("epochs=13", "dataset.subset=200", "eval_every=13"))
    monkeypatch.setattr(bench_step, "start_up", lambda: None)
    yield
    torch.set_num_threads(threads)


def rows_of(bench, tmp_path, *arguments):
    file = tmp_path / "rows.json"
    status = bench.main([*arguments, "--json", str(file)])
    rows = json.loads(file.read_text())
    assert all(list(row) == KEYS for row in rows)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert row["peak_mb"] > 10
    return status, rows


def test_selection_has_a_row_for_each_step(tmp_path, capsys):
    status, rows = rows_of(bench_selection, tmp_path, "--samples", "4000")
    assert status == 0
    steps = ["infobatch", "seta", "das", "cosine", "small_loss", "spearman", "record", "readout"]
    assert [row["step"] for row in rows] == steps
    assert {row["samples"] for row in rows} == {4000}
    said = capsys.readouterr().out
    assert "shuffle besides" in said
    assert "half-precision bank moves DAS by 0.00" in said


class Wrong(SCORES["das"]):
    name = "das"

    def __call__(self, history):
        return super().__call__(history) + 1e-3


class Heavy(PRUNERS["infobatch"]):
    def select(self, scores, epoch, epochs, rng):
        selection = super().select(scores, epoch, epochs, rng)
        return Selection(selection.indices, selection.weights * 2)


class OneMore(PRUNERS["seta"]):
    def select(self, scores, epoch, epochs, rng):
        selection = super().select(scores, epoch, epochs, rng)
        return Selection(selection.indices[1:], selection.weights[1:])


@pytest.mark.parametrize(
    ("registry", "name", "wrong"), [(SCORES, "das", Wrong), (PRUNERS, "infobatch", Heavy), (PRUNERS, "seta", OneMore)]
)
def test_a_result_that_differs_ends_with_status_one_and_is_named(registry, name, wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(registry, name, wrong)
    monkeypatch.setattr(bench_selection, "half_precision", lambda: (0.0, 1))
    monkeypatch.setattr(bench_selection, "check_clusters", lambda *_: None)
    status, _ = rows_of(bench_selection, tmp_path, "--samples", "1000")
    assert status == 1
    assert f"WRONG: {name}: " in capsys.readouterr().out


def test_looser_clusters_and_a_half_precision_that_moves_das_are_wrong_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_selection, "cluster", lambda scores, groups: np.arange(len(scores)) % groups)
    monkeypatch.setattr(bench_selection, "half_precision", lambda: (0.03, 1))
    monkeypatch.setattr(bench_selection, "compare", lambda *_: None)
    assert rows_of(bench_selection, tmp_path, "--samples", "1000")[0] == 1
    said = capsys.readouterr().out
    assert "looser clusters of scores, three values" in said
    assert "moves DAS by more than 0.02" in said


def test_data_compares_memory_and_disk(tmp_path):
    status, rows = rows_of(bench_data, tmp_path, "--images", "300", "--jpegs", "20")
    assert status == 0
    assert [row["step"] for row in rows] == ["in memory", "in memory", "from disk"]


def test_prune4rel_is_compared_with_its_rule(tmp_path, monkeypatch, capsys):
    small = ("--samples", "300", "--classes", "4")
    status, rows = rows_of(bench_prune4rel, tmp_path, *small)
    assert status == 0
    assert [(row["step"], row["samples"]) for row in rows] == [("prune4rel", 300)]
    assert "300 samples: " in capsys.readouterr().out
    monkeypatch.setattr(bench_prune4rel, "Prune4ReL", lambda **settings: Prune4ReL(**settings | {"balanced": False}))
    assert rows_of(bench_prune4rel, tmp_path, *small)[0] == 1


def test_curation_is_timed_in_each_layout_and_compared_with_the_packages_scores(tmp_path, monkeypatch, capsys):
    small = ("--documents", "3000", "--memory", "200MB")
    status, rows = rows_of(bench_curate, tmp_path, *small)
    assert status == 0
    assert [row["step"] for row in rows] == ["rows", "checkpoints", "blocks", "files", "buckets"]
    assert "1e+10 documents on 100 nodes" in capsys.readouterr().out
    monkeypatch.setattr(bench_curate, "LAYOUTS", {"rows": bench_curate.write_rows})
    monkeypatch.setattr(bench_curate, "CLOSE", -1)
    assert rows_of(bench_curate, tmp_path, *small)[0] == 1
    assert "WRONG: rows: other scores" in capsys.readouterr().out


def test_other_batches_than_the_plain_ones_are_wrong(monkeypatch, tmp_path, capsys):
    epoch = ImageBatches.epoch

    def brighter(*given):
        return ((index, images + 0.01, labels) for index, images, labels in epoch(*given))

    monkeypatch.setattr(ImageBatches, "epoch", brighter)
    monkeypatch.setattr(bench_data, "from_disk", lambda *_: None)
    assert rows_of(bench_data, tmp_path, "--images", "150")[0] == 1
    assert "WRONG: in memory" in capsys.readouterr().out


def test_the_step_and_the_epochs(tmp_path, capsys):
    arguments = ("--model", "resnet8", "--batch", "4", "--images", "60", "--epochs", "8", "--digits", "14")
    status, rows = rows_of(bench_step, tmp_path, *arguments)
    assert status == 0
    assert [row["step"] for row in rows] == ["step", "pruned epoch"]
    said = capsys.readouterr().out
    assert "of a full epoch" in said
    shares = [float(share) for share in re.findall(r"([\d.]+)%, is outside of its steps", said)]
    assert len(shares) == 2
    assert all(0 < share < 100 for share in shares)


def test_another_loss_in_bf16_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_step, "CLOSE", -1)
    monkeypatch.setattr(bench_step, "epochs", lambda *_: None)
    monkeypatch.setattr(bench_step, "digits", lambda *_: None)
    assert rows_of(bench_step, tmp_path, "--model", "resnet8", "--batch", "4")[0] == 1


# ---- nothing in a step waits for the device ----------------------------------------------------------------

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device than the CPU, and holds one that is."""

    __new__ = staticmethod(wrapped)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the mode")


class OtherDevice(TorchDispatchMode):
    """Keeps a pretended device, and notes the calls whose result the CPU has to wait for: name and elements."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Elsewhere)]
        here = not given if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "cpu"
        copied_here = func is aten.copy_.default and not isinstance(args[0], Elsewhere)
        if given and (func in WAITS or here or copied_here):
            self.waits.append((func.__name__, given[0].numel()))
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        args, kwargs = tree_map_only(Elsewhere, lambda x: x.held, (args, kwargs))
        result = func(*args, **kwargs)
        if here or copied_here:
            return result
        known = {id(x.held): x for x in given}  # what is changed in place stays the same tensor
        return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else Elsewhere(x), result)


@pytest.mark.parametrize("unseen", ["carry", "mask", "refresh"])
def test_observing_waits_for_no_device_and_selecting_copies_the_scores_once(unseen):
    n, epochs, losses = 50, 9, torch.rand(9, 50)
    with OtherDevice() as device:
        pruning = DynamicPruning(range(n), epochs, window=3, unseen=unseen, delta=1.0, device="meta")
        there = losses.to("meta")
        for epoch in range(epochs):
            order = torch.from_numpy(pruning.order())
            device.waits.clear()
            for index in order.split(7):
                pruning.update(index, there[epoch].index_select(0, index.to("meta")))
            assert not device.waits
            if unseen == "refresh":
                rest = pruning.unseen()
                pruning.record(rest, there[epoch].index_select(0, rest))
            device.waits.clear()
            pruning.end_epoch(1.0 / (1 + epoch))
            assert [elements for _, elements in device.waits if elements > 1] == [n, n]  # who was seen, and the scores
            assert len(device.waits) <= 4
    on_cpu = DynamicPruning(range(n), epochs, window=3, unseen=unseen, delta=1.0)
    for epoch in range(epochs):
        index = torch.from_numpy(on_cpu.order())
        on_cpu.update(index, losses[epoch][index])
        if unseen == "refresh":
            rest = on_cpu.unseen()
            on_cpu.record(rest, losses[epoch][rest])
        on_cpu.end_epoch(1.0 / (1 + epoch))
    np.testing.assert_array_equal(on_cpu.times_selected, pruning.times_selected)
    np.testing.assert_allclose(on_cpu.ranking, pruning.ranking, atol=1e-5)


def test_batches_held_on_a_device_wait_for_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 8, 8), dtype=np.uint8)
    source = Images(np.arange(30) % 3, Array(pixels))
    split = Split(source, np.arange(30), source.labels, None, torch.from_numpy(pixels))
    settings = {"batch_size": 7, "mean": np.full(3, 0.5), "std": np.full(3, 0.2), "seed": 0, "train": True}
    with OtherDevice() as device:
        made = list(ImageBatches(split, device="meta", flip=True, crop=2, **settings).epoch(torch.arange(30), 1))
        assert not device.waits
    for (_, x, labels), (_, y, expected) in zip(
        made, ImageBatches(split, device="cpu", flip=True, crop=2, **settings).epoch(torch.arange(30), 1), strict=True
    ):
        assert torch.equal(x.held, y)
        assert torch.equal(labels.held, expected)


class Watched(TorchDispatchMode):
    """Notes which files of the package make calls that would wait for a device, while it is on."""

    def __init__(self):
        super().__init__()
        self.on, self.callers = False, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.on and func in WAITS:
            ours = [frame for frame in traceback.extract_stack() if "/alignprune_exp/" in frame.filename]
            self.callers.add(Path(ours[-1].filename).name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learner", [["ce"], ["elr"], ["sop"], ["dividemix", "learner.warmup=2"]])
def test_the_step_loop_of_a_run_waits_in_its_checks_on_the_cpu_alone(monkeypatch, learner):
    """On the CPU; the tests above show that what they do there does not wait elsewhere."""
    short = ("epochs=12", "dataset.subset=200", "pruner.delta=1.0", "eval_every=12")
    run = Run(benchmarking.config(f"learner={learner[0]}", *learner[1:], *short))
    watched, epoch = Watched(), run.setup.task.train.epoch
    steps = 0

    def watching(*given, **more):
        nonlocal steps
        watched.on = True
        for batch in epoch(*given, **more):
            yield batch
            steps += 1
        watched.on = False

    monkeypatch.setattr(run.setup.task.train, "epoch", watching)
    with watched:
        benchmarking.walk(run)
    assert steps > 12
    assert watched.callers == {"bank.py", "dynamic.py", "augment.py"}
