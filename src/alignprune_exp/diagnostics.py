"""What a selection and its scores look like where it is known which samples are corrupted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pruning import Selection

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40

Mask = NDArray[np.bool_]


def detection_auroc(scores: NDArray[np.floating], noisy: Mask) -> float | None:
    """Return how well -score ranks noisy above clean samples: the area under the ROC curve.

    ½ is chance; below, the score prefers noise. Ties count half; samples without a score (NaN) do not count.
    None where there are no noisy or no clean samples.
    """
    known = ~np.isnan(scores)
    clean, wrong = np.sort(scores[known & ~noisy]), np.sort(scores[known & noisy])
    if len(clean) == 0 or len(wrong) == 0:
        return None
    above = sum(int(np.searchsorted(wrong, clean, side).sum()) for side in ("left", "right"))
    return above / 2 / (len(clean) * len(wrong))


def kept_noise(selection: Selection, noisy: Mask | None) -> tuple[float | None, float | None]:
    """Return the noisy fraction of a selection, plain and by gradient weight; None where it is unknown."""
    if noisy is None:
        return None, None
    chosen, weights = noisy[selection.indices], selection.weights.astype(np.float64)
    return float(chosen.mean()), float((weights * chosen).sum() / weights.sum())


def dynamics(
    epoch: int,
    losses: NDArray[np.floating],
    reference: NDArray[np.floating],
    scores: Mapping[str, NDArray[np.floating]],
    noisy: Mask | None,
    strata: NDArray[np.int64] | None,
    selection: Selection,
    shown: tuple[float, float],
) -> list[dict[str, Any]]:
    """Return one epoch's rows of ``dynamics.parquet``.

    Args:
        losses: (n,) last recorded losses. reference: (R,) losses of the reference samples.
        scores: (n,) each, by name. noisy: (n,), or None where unknown. strata: (n,), the class of each sample, if any.
        shown: the least and the most that histograms of losses show.

    Each row has ``epoch``, ``kind``, ``name``, ``group`` (clean, noisy, reference, or all where unknown), ``x``
    and ``value``: ``loss_quantile`` at quantile x; ``histogram`` of the score ``name``, the count in the bin
    centred at x; ``kept_fraction`` of class x, where there are classes.
    """
    everyone = np.ones(len(losses), bool)
    groups = {"all": everyone} if noisy is None else {"clean": ~noisy, "noisy": noisy}
    rows: list[dict[str, Any]] = []

    def add(kind: str, name: str, group: str, xs: Any, values: Any) -> None:
        for x, value in zip(xs, values, strict=True):
            row = {"epoch": epoch, "kind": kind, "name": name, "group": group}
            rows.append({**row, "x": float(x), "value": float(value)})

    seen = ~np.isnan(losses)
    samples = {group: losses[mask & seen] for group, mask in groups.items()} | {"reference": reference}
    for group, values in samples.items():
        if len(values):
            add("loss_quantile", "loss", group, QUANTILES, np.quantile(values, QUANTILES))
    least, most = shown
    for name, score in scores.items():
        ranges = {"loss": (least, most), "small_loss": (-most, -least), "settled": (-most, -least)}
        low, high = ranges.get(name, (-1.0, 1.0))
        for group, mask in groups.items():
            values = np.clip(score[mask & ~np.isnan(score)], low, high)
            counts, edges = np.histogram(values, BINS, (low, high))
            add("histogram", name, group, (edges[1:] + edges[:-1]) / 2, counts)
    if strata is not None:
        members = np.bincount(strata)
        kept = np.bincount(strata[selection.indices], minlength=len(members))
        present = np.flatnonzero(members)
        add("kept_fraction", "class", "all", present, kept[present] / members[present])
    return rows
