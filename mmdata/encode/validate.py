"""A file of rows in; what `mm validate` prints out: counts by reason with first places. One pass, memory as for one line."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from mmdata.encode.rows import LOOK_AT, BadRow, Line, Row, is_seekable, iter_lines, kind_of_lines, parse_row, texts_of

NUM_PLACES = 3
_TICK_ROWS = 1024
CONTROL = re.compile(r"<(?:\|\w+\|>|/?s>|unk>)")  # special tokens as tokenizers of all eras write them


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row was set aside, and what was found there."""

    line: int
    offset: int
    detail: str


@dataclass(slots=True)
class Validation:
    """num_rows = num_good + the sum of `reasons`. `control_strings` are special-token strings that rows say in content."""

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
    """Read every row of a file (`-`: standard input) and count what cannot be used, by reason, with the first three places.

    The kind is that of the first rows unless given. `on_bad` sees every row set aside; it may raise to stop at the first.
    `progress` gets bytes read and, for a plain file, its size (0 where the decompressed size is not known).
    Raises InputError when the file is missing, empty, damaged, or has no usable rows at its beginning.
    """
    lines = iter_lines(path)
    if kind is None:
        head = list(islice(lines, LOOK_AT))
        kind = kind_of_lines(head, path)
        lines = chain(head, lines)
    found = Validation(path, kind)
    total = path.stat().st_size if is_seekable(path) else 0
    for line in lines:
        found.num_rows += 1
        found.num_bytes = line.offset + len(line.raw)
        try:
            row = parse_row(line.raw, kind, extra_keys=found.extra_keys)
        except BadRow as bad:
            _note(found, line, bad)
            if on_bad:
                on_bad(line, bad)
        else:
            found.num_good += 1
            strings = control_strings(line.raw, row)
            found.control_strings.update(strings)
            found.num_rows_with_control += bool(strings)
        if progress and not found.num_rows % _TICK_ROWS:
            progress(found.num_bytes, total)
    if progress:
        progress(found.num_bytes, total)
    return found


def _note(found: Validation, line: Line, bad: BadRow) -> None:
    found.reasons[bad.reason] += 1
    places = found.places.setdefault(bad.reason, [])
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
