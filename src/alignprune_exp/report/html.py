"""What was found, the figures and the tables as one page that needs no network.

How it looks stands in ``page.html`` and ``page.css``; ``page.js`` sorts and filters, and reading needs none of it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..sheet import Sheet
from .blocks import MISSING, Block, blocks
from .figures import WITH_TABLES, Picture
from .findings import Findings, brief, findings, largest_first
from .publish import scrubbed_command
from .tables import Table, short


def page(tables: Sequence[Table], figures: Mapping[str, Picture], sheets: Mapping[str, Sheet] | None = None) -> str:
    """Return the report: what was found, with its figures, then every table folded, then every run with its command.

    ``figures`` are those of `figures.save_all`; ``sheets`` holds a contact sheet of suspects by the name of its table,
    where there is one.
    """
    found = findings(tables)
    first = _first_figures(found, tables, figures)
    leading = [one.table for one in found]
    tables = [*leading, *(table for table in tables if table not in leading)]
    numbers = [(table, cell) for table in tables for block in _shown_blocks(table) for cell in chain(*block.body)]
    numbers += [(one.table, sentence) for one in found for sentence in one.sentences]
    led = dict.fromkeys((table.name, cell.runs) for table, cell in numbers if cell.runs)
    popovers = {key: f"p{number}" for number, key in enumerate(led)}
    by_name = {table.name: table for table in tables}
    jinja = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return jinja.get_template("page.html").render(
        found=[{**_named(one.table), "sentences": one.sentences} for one in found],
        first=first,
        sections=[_section(table, figures, first, (sheets or {}).get(table.name)) for table in tables],
        methods=sorted({row for table in tables for row in table.long["row"]}),
        popovers=popovers,
        lists=[(id, _lines(by_name[name], runs)) for (name, runs), id in popovers.items()],
        runs=_runs(tables),
    )


def _first_figures(
    found: Sequence[Findings], tables: Sequence[Table], figures: Mapping[str, Picture]
) -> dict[str, Picture]:
    """Return the figures that stand first, by name: of the main claim, and of what is saved."""
    costs = largest_first(table for table in tables if table.suite.name == "cost")
    drawn = [name for table in costs if (name := f"{table.name}_against") in figures]
    names = drawn[:1]
    if found:
        main = found[0].table.name
        names = [f"{main}_differences", *names, f"{main}_kept"]
    return {name: figures[name] for name in names if name in figures}


def _named(table: Table) -> dict[str, Any]:
    best = ", best" if table.best else ""
    return {
        "name": table.name,
        "title": f"{table.suite.name}, scale={table.scale}{best}",
        "progress": table.progress,
    }


def _shown_blocks(table: Table) -> list[Block]:
    """Return the blocks but the list of runs, which stand behind the numbers here."""
    return [block for block in blocks(table) if block.title != "Runs"]


def _section(
    table: Table, figures: Mapping[str, Picture], first: Mapping[str, Picture], sheet: Sheet | None
) -> dict[str, Any]:
    own = [f"{table.name}_{kind}" for kind in WITH_TABLES if f"{table.name}_{kind}" in figures]
    return {
        **_named(table),
        "brief": brief(table),
        "blocks": _shown_blocks(table),
        "footnotes": table.footnotes,
        "above": [name for name in own if name in first],
        "figures": {name: figures[name] for name in own if name not in first},
        "sheet": sheet,
        "image": None if sheet is None else base64.b64encode(sheet.image).decode(),
    }


def _lines(table: Table, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return the runs in the table's order; a run that stands at several of its places is named with the first."""
    runs = table.long[table.long["id"].isin(ids)].drop_duplicates("id")
    return runs.assign(result=runs[table.key].map(table.metric.said)).to_dict("records")


def _runs(tables: Sequence[Table]) -> list[dict[str, str]]:
    records = {id: record for table in tables for id, record in table.records.items()}
    return [
        {
            "id": id,
            "command": scrubbed_command(record.environment["command"]),
            "commit": short(record.environment["commit"] or MISSING),
            "precision": record.environment["precision"],
        }
        for id, record in sorted(records.items())
    ]
