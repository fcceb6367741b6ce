"""Services that mirror the record, each behind the face of a `Tracker`. None is imported before it is asked for."""

from __future__ import annotations

from .base import Mirror, Mirrored, Tracker
from .mlflow import MLflow
from .tensorboard import TensorBoard
from .trackio import Trackio
from .wandb import Wandb

__all__ = ["TRACKERS", "Mirror", "Mirrored", "Tracker"]

TRACKERS: dict[str, type[Tracker]] = {
    "none": Tracker,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "trackio": Trackio,
    "wandb": Wandb,
}
