"""Static pruning: each criterion against its formula written a second way, and a run in two phases."""

import itertools
import math
import signal
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from alignprune_exp import optim
from alignprune_exp.config import OPTIMIZER, validate
from alignprune_exp.data.augment import rand_augment
from alignprune_exp.errors import UsageError
from alignprune_exp.network import Network
from alignprune_exp.pruning import PRUNERS, Choice, Criterion, DynamicPruning, Evidence, Fixed, WarmUpLog
from alignprune_exp.pruning.coresets.prune4rel import Neighbours, reliable
from alignprune_exp.pruning.seeding import generator
from alignprune_exp.pruning.selection import proportional
from alignprune_exp.run import Run
from alignprune_exp.setup import make_pruning
from harness import (
    Stop,
    assert_same_results,
    checkpoint_of,
    config_of,
    environment_of,
    launch,
    metrics_of,
    only_run,
    rows_of,
    samples_of,
    summary_of,
    through_disk,
    trained,
)

STATIC = sorted(name for name in PRUNERS if name.startswith("static_"))
N, C, D = 60, 4, 5
SHORT = ("threads=1", "epochs=3", "dataset.subset=150", "dataset.test_subset=60", "precision=fp32")


def evidence(seed=0, n=N, ties=False):
    rng = np.random.default_rng(seed)

    def part(size):
        logits = rng.normal(size=(size, C)) * 2
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return Evidence(
            labels=np.r_[np.arange(C), rng.integers(C, size=size - C)],
            probabilities=probabilities.astype(np.float32),
            embeddings=rng.normal(size=(size, D)).astype(np.float32),
            losses=rng.integers(3, size=size).astype(float) if ties else rng.exponential(size=size),
            forgotten=np.where(rng.random(size) < 0.2, np.inf, rng.integers(5, size=size)),
        )

    return replace(part(n), reference=part(12))


def chosen(name, given_evidence, seed=0, **settings):
    indices = PRUNERS[name](**settings).choose(given_evidence, np.random.default_rng(seed)).indices.tolist()
    assert indices == sorted(set(indices))
    return indices


def best_of(worth, size):
    return sorted(sorted(range(len(worth)), key=lambda i: -worth[i])[:size])


# The criteria, a second way


def second_way(name, seen):
    """Each sample's worth, one by one."""
    worth = []
    for i, label in enumerate(seen.labels.tolist()):
        p, h = [float(x) for x in seen.probabilities[i]], [float(x) for x in seen.embeddings[i]]
        wrong = math.dist(p, [float(c == label) for c in range(C)])
        if name == "static_el2n":
            worth.append(wrong)
        elif name == "static_grand":
            worth.append(wrong * math.hypot(*h, 1.0))
        elif name == "static_margin":
            first, second = sorted(p)[:-3:-1]
            worth.append(second - first)
        else:
            worth.append(-float(seen.losses[i]))
    return worth


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["static_el2n", "static_grand", "static_margin", "static_small_loss"])
def test_ranked_criteria_keep_the_best_by_their_formula(name, seed):
    seen = evidence(seed)
    assert chosen(name, seen, fraction=0.4) == best_of(second_way(name, seen), 24)
    by_class = {c: [i for i in range(N) if seen.labels[i] == c] for c in range(C)}
    sizes = proportional([len(members) for members in by_class.values()], 24)
    worth = second_way(name, seen)
    expected = [
        members[place]
        for members, size in zip(by_class.values(), sizes, strict=True)
        for place in best_of([worth[i] for i in members], size)
    ]
    assert chosen(name, seen, fraction=0.4, balanced=True) == sorted(expected)


def test_el2n_of_a_certain_and_right_sample_is_not_lost_in_rounding():
    seen = Evidence(labels=[0, 0], probabilities=[[1 - 1e-9, 1e-9], [1 - 1e-8, 1e-8]])
    assert chosen("static_el2n", seen, fraction=0.5) == [1]


@pytest.mark.parametrize("seed", range(3))
def test_moderate_keeps_those_nearest_to_their_class_median_distance(seed):
    seen = evidence(seed)
    expected = []
    members = {c: [i for i in range(N) if seen.labels[i] == c] for c in range(C)}
    for group, size in zip(members.values(), proportional([len(m) for m in members.values()], 30), strict=True):
        centre = [sum(float(seen.embeddings[i, d]) for i in group) / len(group) for d in range(D)]
        distance = [math.dist(seen.embeddings[i].tolist(), centre) for i in group]
        middle = sorted(distance)
        half = len(middle) // 2
        median = middle[half] if len(middle) % 2 else (middle[half - 1] + middle[half]) / 2
        expected += [group[place] for place in best_of([-abs(d - median) for d in distance], size)]
    assert chosen("static_moderate", seen, fraction=0.5) == sorted(expected)


def test_forgetting_takes_the_never_learnt_first_and_then_the_most_often_forgotten():
    seen = Evidence(labels=[0] * 6, forgotten=[0, 3, math.inf, 1, math.inf, 2])
    for size, expected in ((1, {2, 4}), (2, {2, 4}), (3, {2, 4, 1}), (5, {2, 4, 1, 5, 3})):
        assert set(chosen("static_forgetting", seen, fraction=size / 6)) <= expected


def test_forgetting_events_are_those_of_a_log_walked_by_hand():
    walked = {  # right (1) or wrong (0) in each epoch, and the events
        "11111": 0,
        "00000": math.inf,
        "00001": 0,
        "01010": 2,
        "10101": 2,
        "11001": 1,
        "11110": 1,
        "10000": 1,
    }
    log, losses = WarmUpLog(len(walked)), np.random.default_rng(0).exponential(size=(5, len(walked)))
    for epoch in range(5):
        log.observe(losses[epoch], np.array([history[epoch] == "1" for history in walked]))
        state = through_disk(log.state_dict())
        log = WarmUpLog(len(walked))
        log.load_state_dict(state)
    assert log.forgotten.tolist() == list(walked.values())
    np.testing.assert_allclose(log.losses, losses.mean(0))


# GraNd and GLISTER against autograd


def layer(seen):
    """A linear layer that gives the evidence's embeddings probabilities, which replace its own."""
    rng = np.random.default_rng(9)
    head = nn.Linear(D, C).double()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(rng.normal(size=(C, D))))

    def predicted(part):
        with torch.no_grad():
            return replace(part, probabilities=head(torch.from_numpy(part.embeddings).double()).softmax(1).numpy())

    return head, replace(predicted(seen), reference=predicted(seen.reference))


def gradient(head, part, rows):
    """The mean cross-entropy's gradient by the layer's weight and bias, as one vector."""
    loss = F.cross_entropy(head(torch.from_numpy(part.embeddings[rows]).double()), torch.as_tensor(part.labels[rows]))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, head.parameters())])


def stepped(head, direction, eta):
    """The layer after a step."""
    moved = nn.Linear(D, C).double()
    with torch.no_grad():
        moved.weight.copy_(head.weight - eta * direction[: C * D].view(C, D))
        moved.bias.copy_(head.bias - eta * direction[C * D :])
    return moved


def test_grand_is_the_norm_of_the_last_layers_true_gradient():
    head, seen = layer(evidence())
    norms = [float(gradient(head, seen, [i]).norm()) for i in range(N)]
    np.testing.assert_allclose(PRUNERS["static_grand"]().worth(seen), norms, rtol=1e-10)


def test_glister_first_takes_what_lowers_the_reference_loss_most_in_one_step():
    for seed in range(5):
        head, seen = layer(evidence(seed))
        reference, everyone = seen.reference, list(range(12))

        def loss(network, part=reference):
            logits = network(torch.from_numpy(part.embeddings).double())
            return F.cross_entropy(logits, torch.as_tensor(part.labels)).item()

        lowered = [loss(head) - loss(stepped(head, gradient(head, seen, [i]), 1e-5)) for i in range(N)]
        settings = {"balanced": False, "eta": 2.0, "fraction": 1 / N}
        first = int(np.argmax(lowered))
        assert chosen("static_glister", seen, **settings) == [first]

        moved = stepped(head, gradient(head, seen, [first]), 2.0)
        ahead = gradient(moved, reference, everyone)
        gains = [float(gradient(head, seen, [i]) @ ahead) if i != first else -math.inf for i in range(N)]
        second = int(np.argmax(gains))
        assert chosen("static_glister", seen, **settings | {"fraction": 2 / N, "rounds": 2}) == sorted([first, second])

        moved = stepped(head, gradient(head, seen, [first, second]), 2.0)
        ahead = gradient(moved, reference, everyone)
        gains = [float(gradient(head, seen, [i]) @ ahead) if i not in (first, second) else -math.inf for i in range(N)]
        third = {first, second, int(np.argmax(gains))}
        assert set(chosen("static_glister", seen, **settings | {"fraction": 3 / N, "rounds": 3})) == third


@pytest.mark.parametrize("rounds", [1, 7, 15, 100])
def test_glister_takes_each_classes_share_whatever_the_rounds(rounds):
    seen = evidence(3)
    indices = chosen("static_glister", seen, rounds=rounds, fraction=0.5)
    counts = np.bincount(seen.labels, minlength=C).tolist()
    assert np.bincount(seen.labels[indices], minlength=C).tolist() == proportional(counts, 30).tolist()


# Prune4ReL


def similarities(embeddings):
    unit = [[x / (math.hypot(*row) or 1) for x in row] for row in embeddings.tolist()]
    return [[0.5 + 0.5 * sum(a * b for a, b in zip(u, v, strict=True)) for v in unit] for u in unit]


few_samples = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.5]), min_size=3, max_size=3), min_size=n, max_size=n),
        st.lists(st.floats(0.1, 1), min_size=n, max_size=n),
        st.lists(st.integers(0, 2), min_size=n, max_size=n),
    )
)


@given(few_samples, st.sampled_from([0.0, 0.51, 0.83, 0.977]), st.sampled_from([0.2, 1.0, 5.0]), st.booleans())
def test_prune4rel_takes_the_brute_force_best_at_every_turn(samples, tau, eta, balanced):
    embeddings, confidence, labels = (np.array(values) for values in samples)
    order = np.argsort(labels, kind="stable") if balanced else np.arange(len(labels))
    embeddings, confidence, labels = embeddings[order], confidence[order], labels[order]
    members = np.unique(labels, return_counts=True)[1].tolist() if balanced else [len(labels)]
    picks = reliable(Neighbours.of(embeddings, tau, 64), confidence, members, len(labels), eta).tolist()
    assert sorted(picks) == list(range(len(labels)))
    close = similarities(embeddings)
    turns = itertools.cycle(sorted(set(labels.tolist())))
    taken = []
    for pick in picks:
        free = [i for i in range(len(labels)) if i not in taken]
        if balanced:
            turn = next(turns)
            while turn not in labels[free]:
                turn = next(turns)
            free = [i for i in free if labels[i] == turn]
        reach = {i: sum(close[i][k] * confidence[k] for k in taken if close[i][k] > tau) for i in free}
        gain = {i: math.tanh((reach[i] + confidence[i]) / eta) - math.tanh(reach[i] / eta) for i in free}
        assert pick in free
        assert gain[pick] >= max(gain.values()) - 1e-6
        taken.append(pick)


def test_the_published_tau_are_of_similarities_and_not_of_cosines():
    angles = np.arccos([1.0, 0.97, 0.92, 0.7, 0.5])
    embeddings = np.c_[np.cos(angles), np.sin(angles)]
    for tau, near in ((0.975, [1]), (0.95, [1, 2]), (0.8, [1, 2, 3])):
        graph = Neighbours.of(embeddings, tau, 64)
        assert graph.index[: graph.starts[1]].tolist() == near
        expected = [0.985, 0.96, 0.85][: len(near)]
        np.testing.assert_allclose(graph.similarity[: graph.starts[1]], expected, rtol=1e-5)


def test_prune4rel_tells_saturated_samples_apart():
    """tanh is 1 in float64 from 19 on; the gains beyond are still in order."""
    embeddings = np.ones((200, 2))
    embeddings[150:] = [1, -1]
    confidence = np.linspace(0.9, 1.0, 200)
    picks = reliable(Neighbours.of(embeddings, 0.9, 64), confidence, [200], 200, 1.0).tolist()
    assert [pick for pick in picks if pick < 150] == list(range(149, -1, -1))
    assert [pick for pick in picks if pick >= 150] == list(range(199, 149, -1))
    turns = [pick >= 150 for pick in picks[:80]]
    assert 30 <= sum(turns) <= 50  # both clusters in turn, though both are saturated after some twenty


@pytest.mark.parametrize("tile", [64, 1 << 20])
def test_the_graph_is_exact_and_what_is_cut_off_is_reported(monkeypatch, tile):
    monkeypatch.setattr("alignprune_exp.pruning.coresets.prune4rel.TILE", tile)
    embeddings = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    close = np.array(similarities(embeddings.astype(float)))
    np.fill_diagonal(close, 0)
    for pairs in (10**9, 0, int((close[:20] > 0.75).sum())):
        graph = Neighbours.of(embeddings, 0.75, 4, pairs)
        cut = pairs < 10**9
        total = kept = mass = 0
        for i in range(40):
            near = [k for k in range(40) if close[i, k] > 0.75]
            expected = sorted(near, key=lambda k: -close[i, k])[:4] if cut else near
            entries = slice(graph.starts[i], graph.starts[i + 1])
            assert sorted(graph.index[entries].tolist()) == sorted(expected)
            np.testing.assert_allclose(graph.similarity[entries], close[i, graph.index[entries]], atol=1e-6)
            total, kept, mass = total + len(near), kept + len(expected), mass + close[i, expected].sum()
        facts = graph.facts()
        assert facts["neighbours_mean"] == total / 40
        assert facts["neighbours_cut"] == pytest.approx(1 - kept / total, abs=1e-12)
        assert facts["similarity_cut"] == pytest.approx(1 - mass / close[close > 0.75].sum(), abs=1e-6)
        assert cut == (facts["neighbours_cut"] > 0)


def test_prune4rel_lets_the_given_classes_take_turns_and_does_not_look_at_lengths():
    seen = evidence(1)
    indices = chosen("static_prune4rel", seen, fraction=0.5, tau=0.75)
    counts = np.bincount(seen.labels[indices], minlength=C)
    assert counts.max() - counts.min() <= 1
    longer = replace(seen, embeddings=seen.embeddings * np.random.default_rng(0).uniform(0.1, 9, (N, 1)))
    assert chosen("static_prune4rel", longer, fraction=0.5, tau=0.75) == indices


# All of them


@pytest.mark.parametrize("name", STATIC)
@given(st.integers(C, 40), st.integers(1, 100), st.integers(0, 3))
def test_sizes_are_exact_and_ties_are_addressed(name, n, hundredths, seed):
    seen = evidence(seed, n, ties=True)
    settings = {"fraction": hundredths / 100}
    indices = chosen(name, seen, seed, **settings)
    assert len(indices) == max(1, math.floor(Fraction(hundredths, 100) * n))
    assert chosen(name, seen, seed, **settings) == indices


@pytest.mark.parametrize("name", sorted(set(STATIC) - {"static_random"}))
def test_no_criterion_depends_on_the_order_of_the_samples(name):
    seen = evidence(5)
    seen = replace(seen, forgotten=np.random.default_rng(1).permutation(N).astype(float))  # no ties
    order = np.random.default_rng(2).permutation(N)
    moved = replace(
        seen,
        **{key: getattr(seen, key)[order] for key in ("labels", "probabilities", "embeddings", "losses", "forgotten")},
    )
    assert sorted(order[chosen(name, moved, seed=8)].tolist()) == chosen(name, seen, seed=3)


def test_ties_are_broken_evenly():
    seen = Evidence(labels=np.zeros(8, int), losses=np.r_[0.0, np.ones(7)])
    times = np.zeros(8)
    for seed in range(700):
        times[chosen("static_small_loss", seen, seed, fraction=0.5)] += 1
    assert times[0] == 700
    assert (abs(times[1:] - 300) < 60).all()  # 3 of 7, more than four standard deviations


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any), st.integers(0, 100))
def test_shares_are_by_largest_remainder(members, percent):
    size = sum(members) * percent // 100
    shares = proportional(members, size)
    assert sum(shares) == size
    exact = [Fraction(size * count, sum(members)) for count in members]
    assert all(abs(got - want) < 1 for got, want in zip(shares, exact, strict=True))
    up = [want - math.floor(want) for got, want in zip(shares, exact, strict=True) if got > want]
    down = [want - math.floor(want) for got, want in zip(shares, exact, strict=True) if got <= want]
    assert not up or not down or min(up) >= max(d for d in [*down, 0])


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("static_el2n", {"warmup": -1}, "warmup"),
        ("static_el2n", {"warmup": 2.5}, "warmup"),
        ("static_forgetting", {"warmup": 0}, "warmup"),
        ("static_random", {"fraction": 0}, "fraction"),
        ("static_random", {"fraction": 1.1}, "fraction"),
        ("static_glister", {"eta": 0}, "eta"),
        ("static_glister", {"rounds": 0}, "rounds"),
        ("static_prune4rel", {"tau": 1}, "tau"),
        ("static_prune4rel", {"tau": -0.1}, "tau"),
        ("static_prune4rel", {"eta": 0}, "eta"),
        ("static_prune4rel", {"neighbours": 0}, "neighbours"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, settings, word):
    with pytest.raises(ValueError, match=f"{word}={settings[word]} "):
        PRUNERS[name](**settings)


@pytest.mark.parametrize(("warmup", "epochs"), [(0.1, 4), (0.01, 1), (5, 5), (0.5, 20)])
def test_a_warm_up_below_one_is_a_share_of_the_epochs(warmup, epochs):
    assert PRUNERS["static_el2n"](warmup=warmup).warmup_epochs(40) == epochs


# In a loop of one's own


def walk(pruning, until=None, reference=None):
    """Train; return the samples of each epoch, in order."""
    orders = []
    while pruning.epoch < (pruning.epochs if until is None else until):
        order = torch.from_numpy(pruning.order())
        for index in order.split(16):
            pruning.update(index, 1.0 + index / N)
        orders.append(order.tolist())
        pruning.end_epoch(reference)
    return orders


def warm_up(epochs=2):
    return DynamicPruning(range(N), epochs, pruner="full", seed=4)


def go_on(indices, bank=None):
    return DynamicPruning(range(N), 3, Fixed(indices=indices), bank=bank, seed=4)


@pytest.mark.parametrize("name", STATIC)
def test_a_loop_of_ones_own_warms_up_on_everything_and_keeps_to_the_choice(name):
    warm = warm_up()
    assert [len(order) for order in walk(warm)] == [N, N]
    indices = chosen(name, evidence(), fraction=0.3)
    pruning = go_on(indices, warm.trajectories)
    assert (pruning.epoch, pruning.epochs) == (2, 5)
    orders = walk(pruning)
    assert [len(order) for order in orders] == [18] * 3
    assert len({tuple(order) for order in orders}) == 3
    assert [sorted(order) for order in orders] == [indices] * 3
    assert pruning.times_selected.tolist() == [3 * (i in indices) for i in range(N)]
    np.testing.assert_allclose(pruning.report()["loss"], 1 + np.arange(N) / N, rtol=1e-6)
    assert pruning.trajectories.count_N.tolist() == [2 + 3 * (i in indices) for i in range(N)]


def test_no_random_choice_of_the_warm_up_is_made_again_after_it():
    warm = warm_up(3)
    first, again = walk(warm), walk(go_on(np.arange(N)))
    assert first == again  # without the bank
    assert not {tuple(order) for order in first} & {tuple(order) for order in walk(go_on(range(N), warm.trajectories))}


def test_rs2_takes_the_slices_of_its_permutations_after_a_warm_up_too():
    warm = warm_up(1)
    walk(warm)
    epochs = walk(DynamicPruning(range(N), 6, pruner="rs2", score="loss", budget=1 / 3, bank=warm.trajectories))
    for of_round in (epochs[:3], epochs[3:]):
        assert sorted(itertools.chain(*of_round)) == list(range(N))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_loop_of_ones_own_goes_on_from_its_state_in_either_phase(steps):
    def resumed(pruning, make):
        """Train some steps of an epoch, and the rest after a restart from the disk."""
        parts = torch.from_numpy(pruning.order()).split(8)
        for index in parts[:steps]:
            pruning.update(index, 1.0 + index / N)
        again = make()
        again.load_state_dict(through_disk(pruning.state_dict()))
        assert (again.epoch, again.epochs, again.first) == (pruning.epoch, pruning.epochs, pruning.first)
        assert torch.equal(torch.cat(parts), torch.from_numpy(again.order()))
        for index in parts[steps:]:
            again.update(index, 1.0 + index / N)
        again.end_epoch()
        return again

    undisturbed = warm_up()
    walk(undisturbed)
    indices = chosen("static_margin", evidence(), fraction=0.3)
    whole = go_on(indices, undisturbed.trajectories)
    walk(whole)
    warm = warm_up()
    while warm.epoch < 2:
        warm = resumed(warm, warm_up)
    pruning = go_on(indices, warm.trajectories)
    while pruning.epoch < 5:
        pruning = resumed(pruning, lambda: go_on(indices))
    pd.testing.assert_frame_equal(pruning.report(), whole.report(), check_exact=True)
    assert (pruning.trajectories.sum_N == whole.trajectories.sum_N).all()
    with pytest.raises(ValueError, match="all 5 epochs are done"):
        pruning.order()


@pytest.mark.parametrize("pruner", ["static_el2n", PRUNERS["static_el2n"](warmup=1)])
def test_a_criterion_in_a_pruners_place_is_told_where_its_own_is(pruner):
    words = r"^pruner=.* chooses once: .* choose\(\) .* pruner=Fixed\(indices=chosen.indices\)$"
    with pytest.raises(ValueError, match=words):
        DynamicPruning(range(N), epochs=3, pruner=pruner)


def test_an_unknown_pruner_is_told_only_those_that_choose_every_epoch():
    with pytest.raises(ValueError, match=r"is unknown; use one of full, shorter, random, .*, or a Pruner") as said:
        DynamicPruning(range(N), epochs=3, pruner="el2n")
    assert "static_" not in str(said.value)


@pytest.mark.parametrize("indices", [[], [3, 3], [-1, 3], [3, N], np.arange(N) < 3])
def test_indices_that_are_not_some_of_the_samples_are_refused(indices):
    with pytest.raises(ValueError, match=f"some of 0 to {N - 1}, each once"):
        _ = go_on(np.array(indices)).selection


def test_the_bank_of_another_data_set_is_refused():
    with pytest.raises(ValueError, match=f"bank is of {N} samples, and the data set has 7"):
        DynamicPruning(range(7), 3, "full", bank=warm_up().trajectories)
    with pytest.raises(ValueError, match="bank is of type DynamicPruning; pass the trajectories of an earlier"):
        DynamicPruning(range(N), 3, "full", bank=warm_up())


def test_a_window_that_the_warm_up_has_filled_needs_no_epochs_of_its_own():
    warm = warm_up(10)
    walk(warm, reference=1.0)
    settings = {"pruner": "topk", "score": "das", "ratio": 0.5, "warmup": 0}
    assert DynamicPruning(range(N), 2, bank=warm.trajectories, **settings).ranked_by == "das"
    short = warm_up(8)
    walk(short, reference=1.0)
    with pytest.raises(ValueError, match="here 2 of 2; use a window of at most 9, or 3 epochs or more"):
        DynamicPruning(range(N), 2, bank=short.trajectories, **settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embeddings": None}, "embeddings, which the evidence lacks"),
        ({"reference": None}, "a reference set, which the evidence lacks"),
        ({"labels": np.zeros(N + 1, int)}, f"{N} of embeddings for {N + 1} labels"),
        ({"probabilities": np.ones((N - 1, C))}, f"{N - 1} of probabilities for {N} labels"),
        ({"probabilities": np.full((N, C), np.nan)}, "probabilities in the evidence hold NaN"),
        ({"labels": np.full(N, -1)}, f"labels in the evidence are no classes: give whole numbers from 0, below {C}"),
        ({"labels": np.full(N, C)}, f"give whole numbers from 0, below {C}"),
        ({"labels": np.zeros(N)}, "labels in the evidence are no classes"),
        ({"labels": np.full(N, "cat")}, "labels in the evidence are no classes"),
        ({"reference": Evidence(labels=[0])}, "the reference set's embeddings, which the evidence lacks"),
    ],
)
def test_evidence_that_does_not_do_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        chosen("static_glister", replace(evidence(), **change))


def test_evidence_may_be_tensors():
    seen = evidence()
    as_tensors = Evidence(
        labels=torch.from_numpy(seen.labels), probabilities=torch.from_numpy(seen.probabilities).requires_grad_()
    )
    assert chosen("static_margin", as_tensors) == chosen("static_margin", seen)
    halved = torch.from_numpy(seen.probabilities).bfloat16()
    assert Evidence(labels=seen.labels, probabilities=halved).probabilities.dtype == np.float32


def test_a_log_of_the_warm_up_takes_tensors_and_its_own_number_of_samples():
    log, other = WarmUpLog(3), WarmUpLog(3)
    log.observe(np.array([1.0, 2, 3]), np.array([True, False, True]))
    other.observe(torch.tensor([1.0, 2, 3], dtype=torch.float64, requires_grad=True), torch.tensor([1, 0, 1]))
    assert log.losses.tolist() == other.losses.tolist()
    assert log.forgotten.tolist() == other.forgotten.tolist()
    with pytest.raises(ValueError, match=r"losses have shape \(2,\), correct \(3,\); both must be \(3,\)"):
        log.observe(np.ones(2), np.ones(3, bool))
    with pytest.raises(ValueError, match="correct has values other than 0 and 1; it says of each sample whether"):
        log.observe(np.ones(3), np.array([0.9, 0.2, 0.7]))
    assert log.epochs == 1
    with pytest.raises(ValueError, match="the state is of 3 samples, this log of 4"):
        WarmUpLog(4).load_state_dict(log.state_dict())


# A run


@pytest.mark.parametrize("name", STATIC)
def test_a_run_in_two_phases_says_what_it_did(tmp_path, name):
    assert launch(tmp_path, f"pruner={name}", "pruner.warmup=2", "pruner.fraction=0.3", base=SHORT) == 0
    folder = only_run(tmp_path)
    rows, summary = rows_of(folder), summary_of(folder)
    samples = samples_of(folder)
    n, k = len(samples), int(0.3 * len(samples))
    assert [row["phase"] for row in rows] == ["warmup"] * 2 + ["train"] * 3
    assert [row["epoch"] for row in rows] == list(range(5))
    assert [row["kept_fraction"] for row in rows] == [1.0] * 2 + [k / n] * 3
    assert samples["times_selected"].value_counts().to_dict() == {2: n - k, 5: k}
    kept = samples[samples["times_selected"] == 5]
    assert summary["kept_noise_mean"] == pytest.approx((kept["label"] != kept["clean_label"]).mean())
    assert summary["saved"] == pytest.approx(1 - (2 * n + 3 * k) / (3 * n))
    assert (summary["epochs"], summary["warmup_epochs"], summary["score"]) == (3, 2, None)
    assert summary["test_accuracy_best"] == max(row["test_accuracy"] for row in rows[2:])
    assert summary["seconds_total"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert summary["seconds_warmup"] == pytest.approx(sum(row["seconds"] for row in rows[:2]))
    assert 0 < summary["seconds_select"] < rows[2]["seconds_select"] < rows[2]["seconds"]
    assert all(sum(row[key] for key in row if key.startswith("seconds_")) <= row["seconds"] for row in rows)
    if name == "static_prune4rel":
        assert summary["choice_neighbours_cut"] == 0
    assert environment_of(folder)["epochs"] == 5


def test_a_choice_of_everything_without_a_warm_up_is_full_training(tmp_path):
    assert launch(tmp_path / "full", "pruner=full", base=SHORT) == 0
    assert launch(tmp_path / "all", "pruner=static_random", "pruner.fraction=1", base=SHORT) == 0
    full, everything = (metrics_of(only_run(tmp_path / name)) for name in ("full", "all"))
    assert [row | {"phase": None} for row in everything] == full


class Seen:
    """Stands in for Criterion.choose: notes what a run shows it, and may stop the run there."""

    def __init__(self, monkeypatch, stops=False):
        choose = Criterion.choose
        self.evidence = []

        def noted(criterion, shown, rng):
            self.evidence.append(shown)
            if stops:
                signal.raise_signal(signal.SIGTERM)
            return choose(criterion, shown, rng)

        monkeypatch.setattr(Criterion, "choose", noted)


def test_training_begins_from_the_initialisation_and_schedule_of_any_other_run(tmp_path, monkeypatch):
    stop = Stop()
    Seen(monkeypatch, stops=True)
    config = config_of(tmp_path, "pruner=static_el2n", "pruner.warmup=2", "pruner.fraction=1", base=SHORT)
    assert stop.run(config)
    state = checkpoint_of(only_run(tmp_path))
    assert (state["epoch"], state["step"]) == (2, 0)
    fresh = Run(config_of(tmp_path, "pruner=full", base=SHORT)).loop.network.learner.state_dict()
    assert all(torch.equal(state["model"][key], fresh[key]) for key in fresh)
    assert not any(buffer.any() for held in state["optimizer"]["state"].values() for buffer in held.values())
    assert not stop.run(config)
    assert launch(tmp_path / "full", "pruner=full", base=SHORT) == 0
    rates = [row["lr"] for row in metrics_of(only_run(tmp_path / "full"))]
    assert [row["lr"] for row in metrics_of(only_run(tmp_path))[2:]] == rates


def test_the_evidence_is_that_of_the_network_at_the_end_of_the_warm_up(tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    one = Run(config_of(tmp_path, "pruner=static_glister", "pruner.warmup=2", base=SHORT))
    data, warm = one.setup.task.data, one.loop
    folder = trained(one)
    (found,) = seen.evidence
    network = warm.network.learner.networks[0].eval()
    assert network is not one.loop.network.learner.networks[0]
    mean, std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (data.mean, data.std))
    for part, split in ((found, data.train), (found.reference, data.reference)):
        with torch.no_grad():
            x = (split.images.float() / 255 - mean) / std
            np.testing.assert_allclose(part.probabilities, network(x).softmax(1), atol=1e-4)
            np.testing.assert_allclose(part.embeddings, network[:-1](x), atol=1e-3)
        assert (part.labels == split.labels).all()
    losses = metrics_of(folder)[:2]
    assert found.losses.mean() == pytest.approx(np.mean([row["train_loss"] for row in losses]), rel=1e-5)


def by_hand(setup):
    """Walk the two phases of a run in a loop of one's own; return them, what was predicted, and a row an epoch."""
    config, train, trusted = setup.config, setup.task.data.train, setup.task.data.reference
    log, predicted, rows = WarmUpLog(setup.n), np.full(setup.n, -1), []

    def seen(network, labels, batches):
        with torch.no_grad():
            hidden = torch.cat([network.eval()[:-1](x) for _, x, _ in batches.evaluation()])
            logits = network[-1](hidden)
        loss = F.cross_entropy(logits, torch.from_numpy(labels)).item()
        return loss, Evidence(labels=labels, probabilities=logits.softmax(1), embeddings=hidden)

    def walked(pruning, network):
        optimizer = OPTIMIZER.make(config.optimizer, network.parameters())
        for epoch in range(pruning.first, pruning.epochs):
            order, total = pruning.order(), 0.0
            steps = math.ceil(len(order) / config.batch_size)
            network.train()
            for step, (index, x, y) in enumerate(setup.task.train.epoch(order, epoch)):
                progress = (epoch - pruning.first + step / steps) / (pruning.epochs - pruning.first)
                rate = optim.set_progress(optimizer, progress, config.optimizer)
                logits = network(x)
                losses = F.cross_entropy(logits, y, reduction="none")
                loss = pruning.update(index, losses)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                predicted[index] = logits.argmax(1)
                total += losses.detach().sum().item()
            reference_loss, _ = seen(network, trusted.labels, setup.task.reference)
            pruning.end_epoch(reference_loss)
            log.observe(pruning.trajectories.last_N.numpy(), predicted == train.labels)
            rows.append({"train_loss": total / len(order), "reference_loss": reference_loss, "lr": rate})
        return pruning

    given = {"window": config.score.window, "seed": config.seed}
    network = Network(setup, "warm-up model").learner.networks[0]
    warm = walked(DynamicPruning(train, setup.before, pruner="full", **given), network)
    _, evidence = seen(network, train.labels, setup.task.train)
    _, reference = seen(network, trusted.labels, setup.task.reference)
    evidence = replace(evidence, losses=log.losses, forgotten=log.forgotten, reference=reference)
    choice = setup.plan.choose(evidence, generator(config.seed, "choose"))
    pruning = DynamicPruning(train, config.epochs, Fixed(indices=choice.indices), bank=warm.trajectories, **given)
    return warm, walked(pruning, Network(setup, "model").learner.networks[0]), predicted, rows


@pytest.mark.parametrize("name", ["static_forgetting", "static_glister"])
def test_a_run_is_the_two_phases_that_a_loop_of_ones_own_walks(tmp_path, name):
    line = (f"pruner={name}", "pruner.warmup=2", "pruner.fraction=0.3", "batch_size=40")
    one = Run(config_of(tmp_path, *line, base=SHORT))
    folder = trained(one)
    warm, pruning, predicted, rows = by_hand(one.setup)
    for row, expected in zip(metrics_of(folder), rows, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    samples = samples_of(folder)
    assert samples["predicted"].tolist() == predicted.tolist()
    assert samples["times_selected"].tolist() == (warm.times_selected + pruning.times_selected).tolist()
    for score in ("loss", "small_loss", "settled"):
        np.testing.assert_array_equal(samples[f"score_{score}"], pruning.scores(score))


def test_stopped_when_it_has_chosen_a_run_does_not_choose_again(tmp_path, monkeypatch):
    line = ("pruner=static_forgetting", "pruner.warmup=2", "batch_size=50")
    whole = trained(Run(config_of(tmp_path / "whole", *line, base=SHORT)))
    seen = Seen(monkeypatch, stops=True)
    config = config_of(tmp_path, *line, base=SHORT)
    assert Stop().run(config)
    assert not Stop().run(config)
    assert len(seen.evidence) == 1
    assert_same_results(only_run(tmp_path), whole)


@pytest.mark.parametrize("reference", ["none", "pseudo", "population"])
def test_glister_without_trusted_labels_is_refused(refused, tmp_path, reference):
    line = [word for word in SHORT if not word.startswith("reference.")]
    line += ["reference.warmup=1"] if reference == "pseudo" else []
    sentence = refused("pruner=static_glister", f"reference={reference}", *line, f"paths.results={tmp_path}")
    assert "set reference=trusted" in sentence


class Even(Criterion):
    """Chooses every other sample."""

    def pick(self, seen, rng):
        return Choice(np.arange(0, len(seen.labels), 2), {"half": 0.5})


def test_a_criterion_of_ones_own_needs_a_class_and_no_more(tmp_path):
    even = {"name": f"{Even.__module__}.Even", "warmup": 1, "fraction": 0.5}
    folder = trained(Run(validate(config_of(tmp_path, base=SHORT).model_dump() | {"pruner": even})))
    times = samples_of(folder)["times_selected"].to_numpy()
    assert (times == np.where(np.arange(len(times)) % 2, 1, 4)).all()
    assert summary_of(folder)["choice_half"] == 0.5


def test_a_window_longer_than_the_run_does_not_matter():
    make_pruning(config_of("/nowhere", "pruner=static_el2n", "score=das", "epochs=1"), range(100))


# Strong augmentation


def test_strong_augmentation_is_a_function_of_seed_epoch_and_sample_alone():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 9, 8, 3), np.uint8))
    sample = torch.arange(6) + 3
    before = torch.random.get_rng_state()
    once = rand_augment(images, sample, seed=1, epoch=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert once.shape == images.shape
    assert once.dtype == torch.uint8
    backwards = rand_augment(images.flip(0), sample.flip(0), seed=1, epoch=2).flip(0)
    assert torch.equal(once, backwards)
    assert torch.equal(once[2:3], rand_augment(images[2:3], sample[2:3], seed=1, epoch=2))
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not torch.equal(once, rand_augment(images, sample, **other))
    assert not torch.equal(once, images)


# The dynamic ones


@given(st.integers(1, 40), st.integers(5, 100), st.integers(0, 3))
def test_rs2_takes_successive_slices_of_a_permutation(n, percent, seed):
    pruning = DynamicPruning(range(n), epochs=30, pruner="rs2", score="loss", budget=percent / 100, seed=seed)
    size = max(1, n * percent // 100)
    rounds = -(-n // size)
    epochs = []
    for _ in range(30):
        epochs.append(set(pruning.selection.indices.tolist()))
        pruning.update(torch.from_numpy(pruning.order()), torch.ones(size))
        pruning.end_epoch()
    for start in range(0, 30 - rounds + 1, rounds):
        of_round = epochs[start : start + rounds]
        assert set().union(*of_round) == set(range(n))
        assert len(set().union(*of_round[: n // size])) == size * (n // size)  # none twice, but by the last slice
    assert all(len(chosen_ones) == size for chosen_ones in epochs)


@pytest.mark.parametrize(("name", "c"), [("ucb", 1.0), ("ucb", 0.0), ("epsilon_greedy", 0.0)])
def test_averages_follow_their_recursion_over_the_epochs_that_saw_a_sample(name, c):
    losses = torch.from_numpy(np.random.default_rng(0).exponential(size=(8, N)).astype(np.float32))
    settings = {"c": c} if name == "ucb" else {"epsilon": 0.2}
    pruning = DynamicPruning(range(N), epochs=8, pruner=name, score="loss", alpha=0.7, ratio=0.5, **settings)
    mean, variance = {}, {}
    for epoch in range(8):
        order = pruning.order().tolist()
        if epoch:
            rank = {i: mean[i] + c * variance[i] for i in range(N)}
            top = sorted(rank, key=rank.get)[::-1][: 30 if name == "ucb" else 24]
            assert set(top) <= set(order)
            assert len(order) == 30
            np.testing.assert_allclose(pruning.ranking, [rank[i] for i in range(N)], rtol=1e-4)
        else:
            assert len(order) == N
        pruning.update(torch.tensor(order), losses[epoch][order])
        for i in order:
            loss = float(losses[epoch][i])
            if epoch == 0:
                mean[i], variance[i] = loss, 0.0
            else:
                variance[i] = 0.3 * variance[i] + 0.7 * (loss - mean[i]) ** 2
                mean[i] = 0.3 * mean[i] + 0.7 * loss
        pruning.end_epoch()


def test_averages_begin_anew_when_the_score_that_ranks_changes():
    pruning = DynamicPruning(range(N), epochs=12, pruner="epsilon_greedy", score="das", window=4, ratio=0.5)
    for epoch in range(6):
        index = torch.from_numpy(pruning.order())
        pruning.update(index, 5 + torch.rand(len(index)))
        pruning.end_epoch(1.0 / (epoch + 1))
        assert (pruning.ranking.min() > 2) == (epoch + 1 < 4)  # the loss is above 5, a correlation at most 1
        if epoch + 1 == 4:
            np.testing.assert_array_equal(pruning.ranking, pruning.scores("das"))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("ucb", {"c": -1}), ("epsilon_greedy", {"epsilon": 1.5}), ("ucb", {"alpha": 0}), ("ucb", {"warmup": -1})],
)
def test_settings_of_the_averaging_rules_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError, match="is out of range"):
        PRUNERS[name](**settings)


def test_unknown_settings_are_a_usage_error_with_the_known_ones():
    with pytest.raises(UsageError, match="balanced"):
        config_of("/nowhere", "pruner=static_el2n", "+pruner.balance=true")
