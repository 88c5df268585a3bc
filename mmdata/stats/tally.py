"""Counts that add up: lengths and frequent strings, gathered piece by piece and merged in any grouping. Imports nothing of ours.

Both are bounded: lengths above 65,536 are kept to three digits, strings beyond a number are forgotten with their error known.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

EXACT_BELOW = 2**16
# Edges of histograms: four to an octave, as lengths are spread; 512, 1024 and 2048 are edges.
EDGES = np.array(sorted({round(2 ** (k / 4)) for k in range(4 * 31)}))
NUM_STRINGS = 4096


@dataclass(slots=True)
class Lengths:
    """How often each length occurs."""

    counts: Counter[int] = field(default_factory=Counter)
    total: int = 0
    shortest: int = 2**62
    longest: int = 0

    def add(self, lengths: np.ndarray) -> None:
        """Count lengths: int64 [N], 0 or more."""
        if not len(lengths):
            return
        self.total += int(lengths.sum())
        self.shortest, self.longest = min(self.shortest, int(lengths.min())), max(self.longest, int(lengths.max()))
        if self.longest >= EXACT_BELOW:
            lengths = _three_digits(lengths)
        if self.longest < EXACT_BELOW:
            found = np.bincount(lengths)
            values = np.flatnonzero(found)
            self.counts.update(dict(zip(values.tolist(), found[values].tolist(), strict=True)))
        else:
            values, found = np.unique(lengths, return_counts=True)
            self.counts.update(dict(zip(values.tolist(), found.tolist(), strict=True)))

    def merge(self, other: "Lengths") -> None:
        """Add another's counts."""
        self.counts.update(other.counts)
        self.total += other.total
        self.shortest, self.longest = min(self.shortest, other.shortest), max(self.longest, other.longest)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Ascending lengths and how often each occurs, int64."""
        values = np.array(sorted(self.counts), np.int64)
        return values, np.array([self.counts[int(value)] for value in values], np.int64)

    def figures(self) -> dict[str, Any] | None:
        """count, mean, shortest, p50, p90, p99, longest, and a histogram as edges and counts; None of nothing.

        counts[i] are those with edges[i] <= length < edges[i + 1].
        """
        values, counts = self.arrays()
        if not len(values):
            return None
        reached, number = np.cumsum(counts), int(counts.sum())
        quantiles = {f"p{q}": int(values[np.searchsorted(reached, -(-number * q // 100))]) for q in (50, 90, 99)}
        first = max(0, int(np.searchsorted(EDGES, values[0], "right")) - 1)
        last = int(np.searchsorted(EDGES, values[-1], "right"))
        edges = EDGES[first : last + 1].copy()
        edges[0] = min(edges[0], values[0])  # 0 stands below the first edge
        bins = np.histogram(values, np.append(edges[:-1], 2**62), weights=counts)[0]
        return {
            "count": number,
            "total": self.total,
            "mean": self.total / number,
            "shortest": self.shortest,
            **quantiles,
            "longest": self.longest,
            "edges": edges.tolist(),
            "counts": bins.astype(np.int64).tolist(),
        }


def _three_digits(lengths: np.ndarray) -> np.ndarray:
    """Lengths of 65,536 and more, rounded down to a thousandth of themselves."""
    step = 2 ** np.maximum(0, np.ceil(np.log2(np.maximum(lengths, 1) / EXACT_BELOW)).astype(np.int64) + 6)
    return np.where(lengths < EXACT_BELOW, lengths, lengths // step * step)


@dataclass(slots=True)
class Strings:
    """How often strings occur; of many different ones the frequent. A count is exact while `missed` is 0, else at most that
    much too small."""

    counts: Counter[str] = field(default_factory=Counter)
    missed: int = 0

    def add(self, strings: Iterable[str]) -> None:
        """Count strings."""
        self.counts.update(strings)
        if len(self.counts) > 8 * NUM_STRINGS:
            self._forget()

    def merge(self, other: "Strings") -> None:
        """Add another's counts."""
        self.counts.update(other.counts)
        self.missed += other.missed
        if len(self.counts) > 8 * NUM_STRINGS:
            self._forget()

    def trim(self) -> None:
        """Keep the frequent ones only."""
        if len(self.counts) > NUM_STRINGS:
            self._forget()

    def _forget(self) -> None:
        kept = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        self.missed += kept[NUM_STRINGS][1]
        self.counts = Counter(dict(kept[:NUM_STRINGS]))

    def top(self, number: int, least: int = 2) -> list[dict[str, Any]]:
        """The most frequent ones that occur at least `least` times, ties by text."""
        kept = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:number]
        return [{"text": text, "count": count} for text, count in kept if count >= least]
