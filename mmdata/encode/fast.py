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
    ASSISTANT,
    SPACE,
    SYSTEM,
    TOOL,
    Conversations,
    TextCodes,
    ToolSpecs,
    as_numpy,
    byte_sizes,
    compute,
    join_messages,
    truths,
)
from mmdata.encode.encoded import EncodedRows
from mmdata.encode.forms import ODD, forms_of, leaves
from mmdata.encode.reference import SAME_RENDERING, common_length, too_long, too_long_pair
from mmdata.encode.rows import BadRow
from mmdata.encode.sequences import Sequences, pair_sequences, ranges, take
from mmdata.encode.template import Template
from mmdata.encode.template.stand_ins import Edits, Slot, edited
from mmdata.tokenizer.encoders import Encoder
from mmdata.tokenizer.tokenizer import Tokenizer

NO_TOOLS = ToolSpecs(())
MOST_PREFIX = 64  # tokens of a `_Prefix`


@dataclass
class _Tokens:
    """The token ids of T rendered texts. ids: uint32 [total ids], of all texts. begins, lengths: int64 [T], where in
    `ids` each text begins, and its number of ids. num_shared: int64 [T], in a pair's chosen text, the ids at its
    beginning that the rejected text lacks. spans, num_spans: int64 [S, 2] and [T], the trained ranges of each text, from
    its first id."""

    ids: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    num_shared: np.ndarray
    spans: np.ndarray
    num_spans: np.ndarray

    def only(self, is_kept: np.ndarray) -> "_Tokens":
        """Return the texts where `is_kept` (bool [T]) is True. `ids` remain those of all texts."""
        begins, lengths, num_shared, num_spans = (
            each[is_kept] for each in (self.begins, self.lengths, self.num_shared, self.num_spans)
        )
        spans = self.spans[np.repeat(is_kept, self.num_spans)]
        return _Tokens(self.ids, begins, lengths, num_shared, spans, num_spans)

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
        self._forms = forms_of(template, train_on)
        control_ids = list(tokenizer.control_tokens.values())
        self._is_control = np.zeros(max(tokenizer.vocab_size, 1), bool)
        self._is_control[control_ids] = True
        self._first_control, self._last_control = min(control_ids, default=1), max(control_ids, default=0)
        self._prefixes = [_Prefix(None)]
        self._cuts: dict[tuple[int, int], tuple[int, int]] = {}  # form and messages -> control tokens and ranges; or 0
        self._layout = lru_cache(None)(self._make_layout)

    def encode(self, at: np.ndarray, columns: Conversations, keeps: np.ndarray, out: EncodedRows) -> np.ndarray:
        """Encode rows and add them to `out`. Return bool [R], or [P] for pairs: True for rows that must go through
        jinja2. at: int64 [rows], the index of each row in the batch. keeps: bool [rows], rows that keep the empty think
        blocks."""
        tokens, is_good, forms = self._tokens(columns, keeps)
        rows = np.flatnonzero(is_good)
        if columns.is_pairs:
            self._add_pairs(at[rows], tokens, out)
            return ~is_good
        is_long = tokens.lengths > self._max_len
        self._add(at[rows[~is_long]], tokens.only(~is_long), tokens.lengths[~is_long], out)
        if is_long.any():
            long = np.zeros(len(at), bool)
            long[rows[is_long]] = True
            cut = self._add_cut(at[long], columns.only(long), keeps[long], tokens.only(is_long), forms[is_long], out)
            is_good[long] = cut
        return ~is_good

    def _tokens(self, columns: Conversations, keeps: np.ndarray) -> tuple[_Tokens, np.ndarray, np.ndarray]:
        """Encode rows whole, and return the tokens of those that need no jinja2, for pairs of all chosen sides, then of
        all rejected ones, bool [rows], False for the others, and the forms of the tokens' texts."""
        sides = 1 + columns.is_pairs
        first = np.tile(columns.num_shared, 2) if columns.is_pairs else np.zeros(len(columns), np.int64)
        forms = self._forms.find(columns, np.tile(keeps, sides), first)
        is_good = self._of_both_sides(forms != ODD, sides)
        is_good = self._of_both_sides(is_good & self._is_fit(columns, forms[is_good]), sides)
        columns, forms, first = columns.only(is_good), forms[is_good], first[is_good]
        begins, skipped = np.zeros((2, len(forms)), np.int64)  # the first message that is written
        if columns.is_pairs:
            half = len(forms) // 2
            for i, pair in enumerate(zip(forms[:half].tolist(), forms[half:].tolist(), first.tolist(), strict=False)):
                forms[half + i], skipped[i] = self._forms.rest(*pair)
            begins[half:] = np.where(skipped[:half], first[:half], 0)
        tokens, is_located = self._locate(self._texts(columns, forms, begins), forms, skipped)
        is_located = self._of_both_sides(is_located, sides)
        is_good[is_good] = is_located
        return tokens.only(is_located), is_good[: len(keeps)], forms[is_located]

    @staticmethod
    def _of_both_sides(is_good: np.ndarray, sides: int) -> np.ndarray:
        """Return `is_good` (bool [R]), False for both sides of a pair if it is for one."""
        return np.tile(is_good.reshape(sides, -1).all(axis=0), sides)

    def _is_fit(self, columns: Conversations, forms: np.ndarray) -> np.ndarray:
        """Return bool [R]: False for conversations with a text for which the template could do something else: a blank
        one, or one with a string that it searches for. forms: those that matter."""
        pc, contents = compute(), columns.contents
        literals = set().union(*(self._forms.forms[n].literals for n in _distinct(forms)[0]))
        is_odd = (columns.roles == SYSTEM) | (columns.roles == TOOL)  # others are blank only beside reasoning or calls
        is_odd[list(columns.extras)] = True
        is_odd &= byte_sizes(contents) > 0
        if is_odd.any():
            is_odd[is_odd] = byte_sizes(pc.utf8_ltrim(contents.filter(truths(is_odd)), SPACE)) == 0
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
        used, of = _distinct(forms)
        found = [self._forms.forms[n] for n in used]
        kinds: dict[Edits, int] = {}
        heads.codes = _gathered([list(map(heads.code, form.fixed[:-1])) for form in found], of)
        edits = _gathered([[kinds.setdefault(one, len(kinds)) for one in form.edits] for form in found], of)
        ends = columns.begins + columns.counts
        tails.codes[ends - 1] = np.array([tails.code(form.fixed[-1]) for form in found], np.int32)[of]
        has_slots = np.array([bool(form.slotted) for form in found], bool)[of]
        for row in np.flatnonzero(has_slots).tolist():
            begin, end, tools = int(columns.begins[row]), int(ends[row]), columns.tools.get(row, NO_TOOLS)
            values = leaves(tools.specs, (columns.extras[at] for at in range(begin, end) if at in columns.extras))
            for number, head in found[of[row]].slotted:
                codes, at = (heads, begin + number) if begin + number < end else (tails, end - 1)
                codes.set(at, "".join([p if isinstance(p, str) else _written(p, values, tools) for p in head]))
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
        used, of = _distinct(forms)
        tables = [self._layout(n)[column] for n in used]
        values = _gathered(tables, of)
        sizes = np.array([len(table) for table in tables], np.int64)[of]
        return values.reshape(-1, 4) if column else values, sizes

    def _locate(self, texts: list[str], forms: np.ndarray, skipped: np.ndarray) -> tuple[_Tokens, np.ndarray]:
        """Encode texts and find their control tokens. Return these and bool [T], False for texts with other control
        tokens than their form's, with an edge of a trained range inside a token, or without trained tokens. skipped:
        int64 [T], the control tokens in the beginning of a chosen text that the rejected one lacks."""
        ids, ends = self._encoder.encode(texts, True)
        lengths = np.diff(ends, prepend=0)
        at = self._control_places(ids)
        text_of = np.searchsorted(ends, at, side="right")
        expected, counts = self._table(forms, 0)
        is_good = np.bincount(text_of, minlength=len(ends)) == counts
        at, expected = at[is_good[text_of]], expected[np.repeat(is_good, counts)]
        # For all texts, the place before the text, those of its control tokens, and its end.
        sizes = 2 + counts * is_good
        firsts = np.cumsum(sizes) - sizes
        places = np.empty(sizes.sum(), np.int64)
        is_control = np.ones(len(places), bool)
        is_control[firsts] = is_control[firsts + sizes - 1] = False
        places[firsts], places[firsts + sizes - 1], places[is_control] = ends - lengths - 1, ends, at
        is_good[np.repeat(np.arange(len(ends)), sizes - 2)[ids[at] != expected]] = False
        num_shared = np.where(skipped, places[np.minimum(firsts + skipped + 1, len(places) - 1)] - (ends - lengths), 0)
        edges, num_spans = self._table(forms[is_good], 1)
        spans, is_whole = self._spans(ids, places, np.repeat(firsts[is_good], num_spans), edges)
        spans = np.maximum(spans - np.repeat((ends - lengths)[is_good], num_spans)[:, None], (1, 0))
        is_whole &= spans[:, 0] < spans[:, 1]  # the first token is never trained: no token comes before it
        tokens = _Tokens(ids, ends - lengths, lengths, num_shared, spans, np.zeros_like(lengths))
        tokens.num_spans[is_good] = num_spans
        is_good[np.repeat(np.flatnonzero(is_good), num_spans)[~is_whole]] = False
        return tokens, is_good

    def _control_places(self, ids: np.ndarray) -> np.ndarray:
        """Return the positions of the control tokens in `ids` (int64, ascending)."""
        # Comparing with the smallest and largest control id first is faster than looking up every id.
        if self._first_control > self._last_control:
            return np.empty(0, np.int64)
        width = np.uint32(self._last_control - self._first_control)
        at = np.flatnonzero(ids - np.uint32(self._first_control) <= width)  # smaller ids wrap around and get large
        return at[self._is_control[ids[at]]]

    def _spans(
        self, ids: np.ndarray, places: np.ndarray, firsts: np.ndarray, edges: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the places in `ids` of the edges of S ranges (int64 [S, 2]), and bool [S], False if one is inside a
        token. firsts: int64 [S], where in `places` the control tokens of each range's text begin."""
        numbers, prefixes = edges.reshape(-1, 2).T
        found = places[np.repeat(firsts, 2) + numbers]
        is_whole = np.ones(len(found), bool)
        for code in np.unique(prefixes[prefixes > 0]).tolist():
            left, tried, prefix = np.flatnonzero(prefixes == code), 0, self._prefixes[code]
            found[left] += 1
            while len(left):
                if tried == len(prefix.ids):
                    if not prefix.learn(ids[found[left[0]] :][:MOST_PREFIX], self._tokenizer):
                        is_whole[left[0]] = False
                        left = left[1:]
                    continue
                size = len(prefix.ids[tried])
                at = np.minimum(found[left, None] + np.arange(size), len(ids) - 1)
                is_same = (ids[at] == prefix.ids[tried]).all(axis=1)
                found[left[is_same]] += size
                left, tried = left[~is_same], tried + 1
        return found.reshape(-1, 2), is_whole[0::2] & is_whole[1::2]

    # --- tokens -> sequences

    @staticmethod
    def _add(at: np.ndarray, tokens: _Tokens, num_tokens: np.ndarray, out: EncodedRows) -> None:
        """Add conversations with their trained ranges. num_tokens: int64 [rows], before cutting."""
        ids = tokens.ids
        if tokens.lengths.sum() != len(ids):
            ids = take(ids, tokens.begins, tokens.lengths)
        sequences = Sequences(ids, tokens.lengths, tokens.spans.reshape(-1), 2 * tokens.num_spans)
        out.add(at, sequences, int(num_tokens.sum()))

    def _add_cut(
        self,
        at: np.ndarray,
        columns: Conversations,
        keeps: np.ndarray,
        whole: _Tokens,
        forms: np.ndarray,
        out: EncodedRows,
    ) -> np.ndarray:
        """Add conversations longer than `max_len`, each cut after its last whole turn (a user message and all up to its
        final answer) that fits; without any the row is bad. Return bool [rows], False for those that must go through
        jinja2. whole, forms: the tokens and the form of each conversation, not cut."""
        may_end = (columns.roles == ASSISTANT) & ~np.roll(columns.is_first, -1) & (np.roll(columns.roles, -1) != TOOL)
        row_of = columns.row_of[may_end]
        sizes = 1 + np.flatnonzero(may_end) - columns.begins[row_of]  # messages up to the end of each turn
        ends = np.bincount(row_of, minlength=len(at))
        rows, tokens, is_left = self._begun(columns, keeps, whole, forms, np.split(sizes, np.cumsum(ends)[:-1]))
        found = [(rows, tokens)]
        is_good, low = np.ones(len(at), bool), np.bincount(rows, minlength=len(at))
        if is_left.any():
            sizes = sizes[is_left[row_of]]
            more, is_good[is_left], low[is_left] = self._bisected(
                columns.only(is_left), keeps[is_left], sizes, ends[is_left]
            )
            found += [(np.flatnonzero(is_left)[rows], tokens) for rows, tokens in more]
        for row in np.flatnonzero(is_good & (low == 0)).tolist():
            out.bad[int(at[row])] = BadRow("too long", too_long(int(whole.lengths[row]), self._max_len))
        for rows, tokens in found:
            for dropped in (whole.lengths[rows] - tokens.lengths).tolist():
                out.add_cut(dropped)
            self._add(at[rows], tokens, whole.lengths[rows], out)
        return is_good

    def _begun(
        self, columns: Conversations, keeps: np.ndarray, whole: _Tokens, forms: np.ndarray, sizes: list[np.ndarray]
    ) -> tuple[np.ndarray, _Tokens, np.ndarray]:
        """Return the rows that can be cut and of which the whole text begins with that of the cut conversation, their
        tokens, and bool [rows], True for those whose whole text may begin otherwise. sizes: the numbers of messages
        after which each conversation may be cut."""
        places = self._control_places(whole.ids)
        firsts = np.searchsorted(places, whole.begins).tolist()
        rows, lengths, num_spans = [], [], []
        is_left = np.zeros(len(forms), bool)
        for row, form in enumerate(forms.tolist()):
            for size in sizes[row][::-1].tolist():
                if (cut := self._cuts.get((form, size))) is None:
                    example = columns.only(np.arange(len(forms)) == row, np.array([size]))
                    cut = self._cuts[form, size] = self._find_cut(form, size, example, keeps[row : row + 1])
                if not cut[0]:
                    is_left[row] = True
                    break
                length = int(places[firsts[row] + cut[0]] - whole.begins[row])
                if length <= self._max_len:
                    rows.append(row)
                    lengths.append(length)
                    num_spans.append(cut[1])
                    break
        is_kept = np.zeros(len(forms), bool)
        is_kept[rows] = True
        tokens = whole.only(is_kept)
        tokens.lengths, kept = np.array(lengths, np.int64), np.array(num_spans, np.int64)
        starts = np.cumsum(tokens.num_spans) - tokens.num_spans
        tokens.spans, tokens.num_spans = tokens.spans[ranges(starts, kept)], kept
        return np.array(rows, np.int64), tokens, is_left

    def _find_cut(self, form: int, size: int, example: Conversations, keeps: np.ndarray) -> tuple[int, int]:
        """Return the numbers of control tokens and trained ranges in the first `size` messages of a form, or zeros if its
        conversations begin otherwise than those messages alone, of which `example` is one conversation."""
        number = int(self._forms.find(example, keeps, np.zeros(1, np.int64))[0])
        if number == ODD or not self._forms.forms[number].begins(self._forms.forms[form], size):
            return 0, 0
        return len(self._forms.forms[number].controls), len(self._forms.forms[number].spans)

    def _bisected(
        self, columns: Conversations, keeps: np.ndarray, sizes: np.ndarray, high: np.ndarray
    ) -> tuple[list[tuple[np.ndarray, _Tokens]], np.ndarray, np.ndarray]:
        """Find the most turns of each conversation that fit by encoding it with half of them, and so on. Return rows and
        their tokens; bool [rows], False for rows that must go through jinja2; and how many turns fit. sizes: messages up
        to the end of each turn, all rows end to end. high: int64 [rows], the number of turns; it is changed."""
        firsts, low, is_good = np.cumsum(high) - high, np.zeros_like(high), np.ones(len(high), bool)
        found = []
        while (is_open := is_good & (low < high)).any():
            middle = ((low + high) // 2)[is_open]
            tokens, is_done, _ = self._tokens(columns.only(is_open, sizes[firsts[is_open] + middle]), keeps[is_open])
            rows, middle, fits = np.flatnonzero(is_open)[is_done], middle[is_done], tokens.lengths <= self._max_len
            low[rows[fits]], high[rows[~fits]] = middle[fits] + 1, middle[~fits]
            found.append((rows[fits], middle[fits] + 1, tokens.only(fits)))
            is_good[is_open] = is_done
        best = [is_good[rows] & (low[rows] == turns) for rows, turns, _ in found]
        kept = [(rows[is_best], tokens.only(is_best)) for (rows, _, tokens), is_best in zip(found, best, strict=True)]
        return kept, is_good, low

    def _add_pairs(self, at: np.ndarray, tokens: _Tokens, out: EncodedRows) -> None:
        """Add pairs, divided into prompt and replies, with their trained ranges. Pairs with a side longer than
        `max_len`, or with equal sides, are bad. tokens: the texts of all chosen sides, then of all rejected sides."""
        half = len(at)
        shared = tokens.num_shared[:half]
        lengths = np.stack([tokens.lengths[:half], tokens.lengths[half:] + shared])
        longest = lengths.max(axis=0, initial=0)
        is_kept = longest <= self._max_len
        for i in np.flatnonzero(~is_kept).tolist():
            out.bad[int(at[i])] = BadRow("too long", too_long_pair(int(longest[i]), self._max_len))
        same = shared + [common_length(tokens.text(i)[shared[i] :], tokens.text(half + i)) for i in range(half)]
        for i in np.flatnonzero((lengths == same).all(axis=0)).tolist():
            out.bad[int(at[i])] = BadRow("chosen equal to rejected", SAME_RENDERING)
            is_kept[i] = False
        tokens, at = tokens.only(np.tile(is_kept, 2)), at[is_kept]
        lengths, shared, same = lengths[:, is_kept], shared[is_kept], same[is_kept]
        half, spans, num_spans = len(at), tokens.spans, tokens.num_spans
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


def _distinct(forms: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return the different numbers in `forms` (int64 [R]), ascending, and the index in them of each of `forms`."""
    is_used = np.bincount(forms) > 0
    return np.flatnonzero(is_used).tolist(), (np.cumsum(is_used) - 1)[forms]


def _gathered(tables: Sequence[Any], of: np.ndarray) -> np.ndarray:
    """Return the tables (arrays or lists of int32) with the indices `of`, end to end."""
    arrays = [np.asarray(table, getattr(table, "dtype", np.int32)) for table in tables]
    if not arrays:
        return np.empty(0, np.int32)
    sizes = np.fromiter(map(len, arrays), np.int64, len(arrays))
    return np.concatenate(arrays)[ranges((np.cumsum(sizes) - sizes)[of], sizes[of])]


def _written(slot: Slot, values: Sequence[Any], tools: ToolSpecs) -> str:
    """Return what the template writes in a slot. values: the row's `leaves`, first its tools."""
    if slot.leaf >= len(tools.specs):
        return edited(values[slot.leaf], slot.edits)
    if slot not in tools.written:
        tools.written[slot] = edited(values[slot.leaf], slot.edits)
    return tools.written[slot]


def _edited_where(contents: Any, is_edited: np.ndarray, edits: Edits) -> Any:
    """Return an Arrow string array in which the strings where `is_edited` is True are stripped."""
    pc, which = compute(), truths(is_edited)
    texts = contents if is_edited.all() else contents.filter(which)
    for name, characters in edits:
        texts = getattr(pc, f"utf8_{name.replace('strip', 'trim')}")(texts, characters or SPACE)
    return texts if is_edited.all() else pc.replace_with_mask(contents, which, texts)
