"""What a run leaves for other tools: probabilities, exports, keep-lists, and the command that has them all."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import cleanlab
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cleanlab.filter import find_label_issues
from omegaconf import OmegaConf

import alignprune_exp
from alignprune_exp import cli, export, keep
from alignprune_exp.export import Samples, to_labelstudio
from alignprune_exp.listing import suspects
from alignprune_exp.pruning import TrajectoryLog
from alignprune_exp.records import Damaged, read_probabilities, read_samples, write_parquet
from alignprune_exp.suites import load_suite
from alignprune_exp.train import main as train
from recorded import SAMPLES, write_record

PROJECT = Path(__file__).parents[1]
PYPROJECT = PROJECT / "pyproject.toml"


@pytest.fixture(scope="module", params=["noise=sym0.5", "noise=sym noise.rate=0.35"])
def run(request, tmp_path_factory):
    """The main job, at two rates of noise, with its probabilities."""
    results = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    line = f"{request.param} threads=1 keep_probabilities=true paths.results={results}"
    assert train(line.split()) == 0
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    (folder,) = (results / "runs").iterdir()
    return folder


@pytest.fixture
def bare(tmp_path):
    """A record that has kept no probabilities."""
    return write_record(tmp_path, "0123", "c", 50.0)


def test_nearly_all_that_a_run_lists_is_wrong_and_the_likely_label_right(run):
    found = suspects(read_samples(run), "settled").head(200)
    assert (found["label"] != found["clean_label"]).mean() > 0.97
    assert (found["likely_label"] == found["clean_label"]).mean() > 0.85


def test_probabilities_are_of_every_sample_by_the_last_network(run):
    samples = read_samples(run)
    probabilities, names = read_probabilities(run, samples)
    assert names == [str(digit) for digit in range(10)]
    assert probabilities.shape == (len(samples), 10)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    taken_for = probabilities.argmax(1)
    assert (taken_for == samples["clean_label"]).mean() > 0.85
    assert (taken_for == samples["predicted"]).mean() > 0.85  # of the last training pass


def test_cleanlab_reads_the_export_and_finds_what_was_made_wrong(run, tmp_path, capsys):
    place = tmp_path / "for_cleanlab"
    assert export.main([str(run), "--to", "cleanlab", "-o", str(place)]) == 0
    data, probabilities = pd.read_csv(place / "data.csv"), np.load(place / "pred_probs.npy")
    samples = read_samples(run)
    assert data["index"].tolist() == samples["index"].tolist()
    wrong = (samples["label"] != samples["clean_label"]).to_numpy()
    issues = find_label_issues(data["label"].to_numpy(), probabilities, n_jobs=1)
    assert wrong[issues].mean() > 0.95
    assert issues[wrong].mean() > 0.7


def test_cleanlabs_datalab_reads_the_export(run, tmp_path):
    pytest.importorskip("datasets", reason="cleanlab.Datalab needs it")
    assert export.main([str(run), "--to", "cleanlab", "-o", str(tmp_path / "out")]) == 0
    lab = cleanlab.Datalab(str(tmp_path / "out" / "data.csv"), label_name="label")
    lab.find_issues(pred_probs=np.load(tmp_path / "out" / "pred_probs.npy"), issue_types={"label": {}})
    issues = lab.get_issues("label")["is_label_issue"].to_numpy()
    samples = read_samples(run)
    assert (samples["label"] != samples["clean_label"]).to_numpy()[issues].mean() > 0.95


def test_tasks_for_label_studio_fit_their_labelling_interface(run, tmp_path):
    assert export.main([str(run), "--to", "labelstudio", "-o", str(tmp_path / "out")]) == 0
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    view = xml.etree.ElementTree.parse(tmp_path / "out" / "labeling_config.xml").getroot()
    control, shown = view.find("Choices"), view.find("Text")
    choices = {choice.get("value") for choice in control}
    expected = suspects(read_samples(run), "settled")
    assert [task["data"]["index"] for task in tasks] == expected["index"].tolist()
    for task, (_, row) in zip(tasks, expected.iterrows(), strict=True):
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert (result["from_name"], result["to_name"]) == (control.get("name"), shown.get("name"))
        assert control.get("toName") == shown.get("name")
        assert result["type"] == "choices"
        assert result["value"]["choices"] == [str(row["likely_label"])]
        assert choices >= {*result["value"]["choices"], task["data"]["label"]}
        assert shown.get("value")[1:] in task["data"]
        assert prediction["score"] == pytest.approx(1 - row["sure"])
        assert 0 < result["score"] <= 1


def test_one_flat_table_holds_all_that_is_known(run, tmp_path):
    assert export.main([str(run), "--to", "parquet", "-o", str(tmp_path / "all.parquet")]) == 0
    frame, samples = pd.read_parquet(tmp_path / "all.parquet"), read_samples(run)
    for column in ("index", "label", "clean_label", "loss", "score_settled", "score_das", "times_selected"):
        np.testing.assert_array_equal(frame[column], samples[column])
    np.testing.assert_array_equal(frame[[f"p_{k}" for k in range(10)]], read_probabilities(run, samples)[0])
    assert not any(str(field.type).startswith(("list", "struct")) for field in pq.read_schema(tmp_path / "all.parquet"))


def test_paths_become_images(bare, tmp_path):
    assert export.main([str(bare), "--to", "labelstudio", "-o", str(tmp_path / "out")]) == 0
    task = json.loads((tmp_path / "out" / "tasks.json").read_text())[0]
    assert task["data"]["image"].endswith(".png")
    assert "score" not in task["predictions"][0]["result"][0]  # it has kept no probabilities
    assert '<Image name="sample" value="$image"/>' in (tmp_path / "out" / "labeling_config.xml").read_text()


def test_what_a_log_keeps_is_exported_as_well(tmp_path):
    log = TrajectoryLog(40)
    rng = torch.Generator().manual_seed(0)
    log.update(torch.arange(40), torch.randn(40, 3, generator=rng), torch.arange(40) % 3)
    to_labelstudio(Samples("log", log.suspects(40), names=["cat", "dog", 'a "b" & c']), tmp_path / "out", False)
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert {task["data"]["label"] for task in tasks} == {"cat", "dog", 'a "b" & c'}
    config = xml.etree.ElementTree.parse(tmp_path / "out" / "labeling_config.xml")
    assert [choice.get("value") for choice in config.iter("Choice")] == ["cat", "dog", 'a "b" & c']


def test_what_a_sample_is_taken_for_can_be_chosen_though_no_label_is_that(tmp_path):
    log = TrajectoryLog(6)
    log.update(torch.arange(6), torch.eye(4)[[3, 3, 2, 0, 1, 0]], torch.arange(6) % 2)
    to_labelstudio(Samples("log", log.suspects(6)), tmp_path / "out", False)
    tasks = json.loads((tmp_path / "out" / "tasks.json").read_text())
    foretold = {task["predictions"][0]["result"][0]["value"]["choices"][0] for task in tasks}
    config = xml.etree.ElementTree.parse(tmp_path / "out" / "labeling_config.xml")
    assert foretold <= {choice.get("value") for choice in config.iter("Choice")} == {"0", "1", "2", "3"}


@pytest.mark.parametrize("damage", ["rows", "names", "values", "column"])
def test_damaged_probabilities_are_refused(bare, damage):
    samples = read_samples(bare)
    values = {"index": samples["index"], **{f"p_{k}": np.full(SAMPLES, 0.5, np.float32) for k in range(2)}}
    names = '["a", "b"]'
    if damage == "rows":
        values["index"] = samples["index"] + 1
    elif damage == "names":
        names = "[1, 2]"
    elif damage == "values":
        values["p_0"] = np.full(SAMPLES, 0.7, np.float32)
    else:
        del values["p_1"]
    write_parquet(bare / "probabilities.parquet", pa.table(values), names=names)
    with pytest.raises(Damaged, match=r"probabilities\.parquet"):
        read_probabilities(bare, samples)


# ---- keep-lists ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "kept"), [("0.7", 70), ("0.29", 29), ("1", 100), ("0.999", 99)])
def test_a_keep_list_has_exactly_so_many(bare, tmp_path, capsys, fraction, kept):
    out = tmp_path / "keep.parquet"
    assert keep.main([str(bare), "--fraction", fraction, "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: {kept} of {SAMPLES} samples are kept\n"
    frame = pd.read_parquet(out)
    assert list(frame) == ["index", "path", "keep", "score"]
    assert frame["keep"].sum() == kept
    assert frame["keep"].dtype == bool
    assert frame["index"].tolist() == read_samples(bare)["index"].tolist()
    if kept < SAMPLES:
        assert frame.loc[frame["keep"], "score"].min() >= frame.loc[~frame["keep"], "score"].max()


def test_ties_go_to_the_lower_index_and_the_unknown_first(bare):
    samples = read_samples(bare).iloc[::-1].assign(score_loss=1.0)
    samples.loc[samples["index"] < 30, "score_loss"] = np.nan
    frame = keep.keep_list(samples, 0.5, "loss")
    assert sorted(frame.loc[frame["keep"], "index"]) == [3 * k for k in range(10, 60)]
    assert keep.keep_list(samples, 0.95, "loss").set_index("index")["keep"].loc[[0, 12, 15]].tolist() == [
        True,
        True,
        False,
    ]


def test_a_keep_list_for_one_score_ranks_by_it_as_it_is(bare):
    samples = read_samples(bare)
    frame = keep.keep_list(samples, 0.3, "loss")
    assert set(frame.loc[frame["keep"], "index"]) == set(samples.nlargest(30, "score_loss")["index"])


def test_nothing_is_written_over_unless_asked(bare, tmp_path, capsys):
    out = tmp_path / "keep.parquet"
    out.write_text("mine")
    assert keep.main([str(bare), "--fraction", "0.5", "-o", str(out)]) == 2
    assert "keep.parquet is there already; name another file, or add --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert keep.main([str(bare), "--fraction", "0.5", "-o", str(out), "--force"]) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert export.main([str(bare), "--to", "labelstudio", "-o", str(tmp_path / "full")]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("keep RUN --fraction 0 -o k.parquet", ["--fraction 0", "above 0"]),
        ("keep RUN --fraction 1.1 -o k.parquet", ["--fraction 1.1"]),
        ("keep RUN --fraction nan -o k.parquet", ["--fraction nan"]),
        ("keep RUN --fraction 0.001 -o k.parquet", ["keeps none of 100"]),
        ("keep RUN --fraction 0.5 --by das -o k.parquet", ["--by das", "loss, small_loss, settled"]),
        ("keep RUN --fraction 0.5 -o k.xls", ["k.xls", ".parquet or .csv"]),
        ("keep RUN -o k.parquet", ["--fraction", "--help"]),
        ("keep nowhere --fraction 0.5 -o k.parquet", ["no run nowhere"]),
        ("export RUN --to cleanlab -o k", ["kept no probabilities.parquet", "keep_probabilities=true"]),
        ("export RUN --to excel -o k", ["excel", "labelstudio"]),
        ("export RUN --to parquet -o k", ["k does not end in .parquet"]),
        ("export RUN --to labelstudio -o no/such/k", ["no folder no/such"]),
        ("sttaus", ["there is no alignprune sttaus, did you mean status?"]),
        ("xyz", ["there is no alignprune xyz; there are train, status"]),
        ("", ["a command is missing; use one of train, status"]),
    ],
)
def test_mistakes_get_one_sentence_and_no_file(bare, tmp_path, monkeypatch, capsys, line, words):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert cli.main([str(bare) if word == "RUN" else word for word in line.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert [word for word in words if word not in err] == [], err
    assert list(here.iterdir()) == []


# ---- the command and the package -----------------------------------------------------------------------------


def test_the_command_has_all_that_can_be_typed(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (module, _) in cli.COMMANDS.items():
        assert f"\n  {name} " in out
        assert (PROJECT / "src/alignprune_exp" / f"{module.replace('.', '/')}.py").is_file()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"alignprune {alignprune_exp.__version__}\n"


def test_the_command_imports_only_what_was_typed():
    load_suite("controls", ["scale=cpu"])  # what is composed anew needs torch
    code = "import sys; from alignprune_exp.cli import main; main(sys.argv[1:]); "
    code += "print(sorted({'torch', 'hydra', 'pandas'} & sys.modules.keys()))"
    for line, strangers in (("--help", ["torch", "hydra", "pandas"]), ("status suite=controls scale=cpu", ["torch"])):
        done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=True)
        assert not [name for name in strangers if name in done.stdout.splitlines()[-1]]


def version():
    return re.search(r'^version = "(.+)"$', PYPROJECT.read_text(), re.MULTILINE)[1]


def test_the_package_says_what_it_is():
    assert alignprune_exp.__version__ in (version(), "unknown")
    assert f'\n[project.scripts]\nalignprune = "{cli.__name__}:{cli.main.__name__}"\n' in PYPROJECT.read_text()
    assert (PROJECT / "src/alignprune_exp/py.typed").read_text() == ""


def test_the_citation_has_what_the_format_requires():
    cited = OmegaConf.to_container(OmegaConf.load(PROJECT / "CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # required by version 1.2.0
    assert cited["cff-version"] == "1.2.0"
    assert cited["type"] == "software"
    assert cited["version"] == version()
    preferred = cited["preferred-citation"]
    assert {"type", "title", "authors"} <= preferred.keys()
    assert "Robust Dynamic Pruning" in preferred["title"]
    assert all(author.keys() & {"name", "family-names"} for each in (cited, preferred) for author in each["authors"])
