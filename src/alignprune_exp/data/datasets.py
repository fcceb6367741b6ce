"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alignprune_exp.data.source import Source
from alignprune_exp.data.sources.cifar import cifar
from alignprune_exp.data.sources.digits import digits
from alignprune_exp.data.sources.folders import image_folder, imagenet, tiny_imagenet
from alignprune_exp.data.sources.lists import clothing1m, webvision
from alignprune_exp.data.sources.parquet import parquet
from alignprune_exp.errors import UsageError

OF_A_RUN = ("subset", "test_subset", "flip", "crop")  # keys of a config's dataset that are no business of its files

DATASETS: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "image_folder": image_folder,
    "webvision": webvision,
    "clothing1m": clothing1m,
    "imagenet": imagenet,
    "tiny_imagenet": tiny_imagenet,
    "parquet": parquet,
}


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
    return DATASETS[name](name, **options)
