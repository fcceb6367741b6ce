"""Large sets of photographs, in the layouts their owners ship: an index of their files, and crops of any size.

What is known of a split is three arrays, which the processes that decode share: nothing else grows with the set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignprune_exp.console import Progress
from alignprune_exp.data.source import (
    IMAGE_SUFFIXES,
    Images,
    Source,
    brief,
    decode,
    existing,
    hub_names,
    rgb,
)
from alignprune_exp.errors import UsageError
from alignprune_exp.files import cache_folder, printable, write_atomically

# By channel, of the training pixels of ILSVRC-12 in 0..1 units: what torchvision's weights were trained with.
STATISTICS = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
WEBVISION_CLASSES = 1000
CLOTHING_CLASSES = (
    "T-Shirt, Shirt, Knitwear, Chiffon, Sweater, Hoodie, Windbreaker, Jacket, Downcoat, Suit, Shawl, Dress, Vest, "
    "Underwear"
)
SETTLED = 2_000_000_000  # ns that a folder must have been left alone before its index is kept
_SUFFIXES = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
_SKIP = "or type dataset.on_error=skip to train without such images"


# ---- pixels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """How a photograph becomes a square.

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
class Photographs:
    """Image files under a folder; see ``source.Views``.

    Attributes:
        root: the folder.
        paths: encoded, relative to it, S (n,).
        cut: what is made of each.
    """

    root: Path
    paths: np.ndarray
    cut: Cut

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.cut.image_size, self.cut.image_size

    def read(self, row: int) -> np.ndarray:
        return self._decoded(row, self.cut.centre)

    def view(self, row: int, draws: np.ndarray) -> np.ndarray:
        return self._decoded(row, lambda image: self.cut.view(image, draws))

    def problem(self, row: int) -> str | None:
        """Return what is wrong with an image, if anything; all of it is read, at the lowest resolution it has."""
        try:
            self._decoded(row, _glance, "")
        except UsageError as error:
            return str(error).removesuffix(": ")
        return None

    def _decoded(
        self, row: int, work: Callable[[Image.Image], Image.Image], remedy: str = f"replace or delete it, {_SKIP}"
    ) -> np.ndarray:
        file, name = self._file(row)
        return decode(file, name, remedy, work)

    def _file(self, row: int) -> tuple[Path | BytesIO, str]:
        path = self.root / os.fsdecode(self.paths[row])
        return path, str(path)


@dataclass(frozen=True)
class Shards(Photographs):
    """Images in the column of Parquet files; a path is ``FILE#ROW``.

    Attributes:
        column: returns the encoded images of a file.
    """

    column: Callable[[str], Any]

    def _file(self, row: int) -> tuple[Path | BytesIO, str]:
        shard, _, place = os.fsdecode(self.paths[row]).rpartition("#")
        return BytesIO(self.column(shard)[int(place)].as_py() or b""), f"row {place} of {self.root / shard}"


def _glance(image: Image.Image) -> Image.Image:
    image.draft(None, (1, 1))
    return rgb(image)


# ---- the index -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The images of one split.

    Attributes:
        paths: encoded, relative to the split's folder, S (n,).
        sizes: in bytes, int64 (n,).
        labels: int64 (n,).
    """

    paths: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


class Listed:
    """Gathers a `Listing`."""

    def __init__(self) -> None:
        self.paths: list[bytes] = []
        self.sizes, self.labels = array("q"), array("q")

    def add(self, path: bytes, size: int, label: int) -> None:
        self.paths.append(path)
        self.sizes.append(size)
        self.labels.append(label)

    def listing(self) -> Listing:
        sizes, labels = (np.frombuffer(values, np.int64) if values else _NONE for values in (self.sizes, self.labels))
        return Listing(np.array(self.paths, np.bytes_), sizes, labels)


_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Index:
    """What a look at a data set's folder found.

    Attributes:
        splits: by name.
        classes: names by number.
        skipped: what is not in ``splits`` since it cannot be trained on, one line each.
    """

    splits: dict[str, Listing]
    classes: tuple[str, ...]
    skipped: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return the sha256 of every image's relative path, size in bytes and label; the pixels are not read."""
        digest = hashlib.sha256(json.dumps([len(self.classes), sorted(self.splits)]).encode())
        for _, listing in sorted(self.splits.items()):
            digest.update(f"{listing.paths.dtype.itemsize} {len(listing)}\n".encode())
            for values in (listing.paths, listing.sizes.astype("<i8"), listing.labels.astype("<i8")):
                digest.update(values.tobytes())
        return digest.hexdigest()


class Survey:
    """One look at a data set's folder.

    Attributes:
        stamps: when each folder and list that was looked at had last changed, in ns.
        skipped: what cannot be trained on.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self._folders: set[bytes] = set()
        self.stamps: dict[str, int] = {}
        self.skipped: list[str] = []

    def refuse(self, what: str, remedy: str) -> None:
        """Raise UsageError, or leave out and remember ``what`` where mistakes are to be skipped."""
        if not self.skip:
            raise UsageError(f"{what}: {remedy}, {_SKIP}")
        self.skipped.append(what)

    def stamp(self, path: Path) -> None:
        """Remember when a folder or list has changed; to be called before it is read."""
        try:
            self.stamps.setdefault(str(path), os.stat(path).st_mtime_ns)
        except OSError as error:
            raise UsageError(
                f"{path} cannot be read ({error.strerror}): put it there, or set dataset.root to the folder that has it"
            ) from None

    def lines(self, file: Path) -> Iterator[tuple[int, bytes]]:
        """Yield the number, from 1, and the content of every line that is not empty."""
        self.stamp(file)
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if content := line.strip():
                    yield number, content

    def labelled(self, file: Path, labels: int) -> Iterator[tuple[int, bytes, int]]:
        """Yield the number of every line ``path label``, its path and its label, in 0..labels-1."""
        for number, line in self.lines(file):
            path, _, word = line.replace(b"\t", b" ").rpartition(b" ")
            try:
                label = int(word)
            except ValueError:
                path = b""
            if not path:
                self.refuse(
                    f"{file}, line {number}, is {_show(line)} where a path and a label are wanted", "mend or delete it"
                )
            elif not 0 <= label < labels:
                self.refuse(
                    f"{file}, line {number}, gives {_show(path)} the label {label} where 0 to {labels - 1} are wanted",
                    "mend or delete it",
                )
            else:
                yield number, path.rstrip(), label

    def folders(self, parent: Path) -> list[str]:
        """Return the names of the folders in ``parent``, in order."""
        self.stamp(parent)
        with os.scandir(parent) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())

    def files(self, root: Path, folder: str) -> Iterator[tuple[bytes, int]]:
        """Yield the paths relative to ``root``, in order, and the sizes of the images in a folder."""
        self.stamp(root / folder)
        found = []
        with os.scandir(os.fsencode(root / folder)) as entries:
            for entry in entries:
                if entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith(b"."):
                    try:
                        found.append((entry.name, entry.stat().st_size))
                    except OSError as error:
                        self._gone(Path(os.fsdecode(entry.path)), error, "replace or delete it")
        for name, size in sorted(found):
            yield os.fsencode(folder) + b"/" + name, size

    def size(self, root: Path, path: bytes, file: Path, number: int) -> int | None:
        """Return the size of an image that a list names; None where it is not there."""
        place = os.fsencode(root) + b"/" + path
        folder = os.path.dirname(place)
        if folder not in self._folders:
            self._folders.add(folder)
            while not os.path.isdir(folder):  # the nearest one that is there changes when this one comes
                folder = os.path.dirname(folder)
            self.stamp(Path(os.fsdecode(folder)))
        try:
            return os.stat(place).st_size
        except OSError as error:
            self._gone(Path(os.fsdecode(place)), error, f"fetch it, or delete line {number} of {file}")
        return None

    def _gone(self, path: Path, error: OSError, remedy: str) -> None:
        self.refuse(f"{path} cannot be read ({error.strerror})", remedy)

    def nonempty(self, listing: Listing, names: list[str], where: str) -> None:
        """Refuse classes, ``names`` by number, without an image."""
        for c in np.flatnonzero(np.bincount(listing.labels, minlength=len(names)) == 0):
            self.refuse(f"{where.format(names[c])} has no image", "add images, or leave that class out")
        if not len(listing):
            raise UsageError(f"{where.format('any class')} has no image: set dataset.root to the folder that has them")


def indexed(key: list[Any], read: Callable[[Survey], Index], store: Callable[[str, Listing], Photographs]) -> Index:
    """Return the index of a data set, from the cache where neither a folder nor a list has changed since.

    Args:
        key: what the index depends on beside the files; its last item is ``stop`` or ``skip``.
        read: makes the index.
        store: opens a split's images. With ``skip`` every one is read once, and those that cannot be are left out.

    An image that is replaced in place, which leaves its folder's time as it was, goes unnoticed.
    """
    skip = key[-1] == "skip"
    words = json.dumps(key, default=str).encode()
    place = cache_folder("index") / f"{hashlib.sha256(words + Path(__file__).read_bytes()).hexdigest()[:32]}.npz"
    if (index := _cached(place)) is not None:
        return index
    survey, began = Survey(skip), time.time_ns()
    index = read(survey)
    if skip:
        splits = {name: _readable(store(name, listing), listing, survey) for name, listing in index.splits.items()}
        index = replace(index, splits=splits, skipped=tuple(survey.skipped))
    if max(survey.stamps.values()) < began - SETTLED:
        _keep(place, index, survey.stamps)
    return index


def _readable(store: Photographs, listing: Listing, survey: Survey) -> Listing:
    """Return what is left of a split without the images that cannot be read."""
    keep = np.ones(len(listing), bool)
    progress = Progress()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(listing), 4096):
            rows = range(start, min(start + 4096, len(listing)))
            for row, problem in zip(rows, pool.map(store.problem, rows), strict=True):
                if problem:
                    keep[row] = False
                    survey.skipped.append(problem)
                progress.show(f"reading every image once: {row}/{len(listing)}")
    return Listing(listing.paths[keep], listing.sizes[keep], listing.labels[keep])


def _cached(place: Path) -> Index | None:
    try:
        with np.load(place, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            if any(os.stat(path).st_mtime_ns != stamp for path, stamp in facts["stamps"].items()):
                return None
            splits = {
                name: Listing(*(arrays[f"{name} {values}"] for values in ("paths", "sizes", "labels")))
                for name in facts["splits"]
            }
        return Index(splits, tuple(facts["classes"]), tuple(facts["skipped"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _keep(place: Path, index: Index, stamps: dict[str, int]) -> None:
    facts = {"stamps": stamps, "splits": [*index.splits], "classes": index.classes, "skipped": index.skipped}
    arrays = {
        f"{name} {values}": getattr(listing, values)
        for name, listing in index.splits.items()
        for values in ("paths", "sizes", "labels")
    }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, lambda file: np.savez(file, **arrays))
    except OSError:
        pass  # a home that cannot be written costs seconds, no more


def _show(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))


# ---- the layouts -----------------------------------------------------------------------------------------


def webvision(
    name: str, *, root: Path | None, imagenet_root: Path | None, classes: int, on_error: str, **cut: Any
) -> Source:
    """WebVision 1.0 (Li et al., 2017), its Google part; ``classes=50`` is the usual "mini".

    Evaluated on its validation set, less what the reference set takes of it, and on ILSVRC-12's, whose classes are
    the same, where ``imagenet_root`` is given.
    """
    lists = {"train": "info/train_filelist_google.txt", "test": "info/val_filelist.txt"}
    root = existing(name, root, f"{lists['train']}, {lists['test']}, google/ and val_images_256/")
    folders = {"train": "", "test": "val_images_256/"}

    def read(survey: Survey) -> Index:
        synsets = root / "info" / "synsets.txt"
        survey.stamp(synsets.parent)
        lines = [os.fsdecode(line) for _, line in survey.lines(synsets)] if synsets.is_file() else []
        names = [line.partition(" ")[2].split(",")[0] or line for line in lines[:classes]]
        names += [f"class {c}" for c in range(len(names), classes)]
        splits = {
            split: _from_list(survey, root, file, folders[split], WEBVISION_CLASSES, classes)
            for split, file in lists.items()
        }
        for split, file in lists.items():
            survey.nonempty(splits[split], [str(c) for c in range(classes)], f"class {{}} in {root / file}")
        if imagenet_root is not None:
            wnids = [line.split()[0] for line in lines]
            splits["imagenet"] = _webvision_on_imagenet(survey, imagenet_root, wnids, classes)
        return Index(splits, tuple(names), tuple(survey.skipped))

    roots = {"train": root, "test": root, "imagenet": imagenet_root or root}
    return _source(
        [name, root.resolve(), imagenet_root and imagenet_root.resolve(), classes, on_error],
        read,
        lambda split, listing: Photographs(roots[split], listing.paths, Cut(**cut)),
        reference="test",
        labels_clean=False,
    )


def _webvision_on_imagenet(survey: Survey, root: Path, wnids: list[str], classes: int) -> Listing:
    """Return ILSVRC-12's validation images of WebVision's first classes, which are numbered by sorted synset."""
    if not (root / "val").is_dir():
        raise UsageError(f"dataset.imagenet_root={root} has no folder val: type the folder that has val/<wnid>/*.JPEG")
    there = survey.folders(root / "val")
    if not wnids and len(there) not in (classes, WEBVISION_CLASSES):
        raise UsageError(
            f"{root / 'val'} has {len(there)} class folders where {classes} or {WEBVISION_CLASSES} are wanted: put "
            "WebVision's synsets.txt into info/, which says which folder is which class"
        )
    wanted = (wnids or there)[:classes]
    if missing := sorted(set(wanted) - set(there)):
        raise UsageError(f"{root / 'val' / missing[0]} is not there: put the images of that class into it")
    listing = _from_folders(survey, root, [f"val/{wnid}" for wnid in wanted])
    survey.nonempty(listing, wanted, f"{root / 'val'}/{{}}")
    return listing


def clothing1m(name: str, *, root: Path | None, on_error: str, **cut: Any) -> Source:
    """Clothing-1M (Xiao et al., CVPR 2015): trained on the noisy million, evaluated on its clean test set.

    The reference set is drawn from its clean training set.
    """
    kinds = ("noisy", "clean")
    lists = {"train": "noisy_train", "reference": "clean_train", "test": "clean_test"}
    root = existing(name, root, "noisy_label_kv.txt, clean_label_kv.txt, their key lists and images/")
    classes = CLOTHING_CLASSES.split(", ")

    def read(survey: Survey) -> Index:
        labels = {}
        for kind in kinds:
            file = root / f"{kind}_label_kv.txt"
            labels[kind] = {path: label for _, path, label in survey.labelled(file, len(classes))}
        splits = {}
        for split, stem in lists.items():
            kind = stem.partition("_")[0]
            file, listed = root / f"{stem}_key_list.txt", Listed()
            for number, path in survey.lines(file):
                if (label := labels[kind].get(path)) is None:
                    survey.refuse(
                        f"{file}, line {number}, names {_show(path)}, which has no label in {kind}_label_kv.txt",
                        "mend or delete it",
                    )
                elif (size := survey.size(root, path, file, number)) is not None:
                    listed.add(path, size, label)
            splits[split] = listed.listing()
            survey.nonempty(splits[split], classes, f"{{}} in {file}")
        return Index(splits, tuple(classes), tuple(survey.skipped))

    return _source(
        [name, root.resolve(), on_error],
        read,
        lambda split, listing: Photographs(root, listing.paths, Cut(**cut)),
        reference="reference",
        labels_clean=False,
    )


def imagenet(name: str, *, root: Path | None, classes: int, on_error: str, **cut: Any) -> Source:
    """ILSVRC-12: ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``; the first ``classes`` in order of their wnids."""
    root = existing(name, root, "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")

    def read(survey: Survey) -> Index:
        wnids = _wnids(survey, root, classes)
        splits = {"train": _from_folders(survey, root, [f"train/{wnid}" for wnid in wnids])}
        survey.nonempty(splits["train"], wnids, f"{root / 'train'}/{{}}")
        if not (there := survey.folders(root / "val")):
            raise UsageError(f"{root / 'val'} has no class folders: sort its images into val/<wnid>/")
        splits["test"] = _from_folders(survey, root, [f"val/{wnid}" for wnid in wnids], set(there))
        survey.nonempty(splits["test"], wnids, f"{root / 'val'}/{{}}")
        return Index(splits, tuple(wnids), tuple(survey.skipped))

    key = [name, root.resolve(), classes, on_error]
    return _source(key, read, lambda split, listing: Photographs(root, listing.paths, Cut(**cut)), labels_clean=True)


def tiny_imagenet(name: str, *, root: Path | None, classes: int, on_error: str, **cut: Any) -> Source:
    """Tiny ImageNet (CS231n): ``train/<wnid>/images/``, ``val/images/`` and ``val/val_annotations.txt``."""
    root = existing(name, root, "train/<wnid>/images, val/images and val/val_annotations.txt")

    def read(survey: Survey) -> Index:
        wnids = _wnids(survey, root, classes)
        number_of = {wnid.encode(): c for c, wnid in enumerate(wnids)}
        known = {wnid.encode() for wnid in survey.folders(root / "train")}
        splits = {"train": _from_folders(survey, root, [f"train/{wnid}/images" for wnid in wnids])}
        survey.nonempty(splits["train"], wnids, f"{root / 'train'}/{{}}/images")
        file, listed = root / "val" / "val_annotations.txt", Listed()
        for number, line in survey.lines(file):
            words = line.split()
            if len(words) < 2:
                survey.refuse(
                    f"{file}, line {number}, is {_show(line)} where an image and its wnid are wanted",
                    "mend or delete it",
                )
            elif words[1] not in known:
                survey.refuse(
                    f"{file}, line {number}, gives {_show(words[0])} the label {_show(words[1])}, which has no folder "
                    f"in {root / 'train'}",
                    "mend or delete it",
                )
            elif words[1] in number_of:
                path = b"val/images/" + words[0]
                if (size := survey.size(root, path, file, number)) is not None:
                    listed.add(path, size, number_of[words[1]])
        splits["test"] = listed.listing()
        survey.nonempty(splits["test"], wnids, f"{{}} in {file}")
        return Index(splits, tuple(wnids), tuple(survey.skipped))

    key = [name, root.resolve(), classes, on_error]
    return _source(key, read, lambda split, listing: Photographs(root, listing.paths, Cut(**cut)), labels_clean=True)


def parquet(
    name: str,
    *,
    root: Path | None,
    image_column: str,
    label_column: str,
    train_split: str,
    test_split: str,
    on_error: str,
    **cut: Any,
) -> Source:
    """Shards of an image classification set of the Hugging Face hub: ``[data/]<split>[-*].parquet``.

    The encoded images are held in memory, once for all processes that decode them.
    """
    root = existing(name, root, "<split>.parquet or <split>-*.parquet, or data/ with them")
    shards = {"train": _shards(root, "train_split", train_split), "test": _shards(root, "test_split", test_split)}
    _fits_into_memory(root, [root / shard for files in shards.values() for shard in files])

    @cache
    def table(shard: str) -> Any:
        return _read_parquet(root / shard, image_column, label_column)

    @cache
    def column(shard: str) -> Any:
        import pyarrow.compute as pc

        return pc.struct_field(table(shard).column(image_column), "bytes")

    def read(survey: Survey) -> Index:
        import pyarrow.compute as pc

        for shard in (shard for files in shards.values() for shard in files):
            survey.stamp(root / shard)
        classes = _parquet_classes([table(shard) for shard in shards["train"]], label_column)
        number_of = {value: c for c, value in enumerate(classes)}
        splits = {}
        for split, files in shards.items():
            listed = Listed()
            for shard in files:
                sizes = pc.fill_null(pc.binary_length(column(shard)), 0).to_pylist()
                for row, value in enumerate(table(shard).column(label_column).to_pylist()):
                    label = number_of.get(value) if isinstance(value, str) else value
                    if label is None or not 0 <= label < len(classes):
                        survey.refuse(
                            f"row {row} of {root / shard} has {label_column} {value} where 0 to {len(classes) - 1} are "
                            "wanted",
                            "mend that file",
                        )
                    else:
                        listed.add(f"{shard}#{row}".encode(), sizes[row], label)
            splits[split] = listed.listing()
        names = [str(value) for value in classes]
        survey.nonempty(splits["train"], names, f"{{}} in {root / shards['train'][0]} and its like")
        survey.nonempty(splits["test"], names, f"{{}} in {root / shards['test'][0]} and its like")
        return Index(splits, tuple(names), tuple(survey.skipped))

    def store(split: str, listing: Listing) -> Photographs:
        for shard in shards[split]:
            column(shard)  # before there are other processes, which then share it
        return Shards(root, listing.paths, Cut(**cut), column)

    return _source(
        [name, root.resolve(), shards, image_column, label_column, on_error],
        read,
        store,
        labels_clean=True,
    )


def _source(
    key: list[Any],
    read: Callable[[Survey], Index],
    store: Callable[[str, Listing], Photographs],
    *,
    labels_clean: bool,
    reference: str | None = None,
) -> Source:
    """Return the data set of an index; splits beside ``train``, ``test`` and ``reference`` are evaluated on."""
    index = indexed(key, read, store)
    images = {
        split: Images(listing.labels, store(split, listing), listing.paths) for split, listing in index.splits.items()
    }
    return Source(
        name=str(key[0]),
        classes=tuple(printable(name) for name in index.classes),
        superclass=None,
        train=images["train"],
        test=images["test"],
        fingerprint=index.fingerprint(),
        official_order=False,
        asymmetric=None,
        labels_clean=labels_clean,
        as_shipped=True,
        reference=images[reference] if reference else None,
        evaluations={name: split for name, split in images.items() if name not in ("train", "test", "reference")},
        statistics=STATISTICS,
        skipped=index.skipped,
    )


def _from_list(survey: Survey, root: Path, name: str, folder: str, labels: int, classes: int) -> Listing:
    """Return the images of a list of ``path label``, paths being relative to ``folder``, of the first classes."""
    file, listed, prefix = root / name, Listed(), folder.encode()
    for number, path, label in survey.labelled(file, labels):
        if label < classes:
            place = path if path.startswith(prefix) else prefix + path
            if (size := survey.size(root, place, file, number)) is not None:
                listed.add(place, size, label)
    return listed.listing()


def _from_folders(survey: Survey, root: Path, folders: list[str], there: set[str] | None = None) -> Listing:
    """Return the images of folders, one a class, in order; those not ``there`` have none."""
    listed = Listed()
    for label, folder in enumerate(folders):
        if there is None or Path(folder).name in there:
            for path, size in survey.files(root, folder):
                listed.add(path, size, label)
    return listed.listing()


def _wnids(survey: Survey, root: Path, classes: int) -> list[str]:
    """Return the names of the first class folders under ``train``."""
    wnids = survey.folders(root / "train")
    if len(wnids) < classes:
        raise UsageError(
            f"{root / 'train'} has {len(wnids)} class folders where dataset.classes={classes}: type "
            f"dataset.classes={len(wnids)}, or put the other classes there"
        )
    return wnids[:classes]


def _shards(root: Path, key: str, split: str) -> list[str]:
    for place in (root, root / "data", root / split):
        for pattern in (f"{split}.parquet", f"{split}-*.parquet"):
            if files := sorted(place.glob(pattern)):
                return [file.relative_to(root).as_posix() for file in files]
    there = sorted({file.name.partition("-")[0].removesuffix(".parquet") for file in root.rglob("*.parquet")})
    known = f"the folder has {', '.join(there)}" if there else "the folder has no Parquet file"
    raise UsageError(f"dataset.{key}={split} has no {split}.parquet or {split}-*.parquet under {root}: {known}")


def _fits_into_memory(root: Path, files: list[Path]) -> None:
    needed = sum(file.stat().st_size for file in files)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory / 2:
        raise UsageError(
            f"the Parquet files under {root} take {needed / 1e9:.0f} GB, more than half of this machine's memory: "
            "write their images out as train/<class>/ and val/<class>/ and use dataset=imagenet"
        )


def _read_parquet(file: Path, image: str, label: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        for key, column in (("image_column", image), ("label_column", label)):
            if column not in schema.names:
                raise UsageError(f"dataset.{key}={column} is no column of {file}: use one of {', '.join(schema.names)}")
        kind = schema.field(image).type
        if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
            raise UsageError(f"the column {image} of {file} holds {kind} where a struct with bytes is wanted")
        kind = schema.field(label).type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind)):
            raise UsageError(f"the column {label} of {file} holds {kind} where class numbers or names are wanted")
        return pq.read_table(file, columns=[image, label])
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file} cannot be read as Parquet ({brief(error)}): fetch that file again") from error


def _parquet_classes(tables: list[Any], column: str) -> list[str]:
    """Return the class names that the hub writes into the schema; else those that occur in training."""
    if (names := hub_names(tables[0].schema, column)) is not None:
        return list(names)
    values = {value for table in tables for value in table.column(column).unique().to_pylist()} - {None}
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    return [str(c) for c in range(max(values, default=-1) + 1)]
