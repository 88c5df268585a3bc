"""Tokenizers and one corpus of text in; figures side by side out: how well each compresses what, which of its tokens are
used, whether text comes back exactly, how fast it is, and what that means for a model.

Costs about a second a megabyte and tokenizer. A rate of bytes a token can be compared only over the same text.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.hostile import hostile_strings
from mmdata.tokenizer.toolkit.sample import Corpus
from mmdata.tokenizer.vocabulary import legible, token_texts

LIMIT_BYTES = 10_000_000
NUM_HOSTILE = 1000
NUM_SHOWN = 10
_BATCH = 1000
_HAN = re.compile(r"[\u3400-\u9fff]+")
_WORD = re.compile(r" ?[A-Za-z]+(?:'[a-z]+)?")
GIGABYTE = 1_000_000_000
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model preset what a vocabulary changes: its width, and all other weights. A preset's own limit of ids, 0: none."""

    hidden_size: int
    num_other_params: int
    max_vocab: int = 0


def evaluate(
    tokenizers: Sequence[Tokenizer],
    corpus: Corpus,
    *,
    shapes: Mapping[str, Shape],
    step_tokens: int,
    num_hostile: int = NUM_HOSTILE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All figures, plain and ready for JSON. progress counts bytes of text over all tokenizers."""
    groups = [(stratum, texts) for stratum, texts in corpus.groups()]
    total = corpus.drawn_bytes * len(tokenizers)
    figures = []
    for index, tokenizer in enumerate(tokenizers):
        begin = index * corpus.drawn_bytes
        tick = (lambda done, begin=begin: progress(begin + done, total)) if progress else None
        figures.append(_one(tokenizer, groups, shapes, step_tokens, num_hostile, tick))
    return {
        "text": {
            "bytes": corpus.drawn_bytes,
            "characters": sum(len(text) for _, texts in groups for text in texts),
            "texts": sum(len(texts) for _, texts in groups),
            "rows": corpus.num_rows,
            "left_out": {name: dict(counts) for name, counts in corpus.left_out.items()},
            "found_bytes": sum(stratum.found_bytes for stratum in corpus.strata),
        },
        "step_tokens": step_tokens,
        "tokenizers": figures,
    }


def _one(
    tokenizer: Tokenizer,
    groups: Sequence[tuple[Any, list[str]]],
    shapes: Mapping[str, Shape],
    step_tokens: int,
    num_hostile: int,
    tick: Callable[[int], None] | None,
) -> dict[str, Any]:
    by_language: dict[str, Counter[str]] = {}
    by_file: dict[str, Counter[str]] = {}
    uses = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    changed: list[str] = []
    seconds = {"encode": 0.0, "decode": 0.0}
    done = 0
    for stratum, texts in groups:
        counts = Counter({"bytes": 0, "characters": 0, "tokens": 0})
        for begin in range(0, len(texts), _BATCH):
            batch = texts[begin : begin + _BATCH]
            num_bytes = sum(len(text.encode()) for text in batch)
            ids = _round_trip(tokenizer, batch, seconds, changed)
            uses += np.bincount(ids, minlength=len(uses))
            counts.update(bytes=num_bytes, characters=sum(map(len, batch)), tokens=len(ids))
            done += num_bytes
            if tick:
                tick(done)
        by_language.setdefault(stratum.language, Counter()).update(counts)
        by_file.setdefault(stratum.file, Counter()).update(counts)
    whole = sum(by_language.values(), Counter())
    texts = [text for _, found in groups for text in found]
    return {
        "name": str(tokenizer.dir),
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **_rates(whole),
        "by_language": {name: _rates(counts) for name, counts in sorted(by_language.items())},
        "by_file": {name: _rates(counts) for name, counts in by_file.items()},
        **_fertility(tokenizer, texts),
        **_vocabulary(tokenizer, uses),
        "round_trip": _exactness(tokenizer, len(texts), changed, num_hostile),
        "encode_mb_per_cpu_s": whole["bytes"] / 1e6 / max(seconds["encode"], 1e-9),
        "decode_mb_per_cpu_s": whole["bytes"] / 1e6 / max(seconds["decode"], 1e-9),
        "embedding": _embedding(tokenizer.vocab_size, shapes),
        "tokens_per_gigabyte": round(GIGABYTE * whole["tokens"] / whole["bytes"]),
        "steps_per_gigabyte": round(GIGABYTE * whole["tokens"] / whole["bytes"] / step_tokens),
    }


def _round_trip(tokenizer: Tokenizer, batch: list[str], seconds: dict[str, float], changed: list[str]) -> np.ndarray:
    """Ids of a batch; adds CPU seconds, and texts that did not come back."""
    begun = time.process_time()
    flat, ends = tokenizer.encode_batch(batch)
    middle = time.process_time()
    lists = [part.tolist() for part in np.split(flat, ends[:-1])]
    back = tokenizer.native.decode_batch(lists, skip_special_tokens=False)
    seconds["encode"] += middle - begun
    seconds["decode"] += time.process_time() - middle
    changed += [text for text, other in zip(batch, back, strict=True) if text != other]
    return flat


def _rates(counts: Mapping[str, int]) -> dict[str, Any]:
    tokens = max(counts["tokens"], 1)
    return {
        "bytes": counts["bytes"],
        "tokens": counts["tokens"],
        "bytes_per_token": counts["bytes"] / tokens,
        "characters_per_token": counts["characters"] / tokens,
    }


def _fertility(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float | None]:
    """Tokens of a word (Latin letters and the space before), and of a Chinese character, each run encoded on its own."""
    words: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for text in texts:
        words.update(_WORD.findall(text))
        runs.update(_HAN.findall(text))
    return {
        "tokens_per_word": _mean_tokens(tokenizer, words, words.total()),
        "tokens_per_chinese_character": _mean_tokens(tokenizer, runs, sum(len(run) * n for run, n in runs.items())),
    }


def _mean_tokens(tokenizer: Tokenizer, counted: Counter[str], total: int) -> float | None:
    if not total:
        return None
    _, ends = tokenizer.encode_batch(list(counted))
    return float((np.diff(ends, prepend=0) * np.fromiter(counted.values(), np.int64, len(counted))).sum() / total)


def _vocabulary(tokenizer: Tokenizer, uses: np.ndarray) -> dict[str, Any]:
    """Which tokens the text used. Glitch-prone are those it never did and a model's input can hold all the same: an
    embedding nobody trained. Bytes and added tokens are not counted among them, they are there for what may come."""
    texts = token_texts(tokenizer)
    ordinary = [id for id, text in enumerate(texts) if text is not None and id not in tokenizer.added]
    lone = [id for id in ordinary if len(texts[id] or b"") == 1 and (texts[id] or b"\0")[0] >= 0x80]
    unused = [id for id in ordinary if not uses[id]]
    glitch = [id for id in unused if len(texts[id] or b"") > 1]
    longest = sorted(ordinary, key=lambda id: (-len(texts[id] or b""), id))[:NUM_SHOWN]
    total = max(int(uses.sum()), 1)
    return {
        "byte_fallback_share": float(uses[lone].sum()) / total,
        "vocab_used": int((uses > 0).sum()),
        "vocab_used_share": float((uses[ordinary] > 0).mean()),
        "never_used": len(unused),
        "never_used_bytes": len(unused) - len(glitch),
        "glitch_prone": len(glitch),
        "glitch_prone_tokens": [_shown(id, texts, uses) for id in glitch[-NUM_SHOWN:]],
        "rarely_used": sum(1 for id in ordinary if 0 < uses[id] < 10),
        "longest_tokens": [_shown(id, texts, uses) for id in longest],
    }


def _shown(id: int, texts: Sequence[bytes | None], uses: np.ndarray) -> dict[str, Any]:
    return {"id": id, "text": legible(texts[id] or b""), "bytes": len(texts[id] or b""), "uses": int(uses[id])}


def _exactness(tokenizer: Tokenizer, num_texts: int, changed: list[str], num_hostile: int) -> dict[str, Any]:
    strings = list(hostile_strings(num_hostile, control=list(tokenizer.control_tokens)))
    torn: list[str] = []
    for begin in range(0, len(strings), _BATCH):
        _round_trip(tokenizer, strings[begin : begin + _BATCH], {"encode": 0.0, "decode": 0.0}, torn)
    examples = sorted((*changed, *torn), key=len)[:3]
    return {
        "texts": num_texts,
        "texts_changed": len(changed),
        "hostile": len(strings),
        "hostile_changed": len(torn),
        "examples": [text[:200] for text in examples],
    }


def _embedding(vocab_size: int, shapes: Mapping[str, Shape]) -> dict[str, dict[str, Any]]:
    """What the embedding, counted once, takes of a model with this vocabulary."""
    found = {}
    for name, shape in shapes.items():
        params = vocab_size * shape.hidden_size
        share = params / (params + shape.num_other_params)
        found[name] = {"params": params, "share": share, "fits": not shape.max_vocab or vocab_size <= shape.max_vocab}
    return found
