"""Data sets by name."""

from __future__ import annotations

from .source import DataSet
from .sources.cifar import Cifar10, Cifar100
from .sources.digits import Digits
from .sources.files import Clothing1M, ImageFolder, ImageNet, TinyImageNet, WebVision
from .sources.parquet import Parquet

# What is for one task alone stands in the task's file.
DATASETS: dict[str, type[DataSet] | str] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "image_folder": ImageFolder,
    "webvision": WebVision,
    "clothing1m": Clothing1M,
    "imagenet": ImageNet,
    "tiny_imagenet": TinyImageNet,
    "parquet": Parquet,
    "python_docs": "tasks.language.PythonDocs",
    "text": "tasks.language.TextFiles",
    "digit_scenes": "tasks.segmentation.DigitScenes",
    "voc": "tasks.segmentation.Voc",
    "pets": "tasks.segmentation.Pets",
    "ade20k": "tasks.segmentation.Ade20k",
    "digit_boxes": "tasks.detection.DigitBoxes",
    "coco": "tasks.detection.Coco",
    "voc_boxes": "tasks.detection.VocBoxes",
    "diabetes": "tasks.regression.Diabetes",
    "table": "tasks.regression.ParquetTable",
}
