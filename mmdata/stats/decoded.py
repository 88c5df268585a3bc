"""Decode the rows of a packed dataset whose inputs are missing, from the token ids in its shards.

Ids are split at the control tokens with which messages begin. Reasoning, tools, tool calls and tool results, in the
format of MiniMind's, Qwen's and Hermes' templates, become fields of the messages. Any other text that the template
added stays in the contents, and tokens that packing cut are missing.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mmdata.encode.rows import Conversation, Document, Message, Pair, Row, join_documents
from mmdata.encode.sequences import PairSequence, Sequences, TokenSequence
from mmdata.io.records import JsonObject
from mmdata.shards.dataset import Dataset, PartRows, open_sources
from mmdata.stats.tokens import Vocabulary

_THINKING = re.compile(r"\A<think>\n(.*?)\n</think>\n\n", re.DOTALL)
_CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_ANSWER = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
_TOOLS = re.compile(r"(?:\A|\n\n)# Tools\n.*?<tools>\n(.*?)\n</tools>\n.*\Z", re.DOTALL)


def encoded_at(dataset: Dataset, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Sequences]:
    """Return the encoded rows at these places, (path of an input, line number), without those that packing left out."""
    encoded: dict[tuple[str, int], Sequences] = {}
    wanted: dict[str, list[int]] = {}
    for file, line in sorted(set(places)):
        wanted.setdefault(file, []).append(line)
    for part in dataset.parts:
        if not part.kept:
            continue
        sources = open_sources(dataset, part.part)
        file, lines = dataset.inputs[int(sources["file"][0])], sources["line"]
        asked = np.array(wanted.get(file, []), lines.dtype)
        at = np.searchsorted(lines, asked)
        at = at[lines[np.minimum(at, len(lines) - 1)] == asked].tolist()
        if at:
            rows = PartRows(dataset, part)
            encoded |= {(file, int(lines[row])): rows.encoded(row) for row in at}
    return encoded


# --- ids -> rows


class RowDecoder:
    """Decodes the token ids of rows of one kind ("document", "conversation" or "pair") back to rows."""

    def __init__(self, vocabulary: Vocabulary, kind: str):
        self._vocabulary, self._kind = vocabulary, kind
        self._control = frozenset(np.flatnonzero(vocabulary.control).tolist())
        self._eos = vocabulary.tokenizer.eos_id

    def row(self, encoded: Sequences) -> Row:
        """Decode the encoded sequences of one row to a `Document`, a `Conversation` or a `Pair`."""
        first = encoded[0]
        if isinstance(first, PairSequence):
            prompt, sides = first.prompt.tolist(), (first.chosen, first.rejected)
            return Pair(*(self._conversation(prompt + side.tolist()) for side in sides))
        if self._kind == "document":
            return Document(
                join_documents(list(self._documents([one for one in encoded if isinstance(one, TokenSequence)])))
            )
        return self._conversation(first.ids.tolist())

    def _documents(self, sequences: Sequence[TokenSequence]) -> Iterator[str]:
        """Yield the text of each document of a row. A document ends with the eos token, maybe in a later sequence."""
        ids: list[int] = []
        for one in sequences:
            ids += one.ids.tolist()
            if ids[-1] == self._eos:
                yield self._text(ids)
                ids = []
        if ids:
            yield self._text(ids)

    def _conversation(self, ids: list[int]) -> Conversation:
        """Split ids into messages and decode them. If none is recognized, the assistant gets the whole text."""
        marks = [at for at, id in enumerate(ids) if id in self._control]
        opens = [at for at in marks if self._vocabulary.header(ids, at)]
        messages: list[Message] = []
        tools: tuple[JsonObject, ...] = ()
        for begin, end in zip(opens, [*opens, len(ids)][1:], strict=True):
            close = next((at for at in marks if begin < at < end and ids[at] == self._eos), end)
            role, _, content = self._text(ids[begin + 1 : close]).partition("\n")
            if role == "system" and (match := _TOOLS.search(content)):
                content, tools = content[: match.start()], tuple(_objects(match[1].split("\n")))
            messages += _messages(role, content)
        return Conversation(tuple(messages) or (Message("assistant", self._text(ids)),), tools)

    def _text(self, ids: Sequence[int]) -> str:
        """Decode ids to text. Control tokens have no text, and bytes that are not valid UTF-8 become U+FFFD."""
        pieces = self._vocabulary.pieces
        return b"".join([pieces[id] for id in ids]).decode("utf-8", errors="replace")


def _messages(role: str, content: str) -> list[Message]:
    """Return the messages that a chat template rendered as one with this role and content: each of several tool
    results, and none for an empty system message. Reasoning and tool calls of an answer are parsed."""
    if role == "user" and content.startswith("<tool_response>"):
        return [Message("tool", answer) for answer in _ANSWER.findall(content)]
    if role == "system" and not content:
        return []
    if role != "assistant":
        return [Message(role, content)]
    thinking = _THINKING.match(content)
    content = content[thinking.end() :] if thinking else content
    calls = tuple(_objects(_CALL.findall(content)))
    content = _CALL.sub("", content) if calls else content
    return [Message(role, content, thinking[1] or None if thinking else None, calls)]


def _objects(lines: Sequence[str]) -> Iterator[JsonObject]:
    """Parse each string as JSON and yield those that are JSON objects; the others are ignored."""
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
