"""Robust learners: what the loss of a step is made of. A pruner chooses which samples are seen, a learner what for.

Shape legend: B samples of a batch, C classes, N samples of the run, V augmented views of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn

from .base import Learner, Step

if TYPE_CHECKING:
    from ..config import Config

__all__ = ["LEARNERS", "Learner", "Step", "build"]

LEARNERS = {"ce": "ce.CrossEntropy", "elr": "elr.ELR", "sop": "sop.SOP", "dividemix": "dividemix.DivideMix"}


def build(config: Config, network: Callable[[], nn.Module], n: int, classes: int) -> Learner:
    """Return the learner of a run on ``n`` samples; ``network`` makes a freshly initialised network."""
    module, _, name = LEARNERS[config.learner.name].partition(".")
    learner: type[Learner] = getattr(import_module(f".{module}", __name__), name)
    return learner([network() for _ in range(learner.count)], config, n, classes)
