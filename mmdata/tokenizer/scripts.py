"""Script counts and language of texts, in numpy, a batch of texts at a time.

The language is a heuristic (docs/reports.md), good enough for shares of a dataset but not for a single row.
"""

import re
from collections.abc import Sequence

import numpy as np

SCRIPTS = (
    "han",
    "latin",
    "accented",
    "kana",
    "hangul",
    "cyrillic",
    "arabic",
    "other",
    "digit",
    "space",
    "code",
    "mark",
)
HAN, LATIN, ACCENTED, KANA, HANGUL, CYRILLIC, ARABIC, OTHER, DIGIT, SPACE, CODE, MARK = range(len(SCRIPTS))
LANGUAGES = ("Chinese", "English", "code", "other")
CHINESE, ENGLISH, IS_CODE, OTHER_LANGUAGE = range(len(LANGUAGES))

_RANGES = (
    (0x00C0, 0x0250, ACCENTED), (0x0250, 0x02B0, OTHER), (0x0370, 0x0400, OTHER), (0x0400, 0x0530, CYRILLIC),
    (0x0590, 0x0780, ARABIC), (0x08A0, 0x0900, ARABIC), (0x1100, 0x1200, HANGUL), (0x1E00, 0x1F00, ACCENTED),
    (0x2000, 0x206F, MARK), (0x20A0, 0x2C00, MARK), (0x2E80, 0x2FE0, HAN), (0x3000, 0x3040, MARK), (0x3040, 0x3100, KANA),
    (0x3130, 0x3190, HANGUL), (0x31F0, 0x3200, KANA), (0x3400, 0x4DC0, HAN), (0x4E00, 0xA000, HAN), (0xAC00, 0xD7B0, HANGUL),
    (0xF900, 0xFB00, HAN), (0xFB1D, 0xFE00, ARABIC), (0xFE10, 0xFE50, MARK), (0xFE70, 0xFF00, ARABIC), (0xFF00, 0xFF66, MARK),
    (0xFF66, 0xFFA0, KANA), (0x1F000, 0x1FB00, MARK), (0x20000, 0x32000, HAN),
)  # fmt: skip
_WORDS = re.compile(r"\b(?:the|of|and|to|is|in|are|you|for|what|how|a|an|i|it|this|that|with|on|be)\b", re.IGNORECASE)


def _table() -> np.ndarray:
    """Return the index into SCRIPTS of every Unicode code point: uint8 [0x110000]."""
    table = np.full(0x110000, OTHER, np.uint8)
    table[:0x80] = MARK
    table[0x80:0xC0] = MARK
    for text, script in ((" \t\n\r\v\f\u00a0\u3000", SPACE), ("{}()[]<>=;_#$&|\\/*+^%@`~", CODE)):
        table[[ord(c) for c in text]] = script
    table[ord("0") : ord("9") + 1] = DIGIT
    for first in "aA":
        table[ord(first) : ord(first) + 26] = LATIN
    for begin, end, script in _RANGES:
        table[begin:end] = script
    table[0x3000] = SPACE
    return table


_SCRIPT_OF = _table()


def code_points(text: str) -> np.ndarray:
    """Return the Unicode code points of a text: uint32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def scripts_of(points: np.ndarray) -> np.ndarray:
    """Return an index into SCRIPTS for each code point: uint8 [N]. points: uint32 [N]."""
    return _SCRIPT_OF[points]


def count_scripts(scripts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the number of characters of each script in each text: int64 [texts, scripts]. scripts: index into SCRIPTS
    of every character of all texts, end to end. lengths: characters of each text, [texts]."""
    key = np.repeat(np.arange(len(lengths), dtype=np.int64) * len(SCRIPTS), lengths)
    key += scripts
    return np.bincount(key, minlength=len(lengths) * len(SCRIPTS)).reshape(len(lengths), len(SCRIPTS))


def languages_of(counts: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return an index into LANGUAGES for each text: int64 [texts]. counts: from `count_scripts`. Code is recognized by
    its punctuation or ``` fences, Chinese by its characters. Mostly Latin letters with few accents are English, from 40
    letters on only if the text has one of some common English words."""
    letters = counts[:, :DIGIT].sum(axis=1)
    written = np.maximum(counts.sum(axis=1) - counts[:, SPACE], 1)
    latin = counts[:, LATIN] + counts[:, ACCENTED]
    is_code = (counts[:, CODE] >= 5) & (counts[:, CODE] > 0.08 * written)
    is_code &= (latin > 0.2 * written) & (counts[:, HAN] < 0.1 * written)
    is_code |= np.array(["```" in text and _fenced(text) > len(text) / 2 for text in texts], bool)
    # A Chinese character counts as four letters.
    is_chinese = (4 * counts[:, HAN] >= latin) & (counts[:, HAN] > 4 * counts[:, KANA]) & (counts[:, HAN] > 0)
    is_latin = (latin > 0.5 * letters) & (counts[:, ACCENTED] <= 0.02 * latin)
    is_english = is_latin & ~is_chinese
    long_latin = is_english & (latin >= 40)
    for i in np.flatnonzero(long_latin).tolist():
        is_english[i] = _WORDS.search(texts[i]) is not None
    return np.select([is_code, is_chinese, is_english], [IS_CODE, CHINESE, ENGLISH], OTHER_LANGUAGE)


def _fenced(text: str) -> int:
    """Return the number of characters between ``` fences; a fence that is not closed reaches to the end of the text."""
    return sum(len(piece) for piece in text.split("```")[1::2])
