"""Jsonl files or shards in, tallies of their rows and tokens out: one pass, in as many processes as asked, memory flat.

Rows are read from files, or, where a dataset's are gone, decoded from its shards. All text is measured. Tokens of a raw file are those of a sample of its rows, drawn by line, unless all are asked for:
tokenizing costs ten times as much as everything else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import nlargest, nsmallest
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import BadRow, Line, Row, is_seekable, iter_lines, num_characters, parse_row
from mmdata.encode.sequences import PairSequence, Sequences
from mmdata.io import workers as engine
from mmdata.io.arrow import Ragged, num_rows
from mmdata.io.workers import Tick
from mmdata.pack.part import Part, batches
from mmdata.pack.pipeline import plan
from mmdata.shards import dataset as shards
from mmdata.stats import measure
from mmdata.stats.decoded import Decoder, PartRows
from mmdata.stats.measure import RowTally
from mmdata.stats.token_tally import Flat, TokenTally, Vocabulary, flat_of
from mmdata.tokenizer.tokenizer import Tokenizer

UNCUT = 2**24  # a length limit that no row meets: figures of a file are those of its whole rows
PART_BYTES = 16 * 2**20
MOST_PARTS = 256
SAMPLE_BYTES = 12_000_000  # of rows that are tokenized, and read for repeated n-grams
NUM_EXTREMES = 6
RAW_KEPT = 2**17  # bytes; a longer row is no sample for show
SLICE_TOKENS = 2**21  # of a shard at once
STRETCHES = 32  # of all shards that a share is taken from
DECODED_ROWS = 2**11  # measured at once
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Shown:
    """A row kept for show: why, where it stands, its line, its length in characters."""

    why: str  # random, longest, shortest, loss
    file: str
    line: int
    raw: bytes
    characters: int
    nll: float | None = None
    row: Row | None = None  # where there is no line any more: the row, as decoded from these sequences
    encoded: Sequences | None = None

    def parsed(self) -> Row:
        """The row; BadRow when its line has become none."""
        return self.row or parse_row(self.raw)


@dataclass(frozen=True, slots=True)
class Settings:
    """How files are read. share: of rows that are sampled; wanted: lines to keep for show, by file."""

    kind: str
    tokenizer_dir: Path | None
    share: float
    rows_for_near: int
    wanted: dict[str, dict[int, float]] = field(default_factory=dict)
    left_out: dict[str, frozenset[int]] = field(default_factory=dict)  # by file: lines that are passed over


@dataclass(slots=True)
class PartScan:
    """What one part of a file came to. sampled: its sampled rows, how many and their characters."""

    input: int
    rows: RowTally
    tokens: TokenTally
    sampled_rows: int = 0
    sampled_characters: int = 0
    characters: int = 0  # as packing counts them
    sample: list[Shown] = field(default_factory=list)
    longest: list[Shown] = field(default_factory=list)
    shortest: list[Shown] = field(default_factory=list)
    wanted: list[Shown] = field(default_factory=list)


class _FileScanner:
    """Measures parts of files with one set of settings; holds the encoder."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._encoder = self._known = None
        if settings.tokenizer_dir:
            tokenizer = Tokenizer.load(settings.tokenizer_dir)
            self._known = Vocabulary(tokenizer)
            self._encoder = RowEncoder(tokenizer, max_len=UNCUT)

    def __call__(self, part: Part, tick: Tick) -> PartScan:
        found = PartScan(part.input, RowTally(most_signed=self._settings.rows_for_near), TokenTally())
        told = part.begin
        for lines in batches(iter_lines(part.path, part.begin, part.end, first_number=part.first_line)):
            self._measure(part, lines, found)
            last = lines[-1].offset + len(lines[-1].raw) + 1
            done = min(last, part.begin + part.num_bytes) - told
            if done > 0:
                tick(done)
                told += done
        tick(part.begin + part.num_bytes - told)
        found.rows.trim()
        return found

    def _measure(self, part: Part, lines: Sequence[Line], found: PartScan) -> None:
        good: list[tuple[Line, Row]] = []
        passed = self._settings.left_out.get(str(part.path), frozenset())
        for line in lines:
            if line.number in passed:
                continue
            try:
                good.append((line, parse_row(line.raw, self._settings.kind, extra_keys=found.rows.extra_keys)))
            except BadRow as bad:
                found.rows.set_aside(line, bad, str(part.path))
        if not good:
            return
        numbers = np.array([line.number for line, _ in good], np.uint64)
        drawn = drawn_lines(numbers, part.input, self._settings.share)
        if self._encoder and self._settings.share >= 1:
            good, drawn = self._encode(part, good, found), np.ones(len(good), bool)
        elif self._encoder:
            self._encode(part, [pair for pair, is_drawn in zip(good, drawn, strict=True) if is_drawn], found, True)
        if good:
            lengths = found.rows.add([row for _, row in good], [line.raw for line, _ in good])
            self._keep(part, [line for line, _ in good], lengths, drawn[: len(good)], found)
            if self._settings.kind == "conversation":  # what packing counts is what was measured
                found.characters += int(lengths.sum())
            else:
                found.characters += sum(num_characters(row) for _, row in good)

    def _encode(
        self, part: Part, good: Sequence[tuple[Line, Row]], found: PartScan, is_sample: bool = False
    ) -> list[tuple[Line, Row]]:
        """Count the tokens of rows; those that cannot be encoded are set aside, unless they are a sample of all."""
        assert self._encoder and self._known
        encoded = self._encoder.encode([row for _, row in good])
        kept = [pair for i, pair in enumerate(good) if i not in encoded.bad]
        for i, bad in encoded.bad.items() if not is_sample else ():
            found.rows.set_aside(good[i][0], bad, str(part.path))
        if len(encoded.sequences):
            add_sequences(found.tokens, list(encoded.sequences), self._known)
        found.sampled_rows += len(kept)
        found.sampled_characters += sum(num_characters(row) for _, row in kept)
        return kept

    def _keep(self, part: Part, lines: Sequence[Line], lengths: np.ndarray, drawn: np.ndarray, found: PartScan) -> None:
        def shown(i: int, why: str) -> Shown:
            return Shown(why, str(part.path), lines[i].number, lines[i].raw, int(lengths[i]))

        fits = np.array([len(line.raw) <= RAW_KEPT for line in lines])
        wanted = self._settings.wanted.get(str(part.path), {})
        losses = {i: wanted[line.number] for i, line in enumerate(lines) if line.number in wanted} if wanted else {}
        keep(found, shown, lengths, drawn, fits, losses)


def keep(
    found: PartScan,
    shown: Callable[[int, str], Shown],
    lengths: np.ndarray,
    drawn: np.ndarray,
    fits: np.ndarray,
    losses: Mapping[int, float],
) -> None:
    """Keep of a batch of rows the drawn ones, the longest and shortest that fit, and those asked for, with their nll."""
    found.sample += [shown(i, "random") for i in np.flatnonzero(drawn & fits).tolist()]
    up, down = (order[fits[order]].tolist() for order in (_stable_order(lengths), _stable_order(-lengths)))
    shortest = [shown(i, "shortest") for i in up[:NUM_EXTREMES]]
    longest = [shown(i, "longest") for i in down[:NUM_EXTREMES]]
    found.shortest = nsmallest(NUM_EXTREMES, found.shortest + shortest, key=_by_length)
    found.longest = nlargest(NUM_EXTREMES, found.longest + longest, key=_by_length)
    found.wanted += [replace(shown(i, "loss"), nll=nll) for i, nll in losses.items()]


def _stable_order(values: np.ndarray) -> np.ndarray:
    """The earlier of equal ones first, so that it does not matter how rows lie in batches."""
    return np.argsort(values, kind="stable")


def _by_length(shown: Shown) -> int:
    return shown.characters


def drawn_lines(numbers: np.ndarray, file: int, share: float) -> np.ndarray:
    """bool [N]: whether each line belongs to the sample; by file and line number alone, whoever reads it."""
    if share >= 1:
        return np.ones(len(numbers), bool)
    mixed = (numbers + np.uint64(file) * np.uint64(2**40) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(31)) * np.uint64(0xD6E8FEB86659FD93)
    return (mixed ^ mixed >> np.uint64(32)) < np.uint64(share * 2**64)


def add_sequences(tally: TokenTally, sequences: Sequence[Any], known: Vocabulary) -> None:
    """Count encoded sequences, all of one kind."""
    prompts = None
    if isinstance(sequences[0], PairSequence):
        prompts = np.array([len(pair.prompt) for pair in sequences], np.int64)
    tally.add(flat_of(sequences), known, pair_prompts=prompts)


def scan_files(
    paths: Sequence[Path],
    kind: str,
    tokenizer_dir: Path | None,
    *,
    is_exact: bool = False,
    workers: int = 1,
    wanted: dict[str, dict[int, float]] | None = None,
    left_out: dict[str, frozenset[int]] | None = None,
    sha256s: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> list[PartScan]:
    """Measure files of one kind; the same parts and results for any number of workers. progress counts bytes.

    is_exact: tokenize every row, not a sample. wanted: for each file lines to keep for show, with their nll. left_out:
    lines that are passed over. sha256s: what the files must be; nothing is measured when one is something else.
    """
    total = sum(path.stat().st_size for path in paths)
    entries, parts = plan(list(paths), max(PART_BYTES, total // MOST_PARTS))
    if sha256s is not None and [entry["sha256"] for entry in entries] != list(sha256s):
        return []
    share = 1.0 if is_exact else min(1.0, SAMPLE_BYTES / max(total, 1))
    rows_for_near = -(-measure.ROWS_FOR_NEAR // max(len(parts), 1))
    settings = Settings(kind, tokenizer_dir, share, rows_for_near, wanted or {}, left_out or {})
    num_bytes = sum(part.num_bytes for part in parts)
    return engine.run(partial(_FileScanner, settings), parts, total=num_bytes, workers=workers, progress=progress)


def scan_some(paths: Sequence[Path | None], dataset: shards.Dataset, share: float) -> list[PartScan]:
    """Measure about a share of a dataset's rows, found in its inputs by their offsets; nothing where an input is gone or
    compressed."""
    found = []
    for part in dataset.manifest["parts"]:
        if not part["kept"]:
            continue
        sources = shards.open_sources(dataset, part["part"])
        path = paths[int(sources["file"][0])]
        if path is None or not is_seekable(path):
            return []
        found.append(_read_rows(path, dataset.kind, sources, evenly(part["kept"], share)))
    return found


def evenly(number: int, share: float) -> np.ndarray:
    """int64: about a share of 0 … number - 1, at least one of them."""
    return np.linspace(0, number - 1, min(number, max(1, round(number * share)))).astype(np.int64)


def _read_rows(path: Path, kind: str, sources: Mapping[str, Any], chosen: np.ndarray) -> PartScan:
    """Measure single rows of a part, found by their offsets."""
    part = PartScan(int(sources["file"][0]), RowTally(), TokenTally())
    good: list[Row] = []
    lines: list[tuple[int, bytes]] = []
    with path.open("rb") as file:
        for i in chosen.tolist():
            file.seek(int(sources["offset"][i]))
            raw = file.readline().rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf")
            try:
                good.append(parse_row(raw, kind))
            except BadRow:
                continue  # the file was changed, and kept its size
            lines.append((int(sources["line"][i]), raw))
    if good:
        lengths = part.rows.add(good, [raw for _, raw in lines])

        def shown(i: int, why: str) -> Shown:
            return Shown(why, str(path), *lines[i], int(lengths[i]))

        fits = np.array([len(raw) <= RAW_KEPT for _, raw in lines])
        keep(part, shown, lengths, np.ones(len(lines), bool), fits, {})
    return part


# --- rows decoded from shards


class _PartDecoder:
    """Measures the rows of parts of a dataset as its shards tell them."""

    def __init__(self, dataset: shards.Dataset, known: Vocabulary, settings: Settings, share: float):
        self._dataset, self._known, self._settings, self._share = dataset, known, settings, share
        self._decoder = Decoder(known, dataset.kind)

    def __call__(self, part: dict[str, Any], tick: Tick) -> PartScan:
        rows = PartRows(self._dataset, part)
        input = int(rows.sources["file"][0])
        found = PartScan(input, RowTally(most_signed=self._settings.rows_for_near), TokenTally())
        chosen = evenly(len(rows), self._share)
        for some in np.array_split(chosen, -(-len(chosen) // DECODED_ROWS)):
            self._measure(rows, some, found)
            tick(len(some))
        found.rows.trim()
        return found

    def _measure(self, rows: PartRows, chosen: np.ndarray, found: PartScan) -> None:
        file, lines = self._dataset.inputs[found.input], rows.sources["line"][chosen]
        encoded = [rows.encoded(i) for i in chosen.tolist()]
        decoded = [self._decoder.row(one) for one in encoded]
        lengths = found.rows.add(decoded)
        found.characters += sum(map(num_characters, decoded))

        def shown(i: int, why: str) -> Shown:
            return Shown(why, file, int(lines[i]), b"", int(lengths[i]), row=decoded[i], encoded=encoded[i])

        drawn = drawn_lines(lines.astype(np.uint64), found.input, self._settings.share)
        fits = np.array([one.lengths.sum() <= RAW_KEPT // 4 for one in encoded])
        wanted = self._settings.wanted.get(file, {})
        losses = {i: wanted[line] for i, line in enumerate(lines.tolist()) if line in wanted} if wanted else {}
        keep(found, shown, lengths, drawn, fits, losses)


def scan_decoded(
    dataset: shards.Dataset,
    known: Vocabulary,
    *,
    share: float = 1.0,
    workers: int = 1,
    wanted: dict[str, dict[int, float]] | None = None,
    progress: Progress | None = None,
) -> list[PartScan]:
    """Measure the rows of a dataset, or about a share of them, decoded from its shards. progress counts rows."""
    parts = [part for part in dataset.manifest["parts"] if part["kept"]]
    num_bytes = sum(entry["bytes"] for entry in dataset.manifest["inputs"])
    sampled = min(1.0, SAMPLE_BYTES / max(num_bytes, 1)) if share >= 1 else 1.0
    rows_for_near = -(-measure.ROWS_FOR_NEAR // max(len(parts), 1))
    settings = Settings(dataset.kind, None, sampled, rows_for_near, wanted or {})
    total = sum(len(evenly(part["kept"], share)) for part in parts)
    make = partial(_PartDecoder, dataset, known, settings, share)
    return engine.run(make, parts, total=total, workers=workers if share >= 1 else 1, progress=progress)


# --- tokens of shards


class _ShardScanner:
    """Counts the tokens of shards of one dataset."""

    def __init__(self, dataset: shards.Dataset, known: Vocabulary, share: float):
        self._dataset, self._known = dataset, known
        self._share, self._stretches = share, max(1, STRETCHES // len(dataset.manifest["shards"]))

    def __call__(self, entry: dict[str, Any], tick: Tick) -> TokenTally:
        tally = TokenTally()
        for batch in self._dataset.open_shard(entry).batches:
            for columns in _slices(batch, entry["bucket"], self._share, self._stretches):
                if self._dataset.kind == "pair":
                    flat, prompts = flat_pairs(columns)
                    tally.add(flat, self._known, pair_prompts=prompts)
                else:
                    tally.add(flat_packs(columns), self._known)
        tick(entry["tokens"])
        return tally


def scan_shards(
    dataset: shards.Dataset,
    known: Vocabulary,
    *,
    share: float = 1.0,
    workers: int = 1,
    progress: Progress | None = None,
) -> TokenTally:
    """Count the tokens of a dataset, or of about a share of its samples. progress counts tokens."""
    entries = dataset.manifest["shards"]
    workers = workers if share >= 1 and sum(entry["tokens"] for entry in entries) > 2**25 else 1
    total = TokenTally()
    for tally in engine.run(
        partial(_ShardScanner, dataset, known, share),
        entries,
        total=sum(entry["tokens"] for entry in entries),
        workers=workers,
        progress=progress,
    ):
        total.merge(tally)
    return total


def _slices(batch: dict[str, Any], bucket: int, share: float, stretches: int) -> Iterator[dict[str, Any]]:
    """A record batch as pieces of at most SLICE_TOKENS positions; with a share, the beginnings of that many stretches."""
    number = num_rows(batch)
    step = max(1, SLICE_TOKENS // bucket)
    if share < 1:
        step = max(1, -(-number // stretches))
    for begin in range(0, number, step):
        size = min(step, number - begin)
        end = begin + (size if share >= 1 else max(1, int(size * share)))
        yield {
            name: Ragged(column.values, column.offsets[begin : end + 1])
            if isinstance(column, Ragged)
            else column[begin:end]
            for name, column in batch.items()
        }


def _values(column: Ragged) -> np.ndarray:
    return column.values[column.offsets[0] : column.offsets[-1]]


def flat_packs(columns: dict[str, Any]) -> Flat:
    """The sequences of packs, spans in flat positions."""
    ids, span = columns["ids"], columns["span"]
    begins = ids.offsets[:-1].astype(np.int64) - ids.offsets[0]
    spans = _values(span).astype(np.int64) + np.repeat(begins, span.lengths())
    return Flat(_values(ids), _values(columns["doc_len"]).astype(np.int64), spans)


def flat_pairs(columns: dict[str, Any]) -> tuple[Flat, np.ndarray]:
    """The sides of pairs as sequences with their prompts, and the prompts' lengths."""
    pairs = [shards.pair_view(columns, i) for i in range(len(columns["doc"]))]
    sequences = [
        PairSequence(p.prompt, p.chosen, p.rejected, p.chosen_span.reshape(-1, 2), p.rejected_span.reshape(-1, 2))
        for p in pairs
    ]
    return flat_of(sequences), np.array([len(pair.prompt) for pair in pairs], np.int64)
