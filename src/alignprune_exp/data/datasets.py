"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from alignprune_exp.data.source import Source
from alignprune_exp.data.sources.cifar import Cifar10, Cifar100
from alignprune_exp.data.sources.digits import Digits
from alignprune_exp.data.sources.files import Clothing1M, ImageFolder, ImageNet, TinyImageNet, WebVision
from alignprune_exp.data.sources.parquet import Parquet
from alignprune_exp.errors import UsageError

OF_A_RUN = ("subset", "test_subset", "flip", "crop")  # keys of a config's dataset that are no business of its files
FOLDERS = ("root", "imagenet_root")


class DataSet(Protocol):
    """What a name stands for: made of the settings of the data set, and opened by `open`."""

    def open(self) -> Source:
        """Return the data set; raise UsageError for missing, incomplete or malformed files."""


DATASETS: dict[str, Callable[..., DataSet]] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "image_folder": ImageFolder,
    "webvision": WebVision,
    "clothing1m": Clothing1M,
    "imagenet": ImageNet,
    "tiny_imagenet": TinyImageNet,
    "parquet": Parquet,
}


def load(values: Mapping[str, Any]) -> Source:
    """Open a data set.

    Args:
        values: the ``dataset`` node of a config: its ``name``, one of ``DATASETS``, and that one's options. What
            concerns a single run (``OF_A_RUN``) is passed over.

    Raises UsageError for an unknown name, and as ``DataSet.open`` does.
    """
    if values["name"] not in DATASETS:
        raise UsageError(f"dataset.name={values['name']} is unknown; use one of {', '.join(DATASETS)}")
    options = {key: value for key, value in values.items() if key not in OF_A_RUN}
    options |= {key: Path(options[key]).expanduser() for key in FOLDERS if options.get(key) is not None}
    return DATASETS[values["name"]](**options).open()
