"""Scripts, language, shingles and MinHash signatures of texts, a batch at a time, in numpy over code points.

The language is found by a heuristic (see docs/reports.md), which is good for shares of a dataset and not for a single row.
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

GRAM = 8  # characters of a shingle
NUM_BINS = 16  # of a signature; each entry is the smallest hash (15 bits) of the shingles in that bin
LEAST_GRAMS = 24  # texts with fewer shingles have no signature
MANY_GRAMS = 256  # of texts with more, the signature uses a quarter of the shingles, selected by hash
EMPTY = 0xFFFF  # entry of a bin without shingles
NEAR = 0.8  # near duplicates have at least this share of equal entries
_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xD6E8FEB86659FD93)


def _table() -> np.ndarray:
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
    """The Unicode code points of a text: uint32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def scripts_of(points: np.ndarray) -> np.ndarray:
    """An index into SCRIPTS for each code point: uint8 [N]."""
    return _SCRIPT_OF[points]


def count_scripts(scripts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Characters of each script in each text: int64 [texts, scripts]. `scripts`: of all texts, laid end to end."""
    key = np.repeat(np.arange(len(lengths), dtype=np.int64) * len(SCRIPTS), lengths)
    key += scripts
    return np.bincount(key, minlength=len(lengths) * len(SCRIPTS)).reshape(len(lengths), len(SCRIPTS))


def languages_of(counts: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """An index into LANGUAGES for each text: int64 [texts]. Decided by the scripts, and for Latin letters by common words."""
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
    """Characters between ``` fences; a fence that is not closed reaches to the end."""
    return sum(len(piece) for piece in text.split("```")[1::2])


def shingles(points: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of GRAM characters inside each text (uint64 [M]), and the index of the text of each (int64 [M]).

    points: code points of all texts laid end to end, uint32 [N]; lengths: of each text, int64 [texts].
    """
    if len(points) < GRAM:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = points.astype(np.uint64)
    base, width = _BASE, 1
    while width < GRAM:  # a run of 2n characters from two runs of n
        hashes = hashes[:-width] * np.uint64(base) + hashes[width:]
        base, width = base * base % 2**64, 2 * width
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(29)
    numbers = np.maximum(lengths - (GRAM - 1), 0)
    text = np.repeat(np.arange(len(lengths)), numbers)
    begins = np.cumsum(lengths) - lengths
    first = np.cumsum(numbers) - numbers
    if (lengths >= GRAM).all() and len(lengths) == 1:
        return hashes, text
    at = np.arange(len(text)) + np.repeat(begins - first, numbers)
    return hashes[at], text


def signatures(hashes: np.ndarray, text: np.ndarray, num_texts: int) -> np.ndarray:
    """MinHash signatures by one-permutation hashing (Li, Owen, Zhang 2012): uint16 [texts, NUM_BINS].

    The share of equal entries of two texts estimates the Jaccard similarity of their shingles. Texts with fewer than LEAST_GRAMS
    shingles have EMPTY entries only.
    """
    numbers = np.bincount(text, minlength=num_texts)
    keep = (hashes & np.uint64(3) == 0) | (numbers <= MANY_GRAMS)[text]
    hashes, text = hashes[keep], text[keep]
    place = text.astype(np.uint64) * np.uint64(NUM_BINS) + (hashes >> np.uint64(60))
    key = (place << np.uint64(15)) | (hashes >> np.uint64(8) & np.uint64(0x7FFF))
    if num_texts * NUM_BINS <= 2**17:
        key = key.astype(np.uint32)  # sorts twice as fast
    key.sort()
    place = (key >> 15).astype(np.int64)
    first = np.flatnonzero(np.diff(place, prepend=-1))
    signed = np.full(num_texts * NUM_BINS, EMPTY, np.uint16)
    signed[place[first]] = key[first] & 0x7FFF
    signed = signed.reshape(num_texts, NUM_BINS)
    signed[numbers < LEAST_GRAMS] = EMPTY
    return signed


def near_duplicates(signatures: np.ndarray) -> np.ndarray:
    """Whether the signature of each row is similar to that of an earlier row: bool [rows]. signatures: uint16 [rows, NUM_BINS].

    Candidates share one of the four quarters of the signature; each row is compared with the first and the last candidate
    before it. Rows without a signature are no duplicates.
    """
    signed = np.flatnonzero((signatures != EMPTY).any(axis=1))
    entries = np.ascontiguousarray(signatures[signed])
    is_near = np.zeros(len(entries), bool)
    for band in entries.view(np.uint64).T:
        order = np.argsort(band, kind="stable")
        same = np.flatnonzero(band[order][1:] == band[order][:-1]) + 1
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] ^ np.uint64(1)))
        first = order[starts[np.searchsorted(starts, same, "right") - 1]]
        for other in (first, order[same - 1]):
            is_near[order[same]] |= likeness(entries[order[same]], entries[other]) >= NEAR
    result = np.zeros(len(signatures), bool)
    result[signed] = is_near
    return result


def likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of the rows of two arrays of signatures: float64 [rows]. Bins empty in both do not count."""
    is_used = ~((one == EMPTY) & (other == EMPTY))
    return ((one == other) & is_used).sum(axis=1) / np.maximum(is_used.sum(axis=1), 1)


def jaccard(hashes: np.ndarray, text: np.ndarray, num_pairs: int) -> np.ndarray:
    """Jaccard similarity of the shingles of texts 2i and 2i + 1: float64 [pairs]; 1 if neither has any."""
    key = (text.astype(np.uint64) << np.uint64(40)) | (hashes >> np.uint64(24))
    key = np.unique(key)
    text = (key >> np.uint64(40)).astype(np.int64)
    pair = (text // 2).astype(np.uint64) << np.uint64(40) | (key & np.uint64(2**40 - 1))
    pair.sort()
    both = np.bincount((pair[1:][pair[1:] == pair[:-1]] >> np.uint64(40)).astype(np.int64), minlength=num_pairs)
    either = np.bincount(text // 2, minlength=num_pairs) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)
