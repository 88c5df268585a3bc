"""Find the lines that packing leaves out: those for which --where does not hold, duplicates, and overlaps."""

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from mmdata.encode.rows import NOT_SELECTED
from mmdata.io.files import write_bytes
from mmdata.io.lines import Line
from mmdata.io.records import write_record
from mmdata.io.workers import Tick
from mmdata.pack.filter import dedup
from mmdata.pack.filter.frames import PartColumns, RowReader, with_groups
from mmdata.pack.filter.where import Where
from mmdata.pack.part import LEFT_OUT, Part, PartSettings, screen_path
from mmdata.shards.manifest import PackArguments

ROWS_AT_ONCE = 1000  # rows whose columns are computed at once
COLUMNS = "columns.parquet"  # see `screen_path`


def screen(
    settings: PartSettings, parts: Sequence[Part], own: Sequence[Part], run: Callable[..., Any], progress: Any
) -> None:
    """Write, for every part, a file with the lines to leave out, if an option asks for it. All `parts` are read, since
    rows are compared across them, but those in `own` first: processes that pack different shares and start together
    thus divide the work. run: calls `workers.run_jobs`. progress: called with the bytes read so far and in all. Raises
    InputError if an excluded file is missing or has changed."""
    arguments, directory = settings.header.arguments, settings.screen_dir
    left_out = _not_selected(settings, parts, own, run, progress) if arguments.where else {}
    if arguments.dedup or arguments.exclude:
        dedup.screen(settings, parts, own, run, progress, left_out)
    else:
        for number, lines in left_out.items():
            write_record(screen_path(directory, number, LEFT_OUT), lines, indent=None)


def _not_selected(
    settings: PartSettings, parts: Sequence[Part], own: Sequence[Part], run: Callable[..., Any], progress: Any
) -> dict[int, dedup.Verdicts]:
    """Return the lines of each part, by its number, for which the condition does not hold."""
    arguments, directory = settings.header.arguments, settings.screen_dir
    assert arguments.where
    where = Where(arguments.where)
    reader = RowReader(settings.header.kind, where.names, settings.tokenizer_dir, arguments)
    numbers = {part.number for part in own}
    first = sorted(parts, key=lambda part: part.number not in numbers)
    run(
        partial(_ColumnWriter, reader, directory), first, total=sum(part.num_bytes for part in first), progress=progress
    )
    frames = [
        pl.read_parquet(screen_path(directory, part.number, COLUMNS)).with_columns(part=pl.lit(part.number))
        for part in parts
    ]
    frame = with_groups(pl.concat(frames), reader.makers())
    is_out = frame["reason"].is_null() & ~where.holds(frame)
    found: dict[int, dedup.Verdicts] = {part.number: {} for part in parts}
    for number, line in frame.filter(is_out).select("part", "line").iter_rows():
        found[number][line] = (NOT_SELECTED, where.text)
    return found


def lines_kept(
    files: Sequence[tuple[Path, Sequence[Line]]], kind: str, tokenizer_dir: Path | None, arguments: PackArguments
) -> list[list[Line]]:
    """Return the lines of each file without the rows for which `arguments.where` does not hold among all these lines.
    Lines that are no valid rows stay.
    """
    where, fields = Where(arguments.where or "true"), arguments.columns
    reader = RowReader(kind, where.names, tokenizer_dir, arguments)
    read = PartColumns(reader)
    batches = [
        read.of_lines(lines[i : i + ROWS_AT_ONCE], path, fields)
        for path, lines in files
        for i in range(0, max(len(lines), 1), ROWS_AT_ONCE)
    ]
    frame = with_groups(pl.concat(batches), reader.makers())
    is_kept = iter((frame["reason"].is_not_null() | where.holds(frame)).to_list())
    return [[line for line in lines if next(is_kept)] for _, lines in files]


class _ColumnWriter:
    """Writes the columns of a part's rows to a file, unless it exists."""

    def __init__(self, reader: RowReader, directory: Path):
        self._read, self._directory = PartColumns(reader), directory

    def __call__(self, part: Part, tick: Tick) -> None:
        path = screen_path(self._directory, part.number, COLUMNS)
        if path.exists():
            tick(part.num_bytes)
            return
        buffer = io.BytesIO()
        self._read(part, tick).write_parquet(buffer)
        write_bytes(path, buffer.getvalue())
