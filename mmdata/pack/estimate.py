"""Estimates from a sample of the rows, before packing: `mm pack --plan`, and the options that follow from the data.

`estimate` foresees time, disk space, tokens, padding and rows cut for several length limits; `survey` the number of
rows and their lengths, from which `max_len_for` and `val_fraction_for` choose. Nothing is written.

About one row in a hundred is read, in blocks spread evenly over each file, and encoded as packing would. Counts are
multiplied by the ratio of all bytes to the bytes read. Padding is estimated by packing the lengths of the sampled rows,
repeated up to the size of a part; the time from that of encoding the sample. Of a compressed file only the beginning is
read, and its decompressed size is taken to be `COMPRESSION` times its size on disk.
"""

import math
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from mmdata.encode.encoder import EncodedRows, RowEncoder
from mmdata.encode.rows import BadRow, Columns, parse_row
from mmdata.errors import InputError
from mmdata.io.lines import JSONL, TABLE, Line, format_of, iter_lines
from mmdata.io.options import ReadOptions
from mmdata.io.tables import num_rows
from mmdata.options import check
from mmdata.pack.inputs import common_kind
from mmdata.pack.options import PART_BYTES, PackOptions, packing_tokenizer
from mmdata.pack.packing import buckets_for, pack
from mmdata.pack.pipeline import COMPRESSION, arguments_of
from mmdata.shards import dataset
from mmdata.tokenizer.encoders import choose
from mmdata.tokenizer.tokenizer import Tokenizer

ROWS_PER_CALL = 1000
MAX_LENS = (512, 1024, 2048)
SHARE = 0.01  # share of an input's bytes to read
LEAST_BYTES, BLOCK_BYTES = 4 * 2**20, 128 * 2**10  # read at least LEAST_BYTES, in blocks of BLOCK_BYTES
MOST_BYTES = 64 * 2**20
UNCUT = 2**20  # a length limit in tokens that cuts no row
KEPT_SHARE = 0.995  # of the tokens, which a chosen --max-len keeps uncut
VAL_FRACTION, SMALL_VAL_FRACTION, MOST_VAL_FRACTION = 0.01, 0.02, 0.2  # chosen for large and small data; the largest
LEAST_VAL_ROWS = 50  # small data has fewer rows than give this many with VAL_FRACTION
PROVE_SHARE = 0.25  # time of hashing, writing and reading back, as a share of the encoding time (measured)
START_S = 1.5  # start of worker processes: imports, loading and checking the encoder (measured)
SCAN_RATE = 0.9e9  # bytes a second at which an input is hashed (measured)
SOURCE_BYTES = 26  # bytes a row in the sources file


@dataclass(frozen=True, slots=True)
class Outlook:
    """Estimates for one --max-len. padding: share of positions without a token, 0 to 1. samples: packs or pairs.
    batch_tokens, steps_per_epoch: tokens of a step, steps of an epoch; None if not asked for."""

    max_len: int
    tokens: int
    loss_tokens: int
    cut_tokens: int
    rows_cut: int  # conversations that lose turns, and documents divided into several sequences
    rows_too_long: int  # rows left out because they are longer than max_len
    samples: int
    padding: float
    disk_bytes: int
    seconds: float
    steps_per_epoch: int | None
    batch_tokens: int | None = None
    unknown_share: float = 0.0  # of the bytes of the texts, which the tokenizer does not know


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimates for packing some inputs. bytes: their decompressed size. The numbers of rows are
    estimated, too.
    """

    inputs: list[str]
    kind: str
    encoder: str
    workers: int
    bytes: int
    read_bytes: int
    rows: int
    rows_not_selected: int  # for which `where` does not hold
    rows_left_out: int  # that are not valid rows, whatever the length limit is
    outlooks: list[Outlook]
    batch_tokens: int | None


@dataclass(frozen=True, slots=True)
class _Sample:
    """The lines read from one input, without those that `where` leaves out."""

    path: Path
    lines: list[Line]
    num_bad: int  # lines that are not valid rows of the inputs' row kind
    read_bytes: int
    total_bytes: int
    cpu_s: float  # processor time spent reading
    num_not_selected: int = 0

    def encoded(self, encoder: RowEncoder, kind: str) -> list[EncodedRows]:
        """Encode the lines, ROWS_PER_CALL at a time."""
        raws = [line.raw for line in self.lines]
        return [encoder.encode_lines(raws[i : i + ROWS_PER_CALL], kind) for i in range(0, len(raws), ROWS_PER_CALL)]

    @property
    def factor(self) -> float:
        return self.total_bytes / max(1, self.read_bytes)


@dataclass(frozen=True, slots=True)
class Survey:
    """The sizes of some inputs, from at most LEAST_BYTES of each. rows: estimated number. lengths: int64 [N], tokens of
    each document, conversation or longer side of a pair in the sample, uncut, ascending. weights: float64 [N], how many
    rows of the inputs each stands for."""

    rows: int
    lengths: np.ndarray
    weights: np.ndarray

    def kept(self, max_len: int) -> float:
        """Return the share of the tokens, 0 to 1, in rows of at most `max_len` tokens; 1 without rows."""
        tokens = self.lengths * self.weights
        return float(tokens[self.lengths <= max_len].sum() / tokens.sum()) if len(tokens) else 1.0

    def quantile(self, share: float) -> int:
        """Return a length, a multiple of 64, that at least the given share of the rows do not exceed."""
        reached = np.cumsum(self.weights) / self.weights.sum()
        return -(-int(self.lengths[np.searchsorted(reached, share - 1e-9)]) // 64) * 64


def survey(inputs: Sequence[Path], options: PackOptions) -> Survey:
    """Return the sizes of the inputs' rows for which `where` holds. Raises the errors of `estimate`, but none if no row
    can be used.
    """
    kind = common_kind(inputs, options.reading)
    tokenizer, changes = packing_tokenizer(options, kind)
    takes = RowEncoder(
        tokenizer, max_len=UNCUT, era=options.era, train_on=options.train_on, seed=options.seed, on_lost=options.on_lost,
        columns=Columns.parse(options.mapping), encoder=choose(tokenizer, options.encoder),
    )  # fmt: skip
    samples = _selected([_read(path, kind, options.reading, LEAST_BYTES) for path in inputs], kind, options, changes)
    lengths, weights = [np.empty(0, np.int64)], [np.empty(0)]
    for sample in samples:
        lengths += [rows.sequences.widths() for rows in sample.encoded(takes, kind)]
        weights += [np.full(len(each), sample.factor) for each in lengths[len(weights) :]]
    every = np.concatenate(lengths)
    order = np.argsort(every, kind="stable")
    rows = round(sum((len(sample.lines) - sample.num_bad) * sample.factor for sample in samples))
    return Survey(rows, every[order], np.concatenate(weights)[order])


def max_len_for(found: Survey) -> int:
    """Return the smallest of MAX_LENS that keeps KEPT_SHARE of the tokens in uncut rows, or the largest of them."""
    return next((max_len for max_len in MAX_LENS if found.kept(max_len) >= KEPT_SHARE), MAX_LENS[-1])


def val_fraction_for(num_rows: int) -> float:
    """Return the share of rows to hold out: VAL_FRACTION; of small data LEAST_VAL_ROWS or SMALL_VAL_FRACTION, whichever
    is more, but at most MOST_VAL_FRACTION."""
    if num_rows * VAL_FRACTION >= LEAST_VAL_ROWS:
        return VAL_FRACTION
    return round(min(max(LEAST_VAL_ROWS / max(1, num_rows), SMALL_VAL_FRACTION), MOST_VAL_FRACTION), 3)


def estimate(
    inputs: Sequence[Path],
    options: PackOptions,
    *,
    max_lens: Sequence[int] = MAX_LENS,
    batch_tokens: Callable[[int, int], int] | None = None,
) -> Estimate:
    """Estimate, from about 1 % of the inputs, what `pack` would give for each of `max_lens`. Rows that `dedup` and
    `exclude` would leave out are counted as packed. batch_tokens: returns the tokens of a training step over all ranks
    for the tokens of an epoch and max_len; None: no steps are estimated. Raises InputError if a file does not exist or no sampled
    row can be used, and the errors of `pack` for invalid options or tokenizers."""
    check(options)
    kind, workers = common_kind(inputs, options.reading), options.workers or 1
    tokenizer, changes = packing_tokenizer(options, kind)
    chosen = choose(tokenizer, options.encoder)
    read = [_read(path, kind, options.reading) for path in inputs]
    samples = _selected(read, kind, options, changes)
    found = []
    for max_len in max_lens:
        takes = RowEncoder(
            tokenizer, max_len=max_len, era=options.era, train_on=options.train_on, seed=options.seed,
            on_lost=options.on_lost, columns=Columns.parse(options.mapping), encoder=chosen,
        )  # fmt: skip
        found.append(_outlook(samples, kind, takes, workers, options.val_fraction, batch_tokens))
    if not found[-1].tokens:
        command = shlex.join(["mm", "validate", str(inputs[0]), *options.flags, "--tokenizer", str(options.tokenizer)])
        raise InputError(f"{inputs[0]}: no row of the sample can be used", f"`{command}` lists the reasons")
    return Estimate(
        inputs=[str(path) for path in inputs],
        kind=kind,
        encoder=f"{chosen.name} {chosen.version}",
        workers=workers,
        bytes=sum(sample.total_bytes for sample in samples),
        read_bytes=sum(sample.read_bytes for sample in samples),
        rows=round(sum(len(sample.lines) * sample.factor for sample in read)),
        rows_not_selected=round(sum(one.num_not_selected * one.factor for one in samples)),
        rows_left_out=round(sum(sample.num_bad * sample.factor for sample in samples)),
        outlooks=found,
        batch_tokens=max((outlook.batch_tokens or 0 for outlook in found), default=0) or None,
    )


# --- reading


def _read(path: Path, kind: str, read: ReadOptions, most_bytes: int = MOST_BYTES) -> _Sample:
    """Read a sample of an input's lines, about `most_bytes` at most, and count those that are no rows of this kind."""
    start = time.process_time()
    lines, num_read, total = _lines_of(path, read, most_bytes)
    spent = time.process_time() - start
    num_bad, columns = 0, Columns.parse(read.mapping)
    for line in lines:
        try:
            parse_row(line.raw, kind, columns=columns)
        except BadRow:
            num_bad += 1
    return _Sample(path, lines, num_bad, num_read, total, spent)


def _selected(samples: list[_Sample], kind: str, options: PackOptions, changes: Mapping[str, str]) -> list[_Sample]:
    """Return the samples without the rows for which `options.where` does not hold, as if there were no other rows. Of a
    large file, line numbers are those in the blocks that were read. changes: of the tokenizer, by `packing_tokenizer`.
    """
    if options.where is None:
        return samples
    from mmdata.pack.filter.screen import lines_kept  # with polars, which takes a moment to load

    arguments = msgspec.structs.replace(arguments_of(options), **changes)
    kept = lines_kept([(sample.path, sample.lines) for sample in samples], kind, options.tokenizer, arguments)
    return [
        replace(sample, lines=lines, num_not_selected=len(sample.lines) - len(lines))
        for sample, lines in zip(samples, kept, strict=True)
    ]


def _lines_of(path: Path, read: ReadOptions, most_bytes: int) -> tuple[list[Line], int, int]:
    """Return lines from all over a jsonl file, the bytes read, and its decompressed size. Small files are read whole;
    of other formats and compressed files only the beginning is, and the size is estimated."""
    size, form = path.stat().st_size, format_of(path, read)
    wanted = min(max(LEAST_BYTES, int(SHARE * size)), most_bytes)
    if form.kind != JSONL or not form.is_plain:
        lines = _take(iter_lines(path, options=read), wanted)
        num_read = _bytes_of(lines)
        if num_read < wanted:  # read to the end
            return lines, num_read, num_read
        if form.kind == TABLE:
            return lines, num_read, num_read * num_rows(path) // max(len(lines), 1)
        return lines, num_read, size * COMPRESSION if form.is_packed else size
    if wanted >= size:
        return list(iter_lines(path)), size, size
    num_blocks = -(-wanted // BLOCK_BYTES)
    lines = []
    with path.open("rb") as file:
        for block in range(num_blocks):
            file.seek(block * (size - BLOCK_BYTES) // max(1, num_blocks - 1))
            if file.tell():
                file.readline()  # skip the rest of a line that begins before the block
            if file.tell() < size:
                lines += _take(iter_lines(path, file.tell(), size), BLOCK_BYTES)
    return lines, _bytes_of(lines), size


def _take(lines: Iterable[Line], num_bytes: int) -> list[Line]:
    """Return the first lines, up to about `num_bytes` bytes."""
    taken: list[Line] = []
    for line in lines:
        taken.append(line)
        num_bytes -= len(line.raw) + 1
        if num_bytes <= 0:
            break
    return taken


def _bytes_of(lines: Sequence[Line]) -> int:
    return sum(len(line.raw) + 1 for line in lines)


# --- what becomes of the sample, and so of the whole


def _outlook(
    samples: Sequence[_Sample],
    kind: str,
    encoder: RowEncoder,
    workers: int,
    val_fraction: float,
    batch_tokens: Callable[[int, int], int] | None,
) -> Outlook:
    """Encode the sampled rows with `encoder`, which has a length limit, and return the estimates for the whole inputs."""
    max_len, tokenizer = encoder.max_len, encoder.tokenizer
    sums: dict[str, float] = defaultdict(float)
    widths: list[np.ndarray] = []
    cpu_s = 0.0
    for sample in samples:
        _ = encoder.encode_lines([line.raw for line in sample.lines[:1]], kind)  # not timed: prepares the template
        start = time.process_time()
        batches = sample.encoded(encoder, kind)
        cpu_s += (sample.cpu_s + (time.process_time() - start)) * sample.factor
        widths += [
            np.resize(batch.sequences.widths(), _scaled(len(batch.sequences), sample, samples)) for batch in batches
        ]
        for batch in batches:
            for name, count in _counts(batch, max_len).items():
                sums[name] += count * sample.factor
    lengths = np.concatenate([np.empty(0, np.int64), *widths])
    positions, num_samples = _positions(lengths, buckets_for(max_len), kind == "pair")
    model_tokens = sums["model_tokens"]
    scale = sums["width"] / max(1, int(lengths.sum()))
    total = sum(sample.total_bytes for sample in samples)
    train_tokens = model_tokens * (1 - val_fraction)
    step_tokens = batch_tokens(round(train_tokens), max_len) if batch_tokens else None
    return Outlook(
        max_len=max_len,
        tokens=round(sums["tokens"]),
        loss_tokens=round(sums["loss_tokens"]),
        cut_tokens=round(sums["cut_tokens"]),
        rows_cut=round(sums["rows_cut"]),
        rows_too_long=round(sums["rows_too_long"]),
        samples=round(num_samples * scale),
        padding=1 - model_tokens / scale / max(1, positions) if model_tokens else 0.0,
        disk_bytes=round(_disk(sums, num_samples * scale, tokenizer, max_len)),
        seconds=START_S + total / SCAN_RATE + cpu_s * (1 + PROVE_SHARE) / workers,
        steps_per_epoch=math.ceil(train_tokens / step_tokens) if step_tokens else None,
        batch_tokens=step_tokens,
        unknown_share=sums["unknown_bytes"] / max(1, sums["text_bytes"]),
    )


def _scaled(count: int, sample: _Sample, samples: Sequence[_Sample]) -> int:
    """Return how many lengths to pack for `count` sampled sequences, so that all inputs in proportion make up one part."""
    total = sum(other.total_bytes for other in samples)
    return round(count * sample.factor * min(1.0, PART_BYTES / total))


def _counts(batch: EncodedRows, max_len: int) -> dict[str, int]:
    flat = batch.sequences
    row_of = np.repeat(np.arange(len(batch.num_sequences)), batch.num_sequences)
    is_split = (flat.lengths == max_len) & (batch.num_sequences[row_of] > 1)
    too_long = sum(bad.reason == "too long" for bad in batch.bad.values())
    return {
        "rows": int((batch.num_sequences > 0).sum()),
        "sequences": len(flat),
        "marks": len(flat.marks),
        "tokens": int(flat.lengths.sum()),
        "model_tokens": int(flat.model_lengths().sum()),
        "loss_tokens": int(flat.num_loss.sum()),
        "width": int(flat.widths().sum()),
        "cut_tokens": batch.cut.total(),
        "rows_cut": batch.rows_cut + len(np.unique(row_of[is_split])),
        "rows_too_long": too_long,
        "text_bytes": batch.text_bytes,
        "unknown_bytes": batch.unknown_bytes,
    }


def _positions(lengths: np.ndarray, buckets: tuple[int, ...], is_pairs: bool) -> tuple[int, int]:
    """Return the positions (with padding) and the number of samples of sequences of these lengths when packed.
    is_pairs: lengths are of pairs' longer sides, and a pair takes up a bucket for each side."""
    if is_pairs:
        found = np.array(buckets)[np.searchsorted(buckets, lengths)]
        return 2 * int(found.sum()), len(lengths)
    packs = pack(lengths, buckets)
    return int(packs.buckets.sum()), len(packs)


def _disk(sums: Mapping[str, float], num_samples: float, tokenizer: Tokenizer, max_len: int) -> float:
    """Estimate the bytes of shards and sources from the widths of their columns (shards/README.md). sums: as `_counts`."""
    id_bytes = dataset.id_dtype(tokenizer.vocab_size).itemsize
    position = dataset.position_dtype(max_len).itemsize
    lists = 4 * 5 * num_samples  # offsets of up to five list columns
    per_sequence = (position + 4) * sums["sequences"]
    return sums["tokens"] * id_bytes + sums["marks"] * position + lists + per_sequence + sums["rows"] * SOURCE_BYTES
