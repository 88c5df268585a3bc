"""The report on tokenizers: shows the figures of `mmdata.tokenizer.toolkit.evaluate`, with one column per tokenizer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmdata.stats.report import page
from mmdata.stats.report.page import (
    Block,
    Column,
    Grid,
    Note,
    Section,
    Strings,
    Table,
    Text,
    as_name,
    joined,
    phrase,
    verbatim,
)
from mmdata.tokenizer.toolkit.evaluate import Evaluation, TokenizerFigures


def short_names(names: Sequence[str]) -> list[str]:
    """Return the ends of these paths ("/" between parts), as short as lets different paths have different ends, all
    with the same number of parts, or fewer if the path has fewer."""
    parts = [name.rstrip("/").split("/") for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(each[-depth:]) for each in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def tables(figures: Evaluation) -> list[Table]:
    """Return the tables of the report: bytes per token by language and by file, characters per token by language, use
    of the vocabulary with round trips and speed, and what each tokenizer means for a model."""
    each = figures.tokenizers
    rows_by_title = {
        "bytes per token, by language": _rate_rows(each, "by_language", "bytes_per_token"),
        "bytes per token, by file": _rate_rows(each, "by_file", "bytes_per_token"),
        "characters per token, by language": _rate_rows(each, "by_language", "characters_per_token"),
        "use and exactness": [[label, *map(show, each)] for label, show in _USE.items()],
        "a model with it": list(_model_rows(each, figures.step_tokens)),
    }
    columns = [
        Column("", "word"),
        *(Column(verbatim(short), "figure") for short in short_names([one.name for one in each])),
    ]
    return [Table(columns, rows, title) for title, rows in rows_by_title.items()]


def _rate_rows(each: Sequence[TokenizerFigures], group: str, rate: str) -> list[list[Any]]:
    """Return a row per language or file, with the rate of each tokenizer, and a last row for all text. group:
    "by_language" or "by_file". rate: a field of `Rates`."""
    groups = [getattr(one, group) for one in each]
    kinds = list(groups[0])
    labels = kinds if group == "by_language" else map(verbatim, short_names(kinds))
    rows = [
        [label, *(f"{getattr(rates[kind], rate):.3f}" for rates in groups)]
        for label, kind in zip(labels, kinds, strict=True)
    ]
    return [*rows, ["all", *(f"{getattr(one, rate):.3f}" for one in each)]]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# The rows of the table of use: label, and a function that formats the value of one tokenizer.
_USE: dict[str, Callable[[TokenizerFigures], str]] = {
    "vocabulary size": lambda one: f"{one.vocab_size:,}",
    "tokens per word": lambda one: _number(one.tokens_per_word),
    "tokens per Chinese character": lambda one: _number(one.tokens_per_chinese_character),
    "single bytes of characters": lambda one: f"{100 * one.byte_fallback_share:.2f}%",
    "vocabulary used": lambda one: f"{100 * one.vocab_used_share:.1f}%",
    "never in this text (glitch-prone)": lambda one: f"{one.glitch_prone:,}",
    "fewer than 10 times": lambda one: f"{one.rarely_used:,}",
    "texts changed by a round trip": lambda one: f"{one.round_trip.texts_changed:,}",
    "hostile strings changed": lambda one: f"{one.round_trip.hostile_changed:,} / {one.round_trip.hostile:,}",
    "encode, MB per core second": lambda one: f"{one.encode_mb_per_cpu_s:.1f}",
    "decode, MB per core second": lambda one: f"{one.decode_mb_per_cpu_s:.1f}",
}


def _model_rows(each: Sequence[TokenizerFigures], step_tokens: int) -> Iterator[list[Any]]:
    """Yield table rows: tokens and optimizer steps (of `step_tokens` tokens) per gigabyte of text, compute relative to
    the tokenizer with the fewest tokens, and each model preset's parameters and the embedding's share of them."""
    least = min(one.tokens_per_gigabyte for one in each)
    yield ["tokens of a GB of text", *(f"{one.tokens_per_gigabyte / 1e6:,.0f} M" for one in each)]
    steps = phrase("steps per epoch of a GB ({tokens} tokens each)", tokens=f"{step_tokens:,}")
    yield [steps, *(f"{one.steps_per_gigabyte:,}" for one in each)]
    yield ["compute for the same text", *(f"{one.tokens_per_gigabyte / least:.3f}x" for one in each)]
    for model in each[0].embedding:
        shares = [one.embedding[model] for one in each]
        label = phrase("{model}: parameters, of them embedding", model=as_name(model))
        yield [label, *(f"{one.model_params / 1e6:,.1f} M, {100 * one.share:.1f}%" for one in shares)]


def eval_page(figures: Evaluation, *, lang: str = "en") -> str:
    """Return the report as one HTML page. lang: "en" or "zh"."""
    text = figures.text
    title = phrase("Tokenizers on {megabytes} MB of text", megabytes=f"{text.bytes / 1e6:.1f}")
    subtitle = phrase("{texts} texts drawn from {rows} rows", texts=f"{text.texts:,}", rows=f"{text.rows:,}")
    return page.render(title, subtitle, list(sections(figures)), lang)


def sections(figures: Evaluation) -> Iterator[Section]:
    """Yield the sections of the report, for a page of their own or as part of another page."""
    each = figures.tokenizers
    language, file, characters, use, model = tables(figures)
    names = [verbatim(short) for short in short_names([one.name for one in each])]
    most = max(one.bytes_per_token for one in each)
    columns = [Column("tokenizer", "code"), Column("vocabulary size", "count"), Column("bytes per token", "figure")]
    rows = [
        (label, one.vocab_size, f"{one.bytes_per_token:.3f}", one.bytes_per_token / most)
        for label, one in zip(names, each, strict=True)
    ]
    best = [i for i, one in enumerate(each) if one.bytes_per_token == most and len(each) > 1]
    chart = Table([*columns, Column("", "bar")], rows, marked=best, mark="best")
    note = Note("More bytes in a token are fewer tokens, steps and seconds for the same text.")
    yield Section("glance", "At a glance", [chart, note])
    yield Section("compression", "Compression", [language, file, characters])
    if figures.text.excerpts:
        yield Section("splits", "The same text, split by each", [Grid(list(_splits(figures, names)))])
    yield Section("model", "What it means for a model", [model])
    note = Note(
        "Tokens that the text a model is trained on never becomes keep an embedding nobody trained. "
        "On little text rare tokens are among them."
    )
    lists = [block for label, one in zip(names, each, strict=True) for block in _lists(label, one)]
    yield Section("vocabulary", "Vocabulary", [use, note, Grid(lists)])


def _splits(figures: Evaluation, names: Sequence[Text]) -> Iterator[list[Block]]:
    """Yield, for each excerpt of the text, its tokens by each tokenizer."""
    for number, _ in enumerate(figures.text.excerpts):
        blocks: list[Block] = []
        for label, one in zip(names, figures.tokenizers, strict=True):
            tokens = one.splits[number]
            blocks += [Note(joined([label, phrase("{tokens} tokens", tokens=len(tokens))])), Strings(tokens)]
        yield blocks


def _lists(label: Text, one: TokenizerFigures) -> Iterator[Block]:
    """Yield tables, unless empty, of a tokenizer's longest tokens, tokens that never occur in the text, and texts
    changed by a round trip. label: name of the tokenizer."""
    token = Column("token", "code")
    columns = [token, Column("id", "count"), Column("bytes", "count"), Column("times", "count")]
    for title, tokens in (("longest tokens", one.longest_tokens), ("never in this text", one.glitch_prone_tokens)):
        rows = [(each.text, each.id, each.bytes, each.uses) for each in tokens]
        if rows:
            yield Table(columns, rows, joined([label, title], ": "))
    if examples := one.round_trip.examples:
        rows = [(example,) for example in examples]
        yield Table([token], rows, joined([label, "does not come back"], ": "), wrap=True)
