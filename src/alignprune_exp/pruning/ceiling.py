"""How well losses could tell wrong labels, were it known of other samples which these are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PARTS = 5  # of the samples, each told by what the others have taught


def told_by_others(losses: NDArray[np.floating], clean: NDArray[np.bool_], rng: np.random.Generator) -> NDArray | None:
    """Return the log odds (n,) that each label is clean, by a logistic regression on its losses (n, W).

    It learns from four fifths of the samples what clean and wrong ones look like, and tells the last fifth, five times:
    no sample's own answer goes into its odds. Losses are taken over their deviation; what is linear in them loses
    nothing against boosted trees here.

    None where either kind has fewer samples than there are parts. Raises ValueError for losses that are not finite.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if min(clean.sum(), (~clean).sum()) < PARTS:
        return None
    parts = StratifiedKFold(PARTS, shuffle=True, random_state=int(rng.integers(2**32)))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return cross_val_predict(model, losses.astype(np.float64), clean, cv=parts, method="decision_function")
