"""Diagnostics against scikit-learn and brute force."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from alignprune_exp.diagnostics import detection_auroc, dynamics, kept_noise
from alignprune_exp.pruning import Selection


def _selection(indices, weights):
    return Selection(np.asarray(indices, np.int64), np.asarray(weights, np.float32))


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 1.5, 2.0, -3.0, float("nan"), 1e30]), st.booleans()),
        min_size=1,
        max_size=40,
    )
)
def test_auroc_is_scikit_learns_with_ties_and_without_unscored_samples(samples):
    scores = np.array([score for score, _ in samples], np.float32)
    noisy = np.array([is_noisy for _, is_noisy in samples])
    scored = ~np.isnan(scores)
    found = detection_auroc(scores, noisy)
    if len(set(noisy[scored])) < 2:
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(noisy[scored], -scores[scored]))
        clean, wrong = scores[scored & ~noisy], scores[scored & noisy]
        above = (clean[:, None] > wrong).sum() + (clean[:, None] == wrong).sum() / 2
        assert found == above / (len(clean) * len(wrong))


def test_auroc_of_many_continuous_scores_is_scikit_learns():
    rng = np.random.default_rng(0)
    noisy = rng.random(5000) < 0.3
    scores = (rng.normal(size=5000) - noisy).astype(np.float32)
    assert detection_auroc(scores, noisy) == pytest.approx(roc_auc_score(noisy, -scores))
    assert detection_auroc(scores, noisy) > 0.5


def test_auroc_is_one_for_the_oracle_half_for_constants_and_zero_for_its_opposite():
    noisy = np.array([True, False, False, True])
    clean = (~noisy).astype(np.float32)
    assert [detection_auroc(s, noisy) for s in (clean, np.ones(4, np.float32), -clean)] == [1.0, 0.5, 0.0]


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([1.0, 2.0, 0.5])), min_size=1, max_size=20), st.data())
def test_kept_noise_counts_and_weighs_the_noisy_ones(samples, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, len(samples) - 1), min_size=1)))
    noisy = np.array([is_noisy for is_noisy, _ in samples])
    plain, weighted = kept_noise(_selection(chosen, [samples[i][1] for i in chosen]), noisy)
    assert plain == pytest.approx(sum(samples[i][0] for i in chosen) / len(chosen))
    assert weighted == pytest.approx(
        sum(samples[i][1] for i in chosen if samples[i][0]) / sum(samples[i][1] for i in chosen)
    )


def test_kept_noise_is_unknown_where_clean_labels_are():
    assert kept_noise(_selection([0], [1]), None) == (None, None)


def _rows(noisy_known=True, n=200, classes=4):
    rng = np.random.default_rng(1)
    noisy = rng.random(n) < 0.4
    losses = rng.exponential(1.0, n).astype(np.float32)
    losses[:5] = np.nan
    scores = {
        "loss": losses,
        "small_loss": -losses,
        "settled": -losses,
        "das": rng.uniform(-1, 1, n).astype(np.float32),
        "oracle": (~noisy).astype(np.float32),
    }
    labels = rng.integers(0, classes - 1, n)  # the last class has no sample
    chosen = np.sort(rng.choice(n, 120, replace=False))
    reference = rng.exponential(1.0, 8)
    selection = _selection(chosen, np.ones(120))
    rows = dynamics(7, losses, reference, scores, noisy if noisy_known else None, labels, selection, (0, 4 * classes))
    return rows, noisy, losses, scores, labels, chosen, reference


@pytest.mark.parametrize("noisy_known", [True, False])
def test_histogram_counts_sum_to_the_scored_samples_of_each_group(noisy_known):
    rows, noisy, _, scores, *_ = _rows(noisy_known)
    sums = defaultdict(float)
    for row in rows:
        if row["kind"] == "histogram":
            sums[row["name"], row["group"]] += row["value"]
    everyone = np.ones(len(noisy), bool)
    groups = {"clean": ~noisy, "noisy": noisy} if noisy_known else {"all": everyone}
    assert sums == {
        (name, group): np.count_nonzero(mask & ~np.isnan(score))
        for name, score in scores.items()
        for group, mask in groups.items()
    }


def test_histogram_bins_hold_what_lies_around_their_centres():
    rows, noisy, _, scores, *_ = _rows()
    wanted = ("histogram", "das", "noisy")
    bins = [(r["x"], r["value"]) for r in rows if (r["kind"], r["name"], r["group"]) == wanted]
    centres = np.array([x for x, _ in bins])
    nearest = np.abs(scores["das"][noisy][:, None] - centres).argmin(1)
    assert np.array_equal(np.bincount(nearest, minlength=len(bins)), [count for _, count in bins])


def test_loss_quantiles_are_those_of_clean_noisy_and_reference():
    rows, noisy, losses, *_, reference = _rows()
    seen = ~np.isnan(losses)
    groups = {"clean": losses[~noisy & seen], "noisy": losses[noisy & seen], "reference": reference}
    found = [row for row in rows if row["kind"] == "loss_quantile"]
    assert {row["group"] for row in found} == set(groups)
    for row in found:
        assert row["value"] == pytest.approx(np.quantile(groups[row["group"]], row["x"]), rel=1e-5)


def test_kept_fraction_is_by_class_and_leaves_absent_classes_out():
    rows, *_, labels, chosen, _ = _rows()
    found = {row["x"]: row["value"] for row in rows if row["kind"] == "kept_fraction"}
    assert found == {
        float(c): pytest.approx(np.isin(np.flatnonzero(labels == c), chosen).mean()) for c in np.unique(labels)
    }


def test_rows_share_their_columns_and_are_finite():
    rows = _rows()[0]
    assert {frozenset(row) for row in rows} == {frozenset(("epoch", "kind", "name", "group", "x", "value"))}
    assert {row["epoch"] for row in rows} == {7}
    assert np.isfinite([row["value"] for row in rows]).all()


def test_a_group_without_samples_has_no_quantiles_and_no_nan():
    losses = np.array([0.5, 1.0], np.float32)
    rows = dynamics(
        0,
        losses,
        np.empty(0),
        {"loss": losses},
        np.zeros(2, bool),
        np.array([0, 1]),
        _selection([0, 1], [1, 1]),
        (0, 8),
    )
    assert {row["group"] for row in rows if row["kind"] == "loss_quantile"} == {"clean"}
    assert np.isfinite([row["value"] for row in rows]).all()
