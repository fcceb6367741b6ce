"""Scores and pruners by name."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from .coresets import Criterion
from .pruners import PRUNERS
from .scores import SCORES, Score
from .selection import Pruner, settings


def make_score(score: str | Score) -> Score:
    """Return the score of that name. Raises ValueError for an unknown one."""
    if isinstance(score, Score):
        if type(score).__call__ is Score.__call__:
            raise ValueError(f"{type(score).__name__} has no __call__(self, history), which returns the scores (n,)")
        if SCORES.get(score.name, type(score)) is not type(score):
            raise ValueError(
                f"{type(score).__name__} is named {score.name!r}, which is another score; name it otherwise"
            )
        if not (score.foretells is None or isinstance(score.foretells, FunctionType)):
            raise ValueError(
                f"{type(score).__name__}.foretells is no staticmethod; set it to staticmethod(readout) or "
                "staticmethod(transition), whichever it is told, or leave it out"
            )
        return score
    if isinstance(score, type):
        raise ValueError(f"score={score.__name__} is a class; pass an instance: score={score.__name__}()")
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown; use one of {', '.join(SCORES)}, or a Score")
    return SCORES[score]()


def make_pruner(pruner: str | Pruner, **pruner_settings: Any) -> Pruner:
    """Return the pruner of that name. Raises ValueError for an unknown name or setting."""
    if isinstance(pruner, Pruner):
        if pruner_settings:
            raise ValueError(f"{', '.join(pruner_settings)}: set it on the pruner that you pass")
        return pruner
    every_epoch = {name: found for name, found in PRUNERS.items() if issubclass(found, Pruner)}
    if isinstance(pruner, Criterion) or pruner in PRUNERS.keys() - every_epoch.keys():
        raise ValueError(
            f"pruner={pruner!r} chooses once: train on everything first, let it choose() by the evidence, and pass "
            "pruner=Fixed(indices=chosen.indices)"
        )
    if pruner not in every_epoch:
        raise ValueError(f"pruner={pruner!r} is unknown; use one of {', '.join(every_epoch)}, or a Pruner")
    known = settings(every_epoch[pruner])
    for name in pruner_settings:
        if name not in known:
            raise ValueError(f"pruner={pruner!r} has no setting {name!r}; it has {', '.join(known) or 'none'}")
    return every_epoch[pruner](**pruner_settings)
