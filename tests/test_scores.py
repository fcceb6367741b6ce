"""The bank and the scores, against SciPy and plain Python lists."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance
from sklearn.linear_model import LogisticRegression

from alignprune_exp.pruning import SCORES, Trajectories, fast, within_class
from alignprune_exp.pruning.bank import BLOCK
from alignprune_exp.pruning.logistic import likeliest, sigmoid
from alignprune_exp.pruning.scores import cosine, pearson, ranks, spearman


def faster(formula, **how):
    """The twin in `fast` of a formula."""
    return lambda losses_WB, reference_W: fast.one_pass(formula, reference_W, **how)(losses_WB)


CORRELATIONS = {
    "das": pearson,
    "das, faster": faster(pearson, centred=True),
    "spearman": spearman,
    "spearman, faster": faster(spearman, centred=True, ranks=ranks),
    "cosine": cosine,
    "cosine, faster": faster(cosine, centred=False),
}
TOLERANCE = 1e-5
HUGE = 3e38

names = pytest.mark.parametrize("name", CORRELATIONS)
of_the_bank = pytest.mark.parametrize("name", ["das", "spearman", "cosine"])


def scipy_score(name, losses, reference):
    """One sample's score in float64: SciPy over the common epochs, 0 where that is undefined."""
    name = name.split(",")[0]
    common = ~np.isnan(losses) & ~np.isnan(reference)
    v, r = np.float64(losses)[common], np.float64(reference)[common]
    if len(v) < 3:
        return 0.0
    if name == "cosine":
        return 1 - distance.cosine(v / v.max(), r / r.max()) if v.any() and r.any() else 0.0
    if len(set(v)) == 1 or len(set(r)) == 1:
        return 0.0
    return (stats.pearsonr if name == "das" else stats.spearmanr)(v, r).statistic


def check_against_scipy(name, losses_WB, reference_W):
    ours_B = CORRELATIONS[name](torch.from_numpy(losses_WB), torch.from_numpy(reference_W)).numpy()
    expected_B = [scipy_score(name, losses_WB[:, i], reference_W) for i in range(losses_WB.shape[1])]
    np.testing.assert_allclose(ours_B, expected_B, rtol=0, atol=TOLERANCE)


def filled(rows, reference, unseen="mask", window=None, dtype=torch.float32, clean=None, seed=0):
    """History of a bank that saw ``rows``, one array (N,) an epoch with NaN where a sample was not seen."""
    bank = Trajectories(len(rows[0]), window or max(3, len(rows)), unseen, dtype=dtype)
    for row, value in zip(rows, reference, strict=True):
        index = np.flatnonzero(~np.isnan(row))
        bank.record(torch.from_numpy(index), torch.from_numpy(np.float32(row[index])))
        bank.end_epoch(value)
    return replace(bank.history(), clean_N=clean, seed=seed)


@names
@pytest.mark.parametrize("window", [3, 4, 10, 31])
@pytest.mark.parametrize("share_masked", [0.0, 0.3, 0.8])
def test_correlations_equal_scipys_on_random_trajectories(name, window, share_masked):
    rng = np.random.default_rng(window)
    losses_WB = rng.gamma(1.0, 2.0, (window, 200)).astype(np.float32)
    losses_WB[rng.random(losses_WB.shape) < share_masked] = np.nan
    check_against_scipy(name, losses_WB, rng.gamma(1.0, 2.0, window).astype(np.float32))


@names
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_correlations_equal_scipys_on_tied_and_constant_trajectories(name, levels):
    rng = np.random.default_rng(levels)
    losses_WB = rng.integers(0, levels, (7, 200)).astype(np.float32) / 3
    losses_WB[rng.random(losses_WB.shape) < 0.2] = np.nan
    for reference_W in rng.integers(0, 3, (10, 7)).astype(np.float32) / 7:
        check_against_scipy(name, losses_WB, reference_W)


@names
@pytest.mark.parametrize("window", [1, 2])
def test_fewer_than_three_epochs_score_zero(name, window):
    losses_WB = np.random.default_rng(0).random((window, 20), "float32")
    assert not CORRELATIONS[name](torch.from_numpy(losses_WB), torch.arange(1.0, window + 1)).any()


@names
def test_only_common_epochs_count_and_fewer_than_three_score_zero(name):
    nan = math.nan
    losses_WB = np.float32([[1, nan, 1], [2, 5, nan], [nan, 3, 7], [4, nan, nan], [9, 2, 3]])
    reference_W = np.float32([5, nan, 3, 1, nan])
    check_against_scipy(name, losses_WB, reference_W)
    scores_B = CORRELATIONS[name](torch.from_numpy(losses_WB), torch.from_numpy(reference_W))
    assert scores_B[:2].tolist() == [0, 0]  # two and one common epochs


@given(
    st.data(),
    st.integers(3, 12),
    st.sampled_from(list(CORRELATIONS)),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e35]),
    st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_correlations_equal_scipys_at_any_magnitude(data, window, name, scale, offset):
    value = st.floats(0, 30, width=32).map(lambda x: x + offset)
    column = st.lists(st.one_of(value, st.just(math.nan)), min_size=window, max_size=window)
    losses_WB = np.float32(np.float64(data.draw(st.lists(column, min_size=1, max_size=4))) * scale).T
    reference_W = np.float32(data.draw(st.lists(value, min_size=window, max_size=window)))
    check_against_scipy(name, losses_WB, reference_W)


@names
def test_extreme_magnitudes_stay_finite_and_right(name):
    losses_WB = np.float32([[0, 1e-45, HUGE], [HUGE, 0, HUGE / 2], [1, 1e-45, HUGE / 4], [HUGE, 3e-45, 1e-45]])
    for reference_W in np.float32([[HUGE, 1, 0, 2], [3e-45, 1e-45, 0, 1e-45], [4, 3, 2, 1]]):
        check_against_scipy(name, losses_WB, reference_W)


def test_a_reference_on_a_plateau_keeps_its_float64_precision():
    rng = np.random.default_rng(0)
    rows = rng.gamma(1.0, 2.0, (10, 50)).astype(np.float32)
    reference = 2.3 + 1e-4 * rng.standard_normal(10)
    expected = [scipy_score("das", rows[:, i], reference) for i in range(50)]
    np.testing.assert_allclose(SCORES["das"]()(filled(rows, reference)), expected, atol=TOLERANCE)


integers_as_losses = st.lists(st.integers(0, 1000), min_size=4, max_size=10)


@given(integers_as_losses, st.integers(1, 16), st.integers(-1000, 1000), st.randoms(use_true_random=False))
def test_das_is_invariant_to_scaling_and_shifting_one_trajectory(losses, factor, shift, random):
    # Small integers are exact in float32, so the invariance must be too.
    v_WB = torch.tensor(losses, dtype=torch.float32)[:, None]
    r_W = torch.tensor([random.randint(0, 1000) for _ in losses], dtype=torch.float32)
    das = pearson(v_WB, r_W).item()
    assert pearson(factor * v_WB + shift, r_W).item() == pytest.approx(das, abs=1e-6)
    assert pearson(v_WB, factor * r_W + shift).item() == pytest.approx(das, abs=1e-6)
    assert pearson(shift - factor * v_WB, r_W).item() == pytest.approx(-das, abs=1e-6)


@names
def test_the_order_of_samples_and_of_epochs_does_not_matter(name):
    rng = np.random.default_rng(3)
    losses_WB = torch.from_numpy(rng.random((8, 100), "float32"))
    reference_W = torch.from_numpy(rng.random(8, "float32"))
    samples, epochs = torch.from_numpy(rng.permutation(100)), torch.from_numpy(rng.permutation(8))
    expected_B = CORRELATIONS[name](losses_WB, reference_W)
    by_sample_B = CORRELATIONS[name](losses_WB[:, samples], reference_W)
    torch.testing.assert_close(by_sample_B, expected_B[samples], rtol=0, atol=1e-6)
    by_epoch_B = CORRELATIONS[name](losses_WB[epochs], reference_W[epochs])
    torch.testing.assert_close(by_epoch_B, expected_B, rtol=0, atol=1e-6)


@of_the_bank
def test_the_ring_buffer_forgets_what_is_older_than_the_window(name):
    rng = np.random.default_rng(4)
    rows, reference = rng.random((11, 30), "float32"), rng.random(11)
    scores_N = SCORES[name]()(filled(rows, reference, window=4)).numpy()
    expected_N = [scipy_score(name, rows[-4:, i], reference[-4:]) for i in range(30)]
    np.testing.assert_allclose(scores_N, expected_N, atol=TOLERANCE)


def test_scores_of_more_samples_than_a_block_equal_scipys():
    n = 2 * BLOCK + 3
    rng = np.random.default_rng(5)
    rows, reference = rng.random((5, n), "float32"), rng.random(5)
    history = filled(rows, reference)
    expected_N = stats.pearsonr(np.float64(rows), reference[:, None], axis=0).statistic
    np.testing.assert_allclose(SCORES["das"]()(history), expected_N, atol=TOLERANCE)
    np.testing.assert_allclose(SCORES["small_loss"]()(history), -np.float64(rows).mean(0), rtol=1e-6)


@of_the_bank
def test_the_number_of_threads_changes_no_bit(name):
    rows = np.random.default_rng(6).gamma(1, 1, (4, BLOCK + 50_000)).astype("float32")
    rows[:, ::100][rows[:, ::100] < 0.5] = np.nan
    history = filled(rows, [4.0, 2.0, 3.0, 1.0], unseen="mask")
    threads = torch.get_num_threads()
    one, four = [], []
    try:
        for count, scores in ((1, one), (4, four)):
            torch.set_num_threads(count)
            scores.append(SCORES[name]()(history))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0].nan_to_num(9), four[0].nan_to_num(9))


@of_the_bank
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_bank_scores_the_rounded_losses(name, dtype):
    rng = np.random.default_rng(6)
    rows, reference = rng.gamma(1.0, 2.0, (6, 50)).astype(np.float32), rng.random(6)
    rounded = torch.from_numpy(rows).to(dtype).float().numpy()
    scores_N = SCORES[name]()(filled(rows, reference, dtype=dtype))
    expected_N = [scipy_score(name, rounded[:, i], reference) for i in range(50)]
    np.testing.assert_allclose(scores_N, expected_N, atol=TOLERANCE)


def test_the_last_loss_keeps_float32_precision_over_a_half_precision_bank():
    rows = np.random.default_rng(7).random((4, 50), "float32")
    history = filled(rows, [1.0] * 4, dtype=torch.float16)
    assert SCORES["loss"]()(history).tolist() == rows[-1].tolist()


@st.composite
def seen_patterns(draw, max_n=10, max_epochs=10):
    """Rows (N,), one an epoch, of losses; NaN where a sample was not seen; each epoch sees at least one."""
    n, epochs = draw(st.integers(1, max_n)), draw(st.integers(1, max_epochs))
    loss = st.one_of(st.floats(0, 20, width=32), st.sampled_from([0.0, 1.0, 1e-45, 7e4, HUGE]))
    rows = np.full((epochs, n), np.nan, np.float32)
    for row in rows:
        for i in draw(st.sets(st.integers(0, n - 1), min_size=1)):
            row[i] = draw(loss)
    return rows


@given(seen_patterns(), st.sampled_from(["carry", "mask"]), st.sampled_from([torch.float32, torch.float16]))
def test_a_seen_sample_never_scores_nan_and_an_unseen_one_always_does(rows, unseen, dtype):
    history = filled(rows, [2.0 - 0.1 * t for t in range(len(rows))], unseen, window=5, dtype=dtype)
    seen_N = ~np.isnan(rows).all(0)
    for name in ("loss", "das", "spearman", "cosine", "small_loss", "settled"):
        scores_N = SCORES[name]()(history)
        assert scores_N.shape == seen_N.shape
        assert scores_N.dtype == torch.float32
        assert torch.isnan(scores_N).tolist() == (~seen_N).tolist(), name


def test_a_half_precision_bank_takes_values_beyond_its_range_of_either_sign():
    rows = np.float32([[1e6, -1e6], [2.0, -2.0], [1e6, -1e6], [1.0, -1.0]])
    scores_N = SCORES["das"]()(filled(rows, [4.0, 3.0, 2.0, 1.0], dtype=torch.float16))
    assert torch.isfinite(scores_N).all()
    assert scores_N[0].item() == pytest.approx(-scores_N[1].item(), abs=TOLERANCE)


@given(seen_patterns(), st.integers(3, 5), st.sampled_from(["carry", "mask"]))
def test_loss_is_the_last_recorded_one_and_small_loss_minus_the_mean_within_the_window(rows, window, unseen):
    history = filled(rows, [1.0] * len(rows), unseen, window)
    for i in range(rows.shape[1]):
        seen = [x for x in rows[:, i].tolist() if not math.isnan(x)]
        loss, small_loss = (SCORES[name]()(history)[i].item() for name in ("loss", "small_loss"))
        if not seen:
            assert math.isnan(loss)
            assert math.isnan(small_loss)
            continue
        assert loss == seen[-1]
        trajectory = [x for x in simulate_bank(rows, unseen)[i][-window:] if x is not None] or [seen[-1]]
        mean = sum(x / len(trajectory) for x in trajectory)
        assert -small_loss == pytest.approx(mean, rel=1e-5, abs=1e-6) or mean > HUGE / 5  # a sum may overflow


@given(
    seen_patterns(),
    st.integers(3, 5),
    st.sampled_from(["carry", "mask"]),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_settled_is_minus_the_mean_of_all_losses_recorded_whatever_the_window_or_the_bank(rows, window, unseen, dtype):
    scores_N = SCORES["settled"]()(filled(rows, [1.0] * len(rows), unseen, window, dtype))
    for score, losses in zip(scores_N.tolist(), rows.T.tolist(), strict=True):
        seen = [x for x in losses if not math.isnan(x)]
        if seen:
            assert -score == pytest.approx(sum(x / len(seen) for x in seen), rel=1e-6)
        else:
            assert math.isnan(score)


def simulate_bank(rows, unseen):
    """The rule in plain Python: for each sample the list of its places, None where the place is empty."""
    places = {i: [] for i in range(len(rows[0]))}
    last = {}
    for row in rows:
        for i, x in enumerate(row.tolist()):
            if not math.isnan(x):
                last[i] = x
                places[i].append(x)
            else:
                places[i].append(last.get(i) if unseen == "carry" else None)
    return places


@settings(max_examples=200)
@given(seen_patterns(), st.integers(3, 12), st.sampled_from(["carry", "mask", "refresh"]), st.data())
@example(np.float32([[1, np.nan]] * 4), 3, "carry", None)
@example(np.float32([[np.nan, 1], [1, np.nan]] * 4), 3, "mask", None)
def test_the_bank_does_what_a_dict_of_lists_does(rows, window, unseen, data):
    n = rows.shape[1]
    bank = Trajectories(n, window, unseen)
    reference = [None if data and data.draw(st.booleans()) else 1 + t for t in range(len(rows))]
    refreshed = rows.copy()
    for t, row in enumerate(rows):
        assert bank.epoch == t
        assert bank.unseen_samples().tolist() == list(range(n))
        index = np.flatnonzero(~np.isnan(row))
        split = data.draw(st.integers(1, len(index))) if data else 1
        for part in (index[:split], index[split:]):
            if len(part):
                bank.record(torch.from_numpy(part), torch.from_numpy(row[part]))
        missing = [i for i in range(n) if i not in index]
        assert bank.unseen_samples().tolist() == missing
        if unseen == "refresh" and missing:
            with pytest.raises(ValueError, match="refresh"):
                bank.end_epoch(reference[t])
            refreshed[t, missing] = [100 * t + i for i in missing]
            bank.record(torch.tensor(missing), torch.from_numpy(refreshed[t, missing]))
            assert bank.unseen_samples().tolist() == []
        bank.end_epoch(reference[t])
        history = bank.history()
        places = simulate_bank(refreshed[: t + 1], unseen)
        expected = [[math.nan if x is None else x for x in places[i][-window:]] for i in range(n)]
        np.testing.assert_array_equal(torch.stack(history.rows).T, np.float32(expected))
        last = [[x for x in refreshed[: t + 1, i].tolist() if not math.isnan(x)] for i in range(n)]
        np.testing.assert_array_equal(history.last_N, [seen[-1] if seen else math.nan for seen in last])
        np.testing.assert_allclose(history.sum_N, [math.fsum(seen) for seen in last], rtol=1e-12)
        assert history.count_N.tolist() == [len(seen) for seen in last]
        np.testing.assert_array_equal(
            history.reference_W, [math.nan if r is None else r for r in reference[: t + 1][-window:]]
        )
        assert history.epoch == t + 1


@pytest.mark.parametrize("window", [-1, 0, 2])
def test_a_window_below_three_is_refused(window):
    with pytest.raises(ValueError, match=f"window={window}"):
        Trajectories(10, window)


def test_an_unknown_rule_for_unseen_samples_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'forget'.*carry.*mask.*refresh"):
        Trajectories(10, 3, "forget")


def test_a_refused_batch_leaves_the_finished_epochs_as_they_were():
    rng = np.random.default_rng(8)
    bank = Trajectories(4, 3)
    for row in rng.random((3, 4), "float32"):
        bank.record(torch.arange(4), torch.from_numpy(row))
        bank.end_epoch(1.0)
    before = torch.stack(bank.history().rows)
    with pytest.raises(IndexError):
        bank.record(torch.tensor([4]), torch.ones(1))
    assert torch.equal(torch.stack(bank.history().rows), before)


def test_scores_are_not_to_be_had_within_an_epoch():
    bank = Trajectories(4, 3)
    bank.record(torch.tensor([1]), torch.ones(1))
    with pytest.raises(RuntimeError, match="within an epoch"):
        bank.history()


def after(epochs, n=500, seed=0, clean=None):
    return filled(np.ones((epochs, n), np.float32), [1.0] * epochs, window=3, seed=seed, clean=clean)


def test_random_is_uniform_redrawn_each_epoch_and_addressed_by_seed_and_epoch():
    score = SCORES["random"]()
    draws = {(seed, epoch): score(after(epoch, seed=seed)) for seed in (0, 1) for epoch in (1, 2, 5)}
    for (seed, epoch), scores_N in draws.items():
        assert torch.equal(score(after(epoch, seed=seed)), scores_N)
        assert stats.kstest(scores_N, "uniform").pvalue > 1e-5  # six tests: fails a right one once in 16,000
    stacked = torch.stack(list(draws.values()))
    off_diagonal = np.corrcoef(stacked)[~np.eye(len(draws), dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.25  # 5.6 standard errors


def test_oracle_is_one_where_the_label_is_clean():
    clean = torch.tensor([True, False, True])
    assert SCORES["oracle"]()(after(1, n=3, clean=clean)).tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["oracle", "supervised"])
def test_a_score_that_knows_the_truth_says_that_it_needs_the_clean_mask(name):
    assert SCORES[name].by_truth
    with pytest.raises(ValueError, match=f"{name}.*clean=mask"):
        SCORES[name]()(after(1))


def test_what_supervision_makes_of_losses_is_what_they_tell_and_no_sample_tells_its_own_answer():
    rng = np.random.default_rng(0)
    clean, rows = rng.random(400) < 0.5, rng.normal(2, 0.5, (30, 400)).astype(np.float32)
    knowing = torch.from_numpy(clean)

    def auroc(score, losses):
        history = filled(losses, [1.0] * len(losses), clean=knowing)
        return stats.mannwhitneyu(*(SCORES[score]()(history).numpy()[kind] for kind in (clean, ~clean))).statistic / (
            clean.sum() * (~clean).sum()
        )

    assert abs(auroc("supervised", rows) - 0.5) < 0.12  # noise: 30 columns fitted to their own answers reach 0.68
    rows[3] += clean
    rows[4] -= clean  # the mean tells nothing, a difference all
    rows[5:15, rng.random(400) < 0.3] = np.nan
    assert abs(auroc("settled", rows) - 0.5) < 0.12
    assert auroc("supervised", rows) > 0.85  # a difference of 2 at a deviation of 0.7 can reach 0.92


def test_a_logistic_regression_is_scikit_learns():
    rng = np.random.default_rng(3)
    features = rng.normal(size=(6, 300))
    true = rng.random(300) < sigmoid(2 * features[0] - features[1])
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(features.T, true)
    precision = np.array([*np.ones(6), 0.0])
    ours = likeliest(np.vstack([features, np.ones(300)]), true, 0 * precision, precision)
    np.testing.assert_allclose(ours, [*theirs.coef_[0], *theirs.intercept_], atol=1e-6)
    apart = likeliest(np.vstack([features, np.ones(300)]), features[0] > 0, 0 * precision, precision)  # separable
    assert ((apart @ np.vstack([features, np.ones(300)]) > 0) == (features[0] > 0)).mean() > 0.95


def test_supervised_is_settled_where_nothing_is_wrong_and_knows_nothing_of_what_was_never_seen():
    rng = np.random.default_rng(1)
    rows, clean = rng.gamma(1.0, 2.0, (4, 60)).astype(np.float32), torch.ones(60, dtype=torch.bool)
    rows[:, 7] = np.nan
    clean[:4] = False  # fewer than there are parts
    history = filled(rows, [1.0] * 4, clean=clean)
    assert torch.equal(SCORES["supervised"]()(history).nan_to_num(9), SCORES["settled"]()(history).nan_to_num(9))
    clean[4:20] = False
    again, once = (SCORES["supervised"]()(filled(rows, [1.0] * 4, clean=clean)) for _ in range(2))
    assert once.isnan().nonzero().tolist() == [[7]]
    assert torch.equal(again.nan_to_num(9), once.nan_to_num(9))


def test_exactly_the_scores_that_compare_with_the_reference_are_aligned():
    assert {name for name, score in SCORES.items() if score.aligned} == {"das", "spearman", "cosine"}
    others = {"loss", "random", "small_loss", "settled", "cleaning", "curriculum", "oracle"}
    others |= {"readout", "features", "transition", "reducible", "irreducible", "supervised"}
    assert set(SCORES) == {"das", "spearman", "cosine"} | others
    assert all(score.name == name for name, score in SCORES.items())


@names
def test_columns_that_one_pass_cannot_settle_stand_among_those_that_it_can(name):
    rng = np.random.default_rng(9)
    losses_WB = rng.gamma(1.0, 2.0, (10, 60)).astype(np.float32)
    losses_WB[:, 0] = 0.7  # constant
    losses_WB[:, 1] = 0
    losses_WB[:, 2] += 1e5  # varies little beside its mean
    losses_WB[:, 3:6] *= np.float32([1e-20, 1e-38, 1e20])
    losses_WB[4, 6] = losses_WB[2:, 7] = np.nan
    losses_WB[:, 8] = HUGE
    losses_WB[3, 8] = 0
    for reference_W in (rng.random(10), np.where(np.arange(10) % 4, rng.random(10), np.nan), np.full(10, 0.3)):
        check_against_scipy(name, losses_WB, reference_W)
        check_against_scipy(name, losses_WB[:, 9:], reference_W)


@given(st.lists(st.tuples(st.integers(0, 3), st.one_of(st.floats(-30, 0, width=32), st.just(math.nan)))))
def test_within_its_class_a_score_is_standardised_as_scipy_does_it(samples):
    labels, scores = np.array([c for c, _ in samples], int), np.float32([x for _, x in samples])
    found = within_class(scores, labels)
    for c in range(4):
        given, values = found[labels == c], np.float64(scores[labels == c])
        expected = stats.zscore(values, nan_policy="omit") if len(set(values[~np.isnan(values)])) > 1 else 0 * values
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1e-30, 1e30, -2.3])
def test_equal_scores_of_a_class_are_none_below_the_others(value):
    scores, labels = np.full(1001, value), np.arange(1001) % 3 == 0
    assert within_class(scores, labels).tolist() == [0.0] * 1001


def test_labels_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); it must be \(4,\)"):
        within_class(np.zeros(4), np.zeros(3, int))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_places_are_checked_for_indices_of_any_width(dtype):
    bank = Trajectories(5, 3)
    values_N = torch.arange(5.0)
    assert bank.pick(values_N, bank.place(torch.tensor([4, 0], dtype=dtype))).tolist() == [4, 0]
    for wrong in ([1, 5], [-1, 2]):
        outside = next(i for i in wrong if not 0 <= i < 5)
        with pytest.raises(IndexError, match=f"sample index {outside} is out of range: there are 5 samples"):
            bank.pick(values_N, bank.place(torch.tensor(wrong, dtype=dtype)))


def test_an_index_out_of_range_is_refused_before_it_leaves_for_another_device():
    bank = Trajectories(5, 3, device="meta")
    with pytest.raises(IndexError, match="sample index 7"):
        bank.record(torch.tensor([1, 7]), torch.ones(2))
