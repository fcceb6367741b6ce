"""Every option of conf/ composes; what makes a run the run it is; which of two settings wins."""

import inspect
import pickle
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from alignprune_exp.advice import next_commands
from alignprune_exp.commandline import refuse_clashes
from alignprune_exp.config import MODEL, PRUNER, REGISTRIES, Config, identity, validate
from alignprune_exp.errors import UsageError
from alignprune_exp.models import MODELS
from alignprune_exp.pruning import PRUNERS, SCORES, DynamicPruning, Pruner
from alignprune_exp.registry import settings as settings_of
from alignprune_exp.setup import check_pruning, make_pruning
from harness import FINGERPRINT, composed, id_of, ids_of

CONF = Path(__file__).parents[1] / "conf"
GROUPS = (
    "task",
    "dataset",
    "noise",
    "pruner",
    "score",
    "reference",
    "learner",
    "model",
    "optimizer",
    "scale",
    "tracking",
)
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
ROOT = "dataset.root=/nowhere"


def _leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_validates(group, option):
    keys = re.findall(r"^(root|\w+(?=: \?{3})):", (CONF / group / f"{option}.yaml").read_text(), re.M)
    config = composed(f"{group}={option}", *(f"{group}.{key}=/nowhere" for key in keys))
    chosen = config.model_dump()[group]
    name = chosen if group == "scale" else chosen.get("name")
    assert name is not None or group == "reference"  # trusted labels, which go by no name
    assert name is None or option == name or re.fullmatch(rf"{name}(0\.\d|_\w+)", option)


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] != "scale"])
def test_every_option_says_in_its_first_line_what_it_is(group, option):
    assert (CONF / group / f"{option}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_pruner_yaml_holds_the_defaults_of_its_class(name):
    values = yaml.safe_load((CONF / "pruner" / f"{name}.yaml").read_text())
    defaults = {field.name: field.default for field in fields(PRUNERS[name])}
    assert values == {"name": name, **defaults}
    assert [type(values[key]) for key in defaults] == [type(value) for value in defaults.values()]


@pytest.mark.parametrize("name", sorted(SCORES))
def test_score_yaml_holds_the_defaults_of_the_plug_in(name):
    values = yaml.safe_load((CONF / "score" / f"{name}.yaml").read_text())
    parameters = inspect.signature(DynamicPruning).parameters
    defaults = {key: parameters[key].default for key in ("window", "unseen")}
    defaults |= {key: default for key, (_, default) in settings_of(SCORES[name]).items()}
    assert values == {"name": name, "bank": str(parameters["bank_dtype"].default).removeprefix("torch.")} | defaults


def test_main_job_is_what_the_specification_says():
    assert ids_of("") == ids_of("dataset=digits noise=sym0.5 pruner=infobatch score=das scale=smoke")


@pytest.mark.parametrize(
    ("noise", "name", "rate"),
    [("sym0.5", "sym", 0.5), ("sym0.8", "sym", 0.8), ("asym0.2", "asym", 0.2), ("asym0.4", "asym", 0.4)],
)
def test_noise_rate_in_an_options_name_is_its_rate(noise, name, rate):
    config = composed(f"noise={noise}")
    assert (config.noise.name, config.noise.rate) == (name, rate)
    assert ids_of(f"noise={noise}") == ids_of(f"noise={name} noise.rate={rate}")


def test_paper_scale_is_the_public_recipe():
    config = composed("scale=paper", "dataset=cifar100", ROOT)
    optimizer, dataset = config.optimizer, config.dataset
    assert (config.model.name, config.model.stem, config.epochs, config.batch_size) == ("resnet18", "small", 200, 128)
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.cycle_momentum) == ("lars", 5.2, 5e-4, True)
    assert (optimizer.pct_start, optimizer.div, optimizer.final_div, config.label_smoothing) == (0.3, 25, 1e4, 0.1)
    assert (dataset.flip, dataset.crop, dataset.subset, config.recorded) == (True, 4, None, "smoothed")


@pytest.mark.parametrize("learner", ["elr", "sop", "refurbish", "posterior", "dividemix"])
def test_paper_scale_smooths_and_records_so_for_cross_entropy_alone(learner):
    config = composed("scale=paper", f"learner={learner}")
    assert (config.label_smoothing, config.recorded) == (0.0, "plain")
    assert composed("scale=paper", "recorded=plain").recorded == "plain"


# --- what the command line sets wins over what a scale or a recipe sets


EXPLICIT = {
    "epochs": 17,
    "batch_size": 33,
    "label_smoothing": 0.05,
    "eval_every": 3,
    "threads": 3,
    "optimizer.lr": 0.123,
    "optimizer.weight_decay": 0.01,
    "model.width": 9,
    "dataset.subset": 77,
    "dataset.test_subset": 78,
    "dataset.crop": 2,
}


@pytest.mark.parametrize("scale_first", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_command_line_wins_over_scale_and_recipe_in_either_order(scale, optimizer, scale_first):
    explicit = ["model=small_cnn", f"optimizer={optimizer}", *(f"{key}={value}" for key, value in EXPLICIT.items())]
    order = [f"scale={scale}", *explicit] if scale_first else [*explicit, f"scale={scale}"]
    values = composed("dataset=cifar10", ROOT, *order).model_dump()
    found = {".".join(path): value for path, value in _leaves(values)}
    assert {key: found[key] for key in EXPLICIT} == EXPLICIT
    assert (found["model.name"], found["optimizer.name"], found["scale"]) == ("small_cnn", optimizer, scale)


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_an_optimizer_chosen_by_hand_comes_with_its_own_rate(scale):
    own = yaml.safe_load((CONF / "optimizer" / "lars.yaml").read_text())
    assert composed(f"scale={scale}", "optimizer=lars").optimizer.lr == own["lr"]


# --- identity


# A change of one of these means that runs made before are no longer found: they would all be computed again.
# If that is meant, say so in the commit; else leave the new key out of `identity` at the value of old.
GOLDEN = {
    "": "17d5af224eeb",
    "dataset=cifar100 dataset.root=/d scale=paper noise=real pruner=seta score=spearman": "a0c80a13f87e",
    "dataset=image_folder dataset.root=/d scale=quick noise=clean pruner=full device=cuda reference=none": (
        "8562ec15a941"
    ),
}


@pytest.mark.parametrize(("overrides", "expected"), GOLDEN.items())
def test_golden_ids(overrides, expected):
    assert ids_of(overrides) == [expected]


@pytest.mark.parametrize(
    "change",
    [
        "paths.results=/elsewhere",
        "paths.data=/elsewhere",
        "tracking=wandb",
        "tracking=wandb tracking.mode=online tracking.project=p tracking.entity=e tracking.group=g",
        "force=true",
        "checkpoint_seconds=5",
        "keep_checkpoints=true",
        "keep_probabilities=true",
        "workers=7",
        "dataset.root=/elsewhere",
        "dataset.download=true",
        "noise.file=/some/file.pt",
    ],
)
def test_what_cannot_change_the_result_does_not_change_the_id(change):
    base = f"dataset=cifar10 {ROOT}"
    same, changed = ids_of(base, f"{base} {change}")
    assert same == changed


def test_devices_of_one_kind_are_one_run():
    cuda = ids_of("device=cuda", "device=cuda:0", "device=cuda:1")
    assert len(set(cuda)) == 1
    assert len({*cuda, *ids_of("device=cpu", "device=auto")}) == 3


TASK_OF = {"gpt": "language", "mlp": "regression", "fcos": "detection", "fcos_small": "detection"}
TASK_OF |= dict.fromkeys(("unet", "lraspp", "deeplabv3"), "segmentation")


NORMALISED = [name for name in MODELS if "\nnorm: " in (CONF / "model" / f"{name}.yaml").read_text()]


@pytest.mark.parametrize("choice", [*MODELS, *(f"{name} model.norm=group" for name in NORMALISED)])
def test_the_number_of_processes_belongs_to_a_run_of_batch_norm_alone(choice):
    task = TASK_OF.get(choice.split()[0], "classification")
    config = composed(f"task={task}", *f"model={choice}".split())
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    by_share = any(isinstance(part, kinds) for part in MODEL.make(config.model, 3, 8).modules())
    ids = {id_of(config, processes=processes) for processes in (1, 2, 3)}
    assert len(ids) == (3 if by_share else 1)


# Smoothing makes `recorded` matter. Numbers and booleans are changed by rule, words by this table.
WALKED = composed("label_smoothing=0.1").model_dump()
OTHER = {
    "noise.name": "asym",
    "score.name": "loss",
    "score.unseen": "mask",
    "score.bank": "float16",
    "model.name": "resnet8",
    "model.norm": "group",
    "optimizer.name": "lars",
    "recorded": "smoothed",
    "precision": "fp32",
    "graph": False,
    "device": "cpu",
    "scale": "cpu",
    "dataset.subset": 500,
    "dataset.test_subset": 100,
    "pruner.budget": 0.7,
    "saved": 0.4,
}
# By the specification: what cannot change the result, or has no effect under sym noise on digits.
INERT = {"paths.results", "paths.data", "tracking.name", "force", "keep_checkpoints", "keep_probabilities", "workers"}
INERT |= {"checkpoint_seconds", "noise.file", "noise.labels"}
# Changing the name alone leaves keys of the old option behind, or lacks those of the new.
NO_OTHER = {"task.name", "dataset.name", "pruner.name", "learner.name"}


@pytest.mark.parametrize(
    "path", [p for p, _ in _leaves(WALKED) if ".".join(p) not in INERT | NO_OTHER], ids=lambda p: ".".join(p)
)
def test_every_other_key_changes_the_id(path):
    values = composed("label_smoothing=0.1").model_dump()
    *parents, key = path
    node = values
    for parent in parents:
        node = node[parent]
    old, name = node[key], ".".join(path)
    if name in OTHER:
        node[key] = OTHER[name]
    elif isinstance(old, bool):
        node[key] = not old
    elif isinstance(old, int):
        node[key] = old + 1
    else:
        assert isinstance(old, float), f"{name} is new: give it another valid value in OTHER"
        node[key] = old / 2 if old else 0.25
    assert node[key] != old
    assert id_of(validate(values)) != id_of(validate(WALKED))


def test_dataset_and_pruner_and_data_change_the_id():
    datasets = [f"dataset=cifar10 {ROOT}", f"dataset=cifar100 {ROOT}"]
    ids = ids_of("", *datasets, *(f"pruner={name}" for name in PRUNERS if name != "infobatch"))
    assert len(set(ids)) == len(ids)
    assert id_of(composed(), "1" * 64) != id_of(composed())


def test_a_corrected_rule_is_another_run_and_no_other_pruner_says_which_it_follows(monkeypatch):
    assert identity(composed("pruner=static_prune4rel"), FINGERPRINT)["pruner"]["revision"] == 1
    config = composed()
    assert "revision" not in identity(config, FINGERPRINT)["pruner"]
    old = id_of(config)
    monkeypatch.setattr(PRUNERS["infobatch"], "revision", 1)
    assert id_of(config) != old


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("noise=clean", ["noise.rate=0.3", "noise.labels=rand1"]),
        (f"dataset=cifar10 {ROOT} noise=real", ["noise.rate=0.3"]),
        (f"dataset=cifar100 {ROOT} noise=real", ["noise.rate=0.3", "noise.labels=aggre"]),
        (f"dataset=cifar10 {ROOT} noise=sym0.5", ["noise.labels=aggre"]),
        ("noise=asym0.2", ["noise.labels=rand2"]),
        *[
            (f"pruner={pruner}", ["score=loss", "score=oracle", "score=das score.window=4 score.unseen=refresh"])
            for pruner in ("full", "random")
        ],
        ("reference=none score=loss", ["reference.noise=0.1", "reference.train=true"]),
        ("label_smoothing=0", ["recorded=smoothed"]),
    ],
)
def test_keys_that_a_choice_leaves_without_effect_do_not_change_the_id(base, changes):
    ids = ids_of(base, *(f"{base} {change}" for change in changes))
    assert len(set(ids)) == 1


@pytest.mark.parametrize(
    ("saved", "explicit"),
    [
        ("saved=0.5 epochs=40", "pruner.budget=0.42857142857142855 epochs=40"),
        ("pruner=static_el2n saved=0.5 epochs=40", "pruner=static_el2n pruner.fraction=0.25 epochs=40"),
        ("pruner=topk saved=0.6 epochs=20", "pruner=topk pruner.ratio=0.8 epochs=20"),
        ("pruner=full saved=0.5", "pruner=full"),
        ("pruner=full saved=0", "pruner=full"),
        ("pruner=shorter saved=0.6 epochs=40", "pruner=shorter pruner.of=40 epochs=16"),
        ("pruner=sieve score=cleaning saved=0.5", "pruner=sieve score=cleaning pruner.budget=0.5"),
    ],
)
def test_a_run_told_what_to_save_is_the_run_told_what_to_keep(saved, explicit):
    assert len(set(ids_of(saved, explicit))) == 1


def test_a_shorter_run_is_not_longer_than_what_it_is_shorter_than():
    with pytest.raises(UsageError, match="epochs=20 is more than of=10"):
        composed("pruner=shorter", "pruner.of=10", "epochs=20")


def test_every_key_of_a_pseudo_reference_changes_the_id():
    pseudo = "reference=pseudo"
    changes = ["reference.method=cleanlab", "reference.size=0.02", "reference.warmup=6", "reference.every=11"]
    kinds = ["", "reference=none score=loss", "reference=population", "reference=population score=loss", pseudo]
    ids = ids_of(*kinds, *(f"{pseudo} {change}" for change in changes))
    assert len(set(ids)) == len(ids)
    assert ids_of("reference=pseudo_cleanlab") == ids_of(f"{pseudo} reference.method=cleanlab")


def test_keys_with_an_effect_again_change_the_id():
    real10 = f"dataset=cifar10 {ROOT} noise=real"
    assert len(set(ids_of(real10, f"{real10} noise.labels=aggre"))) == 2
    assert len(set(ids_of("noise=sym", "noise=sym noise.rate=0.35", "noise=asym noise.rate=0.35"))) == 3
    assert len(set(ids_of("pruner=topk", "pruner=topk score=loss", "pruner=seta", "pruner=seta score=loss"))) == 4


# --- ranges, at their edges


def _numbers(schema, place=""):
    """Yield the place and the schema of every number."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield place, schema
        for key, inner in schema.items():
            yield from _numbers(inner, f"{place}/{key}")
    elif isinstance(schema, list):
        for inner in schema:
            yield from _numbers(inner, place)


def test_every_number_has_a_least_and_a_most():
    numbers = dict(_numbers(Config.model_json_schema()))
    for registry in REGISTRIES:
        for name in (
            registry.builtin if registry.kind not in ("pruner", "score") else ()
        ):  # whose classes check themselves
            numbers |= dict(_numbers(registry.schema(name).model_json_schema(), f"{registry.kind} {name}"))
    assert len(numbers) > 40
    assert [at for at, number in numbers.items() if not {"maximum", "exclusiveMaximum"} & number.keys()] == []
    assert [at for at, number in numbers.items() if not {"minimum", "exclusiveMinimum"} & number.keys()] == []


@pytest.mark.parametrize("name", sorted(PRUNERS))
@pytest.mark.parametrize("far", [10**12, -(10**12)])
def test_every_number_of_a_pruner_has_a_least_and_a_most(name, far):
    values = yaml.safe_load((CONF / "pruner" / f"{name}.yaml").read_text())
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            with pytest.raises(UsageError, match=key):
                PRUNER.read(values | {key: type(value)(far)})


def test_a_pruner_of_ones_own_sets_its_own_ranges():
    many = PRUNER.make(PRUNER.read({"name": f"{__name__}.Many", "rounds": 10**6}))
    assert many == Many(rounds=10**6)


@dataclass(frozen=True, kw_only=True)
class Many(Pruner):
    rounds: int


@pytest.mark.parametrize(
    "overrides",
    [
        "noise=sym noise.rate=0",
        "noise=sym noise.rate=0.999",
        "score.window=3 epochs=5",  # 4 <= 4.375
        "epochs=13",  # 11 <= 11.375
        "pruner.delta=0.29 epochs=100 score.window=28",  # 29 <= 29, which floating point makes 28.999…
        "pruner.ratio=0",
        "pruner.ratio=0.9",
        "reference.size=0 score=loss",
        "epochs=30",
        "optimizer.lr=1",  # a whole number is a number
    ],
)
def test_values_at_the_edge_are_accepted(overrides):
    make_pruning(composed(*overrides.split()), range(100), clean=np.ones(100, bool), labels=np.zeros(100, int))


@pytest.mark.parametrize(
    "overrides",
    [
        "noise=sym noise.rate=1",
        "noise=sym noise.rate=-0.01",
        "noise=sym noise.rate=nan",
        "score.window=2",
        "epochs=12",  # 11 > 10.5
        "pruner.delta=0.29 epochs=100 score.window=29",
        "pruner.ratio=0.91",
        "pruner.ratio=-0.1",
        "pruner.ratio=nan",
        "pruner.delta=0",
        "pruner.delta=1.1",
        "pruner.budget=0",
        "pruner.budget=1.5",
        "saved=1",
        "saved=0",
        "saved=0.95",
        "pruner=seta pruner.groups=0",
        "pruner=seta pruner.alpha=0",
        "pruner=seta pruner.alpha=1.5",
        "pruner=topk pruner.warmup=-1",
        "reference.size=0",
        "reference.size=1.5",
        "reference.size=inf",
        "reference.size=nan",
        "optimizer.lr=0",
        "optimizer.lr=nan",
        "optimizer.lr=inf",
        "optimizer.pct_start=1",
        "optimizer.weight_decay=nan",
        "batch_size=0",
        "epochs=0",
        "eval_every=0",
        "label_smoothing=1",
        "dataset.crop=-1",
        "model.width=0",
    ],
)
def test_values_beyond_the_edge_are_refused(overrides):
    with pytest.raises(UsageError) as error:
        make_pruning(composed(*overrides.split()), range(100), clean=np.ones(100, bool), labels=np.zeros(100, int))
    last_key, _, value = overrides.split()[-1].partition("=")
    assert last_key.split(".")[-1] in str(error.value)
    assert value in str(error.value) or last_key in ("epochs", "score.window")
    assert "\n" not in str(error.value)


def test_a_config_arrives_in_another_process_as_it_was():
    config = composed("learner=elr", "pruner=seta", "saved=0.2", "reference=pseudo")
    assert pickle.loads(pickle.dumps(config)) == config


# --- what is proposed to type next

ranking = st.sampled_from(sorted(SCORES)).map(lambda name: f"score={name}")
choosing = st.sampled_from(sorted(PRUNERS)).map(lambda name: f"pruner={name}")
methods = st.sampled_from(sorted(path.stem for path in (CONF / "method").glob("*.yaml"))).map("method={}".format)
sized = st.tuples(st.integers(1, 12).map("epochs={}".format), st.sampled_from([3, 5, 10]).map("score.window={}".format))
others = st.lists(
    st.sampled_from(
        ["saved=0.5", "reference=none", "reference=population", "recorded=odds", "learner=elr", "seed=4", "force=true"]
    ),
    unique_by=lambda line: line.partition("=")[0],
)


def accepted(words):
    """The config that overrides choose, with all that can be looked at before the data; None where it is refused."""
    try:
        refuse_clashes(words)
        config = composed(*words)
        check_pruning(config)
    except UsageError:
        return None
    return config


def test_all_that_is_proposed_next_stays_where_the_run_was():
    paths = ["paths.results=/elsewhere", "paths.data=/data"]
    proposed = next_commands(composed(*paths), paths)
    assert [set(paths) <= set(shlex.split(line)) for line, _ in proposed] == [True] * 3


@settings(max_examples=12, deadline=None)
@given(st.one_of(methods.map(lambda method: [method]), st.tuples(choosing, ranking).map(list)), sized, others)
@example(["pruner=infobatch", "score=loss"], ("epochs=4", "score.window=3"), [])
@example(["method=sieve_supervised"], ("epochs=12", "score.window=3"), ["saved=0.5"])
def test_whatever_is_proposed_next_is_accepted_and_is_what_it_says(chosen, size, others):
    words = ["dataset=cifar10", *chosen, *size, *others]
    assume((config := accepted(words)) is not None)
    proposed = next_commands(config, words, fits=lambda words: accepted(words) is not None)
    seeds = 0
    for line, meaning in proposed:
        other = accepted(shlex.split(line)[3:])
        assert other is not None, line
        for key in ("task", "dataset", "noise", "reference", "learner", "model", "optimizer", "batch_size"):
            assert getattr(other, key) == getattr(config, key)
        assert not other.force
        if meaning == "another seed":
            seeds += 1
            assert other.model_copy(update={"seed": config.seed, "force": config.force}) == config
        elif meaning == "the same without pruning":
            assert other.pruner.name == "full"
        elif meaning.startswith("the same, ranked by "):
            assert (other.pruner, other.epochs, other.seed) == (config.pruner, config.epochs, config.seed)
            assert other.score.name == meaning.split()[-1] != config.score.name
            assert other.score.window == config.score.window
        else:
            assert other.pruner.name == "infobatch"
            assert other.score.name == ("loss" if meaning.endswith("as it is") else meaning.split()[-1])
    assert seeds == 1
