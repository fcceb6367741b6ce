"""The plug-in under Hugging Face's accelerate."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from alignprune_exp.pruning import DynamicPruning
from alignprune_exp.pruning.losses import whole

N, EPOCHS, BATCH = 46, 6, 8
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _an_accelerator_of_its_own():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def data(n, seed=0):
    labels = torch.arange(n) % 3
    inputs = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) + labels[:, None]
    return TensorDataset(inputs, labels)


def make(pruner="infobatch", score="das"):
    return DynamicPruning(data(N), EPOCHS, pruner, score, window=3, seed=1)


def accelerated(**settings):
    return Accelerator(cpu=True, **settings)


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def train(pruning, accelerator, batch=BATCH, folder=None, resume=None, stop=None, sharded=False):
    """Train as accelerate's documentation has it; return the network, and the rates and samples of every step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    if sharded:
        model = accelerator.prepare_model(fully_shard(model), evaluation_mode=True)  # without wrapping it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = LambdaLR(optimizer, pruning.schedule(lambda progress: 1 - progress))
    model = model if sharded else accelerator.prepare(model)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    loader = pruning.prepare(accelerator, batch_size=batch)
    accelerator.register_for_checkpointing(pruning)
    if resume:
        accelerator.load_state(resume)
        pruning.sampler.leave_out_trained()
    seen, rates, done = [], [], 0
    while pruning.epoch < EPOCHS:
        seen.append([])
        assert len(loader) == math.ceil(len(pruning.sampler) / batch)
        for index, (x, y) in loader:
            assert {index.device.type, x.device.type, y.device.type} == {accelerator.device.type}
            with accelerator.accumulate(model):
                accelerator.backward(pruning.update(index, losses_of(model, x, y)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                rates.append(scheduler.get_last_lr()[0])
            seen[-1] += index.tolist()
            done += 1
            if done == stop:
                pruning.exchange()
                accelerator.save_state(folder)
                return None
        with torch.no_grad():
            losses = losses_of(accelerator.unwrap_model(model), *data(12, 1)[:])
        pruning.end_epoch(losses.mean())
    return accelerator.unwrap_model(model), rates, seen


def by_hand(pruning, batch=BATCH, accumulate=1):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = LambdaLR(optimizer, pruning.schedule(lambda progress: 1 - progress))
    loader, seen = DataLoader(pruning, batch, sampler=pruning.sampler), []
    for _ in range(EPOCHS):
        seen.append([])
        for step, (index, (x, y)) in enumerate(loader, 1):
            (pruning.update(index, losses_of(model, x, y)) / accumulate).backward()
            seen[-1] += index.tolist()
            if step % accumulate == 0 or step == len(loader):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        with torch.no_grad():
            pruning.end_epoch(losses_of(model, *data(12, 1)[:]).mean())
    return model, seen


@pytest.mark.parametrize("accumulate", [1, 4])
def test_accelerate_trains_what_the_loop_of_ones_own_does(accumulate):
    pruning, own = make(), make()
    model, rates, seen = train(pruning, accelerated(gradient_accumulation_steps=accumulate))
    expected, order = by_hand(own, accumulate=accumulate)
    assert seen == order
    assert min(map(len, seen)) < N
    assert len(rates) == sum(math.ceil(math.ceil(len(part) / BATCH) / accumulate) for part in seen)
    assert rates[-1] == 0
    assert pruning.report().equals(own.report())
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("stop", [3, 6, 20])
def test_a_saved_state_goes_on_exactly(tmp_path, stop):
    whole = make()
    expected, *_ = train(whole, accelerated())
    train(make(), accelerated(), folder=tmp_path, stop=stop)
    resumed = make()
    model, *_ = train(resumed, accelerated(), resume=tmp_path)
    assert resumed.report().equals(whole.report())
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)


@pytest.mark.parametrize("batch", [5, 11])
def test_what_is_left_of_a_saved_epoch_is_all_trained_on_in_batches_of_another_size(tmp_path, batch):
    train(make("full"), accelerated(), folder=tmp_path, stop=2)
    resumed = make("full")
    _, _, seen = train(resumed, accelerated(), batch, resume=tmp_path)
    assert seen[0] == make("full").order()[2 * BATCH :].tolist()
    assert resumed.report()["times_selected"].tolist() == [EPOCHS] * N


def test_the_readme_runs(in_the_readme):
    given = {"Accelerator": Accelerator, "torch": torch, "F": F, "LambdaLR": LambdaLR, "DynamicPruning": DynamicPruning}
    given |= {"dataset": data(N), "trusted": data(12, 1), "net": torch.nn.Linear(5, 3)}
    assert in_the_readme("accelerate", given)["pruning"].epoch == 5


# ---- two processes -----------------------------------------------------------------------------------------


def in_two(rank, split, sharded=False):
    accelerator = accelerated(dataloader_config=DataLoaderConfiguration(split_batches=split))
    assert accelerator.num_processes == 2
    pruning = make("full", "loss")
    if split:
        assert pruning.prepare(accelerator, batch_size=BATCH).batch_sampler.batch_size == BATCH // 2
        with pytest.raises(ValueError, match="batch_size=7 cannot be split over 2 processes; use a multiple of 2"):
            pruning.prepare(accelerator, batch_size=7)
        return None
    model, _, seen = train(pruning, accelerator, BATCH // 2, sharded=sharded)
    return seen, pruning.report().to_numpy(), whole(model.weight).tolist()


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_train_as_one_does_with_no_sample_twice(together, sharded):
    one, two = together(2, in_two, False, sharded)
    own = make("full", "loss")
    model, order = by_hand(own)
    for epoch in range(EPOCHS):
        assert [sample for step in zip(one[0][epoch], two[0][epoch], strict=True) for sample in step] == order[epoch]
    np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_allclose(one[1], own.report(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[2], model.weight.detach(), rtol=1e-4, atol=1e-5)


def divided_twice(rank):
    accelerator, pruning = accelerated(), DynamicPruning(data(160), EPOCHS, "full", "loss")
    model = torch.nn.Linear(5, 3)
    loader = accelerator.prepare(DataLoader(pruning, 4, sampler=pruning.sampler))
    for index, (x, y) in loader:
        pruning.update(index, losses_of(model, x, y))
    with pytest.raises(ValueError, match=r"^80 of 160 samples of epoch 0 were trained on.*pruning.prepare\(accel"):
        pruning.end_epoch()


def test_a_loader_that_accelerate_divides_once_more_is_found_at_the_end_of_the_epoch(together):
    together(2, divided_twice)


def test_batches_may_be_those_of_all_processes_together(together):
    assert together(2, in_two, True) == [None, None]


def in_tensors(rank):
    """Prepare a loader where each process takes batches of its own, and where all take the same, or pairs of them."""
    accelerator = accelerated()
    alone = DynamicPruning(data(N), EPOCHS, "full", "loss", rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"take 2 different .*, and the pruning gives them 1; leave rank and world_s"):
        alone.prepare(accelerator, batch_size=8)
    accelerator.state.parallelism_config = ParallelismConfig(tp_size=2)  # which accelerate itself takes on cards alone
    with pytest.raises(ValueError, match=r"take 1 different .*, and the pruning gives them 2; pass rank=0, world_size"):
        make().prepare(accelerator, batch_size=8)
    batches = [index.tolist() for index, _ in alone.prepare(accelerator, batch_size=8)]
    accelerator.state.parallelism_config = ParallelismConfig(cp_size=2)
    with pytest.raises(ValueError, match=r"^cp_size and sp_size give each process a part of a sample, and its loss"):
        alone.prepare(accelerator, batch_size=8)
    return batches


def test_processes_that_divide_a_network_by_its_tensors_take_the_same_batches(together):
    one, two = together(2, in_tensors)
    assert one == two
    assert sorted(sample for batch in one for sample in batch) == list(range(N))


@pytest.mark.parametrize("option", ["shuffle", "sampler", "batch_sampler", "dataset"])
def test_options_that_choose_samples_are_refused(option):
    with pytest.raises(ValueError, match=f"^{option} is the pruning's own; leave it out of prepare\\(\\)$"):
        make().prepare(accelerated(), batch_size=8, **{option: True})
