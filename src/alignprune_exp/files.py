"""Files that appear whole or not at all, what can be written into them, and the place of what can be computed again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a text begins that spreadsheets compute


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then move it into place: whole or not at all.

    Raises OSError, with the path, for what the disk refuses, even where ``write`` hides it behind an error of its own.
    """
    handled = sys.exc_info()[1]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # of a disk that can only be read, or what was never made
            temporary.unlink()
        if isinstance(error, Exception) and (refused := _of_the_disk(error, handled)) is not None:
            raise OSError(refused.errno, refused.strerror, str(path)) from None
        raise


def _of_the_disk(error: BaseException | None, before: BaseException | None) -> OSError | None:
    """Return the system's error below one of torch.save's writer, unless it was raised ``before``."""
    while error is not None and error is not before:
        if isinstance(error, OSError) and error.errno:
            return error
        error = error.__context__
    return None


def typed_path(text: str) -> Path:
    """Return a path that somebody has typed, ``~`` meaning a home. Raises UsageError for that of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{text} begins with the home of a user whom there is not; type the whole path") from None


def below(root: Path, pattern: str) -> list[Path]:
    """Return what fits a pattern below a folder, in order, but for what is hidden, as macOS leaves it beside files."""
    return sorted(
        path for path in root.glob(pattern) if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def printable(text: str | bytes) -> str:
    """Return a text, or a file's name, with ``\\xNN`` for every byte that is not of UTF-8: one that can be written."""
    encoded = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return encoded.decode("utf-8", "backslashreplace")


def csv(frame: pd.DataFrame) -> str:
    """Return a table as CSV, where a text that a spreadsheet would take for a formula stands behind a ``'``."""

    def plain(cell: Any) -> Any:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell

    texts = {
        name: column.map(plain)
        for name, column in frame.items()
        if any(isinstance(cell, str) and cell.startswith(FORMULA) for cell in column)
    }
    return frame.assign(**texts).rename(columns=plain).to_csv(index=False, lineterminator="\n")


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as the file's ending says: CSV that is safe to open in a spreadsheet, or Parquet."""
    if path.suffix == ".csv":
        write_atomically(path, lambda file: file.write(printable(csv(frame)).encode()))
    else:
        write_atomically(path, lambda file: frame.to_parquet(file, index=False))


def refuse_target(path: Path | None, endings: Sequence[str], force: bool) -> None:
    """Raise UsageError unless a file may be written there, before anything is computed for it."""
    if path is None:
        return
    if path.suffix not in endings:
        raise UsageError(f"{path} does not end in {' or '.join(endings)}; name a file that does")
    refuse_nowhere(path)
    if path.is_dir() or (path.exists() and not force):
        raise UsageError(f"{path} is there already; name another file{'' if path.is_dir() else ', or add --force'}")


def refuse_nowhere(path: Path) -> None:
    """Raise UsageError for a file or folder that is to be made in a folder that is not there."""
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}; make it, or name another one")


def keep_cached(place: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file of a `cache_folder`; a home that cannot be written costs seconds, no more."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, write)


def cache_folder(name: str) -> Path:
    """Return the folder of one kind of cached files; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignprune-exp" / name
