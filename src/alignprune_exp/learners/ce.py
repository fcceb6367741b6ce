"""Cross-entropy, the learner that adds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from .base import Forward, Learner, Step

if TYPE_CHECKING:
    from ..config import Config


class CrossEntropy(Learner):
    """Cross-entropy of the given label, smoothed by ``label_smoothing``."""

    def __init__(self, networks: Sequence[nn.Module], config: Config, n: int, classes: int) -> None:
        super().__init__(networks, config, n, classes)
        self.smoothing = config.label_smoothing

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = forward(step.images)
        log_p = F.log_softmax(logits, dim=1)
        plain = F.nll_loss(log_p, step.labels, reduction="none")
        smoothing = self.smoothing
        smoothed = (1 - smoothing) * plain - smoothing * log_p.mean(1) if smoothing else plain
        return plain, smoothed, logits.detach().argmax(1)
