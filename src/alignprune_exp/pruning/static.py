"""Static pruning: one choice after a warm-up, which training from scratch then keeps to.

A criterion is a `Static` pruner: it says what it needs of an `Evidence`, and chooses once. Shape legend: n samples,
C classes, d dimensions of an embedding, k chosen. torch is imported where a product of matrices needs it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .selection import Floats, Ints, Pruner, Selection, best, everything, share

ROWS = 1 << 14  # samples in float64 at a time
TILE = 1 << 25  # cosines at a time: 128 MiB
PAIRS = 1 << 28  # neighbours in memory: 2 GiB


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
                plain = values.detach().cpu() if hasattr(values, "detach") else values
                object.__setattr__(self, each.name, np.asarray(plain))


class WarmUpLog:
    """Counts, epoch by epoch, what the warm-up shows of n samples.

    A forgetting event (Toneva et al., 2019) is a sample that was classified right when it was last seen and is wrong
    now, both times as the training pass found it.
    """

    def __init__(self, n: int) -> None:
        self.epochs = 0
        self.sums = np.zeros(n)
        self.right = np.zeros(n, bool)
        self.learnt = np.zeros(n, bool)
        self.events = np.zeros(n, np.int64)

    def observe(self, losses: Floats, correct: NDArray[np.bool_]) -> None:
        """Take note of an epoch: every sample's loss (n,), and whether it was classified right (n,)."""
        self.epochs += 1
        self.sums += losses
        self.events += self.right & ~correct
        self.learnt |= correct
        self.right = correct.copy()

    @property
    def losses(self) -> NDArray[np.float64]:
        """The mean loss (n,) over the epochs."""
        return self.sums / max(self.epochs, 1)

    @property
    def forgotten(self) -> NDArray[np.float64]:
        """The forgetting events (n,), infinity where a sample was never classified right."""
        return np.where(self.learnt, self.events, np.inf)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors and numbers."""
        import torch

        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ("sums", "right", "learnt", "events")}
        return {"epochs": self.epochs, **arrays}

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
class Static(Pruner):
    """Keeps one choice of floor(fraction * n) samples, at weight 1. Subclass it and implement ``choose``.

    Attributes:
        warmup: epochs on everything before the choice, on top of those of training; below 1 a share of those, rounded.
        fraction: share of the samples that is kept.
    """

    warmup: int | float = 10
    fraction: float = 0.5
    keeps: ClassVar[str] = "fraction"
    uses_scores: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of the Evidence
    strong: ClassVar[bool] = False  # whether its probabilities and embeddings are of strongly augmented images

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.warmup < 0 or (self.warmup >= 1 and self.warmup != int(self.warmup)):
            raise ValueError(
                f"{name}: warmup={self.warmup} is out of range; use a number of epochs, or a share of them below 1"
            )
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
        return int(self.warmup) if self.warmup >= 1 or self.warmup == 0 else max(1, round(self.warmup * epochs))

    def select(self, scores: Floats, epoch: int, epochs: int, rng: np.random.Generator) -> Selection:
        """Return everything: what an epoch of the warm-up trains on."""
        return everything(len(scores))

    def choose(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        """Return the choice, from the evidence that the criterion needs."""
        raise NotImplementedError

    def check(self, evidence: Evidence, n: int) -> None:
        """Raise ValueError for evidence that is missing, of a wrong shape, or not a number."""
        name = type(self).__name__
        parts = [("", evidence, n)]
        if "reference" in self.needs:
            if evidence.reference is None:
                raise ValueError(f"{name} chooses by a reference set, which the evidence lacks")
            parts.append(("the reference set's ", evidence.reference, len(evidence.reference.labels)))
        for whose, part, size in parts:
            for needed in sorted(self.needs - {"reference"} | {"labels"}):
                values = getattr(part, needed)
                if values is None:
                    raise ValueError(f"{name} chooses by {whose}{needed}, which the evidence lacks")
                if len(values) != size:
                    raise ValueError(f"the evidence has {len(values)} {needed} for {size} samples")
                if np.isnan(values.sum()):
                    raise ValueError(f"{whose}{needed} in the evidence hold NaN")


@dataclass(frozen=True, kw_only=True)
class StaticRandom(Static):
    """Control: a uniform choice, which needs no warm-up."""

    warmup: int | float = 0

    def choose(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        n = len(evidence.labels)
        return Choice(np.sort(rng.choice(n, share(n, self.fraction), replace=False)))


@dataclass(frozen=True, kw_only=True)
class Ranked(Static):
    """Keeps the samples of most ``worth``; ties are broken at random.

    Attributes:
        balanced: choose in each given class in proportion to its size, instead of among all samples.
    """

    balanced: bool = False

    def worth(self, evidence: Evidence) -> Floats:
        """Return each sample's worth (n,)."""
        raise NotImplementedError

    def choose(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        worth = self.worth(evidence)
        groups = _groups(evidence.labels, self.balanced)
        sizes = proportional([len(group) for group in groups], share(len(worth), self.fraction))
        chosen = [group[best(worth[group], size, rng)] for group, size in zip(groups, sizes, strict=True)]
        return Choice(np.sort(np.concatenate(chosen)))


@dataclass(frozen=True, kw_only=True)
class SmallLoss(Ranked):
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


@dataclass(frozen=True, kw_only=True)
class Glister(Static):
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

    def choose(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        assert evidence.reference is not None
        groups = _groups(evidence.labels, self.balanced)
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
        for rows in _blocks(n):
            gains[rows] = (_errors_of(self.evidence, rows) * (_with_one(self.evidence, rows) @ gradient.T)).sum(1)
        return gains

    def step(self, new: Ints) -> None:
        """Add the gradients of the samples ``new`` to the step."""
        for part in np.array_split(new, max(1, len(new) // ROWS)):
            self.sum += _errors_of(self.evidence, part).T @ _with_one(self.evidence, part)
        self.taken += len(new)


@dataclass(frozen=True, kw_only=True)
class Prune4ReL(Static):
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

    def choose(self, evidence: Evidence, rng: np.random.Generator) -> Choice:
        assert evidence.probabilities is not None
        assert evidence.embeddings is not None
        n = len(evidence.labels)
        shuffled = rng.permutation(n)
        groups = [shuffled[group] for group in _groups(evidence.labels[shuffled], self.balanced)]
        order = np.concatenate(groups)
        graph = Neighbours.of(evidence.embeddings[order], self.tau, self.neighbours)
        confidence = evidence.probabilities.max(1).astype(np.float64)[order]
        picks = reliable(graph, confidence, [len(group) for group in groups], share(n, self.fraction), self.eta)
        return Choice(np.sort(order[picks]), graph.facts())


STATIC: dict[str, type[Pruner]] = {
    "static_random": StaticRandom,
    "static_small_loss": SmallLoss,
    "static_el2n": EL2N,
    "static_grand": GraNd,
    "static_forgetting": Forgetting,
    "static_moderate": Moderate,
    "static_margin": Margin,
    "static_glister": Glister,
    "static_prune4rel": Prune4ReL,
}


def errors(probabilities: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return p - onehot(label) (n, C), the gradient of the cross-entropy by the logits."""
    difference = probabilities.astype(np.float64)
    difference[np.arange(len(labels)), labels] -= 1
    return difference


def el2n(probabilities: Floats, labels: Ints) -> NDArray[np.float64]:
    """Return ||p - onehot(label)|| (n,)."""
    norms = np.empty(len(labels))
    for rows in _blocks(len(labels)):
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
    for group in _groups(labels, by_class=True):
        members = embeddings[group].astype(np.float64)
        distance = np.linalg.norm(members - members.mean(0), axis=1)
        away[group] = np.abs(distance - np.median(distance))
    return away


def proportional(members: list[int], size: int) -> list[int]:
    """Divide ``size`` over groups of so many members, in proportion, by largest remainder; the first of equals win."""
    total = sum(members)
    shares = [size * count // total for count in members]
    by_remainder = sorted(range(len(members)), key=lambda group: -(size * members[group] % total))
    for group in by_remainder[: size - sum(shares)]:
        shares[group] += 1
    return shares


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


def _groups(labels: Ints, by_class: bool) -> list[Ints]:
    """Return the samples of each class that has any, or all samples as one group."""
    if not by_class:
        return [np.arange(len(labels))]
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, n, ROWS))


def _errors_of(evidence: Evidence, rows: slice | Ints) -> NDArray[np.float64]:
    assert evidence.probabilities is not None
    return errors(evidence.probabilities[rows], evidence.labels[rows])


def _with_one(evidence: Evidence, rows: slice | Ints) -> NDArray[np.float64]:
    assert evidence.embeddings is not None
    inputs = evidence.embeddings[rows].astype(np.float64)
    return np.c_[inputs, np.ones(len(inputs))]
