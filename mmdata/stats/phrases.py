"""Phrases that are repeated in many texts, found by hashing the runs of 8 words or characters."""

import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import islice

import numpy as np
import polars as pl

from mmdata.io.records import JsonObject
from mmdata.pack.filter.grams import GRAM, shingles

GRAM_UNITS = GRAM  # n of the n-grams among which `repeated_phrases` looks for repeated ones, in units
_UNITS = re.compile(r"[A-Za-z\u00C0-\u024F\u0370-\u052F]+|\d+|[^\s]")
# To bound memory, units are hashed in blocks, and n-grams compared in groups by the first bits of their hashes.
_UNITS_AT_ONCE, _GROUPS = 2**18, 16


def repeated_phrases(whole: Sequence[str], number: int) -> list[JsonObject]:
    """Return at most `number` phrases that occur in several texts, the commonest first: [{"text", "count"}]. A unit is
    a word, a number, or any other single character (such as a Chinese one). Candidates are all n-grams of GRAM_UNITS
    units that occur in at least two texts, `count` of them; overlapping ones of nearly equal counts are joined. Memory:
    about 20 bytes per unit."""
    ids: dict[str, int] = {}
    stream, lengths = array("I"), []
    for text in whole:
        before = len(stream)
        stream.extend([ids.setdefault(unit, len(ids)) for unit in _UNITS.findall(text)])
        lengths.append(len(stream) - before)
    ends = np.cumsum(lengths, dtype=np.int64)
    hashes = _window_hashes(np.frombuffer(stream, np.uint32))
    often = [_repeated(hashes, group, ends, 40 * number) for group in range(_GROUPS)]
    most = pl.concat(often).sort("count", "at", descending=[True, False]).head(40 * number)
    phrases = _join_grams(most.rows(), stream, number)
    return [{"text": _original(whole, ends.tolist(), begin, end), "count": count} for begin, end, count in phrases]


def _window_hashes(units: np.ndarray) -> np.ndarray:
    """Return a hash of the GRAM_UNITS units from each unit on, uint64 [units - GRAM_UNITS + 1], or an empty array."""
    blocks = range(0, max(0, len(units) - GRAM_UNITS + 1), _UNITS_AT_ONCE)
    windows = [units[begin : begin + _UNITS_AT_ONCE + GRAM_UNITS - 1] for begin in blocks]
    return np.concatenate([np.empty(0, np.uint64), *(shingles(each, np.array([len(each)]))[0] for each in windows)])


def _repeated(hashes: np.ndarray, group: int, ends: np.ndarray, most: int) -> pl.DataFrame:
    """Return the n-grams that occur in the most texts, at most `most`, in two at least: at (first position) and count
    (of texts). group: bits that the n-grams' hashes begin with. ends: where each text ends."""
    at = np.flatnonzero(hashes >> np.uint64(64 - _GROUPS.bit_length() + 1) == group)
    grams = pl.DataFrame({"gram": hashes[at], "at": at}).filter(pl.col("gram").is_duplicated())
    text = np.searchsorted(ends, grams["at"].to_numpy(), "right")
    is_inside = grams["at"].to_numpy() + GRAM_UNITS <= ends[text] if len(grams) else np.empty(0, bool)
    grams = grams.with_columns(text=text).filter(is_inside)
    often = grams.group_by("gram").agg(pl.col("at").min(), count=pl.col("text").n_unique()).filter(pl.col("count") >= 2)
    return often.sort("count", "at", descending=[True, False]).head(most).select("at", "count")


def _join_grams(grams: Sequence[tuple[int, int]], stream: Sequence[int], number: int) -> list[list[int]]:
    """Join n-grams to at most `number` phrases [begin, end, count], where begin and end (exclusive) index `stream`:
    those inside a phrase or beyond it by one unit at one end, if the counts differ by at most 5 %. One that shares a
    run of more than half its units with an earlier phrase is omitted. grams: (position in `stream`, count), by
    descending count. stream: the ids of the units of all texts."""
    phrases: list[list[int]] = []
    for at, count in grams:
        window = stream[at : at + GRAM_UNITS]
        for phrase in phrases:
            if abs(phrase[2] - count) <= 0.05 * phrase[2] and phrase[0] - 1 <= at <= phrase[1] - GRAM_UNITS + 1:
                phrase[0], phrase[1] = min(phrase[0], at), max(phrase[1], at + GRAM_UNITS)
                break
        else:
            if len(phrases) < number and not any(_overlap(stream[p[0] : p[1]], window) for p in phrases):
                phrases.append([at, at + GRAM_UNITS, count])
    return phrases


def _overlap(units: Sequence[int], window: Sequence[int], least: int = GRAM_UNITS // 2 + 1) -> bool:
    """Return whether a run of `least` consecutive units occurs in both."""
    runs = {tuple(window[i : i + least]) for i in range(len(window) - least + 1)}
    return any(tuple(units[i : i + least]) in runs for i in range(len(units) - least + 1))


def _original(whole: Sequence[str], ends: Sequence[int], begin: int, end: int) -> str:
    """Return the original text of the units of one text from `begin` to `end` (exclusive), cut to 300 characters.
    whole: the texts. ends: the position in the stream of units at which each of them ends."""
    number = bisect_right(ends, begin)
    first = ends[number - 1] if number else 0
    spans = [match.span() for match in islice(_UNITS.finditer(whole[number]), begin - first, end - first)]
    return whole[number][spans[0][0] : spans[-1][1]][:300]
