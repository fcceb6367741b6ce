"""The schema of a run's config: types, ranges, and which keys make a run what it is.

Values live in ``conf/`` alone. Nothing here needs torch or data, so that mistakes are found at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    create_model,
    field_validator,
)

from .errors import UsageError
from .pruning.pruners import PRUNERS
from .pruning.selection import Plan, settings

# What lies beyond these ranges can only be a slip, and would end in memory, in time or in arithmetic.
EPOCHS, RATE = 100_000, 1000.0
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Epochs = Annotated[int, Field(ge=1, le=EPOCHS)]
Rate = Annotated[float, Field(ge=1e-12, le=RATE)]  # of learning
Weight = Annotated[float, Field(ge=0, le=10**6)]  # of a term of the loss
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Side = Annotated[int, Field(ge=1, le=4096)]  # of an image, in pixels


@dataclass(frozen=True)
class Neutral:
    """Marks a key: at this value it does what was done before there was the key, and so is not part of an id."""

    value: Any


class Node(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def telling(self) -> dict[str, Any]:
        """Return the values, nodes as dictionaries, without those that are neutral."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            value = value.telling() if isinstance(value, Node) else value
            if Neutral(value) not in field.metadata:
                found[name] = dict(value) if isinstance(value, dict) else value
        return found


class Dataset(Node):
    subset: Count | None
    test_subset: Count | None
    flip: bool


class Small(Dataset):
    crop: Annotated[int, Field(ge=0, le=4096)]


class Digits(Small):
    name: Literal["digits"]


class Cifar(Small):
    name: Literal["cifar10", "cifar100"]
    root: str
    download: bool


class ImageFolder(Small):
    name: Literal["image_folder"]
    root: str
    image_size: Side


class Photographs(Dataset):
    root: str
    image_size: Side
    area: Annotated[float, Field(ge=1e-4, le=1)]
    aspect: Annotated[float, Field(ge=0.01, le=1)]
    eval_crop: Annotated[float, Field(ge=0.01, le=1)]
    on_error: Literal["stop", "skip"]


class WebVision(Photographs):
    name: Literal["webvision"]
    classes: Annotated[int, Field(ge=2, le=1000)]
    imagenet_root: str | None


class Clothing1M(Photographs):
    name: Literal["clothing1m"]


class ImageNet(Photographs):
    name: Literal["imagenet", "tiny_imagenet"]
    classes: Annotated[int, Field(ge=2, le=100_000)]


class Parquet(Photographs):
    name: Literal["parquet"]
    image_column: str
    label_column: str
    train_split: str
    test_split: str


class Noise(Node):
    name: Literal["clean", "sym", "asym", "real"]
    rate: Annotated[float, Field(ge=0, lt=1)]
    labels: Literal["aggre", "rand1", "rand2", "rand3", "worst"]
    file: str | None


class Score(Node):
    name: str
    window: Annotated[int, Field(ge=3, le=EPOCHS)]
    unseen: Literal["carry", "mask", "refresh"]
    bank: Annotated[Literal["float32", "float16"], Neutral("float32")]


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
        """Whether the set is chosen anew after ``done`` of ``epochs`` epochs."""
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


class CrossEntropy(Node):
    name: Literal["ce"]


class Elr(Node):
    name: Literal["elr"]
    beta: Annotated[float, Field(ge=0, lt=1)]
    coefficient: Weight


class Sop(Node):
    name: Literal["sop"]
    lr_u: Annotated[float, Field(ge=0, le=RATE)]
    lr_v: Annotated[float, Field(ge=0, le=RATE)]
    std: Annotated[float, Field(ge=1e-30, le=10)]


class DivideMix(Node):
    name: Literal["dividemix"]
    warmup: Epochs
    confidence_penalty: bool
    p_threshold: Share
    temperature: Annotated[float, Field(ge=0.01, le=100)]
    alpha: Annotated[float, Field(ge=1e-3, le=1e4)]
    lambda_u: Weight
    rampup: Epochs


class Narrow(Node):
    name: Literal["small_cnn", "resnet8"]
    width: Annotated[int, Field(ge=1, le=1024)]
    norm: Annotated[Literal["batch", "sync", "group"], Neutral("batch")]


class ResNet(Node):
    name: Literal["resnet18", "resnet50"]
    stem: Literal["small", "large"]
    weights: Annotated[Literal["none", "imagenet"], Neutral("none")]
    norm: Annotated[Literal["batch", "sync", "group"], Neutral("batch")]


class Optimizer(Node):
    name: Literal["sgd", "lars"]
    lr: Rate
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0, le=100)]
    pct_start: Annotated[float, Field(gt=0, lt=1)]
    div: Annotated[float, Field(ge=1, le=1e12)]
    final_div: Annotated[float, Field(ge=1, le=1e12)]
    cycle_momentum: bool


class NoTracking(Node):
    name: Literal["none"]


class Wandb(Node):
    name: Literal["wandb"]
    mode: Literal["offline", "online"]
    project: str
    entity: str | None
    group: str | None


class Paths(Node):
    results: Folder
    data: Folder


class Config(Node):
    """One run. ``pruner`` holds its name and settings, which the pruner's own class checks.

    ``saved`` is a wish: `validate` turns it into the pruner's settings, and leaves None in its place.
    """

    dataset: Annotated[
        Digits | Cifar | ImageFolder | WebVision | Clothing1M | ImageNet | Parquet, Field(discriminator="name")
    ]
    noise: Noise
    reference: Reference
    pruner: dict[str, Any]
    saved: Annotated[float, Field(gt=0, lt=1)] | None
    score: Score
    learner: Annotated[CrossEntropy | Elr | Sop | DivideMix, Field(discriminator="name"), Neutral({"name": "ce"})]
    model: Annotated[Narrow | ResNet, Field(discriminator="name")]
    optimizer: Optimizer
    tracking: Annotated[NoTracking | Wandb, Field(discriminator="name")]
    scale: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    epochs: Epochs
    batch_size: Annotated[int, Field(ge=1, le=10**6)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    recorded: Literal["plain", "smoothed"]
    eval_every: Count
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")]
    precision: Literal["auto", "bf16", "fp32"]
    channels_last: bool
    compile: Literal[False, True, "reduce-overhead"]
    deterministic: bool
    threads: Annotated[int, Field(ge=1, le=1024)]
    workers: Annotated[int, Field(ge=0, le=1024)]
    force: bool
    keep_checkpoints: bool
    paths: Paths

    @field_validator("pruner")
    @classmethod
    def _check_pruner(cls, value: dict[str, Any]) -> dict[str, Any]:
        make_pruner(value)
        return value


# What a run records where its pruner ranks nothing: any score would be inert, so that all share one run.
UNRANKED = Score(name="loss", window=10, unseen="carry", bank="float32")
NOTHING_HELD_OUT = Trusted(size=0.0, per_class=False, noise=0.0, train=False)

# The most of a pruner's settings of which its own class knows no most: what lies beyond can only be a slip.
MOST = {"warmup": EPOCHS, "groups": 10_000, "rounds": 10_000, "neighbours": 10_000, "eta": 1e6, "c": 1e6}

# Keys whose text is a path, and so may hold anything.
PATHS = ("paths.results", "paths.data", "dataset.root", "dataset.imagenet_root", "noise.file")

# Keys that cannot change the result; what the data holds is in the identity by fingerprint.
NOT_IDENTITY = {
    "": ("force", "keep_checkpoints", "paths", "tracking", "workers"),
    "dataset": ("root", "download", "imagenet_root", "on_error"),
    "noise": ("file",),
}


def validate(values: Mapping[str, Any]) -> Config:
    """Return the config of a run, or raise UsageError with one sentence about its first mistake."""
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(_explain(error, values)) from None
    reference = config.reference
    if reference.size >= 1 and reference.size != int(reference.size):
        raise UsageError(f"reference.size={reference.size} is neither a share below 1 nor a whole number of samples")
    if isinstance(reference, Pseudo) and reference.warmup >= config.epochs:
        raise UsageError(
            f"reference.warmup={reference.warmup} leaves none of {config.epochs} epochs with a reference set; "
            f"use at most {config.epochs - 1}, or reference=population"
        )
    pruner = make_pruner(config.pruner)
    if config.saved is not None:
        try:
            pruner = pruner.saving(config.saved, config.epochs)
        except ValueError as error:
            raise UsageError(f"pruner={config.pruner['name']}: {error}") from None
        chosen = {name: getattr(pruner, name) for name in settings(type(pruner))}
        config = config.model_copy(update={"pruner": {"name": config.pruner["name"], **chosen}, "saved": None})
    if not pruner.uses_scores:
        config = config.model_copy(update={"score": UNRANKED})
    if config.learner.name != "ce" or config.label_smoothing == 0:  # no smoothing; a scale may have set some
        config = config.model_copy(update={"label_smoothing": 0.0, "recorded": "plain"})
    if isinstance(config.learner, DivideMix):
        _check_dividemix(config, config.learner)
    return config


def _check_dividemix(config: Config, learner: DivideMix) -> None:
    if learner.warmup >= config.epochs:
        raise UsageError(
            f"learner.warmup={learner.warmup} leaves dividemix none of {config.epochs} epochs to divide in; "
            f"set a smaller one, or epochs={learner.warmup + 1} or more"
        )
    if config.compile:
        raise UsageError("compile is not for learner=dividemix, whose two networks take turns; set compile=false")


def make_pruner(values: Mapping[str, Any]) -> Plan:
    """Return the pruner that ``{name: …, setting: …}`` describes; the name may be an import path.

    Raises UsageError for an unknown name or setting, a wrong type, or a value out of range.
    """
    name = values.get("name")
    if not isinstance(name, str):
        wrong = f"pruner.name={shown(name)} is no name" if "name" in values else "pruner.name is missing"
        raise UsageError(f"{wrong}; use one of {', '.join(PRUNERS)}, or package.module.Class")
    pruner: Any = PRUNERS[name] if name in PRUNERS else import_class(name, Plan, "pruner", PRUNERS)
    given = {key: value for key, value in values.items() if key != "name"}
    try:
        checked = _schema(pruner).model_validate(given)
    except ValidationError as error:
        raise UsageError(_explain(error, given, "pruner", f"pruner={name}")) from None
    try:
        return pruner(**checked.model_dump())
    except ValueError as error:
        raise UsageError(f"pruner: {error}") from None


@cache
def _schema(pruner: Any) -> type[Node]:
    """Return what a pruner's constructor takes, as a schema."""
    hints = typing.get_type_hints(pruner)
    most = MOST if pruner in PRUNERS.values() else {}
    fields: dict[str, Any] = {
        setting: (Annotated[hints[setting], Field(le=most[setting])] if setting in most else hints[setting], ...)
        for setting in settings(pruner)
    }
    return create_model("Settings", __base__=Node, **fields)


def import_class(path: str, base: type, what: str, known: Iterable[str]) -> Any:
    """Import ``package.module.Class``, a subclass of ``base``; raise UsageError where that fails."""
    module, _, name = path.rpartition(".")
    if not module:
        raise UsageError(
            f"{what}.name={path} is unknown{suggest(path, known)}; use one of {', '.join(known)}, "
            "or package.module.Class"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of one's own may raise any
        raise UsageError(
            f"{what}.name={path} cannot be imported ({type(error).__name__}: {error}); use one of {', '.join(known)}, "
            "or package.module.Class of a module on PYTHONPATH"
        ) from None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UsageError(f"{what}.name={path} is not a subclass of {base.__module__}.{base.__qualname__}")
    return found


def identity(config: Config, fingerprint: str, processes: int = 1) -> dict[str, Any]:
    """Return what makes a run the run it is: the config less its inert keys, and the data's fingerprint.

    The number of processes belongs to it where each normalises by statistics of its own share of a batch.
    A key that is added later is `Neutral` at the value that reproduces the old behaviour; a rule that is corrected
    raises its pruner's ``revision``.
    """
    values = config.telling()
    del values["saved"]  # what it asks for is in the pruner's settings
    for node, keys in NOT_IDENTITY.items():
        for key in keys:
            (values[node] if node else values).pop(key, None)
    noise = values["noise"]
    if noise["name"] == "clean" and isinstance(config.dataset, Photographs):
        noise["name"] = "real"  # both mean the labels as they come
    if noise["name"] not in ("sym", "asym"):
        del noise["rate"]
    if noise["name"] != "real" or config.dataset.name != "cifar10":
        del noise["labels"]
    if not config.reference.aligns:
        values["reference"] = {"size": 0.0}
    pruner = make_pruner(config.pruner)
    for key in pruner.inert():
        del values["pruner"][key]
    if pruner.revision:
        values["pruner"]["revision"] = pruner.revision
    if config.optimizer.cycle_momentum:
        values["optimizer"]["momentum"] = config.optimizer.momentum > 0
    if config.label_smoothing == 0:
        del values["recorded"]
    if config.device.startswith("cuda"):
        values["device"] = "cuda"
    if config.model.norm == "batch" and processes > 1:
        values["processes"] = processes
    values["data"] = fingerprint
    return values


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean …?`` where something known is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _explain(error: ValidationError, values: Mapping[str, Any], at: str = "", chosen: str = "") -> str:
    """Turn the first validation error into one sentence."""
    first = error.errors()[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), UsageError):
        return str(cause)
    keys: list[str] = [at] if at else []
    node: Any = values
    for part in first["loc"]:
        if isinstance(node, Mapping) and (part in node or part == first["loc"][-1]):
            keys.append(str(part))
            node = node.get(part)
    key = ".".join(keys)
    parent = ".".join(keys[:-1])
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(values, keys, at, error)
        where = chosen or (f"{parent}={_name(values, parent)}" if parent else "the config")
        return f"unknown key {key}{suggest(keys[-1], known)}; {where} has {', '.join(known) or 'none'}"
    if kind == "missing":
        return f"{key} is missing; set {key}=…"
    if kind == "union_tag_not_found":
        return f"{key}.name is missing; choose one with {key}=…"
    if kind == "string_too_short":
        return f"{key} is empty; set {key}=…"
    given = f"{key}={shown(first['input'])}"
    if kind in _RANGES:
        return f"{given} is out of range: use a value {_RANGES[kind]} {next(iter(context.values()))}"
    if kind == "union_tag_invalid":
        given = f"{key}.name={context['tag']}"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context.get("expected_tags")
        return f"{given} is unknown: use {expected}".replace("'", "").replace("True", "true").replace("False", "false")
    if kind == "string_pattern_mismatch":
        return f"{given} is unknown: use auto, cpu, cuda or cuda:K"
    if isinstance(first["input"], str) and re.fullmatch(
        r"[-+]?(\d+\.?|\d*\.\d+)(e[-+]?\d+)?|true|false|null", first["input"], re.I
    ):
        return f"{key}='{first['input']}' is a text; leave out the quotes"
    return f"{given} has the wrong type: {first['msg'][0].lower()}{first['msg'][1:]}"


_RANGES = {
    "greater_than": "above",
    "greater_than_equal": "of at least",
    "less_than": "below",
    "less_than_equal": "of at most",
}


def _known_keys(values: Mapping[str, Any], keys: list[str], at: str, error: ValidationError) -> list[str]:
    """The keys that the schema allows beside the unknown one."""
    extra = {str(e["loc"][-1]) for e in error.errors() if e["type"] == "extra_forbidden"}
    node: Any = values
    for part in keys[(1 if at else 0) : -1]:
        node = node[part]
    return [str(key) for key in node if key not in extra and key != "name"]


def _name(values: Mapping[str, Any], node: str) -> str:
    return str(cast(Mapping[str, Any], values[node]).get("name", "…"))


def shown(value: Any) -> str:
    """Return a value as the command line writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
