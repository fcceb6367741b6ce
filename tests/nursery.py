"""Processes for tests to kill: this one has imported all that a run needs, and forks each command line."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from itertools import count
from tempfile import TemporaryDirectory

import torch

from alignprune_exp import optim, train

PATIENCE = 60  # seconds


class Nursery:
    """The other end: starts command lines, in processes that may make one run, and waits for them.

    Attributes:
        marks: a file with what the processes started last have done: "<" and ">" around writing a checkpoint, "." in
            a step.
        said: what each of them has printed as errors, once they have ended.
        printed: and what else.
    """

    def __init__(self, folder):
        self.folder, self.numbers = folder, count()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder / "marks")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.marks = folder / "marks"

    def start(self, *lines, together=False, pause=0.0, path=""):
        """Start command lines at once and return their pids.

        Args:
            lines: the arguments of each.
            together: whether they are the processes of one run, as torchrun starts them.
            pause: seconds that writing a checkpoint takes longer.
            path: a folder to import modules from.
        """
        self.marks.write_bytes(b"")
        self.logs = [self.folder / str(next(self.numbers)) for _ in lines]
        asked = {"lines": lines, "logs": list(map(str, self.logs)), "pause": pause, "path": str(path)}
        self.process.stdin.write(json.dumps(asked | {"together": together}).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def ended(self):
        """Wait for all that were started; return the exit status of each."""
        statuses = self._answer()
        self.printed, self.said = ([log.with_suffix(end).read_text() for log in self.logs] for end in (".out", ".err"))
        return statuses

    def run(self, *line, **more):
        """Run a command line to its end; return its exit status."""
        self.start(line, **more)
        (status,) = self.ended()
        return status

    def until(self, condition):
        """Wait for the marks to fulfil a condition."""
        deadline = time.monotonic() + PATIENCE
        while not condition(self.marks.read_bytes()):
            assert time.monotonic() < deadline, [log.with_suffix(".err").read_text() for log in self.logs]
            time.sleep(0.005)

    def close(self):
        """End it, by a word: whatever else was forked meanwhile may hold its standard input open."""
        self.process.stdin.write(b"null\n")
        self.process.stdin.close()
        self.process.wait(PATIENCE)

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, "the nursery died"
        return json.loads(line)


def work(marks):
    """Serve requests on stdin: answer each with the pids of its processes, and with their statuses when they ended."""
    with TemporaryDirectory() as results, redirect_stdout(io.StringIO()):  # imports all that a run needs
        line = ("threads=1", "epochs=5", "score.window=3", "dataset.subset=200")
        assert train.main([*line, f"paths.results={results}"]) == 0
    log, save, set_progress = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND), torch.save, optim.set_progress

    def slow_save(state, file):
        """Note where a checkpoint begins and ends, and take time over it."""
        buffer = io.BytesIO()
        save(state, buffer)
        half = len(buffer.getvalue()) // 2
        os.write(log, b"<")
        file.write(buffer.getvalue()[:half])
        file.flush()
        time.sleep(asked["pause"])
        file.write(buffer.getvalue()[half:])
        os.write(log, b">")

    def noted_progress(*arguments):
        os.write(log, b".")
        return set_progress(*arguments)

    torch.save, optim.set_progress, train.UNTIL_SAID = slow_save, noted_progress, 1.0
    for request in sys.stdin:
        if (asked := json.loads(request)) is None:
            break
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = [os.fork() or child(asked, rank, port) for rank in range(len(asked["lines"]))]
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]), flush=True)


def child(asked, rank, port):
    """Run a command line and end the process."""
    for descriptor, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(asked["logs"][rank] + end, os.O_WRONLY | os.O_CREAT), descriptor)
    if asked["path"]:
        sys.path.insert(0, asked["path"])
    if asked["together"]:
        size = len(asked["lines"])
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_RUN_ID="nursery")
    status = 1
    try:
        status = train.main(asked["lines"][rank])
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    work(sys.argv[1])
