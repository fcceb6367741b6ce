"""Writes that wait, where each by itself would be many small pieces of work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SAMPLES = 1 << 16  # that wait at the most


class Held:
    """Holds what is to be written of some samples at a time, until somebody reads or it is full.

    A write is a function of samples (B,) and of each one's values, and the same one throughout. On the CPU it is called
    at once. Elsewhere one that is deterministic sorts its samples, in dozens of kernels, whether they are 128 or
    `SAMPLES`.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._count = 0

    def add(self, write: Callable[..., None], index: Tensor, *values: Tensor) -> None:
        """Write, now or later, the values (B,) of samples ``index`` (B,), which may be overwritten afterwards."""
        if index.device.type == "cpu" or len(index) > SAMPLES:
            self.settle(write)
            write(index, *values)
            return
        if not self._kept:
            self._kept = [torch.empty(SAMPLES, dtype=each.dtype, device=each.device) for each in (index, *values)]
        if self._count + len(index) > SAMPLES:
            self.settle(write)
        for kept, each in zip(self._kept, (index, *values), strict=True):
            kept[self._count : self._count + len(index)].copy_(each, non_blocking=True)
        self._count += len(index)

    def settle(self, write: Callable[..., None]) -> None:
        """Write what waits."""
        if self._count:
            count, self._count = self._count, 0
            write(*(kept[:count] for kept in self._kept))
