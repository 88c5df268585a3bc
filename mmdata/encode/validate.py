"""Validation of a jsonl file for `mm validate`: rows counted by reason, with the first places. One pass, memory of one line."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from mmdata.encode.rows import LOOK_AT, BadRow, Line, Row, is_seekable, iter_lines, kind_of_lines, parse_row, texts_of

NUM_PLACES = 3
_TICK_ROWS = 1024
CONTROL = re.compile(r"<(?:\|\w+\|>|/?s>|unk>)")  # special tokens of the tokenizers of all eras


@dataclass(frozen=True, slots=True)
class Place:
    """Where a bad row stands, and what is wrong with it."""

    line: int
    offset: int
    detail: str


@dataclass(slots=True)
class Validation:
    """Counts of a file. num_rows = num_good + the sum of `reasons`; control_strings: special-token strings in rows' own text."""

    path: Path
    kind: str
    num_rows: int = 0
    num_good: int = 0
    num_bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[Place]] = field(default_factory=dict)
    extra_keys: Counter[str] = field(default_factory=Counter)
    control_strings: Counter[str] = field(default_factory=Counter)
    num_rows_with_control: int = 0


def validate(
    path: Path,
    *,
    kind: str | None = None,
    on_bad: Callable[[Line, BadRow], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Read every row of a file (`-`: standard input) and count bad rows by reason, with the first NUM_PLACES places of each.

    Without `kind`, the file's kind is that of its first rows. `on_bad` is called with every bad row and may raise to stop.
    `progress` is called with the bytes read and the file's size (0 for a compressed file).
    InputError when the file is missing, empty, damaged, or has no valid row at its beginning.
    """
    lines = iter_lines(path)
    if kind is None:
        head = list(islice(lines, LOOK_AT))
        kind = kind_of_lines(head, path)
        lines = chain(head, lines)
    counts = Validation(path, kind)
    total = path.stat().st_size if is_seekable(path) else 0
    for line in lines:
        counts.num_rows += 1
        counts.num_bytes = line.offset + len(line.raw)
        try:
            row = parse_row(line.raw, kind, extra_keys=counts.extra_keys)
        except BadRow as bad:
            _note(counts, line, bad)
            if on_bad:
                on_bad(line, bad)
        else:
            counts.num_good += 1
            strings = control_strings(line.raw, row)
            counts.control_strings.update(strings)
            counts.num_rows_with_control += bool(strings)
        if progress and not counts.num_rows % _TICK_ROWS:
            progress(counts.num_bytes, total)
    if progress:
        progress(counts.num_bytes, total)
    return counts


def _note(counts: Validation, line: Line, bad: BadRow) -> None:
    counts.reasons[bad.reason] += 1
    places = counts.places.setdefault(bad.reason, [])
    if len(places) < NUM_PLACES:
        places.append(Place(line.number, line.offset, bad.detail))


def control_strings(raw: bytes, row: Row) -> list[str]:
    """The special-token strings in a row's own text; they are packed as plain text."""
    if not may_hold_control(raw):
        return []
    return [match for text in texts_of(row) if "<" in text for match in CONTROL.findall(text)]


def may_hold_control(raw: bytes) -> bool:
    """Whether a line has the first character of a special-token string, plain or escaped."""
    return b"<" in raw or b"\\u003" in raw
