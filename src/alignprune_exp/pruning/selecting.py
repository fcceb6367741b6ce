"""What a pruned training is to train on, how far it is, and what it knows about every sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .arguments import check_whole
from .bank import Trajectories
from .cleaning import array, check_classes, check_one_a_sample, first, table, within_class
from .named import make_pruner, make_score
from .noise_rate import NoiseRate
from .processes import Exchange
from .running import NonFiniteLossError, Running
from .sampler import EpochSampler, Indexed
from .scores import Loss, Score, settled
from .seeding import generator
from .selection import UNSCORED, Pruner, Selection

if TYPE_CHECKING:
    import pandas as pd


class Selecting(Indexed):
    """All of `DynamicPruning` that changes nothing."""

    _selection: Selection | None  # of the running epoch, once it is asked for
    _weights: Tensor | None

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
        labels: Sequence[Any] | np.ndarray | Tensor | None = None,
        device: torch.device | str | None = None,
        bank_dtype: torch.dtype = torch.float32,
        bank: Trajectories | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        divide: bool = True,
        **pruner_settings: Any,
    ) -> None:
        super().__init__(dataset)
        self.n = len(dataset)
        if self.n == 0:
            raise ValueError("the data set is empty")
        check_whole("epochs", epochs, 1)
        check_whole("seed", seed, 0)
        self.seed, self.divide = seed, divide
        self._processes = Exchange.given(rank, world_size)
        self.pruner = make_pruner(pruner, **pruner_settings)
        if saved is not None:
            self.pruner, epochs = self.pruner.saving(saved, epochs), self.pruner.lasting(saved, epochs)
        self.score = make_score(score)
        if bank is not None and not isinstance(bank, Trajectories):
            raise ValueError(f"bank is of type {type(bank).__name__}; pass the trajectories of an earlier pruning")
        self._follows = device is None and bank is None  # the device of the first loss
        self.trajectories = bank or Trajectories(self.n, window, unseen, device or "cpu", bank_dtype)
        if self.trajectories.n != self.n:
            raise ValueError(f"bank is of {self.trajectories.n} samples, and the data set has {self.n}; pass its own")
        device = self.trajectories.device
        self.first, self.epochs = self.epoch, self.epoch + int(epochs)
        self.pruner.check(epochs)
        self._check_window()
        self.clean = None if clean is None else _mask(array(clean).copy(), self.n).to(device)
        self.told, self.told_in = torch.full((self.n,), torch.nan, dtype=torch.float32, device=device), -1
        self.labels = None if labels is None else array(labels).copy()
        if self.labels is not None:
            check_classes(self.labels, self.n)
        self._classes = 0 if self.labels is None else len(np.unique(self.labels))
        if self.pruner.needs_noise_rate and self._classes < 2:
            raise ValueError(
                "the pruner needs the noise rate: pass labels=(n,) of two classes or more, or exclude=0.3, say"
            )
        self.times_selected = np.zeros(self.n, np.int32)  # and trained on, in finished epochs
        self.sizes: list[int] = []  # of the finished epochs' selections
        self._noise = NoiseRate()
        self._said: set[str] = set()  # what has been warned of
        self._memory = np.full((self.pruner.memory, self.n), np.nan, np.float32)
        self.sampler = EpochSampler(self)
        self._begin()
        self._scores = self._rank()

    @property
    def epoch(self) -> int:
        """The running epoch, from 0; the coming one between ``end_epoch`` and the next ``update``."""
        return self.trajectories.epoch

    @property
    def processes(self) -> Exchange:
        """The processes that train together."""
        return self._processes or Exchange.found()

    @property
    def compares(self) -> bool:
        """Whether what is selected goes by a comparison with a reference set, whose loss every epoch then needs."""
        return self.score.aligned and self.pruner.uses_scores

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
                raise ValueError(
                    f"all {self.epochs} epochs are done; make a new DynamicPruning to train on, with "
                    "bank=pruning.trajectories where its losses are to count on"
                )
            if (samples := len(self.dataset)) != self.n:
                raise ValueError(
                    f"the data set has {samples} samples by now, and the pruning is of {self.n}; make a new "
                    "DynamicPruning of it"
                )
            scores = np.nan_to_num(self._scores, nan=UNSCORED)
            epoch, epochs = self.epoch - self.first, self.epochs - self.first
            pruner = self.pruner.informed(self.noise_rate) if self.pruner.needs_noise_rate else self.pruner
            rng = generator(self.seed, "select", self.first + pruner.address(epoch, epochs, self.n))
            selection = pruner.select(scores, epoch, epochs, rng)
            try:
                if not isinstance(selection, Selection):
                    raise ValueError(f"it is {type(selection).__name__}, no Selection")
                selection.check(self.n)
            except ValueError as error:
                raise ValueError(f"{type(pruner).__name__} selects what cannot be trained on: {error}") from None
            self._selection = selection
        return self._selection

    @property
    def due(self) -> bool:
        """Whether what the score goes by is to be told, by ``tell``, before the running epoch ends."""
        asks = self.pruner.uses_scores and self.score.due(self.epoch - self.first, self.epochs - self.first)
        return asks and self.told_in != self.epoch

    @property
    def noise_rate(self) -> float:
        """Share of wrong labels, as far as losses tell it: `wrong_share` of the first epochs that no score has chosen.

        Without the losses (R,) of a trusted set that of the first `Foretold` that was told, which under some scores
        counts where it is larger, too. NaN before there are any, and where ``labels`` are not known.
        """
        return self._noise.estimate(self._classes, self.score.larger_counts) if self._classes > 1 else math.nan

    def check_told(self) -> None:
        """Raise ValueError where an epoch would begin without what the score is to be told before."""
        if self.score.told_first and self.due:
            raise ValueError(
                f"score={self.score.name!r} goes by what you tell of every sample before training; call "
                "pruning.tell(values) first"
            )

    def order(self) -> np.ndarray:
        """Return the running epoch's samples (M,), shuffled: those of all processes. Raises as `check_told`."""
        self.check_told()
        return generator(self.seed, "order", self.epoch).permutation(self.selection.indices)

    @property
    def progress(self) -> float:
        """The share of training that is done, in [0, 1]: whole epochs, and of this one the share of its samples."""
        if self.epoch >= self.epochs:
            return 1.0
        ranks = self.processes.size
        samples = len(self.sampler) * (ranks if self.divide else 1)
        done = min(1.0, self.running.samples(ranks) / samples)
        return (self.epoch - self.first + done) / (self.epochs - self.first)

    def schedule(self, factor: Callable[[float], float]) -> Callable[[int], float]:
        """Return a function for ``LambdaLR`` and the like that goes by `progress`, and so ends where it should.

        A pruned epoch has fewer steps than was planned, and spans its share of the schedule all the same. The number of
        steps that the scheduler passes is ignored: step it once an optimizer step, however many batches that takes.

        >>> LambdaLR(optimizer, pruning.schedule(lambda progress: 1 - progress))        # doctest: +SKIP

        Args:
            factor: maps progress in [0, 1] to the factor of the learning rate.
        """
        return lambda step: factor(self.progress)

    def planned_steps(self, batch_size: int, drop_last: bool = False, accumulate: int = 1) -> int:
        """Return the number of optimizer steps of the whole run, as far as it can be told by now.

        Finished epochs and the running one count as they are. The coming ones do so too where the pruner's sizes are
        known in advance. For infobatch and seta without ``budget``, and a pruner of your own without `Pruner.at_most`,
        it is an upper bound.

        Args:
            batch_size: samples of a batch in this process.
            drop_last: whether the loader leaves out a last batch that is not full.
            accumulate: batches of an optimizer step; the last one of an epoch may be of fewer.
        """
        for name, value in {"batch_size": batch_size, "accumulate": accumulate}.items():
            check_whole(name, value, 1)
        epochs, ranks = self.epochs - self.first, self.processes.size if self.divide else 1
        sizes = self.sizes + ([len(self.selection.indices)] if self.epoch < self.epochs else [])
        sizes += [self.pruner.at_most(self.n, epoch, epochs) for epoch in range(len(sizes), epochs)]
        spare = 0 if drop_last else batch_size - 1
        batches = [(size // ranks + spare) // batch_size for size in sizes]
        return sum(-(-count // accumulate) for count in batches)

    def prepare(self, accelerator: Any, batch_size: int, **options: Any) -> DataLoader:
        """Return a loader for a loop under Hugging Face's accelerate, in place of ``accelerator.prepare(loader)``.

        It yields (index, item) as ``DataLoader(pruning, batch_size, sampler=pruning.sampler)`` does, on the
        accelerator's device. accelerate, which would divide each process's share once more and fill up the last
        batches with samples of the first ones, does neither.

        >>> accelerator.register_for_checkpointing(pruning)                             # doctest: +SKIP
        >>> loader = pruning.prepare(accelerator, batch_size=128)                       # doctest: +SKIP

        Args:
            accelerator: an ``accelerate.Accelerator``.
            batch_size: of each process; of all together under ``split_batches=True``.
            **options: of the DataLoader, such as ``num_workers``.

        Raises ValueError for options that choose samples, where accelerate has other processes than the pruning, and
        where it divides the samples themselves.
        """
        from accelerate.data_loader import prepare_data_loader

        taken = sorted({"dataset", "sampler", "batch_sampler", "shuffle"} & options.keys())
        if taken:
            raise ValueError(f"{taken[0]} is the pruning's own; leave it out of prepare()")
        parallelism = accelerator.parallelism_config
        if parallelism and parallelism.non_data_parallel_size > parallelism.tp_size:
            raise ValueError(
                "cp_size and sp_size give each process a part of a sample, and its loss is of the whole; divide the "
                "network by tp_size, or shard it"
            )
        takes = accelerator.num_processes // (parallelism.non_data_parallel_size if parallelism else 1)
        if self.divide:
            self.processes.check_batches("accelerate", takes)
        if accelerator.split_batches:
            if batch_size % takes:
                raise ValueError(
                    f"batch_size={batch_size} cannot be split over {takes} processes; use a multiple of {takes}"
                )
            batch_size //= takes
        loader = prepare_data_loader(
            DataLoader(self, batch_size, sampler=self.sampler, **options),
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=accelerator.device_placement,
            dispatch_batches=False,
            even_batches=False,
            non_blocking=accelerator.non_blocking,
        )
        loader._is_accelerate_prepared = True
        return accelerator.prepare_data_loader(loader)

    def scores(self, score: str | Score) -> np.ndarray:
        """Return any score (n,) of the finished epochs, NaN where a sample has none.

        Raises RuntimeError within an epoch, and ValueError where the score needs what is not known or is infinite.
        """
        return self.several_scores([score])[0]

    def several_scores(self, scores: Sequence[str | Score]) -> np.ndarray:
        """Return K scores (K, n) as `scores` does, in one copy from the device."""
        history = replace(
            self.trajectories.history(),
            clean_N=self.clean,
            seed=self.seed,
            labels=self.labels,
            progress=(self.epoch - self.first) / (self.epochs - self.first),
            told_N=self.told,
        )
        found = []
        for score in map(make_score, scores):
            if score.aligned and self.epoch and history.reference_W.isnan().all():
                raise ValueError(
                    f"score={score.name!r} compares with the reference set, of which the window has no loss; pass its "
                    "mean loss to end_epoch()"
                )
            values = score(history)
            if not isinstance(values, Tensor) or values.shape != (self.n,):
                what = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"{type(score).__name__} returned {what}; a score returns a tensor ({self.n},)")
            found.append(values.float())
        table = torch.stack(found).cpu().numpy()
        if (infinite := np.isinf(table).any(1)).any():
            raise NonFiniteLossError(self.epoch, what=f"score={make_score(scores[int(infinite.argmax())]).name}")
        return table

    def report(self, labels: Sequence[Any] | np.ndarray | Tensor | None = None) -> pd.DataFrame:
        """Return one row a sample, in data set order; ``.sort_values("score")`` puts first what to look at first.

        Columns:
            score: the cleaning score, lowest where a label seems wrong: ``settled``, standardised `within_class` where
                the given ``labels`` (n,) are passed. It is the same whatever score ranks: the lowest losses are the
                cleanest samples', and once a network memorises, alignment finds wrong labels little better than chance.
            loss: the last recorded one.
            ranking: the score that the running epoch's selection was ranked by.
            times_selected: and trained on, in finished epochs.

        NaN where a sample was never seen; ``score`` and ``ranking`` are as of the latest ``end_epoch``.
        Raises ValueError for another number of labels, and for missing ones.
        """
        import pandas as pd

        bank = self.trajectories
        loss = bank.last_N.cpu().numpy().copy()
        score = settled(bank.sum_N, bank.count_N).cpu().numpy()
        if labels is not None:
            score = within_class(score, array(labels))
        return pd.DataFrame(
            {
                "score": score,
                "loss": loss,
                "ranking": np.where(np.isnan(loss), np.nan, self._scores),
                "times_selected": self.times_selected.copy(),
            }
        )

    def suspects(
        self,
        labels: Sequence[Any] | np.ndarray | Tensor,
        top: int = 200,
        *,
        likely: Sequence[Any] | np.ndarray | Tensor | None = None,
        checked: Mapping[int, Any] | None = None,
    ) -> pd.DataFrame:
        """Return the ``top`` samples whose labels to look at, the most suspect first, whatever score ranks.

        Args:
            labels: as given, (n,), of any type.
            top: how many.
            likely: what your model takes each sample for, (n,).
            checked: the right label of each sample that you have looked at, by its index; those are not listed again,
                and calibrate ``sure``. A few hundred, drawn at random or from the top, are enough.

        Columns:
            index: the sample.
            label, likely_label: as given; as your model has it, where ``likely`` is passed.
            sure: the probability that the label is wrong, in [0, 1], as `wrong_probability` estimates it.
            loss: the last recorded one.
            flag: ``wrong`` where ``sure`` is a half or more; ``memorised`` where, besides, your model agrees with the
                label by now; ``never seen``; else empty.
            score: what they are listed by, lowest first: ``settled``, standardised `within_class`.

        Raises ValueError for another number of labels, for missing ones, and for samples that there are not.
        """
        bank = self.trajectories
        scores = settled(bank.sum_N, bank.count_N).cpu().numpy()
        losses, guessed = bank.last_N.cpu().numpy().copy(), None if likely is None else array(likely)
        return first(table(array(labels), scores, losses, likely=guessed, checked=checked), top, checked)

    def _begin(self) -> None:
        """Take up an epoch of which nothing is done or chosen yet."""
        with torch.inference_mode(False):  # an epoch may end where the model is evaluated
            self.running = Running(self.trajectories)
        self.sampler.begin()
        self._selection = None
        self._weights = None

    def _check_window(self) -> None:
        """Raise ValueError for a window that is full only when pruning is over, where the score needs a full one."""
        if not self.compares:
            return
        window, epochs = self.trajectories.window, self.epochs - self.first
        missing, last = self.trajectories.lacking, self.pruner.pruning_epochs(epochs)
        if missing >= last:
            enough = next(more for more in itertools.count(epochs) if self.pruner.pruning_epochs(more) > missing)
            longest = window - missing + last - 1
            shorter = f"a window of at most {longest}, or " if longest > 2 else ""
            raise ValueError(
                f"a window of {window} epochs leaves {self.score.name} none to act in, since pruning lasts delta * "
                f"epochs, here {last} of {epochs}; use {shorter}{enough} epochs or more"
            )

    def _ranking_score(self) -> Score:
        return Loss() if self.score.aligned and self.trajectories.lacking else self.score

    def _rank(self) -> np.ndarray:
        return self.scores(self._ranking_score())


def _mask(clean: np.ndarray, n: int) -> Tensor:
    """Return which of n labels are clean, bool (n,). Raises ValueError for another shape or other values."""
    check_one_a_sample("clean", clean, n)
    mask = clean.astype(bool)
    if not (mask == clean).all():
        raise ValueError("clean has values other than 0 and 1; it says of each label whether it is clean")
    return torch.from_numpy(mask)
