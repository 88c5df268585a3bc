"""Warnings about packed datasets before training: input files that repeat each other, and flaws of pairs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdata.shards.dataset import Dataset, open_sources

CONTAINED = 0.9  # share of a file's lines in another file, from which it counts as contained there
FEW_ROWS = 10  # files with fewer lines are not compared
LEFT_OUT = 0.05  # shares from which figures of pairs give a warning
LENGTH_BIAS = 0.65
DUPLICATES = 0.10


@dataclass(frozen=True, slots=True)
class Contained:
    """`rows` of the `of` distinct lines of the input file `inner` are also in the input file `outer`, byte for byte."""

    inner: str
    outer: str
    rows: int
    of: int


def find_contained(datasets: Sequence[Dataset]) -> list[Contained]:
    """Return the input files of which at least the share CONTAINED of the distinct packed lines, compared by the hashes
    in the datasets' sources (8 bytes a line in memory), is also in another input file of the same row kind. Files with
    fewer than FEW_ROWS lines are left out. Of two equally long files the later one is `inner`."""
    lines: dict[tuple[str, str], np.ndarray] = {}
    for dataset in datasets:
        for path, hashes in _lines_by_file(dataset).items():
            lines[dataset.kind, path] = hashes
    names = list(lines)
    contained = []
    for kind in dict.fromkeys(kind for kind, _ in names):
        files = [number for number, name in enumerate(names) if name[0] == kind]
        if len(files) < 2:
            continue
        every = np.concatenate([lines[names[number]] for number in files])
        owners = np.repeat(files, [len(lines[names[number]]) for number in files])
        order = np.argsort(every, kind="stable")
        every, owners = every[order], owners[order]
        for inner in files:
            if (size := len(ours := lines[names[inner]])) < FEW_ROWS:
                continue
            low, high = (np.searchsorted(every, ours, side) for side in ("left", "right"))
            at = np.repeat(high - np.cumsum(high - low), high - low) + np.arange((high - low).sum())
            for outer, shared in zip(
                *(each.tolist() for each in np.unique(owners[at], return_counts=True)), strict=True
            ):
                is_smaller = (size, -inner) < (len(lines[names[outer]]), -outer)
                if is_smaller and shared >= CONTAINED * size:
                    contained.append(Contained(names[inner][1], names[outer][1], shared, size))
    return contained


def _lines_by_file(dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the sorted hashes (uint64) of the distinct packed lines of each input file that has any."""
    by_file: dict[str, list[np.ndarray]] = {path: [] for path in dataset.inputs}
    for part in dataset.parts:
        if part.kept:
            sources = open_sources(dataset, part.part)
            hashes = np.ascontiguousarray(sources["sha"]).view("<u8").reshape(-1)
            by_file[dataset.inputs[int(sources["file"][0])]].append(hashes)  # a part is of one file
    return {path: np.unique(np.concatenate(hashes)) for path, hashes in by_file.items() if hashes}


@dataclass(frozen=True, slots=True)
class PairFigures:
    """Figures of the pairs of the train splits, except `rows` and `left_out` (by reason), which are of whole datasets.
    longer: share of pairs whose chosen reply has more trained tokens than the rejected one; a tie counts as a half, no
    pairs give 0.5. mean_chosen, mean_rejected: mean trained tokens. duplicate_prompts: pairs with the prompt of an
    earlier one. equal_replies: pairs whose two replies are equal."""

    num_pairs: int
    rows: int
    left_out: dict[str, int]
    longer: float
    mean_chosen: float
    mean_rejected: float
    duplicate_prompts: int
    equal_replies: int
    val_prompts: int  # pairs of the val splits whose prompt also occurs in a train split


def figures_of_pairs(datasets: Sequence[Dataset]) -> PairFigures:
    """Compute the figures of datasets of pairs: one pass, about 10 µs a pair, 8 bytes of memory a prompt."""
    counts: list[tuple[int, int]] = []
    prompts: set[int] = set()
    duplicates = equal = 0
    for pair in (pair for dataset in datasets for pair in dataset.split("train").samples()):
        counts.append((pair.n_chosen, pair.n_rejected))
        prompt = hash(pair.prompt.tobytes())
        duplicates += prompt in prompts
        prompts.add(prompt)
        equal += np.array_equal(pair.chosen, pair.rejected)
    val = sum(hash(pair.prompt.tobytes()) in prompts for dataset in datasets for pair in dataset.split("val").samples())
    lengths = np.array(counts, np.int64).reshape(-1, 2)
    longer = (lengths[:, 0] > lengths[:, 1]).mean() + 0.5 * (lengths[:, 0] == lengths[:, 1]).mean() if counts else 0.5
    mean_chosen, mean_rejected = lengths.mean(0).tolist() if counts else (0.0, 0.0)
    left_out: Counter[str] = Counter()
    for dataset in datasets:
        left_out.update(dataset.manifest.totals.left_out)
    rows = sum(dataset.manifest.totals.rows for dataset in datasets)
    return PairFigures(len(counts), rows, left_out, float(longer), mean_chosen, mean_rejected, duplicates, equal, val)


def pair_lines(figures: PairFigures) -> list[str]:
    """Return a line with the figures, then a line with a warning for each figure that is unusual."""
    n, missing = max(1, figures.num_pairs), sum(figures.left_out.values())
    reasons = ", ".join(
        f"{count:,} {reason}" for reason, count in sorted(figures.left_out.items(), key=lambda x: -x[1])
    )
    lines = [
        f"pairs: {figures.num_pairs:,} to train on; left out of {figures.rows:,} rows: {missing:,}"
        f"{f' ({reasons})' if missing else ''}; chosen longer in {100 * figures.longer:.0f}% "
        f"({figures.mean_chosen:.0f} and {figures.mean_rejected:.0f} tokens on average); "
        f"prompts seen before: {figures.duplicate_prompts:,}; equal replies: {figures.equal_replies:,}"
    ]
    if missing > LEFT_OUT * max(1, figures.rows):
        longer = " (most: pack with a larger --max-len)" if "too long" in figures.left_out else ""
        lines.append(f"warning: {100 * missing / figures.rows:.0f}% of the rows were left out when packing{longer}")
    if not 1 - LENGTH_BIAS <= figures.longer <= LENGTH_BIAS:
        which = "longer" if figures.longer > 0.5 else "shorter"
        lines.append(
            f"warning: chosen is {which} in {100 * max(figures.longer, 1 - figures.longer):.0f}% of the pairs: the model will "
            f"learn to answer {which}; --loss sigmoid_norm counts a token's mean and not the sum"
        )
    if figures.duplicate_prompts > DUPLICATES * n:
        lines.append(
            f"warning: {100 * figures.duplicate_prompts / n:.0f}% of the pairs repeat an earlier pair's prompt"
        )
    if figures.equal_replies:
        lines.append(f"warning: {figures.equal_replies:,} pairs have equal replies and teach nothing")
    if figures.val_prompts:
        lines.append(
            f"warning: {figures.val_prompts:,} val pairs have a prompt of the train split: val accuracy flatters"
        )
    return lines
