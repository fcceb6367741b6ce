"""What pruning needs in a framework's loop: the losses of a reference set, and what its score is told before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..pruning import DynamicPruning
from ..pruning.scores import Readout


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have ``model`` in eval mode, without gradients; afterwards each of its modules is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def needs_reference(pruning: DynamicPruning) -> str:
    """Return why epochs cannot end without a reference set, as the beginning of a sentence; empty where they can."""
    if pruning.score.aligned and pruning.pruner.uses_scores:
        return f"score={pruning.score.name!r} compares with"
    learns = pruning.pruner.needs_noise_rate and not pruning.score.foretells
    return "the pruner learns the noise rate from" if learns else ""


def check_told(pruning: DynamicPruning) -> None:
    """Raise ValueError where training would begin without what the score goes by, which is there before it."""
    if pruning.due and not isinstance(pruning.score, Readout):  # that one is told of the network in training
        raise ValueError(
            f"score={pruning.score.name!r} goes by what you tell of every sample before training; call "
            "pruning.tell(values) first"
        )


def gathered(pruning: DynamicPruning, parts: list[Tensor]) -> Tensor:
    """Return the losses (R,) of the whole set, of the losses (b,) of each batch that a process has evaluated.

    All processes call it. Raises ValueError for losses of another shape, and for a set without samples.
    """
    for part in parts:
        if part.dim() != 1:
            raise ValueError(
                f"the reference losses have shape {tuple(part.shape)}; return one a sample, (B,), as reduction='none' "
                "gives them"
            )
    with pruning.processes.connected():
        losses = pruning.processes.gather(torch.cat([torch.zeros(0), *(part.cpu() for part in parts)]).double())
    if not len(losses):
        raise ValueError("the reference set has no samples; pass one that has some")
    return losses
