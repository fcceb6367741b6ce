"""The images of the samples to look at first, beside each other."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .files import printable
from .listing import labelled, score_to_list_by, suspects
from .records import Damaged, read_config

if TYPE_CHECKING:
    import pandas as pd

    from .data.source import Source

SHEET_WIDTH = 16  # images beside each other
TILE = 64  # pixels, the side of an image on the sheet


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
    Image.open(io.BytesIO(contact_sheet(dataset_of(folder, data), frame))).save(buffer, "JPEG", quality=80)
    return Sheet(folder.name, by, len(frame), buffer.getvalue())


def contact_sheet(dataset: Mapping[str, Any], frame: pd.DataFrame) -> bytes:
    """Return a PNG of the samples' images in order, each above its given label; ``dataset`` is of the run's config.

    Raises UsageError where the data set is not where the config says, or has other images by now.
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
    if "path" in frame and source.train.paths is not None:
        for index, path, there in zip(rows, frame["path"], source.train.paths[rows], strict=True):
            if path != printable(there):
                raise UsageError(
                    f"the data set's image {index} is {printable(there)}, and the run's was {path}: it is another one "
                    "than the run's; put its images back, or list the samples without their images"
                )
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


def dataset_of(folder: Path, data: Path | None = None) -> dict[str, Any]:
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
