"""Run records to tables: one cell is the mean over seeds, and names the runs it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ..config import PRUNER, Config
from ..errors import UsageError
from ..records import ACCURACY, Damaged, Metric, Record, config_ids_of, headline, read_record
from ..runs import run_folders
from ..suites import Suite

CONFIDENCE = 0.95
PAPER_PRINTED = {"full": "–", "infobatch": "+0.6", "infobatch_das": "+2.7", "seta": "+0.0", "seta_das": "+0.7"}
SHARED = {  # by all runs of a table, if nothing is to be noted: keys of a record, and what several values are
    "commit": "commits",
    "epochs": "numbers of epochs",
    "precision": "precisions",
    "device": "devices",
    "torch": "versions of torch",
    "threads": "numbers of threads",
    "processes": "numbers of processes",
}
TIMES = ("seconds", "samples_per_second")  # how keys of times begin
Difference = tuple[float, float, float]  # of two rows: its mean, and the ends of its interval
OVERHEAD = ("select", "score", "reference", "refresh")  # parts of an epoch that are there for pruning's sake


class Records(dict[str, Record]):
    """The finished runs by config id.

    Attributes:
        damaged: what is wrong with each damaged record, and its config ids, as `config_ids_of` returns them.
        others: ids of runs left out since another run of the same config, on other data, stands in their place.
        twice: by the id of a run of which two records hold other numbers, what is to be said of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.damaged: list[tuple[Damaged, set[str]]] = []
        self.others: dict[str, str] = {}
        self.twice: dict[str, list[str]] = {}


@dataclass(eq=False)
class Table:
    """A suite's numbers at one scale.

    Attributes:
        best: whether the best value of the headline counts, in place of the final one.
        long: one row a run: suite, scale, row, column, seed, every number of the summary, run id, and what its
            config, environment and metrics add (reference_size, precision, data_fingerprint, overhead, auroc_<score>
            at the end).
        records: the record of each run in it, by id.
        notes: footnotes.
        undrawn: why the figures lack what they should show of a run, by its id; known once they are drawn.
    """

    suite: Suite
    scale: str
    long: pd.DataFrame
    best: bool = False
    records: dict[str, Record] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    undrawn: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The table's file name without its suffix."""
        return f"{self.suite.name}_{self.scale}" + ("_best" if self.best else "")

    @cached_property
    def metric(self) -> Metric:
        """The headline of its runs."""
        return headline(next(iter(self.records.values())).summary) if self.records else ACCURACY

    @property
    def key(self) -> str:
        """The key of the summary that the table shows."""
        return f"test_{self.metric.name}_{'best' if self.best else 'final'}"

    @property
    def measured(self) -> str:
        """What that is, in words, such as "test accuracy in %"."""
        return self.metric.words + (f" in {self.metric.unit}" if self.metric.unit else "")

    @property
    def footnotes(self) -> list[str]:
        """The notes, and what is not drawn."""
        if not self.undrawn:
            return self.notes
        return [*self.notes, f"Not drawn, since their dynamics are damaged: {_with_reasons(self.undrawn)}."]

    @property
    def points(self) -> str:
        """What a difference is in, such as "points of accuracy"."""
        return ("points of " if self.metric.unit == "%" else "") + self.metric.name

    @cached_property
    def places(self) -> list[tuple[str, str, dict[str, str]]]:
        """The row, the column and the axes of every cell, seeds aside."""
        found = {self.suite.place(cell): cell.axes for cell in self.suite.cells}
        return [(row, column, axes) for (row, column), axes in found.items()]

    @cached_property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(row for row, _, _ in self.places))

    @cached_property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for _, column, _ in self.places))

    @cached_property
    def focus(self) -> str:
        """The column that is looked at first: of those that compare rows the one whose noise is nearest to one half."""

        def worth(column: str) -> tuple[bool, float, int]:
            runs = self.long[self.long["column"] == column]
            rate = float(pd.to_numeric(runs["noise_rate"]).fillna(0).mean()) if len(runs) else -1.0
            return runs["row"].nunique() > 1, -round(abs(rate - 0.5), 2), len(runs)

        return max(self.columns, key=worth)

    @cached_property
    def seeds(self) -> int:
        return len({cell.seed for cell in self.suite.cells})

    @property
    def progress(self) -> str:
        """How many of its runs there are; a run at two places counts twice, as it is shown."""
        places = {(self.suite.place(cell), cell.config_id) for cell in self.suite.cells}
        return f"{len(self.long)} of {len(places)} runs"

    @property
    def cells(self) -> list[tuple[str, str, pd.DataFrame]]:
        """The row, the column and the runs of every cell that has any."""
        places = [(row, column) for row in self.rows for column in self.columns]
        return [(*place, self._cells[place]) for place in places if place in self._cells]

    def headed(self, column: str) -> str:
        """Return a column with the name of its axis, where its value alone says little."""
        return " ".join([*(name for name in self.suite.columns if "." in name), column])

    def runs(self, row: str, column: str) -> pd.DataFrame:
        """Return the finished runs of one cell, by seed."""
        return self._cells.get((row, column), self.long.iloc[:0])

    @cached_property
    def _cells(self) -> dict[tuple[str, str], pd.DataFrame]:
        cells = self.long.groupby(["row", "column"], sort=False)
        return {key: runs.sort_values("seed").set_index("seed") for key, runs in cells}

    def difference(self, row: str, other: str | None, column: str) -> Difference | None:
        """Return the paired difference of a row to another one in one column; see ``paired_difference``."""
        if other is None or row == other or (ours := self.runs(row, column)).empty:
            return None
        base = self.runs(other, column)
        return None if base.empty else paired_difference(ours[self.key], base[self.key])


def read_records(folders: Iterable[Path]) -> Records:
    """Return the finished runs under the results folders, by config id; the first folder's count.

    Two records of one run may come from different commits or machines, and hold different numbers: ``twice`` says so.
    Raises UsageError for two of one commit that differ in their result.
    """
    found = Records()
    for folder in folders:
        for path in run_folders(folder):
            try:
                record = read_record(path)
            except Damaged as error:
                found.damaged.append((error, config_ids_of(path)))
                continue
            if record is None:
                continue
            summary, key = record.summary, f"test_{headline(record.summary).name}_final"
            known = found.setdefault(summary["config_id"], record)
            if known.summary["id"] != summary["id"]:
                found.others[summary["id"]] = summary["config_id"]
            elif known.summary["commit"] == summary["commit"] and known.summary.get(key) != summary[key]:
                raise UsageError(f"{known.folder} and {path} hold one run with different results; remove one of them")
            elif (difference := _largest_difference(known, record)) is not None:
                found.twice.setdefault(summary["id"], []).append(
                    f"Of run {summary['id']} the record in {_place(known)} is shown, and not that in {_place(record)}, "
                    f"which holds other numbers; the largest difference: {difference}."
                )
    return found


def _largest_difference(one: Record, other: Record) -> str | None:
    """Return the number that differs most, for its size, between two records of one run, of those that tables show.

    Times differ always, and a number that one of them does not have was not yet written by its version.
    """
    ours, theirs = _numbers(one), _numbers(other)
    differing = {
        key: abs(ours[key] - theirs[key]) / max(abs(ours[key]), abs(theirs[key]))
        for key in sorted(ours.keys() & theirs.keys())
        if not math.isclose(ours[key], theirs[key], rel_tol=1e-9)
    }
    if not differing:
        return None
    key = max(differing, key=differing.__getitem__)
    return f"{key} is {ours[key]} in the first and {theirs[key]} in the second"


def _numbers(record: Record) -> dict[str, float]:
    known = record.summary | {key: value for key, value in record.rows[-1].items() if key.startswith("auroc_")}
    return {key: value for key, value in known.items() if isinstance(value, float | int) and not key.startswith(TIMES)}


def _place(record: Record) -> str:
    return "the mirrored project" if record.environment.get("mirrored") else str(record.folder)


def make_table(suite: Suite, scale: str, records: Mapping[str, Record], best: bool = False) -> Table:
    """Return the suite's table from whatever of its runs there is; ``best`` shows best values, not final ones.

    Its metric is that of the first run in the grid's order; a run that is judged by another one is left out.
    """
    there = [(cell, record) for cell in suite.cells if (record := records.get(cell.config_id)) is not None]
    metrics = {record.summary["id"]: headline(record.summary) for _, record in there}
    metric = next(iter(metrics.values()), ACCURACY)
    others = {id: other.words for id, other in metrics.items() if not metric.measures_as(other)}
    there = [(cell, record) for cell, record in there if record.summary["id"] not in others]
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}  # cells that are one run at one place are one
    for cell, record in there:
        row, column = suite.place(cell)
        place = {"suite": suite.name, "scale": scale, "row": row, "column": column}
        rows[row, column, record.summary["id"]] = {
            **place,
            **{key: value for key, value in record.summary.items() if key not in (*place, "finished_at")},
            **_beside(record, cell.config),
        }
    long = pd.DataFrame(list(rows.values()), columns=None if rows else ["row", "column", "seed", "id"])
    table = Table(suite, scale, long, best, {record.summary["id"]: record for _, record in there})
    if rows:
        _footnote(table)
    if others:
        table.notes.append(
            f"Left out, since a table has one metric, which is {table.measured} here: {_with_reasons(others)}; a suite "
            "of their own shows them."
        )
    if isinstance(records, Records):
        _footnote_skipped(table, records)
    return table


def _beside(record: Record, config: Config) -> dict[str, Any]:
    """Return what a record's config, environment and metrics add to its summary.

    What was kept is averaged here, so that it means the same in records of every version: over the epochs that the
    pruner makes shorter, which a score that holds out begins with later.
    """
    plan = PRUNER.make(config.pruner)
    held_out = record.summary.get("warmup_epochs", 0) - plan.warmup_epochs(config.epochs)
    environment, rows = record.environment, record.rows
    pruned = [row for row in rows if row["epoch"] - held_out in plan.pruned(config.epochs)]
    means = {
        "reference_noise": _mean("reference_noise", rows),
        **{f"{key}_mean": _mean(key, pruned) for key in ("kept_noise", "kept_noise_weighted")},
    }
    total = sum(row["seconds"] - row["seconds_test"] for row in rows)
    spent = {part: sum(row.get(f"seconds_{part}") or 0.0 for row in rows) for part in OVERHEAD}
    return {
        "precision": environment["precision"],
        "data_fingerprint": environment["data_fingerprint"],
        "overhead": sum(spent.values()) / total if total else None,
        **{f"share_{part}": seconds / total if total else None for part, seconds in spent.items()},
        **{key: mean for key, mean in means.items() if mean is not None},
        **{key: value for key, value in rows[-1].items() if key.startswith("auroc_")},
        "reference_size": config.reference.size,
    }


def _mean(key: str, rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean of a number over the epochs that know it."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(known)) if known else None


def as_number(value: str) -> float:
    """Return an axis's value; NaN where it is no number, such as ``null``."""
    return float(pd.to_numeric(value, errors="coerce"))


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (NaN for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def plus_minus(values: Sequence[float], digits: int) -> str:
    mean, std = mean_and_std(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def with_interval(metric: Metric, difference: Difference) -> str:
    """Return a difference and its interval, such as "+1.4 [+0.2, +2.6]"; of one pair that alone."""
    mean, low, high = map(metric.signed, difference)
    return mean if math.isnan(difference[1]) else f"{mean} [{low}, {high}]"


def capitalised(text: str) -> str:
    """Return a text with its first letter as a sentence has it."""
    return text[0].upper() + text[1:]


def paired_difference(ours: pd.Series, baseline: pd.Series) -> Difference | None:
    """Return the mean difference over common seeds with its 95 % interval; None without common seeds.

    Student's t below ten pairs, a percentile bootstrap (10,000 resamples, fixed seed) from there; with one pair
    the interval is NaN.
    """
    difference = (ours - baseline).dropna().to_numpy(float)
    if len(difference) == 0:
        return None
    mean, std = mean_and_std(difference.tolist())
    if len(difference) < 10:
        half = float(stdtrit(len(difference) - 1, (1 + CONFIDENCE) / 2)) * std / math.sqrt(len(difference))
        return mean, mean - half, mean + half
    draws = np.random.default_rng(0).choice(difference, (10_000, len(difference))).mean(1)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return mean, float(low), float(high)


def not_distinguishable_from_best(table: Table, column: str) -> set[str]:
    """Return the best row of a column, and those whose paired difference to it has an interval that contains 0.

    One seed is not the best where another row has several; where none has, it is the best alone (and its equals). Empty
    where only one row has runs.
    """
    known = {row: runs[table.key] for row in table.rows if not (runs := table.runs(row, column)).empty}
    if len(known) < 2:
        return set()
    several = {row: values for row, values in known.items() if len(values) > 1}
    means = {row: float(values.mean()) for row, values in (several or known).items()}
    best = (max if table.metric.higher else min)(means, key=lambda row: means[row])
    chosen = {row for row, mean in means.items() if mean == means[best]}
    pairs = {row: table.difference(row, best, column) for row in known}
    return chosen | {row for row, pair in pairs.items() if pair is not None and pair[1] <= 0 <= pair[2]}


def _footnote(table: Table) -> None:
    long, notes = table.long, table.notes
    told = [record.environment | record.summary for record in table.records.values()]
    for key, what in SHARED.items():
        values = {value for of_run in told if (value := of_run.get(key)) is not None}
        ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
        if len(shown := dict.fromkeys(short(value) if key == "commit" else str(value) for value in ordered)) > 1:
            notes.append(f"The runs come from several {what}: {', '.join(shown)}.")
    for (dataset, noise, column), runs in long.groupby(["dataset", "noise", "column"]):
        prints = sorted({str(value)[:8] for value in runs["data_fingerprint"].dropna()})
        if len(prints) > 1:
            notes.append(f"{column}: the runs saw different data ({dataset}, {noise}): {', '.join(prints)}.")
    if "pairing" in long and (long["pairing"] == "unverified").any():
        columns = ", ".join(sorted(long.loc[long["pairing"] == "unverified", "column"].unique()))
        notes.append(
            f"{columns}: the pairing of human labels with single images is unverified, since the image order is not "
            "proven to be the official one."
        )
    if table.suite.paper:
        printed = ", ".join(f"{row} {PAPER_PRINTED[row]}" for row in table.suite.paper if row in PAPER_PRINTED)
        notes.append(
            f"The paper prints as its average differences {printed}, which differ from the plain means of its own "
            "printed values; the tables show plain means throughout."
        )


def _footnote_skipped(table: Table, records: Records) -> None:
    of_suite = {cell.config_id for cell in table.suite.cells}
    lacking = of_suite - {record.summary["config_id"] for record in table.records.values()}
    damaged = {error.folder.name: error.reason for error, ids in records.damaged if not ids or ids & lacking}
    if damaged and lacking:
        table.notes.append(f"Left out, since their records are damaged: {_with_reasons(damaged)}.")
    if others := sorted(id for id, config_id in records.others.items() if config_id in of_suite):
        table.notes.append(f"Left out, since runs of the same configs on other data are shown: {', '.join(others)}.")
    table.notes += [note for id in sorted(records.twice.keys() & table.records) for note in records.twice[id]]


def _with_reasons(left_out: Mapping[str, str]) -> str:
    return ", ".join(f"{id} ({reason})" for id, reason in sorted(left_out.items()))


def short(commit: str) -> str:
    """Return a commit in eight digits, with ``+`` where its checkout was changed."""
    return commit if len(commit) <= 8 else commit[:8] + ("+" if commit.endswith("+") else "")
