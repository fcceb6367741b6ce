"""MLflow."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from typing import Any

from .base import Mirrored, Tracker

RUN = "alignprune.run"  # the tag that has a run's id
ENDS = {"finished": "FINISHED", "failed": "FAILED"}  # all others can be gone on with


class MLflow(Tracker):
    """A run of an MLflow experiment; a run that is gone on with here is gone on with there."""

    service = "MLflow"
    extra = "mlflow"

    def __init__(self, *, uri: str | None, experiment: str) -> None:
        self.uri, self.experiment = uri, experiment

    def start(self, run: Mirrored) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        results = run.folder.parents[1]
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results.resolve() / 'mlflow.db'}"
        with (results / "mlflow.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two runs would make the tables, or the experiment, at once
            self.client = MlflowClient(tracking_uri=uri)
            known = self.client.get_experiment_by_name(self.experiment)
            experiment = known.experiment_id if known else self.client.create_experiment(self.experiment)
        before = self.client.search_runs([experiment], f"tags.`{RUN}` = '{run.id}'", max_results=1)
        if before and run.epochs:
            self.run = before[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return
        tags = {RUN: run.id, **({"group": run.group} if run.group else {})}
        self.run = self.client.create_run(experiment, run_name=run.id, tags=tags).info.run_id
        self.client.log_batch(self.run, params=[Param(key, str(value)[:500]) for key, value in run.flat().items()])

    def log(self, row: Mapping[str, Any], epoch: int) -> None:
        from mlflow.entities import Metric

        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self.client.log_batch(self.run, [Metric(key, value, 0, epoch) for key, value in numbers.items()])

    def finish(self, summary: Mapping[str, Any]) -> None:
        for key, value in summary.items():
            self.client.set_tag(self.run, f"summary.{key}", str(value))
        self.client.set_terminated(self.run, ENDS.get(summary["status"], "KILLED"))
