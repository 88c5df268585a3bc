"""The sections of the report on data that are about texts: languages, repetition, vocabulary, conversations, pairs."""

from collections.abc import Iterator

from mmdata.stats.report import page
from mmdata.stats.report.charts import histogram, overlaid, share_plot, shares, strings
from mmdata.stats.report.page import (
    Block,
    Cards,
    Column,
    Fold,
    Grid,
    Note,
    Plot,
    Strings,
    Table,
    as_name,
    percent,
    phrase,
)
from mmdata.stats.tally import Figures

# Labels of the x axis of the histogram of ratios chosen / rejected: the key is 2 log2(ratio).
_RATIOS = {-8: "1/16", -4: "1/4", -2: "1/2", 0: "1", 2: "2", 4: "4", 8: "16"}


def language(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Languages and scripts"."""
    tables: list[Block] = [shares("language", figures["languages"])] if figures.get("languages") else []
    if figures.get("scripts"):
        ordered = sorted(figures["scripts"].items(), key=lambda item: -item[1]["characters"])
        tables.append(shares("script", {key: each["characters"] for key, each in ordered}, unit="characters"))
    if tables:
        yield Grid(tables)
    if figures.get("token_scripts"):
        table = shares("script", {}, unit="tokens")
        columns = [*table.columns, Column("characters a token", "decimal2"), Column("bytes a token", "decimal2")]
        keys = ("tokens", "share", "share", "characters_per_token", "bytes_per_token")
        ordered = sorted(figures["token_scripts"].items(), key=lambda item: -item[1]["tokens"])
        yield Table(columns, [(key, *(each[part] for part in keys)) for key, each in ordered])
    yield Note(
        "The language of a row is a rule of thumb by its scripts and commonest words; scripts are counted exactly."
    )


def repetition(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Repetition": duplicates, and the most repeated openings and phrases."""
    if repeats := figures.get("duplicates"):
        number = max(1, repeats["rows"])
        cards: list[tuple[str, str, page.Text]] = [
            ("exact repeats", f"{repeats['exact']:,}", as_name(percent(repeats["exact"] / number)))
        ]
        if repeats["near"] is not None:
            compared = phrase("of {value}", value=f"{repeats['rows_compared']:,}")
            cards.append(("near repeats", f"{repeats['near']:,}", compared))
            cards.append(("rows without their like", f"{number - repeats['exact'] - repeats['near']:,}", ""))
        yield Cards(cards)
        if repeats["near"] is not None:
            text = (
                "Exact: the same roles and texts as an earlier row. Near: about {share} or more of their 8-character "
                "pieces in common (estimated by MinHash)."
            )
            yield Note(phrase(text, share=percent(repeats["near_from"])))
    lists = (("openings", "Most repeated openings", "times"), ("ngrams", "Most repeated phrases", "rows"))
    tables = [strings(figures[key], unit, title, bar=True) for key, title, unit in lists if figures.get(key)]
    if tables:
        yield Grid(tables)
        text = (
            "Openings are the first {characters} characters of each document or answer; phrases are runs of {units} words "
            "or Chinese characters, counted once a row, in {rows} rows."
        )
        yield Note(phrase(text, characters=20, units=8, rows=f"{figures.get('ngram_rows', 0):,}"))


def vocabulary(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Vocabulary": which tokens occur, and how often. Nothing if no tokens were counted."""
    used = figures.get("vocabulary")
    if not used or not used["counted"]:
        return
    cards: list[tuple[page.Text, str, page.Text]] = [
        ("vocabulary", f"{used['size']:,}", ""),
        ("seen", f"{used['seen']:,}", ""),
        ("never seen", f"{used['never']:,}", as_name(percent(used["never"] / used["size"]))),
    ]
    for share, number in used["cover"].items():
        cards.append((phrase("cover {share} % of the text", share=share), f"{number:,}", "most frequent tokens"))
    yield Cards(cards)
    times = {"name": phrase("times"), "x": {"rank": used["ranks"]}, "y": [count or None for count in used["by_rank"]]}
    spec = {
        "kind": "lines",
        "axes": {"rank": {"label": phrase("rank")}},
        "series": [times],
        "unit": phrase("times"),
        "logx": True,
        "logy": True,
    }
    left: list[Block] = [Plot("How often the tokens of each rank occur", spec)]
    columns = [Column(as_name("id"), "count"), Column("times", "count")]
    if control := [(item["text"], item["id"], item["count"]) for item in used["control"] if item["count"]]:
        left.append(Table([Column("special token", "code"), *columns], control))
    most = used["top"][0]["count"]
    top = [(_visible(item["text"]), item["id"], item["count"], item["count"] / most) for item in used["top"]]
    yield Grid([left, Table([Column("top token", "code"), *columns, Column("", "bar")], top)])
    if unused := used["never_ids"]:
        title = phrase("Tokens never seen (the first {number})", number=len(unused))
        yield Fold(title, [Strings([_visible(item["text"]) for item in unused])])


def _visible(text: str) -> str:
    return text.translate({ord(" "): "␣", ord("\n"): "⏎", ord("\t"): "⇥", ord("\r"): "␍"})


def conversations(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Conversations": turns, system prompts and tools. Nothing if the rows are documents."""
    if not figures.get("turns"):
        return
    turns = dict(list(figures["turns"].items())[:12])
    total = sum(figures["turns"].values())
    systems, tools, of = figures["systems"], figures["tools"], max(1, figures["text_rows"])
    cards = Cards(
        [
            ("with a system prompt", f"{systems['rows']:,}", as_name(percent(systems["rows"] / of))),
            ("different system prompts", f"{systems['different']:,}", ""),
            ("with tools", f"{tools['rows']:,}", as_name(percent(tools["rows"] / of))),
            ("tool calls", f"{tools['calls']:,}", ""),
            ("messages with reasoning", f"{figures['reasoning']:,}", ""),
        ]
    )
    yield Grid([shares("turns", turns, total=total, caption="Turns of a conversation"), cards])
    lists = (("system prompt", systems["top"][:10]), ("tool", tools["top"]))
    if tables := [strings(items, "rows", first=title) for title, items in lists if items]:
        yield Grid(tables)


def pairs(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Pairs": how the two replies differ. Nothing for rows of another kind."""
    pairs, by_tokens = figures.get("pairs"), (figures.get("tokens_by") or {}).get("pair")
    plots: list[Block] = []
    if pairs:
        labels = {
            "chosen": "the chosen is longer",
            "rejected": "the rejected is longer",
            "chosen by 3": "the chosen by more than 3×",
            "rejected by 3": "the rejected by more than 3×",
        }
        numbers = {label: pairs["longer"].get(key, 0) for key, label in labels.items()}
        of = max(1, pairs["pairs"])
        yield Cards([(label, percent(number / of), as_name(f"{number:,}")) for label, number in numbers.items()])
        ratios = page.bars(
            range(-8, 10),
            [("pairs", [pairs["ratios"][str(k)] for k in range(-8, 9)])],
            ticks=[(k + 0.5, label) for k, label in _RATIOS.items()],
            unit="pairs",
            x="chosen / rejected",
            names=["≤ 1/16", *(f"{2 ** (k / 2):.2g}" for k in range(-7, 8)), "≥ 16"],
        )
        plots.append(Plot("Length of the chosen answer over the rejected one's", ratios, in_terminal=True))
        plots.append(share_plot("Likeness of the two answers", pairs["similarity"], "pairs", num_ticks=5))
    if by_tokens:
        plots.append(overlaid("Tokens of prompt and answers", by_tokens))
    if pairs and pairs["margins"]:
        plots.append(histogram("Characters the answers differ by", pairs["margins"], "pairs"))
    if plots:
        yield Grid(plots)
        yield Note("Likeness: common 8-character pieces over all pieces of both answers (Jaccard).")
