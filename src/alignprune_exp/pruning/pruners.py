"""Pruners: from one score a sample to the samples of an epoch and their gradient weights.

A pruner never looks at what its score means: InfoBatch with DAS differs from InfoBatch by the score alone.
Epochs are counted from 0.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .selection import (
    MAX_RATIO,
    Floats,
    Ints,
    Pruner,
    Selection,
    ascending,
    best,
    everything,
    floor,
    kept,
    share,
    uniform,
    unweighted,
)
from .static import STATIC

CHUNK = 1 << 20  # samples in float64 at a time
STRIDE = 256  # samples between the prefix sums that are kept


@dataclass(frozen=True, kw_only=True)
class Full(Pruner):
    """Every sample, every epoch."""

    uses_scores: ClassVar[bool] = False

    def saving(self, saved: float, epochs: int) -> Full:
        """Return this pruner, which saves nothing whatever is asked of it, and so stands beside any budget."""
        return self

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        return everything(len(scores))


@dataclass(frozen=True, kw_only=True)
class RandomSubset(Pruner):
    """A fresh uniform subset of (1 - ratio) of all samples each epoch, at weight 1."""

    ratio: float = 0.3
    budget: float | None = None
    keeps: ClassVar[str] = "budget"
    uses_scores: ClassVar[bool] = False

    def inert(self) -> tuple[str, ...]:
        return () if self.budget is None else ("ratio",)

    def size(self, n: int) -> int:
        """Return the number of samples of each epoch."""
        return kept(n, self.ratio) if self.budget is None else share(n, self.budget)

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        n = len(scores)
        return unweighted(ascending(uniform(n, self.size(n), rng), n))


@dataclass(frozen=True, kw_only=True)
class RS2(RandomSubset):
    """Repeated random subsets without replacement (Okanovic et al., ICLR 2024), as their authors' code behaves.

    Successive epochs take successive slices of one permutation of all samples. Where fewer than a slice are left,
    the last slice is filled up from the permutation's beginning; then comes a new permutation. In the authors' code
    such a last slice is one sample short, and the size of a slice is rounded, not rounded down.
    """

    def address(self, epoch: int, n: int) -> int:
        """Return the number of the epoch's permutation."""
        return epoch // -(-n // self.size(n))

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        n = len(scores)
        size = self.size(n)
        begin = epoch % -(-n // size) * size
        return unweighted(ascending(rng.permutation(n).take(range(begin, begin + size), mode="wrap"), n))


@dataclass(frozen=True, kw_only=True)
class InfoBatch(Pruner):
    """InfoBatch (Qin et al., ICLR 2024), as its authors' code behaves.

    While pruning lasts, samples that score below the mean are *low*: floor((1 - ratio) |low|) of them,
    uniformly drawn, stay at weight 1 / (1 - ratio), so that the expected weighted sum over the selection is
    the sum over all samples, up to that floor. All others stay at weight 1. Then comes everything at weight 1.

    The authors rank by the very loss that is trained on, label smoothing included, which is 0.1 in their recipe.

    Attributes:
        rescale: false drops the weights.
        budget: keep exactly floor(budget * N) samples in every pruning epoch instead, the kept low ones at
            weight |low| / |kept low|. Where that would keep less than a tenth of the low ones, the boundary
            between low and high moves up the ranking until it keeps a tenth, or all samples are low.
    """

    ratio: float = 0.5
    delta: float = 0.875
    rescale: bool = True
    budget: float | None = None
    keeps: ClassVar[str] = "budget"

    def inert(self) -> tuple[str, ...]:
        return () if self.budget is None else ("ratio",)

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        if epoch >= self.pruning_epochs(epochs):
            return everything(len(scores))
        n = len(scores)
        is_low = below_mean(scores)
        n_low = int(np.count_nonzero(is_low))
        n_kept = floor((1 - self.ratio) * n_low)
        if self.budget is not None:
            dropped = n - share(n, self.budget)
            needed = min(n, math.ceil(dropped / MAX_RATIO - 1e-9))
            if n_low < needed:
                is_low = ~best(scores, n - needed, rng)
                n_low = needed
            n_kept = n_low - dropped
        weights = (~is_low).astype(np.float32)
        if n_kept:
            low = np.flatnonzero(is_low)
            weights[low[uniform(n_low, n_kept, rng)]] = n_low / n_kept if self.budget else 1 / (1 - self.ratio)
        indices = np.flatnonzero(weights > 0)
        chosen = weights[indices] if self.rescale else np.ones(len(indices), np.float32)
        return Selection(indices, chosen, ranked=True, low_fraction=n_low / n)


@dataclass(frozen=True, kw_only=True)
class SeTa(Pruner):
    """SeTa (Zhou et al., 2025), as its authors' code behaves; weight 1 throughout.

    While pruning lasts, (1 - ratio) of all samples are drawn uniformly and clustered by score into ``groups``
    clusters (one-dimensional k-means), ordered by mean score. Kept are ``round(groups * alpha)`` neighbouring
    clusters, starting at cluster ``epoch mod (groups - window + 1)``; in epoch 0 all of them. Then come uniform
    subsets of (1 - ratio).

    The clusters are no worse than the authors', who run scikit-learn's k-means once, and it ends in a local optimum: of
    the samples 3 % lie in another cluster in the median, and 43 % in the worst case seen.

    Attributes:
        budget: keep exactly floor(budget * N) samples in every pruning epoch: as many are drawn as the window
            needs to hold that many, and what it holds more is dropped uniformly. Where the window is too small
            even with all samples drawn, the rest is drawn uniformly from outside it.
    """

    ratio: float = 0.1
    groups: int = 5
    alpha: float = 0.9
    delta: float = 0.875
    budget: float | None = None
    keeps: ClassVar[str] = "budget"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 1:
            raise ValueError(f"SeTa: groups={self.groups} is out of range; use 1 or more")
        if not 0 < self.alpha <= 1 or self.width < 1:
            raise ValueError(
                f"SeTa: alpha={self.alpha} of {self.groups} groups keeps no cluster or too many; "
                "use a number up to 1 with round(groups * alpha) >= 1"
            )

    def beside(self, epochs: int) -> float:
        return (1 - self.ratio) * super().beside(epochs)

    @property
    def width(self) -> int:
        """Number of clusters kept; halves round to even, as the authors' do."""
        return round(self.groups * self.alpha)

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        n = len(scores)
        if epoch >= self.pruning_epochs(epochs):
            return unweighted(ascending(uniform(n, kept(n, self.ratio), rng), n))
        drawn = rng.permutation(np.arange(n, dtype=np.min_scalar_type(-n)))
        if self.budget is None:
            drawn = drawn[: kept(n, self.ratio)]
            chosen = drawn if epoch == 0 else drawn[self.window(scores[drawn], epoch)]
            return unweighted(ascending(chosen, n), ranked=epoch > 0)
        size = share(n, self.budget)
        if epoch == 0:
            return unweighted(ascending(drawn[:size], n))
        draw = size
        while True:
            inside = self.window(scores[drawn[:draw]], epoch)
            held = int(np.count_nonzero(inside))
            if held >= size or draw == n:
                break
            draw = min(n, max(draw + 1, math.ceil(draw * size / max(held, 1))))
        # `drawn` is in random order, so the first of a part are a uniform draw from it.
        chosen = np.concatenate([drawn[:draw][inside], drawn[:draw][~inside]])[:size]
        return unweighted(ascending(chosen, n), ranked=True)

    def window(self, scores: Floats, epoch: int) -> NDArray[np.bool_]:
        """Return the mask (M,) of the samples in the epoch's window of clusters; all, if there are not enough."""
        if len(scores) < self.groups:
            return np.ones(len(scores), bool)
        start = epoch % (self.groups - self.width + 1)
        group = cluster(scores, self.groups)
        return (group >= start) & (group < start + self.width)


@dataclass(frozen=True, kw_only=True)
class TopK(Pruner):
    """Hard selection, the control for what rescaling and annealing do.

    After ``warmup`` epochs on everything, the floor((1 - ratio) N) best-scored samples at weight 1, ties broken
    at random; everything again once pruning ends.
    """

    ratio: float = 0.3
    warmup: int = 5
    delta: float = 1.0
    keeps: ClassVar[str] = "ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 0:
            raise ValueError(f"{type(self).__name__}: warmup={self.warmup} is out of range; use 0 or more")

    def pruned(self, epochs: int) -> range:
        return range(self.warmup, self.pruning_epochs(epochs))

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        n = len(scores)
        if epoch < self.warmup or epoch >= self.pruning_epochs(epochs):
            return everything(n)
        return unweighted(np.flatnonzero(self.choose(scores, kept(n, self.ratio), rng)), ranked=True)

    def choose(self, scores: Floats, size: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return the mask (N,) of ``size`` samples."""
        return best(scores, size, rng)


@dataclass(frozen=True, kw_only=True)
class Averaging(TopK):
    """What the two rules of Raju et al. (2021), "Accelerating deep learning with dynamic data pruning", share.

    Each sample's score is averaged exponentially over the epochs that saw it, and so is its squared distance from
    the average before it; the first score counts in full. After ``warmup`` epochs on everything come selections
    of floor((1 - ratio) N) samples, at weight 1. Meant for ``score=loss``. Where the score that ranks changes, as from
    the loss to DAS, the averages begin anew. The paper selects at checkpoints some epochs apart, and this every epoch;
    the values of alpha, epsilon and c are the paper's as far as known, without its code at hand.

    Attributes:
        alpha: weight of the new score in the average.
    """

    alpha: float = 0.8
    warmup: int = 1
    memory: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(
                f"{type(self).__name__}: alpha={self.alpha} is out of range; use a number above 0, up to 1"
            )

    def rank(self, mean: Floats, variance: Floats) -> Floats:
        """Return what to rank by (N,), from the averages (N,)."""
        return mean.copy()

    def digest(self, scores: Floats, seen: Ints, memory: NDArray[np.float32]) -> Floats:
        mean, variance = memory
        first = np.isnan(mean)
        later = seen[~first[seen]]
        mean[first], variance[first] = scores[first], 0
        away = scores[later] - mean[later]
        variance[later] += self.alpha * (away**2 - variance[later])
        mean[later] += self.alpha * away
        return self.rank(mean, variance)


@dataclass(frozen=True, kw_only=True)
class EpsilonGreedy(Averaging):
    """Raju et al.'s epsilon-greedy rule: the best by average, and a share drawn uniformly from all others.

    Attributes:
        epsilon: share of the kept samples that is drawn.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"EpsilonGreedy: epsilon={self.epsilon} is out of range; use a number from 0 to 1")

    def choose(self, scores: Floats, size: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        drawn = floor(self.epsilon * size)
        chosen = best(scores, size - drawn, rng)
        others = np.flatnonzero(~chosen)
        chosen[others[uniform(len(others), drawn, rng)]] = True
        return chosen


@dataclass(frozen=True, kw_only=True)
class UCB(Averaging):
    """Raju et al.'s upper confidence bound: the best by average + c * variance.

    Attributes:
        c: weight of the variance.
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c < 0:
            raise ValueError(f"UCB: c={self.c} is out of range; use 0 or more")

    def rank(self, mean: Floats, variance: Floats) -> Floats:
        return mean + self.c * variance


PRUNERS: dict[str, type[Pruner]] = {
    "full": Full,
    "random": RandomSubset,
    "infobatch": InfoBatch,
    "seta": SeTa,
    "topk": TopK,
    "rs2": RS2,
    "epsilon_greedy": EpsilonGreedy,
    "ucb": UCB,
    **STATIC,
}


def below_mean(scores: Floats) -> NDArray[np.bool_]:
    """Return the mask (N,) of the scores below their mean, in float64; equal scores have a mean equal to each."""
    least, chunks = scores.min(), range(0, len(scores), CHUNK)
    above = (scores[start : start + CHUNK].astype(np.float64) - least for start in chunks)
    mean = sum(float(chunk.sum()) for chunk in above) / len(scores)
    mask = np.empty(len(scores), bool)
    for start in chunks:
        mask[start : start + CHUNK] = scores[start : start + CHUNK].astype(np.float64) - least < mean
    return mask


def cluster(scores: Floats, groups: int, resolution: int = 512) -> NDArray[np.int32]:
    """One-dimensional k-means: return each sample's cluster (N,), numbered by ascending score.

    The best cuts on a grid of ``resolution`` quantiles and as many equal steps are found by dynamic
    programming (exactly optimal up to that many samples), then refined by Lloyd's iterations on all samples.
    With fewer distinct scores than groups, every group of ties is divided, the largest parts first, into equal
    chunks in the order given, until there are ``groups`` clusters; so equal scores give equal chunks.
    """
    ordered = np.sort(scores)
    changes = ordered[1:] != ordered[:-1]
    distinct = 1 + int(np.count_nonzero(changes))
    if distinct <= groups:
        values = ordered[np.r_[True, changes]]
        del ordered, changes  # memory, at a hundred million samples
        return _divide_ties(scores, values, groups)
    if distinct <= 2 * resolution:
        grid = np.r_[0, np.flatnonzero(changes) + 1, len(ordered)]
    else:
        grid = _grid(ordered, resolution)
    prefix = _PrefixSums(ordered)
    cuts = _best_cuts(grid, *prefix(grid), groups)
    for _ in range(100):
        sums, _ = prefix(cuts)
        means = np.diff(sums) / np.diff(cuts)
        middle = [prefix.below(value) for value in (means[1:] + means[:-1]) / 2]
        moved = np.r_[0, middle, len(ordered)].astype(np.int64)
        if (moved == cuts).all() or (np.diff(moved) == 0).any():
            break
        cuts = moved
    label = np.zeros(len(scores), np.int32)
    for boundary in ordered[cuts[1:-1]]:
        label += scores >= boundary
    return label


class _PrefixSums:
    """Float64 sums of the first k of N ordered values about their mean, and of the squares, for any k.

    Only every ``STRIDE``-th is kept, so that memory hardly grows.
    """

    def __init__(self, ordered: Floats) -> None:
        n = len(ordered)
        self.ordered = ordered
        self.mean = sum(float(ordered[i : i + CHUNK].astype(np.float64).sum()) for i in range(0, n, CHUNK)) / n
        self.kept = np.zeros((2, n // STRIDE + 1))
        for start in range(0, n - n % STRIDE, CHUNK):
            centred = self._centred(ordered[start : min(start + CHUNK, n - n % STRIDE)])
            first = start // STRIDE
            for before, values in zip(self.kept, (centred, centred * centred), strict=True):
                values[0] += before[first]
                sums = np.cumsum(values, out=values)[STRIDE - 1 :: STRIDE]
                before[first + 1 : first + 1 + len(sums)] = sums

    def __call__(self, counts: Ints) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return both sums (K,) of the first ``counts`` (K,) values."""
        whole, rest = np.divmod(counts, STRIDE)
        place = np.minimum(whole[:, None] * STRIDE + np.arange(STRIDE), len(self.ordered) - 1)
        centred = self._centred(self.ordered[place])
        sums, squares = (
            np.cumsum(np.c_[kept[whole], values], axis=1)[np.arange(len(counts)), rest]
            for kept, values in zip(self.kept, (centred, centred * centred), strict=True)
        )
        return sums, squares

    def below(self, value: float) -> int:
        """Return the number of values that lie below ``value`` about the mean."""
        return bisect_left(self.ordered, value, key=lambda x: float(x) - self.mean)

    def _centred(self, values: Floats) -> NDArray[np.float64]:
        return np.asarray(values, np.float64) - self.mean


def _grid(ordered: Floats, resolution: int) -> Ints:
    """Candidate cuts: positions between distinct values, thinned to quantiles and equal steps of the range."""
    quantiles = np.linspace(0, len(ordered) - 1, resolution).astype(np.int64)
    steps = np.linspace(float(ordered[0]), float(ordered[-1]), resolution)
    rounded = steps.astype(ordered.dtype)
    above = np.where(rounded < steps, np.nextafter(rounded, ordered.dtype.type(np.inf)), rounded)
    values = np.r_[ordered[quantiles], above]
    return np.unique(np.r_[0, np.searchsorted(ordered, values), len(ordered)])


def _best_cuts(grid: Ints, sums: Floats, squares: Floats, groups: int) -> Ints:
    """Cuts (groups + 1,) out of ``grid`` with the least sum of squares within the clusters.

    ``sums`` and ``squares`` are those of the values before each place of the grid.
    """
    size = np.maximum(grid[:, None] - grid[None, :], 1)
    cost = squares[:, None] - squares[None, :] - (sums[:, None] - sums[None, :]) ** 2 / size  # to a place, from one
    cost[np.triu_indices(len(grid))] = np.inf
    total, choices = cost[:, 0], []
    for _ in range(groups - 1):
        through = total + cost
        choices.append(through.argmin(1))
        total = through[np.arange(len(grid)), choices[-1]]
    path = [len(grid) - 1]
    for choice in reversed(choices):
        path.append(choice[path[-1]])
    return grid[np.r_[0, path[::-1]]]


def _divide_ties(scores: Floats, values: Floats, groups: int) -> NDArray[np.int32]:
    members = [np.flatnonzero(scores == value) for value in values]
    sizes, parts = np.array([len(ties) for ties in members]), np.ones(len(values), np.int64)
    for _ in range(groups - len(values)):
        parts[np.argmax(sizes / parts)] += 1
    label, number = np.empty(len(scores), np.int32), 0
    for ties, count in zip(members, parts, strict=True):
        for chunk in np.array_split(ties, count):
            label[chunk] = number
            number += 1
    return label
