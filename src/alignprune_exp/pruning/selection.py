"""What every pruner shares: the selection, the face of a pruner, and exact sizes and draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .arguments import check_kinds, is_number
from .cleaning import checksum

if TYPE_CHECKING:
    from typing import Self

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

MAX_RATIO = 0.9  # InfoBatch's weights stay at 10 or below
UNSCORED = 3.0  # what a sample without a score is ranked by


@dataclass(frozen=True)
class Selection:
    """The samples of one epoch.

    Attributes:
        indices: (M,) sample indices, ascending, each once; one at least.
        weights: (M,) float32 gradient weights, above 0.
        ranked: whether the scores had a say.
        low_fraction: share of all samples that was open to pruning for its score, where the rule has one.
    """

    indices: Ints
    weights: NDArray[np.float32]
    ranked: bool = False
    low_fraction: float = math.nan

    def check(self, n: int) -> None:
        """Raise ValueError unless it is that of n samples."""
        indices, weights = np.asarray(self.indices), np.asarray(self.weights)
        whole = indices.dtype.kind in "iu" and indices.ndim == 1 and len(indices) > 0
        if not whole or indices[0] < 0 or indices[-1] >= n or not (indices[1:] > indices[:-1]).all():
            raise ValueError(f"indices are not some of 0 to {n - 1} as whole numbers, ascending, each once")
        if weights.shape != indices.shape or not (weights > 0).all() or not np.isfinite(weights.sum()):
            raise ValueError(f"weights are not {len(indices)} finite numbers above 0, one for each of its indices")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides which samples are trained on: every epoch anew, a `Pruner`, or once, a `Criterion`.

    A subclass's fields are its settings. Where it has them, ``ratio`` is the share to prune (of what is each
    pruner's own), ``delta`` the share of the run that is pruned, before annealing, and ``budget`` the share of
    all samples to keep exactly.

    Attributes:
        keeps: the setting that says which share of all samples an epoch keeps, or ``ratio`` for that which it prunes;
            None where there is none.
        least: the share of all samples that a pruned epoch keeps at the least, whatever is to be saved.
        revision: raised where the rule is corrected so that it chooses otherwise: it is part of what a run is, and
            what ran by the old rule is another run.
        asks: whether it is for whoever trains to find out the labels of what it selects, before an epoch, and none but
            these are known.
    """

    keeps: ClassVar[str | None] = None
    least: ClassVar[float] = 0.0
    revision: ClassVar[int] = 0
    uses_scores: ClassVar[bool] = False
    asks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_kinds(self)
        name = type(self).__name__
        ratio, budget = getattr(self, "ratio", 0), getattr(self, "budget", None)
        if not 0 <= ratio <= MAX_RATIO:
            raise ValueError(f"{name}: ratio={ratio} is out of range; use a number from 0 to {MAX_RATIO}")
        if not 0 < self._delta <= 1:
            raise ValueError(f"{name}: delta={self._delta} is out of range; use a number above 0, up to 1")
        if budget is not None and not 0 < budget <= 1:
            raise ValueError(f"{name}: budget={budget} is out of range; use a number above 0, up to 1")

    def described(self) -> str:
        """Return its name and its settings, of arrays a checksum."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        sums = {name: checksum(value) for name, value in told.items() if np.ndim(value)}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in (told | sums).items())})"

    @property
    def needs_noise_rate(self) -> bool:
        """Whether it selects by an estimate of the share of wrong labels, and so only as ``informed``."""
        return False

    def inert(self) -> tuple[str, ...]:
        """Return the settings that have no effect beside the others."""
        return ()

    @property
    def _delta(self) -> float:
        return getattr(self, "delta", 1.0)

    def pruning_epochs(self, epochs: int) -> int:
        """Return the number of pruning epochs: those with epoch + 1 <= delta * epochs."""
        return floor(self._delta * epochs)

    def pruned(self, epochs: int) -> range:
        """Return the epochs of a run, a static warm-up counted, that what it ``keeps`` makes shorter."""
        return range(self.pruning_epochs(epochs))

    def beside(self, epochs: int) -> float:
        """Return the training that no selection saves, in epochs on everything."""
        return epochs - len(self.pruned(epochs))

    def saving(self, saved: float, epochs: int) -> Self:
        """Return this with what it keeps set so that a run of ``epochs`` epochs saves exactly ``saved``.

        That is 1 - (samples trained over all epochs, those of a warm-up included) / (n * epochs), up to the rounding
        of a selection to whole samples. So methods are compared at one cost, whatever they anneal or warm up.

        Raises ValueError for a pruner that cannot be told how much to keep, or cannot save that much.
        """
        name = type(self).__name__
        if self.keeps is None:
            raise ValueError(f"{name} has no setting for how much it keeps, and saves what it saves; leave out saved")
        check_saved(saved)
        pruned, beside = len(self.pruned(epochs)), self.beside(epochs)
        left = epochs - saved * epochs - beside
        if not (left > 0 and self.least * pruned <= left <= pruned):
            causes = [key for key in ("warmup", "delta") if hasattr(self, key)]
            settings = " and ".join(f"{key}={getattr(self, key)}" for key in causes)
            most, fewest = 1 - (beside + self.least * pruned) / epochs, 1 - (beside + pruned) / epochs
            remedies = [f"another {' or '.join(causes)}"]
            if left > pruned:
                remedies.insert(0, f"saved of at least {fewest:.3g}")
            elif most > 0:
                remedies.insert(0, f"saved below {most:.3g}")
            kept = f", and {self.least:.2g} of the rest always kept" if self.least and left <= pruned else ""
            raise ValueError(
                f"saved={saved:g} is out of reach: with {settings} as much as {beside:g} of {epochs} epochs is never "
                f"pruned{kept}; use {', or '.join(remedies)}"
            )
        keeps = left / pruned
        setting: dict[str, Any] = {self.keeps: 1 - keeps if self.keeps == "ratio" else keeps}
        return replace(self, **setting)

    def lasting(self, saved: float, epochs: int) -> int:
        """Return the epochs of a run that is to save ``saved`` of ``epochs`` epochs on everything."""
        return epochs

    def planned(self, epochs: int) -> int:
        """Return the epochs on everything that what a run of ``epochs`` epochs saves is counted against."""
        return epochs

    def warmup_epochs(self, epochs: int) -> int:
        """Return the epochs on everything that come before the ``epochs`` of training, which start from scratch."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Pruner(Plan):
    """Chooses the samples of each epoch. Subclass it and implement ``select``."""

    uses_scores: ClassVar[bool] = True
    memory: ClassVar[int] = 0  # numbers a sample that it carries from epoch to epoch, for ``digest``

    def ranked(self, epochs: int) -> range:
        """Return the epochs whose samples the scores are to choose, where it uses them."""
        return self.pruned(epochs)

    def check(self, epochs: int) -> None:
        """Raise ValueError where in a run of so many epochs no score would ever choose."""
        if self.uses_scores and not self.ranked(epochs):
            causes = [key for key in ("warmup", "every", "delta") if hasattr(self, key)]
            settings = " and ".join(f"{key}={getattr(self, key)}" for key in causes)
            leaves = "leaves" if len(causes) == 1 else "leave"
            raise ValueError(
                f"{type(self).__name__}: {settings} {leaves} scores none of {epochs} epochs to choose in; use more "
                f"epochs, or another {' or '.join(causes)}"
            )

    def informed(self, noise_rate: float) -> Self:
        """Return this pruner as it selects at an estimated noise rate, in [0, 1]; NaN where that is not known yet."""
        return self

    def address(self, epoch: int, epochs: int, n: int) -> int:
        """Return the number that the generator of an epoch's selection is named by."""
        return epoch

    def at_most(self, n: int, epoch: int, epochs: int) -> int:
        """Return how many of n samples an epoch has, as far as that is known before: exactly, or at most."""
        return n

    def looks_around(self, epoch: int, epochs: int) -> bool:
        """Return whether what an epoch leaves out is to be recorded too, at its end, for the choice that comes next."""
        return False

    def digest(self, scores: Floats, selected: Ints, seen: Ints, memory: NDArray[np.float32]) -> Floats:
        """Return what to rank the N samples by, after an epoch.

        Args:
            scores: (N,), NaN where a sample has none.
            selected: the samples of the epoch.
            seen: those of them that were trained on, whose scores are new; a loader may leave out a last batch.
            memory: (``memory``, N), to be updated in place; NaN at first, and once the score that ranks changes.
        """
        return scores

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        """Return the samples of ``epoch``.

        Args:
            scores: (N,) without NaN, higher is more worth keeping.
            epoch: the coming epoch, counted from 0.
            epochs: number of epochs T of training.
            rng: the generator of this one selection.
        """
        raise NotImplementedError


def settings(pruner: type[Plan]) -> tuple[str, ...]:
    """Return the names that a pruner's constructor takes."""
    return tuple(field.name for field in fields(pruner))


def floor(x: float) -> int:
    """Round down, but not 0.9999999999999998 to 0: ⌊(1 - 0.9) · 10⌋ is 1."""
    return math.floor(x + 1e-9)


def kept(n: int, ratio: float) -> int:
    """⌊(1 - ratio) n⌋, and at least one sample."""
    return max(1, floor((1 - ratio) * n))


def share(n: int, budget: float) -> int:
    """⌊budget · n⌋, and at least one sample."""
    return max(1, floor(budget * n))


def check_epochs(setting: str, value: float, none: bool = False) -> None:
    """Raise ValueError for what is neither a number of epochs, ``none`` among them or not, nor a share below 1."""
    if not is_number(value) or value < 0 or (value == 0 and not none) or (value >= 1 and value % 1):
        raise ValueError(f"{setting}={value!r} is out of range; use a number of epochs, or a share of them below 1")


def check_saved(saved: float, none: bool = False) -> None:
    """Raise ValueError for what is no share of a training that can be saved, ``none`` of it among them or not."""
    if not (is_number(saved) and 0 <= saved < 1) or (saved == 0 and not none):
        raise ValueError(f"saved={saved!r} is out of range; use a number above 0 and below 1")


def epochs_of(warmup: float, epochs: int) -> int:
    """Return the epochs of a warm-up: so many, or below 1 that share of ``epochs``, rounded, and at least one."""
    return int(warmup) if warmup >= 1 or warmup == 0 else max(1, round(warmup * epochs))


def proportional(members: Sequence[int] | Ints, size: int, ties: Floats | None = None) -> Ints:
    """Divide ``size`` over groups (G,) of so many members, in proportion, by largest remainder.

    Of equal remainders the lowest in ``ties`` (G,) win; without these, the first. No group gets more than it has.
    """
    counts = np.asarray(members, np.int64)
    quota, remainder = np.divmod(counts * size, counts.sum())
    order = np.lexsort((np.arange(len(counts)) if ties is None else ties, -remainder))
    quota[order[: size - quota.sum()]] += 1
    return quota


def everything(n: int) -> Selection:
    return unweighted(np.arange(n))


def unweighted(indices: Ints, ranked: bool = False) -> Selection:
    return Selection(indices, np.ones(len(indices), np.float32), ranked)


def ascending(indices: Ints, n: int) -> Ints:
    """Sort some of ``range(n)``, each there once."""
    chosen = np.zeros(n, bool)
    chosen[indices] = True
    return np.flatnonzero(chosen)


def uniform(n: int, size: int, rng: np.random.Generator) -> Ints:
    """Return ``size`` of ``range(n)``, uniformly without replacement, in no particular order."""
    return rng.choice(n, size, replace=False, shuffle=False)


def best(scores: Floats, size: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return the mask (N,) of the ``size`` highest scores; ties at the boundary are broken at random."""
    if size == 0:
        return np.zeros(len(scores), bool)
    boundary = np.partition(scores, len(scores) - size)[len(scores) - size]
    mask = scores > boundary
    tied = np.flatnonzero(scores == boundary)
    mask[tied[uniform(len(tied), size - int(np.count_nonzero(mask)), rng)]] = True
    return mask
