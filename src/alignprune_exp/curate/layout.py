"""How files of losses become parts that are scored one by one, without a shuffle where their order allows it.

rows         (id, [losses]): every row has its trajectory; a part is a file
checkpoints  a file a checkpoint, with the same ids in the same order: rows of one number are a trajectory; a part is a
             range of rows
blocks       the rows of an id follow each other, one a checkpoint, in order: so many rows are a trajectory; a part is a
             file
files        every file has all of its ids' losses, as disjoint ranges of ids prove: a part is a file, grouped by id
buckets      no order: the rows are first divided by a hash of the id; a part is a bucket, grouped by id
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from .inspect import INTEGERS, LISTS, File, name, rows_of, text

RANGE = 1 << 20  # rows of a part, where a file is read in ranges
SLACK = 3  # times the size of what is grouped that memory must hold
MOST_BUCKETS = 256
BATCH = 100_000  # rows a bucket that are divided at a time, so that files do not become tiny ones


@dataclass(frozen=True)
class Question:
    """What is asked of the losses.

    Attributes:
        score: one of `formulas.SCORES`.
        columns: of the files: id and list of losses, or id, checkpoint and loss.
        checkpoints: of a trajectory, in order; the numbers of places where the files have lists.
        reference: the loss to compare with at each of them; None where there is none.
    """

    score: str
    columns: tuple[str, ...]
    checkpoints: tuple[Any, ...]
    reference: tuple[float | None, ...]

    @property
    def lists(self) -> bool:
        return len(self.columns) == len(LISTS)


@dataclass(frozen=True)
class Part:
    """What is scored, or divided, at one time.

    Attributes:
        name: of what is written, a relative path.
        files: that are read.
        source: SQL of id, l0 …, again and apart, as `formulas` takes it; ``again`` counts losses too many, and
            ``apart`` says that rows of the same number are of different ids.
        apart: whether no other part can have one of its ids, and it has each once.
    """

    name: str
    files: tuple[File, ...]
    source: str
    apart: bool = False


def literal(value: Any) -> str:
    """Return a checkpoint as SQL has it."""
    if isinstance(value, float):
        return f"{text(repr(value))}::DOUBLE"
    return repr(value) if isinstance(value, int) else text(str(value))


def by_rows(files: Sequence[File], question: Question) -> list[Part]:
    """Return a part a file of lists."""
    id_, losses = map(name, question.columns)
    width = len(question.checkpoints)
    places = [f"{losses}[{k + 1}]::DOUBLE AS l{k}" for k in range(width)]
    again = f"greatest(coalesce(len({losses}), 0) - {width}, 0) AS again"
    columns = ", ".join([f"{id_} AS id", *places, again, "FALSE AS apart"])
    names = relative([file.path for file in files])
    return [Part(names[file.path], (file,), f"SELECT {columns} FROM {rows_of([file])}") for file in files]


def by_checkpoints(files: Sequence[File], question: Question) -> list[Part] | None:
    """Return parts of rows beside each other, or None where files are not of one checkpoint each and equally long."""
    shelves: dict[Any, list[File]] = {checkpoint: [] for checkpoint in question.checkpoints}
    for file in files:
        if file.checkpoints is None or file.checkpoints[0] != file.checkpoints[1]:
            return None
        if (shelf := shelves.get(file.checkpoints[0])) is None:
            return None
        shelf.append(file)
    lengths = [[file.total for file in shelf] for shelf in shelves.values()]
    if any(length != lengths[0] for length in lengths):
        return None
    rows = list(zip(*shelves.values(), strict=True))
    return [
        Part(f"part-{number:05}-{start:012}.parquet", row, _beside(row, start, end, question))
        for number, row in enumerate(rows)
        for start, end in _ranges(row[0])
    ]


def _ranges(file: File) -> list[tuple[int, int]]:
    """Return ranges of whole row groups, of ``RANGE`` rows or one row group at the least, but for the last."""
    cuts, start, end = [0], 0, 0
    for count in file.rows:
        end += count
        if end - start >= RANGE:
            cuts.append(end)
            start = end
    if end > start:
        cuts.append(end)
    return list(pairwise(cuts))


def _beside(row: Sequence[File], start: int, end: int, question: Question) -> str:
    """Return the source of rows ``start`` to ``end`` of files, one a checkpoint, beside each other."""
    id_, checkpoint, loss = map(name, question.columns)
    cut = "" if (start, end) == (0, row[0].total) else f" WHERE file_row_number BETWEEN {start} AND {end - 1}"
    tables = [
        f"(SELECT {id_} AS i{k}, {loss}::DOUBLE AS l{k}, {checkpoint} IS DISTINCT FROM {literal(at)} AS other{k} FROM "
        f" {rows_of([file])}{cut})"
        for k, (file, at) in enumerate(zip(row, question.checkpoints, strict=True))
    ]
    differ = [f"i{k} IS DISTINCT FROM i0" for k in range(1, len(row))] + [
        f"other{k}"
        for k in range(len(row))
        if row[k].types[1] not in INTEGERS  # of texts, a footer has a beginning
    ]
    losses = ", ".join(f"l{k}" for k in range(len(row)))
    joined = "\nPOSITIONAL JOIN ".join(tables)
    return f"SELECT i0 AS id, {losses}, 0 AS again, ({' OR '.join([*differ, 'FALSE'])}) AS apart\nFROM {joined}"


def by_blocks(files: Sequence[File], question: Question) -> list[Part] | None:
    """Return a part a file, or None where a file has no whole number of trajectories."""
    if any(file.total % len(question.checkpoints) for file in files):
        return None
    names = relative([file.path for file in files])
    return [Part(names[file.path], (file,), _in_blocks(file, question)) for file in files]


def _in_blocks(file: File, question: Question) -> str:
    """Return the source of a file's blocks; rows with another checkpoint or id than is due are apart."""
    id_, checkpoint, loss = map(name, question.columns)
    width = len(question.checkpoints)
    at = f"[{', '.join(map(literal, question.checkpoints))}]::{file.types[1]}[]"
    losses = [f"lead({loss}, {k}) OVER ()::DOUBLE AS l{k}" for k in range(width)]
    rows = ", ".join([f"{id_} AS id", *losses, f"{checkpoint} AS step", f"lag({id_}) OVER () AS before"])
    apart = f"step IS DISTINCT FROM ({at})[place + 1] OR (place > 0 AND id IS DISTINCT FROM before)"
    return (
        f"SELECT * EXCLUDE (step, before, place), 0 AS again\n"
        f"FROM (SELECT *, {apart} AS apart\n"
        f"FROM (SELECT {rows}, (row_number() OVER () - 1) % {width} AS place FROM {rows_of([file])}))\n"
        f"WHERE place = 0 OR apart"
    )


def by_files(files: Sequence[File], question: Question) -> list[Part] | None:
    """Return a part a file, or None where two files may have the same id."""
    bounds = [file.ids for file in files]
    known = [each for each in bounds if each is not None]
    if len(files) > 1 and (len(known) < len(files) or not _disjoint(known)):
        return None
    names = relative([file.path for file in files])
    return [Part(names[file.path], (file,), grouped(rows_of([file]), question), True) for file in files]


def _disjoint(bounds: Sequence[tuple[Any, Any]]) -> bool:
    return all(most < least for (_, most), (least, _) in pairwise(sorted(bounds)))


def grouped(rows: str, question: Question) -> str:
    """Return the source of a table's rows of id, checkpoint, loss, in any order."""
    id_, checkpoint, loss = map(name, question.columns)
    at = [literal(each) for each in question.checkpoints]
    losses = [f"max(CASE WHEN {checkpoint} = {each} THEN {loss} END)::DOUBLE AS l{k}" for k, each in enumerate(at)]
    known = f"{checkpoint} IN ({', '.join(at)})"
    columns = ", ".join([f"{id_} AS id", *losses, f"count({loss}) FILTER ({known}) AS losses"])
    there = " + ".join(f"(l{k} IS NOT NULL)::INTEGER" for k in range(len(at)))
    return (
        f"SELECT * EXCLUDE (losses), (losses - ({there}))::INTEGER AS again, FALSE AS apart\n"
        f"FROM (SELECT {columns}\nFROM {rows} GROUP BY ALL)"
    )


def buckets(files: Sequence[File], question: Question, memory: int) -> int:
    """Return into how many buckets the ids are divided, so that each can be grouped in ``memory`` bytes."""
    rows, width = sum(file.total for file in files), len(question.checkpoints)
    grouped_bytes = rows * 16 + rows / width * 128
    return int(min(MOST_BUCKETS, max(1, -(-SLACK * grouped_bytes // memory))))


def by_batches(files: Sequence[File], question: Question, buckets: int) -> list[Part]:
    """Return files in parts that are divided at a time; their source is the rows with their bucket."""
    batches: list[list[File]] = [[]]
    for file in files:
        if sum(each.total for each in batches[-1]) >= BATCH * buckets:
            batches.append([])
        batches[-1].append(file)
    columns = ", ".join(map(name, question.columns))
    bucket = f"(hash({name(question.columns[0])}) % {buckets})::INTEGER AS __bucket"
    return [
        Part(
            f"batch-{number:05}",
            tuple(batch),
            f"SELECT {columns}, {bucket} FROM {rows_of(batch)}",
        )
        for number, batch in enumerate(batches)
    ]


def by_bucket(files: Sequence[File], question: Question, number: int, tables: str) -> Part:
    """Return the part of one bucket, whose rows the table has."""
    return Part(f"bucket-{number:03}.parquet", tuple(files), grouped(tables, question), True)


def relative(paths: Sequence[str]) -> dict[str, str]:
    """Return names for what is written for each file: its path below the folder that all share, as one of .parquet."""
    split = {path: PurePosixPath(path).parts for path in paths}
    shared = 0
    while (
        all(len(parts) > shared + 1 for parts in split.values())
        and len({parts[shared] for parts in split.values()}) == 1
    ):
        shared += 1
    ending = "" if all(path.endswith(".parquet") for path in paths) else ".parquet"  # of all: no two become the same
    return {path: "/".join(parts[shared:]) + ending for path, parts in split.items()}
