"""Strings that remember where their characters came from: rendered with them, a chat template's result shows which part
of the text came from which string of the conversation, and which strings are missing.

A `Traced` string equals the ordinary string in every test and operation of a template, so the rendering does not
change. Concatenating, joining, slicing, stripping, splitting and replacing keep the origins, and so does writing a
value as JSON or Python. Any other operation returns an ordinary string, which counts as the template's own.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import do_mark_safe, make_attrgetter

from mmdata.encode.template.limits import BoundedEnvironment


@dataclass(frozen=True, slots=True, eq=False)
class SourceText:
    """One string of a conversation; every occurrence is a source of its own. message: the index of its message; -1 for
    the conversation's tools. field: the message's field, or "tools". path: the keys of the JSON objects in which it is,
    outermost first. is_key: it is itself a key."""

    message: int
    field: str
    text: str
    path: tuple[str, ...] = ()
    is_key: bool = False


class Origin(NamedTuple):
    """The characters [begin, end) came from the characters [first, last) of `source`, or are within a {% generation %}
    block. Their numbers differ if some are written with escapes."""

    begin: int
    end: int
    source: SourceText
    first: int = 0
    last: int = 0


class Rendering(NamedTuple):
    """A rendered conversation. text: has the `origins`, which are sorted by position. sources: all its strings."""

    text: str
    origins: list[Origin]
    sources: list[SourceText]


GENERATION = SourceText(-1, "generation", "")


class Traced(str):
    """A string with the origins, ordered by position, of its parts that came from the conversation. The redefined
    methods of `str` return the same characters, with their origins where these are known."""

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
        text = str.__getitem__(self, slice(begin, end))
        return Traced(text, [_clipped(o, begin, end) for o in self.origins if max(o.begin, begin) < min(o.end, end)])

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
        return _joined(self.split(old, count), new)


def _clipped(origin: Origin, begin: int, end: int) -> Origin:
    """Return the origin of the characters [begin, end) of the string that `origin` is about."""
    b, e, source, first, last = origin
    new_begin, new_end = max(b, begin), min(e, end)
    if last - first == e - b:
        first, last = first + new_begin - b, last + new_end - e
    elif (new_begin, new_end) != (b, e):
        last = first  # characters written with escapes: which of them are left is not known
    return Origin(new_begin - begin, new_end - begin, source, first, last)


def concat(parts: Iterable[str]) -> str:
    """Join strings without a separator. The result is a `Traced` string if at least one part has origins."""
    parts = [part for part in parts if part]
    if len(parts) == 1:
        return parts[0]
    origins: list[Origin] = []
    offset = 0
    for part in parts:
        if isinstance(part, Traced):
            origins += [Origin(o.begin + offset, o.end + offset, *o[2:]) for o in part.origins]
        offset += len(part)
    text = "".join(parts)
    return Traced(text, origins) if origins else text


def _joined(parts: Iterable[str], separator: str) -> str:
    """Join strings as `separator.join(parts)` does, with their origins."""
    first, *rest = parts or [""]
    return concat([first, *(piece for part in rest for piece in (separator, part))])


def origins_of(text: str) -> list[Origin]:
    """Return the origins of any string sorted by position, without those of {% generation %} blocks."""
    origins = [origin for origin in getattr(text, "origins", ()) if origin.source is not GENERATION]
    return sorted(origins, key=lambda origin: origin[:2])


def missing_parts(text: str, sources: Iterable[SourceText]) -> Iterator[tuple[SourceText, str]]:
    """Yield each run of characters of a source that `text` does not show, with the source."""
    shown: dict[SourceText, list[tuple[int, int]]] = {}
    for origin in origins_of(text):
        shown.setdefault(origin.source, []).append(origin[3:])
    for source in sources:
        at = 0
        for first, last in [*sorted(shown.get(source, ())), (len(source.text), 0)]:
            if first > at:
                yield source, source.text[at:first]
            at = max(at, last)


# --- values of the conversation


class TracedObject(dict):
    """A JSON object with traced strings, which keep their origins when it is written as text."""

    def __str__(self) -> str:
        return _written(self, repr, repr)


class TracedList(list):
    """A JSON list with traced strings, which keep their origins when it is written as text."""

    def __str__(self) -> str:
        return _written(self, repr, repr)


def plain_names(message: str) -> str:
    """Return the message of an error of jinja2 without the names of this module's classes."""
    return re.sub(
        rf"{re.escape(__name__)}\.Traced(Object|List)", lambda m: {"Object": "dict", "List": "list"}[m[1]], message
    )


def traced(value: Any, sources: list[SourceText], message: int, field: str, path: tuple[str, ...] = ()) -> Any:
    """Copy JSON data, tuples as lists, with an origin for every string and key, and append their sources to `sources`.
    A stand-in makes its own copy."""
    if hasattr(value, "with_source"):
        return value.with_source(message, field, path, sources)
    if isinstance(value, str):
        return _traced_text(SourceText(message, field, value, path), sources)
    if isinstance(value, dict):
        return TracedObject(
            (
                _traced_text(SourceText(message, field, key, path, True), sources),
                traced(item, sources, message, field, (*path, key)),
            )
            for key, item in value.items()
        )
    if isinstance(value, (list, tuple)):
        return TracedList(traced(item, sources, message, field, path) for item in value)
    return value


def _traced_text(source: SourceText, sources: list[SourceText]) -> str:
    sources.append(source)
    size = len(source.text)
    return Traced(source.text, [Origin(0, size, source, 0, size)]) if size else source.text


def _written(value: Any, write: Callable[[Any], str], quote: Callable[[str], str]) -> str:
    """Return `write(value)`, a text such as JSON, in which the strings of `value` keep their origins. quote: returns
    how `write` writes a string, in quotes; it first gets strings that stand for those of `value`."""
    strings: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            strings.append(value)
            return f"\0{len(strings) - 1}\0"
        if isinstance(value, dict):
            return {marked(key): marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    pieces = re.split(r"""["']\\(?:u00|x)00(\d+)\\(?:u00|x)00["']""", write(marked(value)))
    pieces[1::2] = [_quoted(strings[int(number)], quote) for number in pieces[1::2]]
    return concat(pieces)


def _quoted(string: str, quote: Callable[[str], str]) -> str:
    """Return `quote(string)` with the origins of the string."""
    text = quote(string)
    if not isinstance(string, Traced):
        return text
    if text[1:-1] == string:
        return concat((text[0], string, text[-1]))
    return Traced(text, [Origin(1, len(text) - 1, *origin[2:]) for origin in string.origins])


# --- jinja2

_to_json = json.JSONEncoder(ensure_ascii=False).encode


def plain_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return what the filter `tojson` writes, without origins."""
    if indent is None and not (ensure_ascii or separators or sort_keys):
        return _to_json(value)  # the same, faster
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` of transformers, without HTML escapes."""

    def write(value: Any) -> str:
        return plain_json(value, ensure_ascii, indent, separators)

    return _written(_sorted(value) if sort_keys else value, write, write)


def _sorted(value: Any) -> Any:
    """Return a copy of JSON data with the keys of all objects sorted."""
    if isinstance(value, dict):
        return {key: _sorted(item) for key, item in sorted(value.items())}
    return [_sorted(item) for item in value] if isinstance(value, (list, tuple)) else value


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    """The filter `join`, which keeps origins."""
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return _joined([str(item) for item in value], str(d))


def _safe(value: Any) -> Any:
    """The filter `safe`, which keeps origins. Templates are rendered without escapes, so it changes nothing else."""
    return value if isinstance(value, Traced) else do_mark_safe(value)


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


def _raise_exception(message: str) -> None:
    """The function `raise_exception` of chat templates."""
    raise jinja2.TemplateError(message)


def template_environment(kind: type[BoundedEnvironment] = BoundedEnvironment) -> BoundedEnvironment:
    """Return a sandboxed jinja2 environment with the settings of transformers, which keeps the origins of strings.
    `strftime_now` writes a fixed date (`Tokenizer.amended`), so that a row has the same ids on any day."""
    environment = kind(
        concat,
        {"tojson": _tojson, "join": _join, "safe": _safe},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment
