"""The schema of a run's config: types, ranges, and which keys make a run what it is.

Values live in ``conf/`` alone. A mistake in a key that a node has whatever it names is found before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, SerializeAsAny, Tag

from .errors import UsageError
from .pruning.signals import OTHER_NAMES, SIGNALS
from .registry import Named, Registry, settings
from .schema import EPOCHS, AlsoCalled, Aside, Count, Epochs, Neutral, Node, Rate, Share, validated

Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


class DatasetKeys(Named):
    subset: Count | None
    test_subset: Count | None
    flip: bool


class NoiseKeys(Named):
    rate: Annotated[float, Field(ge=0, lt=1)]
    labels: Literal["aggre", "rand1", "rand2", "rand3", "worst"]
    file: Annotated[str | None, Aside()]


class ScoreKeys(Named):
    window: Annotated[int, Field(ge=3, le=EPOCHS)]
    unseen: Literal["carry", "mask", "refresh"]
    bank: Annotated[Literal["float32", "float16"], Neutral("float32")]


class OptimizerKeys(Named):
    lr: Rate
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, le=100)]
    pct_start: Annotated[float, Field(gt=0, lt=1)]
    div: Annotated[float, Field(ge=1, le=1e12)]
    final_div: Annotated[float, Field(ge=1, le=1e12)]
    cycle_momentum: bool


# The most of a pruner's and a score's settings of which their own class knows no most: more can only be a slip.
MOST = {
    "warmup": EPOCHS,
    "every": EPOCHS,
    "holdout": EPOCHS,
    "groups": 10_000,
    "rounds": 10_000,
    "neighbours": 10_000,
    "eta": 1e6,
    "c": 1e6,
}


def _seam(kind: str, base: str, builtin: str, common: type[Named] = Named, **more: Any) -> Registry[Any]:
    ours = base if base.startswith("torch.") else f"{__package__}.{base}"
    return Registry(kind, ours, f"{__package__}.{builtin}", common, **more)


TASK = _seam("task", "tasks.base.Task", "tasks.TASKS")
DATASET = _seam("dataset", "data.source.DataSet", "data.datasets.DATASETS", DatasetKeys)
NOISE = _seam("noise", "data.noise.Noise", "data.noise.NOISES", NoiseKeys)
PRUNER = _seam("pruner", "pruning.selection.Plan", "pruning.pruners.PRUNERS", most=MOST)
SCORE = _seam("score", "pruning.scores.Score", "pruning.scores.SCORES", ScoreKeys, most=MOST)
LEARNER = _seam("learner", "learners.base.Learner", "learners.LEARNERS")
MODEL = _seam("model", "torch.nn.Module", "models.MODELS")
OPTIMIZER = _seam("optimizer", "torch.optim.Optimizer", "optim.OPTIMIZERS", OptimizerKeys)
TRACKING = _seam("tracking", "trackers.Tracker", "trackers.TRACKERS")
REGISTRIES = (TASK, DATASET, NOISE, PRUNER, SCORE, LEARNER, MODEL, OPTIMIZER, TRACKING)


class Trusted(Node):
    """A reference set with trusted labels, held out of training; ``reference=none`` is one of size 0."""

    size: Annotated[float, Field(ge=0, le=10**9)]
    per_class: Annotated[bool, Neutral(False)]
    noise: Share
    train: bool

    @property
    def aligns(self) -> bool:
        """Whether there is a reference trajectory to align with."""
        return self.size > 0


class Pseudo(Node):
    """A reference set chosen out of the training samples, again and again, by their given labels."""

    name: Literal["pseudo"]
    method: Literal["small_loss", "cleanlab"]
    size: Annotated[float, Field(gt=0, le=10**9)]
    warmup: Epochs
    every: Epochs
    aligns: ClassVar[bool] = True

    def due(self, done: int, epochs: int) -> bool:
        """Whether the set is chosen anew after ``done`` of the ``epochs`` epochs that one network trains."""
        return self.warmup <= done < epochs and (done - self.warmup) % self.every == 0


class Population(Node):
    """No reference set: the mean of the training losses stands in for it."""

    name: Literal["population"]
    size: ClassVar[float] = 0.0
    aligns: ClassVar[bool] = True


def _reference_kind(node: Any) -> str:
    """Return which kind of reference values or a node are; those of ``trusted`` and ``none`` have no name."""
    return node.get("name", "trusted") if isinstance(node, Mapping) else getattr(node, "name", "trusted")


Reference = Annotated[
    Annotated[Trusted, Tag("trusted")] | Annotated[Pseudo, Tag("pseudo")] | Annotated[Population, Tag("population")],
    Discriminator(_reference_kind),
]


class Paths(Node):
    results: Folder
    data: Folder


class Plain(Node):
    """The keys of a run beside what it names."""

    reference: Reference
    saved: Annotated[float | None, Field(ge=0, lt=1), Aside()]
    scale: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    epochs: Epochs
    batch_size: Annotated[int, Field(ge=1, le=10**6)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    recorded: Annotated[Literal["plain", "smoothed", "doubt", "odds", "disagreement"], AlsoCalled(OTHER_NAMES)]
    eval_every: Count
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")]
    precision: Literal["auto", "bf16", "fp32"]
    channels_last: bool
    compile: Literal[False, True, "reduce-overhead"]
    graph: Annotated[Literal["auto", False, True], Neutral("auto")]
    deterministic: bool
    threads: Annotated[int, Field(ge=1, le=1024)]
    workers: Annotated[int, Field(ge=0, le=1024), Aside()]
    force: Annotated[bool, Aside()]
    checkpoint_seconds: Annotated[float, Field(ge=0, le=10**9), Aside()]
    keep_checkpoints: Annotated[bool, Aside()]
    keep_probabilities: Annotated[bool, Aside()]
    paths: Annotated[Paths, Aside()]


class Config(Plain):
    """One run. ``saved`` is a wish: `validate` turns it into the pruner's settings, and leaves None in its place."""

    task: Annotated[SerializeAsAny[Named], BeforeValidator(TASK.read), Neutral({"name": "classification"})]
    dataset: Annotated[SerializeAsAny[DatasetKeys], BeforeValidator(DATASET.read)]
    noise: Annotated[SerializeAsAny[NoiseKeys], BeforeValidator(NOISE.read)]
    pruner: Annotated[SerializeAsAny[Named], BeforeValidator(PRUNER.read)]
    score: Annotated[SerializeAsAny[ScoreKeys], BeforeValidator(SCORE.read)]
    learner: Annotated[SerializeAsAny[Named], BeforeValidator(LEARNER.read), Neutral({"name": "ce"})]
    model: Annotated[SerializeAsAny[Named], BeforeValidator(MODEL.read)]
    optimizer: Annotated[SerializeAsAny[OptimizerKeys], BeforeValidator(OPTIMIZER.read)]
    tracking: Annotated[SerializeAsAny[Named], BeforeValidator(TRACKING.read), Aside()]

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process make the nodes anew, of classes that are made as they are needed."""
        return Config.model_validate, (self.model_dump(),)


BY_SAMPLE = ("gpt", "mlp")  # models without batch norm, and so without a choice of it

# What a run records where its pruner ranks nothing: any score would be inert, so that all share one run.
UNRANKED = ScoreKeys(name="loss", window=10, unseen="carry", bank="float32")
NOTHING_HELD_OUT = Trusted(size=0.0, per_class=False, noise=0.0, train=False)

FORMER_SCALES = {"quick": "cpu"}  # what a scale was called when its first runs were published

# Keys whose text is a path, and so may hold anything.
PATHS = (
    *("paths.results", "paths.data", "dataset.root", "dataset.imagenet_root", "dataset.foreign"),
    *("noise.file", "score.file", "learner.file"),
)


def validate(values: Mapping[str, Any]) -> Config:
    """Return the config of a run, or raise UsageError with one sentence about its first mistake."""
    seams = {registry.kind: registry for registry in REGISTRIES}
    validated(Plain, {key: value for key, value in values.items() if key not in seams})
    for kind, registry in seams.items():
        registry.glance(values.get(kind))
    config = validated(Config, values)
    reference = config.reference
    if reference.size >= 1 and reference.size != int(reference.size):
        raise UsageError(f"reference.size={reference.size} is neither a share below 1 nor a whole number of samples")
    if isinstance(reference, Pseudo) and reference.warmup >= config.epochs:
        raise UsageError(
            f"reference.warmup={reference.warmup} leaves none of {config.epochs} epochs with a reference set; "
            f"use at most {config.epochs - 1}, or reference=population"
        )
    if config.saved is not None:
        config = config.model_copy(update=_saving(config.pruner, config.score, config.saved, config.epochs))
    plan = PRUNER.make(config.pruner)
    if (planned := plan.planned(config.epochs)) < config.epochs:
        raise UsageError(f"pruner={config.pruner.name}: epochs={config.epochs} is more than of={planned}; use fewer")
    if not plan.uses_scores:
        recorded = "plain" if config.recorded in SIGNALS else config.recorded
        config = config.model_copy(update={"score": UNRANKED, "recorded": recorded})
    learner = LEARNER.find(config.learner.name)
    task = TASK.find(config.task.name)
    smooths = getattr(learner, "smooths", False) and task.smooths
    if not smooths or config.label_smoothing == 0:  # a scale may have set some
        kept = "plain" if config.recorded == "smoothed" else config.recorded
        config = config.model_copy(update={"label_smoothing": 0.0, "recorded": kept})
    if not task.flips:
        config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"flip": False})})
    learner.check(config)
    return config


def _saving(node: Named, score: ScoreKeys, saved: float, epochs: int) -> dict[str, Any]:
    """Return the keys of a run, its pruner's node among them, set so that it saves so much. Raises UsageError.

    The pruner saves what the score takes before the run, too.
    """
    plan = PRUNER.make(node)
    holdout = SCORE.make(score).holdout_epochs(epochs) if plan.uses_scores else 0
    takes = f"score={score.name} takes {holdout} of {epochs} epochs before; with these counted " if holdout else ""
    if saved * epochs + holdout >= epochs:
        raise UsageError(f"{takes}saved={saved:g} is out of reach; lower score.holdout or saved")
    try:
        pruner = plan.saving(saved + holdout / epochs, epochs)
    except ValueError as error:
        less = f"; {holdout / epochs:g} of what is saved here is the score's: type so much less" if holdout else ""
        raise UsageError(f"{takes}pruner={node.name}: {error}{less}") from None
    node = node.model_copy(update={name: getattr(pruner, name) for name in settings(PRUNER.find(node.name))})
    return {"pruner": node, "epochs": plan.lasting(saved, epochs), "saved": None}


def feature_files(config: Config) -> dict[str, str | None]:
    """Return the keys that name a file of features, as ``score.file``, with it; None for the images' patches."""
    told = getattr(LEARNER.find(config.learner.name), "told", False)  # one of somebody's own may have another file
    nodes = {"score": config.score.model_dump(), "learner": config.learner.model_dump() if told else {}}
    return {f"{kind}.file": values["file"] for kind, values in nodes.items() if "file" in values}


def identity(config: Config, fingerprint: str, processes: int = 1) -> dict[str, Any]:
    """Return what makes a run the run it is: the config less its inert keys, and the data's fingerprint.

    The number of processes belongs to it where each normalises by statistics of its own share of a batch.
    A key that is added later is `Neutral` at the value that reproduces the old behaviour; a rule that is corrected
    raises its pruner's ``revision``.
    """
    values = config.telling()
    values["scale"] = FORMER_SCALES.get(config.scale, config.scale)
    noise, dataset = values["noise"], DATASET.find(config.dataset.name)
    if noise["name"] == "clean" and getattr(dataset, "as_shipped", False):
        noise = {"name": "real"}  # both mean the labels as they come
    taken = NOISE.make(config.noise).taken(config.dataset.name)
    values["noise"] = {key: value for key, value in noise.items() if key == "name" or key in taken}
    if not config.reference.aligns:
        values["reference"] = {"size": 0.0}
    if fingerprint:
        for key in feature_files(config):
            values[key.partition(".")[0]].pop("file", None)  # the data's fingerprint knows what is in it
    pruner = PRUNER.make(config.pruner)
    for key in pruner.inert():
        del values["pruner"][key]
    if pruner.revision:
        values["pruner"]["revision"] = pruner.revision
    if config.optimizer.cycle_momentum:
        values["optimizer"]["momentum"] = config.optimizer.momentum > 0
    if config.label_smoothing == 0 and config.recorded == "plain":
        del values["recorded"]
    if config.device.startswith("cuda"):
        values["device"] = "cuda"
    norm = getattr(config.model, "norm", None if config.model.name in BY_SAMPLE else "batch")
    if norm == "batch" and processes > 1:
        values["processes"] = processes
    values["data"] = fingerprint
    return values
