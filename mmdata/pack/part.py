"""One part of an input in; its shards, provenance and left-out rows on disk, and the sums that prove nothing was lost, out.

A pure function of (bytes of the part, settings): the same files whoever runs it. Memory is bounded by the part.
"""

import base64
import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.encode.encoder import EncodedRows, RowEncoder
from mmdata.encode.rows import REASONS, SCREENED, BadRow, Line, iter_lines
from mmdata.encode.sequences import Sequences, is_equal, join, reorder
from mmdata.errors import DatasetError, InputError
from mmdata.io.arrow import read_arrow, write_arrow
from mmdata.io.files import write_bytes
from mmdata.io.workers import Tick
from mmdata.pack.packing import pack
from mmdata.shards import dataset
from mmdata.shards.columns import columns_of, read_back
from mmdata.tokenizer.encoders import REFERENCE, Encoder, choose
from mmdata.tokenizer.tokenizer import Tokenizer

BATCH_BYTES = 2**20  # of jsonl to the encoder in one call: some hundred rows, under a second
COMPARED_FIRST, COMPARED = 16, 2  # rows of a part's first batch, and of each other one, that the reference encodes too
GC_OBJECTS = 200_000  # of rows, which are no garbage, before Python looks for some again: a tenth of the time otherwise
TOO_LONG = "too long"  # a row nothing is wrong with


@dataclass(frozen=True, slots=True)
class Part:
    """A byte range of one input, from line start to line start; `end` None: to the end of a file that cannot be cut."""

    number: int
    input: int
    path: Path
    begin: int
    end: int | None
    first_line: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Settings:
    """All that the shards of a part depend on, besides its bytes."""

    staging: Path
    tokenizer_dir: Path
    manifest: dict[str, Any]  # its beginning: kind, lengths, tokenizer, arguments
    encoder: str = "auto"  # who encodes text; no byte depends on it

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def screen(self) -> Path:
        """Where it stands which lines are left out for what other rows or files say."""
        return self.staging.with_name("screen")

    @property
    def buckets(self) -> tuple[int, ...]:
        return tuple(self.manifest["buckets"])

    def argument(self, name: str) -> Any:
        return self.manifest["arguments"][name]


@dataclass(slots=True)
class PartResult:
    """The files of a part and its sums. rows = kept + left out; tokens_in = tokens + cut, both by reason."""

    number: int
    rows: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    tokens_in: int = 0
    tokens: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    control_strings: Counter[str] = field(default_factory=Counter)  # in content, packed as plain text
    sequences: int = 0
    lengths: Counter[int] = field(default_factory=Counter)  # of sequences (of a pair: its longer side) -> how many
    digest: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: list[dict[str, Any]] = field(default_factory=list)
    encoder: str = ""  # name and version
    compared: int = 0  # rows held to the reference: jinja's rendering, `tokenizers`' ids, one by one
    warning: str = ""  # why the fast way was given up


@dataclass(slots=True)
class _Collected:
    """The kept rows of a part, before packing; a list's items are a batch's."""

    flats: list[Sequences] = field(default_factory=list)  # in source order
    num_sequences: list[np.ndarray] = field(default_factory=list)  # of each kept row
    is_val: list[np.ndarray] = field(default_factory=list)  # of each kept row
    lines: list[int] = field(default_factory=list)  # a row, as the lists below
    offsets: list[int] = field(default_factory=list)
    shas: list[bytes] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)  # rows left out
    screened: dict[int, BadRow] = field(default_factory=dict)  # lines to be left out for what others say


@dataclass(frozen=True, slots=True)
class _Rows:
    """The kept rows of a part as they are packed. A sequence: its row is in val, it is its row's first."""

    flat: Sequences
    is_val: np.ndarray
    is_first: np.ndarray


class _DiffersError(Exception):
    """The fast way gave a row other tokens than the reference."""


def _no_tick(*counts: int) -> None:
    """These units were told before."""


class PartPacker:
    """Packs parts with one set of settings; holds the encoder."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._tokenizer = Tokenizer.load(settings.tokenizer_dir)
        encoder = choose(self._tokenizer, settings.encoder)
        self._warning = encoder.warning
        self._fast = self._row_encoder(encoder)
        self._reference = self._row_encoder(choose(self._tokenizer, REFERENCE), is_reference=True)

    def _row_encoder(self, encoder: Encoder, *, is_reference: bool = False) -> RowEncoder:
        return RowEncoder(
            self._tokenizer,
            max_len=self._settings.manifest["max_len"],
            era=self._settings.argument("era"),
            train_on=self._settings.argument("train_on"),
            seed=self._settings.argument("seed"),
            encoder=encoder,
            is_reference=is_reference,
        )

    def __call__(self, part: Part, tick: Tick) -> PartResult:
        """Reads, encodes, packs and writes a part, then proves from the written bytes that all is there."""
        before = gc.get_threshold()
        gc.set_threshold(GC_OBJECTS, *before[1:])
        try:
            return self._pack(part, tick)
        finally:
            gc.set_threshold(*before)

    def _pack(self, part: Part, tick: Tick) -> PartResult:
        try:
            result = PartResult(part.number, warning=self._warning)
            collected = self._collect(part, result, tick, self._fast)
        except _DiffersError as error:
            result = PartResult(part.number, warning=f"{part.path} line {error}; this part is packed the slow way")
            collected = self._collect(part, result, _no_tick, self._reference)
        rows = _rows_of(collected)
        result.sequences = len(rows.flat)
        result.tokens = int(rows.flat.lengths.sum())
        result.lengths.update(_counts(rows.flat.widths()))
        for is_val, split in enumerate(dataset.SPLITS):
            self._write_split(part, result, rows, split, np.flatnonzero(rows.is_val == bool(is_val)))
        self._write_sources(part, result, collected)
        _prove(self._settings, result, rows.flat)
        return result

    # --- rows -> sequences

    def _collect(self, part: Part, result: PartResult, tick: Tick, encoder: RowEncoder) -> _Collected:
        found = _Collected(screened=_screened(self._settings, part))
        result.encoder = f"{encoder.encoder.name} {encoder.encoder.version}"
        told = 0
        for lines in batches(iter_lines(part.path, part.begin, part.end, first_number=part.first_line)):
            consumed = lines[-1].offset + len(lines[-1].raw) - part.begin if part.end is not None else 0
            num_lines, num_left_out = len(lines), result.left_out.total()
            result.rows += num_lines
            lines = self._unscreened(part, lines, found, result)
            encoded = encoder.encode_lines([line.raw for line in lines], self._settings.kind)
            if encoder is not self._reference:
                self._compare(lines, encoded, result)
            for i, bad in encoded.bad.items():
                self._leave_out(part, lines[i], bad, found, result)
            self._keep(lines, encoded, found, result)
            num_tokens = int(encoded.sequences.lengths.sum())
            tick(consumed - told, num_lines, num_tokens, result.left_out.total() - num_left_out)
            told = consumed
        tick(part.num_bytes - told)
        return found

    def _compare(self, lines: Sequence[Line], encoded: EncodedRows, result: PartResult) -> None:
        """Holds some lines of a batch to the reference; more of a part's first. _DiffersError when one has other tokens."""
        count = COMPARED_FIRST if not result.compared else COMPARED
        picks = sorted({i * len(lines) // count for i in range(count)} if len(lines) > count else range(len(lines)))
        if not picks:
            return
        want = self._reference.encode_lines([lines[i].raw for i in picks], self._settings.kind)
        begins = np.cumsum(encoded.num_sequences) - encoded.num_sequences
        sequences = [np.arange(begins[i], begins[i] + encoded.num_sequences[i]) for i in picks]
        have = reorder(encoded.sequences, np.concatenate(sequences))
        reasons = {n: str(encoded.bad[i]) for n, i in enumerate(picks) if i in encoded.bad}
        is_same = reasons == {n: str(bad) for n, bad in want.bad.items()} and is_equal(have, want.sequences)
        if not is_same or not np.array_equal(encoded.hashes[picks], want.hashes):
            numbers = [lines[i].number for i in picks]
            raise _DiffersError(
                f"{numbers[0]:,} to {numbers[-1]:,}: the fast way gave a row other tokens than the slow way"
            )
        result.compared += len(picks)

    def _unscreened(self, part: Part, lines: list[Line], found: _Collected, result: PartResult) -> list[Line]:
        """The lines that other rows and files leave in."""
        for line in lines if found.screened else ():
            if line.number in found.screened:
                self._leave_out(part, line, found.screened[line.number], found, result)
        return [line for line in lines if line.number not in found.screened] if found.screened else lines

    def _leave_out(self, part: Part, line: Line, bad: BadRow, found: _Collected, result: PartResult) -> None:
        if self._settings.argument("on_bad") == "fail" and bad.reason not in (TOO_LONG, *SCREENED):
            raise InputError(
                f"{part.path} line {line.number}: {bad}",
                f"{REASONS[bad.reason]}; or `mm pack {part.path} --on-bad quarantine` sets such rows aside",
            )
        result.left_out[bad.reason] += 1
        record = {
            "file": str(part.path),
            "line": line.number,
            "offset": line.offset,
            "reason": bad.reason,
            "detail": bad.detail,
            "raw": line.raw.decode("utf-8", errors="replace"),
        }
        if record["raw"].encode() != line.raw:
            record["raw_base64"] = base64.b64encode(line.raw).decode()
        found.rejected.append(record)

    def _keep(self, lines: Sequence[Line], encoded: EncodedRows, found: _Collected, result: PartResult) -> None:
        """Takes the rows of a batch that can be used."""
        kept = np.flatnonzero(encoded.num_sequences)
        of_kept = [lines[i] for i in kept.tolist()] if encoded.bad else lines
        found.flats.append(encoded.sequences)
        found.num_sequences.append(encoded.num_sequences[kept])
        found.is_val.append(is_for_val(encoded.hashes[kept], self._settings.argument("val_fraction")))
        found.lines += [line.number for line in of_kept]
        found.offsets += [line.offset for line in of_kept]
        found.shas += [sha256(line.raw).digest()[:8] for line in of_kept]
        result.kept += len(kept)
        result.tokens_in += encoded.num_tokens
        result.cut.update(encoded.cut)
        result.characters += int(encoded.characters[kept].sum())
        for i, strings in encoded.controls.items():
            if encoded.num_sequences[i]:
                result.control_strings.update(strings)

    # --- sequences -> files

    def _write_split(self, part: Part, result: PartResult, rows: _Rows, split: str, ordinals: np.ndarray) -> None:
        """Packs the sequences with these ordinals and writes a shard for each bucket that gets some."""
        buckets = self._settings.buckets
        widths = rows.flat.widths()[ordinals]
        if self._settings.kind == "pair":
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
    ) -> dict[str, Any]:
        """ordinals: the sequences of a shard in the order of its samples, `sizes` of them in each."""
        settings = self._settings
        flat = rows.flat
        id_dtype = dataset.id_dtype(settings.manifest["tokenizer"]["vocab_size"])
        columns = columns_of(flat, ordinals, sizes, id_dtype, dataset.position_dtype(bucket))
        path = f"{split}/b{bucket:04d}/part-{part.number:05d}.arrow"
        metadata = dataset.shard_metadata(settings.manifest, bucket)
        written = write_arrow(settings.staging / path, columns, metadata, dataset.TOKENS_PER_BATCH // bucket)
        return {
            "path": path,
            "split": split,
            "bucket": bucket,
            "part": part.number,
            "samples": len(sizes),
            "sequences": len(ordinals),
            "rows": int(rows.is_first[ordinals].sum()),
            "tokens": int(flat.lengths[ordinals].sum()),
            "model_tokens": int(flat.model_lengths()[ordinals].sum()),
            "loss_tokens": int(flat.num_loss[ordinals].sum()),
            **written._asdict(),
            "token_digest": dataset.token_digest(read_arrow(settings.staging / path), settings.kind),
        }

    def _write_sources(self, part: Part, result: PartResult, found: _Collected) -> None:
        staging = self._settings.staging
        if found.lines:
            num_sequences = np.concatenate(found.num_sequences)
            columns = {
                "file": np.full(len(found.lines), part.input, np.uint16),
                "line": np.array(found.lines, np.uint32),
                "offset": np.array(found.offsets, np.uint64),
                "sha": np.frombuffer(b"".join(found.shas), np.uint8).reshape(-1, 8),
                "first": (np.cumsum(num_sequences) - num_sequences).astype(np.uint32),
            }
            path = dataset.sources_path(part.number)
            metadata = {"format_version": str(dataset.FORMAT_VERSION)}
            written = write_arrow(staging / path, columns, metadata, dataset.SOURCES_PER_BATCH)
            result.files.append({"path": path, **written._asdict()})
        if found.rejected:
            path = f"rejected/part-{part.number:05d}.jsonl"
            rejected = sorted(found.rejected, key=lambda record: record["line"])
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rejected)
            result.files.append({"path": path, **write_bytes(staging / path, text.encode())._asdict()})


def screened_path(directory: Path, part: int) -> Path:
    """Where the lines of a part stand that are left out for what other rows or files say, with the reason."""
    return directory / f"{part:05d}.left_out.json"


def _screened(settings: Settings, part: Part) -> dict[int, BadRow]:
    if not settings.manifest["arguments"].get("dedup") and not settings.manifest["arguments"].get("exclude"):
        return {}
    found = json.loads(screened_path(settings.screen, part.number).read_bytes())
    return {int(line): BadRow(reason, detail) for line, (reason, detail) in found.items()}


def _rows_of(found: _Collected) -> _Rows:
    num_sequences = np.concatenate([np.empty(0, np.int64), *found.num_sequences])
    is_first = np.zeros(num_sequences.sum(), bool)
    is_first[np.cumsum(num_sequences) - num_sequences] = True
    return _Rows(
        join(found.flats), np.repeat(np.concatenate([np.empty(0, bool), *found.is_val]), num_sequences), is_first
    )


def _counts(values: np.ndarray) -> dict[int, int]:
    """How often each value stands there."""
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def is_for_val(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [R]: whether the rows with these hashes (uint8 [R, 32]) belong to val.

    By their content alone, so that equal rows never stand on both sides.
    """
    return np.ascontiguousarray(hashes).view("<u8")[:, 0] < np.uint64(fraction * 2**64)


def batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Lines in lists of about BATCH_BYTES each: one call of the encoder."""
    batch: list[Line] = []
    num_bytes = 0
    for line in lines:
        batch.append(line)
        num_bytes += len(line.raw)
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


# --- proof


def _prove(settings: Settings, result: PartResult, before: Sequences) -> None:
    """Rows and tokens balance, and the files on disk hold every sequence once, with its length, ids and spans.

    What is read back is compared with what was to be packed, token by token; its digest, then that of both, is taken of
    what is on disk.
    """
    _require(result.rows == result.kept + result.left_out.total(), "rows in are not rows kept plus rows left out")
    _require(result.tokens_in == result.tokens + result.cut.total(), "tokens in are not tokens packed plus tokens cut")
    _require(result.tokens == sum(entry["tokens"] for entry in result.shards), "shards and rows count other tokens")
    found = [read_back(read_arrow(settings.staging / entry["path"]), settings.kind) for entry in result.shards]
    ordinals = np.concatenate([np.empty(0, np.int64), *(ordinals for ordinals, _ in found)])
    after = join([flat for _, flat in found])
    order = np.argsort(ordinals, kind="stable")
    is_once = np.array_equal(ordinals[order], np.arange(len(before)))
    _require(
        is_once and np.array_equal(after.lengths[order], before.lengths),
        "a sequence is lost, doubled or of another length in the shards",
    )
    _require(is_equal(reorder(after, order), before), "the shards hold other tokens or spans than the rows gave")
    result.digest = dataset.sequence_digest(after.ids, after.lengths, after.marks, after.num_marks)


def _require(holds: bool, message: str) -> None:
    """Not an assert: these must hold under `python -O` too before anything is published."""
    if not holds:
        raise DatasetError(f"the proof of packing failed: {message}", "nothing was published; please report this")
