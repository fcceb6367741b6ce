"""What the benchmarks share: timing, peak memory, the machine, and their table."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from alignprune_exp.commandline import checked, config_dir
from alignprune_exp.config import Config
from alignprune_exp.loop import Epoch
from alignprune_exp.run import Run
from alignprune_exp.runs import RunFolder

THREADS = 2


@dataclass(frozen=True)
class Row:
    """One line of a table: seconds of ours and of a baseline, both doing the whole step for all ``samples``.

    ``ratio`` is baseline_seconds / seconds; ``peak_mb`` the process's resident memory at its peak during ours.
    """

    step: str
    samples: int
    seconds: float
    baseline: str
    baseline_seconds: float
    ratio: float
    peak_mb: float


class Report:
    """Collects rows and differences from the baselines; prints as it goes."""

    def __init__(self, title: str) -> None:
        self.rows: list[Row] = []
        self.wrong: list[str] = []
        print(f"{title}\n{machine()}\n")

    def add(
        self, step: str, samples: int, seconds: float, peak_mb: float, baseline: str, baseline_seconds: float
    ) -> None:
        row = Row(step, samples, seconds, baseline, baseline_seconds, baseline_seconds / seconds, peak_mb)
        self.rows.append(row)
        print(
            f"{step:<12} {samples:>12,} samples {seconds:10.4f} s   {row.ratio:7.2f} x as fast as "
            f"{baseline_seconds:8.3f} s, {baseline}; peak {peak_mb:,.0f} MB"
        )

    def check(self, right: bool, what: str) -> None:
        """Note, and say, that ``what`` is not so."""
        if not right:
            self.wrong.append(what)
            print(f"WRONG: {what}")

    def finish(self, file: Path | None) -> int:
        """Write the rows to ``file``; return the exit status: 1 if a result was wrong."""
        if file is not None:
            file.write_text(json.dumps([asdict(row) for row in self.rows], indent=2) + "\n")
        print(f"\n{len(self.wrong)} results differ" if self.wrong else "\nall results equal the baselines'")
        return 1 if self.wrong else 0


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, metavar="FILE", help="write a list of the table's rows")
    return made


def machine() -> str:
    model = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        model = next(
            (line.split(":")[1].strip() for line in cpu.read_text().splitlines() if "model name" in line), model
        )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def best(work: Callable[[], Any], times: int = 5) -> float:
    """Return the least seconds of several runs."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measured(work: Callable[[], Any], times: int = 5) -> tuple[Any, float, float]:
    """Return the result of ``work``, its least seconds, and the peak resident memory in MB."""
    reset_peak()
    result = work()
    peak = peak_mb()
    return result, best(work, times), peak


def reset_peak() -> None:
    with suppress(OSError):  # then the peak is the process's so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """Return the process's peak resident memory in MB, since ``reset_peak`` where the system can tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def config(*overrides: str) -> Config:
    """Return the config that ``python -m alignprune_exp.train OVERRIDES`` has."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return checked(compose("train", overrides=list(overrides)))


def walk(run: Run) -> tuple[list[dict[str, Any]], list[float]]:
    """Train, with a record that is thrown away; return its metrics by epoch, and the seconds between their beginnings.

    The last epoch's end where the run's does.
    """
    assert run.loop is not None
    train, began = run.loop.epoch, []

    def noted(*given: Any) -> Epoch:
        began.append(time.perf_counter())
        return train(*given)

    run.loop.epoch = noted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as results:
        folder = RunFolder(Path(results), run.setup.id)
        with folder.claim(False), redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            run.train(folder, "a benchmark")
            ended = time.perf_counter()
            return run.journal.rows, [end - begin for begin, end in pairwise([*began, ended])]


def memory_bandwidth() -> float:
    """Return the bytes a second of a plain copy of 256 MB, read and written, on all threads."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source))
