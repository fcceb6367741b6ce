"""Steps that are replayed: on a pretended device, by a tape of operations in place of a CUDA graph."""

import gc
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import test_cuda
from alignprune_exp import graph, optim
from alignprune_exp.errors import Failed, UsageError
from alignprune_exp.graph import WARM_UP
from alignprune_exp.learners import Step
from alignprune_exp.run import Run
from harness import Stop, checkpoint_of, config_of, launch, metrics_of, missing, only_run, sentence_of, trained
from pretended import mapped, pretended, tensors

TINY = ("threads=1", "epochs=5", "score.window=3", "batch_size=16", "dataset.subset=90", "dataset.test_subset=20")
TINY += ("precision=fp32", "model.width=4", "reference.size=6", "pruner.delta=1.0", "keep_checkpoints=true")
LINES = {
    "ce": ("optimizer.cycle_momentum=true",),
    "lars": ("optimizer=lars",),
    "elr": ("learner=elr",),
    "sop": ("learner=sop",),
    "refurbish": ("learner=refurbish", "learner.history=2"),
    "posterior": ("learner=posterior",),
}


class Tape(TorchDispatchMode):
    """Records operations with the very numbers and memory that they have, and does them again, as a CUDA graph does.

    Attributes:
        replays: how often any tape has done so.
    """

    replays = 0

    def __init__(self):
        super().__init__()
        self.done, self.before, self.made = [], {}, set()

    beside = staticmethod(nullcontext)

    def record(self, work):
        with self:
            left = work()
        with torch.no_grad():  # a graph that is recorded has not been done
            for tensor, value in self.before.values():
                tensor.copy_(value)
            mapped(torch.Tensor.zero_, left)
        self.before.clear()
        return left

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors([args, *kwargs.values()])
        for x in given:
            if memory(x) not in self.made:
                self.before.setdefault(id(x), (x, x.clone()))
        result = func(*args, **kwargs)
        used = {memory(x) for x in given}
        self.done.append((func, args, kwargs, result, used))
        self.made |= {memory(x) for x in tensors([result])} - used
        return result

    @torch.no_grad()
    def replay(self):
        type(self).replays += 1
        for func, args, kwargs, result, used in self.done:
            for kept, new in zip(tensors([result]), tensors([func(*args, **kwargs)]), strict=True):
                if memory(kept) not in used:  # else it is what an argument has become, or a part of it
                    kept.copy_(new)


def memory(x):
    """What tells the memory of a tensor from that of others."""
    return getattr(x, "held", x).untyped_storage()._cdata


@pytest.fixture
def taped(monkeypatch):
    monkeypatch.setattr(graph, "Graph", Tape)
    monkeypatch.setattr(Tape, "replays", 0)


def walked(results, *line):
    with pretended() as device:
        device.watched = False
        return trained(Run(config_of(results, "device=cuda:0", *TINY, *line, base=())))


def bits_of(folder):
    """The weights, what the learner and the optimizer know, and every sample's trajectory."""
    state = checkpoint_of(folder)
    parts = state["model"], *state["optimizer"]["state"].values(), state["pruning"]["trajectories"]
    return tensors([value for part in parts for value in part.values()])


def equal(folder, other):
    return metrics_of(folder) == metrics_of(other) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(bits_of(folder), bits_of(other), strict=True)
    )


@pytest.mark.parametrize("name", LINES)
def test_replayed_steps_have_the_bits_of_those_that_are_not(tmp_path, taped, name):
    plain = walked(tmp_path / "plain", "graph=false", *LINES[name])
    assert Tape.replays == 0
    replayed = walked(tmp_path / "replayed", *LINES[name])
    kept = [round(row["kept_fraction"] * 84) for row in metrics_of(replayed)]
    whole = sum(n // 16 - (n % 16 == 1) for n in kept)  # a rest of one makes the batch before it larger
    assert Tape.replays == whole - WARM_UP > 5
    assert equal(plain, replayed)


def test_a_replayed_run_stopped_within_an_epoch_goes_on_exactly(tmp_path, taped):
    whole = walked(tmp_path / "whole")
    config = config_of(tmp_path / "stopped", "device=cuda:0", *TINY, base=())
    with pretended() as device:
        device.watched = False
        stop = Stop()
        assert stop.run(config, 5)
        assert stop.run(config, 8)
        assert not stop.run(config)
    assert equal(whole, only_run(tmp_path / "stopped"))


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_network_and_its_graph_are_given_up_with_the_run_not_when_garbage_is_collected(tmp_path, taped, device):
    with pretended() as watched:
        watched.watched = False
        for _ in range(2):  # what is imported by the first may hold it
            one = Run(config_of(tmp_path, f"device={device}", *TINY, base=()))
            network, replayed = weakref.ref(one.loop.network), one.loop.network.replayed
            assert (replayed is None) is (device == "cpu")
            left, replayed = replayed and weakref.ref(replayed), None
            gc.collect()
            gc.disable()
            try:
                del one
                gone = network() is None and (left is None or left() is None)
            finally:
                gc.enable()
        assert gone


def test_a_rate_that_were_a_number_would_be_found(tmp_path, taped, monkeypatch):
    monkeypatch.setattr(optim, "_rate", lambda value, device: value)
    assert not equal(walked(tmp_path / "plain", "graph=false"), walked(tmp_path / "replayed"))


def test_a_step_that_cannot_be_recorded_is_one_sentence(tmp_path, taped, monkeypatch):
    def refused(tape, work):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Tape, "record", refused)
    with pytest.raises(Exception, match=r"cannot be recorded as a CUDA graph \(operation not permitted .*graph=false"):
        walked(tmp_path)


class Broken:
    """Stands in for `torch.cuda.graph` where an operation that waits has broken it off: ending it raises once more."""

    def __init__(self, graph, stream, capture_error_mode="global"):
        self.mode = capture_error_mode

    def __enter__(self):
        assert self.mode == "thread_local"  # "global" is broken off by a loader's thread that pins memory, too

    def __exit__(self, kind, error, _):
        if kind is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_a_recording_that_is_broken_off_says_why_and_heeds_its_own_thread_alone(monkeypatch):
    def waits(step, weights):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    for name, stands_in in (("CUDAGraph", object), ("Stream", object), ("graph", Broken)):
        monkeypatch.setattr(torch.cuda, name, stands_in)
    index = torch.arange(2)
    step = Step(index, index, index, 0, 0, 1)
    replayed = graph.Replayed(2)
    replayed._warm = WARM_UP
    with pytest.raises(Failed, match=r"\(CUDA error: operation not permitted when stream is capturing\); set graph"):
        replayed(waits, step, index)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("device=cpu",), "device=cuda, and this run is on cpu"),
        (("learner=dividemix", "learner.warmup=2"), "learners whose steps are all alike, and dividemix's are not"),
        (("optimizer.name=torch.optim.SGD",), "optimizer=sgd and lars, and not for torch.optim.SGD"),
        (("compile=reduce-overhead",), "without graphs of its own"),
    ],
)
def test_graph_true_is_refused_where_it_cannot_be(tmp_path, taped, line, said):
    config = config_of(tmp_path, "device=cuda:0", *TINY, "graph=true", *line, base=())
    with pretended(), pytest.raises(UsageError) as refused:
        Run(config)
    assert missing(["graph=true is for", said, "set graph=auto"], sentence_of(str(refused.value))) == []


def test_on_the_cpu_graph_true_is_refused_and_auto_replays_nothing(tmp_path, capsys):
    assert launch(tmp_path, "device=cpu", "graph=true") == 2
    assert "graph=true is for device=cuda" in sentence_of(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
    one = Run(config_of(tmp_path, "device=cpu"))
    assert one.loop.network.replayed is None


def test_the_test_for_a_card_that_stops_a_run_is_walked_on_a_pretended_one(tmp_path, taped, monkeypatch):
    monkeypatch.setattr(test_cuda, "DRY", False)
    monkeypatch.setattr(test_cuda, "DEVICE", "cuda:0")
    monkeypatch.setattr(test_cuda, "Graph", Tape)
    with pretended() as device:
        device.watched = False
        test_cuda.be_strict(monkeypatch)
        test_cuda.test_a_run_repeats_and_resumes_to_the_bit_and_waits_within_no_step(
            tmp_path, None, "das, lars", "fp32"
        )


def test_the_tests_for_a_card_are_walked_on_the_cpu():
    """One of each kind but for whole runs, which others walk here."""
    tests, some = Path(__file__).with_name("test_cuda.py"), "scores or selections or fp32_is or channels_last or group"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "cuda", "-k", some, str(tests)],
        env={**os.environ, "CUDA_DRY": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
