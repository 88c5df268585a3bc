"""Encoding of rows or jsonl lines to token ids and trained ranges, one batch per call.

Most conversations and pairs take a fast way: lines of the usual form are read into columns (module `columns`), rendered
without jinja2 (module `blocks`), and encoded with the template's control tokens, all texts in one native call. The
control ids of every row must be exactly those that the template wrote, in the same order, and each answer must begin
with the ids of its header. The trained ranges follow from the positions of the control ids.

Rows that fail such a check, and all rows of templates that `blocks` does not support, are rendered with jinja2, by the
module `reference`. Every token that is dropped and every row that is left out is counted by reason.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmdata.encode.blocks import HEAD, TAIL, BlockFormat, Blocks, Renderings, learn
from mmdata.encode.columns import ASSISTANT, TOOL, Conversations, columns_of, read_lines
from mmdata.encode.reference import (
    NOT_PLAIN,
    SAME_RENDERING,
    EncodedRow,
    ReferenceEncoder,
    common_length,
    too_long,
    too_long_pair,
)
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
from mmdata.encode.sequences import Sequences, flatten, join, pair_sequences, reorder, take
from mmdata.encode.template import ERAS, TRAIN_ON, Segment, Template
from mmdata.encode.validate import control_strings
from mmdata.errors import UsageError
from mmdata.tokenizer.chat_template import DATE
from mmdata.tokenizer.encoders import Encoder, choose
from mmdata.tokenizer.tokenizer import Tokenizer

DEFAULT_ON_LOST = "set-aside"
CUT_TURNS = "cut after the last whole turn that fits"
# The largest batch of jsonl that is read into columns, in bytes. Arrow's string offsets have 31 bits, and rendered
# texts are longer than the lines.
MOST_BYTES = 2**30
# The share of rows that keep empty think blocks, which is that of MiniMind. A model that was never trained on an empty
# think block could not answer a prompt that ends with one.
EMPTY_THINK_KEPT = 0.2
# A token of this form cannot arise where a content and the template's text meet.
_BRACKETED = re.compile(r"<[^<>\s]+>")


class EncodedRows:
    """The encoding of a batch of R rows or lines. `RowEncoder` makes it and adds sequences to it.

    num_tokens: the number of tokens of the usable rows, before cutting.
    rows_cut: the number of rows of which tokens were dropped. cut: reason -> number of tokens dropped.
    bad: row index -> why the row cannot be used, in order of rows.
    hashes, characters: uint8 [R, 32] and int64 [R], the `row_hash` and `num_characters` of each row; 0 for lines that
    are not valid rows.
    controls: row index -> special-token strings in the row's own text. extra_keys: how often the lines have keys that are
    ignored. Only `encode_lines` fills these two.
    not_written: reason, of `rows.LOST` or `rows.LEFT_OUT` -> number of usable rows of which the template leaves
    something out. text_bytes, unknown_bytes: the UTF-8 bytes of the rendered texts of usable rows, and those of them
    that the tokenizer does not know; 0 if it knows every text.
    """

    def __init__(self, num_rows: int):
        self.num_tokens = self.rows_cut = 0
        self.cut: Counter[str] = Counter()
        self.bad: dict[int, BadRow] = {}
        self.hashes = np.zeros((num_rows, 32), np.uint8)
        self.characters = np.zeros(num_rows, np.int64)
        self.controls: dict[int, list[str]] = {}
        self.not_written: Counter[str] = Counter()
        self.text_bytes = self.unknown_bytes = 0
        self.extra_keys: Counter[str] = Counter()
        self._parts: list[tuple[np.ndarray, Sequences]] = []

    def add(self, row_of: np.ndarray, sequences: Sequences, num_tokens: int) -> None:
        """Add sequences and the number of tokens that their rows had before cutting.

        row_of: int64 [sequences], the row of each sequence, ascending. A row may have several sequences.
        """
        self.num_tokens += num_tokens
        if len(row_of):
            self._parts.append((row_of, sequences))

    def add_texts(self, texts: Sequence[str], tokenizer: Tokenizer, *, control: bool) -> None:
        """Count the bytes of texts, and those that the tokenizer does not know, if it may lose text. control: whether
        special-token strings in them are control tokens.
        """
        if tokenizer.may_lose_text:
            self.text_bytes += sum(len(text.encode()) for text in texts)
            self.unknown_bytes += tokenizer.count_lost_bytes(texts, control=control)

    def add_cut(self, num_tokens: int) -> None:
        """Count a conversation that was cut, and the number of tokens that were dropped from it."""
        self.cut[CUT_TURNS] += num_tokens
        self.rows_cut += 1

    @cached_property
    def _row_of(self) -> np.ndarray:
        """The row of each sequence (int64), in the order in which they were added."""
        return np.concatenate([np.empty(0, np.int64), *(row_of for row_of, _ in self._parts)])

    @cached_property
    def sequences(self) -> Sequences:
        """The sequences of all usable rows, in the order of rows. Computed at first use; add nothing afterwards."""
        sequences = join([part for _, part in self._parts])
        is_sorted = bool((self._row_of[1:] >= self._row_of[:-1]).all())
        return sequences if is_sorted else reorder(sequences, np.argsort(self._row_of, kind="stable"))

    @cached_property
    def num_sequences(self) -> np.ndarray:
        """int64 [R]: the number of sequences of each row; 0 for rows that cannot be used."""
        return np.bincount(self._row_of, minlength=len(self.characters))


@dataclass
class _TextBlocks:
    """The token ids of T rendered texts, and the control tokens that begin and end their B blocks.

    ids: uint32 [total ids], the ids of all texts.
    begins, lengths: int64 [T], the index in `ids` of the first id of each text, and its number of ids.
    first_trained: int64 [T], the index in its text of the first block that may be trained.
    opens, closes: int64 [B], the indices in `ids` of the control tokens of each block, text by text.
    roles: int8 [B], indices of ROLES. text_of: int64 [B], the index of the text of each block.
    """

    ids: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    first_trained: np.ndarray
    opens: np.ndarray
    closes: np.ndarray
    roles: np.ndarray
    text_of: np.ndarray

    def only(self, is_kept: np.ndarray) -> "_TextBlocks":
        """Return the texts where `is_kept` (bool [T]) is True, with new indices. `ids` remains that of all texts."""
        if is_kept.all():
            return self
        blocks = is_kept[self.text_of]
        text_of = (np.cumsum(is_kept) - 1)[self.text_of[blocks]]
        return _TextBlocks(
            self.ids, self.begins[is_kept], self.lengths[is_kept], self.first_trained[is_kept],
            self.opens[blocks], self.closes[blocks], self.roles[blocks], text_of,
        )  # fmt: skip

    @cached_property
    def first_blocks(self) -> np.ndarray:
        """int64 [T]: the index of the first block of each text."""
        return np.searchsorted(self.text_of, np.arange(len(self.begins)))

    def text(self, number: int) -> np.ndarray:
        return self.ids[self.begins[number] : self.begins[number] + self.lengths[number]]


class RowEncoder:
    """Encodes rows with one tokenizer. The ids and trained ranges of a row do not depend on the process or on the other
    rows of the batch. A pickled instance has its tokenizer's files.
    """

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

        max_len: the largest number of tokens of a sequence, at least 2.
        era: the required kind of chat template, "seed", "2" or "3"; "auto" accepts every kind. See `Template.era`.
        train_on: the tokens of conversations and pairs that are trained on: "assistant" (every answer), "last" (the
        last answer) or "all" (every token but the first; of pairs, both replies from their first answer on).
        seed: together with a row's hash, decides whether the row keeps the empty think blocks that the template writes.
        on_lost: with "warn", rows of which the template loses something are used; with others, they are in `bad`.
        columns: the columns of lines that hold the fields of rows.
        encoder: the text encoder; None uses the `tokenizers` library.
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
        self._is_control = np.zeros(max(tokenizer.vocab_size, 1), bool)
        control_ids = list(tokenizer.control_tokens.values())
        self._is_control[control_ids] = True
        self._first_control, self._last_control = min(control_ids, default=1), max(control_ids, default=0)

    def __reduce__(self) -> tuple:
        names = ("max_len", "era", "train_on", "seed", "on_lost", "columns")
        options = {name: getattr(self, name) for name in names}
        tokenizer = self.tokenizer.dir, self.tokenizer.files
        return _rebuild, (tokenizer, self.encoder.name, options | {"is_reference": self._is_reference})

    @cached_property
    def template(self) -> Template:
        """The tokenizer's chat template, compiled at first use, because documents need none. Raises TokenizerError if
        it cannot be used, and UsageError if it is not of the required era.
        """
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
    def _blocks(self) -> Blocks | None:
        """The renderer of the fast way. None, and jinja2 for all rows, if the template does not write messages as
        blocks, if the ids of a text may depend on control tokens next to it, or if the tokenizer may lose text.
        """
        is_possible = self.tokenizer.is_exact and not self.tokenizer.may_lose_text and not self._is_reference
        is_possible = is_possible and all(map(_BRACKETED.fullmatch, self.tokenizer.control_tokens))
        return learn(self.template) if is_possible else None

    @cached_property
    def _header_ids(self) -> np.ndarray:
        """uint32: the ids of the text between the open token of an answer's block and the part that is trained."""
        return self.tokenizer.encode_batch([HEAD])[0]

    @cached_property
    def _num_tail(self) -> int:
        """The number of ids of the text after the close token of a block (a newline)."""
        return len(self.tokenizer.encode_batch([TAIL])[0])

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        """Encode a batch with only pairs or none. Unusable rows raise no error; they are in `bad` of the result."""
        out = EncodedRows(len(rows))
        self._encode_rows(np.arange(len(rows)), rows, out)
        out.bad = dict(sorted(out.bad.items()))
        return out

    def encode_lines(self, raws: Sequence[bytes], kind: str) -> EncodedRows:
        """Parse jsonl lines and encode them. Lines that are not valid rows of this kind ("document", "conversation" or
        "pair"), and rows that cannot be used, are in `bad` of the result; they raise no error.
        """
        out = EncodedRows(len(raws))
        is_small = sum(map(len, raws)) <= MOST_BYTES
        left: Sequence[int] = range(len(raws))
        if kind != "document" and is_small and not self.columns.mapping and self._blocks:
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
        for a pair. Raises BadRow if the rendering cannot be cut.
        """
        hashes = np.frombuffer(row_hash(row), np.uint8).reshape(1, -1)
        return self._reference.segments(row, bool(self._keeps_empty_thinks(hashes)[0]))

    def _keeps_empty_thinks(self, hashes: np.ndarray) -> np.ndarray:
        """Return bool [R]: True for rows that keep the empty think blocks that the template writes. With templates of
        era "3", the share EMPTY_THINK_KEPT of the rows does, by seed and hash (uint8 [R, 32]); with others, all do.
        """
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
            is_odd = self._encode_columns(at, columns, self._keeps_empty_thinks(hashes), out)
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
                if self._blocks and in_columns:
                    is_odd = self._encode_columns(at[picks], columns_of(dialogues), keeps, out)
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
        into several sequences; no token is dropped. Rows whose documents are all blank, or in which text would become a
        control id other than that of the unknown token, are recorded in `out.bad`.
        """
        documents = [split_documents(row.text) for row in rows]
        for i in (i for i, texts in enumerate(documents) if not texts):
            out.bad[int(at[i])] = BadRow("empty content", "nothing stands between its marks")
        texts = list(itertools.chain.from_iterable(documents))
        ids, ends = self.encoder.encode(texts, False)
        lengths = np.diff(ends, prepend=0)
        row_of = np.repeat(at, np.fromiter(map(len, documents), np.int64, len(documents)))
        is_written = self._is_control.copy()  # control tokens that only a template may write
        if self.tokenizer.unknown_id is not None:
            is_written[self.tokenizer.unknown_id] = False
        if not self.tokenizer.is_exact and is_written[ids].any():
            bad = np.unique(row_of[np.searchsorted(ends, np.flatnonzero(is_written[ids]), side="right")])
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

    # --- columns -> sequences

    def _encode_columns(
        self, at: np.ndarray, columns: Conversations, keeps: np.ndarray, out: EncodedRows
    ) -> np.ndarray:
        """Encode rows in columns. Return bool [R], or [P] for pairs: True for rows that must go through jinja2."""
        assert self._blocks
        sides = 1 + columns.is_pairs
        rendered = self._blocks.render(columns, np.tile(keeps, sides))
        blocks, is_good = self._locate(rendered, self._blocks.format)
        if columns.is_pairs:
            is_good = np.tile(is_good.reshape(2, -1).all(axis=0), 2)
        rows = np.flatnonzero(~rendered.is_odd)[is_good[: len(is_good) // sides]]
        add = self._add_pairs if columns.is_pairs else self._add_conversations
        add(at[rows], blocks.only(is_good), out)
        is_odd = np.ones(len(at), bool)
        is_odd[rows] = False
        return is_odd

    def _locate(self, rendered: Renderings, format: BlockFormat) -> tuple[_TextBlocks, np.ndarray]:
        """Encode texts and find their blocks. Return these and bool [T], False for texts with other control tokens or
        answer headers than expected, whose blocks are missing or wrong.
        """
        ids, ends = self.encoder.encode(rendered.texts, True)
        lengths = np.diff(ends, prepend=0)
        at = self._control_places(ids)
        text_of = np.searchsorted(ends, at, side="right")
        is_good = np.bincount(text_of, minlength=len(ends)) == 2 * rendered.num_blocks
        at = at[is_good[text_of]]
        text_of = np.repeat(np.arange(len(ends)), rendered.num_blocks)
        is_here = is_good[text_of]
        roles, text_of, opens, closes = rendered.roles[is_here], text_of[is_here], at[0::2], at[1::2]
        for places, token in ((opens, format.open), (closes, format.close)):
            is_good[text_of[ids[places] != self.tokenizer.control_tokens[token]]] = False
        answers = np.flatnonzero((roles == ASSISTANT) & is_good[text_of])
        header = opens[answers, None] + 1 + np.arange(len(self._header_ids))
        is_header = (ids[np.minimum(header, len(ids) - 1)] == self._header_ids).all(axis=1)
        is_good[text_of[answers[~is_header]]] = False
        return _TextBlocks(ids, ends - lengths, lengths, rendered.first_trained, opens, closes, roles, text_of), is_good

    def _control_places(self, ids: np.ndarray) -> np.ndarray:
        """Return the positions of the control tokens in `ids` (int64, ascending)."""
        # Comparing with the smallest and largest control id first is faster than looking up every id.
        if self._first_control > self._last_control:
            return np.empty(0, np.int64)
        width = np.uint32(self._last_control - self._first_control)
        at = np.flatnonzero(ids - np.uint32(self._first_control) <= width)  # smaller ids wrap around and get large
        return at[self._is_control[ids[at]]]

    def _add_conversations(self, at: np.ndarray, blocks: _TextBlocks, out: EncodedRows) -> None:
        """Add conversations with their trained ranges. A text longer than `max_len` is cut after its last whole turn (a
        user message and everything up to its final answer) that fits; if not even the first fits, the row is bad.
        """
        whole = blocks.lengths.copy()
        is_kept = np.ones(len(at), bool)
        for text in np.flatnonzero(whole > self.max_len).tolist():
            begin, length = int(blocks.begins[text]), int(whole[text])
            here = slice(*np.searchsorted(blocks.text_of, [text, text + 1]).tolist())
            roles, ends = blocks.roles[here], blocks.closes[here] + 1 + self._num_tail - begin
            may_end = (roles[:-1] == ASSISTANT) & (roles[1:] != TOOL) & (ends[:-1] <= self.max_len)
            fitting = ends[:-1][may_end]
            if len(fitting):
                blocks.lengths[text] = fitting[-1]
                out.add_cut(length - int(fitting[-1]))
            else:
                out.bad[int(at[text])] = BadRow("too long", too_long(length, self.max_len))
                is_kept[text] = False
        blocks, whole, at = blocks.only(is_kept), whole[is_kept], at[is_kept]
        spans, num_spans = self._spans(blocks, is_pairs=False)
        ids = blocks.ids
        if blocks.lengths.sum() != len(ids):
            ids = take(ids, blocks.begins, blocks.lengths)
        out.add(at, Sequences(ids, blocks.lengths, spans.reshape(-1), 2 * num_spans), int(whole.sum()))

    def _add_pairs(self, at: np.ndarray, blocks: _TextBlocks, out: EncodedRows) -> None:
        """Add pairs, divided into prompt and replies, with their trained ranges. Pairs with a side longer than
        `max_len`, or with equal sides, are bad.

        blocks: the texts of all chosen sides, then those of all rejected sides without the messages that both share.
        """
        half = len(at)
        shared = _prompt_lengths(blocks, half)
        lengths = np.stack([blocks.lengths[:half], blocks.lengths[half:] + shared])
        longest = lengths.max(axis=0, initial=0)
        is_kept = longest <= self.max_len
        for i in np.flatnonzero(~is_kept).tolist():
            out.bad[int(at[i])] = BadRow("too long", too_long_pair(int(longest[i]), self.max_len))
        for i in np.flatnonzero(lengths[0] == lengths[1]).tolist():
            if np.array_equal(blocks.text(i)[shared[i] :], blocks.text(half + i)):
                out.bad[int(at[i])] = BadRow("chosen equal to rejected", SAME_RENDERING)
                is_kept[i] = False
        blocks, at, lengths, shared = (
            blocks.only(np.tile(is_kept, 2)),
            at[is_kept],
            lengths[:, is_kept],
            shared[is_kept],
        )
        half = len(at)
        spans, num_spans = self._spans(blocks, is_pairs=True)
        first = spans[np.cumsum(num_spans) - num_spans, 0]
        prompts = np.minimum(first[:half], first[half:] + shared)
        for i in np.flatnonzero(prompts > shared + 1 + len(self._header_ids)).tolist():  # only with --train-on last
            same = shared[i] + common_length(blocks.text(i)[shared[i] :], blocks.text(half + i))
            prompts[i] = min(prompts[i], same)
        skipped = prompts - shared  # number of ids at the beginning of a rejected text that belong to the prompt
        begins = np.stack([blocks.begins[:half], blocks.begins[half:] + skipped], axis=1)
        sizes = np.stack([lengths[0], lengths[1] - prompts], axis=1)
        sequences = pair_sequences(
            take(blocks.ids, begins.reshape(-1), sizes.reshape(-1)),
            np.stack([prompts, *(lengths - prompts)], axis=1),
            spans - np.repeat(np.concatenate([prompts, skipped]), num_spans)[:, None],
            2 * num_spans,
        )
        out.add(at, sequences, len(sequences.ids))

    def _spans(self, blocks: _TextBlocks, *, is_pairs: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return each text's trained ranges (int64 [S, 2], from its first id) and their number (int64 [T])."""
        num_texts, header = len(blocks.begins), 1 + len(self._header_ids)
        if self.train_on == "all":  # but not the first token of a conversation, because no token comes before it
            begins = np.ones_like(blocks.lengths)
            if is_pairs:
                begins = blocks.opens[blocks.first_blocks + blocks.first_trained] + header - blocks.begins
            return np.stack([begins, blocks.lengths], axis=1), np.ones(num_texts, np.int64)
        text_of = blocks.text_of
        ends = blocks.closes + 1 + self._num_tail - blocks.begins[text_of]
        number = np.arange(len(text_of)) - blocks.first_blocks[text_of]
        is_trained = (blocks.roles == ASSISTANT) & (ends <= blocks.lengths[text_of])
        trained = np.flatnonzero(is_trained & (number >= blocks.first_trained[text_of]))
        text_of = text_of[trained]
        if self.train_on == "last":
            is_last = np.append(text_of[1:] != text_of[:-1], True)[: len(trained)]
            trained, text_of = trained[is_last], text_of[is_last]
        begins = blocks.opens[trained] + header - blocks.begins[text_of]
        return np.stack([begins, ends[trained]], axis=1), np.bincount(text_of, minlength=num_texts)


def _prompt_lengths(blocks: _TextBlocks, half: int) -> np.ndarray:
    """Return int64 [P]: the number of ids of the messages that both sides of each pair share. half: P."""
    first = blocks.first_blocks[:half] + blocks.first_trained[:half]
    return blocks.opens[first] - blocks.begins[:half]


@dataclass(frozen=True, slots=True)
class Preview:
    """One line as it would be packed.

    encoded: a batch of one row. segments: those of each of its texts (one conversation, two sides of a pair, or its
    documents); empty if the row cannot be rendered.
    """

    encoded: EncodedRows
    segments: list[list[Segment]] = field(default_factory=list)

    @property
    def bad(self) -> BadRow | None:
        """Why the row is left out; None if it is used."""
        return self.encoded.bad.get(0)


def preview(raw: bytes, encoder: RowEncoder, kind: str) -> Preview:
    """Encode one line and return it with its segments, also those of a row that is left out, if it can be rendered.

    kind: "document", "conversation" or "pair".
    """
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
    """Divide texts of these lengths into pieces of `max_len` tokens; the last piece of a text may be shorter. Return
    the length of each piece and the index of its text (both int64 [pieces], text by text).

    A last piece of one token, which could not be trained on, gets a token of the piece before (unless `max_len` is 2).
    """
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
    """Return the compiled chat template, which writes the date DATE if it has no other fixed one. Calls with the same
    Tokenizer object and era share it.
    """
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
