"""Validation of a jsonl file, for `mm validate`. The file is read once, with one line in memory at a time."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from mmdata.encode.encoded import EncodedRows
from mmdata.encode.rows import LOOK_AT, BadRow, Columns, Row, explain, kind_of_lines, parse_row, texts_of
from mmdata.io.files import Progress, no_progress
from mmdata.io.lines import Line, format_of, iter_lines, unit_of
from mmdata.io.options import DEFAULT_READING, ReadOptions

NUM_PLACES = 3  # bad rows of each reason whose places are recorded
_TICK_ROWS = 1024  # rows between two calls of `progress`
CONTROL = re.compile(r"<(?:\|\w+\|>|/?s>|unk>)")  # special tokens of all of MiniMind's tokenizers


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a bad row in its file, and what is wrong with it. line: from 1. offset: of the line in bytes, in
    the decompressed file."""

    line: int
    offset: int
    detail: str


@dataclass(slots=True)
class Validation:
    """The result of validating a file of one kind ("document", "conversation" or "pair"). num_rows: num_good plus the
    sum of `reasons`. num_bytes: read, decompressed. reasons: reason -> bad rows. places: reason -> the first NUM_PLACES
    bad rows. extra_keys: ignored key, metadata included -> occurrences in good rows. first_bad: line and fault of the
    first bad row, or empty. control_strings: special-token string -> occurrences in the texts of good rows.
    num_rows_with_control: good rows with such strings. unused_columns: see `Columns.unused`. not_written, text_bytes,
    unknown_bytes: as in `EncodedRows`, if rows are encoded."""

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
    first_bad: str = ""
    unused_columns: list[str] = field(default_factory=list)
    not_written: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    unknown_bytes: int = 0

    def add(self, encoded: EncodedRows) -> None:
        """Count what was found when good rows were encoded."""
        self.num_good -= len(encoded.bad)
        self.not_written += encoded.not_written
        self.text_bytes += encoded.text_bytes
        self.unknown_bytes += encoded.unknown_bytes


def validate(
    path: Path,
    *,
    kind: str | None = None,
    read: ReadOptions = DEFAULT_READING,
    encode: Callable[[list[Row]], EncodedRows] | None = None,
    on_bad: Callable[[Line, BadRow], None] | None = None,
    progress: Progress = no_progress,
) -> Validation:
    """Read every row of a file (`-`: standard input) and count the bad rows by reason. Raises InputError if the file is
    missing or damaged. Without `kind`, also if it is empty, or if its first rows are all invalid or of mixed kinds.

    kind: "document", "conversation" or "pair"; None: that of the options `read`, or of the first rows. encode: that of
    a RowEncoder; rows of which its template leaves something out, or that it cannot encode, are bad. on_bad: called
    with every bad line and its error; may raise to stop. progress: called every _TICK_ROWS rows and at the end, with
    the bytes read and the size of the file (0 if unknown: compressed, or standard input).
    """
    lines, columns = iter_lines(path, options=read), Columns.parse(read.mapping)
    kind = kind or read.kind
    if kind is None:
        head = list(islice(lines, LOOK_AT))
        kind = kind_of_lines(head, path, read)
        lines = chain(head, lines)
    counts = Validation(path, kind)
    total = path.stat().st_size if format_of(path, read).has_offsets else 0
    good: list[tuple[Line, Row]] = []

    def set_aside(line: Line, bad: BadRow) -> None:
        _note(counts, line, bad)
        counts.first_bad = counts.first_bad or f"{unit_of(path, read)} {line.number} {explain(line.raw, bad, columns)}"
        if on_bad:
            on_bad(line, bad)

    def encode_good() -> None:
        if encode and good:
            counts.add(encoded := encode([row for _, row in good]))
            for i, bad in encoded.bad.items():
                set_aside(good[i][0], bad)
        good.clear()

    for line in lines:
        counts.num_rows += 1
        counts.num_bytes = max(line.offset, counts.num_bytes) + len(line.raw)
        try:
            row = parse_row(line.raw, kind, extra_keys=counts.extra_keys, columns=columns)
        except BadRow as bad:
            set_aside(line, bad)
        else:
            counts.num_good += 1
            good.append((line, row))
            strings = control_strings(line.raw, row)
            counts.control_strings.update(strings)
            counts.num_rows_with_control += bool(strings)
        if not counts.num_rows % _TICK_ROWS:
            encode_good()
            progress(counts.num_bytes, total)
    encode_good()
    progress(counts.num_bytes, total)
    counts.unused_columns = columns.unused
    return counts


def _note(counts: Validation, line: Line, bad: BadRow) -> None:
    """Count a bad row, and record its place if it is among the first NUM_PLACES of its reason."""
    counts.reasons[bad.reason] += 1
    places = counts.places.setdefault(bad.reason, [])
    if len(places) < NUM_PLACES:
        places.append(Place(line.number, line.offset, bad.detail))


def control_strings(raw: bytes, row: Row) -> list[str]:
    """Return the special-token strings in a row's texts, one entry per occurrence. They are packed as ordinary text.
    raw: the line that `row` was parsed from; the texts are searched only if it can contain such a string."""
    if not may_hold_control(raw):
        return []
    return [match for text in texts_of(row) if "<" in text for match in CONTROL.findall(text)]


def may_hold_control(raw: bytes) -> bool:
    r"""Return whether a line may contain "<", with which special-token strings begin, as a character or as a JSON
    escape (also true for another escape that begins with \\u003)."""
    return b"<" in raw or b"\\u003" in raw
