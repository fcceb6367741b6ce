"""Scores: one number a sample, higher means more worth keeping. The formulas first; `fast` has the same faster.

Shape legend: N samples, W epochs of the window, B samples of a block. An empty place in a trajectory is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from . import fast
from .arguments import is_number
from .bank import History
from .cleaning import standardised
from .logistic import told_by_others
from .noise_rate import PASSES
from .readout import Foretold, readout
from .seeding import generator
from .selection import check_epochs, epochs_of
from .transition import transition


def pearson(losses_WB: Tensor, reference_W: Tensor) -> Tensor:
    r"""Dynamic Alignment Score: the Pearson correlation of each trajectory with the reference's (AlignPrune).

    .. math:: \mathrm{DAS}_i = \frac{\sum_t (v_{i,t} - \bar v_i)(r_t - \bar r)}
                                    {\sqrt{\sum_t (v_{i,t} - \bar v_i)^2 \sum_t (r_t - \bar r)^2}}

    Args:
        losses_WB: trajectories v, (W, B) floating point; NaN where a sample was not seen.
        reference_W: reference trajectory r, (W,), or (W, B) for one reference a sample.

    Returns:
        (B,) in [-1, 1]; 0 where the correlation is undefined: fewer than 3 common epochs, or a constant side.

    >>> pearson(torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 2.0, 1.0]))
    tensor([ 1.0000, -0.8660])
    """
    v_WB, r_WB, count_B = common(losses_WB, to_unit_range(reference_W)[0])
    v_WB, v_varies = to_unit_range(v_WB)
    r_WB, r_varies = to_unit_range(r_WB)
    v_WB = torch.where(v_WB.isnan(), 0.0, v_WB - v_WB.nansum(0) / count_B)
    r_WB = torch.where(r_WB.isnan(), 0.0, r_WB - r_WB.nansum(0) / count_B)
    rho_B = (v_WB * r_WB).sum(0) / (v_WB.square().sum(0) * r_WB.square().sum(0)).sqrt()
    return torch.where(v_varies & r_varies & (count_B >= 3), rho_B.clamp(-1, 1), 0.0)


def spearman(losses_WB: Tensor, reference_W: Tensor) -> Tensor:
    """Spearman's rank correlation with the reference trajectory (W,); ties share their mean rank. As `pearson`."""
    order_W = reference_W.unique(return_inverse=True)[1].to(losses_WB.dtype)  # small numbers, in any precision
    v_WB, r_WB, _ = common(losses_WB, order_W.masked_fill(reference_W.isnan(), torch.nan))
    return pearson(ranks(v_WB), ranks(r_WB))


def cosine(losses_WB: Tensor, reference_W: Tensor) -> Tensor:
    """Cosine of the angle between trajectory and reference, over common epochs. Shapes as `pearson`.

    0 where it is undefined: fewer than 3 common epochs, or a side that is zero throughout.
    """
    v_WB, r_WB, count_B = common(losses_WB, reference_W)
    v_WB, r_WB = v_WB.nan_to_num(), r_WB.nan_to_num()
    v_size, r_size = v_WB.abs().amax(0), r_WB.abs().amax(0)
    v_WB, r_WB = v_WB / v_size, r_WB / r_size
    cos_B = (v_WB * r_WB).sum(0) / (v_WB.square().sum(0) * r_WB.square().sum(0)).sqrt()
    return torch.where((v_size > 0) & (r_size > 0) & (count_B >= 3), cos_B.clamp(-1, 1), 0.0)


def common(losses_WB: Tensor, reference_W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both trajectories as (W, B), NaN outside their common epochs, and the number (B,) of these."""
    reference_W = reference_W.to(losses_WB.device, losses_WB.dtype)
    r_WB = reference_W[:, None].expand_as(losses_WB) if reference_W.dim() == 1 else reference_W
    empty = losses_WB.isnan() | r_WB.isnan()
    return losses_WB.masked_fill(empty, torch.nan), r_WB.masked_fill(empty, torch.nan), (~empty).sum(0)


def to_unit_range(x_WB: Tensor) -> tuple[Tensor, Tensor]:
    """Map each column to [-1, 0], which no correlation notices, and say (B,) which columns vary.

    Exact on constants, free of underflow, and well conditioned: a column that varies has a sum of squares about its
    mean of at least ½. A column that does not vary becomes 0.
    """
    top_B = x_WB.nan_to_num(nan=-torch.inf).amax(0)
    range_B = top_B - x_WB.nan_to_num(nan=torch.inf).amin(0)
    varies_B = range_B > 0
    return (x_WB - top_B) / torch.where(varies_B, range_B, 1), varies_B


def ranks(x_WB: Tensor) -> Tensor:
    """Ranks within each column, ties at their mean, times 2 and about 0; NaN stays NaN."""
    rank_WB = torch.zeros_like(x_WB)
    for i in range(1, len(x_WB)):
        for j in range(i):
            above_B = (x_WB[i] - x_WB[j]).sign_()  # 0 beside a NaN
            rank_WB[i] += above_B
            rank_WB[j] -= above_B
    return rank_WB.masked_fill_(x_WB.isnan(), torch.nan)


class Score:
    """Ranks samples. Subclass it and implement ``__call__``; any pruner takes an instance.

    A score with ``aligned = True`` compares with the reference trajectory: it needs a reference loss every
    epoch, and before its window is full all samples are ranked by `Loss` instead, as the paper says.
    One with ``by_class = True`` goes by the given labels, one with ``by_truth = True`` by which of them are clean: a
    control, of what is best possible. One with ``told_first = True`` is told what it goes by before the first epoch,
    not at the end of one.

    Attributes:
        foretells: the function of embeddings, labels and ridge that returns what it is told, as a staticmethod:
            `readout`, or `transition`; it estimates the noise rate as well. None where it is told nothing of the kind.
        larger_counts: whether the larger of that rate and the one that trusted labels tell counts, not the latter.
    """

    name: str
    aligned: bool = False
    by_class: bool = False
    by_truth: bool = False
    foretells: ClassVar[Callable[..., Foretold] | None] = None
    larger_counts: bool = False
    told_first: bool = False

    def holdout_epochs(self, epochs: int) -> int:
        """Return how many epochs two networks are to train before a run of so many; see `HeldOut`."""
        return 0

    def due(self, epoch: int, epochs: int) -> bool:
        """Return whether what it goes by is to be told, by `DynamicPruning.tell`, before ``epoch`` of so many ends."""
        return self.told_first and epoch == 0

    def described(self) -> str:
        """Return its name, and of its settings those that are numbers: a path may be another elsewhere."""
        numbers = [f"{key}={value}" for key, value in vars(self).items() if is_number(value)]
        return f"{self.name}({', '.join(numbers)})" if numbers else self.name

    def __init_subclass__(cls) -> None:
        cls.name = cls.__dict__.get("name", cls.__name__)

    def __call__(self, history: History) -> Tensor:
        """Return (N,) float32 scores, NaN where a sample has none yet."""
        raise NotImplementedError


class Loss(Score):
    """The last recorded loss: what InfoBatch and SeTa rank by."""

    name = "loss"

    def __call__(self, history: History) -> Tensor:
        return history.last_N.clone()


class Aligned(Score):
    """A score that compares trajectories with the reference's, by ``formula``: of losses (W, B) and a reference (W,).

    Attributes:
        centred: whether the formula takes both about their means.
        ranked: whether it is one of their ranks.
    """

    aligned = True
    formula: ClassVar[Callable[..., Tensor]]
    centred: ClassVar[bool] = True
    ranked: ClassVar[bool] = False

    def __call__(self, history: History) -> Tensor:
        through = ranks if self.ranked else None
        return history.map(fast.one_pass(self.formula, history.reference_W, self.centred, through))


class DAS(Aligned):
    """The Dynamic Alignment Score of AlignPrune: `pearson` with the reference trajectory."""

    name = "das"
    formula = staticmethod(pearson)


class Spearman(Aligned):
    """The paper's ablation of DAS with `spearman`."""

    name = "spearman"
    formula = staticmethod(spearman)
    ranked = True


class Cosine(Aligned):
    """The paper's ablation of DAS with `cosine`."""

    name = "cosine"
    formula = staticmethod(cosine)
    centred = False


class Random(Score):
    """Control: uniform in [0, 1), redrawn every epoch."""

    name = "random"

    def __call__(self, history: History) -> Tensor:
        draw = generator(history.seed, "random score", history.epoch).random(len(history.last_N), "float32")
        return torch.from_numpy(draw).to(history.last_N.device)


class SmallLoss(Score):
    """Control: minus the mean of the losses recorded within the window; the last one if there is none."""

    name = "small_loss"

    def __call__(self, history: History) -> Tensor:
        means_N = history.map(fast.means)
        return torch.where(means_N.isnan(), history.last_N, means_N).neg_()


def settled(sum_N: Tensor, count_N: Tensor) -> Tensor:
    """Return minus the mean of ``count_N`` losses that add up to ``sum_N``; NaN where there are none."""
    return (sum_N / count_N).neg_().float()


class Settled(Score):
    """Control: minus the mean of all losses recorded so far; it remembers what the window has forgotten.

    Where a network memorises wrong labels, their recent losses fall to those of the others, and this stays apart.
    """

    name = "settled"

    def __call__(self, history: History) -> Tensor:
        return settled(history.sum_N, history.count_N)


class Cleaning(Score):
    """The cleaning score: `Settled`, standardised `within_class` of the given label, so no class is worst whole."""

    name = "cleaning"
    by_class = True

    def __call__(self, history: History) -> Tensor:
        return self.standardised(settled(history.sum_N, history.count_N), history)

    def standardised(self, values_N: Tensor, history: History) -> Tensor:
        if history.labels is None:
            raise ValueError(f"score={self.name!r} standardises within the class of the given label; pass labels=(n,)")
        found = standardised(values_N.cpu().numpy(), history.labels)
        return torch.from_numpy(found.astype(np.float32)).to(values_N.device)


class Curriculum(Score):
    """Easy first (Bengio et al., ICML 2009): how near a sample's last loss is to that which the run has come to.

    Of all losses, from the lowest at 0 to the highest at 1, that is the one at the share of the epochs that are done:
    what is kept moves from the easiest samples to the hardest. Equal losses stand at their mean place.
    """

    name = "curriculum"

    def __call__(self, history: History) -> Tensor:
        last_N = history.last_N.double()
        sorted_N = last_N.nan_to_num(nan=torch.inf).sort().values
        below_N, up_to_N = (torch.searchsorted(sorted_N, last_N, right=right) for right in (False, True))
        others = (last_N.isfinite().sum() - 1).clamp(min=1)
        place_N = (below_N + up_to_N - 1) / 2 / others
        return (place_N - history.progress).abs_().neg_().masked_fill_(last_N.isnan(), torch.nan).float()


def told(history: History) -> Tensor:
    """Return what was told of each sample (N,), NaN where nothing was."""
    return torch.full_like(history.last_N, torch.nan) if history.told_N is None else history.told_N


class Readout(Cleaning):
    """`Cleaning`, and what a `readout` of the network's embeddings foretells of each label, within the class too.

    The losses remember how a label was learned; the readout asks the other samples' labels, and so knows more in early
    epochs. Before it is told the first time this is `Cleaning` alone.

    Attributes:
        every: epochs, or below 1 a share of them, after which it is told anew: one pass of all samples each time.
    """

    name = "readout"
    foretells = staticmethod(readout)

    def __init__(self, *, every: float = 0.25) -> None:
        check_epochs("every", every)
        self.every = every

    def due(self, epoch: int, epochs: int) -> bool:
        return (epoch + 1) % epochs_of(self.every, epochs) == 0 and epoch + 1 < epochs

    def __call__(self, history: History) -> Tensor:
        scores_N, told_N = super().__call__(history), told(history)
        return scores_N if told_N.isnan().all() else scores_N + self.standardised(told_N, history)


class Features(Cleaning):
    """`Cleaning`, and what a `readout` of features that no label had a say in foretells of each, within the class too.

    They are `Patches` of images, or what a network that others have trained makes of the samples, and so there before
    anything is trained. The losses of the first `PASSES` over the data, which know less, count by the share of these
    that is done; a sample without losses goes by the features alone.

    Attributes:
        file: where whoever trains finds them, (n, d); None for `Patches`.
    """

    name = "features"
    foretells = staticmethod(readout)
    told_first = True

    def __init__(self, *, file: str | None = None) -> None:
        self.file = file

    def __call__(self, history: History) -> Tensor:
        known = min(1.0, history.count_N.double().mean().item() / PASSES)
        return known * super().__call__(history).nan_to_num(nan=0.0) + self.foretold(history)

    def foretold(self, history: History) -> Tensor:
        """Return what was told of each sample (N,) as far as it counts beside losses."""
        return self.standardised(told(history), history)


class Transition(Features):
    """As `Features`, where some classes are taken for others more often than these for them.

    It is told the log odds that each label is right, by a `transition` matrix, which compare samples of all classes: a
    class without wrong labels loses none. Of the noise rate that comes with them and the one that trusted labels tell
    the larger counts: each sees what the other does not.
    """

    name = "transition"
    foretells = staticmethod(transition)
    larger_counts = True

    def foretold(self, history: History) -> Tensor:
        return told(history)


class HeldOut(Score):
    """A score by the irreducible losses: of each sample under a network that has not trained on it, told at first.

    Attributes:
        holdout: epochs, or below 1 a share of them, that two networks are to train before the run, each on one half of
            the samples, so that each tells the losses of the other half. That is for whoever trains to do.
    """

    told_first = True

    def __init__(self, *, holdout: float = 0.1) -> None:
        check_epochs("holdout", holdout)
        self.holdout = holdout

    def holdout_epochs(self, epochs: int) -> int:
        return epochs_of(self.holdout, epochs)


class Reducible(HeldOut):
    """RHO-LOSS: the last loss less the irreducible one, which is what training can still gain by a sample.

    It is low for what is learned already, and for what nobody learns, as a wrong label (Mindermann et al., ICML 2022).
    They draw a large batch, pass it through the network and train on its best; here an epoch is the batch.
    """

    name = "reducible"

    def __call__(self, history: History) -> Tensor:
        return history.last_N - told(history)


class Irreducible(HeldOut):
    """Control: minus the irreducible loss, by which a wrong label that is never memorised shows itself."""

    name = "irreducible"

    def __call__(self, history: History) -> Tensor:
        return -told(history)


class Oracle(Score):
    """Control, the upper bound: 1 if the label is clean, else 0."""

    name = "oracle"
    by_truth = True

    def __call__(self, history: History) -> Tensor:
        return self.clean(history).float()

    def clean(self, history: History) -> Tensor:
        if history.clean_N is None:
            raise ValueError(f"score={self.name!r} needs to know which labels are clean; pass clean=mask")
        return history.clean_N


class Supervised(Oracle):
    """Control, the most that losses can tell: the odds that a label is clean, as the answers to others teach them.

    It reads the losses of the window and the mean of all, by `told_by_others`; a loss that is missing counts as the
    mean. As `Settled` where hardly any label is wrong, or hardly any right.
    """

    name = "supervised"

    def __call__(self, history: History) -> Tensor:
        clean_N, scores_N = self.clean(history), settled(history.sum_N, history.count_N)
        seen_N = ~scores_N.isnan()
        means_N = -scores_N[seen_N]
        losses = [means_N, *(torch.where(row.isnan(), means_N, row) for row in (each[seen_N] for each in history.rows))]
        rng = generator(history.seed, "supervised score", history.epoch)
        odds = told_by_others(torch.stack(losses).cpu().numpy(), clean_N[seen_N].cpu().numpy(), rng)
        if odds is not None:
            scores_N[seen_N] = torch.from_numpy(odds).to(scores_N)
        return scores_N


SCORES: dict[str, type[Score]] = {
    score.name: score
    for score in (
        Loss,
        DAS,
        Spearman,
        Cosine,
        Random,
        SmallLoss,
        Settled,
        Cleaning,
        Curriculum,
        Readout,
        Features,
        Transition,
        Reducible,
        Irreducible,
        Oracle,
        Supervised,
    )
}
