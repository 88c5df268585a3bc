"""`mm pack --plan`: estimates of time, disk, tokens, padding and rows cut for several length limits. Writes nothing.

About one row in a hundred is read, in blocks spread evenly over each file, and encoded as packing would. Counts scale with
the bytes; padding is that of the sampled lengths, repeated up to a part's worth and packed; the rate is the sample's own.
A compressed file cannot be entered in its middle: its beginning is read, and its size after decompression is taken to be
`COMPRESSION` times what it takes on disk.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmdata.encode.encoder import EncodedRows, RowEncoder
from mmdata.encode.rows import BadRow, Line, is_seekable, iter_lines, parse_row
from mmdata.errors import InputError
from mmdata.options import check
from mmdata.pack.options import PART_BYTES, PackOptions
from mmdata.pack.packing import buckets_for, pack
from mmdata.pack.pipeline import COMPRESSION, common_kind
from mmdata.shards import dataset
from mmdata.tokenizer.encoders import choose
from mmdata.tokenizer.tokenizer import Tokenizer

ROWS_PER_CALL = 1000
MAX_LENS = (512, 1024, 2048)
SHARE = 0.01  # of the bytes, to be read
LEAST_BYTES, BLOCK_BYTES = 4 * 2**20, 128 * 2**10  # read at least so much, in blocks of this size
MOST_BYTES = 64 * 2**20
PROVE_SHARE = 0.25  # of the encoding time: what packing adds by hashing, writing and reading back (measured)
START_S = 1.5  # of worker processes: importing, loading and checking the encoder (measured)
SCAN_RATE = 0.9e9  # bytes a second of hashing an input (measured)
SOURCE_BYTES = 26  # of a row's record of where it came from


@dataclass(frozen=True, slots=True)
class Outlook:
    """What packing with one --max-len would give. `padding`: the share of positions without a token."""

    max_len: int
    tokens: int
    loss_tokens: int
    cut_tokens: int
    rows_cut: int  # conversations that lose turns, documents that go on in a further sequence
    rows_too_long: int  # left out
    samples: int
    padding: float
    disk_bytes: int
    seconds: float
    steps_per_epoch: int | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """rows and bad rows are estimates too; `read_bytes` of `bytes` were looked at."""

    inputs: list[str]
    kind: str
    encoder: str
    workers: int
    bytes: int
    read_bytes: int
    rows: int
    rows_left_out: int  # whatever the length limit
    outlooks: list[Outlook]
    batch_tokens: int | None


@dataclass(frozen=True, slots=True)
class _Sample:
    """What was read of an input, and how much larger the whole is."""

    raws: list[bytes]
    num_bad: int  # lines that are no rows of this kind
    read_bytes: int
    total_bytes: int
    cpu_s: float  # of reading

    @property
    def factor(self) -> float:
        return self.total_bytes / max(1, self.read_bytes)


def estimate(
    inputs: Sequence[Path],
    options: PackOptions,
    *,
    max_lens: Sequence[int] = MAX_LENS,
    batch_tokens: int | None = None,
) -> Estimate:
    """Estimate what `pack` would give for each of `max_lens`, from about 1 % of the inputs; rows that `dedup` and `exclude`
    would leave out are counted as kept. batch_tokens: tokens of a training step, for the number of steps of an epoch.

    InputError: no such file, or no row of the sample can be used; other errors as `pipeline.pack`.
    """
    check(options)
    assert options.tokenizer, "PackOptions.tokenizer is required"
    kind, workers = common_kind(inputs), options.workers or 1
    tokenizer = Tokenizer.load(options.tokenizer)
    chosen = choose(tokenizer, options.encoder)
    samples = [_read(path, kind) for path in inputs]
    found = []
    for max_len in max_lens:
        takes = RowEncoder(
            tokenizer, max_len=max_len, era=options.era, train_on=options.train_on, seed=options.seed, encoder=chosen
        )
        found.append(_outlook(samples, kind, takes, workers, options.val_fraction, batch_tokens))
    if not found[-1].tokens:
        raise InputError(
            f"{inputs[0]}: no row of the sample can be used", f"`mm validate {inputs[0]}` lists the reasons"
        )
    return Estimate(
        inputs=[str(path) for path in inputs],
        kind=kind,
        encoder=f"{chosen.name} {chosen.version}",
        workers=workers,
        bytes=sum(sample.total_bytes for sample in samples),
        read_bytes=sum(sample.read_bytes for sample in samples),
        rows=round(sum(len(sample.raws) * sample.factor for sample in samples)),
        rows_left_out=round(sum(sample.num_bad * sample.factor for sample in samples)),
        outlooks=found,
        batch_tokens=batch_tokens,
    )


# --- reading


def _read(path: Path, kind: str) -> _Sample:
    start = time.process_time()
    lines, read, total = _lines_of(path)
    raws = [line.raw for line in lines]
    spent = time.process_time() - start
    num_bad = 0
    for raw in raws:
        try:
            parse_row(raw, kind)
        except BadRow:
            num_bad += 1
    return _Sample(raws, num_bad, read, total, spent)


def _lines_of(path: Path) -> tuple[list[Line], int, int]:
    """Lines from all over a file, their bytes, and those of the whole file (decompressed)."""
    size = path.stat().st_size
    wanted = min(max(LEAST_BYTES, int(SHARE * size)), MOST_BYTES)
    if not is_seekable(path):
        lines = _take(iter_lines(path), wanted)
        return lines, _bytes_of(lines), size * COMPRESSION
    if wanted >= size:
        return list(iter_lines(path)), size, size
    num_blocks = -(-wanted // BLOCK_BYTES)
    lines = []
    with path.open("rb") as file:
        for block in range(num_blocks):
            file.seek(block * (size - BLOCK_BYTES) // max(1, num_blocks - 1))
            if file.tell():
                file.readline()  # the rest of a line that begins before
            if file.tell() < size:
                lines += _take(iter_lines(path, file.tell(), size), BLOCK_BYTES)
    return lines, _bytes_of(lines), size


def _take(lines: Iterable[Line], num_bytes: int) -> list[Line]:
    """The first lines, up to about this many bytes."""
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
    batch_tokens: int | None,
) -> Outlook:
    max_len, tokenizer = encoder.max_len, encoder.tokenizer
    sums: dict[str, float] = defaultdict(float)
    widths: list[np.ndarray] = []
    cpu_s = 0.0
    for sample in samples:
        _ = encoder.encode_lines(sample.raws[:1], kind)  # compiles and learns the template
        start = time.process_time()
        batches = [
            encoder.encode_lines(sample.raws[i : i + ROWS_PER_CALL], kind)
            for i in range(0, len(sample.raws), ROWS_PER_CALL)
        ]
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
        steps_per_epoch=math.ceil(train_tokens / batch_tokens) if batch_tokens else None,
    )


def _scaled(count: int, sample: _Sample, samples: Sequence[_Sample]) -> int:
    """How often the lengths of `count` sequences are repeated for a part's worth of packing, in each input's share."""
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
    }


def _positions(lengths: np.ndarray, buckets: tuple[int, ...], is_pairs: bool) -> tuple[int, int]:
    """Positions that samples of these lengths take up, and how many samples."""
    if is_pairs:
        found = np.array(buckets)[np.searchsorted(buckets, lengths)]
        return 2 * int(found.sum()), len(lengths)
    packs = pack(lengths, buckets)
    return int(packs.buckets.sum()), len(packs)


def _disk(sums: Mapping[str, float], num_samples: float, tokenizer: Tokenizer, max_len: int) -> float:
    """Bytes of shards and sources, from the widths of their columns (shards/README.md)."""
    id_bytes = dataset.id_dtype(tokenizer.vocab_size).itemsize
    position = dataset.position_dtype(max_len).itemsize
    lists = 4 * 5 * num_samples  # offsets of up to five list columns
    per_sequence = (position + 4) * sums["sequences"]
    return sums["tokens"] * id_bytes + sums["marks"] * position + lists + per_sequence + sums["rows"] * SOURCE_BYTES
