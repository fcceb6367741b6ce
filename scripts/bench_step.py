"""Time a training step, an epoch at its kept fraction, and the start of a run.

python scripts/bench_step.py [--batch B] [--images N] [--epochs T] [--compile] [--json FILE]

bf16 in channels-last is compared with fp32 in the default layout, whose loss it must have; the exit status is 1 if
not. Speed alone never fails.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from alignprune_exp.config import MODEL
from alignprune_exp.run import Run
from alignprune_exp.setup import resolve_precision
from benchmarking import THREADS, Report, best, config, parser, peak_mb, reset_peak, walk

CLOSE = 0.03  # relative difference of the loss that bf16 may make
DELTA = 0.6  # of the epoch benchmark: full epochs enough to compare with
FIRST_STEP = """
import os, sys
from alignprune_exp.pruning import DynamicPruning
first = DynamicPruning.update
def update(self, *given):
    if self.running.step == 1:
        os._exit(0)
    return first(self, *given)
DynamicPruning.update = update
from alignprune_exp.train import main
sys.exit(main(sys.argv[1:]))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--batch", type=int, default=128, help="of the step, the recipe's; default: %(default)s")
    command.add_argument("--images", type=int, default=4000, help="of the epochs; default: %(default)s")
    command.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
    command.add_argument("--digits", type=int, default=60, help="epochs of the main job; default: %(default)s")
    command.add_argument("--model", default="resnet18", choices=("resnet18", "resnet8"), help="of the step")
    command.add_argument("--compile", action="store_true", help="also the step under torch.compile (takes a minute)")
    options = command.parse_args(arguments)
    torch.set_num_threads(THREADS)
    report = Report("training step, epoch and start")
    step(report, options.model, options.batch, options.compile)
    with tempfile.TemporaryDirectory() as folder:
        epochs(report, Path(folder), options.images, options.epochs)
    digits(options.digits)
    start_up()
    return report.finish(options.json)


def step(report: Report, model: str, batch: int, compiled: bool) -> None:
    architecture = config(f"model={model}").model
    random = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=random)
    labels = torch.randint(0, 10, (batch,), generator=random)

    def made(bf16: bool, compiled: bool = False) -> Callable[[], float]:
        torch.manual_seed(0)
        layout = torch.channels_last if bf16 else torch.contiguous_format
        network = MODEL.make(architecture, 3, 10).to(memory_format=layout)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        forward: Any = torch.compile(network) if compiled else network
        x = images.to(memory_format=layout)

        def train() -> float:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = forward(x)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return train

    plain = made(bf16=False)
    expected = plain()
    plain_seconds = best(plain, 3)
    fast = resolve_precision("auto", torch.device("cpu")) == "bf16"
    if not fast:
        print("this processor has no bf16, so auto means fp32: the step below emulates it")
    for name, train in {"step": made(bf16=True), **({"compiled step": made(True, True)} if compiled else {})}.items():
        reset_peak()
        loss = train()
        report.check(abs(loss - expected) <= CLOSE * expected, f"{name}: loss {loss:.4f} where fp32 has {expected:.4f}")
        report.add(name, batch, best(train, 3), peak_mb(), f"{model} in fp32, default layout", plain_seconds)


def epochs(report: Report, root: Path, images: int, count: int) -> None:
    """Walk infobatch with das at ``scale=cpu`` on random images; compare its pruned epochs with its full ones."""
    random_images(root, images)
    overrides = {"epochs": count, "pruner.delta": DELTA, "score.window": 3, "eval_every": count, "threads": THREADS}
    fixed = ("dataset=image_folder", f"dataset.root={root}", "scale=cpu", "noise=clean")
    run = Run(config(*fixed, *(f"{key}={value}" for key, value in overrides.items())))
    reset_peak()
    rows, walls = walk(run)
    peak = peak_mb()
    seconds = [row["seconds"] - row["seconds_test"] for row in rows]
    kept = [row["kept_fraction"] for row in rows]
    full = median(seconds[t] for t in range(1, count) if kept[t] == 1)
    pruned = [t for t in range(1, count) if kept[t] < 1]
    report.check(bool(pruned), "epoch: nothing was pruned")
    if not pruned:
        return
    fraction, over = median(kept[t] for t in pruned), median(seconds[t] / full - kept[t] for t in pruned)
    took = median(seconds[t] for t in pruned)
    report.add("pruned epoch", run.setup.n, took, peak, "a full epoch of the same run", full)
    print(f"{'':12} keeps {fraction:.3f} of the samples and takes {took / full:.3f} of a full epoch: {over:+.3f}")
    parts = [name for name in rows[0] if name.startswith("seconds_") and name != "seconds_test"]
    shares = (f"{name[8:]} {median(rows[t][name] for t in pruned) / full:.4f}" for name in parts)
    print(f"{'':12} in full epochs: {', '.join(shares)}")
    rest = took - sum(median(rows[t][name] for t in pruned) for name in parts)
    print(f"{'':12} and all else {rest / full:.4f}")
    outside(rows, walls, pruned)


def digits(count: int) -> None:
    """Walk the main job, where little is trained between two ends of epochs."""
    run = Run(config("threads=1", f"epochs={count}"))
    print(f"main job     {run.setup.n:>12,} samples, {count} epochs")
    rows, walls = walk(run)
    outside(rows, walls, [t for t in range(1, count) if rows[t]["kept_fraction"] < 1])


def outside(rows: list[dict[str, Any]], walls: list[float], epochs: list[int]) -> None:
    """Print how much of some epochs, from the beginning of each to that of the next, is no training step."""
    wall = median(walls[t] for t in epochs)
    rest = median(walls[t] - rows[t]["seconds_train"] for t in epochs)
    print(f"{'':12} {rest:.4f} s of an epoch of {wall:.4f} s, {rest / wall:.1%}, is outside of its steps")


def random_images(root: Path, images: int, test: int = 20) -> None:
    """Write a folder of images of ten classes."""
    rng = np.random.default_rng(0)
    for split, size in (("train", images), ("test", test)):
        for k in range(size):
            label = k % 10
            file = root / split / str(label) / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.normal(20 * label + 30, 60, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(file, compress_level=1)


def start_up() -> None:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": ""}

    def timed(*command: str) -> float:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as results:
        steps = []
        for k in range(2):
            steps.append(timed("-c", FIRST_STEP, f"paths.results={results}/{k}"))
    helps = min(timed("-m", "alignprune_exp.train", "--help") for _ in range(2))
    print(
        f"start-up     --help {helps:.2f} s; from the command to the end of the first training step {min(steps):.2f} s"
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
