"""CIFAR-10 and CIFAR-100, in torchvision's files or in Parquet files of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignprune_exp.data.images import Array, Fit, Shards
from alignprune_exp.data.index import Listing, Survey
from alignprune_exp.data.source import Images, Source, brief, existing
from alignprune_exp.data.sources.parquet import Tables, column_names, shards_of
from alignprune_exp.errors import UsageError

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


@dataclass(frozen=True)
class _Cifar:
    classes: str  # alphabetical, as both are published
    label: str  # its column in the Parquet files of the Hugging Face hub
    coarse: str | None
    folder: str  # of its files in a snapshot of the hub
    asymmetric: dict[int, int] | None


_CIFAR = {
    "cifar10": _Cifar(CIFAR10_CLASSES, "label", None, "plain_text", CIFAR10_ASYMMETRIC),
    "cifar100": _Cifar(CIFAR100_CLASSES, "fine_label", "coarse_label", "cifar100", None),
}


def cifar(name: str, *, root: str | Path | None, download: bool) -> Source:
    import torchvision

    official = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    if root is not None and download:
        with suppress(OSError):
            Path(root).expanduser().mkdir(parents=True, exist_ok=True)
    holds = f"{official.base_folder} (dataset.download=true fetches it) or train.parquet and test.parquet"
    root = existing(name, root, holds)
    if root.name == official.base_folder:
        root = root.parent
    shards = {split: shards_of(root, split, _CIFAR[name].folder, "data") for split in ("train", "test")}
    if any((root / part).exists() for part in (official.base_folder, official.filename)):
        return _from_torchvision(name, root, download, official)
    if all(shards.values()):
        return _from_parquet(name, root, shards)
    if download:
        return _from_torchvision(name, root, download, official)
    missing = [f"{split}.parquet" for split, files in shards.items() if not files]
    lacks = missing[0] if len(missing) == 1 else f"both {official.base_folder} and train.parquet, test.parquet"
    raise UsageError(
        f"dataset.root={root} lacks {lacks}: type dataset.download=true, or put the two Parquet files of the "
        f"Hugging Face hub there as train.parquet and test.parquet"
    )


def _from_torchvision(name: str, root: Path, download: bool, official: Any) -> Source:
    from torchvision.datasets.utils import check_integrity, extract_archive

    folder = root / official.base_folder
    archive = root / official.filename
    listed = [*official.train_list, *official.test_list, (official.meta["filename"], official.meta["md5"])]

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

    train, coarse = split(official.train_list)
    test, _ = split(official.test_list)
    classes = tuple(opened(official.meta["filename"])[official.meta["key"]])
    return Source(
        name=name,
        classes=classes,
        train=train,
        test=test,
        fingerprint=_sha256(folder / file for file, _ in listed),
        labels_clean=True,
        superclass=None if coarse is None else _superclass(train.labels, coarse, len(classes), folder),
        official_order=True,
        asymmetric=_CIFAR[name].asymmetric,
    )


def _from_parquet(name: str, root: Path, shards: dict[str, list[str]]) -> Source:
    train, classes, superclass = _parquet_split(name, root, shards["train"])
    return Source(
        name=name,
        classes=classes,
        train=train,
        test=_parquet_split(name, root, shards["test"])[0],
        fingerprint=_sha256(root / shard for files in shards.values() for shard in files),
        labels_clean=True,
        superclass=superclass,
        asymmetric=_CIFAR[name].asymmetric,
    )


def _parquet_split(name: str, root: Path, shards: list[str]) -> tuple[Images, tuple[str, ...], np.ndarray | None]:
    facts, survey = _CIFAR[name], Survey(None)
    image = "img" if "img" in column_names(root / shards[0]) else "image"
    numbers = [facts.label, *([facts.coarse] if facts.coarse else [])]
    for shard in shards:
        names = column_names(root / shard)
        if not {image, *numbers} <= set(names):
            raise UsageError(
                f"{root / shard} has the columns {', '.join(names)} where dataset={name} wants "
                f"{', '.join(['img (bytes, path)', *numbers])}: fetch the files of {name} from the "
                "Hugging Face hub, or type dataset.download=true with another dataset.root"
            )
    tables = Tables(root, shards, image, numbers)
    classes = tuple(tables.hub_names(shards[0], facts.label) or facts.classes.split())
    fine = survey.listing(tables.found(survey, shards, facts.label, classes), root / shards[0], ())
    superclass = None
    if facts.coarse:
        coarse = Listing.of(tables.found(survey, shards, facts.coarse, _COARSE))
        superclass = _superclass(fine.labels, coarse.labels, len(classes), root / shards[0])
    store = Shards(root, fine.paths, Fit(), tables.images(shards))
    return Images(fine.labels, store, remedy="fetch that file again"), classes, superclass


def _superclass(fine: np.ndarray, coarse: np.ndarray, n_classes: int, origin: Path) -> np.ndarray:
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
