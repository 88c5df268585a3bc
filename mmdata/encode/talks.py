"""Conversations of a batch as columns: roles and contents of all their messages end to end, for native code to work on.

Made from objects here, straight from lines in `plain`. What a row needs a look at for (tools, calls, reasoning) stands beside
the columns.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mmdata.encode.rows import Conversation, Message, canonical_calls, canonical_tools

ROLES = ("system", "user", "assistant", "tool")
SYSTEM, USER, ASSISTANT, TOOL = range(len(ROLES))
_CODES = {role: code for code, role in enumerate(ROLES)}
to_json = json.JSONEncoder(ensure_ascii=False).encode  # as the templates' filter writes it


@dataclass(frozen=True)
class Tools:
    """The tools of a conversation, and how they are written; many rows share one."""

    specs: tuple[dict[str, Any], ...]

    @cached_property
    def canonical(self) -> str:
        """As they are hashed."""
        return canonical_tools(self.specs)

    @cached_property
    def rendered(self) -> str:
        """As templates of blocks write them: a line each, a newline before it."""
        return "".join([f"\n{to_json(tool)}" for tool in self.specs])


@dataclass(frozen=True)
class Talks:
    """R conversations of M messages in all.

    counts: int64 [R], messages of each; roles: int8 [M], indices of ROLES; contents: Arrow strings [M], no nulls;
    extras: the messages with reasoning or tool calls, by index; tools: of the rows that have some, by row.
    """

    counts: np.ndarray
    roles: np.ndarray
    contents: Any
    extras: dict[int, Message] = field(default_factory=dict)
    tools: dict[int, Tools] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.counts)

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 [R]: each row's first message."""
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def row_of(self) -> np.ndarray:
        """int64 [M]: the row of each message."""
        return np.repeat(np.arange(len(self)), self.counts)

    @cached_property
    def is_first(self) -> np.ndarray:
        """bool [M]: a row begins here."""
        found = np.zeros(len(self.roles), bool)
        found[self.begins] = True
        return found

    def num_characters(self) -> np.ndarray:
        """int64 [R]: of contents and reasoning."""
        pc = compute()
        sizes = as_numpy(pc.utf8_length(self.contents)).astype(np.int64)
        for at, message in self.extras.items():
            sizes[at] += len(message.reasoning_content or "")
        return np.add.reduceat(sizes, self.begins) if len(self) else sizes

    def hashes(self) -> np.ndarray:
        """uint8 [R, 32]: the `row_hash` of each."""
        import pyarrow as pa

        pc = compute()
        names = strings([f"{begin}{role} " for begin in ("", "conversation ") for role in ROLES])
        heads = names.take(as_arrow((self.roles + len(ROLES) * self.is_first).astype(np.int8)))
        sizes = pc.cast(pc.binary_length(self.contents), pa.string())
        tails = Strings([""], len(self.roles))
        for at, message in self.extras.items():
            tails.add(at, canonical_calls(message))
        for row, tools in self.tools.items():
            tails.add(int(self.begins[row] + self.counts[row]) - 1, tools.canonical)
        return digests(join(self.counts, heads, sizes, strings([":"])[0], self.contents, tails.array()))


class Strings:
    """A column of few different strings: `codes` [N] say which of `table` stands where."""

    def __init__(self, table: Sequence[str], size: int):
        self.table = list(table)
        self.codes = np.zeros(size, np.int32)
        self._code_of = {text: code for code, text in enumerate(table)}

    def add(self, at: int, text: str) -> None:
        """Appends `text` to what stands there."""
        self.set(at, self.table[self.codes[at]] + text)

    def set(self, at: int, text: str) -> None:
        """Puts `text` in place of what stands there."""
        self.codes[at] = self._code(text)

    def _code(self, text: str) -> int:
        code = self._code_of.setdefault(text, len(self.table))
        if code == len(self.table):
            self.table.append(text)
        return code

    def prepend(self, at: np.ndarray, text: str) -> None:
        """Puts `text` before what stands at these places."""
        for code in np.unique(self.codes[at]).tolist():
            self.codes[at[self.codes[at] == code]] = self._code(text + self.table[code])

    def array(self) -> Any:
        """Arrow strings [N]."""
        return strings(self.table).take(as_arrow(self.codes))


def talks_of(rows: Sequence[Conversation]) -> Talks:
    """The columns of these rows."""
    messages = [message for row in rows for message in row.messages]
    return Talks(
        np.fromiter((len(row.messages) for row in rows), np.int64, len(rows)),
        np.fromiter((_CODES[message.role] for message in messages), np.int8, len(messages)),
        strings([message.content for message in messages]),
        {
            at: message
            for at, message in enumerate(messages)
            if message.tool_calls or message.reasoning_content is not None
        },
        {i: Tools(row.tools) for i, row in enumerate(rows) if row.tools},
    )


def join(counts: np.ndarray, *columns: Any) -> Any:
    """Arrow strings [R]: the columns' strings message by message, `counts` messages to a row."""
    import pyarrow as pa

    pc = compute()
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    (nothing,) = strings([""])
    pieces = pc.binary_join_element_wise(*columns, nothing)
    return pc.binary_join(pa.ListArray.from_arrays(as_arrow(offsets), pieces), nothing)


def digests(texts: Any) -> np.ndarray:
    """uint8 [R, 32]: sha256 of each of these Arrow strings."""
    _, offsets, values = texts.buffers()
    ends = np.frombuffer(offsets, np.int32, len(texts) + 1, 4 * texts.offset).tolist()
    held = memoryview(values) if values else memoryview(b"")
    sha256 = hashlib.sha256
    found = [sha256(held[begin:end]).digest() for begin, end in itertools.pairwise(ends)]
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32)


def replaced(array: Any, by: dict[int, str]) -> Any:
    """Arrow strings with these at these places."""
    pc = compute()
    places = sorted(by)
    mask = np.zeros(len(array), bool)
    mask[places] = True
    return pc.replace_with_mask(array, truths(mask), strings([by[at] for at in places]))


def strings(texts: Sequence[str]) -> Any:
    """An Arrow array of these strings (pa.array and pa.scalar would import pandas)."""
    import pyarrow as pa

    encoded = [text.encode() for text in texts]
    offsets = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return pa.Array.from_buffers(
        pa.string(), len(encoded), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    )


def truths(values: np.ndarray) -> Any:
    """An Arrow array of these bools."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(np.packbits(values, bitorder="little"))])


def compute() -> Any:
    """Arrow's functions, loaded at first use. They are made while it loads, so that a type checker knows none of them."""
    import pyarrow.compute

    return pyarrow.compute


def as_arrow(values: np.ndarray) -> Any:
    """An Arrow array over the same memory."""
    import pyarrow as pa

    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def as_numpy(array: Any) -> np.ndarray:
    """numpy's view of an Arrow array of numbers or truths without nulls."""
    import pyarrow as pa

    assert not array.null_count
    if pa.types.is_boolean(array.type):
        return as_numpy(array.cast(pa.uint8())).astype(bool)
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
