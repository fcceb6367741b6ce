"""What a config asks for that its data, its other choices or this machine cannot give: each a UsageError."""

from __future__ import annotations

from .config import LEARNER, PRUNER, SCORE, Config, Pseudo, Trusted
from .distributed import Processes
from .errors import UsageError, refuse_load
from .pruning import Criterion, Plan, Score
from .pruning.scores import Features, HeldOut, Readout
from .pruning.signals import SIGNALS


def check_processes(config: Config, processes: Processes) -> None:
    """Raise UsageError for a run that several processes cannot share."""
    if processes.size > 1 and LEARNER.find(config.learner.name).remembers:
        raise UsageError(
            f"learner={config.learner.name} keeps to itself what it knows about a sample, and "
            f"{processes.size} processes would not share it; use learner=ce, or one process"
        )
    if config.batch_size < processes.size:
        raise UsageError(
            f"batch_size={config.batch_size} over {processes.size} processes leaves some without a sample; "
            f"set batch_size={processes.size} or more"
        )


def check_load(config: Config) -> None:
    """Raise UsageError for what a run would burden this machine with.

    Some more than it has processors may pass: another number of threads would be another run.
    """
    for key in ("threads", "workers"):
        refuse_load(key, getattr(config, key))


def check_labels(config: Config, classes: bool, clean: bool) -> None:
    """Raise UsageError for a config that asks for ``classes`` or known ``clean`` labels of data without."""
    plan, score = PRUNER.make(config.pruner), SCORE.make(config.score)
    told = any(score.due(epoch, config.epochs) for epoch in range(config.epochs))
    if score.by_truth and not clean:
        raise UsageError(f"score={config.score.name} needs clean labels, and this data set has none; use another score")
    if told and not isinstance(score, Features | HeldOut | Readout):
        raise UsageError(
            f"score={config.score.name} is told what a run cannot tell; let it subclass Features, HeldOut or Readout, "
            "of alignprune_exp.pruning.scores"
        )
    if plan.asks:
        _check_asking(config, score.by_class or score.by_truth or told, clean)
    if not classes:
        _check_without_classes(config, plan, score)


def _check_asking(config: Config, by_labels: bool, clean: bool) -> None:
    """Raise UsageError where a pruner that asks for labels finds no ``clean`` ones, or others are gone by unasked."""
    pruner = f"pruner={config.pruner.name}"
    if not clean:
        raise UsageError(f"{pruner} asks for clean labels, and this data set has none; use another one")
    if config.recorded in SIGNALS:
        raise UsageError(f"{pruner} compares losses; leave recorded={config.recorded} out")
    if by_labels:
        raise UsageError(
            f"{pruner} knows no label before it asks, and score={config.score.name} goes by those of all samples; use "
            "score=loss"
        )
    if LEARNER.find(config.learner.name).told:
        raise UsageError(
            f"{pruner} knows no label before it asks, and learner={config.learner.name} goes by those of all samples; "
            "use learner=ce"
        )
    if isinstance(config.reference, Pseudo):
        raise UsageError(
            f"{pruner} knows no label before it asks, and reference=pseudo chooses by those of all samples; use "
            "reference=trusted or reference=none"
        )


def _check_without_classes(config: Config, plan: Plan, score: Score) -> None:
    """Raise UsageError for what needs class labels."""
    name, lacks = config.task.name, "needs class labels, and task="
    if config.recorded in SIGNALS:
        raise UsageError(f"recorded={config.recorded} {lacks}{name} has none; use recorded=plain")
    if score.by_class:
        raise UsageError(
            f"score={config.score.name} {lacks}{name} has none; use score=settled, or method=sieve_settled in place of "
            "another sieve"
        )
    if LEARNER.find(config.learner.name).by_class:
        raise UsageError(f"learner={config.learner.name} {lacks}{name} has none; use learner=ce")
    if plan.asks:
        raise UsageError(f"pruner={config.pruner.name} {lacks}{name} has none; use one that asks for none")
    if isinstance(plan, Criterion):
        raise UsageError(f"pruner={config.pruner.name} {lacks}{name} has none; use one that chooses every epoch")
    if plan.needs_noise_rate:
        pruner = f"pruner={config.pruner.name} estimates the noise of class labels"
        raise UsageError(f"{pruner}, and task={name} has none; set pruner.exclude=0.3")
    if config.keep_probabilities:
        raise UsageError(f"keep_probabilities {lacks}{name} has none; leave it out")
    if isinstance(config.reference, Pseudo) and config.reference.method == "cleanlab":
        raise UsageError(f"reference.method=cleanlab {lacks}{name} has none; use reference.method=small_loss")


def check_trusted(config: Config, plan: Plan) -> None:
    """Raise UsageError for a pruner that goes by trusted labels where there are none, or their losses are others."""
    name, trusted = config.pruner.name, isinstance(config.reference, Trusted) and config.reference.size > 0
    if isinstance(plan, Criterion) and "reference" in plan.needs and not trusted:
        raise UsageError(f"pruner={name} chooses by trusted labels, and there are none held out; set reference=trusted")
    foretells = SCORE.make(config.score).foretells
    if plan.needs_noise_rate and not foretells and not (trusted and config.recorded == "plain"):
        lacks = "recorded=plain" if trusted else "reference=trusted"
        raise UsageError(
            f"pruner={name} estimates the noise by the plain losses of trusted labels; set {lacks}, score=readout, "
            "score=features or score=transition, which need none, or a number for pruner.exclude"
        )
