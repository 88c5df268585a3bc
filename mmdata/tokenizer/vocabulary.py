"""What the ids of a tokenizer stand for, as bytes and in readable form, and how two vocabularies relate.

Files of byte-level vocabularies are hard to read: each byte is written as a printable character, "你好" as "ä½łå¥½".
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from mmdata.errors import TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import Tokenizer

_RESERVED = re.compile(rb"<\|(?:buffer|reserved|extra|unused)[_a-z]*_?\d+\|>")
_SHOWN = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


@cache
def byte_of() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for: GPT-2's table, character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


@lru_cache(maxsize=4)
def token_texts(tokenizer: Tokenizer) -> list[bytes | None]:
    """Return the bytes that each id stands for, a list of vocab_size; None for an id without a token. They need not be
    valid UTF-8: a token may be a part of a character."""
    texts: list[bytes | None] = [None] * tokenizer.vocab_size
    for token, id in tokenizer.native.get_vocab(with_added_tokens=True).items():
        if id in tokenizer.added:
            texts[id] = token.encode()
        elif tokenizer.decoder == "ByteLevel" and all(char in byte_of() for char in token):
            texts[id] = bytes(byte_of()[char] for char in token)
        elif len(token) == 6 and token.startswith("<0x"):
            texts[id] = bytes([int(token[3:5], 16)])
        else:
            texts[id] = token.replace("\u2581", " ").encode()
    return texts


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of UTF-8 bytes of each id, int64 [vocab_size]; 0 for control tokens and unused ids."""
    sizes = np.array([len(text or b"") for text in token_texts(tokenizer)], np.int64)
    sizes[list(tokenizer.control_tokens.values())] = 0
    return sizes


def legible(data: bytes) -> str:
    """Return bytes in readable form: characters as they are, bytes that are not a whole character in hex as ‹e4 bd›.
    Space, newline, tab and carriage return become ␣, ⏎, ⇥ and ␍, unprintable characters ‹U+200B› and the like."""
    pieces, begin = [], 0
    for at, char in (*_characters(data), (len(data), "")):
        if begin < at:
            pieces.append(f"‹{data[begin:at].hex(' ')}›")
        pieces.append(_SHOWN.get(char) or (char if char.isprintable() else f"‹U+{ord(char):04X}›"))
        begin = at + len(char.encode())
    return "".join(pieces)


def _characters(data: bytes) -> Iterator[tuple[int, str]]:
    """Yield (byte offset, character) of every whole UTF-8 character; bytes that are not valid UTF-8 are skipped."""
    begin = 0
    while begin < len(data):
        first = data[begin]
        length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        try:
            yield begin, data[begin : begin + length].decode("utf-8")
            begin += length
        except UnicodeDecodeError:
            begin += 1


# --- what `mm tokenizer show` prints


@dataclass(frozen=True, slots=True)
class TokenView:
    """A token in readable form. `bytes`: in hex. `note`: control or added, and the characters that it is a part of."""

    id: int
    text: str
    bytes: str
    note: str


def split_text(tokenizer: Tokenizer, text: str, *, control: bool = False) -> list[TokenView]:
    """Return the tokens of a text in order. The note of a token that is a part of a character names the character.
    control: whether special-token strings in the text become control tokens."""
    flat, _ = tokenizer.encode_batch([text], control=control)
    texts = token_texts(tokenizer)
    whole = b"".join(texts[id] or b"" for id in flat.tolist())
    characters = [(at, at + len(char.encode()), char) for at, char in _characters(whole) if ord(char) >= 0x80]
    views, begin = [], 0
    for id in flat.tolist():
        data = texts[id] or b""
        end = begin + len(data)
        shown = legible(data)
        cut = [
            char
            for first, last, char in (characters if "‹" in shown else ())
            if first < end and last > begin and char not in shown and char.isprintable()
        ]
        views.append(_view(tokenizer, id, data, f"part of {' '.join(cut)}" if cut else ""))
        begin = end
    return views


def list_tokens(tokenizer: Tokenizer, begin: int, count: int, find: str | None = None) -> list[TokenView]:
    """Return at most `count` tokens from id `begin` on. find: only those whose bytes contain this text; None for all.
    Raises UsageError if `begin` is not an id or `count` is less than 1."""
    if not 0 <= begin < tokenizer.vocab_size or count < 1:
        raise UsageError(
            f"--from {begin} --count {count}: {tokenizer.dir} has ids 0 to {tokenizer.vocab_size - 1:,}", "--from 0"
        )
    texts = token_texts(tokenizer)
    sought = (find or "").encode()
    ids = [id for id in range(begin, tokenizer.vocab_size) if sought in (texts[id] or b"")]
    return [_view(tokenizer, id, texts[id] or b"") for id in ids[:count]]


def _view(tokenizer: Tokenizer, id: int, data: bytes, note: str = "") -> TokenView:
    """Return an id in readable form. data: the bytes of the token; note: appended to "control" or "added"."""
    added = tokenizer.added.get(id)
    kind = "" if added is None else "control" if added.special else "added"
    return TokenView(id, legible(data) if data else "(no token)", data.hex(" "), " ".join(filter(None, (kind, note))))


# --- two vocabularies


@dataclass(frozen=True, slots=True)
class Relation:
    """How the ids of vocabulary B relate to those of A. An id is the same in both if its bytes are, and if it is a
    control token in both or in neither."""

    size_a: int
    size_b: int
    num_shared: int  # tokens that both have, with the same id or not
    same_ids: int  # ids that are the same token in both
    differing: tuple[int, ...]  # ids that are different tokens in A and B, those in `placed` left out
    placed: tuple[int, ...]  # ids of reserved tokens of A, such as <|buffer1|>, that are other tokens in B
    is_split_alike: bool  # whether normalizer, pre-tokenizer, merges and scores are the same

    @property
    def b_is_readable(self) -> bool:
        """Whether every id of B is the same token in A, so that a model trained with A can read B's ids."""
        return not self.differing and not self.placed and self.size_b <= self.size_a

    @property
    def b_extends_a(self) -> bool:
        """Whether B only adds tokens to A: it renames reserved tokens of A, has ids after A's last one, or both."""
        return not self.differing and self.size_b >= self.size_a and not self.b_is_readable

    @property
    def new_ids(self) -> tuple[int, ...]:
        """The ids of B that A has no meaning for: reserved tokens of A that B renamed, then those after A's last id."""
        return (*self.placed, *range(self.size_a, self.size_b))


def relate(a: Tokenizer, b: Tokenizer) -> Relation:
    """Compare two vocabularies id by id and return how B relates to A."""
    tokens_a, tokens_b = (_tokens_and_kinds(each) for each in (a, b))
    pairs = list(zip(tokens_a, tokens_b, strict=False))
    unlike = [id for id, (one, other) in enumerate(pairs) if one != other]
    placed = tuple(id for id in unlike if is_reserved(tokens_a[id][0]))
    shared = {text for text, _ in tokens_a if text is not None} & {text for text, _ in tokens_b}
    return Relation(
        size_a=len(tokens_a),
        size_b=len(tokens_b),
        num_shared=len(shared),
        same_ids=len(pairs) - len(unlike),
        differing=tuple(id for id in unlike if id not in placed),
        placed=placed,
        is_split_alike=_splitting(a) == _splitting(b),
    )


def is_reserved(text: bytes | None) -> bool:
    """Return whether a token is kept free for later use, judged by its text, such as <|buffer1|> or <|reserved_2|>."""
    return text is not None and _RESERVED.fullmatch(text) is not None


def added_ids(old: Tokenizer, new: Tokenizer) -> tuple[int, ...]:
    """Return the ids that have a meaning in `new` but not in `old`: renamed reserved tokens, then those after the last.
    Raises TokenizerError if `new` has fewer ids than `old`, or another token at any other id."""
    relation = relate(old, new)
    if relation.differing or relation.size_b < relation.size_a:
        problem = f"{len(relation.differing):,} of its ids are other tokens there"
        if not relation.differing:
            problem = f"it has {relation.size_a:,} ids, the other only {relation.size_b:,}"
        raise TokenizerError(
            f"{new.dir} does not extend {old.dir}: {problem}",
            f"`mm tokenizer extend {old.dir} --add TOKEN --out DIR` adds tokens and keeps every id",
        )
    return relation.new_ids


def _tokens_and_kinds(tokenizer: Tokenizer) -> list[tuple[bytes | None, bool]]:
    """Return, for every id, its bytes (None without a token) and whether it is a control token."""
    control = set(tokenizer.control_tokens.values())
    return [(text, id in control) for id, text in enumerate(token_texts(tokenizer))]


def _splitting(tokenizer: Tokenizer) -> list[object]:
    """Return everything in tokenizer.json that decides how ordinary text is split into tokens, for comparison."""
    parts = json.loads(tokenizer.files["tokenizer.json"])
    model = parts["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", ())]
    scores = model.get("vocab") if isinstance(model.get("vocab"), list) else None  # unigram
    return [parts.get("normalizer"), parts.get("pre_tokenizer"), model.get("type"), merges, scores]
