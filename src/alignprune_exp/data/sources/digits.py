"""scikit-learn's digits."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignprune_exp.data.images import Array
from alignprune_exp.data.source import Crop, DataSet, Images, Source, stratified
from alignprune_exp.pruning.seeding import generator


@dataclass(frozen=True, kw_only=True)
class Digits(DataSet):
    """1,797 images of 8x8, that ship with scikit-learn."""

    name: str
    crop: Crop = 0

    def open(self) -> Source:
        # The file of sklearn.datasets.load_digits, without the seconds that importing scikit-learn takes.
        (sklearn,) = importlib.util.find_spec("sklearn").submodule_search_locations  # type: ignore[union-attr, misc]
        rows = np.loadtxt(Path(sklearn) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
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
