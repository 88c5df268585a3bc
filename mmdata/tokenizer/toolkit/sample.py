"""Stratified sampling of the text of jsonl files, to train and evaluate tokenizers on.

A stratum is the text of one language in one file. Every stratum gets an equal share of the byte limit; what a small one
does not need is given to the others. Each text gets a random key, and those with the smallest keys are kept: one pass,
and at most about 1.1 times the limit in memory. The same files, weights, limit and seed give the same sample.
"""

import heapq
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmdata.encode.rows import BadRow, Columns, Conversation, Document, Pair, Row, parse_row, split_documents
from mmdata.errors import InputError, UsageError
from mmdata.io.files import Progress, no_progress
from mmdata.io.lines import format_of, iter_lines
from mmdata.io.options import DEFAULT_READING, ReadOptions
from mmdata.tokenizer.scripts import LANGUAGES, code_points, count_scripts, languages_of, scripts_of

FIELDS = ("text", "system", "user", "assistant", "rejected", "tool", "reasoning", "calls", "tools")
PIECE = 16_384  # characters; longer texts are cut into pieces, so that one text cannot fill the whole sample
_SLACK = 0.1  # the sample may exceed its limit by this share before it is cut down
_BATCH = 1024  # texts whose language is detected at once
_LOOK_AT = 2048  # the language is detected from this many characters at the beginning of a text
_BALANCED = ("Chinese", "English")  # other languages and code are never repeated
_MAX_TIMES = 3  # how often a text of the smaller language may count


@dataclass(slots=True)
class Stratum:
    """The text of one language in one file: bytes and texts found, and drawn (a repeated text counts repeatedly)."""

    file: str
    language: str
    found_bytes: int = 0
    drawn_bytes: int = 0
    found_texts: int = 0
    drawn_texts: int = 0


@dataclass(slots=True)
class TextSample:
    """The texts drawn: for each stratum a list of (UTF-8 text, how many times it counts). `num_rows`: rows read.
    `left_out`: file -> reason -> number of rows that could not be used."""

    strata: list[Stratum]
    texts: list[list[tuple[bytes, int]]]  # texts[i] are those of strata[i]
    num_rows: int = 0
    left_out: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def drawn_bytes(self) -> int:
        """The bytes of all texts, repetitions included."""
        return sum(stratum.drawn_bytes for stratum in self.strata)

    def groups(self) -> Iterator[tuple[Stratum, list[str]]]:
        """Yield each stratum with its texts, repetitions included."""
        for stratum, texts in zip(self.strata, self.texts, strict=True):
            yield stratum, [text.decode() for text, count in texts for _ in range(count)]

    def release(self) -> Iterator[str]:
        """Yield all texts, repetitions included, and free each of them. The sample has no texts afterwards."""
        for texts in self.texts:
            while texts:
                text, count = texts.pop()
                yield from [text.decode()] * count


@dataclass(slots=True)
class _Reservoir:
    """The texts of one stratum while files are read; the one with the largest key is first in `heap` and dropped first.
    `num_bytes` includes repetitions. `weight` scales its share of the limit."""

    weight: float
    heap: list[tuple[float, int, bytes, int]] = field(default_factory=list)  # negative key, running number, text, count
    num_bytes: int = 0
    found_bytes: int = 0
    found_texts: int = 0
    counted_bytes: int = 0  # bytes found, repetitions included
    threshold: float = 1.0  # the smallest key that was dropped

    def add(self, key: float, text: bytes, count: int) -> None:
        """Count a text as found, and add it `count` times if its key is below all that were dropped before."""
        self.found_bytes += len(text)
        self.found_texts += 1
        self.counted_bytes += len(text) * count
        if key < self.threshold:
            heapq.heappush(self.heap, (-key, self.found_texts, text, count))
            self.num_bytes += len(text) * count

    def shrink(self, limit: float) -> None:
        """Drop the texts with the largest keys until at most `limit` bytes are left."""
        while self.num_bytes > limit:
            key, _, text, count = heapq.heappop(self.heap)
            self.num_bytes -= len(text) * count
            self.threshold = -key

    def repeat(self, times: float) -> None:
        """Repeat every text int(times) times, and those with the smallest keys once more, as far as the number of bytes
        stays at most `times` as large."""
        left = times % 1 * self.num_bytes
        repeated = []
        for key, number, text, count in sorted(self.heap, reverse=True):
            is_once_more = len(text) * count <= left
            left -= len(text) * count * is_once_more
            repeated.append((key, number, text, count * (int(times) + is_once_more)))
        self.heap = repeated
        self.num_bytes = sum(len(text) * count for _, _, text, count in repeated)


_Reservoirs = dict[tuple[int, str], _Reservoir]  # (index of the file, language) -> reservoir


def draw(
    files: Sequence[Path],
    *,
    limit_bytes: int,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    evened: bool = False,
    read: ReadOptions = DEFAULT_READING,
    progress: Progress = no_progress,
) -> TextSample:
    """Read all rows of the files and draw at most `limit_bytes` of their text. Unusable rows are counted and left out.

    weights: how often a text counts, by field (one of FIELDS), language or file path, 0 to 100, multiplied; 0.5 draws
    every second text on average. Those of languages and files also scale the share of the limit. evened: repeat texts
    of the smaller of Chinese and English, up to 3 times, until both are equally large or the limit is reached, unless a
    language has a weight. progress: called with the bytes read and in all, compressed files and tables excluded. Raises
    InputError if no text is found, and UsageError for a weight out of range or of an unknown name.
    """
    weights = dict(weights or {})
    _check_weights(weights, files)
    sizes = [path.stat().st_size if format_of(path, read).has_offsets else 0 for path in files]
    total = sum(sizes)
    reservoirs: _Reservoirs = {}
    left_out: dict[str, Counter[str]] = {}
    columns = Columns.parse(read.mapping)
    num_rows = done = 0
    for index, path in enumerate(files):
        uniform = random.Random(f"{seed}:{index}").random
        reasons = left_out.setdefault(str(path), Counter())
        waiting: list[tuple[str, str]] = []
        for line in iter_lines(path, options=read):
            num_rows += 1
            try:
                waiting += fields_of(parse_row(line.raw, read.kind, columns=columns))
            except BadRow as bad:
                reasons[bad.reason] += 1
            if len(waiting) >= _BATCH:
                _add(reservoirs, index, path, waiting, weights, uniform)
                waiting = []
                if sum(one.num_bytes for one in reservoirs.values()) > (1 + _SLACK) * limit_bytes:
                    _shrink(reservoirs.values(), limit_bytes)
                progress(done + line.offset, total)
        _add(reservoirs, index, path, waiting, weights, uniform)
        done += sizes[index]
    progress(total, total)
    room = limit_bytes - _shrink(reservoirs.values(), limit_bytes)
    if evened and not any(language in weights for language in LANGUAGES):
        _balance(reservoirs, room)
    return _collect(files, reservoirs, num_rows, {name: counts for name, counts in left_out.items() if counts})


def _collect(
    files: Sequence[Path], reservoirs: _Reservoirs, num_rows: int, left_out: dict[str, Counter[str]]
) -> TextSample:
    """Return the sample of all reservoirs, which are emptied. Raises InputError if there is no text."""
    sample = TextSample([], [], num_rows, left_out)
    for (index, language), one in sorted(reservoirs.items()):
        texts = [(text, count) for _, _, text, count in sorted(one.heap, key=lambda item: item[1])]
        one.heap.clear()
        sizes = one.found_bytes, one.num_bytes, one.found_texts, sum(count for _, count in texts)
        sample.strata.append(Stratum(str(files[index]), language, *sizes))
        sample.texts.append(texts)
    if not sample.drawn_bytes:
        raise InputError(
            f"{', '.join(map(str, files))}: no text can be used of {num_rows:,} rows",
            "`mm validate FILE` lists the reasons; a weight of 0 leaves texts out too",
        )
    return sample


def _add(
    reservoirs: _Reservoirs,
    index: int,
    path: Path,
    texts: Sequence[tuple[str, str]],
    weights: Mapping[str, float],
    uniform: Callable[[], float],
) -> None:
    """Add texts of file number `index`, as (field, text), to the reservoirs of their languages; long ones in pieces.
    uniform: returns the random key of the next text, in [0, 1). Fractional weights are rounded at random."""
    pieces = [(name, piece) for name, text in texts for piece in (_pieces(text) if len(text) > PIECE else (text,))]
    for (name, piece), language in zip(pieces, _languages([piece for _, piece in pieces]), strict=True):
        claim = weights.get(str(path), 1.0) * weights.get(language, 1.0)
        weight = claim * weights.get(name, 1.0)
        key, count = uniform(), int(weight)
        if count != weight:
            count += uniform() < weight - count
        if count:
            reservoir = reservoirs.get((index, language))
            if reservoir is None:
                reservoir = reservoirs[index, language] = _Reservoir(claim)
            reservoir.add(key, piece.encode(), count)


def _languages(texts: Sequence[str]) -> list[str]:
    """Return the language of each text, detected from its first _LOOK_AT characters."""
    if not texts:
        return []
    heads = [text[:_LOOK_AT] for text in texts]
    lengths = np.fromiter(map(len, heads), np.int64, len(heads))
    counts = count_scripts(scripts_of(code_points("".join(heads))), lengths)
    return [LANGUAGES[index] for index in languages_of(counts, heads).tolist()]


def _shrink(reservoirs: Collection[_Reservoir], limit_bytes: int) -> int:
    """Reduce every stratum to its share of the limit and return the bytes left. Shares can only become smaller, so the
    final sample does not depend on when this is called."""
    level = water_level([(one.counted_bytes, one.weight) for one in reservoirs], limit_bytes)
    for one in reservoirs:
        one.shrink(level * one.weight)
    return sum(one.num_bytes for one in reservoirs)


def _balance(reservoirs: _Reservoirs, room: int) -> None:
    """Repeat texts of the smaller of Chinese and English, for at most `room` further bytes; see `draw`."""
    groups = [[one for (_, language), one in reservoirs.items() if language == name] for name in _BALANCED]
    small, large = sorted(groups, key=lambda group: sum(one.num_bytes for one in group))
    small_bytes, large_bytes = (sum(one.num_bytes for one in group) for group in (small, large))
    if small_bytes:
        times = min(_MAX_TIMES, 1 + room / small_bytes, large_bytes / small_bytes)
        for one in small:
            one.repeat(times)


def water_level(sizes: Sequence[tuple[float, float]], limit: float) -> float:
    """Return the level at which the sum of min(size, level * weight) is `limit`; infinity if all sizes fit. sizes:
    (size, weight) of each stratum, with weights above 0."""
    if sum(size for size, _ in sizes) <= limit:
        return float("inf")
    left, claims = limit, sum(weight for _, weight in sizes)
    for size, weight in sorted(sizes, key=lambda item: item[0] / item[1]):
        if size / weight >= left / claims:
            break
        left, claims = left - size, claims - weight
    return left / claims


def fields_of(row: Row) -> Iterator[tuple[str, str]]:
    """Yield (field, text) for all text of a row, by FIELDS. Tools and tool calls are given as the JSON that chat
    templates write. Of a pair, the prompt is given once, and answers of the rejected side have the field "rejected"."""
    if isinstance(row, Document):
        for text in split_documents(row.text):
            yield "text", text
    elif isinstance(row, Pair):
        yield from fields_of(row.chosen)
        replies = Conversation(row.rejected.messages[row.num_shared :])
        for name, text in fields_of(replies):
            yield "rejected" if name == "assistant" else name, text
    else:
        for message in row.messages:
            if message.content:
                yield message.role, message.content
            if message.reasoning_content:
                yield "reasoning", message.reasoning_content
            for call in message.tool_calls:
                yield "calls", json.dumps(call, ensure_ascii=False)
        for tool in row.tools:
            yield "tools", json.dumps(tool, ensure_ascii=False)


def _pieces(text: str) -> Iterator[str]:
    """Yield pieces of at most PIECE characters, cut after the last newline or space in their second half, if any."""
    begin = 0
    while len(text) - begin > PIECE:
        end = begin + PIECE
        cut = max(text.rfind(mark, begin + PIECE // 2, end) for mark in "\n ") + 1
        yield text[begin : cut or end]
        begin = cut or end
    if begin < len(text):
        yield text[begin:]


def _check_weights(weights: Mapping[str, float], files: Sequence[Path]) -> None:
    """Raise UsageError for a weight not in 0 … 100, or whose name is not a field, a language or one of the files."""
    for name, weight in weights.items():
        if name not in (*FIELDS, *LANGUAGES, *map(str, files)):
            raise UsageError(
                f"--weight {name}: neither one of the files, nor a field, nor a language",
                f"fields are {', '.join(FIELDS)}; languages {', '.join(LANGUAGES)}",
            )
        if not 0 <= weight <= 100:
            raise UsageError(f"--weight {name}={weight:g} is not between 0 and 100", "--weight assistant=2")
