"""Scores by losses under a network that has not trained on the sample, and the two networks that tell them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from alignprune_exp import optim
from alignprune_exp.config import OPTIMIZER
from alignprune_exp.errors import UsageError
from alignprune_exp.network import Network
from alignprune_exp.pruning import SCORES, DynamicPruning, Fixed
from alignprune_exp.records import read_config
from alignprune_exp.report.tables import make_table, read_records
from alignprune_exp.run import Run
from alignprune_exp.suites import Cell, Suite
from harness import (
    SMALL,
    assert_same_results,
    config_of,
    launch,
    only_run,
    rows_of,
    same_bits_when_stopped,
    samples_of,
    summary_of,
    trained,
)

RHO = ("method=rho_loss", "noise=sym0.5", "score.holdout=2", "epochs=8", "recorded=plain")


def after_an_epoch(losses, irreducible, **given_):
    """A pruning that has seen one epoch, of these losses."""
    pruning = DynamicPruning(range(len(losses)), 4, "topk", **given_)
    pruning.tell(irreducible)
    index = torch.from_numpy(pruning.order())
    pruning.update(index, torch.tensor(losses)[index])
    pruning.end_epoch()
    return pruning


@given(
    st.lists(st.tuples(st.floats(0, 100, width=32), st.floats(0, 100, width=32)), min_size=2, max_size=40),
    st.integers(0, 99),
)
def test_what_training_can_still_gain_comes_first(pairs, seed):
    losses, irreducible = map(list, zip(*pairs, strict=True))
    pruning = after_an_epoch(losses, irreducible, score="reducible", seed=seed, ratio=0.5, warmup=1)
    gain = np.float32(losses) - np.float32(irreducible)
    np.testing.assert_array_equal(pruning.ranking, gain)
    np.testing.assert_array_equal(pruning.scores("irreducible"), -np.float32(irreducible))
    chosen = pruning.selection.indices
    assert len(chosen) == max(1, len(gain) // 2)
    assert sorted(gain[chosen]) == sorted(gain)[-len(chosen) :]


@pytest.mark.parametrize("name", ["reducible", "irreducible"])
def test_losses_that_nobody_has_told_are_asked_for(name):
    pruning = DynamicPruning(range(3), 4, "topk", name, warmup=1)
    assert pruning.due
    pruning.update(torch.arange(3), torch.ones(3))
    with pytest.raises(
        ValueError, match=rf"score='{name}' goes by what you tell of every sample; call tell\(\) before"
    ):
        pruning.end_epoch()
    pruning.tell(torch.zeros(3))
    pruning.end_epoch()
    assert not pruning.due


@pytest.mark.parametrize(
    ("values", "what"), [([1.0, 2.0, 3.0, 4.0], r"of shape \(4,\)"), ([1.0, math.inf, 0.0], "infinite in places")]
)
def test_what_is_no_number_a_sample_is_refused(values, what):
    with pytest.raises(ValueError, match=rf"what is told is {what}; tell \(3,\) numbers, one a sample"):
        DynamicPruning(range(3), 4, "topk", "reducible", warmup=1).tell(values)


@pytest.mark.parametrize(("holdout", "epochs", "due"), [(0.1, 40, 4), (0.3, 10, 3), (0.01, 40, 1), (5, 40, 5)])
def test_a_holdout_below_1_is_a_share_of_the_epochs(holdout, epochs, due):
    assert SCORES["reducible"](holdout=holdout).holdout_epochs(epochs) == due


# ---- runs -------------------------------------------------------------------------------------------------


def by_hand(setup):
    """The losses of each half under a network that a loop of one's own has trained on the other, from scratch."""
    config, train = setup.config, setup.task.train
    told, bank = torch.full((setup.n,), torch.nan), None
    for number in (0, 1):
        network = Network(setup, f"holdout model {number}").learner.networks[0]
        optimizer = OPTIMIZER.make(config.optimizer, network.parameters())
        half, other = setup.half(number), torch.from_numpy(setup.half(1 - number))
        pruner, given_ = Fixed(indices=half), {"window": config.score.window, "seed": config.seed}
        pruning = DynamicPruning(range(setup.n), 2, pruner, "loss", bank=bank, **given_)
        for epoch in range(pruning.first, pruning.epochs):
            order = pruning.order()
            assert sorted(order) == half.tolist()
            steps = -(-len(order) // config.batch_size)
            network.train()
            for step, (index, x, y) in enumerate(train.epoch(order, epoch)):
                optim.set_progress(optimizer, (epoch - pruning.first + step / steps) / 2, config.optimizer)
                loss = pruning.update(index, F.cross_entropy(network(x), y, reduction="none"))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            pruning.end_epoch()
        network.eval()
        with torch.no_grad():
            told[other] = torch.cat(
                [F.cross_entropy(network(x), y, reduction="none") for _, x, y in train.evaluation(other)]
            )
        bank = pruning.trajectories
    return told


def test_each_half_is_told_by_a_network_that_has_trained_on_the_other_alone(tmp_path):
    one = Run(config_of(tmp_path, *RHO, "precision=fp32"))
    halves = [one.setup.half(number) for number in (0, 1)]
    assert sorted(np.concatenate(halves)) == list(range(one.setup.n))
    assert abs(len(halves[0]) - len(halves[1])) <= 1
    trained(one)
    torch.testing.assert_close(one.loop.pruning.told, by_hand(one.setup), rtol=1e-5, atol=1e-5)


def test_the_epochs_that_count_have_the_schedule_of_any_other_run(undisturbed):
    rows = rows_of(undisturbed(*RHO, "pruner.warmup=7", "pruner.ratio=0"))
    others = rows_of(undisturbed("method=full", *RHO[1:2], *RHO[3:]))
    assert [row["lr"] for row in rows[4:]] == [row["lr"] for row in others]
    assert [row["phase"] for row in rows] == ["holdout"] * 4 + ["train"] * 8


def test_what_the_two_networks_take_is_counted(undisturbed):
    folder = undisturbed(*RHO, "saved=0.5")
    rows, summary, n = rows_of(folder), summary_of(folder), summary_of(folder)["samples"]
    trained_on = np.cumsum([round(row["kept_fraction"] * n) for row in rows])
    assert [row["samples_seen"] for row in rows] == trained_on.tolist()
    assert trained_on[3] == 2 * n
    assert summary["saved"] == pytest.approx(1 - trained_on[-1] / (8 * n)) == pytest.approx(0.5, abs=0.01)
    assert samples_of(folder)["times_selected"].sum() == trained_on[-1]
    assert [row["ranked_by"] for row in rows] == [None] * 5 + ["reducible"] * 7
    looked_at = [row["samples_forwarded"] - round(row["kept_fraction"] * n) - row["samples_reference"] for row in rows]
    assert looked_at == [0, 0, n // 2, 0, n - n // 2, *[0] * 7]
    assert summary["kept_noise_mean"] == pytest.approx(np.mean([row["kept_noise"] for row in rows[5:]]))
    assert (summary["warmup_epochs"], summary["epochs"]) == (4, 8)


def test_a_table_says_of_kept_noise_what_the_summary_says(undisturbed):
    folder = undisturbed(*RHO, "saved=0.5")
    summary = summary_of(folder)
    cell = Cell({"method": "rho_loss", "noise": "sym0.5"}, summary["config_id"], read_config(folder))
    suite = Suite("own", "smoke", "", ["method"], ["noise"], None, [cell])
    (row,) = make_table(suite, "smoke", read_records([folder.parent.parent])).long.to_dict("records")
    for key in ("kept_noise_mean", "kept_noise_weighted_mean"):
        assert row[key] == pytest.approx(summary[key])


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_stopped_in_any_phase_ends_with_the_same_bits(tmp_path, steps):
    same_bits_when_stopped(tmp_path, steps, *RHO, "score.holdout=1", "epochs=3", base=SMALL)


@pytest.mark.parametrize("line", ["pruner=topk pruner.warmup=0", "pruner=seta score.unseen=mask"])
def test_the_network_that_counts_is_scored_by_its_own_losses_alone(tmp_path, line):
    one = Run(config_of(tmp_path, *line.split(), "score=reducible", "score.window=3", *RHO[1:3], "epochs=3"))
    trained(one)
    pruning, bank = one.loop.pruning, one.loop.pruning.trajectories
    np.testing.assert_array_equal(bank.count_N, pruning.times_selected)
    np.testing.assert_array_equal(bank.last_N.isnan(), pruning.times_selected == 0)
    np.testing.assert_array_equal(np.isnan(pruning.scores("reducible")), pruning.times_selected == 0)
    das = [row["auroc_das"] is not None for row in one.journal.rows]
    assert das == [False] * 6 + [True]


def test_a_pruner_that_asks_no_score_holds_nothing_out(tmp_path):
    for name, line in {"with": ("score=reducible",), "without": ()}.items():
        assert launch(tmp_path / name, "pruner=rs2", *line) == 0
    assert_same_results(*(only_run(tmp_path / name) for name in ("with", "without")))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("saved=0.8", "score=reducible takes 2 of 8 epochs before; with these counted saved=0.8 is out of reach"),
        ("saved=0.7", "with these counted pruner=topk: saved=0.95 is out of reach"),
        ("saved=0.6", "saved below 0.788, or another warmup or delta; 0.25 of what is saved here is the score's"),
        ("score.holdout=0", "holdout=0.0 is out of range; use a number of epochs, or a share of them below 1"),
        ("score.holdout=x", "score.holdout=x has the wrong type"),
    ],
)
def test_what_cannot_be_held_out_is_refused(refused, line, sentence):
    assert sentence in refused(*RHO, *line.split())


OWN = """
from alignprune_exp.pruning.scores import DAS, HeldOut

class AlignedAndHeldOut(HeldOut):
    aligned = True

    def __call__(self, history):
        return DAS()(history)
"""


def test_what_the_network_that_counts_lacks_is_said_before_any_is_trained(refused, tmp_path, monkeypatch):
    (tmp_path / "aligned_and_held_out.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    name = "score.name=aligned_and_held_out.AlignedAndHeldOut"
    line = ("pruner=topk", "score.window=3", name, "reference=none", *SMALL, f"paths.results={tmp_path}")
    assert "compares with a reference set, and reference.size=0 leaves none" in refused(*line)


def test_the_first_epoch_too_goes_by_what_was_told_before_it():
    pruning = DynamicPruning(range(10), 4, "topk", "irreducible", ratio=0.5, warmup=0)
    pruning.tell(torch.arange(10.0))
    assert pruning.selection.indices.tolist() == [0, 1, 2, 3, 4]


class Demanding(SCORES["loss"]):
    """Is told what only its author knows."""

    def due(self, epoch, epochs):
        return epoch == 2


def test_a_score_that_no_run_can_tell_anything_is_refused(refused):
    sentence = refused("pruner=topk", "score=loss", f"score.name={__name__}.Demanding")
    assert "is told what a run cannot tell; let it subclass Features, HeldOut or Readout" in sentence


def test_what_leaves_scores_no_epoch_is_said_before_the_halves_are_trained(tmp_path):
    with pytest.raises(UsageError, match="leave scores none of 1 epochs to choose in"):
        Run(config_of(tmp_path, "method=rho_loss", "epochs=1"))
