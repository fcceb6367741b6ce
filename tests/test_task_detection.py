"""The task detection: wrong boxes, FCOS's losses and detections, COCO's mAP, layouts of data sets, and whole runs."""

import io
import json
import math
import re
import sys
from codecs import BOM_UTF8
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import FCOS, fcos_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, generalized_box_iou_loss

from alignprune_exp.config import MODEL
from alignprune_exp.distributed import Processes
from alignprune_exp.setup import open_task
from alignprune_exp.tasks.detection import (
    APART,
    MOVED,
    NO_BOX,
    Said,
    average_precision,
    corrupt,
    detections,
    dropped,
    fcos_losses,
    invented,
    moved,
    padded,
    renamed,
)
from alignprune_exp.tasks.scenes import photographs
from alignprune_exp.tasks.segmentation import Voc
from harness import (
    METHODS,
    check_half_corrupted,
    check_two_as_one,
    composed,
    launch,
    only_run,
    rows_of,
    same_bits_when_stopped,
)
from pretended import pretended

VOC = """<annotation><size><width>{}</width><height>{}</height><depth>3</depth></size>{}</annotation>"""
OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{:g}</xmin><ymin>{:g}</ymin><xmax>{:g}</xmax>
<ymax>{:g}</ymax></bndbox></object>"""
NAMES = {
    "coco": ["cat", "dog", "sofa"],
    "voc_boxes": ["aeroplane", "cat", "tvmonitor"],
}  # of the ids 7, 90 and 2 in COCO
IDS = [7, 90, 2]

TINY = ("task=detection", "threads=1", "dataset.scenes=70", "dataset.side=32", "model.width=2", "batch_size=16")
TINY += ("epochs=5", "score.window=3", "dataset.test_subset=10", "reference.size=6", "eval_every=1")
SIDE, CLASSES = 64, 3


@pytest.fixture(scope="module")
def task():
    return open_task(composed(*TINY, "noise=sym", "noise.rate=0.25"))


@st.composite
def boxes(draw, crowds=True):
    """Boxes (k, 6) of one image."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(0, 5))
    corner = rng.uniform(0, SIDE - 1, (count, 2))
    end = corner + rng.uniform(0.01, 1, (count, 2)) * (SIDE - corner)
    crowd = rng.random((count, 1)) < (0.2 if crowds else 0)
    return np.hstack([corner, end, rng.integers(0, CLASSES, (count, 1)), crowd]).astype(np.float32)


def ious(some, others):
    return box_iou(*(torch.from_numpy(each[:, :4]) for each in (some, others))).numpy()


# --- what can be wrong


def test_the_share_asked_for_is_corrupted_and_known(task):
    assert task.corrupted.sum() == round(0.25 * task.n)
    clean = [task.data.train.targets[row] for row in task.parts.train]
    differs = [len(ours) != len(true) or (ours != true).any() for ours, true in zip(task.targets, clean, strict=True)]
    assert (np.array(differs) == task.corrupted).all()
    assert not set(task.parts.train) & set(task.parts.reference)
    given = torch.cat([boxes for _, _, boxes in task.reference.evaluation()])
    assert torch.equal(given, padded([task.data.train.targets[row] for row in task.parts.reference]))
    assert task.reference_noise() == 0
    again = open_task(composed(*TINY, "noise=sym", "noise.rate=0.25"))
    assert all((ours == theirs).all() for ours, theirs in zip(task.targets, again.targets, strict=True))


@given(boxes(), st.integers(0, 99), st.integers(1, CLASSES))
def test_corrupted_boxes_differ_visibly_and_those_of_crowds_stay(found, seed, classes):
    found[:, 4] %= classes
    changed = corrupt(found, classes, SIDE, np.random.default_rng(seed))
    (ours, ours_crowd), (true, true_crowd) = ([each[each[:, 5] == k] for k in (0, 1)] for each in (changed, found))
    assert (ours_crowd == true_crowd).all()
    assert changed.dtype == np.float32
    assert (changed[:, :4] >= 0).all()
    assert (changed[:, :4] <= SIDE + 1e-4).all()
    assert (changed[:, 2:4] > changed[:, :2]).all()
    assert set(changed[:, 4]) <= set(range(classes))
    if len(ours) == len(true):
        renamed = ours[:, 4] != true[:, 4]
        assert (renamed | (ious(ours, true).diagonal() < MOVED) | (ours == true).all(1)).all()
        assert (ours != true).any()


@given(boxes(crowds=False), st.integers(0, 99))
def test_what_can_be_wrong_is_what_its_name_says(found, seed):
    other, elsewhere, fewer, more = (
        kind(found, CLASSES, SIDE, np.random.default_rng(seed)) for kind in (renamed, moved, dropped, invented)
    )
    assert (other[:, :4] == found[:, :4]).all()
    assert (elsewhere[:, 4:] == found[:, 4:]).all()
    assert all((box == found).all(1).any() for box in fewer)
    assert (more[: len(found)] == found).all()
    if len(found):
        assert (other[:, 4] != found[:, 4]).any()
        away = (elsewhere != found).any(1)
        assert away.any()
        assert (ious(elsewhere, found).diagonal()[away] < MOVED).all()
        assert len(fewer) < len(found)
    new = more[len(found) :]
    assert len(new) <= max(len(found), 1)
    assert len(new) or len(found)
    assert (ious(new, more) - np.eye(len(new), len(more), len(found)) < APART).all()


# --- losses and detections, beside torchvision's FCOS


def outputs_of(strides, images, seed=0):
    """What a network might say, and torchvision's FCOS of the same strides with what it would make of the same."""
    rng = torch.Generator().manual_seed(seed)
    features = [torch.empty(images, 1, SIDE // stride, SIDE // stride) for stride in strides]
    generator = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    anchors = generator(ImageList(torch.empty(images, 3, SIDE, SIDE), [(SIDE, SIDE)] * images), features)
    places = len(anchors[0])
    head = {
        "bbox_regression": torch.rand(images, places, 4, generator=rng) * 3,
        "bbox_ctrness": torch.randn(images, places, 1, generator=rng),
        "cls_logits": torch.randn(images, places, CLASSES, generator=rng) * 2,
    }
    backbone = torch.nn.Identity()
    backbone.out_channels = 32
    theirs = FCOS(backbone, CLASSES, anchor_generator=generator, score_thresh=0.05)
    sizes = [each.shape[-1] * each.shape[-2] for each in features]
    return torch.cat([torch.stack(anchors), *head.values()], -1), theirs, head, anchors, sizes


def targets_of(images, seed=0):
    """Boxes of images, the first of which has none; no two are of nearly one area, which torchvision cannot tell."""
    rng = np.random.default_rng(seed)
    made = [np.zeros((0, 6))]
    while len(made) < images:
        corner, size = rng.uniform(0, SIDE / 2, (4, 2)), rng.uniform(4, SIDE / 2, (4, 2))
        if (np.diff(np.sort(size.prod(1))) > 16).all():
            made.append(np.hstack([corner, corner + size, rng.integers(0, CLASSES, (4, 1)), np.zeros((4, 1))]))
    return [each.astype(np.float32) for each in made]


@pytest.mark.parametrize("strides", [(4,), (4, 8), (8, 16, 32)])
def test_the_loss_of_an_image_in_a_batch_is_torchvisions_of_that_image_alone(strides):
    images = 12
    outputs, theirs, head, anchors, sizes = outputs_of(strides, images)
    made = targets_of(images)
    for each in (outputs, *head.values()):
        each.requires_grad_()
    ours = fcos_losses(Said.of(outputs, CLASSES), padded(made))
    expected = []
    for row, boxes in enumerate(made):
        target = {"boxes": torch.from_numpy(boxes[:, :4]), "labels": torch.from_numpy(boxes[:, 4]).long()}
        alone = {key: value[[row]] for key, value in head.items()}
        expected.append(sum(theirs.compute_loss([target], alone, [anchors[row]], sizes).values()))
    torch.testing.assert_close(ours, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.1
    (gradient,) = torch.autograd.grad(ours.sum(), outputs)
    gradients = torch.autograd.grad(sum(expected), list(head.values()))
    torch.testing.assert_close(gradient[..., 4:], torch.cat(gradients, -1), rtol=1e-3, atol=1e-5)
    assert all(each.any() for each in gradients)


def test_a_step_does_not_wait_for_the_device(task):
    outputs, made = outputs_of((4, 8), 4)[0], targets_of(4)
    with pretended() as device:
        device.watched = False
        there, targets = outputs.to("cuda:0").requires_grad_(), padded(made).to("cuda:0")
        device.watched = True
        fcos_losses(Said.of(there, CLASSES), targets).sum().backward()
        assert device.noted == []
        generalized_box_iou_loss(there[..., :4], there[..., 4:8])
        assert device.noted  # by torchvision's, which is why ours has its own


def test_the_losses_of_a_batch_are_those_of_its_samples_one_by_one(task):
    torch.manual_seed(0)
    network = task.network().eval()
    _, images, given = next(task.train.evaluation())
    together = task.losses(network(images), given)[0]
    for row in range(len(images)):
        alone = given[[row]][:, : int((given[row, :, 4] != NO_BOX).sum())]  # without what fills it up
        if not alone.shape[1]:
            continue
        torch.testing.assert_close(together[row], task.losses(network(images[[row]]), alone)[0][0])
    (together.sum()).backward()
    assert all(each.grad is not None and each.grad.isfinite().all() for each in network.parameters())


def test_a_crowd_is_neither_learnt_nor_background():
    outputs = outputs_of((4,), 1)[0].requires_grad_()
    crowd = np.array([[10, 10, 40, 40, 1, 1]], np.float32)
    (gradient,) = torch.autograd.grad(fcos_losses(Said.of(outputs, CLASSES), padded([crowd])).sum(), outputs)
    x, y = Said.of(outputs, CLASSES).places[0].unbind(-1)
    within = (x > 10) & (x < 40) & (y > 10) & (y < 40)
    assert (gradient[0, within] == 0).all()
    assert (gradient[0, ~within][:, 9:] != 0).all()
    assert (gradient[0, :, :9] == 0).all()


@pytest.mark.parametrize("strides", [(4,), (8, 16, 32)])
def test_detections_are_torchvisions(strides):
    outputs, theirs, head, anchors, sizes = outputs_of(strides, 3, seed=1)
    split = {key: value.split(sizes, 1) for key, value in head.items()}
    expected = theirs.postprocess_detections(split, [list(each.split(sizes)) for each in anchors], [(SIDE, SIDE)] * 3)
    for row, found in enumerate(expected):
        ours = detections(Said.of(outputs, CLASSES), row, SIDE)
        columns = [found["boxes"], found["labels"][:, None].float(), found["scores"][:, None]]
        torch.testing.assert_close(ours, torch.cat(columns, 1))
        assert len(ours) > 10


def test_places_and_heads_of_torchvisions_network_are_its_own():
    theirs = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES).eval()
    network = MODEL.make(composed(*TINY[:4], *TINY[5:], "model=fcos").model, 3, CLASSES).eval()
    names = {"logits": "head.classification_head", "distances": "head.regression_head"}
    state = {
        next((new + key.removeprefix(old) for new, old in names.items() if key.startswith(old)), key): value
        for key, value in theirs.state_dict().items()
    }
    network.load_state_dict(state)
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        said, features = network(x), list(theirs.backbone(x).values())
        expected = theirs.head(features)
    anchors = theirs.anchor_generator(ImageList(x, [(128, 128)] * 2), features)
    parts = [torch.stack(anchors), *(expected[key] for key in ("bbox_regression", "bbox_ctrness", "cls_logits"))]
    torch.testing.assert_close(said, torch.cat(parts, -1))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (21, 30)])
def test_the_small_network_takes_images_of_any_size(height, width):
    network = MODEL.make(composed(*TINY).model, 3, 5)
    outputs = network(torch.zeros(2, 3, height, width))
    assert outputs.shape == (2, -(-height // 4) * -(-width // 4), 9 + 5)
    assert (Said.of(outputs, 5).places[0, :3] == torch.tensor([[0, 0], [4, 0], [8, 0]])).all()


# --- the metric


def coco_says(found, given, n):
    """mAP and AP50, as pycocotools has them of annotations and results in COCO's own form."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": row} for row in range(n)],
        "categories": [{"id": number} for number in range(CLASSES)],
        "annotations": [
            {"id": number, "image_id": int(row), "category_id": int(label), "iscrowd": int(crowd)}
            | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            for number, (row, x0, y0, x1, y1, label, crowd) in enumerate(given.tolist(), 1)
        ],
    }
    results = [
        {"image_id": int(row), "category_id": int(label), "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for row, x0, y0, x1, y1, label, score in found.tolist()
    ]
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return 100 * judge.stats[0], 100 * judge.stats[1]


def judged(seed, n):
    """Boxes of some images, and what might be found of them: rows (k, 7) as `average_precision` takes them."""
    rng = np.random.default_rng(seed)
    given, found = [], []
    for row in range(n):
        for _ in range(rng.integers(0, 5)):
            corner = rng.uniform(0, 30, 2)
            box, label = np.concatenate([corner, corner + rng.uniform(5, 30, 2)]), rng.integers(CLASSES)
            given.append([row, *box, label, rng.random() < 0.2])
            for _ in range(rng.integers(0, 3)):
                said = label if rng.random() < 0.8 else rng.integers(CLASSES)
                found.append([row, *box + rng.normal(0, 1.5, 4), said, rng.random()])
    return torch.tensor(found, dtype=torch.float32), torch.tensor(given, dtype=torch.float32)


@pytest.mark.parametrize("seed", range(3))
def test_the_map_is_that_of_cocoeval(seed):
    found, given = judged(seed, n=20)
    ours, expected = average_precision(found, given, 20), coco_says(found, given, 20)
    assert math.isclose(ours["map"], expected[0], rel_tol=1e-5)
    assert math.isclose(ours["map50"], expected[1], rel_tol=1e-5)
    assert 5 < ours["map"] < ours["map50"] < 95
    assert average_precision(found[:0], given, 20) == {"map": 0, "map50": 0}


def evaluated_in_parts(rank):
    """What one process says that evaluates its share alone, beside the others."""
    task, processes = open_task(composed(*TINY)), Processes()
    tests = task.tests[""]
    mine = tests.evaluation(processes.share(torch.arange(len(tests))))
    return task.evaluate(Told(task), mine, len(tests), processes)


def test_processes_that_share_the_images_find_the_map_of_all(task, together):
    alone = task.evaluate(Told(task), task.tests[""].evaluation(), len(task.tests[""]), Processes())
    for said in together(2, evaluated_in_parts):
        assert said.pop("loss") == pytest.approx(alone["loss"])
        assert said == {key: value for key, value in alone.items() if key != "loss"}


class Told:
    """A network that has seen the boxes to evaluate on, and says of each image about what it has."""

    device = torch.device("cpu")

    def __init__(self, task):
        ((_, images, self.boxes),) = task.tests[""].evaluation()
        self.keys, self.classes = [image.sum() for image in images], len(task.data.classes)

    def logits(self, images):
        return torch.cat([self.of_one(self.keys.index(image.sum())) for image in images])

    def of_one(self, row):
        boxes, rng = self.boxes[[row]], torch.Generator().manual_seed(row)
        places = (boxes[..., :2] + boxes[..., 2:4]) / 2
        anchors = torch.cat([places - 2, places + 2], -1)
        reach = (boxes[..., 2:4] - boxes[..., :2]).repeat(1, 1, 2) / 8
        reach = reach * (0.8 + 0.4 * torch.rand(reach.shape, generator=rng))
        hot = torch.nn.functional.one_hot(boxes[..., 4].long() % self.classes, self.classes)
        logits = 6 * hot - 6 + 2 * torch.randn(hot.shape, generator=rng)
        logits[boxes[..., 4] == NO_BOX] = -20
        return torch.cat([anchors, reach, torch.zeros(*places.shape[:2], 1), logits], -1)


def test_what_is_evaluated_is_what_is_found_in_every_image(task):
    tests, told = task.tests[""], Told(task)
    found = task.evaluate(told, tests.evaluation(), len(tests), Processes())
    ((_, images, boxes),) = tests.evaluation()
    said, classes = told.logits(images), len(task.data.classes)
    rows = [[row, *one] for row in range(10) for one in detections(Said.of(said, classes), row, 32).tolist()]
    given = [[row, *one] for row in range(10) for one in boxes[row].tolist() if one[4] != NO_BOX]
    expected = average_precision(torch.tensor(rows), torch.tensor(given), len(tests))
    assert {key: found[key] for key in expected} == expected
    assert math.isclose(found["loss"], task.losses(said, boxes)[0].mean(), rel_tol=1e-6)
    assert 0 < found["map"] < found["map50"] < 100


# --- what is trained on


def test_images_and_boxes_are_mirrored_together():
    task = open_task(composed(*TINY, "dataset.flip=true"))
    (_, plain, given), (_, mirrored, flipped) = (
        next(b) for b in (task.train.evaluation(), task.train.epoch(range(16), 3))
    )
    again = next(task.train.epoch(range(16), 3))
    assert torch.equal(again[1], mirrored)
    assert torch.equal(again[2], flipped)
    kinds = set()
    for row in range(16):
        is_flipped = not torch.equal(plain[row], mirrored[row])
        kinds.add(is_flipped)
        assert torch.equal(plain[row].flip(-1) if is_flipped else plain[row], mirrored[row])
        expected = given[row].clone()
        if is_flipped:
            expected[:, [0, 2]] = 32 - expected[:, [2, 0]]
        assert torch.equal(flipped[row], expected)
    assert kinds == {True, False}


def test_each_digit_of_a_scene_is_whole_and_its_box_the_tightest(task):
    train, test = task.data.train, task.data.test
    assert train.images.shape == (70, 3, 32, 32)
    assert len(test) == 14
    seen = {image.tobytes() for image in train.images}
    assert len(seen) == 70
    assert not seen & {image.tobytes() for image in test.images}
    assert {int(label) for found in train.targets for label in found[:, 4]} == set(range(10))
    for found in train.targets:
        assert 1 <= len(found) <= 3
        assert (ious(found, found) <= np.eye(len(found))).all()
        assert (found[:, :4] >= 0).all()
        assert (found[:, :4] <= 32).all()
    assert task.fingerprint == open_task(composed(*TINY, "seed=1")).fingerprint


@pytest.mark.parametrize("line", METHODS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, line):
    folder = same_bits_when_stopped(tmp_path, 3, *line, "dataset.flip=true", base=TINY)
    check_half_corrupted(folder, "map")


def test_two_processes_compute_what_one_computes(tmp_path, nurse):
    line = (*TINY, "model.norm=group", "precision=fp32")
    check_two_as_one(tmp_path, nurse, *line, rel_tol=1e-3)


# --- data sets as their owners ship them


@pytest.fixture
def ships(tmp_path):
    """Write a data set as its owner ships it: 12 cuts of photographs, wide and high; return its folder and boxes.

    The boxes of each are (x0, y0, x1, y1, number of the name, crowd) in its own pixels; the third image has none.
    """
    rng, made = np.random.default_rng(0), []
    (photograph, *_), _ = photographs()
    for number in range(12):
        width, height = (40, 30) if number % 2 else (30, 50)
        top, left = 20 * number, 25 * number
        corner = rng.integers(0, 20, (0 if number == 2 else 3, 2))
        boxes = np.hstack([corner, corner + rng.integers(2, 10, corner.shape), rng.integers(0, 3, (len(corner), 1))])
        crowd = np.zeros((len(corner), 1), int)
        crowd[:1] = number == 5
        made.append((photograph[top : top + height, left : left + width], np.hstack([boxes, crowd])))

    def written(kind):
        root = tmp_path / kind
        splits = {"train2017": range(8), "val2017": range(8, 12)} if kind == "coco" else {"train": range(8)}
        for name, numbers in (splits | ({"val": range(8, 12)} if kind == "voc_boxes" else {})).items():
            (coco if kind == "coco" else voc)(root, name, numbers)
        return root, [boxes for _, boxes in made]

    def image(file, number):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(made[number][0]).save(file, quality=95)

    def coco(root, name, numbers):
        listed, annotations = [], []
        for number in numbers:
            image(root / name / f"a_{number}.jpg", number)
            height, width, _ = made[number][0].shape
            listed.append({"id": 1000 - number, "file_name": f"a_{number}.jpg", "width": width, "height": height})
            for x0, y0, x1, y1, which, crowd in made[number][1].tolist():
                annotations.append({"id": len(annotations), "image_id": 1000 - number, "category_id": IDS[which]})
                annotations[-1] |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": crowd, "area": 1.0}
        categories = [{"id": id, "name": name} for id, name in zip(IDS, NAMES["coco"], strict=True)]
        file = root / "annotations" / f"instances_{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))

    def voc(root, name, numbers):
        for number in numbers:
            image(root / "JPEGImages" / f"a_{number}.jpg", number)
            height, width, _ = made[number][0].shape
            objects = [
                OBJECT.format(NAMES["voc_boxes"][which], crowd, x0 + 1, y0 + 1, x1, y1)
                for x0, y0, x1, y1, which, crowd in made[number][1].tolist()
            ]
            file = root / "Annotations" / f"a_{number}.xml"
            file.parent.mkdir(exist_ok=True)
            file.write_text(VOC.format(width, height, "".join(objects)))
        file = root / "ImageSets" / "Main" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"a_{number}\n" for number in numbers))

    return written


@pytest.mark.parametrize("kind", NAMES)
def test_a_set_as_its_owner_ships_it_is_read(ships, kind):
    root, boxes = ships(kind)
    line = ("task=detection", f"dataset={kind}", f"dataset.root={root}", "dataset.image_size=60", "reference.size=2")
    task = open_task(composed(*line))
    pictures, names = task.data, list(task.data.classes)
    assert (len(pictures.train), len(pictures.test), task.n) == (8, 4, 6)
    order = ["sofa", "cat", "dog"] if kind == "coco" else [*NAMES[kind]]  # COCO's by their ids
    assert [name for name in names if name in NAMES[kind]] == order
    assert len(names) == (3 if kind == "coco" else 20)
    for part, first in ((pictures.train, 0), (pictures.test, 8)):
        for row, found in enumerate(part.targets):
            expected = boxes[first + row].astype(float)
            scale, beside = (1.5, [0, 7, 0, 7]) if (first + row) % 2 else (1.2, [12, 0, 12, 0])
            assert part.names[row].endswith(f"a_{first + row}.jpg")
            np.testing.assert_allclose(found[:, :4], expected[:, :4] * scale + beside, atol=1e-4)
            assert [names[int(label)] for label in found[:, 4]] == [
                NAMES[kind][which] for which in boxes[first + row][:, 4]
            ]
            assert (found[:, 5] == boxes[first + row][:, 5]).all()
            assert (found[:, 5] == 1).sum() == (first + row == 5)
    whole = Image.open(root / pictures.train.names[0]).resize((36, 60), Image.Resampling.BILINEAR)
    assert (pictures.train.images[0][:, :, 12:48] == np.asarray(whole).transpose(2, 0, 1)).all()
    assert (pictures.train.images[0][:, :, :12] == 0).all()
    pixels = pictures.train.images[task.parts.train] / 255
    np.testing.assert_allclose([task.mean, task.std], [pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))])
    assert task.corrupted.sum() == 3
    assert open_task(composed(*line, "noise=clean")).corrupted is None
    assert task.fingerprint == open_task(composed(*line, "seed=1")).fingerprint
    if kind == "coco":
        changed(root / "annotations" / "instances_val2017.json", lambda held: held["categories"].reverse())
        assert task.fingerprint == open_task(composed(*line)).fingerprint


@pytest.mark.parametrize("kind", NAMES)
def test_lists_and_annotations_may_begin_as_windows_writes_them(ships, kind):
    root, _ = ships(kind)
    line = ("task=detection", f"dataset={kind}", f"dataset.root={root}", "dataset.image_size=60", "reference.size=2")
    before = open_task(composed(*line)).fingerprint
    for file in [file for file in root.rglob("*") if file.suffix in (".json", ".txt", ".xml")]:
        file.write_bytes(BOM_UTF8 + file.read_bytes())
    assert open_task(composed(*line)).fingerprint == before


def test_the_classes_of_voc_are_called_as_its_annotations_call_them():
    names = (
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"
    )
    assert " ".join(Voc.classes) == f"background {names} sheep sofa train tvmonitor"  # of VOCcode/VOCinit.m


def changed(file, change):
    """Write a JSON file anew as ``change`` has left what it holds."""
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


WRONG_COCO = [  # what is done to the annotations, and what is said of it
    (lambda held: held["annotations"][0].update(category_id=91), "annotation 0 of {} is of category 91, which it does"),
    (
        lambda held: held["annotations"][0].update(image_id=5),
        "annotation 0 of {} is of image 5, which it does not list",
    ),
    (lambda held: held["annotations"][0].update(bbox=[3, 4, 0, 5]), "a box from (3, 4) to (3, 9), which has no area"),
    (lambda held: held["annotations"][0].update(bbox=[3, 4, -1, 5]), "a box from (3, 4) to (2, 9), which has no area"),
    (lambda held: held["annotations"][0].update(bbox=[3, 4, 1e-6, 5]), "has a box from (3, 4) to (3, 9), which has no"),
    (lambda held: held["annotations"][0].update(bbox=[20, 4, 20, 5]), "(40, 9), which reaches out of its 30x50 pixels"),
    (
        lambda held: held["annotations"][0].update(bbox=[3, 4, 5]),
        "(annotations.0.bbox.3: Field required): fetch it again",
    ),
    (lambda held: held["annotations"][0].update(bbox=[3, 4, math.nan, 5]), "as COCO has them (annotations.0.bbox.2: "),
    (lambda held: held["annotations"][0].update(id=1), "has 2 annotations of the id 1: fetch it again"),
    (lambda held: held["images"][0].update(width=31), "a_0.jpg is 30x50 pixels where its annotation says 31x50"),
    (
        lambda held: held["images"][0].update(file_name="a_1.jpg"),
        "lists 1 images more than once, such as train2017/a_1",
    ),
    (
        lambda held: held["images"][0].update(file_name="./b/../a_1.jpg"),
        "lists 1 images more than once, such as train2017/a_1.jpg, each",
    ),
    (lambda held: held["images"][0].pop("file_name"), "as COCO has them (images.0.file_name: Field required)"),
    (lambda held: held["images"][0].update(file_name="b.jpg"), "b.jpg cannot be read as an image"),
    (
        lambda held: [each.update(bbox=[0.1, 0.1, 0.5, 0.9]) for each in held["annotations"]],
        "has no number above 1 in any bbox: write pixels there",
    ),
    (lambda held: held["categories"].pop(), "differ in categories: mend one"),
    (lambda held: held["annotations"].clear(), "none of the 6 images to train on has a box: give it others"),
    (lambda held: held["images"].clear() or held["annotations"].clear(), "lists no image that can be read"),
]


@pytest.mark.parametrize(("change", "said"), WRONG_COCO)
def test_a_mistake_in_cocos_annotations_is_one_sentence(tmp_path, refused, ships, change, said):
    root, _ = ships("coco")
    file = root / "annotations" / "instances_train2017.json"
    changed(file, change)
    line = ["task=detection", "dataset=coco", f"dataset.root={root}", f"paths.results={tmp_path / 'none'}"]
    assert said.format(file) in refused(*line, "reference.size=2")


def test_a_mistake_in_the_files_is_one_sentence(tmp_path, refused, ships):
    none, (root, _) = f"paths.results={tmp_path / 'none'}", ships("coco")
    line = ["task=detection", "dataset=coco", f"dataset.root={root}", none]
    said = refused(*line[:2], "dataset.root=/nowhere", none)
    assert "is not a folder: type the folder that has annotations/instances_train2017.json and" in said
    assert "instances_train.json cannot be read (No such file or directory): put it there" in refused(
        *line, "dataset.train=train"
    )
    (root / "val2017").rename(root / "elsewhere")
    assert "has no folder val2017, images/val2017 or images: put the images of" in refused(*line)
    (root / "annotations/instances_train2017.json").write_text("{")
    assert "does not hold annotations as COCO has them (Invalid JSON" in refused(*line)


def test_a_mistake_in_vocs_files_is_one_sentence(tmp_path, refused, ships):
    root, _ = ships("voc_boxes")
    line = ["task=detection", "dataset=voc_boxes", f"dataset.root={root}", f"paths.results={tmp_path / 'none'}"]
    file, image = root / "Annotations/a_3.xml", root / "JPEGImages/a_3.jpg"
    kept = file.read_text()
    for text, said in (
        (
            kept.replace("aeroplane", "airplane"),
            "a_3.xml has an object of the class 'airplane', which VOC has not: mend",
        ),
        (kept[:-9], "a_3.xml cannot be read as an annotation of VOC ("),
        (
            f'<?xml version="1.0" encoding="klingon"?>{kept}',
            "a_3.xml cannot be read as an annotation of VOC (unknown encoding",
        ),
        (
            kept.replace("xmin", "min"),
            "a_3.xml cannot be read as an annotation of VOC (bndbox/xmin is '' where a number is wanted): mend",
        ),
        (
            kept.replace("size>", "extent>"),
            "a_3.xml cannot be read as an annotation of VOC (size/width is '' where a number is wanted): mend",
        ),
        (
            re.sub(r"(<(?:x|y)m..>)", r"\1.0", kept),
            "a_3.xml has no number above 1 in a box, as of shares of the image, not of pixels: mend that, or leave",
        ),
        (
            kept.replace("<width>40</width>", "<width>41</width>"),
            "a_3.jpg is 40x30 pixels where its annotation says 41",
        ),
    ):
        assert text != kept
        file.write_text(text)
        assert said in refused(*line, "reference.size=2")
    file.unlink()
    assert "a_3.xml cannot be read as an annotation of VOC (No such file or directory): mend" in refused(*line)
    file.write_text(kept)
    image.write_bytes(b"nothing")
    assert "a_3.jpg cannot be read as an image (it is none of PNG, JPEG, WEBP, BMP)" in refused(*line)
    image.write_bytes((root / "JPEGImages/a_5.jpg").read_bytes())
    (root / "ImageSets/Main/val.txt").write_text("a_9\na_4\na_10\n")
    assert "lists 1 images more than once, such as JPEGImages/a_4.jpg, each of which is to be" in refused(*line)
    (root / "ImageSets/Main/val.txt").write_text("a_9  1\n# a comment\na photograph\n")
    assert "val.txt, line 3, is 'a photograph' where a name without blanks is wanted: mend or delete" in refused(*line)
    (root / "ImageSets/Main/val.txt").unlink()
    assert "val.txt cannot be read (No such file or directory): put it there" in refused(*line)


def test_images_with_which_anything_is_wrong_are_skipped_where_one_asks_for_it(tmp_path, ships, refused):
    root, boxes = ships("coco")
    file = root / "annotations" / "instances_train2017.json"
    changed(file, lambda held: held["annotations"][0].update(category_id=91))
    changed(file, lambda held: held["annotations"][4].update(bbox=[3, 4, 0, 5]))
    (root / "train2017/a_4.jpg").write_bytes(b"nothing")
    line = ("task=detection", "dataset=coco", f"dataset.root={root}", "dataset.image_size=60", "reference.size=2")
    refusal = refused(*line, f"paths.results={tmp_path / 'none'}")
    assert refusal.endswith("or type dataset.on_error=skip to train without such images")
    task = open_task(composed(*line, "dataset.on_error=skip"))
    left = [2, 3, 5, 6, 7]
    assert task.data.train.names == [f"train2017/a_{number}.jpg" for number in left]
    assert [len(found) for found in task.data.train.targets] == [len(boxes[number]) for number in left]
    assert len(task.skipped) == 3
    assert all(any(f"a_{number}.jpg" in each for each in task.skipped) for number in (1, 4))
    assert any("category 91" in each for each in task.skipped)


def test_what_does_not_go_with_the_task_is_one_sentence(tmp_path, refused, monkeypatch):
    line = [*TINY[:1], f"paths.results={tmp_path / 'none'}", "dataset.scenes=20", "reference.size=2"]
    assert "learner=sop needs class labels" in refused(*line, "learner=sop")
    assert "use score=settled" in refused(*line, "score=cleaning")
    assert "noise=asym: it is of class labels" in refused(*line, "noise=asym0.2")
    for model in ("small_cnn", "unet"):
        assert f"model={model} does not fit task=detection" in refused(*line, f"model={model}")
    assert "dataset=voc is for task=segmentation; with task=detection use dataset=digit_boxes" in refused(
        *line[:2], "dataset=voc"
    )
    for module in ("pycocotools", "torchmetrics"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert f"needs {module}; type pip install 'alignprune-exp[tasks]'" in refused(*line)


@pytest.mark.slow
def test_the_default_run_learns(tmp_path):
    assert launch(tmp_path, base=("task=detection",)) == 0
    tested = [row["test_map"] for row in rows_of(only_run(tmp_path)) if row["test_map"] is not None]
    assert tested[-1] > max(5, tested[0])  # an untrained network finds nothing
