"""What a chat template asks of the texts that it writes: a rendering of stand-ins for the texts of a conversation holds
for all other texts to which each question has the same answer.

A template may write a text, strip white space from it, and search it for a string; the first two are edits, and of the
third it is recorded which strings a stand-in has not. Everything else that could depend on what a text says, such as
its length, clears `Record.is_exact`. All operations of a template on values pass through `RecordingEnvironment`.
"""

import functools
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jinja2 import nodes
from jinja2.compiler import Frame
from jinja2.runtime import Macro, Undefined
from jinja2.utils import Namespace

from mmdata.encode.template.limits import BoundedEnvironment, CountingGenerator
from mmdata.encode.template.traced import Origin, SourceText, Traced, TracedObject, plain_json

Edits = tuple[tuple[Any, ...], ...]  # (name of a method that strips, its argument), or ("tojson", arguments, options)
STRIPS = ("strip", "lstrip", "rstrip")
_SEARCHES = ("startswith", "endswith", "split", "replace")
_MARK = re.compile("\ue000(\\d+)\ue001")
# Filters that only pass on texts, and those that only look at the structure of lists and objects.
_OF_TEXTS = {"trim", "replace", "safe", "string", "default", "d"}
_OF_LISTS = {"length", "count", "list", "first", "last", "map", "select", "reject", "selectattr", "rejectattr", "items"}
_OF_LISTS |= {"reverse", "join", "default", "d"}
_TYPE_TESTS = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "true", "false", "boolean"}
_TYPE_TESTS |= {"number", "integer", "float", "callable"}
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "lteq": operator.le, "gt": operator.gt, "gteq": operator.ge,
    "in": lambda one, other: one in other, "notin": lambda one, other: one not in other,
}  # fmt: skip
_COMPARING_TESTS = {"==": "eq", "equalto": "eq", "eq": "eq", "!=": "ne", "ne": "ne", "in": "in"}


class Slot(NamedTuple):
    """The place of a text in a rendering. leaf: which text, as the caller numbers them. edits: what is done to it."""

    leaf: int
    edits: Edits = ()


class Record:
    """What a template asked of stand-ins. literals: strings that it searched them for. is_exact: False if it did
    anything else that depends on what the text says."""

    def __init__(self) -> None:
        self.literals: set[str] = set()
        self.is_exact = True
        self._slots: list[Slot] = []

    def add(self, slot: Slot) -> str:
        """Return the text by which `pieces` finds the slot."""
        self._slots.append(slot)
        return f"\ue000{len(self._slots) - 1}\ue001"

    def pieces(self, text: str) -> list[str | Slot]:
        """Divide a rendered text into the template's own texts, with even indices, and slots."""
        return [self._slots[int(part)] if n % 2 else part for n, part in enumerate(_MARK.split(text))]

    def search(self, string: Any) -> None:
        """Note a string, or a tuple of strings, that a stand-in is searched for."""
        for one in string if isinstance(string, tuple) else (string,):
            if isinstance(one, str) and one and not isinstance(one, Traced):
                self.literals.add(one)
            else:
                self.is_exact = False


class StandIn(Traced):
    """A string that stands for any text with a character that is no white space, and without `Record.literals`."""

    __slots__ = ("record", "slot")
    record: Record
    slot: Slot

    @classmethod
    def make(cls, record: Record, slot: Slot, source: SourceText | None = None) -> "StandIn":
        text = record.add(slot)
        size = len(source.text) if source else 0
        self = cls(text, [Origin(0, len(text), source, 0, size)] if source else ())
        self.record, self.slot = record, slot
        return self

    def with_source(self, message: int, field: str, path: tuple[str, ...], sources: list[SourceText]) -> "StandIn":
        """Return a copy for a rendering; see `traced`."""
        sources.append(SourceText(message, field, str.__str__(self), path))
        return StandIn.make(self.record, self.slot, sources[-1])

    def _edited(self, name: str, characters: Any) -> "StandIn":
        if isinstance(characters, Traced) or (characters or "").strip():
            self.record.is_exact = False
        (origin,) = self.origins
        return StandIn.make(self.record, Slot(self.slot.leaf, (*self.slot.edits, (name, characters))), origin.source)

    def strip(self, chars: str | None = None) -> str:
        return self._edited("strip", chars)

    def lstrip(self, chars: str | None = None) -> str:
        return self._edited("lstrip", chars)

    def rstrip(self, chars: str | None = None) -> str:
        return self._edited("rstrip", chars)

    def __contains__(self, string: Any) -> bool:
        self.record.search(string)
        return False

    def startswith(self, prefix: Any, *range: Any) -> bool:
        return prefix in self

    def endswith(self, suffix: Any, *range: Any) -> bool:
        return suffix in self

    def split(self, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        self.record.search(sep)
        return [self]

    def replace(self, old: str, new: str, count: int = -1) -> str:
        self.record.search(old)
        return self


class StandInObject(TracedObject):
    """A JSON object that stands for any other one that is not empty. A template may only write it with `tojson`."""

    def __init__(self, record: Record, slot: Slot, source: SourceText | None = None):
        super().__init__({"x": 0})
        self.record, self.slot, self.source = record, slot, source

    def with_source(
        self, message: int, field: str, path: tuple[str, ...], sources: list[SourceText]
    ) -> "StandInObject":
        """Return a copy for a rendering; see `traced`."""
        sources.append(SourceText(message, field, "{}", path))
        return StandInObject(self.record, self.slot, sources[-1])

    def written(self, arguments: Iterable[Any], options: dict[str, Any]) -> StandIn:
        """Return what the filter `tojson` makes of it."""
        edit = "tojson", tuple(arguments), tuple(options.items())
        return StandIn.make(self.record, Slot(self.slot.leaf, (edit,)), self.source)


def edited(value: Any, edits: Edits) -> str:
    """Return what a template writes of a text or an object."""
    for name, argument, *options in edits:
        value = getattr(value, name)(argument) if name in STRIPS else plain_json(value, *argument, **dict(*options))
    return value


def _holds_text(value: Any) -> bool:
    """Return whether a value is, or may have, texts of the conversation."""
    if isinstance(value, Traced | StandInObject):
        return True
    if isinstance(value, dict):
        return any(_holds_text(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return any(map(_holds_text, value))
    return isinstance(value, Iterable) and not isinstance(value, str | Undefined)


class _RecordingGenerator(CountingGenerator):
    """Compiles comparisons and slices to calls of the environment."""

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("environment.compared(")
        self.visit(node.expr, frame)
        for operand in node.ops:
            self.write(f", ({operand.op!r}, ")
            self.visit(operand.expr, frame)
            self.write(")")
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.plain(")
        self.visit(node.node, frame)
        self.write(")[")
        self.visit(node.arg, frame)
        self.write("]")


class RecordingEnvironment(BoundedEnvironment):
    """An environment that records in `record` what templates do with the texts of a conversation."""

    code_generator_class = _RecordingGenerator

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.record = Record()
        self.filters = {name: self._watched(name, run) for name, run in self.filters.items()}
        self.tests = {name: self._watched_test(name, run) for name, run in self.tests.items()}

    def plain(self, value: Any) -> Any:
        """Return a value of which a part, or each item, is asked for."""
        self._check(not isinstance(value, Traced | StandInObject))
        self._check(not isinstance(value, dict) or _has_fixed_keys(value))
        return value

    def counted(self, values: Any) -> Any:  # type: ignore[override]
        return BoundedEnvironment.counted(self.plain(values))

    def _check(self, is_exact: bool) -> None:
        self.record.is_exact &= is_exact

    def _written(self, value: Any) -> Any:
        self._check(isinstance(value, str) or not _holds_text(value))
        return super()._written(value)

    def _watched(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks what it is given."""
        first = int(hasattr(run, "jinja_pass_arg"))

        @functools.wraps(run)
        def watched(*arguments: Any, **options: Any) -> Any:
            value, others = arguments[first], arguments[first + 1 :]
            self._check(name in ("default", "d") or not _holds_text([*others, *options.values()]))
            self._check(name != "random")
            if isinstance(value, StandInObject) and name == "tojson":
                return value.written(others, options)
            if isinstance(value, Traced):
                self._check(name in _OF_TEXTS and (isinstance(value, StandIn) or name not in ("trim", "replace")))
            elif isinstance(value, StandInObject):
                self._check(name in ("default", "d"))
            else:
                self._check((name in _OF_LISTS and self.plain(value) is value) or not _holds_text(value))
            return run(*arguments, **options)

        return watched

    def _watched_test(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def watched(*arguments: Any, **options: Any) -> Any:
            if name in _COMPARING_TESTS and len(arguments) == 2:
                return self.compared(arguments[0], (_COMPARING_TESTS[name], arguments[1]))
            self._check(name in _TYPE_TESTS or not _holds_text([*arguments, *options.values()]))
            return run(*arguments, **options)

        return watched

    def compared(self, left: Any, *operands: tuple[str, Any]) -> bool:
        """Return the result of a comparison such as `left == right`, or of a chain of them."""
        for name, right in operands:
            if _holds_text(left) or _holds_text(right):
                self._check(self._is_certain(name, left, right))
            if not _COMPARISONS[name](left, right):
                return False
            left = right
        return True

    def _is_certain(self, name: str, left: Any, right: Any) -> bool:
        """Return whether a comparison has the same result for all texts. Searching is noted."""
        if name in ("in", "notin"):
            if _holds_text(left):
                return False
            return isinstance(right, StandIn) or (_has_fixed_keys(right) and not isinstance(right, StandInObject))
        if name not in ("eq", "ne") or (_holds_text(left) and _holds_text(right)):
            return False
        value, constant = (left, right) if _holds_text(left) else (right, left)
        if not isinstance(constant, str):
            return not constant or isinstance(constant, bool | int | float)
        if isinstance(value, StandIn) and constant.strip():
            self.record.search(constant)
        return isinstance(value, StandIn) or not isinstance(value, Traced) or not constant.strip()

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check(not isinstance(obj, StandInObject) and (not isinstance(obj, dict) or _has_fixed_keys(obj)))
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check(not _holds_text(argument) and not isinstance(obj, StandInObject))
        self._check(not isinstance(obj, Traced) or isinstance(argument, str))
        self._check(not isinstance(obj, dict) or _has_fixed_keys(obj))
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        # Those with an underscore are jinja2's own.
        options = [value for option, value in named.items() if not option.startswith("_")]
        is_known = isinstance(owner, StandIn) and name in (*STRIPS, *_SEARCHES)
        __self._check(is_known or not (isinstance(owner, Traced) or __obj is __self.globals["strftime_now"]))
        passes_on = isinstance(__obj, Macro) or __obj in (dict, Namespace)
        __self._check(passes_on or not _holds_text([*arguments, *options]))
        return super().call(__context, __obj, *arguments, **named)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._check(operator == "+" or not (_holds_text(left) or _holds_text(right)))
        return super().call_binop(context, operator, left, right)


def _has_fixed_keys(value: Any) -> bool:
    """Return whether a value is an object whose keys are no texts of the conversation, but the names of fields."""
    return isinstance(value, dict) and (
        isinstance(value, TracedObject) or not any(isinstance(k, Traced) for k in value)
    )
