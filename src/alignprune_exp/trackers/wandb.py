"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from .base import Mirrored, Tracker


class Wandb(Tracker):
    """Weights & Biases. A stopped run closes as preempted, and any but a finished one as failed."""

    service = "Weights & Biases"

    def __init__(
        self, *, mode: Literal["offline", "online"], project: str, entity: str | None, group: str | None
    ) -> None:
        self.mode, self.project, self.entity, self.group = mode, project, entity, group

    def start(self, run: Mirrored) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        if self.mode == "online" and not wandb.setup().settings.api_key and not wandb.api.api_key:
            raise RuntimeError("no API key: type `wandb login`, or set tracking.mode=offline")
        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group or run.group,
            id=run.id,
            resume="allow" if run.epochs else None,  # None, begun anew, takes the place of what was mirrored before
            mode=self.mode,
            dir=str(run.folder),
            config=dict(run.values),
        )

    def log(self, row: Mapping[str, Any], epoch: int) -> None:
        self.run.log(dict(row), step=epoch)

    def finish(self, summary: Mapping[str, Any]) -> None:
        if summary["status"] == "stopped":
            self.run.mark_preempting()
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=0 if summary["status"] == "finished" else 1)
