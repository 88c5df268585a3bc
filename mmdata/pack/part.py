"""Pack one part of an input: write its shards, its sources and the rows left out, and check that nothing was lost.

The files depend only on the part's bytes and the settings. Memory is bounded by the size of the part.
"""

import base64
import gc
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from mmdata.encode.encoder import DEFAULT_ON_LOST, EncodedRows, RowEncoder
from mmdata.encode.rows import LOST, REASONS, BadRow, Columns, asked_for, explain
from mmdata.encode.sequences import Sequences, is_equal, join, reorder
from mmdata.errors import DatasetError, InputError
from mmdata.io.arrow import read_arrow, write_arrow
from mmdata.io.files import write_bytes
from mmdata.io.lines import Line, iter_lines, place_of
from mmdata.io.options import DEFAULT_READING, ReadOptions
from mmdata.io.records import Count, FileEntry, decode_record, plain, read_record
from mmdata.io.workers import Tick
from mmdata.pack.packing import pack
from mmdata.shards import dataset
from mmdata.shards.columns import columns_of, read_back
from mmdata.shards.manifest import FORMAT_VERSION, SPLITS, DatasetHeader, ShardRecord, folder_of, part_path
from mmdata.tokenizer.encoders import REFERENCE, Encoder, choose
from mmdata.tokenizer.tokenizer import Tokenizer

BATCH_BYTES = 2**20  # of jsonl that is encoded in one call: some hundred rows, under a second
COMPARED_FIRST, COMPARED = 16, 2  # rows encoded twice for comparison: in a part's first batch, in others
GC_OBJECTS = 200_000  # garbage-collector threshold while packing; the default costs 10 % of the time
LEFT_OUT = "left_out.json"  # see `screen_path`
TOO_LONG = "too long"  # the reason why a valid row is left out that is longer than --max-len


@dataclass(frozen=True, slots=True)
class Part:
    """A range of one input file that is packed on its own. number: counts through all inputs. input: index of the file.
    begin, end: byte offsets of rows, or in a table numbers of rows from 0; end is None for a file that is one part and
    read from the beginning, such as a compressed one. first_line: number of the first row. num_bytes: of the range,
    or of a compressed file on disk. read: how the file is read."""

    number: int
    input: int
    path: Path
    begin: int
    end: int | None
    first_line: int
    num_bytes: int
    read: ReadOptions = DEFAULT_READING
    is_table: bool = False

    def bytes_done(self, line: Line) -> int:
        """Return how many of `num_bytes` are done when `line` is the last one that was read; 0 if `end` is None."""
        if self.end is None:
            return 0
        if self.is_table:
            return self.num_bytes * (line.number - self.first_line + 1) // (self.end - self.begin)
        return min(line.offset + len(line.raw) - self.begin, self.num_bytes)


@dataclass(frozen=True, slots=True)
class PartSettings:
    """Everything besides a part's bytes that its shards depend on, and `encoder` (--encoder), on which no byte depends."""

    dir: Path  # the dataset being written
    tokenizer_dir: Path
    header: DatasetHeader
    encoder: str = "auto"

    @property
    def screen_dir(self) -> Path:
        """The directory to which `dedup.screen` writes the lines to leave out."""
        return self.dir.with_name("screen")


class PartResult(msgspec.Struct):
    """The files and counts of a packed part: rows = kept + left out, tokens in = tokens + cut; `left_out` and `cut` are
    by reason. characters: of the content kept. control_strings, extra_keys, not_written, text_bytes, unknown_bytes: as
    in `DatasetTotals`. lengths: uint32 [N, 2] as bytes, each length of sequences (of a pair: prompt and longer
    reply) and their number. digest: `sequence_digest`."""

    number: Count
    rows: Count = 0
    kept: Count = 0
    left_out: Counter[str] = msgspec.field(default_factory=Counter)
    tokens_in: Count = 0
    tokens: Count = 0
    cut: Counter[str] = msgspec.field(default_factory=Counter)
    characters: Count = 0
    control_strings: Counter[str] = msgspec.field(default_factory=Counter)
    not_written: Counter[str] = msgspec.field(default_factory=Counter)
    text_bytes: Count = 0
    unknown_bytes: Count = 0
    extra_keys: Counter[str] = msgspec.field(default_factory=Counter)
    sequences: Count = 0
    lengths: bytes = b""
    digest: Annotated[int, msgspec.Meta(ge=0)] = 0
    shards: list[ShardRecord] = []
    files: list[FileEntry] = []
    encoder: str = ""  # name and version
    compared: Count = 0  # rows that were also encoded the slow way: rendered by jinja2, one by one with tokenizers
    unused_columns: list[str] = []  # `Columns.unused` of the rows that were read
    host: str = ""  # that wrote the files
    warning: str = ""  # why an installed fast encoder was not used; otherwise empty

    @property
    def all_files(self) -> list[FileEntry]:
        """All files of the part."""
        return [*(shard.file for shard in self.shards), *self.files]


class RejectedRow(msgspec.Struct, omit_defaults=True):
    """A line of rejected/part-N.jsonl: a row left out. line, offset: its line and byte offset in the input. raw: the
    line as text. raw_base64: its bytes, if they are not valid UTF-8."""

    file: str
    line: int
    offset: int
    reason: str
    detail: str
    raw: str
    raw_base64: str | None = None


@dataclass(slots=True)
class _Collected:
    """The encoded rows of a part before packing, in source order. flats, num_sequences, is_val: an item for each batch
    of lines. lines, offsets, shas: one for each row not left out."""

    flats: list[Sequences] = field(default_factory=list)  # the encoded sequences
    num_sequences: list[np.ndarray] = field(default_factory=list)  # int64, for each row not left out
    is_val: list[np.ndarray] = field(default_factory=list)  # bool, for each row not left out
    lines: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    shas: list[bytes] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)

    def rows(self) -> "_Rows":
        counts = np.concatenate([np.empty(0, np.int64), *self.num_sequences])
        is_val = np.concatenate([np.empty(0, bool), *self.is_val])
        first = np.cumsum(counts) - counts
        is_first = np.zeros(counts.sum(), bool)
        is_first[first] = True
        return _Rows(join(self.flats), np.repeat(is_val, counts), is_first, first)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The sequences of a part in source order. is_val, is_first: bool [sequences], whether the row of a sequence
    belongs to val, and whether it is its row's first."""

    flat: Sequences
    is_val: np.ndarray
    is_first: np.ndarray
    first: np.ndarray  # int64 [rows], index of the first sequence of each row


class _DiffersError(Exception):
    """The fast encoder encoded a row to other tokens than the reference encoder."""


def _no_tick(*counts: int) -> None:
    """Does nothing: the progress of a part that is packed a second time was reported the first time."""


class PartPacker:
    """Packs parts with the same settings. Creating it loads the tokenizer and the encoder, which all parts use."""

    def __init__(self, settings: PartSettings):
        self._settings, self._header, self._arguments = settings, settings.header, settings.header.arguments
        self._tokenizer = self._arguments.amend(Tokenizer.load(settings.tokenizer_dir))
        encoder = choose(self._tokenizer, settings.encoder)
        self._warning = encoder.warning
        self._fast = self._row_encoder(encoder)
        self._reference = self._row_encoder(choose(self._tokenizer, REFERENCE), is_reference=True)

    def _row_encoder(self, encoder: Encoder, *, is_reference: bool = False) -> RowEncoder:
        """Return a RowEncoder with this dataset's settings. is_reference: use the slow way for everything else, too."""
        return RowEncoder(
            self._tokenizer,
            max_len=self._header.max_len,
            era=self._arguments.era,
            train_on=self._arguments.train_on,
            seed=self._arguments.seed,
            on_lost=self._arguments.on_lost or DEFAULT_ON_LOST,
            columns=self._arguments.columns,
            encoder=encoder,
            is_reference=is_reference,
        )

    def __call__(self, part: Part, tick: Tick) -> PartResult:
        """Read, encode, pack and write a part, check the written files, and return its files and counts. tick: called
        with the bytes, rows, tokens and rows left out since its last call. Raises InputError for a bad row if `on_bad`
        is "fail" or if the input cannot be read, and DatasetError if the check fails."""
        before = gc.get_threshold()
        gc.set_threshold(GC_OBJECTS, *before[1:])
        try:
            return self._pack(part, tick)
        finally:
            gc.set_threshold(*before)

    def _pack(self, part: Part, tick: Tick) -> PartResult:
        """Pack a part, with the reference encoder and a warning if the fast one differs from it for a compared row."""
        try:
            result = PartResult(part.number, warning=self._warning)
            collected = self._collect(part, result, tick, self._fast)
        except _DiffersError as error:
            result = PartResult(part.number, warning=f"{part.path} line {error}; this part is packed the slow way")
            collected = self._collect(part, result, _no_tick, self._reference)
        rows = collected.rows()
        result.unused_columns = self._fast.columns.unused
        result.sequences = len(rows.flat)
        result.tokens = int(rows.flat.lengths.sum())
        widths = np.unique(rows.flat.widths(), return_counts=True)
        result.lengths = np.stack(widths, axis=1).astype("<u4").tobytes()
        for is_val, split in enumerate(SPLITS):
            self._write_split(part, result, rows, split, np.flatnonzero(rows.is_val == bool(is_val)))
        self._write_sources(part, result, collected, rows.first)
        result.host = socket.gethostname()
        _prove(self._settings, result, rows.flat)
        return result

    # --- rows -> sequences

    def _collect(self, part: Part, result: PartResult, tick: Tick, encoder: RowEncoder) -> _Collected:
        """Encode the rows of a part and count them in `result`. Raises _DiffersError if a compared row differs."""
        collected, screened = _Collected(), _screened(self._settings, part)
        result.encoder = f"{encoder.encoder.name} {encoder.encoder.version}"
        reported = 0  # bytes reported to `tick`
        for lines in batches(part):
            consumed = part.bytes_done(lines[-1])
            num_lines, num_left_out = len(lines), result.left_out.total()
            result.rows += num_lines
            if screened:
                for line in lines:
                    if line.number in screened:
                        self._leave_out(part, line, BadRow(*screened[line.number]), collected, result)
                lines = [line for line in lines if line.number not in screened]
            encoded = encoder.encode_lines([line.raw for line in lines], self._header.kind)
            if encoder is not self._reference:
                self._compare(lines, encoded, result)
            for i, bad in encoded.bad.items():
                self._leave_out(part, lines[i], bad, collected, result)
            self._keep(lines, encoded, collected, result)
            num_tokens = int(encoded.sequences.lengths.sum())
            tick(consumed - reported, num_lines, num_tokens, result.left_out.total() - num_left_out)
            reported = consumed
        tick(part.num_bytes - reported)
        return collected

    def _compare(self, lines: Sequence[Line], encoded: EncodedRows, result: PartResult) -> None:
        """Raise _DiffersError if the reference encoder gives other tokens, reasons or hashes for some rows of a batch:
        COMPARED_FIRST of a part's first batch, COMPARED of others."""
        count = COMPARED_FIRST if not result.compared else COMPARED
        picks = sorted({i * len(lines) // count for i in range(count)} if len(lines) > count else range(len(lines)))
        if not picks:
            return
        expected = self._reference.encode_lines([lines[i].raw for i in picks], self._header.kind)
        begins = np.cumsum(encoded.num_sequences) - encoded.num_sequences
        sequences = [np.arange(begins[i], begins[i] + encoded.num_sequences[i]) for i in picks]
        actual = reorder(encoded.sequences, np.concatenate(sequences))
        reasons = {n: str(encoded.bad[i]) for n, i in enumerate(picks) if i in encoded.bad}
        is_same = (
            reasons == {n: str(bad) for n, bad in expected.bad.items()}
            and is_equal(actual, expected.sequences)
            and np.array_equal(encoded.hashes[picks], expected.hashes)
        )
        if not is_same:
            first, last = lines[picks[0]].number, lines[picks[-1]].number
            raise _DiffersError(f"{first:,} to {last:,}: the fast way gave a row other tokens than the slow way")
        result.compared += len(picks)

    def _leave_out(self, part: Part, line: Line, bad: BadRow, collected: _Collected, result: PartResult) -> None:
        """Count and record a row. If `on_bad` is "fail", raise InputError, but not for TOO_LONG and reasons that the
        user asked for; if `on_lost` is, for the reasons in LOST."""
        asked = asked_for(self._arguments.kind or None)
        is_lost = self._arguments.on_lost == "fail" and bad.reason in LOST
        if is_lost or (self._arguments.on_bad == "fail" and bad.reason not in (TOO_LONG, *asked)):
            option = "--on-lost set-aside" if is_lost else "--on-bad quarantine"
            raise InputError(
                f"{place_of(part.path, line.number, part.read)}: {bad}",
                f"{REASONS[bad.reason]}; or {option} sets such rows aside",
            )
        result.left_out[bad.reason] += 1
        raw, exact = line.raw.decode("utf-8", errors="replace"), None
        if "\ufffd" in raw and raw.encode() != line.raw:
            exact = base64.b64encode(line.raw).decode()
        collected.rejected.append(
            RejectedRow(str(part.path), line.number, line.offset, bad.reason, bad.detail, raw, exact)
        )

    def _keep(self, lines: Sequence[Line], encoded: EncodedRows, collected: _Collected, result: PartResult) -> None:
        """Add the rows of a batch that gave at least one sequence, and their counts."""
        kept = np.flatnonzero(encoded.num_sequences)
        of_kept = [lines[i] for i in kept.tolist()] if encoded.bad else lines
        collected.flats.append(encoded.sequences)
        collected.num_sequences.append(encoded.num_sequences[kept])
        collected.is_val.append(is_for_val(encoded.hashes[kept], self._arguments.val_fraction))
        collected.lines += [line.number for line in of_kept]
        collected.offsets += [line.offset for line in of_kept]
        collected.shas += [sha256(line.raw).digest()[:8] for line in of_kept]
        result.kept += len(kept)
        result.tokens_in += encoded.num_tokens
        result.cut.update(encoded.cut)
        result.not_written.update(encoded.not_written)
        result.text_bytes += encoded.text_bytes
        result.unknown_bytes += encoded.unknown_bytes
        result.extra_keys.update(encoded.extra_keys)
        result.characters += int(encoded.characters[kept].sum())
        for i, strings in encoded.controls.items():
            if encoded.num_sequences[i]:
                result.control_strings.update(strings)

    # --- sequences -> files

    def _write_split(self, part: Part, result: PartResult, rows: _Rows, split: str, ordinals: np.ndarray) -> None:
        """Pack the sequences with the indices `ordinals` and write a shard of this split for each bucket in use."""
        buckets = self._header.buckets
        widths = rows.flat.widths()[ordinals]
        if self._header.kind == "pair":
            bucket_of_sample = np.array(buckets)[np.searchsorted(buckets, widths)]
            members, sizes = np.arange(len(ordinals)), np.ones(len(ordinals), np.int64)
        else:
            packs = pack(widths, buckets)
            bucket_of_sample, members, sizes = packs.buckets, packs.members, np.diff(packs.ends, prepend=0)
        for bucket in np.unique(bucket_of_sample).tolist():
            is_here = bucket_of_sample == bucket
            samples = ordinals[members[np.repeat(is_here, sizes)]]
            result.shards.append(self._write_shard(part, rows, split, bucket, samples, sizes[is_here]))

    def _write_shard(
        self, part: Part, rows: _Rows, split: str, bucket: int, ordinals: np.ndarray, sizes: np.ndarray
    ) -> ShardRecord:
        """Write a shard. ordinals: indices of its sequences, sample after sample. sizes: sequences of each sample."""
        flat, header = rows.flat, self._header
        id_dtype = dataset.id_dtype(header.tokenizer.vocab_size)
        columns = columns_of(flat, ordinals, sizes, id_dtype, dataset.position_dtype(bucket))
        path = part_path(f"{split}/b{bucket:04d}", part.number)
        place = self._settings.dir / path
        written = write_arrow(place, columns, header.shard_metadata(bucket), dataset.TOKENS_PER_BATCH // bucket)
        return ShardRecord(
            path=path,
            split=split,
            bucket=bucket,
            part=part.number,
            samples=len(sizes),
            sequences=len(ordinals),
            rows=int(rows.is_first[ordinals].sum()),
            tokens=int(flat.lengths[ordinals].sum()),
            model_tokens=int(flat.model_lengths()[ordinals].sum()),
            loss_tokens=int(flat.num_loss[ordinals].sum()),
            bytes=written.bytes,
            sha256=written.sha256,
            token_digest=dataset.token_digest(read_arrow(place), header.kind),
        )

    def _write_sources(self, part: Part, result: PartResult, collected: _Collected, first: np.ndarray) -> None:
        """Write where each packed row came from, and the rejected rows. first: each row's first sequence, int64 [rows]."""
        directory = self._settings.dir
        if collected.lines:
            columns = {
                "file": np.full(len(collected.lines), part.input, np.uint16 if part.input < 2**16 else np.uint32),
                "line": np.array(collected.lines, np.uint32),
                "offset": np.array(collected.offsets, np.uint64),
                "sha": np.frombuffer(b"".join(collected.shas), np.uint8).reshape(-1, 8),
                "first": first.astype(np.uint32),
            }
            path, metadata = part_path("sources", part.number), {"format_version": str(FORMAT_VERSION)}
            written = write_arrow(directory / path, columns, metadata, dataset.SOURCES_PER_BATCH)
            result.files.append(FileEntry(path, *written))
        if collected.rejected:
            path = part_path("rejected", part.number)
            lines = [_json_line(row) for row in sorted(collected.rejected, key=lambda row: row.line)]
            result.files.append(FileEntry(path, *write_bytes(directory / path, b"".join(lines))))


def first_rejected(path: Path, read: ReadOptions) -> str:
    """Return, for an error message, where the first row of a file of rows left out is, and what is wrong with it."""
    with path.open("rb") as file:
        row = decode_record(file.readline(), RejectedRow, str(path), DatasetError, "pack again")
    bad = BadRow(row.reason, row.detail)
    return f"; {place_of(row.file, row.line, read)} {explain(row.raw.encode(), bad, Columns.parse(read.mapping))}"


def _json_line(row: RejectedRow) -> bytes:
    """The row as `json.dumps(..., ensure_ascii=False)` writes it, and a newline; ten times as fast for long rows."""
    fields = [b'"%s": %s' % (name.encode(), msgspec.json.encode(value)) for name, value in plain(row).items()]
    return b"{%s}\n" % b", ".join(fields)


def screen_path(directory: Path, part: int, name: str) -> Path:
    """Return the path of a file about a part that --where, --dedup and --exclude need, such as its LEFT_OUT lines."""
    return directory / f"{folder_of(part)}{part:05d}.{name}"


def _screened(settings: PartSettings, part: Part) -> dict[int, tuple[str, str]]:
    """Return the lines left out by --where, --dedup or --exclude, by number; DatasetError if their file cannot be read."""
    if not settings.header.arguments.screens:
        return {}
    path = screen_path(settings.screen_dir, part.number, LEFT_OUT)
    return read_record(path, dict[int, tuple[str, str]], DatasetError, "pack again")


def is_for_val(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Return which rows belong to val, by their content alone, so that equal rows are in one split: bool [R]. hashes:
    uint8 [R, 32], of each row's content. fraction: share of val, 0 to 1."""
    return np.ascontiguousarray(hashes).view("<u8")[:, 0] < np.uint64(fraction * 2**64)


def batches(part: Part) -> Iterator[list[Line]]:
    """Yield the lines of a part in lists of about BATCH_BYTES bytes each."""
    batch: list[Line] = []
    num_bytes = 0
    for line in iter_lines(part.path, part.begin, part.end, first_number=part.first_line, options=part.read):
        batch.append(line)
        num_bytes += len(line.raw)
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


# --- proof


def _prove(settings: PartSettings, result: PartResult, before: Sequences) -> None:
    """Raise DatasetError unless the counts of rows and tokens add up and the shards, read back, have every sequence of
    `before` exactly once. Stores the digest of what was read back in `result`."""
    _require(result.rows == result.kept + result.left_out.total(), "rows in are not rows kept plus rows left out")
    _require(result.tokens_in == result.tokens + result.cut.total(), "tokens in are not tokens packed plus tokens cut")
    _require(result.tokens == sum(shard.tokens for shard in result.shards), "shards and rows count other tokens")
    stored = [read_back(read_arrow(settings.dir / shard.path), settings.header.kind) for shard in result.shards]
    ordinals = np.concatenate([np.empty(0, np.int64), *(ordinals for ordinals, _ in stored)])
    after = join([flat for _, flat in stored])
    order = np.argsort(ordinals, kind="stable")
    is_once = np.array_equal(ordinals[order], np.arange(len(before)))
    _require(
        is_once and np.array_equal(after.lengths[order], before.lengths),
        "a sequence is lost, doubled or of another length in the shards",
    )
    _require(is_equal(reorder(after, order), before), "the shards hold other tokens or spans than the rows gave")
    result.digest = dataset.sequence_digest(after.ids, after.lengths, after.marks, after.num_marks)


def _require(holds: bool, message: str) -> None:
    """Raise DatasetError unless `holds`. Not an assert statement, since it must also run under `python -O`."""
    if not holds:
        raise DatasetError(f"the proof of packing failed: {message}", "nothing was published; please report this")
