"""Command lines of every kind, drawn at random: each must be accepted, or refused in one sentence with status 2.

python scripts/fuzz.py --lines 1000 --seed 0

They go the way of what people type, up to where a run would open its data: its config is checked, its parts that need
no data are made, and it has an id. Prints how many were accepted and refused, and every line that ended otherwise,
wrote a file, or made Python warn. Exits with status 1 if there were any.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import yaml

from alignprune_exp import console, setup, train
from alignprune_exp import run as run_module
from alignprune_exp.commandline import config_dir
from alignprune_exp.config import identity
from alignprune_exp.runs import run_id
from hydra_plugins import alignprune_launchers as launchers

SECONDS = 20  # that a line may take
words = str.split
NUMBERS = words("""0 1 -1 2 3 7 0.5 0.9 1.5 -0.5 1e-9 1e30 1e308 -1e308 1e400 nan inf -inf 2147483648 00 +1 .5 5. 1_000
    0x10 1000000000000000000000000000000""")
WORDS = words(r"""'' "" ' " \ a\ a|b a&b a,b a=b = it's (x) [1,2] [] [a {a:1} {} {a { } a:b a/b / . .. -m -- @ ! ~/x
    $HOME * ? #x %s null None true False abc '1' "0.5" str(1) int(x) float(1) {0} ??? ${seed} ${nope} ${oc.env:NOPE}
    数据 Ünlü é(1) ${hydra:job.name} os.path os.path.join .x.Y a..b os.
    alignprune_exp.pruning.Pruner alignprune_exp.config.Node""")
WORDS += ["", " ", "a b", " a", "é (1)", "${seed", "a\nb", "\t", "\x1b[1m", "\udcff", "\u202e", "9" * 5000]
SWEEPS = words("""0,1 1,x a,b , 0,,1 range(3) range(0,1,0) range(0,2,0.5) range(1e9) shuffle(range(1e9)) range(nan)
    interval(0,1) choice(1,2) choice() sort(2,1) glob(*) glob(s*,exclude=se*) tag(t,1,2) shuffle(1,2) range(9,0,-3)""")
FLAGS = words("""-m -m -m -m -m -m -r -h --help --hydra-help --version --resolve --info -i -sc --shell-completion --mult
    -x --nonsense -c,job -c,hydra -c,all --cfg,job,--resolve -c,job,-p,pruner -p,pruner -c,x --info,x --info,defaults
    -c,job,-p,x -cd,. -cd,/nowhere -cn,train -cp,/ --experimental-rerun,x --config-dir""")
HYDRA = words("""hydra hydra.mode hydra.run.dir hydra.job.chdir hydra.verbose hydra/output hydra/sweeper hydra/launcher
    hydra/launcher hydra.launcher hydra.launcher.n_jobs hydra.launcher.mem_gb hydra.launcher._target_ hydra.launcher.x
    hydra.searchpath""")
PARTS = words("whole whole pruner learner model optimizer dataset noise score reference")
Options = dict[str, dict[str, dict[str, object]]]  # of each group, the keys of every option with their values


def vocabulary() -> tuple[Options, dict[str, object], dict[str, str]]:
    """Return the options of every group, the keys of the whole run, and the options that it begins with."""
    groups: Options = {
        folder.name: {path.stem: yaml.safe_load(path.read_text()) or {} for path in sorted(folder.glob("*.yaml"))}
        for folder in sorted(path for path in config_dir().iterdir() if path.is_dir() and path.name != "hydra")
    }
    whole = yaml.safe_load((config_dir() / "train.yaml").read_text())
    first = {group: option for part in whole["defaults"] if isinstance(part, dict) for group, option in part.items()}
    keys = {key: value for key, value in whole.items() if key not in ("defaults", "hydra", "paths")}
    return groups, keys | {f"paths.{key}": value for key, value in whole["paths"].items()}, first


def draw(rng: random.Random, groups: Options, whole: dict[str, object], first: dict[str, str]) -> list[str]:
    """Return a command line."""
    chosen = dict(first)

    def key() -> tuple[str, object]:
        group = rng.choice(PARTS)
        if group == "whole":
            return rng.choice(list(whole.items()))
        option = chosen[group] if rng.random() < 0.9 else rng.choice(list(groups[group]))
        name, value = rng.choice([item for item in groups[group][option].items() if item[0] != "defaults"])
        return f"{group}.{name}", value

    def value(old: object) -> str:
        kind = rng.random()
        if isinstance(old, bool) and kind < 0.5:
            return rng.choice(["true", "false"])
        if isinstance(old, int | float) and kind < 0.7:
            near = [old, old, old + 1, old - 1, old * 2, old / 2, -old, old * 1000, rng.choice((10**6, 10**9, 10**12))]
            return str(rng.choice(near))
        if kind < 0.45:
            return "null" if old is None else str(old).lower()
        return rng.choice(SWEEPS if kind < 0.55 else NUMBERS if kind < 0.75 else WORDS)

    def part() -> str:
        kind, group, (name, old) = rng.random(), rng.choice(list(groups)), key()
        if kind < 0.3:
            if group in ("suite", "recipe") or rng.random() < 0.15:
                return f"{group}={rng.choice([*WORDS, *SWEEPS, (chosen.get(group) or group)[:-1]])}"
            chosen[group] = rng.choice(list(groups[group]))
            return f"{group}={chosen[group]}"
        if kind < 0.35:
            return f"{rng.choice(HYDRA)}={rng.choice(['joblib', 'slurm', 'submitit_local', *NUMBERS, *WORDS])}"
        if kind < 0.38:
            name = rng.choice([group, f"{group}@x", f"{group}@_global_", name[1:], f"{name}.x", f"{group}.x"])
        elif kind < 0.42:
            name = rng.choice(["~", "+", "++"]) + rng.choice([name, group])
        elif kind < 0.46:
            return rng.choice([name, f"~{name}", *WORDS, *NUMBERS])
        return f"{name}={value(old)}"

    line = [part() for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4)))]
    if rng.random() < 0.35:
        place = rng.randrange(len(line) + 1)
        line[place:place] = rng.choice(FLAGS).split(",")
    return line


@contextmanager
def nothing_runs():
    """Let what would open data, run or launch do no more than make what needs no data."""

    def run(config, command, group=None):
        run_id(identity(config, ""))
        setup.make_pruning(config, range(2), clean=np.ones(2, bool), labels=np.arange(2))
        return {}, Path()

    def launch(self, jobs):
        return [launchers._ended(0) for _ in jobs]

    with (
        mock.patch.object(run_module, "run", run),
        mock.patch.object(setup, "open_task"),
        mock.patch.object(console, "closing", return_value=""),
        mock.patch.object(launchers.JoblibLauncher, "launch_jobs", launch),
        mock.patch.object(launchers.SlurmLauncher, "launch_jobs", launch),
    ):
        yield


def outcome(line: list[str], folder: Path) -> str:
    """Return ``accepted``, ``refused``, or what is wrong with how a command line ended."""

    error = io.StringIO()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(record=True) as warned, redirect_stdout(io.StringIO()), redirect_stderr(error):
            status = train.main(line)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
    said = error.getvalue()
    if (left := [path.name for path in folder.rglob("*")]) or warned:
        return f"left {left}, warned of {[str(warning.message) for warning in warned]}"
    if (status, said) == (0, ""):
        return "accepted"
    return (
        "refused"
        if status == 2 and said == f"{said.strip()}\n" and len(said.splitlines()) == 1
        else f"{status}: {said}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, known, counts = random.Random(asked.seed), vocabulary(), Counter[str]()
    with nothing_runs():
        for _ in range(asked.lines):
            line = draw(rng, *known)
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                ended = outcome(line, Path(folder))
                os.chdir("/")
            counts[ended if ended in ("accepted", "refused") else "wrong"] += 1
            if ended not in ("accepted", "refused"):
                print(f"{shlex.join(line)!a}\n    {ended.strip()[-600:]!a}", flush=True)
    print(", ".join(f"{counts[kind]} {kind}" for kind in ("accepted", "refused", "wrong")))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
