"""The loss of a reference set, in a framework's loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..pruning import DynamicPruning
from ..pruning.losses import whole
from ..pruning.processes import Exchange

Batch = TypeVar("Batch")


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


def dealt(batches: Iterable[Batch], processes: Exchange) -> Iterator[tuple[Batch, bool]]:
    """Yield every size-th of the batches, which this process evaluates, and whether its losses count.

    As many in each process, since all of them compute what a sharded network does: one that gets none of the last few
    evaluates the last one once more, for nothing.
    """
    number = -1
    for number, batch in enumerate(batches):
        if number % processes.size == processes.rank:
            yield batch, True
    if number % processes.size < processes.rank:
        yield batch, False


def gathered(pruning: DynamicPruning, parts: list[tuple[Tensor, bool]]) -> Tensor:
    """Return the losses (R,) of the whole set, of the losses (b,) of each batch `dealt`, and whether they count.

    All processes call it. Raises ValueError for losses of another shape, and for a set without samples.
    """
    own = [torch.zeros(0)]
    for part, counts in parts:
        if part.dim() != 1:
            raise ValueError(
                f"the reference losses have shape {tuple(part.shape)}; return one a sample, (B,), as reduction='none' "
                "gives them"
            )
        if counts:
            own.append(whole(part).cpu())
    with pruning.processes.connected():
        losses = pruning.processes.gather(torch.cat(own).double())
    if not len(losses):
        raise ValueError("the reference set has no samples; pass one that has some")
    return losses
