"""Counts over rows and tokens that can be gathered batch by batch, in any number of processes, and then merged.

A count belongs to a figure, which is named by a string such as "characters by role". All counts of a `Tally` are in one
polars frame: how often each integer (column `value`, such as a length) and each string (column `key`) occurs. Of
figures that count arbitrary strings, `Tally.trim` drops the rare ones. This module imports nothing else of the project.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl

Figures = dict[str, Any]  # numbers, strings, lists and dictionaries: what `mm stats --json` prints, or a part of it
EXACT_BELOW = 2**16  # longer lengths are rounded down, by less than 1/512 of the length (`rounded_lengths`)
# Bin edges of length histograms: 2^(k/4), because lengths spread over several orders of magnitude. Every power of two
# is an edge, and so is every standard bucket (512, 1024, 2048).
EDGES = np.array(sorted({round(2 ** (k / 4)) for k in range(4 * 31)}))
NUM_STRINGS = 4096  # different strings of one figure that remain in a tally after `trim`
NUM_EXAMPLES = 3  # rows shown for each reason for which rows are left out
MOST_PENDING = 2**18  # rows of frames of counts that may wait before equal (figure, key, value) are summed
_EMPTY = pl.DataFrame(schema={"figure": pl.String, "key": pl.String, "value": pl.Int64, "count": pl.Int64})


class Tally:
    """Counts of a set of rows, such as one part of a file. `count` adds values and strings; `of`, `values`, `top` and
    `lengths` read them.

    sums: totals by name, such as the number of rows. counters: small counters by name, such as the number of rows left
    out, by reason. arrays: int64 arrays by name, to which `add` adds. columns: by name, a list of arrays with one entry
    per row, in order. examples: by reason, records of the first NUM_EXAMPLES rows that were left out. missed: for each
    figure of strings, an upper bound of how much too small the count of a string may be because of `trim`.
    """

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.counters: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.arrays: dict[str, np.ndarray] = {}
        self.columns: defaultdict[str, list[np.ndarray]] = defaultdict(list)
        self.examples: dict[str, list[Figures]] = {}
        self.missed: Counter[str] = Counter()
        self._counts, self._pending = [_EMPTY], 0

    def count(
        self, figure: str, frame: pl.DataFrame, *, key: pl.Expr | None = None, value: pl.Expr | None = None
    ) -> None:
        """Count every row of `frame` under the name `figure`: by a string, an integer, or both. key, value: polars
        expressions over the columns of `frame`; without them the key is "" and the value 0.
        """
        if frame.is_empty():
            return
        key, value = pl.lit("") if key is None else key, pl.lit(0) if value is None else value
        columns = {"figure": pl.lit(figure), "key": key.cast(pl.String), "value": value.cast(pl.Int64)}
        groups = frame.lazy().select(**columns).group_by("figure", "key", "value", maintain_order=True)
        self._append(groups.agg(pl.len().cast(pl.Int64).alias("count")).collect())

    def _append(self, counts: pl.DataFrame) -> None:
        """Append a frame (figure, key, value, count); equal entries are summed after every MOST_PENDING rows."""
        self._counts.append(counts)
        self._pending += len(counts)
        if self._pending > MOST_PENDING:
            self._merge_counts()

    def _merge_counts(self) -> pl.DataFrame:
        """Concatenate all appended frames, sum the counts of equal (figure, key, value), and return the result."""
        if len(self._counts) > 1:
            groups = pl.concat(self._counts).group_by("figure", "key", "value", maintain_order=True)
            self._counts, self._pending = [groups.agg(pl.col("count").sum())], 0
        return self._counts[0]

    def add(self, name: str, values: np.ndarray) -> None:
        """Add `values` to the array called `name`, element by element; the first call stores `values` itself."""
        self.arrays[name] = self.arrays[name] + values if name in self.arrays else values

    def merge(self, other: "Tally") -> None:
        """Add the counts of `other`. Its rows come after the rows of this tally in `columns` and `examples`."""
        self.sums.update(other.sums)
        self.missed.update(other.missed)
        for name, counter in other.counters.items():
            self.counters[name].update(counter)
        for name, array in other.arrays.items():
            self.add(name, array)
        for name, arrays in other.columns.items():
            self.columns[name] += arrays
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:NUM_EXAMPLES]
        self._append(other._merge_counts())

    def trim(self, *figures: str) -> None:
        """Drop all but the NUM_STRINGS most frequent strings of each of these figures, to bound what is sent to another
        process. The count of the most frequent string dropped is added to `missed[figure]`.
        """
        counts = self._merge_counts()
        for figure in figures:
            strings = _by_frequency(counts.filter(pl.col("figure") == figure))
            if len(strings) > NUM_STRINGS:
                self.missed[figure] += strings["count"][NUM_STRINGS]
                counts = pl.concat([counts.filter(pl.col("figure") != figure), strings.head(NUM_STRINGS)])
        self._counts = [counts]

    # --- what was counted

    def of(self, figure: str, key: str | None = None) -> pl.DataFrame:
        """Return the counts of a figure, or those with this key, as a frame: figure, key, value, count."""
        counts = self._merge_counts().filter(pl.col("figure") == figure)
        return counts if key is None else counts.filter(pl.col("key") == key)

    def keys(self, figure: str, order: Iterable[str] = ()) -> list[str]:
        """Return the different keys of a figure: first those in `order`, if counted at all, then the others as first
        counted.
        """
        keys = self.of(figure)["key"].unique(maintain_order=True).to_list()
        return [key for key in dict.fromkeys([*order, *keys]) if key in keys]

    def values(self, figure: str) -> dict[int, int]:
        """Return how often each integer of a figure without keys was counted, as {value: count}, ascending."""
        counts = self.of(figure).sort("value")
        return dict(zip(counts["value"].to_list(), counts["count"].to_list(), strict=True))

    def array(self, name: str, size: int) -> np.ndarray:
        """Return the array called `name`, or int64 zeros [size] if nothing was added under this name."""
        return self.arrays.get(name, np.zeros(size, np.int64))

    def column(self, name: str) -> np.ndarray:
        """Return the column called `name`, one entry per row; an empty uint64 array if the column does not exist."""
        return np.concatenate(self.columns[name]) if self.columns[name] else np.empty(0, np.uint64)

    def top(self, figure: str, number: int, least: int = 2) -> list[Figures]:
        """Return at most `number` strings with counts of at least `least`: [{"text", "count"}], by count, then
        alphabetically.
        """
        strings = _by_frequency(self.of(figure)).head(number).filter(pl.col("count") >= least)
        return strings.select(text="key", count="count").to_dicts()

    def lengths(self, figure: str, key: str | None = None) -> Figures | None:
        """Return the `length_figures` of a figure, or of those with this key; None if nothing was counted."""
        return length_figures(self.of(figure, key))

    def lengths_by(self, figure: str, order: Iterable[str] = ()) -> Figures:
        """Return the `length_figures` of a figure for each key, in the order of `keys`."""
        return {key: self.lengths(figure, key) for key in self.keys(figure, order)}


def _by_frequency(strings: pl.DataFrame) -> pl.DataFrame:
    """Sort counted strings by descending count, and strings of equal count alphabetically."""
    return strings.sort("count", "key", descending=[True, False])


def rounded_lengths(counts: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths in `counts` (int64, ascending) and how often each occurs (int64). Lengths below EXACT_BELOW
    are exact. Longer ones are rounded down to a multiple of a power of two that is less than 1/512 of the length.
    counts: a frame with the columns value (a length) and count.
    """
    octaves = (pl.col("value").clip(1) / EXACT_BELOW).log(2).ceil().cast(pl.Int64)
    step = pl.lit(2, pl.Int64).pow((octaves + 6).clip(0))
    rounded = pl.when(pl.col("value") < EXACT_BELOW).then("value").otherwise(pl.col("value") // step * step)
    merged = counts.group_by(rounded.cast(pl.Int64).alias("value")).agg(pl.col("count").sum()).sort("value")
    return merged["value"].to_numpy(), merged["count"].to_numpy()


def length_figures(counts: pl.DataFrame) -> Figures | None:
    """Compute the statistics and the histogram of a distribution of lengths; None if `counts` is empty. counts: a frame
    with the columns value (a length) and count.

    The result has the keys count (of all items), total (sum of the lengths), mean, shortest, p50, p90, p99, longest,
    edges and counts. Percentile pq is the smallest length such that at least q % of the items are not longer. counts[i]
    is the number of lengths with edges[i] <= length < edges[i + 1]. Percentiles and histogram are computed from
    `rounded_lengths`, the others exactly.
    """
    if counts.is_empty():
        return None
    total = int((counts["value"] * counts["count"]).sum())
    values, numbers = rounded_lengths(counts)
    reached, number = np.cumsum(numbers), int(numbers.sum())
    quantiles = {f"p{q}": int(values[np.searchsorted(reached, -(-number * q // 100))]) for q in (50, 90, 99)}
    first = max(0, int(np.searchsorted(EDGES, values[0], "right")) - 1)
    edges = EDGES[first : int(np.searchsorted(EDGES, values[-1], "right")) + 1].copy()
    edges[0] = min(edges[0], values[0])  # a length of 0 is below the first edge, 1
    bins = np.histogram(values, np.append(edges[:-1], 2**62), weights=numbers)[0]
    return {
        "count": number,
        "total": total,
        "mean": total / number,
        "shortest": int(counts["value"].min()),  # type: ignore[arg-type]
        **quantiles,
        "longest": int(counts["value"].max()),  # type: ignore[arg-type]
        "edges": edges.tolist(),
        "counts": bins.astype(np.int64).tolist(),
    }
