"""Find rows to leave out: duplicates, near duplicates, and rows that overlap with excluded files.

A first pass over the parts writes hashes of each row (its keys) to the directory in which the dataset is being packed.
The keys of all parts are then compared, and for each part a file is written with the lines to leave out. Of equal rows,
the first by input file and offset is packed, whichever process packs it. Memory: 24 bytes a row of the dataset, and the
keys of SLICE_ROWS rows at a time. Disk: 44 bytes a row, or 172 if near duplicates are searched.

The text of a row is hashed to a MinHash of 128 entries over its 5-grams, which is divided into 16 bands of 8 entries.
Rows are near duplicates if all 8 entries of a band are equal. For rows with Jaccard similarity s the probability of
this is 1 - (1 - s^8)^16: 0.06 at s = 0.5, 0.61 at 0.7, 0.95 at 0.8, 1.00 at 0.9 (Broder 1997; the bands as in Leskovec,
Rajaraman, Ullman, Mining of Massive Datasets, ch. 3). `grams` defines the n-grams.
"""

import contextlib
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.encode.rows import DUPLICATE, NEAR_DUPLICATE, OVERLAP, BadRow, parse_row, row_hash, texts_of
from mmdata.errors import DatasetError, InputError, needs
from mmdata.io.files import sha256_of, write_bytes
from mmdata.io.lines import iter_lines, place_of
from mmdata.io.options import ReadOptions
from mmdata.io.records import read_record, write_record
from mmdata.io.workers import Tick
from mmdata.pack.filter.grams import gram_hashes, num_units
from mmdata.pack.part import LEFT_OUT, Part, PartSettings, batches, screen_path

BANDS, ROWS_A_BAND, SHINGLE, SEED = 16, 8, 5, 1
EXCLUDE_N = 8  # units of the n-grams that rows and excluded texts are compared by
EXCLUDE_SHARE = 0.5  # share of an excluded text's n-grams; see `Excluded` (Lambert et al. 2024)
SLICE_ROWS = 2**22
KeySlice = tuple[np.ndarray, Sequence[np.ndarray]]  # numbers of rows, ascending, and the columns of their keys
Verdicts = dict[int, tuple[str, str]]  # lines to leave out: line number -> (reason, detail)


def check_options(dedup: str | None, exclude: Sequence[Path]) -> None:
    """Raise UsageError if `dedup` is "near" and rensa is not installed, InputError if an excluded file is missing."""
    if dedup == "near":
        _rensa()
    for path in exclude:
        if not path.is_file():
            raise InputError(f"--exclude {path}: no such file", "name a file of texts, one a line, or jsonl")


def screen(
    settings: PartSettings,
    parts: Sequence[Part],
    own: Sequence[Part],
    run: Callable[..., Any],
    progress: Any,
    left_out: Mapping[int, Verdicts],
) -> None:
    """Write, for every part, a file with the lines to leave out, see `filter.screen.screen`. left_out: lines left out
    already, by part; they are not compared."""
    arguments, directory = settings.header.arguments, settings.screen_dir
    for excluded in arguments.exclude:
        path = Path(excluded.path)
        if not path.is_file() or sha256_of(path) != excluded.sha256:
            raise InputError(
                f"{path}: gone, or not what it was when rows were compared with it", "bring the old file back"
            )
    numbers = {part.number for part in own}
    first = sorted(parts, key=lambda part: part.number not in numbers)
    run(partial(_Marker, settings, left_out), first, total=sum(part.num_bytes for part in first), progress=progress)
    keys = _Keys(directory, parts)
    equal = near = np.arange(len(keys.lines))
    if arguments.dedup:
        equal = first_of_equal(keys.slices("keys.npy", slice(None)), len(keys.lines))
    if arguments.dedup == "near":
        bands = (keys.slices("bands.npy", slice(band, band + 1)) for band in range(BANDS))
        near = first_of_near(chain.from_iterable(bands), equal)
    for i, part in enumerate(parts):
        found = read_record(screen_path(directory, part.number, "found.json"), Verdicts, DatasetError, "pack again")
        verdicts = {**left_out.get(part.number, {}), **found}
        begin, end = keys.begins[i], keys.begins[i + 1]
        for reason, same in ((DUPLICATE, equal), (NEAR_DUPLICATE, near)):
            for row in (begin + np.flatnonzero(same[begin:end] != np.arange(begin, end))).tolist():
                verdicts[int(keys.lines[row])] = (reason, f"as {keys.place(int(same[row]))}")
        write_record(screen_path(directory, part.number, LEFT_OUT), verdicts, indent=None)


# --- the keys of a part's rows


class _Marker:
    """Writes the keys of a part's rows and the lines that overlap with excluded files, unless these files exist."""

    def __init__(self, settings: PartSettings, left_out: Mapping[int, Verdicts]):
        self._left_out = left_out
        self._kind, self._dedup = settings.header.kind, settings.header.arguments.dedup
        self._columns = settings.header.arguments.columns
        self._directory = settings.screen_dir
        self._excluded = Excluded([Path(excluded.path) for excluded in settings.header.arguments.exclude])

    def __call__(self, part: Part, tick: Tick) -> None:
        if not screen_path(self._directory, part.number, "found.json").exists():
            self._write(part)
        tick(part.num_bytes)

    def _write(self, part: Part) -> None:
        """Write the files of one part. "found.json" (the overlapping lines) is last; it marks the part as finished."""
        lines: list[int] = []
        keys: list[bytes] = []
        bands: list[np.ndarray] = [np.zeros((0, BANDS), np.uint64)]
        overlapping: Verdicts = {}
        left_out = self._left_out.get(part.number, {})
        for batch in batches(part):
            numbers, rows = self._parse([line for line in batch if line.number not in left_out])
            texts = ["\n".join(texts_of(row)) for row in rows]
            overlaps = self._excluded.overlaps(texts)
            overlapping |= {numbers[i]: (OVERLAP, detail) for i, detail in overlaps.items()}
            kept = [i for i in range(len(rows)) if i not in overlaps]
            lines += [numbers[i] for i in kept]
            if self._dedup:
                keys += [row_hash(rows[i])[:16] for i in kept]
            if self._dedup == "near":
                bands.append(band_hashes([texts[i] for i in kept]))
        self._save(part, "lines.npy", np.array(lines, np.uint32))
        self._save(part, "keys.npy", np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2).T)
        self._save(part, "bands.npy", np.ascontiguousarray(np.concatenate(bands).T))
        write_record(screen_path(self._directory, part.number, "found.json"), overlapping, indent=None)

    def _parse(self, batch: Sequence[Any]) -> tuple[list[int], list[Any]]:
        """Return line numbers and parsed rows. Invalid rows are skipped; packing leaves them out with their reason."""
        numbers, rows = [], []
        for line in batch:
            try:
                rows.append(parse_row(line.raw, self._kind, columns=self._columns))
                numbers.append(line.number)
            except BadRow:
                continue
        return numbers, rows

    def _save(self, part: Part, name: str, array: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_bytes(screen_path(self._directory, part.number, name), buffer.getvalue())


def band_hashes(texts: Sequence[str]) -> np.ndarray:
    """Return a hash of each band of each text's MinHash: uint64 [texts, BANDS]. Near duplicates have an equal entry in
    a column. A text without a unit gets small numbers (below SLICE_ROWS) that no other text of the call has."""
    grams, ends = gram_hashes(texts, SHINGLE)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(
        grams, ends.tolist(), num_perm=BANDS * ROWS_A_BAND, seed=SEED
    )
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), BANDS, ROWS_A_BAND)
    powers = np.array([pow(0xD6E8FEB86659FD93, k + 1, 2**64) for k in range(ROWS_A_BAND)], np.uint64)
    bands = (signatures * powers).sum(axis=2, dtype=np.uint64) + np.arange(BANDS, dtype=np.uint64)
    is_empty = np.diff(ends) == 0
    # Texts without a unit get numbers below SLICE_ROWS, which first_of_near ignores.
    bands[is_empty] = np.arange(is_empty.sum(), dtype=np.uint64)[:, None]
    return bands


def _rensa() -> Any:
    with needs("--dedup near needs rensa", "dedup"):
        import rensa
    return rensa


# --- the keys of all parts, compared


class _Keys:
    """The keys of the rows of all parts, numbered from 0 in the order of parts and lines. lines: uint32, the line of
    each row. begins: int64 [parts + 1], the number of each part's first row, then the number of rows."""

    def __init__(self, directory: Path, parts: Sequence[Part]):
        self._directory, self._parts = directory, parts
        lines = [np.load(screen_path(directory, part.number, "lines.npy")) for part in parts]
        self.lines = np.concatenate([np.empty(0, np.uint32), *lines])
        self.begins = np.concatenate([[0], np.cumsum([len(of_part) for of_part in lines])]).astype(np.int64)
        self._num_slices = -(-len(self.lines) // SLICE_ROWS) or 1

    def place(self, row: int) -> str:
        """Return the input file and line number of a row, in words."""
        part = self._parts[int(np.searchsorted(self.begins, row, side="right")) - 1]
        return f"{part.path} {'row' if part.is_table else 'line'} {self.lines[row]}"

    def slices(self, name: str, columns: slice) -> Iterator[KeySlice]:
        """Yield row numbers (ascending) and key columns in slices of about SLICE_ROWS rows; equal keys are in one
        slice. Each part's keys are read once, and its rows sorted into a temporary file for each slice. name: the file
        with an array [columns, rows] for each part. columns: those that are used."""
        every = np.arange(0, len(self.lines), SLICE_ROWS)
        cuts = np.unique([0, *np.searchsorted(self.begins, every), len(self._parts)]).tolist()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile(dir=self._directory)) for _ in range(self._num_slices)]
            width = 0
            for first, last in itertools.pairwise(cuts):
                paths = (screen_path(self._directory, part.number, name) for part in self._parts[first:last])
                keys = np.concatenate([np.load(path, mmap_mode="r")[columns] for path in paths], axis=1)
                rows = np.arange(int(self.begins[first]), int(self.begins[last]), dtype=np.uint64)
                of = (keys[0] % np.uint64(self._num_slices)).astype(np.int64)
                table = np.concatenate([rows[None], keys]).T[np.argsort(of, kind="stable")]
                ends = np.cumsum(np.bincount(of, minlength=self._num_slices))
                width = table.shape[1]
                for file, some in zip(files, np.split(table, ends[:-1]), strict=True):
                    file.write(some.tobytes())
            for file in files:
                file.seek(0)
                table = np.frombuffer(file.read(), np.uint64).reshape(-1, width).T
                yield table[0].astype(np.int64), [*table[1:]]


def first_of_equal(slices: Iterable[KeySlice], num_rows: int) -> np.ndarray:
    """Return the first row with the same keys as each row: int64 [rows]. slices: rows with equal keys are in the same
    one."""
    first = np.arange(num_rows)
    for rows, keys in slices:
        _note_first(first, rows, keys)
    return first


def first_of_near(slices: Iterable[KeySlice], first: np.ndarray) -> np.ndarray:
    """Return the smallest number of each row and the rows that share a band with it: int64 [rows]. slices: of one band
    after another. first: from `first_of_equal`. Duplicates of an earlier row and rows without text keep theirs."""
    near = np.arange(len(first))
    for rows, keys in slices:
        is_own = (first[rows] == rows) & (keys[0] >= SLICE_ROWS)  # small numbers are texts without a unit
        _note_first(near, rows[is_own], [key[is_own] for key in keys])
    return near


def _note_first(first: np.ndarray, rows: np.ndarray, keys: Sequence[np.ndarray]) -> None:
    """Lower `first`, in place, for all rows with equal keys (in all columns) to the smallest row number among them.
    rows: ascending numbers. keys: columns with an entry for each of these rows."""
    if not len(rows):
        return
    order = np.lexsort((rows, *keys))
    ordered = rows[order]
    is_new = np.concatenate([[True], np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)])
    leader = ordered[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    first[ordered] = np.minimum(first[ordered], leader)


# --- excluded files


class Excluded:
    """The n-grams of texts that rows must not overlap with, such as a benchmark's; its length is the number of texts.
    paths: plain texts, a text a line, or files of any other format, of which every string of a row is a text. Texts
    with fewer than EXCLUDE_N units are only counted, in `num_short`."""

    def __init__(self, paths: Sequence[Path]):
        self._places: list[str] = []
        texts: list[str] = []
        self.num_short = 0
        for path in paths:
            for line in iter_lines(path, options=ReadOptions(text="line")):
                for text in _texts_in(line.raw):
                    if num_units(text) < EXCLUDE_N:
                        self.num_short += 1
                        continue
                    texts.append(text)
                    self._places.append(place_of(path, line.number))
        grams, ends = gram_hashes(texts, EXCLUDE_N) if texts else (np.zeros(0, np.uint64), np.zeros(1, np.int64))
        of = np.repeat(np.arange(len(texts)), np.diff(ends))
        pairs = np.unique(np.stack([grams, of.astype(np.uint64)], axis=1), axis=0)  # an n-gram counts once for a text
        self._grams, self._texts = pairs[:, 0].copy(), pairs[:, 1].astype(np.int64)
        self._num_grams = np.bincount(self._texts, minlength=len(texts))

    def __len__(self) -> int:
        return len(self._places)

    def overlaps(self, texts: Sequence[str]) -> dict[int, str]:
        """Return index -> description (share, place) for each text that has at least the share EXCLUDE_SHARE of an
        excluded text's distinct n-grams, of that with the largest share."""
        if not len(self):
            return {}
        grams, ends = gram_hashes(texts, EXCLUDE_N)
        of = np.repeat(np.arange(len(texts)), np.diff(ends))
        low, high = (np.searchsorted(self._grams, grams, side) for side in ("left", "right"))
        is_hit = high > low
        if not is_hit.any():
            return {}
        hits = np.unique(np.stack([of[is_hit], low[is_hit], high[is_hit]], axis=1), axis=0)  # distinct ones of a row
        counts = hits[:, 2] - hits[:, 1]
        entry = np.repeat(hits[:, 1] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        pairs, shared = np.unique(
            np.stack([np.repeat(hits[:, 0], counts), self._texts[entry]], axis=1), axis=0, return_counts=True
        )
        most: dict[int, tuple[float, int]] = {}
        for (row, text), count in zip(pairs.tolist(), shared.tolist(), strict=True):
            share = count / int(self._num_grams[text])
            if share >= EXCLUDE_SHARE and share > most.get(row, (0.0, 0))[0]:
                most[row] = (share, text)
        return {
            row: f"{100 * share:.0f}% of the {EXCLUDE_N}-grams of {self._places[text]}"
            for row, (share, text) in most.items()
        }


def _texts_in(raw: bytes) -> Iterator[str]:
    """Yield every string in a line's JSON value, or the line if it is not JSON, or a number, true, false or null."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = raw.decode("utf-8", errors="replace")
    yield from _strings(value if isinstance(value, (dict, list, str)) else raw.decode())


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, but not the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)
