"""What is asked for in rounds, and a curriculum: what the paper names as next steps."""

import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from alignprune_exp import export, keep, suspects
from alignprune_exp.pruning import PRUNERS, SCORES, DynamicPruning
from alignprune_exp.pruning.bank import Trajectories
from harness import SMALL, launch, rows_of, same_bits_when_stopped, samples_of, sentence_of, summary_of

QUERY = ("method=query", "pruner.start=0.1", "pruner.budget=0.5", "pruner.every=2")


def asked(n, epoch, epochs, every, start, budget):
    """How many samples an epoch has: as many more each round, the last of which comes at the last multiple."""
    rounds = range(every, epochs, every)
    done = sum(epoch >= at for at in rounds)
    extra = Fraction(done, len(rounds)) * (Fraction(str(budget)) - Fraction(str(start))) if rounds else 0
    return max(1, math.floor((Fraction(str(start)) + extra) * n))


@settings(max_examples=60)
@given(
    st.integers(5, 60),
    st.integers(1, 11),
    st.integers(1, 6),
    st.integers(1, 50),
    st.integers(0, 50),
    st.integers(0, 99),
)
def test_rounds_ask_for_the_best_scored_of_the_others_and_forget_nothing(n, later, every, start, more, seed):
    epochs = every + later
    shares = start / 100, (start + more) / 100
    rng = np.random.default_rng(seed)
    pruning = DynamicPruning(
        range(n), epochs, "query", "loss", seed=seed, start=shares[0], budget=shares[1], every=every
    )
    before, last = set(), None
    for epoch in range(epochs):
        chosen = set(pruning.selection.indices.tolist())
        assert len(chosen) == asked(n, epoch, epochs, every, *shares)
        assert chosen >= before
        if last is not None and chosen > before:
            others = sorted((last[i] for i in range(n) if i not in before), reverse=True)
            assert sorted((last[i] for i in chosen - before), reverse=True) == others[: len(chosen) - len(before)]
        index = torch.from_numpy(pruning.order())
        losses = torch.from_numpy(rng.exponential(10.0 ** rng.integers(-3, 6), n)).float()
        pruning.update(index, losses[index])
        if pruning.pruner.looks_around(epoch, epochs):
            rest = pruning.unseen()
            pruning.record(rest, losses[rest])
        pruning.end_epoch(1.0)
        last, before = losses.numpy(), chosen


def test_what_is_asked_first_is_drawn_uniformly():
    counts = np.zeros(20)
    for seed in range(400):
        counts[DynamicPruning(range(20), 5, "query", "loss", seed=seed, start=0.25, budget=0.5).selection.indices] += 1
    assert abs(counts - 100).max() < 40  # 4.6 standard deviations


@pytest.mark.parametrize(
    ("given_", "sentence"),
    [
        ({"start": 0.3, "budget": 0.2}, "start=0.3 is out of range; use a number above 0, up to budget=0.2"),
        ({"start": 0.0}, "start=0.0 is out of range"),
        ({"every": 0}, "every=0 is out of range; use 1 or more"),
    ],
)
def test_a_query_refuses_what_it_cannot_do(given_, sentence):
    with pytest.raises(ValueError, match=sentence):
        PRUNERS["query"](**given_)
    with pytest.raises(ValueError, match="Query has no setting for how much it keeps"):
        PRUNERS["query"]().saving(0.5, 40)


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 9), st.floats(0, 1e6, width=32)), min_size=1, max_size=30),
    st.floats(0, 1),
)
def test_a_curriculum_ranks_by_the_distance_from_a_place_among_the_losses(losses, progress):
    bank = Trajectories(len(losses), 3)
    known = [i for i, loss in enumerate(losses) if loss is not None]
    if not known:
        return
    bank.record(torch.tensor(known), torch.tensor([float(losses[i]) for i in known]))
    bank.end_epoch(None)
    found = SCORES["curriculum"]()(replace(bank.history(), progress=progress)).numpy()
    places = (rankdata([losses[i] for i in known]) - 1) / max(len(known) - 1, 1)
    np.testing.assert_allclose(found[known], -abs(places - progress), atol=1e-6)
    assert np.isnan(np.delete(found, known)).all()


def test_a_curriculum_goes_from_the_easiest_to_the_hardest():
    n, epochs, losses = 100, 21, torch.arange(100.0)
    pruning = DynamicPruning(range(n), epochs, "topk", "curriculum", ratio=0.8, warmup=1, unseen="refresh")
    middles = []
    for _ in range(epochs):
        middles.append(pruning.selection.indices.mean())
        index = torch.from_numpy(pruning.order())
        pruning.update(index, losses[index])
        rest = pruning.unseen()
        pruning.record(rest, losses[rest])
        pruning.end_epoch()
    assert middles[1] == 9.5
    assert middles[-1] > 85
    assert (np.diff(middles[1:]) >= 0).all()


# ---- runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [(), ("score=das",), ("score=random",), ("score.unseen=refresh",)])
def test_labels_that_were_not_asked_for_have_no_say(undisturbed, line):
    folders = [undisturbed(*QUERY, *line, f"noise={noise}") for noise in ("sym0.8", "clean")]
    for row, other in zip(*map(rows_of, folders), strict=True):
        for key in ("train_loss", "test_accuracy", "reference_loss", "kept_fraction", "samples_refreshed", "lr"):
            assert row[key] == other[key], key
        assert row["kept_noise"] == 0
    noisy, clean = map(samples_of, folders)
    assert (noisy["times_selected"] == clean["times_selected"]).all()
    assert (noisy["label"] != noisy["clean_label"]).mean() > 0.5
    summary = summary_of(folders[0])
    assert summary["asked"] == (noisy["times_selected"] > 0).sum() == summary["samples"] // 2


def test_a_run_that_asked_for_labels_tells_nothing_of_the_given_ones(undisturbed, tmp_path, capsys):
    folder = str(undisturbed(*QUERY, "noise=sym0.5"))
    capsys.readouterr()
    for command, *line in (
        (suspects, folder),
        (keep, folder, "--fraction", "0.5", "-o", f"{tmp_path}/keep.parquet"),
        (export, folder, "--to", "labelstudio", "-o", f"{tmp_path}/tasks"),
    ):
        assert command.main(line) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert f"{folder} has asked for right labels" in sentence_of(said.err)
    assert not any(tmp_path.iterdir())


def test_what_a_loader_leaves_out_has_been_asked_for_all_the_same():
    pruning, asked = DynamicPruning(range(60), 12, "query", "loss", start=0.2, budget=0.5, every=1), set()
    while pruning.epoch < pruning.epochs:
        index = torch.from_numpy(pruning.order()[:-5])  # as drop_last does
        asked |= set(pruning.selection.indices.tolist())
        pruning.update(index, torch.rand(len(index)) + 1)
        others = pruning.unseen()
        pruning.record(others, torch.rand(len(others)) + 1)
        pruning.end_epoch()
    assert len(asked) == 30


@pytest.mark.parametrize("reference", ["pseudo", "pseudo_cleanlab"])
def test_a_reference_set_by_the_labels_of_all_samples_is_refused(refused, reference):
    said = refused("pruner=query", "score=das", f"reference={reference}")
    assert "pruner=query knows no label before it asks, and reference=pseudo chooses by those of all samples" in said


@pytest.mark.parametrize("score", ["reducible", "irreducible", "readout", "cleaning", "oracle", "supervised"])
def test_a_score_by_the_labels_of_all_samples_is_refused(refused, score):
    sentence = f"pruner=query knows no label before it asks, and score={score} goes by those of all samples"
    assert sentence in refused("pruner=query", f"score={score}")


def test_a_learner_by_the_labels_of_all_samples_is_refused(refused):
    sentence = "pruner=query knows no label before it asks, and learner=posterior goes by those of all samples; use"
    assert sentence in refused("pruner=query", "score=loss", "learner=posterior")


def test_a_query_says_how_many_labels_it_asked_for(tmp_path, capsys):
    assert launch(tmp_path, *QUERY) == 0
    heads, values = (re.split(r"  +", line.strip()) for line in capsys.readouterr().out.split("\n\n")[1].splitlines())
    assert dict(zip(heads, values, strict=True))["labels asked for"] == "148 of 297"


def test_the_others_are_looked_at_before_each_round_alone(undisturbed):
    rows = rows_of(undisturbed(*QUERY, "noise=sym0.5"))
    looked = [row["epoch"] for row in rows if row["samples_refreshed"]]
    assert looked == [epoch for epoch in range(len(rows) - 1) if (epoch + 1) % 2 == 0]
    n = summary_of(undisturbed(*QUERY, "noise=sym0.5"))["samples"]
    assert rows[1]["samples_refreshed"] == n - round(rows[1]["kept_fraction"] * n)


def test_a_query_that_was_stopped_ends_with_the_same_bits(tmp_path):
    same_bits_when_stopped(tmp_path, 3, *QUERY, "noise=sym0.5", base=SMALL)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("task=regression", "pruner=query needs class labels, and task=regression has none"),
        ("saved=0.5", "leave out saved"),
        ("pruner.start=0.6", "up to budget=0.5"),
    ],
)
def test_what_cannot_be_asked_is_refused(refused, line, sentence):
    assert sentence in refused(*QUERY, *line.split())
