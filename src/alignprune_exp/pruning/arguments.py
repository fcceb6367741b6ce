"""What an argument may be: a mistake in one is a ValueError of one sentence, before anything is computed with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

NAMES = {float: "a finite number", int: "a whole number", bool: "True or False", NoneType: "None"}


def is_number(value: Any) -> bool:
    """Return whether a value is one finite number, of Python's or NumPy's; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(setting: str, value: Any, least: int) -> None:
    """Raise ValueError for what is no whole number, and for one below ``least``."""
    if not (is_number(value) and isinstance(value, Integral) and int(value) >= least):
        raise ValueError(f"{setting}={value!r} is out of range; use a whole number, {least} or more")


def check_kinds(settings: object) -> None:
    """Raise ValueError unless each field of a dataclass that is to hold a number, or True or False, holds one."""
    of: Any = type(settings)
    for name, kinds in _kinds(of).items():
        value = getattr(settings, name)
        if not any(_fits(value, kind) for kind in kinds):
            allowed = " or ".join(NAMES.get(kind) or ", ".join(map(str, get_args(kind))) for kind in kinds)
            raise ValueError(f"{of.__name__}: {name}={value!r} is out of range; use {allowed}")


def check_version(now: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no saved state, and for one without what a state has now."""
    if not isinstance(state, Mapping) or not now.keys() & state.keys():
        found = type(state).__name__
        raise ValueError(f"the state is no saved one but of type {found}; pass what state_dict() returned")
    if missing := now.keys() - state.keys():
        raise ValueError(
            f"the state was saved by an older version of this package and lacks {', '.join(sorted(missing))}; "
            "start the run again"
        )
    for name, part in now.items():
        if isinstance(part, Mapping):
            check_version(part, state[name])


@cache
def _kinds(of: type) -> Mapping[str, tuple[Any, ...]]:
    """Return what each field may be that is a number, True or False, or one of some texts, as far as that is known."""
    try:
        hints = get_type_hints(of)
    except Exception:  # an annotation may be any expression, by names that are there for type checkers alone
        return {}
    kinds = {}
    for each in fields(of):
        hint = hints[each.name]
        several = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if all(kind in NAMES or get_origin(kind) is Literal for kind in several):
            kinds[each.name] = several
    return kinds


def _fits(value: Any, kind: Any) -> bool:
    if kind is float or kind is int:
        return is_number(value) and (kind is float or isinstance(value, Integral))
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    return value is None if kind is NoneType else isinstance(value, str) and value in get_args(kind)
