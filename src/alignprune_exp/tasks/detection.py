"""Detection: a sample is an image, its loss the sum of FCOS's parts over its own positives; the headline is the mAP.

Shape legend: n samples, B samples of a batch, M boxes at the most, P places of all levels, C classes, k any number.
A box is a row (x0, y0, x1, y1, class, crowd), in pixels; one of a crowd is neither learnt nor counted as missed.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ..data.batches import Batch
from ..data.index import Survey, there
from ..data.source import Unreadable, brief
from ..errors import UsageError
from ..models import Kind, Norm, Width, normalisation, synchronised
from ..records import Metric
from .scenes import DigitPictures, Entry, PictureFiles, SceneTask, cut_out, first_words, painted
from .segmentation import Voc

if TYPE_CHECKING:
    from ..distributed import Processes
    from ..network import Network

NO_BOX = -1  # the class of a row that only fills up
CENTRE = 1.5  # of FCOS: a place is positive within so many strides of a box's centre
WORST_SCORE, OVERLAP, CANDIDATES, DETECTIONS = 0.05, 0.6, 1000, 100  # of an image's detections, as FCOS has them
MOVED, APART = 0.5, 0.3  # the IoU that a moved box stays below with itself, and an invented one with every other
ATTEMPTS = 50


class Detection(SceneTask):
    """Images with some boxes each, float32 (k, 6), every one with its class."""

    metrics = (Metric("map", "test mAP", "%"), Metric("map50", "test mAP at IoU 0.5", "%"))
    packages = ("torchmetrics", "pycocotools")
    least = "a box"
    smooths = False
    chance_loss = 2.8  # one class in a hundred, boxes that miss, and a centre-ness of one half

    def teaches(self, targets: Sequence[np.ndarray]) -> bool:
        return any((boxes[:, 5] == 0).any() for boxes in targets)

    def wrong(self, target: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return corrupt(target, len(self.data.classes), self.data.train.images.shape[-1], rng)

    def mirrored(self, targets: Tensor) -> Tensor:
        width = self.data.train.images.shape[-1]
        x0, y0, x1, y1, *what = targets.unbind(-1)
        return torch.stack([width - x1, y0, width - x0, y1, *what], -1)

    def together(self, targets: Sequence[np.ndarray]) -> Tensor:
        return padded(targets)

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Task.losses`; outputs are what `Said` reads."""
        losses = fcos_losses(Said.of(outputs, len(self.data.classes)), targets)
        return losses, losses, None

    @torch.no_grad()
    def evaluate(self, network: Network, batches: Iterable[Batch], n: int, processes: Processes) -> dict[str, float]:
        """Return COCO's mAP of all images, that at an IoU of one half, both in per cent, and the mean loss."""
        loss = torch.zeros((), dtype=torch.float64, device=network.device)
        found, given = ([torch.empty(0, 7, device=network.device)] for _ in range(2))
        for index, images, boxes in batches:
            outputs = network.logits(images)
            loss += self.losses(outputs, boxes)[0].double().sum()
            said = Said.of(outputs, len(self.data.classes))
            for row, number in enumerate(index.tolist()):
                found.append(F.pad(detections(said, row, images.shape[-1]), (1, 0), value=number))
                given.append(F.pad(boxes[row][boxes[row, :, 4] != NO_BOX], (1, 0), value=number))
        all_found, all_given = (processes.gather(torch.cat(each)).cpu() for each in (found, given))
        return {**average_precision(all_found, all_given, n), "loss": processes.sum(loss).item() / n}


def padded(boxes: Sequence[np.ndarray]) -> Tensor:
    """Return the boxes (k, 6) of n images as float32 (n, M, 6), M at least 1, rows of `NO_BOX` behind them."""
    rows = [torch.zeros(1, 6), *map(torch.from_numpy, boxes)]
    return pad_sequence(rows, batch_first=True, padding_value=NO_BOX)[1:]


# --- what a network says, its losses and its detections


class Said(NamedTuple):
    """What a network says of the places of an image, as torchvision's FCOS does.

    Attributes:
        anchors: the square of one stride around each place, in pixels (B, P, 4).
        distances: of the box's sides from the place, to the left, above, to the right and below, in strides (B, P, 4).
        centred: logit of how central the place is in its box (B, P).
        logits: of the classes (B, P, C).
    """

    anchors: Tensor
    distances: Tensor
    centred: Tensor
    logits: Tensor

    @classmethod
    def of(cls, outputs: Tensor, classes: int) -> Said:
        """Read a network's outputs, float32 (B, P, 9 + C). Raises ValueError for those of another form."""
        if outputs.dim() != 3 or outputs.shape[-1] != 9 + classes:
            raise ValueError("the outputs are not a square, four distances, centre-ness and classes for each place")
        anchors, distances, centred, logits = outputs.split((4, 4, 1, classes), -1)
        return cls(anchors.detach(), distances, centred[..., 0], logits)

    @property
    def places(self) -> Tensor:
        """In pixels (B, P, 2)."""
        return (self.anchors[..., :2] + self.anchors[..., 2:]) / 2

    @property
    def strides(self) -> Tensor:
        """(B, P)."""
        return self.anchors[..., 2] - self.anchors[..., 0]

    @property
    def boxes(self) -> Tensor:
        """In pixels (B, P, 4)."""
        reach = self.distances * self.strides[..., None]
        return torch.cat([self.places - reach[..., :2], self.places + reach[..., 2:]], -1)


def fcos_losses(said: Said, targets: Tensor) -> Tensor:
    """Return the loss (B,) of each image, given its boxes (B, M, 6), as torchvision's FCOS has that of one alone.

    Focal loss of the classes of all places, GIoU and centre-ness of the positive ones, all divided by how many of these
    the image has, and by one where it has none (Tian et al., ICCV 2019). Places in a crowd that are not positive are no
    part of it.
    """
    from torchvision.ops import sigmoid_focal_loss

    which, positive, ignored = assigned(said, targets)
    own = targets.gather(1, which[..., None].expand(-1, -1, 6))
    true = torch.where(positive[..., None], own[..., :4], said.anchors)
    hot = (own[..., 4, None] == torch.arange(said.logits.shape[-1], device=own.device)) & positive[..., None]
    focal = sigmoid_focal_loss(said.logits, hot.float()).sum(-1).masked_fill(ignored, 0)
    missed = 1 - generalized_ious(said.boxes, true)
    reach = torch.cat([said.places - true[..., :2], true[..., 2:] - said.places], -1).unflatten(-1, (2, 2))
    central = (reach.amin(-2) / reach.amax(-2)).prod(-1).sqrt()
    centred = F.binary_cross_entropy_with_logits(said.centred, central, reduction="none")
    parts = focal + (missed + centred).masked_fill(~positive, 0)
    return parts.sum(1) / positive.sum(1).clamp(min=1)


def generalized_ious(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the generalized IoU (…) of boxes (…, 4), each with its other (Rezatofighi et al., CVPR 2019).

    torchvision's loss has the same numbers, and a mask for which a GPU waits: no step with it could be a CUDA graph.
    """
    ends = torch.stack([boxes, others])
    lower, upper = ends[..., :2], ends[..., 2:]
    both = (upper.amin(0) - lower.amax(0)).clamp(min=0).prod(-1)
    either = (upper - lower).prod(-1).sum(0) - both
    hull = (upper.amax(0) - lower.amin(0)).prod(-1)
    return both / (either + 1e-7) - (hull - either) / (hull + 1e-7)


@torch.no_grad()
def assigned(said: Said, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each place (B, P): the box that is its own, whether it has one, and whether it is to be ignored.

    That is the smallest of those that it lies in, near the centre of, and that are of its level's size: reaching from
    it 4 to 8 strides, on the first level also less and on the last one also more.
    """
    boxes, strides = targets[:, None, :, :4], said.strides[..., None]
    there, crowd = (targets[:, None, :, 4] != NO_BOX), targets[:, None, :, 5] != 0
    places = said.places[:, :, None]
    reach = torch.cat([places - boxes[..., :2], boxes[..., 2:] - places], -1)
    within, far = reach.amin(-1) > 0, reach.amax(-1)
    near = (places - (boxes[..., :2] + boxes[..., 2:]) / 2).abs().amax(-1) < CENTRE * strides
    least = torch.where(strides == strides.amin(1, keepdim=True), 0, 4 * strides)
    most = torch.where(strides == strides.amax(1, keepdim=True), torch.inf, 8 * strides)
    fits = there & ~crowd & within & near & (far > least) & (far < most)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    smallest, which = torch.where(fits, area, torch.inf).min(-1)
    positive = smallest < torch.inf
    return which, positive, (there & crowd & within).any(-1) & ~positive


def detections(said: Said, row: int, side: int) -> Tensor:
    """Return what is found in one image, best first: (x0, y0, x1, y1, class, score), float32 (k, 6)."""
    from torchvision.ops import batched_nms, clip_boxes_to_image

    scores = (said.logits[row].sigmoid() * said.centred[row, :, None].sigmoid()).sqrt()
    place, label = (scores > WORST_SCORE).nonzero(as_tuple=True)
    best = scores[place, label].sort(descending=True, stable=True)[1][:CANDIDATES]
    place, label = place[best], label[best]
    boxes, scores = clip_boxes_to_image(said.boxes[row, place], (side, side)), scores[place, label]
    kept = batched_nms(boxes, scores, label, OVERLAP)[:DETECTIONS]
    return torch.cat([boxes[kept], label[kept, None].float(), scores[kept, None]], -1)


def average_precision(found: Tensor, given: Tensor, n: int) -> dict[str, float]:
    """Return ``map``, over IoUs from 0.5 to 0.95, and ``map50``, in per cent, as COCO computes them.

    Args:
        found: detections (k, 7), the number of the image, in 0..n-1 and ascending, before what `detections` returns.
        given: boxes (k, 7) likewise.
        n: images.
    """
    from torchmetrics.detection import MeanAveragePrecision

    def of_images(rows: Tensor, last: str, kind: torch.dtype) -> list[dict[str, Tensor]]:
        parts = rows.split(rows[:, 0].long().bincount(minlength=n).tolist())
        return [{"boxes": each[:, 1:5], "labels": each[:, 5].long(), last: each[:, 6].to(kind)} for each in parts]

    # COCO's own numbers; torchmetrics rounds them to float32, so that a recall of 0.6 misses the threshold of 0.6.
    exact = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(), "rec_thresholds": np.linspace(0, 1, 101).tolist()}
    metric = MeanAveragePrecision(backend="pycocotools", sync_on_compute=False, **exact)
    metric.update(of_images(found, "scores", torch.float32), of_images(given, "iscrowd", torch.int64))
    of_all = metric.compute()
    return {"map": 100 * of_all["map"].item(), "map50": 100 * of_all["map_50"].item()}


# --- what can be wrong with boxes


def corrupt(boxes: np.ndarray, classes: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return the boxes (k, 6) of an image of ``side`` pixels with some renamed, moved, dropped, or invented.

    They differ in any case, and visibly; those of crowds stay as they are.
    """
    single, crowds = boxes[boxes[:, 5] == 0], boxes[boxes[:, 5] != 0]
    kinds = [(renamed, moved, dropped, invented)[kind] for kind in rng.permutation(4)]
    for kind in (*kinds, invented):
        changed = kind(single, classes, side, rng)
        if changed.shape != single.shape or (changed != single).any():
            break
    return np.concatenate([changed, crowds]).astype(np.float32)


def _some(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw which of some boxes are wrong, bool (count,): half of them on average, and at least one."""
    drawn = rng.random(count) < 0.5
    drawn[rng.integers(count, size=min(count, 1))] = True
    return drawn


def renamed(boxes: np.ndarray, classes: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return boxes of which some have another class."""
    if classes == 1:
        return boxes
    changed, some = boxes.copy(), _some(len(boxes), rng)
    changed[some, 4] = (boxes[some, 4] + rng.integers(1, classes, some.sum())) % classes
    return changed


def moved(boxes: np.ndarray, classes: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return boxes of which some have moved and are of another size, with an IoU below `MOVED` with what they were."""
    changed = boxes.copy()
    for row in np.flatnonzero(_some(len(boxes), rng)):
        box = boxes[row, :4]
        middle, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        for _ in range(ATTEMPTS):
            place, half = middle + size * rng.uniform(-0.5, 0.5, 2), size * np.exp(rng.uniform(-0.5, 0.5, 2)) / 2
            other = np.concatenate([place - half, place + half]).clip(0, side).astype(np.float32)
            if 0 < _ious(other, box[None])[0] < MOVED:
                break
        else:
            other = np.concatenate([box[:2], middle])  # a quarter of it
        changed[row, :4] = other
    return changed


def dropped(boxes: np.ndarray, classes: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return boxes without some of them."""
    return boxes[~_some(len(boxes), rng)]


def invented(boxes: np.ndarray, classes: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return boxes and as many more at the most, about as large, each with an IoU below `APART` with every other."""
    for _ in range(rng.integers(1, max(len(boxes), 1) + 1)):
        for _ in range(ATTEMPTS):
            size = rng.uniform(side / 8, side / 2, 2)
            if len(boxes):
                like = boxes[rng.integers(len(boxes)), :4]
                size = ((like[2:] - like[:2]) * np.exp(rng.uniform(-0.7, 0.3, 2))).clip(max=side)
            corner = rng.uniform(0, side - size)
            box = np.array([*corner, *corner + size, rng.integers(classes), 0], np.float32)
            if (_ious(box[:4], boxes[:, :4]) < APART).all():
                boxes = np.concatenate([boxes, box[None]])
                break
    return boxes


def _ious(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU of a box (4,) with each of some, (k,)."""
    both = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0).prod(1)
    return both / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - both)


# --- data sets


@dataclass(frozen=True, kw_only=True)
class DigitBoxes(DigitPictures):
    """Digits beside each other, as `DigitPictures` has them. Each is whole, and its box the tightest."""

    side: Annotated[int, Field(ge=32, le=192)]

    task: ClassVar[str] = "detection"
    purpose: ClassVar[str] = "boxes"

    def scene(
        self, photograph: np.ndarray, digits: np.ndarray, labels: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return an image and its boxes (k, 6); what finds no free place is left out."""
        image = cut_out(photograph, self.side, rng)
        free, boxes = np.ones(image.shape[:2], bool), []
        for _ in range(rng.integers(1, self.most + 1)):
            which, size = int(rng.integers(len(digits))), int(rng.integers(self.side // 3, self.side // 2 + 1))
            for _ in range(ATTEMPTS):
                top, left = (int(rng.integers(0, self.side - size + 1)) for _ in range(2))
                square = slice(top, top + size), slice(left, left + size)
                if free[square].all():
                    free[square] = False
                    rows, columns = painted(image[square], digits[which], rng).nonzero()
                    corners = left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1
                    boxes.append((*corners, labels[which], 0))
                    break
        return image, np.array(boxes, np.float32)


@dataclass(frozen=True, kw_only=True)
class BoxFiles(PictureFiles):
    """Images in files of their own, each scaled to fit a square with black around it.

    Attributes:
        train, test: the names of what is trained and evaluated on.
    """

    train: Annotated[str, Field(min_length=1)]
    test: Annotated[str, Field(min_length=1)]

    task: ClassVar[str] = "detection"

    def _fitted(
        self, path: str, said: tuple[float, float], own: Sequence[Sequence[float]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return an image, uint8 (3, S, S), and its boxes, float32 (k, 6). Raises Unreadable for a wrong one.

        What reaches less than a pixel out of the image, as after rounding, is cut off.

        Args:
            said: its width and height, as its annotation has them.
            own: its boxes in its own pixels.
        """
        pixels = self.pixels(path)
        size = np.array([pixels.shape[2], pixels.shape[1]])
        if tuple(size) != said:
            sizes = ["x".join(f"{side:g}" for side in each) for each in (size, said)]
            raise Unreadable(f"{self.folder / path} is {sizes[0]} pixels where its annotation says {sizes[1]}")
        boxes, side = np.array(own, np.float64).reshape(-1, 6), self.image_size
        scaled = np.maximum(np.rint(size * (side / size.max())).astype(int), 1)
        beside = (side - scaled) // 2
        corners = boxes[:, :4].reshape(-1, 2, 2)
        fitted = (corners.clip(0, size) * (scaled / size) + beside).astype(np.float32)
        for box, inside in zip(corners, fitted, strict=True):
            ends = " to ".join(f"({x:g}, {y:g})" for x, y in box)
            where = f"{path} has a box from {ends}, which"
            if not ((box[0] >= -1).all() and (box[1] <= size + 1).all()):  # nor is NaN
                raise Unreadable(f"{where} reaches out of its {size[0]}x{size[1]} pixels")
            if not (inside[0] < inside[1]).all():
                raise Unreadable(f"{where} has no area")
        square = Image.new("RGB", (side, side))
        whole = Image.fromarray(pixels.transpose(1, 2, 0))
        square.paste(whole.resize(tuple(scaled.tolist()), Image.Resampling.BILINEAR), tuple(beside.tolist()))
        boxes[:, :4] = fitted.reshape(-1, 4)
        return np.asarray(square).transpose(2, 0, 1), boxes.astype(np.float32)


class Annotations(BaseModel):
    """What this reads of a COCO file."""

    class Picture(BaseModel):
        id: int
        file_name: Annotated[str, Field(min_length=1)]
        width: int
        height: int

    class Box(BaseModel):
        model_config = ConfigDict(allow_inf_nan=False)
        id: int
        image_id: int
        category_id: int
        bbox: tuple[float, float, float, float]
        iscrowd: Literal[0, 1] = 0

    class Category(BaseModel):
        id: int
        name: str

    images: list[Picture]
    annotations: list[Box]
    categories: Annotated[list[Category], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Coco(BoxFiles):
    """COCO's layout."""

    @property
    def holds(self) -> str:  # type: ignore[override]
        names = [f"annotations/instances_{name}.json" for name in (self.train, self.test)]
        return f"{names[0]} and {names[1]}, and their images in {self.train}/ and {self.test}/, or in images/"

    def entries(self, survey: Survey) -> tuple[Sequence[str], list[Entry], list[Entry]]:
        train, test = (self._annotations(name) for name in (self.train, self.test))
        if train.categories != test.categories:
            raise UsageError(f"{self._file(self.train)} and {self._file(self.test)} differ in categories: mend one")
        classes = [each.name for each in train.categories]
        return classes, self._entries(self.train, train, survey), self._entries(self.test, test, survey)

    def _file(self, name: str) -> Path:
        return self.folder / "annotations" / f"instances_{name}.json"

    def _annotations(self, name: str) -> Annotations:
        file = self._file(name)
        with there(file):
            text = file.read_bytes().removeprefix(BOM_UTF8)
        try:
            read = Annotations.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            reason = f"{where}: {first['msg']}" if where else first["msg"]
            raise UsageError(f"{file} does not hold annotations as COCO has them ({reason}): fetch it again") from None
        for what in ("images", "annotations", "categories"):
            ids = Counter(each.id for each in getattr(read, what))
            if ids and (most := ids.most_common(1)[0])[1] > 1:
                raise UsageError(f"{file} has {most[1]} {what} of the id {most[0]}: fetch it again")
        if read.annotations and max(max(box.bbox) for box in read.annotations) <= 1:
            raise UsageError(f"{file} has no number above 1 in any bbox: write pixels there, not shares of the image")
        read.categories.sort(key=lambda each: each.id)
        return read

    def _entries(self, name: str, read: Annotations, survey: Survey) -> list[Entry]:
        file, wrong = self._file(name), set()
        folder = next((each for each in (name, f"images/{name}", "images") if (self.folder / each).is_dir()), None)
        if folder is None:
            raise UsageError(
                f"{self.folder} has no folder {name}, images/{name} or images: put the images of {file} there"
            )
        numbers = {category.id: number for number, category in enumerate(read.categories)}
        boxes: dict[int, list[tuple[float, ...]]] = {image.id: [] for image in read.images}
        for box in read.annotations:
            of = (("image", box.image_id, boxes), ("category", box.category_id, numbers))
            if unlisted := [f"{what} {id}" for what, id, listed in of if id not in listed]:
                what = f"annotation {box.id} of {file} is of {unlisted[0]}, which it does not list"
                survey.refuse(what, "mend or delete it")
                wrong.add(box.image_id)
            else:
                x, y, width, height = box.bbox
                boxes[box.image_id].append((x, y, x + width, y + height, numbers[box.category_id], box.iscrowd))
        entries = []
        for image in (image for image in read.images if image.id not in wrong):
            reader = partial(self._fitted, said=(image.width, image.height), own=boxes[image.id])
            entries.append(Entry(f"{folder}/{image.file_name}", reader))
        return entries


@dataclass(frozen=True, kw_only=True)
class VocBoxes(BoxFiles):
    """Pascal VOC, as it ships. What it calls difficult counts as a crowd."""

    @property
    def holds(self) -> str:  # type: ignore[override]
        return f"JPEGImages/, Annotations/ and ImageSets/Main/{self.train}.txt and {self.test}.txt"

    def entries(self, survey: Survey) -> tuple[Sequence[str], list[Entry], list[Entry]]:
        train, test = (
            [
                Entry(f"JPEGImages/{name}.jpg", partial(self._annotated, name=name))
                for name in first_words(survey, self.folder / "ImageSets" / "Main" / f"{split}.txt")
            ]
            for split in (self.train, self.test)
        )
        return Voc.classes[1:], train, test

    def _annotated(self, path: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Read an image and its boxes as `_fitted` does. Raises Unreadable also for annotations that are not of VOC."""
        file, boxes = self.folder / "Annotations" / f"{name}.xml", []
        try:
            root = ET.fromstring(file.read_bytes())
            width, height = (_number(root, f"size/{side}") for side in ("width", "height"))
            for found in root.iter("object"):
                x0, y0, x1, y1 = (_number(found, f"bndbox/{at}") for at in ("xmin", "ymin", "xmax", "ymax"))
                label, crowd = found.findtext("name", ""), found.findtext("difficult", "0").strip() == "1"
                if max(x1, y1) <= 1:
                    raise Unreadable(f"{file} has no number above 1 in a box, as of shares of the image, not of pixels")
                if label not in Voc.classes[1:]:
                    raise Unreadable(f"{file} has an object of the class {label!r}, which VOC has not")
                corners = x0 - 1, y0 - 1, x1, y1  # they count from 1, both included
                boxes.append((*corners, Voc.classes[1:].index(label), crowd))
        except (OSError, ET.ParseError, LookupError, ValueError) as error:  # of these an encoding that is unknown
            raise Unreadable(f"{file} cannot be read as an annotation of VOC ({brief(error)})") from None
        return self._fitted(path, (width, height), boxes)


def _number(element: ET.Element, place: str) -> float:
    """Return the number at a place below an element. Raises ValueError where there is none."""
    text = element.findtext(place, "")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{place} is {text!r} where a number is wanted") from None


# --- networks


def fcos(channels: int, classes: int) -> nn.Module:
    """torchvision's FCOS with ResNet-50 and a feature pyramid, freshly initialised."""
    from torchvision.models.detection import fcos_resnet50_fpn

    made = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=classes)
    return Fcos(made.backbone, made.head.classification_head, made.head.regression_head, (8, 16, 32, 64, 128))


def fcos_small(
    channels: int, classes: int, *, width: Width, convs: Annotated[int, Field(ge=0, le=8)], norm: Kind
) -> nn.Module:
    """FCOS of stride 4 on a narrow residual network, with torchvision's heads."""
    from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead

    normed = normalisation(norm)
    logits = FCOSClassificationHead(2 * width, 1, classes, convs, norm_layer=normed)
    distances = FCOSRegressionHead(2 * width, 1, convs, norm_layer=normed)
    nn.init.ones_(distances.bbox_reg.bias)  # from 0 on, half of the distances would begin without a gradient
    return synchronised(Fcos(Backbone(channels, width, normed), logits, distances, (4,)), norm)


class Fcos(nn.Module):
    """torchvision's FCOS (Tian et al., ICCV 2019) without its losses: images (B, 3, H, W) to what `Said` reads.

    Args:
        backbone: from images to features by name, one (B, D, H / stride, W / stride) for each stride.
        logits: torchvision's classification head of these.
        distances: its regression head.
        strides: ascending, in pixels.
    """

    def __init__(self, backbone: nn.Module, logits: nn.Module, distances: nn.Module, strides: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.logits, self.distances, self.strides = backbone, logits, distances, tuple(strides)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features = list(self.backbone(x_BCHW).values())
        squares = [_squares(level, stride) for level, stride in zip(features, self.strides, strict=True)]
        anchors = torch.cat(squares).expand(len(x_BCHW), -1, -1)
        return torch.cat([anchors, *self.distances(features), self.logits(features)], -1)


def _squares(level: Tensor, stride: int) -> Tensor:
    """Return the square around each place of a level (B, D, H, W), as torchvision has them: float32 (H · W, 4)."""
    down, right = (stride * torch.arange(side, device=level.device).float() for side in level.shape[-2:])
    y, x = (each.flatten() for each in torch.meshgrid(down, right, indexing="ij"))
    return torch.stack([x - stride / 2, y - stride / 2, x + stride / 2, y + stride / 2], -1)


class Backbone(nn.Module):
    """Residual stages of strides 4 and 8, the coarse one carried back to the fine one: {"0": (B, 2 · width, …)}."""

    def __init__(self, channels: int, width: int, normed: Norm) -> None:
        from torchvision.models.resnet import BasicBlock
        from torchvision.ops import Conv2dNormActivation

        super().__init__()
        convolved = partial(Conv2dNormActivation, norm_layer=normed)

        def halved(before: int, after: int) -> nn.Module:
            shortcut = convolved(before, after, 1, 2, activation_layer=None)
            return BasicBlock(before, after, 2, shortcut, norm_layer=normed)

        self.stem = convolved(channels, width, stride=2)
        self.fine, self.coarse = halved(width, 2 * width), halved(2 * width, 4 * width)
        self.together = convolved(6 * width, 2 * width)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        fine = self.fine(self.stem(x_BCHW))
        coarse = F.interpolate(self.coarse(fine), fine.shape[-2:])
        return {"0": self.together(torch.cat([fine, coarse], 1))}
