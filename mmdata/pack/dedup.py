"""Rows that are left out for what other rows or files say: duplicates, near duplicates, overlaps with excluded files.

A first pass over the parts writes each row's marks beside the shards to come; they are then compared, and each part gets the
list of its lines to leave out. Of equal rows the first by file and offset stays, whoever packs what. Memory: 24 bytes a row
of the dataset, and SLICE_ROWS rows' keys at once; disk: 20 bytes a row, near 148.

Near duplicates share a band: 8 equal entries of a 128-entry MinHash of 5-grams (shingles.py), in one of 16 bands. Rows of
Jaccard similarity s share one with probability 1 - (1 - s^8)^16: 0.06 at s = 0.5, 0.61 at 0.7, 0.95 at 0.8, 1.00 at 0.9
(Broder 1997; the bands as in Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3).
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.encode.rows import DUPLICATE, NEAR_DUPLICATE, OVERLAP, BadRow, iter_lines, parse_row, row_hash, texts_of
from mmdata.errors import InputError, UsageError
from mmdata.io.files import write_bytes
from mmdata.io.workers import Tick
from mmdata.pack.part import Part, batches, screened_path
from mmdata.pack.shingles import gram_hashes, num_units

BANDS, ROWS_A_BAND, SHINGLE, SEED = 16, 8, 5, 1
EXCLUDE_N = 8  # units of an n-gram looked for in excluded files …
EXCLUDE_SHARE = (
    0.5  # … and the share of an excluded text's n-grams from which a row overlaps with it (Lambert et al. 2024)
)
SLICE_ROWS = 2**22


@dataclass(frozen=True, slots=True)
class Screening:
    """What is looked for; pickles. `directory`: where marks go."""

    directory: Path
    kind: str
    dedup: str | None
    exclude: tuple[Path, ...]


def check_arguments(dedup: str | None, exclude: Sequence[Path]) -> None:
    """UsageError where near duplicates need a package that is not installed, InputError for a missing file."""
    if dedup == "near":
        _rensa()
    for path in exclude:
        if not path.is_file():
            raise InputError(f"--exclude {path}: no such file", "name a file of texts, one a line, or jsonl")


def mark(screening: Screening, parts: Sequence[Part], run: Callable[..., Any], progress: Any) -> None:
    """Writes the marks of all parts; those that are there already are kept."""
    run(partial(Marker, screening), parts, total=sum(part.num_bytes for part in parts), progress=progress)


def compare(screening: Screening, parts: Sequence[Part]) -> None:
    """Writes, for every part, the lines it has to leave out. parts: all, in order."""
    marks = _Marks(screening, parts)
    near = np.arange(marks.num_rows)
    first = marks.first_of_equal() if screening.dedup else near
    if screening.dedup == "near":
        near = marks.first_of_near(first)
    for i, part in enumerate(parts):
        _write_verdict(screening, marks, first, near, i, part)


def _write_verdict(
    screening: Screening, marks: "_Marks", first: np.ndarray, near: np.ndarray, i: int, part: Part
) -> None:
    verdict: dict[str, list[str]] = json.loads(_mark(screening, part, "found.json").read_bytes())
    begin, end = marks.begins[i], marks.begins[i + 1]
    for reason, of in ((DUPLICATE, first), (NEAR_DUPLICATE, near)):
        for row in (begin + np.flatnonzero(of[begin:end] != np.arange(begin, end))).tolist():
            verdict[str(marks.lines[row])] = [reason, f"as {marks.place(int(of[row]))}"]
    path = screened_path(screening.directory, part.number)
    write_bytes(path, json.dumps(verdict, ensure_ascii=False).encode())


# --- the marks of a part


class Marker:
    """Reads a part and writes its rows' marks: line numbers, keys, bands, and the lines that overlap with excluded files."""

    def __init__(self, screening: Screening):
        self._screening = screening
        self._excluded = Excluded(screening.exclude)

    def __call__(self, part: Part, tick: Tick) -> None:
        if not _mark(self._screening, part, "found.json").exists():
            self._write(part)
        tick(part.num_bytes)

    def _write(self, part: Part) -> None:
        lines: list[int] = []
        keys: list[bytes] = []
        bands: list[np.ndarray] = [np.zeros((0, BANDS), np.uint64)]
        found: dict[int, list[str]] = {}
        for batch in batches(iter_lines(part.path, part.begin, part.end, first_number=part.first_line)):
            numbers, rows = self._parse(batch)
            texts = ["\n".join(texts_of(row)) for row in rows]
            overlaps = self._excluded.overlaps(texts)
            found |= {numbers[i]: [OVERLAP, detail] for i, detail in overlaps.items()}
            kept = [i for i in range(len(rows)) if i not in overlaps]
            lines += [numbers[i] for i in kept]
            if self._screening.dedup:
                keys += [row_hash(rows[i])[:16] for i in kept]
            if self._screening.dedup == "near":
                bands.append(band_hashes([texts[i] for i in kept]))
        self._save(part, "lines.npy", np.array(lines, np.uint32))
        self._save(part, "keys.npy", np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2))
        self._save(part, "bands.npy", np.ascontiguousarray(np.concatenate(bands).T))
        write_bytes(_mark(self._screening, part, "found.json"), json.dumps(found, ensure_ascii=False).encode())

    def _parse(self, batch: Sequence[Any]) -> tuple[list[int], list[Any]]:
        numbers, rows = [], []
        for line in batch:
            try:
                rows.append(parse_row(line.raw, self._screening.kind))
                numbers.append(line.number)
            except BadRow:
                continue  # it is left out, with its reason, when the part is packed
        return numbers, rows

    def _save(self, part: Part, name: str, array: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_bytes(_mark(self._screening, part, name), buffer.getvalue())


def _mark(screening: Screening, part: Part, name: str) -> Path:
    return screening.directory / f"{part.number:05d}.{name}"


def band_hashes(texts: Sequence[str]) -> np.ndarray:
    """uint64 [texts, BANDS]: texts that share an entry of a column are near duplicates. Empty texts share none."""
    grams, ends = gram_hashes(texts, SHINGLE)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(
        grams, ends.tolist(), num_perm=BANDS * ROWS_A_BAND, seed=SEED
    )
    signatures = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), BANDS, ROWS_A_BAND)
    powers = np.array([pow(0xD6E8FEB86659FD93, k + 1, 2**64) for k in range(ROWS_A_BAND)], np.uint64)
    bands = (signatures * powers).sum(axis=2, dtype=np.uint64) + np.arange(BANDS, dtype=np.uint64)
    is_empty = np.diff(ends) == 0
    bands[is_empty] = np.arange(is_empty.sum(), dtype=np.uint64)[
        :, None
    ]  # below any real one, and never seen: see first_of_near
    return bands


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise UsageError("--dedup near needs rensa", "pip install 'mm-toolkit[dedup]'") from None
    return rensa


# --- the marks of all parts, compared


class _Marks:
    """Rows of all parts, numbered in the order of parts and lines."""

    def __init__(self, screening: Screening, parts: Sequence[Part]):
        self._screening, self._parts = screening, parts
        lines = [np.load(_mark(screening, part, "lines.npy")) for part in parts]
        self.lines = np.concatenate([np.empty(0, np.uint32), *lines])
        self.begins = np.concatenate([[0], np.cumsum([len(found) for found in lines])]).astype(np.int64)
        self.num_rows = len(self.lines)
        self._num_slices = -(-self.num_rows // SLICE_ROWS) or 1

    def place(self, row: int) -> str:
        """A row's file and line, in words."""
        part = self._parts[int(np.searchsorted(self.begins, row, side="right")) - 1]
        return f"{part.path} line {self.lines[row]}"

    def first_of_equal(self) -> np.ndarray:
        """int64 [rows]: the first row with the same key; the row itself where it is the first."""
        first = np.arange(self.num_rows)
        for rows, keys in self._slices("keys.npy", lambda found: (found[:, 0], found[:, 1])):
            _note_first(first, rows, keys)
        return first

    def first_of_near(self, first: np.ndarray) -> np.ndarray:
        """int64 [rows]: the first row that shares a band; the row itself where none does, or where it equals another."""
        near = np.arange(self.num_rows)
        for band in range(BANDS):
            for rows, keys in self._slices("bands.npy", lambda found, band=band: (found[band],)):
                is_own = (first[rows] == rows) & (keys[0] >= SLICE_ROWS)  # small numbers stand for empty texts
                _note_first(near, rows[is_own], [key[is_own] for key in keys])
        return near

    def _slices(
        self, name: str, columns: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Row numbers and key columns, equal keys always in the same slice; rows ascending."""
        for number in range(self._num_slices):
            rows, found = [], []
            for part, begin in zip(self._parts, self.begins, strict=False):
                keys = columns(np.load(_mark(self._screening, part, name), mmap_mode="r"))
                at = np.flatnonzero(keys[0] % np.uint64(self._num_slices) == number)
                rows.append(begin + at)
                found.append([key[at] for key in keys])
            yield np.concatenate(rows), [np.concatenate(column) for column in zip(*found, strict=True)]


def _note_first(first: np.ndarray, rows: np.ndarray, keys: Sequence[np.ndarray]) -> None:
    """For rows with equal keys, lowers `first` to the smallest row among them. rows ascend."""
    if not len(rows):
        return
    order = np.lexsort((rows, *keys))
    ordered = rows[order]
    is_new = np.concatenate([[True], np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)])
    leader = ordered[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    first[ordered] = np.minimum(first[ordered], leader)


# --- excluded files


class Excluded:
    """The n-grams of texts that must not be trained on.

    A file holds texts, one a line, or JSON, of which every string counts as a text. Texts below EXCLUDE_N units are not
    looked for.
    """

    def __init__(self, paths: Sequence[Path]):
        self._places: list[str] = []
        texts: list[str] = []
        self.num_short = 0
        for path in paths:
            for line in iter_lines(path):
                for text in _texts_in(line.raw):
                    if num_units(text) < EXCLUDE_N:
                        self.num_short += 1
                        continue
                    texts.append(text)
                    self._places.append(f"{path} line {line.number}")
        grams, ends = gram_hashes(texts, EXCLUDE_N) if texts else (np.zeros(0, np.uint64), np.zeros(1, np.int64))
        of = np.repeat(np.arange(len(texts)), np.diff(ends))
        pairs = np.unique(np.stack([grams, of.astype(np.uint64)], axis=1), axis=0)  # a gram counts once a text
        self._grams, self._texts = pairs[:, 0].copy(), pairs[:, 1].astype(np.int64)
        self._num_grams = np.bincount(self._texts, minlength=len(texts))

    def __len__(self) -> int:
        return len(self._places)

    def overlaps(self, texts: Sequence[str]) -> dict[int, str]:
        """Of texts that overlap with an excluded one: their number, and how much of which."""
        if not len(self):
            return {}
        grams, ends = gram_hashes(texts, EXCLUDE_N)
        of = np.repeat(np.arange(len(texts)), np.diff(ends))
        low, high = (np.searchsorted(self._grams, grams, side) for side in ("left", "right"))
        is_hit = high > low
        if not is_hit.any():
            return {}
        hits = np.unique(np.stack([of[is_hit], low[is_hit], high[is_hit]], axis=1), axis=0)  # a gram counts once a row
        counts = hits[:, 2] - hits[:, 1]
        entry = np.repeat(hits[:, 1] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        pairs, shared = np.unique(
            np.stack([np.repeat(hits[:, 0], counts), self._texts[entry]], axis=1), axis=0, return_counts=True
        )
        found: dict[int, tuple[float, int]] = {}
        for (row, text), count in zip(pairs.tolist(), shared.tolist(), strict=True):
            share = count / int(self._num_grams[text])
            if share >= EXCLUDE_SHARE and share > found.get(row, (0.0, 0))[0]:
                found[row] = (share, text)
        return {
            row: f"{100 * share:.0f}% of the {EXCLUDE_N}-grams of {self._places[text]}"
            for row, (share, text) in found.items()
        }


def _texts_in(raw: bytes) -> Iterator[str]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = raw.decode("utf-8", errors="replace")
    yield from _strings(value if isinstance(value, (dict, list, str)) else raw.decode())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)
