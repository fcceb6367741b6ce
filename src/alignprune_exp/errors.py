"""How a run can end other than well, each with one sentence for the user; never a traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GOES_ON = "the same command goes on from the latest checkpoint"
AGAIN = "type the same command again"
STOPPED_AT_ONCE = f"stopped at once; {GOES_ON}, if there is one"
_FIRST = {  # what to do about a system's error before that
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENOMEM: "free some memory",
}
_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


class UsageError(Exception):
    """A mistake that the user can mend.

    Its message is one sentence, on one line: what is wrong, where, and what to type instead. The command line prints
    it and exits with ``status``.
    """

    status = 2

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence))


class Elsewhere(UsageError):
    """Another process has the run. A sweep counts it as running and goes on; alone, it exits with ``status``."""

    status = 3


class Ended(Exception):
    """A run ended early.

    Attributes:
        status: the exit status.
        speaks: whether to say so even in a process that leaves talking to another one of its run.
    """

    status: int
    speaks = False


class Failed(Ended):
    """The run cannot go on; its record says why."""

    status = 1


class Stopped(Ended):
    """The run was asked to stop and left a checkpoint; the same command goes on."""

    status = 130


def of_the_machine(error: OSError | MemoryError | RuntimeError, then: str = GOES_ON) -> str | None:
    """Return what to say of an error that is the machine's and no bug: its disk, or its memory; else None.

    ``then`` says what becomes of the work once it is mended.
    """
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        first = _FIRST.get(error.errno or 0, "mend that")
        return f"{error.strerror or error}{where}; {first}, and {then}"
    if "DataLoader worker" in str(error):
        return f"a process that reads images died, as where memory runs out; set fewer workers, and {then}"
    if not is_of_memory(error):
        return None
    whose = "the GPU has" if "CUDA" in str(error) else "this machine has"
    amount = re.search(r"allocate ([\d.]+ \w+)", str(error))
    smaller = ", or set a smaller batch_size, which is another run" if then == GOES_ON else ""
    return f"{whose} too little free memory{f' for {amount[1]} more' if amount else ''}; free some, and {then}{smaller}"


def is_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory has run out, as Python, NumPy, PyTorch and CUDA do."""
    of_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_MEMORY)
    return of_torch or isinstance(error, MemoryError)


def reason_of(error: BaseException) -> str:
    """Return the first line of what an error says, or what kind it is where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def answering(answer: Callable[[int, FrameType | None], object], *numbers: int) -> Iterator[None]:
    """Answer some signals in the block; afterwards they are answered as before."""
    before = {number: signal.signal(number, answer) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM interrupt as SIGINT does, where nothing else answers it; a run that trains stops after a step."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) == signal.default_int_handler:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def refuse_load(key: str, asked: int) -> None:
    """Raise UsageError for so many threads or processes that they would only hold this machine up."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = max(32, 8 * processors)
    if asked > most:
        raise UsageError(f"{key}={asked} is far beyond this machine's {processors} processors; use at most {most}")
