"""What lies in a data set's folder: a survey that lists and checks it, and the index that is kept of it.

What is known of a split is three arrays, which the processes that decode share: nothing else grows with the set.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignprune_exp.console import Progress
from alignprune_exp.data.images import IMAGE_SUFFIXES, Files
from alignprune_exp.data.source import Images, Source
from alignprune_exp.errors import UsageError
from alignprune_exp.files import cache_folder, printable, write_atomically

SETTLED = 2_000_000_000  # ns that a folder must have been left alone before its index is kept
_SUFFIXES = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
Found = tuple[bytes, int, int]  # an image's path, size in bytes and label, as in a `Listing`


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

    @classmethod
    def of(cls, found: Iterable[Found]) -> Listing:
        paths: list[bytes] = []
        sizes, labels = array("q"), array("q")
        for path, size, label in found:
            paths.append(path)
            sizes.append(size)
            labels.append(label)
        return cls(np.array(paths, np.bytes_), np.array(sizes, np.int64), np.array(labels, np.int64))


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


def skippable(remedy: str, on_error: str | None) -> str:
    """Return a remedy, and that one can do without it where ``on_error`` is a setting of the data set."""
    return f"{remedy}, or type dataset.on_error=skip to train without such images" if on_error else remedy


class Survey:
    """One look at a data set's folder.

    Args:
        on_error: ``skip`` leaves out what cannot be trained on; None where the data set does not offer that.

    Attributes:
        stamps: when each folder and list that was looked at had last changed, in ns.
        skipped: what cannot be trained on.
    """

    def __init__(self, on_error: str | None) -> None:
        self.on_error = on_error
        self.stamps: dict[str, int] = {}
        self.skipped: list[str] = []
        self._stamped: set[bytes] = set()

    def refuse(self, what: str, remedy: str) -> None:
        """Raise UsageError, or leave out and remember ``what`` where mistakes are to be skipped."""
        if self.on_error != "skip":
            raise UsageError(f"{what}: {skippable(remedy, self.on_error)}")
        self.skipped.append(what)

    def stamp(self, path: Path) -> None:
        """Remember when a folder or list has changed; to be called before it is read."""
        with _there(path):
            self.stamps.setdefault(str(path), os.stat(path).st_mtime_ns)

    def lines(self, file: Path) -> Iterator[tuple[int, bytes]]:
        """Yield the number, from 1, and the content of every line that is not empty."""
        self.stamp(file)
        with _there(file), file.open("rb") as lines:
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
        return [os.fsdecode(entry.name) for entry in self._entries(parent) if entry.is_dir()]

    def files(self, root: Path, folder: str, nested: bool = False) -> Iterator[tuple[bytes, int]]:
        """Yield the paths relative to ``root``, in order, and the sizes of the images in a folder, or also below it."""
        for entry in self._entries(root / folder):
            path = os.fsencode(folder) + b"/" + entry.name
            if entry.is_dir():
                if nested and not entry.is_symlink():
                    yield from self.files(root, os.fsdecode(path), nested)
            elif entry.name.lower().endswith(_SUFFIXES):
                try:
                    yield path, entry.stat().st_size
                except OSError as error:
                    self._gone(root / os.fsdecode(path), error, "replace or delete it")

    def _entries(self, folder: Path) -> list[os.DirEntry[bytes]]:
        """Return what a folder has, in order, but for what is hidden."""
        self.stamp(folder)
        with _there(folder), os.scandir(os.fsencode(folder)) as entries:
            return sorted((entry for entry in entries if entry.name[:1] != b"."), key=lambda entry: entry.name)

    def size(self, root: Path, path: bytes, file: Path, number: int) -> int | None:
        """Return the size of an image that a list names; None where it is not there."""
        place = os.fsencode(root) + b"/" + path
        folder = os.path.dirname(place)
        if folder not in self._stamped:
            self._stamped.add(folder)
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

    def by_folder(
        self, root: Path, parent: str, names: Sequence[str], below: str = "", nested: bool = False, every: bool = True
    ) -> Listing:
        """Return the images of the folders ``root/parent/NAME[/below]``, one a class, in order.

        ``nested`` takes those of folders in these as well. Each class must have one, unless not ``every`` one must.
        """
        there = set(self.folders(root / parent))
        folders = [f"{parent}/{name}{below}" for name in names]
        found = (
            (path, size, label)
            for label, (name, folder) in enumerate(zip(names, folders, strict=True))
            if name in there
            for path, size in self.files(root, folder, nested)
        )
        return self.listing(found, root / parent, [f"{root / folder}" for folder in folders] if every else ())

    def listing(self, found: Iterable[Found], where: Path | str, classes: Sequence[str]) -> Listing:
        """Gather the images of a split, ``where`` a folder or a list has them, and refuse ``classes`` without one.

        Raises UsageError where there is no image at all.
        """
        listing = Listing.of(found)
        for c in np.setdiff1d(np.arange(len(classes)), listing.labels).tolist():
            self.refuse(f"{classes[c]} has no image", "add images, or leave that class out")
        if not len(listing):
            raise UsageError(f"{where} has no image: set dataset.root to the folder that has them")
        return listing


@contextmanager
def _there(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}): put it there, or set dataset.root to the folder that has it"
        ) from None


Read = Callable[[Survey], tuple[Sequence[str], dict[str, Listing]]]
Opened = Callable[[str, Listing], Files]


def surveyed(
    name: str,
    read: Read,
    store: Opened,
    *,
    key: Sequence[Any],
    on_error: str | None = None,
    fingerprint: Callable[[Index], str] = Index.fingerprint,
    reference: str | None = None,
    **facts: Any,
) -> Source:
    """Return a data set of encoded images.

    Args:
        name: of the data set.
        read: surveys its folder; returns the names of the classes, and the splits. Those beside ``train``, ``test``
            and ``reference`` are evaluated on.
        store: opens the images of a split. With ``on_error=skip`` every one is read once, and those that cannot be
            are left out.
        key: what ``read`` depends on beside the files.
        on_error: ``stop``, ``skip``, or None; see `Survey`.
        fingerprint: of the index.
        reference: the split that the reference set is drawn from, if it has a place of its own.
        facts: more of the `Source`.
    """
    index = _indexed([name, *key, on_error], read, store)
    remedy = skippable("replace or delete it", on_error)
    images = {
        split: Images(listing.labels, store(split, listing), listing.paths, remedy)
        for split, listing in index.splits.items()
    }
    return Source(
        name=name,
        classes=tuple(printable(name) for name in index.classes),
        train=images["train"],
        test=images["test"],
        fingerprint=fingerprint(index),
        reference=images[reference] if reference else None,
        evaluations={split: images[split] for split in images if split not in ("train", "test", "reference")},
        skipped=index.skipped,
        **facts,
    )


def _indexed(key: list[Any], read: Read, store: Opened) -> Index:
    """Return the index of a data set, from the cache where neither a folder nor a list has changed since.

    An image that is replaced in place, which leaves its folder's time as it was, goes unnoticed.
    """
    digest = hashlib.sha256(json.dumps(key, default=str).encode())
    for code in (__file__, inspect.getfile(read)):
        digest.update(Path(code).read_bytes())
    place = cache_folder("index") / f"{digest.hexdigest()[:32]}.npz"
    if (index := _cached(place)) is not None:
        return index
    survey, began = Survey(key[-1]), time.time_ns()
    classes, splits = read(survey)
    if survey.on_error == "skip":
        splits = {name: _readable(store(name, listing), listing, survey) for name, listing in splits.items()}
    index = Index(splits, tuple(classes), tuple(survey.skipped))
    if max(survey.stamps.values()) < began - SETTLED:
        _keep(place, index, survey.stamps)
    return index


def _readable(store: Files, listing: Listing, survey: Survey) -> Listing:
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
