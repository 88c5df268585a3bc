"""A tokenizer in; what each of its ids stands for out: as bytes, and legible. Two in: whether their ids mean the same.

Byte-level vocabularies look garbled in their files, because each byte is written as some printable character: "你好" is
"ä½łå¥½" there. Here they are bytes again, and characters where the bytes form any.
"""

import json
import re
from dataclasses import dataclass
from functools import cache

from mmdata.errors import TokenizerError
from mmdata.tokenizer.tokenizer import Tokenizer

_RESERVED = re.compile(rb"<\|(?:buffer|reserved|extra|unused)[_a-z]*_?\d+\|>")
_SHOWN = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


@cache
def byte_of() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for: GPT-2's table, printable bytes as themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def token_texts(tokenizer: Tokenizer) -> list[bytes | None]:
    """UTF-8 bytes of every id, [vocab_size]; added tokens as they are written; None for an id without a token."""
    parts = json.loads(tokenizer.files["tokenizer.json"])
    is_byte_level = (parts.get("decoder") or {}).get("type") == "ByteLevel"
    found: list[bytes | None] = [None] * tokenizer.vocab_size
    for token, id in tokenizer.native.get_vocab(with_added_tokens=True).items():
        if id in tokenizer.added:
            found[id] = token.encode()
        elif is_byte_level and all(char in byte_of() for char in token):
            found[id] = bytes(byte_of()[char] for char in token)
        elif len(token) == 6 and token.startswith("<0x"):
            found[id] = bytes([int(token[3:5], 16)])
        else:
            found[id] = token.replace("\u2581", " ").encode()
    return found


def legible(data: bytes) -> str:
    """Bytes as characters where they form any, the rest in hex between ‹ and ›; spaces and newlines as ␣ and ⏎."""
    pieces, lone = [], bytearray()
    begin = 0
    while begin < len(data):
        char = _char_at(data, begin)
        if char is None:
            lone.append(data[begin])
            begin += 1
            continue
        if lone:
            pieces.append(f"‹{lone.hex(' ')}›")
            lone.clear()
        pieces.append(_SHOWN.get(char) or (char if char.isprintable() else f"‹U+{ord(char):04X}›"))
        begin += len(char.encode())
    if lone:
        pieces.append(f"‹{lone.hex(' ')}›")
    return "".join(pieces)


def _char_at(data: bytes, begin: int) -> str | None:
    """The whole character that begins there; None where none does."""
    first = data[begin]
    length = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    try:
        return data[begin : begin + length].decode("utf-8")
    except UnicodeDecodeError:
        return None


@dataclass(frozen=True, slots=True)
class Relation:
    """How ids of B stand to those of A. `same_ids`: ids that are the same token, of the same kind, in both."""

    size_a: int
    size_b: int
    num_shared: int  # tokens, whatever their ids
    same_ids: int
    differing: tuple[int, ...]  # ids below both sizes that are different tokens, other than those …
    placed: tuple[int, ...]  # … that are reserved in A, as <|buffer1|>, and some token in B
    is_split_alike: bool  # the same pre-tokenizer, merges and normalizer

    @property
    def b_is_readable(self) -> bool:
        """Whether every id of B is the same token in A."""
        return not self.differing and not self.placed and self.size_b <= self.size_a

    @property
    def b_extends_a(self) -> bool:
        """Whether every id of A is the same token in B, which has more of them or tokens in the reserved places."""
        return not self.differing and self.size_b >= self.size_a and not self.b_is_readable

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Ids of B that mean nothing in A: in reserved places, and past its last."""
        return (*self.placed, *range(self.size_a, self.size_b))


def relate(a: Tokenizer, b: Tokenizer) -> Relation:
    """Compare two vocabularies id by id."""
    texts_a, texts_b = (list(zip(token_texts(each), _kinds(each), strict=True)) for each in (a, b))
    both = list(zip(texts_a, texts_b, strict=False))
    unlike = [id for id, (one, other) in enumerate(both) if one != other]
    placed = tuple(id for id in unlike if is_reserved(texts_a[id][0]))
    differing = tuple(id for id in unlike if id not in placed)
    shared = {text for text, _ in texts_a if text is not None} & {text for text, _ in texts_b}
    return Relation(
        size_a=len(texts_a),
        size_b=len(texts_b),
        num_shared=len(shared),
        same_ids=len(both) - len(unlike),
        differing=differing,
        placed=placed,
        is_split_alike=_splitting(a) == _splitting(b),
    )


def is_reserved(text: bytes | None) -> bool:
    """Whether a token is kept free for later use, as MiniMind's <|buffer1|> to <|buffer9|>."""
    return text is not None and _RESERVED.fullmatch(text) is not None


def added_ids(old: Tokenizer, new: Tokenizer) -> tuple[int, ...]:
    """The ids that `new` gives a meaning and `old` does not: past its last, or reserved.

    TokenizerError when another id of `old` means something else in `new`.
    """
    relation = relate(old, new)
    if relation.differing or relation.size_b < relation.size_a:
        found = f"{len(relation.differing):,} of its ids are other tokens there"
        if not relation.differing:
            found = f"it has {relation.size_a:,} ids, the other only {relation.size_b:,}"
        raise TokenizerError(
            f"{new.dir} does not extend {old.dir}: {found}",
            f"`mm tokenizer extend {old.dir} --add TOKEN --out DIR` adds tokens and keeps every id",
        )
    return relation.new_ids


def _kinds(tokenizer: Tokenizer) -> list[bool]:
    control = set(tokenizer.control_tokens.values())
    return [id in control for id in range(tokenizer.vocab_size)]


def _splitting(tokenizer: Tokenizer) -> list[object]:
    """All that decides how plain text is split."""
    parts = json.loads(tokenizer.files["tokenizer.json"])
    model = parts["model"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", ())]
    scores = model.get("vocab") if isinstance(model.get("vocab"), list) else None  # of unigram
    return [parts.get("normalizer"), parts.get("pre_tokenizer"), model.get("type"), merges, scores]
