"""Seams: what a node of the config names, something built in or anyone's by its import path, and how that is made.

The keyword-only arguments of what is named (of a dataclass its fields) are its settings: their types and ranges are the
node's schema. A built-in takes each value from the YAML in ``conf/``; what is anyone's own may have defaults. Whatever
comes before the settings is handed over by whoever makes it.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Generic, TypeVar

from pydantic import Field, create_model

from .errors import UsageError
from .schema import Node, shown, suggest, validated

Thing = TypeVar("Thing")


class Named(Node):
    """A node whose keys are its name and the settings of what that names."""

    name: str


class Registry(Generic[Thing]):
    """One seam.

    Args:
        kind: the node of the config, such as ``pruner``.
        base: import path of the class of what is made, ``package.module.Class``.
        builtin: import path of the dictionary of what is built in, by name: each the thing itself, or its import path
            within this package. Neither is imported before it is needed.
        common: the keys that the node has whatever it names. What is named may take some of them as its settings.
        most: the most that settings of built-ins may be, where these know none themselves.
    """

    def __init__(
        self, kind: str, base: str, builtin: str, common: type[Named] = Named, most: Mapping[str, float] | None = None
    ) -> None:
        self.kind, self.common = kind, common
        self._base, self._builtin, self._most = base, builtin, most or {}
        self.schema = cache(self._schema)

    @cached_property
    def base(self) -> type[Thing]:
        return imported(self._base)

    @property
    def builtin(self) -> Mapping[str, Callable[..., Thing] | str]:
        return imported(self._builtin)

    def glance(self, values: Any) -> None:
        """Check the common keys alone, without importing anything. Raises UsageError."""
        self._check_named(values)
        common = {key: value for key, value in values.items() if key in self.common.model_fields}
        validated(self.common, common, self.kind, f"{self.kind}={values['name']}")

    def _check_named(self, values: Any) -> None:
        if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
            given = values.get("name") if isinstance(values, Mapping) else values
            if given is None:
                raise UsageError(f"{self.kind}.name is missing; choose {self.kind}=…, {self._known()}")
            raise UsageError(f"{self.kind}.name={shown(given)} is no name; use {self._known()}")

    def read(self, values: Any) -> Named:
        """Return the checked node. Raises UsageError."""
        if isinstance(values, Named):
            return values
        self._check_named(values)
        name = values["name"]
        node = validated(self.schema(name), values, self.kind, f"{self.kind}={name}")
        if not _takes_more(self.find(name)):
            self.make(node)  # which may refuse a value
        return node

    def make(self, node: Named, *given: Any) -> Thing:
        """Make what the node names, of what is ``given`` and its settings. Raises UsageError for what it refuses."""
        found = self.find(node.name)
        try:
            return found(*given, **{name: getattr(node, name) for name in self._taken(found)})
        except ValueError as error:
            raise UsageError(f"{self.kind}: {error}") from None
        except (AttributeError, NameError, NotImplementedError, TypeError) as error:
            if "." not in node.name:
                raise
            raise UsageError(f"{self.kind}={node.name} cannot be made ({type(error).__name__}: {error})") from None

    def find(self, name: str) -> Any:
        """Return what a name stands for. Raises UsageError for an unknown name, or what cannot be imported."""
        if "." not in name:
            if name not in self.builtin:
                raise UsageError(
                    f"{self.kind}.name={name} is unknown{suggest(name, self.builtin)}; use {self._known()}"
                )
            found = self.builtin[name]
            return imported(f"{__package__}.{found}") if isinstance(found, str) else found
        try:
            found = imported(name)
        except Exception as error:  # a module of one's own may raise any
            raise UsageError(
                f"{self.kind}.name={name} cannot be imported ({type(error).__name__}: {error}); use {self._known()} of "
                "a module on PYTHONPATH"
            ) from None
        if found is self.base:
            raise UsageError(f"{self.kind}.name={name} is what others are made of; name a subclass of it")
        fits = issubclass(found, self.base) if isinstance(found, type) else inspect.isfunction(found)
        if not fits:
            raise UsageError(
                f"{self.kind}.name={name} is not a subclass of {self._base}, nor a function that makes one"
            )
        return found

    def _schema(self, name: str) -> type[Named]:
        found = self.find(name)
        fields: dict[str, Any] = {}
        for setting, (kind, default) in settings(found).items():
            if setting not in self.common.model_fields:
                own = "." in name
                most = None if own else self._most.get(setting)
                fields[setting] = (Annotated[kind, Field(le=most)] if most else kind, default if own else ...)
        return create_model(f"{self.kind} {name}", __base__=self.common, **fields)

    def _taken(self, found: Callable[..., Any]) -> list[str]:
        """Return the keys that are handed over: the settings, and common keys that it takes in any other way."""
        common = self.common.model_fields.keys() & inspect.signature(found).parameters.keys()
        return [*settings(found), *sorted(common - settings(found).keys())]

    def _known(self) -> str:
        return f"one of {', '.join(self.builtin)}, or package.module.Class"


@cache
def settings(found: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return type and default, ``...`` for none, of every setting of what can be named.

    Raises UsageError for a type that cannot be told.
    """
    every = inspect.signature(found).parameters.values()
    own = {parameter.name: parameter.default for parameter in every if parameter.kind is parameter.KEYWORD_ONLY}
    try:
        hints = _hints(found, own) if own else {}
    except Exception as error:  # an annotation may be any expression
        raise UsageError(
            f"the types of {found.__module__}.{found.__qualname__} cannot be told ({error}); annotate its keyword-only "
            "arguments by names that its module has, also where nothing checks types"
        ) from None
    return {
        name: (hints[name], ... if default is inspect.Parameter.empty else default) for name, default in own.items()
    }


def _hints(found: Callable[..., Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the types of some of the arguments; those of the others need not be there at run time."""
    if is_dataclass(found):
        return typing.get_type_hints(found, include_extras=True)
    function = inspect.unwrap(found.__init__ if isinstance(found, type) else found)  # type: ignore[misc]
    written = {name: function.__annotations__[name] for name in names}
    named = type("named", (), {"__annotations__": written})
    return typing.get_type_hints(named, function.__globals__, include_extras=True)


def _takes_more(found: Callable[..., Any]) -> bool:
    """Return whether something beside its settings is needed to make it."""
    return any(
        parameter.kind is not parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        for parameter in inspect.signature(found).parameters.values()
    )


def imported(path: str) -> Any:
    """Return what an import path names. Raises whatever importing does, and AttributeError."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
