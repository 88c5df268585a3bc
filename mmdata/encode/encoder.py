"""Rows in; ids and trained spans out, by the batch: one native call encodes all text of all rows.

Between two control tokens of the template text is encoded as one string, which is what the joint encoding does; where the
trained part begins inside it is told by ids (its untrained beginning, encoded alone, gives the first of them), else by
character offsets. Nothing is cut or left out uncounted.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from mmdata.encode.blocks import Blocks, learn
from mmdata.encode.bulk import CUT_TURNS as CUT_TURNS
from mmdata.encode.bulk import Bulk, Found
from mmdata.encode.plain import read_talks
from mmdata.encode.rows import (
    BadRow,
    Conversation,
    Document,
    Pair,
    Row,
    num_characters,
    parse_row,
    row_hash,
    split_documents,
)
from mmdata.encode.sequences import Encoded as Encoded
from mmdata.encode.sequences import Flat, flatten, join, reorder
from mmdata.encode.sequences import PairSequence as PairSequence
from mmdata.encode.sequences import Sequence as Sequence
from mmdata.encode.talks import talks_of
from mmdata.encode.template import ERAS, TRAIN_ON, Segment, Template, stretches
from mmdata.encode.validate import control_strings
from mmdata.errors import UsageError
from mmdata.tokenizer.encoders import Encoder, choose
from mmdata.tokenizer.tokenizer import Tokenizer

MOST_BYTES = 2**30  # of jsonl in bulk: the offsets in a column of strings have 31 bits, and renderings are longer
# Share of rows that keep them, as in MiniMind: a model that never saw one cannot answer after the prompt's.
_EMPTY_THINK_KEPT = 0.2


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of a batch of R rows. flat: the sequences of those that can be used, in the order of the rows.

    num_sequences: int64 [R], 0 where a row cannot be used; num_tokens: of all rows, before cutting; cut: reason -> tokens
    dropped, in `rows_cut` rows; bad: row -> why it cannot be used.
    """

    flat: Flat
    num_sequences: np.ndarray
    num_tokens: int
    cut: Counter[str]
    rows_cut: int
    bad: dict[int, BadRow]


class Lines:
    """What became of N lines: their `batch`, and of those that are rows hashes, characters and control strings.

    hashes: uint8 [N, 32], the `row_hash` of each; characters: int64 [N]; controls: line -> special-token strings in its text.
    """

    def __init__(self, num_lines: int):
        self.hashes = np.zeros((num_lines, 32), np.uint8)
        self.characters = np.zeros(num_lines, np.int64)
        self.controls: dict[int, list[str]] = {}
        self.bad: dict[int, BadRow] = {}  # lines that are no rows
        self._batches: list[tuple[np.ndarray, Batch]] = []

    def add_rows(self, at: Rows[int], raws: Rows[bytes], rows: Rows[Row]) -> None:
        """What these lines say, by number, as rows."""
        self.hashes[at] = np.frombuffer(b"".join(map(row_hash, rows)), np.uint8).reshape(-1, 32)
        self.characters[at] = [num_characters(row) for row in rows]
        for i, raw, row in zip(at, raws, rows, strict=True):
            if strings := control_strings(raw, row):
                self.controls[i] = strings

    def add(self, at: np.ndarray, batch: Batch) -> None:
        """Sequences of these lines."""
        self._batches.append((at, batch))

    @cached_property
    def batch(self) -> Batch:
        """Of all lines; bad are also those that are no rows."""
        found = merged(len(self.hashes), self._batches)
        return replace(found, bad=dict(sorted((found.bad | self.bad).items())))


class _Side(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray  # bool [T]


_Runs = tuple[tuple[int, bool], ...]  # tokens and whether they are trained


class RowEncoder:
    """Encodes rows with one tokenizer: the same rows give the same ids and spans in any process and any batch."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_len: int,
        era: str = "auto",
        train_on: str = "assistant",
        seed: int = 0,
        encoder: Encoder | None = None,
        is_reference: bool = False,
    ):
        """`era` auto, seed, 2 or 3, as the template's; `train_on` assistant (each answer), last or all; see docs/data.md.

        encoder: who encodes text (by default `tokenizers`). `is_reference`: every row by itself, rendered by jinja2.
        """
        for option, value, known in (("--train-on", train_on, TRAIN_ON), ("--era", era, ("auto", *ERAS))):
            if value not in known:
                raise UsageError(f"{option} {value}: no such choice", f"choose one of {', '.join(known)}")
        assert max_len >= 2
        self.tokenizer = tokenizer
        self.max_len = max_len
        self.era = era
        self.train_on = train_on
        self.seed = seed
        self.encoder = encoder or choose(tokenizer, "tokenizers")
        self._is_reference = is_reference
        self._template: Template | None = None
        self._is_exact = tokenizer.is_exact
        self._control_ids = {text: np.array([id], dtype=np.uint32) for text, id in tokenizer.control_tokens.items()}
        self._bulk = None
        if Bulk.is_possible(tokenizer) and not is_reference:
            self._bulk = Bulk(tokenizer, self.encoder, max_len=max_len, train_on=train_on)

    def __reduce__(self) -> tuple:
        options = self.max_len, self.era, self.train_on, self.seed, self.encoder.name, self._is_reference
        return _rebuild, (self.tokenizer.dir, *options)

    @property
    def template(self) -> Template:
        """The tokenizer's chat template, compiled at first use: documents need none."""
        if self._template is None:
            self._template = Template(self.tokenizer, era=self.era, only_jinja=self._is_reference)
        return self._template

    @cached_property
    def _blocks(self) -> Blocks | None:
        return learn(self.template)

    def encode(self, rows: Rows[Row]) -> list[Encoded | BadRow]:
        """Encode a batch; each row's result stands at its place, a BadRow with the reason where it cannot be used."""
        segments: list[list[Segment]] = []  # of every rendering of every row
        plans: list[range | BadRow] = []  # a row's renderings in `segments`
        for row in rows:
            try:
                found = self._segments_of(row)
                plans.append(range(len(segments), len(segments) + len(found)))
                segments += found
            except BadRow as bad:
                plans.append(bad)
        sides = self._encode_segments(segments)
        results: list[Encoded | BadRow] = []
        for row, plan in zip(rows, plans, strict=True):
            try:
                results.append(plan if isinstance(plan, BadRow) else self._finish(row, [sides[i] for i in plan]))
            except BadRow as bad:
                results.append(bad)
        return results

    def encode_lines(self, raws: Rows[bytes], kind: str) -> Lines:
        """Reads lines as rows of this kind and encodes them: plain ones in bulk from end to end, the others as objects.

        A reference takes every row by itself.
        """
        found = Lines(len(raws))
        is_small = sum(map(len, raws)) <= MOST_BYTES
        odd = self._plain(raws, found) if kind == "conversation" and self._bulk and is_small else range(len(raws))
        rows: list[Row] = []
        at: list[int] = []
        for i in odd:
            try:
                rows.append(parse_row(raws[i], kind))
                at.append(i)
            except BadRow as bad:
                found.bad[i] = bad
        if rows:
            found.add_rows(at, [raws[i] for i in at], rows)
            found.add(np.array(at), self.encode_batch(rows, found.hashes[at]) if is_small else self._one_by_one(rows))
        return found

    def _plain(self, raws: Rows[bytes], found: Lines) -> Rows[int]:
        """Encodes the plain conversations into `found`; returns which lines are left."""
        plain = read_talks(raws) if self._blocks else None
        if not self._bulk or not self._blocks or not plain or not len(plain.at):
            return range(len(raws))
        at, hashes = plain.at, plain.talks.hashes()
        found.hashes[at], found.characters[at] = hashes, plain.talks.num_characters()
        result = self._bulk.conversations(plain.talks, self._blocks, self._keeps(hashes))
        found.add(at, _batch_of(result))
        is_left = np.ones(len(raws), bool)
        is_left[at] = False
        is_left[at[result.odd]] = True
        return np.flatnonzero(is_left).tolist()

    def encode_batch(self, rows: Rows[Row], hashes: np.ndarray) -> Batch:
        """As `encode`, into flat arrays, and usual rows in bulk. hashes: uint8 [R, 32], the `row_hash` of each row.

        A reference takes every row by itself and needs no hashes.
        """
        found = self._in_bulk(rows, hashes)
        if found is None:
            return self._one_by_one(rows)
        if not found.odd:
            return _batch_of(found)
        rest = self._one_by_one([rows[i] for i in found.odd])
        return merged(len(rows), [(np.arange(len(rows)), _batch_of(found)), (np.array(found.odd), rest)])

    def _in_bulk(self, rows: Rows[Row], hashes: np.ndarray) -> Found | None:
        """None where all rows have to be looked at one by one."""
        if self._bulk is None or not rows:
            return None
        kinds = set(map(type, rows))
        if kinds == {Document}:
            return self._bulk.documents([split_documents(row.text) for row in cast(Rows[Document], rows)])
        if kinds == {Conversation} and self._blocks:
            talks = talks_of(cast(Rows[Conversation], rows))
            return self._bulk.conversations(talks, self._blocks, self._keeps(hashes))
        return None

    def _keeps(self, hashes: np.ndarray) -> np.ndarray:
        """bool [R]: the empty think blocks that the template writes stay, of rows with these hashes."""
        if self.template.era != "3":
            return np.ones(len(hashes), bool)
        return _shares(self.seed, hashes) < _EMPTY_THINK_KEPT

    def _one_by_one(self, rows: Rows[Row]) -> Batch:
        found = self.encode(rows)
        sequences: list[Any] = []
        counts = np.zeros(len(rows), np.int64)
        cut: Counter[str] = Counter()
        for i, item in enumerate(found):
            if isinstance(item, Encoded):
                of_row = [item.sequences] if isinstance(item.sequences, PairSequence) else item.sequences
                counts[i] = len(of_row)
                sequences += of_row
                cut.update(item.cut)
        bad = {i: item for i, item in enumerate(found) if isinstance(item, BadRow)}
        num_tokens = sum(item.num_tokens for item in found if isinstance(item, Encoded))
        rows_cut = sum(bool(item.cut) for item in found if isinstance(item, Encoded))
        return Batch(flatten(sequences), counts, num_tokens, cut, rows_cut, bad)

    # ---- row -> segments

    def segments(self, row: Conversation | Pair) -> list[list[Segment]]:
        """The rendering of a conversation, or of both sides of a pair."""
        keep = self._keeps_empty_think(row)
        if isinstance(row, Conversation):
            return [self.template.segments(row, train_on=self.train_on, keep_empty_think=keep)]
        return [
            self.template.segments(side, train_on=self.train_on, first_trained=row.num_shared, keep_empty_think=keep)
            for side in (row.chosen, row.rejected)
        ]

    def document_segments(self, text: str) -> list[Segment]:
        """One document of a pretraining text between bos and eos."""
        bos = [Segment(self.tokenizer.bos_token, False, True)] if self.tokenizer.bos_token else []
        return [*bos, Segment(text, True, False), Segment(self.tokenizer.eos_token, True, True)]

    def _keeps_empty_think(self, row: Row) -> bool:
        """One decision a row, the same on both sides of a pair; other eras' templates write no empty blocks to decide on."""
        return bool(self._keeps(np.frombuffer(row_hash(row), np.uint8).reshape(1, -1))[0])

    def _segments_of(self, row: Row) -> list[list[Segment]]:
        if isinstance(row, Document):
            texts = split_documents(row.text)
            if not texts:
                raise BadRow("empty content", "nothing stands between its marks")
            return [[Segment(text, True, False)] for text in texts]
        return self.segments(row)

    # ---- segments -> ids and mask

    def _encode_segments(self, renderings: list[list[Segment]]) -> list[_Side | BadRow]:
        """Ids and mask of each rendering, all encoded in one call."""
        if not self._is_exact:
            return [self._encode_jointly(segments) for segments in renderings]
        grouped = [stretches(segments) for segments in renderings]
        place: dict[str, int] = {}  # each text is encoded once
        for groups in grouped:
            for group in groups:
                if not group[0].is_control:
                    place.setdefault("".join(s.text for s in group), len(place))
                    if len(group) > 1:
                        place.setdefault(group[0].text, len(place))
        flat, ends = self.encoder.encode(list(place), False)
        begins = [0, *ends[:-1].tolist()]
        encoded = {text: flat[begins[i] : end] for (text, i), end in zip(place.items(), ends.tolist(), strict=True)}
        return self._join([[self._encode_group(group, encoded) for group in groups] for groups in grouped])

    def _encode_group(self, group: list[Segment], encoded: dict[str, np.ndarray]) -> tuple[np.ndarray, _Runs]:
        """Ids of a control token or of the text between two, and which stretches of them are trained."""
        first = group[0]
        if first.is_control:
            return self._control_ids[first.text], ((1, first.is_trained),)
        if len(group) == 1:
            ids = encoded[first.text]
            return ids, ((len(ids), first.is_trained),)
        ids, head = encoded["".join(s.text for s in group)], encoded[first.text]
        if len(group) == 2 and np.array_equal(ids[: len(head)], head):
            return ids, ((len(head), first.is_trained), (len(ids) - len(head), group[1].is_trained))
        side = self._by_offsets(group, control=False)
        return side.ids, tuple((1, bool(is_trained)) for is_trained in side.mask)

    @staticmethod
    def _join(rows: list[list[tuple[np.ndarray, _Runs]]]) -> list[_Side | BadRow]:
        """Lay the groups of all renderings end to end once, and hand out each rendering's part."""
        groups = [group for row in rows for group in row]
        if not groups:
            return []
        runs = [run for _, found in groups for run in found]
        ids = np.concatenate([ids for ids, _ in groups])
        mask = np.repeat([is_trained for _, is_trained in runs], [length for length, _ in runs])
        ends = itertools.accumulate((sum(len(ids) for ids, _ in row) for row in rows), initial=0)
        return [_Side(ids[begin:end], mask[begin:end]) for begin, end in itertools.pairwise(ends)]

    def _by_offsets(self, segments: list[Segment], *, control: bool) -> _Side:
        """A token is trained when any character it stands for is."""
        ids, offsets = self.tokenizer.encode_with_offsets("".join(s.text for s in segments), control=control)
        trained = np.repeat([s.is_trained for s in segments], [len(s.text) for s in segments])
        before = np.concatenate(([0], np.cumsum(trained)))
        begin, end = offsets[:, 0], np.maximum(offsets[:, 1], np.minimum(offsets[:, 0] + 1, len(trained)))
        return _Side(ids, before[end] > before[begin])

    def _encode_jointly(self, segments: list[Segment]) -> _Side | BadRow:
        """For tokenizers that rewrite text or eat space around control tokens: the whole rendering, by offsets."""
        is_document = len(segments) == 1 and not segments[0].is_control
        side = self._by_offsets(segments, control=not is_document)
        found = np.isin(side.ids, list(self.tokenizer.control_tokens.values())).sum()
        if found != sum(s.is_control for s in segments):
            return BadRow("template cannot be cut", "this tokenizer cannot keep control strings in content plain text")
        return side

    # ---- ids and mask -> what is packed

    def _finish(self, row: Row, sides: list[_Side | BadRow]) -> Encoded:
        good = []
        for side in sides:
            if isinstance(side, BadRow):
                raise side
            good.append(side)
        if isinstance(row, Document):
            return self._document([side.ids for side in good])
        for side in good:
            side.mask[0] = False  # nothing stands before it to predict it from
            if not side.mask.any():
                raise BadRow("no trained token")
        return self._conversation(row, good[0]) if isinstance(row, Conversation) else self._pair(*good)

    def _document(self, texts: list[np.ndarray]) -> Encoded:
        """One bos and eos around each text; texts past max_len go on in further sequences, no token lost."""
        bos, eos = (
            np.array([id for id in ids if id is not None], dtype=np.uint32)
            for ids in ([self.tokenizer.bos_id], [self.tokenizer.eos_id])
        )
        sequences = []
        for text in texts:
            ids = np.concatenate([bos, text, eos])
            for begin, end in fragments(len(ids), self.max_len):
                spans = [[1, end - begin]] if end - begin > 1 else []
                sequences.append(Sequence(ids[begin:end], np.array(spans, dtype=np.int32).reshape(-1, 2)))
        return Encoded(tuple(sequences), sum(len(s.ids) for s in sequences))

    def _conversation(self, row: Conversation, side: _Side) -> Encoded:
        if len(side.ids) <= self.max_len:
            return Encoded((Sequence(side.ids, _spans_of(side.mask)),), len(side.ids))
        fitting = self._longest_that_fits(row)
        if fitting is None:
            raise BadRow(
                "too long", f"{len(side.ids):,} tokens, and its first turn alone is longer than {self.max_len:,}"
            )
        cut = len(side.ids) - len(fitting.ids)
        return Encoded((Sequence(fitting.ids, _spans_of(fitting.mask)),), len(side.ids), {CUT_TURNS: cut})

    def _longest_that_fits(self, row: Conversation) -> _Side | None:
        """The most whole turns from the beginning that fit max_len, found by bisection, rendered on their own."""
        messages = row.messages
        ends = [
            i + 1
            for i in range(len(messages) - 1)
            if messages[i].role == "assistant" and messages[i + 1].role != "tool"
        ]
        keep = self._keeps_empty_think(row)
        best, low, high = None, 0, len(ends)
        while low < high:
            middle = (low + high) // 2
            shorter = Conversation(messages[: ends[middle]], row.tools)
            (side,) = self._encode_segments(
                [self.template.segments(shorter, train_on=self.train_on, keep_empty_think=keep)]
            )
            if not isinstance(side, BadRow) and len(side.ids) <= self.max_len:
                side.mask[0] = False
                best, low = (side if side.mask.any() else best), middle + 1
            else:
                high = middle
        return best

    def _pair(self, chosen: _Side, rejected: _Side) -> Encoded:
        # What both sides begin with, up to the first trained token. Where a tokenizer joins the header's last newlines
        # with one reply and not with the other, the prompt ends before them.
        begin = min(int(chosen.mask.argmax()), int(rejected.mask.argmax()), _common_length(chosen.ids, rejected.ids))
        if np.array_equal(chosen.ids, rejected.ids):
            raise BadRow("chosen equal to rejected", "once written by the template")
        longest = max(len(chosen.ids), len(rejected.ids))
        if longest > self.max_len:
            raise BadRow("too long", f"{longest:,} tokens, expected at most {self.max_len:,}")
        replies = chosen.ids[begin:], rejected.ids[begin:]
        spans = _spans_of(chosen.mask[begin:]), _spans_of(rejected.mask[begin:])
        return Encoded(PairSequence(chosen.ids[:begin], *replies, *spans), begin + len(replies[0]) + len(replies[1]))


@dataclass(frozen=True, slots=True)
class Preview:
    """One line as it would be packed: its renderings cut into segments, what they became, or the reason it is left out."""

    segments: tuple[tuple[Segment, ...], ...] = ()
    encoded: Encoded | None = None
    bad: BadRow | None = None


def preview(raw: bytes, encoder: RowEncoder, *, kind: str | None = None) -> Preview:
    """Show what becomes of one line; a line that is set aside keeps the segments of as far as it came."""
    try:
        row = parse_row(raw, kind)
        if isinstance(row, Document):
            renderings = [encoder.document_segments(text) for text in split_documents(row.text)]
        else:
            renderings = encoder.segments(row)
    except BadRow as bad:
        return Preview(bad=bad)
    shown = tuple(map(tuple, renderings))
    (result,) = encoder.encode([row])
    return Preview(shown, bad=result) if isinstance(result, BadRow) else Preview(shown, encoded=result)


def fragments(length: int, max_len: int) -> list[tuple[int, int]]:
    """Cut [0, length) into pieces of max_len; the last is not a single token, which could not be trained on."""
    begins = list(range(0, length, max_len))
    ends = [*begins[1:], length]
    if len(begins) > 1 and length - begins[-1] == 1 and max_len > 2:
        begins[-1] -= 1
        ends[-2] -= 1
    return list(zip(begins, ends, strict=True))


def _rebuild(
    dir: Path, max_len: int, era: str, train_on: str, seed: int, encoder: str, is_reference: bool
) -> RowEncoder:
    tokenizer = Tokenizer.load(dir)
    options: Any = {"era": era, "train_on": train_on, "seed": seed, "is_reference": is_reference}
    return RowEncoder(tokenizer, max_len=max_len, encoder=choose(tokenizer, encoder), **options)


def _shares(seed: int, hashes: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seed and what the rows say, and on nothing else. hashes: uint8 [R, 32]."""
    key = np.frombuffer(hashlib.sha256(str(seed).encode()).digest(), "<u8", 1)
    mixed = (np.ascontiguousarray(hashes).view("<u8")[:, 1] ^ key) * np.uint64(0xBF58476D1CE4E5B9)  # as splitmix64 does
    mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(11)) / 2.0**53


def _batch_of(found: Found) -> Batch:
    return Batch(found.flat, found.num_sequences, found.num_tokens, found.cut, found.rows_cut, found.bad)


def merged(num_rows: int, batches: Rows[tuple[np.ndarray, Batch]]) -> Batch:
    """Batches of some rows each as one of all, in row order. With each: which rows it is of, int64; a later one's count stands."""
    if len(batches) == 1 and len(batches[0][0]) == num_rows:
        return batches[0][1]
    num_sequences = np.zeros(num_rows, np.int64)
    cut: Counter[str] = Counter()
    bad: dict[int, BadRow] = {}
    for at, batch in batches:
        num_sequences[at] = batch.num_sequences
        cut += batch.cut
        bad |= {int(at[i]): reason for i, reason in batch.bad.items()}
    row_of = np.concatenate([np.empty(0, np.int64), *(np.repeat(at, batch.num_sequences) for at, batch in batches)])
    flat = join([batch.flat for _, batch in batches])
    if (row_of[1:] < row_of[:-1]).any():
        flat = reorder(flat, np.argsort(row_of, kind="stable"))
    num_tokens = sum(batch.num_tokens for _, batch in batches)
    return Batch(flat, num_sequences, num_tokens, cut, sum(batch.rows_cut for _, batch in batches), bad)


def _common_length(one: np.ndarray, other: np.ndarray) -> int:
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


def _spans_of(mask: np.ndarray) -> np.ndarray:
    """int32 [n, 2] of the runs of True."""
    padded = np.zeros(len(mask) + 2, dtype=bool)
    padded[1:-1] = mask
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    return edges.reshape(-1, 2).astype(np.int32)
