"""Rows in; a RowTally out: everything a report says about their text, as counts that add up. Knows no files and no tokens.

Rows are measured by the batch, about a million characters at once. Memory: 40 bytes a row up to ROWS_FOR_NEAR, then 8.
"""

import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from mmdata.encode.rows import BadRow, Conversation, Document, Line, Pair, Row, split_documents
from mmdata.encode.validate import control_strings
from mmdata.stats.tally import Lengths, Strings
from mmdata.tokenizer import text as texts

ROWS_FOR_NEAR = 2_000_000  # signatures beyond these are dropped: 64 MB
OPENING = 20  # characters
NUM_TURNS = 8  # lengths of answers by turn; later ones count as the last
NUM_EXAMPLES = 3
RAW_SHOWN = 600  # bytes of a row set aside that are kept for show
GRAM_UNITS = 8  # of the repeated n-grams; a unit is a word, a number, or a character of a script without spaces
_UNITS = re.compile(r"[A-Za-z\u00C0-\u024F\u0370-\u052F]+|\d+|[^\s]")
LONGER_BY = 3  # a chosen answer longer by more than this factor is remarked on


@dataclass(slots=True)
class RowTally:
    """rows = kept + left out by reason. Lengths are in characters; languages count kept rows, scripts characters."""

    rows: int = 0
    kept: int = 0
    num_bytes: int = 0  # of the lines of kept rows
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # rows set aside, by reason
    extra_keys: Counter[str] = field(default_factory=Counter)
    control_strings: Counter[str] = field(default_factory=Counter)
    rows_with_control: int = 0
    lengths: Lengths = field(default_factory=Lengths)  # of rows
    by_role: dict[str, Lengths] = field(default_factory=dict)
    by_turn: dict[int, Lengths] = field(default_factory=dict)  # of the assistant's answers, from 1
    turns: Counter[int] = field(default_factory=Counter)
    scripts: np.ndarray = field(default_factory=lambda: np.zeros(len(texts.SCRIPTS), np.int64))
    languages: np.ndarray = field(default_factory=lambda: np.zeros(len(texts.LANGUAGES), np.int64))
    hashes: list[np.ndarray] = field(default_factory=list)  # uint64: what each row says
    signatures: list[np.ndarray] = field(default_factory=list)
    num_signed: int = 0
    most_signed: int = ROWS_FOR_NEAR
    openings: Strings = field(default_factory=Strings)
    systems: Strings = field(default_factory=Strings)
    rows_with_system: int = 0
    tools: Strings = field(default_factory=Strings)
    rows_with_tools: int = 0
    calls: int = 0
    reasoning: int = 0  # messages with reasoning_content
    margins: Lengths = field(default_factory=Lengths)  # of pairs: characters the sides differ by
    longer: Counter[str] = field(default_factory=Counter)  # pairs: "chosen", "rejected", "equal", "chosen by 3", …
    ratios: Counter[int] = field(default_factory=Counter)  # pairs: round(2 * log2(chosen / rejected)), -8 to 8
    similarity: np.ndarray = field(default_factory=lambda: np.zeros(10, np.int64))  # pairs, by tenths

    def merge(self, other: "RowTally") -> None:
        """Add what follows in the file."""
        for name in ("rows", "kept", "num_bytes", "rows_with_control", "rows_with_system", "rows_with_tools", "calls"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasoning += other.reasoning
        for name in ("left_out", "extra_keys", "control_strings", "turns", "longer", "ratios"):
            getattr(self, name).update(getattr(other, name))
        for name in ("lengths", "openings", "systems", "tools", "margins"):
            getattr(self, name).merge(getattr(other, name))
        for mine, others in ((self.by_role, other.by_role), (self.by_turn, other.by_turn)):
            for key, lengths in others.items():
                mine.setdefault(key, Lengths()).merge(lengths)  # type: ignore[arg-type]
        self.scripts, self.languages = self.scripts + other.scripts, self.languages + other.languages
        self.similarity = self.similarity + other.similarity
        for reason, found in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + found)[:NUM_EXAMPLES]
        self.hashes += other.hashes
        self.signatures += other.signatures
        self.num_signed += other.num_signed

    def trim(self) -> None:
        """Forget rare strings where there are many: what several processes send home stays small."""
        for strings in (self.openings, self.systems, self.tools):
            strings.trim()

    def set_aside(self, line: Line, bad: BadRow, file: str) -> None:
        """Count a row that cannot be used; the first of each reason are kept for show."""
        self.rows += 1
        self.left_out[bad.reason] += 1
        shown = self.examples.setdefault(bad.reason, [])
        if len(shown) < NUM_EXAMPLES:
            raw = line.raw[:RAW_SHOWN].decode("utf-8", errors="replace")
            shown.append({"file": file, "line": line.number, "detail": bad.detail, "raw": raw})

    def add(self, rows: Sequence[Row], raws: Sequence[bytes] = ()) -> np.ndarray:
        """Measure a batch of usable rows, with their lines where they come from a file. Gives each row's characters."""
        self.rows += len(rows)
        self.kept += len(rows)
        self.num_bytes += sum(map(len, raws))
        for row, raw in zip(rows, raws, strict=False):
            if found := control_strings(raw, row):
                self.control_strings.update(found)
                self.rows_with_control += 1
        spoken = [list(pieces_of(row)) for row in rows]
        whole = ["".join(text for _, text in pieces) for pieces in spoken]
        lengths = np.fromiter(map(len, whole), np.int64, len(whole))
        self.lengths.add(lengths)
        self._add_text(whole, lengths)
        self._add_roles(spoken)
        self.hashes.append(np.array([_hash(pieces) for pieces in spoken], np.uint64))
        self._add_conversations(
            [row if isinstance(row, Conversation) else row.chosen for row in rows if not isinstance(row, Document)]
        )
        pairs = [row for row in rows if isinstance(row, Pair)]
        if pairs:
            self._add_pairs(pairs)
        return lengths

    def _add_text(self, whole: Sequence[str], lengths: np.ndarray) -> None:
        points = texts.code_points("".join(whole))
        counts = texts.count_scripts(texts.scripts_of(points), lengths)
        self.scripts = self.scripts + counts.sum(axis=0)
        self.languages = self.languages + np.bincount(texts.languages_of(counts, whole), minlength=len(texts.LANGUAGES))
        if self.num_signed < self.most_signed:
            hashes, text = texts.shingles(points, lengths)
            self.signatures.append(texts.signatures(hashes, text, len(whole)))
            self.num_signed += len(whole)

    def _add_roles(self, spoken: Sequence[Sequence[tuple[str, str]]]) -> None:
        by_role: dict[str, list[int]] = {}
        by_turn: dict[int, list[int]] = {}
        for pieces in spoken:
            turn = 0
            for role, text in pieces:
                by_role.setdefault(role, []).append(len(text))
                if role == "assistant":
                    turn = min(turn + 1, NUM_TURNS)
                    by_turn.setdefault(turn, []).append(len(text))
        self.openings.add([_opening(text) for pieces in spoken for role, text in pieces if role in _ANSWERS])
        for role, found in by_role.items():
            self.by_role.setdefault(role, Lengths()).add(np.array(found, np.int64))
        for turn, found in by_turn.items():
            self.by_turn.setdefault(turn, Lengths()).add(np.array(found, np.int64))

    def _add_conversations(self, rows: Sequence[Conversation]) -> None:
        turns, systems, tools = [], [], []
        for row in rows:
            turns.append(sum([message.role == "user" for message in row.messages]))
            said = [m.content[:200] for m in row.messages if m.role == "system" and m.content.strip()]
            systems += said
            self.rows_with_system += bool(said)
            if row.tools:
                self.rows_with_tools += 1
                tools += map(_name_of, row.tools)
            for message in row.messages:
                self.calls += len(message.tool_calls)
                self.reasoning += bool(message.reasoning_content)
        self.turns.update(turns)
        self.systems.add(systems)
        self.tools.add(tools)

    def _add_pairs(self, pairs: Sequence[Pair]) -> None:
        sides = [_reply(side, pair.num_shared) for pair in pairs for side in (pair.chosen, pair.rejected)]
        lengths = np.fromiter(map(len, sides), np.int64, len(sides))
        chosen, rejected = lengths[::2], lengths[1::2]
        self.margins.add(abs(chosen - rejected))
        self.longer["chosen"] += int((chosen > rejected).sum())
        self.longer["rejected"] += int((chosen < rejected).sum())
        self.longer["equal"] += int((chosen == rejected).sum())
        self.longer["chosen by 3"] += int((chosen > LONGER_BY * rejected).sum())
        self.longer["rejected by 3"] += int((rejected > LONGER_BY * chosen).sum())
        ratio = np.rint(2 * np.log2(np.maximum(chosen, 1) / np.maximum(rejected, 1))).astype(np.int64)
        self.ratios.update(np.clip(ratio, -8, 8).tolist())
        hashes, text = texts.shingles(texts.code_points("".join(sides)), lengths)
        alike = texts.jaccard(hashes, text, len(pairs))
        self.similarity = self.similarity + np.bincount(np.minimum(alike * 10, 9).astype(np.int64), minlength=10)


_ANSWERS = ("document", "assistant", "chosen", "rejected")


def pieces_of(row: Row) -> Iterator[tuple[str, str]]:
    """(role, text) of what a row says, in order; of a pair the prompt once, then the replies as chosen and rejected.

    Documents are split at their author's marks; reasoning stands before the content it led to.
    """
    if isinstance(row, Document):
        yield from (("document", text) for text in split_documents(row.text))
    elif isinstance(row, Conversation):
        yield from _said(row, 0, len(row.messages))
    else:
        yield from _said(row.chosen, 0, row.num_shared)
        yield "chosen", _reply(row.chosen, row.num_shared)
        yield "rejected", _reply(row.rejected, row.num_shared)


def _said(conversation: Conversation, begin: int, end: int) -> Iterator[tuple[str, str]]:
    for message in conversation.messages[begin:end]:
        if message.content or message.reasoning_content:
            yield message.role, (message.reasoning_content or "") + message.content


def _reply(side: Conversation, begin: int) -> str:
    return "\n".join(text for _, text in _said(side, begin, len(side.messages)))


def _hash(pieces: Sequence[tuple[str, str]]) -> int:
    """64 bits of a row's roles and texts: equal rows have equal ones, whatever their keys, spacing or schema."""
    said = "\0".join([word for piece in pieces for word in piece])
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


def _opening(text: str) -> str:
    return " ".join(text[: 2 * OPENING].split())[:OPENING]


def _name_of(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    found = function.get("name") if isinstance(function, dict) else tool.get("name")
    return str(found)[:80]


# --- what is told of all rows together


def repeated(whole: Sequence[str], number: int = 20) -> list[dict[str, Any]]:
    """The n-grams of GRAM_UNITS units that stand in most texts: {"text", "count" of texts}; overlapping ones are joined.

    Costs some 16 bytes a unit.
    """
    ids: dict[str, int] = {}
    stream: list[int] = []
    ends = []
    for text in whole:
        stream += [ids.setdefault(unit, len(ids)) for unit in _UNITS.findall(text)]
        ends.append(len(stream))
    lengths = np.diff(ends, prepend=0).astype(np.int64)
    hashes, text = texts.shingles(np.array(stream, np.uint64), lengths)
    if not len(hashes):
        return []
    numbers = np.maximum(lengths - (texts.GRAM - 1), 0)
    at = np.arange(len(text)) + np.repeat(np.cumsum(lengths) - lengths - (np.cumsum(numbers) - numbers), numbers)
    order = np.lexsort((at, text, hashes))
    hashes, text, at = hashes[order], text[order], at[order]
    new_gram = np.diff(hashes, prepend=~hashes[:1]) != 0
    is_first = new_gram | (np.diff(text, prepend=-1) != 0)  # of a gram in a text
    starts = np.flatnonzero(new_gram)
    counts = np.add.reduceat(is_first.astype(np.int64), starts)
    often = np.flatnonzero(counts >= 2)
    often = often[np.lexsort((at[starts[often]], -counts[often]))][: 40 * number]
    phrases = _phrases([(int(at[starts[i]]), int(counts[i])) for i in often], stream, number)
    return [{"text": _original(whole, ends, begin, end), "count": count} for begin, end, count in phrases]


def _phrases(grams: Sequence[tuple[int, int]], stream: Sequence[int], number: int) -> list[list[int]]:
    """Grams (place, count) as [begin, end, count]; one that lies beside another of nearly its count continues it, one that
    mostly says the same with a smaller count is left away."""
    found: list[list[int]] = []
    for at, count in grams:
        window = stream[at : at + GRAM_UNITS]
        for phrase in found:
            if abs(phrase[2] - count) <= 0.05 * phrase[2] and phrase[0] - 1 <= at <= phrase[1] - GRAM_UNITS + 1:
                phrase[0], phrase[1] = min(phrase[0], at), max(phrase[1], at + GRAM_UNITS)
                break
        else:
            if len(found) < number and not any(_overlap(stream[p[0] : p[1]], window) for p in found):
                found.append([at, at + GRAM_UNITS, count])
    return found


def _overlap(units: Sequence[int], window: Sequence[int], least: int = GRAM_UNITS // 2 + 1) -> bool:
    """Whether `least` units in a row stand in both."""
    runs = {tuple(window[i : i + least]) for i in range(len(window) - least + 1)}
    return any(tuple(units[i : i + least]) in runs for i in range(len(units) - least + 1))


def _original(whole: Sequence[str], ends: Sequence[int], begin: int, end: int) -> str:
    """The text of units begin..end of the stream, as it was written."""
    number = bisect_right(ends, begin)
    first = ends[number - 1] if number else 0
    places = [found.span() for found in islice(_UNITS.finditer(whole[number]), begin - first, end - first)]
    return whole[number][places[0][0] : places[-1][1]][:300]


def duplicates(tally: RowTally) -> dict[str, Any]:
    """Rows that say what an earlier row says, exactly, and of the others those that nearly do, with how many were compared."""
    hashes = np.concatenate(tally.hashes) if tally.hashes else np.empty(0, np.uint64)
    exact = is_repeat(hashes)
    signed = np.concatenate(tally.signatures) if tally.signatures else np.empty((0, texts.NUM_BINS), np.uint16)
    kept = np.flatnonzero(~exact[: len(signed)])
    near = texts.near_duplicates(signed[kept])
    return {
        "rows": len(hashes),
        "exact": int(exact.sum()),
        "near": int(near.sum()),
        "rows_compared": len(signed),
        "near_from": texts.NEAR,
    }


def is_repeat(hashes: np.ndarray) -> np.ndarray:
    """bool [rows]: whether an earlier row has the same hash."""
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    found = np.zeros(len(hashes), bool)
    found[order[1:][same]] = True
    return found


def shared(one: np.ndarray, other: np.ndarray) -> float:
    """The share of rows of `one` that stand in `other` too, by hash."""
    return float(np.isin(one, other).mean()) if len(one) else 0.0
