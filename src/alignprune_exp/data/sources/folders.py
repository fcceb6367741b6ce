"""Images sorted into folders, one a class: one's own, ILSVRC-12 and Tiny ImageNet."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from alignprune_exp.data.images import IMAGE_SUFFIXES, Cut, Files, Photographs
from alignprune_exp.data.index import Index, Listed, Survey, from_folders, show, surveyed
from alignprune_exp.data.source import Images, Source, existing
from alignprune_exp.errors import UsageError
from alignprune_exp.files import printable


def image_folder(name: str, root: Path | None, image_size: int | None) -> Source:
    root = existing(name, root, "train/CLASS/*.png and test/CLASS/*.png (or .jpg, .jpeg, .webp, .bmp)")
    held_out = "test" if (root / "test").is_dir() else "val"
    for split in ("train", held_out):
        if not (root / split).is_dir():
            expected = "train" if split == "train" else "test (or val)"
            raise UsageError(f"dataset.root={root} lacks the folder {expected}: put one folder per class there")
    classes = _folders(root / "train")
    if len(classes) < 2:
        raise UsageError(
            f"{root / 'train'} has {len(classes)} class folders where training needs 2 or more: put the "
            "images of each class into a folder of its own there"
        )
    if unknown := sorted(set(_folders(root / held_out)) - set(classes)):
        raise UsageError(
            f"{root / held_out / unknown[0]} is a class that {root / 'train'} does not have: rename or "
            "delete that folder"
        )
    content = hashlib.sha256(json.dumps([classes, image_size]).encode())

    def split_images(split: str) -> Images:
        paths, labels = [], []
        for number, label in enumerate(classes):
            found = _files(root / split / label)
            if not found and split == "train":
                raise UsageError(
                    f"{root / split / label} has no {', '.join(IMAGE_SUFFIXES)} file: add images or delete that folder"
                )
            for file in found:
                paths.append(os.fsencode(file.relative_to(root)))
                labels.append(number)
                content.update(paths[-1] + f"\0{file.stat().st_size}\n".encode())
        if not paths:
            raise UsageError(f"{root / split} has no image at all: put the images of each class into {split}/CLASS")
        listed = np.array(paths)
        return Images(np.array(labels, np.int64), Files(root, listed, image_size), listed)

    train, test = split_images("train"), split_images(held_out)
    return Source(
        name=name,
        classes=tuple(printable(name) for name in classes),
        superclass=None,
        train=train,
        test=test,
        fingerprint=content.hexdigest(),
        official_order=False,
        asymmetric=None,
        labels_clean=False,
    )


def _folders(parent: Path) -> list[str]:
    return sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def imagenet(name: str, *, root: Path | None, classes: int, on_error: str, **cut: Any) -> Source:
    """ILSVRC-12: ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``; the first ``classes`` in order of their wnids."""
    root = existing(name, root, "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")

    def read(survey: Survey) -> Index:
        wnids = _wnids(survey, root, classes)
        splits = {"train": from_folders(survey, root, [f"train/{wnid}" for wnid in wnids])}
        survey.nonempty(splits["train"], wnids, f"{root / 'train'}/{{}}")
        if not (there := survey.folders(root / "val")):
            raise UsageError(f"{root / 'val'} has no class folders: sort its images into val/<wnid>/")
        splits["test"] = from_folders(survey, root, [f"val/{wnid}" for wnid in wnids], set(there))
        survey.nonempty(splits["test"], wnids, f"{root / 'val'}/{{}}")
        return Index(splits, tuple(wnids), tuple(survey.skipped))

    key = [name, root.resolve(), classes, on_error]
    return surveyed(key, read, lambda split, listing: Photographs(root, listing.paths, Cut(**cut)), labels_clean=True)


def tiny_imagenet(name: str, *, root: Path | None, classes: int, on_error: str, **cut: Any) -> Source:
    """Tiny ImageNet (CS231n): ``train/<wnid>/images/``, ``val/images/`` and ``val/val_annotations.txt``."""
    root = existing(name, root, "train/<wnid>/images, val/images and val/val_annotations.txt")

    def read(survey: Survey) -> Index:
        wnids = _wnids(survey, root, classes)
        number_of = {wnid.encode(): c for c, wnid in enumerate(wnids)}
        known = {wnid.encode() for wnid in survey.folders(root / "train")}
        splits = {"train": from_folders(survey, root, [f"train/{wnid}/images" for wnid in wnids])}
        survey.nonempty(splits["train"], wnids, f"{root / 'train'}/{{}}/images")
        file, listed = root / "val" / "val_annotations.txt", Listed()
        for number, line in survey.lines(file):
            words = line.split()
            if len(words) < 2:
                survey.refuse(
                    f"{file}, line {number}, is {show(line)} where an image and its wnid are wanted",
                    "mend or delete it",
                )
            elif words[1] not in known:
                survey.refuse(
                    f"{file}, line {number}, gives {show(words[0])} the label {show(words[1])}, which has no folder "
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
    return surveyed(key, read, lambda split, listing: Photographs(root, listing.paths, Cut(**cut)), labels_clean=True)


def _wnids(survey: Survey, root: Path, classes: int) -> list[str]:
    """Return the names of the first class folders under ``train``."""
    wnids = survey.folders(root / "train")
    if len(wnids) < classes:
        raise UsageError(
            f"{root / 'train'} has {len(wnids)} class folders where dataset.classes={classes}: type "
            f"dataset.classes={len(wnids)}, or put the other classes there"
        )
    return wnids[:classes]
