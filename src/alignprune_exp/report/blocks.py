"""What a table shows: its blocks of cells, each of which names the runs it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pandas as pd

from .tables import OVERHEAD, Table, capitalised, not_distinguishable_from_best, plus_minus, with_interval

MISSING = "–"
PAPER_DATASET = "cifar100"
PAPER_HEADING = "The paper's own values (CIFAR-100, ResNet-18, 200 epochs: its scale, not ours)"


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


@cache
def blocks(table: Table) -> list[Block]:
    """Return everything a table shows: the headline, differences, the paper's values, cost, purity, and the runs."""
    word = "Best" if table.best else "Final"
    parts = [_headline(table, word)]
    if table.suite.baseline is not None:
        parts.append(_differences(table, table.suite.baseline))
    if table.suite.paper:
        parts.append(_paper(table))
    return [*parts, *_elsewhere(table, word), _efficiency(table), _purity(table), _runs(table)]


def _axes(table: Table) -> tuple[str, str]:
    return " ".join(table.suite.rows), " ".join(table.suite.columns)


def corner(table: Table) -> str:
    """Return what stands above the rows and beside the columns."""
    return " / ".join(_axes(table))


def ids(*frames: pd.DataFrame) -> tuple[str, ...]:
    """Return the ids of some cells' runs, each once."""
    return tuple(dict.fromkeys(id for frame in frames for id in frame["id"]))


def _by_place(
    table: Table,
    title: str,
    caption: str,
    rows: Iterable[str],
    cell: Callable[[str, str], Entry],
    mean: Callable[[str], Entry],
) -> Block:
    """Return a block laid out as the suite is: a ``cell`` for a row and a column, and what a row's ``mean`` Δ is."""
    body = [[Entry(row), *(cell(row, column) for column in table.columns), mean(row)] for row in rows]
    return Block(title, caption, [corner(table), *table.columns, "mean Δ"], body)


def _headline(table: Table, word: str) -> Block:
    bold = {column: not_distinguishable_from_best(table, column) for column in table.columns}

    def cell(row: str, column: str) -> Entry:
        if (runs := table.runs(row, column)).empty:
            return Entry(MISSING)
        spread = plus_minus(runs[table.key].tolist(), table.metric.digits)
        text = f"{spread}{of_seeds(table, len(runs))}, {100 * runs['saved'].mean():.0f} % saved"
        return Entry(text, row in bold[column], ids(runs))

    baseline = table.suite.baseline
    against = f"; mean Δ: plain mean over the columns of the difference to {baseline}" if baseline is not None else ""
    caption = (
        f"{word} {table.measured}, mean ± std over {table.seeds} seed(s), and what was saved of the training"
        f"{against}. Bold: the best of a column, of several seeds where a row has them, and those whose paired "
        "difference to it has a 95 % interval that contains 0."
    )
    return _by_place(table, table.metric.name.capitalize(), caption, table.rows, cell, partial(_mean_difference, table))


def of_seeds(table: Table, number: int) -> str:
    """Return how many seeds a cell has where others of its table have more."""
    return f" (n={number})" if number < table.seeds else ""


def _mean_difference(table: Table, row: str) -> Entry:
    baseline = table.suite.baseline
    pairs = {column: table.difference(row, baseline, column) for column in table.columns}
    known = {column: pair[0] for column, pair in pairs.items() if pair is not None}
    if baseline is None or not known:
        return Entry(MISSING)
    partial = "" if len(known) == len(pairs) else f" ({len(known)} of {len(pairs)})"
    frames = [table.runs(which, column) for column in known for which in (row, baseline)]
    return Entry(f"{table.metric.signed(float(np.mean(list(known.values()))))}{partial}", runs=ids(*frames))


def _differences(table: Table, baseline: str) -> Block:
    def cell(row: str, column: str) -> Entry:
        if (pair := table.difference(row, baseline, column)) is None:
            return Entry(MISSING)
        ours, base = table.runs(row, column), table.runs(baseline, column)
        seeds = of_seeds(table, len(ours.index.intersection(base.index)))
        return Entry(with_interval(table.metric, pair) + seeds, runs=ids(ours, base))

    caption = (
        f"In {table.points}, paired by seed, with a 95 % interval where there are two pairs or more "
        "(Student's t; a bootstrap from ten pairs)."
    )
    rows = [row for row in table.rows if row != baseline]
    return _by_place(table, f"Difference to {baseline}", caption, rows, cell, partial(_mean_difference, table))


def _paper(table: Table) -> Block:
    paper, baseline = table.suite.paper, table.suite.baseline
    datasets = sorted(set(table.long.get("dataset", [PAPER_DATASET])))

    def cell(row: str, column: str) -> Entry:
        if (value := paper[row].get(column)) is None:
            return Entry(MISSING)
        runs = table.runs(row, column)
        if runs.empty or set(runs["dataset"]) != {PAPER_DATASET}:
            return Entry(f"{value:.1f}")
        return Entry(f"{value:.1f} (ours {runs[table.key].mean() - value:+.1f})", runs=ids(runs))

    def mean(row: str) -> Entry:
        if baseline not in paper or row == baseline:
            return Entry(MISSING)
        shared = [column for column in paper[row] if column in paper[baseline]]
        return Entry(f"{np.mean([paper[row][column] - paper[baseline][column] for column in shared]):+.1f}")

    brackets = (
        f"in brackets ours at scale={table.scale} minus the paper's"
        if PAPER_DATASET in datasets
        else f"our runs are on {', '.join(datasets)}, and so there is no difference to show"
    )
    caption = f"{capitalised(table.measured)} as the paper prints it; {brackets}."
    return _by_place(table, PAPER_HEADING, caption, [row for row in table.rows if row in paper], cell, mean)


def _by_cell(table: Table, title: str, caption: str, columns: Mapping[str, tuple[str, str]]) -> Block:
    """Return a block with a row for every cell with runs: the mean of each key over those that have it, formatted."""

    def mean(values: pd.Series, form: str) -> str:
        known = pd.to_numeric(values).dropna()
        fewer = f" (n={len(known)})" if len(known) < len(values) else ""
        return f"{known.mean():{form}}{fewer}" if len(known) else MISSING

    there = {name: (key, form) for name, (key, form) in columns.items() if key in table.long}
    body = []
    for row, column, runs in table.cells:
        texts = [mean(runs[key], form) for key, form in there.values()]
        body.append([Entry(row, runs=ids(runs)), *map(Entry, (column, *texts))])
    return Block(title, caption, [*_axes(table), *there], body)


def _elsewhere(table: Table, word: str) -> list[Block]:
    """Return the headline on what runs evaluate beside the test set, where there is such a thing."""
    begin, end = f"test_{table.metric.name}_", "_best" if table.best else "_final"
    keys = [key for key in table.long.columns if key.startswith(begin) and key.endswith(end) and key != table.key]
    if not keys:
        return []
    columns = {key.removeprefix(begin).removesuffix(end): (key, f".{table.metric.digits}f") for key in keys}
    caption = f"{word} {table.measured.removeprefix('test ')} on further evaluation sets, mean over the seeds."
    return [_by_cell(table, "Other evaluation sets", caption, columns)]


def _efficiency(table: Table) -> Block:
    columns = {
        "saved": ("saved", ".1%"),
        "seconds": ("seconds_total", ".0f"),
        "warm-up": ("seconds_warmup", ".0f"),
        "images/s": ("samples_per_second", ".0f"),
        "overhead": ("overhead", ".2%"),
        **{part: (f"share_{part}", ".2%") for part in OVERHEAD},
    }
    warm_up = "; warm-up: the seconds of what a static choice, or a score that holds out, trains first"
    caption = (
        "saved: share of the training that pruning avoided; images/s: trained images a second of training steps; "
        "overhead: share of selection, scoring, reference evaluation and refreshing in the time without testing, "
        f"and each of the four{warm_up if 'seconds_warmup' in table.long else ''}."
    )
    return _by_cell(table, "Efficiency", caption, columns)


def _purity(table: Table) -> Block:
    scores = sorted(key for key in table.long.columns if key.startswith("auroc_"))
    columns = {
        "noise rate": ("noise_rate", ".3f"),
        "estimated": ("noise_estimate", ".3f"),
        "kept noise": ("kept_noise_mean", ".3f"),
        "weighted": ("kept_noise_weighted_mean", ".3f"),
        "saved": ("saved", ".1%"),
        "reference": ("reference_size", "g"),
        "reference noise": ("reference_noise", ".3f"),
        **{f"AUROC {key.removeprefix('auroc_')}": (key, ".3f") for key in scores},
    }
    of_reference = "; reference noise: its noisy share, mean over the epochs"
    estimated = "; estimated: the noise rate, by trusted losses or the score"
    caption = (
        "kept noise: noisy share of what the pruning epochs trained on; weighted: the same by gradient weight; AUROC: "
        "how well each score, at the end, ranks noisy samples below clean ones (½ is chance); reference: the size of "
        "the reference set, a share of the samples below 1, else their number"
        f"{of_reference if 'reference_noise' in table.long else ''}"
        f"{estimated if 'noise_estimate' in table.long else ''}."
    )
    return _by_cell(table, "Purity", caption, columns)


def _runs(table: Table) -> Block:
    body = [
        [Entry(row), Entry(column), Entry(str(seed), runs=(id,)), Entry(id, runs=(id,))]
        for row, column, runs in table.cells
        for seed, id in runs["id"].items()
    ]
    return Block("Runs", "Where each cell comes from.", [*_axes(table), "seed", "run"], body)
