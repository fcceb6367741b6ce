"""Services that mirror the record, each the real package, offline: what they give back is what the record says."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from alignprune_exp.train import main
from harness import only_run, rows_of, summary_of

SMALL = ["threads=1", "epochs=5", "score.window=3", "dataset.subset=200", "dataset.test_subset=50"]


def tracked(results, *overrides):
    assert main([*SMALL, f"paths.results={results}", *overrides]) == 0
    return only_run(results)


def numbers(folder):
    """What is to be mirrored: {key: [(epoch, value), …]}."""
    found = {}
    for row in rows_of(folder):
        for key, value in row.items():
            if isinstance(value, int | float):
                found.setdefault(key, []).append((row["epoch"], pytest.approx(value, rel=1e-6)))
    return found


def test_tensorboard_has_every_number_of_the_record(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tracked(tmp_path, "tracking=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    there = {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}
    assert there == numbers(folder)
    assert "left out" not in capsys.readouterr().out


def test_tensorboard_shows_a_run_that_was_gone_on_with_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from alignprune_exp.trackers import TensorBoard

    log = TensorBoard.log

    def stopping(self, row, epoch):
        log(self, row, epoch)
        if epoch == 2:
            os.kill(os.getpid(), 2)

    with monkeypatch.context() as patch:
        patch.setattr(TensorBoard, "log", stopping)
        with pytest.raises(SystemExit):
            tracked(tmp_path, "tracking=tensorboard")
    folder = tracked(tmp_path, "tracking=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_mlflow_has_every_number_of_the_record(tmp_path, capsys):
    from mlflow import MlflowClient

    folder = tracked(tmp_path, "tracking=mlflow", "tracking.experiment=mine")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    there = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    assert {key: [(m.step, m.value) for m in history] for key, history in there.items()} == numbers(folder)
    assert (run.info.status, run.info.run_name) == ("FINISHED", folder.name)
    assert run.data.params["score.name"] == "das"
    assert "left out" not in capsys.readouterr().out


@pytest.mark.slow
def test_trackio_has_every_number_of_the_record(tmp_path):
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "alignprune_exp.train", *SMALL, "tracking=trackio", f"paths.results={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert "left out" not in done.stdout
    assert "Trackio project" not in done.stdout
    folder = only_run(tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "alignprune.db") as database:
        lines = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY step", [folder.name])
        there = {step: json.loads(text) for step, text in lines}
    for row in rows_of(folder):
        known = {key: value for key, value in row.items() if isinstance(value, int | float)}
        assert {key: there[row["epoch"]][key] for key in known} == pytest.approx(known)


@pytest.mark.parametrize("package", ["tensorboard", "mlflow", "trackio"])
def test_a_service_that_is_not_installed_is_said_and_left_out(tmp_path, monkeypatch, capsys, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    folder = tracked(tmp_path, f"tracking={package}")
    assert summary_of(folder)["status"] == "finished"
    said = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(said) == 1
    assert f"pip install 'alignprune-exp[{package}]'" in said[0]
