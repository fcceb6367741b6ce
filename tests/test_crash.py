"""Runs and sweeps that are killed, started twice or interrupted end with the results of undisturbed ones."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from alignprune_exp.errors import UsageError
from alignprune_exp.runs import run_folders
from alignprune_exp.sweep import Job
from harness import assert_same_results, config_of, rows_of, sentence_of
from hydra_plugins import alignprune_launchers

SMALL = ("threads=1", "score.window=3", "dataset.subset=300", "dataset.test_subset=100", "batch_size=32")
SMALL += ("checkpoint_seconds=0",)
PAUSE = 0.1  # seconds in the middle of writing a checkpoint


@pytest.fixture(scope="module")
def undisturbed(nurse, tmp_path_factory):
    """The results that command lines leave when nothing happens to them."""

    @cache
    def results(*line, path=""):
        folder = tmp_path_factory.mktemp("undisturbed")
        assert nurse.run(*line, f"paths.results={folder}", path=path) == 0
        return folder

    return results


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def assert_as_undisturbed(results, others):
    """There are the same runs, with the same results, and nothing else is left."""
    for folder, other in zip(run_folders(results), run_folders(others), strict=True):
        assert folder.name == other.name
        assert_same_results(folder, other)
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())


def test_killed_at_random_moments_a_run_ends_as_an_undisturbed_one(tmp_path, nurse, undisturbed):
    line = [*SMALL, "epochs=30"]
    rng = random.Random(0)
    moments = ["at any time"] * 2 + ["after a step"] * 6 + ["in a checkpoint"] * 4
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
    assert stepped >= 6
    assert saving >= 3
    assert nurse.run(*line, f"paths.results={tmp_path}") == 0, nurse.said
    assert_as_undisturbed(tmp_path, undisturbed(*line))


def test_of_two_processes_on_one_run_one_works_and_the_other_says_so(tmp_path, nurse, undisturbed):
    line = [*SMALL, "epochs=20"]
    rng = random.Random(1)
    for _ in range(2):  # whoever has the run is killed
        pids = nurse.start(*[[*line, f"paths.results={tmp_path}"]] * 2, pause=PAUSE)
        nurse.until(lambda marks, pids=pids: b"." in marks and any(map(has_ended, pids)))
        time.sleep(rng.uniform(0, 0.2))
        (folder,) = run_folders(tmp_path)
        owner = json.loads((folder / "lock").read_text())["pid"]
        os.kill(owner, signal.SIGKILL)
        statuses = dict(zip(pids, nurse.ended(), strict=True))
        assert statuses.pop(owner) == -signal.SIGKILL
        assert set(statuses.values()) == {3}
        assert f"is running elsewhere (host {os.uname().nodename}, process {owner})" in " ".join(nurse.said)
    nurse.start(*[[*line, f"paths.results={tmp_path}"]] * 2, pause=PAUSE)
    assert sorted(nurse.ended()) == [0, 3]
    assert_as_undisturbed(tmp_path, undisturbed(*line))


SWEEP = ("-m", *SMALL, "epochs=8", "seed=0,1,2")
SLOW = ("epochs=20", "dataset.subset=100", "score.name=dawdling.Dawdling")
DAWDLING = """
import os, time
from alignprune_exp.pruning.scores import Loss

class Dawdling(Loss):
    def __call__(self, history):
        time.sleep(0.1 if "DAWDLES" in os.environ else 0)
        return super().__call__(history)
"""  # twice an epoch


@pytest.fixture(scope="module")
def dawdling(tmp_path_factory):
    """The folder of a score that takes its time where the environment says so."""
    folder = tmp_path_factory.mktemp("dawdling")
    (folder / "dawdling.py").write_text(DAWDLING)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2, signal.SIGKILL])
def test_a_sweep_interrupted_and_typed_again_ends_as_an_undisturbed_one(tmp_path, nurse, undisturbed, number):
    line = [*SWEEP, f"paths.results={tmp_path}"]
    (pid,) = nurse.start(line)
    nurse.until(lambda marks: marks.count(b"<") >= 11 and marks[-1:] == b".")  # some epochs into the second run
    os.kill(pid, number)
    (status,) = nurse.ended()
    assert status == (-number if number == signal.SIGKILL else 130)
    assert len(run_folders(tmp_path)) == 2
    if status == 130:
        (said,) = nurse.said
        assert "and left a checkpoint; the same command goes on from there" in sentence_of(said)
    assert nurse.run(*line) == 0
    assert "2 runs to do, 1 finished already" in nurse.printed[0]
    assert_as_undisturbed(tmp_path, undisturbed(*SWEEP))


@contextmanager
def joblib_sweep(results, dawdling):
    """A sweep with two runs at a time, once both have done two epochs."""
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    process = subprocess.Popen(
        [sys.executable, "-m", "alignprune_exp.train", *SWEEP, *SLOW, *launcher, f"paths.results={results}"],
        env={**os.environ, "PYTHONPATH": str(dawdling), "DAWDLES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while sum((f / "metrics.jsonl").exists() and len(rows_of(f)) >= 2 for f in run_folders(results)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    process.kill()
    process.communicate()


def test_a_process_of_joblibs_that_dies_takes_its_own_run_with_it_and_no_other(tmp_path, nurse, undisturbed, dawdling):
    with joblib_sweep(tmp_path, dawdling) as process:
        lost = next(f for f in run_folders(tmp_path) if "seed: 0" in (f / "config.yaml").read_text())
        os.kill(json.loads((lost / "lock").read_text())["pid"], signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    first, second = error.splitlines()
    assert first == "1 of 3 runs did not finish:"
    assert "seed=0" in second
    assert "its process was killed, or ran out of memory; the same command goes on" in second
    assert sum((folder / "summary.json").exists() for folder in run_folders(tmp_path)) == 2
    assert nurse.run(*SWEEP, *SLOW, f"paths.results={tmp_path}", path=dawdling) == 0
    assert_as_undisturbed(tmp_path, undisturbed(*SWEEP, *SLOW, path=dawdling))


@pytest.mark.slow
def test_a_joblib_sweep_that_is_interrupted_leaves_checkpoints_and_no_process(tmp_path, nurse, undisturbed, dawdling):
    with joblib_sweep(tmp_path, dawdling) as process:
        owners = [json.loads((f / "lock").read_text())["pid"] for f in run_folders(tmp_path)]
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.count("and left a checkpoint") == 2
    assert error.splitlines()[-1] == "the sweep was stopped with 1 runs to do; the same command goes on"
    for pid in owners:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not any((folder / "lock").exists() for folder in run_folders(tmp_path))
    assert nurse.run(*SWEEP, *SLOW, f"paths.results={tmp_path}", path=dawdling) == 0
    assert_as_undisturbed(tmp_path, undisturbed(*SWEEP, *SLOW, path=dawdling))


def test_the_workers_of_a_joblib_sweep_that_is_killed_end_soon_and_their_runs_go_on(
    tmp_path, nurse, undisturbed, dawdling
):
    with joblib_sweep(tmp_path, dawdling) as process:
        owners = [json.loads((f / "lock").read_text())["pid"] for f in run_folders(tmp_path)]
        process.kill()
        deadline = time.monotonic() + 10
        while not all(map(has_ended, owners)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert len(owners) == 2
    assert not any((folder / "summary.json").exists() for folder in run_folders(tmp_path))
    assert nurse.run(*SWEEP, *SLOW, f"paths.results={tmp_path}", path=dawdling) == 0
    assert "resumed at epoch" in nurse.printed[0]
    assert_as_undisturbed(tmp_path, undisturbed(*SWEEP, *SLOW, path=dawdling))


CARDS = """
import os
import torch

def take(device):
    os.environ["CARD"] = str(device)

if "CARDS" in os.environ:
    torch.cuda.device_count, torch.cuda.set_device = lambda: int(os.environ["CARDS"]), take
"""
NOTING = """
import os
from pathlib import Path
from alignprune_exp.pruning.scores import Loss

class Noting(Loss):
    def __call__(self, history):
        with Path(os.environ["NOTES"]).open("a") as file:
            file.write(f"{os.getpid()} {os.environ.get('CARD')}\\n")
        return super().__call__(history)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("cards", "taken"), [(2, ["0", "0", "1"]), (1, ["0", "0", "0"])])
def test_the_workers_of_a_joblib_sweep_are_spread_over_the_cards_and_share_one(tmp_path, monkeypatch, cards, taken):
    """Only how many cards there are is pretended: launcher, workers and runs are those that a user has."""
    (tmp_path / "sitecustomize.py").write_text(CARDS)
    (tmp_path / "noting.py").write_text(NOTING)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in {"PYTHONPATH": tmp_path, "CARDS": cards, "NOTES": tmp_path / "notes"}.items():
        monkeypatch.setenv(name, str(value))
    line = (*SMALL, "epochs=4", "score.name=noting.Noting")
    jobs = [Job(k, line, config_of(tmp_path / "results", *line, f"seed={k}", base=()), None) for k in range(3)]
    ended = alignprune_launchers.JoblibLauncher(3).launch_jobs(jobs)
    assert [each.return_value for each in ended] == [0, 0, 0]
    workers = {tuple(line.split()) for line in (tmp_path / "notes").read_text().splitlines()}
    assert len(workers) == 3
    assert sorted(card for _, card in workers) == taken


def test_joblibs_workers_are_started_by_one_thread_before_any_job_is_run(monkeypatch):
    events = []

    class Pool:
        """Stands in for joblib's: notes what is done with it, and where."""

        def __init__(self, *_, **__):
            events.append(("start", threading.current_thread()))

        def submit(self, work, *arguments):
            events.append(("run" if arguments else "try", threading.current_thread()))
            done = Future()
            done.set_result(0)
            return done

        def shutdown(self):
            events.append(("close", threading.current_thread()))

    monkeypatch.setattr("joblib.externals.loky.process_executor.ProcessPoolExecutor", Pool)
    assert len(alignprune_launchers.JoblibLauncher(2).launch_jobs(["a", "b", "c"])) == 3
    assert events[:4] == [(what, threading.main_thread()) for what in ("start", "try") * 2]
    assert sorted(what for what, _ in events[4:]) == ["close", "close", "run", "run", "run"]


def test_more_runs_at_a_time_than_the_machine_bears_are_a_mistake(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(UsageError, match=r"hydra\.launcher\.n_jobs=33 is far beyond .* use at most 32"):
        alignprune_launchers.JoblibLauncher(33).launch_jobs(["a"])


@pytest.mark.parametrize("n_jobs", ["0", "two"])
def test_a_number_of_runs_that_is_none_is_a_mistake(tmp_path, nurse, n_jobs):
    line = [*SWEEP, "hydra/launcher=joblib", f"hydra.launcher.n_jobs={n_jobs}", f"paths.results={tmp_path / 'results'}"]
    assert nurse.run(*line) == 2
    assert nurse.said == [f"hydra.launcher.n_jobs={n_jobs} is not a number of runs; use 1 or more\n"]
    assert not list(tmp_path.iterdir())
