"""A service that mirrors the record; it is never the only copy, and its failure never ends a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import reason_of


@dataclass(frozen=True)
class Mirrored:
    """What is mirrored.

    Attributes:
        id: of the run.
        group: the suite that it belongs to, if any.
        folder: of the run; a service that writes files writes them in there, or beside it.
        values: its config and environment.
        epochs: how many there are already, which were mirrored before.
    """

    id: str
    group: str | None
    folder: Path
    values: Mapping[str, Any]
    epochs: int = 0

    def flat(self) -> dict[str, Any]:
        """Return the values by dotted keys, for services that know no nodes."""
        found: dict[str, Any] = {}
        nodes = [("", self.values)]
        for place, node in nodes:
            for key, value in node.items():
                if isinstance(value, Mapping):
                    nodes.append((f"{place}{key}.", value))
                else:
                    found[place + key] = value
        return found


class Tracker:
    """Mirrors one run; this one, ``tracking=none``, does nothing. What its methods raise is said.

    They are called one after the other, and `log` by another thread than the rest.
    """

    service = "none"
    extra: str | None = None  # what installs it, if it does not come with the project

    def start(self, run: Mirrored) -> None:
        """Begin, or go on with what was mirrored before."""

    def log(self, row: Mapping[str, Any], epoch: int) -> None:
        """Mirror what is known of one epoch: numbers, and few words."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mirror the summary, whose status is finished, failed, stopped or interrupted, and close."""


class Mirror:
    """Hands a run on to a tracker, which is left out after its first failure."""

    def __init__(self, tracker: Tracker, run: Mirrored, say: Callable[[str], None]) -> None:
        self._tracker: Tracker | None = tracker
        self._say = say
        self._guard(lambda: tracker.start(run))

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror one epoch's row of metrics."""
        known = {key: value for key, value in row.items() if value is not None}
        if (tracker := self._tracker) is not None:
            self._guard(lambda: tracker.log(known, row["epoch"]))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mirror the end."""
        if (tracker := self._tracker) is not None:
            self._guard(lambda: tracker.finish(summary))

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # whatever goes wrong in there, the run goes on
            assert self._tracker is not None
            reason = reason_of(error)
            if isinstance(error, ImportError) and (extra := self._tracker.extra):
                reason += f"; type pip install 'alignprune-exp[{extra}]'"
            self._say(f"{self._tracker.service} failed and is left out from here on: {reason}")
            self._tracker = None
