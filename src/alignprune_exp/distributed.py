"""The processes of one run, as torchrun or Slurm starts them, and what they exchange. Alone, nothing is exchanged."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .errors import GOES_ON, Failed
from .files import printable

TIMEOUT = timedelta(seconds=50)  # of silence, after which another process counts as dead


class Lost(Failed):
    """Another process of the run has ended, or is silent."""


class Processes:
    """The processes of a run; this one is number ``rank`` of ``size``, and number ``local`` on its machine.

    Every method that exchanges is called by all of them, in the same order. Only rank 0 writes.
    """

    def __init__(self) -> None:
        together = "MASTER_ADDR" in os.environ
        self.size = int(os.environ.get("WORLD_SIZE", 1)) if together else 1
        self.rank = int(os.environ.get("RANK", 0)) if together else 0
        self.local = int(os.environ.get("LOCAL_RANK", 0)) if together else 0

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be connected with the others until the block ends. Raises Lost where the connection fails."""
        if self.size == 1:
            yield
            return
        with self.connected():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
        try:
            yield
        finally:
            dist.destroy_process_group()

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Turn what a broken connection raises into Lost."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _of_a_connection(error):
                raise
            raise Lost(f"process {self.rank} of {self.size} lost another one of its run; {GOES_ON}") from None

    def share(self, values: Tensor) -> Tensor:
        """Return this process's share of ``values`` (B, …): in order, of sizes that differ by one at the most."""
        return values.tensor_split(self.size)[self.rank]

    def gather(self, values: Tensor) -> Tensor:
        """Return the ``values`` (b, …) of all processes, one after the other, b being any number in each."""
        return torch.cat(self.gathered(values)) if self.size > 1 else values

    def gathered(self, values: Tensor) -> list[Tensor]:
        """Return the same as one tensor for each process."""
        if self.size == 1:
            return [values]
        sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
        lengths = [int(size) for size in sizes]
        padded = values.new_zeros((max(lengths), *values.shape[1:]))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of the processes' ``value``."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def min(self, value: Tensor) -> Tensor:
        """Return the least of the processes' ``value``."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true in one of them."""
        return flag if self.size == 1 else bool(self._reduced(torch.tensor(int(flag)), dist.ReduceOp.MAX))

    def same(self, number: int) -> bool:
        """Return whether all have the same ``number``."""
        return len(self.gather(torch.tensor([number])).unique()) == 1

    def first(self, text: str | None) -> str | None:
        """Return the text of the first process that has one."""
        if self.size == 1:
            return text
        encoded = torch.tensor(list(printable(text or "").encode()), dtype=torch.uint8)
        longest = int(self._reduced(torch.tensor(len(encoded)), dist.ReduceOp.MAX))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(encoded)] = encoded
        texts = self.gather(padded[None])
        return next((bytes(row.tolist()).rstrip(b"\0").decode() for row in texts if row.any()), None)

    def from_rank_0(self, tensors: list[Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def _reduced(self, value: Tensor, by: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value, by)
        return value


def parallel(model: nn.Module) -> DistributedDataParallel:
    """Return the model with gradients averaged over the processes, and buffers left alone."""
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    leave: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(model, **leave)


def _of_a_connection(error: RuntimeError) -> bool:
    words = ("connection", "timed out", "timeout", "socket", "gloo", "nccl", "peer", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
