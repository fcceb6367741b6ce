"""One run in several processes: what one process computes, whatever the sizes, and whoever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignprune_exp.train import main

TIMEOUT = 100
TINY = ("model.norm=group", "precision=fp32", "epochs=6", "score.window=3", "dataset.test_subset=90")
LONG = (*TINY, "dataset.subset=600", "batch_size=4", "epochs=40")
PSEUDO = ("reference=pseudo_cleanlab", "reference.size=20", "reference.warmup=1", "reference.every=1")
SAME = ("ranked_by", "kept_fraction", "kept_noise", "kept_noise_weighted", "samples_seen", "samples_refreshed", "lr")
SAME += ("reference_noise", "samples_reference")
CLOSE = ("train_loss", "test_loss", "reference_loss", "score_mean")


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def start(ranks, results, *line, **environment):
    """Start a run in several processes, its own process group."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
            *("-m", "alignprune_exp.train", *sorted(line, key=lambda word: word[0] != "-")),
            f"paths.results={results}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def ended(process):
    try:
        out, error = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, error


def said(error):
    """What the run's own processes said: torchrun's own words and Python's warnings left out."""
    ours = ("process", "run ", "batch_size=", "the processes", "torchrun", "device=", "model.")
    return [line for line in error.splitlines() if line.startswith(ours)]


def folder(results):
    (path,) = (Path(results) / "runs").iterdir()
    return path


def metrics(results):
    return [json.loads(line) for line in (folder(results) / "metrics.jsonl").read_text().splitlines()]


def assert_same(results, others):
    """The first epochs are those of the other run; later ones may differ, a sample having moved over a threshold."""
    for row, other in zip(metrics(results)[:3], metrics(others)[:3], strict=True):
        assert [row[key] for key in SAME] == [other[key] for key in SAME]
        ours, theirs = (np.array([row[key] for key in CLOSE], float) for row in (row, other))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert len(metrics(results)) == len(metrics(others))
    assert metrics(results)[-1]["train_loss"] == pytest.approx(metrics(others)[-1]["train_loss"], rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        (2, ("dataset.subset=301", "keep_probabilities=true")),  # odd shares
        (3, ("dataset.subset=132", "pruner=full")),  # 130 samples: the last batch, of two, leaves one of three without
        (3, ("dataset.subset=60", "pruner=seta", "noise=clean")),  # fewer batches than processes
        (2, ("dataset.subset=151", "pruner=static_glister", "pruner.warmup=2")),
        (3, ("dataset.subset=151", *PSEUDO)),
        (2, ("dataset.subset=150", "score.unseen=refresh", "recorded=smoothed", "label_smoothing=0.1")),
    ],
)
def test_several_processes_compute_what_one_computes(tmp_path, ranks, line):
    status, _, error = ended(start(ranks, tmp_path / "several", *TINY, *line))
    assert status == 0, error
    assert main([*TINY, *line, f"paths.results={tmp_path / 'one'}"]) == 0
    assert folder(tmp_path / "several").name == folder(tmp_path / "one").name
    assert_same(tmp_path / "several", tmp_path / "one")
    summary = json.loads((folder(tmp_path / "several") / "summary.json").read_text())
    samples = pd.read_parquet(folder(tmp_path / "several") / "samples.parquet")
    rows = metrics(tmp_path / "several")
    assert samples["times_selected"].sum() == rows[-1]["samples_seen"]
    assert summary["status"] == "finished"
    assert samples["loss"].notna().all()
    if "keep_probabilities=true" in line:
        ours, theirs = (pd.read_parquet(folder(tmp_path / run) / "probabilities.parquet") for run in ("several", "one"))
        assert ours["index"].tolist() == theirs["index"].tolist() == samples["index"].tolist()
        assert (ours.iloc[:, 1:] - theirs.iloc[:, 1:]).abs().to_numpy().mean() < 0.05


def at_epoch(process, results, epoch):
    for _ in range(TIMEOUT * 20):
        there = (Path(results) / "runs").exists() and (folder(results) / "metrics.jsonl").exists()
        if there and len(metrics(results)) >= epoch:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("it did not come to that")


def pids(process):
    """The processes of the run, by rank."""
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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_takes_the_run_down_with_one_sentence_and_a_good_checkpoint(tmp_path, rank):
    process = start(2, tmp_path, *LONG)
    at_epoch(process, tmp_path, 2)
    os.kill(pids(process)[rank], signal.SIGKILL)
    killed = time.monotonic()
    status, _, error = ended(process)
    assert time.monotonic() - killed < 60
    assert status != 0
    assert said(error) == [
        f"process {1 - rank} of 2 lost another one of its run; the same command goes on from the latest checkpoint"
    ]
    epochs = len(metrics(tmp_path))
    assert main([*LONG, f"paths.results={tmp_path}"]) == 0  # one process goes on
    assert json.loads((folder(tmp_path) / "environment.json").read_text())["resumed_at_epoch"] >= epochs - 1
    assert len(metrics(tmp_path)) == 40


def test_a_run_that_is_stopped_goes_on_from_that_step_in_another_number_of_processes(tmp_path, capsys):
    line = (*LONG, "epochs=8", "batch_size=2")
    for epochs in (1, 2, 3):  # until it is not by chance between two epochs that it is stopped
        process = start(2, tmp_path / "stopped", *line)
        at_epoch(process, tmp_path / "stopped", epochs)
        time.sleep(0.3)
        for pid in pids(process).values():
            os.kill(pid, signal.SIGTERM)
        status, _, error = ended(process)
        assert status != 0
        (stopped,) = said(error)
        assert "and left a checkpoint" in stopped
        if ", step 0 " not in stopped:
            break
    assert main([*line, f"paths.results={tmp_path / 'stopped'}"]) == 0
    assert "step 0\n" not in capsys.readouterr().out.split("resumed at ")[1][:30]
    assert main([*line, f"paths.results={tmp_path / 'one'}"]) == 0
    assert_same(tmp_path / "stopped", tmp_path / "one")


RANKWISE = """
import os
from alignprune_exp.pruning import Score

class Rankwise(Score):
    def __call__(self, history):
        return history.last_N * (1 - 2 * int(os.environ["RANK"]))
"""


def test_processes_that_select_differently_stop(tmp_path):
    (tmp_path / "rankwise.py").write_text(RANKWISE)
    line = (*TINY, "dataset.subset=300", "score.name=rankwise.Rankwise")
    status, _, error = ended(start(2, tmp_path / "results", *line, PYTHONPATH=str(tmp_path)))
    assert status != 0
    assert [line[:60] for line in said(error)] == ["the processes do not agree on the selection of epoch 1; star"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("batch_size=1",), "batch_size=1 over 2 processes leaves some without a sample; set batch_size=2 or more"),
        (("model.norm=sync",), "model.norm=sync is for CUDA devices; set model.norm=group, or one process"),
        (("-m", "seed=0,1"), "torchrun starts the processes of one run; for a sweep of such runs leave torchrun out"),
    ],
)
def test_a_mistake_is_one_sentence_of_one_process_and_nothing_is_written(tmp_path, line, words):
    status, _, error = ended(start(2, tmp_path / "results", *TINY, *line))
    assert status != 0
    (sentence,) = said(error)
    assert sentence.startswith(words)
    assert not list(tmp_path.iterdir())


def test_with_batch_norm_the_number_of_processes_belongs_to_the_run(tmp_path):
    line = (*TINY, "model.norm=batch", "dataset.subset=150")
    assert ended(start(2, tmp_path / "two", *line))[0] == 0
    assert main([*line, f"paths.results={tmp_path / 'one'}"]) == 0
    two, one = (json.loads((folder(tmp_path / name) / "summary.json").read_text()) for name in ("two", "one"))
    assert two["id"] != one["id"]
    assert two["config_id"] == one["config_id"]
