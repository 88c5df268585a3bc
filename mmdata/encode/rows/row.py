"""The rows that lines are parsed to: documents, conversations and pairs, their hash, texts and length."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmdata.io.records import JsonObject

# Marks around documents in the texts of pretraining files: those of MiniMind's first tokenizer and of its later ones.
_MARKS = tuple(  # opening mark, closing mark, and a pattern that matches a closing mark followed by an opening one
    (opening, closing, re.compile(re.escape(closing) + r"\s*" + re.escape(opening)))
    for opening, closing in (("<s>", "</s>"), ("<|im_start|>", "<|im_end|>"))
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text for pretraining, which may contain several documents between marks; see `split_documents`."""

    text: str


class Message(NamedTuple):
    """One message of a conversation. role: "system", "user", "assistant" or "tool". content: may be empty in an answer
    with tool calls or reasoning, and in system and tool messages. reasoning_content: the thoughts before an answer.
    tool_calls: the functions that an answer calls, as JSON objects, JSON text in arguments decoded. name: of the
    speaker or the tool. tool_call_id: the call that a tool message answers. weight: 0 if the message is not to be
    trained on, else 1."""

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[JsonObject, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: int = 1

    @property
    def has_extras(self) -> bool:
        """Whether the message says more than a role and a content."""
        return self[2:] != _NO_EXTRAS

    @property
    def has_marks(self) -> bool:
        """Whether the message has a name or an id, or is not to be trained on."""
        return self[4:] != _NO_EXTRAS[2:]


_NO_EXTRAS = (None, (), None, None, 1)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation whose messages, at least a user message and an answer, are in a valid order and end with an
    answer. tools: definitions of functions, as JSON objects."""

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen (preferred) and a rejected conversation with equal tools, which first differ in an assistant's
    message."""

    chosen: Conversation
    rejected: Conversation

    @property
    def num_shared(self) -> int:
        """The number of leading messages that are equal on both sides: the messages of the prompt."""
        sides = zip(self.chosen.messages, self.rejected.messages, strict=False)
        return next(
            (i for i, (a, b) in enumerate(sides) if a != b),
            min(map(len, (self.chosen.messages, self.rejected.messages))),
        )


Row = Document | Conversation | Pair


def row_hash(row: Row) -> bytes:
    """Return the SHA-256 digest (32 bytes) of a row's content, whatever white space, order of keys, or names for keys
    and roles the file uses."""
    return hashlib.sha256(_canonical(row)).digest()


def split_documents(text: str) -> list[str]:
    """Split a pretraining text at the marks <s>…</s> or <|im_start|>…<|im_end|>, and return its documents, blank ones
    left out. The marks count only if the text begins with an opening mark, and a closing mark is at its end (unless it
    was truncated) or before another opening mark, with only white space between them. A mark elsewhere is part of the
    text, and a text without such marks is the only document, unchanged."""
    stripped = text.strip()
    for opening, closing, between in _MARKS:
        if stripped.startswith(opening):
            body = stripped.removeprefix(opening)
            parts = between.split(body) if opening in body else [body]
            if len(parts) > 1 or stripped.endswith(closing):
                parts[-1] = parts[-1].removesuffix(closing)
                return [part for part in parts if part and not part.isspace()]
    return [text]


def join_documents(documents: Sequence[str]) -> str:
    """Put <s> and </s> around each document, but not around one alone: the inverse of `split_documents`."""
    opening, closing, _ = _MARKS[0]
    return documents[0] if len(documents) == 1 else "".join(f"{opening}{one}{closing}" for one in documents)


def texts_of(row: Row) -> Iterator[str]:
    """Yield all texts of a row: the documents, or for each message content, reasoning, tool calls (JSON), name and tool
    call id, then the tools (JSON). What both sides of a pair share is yielded once."""
    if isinstance(row, Document):
        yield from split_documents(row.text)
    elif isinstance(row, Pair):
        yield from texts_of(row.chosen)
        yield from texts_of(Conversation(row.rejected.messages[row.num_shared :]))
    else:
        for message in row.messages:
            yield message.content
            if message.reasoning_content:
                yield message.reasoning_content
            if message.tool_calls:
                yield json.dumps(message.tool_calls, ensure_ascii=False)
            yield from filter(None, (message.name, message.tool_call_id))
        if row.tools:
            yield json.dumps(row.tools, ensure_ascii=False)


def num_characters(row: Row) -> int:
    """Return the number of characters of a row's contents and reasoning, without tools, tool calls and the template's
    text. The messages that both sides of a pair share are counted once."""
    if isinstance(row, Document):
        return len(row.text)
    if isinstance(row, Conversation):
        return _num_characters(row, 0)
    return _num_characters(row.chosen, 0) + _num_characters(row.rejected, row.num_shared)


def _num_characters(conversation: Conversation, begin: int) -> int:
    return sum(len(m.content) + len(m.reasoning_content or "") for m in conversation.messages[begin:])


def _canonical(row: Row) -> bytes:
    """Return the bytes of which `row_hash` is the digest, as `columns.Conversations.hashes` makes them for many rows. A
    length precedes each string, so that different rows never give the same bytes."""
    if isinstance(row, Document):
        return b"document " + row.text.encode()
    if isinstance(row, Pair):
        chosen, rejected = _canonical(row.chosen), _canonical(row.rejected)
        return b"pair %d:%b%b" % (len(chosen), chosen, rejected)
    messages = "".join([f"{m.role} {counted(m.content)}{canonical_calls(m)}" for m in row.messages])
    return f"conversation {messages}{canonical_tools(row.tools)}".encode()


def counted(text: str) -> str:
    """Return the text preceded by its number of UTF-8 bytes and a colon."""
    return f"{len(text.encode())}:{text}"


def canonical_calls(message: Message) -> str:
    """Return what a message says besides role and content in the form that is hashed; "" if that is nothing."""
    if not message.has_extras:
        return ""
    named = zip(
        ("reasoning", "name", "id"), (message.reasoning_content, message.name, message.tool_call_id), strict=True
    )
    reasoning, *others = ["" if text is None else f" {key} {counted(text)}" for key, text in named]
    calls = f" calls {counted(_SORTED.encode(message.tool_calls))}" if message.tool_calls else ""
    return "".join((reasoning, calls, *others, "" if message.weight else " weight 0"))


def canonical_tools(tools: tuple[JsonObject, ...]) -> str:
    """Return tools in the form that is hashed: JSON with sorted keys, preceded by its length; "" without tools."""
    return f" tools {counted(_SORTED.encode(tools))}" if tools else ""


_SORTED = json.JSONEncoder(ensure_ascii=False, sort_keys=True)
