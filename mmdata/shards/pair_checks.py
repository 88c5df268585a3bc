"""What a dataset of pairs can be held against before anything is trained on it: figures in, warnings out. One pass, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdata.shards.dataset import Dataset

LEFT_OUT = 0.05  # shares from which a line becomes a warning
LENGTH_BIAS = 0.65
DUPLICATES = 0.10


@dataclass(frozen=True, slots=True)
class PairFigures:
    """Counts over the train splits, rows left out over the whole. `longer` is the share of pairs whose chosen reply has
    more trained tokens, equal ones half; `duplicate_prompts` pairs whose prompt stood in an earlier pair."""

    num_pairs: int
    rows: int
    left_out: dict[str, int]
    longer: float
    mean_chosen: float
    mean_rejected: float
    duplicate_prompts: int
    equal_replies: int
    val_prompts: int  # pairs of the val splits whose prompt is in train too


def pair_figures(datasets: Sequence[Dataset]) -> PairFigures:
    """Read every pair once: about 10 µs each, and 8 bytes a prompt."""
    counts: list[tuple[int, int]] = []
    prompts: set[int] = set()
    duplicates = equal = 0
    for dataset in datasets:
        split = dataset.split("train")
        for number in range(split.num_samples()):
            pair = split.sample(*split.locate(number))
            counts.append((pair.n_chosen, pair.n_rejected))
            prompt = hash(pair.prompt.tobytes())
            duplicates += prompt in prompts
            prompts.add(prompt)
            equal += np.array_equal(pair.chosen, pair.rejected)
    val = sum(
        hash(split.sample(*split.locate(number)).prompt.tobytes()) in prompts
        for split in (dataset.split("val") for dataset in datasets)
        for number in range(split.num_samples())
    )
    lengths = np.array(counts, np.int64).reshape(-1, 2)
    longer = (lengths[:, 0] > lengths[:, 1]).mean() + 0.5 * (lengths[:, 0] == lengths[:, 1]).mean() if counts else 0.5
    mean_chosen, mean_rejected = lengths.mean(0).tolist() if counts else (0.0, 0.0)
    parts = [part for dataset in datasets for part in dataset.manifest["parts"]]
    left_out: dict[str, int] = {}
    for part in parts:
        for reason, count in part["left_out"].items():
            left_out[reason] = left_out.get(reason, 0) + count
    rows = sum(part["rows"] for part in parts)
    return PairFigures(len(counts), rows, left_out, float(longer), mean_chosen, mean_rejected, duplicates, equal, val)


def lines(figures: PairFigures) -> list[str]:
    """One line of figures, then a warning for each that is out of the ordinary, with what helps."""
    n, missing = max(1, figures.num_pairs), sum(figures.left_out.values())
    reasons = ", ".join(
        f"{count:,} {reason}" for reason, count in sorted(figures.left_out.items(), key=lambda x: -x[1])
    )
    said = [
        f"pairs: {figures.num_pairs:,} to train on; left out of {figures.rows:,} rows: {missing:,}"
        f"{f' ({reasons})' if missing else ''}; chosen longer in {100 * figures.longer:.0f}% "
        f"({figures.mean_chosen:.0f} and {figures.mean_rejected:.0f} tokens on average); "
        f"prompts seen before: {figures.duplicate_prompts:,}; equal replies: {figures.equal_replies:,}"
    ]
    if missing > LEFT_OUT * max(1, figures.rows):
        longer = " (most: pack with a larger --max-len)" if "too long" in figures.left_out else ""
        said.append(f"warning: {100 * missing / figures.rows:.0f}% of the rows were left out when packing{longer}")
    if not 1 - LENGTH_BIAS <= figures.longer <= LENGTH_BIAS:
        which = "longer" if figures.longer > 0.5 else "shorter"
        said.append(
            f"warning: chosen is {which} in {100 * max(figures.longer, 1 - figures.longer):.0f}% of the pairs: the model will "
            f"learn to answer {which}; --loss sigmoid_norm counts a token's mean and not the sum"
        )
    if figures.duplicate_prompts > DUPLICATES * n:
        said.append(f"warning: {100 * figures.duplicate_prompts / n:.0f}% of the pairs repeat an earlier pair's prompt")
    if figures.equal_replies:
        said.append(f"warning: {figures.equal_replies:,} pairs have equal replies and teach nothing")
    if figures.val_prompts:
        said.append(
            f"warning: {figures.val_prompts:,} val pairs have a prompt of the train split: val accuracy flatters"
        )
    return said
