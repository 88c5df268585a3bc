"""Read jsonl files or the shards of a dataset once, in one or several processes, and measure their rows and tokens.

Rows are read from files or, if the inputs of a dataset are missing, decoded from its shards. The text of all rows is
measured, the tokens of a jsonl file in a sample by line number, unless all are requested: tokenizing takes ten times as
long as everything else. The number of processes does not change the results.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import DEFAULT_COLUMNS, NOT_SELECTED, BadRow, Columns, Row, num_characters, parse_row
from mmdata.encode.sequences import Sequences, reorder
from mmdata.encode.validate import control_strings
from mmdata.io.arrow import ArrowFile, BatchColumns, Ragged, num_rows
from mmdata.io.files import Progress, no_progress
from mmdata.io.lines import JSONL, FileFormat, Line, format_of
from mmdata.io.options import DEFAULT_READING, ReadOptions
from mmdata.io.workers import Tick, run_jobs
from mmdata.pack.filter.features import ANSWERS, RowBatch, conversation_of, tool_name
from mmdata.pack.filter.grams import shingles, signatures
from mmdata.pack.inputs import plan
from mmdata.pack.part import Part, batches
from mmdata.shards.columns import read_back
from mmdata.shards.dataset import Dataset, PartRows, open_sources
from mmdata.shards.manifest import PartRecord, ShardRecord
from mmdata.stats.decoded import RowDecoder
from mmdata.stats.tally import NUM_EXAMPLES, Tally
from mmdata.stats.tokens import ROLES, Vocabulary, count_tokens, with_turns
from mmdata.tokenizer.tokenizer import Tokenizer

UNCUT = 2**24  # length limit, in tokens, that no row reaches: the rows of a file are measured without cutting them
PART_BYTES = 16 * 2**20  # size of the parts into which files are split, or more if there would be too many parts
MOST_PARTS = 256  # parts of all files together, about
SAMPLE_BYTES = 12_000_000  # size of the sample of rows that is tokenized and searched for repeated phrases
ROWS_FOR_NEAR = 2_000_000  # rows that get a MinHash signature, to find near duplicates: 64 MB
NUM_EXTREMES = 6  # rows that are shown as the longest, as the shortest, and as those of highest loss
RAW_KEPT = 2**17  # bytes; a row with a longer line is never shown
RAW_SHOWN = 600  # bytes of a left-out row that the report shows
OPENING = 20  # characters at the beginning of a document or answer that are counted as its opening
SLICE_TOKENS = 2**21  # tokens (with padding) of a shard that are counted at once
STRETCHES = 32  # ranges of samples, over all shards, at whose beginnings a sample of the tokens is read
DECODED_ROWS = 2**11  # decoded rows that are counted at once
# The columns of rows that figures are computed from; pairs have those of PAIR_COLUMNS, too.
COLUMNS = ("language", "turns", "has_system", "has_tools", "tool_calls", "reasoning_messages")
PAIR_COLUMNS = ("chosen_characters", "rejected_characters", "similarity")
Losses = Mapping[str, Mapping[int, float]]  # mean loss of a row in nats per token, by file and line number


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of an input, which may be shown in the report. file, line: path of the input and line number, from 1.
    raw: the line; empty if the row was decoded from shards. row: parsed; None if it is to be parsed from `raw`, as
    `kind` and `columns` say. encoded: the token sequences of a row decoded from shards. why: it is shown: "random",
    "longest", "shortest" or "loss"; "" if not. characters: length of its text. nll: mean loss in nats per token, for
    "loss"."""

    file: str
    line: int
    raw: bytes
    row: Row | None = None
    encoded: Sequences | None = None
    why: str = ""
    characters: int = 0
    nll: float | None = None
    kind: str | None = None
    columns: Columns = DEFAULT_COLUMNS

    def parsed(self) -> Row:
        """Return the parsed row. Raise BadRow if it must be parsed from `raw` and that fails."""
        return self.row or parse_row(self.raw, self.kind, columns=self.columns)

    @property
    def can_be_shown(self) -> bool:
        """Return whether the row is at most RAW_KEPT bytes or, decoded from shards, RAW_KEPT / 4 tokens long."""
        return len(self.raw) <= RAW_KEPT and (self.encoded is None or self.encoded.lengths.sum() <= RAW_KEPT // 4)


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """How the rows of files are read and counted. `scan_files` sets `share` and `most_signed`. kind: rows of another
    kind are left out. tokenizer_dir: None to count no tokens. is_exact: tokenize all rows instead of a sample. wanted:
    rows to show, with their loss, by file and line number. left_out: line numbers to skip, by file. not_selected: those
    to leave out because the condition `where` does not hold. share: of the rows in the sample, 0 to 1. most_signed:
    rows of a part with MinHash signatures at most. read: how the files are read."""

    kind: str
    tokenizer_dir: Path | None = None
    is_exact: bool = False
    wanted: Losses = field(default_factory=dict)
    left_out: Mapping[str, frozenset[int]] = field(default_factory=dict)
    not_selected: frozenset[int] = frozenset()
    where: str = ""
    share: float = 1.0
    most_signed: int = ROWS_FOR_NEAR
    read: ReadOptions = DEFAULT_READING


@dataclass(slots=True)
class PartScan:
    """What was measured of one part (a byte range of an input), and its rows that the report may show. input: number of
    the input, from 0. shown: rows by reason, see `SampleRow.why`."""

    input: int
    tally: Tally = field(default_factory=Tally)
    shown: dict[str, list[SampleRow]] = field(default_factory=dict)

    def add(self, rows: Sequence[SampleRow], options: ScanOptions) -> None:
        """Measure a batch of valid rows, all of one file, and store those of them that the report may show."""
        batch = RowBatch([row.parsed() for row in rows], [row.raw for row in rows if row.raw])
        numbers = np.array([row.line for row in rows], np.uint32)
        _measure_rows(self.tally, batch, options, {"input": pl.lit(self.input, pl.UInt32), "line": pl.Series(numbers)})
        lengths = batch.lengths
        wanted = options.wanted.get(rows[0].file, {})
        drawn = drawn_lines(numbers.astype(np.uint64), self.input, options.share)
        fits = np.array([row.can_be_shown for row in rows])
        chosen = {"loss": [i for i, row in enumerate(rows) if row.line in wanted] if wanted else []}
        for why, order in (("shortest", lengths), ("longest", -lengths)):
            # Among rows of equal length the earlier ones are taken, so that the result does not depend on the batches.
            first = np.argsort(order, kind="stable")
            chosen[why] = first[fits[first]][:NUM_EXTREMES].tolist()
        chosen["random"] = np.flatnonzero(drawn & fits).tolist()
        for why, places in chosen.items():
            shown = self.shown.setdefault(why, [])
            for row, length in ((rows[i], int(lengths[i])) for i in places):
                parsed_row = None if row.raw else row.row  # a line takes less memory than the row parsed from it
                nll = wanted[row.line] if why == "loss" else None
                shown.append(replace(row, row=parsed_row, why=why, characters=length, nll=nll))
            if why in ("shortest", "longest"):
                shown.sort(key=lambda row: row.characters, reverse=why == "longest")
                del shown[NUM_EXTREMES:]


def _measure_rows(tally: Tally, batch: RowBatch, options: ScanOptions, place: Mapping[str, Any]) -> None:
    """Add the columns of a batch's rows and texts to the frames "rows" and "texts", count strings and scripts, and
    append MinHash signatures, unless the tally has enough. place: more columns."""
    num = len(batch.rows)
    tally.sums.update({"rows": num, "kept": num, "bytes": sum(map(len, batch.raws))})
    tally.sums["characters"] += sum(map(num_characters, batch.rows))
    for row, raw in zip(batch.rows, batch.raws, strict=False):
        if strings := control_strings(raw, row):
            tally.counters["control_strings"].update(strings)
            tally.sums["rows_with_control"] += 1
    is_signed = tally.sums["signed"] < options.most_signed
    rows = batch.columns([*COLUMNS, *(PAIR_COLUMNS if options.kind == "pair" else ())])
    more = {
        **place,
        "length": pl.Series(batch.lengths, dtype=pl.UInt32),
        "hash": pl.Series(batch.hashes()),
        "is_signed": pl.lit(is_signed),
    }
    tally.frames["rows"].append(rows.with_columns(pl.selectors.integer().cast(pl.UInt32), **more))
    texts = with_turns(batch.pieces.select("row", "characters", pl.col("role").cast(ROLES)), "row")
    tally.frames["texts"].append(texts.select("role", "turn", "characters"))
    opens = (text[: 2 * OPENING] for of_row in batch.texts for role, text in of_row if role in ANSWERS)
    tally.count("opening", (" ".join(text.split())[:OPENING] for text in opens))
    tally.add("scripts", batch.script_counts.sum(axis=0))
    if is_signed:
        entries = signatures(*shingles(batch.points, batch.lengths), num)
        tally.frames["signatures"].append(pl.DataFrame({"entries": entries}))
        tally.sums["signed"] += num
    if options.kind != "document":
        conversations = list(map(conversation_of, batch.rows))
        systems = (
            m.content for each in conversations for m in each.messages if m.role == "system" and m.content.strip()
        )
        tally.count("system", (content[:200] for content in systems))
        tally.count("tool", (tool_name(tool) for each in conversations for tool in each.tools))


def drawn_lines(numbers: np.ndarray, file: int, share: float) -> np.ndarray:
    """Return whether each line belongs to the sample, by file and line number alone: bool [N]. numbers: uint64 [N].
    file: number of the input. share: of lines to select, 0 to 1."""
    if share >= 1:
        return np.ones(len(numbers), bool)
    mixed = (numbers + np.uint64(file) * np.uint64(2**40) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(31)) * np.uint64(0xD6E8FEB86659FD93)
    return (mixed ^ mixed >> np.uint64(32)) < np.uint64(share * 2**64)


def evenly(number: int, share: float) -> np.ndarray:
    """Return about a share (0 to 1) of the integers 0 … number - 1, at least one if any, evenly spaced: int64."""
    return np.linspace(0, number - 1, min(number, max(1, round(number * share)))).astype(np.int64)


# --- rows of files


def scan_files(
    paths: Sequence[Path],
    options: ScanOptions,
    *,
    workers: int = 1,
    sha256s: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> list[PartScan]:
    """Count the rows of files of one kind, and their tokens if the options name a tokenizer. Return one scan per part,
    whatever `workers` is. sha256s: expected hashes of the files; if one differs, the result is empty. progress: called
    with the bytes read and in all."""
    total = sum(path.stat().st_size for path in paths)
    entries, parts = plan(list(paths), max(PART_BYTES, total // MOST_PARTS), options.read)
    if sha256s is not None and [entry.sha256 for entry in entries] != list(sha256s):
        return []
    share = 1.0 if options.is_exact else min(1.0, SAMPLE_BYTES / max(total, 1))
    options = replace(options, share=share, most_signed=-(-ROWS_FOR_NEAR // max(len(parts), 1)))
    num_bytes = sum(part.num_bytes for part in parts)
    return run_jobs(partial(_FileScanner, options), parts, total=num_bytes, workers=workers, progress=progress)


class _FileScanner:
    """Counts the rows of parts of files. Each process has one instance, which loads the tokenizer once."""

    def __init__(self, options: ScanOptions):
        self._options = options
        self._columns = Columns.parse(options.read.mapping)
        self._encoder = self._vocabulary = None
        if options.tokenizer_dir:
            tokenizer = Tokenizer.load(options.tokenizer_dir)
            self._vocabulary, self._encoder = Vocabulary(tokenizer), RowEncoder(tokenizer, max_len=UNCUT)

    def __call__(self, part: Part, tick: Tick) -> PartScan:
        """Count the rows of one part. `tick(n)` is called when n more bytes have been read."""
        scanned = PartScan(part.input)
        reported = 0
        for lines in batches(part):
            self._measure(part, lines, scanned)
            done = part.bytes_done(lines[-1])
            tick(done - reported)
            reported = done
        tick(part.num_bytes - reported)
        scanned.tally.counters["unused_columns"].update(self._columns.unused)
        scanned.tally.trim()
        return scanned

    def _measure(self, part: Part, lines: Sequence[Line], scanned: PartScan) -> None:
        """Parse a batch of lines and count the rows in `scanned`, with the tokens of those in the sample. Invalid rows
        are counted as left out; rows that cannot be encoded only if all are encoded, since the number would depend on
        the sample."""
        file, options = str(part.path), self._options
        left_out = options.left_out.get(file, frozenset())
        rows: list[SampleRow] = []
        extra_keys, columns = scanned.tally.counters["extra_keys"], self._columns
        for line in lines:
            if line.number in left_out:
                continue
            try:
                if line.number in options.not_selected:
                    raise BadRow(NOT_SELECTED, options.where)
                row = parse_row(line.raw, options.kind, extra_keys=extra_keys, columns=columns)
            except BadRow as bad:
                _set_aside(scanned.tally, line, bad, file)
            else:
                rows.append(SampleRow(file, line.number, line.raw, row, kind=options.kind, columns=columns))
        if self._encoder and rows:
            drawn = drawn_lines(np.array([row.line for row in rows], np.uint64), part.input, options.share)
            chosen = [row for row, is_drawn in zip(rows, drawn, strict=True) if is_drawn]
            bad = self._encode(chosen, scanned.tally)
            if options.share >= 1:  # all rows were encoded: those that cannot be are set aside
                raws = {line.number: line for line in lines}
                for i, reason in bad.items():
                    _set_aside(scanned.tally, raws[rows[i].line], reason, file)
                rows = [row for i, row in enumerate(rows) if i not in bad]
        if rows:
            scanned.add(rows, options)

    def _encode(self, rows: Sequence[SampleRow], tally: Tally) -> Mapping[int, BadRow]:
        """Encode rows and count their tokens. Return why rows cannot be encoded, by their index in `rows`."""
        assert self._encoder and self._vocabulary
        parsed = [row.parsed() for row in rows]
        encoded = self._encoder.encode(parsed)
        characters = [num_characters(row) for i, row in enumerate(parsed) if i not in encoded.bad]
        tally.sums.update({"sampled_rows": len(characters), "sampled_characters": sum(characters)})
        tally.sums.update({"text_bytes": encoded.text_bytes, "unknown_bytes": encoded.unknown_bytes})
        tally.counters["not_written"] += encoded.not_written
        if len(encoded.sequences):
            count_tokens(tally, encoded.sequences, self._vocabulary)
        return encoded.bad


def _set_aside(tally: Tally, line: Line, bad: BadRow, file: str) -> None:
    """Count a row that is left out, by reason; the first NUM_EXAMPLES of each reason become examples."""
    tally.sums["rows"] += 1
    tally.counters["left_out"][bad.reason] += 1
    examples = tally.examples.setdefault(bad.reason, [])
    if len(examples) < NUM_EXAMPLES:
        raw = line.raw[:RAW_SHOWN].decode("utf-8", errors="replace")
        examples.append({"file": file, "line": line.number, "detail": bad.detail, "raw": raw})


def scan_some(paths: Sequence[Path | None], dataset: Dataset, rows: Mapping[int, np.ndarray]) -> list[PartScan]:
    """Count some rows of a dataset, read from its inputs at their byte offsets, a scan per part; none if an input is
    missing, compressed or not jsonl. paths: of inputs, None if missing. rows: indices of the rows, by part."""
    scanned = []
    for part in dataset.parts:
        if not part.kept:
            continue
        sources = open_sources(dataset, part.part)
        path = paths[int(sources["file"][0])]
        if path is None or format_of(path, dataset.manifest.arguments.reading) != FileFormat(JSONL, True):
            return []
        scanned.append(PartScan(int(sources["file"][0])))
        if found := list(_rows_at(path, dataset, sources, rows[part.part])):
            scanned[-1].add(found, ScanOptions(dataset.kind))
    return scanned


def _rows_at(path: Path, dataset: Dataset, sources: Mapping[str, Any], chosen: np.ndarray) -> Iterator[SampleRow]:
    """Yield the valid rows of an input at the byte offsets that packing recorded. sources: the provenance columns of a
    part. chosen: indices into these columns."""
    kind, columns = dataset.kind, dataset.manifest.arguments.columns
    with path.open("rb") as file:
        for i in chosen.tolist():
            file.seek(int(sources["offset"][i]))
            raw = file.readline().rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf")
            try:
                row = parse_row(raw, kind, columns=columns)
                yield SampleRow(str(path), int(sources["line"][i]), raw, row, kind=kind, columns=columns)
            except BadRow:
                continue


# --- rows decoded from shards


def scan_decoded(
    dataset: Dataset,
    vocabulary: Vocabulary,
    rows: Mapping[int, np.ndarray],
    *,
    workers: int = 1,
    wanted: Losses | None = None,
    progress: Progress = no_progress,
) -> list[PartScan]:
    """Count rows of a dataset, decoded from its shards, a scan per part. rows: indices of the rows, by part. wanted:
    rows to show, with their loss. progress: called with the rows decoded and to decode."""
    parts = [part for part in dataset.parts if part.kept and len(rows[part.part])]
    total = sum(len(rows[part.part]) for part in parts)
    num_bytes = sum(entry.bytes for entry in dataset.manifest.inputs) * total / max(dataset.manifest.totals.kept, 1)
    drawn = min(1.0, SAMPLE_BYTES / max(num_bytes, 1))
    most_signed = -(-ROWS_FOR_NEAR // max(len(parts), 1))
    options = ScanOptions(dataset.kind, wanted=wanted or {}, share=drawn, most_signed=most_signed)
    measure = partial(_measure_decoded, dataset, vocabulary, options, rows)
    make = partial(partial, measure)  # make() returns a function that is called as measure(part, tick)
    return run_jobs(make, parts, total=total, workers=workers, progress=progress)


def _measure_decoded(
    dataset: Dataset,
    vocabulary: Vocabulary,
    options: ScanOptions,
    chosen_rows: Mapping[int, np.ndarray],
    part: PartRecord,
    tick: Tick,
) -> PartScan:
    """Decode and count rows of one part. `tick(n)` is called when n more rows have been counted."""
    rows, decoder = PartRows(dataset, part), RowDecoder(vocabulary, dataset.kind)
    scanned = PartScan(int(rows.sources["file"][0]))
    file = dataset.inputs[scanned.input]
    chosen = chosen_rows[part.part]
    for some in np.array_split(chosen, -(-len(chosen) // DECODED_ROWS)):
        encoded = [rows.encoded(i) for i in some.tolist()]
        lines = rows.sources["line"][some].tolist()
        decoded = [SampleRow(file, line, b"", decoder.row(one), one) for line, one in zip(lines, encoded, strict=True)]
        scanned.add(decoded, options)
        tick(len(some))
    scanned.tally.trim()
    return scanned


# --- tokens of shards


def scan_shards(
    dataset: Dataset,
    vocabulary: Vocabulary,
    rows: Mapping[int, np.ndarray] | None = None,
    *,
    share: float = 1.0,
    workers: int = 1,
) -> Tally:
    """Count the tokens of a dataset, or of about a share of its samples, from its shards. A share below 1, or at most
    2^25 tokens, is read in this process, whatever `workers` is. rows: indices of the rows to count, by part; None for
    all."""
    entries = dataset.shards()
    total = sum(entry.tokens for entry in entries)
    workers = workers if share >= 1 and total > 2**25 else 1
    stretches = max(1, STRETCHES // max(1, len(entries)))
    count = partial(_count_shard, dataset, vocabulary, rows, share, stretches)
    make = partial(partial, count)  # make() returns a function that is called as count(entry, tick)
    tally = Tally()
    for counted in run_jobs(make, entries, total=total, workers=workers):
        tally.merge(counted)
    return tally


def _count_shard(
    dataset: Dataset,
    vocabulary: Vocabulary,
    rows: Mapping[int, np.ndarray] | None,
    share: float,
    stretches: int,
    entry: ShardRecord,
    tick: Tick,
) -> Tally:
    """Count the tokens of a shard, or of a share of its samples in so many `stretches`. `tick` is called once, with all
    the shard's tokens."""
    tally = Tally()
    first = open_sources(dataset, entry.part)["first"] if rows is not None else None
    for batch in dataset.open_shard(*entry.key).batches:
        for columns in _slices(batch, entry.bucket, share, stretches):
            ordinals, sequences = read_back(ArrowFile({}, (columns,)), dataset.kind)
            if rows is not None and first is not None:
                is_chosen = np.isin(np.searchsorted(first, ordinals, "right") - 1, rows[entry.part])
                sequences = reorder(sequences, np.flatnonzero(is_chosen))
            if len(sequences):
                count_tokens(tally, sequences, vocabulary)
    tick(entry.tokens)
    return tally


def _slices(batch: BatchColumns, bucket: int, share: float, stretches: int) -> Iterator[BatchColumns]:
    """Yield views of a record batch of at most SLICE_TOKENS positions. With a share below 1, they are the first samples
    of `stretches` ranges, at least one of each. bucket: padded length of a sample."""
    number = num_rows(batch)
    step = max(1, SLICE_TOKENS // bucket) if share >= 1 else max(1, -(-number // stretches))
    for begin in range(0, number, step):
        size = min(step, number - begin)
        end = begin + (size if share >= 1 else max(1, int(size * share)))
        yield {name: _rows_of(column, begin, end) for name, column in batch.items()}


def _rows_of(column: np.ndarray | Ragged, begin: int, end: int) -> np.ndarray | Ragged:
    """Return a view of rows `begin` to `end` (exclusive) of a column."""
    if not isinstance(column, Ragged):
        return column[begin:end]
    return Ragged(column.rows(begin, end), column.offsets[begin : end + 1] - column.offsets[begin])
