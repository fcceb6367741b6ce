"""AlignPrune's method, on torch and NumPy alone: trajectories, scores, pruners, references, the plug-in.

It knows no data set, model, configuration or disk. Names are imported on first use, so that a config can be
checked against `pruners`, which needs NumPy only, without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bank import History, Trajectories
    from .cleaning import within_class, wrong_probability
    from .coresets import Choice, Criterion, Evidence, WarmUpLog
    from .dynamic import DynamicPruning
    from .log import TrajectoryLog
    from .processes import DisagreementError, LostProcessError
    from .pruners import PRUNERS, Fixed, Full
    from .running import NonFiniteLossError, PruningWarning
    from .scores import SCORES, Score
    from .selection import Plan, Pruner, Selection

__all__ = [
    "PRUNERS",
    "SCORES",
    "Choice",
    "Criterion",
    "DisagreementError",
    "DynamicPruning",
    "Evidence",
    "Fixed",
    "Full",
    "History",
    "LostProcessError",
    "NonFiniteLossError",
    "Plan",
    "Pruner",
    "PruningWarning",
    "Score",
    "Selection",
    "Trajectories",
    "TrajectoryLog",
    "WarmUpLog",
    "within_class",
    "wrong_probability",
]

_HOME = {
    "DynamicPruning": "dynamic",
    **dict.fromkeys(("NonFiniteLossError", "PruningWarning"), "running"),
    **dict.fromkeys(("DisagreementError", "LostProcessError"), "processes"),
    **dict.fromkeys(("PRUNERS", "Fixed", "Full"), "pruners"),
    **dict.fromkeys(("Plan", "Pruner", "Selection"), "selection"),
    **dict.fromkeys(("Choice", "Criterion", "Evidence", "WarmUpLog"), "coresets"),
    **dict.fromkeys(("SCORES", "Score"), "scores"),
    **dict.fromkeys(("History", "Trajectories"), "bank"),
    **dict.fromkeys(("within_class", "wrong_probability"), "cleaning"),
    "TrajectoryLog": "log",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
