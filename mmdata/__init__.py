"""From bytes to batches: rows, templates, packing, shards, loader. Never needs torch, except for `load(…).torch()`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmdata.packed import PackedSplit


def load(dataset: str | Path, split: str = "train") -> "PackedSplit":
    """Open the split "train" or "val" of a packed dataset, such as "shards/sft_512". Raises UsageError for another
    split, DatasetError if the dataset is missing or damaged.
    """
    from mmdata.packed import PackedSplit

    return PackedSplit(dataset, split)
