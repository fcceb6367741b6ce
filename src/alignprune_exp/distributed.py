"""The processes of one run, as torchrun or Slurm starts them, and how they join."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import GOES_ON, Failed, UsageError
from .pruning.processes import DisagreementError, Exchange, LostProcessError

TIMEOUT = timedelta(seconds=50)  # of silence, after which another process counts as dead
COMPILING = timedelta(minutes=10)  # the same where a first step may be compiled in one process and read in another


class Lost(Failed):
    """Another process of the run has ended, or is silent."""


class Processes(Exchange):
    """The processes of a run; this one is number ``rank`` of ``size``, and ``local`` of ``beside`` on its machine.

    Only rank 0 writes.
    """

    def __init__(self) -> None:
        together = "MASTER_ADDR" in os.environ
        rank, size, self.local, beside = (
            int(os.environ.get(name, alone)) if together else alone
            for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        )
        self.beside = max(beside, self.local + 1)
        super().__init__(rank, size)

    def place(self, devices: int) -> int | None:
        """Return the number of its own of the CUDA devices that it sees, None where they do not suffice.

        A scheduler may show it that one alone; torchrun shows all of them to all processes of a machine.
        """
        if devices == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            return 0
        return self.local if self.beside <= devices else None

    @contextmanager
    def joined(self, asked: str, compiles: bool = False) -> Iterator[None]:
        """Be connected with the others until the block ends.

        Raises Lost where the connection fails, UsageError where a scheduler gave two processes one CUDA device.

        Args:
            asked: for the device; on a CPU the processes leave CUDA devices, which they may have to share, alone.
            compiles: allows for the silence of one that compiles its first step.
        """
        if self.size == 1:
            yield
            return
        with self.connected():
            # Where another process is lost, give up the connection and raise, in place of ending this one by a signal.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
            cuda, device = asked != "cpu" and torch.cuda.is_available(), None
            if cuda and (place := self.place(torch.cuda.device_count())) is not None:
                device = torch.device("cuda", place)
                torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            try:
                dist.init_process_group(backend, timeout=COMPILING if compiles else TIMEOUT, device_id=device)
            except dist.DistBackendError as error:
                if "Duplicate GPU" not in str(error):
                    raise
                raise UsageError(
                    f"several of the {self.size} processes were given the same CUDA device; give each one of its own, "
                    "as Slurm's --gpus-per-task=1 does, or set device=cpu"
                ) from None
        try:
            yield
        finally:
            dist.destroy_process_group()

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Turn what a broken connection raises into Lost, and processes that disagree into Failed."""
        try:
            with super().connected():
                yield
        except LostProcessError:
            raise Lost(f"process {self.rank} of {self.size} lost another one of its run; {GOES_ON}") from None
        except DisagreementError as error:
            raise Failed(str(error)) from None


def parallel(model: nn.Module) -> DistributedDataParallel:
    """Return the model with gradients averaged over the processes, and buffers left alone."""
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    leave: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True, **leave)
