"""Read and write JSON files as typed records (msgspec structs) instead of dictionaries.

Undeclared keys are ignored, and fields with a default may be missing, so that files of older and newer versions can be
read. NaN and Infinity are read as Python's json module writes them; the types below refuse them where a field must have
a finite value. A record that decides results contains a hash of itself (`sealed`), which reading compares.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec

from mmdata.errors import MMError
from mmdata.io.files import FileInfo, read_bytes, write_json

SEAL = "record_sha256"  # the key of a record's hash of itself
JsonObject = dict[str, Any]  # an object whose fields the project does not define, such as the schema of a tool
Record = TypeVar("Record")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]  # neither NaN nor infinite
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
PathText = Annotated[str, msgspec.Meta(pattern="^[^\0\ud800-\udfff]*$")]  # what the name of a file may contain


class FileEntry(msgspec.Struct, frozen=True):
    """A file in a directory: its path relative to the directory, size in bytes, and sha256 in hex digits."""

    path: PathText
    bytes: Count
    sha256: str


def read_record(path: Path, kind: type[Record], error: type[MMError], fix: str) -> Record:
    """Read a JSON file and convert it to the type `kind`, such as a msgspec.Struct or `dict[str, int]`. Raises
    `error(message, fix)` if it cannot be read, is not JSON, does not match, or differs from its hash of itself. fix:
    what the user can do about it.
    """
    try:
        content = read_bytes(path)
    except OSError as cause:
        raise error(f"{path}: {cause.strerror}", fix) from cause
    return decode_record(content, kind, str(path), error, fix)


def decode_record(content: bytes | str, kind: type[Record], place: str, error: type[MMError], fix: str) -> Record:
    """Decode JSON text and convert it to the type `kind`. Raises `error(message, fix)` if it is not JSON or does not
    match. place: where the text comes from, such as a file and line; the error message begins with it.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError for half a pair of surrogates
        if isinstance(value, dict) and (seal := value.pop(SEAL, None)) not in (None, actual := _hash_of(value)):
            raise error(f"{place}: damaged or edited: its {SEAL} is {seal}, its content gives {actual}", fix)
        return convert_record(value, kind)
    except msgspec.ValidationError as cause:
        raise error(f"{place}: {explain(cause)}", fix) from cause
    except (ValueError, RecursionError) as cause:  # not JSON, or not UTF-8
        raise error(f"{place}: not valid JSON ({cause})", fix) from cause


def convert_record(value: Any, kind: type[Record]) -> Record:
    """Convert a value of json.loads to the type `kind`. Types are strict: a string is not accepted for a number. Raises
    msgspec.ValidationError if it does not match.
    """
    return msgspec.convert(value, kind, strict=True, str_keys=True, dec_hook=_counter)


def _counter(kind: Any, value: Any) -> Any:
    """Convert a dictionary to a `Counter[Key]`. msgspec calls this for types it does not know; others are refused."""
    assert get_origin(kind) is Counter, kind
    return Counter(convert_record(value, dict[get_args(kind)[0], Count]))


def explain(cause: msgspec.ValidationError) -> str:
    """Return msgspec's error message with the field in front of it: "shards[0].rows: expected `int`, got `str`"."""
    message, _, place = str(cause).partition(" - at ")
    message = message[:1].lower() + message[1:]
    of_key = "a key of " if place.startswith("`key`") else ""
    field = re.sub(r"^.*`\$\.?|`$", "", place)
    return f"{of_key}{field}: {message}" if field else message


def plain(record: Any) -> Any:
    """Convert a record to dictionaries, lists, strings and numbers for json.dumps, keys in the order of the fields."""
    return msgspec.to_builtins(record, str_keys=True)


def sealed(record: Any) -> JsonObject:
    """Return `plain(record)` with one more key, SEAL: the sha256 of the others, as JSON with sorted keys."""
    value = plain(record)
    return {**value, SEAL: _hash_of(value)}


def _hash_of(value: JsonObject) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(path: Path, record: Any, *, indent: int | None = 1) -> FileInfo:
    """Write a record with its hash of itself as a JSON file, atomically, and return the file's size and sha256. indent:
    as in json.dumps.
    """
    return write_json(path, sealed(record), indent=indent)
