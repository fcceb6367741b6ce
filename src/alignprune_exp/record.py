"""What a run writes: the row of an epoch, its dynamics, every sample's scores, the environment, and the summary."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .diagnostics import detection_auroc, dynamics, kept_noise
from .files import write_atomically
from .loop import Epoch, Loop
from .pruning import SCORES, Choice, DynamicPruning
from .pruning.signals import extent
from .records import ACCURACY, write_parquet
from .runs import RunFolder, write_text
from .setup import Setup

FROM_THE_BANK = ("loss", "das", "spearman", "cosine", "small_loss", "settled")  # scores that every run can log

Row = dict[str, Any]


class Journal:
    """The metrics of the epochs so far, and their dynamics: the process that trains holds them, the files are copies.

    A checkpoint carries it, so that a run never goes on from files that somebody else may have changed. While a run
    trains, it is its `Writing`'s alone.

    Args:
        run: the run's id, which ``dynamics.parquet`` carries.

    Attributes:
        rows: those of ``metrics.jsonl``, one an epoch.
        dynamics: the content of ``dynamics.parquet``; None before there is an epoch.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.rows: list[Row] = []
        self.dynamics: bytes | None = None
        self._lines: list[str] = []
        self._table: Any = None

    def add(self, row: Row, dynamics: list[Row]) -> None:
        """Take in an epoch: its row of metrics and its rows of dynamics."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.rows.append(row)
        self._lines.append(json.dumps(row, allow_nan=False) + "\n")
        new = pa.Table.from_pylist(dynamics)
        self._table = new if self._table is None else pa.concat_tables([self._table, new]).combine_chunks()
        file = io.BytesIO()
        pq.write_table(self._table.replace_schema_metadata({"run": self.run}), file, write_page_checksum=True)
        self.dynamics = file.getvalue()

    def write(self, folder: RunFolder) -> None:
        """Write both files, whole, whatever has become of them. Raises Failed if the folder is not owned any more."""
        with folder.owned():
            write_text(folder.path / "metrics.jsonl", "".join(self._lines))
            if (dynamics := self.dynamics) is not None:
                write_atomically(folder.path / "dynamics.parquet", lambda file: file.write(dynamics))

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": "".join(self._lines), "dynamics": self.dynamics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        self._lines = state["metrics"].splitlines(keepends=True)
        self.rows = [json.loads(line) for line in self._lines]
        self.dynamics = state["dynamics"]
        self._table = pq.read_table(io.BytesIO(self.dynamics)) if self.dynamics is not None else None


def epoch_row(setup: Setup, loop: Loop, now: Epoch) -> Row:
    """Return an epoch's row of ``metrics.jsonl``, whose AUROCs are still missing; see `completion`.

    It counts the epoch's seconds, and so comes after all that is done before the next epoch, `completion` included.
    """
    pruning, clock = loop.pruning, now.clock
    plain_noise, weighted_noise = kept_noise(now.selection, setup.noisy)
    clock.lap("diagnostics")
    looked_at = 0
    if now.number == pruning.first:
        clock.laps["select"] += loop.spent.seconds
        looked_at = loop.spent.samples
    passes = loop.network.learner.passes(now.number - pruning.first)
    return {
        "epoch": now.number,
        "phase": _phase(setup, now.number),
        "ranked_by": now.ranked_by,
        "train_loss": now.train_loss,
        **{name: now.tested.get(name) for name in metric_names(setup)},
        "lr": now.lr,
        "kept_fraction": len(now.selection.indices) / setup.n,
        "kept_noise": plain_noise,
        "kept_noise_weighted": weighted_noise,
        **{f"auroc_{name}": None for name in logged_scores(setup, pruning)},
        "reference_loss": now.reference_loss,
        "reference_noise": now.reference_noise,
        "score_mean": float(np.nanmean(now.ranking)) if now.ranked_by and not np.isnan(now.ranking).all() else None,
        "low_fraction": None if math.isnan(now.selection.low_fraction) else now.selection.low_fraction,
        "samples_seen": loop.trained,
        "samples_refreshed": now.refreshed,
        "samples_reference": now.forwarded,
        "samples_forwarded": passes * len(now.selection.indices) + now.refreshed + now.forwarded + looked_at,
        "seconds": clock.total(),
        **{f"seconds_{name}": seconds for name, seconds in clock.laps.items()},
    }


def completion(setup: Setup, loop: Loop, now: Epoch) -> Callable[[], tuple[Row, list[Row]]]:
    """Return what works out the AUROCs that an epoch's row lacks, and its rows of ``dynamics.parquet``.

    It goes by copies, so that the next epoch may train meanwhile.
    """
    pruning, noisy = loop.pruning, setup.noisy
    scores = bank_scores(setup, pruning)
    losses, reference = (each.cpu().numpy().copy() for each in (pruning.trajectories.last_N, now.reference))

    def complete() -> tuple[Row, list[Row]]:
        found = {} if noisy is None else {f"auroc_{name}": detection_auroc(scores[name], noisy) for name in scores}
        shown = extent(setup.config.recorded, setup.task.chance_loss)
        drawn = dynamics(now.number, losses, reference, scores, noisy, setup.task.strata, now.selection, shown)
        return found, drawn

    return complete


def _phase(setup: Setup, epoch: int) -> str | None:
    """Return what an epoch belongs to, in a run of several phases."""
    if not (setup.chooses_once or setup.holdout):
        return None
    return "train" if epoch >= setup.before else "holdout" if setup.holdout else "warmup"


def metric_names(setup: Setup) -> list[str]:
    """Return the names of what an epoch's evaluation gives."""
    names = [f"test_{metric.name}" for metric in setup.task.metrics]
    return [*names, "test_loss", *(name + suffix for suffix in setup.task.tests if suffix for name in names)]


def ranking_name(setup: Setup, pruning: DynamicPruning) -> str | None:
    """Return the name of the score that a run ranks by, if it ranks."""
    return pruning.score.name if setup.plan.uses_scores else None


def logged_scores(setup: Setup, pruning: DynamicPruning) -> list[str]:
    """Return the names of the scores that a run logs: those of every run, and the one that ranks."""
    return list(dict.fromkeys(filter(None, (*FROM_THE_BANK, ranking_name(setup, pruning)))))


def bank_scores(setup: Setup, pruning: DynamicPruning) -> dict[str, np.ndarray]:
    """Return every score (n,) that the bank can give after the last finished epoch, by name.

    A score that compares with the reference is there once its window is full.
    """
    ranking = ranking_name(setup, pruning)
    scores = {name: pruning.score if name == ranking else SCORES[name]() for name in logged_scores(setup, pruning)}
    finished = pruning.epoch - (pruning.first if setup.holdout else 0)
    if finished < setup.config.score.window or not setup.config.reference.aligns:
        scores = {name: score for name, score in scores.items() if not score.aligned}
    return dict(zip(scores, pruning.several_scores(list(scores.values())), strict=True))


def summary(setup: Setup, loop: Loop | None, choice: Choice | None, rows: Sequence[Row], error: str | None) -> Row:
    """Return ``summary.json``: what the run was and what came out, or the ``error`` that ended it."""
    config = setup.config
    pruned = [row for row in rows if row["epoch"] - 2 * setup.holdout in setup.plan.pruned(config.epochs)]
    of_training = rows[setup.before :]
    trained = rows[-1]["samples_seen"] if rows else 0
    planned = setup.plan.planned(config.epochs)
    seconds_steps = sum(row["seconds_train"] for row in rows)
    ranking = ranking_name(setup, loop.pruning) if loop is not None else None
    estimate = loop.pruning.noise_rate if loop is not None else math.nan
    return {
        "id": setup.id,
        "config_id": setup.config_id,
        "status": "failed" if error else "finished",
        **({"error": error} if error else {}),
        "dataset": config.dataset.name,
        "noise": config.noise.name,
        "noise_rate": None if setup.noisy is None else float(setup.noisy.mean()),
        **({} if math.isnan(estimate) else {"noise_estimate": estimate}),
        **setup.task.facts,
        "learner": config.learner.name,
        "pruner": config.pruner.name,
        "score": ranking,
        "window": config.score.window if ranking else None,
        "seed": config.seed,
        "scale": config.scale,
        "epochs": config.epochs,
        **({} if planned == config.epochs else {"planned_epochs": planned}),
        "samples": setup.n,
        **_tested(setup, of_training),
        **({"skipped": len(setup.task.skipped)} if setup.task.skipped else {}),
        "saved": 1 - trained / (setup.n * planned),
        **({"asked": int((loop.pruning.times_selected > 0).sum())} if loop is not None and setup.plan.asks else {}),
        "kept_noise_mean": _mean(row["kept_noise"] for row in pruned),
        "kept_noise_weighted_mean": _mean(row["kept_noise_weighted"] for row in pruned),
        "detection_auroc_last": rows[-1][f"auroc_{ranking}"] if rows and ranking else None,
        "seconds_train": sum(row["seconds"] - row["seconds_test"] for row in rows),
        "seconds_total": sum(row["seconds"] for row in rows),
        "samples_per_second": trained / seconds_steps if seconds_steps else None,
        **(_of_what_came_before(setup, loop, choice, rows) if setup.chooses_once or setup.holdout else {}),
        "commit": commit(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _tested(setup: Setup, rows: Sequence[Row]) -> Row:
    """Return final and best value of every metric on everything that is evaluated on."""
    headline = setup.task.metrics[0]
    found: Row = {} if headline == ACCURACY else {f"headline_{key}": value for key, value in asdict(headline).items()}
    for suffix in setup.task.tests:
        for metric in setup.task.metrics:
            values = [row[f"test_{metric.name}{suffix}"] for row in rows]
            known = [value for value in values if value is not None]
            found[f"test_{metric.name}{suffix}_final"] = values[-1] if values else None
            best = max if metric.higher else min
            found[f"test_{metric.name}{suffix}_best"] = best(known, default=None)
    return found


def _of_what_came_before(setup: Setup, loop: Loop | None, choice: Choice | None, rows: Sequence[Row]) -> Row:
    """Return what a summary says of the epochs before those of the run, and of samples chosen once."""
    return {
        "warmup_epochs": setup.before,
        "seconds_warmup": sum(row["seconds"] for row in rows[: setup.before]),
        "seconds_select": loop.spent.seconds if loop else 0.0,
        **({f"choice_{name}": value for name, value in choice.facts.items()} if choice else {}),
    }


def environment(setup: Setup, command: str, resumed_at: int) -> Row:
    """Return ``environment.json``: what the run's bits depend on beside its config."""
    cuda = setup.device.type == "cuda"
    return {
        "config_id": setup.config_id,
        "epochs": setup.epochs,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "torchvision": version("torchvision"),
        **(_of_cuda() if cuda else {}),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(setup.device) if cuda else platform.processor() or platform.machine(),
        "device_type": setup.device.type,
        "precision": setup.precision,
        "threads": setup.config.threads,
        "processes": setup.processes.size,
        "host": platform.node(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "commit": commit(),
        "command": command,
        "resumed_at_epoch": resumed_at,
        "data_fingerprint": setup.task.fingerprint,
    }


def _of_cuda() -> Row:
    from torch.utils import collect_env

    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver}


def write_samples(path: Path, setup: Setup, loop: Loop) -> None:
    """Write ``samples.parquet``: a row a training sample, with every score; empty where unknown."""
    import pandas as pd
    import pyarrow as pa

    pruning = loop.pruning
    empty = np.full(setup.n, np.nan, np.float32)
    scores = {f"score_{name}": empty for name in FROM_THE_BANK}
    scores |= {f"score_{name}": values for name, values in bank_scores(setup, pruning).items()}
    classes = setup.task.classes
    frame = pd.DataFrame(
        {
            **setup.task.columns(),
            **({} if classes is None else {"predicted": loop.predicted.cpu().numpy()}),
            "loss": pruning.trajectories.last_N.cpu().numpy(),
            **scores,
            "times_selected": setup.times_before + pruning.times_selected,
        }
    )
    facts = {} if classes is None else {"classes": len(classes)}
    write_parquet(path, pa.Table.from_pandas(frame, preserve_index=False), **facts)


def write_probabilities(path: Path, setup: Setup, probabilities: torch.Tensor) -> None:
    """Write ``probabilities.parquet``: a row a training sample, with the probability of every class (n, C)."""
    import pyarrow as pa

    columns = {f"p_{number}": values for number, values in enumerate(probabilities.cpu().numpy().T)}
    names = json.dumps([str(name) for name in setup.task.classes or ()])
    write_parquet(path, pa.table({"index": setup.task.columns()["index"], **columns}), names=names)


def commit() -> str | None:
    """Return the commit of this package's checkout, with ``+`` where it is changed; None outside one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes.stdout.strip() else "")


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
