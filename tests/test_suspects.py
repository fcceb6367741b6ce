"""The list of samples to look at."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from alignprune_exp.errors import UsageError
from alignprune_exp.suspects import main, report_sheet

CONFIG = "dataset: {name: digits, subset: null, test_subset: null, flip: false, crop: 0}"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "0123"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"id": "0123", "status": "finished", "score": "das"}')
    (folder / "config.yaml").write_text(CONFIG)
    samples = pd.DataFrame(
        {
            "index": [5, 6, 7, 8],
            "path": None,
            "label": [0, 1, 2, 3],
            "clean_label": [0, 1, 1, 3],
            "predicted": [0, 1, 1, 2],
            "loss": 1.0,
            "score_das": [0.5, np.nan, -0.5, 0.0],
            "score_small_loss": [-4.0, -1.0, -2.0, -3.0],
        }
    )
    samples.to_parquet(folder / "samples.parquet")
    return folder


def test_lowest_by_the_runs_own_score_come_first(run, capsys):
    assert main([str(run), "--top", "3"]) == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out))
    assert frame["index"].tolist() == [7, 8, 5]
    assert list(frame) == ["index", "label", "likely_label", "clean_label", "score_das", "score_small_loss"]
    assert frame["likely_label"].tolist() == [1, 2, 0]


def test_by_another_score_into_a_file_found_by_id(run, tmp_path, capsys):
    out = tmp_path / "list.csv"
    assert main(["0123", "--results", str(tmp_path), "--by", "small_loss", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert pd.read_csv(out)["index"].tolist() == [5, 8, 7, 6]


def test_a_run_that_ranks_nothing_is_sorted_by_small_loss(run, capsys):
    (run / "summary.json").write_text('{"score": null}')
    assert main([str(run)]) == 0
    assert pd.read_csv(io.StringIO(capsys.readouterr().out))["index"].tolist() == [5, 8, 7, 6]


def test_contact_sheet_shows_the_images_of_the_data_set(run, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main([str(run), "--top", "3", "--sheet", str(sheet)]) == 0
    image = Image.open(sheet)
    assert image.width == 3 * 68
    assert len(np.unique(np.asarray(image))) > 3


def test_report_shows_the_lowest_of_a_run_whose_images_are_at_hand(run, tmp_path):
    sheet = report_sheet(run, tmp_path, top=3)
    assert (sheet.run, sheet.by, sheet.count) == ("0123", "das", 3)
    image = Image.open(io.BytesIO(sheet.image))
    assert (image.format, image.width) == ("JPEG", 3 * 68)
    assert len(np.unique(np.asarray(image))) > 3


def test_report_has_no_sheet_where_the_images_are_not(run, tmp_path):
    (run / "config.yaml").write_text(CONFIG.replace("name: digits,", "name: cifar10, root: null, download: false,"))
    with pytest.raises(UsageError, match=str(tmp_path / "elsewhere" / "cifar10")):
        report_sheet(run, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda run: None, ["RUN", "--by", "oracle"], ["oracle", "das, small_loss"]),
        (lambda run: None, ["nowhere"], ["nowhere"]),
        (lambda run: None, ["RUN", "--top", "0"], ["--top"]),
        (lambda run: None, ["RUN", "--tip"], ["--tip", "--help"]),
        (lambda run: (run / "samples.parquet").unlink(), ["RUN"], ["samples.parquet"]),
        (lambda run: (run / "samples.parquet").write_text("x"), ["RUN"], ["damaged"]),
        (lambda run: (run / "config.yaml").unlink(), ["RUN", "--sheet", "s.png"], ["config.yaml"]),
    ],
)
def test_mistakes_get_one_sentence(run, change, arguments, words, capsys):
    change(run)
    assert main([str(run) if argument == "RUN" else argument for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words)
