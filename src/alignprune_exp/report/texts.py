"""A table as Markdown, CSV and LaTeX, and its headlines within a Markdown file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from ..console import one_line
from ..errors import UsageError
from ..files import csv
from .blocks import MISSING, blocks, corner, ids, of_seeds
from .tables import Table, mean_and_std, not_distinguishable_from_best, plus_minus


def wide_csv(table: Table) -> str:
    """Return one line a cell: the mean, spread, seeds, saved, difference with its interval, the paper's, runs."""
    lines = []
    bold = {column: not_distinguishable_from_best(table, column) for column in table.columns}
    for row in table.rows:
        for column in table.columns:
            runs, pair = table.runs(row, column), table.difference(row, table.suite.baseline, column)
            line: dict[str, Any] = {"row": row, "column": column, "metric": table.key, "n": len(runs)}
            if not runs.empty:
                line["mean"], line["std"] = mean_and_std(runs[table.key].tolist())
                line["saved"] = runs["saved"].mean()
                line["bold"] = row in bold[column]
            line["difference"], line["low"], line["high"] = pair or (None, None, None)
            line["paper"] = table.suite.paper.get(row, {}).get(column)
            line["runs"] = " ".join(ids(runs))
            lines.append(line)
    order = ["row", "column", "metric", "n", "mean", "std", "saved", "bold", "difference", "low", "high"]
    return csv(pd.DataFrame(lines, columns=[*order, "paper", "runs"]))


def long_csv(table: Table) -> str:
    """Return one line a run, with every number of its summary."""
    return csv(table.long)


def markdown(table: Table) -> str:
    """Return the table as Markdown."""
    parts = [f"# {table.suite.name}, scale={table.scale}"]
    for block in blocks(table):
        body = [[f"**{cell.text}**" if cell.bold else cell.text for cell in cells] for cells in block.body]
        parts += [f"## {_markdown(block.title)}", _markdown(block.caption), _markdown_table([block.head, *body])]
    return "\n\n".join([*parts, *map(_markdown, table.footnotes)]) + "\n"


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells, the first of which is the head."""
    texts = [[_markdown(text) for text in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in [texts[0], ["---"] * len(texts[0]), *texts[1:]])


def _markdown(text: str) -> str:
    """Return a text for a cell or a paragraph, in which there are no tags and no links."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def digest(table: Table, key: str | None = None) -> str:
    """Return the headlines alone as Markdown: mean ± std, a star where the pairing of labels is unverified.

    What has no ± is of one seed, what has (n=2) of two where others have more.
    Another ``key`` of the summaries may stand in their place, with three digits. Rows and columns of which no run has
    one are left out. Raises UsageError where none has it at all.
    """
    long, (shown, digits) = table.long, (table.key, table.metric.digits) if key is None else (key, 3)
    if key is not None and not (key in long and pd.api.types.is_numeric_dtype(long[key]) and long[key].notna().any()):
        raise UsageError(f"the runs of table {table.name} have no number {key}; a run's summary.json has the names")
    unverified = set(long.loc[long["pairing"] == "unverified", "column"]) if "pairing" in long else set()
    known = long.dropna(subset=[shown])
    rows = [row for row in table.rows if (known["row"] == row).any()]
    columns = [column for column in table.columns if (known["column"] == column).any()]
    lines = [[corner(table), *(f"{column}*" if column in unverified else column for column in columns)]]
    for row in rows:
        line = [row]
        for column in columns:
            values = table.runs(row, column)[shown].dropna().tolist()
            fewer = of_seeds(table, len(values)) if len(values) > 1 else ""
            line.append(plus_minus(values, digits) + fewer if values else MISSING)
        lines.append(line)
    return _markdown_table(lines)


def filled(text: str, tables: Iterable[Table]) -> str:
    """Return Markdown with every `digest` that it has a place for: ``<!-- table NAME -->`` … ``<!-- end -->``.

    ``<!-- table NAME KEY -->`` is for one of another number than the headline. Raises UsageError for a place whose
    table, or number, there is none of, or that does not end.
    """
    by_name = {table.name: table for table in tables}

    def fill(place: re.Match[str]) -> str:
        if (name := place[1]) not in by_name:
            raise UsageError(f"there is a place for table {name} and no such table; it could be {', '.join(by_name)}")
        if place[3] is None:
            raise UsageError(f"the place for table {name} does not end; write <!-- end --> on a line below it")
        key = place[2]
        return f"<!-- table {name}{f' {key}' if key else ''} -->\n{digest(by_name[name], key)}\n<!-- end -->"

    until_the_next = r"(?:(?!^<!-- table ).)*?"
    return re.sub(rf"(?ms)^<!-- table (\S+)(?: (\S+))? -->[ \t]*$({until_the_next}<!-- end -->)?", fill, text)


_SPECIAL = str.maketrans(
    {
        **{character: f"\\{character}" for character in "_%&#${}"},
        "±": r"$\pm$",
        "–": "--",
        "Δ": r"$\Delta$",
        "−": "$-$",
        "½": r"$\frac12$",
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "[": "{[}",
        "]": "{]}",
        "<": "$<$",
        ">": "$>$",
    }
)


def _latex(text: str) -> str:
    return one_line(text).translate(_SPECIAL)


def latex(table: Table) -> str:
    """Return the table for LaTeX with booktabs, to be read in with ``\\input``; the runs stand in comments."""
    parts = [f"% {table.suite.name}, scale={table.scale}; needs \\usepackage{{booktabs}}"]
    for block in blocks(table):
        if block.title == "Runs":
            parts += ["% " + one_line(" ".join(cell.text for cell in cells)) for cells in block.body]
            continue
        head = " & ".join(map(_latex, block.head))
        lines = [
            " & ".join(f"\\textbf{{{_latex(cell.text)}}}" if cell.bold else _latex(cell.text) for cell in cells)
            for cells in block.body
        ]
        caption = _latex(f"{table.suite.name}, scale={table.scale}. {block.title}. {block.caption}")
        parts += [
            "\\begin{table}[ht]\n\\centering\\small",
            f"\\caption{{{caption}}}",
            f"\\begin{{tabular}}{{{'l' * len(block.head)}}}\n\\toprule",
            head + " \\\\\n\\midrule",
            *(line + " \\\\" for line in lines),
            "\\bottomrule\n\\end{tabular}\n\\end{table}",
        ]
    notes = [f"\\par\\noindent\\footnotesize {_latex(note)}" for note in table.footnotes]
    return "\n".join([*parts, *notes]) + "\n"
