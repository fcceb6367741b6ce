"""One choice after a warm-up, which training from scratch then keeps to.

A `Criterion` says what it needs of an `Evidence`, and chooses once. Shape legend: n samples, C classes, d dimensions of
an embedding, k chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..arguments import check_version
from ..cleaning import array
from ..selection import Floats, Ints, Plan, check_epochs, epochs_of, share

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 1 << 14  # samples in float64 at a time


@dataclass(frozen=True)
class Evidence:
    """What a warm-up leaves behind for a choice: arrays or tensors. A criterion says which of it it ``needs``.

    Attributes:
        labels: (n,) given labels, 0..C-1.
        probabilities: (n, C) softmax of the network at the end of the warm-up, in eval mode, without augmentation; for
            a criterion that is ``strong``, of strongly augmented images.
        embeddings: (n, d) what goes into its last linear layer, of the same images.
        losses: (n,) mean training loss over the warm-up.
        forgotten: (n,) forgetting events over the warm-up; infinity where a sample was never classified right.
        reference: the same of the reference set, whose labels are trusted.
    """

    labels: Ints
    probabilities: Floats | None = None
    embeddings: Floats | None = None
    losses: Floats | None = None
    forgotten: Floats | None = None
    reference: Evidence | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            values: Any = getattr(self, each.name)
            if values is not None and each.name != "reference":
                object.__setattr__(self, each.name, array(values))


def count_forgotten(events: Any, learnt: Any, right: Any, seen: Any, now: Any) -> None:
    """Count, in place, the forgetting events of the samples ``seen``, of which is known whether they are right ``now``.

    Such an event (Toneva et al., 2019) is a sample that was classified right when it was last seen and is wrong now,
    both times as the training pass found it.

    Args:
        events, learnt, right: (n,) arrays or tensors: how many there were, and whether a sample was ever right, and
            when it was last seen.
        seen: (k,) some of the n, each once, or a slice.
        now: (k,) true where it is right.
    """
    events[seen] += right[seen] & ~now
    learnt[seen] |= now
    right[seen] = now


class WarmUpLog:
    """Counts, epoch by epoch, what the warm-up shows of n samples, forgetting events by `count_forgotten`."""

    def __init__(self, n: int) -> None:
        self.epochs = 0
        self.sums = np.zeros(n)
        self.right = np.zeros(n, bool)
        self.learnt = np.zeros(n, bool)
        self.events = np.zeros(n, np.int64)

    def observe(self, losses: Floats | Tensor, correct: NDArray[np.bool_] | Tensor) -> None:
        """Take note of an epoch: every sample's loss (n,), and whether it was classified right (n,).

        Raises ValueError for another number of samples, and for what is neither right nor wrong.
        """
        losses, correct = array(losses), array(correct)
        if losses.shape != self.sums.shape or correct.shape != self.sums.shape:
            raise ValueError(
                f"losses have shape {losses.shape}, correct {correct.shape}; both must be {self.sums.shape}"
            )
        if not np.isin(correct, (0, 1)).all():
            raise ValueError("correct has values other than 0 and 1; it says of each sample whether it was right")
        self.epochs += 1
        self.sums += losses
        count_forgotten(self.events, self.learnt, self.right, slice(None), correct.astype(bool))

    @property
    def losses(self) -> NDArray[np.float64]:
        """The mean loss (n,) over the epochs."""
        return self.sums / max(self.epochs, 1)

    @property
    def forgotten(self) -> NDArray[np.float64]:
        """The forgetting events (n,), infinity where a sample was never classified right."""
        return np.where(self.learnt, self.events, np.inf)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: tensors and numbers."""
        import torch

        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in ("sums", "right", "learnt", "events")}
        return {"epochs": self.epochs, **arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state of another number of samples, or of another version."""
        check_version(self.state_dict(), state)
        if state["sums"].shape != self.sums.shape:
            raise ValueError(f"the state is of {len(state['sums'])} samples, this log of {len(self.sums)}")
        self.epochs = state["epochs"]
        for name in ("sums", "right", "learnt", "events"):
            setattr(self, name, state[name].numpy().copy())


@dataclass(frozen=True)
class Choice:
    """What training keeps to.

    Attributes:
        indices: (k,) chosen samples, ascending, each once.
        facts: numbers about how they were chosen, by name, for the record.
    """

    indices: Ints
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Criterion(Plan):
    """Chooses floor(fraction * n) samples once, by what a warm-up shows. Subclass it and implement ``pick``.

    >>> evidence = Evidence(labels=labels, probabilities=probabilities)                 # doctest: +SKIP
    >>> chosen = EL2N(fraction=0.5).choose(evidence, np.random.default_rng(0))          # doctest: +SKIP
    >>> pruning = DynamicPruning(dataset, 200, Fixed(indices=chosen.indices))           # doctest: +SKIP

    Attributes:
        warmup: epochs on everything before the choice, on top of those of training; below 1 a share of those, rounded.
        fraction: share of the samples that is kept.
    """

    warmup: int | float = 10
    fraction: float = 0.5
    keeps: ClassVar[str] = "fraction"
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of the Evidence
    strong: ClassVar[bool] = False  # whether its probabilities and embeddings are of strongly augmented images

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_epochs(f"{name}: warmup", self.warmup, none=True)
        if self.warmup == 0 and self.needs & {"losses", "forgotten"}:
            raise ValueError(f"{name}: warmup=0 leaves no losses to choose by; use 1 or more")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"{name}: fraction={self.fraction} is out of range; use a number above 0, up to 1")

    def pruned(self, epochs: int) -> range:
        warmup = self.warmup_epochs(epochs)
        return range(warmup, warmup + epochs)

    def beside(self, epochs: int) -> float:
        return self.warmup_epochs(epochs)

    def warmup_epochs(self, epochs: int) -> int:
        return epochs_of(self.warmup, epochs)

    def choose(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        """Return the choice; raise ValueError for evidence that is missing, of a wrong shape, or not a number, and for
        labels that are no classes, or none of its probabilities."""
        self._check(evidence)
        return self.pick(evidence, rng)

    def pick(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        """Return the choice, from the evidence that the criterion needs."""
        raise NotImplementedError

    def _check(self, evidence: Evidence) -> None:
        name = type(self).__name__
        parts = [("", evidence)]
        if "reference" in self.needs:
            if evidence.reference is None:
                raise ValueError(f"{name} chooses by a reference set, which the evidence lacks")
            parts.append(("the reference set's ", evidence.reference))
        for whose, part in parts:
            size = len(part.labels)
            for needed in sorted(self.needs - {"reference"} | {"labels"}):
                values = getattr(part, needed)
                if values is None:
                    raise ValueError(f"{name} chooses by {whose}{needed}, which the evidence lacks")
                if len(values) != size:
                    raise ValueError(f"the evidence has {len(values)} of {whose}{needed} for {size} labels")
                if values.dtype.kind == "f" and np.isnan(values.sum()):
                    raise ValueError(f"{whose}{needed} in the evidence hold NaN")
            labels, known = part.labels, part.probabilities
            classes = known.shape[1] if known is not None and "probabilities" in self.needs else None
            if labels.dtype.kind not in "iu" or (size and labels.min() < 0) or (classes and labels.max() >= classes):
                below = f", below {classes}" if classes else ""
                raise ValueError(f"{whose}labels in the evidence are no classes: give whole numbers from 0{below}")


@dataclass(frozen=True, kw_only=True)
class StaticRandom(Criterion):
    """Control: a uniform choice, which needs no warm-up."""

    warmup: int | float = 0

    def pick(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        n = len(evidence.labels)
        return Choice(np.sort(rng.choice(n, share(n, self.fraction), replace=False)))


def by_class(labels: Ints, apart: bool) -> list[Ints]:
    """Return the samples of each class that has any, or all samples as one group."""
    if not apart:
        return [np.arange(len(labels))]
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def blocks(n: int) -> Iterator[slice]:
    """Return slices of ``range(n)`` that are small enough for copies in float64."""
    return (slice(start, start + ROWS) for start in range(0, n, ROWS))
