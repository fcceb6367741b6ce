"""The samples of a run to look at first: python -m alignprune_exp.suspects <run folder or id> --top 200"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import command, one_line, parser_of
from .errors import UsageError
from .files import csv, refuse_target, write_atomically
from .pruning.cleaning import first, table
from .pruning.signals import SIGNALS
from .records import Damaged, read_config, read_samples, read_summary
from .runs import run_folder, write_text

if TYPE_CHECKING:
    import pandas as pd

    from .data.source import Source

SHEET_WIDTH = 16  # images beside each other
TILE = 64  # pixels, the side of an image on the sheet
CLEANING = ("settled", "small_loss")  # what samples are listed by: minus their mean loss, over all epochs if known


@dataclass(frozen=True)
class Sheet:
    """A contact sheet for a report: a JPEG of the first ``count`` suspects of a run by the score ``by``."""

    run: str
    by: str
    count: int
    image: bytes


def report_sheet(folder: Path, data: Path, top: int = 3 * SHEET_WIDTH) -> Sheet:
    """Return the sheet of a run whose images lie in ``data/<dataset>/``; raise UsageError where they do not."""
    from PIL import Image

    samples = labelled(folder)
    by = score_to_list_by(samples)
    frame = suspects(samples, by).head(top)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(contact_sheet(_dataset(folder, data), frame))).save(buffer, "JPEG", quality=80)
    return Sheet(folder.name, by, len(frame), buffer.getvalue())


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
    frame = table(**values, by=None if by == CLEANING[0] else samples[f"score_{by}"].to_numpy())
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
    if any(not isinstance(value, int) for values in columns for value in values):
        raise UsageError(f"--checked {path} holds no table with whole numbers in columns index and label; write one")
    if len(set(columns[0])) < len(columns[0]):
        raise UsageError(f"--checked {path} has an index twice; leave one line a sample")
    return dict(zip(*columns, strict=True))


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


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as the file's ending says: CSV that is safe to open in a spreadsheet, or Parquet."""
    if path.suffix == ".csv":
        write_text(path, csv(frame))
    else:
        write_atomically(path, lambda file: frame.to_parquet(file, index=False))


def contact_sheet(dataset: Mapping[str, Any], frame: pd.DataFrame) -> bytes:
    """Return a PNG of the samples' images in order, each above its given label; ``dataset`` is of the run's config.

    Raises UsageError where the data set is not where the config says.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    source = _source(tuple(sorted(dataset.items())))
    rows = frame["index"].to_numpy(np.int64)
    for what, most, there in (
        ("training images, and the run saw image", rows.max(initial=0), len(source.train)),
        ("classes, and the run saw label", frame["label"].max(), len(source.classes)),
    ):
        if most >= there:
            raise UsageError(f"the data set has {there} {what} {most}; it is another one than the run's")
    images = source.train.pixels(rows).numpy()
    across = min(SHEET_WIDTH, max(len(rows), 1))
    down = -(-len(rows) // across)
    caption = 14
    sheet = Image.new("RGB", (across * (TILE + 4), max(down, 1) * (TILE + caption + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, (image, label) in enumerate(zip(images, frame["label"], strict=True)):
        pixels = np.repeat(image, 3, 0) if len(image) == 1 else image
        tile = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).resize((TILE, TILE))
        x, y = place % across * (TILE + 4), place // across * (TILE + caption + 4)
        sheet.paste(tile, (x + 2, y + 2))
        pen.text((x + 2, y + TILE + 2), str(source.classes[int(label)])[:11], fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


@cache
def _source(dataset: tuple[tuple[str, Any], ...]) -> Source:
    from .config import DATASET

    return DATASET.make(
        DATASET.read(dict(dataset) | ({"download": False} if "download" in dict(dataset) else {}))
    ).open()


def _dataset(folder: Path, data: Path | None = None) -> dict[str, Any]:
    """Return the data set of a run's config, under ``data`` if given. Raises UsageError."""
    from .config import DATASET

    dataset = read_config(folder)["dataset"]
    if data is not None and "root" in dataset:
        dataset["root"] = str(data / str(dataset.get("name")))
    if dataset.get("root", "") is None:
        raise UsageError(f"{folder} is a published record, which does not say where its images lie")
    try:
        DATASET.read(dataset)
    except UsageError:
        raise Damaged(folder / "config.yaml", "no data set that there is") from None
    return dataset


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
        sheet = contact_sheet(_dataset(folder), frame) if given.sheet else None
        if given.out:
            write_table(given.out, frame)
            print(f"{given.out}: {len(frame)} of {len(samples)} samples")
        else:
            sys.stdout.write(for_reading(frame))
        lacking = f"; the run has no score {CLEANING[0]}" if given.by is None and by != CLEANING[0] else ""
        print(f"listed by {by}, standardised within the given class, lowest first{lacking}", file=sys.stderr)
        if sheet is not None:
            write_atomically(given.sheet, lambda file: file.write(sheet))

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
