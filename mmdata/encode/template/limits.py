"""A sandboxed jinja2 environment that bounds what a template may use: the characters it makes, its steps and its time.
The environment variables MM_TEMPLATE_MB and MM_TEMPLATE_SECONDS set other bounds than 64 and 2.

Every operation that can make a long text or a long list is counted before it is run, by what it will make: iterations of
loops, calls, filters, the operators `+`, `*`, `**`, `%` and `~`, and what is written. The usual templates get 0.1 to 0.3
ms a row, of which counting takes about a fifth.
"""

import contextlib
import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame

from mmdata.errors import UsageError

# What a rendering may use: Mi characters that it makes, where a step counts as STEP of them, and processor time.
SIZE, SECONDS = ("MM_TEMPLATE_MB", 64.0), ("MM_TEMPLATE_SECONDS", 2.0)
PER_CHARACTER = 64  # more characters for each one of the conversation
STEP, CHECK = 16, 2**16
MAX_BITS = 2**16  # of integers
_LONG_FORMAT = re.compile(r"\d{6}|\{[^{}]*\{|%[^a-zA-Z%]*\*")  # a width of six digits, or one that is computed
_NO_TEXT = {"length", "count", "list", "first", "last", "map", "select", "reject", "selectattr", "rejectattr", "items"}
_MAY_GROW = {
    "center",
    "ljust",
    "rjust",
    "zfill",
    "slice",
    "batch",
    "round",
    "range",
    "truncate",
    "wordwrap",
    "expandtabs",
}
_MAY_GROW |= {"indent", "tojson", "replace", "join", "translate", "split", "rsplit", "splitlines", "list"}
_MAY_GROW |= {"format", "format_map"}  # filters, and methods of texts, that make more than they are given
_NO_TEXT |= {"sort", "unique", "groupby", "dictsort", "default", "d", "attr", "sum", "min", "max", "reverse", "random"}


class TemplateLimitError(jinja2.TemplateError):
    """A template would make too much, or takes too long."""


def _limit(name: str, default: float) -> float:
    """Return the value of an environment variable. Raises UsageError unless it is a number above 0."""
    text = os.environ.get(name, "")
    with contextlib.suppress(ValueError):
        if not text or float(text) > 0:
            return float(text or default)
    raise UsageError(f"{name} is {text!r}, expected a number above 0", f"unset {name}, or {name}={default:g}")


class _Budget:
    """What is left of what a rendering may use. num_characters: of the conversation that is rendered."""

    def __init__(self, num_characters: int = 0):
        self._work, self._due, self._began = 0, CHECK, time.thread_time()
        self._most, self._seconds = _limit(*SIZE) * 2**20 + PER_CHARACTER * num_characters, _limit(*SECONDS)

    def spend(self, work: int) -> None:
        """Count characters before they are made. Raises TemplateLimitError if they are too many, or time is up."""
        self._work += work
        if self._work > self._due:
            self._due = self._work + CHECK
            if self._work > self._most:
                raise TemplateLimitError(f"it makes more than {self._most:,.0f} characters ({SIZE[0]} sets how many)")
            if time.thread_time() - self._began > self._seconds:
                raise TemplateLimitError(f"it takes longer than {self._seconds:g} s ({SECONDS[0]} sets how long)")


class _Running(threading.local):
    """The budget of the rendering that runs in this thread; outside of `bounded` one of a single operation."""

    budget: _Budget | None = None


_RUNNING = _Running()


@contextlib.contextmanager
def bounded(num_characters: int = 0) -> Iterator[None]:
    """Bound what templates use while the block runs. num_characters: of the conversation that is rendered."""
    outer, _RUNNING.budget = _RUNNING.budget, _Budget(num_characters)
    try:
        yield
    finally:
        _RUNNING.budget = outer


def spend(work: int) -> None:
    """Count characters, see `_Budget.spend`."""
    (_RUNNING.budget or _Budget()).spend(work)


def _size(value: Any) -> int:
    """Return about how many characters the memory of a value is worth, without what its items are."""
    if isinstance(value, str):
        return len(value)
    return STEP + 8 * len(value) if isinstance(value, list | tuple | dict) else STEP


def _spend_on_text(value: Any) -> None:
    """Count the characters of a value written as text. Lists may contain each other many times."""
    if isinstance(value, list | tuple | dict):
        pending = [value]
        while pending:
            value = pending.pop()
            spend(_size(value))
            if isinstance(value, dict):
                pending += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple):
                pending += value
    elif isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TemplateLimitError("a number has too many digits")


def _number(values: Iterable[Any]) -> int:
    """Return the largest integer among values; 0 without one."""
    return max((abs(value) for value in values if isinstance(value, int)), default=0)


def _spend_before(name: str, value: Any, arguments: list[Any]) -> None:
    """Count what a filter, or a method of a string, will make. value: what it is applied to."""
    size, number = _size(value), _number(arguments)
    texts = [len(each) for each in arguments if isinstance(each, str)]
    if name in ("center", "ljust", "rjust", "zfill", "slice", "batch", "round", "range", "truncate", "wordwrap"):
        spend(number)
    elif name in ("expandtabs", "indent", "tojson"):
        spend(size * max(number, *texts, 1))
    elif name in ("replace", "join", "translate", "wordwrap"):
        found = value.count(arguments[0]) if name == "replace" and _are_texts(value, arguments) else size
        spend(size + found * max(texts[name == "replace" :], default=0))
        if name == "translate":
            spend(size * max((_size(each) for each in arguments[0].values()), default=0))
    elif name in ("split", "rsplit", "splitlines", "list"):
        pieces = value.count(arguments[0]) if _are_texts(value, arguments) else size
        spend(64 * pieces if isinstance(value, str) else size)
    elif name in ("format", "format_map") and isinstance(value, str):
        _check_format(value)
    if name == "round" and number > 1000:
        raise TemplateLimitError("it rounds to more than 1,000 digits")


def _are_texts(value: Any, arguments: list[Any]) -> bool:
    return isinstance(value, str) and bool(arguments) and isinstance(arguments[0], str) and bool(arguments[0])


def _check_format(text: str) -> None:
    if _LONG_FORMAT.search(text):
        raise TemplateLimitError("it formats values to a long or computed width")


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    """Count the iterations of a loop."""
    for value in values:
        spend(STEP)
        yield value


def _bounded_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter with what it makes counted."""
    first = int(hasattr(run, "jinja_pass_arg"))  # jinja2 passes the context, or the like, to some filters first
    is_text, may_grow = name not in _NO_TEXT, name in _MAY_GROW

    @functools.wraps(run)
    def counted(*arguments: Any, **named: Any) -> Any:
        value = arguments[first] if len(arguments) > first else None
        if is_text and not isinstance(value, str):
            _spend_on_text(value)
        if may_grow:
            _spend_before(name, value, [*arguments[first + 1 :], *named.values()])
        result = run(*arguments, **named)
        spend(_size(result))
        return result

    return counted


class CountingGenerator(CodeGenerator):
    """Compiles loops to count their iterations, and `a ~ b` to the environment's `concat`."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        self.filters["_counted"] = "environment.counted"  # as code: jinja2 has looked for the names of filters before
        if not (isinstance(node.iter, nodes.Filter) and node.iter.name == "_counted"):
            node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat([")
        for item in node.nodes:
            self.write("str(environment.finalize(")
            self.visit(item, frame)
            self.write(")), ")
        self.write("])")


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandboxed environment whose templates are bounded. joined: concatenates texts."""

    code_generator_class = CountingGenerator
    counted = staticmethod(_counted)
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, joined: Callable[[Iterable[str]], str], filters: Mapping[str, Any], **options: Any):
        super().__init__(finalize=self._written, **options)
        self._joined = joined
        self.concat = self._concat  # type: ignore[assignment]
        self.filters |= filters
        self.filters = {name: _bounded_filter(name, run) for name, run in self.filters.items() if name != "urlize"}
        self.filters["_counted"] = self.counted
        del self.globals["lipsum"]

    def _written(self, value: Any) -> Any:
        """Count a value that is about to be written as text."""
        if not isinstance(value, str):
            _spend_on_text(value)
        return value

    def _concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        spend(sum(map(len, pieces)))
        return self._joined(pieces)

    def call(__self, __context: Any, __obj: Any, *arguments: Any, **named: Any) -> Any:
        """Call a function, macro or method, and count what it makes."""
        method = getattr(__obj, "__wrapped__", __obj)  # of `str.format`, which jinja2 wraps
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if name in _MAY_GROW and (isinstance(owner, str) or __obj is range):
            _spend_before(name, owner, [*arguments, *named.values()])
        spend(STEP + sum(map(_size, arguments)))
        result = super().call(__context, __obj, *arguments, **named)
        spend(_size(result))
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return `left operator right`, and count what it makes."""
        if operator == "+":
            result = left + right
            spend(len(result) if isinstance(result, str) else _size(result))
            return result
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            _spend_on_text(right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateLimitError("it computes a number with too many digits")
        elif operator == "*":
            spend(_number((left, right)) * sum(_size(each) for each in (left, right) if hasattr(each, "__len__")))
        return super().call_binop(context, operator, left, right)
