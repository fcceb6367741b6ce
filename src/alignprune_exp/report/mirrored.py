"""Finished runs of a Weights & Biases project as records, from what ``tracking`` mirrors of each run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError, reason_of
from ..records import EpochRow, FinishedSummary


def download(project: str, results: Path) -> None:
    """Write the finished runs of ``project``, as ``entity/project``, to ``results/runs/``; without their dynamics.

    Raises UsageError where the project cannot be read.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        for run in wandb.Api().runs(project, filters={"state": "finished"}):
            write_record(results / "runs" / run.id, dict(run.config), dict(run.summary), list(run.scan_history()))
    except Exception as error:  # the public API raises many kinds
        reason = reason_of(error).rstrip(".")
        raise UsageError(f"the Weights & Biases project {project} cannot be read: {reason}") from None


def write_record(
    folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any], history: list[dict[str, Any]]
) -> None:
    """Write one mirrored run as a record.

    A mirrored summary also holds the last value of every logged metric, and keys of the service's own. A row lacks
    what was None in it.
    """
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in history]
    logged = {key for row in rows for key in row} - {"seconds_train"}  # of which the summary has the sum
    own = {key: value for key, value in summary.items() if not key.startswith("_") and key not in logged}
    own = {key: own[key] for key in FinishedSummary.model_fields if key in own} | own  # in the order of other records
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(own))
    environment = (config.get("environment") or {}) | {"mirrored": True}
    (folder / "environment.json").write_text(json.dumps(environment))
    unknown = dict.fromkeys([key for row in rows for key in row] + [*EpochRow.model_fields])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(unknown | row) + "\n" for row in rows))
