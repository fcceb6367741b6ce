"""Photographs whose labels stand in lists: WebVision and Clothing-1M."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignprune_exp.data.images import Cut, Files
from alignprune_exp.data.index import Found, Listing, Survey, show, surveyed
from alignprune_exp.data.source import OF_PHOTOGRAPHS, Source, existing
from alignprune_exp.errors import UsageError

WEBVISION_CLASSES = 1000
CLOTHING_CLASSES = (
    "T-Shirt, Shirt, Knitwear, Chiffon, Sweater, Hoodie, Windbreaker, Jacket, Downcoat, Suit, Shawl, Dress, Vest, "
    "Underwear"
)


def webvision(
    name: str,
    *,
    root: str | Path | None,
    imagenet_root: str | Path | None,
    classes: int,
    on_error: str,
    **cut: Any,
) -> Source:
    """WebVision 1.0 (Li et al., 2017), its Google part; ``classes=50`` is the usual "mini".

    Evaluated on its validation set, less what the reference set takes of it, and on ILSVRC-12's, whose classes are
    the same, where ``imagenet_root`` is given.
    """
    lists = {"train": "info/train_filelist_google.txt", "test": "info/val_filelist.txt"}
    root = existing(name, root, f"{lists['train']}, {lists['test']}, google/ and val_images_256/")
    roots = {"train": root, "test": root}
    if imagenet_root is not None:
        roots["imagenet"] = Path(imagenet_root).expanduser()

    def read(survey: Survey) -> tuple[list[str], dict[str, Listing]]:
        synsets = root / "info" / "synsets.txt"
        survey.stamp(synsets.parent)
        lines = [os.fsdecode(line) for _, line in survey.lines(synsets)] if synsets.is_file() else []
        names = [line.partition(" ")[2].split(",")[0] or line for line in lines[:classes]]
        names += [f"class {c}" for c in range(len(names), classes)]
        splits = {}
        for split, file in lists.items():
            listed = _listed(survey, root, root / file, b"" if split == "train" else b"val_images_256/", classes)
            splits[split] = survey.listing(listed, root / file, [f"class {c} in {root / file}" for c in range(classes)])
        if "imagenet" in roots:
            wnids = [line.split()[0] for line in lines]
            splits["imagenet"] = _imagenet(survey, roots["imagenet"], wnids, classes)
        return names, splits

    return surveyed(
        name,
        read,
        lambda split, listing: Files(roots[split], listing.paths, Cut(**cut)),
        key=[*(place.resolve() for place in roots.values()), classes],
        on_error=on_error,
        reference="test",
        labels_clean=False,
        **OF_PHOTOGRAPHS,
    )


def _listed(survey: Survey, root: Path, file: Path, folder: bytes, classes: int) -> Iterator[Found]:
    """Yield the images of a list of ``path label``, paths being relative to ``folder``, of the first classes."""
    for number, path, label in survey.labelled(file, WEBVISION_CLASSES):
        if label < classes:
            place = path if path.startswith(folder) else folder + path
            if (size := survey.size(root, place, file, number)) is not None:
                yield place, size, label


def _imagenet(survey: Survey, root: Path, wnids: list[str], classes: int) -> Listing:
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
    return survey.by_folder(root, "val", wanted)


def clothing1m(name: str, *, root: str | Path | None, on_error: str, **cut: Any) -> Source:
    """Clothing-1M (Xiao et al., CVPR 2015): trained on the noisy million, evaluated on its clean test set.

    The reference set is drawn from its clean training set.
    """
    root = existing(name, root, "noisy_label_kv.txt, clean_label_kv.txt, their key lists and images/")
    classes = CLOTHING_CLASSES.split(", ")

    def read(survey: Survey) -> tuple[list[str], dict[str, Listing]]:
        labels = {}
        for kind in ("noisy", "clean"):
            file = root / f"{kind}_label_kv.txt"
            labels[kind] = {path: label for _, path, label in survey.labelled(file, len(classes))}
        splits = {}
        for split, kind, stem in (
            ("train", "noisy", "noisy_train"),
            ("reference", "clean", "clean_train"),
            ("test", "clean", "clean_test"),
        ):
            file = root / f"{stem}_key_list.txt"
            keyed = _keyed(survey, root, file, f"{kind}_label_kv.txt", labels[kind])
            splits[split] = survey.listing(keyed, file, [f"{label} in {file}" for label in classes])
        return classes, splits

    return surveyed(
        name,
        read,
        lambda split, listing: Files(root, listing.paths, Cut(**cut)),
        key=[root.resolve()],
        on_error=on_error,
        reference="reference",
        labels_clean=False,
        **OF_PHOTOGRAPHS,
    )


def _keyed(survey: Survey, root: Path, file: Path, labels_file: str, labels: dict[bytes, int]) -> Iterator[Found]:
    """Yield the images of a list of paths whose ``labels`` stand in another."""
    for number, path in survey.lines(file):
        if (label := labels.get(path)) is None:
            survey.refuse(
                f"{file}, line {number}, names {show(path)}, which has no label in {labels_file}", "mend or delete it"
            )
        elif (size := survey.size(root, path, file, number)) is not None:
            yield path, size, label
