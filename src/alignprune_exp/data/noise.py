"""Label noise: pure functions on label arrays, the human labels of CIFAR-N, and what ``noise=`` names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..files import typed_path

if TYPE_CHECKING:
    from .source import Source

HUMAN_FILES = {"cifar10": "CIFAR-10_human.pt", "cifar100": "CIFAR-100_human.pt"}
HUMAN_KEYS = {
    "cifar10": {
        "aggre": "aggre_label",
        "rand1": "random_label1",
        "rand2": "random_label2",
        "rand3": "random_label3",
        "worst": "worse_label",
    }
}
_NEARBY = ("", "cifar_n", "data")


def symmetric(clean: np.ndarray, n_classes: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Move exactly round(rate·n) uniformly chosen samples, each to a different class drawn uniformly.

    The code of ELR and DivideMix draws among all classes, the true one included: on CIFAR-10 their "50 %" has 45 % of
    the labels wrong.

    ``clean`` and the result are int64 (n,), in 0..n_classes-1.
    """
    labels = clean.copy()
    moved = rng.choice(len(clean), round(rate * len(clean)), replace=False)
    labels[moved] = (clean[moved] + rng.integers(1, n_classes, len(moved))) % n_classes
    return labels


def asymmetric(clean: np.ndarray, target: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Move round(rate·n_c) of the n_c samples of every class c that has a target to ``target[c]``.

    ``clean`` and the result are int64 (n,); ``target`` is int64 (C,), -1 for a class that stays as it is.
    """
    labels = clean.copy()
    for c in np.flatnonzero(target >= 0):
        members = np.flatnonzero(clean == c)
        labels[rng.choice(members, round(rate * len(members)), replace=False)] = target[c]
    return labels


def asymmetric_map(n_classes: int, superclass: np.ndarray | None, fixed: dict[int, int] | None) -> np.ndarray:
    """Return the class each class is mistaken for, int64 (n_classes,), -1 for none.

    That is the data set's own ``fixed`` map if it has one; else the next class of the same ``superclass``,
    (n_classes,), cyclically; else the next class, cyclically.
    """
    if fixed is not None:
        target = np.full(n_classes, -1, np.int64)
        target[list(fixed)] = list(fixed.values())
        return target
    if superclass is None:
        return np.roll(np.arange(n_classes), -1)
    target = np.full(n_classes, -1, np.int64)
    for group in np.unique(superclass[superclass >= 0]):
        members = np.flatnonzero(superclass == group)
        if len(members) > 1:
            target[members] = np.roll(members, -1)
    return target


def human_labels(file: Path | None, root: Path | None, dataset: str, labels: str, clean: np.ndarray) -> np.ndarray:
    """Return the labels that people gave the training images of CIFAR: CIFAR-N (Wei et al., ICLR 2022).

    Args:
        file: the published ``.pt`` file; looked for in ``root``, one and two folders above it, and in
            ``cifar_n`` and ``data`` of these, if not given.
        root: the data set's folder.
        dataset: ``cifar10`` or ``cifar100``.
        labels: for CIFAR-10 which labels: ``aggre``, ``rand1``, ``rand2``, ``rand3`` or ``worst``.
        clean: the clean labels of the whole training set in the official order, int64 (n,).

    Returns int64 (n,). Raises UsageError where the data set has no human labels, and where the file is
    absent, malformed, or its own clean labels differ from ``clean``.
    """
    if dataset not in HUMAN_FILES:
        raise UsageError(
            f"noise=real needs human labels, which {dataset} has none of: use dataset=cifar10 or cifar100, "
            "or noise=clean to train on the labels as they come"
        )
    keys = HUMAN_KEYS.get(dataset)
    if keys is not None and labels not in keys:
        raise UsageError(f"noise.labels={labels} is unknown for {dataset}; use one of {', '.join(keys)}")
    key = "noisy_label" if keys is None else keys[labels]
    path = _human_file(file, root, HUMAN_FILES[dataset])
    published = _read_human(path, ("clean_label", key), int(clean.max()) + 1)
    for labelled in map(len, published.values()):
        if labelled != len(clean):
            raise UsageError(
                f"{path} labels {labelled} images where the training set has {len(clean)}: noise=real needs the whole "
                "official training set under dataset.root"
            )
    different = np.flatnonzero(published["clean_label"] != clean)
    if len(different):
        raise UsageError(
            f"the clean labels of {path} differ from those of {dataset} in {len(different)} places, first at "
            f"index {different[0]}, so that its human labels belong to other images: set dataset.root to the "
            "files in the official order, as dataset.download=true gets them"
        )
    return published[key]


def _human_file(file: Path | None, root: Path | None, name: str) -> Path:
    published = "it is published at http://www.noisylabels.com and https://github.com/UCSC-REAL/cifar-10-100n"
    if file is not None:
        if not file.is_file():
            raise UsageError(f"noise.file={file} is no file: type the path of {name} ({published})")
        return file
    places = [] if root is None else [root, *root.resolve().parents[:2]]
    for path in (place / near / name for place in places for near in _NEARBY):
        if path.is_file():
            return path
    raise UsageError(f"{name} was not found in or around dataset.root={root}: type noise.file=PATH ({published})")


def _read_human(path: Path, keys: tuple[str, ...], n_classes: int) -> dict[str, np.ndarray]:
    import torch
    from numpy._core.multiarray import _reconstruct

    # What a pickled int64 array is made of; weights_only refuses everything else a pickle could run.
    array_parts: list[Any] = [
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        (_reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.int64)),
    ]
    try:
        with torch.serialization.safe_globals(array_parts):
            content = torch.load(path, weights_only=True)
    except Exception as error:  # the bytes of another file may be anything to an unpickler
        raise UsageError(
            f"{path} cannot be read as a label file of CIFAR-N ({type(error).__name__}): fetch it again from "
            "https://github.com/UCSC-REAL/cifar-10-100n"
        ) from error
    found = list(content) if isinstance(content, dict) else [type(content).__name__]
    if not set(keys) <= set(found):
        raise UsageError(
            f"{path} holds {', '.join(map(str, found))} where {', '.join(keys)} are wanted: type noise.file= "
            "with the file of this data set"
        )
    arrays = {key: _whole_numbers(content[key]) for key in keys}
    for key, values in arrays.items():
        if not len(values) or values.min() < 0 or values.max() >= n_classes:
            raise UsageError(
                f"{key} in {path} is not a list of class numbers from 0 to {n_classes - 1}: type noise.file= "
                "with the file of this data set"
            )
    return {key: values.astype(np.int64) for key, values in arrays.items()}


def _whole_numbers(values: Any) -> np.ndarray:
    """Return a list of whole numbers, (n,), and an empty one for anything else."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # of lists of several lengths, and tensors of what NumPy has not
        return np.empty(0, np.int64)
    return array if array.ndim == 1 and array.dtype.kind in "iu" else np.empty(0, np.int64)


@dataclass(frozen=True)
class GivenLabels:
    """The labels that a run trains on.

    Attributes:
        labels: int64 (n,).
        fingerprint: of the data set, and of whatever else they come from.
        pairing: see `TrainingData`.
    """

    labels: np.ndarray
    fingerprint: str
    pairing: str = ""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What ``noise=`` names. Its fields are its settings, which may be some of rate, labels and file."""

    def give(self, source: Source, rows: np.ndarray, root: Path | None, rng: np.random.Generator) -> GivenLabels:
        """Return the labels of the training samples ``rows`` (n,) of ``source``, whose folder is ``root``."""
        return GivenLabels(self.corrupted(source.train.labels[rows], source, rng), source.fingerprint)

    def corrupted(self, labels: np.ndarray, source: Source, rng: np.random.Generator) -> np.ndarray:
        """Return ``labels``, int64 (n,), of which some are wrong."""
        raise NotImplementedError

    def chosen(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Return which of ``n`` samples without class labels to corrupt, bool (n,); their task knows how.

        Raises ValueError where the noise is of class labels.
        """
        raise ValueError("it is of class labels, and there are none here; use noise=sym0.5, any other rate, or clean")

    def taken(self, dataset: str) -> tuple[str, ...]:
        """Return the settings that matter on a data set."""
        return tuple(field.name for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class Clean(Noise):
    """The labels as they come."""

    def chosen(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return np.zeros(n, bool)

    def corrupted(self, labels: np.ndarray, source: Source, rng: np.random.Generator) -> np.ndarray:
        return labels


@dataclass(frozen=True, kw_only=True)
class Symmetric(Noise):
    """See `symmetric`. Without class labels exactly round(rate·n) uniformly chosen samples are corrupted."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"{type(self).__name__}: rate={self.rate:g} is out of range; use a number from 0 to 1")

    def corrupted(self, labels: np.ndarray, source: Source, rng: np.random.Generator) -> np.ndarray:
        return symmetric(labels, len(source.classes), self.rate, rng)

    def chosen(self, n: int, rng: np.random.Generator) -> np.ndarray:
        chosen = np.zeros(n, bool)
        chosen[rng.choice(n, round(self.rate * n), replace=False)] = True
        return chosen


@dataclass(frozen=True, kw_only=True)
class Asymmetric(Symmetric):
    """See `asymmetric` and `asymmetric_map`."""

    def corrupted(self, labels: np.ndarray, source: Source, rng: np.random.Generator) -> np.ndarray:
        target = asymmetric_map(len(source.classes), source.superclass, source.asymmetric)
        return asymmetric(labels, target, self.rate, rng)

    def chosen(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return Noise.chosen(self, n, rng)


@dataclass(frozen=True, kw_only=True)
class Human(Noise):
    """Labels that people gave: those of CIFAR-N, see `human_labels`; of some data sets those that they come with."""

    labels: str
    file: str | None

    def give(self, source: Source, rows: np.ndarray, root: Path | None, rng: np.random.Generator) -> GivenLabels:
        if source.as_shipped:
            return GivenLabels(source.train.labels[rows], source.fingerprint)
        file = None if self.file is None else typed_path(self.file)
        labels = human_labels(file, root, source.name, self.labels, source.train.labels)
        content = hashlib.sha256(source.fingerprint.encode() + labels.astype("<i8").tobytes())
        return GivenLabels(labels[rows], content.hexdigest(), "verified" if source.official_order else "unverified")

    def taken(self, dataset: str) -> tuple[str, ...]:
        return ("labels",) if dataset in HUMAN_KEYS else ()


NOISES: dict[str, type[Noise]] = {"clean": Clean, "sym": Symmetric, "asym": Asymmetric, "real": Human}
