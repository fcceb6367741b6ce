"""The command line: every mistake gets one sentence, status 2 and no file; help is fast; the wheel works elsewhere."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from alignprune_exp import run as run_module
from alignprune_exp.commandline import read_line
from alignprune_exp.config import PATHS
from alignprune_exp.errors import UsageError
from alignprune_exp.suites import suite_of
from alignprune_exp.train import main
from harness import missing

PROJECT = Path(__file__).parents[1]
SMALL = ("epochs=4", "score.window=3", "pruner.delta=1", "dataset.subset=100", "dataset.test_subset=50", "threads=1")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, and arguments and environment as they were afterwards."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def trained(place, monkeypatch):
    """The folders of the runs that were trained, if any: the training itself is left out."""
    folders = []

    def train(self, folder, *_):
        folders.append(folder.path)
        raise run_module.Failed("not trained in this test")

    monkeypatch.setattr(run_module.Run, "train", train)
    return folders


@pytest.fixture
def refused(place, trained, refused):
    """Type a mistake in an empty working directory; return the one sentence, with nothing trained."""

    def typed(*line):
        sentence = refused(*line)
        assert trained == []
        return sentence

    return typed


MISTAKES = [
    # unknown options, with the nearest one
    ("dataset=digit", "dataset=digit digits cifar10 cifar100 image_folder"),
    ("dataset=cifar-10", "cifar-10 cifar10"),
    ("pruner=infobach", "pruner=infobach infobatch full random seta topk"),
    ("pruner=INFOBATCH", "pruner=INFOBATCH infobatch"),
    ("score=dsa", "score=dsa das loss spearman cosine small_loss oracle"),
    ("noise=sim0.5", "noise=sim0.5 sym0.5 asym0.2 real clean"),
    ("noise=sym0.35", "noise=sym0.35 sym"),
    ("model=resnet", "model=resnet resnet8 resnet18"),
    ("optimizer=adam", "optimizer=adam sgd lars"),
    ("reference=trust", "reference=trust trusted none"),
    ("scale=tiny", "scale=tiny smoke cpu paper"),
    ("tracking=wand", "tracking=wand wandb none"),
    ("suite=man", "suite=man main"),
    ("method=infobach", "method=infobach infobatch"),
    ("score.name=dass", "dass das"),
    ("pruner.name=infobach", "infobach infobatch"),
    ("learner.name=2", "learner.name=2 ce elr sop refurbish posterior dividemix"),
    ("model.name=resnet", "model.name=resnet small_cnn resnet8"),
    ("dataset=a/b", "dataset=a/b digits"),
    ("suite=/", "suite=/ main"),
    ("hydra/launcher=job", "hydra/launcher=job joblib slurm"),
    # unknown keys, with the nearest one or all there are
    ("sed=1", "sed seed"),
    ("epoch=3", "epoch epochs"),
    ("noise.rte=0.1", "noise.rte rate"),
    ("pruner.ratoi=0.3", "pruner.ratoi ratio delta rescale budget"),
    ("score.windw=5", "score.windw window"),
    ("pruner.warmup=3", "pruner.warmup infobatch ratio delta"),
    ("pruner=full pruner.ratio=0.3", "pruner.ratio full"),
    ("dataset.root=/tmp", "dataset.root digits subset"),
    ("model=resnet18 model.width=3", "model.width resnet18 stem"),
    ("+foo=1", "foo seed"),
    ("++a.b=1", "a seed"),
    ("+noise.foo=1", "noise.foo rate"),
    ("++noise.foo=1", "noise.foo rate"),
    ("hydra.foo=1", "hydra.foo"),
    ("pruner@x=full", "pruner@x=full @x"),
    ("learner@_global_=elr", "learner@_global_=elr @_global_"),
    # keys of Hydra's own
    ("hydra=null", "hydra=null hydra/launcher"),
    ("hydra.run.dir=x", "hydra.run.dir=x hydra/launcher"),
    ("hydra.output_subdir=x", "hydra.output_subdir=x hydra/launcher"),
    ("hydra/job_logging=default", "hydra/job_logging=default hydra/launcher"),
    ("hydra/sweeper=basic", "hydra/sweeper=basic hydra/launcher"),
    ("-m hydra/launcher=submitit_local", "submitit_local basic joblib slurm"),
    ("-m hydra.launcher=null", "launcher"),
    ("-m hydra/launcher=joblib hydra.launcher._target_=3", "_target_"),
    # removed ones
    ("~pruner.name", "pruner.name infobatch"),
    ("~dataset.name", "dataset.name dataset=…"),
    ("pruner.name=1", "pruner.name=1 infobatch package.module.Class"),
    ("pruner.name=.x.Y", "pruner.name=.x.Y infobatch"),
    ("pruner.name=a..b", "pruner.name=a..b infobatch"),
    ("~pruner", "pruner"),
    ("~seed", "seed"),
    ("~noise.rate", "noise.rate"),
    # not key=value, and flags
    ("rubbish", "rubbish key=value"),
    ("seed", "seed key=value"),
    ("seed=[", "key=value"),
    ("--foo", "--foo --help"),
    ("--cfg bob", "bob job --help"),
    ("--config-name nowhere", "nowhere"),
    ("--config-path /nonexistent", "/nonexistent"),
    ("--config-dir /nonexistent", "--config-dir /nonexistent folder"),
    ("-cd=/nonexistent -m seed=1,2", "--config-dir /nonexistent folder"),
    ("--config-dir= --cfg job", "--config-dir folder"),
    ("--resolve", "--resolve --cfg"),
    ("--package pruner", "--package --cfg"),
    ("-c job --package nowhere", "nowhere"),
    ("-r -m", "--run --multirun"),
    ("-c job -m seed=1,2", "--cfg --multirun"),
    ("--shell-completion", "--shell-completion --help"),
    ("--experimental-rerun x", "--experimental-rerun unpickle"),
    ("--experimental-re=x", "--experimental-rerun unpickle"),
    ("tracking.project=Ünlü", "tracking.project='Ünlü'"),
    ("epochs=\n", "\\n printed"),
    ("paths.results=\udcff", "\\udcff printed"),
    ("seed=" + "9" * 5000, "seed=9"),
    # grids
    ("-m paths.results=a,b", "paths.results='a,b' paths.results=choice('a','b')"),
    ("-m seed=range(0,1,0)", "seed=range(0,1,0) step"),
    ("-m seed=range(0.0,1.0,0.0)", "seed=range(0.0,1.0,0.0) step"),
    ("-m seed=range(0,1000000000)", "10000"),
    ("-m seed=shuffle(range(0,1000000000))", "10000"),
    ("-m seed=range(nan,1)", "10000"),
    ("-m seed=range(0,200) epochs=range(1,200)", "10000"),
    ("-m seed=interval(0,1)", "seed=interval(0,1) range"),
    ("-m seed=range(3,0)", "empty"),
    ("seed=range(0,1,0)", "seed=range(0,1,0) -m"),
    # what follows from other keys, and what clashes
    ("recipe=cifar10_cpu", "recipe dataset scale"),
    ("recipe=null", "recipe dataset scale"),
    ("recipe/noise@learner=sop_cifar10_real", "recipe dataset scale learner noise"),
    ("method=seta pruner=full", "method pruner"),
    ("saved=0.5 pruner.budget=0.4", "saved pruner.budget"),
    ("saved=0.5 pruner=static_el2n pruner.fraction=0.4", "saved pruner.fraction"),
    ("pruner=static_el2n epochs=20 saved=0.6", "saved=0.6 static_el2n warmup=10 20 below 0.5"),
    ("pruner.saved=0.5", "pruner.saved saved=…"),
    ("suites=main", "suites suite"),
    ("suite=null", "suite=null main"),
    ("method=null", "method=null full"),
    ("~learner", "~learner learner=…"),
    ("-m suite=main,score", "suite=main,score one"),
    ("seed=0..3", "seed=0..3 integer"),
    # options that are no names
    ("pruner=null", "pruner full infobatch random seta topk"),
    ("noise=3", "noise clean sym asym real"),
    ("score=0.5", "score das loss"),
    ("dataset=true", "dataset digits"),
    ("pruner=[full]", "pruner full infobatch"),
    ("noise=[sym0.2,sym0.8]", "noise sym0.2"),
    ("=3", "key=value"),
    # wrong types
    ("seed='3'", "seed='3' quotes"),
    ("epochs='30'", "epochs='30' quotes"),
    ("pruner.ratio='0.5'", "pruner.ratio='0.5' quotes"),
    ("noise.rate='0.3'", "noise.rate='0.3' quotes"),
    ("epochs=2.5", "epochs=2.5 integer"),
    ("epochs=true", "epochs=true integer"),
    ("epochs=null", "epochs=null integer"),
    ("epochs=many", "epochs=many integer"),
    ("optimizer.lr=high", "optimizer.lr=high number"),
    ("force=maybe", "force=maybe"),
    ("pruner.rescale=1", "pruner.rescale=1"),
    ("pruner=topk pruner.warmup=x", "pruner.warmup=x integer"),
    ("paths=3", "paths=3"),
    ("seed=1,2", "seed=1,2"),
    ("seed=${nope}", "nope"),
    # out of range
    ("noise.rate=1", "noise.rate=1 below"),
    ("noise.rate=-0.1", "noise.rate=-0.1 0"),
    ("noise.rate=nan", "noise.rate=nan"),
    ("score.window=2", "score.window=2 3"),
    ("score.window=20 epochs=20", "window 20 delta epochs"),
    ("score.window=8 epochs=10", "window 8 delta epochs"),
    ("pruner.ratio=0.91", "ratio=0.91 0.9"),
    ("pruner.ratio=-0.1", "ratio=-0.1 0"),
    ("pruner.delta=0", "delta=0 1"),
    ("pruner.budget=1.5", "budget=1.5 1"),
    ("pruner=seta pruner.groups=0", "groups=0 1"),
    ("pruner=seta pruner.alpha=1.2", "alpha=1.2"),
    ("pruner=topk pruner.warmup=-1", "warmup=-1 0"),
    ("pruner=topk pruner.warmup=20 epochs=12", "warmup=20 12 epochs delta"),
    ("method=query epochs=4", "every=4 none of 4 epochs"),
    ("epochs=0", "epochs=0 1"),
    ("batch_size=0", "batch_size=0 1"),
    ("seed=-1", "seed=-1 0"),
    ("threads=0", "threads=0 1"),
    ("label_smoothing=1", "label_smoothing=1"),
    ("optimizer.lr=inf", "optimizer.lr=inf"),
    ("optimizer.lr=nan", "optimizer.lr=nan"),
    ("optimizer.lr=0", "optimizer.lr=0"),
    ("optimizer.lr=1" + "0" * 400, "optimizer.lr=1 1000"),
    ("optimizer.weight_decay=1e308", "optimizer.weight_decay=1e+308 100"),
    ("model.width=1000000000", "model.width=1000000000 1024"),
    ("epochs=2000000000", "epochs=2000000000 100000"),
    ("dataset=image_folder dataset.root=. dataset.image_size=100000", "dataset.image_size=100000 4096"),
    ("pruner=static_glister pruner.rounds=1000000", "pruner.rounds=1000000 10000"),
    ("threads=1000000", "threads=1000000 1024"),
    ("threads=2147483648", "threads=2147483648 1024"),
    ("device=cuda:2147483648", "device=cuda:2147483648 cuda:K"),
    ("paths.results=", "paths.results=… empty"),
    ("reference.noise=2", "reference.noise=2 1"),
    ("score.unseen=cary", "score.unseen=cary carry mask refresh"),
    ("precision=fp64", "precision=fp64 auto bf16 fp32"),
    ("recorded=margin", "recorded=margin mean odds? plain"),
    ("recorded=smooth", "recorded=smooth mean smoothed? plain"),
    ("recorded=both", "recorded=both plain smoothed doubt odds disagreement"),
    ("device=gpu", "device=gpu auto cpu cuda"),
    ("noise=real noise.labels=best", "noise.labels=best worst aggre"),
    # what the data cannot give
    ("reference=none", "das reference.size=0"),
    ("reference.size=0", "das reference.size=0"),
    ("reference=none score=cosine", "cosine reference"),
    ("reference.size=1.5", "reference.size=1.5"),
    ("reference.size=5000", "reference.size=5000 1438"),
    ("dataset.subset=200 reference.size=200", "reference.size=200 200"),
    ("dataset.subset=99999", "dataset.subset=99999 1438"),
    ("dataset.subset=5", "dataset.subset=5 10"),
    ("dataset.test_subset=99999", "dataset.test_subset=99999 359"),
    ("noise=real", "noise=real digits cifar10"),
    ("dataset=cifar10", "data/cifar10 dataset.download=true"),
    ("dataset=cifar100 paths.data=/nonexistent", "/nonexistent/cifar100 dataset.download=true"),
    ("dataset=cifar10 dataset.root=.", "dataset.root dataset.download=true train.parquet"),
    ("dataset=image_folder dataset.root=/nonexistent", "dataset.root=/nonexistent train"),
    ("dataset=image_folder", "dataset.root"),
    ("dataset=image_folder dataset.root=.", "dataset.root train"),
    # classes and keys that come from elsewhere, and jobs of a sweep
    ("score.name=no.such.Class", "score.name=no.such.Class das"),
    ("score.name=pathlib.Path", "score.name=pathlib.Path Score"),
    ("pruner.name=no.such.Class", "pruner.name=no.such.Class infobatch"),
    ("+recipe=cifar10_cpu", "recipe dataset scale"),
    ("reference.size=inf", "reference.size=inf"),
    ("score=null", "score das"),
    ("dataset=null", "dataset digits"),
    ("noise.rate=[0.1", "noise.rate=[0.1 key=value"),
    ("dataset.flip=1", "dataset.flip=1 boolean"),
    ("tracking.mode=offline", "tracking.mode none"),
    ("hydra/launcher=slrm", "hydra/launcher=slrm basic"),
    ("-m score=loss,dsa", "dsa did you mean das"),
    ("-m score=das,null", "score"),
    ("-m epochs=36,5", "window epochs=5"),
    ("-m seed=0,one", "seed=one integer"),
    ("-m seed=0,1 +foo=1", "foo"),
    ("-m seed=0,1 nonsense", "nonsense key=value"),
    ("-m reference.size=0.01,0 seed=0,1", "reference.size score=das"),
    ("-m score=das score.name=das,no.such.Class", "no.such.Class"),
    ("-m pruner=infobatch,seta pruner.rescale=false", "pruner.rescale pruner=seta has groups"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_gets_one_sentence_and_leaves_nothing_behind(refused, arguments, words):
    sentence = refused(*arguments.split(" "))
    assert missing(words, sentence) == [], sentence


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [("pruner=infobach", "infobatch"), ("score=dsa", "das"), ("noise=sim0.5", "sym0.5"), ("sed=1", "seed")],
)
def test_the_nearest_match_is_suggested(refused, arguments, wanted):
    assert f"did you mean {wanted}?" in refused(arguments)


@pytest.mark.parametrize("arguments", ["threads=33", "workers=33", "-m threads=1,33"])
def test_so_many_threads_that_they_would_only_hold_the_machine_up(monkeypatch, refused, arguments):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    sentence = refused(*arguments.split())
    assert "=33 is far beyond this machine's 2 processors; use at most 32" in sentence


def test_a_broken_suite_of_ones_own_is_named_with_the_place_that_is_broken(place, refused, tmp_path):
    assert not list(place.iterdir())
    suite = tmp_path / "place" / "suite"
    suite.mkdir()
    (suite / "mine.yaml").write_text("# @package _global_\nhydra:\n  sweeper: {params: [\n")
    for arguments in (["suite=mine"], ["suite=mine", "scale=cpu"], ["-m", "suite=mine"]):
        sentence = refused(*arguments, "--config-dir", ".")
        assert "suite/mine.yaml" in sentence
        assert "line 4" in sentence
    with pytest.raises(UsageError, match=r"suite/mine\.yaml.*line 4"):
        suite_of(["suite=mine", "--config-dir", "."])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_asked_for_and_absent(refused, device):
    sentence = refused(f"device={device}")
    assert f"device={device}" in sentence
    assert "device=cpu" in sentence


@pytest.mark.parametrize("inside", ["", "/deeper", "/runs/deeper"])
def test_a_results_folder_that_is_a_file(place, refused, inside):
    (place / "taken").write_text("mine")
    assert missing("taken paths.results=", refused(f"paths.results=taken{inside}")) == []


def test_a_results_folder_that_cannot_be_made(refused):
    assert "paths.results=" in refused("paths.results=/proc/nothing/here")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_results_folder_that_is_not_writable(place, refused):
    place.chmod(0o555)
    try:
        assert "paths.results=" in refused()
    finally:
        place.chmod(0o755)


# Data sets on disk


def parquet(root, split, labels, image=None, **columns):
    file = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": None} for _ in labels]
    if image is not None:
        images[image]["bytes"] = b"no image"
    root.mkdir(exist_ok=True)
    pq.write_table(pa.table({"img": images, "label": list(labels), **columns}), root / f"{split}.parquet")


@pytest.fixture
def mistaken_cifar10(refused):
    """Run on the CIFAR-10 files in ``cifar``; return the one sentence that it gets."""
    whole = ("dataset.subset=null", "dataset.test_subset=null", "reference.size=0.1")
    return lambda *arguments: refused("dataset=cifar10", "dataset.root=cifar", *whole, *arguments)


LABELS = [k % 10 for k in range(40)]


def test_a_half_downloaded_data_set_names_what_is_missing(place, mistaken_cifar10):
    parquet(place / "cifar", "train", LABELS)
    sentence = mistaken_cifar10()
    assert "test.parquet" in sentence
    assert "train.parquet," not in sentence.split(":")[0]
    assert "dataset.download=true" in sentence


def test_a_half_written_parquet_file_is_named(place, mistaken_cifar10):
    for split in ("train", "test"):
        parquet(place / "cifar", split, LABELS)
    file = place / "cifar" / "train.parquet"
    file.write_bytes(file.read_bytes()[:500])
    assert "cifar/train.parquet" in mistaken_cifar10()


def test_wrong_columns_are_named(place, mistaken_cifar10):
    parquet(place / "cifar", "train", LABELS)
    pq.write_table(pa.table({"picture": [b""], "target": [1]}), place / "cifar" / "test.parquet")
    sentence = mistaken_cifar10()
    assert all(word in sentence for word in ("cifar/test.parquet", "picture", "target", "img", "label"))


def test_a_corrupt_image_is_named_by_its_row(place, mistaken_cifar10):
    parquet(place / "cifar", "train", LABELS, image=17)
    parquet(place / "cifar", "test", LABELS)
    sentence = mistaken_cifar10()
    assert "row 17" in sentence
    assert "cifar/train.parquet" in sentence


def cifar_n(path, clean, **columns):
    names = ("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3")
    torch.save({"clean_label": np.array(clean)} | {name: np.array(clean) for name in names} | columns, path)


def test_a_cifar_n_file_of_another_image_order_is_refused(place, mistaken_cifar10):
    for split in ("train", "test"):
        parquet(place / "cifar", split, LABELS)
    cifar_n(place / "labels.pt", [*LABELS[:7], 0, *LABELS[8:]])
    sentence = mistaken_cifar10("noise=real", "noise.file=labels.pt")
    assert "labels.pt" in sentence
    assert "clean labels" in sentence
    assert "7" in sentence


def test_a_missing_cifar_n_file_says_where_it_is_published(place, mistaken_cifar10):
    for split in ("train", "test"):
        parquet(place / "cifar", split, LABELS)
    for arguments in ((), ("noise.file=nowhere.pt",)):
        sentence = mistaken_cifar10("noise=real", *arguments)
        assert "CIFAR-10_human.pt" in sentence
        assert "http" in sentence


# What is accepted


PATH_LETTERS = "aÜ数1 ()[]{}&',=#%@!;:?*~\"./-_"


@pytest.mark.parametrize("key", PATHS)
@given(path=st.text(PATH_LETTERS, min_size=1))
@example(path="/data/Ünlü")
@example(path="run (1)")
@example(path="a,b")
@example(path="it's")
@example(path="2024")
@example(path="1e3")
@example(path="true")
@example(path="[x]")
@example(path="a=b")
@example(path="C:\\x (1)\\")
def test_a_path_may_hold_what_the_grammar_of_hydra_does_not_cover(key, path):
    assume(path == path.strip() and path[0] not in "'\"")
    (line,) = read_line([f"{key}={path}"])
    assert OverridesParser.create().parse_override(line).value() == path


@pytest.mark.parametrize(
    ("typed", "path"), [("'a b'", "a b"), ('"it\'s"', "it's"), ("null", None), ("${paths.data}/x", "${paths.data}/x")]
)
def test_a_path_that_hydra_can_read_is_read_as_it_always_was(typed, path):
    (line,) = read_line([f"noise.file={typed}"])
    assert line == f"noise.file={typed}"
    assert OverridesParser.create().parse_override(line).value() == path


@pytest.mark.parametrize("arguments", [["paths.results=Ünlü (1), 'a' & b"], ["-m", "seed=0", "paths.results=Ünlü (1)"]])
def test_a_run_lies_in_the_folder_that_was_typed(trained, place, arguments):
    assert main(arguments) == 1
    (folder,) = trained
    assert folder.resolve().parent == place / arguments[-1].partition("=")[2] / "runs"


def test_the_quoted_form_that_a_sentence_shows_is_taken_as_it_is_typed_in_a_shell(place, refused, trained):
    sentence = refused("-m", "paths.results=it's, really")
    typed = sentence.partition("write ")[2].partition(" for one")[0]
    assert main(["-m", *shlex.split(typed)]) == 1
    assert trained[0].resolve().parent == place / "it's, really" / "runs"
    typed = sentence.partition(" or ")[2].partition(" or ")[2].partition(" for a grid")[0]
    (line,) = read_line(["-m", *shlex.split(typed)])[1:]
    assert OverridesParser.create().parse_override(line).value().list == ["it's", " really"]


def test_a_home_is_found_by_its_tilde(trained, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    assert main(["paths.results=~/results"]) == 1
    assert trained[0].resolve().parent == place / "home" / "results" / "runs"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "pruner=seta score=das score.window=20 seed=1",
        "noise=sym noise.rate=0.35",
        "pruner.budget=0.7",
        "pruner=seta saved=0.6",
        "epochs=20 score.window=16",
        "pruner=topk score=small_loss pruner.warmup=2",
        "reference=none score=loss",
        "reference.size=50 reference.train=true",
        "noise=clean noise.rate=0.3 noise.file=/nowhere",
        "pruner=full score=das score.window=29",
        "method=infobatch_das",
        "device=cpu precision=fp32",
    ],
)
def test_what_people_type_is_accepted(trained, place, arguments):
    assert main(arguments.split()) == 1
    (folder,) = trained
    assert folder.resolve().parent == place / "results" / "runs"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ("pruner=full score.window=5", "score.window"),
        ("pruner=random score=loss", "score"),
        ("noise=clean noise.rate=0.3", "noise.rate"),
        ("pruner=full saved=0.5", "saved"),
        ("pruner=shorter saved=0", "saved"),
        ("pruner=shorter saved=0.01", "saved"),  # of 36 epochs that is none
        ("noise.file=/nowhere", "noise.file"),
        ("pruner=infobatch pruner.budget=0.5 pruner.ratio=0.4", "pruner.ratio"),
        ("pruner=rs2 pruner.ratio=0.4 pruner.budget=0.5", "pruner.ratio"),
    ],
)
def test_a_key_without_effect_is_named(trained, capsys, arguments, key):
    main(arguments.split())
    assert f"{key} has no effect" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ["pruner=shorter saved=0.5", "method=shorter saved=0.5", "pruner=rs2 saved=0.5"])
def test_what_saves_as_much_as_is_asked_is_not_said_to_have_no_effect(trained, capsys, arguments):
    main(arguments.split())
    assert len(trained) == 1
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["pruner=topk,ucb pruner.warmup=2", "method=topk_das,topk_settled pruner.warmup=2 pruner.ratio=0.5,0.6"]
)
def test_a_grid_of_choices_takes_a_key_that_the_default_lacks_and_all_of_them_have(trained, line):
    assert main(["-m", *line.split(), "score.window=3", "paths.results=r"]) == 1
    assert len(trained) == (4 if "," in line.split()[-1] else 2)


def test_a_key_that_one_choice_of_a_grid_lacks_is_said_of_that_one(refused):
    sentence = refused("-m", "pruner=topk,infobatch", "pruner.warmup=2")
    assert "in the job pruner=infobatch pruner.warmup=2" in sentence
    assert "topk, ucb; pruner=infobatch has ratio, delta" in sentence


@pytest.mark.parametrize("arguments", [["-m", "seed=1,2", "paths.results=r"], ["paths.results=r", "seed=1,2", "-m"]])
def test_a_sweep_is_started_by_its_flag_before_or_after_the_keys(trained, capsys, arguments):
    assert main(arguments) == 1
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-m seed=0,1 noise.rate=0.5,1.5", "noise.rate=1.5 below"),
        ("-m seed=0,1 score.window=10,40", "window 40"),
        ("-m pruner=infobatch,infobach", "infobach infobatch"),
        ("suite=main pruner=seta", "method pruner"),
    ],
)
def test_a_sweep_checks_every_job_before_the_first_runs(refused, arguments, words):
    sentence = refused(*arguments.split())
    assert missing(words, sentence) == [], sentence


# Processes of their own: start-up, exit status, other folders


def apart(folder, *arguments, python_path=None):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HYDRA_FULL_ERROR")}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


HELP = "import sys; from alignprune_exp.train import main; sys.argv = ['train', *{arguments}]\n"
HELP += "try: status = main()\nexcept SystemExit as end: status = end.code\n"
HELP += "print('torch' in sys.modules, status or 0)"


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["--help"], ["dataset: ", "noise: ", "pruner: ", "score: ", "infobatch", "das", "epochs: ", "window: "], 0),
        (["--cfg", "job"], ["epochs: ", "pruner:", "window: "], 0),
        (["pruner=infobach"], [], 2),
        (["noise.rate=2"], [], 2),
    ],
)
def test_help_and_config_and_mistakes_do_not_wait_for_torch(tmp_path, arguments, words, status):
    done = apart(tmp_path, "-c", HELP.format(arguments=arguments))
    assert done.stdout.splitlines()[-1] == f"False {status}", done
    assert [word for word in words if word not in done.stdout] == []
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_the_exit_status_of_the_process_from_any_folder(tmp_path):
    done = apart(tmp_path, "-m", "alignprune_exp.train", "epochs=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_group(place, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert not end.value.code
    lines = capsys.readouterr().out
    for group in ("dataset", "noise", "pruner", "score", "reference", "model", "optimizer", "scale", "tracking"):
        assert f"\n{group}: " in lines
    assert "recipe follows from dataset, scale, model, learner and noise" in lines


def test_a_run_ends_with_a_small_table_its_record_and_three_commands(place, capsys):
    assert main([*SMALL]) == 0
    out = capsys.readouterr().out
    for column in ("accuracy", "saved", "kept noise", "AUROC", "(½ is chance)", "seconds"):
        assert column in out
    (record,) = [line.split()[1] for line in out.splitlines() if line.startswith("record")]
    assert (place / record / "summary.json").is_file()
    commands = [line for line in out.splitlines() if "python -m alignprune_exp.train" in line]
    assert len(commands) == 3
    assert [path.name for path in place.iterdir()] == ["results"]


def test_a_network_that_never_moves_is_said_to_leave_das_nothing_in_every_run_of_a_sweep(place, capfd):
    still = ("optimizer.lr=1e-12", "optimizer.weight_decay=0", "model.norm=group", "precision=fp32", "threads=1")
    line = ("-m", "seed=0,1", "epochs=8", "score.window=3", "dataset.subset=100", "dataset.test_subset=60")
    assert main([*line, *still]) == 0
    said = capfd.readouterr()
    warned = [line for line in said.out.splitlines() if line.startswith("warning: score='das' is 0 for every sample")]
    assert len(warned) == 2
    assert len(set(warned)) == 2
    assert "Warning" not in said.err


def test_a_run_that_has_estimated_the_noise_says_how_much(place, capsys):
    assert main([*(part for part in SMALL if "delta" not in part), "method=sieve"]) == 0
    heads, values = capsys.readouterr().out.split("\n\n")[1].splitlines()
    (path,) = (place / "results").rglob("summary.json")
    assert "noise estimate" in heads
    assert f"{json.loads(path.read_text())['noise_estimate']:.3f}" in values


@pytest.mark.fuzz
def test_command_lines_drawn_at_random_are_accepted_or_refused_in_one_sentence(tmp_path):
    done = apart(tmp_path, PROJECT / "scripts" / "fuzz.py", "--lines", "250", "--seed", "2")
    *wrong, counts = done.stdout.splitlines()
    assert (done.returncode, wrong, done.stderr) == (0, [], ""), done
    accepted, refused = (int(count) for count in re.findall(r"\d+", counts)[:2])
    assert accepted > 25
    assert refused > 100


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(tmp_path):
    wheels, unpacked, elsewhere = (tmp_path / name for name in ("wheels", "unpacked", "elsewhere"))
    source = tmp_path / "source"
    archive = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, archive.stdout.decode().split("\0")):
        if (PROJECT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((PROJECT / name).read_bytes())
    built = apart(tmp_path, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", wheels, source)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("hatchling cannot be had here")
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = file.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert {"License-Expression: MIT", "Classifier: Typing :: Typed"} <= {*metadata.splitlines()}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {"alignprune_exp/py.typed", "alignprune_exp/conf/train.yaml", "alignprune_exp/conf/suite/main.yaml"} <= {
        *names
    }
    assert {f"alignprune_exp/report/page.{form}" for form in ("html", "css", "js")} <= {*names}
    done = apart(tmp_path, "-m", "pip", "install", "--no-deps", "--quiet", "--target", unpacked, wheel)
    assert done.returncode == 0, done.stderr
    elsewhere.mkdir()
    shown = "import alignprune_exp, hydra_plugins.alignprune_sweeper as s; print(alignprune_exp.__file__, s.__file__)"
    where = apart(elsewhere, "-c", shown, python_path=unpacked)
    assert where.stdout.count(str(unpacked)) == 2, where
    done = apart(elsewhere, "-m", "alignprune_exp.train", "--cfg", "job", python_path=unpacked)
    assert done.returncode == 0, done.stderr
    assert "name: infobatch" in done.stdout
    example = tmp_path / "own_loop.py"
    (source / "scripts" / "own_loop.py").rename(example)
    source.rename(tmp_path / "gone")
    done = apart(elsewhere, example, python_path=unpacked)
    assert done.returncode == 0, done.stderr
    assert "of the 200 most suspect labels are wrong" in done.stdout
    alignprune = unpacked / "bin" / "alignprune"
    done = apart(elsewhere, alignprune, "train", *SMALL, python_path=unpacked)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in elsewhere.iterdir()] == ["results"]
    (run,) = (elsewhere / "results" / "runs").iterdir()
    done = apart(elsewhere, alignprune, "suspects", run.name, "--top", "3", python_path=unpacked)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 4), done
    version = re.search(r"alignprune_exp-([^-]+)-", wheel.name)[1]
    assert apart(elsewhere, alignprune, "--version", python_path=unpacked).stdout == f"alignprune {version}\n"
