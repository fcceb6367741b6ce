"""Where the jobs of a checked sweep run: several at once on this machine, or on a Slurm cluster.

Both hand each job over as it was checked, so that what waits in a queue is what will run.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from alignprune_exp.sweep import Job

QUEUED = "queued.json"  # the Slurm job of every config that was sent and had not ended
HELD = "JobHeldUser"  # why a job waits that was sent on hold
STATES_EVERY = 15.0  # seconds between questions to Slurm about its queue
GRACE = 10.0  # seconds that a run has to leave a checkpoint in once the sweep's process is gone


class CheckedLauncher(Launcher):
    """Launches the jobs that the checked sweep has left with its task."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.task: Any = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from alignprune_exp.errors import UsageError

        jobs = [self.task.jobs.get(tuple(overrides)) for overrides in job_overrides]
        if None in jobs:
            raise UsageError("this hydra/launcher needs hydra/sweeper=checked")
        return self.launch_jobs(jobs)

    def launch_jobs(self, jobs: Sequence[Job]) -> list[JobReturn]:
        raise NotImplementedError


def perform(job: Job) -> int:
    """Run one job in the process that it was sent to."""
    from alignprune_exp.train import perform

    return perform(lambda: job)


def _ended(status: int) -> JobReturn:
    ended = JobReturn(status=JobStatus.COMPLETED)
    ended.return_value = status
    return ended


def _lost(reason: str) -> JobReturn:
    from alignprune_exp.sweep import NoResult

    ended = JobReturn(status=JobStatus.FAILED)
    ended.return_value = NoResult(reason)
    return ended


class JoblibLauncher(CheckedLauncher):
    """Runs ``n_jobs`` jobs at a time, each in a worker process of joblib's.

    Every worker is a pool of its own, so that one which dies takes its own job with it and no other. Where there are
    CUDA devices, the workers take them in turn.
    """

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def launch_jobs(self, jobs: Sequence[Job]) -> list[JobReturn]:
        from alignprune_exp.errors import Stopped, UsageError, refuse_load

        if not isinstance(self.n_jobs, int) or self.n_jobs < 1:
            raise UsageError(f"hydra.launcher.n_jobs={self.n_jobs} is not a number of runs; use 1 or more")
        refuse_load("hydra.launcher.n_jobs", self.n_jobs)
        workers = [_Worker(number) for number in range(min(self.n_jobs, len(jobs)))]
        waiting = iter(enumerate(jobs))
        ended: dict[int, JobReturn] = {}
        with _forwarding(workers) as stopped, ThreadPoolExecutor(len(workers)) as threads:
            for worker in workers:  # from one thread: joblib imports what it needs at its first start
                worker.start()

            def work(worker: _Worker) -> None:
                for index, job in waiting:  # a list's iterator hands each job to one thread
                    if stopped:
                        break
                    ended[index] = worker.run(job)
                worker.close()

            done = [threads.submit(work, worker) for worker in workers]
            wait(done)
        for future in done:
            future.result()
        if stopped:
            raise Stopped(f"the sweep was stopped with {len(jobs) - len(ended)} runs to do; the same command goes on")
        return [ended[index] for index in range(len(jobs))]


class _Worker:
    """One process, started again when it has died. It ends soon after the process that started it."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._pool: Any = None

    def start(self) -> None:
        from joblib.externals.loky.process_executor import ProcessPoolExecutor

        self._pool = ProcessPoolExecutor(1, initializer=_enter, initargs=(os.getpid(),))
        self._pool.submit(os.getpid)

    def run(self, job: Job) -> JobReturn:
        from joblib.externals.loky.process_executor import BrokenProcessPool

        try:
            if self._pool is None:
                self.start()
            return _ended(self._pool.submit(_status, job, os.getpid(), self._number).result())
        except BrokenProcessPool:
            self.close()
            return _lost("its process was killed, or ran out of memory; the same command goes on")
        except Exception as error:
            ended = JobReturn(status=JobStatus.FAILED)
            ended.return_value = error
            return ended

    def signal(self) -> None:
        for pid in list(self._pool._processes or ()) if self._pool is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None


def _enter(parent: int) -> None:
    """Begin a worker: the terminal's ^C is for the sweep alone, and whoever kills that ends its workers too."""
    os.setpgrp()
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def take_device(number: int) -> None:
    """Make one of the CUDA devices, if there are any, the one that ``device=cuda`` means in this process."""
    import torch

    if devices := torch.cuda.device_count():
        torch.cuda.set_device(number % devices)


def _end_after(parent: int) -> None:
    """End this process once its parent has ended; a run in it may leave a checkpoint first, within ``GRACE``."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _status(job: Job, parent: int, number: int) -> int:
    if job.config.device != "cpu":  # to name a device takes up some of its memory
        take_device(number)
    try:
        status = perform(job)
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    if os.getppid() != parent:
        os._exit(status)  # nobody is left to tell
    return status


@contextmanager
def _forwarding(workers: Sequence[_Worker]) -> Iterator[list[int]]:
    """Pass what asks this process to stop on to the workers; the list holds what came."""
    from alignprune_exp.errors import answering

    stopped: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for worker in workers:
            worker.signal()

    with answering(ask, signal.SIGINT, signal.SIGTERM):
        yield stopped


class SlurmLauncher(CheckedLauncher):
    """Submits the jobs as one array and waits for them.

    A job that Slurm interrupts, or that hits its time limit, goes on from its checkpoint under its own job id. Jobs
    are sent held, written down, and then released: what is held and not written down is of a sweep that was killed
    while it sent it, has never run, and is cancelled by the next one.
    """

    def __init__(self, submitit_folder: str, max_num_timeout: int, **parameters: Any) -> None:
        self.folder = Path(submitit_folder).expanduser()
        self.max_num_timeout = max_num_timeout
        self.parameters = parameters

    def launch_jobs(self, jobs: Sequence[Job]) -> list[JobReturn]:
        from alignprune_exp.console import say
        from alignprune_exp.errors import Stopped, UsageError

        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            raise UsageError(
                "sbatch is not found, so jobs cannot be sent to Slurm from here; "
                "hydra/launcher=joblib runs several jobs on this machine"
            )
        with _owned(self.folder.parent), _forwarding(()) as stopped:
            submitted, lines = self._send(jobs)
        for line in lines:
            say(line)
        try:
            if stopped:
                raise KeyboardInterrupt
            return _wait(jobs, submitted)
        except KeyboardInterrupt:
            raise Stopped(
                f"no longer waiting; the jobs go on without it: squeue --me shows them, "
                f"scancel {' '.join(_arrays(submitted))} ends them"
            ) from None

    def _send(self, jobs: Sequence[Job]) -> tuple[list[Any], list[str]]:
        """Submit what is not in the queue yet; return each job's Slurm job, and what there is to say about them."""
        from submitit import SlurmJob

        from alignprune_exp.errors import UsageError
        from alignprune_exp.runs import read_json, write_json

        queue = _queue()
        if queue is None:
            raise UsageError("squeue does not say what is in the queue, so jobs might be sent twice; try again later")
        record = self.folder.parent / QUEUED
        known = {id: job for id, job in (read_json(record) or {}).items() if isinstance(job, str) and job in queue}
        held = {job for job, (reason, _) in queue.items() if reason == HELD}
        here = str(self.folder.parent.absolute())
        lines = []
        if unknown := sorted(job for job in held - set(known.values()) if os.path.dirname(queue[job][1]) == here):
            _order("scancel", *unknown)
            lines.append(f"cancelled {', '.join(unknown)}: a sweep was killed before it had written them down")
        submitted: dict[str, Any] = {id: SlurmJob(self.folder, job) for id, job in known.items()}
        if waiting := [known[job.config_id] for job in jobs if job.config_id in known]:
            lines.append(f"{len(waiting)} of these are in the queue already: {', '.join(waiting)}")
        new = [job for job in jobs if job.config_id not in known]
        sent = self._submit(new) if new else []
        if sent:
            first, last = sent[0].job_id, sent[-1].job_id
            name = f"{first} to {last}" if last != first else first
            lines.append(f"submitted {name}; their logs are in {self.folder.parent}/")
            submitted |= {job.config_id: one for job, one in zip(new, sent, strict=True)}
            write_json(record, {id: one.job_id for id, one in submitted.items()})
            held |= {one.job_id for one in sent}
        mine = [submitted[job.config_id] for job in jobs]
        if stopped := [job for job in mine if job.job_id in held]:
            _order("scontrol", "release", ",".join(_arrays(stopped)))
        return mine, lines

    def _submit(self, jobs: Sequence[Job]) -> list[Any]:
        """Send jobs, held. Raises UsageError with Slurm's own sentence if it does not take them."""
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        from alignprune_exp.errors import UsageError

        shared = BaseQueueConf.__dataclass_fields__
        more = {**(self.parameters.get("additional_parameters") or {}), "hold": True}
        parameters = {**self.parameters, "additional_parameters": more}
        named = {name if name in shared else f"slurm_{name}": value for name, value in parameters.items()}
        executor = submitit.AutoExecutor(
            cluster="slurm", folder=self.folder, slurm_max_num_timeout=self.max_num_timeout
        )
        try:
            executor.update_parameters(**named)
        except Exception as error:  # it raises many kinds
            raise UsageError(f"hydra.launcher cannot be as it is: {' '.join(str(error).split())}") from None
        try:
            with redirect_stderr(StringIO()):  # submitit prints what it raises
                return executor.map_array(_Requeued(), jobs)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise UsageError(f"Slurm refuses the jobs: {_sentence(str(error))}") from None


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Own the folder of what is submitted. After a mistake in the block it holds what it held before.

    Of two sweeps that are sent at once the second waits here, and then finds the jobs of the first in the queue.
    """
    from alignprune_exp.errors import UsageError

    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; set paths.results=DIR") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = set(folder.iterdir())
        try:
            yield
        except UsageError:
            made = {Path(lock.name)} if missing else set()
            for path in set(folder.iterdir()) - before | made:
                path.unlink()
            for path in missing:
                path.rmdir()
            raise


class _Requeued:
    """The function of a submitted job. Its checkpoint is the run's own: what is queued again is the same job."""

    def __call__(self, job: Job) -> int:
        import submitit

        if submitit.JobEnvironment().num_tasks > 1:
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        return perform(job)

    def checkpoint(self, job: Job) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


def _sentence(text: str) -> str:
    return "; ".join(line.split("error:")[-1].strip() for line in text.splitlines() if line.strip())


def _wait(jobs: Sequence[Job], submitted: Sequence[Any]) -> list[JobReturn]:
    """Wait until every job has left a result, or is neither queued nor running any more."""
    from alignprune_exp.console import say

    open_ = dict(enumerate(submitted))
    ended: dict[int, JobReturn] = {}
    gone: dict[int, int] = {}
    asked = time.monotonic()
    while open_:
        time.sleep(1)
        for index, job in list(open_.items()):
            if job.paths.result_pickle.exists():
                ended[index] = _result(open_.pop(index))
        if time.monotonic() - asked < STATES_EVERY:
            continue
        asked = time.monotonic()
        queue = _queue()
        for index, job in list(open_.items()):
            gone[index] = gone.get(index, 0) + 1 if queue is not None and job.job_id not in queue else 0
            if gone[index] == 2:  # a result may show late on a shared file system
                del open_[index]
                ended[index] = _lost(f"job {job.job_id} ended without a result; see {job.paths.stderr}")
    for index, job in enumerate(submitted):
        if ended[index].status is JobStatus.COMPLETED and ended[index].return_value != 0:
            said = [line for line in (job.stderr() or "").splitlines() if line.strip()]
            say(f"[{jobs[index].number}] {said[-1] if said else job.paths.stdout}")
    return [ended[index] for index in range(len(submitted))]


def _result(job: Any) -> JobReturn:
    import submitit

    outcome, result = submitit.core.utils.pickle_load(job.paths.result_pickle)
    if outcome == "success":
        return _ended(result)
    return _lost(f"job {job.job_id}: {result.strip().splitlines()[-1]}; see {job.paths.stderr}")


def _queue() -> dict[str, tuple[str, str]] | None:
    """Return this user's jobs that wait or run, by their ids as submitit writes them; None if Slurm does not answer.

    Of each it says why it waits, and the path of its script.
    """
    asked = subprocess.run(["squeue", "--me", "-h", "-r", "-o", "%i|%r|%o"], capture_output=True, text=True)
    if asked.returncode != 0:
        return None
    rows = (line.split("|", 2) for line in asked.stdout.splitlines() if line.count("|") >= 2)
    return {id: (reason, script) for id, reason, script in rows}


def _order(*command: str) -> None:
    """Give Slurm an order. Raises Failed with its own sentence if it does not obey."""
    from alignprune_exp.errors import Failed

    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(f"{shlex.join(command)} failed: {_sentence(done.stderr)}; the same command tries again")


def _arrays(jobs: Sequence[Any]) -> list[str]:
    """Return the ids of what the jobs were submitted as."""
    return list(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))
