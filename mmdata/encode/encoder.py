"""Encoding of rows or jsonl lines to token ids and trained ranges, one batch per call.

Most conversations and pairs take a fast way: lines of the usual form are read into columns (module `columns`) and
encoded without jinja2 (module `fast`). All others are rendered with jinja2, by the module `reference`. Every token
dropped and every row left out is counted by reason.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmdata.encode.columns import columns_of, read_lines
from mmdata.encode.encoded import EncodedRows
from mmdata.encode.fast import FastEncoder
from mmdata.encode.reference import NOT_PLAIN, EncodedRow, ReferenceEncoder
from mmdata.encode.rows import (
    DEFAULT_COLUMNS,
    BadRow,
    Columns,
    Conversation,
    Document,
    Pair,
    Row,
    num_characters,
    parse_row,
    row_hash,
    split_documents,
)
from mmdata.encode.sequences import Sequences, flatten, take
from mmdata.encode.template import ERAS, TRAIN_ON, Segment, Template
from mmdata.encode.validate import control_strings
from mmdata.errors import UsageError
from mmdata.tokenizer.chat_template import DATE
from mmdata.tokenizer.encoders import Encoder, choose
from mmdata.tokenizer.tokenizer import Tokenizer

DEFAULT_ON_LOST = "set-aside"
# The largest batch of jsonl that is read into columns, in bytes. Arrow's string offsets have 31 bits, and rendered
# texts are longer than the lines.
MOST_BYTES = 2**30
# The share of rows that keep empty think blocks, which is that of MiniMind. A model that was never trained on an empty
# think block could not answer a prompt that ends with one.
EMPTY_THINK_KEPT = 0.2
# Two tokens of this form cannot overlap, so that each one that the template writes is found.
_BRACKETED = re.compile(r"[<\[][^<>\[\]]+[>\]]")


class RowEncoder:
    """Encodes rows with one tokenizer. The ids and trained ranges of a row depend neither on the process nor on the
    other rows of the batch. A pickled instance has its tokenizer's files."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_len: int,
        era: str = "auto",
        train_on: str = "assistant",
        seed: int = 0,
        on_lost: str = DEFAULT_ON_LOST,
        columns: Columns = DEFAULT_COLUMNS,
        encoder: Encoder | None = None,
        is_reference: bool = False,
    ):
        """Create an encoder. Raises UsageError if `train_on` or `era` is none of the choices.

        max_len: the most tokens of a sequence, at least 2. era: the required kind of chat template, "seed", "2" or "3",
        or "auto"; see `Template.era`. train_on: what of conversations and pairs is trained on: "assistant" (every
        answer), "last" (the last answer) or "all" (every token but the first; of pairs, both replies from their first
        answer on). seed: decides with a row's hash whether it keeps the empty think blocks that the template writes.
        on_lost: with "warn", rows of which the template loses something are used; else they are in `bad`. columns:
        those of lines that hold the fields of rows. encoder: the text encoder; None uses the `tokenizers` library.
        is_reference: encode all conversations and pairs with jinja2, for comparison.
        """
        for option, value, choices in (("--train-on", train_on, TRAIN_ON), ("--era", era, ("auto", *ERAS))):
            if value not in choices:
                raise UsageError(f"{option} {value}: no such choice", f"choose one of {', '.join(choices)}")
        assert max_len >= 2
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.era = era
        self.train_on = train_on
        self.seed = seed
        self.on_lost = on_lost
        self.columns = columns
        self.encoder = encoder or choose(tokenizer, "tokenizers")
        self._is_reference = is_reference

    def __reduce__(self) -> tuple:
        names = ("max_len", "era", "train_on", "seed", "on_lost", "columns")
        options = {name: getattr(self, name) for name in names}
        tokenizer = self.tokenizer.dir, self.tokenizer.files
        return _rebuild, (tokenizer, self.encoder.name, options | {"is_reference": self._is_reference})

    @cached_property
    def template(self) -> Template:
        """The tokenizer's chat template, compiled at first use, because documents need none. Raises TokenizerError if
        it cannot be used, and UsageError if it is not of the required era."""
        return _template(self.tokenizer, self.era)

    @cached_property
    def _reference(self) -> ReferenceEncoder:
        return ReferenceEncoder(
            self.tokenizer,
            self.template,
            self.encoder,
            max_len=self.max_len,
            train_on=self.train_on,
            keeps_lost=self.on_lost == "warn",
        )

    @cached_property
    def _fast(self) -> FastEncoder | None:
        """The encoder of rows in columns. None, for jinja2, if the ids of a text may depend on control tokens next to it,
        or if the tokenizer may lose text."""
        is_possible = self.tokenizer.is_exact and not self.tokenizer.may_lose_text and not self._is_reference
        if not is_possible or not all(map(_BRACKETED.fullmatch, self.tokenizer.control_tokens)):
            return None
        return FastEncoder(self.tokenizer, self.template, self.encoder, max_len=self.max_len, train_on=self.train_on)

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode a batch with only pairs or none. Unusable rows raise no error; they are in `bad` of the result."""
        out = EncodedRows(len(rows))
        self._encode_rows(np.arange(len(rows)), rows, out)
        out.bad = dict(sorted(out.bad.items()))
        return out

    def encode_lines(self, raws: Sequence[bytes], kind: str) -> EncodedRows:
        """Parse jsonl lines and encode them. Lines that are not valid rows of this kind ("document", "conversation" or
        "pair"), and rows that cannot be used, are in `bad` of the result."""
        out = EncodedRows(len(raws))
        is_small = sum(map(len, raws)) <= MOST_BYTES
        left: Sequence[int] = range(len(raws))
        if kind != "document" and is_small and not self.columns.mapping and self._fast:
            left = self._encode_plain(raws, kind, out)
        at, rows = [], []
        for i in left:
            try:
                row = parse_row(raws[i], kind, extra_keys=out.extra_keys, columns=self.columns)
            except BadRow as bad:
                out.bad[i] = bad
                continue
            at.append(i)
            rows.append(row)
            if strings := control_strings(raws[i], row):
                out.controls[i] = strings
        self._encode_rows(np.array(at, np.int64), rows, out, is_small)
        out.bad = dict(sorted(out.bad.items()))
        return out

    def segments(self, row: Conversation | Pair) -> list[list[Segment]]:
        """Render a row with jinja2 and cut the text into segments: one list for a conversation, two (chosen, rejected)
        for a pair. Raises BadRow if the rendering cannot be cut."""
        hashes = np.frombuffer(row_hash(row), np.uint8).reshape(1, -1)
        return self._reference.segments(row, bool(self._keeps_empty_thinks(hashes)[0]))

    def _keeps_empty_thinks(self, hashes: np.ndarray) -> np.ndarray:
        """Return bool [R]: True for rows that keep the empty think blocks that the template writes: all or, with
        templates of era "3", the share EMPTY_THINK_KEPT, by seed and hash (uint8 [R, 32])."""
        if self.template.era != "3":
            return np.ones(len(hashes), bool)
        return _uniform_numbers(self.seed, hashes) < EMPTY_THINK_KEPT

    # --- the ways of encoding

    # The methods below add rows to `out`. at: int64 [rows], the index of each row in the batch. keeps: bool [rows], True
    # for rows that keep the empty think blocks that the template writes.

    def _encode_plain(self, raws: Sequence[bytes], kind: str, out: EncodedRows) -> Sequence[int]:
        """Encode the lines that can be rendered without jinja2. Return the indices of all others, ascending."""
        at, columns = read_lines(raws, kind)
        is_left = np.ones(len(raws), bool)
        if len(at):
            hashes = columns.hashes()
            out.hashes[at], out.characters[at] = hashes, columns.num_characters()
            assert self._fast
            is_odd = self._fast.encode(at, columns, self._keeps_empty_thinks(hashes), out)
            is_left[at[~is_odd]] = False
        return np.flatnonzero(is_left).tolist()

    def _encode_rows(self, at: np.ndarray, rows: Sequence[Row], out: EncodedRows, in_columns: bool = True) -> None:
        """Encode parsed rows, kind by kind; conversations and pairs all with jinja2 if `in_columns` is False."""
        if not rows:
            return
        hashes = np.frombuffer(b"".join(map(row_hash, rows)), np.uint8).reshape(-1, 32)
        out.hashes[at], out.characters[at] = hashes, [num_characters(row) for row in rows]
        for kind in (Document, Conversation, Pair):
            picks = [i for i, row in enumerate(rows) if type(row) is kind]
            if picks and kind is Document:
                self._encode_documents(at[picks], [cast(Document, rows[i]) for i in picks], out)
            elif picks:
                keeps = self._keeps_empty_thinks(hashes[picks])
                dialogues = cast(Any, [rows[i] for i in picks])
                is_odd = np.ones(len(picks), bool)
                if self._fast and in_columns:
                    is_odd = self._fast.encode(at[picks], columns_of(dialogues), keeps, out)
                odd = np.flatnonzero(is_odd)
                self._encode_through_jinja(at[picks][odd], [dialogues[i] for i in odd], keeps[odd], out)

    def _count_unknown(self, rows: Sequence[Conversation | Pair], keeps: np.ndarray, out: EncodedRows) -> None:
        """Count the bytes of usable rows that the tokenizer does not know."""
        if self.tokenizer.may_lose_text:
            sides = [
                side
                for row, keep in zip(rows, keeps.tolist(), strict=True)
                for side in self._reference.segments(row, keep)
            ]
            texts = ["".join(segment.text for segment in side) for side in sides]
            out.add_texts(texts, self.tokenizer, control=True)

    def _encode_through_jinja(
        self, at: np.ndarray, rows: Sequence[Conversation | Pair], keeps: np.ndarray, out: EncodedRows
    ) -> None:
        encoded = self._reference.encode(rows, keeps.tolist())
        out.bad |= {i: bad for i, bad in zip(at.tolist(), encoded, strict=True) if isinstance(bad, BadRow)}
        results = {i: row for i, row in zip(at.tolist(), encoded, strict=True) if isinstance(row, EncodedRow)}
        for result in results.values():
            out.not_written.update(result.not_written)
            if result.cut:
                out.add_cut(result.cut)
        is_used = np.isin(at, list(results))
        self._count_unknown([rows[i] for i in np.flatnonzero(is_used).tolist()], keeps[is_used], out)
        num_tokens = sum(result.num_tokens for result in results.values())
        out.add(
            np.array(list(results), np.int64), flatten([result.sequence for result in results.values()]), num_tokens
        )

    def _encode_documents(self, at: np.ndarray, rows: Sequence[Document], out: EncodedRows) -> None:
        """Encode documents, each between the bos token (if any) and the eos token. One longer than `max_len` is divided
        into several sequences; no token is dropped. Rows with only blank documents, or with text that would become a
        control id other than the unknown token's, are recorded in `out.bad`."""
        documents = [split_documents(row.text) for row in rows]
        for i in (i for i, texts in enumerate(documents) if not texts):
            out.bad[int(at[i])] = BadRow("empty content", "nothing stands between its marks")
        texts = list(itertools.chain.from_iterable(documents))
        ids, ends = self.encoder.encode(texts, False)
        lengths = np.diff(ends, prepend=0)
        row_of = np.repeat(at, np.fromiter(map(len, documents), np.int64, len(documents)))
        written = set(self.tokenizer.control_tokens.values()) - {self.tokenizer.unknown_id}  # only by templates
        is_written = np.isin(ids, list(written)) if not self.tokenizer.is_exact else np.zeros(0, bool)
        if is_written.any():
            bad = np.unique(row_of[np.searchsorted(ends, np.flatnonzero(is_written), side="right")])
            out.bad |= dict.fromkeys(bad.tolist(), BadRow("template cannot be cut", NOT_PLAIN))
            is_kept = ~np.isin(row_of, bad)
            ids, lengths, row_of = (
                take(ids, (ends - lengths)[is_kept], lengths[is_kept]),
                lengths[is_kept],
                row_of[is_kept],
            )
            ends = np.cumsum(lengths)
            texts = list(itertools.compress(texts, is_kept))
        out.add_texts(texts, self.tokenizer, control=False)
        bos, eos = ([] if id is None else [id] for id in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        edges = np.stack([ends - lengths, ends], axis=1)[:, 1 - len(bos) :].reshape(-1)
        ids = np.insert(ids, edges, np.tile(np.array([*bos, *eos], np.uint32), len(ends)))
        lengths, text_of = fragments(lengths + len(bos) + len(eos), self.max_len)
        is_trained = lengths > 1
        marks = np.stack([np.ones_like(lengths), lengths], axis=1)[is_trained].reshape(-1)
        out.add(row_of[text_of], Sequences(ids, lengths, marks, 2 * is_trained), len(ids))


@dataclass(frozen=True, slots=True)
class Preview:
    """One line as it would be packed. encoded: a batch of one row. segments: of each of its texts (a conversation, two
    sides of a pair, or documents); empty if the row cannot be rendered."""

    encoded: EncodedRows
    segments: list[list[Segment]] = field(default_factory=list)

    @property
    def bad(self) -> BadRow | None:
        """Why the row is left out; None if it is used."""
        return self.encoded.bad.get(0)


def preview(raw: bytes, encoder: RowEncoder, kind: str) -> Preview:
    """Encode one line and return it with its segments, also of a row that is left out, if it can be rendered. kind:
    "document", "conversation" or "pair"."""
    encoded = encoder.encode_lines([raw], kind)
    try:
        row = parse_row(raw, kind, columns=encoder.columns)
        if not isinstance(row, Document):
            return Preview(encoded, encoder.segments(row))
    except BadRow:
        return Preview(encoded)
    bos, eos = encoder.tokenizer.bos_token, encoder.tokenizer.eos_token
    edges = [Segment(bos, False, True)] if bos else [], [Segment(eos, True, True)]
    return Preview(encoded, [[*edges[0], Segment(text, True, False), *edges[1]] for text in split_documents(row.text)])


def fragments(lengths: np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide texts of these lengths into pieces of `max_len` tokens, the last one shorter. Return the length of each
    piece and the index of its text (both int64 [pieces], text by text). A last piece of one token, which could not be
    trained on, gets a token of the piece before (unless `max_len` is 2)."""
    counts = np.maximum(-(-lengths // max_len), 1)
    sizes = np.full(counts.sum(), max_len)
    last = np.cumsum(counts) - 1
    sizes[last] = lengths - (counts - 1) * max_len
    is_single = (sizes[last] == 1) & (counts > 1) & (max_len > 2)
    sizes[last[is_single]] += 1
    sizes[last[is_single] - 1] -= 1
    return sizes, np.repeat(np.arange(len(lengths)), counts)


@lru_cache(maxsize=2)
def _template(tokenizer: Tokenizer, era: str) -> Template:
    """Return the compiled chat template, with the date DATE if it has no other fixed one. Shared by calls with equal
    tokenizers and the same era."""
    return Template(tokenizer.amended(date=DATE), era=era)


def _rebuild(parts: tuple[Path, dict[str, bytes]], encoder: str, options: dict[str, Any]) -> RowEncoder:
    """Create a `RowEncoder` from the values that `RowEncoder.__reduce__` pickled. parts: those of a `Tokenizer`."""
    tokenizer = Tokenizer(*parts)
    return RowEncoder(tokenizer, encoder=choose(tokenizer, encoder), **options)


def _uniform_numbers(seed: int, hashes: np.ndarray) -> np.ndarray:
    """Return a pseudo-random number in [0, 1) for each row, from the seed and its hash (uint8 [R, 32])."""
    key = np.frombuffer(hashlib.sha256(str(seed).encode()).digest(), "<u8", 1)
    # The two multipliers are those of the hash function splitmix64.
    mixed = (np.ascontiguousarray(hashes).view("<u8")[:, 1] ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(11)) / 2.0**53
