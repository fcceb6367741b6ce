"""Which ids to keep, from logged losses: python -m alignprune_exp.curate LOSSES --reference REF --keep 0.7 -o OUT

LOSSES is a folder or a pattern, on disk or in an object store, of Parquet files of (id, checkpoint, loss) or (id,
losses), REF a table (.parquet, .csv) of (checkpoint, loss). OUT/scores has (id, score, keep), and
OUT/summary.json the numbers.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import Parser, Progress, command
from ..errors import Failed, UsageError, refuse_load
from ..files import refuse_nowhere
from ..runs import Lock
from .formulas import SCORES

ENGINES = ("duckdb", "ray")
NEEDED = {  # by the package that is not there
    "duckdb": "curate works on DuckDB; type pip install 'alignprune-exp[curate]'",
    "ray": "curate --engine ray works on Ray; type pip install 'alignprune-exp[ray]'",
}


def main(arguments: Sequence[str]) -> int:
    """Score, cut and write; return the exit status."""
    parser = Parser(prog="python -m alignprune_exp.curate", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "losses", help="a folder or a pattern of Parquet files, on disk or at s3://, gs://, az://; or https://"
    )
    parser.add_argument("--reference", type=Path, help="the reference trajectory, as .parquet or .csv")
    parser.add_argument(
        "--score", choices=SCORES, default="das", help="default: %(default)s; settled needs no reference"
    )
    parser.add_argument("--keep", type=float, required=True, help="share of the ids to keep, above 0 up to 1")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--columns", help="their names, if not id,checkpoint,loss or id,losses")
    parser.add_argument("--gaps", action="store_true", help="ids may lack checkpoints, as where training was pruned")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="skip: go on, list what was left out"
    )
    parser.add_argument("--approximate", action="store_true", help="the threshold from a t-digest, in one look")
    parser.add_argument("--ids", action="store_true", help="write the kept ids alone, to OUT/ids")
    parser.add_argument("--engine", choices=ENGINES, default="duckdb", help="ray: on a cluster (default: %(default)s)")
    parser.add_argument(
        "--ray-address", help="HOST:PORT of the cluster, or auto (default: $RAY_ADDRESS, or a local one)"
    )
    parser.add_argument(
        "--memory", help="that DuckDB may use, as in 8GB (default: 80 %% of the machine's); with ray, in each worker"
    )
    parser.add_argument("--threads", type=int, help="default: one a processor; with ray, 1 in each worker")
    parser.add_argument("--force", action="store_true", help="write over what is there")
    again = "the same command goes on from what is scored"
    return command(lambda: work(parser.parse_args(arguments)), again, f"stopped; {again}")


def work(given: Namespace) -> None:
    """Do what was typed, and say what came of it.

    Raises UsageError or Failed, and leaves nothing behind that was not there unless something was scored.
    """
    check(given)
    try:
        from . import steps

        if given.engine == "ray":
            import ray  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise UsageError(NEEDED[error.name]) from None
    typed = {key: value for key, value in vars(given).items() if key not in ("on_error", "force")}
    typed["columns"] = tuple(given.columns.split(",")) if given.columns else None
    if given.engine == "ray":  # workers have another working directory
        typed |= {"losses": everywhere(given.losses), "out": given.out.absolute()}
    order = steps.Order(**typed, skip=given.on_error == "skip")
    refuse_folder(given.out, given.force, {steps.WORK, steps.SUMMARY, *steps.OUTPUTS, "lock"})
    new = not given.out.exists()
    given.out.mkdir(exist_ok=True)
    lock = Lock(given.out / "lock")
    try:
        summary = steps.curate(order, Progress().show)
    except (UsageError, Failed):
        if new and not any((given.out / steps.WORK).rglob("*.parquet")):
            shutil.rmtree(given.out)
        raise
    finally:
        lock.release()
    print(sentence(given.out / steps.OUTPUTS[given.ids], summary))


def check(given: Namespace) -> None:
    """Raise UsageError for options that mean nothing."""
    if not 0 < given.keep <= 1:
        raise UsageError(f"--keep {given.keep:g} is no share; use one above 0, up to 1")
    if given.reference is None and given.score != "settled":
        raise UsageError(f"--score {given.score} compares with a trusted set's losses; add --reference, or use settled")
    searched = os.path.realpath(given.losses.partition("**")[0])
    if Path(searched) in Path(os.path.realpath(given.out)).parents:
        raise UsageError(f"{given.out} lies in {given.losses}, so that it would be read as losses; name another place")
    if given.threads is not None and given.threads < 1:
        raise UsageError(f"--threads {given.threads} is no number of threads; use 1 or more")
    if given.threads is not None and given.engine != "ray":  # whose nodes say what they have
        refuse_load("--threads", given.threads)
    if given.ray_address is not None and given.engine != "ray":
        raise UsageError(f"--ray-address {given.ray_address} is of no use to DuckDB alone; add --engine ray")
    if given.ray_address is not None and "://" in given.ray_address:
        raise UsageError(f"--ray-address {given.ray_address} is a client's; type this on a node of it, with HOST:PORT")
    if given.columns is not None and len(given.columns.split(",")) not in (2, 3):
        raise UsageError(f"--columns {given.columns} names neither an id and losses nor an id, a checkpoint and a loss")


def everywhere(losses: str) -> str:
    """Return a path that means the same in every working directory."""
    return losses if "://" in losses else os.path.abspath(losses)


def refuse_folder(out: Path, force: bool, ours: set[str]) -> None:
    """Raise UsageError unless a folder may be written: it is new, half done, or done and ``force`` is given."""
    refuse_nowhere(out)
    if not os.path.lexists(out):
        return
    if not out.is_dir() or (others := {entry.name for entry in out.iterdir()} - ours):
        what = "no folder" if not out.is_dir() else f"a folder with {min(others)}"
        raise UsageError(f"{out} is {what}; name a folder that is new")
    if (out / "summary.json").exists() and not force:
        raise UsageError(f"{out} is there already; name another folder, or add --force")


def sentence(where: Path, summary: dict[str, Any]) -> str:
    """Return what came of it, in one line."""
    rate = summary["losses_rows"] / max(summary["seconds"], 1e-3)
    said = [f"{where}: {summary['kept']:,} of {summary['samples']:,} ids are kept, {rate:,.0f} rows/s"]
    if summary["unscored"]:
        said.append(f"{summary['unscored']:,} without a score were the first to go")
    if summary["missing_losses"]:
        said.append(f"{summary['missing_losses']:,} losses are missing")
    if summary["skipped"]:
        said.append(f"{len(summary['skipped'])} things were skipped, as listed in {where.parent / 'summary.json'}")
    return "; ".join(said)
