"""Classification: the loss of a sample is the cross-entropy of its label, the headline metric is accuracy.

Shape legend: n samples, B samples of a batch, C classes, d dimensions of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import models
from ..pruning.reference import confident_thresholds, label_quality

if TYPE_CHECKING:
    from ..config import Config
    from ..data.batches import Batch
    from ..data.split import TrainingData
    from ..distributed import Processes
    from ..network import Network


class Classification:
    """What a network is, and what it makes of samples, in eval mode."""

    def __init__(self, config: Config, data: TrainingData) -> None:
        self.config, self.data = config, data

    def network(self) -> nn.Module:
        """Return a freshly initialised network, with logits (B, C)."""
        return models.build(self.config.model, len(self.data.mean), len(self.data.classes))

    @torch.no_grad()
    def losses(self, network: Network, batches: Iterable[Batch], smoothing: float = 0.0) -> Tensor:
        """Return the losses (n,) of samples under the first network, whose losses are those that are recorded."""
        entropy = partial(F.cross_entropy, reduction="none", label_smoothing=smoothing)
        parts = [entropy(network.logits(images, 0), labels) for _, images, labels in batches]
        return torch.cat([torch.empty(0, device=network.device), *parts])

    @torch.no_grad()
    def evaluate(self, network: Network, batches: Iterable[Batch], n: int, processes: Processes) -> tuple[float, float]:
        """Return accuracy in per cent and mean loss on ``n`` samples, of which ``batches`` are this process's share."""
        loss = torch.zeros((), dtype=torch.float64, device=network.device)
        right = torch.zeros((), dtype=torch.int64, device=network.device)
        for _, images, labels in batches:
            logits = network.logits(images)
            loss += F.cross_entropy(logits, labels, reduction="none").sum()
            right += (logits.argmax(1) == labels).sum()
        loss, right = processes.sum(loss), processes.sum(right)
        return 100 * right.item() / n, loss.item() / n

    @torch.no_grad()
    def outputs(self, network: Network, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
        """Return the first network's probabilities (n, C) and embeddings (n, d) of samples."""
        with models.embeddings(network.learner.networks[0]) as collected:
            parts = [network.logits(images, 0).softmax(1) for _, images, _ in batches]
        return torch.cat(parts), torch.cat(collected)

    @torch.no_grad()
    def label_quality(self, network: Network, batches: Iterable[Batch], own: Tensor, processes: Processes) -> Tensor:
        """Return each training sample's label quality (n,), by confident learning.

        ``batches`` are of the samples ``own``, this process's share.
        """
        labels = torch.from_numpy(self.data.train.labels)
        none = torch.empty(0, len(self.data.classes), device=network.device)
        p = torch.cat([none, *(network.logits(images).softmax(1) for _, images, _ in batches)])
        own_labels = labels[own].to(network.device)
        confidence = processes.gather(p.gather(1, own_labels[:, None])[:, 0])
        thresholds = confident_thresholds(confidence.cpu(), labels, p.shape[1]).to(network.device)
        return processes.gather(label_quality(p, own_labels, thresholds))
