"""Time curation on DuckDB against reading the same Parquet files with DuckDB alone.

python scripts/bench_curate.py [--documents N] [--large] [--memory 1GB] [--json FILE]

Scores are compared with the package's own; the exit status is 1 if one differs. Speed alone never fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from alignprune_exp.curate.steps import Order, curate
from alignprune_exp.pruning.scores import pearson
from benchmarking import THREADS, Report, best, parser, peak_mb, reset_peak

CHECKPOINTS, SHARDS, KEEP = 10, 8, 0.7
SHARD, ROW_GROUP = 1_250_000, 122_880  # documents, and rows, at the most
CLOSE = 1e-6
NODES, AIM = 100, 10**10

Floats = NDArray[np.float32]
Places = NDArray[np.int64]


def main(arguments: Sequence[str] | None = None) -> int:
    command = parser(str(__doc__).splitlines()[0])
    command.add_argument("--documents", type=int, default=10**6, help="default: %(default)s")
    command.add_argument(
        "--large", action="store_true", help="also 10 and 100 million documents, where nothing is shuffled"
    )
    command.add_argument("--memory", default="1GB", help="that DuckDB may use; default: %(default)s")
    options = command.parse_args(arguments)
    report = Report(f"curation, DAS over {CHECKPOINTS} checkpoints, DuckDB {duckdb.__version__}, {options.memory}")
    for layout in LAYOUTS:
        measure(report, layout, options.documents, options.memory)
    for documents in (10**7, 10**8) if options.large else ():
        for layout in ("rows", "checkpoints"):
            measure(report, layout, documents, options.memory)
    return report.finish(options.json)


def measure(report: Report, layout: str, documents: int, memory: str) -> None:
    """Add a row for one layout: the whole command, from files to files, beside a plain read of all columns."""
    with tempfile.TemporaryDirectory() as folder:
        losses = Path(folder) / "losses"
        losses.mkdir()
        reference = np.linspace(3, 1, CHECKPOINTS) + 0.2 * np.sin(np.arange(CHECKPOINTS))
        pq.write_table(
            pa.table({"checkpoint": np.arange(CHECKPOINTS), "loss": reference}), f"{folder}/reference.parquet"
        )
        LAYOUTS[layout](losses, documents)
        size = sum(path.stat().st_size for path in losses.iterdir())
        order = Order(
            losses=str(losses), reference=Path(folder) / "reference.parquet", score="das", keep=KEEP,
            out=Path(folder) / "keep", columns=None, gaps=False, skip=False, approximate=False, ids=False,
            engine="duckdb", ray_address=None, memory=memory, threads=THREADS,
        )  # fmt: skip
        order.out.mkdir()
        reset_peak()
        summary = curate(order, lambda line: None)
        peak = peak_mb()
        seconds = min(summary["seconds"], best(lambda: curate(order, lambda line: None), 2))
        values = "sum(losses[1])" if layout == "rows" else "max(checkpoint), sum(loss)"
        plain = duckdb.connect(config={"threads": THREADS, "memory_limit": memory})
        scan = best(lambda: plain.execute(f"SELECT max(id), {values} FROM '{losses}/*.parquet'").fetchall(), 3)
        report.add(layout, documents, seconds, peak, "DuckDB reading the same files", scan)
        rows = documents * CHECKPOINTS
        print(
            f"{'':12} {rows / seconds:,.0f} losses/s, {size / seconds / 1e6:,.0f} MB/s of Parquet; plainly read "
            f"{rows / scan:,.0f} losses/s, {size / scan / 1e6:,.0f} MB/s: {scan / seconds:.2f} of it"
        )
        follows(documents / seconds, size / documents)
        report.check(summary["layout"] == layout, f"{layout}: found as {summary['layout']}")
        report.check(right(order, documents, reference), f"{layout}: other scores than the package's")


def follows(speed: float, size: float) -> None:
    """Say what the speed, in documents a second, means for ``AIM`` documents on ``NODES`` such machines."""
    seconds = AIM / NODES / speed
    print(
        f"{'':12} so {AIM:.0e} documents on {NODES} nodes of {THREADS} such threads take {seconds / 3600:.2f} h, if "
        f"each has its share of the files, reads {size * speed / 1e6:,.0f} MB/s, and cuts its share by itself"
    )


def right(order: Order, documents: int, reference: NDArray[np.float64]) -> bool:
    """Return whether the scores of some documents are the package's, and whether as many are kept as should be."""
    chosen = np.random.default_rng(1).choice(documents, min(documents, 2000), replace=False)
    shares = [(share, np.intersect1d(share, chosen)) for share in shards(documents)]
    some = np.concatenate([there for _, there in shares])
    output = duckdb.connect()
    output.register("chosen", pa.table({"id": some * 3}))
    scores = f"'{order.out}/scores/*.parquet'"
    found = output.execute(f"SELECT score FROM {scores} JOIN chosen USING (id) ORDER BY id").fetchnumpy()["score"]
    losses_WB = torch.from_numpy(np.float64(np.hstack([drawn(share)[:, there - share[0]] for share, there in shares])))
    expected = pearson(losses_WB, torch.from_numpy(reference)).numpy()
    (kept,) = output.execute(f"SELECT count(*) FROM {scores} WHERE keep").fetchall()[0]
    return kept == int(KEEP * documents + 1e-9) and len(found) == len(some) and np.abs(found - expected).max() <= CLOSE


def shards(documents: int) -> list[Places]:
    """Return the documents of each shard."""
    return np.array_split(np.arange(documents), max(SHARDS, -(-documents // SHARD)))


def drawn(share: Places) -> Floats:
    """Return the losses (W, n) of a shard's documents, the same ones each time."""
    return np.random.default_rng(share[:1]).standard_gamma(2, (CHECKPOINTS, len(share)), np.float32)


def write(path: Path, **columns: object) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=ROW_GROUP)


def write_rows(folder: Path, documents: int) -> None:
    """Write (id, losses)."""
    for number, share in enumerate(shards(documents)):
        flat = pa.array(np.ascontiguousarray(drawn(share).T).ravel())
        offsets = pa.array(np.arange(0, len(flat) + 1, CHECKPOINTS, dtype=np.int32))
        write(folder / f"{number}.parquet", id=share * 3, losses=pa.ListArray.from_arrays(offsets, flat))


def write_checkpoints(folder: Path, documents: int) -> None:
    """Write (id, checkpoint, loss), a file a checkpoint, by id."""
    schema = pa.schema({"id": pa.int64(), "checkpoint": pa.int64(), "loss": pa.float32()})
    with ExitStack() as files:
        writers = [files.enter_context(pq.ParquetWriter(folder / f"{at}.parquet", schema)) for at in range(CHECKPOINTS)]
        for share in shards(documents):
            for at, loss in enumerate(drawn(share)):
                table = pa.table({"id": share * 3, "checkpoint": np.full(len(share), at), "loss": loss}, schema)
                writers[at].write_table(table, ROW_GROUP)


def write_blocks(folder: Path, documents: int) -> None:
    """Write (id, checkpoint, loss), each document in one file, by id and checkpoint."""
    write_whole(folder, documents, lambda rows: rows)


def write_files(folder: Path, documents: int) -> None:
    """Write (id, checkpoint, loss), each document in one file, which is in no order."""
    write_whole(folder, documents, np.random.default_rng(2).permutation)


def write_whole(folder: Path, documents: int, arranged: Callable[[Places], Places]) -> None:
    for number, share in enumerate(shards(documents)):
        sample, at = np.divmod(arranged(np.arange(len(share) * CHECKPOINTS)), CHECKPOINTS)
        write(folder / f"{number}.parquet", id=share[sample] * 3, checkpoint=at, loss=drawn(share)[at, sample])


def write_buckets(folder: Path, documents: int) -> None:
    """Write (id, checkpoint, loss) in no order."""
    losses_WN = np.hstack([drawn(share) for share in shards(documents)])
    order = np.random.default_rng(2).permutation(losses_WN.size)
    for number, places in enumerate(np.array_split(order, SHARDS)):
        at, sample = np.divmod(places, documents)
        write(folder / f"{number}.parquet", id=sample * 3, checkpoint=at, loss=losses_WN[at, sample])


LAYOUTS = {
    "rows": write_rows,
    "checkpoints": write_checkpoints,
    "blocks": write_blocks,
    "files": write_files,
    "buckets": write_buckets,
}

if __name__ == "__main__":
    sys.exit(main())
