"""Early-learning regularisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..schema import Weight
from .base import Forward, Given, Learner, Step


class ELR(Learner):
    """Early-learning regularisation (Liu et al., NeurIPS 2020, section 4).

    A running average t of each sample's predictions p, moved whenever the sample is trained on, holds on to what was
    learned early: the loss is CE + λ·log(1 − ⟨p, t⟩). As in the authors' code, p is clamped to [1e-4, 1 − 1e-4] and,
    where it enters t, normalised again; the t of the loss includes the p of the step.

    On CIFAR they train by SGD at 0.02, weight decay 1e-3, plain momentum: CIFAR-10 for 150 epochs, in a cosine that
    restarts every 10, or with asymmetric noise for 120, at a hundredth of the rate each from 40 and 80 on; CIFAR-100
    for 150, so from 80 and 120 on. Ours is the optimiser of the run, by its scale or data set, in one cycle.
    """

    replays = True

    def __init__(
        self,
        networks: Sequence[nn.Module],
        given: Given,
        *,
        beta: Annotated[float, Field(ge=0, lt=1)],
        coefficient: Weight,
    ) -> None:
        super().__init__(networks, given)
        self.beta, self.coefficient = beta, coefficient
        self.target_NC: Tensor
        self.register_buffer("target_NC", torch.zeros(given.n, given.classes))

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = forward(step.inputs)
        plain = F.cross_entropy(logits, step.targets, reduction="none")
        p_BC = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        q_BC = p_BC.detach() / p_BC.detach().sum(1, keepdim=True)
        t_BC = self.beta * self.target_NC.index_select(0, step.index) + (1 - self.beta) * q_BC
        self.target_NC.index_copy_(0, step.index, t_BC)
        agreement = (p_BC * t_BC).sum(1)
        return plain, plain + self.coefficient * (1 - agreement).log(), logits.detach().argmax(1)
