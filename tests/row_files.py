"""Writes the same rows as files of every format that mm reads, for the tests of reading and packing them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import zstandard

Rows = Sequence[dict[str, Any]]


def jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(rows: Rows, indent: int | None = None) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=indent).encode()


def zipped(content: bytes, *names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return packed.getvalue()


def table(rows: Rows) -> pa.Table:
    """The rows with every key as a column; a key that a row lacks is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def parquet(rows: Rows, **options: Any) -> bytes:
    content = io.BytesIO()
    pq.write_table(table(rows), content, **options)
    return content.getvalue()


def raw_table(rows: Sequence[Any]) -> bytes:
    """Any rows, also those that no typed columns could hold, as JSON in a column of the table that `mm select` writes."""
    names = {"file": "rows", "line": 0}
    return parquet([names | {"row": json.dumps(row, ensure_ascii=False)} for row in rows])


def signature(value: Any) -> str:
    """The types in a JSON value: rows of one signature fit in typed columns, unless lists in them hold several types."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{signature(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + "|".join(sorted({signature(item) for item in value})) + "]"
    return "large" if isinstance(value, int) and abs(value) >= 2**63 else type(value).__name__


def typed_tables(rows: Sequence[Any]) -> tuple[list[tuple[list[int], bytes]], list[int]]:
    """Parquet files of all rows that typed columns hold exactly, with the indices of their rows; and the other indices.
    Not exact are values that are no objects, objects without keys, integers of more than 64 bits, lists of several types
    and surrogates.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(signature(row), []).append(i)
    files, others = [], []
    for group in groups.values():
        try:
            if not isinstance(rows[group[0]], dict) or not rows[group[0]]:
                raise pa.ArrowInvalid("no columns")
            files.append((group, parquet([rows[i] for i in group])))
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            others += group
    return files, others


def arrow(rows: Rows, make: Callable[..., Any], rows_per_batch: int = 3) -> bytes:
    content = io.BytesIO()
    columns = table(rows)
    with make(content, columns.schema) as writer:
        writer.write_table(columns, max_chunksize=rows_per_batch)
    return content.getvalue()


def feather(rows: Rows) -> bytes:
    content = io.BytesIO()
    pyarrow.feather.write_feather(table(rows), content, compression="zstd")
    return content.getvalue()


def polars_arrow(rows: Rows) -> bytes:
    """An Arrow file as polars writes it, with string views."""
    content = io.BytesIO()
    frame = pl.from_arrow(table(rows))
    assert isinstance(frame, pl.DataFrame)
    frame.write_ipc(content, record_batch_size=4)
    return content.getvalue()


def separated(rows: Rows, separator: str = ",") -> bytes:
    """The rows as csv; null is an empty cell."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


# file name -> its content; numbers of rows from 1 in all of them
FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "rows.jsonl": jsonl,
    "rows.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "rows.jsonl.zst": lambda rows: zstandard.compress(jsonl(rows)),
    "rows.jsonl.xz": lambda rows: lzma.compress(jsonl(rows)),
    "rows.jsonl.bz2": lambda rows: bz2.compress(jsonl(rows)),
    "rows.zip": lambda rows: zipped(jsonl(rows), "folder/", "__MACOSX/._rows", "folder/rows.jsonl", ".DS_Store"),
    "line.json": array,
    "pretty.json": lambda rows: array(rows, indent=2),
    "array.json.gz": lambda rows: gzip.compress(array(rows, indent=1)),
    "rows.parquet": parquet,
    "groups.parquet": lambda rows: parquet(rows, row_group_size=4, compression="zstd"),
    "file.arrow": lambda rows: arrow(rows, pa.ipc.new_file),
    "stream.arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
    "rows.feather": feather,
    "polars.arrow": polars_arrow,
}
FLAT_FORMATS: dict[str, Callable[[Rows], bytes]] = {
    "rows.csv": separated,
    "rows.csv.zst": lambda rows: zstandard.compress(separated(rows)),
    "semicolon.csv": lambda rows: separated(rows, ";"),
    "rows.tsv": lambda rows: separated(rows, "\t"),
    "csv.zip": lambda rows: zipped(separated(rows), "rows.csv"),
}


def write(directory: Path, name: str, rows: Rows) -> Path:
    """Write the rows to a file named in FORMATS or FLAT_FORMATS."""
    path = directory / name
    path.write_bytes((FORMATS | FLAT_FORMATS)[name](rows))
    return path
