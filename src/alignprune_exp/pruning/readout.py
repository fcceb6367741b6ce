"""What a linear readout of embeddings foretells of each label, out of all the other samples' labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .bank import exact

RIDGE = 0.01  # for embeddings that the labels have shaped
WEAK = 0.1  # for features that are many, and of which each says little
ROWS = 8192  # that are in double precision at a time
SAME = 2  # steps of floating point beside their mean, within which embeddings that differ are the same
LAST = 10  # a label comes last where no more than a tenth of the classes, or one, are foretold less


@dataclass(frozen=True)
class Foretold:
    """What the other samples' labels foretell of each.

    Attributes:
        margins: (n,) float32, where the embeddings lie; higher means that the label fits what the others say.
        noise_rate: which share of the labels seems wrong, in [0, 1].
        by: name of the function that returned it: of ``transition`` the margins are of another unit.
        classes: (n, C) float32, how likely each class is by that and by the label itself, of ``transition`` alone.
    """

    margins: Tensor
    noise_rate: float
    by: str = "readout"
    classes: Tensor | None = None


@torch.no_grad()
def readout(embeddings: Tensor, labels: Tensor, ridge: float = RIDGE) -> Foretold:
    r"""Foretell each label out of all the others, and estimate how many are wrong, with no trusted one.

    With X the centred embeddings, Y the centred indicators of the C classes and one ridge λ, least squares without
    sample i foretell of it what they foretell with it, corrected by its leverage (Allen, 1974):

    .. math:: A = X^\top X + \lambda I, \quad h_i = \tfrac1n + x_i^\top A^{-1} x_i, \quad
              f_i = y_i - \frac{y_i - x_i^\top A^{-1} X^\top Y}{1 - h_i}

    The margin is f_i at the label less the highest of the others; it is in units of a probability.

    Where f_i is sure, its highest far above its second, hardly a right label is among the k classes that it puts last,
    and a wrong one, drawn from the C - 1 other classes, is with probability k / (C - 1). So of the surer half

    .. math:: \eta = \frac{C - 1}{k}\; P(\text{the label comes among the last } k)

    estimates the noise rate, from above as estimates of the share of true null hypotheses do (Storey, 2002), which a
    right label has a small part in. Wrong labels that look like right ones count for less or for nothing.

    Args:
        embeddings: (n, d) of the network's last layer but one, in eval mode.
        labels: (n,) as given, integers from 0.
        ridge: λ, above 0, over the mean of the diagonal of XᵀX: `RIDGE`, or `WEAK`.

    Raises ValueError for labels of one class or of other samples, a ridge that is not above 0, and for embeddings of
    another shape, that are not finite, or the same for every sample but for rounding.
    """
    labels = checked(labels, embeddings)
    return fit(left_out(embeddings, labels, ridge), labels)


def fit(blocks: Iterable[tuple[Tensor, Tensor]], labels: Tensor) -> Foretold:
    """Return how labels (n,) fit what is foretold of them, f (B, C) and the labels (B, 1) of some at a time."""
    there_C = labels.bincount() > 0
    there = int(there_C.sum())
    last = max(1, there // LAST)
    margins, sure, comes_last = [], [], []
    for f_BC, label_B1 in blocks:
        f_B1, (first_B, second_B) = f_BC.gather(1, label_B1), f_BC.topk(2).values.T
        margins.append(f_B1[:, 0] - f_BC.scatter(1, label_B1, -torch.inf).amax(1))
        sure.append(first_B - second_B)
        comes_last.append(((f_BC < f_B1) & there_C).sum(1) < last)
    sure_n = torch.cat(sure)
    share = torch.cat(comes_last)[sure_n >= sure_n.median()].double().mean().item()
    return Foretold(torch.cat(margins).float(), min(1.0, share * (there - 1) / last))


def checked(labels: Tensor, embeddings: Tensor) -> Tensor:
    """Return the labels (n,) of embeddings (n, d), int64, where these are. Raises ValueError as `readout` does."""
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2:
        what = f"of shape {tuple(embeddings.shape)}" if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise ValueError(f"the embeddings are {what}; pass a tensor (n, d), a row a sample")
    n = len(embeddings)
    asked = ValueError(f"a readout needs {n} labels, one a sample, whole numbers from 0, of two classes or more")
    try:
        labels = torch.as_tensor(labels, device=embeddings.device)
    except (TypeError, ValueError, RuntimeError):
        raise asked from None
    whole = labels.shape == (n,) and not labels.is_floating_point() and n > 0
    if not whole or labels.min() < 0 or labels.min() == labels.max():
        raise asked
    return labels.long()


def left_out(embeddings: Tensor, labels: Tensor, ridge: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield f (B, C), of some rows at a time what all others foretell of them, and the labels (B, 1): see `readout`."""
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge={ridge} is out of range; use a number above 0")
    (n, d), classes = embeddings.shape, int(labels.max()) + 1
    mean_D = embeddings.mean(0, dtype=exact(embeddings.device))
    shares_C = F.one_hot(labels, classes).to(mean_D.dtype).mean(0)

    def blocks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield X (B, D), Y (B, C) and the labels (B, 1) of some rows at a time."""
        for x_BD, label_B in zip(embeddings.split(ROWS), labels.split(ROWS), strict=True):
            yield x_BD.to(mean_D.dtype) - mean_D, F.one_hot(label_B, classes) - shares_C, label_B[:, None]

    gram_DD, cross_DC = mean_D.new_zeros(d, d), mean_D.new_zeros(d, classes)
    for x_BD, y_BC, _ in blocks():
        gram_DD += x_BD.T @ x_BD
        cross_DC += x_BD.T @ y_BC
    if not gram_DD.isfinite().all():
        raise ValueError("the embeddings are not finite")
    rounding = SAME * torch.finfo(embeddings.dtype).eps if embeddings.is_floating_point() else 0.0
    if gram_DD.trace() <= rounding**2 * n * mean_D.square().sum():
        raise ValueError("the embeddings are the same for every sample, so that they foretell no label")
    inverse_DD = torch.linalg.inv(ridged(gram_DD, ridge))
    line_DC = inverse_DD @ cross_DC
    for x_BD, y_BC, label_B1 in blocks():
        h_B = 1 / n + ((x_BD @ inverse_DD) * x_BD).sum(1)
        yield y_BC - (y_BC - x_BD @ line_DC) / (1 - h_B)[:, None] + shares_C, label_B1


def ridged(gram_DD: Tensor, ridge: float) -> Tensor:
    """Return XᵀX, of centred features X, plus λI, where λ is ``ridge`` times the mean of its diagonal, above 0."""
    penalty = (ridge * gram_DD.diagonal().mean()).clamp(min=torch.finfo(gram_DD.dtype).tiny)
    return gram_DD + penalty * torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
