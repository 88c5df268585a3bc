"""The report that compares two datasets or files side by side, from figures that were measured before."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmdata.stats.report import page
from mmdata.stats.report.charts import overlaid
from mmdata.stats.report.data import CUTS, folded, how_made, name_of, warned
from mmdata.stats.report.page import Block, Column, Grid, Phrase, Section, Table, as_name, joined, phrase, verbatim
from mmdata.stats.stats import Measured
from mmdata.stats.tally import Figures
from mmdata.tokenizer.scripts import LANGUAGES


def compare_page(
    one: Measured, other: Measured, *, lang: str = "en", others: Sequence[Any] = (), command: str = ""
) -> str:
    """Return the HTML page. lang: "en" or "zh". others: warnings on both together (`stats.contained`). command: how it
    was made."""
    names = _two_names(one, other)
    sections = [
        Section("compare", "Side by side", [warned(others), side_by_side(one, other)]),
        Section("compare-plots", "Shapes", [Grid(list(_overlays(one.figures, other.figures, names)))]),
        Section("compare-lists", "What is said most", [Grid(list(_lists(one.figures, other.figures, names)))]),
        folded(0, one),
        folded(1, other),
    ]
    paths, made = [verbatim(one.path), verbatim(other.path)], how_made([one, other], command)
    return page.render(joined(names, " ↔ "), joined(paths, " ↔ "), sections, lang, made=made)


def _two_names(one: Measured, other: Measured) -> tuple[Phrase, Phrase]:
    """Return the names of both on the page: the last parts of their paths or, if these are equal, the whole paths."""
    names = name_of(one), name_of(other)
    return names if names[0] != names[1] else (verbatim(one.path), verbatim(other.path))


# --- figures that can be compared


def comparable(figures: Figures) -> dict[str, float]:
    """Return the figures of a dataset that can be compared with another's, as far as measured, by English phrase:
    counts are integers; shares (0 to 1) and means are floats."""
    values: dict[str, float] = {"rows": figures["kept"], "left out": sum(figures["left_out"].values())}
    if "tokens" in figures:
        values |= {"tokens": figures["tokens"], "trained tokens": figures["loss_tokens"]}
    values |= {"characters": figures["characters"], "bytes": figures["bytes"]}
    if "tokens" in figures:
        values["trained share"] = figures["trained_share"]
        values["characters a token"] = figures["characters_per_token"]
    if "fill" in figures and figures["kind"] != "pair":
        values["fill"] = figures["fill"]
    if "val_rows" in figures:
        values["rows for val"] = figures["val_rows"]
    if by := (figures.get("tokens_by") or {}).get("sequence"):
        values |= {"mean tokens": by["mean"], "half have up to tokens": by["p50"], "99 % have up to tokens": by["p99"]}
    if repeats := figures.get("duplicates"):
        values["exact repeats, share"] = repeats["exact"] / max(1, repeats["rows"])
        if repeats["near"] is not None:
            values["near repeats, share"] = repeats["near"] / max(1, repeats["rows_compared"])
    for language, count in (figures.get("languages") or {}).items():
        values[f"{language}, share of rows"] = count / max(1, sum(figures["languages"].values()))
    if turns := figures.get("turns"):
        of = max(1, figures["text_rows"])
        values["turns a row"] = sum(int(turn) * count for turn, count in turns.items()) / max(1, sum(turns.values()))
        values["system prompts, share of rows"] = figures["systems"]["rows"] / of
        values["tools, share of rows"] = figures["tools"]["rows"] / of
    if pairs := figures.get("pairs"):
        of = max(1, pairs["pairs"])
        values["chosen longer, share of pairs"] = pairs["longer"].get("chosen", 0) / of
        values["chosen longer by 3×, share of pairs"] = pairs["longer"].get("chosen by 3", 0) / of
    if figures.get("vocabulary") and figures["vocabulary"]["counted"]:
        values["tokens never seen"] = figures["vocabulary"]["never"]
    return values


def differences(one: Figures, other: Figures) -> list[Figures]:
    """Return [{"figure", "one", "other", "change", "differs"}] for all figures of either dataset. "change": other / one
    - 1, or None if a value is missing or the first is 0. "differs": by more than 10 % of the larger one (shares: by
    more than 0.02), or one is missing."""
    left, right = comparable(one), comparable(other)
    compared = []
    for figure in dict.fromkeys([*left, *right]):
        a, b = left.get(figure), right.get(figure)
        change = None if a is None or b is None or not a else b / a - 1
        differs = a is None or b is None
        if a is not None and b is not None:
            differs = abs(b - a) > 0.02 if _is_share(figure) else abs(b - a) > 0.1 * max(abs(a), abs(b))
        compared.append({"figure": figure, "one": a, "other": b, "change": change, "differs": differs})
    return compared


def side_by_side(one: Measured, other: Measured) -> Table:
    """Return a table of the figures of both, with the rows whose figures differ highlighted."""
    compared = differences(one.figures, other.figures)
    columns = [Column("", "word"), *(Column(each, "figure") for each in _two_names(one, other))]
    rows = [
        (each["figure"], *(_value(each["figure"], each[side]) for side in ("one", "other")), _change(each))
        for each in compared
    ]
    marked = [number for number, each in enumerate(compared) if each["differs"]]
    return Table([*columns, Column("difference", "figure")], rows, marked=marked)


def _is_share(figure: str) -> bool:
    return "share" in figure or figure == "fill"


def _value(figure: str, value: float | None) -> str | None:
    """Format the value of a figure. None, for a figure that was not measured, stays None."""
    if value is None:
        return None
    if _is_share(figure):
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _change(compared: Figures) -> Phrase:
    """Format a difference: in percentage points for shares, else in percent; "=" for equal values, "new" if the first
    is 0, empty if one is missing."""
    one, other = compared["one"], compared["other"]
    if one is None or other is None:
        return as_name("")
    if _is_share(compared["figure"]):
        points = 100 * (other - one)
        return as_name("=" if abs(points) < 0.005 else f"{points:+.2f} %-p")
    if one == other:
        return as_name("=")
    return as_name("new" if compared["change"] is None else f"{100 * compared['change']:+.1f} %")


# --- plots and lists


def _overlays(one: Figures, other: Figures, names: tuple[Phrase, Phrase]) -> Iterator[Block]:
    """Yield plots that overlay the histograms, and tables of languages and turns, of what was measured for both."""
    tokens, characters = (
        [figures.get(key) or {} for figures in (one, other)] for key in ("tokens_by", "characters_by")
    )
    roles = [by.get("roles", {}) for by in characters]
    plots = [
        ("Tokens of a sequence", [by.get("sequence") for by in tokens], CUTS),
        ("Characters of a row", [by.get("row") for by in characters], ()),
        *((f"Characters: {role}", [by.get(role) for by in roles], ()) for role in roles[0]),
    ]
    for title, (left, right), marks in plots:
        if left and right:
            yield overlaid(title, [(names[0], left), (names[1], right)], marks=marks)
    columns = [Column("", "word"), *(column for each in names for column in (Column(each, "share"), Column("", "bar")))]
    for title, key, order in (("Language", "languages", LANGUAGES), ("Turns of a conversation", "turns", None)):
        counts: list[dict[str, int]] = [figures.get(key) or {} for figures in (one, other)]
        if all(counts):
            labels = list(order or sorted({*counts[0], *counts[1]}, key=int))[:12]
            rows = []
            for label in labels:
                shares = [each.get(label, 0) / max(1, sum(each.values())) for each in counts]
                rows.append((label, *(share for share in shares for _ in ("figure", "bar"))))
            yield Table(columns, rows, title)


def _lists(one: Figures, other: Figures, names: tuple[Phrase, Phrase]) -> Iterator[Block]:
    """Yield tables of the most frequent openings and phrases of each dataset, marking those that the other lacks."""
    for key, title in (("openings", "Most repeated openings"), ("ngrams", "Most repeated phrases")):
        for figures, label, against in ((one, names[0], other), (other, names[1], one)):
            shared = {item["text"] for item in against.get(key) or []}
            rows = [
                (item["text"], item["count"], "" if item["text"] in shared else "only here")
                for item in (figures.get(key) or [])[:12]
            ]
            if rows:
                columns = [Column("", "code"), Column("times", "count"), Column("", "word")]
                yield Table(columns, rows, joined([phrase(title), label], ": "), wrap=True)
