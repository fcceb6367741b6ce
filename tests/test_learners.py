"""Robust learners: every loss against its paper's formula written a second way, and each learner in whole runs."""

import math
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.nn import functional as F

from alignprune_exp.advice import inert_keys
from alignprune_exp.commandline import config_dir
from alignprune_exp.config import LEARNER, identity, validate
from alignprune_exp.errors import UsageError
from alignprune_exp.learners import Step
from alignprune_exp.learners import base as learners
from alignprune_exp.learners.ce import CrossEntropy
from alignprune_exp.learners.dividemix import clean_probability, mix, sharpen, targets
from alignprune_exp.pruning import PRUNERS, NonFiniteLossError
from alignprune_exp.pruning.readout import WEAK, readout
from alignprune_exp.pruning.seeding import generator
from alignprune_exp.pruning.transition import transition
from alignprune_exp.run import Run
from alignprune_exp.tasks import TASKS
from alignprune_exp.tasks.classification import Classification, features_given
from harness import composed, config_of, id_of, metrics_of, only_run, summary_of, trained

N, B, C, PIXELS = 12, 6, 4, 5
LEARNERS = ("ce", "elr", "sop", "refurbish", "posterior", "dividemix")
TINY = ("epochs=5", "score.window=3", "batch_size=16", "dataset.subset=60", "dataset.test_subset=20")
SHORT = {"dividemix": ("learner.warmup=2", "learner.rampup=2")}  # so that it divides within a tiny run


def made(*overrides):
    """A learner with linear networks, in float64, on N samples."""
    torch.manual_seed(0)
    config = composed(*overrides)
    task = SimpleNamespace(classes=range(C), losses=partial(Classification.losses, None))
    networks = [nn.Linear(PIXELS, C) for _ in range(LEARNER.find(config.learner.name).count)]
    return LEARNER.make(config.learner, networks, learners.Given(task, N, config.seed, config.label_smoothing)).double()


def step_of(views=1, epoch=0, number=0, steps=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    index = torch.randperm(N, generator=draw)[:B]
    images = torch.randn(views * B, PIXELS, generator=draw, dtype=torch.float64)
    return Step(index, images, torch.randint(C, (B,), generator=draw), epoch, number, steps)


def one_hot(labels):
    return torch.eye(C, dtype=torch.float64)[labels]


class Given:
    """Logits in place of a network's, so that the gradient by them can be looked at."""

    def __init__(self, scale=1.0, seed=1):
        draw = torch.Generator().manual_seed(seed)
        self.logits = (scale * torch.randn(B, C, generator=draw, dtype=torch.float64)).requires_grad_()

    def __call__(self, images):
        return self.logits


# --- cross-entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_and_its_plain_loss_is_not_smoothed(smoothing):
    step, given = step_of(), Given()
    plain, training, predicted = made(f"label_smoothing={smoothing}").losses(step, given)
    torch.testing.assert_close(plain, F.cross_entropy(given.logits, step.targets, reduction="none"))
    expected = F.cross_entropy(given.logits, step.targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(training, expected)
    assert torch.equal(predicted, given.logits.argmax(1))


@pytest.mark.parametrize("learner", LEARNERS)
def test_what_is_recorded_is_the_plain_cross_entropy_whatever_is_trained_on(learner):
    one = made(f"learner={learner}")
    step = step_of(one.views)
    plain, training, _ = one.losses(step, one)
    expected = F.cross_entropy(one.networks[0](step.inputs[:B]), step.targets, reduction="none")
    torch.testing.assert_close(plain, expected)
    assert plain.shape == training.shape == (B,)
    assert torch.equal(plain, training) == (learner in ("ce", "refurbish"))  # which has no history yet


# --- probabilities of classes in place of labels


def test_the_cross_entropy_is_of_what_is_told_of_a_sample():
    one, step, given = made("learner=posterior"), step_of(), Given()
    told = torch.rand(N, C - 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one.tell(told / told.sum(1, keepdim=True))
    _, training, predicted = one.losses(step, given)
    for row, (index, logits) in enumerate(zip(step.index, given.logits, strict=True)):
        log_p = logits.log_softmax(0)
        expected = -sum(p / told[index].sum() * log_p[c] for c, p in enumerate(told[index]))
        torch.testing.assert_close(training[row], expected)
    assert torch.equal(predicted, given.logits.argmax(1))


@pytest.mark.parametrize("line", [(), ("method=sieve_transition",), ("method=shorter", "saved=0.6")])
def test_a_run_is_told_once_of_its_samples_classes_by_their_patches(line, tmp_path):
    one = Run(tiny(tmp_path, "posterior", "noise=sym0.5", *line))
    task, counted = one.setup.task, []
    told = transition(task.features(torch.arange(one.setup.n)), torch.from_numpy(task.strata), WEAK).classes
    while one.loop.pruning.epoch < one.loop.pruning.epochs:
        counted.append(one.loop.epoch(threading.Event(), None).refreshed)
        assert torch.equal(one.loop.network.learner.target_NC, told)
    assert counted == [one.setup.n] + [0] * (len(counted) - 1)


def test_a_score_by_the_networks_embeddings_is_told_of_these_and_not_of_the_learners_features(tmp_path):
    line = ("method=sieve_readout", "score.every=1", "pruner.warmup=1")
    one = Run(tiny(tmp_path, "posterior", "noise=sym0.5", *line))
    now = one.loop.epoch(threading.Event(), None)
    own = one.setup.task.outputs(one.loop.network, one.setup.task.train.evaluation(one.setup.own))[1]
    assert torch.equal(one.loop.pruning.told, readout(own, torch.from_numpy(one.setup.task.strata)).margins)
    assert now.refreshed == 2 * one.setup.n


def test_wrong_labels_are_shared_out_among_the_classes_that_fit():
    one = Run(composed("learner=posterior", "noise=sym0.5", "dataset.subset=null"))
    train, every = one.setup.task.data.train, np.arange(one.setup.n)
    one.loop._foretell()
    told = one.loop.network.learner.target_NC.numpy()
    assert (told.argmax(1) == train.clean_labels).mean() > 0.7 > (train.labels == train.clean_labels).mean() + 0.15
    given, right = (told[every, labels] for labels in (train.labels, train.clean_labels))
    assert given[train.wrong].mean() < right[train.wrong].mean() < given[~train.wrong].mean()


# --- refurbished labels


@pytest.mark.parametrize(("history", "uncertainty"), [(1, 0.0), (3, 0.0), (3, 0.5), (4, 0.45), (5, 0.99)])
def test_labels_are_refurbished_by_the_rule_over_many_steps(history, uncertainty):
    """Lists of predictions, Python's entropy and its most common one, against buffers and tensors."""
    one = made("learner=refurbish", f"learner.history={history}", f"learner.uncertainty={uncertainty}")
    said = [[] for _ in range(N)]
    changed = 0
    for number in range(60):
        step, given = step_of(seed=number), Given(scale=2.0, seed=number % 7)
        plain, training, predicted = one.losses(step, given)
        log_p = given.logits.detach().log_softmax(1)
        for b, (i, label) in enumerate(zip(step.index.tolist(), step.targets.tolist(), strict=True)):
            last, target = said[i][-history:], label
            shares = [last.count(c) / history for c in range(C)]
            entropy = sum(-share * math.log(share) for share in shares if share) / math.log(C)
            if len(last) == history and entropy <= uncertainty:
                target = max(range(C), key=lambda c: (shares[c], -c))
            changed += target != label
            assert plain[b].item() == pytest.approx(-log_p[b, label].item())
            assert training[b].item() == pytest.approx(-log_p[b, target].item())
            assert predicted[b].item() == log_p[b].argmax().item()
            said[i].append(predicted[b].item())
    assert changed > 10


# --- early-learning regularisation


def elr_by_hand(target, index, logits, labels, beta, coefficient):
    """The formula sample by sample; changes ``target``."""
    losses = []
    for i, z, y in zip(index.tolist(), logits.tolist(), labels.tolist(), strict=True):
        p = [math.exp(v) / sum(math.exp(w) for w in z) for v in z]
        clamped = [min(max(v, 1e-4), 1 - 1e-4) for v in p]
        for c in range(C):
            target[i][c] = beta * target[i][c] + (1 - beta) * clamped[c] / sum(clamped)
        inner = sum(a * b for a, b in zip(clamped, target[i], strict=True))
        losses.append(-math.log(p[y]) + coefficient * math.log(1 - inner))
    return losses


def test_elr_is_its_formula_over_many_steps_and_remembers_the_rows_of_the_batch_alone():
    one = made("learner=elr")
    by_hand = np.zeros((N, C)).tolist()
    for number in range(8):
        step, given = step_of(seed=number), Given(scale=4.0, seed=number)
        before = one.target_NC.clone()
        _, training, _ = one.losses(step, given)
        expected = elr_by_hand(by_hand, step.index, given.logits, step.targets, beta=0.7, coefficient=3.0)
        assert training.tolist() == pytest.approx(expected)
        others = torch.ones(N, dtype=torch.bool).index_fill_(0, step.index, False)
        assert torch.equal(one.target_NC[others], before[others])
        assert (one.target_NC != before).any(1)[step.index].all()
        torch.testing.assert_close(one.target_NC, torch.tensor(by_hand, dtype=torch.float64))


def test_elrs_gradient_is_the_papers():
    """p - y + λg with g_c = p_c / (1 - <p, t>) · Σ_k (t_k - t_c) p_k: no clamp acts on predictions this moderate."""
    one, step, given = made("learner=elr"), step_of(), Given()
    one.target_NC.copy_(torch.rand(N, C, dtype=torch.float64).softmax(1))
    one.losses(step, given)[1].sum().backward()
    p, t = given.logits.detach().softmax(1), one.target_NC[step.index]
    g = torch.stack([p[:, c] / (1 - (p * t).sum(1)) * ((t - t[:, [c]]) * p).sum(1) for c in range(C)], 1)
    torch.testing.assert_close(given.logits.grad, p - one_hot(step.targets) + 3.0 * g)


def test_elr_stays_finite_where_a_network_is_sure_of_itself():
    one, step = made("learner=elr"), step_of()
    for _ in range(100):
        given = Given(scale=1000.0)
        one.losses(step, given)[1].sum().backward()
        assert given.logits.grad.isfinite().all()
    assert one.target_NC.isfinite().all()


# --- sparse over-parameterisation


def sop(lr_u=0.7, lr_v=0.4):
    one = made("learner=sop", f"learner.lr_u={lr_u}", f"learner.lr_v={lr_v}")
    draw = torch.Generator().manual_seed(5)
    one.u_N.copy_(torch.rand(N, generator=draw) * 0.6)
    one.v_NC.copy_(torch.rand(N, C, generator=draw) * 0.1)
    return one


def sop_by_hand(u, v, z, y):
    """One sample's two losses: the cross-entropy of the prediction with its error, and the squared distance."""
    p = [math.exp(a) / sum(math.exp(b) for b in z) for a in z]
    error = [min(u**2, 1) if c == y else -min(v[c] ** 2, 1) for c in range(C)]
    with_error = [max(a + b, 1e-4) for a, b in zip(p, error, strict=True)]
    entropy = -math.log(max(with_error[y] / sum(with_error), 1e-4))
    hard = [float(c == max(range(C), key=z.__getitem__)) for c in range(C)]
    return entropy, sum((hard[c] + error[c] - (c == y)) ** 2 for c in range(C))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_sop_is_its_formula(scale):
    one, step, given = sop(), step_of(), Given(scale)
    one.u_N[step.index[0]] = 3.0  # beyond the clamp
    one.v_NC[step.index[1]] = -2.0
    _, training, _ = one.losses(step, given)
    rows = zip(step.index.tolist(), given.logits.tolist(), step.targets.tolist(), strict=True)
    expected = [sum(sop_by_hand(float(one.u_N[i]), one.v_NC[i].tolist(), z, y)) for i, z, y in rows]
    assert training.tolist() == pytest.approx(expected)


def test_sops_gradients_are_the_papers_and_those_of_finite_differences():
    """The cross-entropy moves the network and u, the squared distance v; by hand, where no clamp acts."""
    one, step, given = sop(), step_of(), Given()
    u, v, y = one.u_N[step.index], one.v_NC[step.index], one_hot(step.targets)
    p = given.logits.detach().softmax(1)
    assert (p - v.square()).min() > 1e-4
    hard = one_hot(given.logits.argmax(1))
    weights = torch.linspace(0.5, 2.0, B, dtype=torch.float64)
    before_u, before_v = one.u_N.clone(), one.v_NC.clone()
    (weights * one.losses(step, given)[1]).sum().backward()
    one.after_backward()

    there = (p * y).sum(1) + u.square()
    mass = 1 + u.square() - ((1 - y) * v.square()).sum(1)
    by_u = weights * 2 * u * (1 / mass - 1 / there)
    by_v = weights[:, None] * -4 * v * (hard - v.square()) * (1 - y)
    torch.testing.assert_close(before_u[step.index] - one.u_N[step.index], 0.7 * by_u)
    torch.testing.assert_close(before_v[step.index] - one.v_NC[step.index], 0.4 * by_v)
    share = ((p * y).sum(1) / there)[:, None]
    torch.testing.assert_close(given.logits.grad, weights[:, None] * share * (p - y))

    h = 1e-6
    for k, (i, z, label) in enumerate(zip(step.index, given.logits.tolist(), step.targets.tolist(), strict=True)):
        ui, vi = float(before_u[i]), before_v[i].tolist()
        slope = sop_by_hand(ui + h, vi, z, label)[0] - sop_by_hand(ui - h, vi, z, label)[0]
        assert by_u[k].item() == pytest.approx(weights[k].item() * slope / (2 * h), abs=1e-7)
        for c in range(C):
            ups, downs = ([x + d * (c == j) for j, x in enumerate(vi)] for d in (h, -h))
            slope = sop_by_hand(ui, ups, z, label)[1] - sop_by_hand(ui, downs, z, label)[1]
            assert by_v[k, c].item() == pytest.approx(weights[k].item() * slope / (2 * h), abs=1e-7)


def test_sop_moves_the_rows_of_the_batch_alone_and_starts_from_small_addressed_draws():
    one, again, other = (made("learner=sop", f"seed={seed}") for seed in (0, 0, 1))
    assert torch.equal(one.u_N, again.u_N)
    assert not torch.equal(one.v_NC, other.v_NC)
    assert 0.3e-8 < one.v_NC.std() < 3e-8
    assert not dict(one.networks.named_parameters()).keys() & {"u_N", "v_NC"}
    step, one = step_of(), sop()
    before = one.u_N.clone(), one.v_NC.clone()
    one.losses(step, Given())[1].mean().backward()
    one.after_backward()
    others = torch.ones(N, dtype=torch.bool).index_fill_(0, step.index, False)
    for values, old in zip((one.u_N, one.v_NC), before, strict=True):
        assert torch.equal(values[others], old[others])
        assert not torch.equal(values[step.index], old[step.index])


# --- the division of DivideMix


def test_the_probability_of_being_clean_is_scikit_learns():
    losses = np.random.default_rng(0).gamma(2.0, 1.0, 300)
    scaled = ((losses - losses.min()) / (losses.max() - losses.min())).reshape(-1, 1)
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=3).fit(scaled)
    expected = mixture.predict_proba(scaled)[:, np.argmin(mixture.means_)]
    np.testing.assert_array_equal(clean_probability(losses, 3), expected)
    np.testing.assert_allclose(clean_probability(5 * losses + 2, 3), expected, rtol=1e-6)  # scaled to [0, 1]


def test_losses_far_apart_are_divided_and_equal_ones_are_all_clean():
    rng = np.random.default_rng(1)
    low, high = rng.normal(0.3, 0.05, 70), rng.normal(2.5, 0.3, 30)
    clean = clean_probability(np.concatenate([low, high]), 0)
    assert clean[:70].min() > 0.99
    assert clean[70:].max() < 0.01
    for n in (1, 2, 50):
        assert clean_probability(np.full(n, 0.7), 0).tolist() == [1.0] * n
    assert clean_probability(np.array([0.1, 2.0]), 0).round(3).tolist() == [1.0, 0.0]


def test_dividing_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        clean_probability(np.random.default_rng(0).gamma(2.0, 1.0, 3000), 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Selected:
    """Some samples in batches, as an epoch begins with them."""

    def __init__(self, count=9, batch=4):
        draw = torch.Generator().manual_seed(7)
        self.index = torch.randperm(N, generator=draw)[:count]
        self.images = torch.randn(count, PIXELS, generator=draw, dtype=torch.float64)
        self.labels = torch.randint(C, (count,), generator=draw)
        parts = (each.split(batch) for each in (self.index, self.images, self.labels))
        self.batches = list(zip(*parts, strict=True))


def test_each_network_divides_for_the_other_and_the_first_ones_losses_are_recorded():
    one, selected = made("learner=dividemix", "learner.warmup=3", "seed=4"), Selected()
    one.begin_epoch(2, iter(()), one)  # in the warm-up nobody looks
    assert not one.clean_2N.any()
    one.train()
    one.begin_epoch(3, selected.batches, one)
    assert not one.training
    losses = [F.cross_entropy(net(selected.images), selected.labels, reduction="none") for net in one.networks]
    torch.testing.assert_close(one.plain_N[selected.index], losses[0].detach())
    for network in (0, 1):
        seed = int(generator(4, "mixture", 3, network).integers(2**31))
        expected = clean_probability(losses[1 - network].detach().numpy(), seed)
        np.testing.assert_allclose(one.clean_2N[network][selected.index], expected, atol=1e-9)
    assert not torch.equal(one.clean_2N[0], one.clean_2N[1])
    total = sum(net(selected.images) for net in one.networks)
    assert torch.equal(one.predicted_N[selected.index], total.argmax(1))
    index = selected.index[:B]
    step = Step(index, torch.randn(2 * B, PIXELS, dtype=torch.float64), selected.labels[:B], 3, 0, 2)
    plain, _, predicted = one.losses(step, one)
    assert torch.equal(plain, one.plain_N[index])
    assert torch.equal(predicted, one.predicted_N[index])


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_divided():
    one, selected = made("learner=dividemix", "learner.warmup=1"), Selected()
    with torch.no_grad():
        one.networks[1].weight.fill_(math.inf)
    with pytest.raises(NonFiniteLossError, match="epoch 2, step 0"):
        one.begin_epoch(2, selected.batches, one)


# --- MixMatch


def test_sharpening_raises_to_a_power_and_normalises():
    p = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    expected = [[v ** (1 / 0.4) / sum(w ** (1 / 0.4) for w in row) for v in row] for row in p.tolist()]
    torch.testing.assert_close(sharpen(p, 0.4), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(sharpen(p, 1.0), p)
    assert sharpen(p, 0.01)[0, 0] > 1 - 1e-9
    assert sharpen(torch.full((1, 1000), 1e-3), 0.01).sum().item() == pytest.approx(1)  # 1e-300 is no float32


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_mixing_is_convex_and_keeps_more_of_the_image_than_of_its_partner(share):
    images, target = torch.randn(8, 2, 3, 3), torch.rand(8, C).softmax(1)
    partner = torch.randperm(8)
    mixed, mixed_target = mix(images, target, share, partner)
    kept = max(share, 1 - share)
    for k in range(8):
        torch.testing.assert_close(mixed[k], kept * images[k] + (1 - kept) * images[partner[k]])
        torch.testing.assert_close(mixed_target[k], kept * target[k] + (1 - kept) * target[partner[k]])
    torch.testing.assert_close(mixed_target.sum(1), torch.ones(8))
    itself = mix(images, target, share, torch.arange(8))
    torch.testing.assert_close(itself[0], images)


@pytest.mark.parametrize("network", [0, 1])
def test_clean_labels_are_refined_by_the_network_itself_and_others_guessed_by_both(network):
    p = torch.randn(2, 2, B, C, dtype=torch.float64).softmax(-1)
    clean = torch.rand(B, dtype=torch.float64)
    labelled, labels = clean > 0.5, torch.randint(C, (B,))
    found = targets(p, network, clean, labelled, labels, temperature=1.0)
    for k in range(B):
        if labelled[k]:
            own = (p[network, 0, k] + p[network, 1, k]) / 2
            expected = clean[k] * one_hot(labels[k]) + (1 - clean[k]) * own
        else:
            expected = (p[0, 0, k] + p[0, 1, k] + p[1, 0, k] + p[1, 1, k]) / 4
        torch.testing.assert_close(found[k], expected)
    torch.testing.assert_close(targets(p, network, clean, labelled, labels, 0.5), sharpen(found, 0.5))


def published(one, step, settings, seed):
    """Both networks' losses as the paper writes them, over the parts of the batch, with the same draws."""
    first, second = step.inputs.chunk(2)
    with torch.no_grad():
        p = [[net(view).softmax(1) for view in (first, second)] for net in one.networks]
    total = 0
    for k in (0, 1):
        clean = one.clean_2N[k][step.index]
        x, u = (clean > 0.5).nonzero().squeeze(1), (clean <= 0.5).nonzero().squeeze(1)
        target = torch.empty(B, C, dtype=torch.float64)
        w = clean[x, None]
        target[x] = w * one_hot(step.targets[x]) + (1 - w) * (p[k][0][x] + p[k][1][x]) / 2
        target[u] = (p[0][0][u] + p[0][1][u] + p[1][0][u] + p[1][1][u]) / 4
        target = target**2 / (target**2).sum(1, keepdim=True)  # T = 0.5
        rng = generator(seed, "mixmatch", step.epoch, step.number, k)
        share = rng.beta(4.0, 4.0)
        partner = torch.from_numpy(rng.permutation(2 * B))
        share = max(share, 1 - share)
        images, both = step.inputs, torch.cat([target, target])
        logits = one.networks[k](share * images + (1 - share) * images[partner])
        both = share * both + (1 - share) * both[partner]
        xs, us = torch.cat([x, x + B]), torch.cat([u, u + B])
        loss_x = F.cross_entropy(logits[xs], both[xs]) if len(x) else 0.0
        loss_u = F.mse_loss(logits[us].softmax(1), both[us]) if len(u) else 0.0
        progress = (step.epoch + step.number / step.steps - settings["warmup"]) / settings["rampup"]
        mean = logits.softmax(1).mean(0)
        penalty = sum(1 / C * math.log(1 / C) - 1 / C * m.log() for m in mean)
        total = total + loss_x + settings["lambda_u"] * min(max(progress, 0.0), 1.0) * loss_u + penalty
    return total


@pytest.mark.parametrize("labelled", ["some", "all", "none"])
@pytest.mark.parametrize(("epoch", "number"), [(2, 0), (2, 3), (9, 1)])
def test_a_step_of_dividemix_is_the_published_loss_and_its_guesses_are_constants(labelled, epoch, number):
    settings = {"warmup": 2, "rampup": 4, "lambda_u": 25.0}
    one = made("learner=dividemix", "learner.warmup=2", "learner.rampup=4", "seed=6")
    step = step_of(views=2, epoch=epoch, number=number)
    clean = torch.rand(2, N, dtype=torch.float64)
    one.clean_2N.copy_({"some": clean, "all": clean / 2 + 0.5, "none": clean / 2}[labelled])
    weights = torch.full((B,), 2.0, dtype=torch.float64)
    _, training, _ = one.losses(step, one)
    assert training.shape == (B,)
    expected = published(one, step, settings, seed=6)
    assert training.mean().item() == pytest.approx(expected.item())
    parameters = list(one.parameters())
    ours = torch.autograd.grad((weights * training).sum() / B, parameters)
    for gradient, reference in zip(ours, torch.autograd.grad(2 * expected, parameters), strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("penalised", [False, True])
def test_the_warm_up_is_cross_entropy_of_each_network_on_its_own_view(penalised):
    one = made("learner=dividemix", f"learner.confidence_penalty={str(penalised).lower()}")
    step = step_of(views=2)
    _, training, predicted = one.losses(step, one)
    logits = [net(view) for net, view in zip(one.networks, step.inputs.chunk(2), strict=True)]
    expected = sum(F.cross_entropy(each, step.targets, reduction="none") for each in logits)
    if penalised:
        expected = expected - sum(torch.distributions.Categorical(logits=each).entropy() for each in logits)
    torch.testing.assert_close(training, expected)
    assert torch.equal(predicted, (logits[0] + logits[1]).argmax(1))


def test_two_networks_start_apart_and_are_evaluated_as_their_mean():
    one = made("learner=dividemix")
    assert not torch.equal(one.networks[0].weight, one.networks[1].weight)
    images = torch.randn(B, PIXELS, dtype=torch.float64)
    logits = [net(images) for net in one.networks]
    torch.testing.assert_close(one(images).double(), (logits[0] + logits[1]) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(one(images, 0), logits[0])
    assert torch.equal(one(images, 1), logits[1])


# --- configs


def test_cross_entropy_is_the_default_and_no_part_of_a_runs_identity():
    assert composed().learner.name == "ce"
    assert "learner" not in identity(composed("learner=ce"), "")
    assert len({id_of(composed(f"learner={name}")) for name in LEARNERS}) == len(LEARNERS)


@pytest.mark.parametrize("learner", LEARNERS[1:])
def test_every_setting_of_a_learner_changes_the_id(learner):
    values = composed(f"learner={learner}").model_dump()
    settings = values["learner"]
    for key in settings.keys() - {"name", "file"}:  # which is known by what is in it
        value = settings[key]
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2
        changed = validate(values | {"learner": settings | {key: other}})
        assert id_of(changed) != id_of(composed(f"learner={learner}")), key


@pytest.mark.parametrize("learner", LEARNERS)
def test_smoothing_is_for_cross_entropy_alone_and_leaves_no_trace_elsewhere(learner):
    smoothed = (f"learner={learner}", "label_smoothing=0.1", "recorded=smoothed")
    assert (id_of(composed(f"learner={learner}")) == id_of(composed(*smoothed))) == (learner != "ce")
    config = composed(*smoothed)
    assert (config.label_smoothing, config.recorded) == ((0.1, "smoothed") if learner == "ce" else (0.0, "plain"))
    notes = [note for note in inert_keys(config, smoothed) if "label_smoothing, recorded has no effect" in note]
    assert len(notes) == (learner != "ce")


@pytest.mark.parametrize("task", TASKS)
def test_smoothing_is_for_losses_of_classes_alone_and_leaves_no_trace_elsewhere(task):
    smoothed, of_classes = (
        (f"task={task}", "label_smoothing=0.1", "recorded=smoothed"),
        task not in ("detection", "regression"),
    )
    assert (id_of(composed(f"task={task}")) == id_of(composed(*smoothed))) == (not of_classes)
    config = composed(*smoothed)
    assert (config.label_smoothing, config.recorded) == ((0.1, "smoothed") if of_classes else (0.0, "plain"))
    note = f"label_smoothing, recorded has no effect under task={task}, which does not smooth"
    assert (note in inert_keys(config, smoothed)) == (not of_classes)


@pytest.mark.parametrize("task", TASKS)
def test_a_flip_of_what_has_no_left_and_right_is_said_to_have_no_effect_and_leaves_no_trace(task):
    flipped, of_images = (f"task={task}", "dataset.flip=true"), task not in ("language", "regression")
    config = composed(*flipped)
    assert config.dataset.flip == of_images
    note = f"dataset.flip has no effect under task={task}, which mirrors nothing"
    assert (note in inert_keys(config, flipped)) == (not of_images)


def test_what_the_authors_chose_for_cifar100_follows_from_the_data_set_and_yields_to_the_command_line():
    on = ("dataset=cifar100", "dataset.root=/nowhere")
    elr = composed(*on, "learner=elr").learner
    assert (elr.beta, elr.coefficient) == (0.9, 7.0)
    assert composed(*on, "learner=elr", "learner.beta=0.3").learner.beta == 0.3
    assert composed(*on, "learner=sop").learner.lr_u == 1.0
    assert composed(*on, "learner=dividemix").learner.lambda_u == 150.0
    for learner in LEARNERS:
        ten = composed("dataset=cifar10", "dataset.root=/nowhere", f"learner={learner}")
        assert ten.learner == composed(f"learner={learner}").learner


ELR, SOP_100 = {"beta": 0.7, "coefficient": 3.0}, {"lr_u": 1.0, "lr_v": 10.0}
ASYM = ("asym0.2", "asym0.4", "asym")


@pytest.mark.parametrize(
    ("learner", "dataset", "noises", "expected"),
    [
        ("elr", "cifar10", ASYM, {"beta": 0.9, "coefficient": 1.0}),
        ("elr", "cifar10", ("sym0.5", "sym", "clean", "real"), ELR),
        ("elr", "cifar100", ("sym0.5", "asym0.4", "real"), {"beta": 0.9, "coefficient": 7.0}),
        ("elr", "digits", ASYM, ELR),
        ("sop", "cifar10", ("sym0.5", "asym0.4"), {"lr_u": 10.0, "lr_v": 10.0}),
        ("sop", "cifar10", ("real",), {"lr_u": 10.0, "lr_v": 100.0}),
        ("sop", "cifar100", ("sym0.2", "clean"), SOP_100),
        ("sop", "cifar100", ASYM, {"lr_u": 0.1, "lr_v": 100.0}),
        ("sop", "cifar100", ("real",), {"lr_u": 1.0, "lr_v": 100.0}),
        ("dividemix", "cifar10", ("sym0.5", "real"), {"warmup": 10, "alpha": 4.0, "lambda_u": 25.0}),
        ("dividemix", "webvision", (None,), {"warmup": 1, "alpha": 0.5, "lambda_u": 0.0, "confidence_penalty": False}),
        ("dividemix", "clothing1m", (None,), {"warmup": 1, "alpha": 0.5, "lambda_u": 0.0, "confidence_penalty": True}),
    ],
)
def test_constants_are_the_authors_for_each_data_set_and_noise(learner, dataset, noises, expected):
    root = () if dataset == "digits" else ("dataset.root=/nowhere",)
    for noise in noises:
        line = (f"dataset={dataset}", *root, f"learner={learner}", *([f"noise={noise}"] if noise else []))
        found = composed(*line).learner.model_dump()
        assert {key: found[key] for key in expected} == expected, noise
        key, value = next(iter(expected.items()))
        assert getattr(composed(*line, f"learner.{key}={value / 2 if value < 1 else 2}").learner, key) in (
            value / 2,
            2,
        )


def test_every_asymmetric_noise_there_is_has_the_constants_of_asymmetric_noise():
    folder = config_dir() / "recipe" / "noise"
    options = {path.stem for path in (config_dir() / "noise").glob("asym*.yaml")}
    for stem in ("elr_cifar10", "sop_cifar100"):
        assert {path.stem.removeprefix(f"{stem}_") for path in folder.glob(f"{stem}_asym*.yaml")} == options


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("learner=dividemix", "learner.warmup=36"), "learner.warmup=36 leaves dividemix none of 36 epochs"),
        (("learner=dividemix", "compile=true"), "compile is not for learner=dividemix"),
        (("learner=elr", "learner.beta=1"), "learner.*beta=1.* out of range"),
        (("learner=sop", "learner.std=0"), "learner.*std=0.* out of range"),
        (("learner=refurbish", "learner.history=0"), "learner.*history=0.* out of range"),
    ],
)
def test_a_mistake_is_one_sentence(overrides, words):
    with pytest.raises(UsageError, match=words):
        composed(*overrides)
    composed("learner=dividemix", "learner.warmup=35")


class Filed(CrossEntropy):
    """One of somebody's own, whose file is none of features."""

    def __init__(self, networks, given, *, file: str):
        super().__init__(networks, given)


def test_a_file_that_is_none_of_features_is_not_read_as_one_and_changes_the_id():
    values = composed().model_dump()
    one, other = (validate(values | {"learner": {"name": "test_learners.Filed", "file": file}}) for file in "ab")
    assert features_given(one) is None
    assert id_of(one) != id_of(other)


@pytest.mark.parametrize("learner", [name for name in LEARNERS if LEARNER.find(name).remembers])
def test_several_processes_are_refused_before_anything_is_read(learner, monkeypatch):
    monkeypatch.setattr("alignprune_exp.setup.open_task", None)
    with pytest.raises(UsageError, match=f"learner={learner} .* use learner=ce, or one process"):
        Run(composed(f"learner={learner}"), SimpleNamespace(size=2, rank=0, local=0))


# --- whole runs


def tiny(results, learner, *overrides):
    alone = ("threads=1", "reference.size=8", f"learner={learner}")
    return config_of(results, *alone, *SHORT.get(learner, ()), *overrides, base=TINY)


CHOICES = [(name, "das" if PRUNERS[name].uses_scores else "loss") for name in PRUNERS] + [("infobatch", "loss")]


@pytest.mark.parametrize(("number", "learner"), list(enumerate(LEARNERS)))
def test_every_learner_composes_with_pruners_and_scores(number, learner, tmp_path):
    """Cross-entropy with all, the others with a third of them each, and together with all."""
    values = tiny(tmp_path, learner).model_dump()
    for pruner, score in CHOICES if learner == "ce" else CHOICES[number % 3 :: 3]:
        settings = yaml.safe_load((config_dir() / "pruner" / f"{pruner}.yaml").read_text())
        settings |= {"warmup": 1} if "warmup" in settings else {}
        values |= {"pruner": settings, "score": values["score"] | {"name": score}}
        one = Run(validate(values))
        rows = metrics_of(trained(one))
        assert len(rows) == one.setup.epochs
        assert all(math.isfinite(row["train_loss"]) for row in rows)
        if pruner not in ("full", "shorter"):
            assert min(row["kept_fraction"] for row in rows) < 1, (pruner, score)
        losses = one.loop.pruning.trajectories.last_N
        assert losses.isfinite().all()
        assert all(value.isfinite().all() for value in one.loop.network.learner.state_dict().values())


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_bank_and_the_forward_passes_of_a_run_are_what_they_say(learner, tmp_path):
    """Every recorded loss is the first network's plain one: in training, or after the warm-up in eval mode before."""
    one = Run(tiny(tmp_path, learner, "pruner=infobatch", "score=loss", "precision=fp32"))
    labels = torch.from_numpy(one.setup.task.data.train.labels)
    pruning, network = one.loop.pruning, one.loop.network.learner
    passed, noted, epochs = [0], {}, []
    losses, begin, end = network.losses, network.begin_epoch, pruning.end_epoch

    def counted(forward):
        def count(images, *network):
            passed[0] += len(images)
            return forward(images, *network)

        return count

    def beginning(epoch, batches, forward):
        begin(epoch, batches, counted(forward))
        if learner == "dividemix" and epoch >= 2:
            network.eval()
            with torch.no_grad():
                for index, images, _ in one.setup.task.train.evaluation(pruning.selection.indices):
                    noted.update(zip(index.tolist(), network(images, 0), strict=True))

    def watched(step, forward):
        seen = []
        handle = network.networks[0].register_forward_hook(lambda *args: seen.append(args[2].detach()))
        result = losses(step, counted(forward))
        handle.remove()
        if learner != "dividemix" or step.epoch < 2:
            noted.update(zip(step.index.tolist(), seen[0], strict=True))
        return result

    def ended(reference):
        chosen = torch.from_numpy(pruning.selection.indices)
        expected = F.cross_entropy(torch.stack([noted[i] for i in chosen.tolist()]), labels[chosen], reduction="none")
        end(reference)
        torch.testing.assert_close(pruning.trajectories.last_N[chosen], expected, rtol=1e-4, atol=1e-5)
        epochs.append((len(chosen), passed[0]))
        noted.clear()
        passed[0] = 0

    network.losses, network.begin_epoch, pruning.end_epoch = watched, beginning, ended
    rows = metrics_of(trained(one))
    reference = len(one.setup.task.data.reference)
    featured = [one.setup.n if learner == "posterior" and not epoch else 0 for epoch in range(len(epochs))]
    expected = [count + reference + first for (_, count), first in zip(epochs, featured, strict=True)]
    assert [row["samples_forwarded"] for row in rows] == expected
    assert rows[-1]["samples_seen"] == sum(kept for kept, _ in epochs)
    assert min(kept for kept, _ in epochs) < 60
    summary = summary_of(only_run(tmp_path))
    assert summary["learner"] == learner
