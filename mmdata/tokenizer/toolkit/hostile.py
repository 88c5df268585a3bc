"""A seed in; strings that break careless tokenizers out: marks, surrogates' neighbours, joiners, runs, control strings."""

import random
from collections.abc import Iterator, Sequence

_RANGES = (
    (0x20, 0x7F), (0x80, 0x250), (0x300, 0x370), (0x400, 0x530), (0x5D0, 0x600), (0x600, 0x700), (0x900, 0x980),
    (0xE00, 0xE80), (0x1100, 0x1200), (0x2000, 0x2070), (0x20D0, 0x2100), (0x3000, 0x3100), (0x4E00, 0xA000),
    (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xFE00, 0xFE10), (0xFF00, 0xFFF0), (0x1F000, 0x1FAFF), (0x20000, 0x2A6E0),
    (0xE0100, 0xE01F0), (0x10FFF0, 0x110000),
)  # fmt: skip
_EDGES = "\x00\x01\x1b\x7f\x85\xa0\xad\u1680\u180e\u200b\u200d\u2028\u2029\u202e\u2060\ud7ff\ue000\ufeff\ufffd\uffff"
_SPACES = " \t\n\r\v\f\x85\xa0\u2003\u3000\u200b"
_WORDS = (
    "don't", "I'LL", "3.14", "１２３", "½", "你好，世界", "こんにちは", "한국어", "नमस्ते", "👨‍👩‍👧‍👦", "🇨🇳🇺🇸", "e\u0301", "Ǆ",
    "\r\n", "  x", "a\u0308\u0323", "ﷺ", "𝒳", "null\x00", "ß", "İ", "�", "Ġ", "▁", "Ċ", "<0x0A>", "##a", "</w>",
)  # fmt: skip


def hostile_strings(count: int, *, seed: int = 0, control: Sequence[str] = ()) -> Iterator[str]:
    """Yield `count` strings of one to some hundred characters; `control`: special-token strings to weave in, also torn."""
    draw = random.Random(seed)
    words = [*_WORDS, *control, *(token[:-1] for token in control), *(token[1:] for token in control)]
    for _ in range(count):
        yield "".join(_piece(draw, words) for _ in range(draw.randint(1, 8)))


def _piece(draw: random.Random, words: Sequence[str]) -> str:
    kind = draw.randrange(6)
    if kind == 0:
        return draw.choice(words)
    if kind == 1:
        return draw.choice(_EDGES)
    if kind == 2:
        return "".join(draw.choice(_SPACES) for _ in range(draw.randint(1, 12)))
    if kind == 3:
        return chr(draw.randrange(*draw.choice(_RANGES))) * draw.choice((1, 2, 3, 40))
    begin, end = draw.choice(_RANGES)
    return "".join(chr(draw.randrange(begin, end)) for _ in range(draw.randint(1, 10)))
