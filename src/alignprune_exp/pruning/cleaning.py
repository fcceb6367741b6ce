"""Which labels to look at first: the cleaning score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def within_class(scores: NDArray[np.floating], labels: NDArray) -> NDArray[np.float64]:
    """Return ``scores`` (n,) less the mean of their class, over its standard deviation; so no class is suspect whole.

    NaN, where a sample has no score, does not count and stays. A class with one score, or with equal ones, gets 0.
    Raises ValueError unless there is one of ``labels`` (n,), the given ones, for each score.

    >>> within_class(np.array([1.0, 3.0, 8.0, 8.0, 7.0]), np.array([0, 0, 1, 1, 2]))
    array([-1.,  1.,  0.,  0.,  0.])
    """
    if labels.shape != scores.shape:
        raise ValueError(f"labels has shape {labels.shape}; it must be {scores.shape}, one a sample")
    known = ~np.isnan(scores)
    classes, of = np.unique(labels[known], return_inverse=True)
    values, members = scores[known].astype(np.float64), np.bincount(of)
    least = np.full(len(classes), np.inf)
    np.minimum.at(least, of, values)
    away = values - least[of]  # exactly 0 throughout a class of equal scores
    away -= (np.bincount(of, away) / members)[of]
    deviation = np.sqrt(np.bincount(of, away**2) / members)[of]
    found = np.full(len(scores), np.nan)
    found[known] = np.divide(away, deviation, out=np.zeros_like(away), where=deviation > 0)
    return found
