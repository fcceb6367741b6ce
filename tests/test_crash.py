"""Runs and sweeps that are killed, started twice or interrupted end with the results of undisturbed ones.

As a script this file is a nursery: it has imported all that a run needs, and forks the processes that the tests kill.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignprune_exp.errors import UsageError
from hydra_plugins import alignprune_launchers

SMALL = ("threads=1", "score.window=3", "dataset.subset=300", "dataset.test_subset=100", "batch_size=16")
KILLS = 20
PAUSE = 0.1  # seconds in the middle of writing a checkpoint


def nursery(marks):
    """Run the command lines of each line on stdin at once; print their pids, then how they ended."""
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    from alignprune_exp import optim
    from alignprune_exp.train import main

    torch.use_deterministic_algorithms(True)  # imports much

    log = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    save, set_progress = torch.save, optim.set_progress

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

    torch.save, optim.set_progress = slow_save, noted_progress
    for line in sys.stdin:
        asked = json.loads(line)
        children = []
        for arguments in asked["lines"]:
            pid = os.fork()
            if pid == 0:
                try:
                    status = main(arguments)
                except SystemExit as ended:
                    status = ended.code
                sys.stdout.flush()
                os._exit(status)
            children.append(pid)
        print(json.dumps(children), file=sys.__stderr__, flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(statuses), file=sys.__stderr__, flush=True)


class Nursery:
    def __init__(self, folder):
        self.marks = folder / "marks"
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.marks)], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.PIPE
            )

    def start(self, *lines, pause=0.0):
        """Start command lines at once and return their pids; they take ``pause`` seconds more over a checkpoint."""
        self.marks.write_bytes(b"")
        self.process.stdin.write(json.dumps({"lines": lines, "pause": pause}).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def ended(self):
        """Return the exit status of each command line."""
        return self._answer()

    def run(self, *line):
        self.start(line)
        (status,) = self.ended()
        return status

    def _answer(self):
        self.said = []
        while line := self.process.stderr.readline().decode():
            try:
                answer = json.loads(line)
            except ValueError:
                self.said.append(line.strip())
            else:
                return answer
        raise AssertionError(f"the nursery died: {self.said}")

    def until(self, condition):
        deadline = time.monotonic() + 20
        while not condition(self.marks.read_bytes()):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)


@pytest.fixture(scope="module")
def nurse(tmp_path_factory):
    nurse = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nurse
    nurse.process.stdin.close()
    nurse.process.wait(60)


@pytest.fixture(scope="module")
def undisturbed(nurse, tmp_path_factory):
    """The results that command lines leave when nothing happens to them."""
    known = {}

    def results(*line):
        if line not in known:
            known[line] = tmp_path_factory.mktemp("undisturbed")
            assert nurse.run(*line, f"paths.results={known[line]}") == 0
        return known[line]

    return results


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def runs(results):
    folder = Path(results) / "runs"
    return {path.name: path for path in folder.iterdir()} if folder.exists() else {}


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in row.items() if not k.startswith("seconds")}) for row in rows]


def assert_same_results(results, others):
    assert runs(results).keys() == runs(others).keys()
    for name, folder in runs(results).items():
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert metrics(folder) == metrics(runs(others)[name])
        assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in runs(others)[name].iterdir())


def test_killed_at_twenty_random_moments_a_run_ends_as_an_undisturbed_one(tmp_path, nurse, undisturbed):
    line = [*SMALL, "epochs=40"]
    rng = random.Random(0)
    moments = ["at any time"] * 4 + ["after a step"] * 11 + ["in a checkpoint"] * 5
    rng.shuffle(moments)
    stepped = saving = 0
    for moment in moments:
        (pid,) = nurse.start([*line, f"paths.results={tmp_path}"], pause=PAUSE)
        if moment == "after a step":
            nurse.until(lambda marks: b"." in marks)
        elif moment == "in a checkpoint":
            nurse.until(lambda marks: b"<" in marks)
        time.sleep(rng.uniform(0, PAUSE / 2 if moment == "in a checkpoint" else 0.25))
        os.kill(pid, signal.SIGKILL)
        assert nurse.ended() == [-signal.SIGKILL], nurse.said
        marks = nurse.marks.read_bytes()
        stepped += b"." in marks
        saving += marks.count(b"<") > marks.count(b">")
    assert len(moments) == KILLS
    assert stepped >= 10
    assert saving >= 3
    assert nurse.run(*line, f"paths.results={tmp_path}") == 0, nurse.said
    assert_same_results(tmp_path, undisturbed(*line))


def test_of_two_processes_on_one_run_one_works_and_the_other_says_so(tmp_path, nurse, undisturbed):
    line = [*SMALL, "epochs=30"]
    rng = random.Random(1)
    for _ in range(4):  # whoever has the run is killed
        pids = nurse.start(*[[*line, f"paths.results={tmp_path}"]] * 2, pause=PAUSE)
        nurse.until(lambda marks, pids=pids: b"." in marks and any(map(has_ended, pids)))
        time.sleep(rng.uniform(0, 0.2))
        (folder,) = runs(tmp_path).values()
        owner = json.loads((folder / "lock").read_text())["pid"]
        os.kill(owner, signal.SIGKILL)
        statuses = dict(zip(pids, nurse.ended(), strict=True))
        assert statuses.pop(owner) == -signal.SIGKILL
        assert set(statuses.values()) == {3}
        assert f"is running elsewhere (host {os.uname().nodename}, process {owner})" in " ".join(nurse.said)
    nurse.start(*[[*line, f"paths.results={tmp_path}"]] * 2, pause=PAUSE)
    assert sorted(nurse.ended()) == [0, 3]
    assert_same_results(tmp_path, undisturbed(*line))


SWEEP = ("-m", *SMALL, "epochs=12", "seed=0,1,2")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL])
def test_a_sweep_interrupted_and_typed_again_ends_as_an_undisturbed_one(tmp_path, nurse, undisturbed, number):
    line = [*SWEEP, f"paths.results={tmp_path}"]
    (pid,) = nurse.start(line)
    nurse.until(lambda marks: marks.count(b"<") >= 16 and marks[-1:] == b".")  # some epochs into the second run
    os.kill(pid, number)
    (status,) = nurse.ended()
    assert status == (-number if number == signal.SIGKILL else 130)
    assert len(runs(tmp_path)) == 2
    if status == 130:
        assert "and left a checkpoint; the same command goes on from there" in nurse.said[-1]
        assert len(nurse.said) == 1
    assert nurse.run(*line) == 0
    assert "2 runs to do, 1 finished already" in nurse.log.read_text()
    assert_same_results(tmp_path, undisturbed(*SWEEP))


@contextmanager
def joblib_sweep(results, *overrides):
    """A sweep with two runs at a time, once both have done two epochs."""
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = subprocess.Popen(
        [sys.executable, "-m", "alignprune_exp.train", *SWEEP, *overrides, *launcher, f"paths.results={results}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while sum((f / "metrics.jsonl").exists() and len(metrics(f)) >= 2 for f in runs(results).values()) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_a_process_of_joblibs_that_dies_takes_its_own_run_with_it_and_no_other(tmp_path, nurse, undisturbed):
    line = ("epochs=30", "batch_size=8")
    with joblib_sweep(tmp_path, *line) as process:
        lost = next(f for f in runs(tmp_path).values() if "seed: 0" in (f / "config.yaml").read_text())
        os.kill(json.loads((lost / "lock").read_text())["pid"], signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    first, second = error.splitlines()
    assert first == "1 of 3 runs did not finish:"
    assert "seed=0" in second
    assert "its process was killed, or ran out of memory; the same command goes on" in second
    assert sum((folder / "summary.json").exists() for folder in runs(tmp_path).values()) == 2
    assert nurse.run(*SWEEP, *line, f"paths.results={tmp_path}") == 0
    assert_same_results(tmp_path, undisturbed(*SWEEP, *line))


@pytest.mark.slow
def test_a_joblib_sweep_that_is_interrupted_leaves_checkpoints_and_no_process(tmp_path, nurse, undisturbed):
    line = ("epochs=30", "batch_size=8")
    with joblib_sweep(tmp_path, *line) as process:
        owners = [json.loads((f / "lock").read_text())["pid"] for f in runs(tmp_path).values()]
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.count("and left a checkpoint") == 2
    assert error.splitlines()[-1] == "the sweep was stopped with 1 runs to do; the same command goes on"
    for pid in owners:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not any((folder / "lock").exists() for folder in runs(tmp_path).values())
    assert nurse.run(*SWEEP, *line, f"paths.results={tmp_path}") == 0
    assert_same_results(tmp_path, undisturbed(*SWEEP, *line))


def test_the_workers_of_a_joblib_sweep_that_is_killed_end_soon_and_their_runs_go_on(tmp_path, nurse, undisturbed):
    line = ("epochs=30", "batch_size=8")
    with joblib_sweep(tmp_path, *line) as process:
        owners = [json.loads((f / "lock").read_text())["pid"] for f in runs(tmp_path).values()]
        process.kill()
        deadline = time.monotonic() + 10
        while not all(map(has_ended, owners)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert len(owners) == 2
    assert not any((folder / "summary.json").exists() for folder in runs(tmp_path).values())
    assert nurse.run(*SWEEP, *line, f"paths.results={tmp_path}") == 0
    assert "resumed at epoch" in nurse.log.read_text()
    assert_same_results(tmp_path, undisturbed(*SWEEP, *line))


def test_joblibs_workers_are_started_by_one_thread_before_any_job_is_run(monkeypatch):
    events = []

    def noted(what):
        return lambda *_: events.append((what, threading.current_thread()))

    for name in ("start", "run", "close"):
        monkeypatch.setattr(alignprune_launchers._Worker, name, noted(name))
    alignprune_launchers.JoblibLauncher(2).launch_jobs(["a", "b", "c"])
    assert events[:2] == [("start", threading.main_thread())] * 2
    assert sorted(what for what, _ in events[2:]) == ["close", "close", "run", "run", "run"]


def test_more_runs_at_a_time_than_the_machine_bears_are_a_mistake(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(UsageError, match=r"hydra\.launcher\.n_jobs=33 is far beyond .* use at most 32"):
        alignprune_launchers.JoblibLauncher(33).launch_jobs(["a"])


@pytest.mark.parametrize("n_jobs", ["0", "two"])
def test_a_number_of_runs_that_is_none_is_a_mistake(tmp_path, nurse, n_jobs):
    line = [*SWEEP, "hydra/launcher=joblib", f"hydra.launcher.n_jobs={n_jobs}", f"paths.results={tmp_path / 'results'}"]
    assert nurse.run(*line) == 2
    assert nurse.said == [f"hydra.launcher.n_jobs={n_jobs} is not a number of runs; use 1 or more"]
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    nursery(sys.argv[1])
