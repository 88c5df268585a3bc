"""JSON values of lines, read strictly: what a JSON reader may take or refuse is the same for every line."""

import json
import re
from math import nan
from typing import Any

import orjson

from mmdata.encode.rows.reasons import BadRow
from mmdata.io.records import JsonObject

MAX_DEPTH = 64  # nesting of tools and tool calls; far above any schema, far below Python's recursion limit
# An escape of half of a surrogate pair: \ud800 to \udfff.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def load(raw: bytes) -> Any:
    """Return the same value or error as `load_strictly`, but use orjson where possible, because it is faster."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return load_strictly(raw)
    # orjson says nothing of a key that it read twice: then the line has more quotes than the value's keys and strings.
    expected, quotes = _num_quotes(value), raw.count(b'"')
    if quotes == expected or (quotes - raw.count(b'\\"') == expected and b'\\\\"' not in raw):
        return value
    return load_strictly(raw)


def _num_quotes(value: Any, levels: int = MAX_DEPTH) -> float:
    """Return the number of quotes around the strings and keys of a value from orjson; NaN unless it is certain to be
    what Python's json gives: without floats, which orjson also makes of large integers, and nested at most `levels`
    deep."""
    kind, count = type(value), 0
    if kind is dict:
        count, value = 2 * len(value), value.values()
    elif kind is not list:
        return nan if kind is float else 2 * (kind is str)
    for item in value:
        count += 2 if type(item) is str else _num_quotes(item, levels - 1) if levels else nan
    return count


def load_strictly(raw: bytes) -> Any:
    """Return the JSON value of one line, parsed by Python's json. Raises BadRow if it is not UTF-8 or not JSON,
    contains NaN, Infinity, half of a surrogate pair or an object with two values of one key, or exceeds Python's limits
    on nesting and on digits."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise BadRow("not json", "nested too deep") from None
    except BadRow:
        raise
    except json.JSONDecodeError as error:
        place = f"{'' if error.msg.endswith(' at') else ', at'} character {error.pos + 1:,}"
        raise BadRow("not json", error.msg + place) from None
    except ValueError as error:  # NaN, or an integer with too many digits
        raise BadRow("not json", str(error)[:200]) from None
    if b"\\u" in raw and _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("lone surrogate", f"found \\u{ord(error.object[error.start]):04x}") from None
        except RecursionError:
            raise BadRow("not json", "nested too deep") from None
    return value


def _refuse_constant(name: str) -> None:
    """Raise ValueError: the JSON decoder calls this for NaN and Infinity."""
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Return a JSON object of its keys and values. Raises BadRow if a key has two values, of which one would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs) and (twice := [key for key, value in pairs if value != values[key]]):
        raise BadRow("repeated key", f"`{twice[0][:50]}` has two values in one object")
    return values


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def json_type(value: Any) -> str:
    """Return the name of a JSON value's type for error messages, such as "a list"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
