"""A run on disk: identity, lock, metrics, checkpoints, summary. The record is the truth."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import Elsewhere, UsageError
from .files import write_atomically

HEARTBEAT = 60.0  # seconds between signs of life in the lock
LAPSE = 300.0  # seconds of silence after which another host's lock counts for nothing
CHECKPOINTS = ("checkpoint-a.pt", "checkpoint-b.pt")


def run_id(identity: Mapping[str, Any]) -> str:
    """Return the id (12 hex digits) of the run that computes ``identity``."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def run_folders(results: Path) -> list[Path]:
    """Return the folders of all runs under ``results``, but for those set aside, in order of their ids."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(results / "runs") if "~" not in entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds; None if it is not there or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def summaries(results: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folder and summary of every ended run under ``results``, but for those set aside or damaged."""
    for folder in run_folders(results):
        if (summary := read_json(folder / "summary.json")) is not None:
            yield folder, summary


def finished_configs(results: Path) -> frozenset[str]:
    """Return the config ids of the finished runs under ``results``."""
    return frozenset(
        summary.get("config_id", "") for _, summary in summaries(results) if summary.get("status") == "finished"
    )


class RunFolder:
    """``<results>/runs/<id>/``. Nothing is written before ``claim``."""

    def __init__(self, results: Path, id: str) -> None:
        self.id = id
        self.path = results / "runs" / id

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of an ended run, else None. Raises UsageError if it cannot be read."""
        path = self.path / "summary.json"
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            raise UsageError(f"{path} is damaged; force=true runs it again and keeps this folder") from None

    def was_requeued(self) -> bool:
        """Return whether this very Slurm job began the run, did not end it, and was queued again."""
        job = os.environ.get("SLURM_JOB_ID")
        environment = read_json(self.path / "environment.json") or {}
        return job is not None and environment.get("slurm_job_id") == job and self.summary() is None

    @contextmanager
    def claim(self, anew: bool = False) -> Iterator[None]:
        """Own the folder, alone, until the block ends; ``anew`` renames an existing one to ``<id>~1`` first.

        Raises UsageError if the folder cannot be written, and Elsewhere if another process owns it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = Lock(self.path / "lock")
        except OSError as error:
            raise UsageError(
                f"the results folder cannot be written: {error.strerror} ({error.filename}); set paths.results=DIR"
            ) from None
        if anew and any(entry.name != "lock" for entry in self.path.iterdir()):
            self._set_aside()
            lock.release()
            self.path.mkdir(exist_ok=True)
            lock = Lock(self.path / "lock")
        for name in (*CHECKPOINTS, "metrics.jsonl", "dynamics.parquet"):
            for half in self.path.glob(f".{name}.*"):  # of a process that was killed while it wrote
                half.unlink()
        try:
            yield
        finally:
            lock.release()

    def _set_aside(self) -> None:
        for number in range(1, 1000):
            aside = self.path.with_name(f"{self.id}~{number}")
            try:
                self.path.rename(aside)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                (aside / "lock").unlink()
                return
        raise UsageError(f"{self.path} has been run again 999 times; remove some of {self.id}~*")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics.jsonl``, up to the first that is torn."""
        rows: list[dict[str, Any]] = []
        try:
            text = (self.path / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return rows
        for line in text.splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_metrics(self, epochs: int) -> None:
        """Keep the rows of the first ``epochs`` epochs."""
        rows = [row for row in self.metrics() if row["epoch"] < epochs]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write ``state`` over the older of the two checkpoints."""
        import torch

        paths = [self.path / name for name in CHECKPOINTS]
        oldest = min(paths, key=lambda path: path.stat().st_mtime_ns if path.exists() else 0)
        write_atomically(oldest, lambda file: torch.save({"id": self.id, **state}, file))

    def load_checkpoint(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the latest checkpoint that can be used, or None if there is none.

        A damaged one is named through ``say``, and the one before it is taken. Raises UsageError if none is
        left, or if one belongs to another run.
        """
        import torch

        paths = [path for path in (self.path / name for name in CHECKPOINTS) if path.exists()]
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                owner = state["id"]
            except Exception as error:  # torch.load raises many kinds on damaged files
                reason = (str(error) or type(error).__name__).splitlines()[0]
                say(f"{path} is damaged ({reason}); going back to the checkpoint before it")
                continue
            if owner != self.id:
                raise UsageError(f"{path} belongs to run {owner}, not to {self.id}; remove it, or set force=true")
            return state
        if paths:
            raise UsageError(f"no checkpoint in {self.path} can be read; force=true starts again and keeps this folder")
        return None

    def remove_checkpoints(self) -> None:
        for name in CHECKPOINTS:
            (self.path / name).unlink(missing_ok=True)


class Lock:
    """One process a run folder.

    The kernel's lock on the file keeps processes of one host apart and falls with its owner. What the file
    says keeps hosts apart that do not share kernel locks: host, pid and a heartbeat (the file's time). Another
    host's lock lapses after ``LAPSE`` seconds of silence, and at once for the same Slurm job, which was requeued.

    Raises Elsewhere if another process owns it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = self._open()
        owner = _parse(self._file)
        if owner and owner["host"] != socket.gethostname() and not self._lapsed(owner):
            self._file.close()
            raise Elsewhere(self._running(owner))
        self._file.seek(0)
        self._file.truncate()
        mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        self._file.write(json.dumps(mine))
        self._file.flush()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def release(self) -> None:
        self._stop.set()
        self._heart.join()
        if _same_file(self._path, self._file):
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _open(self) -> IO[str]:
        while True:
            file = self._path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _who(file)
                file.close()
                raise Elsewhere(self._running(owner)) from None
            if _same_file(self._path, file):
                return file
            file.close()

    def _lapsed(self, owner: Mapping[str, Any]) -> bool:
        job = os.environ.get("SLURM_JOB_ID")
        if job is not None and job == owner.get("slurm_job_id"):
            return True
        probe = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        probe.touch()  # this file system's time, not this host's
        now = probe.stat().st_mtime
        probe.unlink()
        return now - os.fstat(self._file.fileno()).st_mtime > LAPSE

    def _running(self, owner: Mapping[str, Any] | None) -> str:
        who = f" (host {owner['host']}, process {owner['pid']})" if owner else ""
        return f"run {self._path.parent.name} is running elsewhere{who}; wait for it, or stop it first"

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            os.utime(self._file.fileno())


def _same_file(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _who(file: IO[str]) -> dict[str, Any] | None:
    """Return the owner of a locked file, who may need a moment to write its name."""
    for _ in range(20):
        if (owner := _parse(file)) is not None:
            return owner
        time.sleep(0.05)
    return None


def _parse(file: IO[str]) -> dict[str, Any] | None:
    file.seek(0)
    try:
        owner = json.load(file)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"host", "pid"} <= owner.keys() else None


def owner_alive(folder: Path) -> bool:
    """Return whether a process seems to be running in ``folder``, without touching its lock."""
    path = folder / "lock"
    owner = read_json(path)
    if owner is None:
        return False
    if owner.get("host") != socket.gethostname():
        return time.time() - path.stat().st_mtime <= LAPSE
    try:
        os.kill(int(owner["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError, OverflowError):  # the lock may be damaged
        return False
    except PermissionError:
        return True
    return True
