"""Many plain rows in, flat ids and trained spans out: one string a row, one native call, and numpy over all of them.

A row's control tokens are written into its string. That they, and no others, came back as control ids in the expected
order is checked for each row, and so are the ids of every answer's header; a row that fails (its content holds a control
string, say) is handed back as odd, for `encode` to look at alone. What is trained is counted from the control tokens.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmdata.encode.blocks import HEAD, TAIL, Blocks
from mmdata.encode.rows import BadRow
from mmdata.encode.sequences import Flat, take
from mmdata.encode.talks import Talks
from mmdata.tokenizer.encoders import Encoder
from mmdata.tokenizer.tokenizer import Tokenizer

CUT_TURNS = "cut after the last whole turn that fits"
_BRACKETED = re.compile(r"<[^<>\s]+>")  # no such token can reach across the edge of a content into the template's text


@dataclass(slots=True)
class Found:
    """flat: the sequences of the rows that are neither odd nor bad, in row order; num_sequences: int64 [R], else 0."""

    flat: Flat
    num_sequences: np.ndarray
    num_tokens: int  # of these rows, before cutting
    odd: list[int]
    bad: dict[int, BadRow] = field(default_factory=dict)
    cut: Counter[str] = field(default_factory=Counter)
    rows_cut: int = 0


class Bulk:
    """Encodes plain rows with one tokenizer and one template of blocks."""

    def __init__(self, tokenizer: Tokenizer, encoder: Encoder, *, max_len: int, train_on: str):
        self._tokenizer = tokenizer
        self._encode = encoder.encode
        self._max_len = max_len
        self._train_on = train_on
        self._is_control = np.zeros(max(tokenizer.vocab_size, 1), bool)
        self._is_control[list(tokenizer.control_tokens.values())] = True
        head, tail = (tokenizer.encode_batch([text])[0] for text in (HEAD, TAIL))
        self._head, self._tail = head, len(tail)

    @staticmethod
    def is_possible(tokenizer: Tokenizer) -> bool:
        """Whether text beside a control token, encoded alone, has the ids it has in a whole rendering."""
        return tokenizer.is_exact and all(map(_BRACKETED.fullmatch, tokenizer.control_tokens))

    def documents(self, found: Sequence[Sequence[str]]) -> Found:
        """Documents between bos and eos, of each row; longer ones go on in further sequences, no token lost."""
        bos, eos = self._tokenizer.bos_token, self._tokenizer.eos_token
        num_texts = np.fromiter(map(len, found), np.int64, len(found))
        ids, ends = self._encode([f"{bos}{text}{eos}" for texts in found for text in texts], True)
        lengths = np.diff(ends, prepend=0)
        begins = ends - lengths
        row_of = np.repeat(np.arange(len(found)), num_texts)
        is_good = np.bincount(self._control_texts(ids, ends)[1], minlength=len(ends)) == 1 + bool(bos)
        is_good &= ids[ends - 1] == self._tokenizer.eos_id
        if bos:
            is_good &= ids[begins] == self._tokenizer.bos_id
        is_odd = num_texts == 0
        is_odd[row_of[~is_good]] = True
        if is_odd.any():
            is_kept = ~is_odd[row_of]
            begins, lengths, row_of = begins[is_kept], lengths[is_kept], row_of[is_kept]
            ids = take(ids, begins, lengths)
        lengths, row_of = self._fragments(lengths, row_of)
        num_marks = np.where(lengths > 1, 2, 0)
        marks = np.stack([np.ones_like(lengths), lengths], axis=1)[lengths > 1].reshape(-1)
        flat = Flat(ids, lengths, marks, num_marks)
        return Found(flat, np.bincount(row_of, minlength=len(found)), len(ids), np.flatnonzero(is_odd).tolist())

    def _fragments(self, lengths: np.ndarray, row_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the sequences that texts of these lengths become, and their rows."""
        if not len(lengths) or lengths.max() <= self._max_len:
            return lengths, row_of
        counts = -(-lengths // self._max_len)
        found = np.full(counts.sum(), self._max_len)
        last = np.cumsum(counts) - 1
        found[last] = lengths - (counts - 1) * self._max_len
        is_single = (found[last] == 1) & (counts > 1) & (self._max_len > 2)  # it could not be trained on
        found[last[is_single]] += 1
        found[last[is_single] - 1] -= 1
        return found, np.repeat(row_of, counts)

    def _control_texts(self, ids: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the control ids stand, and in which text."""
        at = np.flatnonzero(self._is_control[ids])
        return at, np.searchsorted(ends, at, side="right")

    def conversations(self, talks: Talks, blocks: Blocks, keeps: np.ndarray) -> Found:
        """Conversations in blocks. keeps: bool [R], whether a row keeps the empty think blocks that the template writes."""
        rendered = blocks.render(talks, keeps)
        odd = np.flatnonzero(rendered.is_odd).tolist()
        of_text = np.flatnonzero(~rendered.is_odd)  # its row
        ids, ends = self._encode(rendered.texts, True)
        table = _Table(ids, ends, rendered.letters, rendered.num_blocks)
        is_good = self._locate(table, blocks)
        odd += of_text[~is_good].tolist()
        table.keep(is_good)
        of_text = of_text[is_good]
        bad, cut = self._shorten(table, of_text)
        spans = self._spans(table)
        is_bad = np.isin(of_text, list(bad))
        num_tokens = int(table.whole_lengths[~is_bad].sum())
        num_sequences = np.zeros(len(talks), np.int64)
        num_sequences[of_text[~is_bad]] = 1
        flat = table.flat(~is_bad, *spans)
        rows_cut = int((table.lengths < table.whole_lengths).sum())
        return Found(flat, num_sequences, num_tokens, sorted(odd), bad, cut, rows_cut)

    def _locate(self, table: "_Table", blocks: Blocks) -> np.ndarray:
        """Finds every block's control tokens in its text; bool [texts]: all there, no others, headers as expected."""
        at, text_of = self._control_texts(table.ids, table.ends)
        num_texts = len(table.ends)
        is_good = np.bincount(text_of, minlength=num_texts) == 2 * table.num_blocks
        is_here = is_good[text_of]
        at, text_of = at[is_here], text_of[is_here]
        control = self._tokenizer.control_tokens
        expected = (control[blocks.words.open], control[blocks.words.close])
        is_good[text_of[0::2][table.ids[at[0::2]] != expected[0]]] = False
        is_good[text_of[1::2][table.ids[at[1::2]] != expected[1]]] = False
        table.place(at, text_of)
        answers = np.flatnonzero(table.is_answer & is_good[table.text_of])
        header = table.opens[answers, None] + 1 + np.arange(len(self._head))
        is_head = (table.ids[np.minimum(header, len(table.ids) - 1)] == self._head).all(axis=1)
        is_good[table.text_of[answers[~is_head]]] = False
        return is_good

    def _shorten(self, table: "_Table", of_text: np.ndarray) -> tuple[dict[int, BadRow], Counter[str]]:
        """Cuts texts past max_len after their last whole turn that fits; without one they are too long."""
        bad: dict[int, BadRow] = {}
        cut: Counter[str] = Counter()
        for text in np.flatnonzero(table.lengths > self._max_len).tolist():
            blocks = slice(*np.searchsorted(table.text_of, [text, text + 1]).tolist())
            letters = table.letters[blocks]
            begin, length = int(table.begins[text]), int(table.lengths[text])
            ends = table.closes[blocks] + 1 + self._tail - begin
            may_end = (letters[:-1] == ord("a")) & (letters[1:] != ord("t")) & (ends[:-1] <= self._max_len)
            fitting = np.flatnonzero(may_end)
            if len(fitting):
                table.lengths[text] = ends[fitting[-1]]
                cut[CUT_TURNS] += length - int(ends[fitting[-1]])
            else:
                bad[int(of_text[text])] = BadRow(
                    "too long", f"{length:,} tokens, and its first turn alone is longer than {self._max_len:,}"
                )
        return bad, cut

    def _spans(self, table: "_Table") -> tuple[np.ndarray, np.ndarray]:
        """int64 [S, 2] trained stretches in positions of their text, and the text of each."""
        texts = np.arange(len(table.lengths))
        if self._train_on == "all":  # all but the first token, which nothing predicts
            return np.stack([np.ones_like(table.lengths), table.lengths], axis=1), texts
        ends = table.closes + 1 + self._tail - table.begins[table.text_of]
        trained = np.flatnonzero(table.is_answer & (ends <= table.lengths[table.text_of]))
        text_of = table.text_of[trained]
        if self._train_on == "last":
            is_last = np.append(text_of[1:] != text_of[:-1], True)[: len(trained)]
            trained, text_of = trained[is_last], text_of[is_last]
        begins = table.opens[trained] + 1 + len(self._head) - table.begins[text_of]
        return np.stack([begins, ends[trained]], axis=1), text_of


class _Table:
    """The texts of a batch and their blocks: where each opens and closes in the ids."""

    def __init__(self, ids: np.ndarray, ends: np.ndarray, letters: np.ndarray, num_blocks: np.ndarray):
        self.ids = ids
        self.ends = ends
        self.num_blocks = num_blocks
        self.whole_lengths = np.diff(ends, prepend=0)
        self.lengths = self.whole_lengths.copy()
        self.begins = ends - self.lengths
        self._letters = letters
        self.opens = self.closes = self.text_of = np.empty(0, np.int64)
        self.letters = self._letters[:0]

    @property
    def is_answer(self) -> np.ndarray:
        return self.letters == ord("a")

    def place(self, at: np.ndarray, text_of: np.ndarray) -> None:
        """Control tokens of whole texts, two a block."""
        self.opens, self.closes, self.text_of = at[0::2], at[1::2], text_of[0::2]
        is_placed = np.zeros(len(self.ends), bool)
        is_placed[text_of] = True
        self.letters = self._letters[np.repeat(is_placed, self.num_blocks)]

    def keep(self, is_good: np.ndarray) -> None:
        """Forgets the other texts and numbers these anew; ids stay where they are."""
        if is_good.all():
            return
        blocks = is_good[self.text_of]
        number = np.cumsum(is_good) - 1
        self.opens, self.closes, self.letters = self.opens[blocks], self.closes[blocks], self.letters[blocks]
        self.text_of = number[self.text_of[blocks]]
        self.begins, self.lengths = self.begins[is_good], self.lengths[is_good]
        self.whole_lengths = self.whole_lengths[is_good]

    def flat(self, is_kept: np.ndarray, spans: np.ndarray, text_of: np.ndarray) -> Flat:
        """The kept texts with their spans."""
        num_spans = np.bincount(text_of, minlength=len(self.lengths))
        lengths = self.lengths[is_kept]
        ids = self.ids
        if lengths.sum() != len(ids):
            ids = take(ids, self.begins[is_kept], lengths)
        return Flat(ids, lengths, spans[is_kept[text_of]].reshape(-1), 2 * num_spans[is_kept])
