"""Hypothesis finds the same examples in every run, and is never flaky for a slow machine's sake."""

import sys
from functools import cache

import pytest
import torch
from hypothesis import settings

from alignprune_exp.train import main
from harness import SMALL, contents, launch, only_run, sentence_of
from nursery import Nursery

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # what is small is not done faster by more


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a run that nothing disturbed, by its overrides; for reading alone."""

    @cache
    def folder(*overrides, base=SMALL):
        results = tmp_path_factory.mktemp("undisturbed")
        assert launch(results, *overrides, base=base) == 0
        return only_run(results)

    return folder


@pytest.fixture(scope="session")
def nurse(tmp_path_factory):
    nurse = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nurse
    nurse.close()


@pytest.fixture
def refused(tmp_path, capsys):
    """Type a command line that is a mistake; return the one sentence that it gets, with no file written."""

    def typed(*line):
        before = contents(tmp_path)
        capsys.readouterr()
        assert main([*map(str, line)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert contents(tmp_path) == before
        return sentence_of(said.err)

    return typed
