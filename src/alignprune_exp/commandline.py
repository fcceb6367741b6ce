"""What a command line may say: from its words to a checked config, and from errors to one sentence."""

from __future__ import annotations

import math
import os
import re
import shlex
import unicodedata
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Sweep,
)
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .config import PATHS, Config, validate
from .errors import UsageError
from .schema import suggest

PROGRAM = "python -m alignprune_exp.train"
OF_HYDRA = ("hydra/launcher", "hydra.launcher", "hydra.searchpath")  # keys of Hydra's own that may be set
OF_DISK = "file://"  # what a folder begins with in a search path
MOST_RUNS = 10_000  # of a grid
NOT_OF_A_RUN = ("hydra", "suite", "method")  # keys of a composed job that are not part of a run's config


def config_dir() -> Path:
    """Return the folder of the configs: inside an installed package, else at the top of the repository."""
    here = Path(__file__).resolve().parent
    source = here.parents[1] / "conf"
    return source if (source / "train.yaml").is_file() else here / "conf"


def own_folder(given: str | Path, by: str = "--config-dir") -> Path:
    """Return the folder that ``--config-dir``, or ``by`` something else, gives.

    Raises UsageError where it is none, or holds another version of an option of this program's, which is found first.
    """
    if not given or not Path(given).is_dir():
        raise UsageError(f"{by} {given} is not a folder; give one with options of your own, such as suite/")
    for ours in sorted(config_dir().rglob("*.yaml")):
        theirs = Path(given) / ours.relative_to(config_dir())
        if theirs.is_file() and theirs.read_bytes() != ours.read_bytes():
            raise UsageError(f"{theirs} would not be read, since this program has its own {ours.name} there; rename it")
    return Path(given)


def checked(composed: DictConfig) -> Config:
    """Return the typed config of a composed job, or raise UsageError."""
    job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in NOT_OF_A_RUN])
    try:
        values = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UsageError(f"{error.full_key} is missing; set {error.full_key}=…") from None
    assert isinstance(values, dict)
    return validate({str(key): value for key, value in values.items()})


def group_of(composed: DictConfig) -> str | None:
    """Return the suite that a composed job belongs to."""
    return composed.suite.name if "suite" in composed else None


def read_line(arguments: Sequence[str]) -> list[str]:
    """Return a command line as Hydra is to read it: paths that its grammar does not cover are put in quotes.

    Raises UsageError for what Hydra would take in silence, or answer with a traceback or in its own words.
    """
    from hydra._internal.utils import get_args_parser

    def fail(message: str) -> NoReturn:
        hint = f"{PROGRAM} --help shows what there is"
        if "unrecognized arguments" in message and "=" in message:
            hint = "put flags such as -m before or after all that is key=value"
        raise UsageError(f"{message}; {hint}")

    for argument in arguments:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in argument):
            raise UsageError(f"{argument!r} holds a character that cannot be printed; leave it out, or rename the file")
    parser = get_args_parser()
    parser.error = fail  # type: ignore[method-assign]
    flags = parser.parse_args(arguments)
    _check_flags(flags)
    sweeping = flags.multirun or any(line.startswith("suite=") for line in flags.overrides)
    read = {line: with_path(line, sweeping) for line in flags.overrides}
    with composing(arguments):
        overrides = OverridesParser.create().parse_overrides(list(read.values()))
    refuse_clashes(flags.overrides)
    for override in overrides:
        _check_override(override, sweeping)
    if sweeping:
        swept = {key_of(str(override.input_line)) for override in overrides if override.is_sweep_override()}
        swept |= {"pruner", "score"} if "method" in swept else set()
        read |= {line: _of_each(typed) for line, typed in read.items() if key_of(line).partition(".")[0] in swept}
    return [read.get(argument, argument) for argument in arguments]


def _of_each(line: str) -> str:
    """Return a setting of what a grid has several of as an axis of one value: of the first choice it may be none."""
    key, equals, value = line.partition("=")
    alone = "." in key and equals and not OverridesParser.create().parse_override(line).is_sweep_override()
    return f"{key}=choice({value})" if alone else line


def _check_flags(flags: Namespace) -> None:
    """Raise UsageError for flags of Hydra's that have no place here, or not beside each other."""
    if flags.experimental_rerun is not None:
        raise UsageError(
            "--experimental-rerun would unpickle a file, which can run anything; type the command again instead: "
            "a run goes on from its checkpoint, and force=true starts it anew"
        )
    if flags.shell_completion:
        raise UsageError(f"--shell-completion is not offered; {PROGRAM} --help shows what there is")
    if (place := flags.config_name or flags.config_path) is not None:
        raise UsageError(f"the config is this program's own, not {place}; --config-dir FOLDER adds options of your own")
    if flags.config_dir is not None:
        own_folder(flags.config_dir)
    if flags.help or flags.hydra_help:
        return
    for flag in ("resolve", "package"):
        if getattr(flags, flag) and flags.cfg is None:
            raise UsageError(f"--{flag} has a say in what --cfg shows: add --cfg job, or leave it out")
    modes = ("run", "multirun", "cfg", "info")
    if len(given := [f"--{mode}" for mode in modes if getattr(flags, mode)]) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; leave out all but one")


def with_path(line: str, sweeping: bool) -> str:
    """Return an override; if it sets a path whose characters mean something else to Hydra, with the path in quotes.

    Raises UsageError for a path with a comma in a sweep, where it might as well be two paths.
    """
    key, _, value = line.partition("=")
    if key.lstrip("+") not in PATHS:
        return line
    try:
        read = OverridesParser.create().parse_override(line).value()
    except Exception:
        read = False  # it cannot be read as it stands
    if read is None or isinstance(read, str) or (isinstance(read, Sweep) and not getattr(read, "simple_form", False)):
        return line
    one = f"{key}={_in_quotes(value)}"
    if sweeping and "," in value:
        grid = f"{key}=choice({','.join(map(_in_quotes, value.split(',')))})"
        raise UsageError(
            f"{line} may be one path or several: write {as_typed(one)} for one, or {as_typed(grid)} for a grid"
        )
    return one


def _in_quotes(value: str) -> str:
    return QuotedString(value, Quote.single).with_quotes()


def as_typed(line: str) -> str:
    """Return how a shell is given an override with quotes in it."""
    return shlex.quote(line) if set(line) & set('"$`\\!') else f'"{line}"'


def _check_override(override: Override, sweeping: bool) -> None:
    key, line = override.key_or_group, str(override.input_line)
    if not key:
        raise UsageError(f"cannot read {line!r}: write key=value; {PROGRAM} --help shows the keys")
    if key.partition(".")[0].partition("/")[0] == "hydra" and not key.startswith(OF_HYDRA):
        raise UsageError(f"{line}: of Hydra's own keys only {', '.join(OF_HYDRA)} can be set here")
    if key == "hydra.searchpath" and isinstance(searched := override.value(), list):
        for place in map(str, searched):
            if place.startswith(OF_DISK):
                own_folder(place.removeprefix(OF_DISK), key)
    if override.package is not None:
        raise UsageError(f"{line}: leave out @{override.package}; every group has its place")
    if override.is_sweep_override() and not sweeping:
        raise UsageError(f"{line} is a grid; give one value, or to train each of them add -m")
    group, _, name = key.partition(".")
    options = sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
    if not options or (override.is_delete() and name):
        return
    if override.is_delete():
        raise UsageError(f"{line}: {group} always has a choice; choose one with {group}=…")
    if name == "name" and override.value() in options:
        raise UsageError(f"{line} does not change the rest of {group}; choose it with {group}={override.value()}")
    if name:
        return
    if override.is_add():
        raise UsageError(f"{line}: {group} always has a choice; leave out the +")
    if group == "suite" and override.is_sweep_override():
        raise UsageError(f"{line}: a suite is a whole grid; give one, and type a line for each")
    value = override.value()
    if isinstance(value, Glob):
        return
    for each in value.list if isinstance(value, ChoiceSweep) else [value]:
        if not isinstance(each, str | QuotedString):
            raise UsageError(f"{line} does not name an option of {group}; use one of {', '.join(options)}")


def check_size(overrides: Iterable[Override]) -> None:
    """Raise UsageError for a grid with more runs than anyone can mean, before any of them is listed."""
    runs: float = 1
    for override in overrides:
        value, line = override.value(), override.input_line
        if isinstance(value, IntervalSweep):
            raise UsageError(f"{line}: an interval has no values to run; use range(from,to,step), or name them")
        if isinstance(value, RangeSweep):
            assert value.start is not None
            assert value.stop is not None
            if not value.step:
                raise UsageError(f"{line} never ends; give a step other than 0")
            steps = (value.stop - value.start) / value.step
            runs *= 0 if steps <= 0 else math.ceil(steps) if math.isfinite(steps) else math.inf
        elif isinstance(value, ChoiceSweep):
            runs *= len(value.list)
    if not runs <= MOST_RUNS:
        raise UsageError(f"the grid has more than {MOST_RUNS} runs; give its axes fewer values")


def refuse_clashes(overrides: Sequence[str]) -> None:
    """Raise UsageError for keys of which one would silently win over the other."""
    given = set(map(key_of, overrides))
    if any(key.partition("@")[0].partition("/")[0] == "recipe" for key in given):
        raise UsageError("recipe follows from dataset, scale, model, learner and noise; choose those")
    if "method" in given and (twice := given & {"pruner", "score"}):
        raise UsageError(f"method chooses the pruner and the score; leave out method or {' and '.join(sorted(twice))}")
    if "saved" in given and (twice := given & {"pruner.budget", "pruner.fraction", "pruner.ratio"}):
        raise UsageError(f"saved says how much the pruner keeps; leave out saved or {' and '.join(sorted(twice))}")


@contextmanager
def composing(arguments: Sequence[str]) -> Iterator[None]:
    """Turn whatever Hydra raises while it makes a config of the arguments into a UsageError of one sentence."""
    try:
        with explained(arguments):
            yield
    except UsageError:
        raise
    except Exception as error:
        said = _flat(error) or type(error).__name__
        raise UsageError(f"Hydra cannot compose {shlex.join(arguments)}: {said}") from None


@contextmanager
def explained(arguments: Sequence[str]) -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into a UsageError of one sentence; ``arguments`` chose the config.

    Among them are the words that name folders of one's own options, whose keys are known then.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, arguments)) from None


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, option = re.fullmatch(r"((?:hydra/)?[^/]*)/?(.*)", str(error.missing_cfg_file)).groups()  # type: ignore
        known = sorted(error.options)
        return f"{group}={option} is unknown{suggest(option, known)}; use one of {', '.join(known)}"
    if isinstance(error, OverrideParseException):
        key, given, value = error.override.partition("=")
        if listed := re.fullmatch(r"\[([^'\"]*)\]", value):
            texts = ",".join(_in_quotes(part.strip()) for part in listed[1].split(","))
            hint = f"write {as_typed(f'{key}=[{texts}]')} if these are texts"
        else:
            hint = f"write {as_typed(f'{key}={_in_quotes(value)}')} if that is a text"
        hint = hint if given else f"{PROGRAM} --help shows the keys"
        return f"cannot read {error.override!r} as key=value; {hint}"
    text = str(error)
    if text.startswith("Could not override"):
        return unknown_key(text.split("'")[1], arguments)
    return _flat(error)


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())


def unknown_key(key: str, arguments: Sequence[str]) -> str:
    """Say which keys there are beside the unknown one, in the config that the other arguments choose."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        choices = [a for a in arguments if "=" in a and "." not in a.split("=")[0] and not a.startswith("-")]
        try:
            node: Any = compose("train", [*_folders_typed(arguments), *(a for a in choices if key_of(a) != key)])
        except Exception:  # it may be anything that Hydra raises over the other arguments
            node = compose("train")
    *parents, last = key.split(".")
    whole = {str(name) for name, value in node.items() if not isinstance(value, DictConfig)}
    if parents[:1] == ["hydra"]:
        return f"unknown key {key}; {PROGRAM} --cfg hydra shows what hydra has"
    for depth, parent in enumerate(parents):
        if not isinstance(node, DictConfig) or parent not in node:
            last, parents = parent, parents[:depth]
            break
        node = node[parent] if not OmegaConf.is_missing(node, parent) else None
    if not isinstance(node, DictConfig):
        return f"unknown key {key}; {'.'.join(parents)} holds no keys"
    if parents and last in whole:
        return f"unknown key {key}; {last} is a key of the whole run: {last}=…"
    known = [str(name) for name in node if name != "name"] + ([] if parents else ["suite", "method"])
    where = "=".join(filter(None, [".".join(parents), node.get("name")])) or "the config"
    files = sorted((config_dir() / parents[0]).glob("*.yaml")) if parents else []
    having = [file.stem for file in files if f"\n{last}:" in f"\n{file.read_text()}"]
    hint = f"; it belongs to {parents[0]}={', '.join(having)}" if having else suggest(last, known)
    return f"unknown key {key}{hint}; {where} has {', '.join(known) or 'no keys'}"


def _folders_typed(arguments: Sequence[str]) -> list[str]:
    """Return the override that finds what a command line's ``--config-dir`` or search path finds, or none."""
    if searched := [word for word in arguments if key_of(word) == "hydra.searchpath"]:
        return searched
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("-") else [word])]
    named = [folder for flag, folder in pairwise(words) if flag in ("--config-dir", "-cd")]
    return [searching(named[0])] if named else []


def searching(folder: str | Path) -> str:
    """Return the override by which Hydra finds options in a folder of one's own."""
    return f"hydra.searchpath=[{_in_quotes(OF_DISK + os.path.abspath(folder))}]"


def key_of(override: str) -> str:
    """Return the key, or the group, that an override is of."""
    return override.split("=")[0].lstrip("+~")


def own_options(hydra: HydraConf | DictConfig) -> tuple[str, ...]:
    """Return the words of the command line that Hydra has read by which it finds options of one's own."""
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    searched = [line for line in hydra.overrides.hydra if line.partition("=")[0] == "hydra.searchpath"]
    return *(f"--config-dir={from_here(folder)}" for folder in folders), *searched


def from_here(path: str) -> str:
    """Return a path as it is typed here."""
    here = os.path.relpath(path)
    return path if here.startswith("..") else here
