"""Run records to figures, in colours that the colour-blind tell apart. The same records give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import repeat
from pathlib import Path
from typing import Any

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
from ..suites import label
from .tables import Difference, Table, as_number, capitalised
from .workers import workers

matplotlib.rcParams["axes.titley"] = 1.02  # left to itself, every drawing measures all ticks to place the titles
matplotlib.rcParams["text.parse_math"] = False

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK, GREY = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#777777",
)
CYCLE = (BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK)  # of Okabe and Ito, without the yellow that white swallows
DASHES = {"-": "o", "--": "s", ":": "^"}  # each with the marker of its points
COLOURS = {"clean": BLUE, "all": BLUE, "noisy": RED, "reference": GREEN}
AGAINST = {  # axes of a suite that are numbers, with what to write below them
    "score.window": "window N",
    "reference.size": "size of the reference set",
    "reference.noise": "noise in the reference set",
    "pruner.budget": "budget, a share of the samples",
    "pruner.ratio": "saved, as realised",
    "saved": "saved, as realised",
}
REALISED = ("pruner.ratio", "saved")  # of these, drawn at the share of the training that was really saved
WIDE = 4  # panels beside each other at most
WITH_TABLES = ("differences", "against")  # the kinds of figures that stand with their tables on a page
ON_PAGE = (*WITH_TABLES, "kept")  # which stands first, or nowhere
BAND = "mean over seeds, the band from the lowest to the highest seed"


@dataclass(frozen=True)
class Drawing:
    """A figure, what it shows, and what is seen in it, for those who do not see it."""

    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class Picture:
    """A figure as an ``svg`` element for a page, and its caption."""

    svg: str
    caption: str


def draw(table: Table) -> dict[str, Drawing]:
    """Return the table's figures by name; those for which there are no numbers are left out.

    A table with runs in one row alone, which compares nothing, has none. A run whose dynamics are damaged is not drawn
    from them, and the table's ``undrawn`` says why.
    """
    if table.long["row"].nunique() < 2:
        return {}
    made: tuple[Callable[[Table], Drawing | None], ...] = (differences, against, kept, accuracy, losses, scores)
    drawings = {f"{table.name}_{make.__name__}": make(table) for make in made}
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


def encode(figure: Figure, form: str, title: str | None = None) -> bytes:
    """Return the figure as ``pdf`` or ``png``, without dates; a PNG has 256 colours, a quarter of the bytes."""
    buffer = io.BytesIO()
    if form == "pdf":
        figure.savefig(buffer, format=form, metadata={"CreationDate": None, "Title": title})
    else:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "PNG")
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Return the figure as an ``svg`` element of a page, with ids that no figure of another name has.

    What a page does not need goes, which is half of the bytes: namespaces, the ids of groups, hundredths of a point,
    and the list of fonts.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    head, text = re.split(r"(?<=>)", buffer.getvalue().partition("<svg")[2], maxsplit=1)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 sans-serif", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<=\d)(\.\d)\d+", r"\1", tag[0]), text)  # what is written stays
    text = re.sub(r"\s*\n\s*", "\n", text)
    _, _, width, height = (float(number) for number in re.findall(r'viewBox="([^"]*)"', head)[0].split())
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{1.4 * width:.0f}"'
    return f'<svg {size} role="img" aria-label="{escape(alt)}">{text}'


def save(table: Table, folder: Path) -> tuple[dict[str, Picture], dict[str, str]]:
    """Write the figures as ``<name>.pdf`` and ``<name>.png``; return those of a page by name, and what is undrawn."""
    pictures = {}
    for name, drawing in draw(table).items():
        for form in ("pdf", "png"):
            _write(drawing, folder / f"{name}.{form}")
        if name.endswith(ON_PAGE):
            pictures[name] = Picture(inline_svg(drawing.figure, name, drawing.alt), drawing.caption)
    return pictures, table.undrawn


def _write(drawing: Drawing, path: Path) -> None:
    data = encode(drawing.figure, path.suffix[1:], drawing.caption)
    write_atomically(path, lambda file: file.write(data))


def save_all(tables: Sequence[Table], folder: Path) -> dict[str, Picture]:
    """Write the figures of all tables, on all processors; return those of a page by name."""
    pictures: dict[str, Picture] = {}
    with workers() as pool:
        for table, (drawn, undrawn) in zip(tables, pool.map(save, tables, repeat(folder)), strict=True):
            table.undrawn.update(undrawn)
            pictures |= drawn
    return pictures


def _dynamics(table: Table, record: Record, kind: str) -> pd.DataFrame:
    """Return one kind of a run's dynamics; of damaged ones nothing, which the table then says."""
    try:
        frame = read_dynamics(record)
    except Damaged as error:
        table.undrawn[record.folder.name] = error.reason
        return pd.DataFrame(columns=list(DYNAMICS))
    return frame[frame["kind"] == kind]


def _records(table: Table, row: str, column: str) -> list[Record]:
    return [table.records[id] for id in table.runs(row, column)["id"]]


def _panels(
    count: int,
    height: float = 2.0,
    legend: Mapping[str, Mapping[str, Any]] | None = None,
    across: int = WIDE,
    left: float = 0.7,
    width: float = 2.8,
) -> tuple[Figure, list[Axes]]:
    """Return ``count`` panels of so many inches, ``across`` at most beside each other, ``left`` inches for names.

    Below them stands what the lines are: the style of each line by its name, in as many columns as there is room for.
    The margins are set by hand: a layout engine draws every figure several times over.
    """
    across = min(count, across)
    down = -(-count // across)
    wide = (width + 0.5) * across + left - 0.5
    columns = max(1, min(3, int(wide / (0.75 + 0.08 * max(map(len, legend or ()), default=0)))))
    below = 0.25 + 0.2 * -(-len(legend) // columns) if legend else 0.0
    high = (height + 0.8) * down + 0.4 + below
    figure = Figure(figsize=(wide, high))
    if legend:
        handles = [Line2D([], [], **style) for style in legend.values()]
        figure.legend(handles, list(legend), loc="lower center", ncols=columns, fontsize="small")
    figure.subplots_adjust(
        left=left / wide,
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


def _style(number: int, points: bool = False) -> dict[str, Any]:
    """Return how the line of this number is drawn; with ``points``, markers tell what colours alone do not."""
    dash, marker = list(DASHES.items())[number // len(CYCLE) % len(DASHES)]
    return {"color": CYCLE[number % len(CYCLE)], "ls": dash, "lw": 1.4, "marker": marker if points else None, "ms": 4}


def _line(axis: Axes, style: Mapping[str, Any], values: pd.DataFrame) -> None:
    """Draw the mean over the seeds, which are columns, and the band between the lowest and the highest."""
    axis.plot(values.index, values.mean(axis=1), **style)
    if values.shape[1] > 1:
        low, high = values.min(axis=1), values.max(axis=1)
        axis.fill_between(values.index, low, high, color=style["color"], alpha=0.18, lw=0)


def _title(table: Table, figure: Figure, what: str) -> None:
    """Write what the figure shows above it, as large as it can be."""
    text = f"{table.suite.name}, scale={table.scale}: {what}"
    figure.suptitle(text, fontsize=min(12.0, 125 * figure.get_figwidth() / len(text)))


def _from_to(named: Iterable[tuple[str, float]], form: str) -> str:
    """Return the least and the largest of some values, with their names."""
    ordered = sorted(named, key=lambda pair: pair[1])
    (least, low), (most, high) = ordered[0], ordered[-1]
    return f"from {low:{form}} ({least}) to {high:{form}} ({most})"


def differences(table: Table) -> Drawing | None:
    """Paired differences to the baseline with their intervals, a panel a column."""
    found: dict[str, dict[str, Difference]] = {}
    for column in table.columns:
        for row in table.rows:
            if (pair := table.difference(row, table.suite.baseline, column)) is not None:
                found.setdefault(column, {})[row] = pair
    rows = [row for row in table.rows if any(row in pairs for pairs in found.values())]
    if not rows:
        return None
    names = 0.4 + 0.075 * max(map(len, rows))
    figure, axes = _panels(len(found), 0.21 * len(rows) + 0.2, across=2, left=names)
    told = []
    for place, (axis, (column, pairs)) in enumerate(zip(axes, found.items(), strict=True)):
        axis.set_xlim(*_frame(list(pairs.values())))
        axis.axvline(0, color=BLACK, lw=0.8)
        for row, pair in pairs.items():
            _interval(axis, rows.index(row), pair, table.metric.higher)
        axis.set_yticks(range(len(rows)), rows if place % 2 == 0 else [""] * len(rows))
        axis.set(title=table.headed(column), ylim=(len(rows) - 0.5, -0.5))
        means = {row: mean for row, (mean, *_) in pairs.items()}
        told.append(f"{table.headed(column)}: {_from_to(means.items(), f'+.{table.metric.digits}f')}")
    what = f"difference to {table.suite.baseline} in {table.points}"
    _title(table, figure, what)
    caption = (
        f"{capitalised(what)}, paired by seed, with 95 % intervals; an arrow where one goes on. Blue: better, "
        "orange: worse, grey: an interval that contains 0, hollow: one seed, and so no interval."
    )
    return Drawing(figure, caption, f"{caption} {'; '.join(told)}.")


def _frame(pairs: Sequence[Difference]) -> tuple[float, float]:
    """Return limits that hold 0, every mean, and of the intervals what lies no further out than these lie apart."""
    means = [0.0, *(mean for mean, _, _ in pairs)]
    ends = [*means, *(end for _, *interval in pairs for end in interval if not np.isnan(end))]
    span = max(means) - min(means) or 1.0
    low, high = max(min(ends), min(means) - span), min(max(ends), max(means) + span)
    return low - 0.08 * (high - low) - 0.01, high + 0.08 * (high - low) + 0.01


def _interval(axis: Axes, y: int, pair: Difference, higher: bool) -> None:
    mean, low, high = pair
    if np.isnan(low):
        axis.plot(mean, y, "o", ms=5, mfc="white", mec=GREY)
        return
    colour = GREY if low <= 0 <= high else BLUE if (low > 0) == higher else RED
    axis.plot([low, high], [y, y], color=colour, lw=1.6)
    axis.plot(mean, y, "o", ms=5, color=colour)
    left, right = axis.get_xlim()
    for end, frame, marker in ((low, left, "<"), (high, right, ">")):
        if not left <= end <= right:
            axis.plot(frame, y, marker, ms=5, color=colour, clip_on=False)


def against(table: Table) -> Drawing | None:
    """The headline over the suite's axis that is a number, a line a method, a panel for what else columns stand for.

    What is to be saved is shown as the share of the training that was really saved.
    """
    suite = table.suite
    values = {name: {cell.axes[name] for cell in suite.cells} for name in (*suite.rows, *suite.columns)}
    number = next((name for name in AGAINST if len(values.get(name, ())) > 1), None)
    if number is None:
        return None
    if not (lines := _points(table, number)):
        return None
    names = dict.fromkeys(name for drawn in lines.values() for name in drawn)
    styles = {name: _style(place, points=True) for place, name in enumerate(names)}
    legend, width = styles if len(styles) > 1 else None, 4.5 if len(lines) == 1 else 2.8
    figure, axes_of_figure = _panels(len(lines), 3.0 if legend else 2.6, legend, across=2, width=width)
    told = []
    for axis, (panel, drawn) in zip(axes_of_figure, lines.items(), strict=True):
        for name, points in drawn.items():
            by_seed = pd.DataFrame([values for _, values in points], index=[x for x, _ in points])
            _line(axis, styles[name], by_seed.sort_index(kind="stable"))
        axis.set(title=panel, xlabel=AGAINST[number], ylabel=table.measured)
        if number == "reference.size":
            axis.set_xscale("log")
        ends = [(f"{name} at {x:g}".strip(), float(v.mean())) for name, points in drawn.items() for x, v in points]
        told.append(f"{panel}: {_from_to(ends, f'.{table.metric.digits}f')}".removeprefix(": "))
    what = f"{table.measured} against {AGAINST[number].removesuffix(', as realised')}"
    _title(table, figure, what)
    caption = f"{capitalised(what)}: {BAND}."
    return Drawing(figure, caption, f"{caption} {'; '.join(told)}.")


def _points(table: Table, number: str) -> dict[str, dict[str, list[tuple[float, pd.Series]]]]:
    """Return the points (x, values by seed) of the panels that have a line, by panel and line; x may be there twice."""
    lines: dict[str, dict[str, list[tuple[float, pd.Series]]]] = {}
    for row, column, axes in table.places:
        runs = table.runs(row, column)
        x = float(runs["saved"].mean()) if number in REALISED and len(runs) else as_number(axes[number])
        if runs.empty or math.isnan(x):
            continue
        panel, line = (
            label(axes, [name for name in names if name != number]) for names in (table.suite.columns, table.suite.rows)
        )
        lines.setdefault(panel, {}).setdefault(line, []).append((x, runs[table.key]))
    return {panel: drawn for panel, drawn in lines.items() if any(len(points) > 1 for points in drawn.values())}


def _by_epoch(table: Table, row: str, column: str, key: str) -> pd.DataFrame:
    """Return one metric by epoch, counted from 1, a column a seed, without the epochs in which it is unknown."""
    runs = _records(table, row, column)
    values = {number: pd.Series([row[key] for row in record.rows], dtype=float) for number, record in enumerate(runs)}
    return pd.DataFrame(values).rename(lambda epoch: epoch + 1).dropna(how="all")


def _curves(
    table: Table, wanted: Sequence[tuple[str, str, str]]
) -> tuple[Figure, list[tuple[str, dict[str, pd.DataFrame]]]] | None:
    """Draw metrics by epoch, a line a row: a panel for each (column, key, words) that has anything to show.

    Returns the figure, and for each panel its words and the values of each row.
    """
    panels = []
    for column, key, words in wanted:
        curves = {row: _by_epoch(table, row, column, key) for row in table.rows}
        curves = {row: values for row, values in curves.items() if len(values)}
        if any(values.to_numpy().any() for values in curves.values()):
            panels.append((column, words, curves))
    if not panels:
        return None
    there = {row for _, _, curves in panels for row in curves}
    styles = {row: _style(place) for place, row in enumerate(table.rows) if row in there}
    figure, axes = _panels(len(panels), 2.4, styles)
    for axis, (column, words, curves) in zip(axes, panels, strict=True):
        for row, values in curves.items():
            _line(axis, styles[row], values)
        axis.set(title=table.headed(column), xlabel="epoch", ylabel=words)
    return figure, [(f"{words} at {table.headed(column)}", curves) for column, words, curves in panels]


def kept(table: Table) -> Drawing | None:
    """Kept noise and kept fraction by epoch at the column of the focus, a line a row."""
    column = table.focus
    made = _curves(table, [(column, "kept_noise", "kept noise"), (column, "kept_fraction", "kept fraction")])
    if made is None:
        return None
    figure, panels = made
    _title(table, figure, "what was kept")
    what = "how much of it is mislabelled, and its share of the samples"
    caption = f"What was kept by epoch at {table.headed(column)}: {what}; {BAND}."
    return Drawing(figure, caption, f"{caption} Mean over the epochs: {_told(panels, '.2f', last=False)}.")


def accuracy(table: Table) -> Drawing | None:
    """The headline by epoch, a panel a column, a line a row."""
    made = _curves(table, [(column, f"test_{table.metric.name}", table.measured) for column in table.columns])
    if made is None:
        return None
    figure, panels = made
    _title(table, figure, f"{table.measured} by epoch")
    caption = f"{capitalised(table.measured)} by epoch: {BAND}."
    return Drawing(figure, caption, f"{caption} At the end: {_told(panels, f'.{table.metric.digits}f', last=True)}.")


def _told(panels: Sequence[tuple[str, Mapping[str, pd.DataFrame]]], form: str, last: bool) -> str:
    """Return what is lowest and what is highest in each panel: in the last epoch, or in the mean over the epochs."""
    told = []
    for what, curves in panels:
        means = {row: values.mean(axis=1) for row, values in curves.items()}
        of_rows = {row: float(mean.iloc[-1] if last else mean.mean()) for row, mean in means.items()}
        told.append(f"{what} {_from_to(of_rows.items(), form)}")
    return "; ".join(told)


def losses(table: Table) -> Drawing | None:
    """Quantile bands of the loss by epoch at the column of the focus, one panel a row, of the first seed."""
    column = table.focus
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
    caption = f"Loss by epoch at {table.headed(column)} in the first seed: median with 50 % and 90 % of the samples."
    _title(table, figure, f"{table.headed(column)}, loss: median with 50 % and 90 % of the samples")
    return Drawing(figure, caption, caption)


def scores(table: Table) -> Drawing | None:
    """Histograms of DAS and of the loss, clean against noisy, at a few epochs, in the first seed of one row.

    That is the first row that DAS ranks, else the baseline, else the first.
    """
    column = table.focus
    there = [row for row in table.rows if not table.runs(row, column).empty]
    by_das = [row for row in there if set(table.runs(row, column)["score"]) == {"das"}]
    row = [*by_das, *(row for row in there if row == table.suite.baseline), *there][0]
    frame = _dynamics(table, _records(table, row, column)[0], "histogram")
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
    caption = f"Scores of clean and noisy samples at {table.headed(column)} under {row}, in the first seed."
    _title(table, figure, f"{table.headed(column)}, scores of clean and noisy samples under {row}")
    return Drawing(figure, caption, caption)


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
