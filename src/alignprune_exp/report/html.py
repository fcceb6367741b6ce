"""Tables and figures as one page that needs no network. How it looks stands in ``page.html``."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..suspects import Sheet
from .publish import scrubbed_command
from .tables import MISSING, Table, blocks


def page(tables: Sequence[Table], figures: Mapping[str, bytes], sheets: Mapping[str, Sheet] | None = None) -> str:
    """Return the report: every table with its figures (PNG by name), then every run with its command.

    ``sheets`` holds a contact sheet of suspects by the name of its table, where there is one.
    """
    shown = [_section(table, figures, (sheets or {}).get(table.name)) for table in tables]
    cells = [cell for section in shown for block in section["blocks"] for cells in block.body for cell in cells]
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    jinja.filters["anchor"] = _anchor
    return jinja.get_template("page.html").render(
        tables=shown,
        sets=sorted({_anchor(cell.runs): cell.runs for cell in cells if len(cell.runs) > 1}.items()),
        runs=_runs(tables),
    )


def _section(table: Table, figures: Mapping[str, bytes], sheet: Sheet | None) -> dict[str, Any]:
    return {
        "name": table.name,
        "title": f"{table.suite.name}, scale={table.scale}" + (", best" if table.name.endswith("_best") else ""),
        "blocks": blocks(table),
        "footnotes": table.footnotes,
        "figures": [(name, _base64(png)) for name, png in figures.items() if name.rpartition("_")[0] == table.name],
        "sheet": None if sheet is None else {**asdict(sheet), "data": _base64(sheet.image)},
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _anchor(runs: Sequence[str]) -> str:
    """Return where a number of these runs leads: to its run, or to the list of them."""
    if len(runs) == 1:
        return f"run-{runs[0]}"
    return "runs-" + hashlib.sha256(" ".join(runs).encode()).hexdigest()[:12]


def _runs(tables: Sequence[Table]) -> list[dict[str, str]]:
    records = {id: record for table in tables for id, record in table.records.items()}
    return [
        {
            "id": id,
            "command": scrubbed_command(record.environment["command"]),
            "commit": (record.environment["commit"] or MISSING)[:9],
            "precision": record.environment["precision"],
        }
        for id, record in sorted(records.items())
    ]
