"""Measure one and two processes, and predict how dynamic pruning scales on ImageNet-1K from what was measured.

python scripts/scaling.py [--images-per-second R] [--gigabytes-per-second G] [--json FILE]

Measured here: a run in one and in two processes, the time of ResNet-50 for one image, of averaging its gradients and of
exchanging an epoch's losses between two processes, and of selecting among 1,281,167 samples. The two options replace
the speed of a rank and of the network by those of another machine. The assumptions are printed beside the result.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import multiprocessing

from alignprune_exp.distributed import Processes
from alignprune_exp.pruning import DynamicPruning
from benchmarking import best

IMAGES, PARAMETERS = 1_281_167, 25_557_032  # ImageNet-1K's training set, ResNet-50
BATCH, KEPT = 64, 0.7  # images of a rank in a step, kept fraction of an epoch
RANKS = (8, 64, 512)
RUN = ("dataset=digits", "model=resnet8", "model.norm=group", "score=das", "score.window=3", "epochs=6", "threads=1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images-per-second", type=float, help="of one rank, in training; default: measured here")
    parser.add_argument("--gigabytes-per-second", type=float, help="of one rank's network; default: measured here")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    one, two = (run_seconds(processes) for processes in (1, 2))
    print(f"a run, an epoch's training   one process {one:.2f} s, two {two:.2f} s: {one / two / 2:.0%} efficiency")
    selection = selection_seconds()
    print(f"select and score             {selection:.3f} s for {IMAGES:,} samples")
    image = 1 / arguments.images_per_second if arguments.images_per_second else image_seconds()
    print(f"ResNet-50, a 224-pixel image {image:.4f} s forward and backward")
    averaging, exchange, latency = between_two()
    print(f"averaging the gradients      {averaging:.3f} s between two processes")
    print(f"exchanging an epoch's losses {exchange:.3f} s between two processes")
    if arguments.gigabytes_per_second:
        bandwidth = arguments.gigabytes_per_second * 1e9
    else:
        bandwidth = 4 * PARAMETERS / averaging  # in a ring of two, each sends its gradients once
    print(f"\n{'ranks':>5}  {'epoch, s':>10}  {'  '.join(f'{part:>9}' for part in PARTS)}  efficiency")
    rows = []
    for ranks in (1, *RANKS):
        row = predict(ranks, image, bandwidth, latency, exchange, selection)
        rows.append(row)
        parts = "  ".join(f"{row[part] / row['seconds']:>9.1%}" for part in PARTS)
        print(f"{ranks:>5}  {row['seconds']:>10.1f}  {parts}  {row['efficiency']:.1%}")
    print(
        f"\nAssumed: {IMAGES:,} images, {KEPT:.0%} kept; {BATCH} images a rank in every step; the input keeps up;\n"
        "every rank computes alike; gradients in float32, averaged in a ring after the backward pass (in truth\n"
        f"these overlap) at {bandwidth / 1e9:.2f} GB/s and {1e6 * latency:.0f} µs a message; losses and indices are\n"
        "gathered once an epoch at the speed measured between two; every rank selects for itself; testing and\n"
        "writing are left out."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


PARTS = ("compute", "averaging", "exchange", "selection")


def predict(
    ranks: int, image: float, bandwidth: float, latency: float, exchange: float, selection: float
) -> dict[str, float]:
    """Return the seconds of an epoch's parts, and the efficiency: one rank's seconds over ``ranks`` times these."""
    steps = KEPT * IMAGES / (BATCH * ranks)
    ring = 2 * (ranks - 1) / ranks * 4 * PARAMETERS / bandwidth + 2 * (ranks - 1) * latency
    parts = {
        "compute": KEPT * IMAGES * image / ranks,
        "averaging": steps * ring if ranks > 1 else 0.0,
        "exchange": exchange * 2 * (ranks - 1) / ranks,  # everyone receives all but its own share; two receive a half
        "selection": selection,
    }
    seconds = sum(parts.values())
    alone = KEPT * IMAGES * image + selection
    return {"ranks": ranks, "seconds": seconds, **parts, "efficiency": alone / (ranks * seconds)}


def run_seconds(processes: int) -> float:
    """Return the median seconds of an epoch's training steps, of a run in so many processes."""
    with tempfile.TemporaryDirectory() as results:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, "-m", "alignprune_exp.train", *RUN, f"paths.results={results}"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode != 0:
            sys.exit(done.stderr)
        (metrics,) = Path(results).glob("runs/*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        return statistics.median(row["seconds_train"] / row["kept_fraction"] for row in rows[1:])


def selection_seconds() -> float:
    """Return the seconds that closing an epoch and selecting for the next one take a rank, with DAS."""
    pruning = DynamicPruning(range(IMAGES), epochs=100, score="das", window=10)
    rng = np.random.default_rng(0)
    for _ in range(11):
        pruning.record(pruning.unseen(), torch.from_numpy(rng.random(IMAGES, np.float32)))
        start = time.perf_counter()
        pruning.end_epoch(rng.random())
        pruning.order()
        seconds = time.perf_counter() - start
    return seconds


def image_seconds() -> float:
    """Return the seconds of one 224-pixel image through ResNet-50, forward and backward, in bf16."""
    from torchvision.models import resnet50

    model = resnet50().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 224, 224).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).float().logsumexp(1).mean()
        loss.backward()

    step()
    return best(step, 2) / len(images)


def between_two() -> tuple[float, float, float]:
    """Return the seconds of averaging gradients, of exchanging an epoch's losses, and of a short message."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(exchanging, (port, queue), nprocs=2)
    return queue.get()


def exchanging(rank: int, port: int, queue: Any) -> None:
    """Be one of two processes; the first puts what it measured into ``queue``."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    processes = Processes()
    gradients, flag = torch.zeros(PARAMETERS), torch.zeros(1)
    share = int(KEPT * IMAGES) // 2
    index, losses = torch.arange(share), torch.zeros(share)
    with processes.joined("cpu"):
        measured = (
            best(lambda: dist.all_reduce(gradients), 5),
            best(lambda: (processes.gathered(index), processes.gathered(losses)), 5),
            best(lambda: dist.all_reduce(flag), 50),
        )
    if rank == 0:
        queue.put(measured)


if __name__ == "__main__":
    sys.exit(main())
