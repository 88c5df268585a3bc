"""Counts over rows and tokens that can be gathered batch by batch, in any number of processes, and merged.

Counted values are kept as one polars frame: how often each value (an integer, such as a length) or string (as `key`) of a figure
occurs. Of strings only the frequent ones are kept. Imports nothing of ours.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl

Figures = dict[str, Any]  # a part of what `--json` prints
EXACT_BELOW = 2**16  # longer lengths are rounded down to a thousandth
# Edges of histograms: four to an octave, as lengths are spread; 512, 1024 and 2048 are edges.
EDGES = np.array(sorted({round(2 ** (k / 4)) for k in range(4 * 31)}))
NUM_STRINGS = 4096  # of a figure that a part of a file keeps
NUM_EXAMPLES = 3
MOST_PENDING = 2**18  # counts that are not merged yet
_EMPTY = pl.DataFrame(schema={"figure": pl.String, "key": pl.String, "value": pl.Int64, "count": pl.Int64})


class Tally:
    """Everything that adds up: sums by name, counters, arrays, and counts of values and strings.

    sums: numbers by name. counters: small counters by name, such as rows left out by reason. arrays: added element by element.
    columns: arrays of one entry a row, in the order of rows. examples: rows set aside, the first of each reason. missed: how much
    too small a count of strings may be.
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
        """Count every row of a frame by a string, by an integer, or by both."""
        if frame.is_empty():
            return
        key, value = pl.lit("") if key is None else key, pl.lit(0) if value is None else value
        columns = {"figure": pl.lit(figure), "key": key.cast(pl.String), "value": value.cast(pl.Int64)}
        groups = frame.lazy().select(**columns).group_by("figure", "key", "value", maintain_order=True)
        self._append(groups.agg(pl.len().cast(pl.Int64).alias("count")).collect())

    def _append(self, counts: pl.DataFrame) -> None:
        self._counts.append(counts)
        self._pending += len(counts)
        if self._pending > MOST_PENDING:
            self._merge_counts()

    def _merge_counts(self) -> pl.DataFrame:
        if len(self._counts) > 1:
            groups = pl.concat(self._counts).group_by("figure", "key", "value", maintain_order=True)
            self._counts, self._pending = [groups.agg(pl.col("count").sum())], 0
        return self._counts[0]

    def add(self, name: str, values: np.ndarray) -> None:
        """Add an array, element by element."""
        self.arrays[name] = self.arrays[name] + values if name in self.arrays else values

    def merge(self, other: "Tally") -> None:
        """Add what follows."""
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
        """Keep the NUM_STRINGS most frequent strings of these figures only, so that what a process returns stays small."""
        counts = self._merge_counts()
        for figure in figures:
            strings = _by_frequency(counts.filter(pl.col("figure") == figure))
            if len(strings) > NUM_STRINGS:
                self.missed[figure] += strings["count"][NUM_STRINGS]
                counts = pl.concat([counts.filter(pl.col("figure") != figure), strings.head(NUM_STRINGS)])
        self._counts = [counts]

    # --- what was counted

    def of(self, figure: str, key: str | None = None) -> pl.DataFrame:
        """The counts of a figure, or of one key of it: columns key, value and count."""
        counts = self._merge_counts().filter(pl.col("figure") == figure)
        return counts if key is None else counts.filter(pl.col("key") == key)

    def keys(self, figure: str, order: Iterable[str] = ()) -> list[str]:
        """The keys of a figure: those of `order` first, the others as they first occurred."""
        keys = self.of(figure)["key"].unique(maintain_order=True).to_list()
        return [key for key in dict.fromkeys([*order, *keys]) if key in keys]

    def values(self, figure: str) -> dict[int, int]:
        """How often each integer of a figure occurs, ascending."""
        counts = self.of(figure).sort("value")
        return dict(zip(counts["value"].to_list(), counts["count"].to_list(), strict=True))

    def array(self, name: str, size: int) -> np.ndarray:
        """An added array; zeros where nothing was added."""
        return self.arrays.get(name, np.zeros(size, np.int64))

    def column(self, name: str) -> np.ndarray:
        """The entries of all rows."""
        return np.concatenate(self.columns[name]) if self.columns[name] else np.empty(0, np.uint64)

    def top(self, figure: str, number: int, least: int = 2) -> list[Figures]:
        """The most frequent strings that occur at least `least` times, ties by text."""
        strings = _by_frequency(self.of(figure)).head(number).filter(pl.col("count") >= least)
        return strings.select(text="key", count="count").to_dicts()

    def lengths(self, figure: str, key: str | None = None) -> Figures | None:
        """Figures of lengths (`length_figures`)."""
        return length_figures(self.of(figure, key))

    def lengths_by(self, figure: str, order: Iterable[str] = ()) -> Figures:
        """Figures of lengths for each key of a figure."""
        return {key: self.lengths(figure, key) for key in self.keys(figure, order)}


def _by_frequency(strings: pl.DataFrame) -> pl.DataFrame:
    return strings.sort("count", "key", descending=[True, False])


def rounded_lengths(counts: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Ascending lengths and how often each occurs, int64; those of EXACT_BELOW and more are rounded down to three digits."""
    octaves = (pl.col("value").clip(1) / EXACT_BELOW).log(2).ceil().cast(pl.Int64)
    step = pl.lit(2, pl.Int64).pow((octaves + 6).clip(0))
    rounded = pl.when(pl.col("value") < EXACT_BELOW).then("value").otherwise(pl.col("value") // step * step)
    merged = counts.group_by(rounded.cast(pl.Int64).alias("value")).agg(pl.col("count").sum()).sort("value")
    return merged["value"].to_numpy(), merged["count"].to_numpy()


def length_figures(counts: pl.DataFrame) -> Figures | None:
    """count, total, mean, shortest, p50, p90, p99, longest, and a histogram as edges and counts; None of nothing.

    counts: columns value and count. The histogram's counts[i] are lengths with edges[i] <= length < edges[i + 1].
    """
    if counts.is_empty():
        return None
    total = int((counts["value"] * counts["count"]).sum())
    values, numbers = rounded_lengths(counts)
    reached, number = np.cumsum(numbers), int(numbers.sum())
    quantiles = {f"p{q}": int(values[np.searchsorted(reached, -(-number * q // 100))]) for q in (50, 90, 99)}
    first = max(0, int(np.searchsorted(EDGES, values[0], "right")) - 1)
    edges = EDGES[first : int(np.searchsorted(EDGES, values[-1], "right")) + 1].copy()
    edges[0] = min(edges[0], values[0])  # 0 lies below the first edge
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
