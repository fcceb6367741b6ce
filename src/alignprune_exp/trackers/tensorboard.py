"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Mirrored, Tracker


class TensorBoard(Tracker):
    """Event files in the run's folder: ``tensorboard --logdir results/runs`` shows all runs beside each other."""

    service = "TensorBoard"
    extra = "tensorboard"

    def start(self, run: Mirrored) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.epochs or None)
        lines = [f"| {key} | {value} |" for key, value in run.flat().items()]
        self.writer.add_text("config", "\n".join(["| key | value |", "|---|---|", *lines]))

    def log(self, row: Mapping[str, Any], epoch: int) -> None:
        for key, value in row.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(key, value, epoch)
        self.writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.writer.add_text("summary", "\n\n".join(f"{key}: {value}" for key, value in summary.items()))
        self.writer.close()
