"""GLISTER: what lowers the loss of trusted labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..selection import Ints, best, proportional, share
from .criterion import ROWS, Choice, Criterion, Evidence, blocks, by_class
from .ranked import errors


@dataclass(frozen=True, kw_only=True)
class Glister(Criterion):
    """GLISTER (Killamsetty et al., 2021): keeps what lowers the loss of the reference set, chosen greedily.

    A sample's gain is the inner product of its loss' gradient and the reference loss', in the last layer: how much
    a step on the sample lowers the reference loss, to first order. In each of ``rounds`` the samples of most gain are
    taken; then the reference gradient is that after one step of ``eta`` on the mean gradient of all taken so far, from
    where the warm-up ended. Rounds as in the authors' CORDS (15 there too), the mean as in DeepCore. Unlike DeepCore,
    which has a reference gradient for each class, all classes share one; and gradients are of the cross-entropy.

    It spends the same trusted labels as the reference set does.

    Attributes:
        eta: the step.
        rounds: the reference gradient is renewed so often.
        balanced: take from each given class in proportion to its size.
    """

    eta: float = 0.1
    rounds: int = 15
    balanced: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"probabilities", "embeddings", "reference"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta > 0:
            raise ValueError(f"Glister: eta={self.eta} is out of range; use a number above 0")
        if self.rounds < 1:
            raise ValueError(f"Glister: rounds={self.rounds} is out of range; use 1 or more")

    def pick(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        assert evidence.reference is not None
        groups = by_class(evidence.labels, self.balanced)
        sizes = proportional([len(group) for group in groups], share(len(evidence.labels), self.fraction))
        look = _Lookahead(evidence, evidence.reference, self.eta)
        taken = np.zeros(len(evidence.labels), bool)
        for round in range(1, self.rounds + 1):
            gains = np.where(taken, -np.inf, look.gains())
            fresh = []
            for group, size in zip(groups, sizes, strict=True):
                more = size * round // self.rounds - size * (round - 1) // self.rounds
                fresh.append(group[best(gains[group], more, rng)])
            new = np.concatenate(fresh)
            taken[new] = True
            look.step(new)
        return Choice(np.flatnonzero(taken))


class _Lookahead:
    """The reference gradient of the last layer, at the warm-up's end and after a step on the samples taken."""

    def __init__(self, evidence: Evidence, reference: Evidence, eta: float) -> None:
        self.evidence, self.reference, self.eta = evidence, reference, eta
        assert reference.probabilities is not None
        tiny = np.finfo(np.float32).tiny
        self.logits = np.log(np.maximum(reference.probabilities.astype(np.float64), tiny))
        classes = self.logits.shape[1]
        width = _with_one(reference, slice(0, 0)).shape[1]
        self.taken, self.sum = 0, np.zeros((classes, width))
        self.inputs = _with_one(reference, slice(None))

    def gradient(self) -> NDArray[np.float64]:
        """Return the reference loss' gradient (C, d + 1) after the step."""
        logits = self.logits - self.eta / max(self.taken, 1) * (self.inputs @ self.sum.T)
        logits -= logits.max(1, keepdims=True)
        probabilities = np.exp(logits)
        probabilities /= probabilities.sum(1, keepdims=True)
        return errors(probabilities, self.reference.labels).T @ self.inputs / len(self.inputs)

    def gains(self) -> NDArray[np.float64]:
        """Return each sample's inner product (n,) with the reference gradient."""
        gradient = self.gradient()
        n = len(self.evidence.labels)
        gains = np.empty(n)
        for rows in blocks(n):
            gains[rows] = (_errors_of(self.evidence, rows) * (_with_one(self.evidence, rows) @ gradient.T)).sum(1)
        return gains

    def step(self, new: Ints) -> None:
        """Add the gradients of the samples ``new`` to the step."""
        for part in np.array_split(new, max(1, len(new) // ROWS)):
            self.sum += _errors_of(self.evidence, part).T @ _with_one(self.evidence, part)
        self.taken += len(new)


def _errors_of(evidence: Evidence, rows: slice | Ints) -> NDArray[np.float64]:
    assert evidence.probabilities is not None
    return errors(evidence.probabilities[rows], evidence.labels[rows])


def _with_one(evidence: Evidence, rows: slice | Ints) -> NDArray[np.float64]:
    assert evidence.embeddings is not None
    inputs = evidence.embeddings[rows].astype(np.float64)
    return np.c_[inputs, np.ones(len(inputs))]
