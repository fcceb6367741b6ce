"""Which labels to look at, and how sure one may be: in a loop of one's own, and from a log that prunes nothing."""

import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from alignprune_exp.pruning import DynamicPruning, TrajectoryLog, within_class, wrong_probability

EPOCHS = 16


def noisy_digits(rate):
    """scikit-learn's digits, the given labels, and which of them are wrong."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    wrong = rng.permutation(len(labels)) < round(rate * len(labels))
    given = np.where(wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
    return torch.from_numpy(images / 16).float(), given, wrong, labels


def trained(images, given, pruner="infobatch", score="das"):
    """Train on the digits in a loop of one's own; return its pruning, a log beside it, and what the model says."""
    torch.manual_seed(0)
    labels = torch.from_numpy(given)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruning = DynamicPruning(TensorDataset(images, labels), EPOCHS, pruner, score, window=5)
    log = TrajectoryLog(len(images))
    for _ in range(EPOCHS):
        for index in torch.from_numpy(pruning.order()).split(64):
            logits = model(images[index])
            log.update(index, logits, labels[index])
            loss = pruning.update(index, F.cross_entropy(logits, labels[index], reduction="none"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pruning.end_epoch(pruning.trajectories.population_mean())
    return pruning, log, model(images).argmax(1)


@pytest.fixture(scope="module", params=[0.35, 0.5])
def run(request):
    images, given, wrong, labels = noisy_digits(request.param)
    return *trained(images, given), given, wrong, labels


def test_nearly_all_that_is_listed_is_wrong_whatever_score_ranks(run):
    pruning, log, predicted, given, wrong, labels = run
    for found in (pruning.suspects(given), pruning.suspects(torch.from_numpy(given), likely=predicted), log.suspects()):
        assert len(found) == 200
        assert wrong[found["index"]].mean() > 0.97
        assert (found["label"] == given[found["index"]]).all()
        assert found["score"].is_monotonic_increasing
    likely = pruning.suspects(given, likely=predicted)["likely_label"].to_numpy()
    assert (likely == predicted.numpy()[found["index"]]).mean() > 0.5
    assert (found["likely_label"] == labels[found["index"]]).mean() > 0.9


def test_the_list_is_of_the_cleaning_score_and_the_last_loss(run):
    pruning, _, _, given, _, _ = run
    found = pruning.suspects(given, len(given))
    report = pruning.report(given)
    assert found["index"].tolist() == report.sort_values("score", kind="stable").index.tolist()
    np.testing.assert_array_equal(found["loss"], report["loss"][found["index"]])
    assert list(found) == ["index", "label", "sure", "loss", "flag", "score"]
    assert (found["flag"].eq("wrong") == (found["sure"] >= 0.5)).all()


def test_so_many_are_wrong_as_it_is_sure(run):
    pruning, _, _, given, wrong, _ = run
    found = pruning.suspects(given, len(given)).set_index("index")["sure"]
    assert found.mean() == pytest.approx(wrong.mean(), abs=0.03)
    for low, high in ((0, 0.1), (0.9, 1)):
        bin = found[found.between(low, high)]
        assert wrong[bin.index].mean() == pytest.approx(bin.mean(), abs=0.03)
        assert len(bin) > 500


def test_what_was_looked_at_is_not_listed_again_and_calibrates(run):
    images, given, _, labels = noisy_digits(0)
    pruning = trained(images, given)[0]
    of_clean = pruning.suspects(given, len(given))["sure"].mean()
    looked = {int(index): int(labels[index]) for index in np.random.default_rng(1).permutation(len(labels))[:100]}
    found = pruning.suspects(given, len(given), checked=looked)
    assert not set(found["index"]) & looked.keys()
    assert len(found) == len(given) - 100
    assert of_clean > 0.3  # it supposes that there are wrong labels
    assert found["sure"].max() < 0.1  # until somebody has looked


def test_a_label_that_the_model_has_memorised_says_so():
    images, given, _, _ = noisy_digits(0.5)
    pruning = trained(images, given)[0]
    found = pruning.suspects(given, likely=given)
    assert set(found["flag"]) == {"memorised"}
    assert "likely_label" in found


def test_labels_may_be_texts_and_a_sample_never_seen_comes_last():
    pruning = DynamicPruning(range(30), 8, "full", "loss")
    losses = torch.rand(30, generator=torch.Generator().manual_seed(0))
    pruning.update(torch.arange(29), losses[:29])
    pruning.end_epoch()
    found = pruning.suspects(["cat", "dog", "cow"] * 10, 30)
    assert found["flag"].tolist()[-1] == "never seen"
    assert found["index"].tolist()[-1] == 29
    assert found["sure"].isna().tolist() == [False] * 29 + [True]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"labels": [0, 1]}, r"labels has shape \(2,\); it must be \(30,\)"),
        ({"top": 0}, "top=0"),
        ({"likely": [1]}, r"likely has shape \(1,\)"),
        ({"likely": ["0"] * 30}, "likely has .*'0'.* for sample 0, where its label is .*give both as texts"),
        ({"labels": ["cat"] * 30, "likely": torch.zeros(30)}, "likely has .*0.* for sample 0, where its label is"),
        ({"checked": [(3, 1)]}, "checked is of type list; give the right labels by index, as {17: 3}"),
        ({"checked": {30: 1}}, "checked has sample 30; there are 30"),
        ({"checked": {"3": 1}}, "checked has sample '3'; there are 30"),
        ({"checked": {1.5: 1}}, r"checked has sample 1\.5; there are 30"),
        ({"checked": {3: "0"}}, "sample 3 is '0', where its label is .*give both as texts or both as numbers"),
        ({"labels": ["cat"] * 30, "checked": {3: 0}}, "sample 3 is 0, where its label is .*both as texts"),
        ({"labels": ["cat"] * 28 + [None, None]}, "labels has None for sample 28, and none for 2 in all"),
        ({"labels": [None] * 30}, "labels has None for sample 0"),
        ({"labels": [0.0] * 29 + [math.nan]}, "labels has nan for sample 29"),
        ({"labels": pd.array([0] * 29 + [None], dtype="Int64")}, r"labels has (<NA>|nan) for sample 29"),
        ({"labels": pd.Series(["cat"] * 29 + [3], dtype=object)}, "labels are of int and str, which cannot"),
        ({"checked": {4: None}}, "sample 4 is None; leave it out where you do not know"),
        ({"checked": {4: math.nan}}, "sample 4 is nan; leave it out"),
    ],
)
def test_mistakes_get_one_sentence(arguments, words):
    pruning = DynamicPruning(range(30), 8, "full", "loss")
    pruning.update(torch.arange(30), torch.rand(30))
    pruning.end_epoch()
    with pytest.raises(ValueError, match=words):
        pruning.suspects(**{"labels": [0] * 30, **arguments})


@pytest.mark.parametrize("labels", [[0, 1, None], [0.0, 1.0, math.nan], np.array([0, "1", 2], object)])
def test_missing_labels_and_such_as_cannot_be_compared_are_refused_wherever_they_are_given(labels):
    pruning = DynamicPruning(range(3), 8, "full", "loss")
    for take in (pruning.report, lambda labels: DynamicPruning(range(3), 8, "full", "loss", labels=labels)):
        with pytest.raises(ValueError, match=r"labels (has|are of) "):
            take(labels)


# ---- how sure one may be -------------------------------------------------------------------------------------


def test_how_sure_is_the_posterior_of_scikit_learns_mixture():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 4000)
    wrong = rng.random(4000) < 0.3
    losses = np.exp(rng.normal(np.where(wrong, 1.0, -1.0), 0.6))
    found = wrong_probability(losses, labels)
    x = -within_class(-np.log(losses), labels)[:, None]
    mixture = GaussianMixture(2, tol=1e-9, max_iter=1000, random_state=0).fit(x)
    low, high = sorted(mixture.means_[:, 0])
    expected = mixture.predict_proba(np.clip(x, low, high))[:, mixture.means_[:, 0].argmax()]
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert found[wrong].mean() > 0.8 > 0.1 > found[~wrong].mean()


@pytest.mark.parametrize("share", [0.6, 0.9, 0.99])
def test_how_sure_tells_apart_where_most_losses_are_equal(share):
    rng = np.random.default_rng(3)
    wrong = rng.random(2000) > share
    found = wrong_probability(np.where(wrong, rng.uniform(0.3, 1, 2000), 0.1), np.zeros(2000))
    assert found[wrong].min() > 0.5 > found[~wrong].max()


def test_how_sure_never_falls_where_the_loss_rises():
    rng = np.random.default_rng(1)
    losses = np.exp(np.concatenate([rng.normal(-2, 2, 500), rng.normal(1, 0.1, 100)]))  # one wide, one narrow
    found = wrong_probability(losses, np.zeros(600))
    assert (np.diff(found[np.argsort(losses)]) >= 0).all()


@pytest.mark.parametrize("true_rate", [0.0, 0.1, 0.4])
def test_what_is_known_calibrates_a_guess_that_is_off(true_rate):
    rng = np.random.default_rng(2)
    losses, labels = np.exp(rng.normal(0, 1, 5000)), np.zeros(5000)
    wrong = rng.random(5000) < 2 * true_rate * (np.argsort(np.argsort(losses)) / 5000)
    known = np.where(rng.random(5000) < 0.1, wrong, np.nan)
    found = wrong_probability(losses, labels, known)
    assert found.mean() == pytest.approx(wrong.mean(), abs=0.03)
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    "losses",
    [np.ones(100), np.arange(5.0), np.full(100, np.nan), np.zeros(100), np.arange(-3.0, 97.0)],
    ids=["equal", "few", "none", "zero", "log odds"],
)
def test_nothing_is_said_where_nothing_can_be(losses):
    assert np.isnan(wrong_probability(losses, np.zeros(len(losses)))).all()


def test_wild_losses_give_probabilities():
    losses = np.array([0.0, 1e-300, -1e-6, 1e30, np.nan] * 20)
    found = wrong_probability(losses, np.zeros(100), np.array([1.0, np.nan, 0.0, 0.0, 1.0] * 20))
    assert np.isnan(found).sum() == 20
    assert ((found >= 0) & (found <= 1))[~np.isnan(losses)].all()


# ---- the log that prunes nothing -----------------------------------------------------------------------------


N, C, PASSES = 23, 4, 7


def passes():
    """Seven epochs of logits of all samples, and their labels."""
    rng = np.random.default_rng(3)
    return rng.normal(0, 2, (PASSES, N, C)).astype(np.float32), rng.integers(0, C, N)


def logged(epochs=range(PASSES), into=None):
    logits, labels = passes()
    log = TrajectoryLog(N) if into is None else into
    for epoch in epochs:
        order = np.random.default_rng(epoch).permutation(N - 1)  # the last one is never passed
        for index in np.array_split(order, 4):
            log.update(torch.from_numpy(index), torch.from_numpy(logits[epoch, index]), torch.from_numpy(labels[index]))
    return log


def test_the_log_keeps_what_plain_loops_count():
    logits, labels = passes()
    frame = logged().frame()
    for i, row in frame.iloc[: N - 1].iterrows():
        z = logits[:, i].astype(np.float64)
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        y, others = labels[i], [c for c in range(C) if c != labels[i]]
        right = [z[t].argmax() == y for t in range(PASSES)]
        events = sum(right[t - 1] and not right[t] for t in range(1, PASSES))
        wrong = [int(z[t].argmax()) for t in range(PASSES) if not right[t]]
        assert row["label"] == y
        assert row["likely_label"] == (wrong[-1] if wrong else y)
        assert row["times_seen"] == PASSES
        assert row["forgetting"] == (events if any(right) else np.inf)
        assert row["loss"] == pytest.approx(-np.log(p[-1, y]), rel=1e-4)
        assert row["mean_loss"] == pytest.approx(-np.log(p[:, y]).mean(), rel=1e-5)
        assert row["margin"] == pytest.approx(np.mean([z[t, y] - z[t, others].max() for t in range(PASSES)]), rel=1e-4)
        assert row["confidence"] == pytest.approx(p[:, y].mean(), rel=1e-5)
        assert row["variability"] == pytest.approx(p[:, y].std(), rel=1e-4)
    assert frame.iloc[-1].drop(["index", "times_seen"]).isna().all()


def test_a_sample_twice_in_a_batch_counts_twice_and_forgets_once():
    log = TrajectoryLog(2)
    right, wrong = [2.0, 0.0], [0.0, 3.0]
    log.update(torch.tensor([0, 0]), torch.tensor([right, right]), torch.tensor([0, 0]))
    log.update(torch.tensor([0, 0]), torch.tensor([right, wrong]), torch.tensor([0, 0]))
    row = log.frame().iloc[0]
    assert (row["times_seen"], row["forgetting"], row["margin"]) == (4, 1, (2 + 2 + 2 - 3) / 4)


def test_a_log_goes_on_from_its_state_through_a_file():
    file = io.BytesIO()
    torch.save(logged(range(4)).state_dict(), file)
    file.seek(0)
    log = TrajectoryLog(N)
    log.load_state_dict(torch.load(file, weights_only=True))
    pd.testing.assert_frame_equal(logged(range(4, PASSES), log).frame(), logged().frame(), check_exact=True)


def test_a_log_is_only_read_by_its_frames():
    log = logged()
    frame, suspects = log.frame(), log.suspects(N)
    assert len(suspects) == N - 1  # of a sample never passed nothing is known, not even its label
    frame.loc[:, "loss"] = 0.0
    pd.testing.assert_frame_equal(log.suspects(N), suspects)
    pd.testing.assert_frame_equal(logged().frame(), log.frame())


def test_a_log_works_with_a_plain_loader_of_any_order():
    dataset = TensorDataset(torch.arange(N), torch.randn(N, 5), torch.arange(N) % C)
    log, model = TrajectoryLog(N), torch.nn.Linear(5, C)
    for index, x, y in DataLoader(dataset, batch_size=8, shuffle=True):
        log.update(index, model(x), y)
    assert log.frame()["times_seen"].eq(1).all()


GOOD = (torch.tensor([0, 1]), torch.zeros(2, C), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("index", "logits", "labels", "kind", "words"),
    [
        (torch.tensor([0, N]), None, None, IndexError, f"sample index {N} is out of range: there are {N}"),
        (torch.tensor([-1, 0]), None, None, IndexError, "sample index -1"),
        (torch.tensor([0.0, 1.0]), None, None, ValueError, "whole numbers"),
        (torch.tensor([False, True]), None, None, ValueError, "whole numbers"),
        (torch.tensor([0]), None, None, ValueError, "shapes"),
        (None, torch.zeros(2), None, ValueError, "shapes"),
        (None, None, torch.zeros(2, C), ValueError, "shapes"),
        (None, torch.zeros(2, C + 1), None, ValueError, "5 classes; 4 are due"),
        (None, torch.tensor([[0.0] * C, [torch.nan] * C]), None, ValueError, "NaN or infinite"),
        (None, None, torch.tensor([0, C]), ValueError, "labels go from 0 to 4"),
        (None, None, torch.tensor([0, 2]), ValueError, "sample 1 has label 2 and had 1 before"),
        (torch.tensor([9, 9]), None, None, ValueError, "sample 9 has labels . and . in one batch"),
    ],
)
def test_a_wrong_update_gets_its_sentence_and_changes_nothing(index, logits, labels, kind, words):
    log = TrajectoryLog(N)
    log.update(*GOOD)
    before = log.frame()
    given = [new if new is not None else good for new, good in zip((index, logits, labels), GOOD, strict=True)]
    with pytest.raises(kind, match=words):
        log.update(*given)
    pd.testing.assert_frame_equal(log.frame(), before)


def test_a_state_of_another_log_is_refused():
    with pytest.raises(ValueError, match=r"23 samples, this log of 5; make it TrajectoryLog\(23\)"):
        TrajectoryLog(5).load_state_dict(logged().state_dict())
    with pytest.raises(ValueError, match="lacks seen"):
        TrajectoryLog(5).load_state_dict({key: value for key, value in logged().state_dict().items() if key != "seen"})
    with pytest.raises(ValueError, match="n=0"):
        TrajectoryLog(0)
