"""The bits of a dozen tiny runs, which a change of the code's structure leaves as they are.

``oracle.json`` has a digest of every metric and of every column of ``samples.parquet``, for each kind of processor and
version of torch that they were recorded on; what a later version adds beside them is free. Where a result is meant to
change, ``python tests/test_oracle.py`` records this machine's anew, and the commit says why.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import PIL
import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("oracle.json")
BASE = "threads=1 precision=fp32 epochs=8 score.window=3 dataset.subset=300 dataset.test_subset=100"
DATA = "dataset.root=data"
STATIC = "noise=sym0.5 pruner.warmup=3 epochs=4"
RUNS = {  # by name, the overrides
    "infobatch das": "pruner=infobatch score=das noise=sym0.5",
    "infobatch loss clean": "pruner=infobatch score=loss noise=clean eval_every=3",
    "seta spearman mask": "pruner=seta score=spearman score.unseen=mask noise=asym0.2",
    "infobatch cosine refresh": "pruner=infobatch score=cosine score.unseen=refresh noise=sym0.8",
    "topk small_loss": "pruner=topk score=small_loss pruner.warmup=2 noise=sym0.5",
    "ucb": "pruner=ucb score=loss",
    "rs2 saved": "pruner=rs2 saved=0.5",
    "seta budget float16": "pruner=seta pruner.budget=0.5 score=das score.bank=float16",
    "elr": "learner=elr score=das",
    "sop": "learner=sop score=das",
    "dividemix": "learner=dividemix learner.warmup=3 pruner=infobatch score=loss",
    "static el2n": f"pruner=static_el2n {STATIC}",
    "static glister": f"pruner=static_glister {STATIC}",
    "static prune4rel": f"pruner=static_prune4rel {STATIC}",
    "pseudo reference": "score=das reference=pseudo_cleanlab reference.size=20 reference.warmup=2 reference.every=2",
    "population reference": "score=das reference=population",
    "smoothed sgd": "recorded=smoothed label_smoothing=0.1 optimizer=lars dataset.flip=true",
    "photographs": f"dataset=tiny_imagenet {DATA} dataset.classes=4 model=small_cnn optimizer=sgd workers=0 "
    "dataset.image_size=16 batch_size=8 dataset.subset=null dataset.test_subset=null",
    "two ranks": "ranks=2 pruner=infobatch score=das model.norm=group",
}


def machine():
    """Return what bits depend on beside the code."""
    file = Path("/proc/cpuinfo")
    facts = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line) if file.exists() else {}
    known = {key.strip(): fact.strip() for key, fact in facts.items()}
    parts = [known.get(key, "") for key in ("model name", "cpu family", "model")] if known else [platform.processor()]
    code = f"torch {torch.__version__}, Pillow {PIL.__version__}"
    return f"{' '.join(parts)}, {torch.backends.cpu.get_cpu_capability()}, {code}"


def results(name, folder):
    """Run what ``RUNS`` names in ``folder``; return a digest of each metric and of each column of the samples."""
    line = [*BASE.split(), *RUNS[name].split()]
    ranks = next((word.split("=")[1] for word in line if word.startswith("ranks=")), None)
    given = dict(word.split("=", 1) for word in line if not word.startswith("ranks="))
    if DATA in line:
        script = REPOSITORY / "scripts" / "make_miniature.py"
        subprocess.run(
            [sys.executable, script, "tiny_imagenet", folder / "data"], check=True, stdout=subprocess.DEVNULL
        )
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [
        sys.executable,
        *several,
        "-m",
        "alignprune_exp.train",
        *(f"{key}={value}" for key, value in given.items()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "results" / "runs").iterdir()
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    keys = [key for key in rows[0] if not key.startswith("seconds")]
    found = {key: json.dumps([row[key] for row in rows]) for key in keys}
    samples = pd.read_parquet(run / "samples.parquet")
    found |= {f"samples {key}": samples[key].to_json(double_precision=15) for key in samples}
    return {key: hashlib.sha256(text.encode()).hexdigest()[:8] for key, text in found.items()}


@pytest.mark.oracle
@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_bits_that_it_gave(tmp_path, name):
    golden = json.loads(GOLDEN.read_text())
    if machine() not in golden:
        pytest.skip(f"no results were recorded on {machine()}; python tests/test_oracle.py records them")
    expected, found = golden[machine()][name], results(name, tmp_path)
    assert {key: found.get(key) for key in expected} == expected


def record():
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[machine()] = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            golden[machine()][name] = results(name, Path(folder))
        print(name, flush=True)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    record()
