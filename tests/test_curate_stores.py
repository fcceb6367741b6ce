"""Curation of what lies in an object store or on a web server: a real S3 API over HTTP, in another process."""

import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignprune_exp import cli
from alignprune_exp.curate import layout
from alignprune_exp.curate.engine import Engine
from alignprune_exp.curate.inspect import list_files, read_file, read_files
from alignprune_exp.errors import Failed
from harness import contents, missing, sentence_of, truncate
from test_curate import (
    LAYOUTS,
    begun,
    check_found,
    curate,
    drawn,
    found,
    lay_out,
    marked,
    outcome,
    stopped,
    write,
    write_reference,
)


def web(bucket, s3_server, name):
    """The address at which anybody reads an object over HTTP."""
    return f"{s3_server}/{bucket.url.removeprefix('s3://')}/{name}"


@pytest.mark.parametrize("how", LAYOUTS)
def test_each_layout_has_the_bits_of_the_folder_on_disk(place, bucket, how):
    ids, losses_NW, reference = drawn(n=150, share=0.1)
    lay_out(how, ids, losses_NW)
    asked = ("--reference", write_reference(reference), "--gaps")
    assert curate("losses", *asked, out="disk") == curate(bucket.copy(), *asked, out="store") == 0
    assert outcome("disk") == outcome("store")
    assert outcome("store")[1]["layout"] == how


def test_checkpoints_in_folders_that_name_them_and_in_buckets_have_the_bits_of_the_disk(place, bucket, monkeypatch):
    monkeypatch.setattr(layout, "SLACK", 2000)  # so that several buckets are needed
    ids, losses_NW, reference = drawn()
    for k in range(6):
        order = np.random.default_rng(k).permutation(len(ids))
        write(Path(f"losses/step={k}/0.parquet"), doc=ids[order], nll=losses_NW[order, k])
    Path("reference.csv").write_text("step,nll\n" + "".join(f"{k},{loss}\n" for k, loss in enumerate(reference)))
    asked = ("--reference", "reference.csv", "--columns", "doc,step,nll", "--memory", "100MB", "--threads", "1")
    assert curate("losses", *asked, out="disk") == curate(bucket.copy(), *asked, out="store") == 0
    assert outcome("disk") == outcome("store")
    assert outcome("store")[1]["layout"] == "buckets"
    assert len(outcome("store")[0]) > 1
    check_found("das", ids, losses_NW, reference, 0.6, out="store")


@pytest.mark.parametrize("pattern", ["losses/*/[02].parquet*", "**/0.parquet", "losses/at?/*"])
def test_a_pattern_means_what_it_means_on_disk(place, bucket, pattern):
    ids, losses_NW, _ = drawn(n=150)
    lay_out("checkpoints", ids, losses_NW, files=3)
    write(Path("losses/at0/0.parquet.old/0.txt"), x=[1])
    bucket.copy()
    on_disk = list_files(Engine(place / "spill", threads=1), pattern)
    in_store = list_files(Engine(place / "spill", threads=1), f"{bucket.url}/{pattern}")
    assert [f"{bucket.url}/{path}" for path in on_disk] == list(in_store)
    assert [stamp.split()[0] for stamp in on_disk.values()] == [stamp.split()[0] for stamp in in_store.values()]
    assert len(on_disk) == (12 if "[" in pattern else 6 if "**" in pattern else 18)


def test_names_with_what_is_a_pattern_elsewhere_are_names(place, bucket):
    ids, losses_NW, reference = drawn()
    asked = ("--reference", write_reference(reference))
    names = ["a[1].parquet", "a1.parquet", "b?.parquet", "b1.parquet", "it's 100 %#+&=ü.parquet", "c{x,y}.parquet"]
    for name, share in zip(names, np.array_split(np.arange(len(ids)), len(names)), strict=True):
        write(Path("losses") / name, id=ids[share], losses=list(losses_NW[share]))
    assert curate(bucket.copy(), *asked) == 0
    check_found("das", ids, losses_NW, reference, 0.6)
    assert sorted(path.name for path in Path("keep/scores").iterdir()) == sorted(names)
    assert curate(f"{bucket.url}/losses/{names[0]}", *asked, out="one") == 0
    assert found("one")[1]["samples"] == found("one")[1]["losses_rows"] == len(ids) // len(names) + 1


def test_a_file_on_a_web_server_has_the_bits_of_the_disk(place, bucket, s3_server):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    bucket.copy(acl="public-read")
    asked = ("--reference", write_reference(reference))
    assert curate("losses/1.parquet", *asked, out="disk") == 0
    assert curate(web(bucket, s3_server, "losses/1.parquet"), *asked, out="web") == 0
    assert outcome("disk") == outcome("web")


# ---- going on --------------------------------------------------------------------------------------------------------


def test_a_signal_stops_it_and_the_same_command_goes_on(place, bucket):
    ids, losses_NW, reference = drawn(n=6000)
    lay_out("rows", ids, losses_NW, files=12)
    asked = [bucket.copy(), "--reference", write_reference(reference), "--threads", "1"]
    before = marked(stopped(asked)[0])
    assert curate(*asked) == 0
    table, _ = found()
    mine = np.isin(table["id"], before)
    assert (table["score"][mine] == 0.125).all()
    assert (table["score"][~mine] != 0.125).any()
    assert table["id"].tolist() == ids.tolist()


def test_what_the_store_fails_to_give_stops_it_whatever_may_be_skipped_and_it_goes_on(place, bucket):
    ids, losses_NW, reference = drawn(n=6000)
    lay_out("rows", ids, losses_NW, files=12)
    asked = ["--reference", write_reference(reference), "--threads", "1", "--on-error", "skip"]
    running, _ = begun([bucket.copy(), *asked], "store")
    bucket.delete("losses/9.parquet")
    _, said = running.communicate(timeout=30)
    assert running.returncode == 1
    assert not missing([f"{bucket.url}/losses/9.parquet", "the same command goes on"], sentence_of(said))
    assert not Path("store/scores").exists()
    assert curate(bucket.copy("losses"), *asked, out="store") == curate("losses", *asked, out="disk") == 0
    assert outcome("store") == outcome("disk")


@pytest.mark.parametrize("where", ["store", "web"])
def test_an_object_that_changed_is_scored_again_though_it_is_as_large(place, bucket, s3_server, where):
    ids, losses_NW, reference = drawn()
    losses = bucket.copy("losses") if where == "store" else web(bucket, s3_server, "losses/0.parquet")
    asked = (losses, "--reference", write_reference(reference))
    sizes = []
    for keep, status in ((1e-9, 2), (0.6, 0)):  # the first scores all, and then keeps none
        losses_NW = losses_NW[::-1]
        Path("losses").mkdir(exist_ok=True)
        table = pa.table({"id": ids, "losses": list(losses_NW)})
        pq.write_table(table, "losses/0.parquet", use_dictionary=False, compression="none", write_statistics=False)
        sizes.append(Path("losses/0.parquet").stat().st_size)
        bucket.copy(acl="public-read")
        assert curate(*asked, keep=keep) == status
    assert sizes[0] == sizes[1]
    check_found("das", ids, losses_NW, reference, 0.6)


@pytest.mark.parametrize("listed", ["in a folder", "alone"])
@pytest.mark.parametrize("now", ["another", "gone"])
def test_an_object_that_is_another_once_it_was_listed_stops_it_and_is_never_skipped(place, bucket, listed, now):
    ids, losses_NW, _ = drawn()
    lay_out("rows", ids, losses_NW, files=1)
    losses = bucket.copy() if listed == "in a folder" else bucket.copy("losses/0.parquet")
    engine = Engine(place / "spill", threads=1)
    stamps = list_files(engine, losses)
    ((path, stamp),) = stamps.items()
    file = read_file(engine, losses, path, stamp, None)
    if now == "gone":
        bucket.delete("losses/0.parquet")
    else:
        lay_out("rows", ids, losses_NW[::-1], files=1)
        bucket.copy()
    said = rf"{path} cannot be read \(.*(Expired|has changed|NotFound).*; once that is mended, the same command goes on"
    with pytest.raises(Failed, match=said):
        engine.write(f"FROM '{path}'", place / "written.parquet", [file])
    with pytest.raises(Failed, match=said):
        read_files(engine, losses, stamps, None, skip=True)


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def test_objects_that_are_truncated_or_damaged_are_named_and_left_out_as_on_disk(place, bucket, capsys):
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW, files=4)
    truncate(Path("losses/1.parquet"))
    chunk = pq.ParquetFile("losses/3.parquet").metadata.row_group(1).column(1)
    damaged = bytearray(Path("losses/3.parquet").read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged[start : start + 40] = b"\xff" * 40
    Path("losses/3.parquet").write_bytes(damaged)
    asked = (bucket.copy(), "--reference", write_reference(reference))
    assert curate(*asked) == 2
    said = sentence_of(capsys.readouterr().err)
    assert not missing([f"{bucket.url}/losses/1.parquet cannot be read", "--on-error skip"], said)
    assert not Path("keep").exists()
    assert curate(*asked, "--on-error", "skip", out="store") == 0
    assert curate("losses", *asked[1:], "--on-error", "skip", out="disk") == 0
    (written, disk), (rewritten, store) = outcome("disk"), outcome("store", bucket.url)
    assert written == rewritten
    assert [(each["file"], each["row_group"]) for each in store["skipped"]] == [
        ("losses/1.parquet", None),
        ("losses/3.parquet", 1),
    ]
    assert {**disk, "skipped": []} == {**store, "skipped": []}
    bucket.delete("losses/1.parquet")
    capsys.readouterr()
    assert curate(*asked, out="stopped") == 2
    said = sentence_of(capsys.readouterr().err)
    assert not missing([f"{bucket.url}/losses/3.parquet, row group 1, cannot be read", "--on-error skip"], said)


@pytest.mark.parametrize(
    ("losses", "environment", "words"),
    [
        ("s3://no-such-bucket/losses", {}, "s3://no-such-bucket/losses bucket does not exist"),
        ("{bucket}/no/such", {}, "{bucket}/no/such no Parquet file"),
        ("{bucket}/no.parquet", {}, "{bucket}/no.parquet no Parquet file"),
        ("{bucket}/losses", {"AWS_ACCESS_KEY_ID": ""}, "{bucket}/losses credentials AWS_PROFILE"),
        ("{bucket}/losses", {"AWS_PROFILE": "nobody"}, "{bucket}/losses nobody environment"),
        ("{server}/losses", {}, "{server}/losses lists no files .parquet"),
        ("{server}/*.parquet", {}, "{server}/*.parquet lists no files .parquet"),
        ("{server}/no-such-bucket/0.parquet", {}, "{server}/no-such-bucket/0.parquet no Parquet file"),
        (
            "{server}/{name}/losses/0.parquet",
            {},
            "{server}/{name}/losses/0.parquet FORBIDDEN credentials",
        ),
        ("http://127.0.0.1:1/0.parquet", {}, "http://127.0.0.1:1/0.parquet cannot be read"),
        ("nfs://losses", {}, "nfs:// no store s3://"),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value and " " not in value else "",
)
def test_a_store_that_does_not_answer_as_it_should_gets_one_sentence(
    place, bucket, s3_server, monkeypatch, capsys, losses, environment, words
):
    names = {"bucket": bucket.url, "server": s3_server, "name": bucket.url.removeprefix("s3://")}
    ids, losses_NW, reference = drawn()
    lay_out("rows", ids, losses_NW)
    bucket.copy()
    write_reference(reference)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = contents(place)
    asked = [losses.format(**names), "--reference", "reference.parquet", "--keep", "0.5", "-o", "keep"]
    assert cli.main(["curate", *asked]) == 2
    said = capsys.readouterr()
    assert not missing(words.format(**names), sentence_of(said.err))
    assert said.out == ""
    assert contents(place) == before


class Plain(SimpleHTTPRequestHandler):
    """A web server that always sends the whole file."""

    def log_message(self, *_):
        pass


class Timeless(Plain):
    """One that does not say when a file was changed, either."""

    def send_header(self, name, value):
        if name != "Last-Modified":
            super().send_header(name, value)


@pytest.mark.parametrize(("handler", "status", "words"), [(Plain, 1, "range requests"), (Timeless, 2, "ETag download")])
def test_a_web_server_that_sends_too_little_is_refused(place, capsys, handler, status, words):
    ids, losses_NW, _ = drawn()
    lay_out("rows", ids, losses_NW)
    before = contents(place)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/losses/0.parquet"
        assert curate(address, "--score", "settled") == status
        server.shutdown()
    assert not missing([address, *words.split()], sentence_of(capsys.readouterr().err))
    assert contents(place) == before


@pytest.mark.parametrize(
    ("losses", "package", "extra"),
    [
        ("s3://a/b", "s3fs", "s3"),
        ("https://a/b.parquet", "aiohttp", "s3"),
        ("gs://a/b", "gcsfs", "gcs"),
        ("az://a/b", "adlfs", "azure"),
    ],
)
def test_without_the_library_it_says_what_to_install(place, losses, package, extra):
    code = f"import sys; sys.modules['{package}'] = None; from alignprune_exp.cli import main; sys.exit(main())"
    asked = ["curate", losses, "--score", "settled", "--keep", "0.5", "-o", "keep"]
    done = subprocess.run([sys.executable, "-c", code, *asked], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(rf"pip install 'alignprune-exp\[{extra}\]'$", sentence_of(done.stderr))
    assert contents(place) == {}
