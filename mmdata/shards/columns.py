"""Convert sequences to the columns of a shard and back. The two share no code, so that reading back checks both."""

import numpy as np

from mmdata.encode.sequences import PAIR_MARKS, Sequences, pair_sequences, ranges, take
from mmdata.io.arrow import ArrowFile, BatchColumns, ragged


def columns_of(
    flat: Sequences, ordinals: np.ndarray, sizes: np.ndarray, id_dtype: np.dtype, position_dtype: np.dtype
) -> BatchColumns:
    """Return the columns of a shard by name, see shards/README.md. ordinals: indices in `flat` of the sequences to
    store, sample after sample. sizes: number of sequences of each sample; not used for pairs. id_dtype: for token ids.
    position_dtype: for positions and lengths."""
    if flat.is_pairs:
        return _pair_columns(flat, ordinals, id_dtype, position_dtype)
    return _pack_columns(flat, ordinals, sizes, id_dtype, position_dtype)


def _pack_columns(
    flat: Sequences, ordinals: np.ndarray, sizes: np.ndarray, id_dtype: np.dtype, position_dtype: np.dtype
) -> BatchColumns:
    """Columns of packs. The trained spans are moved from positions in their sequence to positions in the pack."""
    lengths, num_marks = flat.lengths[ordinals], flat.num_marks[ordinals]
    ids = take(flat.ids, flat.begins[ordinals], lengths).astype(id_dtype, copy=False)
    spans = take(flat.marks, flat.mark_begins[ordinals], num_marks)
    pack_begins = np.cumsum(sizes) - sizes
    begins = np.cumsum(lengths) - lengths  # where each sequence begins in the shard; from the next line on, in its pack
    begins -= np.repeat(begins[pack_begins], sizes)
    spans = spans + np.repeat(begins, num_marks)
    return {
        "ids": ragged(ids, np.add.reduceat(lengths, pack_begins)),
        "doc_len": ragged(lengths.astype(position_dtype), sizes),
        "span": ragged(spans.astype(position_dtype), np.add.reduceat(num_marks, pack_begins)),
        "n_loss": np.add.reduceat(flat.num_loss[ordinals], pack_begins).astype(position_dtype),
        "doc": ragged(ordinals.astype(np.uint32), sizes),
    }


def _pair_columns(flat: Sequences, ordinals: np.ndarray, id_dtype: np.dtype, position_dtype: np.dtype) -> BatchColumns:
    """Columns of pairs. A reply whose tokens are all trained is stored with an empty span list."""
    sizes = flat.pair_marks()[ordinals]
    begin, mark = flat.begins[ordinals], flat.mark_begins[ordinals] + PAIR_MARKS
    columns: BatchColumns = {}
    num_loss: BatchColumns = {}
    for of, name in enumerate(("prompt", "chosen", "rejected")):
        columns[name] = ragged(take(flat.ids, begin, sizes[:, of]).astype(id_dtype, copy=False), sizes[:, of])
        begin = begin + sizes[:, of]
    for of, name in enumerate(("chosen", "rejected"), 1):
        num_marks = sizes[:, of + 2]  # never 0: rows with a reply without trained tokens are left out
        spans = take(flat.marks, mark, num_marks)
        first = np.cumsum(num_marks) - num_marks
        is_whole = (num_marks == 2) & (spans[first] == 0) & (spans[first + 1] == sizes[:, of])
        kept = np.where(is_whole, 0, num_marks)
        columns[f"{name}_span"] = ragged(take(spans, first, kept).astype(position_dtype), kept)
        trained = np.where(np.arange(len(spans)) % 2, spans, -spans)
        num_loss[f"n_{name}"] = np.add.reduceat(trained, first).astype(position_dtype)
        mark = mark + num_marks
    return {**columns, **num_loss, "doc": ordinals.astype(np.uint32)}


def read_back(file: ArrowFile, kind: str) -> tuple[np.ndarray, Sequences]:
    """Read the ordinals (numbers in the part) and sequences of a shard, in stored order. kind: the row kind."""
    if kind == "pair":
        return file.column("doc"), _read_pairs(file)
    ids, doc_len, span, doc = (file.column(name) for name in ("ids", "doc_len", "span", "doc"))
    lengths = doc_len.values.astype(np.int64)
    begins = np.cumsum(lengths) - lengths
    spans = span.values.astype(np.int64) + np.repeat(ids.offsets[:-1], span.lengths())  # in positions of the shard
    of_span = np.searchsorted(begins, spans[0::2], side="right") - 1  # the sequence each span lies in
    num_marks = 2 * np.bincount(of_span, minlength=len(lengths))
    return doc.values, Sequences(ids.values, lengths, spans - np.repeat(begins[of_span], 2), num_marks)


def _read_pairs(file: ArrowFile) -> Sequences:
    """Read the pairs of a shard, in stored order. An empty span list is read as one span over the whole reply."""
    sides = [file.column(name) for name in ("prompt", "chosen", "rejected")]
    sizes = np.stack([side.lengths() for side in sides], axis=1).astype(np.int64)
    before = np.cumsum([0, *(len(side.values) for side in sides[:-1])])  # where each column begins when all are joined
    begins = np.cumsum(sizes, axis=0) - sizes + before
    ids = take(np.concatenate([side.values for side in sides]), begins.reshape(-1), sizes.reshape(-1))
    spans = [file.column(f"{name}_span") for name in ("chosen", "rejected")]
    stored = np.concatenate([column.lengths() for column in spans]).astype(np.int64)
    num_marks = np.where(stored, stored, 2)
    ends = np.cumsum(num_marks)
    marks = np.zeros(num_marks.sum(), np.int64)
    marks[ends - 1] = np.concatenate([sizes[:, 1], sizes[:, 2]])
    marks[ranges(ends - num_marks, stored)] = np.concatenate([column.values for column in spans])
    return pair_sequences(ids, sizes, marks, num_marks)
