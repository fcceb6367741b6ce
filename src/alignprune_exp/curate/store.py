"""Object stores and web servers as file systems that DuckDB reads, by fsspec: no extension of DuckDB's has to be there.

A library speaks to each: s3fs for s3://, gcsfs for gs://, adlfs for az://, and fsspec's own for https://.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from glob import escape
from typing import Any

from fsspec import AbstractFileSystem, filesystem

from ..console import one_line
from ..errors import Failed, UsageError

EXTRAS = {  # of this package, by protocol
    **dict.fromkeys(("s3", "s3a", "http", "https"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "azure"),
}
MARKS = ("ETag", "etag", "Last-Modified", "mtime")  # of a file's version, as stores call them, the surest first
WEB = ("http", "https")
NAMES = " (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL)"
EVER = datetime.fromtimestamp(0, UTC)


def protocol_of(path: str) -> str | None:
    """Return the protocol of an object store's path or a web address; None for what is on disk."""
    protocol, beyond, _ = path.partition("://")
    return protocol if beyond and protocol != "file" else None


class Store(AbstractFileSystem):
    """What DuckDB reads a protocol's files by, each as `stamps` found it: one that has changed since is not opened.

    Attributes:
        protocol: as it is typed before ``://``.

    Raises UsageError for a protocol that there is no library for.
    """

    cachable = False

    def __init__(self, protocol: str) -> None:
        super().__init__()
        self.protocol = protocol
        self._seen: dict[str, tuple[int, str]] = {}  # size and stamp by path
        self._trouble: list[str] = []
        try:
            self._files = filesystem(protocol, skip_instance_cache=True)
        except ValueError as error:
            raise UsageError(f"{protocol}:// is of no store that is known ({_said(error)}); use s3://, say") from None
        except ImportError as error:
            extra = f"; type pip install 'alignprune-exp[{EXTRAS[protocol]}]'" if protocol in EXTRAS else ""
            raise UsageError(f"{protocol}:// works on a library that is not there ({_said(error)}){extra}") from None

    def stamps(self, pattern: str) -> dict[str, str]:
        """Return the stamp of what a pattern means, by path, sorted.

        Raises UsageError where the store does not answer, or has no mark of a file's version.
        """
        try:
            found = self._find(pattern)
        except Exception as error:  # each library has its own
            raise UsageError(
                f"{_alone(pattern) or pattern} cannot be read ({_said(error)}); check the address, and the credentials "
                f"in the environment{NAMES if self.protocol.startswith('s3') else ''}"
            ) from None
        for path, info in found.items():
            if (stamp := _stamp(info)) is None:
                raise UsageError(
                    f"{path} comes without its size or version (ETag), so that a change would not be seen; download it"
                )
            self._seen[path] = info["size"], stamp
        return {path: self._seen[path][1] for path in sorted(found)}

    def _find(self, pattern: str) -> dict[str, dict[str, Any]]:
        """Return what the store says of files, by path."""
        if (path := _alone(pattern)) is None:
            found = {f"{self.protocol}://{name}": info for name, info in self._files.glob(pattern, detail=True).items()}
        else:
            try:
                found = {path: self._files.info(path)}
            except FileNotFoundError as error:
                if self.protocol in WEB and error.__cause__ and getattr(error.__cause__, "status", None) != 404:
                    raise error.__cause__ from None  # fsspec's takes anything for a file that is not there
                found = {}
        return {path: info for path, info in found.items() if info["type"] == "file"}

    def check(self) -> None:
        """Raise Failed if the store has failed: DuckDB takes that for an error like that of a file that is broken."""
        if self._trouble:
            raise Failed(f"{self._trouble[0]}; once that is mended, the same command goes on from what is scored")

    # ---- what DuckDB calls --------------------------------------------------------------------------------------

    def glob(self, path: str, **_: Any) -> list[str]:
        """Return the one path that is meant: `stamps` has found the files."""
        return [_alone(path) or path]

    def open(self, path: str, *_: Any, **__: Any) -> Reading:
        """Open a file, if it is still the one that was found."""
        return Reading(self, path)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return what `stamps` has found of a file."""
        return {"name": path, "size": self._seen[path][0], "type": "file"}

    def modified(self, path: str) -> datetime:
        """Return the same for each file, as none changes while it is open."""
        return EVER

    # ---- what `Reading` calls -----------------------------------------------------------------------------------

    def opened(self, path: str) -> Any:
        """Return the library's own open file. Raises OSError for one that has changed."""
        file = self._files.open(path, "rb", cache_type="none")  # DuckDB knows what it will need
        now = _stamp(file.details) or _stamp(self._files.info(path))  # a web server's file does not know its version
        if now != self._seen[path][1]:
            file.close()
            raise OSError("it has changed since this command began")
        return file

    def failed(self, path: str, error: Exception) -> None:
        """Remember what failed."""
        self._trouble.append(f"{path} cannot be read ({_said(error)})")


class Reading:
    """An open file of a store, as DuckDB reads it."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        try:
            self._file = store.opened(path)
        except Exception as error:
            store.failed(path, error)
            raise

    def seek(self, *place: int) -> int:
        return int(self._file.seek(*place))

    def tell(self) -> int:
        return int(self._file.tell())

    def read(self, length: int = -1) -> bytes:
        try:
            return bytes(self._file.read(length))
        except Exception as error:
            self._store.failed(self._path, error)
            raise

    def close(self) -> None:
        self._file.close()


def _alone(pattern: str) -> str | None:
    """Return the path that `glob.escape` has written as this pattern; None for one that may mean others."""
    path = re.sub(r"\[([*?[])\]", r"\1", pattern)
    return path if escape(path) == pattern else None


def _stamp(info: dict[str, Any]) -> str | None:
    """Return the size and the version of a file, or None where one is unknown."""
    mark = next((info[mark] for mark in MARKS if info.get(mark)), None)
    return None if info.get("size") is None or mark is None else f"{info['size']} {mark}"


def _said(error: Exception) -> str:
    """Return an error's first sentence, on one line."""
    return f"{type(error).__name__}: {one_line(str(error)).partition('. ')[0]}".rstrip(".: ")
