"""The fast way of encoding conversations and pairs: many at a time, in columns, without jinja2.

What the chat template writes around the texts of a row is known from its form (module `forms`), and Arrow joins the
texts of a whole batch, in less than 1 microsecond per row; jinja2 takes 100 to 300. All are encoded with the template's
control tokens in one native call. The control ids of every row must be exactly those that the template wrote, in order;
the trained ranges follow from their positions. Rows that fail such a check are left to the module `reference`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from mmdata.encode.columns import (
    SPACE,
    Conversations,
    TextCodes,
    as_numpy,
    byte_sizes,
    compute,
    join_messages,
    truths,
)
from mmdata.encode.encoded import EncodedRows
from mmdata.encode.forms import ODD, Forms, Pieces, leaves
from mmdata.encode.reference import SAME_RENDERING, common_length, too_long, too_long_pair
from mmdata.encode.rows import BadRow
from mmdata.encode.sequences import Sequences, pair_sequences, ranges, take
from mmdata.encode.template import Template
from mmdata.encode.template.stand_ins import Edits, Slot, edited
from mmdata.tokenizer.encoders import Encoder
from mmdata.tokenizer.tokenizer import Tokenizer

MOST_PREFIX = 64  # tokens of a `_Prefix`


@dataclass
class _Tokens:
    """The token ids of T rendered texts. ids: uint32 [total ids], of all texts. begins, lengths: int64 [T], where in
    `ids` each text begins, and its number of ids. forms: int64 [T], the number of each text's form. places: int64, for
    all texts the place in `ids` before the text, those of its control tokens, and its end. first_places: int64 [T],
    where in `places` those of each text begin."""

    ids: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    forms: np.ndarray
    places: np.ndarray
    first_places: np.ndarray

    def only(self, is_kept: np.ndarray) -> "_Tokens":
        """Return the texts where `is_kept` (bool [T]) is True. `ids` and `places` remain those of all texts."""
        begins, lengths, forms, firsts = (
            each[is_kept] for each in (self.begins, self.lengths, self.forms, self.first_places)
        )
        return _Tokens(self.ids, begins, lengths, forms, self.places, firsts)

    def text(self, number: int) -> np.ndarray:
        return self.ids[self.begins[number] : self.begins[number] + self.lengths[number]]


@dataclass
class _Prefix:
    """A text between a control token and an edge of a trained range, or None for an edge at the control token itself.
    ids: the ways in which it was tokenized so far, alone and before other texts."""

    text: str | None
    ids: list[np.ndarray] = field(default_factory=list)

    def learn(self, ids: np.ndarray, tokenizer: Tokenizer) -> bool:
        """Add the ids with which a longer text begins as one more way; return False if no token ends where this does.
        Text that is normalized counts only up to a space, which is composed with nothing."""
        left, number = len((self.text or "").encode()), 0
        if not tokenizer.keeps_text and not (self.text or "").isspace():
            return False
        while left > 0 and number < len(ids):
            left -= tokenizer.num_bytes(int(ids[number]))
            number += 1
        self.ids += [ids[:number]] * (left == 0)
        return left == 0


class FastEncoder:
    """Encodes rows in columns with one tokenizer and its chat template. max_len: the most tokens of a sequence.
    train_on: see `RowEncoder`."""

    def __init__(self, tokenizer: Tokenizer, template: Template, encoder: Encoder, *, max_len: int, train_on: str):
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._max_len = max_len
        self._forms = Forms(template, train_on)
        control_ids = list(tokenizer.control_tokens.values())
        self._is_control = np.zeros(max(tokenizer.vocab_size, 1), bool)
        self._is_control[control_ids] = True
        self._first_control, self._last_control = min(control_ids, default=1), max(control_ids, default=0)
        self._prefixes = [_Prefix(None)]
        self._layout = lru_cache(None)(self._make_layout)

    def encode(self, at: np.ndarray, columns: Conversations, keeps: np.ndarray, out: EncodedRows) -> np.ndarray:
        """Encode rows and add them to `out`. Return bool [R], or [P] for pairs: True for rows that must go through
        jinja2. at: int64 [rows], the index of each row in the batch. keeps: bool [rows], rows that keep the empty think
        blocks."""
        sides, rows = 1 + columns.is_pairs, np.arange(len(at))
        first = np.tile(columns.num_shared, 2) if columns.is_pairs else np.zeros(len(columns), np.int64)
        forms = self._forms.find(columns, np.tile(keeps, sides), first)
        is_good = self._of_both_sides(forms != ODD, sides)
        is_good = self._of_both_sides(is_good & self._is_fit(columns, forms[is_good]), sides)
        columns, forms, rows, first = columns.only(is_good), forms[is_good], rows[is_good[: len(at)]], first[is_good]
        begins = np.zeros(len(forms), np.int64)  # the first message that is written
        skipped = np.zeros(len(rows), np.int64)
        if columns.is_pairs:
            half = len(rows)
            for i, pair in enumerate(zip(forms[:half].tolist(), forms[half:].tolist(), first.tolist(), strict=False)):
                forms[half + i], skipped[i] = self._forms.rest(*pair)
            begins[half:] = np.where(skipped, first[:half], 0)
        tokens, is_good = self._locate(self._texts(columns, forms, begins), forms)
        is_good = self._of_both_sides(is_good, sides)
        tokens, rows, skipped = tokens.only(is_good), rows[is_good[: len(rows)]], skipped[is_good[: len(rows)]]
        is_added = np.zeros(len(at), bool)
        if columns.is_pairs:
            self._add_pairs(at[rows], tokens, skipped, out)
            is_added[rows] = True
        else:
            is_added[rows[self._add_conversations(at[rows], tokens, out)]] = True
        return ~is_added

    @staticmethod
    def _of_both_sides(is_good: np.ndarray, sides: int) -> np.ndarray:
        """Return `is_good` (bool [R]), False for both sides of a pair if it is for one."""
        return np.tile(is_good.reshape(sides, -1).all(axis=0), sides)

    def _is_fit(self, columns: Conversations, forms: np.ndarray) -> np.ndarray:
        """Return bool [R]: False for conversations with a text for which the template could do something else: a blank
        one, or one with a string that it searches for. forms: those that matter."""
        pc, contents = compute(), columns.contents
        literals = set().union(*(self._forms.forms[n].literals for n in np.unique(forms).tolist()))
        is_odd = (byte_sizes(pc.utf8_ltrim(contents, SPACE)) == 0) & (byte_sizes(contents) > 0)
        if literals:
            pattern = "|".join(map(re.escape, sorted(literals)))
            is_odd |= as_numpy(pc.match_substring_regex(contents, pattern))
        for at, message in columns.extras.items():
            texts = [text for text in leaves((), [message]) if isinstance(text, str)]
            is_odd[at] |= any(text.isspace() or any(one in text for one in literals) for text in texts)
        return np.bincount(columns.row_of[is_odd], minlength=len(columns)) == 0

    # --- rows -> texts

    def _texts(self, columns: Conversations, forms: np.ndarray, first: np.ndarray) -> list[str]:
        """Return what the template writes of each conversation, from the message `first` (int64 [R]) on."""
        heads, tails = (TextCodes([""], len(columns.roles)) for _ in range(2))
        used, of = np.unique(forms, return_inverse=True)
        found = [self._forms.forms[n] for n in used.tolist()]
        kinds: dict[Edits, int] = {}
        heads.codes = _gathered([[heads.code(_fixed(head)) for head in form.heads[:-1]] for form in found], of)
        edits = _gathered([[kinds.setdefault(one, len(kinds)) for one in form.edits] for form in found], of)
        ends = columns.begins + columns.counts
        tails.codes[ends - 1] = np.array([tails.code(_fixed(form.heads[-1])) for form in found], np.int32)[of]
        has_slots = np.array([form.has_slots for form in found], bool)[of]
        for row in np.flatnonzero(has_slots).tolist():
            begin = int(columns.begins[row])
            messages = (columns.extras[at] for at in range(begin, ends[row]) if at in columns.extras)
            values = leaves(columns.tools[row].specs if row in columns.tools else (), messages)
            for n, head in enumerate(found[of[row]].heads):
                if any(isinstance(piece, Slot) for piece in head):
                    codes, at = (heads, begin + n) if begin + n < ends[row] else (tails, begin + n - 1)
                    codes.set(at, _filled(head, values))
        contents = columns.contents
        for each, code in kinds.items():
            if each:
                contents = _edited_where(contents, edits == code, each)
        is_written = np.arange(len(columns.roles)) - columns.begins[columns.row_of] >= first[columns.row_of]
        counts = np.bincount(columns.row_of[is_written], minlength=len(columns))
        if not is_written.all():
            heads.codes, tails.codes = heads.codes[is_written], tails.codes[is_written]
            contents = contents.filter(truths(is_written))
        return join_messages(counts, heads.array(), contents, tails.array()).to_pylist()

    # --- texts -> tokens

    def _make_layout(self, form: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the control ids of a form (uint32) and the edges of its trained ranges (int64 [S, 4]: number of the
        control token and of the prefix of each range's begin, then of its end)."""
        found = self._forms.forms[form]
        spans = [[number, self._prefix(text)] for span in found.spans for number, text in span]
        controls = [self._tokenizer.control_tokens[text] for text in found.controls]
        return np.array(controls, np.uint32), np.array(spans, np.int64).reshape(-1, 4)

    def _prefix(self, text: str | None) -> int:
        """Return the number of the text between a control token and an edge, an index of `_prefixes`."""
        known = [prefix.text for prefix in self._prefixes]
        if text not in known:
            self._prefixes.append(_Prefix(text, [self._encoder.encode([text or ""], False)[0]]))
        return known.index(text) if text in known else len(known)

    def _table(self, forms: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the control ids (column 0) or edges (1) of these forms end to end, and the number of each's."""
        used, of = np.unique(forms, return_inverse=True)
        tables = [self._layout(n)[column] for n in used.tolist()]
        values = _gathered(tables, of)
        sizes = np.array([len(table) for table in tables], np.int64)[of]
        return values.reshape(-1, 4) if column else values, sizes

    def _locate(self, texts: list[str], forms: np.ndarray) -> tuple[_Tokens, np.ndarray]:
        """Encode texts and find their control tokens. Return these and bool [T], False for texts with other control
        tokens than their form's, or of which the ids before a trained range are not those of the text before it."""
        ids, ends = self._encoder.encode(texts, True)
        lengths = np.diff(ends, prepend=0)
        at = self._control_places(ids)
        text_of = np.searchsorted(ends, at, side="right")
        expected, counts = self._table(forms, 0)
        is_good = np.bincount(text_of, minlength=len(ends)) == counts
        at, expected = at[is_good[text_of]], expected[np.repeat(is_good, counts)]
        sizes = 2 + counts * is_good
        places, firsts = np.full(sizes.sum(), -1), np.cumsum(sizes) - sizes
        places[firsts], places[firsts + sizes - 1] = ends - lengths, ends
        is_control = np.ones(len(places), bool)
        is_control[firsts] = is_control[firsts + sizes - 1] = False
        places[is_control] = at
        places[firsts] -= 1
        is_good[np.repeat(np.arange(len(ends)), sizes - 2)[ids[at] != expected]] = False
        tokens = _Tokens(ids, ends - lengths, lengths, forms, places, firsts)
        is_good[is_good] = self._spans(tokens.only(is_good))[2]
        return tokens, is_good

    def _control_places(self, ids: np.ndarray) -> np.ndarray:
        """Return the positions of the control tokens in `ids` (int64, ascending)."""
        # Comparing with the smallest and largest control id first is faster than looking up every id.
        if self._first_control > self._last_control:
            return np.empty(0, np.int64)
        width = np.uint32(self._last_control - self._first_control)
        at = np.flatnonzero(ids - np.uint32(self._first_control) <= width)  # smaller ids wrap around and get large
        return at[self._is_control[ids[at]]]

    def _spans(self, tokens: _Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return each text's trained ranges (int64 [S, 2], from its first id), their number (int64 [T]), and bool [T]:
        False if an edge of one is inside a token, or no token is trained. The first token of a text never is, because
        no token comes before it."""
        edges, counts = self._table(tokens.forms, 1)
        text_of = np.repeat(np.arange(len(counts)), 2 * counts)
        numbers, prefixes = edges.reshape(-1, 2).T
        places = tokens.places[tokens.first_places[text_of] + numbers]
        is_good = np.ones(len(counts), bool)
        for code in np.unique(prefixes[prefixes > 0]).tolist():
            left, tried = np.flatnonzero(prefixes == code), 0
            places[left] += 1
            while len(left):
                if tried == len(self._prefixes[code].ids):
                    if not self._prefixes[code].learn(tokens.ids[places[left[0]] :][:MOST_PREFIX], self._tokenizer):
                        is_good[text_of[left[0]]] = False
                        left = left[1:]
                    continue
                prefix = self._prefixes[code].ids[tried]
                at = np.minimum(places[left, None] + np.arange(len(prefix)), len(tokens.ids) - 1)
                is_same = (tokens.ids[at] == prefix).all(axis=1)
                places[left[is_same]] += len(prefix)
                left, tried = left[~is_same], tried + 1
        spans = np.maximum((places - tokens.begins[text_of]).reshape(-1, 2), (1, 0))
        is_good[text_of[::2][spans[:, 0] >= spans[:, 1]]] = False
        return spans, counts, is_good

    # --- tokens -> sequences

    def _add_conversations(self, at: np.ndarray, tokens: _Tokens, out: EncodedRows) -> np.ndarray:
        """Add conversations with their trained ranges. A text longer than `max_len` is cut after its last whole turn (a
        user message and all up to its final answer) that fits; without any the row is bad. Return bool [T], False for
        texts that must go through jinja2, because what is left of them would be written otherwise."""
        whole = tokens.lengths.copy()
        is_done, is_kept = np.ones((2, len(at)), bool)
        for text in np.flatnonzero(whole > self._max_len).tolist():
            cuts = self._forms.cuts(int(tokens.forms[text]))
            numbers = np.array([number for number, _ in cuts or ()], np.int64)
            ends = tokens.places[tokens.first_places[text] + 1 + numbers] - tokens.begins[text]
            if cuts and (fitting := int((ends <= self._max_len).sum())):
                tokens.lengths[text], tokens.forms[text] = ends[fitting - 1], cuts[fitting - 1][1]
                continue
            is_kept[text], is_done[text] = False, cuts is not None
            if cuts is not None:
                out.bad[int(at[text])] = BadRow("too long", too_long(int(whole[text]), self._max_len))
        is_cut = tokens.lengths < whole
        if is_cut.any():
            is_done[is_cut] = self._spans(tokens.only(is_cut))[2]
            is_kept &= is_done
            for length in (whole - tokens.lengths)[is_cut & is_kept].tolist():
                out.add_cut(length)
        tokens, whole, at = tokens.only(is_kept), whole[is_kept], at[is_kept]
        spans, num_spans, _ = self._spans(tokens)
        ids = tokens.ids
        if tokens.lengths.sum() != len(ids):
            ids = take(ids, tokens.begins, tokens.lengths)
        out.add(at, Sequences(ids, tokens.lengths, spans.reshape(-1), 2 * num_spans), int(whole.sum()))
        return is_done

    def _add_pairs(self, at: np.ndarray, tokens: _Tokens, skipped: np.ndarray, out: EncodedRows) -> None:
        """Add pairs, divided into prompt and replies, with their trained ranges. Pairs with a side longer than
        `max_len`, or with equal sides, are bad. tokens: the texts of all chosen sides, then of all rejected sides.
        skipped: int64 [P], the control tokens in the beginning of the chosen side that the rejected text lacks."""
        half = len(at)
        ends = tokens.places[tokens.first_places[:half] + skipped + 1]
        shared = np.where(skipped, ends - tokens.begins[:half], 0)
        lengths = np.stack([tokens.lengths[:half], tokens.lengths[half:] + shared])
        longest = lengths.max(axis=0, initial=0)
        is_kept = longest <= self._max_len
        for i in np.flatnonzero(~is_kept).tolist():
            out.bad[int(at[i])] = BadRow("too long", too_long_pair(int(longest[i]), self._max_len))
        same = [
            size + common_length(tokens.text(i)[size:], tokens.text(half + i)) for i, size in enumerate(shared.tolist())
        ]
        same = np.array(same, np.int64)
        for i in np.flatnonzero((lengths == same).all(axis=0)).tolist():
            out.bad[int(at[i])] = BadRow("chosen equal to rejected", SAME_RENDERING)
            is_kept[i] = False
        tokens, at = tokens.only(np.tile(is_kept, 2)), at[is_kept]
        lengths, shared, same = lengths[:, is_kept], shared[is_kept], same[is_kept]
        half = len(at)
        spans, num_spans, _ = self._spans(tokens)
        first = spans[np.cumsum(num_spans) - num_spans, 0]
        prompts = np.minimum(np.minimum(first[:half], first[half:] + shared), same)
        offsets = prompts - shared  # number of ids at the beginning of a rejected text that belong to the prompt
        begins = np.stack([tokens.begins[:half], tokens.begins[half:] + offsets], axis=1)
        sizes = np.stack([lengths[0], lengths[1] - prompts], axis=1)
        sequences = pair_sequences(
            take(tokens.ids, begins.reshape(-1), sizes.reshape(-1)),
            np.stack([prompts, *(lengths - prompts)], axis=1),
            spans - np.repeat(np.concatenate([prompts, offsets]), num_spans)[:, None],
            2 * num_spans,
        )
        out.add(at, sequences, len(sequences.ids))


def _gathered(tables: Sequence[Any], of: np.ndarray) -> np.ndarray:
    """Return the tables (arrays or lists of int32) with the indices `of`, end to end."""
    arrays = [np.asarray(table, getattr(table, "dtype", np.int32)) for table in tables]
    if not arrays:
        return np.empty(0, np.int32)
    sizes = np.fromiter(map(len, arrays), np.int64, len(arrays))
    return np.concatenate(arrays)[ranges((np.cumsum(sizes) - sizes)[of], sizes[of])]


def _fixed(head: Pieces) -> str:
    """Return a text of a form that is the same for all rows; "" for another one."""
    return "" if any(isinstance(piece, Slot) for piece in head) else "".join(map(str, head))


def _filled(head: Pieces, values: Sequence[Any]) -> str:
    """Return a text of a form with the values of a row in its slots."""
    return "".join(edited(values[piece.leaf], piece.edits) if isinstance(piece, Slot) else piece for piece in head)


def _edited_where(contents: Any, is_edited: np.ndarray, edits: Edits) -> Any:
    """Return an Arrow string array in which the strings where `is_edited` is True are stripped."""
    pc, which = compute(), truths(is_edited)
    texts = contents if is_edited.all() else contents.filter(which)
    for name, characters in edits:
        texts = getattr(pc, f"utf8_{name.replace('strip', 'trim')}")(texts, characters or SPACE)
    return texts if is_edited.all() else pc.replace_with_mask(contents, which, texts)
