"""Scores part by part, what they were made of, the threshold for a kept fraction, and what is kept.

A part is written under the hash of what it computes, whole or not at all: the same command goes on from there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import duckdb

from ..runs import run_id
from . import formulas
from .engine import Engine, Workers
from .inspect import File, name, parquet, rows_of, text
from .layout import Part, Question, by_batches, by_bucket

PIECES = 1 << 12  # that the range of scores is cut into at each look for the threshold
BEGINNING = 1000  # rows that are looked at before a part is scored as in order
SORTED = 1 << 17  # scores among which it is found by sorting them


class ApartError(Exception):
    """Rows that a layout takes for one id's are of different ones: they are not in the order that it needs."""


@dataclass(frozen=True)
class Scored:
    """A part that has been scored.

    Attributes:
        part: which.
        path: of its table of id and score, and where it is ``gappy``, of gaps, bad and again.
        rows: how many ids it has.
        gaps, bad, again: how many losses are missing, not finite, and too many; ``unnamed`` how many ids are NULL.
        ids: its least and its largest id.
        rising: whether each id is larger than the one before.
    """

    part: Part
    path: Path
    gappy: bool
    rows: int
    gaps: int
    bad: int
    again: int
    unnamed: int
    ids: tuple[Any, Any]
    rising: bool


def score(work: Path, question: Question, gaps: bool, engine: Engine, part: Part) -> Scored:
    """Score a part, or take it from where it lies scored; ``gaps`` are to be expected. Raises as `Engine.write` does.

    Raises ApartError too.
    """
    as_whole, as_gappy = (
        formula(question.score, part.source, question.reference) for formula in (formulas.whole, formulas.gappy)
    )
    whole = _place(work / "parts", as_whole, part, ".parquet")
    gappy = _place(work / "parts", as_gappy, part, "-gappy.parquet")
    expected = gappy.exists() or (gaps and not whole.exists())
    if not expected and (scored := _made(engine, as_whole, part, whole, gappy=False)) is not None:
        return scored
    scored = _made(engine, as_gappy, part, gappy, gappy=True)
    assert scored is not None
    return scored


def _made(engine: Engine, sql: str, part: Part, target: Path, gappy: bool) -> Scored | None:
    """Score a part into ``target``, if it is not there; return what it has, or None where it is not whole."""
    if target.exists():
        return _scored(engine, part, target, gappy)
    new = _unfinished(target)
    engine.write(f"{sql}{' ORDER BY id' if part.apart else ''}", new, part.files)
    if (scored := _scored(engine, part, new, gappy)) is None:
        new.unlink()
        return None
    new.replace(target)
    return replace(scored, path=target)


def _scored(engine: Engine, part: Part, path: Path, gappy: bool) -> Scored | None:
    """Return what a part's table has, or None where it was scored as whole and is not. Raises ApartError."""
    flaws = ["sum(gaps)", "sum(bad)", "sum(again)"] if gappy else ["0", "count(*) - count(score)", "0"]
    counts = ", ".join(f"coalesce({each}, 0)::BIGINT" for each in [*flaws, "count(*) FILTER (isnan(score))"])
    rows, gaps, bad, again, apart, unnamed, least, most, rising = engine.one(
        f"SELECT count(*), {counts}, count(*) - count(id), min(id), max(id), coalesce(bool_and(rises), TRUE)\n"
        f"FROM (SELECT *, id > lag(id) OVER () AS rises FROM {parquet([str(path)])})"
    )
    if apart:
        path.unlink()
        raise ApartError
    if bad and not gappy:
        return None
    return Scored(part, path, gappy, rows, gaps, bad, again, unnamed, (least, most), rising)


def longest(workers: Workers, files: Sequence[File], losses: str) -> int:
    """Return how many losses the longest list of all files has: no footer says it, so that all lists are read."""
    parts = [Part(file.path, (file,), f"SELECT max(len({name(losses)})) FROM {rows_of([file])}") for file in files]
    return max(1, *workers.each(_longest, parts, alone=False))


def _longest(engine: Engine, part: Part) -> int:
    return engine.one(part.source, part.files)[0] or 0


def begins(engine: Engine, part: Part) -> bool:
    """Return whether the first rows of a part are in the order that it needs; scoring it finds out of the others."""
    try:
        return not engine.one(f"SELECT bool_or(apart) FROM (SELECT apart FROM ({part.source}) LIMIT {BEGINNING})")[0]
    except duckdb.Error:
        return True  # scoring it will say what is wrong with its file


def divide(workers: Workers, work: Path, question: Question, files: Sequence[File], buckets: int) -> list[Part]:
    """Divide rows by a hash of their ids, or take those that lie divided; return the parts. Raises as `score`."""
    if buckets == 1:
        return [by_bucket(files, question, 0, rows_of(files))]
    folders = sorted(workers.each(partial(_divided, work), by_batches(files, question, buckets), alone=True))
    parts = []
    for number in range(buckets):
        pieces = [str(piece) for folder in folders for piece in sorted(folder.glob(f"__bucket={number}/*.parquet"))]
        if pieces:
            parts.append(by_bucket(files, question, number, parquet(pieces)))
    return parts


def _divided(work: Path, engine: Engine, batch: Part) -> Path:
    """Return the folder in which a batch lies divided."""
    folder = _place(work / "divided", batch.source, batch)
    if not folder.exists():
        new = _unfinished(folder)
        engine.write(batch.source, new, batch.files, ", PARTITION_BY (__bucket)")
        new.replace(folder)
    return folder


def _place(folder: Path, sql: str, part: Part, ending: str = "") -> Path:
    """Return where that lies which this version of DuckDB makes of a part."""
    made = {"sql": sql, "duckdb": duckdb.__version__, "stamps": [file.stamp for file in part.files]}
    return folder / f"{run_id(made)}{ending}"


def _unfinished(target: Path) -> Path:
    """Return a name for what becomes ``target`` once it is written, which no other process on any node has."""
    return target.with_name(f".{target.name}.{uuid4().hex}")


def find_twice(engine: Engine, scored: Sequence[Scored]) -> int:
    """Make the table ``twice`` of the ids that are there more than once; return how many these are.

    Where each part has its ids in order, and a range of them for itself, nothing has to be compared.
    """
    ranges = sorted((each.ids for each in scored if each.rows > each.unnamed), key=lambda ids: ids[0])
    ordered = all(each.rising for each in scored) and all(most < least for (_, most), (least, _) in pairwise(ranges))
    known = ordered or all(each.part.apart for each in scored)
    files = parquet([str(each.path) for each in scored])
    if known:
        engine.all(f"CREATE OR REPLACE TABLE twice AS SELECT id FROM {files} LIMIT 0")
    else:
        several = f"SELECT id FROM {files} WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1"
        engine.all(f"CREATE OR REPLACE TABLE twice AS {several}")
    return int(engine.one("SELECT count(*) FROM twice")[0])


def counting(scored: Sequence[Scored], twice: int) -> str:
    """Return SQL of the ids that count, with their scores: not those without a name, or with losses too many."""
    where = ["id IS NOT NULL"]
    if any(each.gappy for each in scored):
        where.append("coalesce(again, 0) = 0")
    if twice:
        where.append("id NOT IN (SELECT id FROM twice)")
    return f"SELECT id, score FROM {parquet(str(each.path) for each in scored)} WHERE {' AND '.join(where)}"


@dataclass(frozen=True)
class Cut:
    """Where what is kept ends: at a score, and where others tie with it, at an id."""

    score: float
    ties: str = "TRUE"  # SQL of which of those at the score are kept

    @property
    def kept(self) -> str:
        """SQL of whether an id is kept."""
        at = f"{self.score!r}::FLOAT"
        return f"coalesce(score > {at} OR (score = {at} AND {self.ties}), FALSE)"


def cut(engine: Engine, table: str, kept: int, scored: int, approximate: bool) -> Cut:
    """Return where to cut to keep so many of the ids with a score; of those at the cut, the larger ids go.

    Approximately: at a quantile of a t-digest, with all that tie. Exactly: the range of the scores is cut into
    ``PIECES``, then the piece with the last one is, until it is small enough to be sorted, or all in it are equal.
    """
    if approximate:
        return Cut(engine.one(f"SELECT approx_quantile(score, {1 - kept / scored!r})::DOUBLE FROM ({table})")[0])
    least, most = engine.one(f"SELECT min(score)::DOUBLE, max(score)::DOUBLE FROM ({table})")
    due, within = kept, scored
    while least < most and within > SORTED:
        piece = f"round((score::DOUBLE - {least!r}::DOUBLE) / {most - least!r}::DOUBLE * {PIECES})::INTEGER"
        pieces = engine.all(
            f"SELECT min(score)::DOUBLE AS least, max(score)::DOUBLE, count(*) FROM ({table}) "
            f"WHERE {_between(least, most)} GROUP BY {piece} ORDER BY least DESC"
        )
        reached = list(accumulate(count for _, _, count in pieces))
        place = bisect_left(reached, due)
        least, most, within = pieces[place]
        due -= reached[place] - within
    score, id_, kind = engine.one(
        f"SELECT score::DOUBLE, id::VARCHAR, typeof(id) FROM ({table}) WHERE {_between(least, most)} "
        f"ORDER BY score DESC, id LIMIT 1 OFFSET {due - 1}"
    )
    return Cut(score, f"id <= {text(id_)}::{kind}")


def _between(least: float, most: float) -> str:
    return f"score::DOUBLE BETWEEN {least!r}::DOUBLE AND {most!r}::DOUBLE"


def write_kept(folder: Path, twice: int, cut: Cut, ids_alone: bool, engine: Engine, scored: Scored) -> int:
    """Write a part's ids with their score and whether to keep them, or those to keep; return how many these are."""
    table, target = counting([scored], twice), folder / scored.part.name
    if ids_alone:
        engine.write(f"SELECT id FROM ({table}) WHERE {cut.kept}", target, ())
    else:
        engine.write(f"SELECT id, score, {cut.kept} AS keep FROM ({table})", target, ())
    number = "count(*)" if ids_alone else "count(*) FILTER (keep)"
    return int(engine.one(f"SELECT {number} FROM {parquet([str(target)])}")[0])
