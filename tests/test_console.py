"""How every command ends: one sentence, and the exit status."""

import errno
import os
import subprocess
import sys

import pytest

from alignprune_exp.console import Parser, command
from alignprune_exp.errors import Elsewhere, Failed, Stopped, UsageError


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UsageError("give it\nanother name"), 2, r"give it\nanother name"),
        (Elsewhere("it runs"), 3, "it runs"),
        (Failed("it failed"), 1, "it failed"),
        (Stopped("it stopped"), 130, "it stopped"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/f"), 1, "device (/d/f); free some space, and type the"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/d"),
            1,
            "denied (/d); mend that, and type the",
        ),
        (MemoryError(), 1, "this machine has too little free memory; free some, and type the same command again"),
    ],
)
def test_what_does_not_end_well_is_one_sentence(error, status, sentence, capsys):
    assert command(raising(error)) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert sentence in err


def test_a_bug_is_no_sentence():
    for error in (RuntimeError("a bug"), ValueError("another"), AssertionError()):
        with pytest.raises(type(error)):
            command(raising(error))


def test_what_the_work_returns_is_the_status():
    assert [command(lambda status=status: status) for status in (None, 0, 3)] == [0, 0, 3]


def test_a_process_that_leaves_talking_to_the_first_waits_for_it(monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waited.append)
    assert command(raising(UsageError("a mistake"))) == 2
    assert (capsys.readouterr().err, waited) == ("", [5.0])


def test_a_reader_that_has_read_enough_sees_no_traceback():
    code = "from alignprune_exp.console import command; import sys\n"
    code += "def work():\n    for _ in range(10**6): print('a line')\nsys.exit(command(work))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == f"a line{os.linesep}".encode()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_parser_raises_its_mistakes():
    with pytest.raises(UsageError, match=r"--tpo.*; tool --help shows what there is"):
        Parser(prog="tool").parse_args(["--tpo"])
