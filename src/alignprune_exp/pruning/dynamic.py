"""Dynamic pruning for a training loop of one's own, in one process or many; the experiments drive the same object."""

from __future__ import annotations

import copy
import math
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import check_version
from .bank import whole_numbers
from .cleaning import checksum
from .losses import one_a_sample, weighted_mean
from .processes import DisagreementError
from .readout import Foretold
from .reference import ReferenceLoss, shared_loss
from .running import NonFiniteLossError, PruningWarning
from .selecting import Selecting


class DynamicPruning(Selecting):
    """Selects the samples of every epoch, records their losses, weights their gradients.

    >>> pruning = DynamicPruning(dataset, epochs=200, pruner="infobatch", score="das")  # doctest: +SKIP
    >>> loader = DataLoader(pruning, batch_size=128, sampler=pruning.sampler)           # doctest: +SKIP
    >>> for epoch in range(200):                                                        # doctest: +SKIP
    ...     for index, (x, y) in loader:
    ...         loss = pruning.update(index, F.cross_entropy(model(x), y, reduction="none"))
    ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
    ...     pruning.end_epoch(reference_loss)
    >>> pruning.suspects(labels, top=200)                                               # doctest: +SKIP

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

    Where torch.distributed is initialised, its processes train together, each of them by these lines: `sampler` yields
    a process's share, equal in number, and `end_epoch` exchanges the losses. `exchange`, `unseen`, `end_epoch` and
    `change_reference` are called by all of them; nothing else waits for another process but the first `update` of an
    epoch, which compares what they have chosen. A process that ends or falls silent is a LostProcessError in the others
    within the process group's timeout, numbers that differ are a DisagreementError in all.

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
        clean: mask (n,), true where the label is clean; needed by ``score="oracle"`` and ``"supervised"`` alone.
        labels: the given ones (n,), of any type; needed by ``score="cleaning"``, ``"readout"``, ``"features"`` and
            ``"transition"``, and by a pruner that goes by the noise rate.
        device: where losses, trajectories and weights lie; without one that of the first loss.
        bank_dtype: of the trajectories; ``torch.float16`` halves their memory.
        bank: the ``trajectories`` of an earlier phase of training, to go on with: its epochs count on, so that no
            random choice is made again. It takes the place of ``window``, ``unseen``, ``device`` and ``bank_dtype``.
        rank, world_size: the number of this process and of all, where these are not torch.distributed's own:
            ``rank=0, world_size=1`` trains in each process for itself.
        divide: whether the sampler yields a process's share alone. False lets each process train on any part of `order`
            that no other one does.
        **pruner_settings: of the pruner named, such as ``ratio`` and ``delta``.

    Raises:
        TypeError: the data set has no length or no items by index.
        ValueError: an unknown name, or a value out of range.
    """

    def update(
        self,
        index: Tensor,
        loss: Tensor,
        observed: Tensor | None = None,
        *,
        reduce: str | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Record the losses of one batch and return the loss to differentiate.

        Args:
            index: (B,) sample indices, as they came with the batch.
            loss: (B,) training loss of each sample, unreduced.
            observed: (B,) what to record, where that is not the training loss; `noise_rate` takes it for cross-entropy,
                and ``sure`` in `suspects` for a loss.
            reduce, mask: for losses (B, …) of pixels, tokens or boxes; see `one_a_sample`.

        Returns:
            The weighted sum of ``loss`` divided by B, a scalar.

        Raises:
            ValueError: a reduced loss, an index that is no whole number, or a sample observed twice, not selected in
                this epoch, or another process's.
            IndexError: an index out of range.
            DisagreementError: the processes have chosen different samples.
        """
        index = whole_numbers(index)
        recorded = loss = one_a_sample("the loss", loss, index, reduce, mask)
        if observed is not None:
            several = isinstance(observed, Tensor) and observed.dim() > 1
            recorded = one_a_sample("observed", observed, index, reduce if several else None, mask if several else None)
        self.check_agreement()
        self._follow(loss.device)
        index = self.trajectories.place(index)
        weights = self.weights(index)
        self.observe(index, loss, recorded)
        return weighted_mean(loss, weights)

    def observe(self, index: Tensor, loss: Tensor, recorded: Tensor) -> None:
        """Record the losses (B,) of a batch that is trained on with its `weights`, which `update` does in one.

        Args:
            index: (B,) its samples, which lie where the trajectories do.
            loss: (B,) their training loss, of which is noted whether it is finite.
            recorded: (B,) what to record, which may be the same.
        """
        self.running.record(index, recorded.detach())
        if recorded is not loss:
            self.running.watch(loss.detach())
        self.running.train(index)

    def weights(self, index: Tensor) -> Tensor:
        """Return the gradient weights (B,) of samples ``index`` (B,), where the trajectories lie.

        `update` applies them; they are for what else a step makes of its batch, such as the second pass of SAM. Raises
        IndexError and ValueError as it does.
        """
        index = self.trajectories.place(index)
        if self._weights is None:
            weights = np.zeros(self.n, np.float32)
            weights[self.selection.indices] = self.selection.weights
            if self.divide and self.processes.size > 1:
                others = np.ones(self.n, bool)
                others[self.sampler.share()] = False
                weights[others] = 0
            self._weights = torch.from_numpy(weights).to(self.trajectories.device, non_blocking=True)
        weights_B = self.trajectories.pick(self._weights, index)
        if weights_B.device.type == "cpu" and not weights_B.all():
            raise self._stray(int(index[weights_B == 0][0]))
        return weights_B

    def unseen(self) -> Tensor:
        """Return the samples (K,) not yet observed in the running epoch, for ``unseen="refresh"``.

        Processes that divide their samples `exchange` first, and get a share each, of sizes that differ by one at the
        most: a network that is sharded wants as many batches in each of them all the same.
        """
        if self.processes.size > 1 and self.divide:
            self.exchange()
            return self.processes.share(self.trajectories.unseen_samples())
        return self.trajectories.unseen_samples()

    def record(self, index: Tensor, losses: Tensor) -> None:
        """Record the losses (B,) of samples ``index`` (B,) that were forwarded without being trained on.

        Raises IndexError and ValueError as `update` does.
        """
        index = whole_numbers(index)
        losses = one_a_sample("the loss", losses, index)
        self._follow(losses.device)
        self.running.record(self.trajectories.place(index), losses.detach())

    def tell(self, values: Sequence[float] | np.ndarray | Tensor | Foretold) -> None:
        """Tell, in the running epoch, what the score goes by beside the losses, wherever `due` asks for it.

        That is, before the first epoch, the irreducible losses for ``score="reducible"`` and ``"irreducible"``, and a
        `readout` of features for ``"features"``, their `transition` for ``"transition"``; every few epochs a `readout`
        of the network's embeddings for ``"readout"``. Several processes tell the same.

        Args:
            values: (n,) one a sample, NaN where it is not known; or what `readout` or `transition` returns, whose first
                estimate of the noise rate is `noise_rate` where no trusted set tells it.

        Raises ValueError for another number of them, for infinite ones, and for what the other of the two returns.
        """
        foretells = self.score.foretells
        if isinstance(values, Foretold) and foretells is not None and values.by != foretells.__name__:
            raise ValueError(
                f"score={self.score.name!r} goes by what {foretells.__name__}() returns, and this is of {values.by}(); "
                f"call pruning.tell({foretells.__name__}(…))"
            )
        margins = values.margins if isinstance(values, Foretold) else values
        told = torch.as_tensor(margins, dtype=torch.float32, device=self.told.device)
        if told.shape != (self.n,) or told.isinf().any():
            what = f"of shape {tuple(told.shape)}" if told.shape != (self.n,) else "infinite in places"
            raise ValueError(f"what is told is {what}; tell ({self.n},) numbers, one a sample, NaN where unknown")
        self.told, self.told_in = told.detach().clone(), self.epoch
        if isinstance(values, Foretold) and math.isnan(self._noise.foretold):
            self._noise.foretold = values.noise_rate
        if self.epoch == self.first and not self.trajectories.recorded:
            self._begin()
            self._scores = self._rank()

    def check_agreement(self, *also: np.ndarray) -> None:
        """Raise DisagreementError, in all processes, unless they have all chosen the same, and have ``also`` the same.

        The first `update` of an epoch calls it. Call it yourself where some process may have none to make.
        """
        processes = self.processes
        if self.running.agreed or processes.size == 1:
            return
        chosen = b"".join(part.tobytes() for part in (self.order(), self.selection.weights, *also))
        with processes.connected():
            if not processes.same(zlib.crc32(chosen)):
                raise DisagreementError(
                    f"the processes do not agree on the selection of epoch {self.epoch}; start them with one seed, one "
                    "state and the same arguments, from one version of the code and of every package, on one kind of "
                    "processor"
                )
        self.running.agreed = True

    def exchange(self, *also: Tensor) -> None:
        """Record what the other processes have observed since the last exchange; all of them call it.

        `end_epoch` does so itself. Within an epoch call it before `state_dict`, and before what looks at the losses.

        Args:
            also: values (n, …) of your own, one a sample, such as predictions, which each process has set for the
                samples that it observed; those of the others' are set in place.

        Raises:
            NonFiniteLossError: a loss of any process was NaN or infinite.
            ValueError: a sample was observed by two processes.
        """
        processes = self.processes
        if processes.size > 1:
            self.check_agreement()
            with processes.connected():
                self.running.exchange(processes, also)
        self.check_finite()

    def end_epoch(self, reference_loss: ReferenceLoss = None) -> None:
        """Exchange the losses, close the epoch, and score every sample for the next one; all processes call it.

        Args:
            reference_loss: mean loss of the trusted reference set after this epoch, in eval mode, or better its losses
                (R,), which `noise_rate` needs; scores that compare with the reference need either. Several processes
                pass the same, or rank 0 passes it and the others None, or each one the sum and the number (sum, count)
                of the losses of its part of the set.

        Raises:
            NonFiniteLossError: a loss of this epoch, or the reference loss, was NaN or infinite.
            DisagreementError: the processes were given different reference losses.
            ValueError: the reference loss is missing, or what is `due`, nothing was recorded, a sample was observed
                twice or was not selected, ``unseen="refresh"`` misses one, or the samples were divided twice.

        Warns once, with a PruningWarning, where the comparison with the reference tells no sample from another, and
        where more than a last batch of what is selected was not trained on.
        """
        if self.due:
            raise ValueError(f"score={self.score.name!r} goes by what you tell of every sample; call tell() before")
        selected = self.selection.indices
        self.exchange()
        self.trajectories.check_recorded()
        reference, trusted = self._reference(reference_loss, self.epoch)
        if reference is None and self.compares:
            raise ValueError(
                f"score={self.score.name!r} compares with the reference set: pass its mean loss to end_epoch()"
            )
        seen = np.flatnonzero(self.running.trained.cpu().numpy())
        if self.trajectories.device.type != "cpu":
            self._check_selected(seen)
        self._check_divided_once(len(seen))
        self._check_noise_rate(trusted)
        cut, ranked_by = self._cut_short(len(seen)), self._ranking_score().name
        self.trajectories.end_epoch(reference)
        self.times_selected[seen] += 1
        self.sizes.append(len(selected))
        passes = sum(self.sizes) / self.n
        self._noise.observe(self.trajectories.last_N, self.running.trained, trusted, passes, self.selection.ranked)
        self._begin()
        if self._ranking_score().name != ranked_by:
            self._memory.fill(np.nan)
        ranking = self._rank()
        self._scores = self.pruner.digest(ranking, selected, seen, self._memory)
        self._warn(cut=cut, ties=self._ties(ranking))

    def change_reference(self, reference_loss: ReferenceLoss) -> None:
        """Say, between two epochs, that the reference set is another one from now on.

        The reference trajectory becomes a chain, as a price index does when its basket changes: its past is shifted
        by one constant so that it ends at the new set's loss. Each step from epoch to epoch is then measured on one
        set, and there is no jump that comes from the change alone. `pearson` and `spearman` do not notice the shift of
        a whole trajectory, so the ranking made at the last ``end_epoch`` stays valid.

        Args:
            reference_loss: the new set's mean loss, evaluated with the weights of the last ``end_epoch``; several
                processes pass it as they do there.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
            RuntimeError: an epoch is running.
            ValueError: the last epoch ended without a reference loss to go on from.
        """
        reference, _ = self._reference(reference_loss, self.epoch - 1)
        if reference is None:
            raise ValueError("the new reference set has no loss; pass its mean loss to change_reference()")
        self.trajectories.link_reference(reference)

    def check_finite(self) -> None:
        """Wait for the device; raise NonFiniteLossError if a loss of the running epoch was NaN or infinite."""
        self.running.check_finite()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, mid-epoch too: tensors and numbers, safe for ``torch.load(weights_only=True)``.

        It is a copy, which stays as it is while training goes on, the same in all processes, and any number of them
        goes on from it. Raises RuntimeError where processes have observed what they have not yet exchanged.
        """
        if self.processes.size > 1:
            self.running.check_shared()
        return copy.deepcopy(self._state())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a run with the same arguments.

        Within an epoch, `EpochSampler.leave_out_trained` has the sampler yield what is left of it.

        Raises ValueError if it is of other arguments, number of samples, window, or version of this package.
        """
        check_version(self._state(), state)
        for name, ours in self._arguments().items():
            if (theirs := state["arguments"][name]) != ours:
                raise ValueError(
                    f"the state is of {name}={theirs}, and this is {name}={ours}; go on with the arguments that it "
                    "began with"
                )
        self.trajectories.load_state_dict(state["trajectories"])
        self.first, self.epochs = state["first"], self.epochs - self.first + state["first"]
        self._scores = state["scores"].cpu().numpy().copy()
        self.times_selected = state["times_selected"].cpu().numpy().copy()
        self.sizes = list(state["sizes"])
        self._memory = state["memory"].cpu().numpy().copy()
        self._noise.load_state_dict(state["noise"])
        self.told, self.told_in = state["told"].to(self.told.device), state["told_in"]
        self._begin()
        self.running.load_state_dict(state["running"])

    def _arguments(self) -> dict[str, str | int]:
        """Return what a run is of, in words and numbers; of another one no state is taken over."""
        return {
            "pruner": self.pruner.described(),
            "score": self.score.described(),
            "labels": checksum(self.labels),
            "clean": checksum(self.clean),
            "unseen": self.trajectories.unseen,
            "seed": int(self.seed),
            "epochs": self.epochs - self.first,
        }

    def _state(self) -> dict[str, Any]:
        return {
            "arguments": self._arguments(),
            "first": self.first,
            "trajectories": self.trajectories.state_dict(),
            "scores": torch.from_numpy(self._scores),
            "times_selected": torch.from_numpy(self.times_selected),
            "sizes": list(self.sizes),
            "running": self.running.state_dict(),
            "memory": torch.from_numpy(self._memory),
            "noise": self._noise.state_dict(),
            "told": self.told,
            "told_in": self.told_in,
        }

    def _reference(self, given: ReferenceLoss, epoch: int) -> tuple[float | None, float]:
        with self.processes.connected():
            loss, fit = shared_loss(given, self.processes)
        if loss is not None and not math.isfinite(loss):
            raise NonFiniteLossError(epoch, what="the reference loss")
        return loss, fit

    def _follow(self, device: torch.device) -> None:
        """Lie on the device of the first loss, where none was named."""
        if self._follows and device.type != "cpu":
            self.trajectories.move(device)
            self.running.move(device)
            self.clean, self.told = None if self.clean is None else self.clean.to(device), self.told.to(device)
            self._weights = None
        self._follows = False

    def _ties(self, ranking: np.ndarray) -> str:
        """Return what to warn of where samples (n,) are compared with the reference, and all of them are alike."""
        if not (self.compares and self._ranking_score().aligned):
            return ""
        known = ranking[~np.isnan(ranking)]
        if len(known) < 2 or np.ptp(known) > 0:
            return ""
        past_W, why = self.trajectories.reference_W, ""
        if (past_W == past_W[0]).all():
            why = f", since the reference loss has been {past_W[0]:g} in each of the last {len(past_W)} epochs"
        return (
            f"score={self.score.name!r} is {known[0]:g} for every sample after epoch {self.epoch - 1}{why}, and so "
            "tells the pruner nothing; evaluate the reference set anew after every epoch, in eval mode, and see that "
            "the network learns"
        )

    def _cut_short(self, seen: int) -> str:
        """Return what to warn of where more of the epoch than a last batch was not trained on."""
        processes, batch = self.processes.size, self.running.largest
        chosen = len(self.sampler) * (processes if self.divide else 1)
        if not batch or chosen - seen < processes * batch:  # none where an epoch is resumed when its steps are done
            return ""
        return (
            f"{seen} of {chosen} samples selected for epoch {self.epoch} were trained on; unless that is meant, begin "
            "each pass over the loader after end_epoch(), skip nothing of it, and let it end by itself, since its "
            "length changes"
        )

    def _warn(self, **sentences: str) -> None:
        """Warn of what there is to say, each the first time, by the line that called `end_epoch`."""
        for of, sentence in sentences.items():
            if sentence and of not in self._said:
                self._said.add(of)
                if self.processes.rank == 0:
                    warnings.warn(sentence, PruningWarning, stacklevel=3)

    def _check_noise_rate(self, trusted: float) -> None:
        """Raise ValueError where the pruner needs the noise rate, and nothing will tell it."""
        waits = self.score.foretells and (self.told_in < 0 or not math.isnan(self._noise.foretold))
        if self.pruner.needs_noise_rate and math.isnan(trusted) and not waits:
            by = self.score.foretells
            tell = f"tell() what {by.__name__}() returns as it is, " if by else ""
            raise ValueError(
                f"the pruner needs the noise rate: {tell}pass the losses (R,) of a trusted set to end_epoch(), or "
                "exclude=0.3"
            )

    def _check_selected(self, seen: np.ndarray) -> None:
        """Raise ValueError where a sample was trained on that is not selected: only the CPU looks at each at once."""
        selected = np.zeros(self.n, bool)
        selected[self.selection.indices] = True
        if not selected[seen].all():
            raise self._stray(int(seen[~selected[seen]][0]))

    def _check_divided_once(self, seen: int) -> None:
        """Raise ValueError, in all processes, where each has trained on a share of its share, but for a last batch."""
        processes = self.processes.size
        share, batch = len(self.sampler), processes * self.running.largest
        if self.divide and processes * share - seen > batch and -batch < seen - share <= batch and processes > 1:
            raise ValueError(
                f"{seen} of {processes * share} samples of epoch {self.epoch} were trained on: the epoch was cut "
                f"short, or something divides the sampler's share among the {processes} processes once more; with "
                "accelerate build the loader by pruning.prepare(accelerator, batch_size=…), and elsewhere leave it as "
                "it is"
            )

    def _stray(self, sample: int) -> ValueError:
        processes = self.processes
        share = f"share of process {processes.rank} of {processes.size} in"
        whose = share if sample in self.selection.indices else "selection of"
        return ValueError(
            f"sample {sample} is not in the {whose} epoch {self.epoch}; draw batches with sampler=pruning.sampler"
            + (", without a DistributedSampler" if processes.size > 1 else "")
        )
