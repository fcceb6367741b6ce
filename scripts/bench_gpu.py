"""Time training steps, epochs and selection on a CUDA device, beside plain baselines and what the device could do.

python scripts/bench_gpu.py [--part steps selection several] [--large] [--dry] [--json FILE]

Everything is measured in this run, on random images of CIFAR-100's size and number, with the paper's recipe. ``--dry``
walks the same at small sizes on the CPU, and says what it leaves out: its numbers mean nothing. Losses and scores that
differ from the baselines' end with status 1, and so does a part that fails, after which the others are measured all the
same. Speed alone never fails.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import inspect
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, median_low
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from alignprune_exp.config import MODEL
from alignprune_exp.data.images import Array
from alignprune_exp.data.source import Crop, DataSet, Images, Source
from alignprune_exp.errors import Failed, UsageError, is_of_memory, reason_of, terminable
from alignprune_exp.pruning import SCORES, DynamicPruning, Trajectories
from alignprune_exp.run import Run
from alignprune_exp.runs import write_json
from alignprune_exp.setup import resolve_precision
from alignprune_exp.suites import load_suite
from bench_data import PerImage
from bench_selection import EPOCHS, TOLERANCE, filled
from benchmarking import Report, config, parser, peak_mb, reset_peak, walk

CLASSES, SIDE = 100, 32
CIFAR = 49_500  # images of CIFAR-100 to train on, once a reference set of 1 % is held out
KEPT = 0.7  # of them, by a pruner in the paper's main table
CLOSE = 0.03  # relative difference of an epoch's loss that another order of sums may make
CHUNK = 1 << 22  # samples that are recorded at a time
PARTS = ("steps", "selection", "several")
VARIANTS: dict[str, tuple[str, ...]] = {  # of the project's own step; eager by an optimizer of either kind
    "loop": ("graph=false", "optimizer.name=bench_gpu.looped"),
    "foreach": ("graph=false",),
    "graph": ("graph=true",),
    "Inductor": ("graph=true", "compile=true"),
}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        model, images, batch: of the steps; ``images`` to train on, and a fifth of that to test on.
        warm, repeats: epochs before the first that is timed, and those that are timed.
        epochs: of the run whose epochs are taken apart.
        threads: of the processor.
        matrix: rows of the square matrices whose product is the device's speed.
        workers: processes that read images for the plain loop.
        samples: to select among, one size after the other.
        at_once: runs on one device at a time, one number after the other.
    """

    model: str
    images: int
    batch: int
    warm: int
    repeats: int
    epochs: int
    threads: int
    matrix: int
    workers: int
    samples: tuple[int, ...]
    at_once: tuple[int, ...]


FULL = Sizes("resnet18", 50_000, 128, 2, 3, 10, 2, 8192, min(8, os.cpu_count() or 1), (1_281_167,), (1, 2, 4))
LARGE = 100_000_000  # samples, with a bank in half precision
DRY = Sizes("small_cnn", 300, 50, 1, 1, 6, 1, 256, 1, (20_000,), (1, 2))


@dataclass(frozen=True, kw_only=True)
class Pictures(DataSet):
    """Random images, brighter from class to class: what they show changes no speed."""

    name: str
    images: int = FULL.images
    crop: Crop = 0

    def open(self) -> Source:
        train, test = (pictures(n, seed) for seed, n in enumerate((self.images, max(CLASSES, self.images // 5))))
        return Source(
            name=self.name,
            classes=tuple(map(str, range(CLASSES))),
            train=Images(train[1], Array(train[0])),
            test=Images(test[1], Array(test[0])),
            fingerprint=hashlib.sha256(train[0].tobytes() + test[0].tobytes()).hexdigest(),
            labels_clean=True,
        )


def pictures(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels, uint8 (n, 3, SIDE, SIDE), and labels, int64 (n,)."""
    labels = np.arange(n) % CLASSES
    noise = np.random.default_rng(seed).integers(0, 128, (n, 3, SIDE, SIDE), dtype=np.uint8)
    return noise + labels[:, None, None, None].astype(np.uint8), labels


def looped(
    parameters: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """timm's LARS, parameter by parameter, as all versions before 1.0.31 have it."""
    from timm.optim import Lars

    loop = {"foreach": False} if "foreach" in inspect.signature(Lars).parameters else {}
    return Lars(list(parameters), lr=lr, momentum=momentum, weight_decay=weight_decay, **loop)


class OnDevice(Report):
    """A report on one device: rows, and beside them single figures, and what was left out and why.

    ``file`` holds what there is so far.
    """

    def __init__(self, title: str, device: torch.device, file: Path | None) -> None:
        super().__init__(title)
        self.device, self.file = device, file
        self.figures: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        if device.type == "cuda":
            card = torch.cuda.get_device_properties(device)
            self.card = f"{card.name}, {card.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
            print(f"{self.card}\n")
        else:
            self.card = str(device)

    def add(self, *given: Any) -> None:
        super().add(*given)
        self.save()

    def note(self, name: str, value: float, text: str) -> None:
        self.figures[name] = value
        print(f"{'':12} {text}")

    def skip(self, name: str, why: str) -> None:
        self.skipped[name] = why
        print(f"SKIPPED: {name}: {why}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Let the block fail alone, and leave out what there is too little memory for."""
        try:
            yield
        except Exception as error:  # a card may raise any
            if is_of_memory(error):
                self.skip(name, f"too little memory ({reason_of(error)})")
            else:
                if not isinstance(error, Failed | UsageError):
                    traceback.print_exc()
                self.check(False, f"{name}: {type(error).__name__}: {error}")
        finally:
            self.save()

    def save(self) -> None:
        if self.file is not None:
            found = {"card": self.card, "figures": self.figures, "skipped": self.skipped, "wrong": self.wrong}
            write_json(self.file, {**found, "rows": [asdict(row) for row in self.rows]})

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, work: Callable[[], Any], times: int = 5) -> float:
        """Return the median seconds of several runs after a first one, with all that the device has to do for them."""
        seconds = []
        for _ in range(times + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - start)
        return median(seconds[1:])

    def reset(self) -> None:
        """Give back what is not in use, and count the peak of memory from here."""
        gc.collect()
        reset_peak()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """Return the peak of memory in MB: the device's, and on the CPU the process's."""
        return torch.cuda.max_memory_allocated(self.device) / 1e6 if self.device.type == "cuda" else peak_mb()


@dataclass(frozen=True)
class Baselines:
    """Images a second: of a plain loop with its loader and without, and of matrix products at the device's speed."""

    loop: float
    step: float
    matrix: float


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--part", nargs="+", choices=PARTS, default=PARTS[:2], help="default: %(default)s")
    command.add_argument("--large", action="store_true", help=f"also selection among {LARGE:,} samples")
    command.add_argument("--dry", action="store_true", help="small sizes, on the CPU")
    options = command.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        command.error("no CUDA device is seen; --dry walks the same on the CPU")
    device, sizes = torch.device("cpu" if options.dry else "cuda:0"), DRY if options.dry else FULL
    # Runs want it, and torch looks for it once, at the first product of matrices.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(sizes.threads)
    report = OnDevice("training steps, epochs and selection on one device", device, options.json)
    if options.dry:
        print("a walk at small sizes on the CPU, whose numbers mean nothing\n")
    if "steps" in options.part:
        speeds: dict[str, float] = {}
        with report.part("steps"):
            speeds = steps(report, sizes, baselines(report, sizes))
        with report.part("epoch"):
            hours(report, speeds, *epoch(report, sizes))
    if "selection" in options.part:
        for n in (*sizes.samples, *([LARGE] if options.large else [])):
            with report.part(f"selection among {n:,}"):
                selection(report, n)
    if "several" in options.part:
        with report.part("several"):
            several(report, sizes)
    return report.finish(None)


def line(report: OnDevice, sizes: Sizes, *more: str) -> tuple[str, ...]:
    """Return the overrides of a run on the paper's recipe, at the sizes given."""
    pictured = ("dataset.name=bench_gpu.Pictures", f"+dataset.images={sizes.images}", "dataset.crop=4")
    sized = (
        f"model={sizes.model}",
        f"batch_size={sizes.batch}",
        f"threads={sizes.threads}",
        f"device={report.device}",
    )
    return ("scale=paper", *pictured, "dataset.flip=true", *sized, *more)


def baselines(report: OnDevice, sizes: Sizes) -> Baselines:
    """Time a loop as one writes it in an afternoon, with its loader and without, and a product of matrices."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    device, precision = report.device, resolve_precision("auto", report.device)
    pixels, labels = pictures(sizes.images, 0)
    torch.manual_seed(0)
    network = MODEL.make(config(f"model={sizes.model}").model, 3, CLASSES).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        PerImage(pixels, labels),
        sizes.batch,
        shuffle=True,
        drop_last=True,
        num_workers=sizes.workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )

    def step(images: Tensor, targets: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def train() -> None:
        for images, targets in loader:
            step(images.to(device, non_blocking=True), targets.to(device, non_blocking=True))

    loop = len(loader) * sizes.batch / report.timed(train, sizes.repeats)
    images, targets = (each.to(device) for each in next(iter(loader)))
    some = 20
    alone = some * sizes.batch / report.timed(lambda: [step(images, targets) for _ in range(some)], sizes.repeats)
    flops, speed = flops_an_image(report, sizes), matrix_speed(report, sizes.matrix)
    report.note("plain_loop", loop, f"{loop:,.0f} images/s of a plain loop, {sizes.workers} workers, {precision}")
    report.note("plain_step", alone, f"{alone:,.0f} images/s of its step alone, on one batch over and over")
    report.note("flops", flops, f"{flops / 1e9:.3f} GFLOP an image, forward and backward")
    report.note(
        "matrix",
        speed,
        f"{speed / 1e12:,.2f} TFLOP/s of matrices of {sizes.matrix:,} in bf16: {speed / flops:,.0f} images/s",
    )
    return Baselines(loop, alone, speed / flops)


def flops_an_image(report: OnDevice, sizes: Sizes) -> float:
    """Return the floating-point operations of an image, forward and backward, a product and a sum being two."""
    network, n = Run(config(*line(report, sizes, "pruner=full", "graph=false"))).loop.network, 8
    images = torch.randn(n, 3, SIDE, SIDE, device=report.device)
    with FlopCounterMode(display=False) as counted:
        network.training_logits(images).sum().backward()
    return counted.get_total_flops() / n


def matrix_speed(report: OnDevice, size: int) -> float:
    """Return the floating-point operations a second of products of square matrices in bf16."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=report.device) for _ in range(2))
    some = 10
    return some * 2 * size**3 / report.timed(lambda: [a @ b for _ in range(some)])


def steps(report: OnDevice, sizes: Sizes, than: Baselines) -> dict[str, float]:
    """Time the steps of whole epochs in each variant; return their images a second."""
    speeds, losses = {}, {}
    for name, overrides in VARIANTS.items():
        if "graph=true" in overrides and report.device.type != "cuda":
            report.skip(name, f"a CUDA graph needs a CUDA device, and this one is {report.device}")
            continue
        if name == "loop" and importlib.util.find_spec("timm") is None:
            report.skip(name, "timm is not installed")
            continue
        with report.part(name):
            n, seconds, losses[name] = trained(report, sizes, overrides)
            speeds[name] = n / seconds
            report.note(f"images a second, {name}", n / seconds, f"{n / seconds:,.0f} images/s: {name}")
            against = {
                f"a plain loop with torchvision's transforms, {sizes.workers} workers": than.loop,
                "the plain loop's step on one batch": than.step,
                "its operations at the speed of a matrix product": than.matrix,
            }
            for baseline, speed in against.items():
                report.add(name, n, seconds, report.peak(), baseline, n / speed)
    if (eager := losses.get("foreach")) is not None:
        for name, loss in losses.items():
            close = abs(loss - eager) <= (0 if name == "graph" else CLOSE) * eager
            report.check(close, f"{name}: loss {loss:.6f} where eager steps have {eager:.6f}")
    return speeds


def trained(report: OnDevice, sizes: Sizes, overrides: Sequence[str]) -> tuple[int, float, float]:
    """Train on everything; return an epoch's samples, the median seconds of its steps, and the first one's loss."""
    count = sizes.warm + sizes.repeats
    report.reset()
    loop = Run(config(*line(report, sizes, "pruner=full", f"epochs={count}", f"eval_every={count}", *overrides))).loop
    epochs = [loop.epoch(threading.Event(), lambda: None) for _ in range(count)]
    seconds = median(now.clock.laps["train"] for now in epochs[sizes.warm :])  # at whose end the device is waited for
    return loop.pruning.n, seconds, epochs[0].train_loss


def epoch(report: OnDevice, sizes: Sizes) -> tuple[float, float]:
    """Take epochs of InfoBatch with DAS apart; return the seconds outside of their steps, and those of a checkpoint."""
    overrides = ("pruner=infobatch", "score=das", "score.window=3", f"epochs={sizes.epochs}")
    report.reset()
    rows, walls, n = walked(line(report, sizes, *overrides, "checkpoint_seconds=1000000"))
    peak = report.peak()
    _, with_checkpoints, _ = walked(line(report, sizes, *overrides, "checkpoint_seconds=0"))
    checkpoint = max(0.0, median(with_checkpoints) - median(walls))
    left = [wall - row["seconds_train"] for row, wall in zip(rows, walls, strict=True)]
    outside = median_low(left)
    typical = left.index(outside)  # one epoch, whose parts add up
    row, wall = rows[typical], walls[typical]
    report.add("epoch", round(row["kept_fraction"] * n), wall, peak, "its steps alone", row["seconds_train"])
    report.note("outside", outside, f"{outside:.4f} s of an epoch, {outside / wall:.1%}, are outside of its steps:")
    parts = {name[8:]: row[name] for name in sorted(row) if name.startswith("seconds_") and name != "seconds_train"}
    for part, seconds in (parts | {"record": outside - sum(parts.values())}).items():
        report.note(f"outside, {part}", seconds, f"    {part:<12} {seconds:.4f} s, {seconds / wall:.2%}")
    report.note("checkpoint", checkpoint, f"a checkpoint, beside the training, holds it up by {checkpoint:.4f} s")
    return outside, checkpoint


def walked(overrides: Sequence[str]) -> tuple[list[dict[str, Any]], list[float], int]:
    """Train a run; return the records of its pruned epochs from the third on, the seconds of each, and all samples."""
    run = Run(config(*overrides))
    rows, walls = walk(run)
    pruned = [t for t in range(2, len(rows) - 1) if rows[t]["kept_fraction"] < 1]
    if not pruned:
        raise Failed("no epoch of the run was pruned")
    return [rows[t] for t in pruned], [walls[t] for t in pruned], run.setup.n


def hours(report: OnDevice, speeds: dict[str, float], outside: float, checkpoint: float) -> None:
    """Predict how long the paper's main table takes, run after run, by what was measured."""
    cells = load_suite("main", ["scale=paper"]).cells
    for name, speed in speeds.items():
        seconds = 0.0
        for cell in cells:
            kept = 1.0 if cell.axes["method"] == "full" else KEPT
            alone = cell.config.epochs * (kept * CIFAR / speed + outside)
            seconds += alone * (1 + checkpoint / cell.config.checkpoint_seconds)
        report.note(f"hours, {name}", seconds / 3600, f"{seconds / 3600:,.1f} hours for {len(cells)} runs: {name}")
    print(
        f"{'':12} assumed: {CIFAR:,} images, of which pruners keep {KEPT:.0%}; the rest of an epoch as measured here, "
        f"on {FULL.images if report.device.type == 'cuda' else DRY.images:,}"
    )


def selection(report: OnDevice, n: int) -> None:
    """Score ``n`` samples by DAS, and end an epoch with it and choose the next one's, on the device and on the CPU."""
    times, score = (5, SCORES["das"]()) if n < LARGE else (1, SCORES["das"]())
    bank = filled(n, torch.float32 if n < LARGE else torch.float16)
    plain_end = end_of_epoch(report, bank, times)
    plain = report.timed(lambda: score(bank.history()), times)
    expected_N = score(bank.history())
    report.reset()
    bank.move(report.device)
    read = report.timed(bank.losses_WN.sum, times)
    seconds = report.timed(lambda: score(bank.history()), times)
    off = (score(bank.history()).cpu() - expected_N).abs().max().item()
    report.check(off <= TOLERANCE, f"DAS of {n:,}: scores that are off by {off:.1e}")
    report.add("DAS", n, seconds, report.peak(), "the same on the CPU", plain)
    report.add("DAS", n, seconds, report.peak(), "a plain read of the bank, on the device", read)
    report.reset()
    ends = end_of_epoch(report, bank, times)
    report.add("choosing", n, ends, report.peak(), "the same on the CPU", plain_end)


def end_of_epoch(report: OnDevice, bank: Trajectories, times: int) -> float:
    """Return the median seconds from an epoch's last loss to the order of the next one's samples."""
    pruning = DynamicPruning(range(bank.n), EPOCHS, "infobatch", "das", bank=bank)
    device, seconds = bank.last_N.device, []
    for _ in range(times + 1):
        for index in torch.from_numpy(pruning.order()).split(CHUNK):
            pruning.update(index, torch.rand(len(index), device=device))
        report.wait()
        start = time.perf_counter()
        pruning.end_epoch(1.0 / pruning.epoch)
        pruning.order()
        report.wait()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def several(report: OnDevice, sizes: Sizes) -> None:
    """Train some runs one at a time, then more of them at once on one device, each in a process of its own."""
    alone = 0.0
    for count in sizes.at_once:
        with tempfile.TemporaryDirectory() as results:
            seconds, trained_on = at_once(report, sizes, count, Path(results))
        alone = alone or seconds
        report.add(
            f"{count} at once",
            count * trained_on,
            seconds,
            resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,  # of the largest process
            "their epochs one after the other",
            count * alone,
        )


def at_once(report: OnDevice, sizes: Sizes, count: int, results: Path) -> tuple[float, int]:
    """Return the median seconds of an epoch where ``count`` runs train at once, and the samples that it trains on."""
    grid = (f"epochs={sizes.epochs}", f"eval_every={sizes.epochs}", "pruner=full", f"paths.results={results}")
    seeds = ",".join(map(str, range(count)))
    launcher = ("hydra/launcher=joblib", f"hydra.launcher.n_jobs={count}")
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "alignprune_exp.train", "-m", *line(report, sizes, *grid), f"seed={seeds}", *launcher],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Failed(done.stderr.strip() or f"{count} runs at once ended with status {done.returncode}")
    runs = [
        [json.loads(row) for row in file.read_text().splitlines()][sizes.warm : -1]
        for file in results.glob("runs/*/metrics.jsonl")
    ]
    if len(runs) != count:
        raise Failed(f"{count} runs at once left {len(runs)} records")
    whole = round(median(row["samples_seen"] / (row["epoch"] + 1) for rows in runs for row in rows))
    return median(row["seconds"] for rows in runs for row in rows), whole


if __name__ == "__main__":
    try:
        with terminable():
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; what was measured before is written")
