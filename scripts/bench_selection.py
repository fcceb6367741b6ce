"""Time selection, scoring and recording against the same rules written the plain way.

python scripts/bench_selection.py [--samples N] [--large] [--json FILE]

Every result is compared with the baseline's; the exit status is 1 if one differs. Speed alone never fails.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from alignprune_exp.pruning import PRUNERS, SCORES, Trajectories
from alignprune_exp.pruning.kmeans import cluster
from alignprune_exp.pruning.readout import RIDGE, readout
from alignprune_exp.pruning.seeding import generator
from alignprune_exp.pruning.selection import kept
from alignprune_exp.run import Run
from benchmarking import THREADS, Report, best, config, measured, memory_bandwidth, parser, peak_mb, reset_peak, walk

IMAGENET = 1_281_167
WINDOW, BATCH = 10, 256
EPOCH, EPOCHS = 11, 200  # any pruning epoch
GROUPS, ALPHA = 5, 0.9
TOLERANCE = 1e-5
MAIN_JOB: tuple[str, ...] = ()  # what the command line says
MOVED = 0.02  # the most that half precision may move DAS

Floats = NDArray[np.floating]


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(__doc__.splitlines()[0])
    command.add_argument("--samples", type=int, default=IMAGENET, help="of the comparison; default: %(default)s")
    command.add_argument("--large", action="store_true", help="also 100,000,000 samples, in at most 7 GB")
    options = command.parse_args(arguments)
    torch.set_num_threads(THREADS)
    report = Report("selection, scoring and recording")
    compare(report, options.samples)
    check_clusters(report, min(options.samples, 20_000))
    moved, count = half_precision()
    print(f"a half-precision bank moves DAS by {moved:.4f} at most, over {count:,} scores of the main job")
    report.check(moved <= MOVED, f"a half-precision bank moves DAS by more than {MOVED}")
    sizes = [size for size in (10**5, 10**6, 10**7) if size <= 8 * options.samples]
    scaling([*sizes, *([10**8] if options.large else [])])
    return report.finish(options.json)


def compare(report: Report, n: int) -> None:
    """Add a row for every step at ``n`` samples."""
    bank = filled(n, torch.float32)
    history = bank.history()
    losses_WN, reference_W = torch.stack(history.rows).numpy(), history.reference_W.numpy()
    loss_N = history.last_N.numpy().copy()

    def draw() -> np.random.Generator:
        return generator(0, "select", EPOCH)

    def select(pruner: str) -> None:
        made = PRUNERS[pruner]()
        selection, seconds, peak = measured(lambda: made.select(loss_N, EPOCH, EPOCHS, draw()))
        plain, named = {"infobatch": (infobatch, "NumPy"), "seta": (seta, "NumPy and scikit-learn's KMeans")}[pruner]
        expected = plain(loss_N, draw())
        same = np.array_equal(selection.indices, expected[0]) and np.array_equal(selection.weights, expected[1])
        if pruner == "seta":  # another clustering no worse than scikit-learn's will do
            drawn = draw().permutation(n)[: kept(n, made.ratio)]
            group = cluster(loss_N[drawn], GROUPS)
            ours, theirs = inertia(loss_N[drawn], group), expected[2]
            print(f"seta's inertia is {ours / theirs:.6f} x scikit-learn's")
            same = ours <= 1.001 * theirs and np.array_equal(selection.indices, chosen(drawn, group))
            same = same and bool((selection.weights == 1).all())
        report.check(same, f"{pruner}: another selection than the baseline's")
        report.add(pruner, n, seconds, peak, named, best(lambda: plain(loss_N, draw()), 1 if pruner == "seta" else 5))
        if pruner == "infobatch":
            shuffle = generator(0, "order", EPOCH)
            print(f"{'':12} the epoch's shuffle besides: {best(lambda: shuffle.permutation(selection.indices)):.4f} s")

    select("infobatch")
    select("seta")

    flat_WN = torch.from_numpy(losses_WN)
    read = best(flat_WN.sum)
    for name, (plain, named) in SCORERS.items():
        score = SCORES[name]()
        scores_N, seconds, peak = measured(lambda score=score: score(history))
        expected_N, plain_seconds, _ = measured(lambda plain=plain: plain(losses_WN, reference_W), 1)
        report.check(
            bool(np.abs(scores_N.numpy() - expected_N).max() <= TOLERANCE), f"{name}: other scores than the baseline's"
        )
        report.add(name, n, seconds, peak, named, plain_seconds)
        if name == "das":
            print(f"{'':12} {seconds / read:.0f} x one plain read of the bank, {read * 1e3:.1f} ms")
    record(report, n)
    read_out(report, min(n, 10**5))
    print(
        f"memory: a copy moves {memory_bandwidth() / 1e9:.1f} GB/s, reading the bank {flat_WN.nbytes / read / 1e9:.1f}"
    )


def record(report: Report, n: int) -> None:
    """Record an epoch of losses, batch by batch, in our bank and in a NumPy array."""
    order, losses = torch.randperm(n), torch.rand(n)
    batches = list(zip(order.split(BATCH), losses.split(BATCH), strict=True))
    ours, plain = [], []

    def record_ours() -> Trajectories:
        bank = Trajectories(n, WINDOW)
        start = time.perf_counter()
        for index, loss in batches:
            bank.record(index, loss)
        ours.append(time.perf_counter() - start)
        return bank

    def record_plainly() -> Floats:
        bank, last = np.full((WINDOW, n), np.nan, np.float32), np.full(n, np.nan, np.float32)
        start = time.perf_counter()
        for index, loss in batches:
            bank[0, index.numpy()] = loss.numpy()
            last[index.numpy()] = loss.numpy()
        plain.append(time.perf_counter() - start)
        return bank[0]

    bank, _, peak = measured(record_ours, 2)
    bank.end_epoch(None)
    report.check(np.array_equal(bank.history().rows[0].numpy(), record_plainly()), "record: another row")
    record_plainly()
    report.add("record", n, min(ours), peak, "NumPy, checking nothing", min(plain))


def read_out(report: Report, n: int, dimensions: int = 128, classes: int = 10) -> None:
    """Read each label out of all other samples' embeddings, and by scikit-learn's ridge regression."""
    from sklearn.linear_model import RidgeCV

    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    x = (rng.standard_normal((n, dimensions)) + np.eye(classes, dimensions)[labels]).astype(np.float32)

    def plain() -> Floats:
        alpha = RIDGE * float(np.square(x - x.mean(0, dtype=np.float64)).sum(0).mean())
        fit = RidgeCV([alpha], scoring="r2", store_cv_results=True).fit(x.astype(np.float64), np.eye(classes)[labels])
        foretold, own = fit.cv_results_[..., 0], np.eye(classes, dtype=bool)[labels]
        return foretold[own] - np.where(own, -np.inf, foretold).max(1)

    margins, seconds, peak = measured(lambda: readout(torch.from_numpy(x), torch.from_numpy(labels)).margins)
    expected, plain_seconds, _ = measured(plain, 1)
    report.check(bool(np.abs(margins.numpy() - expected).max() <= TOLERANCE), "readout: other margins than RidgeCV's")
    report.add("readout", n, seconds, peak, "scikit-learn's RidgeCV", plain_seconds)


def infobatch(scores_N: Floats, rng: np.random.Generator) -> tuple[NDArray[np.int64], Floats]:
    below = scores_N < np.mean(scores_N, dtype=np.float64)
    low, high = np.where(below)[0], np.where(~below)[0]
    stay = low[rng.choice(len(low), len(low) // 2, replace=False, shuffle=False)]
    indices = np.concatenate([high, stay])
    weights = np.concatenate([np.ones(len(high), np.float32), np.full(len(stay), 2, np.float32)])
    order = np.argsort(indices)
    return indices[order], weights[order]


def seta(scores_N: Floats, rng: np.random.Generator) -> tuple[NDArray[np.int64], Floats, float]:
    """Return indices, weights and the inertia of the clusters."""
    from sklearn.cluster import KMeans

    n = len(scores_N)
    drawn = rng.permutation(n)[: kept(n, PRUNERS["seta"]().ratio)]
    found = KMeans(GROUPS, random_state=0).fit(scores_N[drawn, None])
    rank = np.argsort(np.argsort(found.cluster_centers_[:, 0]))
    indices = chosen(drawn, rank[found.labels_])
    return indices, np.ones(len(indices), np.float32), inertia(scores_N[drawn], found.labels_)


def chosen(drawn: NDArray[np.integer], group: NDArray[np.integer]) -> NDArray[np.integer]:
    """SeTa's window over the clusters of the samples drawn."""
    window = round(GROUPS * ALPHA)
    first = EPOCH % (GROUPS - window + 1)
    return np.sort(drawn[np.isin(group, range(first, first + window))])


def pearson(losses_WN: Floats, reference_W: Floats) -> Floats:
    v_WN = losses_WN - losses_WN.mean(0, dtype=np.float64)
    r_W = reference_W - reference_W.mean()
    return (v_WN * r_W[:, None]).sum(0) / np.sqrt((v_WN**2).sum(0) * (r_W**2).sum())


def spearman(losses_WN: Floats, reference_W: Floats) -> Floats:
    from scipy.stats import rankdata

    return pearson(rankdata(losses_WN, axis=0), rankdata(reference_W))


def cosine(losses_WN: Floats, reference_W: Floats) -> Floats:
    v_WN = losses_WN.astype(np.float64)
    return (v_WN * reference_W[:, None]).sum(0) / np.sqrt((v_WN**2).sum(0) * (reference_W**2).sum())


def small_loss(losses_WN: Floats, reference_W: Floats) -> Floats:
    return -np.nanmean(losses_WN, 0)


SCORERS: dict[str, tuple[Callable[[Floats, Floats], Floats], str]] = {
    "das": (pearson, "NumPy"),
    "cosine": (cosine, "NumPy"),
    "small_loss": (small_loss, "NumPy"),
    "spearman": (spearman, "SciPy's rankdata, and NumPy"),
}


def filled(n: int, dtype: torch.dtype) -> Trajectories:
    """A full bank: losses of every sample that fall at a pace of its own, with noise."""
    bank = Trajectories(n, WINDOW, dtype=dtype)
    random = torch.Generator().manual_seed(0)
    size = 1 << 20
    for epoch in range(WINDOW):
        for start in range(0, n, size):
            index = torch.arange(start, min(start + size, n))
            pace = (index * 0.618034) % 1
            noise = torch.empty(len(index)).exponential_(generator=random)
            bank.record(index, 2.3 * (1 - pace * epoch / WINDOW) + 0.3 * noise)
        bank.end_epoch(2.3 - 0.15 * epoch)
    return bank


def inertia(scores: Floats, labels: NDArray[np.integer]) -> float:
    """Sum of squares within the clusters."""
    parts = (scores[labels == label].astype(np.float64) for label in range(labels.max() + 1))
    return float(sum(((part - part.mean()) ** 2).sum() for part in parts if len(part)))


def check_clusters(report: Report, n: int) -> None:
    """Compare the clusters of awkward scores with scikit-learn's."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    awkward = {
        "losses": rng.gamma(0.3, 2.0, n),
        "correlations, many at 3.0": np.where(rng.random(n) < 0.1, 3.0, np.tanh(rng.standard_normal(n))),
        "rounded to a tenth": rng.gamma(1.0, 1.0, n).round(1),
        "half of them 0": rng.gamma(1.0, 1.0, n) * (rng.random(n) < 0.5),
        "three values": rng.choice([0.0, 1.0, 5.0], n),
        "all equal": np.full(n, 0.7),
    }
    for name, values in awkward.items():
        scores = values.astype(np.float32)
        labels = cluster(scores, GROUPS)
        groups = min(GROUPS, len(np.unique(scores)))
        theirs = KMeans(groups, n_init=3, random_state=0).fit(scores[:, None].astype(np.float64)).inertia_
        report.check(inertia(scores, labels) <= 1.001 * theirs + 1e-6, f"seta: looser clusters of scores, {name}")
        sizes = np.bincount(labels, minlength=GROUPS)
        report.check(
            len(sizes) == GROUPS and (groups > 1 or np.ptp(sizes) <= 1), f"seta: uneven chunks of scores, {name}"
        )


def half_precision() -> tuple[float, int]:
    """Walk the main job, on digits; return how far DAS moves in half precision, and over how many scores."""
    run = Run(config(*MAIN_JOB))
    pruning = run.loop.pruning
    half = Trajectories(pruning.n, WINDOW, dtype=torch.float16)
    end_epoch, moved, count = pruning.end_epoch, 0.0, 0

    def end_both(reference_losses: torch.Tensor) -> None:
        nonlocal moved, count
        end_epoch(reference_losses)
        exact, history = pruning.scores("das"), pruning.trajectories.history()
        # Carried losses and all: what a bank of half precision would hold.
        half.record(torch.arange(pruning.n), history.rows[-1])
        half.end_epoch(reference_losses.mean().item())
        if pruning.epoch >= WINDOW:
            moved = max(moved, float(np.abs(SCORES["das"]()(half.history()).numpy() - exact).max()))
            count += pruning.n

    pruning.end_epoch = end_both  # type: ignore[method-assign]
    walk(run)
    torch.set_num_threads(THREADS)
    return moved, count


def scaling(sizes: Sequence[int]) -> None:
    """Print seconds a million samples, by size, with the bank in half precision."""
    print("\nseconds a million samples, half-precision bank, and peak memory of the process")
    for place, n in enumerate(sizes):
        reset_peak()
        seconds = seconds_at(n)
        if place == 0:
            print(f"{'samples':>12}" + "".join(f"{step:>11}" for step in seconds) + "    peak MB")
        print(f"{n:>12,}" + "".join(f"{x / n * 1e6:>11.4f}" for x in seconds.values()) + f"{peak_mb():>11,.0f}")


def seconds_at(n: int) -> dict[str, float]:
    start = time.perf_counter()
    bank = filled(n, torch.float16)
    seconds = {"filling": (time.perf_counter() - start) / WINDOW}
    history, times = bank.history(), 3 if n <= 10**7 else 1
    for name in SCORERS:
        score = SCORES[name]()
        seconds[name] = best(lambda score=score: score(history), times)
    scores_N = SCORES["das"]()(history).numpy()
    for name in ("infobatch", "seta"):
        pruner = PRUNERS[name]()
        seconds[name] = best(
            lambda pruner=pruner: pruner.select(scores_N, EPOCH, EPOCHS, generator(0, "", EPOCH)), times
        )
    return seconds


if __name__ == "__main__":
    sys.exit(main())
