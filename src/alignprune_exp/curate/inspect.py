"""What the input is: the files of logged losses, by their footers alone, and the reference's table."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from itertools import accumulate, takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import duckdb

from ..console import one_line
from ..errors import UsageError
from .store import WEB, protocol_of

if TYPE_CHECKING:
    from .engine import Engine

LISTS, LONG = ("id", "losses"), ("id", "checkpoint", "loss")  # the columns, unless others are named
SKIPPING = "--on-error skip"
INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
NUMBERS = (*INTEGERS, "FLOAT", "DOUBLE")
IN_FOLDERS = ("BIGINT", "DATE", "TIMESTAMP", "VARCHAR")  # a checkpoint is of the first type that writes it the same


def text(value: str) -> str:
    """Return a text as SQL has it."""
    return "'" + value.replace("'", "''") + "'"


def name(column: str) -> str:
    """Return a column's name as SQL has it."""
    return '"' + column.replace('"', '""') + '"'


def parquet(paths: Iterable[str], more: str = "") -> str:
    """Return SQL that reads files as one table, columns by name, whatever their folders are called."""
    listed = ", ".join(text(escape(path)) for path in paths)
    return f"read_parquet([{listed}], union_by_name = true, hive_partitioning = false{more})"


def rows_of(files: Iterable[File]) -> str:
    """Return SQL that reads files of losses as one table, with __path, and the checkpoints in folders' names."""
    by_column: dict[str, list[str]] = {}
    for file in files:
        by_column.setdefault(file.in_folder, []).append(file.path)
    path = ", filename = '__path'"  # a name that no column of theirs has
    tables = [
        f"SELECT *, file_row_number{column and f', {column}'} FROM {parquet(paths, path)}"
        for column, paths in by_column.items()
    ]
    return f"({' UNION ALL BY NAME '.join(tables)})"


class ShortError(UsageError):
    """DuckDB may use too little memory, which is no file's fault."""


@dataclass(frozen=True)
class File:
    """One file of losses.

    Attributes:
        path: as DuckDB reads it.
        size: its bytes.
        stamp: its size, and when it was last changed in microseconds, or in a store, its version there.
        types: of the columns that are read.
        rows: how many it has, by row group.
        ids: the least and the largest, or bounds of them, where the footer says.
        checkpoints: the same.
        in_folder: SQL of the column of checkpoints, where the folder's name has it in place of the file.
    """

    path: str
    size: int
    stamp: str
    types: tuple[str, ...]
    rows: tuple[int, ...]
    ids: tuple[Any, Any] | None
    checkpoints: tuple[Any, Any] | None
    in_folder: str

    @property
    def total(self) -> int:
        return sum(self.rows)

    def group_of(self, row: int) -> int:
        """Return the row group that a row, counted from 0, is in."""
        return bisect_right(list(accumulate(self.rows)), row)


@dataclass(frozen=True)
class Skipped:
    """What was left out, or taken for missing: how often, in which file, and in which row group of it if in one."""

    what: str
    file: str
    row_group: int | None = None
    count: int = 1


def list_files(engine: Engine, losses: str) -> dict[str, str]:
    """Return the stamp of every Parquet file of a folder, a pattern, or a path in an object store, by path, sorted.

    Files that are hidden, such as macOS's ``._a.parquet``, or in a hidden folder, are left out of the first two.

    Raises UsageError where there is none.
    """
    alone, exact = _meant(losses)
    if protocol_of(losses) in WEB and not (alone and exact):
        raise UsageError(f"{losses} is on a web server, which lists no files; give one that ends in .parquet")
    place = escape(losses) if exact else losses
    pattern = place if alone else f"{place.rstrip('/')}/**/*.parquet"
    found = stamps(engine, pattern)
    if not (alone and exact):
        found = {path: found[path] for path in found if not any(part.startswith(".") for part in _below(losses, path))}
    if not found:
        raise UsageError(f"there is no Parquet file in {losses}; give a folder, a pattern or a path that has some")
    return found


def _meant(losses: str) -> tuple[bool, bool]:
    """Return whether files are meant, and not folders of them; and whether by their very names, and no pattern."""
    called_so = losses.endswith(".parquet") or "*" in losses
    files = os.path.isfile(losses) or (called_so and not os.path.isdir(losses))
    return files, "*" not in losses if protocol_of(losses) else os.path.exists(losses)


def _below(losses: str, path: str) -> tuple[str, ...]:
    """Return the path of a file below the folders that LOSSES names, which is the same however it is typed."""
    files, exact = _meant(losses)
    typed = PurePosixPath(os.path.normpath(losses)).parts
    named = typed[: len(typed) - files] if exact else tuple(takewhile(lambda part: not set(part) & set("*?["), typed))
    return PurePosixPath(path).parts[len(named) :]


def stamps(engine: Engine, pattern: str) -> dict[str, str]:
    """Return the stamp of what a path or a pattern means, by path, sorted; none where nothing is there.

    Raises UsageError for an object store that cannot be read.
    """
    if (store := engine.store(pattern)) is not None:
        return store.stamps(pattern)
    found = {path: os.stat(path) for (path,) in engine.all(f"FROM glob({text(pattern)}) ORDER BY ALL")}
    return {path: f"{stat.st_size} {stat.st_mtime_ns // 1000}" for path, stat in found.items()}


def first_line(error: BaseException) -> str:
    return one_line(str(error).partition("\n")[0]).rstrip(".: ")


def read_file(engine: Engine, losses: str, path: str, stamp: str, columns: Sequence[str] | None) -> File:
    """Return what a file of LOSSES says of the columns. Raises UsageError where it cannot be read, or lacks one."""
    try:
        there = {column: kind for column, kind, *_ in engine.all(f"DESCRIBE FROM {parquet([path])}")}
        chunks = engine.all(
            "SELECT row_group_id, row_group_num_rows, path_in_schema, stats_min_value, stats_max_value, "
            f"stats_null_count FROM parquet_metadata({text(escape(path))}) ORDER BY ALL"
        )
    except duckdb.Error as error:
        raise UsageError(
            f"{path} cannot be read ({first_line(error)}); write it again, or {SKIPPING} leaves it out"
        ) from None
    columns = columns or (LISTS if LISTS[1] in there else LONG)
    in_folder, at = "", None
    if len(columns) == len(LONG) and columns[1].lower() not in map(str.lower, there):
        in_folder, kind, at = _in_folder(engine, _below(losses, path)[:-1], columns[1])
        there |= {columns[1]: kind} if in_folder else {}
    if lacking := [column for column in columns if column not in there]:
        raise UsageError(
            f"{path} has no column {lacking[0]}, it has {', '.join(there)}; name yours with --columns "
            f"{','.join(LONG)} or {','.join(LISTS)}, or {SKIPPING} leaves the file out"
        )
    types = tuple(there[column] for column in columns)
    _check_types(path, columns, types)
    rows = {group: count for group, count, *_ in chunks}
    by_column = {
        column: [(least, most) for _, _, of, least, most, nulls in chunks if of == column and nulls == 0]
        for column in (columns[0], columns[1])
    }
    bounds = [_bounds(by_column[column], kind, len(rows)) for column, kind in zip(columns[:2], types[:2], strict=True)]
    if in_folder:
        bounds[1] = at, at
    elif len(columns) == len(LONG) and bounds[1] is None and rows:
        column = name(columns[1])
        values = f"min({column}), max({column}), count(*) - count({column})"
        with suppress(duckdb.Error):  # scoring it will say what is wrong with it
            least, most, unknown = engine.one(f"SELECT {values} FROM {parquet([path])}")
            bounds[1] = None if unknown else (least, most)
    return File(path, int(stamp.split()[0]), stamp, types, tuple(rows.values()), bounds[0], bounds[1], in_folder)


def _in_folder(engine: Engine, folders: Sequence[str], column: str) -> tuple[str, str, Any]:
    """Return SQL of the column that the last of the folders called column=value has, its type, and the value."""
    values = [folder.partition("=")[2] for folder in folders if folder.startswith(f"{column}=")]
    if not values:
        return "", "", None
    value = f"url_decode({text(values[-1])})"
    casts = [f"try_cast({value} AS {kind})" for kind in IN_FOLDERS]
    found = engine.one(f"SELECT {', '.join(f'CASE WHEN {cast}::VARCHAR = {value} THEN {cast} END' for cast in casts)}")
    kind, at = next((kind, at) for kind, at in zip(IN_FOLDERS, found, strict=True) if at is not None)
    pattern = f"^(?s:.*/)?{re.escape(column)}=([^/]*)/"
    return f"url_decode(regexp_extract(__path, {text(pattern)}, 1))::{kind} AS {name(column)}", kind, at


def _check_types(path: str, columns: Sequence[str], types: Sequence[str]) -> None:
    of_losses = types[-1]
    item = of_losses.partition("[")[0]
    nested = "[" in of_losses
    wanted = "a list of numbers" if len(columns) == len(LISTS) else "a number"
    if nested != (len(columns) == len(LISTS)) or of_losses.count("[") > 1:
        raise UsageError(f"{path}: column {columns[-1]} is {of_losses}; {wanted} is due")
    if item not in NUMBERS and not item.startswith("DECIMAL"):
        raise UsageError(f"{path}: column {columns[-1]} is {of_losses}; {wanted} is due")


def _bounds(found: Sequence[tuple[Any, Any]], kind: str, groups: int) -> tuple[Any, Any] | None:
    """Return the least and the largest value that a footer has, where it has them of each row group."""
    if len(found) < groups or not groups or any(value is None for pair in found for value in pair):
        return None
    if kind in INTEGERS:
        return min(int(least) for least, _ in found), max(int(most) for _, most in found)
    if kind == "VARCHAR":
        return min(least for least, _ in found), max(most for _, most in found)
    return None


def read_files(
    engine: Engine, losses: str, stamps: dict[str, str], columns: Sequence[str] | None, skip: bool
) -> tuple[list[File], tuple[str, ...], list[Skipped]]:
    """Return the files that LOSSES are, the columns that are read, and what was skipped.

    Raises UsageError for a file that cannot be read or differs from the first in a column's type, unless ``skip``.
    """
    files: list[File] = []
    skipped = []
    for path, found in zip(
        stamps, engine.each(partial(_file_or_flaw, losses, columns), list(stamps.items())), strict=True
    ):
        if isinstance(found, File) and files and found.types != files[0].types:
            found = UsageError(
                f"{path} has {', '.join(found.types)} where {files[0].path} has {', '.join(files[0].types)}; "
                f"write them alike, or {SKIPPING} leaves out what differs from the first"
            )
        if isinstance(found, File):
            files.append(found)
        elif skip:
            skipped.append(Skipped(str(found).partition(";")[0], path))
        else:
            raise found
    if not files:
        raise UsageError(f"none of {len(stamps)} files can be read; the first: {skipped[0].what}")
    columns = columns or (LISTS if "[" in files[0].types[-1] else LONG)
    return [file for file in files if file.total], tuple(columns), skipped


def _file_or_flaw(
    losses: str, columns: Sequence[str] | None, engine: Engine, given: tuple[str, str]
) -> File | UsageError:
    """Return a file of a path and its stamp, or why it cannot be read."""
    try:
        return read_file(engine, losses, *given, columns)
    except ShortError:
        raise
    except UsageError as flaw:
        return flaw


def read_reference(
    engine: Engine, path: Path, columns: Sequence[str], skip: bool
) -> tuple[dict[Any, float | None], list[Skipped]]:
    """Return the loss of each checkpoint, in order, from a Parquet or CSV file; None for a loss that is not finite.

    Raises UsageError for a file without those columns, a checkpoint twice, and, unless ``skip``, a loss not finite.
    """
    reader = "read_csv" if path.suffix == ".csv" else "read_parquet"
    source = f"{reader}({text(escape(str(path)))}, hive_partitioning = false)"
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise UsageError(f"--reference {path} is {what}; give a table (.parquet, .csv) of checkpoint and loss")
    checkpoint, loss = columns
    try:
        rows = engine.all(f"SELECT {name(checkpoint)}, {name(loss)}::DOUBLE FROM {source} ORDER BY 1")
    except duckdb.Error as error:
        raise UsageError(
            f"--reference {path} holds no table with columns {checkpoint} and {loss} ({first_line(error)}); write one"
        ) from None
    found: dict[Any, float | None] = {}
    skipped = []
    for at, value in rows:
        if at is None or at in found:
            what = "a row without a checkpoint" if at is None else f"checkpoint {at} twice"
            raise UsageError(f"--reference {path} has {what}; leave one row a checkpoint")
        finite = value is not None and math.isfinite(value)
        if not finite and not skip:
            raise UsageError(
                f"--reference {path} has the loss {value} at checkpoint {at}; mend it, or {SKIPPING} leaves it out"
            )
        if not finite:
            skipped.append(Skipped(f"the reference loss at checkpoint {at} is {value}", str(path)))
        found[at] = value if finite else None
    if not found:
        raise UsageError(f"--reference {path} is empty; write one row a checkpoint")
    return found, skipped
