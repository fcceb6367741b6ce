"""CIFAR-10 and CIFAR-100, in torchvision's files or in Parquet files of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from ...errors import UsageError
from ...files import typed_path
from ...schema import Aside
from ..images import Array, Fit, Shards
from ..index import Survey, gathered
from ..source import Crop, DataSet, Images, Root, Source, brief, existing
from .parquet import Tables, in_memory, shards_of

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
_COARSE = tuple(str(c) for c in range(20))  # superclasses of CIFAR-100
# truck → automobile, bird → airplane, cat ↔ dog, deer → horse (Patrini et al., CVPR 2017)
CIFAR10_ASYMMETRIC = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


@dataclass(frozen=True, kw_only=True)
class Cifar10(DataSet):
    """CIFAR-10 (Krizhevsky, 2009), in whichever of the two forms lies in ``root``."""

    name: str
    root: Root
    download: Annotated[bool, Aside()]
    crop: Crop = 0

    official: ClassVar[str] = "CIFAR10"  # of torchvision
    folder: ClassVar[str] = "plain_text"  # of a snapshot of the hub
    classes: ClassVar[str] = CIFAR10_CLASSES  # alphabetical, as both are published
    label: ClassVar[str] = "label"  # a column
    coarse: ClassVar[str | None] = None  # likewise
    asymmetric: ClassVar[dict[int, int] | None] = CIFAR10_ASYMMETRIC

    def open(self) -> Source:
        import torchvision

        official = getattr(torchvision.datasets, self.official)
        if self.root is not None and self.download:
            with suppress(OSError):
                typed_path(self.root).mkdir(parents=True, exist_ok=True)
        holds = f"{official.base_folder} (dataset.download=true fetches it) or train.parquet and test.parquet"
        root = existing(self.name, self.root, holds)
        if root.name == official.base_folder:
            root = root.parent
        if any((root / part).exists() for part in (official.base_folder, official.filename)):
            return self._from_torchvision(root, official)
        shards = {split: shards_of(root, split, self.folder, "data") for split in ("train", "test")}
        missing = [f"{split}.parquet" for split, found in shards.items() if not found]
        if missing and self.download:
            return self._from_torchvision(root, official)
        if not missing:
            return self._from_parquet(root, shards)
        lacks = missing[0] if len(missing) == 1 else f"both {official.base_folder} and train.parquet, test.parquet"
        raise UsageError(
            f"dataset.root={root} lacks {lacks}: type dataset.download=true, or put the two Parquet files of the "
            f"Hugging Face hub there as train.parquet and test.parquet"
        )

    def _from_torchvision(self, root: Path, official: Any) -> Source:
        listed = [*official.train_list, *official.test_list, (official.meta["filename"], official.meta["md5"])]
        folder = _intact(root, official, listed, self.download)

        def opened(file: str) -> dict[str, Any]:
            # A pickle runs whatever it says; these bytes are the published ones, their checksums were compared.
            with (folder / file).open("rb") as stream:
                return pickle.load(stream, encoding="latin1")

        def split(files: list[list[str]]) -> tuple[Images, np.ndarray | None]:
            batches = [opened(file) for file, _ in files]
            key = "labels" if "labels" in batches[0] else "fine_labels"
            labels = np.concatenate([np.asarray(batch[key], np.int64) for batch in batches])
            images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
            coarse = np.asarray(batches[0]["coarse_labels"], np.int64) if key == "fine_labels" else None
            return Images(labels, Array(images)), coarse

        (train, coarse), (test, _) = split(official.train_list), split(official.test_list)
        classes = tuple(opened(official.meta["filename"])[official.meta["key"]])
        return Source(
            name=self.name,
            classes=classes,
            train=train,
            test=test,
            fingerprint=_sha256(folder / file for file, _ in listed),
            labels_clean=True,
            superclass=_superclass(train.labels, coarse, len(classes), folder),
            official_order=True,
            asymmetric=self.asymmetric,
        )

    def _from_parquet(self, root: Path, shards: dict[str, list[str]]) -> Source:
        fetch = f"fetch the files of {self.name} from the Hugging Face hub, or type dataset.download=true with another"
        numbers = [self.label, *([self.coarse] if self.coarse else [])]
        tables = in_memory(root, shards, ["img", "image"], numbers, f"{fetch} dataset.root")
        classes = tuple(tables["train"].hub_names(self.label) or self.classes.split())
        train, superclass = self._split(tables["train"], classes)
        return Source(
            name=self.name,
            classes=classes,
            train=train,
            test=self._split(tables["test"], classes)[0],
            fingerprint=_sha256(root / file for file in (*shards["train"], *shards["test"])),
            labels_clean=True,
            superclass=superclass,
            asymmetric=self.asymmetric,
        )

    def _split(self, tables: Tables, classes: tuple[str, ...]) -> tuple[Images, np.ndarray | None]:
        survey = Survey(tables.root, None)
        fine = survey.listed(tables.found(survey, self.label, classes), tables.where, ())
        coarse = gathered(tables.found(survey, self.coarse, _COARSE))["label"] if self.coarse else None
        store = Shards(tables.root, fine["path"].copy(), Fit(), tables.images)
        images = Images(fine["label"].copy(), store, remedy="fetch that file again")
        return images, _superclass(fine["label"], coarse, len(classes), tables.where)


@dataclass(frozen=True, kw_only=True)
class Cifar100(Cifar10):
    """CIFAR-100, with its 20 superclasses."""

    official = "CIFAR100"
    folder = "cifar100"
    classes = CIFAR100_CLASSES
    label = "fine_label"
    coarse = "coarse_label"
    asymmetric = None


def _intact(root: Path, official: Any, listed: list[tuple[str, str]], download: bool) -> Path:
    """Return the folder of torchvision's files, once they are unpacked or fetched and their checksums fit."""
    from torchvision.datasets.utils import check_integrity, extract_archive

    folder, archive = root / official.base_folder, root / official.filename

    def broken() -> list[str]:
        return [file for file, md5 in listed if not check_integrity(str(folder / file), md5)]

    try:
        if broken() and check_integrity(str(archive), official.tgz_md5):
            extract_archive(str(archive), str(root))
        if broken() and download:
            official(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{official.url} could not be fetched and unpacked into {root} ({brief(error)}): put "
            f"{official.filename} there by hand, or train.parquet and test.parquet"
        ) from error
    if wrong := broken():
        raise UsageError(
            f"{folder} lacks an intact {', '.join(wrong)}: type dataset.download=true, or set dataset.root "
            "to a folder with train.parquet and test.parquet"
        )
    return folder


def _superclass(fine: np.ndarray, coarse: np.ndarray | None, n_classes: int, origin: Path | str) -> np.ndarray | None:
    """Return the superclass of each class, int64 (C,), -1 where unknown, out of those of the images."""
    if coarse is None:
        return None
    superclass = np.full(n_classes, -1, np.int64)
    superclass[fine] = coarse
    wrong = np.flatnonzero(superclass[fine] != coarse)
    if len(wrong):
        raise UsageError(
            f"row {wrong[0]} of {origin} has superclass {coarse[wrong[0]]} where other rows of class "
            f"{fine[wrong[0]]} have {superclass[fine[wrong[0]]]}: fetch that file again"
        )
    return superclass


def _sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
