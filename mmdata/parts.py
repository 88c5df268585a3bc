"""One part of an input in; its shards, provenance and left-out rows on disk, and the sums that prove nothing was lost, out.

A pure function of (bytes of the part, settings): the same files whoever runs it. Memory is bounded by the part.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdata import shards
from mmdata.arrow import ArrowFile, Ragged, ragged, read_arrow, write_arrow, write_file
from mmdata.buckets import bucket_of
from mmdata.encode import Encoded, PairSequence, RowEncoder
from mmdata.encode import Sequence as TokenSequence
from mmdata.engine import Tick
from mmdata.errors import DatasetError, InputError
from mmdata.packing import pack
from mmdata.rows import REASONS, BadRow, Conversation, Document, Line, Row, iter_lines, parse_row, row_hash
from mmdata.tokenizer import Tokenizer
from mmdata.validate import control_strings

BATCH_BYTES = 2**20  # of jsonl to the encoder in one call: some hundred rows, under a second
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

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

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


@dataclass(slots=True)
class _Collected:
    """The kept rows of a part, before packing."""

    sequences: list[Any] = field(default_factory=list)  # TokenSequence or PairSequence, in source order
    is_val: list[bool] = field(default_factory=list)  # a sequence
    is_first: list[bool] = field(default_factory=list)  # whether it begins its row
    sources: list[tuple[int, int, bytes, int]] = field(default_factory=list)  # a row: line, offset, sha, first sequence
    rejected: list[dict[str, Any]] = field(default_factory=list)


class PartPacker:
    """Packs parts with one set of settings; holds the encoder."""

    def __init__(self, settings: Settings):
        self._settings = settings
        tokenizer = Tokenizer.load(settings.tokenizer_dir)
        self._encoder = RowEncoder(
            tokenizer,
            max_len=settings.manifest["max_len"],
            era=settings.argument("era"),
            train_on=settings.argument("train_on"),
            seed=settings.argument("seed"),
        )

    def __call__(self, part: Part, tick: Tick) -> PartResult:
        """Reads, encodes, packs and writes a part, then proves from the written bytes that all is there."""
        result = PartResult(part.number)
        rows = self._collect(part, result, tick)
        before = _flatten(rows.sequences)
        result.sequences = len(rows.sequences)
        result.tokens = int(before.lengths.sum())
        result.digest = before.digest()
        result.lengths.update(sample_lengths(rows.sequences).tolist())
        for is_val, split in enumerate(shards.SPLITS):
            ordinals = np.flatnonzero(np.array(rows.is_val, bool) == bool(is_val))
            self._write_split(part, result, rows, split, ordinals)
        self._write_sources(part, result, rows)
        _prove(self._settings, result, before)
        return result

    # --- rows -> sequences

    def _collect(self, part: Part, result: PartResult, tick: Tick) -> _Collected:
        rows = _Collected()
        told = 0
        for lines in batches(iter_lines(part.path, part.begin, part.end, first_number=part.first_line)):
            result.rows += len(lines)
            good = self._parse(part, lines, rows, result)
            encoded = self._encoder.encode([row for _, row in good])
            for (line, row), item in zip(good, encoded, strict=True):
                if isinstance(item, BadRow):
                    self._leave_out(part, line, item, rows, result)
                else:
                    self._keep(line, row, item, rows, result)
            consumed = lines[-1].offset + len(lines[-1].raw) - part.begin if part.end is not None else 0
            tick(consumed - told)
            told = consumed
        tick(part.num_bytes - told)
        return rows

    def _parse(self, part: Part, lines: Sequence[Line], rows: _Collected, result: PartResult) -> list[tuple[Line, Row]]:
        good: list[tuple[Line, Row]] = []
        for line in lines:
            try:
                good.append((line, parse_row(line.raw, self._settings.kind)))
            except BadRow as bad:
                self._leave_out(part, line, bad, rows, result)
        return good

    def _leave_out(self, part: Part, line: Line, bad: BadRow, rows: _Collected, result: PartResult) -> None:
        if self._settings.argument("on_bad") == "fail" and bad.reason != TOO_LONG:
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
        rows.rejected.append(record)

    def _keep(self, line: Line, row: Row, encoded: Encoded, rows: _Collected, result: PartResult) -> None:
        found = encoded.sequences
        sequences = [found] if isinstance(found, PairSequence) else list(found)
        assert sequences, f"line {line.number}: a kept row without a sequence"
        rows.sources.append((line.number, line.offset, hashlib.sha256(line.raw).digest()[:8], len(rows.sequences)))
        rows.sequences += sequences
        rows.is_val += [is_for_val(row, self._settings.argument("val_fraction"))] * len(sequences)
        rows.is_first += [True] + [False] * (len(sequences) - 1)
        result.kept += 1
        result.tokens_in += encoded.num_tokens
        result.cut.update(encoded.cut)
        result.characters += num_characters(row)
        result.control_strings.update(control_strings(line.raw, row))

    # --- sequences -> files

    def _write_split(self, part: Part, result: PartResult, rows: _Collected, split: str, ordinals: np.ndarray) -> None:
        """Packs the sequences with these ordinals and writes a shard for each bucket that gets some."""
        widths = sample_lengths([rows.sequences[ordinal] for ordinal in ordinals.tolist()])
        members: dict[int, list[np.ndarray]] = {}
        if self._settings.kind == "pair":
            for ordinal, width in zip(ordinals, widths.tolist(), strict=True):
                members.setdefault(bucket_of(width, self._settings.buckets), []).append(ordinal[None])
        else:
            for bucket, indices in pack(widths, self._settings.buckets):
                members.setdefault(bucket, []).append(ordinals[indices])
        for bucket in sorted(members):
            result.shards.append(self._write_shard(part, rows, split, bucket, members[bucket]))

    def _write_shard(
        self, part: Part, rows: _Collected, split: str, bucket: int, samples: Sequence[np.ndarray]
    ) -> dict[str, Any]:
        settings = self._settings
        ordinals = np.concatenate(samples)
        sequences = [rows.sequences[ordinal] for ordinal in ordinals.tolist()]
        id_dtype = shards.id_dtype(settings.manifest["tokenizer"]["vocab_size"])
        types = (id_dtype, shards.position_dtype(bucket))
        if settings.kind == "pair":
            columns = _pair_columns(sequences, ordinals, *types)
        else:
            columns = _pack_columns(sequences, ordinals, np.array([len(sample) for sample in samples]), *types)
        path = f"{split}/b{bucket:04d}/part-{part.number:05d}.arrow"
        metadata = shards.shard_metadata(settings.manifest, bucket)
        written = write_arrow(settings.staging / path, columns, metadata, shards.TOKENS_PER_BATCH // bucket)
        return {
            "path": path,
            "split": split,
            "bucket": bucket,
            "part": part.number,
            "samples": len(samples),
            "sequences": len(sequences),
            "rows": sum(rows.is_first[ordinal] for ordinal in ordinals.tolist()),
            "tokens": sum(num_tokens(sequence) for sequence in sequences),
            "model_tokens": sum(_num_model_tokens(sequence) for sequence in sequences),
            "loss_tokens": sum(num_loss_tokens(sequence) for sequence in sequences),
            **written,
            "token_digest": shards.token_digest(read_arrow(settings.staging / path), settings.kind),
        }

    def _write_sources(self, part: Part, result: PartResult, rows: _Collected) -> None:
        staging = self._settings.staging
        if rows.sources:
            lines, offsets, shas, firsts = zip(*rows.sources, strict=True)
            columns = {
                "file": np.full(len(lines), part.input, np.uint16),
                "line": np.array(lines, np.uint32),
                "offset": np.array(offsets, np.uint64),
                "sha": np.frombuffer(b"".join(shas), np.uint8).reshape(-1, 8),
                "first": np.array(firsts, np.uint32),
            }
            path = shards.sources_path(part.number)
            metadata = {"format_version": str(shards.FORMAT_VERSION)}
            written = write_arrow(staging / path, columns, metadata, shards.SOURCES_PER_BATCH)
            result.files.append({"path": path, **written})
        if rows.rejected:
            path = f"rejected/part-{part.number:05d}.jsonl"
            rejected = sorted(rows.rejected, key=lambda record: record["line"])
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rejected)
            result.files.append({"path": path, **write_file(staging / path, text.encode())})


def is_for_val(row: Row, fraction: float) -> bool:
    """Whether a row belongs to val: by its content alone, so that equal rows never stand on both sides."""
    salted = hashlib.sha256(b"mm val split\0" + row_hash(row)).digest()
    return int.from_bytes(salted[:8], "big") < fraction * 2**64


def num_characters(row: Row) -> int:
    """Characters of a row's own text: what people wrote, without template and tools; a pair's prompt counts once."""
    if isinstance(row, Document):
        return len(row.text)
    if isinstance(row, Conversation):
        return _num_characters(row, 0)
    return _num_characters(row.chosen, 0) + _num_characters(row.rejected, row.num_shared)


def _num_characters(conversation: Conversation, begin: int) -> int:
    return sum(len(m.content) + len(m.reasoning_content or "") for m in conversation.messages[begin:])


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


def num_tokens(sequence: Any) -> int:
    """Tokens as they are stored: a pair's prompt once."""
    if isinstance(sequence, PairSequence):
        return len(sequence.prompt) + len(sequence.chosen) + len(sequence.rejected)
    return len(sequence.ids)


def _num_model_tokens(sequence: Any) -> int:
    """Tokens as a model sees them: a pair's prompt before each of its replies."""
    return num_tokens(sequence) + (len(sequence.prompt) if isinstance(sequence, PairSequence) else 0)


def num_loss_tokens(sequence: Any) -> int:
    """Trained tokens of a sequence, or of both replies of a pair."""
    both = (sequence.chosen_spans, sequence.rejected_spans) if isinstance(sequence, PairSequence) else (sequence.spans,)
    return sum(int((spans[:, 1] - spans[:, 0]).sum()) for spans in both)


def sample_lengths(sequences: Sequence[Any]) -> np.ndarray:
    """int64 [N]: the length that must fit a bucket."""
    if sequences and isinstance(sequences[0], PairSequence):
        return np.array([len(s.prompt) + max(len(s.chosen), len(s.rejected)) for s in sequences], np.int64)
    return np.array([len(s.ids) for s in sequences], np.int64)


def _concatenate(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    """Arrays of any shape, flat and end to end; the values are known to fit the type."""
    if not arrays:
        return np.empty(0, dtype)
    return np.concatenate([array.reshape(-1) for array in arrays], dtype=dtype, casting="unsafe")


def _list_column(arrays: Sequence[np.ndarray], dtype: np.dtype) -> Ragged:
    return ragged(_concatenate(arrays, dtype), np.array([array.size for array in arrays]))


def _pack_columns(
    sequences: Sequence[TokenSequence],
    ordinals: np.ndarray,
    sizes: np.ndarray,
    id_dtype: np.dtype,
    position_dtype: np.dtype,
) -> dict[str, Any]:
    """The columns of packs. sequences in pack order, with their ordinals; sizes: sequences of each pack."""
    lengths = np.array([len(sequence.ids) for sequence in sequences])
    num_spans = np.array([len(sequence.spans) for sequence in sequences])
    pack_ends = np.cumsum(sizes)
    pack_begins = pack_ends - sizes
    begins = np.cumsum(lengths) - lengths  # of each sequence: in the shard, then in its pack
    begins -= np.repeat(begins[pack_begins], sizes)
    spans = _concatenate([sequence.spans for sequence in sequences], np.int64)
    num_loss = np.concatenate([[0], np.cumsum(spans[1::2] - spans[0::2])])
    span_ends = np.cumsum(num_spans)[pack_ends - 1]
    spans += np.repeat(begins, 2 * num_spans)
    return {
        "ids": ragged(
            _concatenate([sequence.ids for sequence in sequences], id_dtype), np.add.reduceat(lengths, pack_begins)
        ),
        "doc_len": ragged(lengths.astype(position_dtype), sizes),
        "span": ragged(spans.astype(position_dtype), 2 * np.add.reduceat(num_spans, pack_begins)),
        "n_loss": np.diff(num_loss[span_ends], prepend=0).astype(position_dtype),
        "doc": ragged(ordinals.astype(np.uint32), sizes),
    }


def _pair_columns(
    pairs: Sequence[PairSequence], ordinals: np.ndarray, id_dtype: np.dtype, position_dtype: np.dtype
) -> dict[str, Any]:
    """The columns of pairs. A reply that is trained as a whole has an empty span list."""

    def spans(of: np.ndarray, reply: np.ndarray) -> np.ndarray:
        is_whole = of.shape == (1, 2) and of[0, 0] == 0 and of[0, 1] == len(reply)
        return of[:0] if is_whole else of

    def num_loss(of: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([(s[:, 1] - s[:, 0]).sum() for s in of], position_dtype)

    return {
        "prompt": _list_column([pair.prompt for pair in pairs], id_dtype),
        "chosen": _list_column([pair.chosen for pair in pairs], id_dtype),
        "rejected": _list_column([pair.rejected for pair in pairs], id_dtype),
        "chosen_span": _list_column([spans(pair.chosen_spans, pair.chosen) for pair in pairs], position_dtype),
        "rejected_span": _list_column([spans(pair.rejected_spans, pair.rejected) for pair in pairs], position_dtype),
        "n_chosen": num_loss([pair.chosen_spans for pair in pairs]),
        "n_rejected": num_loss([pair.rejected_spans for pair in pairs]),
        "doc": ordinals.astype(np.uint32),
    }


# --- proof


@dataclass(frozen=True, slots=True)
class _Flat:
    """Sequences end to end: what must be the same before packing and after. Marks are spans; for pairs lengths too."""

    ids: np.ndarray
    lengths: np.ndarray
    marks: np.ndarray
    num_marks: np.ndarray

    def digest(self) -> int:
        return shards.sequence_digest(self.ids, self.lengths, self.marks, self.num_marks)


def _flatten(sequences: Sequence[Any]) -> _Flat:
    if sequences and isinstance(sequences[0], PairSequence):
        return _flatten_pairs(
            [(s.prompt, s.chosen, s.rejected, s.chosen_spans.ravel(), s.rejected_spans.ravel()) for s in sequences]
        )
    ids, spans = [s.ids for s in sequences], [s.spans for s in sequences]
    return _Flat(_concatenate(ids, np.uint32), _sizes(ids), _concatenate(spans, np.int64), _sizes(spans))


def _flatten_pairs(pairs: Sequence[tuple[np.ndarray, ...]]) -> _Flat:
    """pairs: prompt, chosen, rejected, chosen spans, rejected spans."""
    ids = [array for pair in pairs for array in pair[:3]]
    marks = [np.concatenate([[len(array) for array in pair], *pair[3:]]) for pair in pairs]
    lengths = _sizes(ids).reshape(-1, 3).sum(axis=1)
    return _Flat(_concatenate(ids, np.uint32), lengths, _concatenate(marks, np.int64), _sizes(marks))


def _sizes(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([array.size for array in arrays], np.int64)


def _read_back(file: ArrowFile, kind: str) -> tuple[np.ndarray, _Flat]:
    """The ordinals and sequences that a shard holds, in its order."""
    if kind == "pair":
        views = [shards.pair_view(batch, i) for batch in file.batches for i in range(len(batch["doc"]))]
        return file.column("doc"), _flatten_pairs([tuple(view[:5]) for view in views])
    ids, doc_len, span, doc = (file.column(name) for name in ("ids", "doc_len", "span", "doc"))
    lengths = doc_len.values.astype(np.int64)
    begins = np.cumsum(lengths) - lengths
    spans = span.values.astype(np.int64) + np.repeat(ids.offsets[:-1], span.lengths())  # in the shard's positions
    of_span = np.searchsorted(begins, spans[0::2], side="right") - 1  # the sequence each span lies in
    num_marks = 2 * np.bincount(of_span, minlength=len(lengths))
    return doc.values, _Flat(ids.values, lengths, spans - np.repeat(begins[of_span], 2), num_marks)


def _prove(settings: Settings, result: PartResult, before: _Flat) -> None:
    """Rows and tokens balance, and the files on disk hold every sequence once, with its length, ids and spans."""
    _require(result.rows == result.kept + result.left_out.total(), "rows in are not rows kept plus rows left out")
    _require(result.tokens_in == result.tokens + result.cut.total(), "tokens in are not tokens packed plus tokens cut")
    found = np.zeros_like(before.lengths)
    digest = 0
    for entry in result.shards:
        ordinals, flat = _read_back(read_arrow(settings.staging / entry["path"]), settings.kind)
        np.add.at(found, ordinals, flat.lengths)  # a sequence that stands twice has twice its length
        digest = (digest + flat.digest()) % 2**128
    _require(np.array_equal(found, before.lengths), "a sequence is lost, doubled or of another length in the shards")
    _require(digest == result.digest, "the shards hold other tokens or spans than the rows gave")
    _require(result.tokens == sum(entry["tokens"] for entry in result.shards), "shards and rows count other tokens")


def _require(holds: bool, message: str) -> None:
    """Not an assert: these must hold under `python -O` too before anything is published."""
    if not holds:
        raise DatasetError(f"the proof of packing failed: {message}", "nothing was published; please report this")
