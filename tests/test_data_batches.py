"""ImageBatches: augmentation by hash, exact normalisation, and the same batches however they are made."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, chisquare
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from alignprune_exp.config import NOTHING_HELD_OUT
from alignprune_exp.data.augment import Augmentation, splitmix64
from alignprune_exp.data.batches import ImageBatches
from alignprune_exp.data.noise import Clean
from alignprune_exp.data.source import Images
from alignprune_exp.data.sources.digits import Digits
from alignprune_exp.data.sources.files import ImageFolder
from alignprune_exp.data.split import Split, prepare
from alignprune_exp.errors import UsageError

MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.3])
CHANCE = 1e-4  # of a statistical test rejecting the truth; the seeds are fixed, so it fails always or never


class _Store:
    """Images of fixed noise, 3x10x8 pixels each."""

    def read(self, row):
        return np.random.default_rng(row).integers(0, 256, (3, 10, 8), dtype=np.uint8)


def _split(n=23, resident=True):
    source = Images(np.arange(2 * n) % 5, _Store())
    rows = np.arange(2 * n)[::-2].copy()
    images = source.pixels(rows) if resident else None
    return Split(source, rows, source.labels[rows], None, images)


def _batches(split, **changes):
    plain = {"batch_size": 5, "device": "cpu", "mean": MEAN, "std": STD, "seed": 1}
    augmentation = {"train": True, "flip": True, "crop": 3}
    return ImageBatches(split, **(plain | augmentation | changes))


def _collect(batches):
    index, x, labels = zip(*batches, strict=True)
    return torch.cat(index), torch.cat(x), torch.cat(labels)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("crop", [0, 3])
def test_batches_equal_torchvision_transforms_with_the_same_draws(flip, crop):
    split = _split()
    index, x, labels = _collect(_batches(split, flip=flip, crop=crop).epoch(torch.randperm(23), epoch=4))
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(labels.numpy(), split.labels[index.numpy()])
    top, left, flips = Augmentation(1, flip=flip, crop=crop).draw(index, 4)
    assert flips.any() == flip
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN.tolist(), STD.tolist())])
    for k in range(len(index)):
        image = split.images[index[k]]
        if crop:
            image = F.pad(image, [crop] * 4, padding_mode="reflect")
        image = F.crop(image, int(top[k]), int(left[k]), 10, 8)
        if flips[k]:
            image = F.horizontal_flip(image)
        torch.testing.assert_close(x[k], normalise(image), rtol=1e-5, atol=1e-6)


def test_nothing_is_augmented_in_evaluation_or_without_train():
    split = _split()
    expected = (split.images / 255.0 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    plain = _batches(split, train=False)
    for batches in (_batches(split).evaluation(), plain.evaluation(), plain.epoch(np.arange(23), 3)):
        index, x, _ = _collect(batches)
        assert index.tolist() == list(range(23))
        torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)
    index, x, _ = _collect(plain.evaluation(np.array([4, 2])))
    assert index.tolist() == [4, 2]
    torch.testing.assert_close(x.double(), expected[[4, 2]], rtol=1e-5, atol=1e-6)


def test_an_image_looks_the_same_in_any_batch_and_otherwise_in_another_epoch_or_run():
    split, order = _split(), torch.randperm(23)
    index, x, _ = _collect(_batches(split).epoch(order, 7))
    for other, subset in ((_batches(split, batch_size=23), np.arange(23)), (_batches(split), order[3:14])):
        again, y, _ = _collect(other.epoch(subset, 7))
        place = {int(i): k for k, i in enumerate(index)}
        assert torch.equal(y, x[[place[int(i)] for i in again]])
    assert (_collect(_batches(split).epoch(order, 8))[1] != x).flatten(1).any(1).float().mean() > 0.8
    assert (_collect(_batches(split, seed=2).epoch(order, 7))[1] != x).flatten(1).any(1).float().mean() > 0.8


def test_start_continues_in_the_middle_of_an_epoch():
    split, order = _split(), torch.randperm(23)
    whole = list(_batches(split).epoch(order, 2))
    for start in range(6):
        rest = list(_batches(split).epoch(order, 2, start))
        assert len(rest) == 5 - start
        for ours, theirs in zip(rest, whole[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [len(index) for index, _, _ in whole] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_from_disk_give_the_batches_of_images_in_memory(workers):
    order = torch.randperm(23)
    held, read = _batches(_split()), _batches(_split(resident=False), workers=workers)
    for epoch in (0, 1):
        for ours, theirs in zip(read.epoch(order, epoch, 1), held.epoch(order, epoch, 1), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    next(read.epoch(order, 2))
    for ours, theirs in zip(read.evaluation(), held.evaluation(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_several_views_are_the_one_and_others_drawn_on_their_own(workers):
    order = torch.randperm(23)
    split = _split() if workers is None else _split(resident=False)
    augmentation = Augmentation(1, flip=True, crop=3)
    batches = _batches(split, workers=workers or 0)
    one = list(_batches(_split()).epoch(order, 4, 1))
    shifted = []
    for (index, x, labels), (expected, first, same) in zip(batches.epoch(order, 4, 1, views=3), one, strict=True):
        assert torch.equal(index, expected)
        assert torch.equal(labels, same)
        views = x.chunk(3)
        assert torch.equal(views[0], first)
        shifted += [(views[a] != views[b]).flatten(1).any(1) for a, b in ((0, 1), (1, 2), (0, 2))]
        for view in (1, 2):
            top, left, flip = augmentation.draw(index, 4, view)
            padded = augmentation.pad(_split().images[index])
            begin = (torch.arange(len(index)) * padded.shape[1] + top) * padded.shape[2] + left
            cut = augmentation.apply(padded, begin, flip)
            plain = (cut / 255 - torch.as_tensor(MEAN)) / torch.as_tensor(STD)
            torch.testing.assert_close(views[view], plain.permute(0, 3, 1, 2).to(torch.float32), atol=1e-5, rtol=1e-5)
    assert torch.cat(shifted).float().mean() > 0.8
    assert all(len(x) == len(index) for index, x, _ in batches.evaluation())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_read_by_a_worker_is_named_in_one_sentence(tmp_path, workers):
    for k in range(12):
        path = tmp_path / ("train", "test")[k % 2] / str(k // 2 % 2) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (k, 0, 0)).save(path)
    source = ImageFolder(name="image_folder", root=str(tmp_path), image_size=8, on_error="stop").open()
    (tmp_path / os.fsdecode(source.train.paths[4])).write_bytes(b"not an image")
    split = Split(source.train, np.arange(6), source.train.labels, None, None)
    with pytest.raises(UsageError) as caught:
        list(_batches(split, workers=workers, batch_size=2).epoch(np.arange(6), 0))
    assert f"{os.fsdecode(source.train.paths[4])} cannot be read as an image" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resident", [True, False])
def test_of_fewer_samples_than_ranks_those_without_get_the_first(resident):
    batches = _batches(_split(resident=resident))
    found = [[index.tolist() for index, _, _ in batches.epoch(np.array([7, 3]), 0, rank=k, ranks=3)] for k in range(3)]
    assert found == [[[7]], [[3]], [[7]]]


CRASH = """
import numpy as np
from alignprune_exp.data.batches import ImageBatches
from alignprune_exp.data.source import Images
from alignprune_exp.data.split import Split

class Blank:
    def read(self, row):
        return np.zeros((3, 8, 8), np.uint8)

labels, colour = np.zeros(8, np.int64), np.full(3, 0.5)
batches = ImageBatches(
    Split(Images(labels, Blank()), np.arange(8), labels, None, None),
    batch_size=2, device="cpu", mean=colour, std=colour, seed=0, train=True, flip=True, crop=0, workers=1
)
for _ in batches.epoch(np.arange(8), 0):
    raise NotImplementedError("a bug")
"""


def test_workers_end_with_a_process_that_crashes_and_holds_them_in_its_traceback():
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("NotImplementedError: a bug\n")


def test_a_crop_as_large_as_the_image_is_refused():
    _batches(_split(), crop=7)
    with pytest.raises(UsageError, match="crop padding of 8 pixels does not fit images of 8x10"):
        _batches(_split(), crop=8)


def test_half_precision_rounds_the_float32_images_once(monkeypatch):
    exact = next(_batches(_split()).epoch(np.arange(5), 0))[1]
    for piece in (1, 500, 1 << 20):  # an image at a time, two, all
        monkeypatch.setattr("alignprune_exp.data.batches.PIECE", piece)
        half = next(_batches(_split(), dtype=torch.bfloat16).epoch(np.arange(5), 0))[1]
        assert torch.equal(half, exact.to(torch.bfloat16))
        assert half.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(next(_batches(_split()).epoch(np.arange(5), 0))[1], exact)


def test_channels_first_and_one_channel():
    split = _split()
    x = next(_batches(split, channels_last=False).epoch(np.arange(5), 0))[1]
    assert x.is_contiguous()
    assert torch.equal(x, next(_batches(split).epoch(np.arange(5), 0))[1])
    data = prepare(Digits(name="digits").open(), Clean(), NOTHING_HELD_OUT, seed=0)
    _, x, _ = _collect(_batches(data.train, mean=data.mean, std=data.std, batch_size=100).evaluation())
    assert x.shape == (1438, 1, 8, 8)
    assert abs(float(x.mean())) < 1e-4
    assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_mix_is_splitmix64():
    """The first outputs of SplitMix64 seeded with 1234567, as published with the generator."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + k * golden) % (1 << 64) for k in range(1, 6)]
    signed = torch.tensor([s - (1 << 64) if s >= 1 << 63 else s for s in states])
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(z) % (1 << 64) for z in splitmix64(signed)] == published


@pytest.mark.parametrize("across", ["samples", "epochs"])
def test_crops_and_flips_are_uniform_and_independent(across):
    augmentation, n = Augmentation(5, flip=True, crop=4), 20_000
    if across == "samples":
        top, left, flip = augmentation.draw(torch.arange(n), 3)
    else:
        draws = [augmentation.draw(torch.arange(10, 110), epoch) for epoch in range(n // 100)]
        # one sample's epochs follow each other
        top, left, flip = (torch.stack(parts, 1).flatten() for parts in zip(*draws, strict=True))
    cells = np.zeros((9, 9, 2))
    np.add.at(cells, (top.numpy(), left.numpy(), flip.long().numpy()), 1)
    assert cells.sum() == n
    assert chisquare(cells.ravel()).pvalue > CHANCE
    code = (top * 9 + left) * 2 + flip
    followed = np.zeros((9, 9))
    np.add.at(followed, (top[:-1].numpy(), top[1:].numpy()), 1)
    assert chi2_contingency(followed).pvalue > CHANCE
    assert len(code.unique()) == 162


def test_draws_do_not_repeat_between_seeds():
    same = [Augmentation(seed, flip=True, crop=4).draw(torch.arange(2000), 0)[0] for seed in (0, 1)]
    assert abs(float((same[0] == same[1]).float().mean()) - 1 / 9) < 0.03
