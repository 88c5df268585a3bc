"""Tokens a second of assembling 32 x 1024 batches from packed shards, beside the plain copy that bounds it.

    python tests/bench/loader.py [--tokens 200000000]

Makes a dataset of random packs in a temporary directory (no tokenizer is involved), and times, one process, one thread:
the Loader; a bare np.concatenate of the same views to int32 (nothing but the copy); and HF datasets in numpy format on
the same rows when `datasets` is installed. Opening is timed on the same files.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmdata import shards  # noqa: E402
from mmdata.arrow import ragged, read_arrow, write_arrow  # noqa: E402
from mmdata.loader import Loader  # noqa: E402
from mmdata.shards import open_dataset  # noqa: E402

BUCKET = 1024
BATCH = 32
VOCAB = 6400
PACKS_A_SHARD = 16_384


def make_dataset(root: Path, num_packs: int) -> None:
    """Packs of about four documents, every second stretch trained, as conversations have them."""
    draw = np.random.default_rng(0)
    tokenizer = b"{}"
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_bytes(tokenizer)
    manifest: dict[str, Any] = {
        "format": "mm",
        "format_version": shards.FORMAT_VERSION,
        "kind": "conversation",
        "max_len": BUCKET,
        "buckets": [BUCKET],
        "tokenizer": {
            "sha256": hashlib.sha256(tokenizer).hexdigest(),
            "template_sha256": "",
            "vocab_size": VOCAB,
        },
        "shards": [],
    }
    for part, begin in enumerate(range(0, num_packs, PACKS_A_SHARD)):
        manifest["shards"].append(write_shard(root, manifest, part, min(PACKS_A_SHARD, num_packs - begin), draw))
    manifest |= {"dataset_digest": "bench", "inputs": [], "arguments": {}, "parts": [], "totals": {}, "files": []}
    (root / "manifest.json").write_text(json.dumps(manifest))


def write_shard(
    root: Path, manifest: dict[str, Any], part: int, count: int, draw: np.random.Generator
) -> dict[str, Any]:
    cuts = np.sort(draw.integers(1, BUCKET // 2, (count, 3)) * 2, axis=1)
    edges = np.concatenate([np.zeros((count, 1), int), cuts, np.full((count, 1), BUCKET)], axis=1)
    lengths = np.diff(edges, axis=1)
    sizes = (lengths > 0).sum(axis=1)
    lengths = lengths[lengths > 0]
    ends = np.cumsum(lengths)
    begins = ends - lengths
    base = np.repeat(np.arange(count) * BUCKET, sizes)
    spans = np.stack([begins + lengths // 2, ends], axis=1) - base[:, None]
    columns = {
        "ids": ragged(draw.integers(0, VOCAB, count * BUCKET).astype(np.uint16), np.full(count, BUCKET)),
        "doc_len": ragged(lengths.astype(np.uint16), sizes),
        "span": ragged(spans.reshape(-1).astype(np.uint16), 2 * sizes),
        "n_loss": np.add.reduceat(spans[:, 1] - spans[:, 0], np.cumsum(sizes) - sizes).astype(np.uint16),
        "doc": ragged(np.arange(len(lengths), dtype=np.uint32), sizes),
    }
    path = f"train/b{BUCKET:04d}/part-{part:05d}.arrow"
    written = write_arrow(root / path, columns, shards.shard_metadata(manifest, BUCKET), PACKS_A_SHARD)
    entry = {"path": path, "split": "train", "bucket": BUCKET, "part": part, "samples": count, "rows": count}
    tokens = count * BUCKET
    return {**entry, "tokens": tokens, "model_tokens": tokens, "loss_tokens": int(columns["n_loss"].sum()), **written}


def rate(work: Callable[[int], int], seconds: float = 2.0) -> float:
    """Tokens a CPU second of `work(k)`, called for k = 0, 1, … until the time is over; the best of three sittings."""
    best = 0.0
    k = 0
    for _ in range(3):
        tokens, start, cpu = 0, time.monotonic(), time.process_time()
        while time.monotonic() - start < seconds:
            tokens += work(k)
            k += 1
        best = max(best, tokens / (time.process_time() - cpu))
    return best


def main() -> None:
    """Prints a table, and the lines for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_dataset(root, max(BATCH, arguments.tokens // BUCKET))
        opening = min(time_opening(root) for _ in range(5))
        dataset = open_dataset(root)
        loader = Loader([dataset], batch_tokens=BATCH * BUCKET, seed=0, micro_tokens=BATCH * BUCKET)
        split = dataset.split("train")
        order = np.random.default_rng(1).integers(0, split.num_samples(), (4096, BATCH)).tolist()
        bench = {
            "mm Loader: ids, mask, cu_seqlens, shuffled": rate(
                lambda k: sum(len(batch.ids) for batch in loader.batch(k % loader.steps_per_epoch))
            ),
            "bound: np.concatenate of the ids' views alone": rate(lambda k: copy_only(split, order[k % 4096])),
        }
        bench |= peer(root, dataset, order)
    size = sum(entry["bytes"] for entry in dataset.manifest["shards"])
    report(bench, opening, size, split.num_samples())


def time_opening(root: Path) -> float:
    start = time.perf_counter()
    open_dataset(root)
    return time.perf_counter() - start


def copy_only(split: shards.Split, indices: list[int]) -> int:
    views = [split.sample(BUCKET, i).ids for i in indices]
    return len(np.concatenate(views, dtype=np.int32, casting="unsafe"))


def peer(root: Path, dataset: shards.Dataset, order: list[list[int]]) -> dict[str, float]:
    """HF datasets on the same ids, in numpy format; nothing when it is not installed."""
    try:
        import datasets
    except ImportError:
        print("peer: `datasets` is not installed (pip install datasets), its row is left out")
        return {}
    import pyarrow as pa

    entry = dataset.manifest["shards"][0]
    table = pa.ipc.open_file(pa.memory_map(str(root / entry["path"]))).read_all()
    rows = datasets.Dataset(table).select_columns(["ids"]).with_format("numpy")
    count = read_arrow(root / entry["path"]).num_rows

    def work(k: int) -> int:
        picked = [rows[i % count]["ids"] for i in order[k % 4096]]
        return len(np.concatenate(picked, dtype=np.int32, casting="unsafe"))

    return {f"datasets {datasets.__version__}: rows in numpy format, ids only": rate(work)}


def report(bench: dict[str, float], opening: float, size: int, samples: int) -> None:
    own = next(iter(bench.values()))
    print(f"{samples:,} packs of {BUCKET}, {size / 2**20:,.0f} MiB; batches of {BATCH} x {BUCKET}")
    for name, tokens in bench.items():
        print(f"  {name:55} {tokens / 1e6:8.1f} Mtok/s of CPU   mm is {own / tokens:6.2f}x")
    print(f"  opening the dataset, warm: {1000 * opening:.2f} ms")
    print("for RESULTS.md:")
    for name, tokens in bench.items():
        print(f"| loader, {BATCH}x{BUCKET} batch: {name} | {tokens / 1e6:.1f} Mtok/s per core |")
    print(f"| open a dataset of {size / 2**20:,.0f} MiB, warm | {1000 * opening:.2f} ms |")


if __name__ == "__main__":
    main()
