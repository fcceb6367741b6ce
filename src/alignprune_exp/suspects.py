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
from .files import write_atomically
from .runs import read_json, write_text

if TYPE_CHECKING:
    import pandas as pd

    from .data.source import Source

SHEET_WIDTH = 16  # images beside each other
TILE = 64  # pixels, the side of an image on the sheet


@dataclass(frozen=True)
class Sheet:
    """A contact sheet for a report: a JPEG of the ``count`` samples of a run that are lowest in the score ``by``."""

    run: str
    by: str
    count: int
    image: bytes


def report_sheet(folder: Path, data: Path, top: int = 3 * SHEET_WIDTH) -> Sheet:
    """Return the sheet of a run whose images lie in ``data/<dataset>/``; raise UsageError where they do not."""
    from PIL import Image

    samples = read_samples(folder)
    by = default_score(folder)
    frame = suspects(samples, by, top)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(contact_sheet(_dataset(folder, data), frame))).save(buffer, "JPEG", quality=80)
    return Sheet(folder.name, by, len(frame), buffer.getvalue())


def default_score(folder: Path) -> str:
    """Return the score that a run ranked by; ``small_loss`` where it ranked by none."""
    return (read_json(folder / "summary.json") or {}).get("score") or "small_loss"


def suspects(samples: pd.DataFrame, by: str, top: int) -> pd.DataFrame:
    """Return the ``top`` samples lowest in the score ``by``, with every score.

    Before the scores stand index, path and clean label where known, and the likely label: what the network took the
    sample for when it last trained on it.

    Samples without a score (NaN) come last. Raises UsageError for a score that the run does not have.
    """
    known = [column.removeprefix("score_") for column in samples if column.startswith("score_")]
    if by not in known:
        raise UsageError(f"--by {by}: the run has no such score; use one of {', '.join(known)}")
    samples = samples.rename(columns={"predicted": "likely_label"})
    columns = [name for name in ("index", "path", "label", "likely_label", "clean_label") if name in samples]
    columns = [name for name in columns if samples[name].notna().any()]
    scores = [f"score_{name}" for name in known]
    ordered = samples.sort_values([f"score_{by}", "index"], kind="stable", na_position="last")
    return ordered[[*columns, *scores]].head(top)


def run_folder(given: str, results: Path) -> Path:
    """Return the folder of a run that is given as a folder, or by its id under ``results``; raise UsageError."""
    for folder in (Path(given), results / "runs" / given, results / "records" / "runs" / given):
        if (folder / "config.yaml").is_file() or (folder / "summary.json").is_file():
            return folder
    raise UsageError(f"there is no run {given}; give a run's folder, or an id under {results / 'runs'}")


def read_samples(folder: Path) -> pd.DataFrame:
    """Return ``samples.parquet``; raise UsageError where it is missing or damaged."""
    import pandas as pd

    path = folder / "samples.parquet"
    if not path.is_file():
        published = " (published records have none)" if folder.parent.parent.name == "records" else ""
        raise UsageError(f"{path} is not there; it is written when a run finishes{published}")
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def contact_sheet(dataset: Mapping[str, Any], frame: pd.DataFrame) -> bytes:
    """Return a PNG of the samples' images in order, each above its given label; ``dataset`` is of the run's config.

    Raises UsageError where the data set is not where the config says.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    source = _source(tuple(sorted(dataset.items())))
    rows = frame["index"].to_numpy(np.int64)
    if len(rows) and rows.max() >= len(source.train):
        raise UsageError(f"the data set has {len(source.train)} training images, and the run saw image {rows.max()}")
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
    from .data.datasets import load

    return load({key: False if key == "download" else value for key, value in dataset})


def _dataset(folder: Path, data: Path | None = None) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
        dataset: dict[str, Any] = config["dataset"]
    except (OSError, ValueError, KeyError, TypeError, OmegaConfBaseException):
        raise UsageError(f"{folder / 'config.yaml'} cannot be read, and a contact sheet needs it") from None
    if data is not None and "root" in dataset:
        dataset["root"] = str(data / dataset["name"])
    if dataset.get("root", "") is None:
        raise UsageError(f"{folder} is a published record, which does not say where its images lie")
    return dataset


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; python -m alignprune_exp.suspects --help shows what there is")


def main(arguments: Sequence[str]) -> int:
    """Write the CSV, and the sheet if asked for; return 0, or 2 for a mistake."""
    parser = _Parser(prog="python -m alignprune_exp.suspects", description=__doc__)
    parser.add_argument("run", help="a run's folder, or its id")
    parser.add_argument("--top", type=int, default=200, help="how many samples (default 200)")
    parser.add_argument("--by", help="the score to sort by (default: the run's own, else small_loss)")
    parser.add_argument("--out", type=Path, help="write the CSV there instead of printing it")
    parser.add_argument("--sheet", type=Path, help="write the images there, as a PNG")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where ids are looked up")
    try:
        given = parser.parse_args(arguments)
        if given.top < 1:
            raise UsageError(f"--top {given.top} is no number of samples; use 1 or more")
        folder = run_folder(given.run, given.results)
        samples = read_samples(folder)
        by = given.by or default_score(folder)
        frame = suspects(samples, by, given.top)
        sheet = contact_sheet(_dataset(folder), frame) if given.sheet else None
        if given.out:
            write_text(given.out, frame.to_csv(index=False, lineterminator="\n"))
        else:
            sys.stdout.write(frame.to_csv(index=False, lineterminator="\n"))
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
