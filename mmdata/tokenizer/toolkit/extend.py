"""A tokenizer's directory and a few tokens in; a directory with these tokens added after the last id out.

Every id that was there keeps its meaning, so a model goes on with it once its embedding has grown
(`mm train --resize-embeddings`). With `reserved`, tokens take the places of reserved ones (`<|buffer1|>` …) and no model has
to become larger; their rows, which nothing trained, are made anew all the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mmdata.errors import TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.train import publish
from mmdata.tokenizer.vocabulary import added_ids, is_reserved


def extend(
    directory: Path, tokens: Sequence[str], out: Path, *, is_control: bool = False, reserved: bool = False
) -> dict[str, int]:
    """Write the tokenizer with `tokens` added to `out`; gives their ids.

    `is_control`: only templates write them, text never becomes them. UsageError for tokens that are there already, that
    are empty, or for an `out` that holds something.
    """
    old = Tokenizer.load(directory)
    _check(old, tokens, out)
    parts = json.loads(old.files["tokenizer.json"])
    config = json.loads(old.files.get("tokenizer_config.json", b"{}"))
    ids = _take_reserved(old, parts, tokens) if reserved else range(old.vocab_size, old.vocab_size + len(tokens))
    kept = [token for token in parts["added_tokens"] if token["id"] not in ids]
    entries = [_entry(id, token, is_control) for id, token in zip(ids, tokens, strict=True)]
    parts["added_tokens"] = sorted(kept + entries, key=lambda token: token["id"])
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        decoder.update({str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries})
    if is_control:
        config["additional_special_tokens"] = [*(config.get("additional_special_tokens") or []), *tokens]
    native = tokenizers.Tokenizer.from_str(json.dumps(parts))
    files = old.files | {
        "tokenizer.json": native.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
    }
    _verify(old, Tokenizer(out, files), tokens, list(ids))
    publish(out, files)
    return dict(zip(tokens, ids, strict=True))


def _entry(id: int, token: str, is_control: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": id, "content": token, **dict.fromkeys(names, False), "special": is_control}


def _check(old: Tokenizer, tokens: Sequence[str], out: Path) -> None:
    if not tokens:
        raise UsageError("no token to add", f"mm tokenizer extend {old.dir} --add '<think>' --add '</think>' --out DIR")
    for token in tokens:
        if not token.strip() or tokens.count(token) > 1:
            raise UsageError(f"--add {token!r}: empty, or given twice", "give each token once")
        if old.native.token_to_id(token) is not None:
            raise UsageError(
                f"--add {token!r}: {old.dir} has it already, with id {old.native.token_to_id(token)}", "leave it out"
            )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty", "choose another --out")


def _take_reserved(old: Tokenizer, parts: dict[str, Any], tokens: Sequence[str]) -> list[int]:
    """Ids of reserved tokens, which are taken out of the vocabulary under their old names."""
    free = [(id, token.content) for id, token in sorted(old.added.items()) if is_reserved(token.content.encode())]
    if len(free) < len(tokens):
        raise UsageError(
            f"{old.dir} has {len(free)} reserved tokens, {len(tokens)} are to be placed",
            "leave --reserved out: the tokens then go after the last id",
        )
    vocab = parts["model"].get("vocab")
    for (id, name), token in zip(free, tokens, strict=False):
        if isinstance(vocab, dict):
            if name in vocab:
                vocab[token] = vocab.pop(name)
        elif isinstance(vocab, list) and id < len(vocab) and vocab[id][0] == name:
            vocab[id][0] = token
    return [id for id, _ in free[: len(tokens)]]


def _verify(old: Tokenizer, new: Tokenizer, tokens: Sequence[str], ids: list[int]) -> None:
    """The promise, held before anything is written: the tokens have these ids, all others mean what they meant."""
    if [new.native.token_to_id(token) for token in tokens] != ids:
        raise TokenizerError(
            f"{old.dir}: its library gave the added tokens other ids than {ids}",
            "its ids have gaps: `mm tokenizer check` shows them",
        )
    assert list(added_ids(old, new)) == ids
