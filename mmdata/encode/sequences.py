"""What rows become: ids and trained spans, one by one as objects, or the many of a batch or a part as a few flat arrays.

Nothing here is a Python list of ids. A flat array costs what its values cost; objects are for looking at single rows.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

PAIR_MARKS = 5  # of a pair, before its spans: the lengths of prompt, chosen and rejected, and of the two span lists


@dataclass(frozen=True, slots=True)
class Sequence:
    """ids: uint32 [T]; spans: int32 [n, 2], half-open, ascending, disjoint: the trained tokens."""

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
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


@dataclass(frozen=True, slots=True)
class PairSequence:
    """prompt, chosen, rejected: uint32; spans relative to their own reply. The prompt ends where training begins."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_spans: np.ndarray
    rejected_spans: np.ndarray


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of a row of `num_tokens` (of a pair: prompt once, and both replies); `cut`: reason -> tokens dropped."""

    sequences: tuple[Sequence, ...] | PairSequence
    num_tokens: int
    cut: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Flat:
    """N sequences end to end.

    ids: all ids, `lengths` (int64 [N]) of them each; marks (int64): all spans as begin, end, … from the sequence's own
    first token, `num_marks` (int64 [N]) each. A pair is one sequence: prompt, chosen, rejected; its marks begin with the
    lengths of these three and of its two flat lists of spans, which then follow.
    """

    ids: np.ndarray
    lengths: np.ndarray
    marks: np.ndarray
    num_marks: np.ndarray
    is_pairs: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 [N]: where each sequence's ids begin."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def mark_begins(self) -> np.ndarray:
        return np.cumsum(self.num_marks) - self.num_marks

    def pair_marks(self) -> np.ndarray:
        """int64 [N, 5]: what a pair's marks begin with."""
        return self.marks[self.mark_begins[:, None] + np.arange(PAIR_MARKS)]

    def widths(self) -> np.ndarray:
        """int64 [N]: the length that must fit a bucket; of a pair prompt and longer reply."""
        if not self.is_pairs:
            return self.lengths
        sides = self.pair_marks()
        return sides[:, 0] + sides[:, 1:3].max(axis=1, initial=0)

    def model_lengths(self) -> np.ndarray:
        """int64 [N]: tokens as a model sees them, a pair's prompt before each of its replies."""
        return self.lengths + self.pair_marks()[:, 0] if self.is_pairs else self.lengths

    @cached_property
    def num_loss(self) -> np.ndarray:
        """int64 [N]: the trained tokens."""
        heads = PAIR_MARKS if self.is_pairs else 0
        at = np.arange(len(self.marks)) - np.repeat(self.mark_begins, self.num_marks) - heads
        signed = np.where(at % 2 == 1, self.marks, -self.marks)
        signed[at < 0] = 0
        sums = np.concatenate([[0], np.cumsum(signed)])
        ends = np.cumsum(self.num_marks)
        return sums[ends] - sums[ends - self.num_marks]


def flatten(sequences: Items[Sequence] | Items[PairSequence]) -> Flat:
    """Sequences of one kind as flat arrays; no sequence: an empty Flat of packs."""
    if sequences and isinstance(sequences[0], PairSequence):
        return flatten_pairs([
            (s.prompt, s.chosen, s.rejected, s.chosen_spans.reshape(-1), s.rejected_spans.reshape(-1))
            for s in sequences if isinstance(s, PairSequence)
        ])  # fmt: skip
    ids = [s.ids for s in sequences if isinstance(s, Sequence)]
    spans = [s.spans.reshape(-1) for s in sequences if isinstance(s, Sequence)]
    return Flat(_joined(ids, np.uint32), _sizes(ids), _joined(spans, np.int64), _sizes(spans))


def flatten_pairs(pairs: Items[tuple[np.ndarray, ...]]) -> Flat:
    """pairs: prompt, chosen, rejected, and the spans of chosen and rejected, flat."""
    ids = [array for pair in pairs for array in pair[:3]]
    marks = [np.concatenate([[len(array) for array in pair], *pair[3:]]) for pair in pairs]
    lengths = _sizes(ids).reshape(-1, 3).sum(axis=1)
    return Flat(_joined(ids, np.uint32), lengths, _joined(marks, np.int64), _sizes(marks), is_pairs=True)


def join(flats: Items[Flat]) -> Flat:
    """Flats of one kind end to end."""
    if len(flats) == 1:
        return flats[0]
    is_pairs = any(flat.is_pairs for flat in flats)
    flats = [flat for flat in flats if len(flat)]
    ids = _joined([flat.ids for flat in flats], flats[0].ids.dtype if flats else np.uint32)
    lengths, marks, num_marks = (
        _joined([getattr(flat, name) for flat in flats], np.int64) for name in ("lengths", "marks", "num_marks")
    )
    return Flat(ids, lengths, marks, num_marks, is_pairs)


def reorder(flat: Flat, order: np.ndarray) -> Flat:
    """The sequences `order` names, in that order."""
    lengths, num_marks = flat.lengths[order], flat.num_marks[order]
    ids = take(flat.ids, flat.begins[order], lengths)
    return Flat(ids, lengths, take(flat.marks, flat.mark_begins[order], num_marks), num_marks, flat.is_pairs)


def is_equal(one: Flat, other: Flat) -> bool:
    """Whether both hold the same sequences in the same order; the width of ids is no matter."""
    names = ("lengths", "num_marks", "marks", "ids")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def take(values: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The stretches of `values` that begin there and have these sizes, end to end."""
    ends = (begins + sizes).tolist()
    pieces = [values[begin:end] for begin, end in zip(begins.tolist(), ends, strict=True)]
    return np.concatenate(pieces) if pieces else values[:0]


def _joined(arrays: Items[np.ndarray], dtype: np.dtype | type) -> np.ndarray:
    """End to end; the values are known to fit the type."""
    return np.concatenate(arrays, dtype=dtype, casting="unsafe") if len(arrays) else np.empty(0, dtype)


def _sizes(arrays: Items[np.ndarray]) -> np.ndarray:
    return np.array([array.size for array in arrays], np.int64)
