"""Hashes of the pieces of texts, by which texts are compared, in numpy, a batch of texts at a time.

An n-gram is a run of n units: words, single characters of scripts without spaces, and single punctuation marks and
symbols. Case, character width (NFKC) and whitespace are ignored. `mm pack --dedup near` and `--exclude` compare them.

A shingle is a run of GRAM characters. `mm stats` estimates the number of near duplicates from MinHash signatures of
shingles, which take 32 bytes a row and need no rensa. They do not decide which rows a dataset leaves out: `dedup` does,
with 128 entries a row, which find more pairs and confuse fewer.

Hashes are the same on every machine.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

GRAM = 8  # number of characters of a shingle
NUM_BINS = 16  # entries of a signature; each is the smallest hash (15 bits) of the shingles that fall into the bin
LEAST_GRAMS = 24  # texts with fewer shingles have no signature
MANY_GRAMS = 256  # for texts with more shingles, the signature uses a quarter of them, selected by hash
EMPTY = 0xFFFF  # entry of a bin without shingles
NEAR = 0.8  # two texts are near duplicates if at least this share of their signatures' entries is equal
_STEP, _GRAM = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd factors
_SPACE, _WORD, _ALONE = range(3)  # classes of code points


# --- shingles of characters


def shingles(points: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of every shingle of each text (uint64 [M]) and the index of its text (int64 [M]). points: code
    points of all texts end to end, uint32 [N]. lengths: characters of each text, int64 [texts]."""
    if len(points) < GRAM:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = points.astype(np.uint64)
    base, width = _STEP, 1
    while width < GRAM:  # a run of 2n characters from two runs of n
        hashes = hashes[:-width] * np.uint64(base) + hashes[width:]
        base, width = base * base % 2**64, 2 * width
    hashes ^= hashes >> np.uint64(32)
    hashes *= np.uint64(_GRAM)
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
    """Return the MinHash signature of each text: uint16 [num_texts, NUM_BINS]. hashes, text: from `shingles`.
    One-permutation hashing (Li, Owen, Zhang 2012): the share of equal entries of two texts estimates the Jaccard
    similarity of their shingles. Texts with fewer than LEAST_GRAMS shingles have EMPTY entries only."""
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
    """Return whether each text is a near duplicate of an earlier one: bool [rows]. signatures: uint16 [rows, NUM_BINS],
    split into four quarters; a text is compared with the first and the nearest earlier text with an equal quarter
    (locality-sensitive hashing), so some may be missed, and at least the share NEAR of the entries must be equal. Texts
    without a signature are not duplicates."""
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
    """Return the estimated Jaccard similarity of one[i] and other[i], two arrays of signatures: float64 [rows]. Bins
    EMPTY in both do not count; 0 if all are."""
    is_used = ~((one == EMPTY) & (other == EMPTY))
    return ((one == other) & is_used).sum(axis=1) / np.maximum(is_used.sum(axis=1), 1)


def jaccard(hashes: np.ndarray, text: np.ndarray, num_pairs: int) -> np.ndarray:
    """Return the Jaccard similarity of the shingle sets of texts 2i and 2i + 1: float64 [num_pairs]; 1 if neither has
    any. hashes, text: from `shingles`, of 2 * num_pairs texts."""
    key = (text.astype(np.uint64) << np.uint64(40)) | (hashes >> np.uint64(24))
    key = np.unique(key)
    text = (key >> np.uint64(40)).astype(np.int64)
    pair = (text // 2).astype(np.uint64) << np.uint64(40) | (key & np.uint64(2**40 - 1))
    pair.sort()
    both = np.bincount((pair[1:][pair[1:] == pair[:-1]] >> np.uint64(40)).astype(np.int64), minlength=num_pairs)
    either = np.bincount(text // 2, minlength=num_pairs) - both
    return np.where(either > 0, both / np.maximum(either, 1), 1.0)


# --- n-grams of units


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
    values = _mix(points.astype(np.uint64) + place.astype(np.uint64) * np.uint64(_STEP))
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
