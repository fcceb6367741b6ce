"""Decoding: from encoded images, in files or in the columns of Parquet files, to pixels, whole or cut."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .source import Unreadable, brief, fits_into_memory

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNREAD_SUFFIXES = (".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".jpe", ".jp2", ".ppm", ".pgm")


def rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode in 8-bit RGB; grey of 16 bits keeps its upper eight, which PIL would clip."""
    if image.mode == "RGB":
        return image  # PIL would copy it
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, of which PIL would warn that they are transparent
    return image.convert("RGB")


def glance(image: Image.Image) -> Image.Image:
    """Return an image at the lowest resolution that it has, all of it being read."""
    image.draft(None, (1, 1))
    return rgb(image)


def refuse_too_many(images: int, bytes_a_pixel: int, image_size: int) -> None:
    """Raise UsageError for squares of ``image_size`` that would fill more than half of this machine's memory."""
    what = f"{images} images of {image_size} pixels take"
    fits_into_memory(images * bytes_a_pixel * image_size**2, what, "type a smaller dataset.image_size")


@dataclass(frozen=True)
class Fit:
    """An image becomes a square of ``image_size`` pixels, the largest around its centre; None leaves it as it is."""

    image_size: int | None = None

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.image_size is None:
            return rgb(image)
        return ImageOps.fit(rgb(image), (self.image_size, self.image_size), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class Cut:
    """How a photograph becomes a square, and that training sees random views of it.

    Attributes:
        image_size: side of the square in pixels.
        area: the least share of the photograph's area that a training view shows.
        aspect: the least ratio of a view's width to its height; the greatest is 1 / ``aspect``.
        eval_crop: the share of the short side that evaluation shows; 0.875 makes 256 pixels 224.
    """

    image_size: int
    area: float
    aspect: float
    eval_crop: float

    def __call__(self, image: Image.Image, *draws: np.ndarray) -> Image.Image:
        """Return a view of a photograph, at random by ``draws``, or else its centre."""
        return self.view(image, *draws) if draws else self.centre(image)

    def view(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        """Return a random resized crop; a JPEG is decoded at no more than the resolution that it needs."""
        side, (width, height) = self.image_size, image.size
        left, top, w, h = resized_crop(width, height, draws, self.area, self.aspect)
        image.draft(None, (math.ceil(width * side / w), math.ceil(height * side / h)))
        x, y = image.size[0] / width, image.size[1] / height
        left, right = round(left * x), round((left + w) * x)
        top, bottom = round(top * y), round((top + h) * y)
        box = (left, top, max(right, left + 1), max(bottom, top + 1))
        return rgb(image.crop(box)).resize((side, side), Image.Resampling.BILINEAR)

    def centre(self, image: Image.Image) -> Image.Image:
        """Return the centre after the short side was resized to ``image_size / eval_crop``, as torchvision does."""
        side, (width, height) = self.image_size, image.size
        short = round(side / self.eval_crop)
        size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        left, top = (round((pixels - side) / 2) for pixels in size)
        return rgb(image).resize(size, Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))


def resized_crop(width: int, height: int, draws: np.ndarray, area: float, aspect: float) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a crop, in pixels of an image of ``width`` x ``height``.

    As in Inception (Szegedy et al., CVPR 2015) and torchvision: its share of the area is uniform from ``area`` to 1,
    the logarithm of its aspect ratio uniform between those of ``aspect`` and 1 / ``aspect``, and its place uniform;
    the first of the K attempts that fits, else the largest centred crop with an aspect ratio in that range.

    Args:
        draws: uniform in [0, 1), float64 (K, 4): area, aspect, top and left of each attempt.
    """
    for u_area, u_aspect, u_top, u_left in draws.tolist():
        target = width * height * (area + (1 - area) * u_area)
        ratio = aspect ** (1 - 2 * u_aspect)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u_left * (width - w + 1)), int(u_top * (height - h + 1)), w, h
    w = min(width, round(height / aspect))
    h = min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h


@dataclass(frozen=True)
class Array:
    """Images that are decoded already, uint8 (n, C, H, W)."""

    images: np.ndarray

    def read(self, row: int, *draws: np.ndarray) -> np.ndarray:
        return self.images[row]


@dataclass(frozen=True)
class Files:
    """Encoded images, in files under a folder.

    Attributes:
        root: the folder.
        paths: encoded, relative to it, S (n,).
        cut: what is made of each, in the end (H, W, C).
    """

    root: Path
    paths: np.ndarray
    cut: Callable[..., Image.Image | np.ndarray]

    def read(self, row: int, *draws: np.ndarray) -> np.ndarray:
        try:
            with Image.open(self._file(row), formats=IMAGE_FORMATS) as opened:
                return np.asarray(self.cut(opened, *draws)).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)  # whose words have a path, or an address in memory
            reason = f"it is none of {', '.join(IMAGE_FORMATS)}" if unknown else brief(error)
            raise Unreadable(f"{self._name(row)} cannot be read as an image ({reason})") from error

    def _file(self, row: int) -> Path | BytesIO:
        return self.root / os.fsdecode(self.paths[row])

    def _name(self, row: int) -> str:
        return str(self._file(row))


@dataclass(frozen=True)
class Shards(Files):
    """Encoded images, in a column of Parquet files; a path is ``FILE#ROW``.

    Attributes:
        columns: of each file, pyarrow.ChunkedArray of large_binary.
    """

    columns: Mapping[str, Any]

    def _file(self, row: int) -> BytesIO:
        shard, _, place = os.fsdecode(self.paths[row]).rpartition("#")
        return BytesIO(self.columns[shard][int(place)].as_py() or b"")

    def _name(self, row: int) -> str:
        shard, _, place = os.fsdecode(self.paths[row]).rpartition("#")
        return f"row {place} of {self.root / shard}"
