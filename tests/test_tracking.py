"""Weights & Biases mirrors the record, and never ends a run."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from alignprune_exp.runs import RunFolder
from harness import launch, only_run, rows_of, summary_of

SMALL = (
    "threads=1",
    "epochs=5",
    "score.window=3",
    "dataset.subset=200",
    "dataset.test_subset=50",
    "tracking=wandb",
    "tracking.mode=offline",
)


class FakeRun:
    preempting = False

    def __init__(self, fails):
        self.rows, self.summary, self.exit_codes, self._fails = [], {}, [], fails

    def log(self, row, step=None):
        if "log" in self._fails:
            raise ConnectionError("log is broken\nat length")
        self.rows.append((step, dict(row)))

    def mark_preempting(self):
        self.preempting = True

    def finish(self, exit_code=None):
        if "finish" in self._fails:
            raise ConnectionError("finish is broken")
        self.exit_codes.append(exit_code)


class FakeWandb(ModuleType):
    """Notes what it is told; raises in the calls named in ``fails``."""

    def __init__(self, *fails, api_key=None):
        super().__init__("wandb")
        self.runs, self.arguments, self._fails = [], [], fails
        self.api = SimpleNamespace(api_key=api_key)
        self._key = api_key

    def setup(self, *args, **kwargs):
        return SimpleNamespace(settings=SimpleNamespace(api_key=self._key))

    def login(self, *args, **kwargs):
        pytest.fail("a login may prompt")

    def init(self, **arguments):
        if "init" in self._fails:
            raise TimeoutError("init is broken")
        self.arguments.append(arguments)
        self.runs.append(FakeRun(self._fails))
        return self.runs[-1]


@pytest.fixture
def wandb(monkeypatch):
    """Put a fake in the place of the real package."""
    monkeypatch.setenv("WANDB_SILENT", "true")

    def install(*fails, **arguments):
        fake = FakeWandb(*fails, **arguments)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def complaints(capsys):
    captured = capsys.readouterr()
    assert captured.err == ""
    return [line for line in captured.out.splitlines() if "Weights & Biases" in line]


def test_a_run_is_mirrored_under_its_own_id(tmp_path, wandb, capsys):
    fake = wandb()
    assert launch(tmp_path, "tracking.group=main", "tracking.project=mine", base=SMALL) == 0
    folder = only_run(tmp_path)
    (arguments,), (run,) = fake.arguments, fake.runs
    assert arguments["id"] == folder.name
    assert arguments["resume"] is None
    assert arguments["group"] == "main"
    assert arguments["project"] == "mine"
    assert arguments["mode"] == "offline"
    assert Path(arguments["dir"]).is_relative_to(tmp_path)
    config = arguments["config"]
    assert (config["epochs"], config["score"]["name"], config["score"]["window"]) == (5, "das", 3)
    assert config["pruner"]["ratio"] == 0.5
    rows = rows_of(folder)
    assert [step for step, _ in run.rows] == [0, 1, 2, 3, 4]
    for (_, logged), row in zip(run.rows, rows, strict=True):
        assert logged == {key: value for key, value in row.items() if value is not None}
    summary = summary_of(folder)
    assert summary["test_accuracy_final"] == run.summary["test_accuracy_final"]
    assert run.exit_codes == [0]
    assert complaints(capsys) == []


def test_tracking_does_not_change_a_run(tmp_path, wandb):
    wandb()
    assert launch(tmp_path / "tracked", "tracking.group=main", base=SMALL) == 0
    assert launch(tmp_path / "bare", "tracking.group=other", base=SMALL) == 0
    assert launch(tmp_path / "none", base=SMALL[:-2]) == 0
    first, second, third = (only_run(tmp_path / name) for name in ("tracked", "bare", "none"))
    assert first.name == second.name == third.name


def test_a_resumed_run_is_mirrored_as_the_same_run(tmp_path, wandb, monkeypatch):
    fake = wandb()
    with monkeypatch.context() as patch:
        log = FakeRun.log

        def stopping(self, row, step=None):
            log(self, row, step)
            if step == 2:
                os.kill(os.getpid(), 2)

        patch.setattr(FakeRun, "log", stopping)
        with pytest.raises(SystemExit) as stopped:
            launch(tmp_path, base=SMALL)
        assert stopped.value.code == 130
    assert launch(tmp_path, base=SMALL) == 0
    assert [arguments["id"] for arguments in fake.arguments] == [only_run(tmp_path).name] * 2
    assert [arguments["resume"] for arguments in fake.arguments] == [None, "allow"]
    assert [step for run in fake.runs for step, _ in run.rows] == [0, 1, 2, 3, 4]
    assert fake.runs[-1].exit_codes == [0]
    assert [run.preempting for run in fake.runs] == [True, False]
    assert launch(tmp_path, "force=true", base=SMALL) == 0
    assert fake.arguments[-1]["resume"] is None  # lest what was mirrored go on, whose steps are not to be had again


def test_a_failed_run_is_closed_as_failed(tmp_path, wandb):
    fake = wandb()
    assert launch(tmp_path, "optimizer.lr=1000", "optimizer.weight_decay=100", "precision=fp32", base=SMALL) == 1
    (run,) = fake.runs
    assert run.summary["status"] == "failed"
    assert run.exit_codes == [1]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_raises_never_ends_a_run_and_is_named_once(tmp_path, wandb, capsys, fails):
    wandb(fails)
    assert launch(tmp_path, base=SMALL) == 0
    folder = only_run(tmp_path)
    assert len(rows_of(folder)) == 5
    assert summary_of(folder)["status"] == "finished"
    (line,) = complaints(capsys)
    assert f"{fails} is broken" in line


def test_a_tracker_that_is_broken_throughout_is_named_once(tmp_path, wandb, capsys):
    wandb("log", "finish")
    assert launch(tmp_path, base=SMALL) == 0
    assert len(complaints(capsys)) == 1


@pytest.mark.parametrize(
    "error", [ImportError("no wandb here"), OSError("a library is missing"), RuntimeError(), SystemExit(1)]
)
def test_a_tracker_that_cannot_be_imported_never_ends_a_run(tmp_path, monkeypatch, capsys, error):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "wandb":
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert launch(tmp_path, base=SMALL) == 0
    assert len(complaints(capsys)) == 1


def test_online_without_a_key_says_so_and_never_prompts(tmp_path, wandb, capsys):
    fake = wandb()
    assert launch(tmp_path, "tracking.mode=online", base=SMALL) == 0
    assert fake.arguments == []
    (line,) = complaints(capsys)
    assert "wandb login" in line


def test_online_with_a_key_starts(tmp_path, wandb):
    fake = wandb(api_key="secret")
    assert launch(tmp_path, "tracking.mode=online", base=SMALL) == 0
    assert fake.arguments[0]["mode"] == "online"
    assert "secret" not in "".join(path.read_text() for path in only_run(tmp_path).glob("*.[jy]*"))


def test_a_run_that_a_full_disk_ends_is_closed_before_the_next_one_starts(tmp_path, wandb, monkeypatch):
    """An open run would take the metrics of the sweep's next one: wandb.init returns it."""
    fake = wandb()

    def full(self, state):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", full)
        assert launch(tmp_path, base=SMALL) == 1
    (run,) = fake.runs
    assert len(run.exit_codes) == 1
    assert run.exit_codes != [0]


def test_without_tracking_the_package_is_not_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert launch(tmp_path, base=SMALL[:-2]) == 0
    assert complaints(capsys) == []


@pytest.mark.slow
def test_the_real_package_works_offline_without_network_or_prompt(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {
        "HOME": str(tmp_path / "home"),
        "HTTP_PROXY": "http://127.0.0.1:9",  # nothing answers there
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "alignprune_exp.train", *SMALL, f"paths.results={tmp_path / 'results'}"]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases failed" not in done.stdout
    folder = only_run(tmp_path / "results")
    (mirrored,) = (folder / "wandb").glob(f"offline-run-*-{folder.name}")
    assert (mirrored / f"run-{folder.name}.wandb").stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "results"]
