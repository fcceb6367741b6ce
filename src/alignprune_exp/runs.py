"""A run on disk: its identity, folder, lock and checkpoints; `records` reads what it leaves."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import Elsewhere, Failed, UsageError, is_of_memory, reason_of
from .files import printable, write_atomically
from .packs import Packed, packed_runs

Folder = Path | Packed  # of a run

HEARTBEAT = 60.0  # seconds between signs of life in the lock
LAPSE = 300.0  # seconds of silence after which another host's lock counts for nothing
CHECKPOINTS = ("checkpoint-a.pt", "checkpoint-b.pt")
RECORD = (
    "config.yaml",
    "environment.json",
    "skipped.txt",
    "metrics.jsonl",
    "dynamics.parquet",
    "samples.parquet",
    "probabilities.parquet",
    "summary.json",
)


def run_id(identity: Mapping[str, Any]) -> str:
    """Return the id (12 hex digits) of the run that computes ``identity``."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(printable(text).encode()))


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def run_folders(results: Path) -> list[Folder]:
    """Return the folders of all runs under ``results``, published ones too, in order of their ids."""
    return sorted([*packed_runs(results), *own_folders(results)], key=lambda folder: folder.name)


def own_folders(results: Path) -> list[Path]:
    """Return the folders in ``results/runs``, but for those set aside."""
    try:
        return [Path(entry.path) for entry in os.scandir(results / "runs") if "~" not in entry.name]
    except (FileNotFoundError, NotADirectoryError):
        return []


def run_folder(given: str, results: Path) -> Path:
    """Return the folder of a run that is given as a folder, or by its id under ``results``; raise UsageError."""
    for folder in (Path(os.path.realpath(given)), results / "runs" / given):
        if (folder / "config.yaml").is_file() or (folder / "summary.json").is_file():
            return folder
    raise UsageError(f"there is no run {given}; give a run's folder, or an id under {results / 'runs'}")


def read_json(path: Folder) -> dict[str, Any] | None:
    """Return what a JSON file holds; None if it is not there or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


class RunFolder:
    """``<results>/runs/<id>/``. Nothing is written before ``claim``."""

    def __init__(self, results: Path, id: str) -> None:
        self.id = id
        self.path = results / "runs" / id
        self._latest: Path | None = None  # the checkpoint that was written or loaded last
        self._lock: Lock | None = None

    def was_requeued(self) -> bool:
        """Return whether this very Slurm job began the run, did not end it, and was queued again."""
        job = os.environ.get("SLURM_JOB_ID")
        environment = read_json(self.path / "environment.json") or {}
        ended = (self.path / "summary.json").exists()
        return job is not None and environment.get("slurm_job_id") == job and not ended

    @contextmanager
    def claim(self, anew: bool = False) -> Iterator[None]:
        """Own the folder, alone, until the block ends; ``anew`` renames an existing one to ``<id>~1`` first.

        Raises UsageError if the folder cannot be written, and Elsewhere if another process owns it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path / "lock")
        except OSError as error:
            raise UsageError(
                f"the results folder cannot be written: {error.strerror} ({error.filename}); set paths.results=DIR"
            ) from None
        if anew and any(entry.name != "lock" for entry in self.path.iterdir()):
            self._set_aside()
            self._lock.release()
            self.path.mkdir(exist_ok=True)
            self._lock = Lock(self.path / "lock")
        for name in (*CHECKPOINTS, *RECORD):
            for half in self.path.glob(f".{name}.*"):  # of a process that was killed while it wrote
                half.unlink()
        try:
            yield
        finally:
            self._lock.release()

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

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Let a block write. Raises Failed if the folder has been removed or taken over, before it or meanwhile."""
        self._check_owned()
        try:
            yield
        except OSError:
            self._check_owned()
            raise

    def _check_owned(self) -> None:
        if self._lock is None or not self._lock.held():
            raise Failed(
                f"run {self.id} has lost its folder {self.path}, which was removed, or taken over by another process; "
                "the same command goes on from what is there"
            )

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Write ``state`` over the checkpoint that was neither written nor loaded last.

        Raises Failed where the folder is not owned any more.
        """
        import torch

        a, b = (self.path / name for name in CHECKPOINTS)
        path = b if self._latest == a else a
        with self.owned():
            write_atomically(path, lambda file: torch.save({"id": self.id, **state}, file))
        self._latest = path

    def load_checkpoint(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Return the checkpoint that got furthest, by what it holds, or None if there is none.

        A damaged one is named through ``say``, and the other one is taken. Raises UsageError if neither can be read,
        or if one belongs to another run.
        """
        paths = [path for path in (self.path / name for name in CHECKPOINTS) if path.exists()]
        furthest, latest = None, (-1, 0, 0.0)
        for path in paths:
            try:
                state = _read_checkpoint(path)
                owner, reached = state["id"], (state["epoch"], state["step"], state["elapsed"])
            except Exception as error:  # torch.load raises many kinds on damaged files
                if is_of_memory(error):
                    raise
                say(f"{path} is damaged ({reason_of(error)}) and is left out")
                continue
            if owner != self.id:
                raise UsageError(f"{path} belongs to run {owner}, not to {self.id}; remove it, or set force=true")
            if reached > latest:
                furthest, latest, self._latest = state, reached, path
        if paths and furthest is None:
            raise UsageError(f"no checkpoint in {self.path} can be read; force=true starts again and keeps this folder")
        return furthest

    def remove_checkpoints(self) -> None:
        for name in CHECKPOINTS:
            (self.path / name).unlink(missing_ok=True)


class Writing:
    """A thread that works out and writes what it is handed, one piece after the other, while training goes on.

    What a piece raises, the next `put` or `wait` raises. Leaving the block waits for the last one.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "writing")
        self._last: Future[None] | None = None

    def put(self, write: Callable[[], None]) -> None:
        """Wait for what was put before, and have something written beside what comes."""
        self.wait()
        self._last = self._thread.submit(write)

    def wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds. Raises BadZipFile for a flipped bit: torch.load compares no checksum."""
    import torch

    with zipfile.ZipFile(path) as archive:
        if (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{name} does not match its checksum")
    return torch.load(path, map_location="cpu", weights_only=True)


class Lock:
    """One process a run folder.

    The kernel's lock on the file keeps processes of one host apart and falls with its owner. What the file
    says keeps hosts apart that do not share kernel locks: host, pid and a heartbeat (the file's time). Another
    host's lock lapses after ``LAPSE`` seconds of silence, and at once for the same Slurm job, which was requeued.
    The silence after a heartbeat that is dated further ahead than that, by a clock that was wrong, counts from when
    it is first seen.

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
        self._mine = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        }
        self._file.write(json.dumps(self._mine))
        self._file.flush()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def held(self) -> bool:
        """Return whether the file is still there, and says that this process owns it."""
        return _same_file(self._path, self._file) and _parse(self._file) == self._mine

    def release(self) -> None:
        self._stop.set()
        self._heart.join()
        if self.held():
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
        silent = now - os.fstat(self._file.fileno()).st_mtime
        if silent < -LAPSE:
            os.utime(self._file.fileno())  # an owner who lives will date it ahead again
        return silent > LAPSE

    def _running(self, owner: Mapping[str, Any] | None) -> str:
        who = f" (host {owner['host']}, process {owner['pid']})" if owner else ""
        return f"run {self._path.parent.name} is running elsewhere{who}; wait for it, or stop it first"

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(OSError):  # a disk that is away for a moment
                os.utime(self._file.fileno())


def _same_file(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _who(file: IO[str]) -> dict[str, Any] | None:
    """Return the owner of a locked file, who may need a moment to write its name over that of one who has ended."""
    for _ in range(20):
        if (owner := _parse(file)) is not None and (owner["host"] != socket.gethostname() or _lives(owner["pid"])):
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


def owner_alive(folder: Folder) -> bool:
    """Return whether a process seems to be running in ``folder``, without touching its lock.

    A heartbeat that is dated further ahead than ``LAPSE`` tells nothing, and counts for none.
    """
    if isinstance(folder, Packed) or (owner := read_json(folder / "lock")) is None:
        return False
    if owner.get("host") != socket.gethostname():
        return abs(time.time() - (folder / "lock").stat().st_mtime) <= LAPSE
    return _lives(owner.get("pid"))


def _lives(pid: Any) -> bool:
    """Return whether there is a process of that number on this host; a damaged lock may have anything in its place."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
