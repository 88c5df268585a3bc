"""The input files of a pack: what kind of rows they hold, their hashes, and the parts into which they are cut."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mmdata.encode import rows
from mmdata.errors import DatasetError, InputError, UsageError
from mmdata.io import remote, workers
from mmdata.io.files import Progress, free_bytes, no_progress, partial_path
from mmdata.io.lines import TABLE, format_of, iter_lines
from mmdata.io.options import DEFAULT_READING, ReadOptions
from mmdata.io.records import FileEntry, read_record, write_record
from mmdata.io.streams import DAMAGED, damaged, open_stream
from mmdata.io.tables import row_ranges
from mmdata.pack.options import PackOptions
from mmdata.pack.part import Part
from mmdata.pack.staging import Run

READ_BYTES = 4 * 2**20
SPARE = 8  # a compressed input takes up to five times its size
AT_ONCE = 32  # requests to the storage of inputs at URLs
Found = TypeVar("Found")


def check_inputs(inputs: Sequence[Path]) -> None:
    """Raise UsageError if there are no inputs, and InputError if one is not a file or is empty."""
    if not inputs:
        raise UsageError("no input file", "mm pack FILE.jsonl")

    def look(path: Path) -> None:
        if str(path) == "-" or not path.is_file():
            raise InputError(f"{path} is not a file", "name jsonl files; `mm fetch` downloads the known ones")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty", "give a file with one JSON object a line")

    _of_each(look, inputs)


def _of_each(look: Callable[[Path], Found], inputs: Sequence[Path]) -> list[Found]:
    """Return look(input) of each input; AT_ONCE at a time if some are at URLs, whose storage lets each look wait."""
    if not any(isinstance(path, remote.RemoteFile) for path in inputs):
        return [look(path) for path in inputs]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(look, inputs))


@contextlib.contextmanager
def copied(inputs: Sequence[Path], out: Path, options: PackOptions, progress: Progress) -> Iterator[list[Path]]:
    """Yield the inputs. While the block runs, those at URLs have copies beside `out`, so that they are read only once, if
    only this machine packs them and the disk has SPARE times as much space as they take. progress: called with the bytes
    read so far and in all."""
    there = {path: partial_path(out.parent / f"{out.name}.input-{number}") for number, path in enumerate(inputs)}
    jobs = [(path, copy) for path, copy in there.items() if isinstance(path, remote.RemoteFile)]
    total = sum(size for size, _ in states_of([path for path, _ in jobs])) if jobs else 0
    is_shared = options.engine != "local" or options.share or options.finish
    if not jobs or is_shared or SPARE * total > free_bytes(out):
        yield list(inputs)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    make = partial(partial, remote.bring)
    try:
        found = workers.run_jobs(make, jobs, total=total, workers=options.workers or 1, progress=progress)
        copies: dict[Any, Path] = {path: file for (path, _), file in zip(jobs, found, strict=True)}
        yield [copies.get(path, path) for path in inputs]
    finally:
        for _, copy in jobs:
            copy.unlink(missing_ok=True)


def common_kind(inputs: Sequence[Path], read: ReadOptions = DEFAULT_READING) -> str:
    """Return the row kind of the inputs. Raises InputError if they have different kinds."""
    kinds = _of_each(partial(rows.find_kind, read=read), inputs)
    first = kinds[0]
    for path, other in zip(inputs, kinds, strict=True):
        if other != first:
            raise InputError(
                f"{path} holds {other} rows, {inputs[0]} {first} rows",
                "pack each kind into a dataset of its own, or take one with --kind",
            )
    return first


class _Cuts(msgspec.Struct):
    """An input as `plan` cuts it. state: its size and modification time. ranges: (begin, end, first line, bytes) of each
    part, as in `Part`."""

    state: tuple[int, int]
    entry: FileEntry
    ranges: list[tuple[int, int | None, int, int]]
    is_table: bool


def plan(
    inputs: Sequence[Path],
    part_bytes: int,
    read: ReadOptions = DEFAULT_READING,
    *,
    run: Run = workers.run_jobs,
    share: tuple[int, int] | None = None,
    found: Path | None = None,
    progress: Progress = no_progress,
) -> tuple[list[FileEntry], list[Part]]:
    """Return the size and sha256 of every input, and the parts; reads every file once or twice. A part of text ends at
    the first row at or after a multiple of `part_bytes` (of its decompressed UTF-8 text), one of a table after whole row
    groups of up to `part_bytes`.

    run: calls `workers.run_jobs`; it is used for inputs of workers.LARGE_BYTES together, each of which is a job, and
    then `progress` is called with the bytes hashed so far and in all. found: directory in which shards of a pack leave
    for each other what they found of an input; the shard `share` (i, n) looks first at the inputs i - 1, i - 1 + n, …,
    so that n shards that run at the same time divide the inputs.
    """
    first, count = (share[0] - 1, share[1]) if share else (0, 1)
    order = sorted(range(len(inputs)), key=lambda k: ((k - first) % count, k))
    total = sum(size for size, _ in states_of(inputs))
    if total < workers.LARGE_BYTES:
        run, progress = workers.run_jobs, no_progress
    make = partial(partial, _cut, part_bytes, read, found)
    cuts: dict[int, _Cuts] = dict(
        zip(order, run(make, [inputs[k] for k in order], total=total, progress=progress), strict=True)
    )
    parts: list[Part] = []
    for number, path in enumerate(inputs):
        for each in cuts[number].ranges:
            parts.append(Part(len(parts), number, path, *each, read, cuts[number].is_table))
    return [cuts[number].entry for number in range(len(inputs))], parts


def _cut(part_bytes: int, read: ReadOptions, found: Path | None, path: Path, tick: workers.Tick) -> _Cuts:
    """Return what `plan` needs of an input, from its record in `found` if the input has not changed since."""
    (state,) = states_of([path])
    name = hashlib.sha256(repr((str(path), part_bytes, read)).encode()).hexdigest()
    name = f"{name[:2]}/{name[2:]}.json"
    if found:
        with contextlib.suppress(DatasetError):
            cuts = read_record(found / name, _Cuts, DatasetError, "")
            if cuts.state == state:
                return cuts
    form = format_of(path, read)
    with path.open("rb") as file:
        sha256, num_bytes, starts = scan(file, part_bytes, tick)
    ranges: list[tuple[int, int | None, int, int]]
    if form.is_plain and not form.has_offsets:
        ranges = [(begin, end, begin + 1, size) for begin, end, size in row_ranges(path, part_bytes)]
    else:
        num_text = num_bytes
        if not form.has_offsets:
            num_text, starts = (_text_cuts if form.has_lines else _row_cuts)(path, part_bytes, read)
        elif not form.is_lines:
            _, starts = _row_cuts(path, part_bytes, read)
        ends = [begin for begin, _ in starts[1:]] + [num_text]
        ranges = [(begin, end, row, end - begin) for (begin, row), end in zip(starts, ends, strict=True)]
        if not form.has_offsets and len(starts) == 1:
            ranges = [(0, None, 1, num_bytes)]
    cuts = _Cuts(state, FileEntry(str(path), num_bytes, sha256), ranges, form.kind == TABLE)
    if found:
        write_record(found / name, cuts)
    return cuts


def _row_cuts(path: Path, part_bytes: int, read: ReadOptions) -> tuple[int, list[tuple[int, int]]]:
    """Return the same as `_text_cuts` for a file whose rows are not lines: about where its last row ends, and (offset,
    number of the row) for each part."""
    cuts, target, end = [(0, 1)], part_bytes, 0
    for line in iter_lines(path, options=read):
        end = line.offset + len(line.raw)
        if line.offset >= target and line.number > 1:
            cuts.append((line.offset, line.number))
            target = (line.offset // part_bytes + 1) * part_bytes
    return end, cuts


def _text_cuts(path: Path, part_bytes: int, read: ReadOptions) -> tuple[int, list[tuple[int, int]]]:
    """Return size and parts, as `scan` does, of the decompressed UTF-8 text of a file."""
    stream = open_stream(path, read.encoding)
    try:
        return scan(stream.file, part_bytes)[1:]
    except DAMAGED as error:
        raise damaged(path, error) from error
    finally:
        stream.file.close()


def scan(file: Any, part_bytes: int, tick: workers.Tick = no_progress) -> tuple[str, int, list[tuple[int, int]]]:
    """Return the sha256 of a binary stream, its size, and for each part (offset of its first byte, number of its first
    line). tick: called with the bytes read since its last call."""
    digest = hashlib.sha256()
    cuts = [(0, 1)]
    position, newlines, target = 0, 0, part_bytes
    while chunk := file.read(READ_BYTES):
        digest.update(chunk)
        tick(len(chunk))
        at = 0
        while (newline := chunk.find(b"\n", max(at, target - 1 - position))) >= 0:
            newlines += chunk.count(b"\n", at, newline + 1)
            at = newline + 1
            cuts.append((position + at, newlines + 1))
            target = ((position + at) // part_bytes + 1) * part_bytes
        newlines += chunk.count(b"\n", at)
        position += len(chunk)
    return digest.hexdigest(), position, [cut for cut in cuts if cut[0] < position]


def states_of(inputs: Sequence[Path]) -> list[tuple[int, int]]:
    """Return the size in bytes and the time of the last change, in nanoseconds, of each input."""
    return [(stat.st_size, stat.st_mtime_ns) for stat in _of_each(lambda path: path.stat(), inputs)]
