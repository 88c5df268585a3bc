"""Shards in, rows out as far as ids tell: what a dataset says whose inputs are gone.

Messages are cut at the control tokens that open them. What the usual templates write for thinking, tools, calls and their
answers is undone; what else a template added, or packing cut, stands in the row as a model sees it.
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
from mmdata.stats.token_tally import Vocabulary

_THINKING = re.compile(r"\A<think>\n(.*?)\n</think>\n\n", re.DOTALL)
_CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_ANSWER = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)
_TOOLS = re.compile(r"(?:\A|\n\n)# Tools\n.*?<tools>\n(.*?)\n</tools>\n.*\Z", re.DOTALL)


class PartRows:
    """The kept rows of one part, in source order: what packing made of each. The part's shards stay mapped."""

    def __init__(self, dataset: shards.Dataset, part: dict[str, Any]):
        self.sources = shards.open_sources(dataset, part["part"])
        self._ends = [*self.sources["first"].tolist(), part["sequences"]]
        self._is_pair = dataset.kind == "pair"
        names = shards.PairView._fields if self._is_pair else ("ids", "doc_len", "span", "doc")
        entries = [entry for entry in dataset.manifest["shards"] if entry["part"] == part["part"]]
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
        found = (spans[first:last] - begin).astype(np.int32).reshape(-1, 2)
        return Ids(self._columns[shard]["ids"].values[begin:end], found)


def encoded_at(dataset: shards.Dataset, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Sequences]:
    """The sequences of the rows at these files and lines, from the shards; those that are not in the dataset are left out."""
    found: dict[tuple[str, int], Sequences] = {}
    wanted: dict[str, list[int]] = {}
    for file, line in sorted(set(places)):
        wanted.setdefault(file, []).append(line)
    for part in dataset.manifest["parts"]:
        if not part["kept"]:
            continue
        sources = shards.open_sources(dataset, part["part"])
        file, lines = dataset.inputs[int(sources["file"][0])], sources["line"]
        asked = np.array(wanted.get(file, []), lines.dtype)
        at = np.searchsorted(lines, asked)
        at = at[lines[np.minimum(at, len(lines) - 1)] == asked].tolist()
        if at:
            rows = PartRows(dataset, part)
            found |= {(file, int(lines[row])): rows.encoded(row) for row in at}
    return found


def _flat(columns: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the sequences of a shard begin and end, and its spans, in positions of the shard's ids."""
    ends = np.cumsum(columns["doc_len"].values, dtype=np.int64)
    begins = ends - columns["doc_len"].values
    spans = columns["span"].values + np.repeat(columns["ids"].offsets[:-1], columns["span"].lengths())
    return begins, ends, spans


# --- ids -> what was said


class Decoder:
    """Turns what became of rows of one kind into rows again."""

    def __init__(self, known: Vocabulary, kind: str):
        self._known, self._kind = known, kind
        self._control = frozenset(np.flatnonzero(known.control).tolist())
        self._eos = known.tokenizer.eos_id

    def row(self, encoded: Sequences) -> Row:
        """The row, as far as its ids tell."""
        first = encoded[0]
        if isinstance(first, PairSequence):
            prompt = first.prompt.tolist()
            return Pair(*(self._conversation(prompt + side.tolist()) for side in (first.chosen, first.rejected)))
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
        opens = [at for at in marks if self._known.header(ids, at)]
        messages: list[Message] = []
        tools: tuple[dict[str, Any], ...] = ()
        for begin, end in zip(opens, [*opens, len(ids)][1:], strict=True):
            close = next((at for at in marks if begin < at < end and ids[at] == self._eos), end)
            role, _, said = self._text(ids[begin + 1 : close]).partition("\n")
            if role == "system" and (match := _TOOLS.search(said)):
                said, tools = said[: match.start()], tuple(_objects(match[1].split("\n")))
            messages += _messages(role, said)
        return Conversation(tuple(messages) or (Message("assistant", self._text(ids)),), tools)

    def _text(self, ids: Sequence[int]) -> str:
        pieces = self._known.pieces
        return b"".join([pieces[id] for id in ids]).decode("utf-8", errors="replace")


def _messages(role: str, said: str) -> list[Message]:
    """The messages that a template wrote as one of this role."""
    if role == "user" and said.startswith("<tool_response>"):
        return [Message("tool", answer) for answer in _ANSWER.findall(said)]
    if role == "system" and not said:
        return []
    if role != "assistant":
        return [Message(role, said)]
    thought = _THINKING.match(said)
    said = said[thought.end() :] if thought else said
    calls = tuple(_objects(_CALL.findall(said)))
    return [Message(role, _CALL.sub("", said) if calls else said, thought[1] or None if thought else None, calls)]


def _objects(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    """JSON objects; what is none is left out."""
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found
