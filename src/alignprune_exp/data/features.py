"""Features of samples that somebody has computed already."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..files import typed_path
from ..pruning.readout import WEAK, ridged
from .source import brief

TRIED = 5_000  # samples by which it is told whether features foretell labels
SHUFFLED = 199  # times that the labels are shuffled: features that say nothing of them pass once in 200


def read_features(key: str, file: str, n: int, rows: np.ndarray) -> np.ndarray:
    """Return the features (k, d), float32, of the samples ``rows`` (k,) out of a file in NumPy's format.

    It is mapped, not read whole, and unpickles nothing. Raises UsageError, of the ``key`` that names it, unless it has
    one row for each of ``n`` training samples, as the data set has them, and numbers alone, finite ones where they are
    asked for.
    """
    path, given = typed_path(file), f"{key}={file}"
    wanted = f"one row for each of the data set's {n:,} training samples"
    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        no_array = "it is no array of numbers as NumPy writes them"  # not NumPy's advice to load it unsafely
        reason = brief(error) if isinstance(error, OSError) else no_array
        raise UsageError(
            f"{given} cannot be read ({reason}); write it by alignprune embed or numpy.save, {wanted}, or leave it out"
        ) from None
    if not isinstance(held, np.ndarray) or held.ndim != 2 or held.dtype.kind not in "fiu" or held.shape[1] == 0:
        what = f"{held.dtype} of shape {held.shape}" if isinstance(held, np.ndarray) else "several arrays"
        raise UsageError(f"{given} has {what}; write numbers (n, d), {wanted}")
    if len(held) != n:
        raise UsageError(f"{given} has {len(held):,} rows; write {wanted}, in its order")
    with np.errstate(over="ignore"):  # what is too large for them is infinite, and refused
        features = held[rows].astype(np.float32)
    if not (finite := np.isfinite(features).all(1)).all():
        raise UsageError(f"{given} is not finite, as float32, in row {rows[int(finite.argmin())]}; mend it")
    return features


def check_foretells(given: str, features: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> None:
    """Raise UsageError where features (n, d), ``given`` as KEY=FILE, foretell labels (n,) no better than shuffled ones.

    A permutation test: least squares on them are to explain more of the labels than of each of `SHUFFLED` shufflings.
    """
    some = rng.permutation(len(labels))[:TRIED]
    whitened_ND, tried = _whitened(torch.from_numpy(features[some])), labels[some]
    found = _explained(whitened_ND, tried)
    if not all(found > _explained(whitened_ND, rng.permutation(tried)) for _ in range(SHUFFLED)):
        raise UsageError(
            f"{given} foretells the labels no better than shuffled ones: its rows are in another order than "
            "the data set's images, or say too little for labels so few or so wrong; write it by alignprune embed, "
            "with the features of another network, or leave it out"
        )


def _whitened(features: Tensor) -> Tensor:
    """Return centred features (N, D), such that squared sums of rows tell what a ridge regression explains."""
    x_ND = features.double() - features.mean(0, dtype=torch.float64)
    lower_DD = torch.linalg.cholesky(ridged(x_ND.T @ x_ND, WEAK))
    return torch.linalg.solve_triangular(lower_DD, x_ND.T, upper=False).T.contiguous()


def _explained(whitened_ND: Tensor, labels: np.ndarray) -> float:
    """Return how much of the indicators of the classes a ridge regression on the features explains."""
    sums_CD = whitened_ND.new_zeros(int(labels.max()) + 1, whitened_ND.shape[1])
    return sums_CD.index_add_(0, torch.from_numpy(labels), whitened_ND).square().sum().item()
