"""The processes that train together, and what they exchange. Alone, nothing is exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist

from .arguments import check_whole

if dist.is_available():
    # DistributedDataParallel imports it too, but later: its functions would then have the process group as a default
    # argument, so that destroying the group ended none of its threads, and one could abort the interpreter's exit.
    import torch.distributed.nn


class LostProcessError(RuntimeError):
    """Another process has ended, or is silent for longer than the process group's timeout."""


class DisagreementError(ValueError):
    """The processes would go on from different numbers; raised in all of them."""


class Exchange:
    """This process, number ``rank`` of ``size``, and what it exchanges with the others.

    Every method that exchanges is called by all of them, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @staticmethod
    def found() -> Exchange:
        """Return the processes of torch.distributed where it is initialised, else this one alone."""
        if dist.is_available() and dist.is_initialized():
            return Exchange(dist.get_rank(), dist.get_world_size())
        return Exchange()

    @staticmethod
    def given(rank: int | None, world_size: int | None) -> Exchange | None:
        """Return the processes that a user names; None where they are to be `found`. Raises ValueError."""
        if rank is None and world_size is None:
            return None
        if rank is None or world_size is None:
            missing = "rank" if rank is None else "world_size"
            raise ValueError(f"rank and world_size go together; pass {missing} too, or neither")
        check_whole("rank", rank, 0)
        check_whole("world_size", world_size, 1)
        if rank >= world_size:
            raise ValueError(
                f"rank={rank} is none of world_size={world_size} processes, which count from 0; leave both out to use "
                "torch.distributed's own"
            )
        return Exchange(rank, world_size)

    def check_batches(self, trainer: str, takes: int) -> None:
        """Raise ValueError where the processes of a trainer take another number of different batches in a step."""
        world = self.found().size
        if self.size == takes in (1, world):
            return
        remedies = {world: "leave rank and world_size out", 1: "pass rank=0, world_size=1, and each selects the same"}
        raise ValueError(
            f"{trainer}'s processes take {takes} different batches in a step, and the pruning gives them {self.size}; "
            + remedies.get(takes, "train by data parallelism or by tensor parallelism alone")
        )

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Turn what a broken connection raises into LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or isinstance(error, LostProcessError) or not _of_a_connection(error):
                raise
            raise LostProcessError(
                f"process {self.rank} of {self.size} lost another one, which has ended or is silent; start all of them "
                "again, from the latest state_dict() that was saved"
            ) from None

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
        own = self._carried(values)
        sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
        lengths = [int(size) for size in sizes]
        if not any(lengths):
            return [values] * self.size
        padded = own.new_zeros((max(lengths), *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return [part[:length].to(values.device) for part, length in zip(parts, lengths, strict=True)]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of the processes' ``value``."""
        return value if self.size == 1 else self._reduced(value, dist.ReduceOp.SUM)

    def min(self, value: Tensor) -> Tensor:
        """Return the least of the processes' ``value``."""
        return value if self.size == 1 else self._reduced(value, dist.ReduceOp.MIN)

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
        encoded = torch.tensor(list((text or "").encode(errors="surrogatepass")), dtype=torch.uint8)
        texts = (bytes(part.tolist()) for part in self.gathered(encoded))
        return next((part.decode(errors="surrogatepass") for part in texts if part), None)

    def from_rank_0(self, tensors: list[Tensor]) -> None:
        """Overwrite ``tensors`` by those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                own = self._carried(tensor)
                dist.broadcast(own, 0)
                if own is not tensor:
                    tensor.copy_(own)

    def _reduced(self, value: Tensor, by: dist.ReduceOp.RedOpType) -> Tensor:
        own = self._carried(value.clone())
        dist.all_reduce(own, by)
        return own.to(value.device)

    def _carried(self, values: Tensor) -> Tensor:
        """Return ``values`` where the process group can carry them: NCCL alone takes nothing from the CPU.

        Raises ValueError where torch.distributed has other processes than these.
        """
        there = self.found()
        if (there.rank, there.size) != (self.rank, self.size):
            says = f"rank {there.rank} of {there.size}" if there.size > 1 else "not initialised, or of one process"
            raise ValueError(
                f"rank={self.rank}, world_size={self.size} was given, and torch.distributed is {says}; call "
                "torch.distributed.init_process_group() first, and leave rank and world_size out"
            )
        devices = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
        return values if values.device.type in devices else values.to(devices[0])


def _of_a_connection(error: RuntimeError) -> bool:
    words = ("connection", "timed out", "timeout", "socket", "gloo", "nccl", "peer", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
