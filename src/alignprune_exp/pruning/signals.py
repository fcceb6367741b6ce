"""What a trajectory can be made of beside a loss. Of each, as of a loss, higher says that the label is in doubt.

Shape legend: B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-7  # probability of the other classes together, below which single precision knows none


def doubt(losses_B: Tensor) -> Tensor:
    """Return 1 - p of the label's probability p = exp(-loss), in [0, 1].

    Its mean over epochs is 1 less the confidence of dataset cartography (Swayamdipta et al., EMNLP 2020).
    """
    return losses_B.neg().expm1().neg()


def odds(losses_B: Tensor) -> Tensor:
    r"""Return the logarithm of the odds against the label, :math:`\log((1 - p) / p)`.

    That is log-sum-exp of the other classes' logits less the label's: minus the margin whose mean over epochs Pleiss et
    al. (NeurIPS 2020) rank by, with all other classes in place of the largest one.
    """
    return losses_B + doubt(losses_B).clamp(min=SMALLEST).log()


SIGNALS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "doubt": lambda losses_B, wrong_B: doubt(losses_B),
    "odds": lambda losses_B, wrong_B: odds(losses_B),
    "disagreement": lambda losses_B, wrong_B: wrong_B.to(losses_B.dtype),
}
"""Of cross-entropies (B,), and of where another class than the label was predicted (B,)."""

OTHER_NAMES: Mapping[str, str] = {"aum": "odds", "margin": "odds", "confidence": "doubt", "loss": "plain"}
"""What the literature calls them, or what they are the negative of."""


def extent(signal: str, chance_loss: float) -> tuple[float, float]:
    """Return the least and the most of a signal, or of losses, that histograms show; guesses have ``chance_loss``."""
    top = 4 * chance_loss
    return {"odds": (-top, top)}.get(signal, (0.0, 1.0 if signal in SIGNALS else top))
