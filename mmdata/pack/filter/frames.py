"""Read files into polars frames of the columns of their rows, part by part, in any number of processes."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import BadRow, Columns, Row, parse_row, row_hash, texts_of
from mmdata.errors import UsageError
from mmdata.io.files import Progress, no_progress
from mmdata.io.lines import Line
from mmdata.io.workers import Tick
from mmdata.pack.filter.dedup import BANDS, Excluded, band_hashes, check_options, first_of_equal, first_of_near
from mmdata.pack.filter.features import COLUMNS, EXACT, NEAR, TOKENS, RowBatch, schema
from mmdata.pack.part import Part, batches
from mmdata.shards.manifest import PackArguments
from mmdata.tokenizer.tokenizer import Tokenizer

UNCUT = 2**24  # length limit, in tokens, that no row reaches
OVERLAPS = "overlaps"
_KEYS, _BANDS = "keys", "bands"  # of rows: what equal and nearly equal rows have in common
Run = Callable[..., list[Any]]  # calls `workers.run_jobs`


@dataclass(frozen=True, slots=True)
class RowReader:
    """How the rows of files are read. names: of `COLUMNS` to compute. tokenizer_dir, arguments: the tokenizer and how
    `mm pack` uses it, for columns of tokens. exclude: files with whose texts a row overlaps, by the column OVERLAPS."""

    kind: str
    names: tuple[str, ...]
    tokenizer_dir: Path | None = None
    arguments: PackArguments | None = None
    exclude: tuple[Path, ...] = ()

    def makers(self) -> set[str]:
        """Return the makers of the columns."""
        return {COLUMNS[name].maker for name in self.names}


def check_names(names: Collection[str], tokenizer_dir: Path | None) -> None:
    """Raise UsageError for a column that does not exist, or that needs a tokenizer or package that is missing."""
    for name in names:
        if name not in COLUMNS:
            raise UsageError(f"there is no column {name!r}", f"the columns are {', '.join(COLUMNS)}")
        if COLUMNS[name].maker == TOKENS and tokenizer_dir is None:
            raise UsageError(f"the column {name!r} needs a tokenizer", "--tokenizer DIR")
        if COLUMNS[name].maker == NEAR:
            check_options("near", ())


class PartColumns:
    """Reads parts: calling it returns a frame with a row for each line that is not blank, in order, with the columns
    line, reason (why the row cannot be used, else null), and those of the reader (null for unusable rows)."""

    def __init__(self, reader: RowReader):
        self._reader = reader
        self._makers = reader.makers()
        self._names = [name for name in reader.names if COLUMNS[name].maker not in (TOKENS, EXACT, NEAR, "")]

    @cached_property
    def _excluded(self) -> Excluded:
        return Excluded(self._reader.exclude)

    @cached_property
    def _encoder(self) -> RowEncoder:
        assert self._reader.tokenizer_dir
        tokenizer, arguments = Tokenizer.load(self._reader.tokenizer_dir), self._reader.arguments
        if arguments is None:
            return RowEncoder(tokenizer, max_len=UNCUT)
        options = {name: getattr(arguments, name) for name in ("era", "train_on", "seed")}
        return RowEncoder(arguments.amend(tokenizer), max_len=UNCUT, **options)

    def __call__(self, part: Part, tick: Tick) -> pl.DataFrame:
        """Read a part. tick: called with the bytes read since the last call."""
        fields = Columns.parse(part.read.mapping)
        frames, reported = [self.of_lines([], part.path, fields)], 0
        for lines in batches(part):
            frames.append(self.of_lines(lines, part.path, fields))
            done = part.bytes_done(lines[-1])
            tick(done - reported)
            reported = done
        tick(part.num_bytes - reported)
        return pl.concat(frames, rechunk=True)

    def of_lines(self, lines: Sequence[Line], path: Path, fields: Columns) -> pl.DataFrame:
        """Return a frame of lines of a file, as a call returns it of a part. fields: where the rows have their texts."""
        rows: list[Row] = []
        reasons: list[str | None] = []
        good: list[int] = []
        for i, line in enumerate(lines):
            try:
                rows.append(parse_row(line.raw, self._reader.kind, columns=fields))
            except BadRow as bad:
                reasons.append(bad.reason)
            else:
                good.append(i)
                reasons.append(None)
        places = {
            "line": pl.Series([line.number for line in lines], dtype=pl.Int64),
            "reason": pl.Series(reasons, dtype=pl.String),
        }
        frame = pl.DataFrame(places).with_columns(pl.lit(str(path)).alias("file"))
        columns = self.of_rows(rows, [lines[i].raw for i in good]).with_columns(at=pl.Series(good, dtype=pl.Int64))
        every = pl.DataFrame({"at": pl.Series(range(len(lines)), dtype=pl.Int64)})
        return pl.concat(
            [frame, every.join(columns, on="at", how="left", maintain_order="left").drop("at")], how="horizontal"
        )

    def of_rows(self, rows: Sequence[Row], raws: Sequence[bytes]) -> pl.DataFrame:
        """Return the columns of valid rows, and the keys of rows where they are needed. raws: their lines."""
        frames = [RowBatch(rows, raws).columns(self._names)] if self._names else []
        if TOKENS in self._makers:
            frames.append(self._tokens(rows))
        if self._reader.exclude:
            found = self._excluded.overlaps(["\n".join(texts_of(row)) for row in rows])
            frames.append(pl.DataFrame({OVERLAPS: [found.get(i) for i in range(len(rows))]}, {OVERLAPS: pl.String}))
        if self._makers & {EXACT, NEAR}:
            keys = np.frombuffer(b"".join(row_hash(row)[:16] for row in rows), "<u8").reshape(-1, 2)
            frames.append(pl.DataFrame({_KEYS: keys}, {_KEYS: pl.Array(pl.UInt64, 2)}))
        if NEAR in self._makers:
            bands = band_hashes(["\n".join(texts_of(row)) for row in rows])
            frames.append(pl.DataFrame({_BANDS: bands}, {_BANDS: pl.Array(pl.UInt64, bands.shape[1])}))
        return pl.concat(frames, how="horizontal") if frames else pl.DataFrame(height=len(rows))

    def _tokens(self, rows: Sequence[Row]) -> pl.DataFrame:
        """Return the columns of tokens; they are null for rows that cannot be encoded."""
        encoded = self._encoder.encode(rows)
        of = np.repeat(np.arange(len(rows)), encoded.num_sequences)
        lengths, trained = encoded.sequences.lengths, encoded.sequences.num_loss
        tokens, trained = (np.bincount(of, weights=each, minlength=len(rows)) for each in (lengths, trained))
        return token_columns(tokens, trained, RowBatch(rows).lengths)


def token_columns(tokens: np.ndarray, trained: np.ndarray, characters: np.ndarray) -> pl.DataFrame:
    """Return the columns of tokens of rows; null for rows without tokens. All three: [rows]."""
    frame = pl.DataFrame(
        {"tokens": tokens, "trained_tokens": trained, "characters_per_token": characters / np.maximum(tokens, 1)}
    )
    is_encoded = pl.col("tokens") > 0
    return frame.select(pl.when(is_encoded).then(pl.all())).cast(dict(schema(frame.columns)))  # type: ignore[arg-type]


def with_groups(frame: pl.DataFrame, makers: Collection[str]) -> pl.DataFrame:
    """Add the columns that tell which rows are equal (if `makers` has EXACT) or nearly so (NEAR) to a frame of all
    rows. Groups are numbered by their first row. Of equal rows, only the first is compared with nearly equal ones. Rows
    without keys, such as unusable ones, have nulls."""
    if not {EXACT, NEAR} & set(makers):
        return frame
    groups = _groups([frame], makers)
    return frame.drop(groups.columns, strict=False).hstack(groups)


def grouped(frames: Iterable[pl.DataFrame], makers: Collection[str]) -> Iterator[pl.DataFrame]:
    """Yield frames with the columns that `with_groups` adds to all of them together; none of them is copied."""
    if not {EXACT, NEAR} & set(makers):
        yield from frames
        return
    rest, keys = [], []
    for frame in frames:
        keys.append(frame.select(pl.selectors.by_name(_KEYS, _BANDS, require_all=False)))
        rest.append(frame.drop(keys[-1].columns))
    groups, begin = _groups(keys, makers), 0
    keys.clear()
    for frame in rest:
        yield frame.hstack(groups[begin : begin + len(frame)])
        begin += len(frame)


def _groups(frames: Sequence[pl.DataFrame], makers: Collection[str]) -> pl.DataFrame:
    """Return the columns that `with_groups` adds to the rows of all frames."""

    def entries(name: str, number: int) -> np.ndarray:
        """One entry of the keys or bands of all rows that have some: the whole would be a second copy of them."""
        return np.concatenate([frame[name].drop_nulls().arr.get(number).to_numpy() for frame in frames])

    is_used = pl.concat([frame[_KEYS].is_not_null() for frame in frames])
    used = np.flatnonzero(is_used.to_numpy())
    own = np.arange(len(used))
    equal = first_of_equal([(own, [entries(_KEYS, number) for number in range(2)])], len(used))
    found = {"duplicate_group": used[equal], "duplicate": equal != own}
    if NEAR in makers:
        near = first_of_near(((own, [entries(_BANDS, band)]) for band in range(BANDS)), equal)[equal]
        found |= {"near_group": used[near], "near_duplicate": near != equal}
    columns = {name: np.zeros(len(is_used), values.dtype) for name, values in found.items()}
    for name, values in found.items():
        columns[name][used] = values
    return pl.DataFrame(columns).select(pl.when(is_used).then(pl.all()))


def without_keys(frame: pl.DataFrame, is_out: pl.Expr) -> pl.DataFrame:
    """Remove the keys of rows, so that `with_groups` does not compare them."""
    keys = [name for name in (_KEYS, _BANDS) if name in frame.columns]
    return frame.with_columns(pl.when(~is_out).then(pl.col(name)).alias(name) for name in keys)


def read_rows(reader: RowReader, parts: Sequence[Part], run: Run, progress: Progress = no_progress) -> pl.DataFrame:
    """Return a frame of all lines of all parts, in order: part (its number), file, line, reason (null, or why the row
    cannot be used), the reader's columns, and the keys of rows that columns on duplicates need."""
    return with_groups(pl.concat(_read(reader, parts, run, progress)), reader.makers())


def _read(reader: RowReader, parts: Sequence[Part], run: Run, progress: Progress = no_progress) -> list[pl.DataFrame]:
    """Return the frame of each part, as `read_rows` describes it, without columns on duplicates."""
    total = sum(part.num_bytes for part in parts)
    frames = run(partial(PartColumns, reader), parts, total=total, progress=progress)
    return [frame.with_columns(part=pl.lit(part.number, pl.UInt32)) for frame, part in zip(frames, parts, strict=True)]


def iter_rows(reader: RowReader, parts: Sequence[Part], run: Run) -> Iterator[pl.DataFrame]:
    """Yield frames of the usable rows with the reader's columns: one a part, or one in all if a column needs all
    rows."""
    if reader.makers() & {EXACT, NEAR}:
        usable = (frame.filter(pl.col("reason").is_null()) for frame in _read(reader, parts, run))
        yield from (frame.select(reader.names) for frame in grouped(usable, reader.makers()))
        return
    for part in parts:
        (frame,) = _read(reader, [part], run)
        yield frame.filter(pl.col("reason").is_null()).select(reader.names)
