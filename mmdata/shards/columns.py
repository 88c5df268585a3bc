"""Convert sequences to the columns of a shard and back. The two share no code, so that reading back checks both."""

from collections.abc import Iterator, Sequence

import numpy as np

from mmdata.encode.sequences import PAIR_MARKS, Sequences, pair_sequences, ranges, take
from mmdata.io.arrow import ArrowFile, BatchColumns, Ragged, ragged
from mmdata.shards.manifest import Manifest, PartRecord, ShardRecord


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


# --- checks


LISTS = ("ids", "doc_len", "span", "doc", "prompt", "chosen", "rejected", "chosen_span", "rejected_span")
PACK_COLUMNS = ("ids", "doc_len", "span", "n_loss", "doc")
PAIR_COLUMNS = ("prompt", "chosen", "rejected", "chosen_span", "rejected_span", "n_chosen", "n_rejected", "doc")
SOURCE_COLUMNS = ("file", "line", "offset", "sha", "first")


def shard_problems(file: ArrowFile, manifest: Manifest, shard: ShardRecord, part: PartRecord) -> Iterator[str]:
    """Yield how a shard differs from its record, or from what a shard is: columns, ids, lengths, spans, and counts. It
    ends at a wrong column. Hashes are not compared. part: that of the shard."""
    yield from _check_metadata(file, manifest, shard)
    is_pair = manifest.kind == "pair"
    names = PAIR_COLUMNS if is_pair else PACK_COLUMNS
    yield from (wrong := list(_check_types(file, names, [name for name in LISTS if name != "doc" or not is_pair])))
    if wrong:
        return
    if file.num_rows != shard.samples:
        yield f"holds {file.num_rows:,} samples, expected {shard.samples:,}"
    yield from _check_ids(file, manifest)
    yield from (_check_pairs if is_pair else _check_packs)(file, shard)
    ordinals = file.column("doc") if is_pair else file.column("doc").values
    if len(ordinals) and int(ordinals.max()) >= part.sequences:
        yield f"sequence {ordinals.max():,} is beyond the {part.sequences:,} of its part"


def source_problems(file: ArrowFile, manifest: Manifest, part: PartRecord) -> Iterator[str]:
    """Yield how the file that says where the rows of a part came from differs from what it must be."""
    yield from (wrong := list(_check_types(file, SOURCE_COLUMNS, ())))
    if wrong:
        return
    if file.num_rows != part.kept:
        yield f"names {file.num_rows:,} rows, expected {part.kept:,}"
    first, sha = file.column("first").astype(np.int64), file.column("sha")
    if sha.shape[1] != 8:
        yield "sha is not 8 bytes"
    if file.column("file").max() >= len(manifest.inputs):
        yield f"names input {file.column('file').max()}, there are {len(manifest.inputs)}"
    if first[0] != 0 or first[-1] >= part.sequences or (np.diff(first) < 0).any():
        yield f"first sequences of rows do not ascend from 0 to below {part.sequences:,}"


def _check_metadata(file: ArrowFile, manifest: Manifest, shard: ShardRecord) -> Iterator[str]:
    for key, expected in manifest.shard_metadata(shard.bucket).items():
        if (actual := file.metadata.get(f"mm.{key}")) != expected:
            yield f"{key} is {actual}, expected {expected}"


def _check_types(file: ArrowFile, names: Sequence[str], lists: Sequence[str]) -> Iterator[str]:
    """Yield what is missing: rows, or columns of unsigned numbers of at most 32 bits (`offset`: 64), bytes (`sha`), or
    lists of numbers (`lists`)."""
    if not file.num_rows:
        yield "has no rows"
        return
    for batch in file.batches:
        for name in names:
            column = batch.get(name)
            values = column.values if isinstance(column, Ragged) else column
            if values is None:
                yield f"the column {name} is missing"
            elif (
                isinstance(column, Ragged) != (name in lists)
                or values.ndim != (2 if name == "sha" else 1)
                or values.dtype.kind != "u"
                or values.itemsize > (8 if name == "offset" else 4)
            ):
                yield f"the column {name} is of another type"
            elif isinstance(column, Ragged) and (column.offsets[0] != 0 or column.offsets[-1] != len(column.values)):
                yield f"the lists of the column {name} do not have all of its values"


def _check_ids(file: ArrowFile, manifest: Manifest) -> Iterator[str]:
    """Yield a description for each id column that has a token id outside the vocabulary."""
    vocab_size = manifest.tokenizer.vocab_size
    for name in ("prompt", "chosen", "rejected") if manifest.kind == "pair" else ("ids",):
        values = file.column(name).values
        if len(values) and values.max() >= vocab_size:
            yield f"token {values.max()} in {name} is outside the vocabulary of {vocab_size:,}"


def _check_packs(file: ArrowFile, shard: ShardRecord) -> Iterator[str]:
    """Yield the differences found in a shard of packs: lengths, buckets, spans and counts."""
    ids, doc_len, doc, span = (file.column(name) for name in ("ids", "doc_len", "doc", "span"))
    num_loss = file.column("n_loss").astype(np.int64)
    lengths = ids.lengths()
    if not np.array_equal(_row_sums(doc_len), lengths):
        yield "doc_len does not sum to the ids of its pack"
    if lengths.max() > shard.bucket:
        yield f"a pack of {lengths.max():,} tokens is longer than its bucket"
    if not doc_len.lengths().all():
        yield "a pack has no sequences"
    if not np.array_equal(doc_len.lengths(), doc.lengths()):
        yield "doc and doc_len differ in length"
    if not np.array_equal(_check_spans(span, lengths), num_loss):
        yield "spans are out of place, or do not sum to n_loss"
    elif not _are_inside(span, ids, doc_len):
        yield "a span is in two sequences, or has the first token of one"
    yield from _check_counts(shard, int(lengths.sum()), int(num_loss.sum()), len(doc.values))


def _are_inside(span: Ragged, ids: Ragged, doc_len: Ragged) -> bool:
    """Return whether each span is inside one sequence, without its first token, which no token predicts. The spans must
    be inside their packs."""
    ends = np.cumsum(doc_len.values, dtype=np.int64)
    begins = np.repeat(ids.offsets[:-1].astype(np.int64) - ids.offsets[0], span.lengths())  # of the pack of each value
    at = span.values.astype(np.int64) + begins
    first, last = (np.searchsorted(ends, places, side="right") for places in (at[0::2], at[1::2] - 1))
    return bool(np.array_equal(first, last) and (at[0::2] > (ends - doc_len.values)[first]).all())


def _check_pairs(file: ArrowFile, shard: ShardRecord) -> Iterator[str]:
    """Yield the differences found in a shard of pairs: lengths, buckets, spans and counts."""
    prompt = file.column("prompt").lengths()
    tokens, loss = int(prompt.sum()), 0
    for side in ("chosen", "rejected"):
        lengths, span = file.column(side).lengths(), file.column(f"{side}_span")
        num_loss = file.column(f"n_{side}").astype(np.int64)
        if (prompt + lengths).max() > shard.bucket:
            yield f"prompt and {side} are longer than the bucket"
        expected = np.where(span.lengths() == 0, lengths, _check_spans(span, lengths))
        if not np.array_equal(expected, num_loss):
            yield f"{side}_span is out of place, or does not sum to n_{side}"
        elif not num_loss.all():
            yield f"nothing is trained of a {side} reply"
        elif (_begins_at_0(span) & (prompt == 0)).any():
            yield f"{side}_span has the first token of a reply without a prompt"
        tokens, loss = tokens + int(lengths.sum()), loss + int(num_loss.sum())
    yield from _check_counts(shard, tokens, loss, file.num_rows)


def _begins_at_0(span: Ragged) -> np.ndarray:
    """Return, for each row, whether the first token is trained: bool [rows]. No spans: the whole reply is."""
    is_stored = span.lengths() > 0
    begins = np.zeros(len(is_stored), np.int64)
    begins[is_stored] = span.values[span.offsets[:-1][is_stored]]
    return begins == 0


def _check_counts(shard: ShardRecord, tokens: int, loss_tokens: int, sequences: int) -> Iterator[str]:
    for name, actual in (("tokens", tokens), ("loss_tokens", loss_tokens), ("sequences", sequences)):
        if actual != (expected := getattr(shard, name)):
            yield f"holds {actual:,} {name}, expected {expected:,}"


def _row_sums(column: Ragged) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(column.values, dtype=np.int64)])
    return sums[column.offsets[1:]] - sums[column.offsets[:-1]]


def _check_spans(span: Ragged, lengths: np.ndarray) -> np.ndarray:
    """Return the trained tokens of every row, int64 [rows], or -1 if its spans (begin, end, …) are odd in number, not
    ascending, or outside 0..length. lengths: tokens of each row."""
    values = span.values.astype(np.int64)
    is_end = np.arange(len(values)) % 2 == 1
    totals = _row_sums(Ragged(np.where(is_end, values, -values), span.offsets))
    row = np.repeat(np.arange(len(lengths)), span.lengths())
    is_wrong = values > lengths[row]
    is_wrong[1:] |= (row[1:] == row[:-1]) & np.where(is_end[1:], values[1:] <= values[:-1], values[1:] < values[:-1])
    totals[row[is_wrong]] = -1
    totals[span.lengths() % 2 == 1] = -1
    return totals
