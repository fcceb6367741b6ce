"""What the prose of a Markdown file claims, beside what the records say.

Under the paragraph that claims it, a line each, with nothing behind the sign or with what was found before:

    <!-- claims
    posterior_cpu sym0.5: posterior shorter = 60.8 of 5
    posterior_cpu sym0.5: posterior shorter - ce shorter = 6.5 [5.1, 7.8] of 5
    posterior_cpu sym0.5: ce topk_oracle - ce shorter by seeds 0,1 = 11.7 of 2
    posterior_cpu sym0.5: posterior shorter - untrusted_cpu sym0.5: sieve_features none = 2.5 of 3
    sieve_cpu sym0.5: sieve_readout - shorter each = 3.6, 3.4, 3.4, 3.5
    foretold_cpu.noise_estimate sieve_features cifar10: sym0.5 ≈ 0.49 of 3
    end -->

That is TABLE COLUMN: ROW, less another one of the same seeds, which another table or column may have, of all seeds,
some, or each by itself; TABLE.KEY is for another number of the summaries than the headline. Behind = it stands in the
paragraph in digits, with the interval where brackets ask for one, and of several the least and the largest; behind ≈
in words, or rounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pandas as pd

from ..errors import UsageError
from .tables import Table, paired_difference

BLOCK = re.compile(r"(?ms)^(?P<indent>[ \t]*)<!-- claims$(?P<lines>.*?)^[ \t]*end -->$")
BEGINS = re.compile(r"<!--\s*claims")
CLAIM = re.compile(
    r"(?P<table>[^\s.]+)(?:\.(?P<key>\S+))? (?P<column>[^:]+): (?P<row>.+?)"
    r"(?: - (?:(?P<other_table>\S+) (?P<other_column>[^:]+): )?(?P<other>.+?))?"
    r"(?: by seeds? (?P<seeds>\d+(?:,\d+)*))?(?P<each> each)? (?P<sign>[=≈])(?P<found>.*)"
)


def recounted(text: str, tables: Mapping[str, Table]) -> tuple[str, list[str]]:
    """Return Markdown whose claims hold what the tables, by their names, say, and a line for each that the prose lacks.

    Raises UsageError for a claim that cannot be read, or of which there are no runs, and for a block that does not end.
    """
    if len(BEGINS.findall(text)) > len(BLOCK.findall(text)):
        raise UsageError("a block of claims begins or ends otherwise than with <!-- claims and end -->, each on a line")
    lacking: list[str] = []

    def of_block(block: re.Match[str]) -> str:
        above, number = _paragraph(text[: block.start()]), text.count("\n", 0, block.start()) + 1
        lines = []
        for line in filter(None, map(str.strip, block["lines"].splitlines())):
            claim, figures = _recounted(line, tables)
            lines.append(claim)
            if missing := dict.fromkeys(figure for figure in figures if not _says(above, figure)):
                lacking.append(f"the paragraph above line {number} does not say {' and '.join(missing)}: {claim}")
        return "\n".join(f"{block['indent']}{line}" for line in ["<!-- claims", *lines, "end -->"])

    return BLOCK.sub(of_block, text), lacking


def _paragraph(before: str) -> str:
    """Return the last paragraph, or item of a list, but for the claims in it."""
    return re.split(r"\n[ \t]*\n|\n(?=[ \t]*(?:[*-]|\d+\.) )", BLOCK.sub("", before).rstrip())[-1]


def _says(paragraph: str, figure: str) -> bool:
    """Return whether digits stand in a paragraph, whatever their sign."""
    return re.search(rf"(?<![\d.]){re.escape(figure.lstrip('−'))}(?!\d|\.\d)", paragraph) is not None


def _recounted(line: str, tables: Mapping[str, Table]) -> tuple[str, list[str]]:
    """Return a claim with what its table says, and the figures that are to stand in the prose."""
    claim = CLAIM.fullmatch(line)
    if claim is None:
        raise UsageError(f"cannot read the claim {line!r}; write TABLE COLUMN: ROW - OTHER =")
    for name in filter(None, (claim["table"], claim["other_table"])):
        if name not in tables:
            raise UsageError(f"the claim {line!r} is of no table {name}; it could be {', '.join(tables)}")
    table = tables[claim["table"]]
    digits = table.metric.digits if claim["key"] is None else 2
    values = ours = _values(claim, table, claim["column"], claim["row"])
    interval: Sequence[float] = ()
    if claim["other"]:
        beside = tables[claim["other_table"] or claim["table"]]
        base = _values(claim, beside, claim["other_column"] or claim["column"], claim["other"])
        values = (ours - base).dropna()
        if "[" in claim["found"] and len(values) > 1 and (difference := paired_difference(ours, base)):
            interval = difference[1:]
    if values.empty:
        raise UsageError(f"the claim {line!r} is of no seed that both have; leave it out")

    def figures(numbers: Sequence[float]) -> list[str]:
        return [f"{number:z.{digits}f}".replace("-", "−") for number in numbers]

    if claim["each"]:
        found, in_prose = ", ".join(figures(values.tolist())), [values.min(), values.max()]
    else:
        mean = float(values.mean())
        brackets = f" [{', '.join(figures(interval))}]" if interval else ""
        found, in_prose = f"{figures([mean])[0]}{brackets} of {len(values)}", [mean, *interval]
    return f"{line[: claim.start('found')]} {found}", figures(in_prose) if claim["sign"] == "=" else []


def _values(claim: re.Match[str], table: Table, column: str, row: str) -> pd.Series:
    """Return a row's numbers by seed, of the seeds that a claim is of. Raises UsageError where there are none."""
    key, runs = claim["key"] or table.key, table.runs(row, column)
    values = runs[key].dropna() if key in runs else pd.Series()
    if claim["seeds"]:
        values = values[values.index.isin([int(seed) for seed in claim["seeds"].split(",")])]
    if values.empty:
        raise UsageError(f"the claim {claim.group()!r}: no such run of {row} at {column} has {key}")
    return values
