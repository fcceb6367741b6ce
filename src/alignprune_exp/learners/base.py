"""The face of a learner.

Shape legend: B samples of a batch, C classes, N samples of the run, V augmented views of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..config import Config
    from ..data.batches import Batch

Forward = Callable[..., Tensor]  # of images, and of a network's number: float32 logits, in the precision of the run


@dataclass(frozen=True)
class Step:
    """One batch to learn from.

    Attributes:
        index: sample indices (B,), on the device.
        images: (V · B, channels, H, W), one view of all samples after the other.
        labels: as given, (B,).
        epoch: counted from 0.
        number: of the step in its epoch, from 0.
        steps: in this epoch.
        share: this process's part of the batch, times the number of processes, whose gradients are averaged.
    """

    index: Tensor
    images: Tensor
    labels: Tensor
    epoch: int
    number: int
    steps: int
    share: float = 1.0


class Learner(nn.Module):
    """Owns the networks and what it knows about every sample: its ``state_dict`` is all there is to save.

    Args:
        networks: ``count`` of them, of which the first is the one whose plain losses are recorded.
        config: of the run; ``config.learner`` has the learner's own settings.
        n: samples of the run.
        classes: C.

    Attributes:
        count: networks that it trains.
        views: augmented views V that a step needs.
    """

    count = 1
    views = 1

    def __init__(self, networks: Sequence[nn.Module], config: Config, n: int, classes: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor, network: int | None = None) -> Tensor:
        """Return the logits (B, C) of one network, or the mean of all networks' logits."""
        if network is not None or len(self.networks) == 1:
            return self.networks[network or 0](images)
        return torch.stack([each(images).float() for each in self.networks]).mean(0)

    def begin_epoch(self, epoch: int, batches: Iterable[Batch], forward: Forward) -> None:
        """Look at the epoch's samples, as ``batches`` without augmentation, before its first step."""

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each sample (B,): its plain cross-entropy, the loss to train on, and the predicted class.

        The plain one is that of the given label from the first network's float32 logits, whatever is trained on.
        """
        raise NotImplementedError

    def after_backward(self) -> None:
        """Update what is known about the step's samples by the gradients of its loss."""

    def passes(self, epoch: int) -> int:
        """Return how often each selected sample passes through a network in an epoch, with gradient or without."""
        return 1


def one_hot(classes_B: Tensor, like_BC: Tensor) -> Tensor:
    """Return (B, C) of the kind of ``like_BC``, 1 at each sample's class; unlike torch's, without waiting to check."""
    return torch.zeros_like(like_BC).scatter_(1, classes_B[:, None], 1.0)
