"""Small tokenizers of every era, for tests: the one in golden/tokenizer with each era's special ids and chat template.

golden/tokenizer was trained once on a few lines; it is shipped so that golden ids do not hang on a trainer's version.
It has merges across newlines and spaces, and <think> and <tool_call> as ordinary added tokens, as MiniMind's third era.
"""

import functools
import json
import tempfile
from pathlib import Path

from mmdata.tokenizer.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
TEMPLATES = sorted(path.stem for path in (HERE / "fixtures" / "templates").glob("*.jinja"))
_MARKS = {
    "seed": ("<s>", "</s>", "<unk>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|endoftext|>"),
    "chatml": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
}
# Splits before newlines as Qwen's does: "\n\n" is one token even where the first newline ends a header.
_NEWLINES_TOGETHER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": r"\p{L}+|\s*\n+|\s+(?!\S)|\s+|[^\s\p{L}]+"},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mm-test-")


@functools.cache
def directory(name: str, *, merges_newlines: bool = False, lstrip: bool = False) -> Path:
    """A tokenizer's directory with the template of that name; `lstrip`: its control tokens eat the space before them."""
    found = json.loads((HERE / "golden" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    if merges_newlines:
        found["pre_tokenizer"] = _NEWLINES_TOGETHER
    for token in found["added_tokens"]:
        token["lstrip"] = lstrip and token["special"]
    bos, eos, pad = _MARKS.get(name, _MARKS["chatml"])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": (HERE / "fixtures" / "templates" / f"{name}.jinja").read_text(encoding="utf-8"),
    }
    out = Path(_scratch().name) / f"{name}-{merges_newlines}-{lstrip}"
    out.mkdir(exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return out


@functools.cache
def tokenizer(name: str, *, merges_newlines: bool = False, lstrip: bool = False) -> Tokenizer:
    """As `directory`, loaded."""
    return Tokenizer.load(directory(name, merges_newlines=merges_newlines, lstrip=lstrip))
