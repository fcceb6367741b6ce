"""Suites, their status and their tables."""

import json
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir
from scipy import stats

from alignprune_exp.commandline import own_folder
from alignprune_exp.config import PRUNER
from alignprune_exp.errors import UsageError
from alignprune_exp.records import Damaged, read_dynamics, read_record, read_samples
from alignprune_exp.report.publish import main as publish
from alignprune_exp.report.tables import make_table, paired_difference, read_records
from alignprune_exp.report.texts import markdown
from alignprune_exp.status import main as status
from alignprune_exp.suites import load_suite, option_names
from alignprune_exp.suspects import main as suspects
from alignprune_exp.sweep import jobs_of
from alignprune_exp.tables import main as tables
from alignprune_exp.train import main
from harness import CONF, composed, sentence_of
from recorded import edit_json, edit_rows, write_record

SMALL = ["dataset=digits", "noise=clean,sym0.5", "method=full,infobatch", "epochs=6", "seed=0,1"]
SMALL += ["dataset.subset=100", "dataset.test_subset=50"]


@pytest.mark.parametrize("name", option_names("suite"))
def test_every_suite_of_the_paper_composes_at_smoke_scale(name):
    suite = load_suite(name, ["scale=smoke", "seed=0"])
    assert suite.cells
    assert suite.name == name
    labels = {" ".join(cell.axes[axis] for axis in suite.rows) for cell in suite.cells}
    assert suite.baseline is None or suite.baseline in labels


@pytest.mark.parametrize("name", ["equal_cost", "static", "regression"])
def test_the_jobs_of_a_suite_pass_the_sweep_s_checks(name):
    chosen = [f"suite={name}", "scale=smoke", "seed=0"]
    grid = [[f"{axis}={value}" for axis, value in cell.axes.items()] for cell in load_suite(name, chosen[1:]).cells]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        jobs = jobs_of(grid, lambda overrides: compose("train", [*overrides, *chosen]), here=False)
    assert len(jobs) == len({str(job.config) for job in jobs}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["quick", "cpu", "paper"])
@pytest.mark.parametrize("name", option_names("suite"))
def test_every_suite_of_the_paper_composes_at_every_scale(name, scale):
    assert {cell.config.scale for cell in load_suite(name, [f"scale={scale}", "seed=0"]).cells} == {scale}


@pytest.mark.suites
@pytest.mark.parametrize("name", ["static", "learners", "reference_free", "equal_cost"])
def test_a_suite_runs_at_smoke_scale_and_fills_its_table(name, tmp_path):
    line = [f"suite={name}", "scale=smoke", "dataset=digits", "noise=sym0.5", "seed=0", "dataset.subset=600"]
    line += ["epochs=14", "eval_every=7", f"paths.results={tmp_path}"]
    assert main(line) == 0
    table = make_table(load_suite(name, line[1:-1]), "smoke", read_records([tmp_path]))
    assert not any(table.runs(row, column).empty for row in table.rows for column in table.columns)


def test_cells_are_the_configs_that_the_sweep_would_run():
    for cell in load_suite("anneal", ["scale=cpu", "dataset=digits"]).cells[::7]:
        assert composed(*(f"{axis}={value}" for axis, value in cell.axes.items())) == cell.config


def test_full_is_one_run_whatever_the_score():
    suite = load_suite("score", ["dataset=digits", "pruner=full"])
    assert len({cell.config_id for cell in suite.cells}) == 3  # its seeds


OWN = """
# @package _global_
suite: {name: mine, rows: score, columns: noise, baseline: loss}
hydra:
  mode: MULTIRUN
  sweeper:
    params: {dataset: digits, noise: sym0.5, score: "loss,das", seed: "0,1"}
"""


@pytest.fixture
def own(tmp_path):
    """A folder of configs of one's own, with a suite."""
    (tmp_path / "own" / "suite").mkdir(parents=True)
    (tmp_path / "own" / "suite" / "mine.yaml").write_text(OWN)
    return tmp_path / "own"


def test_a_suite_of_ones_own_runs_and_is_known_to_status(own, tmp_path, capsys):
    line = [f"--config-dir={own}", "suite=mine", "epochs=5", "score.window=3", "dataset.subset=100"]
    line += ["dataset.test_subset=20", f"paths.results={tmp_path / 'results'}"]
    assert main(line) == 0
    assert "4 runs to do" in capsys.readouterr().out
    assert status(line) == 0
    assert "4 done of 4 runs" in capsys.readouterr().out
    assert "mine" in option_names("suite", own)
    assert "mine" not in option_names("suite")


@pytest.mark.parametrize("program", [status, publish])
@pytest.mark.parametrize("asked", [["--help"], ["-h"], ["suite=main", "--help"]])
def test_help_is_no_mistake(place, capsys, program, asked):
    with pytest.raises(SystemExit) as end:
        program(asked)
    said = capsys.readouterr()
    assert (end.value.code, said.err) == (0, "")
    assert "suite=NAME" in said.out
    assert " sieve, " in said.out
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("typed", [["--config-dir", "nowhere"], ["--config-dir=nowhere"], ["--config-dir="]])
@pytest.mark.parametrize("program", [main, status, publish, tables])
def test_what_is_no_folder_of_ones_own_options_is_said_before_anything(program, typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program([*(["suite=main"] if program is not tables else []), *typed]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.match("--config-dir (nowhere)? ?is not a folder; give one with options of your own", sentence)
    assert not list(tmp_path.iterdir())


def test_a_key_that_not_all_rows_have_is_said_in_the_same_words_by_all_programs(tmp_path, capsys):
    """Method is an axis of the suite, and what a pruner has is no key of another one."""
    line = ["suite=main", "scale=smoke", "dataset=digits", "pruner.ratio=0.5", f"paths.results={tmp_path / 'none'}"]
    said = []
    for program in (main, status, publish):
        assert program(line) == 2
        said.append(capsys.readouterr().err.partition(" (in the job ")[0])
    assert re.fullmatch(
        "unknown key pruner.ratio; it belongs to pruner=.*infobatch.*; pruner=full has no keys", said[0]
    )
    assert said == said[:1] * 3


def test_a_suite_from_the_cache_is_the_suite(own, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = load_suite("mine", ["scale=smoke"], own)
    (cached,) = (tmp_path / "cache").rglob("*.json")
    monkeypatch.setattr("alignprune_exp.suites.compose", None)  # whoever composes again fails
    assert load_suite("mine", ["scale=smoke"], own) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached.write_text("{")
    assert load_suite("mine", ["scale=smoke"], own) == first
    (own / "suite" / "mine.yaml").write_text(OWN.replace("0,1", "0,1,2"))
    assert len(load_suite("mine", ["scale=smoke"], own).cells) == 6


def test_a_cache_that_cannot_be_written_is_no_mistake(own, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_suite("mine", [], own).cells) == 4


def test_a_scale_may_change_the_grid_and_the_command_line_wins(own):
    (own / "suite" / "mine.yaml").write_text(OWN.replace("baseline: loss", "baseline: loss, at: {cpu: {seed: '5,6'}}"))
    for line, seeds in (
        ([], {0, 1}),
        (["scale=cpu"], {5, 6}),
        (["scale=smoke"], {0, 1}),
        (["scale=cpu", "seed=3"], {3}),
    ):
        assert {cell.config.seed for cell in load_suite("mine", line, own).cells} == seeds


EXCLUDING = OWN.replace("baseline: loss", "baseline: loss, exclude: [{score: das, seed: 1}]")


@pytest.mark.parametrize(
    ("line", "left_out"),
    [([], True), (["epochs=20"], True), (["seed=0,1"], True), (["score=das,loss", "seed=1,0"], False)],
)
def test_a_suite_leaves_cells_out_unless_the_command_line_chooses_their_axes(own, line, left_out):
    (own / "suite" / "mine.yaml").write_text(EXCLUDING)
    cells = {(cell.axes["score"], cell.axes["seed"]) for cell in load_suite("mine", line, own).cells}
    assert len(cells) == 4 - left_out
    assert (("das", "1") not in cells) == left_out


def test_a_suite_is_of_one_scale_however_it_is_quoted():
    plain, quoted = (load_suite("window", [f"scale={scale}"]).cells for scale in ("quick", "'quick'"))
    assert [cell.config_id for cell in plain] == [cell.config_id for cell in quoted]
    with pytest.raises(UsageError, match="suite=window is of one scale; type a line for each"):
        load_suite("window", ["scale=quick,cpu"])


def test_runs_that_differ_by_what_a_table_is_not_laid_out_by_are_not_pooled():
    with pytest.raises(UsageError, match=r"suite=window has several values of optimizer\.lr, by which"):
        load_suite("window", ["optimizer.lr=0.1,0.01"])
    assert len(load_suite("window", ["optimizer.lr=0.1"]).cells) == len(load_suite("window").cells)


@pytest.mark.parametrize("key", ["rows", "columns", "baseline"])
def test_a_suite_that_says_too_little_of_its_table_is_refused(own, key):
    file = own / "suite" / "mine.yaml"
    file.write_text(re.sub(rf", {key}: \w+", "", OWN))
    with pytest.raises(UsageError, match=rf"suite=mine does not say suite\.{key}"):
        load_suite("mine", own=own)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (
            "rows: score, columns: noise, baseline: los",
            "suite.baseline=los, which is no row of its table (did you mean loss?)",
        ),
        ("rows: score, columns: noise, baseline: full", "no row of its table; use one of loss, das, or null"),
        ("rows: [score, noise], columns: seed, baseline: loss", "use one of loss sym0.5, das sym0.5, or null"),
        ("rows: scoer, columns: noise, baseline: loss", "lays its table out by scoer, which is no axis"),
        ("rows: score, columns: [noise, 5], baseline: loss", "lays its table out by 5, which is no axis"),
        ("rows: score, columns: noise", "does not say suite.baseline"),
        (
            "rows: score, columns: noise, baseline: loss, exlude: [{score: das}]",
            "says suite.exlude, which nothing reads (did you mean exclude?)",
        ),
        (
            "rows: score, columns: noise, baseline: loss, paper: {columns: [sym0.5], loss: [1, 2]}",
            "has 2 numbers in suite.paper.loss, and 1 in suite.paper.columns; write one a column",
        ),
        (
            "rows: score, columns: noise, baseline: loss, paper: {columns: [sym0.5], loss: 1}",
            "suite.paper.loss=1; write a list of numbers",
        ),
        (
            "rows: score, columns: noise, baseline: loss, paper: {columns: [sym0.5], loss: ['1']}",
            "suite.paper.loss=['1']; write a list of numbers",
        ),
        ("rows: score, columns: noise, baseline: loss, paper: {loss: [1]}", "does not say suite.paper.columns"),
        ("rows: score, columns: noise, baseline: loss, paper: [1]", "does not say suite.paper.columns"),
    ],
)
def test_a_suite_whose_table_cannot_be_laid_out_is_one_sentence_before_any_run(own, tmp_path, capsys, layout, words):
    (own / "suite" / "mine.yaml").write_text(OWN.replace("rows: score, columns: noise, baseline: loss", layout))
    line = [f"--config-dir={own}", "suite=mine", f"paths.results={tmp_path / 'results'}"]
    for command in (main, status):
        assert command(line) == 2
        assert words in sentence_of(capsys.readouterr().err)
    assert not (tmp_path / "results").exists()


def test_an_option_of_ones_own_that_the_programs_own_would_hide_is_refused(own, capsys):
    (own / "suite" / "main.yaml").write_text(OWN)
    for command in (main, status):
        assert command([f"--config-dir={own}", "suite=main", "scale=smoke"]) == 2
        assert f"{own}/suite/main.yaml would not be read" in sentence_of(capsys.readouterr().err)
    assert main([f"hydra.searchpath=[file://{own}]", "suite=main", "scale=smoke"]) == 2
    assert f"{own}/suite/main.yaml would not be read" in sentence_of(capsys.readouterr().err)
    assert main(["hydra.searchpath=['file:///nonexistent']"]) == 2
    assert "hydra.searchpath /nonexistent is not a folder" in sentence_of(capsys.readouterr().err)
    shutil.copy(CONF / "suite" / "main.yaml", own / "suite")
    assert load_suite("mine", own=own_folder(own)).cells


def test_a_baseline_may_be_outside_what_the_command_line_chooses(own):
    assert {cell.axes["score"] for cell in load_suite("mine", ["score=das"], own).cells} == {"das"}
    (own / "suite" / "mine.yaml").write_text(OWN.replace("baseline: loss", "baseline: random"))
    assert len(load_suite("mine", ["score=das,random"], own).cells) == 4


def test_a_sweep_leaves_out_the_same_cells(own, tmp_path, capsys):
    (own / "suite" / "mine.yaml").write_text(EXCLUDING)
    line = [f"--config-dir={own}", "suite=mine", "epochs=5", "score.window=3", "dataset.subset=100"]
    line += ["dataset.test_subset=20", f"paths.results={tmp_path / 'results'}"]
    assert main(line) == 0
    assert "3 runs to do" in capsys.readouterr().out
    assert status(line) == 0
    assert "3 done of 3 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{scoer: das, seed: 1}", "excludes by scoer"),
        ("{score: dsa, seed: 1}", "excludes score=dsa"),
        ("{score: null}", "excludes score=null"),
        ("score", "no mapping"),
    ],
)
def test_a_suite_that_excludes_what_its_grid_does_not_have_is_refused(own, entry, words):
    (own / "suite" / "mine.yaml").write_text(EXCLUDING.replace("{score: das, seed: 1}", entry))
    with pytest.raises(UsageError, match=words):
        load_suite("mine", [], own)


def test_narrowing_a_suite_keeps_what_it_leaves_out():
    assert len(load_suite("static", ["scale=cpu", "dataset=cifar10", "seed=0"]).cells) == 28
    assert len(load_suite("reference_free", ["dataset=cifar100", "seed=0"]).cells) == 4


def test_a_sweep_without_its_data_is_one_sentence_before_the_first_run(tmp_path, capsys):
    line = [
        "suite=controls",
        "scale=smoke",
        "seed=0",
        f"paths.data={tmp_path}",
        f"paths.results={tmp_path / 'results'}",
    ]
    assert main(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{tmp_path}/cifar10 is not a folder" in sentence_of(captured.err)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_methods_of_the_static_suite_save_what_their_column_says(scale):
    cells = load_suite("static", [f"scale={scale}", "seed=0"]).cells
    assert len({cell.config_id for cell in cells}) == len(cells) - 2  # full is one run in both columns
    for cell in cells:
        pruner, saved = PRUNER.make(cell.config.pruner), float(cell.axes["saved"])
        assert pruner == pruner.saving(saved, cell.config.epochs)


def test_a_sweep_goes_by_what_the_scale_changes_too(own, tmp_path, capsys):
    (own / "suite" / "mine.yaml").write_text(OWN.replace("baseline: loss", "baseline: loss, at: {smoke: {seed: '5'}}"))
    line = [f"--config-dir={own}", "suite=mine", "epochs=5", "score.window=3", "dataset.subset=100"]
    line += ["dataset.test_subset=20", f"paths.results={tmp_path / 'results'}"]
    assert main(line) == 0
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("runs/*/summary.json")]
    assert [summary["seed"] for summary in summaries] == [5, 5]
    status(line)
    assert "2 done of 2 runs" in capsys.readouterr().out


def test_the_papers_values_are_those_of_its_table():
    paper = load_suite("main", ["scale=smoke", "seed=0"]).paper
    assert paper["infobatch_das"]["sym0.5"] - paper["infobatch"]["sym0.5"] == pytest.approx(6.3)
    assert paper["full"] == {"clean": 78.2, "real": 56.1, "sym0.5": 58.6, "sym0.8": 39.8, "asym0.2": 72.4}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The results of a small sweep with one run missing."""
    results = tmp_path_factory.mktemp("swept")
    assert main(["suite=main", *SMALL, f"paths.results={results}"]) == 0
    (summary,) = (path for path in results.glob("runs/*/summary.json") if _is(path, "infobatch", "sym", 1))
    summary.rename(summary.with_name("elsewhere"))
    return results


def _is(path, pruner, noise, seed):
    summary = json.loads(path.read_text())
    return (summary["pruner"], summary["noise"], summary["seed"]) == (pruner, noise, seed)


def test_status_tells_done_from_missing_and_changes_nothing(swept, capsys):
    before = sorted(swept.rglob("*"))
    assert status(["suite=main", *SMALL, f"paths.results={swept}"]) == 0
    out = capsys.readouterr().out
    assert "7 done, 1 damaged of 8 runs" in out
    assert ": summary.json: not there, nor is a checkpoint" in out
    assert sorted(swept.rglob("*")) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_damaged(swept, tmp_path, capsys):
    results = tmp_path / "killed"
    shutil.copytree(swept, results)
    (ended,) = (path.with_name("summary.json") for path in results.glob("runs/*/elsewhere"))
    ended.with_name("elsewhere").unlink()
    metrics = ended.with_name("metrics.jsonl")
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    assert status(["suite=main", *SMALL, f"paths.results={results}"]) == 0
    assert "7 done, 1 interrupted of 8 runs" in capsys.readouterr().out
    assert read_record(ended.parent) is None
    config = ended.with_name("config.yaml")
    config.write_text(re.sub(r"checkpoint_seconds: .*", "checkpoint_seconds: 0", config.read_text()))
    assert read_record(ended.parent) is None  # its first row may be what came before the checkpoint
    metrics.write_text(metrics.read_text() + metrics.read_text().replace('"epoch": 0', '"epoch": 1'))
    with pytest.raises(Damaged, match="nor is a checkpoint"):
        read_record(ended.parent)


def test_what_a_run_writes_is_a_whole_record(swept, capsys):
    records = [read_record(path.parent) for path in swept.glob("runs/*/summary.json")]
    assert len(records) == 7
    for record in records:
        assert len(read_dynamics(record)) > 0
        assert len(read_samples(record.folder)) == record.summary["samples"]
        facts = pq.read_schema(record.folder / "samples.parquet").metadata
        assert (facts[b"run"], facts[b"classes"]) == (record.folder.name.encode(), b"10")
    assert suspects([str(records[0].folder), "--top", "3"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert err.startswith("listed by settled,")


def test_table_cells_are_mean_and_spread_over_seeds(swept):
    table = make_table(load_suite("main", SMALL), "smoke", read_records([swept]))
    cell = table.runs("infobatch", "clean")["test_accuracy_final"].tolist()
    found = [json.loads(path.read_text()) for path in swept.glob("runs/*/summary.json")]
    expected = [s["test_accuracy_final"] for s in found if (s["pruner"], s["noise"]) == ("infobatch", "clean")]
    assert sorted(cell) == sorted(expected)
    text = markdown(table)
    assert f"{statistics.mean(expected):.1f} ± {statistics.stdev(expected):.1f}" in text
    assert "(n=1)" in text  # the run that is missing
    assert all(s["id"] in text for s in found)


def test_the_same_sweep_again_runs_only_what_is_missing(swept, capsys):
    assert main(["suite=main", *SMALL, f"paths.results={swept}"]) == 0
    out = capsys.readouterr().out
    assert "1 runs to do, 7 finished already" in out
    assert out.count("record  ") == 1


def test_a_run_that_another_process_has_is_counted_as_running_and_the_sweep_goes_on(tmp_path, capsys):
    line = ["dataset.subset=100", "dataset.test_subset=50", "epochs=6", "score.window=3", f"paths.results={tmp_path}"]
    assert main([*line, "seed=0"]) == 0
    (done,) = tmp_path.glob("runs/*")
    (done / "summary.json").unlink()
    owner = "import sys; from pathlib import Path; from alignprune_exp.runs import Lock; Lock(Path(sys.argv[1])); "
    owner += "print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", owner, done / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "mine\n"
        assert main(["-m", *line, "seed=0,1"]) == 0
        captured = capsys.readouterr()
        assert "1 of 2 runs are running elsewhere" in captured.out
        assert "is running elsewhere" in captured.err
        assert main(["-m", *line, "seed=1,0"]) == 0
        assert main([*line, "seed=0"]) == 3
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 1


def test_paired_difference_is_students_interval_on_few_seeds():
    rng = np.random.default_rng(0)
    ours, base = pd.Series(rng.normal(1, 1, 5)), pd.Series(rng.normal(0, 1, 5))
    mean, low, high = paired_difference(ours, base)
    interval = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert (low, high) == pytest.approx((interval.low, interval.high))
    assert mean == pytest.approx((ours - base).mean())


def test_paired_difference_is_a_bootstrap_on_many_seeds():
    difference = pd.Series(np.random.default_rng(1).normal(0.5, 1, 40))
    _, low, high = paired_difference(difference, pd.Series(np.zeros(40)))
    reference = stats.bootstrap((difference,), np.mean, method="percentile", rng=np.random.default_rng(2))
    assert (low, high) == pytest.approx(tuple(reference.confidence_interval), abs=0.03)


def test_paired_difference_takes_common_seeds_only():
    assert paired_difference(pd.Series({0: 5.0, 1: 9.0}), pd.Series({0: 3.0}))[0] == 2.0
    assert paired_difference(pd.Series({0: 5.0}), pd.Series({1: 3.0})) is None


def test_two_records_of_one_run_with_different_results_are_refused(tmp_path):
    for folder, accuracy in (("a", 50.0), ("b", 51.0)):
        write_record(tmp_path / folder, "0123", "4", accuracy)
    with pytest.raises(UsageError, match="different results"):
        read_records([tmp_path / "a", tmp_path / "b"])


def test_two_records_of_one_run_with_other_numbers_are_named_below_its_tables(tmp_path):
    suite = load_suite("main", [*SMALL, "noise=sym0.5", "seed=0"])
    shown, other = (suite.cells[place].config_id for place in (0, 1))
    a, b, c = (tmp_path / name for name in "abc")
    write_record(a, "0123", shown, 50.0)
    write_record(a, "4567", other, 60.0)
    write_record(b, "0123", shown, 50.0, kept_noise_mean=0.4 + 1e-15, noise_estimate=0.2, seconds_train=8.5)
    write_record(c, "0123", shown, 51.0, commit="d" * 40, kept_noise_mean=0.8)

    def notes(*folders):
        return [note for note in make_table(suite, "smoke", read_records(folders)).notes if "other numbers" in note]

    edit_rows(b / "runs" / "0123", lambda rows: [row | {"seconds_test": 1.75} for row in rows])
    assert notes(a, b) == []  # a bit, a number that one of them does not have, and times
    (note,) = notes(a, b, c)
    assert note == (
        f"Of run 0123 the record in {a}/runs/0123 is shown, and not that in {c}/runs/0123, which holds other numbers; "
        "the largest difference: kept_noise_mean is 0.4 in the first and 0.8 in the second."
    )
    (turned,) = notes(c, a)
    assert turned.endswith("kept_noise_mean is 0.8 in the first and 0.4 in the second.")
    edit_json(b / "runs" / "0123" / "summary.json", kept_noise_weighted_mean=0.55)
    assert len(notes(a, b)) == 1  # of the same commit, and with the same result
    assert len(notes(a, b, c)) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["suite=man"], ["man", "main", "controls"]),
        ([], ["suite=NAME"]),
        (["suite=main", "scale=huge"], ["scale=huge", "cpu"]),
        (["suite=main", "pruner=seta"], ["method", "pruner"]),
    ],
)
def test_mistakes_get_one_sentence(arguments, words, capsys):
    assert status(arguments) == 2
    err = sentence_of(capsys.readouterr().err)
    assert all(word in err for word in words)


def test_status_of_a_suite_that_was_composed_before_imports_no_torch():
    load_suite("controls", ["scale=cpu"])
    code = "import sys; from alignprune_exp.status import main; main(['suite=controls', 'scale=cpu']); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_make_tables_says_when_there_is_nothing(tmp_path):
    command = [sys.executable, "-m", "alignprune_exp.tables", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    sentence_of(done.stderr)
