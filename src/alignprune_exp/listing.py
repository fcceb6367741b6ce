"""The samples of a finished run, by how much the labels that it was given are to be doubted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .pruning.cleaning import table, within_class
from .pruning.signals import SIGNALS
from .records import read_config, read_samples, read_summary

if TYPE_CHECKING:
    import pandas as pd

CLEANING = ("settled", "small_loss")  # what samples are listed by: minus their mean loss, over all epochs if known
OF_ALL = ("transition",)  # scores that compare samples of all classes; others are standardised within the given one


def labelled(folder: Path) -> pd.DataFrame:
    """Return the samples of a finished run that has recorded losses of given labels. Raises UsageError for others."""
    samples = read_samples(folder)
    if (recorded := read_config(folder).get("recorded")) in SIGNALS:
        raise UsageError(f"{folder} has recorded {recorded}, and losses tell how sure one may be; give a run of these")
    if "asked" in (read_summary(folder) or {}):
        raise UsageError(
            f"{folder} has asked for right labels, whose losses it has recorded, and of the other samples none by a "
            "label; give a run that has trained on the given ones"
        )
    if "label" not in samples or samples["label"].isna().any():
        raise UsageError(f"{folder}/samples.parquet is without class labels; give a run whose task has some")
    return samples


def score_to_list_by(samples: pd.DataFrame, asked: str | None = None) -> str:
    """Return the score that is ``asked`` for, else the first of ``CLEANING`` that there is.

    Raises UsageError for a score that no sample has, and for one that would list the wrong samples.
    """
    known = scores_of(samples)
    there = [name for name in CLEANING if name in known]
    use = f"use {' or '.join(f'--by {name}' for name in there or known if name != 'loss')}"
    if asked == "loss":
        raise UsageError(f"--by loss would list the lowest loss first, which the cleanest samples have; {use}")
    if asked is not None:
        check_known(asked, known)
    if asked is None and not there:
        raise UsageError(f"no sample of the run has the score {' or '.join(CLEANING)}; {use}")
    return asked or there[0]


def check_known(asked: str, known: Sequence[str]) -> None:
    """Raise UsageError for a score that no sample has."""
    if asked not in known:
        raise UsageError(f"--by {asked}: no sample of the run has such a score; use one of {', '.join(known)}")


def scores_of(samples: pd.DataFrame) -> list[str]:
    """Return the names of the scores that samples have."""
    columns = [column for column in samples if column.startswith("score_") and samples[column].notna().any()]
    return [column.removeprefix("score_") for column in columns]


def suspects(samples: pd.DataFrame, by: str, checked: Mapping[int, int] | None = None) -> pd.DataFrame:
    """Return every sample of a run, the most suspect first, as `pruning.cleaning.table` does, by its index in the data.

    Beside its columns stand path and clean label, where known. The likely label is what the network took a sample for
    when it last trained on it. ``checked`` has the right labels that somebody has found, by index.

    Raises UsageError where ``checked`` has a sample that is none of the run's.
    """
    index = samples["index"].to_numpy()
    place = dict(zip(index.tolist(), range(len(index)), strict=True))
    if strangers := [each for each in checked or {} if each not in place]:
        raise UsageError(f"sample {strangers[0]} was checked, and the run has none of that index")
    predicted = samples.get("predicted")
    values = {
        "labels": samples["label"].to_numpy(),
        "settled": _cleaning_score(samples),
        "losses": samples["loss"].to_numpy(),
        "likely": None if predicted is None or predicted.isna().any() else predicted.to_numpy(),
        "checked": {place[each]: label for each, label in (checked or {}).items()},
    }
    scores = samples[f"score_{by}"].to_numpy()
    frame = table(**values, by=scores if by in OF_ALL else within_class(scores, values["labels"]))
    rows = frame["index"].to_numpy()
    frame["index"] = index[rows]
    if "likely_label" in frame:
        frame["likely_label"] = frame["likely_label"].astype("Int64").mask(frame["likely_label"] < 0)
    for name, where in (("clean_label", 2 + ("likely_label" in frame)), ("path", 1)):
        if name in samples and samples[name].notna().any():
            frame.insert(where, name, samples[name].to_numpy()[rows])
    return frame


def _cleaning_score(samples: pd.DataFrame) -> Any:
    """Return the score (n,) that tells how sure one may be; NaN where a run has none that does."""
    import numpy as np

    there = [name for name in CLEANING if name in scores_of(samples)]
    return samples[f"score_{there[0]}"].to_numpy() if there else np.full(len(samples), np.nan)


def read_checked(path: Path | None) -> dict[int, int]:
    """Return the right labels that somebody has found, by sample: columns ``index`` and ``label`` of a CSV or Parquet.

    Raises UsageError where that is not what the file holds.
    """
    import pandas as pd

    if path is None:
        return {}
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        columns = [frame[name].tolist() for name in ("index", "label")]
    except FileNotFoundError:
        raise UsageError(f"--checked {path} is not there") from None
    except Exception:  # pandas and Arrow raise many kinds
        columns = [[None]]
    if any(type(value) is not int for values in columns for value in values):
        raise UsageError(f"--checked {path} holds no table with whole numbers in columns index and label; write one")
    if len(set(columns[0])) < len(columns[0]):
        raise UsageError(f"--checked {path} has an index twice; leave one line a sample")
    return dict(zip(*columns, strict=True))
