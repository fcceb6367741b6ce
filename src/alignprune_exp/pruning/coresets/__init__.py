"""What chooses samples once, after a warm-up: one file a kind of criterion."""

from .criterion import Choice, Criterion, Evidence, StaticRandom, WarmUpLog
from .glister import Glister
from .prune4rel import Prune4ReL
from .ranked import EL2N, Forgetting, GraNd, Margin, Moderate, StaticSmallLoss

__all__ = ["STATIC", "Choice", "Criterion", "Evidence", "WarmUpLog"]

STATIC: dict[str, type[Criterion]] = {
    "static_random": StaticRandom,
    "static_small_loss": StaticSmallLoss,
    "static_el2n": EL2N,
    "static_grand": GraNd,
    "static_forgetting": Forgetting,
    "static_moderate": Moderate,
    "static_margin": Margin,
    "static_glister": Glister,
    "static_prune4rel": Prune4ReL,
}
