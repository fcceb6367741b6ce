"""From files to what is kept, step by step."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from .. import __version__
from ..console import say
from ..errors import UsageError
from ..pruning.selection import floor
from ..runs import write_json
from . import check, layout, scoring
from .engine import BrokenError, Engine, Workers
from .inspect import LONG, SKIPPING, File, Skipped, list_files, read_files, read_reference
from .layout import Part, Question
from .scoring import ApartError, Scored

MOST_RANKED = 100  # checkpoints of Spearman's ranks, whose SQL grows with their square
WORK, SUMMARY, OUTPUTS = ".work", "summary.json", ("scores", "ids")


@dataclass(frozen=True)
class Order:
    """What somebody has typed; see ``alignprune curate --help``."""

    losses: str
    reference: Path | None
    score: str
    keep: float
    out: Path
    columns: tuple[str, ...] | None
    gaps: bool
    skip: bool
    approximate: bool
    ids: bool
    engine: str
    ray_address: str | None
    memory: str | None
    threads: int | None

    @property
    def work(self) -> Path:
        """The folder that a command which was stopped leaves, and goes on from."""
        return self.out / WORK

    @property
    def written(self) -> Path:
        """What is kept, until it is all there."""
        return self.work / "written"


def curate(order: Order, show: Callable[[str], None]) -> dict[str, Any]:
    """Score, cut and write into the folder ``order.out``; return the summary. Raises UsageError."""
    began = time.perf_counter()
    engine = Engine(order.work / "spill", order.memory, order.threads if order.engine == "duckdb" else None)
    stamps = list_files(engine, order.losses)
    files, columns, skipped = read_files(engine, order.losses, stamps, order.columns, order.skip)
    with workers_for(order, engine) as workers:
        look = Look(order, engine, workers, columns, show)
        while True:
            try:
                answer = look.at(files)
                break
            except BrokenError as error:
                if not order.skip:
                    raise UsageError(f"{error}; write the file again, or {SKIPPING} leaves it out") from None
                skipped.append(Skipped(str(error), error.file.path, error.group))
                files = [file for file in files if file != error.file]
    kept = keep(engine, order, answer)
    summary = {
        "losses": order.losses,
        "reference": None if order.reference is None else str(order.reference),
        "score": order.score,
        "keep": order.keep,
        **kept,
        "approximate": order.approximate,
        "layout": answer.layout,
        "checkpoints": answer.checkpoints,
        "missing_losses": sum(each.gaps for each in answer.scored),
        "files": len(files),
        "losses_rows": sum(file.total for file in files),
        "bytes": sum(file.size for file in files),
        "engine": order.engine,
        "seconds": round(time.perf_counter() - began, 3),
        "skipped": [asdict(each) for each in skipped + answer.skipped],
        "versions": {"alignprune_exp": __version__, "duckdb": duckdb.__version__},
    }
    put_in_place(order, summary)
    return summary


def workers_for(order: Order, engine: Engine) -> AbstractContextManager[Workers]:
    """Return who scores, for as long as that takes: this machine, or a cluster. Raises UsageError."""
    if order.engine == "duckdb":
        return nullcontext(engine)
    from .cluster import joined

    return joined(order.ray_address, order.work, None if order.memory is None else engine.memory, order.threads)


@dataclass(frozen=True)
class Answer:
    """What files have been found to hold.

    Attributes:
        layout: how they are laid out.
        checkpoints: how many a trajectory has.
        scored: the parts, in order.
        twice: how many ids are there more than once, which the table ``twice`` has.
        skipped: what of them, or of the reference, was left out or taken for missing.
    """

    layout: str
    checkpoints: int
    scored: list[Scored]
    twice: int
    skipped: list[Skipped]


@dataclass(frozen=True)
class Look:
    """Scores files and finds what is wrong with them.

    Attributes:
        order: what to do.
        engine: looks at what has been scored.
        workers: score, part by part.
        columns: of the files: id and list of losses, or id, checkpoint and loss.
        show: is told how far it is.
    """

    order: Order
    engine: Engine
    workers: Workers
    columns: tuple[str, ...]
    show: Callable[[str], None]

    def at(self, files: Sequence[File]) -> Answer:
        """Return what all files hold. Raises BrokenError for one that is damaged, and UsageError."""
        engine, skip = self.engine, self.order.skip
        question, skipped = self._question(files)
        laid, scored = self._scored(question, files)
        for group in [scored] if laid == "buckets" else [[each] for each in scored]:
            skipped += check.flaws(engine, group, question, skip, self.order.gaps)
        twice = scoring.find_twice(engine, scored)
        skipped += check.twice(engine, files, question, twice, skip)
        return Answer(laid, len(question.checkpoints), scored, twice, skipped)

    def _question(self, files: Sequence[File]) -> tuple[Question, list[Skipped]]:
        """Return what is asked of the files, and what of the reference or of them was skipped."""
        order, engine, columns = self.order, self.engine, self.columns
        if not files:
            raise UsageError(f"{order.losses} has no rows; give files that have some")
        lists = len(columns) < len(LONG)
        reference: dict[Any, float | None] = {}
        skipped: list[Skipped] = []
        if order.reference is not None:
            reference, skipped = read_reference(engine, order.reference, LONG[1:] if lists else columns[1:], order.skip)
        if lists and (texts := [at for at in reference if not isinstance(at, int | float | Decimal | date)]):
            raise UsageError(
                f"--reference {order.reference} has the checkpoint {texts[0]}, a text, which does not say its place "
                "in lists; number the checkpoints in their order"
            )
        checkpoints: list[Any] = list(range(len(reference)))
        if lists and not reference:
            checkpoints = list(range(scoring.longest(self.workers, files, columns[1])))
        elif not lists:
            checkpoints, more = check.checkpoints(engine, files, columns, list(reference), order.skip)
            skipped += more
        if order.score == "spearman" and len(checkpoints) > MOST_RANKED:
            raise UsageError(
                f"--score spearman ranks {MOST_RANKED} checkpoints at most, not {len(checkpoints)}; use das"
            )
        losses = list(reference.values()) if lists else [reference.get(at) for at in checkpoints]
        if order.reference is not None and order.score != "settled":
            check.reference(order.reference, losses, order.score)
        return Question(order.score, columns, tuple(checkpoints), tuple(losses or [None] * len(checkpoints))), skipped

    def _scored(self, question: Question, files: Sequence[File]) -> tuple[str, list[Scored]]:
        """Return how the files were laid out, and their parts, scored, in order."""
        try:
            laid, parts = self._plan(question, files, in_order=True)
            return laid, self._scored_parts(question, parts)
        except ApartError:
            if laid == "checkpoints":
                say(
                    "the files of the checkpoints have their ids in different orders; they are divided by a hash of "
                    "the id"
                )
            laid, parts = self._plan(question, files, in_order=False)
            return laid, self._scored_parts(question, parts)

    def _plan(self, question: Question, files: Sequence[File], in_order: bool) -> tuple[str, list[Part]]:
        """Return the first layout that the files allow, of those that `layout` lists, and its parts."""
        if question.lists:
            return "rows", layout.by_rows(files, question)
        if in_order:
            if (parts := layout.by_checkpoints(files, question)) is not None:
                return "checkpoints", parts
            if (parts := layout.by_blocks(files, question)) is not None and scoring.begins(self.engine, parts[0]):
                return "blocks", parts
        if (parts := layout.by_files(files, question)) is not None:
            return "files", parts
        count = layout.buckets(files, question, self.workers.memory)
        return "buckets", scoring.divide(self.workers, self.order.work, question, files, count)

    def _scored_parts(self, question: Question, parts: Sequence[Part]) -> list[Scored]:
        """Score parts, several at a time where none has to be grouped in memory. Raises UsageError for a flaw."""
        order = self.order
        found: dict[str, Scored] = {}
        work = partial(scoring.score, order.work, question, order.gaps)
        for scored in self.workers.each(work, parts, alone=any(part.apart for part in parts)):
            if not order.skip:
                check.flaws(self.engine, [scored], question, order.skip, order.gaps)
            found[scored.part.name] = scored
            self.show(f"{len(found)} of {len(parts)} parts are scored")
        return [found[part.name] for part in parts]


def keep(engine: Engine, order: Order, answer: Answer) -> dict[str, Any]:
    """Find the threshold, write what is kept, return the numbers. Raises UsageError where none is."""
    table = scoring.counting(answer.scored, answer.twice)
    samples, with_score = engine.one(f"SELECT count(*), count(score) FROM ({table})")
    due = min(floor(order.keep * samples), with_score)
    if due == 0:
        raise UsageError(
            f"--keep {order.keep:g} keeps none of {samples} ids, {with_score} with a score; use a larger one"
        )
    cut = scoring.cut(engine, table, due, with_score, order.approximate)
    shutil.rmtree(order.written, ignore_errors=True)
    write = partial(scoring.write_kept, order.written, answer.twice, cut, order.ids)
    kept = sum(engine.each(write, answer.scored))
    return {"samples": samples, "unscored": samples - with_score, "kept": kept, "threshold": cut.score}


def put_in_place(order: Order, summary: dict[str, Any]) -> None:
    """Move what was written to where it belongs, then write the summary, whose presence means that all is there."""
    (order.out / SUMMARY).unlink(missing_ok=True)
    for old in OUTPUTS:
        shutil.rmtree(order.out / old, ignore_errors=True)
    order.written.replace(order.out / OUTPUTS[order.ids])
    write_json(order.out / SUMMARY, summary)
    shutil.rmtree(order.work)
