"""What a readout of the embeddings foretells of each label, and what ranks by it."""

import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.linear_model import Ridge

from alignprune_exp.errors import Failed
from alignprune_exp.pruning import SCORES, DynamicPruning, within_class
from alignprune_exp.pruning import readout as module
from alignprune_exp.pruning.readout import RIDGE, readout
from alignprune_exp.pruning.transition import transition
from alignprune_exp.run import Run
from harness import SMALL, config_of, rows_of, same_bits_when_stopped, summary_of, trained

LINE = ("method=sieve_readout", "noise=sym0.5", "pruner.warmup=0.25", "pruner.exclude=0.3", "score.every=3")


def by_refitting(embeddings, labels):
    """What is foretold (n, C), each by a regression that has seen all other samples, with the ridge of all of them."""
    x, n = embeddings.astype(np.float64), len(labels)
    indicators = np.eye(labels.max() + 1)[labels]
    alpha = RIDGE * np.square(x - x.mean(0)).sum(0).mean()
    foretold = np.empty(indicators.shape)
    for i in range(n):
        others = np.arange(n) != i
        foretold[i] = Ridge(alpha=alpha).fit(x[others], indicators[others]).predict(x[i : i + 1])[0]
    return foretold


def margins_of(foretold, labels):
    return np.array([row[label] - np.delete(row, label).max() for row, label in zip(foretold, labels, strict=True)])


def rate_of(foretold, labels):
    """The noise rate by the ranks of SciPy, of the classes that there are."""
    there = np.unique(labels)
    last = max(1, len(there) // 10)
    highest = np.sort(foretold, 1)
    sure = highest[:, -1] - highest[:, -2]
    ranks = rankdata(foretold[:, there], axis=1, method="min")[np.arange(len(labels)), np.searchsorted(there, labels)]
    median = np.sort(sure)[(len(sure) - 1) // 2]
    return min(1, (ranks[sure >= median] <= last).mean() * (len(there) - 1) / last)


@st.composite
def embedded(draw, least=4):
    n, d, classes = draw(st.integers(least, 25)), draw(st.integers(1, 6)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    scale, shift = 10.0 ** draw(st.integers(-3, 3)), draw(st.integers(-5, 5))
    labels = rng.integers(0, classes, n)
    labels[:2] = 0, classes - 1
    return ((rng.standard_normal((n, d)) + shift) * scale).astype(np.float32), labels


@settings(max_examples=60, deadline=None)
@given(embedded())
def test_each_label_is_foretold_by_a_regression_on_all_the_other_samples(pair):
    x, labels = pair
    found, expected = readout(torch.from_numpy(x), torch.from_numpy(labels)), by_refitting(x, labels)
    np.testing.assert_allclose(found.margins, margins_of(expected, labels), rtol=1e-4, atol=1e-4)
    gaps = np.diff(
        np.sort(np.concatenate([expected, np.sort(expected, 1)[:, -1:] - np.sort(expected, 1)[:, -2:-1]], 1))
    )
    assume(gaps.min() > 1e-4)  # no ties
    assert found.noise_rate == pytest.approx(rate_of(expected, labels))


@given(embedded(), st.integers(0, 99))
def test_rows_at_a_time_order_and_unit_make_no_difference(pair, seed):
    x, labels = map(torch.from_numpy, pair)
    expected, order = readout(x, labels).margins, torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", 3)
        torch.testing.assert_close(readout(4 * x[order], labels[order]).margins, expected[order], rtol=1e-4, atol=1e-4)


def test_a_wrong_label_among_right_ones_is_told():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 500)
    x = np.eye(5)[labels] + 0.3 * rng.standard_normal((500, 5))
    wrong = rng.random(500) < 0.4
    given_ = np.where(wrong, (labels + rng.integers(1, 5, 500)) % 5, labels)
    margins = readout(torch.from_numpy(x).float(), torch.from_numpy(given_)).margins.numpy()
    assert margins[wrong].max() < np.median(margins[~wrong])
    assert (margins[wrong] < 0).mean() > 0.95


@pytest.mark.parametrize("classes", [2, 3, 10, 30])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_how_many_labels_are_wrong_is_told_without_trusted_ones(classes, share):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 6000)
    x = np.eye(classes)[labels] + 0.5 * rng.standard_normal((6000, classes))
    wrong = rng.random(6000) < share
    given_ = np.where(wrong, (labels + rng.integers(1, classes, 6000)) % classes, labels)
    found = readout(torch.from_numpy(x).float(), torch.from_numpy(given_))
    assert found.noise_rate == pytest.approx(wrong.mean(), abs=0.05)


def test_classes_that_nobody_has_are_not_last():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 3000)
    x = torch.from_numpy(np.eye(10)[labels] + 0.5 * rng.standard_normal((3000, 10))).float()
    wrong = np.where(rng.random(3000) < 0.3, (labels + rng.integers(1, 10, 3000)) % 10, labels)
    few, many = (readout(x, torch.from_numpy(wrong * step)) for step in (1, 7))
    assert many.noise_rate == few.noise_rate == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("size", [0.0, 7.0, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_embeddings_that_are_all_the_same_but_for_rounding_foretell_nothing(size, dtype):
    same, labels = torch.full((500, 3), size, dtype=dtype), torch.arange(500) % 2
    rounded = same.clone()
    rounded[::3, 1] = torch.nextafter(rounded[::3, 1], torch.tensor(torch.inf, dtype=dtype))
    for embeddings in (same, rounded) if size else (same,):
        with pytest.raises(ValueError, match="the embeddings are the same for every sample, so that they foretell no"):
            readout(embeddings, labels)


def test_embeddings_that_differ_little_beside_their_mean_still_foretell():
    labels = torch.arange(500) % 2
    assert readout(1e4 + labels[:, None].float(), labels).noise_rate == 0
    assert readout(1e-20 * labels[:, None].float(), labels).noise_rate == 0


@pytest.mark.parametrize(
    ("x", "labels", "sentence"),
    [
        (torch.ones(3, 2), torch.zeros(3, dtype=torch.long), "needs 3 labels, one a sample, .* of two classes"),
        (torch.ones(3, 2), torch.tensor([0, 1]), "needs 3 labels, one a sample"),
        (torch.ones(3, 2), torch.tensor([0.0, 1.0, 0.0]), "needs 3 labels, .*whole numbers"),
        (torch.ones(3, 2), torch.tensor([0, -1, 1]), "needs 3 labels, .*whole numbers from 0"),
        (torch.eye(3, 2), torch.full((3,), 2), "needs 3 labels, .* of two classes"),
        (torch.eye(3, 2), ["cat", "dog", "cat"], "needs 3 labels, .*whole numbers"),
        (torch.arange(3.0), torch.tensor([0, 1, 1]), r"^the embeddings are of shape \(3,\); pass a tensor \(n, d\)"),
        (np.eye(3, 2), torch.tensor([0, 1, 1]), r"^the embeddings are ndarray; pass a tensor \(n, d\)"),
        (torch.tensor([[1.0], [torch.nan], [2.0]]), torch.tensor([0, 1, 1]), "the embeddings are not finite"),
        (torch.ones(4, 2), torch.tensor([0, 1, 0, 1]), "the embeddings are the same for every sample"),
    ],
)
@pytest.mark.parametrize("foretells", [readout, transition])
def test_what_cannot_be_read_out_is_refused(foretells, x, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        foretells(x, labels)


def test_embeddings_may_be_of_any_kind_of_numbers():
    x, labels = torch.randint(2, (60, 4), generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    for kind in (torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        assert torch.equal(readout(x.to(kind), labels).margins, readout(x.double(), labels).margins)


def test_labels_may_be_an_array_of_any_whole_numbers():
    x, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), np.arange(40) % 3
    for numbers in (labels.astype(np.int32), labels.astype(np.uint8), labels.tolist()):
        assert torch.equal(readout(x, numbers).margins, readout(x, torch.from_numpy(labels)).margins)


# ---- the score --------------------------------------------------------------------------------------------


@given(embedded(least=8), st.integers(0, 99))
def test_losses_and_readout_count_alike_once_there_is_one(pair, seed):
    labels = pair[1]
    n, rng = len(labels), np.random.default_rng(seed)
    losses, margins = rng.exponential(size=n).astype(np.float32), rng.normal(size=n).astype(np.float32)
    pruning = DynamicPruning(range(n), 8, "sieve", "readout", labels=labels, warmup=1, seed=seed)
    for epoch in range(2):
        assert pruning.due == (epoch == 1)
        if pruning.due:
            pruning.tell(margins)
        index = torch.from_numpy(pruning.order())
        pruning.update(index, torch.from_numpy(losses)[index])
        pruning.end_epoch()
        if epoch == 0:
            np.testing.assert_array_equal(pruning.ranking, pruning.scores("cleaning"))
    seen = ~np.isnan(pruning.ranking)
    assume(seen.any())
    both = pruning.scores("cleaning") + within_class(margins, labels)
    np.testing.assert_allclose(pruning.ranking[seen], both[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("every", "epochs", "due"), [(0.25, 40, [9, 19, 29]), (3, 10, [2, 5, 8]), (0.01, 3, [0, 1]), (50, 40, [])]
)
def test_a_readout_is_due_every_so_many_epochs_but_not_at_the_end(every, epochs, due):
    score = SCORES["readout"](every=every)
    assert [epoch for epoch in range(epochs) if score.due(epoch, epochs)] == due


def test_what_was_told_stays_when_its_array_is_used_again():
    pruning = DynamicPruning(range(4), 8, "sieve", "readout", labels=[0, 0, 1, 1])
    margins = np.float32([1, 2, 3, 4])
    pruning.tell(margins)
    margins[:] = 0
    assert pruning.told.tolist() == [1, 2, 3, 4]


def test_what_is_told_keeps_no_gradients():
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = np.arange(20) % 2
    pruning, other = (DynamicPruning(range(20), 8, "topk", "features", labels=labels) for _ in range(2))
    pruning.tell(readout(features, labels))
    other.tell(readout(features.detach(), labels).margins.requires_grad_())
    assert not pruning.told.requires_grad
    np.testing.assert_array_equal(pruning.ranking, other.ranking)


def test_a_readout_that_is_due_is_asked_for():
    pruning = DynamicPruning(range(4), 8, "sieve", SCORES["readout"](every=1), labels=[0, 0, 1, 1])
    pruning.update(torch.from_numpy(pruning.order()), torch.ones(len(pruning.order())))
    with pytest.raises(ValueError, match=re.escape("score='readout' goes by what you tell of every sample")):
        pruning.end_epoch()
    assert not DynamicPruning(range(4), 8, "rs2", SCORES["readout"](every=1), labels=[0, 0, 1, 1]).due


# ---- runs -------------------------------------------------------------------------------------------------


def test_a_run_reads_out_the_network_as_it_is_when_the_epoch_ends(tmp_path):
    one = Run(config_of(tmp_path, *LINE, "precision=fp32"))
    split, data = one.setup.task.data.train, one.setup.task.data
    for _ in range(3):
        assert one.loop.pruning.told.isnan().all()
        one.loop.epoch(threading.Event(), lambda: None)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (data.mean, data.std))
    with torch.no_grad():
        hidden = one.loop.network.learner.networks[0].eval()[:-1]((split.images.float() / 255 - mean) / std)
    np.testing.assert_allclose(
        one.loop.pruning.told, margins_of(by_refitting(hidden.numpy(), split.labels), split.labels), atol=1e-3
    )


def test_a_pass_for_a_readout_is_counted(undisturbed):
    folder = undisturbed(*LINE)
    n, rows = summary_of(folder)["samples"], rows_of(folder)
    assert [row["samples_refreshed"] for row in rows] == [n if epoch in (2, 5, 8) else 0 for epoch in range(len(rows))]
    assert {row["ranked_by"] for row in rows} == {None, "readout"}


def test_a_run_whose_embeddings_are_not_finite_has_failed(tmp_path):
    one = Run(config_of(tmp_path, *LINE, "score.every=1"))
    norm = next(part for part in one.loop.network.learner.modules() if isinstance(part, torch.nn.BatchNorm2d))
    norm.running_var.fill_(torch.nan)
    with pytest.raises(Failed, match="an embedding became NaN or infinite at the end of epoch 0"):
        trained(one)


def test_a_run_whose_embeddings_are_all_the_same_ends_in_a_sentence(tmp_path):
    one = Run(config_of(tmp_path, *LINE, "score.every=1"))
    for part in one.loop.network.learner.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(part.weight)
            part.requires_grad_(False)
    with pytest.raises(Failed, match=r"^run \w+ cannot go on: the embeddings are the same for every sample, .*score="):
        trained(one)


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path):
    same_bits_when_stopped(tmp_path, 3, *LINE, base=SMALL)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("score.every=2.5", "every=2.5 is out of range; use a number of epochs, or a share of them below 1"),
        ("score.every=1e6", "score.every=1000000.0 is out of range: use a value of at most 100000"),
        ("task=regression", "score=readout needs class labels, and task=regression has none; use score=settled"),
    ],
)
def test_what_cannot_be_read_out_in_a_run_is_refused(refused, line, sentence):
    assert sentence in refused("method=sieve_readout", line)
