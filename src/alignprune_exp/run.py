"""One run: its processes, its lock, its parts and phases, and what ends it."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import record
from .config import TRACKING, Config
from .console import epoch_line, say
from .distributed import Lost, Processes
from .errors import GOES_ON, Failed, Stopped, UsageError, answering
from .loop import Loop, Spent, place, stopped
from .models import last_linear
from .network import Network
from .pruning import (
    Choice,
    Criterion,
    Evidence,
    Fixed,
    Full,
    NonFiniteLossError,
    Pruner,
    PruningWarning,
    Trajectories,
    WarmUpLog,
)
from .pruning.seeding import generator
from .record import Row
from .records import PROBABILITIES, read_summary
from .reference import Reference
from .runs import RunFolder, Writing, owner_alive, write_json, write_text
from .setup import Setup, check_pruning, make_pruning
from .trackers import Mirror, Mirrored, Tracker

ONE_VALUE = "more than 1 value per channel"  # that PyTorch's batch norm expects

Result = TypeVar("Result")


def run(config: Config, command: str, group: str | None = None) -> tuple[dict[str, Any], Path]:
    """Run, or resume, one experiment; return its summary and its folder.

    ``group`` names the suite that the run belongs to, for tracking. A run that has finished is not run again: its
    summary is returned. Raises UsageError for a mistake in the config or the data, before anything is written,
    Failed, and Stopped.
    """
    processes = Processes()
    with ExitStack() as owned:
        owned.enter_context(processes.joined(config.device, bool(config.compile)))
        one = _agreed(processes, lambda: Run(config, processes))
        folder = RunFolder(Path(config.paths.results), one.setup.id)

        def begin() -> dict[str, Any] | None:
            if processes.rank > 0:
                return None
            anew = config.force and not folder.was_requeued()
            if not anew and (ended := _ended(folder)):
                if config.keep_probabilities and not (folder.path / PROBABILITIES).exists():
                    say("note: it kept no probabilities; force=true runs it again and keeps them")
                return ended
            owned.enter_context(folder.claim(anew))
            return _ended(folder)

        ended = _agreed(processes, begin)
        if processes.any(ended is not None):
            return ended or read_summary(folder.path) or {}, folder.path
        try:
            with processes.connected():
                return one.train(folder, command, group), folder.path
        except Lost as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all with the first; let it be said why
            error.speaks = processes.rank == 1 and _has_died(folder.path)
            raise


def _agreed(processes: Processes, work: Callable[[], Result]) -> Result:
    """Do the work in every process; where one of them finds a mistake, they all end, and rank 0 says which."""
    result, mistake = None, None
    try:
        result = work()
    except (UsageError, Failed) as error:
        mistake = error
    said = processes.first(None if mistake is None else str(mistake))
    if mistake is not None:
        raise mistake
    if said is not None:
        raise UsageError(said)
    return cast(Result, result)


def _has_died(folder: Path) -> bool:
    """Return whether the process that owned the folder has ended, or ends within two seconds."""
    for _ in range(20):
        if not owner_alive(folder):
            return True
        time.sleep(0.1)
    return False


def _ended(folder: RunFolder) -> dict[str, Any] | None:
    summary = read_summary(folder.path)
    if summary is None:
        return None
    if summary["status"] == "failed":
        raise Failed(f"run {folder.id} has failed before: {summary['error']}; force=true tries again")
    say(f"run {folder.id} has finished already, {summary['finished_at']}; force=true runs it again")
    return summary


class Run:
    """A run walks its phases: one, or a warm-up on everything and then training on what is chosen by it.

    Building one reads the data and writes nothing; it raises UsageError for whatever the config asks for that the
    data or the machine cannot give.

    Attributes:
        loop: the phase that it is in; None before a choice without a warm-up.
        choice: what a static criterion has chosen, once it has.
        halves: how many of the two networks that hold samples out have been trained.
        done: how many epochs have ended.
        journal: what they have left; the last one's share of it may still be in the making. Processes that do not
            write have the rows alone, without AUROCs.
        writing: makes it, writes it down, and checkpoints, beside the training.
    """

    def __init__(self, config: Config, processes: Processes | None = None) -> None:
        self.setup = setup = Setup.of(config, processes or Processes())
        self.reference = Reference(setup)
        self.choice: Choice | None = None
        self.halves = 0
        self.done, self.journal = 0, record.Journal(setup.id)
        self.writing, self._saved = Writing(), time.monotonic()
        self.loop: Loop | None = None
        if isinstance(setup.plan, Pruner):
            if setup.holdout:
                check_pruning(config)  # whose mistakes would show once the halves are trained
            self.loop = self._coming()
        elif setup.before:
            self.loop = self._phase(Full(), setup.before, "warm-up model", WarmUpLog(setup.n))
        else:
            self._phase(Full(), 1)  # whose mistakes are to be found now

    def _phase(
        self,
        pruner: Pruner,
        epochs: int,
        purpose: str = "model",
        log: WarmUpLog | None = None,
        bank: Trajectories | None = None,
        spent: Spent | None = None,
    ) -> Loop:
        setup = self.setup
        clean = None if setup.noisy is None else ~setup.noisy
        labels = None if setup.task.classes is None else setup.task.strata
        phase = (pruner, epochs)
        pruning = make_pruning(setup.config, range(setup.n), clean, labels, setup.device, phase, bank)
        network = Network(setup, purpose)
        if setup.embeds:
            last_linear(network.learner.networks[0])  # which its outputs would miss after a warm-up
        return Loop(setup, pruning, network, self.reference, log, spent)

    def train(self, folder: RunFolder, command: str, group: str | None = None) -> dict[str, Any]:
        """Walk the epochs from where the folder's checkpoint stands; write the record; return the summary."""
        setup, writes = self.setup, self.setup.processes.rank == 0
        config = setup.config
        self._resume(folder)
        environment = record.environment(setup, command, self.done)
        if writes:
            self._write(folder, environment)
        tracker = TRACKING.make(config.tracking) if writes else Tracker()
        values = config.model_dump() | {"environment": environment}
        mirrored = Mirrored(setup.id, group, folder.path, values, self.done)
        mirror = Mirror(tracker, mirrored, say)
        for note in setup.notes:
            say(f"note: {note}")
        say(self._beginning())
        try:
            with _stop_signals() as stop, _warnings_said(), self._batches_turn_bad(), self.writing:
                error = self._walk(folder, stop, mirror)
                self.writing.wait()
            summary = record.summary(setup, self.loop, self.choice, self.journal.rows, error)
            probabilities = self._probabilities() if config.keep_probabilities and error is None else None
            if writes:
                with folder.owned():
                    if error is None:
                        record.write_samples(folder.path / "samples.parquet", setup, self._running)
                    if probabilities is not None:
                        record.write_probabilities(folder.path / PROBABILITIES, setup, probabilities)
                    self._write(folder, environment)
                    write_json(folder.path / "summary.json", summary)
        except BaseException as ended:
            mirror.finish({"status": "stopped" if isinstance(ended, Stopped) else "interrupted"})
            raise
        mirror.finish(summary)
        if summary["status"] == "failed":
            raise Failed(f"run {setup.id}: {summary['error']}; the record is in {folder.path}")
        if writes and not config.keep_checkpoints:
            folder.remove_checkpoints()
        return summary

    @property
    def _running(self) -> Loop:
        assert self.loop is not None
        return self.loop

    def _probabilities(self) -> Tensor:
        """Return every training sample's class probabilities (n, C), in eval mode, from all processes together."""
        setup, network = self.setup, self._running.network
        network.learner.eval()
        own = setup.task.probabilities(network, setup.task.train.evaluation(setup.own))
        return setup.processes.gather(own)

    def _write(self, folder: RunFolder, environment: Row) -> None:
        """Write all that there is of the record before the run has ended."""
        self.journal.write(folder)
        write_text(folder.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.setup.config.model_dump())))
        write_json(folder.path / "environment.json", environment)
        if self.setup.task.skipped:
            write_text(folder.path / "skipped.txt", "".join(f"{line}\n" for line in self.setup.task.skipped))

    def _beginning(self) -> str:
        setup, config = self.setup, self.setup.config
        step = self.loop.step if self.loop else 0
        warmup = f"{setup.before} on halves of the samples" if setup.holdout else f"a warm-up of {setup.before}"
        parts = [
            f"run {setup.id}: {setup.n} samples of {config.dataset.name}",
            f"{config.epochs} epochs" + (f" after {warmup}" if setup.before else ""),
            f"{config.model.name} on {setup.device} in {setup.precision}",
        ]
        if setup.processes.size > 1:
            parts.append(f"{setup.processes.size} processes")
        if self.done or step:
            parts.append(f"resumed at {self._where}")
        return ", ".join(parts)

    @property
    def _where(self) -> str:
        return place(self.done, self.loop.step if self.loop else 0)

    def _phases(self, folder: RunFolder, stop: threading.Event) -> Iterator[Loop]:
        """Yield the phases that are left, each when the one before it has ended."""
        while self._prepares:
            if self.loop is not None:
                yield self.loop
            if isinstance(self.setup.plan, Criterion):
                self._choose(self.setup.plan)
            else:
                self._hold_out()
            self._save(folder)
            if self.setup.processes.any(stop.is_set()):
                self._stop()
        yield self._running

    @property
    def _prepares(self) -> bool:
        """Whether the phase that it is in comes before the one that counts."""
        if self.setup.chooses_once:
            return self.choice is None
        return self.setup.holdout > 0 and self.halves < 2

    def _walk(self, folder: RunFolder, stop: threading.Event, mirror: Mirror) -> str | None:
        """Train the epochs that are left, writing the record as they end; return why they cannot go on, if so."""
        setup = self.setup
        recent = deque((row["seconds"] for row in self.journal.rows), 5)
        for loop in self._phases(folder, stop):
            while loop.pruning.epoch < loop.pruning.epochs:
                try:
                    now = loop.epoch(stop, lambda: self._save(folder))
                except NonFiniteLossError as error:
                    return str(error)
                complete = record.completion(setup, loop, now) if setup.processes.rank == 0 else None
                row = record.epoch_row(setup, loop, now)
                self.done += 1
                stops = self.done < setup.epochs and setup.processes.any(stop.is_set())
                if complete is not None:
                    last = stops or loop.pruning.epoch == loop.pruning.epochs
                    self._write_down(folder, mirror, row, complete, last)
                else:
                    self.journal.rows.append(row)
                recent.append(row["seconds"])
                left = sum(recent) / len(recent) * (setup.epochs - self.done)
                say(epoch_line(row, setup.epochs, left, setup.task.metrics[0]))
                if stops:
                    self._stop()
        return None

    def _stop(self) -> NoReturn:
        """End between two epochs."""
        self.writing.wait()
        raise stopped(self.setup.id, self.done, 0)

    @contextmanager
    def _batches_turn_bad(self) -> Iterator[None]:
        """Turn what is wrong with a batch, which nobody could see before, into Failed: there is a record already."""
        try:
            yield
        except UsageError as error:
            why = f"{error}; with the images as they were, {GOES_ON}"
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            why = "a batch of one sample has nothing to be normalised by; set another batch_size"
            if hasattr(self.setup.config.model, "norm"):
                why += ", or model.norm=group"
        else:
            return
        failed = Failed(f"run {self.setup.id} ended in {self._where}: {why}")
        failed.speaks = True  # of several processes this one alone has seen it
        raise failed

    def _choose(self, criterion: Criterion) -> None:
        """Choose by what the warm-up has left, and begin the phase that trains on it, from scratch."""
        setup, before, began = self.setup, self.loop, time.perf_counter()
        network = Network(setup, "model") if before is None else before.network
        network.learner.eval()
        evidence, samples = _evidence(setup, criterion, network, WarmUpLog(setup.n) if before is None else before.log)
        try:
            choice = criterion.choose(evidence, generator(setup.config.seed, "choose"))
        except ValueError as error:
            raise Failed(f"run {setup.id} cannot choose: {error}") from None
        trained = 0 if before is None else before.trained
        self._take(choice, Spent(time.perf_counter() - began, samples, trained))

    def _take(self, choice: Choice, spent: Spent) -> None:
        """Begin the phase that trains on a choice."""
        before, self.choice = self.loop, choice
        bank = None if before is None else before.pruning.trajectories
        self.loop = self._phase(Fixed(indices=choice.indices), self.setup.config.epochs, bank=bank, spent=spent)
        if before is not None:
            self.loop.predicted.copy_(before.predicted)

    def _hold_out(self) -> None:
        """Let the network tell the losses of the half that it has not trained on, and begin the next phase."""
        setup, before, began = self.setup, self._running, time.perf_counter()
        before.network.learner.eval()
        others = torch.from_numpy(setup.half(1 - self.halves))
        losses = setup.processes.gather(before.recorded(setup.processes.share(others)))
        if not losses.isfinite().all():
            raise Failed(f"run {setup.id} cannot go on: a held-out sample's loss is not finite; lower optimizer.lr")
        told = before.pruning.told.index_copy(0, others.to(setup.device), losses)
        self.halves += 1
        self.loop = self._coming(Spent(time.perf_counter() - began, len(others), before.trained))
        self.loop.pruning.tell(told)

    def _coming(self, spent: Spent | None = None) -> Loop:
        """Return the phase after so many halves: on a half of the samples, or the one that counts.

        Each network is scored by its own losses: those of one that has trained on a sample would pass for what this one
        has learned of it.
        """
        setup, bank = self.setup, None if self.loop is None else self.loop.pruning.trajectories.anew()
        assert isinstance(setup.plan, Pruner)
        if self._prepares:
            half = Fixed(indices=setup.half(self.halves))
            return self._phase(half, setup.holdout, f"holdout model {self.halves}", bank=bank, spent=spent)
        return self._phase(setup.plan, setup.config.epochs, bank=bank, spent=spent)

    def _write_down(
        self,
        folder: RunFolder,
        mirror: Mirror,
        row: Row,
        complete: Callable[[], tuple[Row, list[Row]]],
        checkpoint: bool,
    ) -> None:
        """Have an epoch's record completed and written, and a checkpoint, where one is due or asked for."""
        due = checkpoint or time.monotonic() - self._saved >= self.setup.config.checkpoint_seconds
        save = self._checkpoint(folder) if due else None

        def write() -> None:
            aurocs, drawn = complete()
            whole = row | aurocs
            self.journal.add(whole, drawn)
            self.journal.write(folder)
            if save is not None:
                save()
            mirror.log(whole)

        self.writing.put(write)

    def _save(self, folder: RunFolder) -> None:
        """Write a checkpoint, at once."""
        if self.setup.processes.rank == 0:
            self.writing.put(self._checkpoint(folder))
            self.writing.wait()

    def _checkpoint(self, folder: RunFolder) -> Callable[[], None]:
        """Return what writes a checkpoint of how things stand now, once the journal has all epochs that have ended."""
        state = tree_map_only(Tensor, lambda held: held.detach().to("cpu", copy=True), self._state())
        self._saved = time.monotonic()
        return lambda: folder.save_checkpoint({**state, "record": self.journal.state_dict()})

    def _state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the journal."""
        loop = self._running
        choice = self.choice and {
            "indices": torch.from_numpy(self.choice.indices),
            "facts": dict(self.choice.facts),
        }
        return {
            "precision": self.setup.precision,
            "device": self.setup.device.type,
            "epoch": loop.pruning.epoch,
            "choice": choice,
            "halves": self.halves,
            "spent": asdict(loop.spent),
            **loop.state_dict(),
        }

    def _resume(self, folder: RunFolder) -> None:
        """Go back to the latest checkpoint, if there is one."""
        state = folder.load_checkpoint(say)
        if state is not None:
            self._check_precision(state)
            try:
                if (choice := state["choice"]) is not None:
                    self._take(Choice(choice["indices"].numpy().copy(), choice["facts"]), Spent(**state["spent"]))
                elif state["halves"]:
                    self.halves = state["halves"]
                    self.loop = self._coming(Spent(**state["spent"]))
                self._running.load_state_dict(state)
                self.journal.load_state_dict(state["record"])
                self.done = len(self.journal.rows)
            except (AssertionError, KeyError, RuntimeError, TypeError, ValueError):
                raise UsageError(
                    f"the checkpoint in {folder.path} was left by another version of this program and cannot be gone "
                    "on from; start again with force=true"
                ) from None
        step = self.loop.step if self.loop else 0
        if not self.setup.processes.same(self.done * 2**32 + step):
            raise Failed(f"the processes do not see the same checkpoint in {folder.path}; put it on a disk they share")

    def _check_precision(self, state: dict[str, Any]) -> None:
        setup = self.setup
        for key, here in (("precision", setup.precision), ("device", setup.device.type)):
            if state[key] != here:
                raise UsageError(
                    f"run {setup.id} was begun with {key} {state[key]} and {key}={getattr(setup.config, key)} means "
                    f"{here} here; go on where it is {state[key]}, or start again with force=true"
                )


def _evidence(setup: Setup, criterion: Criterion, network: Network, log: WarmUpLog | None) -> tuple[Evidence, int]:
    """Return what a criterion chooses by, and how many samples were passed through the network for it."""
    assert log is not None
    task, processes, needs, samples = setup.task, setup.processes, criterion.needs, 0
    known: dict[str, Any] = {"losses": log.losses, "forgotten": log.forgotten} if log.epochs else {}
    if needs & {"probabilities", "embeddings"}:
        train = task.train
        batches = train.strong(setup.own, log.epochs) if criterion.strong else train.evaluation(setup.own)
        own = task.outputs(network, batches)
        known["probabilities"], known["embeddings"] = (processes.gather(values).cpu().numpy() for values in own)
        samples += setup.n
    if "reference" in needs and task.held_out:
        outputs = task.outputs(network, task.reference.evaluation())
        probabilities, embeddings = (values.cpu().numpy() for values in outputs)
        known["reference"] = Evidence(task.reference_labels(), probabilities, embeddings)
        samples += task.held_out
    assert task.strata is not None
    return Evidence(task.strata, **known), samples


@contextmanager
def _warnings_said() -> Iterator[None]:
    """Say what a pruning warns of as a run's own line, in every run of a sweep; show other warnings as they were."""
    show = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, PruningWarning):
            say(f"warning: {message}")
        else:
            show(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PruningWarning)
        warnings.showwarning = shown
        yield


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn SIGINT, SIGTERM and SIGUSR2 into a wish that the loop looks at after each step.

    A second one is obeyed at once, but under a scheduler that has put a handler on SIGUSR2: it signals repeatedly.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    scheduled = callable(signal.getsignal(signal.SIGUSR2))

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and not scheduled:
            raise KeyboardInterrupt
        stop.set()

    with answering(ask, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        yield stop
