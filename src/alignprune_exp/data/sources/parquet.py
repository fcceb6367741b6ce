"""Parquet files of an image classification set, as on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UsageError
from ...files import below
from .. import columns
from ..images import Shards
from ..index import Found, Splits, Survey
from ..layout import Photographs
from ..source import fits_into_memory

# What follows a split's name in those of its shards on the hub; of ``<split>-<more>`` they are another split's.
NUMBERED = re.compile(r"(?:-(?P<more>.+))?-(?P<number>\d+)-of-(?P<of>\d+)(?:-[0-9a-f]+)?")


@dataclass(frozen=True, kw_only=True)
class Parquet(Photographs):
    """Shards of an image classification set of the Hugging Face hub: ``[data/]<split>[-*].parquet``."""

    image_column: str
    label_column: str
    train_split: str
    test_split: str
    holds = "<split>.parquet or <split>-*.parquet, or data/ with them"
    labels_clean = True

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """Relative to the folder, by split."""
        if self.train_split == self.test_split:
            raise UsageError(
                f"dataset.train_split and dataset.test_split are both {self.train_split}: type another to evaluate on"
            )
        found = {}
        for split, called in (("train", self.train_split), ("test", self.test_split)):
            found[split] = shards_of(self.folder, called, "data", called)
            if not found[split]:
                files = below(self.folder, "**/*.parquet")
                there = sorted({re.sub(r"-\d.*", "", file.stem) for file in files})
                raise UsageError(
                    f"dataset.{split}_split={called} has no {called}.parquet or {called}-*.parquet under {self.root}: "
                    f"the folder has {', '.join(there) or 'no Parquet file'}"
                )
        return found

    @cached_property
    def tables(self) -> dict[str, Tables]:
        """In memory before there are other processes, which then share them."""
        remedy = "type another dataset.image_column or dataset.label_column"
        return in_memory(self.folder, self.shards, [self.image_column], [self.label_column], remedy)

    def read(self, survey: Survey) -> tuple[list[str], Splits]:
        for name in ("", "data", self.train_split, self.test_split, *self.shards["train"], *self.shards["test"]):
            if (self.folder / name).exists():
                survey.stamp(self.folder / name)
        classes, splits = self.tables["train"].classes(self.label_column), {}
        counted = " (classes count from 0)" if classes == [str(c) for c in range(len(classes))] else ""
        for split, tables in self.tables.items():
            found = tables.found(survey, self.label_column, classes)
            named = [f"{label}{counted} in {tables.where}" for label in classes]
            splits[split] = survey.listed(found, tables.where, named)
        return classes, splits

    def store(self, split: str, paths: np.ndarray) -> Shards:
        return Shards(self.folder, paths, self.cut, self.tables[split].images)


def shards_of(root: Path, split: str, *folders: str) -> list[str]:
    """Return the Parquet files of a split, relative to ``root``, which has them itself or in one of ``folders``.

    Raises UsageError where they are numbered, as on the hub, and not all there once.
    """
    for place in (root, *(root / folder for folder in folders)):
        whole = sorted(place.glob(f"{split}.parquet"))
        if files := whole or _shards(split, sorted(place.glob(f"{split}-*.parquet"))):
            return [file.relative_to(root).as_posix() for file in files]
    return []


def _shards(split: str, files: list[Path]) -> list[Path]:
    """Return those of the files ``<split>-*.parquet`` that are not of ``<split>-<more>``, another split."""
    numbered = {file: NUMBERED.fullmatch(file.stem, len(split)) for file in files}
    own = [file for file, found in numbered.items() if not (found and found["more"])]
    places = {(int(found["number"]), int(found["of"])) for file in own if (found := numbered[file])}
    if not places:
        return own
    folder, (_, of) = own[0].parent, min(places)
    lacking = next((number for number in range(of) if (number, of) not in places), None)
    if lacking is not None:
        lacks = f"{split}-{lacking:05d}-of-{of:05d}.parquet"
        raise UsageError(f"{folder} has {own[0].name} and lacks {lacks}: fetch that, or move the others elsewhere")
    if len(own) > of:
        names = ", ".join(file.name for file in own)
        raise UsageError(f"{folder} has {names}, where {of} shards are the split {split}: move the others elsewhere")
    return own


def in_memory(
    root: Path, shards: Mapping[str, list[str]], image: Sequence[str], labels: list[str], remedy: str
) -> dict[str, Tables]:
    """Return the Parquet files of each split; see `Tables`.

    Raises UsageError also where memory cannot hold them, or a label means one class in a file and another elsewhere.
    """
    needed = sum((root / file).stat().st_size for file in chain(*shards.values()))
    instead = "write their images out as train/<class>/ and val/<class>/ and use dataset=imagenet"
    fits_into_memory(needed, f"the Parquet files under {root} take", instead)
    splits = {split: Tables(root, files, image, labels, remedy) for split, files in shards.items()}
    for column in labels:
        _agree(column, {root / file: table for split in splits.values() for file, table in split.tables.items()})
    return splits


class Tables:
    """The Parquet files of a split.

    Args:
        root: their folder.
        files: relative to it.
        image: what the column of encoded images, a struct with ``bytes``, may be called.
        labels: the columns of class numbers or names.
        remedy: what to do about other columns.

    Attributes:
        where: they lie.
        images: encoded, of each file, pyarrow.ChunkedArray of large_binary.

    Raises UsageError where they cannot be read, or have other columns.
    """

    def __init__(self, root: Path, files: list[str], image: Sequence[str], labels: list[str], remedy: str) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.root, self.remedy = root, remedy
        self.where = f"{root / files[0]}{' and its like' if len(files) > 1 else ''}"
        self.tables = {file: _table(root / file, image, labels, remedy) for file in files}
        images = {file: pc.struct_field(table.column(0), "bytes") for file, table in self.tables.items()}
        self.images = {file: column.cast(pa.large_binary()) for file, column in images.items()}

    def hub_names(self, column: str) -> list[str]:
        """Return the class names that the hub's ``datasets`` library writes into the schema, if any."""
        return next(filter(None, (_hub_names(table, column) for table in self.tables.values())), [])

    def classes(self, column: str) -> list[str]:
        """Return these names; else those that occur. Raises UsageError for numbers that are too large for classes."""
        if names := self.hub_names(column):
            return names
        values = {value for table in self.tables.values() for value in table.column(column).unique().to_pylist()}
        values -= {None}
        if all(isinstance(value, str) for value in values):
            return sorted(values)
        most, rows = max(values), sum(map(len, self.tables.values()))
        if most >= rows:
            what = f"the column {column} of {self.where} has numbers up to {most} in {rows} rows, which are no classes"
            raise UsageError(f"{what}: {self.remedy}")
        return [str(c) for c in range(most + 1)]

    def found(self, survey: Survey, column: str, classes: Sequence[str]) -> Iterator[Found]:
        """Yield the images with their labels out of a ``column``."""
        import pyarrow.compute as pc

        number_of = {value: c for c, value in enumerate(classes)}
        for file, table in self.tables.items():
            sizes = pc.fill_null(pc.binary_length(self.images[file]), 0).to_pylist()
            for row, value in enumerate(table.column(column).to_pylist()):
                label = number_of.get(value) if isinstance(value, str) else value
                if label is None or not 0 <= label < len(classes):
                    wanted = "one of the classes is" if isinstance(value, str) else f"0 to {len(classes) - 1} are"
                    has = f"no {column}" if value is None else f"{column} {value} where {wanted} wanted"
                    survey.refuse(f"row {row} of {self.root / file} has {has}", "mend or replace that file")
                else:
                    yield os.fsencode(f"{file}#{row}"), sizes[row], label


def _hub_names(table: Any, column: str) -> list[str]:
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _agree(column: str, tables: Mapping[Path, Any]) -> None:
    """Raise UsageError where labels are texts in a file and numbers in another, or numbers have other names there."""
    import pyarrow as pa

    kinds: dict[str, Path] = {}
    named: dict[tuple[str, ...], Path] = {}
    for file, table in tables.items():
        kinds.setdefault("numbers" if pa.types.is_integer(table.schema.field(column).type) else "texts", file)
        if names := _hub_names(table, column):
            named.setdefault(tuple(names), file)
    if len(kinds) > 1:
        holds = " and ".join(f"{kind} in {file}" for kind, file in kinds.items())
        raise UsageError(f"the column {column} holds {holds}: write the labels of all files in one way")
    if len(named) > 1:
        (ours, file), (theirs, other), *_ = named.items()
        pairs = enumerate(zip_longest(ours, theirs, fillvalue="nothing"))
        number, (one, another) = next((number, pair) for number, pair in pairs if len({*pair}) > 1)
        raise UsageError(
            f"class {number} of the column {column} is {one} in {file} and {another} in {other}: write all files with "
            "one list of names"
        )


def _table(file: Path, images: Sequence[str], labels: list[str], remedy: str) -> Any:
    """Return the columns of encoded images and of labels."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = columns.read(file, [images, *([label] for label in labels)], remedy)
    for place, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        kind, held = column.type, columns.holds(column)
        if place == 0:
            fits, wanted = _holds_bytes(kind), "a struct with binary bytes"
        else:
            fits, wanted = pa.types.is_integer(kind) or held == columns.TEXTS, "class numbers or names"
        if not fits:
            raise UsageError(f"the column {name} of {file} holds {held} where {wanted} are wanted: {remedy}")
    if len(table) and pc.struct_field(table.column(0), "bytes").null_count == len(table):
        what = f"the column {table.column_names[0]} of {file} has no bytes of an image"
        raise UsageError(f"{what}: write it with these, not with paths")
    return table


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind) or (place := kind.get_field_index("bytes")) < 0:
        return False
    return kind.field(place).type in (pa.binary(), pa.large_binary(), pa.binary_view())
