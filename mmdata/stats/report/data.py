"""The report on data: shows the figures that `mmdata.stats.stats` measures as sections of tables and plots."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import polars as pl

from mmdata.encode.rows import split_keys
from mmdata.pack.filter import features
from mmdata.shards.dataset import REPORT
from mmdata.stats.figures import WARNINGS
from mmdata.stats.report import page, texts
from mmdata.stats.report.charts import histogram, overlaid, share_plot, shares
from mmdata.stats.report.page import (
    Block,
    Browser,
    Callouts,
    Cards,
    Column,
    Fold,
    Grid,
    Note,
    Phrase,
    Plot,
    RowTable,
    Section,
    Table,
    as_name,
    joined,
    percent,
    phrase,
    size,
    verbatim,
)
from mmdata.stats.stats import Measured
from mmdata.stats.tally import Figures

FILE = REPORT
MOST_STRINGS = 40  # rows of the table of control strings
CUTS = (512, 1024, 2048)  # lengths in tokens, the standard buckets, that plots of lengths mark with vertical lines
FROM_SHARDS = (
    "Texts were decoded from the shards, for the inputs are gone, have changed or are compressed: what packing cut is not in "
    "them, and what the template added may be."
)
_SPREAD = ("shortest", "p50", "p90", "p99", "longest")  # keys of the statistics shown in the table of lengths


def dataset_page(
    measured: Sequence[Measured], *, lang: str = "en", others: Sequence[Any] = (), command: str = ""
) -> str:
    """Return the HTML page on datasets or files. lang: "en" or "zh". others: warnings on several together
    (`stats.contained`). command: how the page was made."""
    made = how_made(measured, command)
    if len(measured) == 1:
        one = measured[0]
        return page.render(name_of(one), _subtitle(one.figures), list(sections_of(one)), lang, made=made)
    step = -(-len(measured) // 3)  # fewer samples of each path, so that the page stays below 2 MB
    few = [replace(one, samples=one.samples[::step], rows=one.rows.gather_every(step)) for one in measured]
    sections = [_overview(measured, others), *(folded(number, one) for number, one in enumerate(few))]
    title = phrase("{number} datasets", number=len(measured))
    return page.render(title, as_name(", ".join(str(one.path) for one in measured)), sections, lang, made=made)


def how_made(measured: Sequence[Measured], command: str) -> list[page.Text]:
    """Return lines about how a page was made: when, by which command and version, and from which files."""
    if not command:
        return []
    values = {"date": as_name(time.strftime("%Y-%m-%d %H:%M:%S %z")), "command": as_name(command)}
    made = phrase("Made {date} by mm {version}: {command}", version=as_name(version("mm-toolkit")), **values)
    data = [phrase("Data: {path}", path=as_name(one.path.resolve())) for one in measured]
    tokenizers = dict.fromkeys(one.tokenizer for one in measured if one.tokenizer)
    return [made, *data, *(phrase("Tokenizer: {name}", name=as_name(name)) for name in tokenizers)]


def _subtitle(figures: Figures) -> Phrase:
    limit = [phrase("packed up to {max_len} tokens", max_len=f"{figures['max_len']:,}")] if "max_len" in figures else []
    where = [phrase("where {condition}", condition=as_name(figures["where"]))] if "where" in figures else []
    return joined([as_name(figures["path"]), f"{figures['kind']} rows", *limit, *where])


def folded(number: int, measured: Measured) -> Section:
    """Return a section with all sections on a path, each hidden until opened. number: makes its id unique on the
    page."""
    blocks = [Fold(section.title, section.blocks) for section in sections_of(measured)]
    return Section(f"data-{number}", name_of(measured), [Note(_subtitle(measured.figures)), *blocks])


def name_of(measured: Measured) -> Phrase:
    """Return the name of a dataset or file on the page: the last part of its path."""
    return verbatim(measured.path.resolve().name)


def warned(warnings: Sequence[Figures]) -> Callouts:
    """Return a block with these warnings (`figures.warnings`)."""
    return Callouts([phrase(WARNINGS[warning["code"]], **warning["values"]) for warning in warnings])


def sections_of(measured: Measured) -> Iterator[Section]:
    """Yield the sections on one dataset or file. A section is omitted if nothing for it was measured."""
    figures = measured.figures
    yield Section("glance", "At a glance", list(_glance(figures)))
    if measured.samples:
        yield Section("samples", "Samples", [Browser(measured.samples)])
    if len(measured.rows):
        yield Section("rows", "Rows", list(_row_blocks(measured.rows)))
    for id, title, make in (
        ("lengths", "Lengths", _lengths),
        ("cuts", "Where to cut", _cut_table),
        ("packing", "Packing", _packing),
        ("models", "Models for it", _models),
        ("language", "Languages and scripts", texts.language),
        ("duplicates", "Repetition", texts.repetition),
        ("vocabulary", "Vocabulary", texts.vocabulary),
        ("conversations", "Conversations", texts.conversations),
        ("pairs", "Pairs", texts.pairs),
        ("sources", "Sources", _sources),
        ("losses", "Loss", _losses),
        ("aside", "Set aside", _set_aside),
    ):
        blocks = list(make(figures))
        if blocks:
            yield Section(id, title, blocks)


# --- at a glance


def _glance(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "At a glance": main figures, warnings, rows left out, tokens cut."""
    yield Cards(list(_first_figures(figures)))
    yield warned(figures["warnings"])
    if "sample" in figures:
        values = {"number": f"{figures['sample']['rows']:,}", "of": f"{figures['sample']['of']:,}"}
        text = (
            "Texts, samples and use of the vocabulary are those of {number} of {of} rows; counts, lengths and packing are "
            "exact. `mm stats {path} --html FILE` reads every row."
            if "tokens_in" in figures
            else "Tokens are those of {number} of {of} rows, scaled by characters; texts were all read. --exact tokenizes "
            "every row."
        )
        yield Note(phrase(text, path=as_name(figures["path"]), **values), in_terminal=True)
    if figures.get("texts_from") == "shards":
        yield Note(FROM_SHARDS, in_terminal=True)
    if figures["set_aside"]:
        columns = [
            Column("left out", "word"),
            Column("rows", "count"),
            Column("share", "share"),
            Column("what helps", "word"),
        ]
        rows = [
            (item["reason"], item["rows"], item["share"], as_name(item["help"], f"help: {item['reason']}"))
            for item in figures["set_aside"]
        ]
        yield Table(columns, rows)
    if figures.get("cut"):
        yield shares("cut", figures["cut"], unit="tokens", total=figures["tokens_in"])
    if figures.get("not_written"):
        yield shares("left out by the template", figures["not_written"], total=figures["kept"])
    if controls := figures.get("control_strings"):
        most = sorted(controls.items(), key=lambda item: (-item[1], item[0]))[:MOST_STRINGS]
        title = "Control strings in content, packed as plain text"
        table = Table([Column("string", "code"), Column("times", "count")], most)
        yield Fold(joined([phrase(title), as_name(f"({len(controls):,})")], " "), [table])
    titles = ("Keys of rows that are ignored", "Metadata of rows that is ignored")
    for title, keys in zip(titles, split_keys(figures.get("extra_keys") or {}), strict=True):
        if keys:
            yield Fold(title, [Table([Column("key", "code"), Column("rows", "count")], list(keys.items()))])


def _first_figures(figures: Figures) -> Iterator[tuple[str, str, page.Text]]:
    """Yield the main figures as (label, value, hint). Numbers that are extrapolated from a sample begin with "≈"."""
    about = "≈ " if "sample" in figures and "tokens_in" not in figures else ""
    rows, kept = figures["rows"], figures["kept"]
    yield "rows", f"{kept:,}", phrase("of {value}", value=f"{rows:,}") if rows != kept else ""
    if "tokens" in figures:
        each = phrase("{value} characters each", value=f"{figures['characters_per_token']:.2f}")
        yield "tokens", f"{about}{figures['tokens']:,}", each
        share = phrase("{value} % of the tokens", value=f"{100 * figures['trained_share']:.1f}")
        yield "trained tokens", f"{about}{figures['loss_tokens']:,}", share
    yield "characters", f"{figures['characters']:,}", ""
    yield "bytes", size(figures["bytes"]), as_name(f"{figures['bytes']:,}")
    if figures.get("unknown_bytes"):
        share = phrase("{value} % of the bytes", value=f"{100 * figures['unknown_bytes'] / figures['text_bytes']:.2g}")
        yield "unknown characters", size(figures["unknown_bytes"]), share
    if "fill" in figures and figures["kind"] != "pair":  # pairs are not packed, so they have no fill
        padding = phrase("{value} % padding", value=f"{100 * figures['waste']:.2f}")
        yield "fill", f"{100 * figures['fill']:.2f} %", padding
    if "val_rows" in figures:
        yield "rows for val", f"{figures['val_rows']:,}", as_name(percent(figures["val_rows"] / max(1, kept)))


# --- rows


def _row_blocks(rows: pl.DataFrame) -> Iterator[Block]:
    """Yield the blocks of "Rows": a table of sampled rows and their columns, and a plot of prompts against answers."""
    frame = rows.with_columns(pl.selectors.float().round_sig_figs(3), pl.selectors.enum().cast(pl.String))
    alike = [name for name in frame.columns if frame[name].n_unique() == 1 and name not in ("line", "text")]
    columns = []
    for name in sorted(set(frame.columns) - set(alike), key=[*_FIRST, *frame.columns].index):
        info = features.COLUMNS.get(name)
        is_share = info is not None and info.help.startswith("share")
        columns.append((name, as_name(info.help if info else _OTHER_HELP[name]), is_share, frame[name].to_list()))
    yield Note(phrase("A sample of {number} rows.", number=f"{len(frame):,}"))
    yield RowTable(columns)
    if alike:
        first = frame.row(0, named=True)
        values = ", ".join(
            f"{name} = {json.dumps(first[name])}" if isinstance(first[name], bool) else f"{name} = {first[name]}"
            for name in alike
            if first[name] is not None
        )
        yield Note(phrase("The same in all of them: {values}", values=as_name(values or "–")))
    if "prompt_characters" in frame.columns and frame["kind"][0] != "document":
        points = frame.sort("prompt_characters").select(pl.col(_SCATTERED).clip(1))
        sides = {"chosen": "chosen_characters", "rejected": "rejected_characters"}
        named = sides if frame["kind"][0] == "pair" else {"answer": "answer_characters"}
        series = [{"name": phrase(label), "y": points[name].to_list()} for label, name in named.items()]
        spec = {"kind": "lines", "axes": {"prompt": {"label": phrase("characters of the prompt")}}, "series": series}
        spec |= {"scatter": points["prompt_characters"].to_list(), "unit": phrase("characters of the answer")}
        yield Plot("Prompts and answers", {**spec, "logx": True, "logy": True})


_FIRST = ("line", "text", "loss", "language", "characters", "tokens", "turns", "repeated", "trained_tokens")
_SCATTERED = ("prompt_characters", "answer_characters", "chosen_characters", "rejected_characters")
_OTHER_HELP = {"text": "beginning of the texts", "loss": "nats per trained token"}


def _losses(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Loss": the loss of rows by language, length and source. Nothing without losses."""
    losses = figures.get("losses")
    if not losses or not losses["rows"]:
        return
    yield Cards(
        [
            ("loss", f"{losses['loss']:.4f}", "nats per trained token"),
            ("rows with a loss", f"{losses['rows']:,}", phrase("of {value}", value=f"{figures['kept']:,}")),
            ("trained tokens", f"{losses['tokens']:,}", ""),
        ]
    )
    if losses["elsewhere"]:
        text = "{number} rows of the file of losses are not among these rows."
        yield Note(phrase(text, number=f"{losses['elsewhere']:,}"), in_terminal=True)
    tables = []
    for title, key in (("language", "languages"), ("characters of a row", "lengths"), ("source", "sources")):
        most = max(of["loss"] for of in losses[key].values()) or 1
        rows = [(name, of["rows"], of["tokens"], of["loss"], of["loss"] / most) for name, of in losses[key].items()]
        counts = (
            Column("rows", "count"),
            Column("trained tokens", "count"),
            Column("loss", "decimal4"),
            Column("", "bar"),
        )
        tables.append(Table([Column(title, "word"), *counts], rows))
    yield Grid(tables)


# --- lengths


def _lengths(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Lengths": histograms of tokens and characters, and their statistics."""
    by_tokens, by_characters = figures.get("tokens_by") or {}, figures.get("characters_by") or {}
    plots: list[Block] = []
    if by_tokens.get("sequence"):
        title = "Tokens of a pair's longer side" if figures["kind"] == "pair" else "Tokens of a sequence"
        plots.append(histogram(title, by_tokens["sequence"], "sequences", marks=CUTS))
    if by_characters.get("row"):
        plots.append(histogram("Characters of a row", by_characters["row"], "rows"))
    if (
        figures["kind"] != "pair" and len(by_tokens.get("buckets", ())) > 1
    ):  # the bucket of a pair follows from its length
        buckets = {f"{int(bucket):,}": lengths for bucket, lengths in by_tokens["buckets"].items()}
        plots.append(overlaid("Tokens of a sequence, by bucket", buckets, marks=CUTS))
    if by_tokens.get("roles"):
        plots.append(overlaid("Tokens of a message, by role", by_tokens["roles"], marks=CUTS))
    if len(by_characters.get("roles", ())) > 1:
        plots.append(overlaid("Characters of a message, by role", by_characters["roles"]))
    if len(by_tokens.get("turns", ())) > 1:
        turns = list(by_tokens["turns"].items())[:4]
        series = [(phrase("turn {number}", number=turn), lengths) for turn, lengths in turns]
        plots.append(overlaid("Tokens of an answer, by turn", series))
    if figures.get("trained_shares") and figures["kind"] != "document":
        plots.append(share_plot("Trained share of a sequence", figures["trained_shares"], "sequences", num_ticks=4))
    if plots:
        yield Grid(plots)
    rows = [
        (of, unit, lengths["count"], lengths["mean"], *(lengths[key] for key in _SPREAD))
        for unit, groups in (("characters", by_characters), ("tokens", by_tokens))
        for of, lengths in _named_lengths(groups)
    ]
    names = ("shortest", "half", "90 %", "99 %", "longest")
    columns = [Column("of", "word"), Column("in", "word"), Column("number", "count"), Column("mean", "decimal1")]
    tables = [Table([*columns, *(Column(each, "count") for each in names)], rows)] if rows else []
    if "lengths" in figures:
        tables.append(_length_table(figures["lengths"]))
    if tables:
        yield Fold("All lengths in figures", tables)


def _named_lengths(groups: Figures) -> Iterator[tuple[page.Text, Figures]]:
    """Yield (label, statistics) of each distribution of lengths in `tokens_by` or `characters_by` of the figures."""
    yield from ((as_name(key), groups[key]) for key in ("row", "sequence") if groups.get(key))
    for bucket, lengths in groups.get("buckets", {}).items():
        yield phrase("in bucket {bucket}", bucket=f"{int(bucket):,}"), lengths
    yield from ((as_name(role), lengths) for role, lengths in groups.get("roles", {}).items())
    for turn, lengths in groups.get("turns", {}).items():
        yield phrase("answer of turn {number}", number=turn), lengths
    yield from ((as_name(part), lengths) for part, lengths in groups.get("pair", {}).items())


def _length_table(lengths: Figures) -> Table:
    """Return the histogram of `mmdata.pack.summary.length_figures` as a table, with each bin's share of all tokens.
    Bins contain the lengths up to their "up_to"."""
    bins = lengths["histogram"]
    most, low, rows = max([1, *(each["sequences"] for each in bins)]), 1, []
    for each in bins:
        share = each["tokens"] / max(1, lengths["tokens"])
        rows.append((f"{low:,}-{each['up_to']:,}", each["sequences"], share, each["sequences"] / most))
        low = each["up_to"] + 1
    columns = [Column("tokens"), Column("sequences", "count"), Column("share of tokens", "percent1"), Column("", "bar")]
    return Table(columns, rows, "Tokens of a sequence")


# --- cuts and packing


def _cut_table(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Where to cut": what each length limit would cut and pad."""
    columns = {
        "max_len": Column("length limit", "count"),
        "longer_share": Column("longer", "share"),
        "tokens_beyond_share": Column("tokens beyond it", "share"),
        "tokens_in_longer_share": Column("tokens of longer ones", "share"),
        "padding_share": Column("padding, one a line", "percent1"),
        "packed_fill": Column("fill, packed", "percent2"),
    }
    rows = [[cut[key] for key in columns] for cut in figures.get("cuts", ())]
    if rows:
        yield Table(list(columns.values()), rows)
        yield Note(
            "Longer: the share of sequences that do not fit. Tokens beyond it are lost when long ones are cut, tokens of "
            "longer ones when they are left out whole. Padding is what one sequence a line would waste; packing wastes "
            "what is missing from its fill."
        )


def _packing(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Packing": counts and fill by bucket and by split. Nothing for a file that is not packed."""
    if "splits" not in figures:
        return
    is_pair = figures["kind"] == "pair"  # pairs are not packed: a batch is as many pairs as fit a number of tokens
    for title in ("bucket", "split"):
        columns = [Column(title, "word"), Column("pairs" if is_pair else "packs", "count")]
        columns += [Column(unit, "count") for unit in ("sequences", "tokens", "trained tokens")]
        columns += [] if is_pair else [Column("fill", "percent2"), Column("", "bar")]
        rows = []
        for key, group in figures[f"{title}s"].items():
            label = f"{int(key):,}" if title == "bucket" else key
            cells = [group[part] for part in ("samples", "sequences", "tokens", "loss_tokens")]
            rows.append([label, *cells, *([] if is_pair else [group["fill"], group["fill"]])])
        yield Table(columns, rows)


def _models(figures: Figures) -> Iterator[Block]:
    """Yield, for documents, the table of known models: parameters with this vocabulary, and tokens per parameter."""
    if models := figures.get("models"):
        columns = [Column("model", "code"), Column("parameters", "count"), Column("tokens per parameter", "decimal2")]
        rows = [(name, each["parameters"], each["tokens_per_parameter"]) for name, each in models.items()]
        yield Table(columns, rows)
        yield Note(
            "About 20 tokens per parameter are compute-optimal for one run (Hoffmann et al. 2022).", in_terminal=True
        )


# --- sources and rows set aside


def _sources(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Sources": a table with one row per input. Nothing for a file that is not packed."""
    sources = figures.get("sources") or []
    if not sources:
        return
    most = max(1, *(source["tokens"] for source in sources))
    has_texts, is_alone = any("languages" in source for source in sources), len(sources) == 1
    columns = [Column("source", "code"), Column("rows", "count"), Column("bytes", "bytes"), Column("tokens", "count")]
    columns += [] if is_alone else [Column("", "bar")]
    columns += [Column("trained share", "share")]
    columns += [Column("languages", "word"), Column("repeats", "share")] if has_texts else []
    rows = []
    for source in sources:
        row = [source["path"], source["kept"], source["bytes"], source["tokens"]]
        row += [] if is_alone else [source["tokens"] / most]
        row.append(source["loss_tokens"] / max(1, source["tokens"]))
        if has_texts:
            languages = {key: count for key, count in source.get("languages", {}).items() if count}
            kept = max(1, sum(languages.values()))
            row.append(joined([joined([key, percent(count / kept)], " ") for key, count in languages.items()], ", "))
            row.append(source.get("exact_duplicates", 0) / kept)
        rows.append(row)
    yield Table(columns, rows)


def _set_aside(figures: Figures) -> Iterator[Block]:
    """Yield the blocks of "Set aside": for each reason, examples of the rows left out."""
    for item in figures["set_aside"]:
        rows = []
        for example in item["examples"]:
            place = joined([as_name(example["file"]), example.get("unit", "line"), as_name(example["line"])], " ")
            rows.append(
                (joined([place, as_name(example["detail"])], ": ") if example["detail"] else place, example["raw"])
            )
        if rows:
            number = as_name(f"{item['rows']:,} ({percent(item['share'])})")
            columns = [Column("", "word"), Column("", "code")]
            yield Fold(joined([item["reason"], number], ": "), [Table(columns, rows)])


# --- several paths


def _overview(measured: Sequence[Measured], others: Sequence[Any]) -> Section:
    """Return the first section of a page on several paths: warnings, and a table with one row per path."""
    columns = [Column("dataset", "code"), Column("kind", "word"), Column("rows", "count"), Column("tokens", "count")]
    columns += [
        Column("trained share", "share"),
        Column("bytes", "bytes"),
        Column("repeats", "share"),
        Column("left out", "share"),
    ]
    rows = []
    for one in measured:
        figures, repeats = one.figures, one.figures.get("duplicates")
        rows.append(
            (
                name_of(one).text,
                f"{figures['kind']} rows",
                figures["kept"],
                figures.get("tokens"),
                figures.get("trained_share"),
                figures["bytes"],
                repeats["exact"] / max(1, repeats["rows"]) if repeats else None,
                1 - figures["kept"] / max(1, figures["rows"]),
            )
        )
    return Section("all", "All together", [warned(others), Table(columns, rows)])
