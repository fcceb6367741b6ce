"""Features of samples that somebody has computed already."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..errors import UsageError, reason_of
from ..pruning.readout import WEAK, readout

TRIED = 5_000  # samples by which it is told whether features foretell labels
LEAST = 3.0  # standard deviations by which they have to, over what they foretell of shuffled labels


def read_features(file: str, n: int, rows: np.ndarray) -> np.ndarray:
    """Return the features (k, d), float32, of the samples ``rows`` (k,) out of a file in NumPy's format.

    It is mapped, not read whole, and unpickles nothing. Raises UsageError unless it has one row for each of ``n``
    training samples, as the data set has them, and numbers alone, finite ones where they are asked for.
    """
    path, wanted = Path(file).expanduser(), f"one row for each of the data set's {n:,} training samples"
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = reason_of(error) if path.exists() else "it is not there"
        raise UsageError(
            f"score.file={file} cannot be read ({reason}); write it with numpy.save, {wanted}, or leave it out"
        ) from None
    if not isinstance(held, np.ndarray) or held.ndim != 2 or held.dtype.kind not in "fiu" or held.shape[1] == 0:
        what = f"{held.dtype} of shape {held.shape}" if isinstance(held, np.ndarray) else "several arrays"
        raise UsageError(f"score.file={file} has {what}; write numbers (n, d), {wanted}")
    if len(held) != n:
        raise UsageError(f"score.file={file} has {len(held):,} rows; write {wanted}, in its order")
    features = held[rows].astype(np.float32)
    if not (finite := np.isfinite(features).all(1)).all():
        raise UsageError(f"score.file={file} is not finite in row {rows[int(finite.argmin())]}; mend it")
    return features


def check_foretells(file: str, features: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """Raise UsageError where features (n, d) foretell labels (n,) no better than shuffled ones, as in another order."""
    some = rng.permutation(len(labels))[:TRIED]
    known = torch.from_numpy(features[some])
    right, wrong = (
        readout(known, torch.from_numpy(given), WEAK).margins > 0
        for given in (labels[some], rng.permutation(labels[some]))
    )
    share, by_chance = right.double().mean().item(), wrong.double().mean().item()
    deviation = np.sqrt((share * (1 - share) + by_chance * (1 - by_chance)) / len(some))
    if share - by_chance <= LEAST * deviation:
        raise UsageError(
            f"score.file={file} foretells {100 * share:.0f} % of the labels, and of shuffled ones "
            f"{100 * by_chance:.0f} %, which is no better; give its rows the order of the data set's images, as "
            "alignprune embed does"
        )
