"""Damaged records: whatever is wrong with one is named, it is left out, and no number moves."""

import io
import json
import random
import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignprune_exp.console import one_line
from alignprune_exp.errors import UsageError
from alignprune_exp.records import Damaged, read_dynamics, read_record, read_samples, write_parquet
from alignprune_exp.report.figures import losses
from alignprune_exp.report.tables import make_table, read_records
from alignprune_exp.report.texts import long_csv, markdown
from alignprune_exp.status import main as status
from alignprune_exp.status import overview as print_overview
from alignprune_exp.status import state
from alignprune_exp.suites import load_suite
from alignprune_exp.suspects import main as suspects
from recorded import edit_json, edit_rows, write_record, write_samples

GRID = ["scale=smoke", "dataset=digits", "noise=sym0.5", "method=full,infobatch", "seed=0"]
GOOD, OTHER = "0123456789ab", "ba9876543210"  # the run that is damaged, and one beside it


@pytest.fixture(scope="module")
def suite():
    return load_suite("main", GRID)


@pytest.fixture(scope="module")
def whole(suite, tmp_path_factory):
    """Two whole records, and what is made of them."""
    results = tmp_path_factory.mktemp("whole")
    ids = {"full": OTHER, "infobatch": GOOD}
    for cell, accuracy in zip(suite.cells, (60.0, 70.0), strict=True):
        write_record(results, ids[cell.axes["method"]], cell.config_id, accuracy, epochs=4, saved=0.5)
    table = make_table(suite, "smoke", read_records([results]))
    assert len(table.long) == 2
    return results, markdown(table), long_csv(table)


@pytest.fixture
def run(whole, tmp_path):
    """The folder of a copy of one of them, to be damaged."""
    shutil.copytree(whole[0], tmp_path / "results")
    return tmp_path / "results" / "runs" / GOOD


def on(name, change):
    """Return a damage to the bytes of a file."""
    return lambda run: (run / name).write_bytes(change((run / name).read_bytes()))


def text(name, old, new):
    """Return a damage to the text of a file; what it replaces must be there."""

    def damage(run):
        content = (run / name).read_text()
        assert old in content
        (run / name).write_text(content.replace(old, new, 1))

    return damage


def key(name, **changes):
    return lambda run: edit_json(run / name, **changes)


def rows(change):
    return lambda run: edit_rows(run, change)


def row(number, **changes):
    """Return a damage to keys of one row; ``...`` removes one."""

    def change(all_rows):
        changed = {key: value for key, value in (all_rows[number] | changes).items() if value is not ...}
        return [changed if place == number else row for place, row in enumerate(all_rows)]

    return rows(change)


def of_the_other(name):
    return lambda run: shutil.copy(run.with_name(OTHER) / name, run / name)


def a_folder(name):
    def damage(run):
        (run / name).unlink()
        (run / name).mkdir()

    return damage


def parquet(name, change):
    """Return a damage to the table in a file, which stays a whole file."""

    def damage(run):
        write_parquet(run / name, change(pq.read_table(run / name)), classes=10)

    return damage


def with_column(column, change):
    """Return a change of one column, which NumPy has computed."""

    def changed(table):
        values = pa.array(change(table[column].to_numpy()), from_pandas=True)
        return table.set_column(table.column_names.index(column), column, values)

    return changed


WHOLE_FILE = {
    "not there": lambda name: lambda run: (run / name).unlink(),
    "empty": lambda name: on(name, lambda data: b""),
    "half": lambda name: on(name, lambda data: data[: len(data) // 2]),
    "zeros": lambda name: on(name, lambda data: bytes(len(data))),
    "binary": lambda name: on(name, lambda data: bytes(range(256))),
    "a folder": a_folder,
    "a web page": lambda name: on(name, lambda data: b"<!doctype html>"),
}
JSON_FILE = {
    "a list": lambda name: on(name, lambda data: b"[" + data.splitlines()[0] + b"]"),
    "a number": lambda name: on(name, lambda data: b"7\n"),
    "null": lambda name: on(name, lambda data: b"null\n"),
    "deep": lambda name: on(name, lambda data: b'{"a":' * 100_000),
}
LEFT_OUT = {
    **{
        f"{name}: {what}": (name, damage(name))
        for name in ("summary.json", "environment.json", "metrics.jsonl")
        for what, damage in (WHOLE_FILE | JSON_FILE).items()
    },
    "summary.json: accuracy is a text": ("summary.json", key("summary.json", test_accuracy_final="70.0")),
    "summary.json: accuracy above 100": ("summary.json", key("summary.json", test_accuracy_final=700.0)),
    "summary.json: accuracy is NaN": ("summary.json", key("summary.json", test_accuracy_final=float("nan"))),
    "summary.json: accuracy is null": ("summary.json", key("summary.json", test_accuracy_best=None)),
    "summary.json: accuracy is another": ("metrics.jsonl", key("summary.json", test_accuracy_final=71.0)),
    "summary.json: best is another": ("metrics.jsonl", key("summary.json", test_accuracy_best=74.0)),
    "summary.json: saved above 1": ("summary.json", key("summary.json", saved=1.5)),
    "summary.json: saved is another": ("metrics.jsonl", key("summary.json", saved=0.25)),
    "summary.json: seconds below 0": ("summary.json", key("summary.json", seconds_total=-1.0)),
    "summary.json: seconds are infinite": ("summary.json", text("summary.json", "24.0", "1e999")),
    "summary.json: seconds are another": ("metrics.jsonl", key("summary.json", seconds_total=25.0)),
    "summary.json: noise above 1": ("summary.json", key("summary.json", kept_noise_mean=40.0)),
    "summary.json: AUROC is another": ("metrics.jsonl", key("summary.json", detection_auroc_last=0.5)),
    "summary.json: epochs are a text": ("summary.json", key("summary.json", epochs="4")),
    "summary.json: epochs are true": ("summary.json", key("summary.json", epochs=True)),
    "summary.json: epochs are huge": ("summary.json", key("summary.json", epochs=10**30)),
    "summary.json: more epochs": ("metrics.jsonl", key("summary.json", epochs=5)),
    "summary.json: a warm-up that was none": ("metrics.jsonl", key("summary.json", warmup_epochs=1)),
    "summary.json: no config id": ("summary.json", key("summary.json", config_id=...)),
    "summary.json: no commit": ("summary.json", key("summary.json", commit=...)),
    "summary.json: no noise rate": ("summary.json", key("summary.json", noise_rate=...)),
    "summary.json: no data set": ("summary.json", key("summary.json", dataset=...)),
    "summary.json: a list for a seed": ("summary.json", key("summary.json", seed=[0])),
    "summary.json: an object beside": ("summary.json", key("summary.json", more={"a": 1})),
    "summary.json: another metric is a text": ("summary.json", key("summary.json", test_top5_final="70.0")),
    "summary.json: the noise estimate is a text": ("summary.json", key("summary.json", noise_estimate="0.4")),
    "summary.json: the noise estimate above 1": ("summary.json", key("summary.json", noise_estimate=40.0)),
    "summary.json: half of another headline": ("summary.json", key("summary.json", headline_name="rmse")),
    "summary.json: a headline without its name": ("summary.json", key("summary.json", headline_digits=3)),
    "summary.json: a headline that is null": (
        "summary.json",
        key("summary.json", headline_name=None, headline_words="test RMSE"),
    ),
    "summary.json: another status": ("summary.json", key("summary.json", status="done")),
    "summary.json: a list for a status": ("summary.json", key("summary.json", status=["finished"])),
    "summary.json: a failure without its error": ("summary.json", key("summary.json", status="failed")),
    "summary.json: another config's": ("environment.json", key("summary.json", config_id="c" * 12)),
    "summary.json: of the other run": ("summary.json", of_the_other("summary.json")),
    "environment.json: no precision": ("environment.json", key("environment.json", precision=...)),
    "environment.json: a number for a command": ("environment.json", key("environment.json", command=7)),
    "environment.json: of the other run": ("environment.json", of_the_other("environment.json")),
    "metrics.jsonl: of the other run": ("metrics.jsonl", of_the_other("metrics.jsonl")),
    "metrics.jsonl: half of the rows": ("metrics.jsonl", rows(lambda rows: rows[:2])),
    "metrics.jsonl: the later half": ("metrics.jsonl", rows(lambda rows: rows[2:])),
    "metrics.jsonl: a torn last line": ("metrics.jsonl", on("metrics.jsonl", lambda data: data[:-20])),
    "metrics.jsonl: a row twice": ("metrics.jsonl", rows(lambda rows: [*rows[:2], *rows[1:]])),
    "metrics.jsonl: the last row twice": ("metrics.jsonl", rows(lambda rows: [*rows, rows[-1]])),
    "metrics.jsonl: a row in another's place": ("metrics.jsonl", rows(lambda rows: [*rows[:2], rows[1], rows[3]])),
    "metrics.jsonl: rows swapped": ("metrics.jsonl", rows(lambda rows: [rows[1], rows[0], *rows[2:]])),
    "metrics.jsonl: backwards": ("metrics.jsonl", rows(lambda rows: rows[::-1])),
    "metrics.jsonl: an empty line": (
        "metrics.jsonl",
        on("metrics.jsonl", lambda data: data.replace(b"\n", b"\n\n", 1)),
    ),
    "metrics.jsonl: lines run together": ("metrics.jsonl", on("metrics.jsonl", lambda data: data.replace(b"\n", b" "))),
    "metrics.jsonl: no AUROC at the end": ("metrics.jsonl", row(3, auroc_loss=...)),
    "metrics.jsonl: no accuracy in the first row": ("metrics.jsonl", row(0, test_accuracy=...)),
    "metrics.jsonl: another metric is true": ("metrics.jsonl", row(3, test_top5=True)),
    "metrics.jsonl: no seconds": ("metrics.jsonl", row(1, seconds=...)),
    "metrics.jsonl: seconds are a text": ("metrics.jsonl", row(1, seconds="6.0")),
    "metrics.jsonl: seconds below 0": ("metrics.jsonl", row(1, seconds_select=-0.1)),
    "metrics.jsonl: other seconds": ("metrics.jsonl", row(1, seconds_test=1.0)),
    "metrics.jsonl: a part of the seconds above their sum": ("metrics.jsonl", row(0, seconds_score=6.5)),
    "metrics.jsonl: a choice of more seconds than there were": ("metrics.jsonl", row(0, seconds_select=6.5)),
    "metrics.jsonl: parts of the seconds that come to more": ("metrics.jsonl", row(0, seconds_train=3.7)),
    "metrics.jsonl: AUROC above 1": ("metrics.jsonl", row(3, auroc_loss=1.1)),
    "metrics.jsonl: AUROC is a text": ("metrics.jsonl", row(3, auroc_loss="0.1")),
    "metrics.jsonl: AUROC is true": ("metrics.jsonl", row(3, auroc_loss=True)),
    "metrics.jsonl: AUROC is NaN": ("metrics.jsonl", row(3, auroc_loss=float("nan"))),
    "metrics.jsonl: kept noise above 1": ("metrics.jsonl", row(0, kept_noise=1.01)),
    "metrics.jsonl: kept noise is a list": ("metrics.jsonl", row(0, kept_noise=[0.4])),
    "metrics.jsonl: the epoch is 1.0": ("metrics.jsonl", row(1, epoch=1.0)),
    "metrics.jsonl: the epoch is below 0": ("metrics.jsonl", row(0, epoch=-1)),
    "metrics.jsonl: infinite loss": ("metrics.jsonl", row(0, train_loss=float("inf"))),
    "metrics.jsonl: fewer samples seen": ("metrics.jsonl", row(3, samples_seen=150)),
    "metrics.jsonl: samples are huge": ("metrics.jsonl", row(3, samples_seen=10**400)),
    "the folder: another name": ("summary.json", lambda run: run.rename(run.with_name("0" * 12))),
}
NOT_DRAWN = {
    **{what: damage("dynamics.parquet") for what, damage in WHOLE_FILE.items()},
    "of the other run": of_the_other("dynamics.parquet"),
    "half of the rows": parquet("dynamics.parquet", lambda table: table[: len(table) // 2]),
    "no rows": parquet("dynamics.parquet", lambda table: table[:0]),
    "no group": parquet("dynamics.parquet", lambda table: table.drop_columns("group")),
    "two groups": parquet("dynamics.parquet", lambda table: table.append_column("group", table["group"])),
    "values are texts": parquet("dynamics.parquet", with_column("value", lambda values: values.astype(str))),
    "values are missing": parquet("dynamics.parquet", with_column("value", lambda values: values * np.nan)),
    "values are infinite": parquet("dynamics.parquet", with_column("value", lambda values: values * np.inf)),
    "epochs are fractions": parquet("dynamics.parquet", with_column("epoch", lambda values: values / 2)),
    "epochs beyond the last": parquet("dynamics.parquet", with_column("epoch", lambda values: values + 1)),
}
SAMPLES = {
    **{what: damage("samples.parquet") for what, damage in WHOLE_FILE.items()},
    "of the other run": of_the_other("samples.parquet"),
    "half of the rows": parquet("samples.parquet", lambda table: table[: len(table) // 2]),
    "no rows": parquet("samples.parquet", lambda table: table[:0]),
    "rows twice": parquet("samples.parquet", lambda table: pa.concat_tables([table, table])),
    "no label": parquet("samples.parquet", lambda table: table.drop_columns("label")),
    "two labels": parquet("samples.parquet", lambda table: table.append_column("label", table["label"])),
    "an index twice": parquet("samples.parquet", with_column("index", lambda values: values // 9)),
    "an index below 0": parquet("samples.parquet", with_column("index", lambda values: values - 1)),
    "a label below 0": parquet("samples.parquet", with_column("label", lambda values: values - 1)),
    "a label beyond the classes": parquet("samples.parquet", with_column("label", lambda values: values + 1)),
    "a label is 1.5": parquet("samples.parquet", with_column("label", lambda values: values + 0.5)),
    "labels are texts": parquet("samples.parquet", with_column("label", lambda values: values.astype(str))),
    "labels are missing": parquet("samples.parquet", with_column("label", lambda v: np.where(v, v, np.nan))),
    "clean labels are missing": parquet(
        "samples.parquet", with_column("clean_label", lambda v: np.where(v, v, np.nan))
    ),
    "a clean label beyond the classes": parquet("samples.parquet", with_column("clean_label", lambda v: v * 9)),
    "predicted below -1": parquet("samples.parquet", with_column("predicted", lambda values: values - 2)),
    "scores are texts": parquet("samples.parquet", with_column("score_settled", lambda values: values.astype(str))),
    "scores are infinite": parquet("samples.parquet", with_column("score_settled", lambda values: values * np.inf)),
    "selected more often": parquet("samples.parquet", with_column("times_selected", lambda values: values + 1)),
    "selected below 0": parquet("samples.parquet", with_column("times_selected", lambda values: values - 3)),
}
HARMLESS = {  # with the reason why
    "no newline at the end: the row is whole": on("metrics.jsonl", lambda data: data.removesuffix(b"\n")),
    "newlines of Windows: JSON takes them for spaces": on("metrics.jsonl", lambda data: data.replace(b"\n", b"\r\n")),
    "a file beside: nothing reads it": lambda run: (run / "notes.txt").write_text("x"),
    "half a file of a killed process: nothing reads it": lambda run: (run / ".metrics.jsonl.7").write_text("{"),
    "no config: tables compose it anew": lambda run: (run / "config.yaml").unlink(),
    "half a config: tables compose it anew": on("config.yaml", lambda data: data[: len(data) // 2]),
    "no samples: tables do not read them": lambda run: (run / "samples.parquet").unlink(),
    "no number of samples: older versions did not write it": key("summary.json", samples=...),
    "an unknown commit: a package outside a checkout has none": key("summary.json", commit=None),
    "planned epochs that are null: as many as there were": key("summary.json", planned_epochs=None),
    "a checkpoint: it is for going on": lambda run: (run / "checkpoint-a.pt").write_bytes(b"x"),
    "a damaged lock: the run has ended": lambda run: (run / "lock").write_text('{"host": 1, "pid": "x"}'),
}


def overview(suite, results, terminal=False):
    """Return what is printed into a file, or on a terminal."""
    file = Terminal() if terminal else io.StringIO()
    print_overview(suite, results, file)
    return file.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def of_the_table(suite, results):
    records = read_records([results])
    return records, make_table(suite, "smoke", records)


@pytest.mark.parametrize(("name", "damage"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_damaged_record_is_named_with_its_reason_and_left_out(suite, whole, run, name, damage):
    damage(run)
    results = run.parents[1]
    records, table = of_the_table(suite, results)
    ((error, _),) = records.damaged
    assert error.reason.startswith(f"{name}: ")
    (note,) = [note for note in table.footnotes if "damaged" in note]
    assert note == f"Left out, since their records are damaged: {error.folder.name} ({error.reason})."
    assert "/" not in note
    assert note.isprintable()
    assert set(table.long["id"]) == {OTHER}
    assert long_csv(table).splitlines() == [line for line in whole[2].splitlines() if GOOD not in line]
    assert state(error.folder).name == "damaged"
    shown = overview(suite, results)
    assert error.reason in shown
    assert "1 done" in shown


@pytest.mark.parametrize("damage", NOT_DRAWN.values(), ids=NOT_DRAWN)
def test_damaged_dynamics_are_named_and_not_drawn(suite, whole, run, damage):
    damage(run)
    records, table = of_the_table(suite, run.parents[1])
    assert (records.damaged, table.footnotes) == ([], table.notes)
    assert (markdown(table), long_csv(table)) == whole[1:]
    drawing = losses(table)
    assert [axis.get_title() for axis in drawing.figure.axes] == ["full"]
    assert table.footnotes[-1] == f"Not drawn, since their dynamics are damaged: {GOOD} ({table.undrawn[GOOD]})."
    assert table.undrawn[GOOD].startswith("dynamics.parquet: ")


@pytest.mark.parametrize("damage", SAMPLES.values(), ids=SAMPLES)
def test_damaged_samples_are_named_and_not_listed(suite, whole, run, damage, capsys):
    damage(run)
    assert suspects([str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert f"{run}/samples.parquet is " in err
    _, table = of_the_table(suite, run.parents[1])
    assert (markdown(table), long_csv(table)) == whole[1:]


@pytest.mark.parametrize("damage", HARMLESS.values(), ids=HARMLESS)
def test_what_is_not_read_moves_nothing(suite, whole, run, damage):
    damage(run)
    records, table = of_the_table(suite, run.parents[1])
    assert records.damaged == []
    assert state(run).name == "done"
    assert markdown(table) == whole[1]


def test_a_file_that_is_cut_anywhere_is_damaged_or_whole(run):
    record = read_record(run)
    for name, step in (("summary.json", 7), ("environment.json", 7), ("metrics.jsonl", 23)):
        data = (run / name).read_bytes()
        for length in range(0, len(data), step):
            (run / name).write_bytes(data[:length])
            with pytest.raises(Damaged, match=name):
                read_record(run)
        (run / name).write_bytes(data)
    assert read_record(run) == record


@pytest.mark.parametrize(
    ("name", "read"),
    [("dynamics.parquet", lambda run: read_dynamics(read_record(run))), ("samples.parquet", read_samples)],
)
def test_a_changed_byte_of_parquet_is_noticed_or_changes_nothing(run, name, read):
    whole, data = read(run), (run / name).read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    chance, noticed = random.Random(0), 0
    for _ in range(200):
        changed = bytearray(data)
        place = chance.randrange(len(data))
        changed[place] ^= 1 << chance.randrange(8)
        (run / name).write_bytes(changed)
        try:
            found = read(run)
        except Damaged:
            noticed += 1
        else:
            if place < footer:  # where the data and their checksums stand
                pd.testing.assert_frame_equal(found, whole)
    assert noticed > 100


def test_an_unfinished_run_may_end_in_a_torn_line_and_no_other(suite, run, capsys):
    (run / "summary.json").unlink()
    (run / "checkpoint-a.pt").touch()
    edit_rows(run, lambda rows: rows[:3])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "ranked_')
    assert (state(run).name, state(run).detail) == ("interrupted", "epoch 3/4")
    assert read_records([run.parents[1]]).damaged == []
    text("metrics.jsonl", '"epoch": 1', '"epoch": 7')(run)
    assert state(run).name == "damaged"
    assert status(["suite=main", *GRID, f"paths.results={run.parents[1]}"]) == 0
    out = capsys.readouterr().out
    assert f"damaged      {GOOD}: metrics.jsonl: line 2: epoch 7 in the place of 1" in out
    assert "1 done, 1 damaged of 2 runs" in out


@pytest.mark.parametrize("damage", [key("environment.json", epochs=2), key("environment.json", epochs=...)])
def test_an_unfinished_run_with_more_epochs_than_it_has_is_damaged(run, damage):
    (run / "summary.json").unlink()
    (run / "checkpoint-a.pt").touch()
    damage(run)
    assert state(run).detail.startswith(f"{GOOD}: metrics.jsonl: 4 of ")


def test_a_failed_run_shows_its_error_on_one_line(run):
    key("summary.json", status="failed", error="no\x1b[31m\nloss", seconds_total=3.0)(run)
    assert (state(run).name, state(run).detail) == ("failed", "no [31m loss")
    assert read_records([run.parents[1]]).damaged == []


def test_status_is_a_grid_with_a_mark_a_seed_and_their_mean(suite, whole, run):
    first, *lines = overview(suite, run.parents[1]).splitlines()
    assert first.split() == ["method", "/", "noise", "sym0.5"]
    accuracy = json.loads((run / "summary.json").read_text())["test_accuracy_final"]
    assert f"infobatch ● {accuracy:.1f} %".split() in [line.split() for line in lines]
    key("summary.json", status="failed", error="no [bold]loss[/bold] [/]", seconds_total=3.0)(run)
    lines = overview(suite, run.parents[1]).splitlines()
    assert ["infobatch", "✗"] in [line.split() for line in lines]
    assert "● done  ✗ failed" in [line.rstrip() for line in lines]
    assert any(line.startswith("infobatch  sym0.5  seed 0  failed       no [bold]loss[/bold] [/]") for line in lines)


def test_the_time_to_go_is_of_runs_that_finished_and_a_run_with_no_epoch_left_takes_none(suite, whole, run):
    key("summary.json", status="failed", error="no loss", seconds_total=3.0)(run)
    assert "about 0:24 of computing to go" in overview(suite, run.parents[1])  # as the other one took
    (run / "summary.json").unlink()
    (run / "checkpoint-a.pt").touch()
    assert "about 0:00 of computing to go" in overview(suite, run.parents[1])


def test_colours_go_to_a_terminal_alone_and_lines_of_a_file_are_never_cut(suite, whole, run, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    long = "long " * 60
    key("summary.json", status="failed", error=f"a {long}end", seconds_total=3.0)(run)
    in_file, on_terminal = (overview(suite, run.parents[1], terminal) for terminal in (False, True))
    assert "\x1b" not in in_file
    assert f"{long}end" in in_file
    assert "\x1b[" in on_terminal
    assert re.sub(r"\x1b\[[\d;]*m", "", on_terminal).split() == in_file.split()


def test_folders_in_which_nothing_has_begun_are_passed_over(suite, run):
    runs = run.parent
    (runs / "empty").mkdir()
    (runs / "file").touch()
    (runs / "claimed").mkdir()
    (runs / "claimed" / "lock").write_text("{}")
    assert "2 done of 2 runs" in overview(suite, runs.parent)
    assert read_records([runs.parent]).damaged == []
    (runs / "empty" / "environment.json").write_text("{")
    assert "damaged  empty: environment.json: no JSON object" in overview(suite, runs.parent)


def test_a_whole_record_of_the_same_config_stands_for_a_damaged_one(suite, whole, run):
    other = write_record(run.parents[1], "f" * 12, json.loads((run / "summary.json").read_text())["config_id"], 50.0)
    (run / "metrics.jsonl").write_text("")
    records, table = of_the_table(suite, run.parents[1])
    assert [error.folder for error, _ in records.damaged] == [run]
    assert set(table.long["id"]) == {OTHER, other.name}
    assert not any("damaged" in note for note in table.footnotes)
    shown = overview(suite, run.parents[1])
    assert f"damaged  {GOOD}: metrics.jsonl: 0 of 4 epochs" in shown
    assert "2 done of 2 runs" in shown


def test_samples_of_an_older_version_are_read(run):
    frame = read_samples(run).drop(columns=["predicted", "score_settled"])
    frame.assign(clean_label=None, path=None).to_parquet(run / "samples.parquet", index=False)
    assert read_samples(run)["label"].tolist() == frame["label"].tolist()
    write_samples(run, frame.assign(label=11), classes=12)
    assert set(read_samples(run)["label"]) == {11}


def test_samples_of_a_run_that_has_not_finished_are_refused(run):
    key("summary.json", status="failed", error="x")(run)
    with pytest.raises(UsageError, match="no run that finished"):
        read_samples(run)


def test_one_line_has_nothing_that_moves_a_cursor():
    assert one_line(" a\r\n\tb\x1b[2J\u2028c\x00 ") == "a b [2J c"
