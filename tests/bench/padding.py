"""Padding of packed datasets: by best-fit alone, as mm packs, and the least that the lengths allow; time for a million.

    python tests/bench/padding.py DATASET [DATASET ...]

Takes the lengths of all train sequences of datasets that `mm pack` wrote, part by part as they were packed, and packs them
again. The bound: of the sequences of at least `a` tokens, those that have not `a` tokens of room in the largest bucket stand
alone; the others take at least their sum. The largest such sum over all `a` is taken; shorter sequences may fit in for nothing.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmdata.io.arrow import read_arrow  # noqa: E402
from mmdata.pack.packing import _best_fit, pack  # noqa: E402
from mmdata.shards.dataset import open_dataset  # noqa: E402

MILLION = 1_000_000


def bound(lengths: np.ndarray, buckets: tuple[int, ...]) -> int:
    """Positions that packs of these lengths take at least."""
    largest, unit = buckets[-1], math.gcd(*buckets)
    counts = np.bincount(lengths, minlength=largest + 1)
    each = np.arange(largest + 1)
    alone = np.array(buckets)[np.searchsorted(buckets, each)] * counts
    sums = each * counts
    found = [
        int(alone[largest - a + 1 :].sum()) + -(-int(sums[a : largest - a + 1].sum()) // unit) * unit
        for a in range(largest // 2 + 1)
    ]
    return max(found)


def lengths_of(directory: Path) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """The lengths of each part's train sequences, in source order, and the buckets."""
    dataset = open_dataset(directory)
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for entry in dataset.shards():
        if entry.split == "train":
            file = read_arrow(directory / entry.path)
            parts.setdefault(entry.part, []).append((file.column("doc").values, file.column("doc_len").values))
    found = []
    for shards in parts.values():
        ordinals, lengths = (np.concatenate(column) for column in zip(*shards, strict=True))
        found.append(lengths[np.argsort(ordinals)].astype(np.int64))
    return found, tuple(dataset.buckets)


def main() -> None:
    """Prints a row for RESULTS.md for each dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DATASET")
    print("| dataset | buckets | sequences, parts | best-fit alone | mm | least | a million sequences |")
    for directory in parser.parse_args().datasets:
        parts, buckets = lengths_of(directory)
        tokens = sum(int(part.sum()) for part in parts)
        positions = [
            sum(int(_best_fit(part, buckets)[1].sum()) for part in parts),
            sum(int(pack(part, buckets).buckets.sum()) for part in parts),
            sum(bound(part, buckets) for part in parts),
        ]
        shares = " | ".join(f"{100 * (1 - tokens / of):.4f} %" for of in positions)
        many = np.resize(np.concatenate(parts), MILLION)
        start = time.process_time()
        pack(many, buckets)
        seconds = time.process_time() - start
        count = sum(map(len, parts))
        print(f"| {directory.name} | {buckets} | {count:,}, {len(parts)} | {shares} | {seconds:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
