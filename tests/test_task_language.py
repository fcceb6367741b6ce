"""The task language: documents, what can be wrong with them, bits per byte, and whole runs on one's own texts."""

import json
import math
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from alignprune_exp.distributed import Processes
from alignprune_exp.setup import open_task
from alignprune_exp.tasks.language import NOTHING, SHORTEST, boilerplate, corrupt, mojibake, passages, shuffled
from harness import METHODS, check_half_corrupted, check_two_as_one, composed, same_bits_when_stopped, samples_of

WORDS = ("time", "is", "an", "illusion", "lunchtime", "doubly", "so", "said", "the", "guide", "to", "galaxies")
TINY = ("task=language", "dataset=text", "threads=1", "task.length=24", "task.vocabulary=300", "model.width=16")
TINY += ("model.layers=1", "model.heads=2", "batch_size=16", "epochs=5", "score.window=3", "dataset.characters=80")
TINY += ("dataset.held_out=0.2", "reference.size=8")


def sentences(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 12)) + f" {row}" for row in range(n)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(120)))
    return file


@pytest.fixture(scope="module")
def task(jsonl):
    return open_task(composed(*TINY, f"dataset.root={jsonl}", "noise=sym", "noise.rate=0.25"))


def held_out(task):
    documents = task.opened()
    return [documents.test[row][1] for row in task.parts.test]


def texts_of(task, targets):
    return [task.tokenizer.decode(row[row != NOTHING].tolist()) for row in targets]


class Uniform(nn.Module):
    """Takes every token for as likely as any other."""

    device = torch.device("cpu")

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    def logits(self, tokens):
        return torch.zeros(*tokens.shape, self.vocabulary)


def test_the_share_asked_for_is_corrupted_and_known(task):
    documents = task.opened()
    assert task.corrupted.sum() == round(0.25 * task.n)
    changed = [given != documents.train[row][1] for given, row in zip(task.texts, task.parts.train, strict=True)]
    assert changed == task.corrupted.tolist()
    assert set(task.columns()["corrupted"]) == {True, False}
    assert not set(task.parts.train) & set(task.parts.reference)
    trusted = [documents.train[row][1] for row in task.parts.reference]
    assert [decoded for _, _, targets in task.reference.evaluation() for decoded in texts_of(task, targets)] == [
        task.tokenizer.decode(encoded.ids[: task.length]) for encoded in task.tokenizer.encode_batch(trusted)
    ]
    assert {place for place, _ in documents.train}.isdisjoint(place for place, _ in documents.test)
    assert task.reference_noise() == 0


@given(st.text(min_size=SHORTEST), st.integers(0, 99))
def test_a_corrupted_text_is_another_one(text, seed):
    assert corrupt(text, np.random.default_rng(seed)).split() != text.split()


def test_texts_of_another_language_take_the_place_of_a_fourth_of_what_is_wrong(tmp_path, jsonl):
    folder = tmp_path / "de"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.txt").write_text(f"Es ist nun einmal so, und das seit {number} Jahren.\n" * 5)
    line = (*TINY, f"dataset.root={jsonl}", "noise=sym", "noise.rate=0.5")
    plain, foreign = open_task(composed(*line)), open_task(composed(*line, f"dataset.foreign={folder}"))
    documents = foreign.opened()
    assert "".join(documents.foreign) == "".join(path.read_text().strip() for path in sorted(folder.iterdir()))
    assert max(map(len, documents.foreign)) <= 80 + SHORTEST
    assert plain.fingerprint != foreign.fingerprint
    assert plain.corrupted.tolist() == foreign.corrupted.tolist()
    wrong = [text for text, corrupted in zip(foreign.texts, foreign.corrupted, strict=True) if corrupted]
    share = np.mean([text in documents.foreign for text in wrong])
    assert abs(share - 1 / 4) < 4 * math.sqrt(3 / 16 / len(wrong))


def test_a_text_of_one_word_does_not_count_as_shuffled():
    text = "word" * SHORTEST + "\n"
    assert all(corrupt(text, np.random.default_rng(seed)).split() != text.split() for seed in range(20))


def test_what_can_be_wrong_is_what_its_name_says():
    text, rng = sentences(1)[0], np.random.default_rng(0)
    assert sorted(shuffled(text, rng).split()) == sorted(text.split())
    assert mojibake(text, rng).encode("utf-16-le")[: len(text) // 2 * 2] == text.encode()[: len(text) // 2 * 2]
    repeated = boilerplate(text * 4, rng)
    period = next(p for p in range(1, len(repeated)) if repeated[p:] == repeated[:-p])
    assert len(repeated) == len(text * 4)
    assert period < 100


@given(st.text(alphabet="ab \n", max_size=300), st.integers(2 * SHORTEST, 100))
def test_passages_together_are_the_text_and_are_cut_behind_white_space(text, most):
    parts = passages(text, most)
    assert "".join(parts) == text
    assert all(SHORTEST <= len(part) <= most + SHORTEST for part in parts) or len(parts) == 1
    for part in parts[:-1]:
        assert part[-1].isspace() or not any(map(str.isspace, part[SHORTEST + 1 :]))


def test_a_document_is_the_bytes_of_its_tokens(task):
    for text, encoded in zip(task.texts, task.tokenizer.encode_batch(task.texts), strict=True):
        assert task.bytes_V[encoded.ids].sum() == len(text.encode())
        assert task.tokenizer.decode(encoded.ids) == text
    for _, inputs, targets in task.train.evaluation():
        assert (inputs[:, 0] == 0).all()
        follows = targets[:, 1:] != NOTHING
        assert torch.equal(inputs[:, 1:][follows], targets[:, :-1][follows])


def test_a_run_says_which_share_of_the_bytes_it_reads(task, jsonl):
    assert task.notes == ()
    short = open_task(composed(*TINY, f"dataset.root={jsonl}", "noise=clean", "task.length=4"))
    for share, texts in (("bytes_read", short.texts), ("bytes_evaluated", held_out(short))):
        read = [encoded.offsets[:4][-1][1] for encoded in short.tokenizer.encode_batch(texts)]
        assert short.facts[share] == pytest.approx(sum(read) / sum(map(len, texts)))  # letters, a byte each
    assert short.facts["bytes_read"] < 0.5
    assert short.notes[0].startswith(f"{short.facts['bytes_read']:.0%} of the documents' bytes are in their first")


def test_the_losses_of_a_batch_are_those_of_its_samples_one_by_one(task):
    torch.manual_seed(0)
    network = task.network()
    _, inputs, targets = next(task.train.evaluation())
    together = task.losses(network(inputs), targets, 0.1)[:2]
    for row in range(len(inputs)):
        log_p = network(inputs[[row]])[0].log_softmax(-1)
        own = [(t, int(token)) for t, token in enumerate(targets[row]) if token != NOTHING]
        plain = -sum(log_p[t, token] for t, token in own) / len(own)
        uniform = -sum(log_p[t].mean() for t, _ in own) / len(own)
        torch.testing.assert_close(together[0][row], plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[1][row], 0.9 * plain + 0.1 * uniform, rtol=1e-4, atol=1e-5)


def test_a_token_is_not_predicted_from_itself_or_what_follows(task):
    torch.manual_seed(0)
    network = task.network()
    tokens = torch.randint(1, 256, (1, 24))
    changed = tokens.clone()
    changed[0, 10:] = torch.randint(1, 256, (14,))
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_the_bits_per_byte_of_a_uniform_model_are_what_theory_says(task):
    tests = task.tests[""]
    vocabulary = task.tokenizer.get_vocab_size()
    found = task.evaluate(Uniform(vocabulary), tests.evaluation(), len(tests), Processes())
    lengths = [encoded.ids[: task.length] for encoded in task.tokenizer.encode_batch(held_out(task))]
    tokens, size = sum(map(len, lengths)), sum(int(task.bytes_V[ids].sum()) for ids in lengths)
    assert math.isclose(found["bits_per_byte"], tokens * math.log2(vocabulary) / size, rel_tol=1e-6)
    assert math.isclose(found["loss"], math.log(vocabulary), rel_tol=1e-6)


@pytest.mark.parametrize("line", METHODS)
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, jsonl, line):
    folder = same_bits_when_stopped(tmp_path, 5, *line, f"dataset.root={jsonl}", base=TINY)
    check_half_corrupted(folder, "bits_per_byte", min)
    assert samples_of(folder)["path"].str.startswith("texts.jsonl#").all()


def test_parquet_and_files_give_the_same_documents(tmp_path):
    texts = [text.replace(" ", "\r\n", 1) for text in sentences(120)]  # as Windows ends a line
    columns = {"dictionary": pa.array(texts).dictionary_encode()}
    columns |= {str(k): pa.array(texts).cast(k) for k in (pa.string(), pa.string_view(), pa.binary(), pa.binary_view())}
    pq.write_table(pa.table(columns), tmp_path / "a.PARQUET")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    for row, text in enumerate(texts):
        file = tmp_path / "folder" / "below" / f"{row:03}.txt"
        file.write_bytes(text.encode("utf-8-sig" if row % 2 else "utf-8"))
    for hidden in (".DS_Store.txt", "below/._000.txt", ".trash/000.txt", ".a.jsonl"):
        (tmp_path / "folder" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "folder" / hidden).write_text("\0 what macOS keeps to itself, or somebody threw away")
    for more in (
        *((f"dataset.root={tmp_path / 'a.PARQUET'}", f"dataset.column={name}") for name in columns),
        (f"dataset.root={tmp_path / 'folder'}",),
    ):
        found = open_task(composed(*TINY, *more)).opened()
        assert sorted(text for part in (found.train, found.test) for _, text in part) == sorted(texts)


def test_the_documentation_of_this_python_is_the_default(tmp_path):
    task = open_task(composed("task=language"))
    assert "pprint.py" in " ".join(place for place, _ in task.opened().train)
    texts = [text for part in (task.opened().train, task.opened().test) for _, text in part]
    assert any("The following sections describe" in text or "statement" in text for text in texts)
    assert len(texts) > 3000
    assert task.fingerprint == open_task(composed("task=language")).fingerprint


def test_a_mistake_in_the_files_is_one_sentence(tmp_path, refused, jsonl):
    line = ["task=language", "dataset=text", f"paths.results={tmp_path / 'none'}"]
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "dataset.root is missing" in refused(*line)
    assert "is not there: type a folder of *.parquet" in refused(*line, f"dataset.root={tmp_path / 'gone'}")
    assert "has no *.parquet" in refused(*line, f"dataset.root={folder}")
    assert "line 1, has no text body, but text" in refused(*line, f"dataset.root={jsonl}", "dataset.column=body")
    (folder / "a.jsonl").write_text('[{"text": "a"}]\n')
    said = refused(*line, f"dataset.root={folder}")
    assert 'a.jsonl, line 1, is [{"text": "a"}] where {"text": …} is wanted: write one a line' in said
    for value in ("3", "false", '["a"]'):
        (folder / "a.jsonl").write_text(f'{{"text": {value}}}\n')
        said = refused(*line, f"dataset.root={folder}")
        assert f"a.jsonl, line 1, has {value} as text, no text: type dataset.column=NAME" in said
    (folder / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert "a.jsonl, line 2, is no JSON" in refused(*line, f"dataset.root={folder}")
    (folder / "a.jsonl").write_text('{"text": "\\ud800 alone"}\n')
    assert "a.jsonl, line 1, is no JSON" in refused(*line, f"dataset.root={folder}")
    (folder / "a.jsonl").write_text(f'{{"text": {"[" * 100_000}\n')
    assert "a.jsonl, line 1, is no JSON (maximum recursion depth" in refused(*line, f"dataset.root={folder}")
    (folder / "b.txt").write_bytes(b"\xff\xfe")
    assert ".jsonl and .txt" in refused(*line, f"dataset.root={folder}")
    assert "b.txt is not UTF-8" in refused(*line, f"dataset.root={folder / 'b.txt'}")
    (folder / "b.txt").write_text("a few words", "utf-16-le")
    said = refused(*line, f"dataset.root={folder / 'b.txt'}")
    assert "b.txt is not UTF-8 (it has zeros, as UTF-16 has): convert it" in said
    (folder / "b.txt").rename(folder / "b.TXT")
    assert ".jsonl and .txt" in refused(*line, f"dataset.root={folder}")
    assert "b.TXT is not UTF-8" in refused(*line, f"dataset.root={folder / 'b.TXT'}")
    (folder / "c.parquet").write_bytes(b"nothing")
    assert "c.parquet cannot be read as Parquet" in refused(*line, f"dataset.root={folder / 'c.parquet'}")
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), folder / "d.parquet")
    root = f"dataset.root={folder / 'd.parquet'}"
    assert "has no column text, but body, n" in refused(*line, root)
    assert "holds int64, no texts" in refused(*line, root, "dataset.column=n")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), folder / "e.parquet")
    said = refused(*line, f"dataset.root={folder / 'e.parquet'}")
    assert "e.parquet has 2 columns text: write it with other names" in said
    assert "has 0 texts of 32 characters or more" in refused(*line, root, "dataset.column=body")
    pq.write_table(pa.table({"text": pa.array([b"\xff"])}), folder / "d.parquet")
    assert "d.parquet holds bytes that are no UTF-8, no texts: type dataset.column=NAME" in refused(*line, root)
    pq.write_table(pa.table({"text": pa.array([b"\xff"]).view(pa.string())}), folder / "d.parquet")
    assert "d.parquet cannot be read as Parquet (" in refused(*line, root)


def test_a_mistake_in_the_texts_of_another_language_is_one_sentence(tmp_path, refused, jsonl):
    line = ["task=language", "dataset=text", f"dataset.root={jsonl}", f"paths.results={tmp_path / 'none'}"]
    folder = tmp_path / "folder"
    folder.mkdir()
    foreign = f"dataset.foreign={folder}"
    assert f"{foreign}/gone is not there" in refused(*line, f"{foreign}/gone")
    (folder / "a.txt").write_text("zu kurz")
    assert f"{foreign} has no text of 32 characters" in refused(*line, foreign)
    (folder / "a.txt").write_text(sentences(1)[0])
    assert f"a.txt of {foreign} is a text of dataset=text too" in refused(*line, foreign)
    (folder / "a.txt").rename(folder / "a.jsonl")
    (folder / "a.jsonl").write_text('{"body": "a"}\n')
    assert "has no text text, but body: type dataset.column=NAME" in refused(*line, foreign)
    python = ["task=language", foreign, f"paths.results={tmp_path / 'none'}"]
    assert "has no text text, but body: call the one that has the texts so" in refused(*python)


def test_a_text_that_comes_twice_is_not_both_trained_on_and_held_out(tmp_path):
    twice = [{"text": text} for text in [*sentences(120), *reversed(sentences(120))]]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*twice, {"text": None}]))
    documents = open_task(composed(*TINY, f"dataset.root={tmp_path / 'twice.jsonl'}")).opened()
    train, test = ([text for _, text in part] for part in (documents.train, documents.test))
    assert not set(train) & set(test)
    assert sorted(train + test) == sorted(2 * sentences(120))
    assert 30 < len(test) < 66
    assert documents.skipped == ["twice.jsonl#241 has 0 characters of the 32 that a document needs"]


def test_what_does_not_go_with_the_task_is_one_sentence(tmp_path, refused, jsonl, monkeypatch):
    line = ["task=language", "dataset=text", f"paths.results={tmp_path / 'none'}"]
    ours = [*line, f"dataset.root={jsonl}"]
    assert "learner=elr needs class labels" in refused(*ours, "learner=elr")
    assert "use score=settled" in refused(*ours, "method=sieve")
    assert "pruner=static_el2n needs class labels" in refused(*ours, "pruner=static_el2n")
    assert "noise=asym: it is of class labels" in refused(*ours, "noise=asym0.2")
    said = refused(*ours, "reference=per_class")
    assert "reference.per_class=true needs class labels, and task=language has none; use reference=trusted" in said
    assert "model=small_cnn does not fit task=language" in refused(*ours, "model=small_cnn")
    assert "cannot be divided among heads=5" in refused(*ours, "model.heads=5")
    assert "dataset=digits is for task=classification; with task=language use dataset=python_docs or text" in refused(
        "task=language", "dataset=digits", f"paths.results={tmp_path / 'none'}"
    )
    assert "model=gpt does not fit task=classification" in refused("model=gpt", ours[-2])
    assert "dataset=text is for task=language" in refused("dataset=text", *ours[2:])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "needs tokenizers; type pip install 'alignprune-exp[tasks]'" in refused(*ours)


def test_the_same_seed_draws_the_same_and_another_one_others(jsonl, task):
    again = open_task(composed(*TINY, f"dataset.root={jsonl}", "noise=sym", "noise.rate=0.25"))
    other = open_task(composed(*TINY, f"dataset.root={jsonl}", "noise=sym", "noise.rate=0.25", "seed=1"))
    assert again.texts == task.texts
    assert other.texts != task.texts
    assert held_out(other) == held_out(task)


def test_two_processes_compute_what_one_computes(tmp_path, nurse, jsonl):
    line = (*TINY, f"dataset.root={jsonl}", "precision=fp32")
    check_two_as_one(tmp_path, nurse, *line, metrics=("test_bits_per_byte",), rel_tol=1e-4)
