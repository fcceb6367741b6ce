"""Images in files of their own, whose labels are the folders that they lie in, or stand in lists."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from ...errors import UsageError
from ...files import typed_path
from ...schema import Side
from ..images import Files, Fit
from ..index import Index, Splits, Survey, show
from ..layout import Layout, Photographs
from ..source import Crop, Root

WEBVISION_CLASSES = 1000
CLOTHING_CLASSES = (
    "T-Shirt, Shirt, Knitwear, Chiffon, Sweater, Hoodie, Windbreaker, Jacket, Downcoat, Suit, Shawl, Dress, Vest, "
    "Underwear"
)


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Layout):
    """Images of one's own, in folders and folders in these; ``test`` may be ``val``."""

    image_size: Side | None
    crop: Crop = 0
    holds = "train/CLASS/*.png and test/CLASS/*.png (or .jpg, .jpeg, .webp, .bmp)"

    @property
    def cut(self) -> Fit:
        return Fit(self.image_size)

    def read(self, survey: Survey) -> tuple[list[str], Splits]:
        there = survey.folders("")
        held_out = next((name for name in ("test", "val") if name in there), "")
        if lacking := [what for what, name in (("train", "train"), ("test (or val)", held_out)) if name not in there]:
            folders = f"folder {lacking[0]}" if len(lacking) == 1 else f"folders {' and '.join(lacking)}"
            raise UsageError(f"dataset.root={self.root} lacks the {folders}: put one folder per class there")
        train, classes = self.folder / "train", survey.folders("train")
        if not classes:
            raise UsageError(
                f"{train} has no class folders: put the images of each class into a folder of its own there"
            )
        if unknown := sorted(set(survey.folders(held_out)) - set(classes)):
            raise UsageError(
                f"{self.folder / held_out / unknown[0]} is a class that {train} does not have: rename or delete that "
                "folder"
            )
        images = survey.by_folder("train", classes, nested=True)
        return classes, {"train": images, "test": survey.by_folder(held_out, classes, nested=True, every=False)}

    def fingerprint(self, index: Index) -> str:
        digest = hashlib.sha256(json.dumps([index.classes, self.image_size]).encode())
        for split in ("train", "test"):
            for path, size, _ in index.splits[split].tolist():
                digest.update(path + f"\0{size}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ImageNet(Photographs):
    """ILSVRC-12; the first ``classes`` in the order of their wnids."""

    classes: Annotated[int, Field(ge=2, le=100_000)]
    holds = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
    labels_clean = True

    def read(self, survey: Survey) -> tuple[list[str], Splits]:
        wnids = self._wnids(survey)
        train = survey.by_folder("train", wnids)
        if not survey.folders("val"):
            raise UsageError(f"{self.folder / 'val'} has no class folders: sort its images into val/<wnid>/")
        return wnids, {"train": train, "test": survey.by_folder("val", wnids)}

    def _wnids(self, survey: Survey) -> list[str]:
        wnids = survey.folders("train")
        if len(wnids) < self.classes:
            raise UsageError(
                f"{self.folder / 'train'} has {len(wnids)} class folders where dataset.classes={self.classes}: type "
                f"dataset.classes={len(wnids)}, or put the other classes there"
            )
        return wnids[: self.classes]


@dataclass(frozen=True, kw_only=True)
class TinyImageNet(ImageNet):
    """Tiny ImageNet (CS231n)."""

    holds = "train/<wnid>/images, val/images and val/val_annotations.txt"

    def read(self, survey: Survey) -> tuple[list[str], Splits]:
        wnids, file = self._wnids(survey), self.folder / "val" / "val_annotations.txt"
        train = survey.by_folder("train", wnids, "/images")
        return wnids, {"train": train, "test": survey.by_list(file, self._annotated(survey, file, wnids), wnids)}

    def _annotated(self, survey: Survey, file: Path, wnids: list[str]) -> Iterator[tuple[int, bytes, int]]:
        """Yield the number, the path and the label of every line ``image wnid ...``."""
        number_of = {os.fsencode(wnid): c for c, wnid in enumerate(wnids)}
        known = {os.fsencode(wnid) for wnid in survey.folders("train")}
        for number, line in survey.lines(file):
            image, wnid, *_ = [*line.split(), b"", b""]
            if not wnid:
                survey.wrong(file, number, f"is {show(line)} where an image and its wnid are wanted")
            elif wnid not in known:
                what = f"gives {show(image)} the label {show(wnid)}, which has no folder in {self.folder / 'train'}"
                survey.wrong(file, number, what)
            elif wnid in number_of:
                yield number, b"val/images/" + image, number_of[wnid]


@dataclass(frozen=True, kw_only=True)
class WebVision(Photographs):
    """WebVision 1.0 (Li et al., 2017), its Google part; ``classes=50`` is the usual "mini".

    Evaluated on its validation set, less what the reference set takes of it, and on ILSVRC-12's, whose classes are
    the same, where ``imagenet_root`` is given.
    """

    classes: Annotated[int, Field(ge=2, le=WEBVISION_CLASSES)]
    imagenet_root: Root
    holds = "info/train_filelist_google.txt, info/val_filelist.txt, google/ and val_images_256/"
    reference = "test"

    def read(self, survey: Survey) -> tuple[list[str], Splits]:
        info = self.folder / "info"
        survey.stamp(info)
        synsets = info / "synsets.txt"
        lines = [os.fsdecode(line) for _, line in survey.lines(synsets)] if synsets.is_file() else []
        names = [line.partition(" ")[2].split(",")[0] or line for line in lines[: self.classes]]
        names += [f"class {c}" for c in range(len(names), self.classes)]
        splits = {
            "train": self._listed(survey, info / "train_filelist_google.txt", b""),
            "test": self._listed(survey, info / "val_filelist.txt", b"val_images_256/"),
        }
        if self.imagenet_root is not None:
            wnids = [line.split()[0] for line in lines]
            splits["imagenet"] = self._imagenet(replace(survey, root=self.places["imagenet_root"]), wnids)
        return names, splits

    @property
    def places(self) -> dict[str, Path]:
        if self.imagenet_root is None:
            return super().places
        return super().places | {"imagenet_root": Path(os.path.realpath(typed_path(self.imagenet_root)))}

    def _listed(self, survey: Survey, file: Path, folder: bytes) -> np.ndarray:
        """Return the images of a list of ``path label``, paths being relative to ``folder``, of the first classes."""
        named = (
            (number, path if path.startswith(folder) else folder + path, label)
            for number, path, label in survey.labelled(file, WEBVISION_CLASSES)
            if label < self.classes
        )
        return survey.by_list(file, named, [f"class {c}" for c in range(self.classes)])

    def _imagenet(self, survey: Survey, wnids: list[str]) -> np.ndarray:
        """Return ILSVRC-12's validation images of the first classes, which are numbered by sorted synset."""
        val = survey.root / "val"
        if not val.is_dir():
            raise UsageError(
                f"dataset.imagenet_root={survey.root} has no folder val: type the folder that has val/<wnid>/*.JPEG"
            )
        there = survey.folders("val")
        if not wnids and len(there) not in (self.classes, WEBVISION_CLASSES):
            raise UsageError(
                f"{val} has {len(there)} class folders where {self.classes} or {WEBVISION_CLASSES} are wanted: put "
                "WebVision's synsets.txt into info/, which says which folder is which class"
            )
        wanted = (wnids or there)[: self.classes]
        if missing := sorted(set(wanted) - set(there)):
            raise UsageError(f"{val / missing[0]} is not there: put the images of that class into it")
        return survey.by_folder("val", wanted)

    def store(self, split: str, paths: np.ndarray) -> Files:
        return Files(self.places["imagenet_root" if split == "imagenet" else "root"], paths, self.cut)


@dataclass(frozen=True, kw_only=True)
class Clothing1M(Photographs):
    """Clothing-1M (Xiao et al., CVPR 2015): trained on the noisy million, evaluated on its clean test set.

    The reference set is drawn from its clean training set.
    """

    holds = "noisy_label_kv.txt, clean_label_kv.txt, their key lists and images/"
    reference = "reference"

    def read(self, survey: Survey) -> tuple[list[str], Splits]:
        classes, splits = CLOTHING_CLASSES.split(", "), {}
        for kind, parts in (("noisy", {"train": "train"}), ("clean", {"reference": "train", "test": "test"})):
            labels = self.folder / f"{kind}_label_kv.txt"
            label_of = _labels(survey, labels, len(classes))
            for split, part in parts.items():
                file = self.folder / f"{kind}_{part}_key_list.txt"
                splits[split] = survey.by_list(file, _keyed(survey, file, labels, label_of), classes)
        return classes, splits


def _labels(survey: Survey, file: Path, labels: int) -> dict[bytes, int]:
    """Return the label of every path of a list, which may say it again, but not say another."""
    found: dict[bytes, tuple[int, int]] = {}
    for number, path, label in survey.labelled(file, labels):
        first, given = found.setdefault(path, (number, label))
        if label != given:
            survey.wrong(file, number, f"gives {show(path)} the label {label}, and line {first} the label {given}")
    return {path: label for path, (_, label) in found.items()}


def _keyed(survey: Survey, file: Path, labels: Path, label_of: dict[bytes, int]) -> Iterator[tuple[int, bytes, int]]:
    """Yield the number, the path and the label of every line of a list of paths whose ``labels`` stand in another."""
    for number, path in survey.lines(file):
        if path in label_of:
            yield number, path, label_of[path]
        else:
            survey.wrong(file, number, f"names {show(path)}, which has no label in {labels.name}")
