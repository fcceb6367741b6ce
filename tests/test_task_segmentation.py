"""The task segmentation: wrong masks, the mean IoU, layouts of data sets, and whole runs on scenes of digits."""

import itertools
import math
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from alignprune_exp.config import MODEL
from alignprune_exp.distributed import Processes
from alignprune_exp.setup import open_task
from alignprune_exp.tasks.segmentation import IGNORED, corrupt, dilated, eroded, shifted, swapped
from harness import METHODS, check_half_corrupted, check_two_as_one, composed, same_bits_when_stopped

TINY = ("task=segmentation", "threads=1", "dataset.scenes=70", "dataset.side=32", "model.width=2", "batch_size=16")
TINY += ("epochs=5", "score.window=3", "dataset.test_subset=10", "reference.size=6")
PHOTOGRAPHS = {"voc": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", "ImageSets/Segmentation/{}.txt")}
PHOTOGRAPHS["pets"] = ("images/{}.jpg", "annotations/trimaps/{}.png", "annotations/{}.txt")
PHOTOGRAPHS["ade20k"] = ("images/{}.jpg", "annotations/{}.png", "objectInfo150.txt")
VALUES = {"voc": [0, 1, 20, IGNORED], "pets": [1, 2, 3], "ade20k": [0, 1, 2, 150]}


def name_of(kind, number):
    """What an image is called below its folder; the last four of twelve are evaluated on."""
    part = ("training/" if number < 8 else "validation/") if kind == "ade20k" else ""
    return f"{part}a_{number}"


@pytest.fixture(scope="module")
def task():
    return open_task(composed(*TINY, "noise=sym", "noise.rate=0.25"))


@pytest.fixture
def ships(tmp_path):
    """Write a data set as its owner ships it, of 12 images; return its folder."""

    def written(kind):
        image, mask, listed = PHOTOGRAPHS[kind]
        lists = ("train", "val") if kind == "voc" else ("trainval", "test")
        rng = np.random.default_rng(0)
        for number in range(12):
            values = rng.choice(VALUES[kind], (30, 40))
            for place, content in ((image, rng.integers(0, 256, (30, 40, 3))), (mask, values)):
                file = tmp_path / kind / place.format(name_of(kind, number))
                file.parent.mkdir(parents=True, exist_ok=True)
                made = Image.fromarray(content.astype(np.uint8))
                if kind == "voc" and place == mask:
                    made = made.convert("P")
                    made.putdata(values.flatten().tolist())
                made.save(file)
        if kind == "ade20k":
            rows = [
                "Idx\tRatio\tTrain\tVal\tStuff\tName",
                *(f"{k}\t0.1\t9\t9\t1\tthing {k}, it" for k in range(1, 151)),
            ]
            (tmp_path / kind / listed).write_text("\n".join(rows) + "\n")
            return tmp_path / kind
        for name, numbers in zip(lists, (range(8), range(8, 12)), strict=True):
            file = tmp_path / kind / listed.format(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"a_{number}{' 1 1 1' if kind == 'pets' else ''}\n" for number in numbers))
        return tmp_path / kind

    return written


def test_the_share_asked_for_is_corrupted_and_known(task):
    assert task.corrupted.sum() == round(0.25 * task.n)
    clean = np.stack(task.data.train.targets)[task.parts.train]
    assert ((np.stack(task.targets) != clean).any((1, 2)) == task.corrupted).all()
    assert not set(task.parts.train) & set(task.parts.reference)
    given = torch.cat([masks for _, _, masks in task.reference.evaluation()]).numpy()
    assert (given == np.stack(task.data.train.targets)[task.parts.reference]).all()
    assert task.reference_noise() == 0


masks = st.integers(0, 2**32 - 1).map(
    lambda seed: (
        np.random.default_rng(seed).choice([0, 0, 1, 2, IGNORED], (6, 7)).repeat(3, 0).repeat(3, 1).astype(np.uint8)
    )
)


@given(masks, st.integers(0, 99))
def test_a_corrupted_mask_is_another_one_and_what_is_ignored_stays_so(mask, seed):
    rng = np.random.default_rng(seed)
    changed = corrupt(mask, 3, rng)
    assert (changed != mask).any()
    assert ((changed == IGNORED) == (mask == IGNORED)).all()
    assert changed.dtype == np.uint8
    assert changed[changed != IGNORED].max() < 3


@given(masks, st.integers(0, 99))
def test_what_can_be_wrong_is_what_its_name_says(mask, seed):
    mask = np.where(mask == IGNORED, 0, mask)
    less, more, moved, other = (
        kind(mask, 3, np.random.default_rng(seed)) for kind in (eroded, dilated, shifted, swapped)
    )
    assert set(np.unique(less)) <= {0, *np.unique(mask)}
    assert ((less == mask) | (less == 0)).all()
    assert ((more == mask) | (mask == 0)).all()
    assert ((more > 0).sum() > (mask > 0).sum()) or (mask > 0).all() or not (mask > 0).any()
    for count in (1, 2):
        assert (moved == count).sum() <= (mask == count).sum()
    ((before, after),) = {(a, b) for a, b in zip(mask.flat, other.flat, strict=True) if a != b}
    assert ((other == after) == ((mask == before) | (mask == after))).all()


def test_the_losses_of_a_batch_are_those_of_its_samples_one_by_one(task):
    torch.manual_seed(0)
    network = task.network().eval()
    _, images, given = next(task.train.evaluation())
    given = given.clone()
    given[:, :5] = IGNORED
    together = task.losses(network(images), given, 0.1)[:2]
    for row in range(len(images)):
        log_p = network(images[[row]])[0].log_softmax(0)
        there = [(int(c), y, x) for y, line in enumerate(given[row]) for x, c in enumerate(line) if c != IGNORED]
        plain = -sum(log_p[place] for place in there) / len(there)
        uniform = -sum(log_p[:, y, x].mean() for _, y, x in there) / len(there)
        torch.testing.assert_close(together[0][row], plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[1][row], 0.9 * plain + 0.1 * uniform, rtol=1e-4, atol=1e-5)


def test_the_mean_iou_is_that_of_brute_force(task):
    tests, classes = task.tests[""], len(task.data.classes)

    class Guess:
        device = torch.device("cpu")

        def logits(self, images):
            torch.manual_seed(int(images.abs().sum()))
            return torch.randn(len(images), classes, *images.shape[-2:]) * (torch.arange(classes) < 5)[:, None, None]

    guess = Guess()
    batches = [(index, images, masks.clone()) for index, images, masks in tests.evaluation()]
    for _, _, masks in batches:
        masks[:, 5:9] = IGNORED
    found = task.evaluate(guess, batches, len(tests), Processes())
    both = [(guess.logits(images).argmax(1).numpy(), masks.numpy()) for _, images, masks in batches]
    said, true = (np.concatenate([each.ravel() for each in part]) for part in zip(*both, strict=True))
    said, true = said[true != IGNORED], true[true != IGNORED]
    ious = []
    for c in range(classes):
        either = (said == c) | (true == c)
        if either.any():
            ious.append(((said == c) & (true == c)).sum() / either.sum())
    assert len(set(ious)) > 2
    assert math.isclose(found["miou"], 100 * np.mean(ious), rel_tol=1e-6)


def test_images_and_masks_are_mirrored_together():
    task = open_task(composed(*TINY, "dataset.flip=true"))
    (_, plain, given), (_, mirrored, flipped) = (
        next(b) for b in (task.train.evaluation(), task.train.epoch(range(16), 3))
    )
    again = next(task.train.epoch(range(16), 3))
    assert torch.equal(again[1], mirrored)
    kinds = set()
    for row in range(16):
        is_flipped = not torch.equal(plain[row], mirrored[row])
        kinds.add(is_flipped)
        assert torch.equal(plain[row].flip(-1) if is_flipped else plain[row], mirrored[row])
        assert torch.equal(given[row].flip(-1) if is_flipped else given[row], flipped[row])
    assert kinds == {True, False}


def test_training_and_test_scenes_share_no_pixel_of_a_photograph_and_no_digit(task):
    train, test = task.data.train, task.data.test
    assert train.images.shape == (70, 3, 32, 32)
    assert len(test) == 14
    assert set(np.unique(train.targets)) == set(range(11))
    seen = {image.tobytes() for image in train.images}
    assert len(seen) == 70
    assert not seen & {image.tobytes() for image in test.images}
    assert task.fingerprint == open_task(composed(*TINY, "seed=1")).fingerprint


@pytest.mark.parametrize("line", METHODS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, line):
    folder = same_bits_when_stopped(tmp_path, 3, *line, "dataset.flip=true", base=TINY)
    check_half_corrupted(folder, "miou")


def test_two_processes_compute_what_one_computes(tmp_path, nurse):
    line = (*TINY, "model.norm=group", "precision=fp32")
    check_two_as_one(tmp_path, nurse, *line, rel_tol=1e-3)


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_a_set_as_its_owner_ships_it_is_read(ships, kind):
    root = ships(kind)
    task = open_task(
        composed(
            "task=segmentation", f"dataset={kind}", f"dataset.root={root}", "dataset.image_size=30", "reference.size=2"
        )
    )
    scenes = task.data
    assert (len(scenes.train), len(scenes.test)) == (8, 4)
    assert task.n == 6
    assert scenes.train.names == [PHOTOGRAPHS[kind][0].format(name_of(kind, number)) for number in range(8)]
    written = np.asarray(Image.open(root / PHOTOGRAPHS[kind][1].format(name_of(kind, 3))))[:, 5:35]
    expected = {
        "voc": written,
        "pets": np.select([written == 1, written == 2], [1, 0], IGNORED),
        "ade20k": np.where(written == 0, IGNORED, written.astype(int) - 1),
    }[kind]
    assert (scenes.train.targets[3] == expected).all()
    assert len(scenes.classes) == {"voc": 21, "pets": 2, "ade20k": 150}[kind]
    image = np.asarray(Image.open(root / PHOTOGRAPHS[kind][0].format(name_of(kind, 3))))[:, 5:35].transpose(2, 0, 1)
    assert (scenes.train.images[3] == image).all()
    assert task.corrupted.sum() == 3


def test_images_that_exif_has_turned_are_taken_as_stored_with_a_word_where_their_size_tells_nothing(tmp_path, ships):
    root = ships("voc")
    line = ("task=segmentation", "dataset=voc", f"dataset.root={root}", "dataset.image_size=30", "reference.size=2")

    def notes(size, orientation):
        mask = Image.open(root / "SegmentationClass/a_3.png")
        mask.crop((0, 0, *size)).save(root / "SegmentationClass/a_3.png")
        exif, image = Image.Exif(), root / "JPEGImages/a_3.jpg"
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(np.random.default_rng(3).integers(0, 256, (*size[::-1], 3), np.uint8)).save(image, exif=exif)
        data = open_task(composed(*line)).data
        stored = np.asarray(ImageOps.fit(Image.open(image), (30, 30), Image.Resampling.BILINEAR))
        assert (data.train.images[3] == stored.transpose(2, 0, 1)).all()
        return list(data.notes)

    for size in ((40, 30), (30, 30)):
        for orientation in range(10):
            said = notes(size, orientation)
            shown = ImageOps.exif_transpose(Image.open(image := root / "JPEGImages/a_3.jpg"))
            differs = shown.size == size and np.any(np.asarray(shown) != np.asarray(Image.open(image)))
            assert bool(said) == differs, (size, orientation)
    assert open_task(composed(*line)).notes == []
    notes((30, 30), 6)
    assert open_task(composed(*line)).notes == [
        "1 of the images, such as JPEGImages/a_3.jpg, are shown turned or mirrored by their EXIF orientation, and "
        "taken as they are stored; if their masks or boxes were drawn on them as shown, turn them, as mogrify "
        "-auto-orient does"
    ]


@pytest.mark.parametrize("kind", ["voc", "grey", "white", "black"])
def test_numbers_of_a_mask_may_have_any_colours_but_those_of_other_numbers(ships, kind):
    colours = {number: [number] * 3 if kind == "grey" else [0] * 3 for number in range(256)}
    if kind == "voc":
        colours |= {1: [128, 0, 0], 20: [0, 64, 128]}  # as it ships
    elif kind == "white":
        colours[1] = [255] * 3
    values = np.tile(np.uint8([0, 1]), (30, 20))
    values[:, 12] = 20
    mask = Image.fromarray(values, "P")
    mask.putpalette([part for number in range(256) for part in colours[number]])
    root = ships("voc")
    mask.save(root / PHOTOGRAPHS["voc"][1].format("a_3"))
    line = ("task=segmentation", "dataset=voc", f"dataset.root={root}", "dataset.image_size=30", "reference.size=2")
    assert (open_task(composed(*line)).data.train.targets[3] == values[:, 5:35]).all()


def test_a_clean_set_of_ones_own_is_not_known_to_be_clean(ships):
    line = ("task=segmentation", "dataset=pets", f"dataset.root={ships('pets')}", "noise=clean", "reference.size=2")
    assert open_task(composed(*line)).corrupted is None
    assert open_task(composed(*TINY, "noise=clean")).corrupted.sum() == 0


@pytest.mark.parametrize("backbone", ["lraspp", "mobilenet_v3_large"])
def test_torchvisions_networks_are_called_by_name(task, backbone):
    line = ("model=lraspp",) if backbone == "lraspp" else ("model=deeplabv3", f"model.backbone={backbone}")
    config = composed(*TINY[:4], "threads=1", *TINY[5:], *line)
    network = MODEL.make(config.model, 3, 11)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 11, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    network.train()
    assert torch.equal(network(x), network(x))  # no dropout


@pytest.mark.parametrize(("height", "width"), list(itertools.product((8, 21), (16, 27))))
def test_a_unet_takes_images_of_any_size(height, width):
    network = MODEL.make(composed(*TINY).model, 3, 5)
    assert network(torch.zeros(2, 3, height, width)).shape == (2, 5, height, width)


def grey(values, bits):
    """Return values (H, W) as a PNG of so many bits of grey a pixel, which Pillow cannot write."""
    shifts = np.arange(8 - bits, -1, -bits)
    lines = np.bitwise_or.reduce(values.reshape(len(values), -1, len(shifts)) << shifts, axis=2, dtype=np.uint8)
    head = struct.pack(">IIBBBBB", *values.shape[::-1], bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    parts = [(b"IHDR", head), (b"IDAT", data), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(of)) + name + of + struct.pack(">I", zlib.crc32(name + of)) for name, of in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_a_mistake_in_the_files_is_one_sentence(tmp_path, refused, ships):
    none, root = f"paths.results={tmp_path / 'none'}", ships("voc")
    line = ["task=segmentation", "dataset=voc", f"dataset.root={root}", none]
    assert "is not a folder: type the folder that has JPEGImages/" in refused(*line[:2], "dataset.root=/nowhere", none)
    (mask, image) = (root / PHOTOGRAPHS["voc"][place].format("a_3") for place in (1, 0))
    kept = mask.read_bytes()
    Image.fromarray(np.zeros((30, 41), np.uint8)).save(mask)
    assert "a_3.png is 41x30 pixels where its image is 40x30" in refused(*line)
    Image.fromarray(np.full((30, 40), 21, np.uint8)).save(mask)
    assert "a_3.png has the value 21, which is no class of dataset=voc: mend that, or leave" in refused(*line)
    Image.fromarray(np.full((30, 40), IGNORED, np.uint8)).save(mask)
    assert "a_3.png has no pixel of any class" in refused(*line)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(mask)
    assert "a_3.png has colours, or not 8 bits a pixel" in refused(*line)
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(mask)
    assert "a_3.png has colours, or not 8 bits a pixel" in refused(*line)
    for colours in ([0, 0, 0, 192, 128, 128, 128, 0, 0], [0, 0, 0, 15, 15, 15, 1, 1, 1]):  # a person, an aeroplane
        smaller = Image.fromarray(np.tile(np.uint8([0, 1, 2]), (30, 14))[:, :40], "P")
        smaller.putpalette(colours)
        smaller.save(mask)
        said = "a_3.png cannot be read as an image (its palette has the colour of number 15 at 1: write the numbers"
        assert said in refused(*line)
    for bits in (2, 4):
        mask.write_bytes(grey(np.tile(np.uint8([0, 1, 2, 3]), (30, 10)), bits))
        assert "a_3.png cannot be read as an image (it has less than 8 bits of grey a pixel" in refused(*line)
    mask.unlink()
    assert "a_3.png cannot be read as an image (No such file or directory): mend that, or leave" in refused(*line)
    mask.write_bytes(kept)
    kept_image = image.read_bytes()
    image.write_bytes(b"nothing")
    assert "a_3.jpg cannot be read as an image" in refused(*line)
    image.unlink()
    assert "a_3.jpg cannot be read as an image (No such file or directory)" in refused(*line)
    listed = root / "ImageSets/Segmentation/val.txt"
    listed.write_text("\n")
    image.write_bytes(kept_image)
    assert "lists no image that can be read: fetch JPEGImages/" in refused(*line)
    for again in ("a_9", "a_3"):
        listed.write_text(f"a_9\n{again}\n")
        assert f"lists 1 images more than once, such as JPEGImages/{again}.jpg, each of which is to be" in refused(
            *line
        )
    listed.unlink()
    assert "val.txt cannot be read (No such file or directory): put it there" in refused(*line)


@pytest.mark.parametrize(("part", "what"), [(range(8), "train"), (range(8, 12), "evaluate")])
def test_masks_of_one_class_alone_are_one_sentence(tmp_path, refused, ships, part, what):
    root = ships("voc")
    for number in part:  # as of shades, where an object is white
        mask = root / PHOTOGRAPHS["voc"][1].format(f"a_{number}")
        written = np.asarray(Image.open(mask))
        Image.fromarray(np.where(written > 0, IGNORED, 0).astype(np.uint8)).save(mask)
    line = ["task=segmentation", "dataset=voc", f"dataset.root={root}", f"paths.results={tmp_path / 'none'}"]
    said = f"images to {what} on has a pixel of a second class: give it others, or more"
    assert said in refused(*line, "reference.size=2")


def test_a_mistake_in_the_files_of_ade20k_is_one_sentence(tmp_path, refused, ships):
    root = ships("ade20k")
    line = ["task=segmentation", "dataset=ade20k", f"dataset.root={root}", f"paths.results={tmp_path / 'none'}"]
    mask = root / "annotations/training/a_3.png"
    Image.fromarray(np.full((30, 40), 151, np.uint8)).save(mask)
    assert "a_3.png has the value 151, which is no class of dataset=ade20k" in refused(*line)
    for bits in (2, 4):
        mask.write_bytes(grey(np.tile(np.uint8([0, 1, 2, 3]), (30, 10)), bits))
        assert "a_3.png cannot be read as an image (it has less than 8 bits of grey a pixel" in refused(*line)
    mask.unlink()
    assert "a_3.png cannot be read as an image (No such file or directory)" in refused(*line)
    classes = root / "objectInfo150.txt"
    classes.write_text("".join(classes.read_text().splitlines(keepends=True)[:-1]))
    assert "objectInfo150.txt does not number 150 classes" in refused(*line)
    classes.write_text("")
    assert "objectInfo150.txt does not number 150 classes" in refused(*line)
    classes.unlink()
    assert "objectInfo150.txt cannot be read (No such file or directory)" in refused(*line)


def test_images_with_which_anything_is_wrong_are_skipped_where_one_asks_for_it(tmp_path, ships, refused):
    root = ships("pets")
    image, mask = PHOTOGRAPHS["pets"][:2]
    Image.fromarray(np.full((30, 40), 4, np.uint8)).save(root / mask.format("a_1"))
    (root / mask.format("a_4")).unlink()
    (root / image.format("a_6")).write_bytes(b"nothing")
    line = ("task=segmentation", "dataset=pets", f"dataset.root={root}", "dataset.image_size=30", "reference.size=2")
    refusal = refused(*line, f"paths.results={tmp_path / 'none'}")
    assert refusal.endswith("or type dataset.on_error=skip to train without such images")
    whole = {name: (root / mask.format(name)).read_bytes() for name in ("a_0", "a_2", "a_3", "a_5", "a_7")}
    task = open_task(composed(*line, "dataset.on_error=skip"))
    assert task.data.train.names == [image.format(name) for name in whole]
    said = ("a_1.png has the value 4,", "a_4.png cannot be read", "a_6.jpg cannot be read")
    assert all(start in line for start, line in zip(said, task.skipped, strict=True))
    for target, name in zip(task.data.train.targets, whole, strict=True):
        written = np.asarray(Image.open(root / mask.format(name)))[:, 5:35]
        assert (target == np.select([written == 1, written == 2], [1, 0], IGNORED)).all()


def test_what_does_not_go_with_the_task_is_one_sentence(tmp_path, refused, monkeypatch):
    line = [*TINY[:1], f"paths.results={tmp_path / 'none'}", "dataset.scenes=20", "reference.size=2"]
    assert "learner=sop needs class labels" in refused(*line, "learner=sop")
    assert "use score=settled" in refused(*line, "score=cleaning")
    assert "noise=asym: it is of class labels" in refused(*line, "noise=asym0.2")
    assert "model=small_cnn does not fit task=segmentation" in refused(*line, "model=small_cnn")
    assert "dataset=python_docs is for task=language; with task=segmentation use dataset=digit_scenes" in refused(
        *line[:2], "dataset=python_docs"
    )
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert "needs torchmetrics; type pip install 'alignprune-exp[tasks]'" in refused(*line)
