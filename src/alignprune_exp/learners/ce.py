"""The learner that adds nothing: of classification, cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Forward, Given, Learner, Step


class CrossEntropy(Learner):
    """The task's own loss of what is given; of classification the cross-entropy, smoothed by ``label_smoothing``."""

    by_class = False
    smooths = True
    replays = True
    remembers = False

    def __init__(self, networks: Sequence[nn.Module], given: Given) -> None:
        super().__init__(networks, given)
        self.task, self.smoothing = given.task, given.smoothing

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.task.losses(forward(step.inputs), step.targets, self.smoothing)
