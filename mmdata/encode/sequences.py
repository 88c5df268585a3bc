"""The token ids and trained ranges of many rows as flat numpy arrays, without Python lists of ids: `Sequences` has many
end to end; `TokenSequence` and `PairSequence` are views of one. A trained range ("span") is a half-open range [begin,
end) of token positions that are trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

PAIR_MARKS = 5  # number of lengths that are stored before the trained ranges of a pair; see `Sequences`


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One document or conversation as tokens: ids, uint32 [T], and spans, int32 [n, 2], ascending and disjoint."""

    ids: np.ndarray
    spans: np.ndarray

    @property
    def loss_mask(self) -> np.ndarray:
        """uint8 [T]: 1 for tokens that are trained on, else 0; not shifted."""
        mask = np.zeros(len(self.ids), dtype=np.uint8)
        for begin, end in self.spans:
            mask[begin:end] = 1
        return mask

    @property
    def num_loss(self) -> int:
        """The number of tokens that are trained on."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


@dataclass(frozen=True, slots=True)
class PairSequence:
    """One preference pair as tokens: the uint32 ids of a prompt and of two replies. prompt: ends at or before the first
    trained token. chosen_spans, rejected_spans: int32 [n, 2], counted from the reply's first token."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_spans: np.ndarray
    rejected_spans: np.ndarray


@dataclass(frozen=True)
class Sequences:
    """N sequences, end to end in flat arrays.

    ids: [total tokens] of an integer type, usually uint32. lengths: int64 [N], ids of each sequence. marks: int64
    [total marks], the trained ranges of all sequences: begin, end, begin, end, …, counted from the sequence's first
    token. num_marks: int64 [N], values in `marks` of each. is_pairs: each sequence is the ids of prompt, chosen and
    rejected reply, end to end. Its marks begin with PAIR_MARKS lengths: of these three, and of the ranges of chosen and
    rejected reply, which follow, counted from the first token of the reply.
    """

    ids: np.ndarray
    lengths: np.ndarray
    marks: np.ndarray
    num_marks: np.ndarray
    is_pairs: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenSequence | PairSequence:
        begin, first = self.begins[index], self.mark_begins[index]
        ids = self.ids[begin : begin + self.lengths[index]]
        marks = self.marks[first : first + self.num_marks[index]].astype(np.int32)
        if not self.is_pairs:
            return TokenSequence(ids, marks.reshape(-1, 2))
        sides = np.split(ids, np.cumsum(marks[:2]))
        spans = np.split(marks[PAIR_MARKS:].reshape(-1, 2), [marks[3] // 2])
        return PairSequence(sides[0], sides[1], sides[2], spans[0], spans[1])

    def __iter__(self) -> Iterator[TokenSequence | PairSequence]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 [N]: the index in `ids` of the first id of each sequence."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def mark_begins(self) -> np.ndarray:
        """int64 [N]: the index in `marks` of the first value of each sequence."""
        return np.cumsum(self.num_marks) - self.num_marks

    def pair_marks(self) -> np.ndarray:
        """Return the lengths with which the marks of each pair begin (int64 [N, PAIR_MARKS]). Only for pairs."""
        return self.marks[self.mark_begins[:, None] + np.arange(PAIR_MARKS)]

    def widths(self) -> np.ndarray:
        """Return the tokens that a bucket must have room for (int64 [N]): for a pair, the prompt and the longer reply."""
        if not self.is_pairs:
            return self.lengths
        sides = self.pair_marks()
        return sides[:, 0] + sides[:, 1:3].max(axis=1, initial=0)

    def model_lengths(self) -> np.ndarray:
        """Return the tokens that a model processes (int64 [N]): for a pair, the prompt with each reply."""
        return self.lengths + self.pair_marks()[:, 0] if self.is_pairs else self.lengths

    @cached_property
    def num_loss(self) -> np.ndarray:
        """int64 [N]: the number of tokens of each sequence that are trained on."""
        heads = PAIR_MARKS if self.is_pairs else 0
        at = np.arange(len(self.marks)) - np.repeat(self.mark_begins, self.num_marks) - heads
        signed = np.where(at % 2 == 1, self.marks, -self.marks)
        signed[at < 0] = 0
        sums = np.concatenate([[0], np.cumsum(signed)])
        ends = np.cumsum(self.num_marks)
        return sums[ends] - sums[ends - self.num_marks]


def flatten(sequences: Sequence[TokenSequence | PairSequence]) -> Sequences:
    """Copy sequences, all of one class, into flat arrays. Without sequences, `is_pairs` of the result is False."""
    pairs = [s for s in sequences if isinstance(s, PairSequence)]
    if pairs:
        ids = [side for s in pairs for side in (s.prompt, s.chosen, s.rejected)]
        spans = [s.chosen_spans.reshape(-1) for s in pairs] + [s.rejected_spans.reshape(-1) for s in pairs]
        return pair_sequences(
            _joined(ids, np.uint32), _sizes(ids).reshape(-1, 3), _joined(spans, np.int64), _sizes(spans)
        )
    ids = [s.ids for s in sequences if isinstance(s, TokenSequence)]
    spans = [s.spans.reshape(-1) for s in sequences if isinstance(s, TokenSequence)]
    return Sequences(_joined(ids, np.uint32), _sizes(ids), _joined(spans, np.int64), _sizes(spans))


def pair_sequences(ids: np.ndarray, sizes: np.ndarray, spans: np.ndarray, num_marks: np.ndarray) -> Sequences:
    """Return a `Sequences` object of P pairs. ids: of prompt, chosen and rejected reply of the first pair, then of the
    second, and so on. sizes: int64 [P, 3], ids of these three. spans: the trained ranges of all chosen, then of all
    rejected replies, as [n, 2] or flat, counted from the reply's first token. num_marks: int64 [2P], twice the ranges
    of each."""
    chosen, rejected = num_marks.reshape(2, -1)
    marks_of_pair = PAIR_MARKS + chosen + rejected
    begins = np.cumsum(marks_of_pair) - marks_of_pair
    marks = np.empty(marks_of_pair.sum(), np.int64)
    marks[begins[:, None] + np.arange(PAIR_MARKS)] = np.column_stack([sizes, chosen, rejected])
    places = np.concatenate([begins + PAIR_MARKS, begins + PAIR_MARKS + chosen])
    marks[ranges(places, num_marks)] = spans.reshape(-1)
    return Sequences(ids, sizes.sum(axis=1), marks, marks_of_pair, is_pairs=True)


def join(parts: Sequence[Sequences]) -> Sequences:
    """Concatenate the sequences of all parts, which must be of one kind (pairs or not)."""
    if len(parts) == 1:
        return parts[0]
    is_pairs = any(part.is_pairs for part in parts)
    parts = [part for part in parts if len(part)]
    ids = _joined([part.ids for part in parts], parts[0].ids.dtype if parts else np.uint32)
    lengths, marks, num_marks = (
        _joined([getattr(part, name) for part in parts], np.int64) for name in ("lengths", "marks", "num_marks")
    )
    return Sequences(ids, lengths, marks, num_marks, is_pairs)


def reorder(sequences: Sequences, order: np.ndarray) -> Sequences:
    """Return the sequences with the indices `order`, in that order."""
    lengths, num_marks = sequences.lengths[order], sequences.num_marks[order]
    ids = take(sequences.ids, sequences.begins[order], lengths)
    marks = take(sequences.marks, sequences.mark_begins[order], num_marks)
    return Sequences(ids, lengths, marks, num_marks, sequences.is_pairs)


def is_equal(one: Sequences, other: Sequences) -> bool:
    """Return whether two objects contain the same sequences in the same order. The integer types of ids may differ."""
    names = ("lengths", "num_marks", "marks", "ids")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def take(values: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the slices values[begins[i] : begins[i] + sizes[i]], end to end, as one array."""
    ends = (begins + sizes).tolist()
    pieces = [values[begin:end] for begin, end in zip(begins.tolist(), ends, strict=True)]
    return np.concatenate(pieces) if pieces else values[:0]


def ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the indices begins[i], begins[i] + 1, …, begins[i] + sizes[i] - 1 for every i, end to end (int64)."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - (ends - sizes), sizes)


def _joined(arrays: Sequence[np.ndarray], dtype: np.dtype | type) -> np.ndarray:
    """Concatenate arrays, or none, and cast them to `dtype` without a check that the values fit."""
    return np.concatenate(arrays, dtype=dtype, casting="unsafe") if len(arrays) else np.empty(0, dtype)


def _sizes(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([array.size for array in arrays], np.int64)
