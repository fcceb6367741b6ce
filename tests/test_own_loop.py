"""What a training loop of one's own brings along: losses of pixels and tokens, schedules, scalers, accumulation."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from alignprune_exp.pruning import DynamicPruning, Fixed, Pruner, Selection

N, EPOCHS = 30, 8


def make(pruner="full", score="loss", epochs=EPOCHS, **arguments):
    labels = torch.arange(N) % 3
    inputs = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)) + labels[:, None]
    return DynamicPruning(TensorDataset(inputs, labels), epochs, pruner, score, **{"window": 3, **arguments})


# ---- more than one value a sample --------------------------------------------------------------------------

PIXELS = torch.from_numpy(np.random.default_rng(0).gamma(1.0, 1.0, (4, 3, 2)))
INDEX = torch.tensor([7, 3, 11, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("masked", [None, torch.bool, torch.int64, torch.float32])
def test_the_values_of_a_sample_become_one_loss(dtype, reduce, masked):
    values = PIXELS.to(dtype, copy=True).requires_grad_()
    counted = np.ones(PIXELS.shape, bool)
    counted[1, 0] = counted[2, :, 1] = counted[3, 1:] = masked is None
    mask = None if masked is None else torch.from_numpy(counted).to(masked)
    pruning = make()
    loss = pruning.update(INDEX, values, reduce=reduce, mask=mask)
    plain = values.detach().double().numpy()
    expected = [getattr(sample[there], reduce)() for sample, there in zip(plain, counted, strict=True)]
    assert pruning.trajectories.last_N[INDEX].tolist() == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-6)
    loss.backward()
    per = counted / (counted.sum((1, 2), keepdims=True) if reduce == "mean" else 1) / len(INDEX)
    np.testing.assert_allclose(values.grad.double().numpy(), per, rtol=1e-2 if dtype.itemsize == 2 else 1e-6)


def test_half_precision_sums_of_many_values_do_not_overflow():
    pruning = make()
    pruning.update(torch.tensor([5]), torch.full((1, 512, 512), 4.0, dtype=torch.float16), reduce="sum")
    assert pruning.trajectories.last_N[5].item() == 4 * 512**2


def test_values_that_do_not_count_may_be_anything_even_nan():
    values, mask = torch.ones(2, 3), torch.tensor([[1, 1, 0], [1, 0, 1]])
    values[mask == 0] = math.nan
    pruning = make()
    assert pruning.update(torch.tensor([1, 2]), values, reduce="mean", mask=mask).item() == 1
    pruning.check_finite()


@pytest.mark.parametrize("observed", [torch.full((4,), 9.0), torch.full((4, 3, 2), 9.0)])
def test_what_is_observed_is_reduced_like_the_loss_where_it_has_as_many_values(observed):
    pruning = make()
    loss = pruning.update(INDEX, PIXELS, observed, reduce="mean")
    assert loss.item() == pytest.approx(PIXELS.mean().item())
    assert pruning.trajectories.last_N[INDEX].tolist() == [9] * 4


@pytest.mark.parametrize(
    ("values", "arguments", "words"),
    [
        (PIXELS, {}, r"\(4, 3, 2\) for 4 samples.*reduction='none'.*\(4, …\), pass reduce='mean'"),
        (PIXELS.mean(), {"reduce": "mean"}, r"shape \(\) for 4 samples.*reduction='none'"),
        (PIXELS.flatten(), {"reduce": "mean"}, r"shape \(24,\) for 4 samples"),
        (PIXELS[:, :0], {"reduce": "mean"}, r"shape \(4, 0, 2\), no value of a sample to have a mean"),
        (PIXELS, {"reduce": "median"}, "'median' is unknown; use one of mean, sum"),
        (PIXELS, {"mask": PIXELS > 0}, "pass reduce='mean' or reduce='sum' with it"),
        (PIXELS, {"reduce": "sum", "mask": PIXELS[:, 0] > 0}, r"mask has shape \(4, 2\), the loss \(4, 3, 2\)"),
        (PIXELS, {"reduce": "sum", "mask": PIXELS}, "mask has values other than 0 and 1"),
        (PIXELS, {"reduce": "mean", "mask": (INDEX != 11)[:, None, None] & (PIXELS > 0)}, "no value of sample 11 cou"),
    ],
)
def test_values_that_cannot_be_reduced_are_refused_and_leave_no_trace(values, arguments, words):
    pruning = make()
    with pytest.raises(ValueError, match=words):
        pruning.update(INDEX, values, **arguments)
    assert len(pruning.unseen()) == N
    assert pruning.progress == 0


# ---- schedules ---------------------------------------------------------------------------------------------


def train(pruning, batch_size, accumulate=1, drop_last=False, factor=lambda progress: 1 - progress, scaler=None):
    """Train; return the rate and the progress before each optimizer step, and at the end, and the network."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, pruning.schedule(factor))
    loader = DataLoader(pruning, batch_size, sampler=pruning.sampler, drop_last=drop_last)
    rates, progress = [], []
    while pruning.epoch < pruning.epochs:
        before = pruning.progress
        for step, (index, (x, y)) in enumerate(loader, 1):
            loss = pruning.update(index, F.cross_entropy(model(x), y, reduction="none")) / accumulate
            (scaler.scale(loss) if scaler else loss).backward()
            if step % accumulate == 0 or step == len(loader):
                rates.append(optimizer.param_groups[0]["lr"])
                progress.append(before)
                scaler.step(optimizer) if scaler else optimizer.step()
                if scaler:
                    scaler.update()
                optimizer.zero_grad()
                before = pruning.progress
                scheduler.step()
        pruning.end_epoch()
    return np.array([*rates, optimizer.param_groups[0]["lr"]]), np.array([*progress, pruning.progress]), model


@pytest.mark.parametrize("batch", [4, 7, 30])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("pruner", ["full", "infobatch", "random"])
def test_a_schedule_ends_where_it_should_however_few_steps_pruned_epochs_have(pruner, accumulate, batch):
    pruning = make(pruner)
    rates, progress, _ = train(pruning, batch, accumulate)
    assert rates[0] == 0.1
    assert rates[-1] == 0
    assert progress[-1] == 1
    assert (np.diff(progress) > 0).all()
    np.testing.assert_allclose(rates, 0.1 * (1 - progress), atol=1e-12)
    starts = np.cumsum([0] + [math.ceil(size / (batch * accumulate)) for size in pruning.sizes])
    np.testing.assert_allclose(progress[starts], np.arange(EPOCHS + 1) / EPOCHS)
    if pruner == "infobatch":
        assert len(rates) - 1 < math.ceil(N / (batch * accumulate)) * EPOCHS or batch * accumulate >= N


def test_progress_goes_on_from_a_state_within_an_epoch_and_after_a_warm_up():
    warm = make(epochs=4)
    train(warm, 10)
    pruning = make("random", epochs=4, bank=warm.trajectories)
    assert (pruning.epoch, pruning.progress) == (4, 0)
    index = torch.from_numpy(pruning.order())
    pruning.update(index[:7], torch.ones(7))
    assert pruning.progress == pytest.approx(7 / 21 / 4)
    other = make("random", epochs=4)
    other.load_state_dict(pruning.state_dict())
    assert other.progress == pruning.progress


class Halves(Pruner):
    """The first half of the samples, of which it says nothing before."""

    def select(self, scores, epoch, epochs, rng):
        return Selection(np.arange(len(scores) // 2), np.ones(len(scores) // 2, np.float32))


EXACT = [
    ("full", {}),
    ("random", {"ratio": 0.4}),
    ("rs2", {"ratio": 0.6}),
    ("topk", {"warmup": 2, "delta": 0.7}),
    ("ucb", {}),
    ("epsilon_greedy", {"warmup": 3}),
    ("infobatch", {"budget": 0.6}),
    ("seta", {"budget": 0.5}),
    (Fixed(indices=np.arange(3, 14)), {}),
]


@pytest.mark.parametrize(("pruner", "settings"), [*EXACT, ("infobatch", {}), ("seta", {}), (Halves(), {})])
@pytest.mark.parametrize(("batch", "drop_last"), [(4, False), (4, True), (7, False)])
def test_the_steps_planned_are_those_taken_or_more_where_the_sizes_are_not_known_before(
    pruner, settings, batch, drop_last
):
    pruning = make(pruner, **settings)
    planned = pruning.planned_steps(batch, drop_last)
    taken = len(train(pruning, batch, drop_last=drop_last)[0]) - 1
    assert planned == taken if (pruner, settings) in EXACT else planned >= taken
    assert pruning.planned_steps(batch, drop_last) == taken


def test_planned_steps_count_finished_epochs_as_they_were_even_after_a_resumption():
    pruning = make("infobatch")
    for _ in range(4):
        index = torch.from_numpy(pruning.order())
        pruning.update(index, torch.rand(len(index), generator=torch.Generator().manual_seed(pruning.epoch)))
        pruning.end_epoch()
    resumed = make("infobatch")
    resumed.load_state_dict(pruning.state_dict())
    sizes = [*pruning.sizes, len(pruning.sampler), N, N, N]
    assert min(sizes) < N
    assert resumed.planned_steps(4) == pruning.planned_steps(4) == sum(math.ceil(size / 4) for size in sizes)
    accumulated = sum(math.ceil(math.ceil(size / 4) / 2) for size in sizes)
    assert pruning.planned_steps(4 * 2) == pruning.planned_steps(4, accumulate=2) == accumulated
    full = sum(math.ceil((size // 4) / 3) for size in sizes)
    assert pruning.planned_steps(4, drop_last=True, accumulate=3) == full


def test_planned_steps_are_those_of_one_process_of_several():
    pruning = make(rank=1, world_size=4)
    assert pruning.planned_steps(3) == EPOCHS * math.ceil((N // 4) / 3)
    assert make(rank=1, world_size=4, divide=False).planned_steps(3) == EPOCHS * N // 3


def test_a_batch_of_no_sample_is_refused():
    with pytest.raises(ValueError, match="batch_size=0 is out of range; use a whole number, 1 or more"):
        make().planned_steps(0)
    with pytest.raises(ValueError, match="accumulate=0 is out of range; use a whole number, 1 or more"):
        make().planned_steps(8, accumulate=0)


def test_what_is_left_of_a_resumed_epoch_can_be_drawn_alone_and_the_next_one_is_whole():
    pruning, resumed = make("random"), make("random")
    order = torch.from_numpy(pruning.order())
    pruning.update(order[:8], torch.ones(8))
    resumed.load_state_dict(pruning.state_dict())
    resumed.sampler.leave_out_trained()
    assert list(resumed.sampler) == list(resumed.sampler) == order[8:].tolist()
    assert len(resumed.sampler) == len(order)
    resumed.update(order[8:], torch.ones(len(order) - 8))
    resumed.end_epoch()
    assert list(resumed.sampler) == resumed.order().tolist()


def test_a_state_of_the_beginning_of_an_epoch_has_all_of_it_whatever_was_left_out_before():
    pruning = make()
    state = pruning.state_dict()
    pruning.update(torch.from_numpy(pruning.order()[:8]), torch.ones(8))
    pruning.sampler.leave_out_trained()
    pruning.load_state_dict(state)
    assert list(pruning.sampler) == pruning.order().tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 30])
def test_what_is_left_of_an_epoch_is_divided_evenly_over_however_many_go_on(ranks):
    pruning = make()
    order = torch.from_numpy(pruning.order())
    pruning.update(order[:10], torch.ones(10))
    shares = []
    for rank in range(ranks):
        resumed = make(rank=rank, world_size=ranks)
        resumed.load_state_dict(pruning.state_dict())
        resumed.sampler.leave_out_trained()
        index = torch.tensor(list(resumed.sampler), dtype=torch.int64)
        shares.append(index.tolist())
        assert resumed.weights(index).tolist() == [1] * len(index)
    assert {len(share) for share in shares} == {20 // ranks}
    together = [sample for step in zip(*shares, strict=True) for sample in step]
    assert together == order[10:][: 20 // ranks * ranks].tolist()


# ---- scalers, and data sets without items by index ---------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_gradient_scaler_changes_nothing_but_the_range(accumulate):
    plain, scaled = make("infobatch"), make("infobatch")
    _, _, expected = train(plain, 4, accumulate)
    _, _, model = train(scaled, 4, accumulate, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    torch.testing.assert_close(model.weight, expected.weight)
    assert scaled.report().equals(plain.report())


def test_accumulated_batches_make_the_step_of_one_large_batch():
    small, large = (make("infobatch", "random", budget=2 / 3) for _ in range(2))
    _, _, model = train(small, 2, 5)
    _, _, expected = train(large, 10)
    assert small.sizes == large.sizes == [20] * 7 + [30]
    torch.testing.assert_close(model.weight, expected.weight)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_a_stream_is_refused_with_what_gives_it_items_by_index():
    with pytest.raises(TypeError, match=r"^Stream is an IterableDataset.*list\(dataset\).*wids.ShardListDataset"):
        DynamicPruning(Stream(), 200)
    assert len(DynamicPruning(list(Stream()), 4, "full", "loss")) == 10


@pytest.mark.parametrize(
    "table", [pd.DataFrame({0: range(9), 1: range(9)}), pd.Series(range(9), index=range(8, -1, -1))]
)
def test_a_table_that_is_indexed_by_its_labels_is_refused(table):
    with pytest.raises(TypeError, match=r"finds items by their labels, .*: pass a list of them, such as frame\.to"):
        DynamicPruning(table, 200)


# ---- the example -------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parent.parent / "scripts" / "own_loop.py"


def assert_learned(said):
    accuracy, suspects = re.fullmatch(
        r"accuracy ([\d.]+)% with \d+% of the training saved\n(\d+) of the 200 most suspect labels .*\n", said
    ).groups()
    assert float(accuracy) > 90
    assert int(suspects) > 190


def test_the_example_trains_in_one_process(capsys):
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert_learned(capsys.readouterr().out)
    assert len(SCRIPT.read_text().splitlines()) <= 120


def test_the_example_trains_in_two_processes():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert_learned(done.stdout)


THREADS = """
from pathlib import Path
from torch import distributed as dist
from torch.nn import Linear
from torch.nn.parallel import DistributedDataParallel
from alignprune_exp.pruning import DynamicPruning

def threads():
    return [name for path in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := path.read_text())]

dist.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
DistributedDataParallel(Linear(2, 2))
assert threads()
dist.destroy_process_group()
print(len(threads()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads that Linux lists")
def test_no_thread_outlives_its_process_group(tmp_path):
    code = THREADS.format(store=tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "0\n"
