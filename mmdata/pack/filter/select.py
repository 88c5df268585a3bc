"""`mm select`: choose rows of files by conditions, and write their lines as they are, byte for byte.

All rows are read twice: first their columns, from which the rows and their order are chosen, then their lines. The same
files and options give the same bytes, whatever the number of workers.
"""

import gzip
import io
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl

from mmdata.encode.rows import DUPLICATE, NEAR_DUPLICATE, NOT_SELECTED, OVERLAP, REASONS, Columns, parse_row, texts_of
from mmdata.errors import InputError, UsageError, needs
from mmdata.io.files import Progress, atomic_path, no_progress, write_bytes
from mmdata.io.lines import place_of
from mmdata.io.tables import SELECTED
from mmdata.io.workers import run_jobs
from mmdata.pack.filter import dedup
from mmdata.pack.filter.features import COLUMNS, EXACT, NEAR
from mmdata.pack.filter.frames import OVERLAPS, RowReader, check_names, read_rows, with_groups, without_keys
from mmdata.pack.filter.quality import PRESETS
from mmdata.pack.filter.where import Where
from mmdata.pack.inputs import common_kind, plan
from mmdata.pack.options import PART_BYTES, SelectOptions
from mmdata.pack.part import Part, batches

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
NUM_EXAMPLES, EXAMPLE = 3, 100  # rows that are shown for each condition, and characters of each
ROWS_AT_ONCE = 2**13  # rows of a parquet file that are written at once


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows of files are chosen. kind: of the rows. parts: of the files. frame: of all lines that are not blank,
    in order: part, file, line, reason (null if chosen) and detail. order: int64, the chosen rows in the order of
    writing."""

    kind: str
    parts: list[Part]
    frame: pl.DataFrame
    order: np.ndarray

    def left_out(self) -> dict[str, int]:
        """Return the number of rows that are not chosen by reason, the most frequent first."""
        counts = self.frame["reason"].drop_nulls().value_counts().sort(["count", "reason"], descending=[True, False])
        return dict(counts.rows())

    def details(self) -> dict[str, int]:
        """Return the number of rows that each condition leaves out, the most first; the first that does not hold counts."""
        counts = self.frame.filter(reason=NOT_SELECTED)["detail"].value_counts()
        return dict(counts.sort(["count", "detail"], descending=[True, False]).rows())

    def examples(self) -> dict[str, list[tuple[str, str]]]:
        """Return up to NUM_EXAMPLES rows that each condition leaves out: (file and line, the beginning of the text)."""
        at = (
            self.frame.with_row_index("at").filter(reason=NOT_SELECTED).group_by("detail").head(NUM_EXAMPLES).sort("at")
        )
        columns = Columns.parse(self.parts[0].read.mapping)
        found: dict[str, list[tuple[str, str]]] = {}
        for row, raw in zip(at.iter_rows(named=True), _lines(self, at["at"].to_numpy()), strict=True):
            text = " ".join(" ".join(texts_of(parse_row(raw, self.kind, columns=columns)))[: 2 * EXAMPLE].split())[
                :EXAMPLE
            ]
            found.setdefault(row["detail"], []).append((place_of(row["file"], row["line"], self.parts[0].read), text))
        return found


def select(paths: Sequence[Path], options: SelectOptions, *, progress: Progress = no_progress) -> Selection:
    """Choose rows of files of one kind. progress: called with the bytes read and in all. Raises UsageError for invalid
    options, and InputError if a file cannot be read, has no usable row, or the files are of different kinds."""
    conditions = {options.where: Where(options.where)} if options.where is not None else {}
    if options.quality:
        rules = PRESETS[options.quality].items()
        conditions |= {f"{options.quality}: {name}": Where(rule, "--quality") for name, rule in rules}
    column, is_descending = _order_of(options)
    dedup.check_options(options.dedup, options.exclude)
    options.num_sampled(0)
    makers = {None: set(), "exact": {EXACT}, "near": {EXACT, NEAR}}[options.dedup]
    wanted = {*chain.from_iterable(where.names for where in conditions.values()), *([column] if column else [])}
    wanted |= {name for name, info in COLUMNS.items() if info.maker in makers}
    reader = RowReader(
        common_kind(paths, options.reading),
        tuple(name for name in COLUMNS if name in wanted),
        options.tokenizer,
        None,
        options.exclude,
    )
    check_names(reader.names, options.tokenizer)
    parts = plan(paths, PART_BYTES, options.reading)[1]
    frame = read_rows(reader, parts, partial(run_jobs, workers=options.workers or 1), progress)
    frame = frame.with_columns(detail=pl.lit(None, pl.String))
    for detail, where in conditions.items():
        frame = leave_out(frame, ~where.holds(frame), NOT_SELECTED, detail)
    if options.exclude:
        frame = leave_out(frame, pl.col(OVERLAPS).is_not_null(), OVERLAP, pl.col(OVERLAPS))
    if makers:
        places = pl.concat_str(pl.col("file"), pl.lit(" line "), pl.col("line"))
        frame = with_groups(without_keys(frame, pl.col("reason").is_not_null()), makers)
        place_of = frame.select(places.alias("place"))["place"]
        for name, reason in (("duplicate", DUPLICATE), ("near_duplicate", NEAR_DUPLICATE)):
            if name in frame.columns and (name == "duplicate" or NEAR in makers):
                group = "duplicate_group" if name == "duplicate" else "near_group"
                first = place_of.gather(frame[group].fill_null(0))
                frame = leave_out(frame, pl.col(name).fill_null(False), reason, pl.lit("as ") + first)
    chosen = np.flatnonzero(frame["reason"].is_null().to_numpy())
    random = np.random.Generator(np.random.PCG64(options.seed % 2**64))
    if options.sample:
        drawn = np.sort(random.permutation(chosen)[: options.num_sampled(len(chosen))])
        is_drawn = np.isin(np.arange(len(frame)), drawn)
        frame = leave_out(frame, ~pl.Series(is_drawn), NOT_SELECTED, "--sample")
        chosen = drawn
    if column:
        place = pl.Series("place", chosen)
        values = frame[chosen].select(pl.col(column), place)
        chosen = values.sort(column, descending=is_descending, nulls_last=True, maintain_order=True)["place"].to_numpy()
    elif options.shuffle:
        chosen = random.permutation(chosen)
    return Selection(reader.kind, parts, frame.select("part", "file", "line", "reason", "detail"), chosen)


def leave_out(frame: pl.DataFrame, is_out: pl.Expr | pl.Series, reason: str, detail: pl.Expr | str) -> pl.DataFrame:
    """Set reason and detail of the rows that have no reason yet and for which `is_out` is true."""
    is_new = pl.col("reason").is_null() & is_out
    detail = pl.lit(detail) if isinstance(detail, str) else detail
    values = {"reason": pl.lit(reason), "detail": detail}
    return frame.with_columns(pl.when(is_new).then(new).otherwise(name).alias(name) for name, new in values.items())


def _order_of(options: SelectOptions) -> tuple[str | None, bool]:
    """Return the column to sort by, if any, and whether the order is descending."""
    if not options.sort:
        return None, False
    if options.shuffle:
        raise UsageError("--sort and --shuffle ask for two orders", "leave one of them out")
    column, _, direction = options.sort.strip().partition(" ")
    if direction.strip().lower() not in ("", "asc", "desc"):
        raise UsageError(f"--sort {options.sort!r} is not a column", "--sort characters or --sort 'characters desc'")
    check_names([column], options.tokenizer)
    return column, direction.strip().lower() == "desc"


# --- writing


def write_selection(selection: Selection, out: Path, rest: Path | None = None) -> None:
    """Write the chosen rows to `out` in their order, and all other lines to `rest`, if given, in the order of the
    files. NAME.sources.parquet beside each has file and line of each row; for other lines, reason and detail, too. A
    .parquet file has the columns file, line and row (the line). Raises InputError if an input has changed since it was
    read."""
    frame = selection.frame
    others = np.flatnonzero(frame["reason"].is_not_null().to_numpy())
    targets = [(out, selection.order, ["file", "line"])]
    targets += [(rest, others, ["file", "line", "reason", "detail"])] if rest else []
    for path, order, names in targets:
        rows = frame[order]
        with atomic_path(path) as hidden, _ordered_lines(selection, order) as lines:
            if path.name.endswith(".parquet"):
                _write_parquet(hidden, rows, lines)
            else:
                with _opened(hidden, path.name) as file:
                    for line in lines:
                        file.write(line + b"\n")
        if not path.name.endswith(".parquet"):
            buffer = io.BytesIO()
            rows.select(names).write_parquet(buffer)
            write_bytes(sources_beside(path), buffer.getvalue())


def sources_beside(path: Path) -> Path:
    """Return the path of the file that has the places of the rows of `path`."""
    return path.with_name(f"{path.name.partition('.jsonl')[0]}.sources.parquet")


def check_target(path: Path, inputs: Sequence[Path], option: str) -> None:
    """Raise UsageError if the suffix of a file to write is unknown, or if it is one of the inputs."""
    if not path.name.endswith(SUFFIXES):
        raise UsageError(f"{option} {path}: the name tells the format", f"end it with {', '.join(SUFFIXES)}")
    if path.name.endswith(".zst"):
        with needs(f"{option} {path} needs zstandard", "zstd"):
            import zstandard  # noqa: F401
    if path.exists() and any(each.exists() and path.samefile(each) for each in inputs):
        raise UsageError(f"{option} {path} is one of the files to read", "choose another name")


@contextmanager
def _opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file for writing lines, compressed if the suffix of `name` says so; equal lines give equal bytes."""
    with path.open("wb") as file:
        if name.endswith(".gz"):
            with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
                yield packed  # type: ignore[misc]
        elif name.endswith(".zst"):
            import zstandard

            with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packed:
                yield packed  # type: ignore[misc]
        else:
            yield file


def _write_parquet(path: Path, rows: pl.DataFrame, lines: Iterable[bytes]) -> None:
    """Write lines with their places; the column `row` is binary if a line is not UTF-8, as only of unusable rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    every = iter(lines)
    kind = pa.large_binary() if rows["reason"].is_in([*REASONS]).any() else pa.large_string()
    schema = pa.schema(list(zip(SELECTED, (pa.string(), pa.int64(), kind), strict=True)))
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[begin : begin + ROWS_AT_ONCE]
            raws = [next(every) for _ in range(len(some))]
            columns = [some["file"].to_list(), some["line"].to_list(), pa.array(raws, pa.large_binary()).cast(kind)]
            writer.write_table(pa.table(columns, schema=schema))


@contextmanager
def _ordered_lines(selection: Selection, order: np.ndarray) -> Iterator[Iterator[bytes]]:
    """Yield an iterator over the lines of these rows of the frame; unless in the order of the files, they are first
    copied to a temporary file."""
    numbers = np.sort(order)
    lines = _lines(selection, numbers)
    if np.array_equal(numbers, order):
        yield lines
        return
    with tempfile.TemporaryFile() as spool:
        ends = np.cumsum([spool.write(line) for line in lines])
        spool.flush()
        content: Any = mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) if len(ends) and ends[-1] else b""
        begins = np.concatenate([[0], ends[:-1]])
        places = np.searchsorted(numbers, order)
        yield (content[begins[i] : ends[i]] for i in places.tolist())


def _lines(selection: Selection, numbers: np.ndarray) -> Iterator[bytes]:
    """Yield the lines of these rows of the frame, which must be ascending."""
    wanted = selection.frame[numbers].select("part", "line").partition_by("part", as_dict=True)
    for part in selection.parts:
        if (of_part := wanted.get((part.number,))) is None:
            continue
        left = set(of_part["line"].to_list())
        for batch in batches(part):
            found = [line for line in batch if line.number in left]
            left.difference_update(line.number for line in found)
            yield from (line.raw for line in found)
        if left:
            raise InputError(
                f"{part.path} changed while it was read", "select again when nothing writes to it any more"
            )
