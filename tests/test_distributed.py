"""One run in several processes: what one process computes, whatever the sizes, and whoever dies."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import distributed as dist
from torch.utils import collect_env

from alignprune_exp.distributed import Lost, Processes
from alignprune_exp.errors import UsageError
from alignprune_exp.record import environment
from alignprune_exp.run import Run
from alignprune_exp.runs import RunFolder
from alignprune_exp.setup import resolve_device
from alignprune_exp.sweep import Job
from harness import config_of, environment_of, launch, only_run, rows_of, samples_of, sentence_of, summary_of
from hydra_plugins import alignprune_launchers
from hydra_plugins.alignprune_launchers import take_device

TINY = ("model.norm=group", "precision=fp32", "epochs=6", "score.window=3", "dataset.test_subset=90")
TINY += ("checkpoint_seconds=0",)
LONG = (*TINY, "dataset.subset=300", "batch_size=4", "epochs=12")
PSEUDO = ("reference=pseudo_cleanlab", "reference.size=20", "reference.warmup=1", "reference.every=1")
SAME = ("ranked_by", "kept_fraction", "kept_noise", "kept_noise_weighted", "samples_seen", "samples_refreshed", "lr")
SAME += ("reference_noise", "samples_reference")
WARM = ("pruner.warmup=2", "epochs=3")
CLOSE = ("train_loss", "test_loss", "reference_loss", "score_mean")


@pytest.fixture
def start(nurse):
    """Start the processes of one run; return their pids."""

    def started(ranks, results, *line, **more):
        return nurse.start(*[[*line, f"paths.results={results}"]] * ranks, together=True, **more)

    return started


def words_of(*errors):
    """What the run's own processes said: torchrun's own words and torch's warnings left out."""
    ours = ("process", "run ", "batch_size=", "the processes", "torchrun", "device=", "model.")
    return [line for error in errors for line in error.splitlines() if line.startswith(ours)]


def assert_same(folder, other):
    """The first epochs are those of the other run; later ones may differ, a sample having moved over a threshold."""
    rows, others = rows_of(folder), rows_of(other)
    for row, theirs in zip(rows[:3], others[:3], strict=True):
        assert [row[key] for key in SAME] == [theirs[key] for key in SAME]
        close = (np.array([each[key] for key in CLOSE], float) for each in (row, theirs))
        np.testing.assert_allclose(*close, rtol=1e-3, atol=1e-6)  # the mean of standardised scores is rounding alone
    assert len(rows) == len(others)
    assert rows[-1]["train_loss"] == pytest.approx(others[-1]["train_loss"], rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        (2, ("dataset.subset=301", "keep_probabilities=true")),  # odd shares
        (3, ("dataset.subset=131", "pruner=full")),  # 130 samples: the last batch, of two, leaves one of three without
        (3, ("dataset.subset=60", "pruner=seta", "noise=clean")),  # fewer batches than processes
        (2, ("dataset.subset=151", "pruner=static_glister", "pruner.warmup=2")),
        (3, ("dataset.subset=151", *PSEUDO)),
        (2, ("dataset.subset=151", "method=rho_loss", "score.holdout=1")),
        (3, ("dataset.subset=151", "method=sieve_readout", "pruner.warmup=1", "score.every=1")),
        (2, ("dataset.subset=151", "method=sieve_features", "pruner.warmup=2")),
        (2, ("dataset.subset=151", "method=sieve_transition", "pruner.warmup=2", "learner=posterior")),
        (2, ("dataset.subset=150", "score.unseen=refresh", "recorded=smoothed", "label_smoothing=0.1")),
    ],
)
def test_several_processes_compute_what_one_computes(tmp_path, nurse, start, undisturbed, ranks, line):
    start(ranks, tmp_path, *TINY, *line)
    assert nurse.ended() == [0] * ranks, nurse.said
    folder, one = only_run(tmp_path), undisturbed(*line, base=TINY)
    assert folder.name == one.name
    assert_same(folder, one)
    samples = samples_of(folder)
    assert samples["times_selected"].sum() == rows_of(folder)[-1]["samples_seen"]
    assert summary_of(folder)["status"] == "finished"
    assert samples["loss"].notna().all()
    if "keep_probabilities=true" in line:
        ours, theirs = (pd.read_parquet(each / "probabilities.parquet") for each in (folder, one))
        assert ours["index"].tolist() == theirs["index"].tolist() == samples["index"].tolist()
        assert (ours.iloc[:, 1:] - theirs.iloc[:, 1:]).abs().to_numpy().mean() < 0.05


def pids(process):
    """The processes that torchrun has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        for word in words:
            if parent == process.pid and word.startswith(b"RANK="):
                found[int(word[5:])] = int(path.parent.name)
    return found


def epochs_of(results):
    return max([len(file.read_text().splitlines()) for file in Path(results).glob("runs/*/metrics.jsonl")], default=0)


def assert_taken_down(tmp_path, survivor, errors):
    assert words_of(*errors) == [
        f"process {survivor} of 2 lost another one of its run; the same command goes on from the latest checkpoint"
    ]
    epochs = epochs_of(tmp_path)
    assert launch(tmp_path, base=LONG) == 0  # one process goes on
    assert environment_of(only_run(tmp_path))["resumed_at_epoch"] >= epochs - 1
    assert epochs_of(tmp_path) == 12


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_takes_the_run_down_with_one_sentence_and_a_good_checkpoint(tmp_path, nurse, start, rank):
    processes = start(2, tmp_path, *LONG)
    nurse.until(lambda marks: marks.count(b">") >= 2)
    os.kill(processes[rank], signal.SIGKILL)
    killed = time.monotonic()
    statuses = nurse.ended()
    assert time.monotonic() - killed < 60
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 1
    assert_taken_down(tmp_path, 1 - rank, nurse.said)


def test_under_torchrun_which_ends_all_with_the_first_the_sentence_is_said_too(tmp_path):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "alignprune_exp.train", *LONG, f"paths.results={tmp_path}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        assert any(line.startswith("epoch ") for line in process.stdout)
        os.kill(pids(process)[0], signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert_taken_down(tmp_path, 1, [error])


def test_a_run_that_is_stopped_goes_on_from_that_step_in_another_number_of_processes(
    tmp_path, nurse, start, undisturbed, capsys
):
    line = ("dataset.subset=200", "batch_size=4")  # 49 steps in the first epoch
    processes = start(2, tmp_path, *TINY, *line)
    nurse.until(lambda marks: marks.count(b".") >= 2 * 55)
    for pid in processes:
        os.kill(pid, signal.SIGTERM)
    assert nurse.ended() == [130, 130]
    (stopped,) = words_of(*nurse.said)
    assert "stopped in epoch 1, step " in stopped
    assert "and left a checkpoint" in stopped
    assert launch(tmp_path, *line, base=TINY) == 0
    assert "resumed at epoch 1, step 0" not in capsys.readouterr().out
    assert_same(only_run(tmp_path), undisturbed(*line, base=TINY))


RANKWISE = """
import os
from alignprune_exp.pruning import Score

class Rankwise(Score):
    def __call__(self, history):
        return history.last_N * (1 - 2 * int(os.environ["RANK"]))
"""


def test_processes_that_select_differently_stop(tmp_path, nurse, start):
    (tmp_path / "rankwise.py").write_text(RANKWISE)
    start(2, tmp_path, *TINY, "dataset.subset=300", "score.name=rankwise.Rankwise", path=tmp_path)
    assert nurse.ended() == [1, 1]
    (sentence,) = words_of(*nurse.said)
    assert sentence.startswith("the processes do not agree on the selection of epoch 1; start")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("batch_size=1",), "batch_size=1 over 2 processes leaves some without a sample; set batch_size=2 or more"),
        (("model.norm=sync",), "model.norm=sync is for CUDA devices; set model.norm=group, or one process"),
        (("-m", "seed=0,1"), "torchrun starts the processes of one run; for a sweep of such runs leave torchrun out"),
    ],
)
def test_a_mistake_is_one_sentence_of_one_process_and_nothing_is_written(tmp_path, nurse, start, line, words):
    start(2, tmp_path / "results", *sorted((*TINY, *line), key=lambda word: word[0] != "-"))
    assert nurse.ended() == [2, 2]
    (sentence,) = words_of(*nurse.said)
    assert sentence.startswith(words)
    assert not list(tmp_path.iterdir())


def journal_of(rank, results, line):
    one = Run(config_of(results, *line, base=TINY), Processes())
    folder = RunFolder(Path(results), one.setup.id)
    with folder.claim() if rank == 0 else nullcontext():
        summary = one.train(folder, "test")
    return one.journal.rows, one.journal.dynamics, summary


@pytest.mark.parametrize("line", [("dataset.subset=150",), ("dataset.subset=150", "pruner=static_el2n", *WARM)])
def test_the_process_that_writes_alone_looks_at_what_is_written(tmp_path, together, line):
    (rows, dynamics, summary), (others, nothing, told) = together(2, journal_of, str(tmp_path), line)
    assert rows == rows_of(only_run(tmp_path))
    assert dynamics == (only_run(tmp_path) / "dynamics.parquet").read_bytes()
    assert (summary["status"], told["status"]) == ("finished", "finished")
    assert summary["test_accuracy_final"] == told["test_accuracy_final"]
    assert nothing is None
    aurocs = {key for key in rows[-1] if key.startswith("auroc_")}
    assert all(row["auroc_loss"] is not None for row in rows)
    assert {row[key] for row in others for key in aurocs} == {None}
    assert [[row[key] for key in SAME] for row in others] == [[row[key] for key in SAME] for row in rows]


def weights_and_momenta(rank, results, line):
    one = Run(config_of(results, *line, base=TINY), Processes())
    folder = RunFolder(Path(results), one.setup.id)
    with folder.claim() if rank == 0 else nullcontext():
        one.train(folder, "test")
    network = one.loop.network
    momenta = [state["momentum_buffer"] for state in network.optimizer.state.values()]
    return [values.detach().numpy() for values in (*network.learner.parameters(), *momenta)]


def test_a_process_without_a_share_of_a_step_takes_it_all_the_same(tmp_path, together):
    line = ("dataset.subset=131", "pruner=full", "epochs=3")  # 130 samples: a last batch of two
    first, *others = together(3, weights_and_momenta, str(tmp_path), line)
    for other in others:
        for values, theirs in zip(first, other, strict=True):
            np.testing.assert_array_equal(values, theirs)


def test_with_batch_norm_the_number_of_processes_belongs_to_the_run(tmp_path, nurse, start, undisturbed):
    line = ("model.norm=batch", "dataset.subset=150")
    start(2, tmp_path, *TINY, *line)
    assert nurse.ended() == [0, 0]
    two, one = summary_of(only_run(tmp_path)), summary_of(undisturbed(*line, base=TINY))
    assert two["id"] != one["id"]
    assert two["config_id"] == one["config_id"]


@pytest.mark.parametrize(("local", "devices", "own"), [(0, 4, 0), (3, 4, 3), (3, 1, 0), (3, 2, None)])
def test_a_process_takes_the_device_of_its_number_or_the_only_one_it_is_shown(monkeypatch, local, devices, own):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": local, "WORLD_SIZE": 4, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, str(value))
    processes = Processes()
    assert processes.place(devices) == own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    if own is not None:
        assert resolve_device("auto", processes) == torch.device("cuda", own)
    else:
        with pytest.raises(UsageError, match="torch sees 2 CUDA devices"):
            resolve_device("cuda", processes)


@pytest.mark.parametrize(("devices", "torchrun"), [(1, True), (2, True), (2, False)])
def test_more_processes_than_devices_are_refused_in_all_of_them_and_none_waits_for_nccl(monkeypatch, devices, torchrun):
    """NCCL takes no device twice; those that have one would wait for the others to name theirs."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: asked.append(more["device_id"]))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    if not torchrun:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for local in range(4):
        line = {"MASTER_ADDR": "127.0.0.1", "RANK": local, "WORLD_SIZE": 4, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": 4}
        for name, value in line.items():
            monkeypatch.setenv(name, str(value))
        processes = Processes()
        with processes.joined("auto"), pytest.raises(UsageError) as refused:
            resolve_device("auto", processes)
        said = f"torch sees {devices} CUDA devices, and each of 4 processes on this machine needs one of its own; "
        assert sentence_of(str(refused.value)) == said + f"start {devices}, or set device=cpu"
        assert resolve_device("cpu", processes) == torch.device("cpu")
    assert asked == [None] * 4


NCCL = "NCCL error in: NCCLUtils.hpp:275, invalid usage, NCCL version 2.20.5\n"


@pytest.mark.parametrize(
    ("last", "ends"), [("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device a4000", UsageError), ("", Lost)]
)
def test_one_device_shown_to_several_tasks_is_no_lost_process(monkeypatch, last, ends):
    def refuse(*_, **__):
        raise dist.DistBackendError(NCCL + last)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ends) as ended, Processes().joined("auto"):
        pass
    assert ("--gpus-per-task=1" in sentence_of(str(ended.value))) == bool(last)


@pytest.mark.parametrize(("devices", "own"), [(0, []), (1, [0, 0, 0, 0]), (2, [0, 1, 0, 1]), (8, [0, 1, 2, 3])])
def test_the_workers_of_a_sweep_take_the_devices_in_turn(monkeypatch, devices, own):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for number in range(4):
        take_device(number)
    assert taken == own


@pytest.mark.parametrize(("device", "taken"), [("cpu", []), ("auto", [1])])
def test_a_worker_leaves_devices_alone_for_a_run_on_the_cpu(tmp_path, monkeypatch, device, taken):
    found = []
    monkeypatch.setattr(alignprune_launchers, "take_device", found.append)
    monkeypatch.setattr(alignprune_launchers, "perform", lambda job: 0)
    job = Job(1, (), config_of(tmp_path, f"device={device}"), None)
    assert alignprune_launchers._status(job, os.getppid(), 1) == 0
    assert found == taken


def test_fp32_is_fp32_on_every_device(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Run(config_of(tmp_path, "precision=fp32"))
    assert torch.backends.cudnn.allow_tf32 is False
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.mark.parametrize(
    ("seen", "asked_for", "devices", "compiles"),
    [(0, "auto", 0, False), (2, "auto", 2, False), (2, "cuda", 2, True), (2, "cpu", 0, False), (1, "cpu", 0, False)],
)
def test_processes_name_their_device_wait_longer_to_compile_and_are_not_ended_by_nccl(
    monkeypatch, seen, asked_for, devices, compiles
):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    asked, taken = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **more: asked.append((backend, more)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with Processes().joined(asked_for, compiles):
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"  # give up the connection, and raise
    ((backend, more),) = asked
    own = torch.device("cuda", 1) if devices else None
    assert (backend, more["device_id"]) == ("cpu:gloo,cuda:nccl" if devices else "gloo", own)
    assert taken == [own] * (devices > 0)
    assert (more["timeout"].total_seconds() >= 300) is compiles


def test_the_record_says_which_driver_a_card_had(tmp_path, monkeypatch):
    one = Run(config_of(tmp_path))
    assert "driver" not in environment(one.setup, "test", 0)
    monkeypatch.setattr(collect_env, "get_nvidia_driver_version", lambda run: "580.1")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    found = environment(dataclasses.replace(one.setup, device=torch.device("cuda:0")), "test", 0)
    assert (found["driver"], found["cudnn"], found["device"]) == ("580.1", 91000, "a card")
