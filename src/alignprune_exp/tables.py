"""Write every suite's tables and figures, and the report, from run records.

python -m alignprune_exp.tables [RESULTS ...] [--best] [--into FILE ...]        (default: results and results/records)

For each suite and scale that has finished runs: <out>/tables/<suite>_<scale>.md, .csv (a line a cell), _long.csv (a
line a run) and .tex; <out>/figures/<suite>_<scale>_<figure>.pdf and .png; and <out>/report.html, which opens with what
was found. A Markdown file gets the headlines alone wherever it says <!-- table <suite>_<scale> --> … <!-- end -->, and
another number of the runs' summaries where it says <!-- table <suite>_<scale> <key> -->; what its prose claims, as
report/claims.py has it, is compared with the tables.
The same records give the same bytes. What stands there of a suite without runs now is left, and named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from .commandline import own_folder
from .config import FORMER_SCALES
from .console import Parser, command, one_line
from .errors import UsageError
from .report.claims import check, recounted
from .report.figures import save_all
from .report.html import page
from .report.mirrored import download
from .report.tables import Table, make_table, read_records
from .report.texts import filled, latex, long_csv, markdown, wide_csv
from .report.workers import workers
from .runs import run_folders, write_text
from .sheet import Sheet, report_sheet
from .suites import load_suite, option_names

FILES = {".md": markdown, ".csv": wide_csv, "_long.csv": long_csv, ".tex": latex}  # of a table, by their ending
RESULTS = [Path("results"), Path("results/records")]
NAMED = 10  # runs in one line


def main(arguments: Sequence[str]) -> int:
    """Write what the records give; return the exit status."""
    parser = Parser(prog="python -m alignprune_exp.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "results", nargs="*", type=Path, default=RESULTS, help="folders that hold runs/, or published records"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="where tables/, figures/ and report.html go")
    parser.add_argument("--best", action="store_true", help="best values instead of final ones, in files of their own")
    parser.add_argument(
        "--into",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="Markdown files with places for tables, to be filled",
    )
    parser.add_argument("--config-dir", type=own_folder, help="a folder with suites of one's own, in suite/")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="finished runs of a Weights & Biases project as well")
    parser.add_argument("--data", type=Path, help="the folder of the data sets: the report then shows suspects' images")

    def work() -> None:
        given = parser.parse_args(arguments)
        with TemporaryDirectory() as mirrored:
            if given.wandb:
                download(given.wandb, Path(mirrored))
            write([*given.results, Path(mirrored)], given)

    return command(work)


def write(results: Sequence[Path], arguments: argparse.Namespace) -> None:
    """Write what the runs under ``results`` give, and say what is left out. Raises UsageError where that is nothing."""
    texts = {file: _read(file) for file in arguments.into}
    tables = _tables(results, arguments)
    lacking = []
    for file, (text, lacks) in [(file, _filled(file, texts[file], tables)) for file in texts]:  # all are right before
        write_text(file, text)
        lacking += [f"{file}: {each}" for each in lacks]
    folder, drawings = arguments.out / "tables", arguments.out / "figures"
    for place in (folder, drawings):
        place.mkdir(parents=True, exist_ok=True)
    images = save_all(tables, drawings)
    for id, reason in sorted({(id, reason) for table in tables for id, reason in table.undrawn.items()}):
        print(f"not drawn: {id} ({reason})", file=sys.stderr)
    for table in tables:
        stem = folder / table.name
        for ending, text_of in FILES.items():
            write_text(stem.with_name(f"{stem.name}{ending}"), text_of(table))
        print(f"{stem}.md: {table.progress}")
    for name in _left_over(folder, tables, arguments.best):
        print(
            f"{folder / name}.md is of an earlier time: there is no run of it now; remove it, {name}*.* beside it and "
            f"in {drawings}, or name the folder of its runs",
            file=sys.stderr,
        )
    report = arguments.out / ("report_best.html" if arguments.best else "report.html")
    write_text(report, page(tables, images, _sheets(tables, arguments.data)))
    print(report)
    if lacking:
        raise UsageError(f"{'; '.join(lacking)}; mend the prose, or write ≈ for = where it has words or rounds")


def _tables(results: Sequence[Path], arguments: argparse.Namespace) -> list[Table]:
    """Return the table of every suite and scale that has finished runs. Raises UsageError where none has."""
    records = read_records(results)
    for error, _ in records.damaged:
        print(f"left out: {error}", file=sys.stderr)
    if not records:
        places = [*map(str, arguments.results), *([arguments.wandb] if arguments.wandb else [])]
        raise UsageError(f"no finished runs under {', '.join(places)}; run a suite first")
    for place in arguments.results:
        if place not in RESULTS and not run_folders(place):
            print(f"no runs under {place}, which has neither runs/ nor published records in it", file=sys.stderr)
    scales = sorted({record.summary["scale"] for record in records.values()})
    for scale in sorted(set(scales) - set(option_names("scale", arguments.config_dir))):
        ids = ", ".join(record.folder.name for record in records.values() if record.summary["scale"] == scale)
        print(
            f"left out: no config has scale={one_line(scale)}, which {ids} ran at; give --config-dir", file=sys.stderr
        )
        scales.remove(scale)
    scales += [scale for scale, former in FORMER_SCALES.items() if former in scales and scale not in scales]
    names = sorted(option_names("suite", arguments.config_dir), key=lambda name: name != "main")
    asked = [(name, scale) for scale in scales for name in names]
    with workers() as pool:
        loading = [pool.submit(load_suite, name, [f"scale={scale}"], arguments.config_dir) for name, scale in asked]
        suites = [load.result() for load in loading]
    tables = [
        make_table(suite, scale, records, arguments.best) for suite, (_, scale) in zip(suites, asked, strict=True)
    ]
    if not (tables := [table for table in tables if not table.long.empty]):
        raise UsageError("no finished run belongs to a suite; run one with suite=NAME")
    shown = {id for table in tables for id in table.records}
    known = (record.summary["id"] for record in records.values() if record.summary["scale"] in scales)
    if others := [id for id in known if id not in shown]:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        print(f"in no table: {', '.join(others[:NAMED])}{more}, which no suite's grid has", file=sys.stderr)
    return tables


def _left_over(folder: Path, tables: Sequence[Table], best: bool) -> list[str]:
    """Return the names of tables that were written before, and are none of these: of suites without runs by now."""
    there = {file.name.removesuffix(".md") for file in folder.glob("*.md")}
    ours = {name for name in there if all((folder / f"{name}{ending}").is_file() for ending in FILES)}
    return sorted(name for name in ours - {table.name for table in tables} if name.endswith("_best") == best)


def _read(file: Path) -> str:
    """Return the text of a Markdown file. Raises UsageError for one that cannot be read, or whose claims cannot."""
    try:
        text = file.read_text(encoding="utf-8")
        check(text)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}; name a Markdown file that is there") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no text in UTF-8; name a Markdown file") from None
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return text


def _filled(file: Path, text: str, tables: Sequence[Table]) -> tuple[str, list[str]]:
    """Return what is to stand in a Markdown file, and what its prose lacks of that; see `recounted`.

    Raises UsageError for one that cannot be filled.
    """
    try:
        return recounted(filled(text, tables), {table.name: table for table in tables})
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def _sheets(tables: Sequence[Table], data: Path | None) -> dict[str, Sheet]:
    """Return the contact sheet of each table's noisiest run that has its samples, where the images are in ``data``."""
    sheets: dict[str, Sheet] = {}
    if data is None:
        return sheets
    for table in tables:
        runs = table.long.sort_values("noise_rate", ascending=False, kind="stable")["id"]
        places = (table.records[id].folder for id in runs)
        folders = [place for place in places if isinstance(place, Path) and (place / "samples.parquet").is_file()]
        try:
            if folders:
                sheets[table.name] = report_sheet(folders[0], data)
        except UsageError as error:
            print(f"{table.name} has no contact sheet: {error}", file=sys.stderr)
    return sheets


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
