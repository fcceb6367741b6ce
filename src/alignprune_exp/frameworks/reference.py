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


def needs_reference(pruning: DynamicPruning) -> bool:
    """Return whether epochs cannot end without a reference loss."""
    return pruning.score.aligned and pruning.pruner.uses_scores


def total(parts: list[Tensor]) -> tuple[float, int]:
    """Return the sum and the number of losses (b,), a part a batch, as `DynamicPruning.end_epoch` takes them."""
    for part in parts:
        if part.dim() != 1:
            raise ValueError(
                f"the reference losses have shape {tuple(part.shape)}; return one a sample, (B,), as reduction='none' "
                "gives them"
            )
    return sum(part.double().sum().item() for part in parts), sum(len(part) for part in parts)
