"""Read the rows of a file in any supported format, each as one line of JSON with its number, one at a time.

Formats: jsonl, a JSON array, csv and tsv, plain text (all also compressed, and in any encoding, see `streams`), parquet
and Arrow (see `tables`). The format is recognized by the content; csv and plain text by the file's name, too.
"""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from mmdata.errors import InputError, MMError
from mmdata.io.options import DEFAULT_READING, ReadOptions
from mmdata.io.streams import BUFFER_BYTES, DAMAGED, Stream, damaged, open_stream
from mmdata.io.tables import csv_rows, table_rows

JSONL, ARRAY, LISTS, CSV = "jsonl", "array", "lists of messages", "csv"
TEXT, WHOLE_TEXT, TABLE = "text", "whole text", "table"
_SEPARATORS = {
    "csv": ",;\t|",
    "tsv": "\t",
    "tab": "\t",
}  # of csv by suffix; of several, the most frequent one in the header
_JSON_SUFFIXES, _TEXT_SUFFIXES = ("jsonl", "json", "ndjson"), ("txt", "text", "md")
MOST_BYTES = 2**30  # of an element of a JSON array
_BOM, _SPACE = b"\xef\xbb\xbf", b" \t\r\n"
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_OUTSIDE = re.compile(rb'(?:[^\[\]{}",]++|%b)*+([\[\]{},])' % _STRING, re.DOTALL)  # up to a bracket or comma
_INSIDE = re.compile(rb'(?:[^\[\]{}"]++|%b)*+([\[\]{}])' % _STRING, re.DOTALL)  # up to a bracket
_CONTENT = re.compile(rb"\S")
_UNBROKEN = re.compile(rb'(?:[^"]++|"(?:[^"\\\n]++|\\[^\n])*+")*+')  # without line breaks in strings
_BREAK = re.compile(rb"(%b)|\s*[\r\n]\s*" % _STRING, re.DOTALL)


class Line(NamedTuple):
    """One row of a file, as JSON. number: from 1; of a line in jsonl and text, where blank lines count, else of the
    row. offset: of the row's first byte in the decompressed UTF-8 text; 0 in tables. raw: the JSON, without a line
    end."""

    number: int
    offset: int
    raw: bytes


class FileFormat(NamedTuple):
    """The format of a file: JSONL, ARRAY, LISTS (of messages, each over several lines), CSV, TEXT, WHOLE_TEXT or TABLE.
    is_plain: not compressed, decoded from another encoding, or a pipe, so that it can be read from any row on. is_packed: compressed."""

    kind: str
    is_plain: bool
    is_packed: bool = False

    @property
    def is_lines(self) -> bool:
        """True if rows may be read from any line start on, for JSONL and TEXT."""
        return self.is_plain and self.has_lines

    @property
    def has_lines(self) -> bool:
        """True if the rows are lines, possibly compressed or in another encoding."""
        return self.kind in (JSONL, TEXT)

    @property
    def has_offsets(self) -> bool:
        """True if the offsets of rows are offsets on disk."""
        return self.is_plain and self.kind != TABLE


def format_of(path: Path, options: ReadOptions = DEFAULT_READING) -> FileFormat:
    """Return the format of a file; JSONL for standard input ("-"), not read. Raises InputError if it cannot be read or
    has no supported format."""
    if str(path) == "-":
        return FileFormat(JSONL, False)
    stream = open_stream(path, options.encoding)
    stream.file.close()
    return FileFormat(_kind_of(path, stream, options), stream.is_plain or stream.is_table, stream.is_packed)


def unit_of(path: Path, options: ReadOptions = DEFAULT_READING) -> str:
    """Return what the rows of a file are called that are numbered from 1: "line" or, if a row is not a line, "row"."""
    try:
        return "line" if format_of(path, options).kind in (JSONL, TEXT) else "row"
    except MMError:  # the file is gone, or was read with other options
        return "line"


def place_of(path: Path | str, number: int, options: ReadOptions = DEFAULT_READING) -> str:
    """Return in words where a row is, such as "FILE line 3"."""
    return f"{path} {unit_of(Path(path) if isinstance(path, str) else path, options)} {number}"


def iter_lines(
    path: Path,
    begin: int = 0,
    end: int | None = None,
    *,
    first_number: int = 1,
    options: ReadOptions = DEFAULT_READING,
) -> Iterator[Line]:
    """Yield the rows of `path` that begin in [begin, end), in order. Blank lines are counted but not yielded; a byte
    order mark and the line ends (`\\n`, `\\r\\n`) are removed. begin, end: byte offsets of rows; in a table, numbers of
    rows from 0; None means the end. Of a compressed file, what comes before `begin` is decompressed and passed over, except
    what this process has read before. first_number: of the first row
    read. Raises InputError if the file cannot be read, is damaged, cut off or of no supported format."""
    kept = _take_kept(path, begin, options) if begin else None
    stream = kept.stream if kept else open_stream(path, options.encoding)
    try:
        yield from _lines(path, stream, begin, end, first_number, options, kept)
    except DAMAGED as error:
        raise damaged(path, error) from error
    finally:
        if str(path) != "-" and not any(other.stream is stream for other in _kept):
            stream.file.close()


class _Kept(NamedTuple):
    """A file that is read from its beginning, after reading a range of its rows. rows: those from `first` on, which was
    the first one behind the range. key: identifies the file and how it is read."""

    key: tuple[Any, ...]
    stream: Stream
    first: tuple[int, bytes]
    rows: Iterator[tuple[int, bytes]]


_kept: list[_Kept] = []  # of this process: one, or none


def _key(path: Path, options: ReadOptions) -> tuple[Any, ...]:
    stat = path.stat()
    return (str(path), stat.st_size, stat.st_mtime_ns, options)


def _take_kept(path: Path, begin: int, options: ReadOptions) -> _Kept | None:
    """Return the kept file if it is this one and the range from `begin` on is not passed yet."""
    if _kept and _kept[0].key == _key(path, options) and _kept[0].first[0] <= begin:
        return _kept.pop()
    return None


def _keep(kept: _Kept) -> None:
    while _kept:
        _kept.pop().stream.file.close()
    _kept.append(kept)


def _lines(
    path: Path,
    stream: Stream,
    begin: int,
    end: int | None,
    first_number: int,
    options: ReadOptions,
    kept: _Kept | None,
) -> Iterator[Line]:
    kind, file = _kind_of(path, stream, options), stream.file
    if kind == TABLE:
        yield from (Line(number, 0, raw) for number, raw in enumerate(table_rows(path, begin, end), first_number))
        return
    if kind == WHOLE_TEXT:
        text = file.read().removeprefix(_BOM)
        if text.strip():
            yield Line(1, 0, _document(text.replace(b"\r\n", b"\n")))
        return
    rows = kept.rows if kept else _rows(path, stream, kind, begin if stream.is_plain else 0)
    number = first_number - 1
    for offset, raw in chain([kept.first], rows) if kept else rows:
        if end is not None and offset >= end:
            if not stream.is_plain:
                _keep(_Kept(_key(path, options), stream, (offset, raw), rows))
            return
        if offset < begin:
            continue
        number += 1
        if kind in (JSONL, TEXT):
            raw = raw.removeprefix(_BOM).rstrip(b"\r\n")  # also where files were joined
            if not raw or raw.isspace():
                continue
        yield Line(number, offset, _document(raw) if kind == TEXT else raw)


def _rows(path: Path, stream: Stream, kind: str, begin: int) -> Iterator[tuple[int, bytes]]:
    """Return the offset of each row from `begin` on, and its JSON or, for JSONL and TEXT, the line."""
    if kind == CSV:
        return csv_rows(path, stream.file, _separator(stream), begin)
    if kind in (ARRAY, LISTS):
        return _array_rows(path, stream.file, begin, is_bare=kind == LISTS)
    return _text_lines(stream.file, begin)


def _text_lines(file: Any, begin: int) -> Iterator[tuple[int, bytes]]:
    offset = file.seek(begin) if begin else 0
    for raw in file:
        yield offset, raw
        offset += len(raw)


def _document(text: bytes) -> bytes:
    """Return the row of a plain text; unchanged if it is not UTF-8, so that it is left out for this reason."""
    try:
        return orjson.dumps({"text": text.decode()})
    except UnicodeDecodeError:
        return text


# --- formats


def _kind_of(path: Path, stream: Stream, options: ReadOptions) -> str:
    """Return the format of an opened file. Raises InputError for plain text, unless `options.text` or the kind
    "document" allow it, and for JSON whose first row has several lines."""
    text = options.text or ("line" if options.kind == "document" else None)
    if stream.is_table:
        return TABLE
    suffix = _suffix(stream)
    head = stream.head.removeprefix(_BOM).lstrip(_SPACE)
    is_list = re.match(rb"\[\s*[\[{]", head) or (head.startswith(b"[") and suffix in _JSON_SUFFIXES)
    if is_list and _is_array(head):
        return ARRAY
    if is_list or re.match(rb'\{\s*["}]', head):
        line, line_end, _ = head.partition(b"\n")
        if is_list and line_end and not line.rstrip().endswith(b"]") and not _is_json(line):
            return LISTS
        if line.rstrip() == b"{":
            raise InputError(
                f"{path}: its first row is spread over several lines",
                f"jq -c . {path} > NEW.jsonl; if it holds the rows in a list: jq -c '.KEY[]'",
            )
        return JSONL
    if suffix in _SEPARATORS:
        return CSV
    if suffix in _JSON_SUFFIXES or not (text or suffix in _TEXT_SUFFIXES):
        return JSONL
    if text:
        return TEXT if text == "line" else WHOLE_TEXT
    raise InputError(f"{path} is plain text, not JSON", "--text line: a document a line; --text file: one document")


def _suffix(stream: Stream) -> str:
    return stream.name.lower().rpartition(".")[2] if "." in stream.name else ""


def _separator(stream: Stream) -> str:
    header = stream.head.partition(b"\n")[0].decode(errors="replace")
    return max(_SEPARATORS[_suffix(stream)], key=header.count)


def _is_array(head: bytes) -> bool:
    """Return whether text that begins with "[" is a JSON array of rows, and not jsonl whose first row is a list, such
    as of messages. head: the beginning of the text; a longer element is taken for a row."""
    line, _, rest = head.partition(b"\n")
    text = head.decode(errors="replace")
    try:
        first, _ = json.JSONDecoder().raw_decode(text, len(text) - len(text[1:].lstrip()))
    except (ValueError, RecursionError):
        return True
    if isinstance(first, dict) and not any(keys.isdisjoint(first) for keys in _MESSAGE_KEYS):
        return False
    if not _is_json(line):
        return True
    following = rest.lstrip(_SPACE)
    return not following.startswith(b"{") if isinstance(first, (dict, list)) else not following


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


_MESSAGE_KEYS = ({"role", "from"}, {"content", "value", "tool_calls", "function_call"})


def _array_rows(path: Path, file: Any, begin: int, *, is_bare: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield offset and JSON (without line breaks outside strings) of each element of one or more JSON arrays, or, with
    is_bare, of these arrays themselves. begin: 0, or the offset of such a row. Memory: twice the longest element, and BUFFER_BYTES."""
    if begin:
        file.seek(begin)
    base, buffer = begin, b""  # the buffer's offset in the file
    start = at = 0  # in the buffer: the beginning of an element, and where to look for its next bracket or comma
    is_open, depth, number = begin > 0 and not is_bare, 0, 0  # inside an array; brackets that are open in the element
    while True:
        if not is_open and (found := _CONTENT.search(buffer, start)):
            if found[0] != b"[":
                where = f"byte {base + found.start():,}"
                raise InputError(f"{path}: {where}: text after the end of the JSON array", "use one array, or jsonl")
            is_open, at, depth = True, found.end(), int(is_bare)
            start = found.start() if is_bare else at
        match = (_INSIDE if depth else _OUTSIDE).match(buffer, at) if is_open else None
        if match:
            mark, at = match[1], match.end()
            if mark in b"[{":
                depth += 1
            elif depth:
                depth -= 1
                if is_bare and not depth:
                    number += 1
                    yield base + start, _on_one_line(buffer[start:at])
                    is_open, start = False, at
            else:
                raw = buffer[start : at - 1]
                if element := raw.strip(_SPACE) or (b"" if mark == b"]" else b" "):
                    number += 1
                    yield base + start + len(raw) - len(raw.lstrip(_SPACE)), _on_one_line(element)
                is_open, start = mark == b",", at
            continue
        more = file.read(max(BUFFER_BYTES, len(buffer) - start))
        if not more:
            break
        if base == 0 and not buffer:
            more = more.replace(_BOM, b"   ", 1) if more.startswith(_BOM) else more
        base, at, buffer, start = base + start, at - start, buffer[start:] + more, 0
        if len(buffer) > MOST_BYTES:
            raise InputError(
                f"{path}: row {number + 1:,} is longer than {MOST_BYTES:,} bytes: a quote is missing",
                "look at the row before it",
            )
    if is_open:
        raise damaged(path, f"the JSON array does not end after {number:,} rows")


def _on_one_line(element: bytes) -> bytes:
    """Return JSON with a space for each line break outside strings and the white space around it."""
    if b"\n" not in element:
        return element
    if not _UNBROKEN.fullmatch(element):  # no JSON, and must not become it
        return _BREAK.sub(lambda match: match[1] or b" ", element)
    return b" ".join([line.strip() for line in element.split(b"\n")])
