"""Columns of Parquet files: what they hold, whatever type a writer gave it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .source import brief

TEXTS = "texts"  # what `holds` calls them


def read(file: Path, wanted: Sequence[Sequence[str]] = (), remedy: str = "") -> Any:
    """Return a pyarrow.Table of a file's columns: for each name ``wanted`` the first there of what it may be, else all.

    Texts are large_string in it, be they stored as views, in a dictionary, or as bytes of UTF-8.

    Raises UsageError where the file cannot be read, has a column twice, or lacks one, of which ``remedy`` says what to
    do about it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(file).names
        chosen = [next((name for name in called if name in names), called[0]) for called in wanted] or names
        if lacking := [name for name in chosen if name not in names]:
            raise UsageError(f"{file} has no column {' and '.join(lacking)}, but {', '.join(names)}: {remedy}")
        counts = Counter(names)
        if twice := [name for name in chosen if counts[name] > 1]:
            raise UsageError(f"{file} has {counts[twice[0]]} columns {twice[0]}: write it with other names")
        table = pq.read_table(file, columns=chosen)
        table.validate(full=True)
        plain = pa.table({name: _plain(table.column(name)) for name in chosen})
        return plain.replace_schema_metadata(table.schema.metadata)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file} cannot be read as Parquet ({brief(error)}): fetch or write it anew") from None


def _plain(column: Any) -> Any:
    """Return a column out of its dictionary, and texts and bytes as large_string, or large_binary if not of UTF-8."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        return _plain(column.cast(kind.value_type))
    if kind in (pa.string(), pa.string_view(), pa.binary(), pa.binary_view(), pa.large_binary()):
        with suppress(pa.ArrowInvalid):
            return column.cast(pa.large_string())
        return column.cast(pa.large_binary())
    return column


def holds(column: Any) -> str:
    """Return what a column of `read` holds, for a sentence: `TEXTS`, or the name of its type."""
    import pyarrow as pa

    names = {pa.large_string(): TEXTS, pa.large_binary(): "bytes that are no UTF-8"}
    return names.get(column.type, str(column.type))
