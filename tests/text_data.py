"""A few hundred rows of each kind, in two languages and code, and a small tokenizer trained on them; for the toolkit's tests."""

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.options import TokenizerOptions
from mmdata.tokenizer.toolkit.train import train

WORDS = [
    "river",
    "stone",
    "under",
    "light",
    "because",
    "water",
    "answer",
    "between",
    "small",
    "people",
    "window",
    "garden",
    "seven",
    "never",
]
CHINESE = "今天天气很好我们去公园散步吧春江花月夜人工智能语言模型学习数据河水"


def sentence(draw: random.Random, language: str) -> str:
    if language == "zh":
        return "".join(draw.choice(CHINESE) for _ in range(draw.randint(4, 20))) + "。"
    if language == "code":
        return f"```\ndef f{draw.randrange(99)}(x):\n    return x[{draw.randrange(9)}] + {draw.randrange(999)}\n```"
    return "The " + " ".join(draw.choice(WORDS) for _ in range(draw.randint(4, 12))) + f" {draw.randrange(100)}."


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make(root: Path, *, num_rows: int = 120) -> dict[str, Path]:
    """jsonl files by kind: documents (mostly English), conversations (mostly Chinese) and pairs."""
    draw = random.Random(5)
    documents = [{"text": sentence(draw, draw.choice(["en", "en", "en", "zh"]))} for _ in range(num_rows)]
    chats, pairs = [], []
    for _ in range(num_rows):
        language = draw.choice(["zh", "zh", "en", "code"])
        ask = {"role": "user", "content": sentence(draw, language)}
        said, worse = ({"role": "assistant", "content": sentence(draw, language)} for _ in range(2))
        chats.append({"conversations": [{"role": "system", "content": "Be kind."}, ask, said]})
        pairs.append({"chosen": [ask, said], "rejected": [ask, worse]})
    kinds = {"document": documents, "conversation": chats, "pair": pairs}
    return {kind: write(root / f"{kind}.jsonl", rows) for kind, rows in kinds.items()}


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="mm-test-")


@cache
def _trained(template: str, pattern: str, vocab_size: int, algorithm: str) -> dict[str, bytes]:
    """The files of a tokenizer, trained once a process."""
    files = list(make(Path(_scratch().name)).values())
    return train(files, TokenizerOptions(vocab_size, algorithm, template=template, pattern=pattern))[0]


def trained(
    root: Path,
    template: str = "minimind3",
    pattern: str = "digits",
    vocab_size: int = 420,
    algorithm: str = "bpe",
) -> Tokenizer:
    """A tokenizer trained on `make`'s files, loaded from root/TEMPLATE-PATTERN-SIZE."""
    out = root / f"{template}-{pattern}-{vocab_size}"
    out.mkdir()
    for name, content in _trained(template, pattern, vocab_size, algorithm).items():
        (out / name).write_bytes(content)
    return Tokenizer.load(out)
