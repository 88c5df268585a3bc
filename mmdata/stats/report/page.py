"""Sections in, one HTML file out that needs nothing else: style, script and plotting library stand in it. Imports nothing of ours.

All text is escaped here, once; data for plots travels as JSON that no text can end. A content policy in the page forbids
every request that leaves it. Plots are drawn by uPlot (MIT, vendored in assets/).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

LANGS = ("en", "zh")

_ZH = {
    "Theme": "主题",
    "auto": "自动",
    "light": "浅色",
    "dark": "深色",
    "Contents": "目录",
    "reset zoom": "还原缩放",
    "previous": "上一条",
    "next": "下一条",
    "token boundaries": "显示词元边界",
    "all": "全部",
    "trained": "参与训练",
    "not trained": "不参与训练",
    "control token": "控制词元",
    "line": "行",
    "characters": "字符",
    "tokens": "词元",
    "more tokens not shown": "个词元未显示",
    "more characters not shown": "个字符未显示",
    "loss": "损失",
    "random": "随机",
    "longest": "最长",
    "shortest": "最短",
    "highest loss": "损失最高",
    "system": "系统",
    "user": "用户",
    "assistant": "助手",
    "tool": "工具",
    "document": "文档",
    "prompt": "提示",
    "chosen": "优选",
    "rejected": "次选",
    "drag to zoom, double-click to reset": "拖动放大，双击还原",
    "no data": "无数据",
    "This page needs JavaScript for its plots; its tables do not.": "图表需要 JavaScript，表格不需要。",
}
_FOR_SCRIPT = (
    "reset zoom", "trained", "not trained", "control token", "line", "characters", "tokens", "more tokens not shown",
    "more characters not shown", "loss", "random", "longest", "shortest", "highest loss", "system", "user", "assistant",
    "tool", "document", "prompt", "chosen", "rejected", "all", "no data", "auto", "light", "dark",
)  # fmt: skip


class Words:
    """Says an English phrase in the page's language; `table` gives the phrases of a report besides the page's own."""

    def __init__(self, lang: str, table: Mapping[str, str]):
        assert lang in LANGS, lang
        self.lang = lang
        self._table = {**_ZH, **table}

    def __call__(self, phrase: str, **values: Any) -> str:
        """The phrase, its {names} filled in. A phrase without a translation is a mistake of ours."""
        said = phrase if self.lang == "en" else self._table[phrase]
        return said.format(**values) if values else said

    def or_same(self, phrase: str) -> str:
        """The phrase where it is known, else itself: names that data may bring too."""
        return phrase if self.lang == "en" else self._table.get(phrase, phrase)


class Html(str):
    """Text that is HTML already; everything else is escaped."""


def text(value: Any) -> Html:
    """A value as escaped text."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def join(pieces: Iterable[Any]) -> Html:
    """Pieces one after another."""
    return Html("".join(text(piece) for piece in pieces))


def to_script_json(value: Any) -> Html:
    """JSON that may stand in a script element: nothing in it can end the element or open a comment."""
    found = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        found = found.replace(character, f"\\u{ord(character):04x}")
    return Html(found)


# --- what sections are made of


def paragraph(said: Any, *, kind: str = "") -> Html:
    """A paragraph; kind "note" is small and grey."""
    return Html(f'<p class="{kind}">{text(said)}</p>')


def cards(items: Iterable[tuple[Any, Any, Any]]) -> Html:
    """Figures in large: (label, value, what stands small below)."""
    inside = join(
        Html(
            f'<div class="card"><div class="label">{text(label)}</div><div class="value">{text(value)}</div>'
            f'<div class="hint">{text(hint)}</div></div>'
        )
        for label, value, hint in items
    )
    return Html(f'<div class="cards">{inside}</div>')


def callouts(said: Sequence[str]) -> Html:
    """Warnings, a line each."""
    return (
        Html('<ul class="callouts">' + "".join(f"<li>{text(one)}</li>" for one in said) + "</ul>") if said else Html()
    )


@dataclass(frozen=True, slots=True)
class Bar:
    """A cell drawn as a bar of `share` of the column's width, with its text."""

    share: float
    said: str = ""


def table(columns: Sequence[Any], rows: Iterable[Sequence[Any]], *, title: Any = "", wrap: bool = False) -> Html:
    """A table: the first column left, numbers right, bars and long texts left. `wrap` lets the first column break anywhere."""
    cells = [[_cell(cell, i) for i, cell in enumerate(row)] for row in rows]
    body = ["<tr>" + "".join(row) + "</tr>" for row in cells]
    is_left = [not any(row[i].startswith('<td class="num"') for row in cells[:3]) for i in range(len(columns))]
    head = "".join(
        f"<th{' class=left' if left else ''}>{text(name)}</th>" for name, left in zip(columns, is_left, strict=True)
    )
    head = head if any(columns) else ""
    caption = f"<caption>{text(title)}</caption>" if title else ""
    return Html(
        f'<div class="scroll"><table class="{"wrap" if wrap else ""}">{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(cell: Any, index: int) -> str:
    if isinstance(cell, Bar):
        width = f"{100 * min(max(cell.share, 0), 1):.2f}"
        return f'<td class="bar"><span class="track"><i style="width:{width}%"></i></span>{text(cell.said)}</td>'
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f'<td class="num">{cell:,}</td>'
    is_number = index > 0 and not isinstance(cell, Html) and str(cell)[:1] in "0123456789-+–−~≈"
    if is_number and len(str(cell)) < 16:
        return f'<td class="num">{text(cell)}</td>'
    is_short = not isinstance(cell, Html) and len(str(cell)) < 14
    return f"<td{' class=short' if is_short else ''}>{text(cell)}</td>"


def code(said: str) -> Html:
    """Text of rows: as it is, in a box that breaks lines and isolates its direction."""
    return Html(f'<bdi class="raw">{escape(said)}</bdi>')


def fold(title: Any, inside: Any) -> Html:
    """Something to open."""
    return Html(f"<details><summary>{text(title)}</summary>{text(inside)}</details>")


def grid(blocks: Iterable[Any]) -> Html:
    """Blocks beside each other where there is room."""
    return Html('<div class="grid">' + join(blocks) + "</div>")


def plot(title: Any, spec: Mapping[str, Any], *, note: Any = "") -> Html:
    """A plot by its spec (see docs/reports.md): {"kind": "bars" | "lines", "series": [{"name", …}], …}."""
    small = f'<p class="note">{text(note)}</p>' if note else ""
    return Html(
        f'<figure class="plot"><figcaption>{text(title)}</figcaption><div class="legend"></div>'
        f'<div class="canvas" role="img" aria-label="{text(title)}"></div>{small}'
        f'<script type="application/json">{to_script_json(spec)}</script></figure>'
    )


def bars(
    edges: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    ticks: Sequence[tuple[float, str]] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    unit: str = "",
    is_share: bool = False,
) -> dict[str, Any]:
    """Spec of a histogram: values[i] counts what lies from edges[i] to edges[i + 1]; all bins are drawn equally wide.

    marks: vertical lines with a label. is_share: values are shares of 1. ticks: (edge, label), by default round edges.
    """
    return {
        "kind": "bars",
        "edges": list(edges),
        "series": [{"name": name, "y": list(values)} for name, values in series.items()],
        "ticks": [list(tick) for tick in (ticks if ticks is not None else _round_edges(edges))],
        "marks": [list(mark) for mark in marks],
        "unit": unit,
        "share": is_share,
    }


def _round_edges(edges: Sequence[float]) -> list[tuple[float, str]]:
    """Powers of two among the edges, few enough to stand beside each other."""
    powers = [edge for edge in edges if edge == 0 or (edge >= 1 and edge == int(edge) and int(edge).bit_count() == 1)]
    step = -(-len(powers) // 8) or 1
    return [(edge, short(edge)) for edge in powers[::step]]


def short(number: float) -> str:
    """A number as an axis shows it: 512, 2k, 1.5M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1024 if number % 1024 == 0 else 1000
    return f"{number:.3g}T"


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page: an id for links, a title, and blocks made by the functions above."""

    id: str
    title: str
    blocks: Sequence[Any] = field(default_factory=tuple)


@cache
def _asset(name: str) -> str:
    return files("mmdata.stats.report").joinpath("assets", name).read_text(encoding="utf-8")


def browser(samples: Sequence[Mapping[str, Any]], words: Words) -> Html:
    """Samples to leaf through, each drawn as a chat (records of `samples.records`)."""
    return Html(
        '<div class="browser"><div class="controls">'
        f'<select class="why" aria-label="{text(words("all"))}"></select>'
        f'<button class="back" type="button">‹ <span>{text(words("previous"))}</span></button>'
        f'<span class="place"></span><button class="on" type="button"><span>{text(words("next"))}</span> ›</button>'
        f'<label><input type="checkbox" class="edges"> {text(words("token boundaries"))}</label></div>'
        f'<div class="sample"></div><script type="application/json">{to_script_json(samples)}</script></div>'
    )


def page(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    words: Words,
    *,
    refresh_s: float | None = None,
    controls: Html | None = None,
) -> str:
    """The whole file. refresh_s: the page asks the address it came from for news, and redraws when there are some."""
    links = join(Html(f'<a href="#{text(s.id)}">{text(s.title)}</a>') for s in sections)
    body = join(
        Html(f'<section id="{text(s.id)}"><h2>{text(s.title)}</h2>{join(s.blocks)}</section>') for s in sections
    )
    said = {phrase: words(phrase) for phrase in _FOR_SCRIPT}
    lang = {"en": "en", "zh": "zh-CN"}[words.lang]
    connect = "'self'" if refresh_s else "'none'"
    follow = f' data-refresh="{refresh_s}"' if refresh_s else ""
    return f"""<!doctype html>
<html lang="{lang}"{follow}>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src {connect}">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{_asset("uPlot.min.css")}{_asset("page.css")}</style>
</head>
<body>
<header><div class="head"><h1><bdi>{text(title)}</bdi></h1>
<button id="theme" type="button" aria-label="{text(words("Theme"))}"></button></div>
<p class="subtitle"><bdi>{text(subtitle)}</bdi></p></header>
<nav aria-label="{text(words("Contents"))}">{links}</nav>
<noscript><p class="note">{text(words("This page needs JavaScript for its plots; its tables do not."))}</p></noscript>
{controls or ""}<main>{body}</main>
<script type="application/json" id="words">{to_script_json(said)}</script>
<script>{_asset("uPlot.iife.min.js")}</script>
<script>{_asset("page.js")}</script>
</body>
</html>
"""
