"""What a data set is made of: splits with their labels, and a way to decode the images of any rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from alignprune_exp.errors import UsageError
from alignprune_exp.files import printable
from alignprune_exp.pruning.reference import class_shares


class Pixels(Protocol):
    """Decodes single images."""

    def read(self, row: int) -> np.ndarray:
        """Return the image at ``row``, uint8 (C, H, W); raise UsageError where it cannot be decoded."""


@runtime_checkable
class Views(Pixels, Protocol):
    """Decodes photographs of any size: ``read`` as they are evaluated, ``view`` as they are trained on."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of what both return."""

    def view(self, row: int, draws: np.ndarray) -> np.ndarray:
        """Return a random view of the image at ``row``, uint8 (C, H, W), a function of ``draws`` alone.

        ``draws`` are uniform in [0, 1), float64 (K, 4); see ``photographs.resized_crop``.
        """


@dataclass(frozen=True)
class Images:
    """One split of a data set, as shipped.

    Attributes:
        labels: int64 (n,).
        store: decodes single images.
        paths: encoded, relative to the root, S (n,), where each image has one.
    """

    labels: np.ndarray
    store: Pixels
    paths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image, taken from the first."""
        return self.store.shape if isinstance(self.store, Views) else self.store.read(0).shape

    @property
    def cuts(self) -> bool:
        """Whether an image is trained on in random cuts, made as it is decoded."""
        return isinstance(self.store, Views)

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

        With ``draws``, float64 (k, K, 4), they are cut into random views; see ``Views``.

        Raises UsageError, naming file and row, for a corrupt image or one of another size than the first's.
        """

        def one(place: int) -> np.ndarray:
            row = int(rows[place])
            if draws is None:
                image = self.store.read(row)
            else:
                assert isinstance(self.store, Views)
                image = self.store.view(row, draws[place])
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

    def _name(self, row: int) -> str:
        return f"image {row}" if self.paths is None else f"{printable(self.paths[row])} (row {row})"


@dataclass(frozen=True)
class Source:
    """A data set as shipped.

    Attributes:
        name: as in ``dataset=``.
        classes: class names by number, C of them.
        superclass: the superclass number of each class, int64 (C,), -1 where unknown.
        train: the training split.
        test: the evaluation split.
        fingerprint: sha256, as hex, of what tells one content from another. For ``digits`` and CIFAR that is every
            byte. For images in files of their own, and for ``parquet``, it is every image's path, size in bytes and
            label, since reading all pixels takes hours: images swapped under the same names and sizes go unnoticed.
        official_order: whether the order of the images is known, by checksum, to be that of the original
            publication, so that labels published apart from the images belong to these very images.
        asymmetric: the data set's own map of asymmetric label noise, from class to class.
        labels_clean: whether the labels as shipped count as clean when no noise is injected.
        as_shipped: whether ``noise=real`` means the labels as shipped.
        reference: where the reference set is drawn from, if not held out of ``train``; where that is ``test``, what
            is drawn is not evaluated on.
        evaluations: further splits to evaluate on, by name.
        statistics: mean and standard deviation by channel, (C,) each, that pixels are normalised by; computed from
            the training images where None.
        skipped: what was left out of the data set since it could not be read, one line each.
    """

    name: str
    classes: tuple[str, ...]
    superclass: np.ndarray | None
    train: Images
    test: Images
    fingerprint: str
    official_order: bool
    asymmetric: dict[int, int] | None
    labels_clean: bool
    as_shipped: bool = False
    reference: Images | None = None
    evaluations: Mapping[str, Images] = field(default_factory=dict)
    statistics: tuple[np.ndarray, np.ndarray] | None = None
    skipped: tuple[str, ...] = ()


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
    """Return the first line of an error, shortened, for a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120].rstrip(".")


def hub_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Return the class names that the hub's ``datasets`` library writes into a Parquet schema, if any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def existing(name: str, root: Path | None, holds: str) -> Path:
    """Return the folder of the data set ``name``, or raise UsageError that says what it ``holds``."""
    if root is None:
        raise UsageError(f"dataset={name} needs its folder: type dataset.root=FOLDER, where FOLDER has {holds}")
    if not root.is_dir():
        raise UsageError(f"dataset.root={root} is not a folder: type the folder that has {holds}")
    return root
