"""scikit-learn's digits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ...pruning.seeding import generator
from ..images import Array
from ..source import Crop, DataSet, Images, Source, stratified


def shipped(*parts: str) -> Path:
    """Return a file of scikit-learn's data sets, without the seconds that importing it takes."""
    (sklearn,) = find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr, misc]
    return Path(sklearn, "datasets", *parts)


@dataclass(frozen=True, kw_only=True)
class Digits(DataSet):
    """1,797 images of 8x8, that ship with scikit-learn."""

    name: str
    crop: Crop = 0

    def open(self) -> Source:
        rows = np.loadtxt(shipped("data", "digits.csv.gz"), delimiter=",")  # as sklearn.datasets.load_digits does
        images = np.rint(rows[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
        labels = rows[:, -1].astype(np.int64)
        test = stratified(labels, round(0.2 * len(labels)), generator(0, "digits test split"))
        train = np.setdiff1d(np.arange(len(labels)), test)
        return Source(
            name=self.name,
            classes=tuple(str(digit) for digit in range(10)),
            train=Images(labels[train], Array(images[train])),
            test=Images(labels[test], Array(images[test])),
            fingerprint=hashlib.sha256(images.tobytes() + labels.tobytes() + test.tobytes()).hexdigest(),
            labels_clean=True,
        )
