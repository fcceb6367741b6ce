"""One run: builds its parts, walks the epochs, leaves the record."""

from __future__ import annotations

import math
import os
import platform
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from . import distributed, learners, models, optim
from .config import NOTHING_HELD_OUT, Config, NoTracking, Pseudo, Trusted, identity, import_class, make_pruner
from .console import Progress, epoch_line, say
from .data.batches import Batch, Batches
from .data.datasets import load
from .data.split import TrainingData, prepare, reference_count
from .diagnostics import detection_auroc, dynamics, kept_noise
from .distributed import Lost, Processes
from .errors import GOES_ON, Failed, Stopped, UsageError
from .files import write_atomically
from .pruning import SCORES, DynamicPruning, Evidence, NonFiniteLossError, Score, Static, WarmUpLog
from .pruning.reference import confident_thresholds, label_quality, most_trusted
from .pruning.seeding import generator
from .record import Record
from .runs import RunFolder, owner_alive, run_id, write_json, write_text
from .tracking import Tracker

STEPS_BETWEEN_QUESTIONS = 10  # after which several processes ask each other whether to stop
FROM_THE_BANK = ("loss", "das", "spearman", "cosine", "small_loss")  # scores that every run can log
Result = TypeVar("Result")


def run(config: Config, command: str, group: str | None = None) -> tuple[dict[str, Any], Path]:
    """Run, or resume, one experiment; return its summary and its folder.

    ``group`` names the suite that the run belongs to, for tracking. A run that has finished is not run again: its
    summary is returned. Raises UsageError for a mistake in the
    config or the data, before anything is written, Failed, and Stopped.
    """
    processes = Processes()
    with ExitStack() as owned:
        owned.enter_context(processes.joined())
        experiment = _agreed(processes, lambda: Experiment(config, processes))
        folder = RunFolder(Path(config.paths.results), experiment.id)

        def begin() -> dict[str, Any] | None:
            if processes.rank > 0:
                return None
            anew = config.force and not folder.was_requeued()
            if not anew and (ended := _ended(folder)):
                return ended
            owned.enter_context(folder.claim(anew))
            return _ended(folder)

        ended = _agreed(processes, begin)
        if processes.any(ended is not None):
            return ended or folder.summary() or {}, folder.path
        try:
            with processes.connected():
                return experiment.train(folder, command, group), folder.path
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
    summary = folder.summary()
    if summary is None:
        return None
    if summary["status"] == "failed":
        raise Failed(f"run {folder.id} has failed before: {summary['error']}; force=true tries again")
    say(f"run {folder.id} has finished already, {summary['finished_at']}; force=true runs it again")
    return summary


class Experiment:
    """The parts of one run. Building them reads the data and writes nothing.

    Raises UsageError for whatever the config asks for that the data or the machine cannot give.
    """

    def __init__(self, config: Config, processes: Processes | None = None) -> None:
        self.config = config
        self.processes = processes or Processes()
        if config.learner.name != "ce" and self.processes.size > 1:
            raise UsageError(
                f"learner={config.learner.name} keeps to itself what it knows about a sample, and "
                f"{self.processes.size} processes would not share it; use learner=ce, or one process"
            )
        self.device = resolve_device(config.device, self.processes)
        self.precision = resolve_precision(config.precision, self.device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        torch.set_num_threads(config.threads)

        self.data = load_data(config)
        self.id = run_id(identity(config, self.data.fingerprint, self.processes.size))
        self.config_id = run_id(identity(config, fingerprint=""))
        train, reference = self.data.train, self.data.reference
        self.labels = train.labels
        self.noisy = None if train.clean_labels is None else train.labels != train.clean_labels
        if config.score.name == "oracle" and self.noisy is None:
            raise UsageError("score=oracle needs clean labels, and this data set has none; use another score")
        self.pruning = make_pruning(config, train, None if self.noisy is None else ~self.noisy, self.device)

        self.batches = self._batches(train, augmented=True)
        self.test_batches = self._batches(self.data.test)
        self.evaluations = {name: self._batches(split) for name, split in self.data.evaluations.items()}
        self.reference_batches = self._batches(reference) if reference is not None else self.batches
        self.reference = torch.arange(0 if reference is None else len(reference))  # samples (R,) of these batches
        if isinstance(config.reference, Pseudo):
            reference_count(config.reference.size, len(train))

        if config.batch_size < self.processes.size:
            raise UsageError(
                f"batch_size={config.batch_size} over {self.processes.size} processes leaves some without a sample; "
                f"set batch_size={self.processes.size} or more"
            )
        if config.model.norm == "sync" and self.processes.size > 1 and self.device.type == "cpu":
            raise UsageError("model.norm=sync is for CUDA devices; set model.norm=group, or one process")
        self.model = self._fresh("warm-up model" if self.pruning.warmup else "model").to(self.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = optim.build(config.optimizer, self.model.parameters())
        self.parallel: nn.Module = self.model
        if self.processes.size > 1:
            self.parallel = distributed.parallel(self.model)
        mode = config.compile if isinstance(config.compile, str) else None
        self.forward = torch.compile(self.parallel, mode=mode) if config.compile else self.parallel

    def _fresh(self, purpose: str) -> learners.Learner:
        """Return the learner with networks as ``purpose`` initialises them."""
        config, classes = self.config, len(self.data.classes)
        torch.manual_seed(int(generator(config.seed, purpose).integers(2**62)))
        network = partial(models.build, config.model, len(self.data.mean), classes)
        return learners.build(config, network, self.pruning.n, classes)

    def _batches(self, split: Any, augmented: bool = False) -> Batches:
        config = self.config
        return Batches(
            split,
            batch_size=config.batch_size if augmented else max(config.batch_size, 256),
            device=self.device,
            mean=self.data.mean,
            std=self.data.std,
            seed=config.seed,
            train=augmented,
            flip=config.dataset.flip,
            crop=getattr(config.dataset, "crop", 0),
            channels_last=config.channels_last,
            dtype=torch.bfloat16 if self.precision == "bf16" else torch.float32,
            workers=config.workers,
        )

    def train(self, folder: RunFolder, command: str, group: str | None = None) -> dict[str, Any]:
        """Walk the epochs from where the folder's checkpoint stands; write the record; return the summary."""
        config, pruning = self.config, self.pruning
        self.step, self.loss_sum = 0, torch.zeros((), dtype=torch.float64, device=self.device)
        self.elapsed = 0.0
        self.own: list[tuple[Tensor, Tensor]] = []
        self.predicted = torch.full((self.pruning.n,), -1, dtype=torch.int64, device=self.device)
        self.warm_up, self.seconds_choice = WarmUpLog(pruning.n), 0.0
        self.record = Record()
        self._resume(folder)
        writes = self.processes.rank == 0
        environment = self.environment(command, len(self.record.rows))
        if writes:
            self._write_record(folder, environment)
        tracking = config.tracking if writes else NoTracking(name="none")
        mirrored = config.model_dump() | {"environment": environment}
        tracker = Tracker(tracking, self.id, group, folder.path, mirrored, say)
        say(
            f"run {self.id}: {len(self.labels)} samples of {config.dataset.name}, {config.epochs} epochs"
            + (f" after a warm-up of {pruning.warmup}, " if pruning.warmup else ", ")
            + f"{config.model.name} on {self.device} in {self.precision}"
            + (f", {self.processes.size} processes" if self.processes.size > 1 else "")
            + (f", resumed at epoch {pruning.epoch}, step {self.step}" if pruning.epoch or self.step else "")
        )
        try:
            with _stop_signals() as stop, self._images_turn_bad():
                error = self._walk(folder, stop, tracker)
            summary = self._summary(error)
            if writes:
                folder.check_owned()
                if error is None:
                    self._write_samples(folder.path / "samples.parquet")
                self._write_record(folder, environment)
                write_json(folder.path / "summary.json", summary)
        except BaseException as ended:
            tracker.finish({"status": "stopped" if isinstance(ended, Stopped) else "interrupted"})
            raise
        tracker.finish(summary)
        if summary["status"] == "failed":
            raise Failed(f"run {self.id}: {summary['error']}; the record is in {folder.path}")
        if writes and not config.keep_checkpoints:
            folder.remove_checkpoints()
        return summary

    def _write_record(self, folder: RunFolder, environment: dict[str, Any]) -> None:
        """Write all that there is of the record before the run has ended."""
        self.record.write(folder)
        write_text(folder.path / "config.yaml", _yaml(self.config))
        write_json(folder.path / "environment.json", environment)
        if self.data.skipped:
            write_text(folder.path / "skipped.txt", "".join(f"{line}\n" for line in self.data.skipped))

    def _walk(self, folder: RunFolder, stop: threading.Event, tracker: Tracker) -> str | None:
        """Train the epochs that are left, writing the record as they end; return why they cannot go on, if so."""
        epochs, rows = self.pruning.epochs, self.record.rows
        while self.pruning.epoch < epochs:
            if self.pruning.must_choose:
                self._choose()
                self._save(folder)
                if self.processes.any(stop.is_set()):
                    raise self._stopped()
            try:
                row, more = self._epoch(folder, stop)
            except NonFiniteLossError as error:
                return str(error)
            self.record.add(row, more)
            if self.processes.rank == 0:
                self.record.write(folder)
            self._save(folder)
            tracker.log(row)
            recent = [r["seconds"] for r in rows[-5:]]
            left = sum(recent) / len(recent) * (epochs - len(rows))
            say(epoch_line(row, epochs, left))
            if self.processes.any(stop.is_set()) and self.pruning.epoch < epochs:
                raise self._stopped()
        return None

    def _choose(self) -> None:
        """Let a static pruner choose by what the warm-up has left, and begin again from scratch."""
        pruning, clock = self.pruning, _Clock()
        pruner = cast(Static, pruning.pruner)
        evidence = Evidence(labels=self.labels, losses=self.warm_up.losses, forgotten=self.warm_up.forgotten)
        if pruner.needs & {"probabilities", "embeddings"}:
            share = self.processes.share(torch.arange(pruning.n))
            batches = self.batches.strong(share, pruning.epoch) if pruner.strong else self.batches.evaluation(share)
            own = self._outputs(batches)
            probabilities, embeddings = (self.processes.gather(values).cpu().numpy() for values in own)
            evidence = replace(evidence, probabilities=probabilities, embeddings=embeddings)
        if "reference" in pruner.needs and self.data.reference is not None:
            outputs = self._outputs(self.reference_batches.evaluation())
            probabilities, embeddings = (values.cpu().numpy() for values in outputs)
            evidence = replace(evidence, reference=Evidence(self.data.reference.labels, probabilities, embeddings))
        try:
            pruning.choose(evidence)
        except ValueError as error:
            raise Failed(f"run {self.id} cannot choose: {error}") from None
        self.model.load_state_dict(self._fresh("model").state_dict())
        self.optimizer = optim.build(self.config.optimizer, self.model.parameters())
        self.seconds_choice = clock.total()
        self.elapsed += self.seconds_choice

    def _looked_at(self) -> int:
        """Return how many samples a static pruner's choice has passed through the network."""
        needs = cast(Static, self.pruning.pruner).needs
        reference = len(self.reference) if "reference" in needs else 0
        return reference + (self.pruning.n if needs & {"probabilities", "embeddings"} else 0)

    @torch.no_grad()
    def _outputs(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """Return the first network's probabilities (n, C) and embeddings (n, d) of samples, in eval mode."""
        self.model.eval()
        with models.embeddings(self.model.networks[0]) as collected:
            shares = [self._logits(images, 0).softmax(1) for _, images, _ in batches]
        return torch.cat(shares), torch.cat(collected)

    def _phase(self, epoch: int) -> tuple[int, int]:
        """Return the first epoch of the phase that an epoch is in, and the phase's number of epochs."""
        warmup = self.pruning.warmup
        return (0, warmup) if epoch < warmup else (warmup, self.config.epochs)

    def _epoch(self, folder: RunFolder, stop: threading.Event) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Train one epoch; return its metrics and its rows of dynamics."""
        config, pruning = self.config, self.pruning
        clock = _Clock()
        epoch, ranked_by, selection = pruning.epoch, pruning.ranked_by, pruning.selection
        began, length = self._phase(epoch)
        ranking = pruning.ranking
        order = pruning.order()
        chosen = b"".join(part.tobytes() for part in (order, selection.weights, self.reference.numpy()))
        if not self.processes.same(zlib.crc32(chosen)):
            raise Failed(
                f"the processes do not agree on the selection of epoch {epoch}; start them from one checkout, with "
                "one version of every package, on one kind of processor"
            )
        clock.lap("seconds_select")

        rank, ranks = self.processes.rank, self.processes.size
        sizes = self.batches.sizes(len(order))
        steps = len(sizes)
        progress = Progress()
        if self.step == 0:
            self.model.begin_epoch(epoch - began, self.batches.evaluation(selection.indices), self._logits)
        clock.lap("seconds_divide")
        self.model.train()
        lr = 0.0
        views = self.model.views
        with self._uneven(sizes[-1] < ranks):
            for index, images, labels in self.batches.epoch(order, epoch, self.step, rank, ranks, views):
                progressed = (epoch - began + self.step / steps) / length
                lr = optim.set_progress(self.optimizer, progressed, config.optimizer)
                here = index.to(self.device, non_blocking=True)
                step = learners.Step(here, images, labels, epoch - began, self.step, steps)
                plain, training, predicted = self.model.losses(step, self._training_logits)
                self.predicted[here] = predicted
                recorded = plain if config.recorded == "plain" else training
                loss = pruning.update(index, training, recorded)
                if ranks > 1:  # gradients are averaged over the processes, whose shares may differ in size
                    loss = loss * (len(index) * ranks / sizes[self.step])
                    self.own.append((index, recorded.detach()))
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.model.after_backward()
                self.optimizer.step()
                self.loss_sum += plain.detach().sum()
                self.step += 1
                if self.step < steps and self._stops(stop):
                    self._exchange()
                    pruning.check_finite()
                    self.elapsed += clock.total()
                    self._save(folder)
                    raise self._stopped()
                progress.show(f"epoch {epoch + 1}/{pruning.epochs}  step {self.step}/{steps}")
        self._exchange()
        self.processes.from_rank_0(list(self.model.buffers()))
        pruning.check_finite()
        if not torch.stack([p.detach().sum() for p in self.model.parameters()]).isfinite().all():
            raise NonFiniteLossError(epoch, what="a weight")
        train_loss = self.loss_sum.item() / len(order)
        clock.lap("seconds_train")

        self.model.eval()
        refreshed = 0
        if config.score.unseen == "refresh":
            unseen = pruning.unseen().cpu()
            refreshed = len(unseen)
            if refreshed:
                pruning.record(unseen, self._plain_losses(self.batches, unseen))
        clock.lap("seconds_refresh")
        reference = self._reference_losses()
        reference_loss = reference.mean().item() if len(reference) else None
        if reference_loss is None and config.reference.aligns:
            reference_loss = pruning.trajectories.population_mean()
        reference_noise = self._reference_noise()
        clock.lap("seconds_reference")
        pruning.end_epoch(reference_loss)
        clock.lap("seconds_score")
        if epoch < pruning.warmup:
            right = self.predicted.cpu().numpy() == self.labels
            self.warm_up.observe(pruning.trajectories.last_N.cpu().numpy(), right)
        forwarded = len(reference) + self._choose_reference()
        clock.lap("seconds_reference")

        test_accuracy = test_loss = None
        elsewhere: dict[str, float | None] = {f"test_accuracy_{name}": None for name in self.evaluations}
        if (epoch + 1 - began) % config.eval_every == 0 or epoch + 1 == began + length:
            test_accuracy, test_loss = self._test(self.test_batches, len(self.data.test))
            if not math.isfinite(test_loss):
                raise NonFiniteLossError(epoch, what="the test loss")
            for name, batches in self.evaluations.items():
                elsewhere[f"test_accuracy_{name}"], _ = self._test(batches, len(self.data.evaluations[name]))
        clock.lap("seconds_test")

        scores = self.bank_scores()
        plain_noise, weighted_noise = kept_noise(selection, self.noisy)
        aurocs = {
            f"auroc_{name}": None
            if self.noisy is None or name not in scores
            else detection_auroc(scores[name], self.noisy)
            for name in self._logged_names
        }
        more = dynamics(
            epoch,
            pruning.trajectories.last_N.cpu().numpy(),
            reference.cpu().numpy(),
            scores,
            self.noisy,
            self.labels,
            selection,
            len(self.data.classes),
        )
        clock.lap("seconds_diagnostics")
        self.step = 0
        self.loss_sum.zero_()
        self.loss_sum_before.zero_()
        static = isinstance(pruning.pruner, Static)
        looked_at = 0
        if static and epoch == pruning.warmup:
            clock.laps["seconds_select"] += self.seconds_choice
            looked_at = self._looked_at()
        row = {
            "epoch": epoch,
            "phase": ("warmup" if epoch < pruning.warmup else "train") if static else None,
            "ranked_by": ranked_by,
            "train_loss": train_loss,
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            **elsewhere,
            "lr": lr,
            "kept_fraction": len(order) / pruning.n,
            "kept_noise": plain_noise,
            "kept_noise_weighted": weighted_noise,
            **aurocs,
            "reference_loss": reference_loss,
            "reference_noise": reference_noise,
            "score_mean": float(np.nanmean(ranking)) if ranked_by and not np.isnan(ranking).all() else None,
            "low_fraction": None if math.isnan(selection.low_fraction) else selection.low_fraction,
            "samples_seen": int(pruning.times_selected.sum()),
            "samples_refreshed": refreshed,
            "samples_reference": forwarded,
            "samples_forwarded": self.model.passes(epoch - began) * len(order) + refreshed + forwarded + looked_at,
            "seconds": self.elapsed + clock.total(),
            **clock.laps,
        }
        self.elapsed = 0.0
        return row, more

    @property
    def _ranking_name(self) -> str | None:
        return self.pruning.score.name if self.pruning.pruner.uses_scores else None

    @property
    def _logged_names(self) -> list[str]:
        """The scores that the run logs: those of every run, and the one that ranks."""
        return list(dict.fromkeys(filter(None, (*FROM_THE_BANK, self._ranking_name))))

    def bank_scores(self) -> dict[str, np.ndarray]:
        """Return every score (n,) that the bank can give after the last finished epoch, by name.

        A score that compares with the reference is there once its window is full.
        """
        pruning = self.pruning
        scores = {name: pruning.score if name == self._ranking_name else SCORES[name]() for name in self._logged_names}
        if pruning.epoch < self.config.score.window or not self.config.reference.aligns:
            scores = {name: score for name, score in scores.items() if not score.aligned}
        return dict(zip(scores, pruning.several_scores(list(scores.values())), strict=True))

    def _training_logits(self, images: Tensor, *network: int) -> Tensor:
        """Return float32 logits (B, C), of all networks or of one, through what compiles and parallelises them."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.forward(images, *network).float()

    def _logits(self, images: Tensor, *network: int) -> Tensor:
        """Return the same without either, for evaluation."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(images, *network).float()

    @torch.no_grad()
    def _evaluate(self, images: Tensor, labels: Tensor, *network: int) -> tuple[Tensor, Tensor]:
        """Return each sample's plain cross-entropy (B,) and whether it is classified right (B,)."""
        logits = self._logits(images, *network)
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels

    def _reference_losses(self) -> Tensor:
        """Return the reference samples' losses (R,), in eval mode."""
        if len(self.reference) == 0:
            return torch.empty(0)
        return self._plain_losses(self.reference_batches, self.reference).double()

    def _reference_noise(self) -> float | None:
        """Return the wrong share of the reference set's labels, where that is known."""
        if (trusted := self.data.reference) is not None and trusted.clean_labels is not None:
            return float((trusted.labels != trusted.clean_labels).mean())
        if self.noisy is None or len(self.reference) == 0:
            return None
        return float(self.noisy[self.reference].mean())

    def _choose_reference(self) -> int:
        """Choose the pseudo reference set anew where that is due; return how many samples were forwarded for it."""
        config, pruning = self.config, self.pruning
        reference = config.reference
        if not isinstance(reference, Pseudo) or not reference.due(pruning.epoch, config.epochs):
            return 0
        by_quality = reference.method == "cleanlab"
        trust = self._label_quality() if by_quality else pruning.scores("small_loss")
        rng = generator(config.seed, "pseudo reference", pruning.epoch)
        chosen = most_trusted(trust, self.labels, reference_count(reference.size, pruning.n), rng)
        self.reference = torch.from_numpy(chosen)
        pruning.change_reference(self._reference_losses().mean())
        return len(chosen) + by_quality * pruning.n

    @torch.no_grad()
    def _label_quality(self) -> np.ndarray:
        """Return each training sample's label quality (n,), from one pass in eval mode without augmentation."""
        own, labels = self.processes.share(torch.arange(self.pruning.n)), torch.from_numpy(self.labels)
        none = torch.empty(0, len(self.data.classes), device=self.device)
        p = torch.cat([none, *(self._logits(images).softmax(1) for _, images, _ in self.batches.evaluation(own))])
        own_labels = labels[own].to(self.device)
        confidence = self.processes.gather(p.gather(1, own_labels[:, None])[:, 0])
        thresholds = confident_thresholds(confidence.cpu(), labels, p.shape[1]).to(self.device)
        return self.processes.gather(label_quality(p, own_labels, thresholds)).cpu().numpy()

    def _plain_losses(self, batches: Batches, samples: Tensor) -> Tensor:
        """Return the plain losses (K,) of ``samples`` (K,) without augmentation, of which each process does a share.

        They are the first network's, as those that are recorded.
        """
        shares = batches.evaluation(self.processes.share(samples))
        losses = [self._evaluate(images, labels, 0)[0] for _, images, labels in shares]
        return self.processes.gather(torch.cat([torch.empty(0, device=self.device), *losses]))

    def _stops(self, stop: threading.Event) -> bool:
        """Return whether to stop before the coming step; several processes ask each other now and then."""
        if self.processes.size == 1:
            return stop.is_set()
        return self.step % STEPS_BETWEEN_QUESTIONS == 0 and self.processes.any(stop.is_set())

    def _uneven(self, uneven: bool) -> AbstractContextManager[Any]:
        """Let processes without a share of the last step wait for those that have one."""
        if isinstance(self.parallel, DistributedDataParallel):
            return cast(AbstractContextManager[Any], self.parallel.join(enable=uneven))
        return nullcontext()

    def _exchange(self) -> None:
        """Record what the other processes have observed since the last exchange, and add their losses."""
        if self.processes.size == 1:
            return
        none = (torch.empty(0, dtype=torch.int64), torch.empty(0, device=self.device))
        index, losses = (torch.cat(parts) for parts in zip(none, *self.own, strict=True))
        self.own = []
        gathered = [self.processes.gathered(own) for own in (index, losses, self.predicted[index.to(self.device)])]
        for parts in gathered:
            del parts[self.processes.rank]
        index, losses, predicted = (torch.cat(parts) for parts in gathered)
        self.pruning.record(index, losses)
        self.predicted[index.to(self.device)] = predicted
        self.pruning.bad_step.copy_(self.processes.min(self.pruning.bad_step))
        self.loss_sum = self.loss_sum_before + self.processes.sum(self.loss_sum - self.loss_sum_before)
        self.loss_sum_before.copy_(self.loss_sum)

    def _test(self, batches: Batches, n: int) -> tuple[float, float]:
        """Return accuracy in per cent and mean loss on ``n`` samples."""
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        share = self.processes.share(torch.arange(n))
        for _, images, labels in batches.evaluation(share):
            losses, correct = self._evaluate(images, labels)
            loss += losses.sum()
            right += correct.sum()
        loss, right = self.processes.sum(loss), self.processes.sum(right)
        return 100 * right.item() / n, loss.item() / n

    def _save(self, folder: RunFolder) -> None:
        if self.processes.rank > 0:
            return
        folder.save_checkpoint(
            {
                "precision": self.precision,
                "device": self.device.type,
                "epoch": self.pruning.epoch,
                "step": self.step,
                "elapsed": self.elapsed,
                "loss_sum": self.loss_sum,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "pruning": self.pruning.state_dict(),
                "predicted": self.predicted,
                "reference": self.reference,
                "warm_up": self.warm_up.state_dict() if self.pruning.warmup else None,
                "seconds_choice": self.seconds_choice,
                "record": self.record.state_dict(),
            }
        )

    def _resume(self, folder: RunFolder) -> None:
        """Go back to the latest checkpoint, if there is one."""
        state = folder.load_checkpoint(say)
        if state is not None:
            for key, here in (("precision", self.precision), ("device", self.device.type)):
                if state[key] != here:
                    raise UsageError(
                        f"run {self.id} was begun with {key} {state[key]} and {key}={getattr(self.config, key)} means "
                        f"{here} here; go on where it is {state[key]}, or start again with force=true"
                    )
            try:
                self._restore(state)
            except (KeyError, RuntimeError, ValueError):
                raise UsageError(
                    f"the checkpoint in {folder.path} was left by another version of this program and cannot be gone "
                    "on from; start again with force=true"
                ) from None
        self.loss_sum_before = self.loss_sum.clone()
        if not self.processes.same(self.pruning.epoch * 2**32 + self.step):
            raise Failed(f"the processes do not see the same checkpoint in {folder.path}; put it on a disk they share")

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pruning.load_state_dict(state["pruning"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.loss_sum.copy_(state["loss_sum"])
        self.predicted.copy_(state["predicted"])
        self.reference = state["reference"]
        if state["warm_up"] is not None:
            self.warm_up.load_state_dict(state["warm_up"])
        self.seconds_choice = state["seconds_choice"]
        self.record.load_state_dict(state["record"])

    def _summary(self, error: str | None) -> dict[str, Any]:
        config, pruning, rows = self.config, self.pruning, self.record.rows
        epochs = pruning.pruner.pruned(config.epochs)
        pruned = [row for row in rows if row["epoch"] in epochs]
        tested = [row["test_accuracy"] for row in rows[pruning.warmup :] if row["test_accuracy"] is not None]
        trained = int(pruning.times_selected.sum())
        seconds_steps = sum(row["seconds_train"] for row in rows)
        return {
            "id": self.id,
            "config_id": self.config_id,
            "status": "failed" if error else "finished",
            **({"error": error} if error else {}),
            "dataset": config.dataset.name,
            "noise": config.noise.name,
            "noise_rate": None if self.noisy is None else float(self.noisy.mean()),
            "pairing": self.data.pairing or None,
            "learner": config.learner.name,
            "pruner": config.pruner["name"],
            "score": self._ranking_name,
            "window": config.score.window if self._ranking_name else None,
            "seed": config.seed,
            "scale": config.scale,
            "epochs": config.epochs,
            "samples": pruning.n,
            "test_accuracy_final": rows[-1]["test_accuracy"] if rows else None,
            "test_accuracy_best": max(tested, default=None),
            **self._elsewhere(rows[pruning.warmup :]),
            **({"skipped": len(self.data.skipped)} if self.data.skipped else {}),
            "saved": 1 - trained / (pruning.n * config.epochs),
            "kept_noise_mean": _mean(row["kept_noise"] for row in pruned),
            "kept_noise_weighted_mean": _mean(row["kept_noise_weighted"] for row in pruned),
            "detection_auroc_last": rows[-1][f"auroc_{self._ranking_name}"] if rows and self._ranking_name else None,
            "seconds_train": sum(row["seconds"] - row["seconds_test"] for row in rows),
            "seconds_total": sum(row["seconds"] for row in rows),
            "samples_per_second": trained / seconds_steps if seconds_steps else None,
            **self._of_the_choice(rows),
            "commit": _commit(),
            "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    def _of_the_choice(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what a static pruner adds to the summary."""
        pruning = self.pruning
        if not isinstance(pruning.pruner, Static):
            return {}
        return {
            "warmup_epochs": pruning.warmup,
            "seconds_warmup": sum(row["seconds"] for row in rows[: pruning.warmup]),
            "seconds_select": self.seconds_choice,
            **({f"choice_{name}": value for name, value in pruning.choice.facts.items()} if pruning.choice else {}),
        }

    def _elsewhere(self, rows: list[dict[str, Any]]) -> dict[str, float | None]:
        """Return final and best accuracy on what is evaluated beside the test set."""
        found: dict[str, float | None] = {}
        for name in self.evaluations:
            tested = [row[f"test_accuracy_{name}"] for row in rows]
            found[f"test_accuracy_{name}_final"] = tested[-1] if tested else None
            found[f"test_accuracy_{name}_best"] = max((value for value in tested if value is not None), default=None)
        return found

    @property
    def _where(self) -> str:
        return f"epoch {self.pruning.epoch}, step {self.step}"

    def _stopped(self) -> Stopped:
        return Stopped(
            f"run {self.id} stopped in {self._where} and left a checkpoint; the same command goes on from there"
        )

    @contextmanager
    def _images_turn_bad(self) -> Iterator[None]:
        """Turn a mistake in the data, which came after it was looked at, into Failed: there is a record already."""
        try:
            yield
        except UsageError as error:
            failed = Failed(f"run {self.id} ended in {self._where}: {error}; with the images as they were, {GOES_ON}")
            failed.speaks = True  # of several processes this one alone has seen it
            raise failed from None

    def environment(self, command: str, resumed_at: int) -> dict[str, Any]:
        """Return what the run's bits depend on beside its config."""
        cuda = self.device.type == "cuda"
        return {
            "config_id": self.config_id,
            "epochs": self.pruning.epochs,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or platform.machine(),
            "device_type": self.device.type,
            "precision": self.precision,
            "threads": self.config.threads,
            "processes": self.processes.size,
            "host": platform.node(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "commit": _commit(),
            "command": command,
            "resumed_at_epoch": resumed_at,
            "data_fingerprint": self.data.fingerprint,
        }

    def _write_samples(self, path: Path) -> None:
        import pandas as pd

        pruning, train = self.pruning, self.data.train
        empty = np.full(pruning.n, np.nan, np.float32)
        scores = {f"score_{name}": empty for name in FROM_THE_BANK}
        scores |= {f"score_{name}": values for name, values in self.bank_scores().items()}
        frame = pd.DataFrame(
            {
                "index": train.rows,
                "path": pd.array(train.paths, dtype="string") if train.paths is not None else None,
                "label": train.labels,
                "clean_label": train.clean_labels if train.clean_labels is not None else None,
                "predicted": self.predicted.cpu().numpy(),
                "loss": pruning.trajectories.last_N.cpu().numpy(),
                **scores,
                "times_selected": pruning.times_selected,
            }
        )
        write_atomically(path, lambda file: frame.to_parquet(file, index=False))


class _Clock:
    """Splits an epoch's seconds by what they went into."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start


def make_pruning(
    config: Config, dataset: Any, clean: np.ndarray | None = None, device: torch.device | str = "cpu"
) -> DynamicPruning:
    """Return the pruning of a run over ``dataset``; raise UsageError for settings that do not go together."""
    score = config.score.name
    ranking: str | Score = score
    if score not in SCORES:
        try:
            ranking = import_class(score, Score, "score", SCORES)()
        except TypeError as error:
            raise UsageError(f"score.name={score} is made without arguments, and says {error}") from None
    try:
        pruning = DynamicPruning(
            dataset,
            config.epochs,
            make_pruner(config.pruner),
            ranking,
            window=config.score.window,
            unseen=config.score.unseen,
            seed=config.seed,
            clean=clean,
            device=device,
            bank_dtype=getattr(torch, config.score.bank),
        )
        pruning.scores(ranking)  # one of somebody's own says here what is wrong with it, whenever it comes to rank
    except ValueError as error:
        raise UsageError(f"pruner={config.pruner['name']} score={score}: {error}") from None
    if pruning.score.aligned and pruning.pruner.uses_scores and not config.reference.aligns:
        raise UsageError(
            f"score={score} compares with a reference set, and reference.size=0 leaves none; "
            "set reference.size=0.01, reference=pseudo, or score=loss"
        )
    trusted = isinstance(config.reference, Trusted) and config.reference.size > 0
    if isinstance(pruning.pruner, Static) and "reference" in pruning.pruner.needs and not trusted:
        raise UsageError(
            f"pruner={config.pruner['name']} chooses by trusted labels, and there are none held out; "
            "set reference=trusted"
        )
    return pruning


def resolve_device(asked: str, processes: Processes | None = None) -> torch.device:
    """Return the device of ``auto``, ``cpu``, ``cuda`` or ``cuda:K``; raise UsageError if it is absent.

    Of several processes on a machine each takes the CUDA device of its number.
    """
    count = torch.cuda.device_count() if asked != "cpu" and torch.cuda.is_available() else 0
    device = torch.device(("cuda" if count else "cpu") if asked == "auto" else asked)
    if device.type == "cuda" and processes is not None and processes.size > 1:
        if device.index is not None:
            raise UsageError(f"device={asked} is one device for {processes.size} processes; use device=cuda")
        device = torch.device("cuda", processes.local)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"device={asked} is not there: torch sees {count} CUDA devices; use device=auto or device=cpu")
    return device


def resolve_precision(asked: str, device: torch.device) -> str:
    """Return ``bf16`` or ``fp32``; ``auto`` is bf16 where the device has it in hardware."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported() else "fp32"


def load_data(config: Config) -> TrainingData:
    """Return what a run trains and is evaluated on; raise UsageError where the files cannot give it."""
    dataset, noise = config.dataset, config.noise
    reference = config.reference if isinstance(config.reference, Trusted) else NOTHING_HELD_OUT
    place = getattr(dataset, "root", None)
    root = Path(place).expanduser() if place is not None else None
    return prepare(
        load(dataset.model_dump()),
        seed=config.seed,
        subset=dataset.subset,
        test_subset=dataset.test_subset,
        reference_size=reference.size,
        reference_per_class=reference.per_class,
        reference_noise=reference.noise,
        reference_train=reference.train,
        noise=noise.name,
        noise_rate=noise.rate,
        noise_labels=noise.labels,
        noise_file=Path(noise.file).expanduser() if noise.file is not None else None,
        root=root,
    )


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

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _yaml(config: Config) -> str:
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))


def _commit() -> str | None:
    """Return the commit of this package's checkout, with ``+`` where it is changed; None outside one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes.stdout.strip() else "")


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
