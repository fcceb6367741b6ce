"""What is wrong with the losses, in one sentence with the file and the row group; what was left out of them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from ..errors import UsageError
from . import formulas
from .engine import BrokenError, Engine
from .inspect import SKIPPING, File, Skipped, name, parquet, rows_of
from .layout import Question, literal
from .scoring import Scored

TO_MEND = {  # by what is wrong
    "bad": f"mend it, or {SKIPPING} takes it for missing",
    "again": f"mend it, or {SKIPPING} leaves the id out",
    "unnamed": f"name it, or {SKIPPING} leaves it out",
    "gaps": "add it, or --gaps scores ids by the checkpoints that they have",
}


def checkpoints(
    engine: Engine, files: Sequence[File], columns: Sequence[str], reference: Sequence[Any], skip: bool
) -> tuple[list[Any], list[Skipped]]:
    """Return the checkpoints, in order, that files of id, checkpoint and loss share with the reference, if any.

    Raises UsageError, unless ``skip``, for rows without a checkpoint and for a checkpoint that one of them lacks.
    """
    there, unknown = _checkpoints_of(engine, files, name(columns[1]))
    skipped = []
    if unknown:
        file, group, (of,) = _first(engine, files, f"{name(columns[1])} IS NULL", name(columns[0]))
        what = f"a row of id {of} has no checkpoint"
        if not skip:
            raise UsageError(f"{file.path}, row group {group}: {what}{_more(unknown)}; {TO_MEND['unnamed']}")
        skipped.append(Skipped(what, file.path, group, unknown))
    if not there:
        raise UsageError(f"no row of {len(files)} files has a checkpoint; name the column that has with --columns")
    if not reference:
        return sorted(there), skipped
    for at in [at for at in reference if at not in there]:
        what, to_mend = f"checkpoint {at} of the reference is in none of {len(files)} files", "add its losses"
        if _kind(at) not in (kinds := {_kind(other) for other in there}):
            what, to_mend = f"{what}: it is a {_kind(at)}, and theirs are {min(kinds)}s", "write them alike"
        if not skip:
            raise UsageError(f"{what}; {to_mend}, or {SKIPPING} does without it")
        skipped.append(Skipped(what, ""))
    for at in [at for at in there if at not in reference]:
        file, group, _ = _first(engine, [there[at]], f"{name(columns[1])} = {literal(at)}")
        what = f"checkpoint {at} is none of the reference's"
        if not skip:
            raise UsageError(f"{file.path}, row group {group}: {what}; add it there, or {SKIPPING} does without it")
        skipped.append(Skipped(what, file.path, group))
    shared = [at for at in reference if at in there]
    if not shared:
        raise UsageError("the losses and the reference have no checkpoint in common; write both with the same names")
    return shared, skipped


def reference(path: Path, losses: Sequence[float | None], score: str) -> None:
    """Raise UsageError for a reference with which no trajectory has a correlation, so that all scores would be 0."""
    known = [loss for loss in losses if loss is not None]
    still = len(set(known)) == 1 and (score != "cosine" or known[0] == 0)
    if still or len(known) < formulas.LEAST:
        what = (
            f"the loss {known[0]:g} at each of {len(known)} checkpoints" if still else f"{len(known)} losses to go by"
        )
        raise UsageError(
            f"--reference {path} has {what}, so that --score {score} would be 0 for every id; give {formulas.LEAST} or "
            "more that differ, or use --score settled"
        )


def _kind(checkpoint: Any) -> str:
    """Return what a checkpoint is; one of another kind is another, though it may read the same."""
    kinds = {str: "text", datetime: "time", date: "date"}
    return next((kind for type_, kind in kinds.items() if isinstance(checkpoint, type_)), "number")


def _checkpoints_of(engine: Engine, files: Sequence[File], column: str) -> tuple[dict[Any, File], int]:
    """Return a file that has it for each checkpoint, and how many rows have none.

    By the footers, where every file has one checkpoint, else by reading them.
    """
    bounds = [file.checkpoints for file in files]
    if all(each is not None and each[0] == each[1] for each in bounds):
        return {each[0]: file for each, file in zip(bounds, files, strict=True) if each is not None}, 0
    by_path = {file.path: file for file in files}
    found = engine.all(f"SELECT {column}, min(__path), count(*) FROM {rows_of(files)} GROUP BY 1", files)
    return {at: by_path[path] for at, path, _ in found if at is not None}, sum(n for at, _, n in found if at is None)


def flaws(engine: Engine, scored: Sequence[Scored], question: Question, skip: bool, gaps: bool) -> list[Skipped]:
    """Return what parts have that was left out or taken for missing, by kind, with the place of the first.

    Missing losses are no flaw where there may be ``gaps``. Raises UsageError for the first flaw, unless ``skip``, and
    BrokenError for a file whose footer does not know its ids.
    """
    found = []
    for part in scored:
        _expect_ids(engine, part, question)
    for kind, to_mend in TO_MEND.items():
        having = [part for part in scored if getattr(part, kind)]
        if not having or (kind == "gaps" and gaps):
            continue
        locate = _of_lists if question.lists else _of_rows
        file, group, what = locate(kind, engine, having[0], question)
        count = sum(getattr(part, kind) for part in having)
        if not skip:
            raise UsageError(f"{file.path}, row group {group}: {what}{_more(count)}; {to_mend}")
        found.append(Skipped(what, file.path, group, count))
    return found


def _expect_ids(engine: Engine, scored: Scored, question: Question) -> None:
    """Raise BrokenError if a part has ids that are outside of the bounds in its files' footers: they are damaged."""
    bounds = [file.ids for file in scored.part.files]
    known = [each for each in bounds if each is not None and isinstance(each[0], int)]  # of texts, these may be short
    if len(known) < len(bounds) or scored.rows == scored.unnamed:
        return
    least, most = min(least for least, _ in known), max(most for _, most in known)
    if scored.ids[0] < least or scored.ids[1] > most:
        id_ = name(question.columns[0])
        file, group, (of,) = _first(engine, scored.part.files, f"{id_} NOT BETWEEN {least} AND {most}", id_)
        raise BrokenError(file, group, f"by its footer there is no id {of}")


def _more(count: int) -> str:
    return f" ({count - 1} more are like it)" if count > 1 else ""


def _of_lists(kind: str, engine: Engine, scored: Scored, question: Question) -> tuple[File, int, str]:
    """Return the first row with a flaw, and what it is: in a file of lists."""
    id_, losses = map(name, question.columns)
    width = len(question.checkpoints)
    infinite = f"list_position(list_transform({losses}, lambda x: {_infinite('x')}), TRUE)"
    missing = (
        f"coalesce(list_position(list_transform({losses}[:{width}], lambda x: x IS NULL), TRUE), len({losses}) + 1, 1)"
    )
    where = {
        "bad": f"{infinite} <= {width}",
        "again": f"len({losses}) > {width}",
        "unnamed": f"{id_} IS NULL",
        "gaps": f"{missing} <= {width}",
    }[kind]
    file, group, (of, length, bad, gap) = _first(
        engine, scored.part.files, where, id_, f"len({losses})", f"{losses}[{infinite}]", missing
    )
    what = {
        "bad": f"a loss of id {of} is {bad}",
        "again": f"id {of} has {length} losses where {width} are due",
        "unnamed": "a row has no id",
        "gaps": f"id {of} has no loss number {gap} of {width}",
    }[kind]
    return file, group, what


def _of_rows(kind: str, engine: Engine, scored: Scored, question: Question) -> tuple[File, int, str]:
    """Return the first row with a flaw, or of an id with one, and what it is: in files of id, checkpoint and loss."""
    id_, checkpoint, loss = map(name, question.columns)
    files = scored.part.files
    if kind in ("bad", "unnamed"):
        where = _infinite(loss) if kind == "bad" else f"{id_} IS NULL"
        file, group, (of, at, value) = _first(engine, files, where, id_, checkpoint, loss)
        what = f"the loss of id {of} at checkpoint {at} is {value}" if kind == "bad" else "a row has no id"
        return file, group, what
    scores = parquet([str(scored.path)])
    of = engine.one(f"SELECT id FROM {scores} WHERE {kind} > 0 AND id IS NOT NULL ORDER BY id LIMIT 1")[0]
    mine = f"{id_} = {literal(of)}"
    where = _sure(f"{mine} AND {loss} IS NOT NULL")
    rows = engine.all(f"SELECT {checkpoint} FROM {rows_of(files)} WHERE {where}", files)
    here = [at for (at,) in rows]
    if kind == "again":
        at = next(at for at in question.checkpoints if here.count(at) > 1)
        file, group, _ = _first(engine, files, f"{mine} AND {checkpoint} = {literal(at)}")
        return file, group, f"id {of} is there twice at checkpoint {at}"
    at = next(at for at in question.checkpoints if at not in here)
    file, group, _ = _first(engine, files, mine, last=f"{checkpoint} IS DISTINCT FROM {literal(at)}")
    return file, group, f"id {of} has no loss at checkpoint {at}"


def twice(engine: Engine, files: Sequence[File], question: Question, count: int, skip: bool) -> list[Skipped]:
    """Return what was left out for the ``count`` ids in the table ``twice``. Raises UsageError unless ``skip``."""
    if count == 0:
        return []
    (of,) = engine.one("SELECT min(id) FROM twice")
    id_ = name(question.columns[0])
    file, group, _ = _first(engine, files, f"{id_} = {literal(of)}")
    what = f"id {of} is there twice"
    if not skip:
        raise UsageError(f"{file.path}, row group {group}: {what}{_more(count)}; {TO_MEND['again']}")
    return [Skipped(what, file.path, group, count)]


def _infinite(loss: str) -> str:
    return f"({loss} IS NOT NULL AND NOT {formulas.finite(f'{loss}::DOUBLE')})"


def _sure(where: str) -> str:
    """Return a condition that is looked at in every row: a plain one leaves out row groups by what footers say."""
    return f"coalesce({where}, FALSE)"


def _first(
    engine: Engine, files: Sequence[File], where: str, *columns: str, last: str = ""
) -> tuple[File, int, Sequence[Any]]:
    """Return the file and the row group of the first row of which ``where`` is true, and its values of columns.

    Rows of which ``last`` is true come after the others.
    """
    values = "".join(f", {column}" for column in columns)
    order = f"{last}, 1, 2" if last else "1, 2"
    path, row, *found = engine.one(
        f"SELECT __path, file_row_number{values} FROM {rows_of(files)} WHERE {_sure(where)} ORDER BY {order} LIMIT 1",
        files,
    )
    file = next(file for file in files if file.path == path)
    return file, file.group_of(row), found
