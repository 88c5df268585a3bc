"""Small jsonl files of all three row kinds and a tokenizer for them, for the tests of packing, shards and loader."""

import json
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import PackResult, pack
from mmdata.tokenizer.tokenizer import CHATML, train_bpe

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "tide", "灯塔", "harbour", "绳子", "rope", "sail", "海图", "compass", "风", "wind", "anchor", "船", "boat", "gull", "雾", "fog", "bell", "码头", "pier", "oar",
)  # fmt: skip


def words(draw: random.Random, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


def document(draw: random.Random) -> dict[str, Any]:
    return {"text": words(draw, 60 if draw.random() < 0.9 else 900)}


def conversation(draw: random.Random) -> dict[str, Any]:
    roles = ["user", "assistant"] * draw.randint(1, 3)
    return {"conversations": [{"role": role, "content": words(draw, 14)} for role in roles]}


def pair(draw: random.Random) -> dict[str, Any]:
    prompt = [{"role": "user", "content": words(draw, 10)}]
    sides = [[*prompt, {"role": "assistant", "content": f"{name} {words(draw, 12)}"}] for name in ("yes", "no")]
    if draw.random() < 0.3:  # a second turn: its user message is not trained
        more = [{"role": "user", "content": words(draw, 4)}, {"role": "assistant", "content": words(draw, 5)}]
        sides[0] += more
    return {"chosen": sides[0], "rejected": sides[1]}


MAKERS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "document": document,
    "conversation": conversation,
    "pair": pair,
}


def write_rows(path: Path, kind: str, count: int, seed: int = 0) -> Path:
    """A jsonl file of `count` rows of a kind."""
    draw = random.Random(seed)
    path.write_text("".join(json.dumps(MAKERS[kind](draw), ensure_ascii=False) + "\n" for _ in range(count)))
    return path


def train_tokenizer(out: Path) -> None:
    """Train a tokenizer of 400 tokens with the plain ChatML template into `out`."""
    draw = random.Random(1)
    texts = (words(draw, 60) for _ in range(100))
    train_bpe(texts, vocab_size=400, control_tokens=CONTROL, chat_template=CHATML, out_dir=out)


def pack_with(inputs: Sequence[Path], out: Path, **arguments: Any) -> PackResult:
    """`pack` with the fields of its options and its callbacks as keywords."""
    callbacks = {name: arguments.pop(name) for name in ("progress", "watch", "note") if name in arguments}
    return pack(inputs, out, PackOptions(**arguments), **callbacks)


def pack_all(root: Path, tokenizer_dir: Path) -> None:
    """Pack 300 rows of each kind in several parts into ROOT/KIND, and keep the results in root/results.pickle."""
    results = {}
    for kind in MAKERS:
        path = write_rows(root / f"{kind}.jsonl", kind, 300)
        results[kind] = pack(
            [path], root / kind, PackOptions(tokenizer=tokenizer_dir, max_len=640, val_fraction=0.1, part_bytes=20_000)
        )
    (root / "results.pickle").write_bytes(pickle.dumps(results))


def old_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a dataset as older versions wrote it: with the records of parts, and without its own hash."""
    manifest = json.loads((directory / "manifest.json").read_bytes())
    manifest.pop("record_sha256", None)
    if (path := directory / "parts.jsonl").exists():
        parts = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        shards = [shard for part in parts for shard in part.pop("shards", [])]
        files = [file for part in parts for file in part.pop("files", [])]
        others = [file for file in manifest["files"] if file["path"] != "parts.jsonl"]
        manifest["parts"] = parts
        manifest["shards"] = sorted(shards, key=lambda shard: (shard["split"], shard["bucket"], shard["part"]))
        manifest["files"] = sorted([*others, *files], key=lambda file: file["path"])
    return manifest


def make_old(directory: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Write a dataset's manifest as older versions wrote it, after a change that only its own hash would show."""
    manifest = old_manifest(directory)
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))
