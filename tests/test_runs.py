"""A run on disk: whole files or none, checkpoints that alternate, one process a folder."""

import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from alignprune_exp import runs
from alignprune_exp.errors import UsageError
from alignprune_exp.runs import (
    CHECKPOINTS,
    LAPSE,
    RunFolder,
    owner_alive,
    run_id,
    write_atomically,
    write_json,
    write_text,
)

OWNER = """
import sys, time
from pathlib import Path
from alignprune_exp.runs import RunFolder
with RunFolder(Path(sys.argv[1]), "run").claim():
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, "run")


@pytest.fixture
def owner(tmp_path):
    """Another process that owns the folder ``run`` until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


def foreign_lock(folder, silent=0.0, **owner):
    """Leave the lock of another host in the folder, its last heartbeat ``silent`` seconds ago."""
    folder.path.mkdir(parents=True)
    path = folder.path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "slurm_job_id": None, **owner}))
    then = time.time() - silent
    os.utime(path, (then, then))
    return path


def claim(folder, **arguments):
    """Own the folder for a moment; return the lock's text meanwhile."""
    with folder.claim(**arguments):
        return (folder.path / "lock").read_text()


# Identity


def test_an_id_does_not_depend_on_the_order_of_keys():
    assert run_id({"a": 1, "b": {"c": 2.0, "d": None}}) == run_id({"b": {"d": None, "c": 2.0}, "a": 1})
    assert run_id({"a": 1}) != run_id({"a": 2})
    assert run_id({"a": 1}) != run_id({"b": 1})


# Locks


def test_a_second_process_is_refused_while_the_first_lives(folder, owner):
    before = (folder.path / "lock").read_text()
    for anew in (False, True):
        with pytest.raises(UsageError, match=f"running elsewhere.*{owner.pid}"):
            claim(folder, anew=anew)
    assert (folder.path / "lock").read_text() == before
    assert [path.name for path in folder.path.parent.iterdir()] == ["run"]
    owner.communicate("")
    assert owner.returncode == 0
    claim(folder)


def test_the_lock_of_a_killed_process_does_not_block(folder, owner):
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert json.loads((folder.path / "lock").read_text())["pid"] == owner.pid
    assert json.loads(claim(folder))["pid"] == os.getpid()


def test_a_lock_that_still_names_one_who_has_ended_is_read_again(folder):
    """Between taking a dead process's lock and writing its own name, the new owner goes by the old one's."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with folder.claim():
        lock = folder.path / "lock"
        mine = lock.read_text()
        lock.write_text(json.dumps(json.loads(mine) | {"pid": ended.pid}))
        later = threading.Timer(0.2, lock.write_text, [mine])
        later.start()
        with pytest.raises(UsageError, match=f"process {os.getpid()}\\)"):
            claim(folder)
        later.join()


def test_a_claim_is_exclusive_within_a_process_too_and_ends_with_its_block(folder):
    with folder.claim(), pytest.raises(UsageError, match="running elsewhere"):
        claim(folder)
    assert not (folder.path / "lock").exists()
    with pytest.raises(RuntimeError, match="broken"), folder.claim():
        raise RuntimeError("broken")
    mine = json.loads(claim(folder))
    assert (mine["host"], mine["pid"]) == (socket.gethostname(), os.getpid())


@pytest.mark.parametrize("silent", [0, LAPSE - 20])
def test_the_lock_of_another_host_refuses_while_it_is_fresh(folder, silent):
    path = foreign_lock(folder, silent)
    before = path.read_text(), path.stat().st_mtime_ns
    for anew in (False, True):
        with pytest.raises(UsageError, match="elsewhere"):
            claim(folder, anew=anew)
    assert (path.read_text(), path.stat().st_mtime_ns) == before
    assert [entry.name for entry in folder.path.iterdir()] == ["lock"]


def test_the_lock_of_another_host_lapses_after_five_silent_minutes(folder):
    assert LAPSE == 300
    foreign_lock(folder, silent=LAPSE + 1)
    assert json.loads(claim(folder))["host"] == socket.gethostname()


def test_a_lock_that_a_wrong_clock_dated_ahead_lapses_after_five_minutes_from_when_it_is_seen(folder):
    path = foreign_lock(folder, silent=-86400)
    assert not owner_alive(folder.path)
    with pytest.raises(UsageError, match="elsewhere"):
        claim(folder)
    seen = path.stat().st_mtime
    assert abs(seen - time.time()) < 60
    os.utime(path, (seen - LAPSE + 20,) * 2)  # time passes
    with pytest.raises(UsageError, match="elsewhere"):
        claim(folder)
    os.utime(path, (seen - LAPSE - 1,) * 2)
    assert json.loads(claim(folder))["host"] == socket.gethostname()


def test_an_owner_whose_clock_is_ahead_keeps_its_lock_for_as_long_as_it_beats(folder):
    path = foreign_lock(folder)
    for _ in range(3):
        os.utime(path, (time.time() + 86400,) * 2)
        with pytest.raises(UsageError, match="elsewhere"):
            claim(folder)


def test_a_requeued_slurm_job_takes_over_its_own_lock_at_once(folder, monkeypatch):
    foreign_lock(folder, slurm_job_id="4711")
    with pytest.raises(UsageError):
        claim(folder)
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    with pytest.raises(UsageError):
        claim(folder)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert json.loads(claim(folder))["slurm_job_id"] == "4711"


def test_a_job_outside_slurm_does_not_match_another_outside_slurm(folder, monkeypatch):
    foreign_lock(folder, slurm_job_id=None)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with pytest.raises(UsageError):
        claim(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "elsewhere"}'])
def test_a_lock_that_cannot_be_read_and_that_nobody_holds_does_not_block(folder, text):
    foreign_lock(folder).write_text(text)
    claim(folder)


def test_an_owner_shows_that_it_lives(folder, monkeypatch):
    monkeypatch.setattr(runs, "HEARTBEAT", 0.02)
    with folder.claim():
        path = folder.path / "lock"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_claiming_anew_sets_the_old_folder_aside(folder):
    claim(folder, anew=True)
    assert not folder.path.with_name("run~1").exists()  # there was nothing to keep
    for number in (1, 2):
        (folder.path / "summary.json").write_text(str(number))
        claim(folder, anew=True)
    assert (folder.path.with_name("run~1") / "summary.json").read_text() == "1"
    assert (folder.path.with_name("run~2") / "summary.json").read_text() == "2"
    assert list(folder.path.iterdir()) == []


def test_a_results_folder_that_cannot_be_written_is_a_mistake(tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(UsageError, match=r"paths\.results"):
        claim(RunFolder(tmp_path / "results", "run"))


# Whole files


def torn(file):
    file.write(b"half of ")
    raise RuntimeError("the writer gave up")


@pytest.mark.parametrize("old", [None, "old"])
def test_a_writer_that_raises_leaves_no_half_file(tmp_path, old):
    path = tmp_path / "file"
    if old:
        path.write_text(old)
    with pytest.raises(RuntimeError, match="gave up"):
        write_atomically(path, torn)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({"file": old} if old else {})


@pytest.mark.parametrize("old", [None, "old"])
def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, old):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    if old:
        path.write_text(old)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({"file": old} if old else {})


def test_what_the_disk_refuses_is_said_even_where_torch_covers_it(tmp_path):
    path = tmp_path / "state.pt"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (10, 5000, 300_000, 600_000):  # where a file ends, and torch.save raises OSError or RuntimeError
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as refused:
                write_atomically(path, lambda file: torch.save([torch.randn(150_000)], file))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert refused.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_made_the_file_that_was_asked_for_is_named(tmp_path):
    (tmp_path / "no folder").write_text("")
    path = tmp_path / "no folder" / "file"
    with pytest.raises(NotADirectoryError) as refused:
        write_text(path, "new")
    assert refused.value.filename == str(path)


def test_an_error_that_the_disk_has_no_part_in_stays_what_it_is(tmp_path):
    try:
        raise FileNotFoundError(errno.ENOENT, "another file")
    except FileNotFoundError:
        with pytest.raises(RuntimeError, match="gave up"):
            write_atomically(tmp_path / "file", torn)


def test_json_without_a_meaning_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "summary.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


# Checkpoints


def state(epoch, step=0, elapsed=0.0, **more):
    return {"epoch": epoch, "step": step, "elapsed": elapsed, **more}


def saved(folder, number):
    folder.save_checkpoint(state(number, weights=torch.full((4,), float(number))))


def on_disk(folder):
    return {name: torch.load(folder.path / name, weights_only=True)["epoch"] for name in CHECKPOINTS}


def test_checkpoints_alternate_and_the_newest_is_loaded(folder):
    said = []
    with folder.claim():
        assert folder.load_checkpoint(said.append) is None
        saved(folder, 0)
        assert folder.load_checkpoint(said.append)["epoch"] == 0
        before = None
        for number in range(1, 6):
            saved(folder, number)
            now = on_disk(folder)
            assert sorted(now.values()) == [number - 1, number]
            if before:
                assert sum(now[name] != before[name] for name in CHECKPOINTS) == 1
            before = now
            loaded = folder.load_checkpoint(said.append)
            assert loaded["epoch"] == number
            assert torch.equal(loaded["weights"], torch.full((4,), float(number)))
        folder.remove_checkpoints()
        assert folder.load_checkpoint(said.append) is None
    assert said == []


def test_checkpoints_saved_within_one_tick_of_the_clock_still_keep_the_last_two(folder):
    with folder.claim():
        for number in range(40):
            folder.save_checkpoint(state(number))
            assert folder.load_checkpoint(pytest.fail)["epoch"] == number
            if number:
                assert sorted(on_disk(folder).values()) == [number - 1, number]


@pytest.mark.parametrize("damage", ["half", "empty", "garbage", "not a state"])
def test_a_damaged_checkpoint_falls_back_with_a_message_and_both_are_a_mistake(folder, damage):
    def spoil(name):
        path = folder.path / name
        content = path.read_bytes()
        if damage == "not a state":
            torch.save([1, 2], path)
        else:
            path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "garbage": b"\0" * 999}[damage])

    said = []
    with folder.claim():
        saved(folder, 0)
        saved(folder, 1)
        newest = max(on_disk(folder).items(), key=lambda item: item[1])[0]
        spoil(newest)
        assert folder.load_checkpoint(said.append)["epoch"] == 0
        assert len(said) == 1
        assert newest in said[0]
        assert "\n" not in said[0]
        spoil(next(name for name in CHECKPOINTS if name != newest))
        with pytest.raises(UsageError, match="force=true"):
            folder.load_checkpoint(said.append)


def test_no_flipped_bit_of_a_checkpoint_is_taken_for_what_was_written(folder, tmp_path):
    with folder.claim():
        saved(folder, 0)
        saved(folder, 7)
        name = max(on_disk(folder).items(), key=lambda item: item[1])[0]
        path = folder.path / name
        content = path.read_bytes()
        rng, unharmed = random.Random(0), 0
        for bit in rng.sample(range(8 * len(content)), 300):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            said = []
            loaded = folder.load_checkpoint(said.append)
            unharmed += not said  # the bit was one of the padding
            expected = 0 if said else 7
            assert loaded == state(expected, id="run", weights=loaded["weights"])
            assert torch.equal(loaded["weights"], torch.full((4,), float(expected)))
    assert unharmed < 250


@pytest.mark.parametrize("later", [state(4), state(3, 5, 0.1), state(3, 2, 0.2)], ids=["epoch", "step", "seconds"])
@pytest.mark.parametrize("first", [True, False])
def test_the_checkpoint_that_got_furthest_is_loaded_and_the_other_written_over_whatever_the_clock_says(
    folder, later, first
):
    earlier = state(3, 2, 0.1)
    with folder.claim():
        for one in (later, earlier) if first else (earlier, later):
            folder.save_checkpoint(one)
        for name in CHECKPOINTS:
            loaded = torch.load(folder.path / name, weights_only=True)
            os.utime(folder.path / name, (10, 10) if loaded["epoch"] == later["epoch"] else (99, 99))
    again = RunFolder(folder.path.parents[1], "run")
    with again.claim():
        assert again.load_checkpoint(pytest.fail) == {"id": "run", **later}
        again.save_checkpoint(state(9))
        left = [torch.load(folder.path / name, weights_only=True) for name in CHECKPOINTS]
        assert {"id": "run", **later} in left
        assert {"id": "run", **state(9)} in left


def test_a_checkpoint_of_another_run_is_refused(folder, tmp_path):
    with folder.claim():
        saved(folder, 0)
    other = RunFolder(tmp_path, "other")
    folder.path.rename(other.path)
    with other.claim(), pytest.raises(UsageError, match="belongs to run run"):
        other.load_checkpoint(pytest.fail)


def test_a_full_disk_keeps_both_checkpoints(folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with folder.claim():
        saved(folder, 0)
        saved(folder, 1)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            folder.save_checkpoint(state(2))
        assert sorted(on_disk(folder).values()) == [0, 1]
    assert {p.name for p in folder.path.iterdir()} == set(CHECKPOINTS)


def test_nothing_in_a_checkpoint_needs_unsafe_loading(folder):
    with folder.claim():
        folder.save_checkpoint(state(0, weights=torch.ones(2), nested={"step": 1}))
        (path,) = (folder.path / name for name in CHECKPOINTS if (folder.path / name).exists())
        assert torch.load(path, weights_only=True)["id"] == "run"


# Requeued jobs


@pytest.mark.parametrize(
    ("began", "now", "ended", "expected"),
    [("7", "7", False, True), ("7", "7", True, False), ("6", "7", False, False), (None, None, False, False)],
)
def test_a_requeued_job_goes_on_with_what_it_began_even_under_force(folder, monkeypatch, began, now, ended, expected):
    folder.path.mkdir(parents=True)
    write_json(folder.path / "environment.json", {"slurm_job_id": began})
    if ended:
        write_json(folder.path / "summary.json", {"status": "finished"})
    if now is not None:
        monkeypatch.setenv("SLURM_JOB_ID", now)
    assert folder.was_requeued() is expected


def test_a_job_that_never_began_was_not_requeued(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not folder.was_requeued()
