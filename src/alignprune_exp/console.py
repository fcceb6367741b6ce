"""What a person types, and reads while a run works and when it ends.

Every line stands alone, so logs stay readable.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import AGAIN, Ended, Stopped, UsageError, of_the_machine, terminable

if TYPE_CHECKING:
    from .records import Metric

UNTIL_SAID = 5.0  # seconds that a process waits for another one to say why both end; torchrun ends all with the first
QUIET = 30.0  # seconds without a line before a log file gets one from within an epoch


def speaks() -> bool:
    """Return whether this process prints: of several that share a run, the first alone does."""
    return "MASTER_ADDR" not in os.environ or os.environ.get("RANK", "0") == "0"


class Parser(ArgumentParser):
    """Reads a command line; a mistake raises UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help shows what there is")


def parser_of(
    program: str, about: str | None, of: tuple[str, str] = ("run", "a run's folder, or its id"), checked: bool = False
) -> Parser:
    """Return the parser of a program that writes something of a run, or the like, with the arguments that these share.

    ``of`` has name and help of its first argument.
    """
    parser = Parser(prog=f"python -m alignprune_exp.{program}", description=about)
    parser.add_argument(of[0], help=of[1])
    if checked:
        parser.add_argument(
            "--checked", type=Path, help="a table with the right label of each index that was looked at"
        )
    parser.add_argument("--force", action="store_true", help="write over what is there")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where ids are looked up")
    return parser


def command(work: Callable[[], object], then: str = AGAIN, stopped: str = "stopped") -> int:
    """Do what somebody has typed; print one sentence if it does not end well; return the exit status.

    0: done; what ``work`` returns, where that is a number. 1: the run, the disk or the memory failed (``then`` says
    what to do once that is mended), or nobody reads what is printed. 2: a mistake. 3: running elsewhere. 130:
    ``stopped``.
    """

    def complain(what: object, speaker: bool = False) -> None:
        if speaker or speaks():
            print(what, file=sys.stderr, flush=True)
        else:
            time.sleep(UNTIL_SAID)

    try:
        with terminable():
            status = work()
            sys.stdout.flush()
    except UsageError as error:
        complain(error)
        return error.status
    except KeyboardInterrupt:
        complain(stopped)
        return Stopped.status
    except Ended as error:
        complain(error, error.speaks)
        return error.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read has read enough
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        if (sentence := of_the_machine(error, then)) is None:
            raise
        complain(sentence, speaker=True)
        return 1
    return status if isinstance(status, int) else 0


def say(line: str) -> None:
    """Print one line, after clearing what `Progress` shows."""
    if not speaks():
        return
    clear = "\r\x1b[K" if sys.stdout.isatty() else ""
    print(f"{clear}{line}", flush=True)


class Progress:
    """Shows where an epoch is: in place on a terminal, as a line every ``QUIET`` seconds elsewhere."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def show(self, line: str) -> None:
        terminal = sys.stdout.isatty()
        now = time.monotonic()
        if now - self._last < (0.2 if terminal else QUIET):
            return
        self._last = now
        if terminal and speaks():
            print(f"\r\x1b[K{line}", end="", flush=True)
        else:
            say(line)


def epoch_line(row: Mapping[str, Any], epochs: int, seconds_left: float, judged: Metric) -> str:
    """Return one epoch's line: what ranked it, what was kept, how it went, and the time left."""
    width, tested = len(str(epochs)), row[f"test_{judged.name}"]
    parts = [
        f"epoch {row['epoch'] + 1:>{width}}/{epochs}",
        f"ranked by {row['ranked_by'] or '–':<10}",
        f"kept {row['kept_fraction']:.2f}",
        f"noise in it {_number(row['kept_noise'], '.3f')}",
        f"loss {row['train_loss']:.3f}",
        f"test {'–' if tested is None else format(tested, f'.{judged.digits}f'):>5} {judged.unit}".rstrip(),
        f"{row['seconds']:.1f} s",
        f"left {duration(seconds_left)}",
    ]
    return "  ".join(parts)


def one_line(text: str) -> str:
    """Return a text on one line, with spaces in the place of what cannot be printed."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds as people write them: 1:02:03, 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def closing(summary: Mapping[str, Any], judged: Metric, record: str, commands: Sequence[tuple[str, str]]) -> str:
    """Return the small table of a finished run, its record, and what to type next."""
    columns = {
        judged.words: judged.said(summary[f"test_{judged.name}_final"], judged.digits + 1),
        "saved": _number(summary["saved"], ".1%"),
        **({"labels asked for": f"{summary['asked']} of {summary['samples']}"} if "asked" in summary else {}),
        "kept noise": _number(summary["kept_noise_mean"], ".3f", f" of {_number(summary['noise_rate'], '.3f')}"),
        **({"noise estimate": f"{summary['noise_estimate']:.3f}"} if "noise_estimate" in summary else {}),
        "detection AUROC": _number(summary["detection_auroc_last"], ".3f", " (½ is chance)"),
        "seconds": _number(summary["seconds_total"], ".1f"),
    }
    widths = [max(len(name), len(value)) for name, value in columns.items()]
    lines = [
        "",
        "  ".join(name.rjust(width) for name, width in zip(columns, widths, strict=True)),
        "  ".join(value.rjust(width) for value, width in zip(columns.values(), widths, strict=True)),
        "",
        f"record  {record}",
    ]
    if skipped := summary.get("skipped"):
        lines.append(f"skipped {skipped} images or lines, as listed in {record}/skipped.txt")
    wide = max((len(command) for command, _ in commands), default=0)
    for number, (command, meaning) in enumerate(commands):
        lines.append(f"{'next' if number == 0 else '':<6}  {command:<{wide}}  # {meaning}")
    return "\n".join(lines)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else format(value, form) + unit
