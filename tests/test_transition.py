"""Of which classes samples are that bear a label, and what ranks and estimates by it."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit, softmax
from sklearn.metrics import roc_auc_score

from alignprune_exp.pruning import SCORES, DynamicPruning
from alignprune_exp.pruning import transition as module
from alignprune_exp.pruning.readout import WEAK, readout
from alignprune_exp.pruning.transition import mixed, transition
from alignprune_exp.run import Run
from harness import SMALL, config_of, same_bits_when_stopped
from test_readout import by_refitting


def counted(foretold, labels, least):
    """κ by counting, a pair of classes and a tail at a time."""
    classes = foretold.shape[1]
    ratio, error = np.zeros((2, classes, classes))
    for j, c in itertools.permutations(range(classes), 2):
        apart = foretold[:, c] - foretold[:, j]
        of_c, of_j = np.sort(apart[labels == c])[::-1], apart[labels == j]
        found = []
        for tail in (0.1, 0.2, 0.5):
            beyond = max(1, math.floor(tail * len(of_c)))
            met = (of_j > of_c[beyond]).sum() if beyond < len(of_c) else len(of_j)
            scale = len(of_c) / beyond / len(of_j)
            found.append((scale * met, scale * math.sqrt((met + 1) * (1 + met / beyond))))
        ratio[j, c], error[j, c] = min(found, key=sum)
    kappa, chance = np.eye(classes), math.sqrt(2 * math.log(classes * (classes - 1)))
    for j, c in itertools.permutations(range(classes), 2):
        one_way = ratio[j, c] - ratio[c, j] > chance * math.hypot(error[j, c], error[c, j])
        sure = ratio[j, c] if one_way else ratio[j, c] - chance * error[j, c]
        kappa[j, c] = min(1, sure) if sure > 2 * least else least
    return kappa


@st.composite
def foretold(draw):
    n, classes = draw(st.integers(40, 400)), draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    labels = rng.integers(0, classes, n)
    labels[:classes] = range(classes)
    right = np.where(rng.random(n) < draw(st.sampled_from([0.0, 0.3, 0.5])), 0, labels)
    return (np.eye(classes)[right] + draw(st.floats(0.05, 2)) * rng.standard_normal((n, classes))), labels


@settings(deadline=None)
@given(foretold(), st.floats(0, 0.3))
def test_what_is_mixed_is_what_counting_finds(pair, least):
    values, labels = pair
    found = mixed(torch.from_numpy(values), torch.from_numpy(labels), least).fill_diagonal_(1)
    np.testing.assert_allclose(found, counted(values, labels, least), rtol=1e-9, atol=1e-12)


def bayes(foretold, labels, rate):
    """The odds of each label, the classes' probabilities and the noise rate, a sample at a time, as documented."""
    classes = foretold.shape[1]
    kappa = counted(foretold, labels, rate / (classes - 1) / (1 - rate))
    of_class = kappa / kappa.sum(1, keepdims=True)
    label_share = np.bincount(labels) / len(labels)

    def bears_by(of_class):
        joint = of_class * label_share[:, None]
        return (joint / joint.sum(0)).T

    symmetric = np.where(np.eye(classes), 1 - rate, rate / (classes - 1))
    tried = []
    for quarters, half in itertools.product(range(4, -1, -1), range(-4, 21)):
        likely = bears_by((quarters * of_class + (4 - quarters) * symmetric) / 4)
        g = softmax(2 ** (half / 2) * foretold @ np.linalg.inv(likely), axis=1)
        tried.append(g * likely[:, labels].T)
    joint = max(tried, key=lambda each: np.log(each.sum(1)).sum())
    probabilities = joint / joint.sum(1, keepdims=True)
    right = probabilities[np.arange(len(labels)), labels]
    return logit(right), probabilities, 1 - right.mean()


def clusters(n, classes, spread, seed):
    rng = np.random.default_rng(seed)
    right = rng.integers(0, classes, n)
    return np.eye(classes)[right] + spread * rng.standard_normal((n, classes)), right, rng


def asymmetric(right, pairs, rate, rng):
    labels = right.copy()
    for of, to in pairs:
        labels[(right == of) & (rng.random(len(right)) < rate)] = to
    return labels


def symmetrical(right, classes, share, rng):
    wrong = rng.random(len(right)) < share
    return np.where(wrong, (right + rng.integers(1, classes, len(right))) % classes, right)


def weak():
    """Features that hardly tell classes, so that chance mixes some more than symmetric noise does."""
    x, right, rng = clusters(300, 6, 1.5, 0)
    return x, symmetrical(right, 6, 0.5, rng)


def strong(rate, seed):
    x, right, rng = clusters(300, 3, 0.4, seed)
    return x, asymmetric(right, [(0, 1)], rate, rng)


@pytest.mark.parametrize(
    ("x", "labels"), [strong(0.0, 0), strong(0.4, 1), weak()], ids=["clean", "asymmetric", "symmetric"]
)
def test_the_odds_are_those_of_bayes(x, labels):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_readout.RIDGE", WEAK)
        expected = by_refitting(x, labels)
    found = transition(torch.from_numpy(x), torch.from_numpy(labels))
    symmetric = max(1 / 300, readout(torch.from_numpy(x), torch.from_numpy(labels), WEAK).noise_rate)
    odds, probabilities, noise_rate = bayes(expected, labels, symmetric)
    np.testing.assert_allclose(found.margins, odds, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.classes, probabilities, atol=1e-4)
    assert found.noise_rate == pytest.approx(noise_rate, abs=1e-4)


@given(st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_rows_at_a_time_order_unit_and_the_names_of_classes_make_no_difference(seed):
    x, right, rng = clusters(400, 3, 0.4, seed)
    labels = asymmetric(right, [(0, 1)], 0.4, rng)
    expected, order = transition(torch.from_numpy(x), torch.from_numpy(labels)), torch.from_numpy(rng.permutation(400))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", 7)
        found = transition(4 * torch.from_numpy(x)[order], 5 * torch.from_numpy(labels)[order])
    torch.testing.assert_close(found.margins, expected.margins[order], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.classes[:, ::5], expected.classes[order], rtol=1e-3, atol=1e-3)
    assert found.classes.sum(1).sub(1).abs().max() < 1e-5  # so that a class that no label is of has none
    assert found.noise_rate == pytest.approx(expected.noise_rate, abs=1e-6)


def test_samples_whose_labels_come_in_turn_are_sharpened_as_in_any_order():
    labels = np.arange(50_000) % 5
    rng = np.random.default_rng(0)
    right = np.where((labels == 1) & (rng.random(50_000) < 0.4), 0, labels)
    x, order = np.eye(5)[right] + 0.8 * rng.standard_normal((50_000, 5)), rng.permutation(50_000)
    in_turn, shuffled = (
        transition(torch.from_numpy(x[rows]), torch.from_numpy(labels[rows])).classes for rows in (slice(None), order)
    )
    torch.testing.assert_close(in_turn[order], shuffled, rtol=1e-3, atol=1e-3)


PAIRS = [(0, 1), (2, 3), (3, 2), (4, 0)]


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
def test_classes_that_are_taken_for_others_are_seen_without_trusted_labels(rate):
    x, right, rng = clusters(10_000, 6, 0.5, 0)
    labels = asymmetric(right, PAIRS, rate, rng)
    wrong = labels != right
    told, symmetric = (each(torch.from_numpy(x), torch.from_numpy(labels), WEAK) for each in (transition, readout))
    assert 0.5 * wrong.mean() <= told.noise_rate <= 1.1 * wrong.mean() + 0.02
    if rate:
        assert symmetric.noise_rate < 0.5 * told.noise_rate
        by_odds, by_margin = (roc_auc_score(wrong, -each.margins) for each in (told, symmetric))
        assert by_odds > by_margin + 0.02
        assert by_odds > 0.9


@pytest.mark.parametrize(("asymmetry", "other"), [(0.4, 0), (0.0, 1)])
def test_a_matrix_counts_as_far_as_it_makes_labels_likelier(asymmetry, other):
    x, right, rng = clusters(4000, 40, 0.5 if asymmetry else 1.0, 0)
    labels = asymmetric(right, PAIRS, asymmetry, rng) if asymmetry else symmetrical(right, 40, 0.5, rng)

    def surprise():
        classes_NC = transition(torch.from_numpy(x), torch.from_numpy(labels)).classes
        return -classes_NC[torch.arange(len(x)), torch.from_numpy(right)].log().mean()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignprune_exp.pruning.transition.FOUND", (other,))
        alone = surprise()
    assert surprise() < alone - 0.03


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_where_wrong_labels_are_of_any_class_it_tells_what_a_readout_tells(share):
    x, right, rng = clusters(10_000, 6, 0.5, 0)
    labels = symmetrical(right, 6, share, rng)
    wrong = labels != right
    told, symmetric = (each(torch.from_numpy(x), torch.from_numpy(labels), WEAK) for each in (transition, readout))
    assert told.noise_rate == pytest.approx(symmetric.noise_rate, abs=0.03)
    by_odds, by_margin = (roc_auc_score(wrong, -each.margins) for each in (told, symmetric))
    assert by_odds > by_margin - 0.01


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("spread", [0.3, 0.5])
def test_probabilities_of_classes_say_how_often_each_is_right(share, spread):
    x, right, rng = clusters(10_000, 6, spread, 0)
    labels = symmetrical(right, 6, share, rng)
    classes = transition(torch.from_numpy(x), torch.from_numpy(labels), WEAK).classes.numpy()
    sure, said = classes.max(1), classes.argmax(1)
    assert (said == right).mean() > (labels == right).mean() - 0.02
    for low, high in itertools.pairwise([0, 0.5, 0.7, 0.9, 1.01]):
        within = (low <= sure) & (sure < high)
        if within.sum() > 300:
            assert (said == right)[within].mean() == pytest.approx(sure[within].mean(), abs=0.1)


def test_labels_that_say_nothing_a_class_of_one_and_features_that_say_all_have_finite_odds():
    rng = np.random.default_rng(0)
    sure, _, _ = clusters(500, 3, 0.0, 0)
    labels = sure.argmax(1)
    labels[7] = (labels[7] + 1) % 3
    told = transition(torch.from_numpy(sure), torch.from_numpy(labels))
    assert told.margins.isfinite().all()
    assert told.margins.argmin() == 7
    x, labels = torch.from_numpy(rng.standard_normal((500, 4))), torch.from_numpy(rng.integers(0, 2, 500))
    assert transition(x, labels).margins.isfinite().all()
    labels[7] = 2
    told = transition(x, labels)
    assert told.margins.isfinite().all()
    assert 0 <= told.noise_rate <= 2 / 3


# ---- the score --------------------------------------------------------------------------------------------


def told_of(score, told, n, **more):
    pruning = DynamicPruning(range(n), 8, "topk", score, labels=np.arange(n) % 2, ratio=0.5, warmup=0, **more)
    pruning.tell(told)
    return pruning


@given(st.integers(8, 30), st.integers(0, 99))
def test_odds_rank_alone_at_first_and_losses_gain_on_them(n, seed):
    rng = np.random.default_rng(seed)
    odds, seen = rng.normal(size=n).astype(np.float32), np.zeros(n)
    pruning = told_of("transition", odds, n, seed=seed)
    for _ in range(8):
        losses = np.nan_to_num(pruning.scores("cleaning"))
        np.testing.assert_allclose(pruning.ranking, min(1, seen.mean() / 4) * losses + odds, rtol=1e-4, atol=1e-5)
        index = torch.from_numpy(pruning.order())
        seen[index] += 1
        pruning.update(index, torch.from_numpy(rng.exponential(size=len(index)).astype(np.float32)))
        pruning.end_epoch()


def test_what_the_other_of_the_two_returns_is_refused():
    x, labels = torch.from_numpy(clusters(40, 2, 0.3, 0)[0]), torch.arange(40) % 2
    for score, right, other in (("transition", transition, readout), ("features", readout, transition)):
        told_of(score, right(x, labels), 40)
        with pytest.raises(
            ValueError, match=rf"goes by what {right.__name__}\(\) returns, and this is of {other.__name__}"
        ):
            told_of(score, other(x, labels), 40)


@pytest.mark.parametrize(
    "foretells", [True, False, readout, partial(readout, ridge=1.0)], ids=["True", "False", "function", "partial"]
)
def test_what_foretells_is_the_function_that_a_score_is_told_by(foretells):
    score = type("Mine", (SCORES["cleaning"],), {"foretells": foretells})()
    with pytest.raises(
        ValueError, match=r"^Mine.foretells is no staticmethod; set it to staticmethod\(readout\) or st"
    ):
        DynamicPruning(range(40), 8, "topk", score, labels=np.arange(40) % 2)


@pytest.mark.parametrize("trusted", [0.1, 0.55])  # losses by which hardly a label is wrong, or many are
def test_of_the_rate_that_comes_with_odds_and_that_of_trusted_losses_the_larger_counts(trusted):
    x, labels = torch.from_numpy(clusters(200, 2, 0.3, 0)[0]), torch.arange(200) % 2
    rates = {}
    for score, tells in (("transition", transition), ("features", readout), ("settled", None)):
        pruning = DynamicPruning(range(200), 8, "sieve", score, labels=labels, warmup=4, exclude="auto")
        if tells:
            pruning.tell(told := tells(x, labels))
            assert pruning.noise_rate == told.noise_rate
        for _ in range(3):
            pruning.update(torch.from_numpy(pruning.order()), torch.full((len(pruning.order()),), 0.6))
            pruning.end_epoch(torch.full((9,), trusted))
        rates[score] = pruning.noise_rate
    assert rates["features"] == rates["settled"]
    assert rates["transition"] == max(rates["settled"], transition(x, labels).noise_rate)


# ---- on the command line ----------------------------------------------------------------------------------


LINE = ("method=sieve_transition", "noise=asym0.4")


def test_a_run_leaves_out_by_what_the_images_patches_tell(tmp_path):
    one = Run(config_of(tmp_path, *LINE, "dataset.subset=null", "reference=none", "pruner.warmup=1"))
    one.loop._foretell()
    task, pruning = one.setup.task, one.loop.pruning
    told = transition(task.features(one.setup.own), torch.from_numpy(task.data.train.labels))
    assert torch.equal(pruning.told, told.margins)
    assert pruning.noise_rate == told.noise_rate > 0.05
    assert roc_auc_score(task.data.train.wrong, -pruning.ranking) > 0.8


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path):
    same_bits_when_stopped(tmp_path, 3, *LINE, "pruner.exclude=0.3", base=SMALL)
