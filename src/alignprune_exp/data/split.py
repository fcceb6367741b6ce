"""From a data set to what one run trains on: subset, then reference split, then noise on the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import UsageError
from ..pruning.seeding import generator
from .noise import Clean, Noise, symmetric
from .source import Images, Source, stratified

if TYPE_CHECKING:
    from ..config import Trusted

_STATISTICS_ROWS = 4096  # images that mean and std are computed from where they are not held in memory


@dataclass(frozen=True)
class Split:
    """The samples of one role; a sample's index is its position here, 0..n-1.

    Attributes:
        source: the split of the data set that the images come from.
        rows: the row of each sample there, int64 (n,).
        labels: the labels trained on or evaluated with, int64 (n,).
        clean_labels: int64 (n,); None where unknown.
        images: uint8 (n, C, H, W) where they are held in memory.
    """

    source: Images
    rows: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray | None
    images: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def wrong(self) -> np.ndarray | None:
        """Which labels are not the clean ones, bool (n,); None where that is unknown."""
        return None if self.clean_labels is None else self.labels != self.clean_labels

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return the image, uint8 (C, H, W), and the label of one sample."""
        held = self.source.pixels(self.rows[[index]])[0] if self.images is None else self.images[index]
        return held, int(self.labels[index])

    @property
    def paths(self) -> np.ndarray | None:
        """The image files relative to the root, str (n,) as `printable` writes them, where each image has one."""
        paths = self.source.paths
        return None if paths is None else np.char.decode(paths[self.rows], "utf-8", "backslashreplace")


@dataclass(frozen=True)
class TrainingData:
    """What one run trains on and is evaluated with.

    Attributes:
        train: the samples i of n.
        reference: the samples with trusted labels; None where ``reference.size`` is 0.
        test: the evaluation samples, the same for every seed.
        evaluations: further samples to evaluate on, by name.
        classes: class names by number.
        pairing: for human labels ``verified`` where the image order is the official one, else ``unverified``;
            empty for other noise.
        fingerprint: that of the data set; for human labels sha256 of it and of these.
        mean: of the training pixels by channel, float64 (C,), in 0..1 units.
        std: likewise.
        skipped: what was left out of the data set since it could not be read, one line each.
    """

    train: Split
    reference: Split | None
    test: Split
    evaluations: Mapping[str, Split]
    classes: tuple[str, ...]
    pairing: str
    fingerprint: str
    mean: np.ndarray
    std: np.ndarray
    skipped: tuple[str, ...]


def prepare(
    source: Source,
    noise: Noise,
    reference: Trusted,
    *,
    seed: int,
    subset: int | None = None,
    test_subset: int | None = None,
    root: Path | None = None,
    resident_bytes: int = 1 << 30,
) -> TrainingData:
    """Split ``source`` and inject label noise: subset → reference split → noise on the rest.

    The split depends on the data, ``seed``, ``subset`` and the reference's size alone. A data set may have a place
    of its own that the reference set is drawn from; where that is the test set, it is drawn alike for every seed, and
    the rest is evaluated on.

    Args:
        source: the data set.
        noise: gives the labels to train on.
        reference: the node of the config: its size, below 1 a fraction of what it is drawn from, else a count, of each
            class with ``per_class``, or 0 for no reference; which share of its labels to corrupt symmetrically; and
            whether to append its samples, with their clean labels, to training.
        seed: the run's seed.
        subset: number of training images to use, stratified; None for all.
        test_subset: number of test images to evaluate, stratified, the same for every seed; None for all.
        root: the data set's folder, around which the file of human labels is looked for.
        resident_bytes: images are held in memory where all of them, decoded, take no more than this.

    Raises UsageError for sizes that do not fit, and as ``human_labels`` and ``Images.pixels`` do.
    """
    pool, train_rows, reference_rows = _parted(source, seed, subset, reference)
    given = noise.give(source, train_rows, root, generator(seed, "label noise"))
    labels = given.labels
    trusted = pool.labels[reference_rows]
    if reference.train:
        _check_joins(source)
        train_rows, labels = np.concatenate([train_rows, reference_rows]), np.concatenate([labels, trusted])
    _check_classes(source, train_rows)
    known = source.labels_clean or (not isinstance(noise, Clean) and not source.as_shipped)
    clean_labels = source.train.labels[train_rows] if known else None

    splits = {"train": Split(source.train, train_rows, labels, clean_labels)}
    if len(reference_rows):
        doubted = symmetric(trusted, len(source.classes), reference.noise, generator(seed, "reference noise"))
        splits["reference"] = Split(pool, reference_rows, doubted, trusted)
    rest = np.delete(np.arange(len(source.test)), reference_rows if pool is source.test else [])
    splits["test"] = _evaluated(source.test, rest, test_subset)
    for name, images in source.evaluations.items():
        splits[name] = _evaluated(images, np.arange(len(images)), test_subset and min(test_subset, len(images)))
    splits = _held(source, splits, resident_bytes)
    mean, std = source.statistics or pixel_statistics(_pixels(splits["train"], seed).split(4096))
    return TrainingData(
        train=splits["train"],
        reference=splits.get("reference"),
        test=splits["test"],
        evaluations={name: splits[name] for name in source.evaluations},
        classes=source.classes,
        pairing=given.pairing,
        fingerprint=given.fingerprint,
        mean=mean,
        std=std,
        skipped=source.skipped,
    )


def _check_classes(source: Source, rows: np.ndarray) -> None:
    there = np.unique(source.train.labels[rows])
    if len(there) < 2:
        raise UsageError(
            f"what is left of dataset={source.name} to train on is of class {source.classes[there[0]]} alone, where 2 "
            "classes or more are needed: type a larger dataset.subset, or a smaller reference.size"
        )


def _check_joins(source: Source) -> None:
    if source.reference is not None:
        raise UsageError(
            f"reference.train=true is for a reference set held out of training, and that of {source.name} has a "
            "place of its own: leave it out"
        )


def _parted(source: Source, seed: int, subset: int | None, reference: Trusted) -> tuple[Images, np.ndarray, np.ndarray]:
    """Return where the reference set is from, and the rows to train on and of the reference set there, ascending."""
    rows = some("subset", source.train.labels, subset, len(source.classes), generator(seed, "subset"))
    pool = source.train if source.reference is None else source.reference
    candidates = rows if source.reference is None else np.arange(len(pool))
    rng = generator(0 if pool is source.test else seed, "reference")
    each = source.classes if reference.per_class else None
    chosen = _reference_rows(pool.labels[candidates], reference.size, rng, each)
    return pool, rows if source.reference is not None else np.delete(rows, chosen), candidates[chosen]


def _evaluated(images: Images, rows: np.ndarray, subset: int | None) -> Split:
    rows = rows[some("test_subset", images.labels[rows], subset, 1, generator(0, "test subset"))]
    return Split(images, rows, images.labels[rows], images.labels[rows])


def _held(source: Source, splits: dict[str, Split], resident_bytes: int) -> dict[str, Split]:
    """Take all images but those that are trained on in cuts into memory, where all of them fit into that many bytes."""
    shape = source.train.shape
    if shape != source.test.shape:
        raise UsageError(
            f"training and test images of {source.name} differ in size ({shape} and {source.test.shape} as channels, "
            f"height, width): give them one with dataset.image_size={min(shape[1:])}"
        )
    held = {name: split for name, split in splits.items() if name != "train" or source.train.cuts is None}
    if sum(map(len, held.values())) * int(np.prod(shape)) > resident_bytes:
        return splits
    return splits | {name: replace(split, images=split.source.pixels(split.rows)) for name, split in held.items()}


def some(key: str, labels: np.ndarray, size: int | None, least: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``size`` positions, stratified, ascending, or all."""
    if size is None:
        return np.arange(len(labels))
    if not least <= size <= len(labels):
        raise UsageError(
            f"dataset.{key}={size} does not fit {len(labels)} samples, {least} of which are needed: type a number from "
            f"{least} to {len(labels)}, or null for all"
        )
    return stratified(labels, size, rng)


def _reference_rows(
    labels: np.ndarray, size: float, rng: np.random.Generator, per_class: tuple[str, ...] | None
) -> np.ndarray:
    """Return the positions that become the reference set, ascending; ``size`` of each class where these are named."""
    if size > 1 and size != int(size):
        raise UsageError(
            f"reference.size={size:g} is neither a fraction nor a count: type a number below 1, or a whole number"
        )
    if size == 0:
        return np.empty(0, np.int64)
    if per_class is not None:
        return _of_each(labels, size, rng, per_class)
    return stratified(labels, reference_count(size, len(labels)), rng)


def reference_count(size: float, n: int) -> int:
    """Return how many of ``n`` samples ``reference.size`` means. Raises UsageError where that is none, or all."""
    count = round(size * n) if size < 1 else int(size)
    if not 1 <= count < n:
        raise UsageError(
            f"reference.size={size:g} takes {count} of {n} samples: type a size that leaves 1 or more on both sides"
        )
    return count


def _of_each(labels: np.ndarray, size: float, rng: np.random.Generator, classes: tuple[str, ...]) -> np.ndarray:
    members = np.bincount(labels, minlength=len(classes))
    if size < 1 or members.min() <= size:
        raise UsageError(
            f"reference.size={size:g} of each class does not fit class {classes[members.argmin()]}, of which "
            f"{members.min()} samples are there: type a whole number from 1 to {max(members.min() - 1, 1)}"
        )
    chosen = [rng.choice(np.flatnonzero(labels == c), int(size), replace=False) for c in range(len(classes))]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _pixels(train: Split, seed: int) -> torch.Tensor:
    """Return the images that mean and standard deviation are computed from, uint8 (k, C, H, W)."""
    if train.images is not None:
        return train.images
    few = generator(seed, "statistics").permutation(len(train))[:_STATISTICS_ROWS]
    return train.source.pixels(np.sort(train.rows[few]))


def pixel_statistics(blocks: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation by channel, float64 (C,) each, in 0..1 units, of blocks of images.

    These are uint8 (k, C, H, W). A channel of one value has a standard deviation of 1.
    """
    counts = sum(
        np.stack([torch.bincount(channel.reshape(-1), minlength=256).numpy() for channel in block.unbind(1)])
        for block in blocks
    )
    value = np.arange(256) / 255
    share = counts / np.sum(counts, 1, keepdims=True)
    mean = share @ value
    variance = (share * (value - mean[:, None]) ** 2).sum(1)
    return mean, np.where(variance > 0, np.sqrt(variance), 1.0)
