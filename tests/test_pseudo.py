"""A reference set without trusted labels: the choice, the chain of its trajectory, and runs that use it."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from cleanlab import count, rank
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from alignprune_exp.pruning import DynamicPruning, NonFiniteLossError
from alignprune_exp.pruning.reference import class_shares, confident_thresholds, label_quality, most_trusted
from alignprune_exp.pruning.scores import pearson, spearman
from alignprune_exp.run import Run
from alignprune_exp.setup import open_task
from alignprune_exp.suites import load_suite
from alignprune_exp.train import main
from harness import config_of, missing, only_run, rows_of, summary_of, trained

EPOCHS, WARMUP, EVERY = 10, 3, 2
SMALL = ("threads=1", f"epochs={EPOCHS}", "score.window=3", "dataset.subset=300", "dataset.test_subset=100")
PSEUDO = (f"reference.warmup={WARMUP}", f"reference.every={EVERY}", "reference.size=30")
METHODS = {"small_loss": ("reference=pseudo", *PSEUDO), "cleanlab": ("reference=pseudo_cleanlab", *PSEUDO)}
EVERY_KIND = METHODS | {"population": ("reference=population",)}
CHOSEN_AFTER = [3, 5, 7, 9]  # epochs


# --- the choice

labelled = st.lists(st.integers(0, 4), min_size=1, max_size=40)


@given(labelled, st.data())
def test_class_shares_are_proportional_by_largest_remainder(labels, data):
    size = data.draw(st.integers(0, len(labels)))
    classes, quota = class_shares(np.array(labels), size, np.random.default_rng(0))
    counts = Counter(labels)
    assert classes.tolist() == sorted(counts)
    assert quota.sum() == size
    exact = [Fraction(counts[c] * size, len(labels)) for c in classes.tolist()]
    assert all(share <= counts[c] for c, share in zip(classes.tolist(), quota, strict=True))
    assert all(int(e) <= share <= int(e) + 1 for e, share in zip(exact, quota.tolist(), strict=True))
    rounded_up = [e % 1 for e, share in zip(exact, quota.tolist(), strict=True) if share > int(e)]
    rounded_down = [e % 1 for e, share in zip(exact, quota.tolist(), strict=True) if share == int(e)]
    assert min(rounded_up, default=1) >= max(rounded_down, default=0)


@pytest.mark.parametrize(
    ("trust", "labels", "size", "sentence"),
    [
        (np.ones(4), [0, 0, 1, 1], 5, "size=5 is out of range; there are 4 samples"),
        (np.ones(4), [0, 0, 1, 1], -1, "size=-1 is out of range"),
        (np.ones(4), [0, 0, 1, 1], 2.5, "size=2.5 is out of range; use a whole number"),
        (np.ones(3), [0, 0, 1, 1], 2, r"trust has shape \(3,\), labels \(4,\)"),
        (np.ones(4), [0, 0, 1, np.nan], 2, "labels has nan for sample 3, and none for 1 in all"),
    ],
)
def test_more_than_there_are_cannot_be_trusted(trust, labels, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        most_trusted(trust, labels, size, np.random.default_rng(0))


@given(labelled, st.data())
def test_the_choice_is_the_most_trusted_of_each_class(labels, data):
    trusts = st.one_of(st.just(np.nan), st.sampled_from([0.25, 0.5]), st.floats(-10, 10, width=32))
    trust = np.array(data.draw(st.lists(trusts, min_size=len(labels), max_size=len(labels))), np.float32)
    size = data.draw(st.integers(0, len(labels)))
    seed = data.draw(st.integers(0, 3))
    chosen = most_trusted(trust, np.array(labels), size, np.random.default_rng(seed))
    assert chosen.dtype == np.int64
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    _, quota = class_shares(np.array(labels), size, np.random.default_rng(seed))
    for c, share in zip(sorted(set(labels)), quota, strict=True):
        of_class = [-np.inf if np.isnan(t) else t for t, label in zip(trust, labels, strict=True) if label == c]
        ours = [-np.inf if np.isnan(trust[i]) else trust[i] for i in chosen if labels[i] == c]
        assert sorted(ours, reverse=True) == sorted(of_class, reverse=True)[:share]


def test_samples_of_equal_trust_are_drawn_and_the_same_seed_draws_the_same():
    labels, trust = np.zeros(1000, int), np.ones(1000)
    first, again, other = (most_trusted(trust, labels, 100, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 350 < first.mean() < 650


# --- label quality


def confident(n=400, classes=5, seed=0, noise=0.3, empty=False):
    """Probabilities (n, classes), float64, that favour a hidden label, and given labels of which some are wrong."""
    rng = np.random.default_rng(seed)
    hidden = rng.integers(0, classes - empty, n)
    p = rng.dirichlet(np.full(classes, 0.5), n)
    p[np.arange(n), hidden] += rng.exponential(1.0, n)
    labels = np.where(rng.random(n) < noise, rng.integers(0, classes - empty, n), hidden)
    return p / p.sum(1, keepdims=True), labels


def quality(p, labels):
    p, labels = torch.from_numpy(p), torch.from_numpy(labels)
    own = p[torch.arange(len(labels)), labels]
    thresholds = confident_thresholds(own, labels, p.shape[1])
    return label_quality(p, labels, thresholds).numpy(), thresholds.numpy()


@pytest.mark.parametrize("empty", [False, True], ids=["all classes", "one without samples"])
@pytest.mark.parametrize("seed", range(3))
def test_label_quality_is_the_formula_of_confident_learning(seed, empty):
    p, labels = confident(seed=seed, empty=empty)
    score, thresholds = quality(p, labels)
    found = 0
    for k in range(p.shape[1]):
        of_class = [row[k] for row, label in zip(p, labels, strict=True) if label == k]
        assert thresholds[k] == pytest.approx(sum(of_class) / len(of_class) if of_class else np.inf)
    for row, label, ours in zip(p, labels, score, strict=True):
        passing = [k for k in range(len(row)) if row[k] >= thresholds[k]]
        guess = max(passing, key=lambda k: row[k], default=None)
        mislabelled = guess is not None and guess != label
        found += mislabelled
        assert ours == pytest.approx(row[label] - mislabelled)
    assert 20 < found < 200


def test_label_quality_is_cleanlabs_but_for_samples_where_it_departs_from_the_paper():
    p, labels = confident(n=2000)
    score, thresholds = quality(p, labels)
    assert thresholds == pytest.approx(count.get_confident_thresholds(labels, p))
    _, theirs = count.compute_confident_joint(labels, p, return_indices_of_off_diagonals=True)
    flagged = np.isin(np.arange(len(labels)), theirs)
    passing = p >= thresholds
    departs = (passing.sum(1) > 1) & ~passing[np.arange(len(labels)), p.argmax(1)]
    assert departs.mean() < 0.1
    assert np.array_equal((score < 0)[~departs], flagged[~departs])
    assert score + (score < 0) == pytest.approx(rank.get_label_quality_scores(labels, p))


def test_what_cannot_be_told_apart_is_not_called_mislabelled():
    p = np.array([[0.5, 0.5], [0.5, 0.5]])
    assert quality(p, np.array([0, 1]))[0].tolist() == [0.5, 0.5]


def test_shares_of_the_probabilities_give_the_score_of_the_whole():
    p, labels = confident()
    whole, thresholds = quality(p, labels)
    parts = [
        label_quality(torch.from_numpy(p[part]), torch.from_numpy(labels[part]), torch.from_numpy(thresholds))
        for part in (slice(0, 150), slice(150, None))
    ]
    assert np.array_equal(np.concatenate(parts), whole)


# --- the chain


def plugged(reference, losses):
    """A pruning over as many epochs as there are ``losses`` (n,), with their reference losses."""
    pruning = DynamicPruning(range(losses.shape[1]), 20, "infobatch", "das", window=4, ratio=0.0)
    for value, row in zip(reference, losses, strict=True):
        pruning.update(torch.arange(len(row)), row)
        pruning.end_epoch(value)
    return pruning


def test_a_changed_reference_shifts_the_past_and_leaves_correlations_alone():
    losses = torch.from_numpy(np.random.default_rng(0).random((6, 50), np.float32))
    pruning = plugged([3.0, 2.5, 2.25, 2.0, 1.5, 1.75], losses)
    before = [pruning.scores(name) for name in ("das", "spearman")]
    pruning.change_reference(0.5)
    history = pruning.trajectories.history()
    assert history.reference_W.tolist() == [1.0, 0.75, 0.25, 0.5]
    for scores, name in zip(before, ("das", "spearman"), strict=True):
        np.testing.assert_allclose(pruning.scores(name), scores, atol=1e-6)
    pruning.update(torch.arange(50), losses[0])
    pruning.end_epoch(0.25)
    window, chain = torch.cat([losses[3:], losses[:1]]), torch.tensor([0.75, 0.25, 0.5, 0.25])
    np.testing.assert_allclose(pruning.scores("das"), pearson(window, chain), atol=1e-5)
    np.testing.assert_allclose(pruning.scores("spearman"), spearman(window, chain), atol=1e-5)


def test_a_change_to_the_same_set_changes_nothing():
    losses = torch.from_numpy(np.random.default_rng(0).random((5, 20), np.float32))
    pruning = plugged([2.3, 2.1, 1.7, 1.6, 1.1], losses)
    before = pruning.trajectories.reference_W.clone()
    pruning.change_reference(1.1)
    assert torch.equal(pruning.trajectories.reference_W, before)


def test_a_reference_cannot_change_where_there_is_nothing_to_go_on_from():
    losses = torch.rand(2, 20)
    with pytest.raises(ValueError, match="no reference loss to go on from"):
        plugged([], losses[:0]).change_reference(1.0)
    pruning = plugged([2.0, 1.0], losses)
    with pytest.raises(NonFiniteLossError, match="reference loss"):
        pruning.change_reference(float("nan"))
    pruning.update(torch.arange(5), losses[0, :5])
    with pytest.raises(RuntimeError, match="not within an epoch"):
        pruning.change_reference(1.0)


def test_the_population_mean_counts_every_sample_seen_once():
    pruning = DynamicPruning(range(6), 20, "full", "loss", window=3)
    pruning.record(torch.arange(5), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert pruning.trajectories.population_mean() == 3.0
    pruning.end_epoch()
    pruning.record(torch.tensor([0]), torch.tensor([6.0]))
    assert pruning.trajectories.population_mean() == 4.0


def test_a_loop_of_ones_own_finds_clean_samples_without_a_trusted_label():
    rng = np.random.default_rng(0)
    hidden = rng.integers(0, 4, 400)
    x = torch.from_numpy(np.eye(4)[hidden] + 0.3 * rng.standard_normal((400, 4))).float()
    labels = np.where(rng.random(400) < 0.5, rng.integers(0, 4, 400), hidden)
    y, noisy = torch.from_numpy(labels), labels != hidden
    w = torch.zeros(4, 4, requires_grad=True)

    def evaluate(samples):
        return F.cross_entropy((x @ w).detach()[samples], y[samples])

    pruning = DynamicPruning(x, 16, "infobatch", "das", window=4)
    chosen, references = [], []
    for epoch in range(16):
        for index in torch.from_numpy(pruning.order()).split(50):
            pruning.update(index, F.cross_entropy(x[index] @ w, y[index], reduction="none")).backward()
            w.data -= w.grad
            w.grad = None
        pruning.end_epoch(evaluate(chosen) if len(chosen) else pruning.trajectories.population_mean())
        if epoch % 5 == 2:
            chosen = most_trusted(pruning.scores("small_loss"), labels, 40, np.random.default_rng(epoch))
            pruning.change_reference(evaluate(chosen))
            references.append(noisy[chosen].mean())
    assert noisy.mean() > 0.3
    assert len(references) == 3
    assert max(references) < 0.1


# --- runs


class Watched:
    """A run that notes each epoch's reference set, and what each choice was made of."""

    def __init__(self, config):
        self.one = one = Run(config)
        self.labels = one.setup.task.data.train.labels
        self.selections, self.references, self.choices, self.trajectory = [], [], [], []
        self.forwarded = 0
        reference, pruning, learner = one.reference, one.loop.pruning, one.loop.network.learner
        end_epoch, choose = pruning.end_epoch, reference.choose

        def ended(reference_loss):
            self.selections.append(pruning.selection.indices.tolist())
            self.references.append(reference.samples.tolist())
            end_epoch(reference_loss)

        def chose(*args):
            before = self.forwarded
            said = choose(*args)
            assert self.forwarded - before == said
            if said:
                state = {name: value.clone() for name, value in learner.state_dict().items()}
                trust = pruning.scores("small_loss")
                self.choices.append((pruning.epoch, trust, state, reference.samples.tolist()))
            self.trajectory.append(pruning.trajectories.history().reference_W.tolist())
            return said

        def counted(module, args):
            self.forwarded += 0 if module.training else len(args[0])

        pruning.end_epoch, reference.choose = ended, chose
        self.hook = learner.register_forward_pre_hook(counted)

    def run(self):
        self.rows = rows_of(trained(self.one))
        self.hook.remove()
        return self


def outputs(one, state):
    """The network's logits for all training images as they are, computed without the run's own code."""
    data, learner = one.setup.task.data, one.loop.network.learner
    x = torch.stack([data.train[i][0] for i in range(len(data.train))]).double() / 255
    mean, std = (torch.from_numpy(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    learner.load_state_dict(state)
    learner.eval()
    with torch.no_grad():
        return learner(((x - mean) / std).float())


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """One undisturbed run with each kind of reference that needs no trusted labels."""
    results = tmp_path_factory.mktemp("watched")
    return {
        kind: Watched(config_of(results, "precision=fp32", *overrides, base=SMALL)).run()
        for kind, overrides in EVERY_KIND.items()
    }


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_nothing_is_held_out(watched, kind):
    run = watched[kind]
    assert run.one.setup.task.data.reference is None
    assert run.one.loop.pruning.n == len(run.labels) == 300


@pytest.mark.parametrize("kind", METHODS)
def test_the_set_is_chosen_after_the_warm_up_and_again_every_so_many_epochs(watched, kind):
    run = watched[kind]
    assert [epoch for epoch, *_ in run.choices] == CHOSEN_AFTER
    sets = [[], *(chosen for *_, chosen in run.choices)]
    assert run.references == [sets[sum(after <= epoch for after in CHOSEN_AFTER)] for epoch in range(EPOCHS)]
    counts = np.bincount(run.labels)
    for chosen in sets[1:]:
        assert len(set(chosen)) == 30
        assert (np.abs(np.bincount(run.labels[chosen], minlength=10) - counts * 30 / 300) < 1).all()
    assert sets[1] != sets[2]


def best_by_class(trust, labels, chosen):
    for c in set(labels.tolist()):
        of_class = np.flatnonzero(labels == c)
        ours, others = np.intersect1d(of_class, chosen), np.setdiff1d(of_class, chosen)
        assert trust[ours].min(initial=np.inf) >= trust[others].max(initial=-np.inf) - 1e-5


def test_small_loss_chooses_the_lowest_mean_loss_of_each_class(watched):
    run = watched["small_loss"]
    for _, trust, _, chosen in run.choices:
        best_by_class(trust, run.labels, chosen)


def test_cleanlab_chooses_the_best_label_quality_of_each_class(watched):
    run = watched["cleanlab"]
    labels = torch.from_numpy(run.labels)
    for _, _, state, chosen in run.choices:
        p = outputs(run.one, state).softmax(1).double()
        best_by_class(quality(p.numpy(), labels.numpy())[0], labels.numpy(), chosen)


@pytest.mark.parametrize("kind", METHODS)
def test_the_reference_loss_is_that_of_the_chosen_with_their_given_labels_and_its_trajectory_a_chain(watched, kind):
    run = watched[kind]
    labels = torch.from_numpy(run.labels)
    loss = [row["reference_loss"] for row in run.rows]
    begins = dict(enumerate(loss, 1))  # by epoch: what the loss of its set was when it began
    for after, _, state, chosen in run.choices:
        begins[after] = F.cross_entropy(outputs(run.one, state)[chosen], labels[chosen]).item()
    steps = [loss[epoch] - begins[epoch] for epoch in range(1, EPOCHS)]
    for epoch, trajectory in enumerate(run.trajectory):
        assert trajectory[-1] == pytest.approx(begins[epoch + 1], rel=1e-4)
        assert np.diff(trajectory) == pytest.approx(steps[max(0, epoch - 2) : epoch], abs=1e-4)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_before_the_first_choice_the_population_stands_in(watched, kind):
    run, population = watched[kind], watched["population"]
    for row, other in zip(run.rows[:WARMUP], population.rows, strict=False):
        assert row["reference_loss"] == other["reference_loss"]
        assert row["reference_noise"] is None
    first = run.rows[0]  # nothing is pruned in it
    assert first["kept_fraction"] == 1
    assert first["reference_loss"] == pytest.approx(first["train_loss"], rel=1e-6)


def test_the_population_needs_no_forward_pass_of_its_own(watched):
    rows = watched["population"].rows
    assert {row["samples_reference"] for row in rows} == {0}
    assert {row["reference_noise"] for row in rows} == {None}
    assert [row["ranked_by"] for row in rows].count("das") == 5  # epochs 3 to 7 of 8.75


@pytest.mark.parametrize("kind", METHODS)
def test_what_is_forwarded_for_the_reference_is_counted(watched, kind):
    run, choice = watched[kind], 30 + 300 * (kind == "cleanlab")
    expected = [30 * (epoch >= WARMUP) + choice * (epoch + 1 in CHOSEN_AFTER) for epoch in range(EPOCHS)]
    assert [row["samples_reference"] for row in run.rows] == expected
    tested = 100 * EPOCHS
    assert run.forwarded == sum(expected) + tested
    assert all(row["seconds_reference"] > 0 for row in run.rows)


@pytest.mark.parametrize(
    ("line", "before", "chosen_before"),
    [
        (("pruner=static_el2n", "pruner.warmup=12"), [12], [[3, 5, 7, 9, 11]]),
        (("pruner=static_el2n", "pruner.warmup=4"), [4], [[3]]),
        (("method=rho_loss", "score.holdout=2"), [2, 2], [[], []]),
    ],
)
def test_the_epochs_of_each_network_count_for_themselves(tmp_path, line, before, chosen_before):
    rows = rows_of(trained(Run(config_of(tmp_path, *line, *METHODS["small_loss"], base=SMALL))))
    expected, there = [], False
    for epochs, after in zip([*before, EPOCHS], [*chosen_before, CHOSEN_AFTER], strict=True):
        for done in range(1, epochs + 1):
            expected.append(30 * there + 30 * (done in after))
            there |= done in after
    assert [row["samples_reference"] for row in rows] == expected


@pytest.mark.parametrize("kind", METHODS)
def test_the_record_says_how_noisy_the_set_was(watched, kind):
    run = watched[kind]
    noisy = run.one.setup.noisy
    for row, chosen in zip(run.rows, run.references, strict=True):
        assert row["reference_noise"] == (noisy[chosen].mean() if chosen else None)
    assert run.rows[WARMUP]["reference_noise"] < 0.35  # where half of all labels are wrong


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_clean_label_has_a_say(watched, tmp_path, monkeypatch, kind):
    def lying(*given):
        task = open_task(*given)
        train = task.data.train
        task.corrupted = train.labels != np.random.default_rng(0).permutation(train.clean_labels)
        return task

    monkeypatch.setattr("alignprune_exp.setup.open_task", lying)
    run = Watched(config_of(tmp_path, "precision=fp32", *EVERY_KIND[kind], base=SMALL)).run()
    undisturbed = watched[kind]
    assert run.selections == undisturbed.selections
    assert run.references == undisturbed.references
    assert [row["test_loss"] for row in run.rows] == [row["test_loss"] for row in undisturbed.rows]
    assert [row["kept_noise"] for row in run.rows] != [row["kept_noise"] for row in undisturbed.rows]


def test_a_trusted_set_is_as_noisy_as_it_was_made(tmp_path):
    overrides = ("reference.size=40", "reference.noise=0.25", "epochs=5")
    rows = Watched(config_of(tmp_path, *overrides, base=SMALL)).run().rows
    assert [(row["reference_noise"], row["samples_reference"]) for row in rows] == [(0.25, 40)] * 5
    rows = Watched(config_of(tmp_path, "reference=none", "score=loss", "epochs=5", base=SMALL)).run().rows
    assert [(row["reference_noise"], row["samples_reference"], row["reference_loss"]) for row in rows] == [
        (None, 0, None)
    ] * 5


# --- the command line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("reference.method=cleanlab", ["reference.method", "belongs to", "reference=pseudo"]),
        ("reference=pseudo reference.noise=0.1", ["reference.noise", "trusted", "reference=pseudo has"]),
        ("reference=population reference.size=3", ["reference.size", "population has no keys"]),
        ("reference=pseudo reference.method=cleanlb", ["small_loss or cleanlab"]),
        ("reference=pseudo reference.warmup=10", ["reference.warmup=10", "at most 9", "reference=population"]),
        ("reference=pseudo reference.every=0", ["reference.every=0", "at least 1"]),
        ("reference=pseudo reference.size=0", ["reference.size=0", "above 0"]),
        ("reference=pseudo reference.size=1.5", ["reference.size=1.5", "whole number"]),
        ("reference=pseudo reference.size=300", ["reference.size=300 takes 300 of 300"]),
        ("reference=pseudo reference.size=0.001", ["reference.size=0.001 takes 0 of 300"]),
        ("reference=none", ["score=das", "reference=pseudo"]),
    ],
)
def test_a_mistake_gets_one_sentence(refused, tmp_path, line, words):
    assert missing(words, refused(*SMALL, f"paths.results={tmp_path / 'results'}", *line.split())) == []


@pytest.mark.parametrize("kind", ["pseudo", "pseudo_cleanlab", "population"])
def test_the_main_job_made_small_runs_with_each_kind_of_reference(tmp_path, capsys, kind):
    assert main([f"paths.results={tmp_path}", f"reference={kind}", "epochs=13", "dataset.subset=400"]) == 0
    summary, rows = summary_of(only_run(tmp_path)), rows_of(only_run(tmp_path))
    assert summary["status"] == "finished"
    assert summary["samples"] == 400  # all of them
    assert summary["test_accuracy_final"] > 30
    assert [row["ranked_by"] for row in rows][10:11] == ["das"]
    assert rows[-1]["auroc_das"] is not None


def test_the_suite_compares_the_kinds_at_equal_everything_else():
    line = ["scale=cpu", "paths.data=/nowhere", "dataset=cifar10", "noise=real"]
    suite = load_suite("reference_free", line)
    kinds = ["trusted", "pseudo", "pseudo_cleanlab", "population"]
    assert [cell.axes["reference"] for cell in suite.cells[::3]] == kinds
    same = [cell.config.model_dump(exclude={"reference"}) for cell in suite.cells if cell.axes["seed"] == "0"]
    assert len(same) == 4
    assert all(values == same[0] for values in same)
    assert len({cell.config_id for cell in suite.cells}) == 12
    columns = {(cell.axes["dataset"], cell.axes["noise"]) for cell in load_suite("reference_free", line[:2]).cells}
    assert columns == {("cifar10", "real"), ("cifar10", "sym0.5"), ("cifar100", "sym0.5")}
