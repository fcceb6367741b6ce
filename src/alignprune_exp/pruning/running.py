"""What has been observed in the running epoch, in this process and in the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import check_version
from .bank import Trajectories
from .held import Held
from .processes import Exchange

NO_STEP = torch.iinfo(torch.int64).max


class NonFiniteLossError(ValueError):
    """Training has diverged: ``what`` became NaN or infinite, in ``epoch``, at ``step`` where it is a training loss."""

    def __init__(self, epoch: int, step: int | None = None, what: str = "the loss") -> None:
        self.epoch, self.step = epoch, step
        where = f"at the end of epoch {epoch}" if step is None else f"in epoch {epoch}, step {step}"
        super().__init__(f"{what} became NaN or infinite {where}; lower the learning rate or clip gradients")


class PruningWarning(UserWarning):
    """Training goes on, and its choice of samples is hardly what is meant."""


class Running:
    """The running epoch of n samples, of whose losses the bank ``trajectories`` is kept.

    Attributes:
        step: updates done in this process.
        agreed: whether all processes are known to have chosen the same.
        fresh: samples trained on in this process since the last exchange.
        largest: samples of its largest step.
    """

    def __init__(self, trajectories: Trajectories) -> None:
        self.bank = trajectories
        device = trajectories.device
        self._trained = torch.zeros(trajectories.n, dtype=torch.bool, device=device)
        self._unshared = self._trained.clone()  # observed here, and not yet known elsewhere
        self._taken, self._observed = Held(), Held()  # what is to be set of these two
        self.step = self.fresh = self._shared = self.largest = 0
        self.agreed = False
        self._bad_step = torch.full((), NO_STEP, device=device)  # the first with a loss that is not finite

    @property
    def trained(self) -> Tensor:
        """Whether each sample (n,) has been trained on, as far as this process knows."""
        self._taken.settle(self._take)
        return self._trained

    @property
    def unshared(self) -> Tensor:
        """Whether each sample (n,) was observed here, and the others do not know yet."""
        self._observed.settle(self._observe)
        return self._unshared

    def _take(self, index: Tensor) -> None:
        self._trained.index_fill_(0, index, True)

    def _observe(self, index: Tensor) -> None:
        self._unshared.index_fill_(0, index, True)

    def move(self, device: torch.device) -> None:
        """Lie where the bank does by now."""
        self._trained, self._unshared, self._bad_step = (
            each.to(device) for each in (self.trained, self.unshared, self._bad_step)
        )
        self._taken, self._observed = Held(), Held()

    def record(self, index: Tensor, losses: Tensor) -> None:
        """Record the losses (B,) of samples ``index`` (B,), which lie where the bank does."""
        self.bank.record(index, losses)
        self._observed.add(self._observe, index)
        self.watch(losses)

    def watch(self, losses: Tensor) -> None:
        """Note the first step with a loss that is not finite in float32, without waiting for the device."""
        fine = torch.isfinite(losses.float()).all().to(self._bad_step.device) | (self._bad_step < NO_STEP)
        self._bad_step = torch.where(fine, self._bad_step, self.step)

    def train(self, index: Tensor) -> None:
        """Count a step on samples ``index`` (B,)."""
        self._taken.add(self._take, index)
        self.fresh += len(index)
        self.largest = max(self.largest, len(index))
        self.step += 1

    def samples(self, processes: int) -> int:
        """Return how many samples have been trained on, if each process has done as much as this one."""
        return self._shared + processes * self.fresh

    def check_finite(self) -> None:
        """Wait for the device; raise NonFiniteLossError if a loss was NaN or infinite."""
        step = int(self._bad_step)
        if step < NO_STEP:
            raise NonFiniteLossError(self.bank.epoch, step)

    def exchange(self, processes: Exchange, also: tuple[Tensor, ...]) -> None:
        """Take over what the others have observed since the last exchange, and ``also`` (n, …) for their samples.

        Raises ValueError, in all processes, where two of them have observed the same sample.
        """
        index = self.unshared.nonzero().squeeze(1)
        parts = processes.gathered(index)
        self._check_apart(torch.cat(parts), processes.size)
        theirs = [
            processes.gathered(values[index.to(values.device)]) for values in (self.bank.last_N, self.trained, *also)
        ]
        self._bad_step = processes.min(self._bad_step)
        for rank in set(range(processes.size)) - {processes.rank}:
            self.bank.record(parts[rank], theirs[0][rank])
            for values, part in zip((self.trained, *also), theirs[1:], strict=True):
                values[parts[rank].to(values.device)] = part[rank]
        self.unshared.zero_()
        self._shared, self.fresh = int(self.trained.sum()), 0

    def _check_apart(self, index: Tensor, processes: int) -> None:
        samples, times = index.unique(return_counts=True)
        if len(samples) < len(index):
            raise ValueError(
                f"sample {int(samples[times > 1][0])} was observed in more than one of {processes} processes in epoch "
                f"{self.bank.epoch}, as {len(index) - len(samples) - 1} others were; draw batches with "
                "sampler=pruning.sampler, without a DistributedSampler, or divide order() so that each sample goes to "
                "one process"
            )

    def check_shared(self) -> None:
        """Raise RuntimeError where the other processes do not know what this one has observed."""
        if self.unshared.any():
            raise RuntimeError(
                f"the processes do not know what the others have observed in epoch {self.bank.epoch}; call exchange() "
                "in all of them before state_dict() and leave_out_trained()"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"trained": self.trained, "step": self.step, "bad_step": self._bad_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another version."""
        check_version(self.state_dict(), state)
        self.trained.copy_(state["trained"])
        self.unshared.zero_()
        self._bad_step.copy_(state["bad_step"])
        self.step, self.fresh, self._shared = state["step"], 0, int(self.trained.sum())
        self.agreed = False
