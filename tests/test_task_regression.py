"""The task regression: permuted targets, the metrics, tables of one's own, and whole runs."""

import datetime
import hashlib
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score, root_mean_squared_error

from alignprune_exp.distributed import Processes
from alignprune_exp.setup import open_task
from alignprune_exp.tasks.regression import permuted
from alignprune_exp.train import main
from harness import (
    METHODS,
    check_half_corrupted,
    check_two_as_one,
    composed,
    launch,
    only_run,
    rows_of,
    same_bits_when_stopped,
    summary_of,
)

TINY = (
    "task=regression",
    "threads=1",
    "epochs=5",
    "score.window=3",
    "batch_size=32",
    "model.width=8",
    "reference.size=9",
)


@pytest.fixture(scope="module")
def task():
    return open_task(composed(*TINY, "noise=sym", "noise.rate=0.25"))


def test_a_sweep_of_other_data_has_not_been_done_before(tmp_path, capsys):
    rng, file = np.random.default_rng(0), tmp_path / "table.parquet"
    line = [*TINY, "dataset=table", f"dataset.root={file}", "dataset.target=y", f"paths.results={tmp_path / 'r'}"]
    for said in ("2 runs to do", "2 runs to do", "0 runs to do, 2 finished already"):
        if said == "2 runs to do":
            pq.write_table(pa.table({"x": rng.normal(size=60), "y": rng.normal(size=60)}), file)
        assert main(["-m", *line, "seed=0,1"]) == 0
        assert said in capsys.readouterr().out
    assert len(list((tmp_path / "r" / "runs").iterdir())) == 4
    file.unlink()  # what is finished needs no data
    assert main(["-m", *line, "seed=0,1"]) == 0
    assert "0 runs to do, 2 finished already" in capsys.readouterr().out
    assert main(["-m", *line, "seed=0,1,2"]) == 2  # and what is not does
    assert "table.parquet" in capsys.readouterr().err


@pytest.fixture
def table(tmp_path):
    """Write a table of 60 rows with a column of each kind; return its file."""
    rng = np.random.default_rng(0)
    columns = {
        "area": pa.array([None if row % 7 == 0 else float(row) for row in range(60)]),
        "rooms": pa.array([Decimal(int(rooms)) for rooms in rng.integers(1, 6, 60)]),
        "new": pa.array(rng.random(60) < 0.5),
        "town": pa.array(rng.choice(["Aarau", "Bern", "Chur"], 60).tolist()).dictionary_encode(),
        "sold": pa.array([datetime.date(2020, 1, 1)] * 60),
        "name": pa.array([f"number {row}" for row in range(60)]),
        "price": pa.array([None if row == 5 else 10.0 + row for row in range(60)]),
    }
    pq.write_table(pa.table(columns), tmp_path / "homes.parquet")
    return tmp_path / "homes.parquet"


def test_the_share_asked_for_is_corrupted_and_known(task):
    clean = task.data.train.targets[task.parts.train]
    assert task.corrupted.sum() == round(0.25 * task.n)
    assert ((task.targets != clean) == task.corrupted).all()
    assert sorted(task.targets) == sorted(clean)
    columns = task.columns()
    assert ((columns["target"] != columns["clean_target"]) == columns["corrupted"]).all()
    assert not set(task.parts.train) & set(task.parts.reference)
    held = torch.cat([targets for _, _, targets in task.reference.evaluation()]).double() * task.spread + task.centre
    np.testing.assert_allclose(held, task.data.train.targets[task.parts.reference], rtol=1e-5)


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(0, 99))
def test_permuted_targets_are_the_same_ones_and_none_keeps_its_value(targets, seed):
    targets = np.array(targets, float)
    if len(targets) and 2 * max(np.bincount(targets.astype(int))) > len(targets):
        with pytest.raises(ValueError, match="so some would keep theirs"):
            permuted(targets, np.random.default_rng(seed))
        return
    given = permuted(targets, np.random.default_rng(seed))
    assert sorted(given) == sorted(targets)
    assert (given != targets).all()


def test_the_losses_of_a_batch_are_those_of_its_samples_one_by_one(task):
    torch.manual_seed(0)
    network = task.network()
    _, features, targets = next(task.train.evaluation())
    together = task.losses(network(features), targets)[0]
    for row in range(len(features)):
        torch.testing.assert_close(together[row], (network(features[row]) - targets[row]).square()[0])


def test_the_metrics_are_scikit_learns(task):
    class Guess:
        device = torch.device("cpu")

        def logits(self, features):
            return features[:, [2]] * 0.7

    tests = task.tests[""]
    found = task.evaluate(Guess(), tests.evaluation(), len(tests), Processes())
    true = task.data.test.targets[task.parts.test]
    bmi = task.data.train.features[task.parts.train][:, 2]
    said = (task.data.test.features[task.parts.test][:, 2] - bmi.mean()) / bmi.std() * 0.7 * task.spread + task.centre
    assert math.isclose(found["rmse"], root_mean_squared_error(true, said), rel_tol=1e-5)
    assert math.isclose(found["r2"], r2_score(true, said), rel_tol=1e-5)


def test_the_metrics_are_scikit_learns_beside_a_target_that_dwarfs_the_others(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    for sentinel in (1e9, 1e12):
        pq.write_table(pa.table({"x": x, "y": np.where(np.arange(60) == 3, sentinel, y)}), tmp_path / "table.parquet")
        line = ("dataset=table", f"dataset.root={tmp_path}", "dataset.target=y", "noise=clean")
        task = open_task(composed(*TINY, *line))
        assert sentinel in task.targets

        class Mean:
            device = torch.device("cpu")

            def logits(self, features):
                return torch.zeros(len(features), 1)

        tests = task.tests[""]
        found = task.evaluate(Mean(), tests.evaluation(), len(tests), Processes())
        true, said = task.data.test.targets[task.parts.test], np.full(len(tests), task.centre)
        assert math.isclose(found["rmse"], root_mean_squared_error(true, said), rel_tol=1e-6)
        assert math.isclose(found["r2"], r2_score(true, said), rel_tol=1e-6)


def test_the_diabetes_are_scikit_learns(task):
    features, targets = load_diabetes(return_X_y=True, scaled=False)
    for part in (task.data.train, task.data.test):
        assert (part.features == features[part.rows]).all()
        assert (part.targets == targets[part.rows]).all()
    assert sorted([*task.data.train.rows, *task.data.test.rows]) == list(range(len(targets)))
    assert task.data.columns == load_diabetes().feature_names


@pytest.mark.parametrize("line", METHODS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, line):
    folder = same_bits_when_stopped(tmp_path, 7, *line, base=TINY)
    check_half_corrupted(folder, "rmse", min)
    assert summary_of(folder)["test_r2_best"] == max(row["test_r2"] for row in rows_of(folder))


def test_clean_targets_are_learnt(tmp_path):
    assert launch(tmp_path, "noise=clean", "pruner=full", "epochs=20", base=TINY) == 0
    assert summary_of(only_run(tmp_path))["test_r2_best"] > 0.35


def test_two_processes_compute_what_one_computes(tmp_path, nurse):
    line = (*TINY, "precision=fp32")
    metrics = ("test_rmse", "test_r2")
    check_two_as_one(tmp_path, nurse, *line, metrics=metrics, rel_tol=1e-4, abs_tol=1e-5)


def test_a_table_of_ones_own_is_read(table):
    line = (*TINY, "dataset=table", f"dataset.root={table}", "dataset.target=price", "reference.size=2")
    task = open_task(composed(*line, "dataset.features=[area,rooms,new,town]", "noise=clean"))
    assert task.data.columns == ["area", "rooms", "new", "town=Aarau", "town=Bern", "town=Chur"]
    assert task.corrupted is None
    assert [line.partition(" of ")[0] for line in task.skipped] == ["row 5"]
    rows = np.concatenate([task.data.train.rows, task.data.test.rows])
    assert sorted(rows) == [row for row in range(60) if row != 5]
    assert len(task.data.test) == round(0.2 * 59)
    given = torch.cat([features for _, features, _ in task.train.evaluation()])
    missing = torch.from_numpy(task.parts.train)
    missing = torch.from_numpy(task.data.train.rows)[missing] % 7 == 0
    assert (given[missing, 0] == 0).all()
    assert given.isfinite().all()
    torch.testing.assert_close(given.float()[:, 1].mean(), torch.tensor(0.0), atol=0.01, rtol=0)
    table.with_name(f"._{table.name}").write_bytes(b"\0 what macOS keeps to itself")
    folder = open_task(composed(*line, f"dataset.root={table.parent}", "dataset.features=[rooms]"))
    assert (folder.data.train.targets == task.data.train.targets).all()


def test_what_is_constant_is_not_blown_up_by_rounding(table):
    rng = np.random.default_rng(0)
    features = {"same": [0.1] * 59 + [0.2], "other": rng.random(60).tolist()}
    pq.write_table(pa.table(features | {"price": rng.random(60).tolist()}), table)
    line = (*TINY, "dataset=table", f"dataset.root={table}", "dataset.target=price", "noise=clean")
    evaluated = set()
    for held_out in np.arange(0.2, 0.8, 0.02):
        task = open_task(composed(*line, f"dataset.held_out={held_out:g}"))
        for _, inputs, _ in task.tests[""].evaluation():
            assert inputs[:, 0].abs().max() < 10
        evaluated.add(59 in task.data.test.rows)
    assert evaluated == {True, False}


def test_a_missing_text_is_the_mean_of_each_text(table):
    towns = [None if row % 5 == 0 else "Bern" if row % 3 == 0 else "Chur" for row in range(60)]
    pq.write_table(pa.table({"town": towns, "price": np.random.default_rng(0).random(60)}), table)
    task = open_task(composed(*TINY, "dataset=table", f"dataset.root={table}", "dataset.target=price"))
    assert task.data.columns == ["town=Bern", "town=Chur"]
    for batches, part, rows in (
        (task.train, task.data.train, task.parts.train),
        (task.tests[""], task.data.test, task.parts.test),
    ):
        given = torch.cat([features for _, features, _ in batches.evaluation()]).float()
        own = [towns[row] for row in part.rows[rows]]
        missing = torch.tensor([town is None for town in own])
        assert missing.any()
        assert (given[missing] == 0).all()
        assert ((given[~missing, 0] > 0) == torch.tensor([town == "Bern" for town in own])[~missing]).all()
        assert (given[~missing].sign().sum(1) == 0).all()


def test_a_table_without_missing_texts_is_what_its_values_say(table):
    whole = pa.table({"town": ["Bern", "Chur"] * 30, "price": list(range(60))})
    pq.write_table(whole, table)
    data = open_task(composed(*TINY, "dataset=table", f"dataset.root={table}", "dataset.target=price")).data
    digest = hashlib.sha256(b'["town=Bern", "town=Chur"]')
    for part in (data.train, data.test):
        bern = part.rows % 2 == 0
        for values in (part.rows, np.column_stack([bern, ~bern]).astype(float), part.rows.astype(float)):
            digest.update(f"{values.shape}".encode() + values.tobytes())
    assert data.fingerprint == digest.hexdigest()


@pytest.mark.parametrize(("column", "name"), [("rooms", "rooms"), ("price", "of targets")])
def test_what_is_too_far_from_those_trained_on_is_named_before_a_run_begins(tmp_path, refused, table, column, name):
    line = (*TINY, "dataset=table", f"dataset.root={table}", "dataset.target=price", f"paths.results={tmp_path}")
    columns = {"rooms": np.zeros(60), "price": np.arange(60.0)}
    pq.write_table(pa.table(columns), table)
    row = open_task(composed(*line)).data.test.rows[3]
    columns[column][row] = 1e15
    pq.write_table(pa.table(columns), table)
    _, inputs, targets = next(open_task(composed(*line)).tests[""].evaluation())
    assert torch.cat([inputs, targets[:, None]], 1).square().isfinite().all()
    columns[column][row] = -1e50
    pq.write_table(pa.table(columns), table)
    said = f"the column {name} has the value -1e+50 in row {row}, where the mean of those trained on is"
    assert said in refused(*line)


TYPES_OF_TEXTS = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
)


@pytest.mark.parametrize("kind", TYPES_OF_TEXTS, ids=str)
def test_a_table_is_the_same_in_whatever_types_and_files_it_is_written(tmp_path, kind):
    rng = np.random.default_rng(0)
    whole = pa.table(
        {
            "rooms": pa.array(rng.integers(1, 6, 60)),
            "town": pa.array(rng.choice(["Aarau", "Bern", "Zürich"], 60).tolist(), mask=np.arange(60) == 59),
            "new": pa.array(rng.random(60) < 0.5),
            "price": pa.array(rng.normal(size=60)),
        }
    )
    pq.write_table(whole, tmp_path / "whole.parquet")
    texts = whole["town"].combine_chunks()
    texts = texts.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else texts.cast(kind)
    written = whole.set_column(1, "town", texts)
    pq.write_table(written, tmp_path / "whole.PARQUET")
    (tmp_path / "halves").mkdir()
    pq.write_table(whole[:30], tmp_path / "halves" / "a.parquet")
    other = written[30:].select(["price", "town", "rooms", "new"])
    other = other.set_column(2, "rooms", other["rooms"].cast(pa.decimal128(21, 1)))
    pq.write_table(other.add_column(0, "__index_level_0__", pa.array(range(30))), tmp_path / "halves" / "b.Parquet")

    def opened(place):
        line = ("dataset=table", f"dataset.root={tmp_path / place}", "dataset.target=price")
        return open_task(composed(*TINY, *line)).data

    assert opened("whole.parquet").columns == ["rooms", "town=Aarau", "town=Bern", "town=Zürich", "new"]
    assert opened("whole.PARQUET").fingerprint == opened("whole.parquet").fingerprint
    assert opened("halves").fingerprint == opened("whole.parquet").fingerprint


def test_an_index_of_pandas_is_no_feature(table):
    pq.read_table(table, columns=["rooms", "price"]).to_pandas().sort_values("price").to_parquet(table)
    assert "__index_level_0__" in pq.read_schema(table).names
    line = (*TINY, "dataset=table", f"dataset.root={table}", "dataset.target=price")
    assert open_task(composed(*line)).data.columns == ["rooms"]
    named = open_task(composed(*line, "dataset.features=[__index_level_0__]"))
    assert named.data.columns == ["__index_level_0__"]


def test_a_mistake_in_the_table_is_one_sentence(tmp_path, refused, table):
    line = ["task=regression", "dataset=table", f"dataset.root={table}", f"paths.results={tmp_path / 'none'}"]
    assert "dataset.target is missing" in refused(*line)
    assert "has no column cost, but area, rooms" in refused(*line, "dataset.target=cost")
    price = [*line, "dataset.target=price"]
    assert "has no column floor, but area, rooms" in refused(*price, "dataset.features=[floor]")
    assert refused(*line, "dataset.target=2020").endswith(
        """dataset.target=2020 is no text; write "dataset.target='2020'" for one"""
    )
    assert refused(*price, "dataset.features=[2020]").endswith(
        """dataset.features=2020 is no text; write "dataset.features=['2020']" for one"""
    )
    assert refused(*price, "dataset.features=rooms").endswith(
        "dataset.features=rooms is no list; write dataset.features=[rooms]"
    )
    assert refused(*price, "dataset.features=[rooms, area (m)]").endswith(
        """write "dataset.features=['rooms','area (m)']" if these are texts"""
    )
    assert "dataset.features has price, which is the target" in refused(*price, "dataset.features=[price]")
    assert "the column sold of" in refused(*price)
    assert "holds texts where numbers are wanted: choose other columns with dataset.target" in refused(
        *line, "dataset.target=name", "dataset.features=[rooms]"
    )
    rooms = [*price, "dataset.features=[rooms]", "reference.size=2"]
    assert "takes 58 of 59 rows" in refused(*rooms, "dataset.held_out=0.99")
    assert "is no Parquet file, nor a folder" in refused(*rooms, f"dataset.root={tmp_path / 'gone'}")
    assert "learner=elr needs class labels" in refused(*rooms, "learner=elr")
    assert "use score=settled" in refused(*rooms, "method=sieve")
    assert "model=unet does not fit task=regression" in refused(*rooms, "model=unet")
    pq.write_table(pa.table({"rooms": list(range(60)), "price": [1.0] * 60}), table)
    assert "all 46 targets to train on are 1" in refused(*rooms, "noise=clean")
    pq.write_table(pa.table({"rooms": list(range(60)), "price": [0.1] * 60}), table)
    assert "all 46 targets to train on are 0.1" in refused(*rooms, "noise=clean")  # their computed std is not 0
    pq.write_table(pa.table({"rooms": list(range(60)), "price": np.arange(60) * 1e-200}), table)
    assert "all 46 targets to train on are " in refused(*rooms, "noise=clean")  # their computed std is 0
    broken = pa.array([b"\xff"] * 60).view(pa.string())
    pq.write_table(pa.table({"rooms": broken, "price": list(range(60))}), table)
    assert "homes.parquet cannot be read as Parquet (" in refused(*rooms)
    pq.write_table(pa.table({"rooms": pa.nulls(60, pa.string()), "price": list(range(60))}), table)
    assert "has no column with values beside price to predict it by" in refused(*rooms)
    pq.write_table(pa.table({"rooms": list(range(60)), "price": pa.nulls(60, pa.float64())}), table)
    assert "has a price: choose another column with dataset.target" in refused(*rooms)
    pq.write_table(pa.Table.from_arrays([pa.array([1.0])] * 3, names=["rooms", "rooms", "price"]), table)
    assert "homes.parquet has 2 columns rooms: write it with other names" in refused(*rooms)
    pq.write_table(pa.table({"rooms": list(range(60)), "price": [1.0] * 55 + [2.0] * 5}), table)
    assert "so some would keep theirs; use another rate" in refused(*rooms)
    said = refused(*rooms, "noise=clean", "reference.size=10", "reference.noise=1")
    assert said.startswith("reference.noise: of 10 targets to permute")
    pq.write_table(pa.table({"rooms": [math.inf] * 60, "price": list(range(60))}), table)
    assert "the column rooms of" in refused(*rooms)
    pq.write_table(pa.table({"rooms": [-1.8e307] * 60, "price": list(range(60))}), table)
    assert "has the value -1.8e+307: mend it, or choose other columns" in refused(*rooms)
    pq.write_table(pa.table({"a": ["b", "c"] * 30, "a=b": list(range(60)), "price": list(range(60))}), table)
    assert "makes a feature a=b, and so does another column: rename one, or" in refused(*price)
    pq.write_table(pa.table({"rooms": [1] * 60}), table.parent / "other.parquet")
    folder = refused(*rooms, f"dataset.root={table.parent}")
    assert folder.endswith(
        f"{table} and {table.parent / 'other.parquet'} differ in their columns (a is in one of them alone): write all "
        "with the same, or move the others elsewhere"
    )
    mixed = pa.table({"a": [1, 2] * 30, "a=b": list(range(60)), "price": list(range(60))})
    pq.write_table(mixed, table.parent / "other.parquet")
    assert "a has incompatible types: large_string vs double): write" in refused(*rooms, f"dataset.root={table.parent}")
    pq.write_table(pa.table({"rooms": pa.array([b"\xff"] * 60), "price": list(range(60))}), table)
    assert "the column rooms of" in (said := refused(*rooms))
    assert "holds bytes that are no UTF-8 where numbers are wanted: choose other columns" in said
    table.write_bytes(b"nothing")
    assert "homes.parquet cannot be read as Parquet" in refused(*rooms)
