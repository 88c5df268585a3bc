"""Adding tokens to a tokenizer without changing the meaning of any id: `mm tokenizer extend`. New tokens get the ids
after the last one; training continues once the model's embedding has grown (`mm train --resize-embeddings`). With
`reserved` they replace reserved tokens (`<|buffer1|>` …), whose rows, never trained, are initialized again."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from mmdata.errors import TokenizerError, UsageError
from mmdata.io.records import JsonObject
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.train import added_token, publish
from mmdata.tokenizer.vocabulary import added_ids, is_reserved


def extend(
    directory: Path, tokens: Sequence[str], out: Path, *, is_control: bool = False, reserved: bool = False
) -> dict[str, int]:
    """Add tokens to the tokenizer in `directory`, write it to the directory `out`, and return their ids. is_control:
    only chat templates write these tokens. reserved: replace reserved tokens in place of adding ids. Raises UsageError
    for tokens that are empty, given twice or in the tokenizer already, too few reserved tokens, or an `out` that is not
    empty; TokenizerError if the tokenizer cannot be read or its ids have gaps."""
    old = Tokenizer.load(directory)
    _check(old, tokens, out)
    parts = json.loads(old.files["tokenizer.json"])
    config = json.loads(old.files.get("tokenizer_config.json", b"{}"))
    ids = _take_reserved(old, parts, tokens) if reserved else range(old.vocab_size, old.vocab_size + len(tokens))
    kept = [token for token in parts["added_tokens"] if token["id"] not in ids]
    entries = [added_token(id, token, is_control=is_control) for id, token in zip(ids, tokens, strict=True)]
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
    new = Tokenizer(out, files)
    if [new.native.token_to_id(token) for token in tokens] != list(ids):
        raise TokenizerError(
            f"{old.dir}: the tokenizers library gave the added tokens other ids than {list(ids)}",
            "its ids have gaps: `mm tokenizer check` shows them",
        )
    assert list(added_ids(old, new)) == list(ids)
    publish(out, files)
    return dict(zip(tokens, ids, strict=True))


def _check(old: Tokenizer, tokens: Sequence[str], out: Path) -> None:
    """Raise UsageError if the tokens cannot be added, or if `out` is not a new or empty directory."""
    if not tokens:
        raise UsageError("no token to add", f"mm tokenizer extend {old.dir} --add '<think>' --add '</think>' --out DIR")
    for token in tokens:
        if not token.strip() or tokens.count(token) > 1:
            raise UsageError(f"--add {token!r}: empty, or given twice", "give each token once")
        id = old.native.token_to_id(token)
        if id is not None:
            raise UsageError(f"--add {token!r}: {old.dir} has it already, with id {id}", "leave it out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty", "choose another --out")


def _take_reserved(old: Tokenizer, parts: JsonObject, tokens: Sequence[str]) -> list[int]:
    """Rename the first reserved tokens in tokenizer.json's vocabulary. Returns their ids; UsageError if too few."""
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
