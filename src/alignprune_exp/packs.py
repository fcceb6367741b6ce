"""Published records: the runs of a suite in one Parquet file, a row a run, which reads like their folders."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import UsageError, reason_of
from .files import write_atomically

FILES = {  # of a run's folder, by column; all texts but the dynamics, which are rows
    "config": "config.yaml",
    "summary": "summary.json",
    "environment": "environment.json",
    "metrics": "metrics.jsonl",
    "dynamics": "dynamics.parquet",
}
COLUMNS = {name: column for column, name in FILES.items()}
TEXTS = ("id", *(column for column in FILES if column != "dynamics"))
DIGESTS = ("digest", "digest_dynamics")  # of a row's texts, and of its dynamics
WHOLE = {"id", *FILES, *DIGESTS}  # the columns of a pack


@dataclass(frozen=True)
class Packed:
    """A run's folder, or a file in it, in a pack; it stands wherever a `Path` of one is read.

    Attributes:
        pack: the Parquet file.
        run: the run's id.
        file: the file's name; empty for the folder.
    """

    pack: Path
    run: str
    file: str = ""

    def __truediv__(self, name: str) -> Packed:
        return Packed(self.pack, self.run, name)

    def __str__(self) -> str:
        return f"{self.pack}: {self.run}" + (f"/{self.file}" if self.file else "")

    @property
    def name(self) -> str:
        return self.file or self.run

    @property
    def parent(self) -> Packed | Path:
        return Packed(self.pack, self.run) if self.file else self.pack

    def exists(self) -> bool:
        return not self.file or self.file in COLUMNS

    is_file = exists

    def read_bytes(self) -> bytes:
        """Raises FileNotFoundError for what is not packed, and OSError for dynamics that are damaged."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.file not in COLUMNS:
            raise FileNotFoundError(str(self))
        changed = self.pack.stat().st_mtime_ns
        table, rows = _opened(self.pack, changed)
        row = rows[self.run]
        if self.file != FILES["dynamics"]:
            return table[COLUMNS[self.file]][row].as_py().encode()
        try:
            dynamics = _dynamics(self.pack, changed)
        except (pa.ArrowException, OSError) as error:
            raise OSError(errno.EIO, reason_of(error), str(self)) from None
        content = dynamics[row].as_py()
        if _digest(content) != table["digest_dynamics"][row].as_py():
            raise OSError(errno.EIO, "it does not match its checksum", str(self))
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(content, pa.schema(list(dynamics.type.value_type))), buffer)
        return buffer.getvalue()


def packed_runs(folder: Path) -> list[Packed]:
    """Return the runs in the packs of a folder: all its Parquet files, if it is named ``records``.

    In any other folder a pack is what has the columns of one, and, beside such a file, what cannot be read at all.
    Raises UsageError for a pack that cannot be read.
    """
    packs = sorted(folder.glob("*.parquet"))
    if folder.absolute().name != "records":
        right = {path: _has_the_columns(path) for path in packs}
        packs = [path for path in packs if right[path] is not False] if True in right.values() else []
    return [Packed(pack, run) for pack in packs for run in _opened(pack, pack.stat().st_mtime_ns)[1]]


def _has_the_columns(path: Path) -> bool | None:
    """Return whether a Parquet file has a pack's columns; None where that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return set(pq.read_schema(path).names) >= WHOLE
    except (pa.ArrowException, OSError):
        return None


def pack(path: Path, runs: Mapping[str, Mapping[str, bytes]]) -> None:
    """Add runs to a pack, new or not: the files of each by name, as ``FILES`` has them; in order of their ids."""
    import pyarrow.parquet as pq

    old = []
    if path.exists():
        changed = path.stat().st_mtime_ns
        with _readable(path):
            old = _opened(path, changed)[0].append_column("dynamics", _dynamics(path, changed)).to_pylist()
    rows = {row["id"]: row for row in old} | {id: _row(id, files) for id, files in runs.items()}
    table = _table([rows[id] for id in sorted(rows)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path,
        lambda file: pq.write_table(table, file, compression="zstd", compression_level=15, write_page_checksum=True),
    )


def _table(rows: list[dict[str, Any]]) -> Any:
    """Return a pack's rows as a table whose dynamics have their columns in the order of which the digest is.

    Left to itself PyArrow has them so, or by the alphabet: up to its release 23 at least.
    """
    import pyarrow as pa

    schema = pa.Table.from_pylist(rows).schema
    place = schema.get_field_index("dynamics")
    struct = schema.field(place).type.value_type
    ordered = pa.struct([struct.field(name) for name in rows[0]["dynamics"][0]])
    return pa.Table.from_pylist(rows, schema.set(place, pa.field("dynamics", pa.list_(ordered))))


def _row(id: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = {"id": id} | {column: files[FILES[column]].decode() for column in TEXTS[1:]}
    dynamics = pq.read_table(pa.BufferReader(files[FILES["dynamics"]])).to_pylist()
    digests = dict(zip(DIGESTS, (_digest(list(texts.values())), _digest(dynamics)), strict=True))
    return {**texts, "dynamics": dynamics, **digests}


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()


@lru_cache(maxsize=64)
def _opened(path: Path, changed: int) -> tuple[Any, dict[str, int]]:
    """Return a pack's table less its dynamics, and the row of each run.

    ``changed`` is when, so that a new file is read anew.
    """
    import pyarrow.parquet as pq

    with _readable(path):
        if missing := WHOLE - set(pq.read_schema(path).names):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        table = pq.read_table(path, columns=[*TEXTS, *DIGESTS], page_checksum_verification=True)
        for row in table.to_pylist():
            if _digest([row[column] for column in TEXTS]) != row["digest"]:
                raise ValueError(f"run {row['id']} does not match its checksum")
    return table, {id: row for row, id in enumerate(table["id"].to_pylist())}


@lru_cache(maxsize=64)
def _dynamics(path: Path, changed: int) -> Any:
    """Return the column of the dynamics, most of a pack."""
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["dynamics"], page_checksum_verification=True)["dynamics"]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise UsageError for a pack that cannot be read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as published records ({reason_of(error)}): take it back with git"
        ) from None
