"""Run records to tables: one cell is the mean over seeds, and names the runs it came from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ..config import PRUNER, Config
from ..console import one_line
from ..errors import UsageError
from ..files import csv
from ..records import ACCURACY, Damaged, Metric, Record, config_ids_of, headline, read_record
from ..runs import run_folders
from ..suites import Suite, label

CONFIDENCE = 0.95
MISSING = "–"
PAPER_DATASET = "cifar100"
PAPER_HEADING = "The paper's own values (CIFAR-100, ResNet-18, 200 epochs: its scale, not ours)"
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


@dataclass(frozen=True)
class Entry:
    """What stands at one place of a block: its text, whether it is bold, and the ids of the runs it came from.

    Where all numbers of a line come from the same runs, its name alone has them.
    """

    text: str
    bold: bool = False
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One table to show: a title, a sentence, the heads of its columns, and its rows of cells."""

    title: str
    caption: str
    head: list[str]
    body: list[list[Entry]]


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
        found = {
            (label(cell.axes, self.suite.rows), label(cell.axes, self.suite.columns)): cell.axes
            for cell in self.suite.cells
        }
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
        places = {
            (label(cell.axes, self.suite.rows), label(cell.axes, self.suite.columns), cell.config_id)
            for cell in self.suite.cells
        }
        return f"{len(self.long)} of {len(places)} runs"

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

    def difference(self, row: str, other: str, column: str) -> tuple[float, float, float] | None:
        """Return the paired difference of two rows in one column; see ``paired_difference``."""
        ours, base = self.runs(row, column), self.runs(other, column)
        if ours.empty or base.empty:
            return None
        return paired_difference(ours[self.key], base[self.key])

    def differences(self, column: str) -> dict[str, tuple[float, float, float]]:
        """Return the difference of every row to the baseline in one column, where they have seeds in common."""
        baseline = self.suite.baseline
        pairs = {row: self.difference(row, baseline, column) for row in self.rows if baseline not in (None, row)}
        return {row: pair for row, pair in pairs.items() if pair is not None}


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
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}  # cells that are one run at one place are one
    shown = {}
    for cell, record in there:
        if (id := record.summary["id"]) in others:
            continue
        shown[id] = record
        place = {
            "suite": suite.name,
            "scale": scale,
            "row": label(cell.axes, suite.rows),
            "column": label(cell.axes, suite.columns),
        }
        rows[place["row"], place["column"], id] = {
            **place,
            **{key: value for key, value in record.summary.items() if key not in (*place, "finished_at")},
            **_beside(record, cell.config),
            "reference_size": cell.config.reference.size,
        }
    long = pd.DataFrame(list(rows.values()), columns=None if rows else ["row", "column", "seed"])
    table = Table(suite, scale, long, best, shown)
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
    """Return what a record's environment and metrics add to its summary.

    What was kept is averaged here, so that it means the same in records of every version: over the epochs that the
    pruner makes shorter, which a score that holds out begins with later.
    """
    plan = PRUNER.make(config.pruner)
    held_out = record.summary.get("warmup_epochs", 0) - plan.warmup_epochs(config.epochs)
    environment, rows, pruned = record.environment, record.rows, plan.pruned(config.epochs)
    kept = {
        key: [row[key] for row in rows if row["epoch"] - held_out in pruned and row.get(key) is not None]
        for key in ("kept_noise", "kept_noise_weighted")
    }
    total = sum(row["seconds"] - row["seconds_test"] for row in rows)
    spent = {part: sum(row.get(f"seconds_{part}") or 0.0 for row in rows) for part in OVERHEAD}
    noise = [row["reference_noise"] for row in rows if row.get("reference_noise") is not None]
    return {
        "precision": environment["precision"],
        "data_fingerprint": environment["data_fingerprint"],
        "overhead": sum(spent.values()) / total if total else None,
        **{f"share_{part}": seconds / total if total else None for part, seconds in spent.items()},
        **({"reference_noise": float(np.mean(noise))} if noise else {}),
        **{f"{key}_mean": float(np.mean(known)) for key, known in kept.items() if known},
        **{key: value for key, value in rows[-1].items() if key.startswith("auroc_")},
    }


def as_number(value: str) -> float:
    """Return an axis's value; NaN where it is no number, such as ``null``."""
    return float(pd.to_numeric(value, errors="coerce"))


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (NaN for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def plus_minus(mean: float, std: float, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def paired_difference(ours: pd.Series, baseline: pd.Series) -> tuple[float, float, float] | None:
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

    With one seed the best alone (and its equals). Empty where only one row has runs.
    """
    means = {row: float(runs[table.key].mean()) for row in table.rows if not (runs := table.runs(row, column)).empty}
    if len(means) < 2:
        return set()
    best = (max if table.metric.higher else min)(means, key=lambda row: means[row])
    chosen = {row for row, mean in means.items() if mean == means[best]}
    for row in means:
        pair = table.difference(row, best, column)
        if pair is not None and pair[1] <= 0 <= pair[2]:
            chosen.add(row)
    return chosen


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


@cache
def blocks(table: Table) -> list[Block]:
    """Return everything a table shows: the headline, differences, the paper's values, cost, purity, and the runs."""
    word = "Best" if table.best else "Final"
    parts = [_headline(table, word)]
    if table.suite.baseline is not None:
        parts.append(_differences(table))
    if table.suite.paper:
        parts.append(_paper(table))
    return [*parts, *_elsewhere(table, word), _efficiency(table), _purity(table), _runs(table)]


def _axes(table: Table) -> tuple[str, str]:
    return " ".join(table.suite.rows), " ".join(table.suite.columns)


def _corner(table: Table) -> str:
    return " / ".join(_axes(table))


def _ids(*frames: pd.DataFrame) -> tuple[str, ...]:
    return tuple(dict.fromkeys(id for frame in frames if not frame.empty for id in frame["id"]))


def _headline(table: Table, word: str) -> Block:
    bold = {column: not_distinguishable_from_best(table, column) for column in table.columns}
    body = []
    for row in table.rows:
        cells = [Entry(row)]
        for column in table.columns:
            runs = table.runs(row, column)
            if runs.empty:
                cells.append(Entry(MISSING))
                continue
            spread = plus_minus(*mean_and_std(runs[table.key].tolist()), table.metric.digits)
            short = f" (n={len(runs)})" if len(runs) < table.seeds else ""
            text = f"{spread}{short}, {100 * runs['saved'].mean():.0f} % saved"
            cells.append(Entry(text, row in bold[column], tuple(runs["id"])))
        body.append([*cells, _mean_difference(table, row)])
    baseline = table.suite.baseline
    against = f"; mean Δ: plain mean over the columns of the difference to {baseline}" if baseline is not None else ""
    return Block(
        table.metric.name.capitalize(),
        f"{word} {table.measured}, mean ± std over {table.seeds} seed(s), and what was saved of the training"
        f"{against}. Bold: the best of a column, and those whose paired difference to it has a 95 % interval that "
        "contains 0.",
        [_corner(table), *table.columns, "mean Δ"],
        body,
    )


def _mean_difference(table: Table, row: str) -> Entry:
    baseline = table.suite.baseline
    if baseline is None or row == baseline:
        return Entry(MISSING)
    pairs = {column: table.difference(row, baseline, column) for column in table.columns}
    known = {column: pair[0] for column, pair in pairs.items() if pair is not None}
    if not known:
        return Entry(MISSING)
    partial = "" if len(known) == len(pairs) else f" ({len(known)} of {len(pairs)})"
    frames = [table.runs(which, column) for column in known for which in (row, baseline)]
    return Entry(f"{table.metric.signed(float(np.mean(list(known.values()))))}{partial}", runs=_ids(*frames))


def _differences(table: Table) -> Block:
    baseline = table.suite.baseline
    assert baseline is not None
    body = []
    for row in table.rows:
        if row == baseline:
            continue
        cells = [Entry(row)]
        for column in table.columns:
            pair = table.difference(row, baseline, column)
            if pair is None:
                cells.append(Entry(MISSING))
                continue
            ours, base = table.runs(row, column), table.runs(baseline, column)
            pairs = len(ours.index.intersection(base.index))
            mean, low, high = map(table.metric.signed, pair)
            interval = "" if math.isnan(pair[1]) else f" [{low}, {high}]"
            short = f" (n={pairs})" if pairs < table.seeds else ""
            cells.append(Entry(f"{mean}{interval}{short}", runs=_ids(ours, base)))
        body.append([*cells, _mean_difference(table, row)])
    return Block(
        f"Difference to {baseline}",
        f"In {table.points}, paired by seed, with a 95 % interval where there are two pairs or more "
        "(Student's t; a bootstrap from ten pairs).",
        [_corner(table), *table.columns, "mean Δ"],
        body,
    )


def _paper(table: Table) -> Block:
    paper, baseline = table.suite.paper, table.suite.baseline
    datasets = sorted(set(table.long.get("dataset", [PAPER_DATASET])))
    body = []
    for row in table.rows:
        if row not in paper:
            continue
        cells = [Entry(row)]
        for column in table.columns:
            value, runs = paper[row].get(column), table.runs(row, column)
            if value is None:
                cells.append(Entry(MISSING))
            elif runs.empty or set(runs["dataset"]) != {PAPER_DATASET}:
                cells.append(Entry(f"{value:.1f}"))
            else:
                cells.append(Entry(f"{value:.1f} (ours {runs[table.key].mean() - value:+.1f})", runs=_ids(runs)))
        mean = Entry(MISSING)
        if baseline in paper and row != baseline:
            shared = [column for column in paper[row] if column in paper[baseline]]
            mean = Entry(f"{np.mean([paper[row][column] - paper[baseline][column] for column in shared]):+.1f}")
        body.append([*cells, mean])
    brackets = (
        f"in brackets ours at scale={table.scale} minus the paper's"
        if PAPER_DATASET in datasets
        else f"our runs are on {', '.join(datasets)}, and so there is no difference to show"
    )
    return Block(
        PAPER_HEADING,
        f"{table.measured[0].upper()}{table.measured[1:]} as the paper prints it; {brackets}.",
        [_corner(table), *table.columns, "mean Δ"],
        body,
    )


def _elsewhere(table: Table, word: str) -> list[Block]:
    """Return the headline on what runs evaluate beside the test set, where there is such a thing."""
    begin, end = f"test_{table.metric.name}_", "_best" if table.best else "_final"
    keys = [key for key in table.long.columns if key.startswith(begin) and key.endswith(end) and key != table.key]
    if not keys:
        return []
    columns = {key.removeprefix(begin).removesuffix(end): (key, f".{table.metric.digits}f") for key in keys}
    words = f"{word} {table.measured.removeprefix('test ')} on further evaluation sets, mean over the seeds."
    return [_by_cell(table, "Other evaluation sets", words, columns)]


def _by_cell(table: Table, title: str, words: str, columns: Mapping[str, tuple[str, str]]) -> Block:
    """Return a block with a row for every cell with runs: the mean of each key, formatted."""
    body = []
    for row in table.rows:
        for column in table.columns:
            runs = table.runs(row, column)
            if runs.empty:
                continue
            cells = [Entry(row, runs=_ids(runs)), Entry(column)]
            for key, form in columns.values():
                values = pd.to_numeric(runs[key]).dropna() if key in runs else pd.Series(dtype=float)
                cells.append(Entry(format(values.mean(), form) if len(values) else MISSING))
            body.append(cells)
    return Block(title, words, [*_axes(table), *columns], body)


def _efficiency(table: Table) -> Block:
    warmed_up = "seconds_warmup" in table.long.columns
    columns = {
        "saved": ("saved", ".1%"),
        "seconds": ("seconds_total", ".0f"),
        **({"warm-up": ("seconds_warmup", ".0f")} if warmed_up else {}),
        "images/s": ("samples_per_second", ".0f"),
        "overhead": ("overhead", ".2%"),
        **{part: (f"share_{part}", ".2%") for part in OVERHEAD},
    }
    return _by_cell(
        table,
        "Efficiency",
        "saved: share of the training that pruning avoided; images/s: trained images a second of training steps; "
        "overhead: share of selection, scoring, reference evaluation and refreshing in the time without testing, "
        "and each of the four"
        + ("; warm-up: the seconds of what a static choice, or a score that holds out, trains first" * warmed_up + "."),
        columns,
    )


def _purity(table: Table) -> Block:
    scores = sorted(key for key in table.long.columns if key.startswith("auroc_"))
    columns = {
        "noise rate": ("noise_rate", ".3f"),
        **({"estimated": ("noise_estimate", ".3f")} if "noise_estimate" in table.long.columns else {}),
        "kept noise": ("kept_noise_mean", ".3f"),
        "weighted": ("kept_noise_weighted_mean", ".3f"),
        "saved": ("saved", ".1%"),
        "reference": ("reference_size", "g"),
        **({"reference noise": ("reference_noise", ".3f")} if "reference_noise" in table.long.columns else {}),
        **{f"AUROC {key.removeprefix('auroc_')}": (key, ".3f") for key in scores},
    }
    return _by_cell(
        table,
        "Purity",
        "kept noise: noisy share of what the pruning epochs trained on; weighted: the same by gradient weight; AUROC: "
        "how well each score, at the end, ranks noisy samples below clean ones (½ is chance); reference: the size of "
        "the reference set, a share of the samples below 1, else their number"
        + ("; reference noise: its noisy share, mean over the epochs" if "reference_noise" in table.long else "")
        + ("; estimated: the noise rate, by trusted losses or the score." if "noise_estimate" in table.long else "."),
        columns,
    )


def _runs(table: Table) -> Block:
    body = []
    for row in table.rows:
        for column in table.columns:
            if not (runs := table.runs(row, column)).empty:
                cells = [Entry(str(seed), runs=(id,)) for seed, id in runs["id"].items()]
                body += [[Entry(row), Entry(column), cell, Entry(cell.runs[0], runs=cell.runs)] for cell in cells]
    return Block("Runs", "Where each cell comes from.", [*_axes(table), "seed", "run"], body)


def wide_csv(table: Table) -> str:
    """Return one line a cell: the mean, spread, seeds, saved, difference with its interval, the paper's, runs."""
    lines = []
    bold = {column: not_distinguishable_from_best(table, column) for column in table.columns}
    for row in table.rows:
        for column in table.columns:
            runs = table.runs(row, column)
            line: dict[str, Any] = {"row": row, "column": column, "metric": table.key, "n": len(runs)}
            if not runs.empty:
                line["mean"], line["std"] = mean_and_std(runs[table.key].tolist())
                line["saved"] = runs["saved"].mean()
                line["bold"] = row in bold[column]
            baseline = table.suite.baseline
            pair = table.difference(row, baseline, column) if baseline not in (None, row) else None
            line["difference"], line["low"], line["high"] = pair or (None, None, None)
            line["paper"] = table.suite.paper.get(row, {}).get(column)
            line["runs"] = " ".join(_ids(runs))
            lines.append(line)
    order = ["row", "column", "metric", "n", "mean", "std", "saved", "bold", "difference", "low", "high"]
    return csv(pd.DataFrame(lines, columns=[*order, "paper", "runs"]))


def long_csv(table: Table) -> str:
    """Return one line a run, with every number of its summary."""
    return csv(table.long)


def markdown(table: Table) -> str:
    """Return the table as Markdown."""
    parts = [f"# {table.suite.name}, scale={table.scale}"]
    for block in blocks(table):
        body = [[f"**{cell.text}**" if cell.bold else cell.text for cell in cells] for cells in block.body]
        parts += [f"## {_markdown(block.title)}", _markdown(block.caption), _markdown_table([block.head, *body])]
    return "\n\n".join([*parts, *map(_markdown, table.footnotes)]) + "\n"


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells, the first of which is the head."""
    texts = [[_markdown(text) for text in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [texts[0], ["---"] * len(texts[0]), *texts[1:]])


def _markdown(text: str) -> str:
    """Return a text for a cell or a paragraph, in which there are no tags and no links."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def digest(table: Table, key: str | None = None) -> str:
    """Return the headlines alone as Markdown: mean ± std, a star where the pairing of labels is unverified.

    Another ``key`` of the summaries may stand in their place, with three digits. Rows and columns of which no run has
    one are left out. Raises UsageError where none has it at all.
    """
    long, (shown, digits) = table.long, (table.key, table.metric.digits) if key is None else (key, 3)
    if key is not None and not (key in long and pd.api.types.is_numeric_dtype(long[key]) and long[key].notna().any()):
        raise UsageError(f"the runs of table {table.name} have no number {key}; a run's summary.json has the names")
    unverified = set(long.loc[long["pairing"] == "unverified", "column"]) if "pairing" in long else set()
    known = long.dropna(subset=[shown])
    rows = [row for row in table.rows if (known["row"] == row).any()]
    columns = [column for column in table.columns if (known["column"] == column).any()]
    lines = [[_corner(table), *(f"{column}*" if column in unverified else column for column in columns)]]
    for row in rows:
        cells = (table.runs(row, column)[shown].dropna().tolist() for column in columns)
        lines.append([row, *(plus_minus(*mean_and_std(values), digits) if values else MISSING for values in cells)])
    return _markdown_table(lines)


def filled(text: str, tables: Iterable[Table]) -> str:
    """Return Markdown with every `digest` that it has a place for: ``<!-- table NAME -->`` … ``<!-- end -->``.

    ``<!-- table NAME KEY -->`` is for one of another number than the headline. Raises UsageError for a place whose
    table, or number, there is none of, or that does not end.
    """
    by_name = {table.name: table for table in tables}

    def fill(place: re.Match[str]) -> str:
        if (name := place[1]) not in by_name:
            raise UsageError(f"there is a place for table {name} and no such table; it could be {', '.join(by_name)}")
        if place[3] is None:
            raise UsageError(f"the place for table {name} does not end; write <!-- end --> on a line below it")
        key = place[2]
        return f"<!-- table {name}{f' {key}' if key else ''} -->\n{digest(by_name[name], key)}\n<!-- end -->"

    until_the_next = r"(?:(?!^<!-- table ).)*?"
    return re.sub(rf"(?ms)^<!-- table (\S+)(?: (\S+))? -->[ \t]*$({until_the_next}<!-- end -->)?", fill, text)


_SPECIAL = str.maketrans(
    {
        **{character: f"\\{character}" for character in "_%&#${}"},
        "±": r"$\pm$",
        "–": "--",
        "Δ": r"$\Delta$",
        "−": "$-$",
        "½": r"$\frac12$",
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "[": "{[}",
        "]": "{]}",
        "<": "$<$",
        ">": "$>$",
    }
)


def _latex(text: str) -> str:
    return one_line(text).translate(_SPECIAL)


def latex(table: Table) -> str:
    """Return the table for LaTeX with booktabs, to be read in with ``\\input``; the runs stand in comments."""
    parts = [f"% {table.suite.name}, scale={table.scale}; needs \\usepackage{{booktabs}}"]
    for block in blocks(table):
        if block.title == "Runs":
            parts += ["% " + one_line(" ".join(cell.text for cell in cells)) for cells in block.body]
            continue
        head = " & ".join(map(_latex, block.head))
        lines = [
            " & ".join(f"\\textbf{{{_latex(cell.text)}}}" if cell.bold else _latex(cell.text) for cell in cells)
            for cells in block.body
        ]
        caption = _latex(f"{table.suite.name}, scale={table.scale}. {block.title}. {block.caption}")
        parts += [
            "\\begin{table}[ht]\n\\centering\\small",
            f"\\caption{{{caption}}}",
            f"\\begin{{tabular}}{{{'l' * len(block.head)}}}\n\\toprule",
            head + " \\\\\n\\midrule",
            *(line + " \\\\" for line in lines),
            "\\bottomrule\n\\end{tabular}\n\\end{table}",
        ]
    notes = [f"\\par\\noindent\\footnotesize {_latex(note)}" for note in table.footnotes]
    return "\n".join([*parts, *notes]) + "\n"
