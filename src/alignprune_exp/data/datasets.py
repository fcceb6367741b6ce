"""Data sets by name."""

from __future__ import annotations

from alignprune_exp.data.source import DataSet
from alignprune_exp.data.sources.cifar import Cifar10, Cifar100
from alignprune_exp.data.sources.digits import Digits
from alignprune_exp.data.sources.files import Clothing1M, ImageFolder, ImageNet, TinyImageNet, WebVision
from alignprune_exp.data.sources.parquet import Parquet

DATASETS: dict[str, type[DataSet]] = {
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
