"""Packed datasets in; which of their input files stand in another one, out. From the provenance alone: 8 bytes a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from mmdata.shards.dataset import Dataset, open_sources

SHARE = 0.9  # of a file's rows, from which it counts as contained in another
FEW_ROWS = 10  # a file of fewer proves nothing


@dataclass(frozen=True, slots=True)
class Contained:
    """`rows` of the `of` different lines of `inner` stand in `outer` too, byte for byte."""

    inner: str
    outer: str
    rows: int
    of: int


def find_contained(datasets: Sequence[Dataset]) -> list[Contained]:
    """Files whose kept lines stand, most of them, in another file of the same kind; of two equal ones the later."""
    lines: dict[tuple[str, str], np.ndarray] = {}
    for dataset in datasets:
        for path, hashes in _lines_by_file(dataset).items():
            lines[dataset.kind, path] = hashes
    found = []
    names = list(lines)
    for inner, outer in permutations(range(len(names)), 2):
        ours, theirs = lines[names[inner]], lines[names[outer]]
        is_smaller = (len(ours), -inner) < (len(theirs), -outer)
        if names[inner][0] != names[outer][0] or not is_smaller or len(ours) < FEW_ROWS:
            continue
        shared = len(np.intersect1d(ours, theirs, assume_unique=True))
        if shared >= SHARE * len(ours):
            found.append(Contained(names[inner][1], names[outer][1], shared, len(ours)))
    return found


def _lines_by_file(dataset: Dataset) -> dict[str, np.ndarray]:
    """Sorted uint64 hashes of the different kept lines of each input."""
    found: dict[str, list[np.ndarray]] = {path: [] for path in dataset.inputs}
    for part in dataset.manifest["parts"]:
        if part["kept"]:
            sources = open_sources(dataset, part["part"])
            hashes = np.ascontiguousarray(sources["sha"]).view("<u8").reshape(-1)
            found[dataset.inputs[int(sources["file"][0])]].append(hashes)  # a part is of one file
    return {path: np.unique(np.concatenate(hashes)) for path, hashes in found.items() if hashes}
