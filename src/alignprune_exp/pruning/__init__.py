"""AlignPrune's method, on torch and NumPy alone: trajectories, scores, pruners, references, the plug-in.

It knows no data set, model, configuration or disk. Names are imported on first use, so that a config can be
checked against `pruners`, which needs NumPy only, without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bank import History, Trajectories
    from .cleaning import within_class
    from .coresets import Choice, Criterion, Evidence, WarmUpLog
    from .dynamic import DynamicPruning, NonFiniteLossError
    from .pruners import PRUNERS, Fixed, Full
    from .scores import SCORES, Score
    from .selection import Plan, Pruner, Selection

__all__ = [
    "PRUNERS",
    "SCORES",
    "Choice",
    "Criterion",
    "DynamicPruning",
    "Evidence",
    "Fixed",
    "Full",
    "History",
    "NonFiniteLossError",
    "Plan",
    "Pruner",
    "Score",
    "Selection",
    "Trajectories",
    "WarmUpLog",
    "within_class",
]

_HOME = {
    **dict.fromkeys(("DynamicPruning", "NonFiniteLossError"), "dynamic"),
    **dict.fromkeys(("PRUNERS", "Fixed", "Full"), "pruners"),
    **dict.fromkeys(("Plan", "Pruner", "Selection"), "selection"),
    **dict.fromkeys(("Choice", "Criterion", "Evidence", "WarmUpLog"), "coresets"),
    **dict.fromkeys(("SCORES", "Score"), "scores"),
    **dict.fromkeys(("History", "Trajectories"), "bank"),
    "within_class": "cleaning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
