"""What the prose of a Markdown file claims, beside what the records say.

Under the paragraph that claims it, a line each, with nothing behind the sign or with what was found before:

    <!-- claims
    posterior_cpu sym0.5: posterior shorter = 60.8 of 5
    posterior_cpu sym0.5: posterior shorter - ce shorter = 6.5 [5.1, 7.8] of 5
    posterior_cpu sym0.5: ce topk_oracle - ce shorter by seeds 0,1 = 11.7 of 2
    posterior_cpu sym0.5: posterior shorter - untrusted_cpu sym0.5: sieve_features none = 2.5 of 3
    sieve_cpu sym0.5: sieve_readout - shorter each = 3.6, 3.4, 3.5
    sieve_cpu sym0.5: sieve_readout - shorter range = 3.4 to 3.6
    foretold_cpu.noise_estimate sieve_features cifar10: sym0.5 ≈ 0.49 of 3
    end -->

That is TABLE COLUMN: ROW, less another one of the same seeds, which another table or column may have: the mean of all
seeds or some, each by itself, or the least and the largest. TABLE.KEY is for another number of the summaries than the
headline. Behind = it stands in the paragraph in digits: 6.5, with 5.1 to 7.8 or [5.1, 7.8] where brackets ask for the
interval, "3.6, 3.4 and 3.5" of each, "3.4 to 3.6" of a range; behind ≈ in words, or rounded. What is negative
throughout may stand without its signs, as in "6.5 below".
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
    r"(?: by seeds? (?P<seeds>\d+(?:,\d+)*))?(?: (?P<of>each|range))? (?P<sign>[=≈])(?P<found>.*)"
)


def check(text: str) -> None:
    """Raise UsageError for a block of claims that does not end, and for a claim that cannot be read."""
    if len(BEGINS.findall(text)) > len(BLOCK.findall(text)):
        raise UsageError("a block of claims begins or ends otherwise than with <!-- claims and end -->, each on a line")
    for block in BLOCK.finditer(text):
        for line in _lines(block):
            if CLAIM.fullmatch(line) is None:
                raise UsageError(f"cannot read the claim {line!r}; write TABLE COLUMN: ROW - OTHER =")


def recounted(text: str, tables: Mapping[str, Table]) -> tuple[str, list[str]]:
    """Return Markdown whose claims hold what the tables, by their names, say, and a line for each that the prose lacks.

    Raises UsageError where `check` does, and for a claim of which there are no runs.
    """
    check(text)
    lacking: list[str] = []

    def of_block(block: re.Match[str]) -> str:
        above, number = _paragraph(text[: block.start()]), text.count("\n", 0, block.start()) + 1
        lines = []
        for line in _lines(block):
            claim, said = _recounted(line, tables)
            lines.append(claim)
            if missing := [forms[0] for forms in said if not _says(above, forms)]:
                lacking.append(f"the paragraph above line {number} does not say {' and '.join(missing)}: {claim}")
        return "\n".join(f"{block['indent']}{line}" for line in ["<!-- claims", *lines, "end -->"])

    return BLOCK.sub(of_block, text), lacking


def _lines(block: re.Match[str]) -> list[str]:
    return [line for line in map(str.strip, block["lines"].splitlines()) if line]


def _paragraph(before: str) -> str:
    """Return the last paragraph, or item of a list, but for the claims in it."""
    return re.split(r"\n[ \t]*\n|\n(?=[ \t]*(?:[*-]|\d+\.) )", BLOCK.sub("", before).rstrip())[-1]


def _says(paragraph: str, forms: Sequence[str]) -> bool:
    """Return whether one of the forms of some numbers stands in a paragraph, or one that words may make negative."""
    for form in forms:
        if all(sign or not float(number) for sign, number in re.findall(r"(−?)(\d+\.?\d*)", form)):
            forms = [*forms, form.replace("−", "")]
    text = " ".join(paragraph.replace("+", "").split())
    return any(re.search(rf"(?<![\d.−]){re.escape(form)}(?!\d|\.\d)", text) for form in forms)


def _recounted(line: str, tables: Mapping[str, Table]) -> tuple[str, list[list[str]]]:
    """Return a claim with what its table says, and what is to stand in the prose, in the forms that it may have."""
    claim = CLAIM.fullmatch(line)
    assert claim is not None  # by `check`
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
    found, said = _worded(claim["of"], values, interval, digits)
    return f"{line[: claim.start('found')]} {found}", said if claim["sign"] == "=" else []


def _worded(of: str | None, values: pd.Series, interval: Sequence[float], digits: int) -> tuple[str, list[list[str]]]:
    """Return numbers as a claim and as prose has them."""

    def figures(*numbers: float) -> list[str]:
        return [f"{number:z.{digits}f}".replace("-", "−") for number in numbers]

    if of == "each":
        *before, last = figures(*values)
        return ", ".join([*before, last]), [[" and ".join(filter(None, [", ".join(before), last]))]]
    if of == "range":
        ends = " to ".join(figures(values.min(), values.max()))
        return ends, [[ends]]
    mean, *bounds = figures(values.mean(), *interval)
    if not bounds:
        return f"{mean} of {len(values)}", [[mean]]
    inside = f"[{', '.join(bounds)}]"
    return f"{mean} {inside} of {len(values)}", [[mean], [inside, " to ".join(bounds)]]


def _values(claim: re.Match[str], table: Table, column: str, row: str) -> pd.Series:
    """Return a row's numbers by seed, of the seeds that a claim is of. Raises UsageError where there are none."""
    for what, name, there in (("row", row, table.rows), ("column", column, table.columns)):
        if name not in there:
            raise UsageError(
                f"the claim {claim.group()!r}: {table.name} has no {what} {name}; it could be {', '.join(there)}"
            )
    key, runs = claim["key"] or table.key, table.runs(row, column)
    values = runs[key].dropna() if key in runs and pd.api.types.is_numeric_dtype(runs[key]) else pd.Series()
    if claim["seeds"]:
        values = values[values.index.isin([int(seed) for seed in claim["seeds"].split(",")])]
    if values.empty:
        raise UsageError(f"the claim {claim.group()!r}: no such run of {row} at {column} has a number {key}")
    return values
