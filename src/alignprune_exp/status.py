"""How far a suite is: python -m alignprune_exp.status suite=main scale=cpu"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .console import command, duration, one_line
from .records import Damaged, config_ids_of, headline, read_environment, read_metrics, read_record, read_summary
from .runs import Folder, owner_alive, run_folders
from .suites import Suite, suite_of

STATES = ("missing", "damaged", "interrupted", "failed", "running", "done")  # of several folders the last counts


@dataclass(frozen=True)
class State:
    """What one run's folder says of it; ``taken`` and ``left`` are seconds, where known."""

    name: str = "missing"
    detail: str = ""
    taken: float | None = None
    left: float | None = None


def state(folder: Folder) -> State:
    """Return the state of the run in a folder."""
    try:
        if (record := read_record(folder)) is not None:
            judged = headline(record.summary)
            final = judged.said(record.summary[f"test_{judged.name}_final"])
            return State("done", final, taken=record.summary["seconds_total"])
        if (summary := read_summary(folder)) is not None:
            return State("failed", one_line(summary["error"]), taken=summary.get("seconds_total"))
        return _unfinished(folder)
    except Damaged as error:
        return State("damaged", one_line(f"{folder.name}: {error.reason}"))


def _unfinished(folder: Folder) -> State:
    """Return the state of a run that has not ended. Raises Damaged."""
    rows = read_metrics(folder, ended=False)
    epochs = read_environment(folder).get("epochs") or 0
    if len(rows) > epochs:
        raise Damaged(folder / "metrics.jsonl", f"{len(rows)} of {epochs} epochs")
    recent = [row["seconds"] for row in rows[-5:]]
    left = sum(recent) / len(recent) * (epochs - len(rows)) if recent else None
    running = owner_alive(folder)
    detail = f"epoch {len(rows)}/{epochs}" + (f", {duration(left)} left" if running and left is not None else "")
    return State("running" if running else "interrupted", detail, left=left)


def overview(suite: Suite, results: Path) -> str:
    """Return a line a run of the suite, then the damaged folders that no line shows, the counts, and the time to go.

    A damaged folder whose config cannot be told may be of the suite.
    """
    known = {cell.config_id: State() for cell in suite.cells}
    damaged = []
    for folder in run_folders(results):
        ids = config_ids_of(folder)
        if not ids & known.keys() and (ids or not _begun(folder)):
            continue
        found = state(folder)
        if found.name == "damaged":
            damaged.append(found)
        for id in ids & known.keys():
            known[id] = max(known[id], found, key=lambda state: STATES.index(state.name))
    names: dict[str, str] = {}
    for cell in suite.cells:
        axes = [cell.axes[name] for name in (*suite.rows, *suite.columns)]
        names.setdefault(cell.config_id, "  ".join([*axes, f"seed {cell.axes.get('seed', '0')}"]))
    width = max(map(len, names.values()))
    lines = [f"{name:<{width}}  {known[id].name:<11}  {known[id].detail}".rstrip() for id, name in names.items()]
    lines += [f"damaged  {found.detail}" for found in damaged if found not in known.values()]
    counts = Counter(found.name for found in known.values())
    lines.append("")
    lines.append(
        ", ".join(f"{counts[name]} {name}" for name in reversed(STATES) if counts[name])
        + f" of {len(known)} runs at scale={suite.scale}"
    )
    taken = [found.taken for found in known.values() if found.taken]
    if taken and counts["done"] < len(known):
        typical = sum(taken) / len(taken)
        rest = sum(found.left or typical for found in known.values() if found.name != "done")
        lines.append(f"about {duration(rest)} of computing to go, one run at a time")
    return "\n".join(lines)


def _begun(folder: Folder) -> bool:
    """Return whether there is more in a folder than a process that is about to begin."""
    try:
        return (
            isinstance(folder, Path) and not owner_alive(folder) and any(name != "lock" for name in os.listdir(folder))
        )
    except NotADirectoryError:
        return False
    except OSError:
        return True


def main(arguments: Sequence[str]) -> int:
    """Print the overview; return the exit status: 0 with runs missing, 2 for a mistake."""

    def work() -> None:
        suite = suite_of(arguments)
        print(overview(suite, Path(suite.results)))

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
