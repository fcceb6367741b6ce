"""The face of a task.

Shape legend: n training samples, B samples of a batch, C classes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import DATASET, TASK
from ..data.parts import Parts
from ..errors import UsageError
from ..pruning.seeding import generator
from ..pruning.signals import SIGNALS
from ..records import Metric

if TYPE_CHECKING:
    from ..config import Config
    from ..data.batches import Batch, Batches
    from ..distributed import Processes
    from ..network import Network

T = TypeVar("T")


def needed(module: str, task: str) -> Any:
    """Import what one task alone needs. Raises UsageError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UsageError(f"task={task} needs {package}; type pip install 'alignprune-exp[tasks]'") from None


def nats(log_p: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Return how unlikely each part of each sample is (B, P), 0 where its target is ``ignored``.

    Args:
        log_p: logarithms of probabilities (B, P, C).
        targets: classes (B, P).
    """
    flat = F.nll_loss(log_p.flatten(0, 1), targets.flatten().long(), ignore_index=ignored, reduction="none")
    return flat.view(targets.shape)


def mean_nats(logits: Tensor, targets: Tensor, ignored: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return each sample's mean over its parts that are not ``ignored``, plain (B,) and smoothed (B,).

    Args:
        logits: (B, P, C) for B samples of P parts, pixels or tokens.
        targets: classes (B, P).
        smoothing: the part of the target that all classes share.
    """
    there, log_p = targets != ignored, F.log_softmax(logits, dim=-1)
    parts = there.sum(1).clamp(min=1)
    plain = nats(log_p, targets, ignored).sum(1) / parts
    if not smoothing:
        return plain, plain
    uniform = -(log_p.mean(-1) * there).sum(1) / parts
    return plain, (1 - smoothing) * plain + smoothing * uniform


class Task:
    """What a sample, its loss and a metric are. Making one reads the data and writes nothing.

    A subclass takes its settings as keyword arguments, hands the others on, and sets what is listed here. Its batches,
    `train`, `reference` and `tests`, it sets as well, or makes once they are asked for.

    Args:
        config: of the run.
        device: where batches lie.
        dtype: of inputs in floating point.

    Attributes:
        metrics: what `evaluate` returns; the first is the headline.
        smooths: whether `losses` heed ``smoothing``.
        flips: whether training mirrors samples where ``dataset.flip`` says so.
        n: training samples.
        fingerprint: sha256, as hex, of the data.
        corrupted: which training samples are known to be wrong (n,); None where that is unknown.
        strata: the group of each training sample, int64 (n,), 0 on, which choices keep in proportion; None for none.
        classes: their names, where samples have class labels; then ``strata`` are the labels given.
        chance_loss: about the loss of who knows nothing, by which histograms of losses are scaled.
        facts: what a summary says of the data, by name.
        notes: what is said of them before training, in sentences.
        skipped: what was left out of the data since it could not be read, one line each.
        held_out: how many samples `reference` holds that are not trained on; 0 where it is the training samples'.
    """

    metrics: ClassVar[tuple[Metric, ...]]
    smooths: ClassVar[bool] = True
    flips: ClassVar[bool] = True
    n: int
    fingerprint: str
    corrupted: np.ndarray | None = None
    strata: np.ndarray | None = None
    classes: Sequence[str] | None = None
    chance_loss: float = 1.0
    facts: Mapping[str, Any] = {}
    notes: Sequence[str] = ()
    skipped: Sequence[str] = ()
    held_out: int = 0

    def __init__(self, config: Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device, self.dtype = config, torch.device(device), dtype

    @cached_property
    def train(self) -> Batches:
        """Batches of the training samples."""
        raise NotImplementedError

    @cached_property
    def reference(self) -> Batches:
        """Batches that a reference set is drawn from, held out or the training samples' own."""
        raise NotImplementedError

    @cached_property
    def tests(self) -> Mapping[str, Batches]:
        """Batches that are evaluated on, by the suffix of their metrics; the headline is that of ``""``."""
        raise NotImplementedError

    def opened(self) -> Any:
        """Open the data set of the config. Raises UsageError for one that is for another task, and as that does."""
        dataset, task = DATASET.make(self.config.dataset), self.config.task.name
        if dataset.task != task and task in TASK.builtin:
            fitting = [name for name in DATASET.builtin if DATASET.find(name).task == task]
            raise UsageError(
                f"dataset={self.config.dataset.name} is for task={dataset.task}; with task={task} use dataset="
                + " or ".join(fitting)
            )
        return dataset.open()

    def network(self) -> nn.Module:
        """Return a freshly initialised network: from inputs (B, …) to outputs (B, …)."""
        raise NotImplementedError

    @torch.no_grad()
    def fitted(self, network: nn.Module) -> nn.Module:
        """Return a network that one can train; it is tried on two samples. Raises UsageError where it does not fit."""
        _, inputs, targets = next(self.train.evaluation(torch.arange(min(2, self.n))))
        inputs, targets = inputs.cpu(), targets.cpu()
        network.eval()
        try:
            outputs = network(inputs.float() if inputs.is_floating_point() else inputs)
            fits = self.losses(outputs.float(), targets)[0].shape == targets.shape[:1]
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            fits = False
        if not fits:
            raise UsageError(
                f"model={self.config.model.name} does not fit task={self.config.task.name} with "
                f"dataset={self.config.dataset.name}; leave the model out, or choose another one"
            )
        return network.train()

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return for each sample (B,): its loss, the same smoothed where that makes sense, and its class, if any.

        ``outputs`` are float32. The loss is that of one sample: of parts of it, their mean or their sum.
        """
        raise NotImplementedError

    def evaluate(self, network: Network, batches: Iterable[Batch], n: int, processes: Processes) -> dict[str, float]:
        """Return ``loss`` and every metric, by name, of ``n`` samples; ``batches`` are of this process's share."""
        raise NotImplementedError

    @torch.no_grad()
    def recorded(self, network: Network, batches: Iterable[Batch], smoothing: float = 0.0) -> Tensor:
        """Return what trajectories are made of (n,), of samples under the first network."""
        parts = [
            self.observed(*self.losses(network.logits(inputs, 0), targets, smoothing), targets)
            for _, inputs, targets in batches
        ]
        return torch.cat([torch.empty(0, device=network.device), *parts])

    def observed(self, plain_B: Tensor, smoothed_B: Tensor, predicted_B: Tensor | None, targets: Tensor) -> Tensor:
        """Return what trajectories are made of (B,), given what `losses` returns of the same ``targets``."""
        if signal := SIGNALS.get(self.config.recorded):
            assert predicted_B is not None
            return signal(plain_B, predicted_B != targets)
        return plain_B if self.config.recorded == "plain" else smoothed_B

    def columns(self) -> dict[str, Any]:
        """Return what the record says of the training samples, (n,) each; ``index`` is their row in the data."""
        return {"index": np.arange(self.n)}

    def reference_noise(self) -> float | None:
        """Return the wrong share of the samples held out, where that is known."""
        return None

    # --- what only samples with class labels have

    def outputs(self, network: Network, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Return the first network's probabilities (n, C) and embeddings (n, d) of samples."""
        raise self._no_classes()

    def features(self, samples: Tensor) -> Tensor:
        """Return features (k, d) of training samples (k,) that no label has had a say in."""
        raise self._no_classes()

    def answer(self, samples: np.ndarray) -> None:
        """Let training samples (K,) have their clean labels from now on."""
        raise self._no_classes()

    def doubts(self, network: Network, batches: Iterable[Batch]) -> Tensor:
        """Return minus the logarithm of the highest probability of samples (n,) under the first network."""
        raise self._no_classes()

    def probabilities(self, network: Network, batches: Iterable[Batch]) -> Tensor:
        """Return the class probabilities (n, C) of samples, float32, by all networks together."""
        raise self._no_classes()

    def label_quality(self, network: Network, batches: Iterable[Batch], own: Tensor, processes: Processes) -> Tensor:
        """Return how credible each training sample's label is (n,).

        ``batches`` are of the samples ``own``, this process's share.
        """
        raise self._no_classes()

    def reference_labels(self) -> np.ndarray:
        """Return the labels of the samples held out."""
        raise self._no_classes()

    def _no_classes(self) -> UsageError:
        return UsageError(f"task={self.config.task.name} has no class labels")


class RowsTask(Task):
    """A task whose samples are rows of its data and have no class labels; `Parts` says what each row is for.

    A subclass names what it needs, reads its targets out of ``data``, and makes batches of them.

    Attributes:
        packages: that it needs.
        data: as its data set is opened: ``train`` and ``test``, each with a length, ``clean``, which says whether they
            count as clean where no noise is injected, ``fingerprint`` and ``skipped``.
        parts: what the rows are for.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    data: Any

    def __init__(self, config: Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, device, dtype)
        for module in self.packages:
            needed(module, config.task.name)
        self.data = data = self.opened()
        self.parts = parts = Parts.of(config, len(data.train), len(data.test), data.clean)
        self.n, self.held_out, self.corrupted = len(parts.train), len(parts.reference), parts.corrupted
        self.fingerprint, self.skipped = data.fingerprint, data.skipped

    def reference_noise(self) -> float | None:
        return self.parts.reference_noise

    def given(
        self, values: Sequence[T], rows: np.ndarray, wrong: np.ndarray, corrupt: Callable[[T, np.random.Generator], T]
    ) -> list[T]:
        """Return the values of some rows, those that are ``wrong``, bool (k,), corrupted by (seed, row)."""
        found = [values[row] for row in rows]
        for place in np.flatnonzero(wrong):
            found[place] = corrupt(found[place], generator(self.config.seed, "corruption", int(rows[place])))
        return found
