"""Robust learners: what the loss of a step is made of. A pruner chooses which samples are seen, a learner what for.

Shape legend: B samples of a batch, C classes, N samples of the run, V augmented views of an image.
"""

from __future__ import annotations

from .base import Learner, Step
from .ce import CrossEntropy
from .dividemix import DivideMix
from .elr import ELR
from .posterior import Posterior
from .refurbish import Refurbish
from .sop import SOP

__all__ = ["LEARNERS", "Learner", "Step"]

LEARNERS: dict[str, type[Learner]] = {
    "ce": CrossEntropy,
    "elr": ELR,
    "sop": SOP,
    "refurbish": Refurbish,
    "posterior": Posterior,
    "dividemix": DivideMix,
}
