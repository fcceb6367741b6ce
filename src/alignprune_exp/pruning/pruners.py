"""Pruners: from one score a sample to the samples of an epoch and their gradient weights.

A pruner never looks at what its score means: InfoBatch with DAS differs from InfoBatch by the score alone.
Epochs are counted from 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from .coresets import STATIC
from .kmeans import cluster
from .selection import (
    MAX_RATIO,
    UNSCORED,
    Floats,
    Ints,
    Plan,
    Pruner,
    Selection,
    ascending,
    best,
    check_epochs,
    check_saved,
    epochs_of,
    everything,
    floor,
    kept,
    share,
    uniform,
    unweighted,
)

if TYPE_CHECKING:
    from typing import Self


AUTOMATIC = 0.9  # of the noise rate, which at the end of a warm-up leaves out more wrong labels than right ones


@dataclass(frozen=True, kw_only=True)
class Full(Pruner):
    """Every sample, every epoch."""

    uses_scores: ClassVar[bool] = False

    def saving(self, saved: float, epochs: int) -> Self:
        """Return this pruner, which saves nothing whatever is asked of it, and so stands beside any budget."""
        check_saved(saved, none=True)
        return self

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        return everything(len(scores))


@dataclass(frozen=True, kw_only=True)
class Shorter(Full):
    """Every sample, in fewer epochs, to which the schedule is fitted: the control for what pruning gains by its cost.

    Attributes:
        of: epochs of the run that it is shorter than.
    """

    of: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of is not None and self.of < 1:
            raise ValueError(f"Shorter: of={self.of} is out of range; use 1 or more")

    def saving(self, saved: float, epochs: int) -> Self:
        check_saved(saved, none=True)
        return replace(self, of=epochs)

    def lasting(self, saved: float, epochs: int) -> int:
        """Return the whole number of epochs nearest to (1 - saved) of them, and at least one."""
        return max(1, round((1 - saved) * epochs))

    def planned(self, epochs: int) -> int:
        return epochs if self.of is None else self.of


@dataclass(frozen=True, eq=False, kw_only=True)
class Fixed(Pruner):
    """The same samples every epoch, at weight 1: what a `Criterion` has chosen.

    Attributes:
        indices: (k,) samples, each once.
    """

    indices: Ints
    uses_scores: ClassVar[bool] = False

    def at_most(self, n: int, epoch: int, epochs: int) -> int:
        return len(self.indices)

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        n, indices = len(scores), np.unique(self.indices)
        if not 0 < len(self.indices) == len(indices) or indices[0] < 0 or indices[-1] >= n:
            raise ValueError(f"Fixed: indices are not some of 0 to {n - 1}, each once; pass those of a Choice")
        return unweighted(indices)


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

    def at_most(self, n: int, epoch: int, epochs: int) -> int:
        return self.size(n)

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

    def address(self, epoch: int, epochs: int, n: int) -> int:
        """Return the number of the epoch's permutation."""
        return epoch // -(-n // self.size(n))

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        n = len(scores)
        size = self.size(n)
        begin = epoch % -(-n // size) * size
        return unweighted(ascending(rng.permutation(n).take(range(begin, begin + size), mode="wrap"), n))


@dataclass(frozen=True, kw_only=True)
class Sieve(RandomSubset):
    """Leaves out what seems mislabelled, and draws each epoch's samples freshly from the rest; weight 1 throughout.

    For ``warmup`` epochs, or below 1 a share of all, rounded, it is `RS2`. From then on the ``exclude`` share of all
    samples that scores worst stays out, and the epochs take slices of permutations of the rest as RS2 does, less
    ``explore`` of each epoch's samples, drawn likewise from what is out: their scores stay up to date, and who was put
    out wrongly comes back. Where less than an epoch's samples would be left, fewer stay out. With nothing to exclude
    it is RS2 to the end.

    Meant for ``score=cleaning``: by the losses of all epochs, standardised within the class.

    Attributes:
        exclude: the share; best somewhat less than you take the noise for, and little where wrong labels are hard to
            tell. ``auto`` is `AUTOMATIC` of what the noise rate seems to be at the end of the warm-up, which takes
            the losses of a trusted set, or else a score that is told a `readout`; nothing where nothing seems wrong.
    """

    exclude: float | Literal["auto"] = 0.3
    explore: float = 0.05
    warmup: float = 0.5
    uses_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exclude != "auto" and not (isinstance(self.exclude, int | float) and 0 <= self.exclude <= MAX_RATIO):
            raise ValueError(
                f"Sieve: exclude={self.exclude} is out of range; use a number from 0 to {MAX_RATIO}, or auto"
            )
        if not 0 <= self.explore < 1:
            raise ValueError(f"Sieve: explore={self.explore} is out of range; use a number from 0, below 1")
        check_epochs("Sieve: warmup", self.warmup)

    @property
    def needs_noise_rate(self) -> bool:
        return self.exclude == "auto"

    def informed(self, noise_rate: float) -> Self:
        return replace(self, exclude=0.0 if math.isnan(noise_rate) else min(AUTOMATIC * noise_rate, MAX_RATIO))

    def ranked(self, epochs: int) -> range:
        return range(epochs_of(self.warmup, epochs), epochs)

    def sizes(self, epoch: int, epochs: int, n: int) -> tuple[int, int, int]:
        """Return how many samples are out, and how many are drawn from the rest and from these."""
        size = self.size(n)
        out = 0 if epoch < epochs_of(self.warmup, epochs) else min(floor(float(self.exclude) * n), n - size)
        explored = min(floor(self.explore * size), out)
        return out, size - explored, explored

    def address(self, epoch: int, epochs: int, n: int) -> int:
        """Return the number of the epoch's permutation."""
        out, drawn, _ = self.sizes(epoch, epochs, n)
        return epoch // -(-(n - out) // drawn)

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        n = len(scores)
        out, drawn, explored = self.sizes(epoch, epochs, n)
        permutation = rng.permutation(n)
        left = best(scores, n - out, rng)[permutation]
        begin = epoch % -(-(n - out) // drawn) * drawn
        chosen = [
            permutation[left].take(range(begin, begin + drawn), mode="wrap"),
            permutation[~left].take(range(epoch * explored, (epoch + 1) * explored), mode="wrap"),
        ]
        return replace(unweighted(ascending(np.concatenate(chosen), n), ranked=out > 0), low_fraction=out / n)


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
            between low and high moves up the ranking until it keeps a tenth. By a budget of a tenth all samples would
            be low, and no score would choose.
    """

    ratio: float = 0.5
    delta: float = 0.875
    rescale: bool = True
    budget: float | None = None
    keeps: ClassVar[str] = "budget"
    least: ClassVar[float] = 1 - MAX_RATIO

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget <= self.least + 1e-9:
            raise ValueError(
                f"InfoBatch: budget={self.budget:.3g} keeps a tenth of the samples at most, which no score would "
                "choose; use more than 0.1"
            )

    def inert(self) -> tuple[str, ...]:
        return () if self.budget is None else ("ratio",)

    def at_most(self, n: int, epoch: int, epochs: int) -> int:
        return n if self.budget is None or epoch >= self.pruning_epochs(epochs) else share(n, self.budget)

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

    def ranked(self, epochs: int) -> range:
        return self.pruned(epochs)[1:]

    @property
    def width(self) -> int:
        """Number of clusters kept; halves round to even, as the authors' do."""
        return round(self.groups * self.alpha)

    def at_most(self, n: int, epoch: int, epochs: int) -> int:
        if self.budget is None or epoch >= self.pruning_epochs(epochs):
            return kept(n, self.ratio)
        return share(n, self.budget)

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
    least: ClassVar[float] = 1 - MAX_RATIO

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup < 0:
            raise ValueError(f"{type(self).__name__}: warmup={self.warmup} is out of range; use 0 or more")

    def pruned(self, epochs: int) -> range:
        return range(self.warmup, self.pruning_epochs(epochs))

    def at_most(self, n: int, epoch: int, epochs: int) -> int:
        return kept(n, self.ratio) if epoch in self.pruned(epochs) else n

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        n = len(scores)
        if epoch < self.warmup or epoch >= self.pruning_epochs(epochs):
            return everything(n)
        return unweighted(np.flatnonzero(self.choose(scores, kept(n, self.ratio), rng)), ranked=True)

    def choose(self, scores: Floats, size: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return the mask (N,) of ``size`` samples."""
        return best(scores, size, rng)


@dataclass(frozen=True, kw_only=True)
class Query(Pruner):
    """Pool-based active learning (Lewis and Gale, SIGIR 1994): trains on what it has asked the labels of, at weight 1.

    It begins with a ``start`` share of all samples, uniformly drawn, and every ``every`` epochs asks for as many more,
    the best-scored of the others, as make it a ``budget`` share with the last round. Before a round what takes no
    labels is to be recorded of the others, such as minus the logarithm of the highest probability, which `Loss` ranks
    by the least confidence; where nothing is, they are drawn uniformly.
    """

    start: float = 0.02
    every: int = 4
    budget: float = 0.2
    asks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.start <= self.budget:
            raise ValueError(
                f"Query: start={self.start} is out of range; use a number above 0, up to budget={self.budget}"
            )
        if self.every < 1:
            raise ValueError(f"Query: every={self.every} is out of range; use 1 or more")

    def at_most(self, n: int, epoch: int, epochs: int) -> int:
        rounds = (epochs - 1) // self.every
        asked = epoch // self.every / rounds if rounds else 0.0
        return share(n, self.start + asked * (self.budget - self.start))

    def ranked(self, epochs: int) -> range:
        return range(self.every, epochs)

    def looks_around(self, epoch: int, epochs: int) -> bool:
        return (epoch + 1) % self.every == 0 and epoch + 1 < epochs

    def digest(self, scores: Floats, selected: Ints, seen: Ints, memory: NDArray[np.float32]) -> Floats:
        """Rank what was asked, which is what was selected, above all others."""
        ranks = scores.copy()
        ranks[selected] = 2 * np.fmax.reduce(scores, initial=UNSCORED)
        return ranks

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        size = self.at_most(len(scores), epoch, epochs)
        return unweighted(np.flatnonzero(best(scores, size, rng)), ranked=epoch > 0)


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

    def digest(self, scores: Floats, selected: Ints, seen: Ints, memory: NDArray[np.float32]) -> Floats:
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


PRUNERS: dict[str, type[Plan]] = {
    "full": Full,
    "shorter": Shorter,
    "random": RandomSubset,
    "infobatch": InfoBatch,
    "seta": SeTa,
    "topk": TopK,
    "rs2": RS2,
    "sieve": Sieve,
    "query": Query,
    "epsilon_greedy": EpsilonGreedy,
    "ucb": UCB,
    **STATIC,
}


def below_mean(scores: Floats) -> NDArray[np.bool_]:
    """Return the mask (N,) of the scores below their mean, in float64; equal scores have a mean equal to each."""
    above = scores.astype(np.float64) - scores.min()
    return above < above.mean()
