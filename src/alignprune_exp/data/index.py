"""What lies in a data set's folder: a survey that lists and checks it, and the index that is kept of it.

What is known of a split is three arrays, which the processes that decode share: nothing else grows with the set.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignprune_exp.console import Progress
from alignprune_exp.data.images import IMAGE_SUFFIXES, SKIP, Photographs
from alignprune_exp.data.source import Images, Source
from alignprune_exp.errors import UsageError
from alignprune_exp.files import cache_folder, printable, write_atomically

# By channel, of the training pixels of ILSVRC-12 in 0..1 units: what torchvision's weights were trained with.
STATISTICS = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
SETTLED = 2_000_000_000  # ns that a folder must have been left alone before its index is kept
_SUFFIXES = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)


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
            raise UsageError(f"{what}: {remedy}, {SKIP}")
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
                    f"{file}, line {number}, is {show(line)} where a path and a label are wanted", "mend or delete it"
                )
            elif not 0 <= label < labels:
                self.refuse(
                    f"{file}, line {number}, gives {show(path)} the label {label} where 0 to {labels - 1} are wanted",
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


def show(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))


def surveyed(
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


def from_folders(survey: Survey, root: Path, folders: list[str], there: set[str] | None = None) -> Listing:
    """Return the images of folders, one a class, in order; those not ``there`` have none."""
    listed = Listed()
    for label, folder in enumerate(folders):
        if there is None or Path(folder).name in there:
            for path, size in survey.files(root, folder):
                listed.add(path, size, label)
    return listed.listing()
