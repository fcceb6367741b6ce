"""Work on all processors, which ends when it is told to."""

import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A process for each processor, all of which end at once when the block is stopped, or fails."""
    with ProcessPoolExecutor(initializer=_leave_interrupts_to_the_parent) as pool:
        try:
            yield pool
        except BaseException:
            for process in active_children():
                process.terminate()
            raise


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
