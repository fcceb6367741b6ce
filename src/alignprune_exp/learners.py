"""Robust learners: what the loss of a step is made of. A pruner chooses which samples are seen, a learner what for.

Shape legend: B samples of a batch, C classes, N samples of the run, V augmented views of an image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .pruning import NonFiniteLossError
from .pruning.seeding import generator

if TYPE_CHECKING:
    from . import config as schema
    from .data.batches import Batch

Forward = Callable[..., Tensor]  # of images, and of a network's number: float32 logits, in the precision of the run


@dataclass(frozen=True)
class Step:
    """One batch to learn from.

    Attributes:
        index: sample indices (B,), on the device.
        images: (V · B, channels, H, W), one view of all samples after the other.
        labels: as given, (B,).
        epoch: counted from 0.
        number: of the step in its epoch, from 0.
        steps: in this epoch.
    """

    index: Tensor
    images: Tensor
    labels: Tensor
    epoch: int
    number: int
    steps: int


class Learner(nn.Module):
    """Owns the networks and what it knows about every sample: its ``state_dict`` is all there is to save.

    Attributes:
        networks: of which the first is the one whose plain losses are recorded.
        views: augmented views V that a step needs.
    """

    views = 1

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor, network: int | None = None) -> Tensor:
        """Return the logits (B, C) of one network, or the mean of all networks' logits."""
        if network is not None or len(self.networks) == 1:
            return self.networks[network or 0](images)
        return torch.stack([each(images).float() for each in self.networks]).mean(0)

    def begin_epoch(self, epoch: int, batches: Iterable[Batch], forward: Forward) -> None:
        """Look at the epoch's samples, as ``batches`` without augmentation, before its first step."""

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each sample (B,): its plain cross-entropy, the loss to train on, and the predicted class.

        The plain one is that of the given label from the first network's float32 logits, whatever is trained on.
        """
        raise NotImplementedError

    def after_backward(self) -> None:
        """Update what is known about the step's samples by the gradients of its loss."""

    def passes(self, epoch: int) -> int:
        """Return how often each selected sample passes through a network in an epoch, with gradient or without."""
        return 1


class CrossEntropy(Learner):
    """Cross-entropy of the given label, smoothed by ``smoothing``."""

    def __init__(self, networks: Sequence[nn.Module], smoothing: float) -> None:
        super().__init__(networks)
        self.smoothing = smoothing

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = forward(step.images)
        log_p = F.log_softmax(logits, dim=1)
        plain = F.nll_loss(log_p, step.labels, reduction="none")
        smoothing = self.smoothing
        smoothed = (1 - smoothing) * plain - smoothing * log_p.mean(1) if smoothing else plain
        return plain, smoothed, logits.detach().argmax(1)


class ELR(Learner):
    """Early-learning regularisation (Liu et al., NeurIPS 2020, section 4).

    A running average t of each sample's predictions p, moved whenever the sample is trained on, holds on to what was
    learned early: the loss is CE + λ·log(1 − ⟨p, t⟩). As in the authors' code, p is clamped to [1e-4, 1 − 1e-4] and,
    where it enters t, normalised again; the t of the loss includes the p of the step.

    On CIFAR they train by SGD at 0.02, weight decay 1e-3, plain momentum: CIFAR-10 for 150 epochs, in a cosine that
    restarts every 10, or with asymmetric noise for 120, at a hundredth of the rate each from 40 and 80 on; CIFAR-100
    for 150, so from 80 and 120 on. Ours is the optimiser of the run, by its scale or data set, in one cycle.
    """

    def __init__(self, networks: Sequence[nn.Module], config: schema.Elr, n: int, classes: int) -> None:
        super().__init__(networks)
        self.beta, self.coefficient = config.beta, config.coefficient
        self.target_NC: Tensor
        self.register_buffer("target_NC", torch.zeros(n, classes))

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = forward(step.images)
        plain = F.cross_entropy(logits, step.labels, reduction="none")
        p_BC = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        q_BC = p_BC.detach() / p_BC.detach().sum(1, keepdim=True)
        t_BC = self.beta * self.target_NC.index_select(0, step.index) + (1 - self.beta) * q_BC
        self.target_NC.index_copy_(0, step.index, t_BC)
        agreement = (p_BC * t_BC).sum(1)
        return plain, plain + self.coefficient * (1 - agreement).log(), logits.detach().argmax(1)


class SOP(Learner):
    """Sparse over-parameterisation (Liu et al., ICML 2022, algorithm 1).

    Every sample has parameters u (one, for its given class) and v (one for each other class); u² − v² stands for its
    label's error and is added to the prediction. The cross-entropy of that, clamped and normalised as in the authors'
    code, moves the network and u; the squared distance of label and (one-hot prediction + u² − v²) moves v. Both are
    moved by plain gradient descent, at rates of their own, in the rows of the batch alone.

    In one version of the authors' code the squared distance moves u as well; this is the paper's rule.

    On CIFAR they train the network by SGD at 0.02, weight decay 1e-3, plain momentum, in a cosine over 300 epochs, on
    images that AutoAugment and Cutout have changed. Ours is the optimiser of the run, by its scale or data set, in one
    cycle, on its flips and crops. Values for CIFAR-N are those of Prune4ReL's scripts, which train SOP+.
    """

    def __init__(self, networks: Sequence[nn.Module], config: schema.Sop, n: int, classes: int, seed: int) -> None:
        super().__init__(networks)
        self.lr_u, self.lr_v = config.lr_u, config.lr_v
        self.u_N: Tensor
        self.v_NC: Tensor
        drawn = generator(seed, "over-parameterisation").standard_normal((n, 1 + classes), np.float32)
        start = torch.from_numpy(drawn) * config.std
        self.register_buffer("u_N", start[:, 0].contiguous())
        self.register_buffer("v_NC", start[:, 1:].contiguous())

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = forward(step.images)
        plain = F.cross_entropy(logits, step.labels, reduction="none")
        given_BC = one_hot(step.labels, logits)
        predicted = logits.detach().argmax(1)
        self._index = step.index
        self._u_B = self.u_N.index_select(0, step.index).requires_grad_()
        self._v_BC = self.v_NC.index_select(0, step.index).requires_grad_()
        more_BC = (self._u_B[:, None].square() * given_BC).clamp(max=1)
        less_BC = (self._v_BC.square() * (1 - given_BC)).clamp(max=1)
        p_BC = (logits.softmax(1) + more_BC - less_BC.detach()).clamp(min=1e-4)
        p_B = (p_BC / p_BC.sum(1, keepdim=True)).gather(1, step.labels[:, None]).squeeze(1)
        hard_BC = one_hot(predicted, logits)
        distance = (hard_BC + more_BC.detach() - less_BC - given_BC).square().sum(1)
        return plain, -p_B.clamp(min=1e-4).log() + distance, predicted

    def after_backward(self) -> None:
        for values, rows, lr in ((self.u_N, self._u_B, self.lr_u), (self.v_NC, self._v_BC, self.lr_v)):
            assert rows.grad is not None
            values.index_copy_(0, self._index, rows.detach() - lr * rows.grad)


class DivideMix(Learner):
    """Two networks that divide what a pruner selects for each other (Li et al., ICLR 2020, algorithm 1).

    Warm-up: both networks learn from the given labels, by cross-entropy, each from its own view of a batch; the loss
    recorded is the first one's. Then, before an epoch, both networks look at every selected sample once, without
    augmentation: a mixture of two Gaussians on the losses of one gives the probability that a label is clean, by which
    the *other* one splits a batch. These plain losses of the first network are the ones recorded: those of an epoch's
    beginning, where a reference loss, and with ``score.unseen=refresh`` a pruned sample's, is that of its end.

    A step refines the labels that count as clean, guesses the others (both networks, both views), sharpens and mixes
    all of them (MixMatch), and sums over the networks
    L_x + λ_u(t)·L_u + KL(uniform ‖ mean prediction).
    A sample's share of it is such that, at weight 1, the mean over the batch is that sum: L_x and L_u are means over
    the labelled and the unlabelled of the batch, and the penalty falls to all samples alike. Either part may be empty.

    Unlike the authors' code, which trains one network for an epoch and then the other, on batches that a loader of
    labelled and one of unlabelled samples give, both networks learn from the same batches of the pruner's selection,
    in one backward pass, with guesses of the same moment. The guesses of both are made in train mode, and move the
    statistics of batch norm, as the authors do for the network in training; they use eval mode for the other. At test
    time the mean of the logits stands for their sum: it classifies alike. They average losses over five epochs at a
    noise rate of 0.9, which this does not.

    On CIFAR they train by SGD at 0.02, weight decay 5e-4, plain momentum, in batches of 64 over 300 epochs, at a tenth
    of the rate from 150 on. Ours is the optimiser of the run, by its scale or data set, in one cycle.
    """

    views = 2

    def __init__(self, networks: Sequence[nn.Module], config: schema.DivideMix, n: int, seed: int) -> None:
        super().__init__(networks)
        self.config, self.seed = config, seed
        self.clean_2N: Tensor  # the probability that a label is clean, by which each network splits
        self.plain_N: Tensor
        self.predicted_N: Tensor
        self.register_buffer("clean_2N", torch.zeros(2, n))
        self.register_buffer("plain_N", torch.zeros(n))
        self.register_buffer("predicted_N", torch.zeros(n, dtype=torch.int64))

    def passes(self, epoch: int) -> int:
        """Two in the warm-up; then, by each network, one to divide, two to guess, and two to train."""
        return 2 if epoch < self.config.warmup else 10

    @torch.no_grad()
    def begin_epoch(self, epoch: int, batches: Iterable[Batch], forward: Forward) -> None:
        """Divide the epoch's samples. Raises NonFiniteLossError where a loss of theirs is not finite."""
        if epoch < self.config.warmup:
            return
        self.eval()
        indices, losses, predicted = [], [], []
        for index, images, labels in batches:
            logits = [forward(images, network) for network in (0, 1)]
            indices.append(index)
            losses.append(torch.stack([F.cross_entropy(each, labels, reduction="none") for each in logits]))
            predicted.append((logits[0] + logits[1]).argmax(1))
        index = torch.cat(indices).to(self.plain_N.device)
        losses_2S = torch.cat(losses, 1)
        if not losses_2S.isfinite().all():
            raise NonFiniteLossError(epoch, 0)
        for network, loss_S in enumerate(losses_2S.flip(0).double().cpu().numpy()):
            seed = int(generator(self.seed, "mixture", epoch, network).integers(2**31))
            clean_S = torch.from_numpy(clean_probability(loss_S, seed)).to(self.clean_2N)
            self.clean_2N[network].index_copy_(0, index, clean_S)
        self.plain_N.index_copy_(0, index, losses_2S[0])
        self.predicted_N.index_copy_(0, index, torch.cat(predicted))

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        if step.epoch < self.config.warmup:
            return self._warm_up(step, forward)
        with torch.no_grad():
            p_22BC = torch.stack(
                [torch.stack([forward(view, k).softmax(1) for view in step.images.chunk(2)]) for k in (0, 1)]
            )
        training = sum(self._mixed(k, p_22BC, step, forward) for k in (0, 1))
        assert isinstance(training, Tensor)
        return self.plain_N.index_select(0, step.index), training, self.predicted_N.index_select(0, step.index)

    def _warm_up(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = [forward(view, network) for network, view in enumerate(step.images.chunk(2))]
        plain = [F.cross_entropy(each, step.labels, reduction="none") for each in logits]
        training = plain[0] + plain[1]
        if self.config.confidence_penalty:
            training = training + sum((each.softmax(1) * each.log_softmax(1)).sum(1) for each in logits)
        return plain[0], training, (logits[0] + logits[1]).detach().argmax(1)

    def _mixed(self, network: int, p_22BC: Tensor, step: Step, forward: Forward) -> Tensor:
        """Return one network's loss of each sample (B,); ``p_22BC`` are the predictions by network and view."""
        clean_B = self.clean_2N[network].index_select(0, step.index)
        labelled_B = clean_B > self.config.p_threshold
        target_BC = targets(p_22BC, network, clean_B, labelled_B, step.labels, self.config.temperature)
        rng = generator(self.seed, "mixmatch", step.epoch, step.number, network)
        share = float(rng.beta(self.config.alpha, self.config.alpha))
        partner = torch.from_numpy(rng.permutation(len(step.images))).to(step.images.device, non_blocking=True)
        images, target_2BC = mix(step.images, torch.cat([target_BC, target_BC]), share, partner)

        log_p_2BC = forward(images, network).log_softmax(1)
        entropy_B = -(target_2BC * log_p_2BC).sum(1).view(2, -1).mean(0)
        distance_B = (log_p_2BC.exp() - target_2BC).square().mean(1).view(2, -1).mean(0)
        x_B, u_B = labelled_B.float(), (~labelled_B).float()
        x_B, u_B = (each * (len(each) / each.sum().clamp(min=1)) for each in (x_B, u_B))
        mean_C = log_p_2BC.logsumexp(0) - np.log(len(log_p_2BC))
        penalty = -(mean_C + np.log(len(mean_C))).mean()
        return x_B * entropy_B + self._lambda_u(step) * u_B * distance_B + penalty

    def _lambda_u(self, step: Step) -> float:
        since = step.epoch + step.number / step.steps - self.config.warmup
        return self.config.lambda_u * min(since / self.config.rampup, 1.0)


def clean_probability(losses: NDArray[np.floating], seed: int) -> NDArray[np.float64]:
    """Return the probability (S,) that each of the losses (S,) belongs to the smaller of two Gaussian components.

    The losses are scaled to [0, 1] and the mixture fitted with the arguments of DivideMix's authors. Where all losses
    are equal, and nothing tells them apart, it is 1.
    """
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    low, high = losses.min(), losses.max()
    if low == high:
        return np.ones(len(losses))
    scaled = ((losses - low) / (high - low))[:, None]
    mixture = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
    with threadpool_limits(1), warnings.catch_warnings():  # several threads would add up in any order
        warnings.simplefilter("ignore")  # ten iterations are what the authors stop at
        return mixture.fit(scaled).predict_proba(scaled)[:, mixture.means_.argmin()]


def targets(
    p_22BC: Tensor, network: int, clean_B: Tensor, labelled_B: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Return what a network is to learn of each sample, (B, C): its refined label, or a guess.

    Args:
        p_22BC: predictions of both networks of both views.
        network: the one that learns.
        clean_B: probability that each label is clean.
        labelled_B: whose label is refined, by the network's own predictions; the others' is guessed by both networks.
        labels: as given, (B,).
        temperature: T of the sharpening.
    """
    given_BC = one_hot(labels, p_22BC[0, 0])
    w_B1 = clean_B[:, None]
    refined_BC = w_B1 * given_BC + (1 - w_B1) * p_22BC[network].mean(0)
    guessed_BC = p_22BC.mean((0, 1))
    return sharpen(torch.where(labelled_B[:, None], refined_BC, guessed_BC), temperature)


def one_hot(classes_B: Tensor, like_BC: Tensor) -> Tensor:
    """Return (B, C) of the kind of ``like_BC``, 1 at each sample's class; unlike torch's, without waiting to check."""
    return torch.zeros_like(like_BC).scatter_(1, classes_B[:, None], 1.0)


def sharpen(p_BC: Tensor, temperature: float) -> Tensor:
    """Return p^(1/T), normalised."""
    return (p_BC.log() / temperature).softmax(1)


def mix(images: Tensor, target: Tensor, share: float, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each image and target with its partner's, of which it keeps the larger of share and 1 − share (MixMatch)."""
    share = max(share, 1 - share)
    first, second = (share * each + (1 - share) * each.index_select(0, partner) for each in (images, target))
    return first, second


def build(config: schema.Config, network: Callable[[], nn.Module], n: int, classes: int) -> Learner:
    """Return the learner of a run on ``n`` samples; ``network`` makes a freshly initialised network."""
    learner = config.learner
    if learner.name == "elr":
        return ELR([network()], learner, n, classes)
    if learner.name == "sop":
        return SOP([network()], learner, n, classes, config.seed)
    if learner.name == "dividemix":
        return DivideMix([network(), network()], learner, n, config.seed)
    return CrossEntropy([network()], config.label_smoothing)
