"""Classification: the loss of a sample is the cross-entropy of its label, the headline metric is accuracy.

Shape legend: n samples, B samples of a batch, C classes, d dimensions of an embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import models
from ..config import MODEL, NOISE, NOTHING_HELD_OUT, Config, Trusted, feature_files
from ..data.batches import Batch, Batches, ImageBatches
from ..data.features import check_foretells, read_features
from ..data.split import Split, prepare
from ..errors import UsageError
from ..files import typed_path
from ..pruning.patches import Patches, small
from ..pruning.reference import confident_thresholds, label_quality
from ..pruning.seeding import generator
from ..records import ACCURACY
from ..schema import shown
from .base import Task

if TYPE_CHECKING:
    from ..distributed import Processes
    from ..network import Network


PATCHED = 2000  # samples whose patches are drawn from
EVALUATED = {"cpu": 256, "cuda": 1000}  # samples of a batch without augmentation


def features_given(config: Config) -> tuple[str, str] | None:
    """Return the key and the file of the run's features, None where they are patches; raise UsageError for two."""
    files = feature_files(config)
    if len(set(files.values())) > 1:
        key, other = sorted(files, key=lambda key: files[key] is None)
        given = f"{key}={files[key]} and {other}={shown(files[other])}"
        raise UsageError(f"{given} are two, and a run has features of one kind; type {other}={files[key]} as well")
    return next(((key, file) for key, file in files.items() if file is not None), None)


class Classification(Task):
    """Images with one class label each."""

    metrics = (ACCURACY,)

    def __init__(self, config: Config, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config, device, dtype)
        dataset = config.dataset
        reference = config.reference if isinstance(config.reference, Trusted) else NOTHING_HELD_OUT
        place = getattr(dataset, "root", None)
        self.data = data = prepare(
            self.opened(),
            NOISE.make(config.noise),
            reference,
            seed=config.seed,
            subset=dataset.subset,
            test_subset=dataset.test_subset,
            root=typed_path(place) if place is not None else None,
        )
        self.n, self.fingerprint, self._features = len(data.train), data.fingerprint, None
        if given := features_given(config):
            self._features = read_features(*given, len(data.train.source), data.train.rows)
            check_foretells(
                "=".join(given), self._features, data.train.labels, generator(config.seed, "features tried")
            )
            content = hashlib.sha256(data.fingerprint.encode() + self._features.tobytes())
            self.fingerprint = content.hexdigest()
        self.corrupted = data.train.wrong
        self.strata, self.classes = data.train.labels, data.classes
        self.chance_loss = math.log(len(data.classes))
        self.facts, self.skipped = {"pairing": data.pairing or None}, data.skipped
        self.held_out = 0 if data.reference is None else len(data.reference)

    @cached_property
    def train(self) -> Batches:
        return self._batches(self.data.train, augmented=True)

    @cached_property
    def reference(self) -> Batches:
        return self.train if self.data.reference is None else self._batches(self.data.reference)

    @cached_property
    def tests(self) -> dict[str, Batches]:
        sets = {"": self.data.test} | {f"_{name}": split for name, split in self.data.evaluations.items()}
        return {suffix: self._batches(split) for suffix, split in sets.items()}

    def _batches(self, split: Split, augmented: bool = False) -> Batches:
        config = self.config
        return ImageBatches(
            split,
            batch_size=config.batch_size if augmented else max(config.batch_size, EVALUATED[self.device.type]),
            device=self.device,
            mean=self.data.mean,
            std=self.data.std,
            seed=config.seed,
            train=augmented,
            flip=config.dataset.flip,
            crop=getattr(config.dataset, "crop", 0),
            channels_last=config.channels_last,
            dtype=self.dtype,
            workers=config.workers,
        )

    def network(self) -> nn.Module:
        """Return a freshly initialised network, with logits (B, C)."""
        made = MODEL.make(self.config.model, len(self.data.mean), len(self.data.classes))
        return made if self.data.train.images is None else self.fitted(made)  # decoding may need workers

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        log_p = F.log_softmax(outputs, dim=1)
        plain = F.nll_loss(log_p, targets, reduction="none")
        smoothed = (1 - smoothing) * plain - smoothing * log_p.mean(1) if smoothing else plain
        return plain, smoothed, outputs.detach().argmax(1)

    @torch.no_grad()
    def evaluate(self, network: Network, batches: Iterable[Batch], n: int, processes: Processes) -> dict[str, float]:
        loss = torch.zeros((), dtype=torch.float64, device=network.device)
        right = torch.zeros((), dtype=torch.int64, device=network.device)
        for _, images, labels in batches:
            logits = network.logits(images)
            loss += F.cross_entropy(logits, labels, reduction="none").sum()
            right += (logits.argmax(1) == labels).sum()
        loss, right = processes.sum(loss), processes.sum(right)
        return {"accuracy": 100 * right.item() / n, "loss": loss.item() / n}

    def columns(self) -> dict[str, Any]:
        import pandas as pd

        train = self.data.train
        return {
            "index": train.rows,
            "path": pd.array(train.paths, dtype="string") if train.paths is not None else None,
            "label": train.labels,
            "clean_label": train.clean_labels,
        }

    def reference_noise(self) -> float | None:
        wrong = None if self.data.reference is None else self.data.reference.wrong
        return None if wrong is None else float(wrong.mean())

    @torch.no_grad()
    def features(self, samples: Tensor) -> Tensor:
        if self._features is not None:
            return torch.from_numpy(self._features)[samples].to(self.device)
        rng = generator(self.config.seed, "patches")
        drawn = np.sort(rng.permutation(self.n)[:PATCHED])
        some = torch.cat([small(images) for _, images, _ in self.train.evaluation(drawn)])
        patches = Patches(some, self.config.dataset.flip, rng)
        return torch.cat([patches(images) for _, images, _ in self.train.evaluation(samples)])

    def answer(self, samples: np.ndarray) -> None:
        clean = self.data.train.clean_labels
        assert clean is not None
        self.train.correct(torch.from_numpy(samples), torch.from_numpy(clean[samples]))

    @torch.no_grad()
    def doubts(self, network: Network, batches: Iterable[Batch]) -> Tensor:
        none = torch.empty(0, device=network.device)
        parts = (network.logits(images, 0).log_softmax(1).amax(1).neg() for _, images, _ in batches)
        return torch.cat([none, *parts])

    @torch.no_grad()
    def outputs(self, network: Network, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        with models.embeddings(network.learner.networks[0]) as collected:
            parts = [network.logits(images, 0).softmax(1) for _, images, _ in batches]
        return torch.cat(parts), torch.cat(collected)

    @torch.no_grad()
    def probabilities(self, network: Network, batches: Iterable[Batch]) -> Tensor:
        none = torch.empty(0, len(self.data.classes), device=network.device)
        return torch.cat([none, *(network.logits(images).softmax(1).float() for _, images, _ in batches)])

    @torch.no_grad()
    def label_quality(self, network: Network, batches: Iterable[Batch], own: Tensor, processes: Processes) -> Tensor:
        """Return each training sample's label quality (n,), by confident learning."""
        labels = torch.from_numpy(self.data.train.labels)
        p = self.probabilities(network, batches)
        own_labels = labels[own].to(network.device)
        confidence = processes.gather(p.gather(1, own_labels[:, None])[:, 0])
        thresholds = confident_thresholds(confidence.cpu(), labels, p.shape[1]).to(network.device)
        return processes.gather(label_quality(p, own_labels, thresholds))

    def reference_labels(self) -> np.ndarray:
        assert self.data.reference is not None
        return self.data.reference.labels
