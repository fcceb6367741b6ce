"""Sweeps on a real Slurm, such as ``scripts/slurm_local.sh up`` starts: what it interrupts ends as if undisturbed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import submitit
from hydra import compose, initialize_config_dir

from alignprune_exp import runs as records
from alignprune_exp.commandline import checked, config_dir
from alignprune_exp.errors import Failed, Stopped, UsageError
from alignprune_exp.sweep import Job
from alignprune_exp.train import main
from hydra_plugins import alignprune_launchers

ROOT = Path(__file__).parents[1]
SMALL = ["threads=1", "epochs=6", "score.window=3", "dataset.subset=200", "dataset.test_subset=100"]
DECAYS, DIVERGES = "optimizer.weight_decay=0.001", "optimizer.weight_decay=0.001,100"
LONG = ["threads=1", "epochs=8", "score.window=3"]  # some seconds, or many, by the size of its batches
DAWDLING = """
import os, time
from alignprune_exp.pruning.scores import Loss

class Dawdling(Loss):
    def __call__(self, history):
        if "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(7)
        return super().__call__(history)
"""  # twice an epoch, in a job's first attempt
SLURM = ["hydra/launcher=slurm", "hydra.launcher.mem_gb=1", "hydra.launcher.cpus_per_task=1"]


def answers():
    if shutil.which("sbatch") is None:
        return False
    asked = subprocess.run(["sinfo", "-h"], capture_output=True, text=True)
    return asked.returncode == 0 and bool(asked.stdout.strip())


@pytest.fixture(scope="session")
def cluster():
    if not answers():
        pytest.skip('no Slurm cluster answers; eval "$(scripts/slurm_local.sh up)" starts one')


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def train(*arguments, python_path="", **options):
    environment = {**os.environ, "PYTHONPATH": str(python_path)}
    return subprocess.Popen(
        [sys.executable, "-m", "alignprune_exp.train", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def sweep(results, *overrides, **options):
    return train("-m", *SLURM, f"paths.results={results}", *overrides, **options)


def ended(process):
    out, error = process.communicate(timeout=200)
    return process.returncode, out, error


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def runs(results):
    folder = Path(results) / "runs"
    return {path.name: path for path in folder.iterdir()} if folder.exists() else {}


def assert_as_undisturbed(results, others, *arguments):
    """The runs are those that the same command leaves where nothing disturbs it."""
    assert main([*arguments, f"paths.results={others}"]) == 0
    assert runs(results).keys() == runs(others).keys()
    for name, folder in runs(results).items():
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert metrics(folder) == metrics(runs(others)[name])


def until(condition, process, seconds=90):
    for _ in range(seconds * 10):
        if value := condition():
            return value
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail("it did not come to that")


def queued(state="%i"):
    """What there is of this user's jobs, which are this test's."""
    return subprocess.run(["squeue", "--me", "-h", "-r", "-o", state], capture_output=True, text=True).stdout.split()


def at_epoch(results, epoch):
    def there():
        return any(len(metrics(folder)) >= epoch for folder in runs(results).values() if (folder / "lock").exists())

    def safe():
        try:
            return there()
        except FileNotFoundError:
            return False

    return safe


def hasten(job):
    """Start a job soon that Slurm would let wait for two minutes after it was queued again."""
    time.sleep(2)  # a job that starts within the second of its end is refused its credential
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


def logs(results):
    return "".join(path.read_text() for path in sorted(Path(results).glob("slurm/*/*_log.*")))


def assert_went_on_from_the_very_step(results):
    text = logs(results)
    stops = re.findall(r"stopped in epoch (\d+), step (\d+) and left a checkpoint", text)
    assert stops, text
    assert re.findall(r"resumed at epoch (\d+), step (\d+)", text) == stops
    return stops


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_sweep_leaves_what_it_leaves_on_one_machine_and_lists_what_failed(tmp_path):
    status, out, error = ended(sweep(tmp_path / "slurm", *SMALL, "seed=0,1", DIVERGES))
    assert status == 1
    assert error.splitlines()[0] == "2 of 4 runs did not finish:"
    assert all("optimizer.weight_decay=100" in line for line in error.splitlines()[1:])
    assert len(error.splitlines()) == 3
    assert out.count("loss became NaN or infinite") == 2
    assert ended(sweep(tmp_path / "slurm", *SMALL, "seed=0,1", DECAYS))[1] == "0 runs to do, 2 finished already\n"
    for folder in runs(tmp_path / "slurm").values():
        if json.loads((folder / "summary.json").read_text())["status"] == "failed":
            shutil.rmtree(folder)
    assert_as_undisturbed(tmp_path / "slurm", tmp_path / "here", "-m", *SMALL, "seed=0,1", DECAYS)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "interrupt",
    [["scontrol", "requeue"], ["scancel", "--signal=TERM"], ["scancel", "--signal=USR2"]],
    ids=["requeue", "TERM", "USR2"],
)
def test_an_interrupted_job_goes_on_from_the_very_step(tmp_path, interrupt):
    long = [*LONG, "batch_size=4"]
    process = sweep(tmp_path / "slurm", *long)
    until(at_epoch(tmp_path / "slurm", 2), process)
    (job,) = queued()
    subprocess.run([*interrupt, job], check=True)
    until(lambda: queued("%T") == ["PENDING"], process)
    hasten(job)
    status, _, error = ended(process)
    assert status == 0, error
    (stop,) = assert_went_on_from_the_very_step(tmp_path / "slurm")
    assert int(stop[0]) >= 2
    assert_as_undisturbed(tmp_path / "slurm", tmp_path / "here", *long)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_job_that_hits_its_time_limit_goes_on_from_the_very_step(tmp_path, monkeypatch):
    """Slurm may signal up to a minute earlier than asked: the run lasts from 20 to 80 seconds at the least."""
    (tmp_path / "dawdling.py").write_text(DAWDLING)
    monkeypatch.syspath_prepend(tmp_path)
    long = [*LONG, "score.name=dawdling.Dawdling"]
    limit = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=40"]
    process = sweep(tmp_path / "slurm", *long, *limit, python_path=tmp_path)
    until(lambda: queued("%T") == ["RUNNING"], process)
    (job,) = queued()
    while process.poll() is None:
        if queued("%T") == ["PENDING"]:
            hasten(job)
        time.sleep(1)
    status, _, error = ended(process)
    assert status == 0, error
    assert assert_went_on_from_the_very_step(tmp_path / "slurm")
    assert_as_undisturbed(tmp_path / "slurm", tmp_path / "here", *long)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_cancelled_job_is_not_queued_again_and_the_sweep_says_so(tmp_path):
    process = sweep(tmp_path, *LONG, "batch_size=1", "epochs=20", "seed=0,1")
    until(at_epoch(tmp_path, 1), process)
    for job in queued():
        subprocess.run(["scancel", job], check=True)
    status, _, error = ended(process)
    assert status == 1
    assert error.startswith("2 of 2 runs did not finish:")
    assert error.count("ended without a result") == 2
    assert not queued()
    assert not any(folder.joinpath("lock").exists() for folder in runs(tmp_path).values())


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_job_runs_what_was_submitted_though_the_configs_have_changed(tmp_path):
    """A copy of the package is submitted, to be held in the queue until its configs are others."""
    for part in ("src", "conf"):
        shutil.copytree(ROOT / part, tmp_path / "copy" / part)
    conf = tmp_path / "copy" / "conf"
    held = ["+hydra.launcher.additional_parameters.begin=now+1hour"]
    process = sweep(tmp_path / "slurm", *SMALL, *held, python_path=tmp_path / "copy" / "src")
    (job,) = until(lambda: queued(), process)
    (conf / "dataset" / "digits.yaml").unlink()
    scale = conf / "scale" / "smoke.yaml"
    scale.write_text(scale.read_text().replace("lr: ", "lr: 1000"))
    hasten(job)
    status, _, error = ended(process)
    assert status == 0, error
    assert_as_undisturbed(tmp_path / "slurm", tmp_path / "here", *SMALL)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_what_slurm_refuses_is_one_sentence_of_its_own_and_nothing_is_written(tmp_path):
    status, out, error = ended(sweep(tmp_path / "results", *SMALL, "hydra.launcher.partition=nope"))
    assert status == 2
    assert len(error.splitlines()) == 1
    assert "invalid partition specified: nope" in error
    assert out == "1 runs to do\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_sweep_that_no_longer_waits_leaves_its_jobs_in_the_queue(tmp_path):
    process = sweep(tmp_path, *SMALL, "+hydra.launcher.additional_parameters.begin=now+1hour")
    (job,) = until(lambda: queued(), process)
    process.send_signal(signal.SIGINT)
    status, _, error = ended(process)
    assert status == 130
    assert f"scancel {job} ends them" in error
    assert queued() == [job]
    subprocess.run(["scancel", job], check=True)


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_line_typed_again_waits_for_the_jobs_that_are_in_the_queue(tmp_path):
    held = "+hydra.launcher.additional_parameters.begin=now+1hour"
    process = sweep(tmp_path / "slurm", *SMALL, "seed=0,1", held)
    until(lambda: len(queued()) == 2, process)
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    process = sweep(tmp_path / "slurm", *SMALL, "seed=0,1,2")
    until(lambda: len(queued()) == 3 or (tmp_path / "slurm" / "slurm" / "queued.json").stat().st_size > 60, process)
    for job in queued("%i %T"):
        if "_" in job:
            hasten(job)
    status, out, error = ended(process)
    assert status == 0, error
    assert "2 of these are in the queue already" in out
    assert out.count("submitted") == 1
    assert_as_undisturbed(tmp_path / "slurm", tmp_path / "here", "-m", *SMALL, "seed=0,1,2")


@pytest.mark.slurm
@pytest.mark.usefixtures("cluster")
def test_a_job_of_two_tasks_is_one_run_of_two_processes(tmp_path):
    line = [*SMALL, "model.norm=group", "precision=fp32"]
    status, _, error = ended(sweep(tmp_path / "two", *line, "hydra.launcher.tasks_per_node=2"))
    assert status == 0, error
    assert main([*line, f"paths.results={tmp_path / 'one'}"]) == 0
    (two,), (one,) = runs(tmp_path / "two").values(), runs(tmp_path / "one").values()
    assert two.name == one.name
    assert json.loads((two / "environment.json").read_text())["processes"] == 2
    assert metrics(two)[0]["train_loss"] == pytest.approx(metrics(one)[0]["train_loss"], rel=1e-4)
    assert [row["samples_seen"] for row in metrics(two)[:2]] == [row["samples_seen"] for row in metrics(one)[:2]]


def test_without_slurm_the_other_launcher_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["-m", *SMALL, "hydra/launcher=slurm", f"paths.results={tmp_path / 'results'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sbatch is not found")
    assert "hydra/launcher=joblib" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_single_run_is_not_sent_to_a_launcher(tmp_path, capsys):
    assert main([*SMALL, "hydra/launcher=slurm", f"paths.results={tmp_path / 'results'}"]) == 2
    assert capsys.readouterr().err == "hydra/launcher=slurm launches sweeps; add -m\n"
    assert not list(tmp_path.iterdir())


# A Slurm of four scripts, which keep what would be in the queue in a file: id, why it waits, script.
PROGRAMS = {
    "srun": "exit 1",
    "sbatch": """
        number=$(($(cat "$QUEUE.last" 2>/dev/null || echo 0) + 1)); echo $number >"$QUEUE.last"
        reason=Priority; grep -q -- "#SBATCH --hold" "$1" && reason=JobHeldUser
        last=$(sed -n "s/#SBATCH --array=0-\\([0-9]*\\).*/\\1/p" "$1")
        for task in $(seq 0 $last); do echo "${number}_$task|$reason|$1" >>"$QUEUE"; done
        echo "Submitted batch job $number" """,
    "squeue": 'test ! -e "$QUEUE.down" && cat "$QUEUE"',
    "scontrol": 'sed -i "s/^\\(${2/,/_\\|}_.*\\)|JobHeldUser|/\\1|Priority|/" "$QUEUE"',
    "scancel": 'for job in "$@"; do sed -i "/^$job|/d" "$QUEUE"; done',
}


class Killed(BaseException):
    """What stands for the end of the process."""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """The file of what is in the queue."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(tmp_path / "queue"))
    monkeypatch.setattr(alignprune_launchers, "_wait", lambda jobs, submitted: [one.job_id for one in submitted])
    (tmp_path / "queue").touch()
    return tmp_path / "queue"


def in_the_queue(queue):
    return dict(line.split("|")[:2] for line in queue.read_text().splitlines())


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return checked(compose("train"))


@pytest.fixture
def send(tmp_path, queue, config):
    def send(*seeds, **parameters):
        launcher = alignprune_launchers.SlurmLauncher(str(tmp_path / "results" / "slurm" / "%j"), 1, **parameters)
        jobs = [Job(seed, (), config.model_copy(update={"seed": seed}), None) for seed in seeds]
        return launcher.launch_jobs(jobs)

    return send


def ready(tmp_path, ids):
    """Whether each job finds what it is to run."""
    return all((tmp_path / "results" / "slurm" / id / f"{id}_submitted.pkl").exists() for id in ids)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (submitit.core.utils.JobPaths, "move_temporary_file"),
        (records, "write_json"),
        (alignprune_launchers, "_order"),
    ],
    ids=["sent", "moved", "written"],
)
def test_a_sweep_killed_while_it_submits_leaves_no_job_that_runs_twice(
    tmp_path, queue, send, monkeypatch, capsys, owner, name
):
    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            send(1, 2, 3)
    assert set(in_the_queue(queue).values()) == {alignprune_launchers.HELD}
    ids = send(1, 2, 3)
    assert in_the_queue(queue) == dict.fromkeys(ids, "Priority")
    assert len(set(ids)) == 3
    assert ("cancelled 1_0, 1_1, 1_2: a sweep" in capsys.readouterr().out) == (name != "_order")
    assert ready(tmp_path, ids)
    assert send(1, 2, 3) == ids


def test_what_is_in_the_queue_is_not_sent_again(tmp_path, queue, send, capsys):
    first = send(1, 2)
    assert set(in_the_queue(queue).values()) == {"Priority"}
    assert send(2, 3, 4) == [first[1], "2_0", "2_1"]
    assert "1 of these are in the queue already: 1_1" in capsys.readouterr().out
    assert in_the_queue(queue) == dict.fromkeys([*first, "2_0", "2_1"], "Priority")
    assert ready(tmp_path, ["2_0", "2_1"])


def test_jobs_that_others_hold_are_left_alone(queue, send):
    others = "7|JobHeldUser|/home/me/other.sh\n8|JobHeldUser|(null)\n"
    queue.write_text(others)
    send(1, 2)
    assert queue.read_text().startswith(others)


def test_without_an_answer_from_squeue_nothing_is_sent_and_nothing_written(tmp_path, queue, send):
    queue.with_name("queue.down").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="squeue does not say"):
        send(1, 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_key_that_the_launcher_does_not_have_is_a_mistake_and_nothing_is_written(tmp_path, queue, send):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"hydra\.launcher .*slurm_nonsense"):
        send(1, 2, nonsense=1)
    assert sorted(tmp_path.rglob("*")) == before
    assert in_the_queue(queue) == {}


def test_a_damaged_note_of_what_was_sent_is_no_note(tmp_path, queue, send):
    first = send(1)
    (tmp_path / "results" / "slurm" / "queued.json").write_text('{"x": [1], "y": {}}')
    assert send(1) != first


def test_jobs_that_cannot_be_released_are_released_by_the_same_command(tmp_path, queue, send):
    scontrol = tmp_path / "bin" / "scontrol"
    works = scontrol.read_text()
    scontrol.write_text("#!/bin/bash\necho 'scontrol: error: Access denied' >&2; exit 1\n")
    with pytest.raises(Failed, match="scontrol release 1 failed: Access denied; the same command tries again"):
        send(1, 2)
    scontrol.write_text(works)
    assert in_the_queue(queue) == dict.fromkeys(["1_0", "1_1"], "JobHeldUser")
    assert send(1, 2) == ["1_0", "1_1"]
    assert in_the_queue(queue) == dict.fromkeys(["1_0", "1_1"], "Priority")


def test_of_two_sweeps_sent_at_once_one_waits_for_the_other(tmp_path, send):
    folder = tmp_path / "results" / "slurm"
    owned, found = threading.Event(), []

    def first():
        with alignprune_launchers._owned(folder):
            owned.set()
            time.sleep(0.3)
            found.extend(path.name for path in folder.iterdir())

    threading.Thread(target=first).start()
    owned.wait()
    send(1, 2)
    assert found == ["lock"]
    assert (folder / "queued.json").exists()


def test_a_sweep_interrupted_while_it_submits_ends_once_the_jobs_are_written_down(queue, send, monkeypatch):
    def interrupted(*command):
        signal.raise_signal(signal.SIGINT)
        return order(*command)

    order = alignprune_launchers._order
    monkeypatch.setattr(alignprune_launchers, "_order", interrupted)
    with pytest.raises(Stopped, match="scancel 1 ends them"):
        send(1, 2)
    assert in_the_queue(queue) == dict.fromkeys(["1_0", "1_1"], "Priority")


def test_no_longer_waiting_for_what_another_sweep_sent_says_how_to_end_it(send, monkeypatch):
    send(1, 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(alignprune_launchers, "_wait", interrupted)
    with pytest.raises(Stopped, match="scancel 1 ends them"):
        send(1, 2)
