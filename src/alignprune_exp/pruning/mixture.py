"""How much of the labels is wrong: two Gaussians in one number a sample, against one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST, MOST = 20, 200_000  # samples that a mixture is fitted to


@dataclass(frozen=True)
class TwoGaussians:
    """A mixture of two Gaussians.

    Attributes:
        mean, variance, weight: (2,) each.
        likelihood: mean log likelihood of the samples that it was fitted to, under it and under one Gaussian.
        samples: how many these were.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    weight: NDArray[np.float64]
    likelihood: tuple[float, float]
    samples: int

    @classmethod
    def fitted(cls, x: NDArray[np.float64]) -> TwoGaussians:
        """Fit by EM to ``x`` (n,), which varies; of more than ``MOST`` samples, to as many, evenly spread."""
        sample = np.sort(x)[:: 1 + len(x) // MOST]
        mean, variance, weight = np.quantile(x, [0.25, 0.75]), np.full(2, x.var()), np.full(2, 0.5)
        before = -np.inf
        for _ in range(500):
            joint = _log_joint(sample, mean, variance, weight)
            total = np.logaddexp(joint[0], joint[1])
            share = np.exp(joint - total)
            size = share.sum(1) + 1e-9
            weight, mean = size / size.sum(), share @ sample / size
            variance = (share * (sample - mean[:, None]) ** 2).sum(1) / size + 1e-3 * x.var()
            if total.mean() - before < 1e-7:
                break
            before = total.mean()
        one = -(math.log(2 * math.pi * sample.var()) + 1) / 2
        return cls(mean, variance, weight, (float(total.mean()) - math.log(2 * math.pi) / 2, one), len(sample))

    @property
    def upper(self) -> int:
        """Which of the two has the higher mean."""
        return int(self.mean.argmax())

    @property
    def better_by(self) -> float:
        """By how much two Gaussians are better than one: the difference of their BIC, which charges 3 parameters."""
        two, one = self.likelihood
        return self.samples * 2 * (two - one) - 3 * math.log(self.samples)

    def log_odds_of_the_upper(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the log odds (n,), never falling in ``x`` (n,), that a sample is of the upper Gaussian."""
        clipped = np.clip(x, self.mean.min(), self.mean.max())  # between the means the odds are monotone
        joint = _log_joint(clipped, self.mean, self.variance, self.weight)
        return joint[self.upper] - joint[1 - self.upper]


def _log_joint(
    x: NDArray[np.float64], mean: NDArray[np.float64], variance: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(2, n), up to a constant."""
    spread = (x - mean[:, None]) ** 2 / variance[:, None]
    return np.log(weight)[:, None] - (np.log(variance)[:, None] + spread) / 2


def wrong_share(scores: NDArray[np.floating]) -> float:
    """Return the share of the samples, in [0, 1], whose labels seem wrong by scores (n,) that are lower where they are.

    It is the weight of the lower of two Gaussians where BIC prefers two to one, and 0 where it does not. NaN does not
    count; of fewer than ``LEAST`` scores, or equal ones, nothing can be told, and that is 0.
    """
    known = -scores[~np.isnan(scores)].astype(np.float64)
    if len(known) < LEAST or known.min() == known.max():
        return 0.0
    fit = TwoGaussians.fitted(known)
    return float(fit.weight[fit.upper]) if fit.better_by > 0 else 0.0
