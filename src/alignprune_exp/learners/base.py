"""The face of a learner.

Shape legend: B samples of a batch, C classes, N samples of the run, V augmented views of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..config import Config
    from ..data.batches import Batch
    from ..tasks import Task

Forward = Callable[..., Tensor]  # of inputs, and of a network's number: float32 outputs, in the precision of the run


@dataclass(frozen=True)
class Step:
    """One batch to learn from.

    Attributes:
        index: sample indices (B,), on the device.
        inputs: (V · B, …), one view of all samples after the other; of images (V · B, channels, H, W).
        targets: as given, (B, …); of class labels (B,).
        epoch: counted from 0.
        number: of the step in its epoch, from 0.
        steps: in this epoch.
        share: this process's part of the batch, times the number of processes, whose gradients are averaged; 0 where
            it has none, and takes the step with a sample of another's, so that its optimizer keeps up.
    """

    index: Tensor
    inputs: Tensor
    targets: Tensor
    epoch: int
    number: int
    steps: int
    share: float = 1.0


@dataclass(frozen=True)
class Given:
    """What a learner knows of its run beside its settings.

    Attributes:
        task: of the run.
        n: samples N.
        seed: of the run.
        smoothing: of the labels, where a learner ``smooths``.
    """

    task: Task
    n: int
    seed: int
    smoothing: float

    @property
    def classes(self) -> int:
        """C."""
        return len(self.task.classes or ())


class Learner(nn.Module):
    """Owns the networks and what it knows about every sample: its ``state_dict`` is all there is to save.

    A subclass takes its settings as keyword arguments, and hands ``networks`` and ``given`` on.

    Args:
        networks: ``count`` of them, of which the first is the one whose plain losses are recorded.

    Attributes:
        count: networks that it trains.
        views: augmented views V that a step needs.
        by_class: whether it needs class labels.
        smooths: whether ``label_smoothing`` has an effect.
        replays: whether a step is the same operations on the device whatever ``epoch``, ``number`` and ``steps`` are,
            without waiting for it, so that one can be recorded and replayed for the others.
        remembers: whether it knows something about single samples, which several processes would have to share.
        told: whether it is told of the samples' classes before its first epoch.
    """

    count: ClassVar[int] = 1
    views: ClassVar[int] = 1
    by_class: ClassVar[bool] = True
    smooths: ClassVar[bool] = False
    replays: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    told: ClassVar[bool] = False

    def __init__(self, networks: Sequence[nn.Module], given: Given) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise UsageError where its settings do not go together with the rest of the config."""

    def forward(self, inputs: Tensor, network: int | None = None) -> Tensor:
        """Return the outputs (B, …) of one network, or the mean of all networks' outputs."""
        if network is not None or len(self.networks) == 1:
            return self.networks[network or 0](inputs)
        return torch.stack([each(inputs).float() for each in self.networks]).mean(0)

    def tell(self, classes_NC: Tensor) -> None:
        """Take in how likely each class (N, C) is by a `transition` of the samples' features, where it is ``told``.

        C is the highest label there is, plus 1.
        """

    def begin_epoch(self, epoch: int, batches: Iterable[Batch], forward: Forward) -> None:
        """Look at the epoch's samples, as ``batches`` without augmentation, before its first step."""

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return for each sample (B,): its plain loss, the loss to train on, and the class it is taken for, if any.

        The plain one is the task's, of what is given and the first network's outputs, whatever is trained on.
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
