"""How far a suite is: python -m alignprune_exp.status suite=main scale=cpu"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .console import command, duration, one_line
from .packs import packed_runs
from .records import Damaged, Metric, config_ids_of, headline, read_environment, read_metrics, read_record, read_summary
from .runs import Folder, owner_alive, run_folders
from .suites import Suite, suite_of

STATES = {  # of several folders the last counts; each with its mark in the grid, and the colour of that
    "missing": ("·", "dim"),
    "published": ("○", "green"),
    "damaged": ("!", "bold red"),
    "interrupted": ("◌", "yellow"),
    "failed": ("✗", "red"),
    "running": ("◐", "cyan"),
    "done": ("●", "green"),
}
RANK = {name: rank for rank, name in enumerate(STATES)}
UNLIMITED = 100_000  # columns of a file, in which no line is cut


@dataclass(frozen=True)
class State:
    """What one run's folder says of it.

    A run that is done, or published, has a ``value`` of the metric that it is ``judged`` by, and has ``taken`` so many
    seconds; of others there may be a ``detail``, and the seconds that are ``left``.
    """

    name: str = "missing"
    detail: str = ""
    judged: Metric | None = None
    value: float = math.nan
    taken: float | None = None
    left: float | None = None


def state(folder: Folder) -> State:
    """Return the state of the run in a folder."""
    try:
        if (record := read_record(folder)) is not None:
            judged = headline(record.summary)
            final = record.summary[f"test_{judged.name}_final"]
            name = "done" if isinstance(folder, Path) else "published"
            return State(name, judged=judged, value=final, taken=record.summary["seconds_total"])
        if (summary := read_summary(folder)) is not None:
            return State("failed", one_line(summary["error"]))
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


def overview(suite: Suite, results: Path, file: IO[str]) -> None:
    """Print a grid with a mark for every seed, then what is to be said of single runs, the counts, and the time to go.

    Escape codes go to a terminal alone. A damaged folder whose config cannot be told may be of the suite.
    """
    console = Console(file=file, width=None if file.isatty() else UNLIMITED, markup=False, highlight=False, emoji=False)
    known, damaged = _found(suite, results)
    console.print(_grid(suite, known))
    counts = Counter(found.name for found in known.values())
    there = [name for name in reversed(STATES) if counts[name]]
    console.print(Text("  ").join(Text.assemble(STATES[name], f" {name}") for name in there))
    lines = _of_single_runs(suite, known)
    lines += [f"damaged  {found.detail}" for found in damaged if found not in known.values()]
    lines += [
        "",
        ", ".join(f"{counts[name]} {name}" for name in there) + f" of {len(known)} runs at scale={suite.scale}",
    ]
    taken = [found.taken for found in known.values() if found.taken is not None]
    if taken and counts["done"] < len(known):
        typical = sum(taken) / len(taken)
        rest = sum(typical if found.left is None else found.left for found in known.values() if found.name != "done")
        again = ", the published ones, which are trained again, among them" * bool(counts["published"])
        lines.append(f"about {duration(rest)} of computing to go, one run at a time{again}")
    console.print("\n".join(lines), soft_wrap=True)


def _found(suite: Suite, results: Path) -> tuple[dict[str, State], list[State]]:
    """Return the state of each of the suite's runs by config id, and those of all damaged folders."""
    known = {cell.config_id: State() for cell in suite.cells}
    damaged = []
    for folder in (*run_folders(results), *packed_runs(results / "records")):
        ids = config_ids_of(folder)
        if not ids & known.keys() and (ids or not _begun(folder)):
            continue
        found = state(folder)
        if found.name == "damaged":
            damaged.append(found)
        for id in ids & known.keys():
            known[id] = max(known[id], found, key=lambda state: RANK[state.name])
    return known, damaged


def _grid(suite: Suite, known: Mapping[str, State]) -> Table:
    """Return the suite's rows and columns: in each place a mark for every seed, and the mean of those that are done."""
    states: dict[str, dict[str, list[State]]] = {}
    for cell in suite.cells:
        row, column = suite.place(cell)
        states.setdefault(row, {}).setdefault(column, []).append(known[cell.config_id])
    columns = dict.fromkeys(column for of_row in states.values() for column in of_row)
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in (f"{' '.join(suite.rows)} / {' '.join(suite.columns)}", *columns):
        grid.add_column(Text(head))
    for row, of_row in states.items():
        grid.add_row(Text(row), *(_place(of_row.get(column, [])) for column in columns))
    return grid


def _place(states: Sequence[State]) -> Text:
    marks = Text.assemble(*(STATES[found.name] for found in states))
    done = [found for found in states if found.judged is not None]
    if done and (judged := done[0].judged) is not None:
        marks.append(f" {judged.said(sum(found.value for found in done) / len(done))}")
    return marks


def _of_single_runs(suite: Suite, known: Mapping[str, State]) -> list[str]:
    """Return a line for every run that has something to say, with its place in the grid."""
    names: dict[str, str] = {}
    for cell in suite.cells:
        if known[cell.config_id].detail:
            axes = [cell.axes[name] for name in (*suite.rows, *suite.columns)]
            names.setdefault(cell.config_id, "  ".join([*axes, f"seed {cell.seed}"]))
    width = max(map(len, names.values()), default=0)
    return [f"{name:<{width}}  {known[id].name:<11}  {known[id].detail}" for id, name in names.items()]


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
        overview(suite, Path(suite.results), sys.stdout)

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
