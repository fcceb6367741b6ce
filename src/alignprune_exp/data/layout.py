"""Data sets whose images lie encoded under a folder: what all of them share."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from ..files import printable
from ..schema import Aside, Side
from .images import Cut, Files, Fit
from .index import Index, Splits, Survey, indexed, skippable
from .source import DataSet, Images, Root, Source, existing

# Settings that make no difference to which images there are.
OF_PIXELS = ("image_size", "crop", "area", "aspect", "eval_crop")


@dataclass(frozen=True, kw_only=True)
class Layout(DataSet):
    """A data set in files under a folder. A subclass has its settings as fields, and lists the images in `read`.

    Attributes:
        name: of the data set.
        root: its folder.
        on_error: ``skip`` leaves out what cannot be trained on.
        holds: what lies there.
        labels_clean: see `Source`.
        reference: the split that the reference set is drawn from, if it has a place of its own.
        as_shipped: see `Source`.
        statistics: see `Source`.
        cached: whether an index is kept, since nobody replaces its images in place, which would go unnoticed.
    """

    name: str
    root: Root
    on_error: Annotated[Literal["stop", "skip"], Aside()]

    holds: ClassVar[str]
    labels_clean: ClassVar[bool] = False
    reference: ClassVar[str | None] = None
    as_shipped: ClassVar[bool] = False
    statistics: ClassVar[tuple[np.ndarray, np.ndarray] | None] = None
    cached: ClassVar[bool] = False

    def read(self, survey: Survey) -> tuple[Sequence[str], Splits]:
        """Return the names of the classes, and the splits; those beside train, test and reference are evaluated on."""
        raise NotImplementedError

    @property
    def cut(self) -> Fit | Cut:
        """What is made of an image."""
        raise NotImplementedError

    def store(self, split: str, paths: np.ndarray) -> Files:
        """Open the images of a split."""
        return Files(self.folder, paths, self.cut)

    def fingerprint(self, index: Index) -> str:
        return index.fingerprint()

    @cached_property
    def folder(self) -> Path:
        return existing(self.name, self.root, self.holds).resolve()

    @property
    def places(self) -> dict[str, Path]:
        """The folders that its files lie in, absolute, by the settings that name them."""
        return {"root": self.folder}

    def open(self) -> Source:
        """Return the data set; raise UsageError for missing, incomplete or malformed files."""
        key = self._key() if self.cached else None
        index = indexed(key, lambda: Survey(self.folder, self.on_error), self.read, self.store)
        cuts = self.cut.image_size if isinstance(self.cut, Cut) else None
        remedy, images = skippable("replace or delete it", self.on_error), {}
        for split, listed in index.splits.items():
            paths = listed["path"].copy()
            images[split] = Images(listed["label"].copy(), self.store(split, paths), paths, remedy, cuts)
        return Source(
            name=self.name,
            classes=tuple(printable(name) for name in index.classes),
            train=images["train"],
            test=images["test"],
            fingerprint=self.fingerprint(index),
            labels_clean=self.labels_clean,
            reference=images[self.reference] if self.reference else None,
            evaluations={split: images[split] for split in images if split not in ("train", "test", "reference")},
            as_shipped=self.as_shipped,
            statistics=self.statistics,
            skipped=index.skipped,
        )

    def _key(self) -> bytes:
        """Return what the index depends on beside the files: the settings, and the code that reads them."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in OF_PIXELS}
        resolved = values | {key: str(folder) for key, folder in self.places.items()}
        code = {inspect.getfile(each) for each in type(self).__mro__[:-1]}
        return json.dumps(resolved).encode() + b"".join(Path(file).read_bytes() for file in sorted(code))


@dataclass(frozen=True, kw_only=True)
class Photographs(Layout):
    """A large set of photographs, trained on in random cuts; see `Cut`."""

    image_size: Side
    area: Annotated[float, Field(ge=1e-4, le=1)]
    aspect: Annotated[float, Field(ge=0.01, le=1)]
    eval_crop: Annotated[float, Field(ge=0.01, le=1)]

    as_shipped = True
    cached = True
    # By channel, of the training pixels of ILSVRC-12 in 0..1 units: what torchvision's weights were trained with.
    statistics = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

    @property
    def cut(self) -> Cut:
        return Cut(self.image_size, self.area, self.aspect, self.eval_crop)
