"""Script counts, language, shingles and MinHash signatures of texts, in numpy, a batch of texts at a time.

A shingle is a run of GRAM characters; a MinHash signature is a short array from which the similarity of the shingle
sets of two texts can be estimated. The language is found by a heuristic (see docs/reports.md), which is good enough for
shares of a dataset but not for a single row.
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

GRAM = 8  # number of characters of a shingle
NUM_BINS = 16  # entries of a signature; each is the smallest hash (15 bits) of the shingles that fall into the bin
LEAST_GRAMS = 24  # texts with fewer shingles have no signature
MANY_GRAMS = 256  # for texts with more shingles, the signature uses a quarter of them, selected by hash
EMPTY = 0xFFFF  # entry of a bin without shingles
NEAR = 0.8  # two texts are near duplicates if at least this share of their signatures' entries is equal
_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xD6E8FEB86659FD93)


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
    """Return the number of characters of each script in each text: int64 [texts, scripts].

    scripts: index into SCRIPTS of every character of all texts, laid end to end.
    lengths: number of characters of each text, int64 [texts].
    """
    key = np.repeat(np.arange(len(lengths), dtype=np.int64) * len(SCRIPTS), lengths)
    key += scripts
    return np.bincount(key, minlength=len(lengths) * len(SCRIPTS)).reshape(len(lengths), len(SCRIPTS))


def languages_of(counts: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Return an index into LANGUAGES for each text: int64 [texts]. counts: of `count_scripts` for the same texts.

    Code is recognized by its punctuation or by ``` fences, Chinese by its characters. Mostly Latin letters with few
    accents are English, but from 40 letters on only if the text has one of some common English words.
    """
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


def shingles(points: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of every shingle of each text (uint64 [M]) and the index of its text (int64 [M]).

    points: code points of all texts laid end to end, uint32 [N].
    lengths: number of characters of each text, int64 [texts].
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
    """Return the MinHash signature of each text: uint16 [num_texts, NUM_BINS].

    hashes, text: as `shingles` returns them. One-permutation hashing (Li, Owen, Zhang 2012): the share of equal entries
    of two texts estimates the Jaccard similarity of their sets of shingles. Texts with fewer than LEAST_GRAMS shingles
    have EMPTY entries only.
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
    """Return whether each text is a near duplicate of an earlier one: bool [rows].

    signatures: uint16 [rows, NUM_BINS], as `signatures` returns them. A signature is split into four quarters, and each
    text is compared with the first and with the nearest earlier text that has an equal quarter (locality-sensitive
    hashing); at least the share NEAR of the entries must be equal. So some near duplicates may be missed. Texts without
    a signature are not duplicates.
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
    """Return the estimated Jaccard similarity of one[i] and other[i], two arrays of signatures: float64 [rows].

    Bins that are EMPTY in both do not count; if all are, the result is 0.
    """
    is_used = ~((one == EMPTY) & (other == EMPTY))
    return ((one == other) & is_used).sum(axis=1) / np.maximum(is_used.sum(axis=1), 1)


def jaccard(hashes: np.ndarray, text: np.ndarray, num_pairs: int) -> np.ndarray:
    """Return the Jaccard similarity of the shingle sets of texts 2i and 2i + 1: float64 [num_pairs].

    It is 1 if neither text has a shingle.
    hashes, text: as `shingles` returns them for 2 * num_pairs texts.
    """
    key = (text.astype(np.uint64) << np.uint64(40)) | (hashes >> np.uint64(24))
    key = np.unique(key)
    text = (key >> np.uint64(40)).astype(np.int64)
    pair = (text // 2).astype(np.uint64) << np.uint64(40) | (key & np.uint64(2**40 - 1))
    pair.sort()
    both = np.bincount((pair[1:][pair[1:] == pair[:-1]] >> np.uint64(40)).astype(np.int64), minlength=num_pairs)
    either = np.bincount(text // 2, minlength=num_pairs) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)
