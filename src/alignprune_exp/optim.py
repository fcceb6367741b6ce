"""Optimizers, and a schedule that follows the work really done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .config import OptimizerKeys


def sgd(
    parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, fused on CUDA; weight decay on all parameters."""
    parameters = list(parameters)
    fused = parameters[0].device.type == "cuda"
    nesterov = momentum > 0
    return torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused
    )


def lars(
    parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """timm's LARS; weight decay on all parameters."""
    from timm.optim import Lars

    return Lars(list(parameters), lr=lr, momentum=momentum, weight_decay=weight_decay)


def adamw(parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with torch's own betas; weight decay on all parameters."""
    return torch.optim.AdamW(list(parameters), lr=lr, weight_decay=weight_decay)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": sgd, "lars": lars, "adamw": adamw}


def one_cycle(progress: float, config: OptimizerKeys) -> tuple[float, float]:
    """OneCycle (Smith and Topin, 2018), cosine form, as a function of training progress.

    Args:
        progress: (epoch + fraction of its steps done) / T, in [0, 1]; so a pruned epoch spans its whole share.
        config: ``lr`` is the peak; the rest as in ``torch.optim.lr_scheduler.OneCycleLR``.

    Returns:
        The learning rate and the momentum: ``config.momentum``, or 0.95 -> 0.85 -> 0.95 where it cycles.
    """
    start = config.lr / config.div
    if progress <= config.pct_start:
        rise = progress / config.pct_start
        lr, momentum = _cosine(start, config.lr, rise), _cosine(0.95, 0.85, rise)
    else:
        fall = (progress - config.pct_start) / (1 - config.pct_start)
        lr, momentum = _cosine(config.lr, start / config.final_div, fall), _cosine(0.85, 0.95, fall)
    return lr, momentum if config.cycle_momentum else config.momentum


def set_progress(optimizer: torch.optim.Optimizer, progress: float, config: OptimizerKeys) -> float:
    """Set the schedule's values for ``progress``; return the learning rate."""
    lr, momentum = one_cycle(progress, config)
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = lr, momentum
    return lr


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
