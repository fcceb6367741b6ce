"""DuckDB on one machine, within a memory limit; what goes wrong in it, by name."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

import duckdb

from ..errors import UsageError
from .inspect import File, ShortError, first_line, rows_of, text
from .layout import Part
from .store import Store, protocol_of

T = TypeVar("T")
R = TypeVar("R")
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50}


class BrokenError(Exception):
    """A row group of a file cannot be read."""

    def __init__(self, file: File, group: int, reason: str) -> None:
        super().__init__(file, group, reason)
        self.file, self.group, self.reason = file, group, reason

    def __str__(self) -> str:
        return f"{self.file.path}, row group {self.group}, cannot be read ({self.reason})"


class Workers(Protocol):
    """Who does the work on parts: an `Engine`, or the many of a Ray cluster.

    Attributes:
        memory: the bytes that a part may use.
    """

    memory: int

    def each(self, work: Callable[[Engine, Part], R], parts: Sequence[Part], alone: bool) -> Iterator[R]:
        """Yield what ``work`` returns for each part, as it is done; ``alone`` says that each may need all memory."""


class Engine:
    """DuckDB with so many threads and so much memory; what does not fit lies in the folder ``spill``.

    Attributes:
        threads: how many it uses.
        memory: the bytes that it may use.

    Raises UsageError for a limit that DuckDB does not know.
    """

    def __init__(self, spill: Path, memory: str | None = None, threads: int | None = None) -> None:
        self.connection, self.threads, self._limit = duckdb.connect(), 1, str(memory)
        self._cursors: list[duckdb.DuckDBPyConnection] = []
        self._stores: dict[str, Store] = {}
        self._lock = Lock()
        self.connection.execute("SET disabled_optimizers = 'statistics_propagation'")  # a footer is no proof of values
        for setting, value in (("temp_directory", spill), ("memory_limit", memory), ("threads", threads)):
            try:
                if value is not None:
                    self.connection.execute(f"SET {setting} = {text(str(value))}")
            except duckdb.Error as error:
                option = setting.partition("_")[0]
                raise UsageError(f"--{option} {value} is no such number ({first_line(error)}); use 8GB, say") from None
        self.threads = int(self.one("SELECT current_setting('threads')")[0])
        self._limit = str(self.one("SELECT current_setting('memory_limit')")[0])
        number, unit = self._limit.split()
        self.memory = int(float(number) * UNITS[unit])

    def store(self, path: str) -> Store | None:
        """Return the store that a path is in, which DuckDB can read from now on; None for one on disk.

        Raises UsageError as `Store` does.
        """
        if (protocol := protocol_of(path)) is None:
            return None
        with self._lock:
            if protocol not in self._stores:
                self._stores[protocol] = Store(protocol)
                self.connection.register_filesystem(self._stores[protocol])
            return self._stores[protocol]

    @contextmanager
    def _reading(self, files: Sequence[File] = ()) -> Iterator[None]:
        """Raise, in place of an error of DuckDB's, what it comes from.

        Raises Failed where a store has failed, ShortError where memory lacks, OSError where the disk is full, and
        BrokenError for the one of ``files`` that cannot be read.
        """
        try:
            yield
        except duckdb.InterruptException:
            raise
        except duckdb.OutOfMemoryException as error:
            raise ShortError(f"{self._limit} of memory do not suffice ({first_line(error)}); raise --memory") from None
        except duckdb.Error as error:
            for store in self._stores.values():
                store.check()
            if "No space left" in str(error):
                raise OSError(errno.ENOSPC, f"No space left on device ({first_line(error)})") from None
            for file in files:
                self._check(file)
            raise

    def one(self, sql: str, files: Sequence[File] = ()) -> tuple[Any, ...]:
        """Return the first row that a query of ``files`` has. Raises what `_reading` does, as all that reads here."""
        with self._reading(files):
            row = self.cursor().execute(sql).fetchone()
        assert row is not None
        return row

    def all(self, sql: str, files: Sequence[File] = ()) -> list[tuple[Any, ...]]:
        """Return the rows that a query of ``files`` has."""
        with self._reading(files):
            return self.cursor().execute(sql).fetchall()

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Return another connection to the same tables, for whichever thread asks."""
        self._cursors = [*self._cursors[-4 * self.threads :], cursor := self.connection.cursor()]  # the rest have ended
        return cursor

    def each(self, work: Callable[[Engine, T], R], items: Sequence[T], alone: bool = False) -> Iterator[R]:
        """Yield what ``work`` returns for each, in order; stop them all where one fails, or this is stopped."""
        with ThreadPoolExecutor(1 if alone else self.threads) as pool:
            futures = [pool.submit(work, self, item) for item in items]
            try:
                for future in futures:
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for cursor in self._cursors:
                    cursor.interrupt()
                raise

    def write(self, sql: str, target: Path, files: Sequence[File], options: str = "") -> None:
        """Write what a query of ``files`` has to a Parquet file, or with ``options`` to a folder of them."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._reading(files):
                self.cursor().execute(f"COPY ({sql}) TO {text(str(target))} (FORMAT parquet{options})")
        except duckdb.InterruptException:
            raise
        except duckdb.Error as error:
            raise UsageError(f"DuckDB cannot write {target}: {first_line(error)}") from None

    def _check(self, file: File) -> None:
        """Raise BrokenError for the first row group that cannot be decoded."""
        start = 0
        for group, rows in enumerate(file.rows):
            here = f"file_row_number BETWEEN {start} AND {start + rows - 1}"
            try:
                self.all(f"SELECT max(hash(COLUMNS(*))) FROM {rows_of([file])} WHERE {here}")
            except duckdb.Error as error:
                raise BrokenError(file, group, first_line(error)) from None
            start += rows
