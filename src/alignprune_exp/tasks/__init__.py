"""Tasks: what a sample, its loss and a metric are."""

from __future__ import annotations

from ..records import Metric
from .base import Task
from .classification import Classification

__all__ = ["TASKS", "Metric", "Task"]

# Each is imported once it is named, so that none needs what another one needs.
TASKS: dict[str, type[Task] | str] = {
    "classification": Classification,
    "language": "tasks.language.Language",
    "segmentation": "tasks.segmentation.Segmentation",
    "detection": "tasks.detection.Detection",
    "regression": "tasks.regression.Regression",
}
