"""Many conversations as columns: the roles and contents of the messages of all rows end to end, for vectorized work
with Arrow and numpy.

Of the 2P conversations of P pairs, the first P are the chosen sides and the others the rejected ones, in the same
order. Tools, tool calls and reasoning are rare and are stored in dictionaries. `read_lines` takes only lines of the
usual form, called plain here: only the keys of MiniMind's files, with string values; roles in the usual order, a system
message only at the beginning; user messages and answers that are not blank; no string of a special token in any text;
and no content that is the placeholder 无. All other lines are left to `rows.parse_row`, which accepts more forms and
alone decides what is wrong with a row.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mmdata.encode.rows import (
    PLACEHOLDER,
    BadRow,
    Conversation,
    Message,
    Pair,
    calls_of,
    canonical_calls,
    canonical_tools,
    objects_of,
)
from mmdata.encode.sequences import ranges
from mmdata.encode.validate import CONTROL, may_hold_control
from mmdata.io.records import JsonObject

ROLES = ("system", "user", "assistant", "tool")
SYSTEM, USER, ASSISTANT, TOOL = range(len(ROLES))
_CODES = {role: code for code, role in enumerate(ROLES)}
FEW = 16  # `_parsed` does not divide this number of lines, or fewer, when Arrow's reader refuses them
_FIELDS = ("role", "content", "reasoning_content", "tools", "tool_calls")
# The characters for which str.isspace is true; Arrow has its own definition of space.
SPACE = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# Matches every string that CONTROL matches, and some more. Arrow's regular expressions (RE2) have an ASCII-only \w.
_MAY_BE_CONTROL = r"<(?:\|[^|<>]+\|>|/?s>|unk>)"
_START = len(ROLES)  # in place of the role before a conversation's first message
_MAY_FOLLOW = np.zeros((_START + 1, len(ROLES)), bool)  # [role before (or _START), role]
for _before, _role in (
    (_START, SYSTEM), (_START, USER), (SYSTEM, USER), (USER, ASSISTANT), (ASSISTANT, USER), (ASSISTANT, TOOL), (TOOL, TOOL),
    (TOOL, ASSISTANT),
):  # fmt: skip
    _MAY_FOLLOW[_before, _role] = True
_to_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class ToolSpecs:
    """The tools of a conversation, as JSON objects. `read_lines` shares one instance among lines with the same text."""

    specs: tuple[JsonObject, ...]

    @cached_property
    def canonical(self) -> str:
        """The tools as text for the row's hash: JSON with sorted keys, preceded by its length."""
        return canonical_tools(self.specs)

    @cached_property
    def written(self) -> dict[Any, str]:
        """What a template writes of the tools, kept by those who make it."""
        return {}


@dataclass(frozen=True)
class Conversations:
    """R conversations with M messages in all, as columns. counts: int64 [R], messages of each. roles: int8 [M], indices
    of ROLES. contents: Arrow string array [M] without nulls. extras: the complete messages that have more than role and
    content, by message index. tools: by conversation index. is_pairs: the sides of P = R / 2 pairs, chosen ones
    first."""

    counts: np.ndarray
    roles: np.ndarray
    contents: Any
    extras: dict[int, Message] = field(default_factory=dict)
    tools: dict[int, ToolSpecs] = field(default_factory=dict)
    is_pairs: bool = False

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 [R]: the index of the first message of each conversation."""
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def row_of(self) -> np.ndarray:
        """int64 [M]: the index of the conversation to which each message belongs."""
        return np.repeat(np.arange(len(self)), self.counts)

    @cached_property
    def is_first(self) -> np.ndarray:
        """bool [M]: True for messages that are the first of their conversation."""
        is_first = np.zeros(len(self.roles), bool)
        is_first[self.begins] = True
        return is_first

    @cached_property
    def num_shared(self) -> np.ndarray:
        """int64 [P], only for pairs: the number of leading messages that are equal on both sides."""
        half = len(self) // 2
        sizes = np.minimum(self.counts[:half], self.counts[half:])
        one, other = ranges(self.begins[:half], sizes), ranges(self.begins[half:], sizes)
        contents = (self.contents.take(as_arrow(side)) for side in (one, other))
        is_same = as_numpy(compute().equal(*contents)) & (self.roles[one] == self.roles[other])
        has_extra = np.zeros(len(self.roles), bool)
        has_extra[list(self.extras)] = True
        for i in np.flatnonzero(has_extra[one] | has_extra[other]).tolist():
            is_same[i] &= self.extras.get(int(one[i])) == self.extras.get(int(other[i]))
        first = sizes.copy()
        pair_of = np.repeat(np.arange(half), sizes)[~is_same]
        np.minimum.at(first, pair_of, one[~is_same] - self.begins[pair_of])
        return first

    @cached_property
    def is_repeated(self) -> np.ndarray:
        """bool [M]: True for a rejected side's copies of leading messages of the chosen side; all False without pairs."""
        if not self.is_pairs:
            return np.zeros(len(self.roles), bool)
        last = self.begins + np.concatenate([np.zeros_like(self.num_shared), self.num_shared])
        return np.arange(len(self.roles)) < last[self.row_of]

    def num_characters(self) -> np.ndarray:
        """Return the `rows.num_characters` of each row (int64 [R], or [P] for pairs)."""
        sizes = as_numpy(compute().utf8_length(self.contents)).astype(np.int64)
        for at, message in self.extras.items():
            sizes[at] += len(message.reasoning_content or "")
        sizes[self.is_repeated] = 0
        sums = np.add.reduceat(sizes, self.begins) if len(self) else sizes
        return sums.reshape(2, -1).sum(axis=0) if self.is_pairs else sums

    def hashes(self) -> np.ndarray:
        """Return the SHA-256 digest of each row, equal to `rows.row_hash` (uint8 [R, 32], or [P, 32] for pairs)."""
        import pyarrow as pa

        pc = compute()
        names = strings([f"{begin}{role} " for begin in ("", "conversation ") for role in ROLES])
        heads = names.take(as_arrow((self.roles + len(ROLES) * self.is_first).astype(np.int8)))
        sizes = pc.cast(pc.binary_length(self.contents), pa.string())
        tails = TextCodes([""], len(self.roles))
        for at, message in self.extras.items():
            tails.append(at, canonical_calls(message))
        for row, tools in self.tools.items():
            tails.append(int(self.begins[row] + self.counts[row]) - 1, tools.canonical)
        texts = join_messages(self.counts, heads, sizes, strings([":"])[0], self.contents, tails.array())
        half, sha256 = len(self) // 2, hashlib.sha256
        if self.is_pairs:
            digests = [
                _pair_digest(*sides) for sides in zip(_bytes_of(texts[:half]), _bytes_of(texts[half:]), strict=True)
            ]
        else:
            digests = [sha256(text).digest() for text in _bytes_of(texts)]
        return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)

    def only(self, is_kept: np.ndarray, counts: np.ndarray | None = None) -> "Conversations":
        """Return the conversations where `is_kept` (bool [R], equal for both sides of a pair) is True. counts: int64
        [conversations], how many of the first messages of each to keep; None for all."""
        if is_kept.all() and counts is None:
            return self
        of_message = is_kept[self.row_of]
        if counts is not None:
            left = np.zeros(len(self), np.int64)
            left[is_kept] = counts
            of_message = np.arange(len(self.roles)) < (self.begins + left)[self.row_of]
        row, message = np.cumsum(is_kept) - 1, np.cumsum(of_message) - 1
        return Conversations(
            self.counts[is_kept] if counts is None else counts,
            self.roles[of_message],
            self.contents.filter(truths(of_message)),
            {int(message[i]): extra for i, extra in self.extras.items() if of_message[i]},
            {int(row[i]): tools for i, tools in self.tools.items() if is_kept[i]},
            self.is_pairs,
        )


class TextCodes:
    """A column of strings of which few are different: `codes` (int32 [size], at first 0) are indices of `table`."""

    def __init__(self, table: Sequence[str], size: int):
        self.table = list(table)
        self.codes = np.zeros(size, np.int32)
        self._code_of = {text: code for code, text in enumerate(table)}

    def append(self, at: int, text: str) -> None:
        """Append `text` to the string of element `at`."""
        self.set(at, self.table[self.codes[at]] + text)

    def set(self, at: int, text: str) -> None:
        """Replace the string of element `at` by `text`."""
        self.codes[at] = self.code(text)

    def code(self, text: str) -> int:
        """Return the index of `text` in the table, to which it is added if it is new."""
        code = self._code_of.setdefault(text, len(self.table))
        if code == len(self.table):
            self.table.append(text)
        return code

    def array(self) -> Any:
        """Return the column as an Arrow string array [size]."""
        return strings(self.table).take(as_arrow(self.codes))


def columns_of(rows: Sequence[Conversation] | Sequence[Pair]) -> Conversations:
    """Convert parsed rows, all conversations or all pairs, to columns."""
    is_pairs = bool(rows) and isinstance(rows[0], Pair)
    pairs = [row for row in rows if isinstance(row, Pair)]
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    sides += [row for row in rows if isinstance(row, Conversation)]
    messages = [message for side in sides for message in side.messages]
    has_extra = (i for i, message in enumerate(messages) if message.has_extras)
    return Conversations(
        np.fromiter((len(side.messages) for side in sides), np.int64, len(sides)),
        np.fromiter((_CODES[message.role] for message in messages), np.int8, len(messages)),
        strings([message.content for message in messages]),
        {i: messages[i] for i in has_extra},
        {i: ToolSpecs(side.tools) for i, side in enumerate(sides) if side.tools},
        is_pairs,
    )


# --- reading lines


def read_lines(raws: Sequence[bytes], kind: str) -> tuple[np.ndarray, Conversations]:
    """Read the plain lines (see above) into columns. Return their indices in `raws` (int64, ascending) and the columns;
    other lines are skipped. kind: "conversation" or "pair". Conversations are read from the key `messages` if the first
    line begins with it, else from `conversations`; lines with the other key are skipped."""
    names = ("conversations",)
    if kind == "pair":
        names = ("chosen", "rejected")
    elif raws and raws[0][:16].lstrip(b"{ ").startswith(b'"messages"'):
        names = ("messages",)
    at, sides = _read(raws, names)
    columns, is_plain = _columns(sides)
    is_plain &= _is_in_order(columns)
    may_hold = np.array([may_hold_control(raws[i]) for i in at.tolist()], bool)
    is_plain &= ~_holds_control(columns, np.tile(may_hold, len(names)))
    is_kept = np.bincount(columns.row_of[~is_plain], minlength=len(columns)) == 0
    if columns.is_pairs:
        is_kept = np.tile(is_kept.reshape(2, -1).all(axis=0) & _are_sides(columns), 2)
    return at[is_kept[: len(at)]], columns.only(is_kept)


def _columns(sides: Sequence[Any]) -> tuple[Conversations, np.ndarray]:
    """Convert Arrow's lists of messages to columns. Return these and bool [M]: False for messages that make their line
    one to skip: missing or blank content, unknown role, or invalid tools, tool calls or reasoning. sides: one list
    array of conversations, or two of equal length (chosen, rejected) for pairs."""
    import pyarrow as pa

    pc = compute()
    counts = np.concatenate([as_numpy(pc.list_value_length(side)) for side in sides]).astype(np.int64)
    fields = sides[0].flatten() if len(sides) == 1 else pa.concat_arrays([side.flatten() for side in sides])
    role, contents, reasoning, tools, calls = (fields.field(i) for i in range(len(_FIELDS)))
    roles = as_numpy(pc.index_in(role, strings(ROLES)), null=-1).astype(np.int8)
    is_plain = as_numpy(pc.is_valid(contents)) & as_numpy(pc.is_valid(fields)) & (roles >= 0)
    contents = pc.fill_null(contents, strings([""])[0])
    columns = Conversations(counts, roles, contents, is_pairs=len(sides) == 2)
    is_plain &= ~as_numpy(pc.equal(contents, strings([PLACEHOLDER])[0]))
    may_be_blank = (roles == SYSTEM) | (roles == TOOL)
    for i in np.flatnonzero((byte_sizes(calls) > 0) | as_numpy(pc.is_valid(reasoning))).tolist():
        message = _with_extras(roles[i], contents[i].as_py(), reasoning[i].as_py(), calls[i].as_py())
        if message is None:
            is_plain[i] = False
        else:
            columns.extras[i] = message
            may_be_blank[i] |= bool(message.tool_calls)
    is_plain &= may_be_blank | (byte_sizes(pc.utf8_ltrim(contents, SPACE)) > 0)
    for i in np.flatnonzero(byte_sizes(tools) > 0).tolist():
        specs = _tools(tools[i].as_py()) if columns.is_first[i] else None
        if specs is None:
            is_plain[i] = False
        elif specs.specs:
            columns.tools[int(columns.row_of[i])] = specs
    return columns, is_plain


def _holds_control(columns: Conversations, may_hold: np.ndarray) -> np.ndarray:
    """Return bool [M]: True for messages of the lines `may_hold` (bool [R]) that may have a special-token string."""
    is_held = may_hold[columns.row_of]
    contents = columns.contents.filter(truths(is_held))
    is_held[is_held] = as_numpy(compute().match_substring_regex(contents, _MAY_BE_CONTROL))
    return is_held


def _is_in_order(columns: Conversations) -> np.ndarray:
    """Return bool [M]: False if the role may not follow the one before it, or may not end the conversation."""
    roles = np.maximum(columns.roles, 0)
    before = np.roll(roles, 1)
    before[columns.is_first] = _START
    is_last = np.roll(columns.is_first, -1)
    return _MAY_FOLLOW[before, roles] & (~is_last | (roles == ASSISTANT))


def _are_sides(columns: Conversations) -> np.ndarray:
    """Return bool [P]: True if both sides have the same tools and first differ in a message of the assistant."""
    half = len(columns) // 2
    shared = columns.num_shared
    is_pair = shared < np.minimum(columns.counts[:half], columns.counts[half:])
    first = np.stack([columns.begins[:half], columns.begins[half:]]) + shared
    first = np.minimum(first, len(columns.roles) - 1)
    is_pair &= (columns.roles[first] == ASSISTANT).all(axis=0)
    for row in columns.tools:
        one, other = (columns.tools.get(row % half + side) for side in (0, half))
        is_pair[row % half] &= one is not None and other is not None and one.specs == other.specs
    return is_pair


def _with_extras(role: int, content: str, reasoning: str | None, calls: str | None) -> Message | None:
    """Return an answer with reasoning, calls (JSON) or both; None if it is not valid or has a special-token string."""
    if role != ASSISTANT or CONTROL.search(reasoning or ""):
        return None
    tool_calls = _plain_objects(calls_of, calls) if calls else ()
    return None if tool_calls is None else Message("assistant", content, reasoning, tool_calls)


@lru_cache(maxsize=1024)
def _tools(text: str) -> ToolSpecs | None:
    """Return a conversation's tools, or None if they are not valid or contain the string of a special token."""
    specs = _plain_objects(objects_of, text)
    return None if specs is None else ToolSpecs(specs)


def _plain_objects(read: Callable[[Any, str], tuple[JsonObject, ...]], text: str) -> tuple[JsonObject, ...] | None:
    """Parse JSON text with `read`. Return None on BadRow or if it contains the string of a special token."""
    try:
        objects = read(text, "")
    except BadRow:
        return None
    may_hold = "<" in text or "\\u" in text
    return None if may_hold and CONTROL.search(_to_json(objects)) else objects


def _read(raws: Sequence[bytes], names: Sequence[str]) -> tuple[np.ndarray, list[Any]]:
    """Parse the lines that are an object of the keys `names` only, each a non-empty list of messages. Return their
    indices (int64, ascending), and for each key an Arrow array of these lists."""
    import pyarrow as pa

    # Arrow reads the lines joined. No JSON value that starts with { continues after } with {, so none spans two lines.
    lines = [i for i, raw in enumerate(raws) if raw[:1] == b"{" and raw[-1:] == b"}"]
    kind = pa.list_(pa.struct([(name, pa.string()) for name in _FIELDS]))
    parts = _parsed([raws[i] for i in lines], pa.schema([(name, kind) for name in names]), 0)
    at = np.array(lines, np.int64)[np.concatenate([np.empty(0, np.int64), *(index for index, _ in parts)])]
    columns = [[table.column(n).combine_chunks() for _, table in parts] for n in range(len(names))]
    arrays = [pa.concat_arrays(column) if column else pa.nulls(0, kind) for column in columns]
    sizes = [as_numpy(compute().list_value_length(array)) for array in arrays]
    is_full = np.min(sizes, axis=0) > 0
    if not is_full.all():
        at, arrays = at[is_full], [array.filter(truths(is_full)) for array in arrays]
    return at, arrays


def _parsed(raws: Sequence[bytes], schema: Any, begin: int) -> list[tuple[np.ndarray, Any]]:
    """Parse lines with Arrow's JSON reader. Return tables, each with the indices of its lines (int64, from `begin`). If
    Arrow refuses the lines, each half of them is tried on its own; FEW or less are left out."""
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
            table.validate(full=True)  # checks that strings are UTF-8
            return [(np.arange(begin, begin + len(raws)), table)]
    except pa.ArrowInvalid:
        pass
    if len(raws) <= FEW:
        return []
    half = len(raws) // 2
    return _parsed(raws[:half], schema, begin) + _parsed(raws[half:], schema, begin + half)


# --- Arrow and numpy


def join_messages(counts: np.ndarray, *columns: Any) -> Any:
    """Return an Arrow string array [R]: the texts of each row's messages joined; a message's text is its strings in all
    columns. counts: int64 [R], messages of each row. columns: Arrow string arrays [M], or one string for all
    messages."""
    import pyarrow as pa

    pc = compute()
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    (nothing,) = strings([""])
    pieces = pc.binary_join_element_wise(*columns, nothing)
    return pc.binary_join(pa.ListArray.from_arrays(as_arrow(offsets), pieces), nothing)


def _bytes_of(texts: Any) -> Iterator[memoryview]:
    """Iterate over the UTF-8 bytes of each string of an Arrow string array, without copying them."""
    _, offsets, values = texts.buffers()
    ends = np.frombuffer(offsets, np.int32, len(texts) + 1, 4 * texts.offset).tolist()
    view = memoryview(values) if values else memoryview(b"")
    return (view[begin:end] for begin, end in itertools.pairwise(ends))


def _pair_digest(chosen: memoryview, rejected: memoryview) -> bytes:
    """Return the digest of a pair from the hashed forms of its sides, equal to `rows.row_hash`."""
    digest = hashlib.sha256(b"pair %d:" % len(chosen))
    digest.update(chosen)
    digest.update(rejected)
    return digest.digest()


def strings(texts: Sequence[str]) -> Any:
    """Return an Arrow string array, built from buffers because pa.array and pa.scalar would import pandas."""
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    offsets = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return pa.Array.from_buffers(
        pa.string(), len(encoded), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    )


def truths(values: np.ndarray) -> Any:
    """Return an Arrow boolean array of a numpy bool array."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little"))])


def compute() -> Any:
    """Return `pyarrow.compute`, imported at first use; as Any, because its functions are made at run time."""
    import pyarrow.compute

    return pyarrow.compute


def as_arrow(values: np.ndarray) -> Any:
    """Return an Arrow array of a numpy array, with the same type and memory."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def as_numpy(array: Any, null: int = 0) -> np.ndarray:
    """Return an Arrow array of numbers as a numpy view of its memory, or one of booleans as a copy. null: the number
    for null elements, in int32 arrays only."""
    import pyarrow as pa

    if pa.types.is_boolean(array.type):
        return as_numpy(array.cast(pa.uint8())).astype(bool)
    if array.null_count:
        array = compute().fill_null(array, as_arrow(np.array([null], np.int32))[0])
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def byte_sizes(texts: Any) -> np.ndarray:
    """Return the number of UTF-8 bytes of each string of an Arrow array (int32 [N]), 0 for nulls."""
    return as_numpy(compute().binary_length(texts))
