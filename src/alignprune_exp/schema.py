"""Nodes of a config: checked values, what marks them, and one sentence about their first mistake. Knows no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UsageError

# What lies beyond these ranges can only be a slip, and would end in memory, in time or in arithmetic.
EPOCHS, RATE = 100_000, 1000.0
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Epochs = Annotated[int, Field(ge=1, le=EPOCHS)]
Rate = Annotated[float, Field(ge=1e-12, le=RATE)]  # of learning
Weight = Annotated[float, Field(ge=0, le=10**6)]  # of a term of the loss
Side = Annotated[int, Field(ge=1, le=4096)]  # of an image, in pixels


@dataclass(frozen=True)
class Neutral:
    """Marks a key: at this value it does what was done before there was the key, and so is not part of an id."""

    value: Any


@dataclass(frozen=True)
class Aside:
    """Marks a key that cannot change the result, and so is never part of an id."""


@dataclass(frozen=True)
class AlsoCalled:
    """Marks a key: other names for some of its values, which a word that is unknown here may be."""

    names: Mapping[str, str]


class Node(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def telling(self) -> dict[str, Any]:
        """Return the values, nodes as dictionaries, without those that are neutral or aside."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            value = value.telling() if isinstance(value, Node) else value
            if Neutral(value) not in field.metadata and Aside() not in field.metadata:
                found[name] = value
        return found


Checked = TypeVar("Checked", bound=Node)


def validated(schema: type[Checked], values: Mapping[str, Any], at: str = "", chosen: str = "") -> Checked:
    """Return the values as a node; raise UsageError with one sentence about the first mistake.

    ``at`` is the node's place in the config, ``chosen`` the choice that its keys belong to.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UsageError(_explain(error, schema, values, at, chosen)) from None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return what is known that a word may have been meant for, if anything."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean …?)`` where something known is near."""
    near = nearest(word, known)
    return f" (did you mean {near}?)" if near else ""


def shown(value: Any) -> str:
    """Return a value as the command line writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _explain(error: ValidationError, schema: type[Node], values: Mapping[str, Any], at: str, chosen: str) -> str:
    first = error.errors()[0]
    keys: list[str] = [at] if at else []
    node: Any = values
    for part in first["loc"]:
        if isinstance(node, Mapping) and (part in node or part == first["loc"][-1]):
            keys.append(str(part))
            node = node.get(part)
    key = ".".join(keys)
    parent = ".".join(keys[:-1])
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(values, keys, at, error)
        where = chosen or (f"{parent}={_name(values, parent)}" if parent else "the config")
        return f"unknown key {key}{suggest(keys[-1], known)}; {where} has {', '.join(known) or 'none'}"
    if kind == "missing":
        return f"{key} is missing; set {key}=…"
    if kind == "string_too_short":
        return f"{key} is empty; set {key}=…"
    given = f"{key}={shown(first['input'])}"
    if kind in _RANGES:
        return f"{given} is out of range: use a value {_RANGES[kind]} {next(iter(context.values()))}"
    if kind == "union_tag_invalid":
        given = f"{key}.name={context['tag']}"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context["expected_tags"]
        marks = schema.model_fields[str(first["loc"][0])].metadata
        hint = _meant(str(context.get("tag", first["input"])), re.findall("'(.*?)'", expected), marks)
        expected = expected.replace("'", "").replace("True", "true").replace("False", "false")
        return f"{given} is unknown{hint}; use {expected}"
    if kind == "string_pattern_mismatch":
        return f"{given} is unknown; use auto, cpu, cuda or cuda:K"
    if isinstance(first["input"], str) and re.fullmatch(
        r"[-+]?(\d+\.?|\d*\.\d+)(e[-+]?\d+)?|true|false|null", first["input"], re.I
    ):
        return f"{key}='{first['input']}' is a text; leave out the quotes"
    if kind == "string_type" and isinstance(first["input"], (int, float, type(None))):
        text = f"'{shown(first['input'])}'"
        text = f"[{text}]" if isinstance(first["loc"][-1], int) else text
        return f'{given} is no text; write "{key}={text}" for one'
    if kind == "list_type" and isinstance(first["input"], (str, int, float)):
        return f"{given} is no list; write {key}=[{shown(first['input'])}]"
    if kind.startswith(("float_", "int_")) and (words := _words(error)):
        return f"{given} is unknown; use a number, or {words}"
    return f"{given} has the wrong type: {first['msg'][0].lower()}{first['msg'][1:]}"


def _meant(word: str, known: Iterable[str], marks: Iterable[Any]) -> str:
    """Return `` (did you mean …?)`` where an unknown word is another name for something known, or near it."""
    other = next((mark.names[word] for mark in marks if isinstance(mark, AlsoCalled) and word in mark.names), word)
    return suggest(other, known)


def _words(error: ValidationError) -> str:
    """The words that may stand where the first mistake is, in place of a number."""
    first, *others = error.errors()
    expected = (e["ctx"]["expected"] for e in others if e["type"] == "literal_error" and e["input"] is first["input"])
    return next(expected, "").replace("'", "")


_RANGES = {
    "greater_than": "above",
    "greater_than_equal": "of at least",
    "less_than": "below",
    "less_than_equal": "of at most",
}


def _known_keys(values: Mapping[str, Any], keys: list[str], at: str, error: ValidationError) -> list[str]:
    """The keys that the schema allows beside the unknown one."""
    extra = {str(e["loc"][-1]) for e in error.errors() if e["type"] == "extra_forbidden"}
    node: Any = values
    for part in keys[(1 if at else 0) : -1]:
        node = node[part]
    return [str(key) for key in node if key not in extra and key != "name"]


def _name(values: Mapping[str, Any], node: str) -> str:
    return str(cast(Mapping[str, Any], values[node]).get("name", "…"))
