"""What a command wrote and how it ended, and the two ways a test reads it: it worked, or it was refused in two lines."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ran:
    """A command's exit code and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


Run = Callable[[str], Ran]


def fine(ran: Ran) -> Ran:
    """The command ended with exit code 0 and printed no traceback."""
    assert ran.code == 0, ran.err
    assert "Traceback" not in ran.err
    return ran


def refused(ran: Ran, *words: str) -> Ran:
    """The command ended with one error line, one fix line, no traceback and an exit code other than 0."""
    assert ran.code != 0, ran.out
    lines = ran.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, ran.err
    assert lines[lines.index(errors[0]) + 1].startswith("fix: "), ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in ran.err, ran.err
    return ran
