"""Write numpy arrays as the columns of an Arrow file, and read them back as views of a memory map without copying.

Columns are numbers, lists of numbers, or byte strings of a fixed width; not compressed, without nulls. Equal arrays
give equal bytes. Arrow files have no checksum; readers can compare a file with the sha256 that writing returned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdata.io.files import FileInfo, write_bytes

MAGIC = b"ARROW1"


class Ragged(NamedTuple):
    """A column of lists: that of row i is `values[offsets[i]:offsets[i + 1]]`. values: 1-D, the entries of all rows end
    to end. offsets: integers [rows + 1], ascending from 0."""

    values: np.ndarray
    offsets: np.ndarray

    def row(self, i: int) -> np.ndarray:
        """Return the list of row i, as a view."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Return the entries of rows begin to end - 1, one row after another, as a view."""
        return self.values[self.offsets[begin] : self.offsets[end]]

    def lengths(self) -> np.ndarray:
        """Return the number of entries of each row: integers [rows]."""
        return np.diff(self.offsets)


Columns = Mapping[str, "np.ndarray | Ragged"]
BatchColumns = dict[str, Any]  # the columns of a record batch as read: an array or a Ragged by name


def write_arrow(path: Path, columns: Columns, metadata: Mapping[str, str], rows_per_batch: int) -> FileInfo:
    """Write columns of equal row count to an uncompressed Arrow file, atomically, and return its size and sha256.
    columns: by name; a 1-D array of numbers, a uint8 array [rows, width] (byte strings of a fixed width) or a `Ragged`.
    metadata: for the schema, with "mm." in front of each key. rows_per_batch: the most rows in a record batch."""
    import pyarrow as pa

    schema = pa.schema(
        [pa.field(name, _arrow_type(column), nullable=False) for name, column in columns.items()],
        metadata={f"mm.{key}": value for key, value in metadata.items()},
    )
    total = num_rows(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for begin in range(0, total, rows_per_batch):
            end = min(begin + rows_per_batch, total)
            arrays = [_arrow_array(column, begin, end) for column in columns.values()]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return write_bytes(path, sink.getvalue())


def _arrow_type(column: np.ndarray | Ragged) -> Any:
    import pyarrow as pa

    values = column.values if isinstance(column, Ragged) else column
    if values.ndim == 2:  # uint8 [rows, width]: byte strings of a fixed width
        return pa.binary(values.shape[1])
    item = pa.from_numpy_dtype(values.dtype)
    return pa.list_(pa.field("item", item, nullable=False)) if isinstance(column, Ragged) else item


def _arrow_array(column: np.ndarray | Ragged, begin: int, end: int) -> Any:
    """Return rows begin to end - 1 of a column as an Arrow array over the same memory. (pa.array would import pandas.)"""
    import pyarrow as pa

    kind = _arrow_type(column)
    if not isinstance(column, Ragged):
        values = np.ascontiguousarray(column[begin:end])
        return pa.Array.from_buffers(kind, end - begin, [None, pa.py_buffer(values)])
    offsets = column.offsets[begin : end + 1]
    values = np.ascontiguousarray(column.values[offsets[0] : offsets[-1]])
    item = pa.Array.from_buffers(kind.value_type, len(values), [None, pa.py_buffer(values)])
    relative = (offsets - offsets[0]).astype(np.int32)
    return pa.Array.from_buffers(kind, end - begin, [None, pa.py_buffer(relative)], children=[item])


@dataclass(frozen=True, slots=True)
class ArrowFile:
    """A memory-mapped Arrow file. metadata: of its schema, keys with "mm.". batches: for each record batch its columns
    by name, as views of the map (arrays or `Ragged`)."""

    metadata: dict[str, str]
    batches: tuple[BatchColumns, ...]

    @property
    def num_rows(self) -> int:
        """The number of rows in all record batches."""
        return sum(num_rows(batch) for batch in self.batches)

    def column(self, name: str) -> Any:
        """Return a column as an array or a `Ragged`: a view if there is one record batch, otherwise a joined copy."""
        parts = [batch[name] for batch in self.batches]
        if len(parts) == 1:
            return parts[0]
        if not isinstance(parts[0], Ragged):
            return np.concatenate(parts)
        lengths = np.concatenate([part.lengths() for part in parts])
        return ragged(np.concatenate([part.values for part in parts]), lengths)


def num_rows(columns: Columns) -> int:
    """Return the number of rows of a set of columns, read from the first one."""
    first = next(iter(columns.values()))
    return len(first.offsets) - 1 if isinstance(first, Ragged) else len(first)


def ragged(values: np.ndarray, lengths: np.ndarray) -> Ragged:
    """Create a list column. values: entries of all rows in turn. lengths: one a row; they must sum to len(values)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    assert offsets[-1] == len(values), "lengths do not sum to the values"
    return Ragged(values, offsets)


def bounds(columns: Sequence[Ragged], rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return where the selected rows begin and end in the `values` of their columns: each int64 [selected rows]. rows:
    for each column an array of row indices; the results are joined in the order of the columns."""
    begins = [column.offsets[own] for column, own in zip(columns, rows, strict=True)]
    ends = [column.offsets[own + 1] for column, own in zip(columns, rows, strict=True)]
    return np.concatenate(begins, dtype=np.int64), np.concatenate(ends, dtype=np.int64)


def take(columns: Sequence[Ragged], rows: Sequence[np.ndarray]) -> Ragged:
    """Copy the selected rows of several list columns into one new list column, in the order of the columns and indices.
    rows: for each column an array of row indices, with at least one entry."""
    begins, ends = bounds(columns, rows)
    taken = np.cumsum(ends - begins)
    at = np.repeat(ends - taken, ends - begins) + np.arange(taken[-1])
    cuts = taken[np.cumsum([len(own) for own in rows[:-1]], dtype=np.int64) - 1]
    values = [column.values[own] for column, own in zip(columns, np.split(at, cuts), strict=True)]
    return ragged(np.concatenate(values), ends - begins)


def read_arrow(path: Path, *, is_checked: bool = False) -> ArrowFile:
    """Map an Arrow file to memory. Raises ValueError if it is empty, not Arrow, has nulls or columns of other types than
    `write_arrow` writes. is_checked: also check all offsets, without which reading a damaged file may fail later."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:  # the map stays while it is used, and no file descriptor does
        mapped = file.read_buffer()
    if mapped[: len(MAGIC)].to_pybytes() != MAGIC or mapped[max(0, mapped.size - len(MAGIC)) :].to_pybytes() != MAGIC:
        raise ValueError("not an Arrow file")
    try:
        reader = pa.ipc.open_file(mapped)
        metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        if is_checked:
            for batch in batches:
                batch.validate(full=True)
        names = reader.schema.names
        return ArrowFile(metadata, tuple({n: _view(b.column(i)) for i, n in enumerate(names)} for b in batches))
    except (ArithmeticError, LookupError, MemoryError, NotImplementedError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"not an Arrow file that can be read ({error})") from error  # pyarrow's own are among these


def _view(array: Any) -> np.ndarray | Ragged:
    """Return numpy views of an Arrow array; ValueError if it has nulls. (to_numpy imports pandas and is slower.)"""
    import pyarrow as pa

    kind, buffers, n, at = array.type, array.buffers(), len(array), array.offset
    if array.null_count:
        raise ValueError("a column holds nulls")
    if pa.types.is_fixed_size_binary(kind):
        return np.frombuffer(buffers[1], np.uint8, n * kind.byte_width, at * kind.byte_width).reshape(n, -1)
    if not pa.types.is_list(kind):
        dtype = np.dtype(kind.to_pandas_dtype())
        return np.frombuffer(buffers[1], dtype, n, at * dtype.itemsize)
    offsets = np.frombuffer(buffers[1], np.int32, n + 1, at * 4)
    values = _view(array.values)
    if not isinstance(values, np.ndarray):
        raise TypeError("lists of lists")
    return Ragged(values, offsets)
