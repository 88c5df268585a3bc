"""What was measured of a set of rows, as polars frames that parts of a file give and that are joined.

`Tally.frames` has the numbers of each row, text, sequence and message, a few bytes each; strings are counted, and the
rare ones dropped. This module imports nothing else of the project.
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
MOST_PENDING = 64  # frames of counted strings that may wait before equal strings are summed


class Tally:
    """What was measured of a set of rows, such as one part of a file. sums: totals by name. counters: small counters by
    name, such as rows left out by reason. arrays: int64 arrays by name, to which `add` adds. frames: by name, frames of
    equal columns in the order of the rows. strings: by figure, frames of strings and their counts. examples: by reason,
    records of the first NUM_EXAMPLES rows left out. missed: for each figure of strings, an upper bound of how much too
    small counts may be because of `trim`."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()
        self.counters: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.arrays: dict[str, np.ndarray] = {}
        self.frames: defaultdict[str, list[pl.DataFrame]] = defaultdict(list)
        self.strings: defaultdict[str, list[pl.DataFrame]] = defaultdict(list)
        self.examples: dict[str, list[Figures]] = {}
        self.missed: Counter[str] = Counter()

    def add(self, name: str, values: np.ndarray) -> None:
        """Add `values` to the array called `name`, element by element; the first call stores `values` itself."""
        self.arrays[name] = self.arrays[name] + values if name in self.arrays else values

    def count(self, figure: str, strings: Iterable[str | None]) -> None:
        """Count these strings under the name `figure`."""
        counts = pl.Series("text", strings, pl.String).value_counts().cast({"count": pl.Int64})
        self.strings[figure].append(counts)
        if len(self.strings[figure]) > MOST_PENDING:
            self.strings[figure] = [self.counted(figure)]

    def merge(self, other: "Tally") -> None:
        """Add what was measured of the rows of `other`, which come after the rows of this tally."""
        self.sums.update(other.sums)
        self.missed.update(other.missed)
        for name, counter in other.counters.items():
            self.counters[name].update(counter)
        for name, array in other.arrays.items():
            self.add(name, array)
        for mine, theirs in ((self.frames, other.frames), (self.strings, other.strings)):
            for name, frames in theirs.items():
                mine[name] += frames
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:NUM_EXAMPLES]

    def trim(self) -> None:
        """Join the frames, and drop all but the NUM_STRINGS most frequent strings of each figure, to bound what is sent
        to another process. The largest count dropped is added to `missed[figure]`."""
        for figure in self.strings:
            counts = self.counted(figure)
            if len(counts) > NUM_STRINGS:
                self.missed[figure] += counts["count"][NUM_STRINGS]
            self.strings[figure] = [counts.head(NUM_STRINGS)]
        for name, frames in self.frames.items():
            self.frames[name] = [pl.concat(frames)]

    # --- what was measured

    def frame(self, name: str, *columns: str) -> pl.DataFrame:
        """Return the frames called `name` as one; an empty frame with these columns if there is none."""
        return (
            pl.concat(self.frames[name]) if self.frames[name] else pl.DataFrame(schema=dict.fromkeys(columns, pl.Int64))
        )

    def counted(self, figure: str) -> pl.DataFrame:
        """Return the counted strings of a figure, text and count, the most frequent first, then alphabetically."""
        empty = pl.DataFrame(schema={"text": pl.String, "count": pl.Int64})
        counts = pl.concat([empty, *self.strings[figure]]).group_by("text").agg(pl.col("count").sum())
        return counts.sort("count", "text", descending=[True, False])

    def top(self, figure: str, number: int, least: int = 2) -> list[Figures]:
        """Return at most `number` strings with counts of at least `least`: [{"text", "count"}]."""
        return self.counted(figure).head(number).filter(pl.col("count") >= least).to_dicts()

    def array(self, name: str, size: int) -> np.ndarray:
        """Return the array called `name`, or int64 zeros [size] if nothing was added under this name."""
        return self.arrays.get(name, np.zeros(size, np.int64))


# --- lengths


def counts_of(values: pl.Series) -> pl.DataFrame:
    """Return how often each integer occurs: a frame with the columns value and count (int64)."""
    return values.alias("value").value_counts().cast(pl.Int64)


def rounded_lengths(counts: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths in `counts`, a frame of value and count (int64, ascending), and how often each occurs (int64).
    From EXACT_BELOW on they are rounded down to a multiple of a power of two that is less than 1/512 of the length."""
    octaves = (pl.col("value").clip(1) / EXACT_BELOW).log(2).ceil().cast(pl.Int64)
    step = pl.lit(2, pl.Int64).pow((octaves + 6).clip(0))
    rounded = pl.when(pl.col("value") < EXACT_BELOW).then("value").otherwise(pl.col("value") // step * step)
    merged = counts.group_by(rounded.cast(pl.Int64).alias("value")).agg(pl.col("count").sum()).sort("value")
    return merged["value"].to_numpy(), merged["count"].to_numpy()


def lengths_by(frame: pl.DataFrame, key: str, value: str, order: Iterable[Any] = ()) -> Figures:
    """Return the `length_figures` of `value` for each `key` other than null: first the keys in `order`, then others as
    they occur."""
    groups = frame.select(key, value).drop_nulls().partition_by(key, as_dict=True, maintain_order=True)
    found = {of[0]: group[value] for of, group in groups.items()}
    return {str(key): length_figures(counts_of(found[key])) for key in dict.fromkeys([*order, *found]) if key in found}


def length_figures(counts: pl.DataFrame) -> Figures | None:
    """Compute the statistics and the histogram of lengths; None if `counts` is empty. counts: a frame of value (a
    length) and count. The result has the keys count (of all items), total (sum of the lengths), mean, shortest, p50,
    p90, p99, longest, edges and counts. Percentile pq is the smallest length such that at least q % of the items are
    not longer. counts[i] lengths are in edges[i] <= length < edges[i + 1]. Percentiles and histogram are of
    `rounded_lengths`, the others exact."""
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
