"""Labels that are corrected where a network keeps saying another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Forward, Given, Learner, Step

EMPTY = -1  # a place in a sample's history that holds no prediction yet


class Refurbish(Learner):
    """SELFIE's refurbishing of labels (Song et al., ICML 2019, section 3).

    A sample is refurbished as long as its last ``history`` predictions agree: where their entropy, over log C, is
    ``uncertainty`` or less, its loss is the cross-entropy of the label most often predicted, the lowest of equals.
    Others, and those with fewer predictions yet, keep the given label; which of them to leave out, as SELFIE does with
    those of a large loss, is for a pruner to say.
    """

    replays = True

    def __init__(
        self,
        networks: Sequence[nn.Module],
        given: Given,
        *,
        history: Annotated[int, Field(ge=1, le=1000)],
        uncertainty: Annotated[float, Field(ge=0, lt=1)],
    ) -> None:
        super().__init__(networks, given)
        self.classes, self.uncertainty = given.classes, uncertainty
        self.history_NQ: Tensor
        self.seen_N: Tensor
        self.register_buffer("history_NQ", torch.full((given.n, history), EMPTY, dtype=torch.int16))
        self.register_buffer("seen_N", torch.zeros(given.n, dtype=torch.int32))

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = forward(step.inputs)
        plain = F.cross_entropy(logits, step.targets, reduction="none")
        history_BQ, predicted = self.history_NQ.index_select(0, step.index), logits.detach().argmax(1)
        training = F.cross_entropy(logits, self.refurbished(history_BQ, step.targets), reduction="none")
        self._remember(step.index, history_BQ, predicted)
        return plain, training, predicted

    def refurbished(self, history_BQ: Tensor, given_B: Tensor) -> Tensor:
        """Return the labels (B,) to train on, by the predictions (B, Q) so far."""
        classes = torch.arange(self.classes, device=history_BQ.device)
        share_BC = (history_BQ[..., None] == classes).float().mean(1)
        entropy_B = -share_BC.xlogy(share_BC).sum(1) / math.log(max(self.classes, 2))
        sure_B = (entropy_B <= self.uncertainty) & (history_BQ != EMPTY).all(1)
        return torch.where(sure_B, share_BC.argmax(1), given_B)

    def _remember(self, index: Tensor, history_BQ: Tensor, predicted: Tensor) -> None:
        seen_B = self.seen_N.index_select(0, index)
        place_B1 = (seen_B % self.history_NQ.shape[1]).long()[:, None]
        said_BQ = history_BQ.scatter(1, place_B1, predicted[:, None].to(history_BQ.dtype))
        self.history_NQ.index_copy_(0, index, said_BQ)
        self.seen_N.index_copy_(0, index, seen_B + 1)
