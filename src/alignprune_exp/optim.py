"""Optimizers, and a schedule that follows the work really done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import OptimizerKeys


TRUST = 0.001  # of LARS: the share of a parameter's norm that a step at rate 1 may take


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, and LARS, in a few operations on all parameters at once.

    On CUDA the rate and the momentum are scalars of the device, which a captured step reads anew each time.

    Args:
        parameters: all on one device.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``.
        nesterov: whether the momentum looks ahead.
        adapts: whether each parameter's gradient, with its decay, is scaled by a trust ratio (LARS) before the
            momentum, where there is weight decay.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool = False,
        adapts: bool = False,
    ) -> None:
        parameters = list(parameters)
        rates = {"lr": _rate(lr, parameters[0].device), "momentum": _rate(momentum, parameters[0].device)}
        super().__init__(parameters, {**rates, "weight_decay": weight_decay})
        self.nesterov, self.adapts = nesterov, adapts
        for p in parameters:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            moved: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            grads = [p.grad for p in moved if p.grad is not None]
            steps = list(torch._foreach_add(grads, moved, alpha=decay))
            if self.adapts and decay:
                torch._foreach_mul_(steps, _trust_ratios(moved, grads, decay))
            buffers = [self.state[p]["momentum_buffer"] for p in moved]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, steps)
            if self.nesterov:
                _add_(steps, buffers, momentum)
            _add_(moved, steps if self.nesterov else buffers, -lr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over all but the rates, which the schedule sets before each step, where they lie."""
        rates = [(group["lr"], group["momentum"]) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, (lr, momentum) in zip(self.param_groups, rates, strict=True):
            group["lr"], group["momentum"] = lr, momentum


def _rate(value: float, device: torch.device) -> float | Tensor:
    return torch.tensor(value, device=device) if device.type == "cuda" else value


def _add_(to: list[Tensor], values: list[Tensor], rate: float | Tensor) -> None:
    """Add ``rate`` times ``values`` in place."""
    if isinstance(rate, Tensor):
        torch._foreach_add_(to, torch._foreach_mul(values, rate))
    else:
        torch._foreach_add_(to, values, alpha=rate)


def _trust_ratios(parameters: list[Tensor], grads: list[Tensor], decay: float) -> list[Tensor]:
    """Return for each parameter by what LARS scales its gradient; 1 where either is zero."""
    w, g = (torch.stack(torch._foreach_norm(each)) for each in (parameters, grads))
    ratios = TRUST * w / (g + w * decay + 1e-8)
    return list(torch.where((w > 0) & (g > 0), ratios, 1.0).unbind())


def sgd(parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> Momentum:
    """SGD with Nesterov momentum; weight decay on all parameters."""
    return Momentum(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0)


def lars(parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> Momentum:
    """LARS as timm has it; weight decay on all parameters."""
    return Momentum(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, adapts=True)


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
        for name, value in (("lr", lr), ("momentum", momentum)):
            if isinstance(held := group.get(name), Tensor):
                held.fill_(value)
            else:
                group[name] = value
    return lr


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
