"""The parts of a report, and the page they are drawn on.

A report is a list of sections, a section a list of blocks: tables with typed columns, cards, plots, notes. Blocks hold figures and
English phrases. `render` draws them as one HTML file, translated, with jinja2 (autoescape on): style, script and plotting library
are part of the file, and its content security policy forbids every request. Plots are drawn by uPlot (MIT, in assets/). The
terminal draws the same blocks (`mmdata.commands.terminal.print_sections`). Imports nothing of ours.
"""

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

LANGS = ("en", "zh")
_FOR_SCRIPT = (  # phrases that page.js uses
    "reset zoom", "trained", "not trained", "control token", "line", "characters", "tokens", "more tokens not shown",
    "more characters not shown", "loss", "random", "longest", "shortest", "highest loss", "system", "user", "assistant",
    "tool", "document", "prompt", "chosen", "rejected", "all", "no data", "auto", "light", "dark",
)  # fmt: skip


# --- text and its translation


@dataclass(frozen=True, slots=True)
class Phrase:
    """An English phrase and the values of its {names}; a value that is a phrase or a word reports know is translated too.

    A phrase must have a translation, unless it `is_name`: text that may come from the data. key: what it is translated by, if
    not by itself.
    """

    text: str
    values: Mapping[str, Any] = field(default_factory=dict)
    is_name: bool = False
    key: str = ""


Text = str | Phrase  # a plain string is an English phrase


def phrase(text: str, /, **values: Any) -> Phrase:
    """A phrase with values for its {names}."""
    return Phrase(text, values)


def as_name(text: object, key: str = "") -> Phrase:
    """Text from the data: translated if the reports know it (a role, a language), else shown as it is."""
    return Phrase(str(text), is_name=True, key=key)


def joined(pieces: Sequence[Text], separator: str = " · ") -> Phrase:
    """Several texts as one."""
    values = {f"piece_{i}": piece for i, piece in enumerate(pieces)}
    return Phrase(separator.join(f"{{{key}}}" for key in values), values, is_name=True)


class Translation:
    """Phrases in the language of a page. Chinese ones are in assets/zh.json, by their English text."""

    def __init__(self, lang: str):
        assert lang in LANGS, lang
        self.lang = lang
        self._table: dict[str, str] = {} if lang == "en" else json.loads(asset(f"{lang}.json"))

    def __call__(self, text: Text) -> str:
        """The translated text. KeyError if a phrase has no translation."""
        if isinstance(text, str):
            text = Phrase(text)
        if text.is_name or self.lang == "en" or not text.text:
            template = self._table.get(text.key or text.text, text.text)
        else:
            template = self._table[text.text]
        values = {key: self._value(value) for key, value in text.values.items()}
        return template.format(**values) if values else template

    def _value(self, value: Any) -> Any:
        return self(value) if isinstance(value, Phrase) else self._table.get(value, value)


# --- how values are shown


def percent(share: float) -> str:
    """A share as people read it: 31 %, 0.4 %."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def size(num_bytes: float) -> str:
    """Bytes as people write them: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(hours: float) -> str:
    """Hours as people say them: 4.2 s, 3 m 05 s, 2 h 10 m."""
    if hours * 3600 < 10:
        return f"{hours * 3600:.1f} s"
    seconds = round(hours * 3600)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} m {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} m"


def short(number: float) -> str:
    """A number as an axis shows it: 512, 2k, 1.5M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1024 if number % 1024 == 0 else 1000
    return f"{number:.3g}T"


# Kinds of columns that hold numbers, or text that reads as one ("figure"), and how a value is written.
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
    """A column of a table. kind: a key of NUMBERS, or

    - "text": shown as it is; "word": translated if the reports know it; "code": text of rows or names, in a box
    - "bar": a share of 1, drawn as a bar
    - "noted": a list of (text, note) pairs, the note small and translated if the reports know it
    """

    name: Text = ""
    kind: str = "text"

    def show(self, value: Any, translation: Translation) -> str:
        """A value as text. None is shown as a dash."""
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
        """Whether values are aligned right."""
        return self.kind in NUMBERS


# --- blocks


@dataclass(frozen=True, slots=True)
class Table:
    """A table. wrap: the first column may break anywhere. marked: numbers of the rows drawn as standing out."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    title: Text = ""
    wrap: bool = False
    marked: Collection[int] = ()

    def texts(self, row: Sequence[Any], translation: Translation) -> list[str]:
        """The cells of a row as text."""
        return [column.show(value, translation) for column, value in zip(self.columns, row, strict=True)]


@dataclass(frozen=True, slots=True)
class Cards:
    """Figures in large: (label, value, a hint that is drawn small)."""

    items: Sequence[tuple[Text, str, Text]]


@dataclass(frozen=True, slots=True)
class Callouts:
    """Warnings, a line each."""

    lines: Sequence[Text]


@dataclass(frozen=True, slots=True)
class Note:
    """A small paragraph. in_terminal: the terminal prints it too."""

    text: Text
    in_terminal: bool = False


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading inside a section."""

    text: Text


PlotSpec = dict[str, Any]  # what page.js draws a plot from (docs/reports.md), or a part of it


@dataclass(frozen=True, slots=True)
class Strings:
    """Short strings one after another, each in a box."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of a spec (docs/reports.md describes them; phrases in it are translated). in_terminal: the terminal draws it."""

    title: Text
    spec: PlotSpec
    note: Text = ""
    in_terminal: bool = False

    def as_table(self) -> Table:
        """A histogram of one series as a table with bars; bins without values are left out."""
        (series,), edges = self.spec["series"], self.spec["edges"]
        is_share = isinstance(edges[1], float)
        ends = [f"{100 * edge:.0f} %" if is_share else f"{edge:,}" for edge in edges]
        names = self.spec.get("names") or [f"{low} - {high}" for low, high in itertools.pairwise(ends)]
        most = max(series["y"]) or 1
        rows = [(label, count, count / most) for label, count in zip(names, series["y"], strict=True) if count]
        return Table([Column(), Column(series["name"], "count"), Column("", "bar")], rows, self.title)


@dataclass(frozen=True, slots=True)
class Browser:
    """Samples to page through, drawn as chats: records of `samples.records`."""

    samples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks below a title that opens them. in_terminal: the terminal prints them too."""

    title: Text
    blocks: "Sequence[Block]"
    in_terminal: bool = True


@dataclass(frozen=True, slots=True)
class Grid:
    """Blocks beside each other where there is room; a list of blocks stays one below the other."""

    blocks: "Sequence[Block | list[Block]]"


Block = Table | Cards | Callouts | Note | Heading | Strings | Plot | Browser | Fold | Grid


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page: an id for links, a title, and blocks."""

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
    is_share: bool = False,
    names: Sequence[str] | None = None,
) -> PlotSpec:
    """Spec of a histogram: values[i] counts what lies from edges[i] to edges[i + 1]; all bins are drawn equally wide.

    ticks: (edge, label), by default at powers of two. marks: values drawn as vertical lines. is_share: values are shares of 1.
    names: of the bins, where their edges are none that a reader knows.
    """
    return {
        "kind": "bars",
        "edges": list(edges),
        "series": [{"name": _in_spec(title), "y": list(values)} for title, values in series],
        "ticks": [list(tick) for tick in (ticks if ticks is not None else _round_edges(edges))],
        "marks": [[mark, str(mark)] for mark in marks if edges[0] < mark <= edges[-1]],
        "unit": _in_spec(unit),
        "share": is_share,
        **({"names": names} if names else {}),
    }


def _in_spec(text: Text) -> Any:
    """A phrase that is translated when the spec is written as JSON; plain strings in a spec are not."""
    return phrase(text) if isinstance(text, str) and text else text


def _round_edges(edges: Sequence[float]) -> list[tuple[float, str]]:
    """Powers of two among the edges, at most eight."""
    powers = [edge for edge in edges if edge == 0 or (edge >= 1 and edge == int(edge) and int(edge).bit_count() == 1)]
    step = -(-len(powers) // 8) or 1
    return [(edge, short(edge)) for edge in powers[::step]]


# --- the page


@cache
def asset(file: str) -> str:
    """The text of a file in assets/."""
    return files("mmdata.stats.report").joinpath("assets", file).read_text(encoding="utf-8")


def script_json(value: Any, translation: Translation | None = None) -> str:
    """JSON for a script element, phrases translated: nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=translation)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _template(file: str) -> Any:
    """A compiled template of templates/; all values are escaped but those marked safe: assets and `script_json`."""
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
) -> str:
    """The whole file. axes: what plots of lines can be drawn over, by its name in their specs; the reader chooses.

    refresh_s: the page asks the address it came from for a newer version every so many seconds, and redraws.
    """
    translation = Translation(lang)
    return _template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, t=translation, refresh_s=refresh_s, axes=axes or {},
        script_words={text: translation(text) for text in _FOR_SCRIPT},
    )  # fmt: skip
