"""What segmentation and detection share: images in memory, each with a target that says more than one class.

Shape legend: n samples, B samples of a batch, H and W pixels.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from pydantic import Field
from torch import Tensor, nn

from ..config import MODEL, Config
from ..console import Progress
from ..data.augment import Augmentation
from ..data.batches import Batches
from ..data.images import Files, refuse_too_many, rgb
from ..data.index import Survey, show
from ..data.source import DataSet, Images, Root, Unreadable, existing
from ..data.sources.digits import Digits, shipped
from ..data.split import pixel_statistics
from ..errors import UsageError
from ..files import printable
from ..pruning.seeding import generator
from ..schema import Aside, Side
from .base import RowsTask


@dataclass(frozen=True)
class Pictured:
    """Images and their targets.

    Attributes:
        images: uint8 (n, 3, H, W).
        targets: of each.
        names: of each.
    """

    images: np.ndarray
    targets: Sequence[np.ndarray]
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Scenes:
    """What is trained and evaluated on.

    Attributes:
        train, test: of one size.
        classes: their names.
        clean: whether the targets count as clean where no noise is injected.
        skipped: what was left out since it could not be read, one line each.
        notes: what is said of them before training, in sentences.
    """

    train: Pictured
    test: Pictured
    classes: Sequence[str]
    clean: bool
    skipped: Sequence[str] = ()
    notes: Sequence[str] = ()

    @cached_property
    def fingerprint(self) -> str:
        """sha256, as hex, of every pixel and target."""
        digest = hashlib.sha256(str([len(self.classes), len(self.train), len(self.test)]).encode())
        for part in (self.train, self.test):
            masks = part.targets[0].dtype == np.uint8  # which are as large as the images
            sizes = "" if masks else [len(each) for each in part.targets]
            digest.update(f"{part.images.shape}{sizes}".encode() + part.images.tobytes())
            digest.update(b"".join(each.tobytes() for each in part.targets))
        return digest.hexdigest()


class SceneTask(RowsTask):
    """Images in memory. A subclass says how a target is corrupted, mirrored, and made a tensor of with others.

    Attributes:
        least: what one of them has at least.
        targets: those trained on, wrong ones among them, one of each sample.
        mean, std: of the pixels trained on, by channel, in 0..1 units, (3,).
    """

    least: ClassVar[str]
    data: Scenes

    def __init__(self, config: Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, device, dtype)
        parts, train, test, self.notes = self.parts, self.data.train, self.data.test, self.data.notes
        for what, part, rows in (("train", train, parts.train), ("evaluate", test, parts.test)):
            if not self.teaches([part.targets[row] for row in rows]):
                raise UsageError(
                    f"none of the {len(rows)} images to {what} on has {self.least}: give it others, or more"
                )
        self.targets = self._given(parts.train, parts.wrong)
        blocks = (parts.train[start : start + 1024] for start in range(0, self.n, 1024))
        images = torch.from_numpy(train.images)
        self.mean, self.std = pixel_statistics(images[block] for block in blocks)

    def teaches(self, targets: Sequence[np.ndarray]) -> bool:
        """Return whether one of the targets has what they have at ``least``."""
        raise NotImplementedError

    def wrong(self, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a target with something wrong."""
        raise NotImplementedError

    def mirrored(self, targets: Tensor) -> Tensor:
        """Return targets (B, …) as those of mirrored images."""
        raise NotImplementedError

    def together(self, targets: Sequence[np.ndarray]) -> Tensor:
        """Return targets as one tensor (n, …)."""
        raise NotImplementedError

    def _given(self, rows: np.ndarray, wrong: np.ndarray) -> list[np.ndarray]:
        return self.given(self.data.train.targets, rows, wrong, self.wrong)

    @cached_property
    def train(self) -> Batches:
        return self._batches(self.data.train.images[self.parts.train], self.targets, self.config.dataset.flip)

    @cached_property
    def reference(self) -> Batches:
        parts = self.parts
        if not self.held_out:
            return self.train
        return self._batches(self.data.train.images[parts.reference], self._given(parts.reference, parts.doubted))

    @cached_property
    def tests(self) -> dict[str, Batches]:
        test, rows = self.data.test, self.parts.test
        return {"": self._batches(test.images[rows], [test.targets[row] for row in rows])}

    def _batches(self, images: np.ndarray, targets: Sequence[np.ndarray], flip: bool = False) -> Batches:
        return SceneBatches(self, torch.from_numpy(images), self.together(targets), flip)

    def network(self) -> nn.Module:
        """Return a freshly initialised network: from images (B, 3, H, W) to what `losses` takes."""
        return self.fitted(MODEL.make(self.config.model, 3, len(self.data.classes)))

    def columns(self) -> dict[str, Any]:
        import pandas as pd

        names = [printable(self.data.train.names[row]) for row in self.parts.train]
        return {"index": self.parts.train, "path": pd.array(names, dtype="string"), "corrupted": self.corrupted}


class SceneBatches(Batches):
    """Batches of normalised images (B, 3, H, W) and targets (B, …), which are mirrored together.

    Args:
        task: whose they are.
        images: uint8 (n, 3, H, W).
        targets: (n, …).
        flip: whether training mirrors each left to right with probability ½, by (seed, epoch, sample).
    """

    def __init__(self, task: SceneTask, images: Tensor, targets: Tensor, flip: bool) -> None:
        super().__init__(targets, task.config.batch_size, task.device)
        self._images, self._dtype = images.to(self.device), task.dtype
        self._layout = torch.channels_last if task.config.channels_last else torch.contiguous_format
        self._augmentation = Augmentation(task.config.seed, flip=flip, crop=0)
        self._mirror = task.mirrored
        mean, std = (torch.from_numpy(each).float().view(3, 1, 1).to(self.device) for each in (task.mean, task.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def inputs(self, parts: list[Tensor], epoch: int | None, views: int, strongly: bool) -> Iterator[Tensor]:
        for part in parts:
            images = self._images.index_select(0, part.to(self.device, non_blocking=True))
            x = self._mirrored(images, part, epoch, left_to_right) * self._scale + self._shift
            yield x.repeat(views, 1, 1, 1).to(self._dtype, memory_format=self._layout)

    def targets(self, part: Tensor, epoch: int | None) -> Tensor:
        return self._mirrored(super().targets(part, epoch), part, epoch, self._mirror)

    def _mirrored(self, values: Tensor, part: Tensor, epoch: int | None, mirror: Callable[[Tensor], Tensor]) -> Tensor:
        """Return images or targets (B, …), those mirrored that are to be."""
        if epoch is None or not self._augmentation.flip:
            return values
        flips = self._augmentation.draw(part, epoch)[2].to(self.device, non_blocking=True)
        return torch.where(flips.view(-1, *[1] * (values.dim() - 1)), mirror(values), values)


def left_to_right(images: Tensor) -> Tensor:
    return images.flip(-1)


# --- images in files


class Entry(NamedTuple):
    """An image that is listed.

    Attributes:
        path: of its file, relative to the data set's folder.
        read: returns, given ``path``, a square, uint8 (3, S, S), and its target; raises Unreadable for what is wrong.
    """

    path: str
    read: Callable[[str], tuple[np.ndarray, np.ndarray]]

    def tried(self) -> tuple[np.ndarray, np.ndarray] | Unreadable:
        try:
            return self.read(self.path)
        except Unreadable as error:
            return error


@dataclass(frozen=True, kw_only=True)
class PictureFiles(DataSet):
    """Images in files of their own, held in memory. A subclass lists them, and says how each is read.

    Attributes:
        image_size: side of the square that each becomes, in pixels.
        on_error: ``skip`` leaves out images with which anything is wrong.
        holds: what lies in the folder.
        bytes_a_pixel: that an image and its target take.
    """

    name: str
    root: Root
    image_size: Side
    on_error: Annotated[Literal["stop", "skip"], Aside()]

    holds: ClassVar[str]
    bytes_a_pixel: ClassVar[int] = 3

    @cached_property
    def folder(self) -> Path:
        return existing(self.name, self.root, self.holds)

    def entries(self, survey: Survey) -> tuple[Sequence[str], list[Entry], list[Entry]]:
        """Return the classes, and the images to train and to evaluate on."""
        raise NotImplementedError

    def pixels(self, path: str, cut: Callable[..., Image.Image | np.ndarray] = rgb) -> np.ndarray:
        """Return what ``cut`` makes of a file, (C, H, W). Raises Unreadable for what is no image."""
        return Files(self.folder, np.array([os.fsencode(path)]), cut).read(0)

    def open(self) -> Scenes:
        survey = Survey(self.folder, self.on_error)
        classes, train, test = self.entries(survey)
        times = Counter(posixpath.normpath(entry.path) for entry in (*train, *test))
        if twice := sorted(path for path in times if times[path] > 1):
            raise UsageError(
                f"dataset={self.name} lists {len(twice)} images more than once, such as {twice[0]}, each of which is "
                f"to be trained on once, or evaluated on: choose other lists, or mend these in {self.folder}"
            )
        refuse_too_many(len(times), self.bytes_a_pixel, self.image_size)
        parts = self._read(train, survey), self._read(test, survey)
        notes = []
        if turned := [name for part in parts for name in part.names if shown_turned(self.folder / name)]:
            notes = [
                f"{len(turned)} of the images, such as {printable(turned[0])}, are shown turned or mirrored by their "
                "EXIF orientation, and taken as they are stored; if their masks or boxes were drawn on them as shown, "
                "turn them, as mogrify -auto-orient does"
            ]
        return Scenes(*parts, classes, False, survey.skipped, notes)

    def _read(self, entries: list[Entry], survey: Survey) -> Pictured:
        images = np.empty((len(entries), 3, self.image_size, self.image_size), np.uint8)
        targets: list[np.ndarray] = []
        names: list[str] = []
        progress = Progress()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for row, read in enumerate(pool.map(Entry.tried, entries)):
                progress.show(f"reading images: {row}/{len(entries)}")
                if isinstance(read, Unreadable):
                    survey.refuse(str(read), "mend that, or leave that image out")
                else:
                    images[len(names)], target = read
                    targets.append(target)
                    names.append(entries[row].path)
        if not names:
            raise UsageError(f"{self.folder} lists no image that can be read: fetch {self.holds} again")
        return Pictured(images[: len(names)], targets, names)


def shown_turned(file: Path) -> bool:
    """Return whether EXIF has an image shown turned or mirrored, in the very size in which it is stored.

    So the size of a mask, or that of an annotation, does not tell which of the two it was drawn on.
    """
    with Image.open(file) as image, suppress(Exception):  # EXIF that cannot be read turns nothing
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation in (2, 3, 4) or (orientation in (5, 6, 7, 8) and image.width == image.height)
    return False


def first_words(survey: Survey, file: Path) -> list[str]:
    """Return the first word of each line of a list, but for comments. Behind it may stand numbers, and nothing else."""
    words = []
    for number, line in survey.lines(file):
        first, *others = line.split()
        if line.startswith(b"#"):
            continue
        if not all(other.lstrip(b"+-").isdigit() for other in others):
            survey.wrong(file, number, f"is {show(line)} where a name without blanks is wanted")
        else:
            words.append(os.fsdecode(first))
    return words


# --- photographs, and digits on them


@dataclass(frozen=True, kw_only=True)
class DigitPictures(DataSet):
    """scikit-learn's digits on cuts of its two sample photographs: made of real images, but no photograph of anything.

    Training and test scenes share neither a digit nor a pixel of a photograph. A subclass says what a scene is.

    Attributes:
        scenes: to train on; a fifth as many are evaluated on.
        most: digits in a scene.
        purpose: names the random numbers of a scene.
        before: the classes that come before those of the digits.
    """

    name: str
    scenes: Annotated[int, Field(ge=10, le=10**6)]
    most: Annotated[int, Field(ge=1, le=9)]

    purpose: ClassVar[str]
    before: ClassVar[tuple[str, ...]] = ()

    def scene(
        self, photograph: np.ndarray, digits: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, float32 (H, W, 3), and its target, made of digits (n, 8, 8) with labels (n,)."""
        raise NotImplementedError

    def open(self) -> Scenes:
        digits, (left, right) = Digits(name=self.name).open(), photographs()
        train = self._made("train", self.scenes, digits.train, left)
        test = self._made("test", max(self.scenes // 5, 1), digits.test, right)
        return Scenes(train, test, (*self.before, *digits.classes), clean=True)

    def _made(self, split: str, n: int, digits: Images, photographs: list[np.ndarray]) -> Pictured:
        grey, images, targets = digits.pixels(np.arange(len(digits))).numpy()[:, 0], [], []
        for row in range(n):
            rng = generator(0, f"{split} {self.purpose}", row)
            image, target = self.scene(photographs[rng.integers(len(photographs))], grey, digits.labels, rng)
            images.append(np.rint(image).astype(np.uint8).transpose(2, 0, 1))
            targets.append(target)
        return Pictured(np.stack(images), targets, [f"{split} scene {row}" for row in range(n)])


def photographs() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the parts of scikit-learn's two photographs for training and for test scenes, uint8 (H, W, 3) each."""
    left, right = [], []
    for name in ("china", "flower"):
        photograph = np.asarray(Image.open(shipped("images", f"{name}.jpg")))
        border = round(0.7 * photograph.shape[1])
        left.append(photograph[:, :border])
        right.append(photograph[:, border:])
    return left, right


def cut_out(photograph: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return a square of a photograph, float32 (side, side, 3)."""
    top, left = (int(rng.integers(0, size - side + 1)) for size in photograph.shape[:2])
    return photograph[top : top + side, left : left + side].astype(np.float32)


def painted(below: np.ndarray, digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint a digit (8, 8) over a square, float32 (S, S, 3), so that it stands out; return its ink, bool (S, S)."""
    large = Image.fromarray(digit).resize(below.shape[:2], Image.Resampling.BILINEAR)
    ink = np.asarray(large, np.float32)[..., None] / 255
    colour = rng.uniform(0, 80, 3) + (175 if below.mean() < 128 else 0)
    below += ink * (colour - below)
    return ink[..., 0] > 0.5
