"""Read the rows of tables as JSON objects, one line of bytes each: parquet, Arrow files and streams, and csv. Nulls are
left out of objects, since a table has a value, or null, for every key of every row.

Parquet and Arrow are read one record batch at a time, so that memory is bounded by the size of a batch, not by that of a
row group or file. pyarrow reads them, because polars decodes whole row groups (560 MB for a file of 300 MB in one group,
as pyarrow writes it, where this takes 63 MB), reads Arrow streams as a whole, and does not tell how many rows a row group
has, or at which byte a row of csv begins (tests/bench/RESULTS.md).
"""

import contextlib
import csv
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from mmdata.errors import InputError

BATCH_ROWS, BATCH_BYTES = 4096, 2**20  # most rows, and about the most bytes, that are read at once
CONVERTED_BYTES = 2**18  # about the most bytes that are converted at once; Python's objects take several times as much
KEY_BYTES = 10  # of a value in JSON beside its name: quotes, a colon, a comma, and what is stored once for equal values
SELECTED = ["file", "line", "row"]  # the columns of a parquet file that `mm select` writes
MOST_RANGES = 8  # of one row group: to read one, all rows of the group before it have to be decoded, too
_BOM = b"\xef\xbb\xbf"


class RowRange(NamedTuple):
    """Rows [begin, end) of a table, numbered from 0, with their size in bytes (uncompressed, about)."""

    begin: int
    end: int
    num_bytes: int


def table_rows(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield the rows [begin, end) of a parquet or Arrow file; end None is its end. path: may be a RemoteFile. Raises
    InputError if it is damaged or two columns have the same name."""
    with _opened(path) as table:
        names = table.schema_arrow.names if _is_parquet(table) else table.schema.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"{path}: {len(names)} columns, but {', '.join(sorted(twice))} twice", "rename one")
        for first, batch in _batches(table, begin, end):
            batch.validate(full=True)  # reading wrong offsets, as a damaged file has, could end the process
            low, high = max(begin - first, 0), batch.num_rows if end is None else min(end - first, batch.num_rows)
            step = max(1, batch.num_rows * CONVERTED_BYTES // max(batch.nbytes, 1))
            for at in range(low, high, step):
                yield from _json_rows(batch.slice(at, min(step, high - at)))


def row_ranges(path: Path, most_bytes: int) -> list[RowRange]:
    """Divide a table into ranges of whole row groups (parquet) or record batches (Arrow) of up to about `most_bytes`
    bytes; a larger group becomes at most MOST_RANGES equal ranges. Raises InputError for a damaged file."""
    ranges: list[RowRange] = []
    at = begin = size = 0
    with _opened(path) as table:
        for rows, num_bytes in _groups(table):
            if size and size + num_bytes > most_bytes:
                ranges.append(RowRange(begin, at, size))
                begin, size = at, 0
            pieces = max(1, min(-(-num_bytes // most_bytes), rows, MOST_RANGES))
            for piece in range(1, pieces):
                cut = at + rows * piece // pieces
                ranges.append(RowRange(begin, cut, num_bytes // pieces))
                begin = cut
            at += rows
            size += num_bytes - num_bytes // pieces * (pieces - 1)
    return [*ranges, RowRange(begin, at, size)] if at > begin else ranges


def num_rows(path: Path) -> int:
    """Return the number of rows of a parquet or Arrow file. Raises InputError if it is damaged."""
    with _opened(path) as table:
        return sum(rows for rows, _ in _groups(table))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a table: as a ParquetFile, or a reader of an Arrow file or stream. Errors of pyarrow become InputError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pa.OSFile(str(path)) if isinstance(path, Path) else pa.PythonFile(path.open())
    try:
        magic = file.read(6)
        file.seek(0)
        if isinstance(path, Path) and not magic.startswith(b"PAR1"):  # mapped, so that skipping batches takes no time
            file.close()
            file = pa.memory_map(str(path))
        if magic.startswith(b"PAR1"):
            yield pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        else:
            yield pa.ipc.open_file(file) if magic == b"ARROW1" else pa.ipc.open_stream(file)
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged or cut off: {error}", "download the file again") from error
    finally:
        file.close()
        pa.default_memory_pool().release_unused()  # tens of MB that packing takes next


def _is_parquet(table: Any) -> bool:
    return hasattr(table, "iter_batches")


def _groups(table: Any) -> Iterator[tuple[int, int]]:
    """Yield the number of rows of each row group or record batch, and about its bytes as JSON."""
    if _is_parquet(table):
        for group in map(table.metadata.row_group, range(table.num_row_groups)):
            columns = map(group.column, range(group.num_columns))
            keys = ((column.num_values, column.path_in_schema.rpartition(".")[2]) for column in columns)
            yield group.num_rows, group.total_byte_size + sum(count * (len(key) + KEY_BYTES) for count, key in keys)
    else:
        yield from ((batch.num_rows, batch.nbytes) for _, batch in _batches(table, 0, None))


def _batches(table: Any, begin: int, end: int | None) -> Iterator[tuple[int, Any]]:
    """Yield the record batches with rows in [begin, end), each with the number of its first row."""
    first = 0
    if not _is_parquet(table):
        is_file = hasattr(table, "get_batch")
        batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
        for batch in batches:
            if end is not None and first >= end:
                return
            if first + batch.num_rows > begin:
                yield first, batch
            first += batch.num_rows
        return
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        if end is not None and first >= end:
            return
        if first + group.num_rows <= begin:
            first += group.num_rows
            continue
        size = max(1, min(BATCH_ROWS, group.num_rows * BATCH_BYTES // max(group.total_byte_size, 1)))
        for batch in table.iter_batches(size, row_groups=[number], use_threads=False):
            if first + batch.num_rows > begin and (end is None or first < end):
                yield first, batch
            first += batch.num_rows


# --- rows as JSON


def _json_rows(batch: Any) -> list[bytes]:
    """Convert the rows of a record batch. The rows of a file that `mm select` wrote are in its column `row`."""
    if batch.schema.names == SELECTED:
        return [row if isinstance(row, bytes) else row.encode() for row in batch.column("row").to_pylist()]
    return list(map(_json, _objects(batch.schema.names, batch.columns, batch.num_rows)))


def _objects(names: list[str], columns: list[Any], count: int) -> list[Any]:
    """Return `count` objects with the values of these columns that are not null."""
    if not names:
        return [{} for _ in range(count)]
    values = [_values(column) for column in columns]
    if any(None in of_column for of_column in values):
        rows = zip(*values, strict=True)
        return [{name: value for name, value in zip(names, row, strict=True) if value is not None} for row in rows]
    return [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]


def _values(array: Any) -> list[Any]:
    """Return the values of an Arrow array as JSON has them, without nulls in objects."""
    import pyarrow.types as types

    kind = array.type
    if types.is_struct(kind):
        rows = _objects([kind.field(i).name for i in range(kind.num_fields)], array.flatten(), len(array))
    elif types.is_list(kind) or types.is_large_list(kind):
        items = iter(_values(array.flatten()))
        rows = [list(islice(items, length or 0)) for length in array.value_lengths().to_pylist()]
    elif types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_boolean(kind):
        return array.to_pylist()
    else:
        if types.is_float32(kind):
            array = array.cast("string").cast("float64")  # 0.1 stays 0.1
        values = array.to_pylist()
        return [_plain(dict(value) if value == [] and types.is_map(kind) else value) for value in values]
    if array.null_count:
        return [row if is_valid else None for row, is_valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    return rows


def _plain(value: Any) -> Any:
    """Return a value from pyarrow as JSON has it, without nulls in objects: a map as an object, or a list of pairs if it
    has a key twice, bytes as text, infinity
    and NaN as null, other values, such as times, as their text."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        keys = {str(key) for key, _ in value}
        value = {str(key): item for key, item in value} if len(keys) == len(value) else list(map(list, value))
    if isinstance(value, dict):
        plain = ((key, _plain(item)) for key, item in value.items())
        return {key: item for key, item in plain if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _json(value: Any) -> bytes:
    """Return a value as JSON. Bytes that are not UTF-8 stay what they are, so that the row is left out for them."""
    try:
        return orjson.dumps(value)
    except TypeError:  # such bytes, or an integer of more than 64 bits
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")


# --- csv


def csv_rows(path: Path, file: Any, separator: str, begin: int) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the cells of each record of a csv file, all as strings, without empty ones. file: UTF-8
    bytes. begin: 0, or the offset of a record. Raises InputError if the header names a column twice, quotes do not
    match, or a record has more or fewer cells than the header."""
    csv.field_size_limit(2**31 - 1)
    offset = 0

    def lines() -> Iterator[str]:
        nonlocal offset
        for raw in file:
            is_first, offset = offset == 0, offset + len(raw)
            yield (raw.removeprefix(_BOM) if is_first else raw).decode("utf-8", "surrogateescape")

    records = csv.reader(lines(), delimiter=separator, strict=True)
    quotes = "put cells that hold quotes, separators or line breaks in quotes, and double the quotes in them"
    header: list[str] = []
    try:
        header = [name or f"column {number}" for number, name in enumerate(next(records, []), 1)]
        if twice := {name for name in header if header.count(name) > 1}:
            raise InputError(f"{path}: its header names {', '.join(sorted(twice))} twice", "rename one")
        if begin:
            file.seek(begin)
            offset, records = begin, csv.reader(lines(), delimiter=separator, strict=True)
        while True:
            start, record = offset, next(records, None)
            if record is None:
                return
            if record and len(record) != len(header):
                cells = f"{len(record)} cells, its header names {len(header)}"
                fix = quotes if len(record) > len(header) else f"an empty cell needs its {separator!r} too; or {quotes}"
                raise InputError(f"{path} line {records.line_num}: {cells}", fix)
            if record:
                yield start, _json({name: cell for name, cell in zip(header, record, strict=True) if cell})
    except csv.Error as error:
        raise InputError(f"{path} line {records.line_num}: {error}", quotes) from None
