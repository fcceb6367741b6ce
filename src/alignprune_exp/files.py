"""Files that appear whole or not at all, tables as CSV, and the place for what can be computed again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a text begins that spreadsheets compute


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then move it into place: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def cache_folder(name: str) -> Path:
    """Return the folder of one kind of cached files; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignprune-exp" / name
