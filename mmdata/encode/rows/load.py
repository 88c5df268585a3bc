"""JSON values of lines, read strictly: what a JSON reader may take or refuse is the same for every line."""

import json
import re
from typing import Any

import orjson

from mmdata.encode.rows.reasons import BadRow

MAX_DEPTH = 64  # nesting of tools and tool calls; far above any schema, far below Python's recursion limit
# An escape of half of a surrogate pair: \ud800 to \udfff.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def load(raw: bytes) -> Any:
    """Return the same value or error as `load_strictly`, but use orjson where possible, because it is faster."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return load_strictly(raw)
    return value if _is_exact(value) else load_strictly(raw)


def _is_exact(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Return whether a value from orjson is certain to be what Python's json gives: without floats, which orjson also
    makes of large integers, and nested at most `levels` deep."""
    kind = type(value)
    if kind is str:
        return True
    if kind is dict:
        value = value.values()
    elif kind is not list:
        return kind is not float
    for item in value:  # noqa: SIM110 - half the time of all()
        if type(item) is not str and not (levels and _is_exact(item, levels - 1)):
            return False
    return True


def load_strictly(raw: bytes) -> Any:
    """Return the JSON value of one line, parsed by Python's json. Raises BadRow if it is not UTF-8 or not JSON,
    contains NaN, Infinity or half of a surrogate pair, or exceeds Python's limits on nesting and on digits."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise BadRow("not json", "nested too deep") from None
    except ValueError as error:  # JSONDecodeError, NaN, or an integer with too many digits
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


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def json_type(value: Any) -> str:
    """Return the name of a JSON value's type for error messages, such as "a list"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
