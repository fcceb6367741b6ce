"""Dynamic pruning for a training loop of one's own; the experiments drive the same object."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import Dataset, IterableDataset, Sampler

from .bank import Trajectories
from .cleaning import within_class
from .coresets import Criterion
from .pruners import PRUNERS
from .scores import SCORES, Loss, Score, settled
from .seeding import generator
from .selection import Pruner, Selection, settings

if TYPE_CHECKING:
    import pandas as pd

NEVER_SEEN = 3.0  # the score that a sample without a score is ranked by
NO_STEP = torch.iinfo(torch.int64).max


class NonFiniteLossError(ValueError):
    """Training has diverged: ``what`` became NaN or infinite, in ``epoch``, at ``step`` where it is a training loss."""

    def __init__(self, epoch: int, step: int | None = None, what: str = "the loss") -> None:
        self.epoch, self.step = epoch, step
        where = f"at the end of epoch {epoch}" if step is None else f"in epoch {epoch}, step {step}"
        super().__init__(f"{what} became NaN or infinite {where}; lower the learning rate or clip gradients")


class Indexed(Dataset[tuple[int, Any]]):
    """A map-style data set whose items come with their index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class DynamicPruning(Indexed):
    """Selects the samples of every epoch, records their losses, weights their gradients.

    >>> pruning = DynamicPruning(dataset, epochs=200, pruner="infobatch", score="das")  # doctest: +SKIP
    >>> loader = DataLoader(pruning, batch_size=128, sampler=pruning.sampler)           # doctest: +SKIP
    >>> for epoch in range(200):                                                        # doctest: +SKIP
    ...     for index, (x, y) in loader:
    ...         loss = pruning.update(index, F.cross_entropy(model(x), y, reduction="none"))
    ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
    ...     pruning.end_epoch(reference_loss)
    >>> pruning.report(labels).sort_values("score")                                     # doctest: +SKIP

    Without trusted labels the reference may be the training set's own mean loss, and from some epoch on those of its
    samples that seem cleanest, chosen anew every few epochs; ``evaluate`` is your mean loss in eval mode:

    >>> from alignprune_exp.pruning.reference import most_trusted                       # doctest: +SKIP
    >>> chosen = []                                                                     # doctest: +SKIP
    >>> for epoch in range(200):                                                        # doctest: +SKIP
    ...     ...
    ...     pruning.end_epoch(evaluate(chosen) if len(chosen) else pruning.trajectories.population_mean())
    ...     if epoch % 10 == 4:
    ...         chosen = most_trusted(pruning.scores("small_loss"), labels, size, np.random.default_rng(epoch))
    ...         pruning.change_reference(evaluate(chosen))

    What is chosen once, by a `Criterion`, is trained on with ``pruner=Fixed(indices=chosen.indices)``.

    A pickled copy, as loader workers get it, is the indexed data set alone; save a run with ``state_dict``.

    Args:
        dataset: any map-style data set.
        epochs: number of epochs T of training.
        pruner: a `Pruner`, or the name of one out of ``PRUNERS``.
        score: a name out of ``SCORES`` or a `Score`.
        window: epochs N of a trajectory; 3 or more, and for scores that compare with the reference
            N + 1 <= delta * T.
        unseen: what becomes of a trajectory where its sample was pruned; see `Trajectories`.
        saved: share of the training that the whole run is to save, by `Pruner.saving`.
        seed: seed of every random choice.
        clean: mask (n,), true where the label is clean; needed by ``score="oracle"`` alone.
        device: where losses, trajectories and weights lie; best the model's.
        bank_dtype: of the trajectories; ``torch.float16`` halves their memory.
        bank: the ``trajectories`` of an earlier phase of training, to go on with: its epochs count on, so that no
            random choice is made again. It takes the place of ``window``, ``unseen``, ``device`` and ``bank_dtype``.
        divided_by_caller: say so where several processes train, and you divide `order` among them (or mean them all
            to train on all of it) and ``record`` in each what the others observed. The sampler does neither.
        **pruner_settings: of the pruner named, such as ``ratio`` and ``delta``.

    Raises:
        TypeError: the data set has no length or no items by index.
        ValueError: an unknown name, or a value out of range.
    """

    def __init__(
        self,
        dataset: Any,
        epochs: int,
        pruner: str | Pruner = "infobatch",
        score: str | Score = "das",
        *,
        window: int = 10,
        unseen: str = "carry",
        saved: float | None = None,
        seed: int = 0,
        clean: Sequence[bool] | np.ndarray | Tensor | None = None,
        device: torch.device | str = "cpu",
        bank_dtype: torch.dtype = torch.float32,
        bank: Trajectories | None = None,
        divided_by_caller: bool = False,
        **pruner_settings: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not all(hasattr(dataset, f"__{a}__") for a in ("len", "getitem")):
            raise TypeError(
                f"{type(dataset).__name__} cannot be pruned: samples are chosen by index, "
                "so pass a map-style data set with __len__ and __getitem__"
            )
        super().__init__(dataset)
        self.n = len(dataset)
        if self.n == 0:
            raise ValueError("the data set is empty")
        if epochs < 1:
            raise ValueError(f"epochs={epochs} is out of range; use 1 or more")
        self.seed, self.divided_by_caller = seed, divided_by_caller
        self.pruner = make_pruner(pruner, **pruner_settings)
        if saved is not None:
            self.pruner = self.pruner.saving(saved, epochs)
        self.score = make_score(score)
        self.trajectories = bank or Trajectories(self.n, window, unseen, device, bank_dtype)
        if self.trajectories.n != self.n:
            raise ValueError(f"bank is of {self.trajectories.n} samples, and the data set has {self.n}; pass its own")
        device = self.trajectories.last_N.device
        self.first, self.epochs = self.epoch, self.epoch + epochs
        self._check_window()
        self.clean: Tensor | None = None
        if clean is not None:
            self.clean = torch.as_tensor(clean, dtype=torch.bool, device=device)
            if self.clean.shape != (self.n,):
                raise ValueError(f"clean has shape {tuple(self.clean.shape)}; it must be ({self.n},), one a sample")
        self.times_selected = np.zeros(self.n, np.int32)
        self._memory = np.full((self.pruner.memory, self.n), np.nan, np.float32)
        self.sampler = EpochSampler(self)
        self._step = 0
        self.bad_step = torch.full((), NO_STEP, device=device)  # the first with a loss that is not finite
        self._selection: Selection | None = None
        self._weights: Tensor | None = None
        self._scores = self._rank()

    @property
    def epoch(self) -> int:
        """The running epoch, from 0; the coming one between ``end_epoch`` and the next ``update``."""
        return self.trajectories.epoch

    @property
    def ranked_by(self) -> str | None:
        """Name of the score that the running epoch's selection was ranked by, if scores had a say."""
        return self._ranking_score().name if self.selection.ranked else None

    @property
    def ranking(self) -> np.ndarray:
        """The scores (n,) that the running epoch's selection was ranked by; NaN where a sample had none."""
        return self._scores

    @property
    def selection(self) -> Selection:
        """The running epoch's selection: a function of the seed, the epoch and the scores before it."""
        if self._selection is None:
            if self.epoch >= self.epochs:
                raise ValueError(f"all {self.epochs} epochs are done; make a new DynamicPruning to train on")
            scores = np.nan_to_num(self._scores, nan=NEVER_SEEN)
            epoch, epochs = self.epoch - self.first, self.epochs - self.first
            rng = generator(self.seed, "select", self.first + self.pruner.address(epoch, self.n))
            self._selection = self.pruner.select(scores, epoch, epochs, rng)
        return self._selection

    def order(self) -> np.ndarray:
        """Return the running epoch's samples (M,), shuffled."""
        return generator(self.seed, "order", self.epoch).permutation(self.selection.indices)

    def update(self, index: Tensor, loss: Tensor, observed: Tensor | None = None) -> Tensor:
        """Record the losses of one batch and return the loss to differentiate.

        Args:
            index: (B,) sample indices, as they came with the batch.
            loss: (B,) training loss of each sample, unreduced.
            observed: (B,) what to record, where that is not the training loss.

        Returns:
            The weighted sum of ``loss`` divided by B, a scalar.

        Raises:
            ValueError: a reduced loss, a sample observed twice or not selected in this epoch, or several processes
                that nobody divides the samples among.
            IndexError: an index out of range.
        """
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if processes > 1 and not self.divided_by_caller:
            raise ValueError(
                f"each of {processes} processes would train on all of the epoch's samples, and not on a share of them; "
                "train in one process, or divide order() among them, record() what the others observe, and pass "
                "divided_by_caller=True"
            )
        index = torch.as_tensor(index)
        if loss.shape != index.shape or loss.dim() != 1:
            raise ValueError(
                f"the loss has shape {tuple(loss.shape)} for {index.numel()} samples: pruning needs one value "
                "a sample; compute it with reduction='none'"
            )
        recorded = (loss if observed is None else observed).detach()
        if recorded.shape != loss.shape:
            raise ValueError(f"observed has shape {tuple(recorded.shape)}, the loss {tuple(loss.shape)}")
        index = self.trajectories.place(index)
        weights = self._weights_of(index)
        self.record(index, recorded)
        if observed is not None:
            self._watch(loss.detach())
        self._step += 1
        return (loss * weights.to(loss.device)).sum() / len(loss)

    def unseen(self) -> Tensor:
        """Return the samples (K,) not yet observed in the running epoch, for ``unseen="refresh"``."""
        return self.trajectories.unseen_samples()

    def record(self, index: Tensor, losses: Tensor) -> None:
        """Record the losses (B,) of samples ``index`` (B,) that were forwarded without being trained on."""
        self.trajectories.record(torch.as_tensor(index), losses.detach())
        self._watch(losses.detach())

    def end_epoch(self, reference_loss: float | Tensor | None = None) -> None:
        """Close the epoch and score every sample for the next one.

        Args:
            reference_loss: mean loss of the trusted reference set after this epoch, in eval mode; scores that
                compare with the reference need it.

        Raises:
            NonFiniteLossError: a loss of this epoch, or the reference loss, was NaN or infinite.
            ValueError: the reference loss is missing, nothing was recorded, a sample was observed twice, or
                ``unseen="refresh"`` misses one.
        """
        self.check_finite()
        if reference_loss is None:
            if self.score.aligned and self.pruner.uses_scores:
                raise ValueError(
                    f"score={self.score.name!r} compares with the reference set: pass its mean loss to end_epoch()"
                )
        elif not math.isfinite(reference_loss := float(reference_loss)):
            raise NonFiniteLossError(self.epoch, what="the reference loss")
        selected = self.selection.indices
        self.trajectories.end_epoch(reference_loss)
        self.times_selected[selected] += 1
        self._step = 0
        self._selection = self._weights = None
        if self.score.aligned and self.epoch == self.trajectories.window:
            self._memory.fill(np.nan)
        self._scores = self.pruner.digest(self._rank(), selected, self._memory)

    def change_reference(self, reference_loss: float | Tensor) -> None:
        """Say, between two epochs, that the reference set is another one from now on.

        The reference trajectory becomes a chain, as a price index does when its basket changes: its past is shifted
        by one constant so that it ends at the new set's loss. Each step from epoch to epoch is then measured on one
        set, and there is no jump that comes from the change alone. `pearson` and `spearman` do not notice the shift of
        a whole trajectory, so the ranking made at the last ``end_epoch`` stays valid.

        Args:
            reference_loss: the new set's mean loss, evaluated with the weights of the last ``end_epoch``.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
            RuntimeError: an epoch is running.
            ValueError: the last epoch ended without a reference loss to go on from.
        """
        if not math.isfinite(reference_loss := float(reference_loss)):
            raise NonFiniteLossError(self.epoch - 1, what="the reference loss")
        self.trajectories.link_reference(reference_loss)

    def check_finite(self) -> None:
        """Wait for the device; raise NonFiniteLossError if a loss of the running epoch was NaN or infinite."""
        step = int(self.bad_step)
        if step < NO_STEP:
            raise NonFiniteLossError(self.epoch, step)

    def scores(self, score: str | Score) -> np.ndarray:
        """Return any score (n,) of the finished epochs, NaN where a sample has none.

        Raises RuntimeError within an epoch, and ValueError where the score needs what is not known.
        """
        return self.several_scores([score])[0]

    def several_scores(self, scores: Sequence[str | Score]) -> np.ndarray:
        """Return K scores (K, n) as `scores` does, in one copy from the device."""
        history = self.trajectories.history(self.clean, self.seed)
        found = []
        for score in map(make_score, scores):
            values = score(history)
            if not isinstance(values, Tensor) or values.shape != (self.n,):
                what = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"{type(score).__name__} returned {what}; a score returns a tensor ({self.n},)")
            found.append(values)
        return torch.stack(found).cpu().numpy()

    def report(self, labels: Sequence[Any] | np.ndarray | Tensor | None = None) -> pd.DataFrame:
        """Return one row a sample, in data set order; ``.sort_values("score")`` puts first what to look at first.

        Columns:
            score: the cleaning score, lowest where a label seems wrong: ``settled``, standardised `within_class` where
                the given ``labels`` (n,) are passed. It is the same whatever score ranks: the lowest losses are the
                cleanest samples', and once a network memorises, alignment finds wrong labels little better than chance.
            loss: the last recorded one.
            ranking: the score that the running epoch's selection was ranked by.
            times_selected: in finished epochs.

        NaN where a sample was never seen; ``score`` and ``ranking`` are as of the latest ``end_epoch``.
        Raises ValueError for another number of labels.
        """
        import pandas as pd

        bank = self.trajectories
        loss = bank.last_N.cpu().numpy().copy()
        score = settled(bank.sum_N, bank.count_N).cpu().numpy()
        if labels is not None:
            score = within_class(score, np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels))
        return pd.DataFrame(
            {
                "score": score,
                "loss": loss,
                "ranking": np.where(np.isnan(loss), np.nan, self._scores),
                "times_selected": self.times_selected.copy(),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, mid-epoch too: tensors and numbers, safe for ``torch.load(weights_only=True)``."""
        return {
            "first": self.first,
            "trajectories": self.trajectories.state_dict(),
            "scores": torch.from_numpy(self._scores),
            "times_selected": torch.from_numpy(self.times_selected),
            "step": self._step,
            "bad_step": self.bad_step,
            "memory": torch.from_numpy(self._memory),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a run with the same arguments.

        Raises ValueError if it is of another number of samples, window, or version of this package.
        """
        self.trajectories.load_state_dict(state["trajectories"])
        self.first, self.epochs = state["first"], self.epochs - self.first + state["first"]
        self._scores = state["scores"].numpy().copy()
        self.times_selected = state["times_selected"].numpy().copy()
        self._step = state["step"]
        self.bad_step.copy_(state["bad_step"])
        self._memory = state["memory"].numpy().copy()
        self._selection = self._weights = None

    def __reduce__(self) -> tuple[type[Indexed], tuple[Any]]:
        return Indexed, (self.dataset,)

    def _check_window(self) -> None:
        """Raise ValueError for a window that is full only when pruning is over, where the score needs a full one."""
        if not (self.score.aligned and self.pruner.uses_scores):
            return
        window, epochs = self.trajectories.window, self.epochs - self.first
        missing, last = window - self.first, self.pruner.pruning_epochs(epochs)
        if missing >= last:
            enough = next(more for more in itertools.count(epochs) if self.pruner.pruning_epochs(more) > missing)
            shorter = f"a window of at most {self.first + last - 1}, or " if self.first + last > 3 else ""
            raise ValueError(
                f"a window of {window} epochs leaves {self.score.name} none to act in, since pruning lasts delta * "
                f"epochs, here {last} of {epochs}; use {shorter}{enough} epochs or more"
            )

    def _watch(self, losses: Tensor) -> None:
        """Note the first step with a loss that is not finite, without waiting for the device."""
        fine = torch.isfinite(losses).all().to(self.bad_step.device) | (self.bad_step < NO_STEP)
        self.bad_step = torch.where(fine, self.bad_step, self._step)

    def _ranking_score(self) -> Score:
        return Loss() if self.score.aligned and self.epoch < self.trajectories.window else self.score

    def _rank(self) -> np.ndarray:
        return self.scores(self._ranking_score())

    def _weights_of(self, index: Tensor) -> Tensor:
        if self._weights is None:
            weights = np.zeros(self.n, np.float32)
            weights[self.selection.indices] = self.selection.weights
            self._weights = torch.from_numpy(weights).to(self.trajectories.last_N.device)
        weights_B = self.trajectories.pick(self._weights, index)
        if weights_B.device.type == "cpu" and not weights_B.all():
            stray = int(index[weights_B == 0][0])
            raise ValueError(
                f"sample {stray} is not in the selection of epoch {self.epoch}; "
                "draw batches with sampler=pruning.sampler"
            )
        return weights_B


class EpochSampler(Sampler[int]):
    """Yields the running epoch's samples, shuffled; its length is the running epoch's, and 0 after the last one."""

    def __init__(self, pruning: DynamicPruning) -> None:
        self._pruning = pruning

    def __len__(self) -> int:
        over = self._pruning.epoch >= self._pruning.epochs
        return 0 if over else len(self._pruning.selection.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self._pruning.order().tolist())


def make_score(score: str | Score) -> Score:
    """Return the score of that name. Raises ValueError for an unknown one."""
    if isinstance(score, Score):
        if type(score).__call__ is Score.__call__:
            raise ValueError(f"{type(score).__name__} has no __call__(self, history), which returns the scores (n,)")
        return score
    if isinstance(score, type):
        raise ValueError(f"score={score.__name__} is a class; pass an instance: score={score.__name__}()")
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown; use one of {', '.join(SCORES)}, or a Score")
    return SCORES[score]()


def make_pruner(pruner: str | Pruner, **pruner_settings: Any) -> Pruner:
    """Return the pruner of that name. Raises ValueError for an unknown name or setting."""
    if isinstance(pruner, Pruner):
        if pruner_settings:
            raise ValueError(f"{', '.join(pruner_settings)}: set it on the pruner that you pass")
        return pruner
    every_epoch = {name: found for name, found in PRUNERS.items() if issubclass(found, Pruner)}
    if isinstance(pruner, Criterion) or pruner in PRUNERS.keys() - every_epoch.keys():
        raise ValueError(
            f"pruner={pruner!r} chooses once: train on everything first, let it choose() by the evidence, and pass "
            "pruner=Fixed(indices=chosen.indices)"
        )
    if pruner not in every_epoch:
        raise ValueError(f"pruner={pruner!r} is unknown; use one of {', '.join(every_epoch)}, or a Pruner")
    known = settings(every_epoch[pruner])
    for name in pruner_settings:
        if name not in known:
            raise ValueError(f"pruner={pruner!r} has no setting {name!r}; it has {', '.join(known) or 'none'}")
    return every_epoch[pruner](**pruner_settings)
