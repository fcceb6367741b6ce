"""What a data set is made of: splits with their labels, and a way to decode the images of any rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import Field

from ..errors import UsageError, reason_of
from ..files import printable, typed_path
from ..pruning.reference import class_shares
from ..schema import Aside


class DataSet:
    """What ``dataset=`` names. Its keyword arguments are its settings.

    Attributes:
        task: the built-in task that it is for.
    """

    task: ClassVar[str] = "classification"

    def open(self) -> Any:
        """Return the data set, a `Source` or what else its task reads.

        Raises UsageError for missing, incomplete or malformed files.
        """
        raise NotImplementedError


class Unreadable(Exception):
    """An image cannot be decoded; says which one, and why."""


class Store(Protocol):
    """Decodes single images."""

    def read(self, row: int, *draws: np.ndarray) -> np.ndarray:
        """Return the image at ``row``, uint8 (C, H, W); raise Unreadable where it cannot be decoded.

        Where images are cut at random, ``draws`` decide where: uniform in [0, 1), float64 (K, 4).
        """


@dataclass(frozen=True)
class Images:
    """One split of a data set, as shipped.

    Attributes:
        labels: int64 (n,).
        store: decodes single images.
        paths: encoded, relative to the root, S (n,), where each image has one.
        remedy: what to do about an image that cannot be decoded.
        cuts: side in pixels of the random cuts, made as an image is decoded, that training sees; None for all of it.
    """

    labels: np.ndarray
    store: Store
    paths: np.ndarray | None = None
    remedy: str = "replace or delete it"
    cuts: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image."""
        return self._read(0).shape if self.cuts is None else (3, self.cuts, self.cuts)

    def pixels(self, rows: np.ndarray) -> torch.Tensor:
        """Decode the images at ``rows``, int (k,), into uint8 (k, C, H, W), in memory channels last.

        Raises UsageError as ``decoded`` does.
        """
        channels, height, width = self.shape
        batch = np.empty((len(rows), height, width, channels), np.uint8)
        for start in range(0, len(rows), 1024):
            for image, place in zip(self.decoded(rows[start : start + 1024]), batch[start:], strict=False):
                place[:] = image
        return torch.from_numpy(batch.transpose(0, 3, 1, 2))

    def decoded(self, rows: np.ndarray, draws: np.ndarray | None = None) -> list[np.ndarray]:
        """Decode the images at ``rows``, int (k,); return uint8 (H, W, C) for each.

        With ``draws``, float64 (k, K, 4), they are cut at random; see `Store`.

        Raises UsageError, naming file and row, for a corrupt image or one of another size than the first's.
        """

        def one(place: int) -> np.ndarray:
            row = int(rows[place])
            image = self._read(row) if draws is None else self._read(row, draws[place])
            if image.shape != self.shape:
                raise UsageError(
                    f"{self._name(row)} is {_size(image.shape)} pixels where {self._name(0)} is "
                    f"{_size(self.shape)}: give all images one size with dataset.image_size={min(self.shape[1:])}"
                )
            return image.transpose(1, 2, 0)

        # Decoding a small image is mostly Python, which threads only slow down.
        threads = min(torch.get_num_threads(), len(rows)) if np.prod(self.shape) >= 1 << 16 else 1
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                return list(pool.map(one, range(len(rows))))
        return [one(place) for place in range(len(rows))]

    def _read(self, row: int, *draws: np.ndarray) -> np.ndarray:
        try:
            return self.store.read(row, *draws)
        except Unreadable as error:
            raise UsageError(f"{error}: {self.remedy}") from error

    def _name(self, row: int) -> str:
        return f"image {row}" if self.paths is None else f"{printable(self.paths[row])} (row {row})"


@dataclass(frozen=True)
class Source:
    """A data set as shipped.

    Attributes:
        name: as in ``dataset=``.
        classes: class names by number, C of them.
        train: the training split.
        test: the evaluation split.
        fingerprint: sha256, as hex, of what tells one content from another. For ``digits`` and CIFAR that is every
            byte. For images in files of their own, and for ``parquet``, it is every image's path, size in bytes and
            label, since reading all pixels takes hours: images swapped under the same names and sizes go unnoticed.
        labels_clean: whether the labels as shipped count as clean when no noise is injected.
        superclass: the superclass number of each class, int64 (C,), -1 where unknown.
        official_order: whether the order of the images is known, by checksum, to be that of the original
            publication, so that labels published apart from the images belong to these very images.
        asymmetric: the data set's own map of asymmetric label noise, from class to class.
        as_shipped: whether ``noise=real`` means the labels as shipped.
        reference: where the reference set is drawn from, if not held out of ``train``; where that is ``test``, what
            is drawn is not evaluated on.
        evaluations: further splits to evaluate on, by name.
        statistics: mean and standard deviation by channel, (C,) each, that pixels are normalised by; computed from
            the training images where None.
        skipped: what was left out of the data set since it could not be read, one line each.

    Raises UsageError where training images are of fewer than two classes.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    fingerprint: str
    labels_clean: bool
    superclass: np.ndarray | None = None
    official_order: bool = False
    asymmetric: dict[int, int] | None = None
    as_shipped: bool = False
    reference: Images | None = None
    evaluations: Mapping[str, Images] = field(default_factory=dict)
    statistics: tuple[np.ndarray, np.ndarray] | None = None
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        there = [self.classes[c] for c in np.unique(self.train.labels)]
        if len(there) < 2:
            raise UsageError(
                f"dataset={self.name} has training images of {''.join(there) or 'no class'} alone, where 2 classes or "
                "more are needed: add images of others"
            )


def stratified(labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``size`` of the positions 0..n-1 so that every class keeps its share.

    Shares are by largest remainder; ``rng`` orders equal remainders. Returns int64 (size,), ascending.
    """
    shares = zip(*class_shares(labels, size, rng), strict=True)
    chosen = [rng.choice(np.flatnonzero(labels == c), share, replace=False) for c, share in shares]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]}"


def brief(error: Exception) -> str:
    """Return what a system's error means, or the first line of another one, shortened, for a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return reason_of(error)[:120].rstrip(".")


Root = Annotated[str | None, Aside()]  # a folder of data; it says where, not what
Crop = Annotated[int, Field(ge=0, le=4096)]  # pixels of padding before the random crop that training sees


def fits_into_memory(needed: int, what: str, remedy: str) -> None:
    """Raise UsageError where so many bytes, which ``what`` takes, are more than half of this machine's memory."""
    if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        raise UsageError(f"{what} {needed / 1e9:.0f} GB, more than half of this machine's memory: {remedy}")


def existing(name: str, root: str | None, holds: str) -> Path:
    """Return the folder of the data set ``name``, or raise UsageError that says what it ``holds``."""
    if root is None:
        raise UsageError(f"dataset={name} needs its folder: type dataset.root=FOLDER, where FOLDER has {holds}")
    folder = typed_path(root)
    if not folder.is_dir():
        raise UsageError(f"dataset.root={folder} is not a folder: type the folder that has {holds}")
    return folder
