"""The samples of a run to look at first: python -m alignprune_exp.suspects <run folder or id> --top 200"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .files import csv, write_atomically
from .pruning.cleaning import within_class
from .records import Damaged, read_config, read_samples
from .runs import write_text

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

    samples = read_samples(folder)
    by = score_to_list_by(samples)
    frame = suspects(samples, by, top)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(contact_sheet(_dataset(folder, data), frame))).save(buffer, "JPEG", quality=80)
    return Sheet(folder.name, by, len(frame), buffer.getvalue())


def score_to_list_by(samples: pd.DataFrame, asked: str | None = None) -> str:
    """Return the score that is ``asked`` for, else the first of ``CLEANING`` that there is.

    Raises UsageError for a score that no sample has, and for one that would list the wrong samples.
    """
    scores = [column for column in samples if column.startswith("score_") and samples[column].notna().any()]
    known = [column.removeprefix("score_") for column in scores]
    there = [name for name in CLEANING if name in known]
    use = f"use {' or '.join(f'--by {name}' for name in there or known if name != 'loss')}"
    if asked == "loss":
        raise UsageError(f"--by loss would list the lowest loss first, which the cleanest samples have; {use}")
    if asked is not None and asked not in known:
        raise UsageError(f"--by {asked}: no sample of the run has such a score; use one of {', '.join(known)}")
    if asked is None and not there:
        raise UsageError(f"no sample of the run has the score {' or '.join(CLEANING)}; {use}")
    return asked or there[0]


def suspects(samples: pd.DataFrame, by: str, top: int) -> pd.DataFrame:
    """Return the ``top`` samples lowest in the score ``by``, standardised within the given class, with every score.

    Before the scores stand index, path and clean label where known, the likely label, which is what the network took
    the sample for when it last trained on it, and what they are listed by. Samples without a score (NaN) come last.
    """
    samples = samples.rename(columns={"predicted": "likely_label"})
    samples["standardised"] = within_class(samples[f"score_{by}"].to_numpy(), samples["label"].to_numpy())
    columns = [name for name in ("index", "path", "label", "likely_label", "clean_label") if name in samples]
    columns = [name for name in columns if samples[name].notna().any()]
    scores = [column for column in samples if column.startswith("score_")]
    ordered = samples.sort_values(["standardised", "index"], kind="stable", na_position="last")
    return ordered[[*columns, "standardised", *scores]].head(top)


def run_folder(given: str, results: Path) -> Path:
    """Return the folder of a run that is given as a folder, or by its id under ``results``; raise UsageError."""
    for folder in (Path(given).resolve(), results / "runs" / given, results / "records" / "runs" / given):
        if (folder / "config.yaml").is_file() or (folder / "summary.json").is_file():
            return folder
    raise UsageError(f"there is no run {given}; give a run's folder, or an id under {results / 'runs'}")


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; python -m alignprune_exp.suspects --help shows what there is")


def main(arguments: Sequence[str]) -> int:
    """Write the CSV, and the sheet if asked for; return 0, or 2 for a mistake."""
    parser = _Parser(prog="python -m alignprune_exp.suspects", description=__doc__)
    parser.add_argument("run", help="a run's folder, or its id")
    parser.add_argument("--top", type=int, default=200, help="how many samples (default 200)")
    parser.add_argument("--by", help=f"the score to list by, lowest first (default: {', else '.join(CLEANING)})")
    parser.add_argument("--out", type=Path, help="write the CSV there instead of printing it")
    parser.add_argument("--sheet", type=Path, help="write the images there, as a PNG")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where ids are looked up")
    try:
        given = parser.parse_args(arguments)
        if given.top < 1:
            raise UsageError(f"--top {given.top} is no number of samples; use 1 or more")
        folder = run_folder(given.run, given.results)
        samples = read_samples(folder)
        by = score_to_list_by(samples, given.by)
        frame = suspects(samples, by, given.top)
        sheet = contact_sheet(_dataset(folder), frame) if given.sheet else None
        if given.out:
            write_text(given.out, csv(frame))
        else:
            sys.stdout.write(csv(frame))
        lacking = f"; the run has no score {CLEANING[0]}" if given.by is None and by != CLEANING[0] else ""
        print(f"listed by {by}, standardised within the given class, lowest first{lacking}", file=sys.stderr)
        if sheet is not None:
            write_atomically(given.sheet, lambda file: file.write(sheet))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write: {error.strerror or error} ({error.filename})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
