"""Scores part by part, what they were made of, the threshold for a kept fraction, and what is kept.

A part is written under the hash of what it computes, whole or not at all: the same command goes on from there.
"""

from __future__ import annotations

import os
import shutil
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..runs import run_id
from . import formulas
from .engine import Engine
from .inspect import File, parquet
from .layout import Part, Question, batches, by_bucket, divided

PIECES = 1 << 16  # that the range of scores is cut into at each look for the threshold


class ApartError(Exception):
    """Rows of the same number are of different ids: the files of the checkpoints are not in the same order."""


@dataclass(frozen=True)
class Scored:
    """A part that has been scored.

    Attributes:
        part: which.
        path: of its table of id, score, gaps, bad, again.
        rows: how many ids it has.
        gaps, bad, again: how many losses are missing, not finite, and too many; ``unnamed`` how many ids are NULL.
        ids: its least and its largest id.
        rising: whether each id is larger than the one before.
    """

    part: Part
    path: Path
    rows: int
    gaps: int
    bad: int
    again: int
    unnamed: int
    ids: tuple[Any, Any]
    rising: bool


def score(engine: Engine, work: Path, question: Question, part: Part) -> Scored:
    """Score a part, or take it from where it lies scored. Raises ApartError, and what `Engine.write` raises."""
    identity = {"asked": repr(question), "source": part.source, "stamps": [file.stamp for file in part.files]}
    target = work / "parts" / f"{run_id(identity)}.parquet"
    if not target.exists():
        new = target.with_name(f".{target.name}.{os.getpid()}")
        for formula in (formulas.whole, formulas.gappy):
            sql = formula(question.score, part.source, question.reference)
            engine.write(f"{sql}{' ORDER BY id' if part.apart else ''}", new, part.files)
            whole, apart = engine.one(f"SELECT bool_and(whole), bool_or(apart) FROM {parquet([str(new)])}")
            if apart:
                new.unlink()
                raise ApartError
            if whole is not False:
                break
        new.replace(target)
    rising = "SELECT *, id > lag(id) OVER () AS rises"
    counts = ", ".join(f"coalesce(sum({each}), 0)::BIGINT" for each in ("gaps", "bad", "again"))
    rows, gaps, bad, again, unnamed, least, most, rises = engine.one(
        f"SELECT count(*), {counts}, count(*) - count(id), min(id), max(id), coalesce(bool_and(rises), TRUE)\n"
        f"FROM ({rising} FROM {parquet([str(target)])})"
    )
    return Scored(part, target, rows, gaps, bad, again, unnamed, (least, most), rises)


def divide(engine: Engine, work: Path, question: Question, files: Sequence[File], buckets: int) -> list[Part]:
    """Divide rows by a hash of their ids, or take those that lie divided; return the parts. Raises as `score`."""
    if buckets == 1:
        return [by_bucket(files, question, 0, parquet([file.path for file in files]))]
    folders = []
    for batch in batches(files, buckets):
        sql = divided(batch, question, buckets)
        folder = work / "divided" / run_id({"source": sql, "stamps": [file.stamp for file in batch]})
        if not folder.exists():
            new = folder.with_name(f".{folder.name}.{os.getpid()}")
            shutil.rmtree(new, ignore_errors=True)
            engine.write(sql, new, batch, ", PARTITION_BY (__bucket)")
            new.replace(folder)
        folders.append(folder)
    parts = []
    for number in range(buckets):
        pieces = [str(piece) for folder in folders for piece in sorted(folder.glob(f"__bucket={number}/*.parquet"))]
        if pieces:
            parts.append(by_bucket(files, question, number, parquet(pieces)))
    return parts


def find_twice(engine: Engine, scored: Sequence[Scored]) -> int:
    """Make the table ``twice`` of the ids that are there more than once; return how many these are.

    Where each part has its ids in order, and a range of them for itself, nothing has to be compared.
    """
    ranges = sorted((each.ids for each in scored if each.rows > each.unnamed), key=lambda ids: ids[0])
    ordered = all(each.rising for each in scored) and all(most < least for (_, most), (least, _) in pairwise(ranges))
    known = ordered or all(each.part.apart for each in scored)
    files = parquet([str(each.path) for each in scored])
    if known:
        engine.all(f"CREATE TABLE twice AS SELECT id FROM {files} LIMIT 0")
    else:
        engine.all(f"CREATE TABLE twice AS SELECT id FROM {files} WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1")
    return int(engine.one("SELECT count(*) FROM twice")[0])


def counting(files: Sequence[Path], twice: int) -> str:
    """Return SQL of the ids that count, with their scores: not those without a name, or with losses too many."""
    once = " AND id NOT IN (SELECT id FROM twice)" if twice else ""
    return f"SELECT id, score FROM {parquet(map(str, files))} WHERE again = 0 AND id IS NOT NULL{once}"


def cut(engine: Engine, table: str, kept: int, scored: int, approximate: bool) -> None:
    """Make the table ``cutoff`` of one row: the score of the last of ``kept`` ids, and its id where others tie with it.

    Approximately: a quantile of a t-digest, and all that tie with it. Exactly: the range of the scores is cut into
    ``PIECES``, then the piece with the last one is, until all in it are equal; of these go the larger ids. Nothing else
    is sorted, and no look holds more than the pieces' counts.
    """
    if approximate:
        quantile = f"approx_quantile(score, {1 - kept / scored!r})"
        engine.all(f"CREATE TABLE cutoff AS SELECT {quantile} AS score, min(id) FILTER (FALSE) AS id FROM ({table})")
        return
    least, most = engine.one(f"SELECT min(score)::DOUBLE, max(score)::DOUBLE FROM ({table})")
    due = kept
    while least < most:
        piece = f"round((score::DOUBLE - {least!r}::DOUBLE) / {most - least!r}::DOUBLE * {PIECES})"
        within = f"score::DOUBLE BETWEEN {least!r}::DOUBLE AND {most!r}::DOUBLE"
        pieces = engine.all(
            f"SELECT min(score)::DOUBLE AS least, max(score)::DOUBLE, count(*) FROM ({table}) "
            f"WHERE {within} GROUP BY {piece} ORDER BY least DESC"
        )
        reached = list(accumulate(count for _, _, count in pieces))
        place = bisect_left(reached, due)
        least, most, count = pieces[place]
        due -= reached[place] - count
    last = f"ORDER BY id LIMIT 1 OFFSET {due - 1}"
    engine.all(f"CREATE TABLE cutoff AS SELECT score, id FROM ({table}) WHERE score::DOUBLE = {least!r}::DOUBLE {last}")


def write_kept(engine: Engine, scored: Scored, folder: Path, twice: int, ids_alone: bool) -> int:
    """Write a part's ids with their score and whether to keep them, or those to keep; return how many these are."""
    cutoff, tie = "(SELECT score FROM cutoff)", "(SELECT id FROM cutoff)"
    tied = f"score = {cutoff} AND ({tie} IS NULL OR id <= {tie})"
    kept = f"coalesce(score > {cutoff} OR ({tied}), FALSE) AS keep"
    sql = f"SELECT id, score, {kept} FROM ({counting([scored.path], twice)})"
    if ids_alone:
        sql = f"SELECT id FROM ({sql}) WHERE keep"
    target = folder / scored.part.name
    engine.write(sql, target, ())
    number = "count(*)" if ids_alone else "count(*) FILTER (keep)"
    return int(engine.one(f"SELECT {number} FROM {parquet([str(target)])}")[0])
