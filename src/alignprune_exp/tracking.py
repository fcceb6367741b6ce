"""Weights & Biases mirrors the record; it is never the only copy, and its failure never ends a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .config import NoTracking, Wandb


class Tracker:
    """Mirrors one run, or does nothing under ``tracking=none``. After its first failure it is silent."""

    def __init__(
        self,
        config: NoTracking | Wandb,
        id: str,
        group: str | None,
        folder: Path,
        values: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._run: Any = None
        if isinstance(config, Wandb):
            self._guard(lambda: self._start(config, id, group, folder, values))

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror one epoch's metrics."""
        numbers = {key: value for key, value in row.items() if value is not None}
        self._guard(lambda: self._run and self._run.log(numbers, step=row["epoch"]))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mirror the summary and close; a stopped run closes as preempted, and any but a finished one as failed."""

        def close() -> None:
            if self._run:
                if summary["status"] == "stopped":
                    self._run.mark_preempting()
                self._run.summary.update(dict(summary))
                self._run.finish(exit_code=0 if summary["status"] == "finished" else 1)

        self._guard(close)
        self._run = None

    def _start(self, config: Wandb, id: str, group: str | None, folder: Path, values: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        if config.mode == "online" and not wandb.setup().settings.api_key and not wandb.api.api_key:
            raise RuntimeError("no API key: type `wandb login`, or set tracking.mode=offline")
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or group,
            id=id,
            resume="allow",
            mode=config.mode,
            dir=str(folder),
            config=dict(values),
        )

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # whatever goes wrong in there, the run goes on
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._say(f"Weights & Biases failed and is left out from here on: {reason}")
            self._run = None
