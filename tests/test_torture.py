"""The kill matrix: what it counts, and that a few of its rounds lose nothing."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import torture


class Told(torture.Victim):
    """A victim whose processes end as told, by status and words."""

    def __init__(self, *ends, left="bits"):
        super().__init__(Path("nowhere"), random.Random(0))
        self.ends, self.left = list(ends), left

    def begin(self, *more, largest=0):
        status, said = self.ends.pop(0)
        reads, writes = os.pipe()
        shell = ["sh", "-c", f"printf '{said}' >&2; exit {status}"]
        pid = os.posix_spawn("/bin/sh", shell, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writes, 2)])
        os.close(writes)
        return pid, reads

    def bits(self):
        return self.left


REFUSED = (2, "no checkpoint can be read; force=true starts again")


@pytest.mark.parametrize(
    ("victim", "outcome"),
    [
        (Told((0, "")), "same bits"),
        (Told((0, ""), left="others"), "LOST"),
        (Told((1, "it failed")), "LOST"),
        (Told((0, "one\ntwo")), "LOST"),
        (Told((2, "a mistake")), "LOST"),
        (Told(REFUSED, (0, "")), "refused"),
        (Told(REFUSED, (2, "")), "LOST"),
        (Told(REFUSED, (0, ""), left="others"), "LOST"),
    ],
)
def test_only_the_same_bits_or_one_sentence_that_names_force_are_no_loss(monkeypatch, victim, outcome):
    monkeypatch.setattr(torture, "INJURIES", {"none": lambda victim: True})
    assert torture.torture(victim, "none", "bits") == (True, outcome)


@pytest.mark.slow
def test_a_few_rounds_lose_nothing():
    line = [sys.executable, torture.__file__, "--rounds", "8", "--seed", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()[-len(torture.INJURIES) :]]
    assert [name for name, *_ in table] == [*torture.INJURIES]
    counts = [[int(count) for count in row] for _, *row in table]
    assert sum(hurt for hurt, *_ in counts) >= 4
    assert all(hurt == same + refused and lost == 0 for hurt, same, refused, lost in counts)
