"""Data sets as they are shipped: labels, and a way to decode the images of any rows."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from alignprune_exp.data.photographs import clothing1m, imagenet, parquet, tiny_imagenet, webvision
from alignprune_exp.data.source import (
    IMAGE_SUFFIXES,
    Images,
    Source,
    brief,
    decode,
    existing,
    hub_names,
    rgb,
    stratified,
)
from alignprune_exp.errors import UsageError
from alignprune_exp.files import printable
from alignprune_exp.pruning.seeding import generator

OF_A_RUN = ("subset", "test_subset", "flip", "crop")  # keys of a config's dataset that are no business of its files
FOLDERS = ("root", "imagenet_root")

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


def load(values: Mapping[str, Any]) -> Source:
    """Open a data set.

    Args:
        values: the ``dataset`` node of a config: its ``name``, one of ``DATASETS``, and that one's options. What
            concerns a single run (``OF_A_RUN``) is passed over.

    Raises UsageError for an unknown name, and for missing, incomplete or malformed files.
    """
    options = {key: value for key, value in values.items() if key not in OF_A_RUN}
    name = options.pop("name")
    if name not in DATASETS:
        raise UsageError(f"dataset.name={name} is unknown; use one of {', '.join(DATASETS)}")
    for key in FOLDERS:
        if options.get(key) is not None:
            options[key] = Path(options[key]).expanduser()
    return DATASETS[name](name, **options)


@dataclass(frozen=True)
class _Array:
    images: np.ndarray  # uint8 (n, C, H, W)

    def read(self, row: int) -> np.ndarray:
        return self.images[row]


@dataclass(frozen=True)
class _Encoded:
    """Encoded images in the column of a Parquet file, kept encoded in memory."""

    column: Any  # pyarrow.ChunkedArray of binary
    origin: str

    def read(self, row: int) -> np.ndarray:
        encoded = io.BytesIO(self.column[row].as_py() or b"")
        return decode(encoded, f"row {row} of {self.origin}", "fetch that file again", rgb)


@dataclass(frozen=True)
class _Files:
    root: Path
    paths: np.ndarray  # encoded, relative to it, S (n,)
    image_size: int | None

    def read(self, row: int) -> np.ndarray:
        path = self.root / os.fsdecode(self.paths[row])
        return decode(path, f"{path} (row {row})", "replace or delete that file", self._fitted)

    def _fitted(self, image: Image.Image) -> Image.Image:
        if self.image_size is None:
            return rgb(image)
        return ImageOps.fit(rgb(image), (self.image_size, self.image_size), Image.Resampling.BILINEAR)


def _sha256(parts: Iterable[bytes | memoryview | Path]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        else:
            digest.update(part)
    return digest.hexdigest()


def _digits(name: str) -> Source:
    # The file of sklearn.datasets.load_digits, without the seconds that importing scikit-learn takes.
    (sklearn,) = importlib.util.find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr, misc]
    rows = np.loadtxt(Path(sklearn) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
    test = stratified(labels, round(0.2 * len(labels)), generator(0, "digits test split"))
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Source(
        name=name,
        classes=tuple(str(digit) for digit in range(10)),
        superclass=None,
        train=Images(labels[train], _Array(images[train])),
        test=Images(labels[test], _Array(images[test])),
        fingerprint=_sha256([images.tobytes(), labels.tobytes(), test.tobytes()]),
        official_order=False,
        asymmetric=None,
        labels_clean=True,
    )


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


def _cifar(name: str, root: Path | None, download: bool) -> Source:
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
        return Images(labels, _Array(images)), coarse

    train, coarse = split(official.train_list)
    test, _ = split(official.test_list)
    classes = tuple(opened(official.meta["filename"])[official.meta["key"]])
    return Source(
        name=name,
        classes=classes,
        superclass=_superclass(train.labels, coarse, len(classes), folder),
        train=train,
        test=test,
        fingerprint=_sha256(folder / file for file, _ in listed),
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
        fingerprint=_sha256([*files["train"], *files["test"]]),
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
    return Images(fine, _Encoded(encoded, origin)), classes, superclass


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


def _image_folder(name: str, root: Path | None, image_size: int | None) -> Source:
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
        return Images(np.array(labels, np.int64), _Files(root, listed, image_size), listed)

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


DATASETS: dict[str, Callable[..., Source]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "image_folder": _image_folder,
    "webvision": webvision,
    "clothing1m": clothing1m,
    "imagenet": imagenet,
    "tiny_imagenet": tiny_imagenet,
    "parquet": parquet,
}
