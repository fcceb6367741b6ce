"""The list of samples to look at."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from alignprune_exp import sheet
from alignprune_exp.errors import UsageError
from alignprune_exp.sheet import report_sheet
from alignprune_exp.suspects import main
from recorded import edit_json, write_record, write_samples

CONFIG = """
dataset: {name: digits, subset: null, test_subset: null, flip: false, crop: 0}
noise: {name: sym}
paths: {results: results}
"""
SAMPLES = pd.DataFrame(
    {
        "index": np.arange(5, 11),
        "path": None,
        "label": [0, 0, 0, 1, 1, 2],
        "clean_label": [0, 0, 1, 1, 1, 3],
        "predicted": [0, 0, 1, 1, 0, 3],
        "loss": [0.1, 0.2, 0.3, 2.0, 4.0, 9.0],
        "score_loss": [0.1, 0.2, 0.3, 2.0, 4.0, 9.0],
        "score_das": [0.5, np.nan, -0.5, 0.0, -0.9, 0.9],
        "score_small_loss": [-0.1, -0.4, -0.2, -3.0, -2.0, -9.0],
        "score_settled": [-0.1, -0.2, -0.9, -3.0, -4.0, -9.0],
        "times_selected": [2, 2, 1, 1, 1, 2],
    }
)


@pytest.fixture
def run(tmp_path):
    folder = write_record(tmp_path, "0123", "c", 50.0, samples=6, score="loss")
    (folder / "config.yaml").write_text(CONFIG)
    write_samples(folder, SAMPLES)
    return folder


@pytest.fixture
def listed(run, tmp_path, capsys):
    """List the run's suspects into a file; return them, and what was said."""

    def listed(*arguments):
        out = tmp_path / "list.csv"
        assert main([str(run), "--force", "--out", str(out), *arguments]) == 0
        return pd.read_csv(out, keep_default_na=False, na_values=[""]), capsys.readouterr().err

    return listed


def test_the_least_settled_of_their_class_come_first_whatever_score_ranked(listed):
    frame, err = listed("--top", "4")
    assert frame["index"].tolist() == [7, 9, 10, 6]
    assert list(frame) == ["index", "label", "likely_label", "clean_label", "sure", "loss", "flag", "score"]
    assert frame["likely_label"].tolist() == [1, 0, 3, 0]
    assert frame["score"].tolist() == pytest.approx([-0.5 / 0.355903, -1, 0, 0.2 / 0.355903], rel=1e-4)
    assert err == "listed by settled, standardised within the given class, lowest first\n"


def test_odds_that_compare_all_classes_are_listed_as_they_are(run, capsys):
    odds = [5.0, -1.0, 3.0, 7.0, -2.0, 4.0]
    write_samples(run, SAMPLES.assign(score_transition=np.float32(odds)))
    assert main([str(run), "--by", "transition", "--out", str(run / "list.csv")]) == 0
    assert capsys.readouterr().err == "listed by transition, lowest first\n"
    frame = pd.read_csv(run / "list.csv")
    assert frame["score"].tolist() == sorted(odds)
    assert frame["index"].tolist() == SAMPLES["index"].to_numpy()[np.argsort(odds)].tolist()


def test_in_the_terminal_a_sample_that_was_never_seen_has_its_label_and_no_other(run, capsys):
    unseen = {"predicted": [0, 0, -1, 1, 0, 3], "loss": SAMPLES["loss"].where(SAMPLES["index"] != 7)}
    write_samples(run, SAMPLES.assign(score_settled=SAMPLES["score_settled"].where(SAMPLES["index"] != 7), **unseen))
    assert main([str(run), "--by", "das", "--top", "1"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["7", "0", "→", "?", "1", "–", "–", "never", "seen"]


def test_in_the_terminal_they_are_a_table_that_one_can_read(run, capsys):
    rows = 60
    rng = np.random.default_rng(0)
    wrong = rng.random(rows) < 0.4
    score = -np.exp(rng.normal(np.where(wrong, 2.0, -2.0), 0.3)).astype(np.float32)
    frame = pd.concat([SAMPLES.iloc[:1]] * rows, ignore_index=True)
    labels = {"label": 0, "clean_label": wrong * 2, "predicted": np.where(np.arange(rows) % 2, 0, wrong * 2)}
    write_samples(run, frame.assign(index=range(rows), score_settled=score, path="a\nb", **labels))
    edit_json(run / "summary.json", samples=rows, saved=0.0)
    assert main([str(run), "--top", "3"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["sample", "given", "→", "likely", "clean", "sure", "loss", "flag", "path"]
    first = np.argsort(score, kind="stable")[:3]
    for line, index in zip(lines, first, strict=True):
        flag = "memorised" if index % 2 else "wrong"
        assert line.split() == f"{index} 0 → {0 if index % 2 else 2} 2 >99 % 0.1 {flag} a b".split()


def test_what_was_checked_is_left_out(listed, tmp_path):
    pd.DataFrame({"index": [7, 10], "label": [1, 2]}).to_csv(tmp_path / "checked.csv", index=False)
    frame, _ = listed("--checked", str(tmp_path / "checked.csv"))
    assert frame["index"].tolist() == [9, 6, 5, 8]


def test_an_older_record_is_listed_by_small_loss_and_says_so(run, listed):
    write_samples(run, SAMPLES.drop(columns="score_settled"))
    frame, err = listed("--top", "2")
    assert frame["index"].tolist() == [6, 8]
    assert err.startswith("listed by small_loss, standardised")
    assert err.endswith("; the run has no score settled\n")


def test_by_another_score_into_a_file_found_by_id(run, tmp_path, capsys):
    out = tmp_path / "list.csv"
    assert main(["0123", "--results", str(tmp_path), "--by", "das", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 6 of 6 samples\n"
    assert pd.read_csv(out)["index"].tolist() == [7, 9, 10, 5, 8, 6]  # the one without a score comes last


@pytest.mark.parametrize("name", ["0123", "0123~1"])
def test_a_run_is_found_from_within_its_folder_also_when_it_was_set_aside(run, name, monkeypatch, capsys):
    monkeypatch.chdir(run.rename(run.with_name(name)))
    assert main(["."]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_paths_that_begin_like_a_formula_are_texts(run, listed):
    write_samples(run, SAMPLES.assign(path=["=cmd()", "+1", "-1", "@x", "a=b", "\tx"]))
    frame, _ = listed()
    assert sorted(frame["path"]) == sorted(["'=cmd()", "'+1", "'-1", "'@x", "a=b", "'\tx"])
    assert frame["score"].min() < 0  # numbers stay as they are


def test_contact_sheet_shows_the_images_of_the_data_set(run, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main([str(run), "--top", "3", "--sheet", str(out)]) == 0
    image = Image.open(out)
    assert image.width == 3 * 68
    assert len(np.unique(np.asarray(image))) > 3


def test_contact_sheet_refuses_images_that_are_others_by_now(run, tmp_path, capsys):
    folder, paths = tmp_path / "own", [f"train/{'abc'[k // 4]}/{k:02}.png" for k in range(12)]
    for path in [*paths, "test/a/0.png"]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / path)
    own = f"name: image_folder, root: {folder}, image_size: null, on_error: stop,"
    (run / "config.yaml").write_text(CONFIG.replace("name: digits,", own))
    write_samples(run, SAMPLES.assign(path=[paths[index] for index in SAMPLES["index"]]))
    line = [str(run), "--top", "3", "--force", "--sheet", str(tmp_path / "sheet.png")]
    assert main(line) == 0
    (folder / paths[0]).unlink()
    sheet._source.cache_clear()
    capsys.readouterr()
    assert main(line) == 2
    assert "the data set's image 7 is train/c/08.png, and the run's was train/b/07.png" in capsys.readouterr().err


def test_report_shows_the_lowest_of_a_run_whose_images_are_at_hand(run, tmp_path):
    made = report_sheet(run, tmp_path, top=3)
    assert (made.run, made.by, made.count) == ("0123", "settled", 3)
    image = Image.open(io.BytesIO(made.image))
    assert (image.format, image.width) == ("JPEG", 3 * 68)
    assert len(np.unique(np.asarray(image))) > 3


def test_report_has_no_sheet_where_the_images_are_not(run, tmp_path):
    (run / "config.yaml").write_text(CONFIG.replace("name: digits,", "name: cifar10, root: null, download: false,"))
    with pytest.raises(UsageError, match=str(tmp_path / "elsewhere" / "cifar10")):
        report_sheet(run, tmp_path / "elsewhere")


def _of_another_task(run):
    """Leave of the record what one of a task without classes has."""
    judged = {"name": "error", "words": "test error", "unit": "", "higher": False, "digits": 3}
    judged = {f"headline_{key}": value for key, value in judged.items()}
    edit_json(run / "summary.json", **judged, test_error_final=0.5, test_error_best=0.4)
    write_samples(run, SAMPLES.drop(columns="label"))


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda run: None, ["RUN", "--by", "oracle"], ["oracle", "loss, das, small_loss, settled"]),
        (lambda run: None, ["RUN", "--by", "loss"], ["lowest loss", "cleanest", "use --by settled"]),
        (lambda run: None, ["nowhere"], ["nowhere"]),
        (lambda run: (run / "loop").symlink_to("loop"), ["RUN/loop"], ["there is no run", "loop"]),
        (lambda run: None, ["RUN", "--top", "0"], ["--top"]),
        (lambda run: None, ["RUN", "--tip"], ["--tip", "--help"]),
        (lambda run: _of_another_task(run), ["RUN"], ["without class labels"]),
        (lambda run: None, ["RUN", "--out", "list.txt"], ["list.txt", ".csv or .parquet"]),
        (lambda run: None, ["RUN", "--out", "/no/such/list.csv"], ["no folder /no/such"]),
        (lambda run: None, ["RUN", "--out", __file__ + ".csv/x.csv"], ["no folder"]),
        (lambda run: None, ["RUN", "--sheet", "sheet.jpg"], ["sheet.jpg", ".png"]),
        (lambda run: None, ["RUN", "--checked", "nowhere.csv"], ["nowhere.csv", "not there"]),
        (lambda run: None, ["RUN", "--checked", __file__], ["whole numbers", "index and label"]),
        (
            lambda run: (run / "c.csv").write_text("index,label\n7,True\n8,False\n"),
            ["RUN", "--checked", "RUN/c.csv"],
            ["whole numbers", "index and label"],
        ),
        (lambda run: (run / "samples.parquet").unlink(), ["RUN"], ["samples.parquet"]),
        (lambda run: (run / "samples.parquet").write_text("x"), ["RUN"], ["damaged"]),
        (lambda run: (run / "summary.json").unlink(), ["RUN"], ["no run that finished"]),
        (
            lambda run: write_samples(run, SAMPLES.drop(columns=["score_settled", "score_small_loss"])),
            ["RUN"],
            ["--by das"],
        ),
        (lambda run: (run / "config.yaml").unlink(), ["RUN", "--sheet", "s.png"], ["config.yaml"]),
        (lambda run: (run / "config.yaml").write_text("[" * 9999), ["RUN", "--sheet", "s.png"], ["config.yaml"]),
        (
            lambda run: (run / "config.yaml").write_text(CONFIG.replace("digits", "dogits")),
            ["RUN", "--sheet", "s.png"],
            ["config.yaml", "data set"],
        ),
        (
            lambda run: write_samples(run, SAMPLES.assign(label=[0, 0, 0, 1, 1, 10]), classes=11),
            ["RUN", "--sheet", "s.png"],
            ["10 classes", "label 10"],
        ),
        (
            lambda run: write_samples(run, SAMPLES.assign(index=range(9990, 9996))),
            ["RUN", "--sheet", "s.png"],
            ["training images", "9995"],
        ),
    ],
)
def test_mistakes_get_one_sentence(run, change, arguments, words, capsys):
    change(run)
    assert main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words)
