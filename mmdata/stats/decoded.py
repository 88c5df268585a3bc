"""Rows decoded from the shards of a dataset whose inputs are gone, as far as ids allow.

Messages begin at the control tokens that open them. What the usual templates write for thinking, tools, calls and their results is
turned back into fields of the messages; anything else that a template added remains in the text, and what packing cut is missing.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mmdata.encode.rows import Conversation, Document, Message, Pair, Row, join_documents
from mmdata.encode.sequences import PairSequence, Sequences, flatten
from mmdata.encode.sequences import Sequence as Ids
from mmdata.shards import dataset as shards
from mmdata.shards.manifest import PartRecord
from mmdata.stats.tokens import Vocabulary

_THINKING = re.compile(r"\A<think>\n(.*?)\n</think>\n\n", re.DOTALL)
_CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_ANSWER = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
_TOOLS = re.compile(r"(?:\A|\n\n)# Tools\n.*?<tools>\n(.*?)\n</tools>\n.*\Z", re.DOTALL)


class PartRows:
    """The encoded rows of one part, in the order of its input. The part's shards stay memory-mapped."""

    def __init__(self, dataset: shards.Dataset, part: PartRecord):
        self.sources = shards.open_sources(dataset, part.part)
        self._ends = [*self.sources["first"].tolist(), part.sequences]
        self._is_pair = dataset.kind == "pair"
        names = shards.PairView._fields if self._is_pair else ("ids", "doc_len", "span", "doc")
        entries = [entry for entry in dataset.manifest.shards if entry.part == part.part]
        files = [dataset.open_shard(entry) for entry in entries]
        self._columns = [{name: file.column(name) for name in names} for file in files]
        docs = [columns["doc"] if self._is_pair else columns["doc"].values for columns in self._columns]
        order = np.argsort(np.concatenate(docs), kind="stable")
        self._shard_of = np.repeat(np.arange(len(docs)), [len(doc) for doc in docs])[order]
        self._place = np.concatenate([np.arange(len(doc)) for doc in docs])[order]
        self._flat = [] if self._is_pair else [_flat(columns) for columns in self._columns]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def encoded(self, row: int) -> Sequences:
        """The sequences of a row."""
        ordinals = range(self._ends[row], self._ends[row + 1])
        if self._is_pair:
            at = ordinals.start
            pair = shards.pair_view(self._columns[self._shard_of[at]], int(self._place[at]))
            spans = (span.astype(np.int32).reshape(-1, 2) for span in (pair.chosen_span, pair.rejected_span))
            return flatten([PairSequence(pair.prompt, pair.chosen, pair.rejected, *spans)])
        return flatten([self._sequence(ordinal) for ordinal in ordinals])

    def _sequence(self, ordinal: int) -> Ids:
        shard, at = self._shard_of[ordinal], self._place[ordinal]
        begins, ends, spans = self._flat[shard]
        begin, end = begins[at], ends[at]
        first, last = np.searchsorted(spans, (begin, end), "right")  # a sequence's first token is never trained
        trained = (spans[first:last] - begin).astype(np.int32).reshape(-1, 2)
        return Ids(self._columns[shard]["ids"].values[begin:end], trained)


def encoded_at(dataset: shards.Dataset, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Sequences]:
    """The encoded rows of these files and lines, from the shards; those that are not in the dataset are left out."""
    encoded: dict[tuple[str, int], Sequences] = {}
    wanted: dict[str, list[int]] = {}
    for file, line in sorted(set(places)):
        wanted.setdefault(file, []).append(line)
    for part in dataset.manifest.parts:
        if not part.kept:
            continue
        sources = shards.open_sources(dataset, part.part)
        file, lines = dataset.inputs[int(sources["file"][0])], sources["line"]
        asked = np.array(wanted.get(file, []), lines.dtype)
        at = np.searchsorted(lines, asked)
        at = at[lines[np.minimum(at, len(lines) - 1)] == asked].tolist()
        if at:
            rows = PartRows(dataset, part)
            encoded |= {(file, int(lines[row])): rows.encoded(row) for row in at}
    return encoded


def _flat(columns: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the sequences of a shard begin and end, and its spans, in positions of the shard's ids."""
    ends = np.cumsum(columns["doc_len"].values, dtype=np.int64)
    begins = ends - columns["doc_len"].values
    spans = columns["span"].values + np.repeat(columns["ids"].offsets[:-1], columns["span"].lengths())
    return begins, ends, spans


# --- ids -> rows


class RowDecoder:
    """Decodes encoded rows of one kind to rows."""

    def __init__(self, vocabulary: Vocabulary, kind: str):
        self._vocabulary, self._kind = vocabulary, kind
        self._control = frozenset(np.flatnonzero(vocabulary.control).tolist())
        self._eos = vocabulary.tokenizer.eos_id

    def row(self, encoded: Sequences) -> Row:
        """The row of some ids."""
        first = encoded[0]
        if isinstance(first, PairSequence):
            prompt, sides = first.prompt.tolist(), (first.chosen, first.rejected)
            return Pair(*(self._conversation(prompt + side.tolist()) for side in sides))
        if self._kind == "document":
            return Document(join_documents(list(self._documents([one for one in encoded if isinstance(one, Ids)]))))
        return self._conversation(first.ids.tolist())

    def _documents(self, sequences: Sequence[Ids]) -> Iterator[str]:
        """Documents of a row; one cut into fragments ends with the fragment that has its end."""
        ids: list[int] = []
        for one in sequences:
            ids += one.ids.tolist()
            if ids[-1] == self._eos:
                yield self._text(ids)
                ids = []
        if ids:
            yield self._text(ids)

    def _conversation(self, ids: list[int]) -> Conversation:
        marks = [at for at, id in enumerate(ids) if id in self._control]
        opens = [at for at in marks if self._vocabulary.header(ids, at)]
        messages: list[Message] = []
        tools: tuple[dict[str, Any], ...] = ()
        for begin, end in zip(opens, [*opens, len(ids)][1:], strict=True):
            close = next((at for at in marks if begin < at < end and ids[at] == self._eos), end)
            role, _, content = self._text(ids[begin + 1 : close]).partition("\n")
            if role == "system" and (match := _TOOLS.search(content)):
                content, tools = content[: match.start()], tuple(_objects(match[1].split("\n")))
            messages += _messages(role, content)
        return Conversation(tuple(messages) or (Message("assistant", self._text(ids)),), tools)

    def _text(self, ids: Sequence[int]) -> str:
        pieces = self._vocabulary.pieces
        return b"".join([pieces[id] for id in ids]).decode("utf-8", errors="replace")


def _messages(role: str, content: str) -> list[Message]:
    """The messages that a template wrote as one of this role: results of tools are written as one of the user."""
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


def _objects(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects among these lines."""
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value
