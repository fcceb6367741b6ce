"""Criteria that keep the samples of most worth, by one number a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..selection import Floats, Ints, best, proportional, share
from .criterion import Choice, Criterion, Evidence, blocks, by_class


@dataclass(frozen=True, kw_only=True)
class Ranked(Criterion):
    """Keeps the samples of most ``worth``; ties are broken at random.

    Attributes:
        balanced: choose in each given class in proportion to its size, instead of among all samples.
    """

    balanced: bool = False

    def worth(self, evidence: Evidence) -> Floats:
        """Return each sample's worth (n,)."""
        raise NotImplementedError

    def pick(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        worth = self.worth(evidence)
        groups = by_class(evidence.labels, self.balanced)
        sizes = proportional([len(group) for group in groups], share(len(worth), self.fraction))
        chosen = [group[best(worth[group], size, rng)] for group, size in zip(groups, sizes, strict=True)]
        return Choice(np.sort(np.concatenate(chosen)))


@dataclass(frozen=True, kw_only=True)
class StaticSmallLoss(Ranked):
    """Keeps the smallest mean training losses of the warm-up, the small-loss trick of learning with noisy labels."""

    needs: ClassVar[frozenset[str]] = frozenset({"losses"})

    def worth(self, evidence: Evidence) -> Floats:
        assert evidence.losses is not None
        return -evidence.losses


@dataclass(frozen=True, kw_only=True)
class EL2N(Ranked):
    """EL2N (Paul et al., 2021): keeps the largest error norms `el2n`, the hardest samples, as published.

    Of one network; the paper averages ten.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"probabilities"})

    def worth(self, evidence: Evidence) -> Floats:
        assert evidence.probabilities is not None
        return el2n(evidence.probabilities, evidence.labels)


@dataclass(frozen=True, kw_only=True)
class GraNd(Ranked):
    """GraNd (Paul et al., 2021): keeps the largest gradient norms `grand`, the hardest samples, as published.

    An approximation: of the last layer's gradient alone, and of one network, where the paper has all layers and ten.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"probabilities", "embeddings"})

    def worth(self, evidence: Evidence) -> Floats:
        assert evidence.probabilities is not None
        assert evidence.embeddings is not None
        return grand(evidence.probabilities, evidence.embeddings, evidence.labels)


@dataclass(frozen=True, kw_only=True)
class Forgetting(Ranked):
    """Forgetting (Toneva et al., 2019): keeps the most often forgotten, and before them the never learnt ones."""

    needs: ClassVar[frozenset[str]] = frozenset({"forgotten"})

    def worth(self, evidence: Evidence) -> Floats:
        assert evidence.forgotten is not None
        return evidence.forgotten


@dataclass(frozen=True, kw_only=True)
class Margin(Ranked):
    """Margin (Coleman et al., 2020): keeps the smallest margins between the two most probable classes.

    The given label has no say in it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"probabilities"})

    def worth(self, evidence: Evidence) -> Floats:
        assert evidence.probabilities is not None
        return -margin(evidence.probabilities)


@dataclass(frozen=True, kw_only=True)
class Moderate(Ranked):
    """Moderate (Xia et al., 2023): keeps what lies at a typical distance from its class.

    A sample's distance is that of its embedding from the mean of its given class; kept are those nearest to the
    median distance. Here mean, median and choice are each class's own. The authors' code takes the median of each
    coordinate for the mean, and the middle of all samples' distances whatever their class.
    """

    balanced: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"embeddings"})

    def worth(self, evidence: Evidence) -> Floats:
        assert evidence.embeddings is not None
        return -typicality(evidence.embeddings, evidence.labels)


def errors(probabilities: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return p - onehot(label) (n, C), the gradient of the cross-entropy by the logits."""
    difference = probabilities.astype(np.float64)
    difference[np.arange(len(labels)), labels] -= 1
    return difference


def el2n(probabilities: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return ||p - onehot(label)|| (n,)."""
    norms = np.empty(len(labels))
    for rows in blocks(len(labels)):
        norms[rows] = np.linalg.norm(errors(probabilities[rows], labels[rows]), axis=1)
    return norms


def grand(probabilities: Floats, embeddings: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return the norm (n,) of each loss' gradient in the last layer, weight and bias: ||p - onehot|| ||(h, 1)||."""
    squares = np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64)
    return el2n(probabilities, labels) * np.sqrt(squares + 1)


def margin(probabilities: Floats) -> Floats:
    """Return the largest probability minus the second largest (n,); the largest alone where there is one class."""
    if probabilities.shape[1] == 1:
        return probabilities[:, 0]
    second, first = np.partition(probabilities, -2, axis=1)[:, -2:].T
    return first - second


def typicality(embeddings: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return | ||h - class mean|| - the class' median of that | (n,)."""
    away = np.empty(len(labels))
    for group in by_class(labels, apart=True):
        members = embeddings[group].astype(np.float64)
        distance = np.linalg.norm(members - members.mean(0), axis=1)
        away[group] = np.abs(distance - np.median(distance))
    return away
