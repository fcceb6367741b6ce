"""Run records to figures. The same records give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import IO

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from ..files import write_atomically
from ..records import DYNAMICS, Damaged, Record, read_dynamics
from .tables import Table, label, mean_and_std

matplotlib.rcParams["axes.titley"] = 1.02  # left to itself, every drawing measures all ticks to place the titles
matplotlib.rcParams["text.parse_math"] = False

COLOURS = {"clean": "tab:blue", "all": "tab:blue", "noisy": "tab:red", "reference": "tab:green"}
AGAINST = {  # axes of a suite that are numbers, with what to write below them
    "score.window": "window N",
    "reference.size": "size of the reference set",
    "reference.noise": "noise in the reference set",
    "pruner.budget": "kept fraction of the pruning epochs",
    "pruner.ratio": "saved, as realised",
}
WIDE = 4  # panels beside each other at most


def draw(table: Table) -> dict[str, Figure]:
    """Return the table's figures by name; those for which there are no numbers are left out.

    A table with runs in one row alone, which compares nothing, has none. A run whose dynamics are damaged is not drawn
    from them, and the table's ``undrawn`` says why.
    """
    if table.long["row"].nunique() < 2:
        return {}
    made: dict[str, Callable[[Table], Figure | None]] = {
        "losses": losses,
        "scores": scores,
        "kept": kept,
        "accuracy": accuracy,
        "against": against,
    }
    figures = {f"{table.name}_{name}": make(table) for name, make in made.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def encode(figure: Figure, form: str) -> bytes:
    """Return the figure as ``pdf`` or ``png``, without dates; a PNG has 256 colours, a quarter of the bytes."""
    buffer = io.BytesIO()
    if form == "pdf":
        figure.savefig(buffer, format=form, metadata={"CreationDate": None})
    else:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "PNG")
    return buffer.getvalue()


def save(table: Table, folder: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Write the table's figures as ``<name>.pdf`` and ``<name>.png``; return the PNGs by name, and what is undrawn."""
    images = {}
    for name, figure in draw(table).items():
        for form in ("pdf", "png"):
            images[name] = encode(figure, form)
            write_atomically(folder / f"{name}.{form}", partial(_put, images[name]))
    return images, table.undrawn


def save_all(tables: Sequence[Table], folder: Path) -> dict[str, bytes]:
    """Write the figures of all tables, on all processors; return the PNGs by name."""
    images: dict[str, bytes] = {}
    with ProcessPoolExecutor() as pool:
        for table, (drawn, undrawn) in zip(tables, pool.map(save, tables, repeat(folder)), strict=True):
            table.undrawn.update(undrawn)
            images |= drawn
    return images


def _put(data: bytes, file: IO[bytes]) -> None:
    file.write(data)


def _dynamics(table: Table, record: Record, kind: str) -> pd.DataFrame:
    """Return one kind of a run's dynamics; of damaged ones nothing, which the table then says."""
    try:
        frame = read_dynamics(record)
    except Damaged as error:
        table.undrawn[record.folder.name] = error.reason
        return pd.DataFrame(columns=list(DYNAMICS))
    return frame[frame["kind"] == kind]


def _noisiest(table: Table) -> str:
    """Return the column whose dynamics are shown: the one with most runs, then most noise, then the first."""

    def worth(column: str) -> tuple[int, float]:
        runs = table.long[table.long["column"] == column]
        return len(runs), float(pd.to_numeric(runs["noise_rate"]).fillna(0).mean()) if len(runs) else 0.0

    return max(table.columns, key=worth)


def _records(table: Table, row: str, column: str) -> list[Record]:
    runs = table.runs(row, column)
    return [] if runs.empty else [table.records[id] for id in runs["id"]]


def _panels(count: int, height: float = 2.0, legend: int = 0) -> tuple[Figure, list[Axes]]:
    """Return ``count`` panels of ``height`` inches, with room for a legend of so many entries below them.

    The margins are set by hand: a layout engine draws every figure several times over.
    """
    across = min(count, WIDE)
    down = -(-count // across)
    below = 0.25 + 0.2 * -(-legend // 3) if legend else 0.0
    wide, high = 3.3 * across + 0.2, (height + 0.8) * down + 0.4 + below
    figure = Figure(figsize=(wide, high))
    figure.subplots_adjust(
        left=0.7 / wide,
        right=1 - 0.15 / wide,
        bottom=(below + 0.5) / high,
        top=1 - 0.65 / high,
        wspace=0.28,
        hspace=0.8 / height,
    )
    axes = [figure.add_subplot(down, across, place + 1) for place in range(count)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def losses(table: Table) -> Figure | None:
    """Quantile bands of the loss by epoch, one panel a row, of the first seed."""
    column = _noisiest(table)
    rows = {row: records[0] for row in table.rows if (records := _records(table, row, column))}
    frames = {row: _dynamics(table, record, "loss_quantile") for row, record in rows.items()}
    drawn = {row: frame for row, frame in frames.items() if len(frame)}
    if not drawn:
        return None
    figure, axes = _panels(len(drawn))
    for axis, (row, frame) in zip(axes, drawn.items(), strict=True):
        for group in ("all", "clean", "noisy", "reference"):
            wide = frame[frame["group"] == group].pivot(index="epoch", columns="x", values="value")
            if wide.empty:
                continue
            colour, quantiles = COLOURS[group], sorted(wide.columns)
            axis.plot(wide.index + 1, wide[quantiles[len(quantiles) // 2]], color=colour, label=group, lw=1.2)
            for low, high in zip(quantiles[: len(quantiles) // 2], quantiles[::-1], strict=False):
                axis.fill_between(wide.index + 1, wide[low], wide[high], color=colour, alpha=0.12, lw=0)
        axis.set(title=row, xlabel="epoch", ylabel="loss")
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{table.suite.name}, {column}: loss, median with 50 % and 90 % of the samples")
    return figure


def scores(table: Table) -> Figure | None:
    """Histograms of DAS and of the loss, clean against noisy, at a few epochs, of the baseline's first seed."""
    column = _noisiest(table)
    baseline = table.suite.baseline
    rows = [row for row in ([baseline] if baseline else []) + table.rows if row and _records(table, row, column)]
    if not rows:
        return None
    frame = _dynamics(table, _records(table, rows[0], column)[0], "histogram")
    panels = []
    for name in ("das", "loss"):
        epochs = sorted(frame.loc[frame["name"] == name, "epoch"].unique())
        if epochs:
            places = np.linspace(0, len(epochs) - 1, WIDE).round().astype(int)
            panels += [(name, epochs[place]) for place in dict.fromkeys(places.tolist())]
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    for axis, (name, epoch) in zip(axes, panels, strict=True):
        here = frame[(frame["name"] == name) & (frame["epoch"] == epoch)]
        for group in ("all", "clean", "noisy"):
            bars = here[here["group"] == group].sort_values("x")
            if bars.empty or bars["value"].sum() == 0:
                continue
            half = float(bars["x"].diff().median()) / 2
            edges = np.append(bars["x"] - half, bars["x"].iloc[-1] + half)
            share = bars["value"] / bars["value"].sum()
            axis.stairs(share, edges, fill=True, color=COLOURS[group], alpha=0.5, label=group)
        axis.set(title=f"epoch {epoch + 1}", xlabel=name, ylabel="share of samples")
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{table.suite.name}, {column}: scores of clean and noisy samples under {rows[0]}")
    return figure


def _by_epoch(table: Table, row: str, column: str, key: str) -> pd.Series:
    """Return the mean over seeds of one metric by epoch, without the epochs in which it is unknown."""
    runs = [record.rows for record in _records(table, row, column)]
    if not runs:
        return pd.Series(dtype=float)
    parts = [pd.Series([row[key] for row in rows], dtype=float) for rows in runs]
    return pd.concat(parts, axis=1).mean(axis=1).dropna()


def _lines(table: Table, axis: Axes, column: str, key: str) -> None:
    for number, row in enumerate(table.rows):
        line = _by_epoch(table, row, column, key)
        if len(line):
            axis.plot(line.index + 1, line, lw=1.2, color=f"C{number % 10}", ls=("-", "--", ":")[number // 10 % 3])
    keys = [name for name in table.suite.columns if "." in name]  # whose values alone say little
    axis.set(title=" ".join([*keys, column]), xlabel="epoch")


def _legend(table: Table, figure: Figure) -> None:
    rows = [row for row in table.rows if (table.long["row"] == row).any()]
    handles = [
        Line2D([], [], color=f"C{table.rows.index(row) % 10}", ls=("-", "--", ":")[table.rows.index(row) // 10 % 3])
        for row in rows
    ]
    figure.suptitle(table.suite.name)
    figure.legend(handles, rows, loc="lower center", ncols=3, fontsize="small")


def _entries(table: Table) -> int:
    return int(table.long["row"].nunique())


def _shown(table: Table) -> list[str]:
    return [column for column in table.columns if (table.long["column"] == column).any()]


def kept(table: Table) -> Figure | None:
    """Kept noise and kept fraction by epoch, mean over seeds, a line a row."""
    columns = _shown(table)
    figure, axes = _panels(2 * len(columns), legend=_entries(table))
    keys = {"kept_noise": "kept noise", "kept_fraction": "kept fraction"}
    pairs = [(column, key) for column in columns for key in keys]
    for axis, (column, key) in zip(axes, pairs, strict=True):
        _lines(table, axis, column, key)
        axis.set(ylabel=keys[key])
    if not any(axis.lines for axis in axes):
        return None
    _legend(table, figure)
    return figure


def accuracy(table: Table) -> Figure | None:
    """The headline by epoch, mean over seeds, a line a row."""
    columns = _shown(table)
    figure, axes = _panels(len(columns), 2.6, _entries(table))
    for axis, column in zip(axes, columns, strict=True):
        _lines(table, axis, column, f"test_{table.metric.name}")
        axis.set(ylabel=_measured(table))
    if not any(axis.lines for axis in axes):
        return None
    _legend(table, figure)
    return figure


def _measured(table: Table) -> str:
    return ", ".join(filter(None, (table.metric.words, table.metric.unit)))


def against(table: Table) -> Figure | None:
    """Accuracy over the suite's axis that is a number, mean and standard deviation over seeds, a line a method.

    The ratio is shown as the share of the training that it really saved.
    """
    names = [*table.suite.rows, *table.suite.columns]
    values = {name: {cell.axes[name] for cell in table.suite.cells} for name in names}
    number = next((name for name in AGAINST if len(values.get(name, ())) > 1), None)
    if number is None:
        return None
    others = [name for name in names if name != number and len(values[name]) > 1]
    lines: dict[str, list[tuple[float, float, float]]] = {}
    places = [(label(cell.axes, table.suite.rows), label(cell.axes, table.suite.columns)) for cell in table.suite.cells]
    for place, axes in dict(zip(places, (cell.axes for cell in table.suite.cells), strict=True)).items():
        if not (runs := table.runs(*place)).empty:
            x = float(runs["saved"].mean()) if number == "pruner.ratio" else float(axes[number])
            lines.setdefault(label(axes, others), []).append((x, *mean_and_std(runs[table.key].tolist())))
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure, (axis,) = _panels(1, 2.6)
    for name, points in lines.items():
        x, means, spreads = np.array(sorted(points)).T
        axis.errorbar(x, means, np.nan_to_num(spreads), marker="o", ms=4, lw=1.2, capsize=3, label=name or None)
    axis.set(xlabel=AGAINST[number], ylabel=_measured(table))
    if number == "reference.size":
        axis.set_xscale("log")
    if others:
        axis.legend(fontsize="small")
    fixed = [name for name in names if name != number and name not in others]
    figure.suptitle(", ".join([table.suite.name, *(next(iter(values[name])) for name in fixed)]))
    return figure


@dataclass(frozen=True)
class Followed:
    """A sample to show the method by: what it is, its losses (N,), its score, and whether it is kept."""

    what: str
    losses: NDArray[np.floating]
    score: float
    kept: bool


def method(samples: Sequence[Followed], reference: NDArray[np.floating], epochs: int) -> Figure:
    """Trajectories of some samples beside the reference's (N,), after ``epochs`` epochs, a panel a sample."""
    figure, axes = _panels(len(samples), 1.9)
    x = np.arange(epochs - len(reference), epochs) + 1
    top = 1.1 * max(float(sample.losses.max()) for sample in samples)
    for axis, sample in zip(axes, samples, strict=True):
        colour = COLOURS["clean" if sample.kept else "noisy"]
        axis.plot(x, reference, color=COLOURS["reference"], lw=2.5, alpha=0.6, label="reference set")
        axis.plot(x, sample.losses, color=colour, marker="o", ms=3, lw=1.2, label="this sample")
        fate = "kept" if sample.kept else "left out"
        axis.set(title=f"{sample.what}: DAS {sample.score:+.2f}, {fate}", xlabel="epoch", ylim=(0, top))
        axis.title.set_color(colour)
    axes[0].set(ylabel="loss")
    axes[0].legend(fontsize="small")
    return figure
