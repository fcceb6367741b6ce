"""A service that mirrors the record; it is never the only copy, and its failure never ends a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Mirrored:
    """What is mirrored: the run's id, its suite if any, its folder, and its config and environment."""

    id: str
    group: str | None
    folder: Path
    values: Mapping[str, Any]


class Tracker:
    """Mirrors one run; this one, ``tracking=none``, does nothing. What its methods raise is said."""

    service = "none"

    def start(self, run: Mirrored) -> None:
        """Begin, or go on with what was mirrored before."""

    def log(self, numbers: Mapping[str, Any], epoch: int) -> None:
        """Mirror one epoch's metrics."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mirror the summary, whose status is finished, failed, stopped or interrupted, and close."""


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
            resume="allow",
            mode=self.mode,
            dir=str(run.folder),
            config=dict(run.values),
        )

    def log(self, numbers: Mapping[str, Any], epoch: int) -> None:
        self.run.log(dict(numbers), step=epoch)

    def finish(self, summary: Mapping[str, Any]) -> None:
        if summary["status"] == "stopped":
            self.run.mark_preempting()
        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=0 if summary["status"] == "finished" else 1)


TRACKERS: dict[str, type[Tracker]] = {"none": Tracker, "wandb": Wandb}


class Mirror:
    """Hands a run on to a tracker, which is left out after its first failure."""

    def __init__(self, tracker: Tracker, run: Mirrored, say: Callable[[str], None]) -> None:
        self._tracker: Tracker | None = tracker
        self._say = say
        self._guard(lambda: tracker.start(run))

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror one epoch's row of metrics."""
        numbers = {key: value for key, value in row.items() if value is not None}
        if (tracker := self._tracker) is not None:
            self._guard(lambda: tracker.log(numbers, row["epoch"]))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mirror the end."""
        if (tracker := self._tracker) is not None:
            self._guard(lambda: tracker.finish(summary))

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # whatever goes wrong in there, the run goes on
            assert self._tracker is not None
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._say(f"{self._tracker.service} failed and is left out from here on: {reason}")
            self._tracker = None
