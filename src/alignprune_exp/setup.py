"""What all phases of one run share: its config resolved on this machine, its data and batches. Nothing is written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .checks import check_labels, check_load, check_processes, check_trusted
from .config import PRUNER, SCORE, TASK, Config, Pseudo, identity
from .data.split import reference_count
from .distributed import Processes
from .errors import UsageError
from .pruning import Criterion, DynamicPruning, Full, Plan, Pruner, Score, Trajectories
from .pruning.logistic import PARTS
from .pruning.scores import Oracle, Readout, Supervised
from .pruning.seeding import generator
from .runs import run_id
from .tasks import Task


@dataclass(frozen=True)
class Setup:
    """The parts of a run that its phases share.

    Attributes:
        config: the run's config.
        processes: those of the run; this one is one of them.
        device: where this process computes.
        precision: ``bf16`` or ``fp32``, of the forward and backward passes.
        task: what is trained and evaluated on, what a sample's loss and a metric are.
        id: of the run.
        config_id: of its config without its data.
    """

    config: Config
    processes: Processes
    device: torch.device
    precision: str
    task: Task
    id: str
    config_id: str

    @classmethod
    def of(cls, config: Config, processes: Processes) -> Setup:
        """Read the data of a run, and set torch up for it.

        Raises UsageError for whatever the config asks for that the data or the machine cannot give.
        """
        check_processes(config, processes)
        device = resolve_device(config.device, processes)
        if getattr(config.model, "norm", None) == "sync" and processes.size > 1 and device.type == "cpu":
            raise UsageError("model.norm=sync is for CUDA devices; set model.norm=group, or one process")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once: a later run may be deterministic
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        torch.backends.cudnn.allow_tf32 = False  # precision=fp32 is what it says
        if device.type == "cuda":
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
            if device.index is not None:
                torch.cuda.set_device(device)
        check_load(config)
        torch.set_num_threads(config.threads)
        precision = resolve_precision(config.precision, device)
        task = open_task(config, device, torch.bfloat16 if precision == "bf16" else torch.float32)
        ids = (run_id(identity(config, task.fingerprint, processes.size)), run_id(identity(config, "")))
        setup = cls(config, processes, device, precision, task, *ids)
        if isinstance(config.reference, Pseudo):
            reference_count(config.reference.size, setup.n)
        return setup

    @cached_property
    def plan(self) -> Plan:
        """What decides which samples are trained on, every epoch or once."""
        return PRUNER.make(self.config.pruner)

    @property
    def chooses_once(self) -> bool:
        """Whether the samples of all epochs are chosen once, after a warm-up."""
        return isinstance(self.plan, Criterion)

    @property
    def embeds(self) -> bool:
        """Whether something goes by embeddings, or by the `Task.outputs` that come with them."""
        if isinstance(self.plan, Criterion):
            return bool(self.plan.needs & {"probabilities", "embeddings"})
        return self.plan.uses_scores and isinstance(SCORE.make(self.config.score), Readout)

    @cached_property
    def holdout(self) -> int:
        """Epochs that a network trains on each half of the samples, to tell the irreducible losses of the other."""
        score: Score = SCORE.make(self.config.score)
        return score.holdout_epochs(self.config.epochs) if self.plan.uses_scores else 0

    def half(self, number: int) -> np.ndarray:
        """Return the samples of one half, 0 or 1, ascending: drawn by the seed."""
        halves = generator(self.config.seed, "halves").permutation(self.n)
        return np.sort(halves[number::2])

    @property
    def before(self) -> int:
        """Epochs before those of the run: on everything, for a choice made once, or on halves, to hold others out."""
        return self.plan.warmup_epochs(self.config.epochs) + 2 * self.holdout

    @property
    def epochs(self) -> int:
        """All epochs, with those before."""
        return self.before + self.config.epochs

    @property
    def times_before(self) -> int:
        """How many of the epochs before train on a sample."""
        return self.before - self.holdout

    @property
    def notes(self) -> list[str]:
        """What is said before training: of the data, and of a score that they leave nothing to go by."""
        notes, score, noisy = [*self.task.notes], SCORE.make(self.config.score), self.noisy
        if noisy is None or not (self.plan.uses_scores and score.by_truth):
            return notes
        name, there = self.config.score.name, f"{int(noisy.sum())} of {self.n} labels are wrong"
        if isinstance(score, Supervised) and min(noisy.sum(), (~noisy).sum()) < PARTS:
            notes.append(
                f"score={name} learns from {PARTS} wrong labels and right ones, and {there}: it ranks as settled"
            )
        elif isinstance(score, Oracle) and noisy.all() == noisy.any():
            notes.append(f"score={name} ranks all samples alike, since {there}")
        return notes

    @property
    def n(self) -> int:
        """The number of training samples."""
        return self.task.n

    @property
    def own(self) -> torch.Tensor:
        """This process's share (k,) of the training samples, where all of them are looked at, in order."""
        return self.processes.share(torch.arange(self.n))

    @property
    def noisy(self) -> np.ndarray | None:
        """Which training samples are trained on with a wrong label (n,); None where that is unknown."""
        return np.zeros(self.n, bool) if self.plan.asks else self.task.corrupted


def resolve_device(asked: str, processes: Processes | None = None) -> torch.device:
    """Return the device of ``auto``, ``cpu``, ``cuda`` or ``cuda:K``; raise UsageError if it is absent.

    Of several processes on a machine each takes the CUDA device of its number.
    """
    count = torch.cuda.device_count() if asked != "cpu" and torch.cuda.is_available() else 0
    device = torch.device(("cuda" if count else "cpu") if asked == "auto" else asked)
    if device.type == "cuda" and processes is not None and processes.size > 1:
        if device.index is not None:
            raise UsageError(f"device={asked} is one device for {processes.size} processes; use device=cuda")
        place = processes.place(count)
        if count and place is None:
            raise UsageError(
                f"torch sees {count} CUDA devices, and each of {processes.beside} processes on this machine needs one "
                f"of its own; start {count}, or set device=cpu"
            )
        device = torch.device("cuda", place or 0)
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


def open_task(config: Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Task:
    """Read the data of a run's task. Raises UsageError for what they cannot give, and what the config asks of them."""
    task: Task = TASK.make(config.task, config, device, dtype)
    check_labels(config, task.classes is not None, task.corrupted is not None)
    return task


def check_pruning(config: Config) -> None:
    """Raise UsageError for settings of the pruning that do not go together, whatever the data are."""
    make_pruning(config, range(2), clean=np.ones(2, bool), labels=np.arange(2))


def make_pruning(
    config: Config,
    dataset: Any,
    clean: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    phase: tuple[Pruner, int] | None = None,
    bank: Trajectories | None = None,
) -> DynamicPruning:
    """Return the pruning of a run over ``dataset``; raise UsageError for settings that do not go together.

    ``phase`` has pruner and epochs of a phase of the run, where these are not the config's own.
    """
    score, plan = config.score.name, PRUNER.make(config.pruner)
    check_trusted(config, plan)
    pruner, epochs = phase or (plan if isinstance(plan, Pruner) else Full(), config.epochs)
    try:
        pruning = DynamicPruning(
            dataset,
            epochs,
            pruner,
            SCORE.make(config.score),
            window=config.score.window,
            unseen=config.score.unseen,
            seed=config.seed,
            clean=clean,
            labels=labels,
            device=device,
            bank_dtype=getattr(torch, config.score.bank),
            bank=bank,
            divide=False,
        )
        pruning.scores(pruning.score)  # one of somebody's own says here what is wrong with it, whenever it ranks
    except ValueError as error:
        raise UsageError(f"pruner={config.pruner.name} score={score}: {error}") from None
    if pruning.compares and not config.reference.aligns:
        raise UsageError(
            f"score={score} compares with a reference set, and reference.size=0 leaves none; "
            "set reference.size=0.01, reference=pseudo, or score=loss"
        )
    return pruning
