"""How many labels are wrong, by what a network makes early on of the given ones beside trusted ones; or as foretold.

Shape legend: n samples, E epochs, R samples of a trusted reference set, C classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PASSES = 4.0  # over the data, in which a network has learned something and memorised little


def probability(losses: Tensor) -> float:
    """Return the mean probability that cross-entropies (R,) give to their labels."""
    return losses.double().neg().exp().mean().item()


def wrong_share(given_E: Tensor, trusted_E: Tensor, classes: int) -> float:
    r"""Estimate which share of the labels is wrong, in [0, 1]; NaN where the network knows nothing yet.

    A network that has memorised nothing gives a right label the probability r that it gives a trusted one on average,
    and one that was drawn from the C - 1 other classes (1 - r) / (C - 1). Where a share η of the labels is so, given
    ones have

    .. math:: p = (1 - \eta)\, r + \eta\, \frac{1 - r}{C - 1}, \qquad
              \eta = \frac{\sum_e (r_e - p_e)}{\sum_e \big(r_e - (1 - r_e)/(C - 1)\big)}

    over the epochs. Wrong labels that look like right ones, a class taken for its neighbour, get more than their part
    of what is left, and so count for less or for nothing: this is the share that losses can tell.

    Args:
        given_E: p, mean `probability` of the given labels in each epoch, (E,).
        trusted_E: r, of the trusted ones at the same time.
        classes: C, two or more.
    """
    left = (1 - trusted_E) / (classes - 1)
    known = (trusted_E - left).sum().item()
    return min(1.0, max(0.0, (trusted_E - given_E).sum().item() / known)) if known > 0 else math.nan


class NoiseRate:
    """Gathers the first `PASSES` over the data, epoch by epoch, as long as no score has chosen their samples.

    The first epoch only begins: losses of an epoch are met all through it, so that the trusted ones are taken between
    its beginning and its end.

    Attributes:
        foretold: the rate that a `readout` or a `transition` estimates; NaN before it has.
    """

    def __init__(self) -> None:
        self.foretold = math.nan
        self._pairs: list[tuple[float, float]] = []
        self._before = math.nan  # r at the end of the last epoch, where the next one counts

    def observe(self, losses: Tensor, trained: Tensor, trusted: float, passes: float, ranked: bool) -> None:
        """Take in an epoch.

        Args:
            losses: cross-entropies (n,) of the samples as they were met.
            trained: which of them were trained on, bool (n,).
            trusted: mean `probability` of the trusted labels after it; NaN where it is not known.
            passes: over the data so far, this epoch among them.
            ranked: whether scores have chosen the samples.
        """
        counts = not ranked and passes <= PASSES + 1e-9 and bool(trained.any())
        if counts and not math.isnan(between := (self._before + trusted) / 2):
            self._pairs.append((probability(losses[trained]), between))
        self._before = trusted if counts else math.nan

    def estimate(self, classes: int, larger: bool = False) -> float:
        """Return the `wrong_share` by the epochs so far, or where none counts what is foretold; NaN before either.

        With ``larger`` the larger of the two, where both are known.
        """
        given, trusted = self._tensor()[:-1].T
        if len(given) == 0:
            return self.foretold
        share = wrong_share(given, trusted, classes)
        return self.foretold if larger and (math.isnan(share) or self.foretold > share) else share

    def state_dict(self) -> dict[str, Any]:
        return {"pairs": self._tensor(), "foretold": self.foretold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.foretold = state["foretold"]
        *pairs, (self._before, _) = state["pairs"].tolist()
        self._pairs = [(given, trusted) for given, trusted in pairs]

    def _tensor(self) -> Tensor:
        return torch.tensor([*self._pairs, (self._before, math.nan)], dtype=torch.float64)
