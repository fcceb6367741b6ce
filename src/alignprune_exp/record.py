"""What the epochs of a run have left so far: the process that trains holds it whole, and the files are copies."""

from __future__ import annotations

import io
import json
from typing import Any

from .files import write_atomically
from .runs import RunFolder, write_text


class Record:
    """The metrics of the epochs so far, and their dynamics.

    A checkpoint carries it, so that a run never goes on from files that somebody else may have changed.

    Attributes:
        rows: those of ``metrics.jsonl``, one an epoch.
        dynamics: the content of ``dynamics.parquet``; None before there is an epoch.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.dynamics: bytes | None = None
        self._table: Any = None

    def add(self, row: dict[str, Any], dynamics: list[dict[str, Any]]) -> None:
        """Take in an epoch: its row of metrics and its rows of dynamics."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.rows.append(row)
        new = pa.Table.from_pylist(dynamics)
        self._table = new if self._table is None else pa.concat_tables([self._table, new]).combine_chunks()
        file = io.BytesIO()
        pq.write_table(self._table, file)
        self.dynamics = file.getvalue()

    def write(self, folder: RunFolder) -> None:
        """Write both files, whole, whatever has become of them. Raises Failed if the folder is not owned any more."""
        folder.check_owned()
        write_text(folder.path / "metrics.jsonl", self._metrics())
        if (dynamics := self.dynamics) is not None:
            write_atomically(folder.path / "dynamics.parquet", lambda file: file.write(dynamics))

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._metrics(), "dynamics": self.dynamics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        import pyarrow.parquet as pq

        self.rows = [json.loads(line) for line in state["metrics"].splitlines()]
        self.dynamics = state["dynamics"]
        self._table = pq.read_table(io.BytesIO(self.dynamics)) if self.dynamics is not None else None

    def _metrics(self) -> str:
        return "".join(json.dumps(row, allow_nan=False) + "\n" for row in self.rows)
