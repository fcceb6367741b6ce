"""What training shows of every sample, in any loop, without pruning anything.

Shape legend: n samples, B samples of a batch, U of them distinct, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .arguments import check_version, check_whole
from .bank import exact, outside
from .cleaning import NEVER_SEEN, first, table
from .coresets.criterion import count_forgotten

if TYPE_CHECKING:
    import pandas as pd


class TrajectoryLog:
    """Keeps, of each of ``n`` samples, what every forward pass of training shows of it.

    >>> log = TrajectoryLog(len(dataset))                                               # doctest: +SKIP
    >>> for index, x, y in loader:                                                      # doctest: +SKIP
    ...     logits = model(x)
    ...     log.update(index, logits, y)
    ...     loss = F.cross_entropy(logits, y); optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> log.suspects(top=200)                                                           # doctest: +SKIP

    Nothing needs to be said at the end of an epoch: every sum is over the times that a sample was passed.

    Args:
        n: number of samples.
        device: where the sums lie; best the model's.

    Raises ValueError for less than one sample.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        check_whole("n", n, 1)
        self.n, self.classes = n, 0

        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((n,), value, dtype=dtype, device=device)

        self._columns = {
            "seen": column(0, torch.int32),
            "label": column(-1, torch.int64),
            "other": column(-1, torch.int64),  # what it was last taken for when not for its label
            "last": column(torch.nan, torch.float32),
            "loss": column(0, exact(device)),
            "margin": column(0, exact(device)),
            "probability": column(0, exact(device)),
            "square": column(0, exact(device)),  # of the probability
            "right": column(False, torch.bool),  # when last seen
            "learnt": column(False, torch.bool),  # ever
            "forgotten": column(0, torch.int32),
        }

    @torch.no_grad()
    def update(self, index: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take note of one batch.

        A sample that a batch holds more than once counts as often, and as one event of learning or forgetting, in which
        it is right if it is right each time.

        Args:
            index: (B,) sample indices, as they came with the batch.
            logits: (B, C) of the training pass.
            labels: (B,) classes, as given.

        Raises:
            ValueError: other shapes, a logit that is not finite, a label that is no class, or not the only one
                that the sample has, here and before.
            IndexError: an index out of range.
        """
        index, labels = torch.as_tensor(index), torch.as_tensor(labels)
        self._check(index, logits, labels)
        if len(index) == 0:
            return
        kept = self._columns
        device = kept["seen"].device
        logits, y = logits.detach().float().to(device), labels.long().to(device)
        samples, of = index.long().to(device).unique(return_inverse=True)
        where = samples[of]
        self._check_one_label(where, y, torch.empty_like(y).index_copy_(0, of, y)[of])
        own = logits.gather(1, y[:, None])[:, 0]
        others = logits.scatter(1, y[:, None], -torch.inf)
        probability = logits.softmax(1).gather(1, y[:, None])[:, 0].to(kept["square"].dtype)
        losses = F.cross_entropy(logits, y, reduction="none")
        right = own > others.amax(1)
        sums = {"loss": losses, "margin": own - others.amax(1), "probability": probability, "square": probability**2}
        for name, values in sums.items():
            kept[name].index_add_(0, where, values.to(kept[name].dtype))
        kept["seen"].index_add_(0, where, torch.ones_like(where, dtype=torch.int32))
        kept["label"][where], kept["last"][where] = y, losses
        kept["other"][where[~right]] = others.argmax(1)[~right]
        now = torch.ones_like(samples, dtype=torch.int32).scatter_reduce(0, of, right.int(), "amin").bool()
        count_forgotten(kept["forgotten"], kept["learnt"], kept["right"], samples, now)
        self.classes = logits.shape[1]

    def frame(self) -> pd.DataFrame:
        """Return one row a sample, in data set order; NaN, or no label, where it was never seen.

        Columns:
            index, label: the sample; its label, as given.
            likely_label: the class that it was last taken for when not for its own; where that never was, its own.
            times_seen: passes.
            loss, mean_loss: the last, and the mean over all passes.
            margin: mean of the label's logit less the largest other one (the area under the margin, Pleiss et al.,
                NeurIPS 2020); wrong labels have low ones.
            confidence, variability: mean and standard deviation of the probability of the label (dataset cartography,
                Swayamdipta et al., EMNLP 2020).
            forgetting: times that it was taken for another class after it had been right (Toneva et al., ICLR 2019);
                infinity where it never was right.
        """
        import pandas as pd

        kept = self._arrays()
        seen = pd.Series(kept["seen"]).where(lambda times: times > 0)
        label = pd.Series(kept["label"], dtype="Int64").mask(seen.isna())
        mean = pd.Series(kept["probability"]) / seen
        forgetting = pd.Series(kept["forgotten"], dtype="float64")
        spread = (pd.Series(kept["square"]) / seen - mean**2).clip(lower=0) ** 0.5
        return pd.DataFrame(
            {
                "index": range(self.n),
                "label": label,
                "likely_label": pd.Series(kept["other"], dtype="Int64").mask(kept["other"] < 0, label),
                "times_seen": kept["seen"],
                "loss": kept["last"],
                "mean_loss": kept["loss"] / seen,
                "margin": kept["margin"] / seen,
                "confidence": mean,
                "variability": spread,
                "forgetting": forgetting.mask(~kept["learnt"], np.inf).mask(seen.isna()),
            }
        )

    def suspects(self, top: int = 200, *, checked: Mapping[int, int] | None = None) -> pd.DataFrame:
        """Return the ``top`` samples whose labels to look at, of those seen, as `DynamicPruning.suspects` does.

        ``likely_label`` is as in `frame`, so that it stays when a wrong label has been memorised.
        """
        kept = self._arrays()
        settled = np.where(kept["seen"] > 0, -kept["loss"] / kept["seen"].clip(1), np.nan)
        likely = np.where(kept["other"] < 0, kept["label"], kept["other"])
        found = table(kept["label"], settled, kept["last"], likely=likely, checked=checked)
        return first(found[found["flag"] != NEVER_SEEN], top, checked)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: tensors and numbers, safe for ``torch.load(weights_only=True)``."""
        return {"classes": self.classes, **{name: values.clone() for name, values in self._columns.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state over. Raises ValueError if it is of another number of samples, or of another version."""
        check_version(self.state_dict(), state)
        if (n := len(state["seen"])) != self.n:
            raise ValueError(f"the state is of {n} samples, this log of {self.n}; make it TrajectoryLog({n})")
        self.classes = state["classes"]
        for name, values in self._columns.items():
            values.copy_(state[name])

    def _arrays(self) -> dict[str, NDArray]:
        return {name: values.cpu().numpy().copy() for name, values in self._columns.items()}

    def _check_one_label(self, samples: Tensor, labels: Tensor, others: Tensor) -> None:
        """Raise ValueError unless labels (B,) of samples (B,) are as before, and as ``others`` (B,) of the batch."""
        before = self._columns["label"][samples]
        if (changed := (before >= 0) & (before != labels)).any():
            which = int(changed.nonzero()[0])
            raise ValueError(
                f"sample {int(samples[which])} has label {int(labels[which])} and had {int(before[which])} before; "
                "pass the index that came with the batch, and the labels as given"
            )
        if (another := others != labels).any():
            which = int(another.nonzero()[0])
            raise ValueError(
                f"sample {int(samples[which])} has labels {int(labels[which])} and {int(others[which])} in one batch; "
                "pass the index that came with the batch, and the labels as given"
            )

    def _check(self, index: Tensor, logits: Tensor, labels: Tensor) -> None:
        size = index.numel()
        if index.dim() != 1 or labels.shape != index.shape or logits.dim() != 2 or len(logits) != size:
            raise ValueError(
                f"index, logits and labels have shapes {tuple(index.shape)}, {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}; they must be (B,), (B, C) and (B,), the labels as classes"
            )
        if index.is_floating_point() or index.dtype == torch.bool or labels.is_floating_point():
            raise ValueError(f"index and labels are {index.dtype} and {labels.dtype}; both must be whole numbers")
        if size == 0:
            return
        classes = logits.shape[1]
        if classes < 2 or self.classes not in (0, classes):
            raise ValueError(f"the logits are of {classes} classes; {self.classes or 'two or more'} are due")
        if not torch.isfinite(logits).all():
            raise ValueError("a logit is NaN or infinite; lower the learning rate or clip gradients")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"labels go from {int(labels.min())} to {int(labels.max())}; the logits have {classes} classes"
            )
        if index.min() < 0 or index.max() >= self.n:
            raise outside(index, self.n)
