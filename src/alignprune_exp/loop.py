"""One phase of training: an epoch on one screen."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .console import Progress
from .errors import Failed, Stopped
from .learners import Step
from .network import Network
from .pruning import DynamicPruning, NonFiniteLossError, Selection, WarmUpLog
from .pruning.held import Held
from .pruning.readout import RIDGE, WEAK, Foretold
from .pruning.scores import Features
from .pruning.transition import transition
from .reference import Reference
from .setup import Setup

STEPS_BETWEEN_QUESTIONS = 10  # after which several processes ask each other whether to stop


class Clock:
    """Splits an epoch's seconds by what they went into; ``elapsed`` went before."""

    def __init__(self, elapsed: float = 0.0) -> None:
        self.laps: dict[str, float] = {}
        self._start, self._last = time.perf_counter() - elapsed, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start


@dataclass
class Epoch:
    """What an epoch leaves to be recorded.

    Attributes:
        number: in the run, from 0.
        ranked_by, selection, ranking: as of its beginning; see `DynamicPruning`.
        lr: the last learning rate.
        train_loss: mean plain loss of its samples.
        reference: losses (R,) of the reference set after it.
        reference_loss, reference_noise: their mean, or what stands in for it; the wrong share of them.
        tested: metrics on what is evaluated on, where it was evaluated.
        refreshed, forwarded: samples passed through the network to refresh trajectories, and for the reference set.
        clock: where its seconds went.
    """

    number: int
    ranked_by: str | None
    selection: Selection
    ranking: np.ndarray
    lr: float = 0.0
    train_loss: float = math.nan
    reference: Tensor = field(default_factory=lambda: torch.empty(0))
    reference_loss: float | None = None
    reference_noise: float | None = None
    tested: Mapping[str, float] = field(default_factory=dict)
    refreshed: int = 0
    forwarded: int = 0
    clock: Clock = field(default_factory=Clock)


@dataclass(frozen=True)
class Spent:
    """What it took to choose the samples of a phase, before its first epoch, which it is counted in."""

    seconds: float = 0.0
    samples: int = 0  # passed through a network
    trained: int = 0  # samples of all epochs before


class Loop:
    """Trains the epochs of one phase, in which one network learns from the samples of one pruning.

    Attributes:
        step: steps done in the running epoch.
        elapsed: seconds spent on the running epoch before this process took it up.
        log: what static criteria want to know of a warm-up.
    """

    def __init__(
        self,
        setup: Setup,
        pruning: DynamicPruning,
        network: Network,
        reference: Reference,
        log: WarmUpLog | None = None,
        spent: Spent | None = None,
    ) -> None:
        self.setup, self.pruning, self.network, self.reference = setup, pruning, network, reference
        self.log, self.spent = log, spent or Spent()
        self.step, self.elapsed = 0, self.spent.seconds
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=setup.device)
        self._exchanged = self.loss_sum.clone()  # of the sum, what all processes have
        self._predicted = torch.full((setup.n,), -1, dtype=torch.int64, device=setup.device)
        self._held = Held()

    @property
    def trained(self) -> int:
        """Samples trained on in all finished epochs of the run, those of earlier phases included."""
        return self.spent.trained + int(self.pruning.times_selected.sum())

    @property
    def predicted(self) -> Tensor:
        """The class (n,) that each sample was taken for when it was last trained on; -1 before."""
        self._held.settle(self._predict)
        return self._predicted

    def _predict(self, index: Tensor, predicted: Tensor) -> None:
        self._predicted[index] = predicted

    def epoch(self, stop: threading.Event, save: Callable[[], None]) -> Epoch:
        """Train one epoch and return what is to be recorded of it; ``save`` is called where ``stop`` interrupts it."""
        setup, pruning, network = self.setup, self.pruning, self.network
        config, clock = setup.config, Clock(self.elapsed)
        self._foretell()
        clock.lap("refresh")
        now = Epoch(pruning.epoch, pruning.ranked_by, pruning.selection, pruning.ranking)
        by_features = isinstance(pruning.score, Features) and pruning.told_in == pruning.epoch
        by_features |= network.learner.told and pruning.epoch == pruning.first
        now.refreshed = setup.n if by_features else 0
        if pruning.pruner.asks:
            setup.task.answer(now.selection.indices)
        order = pruning.order()
        pruning.check_agreement(self.reference.samples.numpy())
        clock.lap("select")
        for step in self._batches(order, now, clock, stop, save):
            plain, training, predicted = network.take(step, pruning.weights(step.index))
            if step.share == 0:
                continue
            pruning.observe(step.index, training, setup.task.observed(plain, training, predicted, step.targets))
            if predicted is not None:
                self._held.add(self._predict, step.index, predicted)
            self.loss_sum += plain.sum()
        now.train_loss = self._exchange() / len(order)
        setup.processes.from_rank_0(list(network.learner.buffers()))
        network.check_finite(now.number)
        clock.lap("train")

        network.learner.eval()
        around = pruning.pruner.looks_around(now.number - pruning.first, pruning.epochs - pruning.first)
        if config.score.unseen == "refresh" or around:
            now.refreshed += self._refresh()
        if pruning.due:
            now.refreshed += self._read_out()
        clock.lap("refresh")
        now.reference = self.reference.losses(network)
        now.reference_loss = self.reference.loss(now.reference, pruning)
        now.reference_noise = self.reference.noise()
        clock.lap("reference")
        pruning.end_epoch(now.reference if self.reference.comparable else now.reference_loss)
        clock.lap("score")
        if self.log is not None:
            right = self.predicted.cpu().numpy() == setup.task.strata
            self.log.observe(pruning.trajectories.last_N.cpu().numpy(), right)
        now.forwarded = len(now.reference) + self.reference.choose(network, pruning)
        clock.lap("reference")
        if (now.number + 1 - pruning.first) % config.eval_every == 0 or pruning.epoch == pruning.epochs:
            now.tested = self._test(now.number)
        clock.lap("test")
        self.step, self.elapsed = 0, 0.0
        self.loss_sum.zero_()
        self._exchanged.zero_()
        now.clock = clock
        return now

    def _batches(
        self, order: np.ndarray, now: Epoch, clock: Clock, stop: threading.Event, save: Callable[[], None]
    ) -> Iterator[Step]:
        """Yield the epoch's steps that are left; raise Stopped, with a checkpoint left, where that was asked for."""
        setup, network, pruning = self.setup, self.network, self.pruning
        batches, processes = setup.task.train, setup.processes
        sizes = batches.sizes(len(order))
        epoch, steps, progress = now.number - pruning.first, len(sizes), Progress()
        if self.step == 0:
            network.learner.begin_epoch(epoch, batches.evaluation(now.selection.indices), network.logits)
        clock.lap("divide")
        network.learner.train()
        mine = batches.epoch(order, now.number, self.step, processes.rank, processes.size, network.learner.views)
        for index, inputs, targets in mine:
            now.lr = network.schedule((epoch + self.step / steps) / (pruning.epochs - pruning.first))
            size = sizes[self.step]
            share = len(index) * processes.size / size if processes.rank < size else 0.0
            here = index.to(setup.device, non_blocking=True)
            yield Step(here, inputs, targets, epoch, self.step, steps, share)
            self.step += 1
            if self.step < steps and self._stops(stop):
                self._exchange()
                self.elapsed = clock.total()
                save()
                raise stopped(setup.id, pruning.epoch, self.step)
            progress.show(f"epoch {now.number + 1}/{setup.epochs}  step {self.step}/{steps}")

    def _stops(self, stop: threading.Event) -> bool:
        """Return whether to stop before the coming step; several processes ask each other now and then."""
        if self.setup.processes.size == 1:
            return stop.is_set()
        return self.step % STEPS_BETWEEN_QUESTIONS == 0 and self.setup.processes.any(stop.is_set())

    def _exchange(self) -> float:
        """Let all processes know what each has observed since the last exchange; return the sum of all losses.

        Raises NonFiniteLossError where one of these was not finite.
        """
        self.pruning.exchange(self.predicted)
        processes = self.setup.processes
        if processes.size > 1:
            self.loss_sum.copy_(self._exchanged + processes.sum(self.loss_sum - self._exchanged))
            self._exchanged.copy_(self.loss_sum)
        return self.loss_sum.item()

    def _refresh(self) -> int:
        """Record the losses of the samples that the epoch left out; return how many there are."""
        setup, unseen = self.setup, self.pruning.unseen().cpu()
        if len(unseen):
            own = setup.processes.share(unseen)
            if self.pruning.pruner.asks:
                losses = setup.task.doubts(self.network, setup.task.train.evaluation(own))
            else:
                losses = self.recorded(own)
            self.pruning.record(own, losses)
            self.pruning.exchange()
        return len(unseen)

    def _foretell(self) -> None:
        """Tell score and learner, where they wait for it, what all samples' features foretell of their labels."""
        pruning, learner, foretells = self.pruning, self.network.learner, self.pruning.score.foretells
        score_waits = isinstance(pruning.score, Features) and pruning.due
        learner_waits = learner.told and pruning.epoch == pruning.first and self.step == 0
        waiting = {foretells: "score=settled"} if score_waits else {}
        if learner_waits:
            waiting.setdefault(transition, "learner=ce")
        if not waiting:
            return
        features = self.setup.processes.gather(self.setup.task.features(self.setup.own))
        found = {by: self._foretold(features, by, WEAK, f"use {instead}") for by, instead in waiting.items()}
        if score_waits:
            pruning.tell(found[foretells])
        if learner_waits:
            classes = found[transition].classes
            assert classes is not None
            learner.tell(classes)

    def _read_out(self) -> int:
        """Tell the score the same of the network's embeddings as they are now; return how many samples."""
        own = self.setup.task.outputs(self.network, self.setup.task.train.evaluation(self.setup.own))[1]
        embeddings, instead = self.setup.processes.gather(own), "lower optimizer.lr, or use score=settled"
        self.pruning.tell(self._foretold(embeddings, self.pruning.score.foretells, RIDGE, instead))
        return self.setup.n

    def _foretold(
        self, features: Tensor, foretells: Callable[..., Foretold] | None, ridge: float, instead: str
    ) -> Foretold:
        """Return what features (n, d) foretell of the labels; raise Failed, with what to do ``instead``."""
        labels = self.setup.task.strata
        assert foretells is not None
        assert labels is not None
        if not features.isfinite().all():
            raise NonFiniteLossError(self.pruning.epoch, what="an embedding")
        try:
            return foretells(features, torch.from_numpy(labels), ridge)
        except ValueError as error:
            raise Failed(f"run {self.setup.id} cannot go on: {error}; {instead}") from None

    def recorded(self, samples: Tensor) -> Tensor:
        """Return what trajectories are made of, of samples (k,) under the network, in eval mode."""
        setup = self.setup
        smoothing = setup.config.label_smoothing if setup.config.recorded == "smoothed" else 0.0
        return setup.task.recorded(self.network, setup.task.train.evaluation(samples), smoothing)

    def _test(self, epoch: int) -> dict[str, float]:
        """Return loss and metrics on the test set, and the metrics on whatever else is evaluated on."""
        tested: dict[str, float] = {}
        task, processes = self.setup.task, self.setup.processes
        for suffix, batches in task.tests.items():
            share = processes.share(torch.arange(len(batches)))
            found = task.evaluate(self.network, batches.evaluation(share), len(batches), processes)
            tested |= {f"test_{metric.name}{suffix}": found[metric.name] for metric in task.metrics}
            if not suffix:
                tested["test_loss"] = found["loss"]
                if not all(map(math.isfinite, found.values())):
                    raise NonFiniteLossError(epoch, what="the test loss")
        return tested

    def state_dict(self) -> dict[str, Any]:
        """Return all that the phase's results depend on: tensors and numbers."""
        return {
            **self.network.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "loss_sum": self.loss_sum,
            "pruning": self.pruning.state_dict(),
            "predicted": self.predicted,
            "reference": self.reference.samples,
            "log": None if self.log is None else self.log.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError, RuntimeError or ValueError for a state of another version."""
        self.network.load_state_dict(state)
        self.pruning.load_state_dict(state["pruning"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.loss_sum.copy_(state["loss_sum"])
        self._exchanged.copy_(state["loss_sum"])
        self.predicted.copy_(state["predicted"])
        self.reference.samples = state["reference"]
        if self.log is not None:
            self.log.load_state_dict(state["log"])


def place(epoch: int, step: int) -> str:
    """Return where a run is, in words."""
    return f"epoch {epoch}, step {step}"


def stopped(id: str, epoch: int, step: int) -> Stopped:
    return Stopped(
        f"run {id} stopped in {place(epoch, step)} and left a checkpoint; the same command goes on from there"
    )
