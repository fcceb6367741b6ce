"""The loss of a reference set, and such a set out of the training set itself, for those who have no trusted labels.

Shape legend: N samples, B of them, C classes, R samples chosen.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .arguments import check_whole
from .cleaning import array, check_classes
from .losses import whole
from .noise_rate import probability
from .processes import DisagreementError, Exchange
from .selection import proportional

ReferenceLoss = float | Tensor | np.ndarray | list[float] | tuple[float | Tensor, int] | None
"""A mean, all losses (R,), or a sum and a count."""
NO_LOSS, MEAN, PART = range(3)
AGREEMENT = 1e-4  # of the means that processes pass, which some kinds of hardware do not compute alike


def shared_loss(given: ReferenceLoss, processes: Exchange) -> tuple[float | None, float]:
    """Return the mean loss of a reference set and its labels' mean `probability`, of what each process was given.

    That is the mean or all losses (R,), in all of them or in rank 0 alone, or the sum and the number (sum, count) of
    each one's part. None where nothing was given; NaN for the probability where not all losses were.
    Raises DisagreementError, in all of them, for different means, a mixture, or parts without a sample, and ValueError
    for what is no numbers, or not one a sample, and for a pair whose second is no whole number, such as an accuracy.
    """
    kind, value, count, fit = NO_LOSS, 0.0, 1.0, math.nan
    try:
        if isinstance(given, tuple):
            kind, (value, count) = PART, (float(whole(part)) for part in given)
        elif given is not None:
            losses = torch.as_tensor(whole(given), dtype=torch.float64)
            kind, value, fit = MEAN, losses.mean().item(), probability(losses) if losses.dim() else math.nan
    except (TypeError, ValueError, RuntimeError):
        what = f"a tuple of {len(given)}" if isinstance(given, tuple) else f"of type {type(given).__name__}"
        raise ValueError(
            f"the reference loss is {what}; pass the mean loss as a number, all losses (R,) as a tensor, or a pair "
            "(sum, count)"
        ) from None
    if kind == MEAN and losses.numel() == 0:
        raise ValueError("the reference set has no loss; pass the losses (R,) of one sample or more")
    if kind == MEAN and losses.dim() > 1:
        raise ValueError(
            f"the reference losses have shape {tuple(losses.shape)}; pass one a sample, (R,), or their mean"
        )
    said = torch.tensor([(kind, value, count, fit)], dtype=torch.float64)
    kinds, values, counts, fits = processes.gather(said).T
    if (kinds == PART).all():
        if (counts % 1 != 0).any():
            raise ValueError(
                f"the reference loss is a pair whose second is {counts[counts % 1 != 0][0]:g}, and a pair is read as "
                "(sum, count) of losses; pass the mean loss alone, or all losses (R,)"
            )
        if not (counts >= 0).all() or counts.sum() == 0:
            raise DisagreementError("the parts of the reference set have no sample; pass (sum, count), count above 0")
        return (values.sum() / counts.sum()).item(), math.nan
    means = values[kinds == MEAN]
    if len(means) == 0 and (kinds == NO_LOSS).all():
        return None, math.nan
    if (kinds == PART).any() or kinds[0] != MEAN or 1 < len(means) < len(values):
        raise DisagreementError(
            "some processes were given a reference loss and others were not; pass the mean in all of them, or in rank "
            "0 alone, or (sum, count) in each"
        )
    if means.isfinite().all() and means.max() - means.min() > AGREEMENT * means.abs().max():
        raise DisagreementError(
            f"the processes were given different reference losses, {means.min():g} to {means.max():g}; pass the mean "
            "in rank 0 alone and None in the others, or (sum, count) of its part of the set in each, or exchange() "
            "before population_mean()"
        )
    return means[0].item() if means.isfinite().all() else math.nan, fits[0].item()


def class_shares(labels: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes that ``labels`` (N,) hold, ascending, and how many of ``size`` samples each one gets.

    Shares are proportional, by largest remainder; ``rng`` orders equal remainders. No class gets more than it has.
    """
    classes, counts = np.unique(labels, return_counts=True)
    return classes, proportional(counts, size, rng.random(len(classes)))


def most_trusted(trust: np.ndarray, labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose the ``size`` samples that are trusted most, balanced by class.

    Args:
        trust: (N,), higher is better, such as the score ``small_loss`` or `label_quality`; NaN where unknown, which
            comes last.
        labels: (N,) as given, noisy or not; each class gets its `class_shares`.
        size: number R of samples to choose, 0 to N.
        rng: orders samples of equal trust.

    Returns:
        Sample indices, int64 (R,), ascending.

    Raises ValueError for another number of labels, for missing ones, and for more samples than there are.

    >>> most_trusted(np.array([0.9, 0.1, 0.2, 0.8]), np.array([0, 0, 1, 1]), 2, np.random.default_rng(0))
    array([0, 3])
    """
    trust, labels = array(trust), array(labels)
    if trust.shape != labels.shape or trust.ndim != 1:
        raise ValueError(f"trust has shape {trust.shape}, labels {labels.shape}; both must be (N,), one a sample")
    check_classes(labels, len(labels))
    check_whole("size", size, 0)
    if size > len(labels):
        raise ValueError(f"size={size} is out of range; there are {len(labels)} samples to choose from")
    classes, quota = class_shares(labels, size, rng)
    distrust = np.where(np.isnan(trust), np.inf, -trust)
    ranked = np.lexsort((rng.random(len(labels)), distrust, labels))
    first = np.searchsorted(labels[ranked], classes)
    chosen = [ranked[start : start + share] for start, share in zip(first, quota, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def confident_thresholds(confidence_N: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """Return the thresholds t (C,) of confident learning, float64: the mean self-confidence of each class's samples.

    Args:
        confidence_N: self-confidence, the probability that the network gives to a sample's given label.
        labels_N: given labels.
        classes: number C of classes; one without samples has an infinite threshold.
    """
    sum_C = torch.zeros(classes, dtype=torch.float64, device=confidence_N.device)
    sum_C.index_add_(0, labels_N, confidence_N.double())
    count_C = labels_N.bincount(minlength=classes)
    return torch.where(count_C > 0, sum_C / count_C, torch.inf)


def label_quality(p_BC: Tensor, labels_B: Tensor, thresholds_C: Tensor) -> Tensor:
    r"""Confident learning's order of labels, the most credible highest (Northcutt, Jiang and Chuang, 2021).

    The score is cleanlab's default, self-confidence :math:`p_{i,y_i}`. It is lowered by 1 for the samples that
    confident learning counts as mislabelled, off the diagonal of its confident joint (their equation 1):
    :math:`\hat y_i = \arg\max_{k:\, p_{i,k} \ge t_k} p_{i,k}` exists and is not the given label :math:`y_i`. So all
    of them come behind all others.

    The method asks for out-of-sample probabilities. A network that is being trained on these very samples gives
    in-sample ones, which support wrong labels more the more it memorises; early in training the difference is small.

    cleanlab's adjustment of self-confidence by thresholds shifts all samples of a class alike, so that it cannot change
    a choice within classes, and is left out. Where several classes exceed their threshold, cleanlab takes the most
    probable class of all, the paper the most probable one of these; this follows the paper.

    Args:
        p_BC: the network's class probabilities.
        labels_B: given labels.
        thresholds_C: `confident_thresholds` of all samples.

    Returns:
        (B,) float32 in [-1, 1].
    """
    given_BC = torch.zeros_like(p_BC, dtype=torch.bool).scatter_(1, labels_B[:, None], True)
    confident_BC = torch.where(p_BC >= thresholds_C, p_BC, -torch.inf)
    rival_B = confident_BC.masked_fill(given_BC, -torch.inf).amax(1)
    own_B = confident_BC[given_BC]
    return p_BC[given_BC] - (rival_B > own_B).to(p_BC.dtype)
