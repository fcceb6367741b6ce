"""Logistic regression: of what is known of some labels on what speaks for their being wrong, or clean.

Shape legend: F features, n samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PARTS = 5  # of the samples, each told by what the others have taught
STEPS = 50

Floats = NDArray[np.float64]


def sigmoid(x: Floats) -> Floats:
    return (1 + np.tanh(x / 2)) / 2


def likeliest(features: Floats, true: NDArray, mean: Floats, precision: Floats) -> Floats:
    """Return the line (F,) that is likeliest by what is ``true`` (n,), 0 or 1, where each of its numbers is a Gaussian.

    The log odds are ``line @ features``. Damped Newton steps: the function is convex.

    Args:
        features: (F, n). mean, precision: of the Gaussians, (F,) each; a precision of 0 knows nothing beforehand.
    """

    def unlikely(line: Floats) -> float:
        away = (precision * (line - mean) ** 2).sum() / 2
        return float((np.logaddexp(0, line @ features) - true * (line @ features)).sum() + away)

    line = mean
    for _ in range(STEPS):
        p = sigmoid(line @ features)
        curvature = (features * p * (1 - p)) @ features.T + np.diag(precision)
        step = np.linalg.solve(curvature, features @ (p - true) + precision * (line - mean))
        while unlikely(line - step) > unlikely(line) and np.abs(step).max() > 1e-9:
            step = step / 2
        line = line - step
        if np.abs(step).max() <= 1e-9:
            break
    return line


def told_by_others(losses: NDArray[np.floating], clean: NDArray[np.bool_], rng: np.random.Generator) -> Floats | None:
    """Return the log odds (n,) that each label is clean, by a logistic regression on its losses (F, n).

    It learns from four fifths of the samples what clean and wrong ones look like, and tells the last fifth, five times:
    no sample's own answer goes into its odds. Losses are taken over their deviation, with a standard Gaussian for each
    weight and none for the constant.

    None where either kind has fewer samples than there are parts.
    """
    if min(clean.sum(), (~clean).sum()) < PARTS:
        return None
    part = np.empty(len(clean), np.int64)
    for kind in (clean, ~clean):
        part[rng.permutation(np.flatnonzero(kind))] = np.arange(kind.sum()) % PARTS
    odds, precision = np.empty(len(clean)), np.array([*np.ones(len(losses)), 0.0])
    for number in range(PARTS):
        others, these = part != number, part == number
        away = losses - losses[:, others].mean(1, dtype=np.float64, keepdims=True)
        deviation = np.sqrt((away[:, others] ** 2).mean(1, keepdims=True))
        scaled = away / np.where(deviation > 0, deviation, 1)
        features = np.vstack([scaled, np.ones(len(clean))])
        odds[these] = likeliest(features[:, others], clean[others], 0 * precision, precision) @ features[:, these]
    return odds
