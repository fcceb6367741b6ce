"""The reference set of a run: held out with trusted labels, chosen out of the training samples, or none at all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .config import Pseudo
from .data.split import reference_count
from .network import Network
from .pruning import DynamicPruning
from .pruning.reference import most_trusted
from .pruning.seeding import generator
from .setup import Setup


class Reference:
    """Where the reference trajectory comes from, epoch by epoch.

    Attributes:
        samples: (R,) those of ``task.reference`` that are in the set.
        comparable: whether their labels are trusted, and their losses, which are plain, of the kind that is recorded.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.samples = torch.arange(setup.task.held_out)
        self.comparable = setup.task.held_out > 0 and setup.config.recorded == "plain"

    def losses(self, network: Network) -> Tensor:
        """Return the samples' losses (R,), float64."""
        if len(self.samples) == 0:
            return torch.empty(0)
        share = self.setup.processes.share(self.samples)
        losses = self.setup.task.recorded(network, self.setup.task.reference.evaluation(share))
        return self.setup.processes.gather(losses).double()

    def loss(self, losses_R: Tensor, pruning: DynamicPruning) -> float | None:
        """Return the mean of the set's losses; without a set, the training samples' own, where one is to stand in."""
        if len(losses_R):
            return losses_R.mean().item()
        return pruning.trajectories.population_mean() if self.setup.config.reference.aligns else None

    def noise(self) -> float | None:
        """Return the wrong share of the set, where that is known."""
        task = self.setup.task
        if task.held_out or task.corrupted is None or len(self.samples) == 0:
            return task.reference_noise()
        return float(task.corrupted[self.samples].mean())

    def choose(self, network: Network, pruning: DynamicPruning) -> int:
        """Choose a pseudo set anew where that is due; return how many samples were forwarded for it."""
        setup, config = self.setup, self.setup.config
        reference = config.reference
        done, epochs = pruning.epoch - pruning.first, pruning.epochs - pruning.first
        if not isinstance(reference, Pseudo) or not reference.due(done, epochs):
            return 0
        by_quality = reference.method == "cleanlab"
        if by_quality:
            batches = setup.task.train.evaluation(setup.own)
            trust = setup.task.label_quality(network, batches, setup.own, setup.processes).cpu().numpy()
        else:
            trust = pruning.scores("small_loss")
        rng = generator(config.seed, "pseudo reference", pruning.epoch)
        strata = np.zeros(setup.n, np.int64) if setup.task.strata is None else setup.task.strata
        chosen = most_trusted(trust, strata, reference_count(reference.size, setup.n), rng)
        self.samples = torch.from_numpy(chosen)
        pruning.change_reference(self.losses(network).mean())
        return len(chosen) + by_quality * setup.n
