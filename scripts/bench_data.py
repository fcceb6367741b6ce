"""Time the input pipelines, from memory and from disk, against torchvision's transforms and a bare loop.

python scripts/bench_data.py [--images N] [--jpegs N] [--json FILE]

Every result is compared with a plain one; the exit status is 1 if one differs. Speed alone never fails.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from alignprune_exp.data.augment import Augmentation
from alignprune_exp.data.batches import ImageBatches
from alignprune_exp.data.images import Array
from alignprune_exp.data.source import Images, Store
from alignprune_exp.data.sources.files import ImageFolder
from alignprune_exp.data.split import Split
from benchmarking import THREADS, Report, best, measured, memory_bandwidth, parser, peak_mb, reset_peak

BATCH, CROP, WORKERS, SEED = 128, 4, 2, 0
MEAN, STD = np.array([0.49, 0.48, 0.45]), np.array([0.25, 0.24, 0.26])
SIZE = 224  # pixels, of images from disk


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__.splitlines()[0])
    command.add_argument(
        "--images", type=int, default=50_000, help="in memory, of 32 x 32 pixels; default: %(default)s"
    )
    command.add_argument("--jpegs", type=int, default=1024, help="on disk, of 500 x 375 pixels; default: %(default)s")
    options = command.parse_args(arguments)
    torch.set_num_threads(THREADS)
    report = Report("input pipelines")
    resident(report, options.images)
    with tempfile.TemporaryDirectory() as folder:
        from_disk(report, Path(folder), options.jpegs)
    return report.finish(options.json)


def batches_of(split: Split, **settings: Any) -> ImageBatches:
    return ImageBatches(
        split, device="cpu", mean=MEAN, std=STD, seed=SEED, train=True, flip=True, crop=CROP, **settings
    )


class PerImage(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's CIFAR data sets do for each image."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(32, CROP, padding_mode="reflect"),
                transforms.ToTensor(),
                transforms.Normalize(MEAN.tolist(), STD.tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index].transpose(1, 2, 0))), int(self.labels[index])


def resident(report: Report, n: int) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    source = Images(rng.integers(0, 10, n), Array(pixels))
    batches = batches_of(Split(source, np.arange(n), source.labels, None, torch.from_numpy(pixels)), batch_size=BATCH)
    order = torch.from_numpy(rng.permutation(n))

    index, x, labels = next(batches.epoch(order, 3))
    expected = [plainly(pixels[i], int(i), 3) for i in index]
    right = x.is_contiguous(memory_format=torch.channels_last) and labels.tolist() == source.labels[index].tolist()
    report.check(right and np.allclose(x.numpy(), expected, rtol=1e-5, atol=1e-6), "in memory: another batch")

    _, seconds, peak = measured(lambda: sum(len(x) for _, x, _ in batches.epoch(order, 1)))
    some = slice(max(BATCH, n // 5))
    few = PerImage(pixels[some], source.labels[some])
    speeds = {}
    for workers in (0, WORKERS):
        loader = DataLoader(few, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        list(loader)  # starts the workers
        speeds[workers] = len(few) / best(lambda loader=loader: sum(len(x) for x, _ in loader), 2)
        del loader
        name = f"torchvision's transforms, {workers} workers, {speeds[workers]:,.0f} images/s"
        report.add("in memory", n, seconds, peak, name, n / speeds[workers])
    moved = 3 * 32 * 32 * (1 + 4)  # bytes an image: uint8 read, float32 written
    limit = memory_bandwidth() / moved
    print(
        f"{'':12} {n / seconds:,.0f} images/s; reading and writing each once, at the speed of a copy, would be "
        f"{limit:,.0f}: {limit * seconds / n:.1f} x more"
    )


def plainly(image: np.ndarray, sample: int, epoch: int) -> np.ndarray:
    """Return one image (C, H, W), augmented with the offsets and flips of our own draw, and normalised."""
    top, left, flip = Augmentation(SEED, flip=True, crop=CROP).draw(torch.tensor([sample]), epoch)
    padded = np.pad(image, ((0, 0), (CROP, CROP), (CROP, CROP)), "reflect")
    cut = padded[:, int(top) : int(top) + image.shape[1], int(left) : int(left) + image.shape[2]]
    cut = cut[:, :, ::-1] if flip else cut
    return (cut / 255 - MEAN[:, None, None]) / STD[:, None, None]


@dataclass(frozen=True)
class Counted:
    """Counts how often each image is opened, by whichever process."""

    store: Store
    opened: torch.Tensor  # int32 (n,), in shared memory

    def read(self, row: int) -> np.ndarray:
        self.opened[row] += 1
        return self.store.read(row)


def from_disk(report: Report, root: Path, n: int) -> None:
    make_jpegs(root, n)
    source = ImageFolder(name="image_folder", root=str(root), image_size=SIZE, on_error="stop").open().train
    opened = torch.zeros(n, dtype=torch.int32).share_memory_()
    counted = replace(source, store=Counted(source.store, opened))
    torch.set_num_threads(1)  # the workers have the other core
    split = Split(counted, np.arange(n), source.labels, None, None)
    batches = batches_of(split, batch_size=64, workers=WORKERS, dtype=torch.bfloat16)  # as runs in bf16 have it
    rng = np.random.default_rng(0)
    list(batches.epoch(rng.permutation(n)[: 4 * WORKERS], 0))  # starts the workers
    opened.zero_()

    kept = rng.permutation(n)[: n // 2]
    (index, x, _), *_ = batches.epoch(kept, 1)
    expected = torch.from_numpy(plainly(source.store.read(int(index[0])), int(index[0]), 1)).to(torch.bfloat16)
    right = torch.allclose(x[0], expected, rtol=2**-7, atol=1e-6)
    report.check(right, "from disk: another batch")
    report.check(
        bool((opened[kept] == 1).all()) and int(opened.sum()) == len(kept), "from disk: opened what was not selected"
    )

    order = rng.permutation(n)
    reset_peak()
    seconds = best(lambda: sum(len(x) for _, x, _ in batches.epoch(order, 2)), 2)
    bare = min(bare_loop(root, source.paths[order]) for _ in range(2))
    report.add(
        "from disk", n, seconds, peak_mb(), f"a bare loop in {WORKERS} processes, {n / bare:,.0f} images/s", bare
    )
    torch.set_num_threads(THREADS)


def make_jpegs(root: Path, n: int) -> None:
    """Write an image folder of ``n`` training images, of ImageNet's usual size and detail."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(min(n, 32)):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        fine = np.asarray(coarse, np.int16) + rng.integers(-8, 9, (375, 500, 3))
        file = io.BytesIO()
        Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    for split, count in (("train", n), ("test", 2)):
        for k in range(count):
            file = root / split / str(k % 2) / f"{k:06}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded[k % len(encoded)])


def bare_loop(root: Path, paths: np.ndarray) -> float:
    """Return the seconds in which as many processes decode, crop and collate the same images, each its share."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(WORKERS + 1)
    shares = np.array_split(paths, WORKERS)
    processes = [context.Process(target=decode_share, args=(start, root, share)) for share in shares]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - began


def decode_share(start: Any, root: Path, paths: np.ndarray) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    start.wait()
    for first in range(0, len(paths), 64):
        batch = []
        for path in paths[first : first + 64]:
            with Image.open(os.path.join(os.fsencode(root), path)) as opened:
                image = ImageOps.fit(opened.convert("RGB"), (SIZE, SIZE), Image.Resampling.BILINEAR)
            padded = np.pad(np.asarray(image), ((CROP, CROP), (CROP, CROP), (0, 0)), "reflect")
            top, left = rng.integers(0, 2 * CROP + 1, 2)
            cut = padded[top : top + SIZE, left : left + SIZE]
            batch.append(cut[:, ::-1] if rng.random() < 0.5 else cut)
        np.stack(batch)


if __name__ == "__main__":
    sys.exit(main())
