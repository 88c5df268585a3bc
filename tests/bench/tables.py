"""Rows of tables as JSON: through mmdata.io.tables, and through polars in several ways.

python tests/bench/tables.py ROWS.jsonl [--megabytes 30] [--group 10000]

The rows are written as parquet (zstd, groups of --group rows), Arrow and, if all values are strings, csv. Each way reads
each file in a process of its own that has loaded what a worker of `mm pack` has, with one thread. CPU seconds and the
peak of memory include loading what the way needs besides.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHUNK = 2048


def through_mm(path: Path) -> Iterator[bytes]:
    from mmdata.io.lines import iter_lines

    for line in iter_lines(path):
        yield line.raw


def scanned(path: Path) -> Any:
    import polars as pl

    if path.suffix == ".csv":
        return pl.scan_csv(path, infer_schema=False)
    return pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_ipc(path)


def in_batches(path: Path) -> Iterator[bytes]:
    frame = scanned(path)
    for batch in frame.collect_batches(chunk_size=CHUNK, engine="streaming"):
        yield from batch.write_ndjson().encode().splitlines()


def in_slices(path: Path) -> Iterator[bytes]:
    frame, begin = scanned(path), 0
    while (batch := frame.slice(begin, CHUNK).collect(engine="streaming")).height:
        yield from batch.write_ndjson().encode().splitlines()
        begin += batch.height


WAYS: dict[str, Callable[[Path], Iterator[bytes]]] = {
    "mm": through_mm,
    "polars, collect_batches": in_batches,
    "polars, slices": in_slices,
}


def read(way: str, path: Path) -> None:
    import mmdata.pack.part  # noqa: F401 - what a worker loads

    begin, before = resource.getrusage(resource.RUSAGE_SELF), memory("VmRSS")
    count = sum(1 for _ in WAYS[way](path))
    end = resource.getrusage(resource.RUSAGE_SELF)
    seconds = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    print(f"{path.suffix[1:]}, {way}: {count:,} rows, {seconds:.2f} s CPU, {(memory('VmHWM') - before) / 1e3:.0f} MB")


def memory(name: str) -> int:
    """kB of this process, by a name of /proc/self/status."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{name}:")[2].split()[0])


def varied(value: Any, begin: str) -> Any:
    """The value with other long texts, so that none comes twice, which parquet would store once."""
    if isinstance(value, dict):
        return {key: varied(item, begin) for key, item in value.items()}
    if isinstance(value, list):
        return [varied(item, begin) for item in value]
    return begin + value if isinstance(value, str) and len(value) > 20 else value


def write(source: Path, megabytes: float, group: int, folder: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet as pq

    lines = source.read_bytes().splitlines()
    size = sum(map(len, lines))
    copies = range(max(1, int(megabytes * 1e6 / size)))
    rows = [varied(json.loads(line), f"{number} ") for number in copies for line in lines]
    table = pa.Table.from_pylist(rows)
    paths = [folder / "rows.parquet", folder / "rows.arrow"]
    pq.write_table(table, paths[0], compression="zstd", row_group_size=group)
    pyarrow.feather.write_feather(table, str(paths[1]), compression="uncompressed", chunksize=group)
    if all(isinstance(value, str) for value in rows[0].values()):
        paths.append(folder / "rows.csv")
        with paths[2].open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--megabytes", type=float, default=30)
    parser.add_argument("--group", type=int, default=10_000, help="rows of a row group or record batch")
    parser.add_argument("--way", choices=WAYS)
    options = parser.parse_args()
    if options.way:
        read(options.way, options.rows)
        return
    environment = os.environ | {"POLARS_MAX_THREADS": "1", "PYTHONPATH": "."}
    with tempfile.TemporaryDirectory() as folder:
        for path in write(options.rows, options.megabytes, options.group, Path(folder)):
            for way in WAYS:
                subprocess.run([sys.executable, __file__, str(path), "--way", way], env=environment, check=True)


if __name__ == "__main__":
    main()
