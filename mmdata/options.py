"""Options declared once: a dataclass field that carries its help text, range, choices and stages.

An options class is a frozen dataclass whose fields are made with `option`. The command line is generated from it
(`mmdata.commands.options`), `check` refuses values out of range, and the code that does the work takes an instance.
Imports nothing heavy, so `mm --help` can read it.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from mmdata.errors import UsageError

INT64: Mapping[str, Any] = {"least": -(2**63), "most": 2**63 - 1}  # the range of a seed


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of an option: everything except its name, type and default.

    `flag` may be a switch pair such as --share-prompt/--no-share-prompt; `--no-NAME` for a bool that is True by default
    sets it to False. `least` and `most` are inclusive bounds, `above` and `below` exclusive ones. `by_stage` gives the
    default of each training stage; `stages` names the stages that take the option at all (empty: all of them).
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


def option(default: Any = MISSING, *, help: str, **declaration: Any) -> Any:
    """A dataclass field with an `Option`; without `default` the field is required."""
    return field(default=default, metadata={"option": Option(help, **declaration)})


def redeclared(kind: type, name: str, *, default: Any) -> Any:
    """The declared field `name` of an options class, with another default, for a subclass."""
    return field(default=default, metadata=kind.__dataclass_fields__[name].metadata)


def options_of(kind: type | Any) -> Iterator[tuple[str, Option]]:
    """Name and `Option` of each declared field of an options class or of an instance, in order."""
    for each in fields(kind):
        if "option" in each.metadata:
            yield each.name, each.metadata["option"]


def flag_of(name: str, declaration: Option) -> str:
    """The flag as typed, such as --batch-tokens."""
    return declaration.flag or f"--{name.replace('_', '-')}"


def check(options: Any) -> None:
    """UsageError for the first field that is NaN, infinite, out of range or not one of its choices."""
    for name, declaration in options_of(options):
        check_value(flag_of(name, declaration), getattr(options, name), declaration)


def check_value(flag: str, value: Any, declaration: Option) -> None:
    """UsageError when a value, or an item of a list or tuple, is outside its declaration. None is always accepted."""
    for item in value if isinstance(value, tuple | list) else (value,):
        if declaration.choices and item is not None and item not in declaration.choices:
            raise UsageError(f"{flag} {item} is unknown", f"use one of {', '.join(declaration.choices)}")
        if problem := _problem(item, declaration):
            raise UsageError(f"{flag} {item} {problem}", f"leave {flag} out for the default")


def bounds(declaration: Option) -> list[tuple[str, float, Callable[[float, float], bool]]]:
    """The bounds of a number: each in words, its value, and the comparison that must hold with it."""
    every = (
        ("at least", declaration.least, operator.ge),
        ("greater than", declaration.above, operator.gt),
        ("at most", declaration.most, operator.le),
        ("below", declaration.below, operator.lt),
    )
    return [(words, bound, holds) for words, bound, holds in every if bound is not None]


def _problem(value: Any, declaration: Option) -> str:
    """What is wrong with a number, empty when nothing is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return "is not a finite number"
    for words, bound, holds in bounds(declaration):
        if not holds(value, bound):
            return f"must be {words} {bound:.12g}"
    return ""
