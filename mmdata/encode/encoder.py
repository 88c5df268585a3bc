"""Rows or lines to token ids and trained spans, a batch at a time: one native call encodes the text of all rows.

The columnar way: plain lines are read into columns (`columns`), rendered as blocks (`blocks`), one string a row with the
template's control tokens written into it, and encoded. That these, and no others, came back as control ids in the expected
order is checked for every row, and so are the ids of each answer's header; trained spans are counted from them. Rows that
fail a check, and all rows of templates that are not blocks, go to `reference`. Tokens are never cut, nor rows left out,
uncounted.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from mmdata.encode.blocks import HEAD, TAIL, Blocks, Renderings, learn
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
    BadRow,
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
from mmdata.tokenizer.encoders import Encoder, choose
from mmdata.tokenizer.tokenizer import Tokenizer

CUT_TURNS = "cut after the last whole turn that fits"
MOST_BYTES = 2**30  # of jsonl in columns: Arrow's string offsets have 31 bits, and renderings are longer than the lines
# Share of rows that keep empty think blocks, as in MiniMind: a model that never saw one cannot answer after the prompt's.
EMPTY_THINK_KEPT = 0.2
_BRACKETED = re.compile(r"<[^<>\s]+>")  # no such token can match across the edge of a content and the template's text


class EncodedRows:
    """The encoding of R rows or lines, which the ways of encoding fill in.

    num_tokens: of the usable rows, before cutting; cut: reason -> tokens dropped, in `rows_cut` rows; bad: row -> why it
    cannot be used, in row order. hashes: uint8 [R, 32], the `row_hash` of each, and characters: int64 [R]; both are 0 where
    a line is no row. controls: row -> special-token strings in its own text (by `encode_lines` alone).
    """

    def __init__(self, num_rows: int):
        self.num_tokens = self.rows_cut = 0
        self.cut: Counter[str] = Counter()
        self.bad: dict[int, BadRow] = {}
        self.hashes = np.zeros((num_rows, 32), np.uint8)
        self.characters = np.zeros(num_rows, np.int64)
        self.controls: dict[int, list[str]] = {}
        self._parts: list[tuple[np.ndarray, Sequences]] = []

    def add(self, row_of: np.ndarray, sequences: Sequences, num_tokens: int) -> None:
        """row_of: int64, the row of each sequence, ascending."""
        self.num_tokens += num_tokens
        if len(row_of):
            self._parts.append((row_of, sequences))

    def add_cut(self, num_tokens: int) -> None:
        """Count a row of which so many tokens were dropped."""
        self.cut[CUT_TURNS] += num_tokens
        self.rows_cut += 1

    @cached_property
    def _row_of(self) -> np.ndarray:
        """int64: the row of each sequence, as they were added."""
        return np.concatenate([np.empty(0, np.int64), *(row_of for row_of, _ in self._parts)])

    @cached_property
    def sequences(self) -> Sequences:
        """Of all usable rows, in row order."""
        sequences = join([part for _, part in self._parts])
        is_sorted = bool((self._row_of[1:] >= self._row_of[:-1]).all())
        return sequences if is_sorted else reorder(sequences, np.argsort(self._row_of, kind="stable"))

    @cached_property
    def num_sequences(self) -> np.ndarray:
        """int64 [R]: of each row; 0 where it cannot be used."""
        return np.bincount(self._row_of, minlength=len(self.characters))


@dataclass
class _TextBlocks:
    """The ids of T texts and the positions of their B blocks' control tokens in them.

    Of each text (int64 [T]): where its ids begin, how many they are, the first block that may be trained. Of each block, in
    the order of the texts: positions of its open and close token, role, and text.
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
        """The texts marked in `is_kept` (bool [T]), numbered anew; `ids` stays whole."""
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
        """int64 [T]: the number of each text's first block."""
        return np.searchsorted(self.text_of, np.arange(len(self.begins)))

    def text(self, number: int) -> np.ndarray:
        """The ids of one text."""
        return self.ids[self.begins[number] : self.begins[number] + self.lengths[number]]


class RowEncoder:
    """Encodes rows with one tokenizer: the same rows give the same ids and spans in any process and any batch."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_len: int,
        era: str = "auto",
        train_on: str = "assistant",
        seed: int = 0,
        encoder: Encoder | None = None,
        is_reference: bool = False,
    ):
        """era: auto, seed, 2 or 3, as `Template.era`; train_on: assistant (each answer), last or all (see docs/data.md).

        encoder: the text encoder, by default `tokenizers`. is_reference: all conversations and pairs go through jinja2.
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
        self.encoder = encoder or choose(tokenizer, "tokenizers")
        self._is_reference = is_reference
        self._is_control = np.zeros(max(tokenizer.vocab_size, 1), bool)
        control_ids = list(tokenizer.control_tokens.values())
        self._is_control[control_ids] = True
        self._first_control, self._last_control = min(control_ids, default=1), max(control_ids, default=0)

    def __reduce__(self) -> tuple:
        options = {name: getattr(self, name) for name in ("max_len", "era", "train_on", "seed")}
        return _rebuild, (self.tokenizer.dir, self.encoder.name, options | {"is_reference": self._is_reference})

    @cached_property
    def template(self) -> Template:
        """The tokenizer's chat template, compiled at first use: documents need none."""
        return _template(self.tokenizer, self.era)

    @cached_property
    def _reference(self) -> ReferenceEncoder:
        return ReferenceEncoder(
            self.tokenizer, self.template, self.encoder, max_len=self.max_len, train_on=self.train_on
        )

    @cached_property
    def _blocks(self) -> Blocks | None:
        """None where the columnar way cannot be taken: text beside a control token may not have the ids of the text alone."""
        is_possible = self.tokenizer.is_exact and all(map(_BRACKETED.fullmatch, self.tokenizer.control_tokens))
        return learn(self.template) if is_possible and not self._is_reference else None

    @cached_property
    def _header_ids(self) -> np.ndarray:
        return self.tokenizer.encode_batch([HEAD])[0]

    @cached_property
    def _num_tail(self) -> int:
        return len(self.tokenizer.encode_batch([TAIL])[0])

    def encode(self, rows: Rows[Row]) -> EncodedRows:
        """Encode a batch of rows; pairs and other rows must not be mixed."""
        out = EncodedRows(len(rows))
        self._encode_rows(np.arange(len(rows)), rows, out)
        out.bad = dict(sorted(out.bad.items()))
        return out

    def encode_lines(self, raws: Rows[bytes], kind: str) -> EncodedRows:
        """Read lines as rows of this kind and encode them; a line that is no such row is bad."""
        out = EncodedRows(len(raws))
        is_small = sum(map(len, raws)) <= MOST_BYTES
        left: Rows[int] = range(len(raws))
        if kind != "document" and is_small and self._blocks:
            left = self._encode_plain(raws, kind, out)
        at, rows = [], []
        for i in left:
            try:
                row = parse_row(raws[i], kind)
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
        """The segments of jinja2's rendering of a conversation, or of both sides of a pair."""
        hashes = np.frombuffer(row_hash(row), np.uint8).reshape(1, -1)
        return self._reference.segments(row, bool(self._keeps(hashes)[0]))

    def _keeps(self, hashes: np.ndarray) -> np.ndarray:
        """bool [R]: whether rows with these hashes keep the empty think blocks that the template writes, all or none."""
        if self.template.era != "3":
            return np.ones(len(hashes), bool)
        return _shares(self.seed, hashes) < EMPTY_THINK_KEPT

    # ---- the ways of encoding

    def _encode_plain(self, raws: Rows[bytes], kind: str, out: EncodedRows) -> Rows[int]:
        """Encode the plain lines; returns the indices of the others, and of those that must go through jinja2."""
        at, columns = read_lines(raws, kind)
        is_left = np.ones(len(raws), bool)
        if len(at):
            hashes = columns.hashes()
            out.hashes[at], out.characters[at] = hashes, columns.num_characters()
            is_odd = self._encode_columns(at, columns, self._keeps(hashes), out)
            is_left[at[~is_odd]] = False
        return np.flatnonzero(is_left).tolist()

    def _encode_rows(self, at: np.ndarray, rows: Rows[Row], out: EncodedRows, in_columns: bool = True) -> None:
        """Encode parsed rows, kind by kind. at: int64, their indices in the batch."""
        if not rows:
            return
        hashes = np.frombuffer(b"".join(map(row_hash, rows)), np.uint8).reshape(-1, 32)
        out.hashes[at], out.characters[at] = hashes, [num_characters(row) for row in rows]
        for kind in (Document, Conversation, Pair):
            picks = [i for i, row in enumerate(rows) if type(row) is kind]
            if picks and kind is Document:
                self._encode_documents(at[picks], [cast(Document, rows[i]) for i in picks], out)
            elif picks:
                keeps = self._keeps(hashes[picks])
                dialogues = cast(Any, [rows[i] for i in picks])
                is_odd = np.ones(len(picks), bool)
                if self._blocks and in_columns:
                    is_odd = self._encode_columns(at[picks], columns_of(dialogues), keeps, out)
                odd = np.flatnonzero(is_odd)
                self._encode_through_jinja(at[picks][odd], [dialogues[i] for i in odd], keeps[odd], out)

    def _encode_through_jinja(
        self, at: np.ndarray, rows: Rows[Conversation | Pair], keeps: np.ndarray, out: EncodedRows
    ) -> None:
        """Encode rows through jinja2."""
        encoded = self._reference.encode(rows, keeps.tolist())
        out.bad |= {i: bad for i, bad in zip(at.tolist(), encoded, strict=True) if isinstance(bad, BadRow)}
        results = {i: row for i, row in zip(at.tolist(), encoded, strict=True) if isinstance(row, EncodedRow)}
        for result in results.values():
            if result.cut:
                out.add_cut(result.cut)
        num_tokens = sum(result.num_tokens for result in results.values())
        out.add(
            np.array(list(results), np.int64), flatten([result.sequence for result in results.values()]), num_tokens
        )

    def _encode_documents(self, at: np.ndarray, rows: Rows[Document], out: EncodedRows) -> None:
        """Each document between bos and eos; longer ones go on in further sequences, no token is lost."""
        documents = [split_documents(row.text) for row in rows]
        for i in (i for i, texts in enumerate(documents) if not texts):
            out.bad[int(at[i])] = BadRow("empty content", "nothing stands between its marks")
        ids, ends = self.encoder.encode([text for texts in documents for text in texts], False)
        lengths = np.diff(ends, prepend=0)
        row_of = np.repeat(at, np.fromiter(map(len, documents), np.int64, len(documents)))
        if not self.tokenizer.is_exact and self._is_control[ids].any():
            bad = np.unique(row_of[np.searchsorted(ends, np.flatnonzero(self._is_control[ids]), side="right")])
            out.bad |= dict.fromkeys(bad.tolist(), BadRow("template cannot be cut", NOT_PLAIN))
            is_kept = ~np.isin(row_of, bad)
            ids, lengths, row_of = (
                take(ids, (ends - lengths)[is_kept], lengths[is_kept]),
                lengths[is_kept],
                row_of[is_kept],
            )
            ends = np.cumsum(lengths)
        bos, eos = ([] if id is None else [id] for id in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        edges = np.stack([ends - lengths, ends], axis=1)[:, 1 - len(bos) :].reshape(-1)
        ids = np.insert(ids, edges, np.tile(np.array([*bos, *eos], np.uint32), len(ends)))
        lengths, text_of = fragments(lengths + len(bos) + len(eos), self.max_len)
        is_trained = lengths > 1
        marks = np.stack([np.ones_like(lengths), lengths], axis=1)[is_trained].reshape(-1)
        out.add(row_of[text_of], Sequences(ids, lengths, marks, 2 * is_trained), len(ids))

    # ---- columns -> sequences

    def _encode_columns(
        self, at: np.ndarray, columns: Conversations, keeps: np.ndarray, out: EncodedRows
    ) -> np.ndarray:
        """Encode rows in columns. at: int64 [R], their indices in the batch; returns bool [R]: must go through jinja2."""
        assert self._blocks
        sides = 1 + columns.is_pairs
        rendered = self._blocks.render(columns, np.tile(keeps, sides))
        blocks, is_good = self._locate(rendered, self._blocks)
        if columns.is_pairs:
            is_good = np.tile(is_good.reshape(2, -1).all(axis=0), 2)
        rows = np.flatnonzero(~rendered.is_odd)[is_good[: len(is_good) // sides]]
        add = self._add_pairs if columns.is_pairs else self._add_conversations
        add(at[rows], blocks.only(is_good), out)
        is_odd = np.ones(len(at), bool)
        is_odd[rows] = False
        return is_odd

    def _locate(self, rendered: Renderings, rendering: Blocks) -> tuple[_TextBlocks, np.ndarray]:
        """Encode texts and find their blocks' control tokens. bool [T]: all are there, no others, headers as expected."""
        ids, ends = self.encoder.encode(rendered.texts, True)
        lengths = np.diff(ends, prepend=0)
        at = self._control_places(ids)
        text_of = np.searchsorted(ends, at, side="right")
        is_good = np.bincount(text_of, minlength=len(ends)) == 2 * rendered.num_blocks
        at = at[is_good[text_of]]
        text_of = np.repeat(np.arange(len(ends)), rendered.num_blocks)
        is_here = is_good[text_of]
        roles, text_of, opens, closes = rendered.roles[is_here], text_of[is_here], at[0::2], at[1::2]
        for places, token in ((opens, rendering.format.open), (closes, rendering.format.close)):
            is_good[text_of[ids[places] != self.tokenizer.control_tokens[token]]] = False
        answers = np.flatnonzero((roles == ASSISTANT) & is_good[text_of])
        header = opens[answers, None] + 1 + np.arange(len(self._header_ids))
        is_header = (ids[np.minimum(header, len(ids) - 1)] == self._header_ids).all(axis=1)
        is_good[text_of[answers[~is_header]]] = False
        return _TextBlocks(ids, ends - lengths, lengths, rendered.first_trained, opens, closes, roles, text_of), is_good

    def _control_places(self, ids: np.ndarray) -> np.ndarray:
        """int64: the positions of control tokens. Few other ids are in their range, and comparing is faster than looking up."""
        if self._first_control > self._last_control:
            return np.empty(0, np.int64)
        width = np.uint32(self._last_control - self._first_control)
        at = np.flatnonzero(ids - np.uint32(self._first_control) <= width)  # smaller ids wrap around
        return at[self._is_control[ids[at]]]

    def _add_conversations(self, at: np.ndarray, blocks: _TextBlocks, out: EncodedRows) -> None:
        """Texts past max_len are cut after their last whole turn that fits; without one they are too long."""
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
        """Chosen texts are whole; rejected ones begin with the message in which the sides differ first."""
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
        for i in np.flatnonzero(prompts > shared + 1 + len(self._header_ids)).tolist():  # by --train-on last alone
            same = shared[i] + common_length(blocks.text(i)[shared[i] :], blocks.text(half + i))
            prompts[i] = min(prompts[i], same)
        skipped = prompts - shared  # of a rejected text
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
        """int64 [S, 2]: trained spans in positions of their text, text by text; int64 [T]: how many each text has."""
        num_texts, header = len(blocks.begins), 1 + len(self._header_ids)
        if self.train_on == "all":  # a conversation's first token is not trained: no token before it to predict it from
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
    """int64 [P]: tokens of each pair's shared messages: where the first block that may be trained opens in the chosen text."""
    first = blocks.first_blocks[:half] + blocks.first_trained[:half]
    return blocks.opens[first] - blocks.begins[:half]


@dataclass(frozen=True, slots=True)
class Preview:
    """One line as it would be packed: its renderings cut into segments, and its encoding, or the reason it is left out."""

    encoded: EncodedRows
    segments: list[list[Segment]] = field(default_factory=list)

    @property
    def bad(self) -> BadRow | None:
        return self.encoded.bad.get(0)


def preview(raw: bytes, encoder: RowEncoder, kind: str) -> Preview:
    """Encode one line for show; a row that is left out has segments where it can be rendered."""
    encoded = encoder.encode_lines([raw], kind)
    try:
        row = parse_row(raw, kind)
        if not isinstance(row, Document):
            return Preview(encoded, encoder.segments(row))
    except BadRow:
        return Preview(encoded)
    bos, eos = encoder.tokenizer.bos_token, encoder.tokenizer.eos_token
    edges = [Segment(bos, False, True)] if bos else [], [Segment(eos, True, True)]
    return Preview(encoded, [[*edges[0], Segment(text, True, False), *edges[1]] for text in split_documents(row.text)])


def fragments(lengths: np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the pieces of at most max_len that texts of these lengths are cut into, and the text of each piece.

    A last piece is not a single token, which could not be trained on (but for max_len 2).
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
    """The compiled template, which encoders with the same tokenizer share."""
    return Template(tokenizer, era=era)


def _rebuild(dir: Path, encoder: str, options: dict[str, Any]) -> RowEncoder:
    tokenizer = Tokenizer.load(dir)
    return RowEncoder(tokenizer, encoder=choose(tokenizer, encoder), **options)


def _shares(seed: int, hashes: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seed and the row hashes (uint8 [R, 32]) alone."""
    key = np.frombuffer(hashlib.sha256(str(seed).encode()).digest(), "<u8", 1)
    mixed = (np.ascontiguousarray(hashes).view("<u8")[:, 1] ^ key) * np.uint64(0xBF58476D1CE4E5B9)  # as splitmix64 does
    mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(11)) / 2.0**53
