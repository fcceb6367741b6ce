"""Prune4ReL: what re-labelling can lean on. torch is imported where a product of matrices needs it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..selection import Floats, Ints, share
from .criterion import Choice, Criterion, Evidence, by_class

TILE = 1 << 25  # similarities at a time: 128 MiB
PAIRS = 1 << 28  # neighbours in memory: 2 GiB


@dataclass(frozen=True, kw_only=True)
class Prune4ReL(Criterion):
    """Prune4ReL (Park et al., NeurIPS 2023): keeps what re-labelling can lean on.

    Of strongly augmented images, with confidences c (largest probability), similarities s_ik = (1 + cos(e_i, e_k)) / 2,
    and N_i the sum of s_ik c_k over the chosen k whose similarity exceeds ``tau``: chosen is again and again the sample
    of largest tanh((N_i + c_i) / eta) - tanh(N_i / eta), the first such in a random order. By default the given classes
    take turns, until they are used up; the authors' code stops that where one class gets far ahead. Values of ``tau``
    in the authors' scripts: 0.975 on CIFAR-10N (warm-up 10), 0.95 on CIFAR-100N (30), 0.8 on Clothing-1M (1), which
    are cosines of 0.95, 0.9 and 0.6; of ``eta``: 1, but 100, their default, for DivideMix on CIFAR-10N.

    The graph of neighbours is exact where it has no more than 2 ** 28 entries (2 GiB).
    Beyond that each sample keeps the ``neighbours`` nearest to it, and the choice's facts say what was cut off.

    Attributes:
        tau: the similarity above which two samples are neighbours.
        eta: the scale of tanh.
        balanced: the given classes take turns.
        neighbours: kept of each sample where there are too many.
    """

    tau: float = 0.975
    eta: float = 1.0
    balanced: bool = True
    neighbours: int = 64
    revision: ClassVar[int] = 1  # 0 took the cosine for the similarity
    needs: ClassVar[frozenset[str]] = frozenset({"probabilities", "embeddings"})
    strong: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.tau < 1:
            raise ValueError(f"Prune4ReL: tau={self.tau} is out of range; use a number from 0, below 1")
        if not self.eta > 0:
            raise ValueError(f"Prune4ReL: eta={self.eta} is out of range; use a number above 0")
        if self.neighbours < 1:
            raise ValueError(f"Prune4ReL: neighbours={self.neighbours} is out of range; use 1 or more")

    def pick(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        assert evidence.probabilities is not None
        assert evidence.embeddings is not None
        n = len(evidence.labels)
        shuffled = rng.permutation(n)
        groups = [shuffled[group] for group in by_class(evidence.labels[shuffled], self.balanced)]
        order = np.concatenate(groups)
        graph = Neighbours.of(evidence.embeddings[order], self.tau, self.neighbours)
        confidence = evidence.probabilities.max(1).astype(np.float64)[order]
        picks = reliable(graph, confidence, [len(group) for group in groups], share(n, self.fraction), self.eta)
        return Choice(np.sort(order[picks]), graph.facts())


@dataclass(frozen=True)
class Neighbours:
    """The pairs of samples whose similarity exceeds a threshold, as rows of a sparse matrix; none with itself.

    The similarity of two samples is (1 + the cosine of their embeddings) / 2.

    Attributes:
        starts: (n + 1,) where each sample's entries begin.
        index: int32, the neighbours that are kept.
        similarity: float32, likewise.
        found: how many there are, those that were cut off included.
        mass: the sum of their similarities.
    """

    starts: Ints
    index: NDArray[np.int32]
    similarity: NDArray[np.float32]
    found: int
    mass: float

    @classmethod
    def of(cls, embeddings: Floats, tau: float, most: int, pairs: int = PAIRS) -> Neighbours:
        """Return the neighbours of each row of (n, d), by exact products of matrices, block by block.

        Where they are more than ``pairs``, only the ``most`` nearest of each.
        """
        import torch

        n = len(embeddings)
        counts = np.zeros(n, np.int64)
        # One place for all that is kept: among many small ones, memory would be torn by what comes and goes.
        index: Any = np.empty(min(pairs, n * (n - 1)), np.int32)
        similarity: Any = np.empty(len(index), np.float32)
        found, mass, end, cut = 0, 0.0, 0, False
        unit = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(embeddings, np.float32)), dim=1)
        height = max(1, TILE // n)
        for begin in range(0, n, height):
            here = slice(begin, begin + height)
            cosines = unit[here] @ unit.T
            rows = torch.arange(len(cosines))
            cosines[rows, rows + begin] = -1
            row, column = (cosines > 2 * tau - 1).nonzero().unbind(1)
            part = torch.bincount(row, minlength=len(cosines)), column, (1 + cosines[row, column]) / 2
            own, near, close = (values.numpy() for values in part)
            found += len(near)
            mass += float(close.sum(dtype=np.float64))
            if found > pairs and not cut:
                counts, index, similarity = _nearest(counts, index[:end], similarity[:end], most, room=n * most)
                cut, end = True, int(counts.sum())
            if cut:
                own, near, close = _nearest(own, near, close, most)
            counts[here] = own
            index[end : end + len(near)], similarity[end : end + len(near)] = near, close
            end += len(near)
        return cls(np.r_[0, np.cumsum(counts)], index[:end], similarity[:end], found, mass)

    def facts(self) -> dict[str, float]:
        """Return a sample's neighbours, on average, and which share of them, and of their similarity, was cut off."""
        n = len(self.starts) - 1
        kept, mass = len(self.index), float(self.similarity.sum(dtype=np.float64))
        return {
            "neighbours_mean": self.found / n,
            "neighbours_cut": 1 - kept / self.found if self.found else 0.0,
            "similarity_cut": 1 - mass / self.mass if self.mass else 0.0,
        }


def _nearest(counts: Ints, index: Any, similarity: Any, most: int, room: int = 0) -> tuple[Any, Any, Any]:
    """Keep the ``most`` largest similarities of each row, in arrays with room for so many entries at least."""
    left = np.minimum(counts, most)
    total = max(room, int(left.sum()))
    near, close = np.empty(total, index.dtype), np.empty(total, similarity.dtype)
    read, write = np.r_[0, np.cumsum(counts)], np.r_[0, np.cumsum(left)]
    for first in range(0, len(counts), 1024):
        last = min(first + 1024, len(counts))
        entries = slice(read[first], read[last])
        row = np.repeat(np.arange(last - first), counts[first:last])
        ranked = np.argsort(2.0 * row - similarity[entries])  # which lies in [0, 1], so that rows stay apart
        place = np.arange(len(row)) - (read[first:last] - read[first])[row]
        kept = np.sort(ranked[place < most])
        near[write[first] : write[last]] = index[entries][kept]
        close[write[first] : write[last]] = similarity[entries][kept]
    return left, near, close


def reliable(graph: Neighbours, confidence: NDArray[np.float64], members: list[int], size: int, eta: float) -> Ints:
    """Choose ``size`` samples greedily, as `Prune4ReL` says; return them in the order chosen.

    Args:
        graph: of n samples, those of a group one after the other.
        confidence: (n,) c.
        members: sizes of the groups, which take turns.
        size: how many to choose.
        eta: the scale of tanh.
    """
    reach = np.zeros(len(confidence))  # N
    own = np.exp(-2 * confidence / eta)
    gain = _gain(reach, own, eta)
    ends = list(itertools.accumulate(members))
    turns = itertools.cycle([(end - count, end) for count, end in zip(members, ends, strict=True) if count])
    left = dict(zip(ends, members, strict=True))
    picks = np.empty(size, np.int64)
    for number in range(size):
        begin, end = next(turns)
        while not left[end]:
            begin, end = next(turns)
        left[end] -= 1
        pick = begin + int(gain[begin:end].argmax())
        picks[number] = pick
        entries = slice(graph.starts[pick], graph.starts[pick + 1])
        near = graph.index[entries]
        reach[near] += graph.similarity[entries] * confidence[pick]
        waiting = near[gain[near] > -1]
        gain[waiting] = _gain(reach[waiting], own[waiting], eta)
        gain[pick] = -np.inf
    return picks


def _gain(reach: NDArray[np.float64], own: NDArray[np.float64], eta: float) -> NDArray[np.float64]:
    """Return tanh((N + c) / eta) - tanh(N / eta) with ``own`` = exp(-2 c / eta), exact where both are close to 1."""
    far = np.exp(-2 * reach / eta)
    return 2 * far * (1 - own) / ((1 + far) * (1 + far * own))
