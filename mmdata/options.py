"""Command-line options declared once, as dataclass fields with their help text, range, choices and training stages.

An options class is a frozen dataclass whose fields are made with `option`; `mmdata.commands.options` generates the
command line from it. Imports only the standard library and `mmdata.errors`, so that `mm --help` starts quickly.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mmdata.errors import UsageError

INT64: Mapping[str, Any] = {"least": -(2**63), "most": 2**63 - 1}  # the range of a seed


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of one option: everything except its name, type and default, which the dataclass field has.

    `flag` may be a pair of switches such as --share-prompt/--no-share-prompt, or, for a bool that is True by default,
    the single flag that sets it to False. `least` and `most` are inclusive bounds, `above` and `below` exclusive ones.
    `by_stage` maps a training stage to the default there. `stages` are those that accept the option; empty means all.
    """

    help: str
    group: str = ""  # heading in --help
    flag: str = ""  # as typed on the command line; empty: the field's name as --name-with-dashes
    metavar: str | None = None
    envvar: str | None = None  # environment variable that gives the value if the option is missing
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    default_text: str = ""  # shown in --help in place of a default that is computed at run time
    by_stage: Mapping[str, Any] | None = None
    stages: tuple[str, ...] = ()
    may_change_on_resume: bool = False  # whether a resumed run may have another value than the run it continues


def option(default: Any, help: str, group: str = "", **declaration: Any) -> Any:
    """Return a dataclass field with a default and, in its metadata, an `Option` of these fields."""
    return field(default=default, metadata={"option": Option(help, group, **declaration)})


def redeclared(kind: type, name: str, *, default: Any) -> Any:
    """Return a field with the `Option` of field `name` of `kind` but another default. KeyError if there is none."""
    return field(default=default, metadata=kind.__dataclass_fields__[name].metadata)


def options_of(kind: type | Any) -> Iterator[tuple[str, Option]]:
    """Yield name and `Option` of each field of an options class, or of an instance of one, in order of declaration."""
    for each in fields(kind):
        if "option" in each.metadata:
            yield each.name, each.metadata["option"]


def flag_of(name: str, declaration: Option) -> str:
    """Return the flag as typed on the command line: `declaration.flag`, or else the field's name with dashes."""
    return declaration.flag or f"--{name.replace('_', '-')}"


def check(options: Any) -> None:
    """Raise UsageError for the first option that is not finite, out of range or not one of its choices."""
    for name, declaration in options_of(options):
        check_value(flag_of(name, declaration), getattr(options, name), declaration)


def check_value(flag: str, value: Any, declaration: Option) -> None:
    """Raise UsageError if `value`, or an item of it if it is a list or tuple, is not allowed by its declaration.

    Choices are checked for any value, bounds and finiteness for numbers only. None is accepted. flag: for the message.
    """
    for item in value if isinstance(value, tuple | list) else (value,):
        if declaration.choices and item is not None and item not in declaration.choices:
            raise UsageError(f"{flag} {item} is unknown", f"use one of {', '.join(declaration.choices)}")
        if problem := _problem(item, declaration):
            raise UsageError(f"{flag} {item} {problem}", f"leave {flag} out for the default")


def bounds(declaration: Option) -> list[tuple[str, float, Callable[[float, float], bool]]]:
    """Return the bounds that an option has, as (words, bound, comparison): `comparison(value, bound)` must hold."""
    every = (
        ("at least", declaration.least, operator.ge),
        ("greater than", declaration.above, operator.gt),
        ("at most", declaration.most, operator.le),
        ("below", declaration.below, operator.lt),
    )
    return [(words, bound, holds) for words, bound, holds in every if bound is not None]


def _problem(value: Any, declaration: Option) -> str:
    """Return what is wrong with a number, such as "must be at least 1"; empty if nothing is or it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return "is not a finite number"
    for words, bound, holds in bounds(declaration):
        if not holds(value, bound):
            return f"must be {words} {bound:.12g}"
    return ""
