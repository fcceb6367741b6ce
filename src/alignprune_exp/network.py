"""A learner on its device: how it takes a step, and how it looks at samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, optim
from .config import LEARNER, OPTIMIZER
from .errors import UsageError
from .graph import Replayed, Taken
from .learners.base import Given, Learner, Step
from .pruning import NonFiniteLossError
from .pruning.losses import one_a_sample, weighted_mean
from .pruning.seeding import generator
from .setup import Setup


class Network:
    """The learner and its optimizer. Training goes through what compiles and parallelises, evaluation through neither.

    Args:
        setup: of the run.
        purpose: names the random numbers that the networks are initialised by.

    Attributes:
        replayed: what replays steps, if anything does.
    """

    def __init__(self, setup: Setup, purpose: str) -> None:
        config = setup.config
        self.config, self.device, self.precision = config.optimizer, setup.device, setup.precision
        torch.manual_seed(int(generator(config.seed, purpose).integers(2**62)))
        made = LEARNER.find(config.learner.name)
        given = Given(setup.task, setup.n, config.seed, config.label_smoothing)
        networks = [setup.task.network() for _ in range(made.count)]
        self.learner: Learner = LEARNER.make(config.learner, networks, given).to(self.device)
        if config.channels_last:
            self.learner = self.learner.to(memory_format=torch.channels_last)
        self.optimizer: torch.optim.Optimizer = OPTIMIZER.make(config.optimizer, self.learner.parameters())
        self._parallel: nn.Module = self.learner
        if setup.processes.size > 1:
            self._parallel = distributed.parallel(self.learner)
        mode = config.compile if isinstance(config.compile, str) else None
        self._forward = torch.compile(self._parallel, mode=mode) if config.compile else self._parallel
        self.replayed = Replayed(config.batch_size) if self._replays(setup) else None

    def training_logits(self, inputs: Tensor, *network: int) -> Tensor:
        """Return float32 outputs (B, …) of all networks, or of one, to differentiate."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._forward(inputs, *network).float()

    def logits(self, inputs: Tensor, *network: int) -> Tensor:
        """Return the same for evaluation."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.learner(inputs, *network).float()

    def schedule(self, progress: float) -> float:
        """Set the rates of training progress in [0, 1]; return the learning rate."""
        return optim.set_progress(self.optimizer, progress, self.config)

    def take(self, step: Step, weights: Tensor) -> Taken:
        """Take a step, given the weights (B,) of its samples; return what the learner says of it, to look at."""
        return self._take(step, weights) if self.replayed is None else self.replayed(self._take, step, weights)

    def _take(self, step: Step, weights: Tensor) -> Taken:
        plain, training, predicted = self.learner.losses(step, self.training_logits)
        training = one_a_sample("the loss", training, step.index)
        self.learn(weighted_mean(training, weights) * step.share)
        shown = plain.detach()
        return shown, shown if training is plain else training.detach(), predicted

    def _replays(self, setup: Setup) -> bool:
        """Return whether steps are to be replayed; raise UsageError where that is asked for and cannot be."""
        asked, alone = setup.config.graph, None
        if self.device.type != "cuda":
            alone = f"device=cuda, and this run is on {self.device.type}"
        elif setup.processes.size > 1:
            alone = f"one process, and there are {setup.processes.size}"
        elif not self.learner.replays:
            alone = f"learners whose steps are all alike, and {setup.config.learner.name}'s are not"
        elif not isinstance(self.optimizer, optim.Momentum):
            alone = f"optimizer=sgd and lars, and not for {setup.config.optimizer.name}"
        elif setup.config.compile == "reduce-overhead":
            alone = "a run without graphs of its own, which compile=reduce-overhead has"
        if asked is True and alone:
            raise UsageError(f"graph=true is for {alone}; set graph=auto")
        return bool(asked) and not alone

    def learn(self, loss: Tensor) -> None:
        """Take a step down the gradient of a loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.learner.after_backward()
        self.optimizer.step()

    def check_finite(self, epoch: int) -> None:
        """Raise NonFiniteLossError if a weight became NaN or infinite."""
        if not torch.stack([p.detach().sum() for p in self.learner.parameters()]).isfinite().all():
            raise NonFiniteLossError(epoch, what="a weight")

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.learner.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
