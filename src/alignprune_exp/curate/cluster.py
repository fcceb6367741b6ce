"""A Ray cluster that scores: a task a part, each by a DuckDB of its own, on storage that all nodes see.

Ray runs a task again whose worker or node dies; what a task leaves is whole or not there, so that nothing is twice.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from glob import escape
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from uuid import uuid4

import duckdb
import ray
from ray.exceptions import RayError, RaySystemError, RayTaskError

from .. import __version__
from ..console import one_line, say
from ..errors import Failed, UsageError
from .engine import Engine
from .inspect import first_line, stamps
from .layout import Part

R = TypeVar("R")

AGAIN = 3  # times that a part whose worker or node died is tried again
AHEAD = 1000  # parts that Ray has before it at least, so that a cluster can grow
PATIENCE = 30  # seconds in which a cluster has to answer
LOOKS = 16  # files that a worker looks at at a time
SHARE = 0.8  # of a worker's memory that its DuckDB may use
STORE = 10**8  # bytes in which the workers of a local cluster leave what they return
ALIKE = "install the same alignprune-exp[ray] on every node"
VERSIONS = {"alignprune-exp": __version__, "duckdb": duckdb.__version__}  # on which the bits depend


class Cluster:
    """The workers of a cluster, of so many threads and so much memory each; as many at a time as Ray finds room for.

    Attributes:
        memory: the bytes that the DuckDB of each may use.

    Raises UsageError where no node has room for one.
    """

    def __init__(self, sign: Path, memory: int | None, threads: int) -> None:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = [(node.get("CPU", 0), node.get("memory", 0)) for node in nodes]
        needed = 1 if memory is None else int(memory / SHARE)
        fit = [(cpus, there) for cpus, there in room if cpus >= threads and there >= needed]
        if not fit:
            what = f"{threads} processors" + ("" if memory is None else f" and {needed / 1e9:.3g} GB")
            has = "; ".join(f"{cpus:g} and {there / 1e9:.3g} GB" for cpus, there in room)
            raise UsageError(f"no node of the cluster has {what} for a worker, but {has}; set --threads and --memory")
        share = int(threads * min(there / cpus for cpus, there in fit)) if memory is None else needed
        self.memory = memory or int(SHARE * share)
        self._task = ray.remote(num_cpus=threads, memory=share, max_retries=AGAIN)(_do)
        self._given = (sign, VERSIONS, self.memory, threads)
        self._ahead = max(AHEAD, sum(2 * int(cpus // threads) for cpus, _ in fit))
        self._pending: dict[Any, Part] = {}

    def each(self, work: Callable[[Engine, Part], R], parts: Sequence[Part], alone: bool) -> Iterator[R]:
        """Yield what ``work`` returns for each part, as it is done; a worker has one at a time, and so is ``alone``.

        What an earlier call that raised has left is waited for, never cancelled: where a task ends as it is
        cancelled, Ray ends this process. Leaving the cluster ends all.

        Raises what ``work`` raises, UsageError where a node lacks a file or has other versions, and Failed where
        workers die again and again.
        """
        while self._pending:
            self._next()
        rest = iter(parts)
        while True:
            for part in islice(rest, self._ahead - len(self._pending)):
                self._pending[self._task.remote(*self._given, work, part)] = part
            if not self._pending:
                return
            yield _result(*self._next())

    def _next(self) -> tuple[Any, Part]:
        """Wait for a task; return it, and its part."""
        (done,), _ = ray.wait(list(self._pending))
        return done, self._pending.pop(done)


def _result(task: Any, part: Part) -> Any:
    try:
        return ray.get(task)
    except RayTaskError as error:
        if isinstance(error.cause, RaySystemError):  # it never came to `_do`, whose check would have said why
            what, where = first_line(error.cause).removeprefix("System error: "), re.search(r"ip=([^,)]+)", str(error))
            raise UsageError(f"node {where and where[1]} cannot run this ({what}); {ALIKE}") from None
        raise error.cause from error
    except RayError as error:
        raise Failed(
            f"workers died {AGAIN + 1} times at {part.name} ({one_line(str(error))[:200]}); a larger --memory puts "
            "fewer on a node, and the same command goes on from what is scored"
        ) from None


def _do(
    sign: Path,
    versions: dict[str, str],
    memory: int,
    threads: int,
    work: Callable[[Engine, Part], R],
    part: Part,
) -> R:
    """Do the work on a part in a worker, once it is sure that it sees what whoever asked for it sees."""
    node = f"node {socket.gethostname()} ({ray.util.get_node_ip_address()})"
    for package, version in versions.items():
        if VERSIONS[package] != version:
            raise UsageError(f"{node} has {package} {VERSIONS[package]}, not {version}; {ALIKE}")
    if not sign.exists():
        raise UsageError(f"{node} does not see {sign.parent.parent}; name a folder on storage that all nodes share")
    with TemporaryDirectory() as spill:
        engine = Engine(Path(spill), f"{memory}B", threads)
        for file, there in zip(part.files, _looked_at(engine, part, node), strict=True):
            if there != {file.path: file.stamp}:
                what = "has another" if there else "does not see"
                raise UsageError(f"{node} {what} {file.path}; put the losses on storage that all nodes share")
        return work(engine, part)


def _looked_at(engine: Engine, part: Part, node: str) -> list[dict[str, str]]:
    """Return the stamp of each file of a part, by path, as a node sees it; many at a time, as a store answers late."""
    try:
        with ThreadPoolExecutor(LOOKS) as pool:
            return list(pool.map(partial(stamps, engine), [escape(file.path) for file in part.files]))
    except UsageError as error:
        raise UsageError(f"{node}: {error}") from None


@contextmanager
def joined(address: str | None, work: Path, memory: int | None, threads: int | None) -> Iterator[Cluster]:
    """Lend the cluster at ``address`` or in RAY_ADDRESS, or a local one; ``work`` is a folder that all nodes see.

    Raises UsageError where it does not answer in time, or none of its nodes has room.
    """
    sign = work / f"seen-{uuid4().hex}"
    work.mkdir(parents=True, exist_ok=True)
    sign.touch()
    try:
        connect(address or os.environ.get("RAY_ADDRESS"))
        yield Cluster(sign, memory, threads or 1)
    finally:
        with _unheard():
            ray.shutdown()
        sign.unlink(missing_ok=True)


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep from standard error what Ray's threads say of tasks that end as it does."""
    sys.stderr.flush()
    heard, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(heard, 2)
        os.close(heard)
        os.close(nowhere)


def connect(address: str | None) -> None:
    """Connect to a cluster, or start one where there is no address. Raises UsageError where it does not answer."""
    answering = signal.getsignal(signal.SIGTERM)
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", include_dashboard=False, object_store_memory=STORE, **quiet)
        cpus = ray.cluster_resources()["CPU"]
        say(f"neither --ray-address nor RAY_ADDRESS names a cluster; one is started here, of {cpus:g} processors")
    else:
        _try(address)
        ray.init(address, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, answering)  # Ray sets its own


def _try(address: str) -> None:
    """Connect in another process, which can be ended: Ray itself tries for minutes, and may end its process."""
    line = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)", address]
    try:
        tried = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        reason = f"none answers in {PATIENCE} seconds"
    else:
        if tried.returncode == 0:
            return
        reason = tried.stderr.strip().rpartition("\n")[2].partition(". ")[0]
    raise UsageError(f"no Ray cluster at {address} ({reason}); ray start prints its HOST:PORT, and auto is this node's")
