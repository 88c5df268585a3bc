"""MB/s of jsonl of `mm pack`, and its share of the raw encoder's rate, on seeded conversations and documents.

    python tests/bench/pack.py [--tokenizer DIR] [--megabytes 20] [--workers 1 2]

Rates are bytes of jsonl by wall time and, for one process, by its CPU time with the encoder on one thread. The raw
encoder gets the same text as ready strings, in the same batches, and does nothing else. The peer is what a careful user
writes with HF `datasets`: batched map, the same tokenizer, template by hand, mask by hand; it needs `datasets` installed.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the first use: rates are per core
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmdata.pipeline import pack  # noqa: E402
from mmdata.tokenizer import CHATML, Tokenizer, train_bpe  # noqa: E402

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
ENGLISH = ("the", "of", "river", "light", "under", "small", "because", "water", "people", "answer", "open", "between")
CHINESE = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经"


def sentence(draw: random.Random) -> str:
    """Half Chinese, half English, with made-up words and numbers so that a cache of words does not do the work."""
    if draw.random() < 0.5:
        return "".join(draw.choice(CHINESE) for _ in range(draw.randint(8, 40))) + "。"
    made_up = "".join(draw.choice("aeioulnrstmkpd") for _ in range(draw.randint(3, 9)))
    words = [draw.choice(ENGLISH) for _ in range(draw.randint(5, 18))]
    return " ".join([*words, made_up, str(draw.randint(0, 9999))]) + ". "


def text(draw: random.Random, most: int) -> str:
    return "".join(sentence(draw) for _ in range(draw.randint(1, most)))


def conversation(draw: random.Random) -> dict[str, Any]:
    roles = ["user", "assistant"] * draw.randint(1, 3)
    return {"conversations": [{"role": role, "content": text(draw, 8)} for role in roles]}


def document(draw: random.Random) -> dict[str, Any]:
    return {"text": text(draw, 20)}


def write(path: Path, make: Callable[[random.Random], dict[str, Any]], num_bytes: int) -> int:
    """A jsonl file of about this size; its exact size."""
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            file.write(json.dumps(make(draw), ensure_ascii=False) + "\n")
    return path.stat().st_size


def rendered(path: Path) -> Iterator[str]:
    """The text the encoder has to encode, a string a row."""
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            turns = row.get("conversations", ())
            yield row.get("text") or "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns)


def raw_encoder(path: Path, tokenizer: Tokenizer) -> float:
    """CPU seconds of encode_batch_fast alone, over all text of the file."""
    texts = list(rendered(path))
    start = time.process_time()
    for begin in range(0, len(texts), 1000):
        tokenizer.native.encode_batch_fast(texts[begin : begin + 1000], add_special_tokens=False)
    return time.process_time() - start


def peer(path: Path, tokenizer: Tokenizer, workers: int, cache: Path) -> float | None:
    """Wall seconds of load_dataset and map with the same template and mask; None when `datasets` is not installed."""
    try:
        import datasets
    except ImportError:
        return None
    datasets.disable_progress_bars()
    shutil.rmtree(cache, ignore_errors=True)
    start = time.monotonic()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    rows.map(
        _map_batch,
        batched=True,
        num_proc=workers if workers > 1 else None,
        remove_columns=rows.column_names,
        fn_kwargs={"tokenizer_dir": str(tokenizer.dir)},
        load_from_cache_file=False,
    )
    return time.monotonic() - start


_peer_tokenizer: list[Any] = []


def _map_batch(batch: dict[str, list[Any]], tokenizer_dir: str) -> dict[str, list[Any]]:
    import tokenizers

    if not _peer_tokenizer:
        _peer_tokenizer.append(tokenizers.Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json")))
    native = _peer_tokenizer[0]
    if "text" in batch:
        encoded = native.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [e.ids for e in encoded], "loss_mask": [[1] * len(e.ids) for e in encoded]}
    turns = [[(m["role"], m["content"]) for m in row] for row in batch["conversations"]]
    texts = ["".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in row) for row in turns]
    start, end = (
        native.encode(mark, add_special_tokens=False).ids for mark in ("<|im_start|>assistant\n", "<|im_end|>\n")
    )
    ids = [e.ids for e in native.encode_batch_fast(texts, add_special_tokens=False)]
    return {"input_ids": ids, "loss_mask": [_scan(row, start, end) for row in ids]}


def _scan(ids: list[int], start: list[int], end: list[int]) -> list[int]:
    """The mask by looking for the marks, token by token, as training scripts do."""
    mask = [0] * len(ids)
    i = 0
    while i < len(ids):
        if ids[i : i + len(start)] == start:
            i += len(start)
            while i < len(ids) and ids[i : i + len(end)] != end:
                mask[i] = 1
                i += 1
            for _ in range(min(len(end), len(ids) - i)):
                mask[i] = 1
                i += 1
        else:
            i += 1
    return mask


def main() -> None:
    """Prints a table, and the lines for RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="default: one of 6,400 tokens trained on the same text")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    lines: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        files = {name: root / f"{name}.jsonl" for name in ("conversations", "documents")}
        for name, make in (("conversations", conversation), ("documents", document)):
            write(files[name], make, int(arguments.megabytes * 1e6))
        tokenizer = Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else train(root, files)
        for name, path in files.items():
            lines += measure(root, name, path, tokenizer, arguments.workers)
    for what, figure in lines:
        print(f"  {what:70} {figure}")
    print("for RESULTS.md:")
    for what, figure in lines:
        print(f"| {what} | {figure} |")


def train(root: Path, files: dict[str, Path]) -> Tokenizer:
    texts = (line for path in files.values() for line, _ in zip(rendered(path), range(2000), strict=False))
    return train_bpe(texts, vocab_size=6400, control_tokens=CONTROL, chat_template=CHATML, out_dir=root / "tokenizer")


def measure(root: Path, name: str, path: Path, tokenizer: Tokenizer, all_workers: list[int]) -> list[tuple[str, str]]:
    megabytes = path.stat().st_size / 1e6
    raw = raw_encoder(path, tokenizer)
    lines = [(f"raw encoder alone, {name}", f"{megabytes / raw:.2f} MB/s of jsonl per core")]
    for workers in all_workers:
        cpu = time.process_time()
        result = pack(
            [path],
            root / f"{name}{workers}",
            tokenizer_dir=tokenizer.dir,
            max_len=1024,
            workers=workers,
            part_bytes=4 * 2**20,
        )
        cpu = time.process_time() - cpu
        figure = f"{megabytes / result.seconds:.2f} MB/s wall, fill {100 * result.fill:.2f}%"
        if workers == 1:
            figure += f"; {megabytes / cpu:.2f} MB/s per core = {100 * raw / cpu:.0f}% of the raw encoder"
        lines.append((f"mm pack {name}, {workers} worker(s), {megabytes:.0f} MB", figure))
        seconds = peer(path, tokenizer, workers, root / "cache")
        what = f"datasets.map {name}, num_proc={workers}, tokens and mask, no packing"
        lines.append((what, f"{megabytes / seconds:.2f} MB/s wall" if seconds else "`datasets` is not installed"))
    return lines


if __name__ == "__main__":
    main()
