"""The same numbers as the formulas', faster. A test holds each to the formula that stands elsewhere, plainly.

Shape legend: N samples, W epochs of the window, B samples of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def one_pass(
    formula: Callable[[Tensor, Tensor], Tensor],
    reference_W: Tensor,
    centred: bool,
    ranks: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return a correlation with ``reference_W`` as one pass over rows of losses (W, B) in the CPU's cache.

    It does the columns where that is exact enough: those without an empty place, and with a sum of squares well within
    float32 and not tiny beside their mean, as that of a constant is. The ``formula`` does the others, and all of them
    on devices that would have to be waited for to know.

    Args:
        formula: the correlation of (W, B) losses with a reference (W,), written plainly.
        centred: whether it takes both sides about their means.
        ranks: turns values into ranks within each column, where it is one of ranks.
    """
    seen_W = ~reference_W.isnan()
    r_W = reference_W[seen_W].double()
    if ranks is not None:
        r_W = ranks(r_W[:, None])[:, 0]
    if centred and len(r_W):
        r_W = r_W - r_W[0]  # exactly 0 if it is constant
        r_W = r_W - r_W.mean()
    r_W = r_W / r_W.norm()
    plain = len(r_W) < 3 or reference_W.device.type != "cpu" or not r_W.isfinite().all()
    whole, shares = bool(seen_W.all()), [] if plain else r_W.tolist()

    def correlation(losses_WB: Tensor) -> Tensor:
        if plain or losses_WB.device.type != "cpu" or losses_WB.dtype != torch.float32:
            return formula(losses_WB, reference_W)
        v_WB = losses_WB if whole else losses_WB[seen_W]
        if ranks is not None:
            v_WB = ranks(v_WB)
        product_B, squares_B, mean_B = (torch.zeros_like(v_WB[0]) for _ in range(3))
        if centred:
            for v_B in v_WB:
                mean_B.add_(v_B, alpha=1 / len(v_WB))
        for v_B, r in zip(v_WB, shares, strict=True):
            d_B = v_B - mean_B
            product_B.add_(d_B, alpha=r)
            squares_B.addcmul_(d_B, d_B)
        score_B = product_B.div_(squares_B.sqrt()).clamp_(-1, 1)
        # Block by block first: numbers are cheaper to reduce than masks.
        relative_B = mean_B.square_().div_(squares_B)
        (least, most), largest = squares_B.aminmax(), relative_B.amax()
        if not (least > 1e-30 and most < 1e30 and largest < 1e6 / len(v_WB)):
            sure_B = (squares_B > 1e-30) & (squares_B < 1e30) & (relative_B < 1e6 / len(v_WB))
            others = (~sure_B).nonzero().squeeze(1)
            score_B[others] = formula(losses_WB[:, others], reference_W)
        return score_B

    return correlation


def means(losses_WB: Tensor) -> Tensor:
    """Return the mean (B,) of each column without its empty places."""
    means_B = losses_WB.mean(0)
    known = means_B.device.type == "cpu" and not means_B.sum().isnan()
    return means_B if known else losses_WB.nanmean(0)
