"""The loss of a reference set, in a framework's loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..pruning import DynamicPruning


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
    if pruning.compares:
        return f"score={pruning.score.name!r} compares with"
    learns = pruning.pruner.needs_noise_rate and not pruning.score.foretells
    return "the pruner learns the noise rate from" if learns else ""


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
