"""The samples of a run to look at first: python -m alignprune_exp.suspects <run folder or id> --top 200"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .console import command, one_line, parser_of
from .errors import UsageError
from .files import refuse_target, write_atomically, write_table
from .listing import CLEANING, OF_ALL, labelled, read_checked, score_to_list_by, suspects
from .pruning.cleaning import first
from .runs import run_folder
from .sheet import contact_sheet, dataset_of

if TYPE_CHECKING:
    import pandas as pd


def for_reading(frame: pd.DataFrame) -> str:
    """Return suspects as a table for the terminal, a line each."""
    shown = frame.assign(sure=[_percent(sure) for sure in frame["sure"]])
    shown["loss"] = [f"{loss:.3g}" if loss == loss else "–" for loss in frame["loss"]]
    likely = shown["likely_label"].astype(object).fillna("?") if "likely_label" in shown else ["?"] * len(shown)
    shown["given → likely"] = [f"{given} → {other}" for given, other in zip(shown["label"], likely, strict=True)]
    columns = ["index", "given → likely", *(["clean_label"] if "clean_label" in shown else []), "sure", "loss", "flag"]
    heads = {"index": "sample", "clean_label": "clean"}
    shown = shown[[*columns, *(["path"] if "path" in shown else [])]].rename(columns=heads)
    cells = [list(shown), *([one_line(str(cell)) for cell in row] for row in shown.to_numpy())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    texts = {"flag", "path"}
    return "".join(
        "  ".join(
            cell.ljust(width) if name in texts else cell.rjust(width)
            for cell, width, name in zip(row, widths, shown, strict=True)
        ).rstrip()
        + "\n"
        for row in cells
    )


def _percent(sure: float) -> str:
    if sure != sure:
        return "–"
    return ">99 %" if sure > 0.995 else "<1 %" if sure < 0.005 else f"{sure:.0%}".replace("%", " %")


def main(arguments: Sequence[str]) -> int:
    """List the suspects, and write the sheet if asked for; return the exit status."""
    parser = parser_of("suspects", __doc__, checked=True)
    parser.add_argument("--top", type=int, default=200, help="how many samples (default 200)")
    parser.add_argument("--by", help=f"the score to list by, lowest first (default: {', else '.join(CLEANING)})")
    parser.add_argument("-o", "--out", type=Path, help="write them there, as .csv or .parquet, instead of showing them")
    parser.add_argument("--sheet", type=Path, help="write the images there, as a PNG")

    def work() -> None:
        given = parser.parse_args(arguments)
        if given.top < 1:
            raise UsageError(f"--top {given.top} is no number of samples; use 1 or more")
        refuse_target(given.out, (".csv", ".parquet"), given.force)
        refuse_target(given.sheet, (".png",), given.force)
        folder = run_folder(given.run, given.results)
        samples = labelled(folder)
        by, checked = score_to_list_by(samples, given.by), read_checked(given.checked)
        frame = first(suspects(samples, by, checked), given.top, checked)
        sheet = contact_sheet(dataset_of(folder), frame) if given.sheet else None
        if given.out:
            write_table(given.out, frame)
            print(f"{given.out}: {len(frame)} of {len(samples)} samples")
        else:
            sys.stdout.write(for_reading(frame))
        lacking = f"; the run has no score {CLEANING[0]}" if given.by is None and by != CLEANING[0] else ""
        how = "" if by in OF_ALL else ", standardised within the given class"
        print(f"listed by {by}{how}, lowest first{lacking}", file=sys.stderr)
        if sheet is not None:
            write_atomically(given.sheet, lambda file: file.write(sheet))

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
