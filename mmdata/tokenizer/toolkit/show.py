"""A tokenizer and a text in, or a stretch of its vocabulary; tokens as people can read them out."""

from typing import Any

from mmdata.errors import UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import legible, token_texts


def split_text(tokenizer: Tokenizer, text: str, *, control: bool = False) -> list[dict[str, Any]]:
    """A text's tokens: id, legible text, bytes in hex, and a note where a token is control or part of a character.

    A character that several tokens share is named with each of them. With `control`, control strings become control tokens.
    """
    flat, _ = tokenizer.encode_batch([text], control=control)
    ids = flat.tolist()
    texts = token_texts(tokenizer)
    whole = b"".join(texts[id] or b"" for id in ids)
    characters = _characters(whole)
    entries, begin = [], 0
    for id in ids:
        data = texts[id] or b""
        entry = _entry(tokenizer, id, data)
        inside = [char for at, char in characters.items() if at < begin + len(data) and at + len(char.encode()) > begin]
        torn = (
            [char for char in inside if char not in entry["text"] and char.isprintable()]
            if "‹" in entry["text"]
            else []
        )
        if torn:
            entry["note"] = " ".join(filter(None, (entry["note"], f"part of {' '.join(torn)}")))
        entries.append(entry)
        begin += len(data)
    return entries


def stretch(tokenizer: Tokenizer, begin: int, count: int, find: str | None = None) -> list[dict[str, Any]]:
    """`count` ids from `begin` on; with `find` only those whose bytes hold that text. UsageError past the last id."""
    if not 0 <= begin < tokenizer.vocab_size or count < 1:
        raise UsageError(
            f"--from {begin} --count {count}: {tokenizer.dir} has ids 0 to {tokenizer.vocab_size - 1:,}", "--from 0"
        )
    texts = token_texts(tokenizer)
    sought = (find or "").encode()
    ids = (id for id in range(begin, tokenizer.vocab_size) if not sought or sought in (texts[id] or b""))
    return [_entry(tokenizer, id, texts[id] or b"") for id, _ in zip(ids, range(count), strict=False)]


def _entry(tokenizer: Tokenizer, id: int, data: bytes) -> dict[str, Any]:
    added = tokenizer.added.get(id)
    note = "" if added is None else "control" if added.special else "added"
    return {"id": id, "text": legible(data) if data else "(no token)", "bytes": data.hex(" "), "note": note}


def _characters(data: bytes) -> dict[int, str]:
    """Where each character that takes several bytes begins."""
    found, begin = {}, 0
    for char in data.decode("utf-8", errors="replace"):
        length = len(char.encode())
        if length > 1:
            found[begin] = char
        begin += length
    return found
