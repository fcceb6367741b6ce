"""CIFAR-10 and CIFAR-100, in torchvision's files or in Parquet files of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignprune_exp.data.images import Array, Encoded
from alignprune_exp.data.source import Images, Source, brief, existing, hub_names
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


def cifar(name: str, root: Path | None, download: bool) -> Source:
    import torchvision

    official = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    holds = f"{official.base_folder} (dataset.download=true fetches it) or train.parquet and test.parquet"
    if root is not None and download:
        root.mkdir(parents=True, exist_ok=True)
    root = existing(name, root, holds)
    if root.name == official.base_folder:
        root = root.parent
    parquet = {split: _parquet_files(root, split, _CIFAR[name].folder) for split in ("train", "test")}
    if any((root / part).exists() for part in (official.base_folder, official.filename)):
        return _cifar_torchvision(name, root, download, official)
    if all(parquet.values()):
        return _cifar_parquet(name, parquet)
    if download:
        return _cifar_torchvision(name, root, download, official)
    missing = [f"{split}.parquet" for split, files in parquet.items() if not files]
    lacks = missing[0] if len(missing) == 1 else f"both {official.base_folder} and train.parquet, test.parquet"
    raise UsageError(
        f"dataset.root={root} lacks {lacks}: type dataset.download=true, or put the two Parquet files of the "
        f"Hugging Face hub there as train.parquet and test.parquet"
    )


def _cifar_torchvision(name: str, root: Path, download: bool, official: Any) -> Source:
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
        superclass=_superclass(train.labels, coarse, len(classes), folder),
        train=train,
        test=test,
        fingerprint=sha256(folder / file for file, _ in listed),
        official_order=True,
        asymmetric=_CIFAR[name].asymmetric,
        labels_clean=True,
    )


def _parquet_files(root: Path, split: str, folder: str) -> list[Path]:
    if (root / f"{split}.parquet").is_file():
        return [root / f"{split}.parquet"]
    for place in (root / folder, root / "data"):
        if files := sorted(place.glob(f"{split}-*.parquet")):
            return files
    return []


def _cifar_parquet(name: str, files: dict[str, list[Path]]) -> Source:
    train, classes, superclass = _parquet_split(name, files["train"])
    test, _, _ = _parquet_split(name, files["test"])
    return Source(
        name=name,
        classes=classes,
        superclass=superclass,
        train=train,
        test=test,
        fingerprint=sha256([*files["train"], *files["test"]]),
        official_order=False,
        asymmetric=_CIFAR[name].asymmetric,
        labels_clean=True,
    )


def _parquet_split(name: str, files: list[Path]) -> tuple[Images, tuple[str, ...], np.ndarray | None]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    facts = _CIFAR[name]
    tables = []
    for file in files:
        try:
            schema = pq.read_schema(file)
            image = "img" if "img" in schema.names else "image"
            wanted = [image, facts.label, *([facts.coarse] if facts.coarse else [])]
            if (
                not set(wanted) <= set(schema.names)
                or not pa.types.is_struct(schema.field(image).type)
                or schema.field(image).type.get_field_index("bytes") < 0
            ):
                raise UsageError(
                    f"{file} has the columns {', '.join(schema.names)} where dataset={name} wants "
                    f"{', '.join(['img (bytes, path)', *wanted[1:]])}: fetch the files of {name} from the "
                    "Hugging Face hub, or type dataset.download=true with another dataset.root"
                )
            tables.append(pq.read_table(file, columns=wanted))
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{file} cannot be read as Parquet ({brief(error)}): fetch that file again") from error
    table = pa.concat_tables(tables)
    origin = str(files[0]) if len(files) == 1 else f"{files[0].parent}/{files[0].name.split('-')[0]}-*.parquet"
    classes = hub_names(tables[0].schema, facts.label) or tuple(facts.classes.split())

    def labels(column: str, n_classes: int) -> np.ndarray:
        values = table.column(column).to_numpy()
        wrong = np.flatnonzero(~((values >= 0) & (values < n_classes)))
        if len(wrong):
            raise UsageError(
                f"row {wrong[0]} of {origin} has {column} {values[wrong[0]]} where {name} has 0 to "
                f"{n_classes - 1}: fetch that file again"
            )
        return values.astype(np.int64)

    fine = labels(facts.label, len(classes))
    coarse = labels(facts.coarse, 20) if facts.coarse else None
    encoded = pc.struct_field(table.column(image), "bytes")
    superclass = _superclass(fine, coarse, len(classes), origin)
    return Images(fine, Encoded(encoded, origin)), classes, superclass


def _superclass(fine: np.ndarray, coarse: np.ndarray | None, n_classes: int, origin: Path | str) -> np.ndarray | None:
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


def sha256(parts: Iterable[bytes | memoryview | Path]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        else:
            digest.update(part)
    return digest.hexdigest()
