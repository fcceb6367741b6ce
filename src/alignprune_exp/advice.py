"""What is said beside a run: which typed keys have no effect, and which commands are worth typing next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

from .commandline import PROGRAM, as_typed, from_here, key_of
from .config import LEARNER, NOISE, PRUNER, SCORE, TASK, UNRANKED, Config, NoiseKeys, ScoreKeys
from .pruning.signals import SIGNALS
from .registry import settings
from .schema import shown


def inert_keys(config: Config, overrides: Sequence[str]) -> list[str]:
    """Say which keys of the command line have no effect."""
    notes = []
    given = sorted({override.split("=")[0].lstrip("+") for override in overrides})
    pruner, plan = config.pruner.name, PRUNER.make(config.pruner)
    signal = any(map(_records_a_signal, overrides))
    scores = [key for key in given if key.partition(".")[0] == "score" or (signal and key == "recorded")]
    if scores and not plan.uses_scores:
        notes.append(f"{', '.join(scores)} has no effect under pruner={pruner}, which ranks nothing")
    if "saved" in given and plan.keeps is None and plan.planned(config.epochs) == config.epochs:
        notes.append(f"saved has no effect under pruner={pruner}, which saves nothing")
    smoothing = [key for key in given if key == "label_smoothing" or (key == "recorded" and not signal)]
    for key, seam, name in (("learner", LEARNER, config.learner.name), ("task", TASK, config.task.name)):
        if smoothing and not seam.find(name).smooths:
            notes.append(f"{', '.join(smoothing)} has no effect under {key}={name}, which does not smooth")
    if "dataset.flip" in given and not TASK.find(config.task.name).flips:
        notes.append(f"dataset.flip has no effect under task={config.task.name}, which mirrors nothing")
    if named := [key for key in given if key in [f"pruner.{name}" for name in plan.inert()]]:
        notes.append(f"{', '.join(named)} has no effect beside the other settings of pruner={pruner}")
    inert = NoiseKeys.model_fields.keys() - {"name", *settings(NOISE.find(config.noise.name))}
    if named := [key for key in given if key in [f"noise.{name}" for name in inert]]:
        notes.append(f"{', '.join(named)} has no effect under noise={config.noise.name}")
    return notes


def next_commands(
    config: Config,
    overrides: Sequence[str],
    own: Sequence[str] = (),
    choices: Mapping[str, str] | None = None,
    fits: Callable[[list[str]], bool] = lambda words: True,
) -> list[tuple[str, str]]:
    """Return three commands worth typing after a run, each with what it does; fewer where some would be refused.

    Args:
        config: of the run.
        overrides: that chose it.
        own: see `own_options`.
        choices: the option of each group that they chose.
        fits: whether a run of some overrides would be accepted.
    """
    program = [_interpreter(), *PROGRAM.split()[1:], *own]
    score, ranks = config.score.name, PRUNER.make(config.pruner).uses_scores
    others = ["loss", *(["das"] if config.reference.aligns else []), "small_loss"]
    proposed: list[tuple[str, list[str]] | None] = []

    def propose(pruner: str | None, scores: Sequence[str | None], meaning: str) -> None:
        """Propose another pruner, or the same for None, with the first of some scores that fits."""
        lines = ((each, _otherwise(config, overrides, choices or {}, pruner, each)) for each in scores)
        proposed.append(next(((meaning.format(each), words) for each, words in lines if fits(words)), None))

    if ranks:
        propose("full", [None], "the same without pruning")
        propose(None, [each for each in others if each != score], "the same, ranked by {}")
    else:
        propose("infobatch", others[1:], "the same, pruned by InfoBatch with {}")
        propose("infobatch", ["loss"], "the same, pruned by InfoBatch as it is")
    if config.dataset.name == "digits":
        paths = [line for line in overrides if key_of(line).startswith("paths.")]
        proposed.append(("real images, in minutes", ["dataset=cifar10", "dataset.download=true", "scale=cpu", *paths]))
    else:
        inert = () if ranks else [line for line in overrides if _ranks(line)]
        seeded = [line for line in overrides if key_of(line) not in ("seed", "force") and line not in inert]
        proposed.append(("another seed", [*seeded, f"seed={config.seed + 1}"]))
    return [(_shell([*program, *words]), meaning) for meaning, words in filter(None, proposed)]


def _otherwise(
    config: Config, overrides: Sequence[str], choices: Mapping[str, str], pruner: str | None, score: str | None
) -> list[str]:
    """Return what to type for the same run with another pruner, or with its own one for None, and another score."""
    asked = SCORE.schema(score).model_fields if score else {}
    ranks = PRUNER.make(config.pruner).uses_scores
    of_losses = score is None or (score == "loss" and not (ranks and config.score.name == "loss"))
    kept = [
        override
        for override in overrides
        if (key := key_of(override)) not in ("method", "pruner", "score", "score.name", "force")
        and (pruner is None or not (key.startswith("pruner.") or key == "saved"))
        and (not key.startswith("score.") or key.removeprefix("score.") in asked)
        and not (of_losses and _records_a_signal(override))
    ]
    choice = [f"pruner={pruner or choices.get('pruner', config.pruner.name)}", *([f"score={score}"] if score else [])]
    of_method = pruner is None and "method" in map(key_of, overrides)
    return [*kept, *choice, *(_of_method(config, {*map(key_of, kept)}) if of_method else [])]


def _of_method(config: Config, given: set[str]) -> list[str]:
    """Return settings, ready to type, that neither ``pruner=`` and ``score=`` nor the keys given would choose."""
    plan = PRUNER.find(config.pruner.name)
    chosen = given | ({f"pruner.{plan.keeps}"} if "saved" in given else set())
    own = {f"pruner.{name}": (getattr(config.pruner, name), default) for name, (_, default) in settings(plan).items()}
    for name in sorted(ScoreKeys.model_fields.keys() - {"name"}):
        own[f"score.{name}"] = getattr(config.score, name), getattr(UNRANKED, name)
    return [f"{key}={shown(value)}" for key, (value, default) in own.items() if value != default and key not in chosen]


def _ranks(override: str) -> bool:
    """Return whether an override has a say in nothing but a ranking."""
    return key_of(override).partition(".")[0] == "score" or _records_a_signal(override)


def _records_a_signal(override: str) -> bool:
    """Return whether an override has trajectories made of something else than losses."""
    key, _, value = override.lstrip("+").partition("=")
    return key == "recorded" and value.strip("'\"") in SIGNALS


def _interpreter() -> str:
    """Return how to call this interpreter from here: ``python`` where that is it."""
    return "python" if shutil.which("python") == sys.executable else from_here(sys.executable)


def _shell(words: Sequence[str]) -> str:
    """Return words as a shell is given them."""
    return " ".join(word if shlex.quote(word) == word else as_typed(word) for word in words)
