"""Options declared once: a dataclass field that carries its help text, range, choices and stages.

An options class is a frozen dataclass whose fields are made with `option`. The command line is generated from it
(`mmdata.commands.options`), `check` refuses values out of range, and the code that does the work takes an instance.
Imports nothing heavy, so `mm --help` can read it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from mmdata.errors import UsageError


@dataclass(frozen=True, slots=True)
class Option:
    """What is known about an option besides its name, type and default.

    `least` and `most` are inclusive bounds, `above` and `below` exclusive ones. `by_stage` gives the default of each
    training stage where they differ; `stages` names the stages that take the option at all (empty: all of them).
    """

    help: str
    group: str = ""  # heading in --help
    flag: str = ""  # as typed on the command line; empty: --name-with-dashes
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    default_text: str = ""  # shown in --help where the default is computed
    by_stage: Mapping[str, Any] | None = None
    stages: tuple[str, ...] = ()
    may_change_on_resume: bool = False


def option(default: Any = MISSING, *, help: str, **known: Any) -> Any:
    """A dataclass field with an `Option`; without `default` the field is required."""
    return field(default=default, metadata={"option": Option(help, **known)})


def options_of(kind: type | Any) -> Iterator[tuple[str, Option]]:
    """Name and `Option` of each declared field of an options class or of an instance, in order."""
    for each in fields(kind):
        if "option" in each.metadata:
            yield each.name, each.metadata["option"]


def flag_of(name: str, known: Option) -> str:
    """The flag as typed, such as --batch-tokens."""
    return known.flag or f"--{name.replace('_', '-')}"


def check(options: Any) -> None:
    """UsageError for the first value that is NaN, infinite, out of range or no choice. None is never refused."""
    for name, known in options_of(options):
        value = getattr(options, name)
        for one in value if isinstance(value, tuple | list) else (value,):
            problem = _problem(one, known)
            if problem:
                flag = flag_of(name, known)
                raise UsageError(f"{flag} {one} {problem}", f"leave {flag} out for the default")


def _problem(value: Any, known: Option) -> str:
    """What is wrong with one value, empty when nothing is."""
    if known.choices and value is not None and value not in known.choices:
        return f"is unknown: use {', '.join(known.choices)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return "is not a finite number"
    if known.least is not None and value < known.least:
        return f"must be at least {known.least:g}"
    if known.above is not None and value <= known.above:
        return f"must be greater than {known.above:g}"
    if known.most is not None and value > known.most:
        return f"must be at most {known.most:g}"
    if known.below is not None and value >= known.below:
        return f"must be below {known.below:g}"
    return ""
