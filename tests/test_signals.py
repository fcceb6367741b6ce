"""What trajectories can be made of beside a loss: against the probabilities and margins themselves."""

import shlex

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import logsumexp, softmax

from alignprune_exp.advice import inert_keys, next_commands
from alignprune_exp.errors import UsageError
from alignprune_exp.pruning.signals import OTHER_NAMES, SIGNALS, extent
from harness import composed, config_of, ids_of, metrics_of, summary_of

LOGITS = arrays(np.float64, st.tuples(st.integers(1, 8), st.just(5)), elements=st.floats(-12, 12))


def margins(z_BC, labels_B):
    """The largest other logit and the log-sum-exp of all others, (2, B), less the label's (Pleiss et al.)."""
    rows = np.arange(len(z_BC))
    others = z_BC.copy()
    others[rows, labels_B] = -np.inf
    return np.stack([others.max(1), logsumexp(others, axis=1)]) - z_BC[rows, labels_B]


@given(z_BC=LOGITS, seed=st.integers(0, 99))
def test_signals_are_the_probability_and_the_margin_of_the_label(z_BC, seed):
    labels = np.random.default_rng(seed).integers(5, size=len(z_BC))
    p = softmax(z_BC, axis=1)[np.arange(len(z_BC)), labels]
    losses, wrong = torch.from_numpy(-np.log(p)), torch.from_numpy(z_BC.argmax(1) != labels)
    doubt, odds, disagreement = (SIGNALS[name](losses, wrong).numpy() for name in ("doubt", "odds", "disagreement"))
    hard, soft = margins(z_BC, labels)
    np.testing.assert_allclose(doubt, 1 - p, atol=1e-12)
    np.testing.assert_allclose(odds, np.maximum(soft, np.log(1e-7) - np.log(p)), rtol=1e-6, atol=1e-6)
    assert (hard <= odds + 1e-5).all()
    assert (np.maximum(hard, -15.9) >= odds - np.log(4) - 0.3).all()
    assert np.array_equal(disagreement, z_BC.argmax(1) != labels)
    assert disagreement.dtype == losses.numpy().dtype


@pytest.mark.parametrize("loss", [0.0, -0.0, 1e-9, 100.0])
def test_a_label_that_is_certain_has_finite_odds(loss):
    losses, wrong = torch.tensor([loss]), torch.tensor([False])
    for signal in SIGNALS.values():
        assert signal(losses, wrong).isfinite().all()
    assert SIGNALS["odds"](losses, wrong) == pytest.approx(100.0 if loss == 100 else np.log(1e-7), rel=1e-6)


def test_histograms_show_what_a_signal_can_be():
    assert extent("plain", 2.0) == extent("smoothed", 2.0) == (0.0, 8.0)
    assert extent("doubt", 2.0) == extent("disagreement", 2.0) == (0.0, 1.0)
    assert extent("odds", 2.0) == (-8.0, 8.0)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_signal_ranks_and_is_told_of(undisturbed, signal):
    line = ("method=sieve_settled", "pruner.warmup=2", "noise=sym0.5", "dataset.subset=null", "epochs=8")
    plain, folder = undisturbed(*line), undisturbed(*line, f"recorded={signal}")
    assert summary_of(folder)["detection_auroc_last"] > 0.6
    assert "noise_estimate" not in summary_of(folder)
    first, other = metrics_of(folder), metrics_of(plain)
    assert [row["train_loss"] for row in first[:2]] == [row["train_loss"] for row in other[:2]]
    assert first[-1]["train_loss"] != other[-1]["train_loss"]
    low, high = {"odds": (-17, 100)}.get(signal, (0, 1))
    assert all(low <= row["reference_loss"] <= high for row in first)
    assert {row["reference_loss"] for row in first}.isdisjoint(row["reference_loss"] for row in other)


def test_a_signal_makes_another_run_where_it_ranks_and_the_same_where_nothing_does():
    ranked = ids_of("pruner=topk score=settled", *(f"pruner=topk score=settled recorded={name}" for name in SIGNALS))
    assert len(set(ranked)) == 1 + len(SIGNALS)
    assert len(set(ids_of("pruner=rs2", *(f"pruner=rs2 recorded={name}" for name in SIGNALS)))) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("method=sieve recorded=odds", "set recorded=plain, score=readout, score=features or score=tr"),
        ("task=regression recorded=doubt", "recorded=doubt needs class labels, and task=regression has none"),
        ("method=query recorded=disagreement", "pruner=query compares losses; leave recorded=disagreement out"),
    ],
)
def test_what_cannot_be_made_of_a_signal_is_refused(refused, line, sentence):
    assert sentence in refused("noise=sym0.5", *line.split())


@pytest.mark.parametrize(("word", "meant"), OTHER_NAMES.items())
def test_another_name_of_a_signal_is_answered_with_its_name_here(word, meant):
    with pytest.raises(UsageError, match=rf"^recorded={word} is unknown \(did you mean {meant}[?]\); use "):
        composed(f"recorded={word}")
    assert composed(f"recorded={meant}", "pruner=topk").recorded == meant


def test_suspects_are_told_by_losses_alone(undisturbed, capsys):
    from alignprune_exp.suspects import main

    folder = undisturbed("pruner=topk", "score=settled", "recorded=odds")
    assert main([str(folder)]) == 2
    assert "has recorded odds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("pruner=topk score=settled recorded=odds", [None, None, "odds"]),
        ("pruner=topk score=loss recorded=odds", [None, "odds", "odds"]),
        ("pruner=full recorded='doubt'", ["'doubt'", None, None]),
        ("pruner=topk score=settled scale=paper recorded=disagreement", [None, None, "disagreement"]),
        ("pruner=topk score=settled label_smoothing=0.1 recorded=smoothed", ["smoothed"] * 3),
    ],
)
def test_proposed_next_is_a_signal_only_where_it_ranks_as_is_said(tmp_path, line, kept):
    line = ("dataset=cifar10", "dataset.root=/nowhere", *line.split())
    commands = [shlex.split(words)[3:] for words, _ in next_commands(config_of(tmp_path, *line), line)]
    assert [dict(word.split("=", 1) for word in words).get("recorded") for words in commands] == kept
    ranked_by = [config_of(tmp_path, *words).recorded for words in commands]
    otherwise = "smoothed" if "scale=paper" in line else "plain"
    assert ranked_by == [recorded.strip("'") if recorded else otherwise for recorded in kept]


def test_a_signal_that_ranks_nothing_is_said_to_be_without_effect(tmp_path):
    line = ("pruner=full", "recorded=odds")
    assert inert_keys(config_of(tmp_path, *line), line) == [
        "recorded has no effect under pruner=full, which ranks nothing"
    ]
    line = ("pruner=topk", "score=settled", "recorded=odds")
    assert inert_keys(config_of(tmp_path, *line), line) == []
