"""How far a suite is: python -m alignprune_exp.status suite=main scale=cpu"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import duration
from .errors import UsageError
from .runs import RunFolder, owner_alive, read_json, run_folders
from .suites import Suite, suite_of


def state(folder: Path) -> dict[str, Any] | None:
    """Return what one run's folder says of it: ``config_id``, ``state``, ``seconds`` taken or ``left``, ``detail``."""
    if (summary := read_json(folder / "summary.json")) is not None:
        done = summary.get("status") == "finished"
        return {
            "config_id": summary.get("config_id"),
            "state": "done" if done else "failed",
            "seconds": summary.get("seconds_total"),
            "detail": f"{summary['test_accuracy_final']:.1f} %" if done else summary.get("error", ""),
        }
    environment = read_json(folder / "environment.json")
    if environment is None or "config_id" not in environment:
        return None
    rows = RunFolder(folder.parents[1], folder.name).metrics()
    epochs = environment["epochs"]
    recent = [row["seconds"] for row in rows[-5:]]
    left = sum(recent) / len(recent) * (epochs - len(rows)) if recent else None
    running = owner_alive(folder)
    detail = f"epoch {len(rows)}/{epochs}"
    if running and left is not None:
        detail += f", {duration(left)} left"
    return {
        "config_id": environment["config_id"],
        "state": "running" if running else "interrupted",
        "left": left,
        "detail": detail,
    }


def overview(suite: Suite, results: Path) -> str:
    """Return a line a run of the suite, then the counts and the time that the rest will take."""
    order = ("missing", "interrupted", "failed", "running", "done")
    known: dict[str, dict[str, Any]] = {}
    for folder in run_folders(results):
        found = state(folder)
        if found is None:
            continue
        before = known.get(found["config_id"], {"state": "missing"})
        if order.index(found["state"]) > order.index(before["state"]):
            known[found["config_id"]] = found
    runs: dict[str, tuple[str, dict[str, Any]]] = {}
    for cell in suite.cells:
        axes = [cell.axes[name] for name in (*suite.rows, *suite.columns)]
        name = "  ".join([*axes, f"seed {cell.axes.get('seed', '0')}"])
        runs.setdefault(cell.config_id, (name, known.get(cell.config_id, {"state": "missing", "detail": ""})))
    width = max(len(name) for name, _ in runs.values())
    lines = [f"{name:<{width}}  {found['state']:<11}  {found['detail']}".rstrip() for name, found in runs.values()]
    counts = Counter(found["state"] for _, found in runs.values())
    lines.append("")
    lines.append(
        ", ".join(f"{counts[name]} {name}" for name in reversed(order) if counts[name])
        + f" of {len(runs)} runs at scale={suite.cells[0].config.scale}"
    )
    taken = [found["seconds"] for _, found in runs.values() if found.get("seconds")]
    if taken and counts["done"] < len(runs):
        typical = sum(taken) / len(taken)
        rest = sum(found.get("left") or typical for _, found in runs.values() if found["state"] != "done")
        lines.append(f"about {duration(rest)} of computing to go, one run at a time")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the overview; return 0 with runs missing, 2 for a mistake."""
    try:
        suite = suite_of(arguments)
        print(overview(suite, Path(suite.cells[0].config.paths.results)), flush=True)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has read enough
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
