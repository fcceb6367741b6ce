"""The trajectory bank: the last W losses of N samples and of the reference set, and the sum of all losses.

Shape legend: N samples, W epochs of the window, B samples of a batch or block. A loss that was not recorded
is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .arguments import check_version, check_whole
from .held import Held

UNSEEN = ("carry", "mask", "refresh")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 1 << 17  # samples: rows of it stay in the processor's cache, and are long enough for torch's threads to share
BLOCK_ELSEWHERE = 1 << 20  # the same on other devices, which want fewer and larger pieces of work


@dataclass(frozen=True)
class History:
    """What a score may look at: the bank after a finished epoch, and what else is known of its samples.

    It is a view, valid until the next record.

    Attributes:
        rows: up to W rows (N,), oldest first, one a finished epoch.
        reference_W: the reference set's mean loss in the same epochs, float64; NaN where none was given.
        last_N: the last recorded loss of each sample, NaN if it was never seen.
        sum_N: the sum, in float64, of all losses recorded of each sample since the run began.
        count_N: how many these are; a carried loss is not recorded again.
        epoch: the number of finished epochs.
        clean_N: whether each label is clean, where that is known.
        seed: the run's seed, for scores that draw.
        labels: the class (N,) that each sample is given as, where there are any.
        progress: the share of the run's epochs that are finished.
        told_N: what whoever trains has told of each sample (N,), NaN where nothing; see `DynamicPruning.tell`.
    """

    rows: list[Tensor]
    reference_W: Tensor
    last_N: Tensor
    sum_N: Tensor
    count_N: Tensor
    epoch: int
    clean_N: Tensor | None = None
    seed: int = 0
    labels: NDArray | None = None
    progress: float = 0.0
    told_N: Tensor | None = None

    def map(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply ``score``, (W, B) float32 losses, oldest first, to (B,) scores, to all samples in blocks.

        Returns (N,) float32; NaN for samples never seen, whatever ``score`` makes of them.
        """
        scores_N = torch.full_like(self.last_N, torch.nan)
        if not self.rows:
            return scores_N
        size = BLOCK if scores_N.device.type == "cpu" else BLOCK_ELSEWHERE
        block_WB = scores_N.new_empty(len(self.rows), min(size, len(scores_N)))
        for start in range(0, len(scores_N), size):
            here = slice(start, start + size)
            losses_WB = block_WB[:, : len(scores_N) - start]
            for loss_B, row in zip(losses_WB, self.rows, strict=True):
                loss_B.copy_(row[here])
            scores_N[here] = score(losses_WB)
            last_B = self.last_N[here]
            if last_B.device.type != "cpu" or last_B.sum().isnan():  # a sum is cheaper than a mask
                scores_N[here].masked_fill_(last_B.isnan(), torch.nan)
        return scores_N


class Trajectories:
    """A ring buffer of per-sample losses, one row an epoch; beside it their sum and number over all finished epochs.

    Args:
        n: number of samples N.
        window: number of rows W, 3 or more.
        unseen: what stands in a finished row for a sample that the epoch did not forward. ``carry`` repeats
            its last loss, ``mask`` leaves the place empty, ``refresh`` demands that it was recorded as well.
        device: where the bank lies.
        dtype: of the bank; half precision halves its memory.
    """

    def __init__(
        self,
        n: int,
        window: int,
        unseen: str = "carry",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_whole("window", window, 3)
        if unseen not in UNSEEN:
            raise ValueError(f"unseen={unseen!r} is unknown; use one of {', '.join(UNSEEN)}")
        if dtype not in DTYPES:
            raise ValueError(f"a bank of {dtype} cannot be kept; use one of {', '.join(map(str, DTYPES))}")
        self.n, self.window, self.unseen = n, window, unseen
        self.epoch = 0
        self.recorded = 0  # losses in the running epoch's row
        self._losses_WN = torch.full((window, n), torch.nan, dtype=dtype, device=device)
        self._last_N = torch.full((n,), torch.nan, dtype=torch.float32, device=device)
        self._held = Held()
        self.sum_N = torch.zeros(n, dtype=exact(device), device=device)
        self.count_N = torch.zeros(n, dtype=torch.int32, device=device)
        self.reference_W = torch.full((window,), torch.nan, dtype=torch.float64, device="cpu")

    @property
    def losses_WN(self) -> Tensor:
        """The rows, of which the running epoch's is number epoch mod W."""
        self._held.settle(self._write)
        return self._losses_WN

    @property
    def last_N(self) -> Tensor:
        """The last recorded loss of each sample."""
        self._held.settle(self._write)
        return self._last_N

    @property
    def device(self) -> torch.device:
        return self._last_N.device

    @property
    def lacking(self) -> int:
        """In how many epochs, each with a reference loss, every epoch of the window has one."""
        unknown = self.reference_W.roll(-(self.epoch % self.window)).isnan().nonzero()
        return int(unknown.max()) + 1 if len(unknown) else 0

    def anew(self) -> Trajectories:
        """Return a bank of the same kind that knows no loss yet, and whose epochs count on: of another network."""
        bank = Trajectories(self.n, self.window, self.unseen, self.device, self._losses_WN.dtype)
        bank.epoch = self.epoch
        return bank

    def move(self, device: torch.device) -> None:
        """Lie on another device from now on."""
        self._losses_WN, self._last_N, self.count_N = (
            each.to(device) for each in (self.losses_WN, self.last_N, self.count_N)
        )
        self._held = Held()
        self.sum_N = self.sum_N.to(device, exact(device))

    def record(self, index: Tensor, losses: Tensor) -> None:
        """Record ``losses`` (B,) of the samples ``index`` (B,) in the running epoch.

        Raises IndexError for an index outside [0, N), and ValueError for a sample recorded twice. The end of the
        epoch finds what is not found here: a sample twice in one batch, and on devices other than the CPU, where
        looking would wait for the device, any.
        """
        if index.numel() == 0:
            return
        index = self.place(index)
        row = self._losses_WN[self.epoch % self.window]
        if row.device.type == "cpu":
            before = self.pick(row, index)
            if self.recorded and not before.isnan().all():
                raise ValueError(self._twice(f"sample {int(index[~before.isnan()][0])}"))
        if self.recorded == 0:
            row.fill_(torch.nan)
        self._held.add(self._write, index, losses.to(row.device, torch.float32))
        self.recorded += index.numel()

    def _write(self, index: Tensor, losses: Tensor) -> None:
        self._last_N.index_copy_(0, index, losses)
        self._losses_WN[self.epoch % self.window].index_copy_(0, index, self._fit(losses))

    def place(self, index: Any) -> Tensor:
        """Return sample indices (B,) as int64 where the bank lies.

        Raises ValueError if they are no whole numbers, and IndexError if they leave the CPU out of range.
        """
        index, device = whole_numbers(index).long(), self.device
        if index.device.type == "cpu" != device.type and not ((index >= 0) & (index < self.n)).all():
            raise outside(index, self.n)
        return index.to(device, non_blocking=device.type != "cpu")  # on the CPU it would be read before it is there

    def pick(self, values_N: Tensor, index: Tensor) -> Tensor:
        """Return ``values_N`` at ``index`` (B,), as `place` gives it; IndexError, on the CPU, if it is out of range."""
        try:
            return values_N.index_select(0, index)
        except IndexError:
            raise outside(index, self.n) from None

    def unseen_samples(self) -> Tensor:
        """Return the samples (K,) without a loss in the running epoch, ascending."""
        if self.recorded == 0:
            return torch.arange(self.n, device=self.device)
        return self.losses_WN[self.epoch % self.window].isnan().nonzero().squeeze(1)

    def check_recorded(self) -> None:
        """Raise ValueError if no loss was recorded in the running epoch."""
        if self.recorded == 0:
            raise ValueError(
                f"no loss was recorded in epoch {self.epoch}, so an epoch was skipped; call update() in every step and "
                "end_epoch() once after each pass over the loader, and leave out drop_last=True, which drops an epoch "
                "that selects less than a batch"
            )

    def end_epoch(self, reference_loss: float | None) -> None:
        """Close the running epoch's row.

        Raises ValueError if nothing was recorded, if a sample was recorded twice, or if ``refresh`` misses one.
        """
        self.check_recorded()
        slot = self.epoch % self.window
        row = self.losses_WN[slot]
        missing = row.isnan()
        n_missing = int(missing.sum())
        if self.n - n_missing != self.recorded:
            raise ValueError(self._twice("a sample"))
        if self.unseen == "refresh" and n_missing:
            raise ValueError(
                f"unseen='refresh' needs every sample's loss, and {n_missing} of {self.n} have none in epoch "
                f"{self.epoch}; forward the samples unseen() without gradient and record() their losses"
            )
        self.sum_N += self.last_N.masked_fill(missing, 0)
        self.count_N += ~missing
        if self.unseen == "carry" and n_missing:
            torch.where(missing, self._fit(self.last_N), row, out=row)
        self.reference_W[slot] = torch.nan if reference_loss is None else reference_loss
        self.epoch += 1
        self.recorded = 0

    def population_mean(self) -> float:
        """Return the mean, in float64, of the last recorded loss of every sample seen so far.

        Samples pruned in the running epoch count with their loss of an earlier one: a mean over the selection alone
        would jump whenever the selection changes its make-up.
        """
        return self.last_N.double().nanmean().item()

    def link_reference(self, loss: float) -> None:
        """Shift the reference trajectory so that its last entry is ``loss``; see `DynamicPruning.change_reference`."""
        last = self.reference_W[(self.epoch - 1) % self.window].item()
        if self.recorded:
            raise RuntimeError("the reference set changes between end_epoch() and update(), not within an epoch")
        if math.isnan(last):
            raise ValueError("there is no reference loss to go on from; pass one to end_epoch() first")
        self.reference_W += loss - last

    def history(self) -> History:
        """Return the finished epochs of the window. Raises RuntimeError once the next epoch has begun."""
        if self.recorded:
            raise RuntimeError("scores exist between end_epoch() and the next update(), not within an epoch")
        slots = [epoch % self.window for epoch in range(max(0, self.epoch - self.window), self.epoch)]
        rows = [self.losses_WN[slot] for slot in slots]
        return History(rows, self.reference_W[slots], self.last_N, self.sum_N, self.count_N, self.epoch)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "recorded": self.recorded,
            "losses": self.losses_WN,
            "last": self.last_N,
            "sum": self.sum_N,
            "count": self.count_N,
            "reference": self.reference_W,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over. Raises ValueError if it is of another window, number of samples, or version."""
        check_version(self.state_dict(), state)
        if state["losses"].shape != self.losses_WN.shape:
            window, n = state["losses"].shape
            raise ValueError(
                f"the state holds {n} samples over a window of {window}, this run {self.n} samples over a window of "
                f"{self.window}; go on with the data set and the window that it began with"
            )
        self.epoch, self.recorded = state["epoch"], state["recorded"]
        self.losses_WN.copy_(self._fit(state["losses"].float()))
        self.last_N.copy_(state["last"])
        self.sum_N.copy_(state["sum"])
        self.count_N.copy_(state["count"])
        self.reference_W.copy_(state["reference"])

    def _fit(self, losses: Tensor) -> Tensor:
        dtype = self._losses_WN.dtype
        if dtype == losses.dtype:
            return losses
        limit = torch.finfo(dtype).max
        return losses.clamp(-limit, limit).to(dtype)

    def _twice(self, who: str) -> str:
        return (
            f"{who} was observed twice in epoch {self.epoch}; call update() once a batch, end_epoch() once after each "
            "pass over the loader, whose length changes, and after a resume within an epoch first "
            "sampler.leave_out_trained()"
        )


def whole_numbers(index: Any) -> Tensor:
    """Return sample indices as a tensor. Raises ValueError if they are no whole numbers."""
    try:
        index = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        kind = type(index).__name__
    else:
        if not (index.is_floating_point() or index.dtype == torch.bool):
            return index
        kind = index.dtype
    raise ValueError(f"index is {kind}; pass the index that came with the batch, whole numbers")


def exact(device: torch.device | str) -> torch.dtype:
    """Return the type that sums over epochs are kept in: float64, which MPS lacks."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def outside(index: Tensor, n: int) -> IndexError:
    """Return what to raise for sample indices (B,) of which some are not in 0..n-1."""
    wrong = int(index[(index < 0) | (index >= n)][0])
    return IndexError(
        f"sample index {wrong} is out of range: there are {n} samples, counted from 0; "
        "pass the index that came with the batch"
    )
