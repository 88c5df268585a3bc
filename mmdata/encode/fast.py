"""The fast way of encoding conversations and pairs: many at a time, in columns, without jinja2.

Rows in columns are rendered as blocks (module `blocks`) and encoded with the template's control tokens, all texts in
one native call. The control ids of every row must be exactly those that the template wrote, in order, and each answer
must begin with the ids of its header; the trained ranges follow from their positions. Rows that fail such a check are
left to the module `reference`.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmdata.encode.blocks import HEAD, TAIL, BlockFormat, Blocks, Renderings
from mmdata.encode.columns import ASSISTANT, TOOL, Conversations
from mmdata.encode.encoded import EncodedRows
from mmdata.encode.reference import SAME_RENDERING, common_length, too_long, too_long_pair
from mmdata.encode.rows import BadRow
from mmdata.encode.sequences import Sequences, pair_sequences, take
from mmdata.tokenizer.encoders import Encoder
from mmdata.tokenizer.tokenizer import Tokenizer


@dataclass
class _TextBlocks:
    """The token ids of T rendered texts, and the control tokens that begin and end their B blocks. ids: uint32 [total
    ids], of all texts. begins, lengths: int64 [T], where in `ids` each text begins, and its number of ids.
    first_trained: int64 [T], the first block of each text that may be trained. opens, closes: int64 [B], the places in
    `ids` of each block's control tokens, text by text. roles: int8 [B], indices of ROLES. text_of: int64 [B], each
    block's text."""

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


class FastEncoder:
    """Encodes rows in columns with one tokenizer whose chat template writes blocks. max_len: the most tokens of a
    sequence. train_on: see `RowEncoder`."""

    def __init__(self, tokenizer: Tokenizer, blocks: Blocks, encoder: Encoder, *, max_len: int, train_on: str):
        self._tokenizer = tokenizer
        self._blocks = blocks
        self._encoder = encoder
        self._max_len = max_len
        self._train_on = train_on
        control_ids = list(tokenizer.control_tokens.values())
        self._is_control = np.zeros(max(tokenizer.vocab_size, 1), bool)
        self._is_control[control_ids] = True
        self._first_control, self._last_control = min(control_ids, default=1), max(control_ids, default=0)

    @cached_property
    def _header_ids(self) -> np.ndarray:
        """uint32: the ids of the text between the open token of an answer's block and the part that is trained."""
        return self._tokenizer.encode_batch([HEAD])[0]

    @cached_property
    def _num_tail(self) -> int:
        """The number of ids of the text after the close token of a block (a newline)."""
        return len(self._tokenizer.encode_batch([TAIL])[0])

    def encode(self, at: np.ndarray, columns: Conversations, keeps: np.ndarray, out: EncodedRows) -> np.ndarray:
        """Encode rows and add them to `out`. Return bool [R], or [P] for pairs: True for rows that must go through
        jinja2. at: int64 [rows], the index of each row in the batch. keeps: bool [rows], rows that keep the empty think
        blocks."""
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
        answer headers than expected."""
        ids, ends = self._encoder.encode(rendered.texts, True)
        lengths = np.diff(ends, prepend=0)
        at = self._control_places(ids)
        text_of = np.searchsorted(ends, at, side="right")
        is_good = np.bincount(text_of, minlength=len(ends)) == 2 * rendered.num_blocks
        at = at[is_good[text_of]]
        text_of = np.repeat(np.arange(len(ends)), rendered.num_blocks)
        is_here = is_good[text_of]
        roles, text_of, opens, closes = rendered.roles[is_here], text_of[is_here], at[0::2], at[1::2]
        for places, token in ((opens, format.open), (closes, format.close)):
            is_good[text_of[ids[places] != self._tokenizer.control_tokens[token]]] = False
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
        user message and all up to its final answer) that fits; without any the row is bad."""
        whole = blocks.lengths.copy()
        is_kept = np.ones(len(at), bool)
        for text in np.flatnonzero(whole > self._max_len).tolist():
            begin, length = int(blocks.begins[text]), int(whole[text])
            here = slice(*np.searchsorted(blocks.text_of, [text, text + 1]).tolist())
            roles, ends = blocks.roles[here], blocks.closes[here] + 1 + self._num_tail - begin
            may_end = (roles[:-1] == ASSISTANT) & (roles[1:] != TOOL) & (ends[:-1] <= self._max_len)
            fitting = ends[:-1][may_end]
            if len(fitting):
                blocks.lengths[text] = fitting[-1]
                out.add_cut(length - int(fitting[-1]))
            else:
                out.bad[int(at[text])] = BadRow("too long", too_long(length, self._max_len))
                is_kept[text] = False
        blocks, whole, at = blocks.only(is_kept), whole[is_kept], at[is_kept]
        spans, num_spans = self._spans(blocks, is_pairs=False)
        ids = blocks.ids
        if blocks.lengths.sum() != len(ids):
            ids = take(ids, blocks.begins, blocks.lengths)
        out.add(at, Sequences(ids, blocks.lengths, spans.reshape(-1), 2 * num_spans), int(whole.sum()))

    def _add_pairs(self, at: np.ndarray, blocks: _TextBlocks, out: EncodedRows) -> None:
        """Add pairs, divided into prompt and replies, with their trained ranges. Pairs with a side longer than
        `max_len`, or with equal sides, are bad. blocks: the texts of all chosen sides, then of all rejected sides
        without shared messages."""
        half = len(at)
        shared = _prompt_lengths(blocks, half)
        lengths = np.stack([blocks.lengths[:half], blocks.lengths[half:] + shared])
        longest = lengths.max(axis=0, initial=0)
        is_kept = longest <= self._max_len
        for i in np.flatnonzero(~is_kept).tolist():
            out.bad[int(at[i])] = BadRow("too long", too_long_pair(int(longest[i]), self._max_len))
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
        if self._train_on == "all":  # but not the first token of a conversation, because no token comes before it
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
        if self._train_on == "last":
            is_last = np.append(text_of[1:] != text_of[:-1], True)[: len(trained)]
            trained, text_of = trained[is_last], text_of[is_last]
        begins = blocks.opens[trained] + header - blocks.begins[text_of]
        return np.stack([begins, ends[trained]], axis=1), np.bincount(text_of, minlength=num_texts)


def _prompt_lengths(blocks: _TextBlocks, half: int) -> np.ndarray:
    """Return int64 [P]: the number of ids of the messages that both sides of each pair share. half: P."""
    first = blocks.first_blocks[:half] + blocks.first_trained[:half]
    return blocks.opens[first] - blocks.begins[:half]
