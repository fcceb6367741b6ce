"""The estimate of the noise rate, and the sieve that leaves out by it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignprune_exp.pruning import PRUNERS, DynamicPruning
from alignprune_exp.pruning.noise_rate import PASSES, NoiseRate, probability, wrong_share
from alignprune_exp.pruning.readout import readout
from harness import summary_of, through_disk

N, CLASSES = 600, 5
LABELS = np.arange(N) % CLASSES
ALL = torch.ones(N, dtype=torch.bool)


def losses_of(rng, wrong, right):
    """Cross-entropies of a network that gives right labels a probability about ``right``, wrong ones their part."""
    p = rng.dirichlet(np.full(CLASSES, 3.0), N)
    true = np.clip(rng.normal(right, 0.05, N), 0.01, 0.99)
    others = p[:, 1:] / p[:, 1:].sum(1, keepdims=True) * (1 - true)[:, None]
    return torch.from_numpy(-np.log(np.where(wrong, others[np.arange(N), rng.integers(0, CLASSES - 1, N)], true)))


@given(
    st.floats(0, 1),
    st.integers(2, 1000),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=9),
)
def test_the_share_that_made_the_probabilities_is_found_again(share, classes, surplus):
    trusted = np.array([1 / classes + s * (1 - 1 / classes) for s in surplus])
    given_ = (1 - share) * trusted + share * (1 - trusted) / (classes - 1)
    found = wrong_share(torch.from_numpy(given_), torch.from_numpy(trusted), classes)
    assert found == pytest.approx(share, abs=1e-9)


def test_a_network_that_knows_nothing_tells_nothing_and_labels_better_than_trusted_ones_are_not_wrong():
    chance = torch.tensor([0.1, 0.1], dtype=torch.float64)
    assert math.isnan(wrong_share(chance, chance * 0.9, 10))
    assert math.isnan(wrong_share(chance[:0], chance[:0], 10))
    assert wrong_share(chance * 6, chance * 5, 10) == 0


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
def test_by_losses_drawn_as_the_model_has_it(share):
    rng, rate = np.random.default_rng(3), NoiseRate()
    wrong = rng.random(N) < share
    for epoch, right in enumerate((0.3, 0.4, 0.5, 0.6)):
        trusted = probability(losses_of(rng, np.zeros(N, bool), right + 0.05))
        rate.observe(losses_of(rng, wrong, right), ALL, trusted, epoch + 1, ranked=False)
    assert rate.estimate(CLASSES) == pytest.approx(wrong.mean(), abs=0.04)


@given(st.lists(st.tuples(st.floats(0.05, 3), st.floats(0.2, 0.9), st.booleans()), min_size=1, max_size=12))
def test_what_counts_is_early_unranked_and_has_a_trusted_loss_on_both_sides(epochs):
    rate, passes, pairs, before = NoiseRate(), 0.0, [], None
    for size, trusted, ranked in epochs:
        passes += size
        losses = torch.tensor([size, size, math.nan])
        rate.observe(losses, torch.tensor([True, True, False]), trusted, passes, ranked)
        counts = not ranked and passes <= PASSES
        if counts and before is not None:
            pairs.append((math.exp(-size), (before + trusted) / 2))
        before = trusted if counts else None
    expected = wrong_share(*torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).T, 10)
    assert rate.estimate(10) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    again = NoiseRate()
    again.load_state_dict(through_disk(rate.state_dict()))
    rate.observe(torch.ones(3), ALL[:3], 0.7, 1.0, False)
    again.observe(torch.ones(3), ALL[:3], 0.7, 1.0, False)
    assert str(again.estimate(10)) == str(rate.estimate(10))


def test_unknown_trusted_losses_do_not_count():
    rate = NoiseRate()
    for trusted in (0.5, math.nan, 0.5):
        rate.observe(torch.ones(4), ALL[:4], trusted, 1.0, ranked=False)
    assert math.isnan(rate.estimate(10))


def test_an_epoch_that_has_trained_on_nothing_does_not_count():
    rate, other = NoiseRate(), NoiseRate()
    for trained in (ALL[:4], ALL[:4], ~ALL[:4]):
        rate.observe(torch.ones(4), trained, 0.5, 1.0, ranked=False)
    for _ in range(2):
        other.observe(torch.ones(4), ALL[:4], 0.5, 1.0, ranked=False)
    assert rate.estimate(10) == other.estimate(10) > 0


# ---- the sieve --------------------------------------------------------------------------------------------


@given(st.floats(0, 1))
def test_the_sieve_leaves_out_nine_tenths_of_what_seems_wrong(noise_rate):
    informed = PRUNERS["sieve"](exclude="auto", ratio=0.5).informed(noise_rate)
    assert informed == PRUNERS["sieve"](exclude=min(0.9 * noise_rate, 0.9), ratio=0.5)


def test_with_nothing_known_or_nothing_wrong_the_sieve_leaves_nothing_out():
    for noise_rate in (math.nan, 0.0):
        assert PRUNERS["sieve"](exclude="auto").informed(noise_rate).exclude == 0


def walk(pruning, wrong, until=None):
    """Train to the end on losses that are a function of the epoch; yield each epoch's selection."""
    while pruning.epoch < (until or pruning.epochs):
        rng = np.random.default_rng(pruning.epoch)
        losses = losses_of(rng, wrong, min(0.9, 0.3 + 0.03 * pruning.epoch))
        trusted = losses_of(rng, np.zeros(N, bool), min(0.9, 0.315 + 0.03 * pruning.epoch))[:200]
        order = pruning.order()
        yield pruning.selection
        pruning.update(torch.from_numpy(order), losses[order])
        pruning.end_epoch(trusted)


def sieved(exclude):
    return DynamicPruning(
        range(N), 16, "sieve", "cleaning", exclude=exclude, warmup=0.4, ratio=0.6, labels=LABELS, window=3
    )


def test_in_a_loop_the_estimate_is_made_once_and_goes_through_a_checkpoint():
    wrong = np.random.default_rng(0).random(N) < 0.5
    pruning = sieved("auto")
    selections = list(walk(pruning, wrong))
    assert pruning.noise_rate == pytest.approx(wrong.mean(), abs=0.03)
    expected = math.floor(0.9 * pruning.noise_rate * N) / N
    assert [selection.low_fraction for selection in selections] == [0.0] * 6 + [expected] * 10
    by_hand = sieved(0.9 * pruning.noise_rate)
    assert [s.indices.tolist() for s in walk(by_hand, wrong)] == [s.indices.tolist() for s in selections]
    begun, resumed = sieved("auto"), sieved("auto")
    list(walk(begun, wrong, until=4))
    resumed.load_state_dict(through_disk(begun.state_dict()))
    assert [s.indices.tolist() for s in walk(resumed, wrong)] == [s.indices.tolist() for s in selections[4:]]


def test_what_the_estimate_lacks_is_said():
    with pytest.raises(ValueError, match=r"pass labels=\(n,\) of two classes or more"):
        DynamicPruning(range(N), 16, "sieve", "settled", exclude="auto")
    pruning = sieved("auto")
    order = pruning.order()
    pruning.update(torch.from_numpy(order), torch.ones(len(order)))
    with pytest.raises(ValueError, match=r"pass the losses \(R,\) of a trusted set to end_epoch"):
        pruning.end_epoch(0.5)
    assert pruning.epoch == 0
    assert math.isnan(sieved(0.3).noise_rate)


def foretelling(rng, wrong):
    """What a readout makes of embeddings that know the right classes."""
    right = (LABELS - wrong * rng.integers(1, CLASSES, N)) % CLASSES
    embeddings = np.eye(CLASSES)[right] + 0.4 * rng.standard_normal((N, CLASSES))
    return readout(torch.from_numpy(embeddings), torch.from_numpy(LABELS))


def test_what_is_foretold_is_taken_where_no_trusted_losses_are():
    rng = np.random.default_rng(0)
    wrong = rng.random(N) < 0.4
    told = foretelling(rng, wrong)
    assert told.noise_rate == pytest.approx(wrong.mean(), abs=0.1)

    def begun():
        return DynamicPruning(
            range(N), 16, "sieve", "features", exclude="auto", warmup=0.4, ratio=0.6, labels=LABELS, window=3
        )

    pruning = begun()
    pruning.tell(told)
    for epoch in range(8):
        pruning.update(torch.from_numpy(pruning.order()), torch.ones(len(pruning.order())))
        pruning.end_epoch()
        assert pruning.noise_rate == told.noise_rate
        if epoch == 3:
            state = through_disk(pruning.state_dict())
    assert pruning.selection.low_fraction == math.floor(0.9 * told.noise_rate * N) / N
    resumed = begun()
    resumed.load_state_dict(state)
    assert resumed.noise_rate == told.noise_rate

    trusting = begun()
    trusting.tell(told)
    for epoch in range(3):
        losses = losses_of(np.random.default_rng(epoch), wrong, 0.5)
        trusting.update(torch.from_numpy(trusting.order()), losses[trusting.order()])
        trusting.end_epoch(losses_of(np.random.default_rng(epoch), np.zeros(N, bool), 0.5))
    assert trusting.noise_rate == pytest.approx(wrong.mean(), abs=0.05)
    assert trusting.noise_rate != told.noise_rate


def test_margins_alone_do_not_tell_the_rate():
    pruning = DynamicPruning(range(N), 16, "sieve", "features", exclude="auto", labels=LABELS)
    pruning.tell(torch.zeros(N))
    pruning.update(torch.from_numpy(pruning.order()), torch.ones(len(pruning.order())))
    with pytest.raises(ValueError, match=r"needs the noise rate: tell\(\) what readout\(\) returns as it is"):
        pruning.end_epoch()


def in_every_process(rank, size, wrong):
    import torch.distributed

    pruning = DynamicPruning(range(N), 8, "rs2", ratio=0.6, labels=LABELS, divide=False)
    for epoch in range(6):
        rng = np.random.default_rng(epoch)
        losses, trusted = losses_of(rng, wrong, 0.5), losses_of(rng, np.zeros(N, bool), 0.5)
        own = pruning.order()[rank::size]
        pruning.update(torch.from_numpy(own), losses[own])
        pruning.end_epoch(trusted if rank == 0 else None)
    return pruning.noise_rate


def test_processes_have_the_estimate_of_one(together):
    wrong = np.random.default_rng(1).random(N) < 0.3
    found = together(2, in_every_process, 2, wrong)
    assert found[0] == found[1] == pytest.approx(in_every_process(0, 1, wrong), abs=1e-6)


# ---- on the command line ----------------------------------------------------------------------------------


def test_digits_with_half_of_the_labels_wrong_are_seen_to_be_so(undisturbed):
    line = ("method=sieve", "noise=sym0.5", "saved=0.4", "epochs=12", "dataset.subset=null")
    assert summary_of(undisturbed(*line))["noise_estimate"] == pytest.approx(0.5, abs=0.1)
    assert summary_of(undisturbed(*line, "noise=clean"))["noise_estimate"] < 0.1


@pytest.mark.parametrize("method", ["sieve_features", "sieve_readout"])
def test_digits_need_no_trusted_labels_for_that_where_a_score_foretells_them(undisturbed, method):
    line = (f"method={method}", "reference=none", "saved=0.4", "epochs=12", "dataset.subset=null")
    for noise, rate in {"noise=sym0.5": 0.5, "noise=clean": 0.0}.items():
        summary = summary_of(undisturbed(*line, noise))
        assert summary["noise_estimate"] == pytest.approx(rate, abs=0.1)


def test_smoothed_losses_are_not_compared_with_the_plain_ones_of_trusted_labels(undisturbed):
    line = ("pruner=rs2", "noise=sym0.5", "label_smoothing=0.1", "dataset.subset=null")
    assert 0 <= summary_of(undisturbed(*line))["noise_estimate"] <= 1
    assert "noise_estimate" not in summary_of(undisturbed(*line, "recorded=smoothed"))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "reference.size=0",
            "set reference=trusted, score=readout, score=features or score=transition, which need none",
        ),
        (
            "reference=pseudo",
            "set reference=trusted, score=readout, score=features or score=transition, which need none",
        ),
        ("recorded=smoothed label_smoothing=0.1", "set recorded=plain, score=readout, score=features or score"),
        ("pruner.exclude=automatic", "pruner.exclude=automatic"),
        ("pruner.exclude=0.95", "exclude=0.95 is out of range; use a number from 0 to 0.9, or auto"),
    ],
)
def test_a_sieve_without_what_it_estimates_by_is_refused(refused, line, sentence):
    assert sentence in refused("method=sieve", *line.split())
