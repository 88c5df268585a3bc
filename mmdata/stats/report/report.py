"""Figures in, one HTML file of data statistics out: of a dataset or of several. Reads nothing itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmdata.shards.dataset import REPORT
from mmdata.stats.report import page
from mmdata.stats.report.page import Bar, Html, Section, Words
from mmdata.stats.report.words import ZH
from mmdata.stats.stats import Measured
from mmdata.stats.warnings import WARNINGS, percent

FILE = REPORT
MOST_STRINGS = 40
FROM_SHARDS = (
    "Texts were decoded from the shards, for the inputs are gone, have changed or are compressed: what packing cut is not in "
    "them, and what the template added may be."
)
CUTS = (512, 1024, 2048)


def dataset_page(measured: Sequence[Measured], *, lang: str = "en", others: Sequence[Any] = ()) -> str:
    """The report of one path, or of several. others: warnings on all together (`stats.contained`)."""
    words = Words(lang, ZH)
    if len(measured) == 1:
        one = measured[0]
        return page.page(name_of(one), _subtitle(one.figures, words), list(sections_of(one, words)), words)
    sections = [_overview(measured, others, words)]
    for number, one in enumerate(measured):
        few = replace(one, samples=one.samples[:: -(-len(measured) // 3)])  # the page stays below 2 MB
        inside = [page.fold(section.title, page.join(section.blocks)) for section in sections_of(few, words)]
        subtitle = page.paragraph(_subtitle(one.figures, words), kind="note")
        sections.append(Section(f"data-{number}", name_of(one), [subtitle, *inside]))
    title = words("{number} datasets", number=len(measured))
    return page.page(title, ", ".join(str(one.path) for one in measured), sections, words)


def said(warning: Mapping[str, Any], words: Words) -> str:
    """A warning's sentence in the page's language."""
    values = {
        name: words.or_same(value) if isinstance(value, str) else value for name, value in warning["values"].items()
    }
    return words(WARNINGS[warning["code"]], **values)


def name_of(measured: Measured) -> str:
    """What a dataset or file is called on the page: the last part of its path."""
    return measured.path.resolve().name


def _subtitle(figures: Mapping[str, Any], words: Words) -> str:
    pieces = [figures["path"], words(figures["kind"] + " rows")]
    if "max_len" in figures:
        pieces.append(words("packed up to {max_len} tokens", max_len=f"{figures['max_len']:,}"))
    return " · ".join(pieces)


def sections_of(measured: Measured, words: Words) -> Iterator[Section]:
    """Every section that the figures have something for."""
    figures = measured.figures
    yield Section("glance", words("At a glance"), list(_glance(figures, words)))
    if measured.samples:
        yield Section("samples", words("Samples"), [page.browser(measured.samples, words)])
    for id, title, make in (
        ("lengths", "Lengths", _lengths),
        ("cuts", "Where to cut", _cut_table),
        ("packing", "Packing", _packing),
        ("language", "Languages and scripts", _language),
        ("duplicates", "Repetition", _repetition),
        ("vocabulary", "Vocabulary", _vocabulary),
        ("conversations", "Conversations", _conversations),
        ("pairs", "Pairs", _pairs),
        ("sources", "Sources", _sources),
        ("aside", "Set aside", _aside),
    ):
        blocks = [block for block in make(figures, words) if block]
        if blocks:
            yield Section(id, words(title), blocks)


# --- at a glance


def glance(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that stand first, as (label, value, hint) in English phrases; the terminal shows the same ones."""
    about = "≈ " if "sample" in figures and "tokens_in" not in figures else ""
    found = [("rows", f"{figures['kept']:,}", _left_hint(figures))]
    if "tokens" in figures:
        found.append(
            ("tokens", f"{about}{figures['tokens']:,}", f"{figures['characters_per_token']:.2f} characters each")
        )
        share = f"{100 * figures['trained_share']:.1f} % of the tokens"
        found.append(("trained tokens", f"{about}{figures['loss_tokens']:,}", share))
    found.append(("characters", f"{figures['characters']:,}", ""))
    found.append(("bytes", size(figures["bytes"]), f"{figures['bytes']:,}"))
    if "fill" in figures and figures["kind"] != "pair":  # pairs are packed to a budget of tokens, never padded
        found.append(("fill", f"{100 * figures['fill']:.2f} %", f"{100 * figures['waste']:.2f} % padding"))
    if "epoch" in figures:
        steps = figures["epoch"]["steps"]
        found.append(("epoch steps", f"{about}{steps:,}", f"of {figures['epoch']['batch_tokens']:,} tokens"))
    if "val_rows" in figures:
        found.append(
            ("rows for val", f"{figures['val_rows']:,}", percent(figures["val_rows"] / max(1, figures["kept"])))
        )
    return found


def _left_hint(figures: Mapping[str, Any]) -> str:
    return f"of {figures['rows']:,}" if figures["rows"] != figures["kept"] else ""


def size(num_bytes: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


_HINTS = (" characters each", " % of the tokens", " % padding", " tokens", "of ")


def _hint(hint: str, words: Words) -> str:
    """A hint of `glance` in the page's language."""
    if words.lang == "en" or not hint:
        return hint
    for ending in _HINTS[:3]:
        if hint.endswith(ending):
            return words("{value}" + ending, value=hint.removesuffix(ending))
    if hint.startswith("of ") and hint.endswith(" tokens"):
        return words("of {value} tokens", value=hint[3:-7])
    return words("of {value}", value=hint[3:]) if hint.startswith("of ") else hint


def _glance(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    yield page.cards((words(label), value, _hint(hint, words)) for label, value, hint in glance(figures))
    yield page.callouts([said(warning, words) for warning in figures["warnings"]])
    if "sample" in figures:
        sample = figures["sample"]
        number, of = f"{sample['rows']:,}", f"{sample['of']:,}"
        if "tokens_in" in figures:
            phrase = "Texts, samples and use of the vocabulary are those of {number} of {of} rows; counts, lengths and packing are exact. `mm stats {path} --html FILE` reads every row."
            yield page.paragraph(words(phrase, number=number, of=of, path=figures["path"]), kind="note")
        else:
            phrase = "Tokens are those of {number} of {of} rows, scaled by characters; texts were all read. --exact tokenizes every row."
            yield page.paragraph(words(phrase, number=number, of=of), kind="note")
    if figures.get("texts_from") == "shards":
        yield page.paragraph(words(FROM_SHARDS), kind="note")
    yield from _losses(figures, words)


def most(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The most frequent strings: there may be as many as rows."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_STRINGS]


def _help(item: Mapping[str, Any], words: Words) -> str:
    """What helps against a reason, in the page's language where it is known there."""
    key = f"help: {item['reason']}"
    said = words.or_same(key)
    return item["help"] if said == key else said


def _losses(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    """What was left out and what was cut, by reason."""
    rows = [
        (
            words.or_same(item["reason"]),
            item["rows"],
            percent(item["share"]),
            _help(item, words),
        )
        for item in figures["set_aside"]
    ]
    if rows:
        columns = ("left out", "rows", "share", "what helps")
        yield page.table([words(name) for name in columns], rows)
    cut = [
        (
            words.or_same(reason),
            count,
            percent(count / max(1, figures["tokens_in"])),
            Bar(count / max(1, figures["tokens_in"])),
        )
        for reason, count in figures.get("cut", {}).items()
    ]
    if cut:
        yield page.table([words("cut"), words("tokens"), words("share"), ""], cut)
    if figures.get("control_strings"):
        rows = [(page.code(text), count) for text, count in most(figures["control_strings"])]
        title = words("Control strings in content, packed as plain text")
        yield page.fold(
            f"{title} ({len(figures['control_strings']):,})", page.table([words("string"), words("times")], rows)
        )
    if figures.get("extra_keys"):
        rows = [(page.code(key), count) for key, count in figures["extra_keys"].items()]
        yield page.fold(words("Keys of rows that are ignored"), page.table([words("key"), words("rows")], rows))


# --- lengths


def _lengths(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    by_tokens, by_characters = figures.get("tokens_by"), figures.get("characters_by")
    plots = []
    if by_tokens and by_tokens["sequence"]:
        title = "Tokens of a pair's longer side" if figures["kind"] == "pair" else "Tokens of a sequence"
        plots.append(_length_plot(words(title), by_tokens["sequence"], words("sequences"), marked=True))
    if by_characters and by_characters["row"]:
        plots.append(_length_plot(words("Characters of a row"), by_characters["row"], words("rows")))
    if (
        by_tokens and figures["kind"] != "pair" and len(by_tokens.get("buckets", ())) > 1
    ):  # a pair's bucket is its length
        buckets = {f"{int(bucket):,}": found for bucket, found in by_tokens["buckets"].items()}
        plots.append(_many_plot(words("Tokens of a sequence, by bucket"), buckets, words, marked=True))
    if by_tokens and by_tokens["roles"]:
        plots.append(_many_plot(words("Tokens of a message, by role"), by_tokens["roles"], words, marked=True))
    if by_characters and len(by_characters["roles"]) > 1:
        plots.append(_many_plot(words("Characters of a message, by role"), by_characters["roles"], words))
    if by_tokens and len(by_tokens["turns"]) > 1:
        turns = {words("turn {number}", number=turn): found for turn, found in list(by_tokens["turns"].items())[:4]}
        plots.append(_many_plot(words("Tokens of an answer, by turn"), turns, words))
    if figures.get("trained_shares") and figures["kind"] != "document":
        plots.append(_share_plot(words("Trained share of a sequence"), figures["trained_shares"], words("sequences")))
    if plots:
        yield page.grid(plots)
    rows = []
    for unit, found in (("characters", by_characters), ("tokens", by_tokens)):
        for name, lengths in _named_lengths(found or {}, words):
            quantiles = [lengths[key] for key in ("shortest", "p50", "p90", "p99", "longest")]
            rows.append((f"{name}", words(unit), lengths["count"], f"{lengths['mean']:,.1f}", *quantiles))
    if rows:
        columns = ("of", "in", "number", "mean", "shortest", "half", "90 %", "99 %", "longest")
        yield page.fold(words("All lengths in figures"), page.table([words(name) for name in columns], rows))


def _named_lengths(found: Mapping[str, Any], words: Words) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in ("row", "sequence"):
        if found.get(key):
            yield words(key), found[key]
    for bucket, lengths in found.get("buckets", {}).items():
        yield words("in bucket {bucket}", bucket=f"{int(bucket):,}"), lengths
    for role, lengths in found.get("roles", {}).items():
        yield words.or_same(role), lengths
    for turn, lengths in found.get("turns", {}).items():
        yield words("answer of turn {number}", number=turn), lengths
    for part, lengths in found.get("pair", {}).items():
        yield words(part), lengths


def _length_plot(title: str, lengths: Mapping[str, Any], unit: str, *, marked: bool = False) -> Html:
    marks = [(cut, str(cut)) for cut in CUTS if marked and lengths["edges"][0] < cut <= lengths["edges"][-1]]
    return page.plot(title, page.bars(lengths["edges"], {unit: lengths["counts"]}, marks=marks, unit=unit))


def _many_plot(title: str, found: Mapping[str, Mapping[str, Any]], words: Words, *, marked: bool = False) -> Html:
    """Several histograms over common edges, each as shares of its own number."""
    edges, series = aligned({words.or_same(name): lengths for name, lengths in found.items() if lengths})
    marks = [(cut, str(cut)) for cut in CUTS if marked and edges[0] < cut <= edges[-1]]
    return page.plot(title, page.bars(edges, series, marks=marks, is_share=True))


def aligned(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[int], dict[str, list[float]]]:
    """Histograms (edges, counts) over the union of their edges, as shares of each."""
    edges = sorted({edge for lengths in found.values() for edge in lengths["edges"]})
    series = {}
    for name, lengths in found.items():
        share = dict.fromkeys(edges, 0.0)
        for edge, count in zip(lengths["edges"], lengths["counts"], strict=False):
            share[edge] += count / max(1, lengths["count"])
        series[name] = [share[edge] for edge in edges[:-1]]
    return edges, series


def _share_plot(title: str, counts: Sequence[int], unit: str) -> Html:
    edges = [i / len(counts) for i in range(len(counts) + 1)]
    ticks = [(share / 4, f"{25 * share} %") for share in range(5)]
    return page.plot(title, page.bars(edges, {unit: counts}, ticks=ticks, unit=unit))


# --- cuts and packing


def _cut_table(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    rows = []
    for cut in figures.get("cuts", []):
        fill = "–" if cut["packed_fill"] is None else f"{100 * cut['packed_fill']:.2f} %"
        rows.append(
            (
                f"{cut['max_len']:,}",
                percent(cut["longer_share"]),
                percent(cut["tokens_beyond_share"]),
                percent(cut["tokens_in_longer_share"]),
                f"{100 * cut['padding_share']:.1f} %",
                fill,
                cut["steps"],
            )
        )
    if rows:
        columns = (
            "length limit",
            "longer",
            "tokens beyond it",
            "tokens of longer ones",
            "padding, one a line",
            "fill, packed",
            "epoch steps",
        )
        yield page.table([words(name) for name in columns], rows)
        yield page.paragraph(
            words(
                "Longer: the share of sequences that do not fit. Tokens beyond it are lost when long ones are cut, tokens of longer ones when they are left out whole. Padding is what one sequence a line would waste; packing wastes what is missing from its fill."
            ),
            kind="note",
        )


def _packing(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    if "splits" not in figures:
        return
    is_pair = figures["kind"] == "pair"  # not packed: a batch is pairs up to a number of tokens
    for title, groups in (("bucket", figures["buckets"]), ("split", figures["splits"])):
        columns = [title, "pairs" if is_pair else "packs", "sequences", "tokens", "trained tokens"]
        rows = []
        for name, group in groups.items():
            row = [words.or_same(name) if title == "split" else f"{int(name):,}"]
            row += [group[key] for key in ("samples", "sequences", "tokens", "loss_tokens")]
            rows.append(row if is_pair else [*row, f"{100 * group['fill']:.2f} %", Bar(group["fill"])])
        columns += [] if is_pair else ["fill", ""]
        yield page.table([words(name) if name else "" for name in columns], rows)


# --- languages


def _language(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    blocks = []
    if figures.get("languages"):
        number = max(1, sum(figures["languages"].values()))
        rows = [
            (words(name), count, percent(count / number), Bar(count / number))
            for name, count in figures["languages"].items()
        ]
        blocks.append(page.table([words("language"), words("rows"), words("share"), ""], rows))
    if figures.get("scripts"):
        number = max(1, sum(script["characters"] for script in figures["scripts"].values()))
        ordered = sorted(figures["scripts"].items(), key=lambda item: -item[1]["characters"])
        rows = [
            (
                words(name),
                script["characters"],
                percent(script["characters"] / number),
                Bar(script["characters"] / number),
            )
            for name, script in ordered
        ]
        blocks.append(page.table([words("script"), words("characters"), words("share"), ""], rows))
    if blocks:
        yield page.grid(blocks)
    if figures.get("token_scripts"):
        ordered = sorted(figures["token_scripts"].items(), key=lambda item: -item[1]["tokens"])
        rows = [
            (
                words(name),
                script["tokens"],
                percent(script["share"]),
                Bar(script["share"]),
                f"{script['characters_per_token']:.2f}",
                f"{script['bytes_per_token']:.2f}",
            )
            for name, script in ordered
        ]
        columns = ("script", "tokens", "share", "", "characters a token", "bytes a token")
        yield page.table([words(name) if name else "" for name in columns], rows)
    yield page.paragraph(
        words(
            "The language of a row is a rule of thumb by its scripts and commonest words; scripts are counted exactly."
        ),
        kind="note",
    )


# --- repetition


def _repetition(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    found = figures.get("duplicates")
    if found:
        number = max(1, found["rows"])
        items = [(words("exact repeats"), f"{found['exact']:,}", percent(found["exact"] / number))]
        if found["near"] is not None:
            hint = words("of {value}", value=f"{found['rows_compared']:,}")
            items.append((words("near repeats"), f"{found['near']:,}", hint))
            items.append((words("rows without their like"), f"{number - found['exact'] - found['near']:,}", ""))
        yield page.cards(items)
        if found["near"] is not None:
            phrase = "Exact: the same roles and texts as an earlier row. Near: about {share} or more of their 8-character pieces in common (estimated by MinHash)."
            yield page.paragraph(words(phrase, share=percent(found["near_from"])), kind="note")
    lists = []
    for key, title, of in (
        ("openings", "Most repeated openings", "times"),
        ("ngrams", "Most repeated phrases", "rows"),
    ):
        if figures.get(key):
            most = figures[key][0]["count"]
            rows = [(page.code(item["text"]), item["count"], Bar(item["count"] / most)) for item in figures[key]]
            lists.append(page.table(["", words(of), ""], rows, title=words(title), wrap=True))
    if lists:
        yield page.grid(lists)
        phrase = "Openings are the first {characters} characters of each document or answer; phrases are runs of {units} words or Chinese characters, counted once a row, in {rows} rows."
        yield page.paragraph(
            words(phrase, characters=20, units=8, rows=f"{figures.get('ngram_rows', 0):,}"), kind="note"
        )


# --- vocabulary


def _vocabulary(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    found = figures.get("vocabulary")
    if not found or not found["counted"]:
        return
    never = percent(found["never"] / found["size"])
    yield page.cards(
        [
            (words("vocabulary"), f"{found['size']:,}", ""),
            (words("seen"), f"{found['seen']:,}", ""),
            (words("never seen"), f"{found['never']:,}", never),
            *(
                (words("cover {share} % of the text", share=share), f"{number:,}", words("most frequent tokens"))
                for share, number in found["cover"].items()
            ),
        ]
    )
    spec = {
        "kind": "lines",
        "axes": {"rank": {"label": words("rank")}},
        "series": [{"name": words("times"), "x": {"rank": found["ranks"]}, "y": [c or None for c in found["by_rank"]]}],
        "logx": True,
        "logy": True,
    }
    top = [
        (page.code(_visible(item["text"])), item["id"], item["count"], Bar(item["count"] / found["top"][0]["count"]))
        for item in found["top"]
    ]
    control = [(page.code(item["text"]), item["id"], item["count"]) for item in found["control"] if item["count"]]
    yield page.grid(
        [
            page.join(
                [
                    page.plot(words("How often the tokens of each rank occur"), spec),
                    page.table([words("special token"), "id", words("times")], control) if control else "",
                ]
            ),
            page.table([words("top token"), "id", words("times"), ""], top),
        ]
    )
    unused = found["never_ids"]
    if unused:
        shown = page.join(Html(f"{page.code(_visible(item['text']))} ") for item in unused)
        yield page.fold(words("Tokens never seen (the first {number})", number=len(unused)), shown)


def _visible(text: str) -> str:
    """A token's text with its spaces to be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


# --- conversations and pairs


def _conversations(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    turns = figures.get("turns")
    if not turns:
        return
    number = max(1, sum(turns.values()))
    rows = [
        (f"{turn}", count, percent(count / number), Bar(count / number)) for turn, count in list(turns.items())[:12]
    ]
    blocks = [
        page.table([words("turns"), words("rows"), words("share"), ""], rows, title=words("Turns of a conversation"))
    ]
    systems, tools = figures["systems"], figures["tools"]
    of = figures["text_rows"]
    blocks.append(
        page.cards(
            [
                (words("with a system prompt"), f"{systems['rows']:,}", percent(systems["rows"] / max(1, of))),
                (words("different system prompts"), f"{systems['different']:,}", ""),
                (words("with tools"), f"{tools['rows']:,}", percent(tools["rows"] / max(1, of))),
                (words("tool calls"), f"{tools['calls']:,}", ""),
                (words("messages with reasoning"), f"{figures['reasoning']:,}", ""),
            ]
        )
    )
    yield page.grid(blocks)
    lists = []
    if systems["top"]:
        rows = [(page.code(item["text"]), item["count"]) for item in systems["top"][:10]]
        lists.append(page.table([words("system prompt"), words("rows")], rows, wrap=True))
    if tools["top"]:
        rows = [(page.code(item["text"]), item["count"]) for item in tools["top"]]
        lists.append(page.table([words("tool"), words("rows")], rows, wrap=True))
    if lists:
        yield page.grid(lists)


def _pairs(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    found = figures.get("pairs")
    by_tokens = (figures.get("tokens_by") or {}).get("pair")
    if not found and not by_tokens:
        return
    plots = []
    if found:
        number, longer = max(1, found["pairs"]), found["longer"]
        yield page.cards(
            [
                (
                    words("the chosen is longer"),
                    percent(longer.get("chosen", 0) / number),
                    f"{longer.get('chosen', 0):,}",
                ),
                (
                    words("the rejected is longer"),
                    percent(longer.get("rejected", 0) / number),
                    f"{longer.get('rejected', 0):,}",
                ),
                (
                    words("the chosen by more than 3×"),
                    percent(longer.get("chosen by 3", 0) / number),
                    f"{longer.get('chosen by 3', 0):,}",
                ),
                (
                    words("the rejected by more than 3×"),
                    percent(longer.get("rejected by 3", 0) / number),
                    f"{longer.get('rejected by 3', 0):,}",
                ),
            ]
        )
        names = ["≤ 1/16", *(f"{2 ** (k / 2):.2g}" for k in range(-7, 8)), "≥ 16"]
        ratio = page.bars(
            list(range(-8, 10)),
            {words("pairs"): [found["ratios"][str(k)] for k in range(-8, 9)]},
            ticks=[
                (k + 0.5, label)
                for k, label in ((-8, "1/16"), (-4, "1/4"), (-2, "1/2"), (0, "1"), (2, "2"), (4, "4"), (8, "16"))
            ],
            unit=words("pairs"),
        )
        plots.append(page.plot(words("Length of the chosen answer over the rejected one's"), {**ratio, "names": names}))
        ticks = [(share / 5, f"{20 * share} %") for share in range(6)]
        alike = page.bars(
            [i / 10 for i in range(11)], {words("pairs"): found["similarity"]}, ticks=ticks, unit=words("pairs")
        )
        plots.append(page.plot(words("Likeness of the two answers"), alike))
    if by_tokens:
        plots.append(_many_plot(words("Tokens of prompt and answers"), by_tokens, words))
    if found and found["margins"]:
        plots.append(_length_plot(words("Characters the answers differ by"), found["margins"], words("pairs")))
    yield page.grid(plots)
    yield page.paragraph(
        words("Likeness: common 8-character pieces over all pieces of both answers (Jaccard)."), kind="note"
    )


# --- sources and rows set aside


def _sources(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    found = figures.get("sources") or []
    if not found:
        return
    most = max(1, *(source["tokens"] for source in found))
    with_texts = any("languages" in source for source in found)
    rows = []
    for source in found:
        share = source["loss_tokens"] / max(1, source["tokens"])
        cells = [page.code(source["path"]), source["kept"], size(source["bytes"]), source["tokens"]]
        cells += [Bar(source["tokens"] / most)] if len(found) > 1 else []
        cells.append(percent(share))
        if with_texts:
            languages = source.get("languages", {})
            kept = max(1, sum(languages.values()))
            cells.append(", ".join(f"{words(n)} {percent(c / kept)}" for n, c in languages.items() if c))
            cells.append(percent(source.get("exact_duplicates", 0) / kept))
        rows.append(cells)
    columns = ["source", "rows", "bytes", "tokens", *([""] if len(found) > 1 else []), "trained share"]
    columns += ["languages", "repeats"] if with_texts else []
    yield page.table([words(name) if name else "" for name in columns], rows)


def _aside(figures: Mapping[str, Any], words: Words) -> Iterator[Html]:
    for item in figures["set_aside"]:
        if not item["examples"]:
            continue
        shown = []
        for example in item["examples"]:
            place = f"{example['file']} {words('line')} {example['line']}" + (
                f": {example['detail']}" if example["detail"] else ""
            )
            shown += [page.paragraph(Html(f"<bdi>{page.text(place)}</bdi>"), kind="note"), page.code(example["raw"])]
        title = f"{words.or_same(item['reason'])}: {item['rows']:,} ({percent(item['share'])})"
        yield page.fold(title, page.join(shown))


# --- several


def _overview(measured: Sequence[Measured], others: Sequence[Any], words: Words) -> Section:
    rows = []
    for one in measured:
        f = one.figures
        tokens = (f["tokens"], percent(f["trained_share"])) if "tokens" in f else ("–", "–")
        repeats = percent(f["duplicates"]["exact"] / max(1, f["duplicates"]["rows"])) if f.get("duplicates") else "–"
        left = percent(1 - f["kept"] / max(1, f["rows"]))
        rows.append(
            (page.code(name_of(one)), words(f["kind"] + " rows"), f["kept"], *tokens, size(f["bytes"]), repeats, left)
        )
    columns = ("dataset", "kind", "rows", "tokens", "trained share", "bytes", "repeats", "left out")
    blocks = [page.callouts([said(w, words) for w in others]), page.table([words(c) for c in columns], rows)]
    return Section("all", words("All together"), blocks)


def write(path: Path, html: str) -> Path:
    """Write a page; it appears whole or not at all."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        beside.write_text(html, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path
