"""What samples without class labels are for: training, the reference set, evaluation; and which are to be corrupted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config import NOISE, NOTHING_HELD_OUT, Trusted
from ..errors import UsageError
from ..pruning.seeding import generator
from .noise import Clean
from .split import reference_count, some

if TYPE_CHECKING:
    from ..config import Config


@dataclass(frozen=True)
class Parts:
    """The samples of each role, by their rows in the data.

    Attributes:
        train: int64 (n,).
        reference: int64 (R,), out of the same rows and never trained on, but at the end with ``reference.train``.
        test: int64 (m,), out of the rows to evaluate on, the same for every seed.
        wrong: which of ``train`` are to be corrupted, bool (n,).
        doubted: which of ``reference`` are, bool (R,).
        known: whether those are all that are wrong.
    """

    train: np.ndarray
    reference: np.ndarray
    test: np.ndarray
    wrong: np.ndarray
    doubted: np.ndarray
    known: bool

    @classmethod
    def of(cls, config: Config, n: int, n_test: int, clean: bool) -> Parts:
        """Draw them from ``n`` rows to train on and ``n_test`` to evaluate on: subset, reference, then noise.

        ``clean`` says that the data count as clean where no noise is injected. Raises UsageError for sizes that do not
        fit, and noise that is of class labels.
        """
        dataset, seed = config.dataset, config.seed
        held = config.reference if isinstance(config.reference, Trusted) else NOTHING_HELD_OUT
        if held.per_class:
            raise UsageError(
                f"reference.per_class=true needs class labels, and task={config.task.name} has none; use "
                "reference=trusted"
            )
        rows = some("subset", np.zeros(n, np.int64), dataset.subset, 2, generator(seed, "subset"))
        count = reference_count(held.size, len(rows)) if held.size else 0
        chosen = np.sort(generator(seed, "reference").choice(len(rows), count, replace=False))
        train, reference = np.delete(rows, chosen), rows[chosen]
        noise = NOISE.make(config.noise)
        try:
            wrong = noise.chosen(len(train), generator(seed, "corrupted"))
        except ValueError as error:
            raise UsageError(f"noise={config.noise.name}: {error}") from None
        doubted = np.zeros(count, bool)
        doubted[generator(seed, "reference noise").choice(count, round(held.noise * count), replace=False)] = True
        if held.train:
            train, wrong = np.concatenate([train, reference]), np.concatenate([wrong, np.zeros(count, bool)])
        test = some("test_subset", np.zeros(n_test, np.int64), dataset.test_subset, 1, generator(0, "test subset"))
        return cls(train, reference, test, wrong, doubted, clean or not isinstance(noise, Clean))

    @property
    def corrupted(self) -> np.ndarray | None:
        """Which of ``train`` are wrong, bool (n,); None where that is unknown."""
        return self.wrong if self.known else None

    @property
    def reference_noise(self) -> float | None:
        """The wrong share of the reference set, where that is known."""
        return float(self.doubted.mean()) if self.known and len(self.doubted) else None
