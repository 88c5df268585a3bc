"""Figures of two datasets in, one HTML file out that puts them side by side, differences marked. Reads nothing itself."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmdata.stats.report import page
from mmdata.stats.report.page import Bar, Html, Section, Words
from mmdata.stats.report.report import CUTS, aligned, name_of, said, sections_of
from mmdata.stats.report.words import ZH
from mmdata.stats.stats import Measured
from mmdata.stats.warnings import percent
from mmdata.tokenizer import text


def compare_page(one: Measured, other: Measured, *, lang: str = "en", others: Sequence[Any] = ()) -> str:
    """The page of two datasets."""
    words = Words(lang, ZH)
    names = _two_names(one, other)
    sections = [
        Section(
            "compare",
            words("Side by side"),
            [page.callouts([said(w, words) for w in others]), _side_by_side(one.figures, other.figures, names, words)],
        ),
        Section("compare-plots", words("Shapes"), [page.grid(_overlays(one.figures, other.figures, names, words))]),
        Section(
            "compare-lists", words("What is said most"), [page.grid(_lists(one.figures, other.figures, names, words))]
        ),
    ]
    for number, (measured, name) in enumerate(zip((one, other), names, strict=True)):
        inside = [page.fold(section.title, page.join(section.blocks)) for section in sections_of(measured, words)]
        sections.append(Section(f"data-{number}", name, inside))
    return page.page(f"{names[0]} ↔ {names[1]}", f"{one.path} ↔ {other.path}", sections, words)


def _two_names(one: Measured, other: Measured) -> tuple[str, str]:
    names = name_of(one), name_of(other)
    return names if names[0] != names[1] else (str(one.path), str(other.path))


# --- figures that can stand beside each other


def comparable(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a dataset that can stand beside another's, by English phrase; shares are floats, counts integers."""
    found: dict[str, float] = {"rows": figures["kept"], "left out": sum(figures["left_out"].values())}
    for name in ("tokens", "loss_tokens", "characters", "bytes"):
        if name in figures:
            found["trained tokens" if name == "loss_tokens" else name] = figures[name]
    if "tokens" in figures:
        found["trained share"] = figures["trained_share"]
        found["characters a token"] = figures["characters_per_token"]
    for name in ("fill", "val_rows"):
        if name in figures and (name, figures["kind"]) != ("fill", "pair"):
            found["rows for val" if name == "val_rows" else name] = figures[name]
    if "epoch" in figures:
        found["epoch steps"] = figures["epoch"]["steps"]
    by = (figures.get("tokens_by") or {}).get("sequence")
    if by:
        found |= {"mean tokens": by["mean"], "half have up to tokens": by["p50"], "99 % have up to tokens": by["p99"]}
    if figures.get("duplicates"):
        number = max(1, figures["duplicates"]["rows"])
        found["exact repeats, share"] = figures["duplicates"]["exact"] / number
        if figures["duplicates"]["near"] is not None:
            found["near repeats, share"] = figures["duplicates"]["near"] / max(
                1, figures["duplicates"]["rows_compared"]
            )
    for name, count in (figures.get("languages") or {}).items():
        found[f"{name}, share of rows"] = count / max(1, sum(figures["languages"].values()))
    if figures.get("turns"):
        number = max(1, sum(figures["turns"].values()))
        found["turns a row"] = sum(int(turns) * count for turns, count in figures["turns"].items()) / number
        found["system prompts, share of rows"] = figures["systems"]["rows"] / max(1, figures["text_rows"])
        found["tools, share of rows"] = figures["tools"]["rows"] / max(1, figures["text_rows"])
    if figures.get("pairs"):
        number = max(1, figures["pairs"]["pairs"])
        found["chosen longer, share of pairs"] = figures["pairs"]["longer"].get("chosen", 0) / number
        found["chosen longer by 3×, share of pairs"] = figures["pairs"]["longer"].get("chosen by 3", 0) / number
    if figures.get("vocabulary") and figures["vocabulary"]["counted"]:
        found["tokens never seen"] = figures["vocabulary"]["never"]
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"figure", "one", "other", "change", "differs"} of everything either has; change is other over one, less 1.

    differs: by more than a tenth, or of shares by more than two points in a hundred.
    """
    left, right = comparable(one), comparable(other)
    found = []
    for name in dict.fromkeys([*left, *right]):
        a, b = left.get(name), right.get(name)
        change = None if a is None or b is None or not a else b / a - 1
        differs = a is None or b is None
        if a is not None and b is not None:
            differs = abs(b - a) > 0.02 if is_share(name) else abs(b - a) > 0.1 * max(abs(a), abs(b))
        found.append({"figure": name, "one": a, "other": b, "change": change, "differs": differs})
    return found


def is_share(name: str) -> bool:
    """Whether a figure of `comparable` is a share of 1."""
    return "share" in name or name == "fill"


def shown_value(name: str, value: float | None) -> str:
    """A figure of `comparable` as text."""
    if value is None:
        return "–"
    if is_share(name):
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def shown_change(found: Mapping[str, Any]) -> str:
    """What a difference amounts to: points of shares, percent of counts."""
    if found["one"] is None or found["other"] is None:
        return ""
    if is_share(found["figure"]):
        points = 100 * (found["other"] - found["one"])
        return "=" if abs(points) < 0.005 else f"{points:+.2f} %-p"
    if found["one"] == found["other"]:
        return "="
    return "new" if found["change"] is None else f"{100 * found['change']:+.1f} %"


def _side_by_side(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str], words: Words) -> Html:
    body = []
    for found in differences(one, other):
        name = found["figure"]
        change = shown_change(found)
        mark = "up" if change.startswith("+") else "down"
        values = "".join(
            f'<td class="num">{page.text(shown_value(name, found[side]))}</td>' for side in ("one", "other")
        )
        body.append(
            f'<tr class="{"differs" if found["differs"] else ""}"><td>{page.text(words(name))}</td>{values}'
            f'<td class="num"><b class="{mark if found["differs"] else ""}">{page.text(words.or_same(change))}</b></td></tr>'
        )
    head = "".join(f"<th>{page.text(name)}</th>" for name in ("", *names, words("difference")))
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _overlays(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str], words: Words) -> Iterator[Html]:
    def both(title: str, left: Any, right: Any, marked: bool = False) -> Iterator[Html]:
        if left and right:
            edges, series = aligned(dict(zip(names, (left, right), strict=True)))
            marks = [(cut, str(cut)) for cut in CUTS if marked and edges[0] < cut <= edges[-1]]
            yield page.plot(words(title), page.bars(edges, series, marks=marks, is_share=True))

    for title, key, inner in (
        ("Tokens of a sequence", "tokens_by", "sequence"),
        ("Characters of a row", "characters_by", "row"),
    ):
        yield from both(title, (one.get(key) or {}).get(inner), (other.get(key) or {}).get(inner), key == "tokens_by")
    for role in dict.fromkeys([*(one.get("characters_by") or {}).get("roles", {})]):
        left, right = ((f.get("characters_by") or {}).get("roles", {}).get(role) for f in (one, other))
        yield from both(f"Characters: {role}", left, right)
    for title, key, found in (("Language", "languages", text.LANGUAGES), ("Turns of a conversation", "turns", None)):
        if one.get(key) and other.get(key):
            keys = list(found or sorted({*one[key], *other[key]}, key=int))[:12]
            totals = [max(1, sum(f[key].values())) for f in (one, other)]
            rows = [
                (
                    words.or_same(k),
                    *(
                        x
                        for f, total in zip((one, other), totals, strict=True)
                        for x in (percent(f[key].get(k, 0) / total), Bar(f[key].get(k, 0) / total))
                    ),
                )
                for k in keys
            ]
            yield page.table(["", names[0], "", names[1], ""], rows, title=words(title))


def _lists(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str], words: Words) -> Iterator[Html]:
    for key, title in (("openings", "Most repeated openings"), ("ngrams", "Most repeated phrases")):
        for figures, name, against in ((one, names[0], other), (other, names[1], one)):
            known = {item["text"] for item in against.get(key) or []}
            rows = [
                (page.code(item["text"]), item["count"], "" if item["text"] in known else words("only here"))
                for item in (figures.get(key) or [])[:12]
            ]
            if rows:
                yield page.table(["", words("times"), ""], rows, title=f"{words(title)}: {name}", wrap=True)
