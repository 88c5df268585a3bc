"""Building blocks of a report, and the HTML page that shows them. This module imports nothing else of the project.

A report is a list of sections, and a section is a list of blocks: tables with typed columns, cards, plots, notes, of
figures and English phrases. `render` writes them as one HTML file, translated, with jinja2 (autoescape on), style
sheet, script and plotting library (uPlot, MIT license, in assets/), whose content security policy forbids network
requests, except to its own server for a page that refreshes itself. `mmdata.commands.terminal.print_sections` prints
the same blocks.
"""

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

LANGS = ("en", "zh")
_FOR_SCRIPT = (  # phrases that page.js uses; the page contains their translations
    "reset zoom", "trained", "not trained", "control token", "line", "row", "characters", "tokens", "more tokens not shown",
    "more characters not shown", "loss", "random", "longest", "shortest", "highest loss", "system", "user", "assistant",
    "tool", "document", "prompt", "chosen", "rejected", "all", "no data", "auto", "light", "dark", "share", "yes", "no",
    "rows", "copy", "copied", "columns",
)  # fmt: skip


# --- text and its translation


@dataclass(frozen=True, slots=True)
class Phrase:
    """An English phrase with placeholders, such as {rows}, which is translated when the page is written. values: of the
    placeholders; phrases and strings in the table of translations are translated too. is_name: the text may come from
    the data and is shown as it is without a translation, which any other phrase must have. key: of a name in the table
    of translations, if not the text itself."""

    text: str
    values: Mapping[str, Any] = field(default_factory=dict)
    is_name: bool = False
    key: str = ""


Text = str | Phrase  # a plain string is an English phrase


def phrase(text: str, /, **values: Any) -> Phrase:
    """Return an English phrase; the keyword arguments are the values of its placeholders."""
    return Phrase(text, values)


def as_name(text: object, key: str = "") -> Phrase:
    """Return text from the data, such as a path or a role, as a `Phrase` that is translated only if the table of
    translations has it. key: what to look up instead of the text."""
    return Phrase(str(text), is_name=True, key=key)


def verbatim(text: object) -> Phrase:
    """Return a name from the data, such as of a run (one may be called dpo), as a `Phrase` that is never translated."""
    return as_name(text, key="\0")


def joined(pieces: Sequence[Text], separator: str = " · ") -> Phrase:
    """Return one phrase that consists of several texts, each translated on its own, with `separator` between them."""
    values = {f"piece_{i}": piece for i, piece in enumerate(pieces)}
    return Phrase(separator.join(f"{{{key}}}" for key in values), values, is_name=True)


class Translation:
    """Translates phrases to the language of a page: "en" (unchanged) or "zh" (assets/zh.json, by English text)."""

    def __init__(self, lang: str):
        assert lang in LANGS, lang
        self.lang = lang
        self._table: dict[str, str] = {} if lang == "en" else json.loads(asset(f"{lang}.json"))
        self.explained: dict[str, str] = {}  # terms that `tip` was asked for, in the language of the page

    def __call__(self, text: Text) -> str:
        """Return the translation of a text, a string as an English phrase, with its placeholders filled in. KeyError if
        a phrase that is no name has none."""
        if isinstance(text, str):
            text = Phrase(text)
        if text.is_name or self.lang == "en" or not text.text:
            template = self._table.get(text.key or text.text, text.text)
        else:
            template = self._table[text.text]
        values = {key: self._value(value) for key, value in text.values.items()}
        return template.format(**values) if values else template

    def tip(self, term: Text) -> str:
        """Return what a heading or label means, from assets/terms.json; "" if it says itself."""
        known: dict[str, str] = json.loads(asset("terms.json"))
        if help := self(known.get(term if isinstance(term, str) else term.text, "")):
            self.explained[self(term)] = help
        return help

    def _value(self, value: Any) -> Any:
        return self(value) if isinstance(value, Phrase) else self._table.get(value, value)


# --- how values are shown


def percent(share: float) -> str:
    """Format a share of 1 in percent: "31 %" from 10 % on, with two significant digits below: "0.4 %"."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def size(num_bytes: float) -> str:
    """Format a number of bytes with its unit, in powers of 1000: "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(hours: float) -> str:
    """Format a duration, given in hours: "4.2 s", "3 m 05 s" or "2 h 10 m"."""
    if hours * 3600 < 10:
        return f"{hours * 3600:.1f} s"
    seconds = round(hours * 3600)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} m {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} m"


def short(number: float) -> str:
    """Format a number for an axis: "512", "1.5M", "2k". Multiples of 1024 are divided by 1024: 2048 is "2k"."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1024 if number % 1024 == 0 else 1000
    return f"{number:.3g}T"


# How the values of numeric columns are formatted, by the kind of the column. Values of kind "figure" are already text.
NUMBERS: dict[str, Callable[[Any], str]] = {
    "figure": str,
    "count": "{:,}".format,
    "share": percent,
    "percent1": lambda share: f"{100 * share:.1f} %",
    "percent2": lambda share: f"{100 * share:.2f} %",
    "decimal1": "{:,.1f}".format,
    "decimal2": "{:,.2f}".format,
    "decimal4": "{:.4f}".format,
    "bytes": size,
    "hours": duration,
}


class Column(NamedTuple):
    """A column of a table: its heading, and the kind of its values, which is a key of NUMBERS or one of these:

    - "text": shown as it is
    - "word": translated if it is in the table of translations
    - "code": text from rows, or a name, shown in a monospaced box
    - "bar": a share from 0 to 1, drawn as a bar
    - "noted": a list of (text, note) pairs; the notes are shown small, and translated if they are in the table
    """

    name: Text = ""
    kind: str = "text"

    def show(self, value: Any, translation: Translation) -> str:
        """Format a value of this column as text. None becomes a dash, and a phrase is translated."""
        if value is None or isinstance(value, Phrase):
            return "–" if value is None else translation(value)
        if self.kind in NUMBERS:
            return NUMBERS[self.kind](value)
        if self.kind == "bar":
            return "█" * round(30 * value)
        if self.kind == "noted":
            return " ".join(part for pair in value for part in (pair[0], translation(as_name(pair[1]))) if part)
        return translation(as_name(value)) if self.kind == "word" else str(value)

    @property
    def is_number(self) -> bool:
        """Whether the values are numbers, which are aligned to the right."""
        return self.kind in NUMBERS


# --- blocks


@dataclass(frozen=True, slots=True)
class Table:
    """A table; a row has one value per column. wrap: lines of the first column may be broken inside words. marked: rows
    to highlight."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    title: Text = ""
    wrap: bool = False
    marked: Collection[int] = ()
    mark: str = "differs"  # what is said of the marked rows: "differs" or "best"

    def texts(self, row: Sequence[Any], translation: Translation) -> list[str]:
        """Format the cells of a row as text. ValueError if the row has not one value per column."""
        return [column.show(value, translation) for column, value in zip(self.columns, row, strict=True)]


@dataclass(frozen=True, slots=True)
class Cards:
    """Important figures in large type: a list of (label, value, hint). The hint is shown small below the value."""

    items: Sequence[tuple[Text, str, Text]]


@dataclass(frozen=True, slots=True)
class Callouts:
    """Warnings, one line each. Without lines nothing is shown."""

    lines: Sequence[Text]


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph in small type. in_terminal: whether the terminal prints it, too."""

    text: Text
    in_terminal: bool = False


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading inside a section."""

    text: Text


PlotSpec = dict[str, Any]  # a JSON object from which page.js draws a plot (docs/reports.md), or a part of it


@dataclass(frozen=True, slots=True)
class Strings:
    """Short strings, shown in boxes one after another."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot with a title and a note below it. spec: a JSON object for page.js, with phrases to translate, see
    docs/reports.md. in_terminal: the terminal prints it as a table of bars; only for a histogram of one series."""

    title: Text
    spec: PlotSpec
    note: Text = ""
    in_terminal: bool = False

    def as_table(self) -> Table:
        """Return a histogram as a table: a row and a bar per non-empty bin. ValueError unless it has one series."""
        (series,), edges = self.spec["series"], self.spec["edges"]
        is_share = isinstance(edges[1], float)
        ends = [f"{100 * edge:.0f} %" if is_share else f"{edge:,}" for edge in edges]
        names = self.spec.get("names") or [f"{low} - {high}" for low, high in itertools.pairwise(ends)]
        most = max(series["y"]) or 1
        rows = [(label, count, count / most) for label, count in zip(names, series["y"], strict=True) if count]
        return Table([Column(), Column(series["name"], "count"), Column("", "bar")], rows, self.title)


@dataclass(frozen=True, slots=True)
class Browser:
    """Samples (`mmdata.stats.samples.records`) that the reader pages through, drawn as chats."""

    samples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class RowTable:
    """A sample of rows that the reader sorts, filters and searches: a list of (name, help, is_share, values) for each
    column. Values are numbers, shares from 0 to 1, true or false, or strings; None where a row has none.
    """

    columns: Sequence[tuple[str, Text, bool, Sequence[Any]]]

    def spec(self, translation: Translation) -> list[PlotSpec]:
        """Return the columns as JSON objects for page.js."""
        return [
            {"name": name, "help": translation(help), "share": is_share, "values": values}
            for name, help, is_share, values in self.columns
        ]


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that the page hides until the reader clicks the title. in_terminal: whether the terminal prints them."""

    title: Text
    blocks: "Sequence[Block]"
    in_terminal: bool = True


@dataclass(frozen=True, slots=True)
class Grid:
    """Blocks next to each other in a wide window; of a list among them, the blocks are one below the other."""

    blocks: "Sequence[Block | list[Block]]"


Block = Table | Cards | Callouts | Note | Heading | Strings | Plot | Browser | RowTable | Fold | Grid


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a page: its id (for links), title and blocks."""

    id: str
    title: Text
    blocks: Sequence[Block] = ()


def bars(
    edges: Sequence[float],
    series: Sequence[tuple[Text, Sequence[float]]],
    *,
    ticks: Sequence[tuple[float, str]] | None = None,
    marks: Sequence[float] = (),
    unit: Text = "",
    x: Text = "",
    is_share: bool = False,
    names: Sequence[str] | None = None,
) -> PlotSpec:
    """Return the spec of a histogram for `Plot`. All bins are drawn equally wide. edges: N + 1 ascending bin edges.
    series: (name, N values) of each. ticks: (edge, label) on the x axis, by default at powers of two. marks: positions
    of vertical lines; those outside the edges are omitted. unit: what the values count. x: what the edges are.
    is_share: values are shares from 0 to 1. names: of the bins, if the edges do not describe them."""
    return {
        "kind": "bars",
        "edges": list(edges),
        "series": [{"name": _in_spec(title), "y": list(values)} for title, values in series],
        "ticks": [list(tick) for tick in (ticks if ticks is not None else _round_edges(edges))],
        "marks": [[mark, str(mark)] for mark in marks if edges[0] < mark <= edges[-1]],
        "unit": _in_spec(unit),
        "x": _in_spec(x),
        "share": is_share,
        **({"names": names} if names else {}),
    }


def _in_spec(text: Text) -> Any:
    """Turn a string in a spec into a phrase: only phrases are translated when a spec is written as JSON."""
    return phrase(text) if isinstance(text, str) and text else text


def _round_edges(edges: Sequence[float]) -> list[tuple[float, str]]:
    """Return ticks, (edge, label), at the edges that are 0 or a power of two: at most eight, evenly chosen."""
    powers = [edge for edge in edges if edge == 0 or (edge >= 1 and edge == int(edge) and int(edge).bit_count() == 1)]
    step = -(-len(powers) // 8) or 1
    return [(edge, short(edge)) for edge in powers[::step]]


# --- the page


@cache
def asset(file: str) -> str:
    """Return the content of a file in assets/."""
    return files("mmdata.stats.report").joinpath("assets", file).read_text(encoding="utf-8")


def script_json(value: Any, translation: Translation | None = None) -> str:
    """Return a value as JSON for a `<script>` element, with <, >, & and line separators escaped, so that no string in
    it can end the element or begin a comment. translation: for phrases in the value, else a TypeError. ValueError for
    NaN and infinity."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=translation)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _template(file: str) -> Any:
    """Load a jinja2 template from templates/. All values are escaped, except assets and the output of `script_json`."""
    import jinja2

    directory = str(files("mmdata.stats.report").joinpath("templates"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(directory), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals |= {
        "asset": asset,
        "script_json": script_json,
        "as_name": as_name,
        "zip": zip,
        "type_of": lambda b: type(b).__name__,
    }
    return environment.get_template(file)


def render(
    title: Text,
    subtitle: Text,
    sections: Sequence[Section],
    lang: str,
    *,
    refresh_s: float | None = None,
    axes: Mapping[str, Text] | None = None,
    made: Sequence[Text] = (),
) -> str:
    """Return the report as the text of one HTML file. KeyError if a phrase has no translation. lang: "en" or "zh".
    made: lines at its end about how it was made. refresh_s: the page requests a newer version of itself every so many
    seconds; None: never. axes: the x axes to choose among for line plots: the key of each in the plots' specs, and its
    label."""
    translation = Translation(lang)
    return _template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, t=translation, refresh_s=refresh_s, axes=axes or {}, made=made,
        script_words={text: translation(text) for text in _FOR_SCRIPT},
    )  # fmt: skip
