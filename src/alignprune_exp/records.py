"""What a run leaves behind: its schema, and reading it. What is damaged is refused with a reason, never guessed at."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .console import one_line
from .errors import UsageError
from .files import write_atomically
from .runs import CHECKPOINTS, Folder, own_folders, owner_alive, read_json

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Epochs = Annotated[int, Field(ge=1, lt=2**31)]
Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]

PROBABILITIES = "probabilities.parquet"  # a row a training sample: index, and p_0 … of every class
DYNAMICS = {"epoch": "int", "kind": "text", "name": "text", "group": "text", "x": "float", "value": "float"}
SAMPLES = {"index": "int", "loss": "score", "times_selected": "int"}
MAYBE_UNKNOWN = {"path": "text", "label": "int", "clean_label": "int", "predicted": "int"}  # of all samples, or none
FAMILIES = {  # of numbers, by how their keys begin: from where to where
    "auroc_": (0.0, 1.0),
    "test_accuracy_": (0.0, 100.0),
    "test_": (-math.inf, math.inf),
    "kept_noise_": (0.0, 1.0),
    "noise_estimate": (0.0, 1.0),
    "seconds_": (0.0, math.inf),
}


@dataclass(frozen=True)
class Metric:
    """What is measured on samples that are not trained on.

    Attributes:
        name: as records have it, after ``test_``.
        words: as tables and figures say it.
        unit: such as ``%``, or nothing.
        higher: whether more is better.
        digits: that are worth showing after the point.
    """

    name: str
    words: str
    unit: str = ""
    higher: bool = True
    digits: int = 1

    def measures_as(self, other: Metric) -> bool:
        """Return whether values of both may be compared."""
        return (self.name, self.unit, self.higher) == (other.name, other.unit, other.higher)

    def said(self, value: float | None, digits: int | None = None) -> str:
        """Return a value with its unit."""
        if value is None:
            return "–"
        return f"{value:.{self.digits if digits is None else digits}f}" + (f" {self.unit}" if self.unit else "")

    def signed(self, value: float) -> str:
        """Return a difference, with its sign and without the unit."""
        return f"{value:+.{self.digits}f}"


ACCURACY = Metric("accuracy", "test accuracy", "%")  # the headline of a record that names none


def headline(summary: Mapping[str, Any]) -> Metric:
    """Return the metric that a run is judged by."""
    named = {key.name: summary[told] for key in fields(Metric) if (told := f"headline_{key.name}") in summary}
    return Metric(**named) if named else ACCURACY


class Damaged(UsageError):
    """A file of a record is not what a run writes there.

    Attributes:
        folder: the record's.
        reason: the file's name and what is wrong with it, without any path.
    """

    def __init__(self, path: Folder, what: str) -> None:
        again = "run it again with force=true, or remove the folder"
        remedy = again if isinstance(path, Path) else "take it back with git"
        super().__init__(one_line(f"{path} is damaged ({what}); {remedy}"))
        self.folder, self.reason = path.parent, one_line(f"{path.name}: {what}")


class Values(BaseModel):
    """One JSON object of a record. What stands there beside the schema is scalar, and finite where it is a number."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, float | Whole | bool | str | None]

    @model_validator(mode="after")
    def _check_families(self) -> Values:
        for key, value in (self.__pydantic_extra__ or {}).items():
            ends = next((ends for family, ends in FAMILIES.items() if key.startswith(family)), None)
            if ends is None or value is None:
                continue
            low, high = ends
            if isinstance(value, (bool, str)) or not low <= value <= high:
                among = "" if math.isinf(low) else f" from {low:g} to {high:g}"
                raise ValueError(f"{key} is {_shown(value)}, which is no number{among}")
        return self


class FinishedSummary(Values):
    """``summary.json`` of a run that finished. Accuracies in per cent.

    ``headline_…`` describe the `Metric` that it is judged by, where that is not the accuracy.
    """

    id: str
    config_id: str
    status: Literal["finished"]
    dataset: str
    noise: str
    noise_rate: Share | None
    pairing: Literal["verified", "unverified"] | None = None
    headline_name: str | None = None
    headline_words: str = ""
    headline_unit: str = ""
    headline_higher: bool = True
    headline_digits: Annotated[int, Field(ge=0, le=9)] = 1
    pruner: str
    score: str | None
    window: Epochs | None
    seed: Count
    scale: str
    epochs: Epochs
    warmup_epochs: Count = 0
    planned_epochs: Epochs | None = None  # those that a shorter run is shorter than
    samples: Annotated[Count, Field(ge=1)] | None = None
    test_accuracy_final: Percent | None = None
    test_accuracy_best: Percent | None = None
    saved: Annotated[float, Field(le=1)]  # below 0 where a warm-up cost more than the choice saved
    kept_noise_mean: Share | None
    kept_noise_weighted_mean: Share | None
    detection_auroc_last: Share | None
    seconds_train: Seconds
    seconds_total: Seconds
    samples_per_second: Seconds | None
    commit: str | None
    finished_at: str

    @model_validator(mode="after")
    def _check_headline(self) -> FinishedSummary:
        values = self.model_dump(exclude_unset=True)
        for key in ("headline_name", "headline_words"):
            if values.get(key) is None and any(other.startswith("headline_") for other in values):
                raise ValueError(f"{key} is missing")
        for key in (f"test_{headline(values).name}_{which}" for which in ("final", "best")):
            if values.get(key) is None:
                raise ValueError(f"{key} is missing")
        return self


class FailedSummary(Values):
    """``summary.json`` of a run that could not go on."""

    id: str
    config_id: str
    status: Literal["failed"]
    error: str


class Environment(Values):
    """``environment.json``."""

    config_id: str | None = None
    epochs: Epochs | None = None
    precision: str
    data_fingerprint: str
    command: str
    commit: str | None
    mirrored: bool = False  # from a service that has no dynamics


class EpochRow(Values):
    """A line of ``metrics.jsonl``: one epoch."""

    epoch: Count
    ranked_by: str | None
    train_loss: float
    test_accuracy: Percent | None = None
    test_loss: float | None
    lr: Annotated[float, Field(ge=0)]
    kept_fraction: Share
    kept_noise: Share | None
    kept_noise_weighted: Share | None
    reference_loss: float | None
    reference_noise: Share | None = None
    score_mean: float | None
    low_fraction: Share | None
    samples_seen: Count
    seconds: Seconds
    seconds_select: Seconds
    seconds_train: Seconds
    seconds_refresh: Seconds
    seconds_reference: Seconds
    seconds_score: Seconds
    seconds_test: Seconds

    @model_validator(mode="after")
    def _check_parts(self) -> EpochRow:
        parts = ("select", "train", "refresh", "reference", "score", "test")
        if (spent := sum(getattr(self, f"seconds_{part}") for part in parts)) > self.seconds * (1 + 1e-9):
            raise ValueError(f"its parts take {_shown(spent)}, of {_shown(self.seconds)} seconds in all")
        return self


@dataclass(frozen=True)
class Record:
    """One finished run: its folder, and what ``summary.json``, ``environment.json`` and ``metrics.jsonl`` hold."""

    folder: Folder
    summary: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]


def read_record(folder: Folder) -> Record | None:
    """Return the record of a run; None of one that has not finished. Raises Damaged.

    ``summary.json`` and ``metrics.jsonl`` must tell the same of the run.
    """
    summary = read_summary(folder)
    if summary is None:
        _refuse_lost(folder)
    if summary is None or summary["status"] == "failed":
        return None
    record = Record(folder, summary, read_environment(folder), read_metrics(folder))
    environment, epochs = record.environment, summary["epochs"] + summary.get("warmup_epochs", 0)
    if environment.get("config_id", summary["config_id"]) != summary["config_id"]:
        raise Damaged(folder / "environment.json", f"of config {_shown(environment['config_id'])}")
    if len(record.rows) != epochs:
        raise Damaged(folder / "metrics.jsonl", f"{len(record.rows)} of {epochs} epochs")
    if (key := f"test_{headline(summary).name}") not in record.rows[0]:  # what a row has the later ones have too
        raise Damaged(folder / "metrics.jsonl", f"line 1: {key} is missing")
    for key, value in _retold(record):
        told = summary.get(key)
        if told != value and (told is None or value is None or not math.isclose(told, value, abs_tol=1e-9)):
            raise Damaged(folder / "metrics.jsonl", f"{key} {_shown(value)}, where summary.json has {_shown(told)}")
    return record


def finished_configs(results: Path) -> dict[str, set[str]]:
    """Return the data fingerprints of the finished runs in ``results/runs`` by config id; damaged ones are none."""
    found: dict[str, set[str]] = {}
    for folder in own_folders(results):
        with suppress(Damaged):
            if (record := read_record(folder)) is not None:
                found.setdefault(record.summary["config_id"], set()).add(record.environment["data_fingerprint"])
    return found


def planned_epochs(summary: Mapping[str, Any]) -> int:
    """Return the epochs on everything that what a run saves is counted against."""
    return summary.get("planned_epochs") or summary["epochs"]


def _retold(record: Record) -> Iterator[tuple[str, float | None]]:
    """Yield what the rows say of keys of the summary."""
    summary, rows, last = record.summary, record.rows, record.rows[-1]
    yield "seconds_total", sum(row["seconds"] for row in rows)
    yield "seconds_train", sum(row["seconds"] - row["seconds_test"] for row in rows)
    if samples := summary.get("samples"):
        yield "saved", 1 - last["samples_seen"] / (samples * planned_epochs(summary))
    if (ranked := f"auroc_{summary['score']}") in last:
        yield "detection_auroc_last", last[ranked]
    judged = headline(summary)
    for key in last:
        if key.startswith(f"test_{judged.name}"):
            tested = [row[key] for row in rows[summary.get("warmup_epochs", 0) :] if row.get(key) is not None]
            yield f"{key}_final", last[key]
            yield f"{key}_best", (max if judged.higher else min)(tested, default=None)


def _refuse_lost(folder: Folder) -> None:
    """Raise Damaged for a run that is not running and has come so far that it has ended or left a checkpoint."""
    if any((folder / name).exists() for name in CHECKPOINTS) or owner_alive(folder):
        return
    rows = read_metrics(folder, ended=False)
    before_the_last = sum(row["seconds"] for row in rows[:-1])  # a kill may have come between it and its checkpoint
    if rows and (
        len(rows) >= (read_environment(folder).get("epochs") or 0)
        or before_the_last > read_config(folder).get("checkpoint_seconds", 0)
    ):
        raise Damaged(folder / "summary.json", "not there, nor is a checkpoint")


def read_summary(folder: Folder) -> dict[str, Any] | None:
    """Return ``summary.json`` of an ended run; None where there is none. Raises Damaged."""
    path = folder / "summary.json"
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from None
    summary = _object(path, text)
    _check(FailedSummary if summary.get("status") == "failed" else FinishedSummary, summary, path)
    if summary["id"] != _id_of(folder):
        raise Damaged(path, f"of run {_shown(summary['id'])}")
    return summary


def read_environment(folder: Folder) -> dict[str, Any]:
    """Return ``environment.json``. Raises Damaged."""
    path = folder / "environment.json"
    environment = _object(path, _read(path))
    _check(Environment, environment, path)
    return environment


def read_metrics(folder: Folder, ended: bool = True) -> list[dict[str, Any]]:
    """Return the rows of ``metrics.jsonl``, by epoch. Raises Damaged.

    A run that has not ``ended`` may have none yet, and may have been cut off in its last line, which is left out.
    """
    path = folder / "metrics.jsonl"
    if not ended and not path.exists():
        return []
    text = _read(path)
    lines = text.splitlines()
    if not ended and not text.endswith(b"\n"):
        del lines[-1:]
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        where = f"line {number + 1}: "
        row = _object(path, line, where)
        _check(EpochRow, row, path, where)
        if row["epoch"] != number:
            raise Damaged(path, f"{where}epoch {row['epoch']} in the place of {number}")
        if rows and (lacking := rows[-1].keys() - row.keys()):
            raise Damaged(path, f"{where}{min(lacking)} is missing")
        rows.append(row)
    return rows


def config_ids_of(folder: Folder) -> set[str]:
    """Return the id of a run's config; of a damaged record none, where it is not told, or two that are told."""
    told = ((read_json(folder / name) or {}).get("config_id") for name in ("summary.json", "environment.json"))
    return {id for id in told if isinstance(id, str)}


def read_config(folder: Folder) -> dict[str, Any]:
    """Return ``config.yaml``, with its nodes ``dataset``, ``noise`` and ``paths``. Raises Damaged."""
    from omegaconf import OmegaConf

    path = folder / "config.yaml"
    data = _read(path)
    try:
        config: Any = OmegaConf.to_container(OmegaConf.create(data.decode()))
    except Exception:  # OmegaConf and YAML raise many kinds on damaged files
        config = None
    for node in ("dataset", "noise", "paths"):
        if not isinstance(config, dict) or not isinstance(config.get(node), dict):
            raise Damaged(path, f"no config with {node}")
    return config


def read_dynamics(record: Record) -> pd.DataFrame:
    """Return ``dynamics.parquet`` as `diagnostics.dynamics` describes it; of a mirrored run nothing. Raises Damaged."""
    import pandas as pd

    if record.environment.get("mirrored"):
        return pd.DataFrame(columns=list(DYNAMICS))
    path = record.folder / "dynamics.parquet"
    table, _ = _read_parquet(path)
    for column, kind in DYNAMICS.items():
        _check_column(path, table, column, kind)
    frame = table.to_pandas(ignore_metadata=True)
    if (there := set(frame["epoch"])) != set(range(len(record.rows))):
        raise Damaged(path, f"{len(there)} of {len(record.rows)} epochs")
    return frame


def read_samples(folder: Folder) -> pd.DataFrame:
    """Return ``samples.parquet`` of a finished run. Raises UsageError where there is none, and Damaged."""
    path = folder / "samples.parquet"
    if not path.exists():
        published = " (published records have none)" if not isinstance(folder, Path) else ""
        raise UsageError(f"{path} is not there; it is written when a run finishes{published}")
    table, facts = _read_parquet(path)
    labelled = {"label": "int"} if headline(read_summary(folder) or {}) == ACCURACY else {}
    for column, kind in (SAMPLES | labelled).items():
        _check_column(path, table, column, kind)
    for column in table.column_names:
        if column.startswith("score_"):
            _check_column(path, table, column, "score")
        elif column in MAYBE_UNKNOWN and table[column].null_count < len(table):
            _check_column(path, table, column, MAYBE_UNKNOWN[column])
    frame = table.to_pandas(ignore_metadata=True)
    if not frame["index"].is_unique:
        raise Damaged(path, "an index is there twice")
    classes = facts.get("classes", "")
    _check_ranges(path, frame, int(classes) if classes.isdecimal() and len(classes) < 10 else 2**31)
    _check_with_summary(path, frame, read_summary(folder))
    return frame


def read_probabilities(folder: Folder, samples: pd.DataFrame) -> tuple[NDArray[np.float32], list[str]] | None:
    """Return the class probabilities (n, C) of a run's ``samples``, in their order, and the classes' names.

    None where the run has kept none. Raises Damaged.
    """
    path = folder / PROBABILITIES
    if not path.exists():
        return None
    table, facts = _read_parquet(path)
    try:
        names = json.loads(facts.get("names", ""))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Damaged(path, "no names of the classes")
    columns = [f"p_{number}" for number in range(len(names))]
    for column, kind in {"index": "int", **dict.fromkeys(columns, "float")}.items():
        _check_column(path, table, column, kind)
    if table["index"].to_pylist() != samples["index"].tolist():
        raise Damaged(path, "of other samples than samples.parquet")
    found = np.column_stack([table[column].to_numpy() for column in columns]).astype(np.float32)
    if found.min() < 0 or np.abs(found.sum(1, dtype=np.float64) - 1).max() > 0.01:
        raise Damaged(path, "values that are no probabilities")
    return found, names


def _check_ranges(path: Folder, frame: pd.DataFrame, classes: int) -> None:
    labels = (0, classes - 1)
    ranges = {"label": labels, "clean_label": labels, "predicted": (-1, classes - 1)}
    for column, (low, high) in {**ranges, "index": (0, math.inf), "times_selected": (0, math.inf)}.items():
        known = frame[column].dropna() if column in frame else frame["index"][:0]
        if len(known) and (known.min() < low or known.max() > high):
            raise Damaged(path, f"{column} from {known.min()} to {known.max()}, where {low} to {high} may be")


def _check_with_summary(path: Folder, frame: pd.DataFrame, summary: Mapping[str, Any] | None) -> None:
    if summary is None or summary["status"] == "failed":
        raise UsageError(f"{path.parent} is no run that finished; the same command goes on with it")
    n = summary.get("samples") or len(frame)
    if len(frame) != n or n == 0:
        raise Damaged(path, f"{len(frame)} of {n} samples")
    saved = 1 - int(frame["times_selected"].sum()) / (n * planned_epochs(summary))
    if not math.isclose(saved, summary["saved"], abs_tol=1e-9):
        raise Damaged(path, f"saved {_shown(saved)}, where summary.json has {_shown(summary['saved'])}")


def write_parquet(path: Path, table: pa.Table, **facts: object) -> None:
    """Write a table of a run, with checksums, and with the run's id and ``facts`` in its metadata."""
    import pyarrow.parquet as pq

    told = {"run": _id_of(path.parent)} | {key: str(fact) for key, fact in facts.items()}
    named = table.replace_schema_metadata(told)
    write_atomically(path, lambda file: pq.write_table(named, file, write_page_checksum=True))


def _read_parquet(path: Folder) -> tuple[pa.Table, dict[str, str]]:
    """Return a table of a run, and the facts in its metadata, which older versions did not write. Raises Damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _read(path)
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        table.validate(full=True)
        if "" in table.column_names:  # which raises for one that is no UTF-8
            raise ValueError("a column without a name")
        facts = {key.decode(): fact.decode() for key, fact in (table.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, ValueError):
        raise Damaged(path, "cannot be read as Parquet") from None
    if (owner := facts.get("run", _id_of(path.parent))) != _id_of(path.parent):
        raise Damaged(path, f"of run {_shown(owner)}")
    return table, facts


def _check_column(path: Folder, table: pa.Table, column: str, kind: str) -> None:
    """Raise Damaged unless the column is there once with ``int``, ``text``, finite ``float``, or ``score`` (or NaN)."""
    from pyarrow import types

    if table.column_names.count(column) != 1:
        raise Damaged(path, f"{column} is there {table.column_names.count(column)} times")
    values = table[column]
    if kind == "int":
        right = types.is_integer(values.type)
    elif kind == "text":
        right = types.is_string(values.type) or types.is_large_string(values.type)
    else:
        right = types.is_floating(values.type)
    if not right:
        raise Damaged(path, f"{column} holds {values.type}, where {kind} is due")
    numbers = values.to_numpy() if types.is_floating(values.type) else np.zeros(0)
    gaps = values.null_count or np.isnan(numbers).any()
    if (gaps and kind != "score") or np.isinf(numbers).any():
        raise Damaged(path, f"{column} has values that are no {kind}")


def _id_of(folder: Folder) -> str:
    """Return the id of a folder's run; one that was set aside is called ``<id>~1``."""
    return folder.name.partition("~")[0]


def _read(path: Folder) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Damaged(path, "not there") from None
    except OSError as error:
        raise Damaged(path, f"cannot be read: {error.strerror}") from None


def _object(path: Folder, text: bytes, where: str = "") -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise Damaged(path, f"{where}no JSON object")
    return values


def _check(schema: type[Values], values: Mapping[str, Any], path: Folder, where: str = "") -> None:
    try:
        schema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        return
    key, message = str(first["loc"][0]) if first["loc"] else "", first["msg"]
    if first["type"] == "missing":
        raise Damaged(path, f"{where}{key} is missing")
    if first["type"] == "value_error":
        raise Damaged(path, f"{where}{first['ctx']['error']}")
    raise Damaged(path, f"{where}{key} is {_shown(first['input'])}: {message[0].lower()}{message[1:]}")


def _shown(value: object) -> str:
    """Return a value out of a record in one short line of ASCII."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:39]}..."
