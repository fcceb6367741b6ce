"""Tasks: what a sample, its loss and a metric are."""

from __future__ import annotations

from ..records import Metric
from .base import Task
from .classification import Classification

__all__ = ["TASKS", "Metric", "Task"]

TASKS: dict[str, type[Task]] = {"classification": Classification}
