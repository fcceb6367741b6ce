"""What is to be measured on a card, walked on the CPU: the benchmark, and the stages of scripts/gpu.sh."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

import bench_gpu
from alignprune_exp import graph
from alignprune_exp.errors import Failed
from alignprune_exp.runs import CHECKPOINTS
from harness import environment_of, metrics_of, only_run, rows_of, sentence_of, summary_of
from pretended import pretended
from test_graph import Tape

STAGES = Path(bench_gpu.__file__).with_name("gpu.sh")
NEED_A_CARD = {"graph", "Inductor"}


def walk(folder, *arguments):
    """Take the benchmark's way; return its exit status and what it wrote."""
    threads = torch.get_num_threads()
    try:
        status = bench_gpu.main(["--json", str(folder / "found.json"), *arguments])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    return status, json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    status, found = walk(tmp_path_factory.mktemp("walked"), "--dry")
    assert status == 0, found["wrong"]
    return found


def rows_named(found, step):
    return [row for row in found["rows"] if row["step"] == step]


def test_every_part_gives_figures_and_their_quotients_and_what_needs_a_card_is_named(walked):
    assert walked["card"] == "cpu"
    assert set(walked["skipped"]) == NEED_A_CARD
    assert all("CUDA" in why for why in walked["skipped"].values())
    measured = set(bench_gpu.VARIANTS) - NEED_A_CARD
    assert measured == {"loop", "foreach"}
    assert {row["step"] for row in walked["rows"]} == measured | {"epoch", "DAS", "choosing"}
    for row in walked["rows"]:
        assert row["seconds"] > 0
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert row["peak_mb"] > 10
    assert {row["samples"] for row in rows_named(walked, "DAS")} == set(bench_gpu.DRY.samples)


@pytest.mark.parametrize("variant", ["loop", "foreach"])
def test_a_step_is_set_beside_the_plain_loop_and_the_speed_of_a_matrix_product(walked, variant):
    figures = walked["figures"]
    speed = figures[f"images a second, {variant}"]
    loop, step, matrix = (row["ratio"] for row in rows_named(walked, variant))
    assert loop == pytest.approx(speed / figures["plain_loop"])
    assert step == pytest.approx(speed / figures["plain_step"])
    assert matrix == pytest.approx(speed * figures["flops"] / figures["matrix"])
    assert 0 < matrix < 1


def test_operations_are_counted_as_by_hand(walked):
    first, second, last = 2 * 27 * 16 * 32**2, 2 * 144 * 32 * 16**2, 2 * 128 * 100  # images have no gradient
    assert walked["figures"]["flops"] == 2 * first + 3 * second + 3 * last


def test_the_parts_of_an_epoch_add_up_to_what_is_outside_of_its_steps(walked):
    figures = walked["figures"]
    parts = {name: seconds for name, seconds in figures.items() if name.startswith("outside, ")}
    assert {f"outside, {name}" for name in ("test", "score", "select", "diagnostics", "record")} <= set(parts)
    assert all(seconds >= 0 for seconds in parts.values())
    (row,) = rows_named(walked, "epoch")
    assert figures["outside"] == pytest.approx(row["seconds"] - row["baseline_seconds"])
    assert sum(parts.values()) == pytest.approx(figures["outside"])
    assert 0.5 * bench_gpu.DRY.images < row["samples"] < bench_gpu.DRY.images


@pytest.mark.parametrize("variant", ["loop", "foreach"])
def test_the_hours_of_the_main_table_follow_from_the_figures(walked, variant):
    figures = walked["figures"]
    steps = (15 + 60 * 0.7) * 200 * 49_500 / figures[f"images a second, {variant}"]  # 75 runs, 15 of full training
    seconds = (steps + 75 * 200 * figures["outside"]) * (1 + figures["checkpoint"] / 60)
    assert figures[f"hours, {variant}"] == pytest.approx(seconds / 3600)


def test_other_losses_other_scores_and_a_part_that_fails_are_wrong_and_the_rest_is_measured(
    monkeypatch, tmp_path, capsys
):
    def fails(*_):
        raise Failed("no epoch of the run was pruned")

    monkeypatch.setitem(bench_gpu.VARIANTS, "loop", ("graph=false", "label_smoothing=0.9"))
    monkeypatch.setattr(bench_gpu, "CLOSE", 1e-6)
    monkeypatch.setattr(bench_gpu, "TOLERANCE", -1.0)
    monkeypatch.setattr(bench_gpu, "epoch", fails)
    status, found = walk(tmp_path, "--dry")
    assert status == 1
    assert [line.partition(":")[0] for line in found["wrong"]] == ["loop", "epoch", "DAS of 20,000"]
    assert "WRONG: epoch: Failed: no epoch of the run was pruned" in capsys.readouterr().out
    assert {row["step"] for row in found["rows"]} == {"loop", "foreach", "DAS", "choosing"}
    assert not any(name.startswith("hours") for name in found["figures"])


def test_what_there_is_too_little_memory_for_is_named_as_skipped(monkeypatch, tmp_path):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.\nSee the documentation")

    monkeypatch.setattr(bench_gpu, "filled", fails)
    status, found = walk(tmp_path, "--dry", "--part", "selection")
    assert (status, found["wrong"], found["rows"]) == (0, [], [])
    why = "too little memory (CUDA out of memory. Tried to allocate 4.00 GiB.)"
    assert found["skipped"] == {"selection among 20,000": why}


def test_without_a_card_the_benchmark_says_how_it_is_walked(capsys):
    with pytest.raises(SystemExit) as ended:
        bench_gpu.main([])
    assert ended.value.code == 2
    assert "no CUDA device is seen; --dry walks the same on the CPU" in capsys.readouterr().err


def test_the_benchmark_mixes_no_devices_and_replays_steps(monkeypatch, tmp_path, capsys):
    """On a pretended device, by a tape of operations in place of a CUDA graph."""
    waited = []
    monkeypatch.setattr(graph, "Graph", Tape)
    monkeypatch.setattr(Tape, "replays", 0)
    monkeypatch.setattr(bench_gpu, "FULL", replace(bench_gpu.DRY, images=200, epochs=5))
    monkeypatch.delitem(bench_gpu.VARIANTS, "Inductor")
    monkeypatch.setattr(
        bench_gpu, "DataLoader", lambda *given, **more: DataLoader(*given, **more | {"pin_memory": False})
    )
    card = SimpleNamespace(name="a pretended device", total_memory=8e9)
    for name, value in {
        "get_device_properties": lambda device: card,
        "synchronize": waited.append,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 64e6,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pretended() as device:
        device.watched = False
        status, found = walk(tmp_path)
    assert status == 0, found["wrong"]
    assert found["card"].startswith("a pretended device, 8 GB")
    assert found["skipped"] == {}
    assert {row["step"] for row in found["rows"]} == {"loop", "foreach", "graph", "epoch", "DAS", "choosing"}
    assert {row["peak_mb"] for row in found["rows"]} == {64}
    assert Tape.replays > 5
    assert {each.type for each in waited} == {"cuda"}
    assert "hours, graph" in found["figures"]


def stage(name, folder, **more):
    """Walk a stage; return what ended, and its folder of figures."""
    environment = {**os.environ, "CUDA_DRY": "1", "PYTHON": sys.executable, "OUT": str(folder / "out"), **more}
    done = subprocess.run([STAGES, name], env=environment, capture_output=True, text=True)
    return done, folder / "out"


def test_an_unknown_stage_is_a_mistake_and_writes_nothing(tmp_path):
    done, out = stage("benhc", tmp_path)
    assert done.returncode == 2
    assert "check|bench|large|several|run" in done.stderr
    assert not out.exists()


def test_a_run_that_there_is_no_card_for_is_a_mistake_in_one_sentence(tmp_path):
    done, out = stage("run", tmp_path, CUDA_DRY="0", RUNS=str(tmp_path / "runs"), DATA=str(tmp_path))
    assert done.returncode == 2
    assert "device=cuda is not there" in sentence_of(done.stdout)
    assert [path.name for path in out.iterdir()] == ["run.log"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_several_runs_share_the_device(tmp_path):
    done, out = stage("several", tmp_path)
    assert done.returncode == 0, done.stdout
    found = json.loads((out / "several.json").read_text())
    one, two = found["rows"]
    assert (one["step"], two["step"]) == ("1 at once", "2 at once")
    assert one["ratio"] == 1
    assert two["baseline_seconds"] == pytest.approx(2 * one["seconds"])
    assert two["samples"] == 2 * one["samples"] == 2 * 297


@pytest.mark.slow
def test_a_run_that_is_stopped_in_time_goes_on_when_called_again(tmp_path):
    runs = tmp_path / "runs"
    for limit in (25, 300):
        done, out = stage("run", tmp_path, RUNS=str(runs), LIMIT=str(limit))
        assert done.returncode == 0, done.stdout
        copied = only_run(out)
        assert rows_of(copied) == rows_of(only_run(runs))
        assert not any((copied / name).exists() for name in (*CHECKPOINTS, "lock"))
        if limit == 25:
            assert re.search(r"stopped in epoch \d+, step \d+ and left a checkpoint", done.stdout)
            assert done.stdout.endswith("to go on: scripts/gpu.sh run\n")
            assert not (copied / "summary.json").exists()
    assert "resumed at epoch" in done.stdout
    assert summary_of(copied)["status"] == "finished"
    assert environment_of(copied)["device_type"] == "cpu"
    assert len(metrics_of(copied)) == 400
