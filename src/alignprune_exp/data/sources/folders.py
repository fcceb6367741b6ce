"""Images sorted into folders, one a class: one's own, ILSVRC-12 and Tiny ImageNet."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignprune_exp.data.images import Cut, Files, Fit
from alignprune_exp.data.index import Found, Index, Listing, Read, Survey, show, surveyed
from alignprune_exp.data.source import OF_PHOTOGRAPHS, Source, existing
from alignprune_exp.errors import UsageError


def image_folder(name: str, *, root: str | Path | None, image_size: int | None) -> Source:
    """Images of one's own: ``train/CLASS/`` and ``test/CLASS/``, or ``val/CLASS/``, with folders below."""
    root = existing(name, root, "train/CLASS/*.png and test/CLASS/*.png (or .jpg, .jpeg, .webp, .bmp)")
    held_out = "test" if (root / "test").is_dir() else "val"
    if not (root / held_out).is_dir():
        raise UsageError(f"dataset.root={root} lacks the folder test (or val): put one folder per class there")

    def read(survey: Survey) -> tuple[list[str], dict[str, Listing]]:
        classes = survey.folders(root / "train")
        if len(classes) < 2:
            raise UsageError(
                f"{root / 'train'} has {len(classes)} class folders where training needs 2 or more: put the "
                "images of each class into a folder of its own there"
            )
        if unknown := sorted(set(survey.folders(root / held_out)) - set(classes)):
            raise UsageError(
                f"{root / held_out / unknown[0]} is a class that {root / 'train'} does not have: rename or "
                "delete that folder"
            )
        train = survey.by_folder(root, "train", classes, nested=True)
        return classes, {"train": train, "test": survey.by_folder(root, held_out, classes, nested=True, every=False)}

    def fingerprint(index: Index) -> str:
        digest = hashlib.sha256(json.dumps([index.classes, image_size]).encode())
        for listing in (index.splits["train"], index.splits["test"]):
            for path, size in zip(listing.paths, listing.sizes, strict=True):
                digest.update(path + f"\0{size}\n".encode())
        return digest.hexdigest()

    return surveyed(
        name,
        read,
        lambda split, listing: Files(root, listing.paths, Fit(image_size)),
        key=[root.resolve(), held_out],
        fingerprint=fingerprint,
        labels_clean=False,
    )


def imagenet(name: str, *, root: str | Path | None, classes: int, on_error: str, **cut: Any) -> Source:
    """ILSVRC-12: ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``; the first ``classes`` in order of their wnids."""
    root = existing(name, root, "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG")

    def read(survey: Survey) -> tuple[list[str], dict[str, Listing]]:
        wnids = _wnids(survey, root, classes)
        train = survey.by_folder(root, "train", wnids)
        if not survey.folders(root / "val"):
            raise UsageError(f"{root / 'val'} has no class folders: sort its images into val/<wnid>/")
        return wnids, {"train": train, "test": survey.by_folder(root, "val", wnids)}

    return _of_wnids(name, read, root, classes, on_error, cut)


def tiny_imagenet(name: str, *, root: str | Path | None, classes: int, on_error: str, **cut: Any) -> Source:
    """Tiny ImageNet (CS231n): ``train/<wnid>/images/``, ``val/images/`` and ``val/val_annotations.txt``."""
    root = existing(name, root, "train/<wnid>/images, val/images and val/val_annotations.txt")

    def read(survey: Survey) -> tuple[list[str], dict[str, Listing]]:
        wnids = _wnids(survey, root, classes)
        train = survey.by_folder(root, "train", wnids, "/images")
        file = root / "val" / "val_annotations.txt"
        test = survey.listing(_annotated(survey, root, file, wnids), file, [f"{wnid} in {file}" for wnid in wnids])
        return wnids, {"train": train, "test": test}

    return _of_wnids(name, read, root, classes, on_error, cut)


def _of_wnids(name: str, read: Read, root: Path, classes: int, on_error: str, cut: dict[str, Any]) -> Source:
    return surveyed(
        name,
        read,
        lambda split, listing: Files(root, listing.paths, Cut(**cut)),
        key=[root.resolve(), classes],
        on_error=on_error,
        labels_clean=True,
        **OF_PHOTOGRAPHS,
    )


def _annotated(survey: Survey, root: Path, file: Path, wnids: list[str]) -> Iterator[Found]:
    """Yield the images of a list of ``image<tab>wnid<tab>...``."""
    number_of = {os.fsencode(wnid): c for c, wnid in enumerate(wnids)}
    known = {os.fsencode(wnid) for wnid in survey.folders(root / "train")}
    for number, line in survey.lines(file):
        words = line.split()
        if len(words) < 2:
            survey.refuse(
                f"{file}, line {number}, is {show(line)} where an image and its wnid are wanted", "mend or delete it"
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
                yield path, size, number_of[words[1]]


def _wnids(survey: Survey, root: Path, classes: int) -> list[str]:
    """Return the names of the first class folders under ``train``."""
    wnids = survey.folders(root / "train")
    if len(wnids) < classes:
        raise UsageError(
            f"{root / 'train'} has {len(wnids)} class folders where dataset.classes={classes}: type "
            f"dataset.classes={len(wnids)}, or put the other classes there"
        )
    return wnids[:classes]
