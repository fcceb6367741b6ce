"""Finished runs into the repository, in compact form: python -m alignprune_exp.report.publish suite=main scale=cpu"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..config import PATHS
from ..console import command
from ..errors import UsageError
from ..packs import pack
from ..records import Record, config_ids_of, read_config, read_dynamics, read_record
from ..runs import run_folders
from ..suites import Cell, Suite, suite_of

OF_THE_MACHINE = ("host", "slurm_job_id")  # keys of environment.json that are never published


def publish(suite: Suite, results: Path) -> tuple[list[str], list[str], list[str]]:
    """Pack the suite's finished runs, scrubbed, from ``results/runs`` into ``results/records/<suite>_<scale>.parquet``.

    Returns the ids that are new, those that were published already, in whatever suite, and the names of the cells
    without a run. The pack is written whole or not at all. Raises UsageError, with nothing written, for a run that is
    published with another record, and Damaged for one of either place that is damaged.
    """
    wanted = {cell.config_id for cell in suite.cells}
    runs, known = _finished(results, wanted), _finished(results / "records", wanted)
    new: dict[str, dict[str, bytes]] = {}
    for id, record in runs.items():
        files = compact(record)
        if id not in known:
            new[id] = files
        elif _differs(known[id], files):
            raise UsageError(
                f"{known[id].folder.parent} holds another record of run {id}; take it back with git, or run that one "
                "again with force=true"
            )
    target = results / "records" / f"{suite.name}_{suite.scale}.parquet"
    if new:
        pack(target, new)
    there = {record.summary["config_id"] for record in (*runs.values(), *known.values())}
    missing = {cell.config_id: _name(suite, cell) for cell in suite.cells if cell.config_id not in there}
    return sorted(new), sorted(known), list(missing.values())


def _finished(results: Path, wanted: set[str]) -> dict[str, Record]:
    """Return the finished runs of some configs by id. Raises Damaged."""
    records = (read_record(folder) for folder in run_folders(results) if config_ids_of(folder) & wanted)
    return {record.folder.name: record for record in records if record is not None}


def _differs(published: Record, files: Mapping[str, bytes]) -> bool:
    """Return whether a published record is another than ``files``.

    What is scrubbed by now and was not then makes no difference, nor do the bytes of Parquet, which go by its writer.
    """
    known = compact(published)
    return any(known[name] != data for name, data in files.items() if not name.endswith(".parquet"))


def compact(record: Record) -> dict[str, bytes]:
    """Return the files of a run's published record. Raises Damaged."""
    read_dynamics(record)
    folder = record.folder
    return {
        "config.yaml": OmegaConf.to_yaml(OmegaConf.create(scrubbed_config(read_config(folder)))).encode(),
        "summary.json": _json(record.summary),
        "metrics.jsonl": (folder / "metrics.jsonl").read_bytes(),
        "dynamics.parquet": (folder / "dynamics.parquet").read_bytes(),
        "environment.json": _json(scrubbed_environment(record.environment)),
    }


def scrubbed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config without what is of the machine or the person: paths and tracking."""
    found = {**config, "paths": dict.fromkeys(config["paths"]), "tracking": {"name": "none"}}
    for node, key in (path.split(".") for path in PATHS):
        if key in found.get(node, {}):
            found[node] = {**found[node], key: None}
    return found


def scrubbed_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's environment without the host, the kernel's name, and the paths of its command."""
    kept = {key: value for key, value in environment.items() if key not in OF_THE_MACHINE}
    if "platform" in kept:
        kept["platform"] = str(kept["platform"]).split("-")[0]
    if "command" in kept:
        kept["command"] = scrubbed_command(str(kept["command"]))
    return kept


def scrubbed_command(command: str) -> str:
    """Return the command with ``DIR`` (``FILE`` for ``noise.file``) for every path."""
    parts = []
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without its end
        words = command.split()
    for part in words:
        key, equals, value = part.partition("=")
        of_a_person = key.lstrip("+").startswith("tracking.")
        if equals and (key.lstrip("+") in PATHS or _is_path(value)):
            part = f"{key}={'FILE' if key == 'noise.file' else 'DIR'}"
        elif not equals and _is_path(part):
            part = "PATH"
        if not of_a_person:
            parts.append(part)
    return shlex.join(parts)


def _is_path(value: str) -> bool:
    return any(mark in value for mark in ("/", "\\", "~"))


def _name(suite: Suite, cell: Cell) -> str:
    return f"{' '.join(suite.place(cell))} seed {cell.seed}"


def _json(values: Any) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def main(arguments: Sequence[str]) -> int:
    """Publish; say what was and what is missing; return the exit status."""

    def work() -> None:
        suite = suite_of(arguments)
        new, known, missing = publish(suite, Path(suite.results))
        for id in new:
            print(f"published {id}")
        print(f"{len(new)} published, {len(known)} published before, {len(missing)} missing")
        for name in missing:
            print(f"missing   {name}")

    return command(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
