"""What the tables say, in sentences: each has its numbers and its seeds, and one seed claims nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from ..suites import label
from .blocks import Entry
from .tables import Table, as_number, plus_minus, with_interval

LEADING = ("posterior", "equal_cost", "cost", "main")  # suites whose findings stand first, the main one before the rest
BOUNDS = {  # scores that know wrong labels: no methods, and what each is the bound of
    "oracle": "A choice that knows the wrong labels ({row}) is the upper bound there",
    "supervised": "A classifier of losses that knows the others' wrong labels ({row}) is the bound of what losses tell",
}


@dataclass(frozen=True)
class Findings:
    """What one table says, the most important first; a sentence leads to the runs it speaks of."""

    table: Table
    sentences: list[Entry]


@dataclass(frozen=True)
class Comparison:
    """Two rows in one column, over the seeds that both have.

    Attributes:
        ours, base: the runs of each, by seed.
        mean, low, high: the paired difference with its 95 % interval, which is NaN for one seed.
    """

    table: Table
    row: str
    other: str
    column: str
    ours: pd.DataFrame
    base: pd.DataFrame
    mean: float
    low: float
    high: float

    @property
    def worth(self) -> float:
        """The difference, more of which is better."""
        return self.mean if self.table.metric.higher else -self.mean

    @property
    def side(self) -> str:
        """What the interval says of the row."""
        if math.isnan(self.low):
            return "in one seed"
        if self.low <= 0 <= self.high:
            return "not told apart"
        return "better" if self.worth > 0 else "worse"

    @property
    def runs(self) -> tuple[str, ...]:
        return (*self.ours["id"], *self.base["id"])

    @property
    def brief(self) -> str:
        """The difference, its interval and its seeds, such as "+1.4 [+0.2, +2.6], 3 seeds"."""
        told = with_interval(self.table.metric, (self.mean, self.low, self.high)).replace("-", "−")
        return f"{told}, {'one seed' if len(self.ours) == 1 else f'{len(self.ours)} seeds'}"

    @property
    def verdict(self) -> str:
        """What follows from that."""
        if self.side == "in one seed":
            return "which proves nothing"
        if self.side == "not told apart":
            return "and an interval with 0 in it, so that neither is shown to be better"
        return f"and an interval without 0: {self.side}"

    def sentence(self, aside: str = "") -> str:
        """Return the values of both, the difference, and what follows; ``aside`` stands behind the row's name."""
        saved = [f"{100 * runs['saved'].mean():.0f} % saved" for runs in (self.ours, self.base)]
        equal = saved[0] == saved[1]
        row, other = (self.row, self.other) if equal else (f"{self.row} ({saved[0]})", f"{self.other} ({saved[1]})")
        place = f"{saved[0]} and " * equal + self.table.headed(self.column)
        verb = "peaks" if self.table.best else "ends"
        return (
            f"At {place}, {row}{aside} {verb} at {self._value(self.ours)}, {other} at {self._value(self.base)}, "
            f"a difference of {self.brief}, {self.verdict}."
        )

    def _value(self, runs: pd.DataFrame) -> str:
        metric = self.table.metric
        return f"{plus_minus(runs[self.table.key].tolist(), metric.digits)} {metric.unit}".rstrip()


def findings(tables: Sequence[Table]) -> list[Findings]:
    """Return what the leading suites' tables say, one scale each; of the first table where there is none of these."""
    found = [made for name in LEADING if (made := _telling(table for table in tables if table.suite.name == name))]
    if not found and (other := _telling(tables[:1])):
        found.append(other)
    return found


def largest_first(tables: Iterable[Table]) -> list[Table]:
    """Return one suite's tables by how many samples they train on, then by how many runs they have."""

    def size(table: Table) -> tuple[float, int]:
        samples = table.long["samples"].max() if "samples" in table.long else math.nan
        return 0.0 if pd.isna(samples) else float(samples), len(table.long)

    return sorted(tables, key=size, reverse=True)


def _telling(tables: Iterable[Table]) -> Findings | None:
    """Return the findings of the largest table that has any."""
    for table in largest_first(tables):
        sentences = _by_share(table) if "saved" in table.suite.columns else _at_one_setting(table)
        if sentences:
            return Findings(table, sentences)
    return None


def brief(table: Table) -> str:
    """Return the best row's difference to the baseline at the focus in a few words; nothing where there is none."""
    if (best := _best(table, table.focus)) is None:
        return ""
    return f"{table.headed(table.focus)}: {best.row} {best.brief}, against {best.other}"


def _compare(table: Table, row: str, other: str | None, column: str) -> Comparison | None:
    if other is None or (pair := table.difference(row, other, column)) is None:
        return None
    ours, base = table.runs(row, column), table.runs(other, column)
    seeds = ours.index.intersection(base.index)
    return Comparison(table, row, other, column, ours.loc[seeds], base.loc[seeds], *pair)


def _compared(table: Table, column: str, oracle: bool = False) -> list[Comparison]:
    """Return every row's comparison to the baseline, upper bounds or all others: the best first, single seeds last."""
    made = (_compare(table, row, table.suite.baseline, column) for row in table.rows)
    wanted = [found for found in made if found and (set(found.ours["score"]) <= set(BOUNDS)) == oracle]
    return sorted(wanted, key=lambda found: (math.isnan(found.low), -found.worth))


def _best(table: Table, column: str) -> Comparison | None:
    return next(iter(_compared(table, column)), None)


def _at_one_setting(table: Table) -> list[Entry]:
    column = table.focus
    said = []
    if compared := _compared(table, column):
        best, *others = compared
        behind = "" if best.worth >= 0 else " and yet behind it"
        peers = [found for found in compared if math.isnan(found.low) == math.isnan(best.low)]
        several = " with several seeds" if len(peers) < len(compared) else ""
        aside = f", the best of {len(peers)}{several} beside {best.other}{behind},"
        said.append(Entry(best.sentence(aside), True, best.runs))
        said += _in_other_columns(table, best)
        said += _sides(others)
    said += _with_das(table, column)
    for bound in _compared(table, column, oracle=True):
        what = BOUNDS[bound.ours["score"].iloc[0]].format(row=bound.row)
        said.append(Entry(f"{what}: {bound.brief}, against {bound.other}.", runs=bound.runs))
    return said


def _in_other_columns(table: Table, best: Comparison) -> list[Entry]:
    made = [_compare(table, best.row, best.other, column) for column in table.columns if column != best.column]
    others = [found for found in made if found is not None]
    if not others:
        return []
    told = "; ".join(f"{table.headed(found.column)} {found.brief}" for found in others)
    return [Entry(f"{best.row} against {best.other} elsewhere: {told}.", runs=_runs(others))]


def _sides(compared: Sequence[Comparison]) -> list[Entry]:
    """Return one sentence with the rows that are better than the baseline, worse, and not told apart from it."""
    told = "; ".join(
        f"{side}: {', '.join(named)}"
        for side in ("better", "not told apart", "worse", "in one seed")
        if (named := [f"{found.row} {_signed(found.table, found.mean)}" for found in compared if found.side == side])
    )
    if not told:
        return []
    return [Entry(f"The others there, against {compared[0].other}: {told}.", runs=_runs(compared))]


def _with_das(table: Table, column: str) -> list[Entry]:
    """Return what DAS does in the place of the loss, in the rows that stand there with either."""
    made = [_compare(table, f"{row}_das", row, column) for row in table.rows if f"{row}_das" in table.rows]
    if not (found := [pair for pair in made if pair is not None]):
        return []
    told = "; ".join(f"{pair.other} {pair.brief}{_papers(pair)}" for pair in found)
    return [Entry(f"DAS in the place of the loss, at {table.headed(column)}: {told}.", runs=_runs(found))]


def _papers(pair: Comparison) -> str:
    values = [pair.table.suite.paper.get(row, {}).get(pair.column, math.nan) for row in (pair.row, pair.other)]
    difference = values[0] - values[1]
    return "" if math.isnan(difference) else f" (the paper: {_signed(pair.table, difference)})"


def _by_share(table: Table) -> list[Entry]:
    """Return a sentence for whatever else the columns stand for: the best row at each share saved, if these are two."""
    panels: dict[str, dict[float, Comparison]] = {}
    for _, column, axes in table.places:
        share = as_number(axes["saved"])
        if not math.isnan(share) and (best := _best(table, column)):
            panel = label(axes, [name for name in table.suite.columns if name != "saved"])
            panels.setdefault(panel, {})[share] = best
    said = []
    for panel, by_share in panels.items():
        if len(by_share) < 2:
            continue
        told = []
        for share, best in sorted(by_share.items()):
            named = best.row if best.worth > 0 else f"none, {best.row} as the next"
            told.append(f"{100 * share:.0f} % saved: {named} {best.brief}")
        place = f"Best against {table.suite.baseline} at {panel}, of several seeds where any has them, by what is saved"
        said.append(Entry(f"{place}: {'; '.join(told)}.", runs=_runs(by_share.values())))
    return said


def _runs(compared: Iterable[Comparison]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(id for found in compared for id in found.runs))


def _signed(table: Table, value: float) -> str:
    return table.metric.signed(value).replace("-", "−")
