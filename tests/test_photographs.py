"""Sets of photographs: layouts, mistakes in them, their index, their crops, and runs on miniatures of them."""

import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from codecs import BOM_UTF8
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as F

import make_miniature
from alignprune_exp import suspects
from alignprune_exp.commandline import config_dir
from alignprune_exp.config import MODEL, PATHS, identity
from alignprune_exp.data import layout
from alignprune_exp.data.augment import ATTEMPTS, Augmentation
from alignprune_exp.data.batches import ImageBatches
from alignprune_exp.data.datasets import DATASETS
from alignprune_exp.data.images import Cut, resized_crop, rgb
from alignprune_exp.data.split import prepare
from alignprune_exp.errors import UsageError
from alignprune_exp.learners.ce import CrossEntropy
from alignprune_exp.records import read_samples
from alignprune_exp.report.figures import save_all
from alignprune_exp.report.html import page
from alignprune_exp.report.publish import scrubbed_command, scrubbed_config
from alignprune_exp.report.tables import make_table, read_records
from alignprune_exp.report.texts import markdown
from alignprune_exp.sheet import report_sheet
from alignprune_exp.suites import load_suite
from alignprune_exp.train import main
from harness import assert_same_results, composed, launch, metrics_of, only_run, rows_of, sentence_of, summary_of
from test_data import noise_of, reference_of

NAMES = ("webvision", "clothing1m", "imagenet", "tiny_imagenet", "parquet")
CUT = {"image_size": 24, "area": 0.08, "aspect": 0.75, "eval_crop": 0.875}
OPTIONS = {
    "webvision": {"classes": 4, "imagenet_root": None},
    "clothing1m": {},
    "imagenet": {"classes": 4},
    "tiny_imagenet": {"classes": 4},
    "parquet": {"image_column": "image", "label_column": "label", "train_split": "train", "test_split": "test"},
}
LONG_AGO = 1_600_000_000
CHANCE = 1e-4  # of a statistical test rejecting the truth; the seeds are fixed, so it fails always or never
DATA = Path(os.environ.get("ALIGNPRUNE_DATA") or Path(__file__).parents[2] / "shared/data")


def _miniature(name, folder, *arguments):
    given = [name, str(folder), "--size", "40", "--train", "8", *map(str, arguments)]
    assert make_miniature.main(given) == 0
    return folder


@pytest.fixture(scope="session")
def miniatures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniatures")
    for name in NAMES:
        _miniature(name, folder / name)
    return folder


def _load(name, root, on_error="stop", **changes):
    return DATASETS[name](name=name, root=str(root), on_error=on_error, **OPTIONS[name] | CUT | changes).open()


def _prepare(source, **changes):
    noise = noise_of(changes.pop("noise", "real"), changes.pop("noise_rate", 0.0), None, None)
    return prepare(source, noise, reference_of(changes, size=5.0, per_class=True), **({"seed": 0} | changes))


def _text(path):
    return path.decode() if isinstance(path, bytes) else str(path)


# ---- layouts ---------------------------------------------------------------------------------------------


def _pairs(file):
    return dict(line.rsplit(" ", 1) for line in file.read_text().splitlines())


def _expected(name, root):
    """Return {path: label} of the training and of the evaluation images, read another way."""
    if name == "webvision":
        train = _pairs(root / "info/train_filelist_google.txt")
        test = {f"val_images_256/{path}": label for path, label in _pairs(root / "info/val_filelist.txt").items()}
    elif name == "clothing1m":
        noisy, clean = (_pairs(root / f"{kind}_label_kv.txt") for kind in ("noisy", "clean"))
        train = {key: noisy[key] for key in (root / "noisy_train_key_list.txt").read_text().split()}
        test = {key: clean[key] for key in (root / "clean_test_key_list.txt").read_text().split()}
    elif name == "parquet":
        splits = []
        for split in ("train", "test"):
            splits.append({})
            for file in root.glob(f"data/{split}-*.parquet"):
                labels = pq.read_table(file)["label"].to_pylist()
                splits[-1] |= {f"data/{file.name}#{row}": label for row, label in enumerate(labels)}
        train, test = splits
    else:
        number = {folder.name: c for c, folder in enumerate(sorted((root / "train").iterdir()))}
        train = {
            str(path.relative_to(root)): number[path.relative_to(root).parts[1]] for path in root.glob("train/**/*.*")
        }
        if name == "imagenet":
            test = {str(path.relative_to(root)): number[path.parent.name] for path in root.glob("val/*/*.JPEG")}
        else:
            lines = (line.split("\t") for line in (root / "val/val_annotations.txt").read_text().splitlines())
            test = {f"val/images/{line[0]}": number[line[1]] for line in lines}
    return [{path: int(label) for path, label in split.items()} for split in (train, test)]


def _opened(name, root, path):
    if name != "parquet":
        return Image.open(root / path)
    file, row = path.split("#")
    return Image.open(io.BytesIO(pq.read_table(root / file)["image"][int(row)].as_py()["bytes"]))


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_its_label_and_is_evaluated_as_torchvision_would(miniatures, name):
    root = miniatures / name
    source = _load(name, root)
    classes = 14 if name == "clothing1m" else 4
    assert len(source.classes) == classes
    theirs = transforms.Compose([transforms.Resize(round(24 / 0.875)), transforms.CenterCrop(24)])
    for images, expected in zip((source.train, source.test), _expected(name, root), strict=True):
        paths = [_text(path) for path in images.paths]
        assert dict(zip(paths, images.labels.tolist(), strict=True)) == expected
        assert len(paths) == len(expected) == len(set(paths))
        assert images.paths.dtype.kind == "S"
        rows = np.arange(0, len(paths), 7)
        pixels = images.pixels(rows).permute(0, 2, 3, 1).numpy()
        for row, ours in zip(rows, pixels, strict=True):
            np.testing.assert_array_equal(ours, np.asarray(theirs(_opened(name, root, paths[row]).convert("RGB"))))
    assert _load(name, root).fingerprint == source.fingerprint


@pytest.mark.skipif(not (DATA / "cifar100/train.parquet").is_file(), reason=f"CIFAR-100 is not in {DATA}")
def test_a_miniature_of_real_photographs_and_a_real_folder_of_parquet_files(tmp_path):
    _miniature("imagenet", tmp_path / "imagenet", "--source", DATA / "cifar100", "--train", "3", "--test", "3")
    source = _load("imagenet", tmp_path / "imagenet")
    real = _load("parquet", DATA / "cifar100", image_column="img", label_column="fine_label", image_size=32)
    assert (len(real.train), len(real.test), len(real.classes)) == (50_000, 10_000, 100)
    assert real.classes[0] in ("apple", "0")
    first = np.flatnonzero(real.train.labels == 2)[:3]
    for row, ours in zip(first, source.train.pixels(np.flatnonzero(source.train.labels == 2)), strict=True):
        theirs = real.train.pixels(np.array([row]))[0].float()
        small = torch.nn.functional.interpolate(ours[None].float(), (8, 8), mode="area")
        assert np.corrcoef(small.ravel(), torch.nn.functional.interpolate(theirs[None], (8, 8)).ravel())[0, 1] > 0.5


def test_noisy_sets_are_noisy_and_their_clean_labels_unknown(miniatures):
    for name in ("webvision", "clothing1m"):
        source = _load(name, miniatures / name)
        shows = np.arange(len(source.train)) % len(source.classes)
        order = np.argsort([int(re.search(r"(\d+)(,\d+)?\.jpg", _text(path))[1][-6:]) for path in source.train.paths])
        if name == "clothing1m":
            order = np.argsort([int(re.search(r"/1(\d+),", _text(path))[1]) for path in source.train.paths])
        wrong = (source.train.labels[order] != shows).sum()
        assert wrong == round(0.3 * len(source.train))
        for noise in ("real", "clean", "sym"):
            data = _prepare(source, noise=noise, noise_rate=0.5)
            assert data.train.clean_labels is None
            assert data.train.wrong is None
            assert data.pairing == ""


@pytest.mark.parametrize("name", ["imagenet", "tiny_imagenet", "parquet"])
def test_real_means_as_they_come_and_clean_where_the_labels_are(miniatures, name):
    source = _load(name, miniatures / name)
    data = _prepare(source)
    np.testing.assert_array_equal(data.train.labels, data.train.clean_labels)
    assert not data.train.wrong.any()
    assert data.reference.source is source.train
    assert not set(data.reference.rows) & set(data.train.rows)
    assert len(data.train) + len(data.reference) == len(source.train)
    assert _prepare(source, noise="sym", noise_rate=0.5).train.wrong.mean() == 0.5


def test_webvision_takes_its_reference_out_of_the_validation_set_and_evaluates_on_the_rest(miniatures):
    source = _load("webvision", miniatures / "webvision", imagenet_root=str(miniatures / "imagenet"))
    for seed in (0, 1):
        data = _prepare(source, seed=seed)
        assert data.reference.source is data.test.source is source.test
        assert np.bincount(data.reference.labels).tolist() == [5] * 4
        assert sorted([*data.reference.rows, *data.test.rows]) == list(range(len(source.test)))
        assert len(data.train) == len(source.train)
        np.testing.assert_array_equal(data.test.rows, _prepare(source).test.rows)
    whole = _prepare(source, reference_size=0.0)
    assert len(whole.test) == len(source.test)
    few = _prepare(source, test_subset=8)
    assert set(few.test.rows) <= set(data.test.rows)
    assert np.bincount(few.test.labels).tolist() == [2] * 4
    assert set(data.evaluations) == {"imagenet"}
    other = _load("imagenet", miniatures / "imagenet")
    np.testing.assert_array_equal(data.evaluations["imagenet"].labels, other.test.labels)
    assert _load("webvision", miniatures / "webvision").fingerprint != source.fingerprint
    with pytest.raises(UsageError, match=r"reference.train=true .* webvision has a place of its own"):
        _prepare(source, reference_train=True)
    with pytest.raises(UsageError, match=r"reference.size=18 of each class does not fit .* type .* 1 to 17"):
        _prepare(source, reference_size=18.0)


def test_clothing1m_takes_its_reference_from_the_clean_training_set(miniatures):
    root = miniatures / "clothing1m"
    data = _prepare(_load("clothing1m", root))
    clean = set((root / "clean_train_key_list.txt").read_text().split())
    assert set(data.reference.paths) <= clean
    assert not set(data.test.paths) & clean
    assert np.bincount(data.reference.labels).tolist() == [5] * 14
    assert not np.array_equal(data.reference.rows, _prepare(_load("clothing1m", root), seed=1).reference.rows)


def test_ilsvrc_folders_are_found_by_synset_and_else_by_order(tmp_path, miniatures):
    root = _miniature("webvision", tmp_path / "w")
    imagenet = _miniature("imagenet", tmp_path / "i", "--classes", "6")
    lines = [f"n{c:08d} class" for c in (6, 2, 3, 1)]
    (root / "info/synsets.txt").write_text("\n".join(lines))
    paths = _load("webvision", root, imagenet_root=str(imagenet)).evaluations["imagenet"]
    for path, label in zip(paths.paths, paths.labels, strict=True):
        assert _text(path).startswith(f"val/{lines[label].split()[0]}/")
    (root / "info/synsets.txt").unlink()
    with pytest.raises(UsageError, match=r"has 6 class folders where 4 or 1000 are wanted.* synsets.txt"):
        _load("webvision", root, imagenet_root=str(imagenet))
    with pytest.raises(UsageError, match=r"nowhere has no folder val"):
        _load("webvision", root, imagenet_root=str(tmp_path / "nowhere"))


def test_fewer_classes_are_the_first_ones(miniatures):
    for name in ("webvision", "imagenet", "tiny_imagenet"):
        whole, part = _load(name, miniatures / name), _load(name, miniatures / name, classes=2)
        assert part.classes == whole.classes[:2]
        assert set(part.train.paths) == set(whole.train.paths[whole.train.labels < 2])
        assert set(part.test.paths) == set(whole.test.paths[whole.test.labels < 2])
    with pytest.raises(UsageError, match=r"has 4 class folders where dataset.classes=5: type dataset.classes=4"):
        _load("imagenet", miniatures / "imagenet", classes=5)


# ---- mistakes --------------------------------------------------------------------------------------------

FIRST = {
    "webvision": r"google/q0000/000000\.jpg",
    "clothing1m": r"images/0/00/10,0\.jpg",
    "imagenet": r"train/n00000001/00000000\.JPEG",
    "tiny_imagenet": r"train/n00000001/images/n00000001_0\.JPEG",
    "parquet": r"row 0 of .*data/train-00000-of-00002\.parquet",
}
MISTAKES = [
    ("webvision", "missing", FIRST["webvision"] + r" cannot be read .*fetch it, or delete line 1 of .*google\.txt"),
    ("clothing1m", "missing", FIRST["clothing1m"] + r" cannot be read .*delete line 1 of .*train_key_list\.txt"),
    ("tiny_imagenet", "missing", r"val_0\.JPEG cannot be read .*delete line 1 of .*val_annotations\.txt"),
    ("webvision", "label", r"google\.txt, line 1, gives 'google/q0000/000000\.jpg' the label 9999 where 0 to 999"),
    ("clothing1m", "label", r"noisy_label_kv\.txt, line 1, gives .* the label 9999 where 0 to 13"),
    ("tiny_imagenet", "label", r"val_annotations\.txt, line 1, gives 'val_0\.JPEG' the label 'n99999999'"),
    ("webvision", "line", r"google\.txt, line 33, is 'half-a-line' where a path and a label are wanted"),
    ("clothing1m", "line", r"noisy_label_kv\.txt, line 113, is 'half-a-line' where"),
    ("tiny_imagenet", "line", r"val_annotations\.txt, line 73, is 'half-a-line' where"),
    ("webvision", "empty", r"class 0 in .*google\.txt has no image"),
    ("clothing1m", "empty", r"T-Shirt in .*key_list\.txt has no image"),
    ("imagenet", "empty", r"train/n00000001 has no image"),
    ("tiny_imagenet", "empty", r"train/n00000001/images has no image"),
    ("parquet", "empty", r"0 \(classes count from 0\) in .*parquet and its like has no image"),
]


@pytest.mark.parametrize("name", ["webvision", "clothing1m", "tiny_imagenet"])
def test_lists_may_begin_as_windows_writes_them(tmp_path, miniatures, name):
    root, whole = _miniature(name, tmp_path / "set"), _load(name, miniatures / name)
    for file in root.rglob("*.txt"):
        file.write_bytes(BOM_UTF8 + file.read_bytes())
    source = _load(name, root)
    assert (source.fingerprint, source.classes) == (whole.fingerprint, whole.classes)


@pytest.mark.parametrize(("name", "kind", "sentence"), MISTAKES)
def test_a_mistake_in_a_list_is_one_sentence_or_skipped(tmp_path, name, kind, sentence):
    root = _miniature(name, tmp_path / "set", "--broken", kind)
    with pytest.raises(UsageError, match=sentence) as error:
        _load(name, root)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("or type dataset.on_error=skip to train without such images")
    source = _load(name, root, "skip")
    assert any(re.search(sentence.split(r" .*fetch")[0].split(r" .*delete")[0], line) for line in source.skipped)
    whole = _load(name, _miniature(name, tmp_path / "whole"))
    lost = len(whole.train) + len(whole.test) - len(source.train) - len(source.test)
    noisy = {"webvision", "clothing1m"}
    expected = (whole.train.labels == 0).sum() if kind == "empty" else 0 if kind == "line" else 1
    assert lost == expected or (kind == "empty" and name in noisy)
    assert source.train.pixels(np.arange(len(source.train))).shape[1:] == (3, 24, 24)


TWICE = {
    "webvision": ("info/train_filelist_google.txt", "{0} {1}", "names '{0}', which line 2 names too"),
    "clothing1m": ("noisy_train_key_list.txt", "{0}", "names '{0}', which line 2 names too"),
    "tiny_imagenet": (
        "val/val_annotations.txt",
        "{0}\tn0000000{1}\t0\t0\t31\t31",
        "names 'val/images/{0}', which line 2 names too",
    ),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("other", [False, True], ids=["as before", "another label"])
def test_an_image_that_a_list_names_twice_is_named_with_both_lines_or_skipped(tmp_path, miniatures, name, other):
    root, (listed, line, sentence) = _miniature(name, tmp_path / "set"), TWICE[name]
    lines = (root / listed).read_text().splitlines()
    path, label, *_ = [*re.split(r"\s(?:n0+)?", lines[1]), "1"]
    again = line.format(path, int(label) % 4 + 1 if other else label)
    (root / listed).write_text("\n".join([*lines, again]) + "\n")
    said = f"{root / listed}, line {len(lines) + 1}, {sentence.format(path)}"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}: mend or delete it, or type dataset.on_error=skip"):
        _load(name, root)
    source = _load(name, root, "skip")
    assert source.skipped == (said,)
    assert source.fingerprint == _load(name, miniatures / name).fingerprint


def test_a_list_of_labels_may_say_one_again_but_not_another(tmp_path, miniatures):
    root, before = _miniature("clothing1m", tmp_path / "set"), _load("clothing1m", miniatures / "clothing1m")
    file = root / "noisy_label_kv.txt"
    lines = file.read_text().splitlines()
    path, label = lines[1].rsplit(" ", 1)
    file.write_text("\n".join([*lines, lines[1]]) + "\n")
    assert _load("clothing1m", root).fingerprint == before.fingerprint
    other = (int(label) + 1) % 14
    file.write_text("\n".join([*lines, f"{path} {other}"]) + "\n")
    said = f"{file}, line {len(lines) + 1}, gives '{path}' the label {other}, and line 2 the label {label}"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}: mend or delete it"):
        _load("clothing1m", root)
    source = _load("clothing1m", root, "skip")
    assert (source.skipped, source.fingerprint) == ((said,), before.fingerprint)


def test_an_image_may_have_a_noisy_and_a_clean_label(tmp_path):
    root = _miniature("clothing1m", tmp_path / "set")
    trained = (root / "noisy_train_key_list.txt").read_text().splitlines()[0]
    with (root / "clean_label_kv.txt").open("a") as labels, (root / "clean_train_key_list.txt").open("a") as keys:
        labels.write(f"{trained} 5\n")
        keys.write(f"{trained}\n")
    source = _load("clothing1m", root)
    assert _text(source.reference.paths[-1]) == _text(source.train.paths[0]) == trained
    assert source.reference.labels[-1] == 5


def test_a_label_beyond_the_names_that_the_hub_gives(tmp_path):
    root = _miniature("parquet", tmp_path / "set", "--broken", "label")
    file = root / "data/train-00000-of-00002.parquet"
    info = {"info": {"features": {"label": {"names": list("abcd"), "_type": "ClassLabel"}}}}
    pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": json.dumps(info)}), file)
    with pytest.raises(UsageError, match=r"row 0 of .*train-00000-of-00002.parquet has label 9999 where 0 to 3"):
        _load("parquet", root)
    source = _load("parquet", root, "skip")
    assert source.classes == ("a", "b", "c", "d")
    assert len(source.train) == 31


def test_all_shards_of_a_split_are_wanted_and_none_of_another(tmp_path, miniatures):
    root, whole = _miniature("parquet", tmp_path / "set") / "data", _load("parquet", miniatures / "parquet")
    first, second = (root / f"train-0000{shard}-of-00002.parquet" for shard in range(2))
    everything = pa.concat_tables([pq.read_table(first), pq.read_table(second)])
    pq.write_table(everything, root / "train-extra-00000-of-00001.parquet")
    assert _load("parquet", root.parent).fingerprint == whole.fingerprint
    assert len(_load("parquet", root.parent, train_split="train-extra").train) == len(everything)
    for name in ("train-more", "train-00001-of-00002-0123abcd", "train-00000-of-00001"):
        shutil.copy(first, root / f"{name}.parquet")
        with pytest.raises(UsageError, match=rf"data has .*{name}.parquet.*: move the others elsewhere$"):
            _load("parquet", root.parent)
        (root / f"{name}.parquet").unlink()
    second.unlink()
    said = f"{root} has {first.name} and lacks {second.name}: fetch that, or move the others elsewhere"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        _load("parquet", root.parent)
    first.unlink()
    with pytest.raises(UsageError, match=r"train_split=train has no train.parquet .* has test, train-extra$"):
        _load("parquet", root.parent)


def _labelled(file, labels):
    """Let a Parquet file have other labels."""
    pq.write_table(pq.read_table(file).set_column(1, "label", pa.array(labels)), file)


def test_labels_that_are_texts_are_those_of_training(tmp_path):
    root = _miniature("parquet", tmp_path / "set")
    for file in root.glob("data/*.parquet"):
        _labelled(file, [f"n{label}" for label in pq.read_table(file)["label"].to_pylist()])
    assert _load("parquet", root).classes == ("n0", "n1", "n2", "n3")
    test = root / "data/test-00000-of-00001.parquet"
    _labelled(test, ["bird", *pq.read_table(test)["label"].to_pylist()[1:]])
    with pytest.raises(UsageError, match=rf"row 0 of {test} has label bird where one of the classes is wanted: mend"):
        _load("parquet", root)
    _labelled(test, [0] * len(pq.read_table(test)))
    with pytest.raises(UsageError, match=rf"label holds texts in .*train-00000-of-00002.parquet and numbers in {test}"):
        _load("parquet", root)


@pytest.mark.parametrize("kind", ["large", "view", "dictionary"])
def test_labels_and_images_are_the_same_in_whatever_types_they_are_written(tmp_path, kind):
    root = _miniature("parquet", tmp_path / "set")
    for file in root.glob("data/*.parquet"):
        _labelled(file, [f"n{label}" for label in pq.read_table(file)["label"].to_pylist()])
    whole = _load("parquet", root)
    texts, encoded = {
        "large": (pa.large_string(), pa.large_binary()),
        "view": (pa.string_view(), pa.binary_view()),
        "dictionary": (pa.dictionary(pa.int32(), pa.string()), pa.binary()),
    }[kind]
    for file in root.glob("data/*.parquet"):
        table = pq.read_table(file)
        labels, images = table["label"].to_pylist(), table["image"].to_pylist()
        images = pa.array(images, pa.struct({"bytes": encoded, "path": pa.string()}))
        pq.write_table(pa.table({"label": pa.array(labels, texts), "image": images}), file)
    found = _load("parquet", root)
    assert (found.fingerprint, found.classes) == (whole.fingerprint, whole.classes)
    for ours, theirs in ((found.train, whole.train), (found.test, whole.test)):
        assert (ours.labels == theirs.labels).all()
        assert ours.pixels(np.arange(len(ours))).equal(theirs.pixels(np.arange(len(theirs))))


def test_a_column_of_labels_or_images_that_is_another_is_named(tmp_path):
    root = _miniature("parquet", tmp_path / "set")
    train = sorted(root.glob("data/train-*.parquet"))
    whole, choose = [pq.read_table(file) for file in train], "type another dataset.image_column or dataset.label_column"
    for most in (32, 10**15):
        _labelled(train[0], [*range(15), most])
        said = f"the column label of {train[0]} and its like has numbers up to {most} in 32 rows, which are no classes"
        with pytest.raises(UsageError, match=f"^{said}: {choose}$"):
            _load("parquet", root, "skip")
    _labelled(train[0], [None, *range(15)])
    with pytest.raises(UsageError, match=rf"row 0 of {train[0]} has no label: mend or replace that file"):
        _load("parquet", root)
    for file, table in zip(train, whole, strict=True):
        pq.write_table(table, file)
        _labelled(file, [label + 1 for label in table["label"].to_pylist()])
    with pytest.raises(UsageError, match=rf"^0 \(classes count from 0\) in {train[0]} and its like has no image"):
        _load("parquet", root)
    for kind in (pa.int64(), pa.string(), pa.list_(pa.int64())):
        images = pa.array([{"bytes": None}] * 16, pa.struct({"bytes": kind}))
        pq.write_table(whole[0].set_column(0, "image", images), train[0])
        with pytest.raises(UsageError, match=rf"image of {train[0]} holds struct.* binary bytes are wanted: {choose}$"):
            _load("parquet", root)
    paths = pa.array([{"bytes": None, "path": "0.png"}] * 16, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(whole[0].set_column(0, "image", paths), train[0])
    with pytest.raises(UsageError, match=rf"image of {train[0]} has no bytes of an image: write it with these"):
        _load("parquet", root, "skip")


def test_images_of_one_class_alone_are_refused_whatever_is_skipped(tmp_path):
    root = _miniature("parquet", tmp_path / "set")
    for file in root.glob("data/*.parquet"):
        _labelled(file, [0] * len(pq.read_table(file)))
    with pytest.raises(UsageError, match=r"dataset=parquet has training images of 0 alone, where 2 classes or more"):
        _load("parquet", root)
    root = _miniature("imagenet", tmp_path / "other")
    for image in root.glob("train/*/*"):
        image.write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"dataset=imagenet has training images of no class alone, where 2 classes"):
        _load("imagenet", root, "skip")


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_image_is_named_or_skipped_for_good(tmp_path, name):
    root = _miniature(name, tmp_path / "set", "--broken", "truncated")
    source = _load(name, root)
    everything = np.arange(len(source.train))
    sentence = FIRST[name] + r" cannot be read as an image \(.*\): replace or delete it, or type dataset.on_error=skip"
    with pytest.raises(UsageError, match=sentence):
        source.train.pixels(everything)
    skipping = _load(name, root, "skip")
    (line,) = skipping.skipped
    assert re.search(FIRST[name] + r" cannot be read as an image \(.*\)$", line)
    assert set(source.train.paths) - set(skipping.train.paths) == {source.train.paths[0]}
    assert len(skipping.train) == len(source.train) - 1
    skipping.train.pixels(everything[:-1])
    assert skipping.fingerprint != source.fingerprint


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["cmyk", "16bit"])
def test_print_colours_and_sixteen_bits_are_converted(tmp_path, name, kind):
    plain = _load(name, _miniature(name, tmp_path / "plain")).train.pixels(np.arange(1))[0].float()
    source = _load(name, _miniature(name, tmp_path / "set", "--broken", kind), "skip")
    assert source.skipped == ()
    ours = source.train.pixels(np.arange(1))[0].float()
    if kind == "16bit":
        plain = (plain * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).expand(3, -1, -1)
    assert (ours - plain).abs().mean() < 3
    assert ours.std() > 10


def test_what_a_layout_lacks_is_named(tmp_path, miniatures):
    for name in NAMES:
        with pytest.raises(UsageError, match=rf"dataset={name} needs its folder: type dataset.root=FOLDER"):
            DATASETS[name](name=name, root=None, on_error="stop", **OPTIONS[name], **CUT).open()
        (tmp_path / name).mkdir()
        with pytest.raises(UsageError, match=rf"{tmp_path / name}"):
            _load(name, tmp_path / name)
    root = _miniature("imagenet", tmp_path / "flat")
    for file in root.glob("val/*/*"):
        file.replace(root / "val" / file.name)
    for folder in [path for path in root.glob("val/*") if path.is_dir()]:
        folder.rmdir()
    with pytest.raises(UsageError, match=r"flat/val has no class folders: sort its images into val/<wnid>/"):
        _load("imagenet", root)
    with pytest.raises(UsageError, match=r"parquet has no column img, but image, label: type .*image_column"):
        _load("parquet", miniatures / "parquet", image_column="img")
    with pytest.raises(UsageError, match=r"test_split are both train: type another to evaluate on"):
        _load("parquet", miniatures / "parquet", test_split="train")
    shards = _miniature("parquet", tmp_path / "shards")
    (shards / "data/._train-0.parquet").touch()  # as macOS leaves beside a file
    with pytest.raises(UsageError, match=r"test_split=validation has no .*the folder has test, train$"):
        _load("parquet", shards, test_split="validation")


def test_a_list_that_is_a_folder_a_folder_that_is_called_an_image_and_a_root_in_braces(tmp_path):
    root = _miniature("tiny_imagenet", tmp_path / "{}", "--broken", "empty")
    with pytest.raises(UsageError, match=r"\{\}/train/n00000001/images has no image: add images"):
        _load("tiny_imagenet", root)
    root = _miniature("tiny_imagenet", tmp_path / "{name}")
    before = _load("tiny_imagenet", root).fingerprint
    (root / "train/n00000001/images/folder.JPEG").mkdir()
    assert _load("tiny_imagenet", root).fingerprint == before
    file = root / "val/val_annotations.txt"
    file.unlink()
    file.mkdir()
    with pytest.raises(UsageError, match=r"val_annotations.txt cannot be read \(Is a directory\): put it there"):
        _load("tiny_imagenet", root)


# ---- the index -------------------------------------------------------------------------------------------


def _aged(root):
    for path in [root, *root.rglob("*")]:
        os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A miniature that has been left alone for long, the folder of its index, and how often it was made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []
    survey = layout.Survey
    monkeypatch.setattr(layout, "Survey", lambda root, on_error: made.append(on_error) or survey(root, on_error))
    return tmp_path / "cache" / "alignprune-exp" / "index", made


@pytest.mark.parametrize("name", NAMES)
def test_an_index_is_made_once_and_again_when_the_folder_has_changed(tmp_path, kept, name):
    root = _miniature(name, tmp_path / "set")
    _, made = kept
    _aged(root)
    first = _load(name, root)
    again = _load(name, root)
    assert len(made) == 1
    assert (first.fingerprint, first.classes) == (again.fingerprint, again.classes)
    for ours, theirs in ((first.train, again.train), (first.test, again.test)):
        np.testing.assert_array_equal(ours.paths, theirs.paths)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    if name in ("imagenet", "tiny_imagenet"):
        image = next(root.glob("train/**/*.JPEG"))
        image.with_name("new.JPEG").write_bytes(image.read_bytes())
    elif name == "parquet":
        file = root / "data/test-00000-of-00001.parquet"
        pq.write_table(pq.read_table(file)[:-1], file)
    else:
        file = root / {"webvision": "info/val_filelist.txt", "clothing1m": "clean_test_key_list.txt"}[name]
        file.write_text("".join(file.read_text().splitlines(True)[:-1]))
    changed = _load(name, root)
    assert len(made) == 2
    assert changed.fingerprint != first.fingerprint
    assert len(changed.train) + len(changed.test) != len(first.train) + len(first.test)


@pytest.mark.parametrize("name", ["imagenet", "webvision"])
def test_a_relative_folder_is_that_of_where_one_is(tmp_path, kept, monkeypatch, name):
    _, made = kept
    for place, train in (("here", "8"), ("there", "6")):
        for each in {name, "imagenet"}:
            _miniature(each, tmp_path / place / each, "--train", train)
        _aged(tmp_path / place)
    elsewhere, found = ["imagenet_root"] if name == "webvision" else [], []
    for place in ("here", "there", "here", "there"):
        monkeypatch.chdir(tmp_path / place)
        source = _load(name, name, **dict.fromkeys(elsewhere, "imagenet"))
        found.append(len(source.train))
        monkeypatch.chdir(tmp_path)
        for images in (source.train, *source.evaluations.values()):
            images.pixels(np.arange(len(images)))
        again = _load(name, tmp_path / place / name, **dict.fromkeys(elsewhere, f"{place}/imagenet"))
        assert again.fingerprint == source.fingerprint
    assert found == [32, 24, 32, 24]
    assert len(made) == 2  # one of each place, however it is called


def test_a_folder_that_comes_later_is_noticed(tmp_path, kept):
    root = _miniature("clothing1m", tmp_path / "set")
    folder = next((root / "images").iterdir())
    folder.rename(tmp_path / "not yet there")
    _aged(root)
    before = _load("clothing1m", root, "skip")
    assert before.skipped
    (tmp_path / "not yet there").rename(folder)
    after = _load("clothing1m", root, "skip")
    assert after.skipped == ()
    assert len(after.train) > len(before.train)


def test_synsets_that_come_later_are_noticed(tmp_path, kept):
    root = _miniature("webvision", tmp_path / "set")
    synsets = root / "info/synsets.txt"
    synsets.unlink(missing_ok=True)
    _aged(root)
    assert _load("webvision", root).classes[0] == "class 0"
    synsets.write_text("n00000009 heron\nn00000002 tench\nn3 a\nn4 b\n")
    assert _load("webvision", root).classes[0] == "heron"


def test_parquet_is_in_memory_before_there_are_other_processes(tmp_path, kept, monkeypatch):
    root = _miniature("parquet", tmp_path / "set")
    _aged(root)
    for _ in range(2):  # the second time from the index
        source = _load("parquet", root)
        monkeypatch.setattr(pq, "read_table", None)  # whoever reads again fails
        assert source.train.store.read(0).ndim == 3
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_image_that_goes_is_noticed(tmp_path, kept):
    root = _miniature("webvision", tmp_path / "set")
    _aged(root)
    before = len(_load("webvision", root, "skip").train)
    next(root.glob("google/*/*.jpg")).unlink()
    assert len(_load("webvision", root, "skip").train) == before - 1


def test_a_folder_that_has_just_changed_is_looked_at_again(tmp_path, kept):
    root = _miniature("imagenet", tmp_path / "set")
    folder, made = kept
    for _ in range(2):
        _load("imagenet", root)
    assert len(made) == 2
    assert not folder.exists()


def test_a_damaged_foreign_or_unwritable_cache_costs_only_time(tmp_path, kept, monkeypatch):
    root = _miniature("imagenet", tmp_path / "set")
    folder, made = kept
    _aged(root)
    print_ = _load("imagenet", root).fingerprint
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    pickled = io.BytesIO()
    np.savez(pickled, facts=np.array([{"stamps": {}}], dtype=object))
    for content in (b"", whole[:1000], whole[: len(whole) // 2], pickle.dumps([1]), pickled.getvalue()):
        file.write_bytes(content)
        assert _load("imagenet", root).fingerprint == print_
        assert file.read_bytes() == whole  # made again
    assert len(made) == 6
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert _load("imagenet", root).fingerprint == print_


def test_what_was_skipped_is_remembered(tmp_path, kept):
    root = _miniature("imagenet", tmp_path / "set", "--broken", "truncated")
    _aged(root)
    first, again = (_load("imagenet", root, "skip") for _ in range(2))
    assert kept[1] == ["skip"]
    assert first.skipped == again.skipped
    assert len(first.skipped) == 1
    assert len(_load("imagenet", root).train) == len(first.train) + 1  # stop has an index of its own


def test_the_fingerprint_is_of_paths_sizes_and_labels(tmp_path):
    root = _miniature("webvision", tmp_path / "set")
    prints = [_load("webvision", root).fingerprint]
    moved = (root).rename(tmp_path / "elsewhere")
    assert _load("webvision", moved).fingerprint == prints[0]
    image = next(moved.glob("google/*/*.jpg"))
    image.write_bytes(image.read_bytes() + b"\0")
    prints.append(_load("webvision", moved).fingerprint)
    file = moved / "info/train_filelist_google.txt"
    path, label = file.read_text().splitlines()[0].split()
    file.write_text(file.read_text().replace(f"{path} {label}", f"{path} {(int(label) + 1) % 4}", 1))
    prints.append(_load("webvision", moved).fingerprint)
    assert len(set(prints)) == 3


def test_nothing_grows_with_the_set_but_arrays(miniatures):
    for name in ("webvision", "imagenet"):
        images = _load(name, miniatures / name).train
        known = len(pickle.dumps(images.paths)) + len(pickle.dumps(images.labels))
        assert len(pickle.dumps(images)) < 2 * known + 2000
        assert all(isinstance(value, np.ndarray | Path | Cut) for value in vars(images.store).values())


# ---- crops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (200, 200), (640, 160)])
@pytest.mark.parametrize("area", [0.08, 0.5])
def test_crops_have_the_distribution_of_torchvisions(size, area):
    width, height = size
    n = 3000
    draws = Augmentation(3, flip=False, crop=0, cuts=True).uniforms(torch.arange(n), 2)
    ours = np.array([resized_crop(width, height, each, area, 0.75) for each in draws], float)
    torch.manual_seed(5)
    image = torch.empty(1, height, width)
    boxes = [transforms.RandomResizedCrop.get_params(image, [area, 1.0], [0.75, 4 / 3]) for _ in range(n)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in boxes], float)
    for facts in (ours, theirs):
        assert (facts[:, 0] + facts[:, 2] <= width).all()
        assert (facts[:, 1] + facts[:, 3] <= height).all()
        assert (facts >= [0, 0, 1, 1]).all()
    for of in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > CHANCE


@pytest.mark.parametrize(("width", "height"), [(4000, 10), (10, 4000), (1, 1), (1000, 9)])
def test_a_crop_that_fits_nowhere_is_torchvisions_central_one(width, height):
    draws = np.full((ATTEMPTS, 4), 0.999)
    top, left, h, w = transforms.RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [0.75, 4 / 3])
    assert resized_crop(width, height, draws, 1.0, 0.75) == (left, top, w, h)


def test_draws_are_uniform_and_independent():
    draws = Augmentation(1, flip=True, crop=0, cuts=True).uniforms(torch.arange(2000), 0)
    assert draws.shape == (2000, ATTEMPTS, 4)
    assert stats.kstest(draws.ravel(), "uniform").pvalue > CHANCE
    correlations = np.corrcoef(draws.reshape(2000, -1).T) - np.eye(4 * ATTEMPTS)
    assert abs(correlations).max() < 6 / math.sqrt(2000)
    _, _, flips = Augmentation(1, flip=True, crop=0).draw(torch.arange(2000), 0)
    assert abs(np.corrcoef(flips, draws[:, 0, 0])[0, 1]) < 5 / math.sqrt(2000)


def test_a_view_is_what_torchvision_cuts_there():
    cut = Cut(**CUT)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    for draws in Augmentation(0, flip=False, crop=0, cuts=True).uniforms(torch.arange(20), 0):
        left, top, w, h = resized_crop(90, 60, draws, 0.08, 0.75)
        theirs = F.resized_crop(image, top, left, h, w, [24, 24], antialias=True)
        np.testing.assert_array_equal(np.asarray(cut.view(image, draws)), np.asarray(theirs))


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparent_colours_is_read_as_its_colours():
    buffer, values = io.BytesIO(), np.random.default_rng(0).integers(0, 4, (6, 9), np.uint8)
    palette = np.arange(12, dtype=np.uint8).reshape(4, 3) * 20
    image = Image.fromarray(values, "P")
    image.putpalette(palette.ravel().tolist())
    image.save(buffer, "PNG", transparency=bytes([0, 128, 255, 7]))
    np.testing.assert_array_equal(np.asarray(rgb(Image.open(buffer))), palette[values])


def test_a_large_jpeg_is_decoded_at_less_than_its_size_and_looks_the_same():
    y, x = np.mgrid[:960, :1280] / 960
    smooth = 127 + 120 * np.stack([np.sin(5 * x), np.cos(7 * y), np.sin(4 * x * y)], -1)
    buffer = io.BytesIO()
    Image.fromarray(smooth.astype(np.uint8)).save(buffer, "JPEG", quality=95)
    whole = Augmentation(0, flip=False, crop=0, cuts=True).uniforms(torch.arange(30), 0)
    decoded = set()
    for draws in whole:
        opened = Image.open(buffer)
        left, top, w, h = resized_crop(1280, 960, draws, 0.08, 0.75)
        ours = np.asarray(Cut(**CUT).view(opened, draws), float)
        decoded.add(opened.size[0])
        theirs = F.resized_crop(Image.open(buffer), top, left, h, w, [24, 24], antialias=True)
        assert abs(ours - np.asarray(theirs, float)).mean() < 2.5
        assert min(w * opened.size[0] / 1280, h * opened.size[1] / 960) >= 23
    assert min(decoded) == 160


def _batches(data, **changes):
    plain = {"batch_size": 6, "device": "cpu", "mean": data.mean, "std": data.std, "seed": 1}
    return ImageBatches(data.train, **(plain | {"train": True, "flip": True, "crop": 0} | changes))


def _by_sample(batches):
    return {int(i): x for index, images, _ in batches for i, x in zip(index, images, strict=True)}


@pytest.mark.parametrize("name", ["webvision", "parquet"])
def test_a_samples_view_depends_on_seed_epoch_and_sample_alone(miniatures, name):
    data = _prepare(_load(name, miniatures / name), reference_size=0.0)
    assert data.train.images is None
    assert data.test.images is not None
    order = torch.arange(20)
    first = _by_sample(_batches(data).epoch(order, 3))
    others = [
        _batches(data).epoch(order.flip(0), 3),
        _batches(data, batch_size=13).epoch(torch.randperm(20), 3),
        _batches(data, workers=2).epoch(order, 3),
    ]
    for other in map(_by_sample, others):
        assert all(torch.equal(first[i], other[i]) for i in range(20))
    later = _batches(data).epoch(order, 3, start=2)
    assert all(torch.equal(first[i], x) for i, x in _by_sample(later).items())
    for other in (_batches(data).epoch(order, 4), _batches(data, seed=2).epoch(order, 3)):
        assert not any(torch.equal(first[i], x) for i, x in _by_sample(other).items())
    plain = _by_sample(_batches(data).evaluation())
    held = (data.train.source.pixels(np.arange(20)).double() / 255 - torch.tensor(data.mean)[:, None, None]) / (
        torch.tensor(data.std)[:, None, None]
    )
    torch.testing.assert_close(torch.stack([plain[i] for i in range(20)]).double(), held, atol=1e-5, rtol=1e-5)


def test_pruned_files_are_never_opened(tmp_path):
    root = _miniature("imagenet", tmp_path / "set")
    data = _prepare(_load("imagenet", root))
    kept = np.arange(0, len(data.train), 3)
    for sample in np.setdiff1d(np.arange(len(data.train)), kept):
        (root / data.train.paths[sample]).unlink()
    batches = _batches(data, workers=1)
    assert set(_by_sample(batches.epoch(kept, 0))) == set(kept.tolist())
    with pytest.raises(UsageError, match=r"cannot be read as an image"):
        list(batches.epoch(np.arange(6), 0))


# ---- configs ---------------------------------------------------------------------------------------------


def _flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", NAMES)
def test_smoke_differs_from_paper_in_what_its_recipe_lists(name):
    at = {scale: composed(f"dataset={name}", "dataset.root=/d", f"scale={scale}") for scale in ("smoke", "paper")}
    smoke, paper = (dict(_flat(at[scale].model_dump())) for scale in ("smoke", "paper"))
    listed = yaml.safe_load((config_dir() / "recipe" / f"{name}_smoke.yaml").read_text())
    del listed["defaults"]
    weights = {"model.weights"} if name == "clothing1m" else set()
    assert {key for key in smoke if smoke[key] != paper[key]} == {"scale", *dict(_flat(listed)), *weights}
    sizes = {"dataset.classes", "dataset.image_size", "dataset.subset", "dataset.test_subset", "epochs"}
    assert set(dict(_flat(listed))) <= sizes
    assert at["paper"].model.name == "resnet50"
    assert at["smoke"].dataset.image_size // (4 if at["smoke"].model.stem == "large" else 1) == 16  # of the first maps


def test_smoke_scale_fetches_no_weights_unless_they_are_asked_for():
    clothing = ("dataset=clothing1m", "dataset.root=/d")
    assert composed(*clothing, "scale=paper").model.weights == "imagenet"
    assert composed(*clothing, "scale=smoke").model.weights == "none"
    assert composed(*clothing, "scale=smoke", "model.weights=imagenet").model.weights == "imagenet"
    assert composed(*clothing, "scale=smoke", "model=small_cnn").model.name == "small_cnn"


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_wins_over_what_a_data_set_chooses(name):
    dataset = [f"dataset={name}", "dataset.root=/d"]
    assert composed(*dataset).noise.name == "real"
    chosen = composed("noise=sym0.5", *dataset, "model=resnet8", "optimizer=lars", "reference=none", "scale=paper")
    assert (chosen.noise.rate, chosen.model.name, chosen.optimizer.name) == (0.5, "resnet8", "lars")
    assert chosen.reference.size == 0
    assert (chosen.dataset.subset, chosen.scale) == (None, "paper")


def test_paths_and_what_to_do_with_mistakes_are_not_of_the_id():
    base = ["dataset=webvision", "dataset.root=/d"]
    plain = identity(composed(*base), "0")
    for change in ("dataset.imagenet_root=/i", "dataset.on_error=skip", "dataset.root=/e", "noise=clean"):
        assert identity(composed(*base, change), "0") == plain
    for change in ("dataset.classes=3", "dataset.area=0.1", "reference.per_class=false", "model.weights=imagenet"):
        assert identity(composed(*base, change), "0") != plain


def test_a_published_record_says_nothing_of_either_folder():
    config = composed("dataset=webvision", "dataset.root=/home/me/w", "dataset.imagenet_root=/home/me/i").model_dump()
    assert "/home" not in json.dumps(scrubbed_config(config))
    for node, key in (path.split(".") for path in PATHS):
        published = scrubbed_config({**config, node: {**config[node], key: "/home/me/x"}})
        assert published[node][key] is None
        assert "/home" not in json.dumps(published)
    command = scrubbed_command("python -m alignprune_exp.train dataset.root=here dataset.imagenet_root=there seed=1")
    assert command.endswith("dataset.root=DIR dataset.imagenet_root=DIR seed=1")


# ---- torchvision's weights -------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Let torchvision's weights of a ResNet be a file of our own; return its place, its content and its address."""
    import torchvision.models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"

    def publish(name):
        torch.manual_seed(1)
        buffer = io.BytesIO()
        state = getattr(torchvision.models, name)().state_dict()
        torch.save(state, buffer)
        file = tmp_path / f"{name}-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.pth"
        file.write_bytes(buffer.getvalue())
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        monkeypatch.setattr(weights.value, "url", file.as_uri())
        return file, cache / file.name, state

    return publish


def _resnet(weights="imagenet", stem="large", norm="batch"):
    return MODEL.read({"name": "resnet18", "stem": stem, "weights": weights, "norm": norm})


def test_weights_are_fetched_checked_and_get_a_new_head(published):
    file, cached, state = published("resnet18")
    torch.manual_seed(0)
    ours = MODEL.make(_resnet(), 3, 7).state_dict()
    assert cached.read_bytes() == file.read_bytes()
    assert ours["fc.weight"].shape == (7, 512)
    assert all(torch.equal(ours[key], state[key]) for key in state if not key.startswith("fc."))
    torch.manual_seed(0)
    assert torch.equal(MODEL.make(_resnet("none"), 3, 7).state_dict()["fc.weight"], ours["fc.weight"])
    file.unlink()  # from the cache, without a network
    assert torch.equal(MODEL.make(_resnet(), 3, 7).state_dict()["conv1.weight"], state["conv1.weight"])


def test_weights_that_cannot_be_had_are_one_sentence(published):
    file, cached, _ = published("resnet18")
    where = rf"put {file.name} from .* into {cached.parent}, or set model.weights=none"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    with pytest.raises(UsageError, match=rf"cannot be had \(invalid hash value.*\): {where}"):
        MODEL.make(_resnet(), 3, 7)
    assert not cached.exists()
    file.unlink()
    with pytest.raises(UsageError, match=rf"weights of resnet18 cannot be had \(.*No such file.*\): {where}"):
        MODEL.make(_resnet(), 3, 7)
    cached.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=rf"{cached} is damaged, since its sha256 does not begin .*: {where}"):
        MODEL.make(_resnet(), 3, 7)
    for bad in (_resnet(stem="small"), _resnet(norm="group")):
        with pytest.raises(UsageError, match=r"model.weights=imagenet fits colour images, model.stem=large"):
            MODEL.make(bad, 3, 7)


# ---- the script ------------------------------------------------------------------------------------------


def test_the_script_says_what_is_wrong_and_leaves_what_is_there(tmp_path, capsys):
    def said(*arguments):
        assert make_miniature.main([*map(str, arguments)]) == 2
        return capsys.readouterr().err

    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    assert "full is not an empty folder" in said("imagenet", tmp_path / "full")
    assert (tmp_path / "full/mine").read_text() == "mine"
    assert "invalid choice: 'cifar'" in said("cifar", tmp_path / "new")
    assert "clothing1m always has 14" in said("clothing1m", tmp_path / "new", "--classes", "3")
    assert "--broken line does not fit imagenet" in said("imagenet", tmp_path / "new", "--broken", "line")
    assert "--broken label does not fit imagenet" in said("imagenet", tmp_path / "new", "--broken", "label")
    assert "give --source CIFAR's folder" in said("imagenet", tmp_path / "new", "--source", tmp_path)
    assert "--test 1 is too small" in said("imagenet", tmp_path / "new", "--test", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_bytes(tmp_path, miniatures, name):
    (tmp_path / "empty").mkdir()
    again = _miniature(name, tmp_path / "empty")
    files = [{str(p.relative_to(r)): p.read_bytes() for r in [root] for p in root.rglob("*") if p.is_file()}
             for root in (miniatures / name, again)]  # fmt: skip
    assert files[0] == files[1]


# ---- runs ------------------------------------------------------------------------------------------------


QUICK = ("model=small_cnn", "optimizer.lr=0.01", "workers=1", "threads=1", "dataset.image_size=24")


def _train(tmp_path, *arguments):
    return launch(tmp_path / "results", *arguments, base=QUICK)


def _record(tmp_path):
    folder = only_run(tmp_path / "results")
    return folder, summary_of(folder), rows_of(folder)


def test_a_run_on_webvision_from_its_config_to_its_report(tmp_path, miniatures):
    dataset = ["dataset=webvision", f"paths.data={miniatures}", f"dataset.imagenet_root={miniatures / 'imagenet'}"]
    assert _train(tmp_path, *dataset, "method=infobatch_das") == 0
    folder, summary, rows = _record(tmp_path)
    assert summary["noise"] == "real"
    assert summary["noise_rate"] is summary["kept_noise_mean"] is summary["detection_auroc_last"] is None
    assert {row["ranked_by"] for row in rows} == {"loss", "das", None}
    assert all(row["auroc_das"] is None and row["kept_noise"] is None for row in rows)
    on_imagenet = [row["test_accuracy_imagenet"] for row in rows]
    assert all(0 <= value <= 100 for value in on_imagenet)
    assert summary["test_accuracy_imagenet_final"] == on_imagenet[-1]
    assert summary["test_accuracy_imagenet_best"] == max(on_imagenet)
    assert not (folder / "skipped.txt").exists()
    samples = read_samples(folder)
    assert samples["path"].str.match(r"google/q\d{4}/\d{6}\.jpg").all()
    assert samples["clean_label"].isna().all()
    sheet = tmp_path / "sheet.png"
    assert suspects.main([str(folder), "--top", "5", "--sheet", str(sheet), "--out", str(tmp_path / "s.csv")]) == 0
    assert Image.open(sheet).size[0] > 200
    assert "clean_label" not in (tmp_path / "s.csv").read_text()
    (tmp_path / "own/suite").mkdir(parents=True)
    own = (config_dir() / "suite/webvision.yaml").read_text().replace("name: webvision", "name: own")
    axes = "      model: small_cnn\n      optimizer.lr: 0.01\n      threads: 1\n      dataset.image_size: 24\n"
    (tmp_path / "own/suite/own.yaml").write_text(own + axes)
    suite = load_suite("own", ["scale=smoke"], tmp_path / "own")
    made = make_table(suite, "smoke", read_records([tmp_path / "results"]))
    report = page([made], save_all([made], tmp_path), {made.name: report_sheet(folder, miniatures)})
    table = markdown(made)
    assert summary["id"] in report
    assert f"{summary['test_accuracy_final']:.1f}" in table
    assert summary["id"] in table
    assert "nan" not in table.lower()


@pytest.mark.parametrize("name", ["clothing1m", "imagenet", "tiny_imagenet"])
def test_a_run_on_the_others(tmp_path, miniatures, name):
    subset = "dataset.subset=28" if name == "clothing1m" else "dataset.subset=30"
    dataset = [f"dataset={name}", f"paths.data={miniatures}", subset, "reference=per_class", "reference.size=2"]
    assert _train(tmp_path, *dataset, "method=seta_das", "noise=sym0.5" if name == "imagenet" else "seed=1") == 0
    _, summary, rows = _record(tmp_path)
    assert summary["status"] == "finished"
    assert len(rows) == 13
    assert summary["noise_rate"] == {"clothing1m": None, "imagenet": 0.5, "tiny_imagenet": 0.0}[name]


def test_a_run_is_the_same_bits_with_any_number_of_workers(tmp_path, miniatures):
    rows = []
    for workers in (0, 2):
        dataset = ["dataset=imagenet", f"paths.data={miniatures}", "dataset.subset=30", "reference=per_class"]
        assert _train(tmp_path / str(workers), *dataset, "reference.size=2", f"workers={workers}") == 0
        rows.append(metrics_of(only_run(tmp_path / str(workers) / "results")))
    assert rows[0] == rows[1]


def test_a_signal_to_all_processes_of_a_run_leaves_a_checkpoint_and_one_sentence(tmp_path, miniatures):
    arguments = ["dataset=webvision", f"dataset.root={miniatures / 'webvision'}", "model=small_cnn", "workers=2"]
    arguments += ["dataset.image_size=24", "epochs=2000", "eval_every=2000", f"paths.results={tmp_path}"]
    with subprocess.Popen(
        [sys.executable, "-m", "alignprune_exp.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert any(line.startswith("epoch ") for line in process.stdout)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert len(err.splitlines()) == 1
    assert "left a checkpoint" in err


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_turns_bad_in_mid_training_ends_the_run_which_goes_on_with_it_as_it_was(
    tmp_path, monkeypatch, capsys, workers
):
    root = _miniature("imagenet", tmp_path / "set")
    dataset = ["dataset=imagenet", f"dataset.root={root}", "dataset.subset=null", "reference=none", "score=loss"]
    line = [*dataset, f"workers={workers}"]
    assert _train(tmp_path / "undisturbed", *line) == 0
    whole = {path: path.read_bytes() for path in root.glob("train/*/*.JPEG")}
    losses = CrossEntropy.losses

    def disturbed(self, step, forward):
        if step.epoch == 3:
            for path, content in whole.items():
                path.write_bytes(content[: len(content) // 2])
        return losses(self, step, forward)

    with monkeypatch.context() as patch:
        patch.setattr(CrossEntropy, "losses", disturbed)
        assert _train(tmp_path, *line) == 1
    error = sentence_of(capsys.readouterr().err)
    assert re.search(r"^run \w+ ended in epoch [34], step \d+: /\S*JPEG cannot be read as an image", error)
    assert "type dataset.on_error=skip" in error
    assert "with the images as they were, the same command goes on from the latest checkpoint" in error
    for path, content in whole.items():
        path.write_bytes(content)
    assert _train(tmp_path, *line) == 0
    assert_same_results(*(only_run(path / "results") for path in (tmp_path, tmp_path / "undisturbed")))


def test_names_that_are_not_of_utf8_are_trained_on_and_recorded(tmp_path):
    root = _miniature("imagenet", tmp_path / "set")
    for split in ("train", "val"):
        first = min((root / split).iterdir())
        odd = os.fsencode(root / split) + b"/n\xff"
        os.rename(first, odd)
        image = min(os.listdir(odd))
        os.rename(odd + b"/" + image, odd + b"/\xe9t\xc3\xa9.JPEG")
    (root / "train" / os.fsdecode(b"n\xff") / os.fsdecode(b"broken\xfe.JPEG")).write_bytes(b"no image")
    dataset = ["dataset=imagenet", f"dataset.root={root}", "dataset.subset=null", "reference=none", "score=loss"]
    assert _train(tmp_path, *dataset, "dataset.on_error=skip") == 0
    folder, summary, _ = _record(tmp_path)
    assert summary["skipped"] == 1
    assert "n\\xff/broken\\xfe.JPEG" in (folder / "skipped.txt").read_text()
    paths = read_samples(folder)["path"]
    assert paths.is_unique
    assert "train/n\\xff/\\xe9té.JPEG" in set(paths)
    assert _load("imagenet", root, "skip").classes[-1] == "n\\xff"


def test_an_image_worker_that_dies_ends_the_run_with_one_sentence(tmp_path, miniatures, monkeypatch, capsys):
    def out_of_memory(self, image, draws):
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Cut, "view", out_of_memory)
    assert _train(tmp_path, "dataset=webvision", f"paths.data={miniatures}") == 1
    error = sentence_of(capsys.readouterr().err)
    assert "set fewer workers, and the same command goes on" in error


def test_a_run_trains_on_and_lists_what_was_skipped(tmp_path, capsys):
    root = _miniature("parquet", tmp_path / "set", "--broken", "truncated")
    dataset = ["dataset=parquet", f"dataset.root={root}", "dataset.subset=null", "reference=none", "method=infobatch"]
    assert _train(tmp_path, *dataset) == 1
    sentence = capsys.readouterr().err
    assert re.search(FIRST["parquet"] + r" cannot be read as an image \(.*\): replace or delete it, or type", sentence)
    assert sentence.count("\n") == 1
    assert _train(tmp_path, *dataset, "dataset.on_error=skip") == 0
    said = capsys.readouterr().out
    folder = next(path.parent for path in (tmp_path / "results/runs").glob("*/skipped.txt"))
    assert re.search(rf"skipped 1 images or lines, as listed in {folder}/skipped.txt", said)
    assert (folder / "skipped.txt").read_text().count("\n") == 1
    assert json.loads((folder / "summary.json").read_text())["skipped"] == 1


@pytest.mark.suites
@pytest.mark.parametrize("suite", ["webvision", "clothing1m", "imagenet"])
def test_every_suite_runs_at_smoke_scale_with_a_narrow_network_and_fills_its_table(tmp_path, suite):
    assert make_miniature.main([suite, str(tmp_path / "data" / suite)]) == 0
    line = [f"suite={suite}", "scale=smoke", "model=resnet8", "optimizer=sgd", f"paths.data={tmp_path / 'data'}"]
    line += ["noise=sym0.5"] if suite == "imagenet" else []
    assert main([*line, f"paths.results={tmp_path}"]) == 0
    table = make_table(load_suite(suite, line[1:]), "smoke", read_records([tmp_path]))
    assert len(table.rows) == 5
    assert not any(table.runs(row, column).empty for row in table.rows for column in table.columns)


@pytest.mark.suites
def test_a_run_of_clothing1m_as_its_recipe_has_it_from_weights_to_record(tmp_path, published):
    _, cached, _ = published("resnet50")
    assert make_miniature.main(["clothing1m", str(tmp_path / "data" / "clothing1m")]) == 0
    line = ["dataset=clothing1m", "scale=smoke", "model.weights=imagenet", "method=infobatch_das"]
    line += [f"paths.data={tmp_path / 'data'}"]
    assert main([*line, "threads=2", f"paths.results={tmp_path / 'results'}"]) == 0
    assert cached.exists()
    _, summary, rows = _record(tmp_path)
    assert summary["status"] == "finished"
    assert len(rows) == 13
    assert {row["ranked_by"] for row in rows} >= {"loss", "das"}


@pytest.mark.slow
def test_resnet50_takes_two_finite_steps_at_224_pixels_in_bf16(tmp_path):
    root = _miniature("imagenet", tmp_path / "set", "--size", "240")
    data = _prepare(_load("imagenet", root, image_size=224), reference_size=0.0)
    torch.manual_seed(0)
    network = MODEL.make(MODEL.read({"name": "resnet50", "stem": "large", "weights": "none", "norm": "batch"}), 3, 4)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9)
    for _, images, labels in _batches(data, batch_size=16).epoch(torch.arange(32), 0):
        assert images.shape == (16, 3, 224, 224)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
        assert loss.isfinite()
