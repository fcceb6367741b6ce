"""The plug-in as its user meets it: the loop, resuming, the report, and every mistake's sentence."""

import copy
import itertools
import math
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from alignprune_exp.pruning import (
    PRUNERS,
    SCORES,
    DynamicPruning,
    Fixed,
    NonFiniteLossError,
    Pruner,
    PruningWarning,
    Score,
    Selection,
    TrajectoryLog,
    WarmUpLog,
    within_class,
)
from alignprune_exp.pruning.scores import Readout
from harness import through_disk

N, T, WINDOW, BATCH = 30, 8, 3, 8  # samples, epochs, window, batch size
LOSSES = torch.from_numpy(np.random.default_rng(0).gamma(1.0, 1.0, (T, N)).astype(np.float32))
REFERENCE = [2.0, 1.5, 1.7, 1.2, 1.3, 0.9, 0.8, 0.85]
CLEAN = np.arange(N) % 3 > 0
LABELS = np.arange(N) % 2


def make(pruner="infobatch", score="das", *, epochs=T, window=WINDOW, **arguments):
    dataset = TensorDataset(torch.arange(100, 100 + N), torch.arange(N) % 4)
    return DynamicPruning(dataset, epochs, pruner, score, window=window, **arguments)


def epoch_of(pruning):
    """One whole epoch without a loader."""
    for index in torch.from_numpy(pruning.order()).split(BATCH):
        pruning.update(index, LOSSES[pruning.epoch][index])
    if pruning.trajectories.unseen == "refresh":
        index = pruning.unseen()
        pruning.record(index, LOSSES[pruning.epoch][index])
    pruning.end_epoch(REFERENCE[pruning.epoch])


def selections_of(pruning):
    selections = []
    while pruning.epoch < pruning.epochs:
        selections.append((pruning.order().tolist(), pruning.selection.weights.tolist(), pruning.ranked_by))
        epoch_of(pruning)
    return selections


# ---- the documented loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_documented_loop_trains_with_a_real_data_loader(workers):
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruning = make()
    loader = DataLoader(pruning, batch_size=BATCH, sampler=pruning.sampler, num_workers=workers)
    lengths, times = [], np.zeros(N, int)
    for epoch in range(T):
        assert pruning.epoch == epoch
        lengths.append(len(pruning.sampler))
        assert len(loader) == math.ceil(lengths[-1] / BATCH)
        selected, seen = pruning.selection.indices.tolist(), []
        for index, (x, y) in loader:
            assert x.tolist() == (index + 100).tolist()
            assert y.tolist() == (index % 4).tolist()
            logits = model(x[:, None] / 100)
            loss = pruning.update(index, torch.nn.functional.cross_entropy(logits, y, reduction="none"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += index.tolist()
        assert len(seen) == lengths[-1]
        assert sorted(seen) == selected
        times[seen] += 1
        pruning.end_epoch(REFERENCE[epoch])
    assert pruning.report()["times_selected"].tolist() == times.tolist()
    assert lengths[0] == lengths[7] == N  # equal scores; annealed
    assert min(lengths) < N


def test_the_loader_gives_the_samples_shuffled_anew_each_epoch():
    pruning = make("full")
    orders = [order for order, *_ in selections_of(pruning)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(N)]}) == T + 1


def test_items_come_with_their_index():
    pruning = make()
    assert len(pruning) == N
    assert pruning[7] == (7, (torch.tensor(107), torch.tensor(3)))


class Rows(TensorDataset):
    """Gives a batch's samples at once, as Hugging Face's data sets do."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.asked = []

    def __getitems__(self, indices):
        self.asked.append(indices)
        return [self[index] for index in indices]


def test_a_data_set_that_gives_several_samples_at_once_is_asked_for_a_batch_at_once():
    rows = Rows(torch.arange(100, 100 + N))
    pruning = DynamicPruning(rows, T, window=WINDOW)
    batches = [(index.tolist(), x.tolist()) for index, (x,) in DataLoader(pruning, BATCH, sampler=pruning.sampler)]
    assert rows.asked == [index for index, _ in batches]
    assert all(x == [100 + each for each in index] for index, x in batches)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (lambda x, y: {"x": x, "y": y}, "dict"),
        (lambda x, y: (x, y), "tuple"),
        (lambda x, y: x, "Tensor"),
        (lambda x, y: x.tolist()[1:], "a list of 1"),
        (lambda x, y: None, "NoneType"),
    ],
)
def test_a_data_set_that_gives_a_batch_in_place_of_its_samples_is_refused(given, what):
    class Batches(TensorDataset):
        def __getitems__(self, indices):
            return given(*(each[indices] for each in self.tensors))

    pruning = DynamicPruning(Batches(torch.arange(N), torch.arange(N)), T, window=WINDOW)
    with pytest.raises(TypeError, match=f"^Batches.__getitems__ returned {what} for 2 indices; return a list of as ma"):
        next(iter(DataLoader(pruning, 2, sampler=pruning.sampler)))


@pytest.mark.parametrize("index", [["a", "b"], ("a", "b"), {"id": 3}, None, np.array(["a", "b"])], ids=str)
def test_an_index_that_is_no_number_is_refused(index):
    pruning = make()
    for call in (pruning.update, pruning.record):
        with pytest.raises(ValueError, match=f"^index is {type(index).__name__}; pass the index that came with the"):
            call(index, torch.ones(2))


@pytest.mark.parametrize("observed", [[1.0, 2.0], np.ones(2)], ids=["list", "ndarray"])
def test_a_record_that_is_no_tensor_is_refused(observed):
    with pytest.raises(ValueError, match=f"^observed is of type {type(observed).__name__}; pass a tensor"):
        make().update(torch.arange(2), torch.ones(2), observed)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", ["das", "cleaning", "random"])
def test_torchs_default_type_and_device_change_nothing(default, score):
    labels = np.arange(N) % 4
    expected = make(score=score, labels=labels)
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            pruning = make(score=score, labels=labels)
        for _ in range(T - 1):
            epoch_of(pruning)
            saved = pruning.state_dict()
            pruning.load_state_dict(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(T - 1):
        epoch_of(expected)
    assert pruning.order().tolist() == expected.order().tolist()
    assert pruning.report().equals(expected.report())


@pytest.mark.parametrize("unseen", ["carry", "refresh"])
def test_an_epoch_may_end_in_inference_mode(unseen):
    expected, pruning = make(unseen=unseen), make(unseen=unseen)
    while expected.epoch < T:
        index = torch.from_numpy(pruning.order())
        pruning.update(index, LOSSES[pruning.epoch][index])
        with torch.inference_mode():
            if unseen == "refresh":
                index = pruning.unseen()
                pruning.record(index, LOSSES[pruning.epoch][index])
            pruning.end_epoch(REFERENCE[pruning.epoch])
        epoch_of(expected)
    assert pruning.report().equals(expected.report())


@pytest.mark.parametrize("score", ["loss", "das", "random"])
@pytest.mark.parametrize("pruner", ["random", "infobatch", "seta", "topk"])
def test_the_same_seed_selects_the_same_and_another_seed_another(pruner, score):
    settings = {"warmup": 1} if pruner == "topk" else {}
    one, again, other = (selections_of(make(pruner, score, seed=seed, **settings)) for seed in (5, 5, 6))
    assert one == again
    assert all(x[0] != y[0] for x, y in zip(one, other, strict=True))
    sets = [[sorted(order) for order, *_ in selections] for selections in (one, other)]
    assert sets[0] != sets[1] or (pruner, score) == ("topk", "loss")  # which draws nothing but an order


def test_the_seed_alone_makes_the_randomness_not_torchs_or_numpys():
    torch.manual_seed(1)
    one = selections_of(make(score="random"))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert selections_of(make(score="random")) == one


@pytest.mark.parametrize("score", ["loss", "das", "random"])
@pytest.mark.parametrize("pruner", ["random", "infobatch", "seta"])
def test_a_selection_does_not_depend_on_who_asked_for_it_how_often(pruner, score):
    quiet = selections_of(make(pruner, score))
    asked = make(pruner, score)
    for order, weights, ranked_by in quiet:
        for _ in range(3):
            assert list(asked.sampler) == order
            assert len(asked.sampler) == len(order)
            assert asked.order().tolist() == order
            assert asked.selection.weights.tolist() == weights
            assert asked.ranked_by == ranked_by
            asked.scores("das")
            asked.scores("random")
            asked.report()
        epoch_of(asked)


def test_ranked_by_names_the_fallback_then_the_score_then_nothing():
    assert [ranked for *_, ranked in selections_of(make())] == ["loss"] * 3 + ["das"] * 4 + [None]
    assert [ranked for *_, ranked in selections_of(make(score="small_loss"))] == ["small_loss"] * 7 + [None]
    assert [ranked for *_, ranked in selections_of(make("full"))] == [None] * T


def test_a_score_of_ones_own_choice_can_be_had_between_epochs():
    pruning = make("full", "loss", clean=CLEAN)
    for _ in range(4):
        epoch_of(pruning)
    expected = [np.corrcoef(LOSSES[1:4, i], REFERENCE[1:4])[0, 1] for i in range(N)]
    np.testing.assert_allclose(pruning.scores("das"), expected, atol=1e-5)
    assert pruning.scores("loss").tolist() == LOSSES[3].tolist()
    assert pruning.scores("oracle").tolist() == CLEAN.tolist()


@pytest.mark.parametrize("clean", [CLEAN, CLEAN.tolist(), torch.from_numpy(CLEAN)], ids=["numpy", "list", "torch"])
def test_oracle_ranks_by_the_clean_mask(clean):
    pruning = make("topk", "oracle", warmup=0, ratio=1 / 3, clean=clean)
    for order, _, ranked_by in selections_of(pruning):
        assert sorted(order) == np.flatnonzero(CLEAN).tolist()
        assert ranked_by == "oracle"


@pytest.mark.parametrize("name", ["das", "spearman", "cosine", "loss", "random", "small_loss", "settled", "oracle"])
@pytest.mark.parametrize("unseen", ["carry", "mask", "refresh"])
def test_every_score_runs_with_every_rule_for_unseen_samples(name, unseen):
    pruning = make("random", name, clean=CLEAN, unseen=unseen)
    selections_of(pruning)
    assert np.isfinite(pruning.scores(name)).all()


# ---- update ------------------------------------------------------------------------------------------------


def weighted_pruning():
    """A run in the middle, where some samples weigh 2."""
    pruning = make(score="loss")
    epoch_of(pruning)
    assert set(pruning.selection.weights.tolist()) == {1.0, 2.0}
    return pruning


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_update_is_the_weighted_sum_over_the_batch_size_and_so_is_its_gradient(dtype):
    pruning = weighted_pruning()
    weights = dict(zip(pruning.selection.indices.tolist(), pruning.selection.weights.tolist(), strict=True))
    for index in torch.from_numpy(pruning.order()).split(BATCH):
        loss = LOSSES[1][index].to(dtype).requires_grad_()
        value = pruning.update(index, loss)
        expected = sum(weights[i] * x for i, x in zip(index.tolist(), loss.tolist(), strict=True)) / len(index)
        assert value.dim() == 0
        assert value.item() == pytest.approx(expected, rel=1e-6)
        value.backward()
        assert loss.grad.tolist() == pytest.approx([weights[i] / len(index) for i in index.tolist()], rel=4e-3)


def test_a_batch_without_samples_weighs_nothing_and_moves_nothing():
    weight, pruning = torch.ones(3, requires_grad=True), make()
    loss = pruning.update(torch.arange(0), torch.ones(0, 3) @ weight)
    loss.backward()
    assert loss.item() == 0
    assert weight.grad.tolist() == [0, 0, 0]
    epoch_of(pruning)


def test_observed_is_recorded_in_place_of_the_loss_that_is_trained_on():
    pruning = weighted_pruning()
    index = torch.from_numpy(pruning.order())
    loss, observed = torch.full((len(index),), 7.0, requires_grad=True), LOSSES[1][index].requires_grad_()
    value = pruning.update(index, loss, observed=observed)
    assert value.item() == pytest.approx(7 * float(pruning.selection.weights.sum()) / len(index))
    value.backward()
    assert observed.grad is None
    pruning.end_epoch(1.0)
    recorded = pruning.report()["loss"].to_numpy()[index]
    assert recorded.tolist() == observed.tolist()
    assert not torch.from_numpy(pruning.scores("loss")).requires_grad


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_of_either_width_are_taken(dtype):
    pruning = make()
    pruning.update(torch.arange(5, dtype=dtype), torch.ones(5))
    assert pruning.unseen().tolist() == list(range(5, N))


def test_half_precision_losses_of_a_large_batch_are_no_overflow():
    pruning = DynamicPruning(range(40_000), 20, score="loss")
    pruning.update(torch.arange(40_000), torch.full((40_000,), 4.0, dtype=torch.float16))
    pruning.end_epoch()


def test_refresh_takes_the_losses_of_unseen_samples_even_of_none():
    pruning = make(score="loss", unseen="refresh")
    while pruning.epoch < T:
        index = torch.from_numpy(pruning.order())
        pruning.update(index, LOSSES[pruning.epoch][index])
        missing = sorted(set(range(N)) - set(index.tolist()))
        assert pruning.unseen().tolist() == missing
        for part in pruning.unseen().split(BATCH):  # of an empty tensor: one empty part
            pruning.record(part, LOSSES[pruning.epoch][part])
        pruning.end_epoch()
        assert pruning.report()["loss"].tolist() == LOSSES[pruning.epoch - 1].tolist()
    assert pruning.report()["times_selected"].sum() < T * N  # refreshed is not selected


# ---- resuming ----------------------------------------------------------------------------------------------


def walk(pruning, skip=0):
    """Train to the end; after each call yield the batches done and what there is to see."""
    while pruning.epoch < pruning.epochs:
        order = torch.from_numpy(pruning.order())
        for step, index in list(enumerate(order.split(BATCH)))[skip:]:
            value = pruning.update(index, LOSSES[pruning.epoch][index]).item()
            seen = (pruning.unseen().tolist(), pruning.report().fillna(-1.0).to_numpy().tolist())
            yield step + 1, (pruning.epoch, order.tolist(), pruning.ranked_by, value, seen)
        skip = 0
        missing = pruning.unseen()
        if pruning.trajectories.unseen == "refresh" and len(missing):
            pruning.record(missing, LOSSES[pruning.epoch][missing])
        pruning.end_epoch(REFERENCE[pruning.epoch])
        yield 0, (pruning.epoch, pruning.report().fillna(-1.0).to_numpy().tolist())


class LastLoss(Score):
    """What a user would write: it hands back what it was shown."""

    name = "last_loss"

    def __call__(self, history):
        return history.last_N


@pytest.mark.parametrize(
    ("pruner", "score", "arguments"),
    [
        ("infobatch", "das", {}),
        ("infobatch", "das", {"unseen": "refresh", "ratio": 0.8}),
        ("infobatch", "spearman", {"budget": 0.6, "unseen": "mask"}),
        ("infobatch", "random", {}),
        ("infobatch", LastLoss(), {}),
        ("seta", "cosine", {"bank_dtype": torch.float16}),
        ("seta", "loss", {"budget": 0.5}),
        ("topk", "small_loss", {"warmup": 2}),
        ("topk", "settled", {"warmup": 2}),
        ("random", "das", {"ratio": 0.5}),
        ("full", "loss", {}),
        ("rs2", "loss", {"ratio": 0.6}),
        ("sieve", "settled", {"ratio": 0.6, "warmup": 2}),
        ("sieve", "loss", {"exclude": 0.4, "warmup": 1}),
        ("ucb", "loss", {}),
        ("epsilon_greedy", "das", {"ratio": 0.5}),
    ],
)
def test_a_run_resumed_at_any_moment_continues_bit_identically(pruner, score, arguments):
    whole = [seen for _, seen in walk(make(pruner, score, **arguments))]
    moments = list(range(0, len(whole) - 1, 2))
    states = []
    running = make(pruner, score, **arguments)
    states.append((0, 0, through_disk(running.state_dict())))
    for done, (step, _) in enumerate(walk(running), 1):
        if done in moments:
            states.append((done, step, through_disk(running.state_dict())))
    for done, step, state in states:
        resumed = make(pruner, score, **arguments)
        resumed.load_state_dict(state)
        assert [seen for _, seen in walk(resumed, skip=step)] == whole[done:], f"resumed after {done} calls"


def test_a_state_goes_back_in_time_within_one_object():
    pruning = make()
    epoch_of(pruning)
    state = through_disk(pruning.state_dict())
    first = selections_of(pruning)
    pruning.load_state_dict(state)
    assert pruning.epoch == 1
    assert selections_of(pruning) == first


def batch_of_a_log(log):
    log.update(torch.arange(N), LOSSES[:2].T, torch.arange(N) % 2)


def epoch_of_a_warm_up(log):
    log.observe(LOSSES[log.epochs], LOSSES[log.epochs] < 1)


@pytest.mark.parametrize(
    ("make_one", "goes_on"),
    [(make, epoch_of), (lambda: TrajectoryLog(N), batch_of_a_log), (lambda: WarmUpLog(N), epoch_of_a_warm_up)],
    ids=["pruning", "log", "warm-up"],
)
def test_a_state_that_is_kept_in_memory_stays_what_it_was(make_one, goes_on):
    kept = make_one()
    goes_on(kept)
    state, before = kept.state_dict(), through_disk(kept.state_dict())
    for _ in range(2):
        goes_on(kept)
    assert_same(state, before)
    kept.load_state_dict(state)
    assert_same(kept.state_dict(), before)
    goes_on(kept)
    assert_same(state, before)


def assert_same(state, other):
    assert state.get("arguments") == other.get("arguments")
    numbers, others = ({key: each for key, each in of.items() if key != "arguments"} for of in (state, other))
    torch.testing.assert_close(numbers, others, rtol=0, atol=0, equal_nan=True)


def test_losses_beyond_half_precision_stay_finite_in_a_bank_of_another_type():
    wide, narrow = make(), make(bank_dtype=torch.float16)
    wide.update(torch.arange(N), LOSSES[0] * 1e6)
    wide.end_epoch(1.0)
    narrow.load_state_dict(wide.state_dict())
    assert narrow.trajectories.losses_WN[0].isfinite().all()
    wide.load_state_dict(narrow.state_dict())
    assert wide.trajectories.losses_WN[0].max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("other", [{"window": 4}, {"dataset": range(N + 1)}])
def test_a_state_of_another_size_is_refused_and_changes_nothing(other):
    donor = DynamicPruning(other.get("dataset", range(N)), T, window=other.get("window", WINDOW))
    pruning = make()
    epoch_of(pruning)
    before = pruning.report()
    with pytest.raises(ValueError, match=r"samples over a window of .*; go on with the data set and the window"):
        pruning.load_state_dict(donor.state_dict())
    assert pruning.report().equals(before)
    assert pruning.epoch == 1


def test_a_state_of_an_older_version_is_refused_in_a_sentence_and_changes_nothing():
    pruning, older = make(), make().state_dict()
    del older["trajectories"]["sum"], older["trajectories"]["count"]
    epoch_of(pruning)
    before = pruning.report()
    with pytest.raises(ValueError, match="older version of this package and lacks count, sum"):
        pruning.load_state_dict(older)
    assert pruning.report().equals(before)


@pytest.mark.parametrize("state", [None, [], 7, {}, {"epoch": 1}], ids=repr)
@pytest.mark.parametrize("make_one", [lambda: make(), lambda: TrajectoryLog(N), lambda: WarmUpLog(N)])
def test_what_is_no_state_is_refused_in_a_sentence(make_one, state):
    with pytest.raises(ValueError, match=r"pass what state_dict\(\) returned"):
        make_one().load_state_dict(state)


@pytest.mark.parametrize("part", ["arguments", "trajectories", "running", "noise"])
def test_a_state_without_one_of_its_parts_parts_is_refused_and_changes_nothing(part):
    pruning = make()
    state = make().state_dict()
    epoch_of(pruning)
    before = pruning.report()
    for damaged in (None, dict(list(state[part].items())[1:])):
        with pytest.raises(ValueError, match=r"the state (was saved by an older|is no saved one but)"):
            pruning.load_state_dict(state | {part: damaged})
        assert pruning.report().equals(before)


def test_the_memory_of_a_bad_step_survives_a_checkpoint():
    pruning = make()
    pruning.update(torch.arange(3), torch.tensor([1.0, math.nan, 1.0]))
    resumed = make()
    resumed.load_state_dict(through_disk(pruning.state_dict()))
    resumed.update(torch.arange(3, 6), torch.ones(3))
    with pytest.raises(NonFiniteLossError, match="epoch 0, step 0"):
        resumed.end_epoch(1.0)


def test_pickling_gives_the_indexed_data_set_and_nothing_else():
    small, large = make(), make(window=6)
    epoch_of(small)
    twin = pickle.loads(pickle.dumps(small))
    assert len(twin) == N
    assert twin[7] == (7, (torch.tensor(107), torch.tensor(3)))
    assert not isinstance(twin, DynamicPruning)
    assert set(vars(twin)) == {"dataset"}
    assert len(pickle.dumps(small)) == len(pickle.dumps(large))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_says_what_it_is_where_it_is_taken_for_the_pruning(copied):
    twin = copied(copied(make()))
    for call in (
        lambda: twin.update(torch.arange(3), torch.ones(3)),
        lambda: twin.load_state_dict({}),
        lambda: list(copy.deepcopy(make().sampler)),
    ):
        with pytest.raises(AttributeError, match=r"copy.*data set alone.*state_dict\(\)"):
            call()
    assert not hasattr(twin, "anything")


# ---- the report --------------------------------------------------------------------------------------------


def test_the_report_is_a_frame_with_one_row_a_sample_in_data_set_order():
    pruning = make("random", "loss", ratio=0.5)
    seen = np.zeros(N, int)
    last, sums = np.full(N, np.nan, np.float32), np.zeros(N)
    for t in range(3):
        frame = pruning.report()
        assert list(frame.columns) == ["score", "loss", "ranking", "times_selected"]
        assert frame.index.tolist() == list(range(N))
        assert [kind.kind for kind in frame.dtypes] == ["f", "f", "f", "i"]
        np.testing.assert_array_equal(frame["loss"], last)
        np.testing.assert_array_equal(frame["ranking"], last)
        np.testing.assert_allclose(frame["score"], -sums / np.where(seen, seen, np.nan), rtol=1e-6)
        assert frame["times_selected"].tolist() == seen.tolist()
        index = pruning.selection.indices
        seen[index] += 1
        last[index] = LOSSES[t][index]
        sums[index] += LOSSES[t].numpy()[index]
        epoch_of(pruning)
    assert np.isnan(last).any()


@pytest.mark.parametrize("score", ["das", "spearman", "cosine", "loss", "random", "small_loss", "settled", "oracle"])
def test_a_sample_never_seen_is_nan_in_the_report(score):
    pruning = make("infobatch", score, clean=CLEAN)
    assert pruning.report(CLEAN)[["loss", "score", "ranking"]].isna().all(axis=None)
    never = pruning.selection.indices[-1]
    while pruning.epoch < 5:
        index = torch.from_numpy(pruning.order())
        index = index[index != never]
        pruning.update(index, LOSSES[pruning.epoch][index])
        pruning.end_epoch(REFERENCE[pruning.epoch])
        for frame in (pruning.report(), pruning.report(CLEAN)):
            assert frame.loc[never, ["loss", "score", "ranking"]].isna().all()
            assert frame["score"].isna().tolist() == frame["loss"].isna().tolist()
            assert frame["ranking"].isna().tolist() == frame["loss"].isna().tolist()


@pytest.mark.parametrize("pruner", ["infobatch", "seta", "topk", "random", "full"])
@pytest.mark.parametrize("score", ["das", "loss"])
def test_the_reported_scores_are_those_of_the_latest_end_epoch_until_the_next(pruner, score):
    pruning = make(pruner, score)
    for _ in range(4):
        epoch_of(pruning)
    before = pruning.report()
    index = torch.from_numpy(pruning.order())
    pruning.update(index, LOSSES[4][index])
    frame = pruning.report()
    assert frame[["score", "ranking"]].equals(before[["score", "ranking"]])
    assert frame["times_selected"].equals(before["times_selected"])  # of finished epochs
    assert frame["loss"].to_numpy()[index].tolist() == LOSSES[4][index].tolist()


@pytest.fixture(scope="module")
def noisy_digits():
    """scikit-learn's digits, the given labels, half of them wrong, and which ones are."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    wrong = rng.permutation(len(labels)) < len(labels) // 2
    given = np.where(wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
    return TensorDataset(torch.from_numpy(images / 16).float(), torch.from_numpy(given)), given, wrong


@pytest.mark.parametrize("score", ["das", "loss", "small_loss"])
def test_what_the_report_puts_first_is_mostly_mislabelled_whatever_ranks(score, noisy_digits):
    dataset, given, wrong = noisy_digits
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruning = DynamicPruning(dataset, 16, "infobatch", score, window=5)
    for _ in range(16):
        for index in torch.from_numpy(pruning.order()).split(64):
            x, y = dataset[index]
            loss = pruning.update(index, torch.nn.functional.cross_entropy(model(x), y, reduction="none"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pruning.end_epoch(pruning.trajectories.population_mean())
    for labels in (None, given, torch.from_numpy(given), given.tolist()):
        first = pruning.report(labels).sort_values("score").index[:200]
        assert wrong[first].mean() > 0.9  # half of all are
    cleanest = pruning.report().sort_values("loss").index[:200]
    assert wrong[cleanest].mean() < 0.3  # what the loss would put first


def test_the_cleaning_score_is_standardised_within_the_classes_given():
    pruning = make("full", "loss")
    epoch_of(pruning)
    labels = np.arange(N) % 4
    np.testing.assert_array_equal(pruning.report(labels)["score"], within_class(pruning.scores("settled"), labels))
    with pytest.raises(ValueError, match=rf"labels has shape \(3,\); it must be \({N},\)"):
        pruning.report([0, 1, 2])


def test_a_frame_once_given_does_not_change():
    pruning = make()
    epoch_of(pruning)
    frame = pruning.report()
    copy = frame.copy()
    epoch_of(pruning)
    assert frame.equals(copy)


def test_importing_and_using_the_package_needs_torch_and_numpy_only():
    program = """
import sys, torch
from alignprune_exp.pruning import DynamicPruning
pruning = DynamicPruning(range(9), 8, score="das", window=3)
for _ in range(8):
    index = torch.from_numpy(pruning.order())
    pruning.update(index, index.float())
    pruning.end_epoch(1.0)
strangers = {"pandas", "torchvision", "hydra", "omegaconf", "scipy", "sklearn", "timm", "wandb", "PIL"}
strangers |= {"lightning", "accelerate", "transformers"}
print(sorted(strangers & sys.modules.keys()))
pruning.report()
print("pandas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]


# ---- every mistake has its sentence ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [torch.tensor(1.0), torch.ones(1), torch.ones(4, 1)], ids=["0-d", "1", "4x1"])
def test_a_reduced_loss_is_refused(loss):
    with pytest.raises(ValueError, match="reduction='none'"):
        make().update(torch.arange(4), loss)


@pytest.mark.parametrize("loss", [1.0, [1.0] * 4, np.ones(4), None], ids=lambda loss: type(loss).__name__)
def test_a_loss_that_is_no_tensor_is_refused(loss):
    pruning = make()
    for record in (pruning.update, pruning.record):
        with pytest.raises(ValueError, match=f"^the loss is of type {type(loss).__name__}; pass a tensor, as reductio"):
            record(torch.arange(4), loss)


@pytest.mark.parametrize("losses", [torch.ones(()), torch.ones(2), torch.ones(3, 1)], ids=str)
def test_a_record_of_another_shape_is_refused_and_leaves_no_trace(losses):
    pruning = make("full", "loss")
    with pytest.raises(ValueError, match=r"the loss has shape .* for 3 samples: pruning needs one value a sample"):
        pruning.record(torch.arange(3), losses)
    pruning.update(torch.arange(N), LOSSES[0])
    pruning.end_epoch()


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_bank_of_another_type_is_refused(dtype):
    with pytest.raises(ValueError, match=f"a bank of {dtype} cannot be kept; use one of torch.float32, torch.float16"):
        make(bank_dtype=dtype)


def test_observed_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="observed"):
        make().update(torch.arange(4), torch.ones(4), observed=torch.tensor(1.0))


@pytest.mark.parametrize("bad", [N, N + 1000, -1, -N, -N - 1])
def test_an_index_out_of_range_is_refused_in_any_epoch(bad):
    pruning = make("topk", "loss", ratio=0.9, warmup=1)
    for _ in range(3):
        with pytest.raises(IndexError, match=rf"{bad}\b.* out of range.*{N} samples"):
            pruning.update(torch.tensor([int(pruning.order()[0]), bad]), torch.ones(2))
        epoch_of(pruning)  # and nothing of the refused batch was recorded


def test_a_sample_outside_the_selection_is_refused():
    pruning = make("random", "loss", ratio=0.5)
    stray = min(set(range(N)) - set(pruning.selection.indices.tolist()))
    with pytest.raises(ValueError, match=rf"sample {stray} .*epoch 0.*sampler=pruning\.sampler"):
        pruning.update(torch.tensor([stray]), torch.ones(1))


def test_a_missing_reference_loss_is_refused_where_the_score_compares_with_it():
    for score in ("das", "spearman", "cosine"):
        pruning = make(score=score)
        pruning.update(torch.arange(N), LOSSES[0])
        with pytest.raises(ValueError, match=f"{score}.*reference"):
            pruning.end_epoch()
        pruning.end_epoch(1.0)  # mended
    for score in ("loss", "random", "small_loss", "settled"):
        pruning = make(score=score)
        pruning.update(torch.from_numpy(pruning.order()), torch.ones(len(pruning.sampler)))
        pruning.end_epoch()
        assert pruning.epoch == 1


@pytest.mark.parametrize(
    ("score", "reference", "tied"),
    [
        ("das", 0.7, True),
        ("spearman", 0.7, True),
        ("cosine", 0.7, False),
        ("cosine", 0.0, True),
        ("loss", 0.7, False),
    ],
)
def test_a_reference_that_tells_no_sample_from_another_is_said_once(score, reference, tied):
    pruning = make("infobatch", score, delta=1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for epoch in range(T):
            index = torch.from_numpy(pruning.order())
            pruning.update(index, LOSSES[epoch][index])
            pruning.end_epoch(reference)
            assert len(said) == (tied and epoch + 1 >= WINDOW)
    for warning in said:
        assert warning.category is PruningWarning
        assert warning.filename == __file__
        assert str(warning.message).startswith(
            f"score={score!r} is 0 for every sample after epoch {WINDOW - 1}, since the reference loss has been "
            f"{reference:g} in each of the last {WINDOW} epochs, and so tells the pruner nothing; evaluate the"
        )


def test_a_pruning_without_use_for_scores_says_nothing_of_a_reference_that_never_moves(recwarn):
    for pruning in (make("full"), make("random")):
        for epoch in range(T):
            index = torch.from_numpy(pruning.order())
            pruning.update(index, LOSSES[epoch][index])
            pruning.end_epoch(0.7)
    assert not recwarn.list


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(math.nan)], ids=str)
def test_a_reference_loss_that_is_not_finite_is_refused(bad):
    pruning = make()
    pruning.update(torch.arange(N), LOSSES[0])
    with pytest.raises(ValueError, match=r"reference loss .* end of epoch 0"):
        pruning.end_epoch(bad)


def test_a_reference_loss_may_be_a_tensor_that_requires_grad():
    pruning = make()
    pruning.update(torch.arange(N), LOSSES[0])
    pruning.end_epoch(torch.tensor(1.5))
    assert pruning.trajectories.history().reference_W.tolist() == [1.5]


@pytest.mark.parametrize("second", [0.91, torch.tensor(91.37), math.nan], ids=str)
def test_a_loss_and_an_accuracy_are_not_taken_for_a_sum_and_a_count(second):
    pruning = make()
    pruning.update(torch.arange(N), LOSSES[0])
    with pytest.raises(ValueError, match=r"whose second is (0\.91|91\.37|nan), and a pair is read as \(sum, count\)"):
        pruning.end_epoch((0.53, second))
    pruning.end_epoch((1.06, 2))
    assert pruning.trajectories.reference_W[0] == pytest.approx(0.53)


@pytest.mark.parametrize("finished", [0, 2])
def test_an_epoch_skipped_is_an_error(finished):
    pruning = make()
    for _ in range(finished):
        epoch_of(pruning)
    with pytest.raises(ValueError, match=f"epoch {finished}.*skipped"):
        pruning.end_epoch(1.0)
    assert pruning.epoch == finished


def test_a_sample_observed_twice_is_an_error_across_batches():
    pruning = make()
    pruning.update(torch.arange(8), torch.ones(8))
    with pytest.raises(ValueError, match=r"sample 7 .*twice in epoch 0"):
        pruning.update(torch.tensor([9, 7]), torch.ones(2))


def test_a_sample_observed_twice_is_an_error_within_a_batch():
    pruning = make()

    def rest_of_the_epoch():
        pruning.update(torch.tensor([3, 4, 3]), torch.ones(3))
        pruning.end_epoch(1.0)

    with pytest.raises(ValueError, match="twice in epoch 0"):
        rest_of_the_epoch()


def test_a_second_pass_over_the_loader_without_end_epoch_is_an_error():
    pruning = make()
    pruning.update(torch.arange(N), torch.ones(N))
    with pytest.raises(ValueError, match="twice"):
        pruning.update(torch.arange(N), torch.ones(N))


def test_an_epoch_that_is_cut_short_is_said_once():
    pruning = make(score="loss", delta=1.0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for epoch in range(4):
            index = torch.from_numpy(pruning.order())[: BATCH if epoch < 3 else N]
            pruning.update(index, LOSSES[epoch][index])
            pruning.end_epoch()
    (warning,) = said
    assert warning.category is PruningWarning
    assert warning.filename == __file__
    assert re.match(rf"{BATCH} of {N} samples selected for epoch 0 were trained on", str(warning.message))


@pytest.mark.filterwarnings("error")
def test_an_epoch_has_ended_when_it_is_said_to_be_cut_short():
    pruning = make(score="loss")
    pruning.update(torch.arange(BATCH), torch.ones(BATCH))
    with pytest.raises(PruningWarning):
        pruning.end_epoch()
    assert pruning.epoch == 1
    epoch_of(pruning)


def test_a_last_batch_that_is_left_out_is_no_epoch_cut_short(recwarn):
    pruning = make(score="loss")
    while pruning.epoch < T:
        for step, index in enumerate(torch.from_numpy(pruning.order()).split(BATCH)):
            if len(index) == BATCH:
                pruning.update(index, LOSSES[pruning.epoch][index])
            if step == 2:
                pruning.load_state_dict(pruning.state_dict())  # as after a crash
        pruning.end_epoch()
    assert not recwarn.list


def test_what_a_data_set_is_named_by_is_no_data_set():
    with pytest.raises(TypeError, match=r"^dict is a mapping .*by index.*\['train'\]"):
        DynamicPruning({"train": [1, 2], "test": [3]}, 200)
    assert DynamicPruning({0: "a", 1: "b"}, 200).n == 2


class Stream(IterableDataset):
    def __len__(self):
        return 10

    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize("dataset", [Stream(), iter(range(3)), 10, set(range(10))], ids=lambda d: type(d).__name__)
def test_a_data_set_without_items_by_index_is_refused(dataset):
    with pytest.raises(TypeError, match="map-style"):
        DynamicPruning(dataset, 200)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"pruner": "infobach"}, "'infobach'.*full.*random.*infobatch.*seta.*topk"),
        ({"score": "dass"}, "'dass'.*loss.*das.*spearman.*cosine.*random.*small_loss.*settled.*oracle"),
        ({"unseen": "drop"}, "'drop'.*carry.*mask.*refresh"),
        ({"rate": 0.5}, "'rate'.*ratio.*delta.*rescale.*budget"),
        ({"pruner": "full", "ratio": 0.5}, "'ratio'"),
        ({"ratio": 0.95}, "ratio=0.95"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"budget": 2}, "budget=2"),
        ({"epochs": 0}, "epochs=0"),
        ({"window": 2}, "window=2.*3"),
        ({"window": 2, "score": "loss"}, "window=2.*3"),
        ({"score": "oracle"}, "clean=mask"),
        ({"score": "oracle", "clean": [True] * 3}, rf"clean.*{N}"),
    ],
    ids=str,
)
def test_wrong_names_and_settings_are_refused_with_what_is_allowed(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**arguments)


@pytest.mark.parametrize("seed", [None, -1, 0.5, "0"])
def test_a_seed_that_would_not_repeat_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed=.*whole number"):
        make(seed=seed)


@pytest.mark.parametrize("name", list(PRUNERS))
def test_a_number_of_a_pruner_is_a_number_and_a_switch_true_or_false(name):
    """Every setting of every one, by its annotation: whatever is no number would end deep inside, or be a wrong one."""
    wrong = {"int": [2.5, "2", True, None], "float": ["0.5", [0.5], True, math.nan, None], "bool": ["false", 0, None]}
    kinds = {each.name: str(each.type).split(" | ") for each in fields(PRUNERS[name])}
    for setting, allowed in kinds.items():
        for value in itertools.chain(*(wrong.get(kind, []) for kind in allowed)):
            if (value is None and "None" in allowed) or (value == 2.5 and "float" in allowed):
                continue
            with pytest.raises(ValueError, match=f": {setting}={re.escape(repr(value))} is out of range; use "):
                PRUNERS[name](**{setting: value})


def test_numbers_of_numpy_are_numbers():
    pruning = make(ratio=np.float32(0.5), budget=np.float64(0.5), window=np.int64(4), epochs=np.int32(9))
    assert len(pruning.order()) == N // 2
    through_disk(pruning.state_dict())


@pytest.mark.parametrize("value", ["0.5", True, math.nan, None, [0.5]])
@pytest.mark.parametrize(
    "call",
    [
        lambda value: make(window=value),
        lambda value: PRUNERS["random"]().saving(value, T),
        lambda value: make(seed=value),
        lambda value: make("infobatch", "loss").planned_steps(value),
        lambda value: SCORES["readout"](every=value),
        lambda value: SCORES["reducible"](holdout=value),
        lambda value: TrajectoryLog(value),
    ],
)
def test_any_other_number_is_one_too(call, value):
    with pytest.raises(ValueError, match="is out of range; use a "):
        call(value)


@pytest.mark.parametrize("top", [0, 2.5, "2", None])
def test_how_many_suspects_is_a_whole_number(top):
    pruning, log = make(), TrajectoryLog(N)
    epoch_of(pruning)
    log.update(torch.arange(N), torch.zeros(N, 2), torch.arange(N) % 2)
    for listing in (lambda: pruning.suspects(np.arange(N) % 2, top), lambda: log.suspects(top)):
        with pytest.raises(ValueError, match=f"^top={re.escape(repr(top))} is out of range; use a whole number, 1 or"):
            listing()


@pytest.mark.parametrize("epochs", [0, -1, 8.5, 8.0, "8", None])
def test_epochs_that_are_no_whole_number_are_refused(epochs):
    with pytest.raises(
        ValueError, match=f"^epochs={re.escape(repr(epochs))} is out of range; use a whole number, 1 or"
    ):
        make("infobatch", "loss", epochs=epochs)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_labels_that_are_put_right_later_do_not_change_a_run(kind):
    labels, clean = kind([0, 1] * (N // 2)), kind([True, False] * (N // 2))
    pruning = make("full", "loss", labels=labels, clean=clean)
    labels[:], clean[:] = 0, True
    assert pruning.labels.tolist() == [0, 1] * (N // 2)
    assert pruning.clean.tolist() == [True, False] * (N // 2)


def test_a_mask_of_clean_labels_is_no_list_of_classes():
    with pytest.raises(ValueError, match="clean has values other than 0 and 1"):
        make("topk", "oracle", warmup=0, clean=np.arange(N) % 3)
    for clean in (["yes"] * N, [True] * (N - 1) + [None]):
        with pytest.raises(ValueError, match="clean has values other than 0 and 1"):
            make("topk", "oracle", warmup=0, clean=clean)
    as_numbers = make("topk", "oracle", warmup=0, clean=np.arange(N) % 2)
    assert as_numbers.clean.tolist() == [place % 2 == 1 for place in range(N)]


@pytest.mark.parametrize(
    ("indices", "weights", "sentence"),
    [
        (np.arange(N) % 2 == 0, np.ones(N), "indices"),
        (np.r_[0:5, 0:3], np.ones(8), "indices"),
        (np.arange(-1, 4), np.ones(5), "indices"),
        (np.arange(N - 2, N + 2), np.ones(4), "indices"),
        (np.arange(5.0), np.ones(5), "indices"),
        (np.arange(0), np.ones(0), "indices"),
        (np.arange(5), np.ones(1), "weights"),
        (np.arange(5), -np.ones(5), "weights"),
        (np.arange(5), np.array([1, 1, 0, 1, 1]), "weights"),
        (np.arange(5), np.array([1, 1, np.inf, 1, 1]), "weights"),
        (np.arange(5), np.full(5, np.nan), "weights"),
    ],
    ids=str,
)
def test_what_a_pruner_of_ones_own_selects_is_looked_at(indices, weights, sentence):
    @dataclass(frozen=True, kw_only=True)
    class Own(Pruner):
        def select(self, scores, epoch, epochs, rng):
            return Selection(indices, weights)

    with pytest.raises(ValueError, match=f"Own selects what cannot be trained on: {sentence} are not"):
        make(Own(), "loss").order()


def test_a_pruner_that_returns_no_selection_is_told_so():
    @dataclass(frozen=True, kw_only=True)
    class Own(Pruner):
        def select(self, scores, epoch, epochs, rng):
            return np.arange(5)

    with pytest.raises(ValueError, match="Own selects what cannot be trained on: it is ndarray, no Selection"):
        make(Own(), "loss").order()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"seed": 1}, "seed=0, and this is seed=1"),
        ({"score": "loss"}, "score=das, and this is score=loss"),
        ({"unseen": "mask"}, "unseen=carry, and this is unseen=mask"),
        ({"ratio": 0.25}, r"ratio=0.5.*and this is pruner=InfoBatch\(ratio=0.25"),
        ({"pruner": "seta"}, r"pruner=InfoBatch.*and this is pruner=SeTa"),
        ({"epochs": 9}, "epochs=8, and this is epochs=9"),
        pytest.param({"score": Readout(every=2), "labels": LABELS}, r"score=readout\(every=2\)", id="score.every"),
        ({"labels": LABELS}, "labels=none, and this is labels=checksum"),
        ({"clean": LABELS == 0}, "clean=none, and this is clean=checksum"),
    ],
    ids=str,
)
def test_the_state_of_another_run_is_not_taken_over(other, sentence):
    with pytest.raises(ValueError, match=f"the state is of .*{sentence}"):
        make(**({"seed": 0, "window": 3, "epochs": 8} | other)).load_state_dict(
            make(seed=0, window=3, epochs=8).state_dict()
        )


@pytest.mark.parametrize("kind", [int, "U9", object])
def test_the_state_of_a_run_with_other_labels_is_not_taken_over(kind):
    labels = LABELS if kind is int else np.array(["even", "odd"], kind)[LABELS]
    state = make(labels=labels).state_dict()
    other = labels.copy()
    other[0] = labels[1]
    with pytest.raises(ValueError, match=r"the state is of labels=checksum \w+, and this is labels=checksum"):
        make(labels=other).load_state_dict(state)
    same = torch.tensor(labels, dtype=torch.int32) if kind is int else list(labels)
    make(labels=same).load_state_dict(state)


def test_the_state_of_another_choice_is_not_taken_over():
    mine, others = (make(Fixed(indices=np.arange(start, 20)), "loss") for start in (0, 1))
    mine.load_state_dict(make(Fixed(indices=np.arange(20)), "loss").state_dict())
    with pytest.raises(ValueError, match="the state is of pruner=Fixed"):
        mine.load_state_dict(others.state_dict())


@pytest.mark.parametrize("index", [torch.arange(5.0), torch.ones(5, dtype=torch.bool)], ids=["floats", "a mask"])
def test_indices_that_are_no_whole_numbers_are_refused(index):
    with pytest.raises(ValueError, match=r"index is torch.*whole numbers"):
        make("full", "loss").update(index, torch.ones(5))
    with pytest.raises(ValueError, match=r"index is torch.*whole numbers"):
        make("full", "loss").record(index, torch.ones(5))


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        ((0.1, 0.2, 0.3), "a tuple of 3"),
        ("0.3", "of type str"),
        ({"loss": 0.3}, "of type dict"),
        ([None], "of type list"),
    ],
)
def test_a_reference_loss_that_is_no_numbers_is_refused_and_may_be_given_anew(loss, what):
    pruning = make("full", "das")
    index = torch.from_numpy(pruning.order())
    pruning.update(index, LOSSES[0][index])
    with pytest.raises(ValueError, match=rf"^the reference loss is {what}; pass the mean loss as a number, all losses"):
        pruning.end_epoch(loss)
    with pytest.raises(ValueError, match=r"^the reference losses have shape \(3, 2\); pass one a sample, \(R,\), or"):
        pruning.end_epoch(torch.ones(3, 2))
    pruning.end_epoch(0.3)
    assert pruning.trajectories.reference_W[0] == 0.3


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, list], ids=["tensor", "array", "list"])
def test_the_reference_losses_may_be_any_numbers(kind):
    pruning = make("full", "das", labels=np.arange(N) % 3)
    index = torch.from_numpy(pruning.order())
    pruning.update(index, LOSSES[0][index])
    with pytest.raises(ValueError, match="the reference set has no loss"):
        pruning.end_epoch(kind([]))
    pruning.end_epoch(kind([0.5, 1.5, 2.5]))
    assert pruning.trajectories.reference_W[0] == 1.5


def test_a_score_of_ones_own_does_not_pass_for_another():
    class das(Score):
        def __call__(self, history):
            return history.last_N

    with pytest.raises(ValueError, match="das is named 'das', which is another score; name it otherwise"):
        make("topk", das(), warmup=0)


def test_a_score_in_half_precision_ranks():
    class Half(Score):
        def __call__(self, history):
            return history.last_N.bfloat16()

    pruning = make("topk", Half(), warmup=0)
    epoch_of(pruning)
    assert pruning.ranking.dtype == np.float32


@pytest.mark.parametrize("change", [list.pop, lambda items: items.extend(range(3))], ids=["shrinks", "grows"])
def test_a_data_set_that_changes_its_length_is_refused_where_the_next_epoch_begins(change):
    items = list(range(N))
    pruning = DynamicPruning(items, T, "full", "loss", window=WINDOW)
    epoch_of(pruning)
    change(items)
    with pytest.raises(ValueError, match=f"^the data set has {len(items)} samples by now, and the pruning is of {N}; "):
        list(pruning.sampler)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        DynamicPruning([], 200)


@pytest.mark.parametrize(
    ("epochs", "delta", "longest"),
    [(200, 0.875, 174), (16, 0.875, 13), (15, 0.875, 12), (10, 0.7, 6), (4, 1.0, 3)],
)
def test_a_window_must_leave_das_an_epoch_to_act_in(epochs, delta, longest):
    assert longest + 1 <= delta * epochs + 1e-9 < longest + 2
    pruning = make(epochs=epochs, delta=delta, window=longest)
    assert pruning.epochs == epochs
    for score in ("das", "spearman", "cosine"):
        with pytest.raises(ValueError, match=rf"window of {longest + 1} .*{score}"):
            make(score=score, epochs=epochs, delta=delta, window=longest + 1)
    for score in ("loss", "small_loss", "settled", "random"):
        make(score=score, epochs=epochs, delta=delta, window=longest + 1)
    for pruner in ("full", "random"):
        make(pruner, epochs=epochs, window=longest + 1)


@pytest.mark.parametrize(
    ("pruner", "settings", "said"),
    [
        ("topk", {"warmup": 4}, "TopK: warmup=4 and delta=1.0 leave"),
        ("ucb", {"warmup": 2, "delta": 0.5}, "UCB: warmup=2 and delta=0.5 leave"),
        ("epsilon_greedy", {"warmup": 5}, "EpsilonGreedy: warmup=5 and delta=1.0 leave"),
        ("sieve", {"warmup": 4}, "Sieve: warmup=4 leaves"),
        ("sieve", {"warmup": 0.9}, "Sieve: warmup=0.9 leaves"),
        ("query", {"every": 4}, "Query: every=4 leaves"),
        ("infobatch", {"delta": 0.2}, "InfoBatch: delta=0.2 leaves"),
        ("seta", {"delta": 0.25}, "SeTa: delta=0.25 leaves"),
    ],
)
def test_a_pruner_must_leave_scores_an_epoch_to_choose_in(pruner, settings, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)} scores none of 4 epochs to choose in; use more epochs"):
        make(pruner, "loss", epochs=4, **settings)
    ranked = [ranked for *_, ranked in selections_of(make(pruner, "loss", epochs=8, **settings))]
    assert ranked.count("loss") >= 1


def test_the_longest_window_lets_das_rank_exactly_one_epoch():
    ranked = [ranked for *_, ranked in selections_of(make(window=6))]
    assert ranked == ["loss"] * 6 + ["das", None]


def test_refresh_that_misses_samples_is_an_error_that_counts_them():
    pruning = make("random", "loss", ratio=0.5, unseen="refresh")
    index = torch.from_numpy(pruning.order())
    pruning.update(index, LOSSES[0][index])
    pruning.record(pruning.unseen()[:5], torch.ones(5))
    with pytest.raises(ValueError, match=f"refresh.*10 of {N}.*epoch 0"):
        pruning.end_epoch()
    pruning.record(pruning.unseen(), torch.ones(10))
    pruning.end_epoch()
    assert pruning.epoch == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("where", ["loss", "observed"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_epoch_and_the_first_bad_step(bad, where):
    pruning = make()
    for _ in range(2):
        epoch_of(pruning)
    for step, index in enumerate(torch.from_numpy(pruning.order()).split(4)):
        loss, observed = LOSSES[2][index].double(), LOSSES[2][index].double()
        if step in (1, 3):
            (loss if where == "loss" else observed)[2] = bad
        pruning.update(index, loss, observed=observed)
    with pytest.raises(NonFiniteLossError, match="epoch 2, step 1") as caught:
        pruning.end_epoch(1.0)
    assert (caught.value.epoch, caught.value.step) == (2, 1)
    assert isinstance(caught.value, ValueError)
    assert pruning.epoch == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_refreshed_loss_that_is_not_finite_stops_the_run_too(bad):
    pruning = make("random", "loss", ratio=0.5, unseen="refresh")
    index = torch.from_numpy(pruning.order())
    pruning.update(index, LOSSES[0][index])
    losses = torch.ones(N - len(index))
    losses[3] = bad
    pruning.record(pruning.unseen(), losses)
    with pytest.raises(ValueError, match="NaN or infinite"):
        pruning.end_epoch()


def test_past_the_last_epoch_every_way_on_is_an_error():
    pruning = make()
    selections_of(pruning)
    ways_on = [
        lambda: pruning.selection,
        lambda: list(pruning.sampler),
        lambda: pruning.update(torch.arange(4), torch.ones(4)),
        lambda: pruning.end_epoch(1.0),
    ]
    for way_on in ways_on:
        with pytest.raises(ValueError, match=f"all {T} epochs are done"):
            way_on()
    assert pruning.report()["times_selected"].max() == T
    loader = DataLoader(pruning, batch_size=BATCH, sampler=pruning.sampler)
    assert len(loader) == len(pruning.sampler) == 0  # what others ask for when they clean up


def test_scores_within_an_epoch_are_an_error():
    pruning = make()
    pruning.update(torch.arange(4), torch.ones(4))
    with pytest.raises(RuntimeError, match="within an epoch"):
        pruning.scores("loss")


# ---- a score and a pruner of one's own ---------------------------------------------------------------------


class Fickle(Score):
    """How much the loss moved in the last epoch."""

    name = "fickle"

    def __call__(self, history):
        return history.map(lambda losses_WB: (losses_WB[-1] - losses_WB[0]).abs())


class Gap(Score):
    """The distance of the last loss from the reference's."""

    name = "gap"
    aligned = True

    def __call__(self, history):
        return -(history.last_N - history.reference_W[-1]).abs().float()


class EveryOther(Pruner):
    """The better half, at weight 2."""

    def select(self, scores, epoch, epochs, rng):
        best = np.sort(np.argsort(-scores, kind="stable")[: len(scores) // 2])
        return Selection(best, np.full(len(best), 2, np.float32), ranked=True)


def test_a_score_of_ones_own_ranks_under_any_pruner():
    pruning = make("topk", Fickle(), warmup=1, ratio=0.5)
    epoch_of(pruning)
    epoch_of(pruning)
    assert pruning.ranked_by == "fickle"
    np.testing.assert_array_equal(pruning.report()["ranking"], pruning.scores(Fickle()))


def test_an_aligned_score_of_ones_own_falls_back_to_loss_and_needs_the_reference():
    with pytest.raises(ValueError, match="gap"):
        make("infobatch", Gap(), window=7)
    pruning = make("infobatch", Gap())
    pruning.update(torch.arange(N), LOSSES[0])
    with pytest.raises(ValueError, match=r"gap.*reference"):
        pruning.end_epoch()
    pruning.end_epoch(REFERENCE[0])
    ranked = [ranked for *_, ranked in selections_of(pruning)]
    assert ranked == ["loss"] * 2 + ["gap"] * 4 + [None]


def test_a_pruner_of_ones_own_is_used_as_it_is():
    pruning = make(EveryOther(), "loss")
    epoch_of(pruning)
    index = torch.from_numpy(pruning.order())
    last = pruning.report()["loss"].fillna(3.0).to_numpy()
    assert sorted(last[index]) == sorted(last)[N // 2 :]
    assert pruning.update(index, torch.ones(N // 2)).item() == 2
    assert pruning.ranked_by == "loss"


def test_settings_beside_a_pruner_of_ones_own_are_refused():
    with pytest.raises(ValueError, match=r"ratio.*on the pruner"):
        make(EveryOther(), "loss", ratio=0.5)


class Wrong(Score):
    def __init__(self, returned):
        self.returned = returned

    def __call__(self, history):
        return self.returned


class Without(Score):
    pass


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (Wrong(torch.zeros(3)), r"Wrong returned shape \(3,\); a score returns a tensor \(20,\)"),
        (Wrong(torch.full((20,), -math.inf)), "score=Wrong became NaN or infinite"),
        (Wrong(np.zeros(20)), r"Wrong returned ndarray; a score returns a tensor \(20,\)"),
        (Without(), r"Without has no __call__"),
        (Without, r"Without is a class; pass an instance: score=Without\(\)"),
    ],
)
def test_a_score_of_ones_own_that_cannot_rank_says_why(score, words):
    with pytest.raises(ValueError, match=words):
        DynamicPruning(range(20), 10, "topk", score)


def test_a_plug_in_told_what_to_save_saves_it():
    pruning = DynamicPruning(range(200), 20, "infobatch", "loss", saved=0.5)
    assert pruning.pruner == PRUNERS["infobatch"]().saving(0.5, 20)
    with pytest.raises(ValueError, match="out of reach"):
        DynamicPruning(range(200), 20, "infobatch", "loss", saved=0.95)


@pytest.mark.parametrize("saved", [-1, 1, 1.5, 50, True, float("nan"), "0.5"])
@pytest.mark.parametrize("pruner", ["full", "shorter", "random"])
def test_what_cannot_be_saved_is_refused_by_every_pruner(pruner, saved):
    with pytest.raises(ValueError, match=r"^saved=.* is out of range; use a number above 0 and below 1$"):
        DynamicPruning(range(10), 10, pruner, "loss", saved=saved)


@pytest.mark.parametrize("pruner", ["infobatch", "ucb"])
@pytest.mark.parametrize("again", [False, True])
def test_a_bank_without_reference_losses_is_ranked_by_the_loss_until_its_window_has_them(pruner, again):
    def walk(pruning, epochs, reference):
        for _ in range(epochs):
            index = torch.from_numpy(pruning.order())
            pruning.update(index, torch.rand(len(index)))
            pruning.end_epoch(reference(pruning.epoch))

    warm = DynamicPruning(range(40), 6, "full", "loss", window=4)
    walk(warm, 6, lambda epoch: None)
    bank = warm.trajectories.anew() if again else warm.trajectories
    pruning = DynamicPruning(range(40), 8, pruner, "das", bank=bank)
    by = []
    for _ in range(6):
        walk(pruning, 1, lambda epoch: 1 / (1 + epoch))
        by.append(pruning.ranked_by)
    assert by == [*["loss"] * 3, *["das"] * 3]

    with pytest.raises(ValueError, match="leaves das none to act in"):
        DynamicPruning(range(40), 3, "topk", "das", warmup=0, bank=bank.anew())


def test_an_epoch_whose_only_batch_was_dropped_is_told_as_such():
    pruning = DynamicPruning(TensorDataset(torch.zeros(200)), 10, "random", "das", saved=0.9, window=3)
    loader = DataLoader(pruning, batch_size=64, sampler=pruning.sampler, drop_last=True)
    assert not list(loader)
    with pytest.raises(ValueError, match=r"no loss was recorded in epoch 0.* leave out drop_last=True"):
        pruning.end_epoch(pruning.trajectories.population_mean())


@pytest.mark.parametrize("score", ["das", "spearman", "cosine"])
def test_a_comparison_with_no_reference_is_no_zero(score):
    pruning = DynamicPruning(range(20), 6, "full", "loss", window=3)
    for _ in range(4):
        pruning.update(torch.arange(20), torch.rand(20))
        pruning.end_epoch()
    with pytest.raises(ValueError, match=f"^score='{score}' compares with the reference set, of which the window has"):
        pruning.scores(score)
