"""Figures of `mm tokenizer eval` in; tables out, as lines for a terminal or as sections of one HTML page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmdata.stats.report import page
from mmdata.stats.report.page import Html, Section, Words
from mmdata.tokenizer.toolkit.evaluate import Evaluation, Rates, RoundTrip, TokenizerFigures

ZH = {
    "Tokenizers": "分词器",
    "Tokenizers on {megabytes} MB of text": "{megabytes} MB 文本上的分词器",
    "{texts} texts drawn from {rows} rows": "从 {rows} 行中抽取 {texts} 段文本",
    "At a glance": "概览",
    "Compression": "压缩率",
    "What it means for a model": "对模型意味着什么",
    "Vocabulary": "词表",
    "bytes per token": "每词元字节数",
    "bytes per token, by file": "每词元字节数（按文件）",
    "bytes per token, by language": "每词元字节数（按语言）",
    "characters per token, by language": "每词元字符数（按语言）",
    "use and exactness": "使用情况与精确性",
    "a model with it": "配合模型",
    "vocabulary": "词表大小",
    "tokens per word": "每个英文单词的词元数",
    "tokens per Chinese character": "每个汉字的词元数",
    "single bytes of characters": "字符的单字节词元占比",
    "vocabulary used": "用到的词表占比",
    "never in this text (glitch-prone)": "文本中从未出现（易成故障词元）",
    "fewer than 10 times": "出现不足 10 次",
    "texts changed by a round trip": "往返后改变的文本",
    "hostile strings changed": "往返后改变的刁钻字符串",
    "encode, MB per core second": "编码 MB／核·秒",
    "decode, MB per core second": "解码 MB／核·秒",
    "tokens of a GB of text": "1 GB 文本的词元数",
    "steps per epoch of a GB ({tokens} tokens each)": "1 GB 文本每轮步数（每步 {tokens} 词元）",
    "compute for the same text": "同样文本的相对计算量",
    "embedding's share of {model}": "嵌入层占 {model} 参数的比例",
    "too many ids": "词元数超出",
    "longest tokens": "最长的词元",
    "never in this text": "文本中从未出现",
    "does not come back": "往返后改变",
    "id": "编号",
    "token": "词元",
    "bytes": "字节",
    "times": "次数",
    "Chinese": "中文",
    "English": "英文",
    "code": "代码",
    "other": "其他",
    "More bytes in a token are fewer tokens, steps and seconds for the same text.": "每词元字节越多，同样文本的词元、步数和时间就越少。",
    "Tokens that the text a model is trained on never becomes keep an embedding nobody trained. On little text rare tokens are among them.": (
        "训练文本从不产生的词元，其嵌入从未被训练。文本较少时，罕见词元也会列入。"
    ),
}
Label = tuple[str, Mapping[str, Any]]  # an English phrase and what fills its {names}


@dataclass(frozen=True, slots=True)
class Table:
    """A figure a row, a tokenizer a column."""

    title: str
    rows: Sequence[tuple[Label, Sequence[str]]]


def short_names(names: Sequence[str]) -> list[str]:
    """The shortest ends of these paths that tell them apart."""
    parts = [name.rstrip("/").split("/") for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(each[-depth:]) for each in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def tables(figures: Evaluation) -> list[Table]:
    """All figures of `tokenizer_eval.evaluate`, worded."""
    each = figures.tokenizers
    by_language = _rate_rows(each, "by_language")
    return [
        Table("bytes per token, by language", by_language),
        Table("bytes per token, by file", _rate_rows(each, "by_file")),
        Table("characters per token, by language", _rate_rows(each, "by_language", of_characters=True)),
        Table("use and exactness", list(_use_rows(each))),
        Table("a model with it", list(_model_rows(each, figures.step_tokens))),
    ]


def _rate_rows(
    each: Sequence[TokenizerFigures], group: Literal["by_language", "by_file"], *, of_characters: bool = False
) -> list[tuple[Label, Sequence[str]]]:
    """A row for each language or file, and one for all text: bytes, or characters, per token."""

    def shown(rates: Rates | TokenizerFigures) -> str:
        return f"{rates.characters_per_token if of_characters else rates.bytes_per_token:.3f}"

    groups = [one.by_language if group == "by_language" else one.by_file for one in each]
    kinds = list(groups[0])
    labels = kinds if group == "by_language" else short_names(kinds)
    rows: list[tuple[Label, Sequence[str]]] = [
        ((label, {}), [shown(rates[kind]) for rates in groups]) for label, kind in zip(labels, kinds, strict=True)
    ]
    return [*rows, (("all", {}), [shown(one) for one in each])]


def _use_rows(each: Sequence[TokenizerFigures]) -> Iterator[tuple[Label, Sequence[str]]]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    shown: list[tuple[str, Callable[[TokenizerFigures], str]]] = [
        ("vocabulary", lambda one: f"{one.vocab_size:,}"),
        ("tokens per word", lambda one: number(one.tokens_per_word)),
        ("tokens per Chinese character", lambda one: number(one.tokens_per_chinese_character)),
        ("single bytes of characters", lambda one: f"{100 * one.byte_fallback_share:.2f}%"),
        ("vocabulary used", lambda one: f"{100 * one.vocab_used_share:.1f}%"),
        ("never in this text (glitch-prone)", lambda one: f"{one.glitch_prone:,}"),
        ("fewer than 10 times", lambda one: f"{one.rarely_used:,}"),
        ("texts changed by a round trip", lambda one: f"{one.round_trip.texts_changed:,}"),
        ("hostile strings changed", lambda one: _of(one.round_trip)),
        ("encode, MB per core second", lambda one: f"{one.encode_mb_per_cpu_s:.1f}"),
        ("decode, MB per core second", lambda one: f"{one.decode_mb_per_cpu_s:.1f}"),
    ]
    for phrase, show in shown:
        yield (phrase, {}), [show(one) for one in each]


def _of(found: RoundTrip) -> str:
    return f"{found.hostile_changed:,} / {found.hostile:,}"


def _model_rows(each: Sequence[TokenizerFigures], step_tokens: int) -> Iterator[tuple[Label, Sequence[str]]]:
    least = min(one.tokens_per_gigabyte for one in each)
    yield ("tokens of a GB of text", {}), [f"{one.tokens_per_gigabyte / 1e6:,.0f} M" for one in each]
    steps = "steps per epoch of a GB ({tokens} tokens each)"
    yield (steps, {"tokens": f"{step_tokens:,}"}), [f"{one.steps_per_gigabyte:,}" for one in each]
    yield ("compute for the same text", {}), [f"{one.tokens_per_gigabyte / least:.3f}x" for one in each]
    for name in each[0].embedding:
        found = [one.embedding[name] for one in each]
        said = [f"{100 * one.share:.1f}%" + ("" if one.fits else " !") for one in found]
        yield ("embedding's share of {model}", {"model": name}), said


def eval_page(figures: Evaluation, *, lang: str = "en") -> str:
    """The report: one HTML file."""
    words = Words(lang, ZH)
    text = figures.text
    title = words("Tokenizers on {megabytes} MB of text", megabytes=f"{text.bytes / 1e6:.1f}")
    subtitle = words("{texts} texts drawn from {rows} rows", texts=f"{text.texts:,}", rows=f"{text.rows:,}")
    return page.page(title, subtitle, list(sections(figures, words)), words)


def sections(figures: Evaluation, words: Words) -> Iterator[Section]:
    """The sections of the report, for a page of their own or within another; `words` knows ZH."""
    each = figures.tokenizers
    names = short_names([one.name for one in each])
    language, file, characters, use, model = (_html(table, names, words) for table in tables(figures))
    glance = [
        (name, f"{one.bytes_per_token:.3f}", words("bytes per token")) for name, one in zip(names, each, strict=True)
    ]
    note = "More bytes in a token are fewer tokens, steps and seconds for the same text."
    yield Section("glance", words("At a glance"), [page.cards(glance), page.paragraph(words(note), kind="note")])
    yield Section("compression", words("Compression"), [language, file, characters])
    yield Section("model", words("What it means for a model"), [model])
    note = (
        "Tokens that the text a model is trained on never becomes keep an embedding nobody trained. "
        "On little text rare tokens are among them."
    )
    lists = [block for name, one in zip(names, each, strict=True) for block in _lists(name, one, words)]
    yield Section("vocabulary", words("Vocabulary"), [use, page.paragraph(words(note), kind="note"), page.grid(lists)])


def _html(table: Table, names: Sequence[str], words: Words) -> Html:
    rows = []
    for (phrase, values), shown in table.rows:
        label = words(phrase, **values) if values else words.or_same(phrase)
        rows.append((label, *shown))
    return page.table(["", *names], rows, title=words(table.title))


def _lists(name: str, one: TokenizerFigures, words: Words) -> Iterator[Html]:
    """A tokenizer's longest tokens, those the text never became, and texts that do not come back."""
    columns = [words("token"), words("id"), words("bytes"), words("times")]
    for title, tokens in (("longest tokens", one.longest_tokens), ("never in this text", one.glitch_prone_tokens)):
        rows = [(page.code(token.text), token.id, token.bytes, token.uses) for token in tokens]
        if rows:
            yield page.table(columns, rows, title=f"{name}: {words(title)}")
    if one.round_trip.examples:
        rows = [(page.code(example),) for example in one.round_trip.examples]
        yield page.table([words("token")], rows, title=f"{name}: {words('does not come back')}", wrap=True)
