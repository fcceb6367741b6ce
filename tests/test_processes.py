"""The plug-in in several processes: real ones, over gloo, forked from a server that has imported torch already."""

import io
import math
import os
import time

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from alignprune_exp.pruning import DisagreementError, DynamicPruning, LostProcessError, NonFiniteLossError
from alignprune_exp.pruning.processes import Exchange
from alignprune_exp.pruning.reference import shared_loss

EPOCHS, CLASSES = 8, 3


def data(n):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 5, generator=generator), torch.arange(n) % CLASSES)


def make(n, pruner="infobatch", score="das", **arguments):
    return DynamicPruning(data(n), EPOCHS, pruner, score, **{"window": 3, "seed": 1, **arguments})


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES))


def losses_of(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


class FirstOf:
    """What so many processes train on together, for one that does it alone."""

    def __init__(self, pruning, ranks):
        self.pruning, self.ranks = pruning, ranks

    def __len__(self):
        return len(self.pruning.sampler) // self.ranks * self.ranks

    def __iter__(self):
        return iter(self.pruning.order()[: len(self)].tolist())


def train(pruning, batch_size, accumulate=1, workers=0, until=EPOCHS, state=None, sampler=None, parallel=None):
    """Train as a user would; return the network and, of each epoch, the samples that this process trained on."""
    model = network()
    net = (parallel or DistributedDataParallel)(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    persistent = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    sampler = sampler or pruning.sampler
    loader = DataLoader(pruning, batch_size, sampler=sampler, num_workers=workers, **persistent)
    if state is not None:
        pruning.load_state_dict(state["pruning"])
        model.load_state_dict(state["model"])
    seen = []
    while pruning.epoch < until:
        seen.append([])
        assert len(loader) == math.ceil(len(sampler) / batch_size)
        for step, (index, (x, y)) in enumerate(loader, 1):
            pruning_loss = pruning.update(index, losses_of(net, x, y))
            (pruning_loss / accumulate).backward()
            if step % accumulate == 0 or step == len(loader):
                optimizer.step()
                optimizer.zero_grad()
            seen[-1] += index.tolist()
        with torch.no_grad():
            reference = losses_of(model, *data(12)[:]).mean()
        pruning.end_epoch(reference)
    return model, seen


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def loaded(state):
    return torch.load(io.BytesIO(state), weights_only=True)


def flat(state, prefix=""):
    """Every number of a state, by its path, and every word's bytes."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, str):
            found[prefix + key] = np.frombuffer(value.encode(), np.uint8)
        else:
            found[prefix + key] = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return found


def outcome(pruning, model, seen):
    state = flat({"pruning": pruning.state_dict(), "model": model.state_dict()})
    return state, seen


def assert_equal(state, other, **tolerance):
    assert state.keys() == other.keys()
    for key in state.keys() - ({"pruning/running/step"} if tolerance else set()):
        np.testing.assert_allclose(state[key], other[key], err_msg=key, **(tolerance or {"rtol": 0}))


def budgeted(n, pruner):
    return make(n, pruner, "settled", budget=0.6) if pruner == "infobatch" else make(n, pruner, "loss")


# ---- what several compute ----------------------------------------------------------------------------------


def trained(rank, n, pruner, batch_size, arguments):
    pruning = budgeted(n, pruner)
    return outcome(pruning, *train(pruning, batch_size, **arguments))


@pytest.mark.parametrize(
    ("ranks", "n", "pruner", "batch", "arguments"),
    [
        (2, 40, "full", 8, {}),
        (2, 40, "infobatch", 8, {}),
        (2, 40, "full", 4, {"accumulate": 2}),
        (3, 30, "full", 3, {}),  # one sample of each batch
        (2, 40, "random", 8, {"workers": 1}),
    ],
)
def test_several_processes_compute_what_one_computes(together, ranks, n, pruner, batch, arguments):
    found = together(ranks, trained, n, pruner, batch // ranks, arguments)
    for state, _ in found[1:]:
        assert_equal(state, found[0][0])
    alone = budgeted(n, pruner)
    model, seen = train(alone, batch, **arguments)
    shares = [seen for _, seen in found]
    for epoch, order in enumerate(seen):
        parts = [share[epoch] for share in shares]
        assert len({len(part) for part in parts}) == 1
        assert [sample for step in zip(*parts, strict=True) for sample in step] == order
    assert_equal(found[0][0], outcome(alone, model, seen)[0], rtol=1e-4, atol=1e-5)


def test_what_is_left_over_is_not_trained_on_and_not_counted_and_is_other_samples_every_epoch(together):
    found = together(3, trained, 32, "full", 4, {})
    (state, _), others = found[0], found[1:]
    for other, _ in others:
        assert_equal(state, other)
    left = []
    for epoch in range(EPOCHS):
        parts = [seen[epoch] for _, seen in found]
        assert [len(part) for part in parts] == [10] * 3
        left.append(tuple(sorted(set(range(32)) - {sample for part in parts for sample in part})))
        assert len(left[-1]) == 2
    assert len(set(left)) > EPOCHS // 2
    times = np.full(32, EPOCHS)
    np.subtract.at(times, np.concatenate(left), 1)
    assert state["pruning/times_selected"].tolist() == times.tolist()
    assert state["pruning/trajectories/count"].tolist() == times.tolist()
    alone = make(32, "full", "loss")
    assert_equal(state, outcome(alone, *train(alone, 12, sampler=FirstOf(alone, 3)))[0], rtol=1e-4, atol=1e-5)


def resumed(rank, n, state):
    pruning = make(n, "full", "loss")
    model, seen = train(pruning, 12 // dist.get_world_size(), state=loaded(state))
    return outcome(pruning, model, seen)


def half(rank, n):
    pruning = make(n, "full", "loss")
    model, _ = train(pruning, 12 // dist.get_world_size(), until=EPOCHS // 2)
    return saved({"pruning": pruning.state_dict(), "model": model.state_dict()})


def test_a_state_goes_on_in_another_number_of_processes(together):
    whole = trained(0, 48, "full", 12, {})[0]
    states = together(2, half, 48)
    assert_equal(*(flat(loaded(state)) for state in states))
    found = together(3, resumed, 48, states[0])
    for state, _ in found:
        assert_equal(state, found[0][0])
    assert_equal(found[0][0], whole, rtol=1e-4, atol=1e-5)


def within_an_epoch(rank):
    pruning = make(24, "full", "loss")
    index = torch.from_numpy(pruning.sampler.share()[:5])
    predicted = torch.full((24,), -1)
    predicted[index] = index
    pruning.update(index, index.float())
    with pytest.raises(RuntimeError, match=r"call exchange\(\) in all of them before state_dict\(\)"):
        pruning.state_dict()
    assert pruning.progress == pytest.approx(10 / 24 / EPOCHS)
    pruning.exchange(predicted)
    assert pruning.progress == pytest.approx(10 / 24 / EPOCHS)
    return flat(pruning.state_dict()), predicted.tolist(), pruning.unseen().tolist()


def test_an_exchange_within_an_epoch_makes_the_state_whole(together):
    (state, predicted, unseen), (other, *same) = together(2, within_an_epoch)
    assert_equal(state, other)
    done = make(24, "full", "loss").order()[:10].tolist()
    assert predicted == same[0] == [i if i in done else -1 for i in range(24)]
    assert np.flatnonzero(state["running/trained"]).tolist() == sorted(done)
    assert sorted(unseen + same[1]) == sorted(set(range(24)) - set(done))
    assert np.nan_to_num(state["trajectories/last"], nan=-1).tolist() == predicted


def sharded(model):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def in_tensors(model, first=None, last=None):
    plan = {"0": first or ColwiseParallel(), "2": last or RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def in_classes(model):
    """Divide the losses too, which are no plain tensors then."""
    classes = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return in_tensors(model, ColwiseParallel(output_layouts=Replicate()), classes)


def in_parts(rank, parallel, batch_size, arguments):
    """Train a network that is divided, without a break and with one."""
    whole, first, second = (make(40, "infobatch", "settled", budget=0.6, **arguments) for _ in range(3))
    with loss_parallel():
        model, seen = train(whole, batch_size, parallel=parallel)
        half, _ = train(first, batch_size, parallel=parallel, until=EPOCHS // 2)
        state = {"pruning": first.state_dict(), "model": half.state_dict()}
        train(second, batch_size, parallel=parallel, state=state)
    assert second.report().equals(whole.report())
    weights = {key: value.full_tensor() for key, value in model.state_dict().items()}
    return flat({"pruning": whole.state_dict(), "model": weights}), seen


ALONE = {"rank": 0, "world_size": 1}


@pytest.mark.parametrize(
    ("parallel", "different", "arguments"), [(sharded, 2, {}), (in_tensors, 1, ALONE), (in_classes, 1, ALONE)]
)
def test_a_network_in_parts_learns_what_one_in_one_piece_does(together, parallel, different, arguments):
    (state, seen), (other, others) = together(2, in_parts, parallel, 8 // different, arguments)
    assert_equal(state, other)
    alone = make(40, "infobatch", "settled", budget=0.6)
    model, order = train(alone, 8)
    for epoch, samples in enumerate(order):
        shares = [seen[epoch], others[epoch]][:different]
        assert [sample for step in zip(*shares, strict=True) for sample in step] == samples
        assert sorted(seen[epoch] + others[epoch]) == sorted(samples * (2 // different))
    assert_equal(state, outcome(alone, model, order)[0], rtol=1e-4, atol=1e-5)


def refreshed(rank):
    pruning = make(25, "random", "loss", unseen="refresh", ratio=0.5)
    for _ in range(2):
        index = torch.tensor(list(pruning.sampler))
        pruning.update(index, index.float())
        unseen = pruning.unseen()
        pruning.record(unseen, unseen.float())
        pruning.end_epoch()
    return pruning.report()


def test_what_is_refreshed_in_shares_is_known_to_all_and_not_counted_as_trained_on(together):
    one, two, three = together(3, refreshed)
    assert one.equals(two)
    assert one.equals(three)
    assert one["loss"].tolist() == list(range(25))
    assert one["times_selected"].sum() == 2 * 12


def own_way(rank):
    pruning = make(20, "full", "loss", rank=0, world_size=1)
    index = torch.from_numpy(pruning.order())
    pruning.update(index, index + float(rank))
    pruning.end_epoch()
    return pruning.report()["loss"].tolist()


def test_processes_may_train_each_for_itself(together):
    assert together(2, own_way) == [list(range(20)), list(range(1, 21))]


# ---- the reference loss ------------------------------------------------------------------------------------


def referred(rank, given):
    pruning = make(20)
    index = torch.tensor(list(pruning.sampler))
    pruning.update(index, index.float())
    pruning.end_epoch(given[rank])
    return pruning.trajectories.history().reference_W.tolist()


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ((0.5, 0.5, 0.5), 0.5),
        ((0.5, None, None), 0.5),
        (((3.0, 2), (1.0, 5), (0.0, 0)), 4 / 7),
        ((torch.tensor(0.5), 0.5, 0.5000001), 0.5),
    ],
)
def test_the_reference_loss_is_one_for_all(together, given, loss):
    assert together(3, referred, given) == [pytest.approx([loss], rel=1e-12)] * 3


def laid_out(rank):
    losses = distribute_tensor(torch.arange(6.0), init_device_mesh("cpu", (2,)), [Shard(0)])
    return [shared_loss(given, Exchange())[0] for given in (losses, losses.mean(), (losses.sum(), 6))]


def test_reference_losses_that_lie_in_several_processes_are_one_mean(together):
    assert together(2, laid_out) == [[2.5] * 3] * 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((0.5, 0.6), r"different reference losses, 0\.5 to 0\.6; pass the mean in rank 0 alone"),
        ((None, 0.6), "others were not; pass the mean in all of them, or in rank 0 alone"),
        (((1.0, 2), 0.6), "others were not"),
        (((0.0, 0), (0.0, 0)), "no sample"),
        ((None, None), "score='das' compares with the reference set: pass its mean loss"),
        ((0.5, math.nan), "the reference loss became NaN"),
    ],
)
def test_reference_losses_that_do_not_fit_are_one_sentence_in_all(together, given, words):
    one, two = together(2, referred, given)
    assert str(one) == str(two)
    with pytest.raises(ValueError, match=words):
        raise one


# ---- mistakes, and the death of a process ------------------------------------------------------------------


def diverged(rank):
    pruning = make(20, "full", "loss")
    for step, index in enumerate(torch.tensor(list(pruning.sampler)).split(3)):
        pruning.update(index, torch.full((len(index),), math.nan if (rank, step) == (1, 2) else 1.0))
    pruning.end_epoch()


def test_a_loss_that_is_not_finite_stops_all(together):
    found = together(2, diverged)
    assert [type(error) for error in found] == [NonFiniteLossError] * 2
    assert "in epoch 0, step 2;" in str(found[0]) == str(found[1])


def of_other_seeds(rank, pruner):
    pruning = make(40, pruner, "loss", seed=rank)
    train(pruning, 4)


@pytest.mark.parametrize("pruner", ["full", "random"])
def test_processes_that_select_differently_stop_before_they_train(together, pruner):
    found = together(2, of_other_seeds, pruner)
    assert [type(error) for error in found] == [DisagreementError] * 2
    assert "do not agree on the selection of epoch 0; start them with one seed" in str(found[0])


def foreign(rank, kind):
    pruning = make(40, "full", "loss")
    others = {"all": range(40), "distributed": DistributedSampler(pruning)}
    for index, (x, _) in DataLoader(pruning, 20, sampler=others[kind]):
        pruning.update(index, x.sum(1))


@pytest.mark.parametrize("kind", ["all", "distributed"])
def test_the_first_update_refuses_samples_of_another_process(together, kind):
    for rank, error in enumerate(together(2, foreign, kind)):
        with pytest.raises(ValueError, match=f"not in the share of process {rank} of 2 in epoch 0; draw batches with "):
            raise error
        assert str(error).endswith("sampler=pruning.sampler, without a DistributedSampler")


def undivided(rank, how):
    pruning = make(40, "full", "loss", divide=False)
    order = torch.from_numpy(pruning.order())
    index = order if how == "all" else order.tensor_split(2)[rank]
    pruning.update(index, index.float())
    pruning.end_epoch()
    return pruning.report()["loss"].tolist()


def test_a_loop_may_divide_the_order_itself_but_no_sample_twice(together):
    assert together(2, undivided, "parts") == [list(range(40))] * 2
    one, two = together(2, undivided, "all")
    assert str(one) == str(two)
    assert "sample 0 was observed in more than one of 2 processes in epoch 0, as 39 others were; draw" in str(one)


def too_many(rank):
    list(DynamicPruning(range(2), 4, "full", "loss").sampler)


def test_more_processes_than_samples_are_refused(together):
    for error in together(3, too_many):
        assert str(error) == "epoch 0 has 2 samples for 3 processes; train in 2 or fewer"


def dies(rank, when):
    pruning = make(40, "full", "loss")
    for epoch in range(3):
        if (rank, when, epoch) == (1, "before", 1):
            os._exit(1)
        index = torch.tensor(list(pruning.sampler))
        pruning.update(index, index.float())
        if (rank, when, epoch) == (1, "within", 1):
            os._exit(1)
        pruning.end_epoch()


@pytest.mark.parametrize("when", ["before", "within"])
def test_the_death_of_a_process_is_a_sentence_in_the_others(together, when):
    error, dead = together(2, dies, when)
    assert dead is None
    assert isinstance(error, LostProcessError)
    assert str(error).startswith("process 0 of 2 lost another one, which has ended or is silent; start all of them")


def falls_silent(rank):
    pruning = make(40, "full", "loss")
    index = torch.tensor(list(pruning.sampler))
    pruning.update(index, index.float())
    if rank == 1:
        time.sleep(4)
        return
    pruning.end_epoch()


def test_no_process_waits_longer_for_a_silent_one_than_the_group_allows(together):
    began = time.monotonic()
    error, _ = together(2, falls_silent, timeout=3)
    assert isinstance(error, LostProcessError)
    assert time.monotonic() - began < 20


def named(rank):
    pruning = DynamicPruning(range(40), 4, "full", "loss", rank=rank, world_size=3)
    pruning.update(torch.tensor(list(pruning.sampler)), torch.ones(13))


def test_processes_named_otherwise_than_they_are_do_not_exchange(together):
    for rank, error in enumerate(together(2, named)):
        assert f"rank={rank}, world_size=3 was given, and torch.distributed is rank {rank} of 2; call" in str(error)


def test_processes_named_without_torch_distributed_divide_and_cannot_exchange():
    shares = [
        DynamicPruning(range(11), 4, "full", "loss", rank=rank, world_size=3).sampler.share() for rank in range(3)
    ]
    assert [len(share) for share in shares] == [3] * 3
    assert len(np.unique(np.concatenate(shares))) == 9
    pruning = DynamicPruning(range(11), 4, "full", "loss", rank=0, world_size=3)
    with pytest.raises(
        ValueError, match=r"torch.distributed is not initialised.*; call .*init_process_group\(\) first"
    ):
        pruning.update(torch.tensor(list(pruning.sampler)), torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "pass world_size too"),
        ({"world_size": 2}, "pass rank too"),
        ({"rank": 2, "world_size": 2}, "rank=2 is none of world_size=2 processes"),
        ({"rank": 0, "world_size": 0}, "world_size=0 is out of range; use a whole number, 1 or more"),
        ({"rank": -1, "world_size": 2}, "rank=-1 is out of range; use a whole number, 0 or more"),
        ({"rank": "0", "world_size": "2"}, "rank='0' is out of range; use a whole number"),
        ({"rank": 0.5, "world_size": 2}, "rank=0.5 is out of range; use a whole number"),
    ],
)
def test_a_wrong_rank_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        make(10, **arguments)
