"""DivideMix: two networks that tell clean labels from noisy ones for each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError
from ..pruning import NonFiniteLossError
from ..pruning.seeding import generator
from ..schema import Epochs, Share, Weight
from .base import Forward, Given, Learner, Step, one_hot

if TYPE_CHECKING:
    from ..config import Config
    from ..data.batches import Batch


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

    count = 2
    views = 2

    def __init__(
        self,
        networks: Sequence[nn.Module],
        given: Given,
        *,
        warmup: Epochs,
        confidence_penalty: bool,
        p_threshold: Share,
        temperature: Annotated[float, Field(ge=0.01, le=100)],
        alpha: Annotated[float, Field(ge=1e-3, le=1e4)],
        lambda_u: Weight,
        rampup: Epochs,
    ) -> None:
        super().__init__(networks, given)
        self.seed, n = given.seed, given.n
        self.warmup, self.confidence_penalty, self.p_threshold = warmup, confidence_penalty, p_threshold
        self.temperature, self.alpha, self.lambda_u, self.rampup = temperature, alpha, lambda_u, rampup
        self.clean_2N: Tensor  # the probability that a label is clean, by which each network splits
        self.plain_N: Tensor
        self.predicted_N: Tensor
        self.register_buffer("clean_2N", torch.zeros(2, n))
        self.register_buffer("plain_N", torch.zeros(n))
        self.register_buffer("predicted_N", torch.zeros(n, dtype=torch.int64))

    @classmethod
    def check(cls, config: Config) -> None:
        warmup: int = config.learner.warmup  # type: ignore[attr-defined]
        if warmup >= config.epochs:
            raise UsageError(
                f"learner.warmup={warmup} leaves dividemix none of {config.epochs} epochs to divide in; "
                f"set a smaller one, or epochs={warmup + 1} or more"
            )
        if config.compile:
            raise UsageError("compile is not for learner=dividemix, whose two networks take turns; set compile=false")

    def passes(self, epoch: int) -> int:
        """Two in the warm-up; then, by each network, one to divide, two to guess, and two to train."""
        return 2 if epoch < self.warmup else 10

    @torch.no_grad()
    def begin_epoch(self, epoch: int, batches: Iterable[Batch], forward: Forward) -> None:
        """Divide the epoch's samples. Raises NonFiniteLossError where a loss of theirs is not finite."""
        if epoch < self.warmup:
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
        if step.epoch < self.warmup:
            return self._warm_up(step, forward)
        with torch.no_grad():
            p_22BC = torch.stack(
                [torch.stack([forward(view, k).softmax(1) for view in step.inputs.chunk(2)]) for k in (0, 1)]
            )
        training = sum(self._mixed(k, p_22BC, step, forward) for k in (0, 1))
        assert isinstance(training, Tensor)
        return self.plain_N.index_select(0, step.index), training, self.predicted_N.index_select(0, step.index)

    def _warm_up(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = [forward(view, network) for network, view in enumerate(step.inputs.chunk(2))]
        plain = [F.cross_entropy(each, step.targets, reduction="none") for each in logits]
        training = plain[0] + plain[1]
        if self.confidence_penalty:
            training = training + sum((each.softmax(1) * each.log_softmax(1)).sum(1) for each in logits)
        return plain[0], training, (logits[0] + logits[1]).detach().argmax(1)

    def _mixed(self, network: int, p_22BC: Tensor, step: Step, forward: Forward) -> Tensor:
        """Return one network's loss of each sample (B,); ``p_22BC`` are the predictions by network and view."""
        clean_B = self.clean_2N[network].index_select(0, step.index)
        labelled_B = clean_B > self.p_threshold
        target_BC = targets(p_22BC, network, clean_B, labelled_B, step.targets, self.temperature)
        rng = generator(self.seed, "mixmatch", step.epoch, step.number, network)
        share = float(rng.beta(self.alpha, self.alpha))
        partner = torch.from_numpy(rng.permutation(len(step.inputs))).to(step.inputs.device, non_blocking=True)
        images, target_2BC = mix(step.inputs, torch.cat([target_BC, target_BC]), share, partner)

        log_p_2BC = forward(images, network).log_softmax(1)
        entropy_B = -(target_2BC * log_p_2BC).sum(1).view(2, -1).mean(0)
        distance_B = (log_p_2BC.exp() - target_2BC).square().mean(1).view(2, -1).mean(0)
        x_B, u_B = labelled_B.float(), (~labelled_B).float()
        x_B, u_B = (each * (len(each) / each.sum().clamp(min=1)) for each in (x_B, u_B))
        mean_C = log_p_2BC.logsumexp(0) - np.log(len(log_p_2BC))
        penalty = -(mean_C + np.log(len(mean_C))).mean()
        return x_B * entropy_B + self._lambda_u(step) * u_B * distance_B + penalty

    def _lambda_u(self, step: Step) -> float:
        since = step.epoch + step.number / step.steps - self.warmup
        return self.lambda_u * min(since / self.rampup, 1.0)


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


def sharpen(p_BC: Tensor, temperature: float) -> Tensor:
    """Return p^(1/T), normalised."""
    return (p_BC.log() / temperature).softmax(1)


def mix(images: Tensor, target: Tensor, share: float, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each image and target with its partner's, of which it keeps the larger of share and 1 − share (MixMatch)."""
    share = max(share, 1 - share)
    first, second = (share * each + (1 - share) * each.index_select(0, partner) for each in (images, target))
    return first, second
