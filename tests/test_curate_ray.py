"""Curation on a Ray cluster of several nodes: the bits of one machine, whatever dies; and what can be wrong."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from alignprune_exp.curate import layout
from alignprune_exp.curate.engine import Engine
from alignprune_exp.curate.inspect import list_files, read_files
from alignprune_exp.errors import Failed, UsageError
from harness import contents, missing, sentence_of, truncate
from test_curate import LAYOUTS, curate, drawn, lay_out, marked, outcome, stopped, write_reference

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def nodes():
    """A cluster of a head and two nodes that have a processor each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def on(nodes, *arguments):
    return "--engine", "ray", "--ray-address", nodes.address, *arguments


@pytest.mark.parametrize("how", LAYOUTS)
def test_each_layout_has_the_bits_of_one_machine(place, nodes, monkeypatch, how):
    ids, losses_NW, reference = drawn(n=60_000, share=0.1)
    losses = lay_out(how, ids, losses_NW, files=4)
    asked = (losses, "--reference", write_reference(reference), "--gaps", "--memory", "24MB", "--threads", "1")
    monkeypatch.setattr(layout, "BATCH", 10_000)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    assert curate(*asked, out="one") == curate(*asked, "--engine", "ray", out="many") == 0
    assert outcome("one") == outcome("many")
    assert outcome("one")[1]["layout"] == how
    assert len(outcome("one")[0]) > 1
    assert sorted(path.name for path in Path("many").iterdir()) == ["scores", "summary.json"]


def tasks():
    """The workers of this process's nodes that are at a part."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::_do"):
                found.append(process)
    return found


def held():
    """Stop a worker in the midst of a part, so that it stays there; return it."""
    while True:
        for process in tasks():
            process.suspend()
            time.sleep(0.1)
            if process in tasks():
                return process
            process.resume()


def stopped_with_its_workers(asked, nodes):
    """Stop the command by a signal once a part is scored, while others end; return the parts that are."""
    scored = stopped([*asked, *on(nodes)])
    for _ in range(1000):
        if not tasks():
            return scored
        time.sleep(0.01)
    raise AssertionError(f"workers are left: {tasks()}")


@pytest.mark.parametrize("dies", ["worker", "node"])
def test_a_part_whose_worker_or_node_dies_is_scored_again(place, nodes, dies):
    ids, losses_NW, reference = drawn(n=400_000)
    lay_out("rows", ids, losses_NW, files=8)
    asked = ["losses", "--reference", write_reference(reference), "--threads", "1"]
    assert curate(*asked, out="one") == 0
    line = [sys.executable, "-m", "alignprune_exp.curate", *asked, "--keep", "0.6", "-o", "keep", *on(nodes)]
    running = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    worker = held()
    assert running.poll() is None
    assert not Path("keep/scores").exists()
    if dies == "worker":
        os.kill(worker.pid, signal.SIGKILL)
    else:
        raylet = worker.parent()
        (node,) = (each for each in nodes.worker_nodes if each.all_processes["raylet"][0].process.pid == raylet.pid)
        workers = raylet.children(recursive=True)
        nodes.remove_node(node, allow_graceful=False)
        for each in workers:  # one that is stopped outlives its node, where Ray waits for it
            with suppress(psutil.NoSuchProcess):
                each.kill()
        nodes.add_node(num_cpus=1)
    _, said = running.communicate(timeout=300)
    assert (running.returncode, said) == (0, "")
    assert outcome("keep") == outcome("one")
    assert not worker.is_running()


def test_a_signal_stops_it_and_any_engine_goes_on_from_what_is_scored(place, nodes):
    ids, losses_NW, reference = drawn(n=200_000)
    losses = str(Path(lay_out("rows", ids, losses_NW, files=16)).absolute())
    asked = [losses, "--reference", write_reference(reference), "--threads", "1"]
    scored = stopped_with_its_workers(asked, nodes)
    before = marked(scored[0])
    assert curate(*asked) == 0
    table = pq.read_table("keep/scores").to_pandas().set_index("id")
    assert (table.loc[before, "score"] == 0.125).all()
    assert len(table) == len(ids)


def test_it_is_stopped_in_the_same_way_each_time(place, nodes):
    ids, losses_NW, reference = drawn(n=100_000)
    losses = str(Path(lay_out("rows", ids, losses_NW, files=16)).absolute())
    asked = [losses, "--reference", write_reference(reference), "--threads", "1"]
    for _ in range(8):  # Ray's own way to cancel a task crashed one time in four
        stopped_with_its_workers(asked, nodes)
        shutil.rmtree("keep")


def test_files_that_cannot_be_read_are_left_out_alike(place, nodes, capsys):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW, files=4)
    for number in (1, 3):
        column = pq.ParquetFile(f"losses/{number}.parquet").metadata.row_group(1).column(1)
        damaged = bytearray(Path(f"losses/{number}.parquet").read_bytes())
        start = column.dictionary_page_offset or column.data_page_offset
        damaged[start : start + 40] = b"\xff" * 40
        Path(f"losses/{number}.parquet").write_bytes(damaged)
    truncate(Path("losses/2.parquet"))
    asked = ("losses", "--reference", write_reference(reference))
    assert curate(*asked, "--on-error", "skip", out="one") == 0
    assert curate(*asked, "--on-error", "skip", *on(nodes), out="many") == 0
    (written, one), (rewritten, many) = outcome("one"), outcome("many")
    assert written == rewritten
    assert len(one["skipped"]) == 3
    assert sorted(map(str, one.pop("skipped"))) == sorted(map(str, many.pop("skipped")))
    assert one == many
    Path("losses/2.parquet").unlink()
    capsys.readouterr()
    assert curate(*asked, *on(nodes), out="stopped") == 2
    assert not missing(["parquet, row group 1", "--on-error skip"], sentence_of(capsys.readouterr().err))


def test_checkpoints_in_different_orders_are_divided_instead(place, nodes):
    ids, losses_NW, reference = drawn()
    lay_out("checkpoints", ids, losses_NW)
    table = pq.read_table("losses/at3/1.parquet")
    pq.write_table(table.take(np.r_[np.arange(len(table) - 2), len(table) - 1, len(table) - 2]), "losses/at3/1.parquet")
    asked = ("losses", "--reference", write_reference(reference), "--threads", "1")
    assert curate(*asked, out="one") == curate(*asked, *on(nodes), out="many") == 0
    assert outcome("one") == outcome("many")
    assert outcome("many")[1]["layout"] == "buckets"


@pytest.fixture
def few(bucket):
    """A cluster of a head and a node that has a processor, in the environment that there is now."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()


def test_an_object_store_has_the_bits_of_the_disk_on_a_cluster_too(place, bucket, few, monkeypatch):
    monkeypatch.setattr(layout, "SLACK", 1000)
    monkeypatch.setattr(layout, "BATCH", 1000)
    ids, losses_NW, reference = drawn(n=1000)
    asked = ("--reference", write_reference(reference), "--threads", "1", "--memory", "100MB")
    for how in ("rows", "buckets"):
        losses = lay_out(how, ids, losses_NW, files=3, folder=Path(how))
        Path(f"{how}/0.parquet").rename(f"{how}/0[1].parquet")
        assert curate(losses, *asked, out=f"{how}-disk") == 0
        assert curate(bucket.copy(losses), *asked, *on(few), out=f"{how}-store") == 0
        assert outcome(f"{how}-disk") == outcome(f"{how}-store")
        assert outcome(f"{how}-store")[1]["layout"] == how
        assert len(outcome(f"{how}-store")[0]) > 1


def test_a_node_without_credentials_for_an_object_store_is_named(place, bucket, few, capsys):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    asked = ("--reference", write_reference(reference), *on(few))
    with_credentials = few.worker_nodes.copy()
    few.add_node(num_cpus=1, env_vars={"AWS_ACCESS_KEY_ID": ""})
    for node in with_credentials:
        few.remove_node(node)
    assert curate(bucket.copy(), *asked) == 2
    said = sentence_of(capsys.readouterr().err)
    assert not missing(["node ", f"{bucket.url}/losses/", "credentials", "AWS_PROFILE"], said)
    assert not Path("keep").exists()


# ---- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def joined(place, nodes):
    """The cluster, a part for it, and the engine of this machine."""
    from alignprune_exp.curate import cluster

    ids, losses_NW, _ = drawn()
    losses = Path(lay_out("rows", ids, losses_NW, files=1)).absolute()
    engine = Engine(place / "spill", threads=1)
    ((file,), _, _) = read_files(engine, str(losses), list_files(engine, str(losses)), None, False)
    with cluster.joined(nodes.address, place / "keep/.work", None, 1) as lent:
        yield lent, layout.Part("0.parquet", (file,), "SELECT 1")


def done(lent, part, work=lambda engine, part: part.name):
    return list(lent.each(work, [part], alone=True))


def test_a_node_that_sees_other_files_or_another_folder_says_so(joined, place):
    lent, part = joined
    assert done(lent, part) == ["0.parquet"]
    (file,) = part.files
    with pytest.raises(UsageError, match=f"node .* has another {file.path}; put"):
        done(lent, replace(part, files=(replace(file, stamp="1 2"),)))
    with pytest.raises(UsageError, match=r"node .* does not see /nowhere/0\.parquet; put"):
        done(lent, replace(part, files=(replace(file, path="/nowhere/0.parquet"),)))
    next((place / "keep/.work").glob("seen-*")).unlink()
    with pytest.raises(UsageError, match=f"node .* does not see {place}/keep; name"):
        done(lent, part)


def test_a_part_at_which_workers_die_each_time_is_given_up(joined):
    lent, part = joined

    def dies(engine, part):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(Failed, match=r"died 4 times at 0.parquet .* --memory .* the same command goes on"):
        done(lent, part, dies)


def test_a_bug_in_a_worker_is_what_it_is(joined):
    with pytest.raises(ZeroDivisionError):
        done(*joined, work=lambda engine, part: 1 / 0)


def test_nodes_with_other_versions_are_named(place, nodes, monkeypatch, capsys):
    from alignprune_exp.curate import cluster

    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    asked = ("losses", "--reference", write_reference(reference))
    monkeypatch.setattr(cluster, "VERSIONS", {**cluster.VERSIONS, "duckdb": "99.0"})
    assert curate(*asked, *on(nodes)) == 2
    assert not missing(["node ", "has duckdb", ", not 99.0", "install"], sentence_of(capsys.readouterr().err))
    assert not Path("keep").exists()


def test_a_node_with_an_older_package_is_named(place, capsys):
    from ray.cluster_utils import Cluster

    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    Path("old/alignprune_exp").mkdir(parents=True)
    Path("old/alignprune_exp/__init__.py").write_text("__version__ = '0.0.1'\n")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        old = nodes.add_node(num_cpus=1, env_vars={"PYTHONPATH": str(Path("old").absolute())})
        assert curate("losses", "--reference", write_reference(reference), *on(nodes)) == 2
    finally:
        nodes.shutdown()
    said = sentence_of(capsys.readouterr().err)
    assert not missing([f"node {old.node_ip_address} ", "alignprune_exp.curate", "install the same"], said)
    assert not Path("keep").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threads", "64"), "64 processors --threads --memory"),
        (("--threads", "9999999"), "9999999 processors --threads --memory"),
        (("--memory", "800GB"), "1e+03 GB 1 processors --threads --memory"),
        (("--ray-address", "127.0.0.1:1"), "127.0.0.1:1 answers HOST:PORT"),
        (("--ray-address", "nowhere"), "nowhere HOST:PORT"),
    ],
    ids=" ".join,
)
def test_a_cluster_that_is_not_there_or_too_small_gets_one_sentence(place, nodes, capsys, monkeypatch, options, words):
    from alignprune_exp.curate import cluster

    monkeypatch.setattr(cluster, "PATIENCE", 10)
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    write_reference(reference)
    before = contents(place)
    assert curate("losses", "--reference", "reference.parquet", *on(nodes, *options)) == 2
    assert not missing(words, sentence_of(capsys.readouterr().err))
    assert contents(place) == before


def test_without_an_address_a_cluster_is_started_here_and_said_to_be(place, monkeypatch, capsys):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    asked = ("losses", "--reference", write_reference(reference), "--threads", "1")
    assert curate(*asked, "--engine", "ray", out="many") == 0
    assert not missing("--ray-address RAY_ADDRESS started here processors", capsys.readouterr().out)
    assert curate(*asked, out="one") == 0
    assert outcome("one") == outcome("many")
