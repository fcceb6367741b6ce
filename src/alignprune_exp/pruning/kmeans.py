"""One-dimensional k-means, exactly where that is cheap: what SeTa groups scores by."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from .selection import Floats, Ints

RESOLUTION = 512  # quantiles, and as many steps, that cuts are looked for at first


def cluster(scores: Floats, groups: int) -> NDArray[np.int32]:
    """One-dimensional k-means: return each sample's cluster (N,), numbered by ascending score.

    The best cuts on a grid of `RESOLUTION` quantiles and as many equal steps are found by dynamic
    programming (exactly optimal up to that many samples), then refined by Lloyd's iterations on all samples.
    With fewer distinct scores than groups, every group of ties is divided, the largest parts first, into equal
    chunks in the order given, until there are ``groups`` clusters; so equal scores give equal chunks.
    """
    ordered = np.sort(scores)
    changes = ordered[1:] != ordered[:-1]
    distinct = 1 + int(np.count_nonzero(changes))
    if distinct <= groups:
        values = ordered[np.r_[True, changes]]
        del ordered, changes  # memory, at a hundred million samples
        return _divide_ties(scores, values, groups)
    grid = np.r_[0, np.flatnonzero(changes) + 1, len(ordered)] if distinct <= 2 * RESOLUTION else _grid(ordered)
    mean = float(ordered.mean(dtype=np.float64))
    centred = np.zeros(len(ordered) + 1)
    np.subtract(ordered, mean, out=centred[1:])
    squares = np.cumsum(centred * centred)  # of the first k values
    sums = np.cumsum(centred, out=centred)
    cuts = _best_cuts(grid, sums[grid], squares[grid], groups)
    for _ in range(100):
        means = np.diff(sums[cuts]) / np.diff(cuts)
        middle = [bisect_left(ordered, m, key=lambda x: float(x) - mean) for m in (means[1:] + means[:-1]) / 2]
        moved = np.r_[0, middle, len(ordered)].astype(np.int64)
        if (moved == cuts).all() or (np.diff(moved) == 0).any():
            break
        cuts = moved
    label = np.zeros(len(scores), np.int32)
    for boundary in ordered[cuts[1:-1]]:
        label += scores >= boundary
    return label


def _grid(ordered: Floats) -> Ints:
    """Candidate cuts: positions between distinct values, thinned to quantiles and equal steps of the range."""
    quantiles = np.linspace(0, len(ordered) - 1, RESOLUTION).astype(np.int64)
    steps = np.linspace(float(ordered[0]), float(ordered[-1]), RESOLUTION)
    rounded = steps.astype(ordered.dtype)
    above = np.where(rounded < steps, np.nextafter(rounded, ordered.dtype.type(np.inf)), rounded)
    values = np.r_[ordered[quantiles], above]
    return np.unique(np.r_[0, np.searchsorted(ordered, values), len(ordered)])


def _best_cuts(grid: Ints, sums: Floats, squares: Floats, groups: int) -> Ints:
    """Cuts (groups + 1,) out of ``grid`` with the least sum of squares within the clusters.

    ``sums`` and ``squares`` are those of the values before each place of the grid.
    """
    size = np.maximum(grid[:, None] - grid[None, :], 1)
    cost = squares[:, None] - squares[None, :] - (sums[:, None] - sums[None, :]) ** 2 / size  # to a place, from one
    cost[np.triu_indices(len(grid))] = np.inf
    total, choices = cost[:, 0], []
    for _ in range(groups - 1):
        through = total + cost
        choices.append(through.argmin(1))
        total = through[np.arange(len(grid)), choices[-1]]
    path = [len(grid) - 1]
    for choice in reversed(choices):
        path.append(choice[path[-1]])
    return grid[np.r_[0, path[::-1]]]


def _divide_ties(scores: Floats, values: Floats, groups: int) -> NDArray[np.int32]:
    members = [np.flatnonzero(scores == value) for value in values]
    sizes, parts = np.array([len(ties) for ties in members]), np.ones(len(values), np.int64)
    for _ in range(groups - len(values)):
        parts[np.argmax(sizes / parts)] += 1
    label, number = np.empty(len(scores), np.int32), 0
    for ties, count in zip(members, parts, strict=True):
        for chunk in np.array_split(ties, count):
            label[chunk] = number
            number += 1
    return label
