"""What a sweep checks before it launches, and what it says at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from .config import Config, feature_files, identity
from .console import Progress, say
from .errors import Elsewhere, UsageError
from .records import finished_configs
from .runs import run_id


@dataclass(frozen=True)
class Job:
    """A run as it was checked; it is handed to whatever process runs it.

    Attributes:
        number: its place in the sweep, from 1; None for a single run.
        overrides: the arguments that chose it.
        config: what it runs.
        group: the suite that it belongs to, if any.
        own: the words that name folders of one's own options; see `own_options`.
    """

    number: int | None
    overrides: tuple[str, ...]
    config: Config
    group: str | None
    own: tuple[str, ...] = ()

    @property
    def config_id(self) -> str:
        """The id of the config without its data."""
        return run_id(identity(self.config, ""))


def jobs_of(
    grid: Sequence[Sequence[str]], compose: Callable[[list[str]], DictConfig], here: bool, own: tuple[str, ...] = ()
) -> list[Job]:
    """Compose and check every job; return those that are runs of their own and not yet finished, in order.

    Where they run ``here``, on this machine, their data is opened as well, and their network made, once for each that
    is named otherwise: a run of other data than these has not finished this one.

    Raises UsageError with the job's overrides for the first one that is a mistake.
    """
    seen: dict[str, Job] = {}
    finished = 0
    done: dict[str, dict[str, set[str]]] = {}
    opened: Opened = {}
    progress = Progress()
    for number, overrides in enumerate(grid):
        progress.show(f"checking runs: {number}/{len(grid)}")
        with _named(overrides):
            job = job_of(len(seen) + 1, tuple(overrides), compose, own)
        id, results = job.config_id, job.config.paths.results
        if results not in done:
            done[results] = finished_configs(Path(results))
        before = set() if job.config.force else done[results].get(id, set())
        with _named(overrides):
            data = _tried(job.config, bool(before), opened) if here else None
        if before and (data is None or data.fingerprint in before):
            finished += 1
        else:
            seen.setdefault(id, job)
    same = len(grid) - finished - len(seen)
    say(
        f"{len(seen)} runs to do"
        + (f", {finished} finished already" if finished else "")
        + (f", {same} more are the same run as one of these" if same else "")
    )
    return list(seen.values())


def job_of(
    number: int | None, overrides: tuple[str, ...], compose: Callable[[list[str]], DictConfig], own: tuple[str, ...]
) -> Job:
    """Return a job, whose config has been checked, and what it prunes by made. Raises UsageError."""
    from .commandline import checked, composing, explained, group_of, refuse_clashes
    from .setup import check_pruning

    refuse_clashes(overrides)
    with composing([*own, *overrides]):
        composed = compose(list(overrides))
    with explained([*own, *overrides]):
        config = checked(composed)
    check_pruning(config)
    return Job(number, overrides, config, group_of(composed), own)


@dataclass(frozen=True)
class Data:
    """What a job's data are: their fingerprint, and whether they have class labels, and known ``clean`` ones."""

    fingerprint: str
    classes: bool
    clean: bool


Opened = dict[tuple[object, ...], Data | None]  # by what the data and the network depend on; None: cannot be read


def _tried(config: Config, finished: bool, opened: Opened) -> Data | None:
    """Return what a job's data are, once its config has been checked against them; see `_data`."""
    from .checks import check_labels, check_load

    check_load(config)
    files = frozenset(feature_files(config).values()) - {None}
    what = (config.task, config.dataset, config.noise, config.reference, config.paths.data, config.model, files)
    if what not in opened or (opened[what] is None and not finished):
        opened[what] = _data(config, finished)
    if (data := opened[what]) is not None:
        check_labels(config, data.classes, data.clean)
    return data


def _data(config: Config, finished: bool) -> Data | None:
    """Return what a job's data are, and try its network on them.

    One that has ``finished`` has tried it, and may do without its data: None where they cannot be read.
    Raises UsageError otherwise.
    """
    from .setup import open_task

    try:
        task = open_task(config)
    except UsageError:
        if finished:
            return None
        raise
    if not finished:
        task.network()
    return Data(task.fingerprint, task.classes is not None, task.corrupted is not None)


@contextmanager
def _named(overrides: Sequence[str]) -> Iterator[None]:
    """Name the job in a mistake that is found in it."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{error} (in the job {' '.join(overrides)})") from None


def failures(jobs: Sequence[Job], returns: Sequence[JobReturn]) -> str:
    """Return what ends a sweep in which jobs failed, or nothing: which, and why where they could not say it.

    A job whose run another process has did not fail; how many these are is said.
    """
    lines = []
    elsewhere = 0
    for job, ended in zip(jobs, returns, strict=True):
        line = f"  {' '.join(job.overrides)}"
        if ended.status is not JobStatus.COMPLETED:
            error = ended._return_value
            what = str(error) if isinstance(error, NoResult) else f"{type(error).__name__}: {error}"
            lines.append(f"{line}: {what}")
        elif ended.return_value == Elsewhere.status:
            elsewhere += 1
        elif ended.return_value != 0:
            lines.append(line)
    if elsewhere:
        say(f"{elsewhere} of {len(jobs)} runs are running elsewhere; the same command runs what these may leave")
    return "\n".join([f"{len(lines)} of {len(jobs)} runs did not finish:", *lines]) if lines else ""


class NoResult(Exception):
    """What is known of a job whose process ended without a word."""
