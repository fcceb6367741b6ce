"""Data sets in their shipped forms, the split of one run, and the mistakes a user can make with either."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import ExifTags, Image

from alignprune_exp.config import Trusted
from alignprune_exp.data.datasets import DATASETS
from alignprune_exp.data.images import Array
from alignprune_exp.data.noise import NOISES
from alignprune_exp.data.source import Images, Source, stratified
from alignprune_exp.data.split import prepare
from alignprune_exp.errors import UsageError

DATA = Path(os.environ.get("ALIGNPRUNE_DATA") or Path(__file__).parents[2] / "shared/data")


def _load(name, root=None, download=False, image_size=None, on_error="stop"):
    options = {"cifar10": {"download": download}, "cifar100": {"download": download}}
    options["image_folder"] = {"image_size": image_size, "on_error": on_error}
    more = {"root": None if root is None else str(root)} | options[name] if name in options else {}
    return DATASETS[name](name=name, **more).open()


def _prepare(source, **changes):
    noise = noise_of(*(changes.pop(key, None) for key in ("noise", "noise_rate", "noise_labels", "noise_file")))
    return prepare(source, noise, reference_of(changes, size=0.05), **({"seed": 0} | changes))


def reference_of(changes, **usual):
    """The reference that is usual but for what ``changes`` has of it, which is taken out of these."""
    own = {key: changes.pop(f"reference_{key}") for key in ("size", "noise", "train") if f"reference_{key}" in changes}
    return Trusted(**({"per_class": False, "noise": 0.0, "train": False} | usual | own))


def noise_of(name, rate, labels, file):
    settings = {"sym": {"rate": rate}, "asym": {"rate": rate}, "real": {"labels": labels or "worst", "file": file}}
    return NOISES[name or "clean"](**settings.get(name, {}))


def _noise_images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def _png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _parquet(path, images, metadata=None, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [image if isinstance(image, bytes) else _png(image) for image in images]
    img = pa.array([{"bytes": data, "path": None} for data in encoded])
    table = pa.table({"img": img} | {key: pa.array(values) for key, values in columns.items()})
    pq.write_table(table.replace_schema_metadata(metadata), path)


def _cifar10_parquet(root):
    images = _noise_images(30)
    _parquet(root / "train.parquet", images[:20], label=[k % 10 for k in range(20)])
    _parquet(root / "test.parquet", images[20:], label=list(range(10)))
    return images


@pytest.fixture
def torchvision_cifar(monkeypatch):
    """Write miniatures in torchvision's form, with checksums of their own in place of the published ones."""

    def write(root, dataset):
        official = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
        folder = root / official.base_folder
        folder.mkdir(parents=True)
        sums = {}

        def dump(name, content):
            (folder / name).write_bytes(pickle.dumps(content))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

        for number, (name, _) in enumerate([*official.train_list, *official.test_list]):
            data = _noise_images(20, seed=number).transpose(0, 3, 1, 2).reshape(20, -1)
            fine = [k % 10 for k in range(20)]
            labels = {"labels": fine}
            if dataset == "cifar100":
                labels = {"fine_labels": fine, "coarse_labels": [k // 2 for k in fine]}
            dump(name, {"data": data, **labels})
        dump(official.meta["filename"], {official.meta["key"]: [f"class{k}" for k in range(10)]})
        for attribute in ("train_list", "test_list"):
            listed = [[name, sums[name]] for name, _ in getattr(official, attribute)]
            monkeypatch.setattr(official, attribute, listed)
        monkeypatch.setattr(official, "meta", official.meta | {"md5": sums[official.meta["filename"]]}, raising=True)
        return official

    return write


# ---- data sets -------------------------------------------------------------------------------------------


def test_digits_are_scaled_and_split_by_class():
    from sklearn.datasets import load_digits

    source, raw = _load("digits"), load_digits()
    assert (len(source.train), len(source.test)) == (1438, 359)
    assert source.classes == tuple("0123456789")
    images = torch.cat([split.pixels(np.arange(len(split))) for split in (source.train, source.test)])
    assert images.dtype == torch.uint8
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    ours = sorted((np.rint(image / 255 * 16).ravel().tolist()) for image in images.numpy()[:, 0].astype(float))
    assert ours == sorted(raw.data.tolist())
    for c in range(10):
        assert abs((source.test.labels == c).sum() - 0.2 * (raw.target == c).sum()) < 1
    assert _load("digits").fingerprint == source.fingerprint


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_torchvision_files_give_the_images_torchvision_gives(tmp_path, torchvision_cifar, dataset):
    official = torchvision_cifar(tmp_path, dataset)
    for root in (tmp_path, tmp_path / official.base_folder):
        source = _load(dataset, root)
        for ours, train in ((source.train, True), (source.test, False)):
            theirs = official(str(tmp_path), train=train)
            rows = np.array([3, 0, len(theirs) - 1])
            np.testing.assert_array_equal(
                ours.pixels(rows).permute(0, 2, 3, 1).numpy(),
                np.stack([np.asarray(theirs[k][0]) for k in rows]),
            )
            assert ours.labels.tolist() == theirs.targets
        assert source.official_order
        assert source.classes == tuple(theirs.classes)
    if dataset == "cifar100":
        assert source.superclass.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_torchvision_files_with_other_bytes_are_named_and_never_unpickled(tmp_path, torchvision_cifar):
    official = torchvision_cifar(tmp_path, "cifar10")
    folder = tmp_path / official.base_folder
    (folder / "data_batch_2").unlink()

    class Malice:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    (folder / "data_batch_4").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(UsageError, match=r"intact data_batch_2, data_batch_4: type dataset.download=true"):
        _load("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_torchvision_archive_is_unpacked_where_its_checksum_fits(tmp_path, torchvision_cifar, monkeypatch):
    official = torchvision_cifar(tmp_path, "cifar10")
    archive = tmp_path / official.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / official.base_folder, official.base_folder)
    shutil.rmtree(tmp_path / official.base_folder)
    with pytest.raises(UsageError, match="lacks an intact data_batch_1"):
        _load("cifar10", tmp_path)
    monkeypatch.setattr(official, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(_load("cifar10", tmp_path).train) == 100


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(UsageError, match=r"could not be fetched .* cifar-10-python.tar.gz there by hand"):
        _load("cifar10", tmp_path / "new", download=True)


def test_parquet_files_give_their_images_in_order(tmp_path):
    images = _cifar10_parquet(tmp_path)
    source = _load("cifar10", tmp_path)
    rows = np.array([7, 19, 0])
    np.testing.assert_array_equal(source.train.pixels(rows).permute(0, 2, 3, 1).numpy(), images[rows])
    np.testing.assert_array_equal(source.test.pixels(np.arange(10)).permute(0, 2, 3, 1).numpy(), images[20:])
    assert source.train.labels.tolist() == [k % 10 for k in range(20)]
    assert source.classes[9] == "truck"
    assert not source.official_order


def test_parquet_shards_and_class_names_of_the_hub(tmp_path):
    images = _noise_images(12)
    names = [f"name{k}" for k in range(100)]
    info = {"info": {"features": {"fine_label": {"_type": "ClassLabel", "names": names}}}}
    columns = {"fine_label": [4, 5, 4, 99], "coarse_label": [1, 2, 1, 19]}
    for shard in range(2):
        path = tmp_path / f"cifar100/train-0000{shard}-of-00002.parquet"
        _parquet(path, images[4 * shard :][:4], {"huggingface": json.dumps(info)}, **columns)
    _parquet(tmp_path / "cifar100/test-00000-of-00001.parquet", images[8:], **columns)
    source = _load("cifar100", tmp_path)
    np.testing.assert_array_equal(source.train.pixels(np.array([6]))[0].permute(1, 2, 0).numpy(), images[6])
    assert source.classes == tuple(names)
    assert source.superclass[[4, 5, 99, 0]].tolist() == [1, 2, 19, -1]


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    _cifar10_parquet(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    a, b = (_load("cifar10", tmp_path / place).fingerprint for place in "ab")
    expected = hashlib.sha256()
    for split in ("train", "test"):
        expected.update((tmp_path / f"a/{split}.parquet").read_bytes())
    assert a == b == expected.hexdigest()
    _parquet(tmp_path / "b/test.parquet", _noise_images(10, 5), label=list(range(10)))
    assert _load("cifar10", tmp_path / "b").fingerprint != a


def _image_folder(root):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            for k in range(3):
                path = root / split / label / ("nested" if k == 2 else "") / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (12, 10 + 2 * k, 3), dtype=np.uint8)).save(path)


def test_image_folder_lists_decodes_and_resizes(tmp_path):
    _image_folder(tmp_path)
    source = _load("image_folder", tmp_path, image_size=8)
    assert source.classes == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.train.paths.tolist()[:3] == [b"train/cat/0.png", b"train/cat/1.png", b"train/cat/nested/2.png"]
    images = source.train.pixels(np.array([1]))
    assert images.shape == (1, 3, 8, 8)
    with Image.open(tmp_path / "train/cat/1.png") as square:
        expected = np.asarray(square.resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    with Image.open(tmp_path / "train/cat/nested/2.png") as wide:  # 14x12: one pixel goes on either side
        expected = np.asarray(wide.crop((1, 0, 13, 12)).resize((8, 8), Image.Resampling.BILINEAR))
    cropped = source.train.pixels(np.array([2]))[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(cropped[:, 1:-1], expected[:, 1:-1])  # at the cut the filter may look across
    other = _load("image_folder", tmp_path, image_size=9)
    assert other.fingerprint != source.fingerprint
    split = _prepare(source, subset=4, reference_size=0, seed=3).train
    assert [path.encode() for path in split.paths] == source.train.paths[split.rows].tolist()


def test_pixels_are_taken_as_they_are_stored_however_exif_has_them_shown(tmp_path):
    _image_folder(tmp_path)
    sideways, place = Image.Exif(), tmp_path / "train/cat/0.png"
    sideways[ExifTags.Base.Orientation] = 6
    with Image.open(tmp_path / "train/cat/1.png") as wide:
        wide.crop((0, 0, 12, 9)).save(place, exif=sideways)
    ours = _load("image_folder", tmp_path).train.pixels(np.array([0]))[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, np.asarray(torchvision.datasets.folder.default_loader(place)))


def test_names_that_are_not_of_utf8_are_read_and_can_be_written(tmp_path):
    _image_folder(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "dog").rename(tmp_path / split / os.fsdecode(b"\xe9t\xe9"))
    (tmp_path / "train/cat/1.png").rename(
        tmp_path / "train/cat" / os.fsdecode("é\udcfe.png".encode("utf-8", "surrogateescape"))
    )
    source = _load("image_folder", tmp_path, image_size=8)
    assert source.classes == ("cat", r"\xe9t\xe9")
    assert source.train.pixels(np.arange(6)).shape == (6, 3, 8, 8)
    split = _prepare(source, reference_size=0).train
    assert [path for path in split.paths if "\\" in path] == [
        r"train/cat/é\xfe.png",
        *(rf"train/\xe9t\xe9/{name}.png" for name in ("0", "1", "nested/2")),
    ]
    (tmp_path / "train/cat/0.png").rename(tmp_path / "train/cat" / os.fsdecode(b"\xfc.png"))
    assert _load("image_folder", tmp_path, image_size=8).fingerprint != source.fingerprint
    with pytest.raises(UsageError, match=r"^train/cat/é\\xfe.png \(row 1\) is 12x12 pixels where"):
        _load("image_folder", tmp_path).train.pixels(np.arange(6))


def test_image_folder_passes_over_what_is_hidden_and_no_image_and_refuses_or_skips_what_leads_nowhere(tmp_path):
    _image_folder(tmp_path)
    plain = _load("image_folder", tmp_path, image_size=8)
    for place in (".ipynb_checkpoints/0.png", "nested/.2.png", "notes.txt", "folder.png/notes.txt"):
        (tmp_path / "train/cat" / place).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "train/cat/0.png", tmp_path / "train/cat" / place)
    assert _load("image_folder", tmp_path, image_size=8).fingerprint == plain.fingerprint
    (tmp_path / "train/cat/nested/gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(
        UsageError,
        match=r"gone.png cannot be read \(No such .*\): replace or delete it, or type dataset",
    ):
        _load("image_folder", tmp_path, image_size=8)
    skipping = _load("image_folder", tmp_path, image_size=8, on_error="skip")
    assert len(skipping.skipped) == 1
    assert skipping.fingerprint == plain.fingerprint


@pytest.mark.parametrize("place", ["0.TIF", "nested/1.gif", "more"])
def test_images_that_are_not_taken_are_named_or_listed(tmp_path, place):
    _image_folder(tmp_path / "set")
    before = _load("image_folder", tmp_path / "set", image_size=8).fingerprint
    passed_over = tmp_path / "set/train/cat" / place
    if place == "more":
        passed_over.symlink_to(tmp_path / "set/train/dog")
        said = f"{passed_over} is a link to a folder, which is not followed"
    else:
        shutil.copy(tmp_path / "set/train/cat/0.png", passed_over)
        said = f"{passed_over} is of a kind that is not read"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}: .*, or type dataset.on_error=skip to train without"):
        _load("image_folder", tmp_path / "set", image_size=8)
    source = _load("image_folder", tmp_path / "set", image_size=8, on_error="skip")
    assert (source.skipped, source.fingerprint) == ((said,), before)


@pytest.mark.parametrize("place", ["train/mouse", "test/dogs", "train/mice.png", "train/cat/more"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere_where_a_folder_of_images_may_be_meant_is_named_or_listed(tmp_path, place, target):
    _image_folder(tmp_path / "set")
    before = _load("image_folder", tmp_path / "set", image_size=8).fingerprint
    link = tmp_path / "set" / place
    link.symlink_to(link if target == "itself" else tmp_path / target)
    said = f"{link} is a link to what is not there"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}: .*, or type dataset.on_error=skip to train without"):
        _load("image_folder", tmp_path / "set", image_size=8)
    source = _load("image_folder", tmp_path / "set", image_size=8, on_error="skip")
    assert (source.skipped, source.fingerprint) == ((said,), before)
    (tmp_path / "set/notes").symlink_to(tmp_path / "nowhere")  # nobody looks for images there
    assert _load("image_folder", tmp_path / "set", image_size=8, on_error="skip").skipped == (said,)


def test_image_folder_is_listed_anew_each_time(tmp_path):
    _image_folder(tmp_path)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.utime(path, (1_600_000_000,) * 2)
    first = _load("image_folder", tmp_path, image_size=8).fingerprint
    image = tmp_path / "train/cat/0.png"
    image.write_bytes(image.read_bytes() + b"\0")
    assert _load("image_folder", tmp_path, image_size=8).fingerprint != first


def test_image_folder_labels_are_of_unknown_quality_until_noise_is_injected(tmp_path):
    _image_folder(tmp_path)
    source = _load("image_folder", tmp_path, image_size=8)
    as_given = _prepare(source, reference_size=0)
    assert as_given.train.clean_labels is None
    assert as_given.train.wrong is None
    assert _prepare(source, reference_size=0, noise="sym", noise_rate=0.5).train.wrong.mean() == 0.5


# ---- mistakes --------------------------------------------------------------------------------------------


def test_root_mistakes_name_what_is_missing(tmp_path):
    for name in ("cifar10", "cifar100", "image_folder"):
        with pytest.raises(UsageError, match=r"type dataset.root=FOLDER"):
            _load(name)
        with pytest.raises(UsageError, match=r"gone is not a folder"):
            _load(name, tmp_path / "gone")
    with pytest.raises(UsageError, match=r"lacks both cifar-10-batches-py and .*dataset.download=true"):
        _load("cifar10", tmp_path)
    _cifar10_parquet(tmp_path)
    (tmp_path / "test.parquet").unlink()
    with pytest.raises(UsageError, match=r"lacks test.parquet: type dataset.download=true"):
        _load("cifar10", tmp_path)


def test_parquet_mistakes_name_columns_and_rows(tmp_path):
    _cifar10_parquet(tmp_path)
    missing = r"train.parquet has no column fine_label and coarse_label, but img, label: fetch the files of cifar100"
    with pytest.raises(UsageError, match=missing):
        _load("cifar100", tmp_path)
    _parquet(tmp_path / "train.parquet", _noise_images(3), label=[9, 9, 9])
    with pytest.raises(UsageError, match=r"dataset=cifar10 has training images of truck alone, where 2"):
        _load("cifar10", tmp_path)
    _parquet(tmp_path / "train.parquet", _noise_images(3), label=[0, 9, 10])
    with pytest.raises(UsageError, match=r"row 2 of .*train.parquet has label 10 where 0 to 9 are wanted"):
        _load("cifar10", tmp_path)
    train = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(train.append_column("label", train["label"]), tmp_path / "train.parquet")
    with pytest.raises(UsageError, match=r"train.parquet has 2 columns label: write it with other names"):
        _load("cifar10", tmp_path)
    (tmp_path / "train.parquet").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UsageError, match=r"train.parquet cannot be read as Parquet"):
        _load("cifar10", tmp_path)
    images = [*_noise_images(3), b"\x89PNG broken"]
    _parquet(tmp_path / "train.parquet", images, label=[0, 1, 2, 3])
    source = _load("cifar10", tmp_path)
    assert source.train.pixels(np.arange(3)).shape == (3, 3, 32, 32)
    with pytest.raises(UsageError, match=r"row 3 of .*train.parquet cannot be read as an image"):
        source.train.pixels(np.arange(4))
    _parquet(tmp_path / "train.parquet", [*_noise_images(3), b""], label=[0, 1, 2, 3])
    with pytest.raises(UsageError, match=r"row 3 of .*train.parquet .* \(it is none of PNG, JPEG, WEBP, BMP\)"):
        _load("cifar10", tmp_path).train.pixels(np.arange(4))
    for split in ("test", "train"):
        _parquet(tmp_path / f"{split}.parquet", _noise_images(3), fine_label=[4, 4, 4], coarse_label=[1, 1, 2])
    with pytest.raises(UsageError, match=r"rows? .* of .*train.parquet has superclass"):
        _load("cifar100", tmp_path)


def _named(names):
    return {"huggingface": json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}})}


@pytest.mark.parametrize("other", ["train-00001-of-00002", "test-00000-of-00001"])
def test_a_label_means_the_same_class_in_every_parquet_file_or_both_files_are_named(tmp_path, other):
    names, numbers = list("abcdefghij"), list(range(10))
    shards = ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")
    files = [tmp_path / f"{shard}.parquet" for shard in shards]
    for file in files:
        _parquet(file, _noise_images(10), _named(names), label=numbers)
    assert _load("cifar10", tmp_path).classes == tuple(names)
    wrong = tmp_path / f"{other}.parquet"
    _parquet(wrong, _noise_images(10), label=numbers)  # without names its numbers count as theirs
    assert _load("cifar10", tmp_path).classes == tuple(names)
    for changed, said in (
        ([*names[:8], "j", "i"], f"class 8 of the column label is i in {files[0]} and j in {wrong}: write"),
        (names[:9], f"class 9 of the column label is j in {files[0]} and nothing in {wrong}: write all files"),
    ):
        _parquet(wrong, _noise_images(10), _named(changed), label=numbers)
        with pytest.raises(UsageError, match=f"^{re.escape(said)}"):
            _load("cifar10", tmp_path)
    _parquet(wrong, _noise_images(10), label=names)
    said = f"the column label holds numbers in {files[0]} and texts in {wrong}: write the labels of all files"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}"):
        _load("cifar10", tmp_path)


def test_image_folder_mistakes_name_file_and_folder(tmp_path):
    _image_folder(tmp_path)
    with pytest.raises(UsageError, match=r"train/cat/1.png \(row 1\) is 12x12 pixels .* dataset.image_size=10"):
        _prepare(_load("image_folder", tmp_path), reference_size=0)
    (tmp_path / "train/dog/1.png").write_bytes((tmp_path / "train/dog/1.png").read_bytes()[:150])
    with pytest.raises(UsageError, match=r"train/dog/1.png cannot be read as an image"):
        _prepare(_load("image_folder", tmp_path, image_size=8), reference_size=0)
    (tmp_path / "train/emu").mkdir()
    with pytest.raises(UsageError, match=r"train/emu has no image"):
        _load("image_folder", tmp_path)
    (tmp_path / "train/emu").rmdir()
    (tmp_path / "test/owl").mkdir()
    with pytest.raises(UsageError, match=r"test/owl is a class that .*train does not have"):
        _load("image_folder", tmp_path)
    (tmp_path / "test/owl").rmdir()
    for images in tmp_path.glob("*/dog"):
        shutil.rmtree(images)
    with pytest.raises(UsageError, match=r"dataset=image_folder has training images of cat alone, where 2 classes"):
        _load("image_folder", tmp_path)
    (tmp_path / "train/cat").rename(tmp_path / "train/.cat")
    with pytest.raises(UsageError, match=r"train has no class folders: put the images of each class into a folder"):
        _load("image_folder", tmp_path)
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(UsageError, match=r"lacks the folder test \(or val\)"):
        _load("image_folder", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subset": 2000}, r"dataset.subset=2000 does not fit 1438 .* from 10 to 1438"),
        ({"subset": 9}, r"dataset.subset=9 does not fit"),
        ({"test_subset": 360}, r"dataset.test_subset=360 does not fit 359"),
        ({"reference_size": 1438}, r"reference.size=1438 takes 1438 of 1438"),
        ({"reference_size": 500, "subset": 400}, r"reference.size=500 takes 500 of 400"),
        ({"reference_size": 0.001, "subset": 100}, r"reference.size=0.001 takes 0 of 100"),
        ({"reference_size": 2.5}, r"reference.size=2.5 is neither"),
        ({"noise": "real"}, r"digits has none of: use dataset=cifar10 or cifar100"),
    ],
)
def test_split_mistakes_say_what_to_type(changes, message):
    with pytest.raises(UsageError, match=message):
        _prepare(_load("digits"), **changes)


@pytest.mark.parametrize("changes", [{"subset": 4, "reference_size": 0}, {"subset": None, "reference_size": 15}])
def test_what_is_left_to_train_on_is_of_two_classes_or_more(changes):
    few = Images(np.array([0] * 15 + [1]), Array(_noise_images(16).transpose(0, 3, 1, 2)))
    source = Source("own", ("cat", "dog"), few, few, "", labels_clean=True)
    with pytest.raises(UsageError, match=r"own to train on is of class .* alone, .*larger dataset.subset"):
        _prepare(source, **changes)
    assert set(_prepare(source, reference_size=8, reference_train=True).train.labels) == {0, 1}


# ---- the split -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_stratified_shares_are_by_largest_remainder(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(7, 300, p=rng.dirichlet(np.ones(7)))
    for size in (0, 1, 13, 299, 300):
        rows = stratified(labels, size, np.random.default_rng(seed))
        assert len(set(rows.tolist())) == size
        assert (np.diff(rows) > 0).all()
        exact = np.bincount(labels, minlength=7) * size / len(labels)
        given = np.bincount(labels[rows], minlength=7)
        assert (abs(given - exact) < 1).all()
        up = given > exact
        down = given < exact
        if up.any() and down.any():
            assert (exact - np.floor(exact))[up].min() >= (exact - np.floor(exact))[down].max() - 1e-9


def test_train_and_reference_part_the_subset_whatever_the_noise():
    source = _load("digits")
    base = _prepare(source, subset=600)
    assert len(base.train) == 570
    assert len(base.reference) == 30
    assert not set(base.train.rows) & set(base.reference.rows)
    for noise in ({"noise": "sym", "noise_rate": 0.5}, {"noise": "asym", "noise_rate": 0.2}):
        noisy = _prepare(source, subset=600, **noise)
        np.testing.assert_array_equal(noisy.train.rows, base.train.rows)
        np.testing.assert_array_equal(noisy.reference.rows, base.reference.rows)
        np.testing.assert_array_equal(noisy.reference.labels, source.train.labels[base.reference.rows])
        np.testing.assert_array_equal(noisy.train.clean_labels, source.train.labels[base.train.rows])
    other = _prepare(source, subset=600, seed=1)
    assert set(other.train.rows) != set(base.train.rows)
    np.testing.assert_array_equal(
        _prepare(source, test_subset=50, seed=1).test.rows, _prepare(source, test_subset=50).test.rows
    )
    torch.testing.assert_close(base.train.images, source.train.pixels(base.train.rows), rtol=0, atol=0)


def test_noise_rate_refers_to_what_is_left_for_training():
    source = _load("digits")
    data = _prepare(source, subset=700, noise="sym", noise_rate=0.3, reference_size=37)
    np.testing.assert_array_equal(data.train.wrong, data.train.labels != data.train.clean_labels)
    assert data.train.wrong.sum() == round(0.3 * 663)
    assert np.bincount(data.reference.labels, minlength=10).min() >= 3


def test_reference_size_zero_count_and_fraction():
    source = _load("digits")
    assert _prepare(source, reference_size=0).reference is None
    assert len(_prepare(source, reference_size=0.01).reference) == 14
    assert len(_prepare(source, reference_size=1).reference) == 1
    assert len(_prepare(source, reference_size=50).train) == 1388


def test_reference_noise_and_training_on_the_reference():
    source = _load("digits")
    plain = _prepare(source, noise="sym", noise_rate=0.5, reference_size=100)
    data = _prepare(source, noise="sym", noise_rate=0.5, reference_size=100, reference_noise=0.1, reference_train=True)
    assert (data.reference.labels != data.reference.clean_labels).sum() == 10
    assert len(data.train) == len(plain.train) + 100
    np.testing.assert_array_equal(data.train.labels[:-100], plain.train.labels)
    np.testing.assert_array_equal(data.train.labels[-100:], source.train.labels[data.reference.rows])
    np.testing.assert_array_equal(data.train.rows[-100:], data.reference.rows)
    assert data.train.wrong.mean() == pytest.approx(plain.train.wrong.mean() * 1338 / 1438)


def test_mean_and_std_are_those_of_the_training_pixels(tmp_path):
    _cifar10_parquet(tmp_path)
    for resident_bytes in (1 << 30, 1000):
        data = _prepare(_load("cifar10", tmp_path), reference_size=4, resident_bytes=resident_bytes)
        assert (data.train.images is None) == (resident_bytes == 1000)
        pixels = data.train.source.pixels(data.train.rows).numpy() / 255.0
        np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_human_labels_follow_their_rows_and_enter_the_fingerprint(tmp_path, torchvision_cifar):
    torchvision_cifar(tmp_path / "official", "cifar10")
    source = _load("cifar10", tmp_path / "official")
    clean = source.train.labels
    human = (clean + np.arange(len(clean)) // 10) % 10
    file = tmp_path / "official/CIFAR-10_human.pt"
    torch.save({"clean_label": clean, "worse_label": human}, file)
    options = {"noise": "real", "subset": 60, "reference_size": 10, "root": tmp_path / "official"}
    data = _prepare(source, **options)
    np.testing.assert_array_equal(data.train.labels, human[data.train.rows])
    np.testing.assert_array_equal(data.train.clean_labels, clean[data.train.rows])
    np.testing.assert_array_equal(data.reference.labels, clean[data.reference.rows])
    assert data.pairing == "verified"
    with_reference = _prepare(source, **options, reference_train=True).train
    np.testing.assert_array_equal(with_reference.labels[-10:], clean[data.reference.rows])
    assert _prepare(source, reference_size=10).pairing == ""
    torch.save({"clean_label": clean, "worse_label": clean}, file)
    assert _prepare(source, **options).fingerprint != data.fingerprint


# ---- the real data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_real_cifar(dataset):
    root = DATA / dataset
    if not (root / "train.parquet").is_file():
        pytest.skip(f"no {dataset} Parquet files in {root}")
    source = _load(dataset, root)
    n_classes = len(source.classes)
    assert np.bincount(source.train.labels).tolist() == [50_000 // n_classes] * n_classes
    small = {"subset": 500, "test_subset": 100, "reference_size": 0.2, "root": root}
    data = _prepare(source, **small)
    assert data.train.images.shape == (400, 3, 32, 32)
    assert np.bincount(data.reference.labels).tolist() == [100 // n_classes] * n_classes
    assert (data.mean > 0.35).all()
    assert (data.mean < 0.6).all()
    assert _prepare(source, **small, noise="real").pairing == "unverified"
    asym = _prepare(source, **small, noise="asym", noise_rate=0.4).train
    moved = {(c, k) for c, k in zip(asym.clean_labels, asym.labels, strict=True) if c != k}
    names = {(source.classes[c], source.classes[k]) for c, k in moved}
    rate = np.mean(asym.labels != asym.clean_labels)
    if dataset == "cifar10":
        assert rate == 0.2
        assert names == {
            ("truck", "automobile"),
            ("bird", "airplane"),
            ("cat", "dog"),
            ("dog", "cat"),
            ("deer", "horse"),
        }
    else:
        assert rate == 0.5  # round(0.4 · 4) = 2 of the 4 samples of each class
        assert all(source.superclass[c] == source.superclass[k] for c, k in moved)
        assert np.bincount(source.superclass).tolist() == [5] * 20
        assert {("willow_tree", "maple_tree"), ("baby", "boy"), ("woman", "baby")} <= names


@pytest.mark.parametrize("name", ["cifar10", "image_folder"])
def test_the_home_of_somebody_whom_there_is_not_is_no_folder(name):
    with pytest.raises(UsageError, match=r"^~nobody-here/set begins with the home of a user whom there is not"):
        _load(name, "~nobody-here/set", download=True)
