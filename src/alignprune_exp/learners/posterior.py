"""Labels replaced by how likely each class is, given the label and what the other samples' labels foretell of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Forward, Given, Learner, Step


class Posterior(Learner):
    """The cross-entropy of the probabilities of classes that a `transition` of features of the samples tells.

    A label that fits what the others foretell stays nearly as it is. One that does not is shared out among the classes
    that fit better: corrected where they are sure, and else worth little, so that no wrong label is there to be learned
    by heart. Labels so corrected are Patrini et al.'s transition matrix (CVPR 2017) read backwards, by Bayes' rule.

    Attributes:
        file: where whoever trains finds the features, (n, d); None for `Patches` of the images.
        target_NC: the probabilities, for the whole phase as told before its first epoch.
    """

    told = True
    replays = True
    remembers = False  # but for what every process has been told

    def __init__(self, networks: Sequence[nn.Module], given: Given, *, file: str | None) -> None:
        super().__init__(networks, given)
        self.file = file
        self.target_NC: Tensor
        self.register_buffer("target_NC", torch.zeros(given.n, given.classes))

    def tell(self, classes_NC: Tensor) -> None:
        self.target_NC[:, : classes_NC.shape[1]] = classes_NC

    def losses(self, step: Step, forward: Forward) -> tuple[Tensor, Tensor, Tensor]:
        logits = forward(step.inputs)
        plain = F.cross_entropy(logits, step.targets, reduction="none")
        training = F.cross_entropy(logits, self.target_NC.index_select(0, step.index), reduction="none")
        return plain, training, logits.detach().argmax(1)
