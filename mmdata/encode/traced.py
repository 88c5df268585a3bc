"""Strings that remember their origin: rendering with them shows which text of a rendering came from which message.

A `Traced` string equals the plain one in every test and operation of a template, so the rendering is exactly that of plain
strings. Concatenating, slicing, stripping, splitting and replacing keep the origins; any other operation returns a plain
string, which counts as the template's own text, so the caller sees that part of a message is missing.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame


class Origin(NamedTuple):
    """Characters [begin, end) of a string came from `source`."""

    begin: int
    end: int
    source: int


GENERATION = -1  # the source of text inside a template's {% generation %} block
TOOLS = -2


class Traced(str):
    """A string and the origins of the parts that came from the conversation."""

    __slots__ = ("origins",)
    origins: tuple[Origin, ...]

    def __new__(cls, text: str, origins: Iterable[Origin]) -> "Traced":
        self = super().__new__(cls, text)
        self.origins = tuple(origins)
        return self

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return concat((other, self))

    def cut(self, begin: int, end: int) -> "Traced":
        """Characters [begin, end), with their origins."""
        origins = (Origin(max(o.begin, begin) - begin, min(o.end, end) - begin, o.source) for o in self.origins)
        return Traced(str.__getitem__(self, slice(begin, end)), (o for o in origins if o.begin < o.end))

    def __getitem__(self, key: Any) -> str:
        if isinstance(key, slice) and key.step in (None, 1):
            begin, end, _ = key.indices(len(self))
            return self.cut(begin, max(begin, end))
        return str.__getitem__(self, key)

    def lstrip(self, chars: str | None = None) -> str:
        return self.cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> str:
        return self.cut(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None) -> str:
        begin = len(self) - len(str.lstrip(self, chars))
        return self.cut(begin, max(begin, len(str.rstrip(self, chars))))

    def split(self, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        if sep is None:
            return str.split(self, sep, maxsplit)
        parts, begin = [], 0
        for part in str.split(self, sep, maxsplit):
            parts.append(self.cut(begin, begin + len(part)))
            begin += len(part) + len(sep)
        return parts

    def replace(self, old: str, new: str, count: int = -1) -> str:
        if not old:
            return str.replace(self, old, new, count)
        first, *rest = self.split(old, count)
        return concat([first, *(piece for part in rest for piece in (new, part))])


def concat(parts: Iterable[str]) -> str:
    """Join strings, keeping the origins of those that have them."""
    parts = list(parts)
    origins: list[Origin] = []
    offset = 0
    for part in parts:
        if isinstance(part, Traced):
            origins.extend(Origin(o.begin + offset, o.end + offset, o.source) for o in part.origins)
        offset += len(part)
    text = "".join(parts)
    return Traced(text, origins) if origins else text


def origins_of(text: str) -> list[Origin]:
    """The origins in a rendering, sorted, without {% generation %} blocks."""
    return sorted(origin for origin in getattr(text, "origins", ()) if origin.source != GENERATION)


class _Object(dict):
    """A JSON object that remembers its source, so that its JSON text does too."""

    __slots__ = ("source",)
    source: int


def traced(value: Any, source: int) -> Any:
    """A copy of JSON data in which every string and object has `source` as its origin."""
    if isinstance(value, str):
        return Traced(value, [Origin(0, len(value), source)] if value else [])
    if isinstance(value, dict):
        copy = _Object((key, traced(item, source)) for key, item in value.items())
        copy.source = source
        return copy
    return [traced(item, source) for item in value] if isinstance(value, (list, tuple)) else value


def _source_of(value: Any) -> int | None:
    if isinstance(value, _Object):
        return value.source
    if isinstance(value, Traced):
        return value.origins[0].source if value.origins else None
    if isinstance(value, (list, tuple)):
        return next((source for item in value if (source := _source_of(item)) is not None), None)
    return None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter as transformers defines it for chat templates: plain JSON, without HTML escapes."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    source = _source_of(value)
    return text if source is None else Traced(text, [Origin(0, len(text), source)])


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: marks the text inside as the assistant's."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = caller()
        origins = text.origins if isinstance(text, Traced) else ()
        return Traced(text, (*origins, Origin(0, len(text), GENERATION)))


class _CodeGenerator(CodeGenerator):
    """Compiles `a ~ b` to a concatenation that keeps origins."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat([")
        for item in node.nodes:
            self.write("str(")
            self.visit(item, frame)
            self.write("), ")
        self.write("])")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    concat = staticmethod(concat)  # type: ignore[assignment]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def template_environment() -> jinja2.Environment:
    """A sandboxed jinja2 environment with transformers' settings for chat templates.

    `strftime_now` is left out: the same row must give the same ids on any day.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment
