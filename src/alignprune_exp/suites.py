"""A suite: a grid of runs, and the layout of its table. Needs neither data nor torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from .commandline import (
    check_size,
    checked,
    composing,
    config_dir,
    explained,
    own_folder,
    refuse_clashes,
    searching,
    unknown_key,
    with_path,
)
from .config import Config, identity, validate
from .errors import UsageError
from .files import cache_folder, keep_cached
from .runs import run_id
from .schema import shown, suggest

LAYOUT = ("name", "rows", "columns", "baseline", "exclude", "at", "paper")  # what a suite says, the first four always


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        axes: the value on every axis of the grid, as typed, ``seed`` among them.
        config_id: the id of the run's config without its data.
        values: of the run's config.
    """

    axes: dict[str, str]
    config_id: str
    values: dict[str, Any]

    @cached_property
    def config(self) -> Config:
        """The run's config."""
        return validate(self.values)

    @property
    def seed(self) -> str:
        """Its value on the axis of seeds; 0 where there is no such axis."""
        return self.axes.get("seed", "0")


@dataclass(frozen=True)
class Suite:
    """A suite at one scale.

    Attributes:
        name: as in ``conf/suite/<name>.yaml``, or in the same place under a folder of one's own.
        scale: of its runs.
        results: the folder of these.
        rows, columns: the axes that the table's rows and columns stand for.
        baseline: the row that differences are taken against, if any.
        cells: the runs of the grid, in its order.
        paper: the paper's value of each row, by column, where the paper has any.
    """

    name: str
    scale: str
    results: str
    rows: list[str]
    columns: list[str]
    baseline: str | None
    cells: list[Cell]
    paper: dict[str, dict[str, float]] = field(default_factory=dict)

    def place(self, cell: Cell) -> tuple[str, str]:
        """Return the row and the column that a run stands at."""
        return label(cell.axes, self.rows), label(cell.axes, self.columns)


def label(axes: Mapping[str, str], names: Sequence[str]) -> str:
    """Return what a row or a column of a table is called, by a cell's values on some axes."""
    return " ".join(axes[name] for name in names)


def load_suite(name: str, overrides: Sequence[str] = (), own: Path | None = None) -> Suite:
    """Return a suite with every run of its grid composed and checked.

    ``overrides`` are those of the command line, such as ``scale=cpu``; ``own`` is a folder of configs beside the
    package's. What was composed before comes from a cache, which knows every file that it depends on.

    Raises UsageError for an unknown suite, a contradictory grid, or a mistake in any of its configs.
    """
    place = cache_folder("suites") / f"{_cache_key(name, overrides, own)}.json"
    try:
        return _from_json(json.loads(place.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, UsageError):
        suite = _compose(name, overrides, own)
    if not any("." in str(node["name"]) for cell in suite.cells for node in cell.values.values() if _names(node)):
        keep_cached(place, lambda file: file.write(json.dumps(asdict(suite)).encode()))
    return suite


def _names(node: Any) -> bool:
    return isinstance(node, dict) and "name" in node


def _compose(name: str, overrides: Sequence[str], own: Path | None) -> Suite:
    search = [searching(own)] if own else []
    GlobalHydra.instance().clear()
    with explained([*search, *overrides]), initialize_config_dir(str(config_dir()), version_base="1.3"):
        with composing([*search, *overrides]):
            master = compose("train", [*search, f"suite={name}"], return_hydra_config=True)
        jobs = grid_of(master, overrides)
        groups = set(master.hydra.runtime.choices)
        chosen = cache(lambda choices: _chosen(choices, search)) if own else _chosen_of_ours
        cells = []
        for job in jobs:
            refuse_clashes(job)
            choices = tuple(part for part in job if part.split("=")[0] in groups)
            values = [part for part in job if part not in choices]
            config = checked(_with(chosen(tuple(sorted(choices))), values, [*search, *job]))
            axes = dict(part.split("=", 1) for part in job)
            cells.append(Cell(axes, run_id(identity(config, "")), config.model_dump()))
    if not cells:
        raise UsageError(f"suite={name} has an empty grid; give every axis under hydra.sweeper.params a value")
    layout = _layout(master)
    rows, columns = layout["rows"], layout["columns"]
    _refuse_pooled(name, cells, {*rows, *columns, "seed"})
    return Suite(
        name,
        cells[0].values["scale"],
        cells[0].values["paths"]["results"],
        rows,
        columns,
        layout["baseline"],
        cells,
        layout["paper"],
    )


def _chosen(choices: Sequence[str], search: Sequence[str] = ()) -> DictConfig:
    """Return what options of groups compose, Hydra being initialised, which takes a fifth of a second."""
    with composing(choices):
        return compose("train", [*search, *choices])


@cache
def _chosen_of_ours(choices: tuple[str, ...]) -> DictConfig:
    """The same of the package's own, which do not change, and which many suites share."""
    return _chosen(choices)


def _refuse_pooled(name: str, cells: Sequence[Cell], laid_out: set[str]) -> None:
    """Raise UsageError where a place in the table, at one seed, has more runs than one: they would pass for seeds."""
    places: dict[tuple[str | None, ...], Cell] = {}
    for cell in cells:
        first = places.setdefault(tuple(cell.axes.get(axis) for axis in sorted(laid_out)), cell)
        if first.config_id != cell.config_id:
            axis = next(axis for axis, value in cell.axes.items() if first.axes.get(axis) != value)
            raise UsageError(
                f"suite={name} has several values of {axis}, by which its table is not laid out; give it one, or put "
                "it into suite.rows or suite.columns"
            )


def _from_json(values: dict[str, Any]) -> Suite:
    return Suite(cells=[Cell(**cell) for cell in values.pop("cells")], **values)


def _cache_key(name: str, overrides: Sequence[str], own: Path | None) -> str:
    """Return a hash of all that a composed suite depends on: configs, the code that reads them, and the words."""
    code = Path(__file__).parent.rglob("*.py")
    configs = [path for folder in (config_dir(), own) if folder for path in folder.rglob("*.yaml")]
    digest = hashlib.sha256(json.dumps([name, *overrides]).encode())
    for path in sorted([*code, *configs]):
        digest.update(f"\0{path}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def grid_of(master: DictConfig, overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[list[str]]:
    """Return the overrides of every run of the grid that a suite's axes and a command line make.

    Raises UsageError for a grid that cannot be read, is too large, or excludes what it does not have, and for a suite
    whose table cannot be laid out.
    """
    jobs = _jobs(master, overrides, loader)
    if "suite" in master and jobs:
        layout = _layout(master)
        in_full = [line for line in overrides if line.partition("=")[0] not in layout["rows"]]
        narrowed = len(in_full) < len(overrides)
        _check_layout(layout, jobs, [*jobs, *(_jobs(master, in_full, loader) if narrowed else [])])
    return jobs


def _layout(master: DictConfig) -> dict[str, Any]:
    """Return what a suite says of its table.

    That is lists of ``rows`` and ``columns``, ``baseline`` as a text or None, and ``paper`` as `Suite` has it.
    """
    layout: Any = OmegaConf.to_container(master.suite)
    name = master.hydra.runtime.choices["suite"]
    if strange := [str(key) for key in layout if key not in LAYOUT]:
        meant = suggest(strange[0], LAYOUT) or f"; use {', '.join(LAYOUT)}"
        raise UsageError(f"suite={name} says suite.{strange[0]}, which nothing reads{meant}")
    if lacking := [key for key in LAYOUT[:4] if key not in layout]:
        raise UsageError(f"suite={name} does not say suite.{lacking[0]}; write it there, as conf/suite/main.yaml does")
    lists = {key: layout[key] if isinstance(layout[key], list) else [layout[key]] for key in ("rows", "columns")}
    baseline = None if layout["baseline"] is None else shown(layout["baseline"])
    return {**layout, **lists, "baseline": baseline, "paper": _paper(name, layout.get("paper") or {})}


def _paper(name: str, given: Any) -> dict[str, dict[str, float]]:
    """Return the paper's values by row and column, of a suite that has a list of numbers for each row."""
    columns: Any = given.get("columns") if isinstance(given, Mapping) else None
    if given and not isinstance(columns, list):
        raise UsageError(f"suite={name} does not say suite.paper.columns; write it there, as conf/suite/main.yaml does")
    values = {shown(row): numbers for row, numbers in given.items() if row != "columns"}
    for row, numbers in values.items():
        if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
            raise UsageError(f"suite={name} has suite.paper.{row}={shown(numbers)}; write a list of numbers")
        if len(numbers) != len(columns):
            raise UsageError(
                f"suite={name} has {len(numbers)} numbers in suite.paper.{row}, and {len(columns)} in "
                "suite.paper.columns; write one a column"
            )
    return {row: dict(zip(map(shown, columns), numbers, strict=True)) for row, numbers in values.items()}


def _check_layout(layout: Mapping[str, Any], jobs: Sequence[Sequence[str]], in_full: Sequence[Sequence[str]]) -> None:
    """Raise UsageError for an axis that the jobs do not have, or a baseline that is no row of the grid ``in_full``."""
    name, rows, baseline = layout["name"], layout["rows"], layout["baseline"]
    axes = {part.partition("=")[0] for part in jobs[0]}
    if strange := [axis for axis in (*rows, *layout["columns"]) if axis not in axes]:
        raise UsageError(f"suite={name} lays its table out by {strange[0]}, which is no axis of its grid")
    values = [dict(part.split("=", 1) for part in job) for job in in_full]
    labels = dict.fromkeys(label(of_job, rows) for of_job in values if of_job.keys() >= {*rows})
    if baseline is not None and baseline not in labels:
        meant = suggest(baseline, labels) or f"; use one of {', '.join(labels)}, or null"
        raise UsageError(f"suite={name} has suite.baseline={baseline}, which is no row of its table{meant}")


def _jobs(master: DictConfig, overrides: Sequence[str], loader: ConfigLoader | None) -> list[list[str]]:
    with composing(overrides):
        parsed = OverridesParser.create(loader).parse_overrides([*_axes(master, overrides), *overrides])
        check_size(parsed)
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return _less_excluded(jobs, master, overrides)


def _axes(master: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the axes of the suite that ``master`` has chosen, with what ``suite.at.<scale>`` changes of them."""
    axes = dict(master.hydra.sweeper.params or {})
    if "suite" in master:
        given = [line for line in overrides if line.partition("=")[0] == "scale"]
        scales = [each.value() for each in OverridesParser.create().parse_overrides(given)] or [master.scale]
        if not isinstance(scales[-1], str):
            raise UsageError(f"suite={master.suite.name} is of one scale; type a line for each, such as scale=cpu")
        axes |= (master.suite.get("at") or {}).get(scales[-1]) or {}
    return [f"{axis}={values}" for axis, values in axes.items()]


def _less_excluded(jobs: Sequence[Sequence[str]], master: DictConfig, overrides: Sequence[str]) -> list[list[str]]:
    """Return the jobs of a grid without those that have, on all axes of an entry of ``suite.exclude``, one of its own.

    An entry has no say once the command line chooses all of its axes.

    Raises UsageError for an entry that is no mapping, or has an axis or a value that the suite's grid does not have.
    """
    given = {line.partition("=")[0] for line in overrides}
    there = {part for job in jobs for part in job}
    axes = {part.partition("=")[0] for part in there}
    kept = [list(job) for job in jobs]
    for entry in (master.suite.get("exclude") or []) if "suite" in master else []:
        name = f"suite={master.suite.name}"
        if not isinstance(entry, DictConfig):
            raise UsageError(f"{name} excludes {entry}, which is no mapping of axes to values; write {{axis: value}}")
        if strange := {str(axis) for axis in entry} - axes:
            raise UsageError(f"{name} excludes by {min(strange)}, which is no axis of its grid")
        cells = {
            str(axis): {f"{axis!s}={shown(value)}" for value in _several(values)} for axis, values in entry.items()
        }
        named = set().union(*cells.values())
        if unknown := {cell for cell in named - there if cell.partition("=")[0] not in given}:
            raise UsageError(f"{name} excludes {min(unknown)}, which is nowhere in its grid")
        if not given >= set(cells):
            kept = [job for job in kept if not all(excluded & set(job) for excluded in cells.values())]
    return kept


def _several(values: Any) -> Iterable[Any]:
    return values if isinstance(values, ListConfig) else (values,)


def option_names(group: str, own: Path | None = None) -> list[str]:
    """Return the options of a config group, such as suite or scale, those of a folder of one's own included."""
    return sorted({path.stem for folder in (config_dir(), own) if folder for path in (folder / group).glob("*.yaml")})


def suite_of(arguments: Iterable[str]) -> Suite:
    """Return the suite of a command line such as ``suite=main scale=cpu --config-dir DIR``.

    Raises UsageError where it names none, or more than one; --help says what there is, and ends the program.
    """
    chosen, overrides, own = [], [], None
    words = iter(arguments)
    for word in words:
        if word in ("-m", "--multirun"):
            continue
        if word in ("-h", "--help"):
            print(
                "suite=NAME, what differs in its runs, as scale=cpu, and --config-dir FOLDER where it is of your own\n"
                f"suites: {', '.join(option_names('suite', own))}"
            )
            raise SystemExit(0)
        if word.partition("=")[0] in ("--config-dir", "-cd"):
            own = own_folder(word.partition("=")[2] or next(words, ""))
        elif word.startswith("suite="):
            chosen.append(word.partition("=")[2])
        else:
            overrides.append(with_path(word, sweeping=True))
    if len(chosen) != 1 or not chosen[0]:
        raise UsageError(f"say which suite: suite=NAME, one of {', '.join(option_names('suite', own))}")
    return load_suite(chosen[0], overrides, own)


def _with(config: DictConfig, values: Sequence[str], job: Sequence[str]) -> DictConfig:
    """Return a copy with keys set as the command line would set them. Raises UsageError for one the job has not."""
    changed = config.copy()
    for override in OverridesParser.create().parse_overrides(list(values)):
        key = override.get_key_element()
        if OmegaConf.select(changed, key, throw_on_missing=False, default=_ABSENT) is _ABSENT:
            raise UsageError(f"{unknown_key(key, job)} (in the job {' '.join(job)})")
        OmegaConf.update(changed, key, override.value())
    return changed


_ABSENT = object()
