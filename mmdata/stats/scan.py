"""Files or shards read once, in as many processes as asked, into tallies of their rows and tokens.

Rows come from files or, where a dataset's are gone, decoded from its shards. All text is measured. Tokens of a raw file are those
of a sample of its rows, drawn by line number, unless all are asked for: tokenizing takes ten times as long as everything else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import BadRow, Line, Row, is_seekable, num_characters, parse_row
from mmdata.encode.sequences import PairSequence, Sequences
from mmdata.io import workers as engine
from mmdata.io.arrow import Ragged, num_rows
from mmdata.io.workers import Tick
from mmdata.pack.part import Part, batches
from mmdata.pack.pipeline import plan
from mmdata.shards import dataset as shards
from mmdata.shards.manifest import PartRecord, ShardRecord
from mmdata.stats.decoded import PartRows, RowDecoder
from mmdata.stats.frames import ROWS_FOR_NEAR, STRINGS, count_rows, set_aside
from mmdata.stats.tally import Tally
from mmdata.stats.tokens import FlatSequences, Vocabulary, count_tokens, flat_sequences
from mmdata.tokenizer.tokenizer import Tokenizer

UNCUT = 2**24  # a length limit that no row reaches: figures of a file are those of its whole rows
PART_BYTES = 16 * 2**20
MOST_PARTS = 256
SAMPLE_BYTES = 12_000_000  # of rows that are tokenized, and read for repeated phrases
NUM_EXTREMES = 6  # longest and shortest rows, and rows of highest loss, that are shown
RAW_KEPT = 2**17  # bytes; a longer row is not shown
SLICE_TOKENS = 2**21  # of a shard at once
STRETCHES = 32  # of all shards that a share is taken from
DECODED_ROWS = 2**11  # measured at once
Progress = Callable[[int, int], None]
Losses = Mapping[str, Mapping[int, float]]  # nats a token, by file and line


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A row, from a line or, with `encoded`, decoded from shards; why: random, longest, shortest or loss, if it is shown."""

    file: str
    line: int
    raw: bytes
    row: Row | None = None
    encoded: Sequences | None = None
    why: str = ""
    characters: int = 0
    nll: float | None = None

    def parsed(self) -> Row:
        """The row. BadRow if its line can no longer be parsed."""
        return self.row or parse_row(self.raw)

    @property
    def can_be_shown(self) -> bool:
        """Whether the row is short enough to be kept."""
        return len(self.raw) <= RAW_KEPT and (self.encoded is None or self.encoded.lengths.sum() <= RAW_KEPT // 4)


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """How rows are read. is_exact: tokenize all, not a sample. wanted: lines to show, with their loss, by file; left_out: lines
    that are skipped, by file. share (of the rows that are drawn as a sample) and most_signed (rows of a part that get a signature)
    are set by the scan."""

    kind: str
    tokenizer_dir: Path | None = None
    is_exact: bool = False
    wanted: Losses = field(default_factory=dict)
    left_out: Mapping[str, frozenset[int]] = field(default_factory=dict)
    share: float = 1.0
    most_signed: int = ROWS_FOR_NEAR


@dataclass(slots=True)
class PartScan:
    """The counts of one part of an input, and its rows for show: a sample, the longest, the shortest, those asked for."""

    input: int
    tally: Tally = field(default_factory=Tally)
    shown: dict[str, list[SampleRow]] = field(default_factory=dict)

    def add(self, rows: Sequence[SampleRow], options: ScanOptions) -> None:
        """Count a batch of usable rows of one file, and keep some for show."""
        parsed = [row.parsed() for row in rows]
        raws = [row.raw for row in rows if row.raw]
        lengths = count_rows(self.tally, parsed, raws, most_signed=options.most_signed)
        self.tally.sums["characters"] += sum(map(num_characters, parsed))
        wanted = options.wanted.get(rows[0].file, {})
        drawn = drawn_lines(np.array([row.line for row in rows], np.uint64), self.input, options.share)
        fits = np.array([row.can_be_shown for row in rows])
        chosen = {"loss": [i for i, row in enumerate(rows) if row.line in wanted] if wanted else []}
        for why, order in (("shortest", lengths), ("longest", -lengths)):
            first = np.argsort(order, kind="stable")  # of equal ones the earlier, in whatever batches rows come
            chosen[why] = first[fits[first]][:NUM_EXTREMES].tolist()
        chosen["random"] = np.flatnonzero(drawn & fits).tolist()
        for why, places in chosen.items():
            shown = self.shown.setdefault(why, [])
            for row, length in ((rows[i], int(lengths[i])) for i in places):
                parsed_row = None if row.raw else row.row  # a line is smaller than what was parsed from it
                nll = wanted[row.line] if why == "loss" else None
                shown.append(replace(row, row=parsed_row, why=why, characters=length, nll=nll))
            if why in ("shortest", "longest"):
                shown.sort(key=lambda row: row.characters, reverse=why == "longest")
                del shown[NUM_EXTREMES:]


def drawn_lines(numbers: np.ndarray, file: int, share: float) -> np.ndarray:
    """bool [N]: whether each line belongs to the sample, by file and line number alone."""
    if share >= 1:
        return np.ones(len(numbers), bool)
    mixed = (numbers + np.uint64(file) * np.uint64(2**40) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(31)) * np.uint64(0xD6E8FEB86659FD93)
    return (mixed ^ mixed >> np.uint64(32)) < np.uint64(share * 2**64)


def evenly(number: int, share: float) -> np.ndarray:
    """int64: about a share of 0 … number - 1, at least one of them."""
    return np.linspace(0, number - 1, min(number, max(1, round(number * share)))).astype(np.int64)


# --- rows of files


def scan_files(
    paths: Sequence[Path],
    options: ScanOptions,
    *,
    workers: int = 1,
    sha256s: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[PartScan]:
    """Measure files of one kind; the same parts and results for any number of workers. progress counts bytes.

    sha256s: what the files must be; nothing is measured if one is something else.
    """
    total = sum(path.stat().st_size for path in paths)
    entries, parts = plan(list(paths), max(PART_BYTES, total // MOST_PARTS))
    if sha256s is not None and [entry.sha256 for entry in entries] != list(sha256s):
        return []
    share = 1.0 if options.is_exact else min(1.0, SAMPLE_BYTES / max(total, 1))
    options = replace(options, share=share, most_signed=-(-ROWS_FOR_NEAR // max(len(parts), 1)))
    num_bytes = sum(part.num_bytes for part in parts)
    return engine.run(partial(_FileScanner, options), parts, total=num_bytes, workers=workers, progress=progress)


class _FileScanner:
    """Measures parts of files with one set of options; holds the encoder."""

    def __init__(self, options: ScanOptions):
        self._options = options
        self._encoder = self._vocabulary = None
        if options.tokenizer_dir:
            tokenizer = Tokenizer.load(options.tokenizer_dir)
            self._vocabulary, self._encoder = Vocabulary(tokenizer), RowEncoder(tokenizer, max_len=UNCUT)

    def __call__(self, part: Part, tick: Tick) -> PartScan:
        scanned = PartScan(part.input)
        reported = part.begin
        for lines in batches(part):
            self._measure(part, lines, scanned)
            done = min(lines[-1].offset + len(lines[-1].raw) + 1, part.begin + part.num_bytes)
            if done > reported:
                tick(done - reported)
                reported = done
        tick(part.begin + part.num_bytes - reported)
        scanned.tally.trim(*STRINGS)
        return scanned

    def _measure(self, part: Part, lines: Sequence[Line], scanned: PartScan) -> None:
        file, options = str(part.path), self._options
        left_out = options.left_out.get(file, frozenset())
        rows: list[SampleRow] = []
        extra_keys = scanned.tally.counters["extra_keys"]
        for line in lines:
            if line.number in left_out:
                continue
            try:
                row = parse_row(line.raw, options.kind, extra_keys=extra_keys)
            except BadRow as bad:
                set_aside(scanned.tally, line, bad, file)
            else:
                rows.append(SampleRow(file, line.number, line.raw, row))
        if self._encoder and rows:
            drawn = drawn_lines(np.array([row.line for row in rows], np.uint64), part.input, options.share)
            chosen = [row for row, is_drawn in zip(rows, drawn, strict=True) if is_drawn]
            bad = self._encode(chosen, scanned.tally)
            if options.share >= 1:  # all rows were encoded: those that cannot be are set aside
                raws = {line.number: line for line in lines}
                for i, reason in bad.items():
                    set_aside(scanned.tally, raws[rows[i].line], reason, file)
                rows = [row for i, row in enumerate(rows) if i not in bad]
        if rows:
            scanned.add(rows, options)

    def _encode(self, rows: Sequence[SampleRow], tally: Tally) -> Mapping[int, BadRow]:
        """Encode rows and count their tokens. Returns, by index, why rows cannot be encoded."""
        assert self._encoder and self._vocabulary
        parsed = [row.parsed() for row in rows]
        encoded = self._encoder.encode(parsed)
        characters = [num_characters(row) for i, row in enumerate(parsed) if i not in encoded.bad]
        tally.sums.update({"sampled_rows": len(characters), "sampled_characters": sum(characters)})
        if len(encoded.sequences):
            count_tokens(tally, flat_sequences(encoded.sequences), self._vocabulary)
        return encoded.bad


def scan_some(paths: Sequence[Path | None], dataset: shards.Dataset, share: float) -> list[PartScan]:
    """Measure about a share of a dataset's rows, read from its inputs at their offsets; nothing if an input is gone or
    compressed."""
    scanned = []
    for part in dataset.manifest.parts:
        if not part.kept:
            continue
        sources = shards.open_sources(dataset, part.part)
        path = paths[int(sources["file"][0])]
        if path is None or not is_seekable(path):
            return []
        scanned.append(PartScan(int(sources["file"][0])))
        if rows := list(_rows_at(path, dataset.kind, sources, evenly(part.kept, share))):
            scanned[-1].add(rows, ScanOptions(dataset.kind))
    return scanned


def _rows_at(path: Path, kind: str, sources: Mapping[str, Any], chosen: np.ndarray) -> Iterator[SampleRow]:
    """Single rows of a file, at the offsets that packing noted; those that the file no longer holds are left out."""
    with path.open("rb") as file:
        for i in chosen.tolist():
            file.seek(int(sources["offset"][i]))
            raw = file.readline().rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf")
            try:
                yield SampleRow(str(path), int(sources["line"][i]), raw, parse_row(raw, kind))
            except BadRow:
                continue


# --- rows decoded from shards


def scan_decoded(
    dataset: shards.Dataset,
    vocabulary: Vocabulary,
    *,
    share: float = 1.0,
    workers: int = 1,
    wanted: Losses | None = None,
    progress: Progress | None = None,
) -> list[PartScan]:
    """Measure the rows of a dataset, or about a share of them, decoded from its shards. progress counts rows."""
    parts = [part for part in dataset.manifest.parts if part.kept]
    num_bytes = sum(entry.bytes for entry in dataset.manifest.inputs)
    drawn = min(1.0, SAMPLE_BYTES / max(num_bytes, 1)) if share >= 1 else 1.0
    most_signed = -(-ROWS_FOR_NEAR // max(len(parts), 1))
    options = ScanOptions(dataset.kind, wanted=wanted or {}, share=drawn, most_signed=most_signed)
    total = sum(len(evenly(part.kept, share)) for part in parts)
    measure = partial(_measure_decoded, dataset, vocabulary, options, share)
    make = partial(partial, measure)  # make() is measure(part, tick)
    return engine.run(make, parts, total=total, workers=workers if share >= 1 else 1, progress=progress)


def _measure_decoded(
    dataset: shards.Dataset,
    vocabulary: Vocabulary,
    options: ScanOptions,
    share: float,
    part: PartRecord,
    tick: Tick,
) -> PartScan:
    """Measure the rows of one part."""
    rows, decoder = PartRows(dataset, part), RowDecoder(vocabulary, dataset.kind)
    scanned = PartScan(int(rows.sources["file"][0]))
    file = dataset.inputs[scanned.input]
    chosen = evenly(len(rows), share)
    for some in np.array_split(chosen, -(-len(chosen) // DECODED_ROWS)):
        encoded = [rows.encoded(i) for i in some.tolist()]
        lines = rows.sources["line"][some].tolist()
        decoded = [SampleRow(file, line, b"", decoder.row(one), one) for line, one in zip(lines, encoded, strict=True)]
        scanned.add(decoded, options)
        tick(len(some))
    scanned.tally.trim(*STRINGS)
    return scanned


# --- tokens of shards


def scan_shards(
    dataset: shards.Dataset,
    vocabulary: Vocabulary,
    *,
    share: float = 1.0,
    workers: int = 1,
) -> Tally:
    """Count the tokens of a dataset, or of about a share of its samples."""
    entries = dataset.manifest.shards
    total = sum(entry.tokens for entry in entries)
    workers = workers if share >= 1 and total > 2**25 else 1
    count = partial(_count_shard, dataset, vocabulary, share)
    make = partial(partial, count)  # make() is count(entry, tick)
    tally = Tally()
    for counted in engine.run(make, entries, total=total, workers=workers):
        tally.merge(counted)
    return tally


def _count_shard(
    dataset: shards.Dataset, vocabulary: Vocabulary, share: float, entry: ShardRecord, tick: Tick
) -> Tally:
    """Count the tokens of one shard."""
    tally, stretches = Tally(), max(1, STRETCHES // len(dataset.manifest.shards))
    for batch in dataset.open_shard(entry).batches:
        for columns in _slices(batch, entry.bucket, share, stretches):
            if dataset.kind == "pair":
                pairs = [shards.pair_view(columns, i) for i in range(len(columns["doc"]))]
                spans = [[span.reshape(-1, 2) for span in (p.chosen_span, p.rejected_span)] for p in pairs]
                sides = [PairSequence(p.prompt, p.chosen, p.rejected, *of) for p, of in zip(pairs, spans, strict=True)]
                count_tokens(tally, flat_sequences(sides), vocabulary)
            else:
                count_tokens(tally, _flat_packs(columns), vocabulary)
    tick(entry.tokens)
    return tally


def _slices(batch: dict[str, Any], bucket: int, share: float, stretches: int) -> Iterator[dict[str, Any]]:
    """A record batch as pieces of at most SLICE_TOKENS positions; with a share, the beginnings of that many stretches."""
    number = num_rows(batch)
    step = max(1, SLICE_TOKENS // bucket) if share >= 1 else max(1, -(-number // stretches))
    for begin in range(0, number, step):
        size = min(step, number - begin)
        end = begin + (size if share >= 1 else max(1, int(size * share)))
        yield {
            name: Ragged(column.values, column.offsets[begin : end + 1])
            if isinstance(column, Ragged)
            else column[begin:end]
            for name, column in batch.items()
        }


def _flat_packs(columns: dict[str, Any]) -> FlatSequences:
    """The sequences of packs, spans in flat positions."""

    def values(column: Ragged) -> np.ndarray:
        return column.values[column.offsets[0] : column.offsets[-1]]

    ids, span = columns["ids"], columns["span"]
    begins = ids.offsets[:-1].astype(np.int64) - ids.offsets[0]
    spans = values(span).astype(np.int64) + np.repeat(begins, span.lengths())
    return FlatSequences(values(ids), values(columns["doc_len"]).astype(np.int64), spans)
