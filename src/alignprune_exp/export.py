"""The samples of a run for other tools: python -m alignprune_exp.export RUN --to cleanlab|labelstudio|parquet -o PLACE

parquet      one flat table for DuckDB, Polars, pandas: every sample, how sure one may be, every score, probabilities
cleanlab     a folder with data.csv and pred_probs.npy, as cleanlab.Datalab reads them
labelstudio  a folder with tasks.json, the most suspect first, and labeling_config.xml for the project
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray

from .console import command, parser_of
from .errors import UsageError
from .files import csv, refuse_nowhere, refuse_target, write_atomically, write_table
from .listing import CLEANING, labelled, read_checked, scores_of, suspects
from .records import PROBABILITIES, read_probabilities
from .runs import run_folder, write_text

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Samples:
    """What is exported.

    Attributes:
        source: the run, or whatever else the samples come from.
        frame: (n rows) with index, label, sure and loss, the most suspect first; more columns where there are more.
        probabilities: (n, C) of the classes, in the order of the frame.
        names: of the classes, by number.
    """

    source: str
    frame: pd.DataFrame
    probabilities: NDArray[np.float32] | None = None
    names: Sequence[str] | None = None

    def name(self, label: Any) -> str:
        """Return what a class is called."""
        return str(self.names[int(label)] if self.names is not None else label)


def of_run(folder: Path, checked: dict[int, int] | None = None) -> Samples:
    """Return the samples of a finished run. Raises UsageError where it has none."""
    samples = labelled(folder)
    known = scores_of(samples)
    by = next((name for name in (*CLEANING, *known) if name in known), None)
    if by is None:
        raise UsageError(f"{folder} has no score of any sample; train it for an epoch more")
    frame = suspects(samples, by, checked)
    more = samples[["index", *(f"score_{name}" for name in known), "times_selected"]]
    frame = frame.merge(more, on="index", how="left", validate="one_to_one")
    kept = read_probabilities(folder, samples)
    if kept is None:
        return Samples(folder.name, frame)
    probabilities, names = kept
    place = samples["index"].argsort().to_numpy()
    rows = place[np.searchsorted(samples["index"].to_numpy()[place], frame["index"])]
    return Samples(folder.name, frame, probabilities[rows], names)


def to_parquet(samples: Samples, path: Path, force: bool) -> None:
    """Write one flat table, by index: the frame, and the probabilities as columns p_0 … ."""
    refuse_target(path, (".parquet",), force)
    frame = samples.frame
    if samples.probabilities is not None:
        columns = {f"p_{number}": values for number, values in enumerate(samples.probabilities.T)}
        frame = frame.assign(**columns)
    write_table(path, frame.sort_values("index"))


def to_cleanlab(samples: Samples, folder: Path, force: bool) -> None:
    """Write ``data.csv`` (index, label, path where known) and ``pred_probs.npy`` (n, C), in the order of the data set.

    Raises UsageError without probabilities.
    """
    if samples.probabilities is None:
        raise UsageError(
            f"{samples.source} kept no {PROBABILITIES}, which cleanlab needs; run it with keep_probabilities=true "
            "(and force=true, if it has finished)"
        )
    _own_folder(folder, force)
    order = samples.frame["index"].argsort(kind="stable").to_numpy()
    columns = [name for name in ("index", "label", "path") if name in samples.frame]
    data, probabilities = samples.frame[columns].iloc[order], samples.probabilities[order]
    write_text(folder / "data.csv", csv(data))
    write_atomically(folder / "pred_probs.npy", lambda file: np.save(file, probabilities))


def to_labelstudio(samples: Samples, folder: Path, force: bool) -> None:
    """Write ``tasks.json`` and ``labeling_config.xml``: a task a sample, whose prediction is its likely label.

    Label Studio lists predictions with the lowest score first, so a prediction's score is how sure one may be that the
    given label is *right*; what the network says of the likely label is the score within the result.
    """
    _own_folder(folder, force)
    tasks = [_task(samples, place, row) for place, row in enumerate(samples.frame.to_dict("records"))]
    write_text(folder / "tasks.json", json.dumps(tasks, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "labeling_config.xml", _labeling_config(samples))


def _task(samples: Samples, place: int, row: dict[str, Any]) -> dict[str, Any]:
    """Return the task of the sample in one ``row`` of the frame, at ``place``."""
    import pandas as pd

    label, likely = row["label"], row.get("likely_label")
    likely = label if likely is None or pd.isna(likely) else likely
    shown = {"image": row["path"]} if "path" in row else {"text": f"sample {row['index']}"}
    data = {**shown, "index": int(row["index"]), "label": samples.name(label), "flag": row["flag"]}
    result: dict[str, Any] = {
        "id": str(row["index"]),
        "from_name": "label",
        "to_name": "sample",
        "type": "choices",
        "value": {"choices": [samples.name(likely)]},
    }
    if samples.probabilities is not None:
        result["score"] = float(samples.probabilities[place, int(likely)])
    prediction: dict[str, Any] = {"model_version": f"alignprune {samples.source}", "result": [result]}
    if np.isfinite(row["sure"]):
        prediction["score"] = 1 - float(row["sure"])
    return {"data": data, "predictions": [prediction]}


def _labeling_config(samples: Samples) -> str:
    """Return the labelling interface that the tasks fit into."""
    if samples.names is None:
        columns = [samples.frame[name] for name in ("label", "likely_label") if name in samples.frame]
        labels = sorted({label for column in columns for label in column.dropna()})
    else:
        labels = list(range(len(samples.names)))
    choices = "".join(f"    <Choice value={quoteattr(samples.name(label))}/>\n" for label in labels)
    tag, value = ("Image", "$image") if "path" in samples.frame else ("Text", "$text")
    return (
        f'<View>\n  <{tag} name="sample" value="{value}"/>\n'
        '  <Header value="Given label:"/>\n  <Header value="$label"/>\n'
        f'  <Choices name="label" toName="sample" choice="single">\n{choices}  </Choices>\n</View>\n'
    )


def _own_folder(folder: Path, force: bool) -> None:
    """Make a folder to write into. Raises UsageError where something is there, which ``force`` writes over."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not force):
        hint = "" if folder.is_file() else ", or add --force"
        raise UsageError(f"{folder} is {'a file' if folder.is_file() else 'not empty'}; name another folder{hint}")
    refuse_nowhere(folder)
    folder.mkdir(exist_ok=True)


WRITERS: dict[str, Callable[[Samples, Path, bool], None]] = {
    "cleanlab": to_cleanlab,
    "labelstudio": to_labelstudio,
    "parquet": to_parquet,
}


def main(arguments: Sequence[str]) -> int:
    """Write the samples; return the exit status."""
    parser = parser_of("export", (__doc__ or "").splitlines()[0], checked=True)
    parser.add_argument("--to", choices=list(WRITERS), required=True, help="the tool")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a .parquet file, or a folder of its own")

    def work() -> None:
        given = parser.parse_args(arguments)
        samples = of_run(run_folder(given.run, given.results), read_checked(given.checked))
        WRITERS[given.to](samples, given.out, given.force)
        without = "" if samples.probabilities is not None else ", without probabilities, which the run has not kept"
        print(f"{given.out}: {len(samples.frame)} samples{without}")

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
