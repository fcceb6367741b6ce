"""Hurt a small run again and again, let the same command go on, and compare what it leaves with an undisturbed run.

python scripts/torture.py --rounds 20 --seed 0

Prints how many runs of each kind of injury were hurt, came to the same bits, were refused in one sentence that names
force=true (and then came to them), or were lost: ended otherwise. The exit status is 1 where one was lost.
"""

import argparse
import json
import os
import random
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from alignprune_exp import commandline, run  # noqa: F401  what a run needs, once for all that are forked
from alignprune_exp.console import Progress
from alignprune_exp.errors import Stopped
from alignprune_exp.runs import CHECKPOINTS, RECORD

LINE = ("threads=1", "score.window=3", "epochs=12", "dataset.subset=300", "dataset.test_subset=100", "batch_size=16")
LINE += ("checkpoint_seconds=0",)
KILLED = -signal.SIGKILL


class Victim:
    """A run in ``results``, hurt as ``rng`` has it, which takes that many ``seconds`` undisturbed."""

    def __init__(self, results: Path, rng: random.Random, seconds: float = 0.0) -> None:
        self.results, self.rng, self.seconds = results, rng, seconds

    def files(self, *names: str) -> list[Path]:
        return [path for name in names for path in self.results.glob(f"runs/{'[0-9a-f]' * 12}/{name}")]

    def begin(self, *more: str, largest: int = resource.RLIM_INFINITY) -> tuple[int, int]:
        """Start the command in a process whose files take ``largest`` bytes at the most; return it and its stderr."""
        reads, writes = os.pipe()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        if pid := os.fork():
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(writes)
            return pid, reads
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(writes, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            sys.argv[1:] = [*LINE, f"paths.results={self.results}", *more]
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            runpy.run_module("alignprune_exp.train", run_name="__main__")
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        except KeyboardInterrupt:  # before its first line, or after its last
            os._exit(Stopped.status)
        finally:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)

    def end(self, process: tuple[int, int], *expected: int) -> tuple[int, str]:
        """Wait for a process, which may say one sentence; return its status and that."""
        with open(process[1]) as stderr:
            said = stderr.read()
        status = os.waitstatus_to_exitcode(os.waitpid(process[0], 0)[1])
        if status not in expected or len(said.splitlines()) > 1 or "Traceback" in said:
            raise AssertionError(f"status {status}: {said}")
        return status, said

    def signalled(self, number: int = signal.SIGKILL) -> bool:
        process = self.begin()
        time.sleep(self.rng.uniform(0, self.seconds))
        os.kill(process[0], number)
        return self.end(process, 0, 2, KILLED if number == signal.SIGKILL else Stopped.status)[0] not in (0, 2)

    def with_a_full_disk(self) -> bool:
        largest = self.rng.randrange(100_000)  # a little more than a checkpoint
        return self.end(self.begin(largest=largest), 0, 1, 2)[0] == 1

    def with_flipped_bits(self) -> bool:
        self.signalled()
        checkpoints = self.files(*CHECKPOINTS)
        for path in self.rng.sample(checkpoints, min(len(checkpoints), self.rng.choice((1, 1, 1, 2)))):
            content = bytearray(path.read_bytes())
            for _ in range(self.rng.choice((1, 1, 20))):
                content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(content)
        return bool(checkpoints)

    def with_the_clock_set_back(self) -> bool:
        self.signalled()
        for path in (files := self.files(*CHECKPOINTS, *RECORD, "lock")):
            os.utime(path, (self.rng.uniform(0, 2e9),) * 2)
        return bool(files)

    def with_a_damaged_record(self, status: int = KILLED) -> bool:
        """Delete or write over parts of the record of a killed run; with a ``status`` of 0 of one that goes on."""
        process, rows = self.begin(), self.rng.randint(1, 8)
        while not any(path.read_bytes().count(b"\n") >= rows for path in self.files("metrics.jsonl")):
            time.sleep(0.002)
        if status == KILLED:
            os.kill(process[0], signal.SIGKILL)
        for path in self.files("metrics.jsonl", "dynamics.parquet", "config.yaml", "environment.json"):
            place, wrong = self.rng.random(), self.rng.choice((b"[1]\n", b"\xff\0", b""))
            content = path.read_bytes()
            before, after = content[: int(place * len(content))], content[int(place * len(content)) + 4 :]
            path.unlink() if place < 0.3 else path.write_bytes(before + wrong + after * self.rng.randint(0, 1))
        return self.end(process, status)[0] == status

    def bits(self) -> tuple[list[str], list[object], bytes]:
        """Return the names in the finished run's record, its metrics without seconds, and its samples."""
        (folder,) = (path.parent for path in self.files("summary.json"))
        rows = [json.loads(line).items() for line in (folder / "metrics.jsonl").read_text().splitlines()]
        metrics = [{key: value for key, value in row if not key.startswith("seconds")} for row in rows]
        names = sorted({*os.listdir(folder)} - {*CHECKPOINTS, "lock"})  # which a kill right after the end leaves
        return names, metrics, (folder / "samples.parquet").read_bytes()


INJURIES = {
    "SIGKILL": Victim.signalled,
    "SIGTERM": lambda victim: victim.signalled(signal.SIGTERM),
    "SIGINT": lambda victim: victim.signalled(signal.SIGINT),
    "disk full": Victim.with_a_full_disk,
    "bits flipped": Victim.with_flipped_bits,
    "clock set back": Victim.with_the_clock_set_back,
    "record damaged": Victim.with_a_damaged_record,
    "... as it runs": lambda victim: victim.with_a_damaged_record(status=0),
}


def torture(victim: Victim, kind: str, wanted: object) -> tuple[bool, str]:
    """Hurt a run up to three times and let it go on; return whether that hit it, and how it ended."""
    hurts = [False]
    try:
        for _ in range(victim.rng.randint(1, 3)):
            hurts += [INJURIES[kind](victim)] if not victim.files("summary.json") else []
        status, said = victim.end(victim.begin(), 0, 2)
        if status == 2:
            assert "force=true" in said, said
            victim.end(victim.begin("force=true"), 0)
        assert victim.bits() == wanted, "other bits"
    except AssertionError as lost:
        print(f"{kind}: {lost}", flush=True)
        return True, "LOST"
    return any(hurts), "refused" if status == 2 else "same bits"


def script() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    counts, progress = Counter[tuple[str, str]](), Progress()
    with tempfile.TemporaryDirectory() as place:
        undisturbed, began = Victim(Path(place, "undisturbed"), random.Random()), time.monotonic()
        undisturbed.end(undisturbed.begin(), 0)
        seconds, wanted = time.monotonic() - began, undisturbed.bits()
        for number in range(asked.rounds):
            progress.show(f"round {number} of {asked.rounds}")
            kind, rng = [*INJURIES][number % len(INJURIES)], random.Random(f"{asked.seed} {number}")
            hit, outcome = torture(Victim(Path(place, str(number)), rng, seconds), kind, wanted)
            counts.update({(kind, "hurt"): hit, (kind, outcome): hit})
    for kind in ("", *INJURIES):
        columns = ("hurt", "same bits", "refused", "LOST")
        print(f"{kind:<15}" + "".join(f"{counts[kind, name] if kind else name:>11}" for name in columns))
    return int(any(counts[kind, "LOST"] for kind in INJURIES))


if __name__ == "__main__":
    sys.exit(script())
