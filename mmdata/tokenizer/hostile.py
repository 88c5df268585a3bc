"""Random strings that make careless tokenizers fail. Encoders, decoding and `mm tokenizer check` are tested on them."""

import random
from collections.abc import Iterator, Sequence

_RANGES = (
    (0, 0x80), (0x80, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x780), (0x900, 0xE80), (0x1100, 0x1200),
    (0x1E00, 0x2070), (0x2000, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3130), (0x4E00, 0xA000), (0xAC00, 0xD7A4),
    (0xE000, 0xE100), (0xF900, 0xFB00), (0xFE00, 0xFE10), (0xFE00, 0xFFFE), (0x10000, 0x10400), (0x1F000, 0x1FAFF),
    (0x20000, 0x2A6E0), (0xE0000, 0xE0080), (0xE0100, 0xE01F0), (0x10FFF0, 0x110000),
)  # fmt: skip
_EDGES = "\x00\x01\x1b\x7f\x85\xa0\xad\u1680\u180e\u200b\u200d\u2028\u2029\u202e\u2060\ud7ff\ue000\ufeff\ufffd\uffff"
_SPACES = (
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u200d\ufeff"
)
_WORDS = (
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "\u2019s", "don't", "I'LL", "3.14", "12,345.67", "１２３", "½", "x²",
    "\u0664\u0662", "你好", "你好，世界", "，。", "こんにちは", "한국어", "नमस्ते", "\u0e01\u0e33", "\u0644\u0627", "👨‍👩‍👧‍👦", "🇨🇳🇺🇸",
    "\u2764\ufe0f", "e\u0301", "\u0301\u0301", "Ǆ", "\r\n", "\n\n", "  ", "  x", "a\u0308\u0323", "ﷺ", "𝒳", "null\x00", "ß",
    "İ", "\ufffd", "Ġ", "▁", "Ċ", "<0x0A>", "##a", "</w>", "if (x <= 3) {\n\treturn;\n}\n", "{{", "\\n", "the ", " of",
    "<|", "|>", "</", "<think>", "</think>", "<tool_call>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>",
)  # fmt: skip
_REPEATED = (" ", "a", "0", "\n", "=", "的", "😀")


def hostile_strings(count: int, *, seed: int = 0, tokens: Sequence[str] = ()) -> Iterator[str]:
    """Yield `count` strings of one to some hundred characters, the same for the same seed and tokens, all valid UTF-8.
    They mix scripts, rare code points, white space, combining marks, emoji sequences, long runs of one character, and
    `tokens` (a tokenizer's added tokens; none: "<s>"), whole, cut, doubled and in capitals."""
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(_piece(draw, tokens or ("<s>",)) for _ in range(draw.randint(1, 8)))


def _piece(draw: random.Random, tokens: Sequence[str]) -> str:
    """Return one random part of a hostile string, of one of seven kinds."""
    kind = draw.randrange(7)
    if kind == 0:
        return draw.choice(_WORDS)
    if kind == 1:
        return draw.choice(_EDGES)
    if kind == 2:
        return "".join(draw.choice(_SPACES) for _ in range(draw.randint(1, 12)))
    if kind == 3:
        return chr(draw.randrange(*draw.choice(_RANGES))) * draw.choice((1, 2, 3, 40))
    if kind == 4:
        return draw.choice(_REPEATED) * draw.randint(1, 40)
    if kind == 5:
        token = draw.choice(tokens)
        cut = draw.randint(1, max(1, len(token) - 1))
        return draw.choice((token, token[:cut], token[cut:], token[:cut] + token, token.upper()))
    begin, end = draw.choice(_RANGES)
    return "".join(chr(draw.randrange(begin, end)) for _ in range(draw.randint(1, 12)))
