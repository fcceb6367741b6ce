"""What lies in a data set's folder: a survey that lists and checks it, and the index that is kept of it.

What is known of a split is one array, which the processes that decode share: nothing else grows with the set.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..console import Progress
from ..errors import UsageError
from ..files import cache_folder, keep_cached
from .images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, Files, glance
from .source import Unreadable

SETTLED = 2_000_000_000  # ns that a folder must have been left alone before its index is kept
_SUFFIXES, _UNREAD = (tuple(map(os.fsencode, suffixes)) for suffixes in (IMAGE_SUFFIXES, UNREAD_SUFFIXES))
Found = tuple[bytes, int, int]  # of an image its path, relative to its split's folder, its size in bytes and its label
Splits = dict[str, np.ndarray]  # by name, of all images, (n,), with these as the fields path, size and label


@dataclass(frozen=True)
class Index:
    """What a look at a data set's folder found.

    Attributes:
        splits: see `Splits`.
        classes: names by number.
        skipped: what is not in ``splits`` since it cannot be trained on, one line each.
    """

    splits: Splits
    classes: tuple[str, ...]
    skipped: tuple[str, ...]

    def fingerprint(self) -> str:
        """Return the sha256 of every image's relative path, size in bytes and label; the pixels are not read."""
        digest = hashlib.sha256(json.dumps([len(self.classes), sorted(self.splits)]).encode())
        for _, images in sorted(self.splits.items()):
            digest.update(f"{images['path'].itemsize} {len(images)}\n".encode())
            for values in (images["path"], images["size"].astype("<i8"), images["label"].astype("<i8")):
                digest.update(values.tobytes())
        return digest.hexdigest()


def gathered(found: Iterable[Found]) -> np.ndarray:
    """Return images as an array of `Splits`."""
    rows = list(found)
    longest = max((len(path) for path, _, _ in rows), default=1)
    return np.array(rows, [("path", f"S{longest}"), ("size", np.int64), ("label", np.int64)])


def skippable(remedy: str, on_error: str | None) -> str:
    """Return a remedy, and that one can do without it where ``on_error`` is a setting of the data set."""
    return f"{remedy}, or type dataset.on_error=skip to train without such images" if on_error else remedy


@dataclass(frozen=True)
class Survey:
    """One look at a data set's folder.

    Attributes:
        root: the folder.
        on_error: see `Layout`.
        stamps: when each folder and list that was looked at had last changed, in ns.
        skipped: what cannot be trained on.
    """

    root: Path
    on_error: str | None
    stamps: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def refuse(self, what: str, remedy: str) -> None:
        """Raise UsageError, or leave out and remember ``what`` where mistakes are to be skipped."""
        if self.on_error != "skip":
            raise UsageError(f"{what}: {skippable(remedy, self.on_error)}")
        self.skipped.append(what)

    def stamp(self, path: Path | str) -> None:
        """Remember when a folder or list has changed; to be called before it is read."""
        with there(path):
            self.stamps.setdefault(str(path), os.stat(path).st_mtime_ns)

    def lines(self, file: Path) -> Iterator[tuple[int, bytes]]:
        """Yield the number, from 1, and the content of every line that is not empty."""
        self.stamp(file)
        with there(file), file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if content := (line.removeprefix(BOM_UTF8) if number == 1 else line).strip():
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
                self.wrong(file, number, f"is {show(line)} where a path and a label are wanted")
            elif not 0 <= label < labels:
                self.wrong(file, number, f"gives {show(path)} the label {label} where 0 to {labels - 1} are wanted")
            else:
                yield number, path.rstrip(), label

    def wrong(self, file: Path, number: int, what: str) -> None:
        """Refuse a line of a list."""
        self.refuse(f"{file}, line {number}, {what}", "mend or delete it")

    def folders(self, parent: str) -> list[str]:
        """Return the names of the folders in ``parent``, in order."""
        return [os.fsdecode(entry.name) for entry in self._entries(parent) if _is_folder(entry)]

    def files(self, folder: str, nested: bool = False) -> Iterator[bytes]:
        """Yield the paths of the images in a folder, in order; with ``nested`` also in those below.

        Images of kinds that are not read are refused, and links to folders below, which may lead in a circle.
        """
        for entry in self._entries(folder):
            path, name = os.fsencode(folder) + b"/" + entry.name, entry.name.lower()
            if not _is_folder(entry):
                if name.endswith(_SUFFIXES):
                    yield path
                elif name.endswith(_UNREAD):
                    what = f"{self.root / os.fsdecode(path)} is of a kind that is not read"
                    self.refuse(what, f"write it as {', '.join(IMAGE_SUFFIXES)}")
                elif nested:
                    self._leads_somewhere(entry)
            elif nested and entry.is_symlink():
                what = f"{self.root / os.fsdecode(path)} is a link to a folder, which is not followed"
                self.refuse(what, "put the folder itself there")
            elif nested:
                yield from self.files(os.fsdecode(path), nested)

    def _leads_somewhere(self, entry: os.DirEntry[bytes]) -> None:
        """Refuse a link that leads nowhere, which may be meant for a folder of images."""
        if entry.is_symlink() and not os.path.exists(entry.path):
            self.refuse(f"{os.fsdecode(entry.path)} is a link to what is not there", "mend or delete it")

    def _entries(self, folder: str) -> list[os.DirEntry[bytes]]:
        """Return what a folder has, in order, but for what is hidden."""
        self.stamp(self.root / folder)
        with there(self.root / folder), os.scandir(os.fsencode(self.root / folder)) as entries:
            return sorted((entry for entry in entries if entry.name[:1] != b"."), key=lambda entry: entry.name)

    def _size(self, path: bytes, remedy: str, *where: Any) -> int | None:
        place = os.fsencode(self.root) + b"/" + path
        try:
            return os.stat(place).st_size
        except OSError as error:
            self.refuse(f"{os.fsdecode(place)} cannot be read ({error.strerror})", remedy.format(*where))
        return None

    def by_folder(
        self, parent: str, names: Sequence[str], below: str = "", nested: bool = False, every: bool = True
    ) -> np.ndarray:
        """Return the images of the folders ``parent/NAME[/below]``, one a class, in order, as in `Splits`.

        ``nested`` takes those of folders in these as well. Each class must have one, unless not ``every`` one must.
        """
        there = set(self.folders(parent))
        for entry in self._entries(parent):
            self._leads_somewhere(entry)
        folders = [f"{parent}/{name}{below}" for name in names]
        found = (
            (path, size, label)
            for label, folder in enumerate(folders)
            if names[label] in there
            for path in self.files(folder, nested)
            if (size := self._size(path, "replace or delete it")) is not None
        )
        return self.listed(found, self.root / parent, [f"{self.root / folder}" for folder in folders if every])

    def by_list(self, file: Path, named: Iterable[tuple[int, bytes, int]], classes: Sequence[str]) -> np.ndarray:
        """Return the images that a list names: the line's number, the path and the label of each, as in `Splits`.

        Each is a sample of its own, and so may stand there once, whatever its labels are.
        """
        line_of: dict[bytes, int] = {}

        def found() -> Iterator[Found]:
            for number, path, label in named:
                if (first := line_of.setdefault(path, number)) != number:
                    self.wrong(file, number, f"names {show(path)}, which line {first} names too")
                    continue
                folder = os.path.dirname(f"{self.root}/{os.fsdecode(path)}")
                if folder not in self.stamps:
                    while not os.path.isdir(folder):  # the nearest one that is there changes when this one comes
                        folder = os.path.dirname(folder)
                    self.stamp(folder)
                if (size := self._size(path, "fetch it, or delete line {} of {}", number, file)) is not None:
                    yield path, size, label

        return self.listed(found(), file, [f"{name} in {file}" for name in classes])

    def listed(self, found: Iterable[Found], where: Path | str, classes: Sequence[str]) -> np.ndarray:
        """Gather the images of a split, which are ``where``, and refuse ``classes``, by number, without one.

        Raises UsageError where there is no image at all.
        """
        images = gathered(found)
        for c in np.setdiff1d(np.arange(len(classes)), images["label"]).tolist():
            self.refuse(f"{classes[c]} has no image", "add images, or leave that class out")
        if not len(images):
            raise UsageError(f"{where} has no image: set dataset.root to the folder that has them")
        return images


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Return whether it is one, or a link to one, and not in a circle."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


@contextmanager
def there(path: Path | str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}): put it there, or set dataset.root to the folder that has it"
        ) from None


def show(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))


def indexed(
    key: bytes | None,
    begin: Callable[[], Survey],
    read: Callable[[Survey], tuple[Sequence[str], Splits]],
    store: Callable[[str, np.ndarray], Files],
) -> Index:
    """Return the index of a data set, from the cache where neither a folder nor a list has changed since.

    Args:
        key: what the index depends on beside the files; None where it is not to be kept.
        begin: returns a survey of the folder that has seen nothing yet.
        read: lets it look; returns the names of the classes, and the splits.
        store: opens the images of a split, by their paths. Where mistakes are to be skipped every image is read once,
            and those that cannot be are left out.
    """
    place = None
    if key is not None:
        digest = hashlib.sha256(key + Path(__file__).read_bytes())
        place = cache_folder("index") / f"{digest.hexdigest()[:32]}.npz"
        if (index := _cached(place)) is not None:
            return index
    began, survey = time.time_ns(), begin()
    classes, splits = read(survey)
    if survey.on_error == "skip":
        splits = {name: _readable(store(name, images["path"]), images, survey) for name, images in splits.items()}
    index = Index(splits, tuple(classes), tuple(survey.skipped))
    if place is not None and max(survey.stamps.values()) < began - SETTLED:
        _keep(place, index, survey.stamps)
    return index


def _readable(store: Files, images: np.ndarray, survey: Survey) -> np.ndarray:
    """Return what is left of a split without the images that cannot be read."""
    glanced, progress, keep = replace(store, cut=glance), Progress(), np.ones(len(images), bool)

    def problem(row: int) -> str | None:
        try:
            glanced.read(row)
        except Unreadable as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), 4096):
            rows = range(start, min(start + 4096, len(images)))
            for row, wrong in zip(rows, pool.map(problem, rows), strict=True):
                if wrong:
                    keep[row] = False
                    survey.skipped.append(wrong)
                progress.show(f"reading every image once: {row}/{len(images)}")
    return images[keep]


def _cached(place: Path) -> Index | None:
    try:
        with np.load(place, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            if any(os.stat(path).st_mtime_ns != stamp for path, stamp in facts["stamps"].items()):
                return None
            splits = {name: arrays[f"split {name}"] for name in facts["splits"]}
        return Index(splits, tuple(facts["classes"]), tuple(facts["skipped"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _keep(place: Path, index: Index, stamps: dict[str, int]) -> None:
    facts = {"stamps": stamps, "splits": [*index.splits], "classes": index.classes, "skipped": index.skipped}
    arrays: dict[str, Any] = {f"split {name}": images for name, images in index.splits.items()}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    keep_cached(place, lambda file: np.savez(file, **arrays))
