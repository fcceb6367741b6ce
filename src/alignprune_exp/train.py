"""The entry point: compose the config, run, report.

python -m alignprune_exp.train pruner=infobatch score=das noise=sym0.5
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .errors import GOES_ON, STOPPED_AT_ONCE, Stopped, UsageError, terminable

if __name__ == "__main__":
    # Before the imports below, which take a moment in which one may be stopped too; and under its real name, so that
    # jobs sent to other processes find what they need.
    try:
        with terminable():
            from alignprune_exp.train import main as entry

            sys.exit(entry())
    except KeyboardInterrupt:
        print(STOPPED_AT_ONCE, file=sys.stderr)
        sys.exit(Stopped.status)

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .advice import inert_keys, next_commands
from .commandline import (
    PROGRAM,
    checked,
    composing,
    config_dir,
    explained,
    group_of,
    own_options,
    read_line,
    refuse_clashes,
)
from .console import command, speaks

if TYPE_CHECKING:
    from .sweep import Job


class HydraJob:
    """The job that Hydra calls. It reports its own end, so that nothing but a bug raises through Hydra.

    ``status`` is the exit status of the last job in this process: 0 done, 1 failed, 2 a mistake, 3 running
    elsewhere, 130 stopped. ``composed`` says that Hydra has made a config of the command line. ``jobs`` are those of
    a sweep as it checked them, by their overrides: they run as they were checked, whatever has become of the configs
    since.
    """

    def __init__(self) -> None:
        self.status = 0
        self.composed = False
        self.jobs: dict[tuple[str, ...], Job] = {}

    def __call__(self, composed: DictConfig) -> int:
        self.composed = True
        overrides = tuple(OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)["task"])  # type: ignore
        self.status = perform(lambda: self.jobs.get(overrides) or _single(composed, overrides))
        return self.status


def _single(composed: DictConfig, overrides: tuple[str, ...]) -> Job:
    from .sweep import Job

    hydra_config = HydraConfig.get()
    launcher = hydra_config.runtime.choices["hydra/launcher"]
    if launcher != "basic" and hydra_config.mode is RunMode.RUN:
        raise UsageError(f"hydra/launcher={launcher} launches sweeps; add -m")
    refuse_clashes(overrides)
    return Job(None, overrides, checked(composed), group_of(composed), own_options(hydra_config))


def perform(job: Callable[[], Job]) -> int:
    """Run what ``job`` returns and return its exit status.

    Whoever stops a job ends its process, and with it the sweep that it is part of; a scheduler starts it again. Of
    several processes that share the run the first alone does so, lest the others' end takes it down too early.
    """
    status = _report(lambda: _run(job()))
    if status == Stopped.status and speaks():
        _requeue()
        sys.exit(status)
    return status


def _run(job: Job) -> None:
    from .console import closing, say
    from .records import headline
    from .run import run

    config, overrides = job.config, job.overrides
    if job.number is not None:
        say(f"[{job.number}] {' '.join(overrides)}")
    for note in inert_keys(config, overrides):
        say(f"note: {note}")
    summary, folder = run(config, shlex.join([*PROGRAM.split(), *job.own, *overrides]), job.group)
    commands = _next(job) if job.number is None else []
    say(closing(summary, headline(summary), str(folder), commands))


def _next(job: Job) -> list[tuple[str, str]]:
    """Return commands worth typing next; where Hydra has read the job's own, with its options, and tried as it was."""
    if not GlobalHydra.instance().is_initialized():
        return next_commands(job.config, job.overrides)
    searched = [word for word in job.own if not word.startswith("-")]

    def fits(words: list[str]) -> bool:
        from .sweep import job_of

        try:
            job_of(None, tuple(words), lambda typed: hydra.compose("train", [*searched, *typed]), job.own)
        except UsageError:
            return False
        return True

    return next_commands(job.config, job.overrides, job.own, HydraConfig.get().runtime.choices, fits)


def _requeue() -> None:
    """Let submitit queue this process's Slurm job again and end the process, unless Slurm has done so or cancelled it.

    That is what its SIGUSR2 handler does; the run has taken the signal before it, to leave a checkpoint first.
    """
    handler = signal.getsignal(signal.SIGUSR2)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or not callable(handler):
        return
    try:
        state = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip()
    except OSError:
        state = ""
    if state in ("RUNNING", ""):
        handler(signal.SIGUSR2, None)


def _report(work: Callable[[], object]) -> int:
    """Do the work; print one sentence if it does not end well; return the exit status."""

    def explaining() -> None:
        with explained(sys.argv[1:]):
            work()

    return command(explaining, GOES_ON, STOPPED_AT_ONCE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status: 0 done, 1 failed, 2 a mistake, 3 running elsewhere, 130 stopped."""
    if arguments is not None:
        sys.argv = [PROGRAM, *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    task = HydraJob()

    def work() -> None:
        sys.argv[1:] = read_line(sys.argv[1:])
        try:
            hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(task)()
        except Exception:
            if task.composed:
                raise
            with composing(sys.argv[1:]):
                raise
        except SystemExit as ended:
            if task.composed or not ended.code:
                raise
            task.status = 2  # Hydra has said why

    return _report(work) or task.status
