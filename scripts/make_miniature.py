"""Write a small copy of a data set's layout, to try its loader, its recipe and its suite with.

python scripts/make_miniature.py webvision data/webvision --source DIR

The images are those of DIR/train.parquet (CIFAR's, as on the Hugging Face hub) in sizes of their own; without
--source, textures that tell the classes apart. Training labels of webvision and clothing1m are noisy. With --broken
one thing is wrong, as it may be in the real set. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignprune_exp.console import Parser, command
from alignprune_exp.data.noise import symmetric
from alignprune_exp.errors import UsageError
from alignprune_exp.pruning.seeding import generator

Files = dict[str, bytes | None]  # by relative path; None makes a folder
CLOTHING_CLASSES = 14
BEYOND = 9999  # a label that no set has
LISTS = {"webvision": "info/train_filelist_google.txt", "clothing1m": "noisy_label_kv.txt"}
LISTS["tiny_imagenet"] = "val/val_annotations.txt"


@dataclass(frozen=True)
class Photo:
    """An encoded image, what it shows, and the label that it is given."""

    data: bytes
    shows: int
    label: int


def webvision(train: list[Photo], test: list[Photo], classes: int) -> Files:
    files: Files = {"info/synsets.txt": _text(f"{_wnid(c)} class {c}" for c in range(classes))}
    paths = [f"google/q{photo.shows:04d}/{row:06d}.jpg" for row, photo in enumerate(train)]
    names = [f"val{row + 1:06d}.jpg" for row in range(len(test))]
    files |= {path: photo.data for path, photo in zip(paths, train, strict=True)}
    files |= {f"val_images_256/{name}": photo.data for name, photo in zip(names, test, strict=True)}
    files["info/train_filelist_google.txt"] = _pairs(paths, train)
    files["info/val_filelist.txt"] = _pairs(names, test)
    return files


def clothing1m(train: list[Photo], test: list[Photo], classes: int) -> Files:
    def place(kind: str, row: int) -> str:
        return f"images/{row % 10}/{row % 100:02d}/{kind}{row},{row * 7919}.jpg"

    thirds = {"train": test[0::3], "val": test[1::3], "test": test[2::3]}
    noisy = [place("1", row) for row in range(len(train))]
    files: Files = {path: photo.data for path, photo in zip(noisy, train, strict=True)}
    files["noisy_train_key_list.txt"] = _text(noisy)
    files["noisy_label_kv.txt"] = _pairs(noisy, train)
    labels = b""
    for number, (split, photos) in enumerate(thirds.items(), 2):
        paths = [place(str(number), row) for row in range(len(photos))]
        files |= {path: photo.data for path, photo in zip(paths, photos, strict=True)}
        files[f"clean_{split}_key_list.txt"] = _text(paths)
        labels += _pairs(paths, photos)
    files["clean_label_kv.txt"] = labels
    return files


def imagenet(train: list[Photo], test: list[Photo], classes: int) -> Files:
    files: Files = {f"{split}/{_wnid(c)}": None for split in ("train", "val") for c in range(classes)}
    for split, photos in (("train", train), ("val", test)):
        for row, photo in enumerate(photos):
            files[f"{split}/{_wnid(photo.label)}/{row:08d}.JPEG"] = photo.data
    return files


def tiny_imagenet(train: list[Photo], test: list[Photo], classes: int) -> Files:
    files: Files = {f"train/{_wnid(c)}/images": None for c in range(classes)}
    files |= {f"train/{_wnid(p.label)}/images/{_wnid(p.label)}_{row}.JPEG": p.data for row, p in enumerate(train)}
    files |= {f"val/images/val_{row}.JPEG": photo.data for row, photo in enumerate(test)}
    lines = (f"val_{row}.JPEG\t{_wnid(photo.label)}\t0\t0\t31\t31" for row, photo in enumerate(test))
    files["val/val_annotations.txt"] = _text(lines)
    return files


def parquet(train: list[Photo], test: list[Photo], classes: int) -> Files:
    import pyarrow as pa
    import pyarrow.parquet as pq

    halves = {"train-00000-of-00002": train[0::2], "train-00001-of-00002": train[1::2], "test-00000-of-00001": test}
    files: Files = {}
    for name, photos in halves.items():
        images = pa.array([{"bytes": photo.data, "path": None} for photo in photos])
        labels = pa.array([photo.label for photo in photos], pa.int64())
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": images, "label": labels}), buffer)
        files[f"data/{name}.parquet"] = buffer.getvalue()
    return files


LAYOUTS: dict[str, Callable[[list[Photo], list[Photo], int], Files]] = {
    layout.__name__: layout for layout in (webvision, clothing1m, imagenet, tiny_imagenet, parquet)
}
BROKEN = {
    "missing": "a listed file is not there",
    "truncated": "a JPEG ends half-way",
    "label": "a label is out of range",
    "line": "a line does not parse",
    "empty": "a class has no training image",
    "cmyk": "a JPEG for print (no mistake: it is converted)",
    "16bit": "a grey image of 16 bits (no mistake: it is converted)",
}


def break_photos(kind: str, name: str, train: list[Photo], test: list[Photo]) -> None:
    """Put what is wrong with an image, or its label, into the first one of the split that has labels."""
    first = train[0]
    image = Image.open(io.BytesIO(first.data))
    if kind == "truncated":
        train[0] = replace(first, data=first.data[: len(first.data) // 2])
    elif kind == "cmyk":
        train[0] = replace(first, data=_encoded(image.convert("CMYK"), "JPEG"))
    elif kind == "16bit":
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        train[0] = replace(first, data=_encoded(Image.fromarray(grey), "PNG"))
    elif kind == "empty":
        train[:] = [photo for photo in train if photo.label != 0]
    elif kind == "label":
        if name == "imagenet":
            raise UsageError("--broken label does not fit imagenet, whose labels are its folders: use another kind")
        photos = test if name == "tiny_imagenet" else train
        photos[0] = replace(photos[0], label=BEYOND)


def break_files(kind: str, name: str, files: Files) -> None:
    """Put what is wrong with a list of files into it."""
    if kind not in ("missing", "line"):
        return
    if name not in LISTS:
        raise UsageError(f"--broken {kind} does not fit {name}, which has no list of files: use another kind")
    listed = files[LISTS[name]]
    assert listed is not None
    if kind == "line":
        files[LISTS[name]] = listed + b"half-a-line\n"
    else:
        path = listed.split()[0].decode()
        del files[f"val/images/{path}" if name == "tiny_imagenet" else path]


def photographs(source: Path | None, classes: int, each: int, size: int, seed: int) -> list[list[bytes]]:
    """Return ``each`` encoded JPEGs of every class, with sides from ¾ to 1¼ of ``size`` pixels."""
    rng = generator(seed, "miniature")
    drawn = _textures(classes, each, rng) if source is None else _from_parquet(source, classes, each)

    def enlarged(image: Image.Image) -> bytes:
        sides = rng.integers(size * 3 // 4, size * 5 // 4, 2, endpoint=True)
        return _encoded(image.resize((int(sides[0]), int(sides[1])), Image.Resampling.BICUBIC), "JPEG")

    return [[enlarged(image) for image in images] for images in drawn]


def _textures(classes: int, each: int, rng: np.random.Generator) -> Iterator[list[Image.Image]]:
    """Yield stripes: a class has its direction and its colour, an image its phase and its grain."""
    y, x = np.mgrid[:32, :32] / 32
    for c in range(classes):
        angle = np.pi * c / classes
        colour = 0.5 + 0.5 * np.cos(2 * np.pi * (c / classes + np.arange(3) / 3))
        images = []
        for _ in range(each):
            wave = np.sin(2 * np.pi * (4 * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
            pixels = 255 * (0.5 + 0.4 * wave[..., None] * colour) + rng.normal(0, 12, (32, 32, 3))
            images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        yield images


def _from_parquet(source: Path, classes: int, each: int) -> Iterator[list[Image.Image]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = source / "train.parquet"
    try:
        names = pq.read_schema(file).names
        label = "fine_label" if "fine_label" in names else "label"
        table = pq.read_table(file, columns=["img" if "img" in names else "image", label])
    except (OSError, pa.ArrowException) as error:
        raise UsageError(
            f"{file} cannot be read ({str(error).splitlines()[0]}): give --source CIFAR's folder"
        ) from None
    labels = table.column(1).to_numpy()
    for c in range(classes):
        rows = np.flatnonzero(labels == c)[:each]
        if len(rows) < each:
            raise UsageError(f"{file} has {len(rows)} images of class {c} where {each} are wanted: ask for fewer")
        encoded = (table.column(0)[int(row)].as_py()["bytes"] for row in rows)
        yield [Image.open(io.BytesIO(data)).convert("RGB") for data in encoded]


def _encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 90} if form == "JPEG" else {}))
    return buffer.getvalue()


def _wnid(c: int) -> str:
    return f"n{c + 1:08d}" if c != BEYOND else "n99999999"


def _pairs(paths: list[str], photos: list[Photo]) -> bytes:
    return _text(f"{path} {photo.label}" for path, photo in zip(paths, photos, strict=True))


def _text(lines: Any) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def write(folder: Path, files: Files) -> None:
    """Fill a folder beside ``folder``, then move it into place: whole or not at all."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder: give another one, or empty it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for path, data in files.items():
            place = temporary / path
            if data is None:
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def main(arguments: Sequence[str]) -> int:
    """Write the miniature; return the exit status."""
    kinds = ", ".join(f"{kind}: {what}" for kind, what in BROKEN.items())
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(LAYOUTS))
    parser.add_argument("folder", type=Path, help="where to; must not be there yet, or be empty")
    parser.add_argument("--source", type=Path, help="a folder with CIFAR's train.parquet (default: textures)")
    parser.add_argument("--broken", choices=sorted(BROKEN), help=kinds)
    parser.add_argument("--classes", type=int, help="how many (default 4; clothing1m always has 14)")
    parser.add_argument("--train", type=int, default=20, help="training images a class (default 20)")
    parser.add_argument("--test", type=int, default=18, help="clean images a class beside these (default 18)")
    parser.add_argument("--noise", type=float, default=0.3, help="share of wrong labels in noisy sets (default 0.3)")
    parser.add_argument("--size", type=int, default=96, help="mean side of an image in pixels (default 96)")
    parser.add_argument("--seed", type=int, default=0, help="of sizes, textures and noise (default 0)")

    def work() -> None:
        given = parser.parse_args(arguments)
        write(given.folder, miniature(given))

    return command(work)


def miniature(given: argparse.Namespace) -> Files:
    """Return the files that the arguments ask for."""
    classes = given.classes or (CLOTHING_CLASSES if given.name == "clothing1m" else 4)
    if given.name == "clothing1m" and classes != CLOTHING_CLASSES:
        raise UsageError(f"--classes {classes}: clothing1m always has {CLOTHING_CLASSES}; leave it out")
    for key, least in (("train", 1), ("test", 3), ("size", 16)):
        if getattr(given, key) < least:
            raise UsageError(f"--{key} {getattr(given, key)} is too small: give {least} or more")
    if not 2 <= classes <= 1000 or not 0 <= given.noise <= 1:
        raise UsageError(f"--classes {classes} --noise {given.noise}: give 2 to 1000 classes and a share from 0 to 1")
    each = given.train + given.test
    by_class = photographs(given.source, classes, each, given.size, given.seed)
    train = [Photo(by_class[c][k], c, c) for k in range(given.train) for c in range(classes)]
    test = [Photo(by_class[c][k], c, c) for k in range(given.train, each) for c in range(classes)]
    if given.name in ("webvision", "clothing1m"):
        shown = np.array([photo.shows for photo in train])
        labels = symmetric(shown, classes, given.noise, generator(given.seed, "label noise"))
        train = [replace(photo, label=int(label)) for photo, label in zip(train, labels, strict=True)]
    if given.broken:
        break_photos(given.broken, given.name, train, test)
    files = LAYOUTS[given.name](train, test, classes)
    if given.broken:
        break_files(given.broken, given.name, files)
    return files


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
