"""Curation on DuckDB: every layout against `pruning.scores`, what is kept, going on, and all that can be wrong."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignprune_exp import cli
from alignprune_exp.curate import command, formulas, layout, scoring
from alignprune_exp.curate.engine import Engine
from alignprune_exp.pruning import SCORES, Trajectories
from alignprune_exp.pruning.scores import cosine, pearson, spearman
from alignprune_exp.runs import Lock
from harness import contents, missing, sentence_of, truncate

CLOSE = 1e-6
CONNECTION = duckdb.connect(config={"threads": 1})
FORMULAS = {"das": pearson, "spearman": spearman, "cosine": cosine}
LAYOUTS = ("rows", "checkpoints", "blocks", "files", "buckets")


# ---- what is expected: the package's own scores, in float64 ----------------------------------------------------------


def expected(score, losses_NW, reference):
    """The scores (N,) of trajectories with NaN where a loss lacks; NaN where all do."""
    losses_WN = torch.from_numpy(np.float64(losses_NW).T.copy())
    if score == "settled":
        return -losses_WN.nanmean(0).numpy()
    reference_W = torch.tensor([math.nan if each is None else each for each in reference], dtype=torch.float64)
    scores_N = FORMULAS[score](losses_WN, reference_W)
    return scores_N.masked_fill(losses_WN.isnan().all(0), math.nan).numpy()


def by_formula(how, score, losses_NW, reference):
    """The scores (N,) by SQL, NaN where it has none."""
    missing_NW = np.isnan(losses_NW)
    columns = {f"x{k}": pa.array(losses_NW[:, k], mask=missing_NW[:, k]) for k in range(losses_NW.shape[1])}
    CONNECTION.register("given", pa.table({"id": np.arange(len(losses_NW)), **columns}))
    losses = ", ".join(f"x{k}::DOUBLE AS l{k}" for k in range(len(columns)))
    sql = how(score, f"SELECT id, {losses}, 0 AS again, FALSE AS apart FROM given", reference)
    rows = CONNECTION.execute(f"SELECT score FROM ({sql}) ORDER BY id").fetchall()
    return np.array([math.nan if row[0] is None else row[0] for row in rows])


def check_formulas(score, losses_NW, reference):
    right = expected(score, losses_NW, reference)
    scores_N = by_formula(formulas.gappy, score, losses_NW, reference)
    np.testing.assert_allclose(scores_N, right, rtol=CLOSE, atol=CLOSE)
    scores_N = by_formula(formulas.whole, score, losses_NW, reference)
    whole_N = ~np.isnan(scores_N)
    assert not whole_N[np.isnan(losses_NW).any(1)].any()
    assert whole_N[(~np.isnan(losses_NW)).all(1) & (np.abs(losses_NW) < 1e36).all(1)].all()
    np.testing.assert_allclose(scores_N[whole_N], right[whole_N], rtol=CLOSE, atol=CLOSE)


KINDS = {
    "losses": lambda rng, shape: rng.gamma(1, 2, shape),
    "levels, many constant": lambda rng, shape: rng.integers(0, rng.integers(1, 4, (shape[0], 1)), shape) / 3,
    "far from 0": lambda rng, shape: 1000 + 1e-3 * rng.gamma(1, 2, shape),
    "an outlier first": lambda rng, shape: rng.gamma(1, 2, shape) + np.where(np.arange(shape[1]) == 0, 1e5, 0),
    "tiny": lambda rng, shape: 1e-38 * rng.gamma(1, 2, shape),
    "huge": lambda rng, shape: np.clip(1e37 * rng.gamma(1, 2, shape), 0, 3e38),
}


@pytest.mark.parametrize("score", formulas.SCORES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sql_is_the_packages_scores(score, kind):
    rng = np.random.default_rng(len(kind))
    for width, share in ((1, 0), (2, 0.3), (3, 0), (4, 0.3), (10, 0), (10, 0.3), (10, 0.8), (17, 0.1)):
        losses_NW = KINDS[kind](rng, (200, width)).astype(np.float32)
        losses_NW[rng.random(losses_NW.shape) < share] = np.nan
        reference = rng.integers(0, 3, width).tolist() if "levels" in kind else rng.gamma(1, 2, width).tolist()
        if share and width > 3:
            reference[1] = None
        check_formulas(score, losses_NW, reference)


@given(st.data(), st.integers(3, 8), st.sampled_from(formulas.SCORES), st.sampled_from([0.0, 2.0, 1e4]))
@settings(max_examples=40)
def test_the_sql_is_the_packages_scores_on_what_hypothesis_draws(data, width, score, offset):
    value = st.floats(0, 30, width=32).map(lambda x: x + offset)
    rows = st.lists(st.one_of(value, st.just(math.nan)), min_size=width, max_size=width)
    losses_NW = np.float32(data.draw(st.lists(rows, min_size=1, max_size=4)))
    reference = data.draw(st.lists(st.one_of(value, st.none()), min_size=width, max_size=width))
    check_formulas(score, losses_NW, reference)


def test_many_checkpoints_do_not_nest_too_deeply():
    rng = np.random.default_rng(0)
    check_formulas("das", rng.gamma(1, 2, (20, 300)).astype(np.float32), rng.gamma(1, 2, 300).tolist())


# ---- files, in every layout ------------------------------------------------------------------------------------------

AT = [0, 500, 1000, 1500, 2000, 2500]


def drawn(n=400, seed=0, share=0.0, width=6):
    """Ids, losses (N, W) with NaN where one lacks, and a reference (W,)."""
    rng = np.random.default_rng(seed)
    losses_NW = rng.integers(0, 40, (n, width)).astype(np.float32) / 7
    losses_NW[rng.random(losses_NW.shape) < share] = np.nan
    return 5 + 3 * np.arange(n), losses_NW, rng.gamma(1, 2, width)


def write(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = columns.pop("row_group_size", 64)
    pq.write_table(pa.table(columns), path, row_group_size=groups)


def write_rows(path, ids, losses_NW, order):
    """A file of id, checkpoint and loss, in the order of (sample, checkpoint); what lacks has no row."""
    sample, at = np.divmod(order, losses_NW.shape[1])
    there = ~np.isnan(losses_NW[sample, at])
    sample, at = sample[there], at[there]
    write(path, id=np.asarray(ids)[sample], checkpoint=np.array(AT)[at], loss=losses_NW[sample, at])


def lay_out(how, ids, losses_NW, files=2, folder=Path("losses")):
    """Write losses, by the layout that they are to be found in."""
    ids, width = np.asarray(ids), losses_NW.shape[1]
    shares = np.array_split(np.arange(len(ids)), files)
    everything = np.random.default_rng(1).permutation(losses_NW.size)
    for number, share in enumerate(shares):
        if how == "rows":
            lists = [[None if math.isnan(x) else x for x in row] for row in losses_NW[share].tolist()]
            losses = pa.array(lists, pa.list_(pa.float32()))
            write(folder / f"{number}.parquet", id=ids[share], losses=losses)
        elif how == "checkpoints":
            for k in range(width):
                loss = pa.array(losses_NW[share, k], mask=np.isnan(losses_NW[share, k]))
                write(
                    folder / f"at{k}" / f"{number}.parquet", id=ids[share], checkpoint=[AT[k]] * len(share), loss=loss
                )
        elif how == "blocks":
            loss = pa.array(losses_NW[share].ravel(), mask=np.isnan(losses_NW[share].ravel()))
            at = np.tile(AT, len(share))
            write(folder / f"{number}.parquet", id=np.repeat(ids[share], width), checkpoint=at, loss=loss)
        else:
            mine = everything[number::files] if how == "buckets" else everything[np.isin(everything // width, share)]
            write_rows(folder / f"{number}.parquet", ids, losses_NW, mine)
    return str(folder)


def write_reference(values, at=AT, path=Path("reference.parquet")):
    write(path, checkpoint=at, loss=np.float64(values))
    return str(path)


def curate(*arguments, keep=0.6, out="keep"):
    return command.main([*map(str, arguments), "--keep", str(keep), "-o", str(out)])


def marked(part):
    """Give all ids of a part that is scored another score, by which they can be told; return them."""
    before = pq.read_table(part)
    pq.write_table(before.set_column(1, "score", pa.array(np.full(len(before), 0.125, np.float32))), part)
    return before["id"].to_numpy()


def found(out="keep", what="scores"):
    """The output by id, and the summary."""
    written = f"read_parquet('{out}/{what}/**/*.parquet', hive_partitioning = false)"
    table = duckdb.sql(f"FROM {written} ORDER BY id").fetchnumpy()
    return table, json.loads((Path(out) / "summary.json").read_text())


def outcome(out, place=None):
    """The bytes of what was written, and the summary without what names the engine, the time and the place."""
    summary = json.loads((Path(out) / "summary.json").read_text())
    for its_own in ("engine", "seconds", "losses"):
        del summary[its_own]
    for each in summary["skipped"]:
        each |= {key: each[key].replace(f"{place or Path.cwd()}/", "") for key in ("what", "file")}
    return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).glob("scores/**/*.parquet")}, summary


def check_found(score, ids, losses_NW, reference, keep, out="keep"):
    """The output is the package's scores, and what they keep, ties to the lower id."""
    table, summary = found(out)
    right = expected(score, losses_NW, reference)
    assert table["id"].tolist() == list(ids)
    scores_N = np.ma.filled(np.ma.asarray(table["score"]), np.nan)
    np.testing.assert_allclose(scores_N, right, rtol=CLOSE, atol=CLOSE)
    scored = ~np.isnan(scores_N)
    kept = min(math.floor(Fraction(str(keep)) * len(ids)), scored.sum())
    first = np.lexsort((np.asarray(ids), np.where(scored, -scores_N, np.inf)))[:kept]
    assert np.flatnonzero(table["keep"]).tolist() == sorted(first.tolist())
    assert (summary["samples"], summary["kept"], summary["unscored"]) == (len(ids), kept, (~scored).sum())
    return summary


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("score", formulas.SCORES)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_each_layout_has_the_packages_scores_and_keeps_the_best(place, capsys, how, score, share):
    ids, losses_NW, reference = drawn(share=share)
    losses_NW[7] = 2.5  # constant
    losses_NW[9, 1:] = np.nan if share else 3  # alone at its checkpoint
    losses = lay_out(how, ids, losses_NW)
    seen = ~np.isnan(losses_NW).all(1) | (how in ("rows", "checkpoints", "blocks"))  # the others have no row at all
    gaps = ["--gaps"] if share else []
    assert curate(losses, "--reference", write_reference(reference), "--score", score, *gaps) == 0
    summary = check_found(score, ids[seen], losses_NW[seen], reference, 0.6)
    assert summary["layout"] == how
    assert summary["missing_losses"] == np.isnan(losses_NW[seen]).sum()
    assert f"of {seen.sum()} ids are kept" in capsys.readouterr().out
    assert sorted(path.name for path in Path("keep").iterdir()) == ["scores", "summary.json"]


@pytest.mark.parametrize("unseen", ["mask", "carry"])
def test_what_a_bank_would_score_is_what_its_log_scores(place, unseen):
    ids, losses_NW, reference = drawn(share=0.3, width=6)
    bank = Trajectories(len(ids), 6, unseen)
    for k in range(6):
        index = np.flatnonzero(~np.isnan(losses_NW[:, k]))
        bank.record(torch.from_numpy(index), torch.from_numpy(losses_NW[index, k]))
        bank.end_epoch(reference[k])
    logged = torch.stack(list(bank.history().rows)).T.numpy()
    lay_out("rows", ids, logged)
    assert curate("losses", "--reference", write_reference(reference), "--gaps") == 0
    scores_N = found()[0]["score"]
    np.testing.assert_allclose(np.ma.filled(scores_N, np.nan), SCORES["das"]()(bank.history()).numpy(), atol=1e-5)


def test_rows_beside_each_other_are_read_in_ranges_of_row_groups(place, monkeypatch):
    monkeypatch.setattr(layout, "RANGE", 100)
    ids, losses_NW, reference = drawn()
    lay_out("checkpoints", ids, losses_NW)
    assert curate("losses", "--reference", write_reference(reference)) == 0
    assert len(list(Path("keep/scores").iterdir())) == 4
    assert check_found("das", ids, losses_NW, reference, 0.6)["layout"] == "checkpoints"


@given(st.lists(st.tuples(st.integers(0, 47), st.integers(0, 47)), max_size=3), st.sampled_from(["swapped", "copied"]))
@settings(max_examples=30)
def test_blocks_are_scored_as_such_where_every_row_is_where_it_is_due(moves, how):
    ids, losses_NW, reference = drawn(n=8)
    order = np.arange(losses_NW.size)
    for here, there in moves:
        order[here], order[there] = order[there], order[here] if how == "swapped" else order[there]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(scoring, "BEGINNING", 6)
        write_rows(Path("losses/0.parquet"), ids, losses_NW, order)
        status = curate("losses", "--reference", write_reference(reference))
        assert (status == 0) == (len(set(order)) == len(order))
        if status == 0:
            blocks_NW = order.reshape(-1, 6)
            right = (blocks_NW % 6 == np.arange(6)).all() and (blocks_NW // 6 == blocks_NW[:, :1] // 6).all()
            assert check_found("das", ids, losses_NW, reference, 0.6)["layout"] == ("blocks" if right else "files")


def test_blocks_in_any_order_are_blocks_and_an_id_has_one(place, capsys):
    ids, losses_NW, reference = drawn()
    blocks = np.random.default_rng(0).permutation(len(ids))
    rows = (blocks[:, None] * 6 + np.arange(6)).ravel()
    write_rows(Path("losses/0.parquet"), ids, losses_NW, rows[:1200])
    write_rows(Path("losses/1.parquet"), ids, losses_NW, rows[1200:])
    asked = ("losses", "--reference", write_reference(reference))
    assert curate(*asked) == 0
    assert check_found("das", ids, losses_NW, reference, 0.6)["layout"] == "blocks"
    assert pq.read_table("keep/scores/0.parquet")["id"].to_pylist() == ids[blocks[:200]].tolist()
    write_rows(Path("losses/1.parquet"), ids, losses_NW, rows[1194:])
    assert curate(*asked, "--force") == 2
    assert not missing([f"id {ids[blocks[199]]} is there twice"], sentence_of(capsys.readouterr().err))


def test_checkpoints_in_different_orders_are_divided_instead(place, capsys):
    ids, losses_NW, reference = drawn()
    lay_out("checkpoints", ids, losses_NW)
    table = pq.read_table("losses/at3/1.parquet")
    pq.write_table(table.take(np.r_[np.arange(len(table) - 2), len(table) - 1, len(table) - 2]), "losses/at3/1.parquet")
    for gaps in ((), ("--gaps", "--force")):
        assert curate("losses", "--reference", write_reference(reference), *gaps) == 0
        assert check_found("das", ids, losses_NW, reference, 0.6)["layout"] == "buckets"
        assert "ids in different orders" in capsys.readouterr().out


def test_ids_and_checkpoints_may_be_texts_under_other_names_in_folders_that_name_them(place):
    ids, losses_NW, reference = drawn(n=300)
    names, at = [f"doc'{i:05}" for i in ids], [f"step_{k}" for k in range(len(AT))]
    for k, step in enumerate(at):
        write(Path(f"losses/step={step}/0.parquet"), doc=names, nll=losses_NW[:, k])
    Path("reference.csv").write_text("step,nll\n" + "".join(f"{a},{b}\n" for a, b in zip(at, reference, strict=True)))
    assert curate("losses", "--reference", "reference.csv", "--columns", "doc,step,nll") == 0
    assert check_found("das", names, losses_NW, reference, 0.6)["layout"] == "checkpoints"


def test_names_with_what_is_a_pattern_elsewhere_are_names(place):
    ids, losses_NW, reference = drawn()
    names = ["a[1].parquet", "a1.parquet", "b?.parquet", "b1.parquet", "it's.parquet", "c*.parquet", "c{x,y}.parquet"]
    for name, share in zip(names, np.array_split(np.arange(len(ids)), len(names)), strict=True):
        write(Path("losses[1]") / name, id=ids[share], losses=list(losses_NW[share]))
    asked = ("--reference", write_reference(reference, path=Path("r?.parquet")))
    write_reference(-reference, path=Path("r1.parquet"))
    assert curate("losses[1]", *asked) == 0
    check_found("das", ids, losses_NW, reference, 0.6)
    assert sorted(path.name for path in Path("keep/scores").iterdir()) == sorted(names)
    assert curate("losses[1]/a[1].parquet", *asked, out="one") == 0
    assert found("one")[0]["id"].tolist() == ids[: len(ids) // len(names) + 1].tolist()


TIMES = {
    "integers": np.arange(12) * 5,
    "fractions": np.arange(12) / 4,
    "dates": np.arange("2024-01-25", "2024-02-06", dtype="datetime64[D]"),
    "texts of integers": [str(k) for k in range(12)],
    "texts": [f"epoch{k}" for k in range(12)],
}


@pytest.mark.parametrize("kind", TIMES)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_places_in_lists_are_of_checkpoints_with_an_order_that_is_no_alphabets(place, capsys, kind, suffix):
    ids, losses_NW, reference = drawn(width=12)
    lay_out("rows", ids, losses_NW)
    table = pa.table({"checkpoint": TIMES[kind], "loss": reference}).take(np.random.default_rng(0).permutation(12))
    if suffix == "csv":
        table.to_pandas().to_csv("reference.csv", index=False)
    else:
        pq.write_table(table, "reference.parquet")
    refused = kind == "texts" or (kind == "texts of integers" and suffix == "parquet")  # a CSV has no texts of integers
    assert curate("losses", "--reference", f"reference.{suffix}") == (2 if refused else 0)
    if refused:
        words = [f"--reference reference.{suffix}", f"checkpoint {min(TIMES[kind])},", "number"]
        assert not missing(words, sentence_of(capsys.readouterr().err))
    else:
        check_found("das", ids, losses_NW, reference, 0.6)


@pytest.mark.parametrize("typed", ["it's [1] *", "it's [1] *.parquet", "it's [1] */0.pq"])
def test_what_is_there_is_no_pattern(place, typed):
    ids, losses_NW, reference = drawn()
    asked = ("--reference", write_reference(reference))
    write(Path("it's 1 x.parquet/a/0.parquet"), id=[0], losses=[[1.0]])
    path = Path(typed) if typed.endswith(".pq") else Path(typed) / "a/0.parquet"
    write(path, id=ids, losses=list(losses_NW))
    assert curate(typed, *asked) == 0
    check_found("das", ids, losses_NW, reference, 0.6)


PLACES = ["losses", "./losses/", "../{here}/losses", "{place}/losses", "los*es/**/*.parquet", "."]


@pytest.mark.parametrize("typed", PLACES)
@pytest.mark.parametrize("hidden", ["._0.parquet", ".trash/0.parquet"])
def test_hidden_files_of_a_folder_are_no_losses(place, monkeypatch, typed, hidden):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    Path("losses/.trash").mkdir()
    Path("losses", hidden).write_text("not Parquet")
    asked = ("--reference", str(place / write_reference(reference)))
    if typed == ".":
        monkeypatch.chdir("losses")
    typed = typed.format(here=place.name, place=place)
    assert curate(typed, *asked, out=str(place / "keep")) == 0
    check_found("das", ids, losses_NW, reference, 0.6, place / "keep")


def test_what_is_written_ends_in_parquet_and_no_two_files_become_one(place):
    ids, losses_NW, reference = drawn()
    names = ["a/0.pq", "a/0", "0.parquet", "0"]
    for name, share in zip(names, np.array_split(np.arange(len(ids)), len(names)), strict=True):
        write(Path("losses") / name, id=ids[share], losses=list(losses_NW[share]))
    assert curate("losses/**", "--reference", write_reference(reference)) == 0
    check_found("das", ids, losses_NW, reference, 0.6)
    assert len(outcome("keep")[0]) == len(names)


@pytest.mark.parametrize("how", LAYOUTS)
def test_settled_needs_no_reference(place, how):
    ids, losses_NW, _ = drawn()
    lay_out(how, ids, losses_NW)
    assert curate("losses/**/*.parquet", "--score", "settled") == 0
    check_found("settled", ids, losses_NW, [None] * len(AT), 0.6)


def test_without_a_reference_the_longest_of_all_lists_says_how_many_losses_are_due(place, capsys):
    ids, losses_NW, _ = drawn()
    for number, (share, width) in enumerate(zip(np.array_split(np.arange(len(ids)), 4), (0, 4, 6, 5), strict=True)):
        write(Path(f"losses/{number}.parquet"), id=ids[share], losses=list(losses_NW[share, :width]))
        losses_NW[share, width:] = np.nan
    asked = ("losses", "--score", "settled")
    assert curate(*asked) == 2
    said = sentence_of(capsys.readouterr().err)
    assert not missing(["losses/0.parquet", f"id {ids[0]} has no loss number 1 of 6", "--gaps"], said)
    assert curate(*asked, "--gaps") == 0
    summary = check_found("settled", ids, losses_NW, None, 0.6)
    assert (summary["checkpoints"], summary["missing_losses"]) == (6, np.isnan(losses_NW).sum())


def test_with_little_memory_ids_are_divided_into_buckets_that_fit(place):
    ids, losses_NW, reference = drawn(n=60_000)
    write_rows(Path("losses/a.parquet"), ids, losses_NW, np.random.default_rng(0).permutation(losses_NW.size))
    write_rows(Path("losses/b.parquet"), ids + 1, losses_NW, np.random.default_rng(0).permutation(losses_NW.size))
    sizes = [path.stat().st_size for path in Path("losses").iterdir()]
    few = ("--memory", "20MB", "--threads", "1")
    assert curate("losses", "--reference", write_reference(reference), *few) == 0
    assert len(list(Path("keep/scores").iterdir())) >= 3
    both = np.argsort(np.r_[ids, ids + 1], kind="stable")
    check_found("das", np.r_[ids, ids + 1][both], np.r_[losses_NW, losses_NW][both], reference, 0.6)
    assert sum(sizes) > 1e6


def test_the_bits_do_not_depend_on_threads(place):
    ids, losses_NW, reference = drawn(n=5000, share=0.1)
    lay_out("buckets", ids, losses_NW)
    asked = ("losses", "--reference", write_reference(reference), "--gaps")
    bits = []
    for threads in (1, 2, 2):
        assert curate(*asked, "--threads", threads, "--force") == 0
        bits.append({path.name: path.read_bytes() for path in Path("keep/scores").iterdir()})
    assert bits[0] == bits[1] == bits[2]


# ---- folders whose names say something -------------------------------------------------------------------------------

CLASHES = Path("loss=2/id=3/checkpoint=500/keep=1/score=das/size=7/filename=x/__bucket=1")


@pytest.mark.parametrize("how", LAYOUTS)
def test_what_a_file_has_counts_and_not_what_its_folders_are_called(place, how):
    ids, losses_NW, reference = drawn()
    losses, out = CLASHES / "losses" / CLASHES, CLASHES / "keep" / CLASHES
    out.parent.mkdir(parents=True)
    asked = ("--reference", write_reference(reference, path=CLASHES / "reference.parquet"))
    lay_out(how, ids, losses_NW, folder=losses)
    for typed in (losses, losses.absolute()):
        assert curate(typed, *asked, "--force", out=out) == 0
        assert check_found("das", ids, losses_NW, reference, 0.6, out=out)["layout"] == how


@pytest.mark.parametrize("where", ["relative", "absolute", "here", "pattern"])
def test_a_checkpoint_in_a_folders_name_counts_below_what_was_typed_where_the_file_has_none(place, monkeypatch, where):
    ids, losses_NW, reference = drawn()
    folder = Path("step=9") / "step=8"
    for k in range(6):
        path = folder / f"loss=1/step={AT[k]}/id=7/0.parquet"
        if k == 3:  # this one has it itself, and is called otherwise
            path = folder / "step=1/0.parquet"
            write(path, id=ids, step=[AT[k]] * len(ids), loss=losses_NW[:, k])
        else:
            write(path, id=ids, loss=losses_NW[:, k])
    write(Path("reference.parquet"), step=AT, loss=reference)
    typed = {"absolute": folder.absolute(), "here": ".", "pattern": f"{folder}/*/**/*.parquet"}.get(where, folder)
    if where == "here":
        monkeypatch.chdir(folder)
    asked = ("--reference", place / "reference.parquet", "--columns", "id,step,loss")
    assert curate(typed, *asked, out=place / "keep") == 0
    assert check_found("das", ids, losses_NW, reference, 0.6, out=place / "keep")["layout"] == "checkpoints"


@pytest.mark.parametrize("how", ["column", "folder"])
def test_a_column_called_filename_is_no_files_name(place, capsys, how):
    ids, losses_NW, _ = drawn(width=2)
    for k in range(2):
        order = np.random.default_rng(k).permutation(len(ids))
        at = {"step": [k] * len(ids)} if how == "column" else {}
        write(
            Path(f"losses/step={k}/0.parquet"), id=ids[order], loss=losses_NW[order, k], **at, filename=["x"] * len(ids)
        )
    asked = ("losses", "--score", "settled", "--columns", "id,step,loss")
    assert curate(*asked) == 0
    check_found("settled", ids, losses_NW, None, 0.6)
    table = pq.read_table("losses/step=1/0.parquet", partitioning=None)
    losses = [*table["loss"].to_pylist()[:-1], math.nan]
    pq.write_table(table.set_column(1, "loss", pa.array(losses, pa.float32())), "losses/step=1/0.parquet")
    assert curate(*asked, "--force") == 2
    words = ["losses/step=1/0.parquet, row group 0", f"id {table['id'][-1]} at checkpoint 1 is nan"]
    assert not missing(words, sentence_of(capsys.readouterr().err))


@pytest.mark.parametrize("absolute", [False, True])
def test_a_checkpoint_above_what_was_typed_is_none(place, monkeypatch, capsys, absolute):
    ids, losses_NW, _ = drawn()
    write(Path("step=500/losses/0.parquet"), id=ids, loss=losses_NW[:, 0])
    monkeypatch.chdir("step=500")
    asked = ("--score", "settled", "--columns", "id,step,loss")
    assert curate(Path("losses").absolute() if absolute else "losses", *asked, out=place / "keep") == 2
    assert not missing("losses/0.parquet has no column step", sentence_of(capsys.readouterr().err))


@pytest.mark.parametrize(
    "values",
    [["0", "5", "10"], ["2024-01-31", "2024-02-01", "2024-02-02"], ["a%2Fb c", "it's", "100 %+"], ["1.5", "x", "1e5"]],
)
def test_a_checkpoint_in_a_folders_name_is_a_number_or_a_date_or_a_text(place, values):
    ids, losses_NW, reference = drawn(width=3)
    for k, value in enumerate(values):
        order = np.random.default_rng(k).permutation(len(ids))
        for half in np.array_split(order, 2):
            write(Path(f"losses/step={value}/{half[0]}.parquet"), id=ids[half], loss=losses_NW[half, k])
    names = ["a/b c", *values[1:]] if "%2F" in values[0] else values
    Path("reference.csv").write_text(
        "step,loss\n" + "".join(f"{a},{b}\n" for a, b in zip(names, reference, strict=True))
    )
    assert curate("losses", "--reference", "reference.csv", "--columns", "id,step,loss") == 0
    assert check_found("das", ids, losses_NW, reference, 0.6)["layout"] == "buckets"


# ---- the threshold ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60)
    | st.lists(st.sampled_from([-1e30, -1.0, 0.0, 1e-30, 1e30]), min_size=1, max_size=60),
    st.integers(1, 60),
)
@settings(max_examples=40)
def test_the_cut_is_exact_whatever_the_scores(scores, kept):
    kept = min(kept, len(scores))
    engine = Engine(Path("unused"))
    engine.connection.register("given", pa.table({"id": np.arange(len(scores)), "score": np.float32(scores)}))
    engine.connection.execute("CREATE TABLE drawn AS FROM given")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SORTED", 3)
        patch.setattr(scoring, "PIECES", 4)
        end = scoring.cut(engine, "FROM drawn", kept, len(scores), approximate=False)
    found = engine.all(f"SELECT id FROM drawn WHERE {end.kept} ORDER BY id")
    assert [row[0] for row in found] == sorted(np.argsort(-np.float32(scores), kind="stable")[:kept])


def test_an_approximate_cut_is_near_and_says_what_it_kept(place):
    rng = np.random.default_rng(0)
    losses_NW, reference = rng.gamma(1, 2, (20_000, 6)).astype(np.float32), rng.gamma(1, 2, 6)
    lay_out("rows", np.arange(20_000), losses_NW)
    assert curate("losses", "--reference", write_reference(reference), "--approximate", keep=0.3) == 0
    table, summary = found()
    assert summary["kept"] == table["keep"].sum() != 0
    assert summary["kept"] / 20_000 == pytest.approx(0.3, abs=0.01)
    assert table["score"][table["keep"]].min() >= table["score"][~table["keep"]].max()


# ---- going on, and what is there already -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rows", "buckets"])
def test_a_killed_command_goes_on_from_what_it_has_scored(place, how):
    ids, losses_NW, reference = drawn(n=80_000)
    lay_out(how, ids, losses_NW, files=12)
    asked = ["losses", "--reference", write_reference(reference), "--threads", "1", "--memory", "24MB"]
    line = [sys.executable, "-m", "alignprune_exp.curate", *asked, "--keep", "0.6", "-o", "keep"]
    running = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    parts = Path("keep/.work/parts")
    while len(scored := list(parts.glob("[!.]*.parquet"))) < 2:
        assert running.poll() is None, "it ended before it was killed"
        time.sleep(0.001)
    running.kill()
    running.wait()
    assert not Path("keep/summary.json").exists()
    assert not Path("keep/scores").exists()
    before = marked(scored[0])
    assert curate(*asked) == 0
    table, summary = found()
    mine = np.isin(table["id"], before)
    assert (table["score"][mine] == 0.125).all()
    np.testing.assert_allclose(table["score"][~mine], expected("das", losses_NW, reference)[~mine], atol=CLOSE)
    assert len(list(Path("keep/scores").iterdir())) > 2
    assert summary["samples"] == len(ids)
    assert sorted(path.name for path in Path("keep").iterdir()) == ["scores", "summary.json"]


def test_what_another_version_of_the_formulas_has_scored_is_scored_again(place, monkeypatch):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    asked = ("losses", "--reference", write_reference(reference))
    ours = formulas.whole
    with monkeypatch.context() as other:
        other.setattr(formulas, "whole", lambda *given: f"SELECT * REPLACE (score / 2 AS score) FROM ({ours(*given)})")
        assert curate(*asked, keep=1e-9) == 2  # scores all, and then keeps none
    assert curate(*asked) == 0
    check_found("das", ids, losses_NW, reference, 0.6)


def test_changed_losses_are_scored_again(place):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    asked = ("losses", "--reference", write_reference(reference))
    assert curate(*asked, keep=1e-9) == 2  # scores all, and then keeps none
    assert len(list(Path("keep/.work/parts").iterdir())) == 2
    losses_NW[:3] += 1e-3 * np.arange(6, dtype=np.float32) ** 2
    lay_out("rows", ids, losses_NW)
    assert curate(*asked) == 0
    check_found("das", ids, losses_NW, reference, 0.6)


def begun(asked, out="keep"):
    """A command in another process, once it has scored some parts, and the files of these."""
    line = [sys.executable, "-m", "alignprune_exp.curate", *asked, "--keep", "0.6", "-o", out]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (scored := list(Path(out, ".work", "parts").glob("[!.]*.parquet"))):
        assert running.poll() is None, "it ended too early"
        time.sleep(0.001)
    return running, scored


def stopped(asked):
    """Stop a command by a signal once it has scored some parts; return their files."""
    running, scored = begun(asked)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "stopped; the same command goes on" in sentence_of(said)
    return scored


def test_a_signal_stops_it_and_the_same_command_goes_on(place):
    ids, losses_NW, reference = drawn(n=30_000)
    lay_out("rows", ids, losses_NW, files=12)
    asked = ["losses", "--reference", write_reference(reference), "--threads", "1"]
    assert stopped(asked)
    assert not Path("keep/lock").exists()
    assert curate(*asked) == 0
    check_found("das", ids, losses_NW, reference, 0.6)


def test_what_is_done_is_written_over_when_asked_alone(place, capsys):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    asked = ("losses", "--reference", write_reference(reference))
    assert curate(*asked) == 0
    before = contents(Path("keep"))
    capsys.readouterr()
    assert curate(*asked, keep=0.5) == 2
    assert not missing("keep there already --force", sentence_of(capsys.readouterr().err))
    assert contents(Path("keep")) == before
    assert curate(*asked, "--ids", "--force", keep=0.5) == 0
    table, summary = found(what="ids")
    assert sorted(path.name for path in Path("keep").iterdir()) == ["ids", "summary.json"]
    assert len(table["id"]) == summary["kept"] == len(ids) // 2
    assert curate(*asked, keep=0.5, out="other") == 0
    both = found("other")[0]
    assert table["id"].tolist() == both["id"][both["keep"]].tolist()


def test_two_commands_do_not_share_a_folder(place, capsys):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    Path("keep").mkdir()
    lock = Lock(Path("keep/lock"))
    assert curate("losses", "--reference", write_reference(reference)) == 3
    assert "is running elsewhere" in sentence_of(capsys.readouterr().err)
    lock.release()
    assert curate("losses", "--reference", "reference.parquet") == 0


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def broken(what, how):
    """Losses in one layout, with one thing wrong in them; the ids, losses and reference that are right."""
    ids, losses_NW, reference = drawn()
    lay_out(how, ids, losses_NW)
    file = {"checkpoints": "losses/at3/1.parquet"}.get(how, "losses/1.parquet")
    table, written = pq.read_table(file), file
    rows = {name: table[name].to_pylist() for name in table.column_names}
    of = rows["id"][150 % len(table)]
    here = next(i for i, each in enumerate(rows["id"]) if each == of)
    at = None if how == "rows" else AT.index(rows["checkpoint"][here])
    if what in ("nan", "infinite"):
        value = math.nan if what == "nan" else -math.inf
        if how == "rows":
            at, rows["losses"][here] = 2, [*rows["losses"][here][:2], value, *rows["losses"][here][3:]]
        else:
            rows["loss"][here] = value
        losses_NW[ids.tolist().index(of), at] = math.nan
    elif what == "gap":
        if how == "rows":
            at, rows["losses"][here] = 5, rows["losses"][here][:5]
        elif how == "checkpoints":
            rows["loss"][here] = None
        else:
            rows = {name: [*values[:here], *values[here + 1 :]] for name, values in rows.items()}
        losses_NW[ids.tolist().index(of), at] = math.nan
    elif what == "twice":
        rows = {name: [*values, values[here]] for name, values in rows.items()}
        losses_NW, ids = np.delete(losses_NW, ids.tolist().index(of), 0), np.delete(ids, ids.tolist().index(of))
        if how == "checkpoints":  # in all files alike, or they would not be rows beside each other
            for path in [Path(f"losses/at{k}/1.parquet") for k in range(6) if k != 3]:
                pq.write_table(pa.concat_tables([(other := pq.read_table(path)), other.slice(here, 1)]), path)
            file, at = "losses/at0/1.parquet", None
    schema = pa.schema([pa.field(name, table.schema.field(name).type) for name in rows])
    pq.write_table(pa.table(rows, schema=schema), written, row_group_size=64)
    return file, of, at, ids, losses_NW, reference


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("what", ["nan", "infinite", "gap", "twice"])
def test_a_bad_loss_is_named_with_its_file_and_row_group_and_skipped_when_asked(place, capsys, what, how):
    file, of, at, ids, losses_NW, reference = broken(what, how)
    asked = ("losses", "--reference", write_reference(reference))
    assert curate(*asked) == 2
    said = sentence_of(capsys.readouterr().err)
    assert not missing(["losses/" if (what, how) == ("gap", "buckets") else file, f"id {of}"], said)  # no row, no file
    if at is not None:
        assert (
            f"number {at + 1} of" if (how, what) == ("rows", "gap") else f"checkpoint {AT[at]}" * (how != "rows")
        ) in said
    assert int(said.partition("row group ")[2].partition(":")[0]) < pq.ParquetFile(file).num_row_groups
    assert ("nan" in said) == (what == "nan")
    assert curate(*asked, "--on-error", "skip") == 0
    summary = check_found("das", ids, losses_NW, reference, 0.6)
    (skipped,) = summary["skipped"]
    assert not missing([f"id {of}"], skipped["what"])
    assert skipped["count"] == 1
    assert skipped["file"] in said
    assert f"row group {skipped['row_group']}" in said
    assert "1 things were skipped" in capsys.readouterr().out


def test_the_row_group_is_the_one_with_the_bad_loss(place, capsys):
    ids, losses_NW, reference = drawn()
    losses_NW[[130, 131, 399], 4] = np.nan
    write(Path("losses/a.parquet"), id=ids, losses=list(losses_NW))
    assert curate("losses", "--reference", write_reference(reference)) == 2
    said = sentence_of(capsys.readouterr().err)
    assert not missing([f"row group {130 // 64}", f"id {ids[130]}", "(2 more are like it)"], said)


@pytest.mark.parametrize("how", ["rows", "checkpoints", "buckets"])
def test_a_truncated_file_is_named_and_left_out_when_asked(place, capsys, how):
    ids, losses_NW, reference = drawn()
    lay_out(how, ids, losses_NW)
    file = "losses/at3/1.parquet" if how == "checkpoints" else "losses/1.parquet"
    stays = ids if how == "checkpoints" else pq.read_table("losses/0.parquet")["id"].unique().to_pylist()
    truncate(Path(file))
    asked = ("losses", "--reference", write_reference(reference))
    assert curate(*asked) == 2
    assert not missing([file, "cannot be read", "--on-error skip"], sentence_of(capsys.readouterr().err))
    assert not Path("keep").exists()
    assert curate(*asked, "--on-error", "skip") == 0
    table, summary = found()
    assert table["id"].tolist() == sorted(stays)
    assert summary["skipped"][0]["file"] == file
    if how == "checkpoints":
        losses_NW[200:, 3] = np.nan
        check_found("das", ids, losses_NW, reference, 0.6)


def test_a_damaged_row_group_is_named_and_its_file_left_out_when_asked(place, capsys):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    file = Path("losses/1.parquet")
    chunk = pq.ParquetFile(file).metadata.row_group(2).column(1)
    damaged = bytearray(file.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged[start : start + 40] = b"\xff" * 40
    file.write_bytes(damaged)
    asked = ("losses", "--reference", write_reference(reference))
    assert curate(*asked) == 2
    assert not missing(["losses/1.parquet, row group 2", "--on-error skip"], sentence_of(capsys.readouterr().err))
    assert curate(*asked, "--on-error", "skip") == 0
    summary = check_found("das", ids[:200], losses_NW[:200], reference, 0.6)
    assert [(each["file"], each["row_group"]) for each in summary["skipped"]] == [("losses/1.parquet", 2)]


@pytest.mark.parametrize("how", ["checkpoints", "blocks", "files", "buckets"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("column", ["id", "checkpoint", "loss"])
def test_damage_that_a_footer_does_not_know_of_is_named_and_left_out_when_asked(
    place, capsys, how, compression, column
):
    ids, losses_NW, reference = drawn()
    losses_NW = np.random.default_rng(0).gamma(2, 1, losses_NW.shape).astype(np.float32)
    lay_out(how, ids, losses_NW)
    file = Path("losses/at1/1.parquet" if how == "checkpoints" else "losses/1.parquet")
    for path in Path("losses").rglob("*.parquet"):
        rows = pq.read_table(path)
        rows = rows.set_column(2, "loss", rows["loss"].cast(pa.float64()))
        pq.write_table(rows, path, row_group_size=100, use_dictionary=False, compression=compression)
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(("id", "checkpoint", "loss").index(column))
    damaged = bytearray(file.read_bytes())
    half = chunk.total_compressed_size // 2
    start = chunk.data_page_offset + half
    damaged[start : start + half] = b"\x7e" * half  # where that can be decoded, numbers like 1e301
    file.write_bytes(damaged)
    asked = ("losses", "--reference", write_reference(reference))
    if (how, column) == ("checkpoints", "checkpoint"):  # which is not read
        assert curate(*asked) == 0
        check_found("das", ids, losses_NW, reference, 0.6)
        return
    assert curate(*asked) == 2
    assert not missing([f"{file}, row group 1", "--on-error skip"], sentence_of(capsys.readouterr().err))
    assert curate(*asked, "--on-error", "skip") == 0
    table, summary = found()
    assert (summary["skipped"][0]["file"], summary["skipped"][0]["row_group"]) == (str(file), 1)
    assert set(table["id"]) <= set(ids)


def test_files_of_different_schemas_are_named(place, capsys):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    write(Path("losses/2.parquet"), id=[str(each) for each in ids], losses=list(losses_NW))
    write(Path("losses/3.parquet"), sample=ids, losses=list(losses_NW))
    asked = ("losses", "--reference", write_reference(reference))
    assert curate(*asked) == 2
    assert not missing("losses/2.parquet losses/0.parquet VARCHAR BIGINT", sentence_of(capsys.readouterr().err))
    assert curate(*asked, "--on-error", "skip") == 0
    summary = check_found("das", ids, losses_NW, reference, 0.6)
    assert [each["file"] for each in summary["skipped"]] == ["losses/2.parquet", "losses/3.parquet"]
    assert "has no column id, it has sample, losses" in summary["skipped"][1]["what"]


@pytest.mark.parametrize("how", ["checkpoints", "files", "buckets"])
def test_checkpoints_that_one_side_lacks_are_named(place, capsys, how):
    ids, losses_NW, reference = drawn()
    lay_out(how, ids, losses_NW)
    asked = ("losses", "--reference", write_reference([*reference[:5], 1.0], at=[*AT[:5], 9000]))
    assert curate(*asked) == 2
    assert not missing("9000 none", sentence_of(capsys.readouterr().err))
    write_reference(reference[:5], at=AT[:5])
    assert curate(*asked) == 2
    assert not missing(["losses/", "row group ", f"checkpoint {AT[5]}"], sentence_of(capsys.readouterr().err))
    write_reference([*reference[:5], 1.0], at=[*AT[:5], 9000])
    assert curate(*asked, "--on-error", "skip") == 0
    summary = check_found("das", ids, losses_NW[:, :5], reference[:5], 0.6)
    said = " ".join(each["what"] for each in summary["skipped"])
    assert not missing(["9000", str(AT[5])], said)


@pytest.mark.parametrize("how", ["checkpoints", "blocks", "files", "buckets"])
@pytest.mark.parametrize("score", ["das", "settled"])
def test_rows_without_a_checkpoint_are_named_counted_and_left_out_when_asked(place, capsys, how, score):
    ids, losses_NW, reference = drawn()
    lay_out(how, ids, losses_NW)
    table = pq.read_table("losses/at3/1.parquet" if how == "checkpoints" else "losses/1.parquet")
    rows = {column: table[column].to_pylist() for column in table.column_names}
    for column, values in (("id", [rows["id"][7]] * 2), ("checkpoint", [None] * 2), ("loss", [99.0, 98.0])):
        rows[column] = [*rows[column][:150], *values, *rows[column][150:]]
    file = "losses/at3/1.parquet" if how == "checkpoints" else "losses/1.parquet"
    pq.write_table(pa.table(rows, schema=table.schema), file, row_group_size=64)
    asked = ("losses", "--score", score, "--reference", write_reference(reference))
    assert curate(*asked) == 2
    words = [f"{file}, row group {150 // 64}", f"id {rows['id'][7]} has no checkpoint", "(1 more", "--on-error skip"]
    assert not missing(words, sentence_of(capsys.readouterr().err))
    assert curate(*asked, "--on-error", "skip") == 0
    (skipped,) = check_found(score, ids, losses_NW, reference, 0.6)["skipped"]
    assert (skipped["file"], skipped["row_group"], skipped["count"]) == (file, 150 // 64, 2)


def test_losses_that_have_no_checkpoint_at_all_are_refused_whatever_may_be_skipped(place, capsys):
    ids, losses_NW, _ = drawn()
    unknown = pa.nulls(len(ids), pa.int64())
    write(Path("losses/0.parquet"), id=ids, checkpoint=unknown, loss=losses_NW[:, 0])
    assert curate("losses", "--score", "settled", "--on-error", "skip") == 2
    assert not missing("no row checkpoint --columns", sentence_of(capsys.readouterr().err))


@pytest.mark.parametrize(
    ("at", "typed", "words"),
    [
        (np.array(["2024-01-01", "2024-01-02"], "datetime64[us]"), "2024-01-01 2024-01-02", "date times"),
        (["0", "500"], "0 500", "number texts"),
        ([0, 500], "step0 step500", "text numbers"),
    ],
)
def test_checkpoints_of_another_kind_are_refused_as_such(place, capsys, at, typed, words):
    for number in range(2):
        write(Path(f"losses/{number}.parquet"), id=[number] * 2, checkpoint=at, loss=[1.0, 2.0])
    Path("reference.csv").write_text("checkpoint,loss\n" + "".join(f"{each},1\n" for each in typed.split()))
    assert curate("losses", "--reference", "reference.csv") == 2
    said = sentence_of(capsys.readouterr().err)
    assert not missing([f"checkpoint {typed.split()[0]} of the reference is in none of 2 files", *words.split()], said)


MISTAKES = [
    (("losses", "--keep", "0"), "--keep 0 share"),
    (("losses", "--keep", "nan"), "--keep nan share"),
    (("losses",), "--keep"),
    (("losses", "--keep", "0.5"), "--score das --reference settled"),
    (("losses", "--keep", "0.5", "--reference", "no.csv"), "no.csv not there"),
    (("losses", "--keep", "0.5", "--reference", "losses"), "losses a folder table checkpoint loss"),
    (("losses", "--keep", "0.5", "--reference", "losses/0.parquet"), "losses/0.parquet checkpoint loss"),
    (("losses", "--keep", "0.5", "--reference", "twice.csv"), "twice.csv checkpoint 0 twice"),
    (("losses", "--keep", "0.5", "--reference", "nan.csv"), "nan.csv nan checkpoint 500"),
    (("losses", "--keep", "0.5", "--reference", "empty.csv"), "empty.csv empty"),
    (("losses", "--keep", "0.5", "--reference", "short.csv"), "losses/0.parquet 6 losses where 3 are due"),
    (
        ("losses", "--keep", "0.5", "--reference", "two.csv"),
        "two.csv 2 losses to go by --score das would be 0 give 3 or more that differ",
    ),
    (
        ("losses", "--keep", "0.5", "--score", "spearman", "--reference", "still.csv"),
        "still.csv the loss 2 at each of 3 checkpoints --score spearman would be 0",
    ),
    (("losses", "--keep", "0.5", "--score", "cosine", "--reference", "still.csv"), "losses/0.parquet 6 losses where 3"),
    (("losses", "--keep", "0.5", "--score", "cosine", "--reference", "zero.csv"), "zero.csv the loss 0 at each of 3"),
    (("losses", "--keep", "0.001", "--score", "settled"), "keeps none of 400 ids"),
    (("nowhere", "--keep", "0.5", "--score", "settled"), "nowhere no Parquet file"),
    (("losses", "--keep", "0.5", "--score", "settled", "--columns", "id"), "--columns id"),
    (
        ("losses", "--keep", "0.5", "--score", "settled", "--columns", "id,nll"),
        "losses/0.parquet no column nll --columns",
    ),
    (("losses", "--keep", "0.5", "--score", "settled", "--columns", "losses,id"), "losses/0.parquet id list"),
    (("losses", "--keep", "0.5", "--score", "settled", "--memory", "much"), "--memory much"),
    (("losses", "--keep", "0.5", "--score", "settled", "--threads", "0"), "--threads 0"),
    (("losses", "--keep", "0.5", "--score", "settled", "--threads", "9999999"), "--threads=9999999 processors"),
    (("losses", "--keep", "0.5", "--score", "settled", "--ray-address", "a:1"), "--ray-address a:1 --engine ray"),
    (
        ("losses", "--keep", "0.5", "--score", "settled", "--engine", "ray", "--ray-address", "ray://a:1"),
        "--ray-address ray://a:1 node HOST:PORT",
    ),
    (("losses", "--keep", "0.5", "--score", "el2n"), "el2n das settled"),
    (("losses", "--keep", "0.5", "--score", "settled", "-o", "no/where"), "no/where folder"),
    (("losses", "--keep", "0.5", "--score", "settled", "-o", "losses"), "losses 0.parquet new"),
    (("losses", "--keep", "0.5", "--score", "settled", "-o", "nan.csv"), "nan.csv no folder new"),
    (("losses", "--keep", "0.5", "--score", "settled", "-o", "losses/keep"), "losses/keep lies in losses"),
    (("losses/**/*.parquet", "--keep", "0.5", "--score", "settled", "-o", "losses/keep"), "losses/keep lies in losses"),
    (("**/*.parquet", "--keep", "0.5", "--score", "settled"), "keep lies in **/*.parquet"),
]


@pytest.mark.parametrize(
    ("line", "words"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(place, capsys, line, words):
    ids, losses_NW, _ = drawn()
    lay_out("rows", ids, losses_NW)
    texts = {"twice": "0,1\n0,2", "nan": "0,1\n500,nan", "empty": "", "short": "0,1\n500,2\n1000,1"}
    texts |= {"two": "0,1\n500,2", "still": "0,2\n500,2\n1000,2", "zero": "0,0\n500,0\n1000,0"}
    for name, text in texts.items():
        Path(f"{name}.csv").write_text(f"checkpoint,loss\n{text}\n")
    before = contents(place)
    assert cli.main(["curate", *line, *(() if "-o" in line else ("-o", "keep"))]) == 2
    said = capsys.readouterr()
    assert not missing(words, sentence_of(said.err))
    assert said.out == ""
    if not any(
        each in line for each in ("0.001", "short.csv", "still.csv")
    ):  # these were scored, and are not scored again
        assert contents(place) == before


@pytest.mark.parametrize(("package", "extra"), [("duckdb", "curate"), ("ray", "ray")])
def test_without_a_package_it_says_what_to_install(place, package, extra):
    code = f"import sys; sys.modules['{package}'] = None; from alignprune_exp.cli import main; sys.exit(main())"
    asked = ["curate", "losses", "--score", "settled", "--keep", "0.5", "-o", "keep", "--engine", "ray"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"pip install 'alignprune-exp[{extra}]'" in sentence_of(done.stderr)
    assert contents(place) == {}


def test_it_works_as_a_module_and_says_what_it_takes():
    line = [sys.executable, "-m", "alignprune_exp.curate", "--help"]
    said = subprocess.run(line, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}).stdout
    assert not missing("--reference --score --keep --gaps --on-error --approximate --memory settled", said)


@pytest.mark.parametrize("memory", ["1KB", "1MB"])
def test_too_little_memory_is_no_files_fault(place, capsys, memory):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW, files=2)
    asked = ("losses", "--reference", write_reference(reference), "--on-error", "skip", "--memory", memory)
    assert curate(*asked) == 2
    assert not missing("memory do not suffice raise --memory", sentence_of(capsys.readouterr().err))
    assert not Path("keep/summary.json").exists()


def test_memory_may_have_no_limit(place):
    ids, losses_NW, reference = drawn(n=9)
    assert curate(lay_out("rows", ids, losses_NW), "--reference", write_reference(reference), "--memory", "none") == 0
    check_found("das", ids, losses_NW, reference, 0.6)


@pytest.mark.parametrize("line", [("loop", "-o", "keep"), ("losses", "-o", "loop"), ("losses", "-o", "loop/keep")])
def test_a_link_in_a_circle_gets_one_sentence(place, capsys, line):
    lay_out("rows", *drawn(n=9)[:2])
    Path("loop").symlink_to("loop")
    assert cli.main(["curate", *line, "--keep", "0.5", "--score", "settled"]) == 2
    assert "loop" in sentence_of(capsys.readouterr().err)
    assert not Path("keep").exists()


@pytest.mark.parametrize("how", ["checkpoints", "files"])
def test_a_checkpoint_may_be_infinite(place, monkeypatch, how):
    monkeypatch.setattr(sys.modules[__name__], "AT", [0.1, 0.30000000000000004, 1e-5, 1e300, 5.0, math.inf])
    ids, losses_NW, reference = drawn(n=9)
    assert curate(lay_out(how, ids, losses_NW), "--reference", write_reference(reference, AT)) == 0
    check_found("das", ids, losses_NW, reference, 0.6)
