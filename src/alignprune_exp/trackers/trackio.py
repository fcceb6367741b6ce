"""Trackio, of Hugging Face."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from .base import Mirrored, Tracker


class Trackio(Tracker):
    """A run of a Trackio project on this machine, which ``trackio show`` shows."""

    service = "Trackio"
    extra = "trackio"

    def __init__(self, *, project: str) -> None:
        self.project = project

    def start(self, run: Mirrored) -> None:
        with _silence():
            import trackio

            self.run = trackio.init(
                project=self.project,
                name=run.id,
                group=run.group,
                config=run.flat(),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, row: Mapping[str, Any], epoch: int) -> None:
        self.run.log(dict(row), step=epoch)

    def finish(self, summary: Mapping[str, Any]) -> None:
        with _silence():
            known = {f"summary.{key}": value for key, value in summary.items() if value is not None}
            self.run.log(known, step=summary.get("epochs"))
            self.run.finish()


@contextlib.contextmanager
def _silence() -> Any:
    """Keep what it prints of itself out of the log of the run."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
