"""Hashes of the n-grams of texts, in numpy, a batch of texts at a time.

The units of an n-gram are words, single characters of scripts without spaces, and single punctuation marks and symbols.
Case, character width (NFKC) and whitespace are ignored. Hashes are the same on every machine.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

_SPACE, _WORD, _ALONE = range(3)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_GRAM = 0xD6E8FEB86659FD93


def gram_hashes(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of the n-grams of all texts end to end, uint64 [G], and where those of each text begin, int64
    [texts + 1]. A text with fewer than n units has one n-gram, of all its units; one without a unit has none."""
    joined = "\0".join(_normal(text) for text in texts)
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4")
    units, of = _units(points)
    counts = np.bincount(of, minlength=len(texts))
    begins = np.cumsum(counts) - counts
    powers = [np.uint64(pow(_GRAM, n - k, 2**64)) for k in range(n)]
    padded = np.concatenate([units, np.zeros(n, np.uint64)])
    grams = np.zeros(len(units), np.uint64)
    for k in range(n):
        is_same = np.arange(len(units)) + k < (begins + counts)[of]  # the n-gram of a shorter text ends with the text
        grams += np.where(is_same, padded[k : k + len(units)], 0) * powers[k]
    place = np.arange(len(units)) - begins[of]
    is_gram = place < np.maximum(counts[of] - n + 1, 1)
    num_grams = np.bincount(of[is_gram], minlength=len(texts))
    return _mix(grams[is_gram]), np.concatenate([[0], np.cumsum(num_grams)])


def num_units(text: str) -> int:
    """Return the number of units of a text, as the module's docstring defines them."""
    return len(_units(np.frombuffer(_normal(text).encode("utf-32-le", "surrogatepass"), "<u4"))[0])


def _normal(text: str) -> str:
    """Return the text in NFKC form, case-folded, without NUL characters."""
    text = text.replace("\0", " ")
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()


def _units(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each unit's hash, uint64 [U], and the index of its text, int64 [U]. points: code points, 0 between texts."""
    kind = _table()[np.minimum(points, 0x110000 - 1)]
    is_word = kind == _WORD
    is_start = kind == _ALONE
    is_start |= is_word & ~np.concatenate([[False], is_word[:-1]])
    starts = np.flatnonzero(is_start)
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    place = np.arange(len(points)) - starts[np.maximum(np.cumsum(is_start) - 1, 0)]
    values = _mix(points.astype(np.uint64) + place.astype(np.uint64) * _STEP)
    values[kind == _SPACE] = 0
    return _mix(np.add.reduceat(values, starts)), np.cumsum(points == 0)[starts]


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers with the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


@cache
def _table() -> np.ndarray:
    """Return the class of every code point, uint8 [0x110000]; those above 0xFFFF are units by themselves."""
    table = np.full(0x110000, _ALONE, np.uint8)
    for point in range(0x10000):
        character = chr(point)
        if character.isspace() or point == 0:
            table[point] = _SPACE
        elif character.isalnum() and not 0x2E80 <= point < 0xAC00 and not 0xF900 <= point < 0xFB00:
            table[point] = _WORD  # Hangul, from 0xAC00 on, is written with spaces between words
    return table
