"""Strings that remember where their characters came from. When a chat template is rendered with such strings, the
result shows which part of the text came from which message.

A `Traced` string equals the ordinary string in every test and operation of a template, so the rendering does not
change. Concatenating, slicing, stripping, splitting and replacing keep the origins. Any other operation returns an
ordinary string. Its text counts as the template's own, and the caller can notice that a part of a message is missing.
"""

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame


class Origin(NamedTuple):
    """The characters [begin, end) of a string came from `source`: GENERATION, TOOLS, or a number >= 0 for a field of a
    message (3 * message index + 0 for the content, 1 for the reasoning, 2 for the tool calls).
    """

    begin: int
    end: int
    source: int


GENERATION = -1  # the source of text inside a template's {% generation %} block
TOOLS = -2  # the source of text that came from the conversation's tools


class Traced(str):
    """A string with the origins, ordered by position, of its parts that came from the conversation. The template wrote
    the rest. The redefined methods of `str` return the same characters, with their origins where these are known.
    """

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
        """Return the characters [begin, end) with their origins."""
        if begin == 0 and end >= len(self):
            return self
        origins = [Origin(max(b, begin) - begin, min(e, end) - begin, source) for b, e, source in self.origins]
        return Traced(str.__getitem__(self, slice(begin, end)), [o for o in origins if o.begin < o.end])

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
        """Split as `str.split` does. The parts have origins only if `sep` is given."""
        if sep is None:
            return str.split(self, sep, maxsplit)
        parts, begin = [], 0
        for part in str.split(self, sep, maxsplit):
            parts.append(self.cut(begin, begin + len(part)))
            begin += len(part) + len(sep)
        return parts

    def replace(self, old: str, new: str, count: int = -1) -> str:
        """Replace as `str.replace` does. The text around the replacements keeps its origins, unless `old` is empty."""
        if not old:
            return str.replace(self, old, new, count)
        first, *rest = self.split(old, count)
        return concat([first, *(piece for part in rest for piece in (new, part))])


def concat(parts: Iterable[str]) -> str:
    """Join strings without a separator. The result is a `Traced` string if at least one part has origins."""
    parts = list(parts)
    origins: list[Origin] = []
    offset = 0
    for part in parts:
        if isinstance(part, Traced):
            origins += [Origin(begin + offset, end + offset, source) for begin, end, source in part.origins]
        offset += len(part)
    text = "".join(parts)
    return Traced(text, origins) if origins else text


def origins_of(text: str) -> list[Origin]:
    """Return the origins of any string sorted by position, without those of {% generation %} blocks."""
    return sorted([origin for origin in getattr(text, "origins", ()) if origin.source != GENERATION])


class _Object(dict):
    """A JSON object that knows its source, so that text which the `tojson` filter makes of it has an origin."""

    __slots__ = ("source",)
    source: int


def traced(value: Any, source: int) -> Any:
    """Copy JSON data, with the origin `source` for every string and object (but no key). Tuples become lists."""
    if isinstance(value, str):
        return Traced(value, [Origin(0, len(value), source)] if value else [])
    if isinstance(value, dict):
        copy = _Object((key, traced(item, source)) for key, item in value.items())
        copy.source = source
        return copy
    return [traced(item, source) for item in value] if isinstance(value, (list, tuple)) else value


def _source_of(value: Any) -> int | None:
    """Return the source of traced JSON data, that of the first string or object with one, or None."""
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
    """The filter `tojson` of transformers, without HTML escapes. The text has the origin that `_source_of` finds."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    source = _source_of(value)
    return text if source is None else Traced(text, [Origin(0, len(text), source)])


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %} … {% endgeneration %}: gives its text the origin GENERATION besides its other origins."""

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
    """Compiles the template operator `a ~ b` to `concat`, which keeps origins."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat([")
        for item in node.nodes:
            self.write("str(")
            self.visit(item, frame)
            self.write("), ")
        self.write("])")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandboxed jinja2 environment that joins the pieces of a rendering with `concat`, which keeps origins."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(concat)  # type: ignore[assignment]


def _raise_exception(message: str) -> None:
    """The function `raise_exception` of chat templates."""
    raise jinja2.TemplateError(message)


def template_environment() -> jinja2.Environment:
    """Return a sandboxed jinja2 environment with the settings of transformers, which keeps the origins of strings.
    `mm pack` fixes the date that `strftime_now` writes (`Tokenizer.amended`), so that a row has the same ids on any day.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment
