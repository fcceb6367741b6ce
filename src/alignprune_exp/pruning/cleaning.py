"""Which labels to look at first: the cleaning score, and how sure one may be."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arguments import check_whole
from .logistic import likeliest, sigmoid

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

LEAST, MOST = 20, 200_000  # samples that a mixture is fitted to
MOST_SURE = 10.0  # log odds
ROUNDING = 1e-3  # of a loss that is 0
SURE = 0.5  # from where on a label is flagged
WRONG, MEMORISED, NEVER_SEEN = "wrong", "memorised", "never seen"  # flags


def within_class(scores: NDArray[np.floating], labels: NDArray) -> NDArray[np.float64]:
    """Return ``scores`` (n,) less the mean of their class, over its standard deviation; so no class is suspect whole.

    NaN, where a sample has no score, does not count and stays. A class with one score, or with equal ones, gets 0.
    Raises ValueError unless there is one of ``labels`` (n,), the given ones, for each score; see `check_classes`.

    >>> within_class(np.array([1.0, 3.0, 8.0, 8.0, 7.0]), np.array([0, 0, 1, 1, 2]))
    array([-1.,  1.,  0.,  0.,  0.])
    """
    check_classes(labels, len(scores))
    return standardised(scores, labels)


def standardised(scores: NDArray[np.floating], labels: NDArray) -> NDArray[np.float64]:
    """Return the same of labels that have been checked."""
    known = ~np.isnan(scores)
    classes, of = np.unique(labels[known], return_inverse=True)
    values, members = scores[known].astype(np.float64), np.bincount(of)
    least = np.full(len(classes), np.inf)
    np.minimum.at(least, of, values)
    away = values - least[of]  # exactly 0 throughout a class of equal scores
    away -= (np.bincount(of, away) / members)[of]
    deviation = np.sqrt(np.bincount(of, away**2) / members)[of]
    found = np.full(len(scores), np.nan)
    found[known] = np.divide(away, deviation, out=np.zeros_like(away), where=deviation > 0)
    return found


def check_classes(labels: NDArray, n: int) -> None:
    """Raise ValueError unless there are n labels (n,), none of which is missing, and all can be compared."""
    check_one_a_sample("labels", labels, n)
    if labels.dtype.kind not in "fO":
        return
    if missing := [place for place, label in enumerate(labels.tolist()) if _is_missing(label)]:
        raise ValueError(
            f"labels has {labels[missing[0]]} for sample {missing[0]}, and none for {len(missing)} in all; give each "
            "sample its label, or leave out those without"
        )
    try:
        np.unique(labels)
    except TypeError:
        kinds = " and ".join(sorted({type(label).__name__ for label in labels}))
        raise ValueError(f"labels are of {kinds}, which cannot be compared; give texts or whole numbers") from None


def _is_missing(label: Any) -> bool:
    """Whether it is None, NaN, or pandas' NA, which does not say whether it equals itself."""
    try:
        return label is None or not bool(label == label)
    except TypeError:
        return True


def _are_texts(values: NDArray) -> bool:
    return values.dtype.kind in "OU" and any(isinstance(value, str) for value in values.tolist())


def wrong_probability(
    mean_losses: NDArray[np.floating], labels: NDArray, known: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Return how sure one may be that each label is wrong, (n,) in [0, 1], out of each sample's mean loss (n,).

    It is the posterior of the upper of two Gaussians, fitted by EM to the logarithm of the losses, standardised
    `within_class`: a model's guess, which supposes that some labels are wrong, and in clean data means the hard
    samples. ``known`` (n,), 1 where a label is known to be wrong, 0 where it is right and NaN elsewhere, calibrates it:
    a logistic regression of what is known on the log odds, with a Gaussian prior at no change.

    NaN where a sample has no loss; everywhere where fewer than ``LEAST`` have one, nothing tells them apart, or some
    are below 0 by more than `ROUNDING`, and so have no logarithm, as log odds.
    """
    found, seen = np.full(len(labels), np.nan), ~np.isnan(mean_losses)
    if seen.sum() < LEAST or (mean_losses[seen] < -ROUNDING).any():
        return found
    losses = mean_losses[seen].astype(np.float64)
    least = max(1e-3 * float(np.median(losses)), np.finfo(np.float64).tiny)
    away = -within_class(-np.log(np.maximum(losses, least)), labels[seen])
    if not away.any():
        return found
    log_odds = np.clip(_log_odds_of_the_upper(away), -MOST_SURE, MOST_SURE)
    if known is not None and not np.isnan(known[seen]).all():
        log_odds = _calibrated(log_odds, known[seen])
    found[seen] = sigmoid(log_odds)
    return found


def _log_odds_of_the_upper(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log odds (n,), never falling in ``x`` (n,), that a sample is of the upper of two Gaussians."""
    sample = np.sort(x)[:: 1 + len(x) // MOST]
    mean, variance, weight = np.quantile(x, [0.25, 0.75]), np.full(2, x.var()), np.full(2, 0.5)
    if mean[0] == mean[1]:  # of one place the two would never part
        mean = np.array([x.min(), x.max()])

    def log_joint(at: NDArray[np.float64]) -> NDArray[np.float64]:
        """(2, len(at)), up to a constant."""
        spread = (at - mean[:, None]) ** 2 / variance[:, None]
        return np.log(weight)[:, None] - (np.log(variance)[:, None] + spread) / 2

    before = -np.inf
    for _ in range(500):
        joint = log_joint(sample)
        total = np.logaddexp(joint[0], joint[1])
        share = np.exp(joint - total)
        size = share.sum(1) + 1e-9
        weight, mean = size / size.sum(), share @ sample / size
        variance = (share * (sample - mean[:, None]) ** 2).sum(1) / size + 1e-3 * x.var()
        if total.mean() - before < 1e-7:
            break
        before = total.mean()
    joint = log_joint(np.clip(x, mean.min(), mean.max()))  # between the means the odds are monotone
    upper = int(mean.argmax())
    return joint[upper] - joint[1 - upper]


def _calibrated(log_odds: NDArray[np.float64], known: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return a * log_odds + b (n,), a >= 0, where a ~ N(1, 1) and b ~ N(0, 1) are likeliest by ``known`` (n,)."""
    told = ~np.isnan(known)
    x = np.stack([log_odds[told], np.ones(told.sum())])
    slope, constant = likeliest(x, known[told], np.array([1.0, 0.0]), np.ones(2))
    return max(slope, 0.0) * log_odds + constant


def table(
    labels: NDArray,
    settled: NDArray[np.floating],
    losses: NDArray[np.floating],
    *,
    likely: NDArray | None = None,
    checked: Mapping[int, Any] | None = None,
    by: NDArray[np.floating] | None = None,
) -> pd.DataFrame:
    """Return one row a sample, the most suspect label first, with the columns of `DynamicPruning.suspects`.

    Args:
        labels: as given, (n,).
        settled: minus the mean of each sample's losses, (n,); NaN where it was never seen.
        losses: the last ones, (n,).
        likely: what each sample was taken for, (n,), where that is known.
        checked: the right label of each sample that somebody has looked at, by its index.
        by: other numbers (n,) to list by, lowest first.

    Raises ValueError where these are not one a sample, missing, or of samples that there are not.
    """
    import pandas as pd

    n = len(settled)
    check_classes(labels, n)
    for name, values in {"losses": losses, "likely": likely, "by": by}.items():
        if values is not None:
            check_one_a_sample(name, values, n)
    if likely is not None and _are_texts(likely) != _are_texts(labels):
        raise ValueError(
            f"likely has {likely[0]!r} for sample 0, where its label is {labels[0]!r}: give both as texts or both as "
            "numbers"
        )
    sure = wrong_probability(-settled, labels, _known_to_be_wrong(labels, {} if checked is None else checked))
    score = within_class(settled, labels) if by is None else by
    flag = np.where(sure >= SURE, WRONG, "").astype(object)
    if likely is not None:
        flag[(sure >= SURE) & (likely == labels)] = MEMORISED
    flag[np.isnan(settled)] = NEVER_SEEN
    columns = {"index": np.arange(n), "label": labels, "likely_label": likely, "sure": sure, "loss": losses}
    frame = pd.DataFrame({name: values for name, values in columns.items() if values is not None})
    frame = frame.assign(flag=flag, score=score)
    return frame.sort_values(["score", "index"], kind="stable", na_position="last", ignore_index=True)


def _known_to_be_wrong(labels: NDArray, checked: Mapping[int, Any]) -> NDArray[np.float64]:
    """Return 1 where a label (n,) is ``checked`` to be wrong, 0 where it is right, and NaN elsewhere."""
    if not isinstance(checked, Mapping):
        raise ValueError(f"checked is of type {type(checked).__name__}; give the right labels by index, as {{17: 3}}")
    n = len(labels)
    known = np.full(n, np.nan)
    for index, right in checked.items():
        if not isinstance(index, int | np.integer) or not 0 <= index < n:
            raise ValueError(f"checked has sample {index!r}; there are {n}, counted from 0")
        if _is_missing(right):
            raise ValueError(f"checked says that sample {index} is {right}; leave it out where you do not know")
        if isinstance(right, str) != isinstance(labels[index], str):
            raise ValueError(
                f"checked says that sample {index} is {right!r}, where its label is {labels[index]!r}: give both as "
                "texts or both as numbers"
            )
        known[index] = labels[index] != right
    return known


def first(frame: pd.DataFrame, top: int, checked: Mapping[int, Any] | None = None) -> pd.DataFrame:
    """Return the ``top`` rows of a `table` that nobody has looked at. Raises ValueError for less than one."""
    check_whole("top", top, 1)
    return frame[~frame["index"].isin(list(checked or ()))].head(top).reset_index(drop=True)


def check_one_a_sample(what: str, values: NDArray | Tensor, n: int) -> None:
    """Raise ValueError unless there is one of the values for each of n samples."""
    if values.shape != (n,):
        raise ValueError(f"{what} has shape {tuple(values.shape)}; it must be ({n},), one a sample")


def array(values: Sequence[Any] | NDArray | Tensor) -> NDArray:
    """Return what one passes for labels or other values, one a sample, as a NumPy array; of bfloat16 in float32."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    plain = values.detach().cpu()
    return np.asarray(plain.float() if str(plain.dtype) == "torch.bfloat16" else plain)


def checksum(values: Sequence[Any] | NDArray | Tensor | None) -> str:
    """Return a checksum of what `array` returns, the same in any precision and width; "none" of None."""
    if values is None:
        return "none"
    plain = array(values)
    if (kind := plain.dtype.kind) in "iubf":
        written = plain.astype(np.float64 if kind == "f" else np.int64).tobytes()
    else:
        written = "\n".join(map(str, plain.tolist())).encode()
    return f"checksum {zlib.crc32(written):08x}"
