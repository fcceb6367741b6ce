"""Time Prune4ReL's choice of half the samples, against its greedy rule written the plain way on fewer.

python scripts/bench_prune4rel.py [--samples N] [--classes C] [--json FILE]

The embeddings are made up: clusters in 512 dimensions, a few a class. The exit status is 1 if the choices differ.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from alignprune_exp.pruning import Evidence
from alignprune_exp.pruning.coresets.prune4rel import Prune4ReL
from benchmarking import THREADS, Report, parser, peak_mb, reset_peak

DIMENSIONS, CLUSTERS, SPREAD = 512, 5, 0.16  # spread of a cluster beside its centre's length of 1
FEW = 2_000


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--samples", type=int, default=50_000, help="default: %(default)s")
    command.add_argument("--classes", type=int, default=100, help="default: %(default)s")
    options = command.parse_args(arguments)
    torch.set_num_threads(THREADS)
    report = Report("Prune4ReL")
    few = min(FEW, options.samples)
    pruner = Prune4ReL(fraction=0.5)
    shown = made_up(few, options.classes)
    indices, seconds, peak, _ = timed(pruner, shown)
    start = time.perf_counter()
    expected = plainly(shown, pruner)
    report.add("prune4rel", few, seconds, peak, "the rule, in NumPy", time.perf_counter() - start)
    report.check(np.array_equal(indices, expected), "another choice than the rule's")
    _, seconds, peak, facts = timed(pruner, made_up(options.samples, options.classes))
    print(
        f"{options.samples:,} samples: {seconds:.1f} s, peak {peak:,.0f} MB, {facts['neighbours_mean']:.0f} neighbours "
        f"a sample, {facts['similarity_cut']:.1%} of their similarity cut off"
    )
    return report.finish(options.json)


def made_up(n: int, classes: int) -> Evidence:
    """Return confidences and embeddings of ``n`` samples, in clusters of one class each."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS * classes, DIMENSIONS), np.float32) / DIMENSIONS**0.5
    cluster = rng.integers(0, len(centres), n)
    spread = rng.standard_normal((n, DIMENSIONS), np.float32) * np.float32(SPREAD / DIMENSIONS**0.5)
    confidence = rng.uniform(0.3, 1, n)
    probabilities = np.full((n, classes), 0.0, np.float32)
    probabilities[:, 0] = confidence
    probabilities[:, 1] = 1 - confidence
    return Evidence(labels=cluster % classes, probabilities=probabilities, embeddings=centres[cluster] + spread)


def timed(pruner: Prune4ReL, shown: Evidence) -> tuple[np.ndarray, float, float, dict[str, float]]:
    reset_peak()
    start = time.perf_counter()
    choice = pruner.choose(shown, np.random.default_rng(1))
    return choice.indices, time.perf_counter() - start, peak_mb(), choice.facts


def plainly(shown: Evidence, pruner: Prune4ReL) -> np.ndarray:
    """Return the choice (M,), ascending, by the rule's own words: every gain anew at every turn."""
    assert shown.probabilities is not None
    assert shown.embeddings is not None
    n, confidence = len(shown.labels), shown.probabilities.max(1).astype(np.float64)
    place = np.empty(n, np.int64)
    place[np.random.default_rng(1).permutation(n)] = np.arange(n)  # ties go to the first in this order
    unit = shown.embeddings / np.linalg.norm(shown.embeddings, axis=1, keepdims=True)
    similarity = 0.5 + 0.5 * (unit @ unit.T).astype(np.float64)
    np.fill_diagonal(similarity, 0)
    similarity[similarity <= pruner.tau] = 0
    reach, free, chosen = np.zeros(n), np.ones(n, bool), []
    while len(chosen) < round(pruner.fraction * n):
        for label in np.unique(shown.labels):
            mine = np.flatnonzero(free & (shown.labels == label))
            if len(mine) and len(chosen) < round(pruner.fraction * n):
                gain = np.tanh((reach + confidence) / pruner.eta) - np.tanh(reach / pruner.eta)
                pick = mine[np.lexsort((place[mine], -gain[mine]))[0]]
                chosen.append(pick)
                free[pick] = False
                reach += similarity[pick] * confidence[pick]
                reach[pick] += confidence[pick]
    return np.sort(np.array(chosen))


if __name__ == "__main__":
    sys.exit(main())
