"""Tokens a second of assembling 32 x 1024 batches from packed shards, beside the plain copy that bounds it, and beside peers.

    python tests/bench/loader.py [--tokens 540000000] [--venvs DIR]

Makes a dataset of random packs in a temporary directory (no tokenizer is involved), and times, one process, one thread:
the Loader (ids, loss mask, cu_seqlens, shuffled); the copy that bounds it: views of ids made beforehand, joined and cast to
int32, and nothing else;
and peers reading single random rows of 1024 ids, 32 of them stacked to an int64 tensor: HF datasets in torch format,
MosaicML Streaming, litdata. Each peer has a virtual environment of its own under --venvs, made here with pip and on top of
this one's torch and numpy; a peer that cannot be installed or fails is named and its row left out.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmdata.io.arrow import ragged, write_arrow  # noqa: E402
from mmdata.io.records import write_record  # noqa: E402
from mmdata.pack.summary import Summary  # noqa: E402
from mmdata.shards.dataset import open_dataset  # noqa: E402
from mmdata.shards.loader import Loader  # noqa: E402
from mmdata.shards.manifest import (  # noqa: E402
    MANIFEST,
    DatasetHeader,
    PackArguments,
    ShardRecord,
    TokenizerRecord,
)

BUCKET = 1024
BATCH = 32
VOCAB = 6400
PACKS_A_SHARD = 16_384
PEER_ROWS = 20_000
# What each peer needs besides torch, numpy and pyarrow; without dependencies, which would replace those.
PEERS = {
    "datasets": "datasets multiprocess dill xxhash pandas aiohttp python-dateutil six pytz",
    "streaming": "mosaicml-streaming Brotli zstd python-snappy cramjam xxhash pillow catalogue",
    "litdata": "litdata lightning_utilities boto3 botocore jmespath s3transfer python-dateutil six tifffile obstore",
}


def make_dataset(root: Path, num_packs: int) -> None:
    """Packs of about four documents, every second stretch trained, as conversations have them."""
    draw = np.random.default_rng(0)
    tokenizer = b"{}"
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_bytes(tokenizer)
    sha256 = hashlib.sha256(tokenizer).hexdigest()
    arguments = PackArguments(
        val_fraction=0,
        on_bad="fail",
        max_bad=None,
        max_bad_by_reason={},
        seed=0,
        era="auto",
        train_on="assistant",
        part_bytes=0,
    )
    header = DatasetHeader(
        kind="conversation",
        max_len=BUCKET,
        buckets=(BUCKET,),
        tokenizer=TokenizerRecord(sha256, "", VOCAB, None, None, None),
        inputs=[],
        arguments=arguments,
    )
    records = [
        write_shard(root, header, part, min(PACKS_A_SHARD, num_packs - begin), draw)
        for part, begin in enumerate(range(0, num_packs, PACKS_A_SHARD))
    ]
    manifest = msgspec.structs.replace(Summary(header).manifest([]), parts=[], shards=records, dataset_digest="bench")
    write_record(root / MANIFEST, manifest)


def write_shard(root: Path, header: DatasetHeader, part: int, count: int, draw: np.random.Generator) -> ShardRecord:
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
    written = write_arrow(root / path, columns, header.shard_metadata(BUCKET), PACKS_A_SHARD)
    tokens = count * BUCKET
    return ShardRecord(
        path=path,
        split="train",
        bucket=BUCKET,
        part=part,
        samples=count,
        sequences=len(lengths),
        rows=count,
        tokens=tokens,
        model_tokens=tokens,
        loss_tokens=int(columns["n_loss"].sum()),
        bytes=written.bytes,
        sha256=written.sha256,
        token_digest="",
    )


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
    parser.add_argument("--tokens", type=int, default=540_000_000)
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "mm-bench-venvs")
    parser.add_argument("--peer", help=argparse.SUPPRESS)  # this script in a peer's environment: PEER ROWS
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(run_peer(arguments.peer, arguments.rows)))
        return
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "dataset"
        root.mkdir()
        make_dataset(root, max(BATCH, arguments.tokens // BUCKET))
        opening = min(time_opening(root) for _ in range(5))
        dataset = open_dataset(root)
        loader = Loader([dataset], batch_tokens=BATCH * BUCKET, seed=0, micro_tokens=BATCH * BUCKET)
        split = dataset.split("train")
        num_batches = split.num_samples() // BATCH
        order = np.random.default_rng(1).permutation(num_batches * BATCH).reshape(-1, BATCH).tolist()
        views = [[split.sample(BUCKET, i).ids for i in picked] for picked in order]
        bench = {
            "mm Loader: ids, mask, cu_seqlens, shuffled": rate(
                lambda k: sum(len(batch.ids) for batch in loader.batch(k % loader.steps_per_epoch))
            ),
            "bound: the ids' views joined and cast, nothing else": rate(lambda k: copy_only(views[k % num_batches])),
        }
        size = sum(shard.bytes for shard in dataset.shards())
        rows = Path(directory) / "rows.npy"
        np.save(rows, np.random.default_rng(2).integers(0, VOCAB, (PEER_ROWS, BUCKET)).astype(np.uint16))
        for name in PEERS:
            bench |= peer(name, arguments.venvs, rows)
    report(bench, opening, size, split.num_samples())


def time_opening(root: Path) -> float:
    start = time.perf_counter()
    Loader([open_dataset(root)], batch_tokens=BATCH * BUCKET, seed=0)
    return time.perf_counter() - start


def copy_only(views: list[np.ndarray]) -> int:
    return len(np.frombuffer(b"".join(views), np.uint16).astype(np.int32))  # type: ignore[arg-type]


def peer(name: str, venvs: Path, rows: Path) -> dict[str, float]:
    """A peer's rate, measured in its own environment; nothing, and why, when that cannot be had."""
    home = venvs / name
    python = home / "bin" / "python"
    try:
        if not (home / "ready").exists():
            venv.create(home, with_pip=True, clear=True)
            site = next(home.glob("lib/python*/site-packages"))
            (site / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            pip = [str(python), "-m", "pip", "install", "-q", "--no-deps", *PEERS[name].split()]
            subprocess.run(pip, check=True, capture_output=True, text=True)
            if name == "streaming":
                stand_in_for_torchvision(site)
            (home / "ready").touch()
        command = [str(python), "-W", "ignore", __file__, "--peer", name, "--rows", str(rows)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        print(f"peer {name}: no row ({said[-1] if said else error})")
        return {}


def stand_in_for_torchvision(site: Path) -> None:
    """MosaicML Streaming imports three names of torchvision for its image classes; a build for this torch may not exist."""
    for path, text in (
        ("__init__.py", ""),
        ("datasets.py", "class VisionDataset: ...\nclass CIFAR10: ...\n"),
        ("transforms/__init__.py", ""),
        ("transforms/functional.py", "def to_tensor(x): raise NotImplementedError\n"),
    ):
        (site / "torchvision" / path).parent.mkdir(parents=True, exist_ok=True)
        (site / "torchvision" / path).write_text(text)


def run_peer(name: str, path: Path) -> dict[str, float]:
    """Inside a peer's environment: writes the rows in its format, and reads them at random."""
    import torch

    torch.set_num_threads(1)
    rows = np.load(path)
    read, title = {"datasets": open_datasets, "streaming": open_streaming, "litdata": open_litdata}[name](
        rows, path.parent
    )
    order = np.random.default_rng(1).integers(0, len(rows) - 1, (4096, BATCH)).tolist()
    assert torch.equal(read([7, 3]), torch.from_numpy(rows[[7, 3]].astype(np.int64))), "the peer reads other rows"
    return {title: rate(lambda k: read(order[k % 4096]).numel())}


def open_datasets(rows: np.ndarray, directory: Path) -> tuple[Callable[[list[int]], Any], str]:
    import datasets
    import pyarrow as pa
    import torch

    values = pa.ListArray.from_arrays(np.arange(0, rows.size + 1, BUCKET, dtype=np.int32), pa.array(rows.reshape(-1)))
    datasets.Dataset(pa.table({"ids": values})).save_to_disk(str(directory / "hf"))
    found = datasets.load_from_disk(str(directory / "hf")).with_format("torch")
    return lambda picked: torch.stack(
        [found[i]["ids"] for i in picked]
    ).long(), f"datasets {datasets.__version__}, torch format"


def open_streaming(rows: np.ndarray, directory: Path) -> tuple[Callable[[list[int]], Any], str]:
    import streaming
    import torch

    with streaming.MDSWriter(out=str(directory / "mds"), columns={"ids": f"ndarray:uint16:{BUCKET}"}) as writer:
        for row in rows:
            writer.write({"ids": row})
    found = streaming.StreamingDataset(local=str(directory / "mds"), batch_size=BATCH)
    read = lambda picked: torch.from_numpy(np.stack([found[i]["ids"] for i in picked]).astype(np.int64))  # noqa: E731
    return read, f"MosaicML Streaming {streaming.__version__}"


def open_litdata(rows: np.ndarray, directory: Path) -> tuple[Callable[[list[int]], Any], str]:
    import litdata
    import torch
    from litdata.streaming.writer import BinaryWriter

    loader = litdata.TokensLoader(block_size=BUCKET)
    writer = BinaryWriter(str(directory / "lit"), chunk_size=BUCKET * len(rows), item_loader=loader)
    for i, row in enumerate(rows):
        writer[i] = torch.from_numpy(row.astype(np.int32))
    writer.done()
    writer.merge()
    found = litdata.StreamingDataset(str(directory / "lit"), item_loader=litdata.TokensLoader(block_size=BUCKET))
    return lambda picked: torch.stack([found[i] for i in picked]).long(), f"litdata {litdata.__version__}, TokensLoader"


def report(bench: dict[str, float], opening: float, size: int, samples: int) -> None:
    own = next(iter(bench.values()))
    print(f"{samples:,} packs of {BUCKET}, {size / 2**20:,.0f} MiB; batches of {BATCH} x {BUCKET}")
    for name, tokens in bench.items():
        print(f"  {name:55} {tokens / 1e6:8.1f} Mtok/s of CPU   mm is {own / tokens:6.2f}x")
    print(f"  opening the dataset, Loader included, warm: {1000 * opening:.2f} ms")
    print("for RESULTS.md:")
    for name, tokens in bench.items():
        print(f"| loader, {BATCH}x{BUCKET} batch: {name} | {tokens / 1e6:.1f} Mtok/s per core |")
    print(f"| open a dataset of {size / 2**20:,.0f} MiB, warm | {1000 * opening:.2f} ms |")


if __name__ == "__main__":
    main()
