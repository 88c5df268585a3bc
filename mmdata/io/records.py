"""Typed records in JSON files: msgspec structs instead of dictionaries.

Keys that a struct does not declare are ignored and declared fields with a default may be missing, so files of older and
newer versions open. Reading accepts what Python's json writes, NaN and Infinity included.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from mmdata.errors import MMError
from mmdata.io.files import FileInfo, write_json

Record = TypeVar("Record")


class FileEntry(msgspec.Struct, frozen=True):
    """A file of a directory that a record describes: its path there, its size and the sha256 of its content."""

    path: str
    bytes: int
    sha256: str


def read_record(path: Path, kind: type[Record], error: type[MMError], fix: str) -> Record:
    """Read a JSON file as a `kind`, such as a msgspec.Struct. `error` with `fix` if it is missing, malformed or mistyped."""
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise error(f"{path}: {cause.strerror}", fix) from cause
    return decode_record(content, kind, str(path), error, fix)


def decode_record(content: bytes | str, kind: type[Record], place: str, error: type[MMError], fix: str) -> Record:
    """Decode JSON text as a `kind`. place: what the message begins with, such as the file, or the file and line."""
    try:
        return convert_record(json.loads(content), kind)
    except msgspec.ValidationError as cause:
        raise error(f"{place}: {explain(cause)}", fix) from cause
    except (ValueError, RecursionError) as cause:  # not JSON, or not UTF-8
        raise error(f"{place}: not valid JSON ({cause})", fix) from cause


def convert_record(value: Any, kind: type[Record]) -> Record:
    """Make a `kind` of plain values as json.loads returns them. msgspec.ValidationError if they do not fit."""
    return msgspec.convert(value, kind, strict=True, str_keys=True, dec_hook=_counter)


def _counter(kind: Any, value: Any) -> Any:
    """Decode a `Counter[Key]`, which msgspec does not know."""
    assert get_origin(kind) is Counter, kind
    return Counter(convert_record(value, dict[get_args(kind)[0], int]))


def explain(cause: msgspec.ValidationError) -> str:
    """msgspec's message with the field first: "shards[0].rows: expected `int`, got `str`"."""
    message, _, place = str(cause).partition(" - at ")
    message = message[:1].lower() + message[1:]
    of_key = "a key of " if place.startswith("`key`") else ""
    field = re.sub(r"^.*`\$\.?|`$", "", place)
    return f"{of_key}{field}: {message}" if field else message


def plain(record: Any) -> Any:
    """Dictionaries, lists, strings and numbers of a record, keys in the order of its fields: for json.dumps."""
    return msgspec.to_builtins(record, str_keys=True)


def write_record(path: Path, record: Any, *, indent: int | None = 1) -> FileInfo:
    """Write a record as JSON, atomically; returns the file's size and sha256."""
    return write_json(path, plain(record), indent=indent)
