"""Figures for reports: a packed dataset or a jsonl file in, plain dictionaries out. A file costs one pass over it."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmdata import rows, shards
from mmdata.buckets import BUCKETS
from mmdata.encode import RowEncoder
from mmdata.errors import InputError
from mmdata.parts import batches, num_characters
from mmdata.pipeline import length_figures
from mmdata.tokenizer import Tokenizer

UNCUT = 2**24  # a length limit that no row meets: figures of a file are those of its whole rows
Progress = Callable[[int, int], None]


def dataset_stats(directory: Path) -> dict[str, Any]:
    """The figures `mm pack` left in stats.json; DatasetError when the dataset is missing or damaged."""
    dataset = shards.open_dataset(directory)
    entry = next(file for file in dataset.manifest["files"] if file["path"] == "stats.json")
    shards.check_size(directory / "stats.json", entry["bytes"], directory)
    return {"path": str(directory), **json.loads((directory / "stats.json").read_bytes())}


def file_stats(path: Path, tokenizer_dir: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Rows, reasons for leaving rows out, characters; with a tokenizer tokens, trained share and lengths too.

    Lengths are those of whole rows (of a pair's longer side), before any --max-len. progress counts bytes.
    """
    kind = rows.find_kind(path)
    encoder = RowEncoder(Tokenizer.load(tokenizer_dir), max_len=UNCUT) if tokenizer_dir else None
    total = path.stat().st_size
    counts: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    for lines in batches(rows.iter_lines(path)):
        counts["rows"] += len(lines)
        good = []
        for line in lines:
            try:
                good.append(rows.parse_row(line.raw, kind))
            except rows.BadRow as bad:
                left_out[bad.reason] += 1
        if encoder:
            batch = encoder.encode_batch(good, [rows.row_hash(row) for row in good])
            left_out.update(bad.reason for bad in batch.bad.values())
            good = [row for i, row in enumerate(good) if i not in batch.bad]
            counts["tokens"] += int(batch.flat.lengths.sum())
            counts["loss_tokens"] += int(batch.flat.num_loss().sum())
            lengths.update(batch.flat.widths().tolist())
        counts["kept"] += len(good)
        counts["characters"] += sum(map(num_characters, good))
        if progress:
            progress(min(total, lines[-1].offset + len(lines[-1].raw) + 1), total)
    if not counts["kept"]:
        raise InputError(f"{path}: no row can be used", f"`mm validate {path}` lists the reasons")
    figures = {"path": str(path), "kind": kind, "rows": counts["rows"], "kept": counts["kept"]}
    figures |= {"left_out": dict(sorted(left_out.items())), "characters": counts["characters"]}
    return figures | (_token_figures(counts, lengths) if encoder else {})


def _token_figures(counts: Counter[str], lengths: Counter[int]) -> dict[str, Any]:
    by_length = np.zeros(max(lengths) + 1, np.int64)
    by_length[list(lengths)] = list(lengths.values())
    edges = [0, *BUCKETS, len(by_length)]
    names = [*(str(bucket) for bucket in BUCKETS), "longer"]
    return {
        "tokens": counts["tokens"],
        "loss_tokens": counts["loss_tokens"],
        "trained_share": counts["loss_tokens"] / counts["tokens"],
        "characters_per_token": counts["characters"] / counts["tokens"],
        "buckets": {
            name: {"sequences": int(by_length[low + 1 : high + 1].sum())}
            for name, (low, high) in zip(names, itertools.pairwise(edges), strict=True)
        },
        "lengths": length_figures(by_length),
    }
