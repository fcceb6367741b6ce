"""Photographs whose labels stand in lists: WebVision and Clothing-1M."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from alignprune_exp.data.images import Cut, Photographs
from alignprune_exp.data.index import Index, Listed, Listing, Survey, from_folders, show, surveyed
from alignprune_exp.data.source import Source, existing
from alignprune_exp.errors import UsageError

WEBVISION_CLASSES = 1000
CLOTHING_CLASSES = (
    "T-Shirt, Shirt, Knitwear, Chiffon, Sweater, Hoodie, Windbreaker, Jacket, Downcoat, Suit, Shawl, Dress, Vest, "
    "Underwear"
)


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
    return surveyed(
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
    listing = from_folders(survey, root, [f"val/{wnid}" for wnid in wanted])
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
                        f"{file}, line {number}, names {show(path)}, which has no label in {kind}_label_kv.txt",
                        "mend or delete it",
                    )
                elif (size := survey.size(root, path, file, number)) is not None:
                    listed.add(path, size, label)
            splits[split] = listed.listing()
            survey.nonempty(splits[split], classes, f"{{}} in {file}")
        return Index(splits, tuple(classes), tuple(survey.skipped))

    return surveyed(
        [name, root.resolve(), on_error],
        read,
        lambda split, listing: Photographs(root, listing.paths, Cut(**cut)),
        reference="reference",
        labels_clean=False,
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
