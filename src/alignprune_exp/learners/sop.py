"""Sparse over-parameterisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..pruning.seeding import generator
from ..schema import RATE
from .base import Forward, Given, Learner, Step, one_hot

OwnRate = Annotated[float, Field(ge=0, le=RATE)]


class SOP(Learner):
    """Sparse over-parameterisation (Liu et al., ICML 2022, algorithm 1).

    Every sample has parameters u (one, for its given class) and v (one for each other class); u² − v² stands for its
    label's error and is added to the prediction. The cross-entropy of that, clamped and normalised as in the authors'
    code, moves the network and u; the squared distance of label and (one-hot prediction + u² − v²) moves v. Both are
    moved by plain gradient descent, at rates of their own, in the rows of the batch alone.

    In one version of the authors' code the squared distance moves u as well; this is the paper's rule.

    On CIFAR they train the network by SGD at 0.02, weight decay 1e-3, plain momentum, in a cosine over 300 epochs, on
    images that AutoAugment and Cutout have changed. Ours is the optimiser of the run, by its scale or data set, in one
    cycle, on its flips and crops. Values for CIFAR-N are those of Prune4ReL's scripts, which train SOP+.
    """

    replays = True

    def __init__(
        self,
        networks: Sequence[nn.Module],
        given: Given,
        *,
        lr_u: OwnRate,
        lr_v: OwnRate,
        std: Annotated[float, Field(ge=1e-30, le=10)],
    ) -> None:
        super().__init__(networks, given)
        self.lr_u, self.lr_v = lr_u, lr_v
        self.u_N: Tensor
        self.v_NC: Tensor
        drawn = generator(given.seed, "over-parameterisation").standard_normal((given.n, 1 + given.classes), np.float32)
        start = torch.from_numpy(drawn) * std
        self.register_buffer("u_N", start[:, 0].contiguous())
        self.register_buffer("v_NC", start[:, 1:].contiguous())

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = forward(step.inputs)
        plain = F.cross_entropy(logits, step.targets, reduction="none")
        given_BC = one_hot(step.targets, logits)
        predicted = logits.detach().argmax(1)
        self._index = step.index
        self._u_B = self.u_N.index_select(0, step.index).requires_grad_()
        self._v_BC = self.v_NC.index_select(0, step.index).requires_grad_()
        more_BC = (self._u_B[:, None].square() * given_BC).clamp(max=1)
        less_BC = (self._v_BC.square() * (1 - given_BC)).clamp(max=1)
        p_BC = (logits.softmax(1) + more_BC - less_BC.detach()).clamp(min=1e-4)
        p_B = (p_BC / p_BC.sum(1, keepdim=True)).gather(1, step.targets[:, None]).squeeze(1)
        hard_BC = one_hot(predicted, logits)
        distance = (hard_BC + more_BC.detach() - less_BC - given_BC).square().sum(1)
        return plain, -p_B.clamp(min=1e-4).log() + distance, predicted

    def after_backward(self) -> None:
        for values, rows, lr in ((self.u_N, self._u_B, self.lr_u), (self.v_NC, self._v_BC, self.lr_v)):
            assert rows.grad is not None
            values.index_copy_(0, self._index, rows.detach() - lr * rows.grad)
