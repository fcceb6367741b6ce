"""What tests share: several processes over gloo, and a Hypothesis that finds the same examples in every run."""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import distributed as dist

import alignprune_exp
from alignprune_exp.train import main
from harness import SMALL, Bucket, contents, launch, only_run, sentence_of
from nursery import Nursery

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")
torch.set_num_threads(1)  # what is small is not done faster by more


def pytest_configure(config):
    if "cuda" not in config.getoption("-m"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The address of a server of the S3 API, which is a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (tmp_path_factory.mktemp("s3") / "log").open("w") as log, subprocess.Popen(line, stdout=log, stderr=log) as it:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert it.poll() is None, "the S3 server ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        it.kill()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """A new bucket of that server, for which the environment has address and credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    environment = {"ENDPOINT_URL": s3_server, "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "REGION": "us-east-1"}
    nothing_else = {"CONFIG_FILE": os.devnull, "SHARED_CREDENTIALS_FILE": os.devnull, "EC2_METADATA_DISABLED": "true"}
    for name, value in {**environment, **nothing_else, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    return Bucket(f"bucket-{time.monotonic_ns()}")


SERVER = multiprocessing.get_context("forkserver")
LIMIT = 60  # seconds, after which a process counts as hung


def _work(work, rank, size, store, said, timeout, arguments):
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    os.environ |= {name: str(number) for name, number in numbers.items()}  # as torchrun says it
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "none"}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        said.send(work(rank, *arguments))
    except (ValueError, RuntimeError) as error:
        said.send(error)
    time.sleep(0 if rank else 0.2)  # the store is rank 0's


@pytest.fixture
def together(tmp_path):
    """Call ``work(rank, *arguments)`` in so many processes; return what each returned or raised, None if it died."""

    SERVER.set_forkserver_preload(
        ["pytest", "pandas", "torch._dynamo", "torch.nn.parallel", "torch.utils.data", "alignprune_exp.pruning.dynamic"]
        + ["torch.distributed.fsdp", "torch.distributed.tensor.parallel"]
        + [name for name in ("lightning.pytorch", "accelerate", "transformers.trainer") if name in sys.modules]
    )

    def call(size, work, *arguments, timeout=30):
        store = tmp_path / f"store{time.monotonic_ns()}"
        started = []
        for rank in range(size):
            here, there = SERVER.Pipe(duplex=False)
            process = SERVER.Process(target=_work, args=(work, rank, size, store, there, timeout, arguments))
            process.start()
            there.close()
            started.append((process, here))
        found = []
        for process, here in started:
            try:
                assert here.poll(LIMIT), f"{work.__name__} hangs"
                found.append(here.recv())
            except EOFError:
                found.append(None)
            finally:
                process.join(5)
                process.kill()
        return found

    return call


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_the_readme():
    """Run the Python blocks of a section of the frameworks' README, in the namespace given."""

    def run(heading, namespace):
        text = (Path(alignprune_exp.__file__).parent / "frameworks" / "README.md").read_text()
        (section,) = (part for part in text.split("\n## ")[1:] if part.startswith(heading + "\n"))
        blocks = re.findall(r"```python\n(.*?)```", section, re.S)
        assert blocks
        for block in blocks:
            exec(block, namespace)
        return namespace

    return run
