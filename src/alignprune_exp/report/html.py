"""Tables and figures as one page that needs no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape

from ..suspects import Sheet
from .publish import scrubbed_command
from .tables import Block, Cell, Table, blocks

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem;
       color: CanvasText; background: Canvas; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; }
nav a { display: inline-block; margin-right: .8em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
tbody tr:hover, tr:target, li:target { background: var(--soft); }
td a { color: inherit; text-decoration-color: var(--line); text-underline-offset: .2em; }
td.command { white-space: normal; min-width: 20rem; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figure { margin: 1.5rem 0; overflow-x: auto; }
.drawn img { max-width: max(100%, 50rem); }
code { overflow-wrap: anywhere; }
.note { font-size: .9rem; }
@media (prefers-color-scheme: dark) { figure.drawn img { filter: invert(.93) hue-rotate(180deg); } }
@media print {
  :root { color-scheme: light; }
  body { max-width: none; font-size: 10pt; }
  figure.drawn img { filter: none; max-width: 100%; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; }
  th, td { white-space: normal; padding: .2em .4em; }
  tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], rows = [...body.rows];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[head.cellIndex].textContent, number = row => parseFloat(value(row));
  const missing = row => value(row) === "–";
  const numeric = rows.every(row => missing(row) || !Number.isNaN(number(row)));
  const order = (a, b) => numeric ? number(a) - number(b) : value(a).localeCompare(value(b));
  rows.sort((a, b) => missing(a) || missing(b) ? missing(a) - missing(b) : (up ? 1 : -1) * order(a, b));
  body.append(...rows);
});
"""


def page(tables: Sequence[Table], figures: Mapping[str, bytes], sheets: Mapping[str, Sheet] | None = None) -> str:
    """Return the report: every table with its figures (PNG by name), then every run with its command.

    ``sheets`` holds a contact sheet of suspects by the name of its table, where there is one.
    """
    sets: dict[str, tuple[str, ...]] = {}
    sections = [_section(table, figures, (sheets or {}).get(table.name), sets) for table in tables]
    contents = " ".join(f'<a href="#{_anchor(table)}">{escape(_title(table))}</a>' for table in tables)
    cells = [
        f'<li id="{anchor}">{", ".join(f"""<a href="#run-{id}">{id}</a>""" for id in ids)}</li>'
        for anchor, ids in sorted(sets.items())
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,">\n<title>Results</title>\n<style>{_STYLE}</style>\n</head>',
            "<body>\n<h1>Results</h1>",
            "<p>Every number leads to its runs and the commands that made them, as they were at the runs' commits; a "
            "click on a column's head sorts.</p>",
            f"<nav>{contents}</nav>",
            *sections,
            "<h2>Numbers of several runs</h2>\n<ul>",
            *cells,
            '</ul>\n<h2>Runs</h2>\n<div class="scroll"><table><thead><tr><th>run</th><th>command</th>'
            "<th>commit</th><th>precision</th></tr></thead><tbody>",
            *_runs(tables),
            f"</tbody></table></div>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n",
        ]
    )


def _section(table: Table, figures: Mapping[str, bytes], sheet: Sheet | None, sets: dict[str, tuple[str, ...]]) -> str:
    parts = [f'<section id="{_anchor(table)}">\n<h2>{escape(_title(table))}</h2>']
    parts += [_block(block, sets) for block in blocks(table)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in table.footnotes]
    for name, image in figures.items():
        if name.rpartition("_")[0] == table.name:
            parts.append(f'<figure class="drawn">{_image(name, image, "png")}</figure>')
    if sheet is not None:
        caption = (
            f"Samples to look at first: the {sheet.count} lowest in {escape(sheet.by)} of run "
            f'<a href="#run-{sheet.run}">{sheet.run}</a>, each above its given label.'
        )
        photos = _image(f"{table.name}_suspects", sheet.image, "jpeg")
        parts.append(f"<figure>{photos}<figcaption>{caption}</figcaption></figure>")
    return "\n".join([*parts, "</section>"])


def _image(name: str, data: bytes, form: str) -> str:
    return f'<img alt="{escape(name)}" src="data:image/{form};base64,{base64.b64encode(data).decode()}">'


def _block(block: Block, sets: dict[str, tuple[str, ...]]) -> str:
    head = "".join(f'<th scope="col"><button type="button">{escape(text)}</button></th>' for text in block.head)
    rows = ["<tr>" + "".join(f"<td>{_cell(cell, sets)}</td>" for cell in cells) + "</tr>" for cells in block.body]
    table = "\n".join(
        [f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>', *rows, "</tbody></table></div>"]
    )
    title, caption = escape(block.title), escape(block.caption)
    if block.title == "Runs":
        return f"<details><summary>{title}: {caption}</summary>\n{table}\n</details>"
    return f"<h3>{title}</h3>\n<p>{caption}</p>\n{table}"


def _cell(cell: Cell, sets: dict[str, tuple[str, ...]]) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if cell.bold else escape(cell.text)
    if not cell.runs:
        return text
    if len(cell.runs) == 1:
        return f'<a href="#run-{cell.runs[0]}">{text}</a>'
    anchor = "runs-" + hashlib.sha256(" ".join(cell.runs).encode()).hexdigest()[:12]
    sets[anchor] = cell.runs
    return f'<a href="#{anchor}">{text}</a>'


def _runs(tables: Sequence[Table]) -> list[str]:
    records = {id: record for table in tables for id, record in table.records.items()}
    lines = []
    for id, record in sorted(records.items()):
        command = escape(scrubbed_command(record.environment["command"]))
        commit, precision = (escape(str(record.environment[key])[:9]) for key in ("commit", "precision"))
        lines.append(
            f'<tr id="run-{id}"><td>{id}</td><td class="command"><code>{command}</code></td>'
            f"<td>{commit}</td><td>{precision}</td></tr>"
        )
    return lines


def _title(table: Table) -> str:
    return f"{table.suite.name}, scale={table.scale}" + (", best" if table.name.endswith("_best") else "")


def _anchor(table: Table) -> str:
    return f"table-{table.name}"
