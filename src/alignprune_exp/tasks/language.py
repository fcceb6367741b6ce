"""Language: a sample is a document, its loss the mean over its tokens; the headline is held-out bits per byte.

Shape legend: B samples of a batch, T tokens, V entries of the vocabulary, D dimensions, H heads.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import platform
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import MODEL, Config
from ..console import Progress
from ..data import columns
from ..data.batches import Batch, Batches, TensorBatches
from ..data.source import DataSet, Root, brief
from ..errors import UsageError
from ..files import below, cache_folder, keep_cached, printable, typed_path
from ..pruning.seeding import generator
from ..records import Metric
from .base import RowsTask, mean_nats, nats

if TYPE_CHECKING:
    from ..distributed import Processes
    from ..network import Network

SHORTEST = 32  # characters that a document has at least
HALF = 0.5  # of the bytes, below which it is said how many are read
NOTHING = -1  # the target behind the end of a document
BOILERPLATE = (
    "All rights reserved. No part of this page may be reproduced without permission. ",
    "This site uses cookies. By continuing to browse you agree to our use of cookies. ",
    "Click here to subscribe to our newsletter. You can unsubscribe at any time. ",
    "Skip to main content. Home. About us. Contact. Privacy policy. Terms of use. ",
)
Text = tuple[str, str]  # where it is from, and what it says


class Language(RowsTask):
    """Documents, each cut off after ``length`` tokens, of a vocabulary that is learnt from those that are trained on.

    Args:
        length: tokens T of a document that are read and predicted, from a token that begins it.
        vocabulary: V, by byte-level BPE (Hugging Face's tokenizers); fewer where the documents have no more to merge.

    Attributes:
        texts: the training documents as given, wrong ones among them.
        facts: ``bytes_read`` and ``bytes_evaluated``, the shares of the training and the held-out documents' bytes that
            are within ``length`` tokens; noise, which the vocabulary is learnt from too, changes these.
        tokenizer: maps documents to tokens; every text has some, since there is one for every byte.
    """

    metrics = (Metric("bits_per_byte", "held-out bits per byte", higher=False, digits=3),)
    flips = False
    packages = ("tokenizers",)
    data: Documents

    def __init__(
        self,
        config: Config,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        length: Annotated[int, Field(ge=2, le=65_536)],
        vocabulary: Annotated[int, Field(ge=257, le=1_000_000)],
    ) -> None:
        super().__init__(config, device, dtype)
        self.length, parts = length, self.parts
        self.places = [self.data.train[row][0] for row in parts.train]
        self.texts = self._given(parts.train, parts.wrong)
        self.tokenizer = learnt(self.texts, vocabulary)
        self.chance_loss = math.log(self.tokenizer.get_vocab_size())
        tokens = map(self.tokenizer.id_to_token, range(1, self.tokenizer.get_vocab_size()))
        self.bytes_V = torch.tensor([0, *map(len, tokens)])  # byte-level BPE writes one character for each
        self.train, read = self._batches(self.texts)
        trusted = self._given(parts.reference, parts.doubted)
        self.reference = self._batches(trusted)[0] if trusted else self.train
        held_out, evaluated = self._batches([self.data.test[row][1] for row in parts.test])
        self.tests, self.facts = {"": held_out}, {"bytes_read": read, "bytes_evaluated": evaluated}
        if read < HALF:
            self.notes = [
                f"{read:.0%} of the documents' bytes are in their first task.length={length} tokens, and no more is "
                "read; a smaller dataset.characters cuts texts into shorter documents"
            ]

    def _given(self, rows: np.ndarray, wrong: np.ndarray) -> list[str]:
        texts = [text for _, text in self.data.train]
        return self.given(texts, rows, wrong, partial(corrupt, foreign=self.data.foreign))

    def _batches(self, texts: list[str]) -> tuple[Batches, float]:
        """Return batches of inputs, int32 (B, T), the first token being 0, and targets, the next tokens, likewise; and
        which share of the texts' bytes these are."""
        inputs = np.zeros((len(texts), self.length), np.int32)
        targets = np.full_like(inputs, NOTHING)
        for row, encoded in enumerate(self.tokenizer.encode_batch(texts)):
            ids = encoded.ids[: self.length]
            targets[row, : len(ids)] = ids
            inputs[row, 1 : len(ids)] = ids[:-1]
        arrays = torch.from_numpy(inputs), torch.from_numpy(targets)
        share = self.bytes_V[arrays[1].clamp(min=0)].sum().item() / sum(len(text.encode()) for text in texts)
        return TensorBatches(*arrays, batch_size=self.config.batch_size, device=self.device), share

    def network(self) -> nn.Module:
        """Return a freshly initialised network: from tokens (B, T) to logits of the next one (B, T, V)."""
        return self.fitted(MODEL.make(self.config.model, self.length, len(self.bytes_V)))

    def losses(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
        return *mean_nats(outputs, targets, NOTHING, smoothing), None

    @torch.no_grad()
    def evaluate(self, network: Network, batches: Iterable[Batch], n: int, processes: Processes) -> dict[str, float]:
        """Return the bits of all tokens over their bytes, and the mean loss of the documents."""
        sums = torch.zeros(3, dtype=torch.float64, device=network.device)  # nats, bytes, losses
        lengths = self.bytes_V.to(network.device)
        for _, tokens, targets in batches:
            unlikely = nats(network.logits(tokens).log_softmax(-1), targets, NOTHING).double()
            losses = unlikely.sum(1) / (targets != NOTHING).sum(1)
            sums += torch.stack([unlikely.sum(), lengths[targets.clamp(min=0)].sum(), losses.sum()])
        total, size, loss = processes.sum(sums).tolist()
        return {"bits_per_byte": total / math.log(2) / size, "loss": loss / n}

    def columns(self) -> dict[str, Any]:
        import pandas as pd

        paths = pd.array([printable(place) for place in self.places], dtype="string")
        return {"index": self.parts.train, "path": paths, "corrupted": self.corrupted}


def learnt(texts: list[str], vocabulary: int) -> Any:
    """Return a tokenizer of byte-level BPE, trained on texts. Token 0 begins a document; 256 more are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|begin|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True  # a document that has such words has these words
    return tokenizer


# --- what can be wrong with a document


def corrupt(text: str, rng: np.random.Generator, foreign: Sequence[str] = ()) -> str:
    """Return a text with its words shuffled, or in mojibake, or boilerplate in its place: other words in any case.

    Where there are ``foreign`` texts, one of these in its place is as likely as each of the others.
    """
    kinds: list[Callable[[str, np.random.Generator], str]] = [shuffled, mojibake, boilerplate]
    if foreign:
        kinds.append(lambda text, rng: foreign[int(rng.integers(len(foreign)))])
    changed = (kinds[kind](text, rng) for kind in rng.permutation(len(kinds)))
    return next(other for other in changed if other.split() != text.split())


def shuffled(text: str, rng: np.random.Generator) -> str:
    """Return a text with its words in another order."""
    return " ".join(rng.permutation(np.array(text.split(), dtype=object)).tolist())


def mojibake(text: str, rng: np.random.Generator) -> str:
    """Return what a program makes of a text's UTF-8 that takes it for UTF-16, as Notepad's "Bush hid the facts"."""
    return text.encode().decode("utf-16-le", "replace")


def boilerplate(text: str, rng: np.random.Generator) -> str:
    """Return one of some sentences of web pages, again and again, as long as a text."""
    sentence = BOILERPLATE[rng.integers(len(BOILERPLATE))]
    return (sentence * (len(text) // len(sentence) + 1))[: max(len(text), SHORTEST)]


# --- data sets


@dataclass(frozen=True)
class Documents:
    """What is trained on and what is held out, of no text both.

    Attributes:
        train: some of it, in order.
        test: likewise.
        clean: whether these count as clean where no noise is injected.
        fingerprint: sha256, as hex, of all of it.
        skipped: what was too short.
        foreign: documents of another language, for noise to put in the place of some.
    """

    train: list[Text]
    test: list[Text]
    clean: bool
    fingerprint: str
    skipped: list[str]
    foreign: list[str]


@dataclass(frozen=True, kw_only=True)
class Texts(DataSet):
    """Texts, cut into documents of about ``characters`` or less; a share ``held_out`` of the whole texts, and whatever
    is like one of them, is not trained on, the same in every run. ``foreign`` is where texts of another language lie,
    for noise to put in the place of some."""

    name: str
    characters: Annotated[int, Field(ge=2 * SHORTEST, le=10**7)]
    held_out: Annotated[float, Field(gt=0, lt=1)]
    foreign: Root = None

    task: ClassVar[str] = "language"
    clean: ClassVar[bool] = False
    column = "text"  # of Parquet and JSONL
    remedy: ClassVar[str] = "call the one that has the texts so"

    def texts(self) -> list[Text]:
        """Return all texts. Raises UsageError for missing, incomplete or malformed files."""
        raise NotImplementedError

    def open(self) -> Documents:
        found, skipped = [], []
        for place, text in self.texts():
            if len(text := text.strip()) < SHORTEST:
                skipped.append(f"{printable(place)} has {len(text)} characters of the {SHORTEST} that a document needs")
            else:
                found.append((place, text))
        held = set(generator(0, "held-out texts").permutation(len(found))[: round(self.held_out * len(found))].tolist())
        last = {text: row for row, (_, text) in enumerate(found)}  # of several alike it says where all of them belong
        unseen = {text for text, row in last.items() if row in held}
        train, test = (
            [
                (place, part)
                for place, text in found
                if (text in unseen) == out
                for part in passages(text, self.characters)
            ]
            for out in (False, True)
        )
        if not train or not test:
            raise UsageError(
                f"dataset={self.name} has {len(last)} texts of {SHORTEST} characters or more, {len(unseen)} of which "
                f"dataset.held_out={self.held_out:g} holds out: give it more texts, or type another share"
            )
        foreign = self._foreign(last)
        content = json.dumps([train, test, foreign] if foreign else [train, test])
        return Documents(train, test, self.clean, hashlib.sha256(content.encode()).hexdigest(), skipped, foreign)

    def _foreign(self, own: Collection[str]) -> list[str]:
        """Return the documents of another language, none of which may be one of its own texts."""
        if self.foreign is None:
            return []
        found = Reader("dataset.foreign", self.foreign, self.column, self.remedy).texts()
        long = [(place, stripped) for place, text in found if len(stripped := text.strip()) >= SHORTEST]
        if not long:
            raise UsageError(f"dataset.foreign={self.foreign} has no text of {SHORTEST} characters: give longer ones")
        if both := [place for place, text in long if text in own]:
            raise UsageError(
                f"{printable(both[0])} of dataset.foreign={self.foreign} is a text of dataset={self.name} too: "
                "give texts of another language"
            )
        return [part for _, text in long for part in passages(text, self.characters)]


def passages(text: str, most: int) -> list[str]:
    """Cut a text behind white space into parts of at most ``most`` characters, or of so many within a longer word.

    A rest of fewer than `SHORTEST` stays with the part before it. The parts together are the text.
    """
    parts, start = [], 0
    while len(text) - start > most + SHORTEST:
        window = text[start : start + most]
        end = start + next((at + 1 for at in range(most - 1, SHORTEST, -1) if window[at].isspace()), most)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


@dataclass(frozen=True, kw_only=True)
class PythonDocs(Texts):
    """The documentation of the Python that runs this: its language's topics, and its library's docstrings."""

    clean: ClassVar[bool] = True

    def texts(self) -> list[Text]:
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(library.glob("*.py")) + sorted(library.glob("pydoc_data/topics.py"))
        if len(files) < 2:
            raise UsageError(f"this Python has no source of its library in {library}; use dataset=text")
        stamps = [platform.python_version(), *((file.name, file.stat().st_size) for file in files)]
        digest = hashlib.sha256(json.dumps(stamps).encode() + Path(__file__).read_bytes()).hexdigest()
        place = cache_folder("texts") / f"{digest[:32]}.json"
        try:
            return [(where, text) for where, text in json.loads(place.read_text())]
        except (OSError, ValueError, TypeError):
            pass
        found = list(_docstrings(files))
        keep_cached(place, lambda file: file.write(json.dumps(found).encode()))
        return found


def _docstrings(files: list[Path]) -> Iterator[Text]:
    """Yield what documents the modules, classes and functions of some files, each text once; of topics their texts."""
    seen, progress = set(), Progress()
    for number, file in enumerate(files):
        progress.show(f"reading this Python's documentation: {number}/{len(files)}")
        for node in ast.walk(ast.parse(file.read_bytes())):
            texts: list[str | None] = []
            if file.stem == "topics" and isinstance(node, ast.Dict):
                texts = [value.value for value in node.values if isinstance(value, ast.Constant)]  # type: ignore[misc]
            elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                texts = [ast.get_docstring(node)]
            for text in texts:
                if text and text not in seen and len(text.strip()) >= SHORTEST:
                    seen.add(text)
                    yield file.name, text


@dataclass(frozen=True, kw_only=True)
class TextFiles(Texts):
    """Texts of one's own: a column of Parquet or JSONL files, or one in each ``.txt`` file, wherever below ``root``."""

    root: Root
    column: Annotated[str, Field(min_length=1)]

    remedy: ClassVar[str] = "type dataset.column=NAME of the one that has the texts"

    def texts(self) -> list[Text]:
        if self.root is None:
            raise UsageError(f"dataset={self.name} needs its files: type dataset.root=PATH, a folder of {Reader.KINDS}")
        return Reader("dataset.root", self.root, self.column, self.remedy).texts()


@dataclass(frozen=True)
class Reader:
    """Texts in files: a ``column`` of Parquet or JSONL, or the whole of each ``.txt``, wherever below ``path``.

    Attributes:
        key: of the configuration, by which they were named.
        remedy: what to do where there is no such column.
    """

    key: str
    path: str
    column: str
    remedy: str

    KINDS: ClassVar[str] = "*.parquet, *.jsonl or *.txt"

    def texts(self) -> list[Text]:
        """Return all texts. Raises UsageError for files that are missing, of several kinds, or malformed."""
        kinds = {".parquet": self._parquet, ".jsonl": self._jsonl, ".txt": self._txt}
        root = typed_path(self.path)
        if not root.exists():
            raise UsageError(f"{self.key}={root} is not there: type a folder of {self.KINDS}, or one such file")
        there = [root] if root.is_file() else [path for path in below(root, "**/*") if path.is_file()]
        files = [file for file in there if file.suffix.lower() in kinds]  # Windows also writes .TXT
        if not files:
            raise UsageError(f"{self.key}={root} has no {self.KINDS}: type the folder that has them")
        if len(found := sorted({file.suffix.lower() for file in files})) > 1:
            raise UsageError(f"{self.key}={root} has {' and '.join(found)}: type a folder, or a file, of one kind")
        base = root.parent if root.is_file() else root
        try:
            return [
                text for file in files for text in kinds[file.suffix.lower()](file, file.relative_to(base).as_posix())
            ]
        except OSError as error:
            raise UsageError(f"{error.filename or root} cannot be read ({error.strerror}): mend that") from None

    def _txt(self, file: Path, name: str) -> Iterator[Text]:
        try:
            text = file.read_bytes().decode("utf-8-sig")
            if "\0" in text:
                raise ValueError("it has zeros, as UTF-16 has")
        except ValueError as error:
            raise UsageError(f"{file} is not UTF-8 ({brief(error)}): convert it, or move it elsewhere") from None
        yield name, text

    def _jsonl(self, file: Path, name: str) -> Iterator[Text]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                    json.dumps(values, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:
                    raise UsageError(f"{file}, line {number}, is no JSON ({brief(error)}): mend or delete it") from None
                where = f"{file}, line {number},"
                if not isinstance(values, dict):
                    wanted = f'{{"{self.column}": …}} is wanted: write one a line'
                    raise UsageError(f"{where} is {json.dumps(values)[:60]} where {wanted}")
                if self.column not in values:
                    raise UsageError(f"{where} has no text {self.column}, but {', '.join(values)}: {self.remedy}")
                if not isinstance(text := values[self.column], str | None):
                    raise UsageError(f"{where} has {json.dumps(text)[:60]} as {self.column}, no text: {self.remedy}")
                yield f"{name}#{number}", text or ""

    def _parquet(self, file: Path, name: str) -> Iterator[Text]:
        texts = columns.read(file, [[self.column]], self.remedy).column(0)
        if (held := columns.holds(texts)) != columns.TEXTS:
            raise UsageError(f"the column {self.column} of {file} holds {held}, no texts: {self.remedy}")
        for row, text in enumerate(texts.to_pylist()):
            yield f"{name}#{row}", text or ""


# --- a network


def gpt(
    length: int,
    vocabulary: int,
    *,
    width: Annotated[int, Field(ge=8, le=16_384)],
    layers: Annotated[int, Field(ge=1, le=256)],
    heads: Annotated[int, Field(ge=1, le=256)],
) -> nn.Module:
    """See `GPT`. Raises ValueError where ``width`` cannot be divided by ``heads``."""
    if width % heads:
        raise ValueError(f"width={width} cannot be divided among heads={heads}; use a multiple")
    return GPT(length, vocabulary, width, layers, heads)


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019) without dropout: from tokens (B, T) to logits of the next one (B, T, V)."""

    def __init__(self, length: int, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, values in self.named_parameters():
            if values.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(values, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.places.weight[: tokens_BT.shape[1]]
        return F.linear(self.norm(self.blocks(x_BTD)), self.tokens.weight)


class Block(nn.Module):
    """Causal attention, then two layers for each token by itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_layers = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv = self.qkv(self.before_attention(x_BTD)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.before_layers(x_BTD))))
