"""Published records, tables, figures and the report, from synthetic records with numbers known beforehand."""

import csv
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from alignprune_exp.errors import UsageError
from alignprune_exp.pruning import SCORES
from alignprune_exp.records import Damaged, finished_configs, read_dynamics, read_record, read_samples
from alignprune_exp.report.blocks import blocks
from alignprune_exp.report.claims import recounted
from alignprune_exp.report.figures import BLUE, RED, draw, inline_svg, save
from alignprune_exp.report.findings import BOUNDS, findings
from alignprune_exp.report.html import page
from alignprune_exp.report.publish import publish, scrubbed_command
from alignprune_exp.report.tables import make_table, not_distinguishable_from_best, read_records
from alignprune_exp.report.texts import digest, latex, long_csv, markdown, wide_csv
from alignprune_exp.runs import run_folders
from alignprune_exp.sheet import Sheet
from alignprune_exp.status import overview
from alignprune_exp.suites import load_suite
from alignprune_exp.train import main as train
from harness import environment_of, rows_of, summary_of
from recorded import HOST, SECRET, edit_json, edit_rows, write_record

ROOT = Path(__file__).parents[1]
GRID = ["scale=smoke", "dataset=digits", "noise=clean,sym0.5", "method=full,infobatch,infobatch_das"]
ACCURACY = {  # by row and column, seeds 0, 1, 2
    ("full", "clean"): [70.0, 71.0, 72.0],
    ("full", "sym0.5"): [50.0, 51.0, 52.0],
    ("infobatch", "clean"): [71.0, 72.0, 73.0],
    ("infobatch", "sym0.5"): [40.0, 41.0, 42.0],
    ("infobatch_das", "clean"): [71.0, 73.0, 72.0],
    ("infobatch_das", "sym0.5"): [60.0, 61.0],
}


@pytest.fixture(scope="module")
def suite():
    return load_suite("main", GRID)


@pytest.fixture
def results(tmp_path, suite):
    for number, cell in enumerate(suite.cells):
        method, noise, seed = cell.axes["method"], cell.axes["noise"], int(cell.axes["seed"])
        values = ACCURACY[method, noise]
        if seed < len(values):
            rate = {"clean": 0.0, "sym0.5": 0.5}[noise]
            write_record(tmp_path, f"{number:012x}", cell.config_id, values[seed], seed, noise_rate=rate)
    return tmp_path


def _folders(results, suite, **axes):
    """Return the folders of the runs at these axes, by seed."""
    places = [number for number, cell in enumerate(suite.cells) if axes.items() <= cell.axes.items()]
    return [folder for number in places if (folder := results / "runs" / f"{number:012x}").exists()]


def _block(table, title):
    (block,) = [block for block in blocks(table) if block.title.startswith(title)]
    return {cells[0].text: dict(zip(block.head, cells, strict=True)) for cells in block.body}


def test_accuracy_is_mean_and_spread_with_what_is_missing(results, suite):
    accuracy = _block(make_table(suite, "smoke", read_records([results])), "Accuracy")
    assert accuracy["full"]["clean"].text == "71.0 ± 1.0, 25 % saved"
    assert accuracy["infobatch_das"]["sym0.5"].text == "60.5 ± 0.7 (n=2), 25 % saved"
    assert accuracy["infobatch_das"]["mean Δ"].text == f"{((72 - 71) + (60.5 - 50.5)) / 2:+.1f}"
    assert accuracy["infobatch"]["mean Δ"].text == "-4.5"
    assert len(accuracy["full"]["clean"].runs) == 3


def test_a_cell_without_runs_is_missing(results, suite):
    records = read_records([results])
    for cell in suite.cells:
        if cell.axes["method"] == "infobatch":
            records.pop(cell.config_id)
    accuracy = _block(make_table(suite, "smoke", records), "Accuracy")
    assert {cell.text for cell in list(accuracy["infobatch"].values())[1:]} == {"–"}


def test_a_readme_shows_no_row_and_no_column_without_runs(results, suite):
    records = read_records([results])
    for cell in suite.cells:
        if cell.axes["method"] == "infobatch" or cell.axes["noise"] == "clean":
            records.pop(cell.config_id, None)
    assert digest(make_table(suite, "smoke", records)).splitlines() == [
        "| method / noise | sym0.5 |",
        "| --- | --- |",
        "| full | 51.0 ± 1.0 |",
        "| infobatch_das | 60.5 ± 0.7 (n=2) |",
    ]


def test_differences_are_paired_by_seed_with_students_interval(results, suite):
    differences = _block(make_table(suite, "smoke", read_records([results])), "Difference")
    half = 4.302653 * statistics.stdev([1, 2, 0]) / 3**0.5
    assert differences["infobatch_das"]["clean"].text == f"+1.0 [{1 - half:+.1f}, {1 + half:+.1f}]"
    assert differences["infobatch_das"]["sym0.5"].text == "+10.0 [+10.0, +10.0] (n=2)"
    assert "full" not in differences


def test_bold_are_the_best_and_those_not_distinguishable_from_it(results, suite):
    table = make_table(suite, "smoke", read_records([results]))
    assert not_distinguishable_from_best(table, "clean") == {"infobatch", "infobatch_das"}
    assert not_distinguishable_from_best(table, "sym0.5") == {"infobatch_das"}


def test_one_seed_is_no_best_beside_several(results, suite):
    def bold_at_clean(few):
        records = read_records([results])
        for cell in suite.cells:
            if cell.axes["noise"] == "clean" and cell.axes["method"] in few and cell.axes["seed"] != "1":
                del records[cell.config_id]
        return not_distinguishable_from_best(make_table(suite, "smoke", records), "clean")

    assert bold_at_clean(["infobatch_das"]) == {"infobatch"}  # 73.0 in one seed, 72.0 in three
    assert bold_at_clean(["full", "infobatch", "infobatch_das"]) == {"infobatch_das"}


def test_the_papers_values_stand_apart_with_our_difference(results, suite):
    for path in results.glob("runs/*/summary.json"):
        path.write_text(path.read_text().replace('"digits"', '"cifar100"'))
    table = make_table(suite, "smoke", read_records([results]))
    paper = _block(table, "The paper")
    assert paper["infobatch_das"]["sym0.5"].text == "66.0 (ours -5.5)"
    assert paper["infobatch_das"]["mean Δ"].text == "+2.8"  # the plain mean of its five columns
    assert [row["mean Δ"].text for row in paper.values()][:2] == ["–", "+0.7"]
    assert any("infobatch +0.6, infobatch_das +2.7, seta +0.0, seta_das +0.7" in note for note in table.notes)


def test_on_another_data_set_there_is_no_difference_to_the_paper(results, suite):
    table = make_table(suite, "smoke", read_records([results]))
    assert _block(table, "The paper")["infobatch_das"]["sym0.5"].text == "66.0"
    (caption,) = [block.caption for block in blocks(table) if block.title.startswith("The paper")]
    assert "our runs are on digits" in caption


def test_best_accuracy_is_a_table_of_its_own(results, suite):
    table = make_table(suite, "smoke", read_records([results]), best=True)
    assert table.name == "main_smoke_best"
    assert _block(table, "Accuracy")["full"]["clean"].text.startswith("74.0 ± 1.0")
    assert "Best test accuracy" in markdown(table)


def test_efficiency_and_purity_come_from_metrics(results, suite):
    table = make_table(suite, "smoke", read_records([results]))
    efficiency = _block(table, "Efficiency")["full"]
    assert [efficiency[key].text for key in ("saved", "seconds", "images/s", "overhead")] == [
        "25.0%",
        "12",
        "1000",
        f"{0.8 / 8:.2%}",
    ]
    purity = _block(table, "Purity")["full"]
    assert [purity[key].text for key in ("kept noise", "weighted", "AUROC das", "AUROC loss")] == [
        "0.400",
        "0.500",
        "0.700",
        "0.100",
    ]


def test_a_mean_says_of_how_many_runs_it_is_where_others_lack_the_number(results, suite):
    first, second, third = _folders(results, suite, method="full", noise="sym0.5")
    edit_json(first / "summary.json", noise_estimate=0.1)
    edit_json(third / "summary.json", noise_estimate=0.3)
    purity = _block(make_table(suite, "smoke", read_records([results])), "Purity")["full"]
    assert purity["estimated"].text == "0.200 (n=2)"
    edit_json(second / "summary.json", noise_estimate=0.5)
    purity = _block(make_table(suite, "smoke", read_records([results])), "Purity")["full"]
    assert purity["estimated"].text == "0.300"


def test_footnotes_name_what_differs(results, suite):
    (first, second, *_) = sorted(results.glob("runs/*"))
    edit_json(first / "summary.json", commit="d" * 40 + "+", pairing="unverified")
    edit_json(first / "environment.json", precision="bf16", data_fingerprint="a" * 64)
    for folder in results.glob("runs/*"):
        made_on = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.9.1+cu128", "threads": 2, "processes": 1}
        edit_json(folder / "environment.json", **made_on)
    notes = "\n".join(make_table(suite, "smoke", read_records([results])).notes)
    assert not [word for word in ("devices", "torch", "threads", "processes") if word in notes]
    other = {"device": "NVIDIA H100 PCIe", "torch": "2.9.1+cpu", "threads": 16, "processes": 4}
    edit_json(first / "environment.json", **other)
    (second / "summary.json").write_text('{"id": ')
    notes = "\n".join(make_table(suite, "smoke", read_records([results])).notes)
    for words in ("commits: cccccccc, dddddddd+", "precisions: bf16, fp32", "aaaaaaaa, ffffffff", "is unverified"):
        assert words in notes
    for words in (
        "several devices: NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe.",
        "several versions of torch: 2.9.1+cpu, 2.9.1+cu128.",
        "several numbers of threads: 2, 16.",
        "several numbers of processes: 1, 4.",
    ):
        assert words in notes
    assert f"damaged: {second.name} (summary.json: no JSON object)" in notes


def test_runs_of_another_metric_are_named_and_left_out(results, suite, tmp_path):
    whole = make_table(suite, "smoke", read_records([results]))
    judged = {"name": "rmse", "words": "test RMSE", "unit": "", "higher": False, "digits": 3}
    headline = {f"headline_{key}": value for key, value in judged.items()}
    others = _folders(results, suite, noise="sym0.5")
    for folder in others:
        accuracies = {"test_accuracy_final": ..., "test_accuracy_best": ...}
        edit_json(folder / "summary.json", **headline, **accuracies, test_rmse_final=0.5, test_rmse_best=0.5)
        edit_rows(folder, lambda rows: [{k: v for k, v in row.items() if k != "test_accuracy"} for row in rows])
        edit_rows(folder, lambda rows: [row | {"test_rmse": 0.5} for row in rows])
    table = make_table(suite, "smoke", read_records([results]))
    assert set(table.long["id"]) == set(whole.long["id"]) - {folder.name for folder in others}
    (note,) = [note for note in table.notes if "one metric" in note]
    assert note.startswith("Left out, since a table has one metric, which is test accuracy in % here: ")
    assert all(f"{folder.name} (test RMSE)" in note for folder in others)
    accuracy = _block(table, "Accuracy")
    assert [accuracy["infobatch"][column].text for column in table.columns] == ["72.0 ± 1.0, 25 % saved", "–"]
    texts, _, _ = _everything(table, tmp_path / "drawn")
    assert "nan" not in "".join(texts[:3])
    only = replace(suite, cells=[cell for cell in suite.cells if cell.axes["noise"] == "sym0.5"])
    assert make_table(only, "smoke", read_records([results])).measured == "test RMSE"


def test_cells_that_are_one_run_at_one_place_count_once(results, suite):
    records = read_records([results])
    twice = [replace(cell, axes={**cell.axes, "score": score}) for cell in suite.cells for score in ("loss", "das")]
    table = make_table(replace(suite, cells=twice), "smoke", records)
    once = make_table(suite, "smoke", records)
    pd.testing.assert_frame_equal(table.long, once.long)
    assert table.progress == once.progress == "17 of 18 runs"
    assert _block(table, "Accuracy")["full"]["clean"].text == "71.0 ± 1.0, 25 % saved"


def test_published_records_hold_nothing_of_the_machine(results, suite):
    new, known, missing = publish(suite, results)
    assert (len(new), known, missing) == (17, [], ["infobatch_das sym0.5 seed 2"])
    (pack,) = (results / "records").iterdir()
    assert pack.name == "main_smoke.parquet"
    rows = pq.read_table(pack).to_pylist()
    assert [row["id"] for row in rows] == sorted(new)
    for row in rows:
        for word in (HOST, SECRET, "somebody", "/home", str(results), "~/"):
            assert word not in str(row), word
    assert publish(suite, results)[:2] == ([], sorted(new))


def test_what_was_published_before_a_path_was_known_for_one_is_the_same_record(results, suite, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("alignprune_exp.report.publish.PATHS", ())
        new, _, _ = publish(suite, results)
    assert "/home" in str(pq.read_table(next((results / "records").iterdir()))["config"].to_pylist())
    assert publish(suite, results)[:2] == ([], sorted(new))


def test_a_published_run_reads_like_its_folder(results, suite):
    publish(suite, results)
    for folder, packed in zip(run_folders(results), run_folders(results / "records"), strict=True):
        ours, theirs = read_record(folder), read_record(packed)
        assert (ours.summary, ours.rows) == (theirs.summary, theirs.rows)
        pd.testing.assert_frame_equal(read_dynamics(ours), read_dynamics(theirs))
        with pytest.raises(UsageError, match="published records have none"):
            read_samples(packed)


def test_runs_that_suites_share_are_published_once_and_others_join_their_pack(results, suite):
    some = replace(suite, cells=suite.cells[:3])
    first, known, _ = publish(some, results)
    assert (len(first), known) == (3, [])
    new, known, _ = publish(replace(suite, name="another"), results)
    assert known == first
    assert publish(suite, results)[:2] == ([], sorted([*new, *first]))
    packs = {path.name: set(pq.read_table(path)["id"].to_pylist()) for path in (results / "records").iterdir()}
    assert packs == {"main_smoke.parquet": set(first), "another_smoke.parquet": set(new)}


@pytest.mark.parametrize("damage", ["truncated", "other columns"])
def test_a_pack_that_cannot_be_read_is_one_sentence(results, suite, damage):
    publish(suite, results)
    (pack,) = (results / "records").iterdir()
    if damage == "other columns":
        pq.write_table(pa.table({"id": ["a"]}), pack)
    else:
        pack.write_bytes(pack.read_bytes()[: pack.stat().st_size // 2])
    with pytest.raises(UsageError, match=f"{pack.name} cannot be read as published records"):
        read_records([results / "records"])


def test_damaged_dynamics_of_a_pack_are_of_its_runs_alone(results, suite):
    publish(suite, results)
    (pack,) = (results / "records").iterdir()
    data = bytearray(pack.read_bytes())
    group = pq.ParquetFile(pack).metadata.row_group(0)
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    values = columns["dynamics.list.element.value"]
    data[values.data_page_offset + values.total_compressed_size // 2] ^= 1
    pack.write_bytes(data)
    records = read_records([results / "records"])
    assert len(records) == 17
    with pytest.raises(
        Damaged, match=r"dynamics\.parquet is damaged \(cannot be read: .*; take it back with git$"
    ) as damaged:
        read_dynamics(next(iter(records.values())))
    assert "None" not in str(damaged.value)
    with pytest.raises(UsageError, match=r"take it back with git$"):
        publish(suite, results)


def test_published_records_are_read_in_a_folder_of_any_name(results, suite, tmp_path, make_tables, capsys):
    publish(suite, results)
    named = shutil.copytree(results / "records", tmp_path / "theirs")
    pq.write_table(pa.table({"index": [1]}), named / "keep.parquet")
    of_records, of_theirs = (read_records([folder]) for folder in (results / "records", named))
    assert len(of_theirs) == 17
    with pytest.raises(UsageError, match="published records have none"):
        read_samples(run_folders(named)[0])
    assert long_csv(make_table(suite, "smoke", of_theirs)) == long_csv(make_table(suite, "smoke", of_records))
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "their"), "--out", str(tmp_path / "out")]
    assert make_tables.main(arguments) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"no runs under {tmp_path / 'their'}, which has neither runs/ nor published records in it"
    ]
    (named / "other_smoke.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"other_smoke\.parquet cannot be read as published records"):
        read_records([named])
    (named / "main_smoke.parquet").unlink()
    assert read_records([named]) == {}


@pytest.mark.parametrize("name", ["records", "theirs"])
def test_what_is_published_does_not_count_as_done(results, suite, tmp_path, name):
    publish(suite, results)
    published = shutil.copytree(results / "records", tmp_path / "elsewhere" / name)
    assert len(finished_configs(results)) == 17
    assert finished_configs(published) == {}


def test_status_marks_what_is_published_until_a_run_of_ones_own_is_there(results, suite):
    def last_lines(places):
        overview(suite, results, file := io.StringIO())
        assert file.getvalue().count("○") == places + (places > 0)  # and in the legend
        return file.getvalue().splitlines()[-2:]

    publish(replace(suite, cells=suite.cells[:5]), results)
    assert last_lines(0)[0] == "17 done, 1 missing of 18 runs at scale=smoke"
    (results / "runs").rename(results / "elsewhere")
    counts, left = last_lines(5)
    assert counts == "5 published, 13 missing of 18 runs at scale=smoke"
    assert left.endswith("one run at a time, the published ones, which are trained again, among them")


def test_a_different_record_is_never_overwritten(results, suite):
    publish(suite, results)
    path = next((results / "runs").iterdir())
    rows = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(rows.replace("0.75", "0.76"))
    before = {p: p.read_bytes() for p in (results / "records").rglob("*.*") if p.is_file()}
    with pytest.raises(UsageError, match=f"another record of run {path.name}"):
        publish(suite, results)
    assert {p: p.read_bytes() for p in (results / "records").rglob("*.*") if p.is_file()} == before


def test_a_flipped_bit_of_a_pack_alters_no_record_in_silence(results, suite):
    publish(replace(suite, cells=suite.cells[:2]), results)
    (pack,) = (results / "records").iterdir()
    data, rng = pack.read_bytes(), np.random.default_rng(0)

    def read():
        records = [read_record(folder) for folder in run_folders(results / "records")]
        return [(r.summary, r.environment, r.rows, read_dynamics(r).to_dict()) for r in records]

    whole, refused = read(), 0
    for number in range(100):
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        pack.write_bytes(flipped)
        os.utime(pack, ns=(number, number))  # an earlier one is not read again
        try:
            assert read() == whole
        except UsageError:
            refused += 1
    assert refused > 30


def test_commands_lose_their_paths_alone():
    given = (
        "python -m alignprune_exp.train 'paths.data=/a b' +dataset.root=x noise.file=/n score=my.package.Class seed=1"
    )
    assert scrubbed_command(given) == (
        "python -m alignprune_exp.train paths.data=DIR +dataset.root=DIR noise.file=FILE score=my.package.Class seed=1"
    )


def test_a_command_whose_quotes_do_not_end_loses_its_paths_too():
    assert shlex.split(scrubbed_command("python it's seed=1 paths.data=/home/x")) == [
        "python",
        "it's",
        "seed=1",
        "paths.data=DIR",
    ]


def test_a_command_without_its_paths_can_be_typed_and_is_the_same_when_published_again(results, suite):
    words = ["python", 'noise.map={"cat": "dog"}', "a=[1, 2]"]
    assert shlex.split(scrubbed_command(shlex.join([*words, "paths.data=/x"]))) == [*words, "paths.data=DIR"]
    path = next((results / "runs").iterdir())
    edit_json(path / "environment.json", command=shlex.join(words))
    new, _, _ = publish(suite, results)
    assert publish(suite, results)[:2] == ([], new)


def test_the_seed_of_a_suite_without_an_axis_of_seeds_is_its_runs(results, suite):
    cells = [cell for cell in suite.cells if cell.axes["seed"] == "1"]
    cells = [replace(cell, axes={k: v for k, v in cell.axes.items() if k != "seed"}) for cell in cells]
    table = make_table(replace(suite, cells=cells), "smoke", read_records([results]))
    assert set(table.long["seed"]) == {1}


def _everything(table, folder):
    folder.mkdir(exist_ok=True)
    pictures, _ = save(table, folder)
    texts = [markdown(table), latex(table), wide_csv(table), long_csv(table), page([table], pictures)]
    return texts, pictures, {path.name: path.read_bytes() for path in folder.iterdir()}


def test_published_records_alone_give_the_same_bytes(results, suite, tmp_path):
    publish(suite, results)
    first = _everything(make_table(suite, "smoke", read_records([results, results / "records"])), tmp_path / "drawn")
    shutil.rmtree(results / "runs")
    again = make_table(suite, "smoke", read_records([results, results / "records"]))
    assert _everything(again, tmp_path / "drawn") == first
    assert set(first[1]) == {"main_smoke_differences", "main_smoke_kept"}
    drawn = {f"main_smoke_{name}" for name in ("differences", "kept", "accuracy", "losses", "scores")}
    assert set(first[2]) == {f"{name}.{form}" for name in drawn for form in ("pdf", "png")}
    assert "2026" not in "".join(first[0])


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.resources, self.open = set(), set(), [], []
        self.attributes, self.text, self.popovers = set(), [], set()

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data):
        self.text.append(data)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.attributes |= given.keys()
        self.popovers |= {given["popovertarget"]} if "popovertarget" in given else set()
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)
        self.ids |= {given["id"]} if "id" in given else set()
        if tag == "a":
            self.links.add(given["href"])
        self.resources += [given[key] for key in ("src", "href") if key in given and tag != "a"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_is_one_page_whose_numbers_lead_to_their_runs(results, suite, tmp_path):
    (texts, _, _) = _everything(make_table(suite, "smoke", read_records([results])), tmp_path / "drawn")
    parser = _Page()
    parser.feed(texts[-1])
    assert parser.open == []
    assert {f"run-{path.name}" for path in results.glob("runs/*")} <= parser.ids
    assert all(link.removeprefix("#") in parser.ids for link in parser.links)
    assert len(parser.popovers) > 10
    assert parser.popovers <= parser.ids
    assert all(resource.startswith(("data:", "#")) for resource in parser.resources)
    assert not re.search(r"(https?:)?//\w+\.\w", texts[-1].replace("<!doctype html>", ""))
    assert SECRET not in texts[-1]
    assert "paths.data=DIR" in texts[-1]
    assert texts[-1].index("What was found") < texts[-1].index("<svg") < texts[-1].index("<table")


def test_the_report_says_which_runs_are_of_a_changed_checkout(results, suite):
    first, *_ = sorted(results.glob("runs/*"))
    edit_json(first / "environment.json", commit="d" * 40 + "+")
    text = page([make_table(suite, "smoke", read_records([results]))], {})
    assert "<td>dddddddd+</td>" in text
    assert "<td>cccccccc</td>" in text


def test_a_pop_over_has_the_runs_of_its_number(results, suite):
    text = page([make_table(suite, "smoke", read_records([results]))], {})
    (popover,) = re.findall(r'popovertarget="(\w+)"><strong>60.5 ± 0.7', text)
    listed = re.search(rf'id="{popover}"><ul>(.*?)</ul>', text, re.DOTALL)[1]
    lines = [re.sub(r"<.*?>", "", line).strip() for line in listed.split("</li>") if line.strip()]
    folders = _folders(results, suite, method="infobatch_das", noise="sym0.5")
    assert lines == [f"infobatch_das, sym0.5, seed {seed}: 6{seed}.0 % {folders[seed].name}" for seed in (0, 1)]


def _sentences(results, suite):
    (found,) = findings([make_table(suite, "smoke", read_records([results]))])
    return [sentence.text for sentence in found.sentences]


def test_what_was_found_has_its_numbers_and_its_seeds(results, suite):
    main, elsewhere, others, das = _sentences(results, suite)
    assert main == (
        "At 25 % saved and sym0.5, infobatch_das, the best of 2 beside full, ends at 60.5 ± 0.7 %, full at "
        "50.5 ± 0.7 %, a difference of +10.0 [+10.0, +10.0], 2 seeds, and an interval without 0: better."
    )
    half = 4.302653 * statistics.stdev([1, 2, 0]) / 3**0.5
    interval = f"[{1 - half:+.1f}, {1 + half:+.1f}]".replace("-", "−")
    assert elsewhere == f"infobatch_das against full elsewhere: clean +1.0 {interval}, 3 seeds."
    assert others == "The others there, against full: worse: infobatch −10.0."
    assert das.startswith(
        "DAS in the place of the loss, at sym0.5: infobatch +20.0 [+20.0, +20.0], 2 seeds (the paper: "
    )


def test_of_one_seed_nothing_is_claimed(results, suite):
    for path in results.glob("runs/*"):
        if summary_of(path)["seed"] != 1:
            shutil.rmtree(path)
    main, *others = _sentences(results, suite)
    assert main.endswith("a difference of +10.0, one seed, which proves nothing.")
    for sentence in (main, *others):
        assert "one seed" in sentence
        assert "[" not in sentence
        assert "better" not in sentence
        assert "worse" not in sentence


def test_the_best_of_several_seeds_is_not_called_the_best_of_all(results, suite):
    for folder in _folders(results, suite, method="infobatch", noise="sym0.5")[1:]:
        shutil.rmtree(folder)
    (folder,) = _folders(results, suite, method="infobatch", noise="sym0.5")
    edit_rows(folder, lambda rows: [row | {"test_accuracy": 90.0} for row in rows])
    edit_json(folder / "summary.json", test_accuracy_final=90.0, test_accuracy_best=90.0)
    main, _, others, _ = _sentences(results, suite)
    assert "infobatch_das, the best of 1 with several seeds beside full, ends at 60.5" in main
    assert others == "The others there, against full: in one seed: infobatch +40.0."


def test_an_interval_that_contains_0_shows_nothing(results, suite):
    (_, second) = _folders(results, suite, method="infobatch_das", noise="sym0.5")
    edit_json(second / "summary.json", test_accuracy_final=45.0)
    edit_rows(second, lambda rows: [row | {"test_accuracy": 45.0} for row in rows])
    edit_json(second / "summary.json", test_accuracy_best=45.0)
    main = _sentences(results, suite)[0]
    half = 12.7062 * statistics.stdev([10, -6]) / 2**0.5
    assert f"difference of +2.0 [−{half - 2:.1f}, +{half + 2:.1f}], 2 seeds, and an interval with 0 in it, so" in main
    assert main.endswith("so that neither is shown to be better.")


@pytest.mark.parametrize(
    ("score", "bound"),
    [
        ("oracle", "A choice that knows the wrong labels (infobatch_das) is the upper bound there: +10.0"),
        (
            "supervised",
            "(infobatch_das) is the bound of what losses tell: +10.0",
        ),  # which what reads more than losses may pass
    ],
)
def test_what_knows_the_answer_is_no_method(results, suite, score, bound):
    for folder in _folders(results, suite, method="infobatch_das"):
        edit_json(folder / "summary.json", score=score)
    sentences = _sentences(results, suite)
    assert "infobatch, the best of 1 beside full and yet behind it, ends at" in sentences[0]
    assert [bound in sentence for sentence in sentences] == [False] * (len(sentences) - 1) + [True]
    assert ("upper bound" in sentences[-1]) == (score == "oracle")


def test_the_main_claim_comes_first_at_the_scale_of_most_samples(results, suite):
    records = read_records([results])
    tables = [
        make_table(replace(suite, name=name), scale, records)
        for name, scale in (("main", "smoke"), ("other", "smoke"), ("equal_cost", "smoke"), ("equal_cost", "cpu"))
    ]
    tables[-1].long["samples"] = 10_000
    found = [(one.table.suite.name, one.table.scale) for one in findings(tables)]
    assert found == [("equal_cost", "cpu"), ("main", "smoke")]
    text = page(tables, {})
    assert text.index('id="table-equal_cost_cpu"') < text.index('id="table-main_smoke"')


def test_where_no_two_rows_share_a_seed_the_page_says_so(results, suite):
    records = read_records([results])
    table = make_table(replace(suite, baseline=None), "smoke", {k: r for k, r in records.items() if _is_full(suite, k)})
    assert findings([table]) == []
    assert "nothing can be said" in page([table], {})


def _is_full(suite, config_id):
    return any(cell.config_id == config_id and cell.axes["method"] == "full" for cell in suite.cells)


HOSTILE = '<script>alert(\'1\')</script>"><img src=x onerror="alert(2)">&amp;|\n[x](javascript:alert(3))'
HOSTILE += "$\\input{y}%~^#_{"
A_FOLDERS = HOSTILE.replace("/", "").replace("~", "")


@pytest.fixture
def hostile(suite, tmp_path):
    """A table in which every text that a record, a config or a folder's name can bring is hostile."""
    cells = [cell for cell in suite.cells if cell.axes["seed"] == "0" and cell.axes["noise"] == "sym0.5"]
    cells = [replace(cell, axes={**cell.axes, "method": f"={cell.axes['method']}{HOSTILE}"}) for cell in cells]
    suite = replace(suite, cells=cells, baseline=cells[0].axes["method"], paper={})
    texts = {
        "pairing": "unverified",
        "dataset": f"@{HOSTILE}",
        "noise": HOSTILE,
        "commit": f"+{HOSTILE}",
        f"=choice_{HOSTILE}": f"-{HOSTILE}",
    }
    for number, cell in enumerate(cells):
        folder = write_record(tmp_path, f"{number}{A_FOLDERS}", cell.config_id, 50.0 + number, **texts)
        more = {"command": f"python '{HOSTILE}", "commit": HOSTILE, "precision": f"{number}{HOSTILE}"}
        edit_json(folder / "environment.json", data_fingerprint=f"{number}{HOSTILE}", **more)
        edit_rows(folder, lambda rows: [row | {f"auroc_{HOSTILE}": 0.5} for row in rows])
    edit_json(folder / "summary.json", **{f"seconds_{HOSTILE}": HOSTILE})
    table = make_table(suite, "smoke", read_records([tmp_path]))
    assert len(table.long) == 2
    assert len(table.notes) == 4  # precisions, data, the pairing, and the damaged record
    return table


def test_what_a_record_brings_is_text_on_the_page(hostile, tmp_path):
    pictures, _ = save(hostile, tmp_path)
    assert pictures
    text = page([hostile], pictures, {hostile.name: Sheet(HOSTILE, HOSTILE, 3, b"x")})
    parser = _Page()
    parser.feed(text)
    assert parser.open == []
    assert text.count("<script") == 1
    assert not {"onerror", "onload", "onclick"} & parser.attributes
    assert {link.removeprefix("#") for link in parser.links} <= parser.ids | {f"run-{HOSTILE}"}
    shown = "\n".join(parser.text)
    for what in (f"=infobatch{HOSTILE}", f"1{A_FOLDERS}", f"AUROC {HOSTILE}", f"1{HOSTILE}", f"lowest in {HOSTILE}"):
        assert what in shown
    assert "python " in shown  # a command is shown without its paths


def test_what_a_record_brings_is_text_in_markdown(hostile):
    for text in (markdown(hostile), digest(hostile)):
        assert "<" not in text
        assert "](" not in text
        for lines in re.findall(r"(?:^\|.*\n?)+", text, re.M):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}) == 1


def test_what_a_record_brings_is_text_in_latex(hostile):
    text = latex(hostile)
    assert "\n\n" not in text
    for line in text.splitlines():
        if line.startswith("%"):
            continue
        assert "\\input" not in line
        assert not re.search(r"(?<!\\)[%#_~^]", line), line
        assert len(re.findall(r"(?<!\\)\{", line)) == len(re.findall(r"(?<!\\)\}", line)), line


def test_what_a_record_brings_is_no_formula_in_csv(hostile):
    for text in (wide_csv(hostile), long_csv(hostile)):
        lines = list(csv.reader(io.StringIO(text)))
        cells = [cell for line in lines for cell in line]
        assert not [cell for cell in cells if cell.startswith(("=", "+", "@", "-")) and not _is_number(cell)]
        assert any(cell.startswith("'=") for cell in cells)
        assert len({len(line) for line in lines}) == 1
    assert "'@<script>" in text
    assert ",-" not in text.replace("'-", "") or _is_number(text.split(",-")[1].split(",")[0])


def _is_number(text):
    return re.fullmatch(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", text) is not None


def _suite_records(results, name, overrides, values, epochs=2):
    """Write a record for every cell of a suite; ``values`` gives accuracy and saved share from its axes."""
    suite = load_suite(name, ["scale=smoke", "dataset=digits", *overrides])
    for number, cell in enumerate(suite.cells):
        accuracy, saved = values(cell.axes)
        write_record(results, f"{number:012x}", cell.config_id, accuracy, int(cell.axes["seed"]), epochs, saved=saved)
    return make_table(suite, "smoke", read_records([results]))


def _lines(drawing):
    """Return the points of every line, by its name in the legend."""
    (axis,) = drawing.figure.axes
    names = [text.get_text() for legend in drawing.figure.legends for text in legend.get_texts()] or [""]
    return {
        name: [tuple(map(float, point)) for point in zip(*line.get_data(), strict=True)]
        for name, line in zip(names, axis.lines, strict=True)
    }


def test_accuracy_over_ratio_is_drawn_at_what_was_really_saved(tmp_path):
    def values(axes):
        ratio, gain = float(axes["pruner.ratio"]), {"loss": 0, "das": 5}[axes["score"]]
        return 50 + gain + 2 * int(axes["seed"]), ratio / 2 + gain / 100

    table = _suite_records(tmp_path, "ratio", ["pruner.ratio=0.3,0.5", "seed=0,1"], values)
    drawing = draw(table)["ratio_smoke_against"]
    assert _lines(drawing) == {
        "loss": [(0.15, 51), (0.25, 51)],
        "das": [(pytest.approx(0.2), 56), (pytest.approx(0.3), 56)],
    }
    band = drawing.figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (50, 52)  # from the lowest seed to the highest


def test_settings_that_saved_the_same_are_points_of_their_own(tmp_path):
    def values(axes):
        return 100 * float(axes["pruner.ratio"]) + {"loss": 0, "das": 5}[axes["score"]], 0.25

    table = _suite_records(tmp_path, "ratio", ["pruner.ratio=0.3,0.5,0.7", "seed=0"], values)
    drawing = draw(table)["ratio_smoke_against"]
    assert {name: sorted(points) for name, points in _lines(drawing).items()} == {
        "loss": [(0.25, 30), (0.25, 50), (0.25, 70)],
        "das": [(0.25, 35), (0.25, 55), (0.25, 75)],
    }
    assert "from 30.0 (loss at 0.25) to 75.0 (das at 0.25)" in drawing.alt


def test_what_is_saved_is_drawn_and_told_where_there_are_two_shares_of_it(tmp_path):
    def values(axes):
        ahead = {"shorter": 0, "rs2": -1, "sieve": 1 if axes["saved"] == "0.3" else -2}[axes["method"]]
        return 50.0 + ahead + int(axes["seed"]), float(axes["saved"])

    grid = ["noise=sym0.5", "method=shorter,rs2,sieve", "seed=0,1"]
    table = _suite_records(tmp_path / "two", "cost", [*grid, "saved=0.3,0.5"], values)
    assert _lines(draw(table)["cost_smoke_against"]) == {
        "shorter": [(0.3, 50.5), (0.5, 50.5)],
        "rs2": [(0.3, 49.5), (0.5, 49.5)],
        "sieve": [(0.3, 51.5), (0.5, 48.5)],
    }
    ((sentence,),) = [one.sentences for one in findings([table])]
    assert sentence.text == (
        "Best against shorter at sym0.5, of several seeds where any has them, by what is saved: 30 % saved: sieve +1.0 "
        "[+1.0, +1.0], 2 seeds; 50 % saved: none, rs2 as the next −1.0 [−1.0, −1.0], 2 seeds."
    )
    table = _suite_records(tmp_path / "one", "cost", [*grid, "saved=0.3"], values)
    assert "cost_smoke_against" not in draw(table)
    assert findings([table]) == []


def test_what_the_lines_are_has_room_below_them_and_no_two_look_alike(tmp_path):
    table = _suite_records(tmp_path, "cost", ["noise=sym0.5", "seed=0", "saved=0.5,0.7"], lambda axes: (50.0, 0.5))
    figure = draw(table)["cost_smoke_against"].figure
    FigureCanvasAgg(figure).draw()
    (legend,), (axis,) = figure.legends, figure.axes
    there, (wide, high) = legend.get_window_extent(), figure.canvas.get_width_height()
    assert there.x0 >= 0 <= there.y0
    assert there.x1 <= wide
    assert there.y1 < axis.get_tightbbox().y0 < high
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axis.lines}
    assert len(looks) == len(axis.lines) == len(table.rows)


@pytest.mark.parametrize(
    ("name", "axis", "overrides", "line"),
    [
        ("window", "score.window", ["score.window=3,5", "epochs=20"], ""),
        ("reference_size", "reference.size", ["reference.size=0.02,0.05"], ""),
        ("budget", "pruner.budget", ["score=loss,das", "pruner.budget=0.5,0.7"], "das"),
    ],
)
def test_accuracy_is_drawn_over_the_axis_that_is_a_number(tmp_path, name, axis, overrides, line):
    table = _suite_records(tmp_path, name, [*overrides, "seed=0"], lambda axes: (40 + float(axes[axis]), 0.25))
    lines = _lines(draw(table)[f"{name}_smoke_against"])
    values = sorted({float(cell.axes[axis]) for cell in table.suite.cells})
    assert lines[line] == [(value, pytest.approx(40 + value)) for value in values]


def test_what_is_asked_for_is_not_called_kept(tmp_path):
    grid = ["method=query_random,query", "pruner.budget=0.2,0.4", "seed=0", "epochs=8"]
    table = _suite_records(tmp_path, "query", grid, lambda axes: (40.0, 0.25), epochs=8)
    caption = draw(table)["query_smoke_against"].caption
    assert caption.startswith("Test accuracy in % against budget, a share of the samples: mean over seeds")


def test_a_difference_is_drawn_with_its_interval_and_its_side(results, suite):
    table = make_table(suite, "smoke", read_records([results]))
    drawing = draw(table)["main_smoke_differences"]
    noisy = next(axis for axis in drawing.figure.axes if axis.get_title() == "sym0.5")
    zero, *drawn = noisy.lines
    assert set(zero.get_xdata()) == {0}
    rows = [text.get_text() for text in drawing.figure.axes[0].get_yticklabels()]
    points = {rows[int(line.get_ydata()[0])]: line for line in drawn if len(line.get_xdata()) == 1}
    assert {row: (float(line.get_xdata()[0]), line.get_color()) for row, line in points.items()} == {
        "infobatch": (-10.0, RED),
        "infobatch_das": (10.0, BLUE),
    }
    assert "sym0.5: from -10.0 (infobatch) to +10.0 (infobatch_das)" in drawing.alt


def test_seeds_are_a_band_and_no_panel_is_empty(results, suite):
    for noise in ("clean", "sym0.5"):
        for folder in _folders(results, suite, noise=noise):
            kept = 0.0 if noise == "clean" else 0.4 + summary_of(folder)["seed"] / 10
            edit_rows(folder, lambda rows, kept=kept: [row | {"kept_noise": kept} for row in rows])
    table = make_table(suite, "smoke", read_records([results]))
    noise, fraction = draw(table)["main_smoke_kept"].figure.axes
    assert (noise.get_title(), noise.get_ylabel(), fraction.get_ylabel()) == ("sym0.5", "kept noise", "kept fraction")
    band = noise.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.4, 0.6))
    clean = replace(suite, cells=[cell for cell in suite.cells if cell.axes["noise"] == "clean"])
    (only,) = draw(make_table(clean, "smoke", read_records([results])))["main_smoke_kept"].figure.axes
    assert only.get_ylabel() == "kept fraction"
    for drawing in draw(table).values():
        assert all(axis.lines or axis.patches or axis.collections for axis in drawing.figure.axes)


def test_half_noise_and_das_are_looked_at_first(results, suite):
    for folder in [*_folders(results, suite, method="full"), *_folders(results, suite, method="infobatch")]:
        edit_json(folder / "summary.json", score="loss", detection_auroc_last=0.1)
    for rate in (0.0, 0.8):
        for folder in _folders(results, suite, noise="clean"):
            edit_json(folder / "summary.json", noise_rate=rate)
        assert make_table(suite, "smoke", read_records([results])).focus == "sym0.5"
    drawn = draw(make_table(suite, "smoke", read_records([results])))
    assert "at sym0.5 under infobatch_das" in drawn["main_smoke_scores"].caption


def test_a_figure_in_a_page_says_what_is_seen_and_shares_no_id(results, suite):
    table = make_table(suite, "smoke", read_records([results]))
    drawing = draw(table)["main_smoke_kept"]
    one, other = (inline_svg(drawing.figure, name, '"quoted" & so on') for name in ("one", "other"))
    assert inline_svg(drawing.figure, "one", '"quoted" & so on') == one
    assert 'role="img" aria-label="&quot;quoted&quot; &amp; so on"' in one
    ids = [set(re.findall(r' id="(.*?)"', text)) for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, own in zip((one, other), ids, strict=True):
        assert set(re.findall(r'(?:url\(|xlink:href=")#([^")]*)', text)) <= own


def test_a_figure_in_a_page_has_every_digit_of_its_texts_and_tenths_of_points():
    figure = Figure()
    figure.subplots().set(title="das 0.875", xticks=[0.25, 0.125])
    text = inline_svg(figure, "one", "")
    assert {"das 0.875", "0.250", "0.125"} <= set(re.findall(r">([^<>]+)</text>", text))
    assert not re.search(r"\d\.\d\d", re.sub(r">[^<]*<", "><", text))


def test_a_setting_that_is_no_number_is_no_point_of_what_is_told_over_it(results, suite, tmp_path):
    grid = ["pruner.budget=null,0.5,0.7", "seed=0", "score=loss,das"]
    table = _suite_records(tmp_path / "budget", "budget", grid, lambda axes: (40.0, 0.25))
    assert _lines(draw(table)["budget_smoke_against"]) == {score: [(0.5, 40), (0.7, 40)] for score in ("loss", "das")}
    shares = {"clean": "null", "sym0.5": "0.5"}
    cells = [replace(cell, axes=cell.axes | {"saved": shares[cell.axes["noise"]]}) for cell in suite.cells]
    over = replace(suite, columns=["saved"], cells=cells)
    assert findings([make_table(over, "smoke", read_records([results]))]) == []


def test_purity_names_the_size_of_the_reference_set(tmp_path):
    grid = ["reference.size=0.02,30", "seed=0"]
    table = _suite_records(tmp_path, "reference_size", grid, lambda axes: (40.0, 0.25))
    assert {row: cells["reference"].text for row, cells in _block(table, "Purity").items()} == {
        "0.02": "0.02",
        "30": "30",
    }


def test_purity_tells_how_noisy_the_reference_set_was_where_records_know(tmp_path):
    grid = ["reference=pseudo,population", "seed=0", "dataset=cifar10", "noise=sym0.5"]
    table = _suite_records(tmp_path, "reference_free", grid, lambda axes: (40.0, 0.25), epochs=4)
    assert "reference noise" not in _block(table, "Purity")["pseudo"]
    assert "reference_noise" not in table.long
    for row, shares in (("pseudo", (None, 0.125, None, 0.375)), ("population", (None,) * 4)):
        (record,) = (table.records[id] for id in table.runs(row, "cifar10 sym0.5")["id"])
        known = [{"reference_noise": share} for share in shares]
        edit_rows(record.folder, lambda rows, known=known: [a | b for a, b in zip(rows, known, strict=True)])
    purity = _block(make_table(table.suite, "smoke", read_records([tmp_path])), "Purity")
    assert {row: cells["reference noise"].text for row, cells in purity.items()} == {
        "pseudo": "0.250",
        "population": "–",
    }
    assert {row: cells["reference"].text for row, cells in purity.items()} == {"pseudo": "0.01", "population": "0"}


def test_what_only_some_runs_have_is_shown_where_they_have_it(tmp_path):
    grid = ["reference=pseudo,population", "seed=0", "dataset=cifar10", "noise=sym0.5"]
    table = _suite_records(tmp_path, "reference_free", grid, lambda axes: (40.0, 0.25))
    assert "Other evaluation sets" not in [block.title for block in blocks(table)]
    assert "warm-up" not in _block(table, "Efficiency")["pseudo"]
    (record,) = (table.records[id] for id in table.runs("pseudo", "cifar10 sym0.5")["id"])
    elsewhere = [{"test_accuracy_imagenet": value} for value in (33.0, 31.25)]
    edit_rows(record.folder, lambda rows: [row | more for row, more in zip(rows, elsewhere, strict=True)])
    more = {"test_accuracy_imagenet_final": 31.25, "test_accuracy_imagenet_best": 33.0, "seconds_warmup": 12.0}
    edit_json(record.folder / "summary.json", **more)
    for best, accuracy in ((False, "31.2"), (True, "33.0")):
        table = make_table(table.suite, "smoke", read_records([tmp_path]), best=best)
        shown = {row: cells["imagenet"].text for row, cells in _block(table, "Other evaluation sets").items()}
        assert shown == {"pseudo": accuracy, "population": "–"}
    warm_up = {row: cells["warm-up"].text for row, cells in _block(table, "Efficiency").items()}
    assert warm_up == {"pseudo": "12", "population": "–"}


def test_a_suite_without_such_an_axis_has_no_such_figure(results, suite):
    assert "main_smoke_against" not in draw(make_table(suite, "smoke", read_records([results])))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not there")
def test_latex_compiles(results, suite, tmp_path):
    text = latex(make_table(suite, "smoke", read_records([results])))
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{text}\\end{{document}}\n"
    (tmp_path / "t.tex").write_text(document)
    subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_latex_has_as_many_cells_in_every_line(results, suite):
    text = latex(make_table(suite, "smoke", read_records([results])))
    for tabular in re.findall(r"\\begin\{tabular\}\{(l+)\}(.*?)\\end\{tabular\}", text, re.S):
        lines = [line for line in tabular[1].splitlines() if line.endswith("\\\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(tabular[0])}


def test_a_thousand_records_are_read_in_seconds(tmp_path, suite):
    config_ids = [cell.config_id for cell in suite.cells]
    write_record(tmp_path, "model", config_ids[0], 50.0)
    model = tmp_path / "runs" / "model"
    summary, environment = ((model / name).read_text() for name in ("summary.json", "environment.json"))
    metrics = (model / "metrics.jsonl").read_text()
    shutil.rmtree(model)
    for number in range(1000):
        folder = tmp_path / "runs" / f"{number:012x}"
        folder.mkdir()
        config_id = config_ids[number] if number < len(config_ids) else f"other{number}"
        (folder / "summary.json").write_text(summary)
        edit_json(folder / "summary.json", id=folder.name, config_id=config_id)
        (folder / "environment.json").write_text(environment)
        edit_json(folder / "environment.json", config_id=config_id)
        (folder / "metrics.jsonl").write_text(metrics)
    started = time.monotonic()
    records = read_records([tmp_path])
    text = markdown(make_table(suite, "smoke", records))
    assert len(records) == 1000
    assert "50.0 ± 0.0" in text
    assert time.monotonic() - started < 10


class FakeApi:
    """Has the runs of one project, as the public API of Weights & Biases gives them."""

    def __init__(self, runs):
        self._runs = runs

    def runs(self, path, filters=None):
        if path != "somebody/pruning":
            raise ValueError(f"Could not find project {path}\nTraceback")
        (state,) = filters.values()
        return (run for run in self._runs if run.state == state)


class FakeMirror:
    def __init__(self, folder, state="finished"):
        summary = summary_of(folder)
        self._rows = [{key: value for key, value in row.items() if value is not None} for row in rows_of(folder)]
        self.id, self.name, self.state = folder.name, "warm-sun-1", state
        self.config = {"seed": summary["seed"], "environment": environment_of(folder)}
        self.summary = self._rows[-1] | summary | {"_step": 1, "_runtime": 3.0, "_wandb": {"runtime": 3}}

    def scan_history(self):
        return iter([{"_step": row["epoch"], "_timestamp": 1.0} | row for row in self._rows])


def _of_the_grid(name, scale, own):
    return load_suite(name, [*GRID[1:], *scale])


@pytest.fixture
def make_tables(monkeypatch):
    module = importlib.import_module("alignprune_exp.tables")
    options = {"suite": ["main"], "scale": ["smoke"]}
    monkeypatch.setattr(
        module, "option_names", lambda group, own: ["mine"] if own and group == "suite" else options[group]
    )
    monkeypatch.setattr(module, "load_suite", _of_the_grid)
    return module


def test_runs_of_a_mirrored_project_give_the_same_tables(results, tmp_path, make_tables, monkeypatch):
    runs = [FakeMirror(folder) for folder in (results / "runs").iterdir()]
    runs += [FakeMirror(results / "runs" / "000000000000", "crashed")]
    monkeypatch.setattr("wandb.Api", lambda: FakeApi(runs))
    nowhere = str(tmp_path / "nowhere")
    assert make_tables.main([str(results), "--out", str(tmp_path / "local")]) == 0
    assert make_tables.main([nowhere, "--out", str(tmp_path / "mirror"), "--wandb", "somebody/pruning"]) == 0
    local, mirror = (
        {path.name: path.read_text() for path in (tmp_path / out / "tables").iterdir()} for out in ("local", "mirror")
    )
    assert mirror == local
    assert set(local) == {"main_smoke.md", "main_smoke.csv", "main_smoke_long.csv", "main_smoke.tex"}


def test_a_project_that_cannot_be_read_gets_one_sentence(results, tmp_path, make_tables, monkeypatch, capsys):
    monkeypatch.setattr("wandb.Api", lambda: FakeApi([]))
    assert make_tables.main([str(results), "--out", str(tmp_path / "out"), "--wandb", "somebody/else"]) == 2
    assert capsys.readouterr().err.endswith("somebody/else cannot be read: Could not find project somebody/else\n")
    assert not (tmp_path / "out").exists()


def test_without_a_key_the_script_says_so(tmp_path):
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "WANDB_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "alignprune_exp.tables", tmp_path, "--wandb", "somebody/pruning"]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert re.fullmatch(r"the Weights & Biases project somebody/pruning cannot be read: .*wandb login.*\n", done.stderr)


def test_a_suite_and_a_score_of_ones_own_have_their_table(tmp_path, make_tables, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_table_scores.py").write_text(
        "from alignprune_exp.pruning import Score\n\n\nclass Halving(Score):\n"
        "    def __call__(self, history):\n        return history.last_N / 2\n"
    )
    (tmp_path / "conf" / "suite").mkdir(parents=True)
    (tmp_path / "conf" / "suite" / "mine.yaml").write_text(
        """
# @package _global_
suite: {name: mine, rows: score.name, columns: noise, baseline: loss}
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      noise: sym0.5
      pruner: infobatch
      score.name: loss,own_table_scores.Halving
      epochs: 6
      dataset.subset: 100
      dataset.test_subset: 50
      seed: 0
"""
    )
    monkeypatch.setattr(make_tables, "load_suite", load_suite)
    own = ["--config-dir", str(tmp_path / "conf")]
    assert train(["suite=mine", "scale=smoke", f"paths.results={tmp_path}", *own]) == 0
    assert make_tables.main([str(tmp_path), "--out", str(tmp_path), *own]) == 0
    plain = (tmp_path / "report.html").read_text()
    assert make_tables.main([str(tmp_path), "--out", str(tmp_path), "--data", str(tmp_path), *own]) == 0
    with_images = (tmp_path / "report.html").read_text()
    assert (plain.count("data:image/jpeg"), with_images.count("data:image/jpeg")) == (0, 1)
    rows = pd.read_csv(tmp_path / "tables" / "mine_smoke.csv").set_index("row")
    assert list(rows.index) == ["loss", "own_table_scores.Halving"]
    assert rows["n"].tolist() == [1, 1]
    assert "| AUROC Halving |" in (tmp_path / "tables" / "mine_smoke.md").read_text()


def test_tables_need_neither_torch_nor_data():
    code = "import sys, alignprune_exp.tables, alignprune_exp.report.publish; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_runs_that_no_suite_has_are_named(results, tmp_path, make_tables, capsys):
    assert make_tables.main([str(results), "--out", str(tmp_path / "out")]) == 0
    assert "in no table" not in capsys.readouterr().err
    for number in range(12):
        write_record(tmp_path, f"{number:x}bbbbbbbbbbb", f"{number:x}fffffffffff", 50.0, 3)
    assert make_tables.main([str(results), "--out", str(tmp_path / "out")]) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("in no table: "))
    assert line.count("bbbbbbbbbbb") == 10
    assert line.endswith(" and 2 more, which no suite's grid has")


def test_what_is_damaged_is_named_wherever_tables_are_written(results, suite, tmp_path, make_tables, capsys):
    runs = sorted((results / "runs").iterdir())
    looked_at = _folders(results, suite, method="full", noise="sym0.5")[0].name
    edit_rows(runs[0], lambda rows: rows[:1])
    by_seed = {json.loads((run / "summary.json").read_text())["seed"]: run for run in runs[:0:-1]}
    assert make_tables.main([str(results), "--out", str(tmp_path / "before")]) == 0
    for run in runs:
        (run / "dynamics.parquet").write_bytes(b"PAR1")
    edit_json(by_seed[2] / "summary.json", scale="enormous")
    assert make_tables.main([str(results), "--out", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert f"left out: {runs[0]}/metrics.jsonl is damaged (1 of 2 epochs)" in err
    assert f"not drawn: {looked_at} (dynamics.parquet: cannot be read as Parquet)" in err
    assert f"left out: no config has scale=enormous, which {by_seed[2].name} ran at" in err
    for name in ("tables/main_smoke.md", "tables/main_smoke.tex", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert f"Left out, since their records are damaged: {runs[0].name} (metrics.jsonl: 1 of 2 epochs)." in text
        assert f"{looked_at} (dynamics.parquet: cannot be read as Parquet)" in text
    assert (tmp_path / "before/figures/main_smoke_losses.png").exists()
    assert not (tmp_path / "out/figures/main_smoke_losses.png").exists()
    assert (tmp_path / "out/figures/main_smoke_kept.png").exists()


def test_a_table_whose_runs_are_gone_is_left_and_named(results, tmp_path, make_tables, capsys):
    out, words = tmp_path / "out", [str(results), "--out", str(tmp_path / "out")]
    assert make_tables.main(words) == 0
    assert make_tables.main([*words, "--best"]) == 0
    written = {file.name for file in (out / "tables").iterdir() if "_best" not in file.name}
    gone = {name: name.replace("main_smoke", "gone_smoke") for name in written}
    for name, other in gone.items():
        (out / "tables" / other).write_bytes((out / "tables" / name).read_bytes())
    (out / "tables" / "notes.md").write_text("of somebody's own\n")
    assert "earlier" not in capsys.readouterr().err  # neither of what was written, nor of what --best writes
    assert make_tables.main(words) == 0
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "earlier" in line)
    assert said.startswith(f"{out}/tables/gone_smoke.md is of an earlier time: there is no run of it now; remove it")
    assert all((out / "tables" / name).is_file() for name in (*gone.values(), "notes.md"))
    (out / "tables" / gone["main_smoke.tex"]).unlink()  # by now it may be anybody's
    assert make_tables.main(words) == 0
    assert "earlier" not in capsys.readouterr().err


def test_a_readme_gets_its_tables_and_keeps_the_rest(results, tmp_path, make_tables, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table main_smoke -->\nold\n<!-- end -->\nafter\n")
    arguments = [str(results), "--out", str(tmp_path / "out"), "--into", str(readme)]
    assert make_tables.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table main_smoke -->\n| method / noise | ")
    assert text.endswith(" |\n<!-- end -->\nafter\n")
    assert "old" not in text
    assert "| infobatch_das | 72.0 ± 1.0 | 60.5 ± 0.7 (n=2) |" in text
    assert make_tables.main(arguments) == 0
    assert readme.read_text() == text
    readme.write_text("<!-- table mian_smoke -->\n<!-- end -->\n")
    assert make_tables.main(arguments) == 2
    assert "place for table mian_smoke and no such table; it could be main_smoke" in capsys.readouterr().err


def test_a_readme_may_show_another_number_of_the_runs(results, tmp_path, make_tables):
    readme, place = tmp_path / "README.md", "<!-- table main_smoke kept_noise_mean -->"
    readme.write_text(f"{place}\n<!-- end -->\n<!-- table main_smoke -->\n<!-- end -->\n")
    arguments = [str(results), "--out", str(tmp_path / "out"), "--into", str(readme)]
    assert make_tables.main(arguments) == 0
    text = readme.read_text()
    own, accuracies = text.split("<!-- end -->\n")[:2]
    runs = pd.read_csv(tmp_path / "out/tables/main_smoke_long.csv")
    (head, _, *rows) = [line.strip("| ").split(" | ") for line in own.splitlines()[1:]]
    for row, *cells in rows:
        for column, cell in zip(head[1:], cells, strict=True):
            there = runs[(runs["row"] == row) & (runs["column"] == column.rstrip("*"))]["kept_noise_mean"]
            assert cell.startswith(f"{there.mean():.3f}" if len(there) else "–")
    assert "72.0" in accuracies
    assert make_tables.main(arguments) == 0
    assert readme.read_text() == text


CLAIMED = """
On clean labels they end at 71.0 % and 72.0 %.

1. DAS is one above full training on average
   (1.0 [−1.5, 3.5]), in three seeds by 1.0, 2.0 and 0.0.
   <!-- claims
   main_smoke clean: infobatch_das - full ≈
   main_smoke clean: infobatch_das - full = [0, 0] of 9
   main_smoke clean: infobatch_das - full each = 7
   main_smoke clean: infobatch_das - full by seeds 0,1 ≈ 8
   main_smoke clean: full - main_smoke sym0.5: infobatch ≈
   main_smoke sym0.5: infobatch_das - full = []
   end -->
2. It keeps 0.4 noise.
<!-- claims
main_smoke clean: full = 1
main_smoke.kept_noise_mean clean: full = 0.9
end -->
"""


def test_what_prose_claims_is_compared_with_the_tables(results, tmp_path, make_tables, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(CLAIMED)
    arguments = [str(results), "--out", str(tmp_path / "out"), "--into", str(readme)]
    assert make_tables.main(arguments) == 2
    ours, base = (ACCURACY[method, "clean"] for method in ("infobatch_das", "full"))
    low, high = ttest_rel(ours, base).confidence_interval()
    interval = f"[{low:.1f}, {high:.1f}]".replace("-", "−")
    told = [line.strip() for line in readme.read_text().splitlines() if line.strip().startswith("main_smoke")]
    assert told == [
        "main_smoke clean: infobatch_das - full ≈ 1.0 of 3",
        f"main_smoke clean: infobatch_das - full = 1.0 {interval} of 3",
        "main_smoke clean: infobatch_das - full each = 1.0, 2.0, 0.0",
        "main_smoke clean: infobatch_das - full by seeds 0,1 ≈ 1.5 of 2",
        "main_smoke clean: full - main_smoke sym0.5: infobatch ≈ 30.0 of 3",
        "main_smoke sym0.5: infobatch_das - full = 10.0 [10.0, 10.0] of 2",
        "main_smoke clean: full = 71.0 of 3",
        "main_smoke.kept_noise_mean clean: full = 0.40 of 3",
    ]
    (sentence,) = capsys.readouterr().err.splitlines()
    first, second, third = sentence.partition("; mend the prose")[0].split("; ")
    assert f"{readme}: the paragraph above line 6 does not say 10.0 and [10.0, 10.0]: main_smoke sym0.5" in first
    assert f"{readme}: the paragraph above line 15 does not say 71.0: main_smoke clean" in second
    assert "does not say 0.40: main_smoke.kept_noise_mean" in third
    assert (tmp_path / "out" / "report.html").is_file()
    mended = readme.read_text().replace("0.4 noise", "0.40 noise, at 71.0, and 10.0 more")
    mended = mended.replace("main_smoke sym0.5: infobatch_das - full =", "main_smoke sym0.5: infobatch_das - full ≈")
    readme.write_text(mended)
    assert make_tables.main(arguments) == 0
    assert readme.read_text() == mended


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("main_smoke clean full = 1", "cannot read the claim"),
        ("mian_smoke clean: full = 1", "is of no table mian_smoke; it could be main_smoke"),
        ("main_smoke clean: full - mian_smoke clean: full = 1", "is of no table mian_smoke; it could be main_smoke"),
        ("main_smoke clean: seta = 1", "main_smoke has no row seta; it could be full, infobatch, infobatch_das"),
        ("main_smoke real: full = 1", "main_smoke has no column real; it could be clean, sym0.5"),
        (
            "main_smoke sym0.5: infobatch_das by seed 2 =",
            "no such run of infobatch_das at sym0.5 has a number test_acc",
        ),
        ("main_smoke.kept clean: full = 1", "no such run of full at clean has a number kept"),
        ("main_smoke.dataset clean: full = 1", "no such run of full at clean has a number dataset"),
        ("main_smoke clean: full by seed 9 = 1", "no such run of full at clean"),
        ("main_smoke clean: full - infobatch by seed 0,1,2 = 1 of 3", ""),
        ("main_smoke clean: full ≈\nend -->\n<!-- claims -->", "a block of claims begins or ends otherwise than"),
    ],
)
def test_a_claim_that_is_of_nothing_is_one_sentence(results, tmp_path, make_tables, capsys, line, words):
    readme = tmp_path / "README.md"
    readme.write_text(f"It ends 1.0 below.\n<!-- claims\n{line}\nend -->\n")
    assert make_tables.main([str(results), "--out", str(tmp_path / "out"), "--into", str(readme)]) == (
        2 if words else 0
    )
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("line", ["main_smoke clean full = 1", "main_smoke clean: full ="])
def test_a_claim_that_cannot_be_read_is_told_before_any_record_is(tmp_path, make_tables, capsys, line):
    readme = tmp_path / "README.md"
    readme.write_text(f"It ends 1.0 below.\n<!-- claims\n{line}\nend -->\n")
    assert make_tables.main([str(tmp_path / "nowhere"), "--out", str(tmp_path), "--into", str(readme)]) == 2
    assert ("cannot read the claim" if "clean f" in line else "no finished runs under") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("claim", "prose", "lacking"),
    [
        ("infobatch_das - full each", "ends 1.0, 2.0 and 0.0 above it", ""),
        ("infobatch_das - full each", "ends 1.0,\n2.0 and 0.0 above it", ""),
        ("infobatch_das - full each", "ends 1.0, 0.0 and 2.0 above it", "1.0, 2.0 and 0.0"),
        ("infobatch_das - full each", "ends 0.0 to 2.0, on average 1.0, above it", "1.0, 2.0 and 0.0"),
        ("full - infobatch_das each", "ends 1.0, 2.0 and 0.0 below it", ""),
        ("full - infobatch_das each", "has −1.0, −2.0 and 0.0", ""),
        ("infobatch_das - full each", "has −1.0, 2.0 and 0.0", "1.0, 2.0 and 0.0"),
        ("infobatch_das - full range", "ends 0.0 to 2.0 above it", ""),
        ("infobatch_das - full range", "ends 0.0 or 2.0 above it", "0.0 to 2.0"),
        ("infobatch_das - full by seed 1 each", "ends 2.0 above it", ""),
        ("infobatch_das - full", "ends +1.0 above it", ""),
        ("infobatch_das - full", "ends −1.0 above it", "1.0"),
        ("full - infobatch_das", "ends 1.0 below it", ""),
        ("infobatch_das - full", "ends 11.0, or 1.05, above it", "1.0"),
        ("infobatch_das - full", "ends 1.0 above it, −1.5 to 3.5", ""),
        ("infobatch_das - full", "ends 1.0 above it [−1.5, +3.5]", ""),
        ("infobatch_das - full", "ends 1.0 above it, 1.5 to 3.5", "[−1.5, 3.5]"),
        ("infobatch_das - full", "ends 1.0 above it, of 3.5, −1.5", "[−1.5, 3.5]"),
    ],
)
def test_prose_has_the_numbers_of_a_claim_in_order_with_their_signs_or_all_without(
    results, suite, claim, prose, lacking
):
    tables = {"main_smoke": make_table(suite, "smoke", read_records([results]))}
    asked = " []" if "1.5" in prose else ""
    told = recounted(f"It {prose}.\n<!-- claims\nmain_smoke clean: {claim} ={asked}\nend -->\n", tables)[1]
    assert [line.split(" does not say ")[1].split(": ")[0] for line in told] == ([lacking] if lacking else [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"<!-- table main_smoke dataset -->\n<!-- end -->\n", "the runs of table main_smoke have no number dataset"),
        (b"<!-- table mian_smoke -->\n<!-- end -->\n", "a place for table mian_smoke and no such table"),
        (b"<!-- table main_smoke -->\nx\n", "the place for table main_smoke does not end; write <!-- end -->"),
        (
            b"<!-- table main_smoke -->\nmine\n<!-- table main_smoke -->\n<!-- end -->\n",
            "the place for table main_smoke does not end",
        ),
        (b"\xff\xfe", "is no text in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
    ids=["no number", "another's place", "no end", "no end before the next", "no text", "not there"],
)
def test_a_mistake_in_one_readme_leaves_all_of_them_as_they_were(results, tmp_path, make_tables, capsys, text, words):
    right, wrong, out = tmp_path / "right.md", tmp_path / "wrong.md", tmp_path / "out"
    right.write_text("<!-- table main_smoke -->\nold\n<!-- end -->\n")
    if text is not None:
        wrong.write_bytes(text)
    before = right.read_text()
    assert make_tables.main([str(results), "--out", str(out), "--into", str(right), str(wrong)]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert str(wrong) in sentence
    assert words in sentence
    assert right.read_text() == before
    assert not out.exists()


def test_upper_bounds_are_the_scores_that_know_the_truth():
    assert {name for name, score in SCORES.items() if score.by_truth} == set(BOUNDS)


WORKING = """
import os, sys, time
from alignprune_exp.console import command
from alignprune_exp.report.workers import workers

def work():
    with workers() as pool:
        print(*{task.result() for task in [pool.submit(os.getpid) for _ in range(20)]}, flush=True)
        for task in [pool.submit(time.sleep, 600) for _ in range(20)]:
            task.result()

sys.exit(command(work))
"""


@pytest.mark.parametrize("stop", [os.kill, os.killpg])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_works_on_all_processors_ends_when_it_is_told_to(stop, number):
    line = [sys.executable, "-c", WORKING]
    with subprocess.Popen(line, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as process:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        stop(process.pid, number)
        out, err = process.communicate(timeout=60)
    assert (out, err.splitlines()[-1:]) == ("", ["stopped"]), err
    assert process.returncode == 130
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
