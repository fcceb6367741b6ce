"""Everything that can be typed, behind one name: alignprune train|status|suspects|export|keep|embed|curate|tables"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from .console import command
from .errors import UsageError

COMMANDS = {  # module, and what it does; imported only when typed
    "train": ("train", "train a model, or a grid of them, with dynamic data pruning; leave a record of each run"),
    "status": ("status", "how far a suite is: done, running, failed, missing"),
    "suspects": ("suspects", "the labels of a run to look at, most suspect first"),
    "export": ("export", "a run's samples for cleanlab, Label Studio, or as one Parquet table"),
    "keep": ("keep", "which samples of a run to keep, as a list to join"),
    "embed": ("embed", "the features of a data set's images by a network of another, for score.file"),
    "curate": ("curate.command", "which ids to keep, of any number, from losses that were logged elsewhere"),
    "tables": ("tables", "every suite's tables, figures and report, from run records"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join(["usage: alignprune COMMAND …", "", *lines, "", "alignprune COMMAND --help says more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the first word names with the rest of the words; return the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)

    def work() -> int:
        if not words:
            raise UsageError(f"a command is missing; use one of {', '.join(COMMANDS)}, or alignprune --help")
        name, *rest = words
        if name in ("-h", "--help"):
            print(usage())
            return 0
        if name == "--version":
            from . import __version__

            print(f"alignprune {__version__}")
            return 0
        if name not in COMMANDS:
            from .schema import nearest

            meant = f", did you mean {near}?" if (near := nearest(name, COMMANDS)) else ";"
            raise UsageError(f"there is no alignprune {name}{meant} there are {', '.join(COMMANDS)}")
        module = import_module(f".{COMMANDS[name][0]}", __package__)
        status: int = module.main(rest)
        return status

    return command(work)


if __name__ == "__main__":
    sys.exit(main())
