"""Token ids and trained spans of many rows as flat arrays; `Sequence` and `PairSequence` are views of a single one.

A flat array costs the bytes of its values. Nothing here is a Python list of ids.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property

import numpy as np

PAIR_MARKS = 5  # values before a pair's spans: lengths of prompt, chosen and rejected, and of both span lists


@dataclass(frozen=True, slots=True)
class Sequence:
    """ids: uint32 [T]; spans: int32 [n, 2], the trained token ranges: half-open, ascending, disjoint."""

    ids: np.ndarray
    spans: np.ndarray

    @property
    def loss_mask(self) -> np.ndarray:
        """uint8 [T], 1 where trained, not shifted."""
        mask = np.zeros(len(self.ids), dtype=np.uint8)
        for begin, end in self.spans:
            mask[begin:end] = 1
        return mask

    @property
    def num_loss(self) -> int:
        """Number of trained tokens."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


@dataclass(frozen=True, slots=True)
class PairSequence:
    """prompt, chosen, rejected: uint32 ids; spans: int32 [n, 2], positions in their reply.

    The prompt ends where training begins, so a reply holds everything from its first trained token on.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_spans: np.ndarray
    rejected_spans: np.ndarray


@dataclass(frozen=True)
class Sequences:
    """N sequences end to end.

    ids [total tokens] and lengths (int64 [N]) of the sequences; marks (int64 [total marks]) and num_marks (int64 [N]): each
    sequence's spans as begin, end, begin, end, …, counted from its own first token. A pair is one sequence: prompt, chosen,
    rejected; its marks start with the PAIR_MARKS lengths of these three and of its two span lists, which then follow.
    """

    ids: np.ndarray
    lengths: np.ndarray
    marks: np.ndarray
    num_marks: np.ndarray
    is_pairs: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sequence | PairSequence:
        begin, first = self.begins[index], self.mark_begins[index]
        ids = self.ids[begin : begin + self.lengths[index]]
        marks = self.marks[first : first + self.num_marks[index]].astype(np.int32)
        if not self.is_pairs:
            return Sequence(ids, marks.reshape(-1, 2))
        sides = np.split(ids, np.cumsum(marks[:2]))
        spans = np.split(marks[PAIR_MARKS:].reshape(-1, 2), [marks[3] // 2])
        return PairSequence(sides[0], sides[1], sides[2], spans[0], spans[1])

    def __iter__(self) -> Iterator[Sequence | PairSequence]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 [N]: where each sequence's ids begin."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def mark_begins(self) -> np.ndarray:
        """int64 [N]: where each sequence's marks begin."""
        return np.cumsum(self.num_marks) - self.num_marks

    def pair_marks(self) -> np.ndarray:
        """int64 [N, PAIR_MARKS]: the lengths that a pair's marks start with."""
        return self.marks[self.mark_begins[:, None] + np.arange(PAIR_MARKS)]

    def widths(self) -> np.ndarray:
        """int64 [N]: the length that must fit a bucket; of a pair, prompt and longer reply."""
        if not self.is_pairs:
            return self.lengths
        sides = self.pair_marks()
        return sides[:, 0] + sides[:, 1:3].max(axis=1, initial=0)

    def model_lengths(self) -> np.ndarray:
        """int64 [N]: tokens that a model computes; a pair's prompt stands before both of its replies."""
        return self.lengths + self.pair_marks()[:, 0] if self.is_pairs else self.lengths

    @cached_property
    def num_loss(self) -> np.ndarray:
        """int64 [N]: trained tokens of each sequence."""
        heads = PAIR_MARKS if self.is_pairs else 0
        at = np.arange(len(self.marks)) - np.repeat(self.mark_begins, self.num_marks) - heads
        signed = np.where(at % 2 == 1, self.marks, -self.marks)
        signed[at < 0] = 0
        sums = np.concatenate([[0], np.cumsum(signed)])
        ends = np.cumsum(self.num_marks)
        return sums[ends] - sums[ends - self.num_marks]


def flatten(sequences: Items[Sequence | PairSequence]) -> Sequences:
    """Sequences of one kind as flat arrays; an empty list gives no sequences, not marked as pairs."""
    pairs = [s for s in sequences if isinstance(s, PairSequence)]
    if pairs:
        ids = [side for s in pairs for side in (s.prompt, s.chosen, s.rejected)]
        spans = [s.chosen_spans.reshape(-1) for s in pairs] + [s.rejected_spans.reshape(-1) for s in pairs]
        return pair_sequences(
            _joined(ids, np.uint32), _sizes(ids).reshape(-1, 3), _joined(spans, np.int64), _sizes(spans)
        )
    ids = [s.ids for s in sequences if isinstance(s, Sequence)]
    spans = [s.spans.reshape(-1) for s in sequences if isinstance(s, Sequence)]
    return Sequences(_joined(ids, np.uint32), _sizes(ids), _joined(spans, np.int64), _sizes(spans))


def pair_sequences(ids: np.ndarray, sizes: np.ndarray, spans: np.ndarray, num_marks: np.ndarray) -> Sequences:
    """P pairs as flat arrays.

    ids: prompt, chosen, rejected of the first pair, then of the second …; sizes: int64 [P, 3], their lengths. spans: those of
    all chosen replies, then of all rejected ones, begin and end alternating; num_marks: int64 [2P], values of each reply.
    """
    chosen, rejected = num_marks.reshape(2, -1)
    marks_of_pair = PAIR_MARKS + chosen + rejected
    begins = np.cumsum(marks_of_pair) - marks_of_pair
    marks = np.empty(marks_of_pair.sum(), np.int64)
    marks[begins[:, None] + np.arange(PAIR_MARKS)] = np.column_stack([sizes, chosen, rejected])
    places = np.concatenate([begins + PAIR_MARKS, begins + PAIR_MARKS + chosen])
    marks[ranges(places, num_marks)] = spans.reshape(-1)
    return Sequences(ids, sizes.sum(axis=1), marks, marks_of_pair, is_pairs=True)


def join(parts: Items[Sequences]) -> Sequences:
    """Sequences of one kind, the parts end to end."""
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
    """The sequences at the indices `order`, in that order."""
    lengths, num_marks = sequences.lengths[order], sequences.num_marks[order]
    ids = take(sequences.ids, sequences.begins[order], lengths)
    marks = take(sequences.marks, sequences.mark_begins[order], num_marks)
    return Sequences(ids, lengths, marks, num_marks, sequences.is_pairs)


def is_equal(one: Sequences, other: Sequences) -> bool:
    """Whether both hold the same sequences in the same order; the integer type of the ids may differ."""
    names = ("lengths", "num_marks", "marks", "ids")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def take(values: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The slices of `values` that begin at `begins` and have these sizes, end to end."""
    ends = (begins + sizes).tolist()
    pieces = [values[begin:end] for begin, end in zip(begins.tolist(), ends, strict=True)]
    return np.concatenate(pieces) if pieces else values[:0]


def ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64: the indices from each of `begins` on, as many as `sizes` has, end to end."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - (ends - sizes), sizes)


def _joined(arrays: Items[np.ndarray], dtype: np.dtype | type) -> np.ndarray:
    """The arrays end to end; their values must fit the type."""
    return np.concatenate(arrays, dtype=dtype, casting="unsafe") if len(arrays) else np.empty(0, dtype)


def _sizes(arrays: Items[np.ndarray]) -> np.ndarray:
    return np.array([array.size for array in arrays], np.int64)
