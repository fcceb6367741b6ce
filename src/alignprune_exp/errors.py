"""How a run can end other than well, each with one sentence for the user; never a traceback."""


class UsageError(Exception):
    """A mistake that the user can mend.

    Its message is one sentence, on one line: what is wrong, where, and what to type instead. The command line prints
    it and exits with status 2.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence))


class Elsewhere(UsageError):
    """Another process has the run. A sweep counts it as running and goes on; alone, it exits with ``status``."""

    status = 3


class Ended(Exception):
    """A run ended early.

    Attributes:
        status: the exit status.
        speaks: whether to say so even in a process that leaves talking to another one of its run.
    """

    status: int
    speaks = False


class Failed(Ended):
    """The run cannot go on; its record says why."""

    status = 1


class Stopped(Ended):
    """The run was asked to stop and left a checkpoint; the same command goes on."""

    status = 130
