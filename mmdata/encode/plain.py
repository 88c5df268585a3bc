"""Lines that are plain conversations, read by the batch into Arrow columns: what `parse_row` gives for them, without an object a row.

Plain is a line with the keys of MiniMind's files and no others, strings where strings belong, turns in the usual order, and
no control strings. Arrow's reader is strict; lines it or the checks here decline are left to `parse_row`, which alone says
what is wrong with a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mmdata.encode.rows import PLACEHOLDER, BadRow, Message, calls_of, tools_of
from mmdata.encode.talks import (
    ASSISTANT,
    ROLES,
    SYSTEM,
    TOOL,
    USER,
    Talks,
    Tools,
    as_arrow,
    as_numpy,
    compute,
    strings,
    to_json,
    truths,
)
from mmdata.encode.validate import CONTROL

FEW = 16  # lines that are not searched further when one of them is not plain
_FIELDS = ("role", "content", "reasoning_content", "tools", "tool_calls")
# What str.isspace says of; Arrow's own idea of space may be another.
SPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# All that CONTROL finds, and a little more (RE2 knows no Unicode \w); and the answer that is none.
_UNUSUAL = rf"<(?:\|[^|<>]+\|>|/?s>|unk>)|\A{PLACEHOLDER}\z"
_START = len(ROLES)
_MAY_FOLLOW = np.zeros((_START + 1, len(ROLES)), bool)  # [before, role]; a system message at the start is none
for _before, _role in (
    (_START, SYSTEM), (_START, USER), (SYSTEM, USER), (USER, ASSISTANT), (ASSISTANT, USER), (ASSISTANT, TOOL), (TOOL, TOOL),
    (TOOL, ASSISTANT),
):  # fmt: skip
    _MAY_FOLLOW[_before, _role] = True


@dataclass(frozen=True, slots=True)
class PlainTalks:
    """Conversations: `at` int64 [R], which lines they are."""

    at: np.ndarray
    talks: Talks


def read_talks(raws: Sequence[bytes]) -> PlainTalks:
    """The conversations among these lines that are plain."""
    pc = compute()
    name = "messages" if raws and raws[0][:16].lstrip(b"{ ").startswith(b'"messages"') else "conversations"
    at, rows = _read(raws, name)
    counts = _filled(pc.list_value_length(rows), 0).astype(np.int64)
    at, counts = at[counts > 0], counts[counts > 0]
    fields = rows.flatten()
    role, said, reasoning, tools, calls = (fields.field(i) for i in range(len(_FIELDS)))
    roles = _filled(pc.index_in(role, strings(ROLES)), -1).astype(np.int8)
    is_good = as_numpy(pc.is_valid(said)) & as_numpy(pc.is_valid(fields)) & (roles >= 0)
    said = pc.fill_null(said, strings([""])[0])
    talks = Talks(counts, roles, said)
    is_good &= _is_in_order(talks)
    is_good &= ~as_numpy(pc.match_substring_regex(said, _UNUSUAL))
    is_blank = _sizes(pc.utf8_trim(said, SPACE)) == 0
    has_calls = np.zeros(len(roles), bool)
    for i in np.flatnonzero(_is_given(calls) | as_numpy(pc.is_valid(reasoning))).tolist():
        message = _with_extras(roles[i], said[i].as_py(), reasoning[i].as_py(), calls[i].as_py())
        if message is None:
            is_good[i] = False
        else:
            talks.extras[i] = message
            has_calls[i] = bool(message.tool_calls)
    is_good &= ~is_blank | (roles == SYSTEM) | (roles == TOOL) | has_calls
    for i in np.flatnonzero(_is_given(tools)).tolist():
        found = _tools(tools[i].as_py()) if talks.is_first[i] else None
        if found is None:
            is_good[i] = False
        elif found.specs:
            talks.tools[int(talks.row_of[i])] = found
    is_kept = np.bincount(talks.row_of[~is_good], minlength=len(counts)) == 0
    return PlainTalks(at[is_kept], _kept(talks, is_kept))


def _kept(talks: Talks, is_kept: np.ndarray) -> Talks:
    """The rows marked in `is_kept`, bool [R]."""
    if is_kept.all():
        return talks
    of_message = is_kept[talks.row_of]
    row, message = np.cumsum(is_kept) - 1, np.cumsum(of_message) - 1
    return Talks(
        talks.counts[is_kept],
        talks.roles[of_message],
        talks.contents.filter(truths(of_message)),
        {int(message[i]): extra for i, extra in talks.extras.items() if of_message[i]},
        {int(row[i]): tools for i, tools in talks.tools.items() if is_kept[i]},
    )


def _is_in_order(talks: Talks) -> np.ndarray:
    """bool [M]: may stand after the message before it, and end the row if it does."""
    roles = np.maximum(talks.roles, 0)
    before = np.roll(roles, 1)
    before[talks.is_first] = _START
    is_last = np.roll(talks.is_first, -1)
    return _MAY_FOLLOW[before, roles] & (~is_last | (roles == ASSISTANT))


def _with_extras(role: int, content: str, reasoning: str | None, calls: str | None) -> Message | None:
    """An answer with reasoning or calls; None where it is not plain."""
    if role != ASSISTANT or CONTROL.search(reasoning or ""):
        return None
    found = _objects(calls_of, calls) if calls else ()
    return None if found is None else Message("assistant", content, reasoning, found)


@lru_cache(maxsize=1024)
def _tools(text: str) -> Tools | None:
    found = _objects(tools_of, text)
    return None if found is None else Tools(found)


def _objects(read: Callable[[str], tuple[dict[str, Any], ...]], text: str) -> tuple[dict[str, Any], ...] | None:
    """What a string of JSON holds; None where that is not plain."""
    try:
        found = read(text)
    except BadRow:
        return None
    may_hold = "<" in text or "\\u" in text
    return None if may_hold and CONTROL.search(to_json(found)) else found


def _read(raws: Sequence[bytes], name: str) -> tuple[np.ndarray, Any]:
    """The lines that are an object with the field `name` alone, and that field of each, as one Arrow array."""
    import pyarrow as pa

    # A value cannot reach over a line's end here: what ends with } and goes on with { is no JSON.
    lines = [i for i, raw in enumerate(raws) if raw[:1] == b"{" and raw[-1:] == b"}"]
    kind = pa.list_(pa.struct([(field, pa.string()) for field in _FIELDS]))
    found = _parsed([raws[i] for i in lines], pa.schema([(name, kind)]), 0)
    at = [np.arange(begin, begin + len(array)) for begin, array in found]
    arrays = [array for _, array in found]
    array = arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays) if arrays else pa.nulls(0, kind)
    return np.array(lines, np.int64)[np.concatenate([np.empty(0, np.int64), *at])], array


def _parsed(raws: Sequence[bytes], schema: Any, begin: int) -> list[tuple[int, Any]]:
    """Stretches of lines that Arrow reads by the schema, halving those it does not; each by its first line."""
    import pyarrow as pa
    import pyarrow.json

    block = b"\n".join(raws)
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(block),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error"),
        )
        if table.num_rows == len(raws):
            array = table.column(0).combine_chunks() if table.column(0).num_chunks > 1 else table.column(0).chunk(0)
            array.validate(full=True)  # UTF-8
            return [(begin, array)]
    except pa.ArrowInvalid:
        pass
    if len(raws) <= FEW:
        return []
    half = len(raws) // 2
    return _parsed(raws[:half], schema, begin) + _parsed(raws[half:], schema, begin + half)


def _is_given(texts: Any) -> np.ndarray:
    """bool [N]: neither null nor empty."""
    return _filled(compute().binary_length(texts), 0) > 0


def _sizes(texts: Any) -> np.ndarray:
    return as_numpy(compute().binary_length(texts))


def _filled(numbers: Any, value: int) -> np.ndarray:
    """Arrow's int32 numbers, `value` where there is none."""
    return as_numpy(compute().fill_null(numbers, as_arrow(np.array([value], np.int32))[0]))
