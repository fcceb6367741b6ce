"""One loss a sample, out of one a pixel, token or box.

Shape legend: B samples of a batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

REDUCE = ("mean", "sum")


def whole(values: Any) -> Any:
    """Return ``values`` in one piece, differentiable, where tensor parallelism has laid them in several processes."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def one_a_sample(
    what: str, values: Tensor, index: Tensor, reduce: str | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the losses (B,) of samples ``index`` (B,), differentiable.

    Args:
        what: names the values in errors.
        values: (B,), or (B, …) where ``reduce`` says how to make one of a sample's values: ``mean`` or ``sum``. Half
            precision is summed, and returned, in float32.
        mask: of the shape of ``values``, true or 1 where a value counts; all count without one.

    Raises ValueError for what is no tensor, another shape, a mask of other values than 0 and 1, and a sample of which
    no value counts, or that has none to have a mean.
    """
    if reduce not in (None, *REDUCE):
        raise ValueError(f"reduce={reduce!r} is unknown; use one of {', '.join(REDUCE)}")
    if mask is not None and reduce is None:
        raise ValueError("mask says which values to reduce; pass reduce='mean' or reduce='sum' with it")
    if not isinstance(values, Tensor):
        raise ValueError(f"{what} is of type {type(values).__name__}; pass a tensor, as reduction='none' gives it")
    if index.dim() != 1 or values.shape[:1] != index.shape or (reduce is None and values.dim() > 1):
        raise ValueError(
            f"{what} has shape {tuple(values.shape)} for {index.numel()} samples: pruning needs one value a sample; "
            f"compute it with reduction='none', and where that gives shape ({index.numel()}, …), pass reduce='mean' "
            "or reduce='sum'"
        )
    values = whole(values)
    if reduce is None:
        return values
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if mask is None:
        counts = values.new_full(values.shape[:1], math.prod(values.shape[1:]))
        if reduce == "mean" and 0 in values.shape[1:]:
            raise ValueError(
                f"{what} has shape {tuple(values.shape)}, no value of a sample to have a mean; leave such samples "
                "out of the data set"
            )
    else:
        values, counts = _masked(what, values, index, torch.as_tensor(mask, device=values.device))
    sums = values.reshape(len(values), -1).sum(1)
    return sums / counts if reduce == "mean" else sums


def weighted_mean(losses_B: Tensor, weights_B: Tensor) -> Tensor:
    """Return the loss to differentiate, a scalar: the weighted sum divided by B, and 0 where there is no sample."""
    return (losses_B * weights_B.to(losses_B.device)).sum() / max(1, len(losses_B))


def _masked(what: str, values: Tensor, index: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``values`` with 0 where they do not count, and how many of each sample do (B,)."""
    if mask.shape != values.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, {what} {tuple(values.shape)}; it says of each value whether it counts"
        )
    counted = mask.bool()
    if mask.dtype != torch.bool and not (counted == mask).all():
        raise ValueError("mask has values other than 0 and 1; it says of each value whether it counts")
    counts = counted.reshape(len(counted), -1).sum(1)
    if (counts == 0).any():
        empty = int(index[(counts == 0).to(index.device)][0])
        raise ValueError(
            f"no value of sample {empty} counts, its mask is empty; leave such samples out of the data set, or let one "
            "value of each count"
        )
    return values.where(counted, 0), counts
