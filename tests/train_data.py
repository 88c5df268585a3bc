"""Small packed datasets of all three row kinds for the trainer's tests: sums in words, made here, packed once a session (conftest.py)."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.tokenizer.tokenizer import CHATML, train_bpe

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]


def run_json(run_dir: Path) -> dict[str, Any]:
    """run.json of a run, as it is in the file."""
    return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Data:
    """Directories of the packed datasets, and of one packed with another tokenizer."""

    tokenizer: Path
    pretrain: Path
    sft: Path
    dpo: Path
    other: Path


def of(root: Path) -> Data:
    """The directories that `make` writes."""
    return Data(root / "tokenizer", *(root / f"shards_{name}" for name in ("pretrain", "sft", "dpo", "other")))


def make(root: Path) -> None:
    """Write jsonl files into an empty directory, train two tokenizers, pack."""
    draw = random.Random(3)
    texts, chats, pairs = [], [], []
    for _ in range(240):
        a, b = draw.randrange(9), draw.randrange(8)
        question, answer = f"{WORDS[a]} and {WORDS[b]}?", f"{WORDS[a + b]}."
        texts.append({"text": f"{question} " * draw.randrange(1, 4) + answer})
        prompt = [{"role": "user", "content": question}]
        chats.append({"conversations": [*prompt, {"role": "assistant", "content": answer}]})
        worse = {"role": "assistant", "content": f"I think {WORDS[draw.randrange(17)]}"}
        pairs.append({"chosen": [*prompt, {"role": "assistant", "content": answer}], "rejected": [*prompt, worse]})
    sources = {"pretrain": texts, "sft": chats, "dpo": pairs}
    for name, rows in sources.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, size in (("tokenizer", 300), ("other", 280)):
        words = (row["text"] for row in texts)
        train_bpe(words, vocab_size=size, control_tokens=CONTROL, chat_template=CHATML, out_dir=root / name)
    for name in sources:
        _pack(root, name, root / "tokenizer", root / f"shards_{name}")
    _pack(root, "sft", root / "other", root / "shards_other")


def pack_to(data: Data, name: str, out: Path, *, val_fraction: float) -> None:
    """Pack one of the files once more, with another split."""
    _pack(data.tokenizer.parent, name, data.tokenizer, out, val_fraction)


def _pack(root: Path, name: str, tokenizer: Path, out: Path, val_fraction: float = 0.1) -> None:
    pack([root / f"{name}.jsonl"], out, PackOptions(tokenizer=tokenizer, max_len=128, val_fraction=val_fraction))
