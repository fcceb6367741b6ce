"""Segmentation: a sample is an image, its loss the mean over its pixels; the headline is the mean IoU of the classes.

Shape legend: n samples, B samples of a batch, C classes, H and W pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import Config
from ..data.batches import Batch
from ..data.images import Fit
from ..data.index import Survey
from ..data.source import Unreadable
from ..errors import UsageError
from ..models import Kind, Width, normalisation, synchronised
from ..records import Metric
from .base import mean_nats
from .scenes import DigitPictures, Entry, PictureFiles, SceneTask, cut_out, first_words, left_to_right, painted

if TYPE_CHECKING:
    from ..distributed import Processes
    from ..network import Network

IGNORED = 255  # what a mask has where a pixel is of no class
BACKGROUND = 0


class Segmentation(SceneTask):
    """Images with a mask each, uint8 (H, W), which has the class of every pixel; number 0 is the background."""

    metrics = (Metric("miou", "test mean IoU", "%"),)
    packages = ("torchmetrics",)
    least = "a pixel of a second class"

    def __init__(self, config: Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, device, dtype)
        self.chance_loss = math.log(len(self.data.classes))

    def teaches(self, targets: Sequence[np.ndarray]) -> bool:
        return len(set().union(*map(np.unique, targets)) - {IGNORED}) > 1

    def wrong(self, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return corrupt(target, len(self.data.classes), rng)

    def mirrored(self, targets: Tensor) -> Tensor:
        return left_to_right(targets)

    def together(self, targets: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(targets))

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Task.losses`; outputs are logits (B, C, H, W)."""
        if outputs.shape[-2:] != targets.shape[-2:] or outputs.dim() != 4:
            raise ValueError("the outputs are not of the masks' size")
        pixels = outputs.permute(0, 2, 3, 1).flatten(1, 2)
        return *mean_nats(pixels, targets.flatten(1), IGNORED, smoothing), None

    @torch.no_grad()
    def evaluate(self, network: Network, batches: Iterable[Batch], n: int, processes: Processes) -> dict[str, float]:
        """Return the mean over classes of the IoU of all pixels of all images, in per cent, and the mean loss."""
        from torchmetrics.classification import MulticlassJaccardIndex

        classes = len(self.data.classes)
        iou = MulticlassJaccardIndex(classes, ignore_index=IGNORED, sync_on_compute=False).to(network.device)
        loss = torch.zeros((), dtype=torch.float64, device=network.device)
        for _, images, masks in batches:
            logits = network.logits(images)
            loss += self.losses(logits, masks)[0].double().sum()
            iou.update(logits.argmax(1), masks.long())
        iou.confmat = processes.sum(iou.confmat)
        return {"miou": 100 * iou.compute().item(), "loss": processes.sum(loss).item() / n}


# --- what can be wrong with a mask


def corrupt(mask: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask (H, W) whose objects are eroded, dilated or shifted, or one class of which is another one.

    It differs in any case, unless all of it is ignored; what is ignored stays so.
    """
    kinds = [(eroded, dilated, shifted, swapped)[kind] for kind in rng.permutation(4)]
    for kind in (*kinds, swapped):
        changed = np.where(mask == IGNORED, IGNORED, kind(mask, classes, rng)).astype(np.uint8)
        if (changed != mask).any():
            return changed
    return mask


def _objects(mask: np.ndarray) -> np.ndarray:
    return (mask != BACKGROUND) & (mask != IGNORED)


def _pixels(mask: np.ndarray, rng: np.random.Generator) -> int:
    """Draw by how much to erode or dilate: up to a sixteenth of the side, and at least one pixel."""
    return int(rng.integers(1, max(min(mask.shape) // 16, 1) + 1))


def eroded(mask: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask without the outermost pixels of what is no background."""
    from scipy.ndimage import binary_erosion

    kept = binary_erosion(_objects(mask), iterations=_pixels(mask, rng), border_value=1)
    return np.where(kept, mask, BACKGROUND)


def dilated(mask: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask in which the nearest object has the background around it."""
    from scipy.ndimage import distance_transform_edt

    if not (objects := _objects(mask)).any():
        return mask
    far, (row, column) = distance_transform_edt(~objects, return_indices=True)
    return np.where(far <= _pixels(mask, rng), mask[row, column], mask)


def shifted(mask: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask that is shifted by up to a quarter of its sides, background moving in."""
    from scipy.ndimage import shift

    objects = np.where(_objects(mask), mask, BACKGROUND)
    return shift(objects, [int(rng.integers(-(side // 4), side // 4 + 1)) for side in mask.shape], order=0)


def swapped(mask: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Return a mask in which one of its classes, an object's where it has one, is another class."""
    there = np.unique(mask[_objects(mask)])
    before = rng.choice(there) if len(there) else BACKGROUND
    return np.where(mask == before, (before + rng.integers(1, classes)) % classes, mask)


# --- data sets


@dataclass(frozen=True, kw_only=True)
class DigitScenes(DigitPictures):
    """Digits over each other, as `DigitPictures` has them, and the mask of what is seen of each."""

    side: Annotated[int, Field(ge=16, le=192)]

    task: ClassVar[str] = "segmentation"
    purpose: ClassVar[str] = "scene"
    before: ClassVar[tuple[str, ...]] = ("background",)

    def scene(
        self, photograph: np.ndarray, digits: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        side = self.side
        image = cut_out(photograph, side, rng)
        mask = np.full((side, side), BACKGROUND, np.uint8)
        for _ in range(rng.integers(1, self.most + 1)):
            which, size = int(rng.integers(len(digits))), int(rng.integers(side // 2, 3 * side // 4 + 1))
            top, left = (int(rng.integers(0, side - size + 1)) for _ in range(2))
            ink = painted(image[top : top + size, left : left + size], digits[which], rng)
            mask[top : top + size, left : left + size][ink] = 1 + labels[which]
        return image, mask


@dataclass(frozen=True, kw_only=True)
class MaskFiles(PictureFiles):
    """Images and masks in files of their own, each the largest square around its centre."""

    task: ClassVar[str] = "segmentation"
    bytes_a_pixel = 4
    classes: ClassVar[tuple[str, ...]]
    lists: ClassVar[tuple[str, str]]  # of what is trained and evaluated on: files, or folders, below the root
    images: ClassVar[str]  # where an image lies below the root, by its name
    masks: ClassVar[str]  # where its mask does
    class_of: ClassVar[Mapping[int, int]]  # by each value that a mask may have

    def entries(self, survey: Survey) -> tuple[Sequence[str], list[Entry], list[Entry]]:
        train, test = (
            [
                Entry(self.images.format(name), partial(self._pair, mask=self.masks.format(name)))
                for name in self.names(survey, part)
            ]
            for part in self.lists
        )
        return self.kinds(survey), train, test

    def kinds(self, survey: Survey) -> Sequence[str]:
        """Return the names of the classes."""
        return self.classes

    def names(self, survey: Survey, part: str) -> list[str]:
        """Return the names of the images that one of the ``lists`` has."""
        return first_words(survey, self.folder / part)

    def _pair(self, image: str, mask: str) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, uint8 (3, S, S), and its mask, uint8 (S, S). Raises Unreadable for what cannot be either."""
        pixels, values, file = self.pixels(image), self.pixels(mask, _values), self.folder / mask
        if pixels.shape[1:] != values.shape[1:]:
            sizes = [f"{width}x{height}" for _, height, width in (values.shape, pixels.shape)]
            raise Unreadable(f"{file} is {sizes[0]} pixels where its image is {sizes[1]}")
        if len(values) > 1 or values.dtype != np.uint8:
            raise Unreadable(f"{file} has colours, or not 8 bits a pixel, where numbers of classes are wanted")
        if wrong := sorted(set(np.unique(values).tolist()) - set(self.class_of)):
            raise Unreadable(f"{file} has the value {wrong[0]}, which is no class of dataset={self.name}")
        numbers = np.zeros(256, np.uint8)
        numbers[[*self.class_of]] = [*self.class_of.values()]
        side = (self.image_size, self.image_size)
        fitted = np.asarray(ImageOps.fit(Image.fromarray(numbers[values[0]]), side, Image.Resampling.NEAREST))
        if (fitted == IGNORED).all():
            raise Unreadable(f"{file} has no pixel of any class in the square around its centre")
        return np.asarray(Fit(self.image_size)(Image.fromarray(pixels.transpose(1, 2, 0)))).transpose(2, 0, 1), fitted


def _values(mask: Image.Image) -> np.ndarray:
    """Return what a file has for each pixel, not what colour that is: (H, W, C).

    Raises ValueError where its colours are those of other numbers, as after a program that makes files smaller, and
    where it has two or four bits of grey a pixel, which Pillow stretches to shades up to 255.
    """
    if {tile[3] for tile in getattr(mask, "tile", ())} & {"L;2", "L;4"}:
        raise ValueError("it has less than 8 bits of grey a pixel, which may be numbers or shades: write 8 bits")
    values = np.asarray(mask).reshape(mask.height, mask.width, -1)
    if mask.mode == "P":
        colours = dict(enumerate(map(tuple, np.reshape(mask.getpalette() or [], (-1, 3)).tolist())))
        used = [number for number in np.unique(values).tolist() if number in colours]
        for number_of in (GREY, COLOURED):
            meant = [number_of.get(colours[number]) for number in used]
            other = [pair for pair in zip(meant, used, strict=True) if pair[0] != pair[1]]
            if other and None not in meant and len(set(meant)) == len(meant):
                raise ValueError(
                    f"its palette has the colour of number {other[0][0]} at {other[0][1]}: write the numbers as grey"
                )
    return values


def _coloured(number: int) -> tuple[int, ...]:
    """Return the colour that VOC's palette gives a number: of each three bits, the lowest first, one for each part."""
    return tuple(sum((number >> 3 * bit + part & 1) << 7 - bit for bit in range(3)) for part in range(3))


GREY = {(number, number, number): number for number in range(IGNORED)}
COLOURED = {_coloured(number): number for number in range(256)}


@dataclass(frozen=True, kw_only=True)
class Voc(MaskFiles):
    """Pascal VOC 2012, as it ships; borders of objects are of no class."""

    holds = "JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/train.txt and val.txt"
    classes = (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
        *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    )
    lists = ("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt")
    images, masks = "JPEGImages/{}.jpg", "SegmentationClass/{}.png"
    class_of = MappingProxyType({number: number for number in (*range(21), IGNORED)})


@dataclass(frozen=True, kw_only=True)
class Pets(MaskFiles):
    """Oxford-IIIT pets: the animal and the background; borders are of no class."""

    holds = "images/, annotations/trimaps/ and annotations/trainval.txt and test.txt"
    classes = ("background", "pet")
    lists = ("annotations/trainval.txt", "annotations/test.txt")
    images, masks = "images/{}.jpg", "annotations/trimaps/{}.png"
    class_of = MappingProxyType({1: 1, 2: BACKGROUND, 3: IGNORED})


@dataclass(frozen=True, kw_only=True)
class Ade20k(MaskFiles):
    """ADE20K as the MIT scene parsing benchmark has it; what is none of its 150 classes is of no class.

    What is done to objects takes its first class, the walls, for the background.
    """

    holds = "images/ and annotations/, each with training/ and validation/, and objectInfo150.txt"
    lists = ("images/training", "images/validation")
    images, masks = "images/{}.jpg", "annotations/{}.png"
    class_of = MappingProxyType({0: IGNORED} | {number + 1: number for number in range(150)})

    def kinds(self, survey: Survey) -> Sequence[str]:
        file = self.folder / "objectInfo150.txt"
        rows = [os.fsdecode(line).split("\t") for _, line in survey.lines(file)][1:]
        if [row[0] for row in rows] != [str(number) for number in range(1, 151)]:
            raise UsageError(
                f"{file} does not number 150 classes, a line each, after a line of headings: fetch it again"
            )
        return [row[-1] for row in rows]

    def names(self, survey: Survey, part: str) -> list[str]:
        paths = [Path(os.fsdecode(path)) for path in survey.files(part)]
        return [path.relative_to("images").with_suffix("").as_posix() for path in paths]


# --- networks


def unet(channels: int, classes: int, *, width: Width, norm: Kind) -> nn.Module:
    """See `UNet`."""
    return synchronised(UNet(channels, classes, width, norm), norm)


class UNet(nn.Module):
    """A small U-Net (Ronneberger et al., 2015): images (B, channels, H, W) of any size to logits (B, C, H, W)."""

    def __init__(self, channels: int, classes: int, width: int, norm: str) -> None:
        super().__init__()
        normed = normalisation(norm)

        def stage(before: int, after: int) -> nn.Module:
            layers: list[nn.Module] = []
            for inner in (before, after):
                layers += [nn.Conv2d(inner, after, 3, padding=1, bias=False), normed(after), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(map(stage, (channels, *widths), (*widths, 8 * width)))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(2 * wide, wide, 2, stride=2) for wide in reversed(widths))
        self.up = nn.ModuleList(stage(2 * wide, wide) for wide in reversed(widths))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        x, across = F.pad(x_BCHW, (0, -width % 8, 0, -height % 8)), []
        for stage in self.down[:-1]:
            across.append(stage(x))
            x = F.max_pool2d(across[-1], 2)
        x = self.down[-1](x)
        for rise, up in zip(self.rise, self.up, strict=True):
            x = up(torch.cat([across.pop(), rise(x)], dim=1))
        return self.head(x)[..., :height, :width]


class Out(nn.Module):
    """One of torchvision's networks, without dropout, whose draws no checkpoint would carry."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network(x_BCHW)["out"]


def lraspp(channels: int, classes: int) -> nn.Module:
    """torchvision's LR-ASPP with MobileNetV3-Large, freshly initialised."""
    return _torchvisions("lraspp_mobilenet_v3_large", classes)


def deeplabv3(
    channels: int, classes: int, *, backbone: Literal["mobilenet_v3_large", "resnet50", "resnet101"]
) -> nn.Module:
    """torchvision's DeepLabV3, freshly initialised."""
    return _torchvisions(f"deeplabv3_{backbone}", classes)


def _torchvisions(name: str, classes: int) -> nn.Module:
    from torchvision.models import segmentation

    return Out(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=classes))
