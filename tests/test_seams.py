"""One of everything that a config can name, from a package outside the project: it runs, and is a row of a table."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from alignprune_exp.commandline import config_dir
from alignprune_exp.config import OPTIMIZER, REGISTRIES
from alignprune_exp.errors import UsageError
from alignprune_exp.records import read_config
from alignprune_exp.report.blocks import blocks
from alignprune_exp.report.tables import make_table, read_records
from alignprune_exp.report.texts import markdown
from alignprune_exp.suites import load_suite
from alignprune_exp.train import main

OUTSIDE = '''
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import nn

from alignprune_exp.data.batches import TensorBatches
from alignprune_exp.data.images import Array
from alignprune_exp.data.noise import Noise
from alignprune_exp.data.source import DataSet, Images, Source
from alignprune_exp.learners import Learner
from alignprune_exp.pruning import Pruner, Selection
from alignprune_exp.pruning.scores import Score
from alignprune_exp.tasks import Metric, Task


@dataclass(kw_only=True)
class Powered(Score):
    power: Annotated[float, Field(gt=0, le=9)] = 1.0

    def __call__(self, history):
        return history.last_N ** self.power


class Untold(Score):
    def __init__(self, *, power: "Gone" = 1):
        pass


class Unmade(Score):
    def __init__(self, *, power: int = 1):
        power()


@dataclass(frozen=True, kw_only=True)
class Best(Pruner):
    part: Annotated[float, Field(gt=0, le=1)] = 0.5

    def select(self, scores, epoch, epochs, rng):
        chosen = np.sort(np.argsort(-scores, kind="stable")[: round(self.part * len(scores))])
        return Selection(chosen, np.ones(len(chosen), np.float32), True)


class Capped(Learner):
    by_class = remembers = False

    def __init__(self, networks: "Unknown", given: "Unknown", *, most: Annotated[float, Field(gt=0, le=100)] = 2.0):
        super().__init__(networks, given)
        self.task, self.most = given.task, most

    def losses(self, step, forward):
        plain, training, predicted = self.task.losses(forward(step.inputs), step.targets)
        return plain, training.clamp(max=self.most), predicted


class Flat(nn.Module):
    def __init__(self, channels, classes, *, hidden: Annotated[int, Field(ge=1, le=99)] = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, classes))
        self.layers(torch.zeros(1, channels, 6, 6))

    def forward(self, x):
        return self.layers(x)


class Pooled(nn.Sequential):
    def __init__(self, channels, classes):
        super().__init__(nn.Conv2d(channels, classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@dataclass(frozen=True, kw_only=True)
class Next(Noise):
    rate: float

    def corrupted(self, labels, source, rng):
        moved = rng.random(len(labels)) < self.rate
        return np.where(moved, (labels + 1) % len(source.classes), labels)


@dataclass(frozen=True, kw_only=True)
class Bars(DataSet):
    name: str
    n: Annotated[int, Field(ge=20, le=1000)] = 120

    def open(self):
        labels = np.arange(self.n) % 3
        images = np.zeros((self.n, 1, 6, 6), np.uint8)
        images[np.arange(self.n), 0, labels] = 255
        half = self.n // 2
        train, test = (Images(labels[part], Array(images[part])) for part in (slice(half), slice(half, None)))
        return Source("bars", ("a", "b", "c"), train, test, f"bars {self.n}", labels_clean=True)


class Line(Task):
    """A number from three others; some targets have another sign."""

    metrics = (Metric("rmse", "test RMSE", higher=False, digits=3), Metric("bias", "bias", "mm"))
    chance_loss = 3.0

    def __init__(self, config, device="cpu", dtype=torch.float32, *, wrong: Annotated[float, Field(ge=0, le=1)] = 0.2):
        super().__init__(config, device, dtype)
        rng = np.random.default_rng(config.seed)
        x = rng.standard_normal((300, 3)).astype(np.float32)
        y = x @ np.array([1, 2, -1], np.float32)
        self.n, self.held_out, self.fingerprint = 200, 20, "line"
        self.corrupted = rng.random(200) < wrong
        given = y.copy()
        given[:200][self.corrupted] *= -1

        def batches(part, y):
            return TensorBatches(torch.from_numpy(x[part]), torch.from_numpy(y[part]), config.batch_size, device)

        self.train, self.reference = batches(slice(200), given), batches(slice(200, 220), y)
        self.tests = {"": batches(slice(220, 300), y)}

    def network(self):
        return nn.Linear(3, 1)

    def losses(self, outputs, targets, smoothing=0.0):
        loss = (outputs[:, 0] - targets).square()
        return loss, loss, None

    @torch.no_grad()
    def evaluate(self, network, batches, n, processes):
        off = torch.cat([network.logits(x)[:, 0] - y for _, x, y in batches]).double()
        square = processes.sum(off.square().sum()).item() / n
        return {"rmse": square**0.5, "bias": processes.sum(off.sum()).item() / n, "loss": square}
'''
SHORT = [
    "threads=1",
    "epochs=6",
    "score.window=3",
    "pruner.delta=1",
    "dataset.subset=60",
    "dataset.test_subset=30",
    "reference.size=10",
]
OWN = {
    "task/line": {"name": "outside.Line", "wrong": 0.3},
    "dataset/bars": {"name": "outside.Bars", "subset": None, "test_subset": None, "flip": False, "n": 150},
    "noise/next": {"name": "outside.Next", "rate": 0.4, "labels": "worst", "file": None},
    "pruner/best": {"name": "outside.Best", "part": 0.6},
    "score/powered": {"name": "outside.Powered", "window": 3, "unseen": "carry", "bank": "float32", "power": 2.0},
    "learner/capped": {"name": "outside.Capped"},
    "model/flat": {"name": "outside.Flat", "hidden": 12},
    "model/pooled": {"name": "outside.Pooled"},
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "outside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    for name, values in OWN.items():
        file = tmp_path / "own" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values))
    return tmp_path / "own"


def suite_of(own, name, axes, rows, columns):
    (own / "suite").mkdir(exist_ok=True)
    grid = {"mode": "MULTIRUN", "sweeper": {"params": {axis: ",".join(values) for axis, values in axes.items()}}}
    layout = {"suite": {"name": name, "rows": rows, "columns": columns, "baseline": None}, "hydra": grid}
    (own / "suite" / f"{name}.yaml").write_text("# @package _global_\n" + yaml.safe_dump(layout))


def table_of(own, name, tmp_path, *overrides):
    words = [f"suite={name}", *overrides, "threads=1", "epochs=6", f"paths.results={tmp_path}"]
    assert main([*words, "--config-dir", str(own)]) == 0
    return make_table(load_suite(name, words[1:], own), "smoke", read_records([tmp_path]))


def test_one_of_everything_from_outside_runs_and_is_a_row_of_a_table(own, tmp_path):
    axes = {
        "dataset": ["bars"],
        "noise": ["next"],
        "pruner": ["full", "best"],
        "score": ["powered"],
        "model": ["flat"],
        "learner": ["ce", "capped"],
    }
    suite_of(own, "mine", axes, ["pruner", "learner"], ["noise"])
    table = table_of(own, "mine", tmp_path)
    assert set(table.rows) == {"full ce", "full capped", "best ce", "best capped"}
    for row in table.rows:
        (run,) = table.runs(row, "next").to_dict("records")
        assert (run["dataset"], run["noise"]) == ("outside.Bars", "outside.Next")
        assert 0.1 < run["noise_rate"] < 0.8
        assert run["saved"] == pytest.approx(0.4 if row.startswith("best") else 0.0, abs=0.01)
    accuracies = [run["test_accuracy_final"] for run in table.long.to_dict("records")]
    assert max(accuracies) > 60
    assert "| best capped |" in markdown(table)


@pytest.mark.parametrize(
    ("place", "choice"),
    [
        ("own", "pruner=best score=powered"),
        ("own", "method=mine"),
        ("my own", "pruner=best score=powered pruner.part=0.3 score.power=3"),
        ("hydra.searchpath", "method=mine"),
    ],
)
def test_what_a_run_says_to_type_and_was_typed_finds_what_is_of_ones_own(
    own, tmp_path, monkeypatch, capsys, choice, place
):
    monkeypatch.chdir(tmp_path)
    (own / "method").mkdir()
    defaults = [{"override /pruner": "best"}, {"override /score": "powered"}]
    values = {"defaults": defaults, "method": "mine", "pruner": {"part": 0.7}}
    (own / "method" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(values))
    if place == "hydra.searchpath":
        folder = f"hydra.searchpath=[file://{own}]"
    else:
        own.rename(tmp_path / place)
        folder = f"--config-dir={place}"
    line = [folder, "dataset=bars", "noise=next", "model=flat", *choice.split(), "epochs=6", "threads=1"]
    assert main(line) == 0
    out = capsys.readouterr().out
    (environment,) = (json.loads(file.read_text()) for file in Path("results/runs").glob("*/environment.json"))
    (config,) = map(read_config, Path("results/runs").iterdir())
    assert main(shlex.split(environment["command"])[3:]) == 0
    assert "has finished already" in capsys.readouterr().out
    commands = [shlex.split(words)[3:] for words in re.findall(r"(\S+ -m alignprune_exp.train .*?) +# ", out)]
    assert len(commands) == 3
    for number, command in enumerate(commands):
        assert main([*command, f"paths.results={number}"]) == 0
    full, by_loss, seed = (read_config(next(Path(f"{number}/runs").iterdir())) for number in range(3))
    assert full["pruner"] == {"name": "full"}
    assert by_loss["pruner"] == config["pruner"]
    assert by_loss["score"]["name"] == "loss"
    assert seed == {**config, "seed": 1, "paths": seed["paths"]}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("pruner=best pruner.prt=0.5", "unknown key pruner.prt (did you mean part?); pruner=outside.Best has part"),
        (
            "score=powered score.powr=1",
            "unknown key score.powr (did you mean power?); score=outside.Powered has bank, power",
        ),
    ],
)
@pytest.mark.parametrize(
    "flag", ["--config-dir={}", "--config-dir {}", "-cd {}", "-m --config-dir={}", "hydra.searchpath=[file://{}]"]
)
def test_an_unknown_key_is_said_of_the_option_of_ones_own(own, tmp_path, capsys, line, sentence, flag):
    assert main([*flag.format(own).split(), *line.split(), f"paths.results={tmp_path / 'none'}"]) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_a_task_from_outside_is_judged_by_its_own_metric(own, tmp_path, capsys):
    suite_of(own, "lines", {"task": ["line"], "pruner": ["full", "infobatch"], "score": ["das"]}, ["pruner"], ["task"])
    table = table_of(own, "lines", tmp_path, "score.window=3", "optimizer.lr=0.05")
    assert (table.key, table.measured) == ("test_rmse_final", "test RMSE")
    values = {row: float(table.runs(row, "line")["test_rmse_final"].iloc[0]) for row in table.rows}
    assert set(values) == {"full", "infobatch"}
    best = min(values, key=values.get)
    (headline, *_) = blocks(table)
    assert [cells[0].text for cells in headline.body if cells[1].bold] == [best]
    assert "accuracy" not in markdown(table).lower()
    for record in table.records.values():
        kept = [row["kept_noise"] for row in record.rows]
        assert all(0 < value < 1 for value in kept)
        rmse = [row["test_rmse"] for row in record.rows]
        assert record.summary["test_rmse_best"] == min(rmse)
        assert math.isclose(rmse[-1] ** 2, record.rows[-1]["test_loss"], rel_tol=1e-9)
        dynamics = record.folder / "dynamics.parquet"
        assert dynamics.exists()
        assert (record.folder / "samples.parquet").exists()
    assert "test RMSE" in capsys.readouterr().out


def test_what_needs_class_labels_says_so_of_a_task_without(own, tmp_path, capsys):
    for words, named in (
        ("learner=elr", "learner=ce"),
        ("pruner=static_el2n", "every epoch"),
        ("reference=pseudo_cleanlab", "reference.method=small_loss"),
    ):
        overrides = ["task=line", words, f"paths.results={tmp_path / 'none'}", "--config-dir", str(own)]
        assert main(overrides) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert "needs class labels, and task=outside.Line has none" in sentence
        assert named in sentence
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("+score.power=10", "score.power=10 is out of range: use a value of at most 9"),
        ("+score.strength=2", "unknown key score.strength; score=outside.Powered has window, unseen, bank"),
        ("score.name=outside.Gone", "cannot be imported (AttributeError"),
        ("score.name=alignprune_exp.pruning.Score", "is what others are made of; name a subclass of it"),
        ("score.name=outside.Untold", "the types of outside.Untold cannot be told (name 'Gone' is not defined)"),
        ("score.name=outside.Unmade", "score=outside.Unmade cannot be made (TypeError: 'int' object is not callable)"),
        ("score.name=outside.Best", "is not a subclass of alignprune_exp.pruning.scores.Score"),
    ],
)
def test_a_mistake_in_what_is_from_outside_is_one_sentence(own, tmp_path, capsys, override, sentence):
    name = [] if override.startswith("score.name") else ["score.name=outside.Powered"]
    assert main([*name, override, f"paths.results={tmp_path / 'none'}"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said


@pytest.mark.parametrize("line", ["method=sieve_readout", "pruner=static_grand"])
def test_a_network_without_embeddings_is_refused_where_something_goes_by_them(own, tmp_path, capsys, line):
    results = tmp_path / "none"
    assert main([line, "model=pooled", "threads=1", f"paths.results={results}", "--config-dir", str(own)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("the network has no torch.nn.Linear, and what goes into its last one is asked for")
    assert not results.exists()


def test_an_import_path_can_be_given_on_the_command_line_and_its_defaults_are_its_own(own, tmp_path):
    results = tmp_path / "results"
    assert main(["score.name=outside.Powered", *SHORT, f"paths.results={results}"]) == 0
    (summary,) = results.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["score"] == "Powered"
    assert yaml.safe_load((summary.parent / "config.yaml").read_text())["score"]["power"] == 1.0


def test_an_optimizer_of_torchs_own_takes_the_keys_that_it_has_by_name():
    values = yaml.safe_load((config_dir() / "optimizer" / "sgd.yaml").read_text())
    node = OPTIMIZER.read(values | {"name": "torch.optim.AdamW", "weight_decay": 0.125, "lr": 0.25})
    (group,) = OPTIMIZER.make(node, [torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.125)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_what_is_built_in_takes_every_value_from_a_yaml(registry):
    files = (config_dir() / registry.kind).glob("*.yaml")
    named = {yaml.safe_load(file.read_text()).get("name") for file in files}
    assert set(registry.builtin) <= named
    name = next(iter(registry.builtin))
    assert all(field.is_required() for field in registry.schema(name).model_fields.values())
    with pytest.raises(UsageError, match=f"{registry.kind}.name=nothing is unknown.*; use one of {name}"):
        registry.find("nothing")
