"""What tests of whole runs share: a run in this process, what it leaves, and ways to stop it."""

import io
import json
import math
import os
import signal
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from alignprune_exp.commandline import checked, config_dir
from alignprune_exp.config import identity
from alignprune_exp.errors import Stopped
from alignprune_exp.learners.ce import CrossEntropy
from alignprune_exp.pruning import DynamicPruning
from alignprune_exp.run import Run
from alignprune_exp.runs import CHECKPOINTS, RunFolder, run_folders, run_id
from alignprune_exp.sweep import Job
from alignprune_exp.train import perform

CONF = config_dir()
EPOCHS, WINDOW = 12, 3
SMALL = ("threads=1", f"epochs={EPOCHS}", f"score.window={WINDOW}", "dataset.subset=300", "dataset.test_subset=100")
SMALL += ("checkpoint_seconds=0",)
FINGERPRINT = "0" * 64  # of data that nobody reads
MEASURED = ("seconds", "samples_per_second", "finished_at", "commit")  # of a summary, by their beginnings


@cache
def composed(*overrides):
    """The checked config that overrides choose."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(compose("train", list(overrides)))


def id_of(config, fingerprint=FINGERPRINT, processes=1):
    """The id of a run of ``config``, of data with that fingerprint, in so many processes."""
    return run_id(identity(config, fingerprint, processes))


def ids_of(*lines):
    """The ids of the runs that some command lines choose."""
    return [id_of(composed(*line.split())) for line in lines]


def config_of(results, *overrides, base=SMALL):
    """The config that overrides choose, with its results in a folder."""
    config = composed(*base, *overrides)
    return config.model_copy(update={"paths": config.paths.model_copy(update={"results": str(results)})})


def launch(results, *overrides, base=SMALL):
    """Do what the command line does once Hydra has composed its config; return the exit status."""
    line = (*base, *overrides)
    return perform(lambda: Job(None, line, config_of(results, *overrides, base=base), None))


def trained(one):
    """Train a run, or go on with it; return its folder."""
    folder = RunFolder(Path(one.setup.config.paths.results), one.setup.id)
    with folder.claim():
        one.train(folder, "test")
    return folder.path


# What a run leaves


def only_run(results):
    """The folder of the one run that there is, beside those that were set aside."""
    (folder,) = run_folders(Path(results))
    return folder


def rows_of(folder):
    """Each epoch's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics_of(folder):
    """Each epoch's metrics, but for the seconds."""
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows_of(folder)]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def environment_of(folder):
    return json.loads((folder / "environment.json").read_text())


def samples_of(folder):
    return pd.read_parquet(folder / "samples.parquet")


def assert_same_results(folder, other):
    """All that a run computes is equal, bit by bit."""
    assert metrics_of(folder) == metrics_of(other)
    for name in ("dynamics.parquet", "samples.parquet"):
        frames = [pd.read_parquet(f / name) for f in (folder, other)]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    summaries = [{k: v for k, v in summary_of(f).items() if not k.startswith(MEASURED)} for f in (folder, other)]
    assert summaries[0] == summaries[1]


def contents(folder):
    """The bytes of each file below a folder; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def checkpoints(folder):
    """The checkpoints of a run folder, latest first."""
    paths = [folder / name for name in CHECKPOINTS if (folder / name).exists()]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def checkpoint_of(folder):
    return torch.load(checkpoints(folder)[0], weights_only=True)


class Bucket:
    """A bucket of the S3 server that the environment names."""

    def __init__(self, name):
        import boto3

        self.url, self._name, self._client = f"s3://{name}", name, boto3.client("s3")
        self._client.create_bucket(Bucket=name)

    def copy(self, folder="losses", acl="private"):
        """Copy what is below a folder, or a file, under the same name; return where it is now."""
        for path in [Path(folder), *Path(folder).rglob("*")]:
            if path.is_file():
                self._client.upload_file(str(path), self._name, str(path), ExtraArgs={"ACL": acl})
        return f"{self.url}/{folder}"

    def delete(self, name):
        self._client.delete_object(Bucket=self._name, Key=name)


# What the command line says


def sentence_of(error):
    """The one sentence that an error output consists of."""
    assert len(error.splitlines()) == 1, error
    assert len(error) > 10
    assert "Traceback" not in error
    return error.strip()


def missing(words, text):
    """Those of the words that a text does not have."""
    return [word for word in (words.split() if isinstance(words, str) else words) if word not in text]


# Ways to stop


class Stop:
    """Asks a run to stop after a chosen number of its training steps, as a signal would."""

    def __init__(self):
        self.steps = []  # the epoch and the number of samples of each step

    def run(self, config, steps=None):
        """Go on with the run of ``config``; return whether it was stopped."""
        before, observe = len(self.steps), DynamicPruning.observe

        def counted(pruning, index, *args, **kwargs):
            self.steps.append((pruning.epoch, len(index)))
            if len(self.steps) - before == steps:
                signal.raise_signal(signal.SIGTERM)
            return observe(pruning, index, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DynamicPruning, "observe", counted)
            try:
                trained(Run(config))
            except Stopped:
                return True
        return False


def same_bits_when_stopped(tmp_path, steps, *line, base):
    """The folder of a run, which was also stopped every ``steps`` steps and came to the same."""
    assert launch(tmp_path / "whole", *line, base=base) == 0
    stop, config = Stop(), config_of(tmp_path / "parts", *line, base=base)
    while stop.run(config, steps):
        pass
    folder = only_run(tmp_path / "whole")
    assert_same_results(only_run(tmp_path / "parts"), folder)
    return folder


# That runs of every task without class labels are stopped in.
METHODS = [("score=das",), ("pruner=rs2", "saved=0.5"), ("method=sieve_settled", "pruner.warmup=2")]


def check_half_corrupted(folder, metric, best=max):
    """The record of a run without class labels, half of whose samples are corrupted, judged by ``metric``."""
    summary, rows, corrupted = summary_of(folder), rows_of(folder), samples_of(folder)["corrupted"]
    assert summary["headline_name"] == metric
    assert summary[f"test_{metric}_best"] == best(row[f"test_{metric}"] for row in rows)
    assert 0 < summary["kept_noise_mean"] < 1
    assert all(0 <= row["auroc_settled"] <= 1 for row in rows)
    assert corrupted.mean() == summary["noise_rate"] == pytest.approx(0.5, abs=0.01)


def check_two_as_one(tmp_path, nurse, *line, metrics=(), **close):
    """Two processes run what one runs: they select the same, and come as close to its losses and ``metrics``."""
    nurse.start(*[[*line, f"paths.results={tmp_path / 'two'}"]] * 2, together=True)
    assert nurse.ended() == [0, 0], nurse.said
    assert launch(tmp_path / "one", base=line) == 0
    two, one = (only_run(tmp_path / name) for name in ("two", "one"))
    assert two.name == one.name
    for ours, theirs in zip(rows_of(two)[:3], rows_of(one)[:3], strict=True):
        assert ours["kept_noise"] == theirs["kept_noise"]
        for key in ("train_loss", "test_loss", "reference_loss", *metrics):
            assert math.isclose(ours[key], theirs[key], **close)


def before_the_second_step(monkeypatch, epoch, happens):
    """Let something happen before the second step of an epoch."""
    losses = CrossEntropy.losses

    def disturbed(self, step, forward):
        if (step.epoch, step.number) == (epoch, 1):
            happens()
        return losses(self, step, forward)

    monkeypatch.setattr(CrossEntropy, "losses", disturbed)


def truncate(path):
    """Cut a file to half of its length, keeping its time, as a crashed disk would."""
    times = path.stat()
    path.write_bytes(path.read_bytes()[: times.st_size // 2])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def through_disk(state):
    """A state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
