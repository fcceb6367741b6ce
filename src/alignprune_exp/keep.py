"""Which samples of a run to keep: python -m alignprune_exp.keep RUN --fraction 0.7 -o keep.parquet"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .console import command, parser_of
from .errors import UsageError
from .files import refuse_target, write_table
from .listing import CLEANING, check_known, labelled, score_to_list_by, scores_of
from .pruning.cleaning import within_class
from .pruning.selection import floor
from .runs import run_folder

if TYPE_CHECKING:
    import pandas as pd


def keep_list(samples: pd.DataFrame, fraction: float, by: str | None = None) -> pd.DataFrame:
    """Return one row a sample: index, path where known, keep, and the score that it is kept by.

    Kept are the floor(fraction * n) with the highest score: ``by``, as the run has it, or else the cleaning score,
    standardised within the given class. Ties go to the lower index; samples without a score are the first to go.

    Raises UsageError for a score that no sample has.
    """
    import numpy as np

    if by is None:
        score = within_class(samples[f"score_{score_to_list_by(samples)}"].to_numpy(), samples["label"].to_numpy())
    else:
        check_known(by, scores_of(samples))
        score = samples[f"score_{by}"].to_numpy(np.float64)
    index = samples["index"].to_numpy()
    order = np.lexsort((index, np.where(np.isnan(score), np.inf, -score)))
    keep = np.zeros(len(samples), bool)
    keep[order[: floor(fraction * len(samples))]] = True
    columns = ["index", *(["path"] if "path" in samples and samples["path"].notna().any() else [])]
    return samples[columns].assign(keep=keep, score=score)


def main(arguments: Sequence[str]) -> int:
    """Write the list; return the exit status."""
    parser = parser_of("keep", __doc__)
    parser.add_argument("--fraction", type=float, required=True, help="share of the samples to keep, above 0 up to 1")
    parser.add_argument("--by", help=f"the score to keep by, highest first (default: {CLEANING[0]}, within the class)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where to, as .parquet or .csv")

    def work() -> None:
        given = parser.parse_args(arguments)
        if not 0 < given.fraction <= 1:
            raise UsageError(f"--fraction {given.fraction:g} is no share; use one above 0, up to 1")
        refuse_target(given.out, (".parquet", ".csv"), given.force)
        frame = keep_list(labelled(run_folder(given.run, given.results)), given.fraction, given.by)
        if not frame["keep"].any():
            raise UsageError(f"--fraction {given.fraction:g} keeps none of {len(frame)} samples; use a larger one")
        write_table(given.out, frame)
        unknown = int(frame["score"].isna().sum())
        without = f"; {unknown} without a score were the first to go" if unknown else ""
        print(f"{given.out}: {frame['keep'].sum()} of {len(frame)} samples are kept{without}")

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
