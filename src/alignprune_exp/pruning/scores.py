"""Scores: one number a sample, higher means more worth keeping.

Shape legend: N samples, W epochs of the window, B samples of a block. An empty place in a trajectory is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .seeding import generator
from .trajectories import History

Correlation = Callable[[Tensor, Tensor], Tensor]


def _one_pass(*, centred: bool, ranked: bool = False) -> Callable[[Correlation], Correlation]:
    """Make a correlation one pass over rows in the CPU's cache, for the columns where that is exact enough.

    These have no empty place, and a sum of squares well within float32 and not tiny beside their mean, as that of a
    constant is. The decorated function does the other columns, and all of them on devices that would have to be
    waited for to know.
    """

    def decorate(carefully: Correlation) -> Correlation:
        @functools.wraps(carefully)
        def correlation(losses_WB: Tensor, reference_W: Tensor) -> Tensor:
            on_cpu = losses_WB.device.type == reference_W.device.type == "cpu"
            if not on_cpu or losses_WB.dtype != torch.float32 or reference_W.dim() > 1:
                return carefully(losses_WB, reference_W)
            seen_W = ~reference_W.isnan()
            v_WB, r_W = losses_WB if seen_W.all() else losses_WB[seen_W], reference_W[seen_W].double()
            if len(r_W) < 3:
                return carefully(losses_WB, reference_W)
            if ranked:
                v_WB, r_W = _ranks(v_WB), _ranks(r_W[:, None])[:, 0]
            if centred:
                r_W = r_W - r_W[0]  # exactly 0 if it is constant
                r_W = r_W - r_W.mean()
            r_W = r_W / r_W.norm()
            if not r_W.isfinite().all():
                return carefully(losses_WB, reference_W)
            product_B, squares_B, mean_B = (torch.zeros_like(v_WB[0]) for _ in range(3))
            if centred:
                for v_B in v_WB:
                    mean_B.add_(v_B, alpha=1 / len(v_WB))
            for v_B, r in zip(v_WB, r_W.tolist(), strict=True):
                d_B = v_B - mean_B
                product_B.add_(d_B, alpha=r)
                squares_B.addcmul_(d_B, d_B)
            score_B = product_B.div_(squares_B.sqrt()).clamp_(-1, 1)
            # Block by block first: numbers are cheaper to reduce than masks.
            relative_B = mean_B.square_().div_(squares_B)
            (least, most), largest = squares_B.aminmax(), relative_B.amax()
            if not (least > 1e-30 and most < 1e30 and largest < 1e6 / len(v_WB)):
                sure_B = (squares_B > 1e-30) & (squares_B < 1e30) & (relative_B < 1e6 / len(v_WB))
                others = (~sure_B).nonzero().squeeze(1)
                score_B[others] = carefully(losses_WB[:, others], reference_W)
            return score_B

        return correlation

    return decorate


@_one_pass(centred=True)
def pearson(losses_WB: Tensor, reference_W: Tensor) -> Tensor:
    r"""Dynamic Alignment Score: the Pearson correlation of each trajectory with the reference's (AlignPrune).

    .. math:: \mathrm{DAS}_i = \frac{\sum_t (v_{i,t} - \bar v_i)(r_t - \bar r)}
                                    {\sqrt{\sum_t (v_{i,t} - \bar v_i)^2 \sum_t (r_t - \bar r)^2}}

    Args:
        losses_WB: trajectories v, (W, B) floating point; NaN where a sample was not seen.
        reference_W: reference trajectory r, (W,), or (W, B) for one reference a sample.

    Returns:
        (B,) in [-1, 1]; 0 where the correlation is undefined: fewer than 3 common epochs, or a constant side.

    >>> pearson(torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 2.0, 1.0]))
    tensor([ 1.0000, -0.8660])
    """
    v_WB, r_WB, count_B = _common(losses_WB, _to_unit_range(reference_W)[0])
    v_WB, v_varies = _to_unit_range(v_WB)
    r_WB, r_varies = _to_unit_range(r_WB)
    v_WB = torch.where(v_WB.isnan(), 0.0, v_WB - v_WB.nansum(0) / count_B)
    r_WB = torch.where(r_WB.isnan(), 0.0, r_WB - r_WB.nansum(0) / count_B)
    rho_B = (v_WB * r_WB).sum(0) / (v_WB.square().sum(0) * r_WB.square().sum(0)).sqrt()
    return torch.where(v_varies & r_varies & (count_B >= 3), rho_B.clamp(-1, 1), 0.0)


@_one_pass(centred=True, ranked=True)
def spearman(losses_WB: Tensor, reference_W: Tensor) -> Tensor:
    """Spearman's rank correlation with the reference trajectory (W,); ties share their mean rank. As `pearson`."""
    order_W = reference_W.unique(return_inverse=True)[1].to(losses_WB.dtype)  # small numbers, in any precision
    v_WB, r_WB, _ = _common(losses_WB, order_W.masked_fill(reference_W.isnan(), torch.nan))
    return pearson(_ranks(v_WB), _ranks(r_WB))


@_one_pass(centred=False)
def cosine(losses_WB: Tensor, reference_W: Tensor) -> Tensor:
    """Cosine of the angle between trajectory and reference, over common epochs. Shapes as `pearson`.

    0 where it is undefined: fewer than 3 common epochs, or a side that is zero throughout.
    """
    v_WB, r_WB, count_B = _common(losses_WB, reference_W)
    v_WB, r_WB = v_WB.nan_to_num(), r_WB.nan_to_num()
    v_size, r_size = v_WB.abs().amax(0), r_WB.abs().amax(0)
    v_WB, r_WB = v_WB / v_size, r_WB / r_size
    cos_B = (v_WB * r_WB).sum(0) / (v_WB.square().sum(0) * r_WB.square().sum(0)).sqrt()
    return torch.where((v_size > 0) & (r_size > 0) & (count_B >= 3), cos_B.clamp(-1, 1), 0.0)


def _means(losses_WB: Tensor) -> Tensor:
    """Mean of each column without its empty places."""
    means_B = losses_WB.mean(0)
    known = means_B.device.type == "cpu" and not means_B.sum().isnan()
    return means_B if known else losses_WB.nanmean(0)


def _common(losses_WB: Tensor, reference_W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both trajectories as (W, B), NaN outside their common epochs, and the number (B,) of these."""
    reference_W = reference_W.to(losses_WB.device, losses_WB.dtype)
    r_WB = reference_W[:, None].expand_as(losses_WB) if reference_W.dim() == 1 else reference_W
    empty = losses_WB.isnan() | r_WB.isnan()
    return losses_WB.masked_fill(empty, torch.nan), r_WB.masked_fill(empty, torch.nan), (~empty).sum(0)


def _to_unit_range(x_WB: Tensor) -> tuple[Tensor, Tensor]:
    """Map each column to [-1, 0], which no correlation notices, and say (B,) which columns vary.

    Exact on constants, free of underflow, and well conditioned: a column that varies has a sum of squares about its
    mean of at least ½. A column that does not vary becomes 0.
    """
    top_B = x_WB.nan_to_num(nan=-torch.inf).amax(0)
    range_B = top_B - x_WB.nan_to_num(nan=torch.inf).amin(0)
    varies_B = range_B > 0
    return (x_WB - top_B) / torch.where(varies_B, range_B, 1), varies_B


def _ranks(x_WB: Tensor) -> Tensor:
    """Ranks within each column, ties at their mean, times 2 and about 0; NaN stays NaN."""
    ranks_WB = torch.zeros_like(x_WB)
    for i in range(1, len(x_WB)):
        for j in range(i):
            above_B = (x_WB[i] - x_WB[j]).sign_()  # 0 beside a NaN
            ranks_WB[i] += above_B
            ranks_WB[j] -= above_B
    return ranks_WB.masked_fill_(x_WB.isnan(), torch.nan)


class Score:
    """Ranks samples. Subclass it and implement ``__call__``; any pruner takes an instance.

    A score with ``aligned = True`` compares with the reference trajectory: it needs a reference loss every
    epoch, and before its window is full all samples are ranked by `Loss` instead, as the paper says.
    """

    name: str
    aligned: bool = False

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name", cls.__name__)

    def __call__(self, history: History) -> Tensor:
        """Return (N,) float32 scores, NaN where a sample has none yet."""
        raise NotImplementedError


class Loss(Score):
    """The last recorded loss: what InfoBatch and SeTa rank by."""

    name = "loss"

    def __call__(self, history: History) -> Tensor:
        return history.last_N.clone()


class DAS(Score):
    """The Dynamic Alignment Score of AlignPrune: `pearson` with the reference trajectory."""

    name = "das"
    aligned = True

    def __call__(self, history: History) -> Tensor:
        return history.map(lambda losses_WB: pearson(losses_WB, history.reference_W))


class Spearman(Score):
    """The paper's ablation of DAS with `spearman`."""

    name = "spearman"
    aligned = True

    def __call__(self, history: History) -> Tensor:
        return history.map(lambda losses_WB: spearman(losses_WB, history.reference_W))


class Cosine(Score):
    """The paper's ablation of DAS with `cosine`."""

    name = "cosine"
    aligned = True

    def __call__(self, history: History) -> Tensor:
        return history.map(lambda losses_WB: cosine(losses_WB, history.reference_W))


class Random(Score):
    """Control: uniform in [0, 1), redrawn every epoch."""

    name = "random"

    def __call__(self, history: History) -> Tensor:
        draw = generator(history.seed, "random score", history.epoch).random(len(history.last_N), "float32")
        return torch.from_numpy(draw).to(history.last_N.device)


class SmallLoss(Score):
    """Control: minus the mean of the losses recorded within the window; the last one if there is none."""

    name = "small_loss"

    def __call__(self, history: History) -> Tensor:
        means_N = history.map(_means)
        return torch.where(means_N.isnan(), history.last_N, means_N).neg_()


def settled(sum_N: Tensor, count_N: Tensor) -> Tensor:
    """Return minus the mean of ``count_N`` losses that add up to ``sum_N``; NaN where there are none."""
    return (sum_N / count_N).neg_().float()


class Settled(Score):
    """Control: minus the mean of all losses recorded so far; it remembers what the window has forgotten.

    Where a network memorises wrong labels, their recent losses fall to those of the others, and this stays apart.
    """

    name = "settled"

    def __call__(self, history: History) -> Tensor:
        return settled(history.sum_N, history.count_N)


class Oracle(Score):
    """Control, the upper bound: 1 if the label is clean, else 0."""

    name = "oracle"

    def __call__(self, history: History) -> Tensor:
        if history.clean_N is None:
            raise ValueError("score='oracle' needs to know which labels are clean; pass clean=mask")
        return history.clean_N.float()


SCORES: dict[str, type[Score]] = {
    score.name: score for score in (Loss, DAS, Spearman, Cosine, Random, SmallLoss, Settled, Oracle)
}
