"""jsonl files in; texts drawn evenly over files and languages out, for training and judging tokenizers.

Every (file, language) has the same claim on the limit; what one cannot fill goes to the others. Within each, texts are
drawn by random keys (the smallest stay), so one pass is enough and memory holds the limit and a tenth. Where the limit
leaves room, the smaller of Chinese and English may count several times. The same files, weights, limit and seed give the
same corpus.
"""

import heapq
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmdata.encode.rows import BadRow, Conversation, Document, Pair, Row, parse_row, split_documents
from mmdata.errors import InputError, UsageError
from mmdata.io.lines import Line, is_seekable, iter_lines
from mmdata.tokenizer.text import LANGUAGES, code_points, count_scripts, languages_of, scripts_of

FIELDS = ("text", "system", "user", "assistant", "rejected", "tool", "reasoning", "calls", "tools")
PIECE = 16_384  # characters; longer texts are cut after a newline or space, so that one text cannot be all of a corpus
_SLACK = 0.1  # a corpus may grow past its limit by this share before it is pared down
_BATCH = 1024  # texts whose language is told at once
_LOOK_AT = 2048  # characters that tell it
_EVENED = ("Chinese", "English")  # code and the rest count as often as they come
_MOST_TIMES = 3  # that a text of the smaller language counts
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Stratum:
    """Texts of one file and language: how many bytes were found, and how many drawn (a text that counts twice, twice)."""

    file: str
    language: str
    found_bytes: int = 0
    drawn_bytes: int = 0
    found_texts: int = 0
    drawn_texts: int = 0


@dataclass(slots=True)
class Corpus:
    """The texts drawn, as UTF-8 with how often each counts, by stratum; and the rows left out, by file and reason."""

    strata: list[Stratum]
    texts: list[list[tuple[bytes, int]]]  # as long as `strata`
    num_rows: int = 0
    left_out: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def drawn_bytes(self) -> int:
        return sum(stratum.drawn_bytes for stratum in self.strata)

    def groups(self) -> Iterator[tuple[Stratum, list[str]]]:
        """Each stratum and its texts, each as often as it counts."""
        for stratum, texts in zip(self.strata, self.texts, strict=True):
            yield stratum, [text.decode() for text, count in texts for _ in range(count)]

    def release(self) -> Iterator[str]:
        """All texts, let go of as they are taken: the corpus is empty afterwards."""
        for texts in self.texts:
            while texts:
                text, count = texts.pop()
                decoded = text.decode()
                for _ in range(count):
                    yield decoded


class _Stratum:
    """One stratum while it is drawn: a heap whose first item is the one to go next."""

    __slots__ = ("counted_bytes", "found_bytes", "found_texts", "heap", "num_bytes", "threshold", "weight")

    def __init__(self, weight: float):
        self.weight = weight
        self.heap: list[tuple[float, int, bytes, int]] = []  # negative key, running number, text, count
        self.num_bytes = self.found_bytes = self.found_texts = 0
        self.counted_bytes = 0  # found, each text as often as it counts
        self.threshold = 1.0

    def add(self, key: float, text: bytes, count: int) -> None:
        """Take a text that counts `count` times, unless its key is past what has been let go of."""
        self.found_bytes += len(text)
        self.found_texts += 1
        self.counted_bytes += len(text) * count
        if key < self.threshold:
            heapq.heappush(self.heap, (-key, self.found_texts, text, count))
            self.num_bytes += len(text) * count

    def pare(self, target: float) -> None:
        """Let go of texts with the largest keys until at most `target` bytes are left."""
        while self.num_bytes > target:
            key, _, text, count = heapq.heappop(self.heap)
            self.num_bytes -= len(text) * count
            self.threshold = -key

    def repeat(self, times: float) -> None:
        """Let texts count `times` as often by bytes: each the whole number of times, those with the smallest keys once more."""
        left = times % 1 * self.num_bytes
        repeated = []
        for key, number, text, count in sorted(self.heap, reverse=True):
            once_more = len(text) * count <= left
            left -= len(text) * count * once_more
            repeated.append((key, number, text, count * (int(times) + once_more)))
        self.heap = repeated
        self.num_bytes = sum(len(text) * count for _, _, text, count in repeated)


@dataclass(frozen=True, slots=True)
class _File:
    """A file being drawn from: its texts go to the strata of their languages."""

    index: int
    weight: float
    weights: Mapping[str, float]
    random: Callable[[], float]
    strata: dict[tuple[int, str], _Stratum]

    def add(self, texts: Sequence[tuple[str, str]]) -> None:
        """Take texts, each with its field, piece by piece."""
        pieces = [(name, piece) for name, text in texts for piece in (_pieces(text) if len(text) > PIECE else (text,))]
        for (name, piece), language in zip(pieces, _languages([piece for _, piece in pieces]), strict=True):
            claim = self.weight * self.weights.get(language, 1.0)
            weight = claim * self.weights.get(name, 1.0)
            key, count = self.random(), int(weight)
            if count != weight:
                count += self.random() < weight - count
            if count:
                stratum = self.strata.get((self.index, language))
                if stratum is None:
                    stratum = self.strata[self.index, language] = _Stratum(claim)
                stratum.add(key, piece.encode(), count)


def _languages(texts: Sequence[str]) -> list[str]:
    """The language of each text, told by its beginning."""
    if not texts:
        return []
    heads = [text[:_LOOK_AT] for text in texts]
    lengths = np.fromiter(map(len, heads), np.int64, len(heads))
    counts = count_scripts(scripts_of(code_points("".join(heads))), lengths)
    return [LANGUAGES[index] for index in languages_of(counts, heads).tolist()]


def draw(
    files: Sequence[Path],
    *,
    limit_bytes: int,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    evened: bool = False,
    progress: Progress | None = None,
) -> Corpus:
    """Read all rows of the files and draw at most `limit_bytes` of their text.

    `evened`: texts of the smaller of Chinese and English count up to 3 times, until it is as large as the other or the
    limit is reached; not if a language has a weight.
    `weights`: how often a text of a FIELD, a language or a file (by path) counts; 0.5 draws every second, 0 none. Weights of
    languages and files also scale their claims. Rows that cannot be used are counted. progress: bytes read of plain files.
    InputError when no text is found, UsageError for a weight that names nothing.
    """
    weights = dict(weights or {})
    _check_weights(weights, files)
    total = sum(path.stat().st_size for path in files if is_seekable(path))
    strata: dict[tuple[int, str], _Stratum] = {}
    left_out: dict[str, Counter[str]] = {}
    num_rows = done = 0
    for index, path in enumerate(files):
        draw_from = _File(index, weights.get(str(path), 1.0), weights, random.Random(f"{seed}:{index}").random, strata)
        waiting: list[tuple[str, str]] = []
        for line, row in _rows(path, left_out.setdefault(str(path), Counter())):
            num_rows += 1
            waiting += fields_of(row) if row else ()
            if len(waiting) >= _BATCH:
                draw_from.add(waiting)
                waiting = []
                if sum(stratum.num_bytes for stratum in strata.values()) > (1 + _SLACK) * limit_bytes:
                    _pare(strata.values(), limit_bytes)
                if progress:
                    progress(done + line.offset, total)
        draw_from.add(waiting)
        done += path.stat().st_size if is_seekable(path) else 0
    if progress:
        progress(total, total)
    room = limit_bytes - _pare(strata.values(), limit_bytes)
    if evened and not any(language in weights for language in LANGUAGES):
        _even_out(strata, room)
    return _finish(files, strata, num_rows, left_out)


def _finish(
    files: Sequence[Path], strata: dict[tuple[int, str], _Stratum], num_rows: int, left_out: dict[str, Counter[str]]
) -> Corpus:
    corpus = Corpus([], [], num_rows, {name: counts for name, counts in left_out.items() if counts})
    for (index, language), drawn in sorted(strata.items()):
        texts = [(text, count) for _, _, text, count in sorted(drawn.heap, key=lambda item: item[1])]
        drawn.heap.clear()
        corpus.strata.append(
            Stratum(
                str(files[index]), language, drawn.found_bytes, drawn.num_bytes, drawn.found_texts,
                sum(count for _, count in texts),
            )
        )  # fmt: skip
        corpus.texts.append(texts)
    if not corpus.drawn_bytes:
        raise InputError(
            f"{', '.join(map(str, files))}: no text can be used of {num_rows:,} rows",
            "`mm validate FILE` lists the reasons; a weight of 0 leaves texts out too",
        )
    return corpus


def _rows(path: Path, left_out: Counter[str]) -> Iterator[tuple[Line, Row | None]]:
    """Every line and its row; None for a row that cannot be used."""
    for line in iter_lines(path):
        try:
            yield line, parse_row(line.raw)
        except BadRow as bad:
            left_out[bad.reason] += 1
            yield line, None


def _pare(strata: Collection[_Stratum], limit_bytes: int) -> int:
    """Pare every stratum down to its share of the limit; the bytes that stay.

    Shares follow from all that was found so far, so they only shrink, and what stays at the end is the same whenever and
    however often this was called.
    """
    level = water_level([(stratum.counted_bytes, stratum.weight) for stratum in strata], limit_bytes)
    for stratum in strata:
        stratum.pare(level * stratum.weight)
    return sum(stratum.num_bytes for stratum in strata)


def _even_out(strata: Mapping[tuple[int, str], _Stratum], room: int) -> None:
    """Let texts of the smaller of the languages count more often, for at most `room` bytes more."""
    drawn = {name: [one for (_, language), one in strata.items() if language == name] for name in _EVENED}
    small, large = sorted(sum(one.num_bytes for one in group) for group in drawn.values())
    if small:
        times = min(_MOST_TIMES, 1 + room / small, large / small)
        for one in min(drawn.values(), key=lambda group: sum(one.num_bytes for one in group)):
            one.repeat(times)


def water_level(sizes: Sequence[tuple[float, float]], limit: float) -> float:
    """The level at which sum(min(size, level * weight)) is the limit; infinite where all of it fits."""
    if sum(size for size, _ in sizes) <= limit:
        return float("inf")
    left, claims = limit, sum(weight for _, weight in sizes)
    for size, weight in sorted(sizes, key=lambda item: item[0] / item[1]):
        if size / weight >= left / claims:
            break
        left, claims = left - size, claims - weight
    return left / claims


def fields_of(row: Row) -> Iterator[tuple[str, str]]:
    """Everything a row says with the FIELD it says it in; tools and calls as the JSON that templates write."""
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
    """The text, in stretches of at most PIECE characters that end after a newline or space where there is one."""
    begin = 0
    while len(text) - begin > PIECE:
        end = begin + PIECE
        cut = max(text.rfind("\n", begin + PIECE // 2, end), text.rfind(" ", begin + PIECE // 2, end)) + 1
        yield text[begin : cut or end]
        begin = cut or end
    if begin < len(text):
        yield text[begin:]


def _check_weights(weights: Mapping[str, float], files: Sequence[Path]) -> None:
    for name, weight in weights.items():
        if name not in FIELDS and name not in LANGUAGES and name not in map(str, files):
            raise UsageError(
                f"--weight {name}: neither one of the files, nor a field, nor a language",
                f"fields are {', '.join(FIELDS)}; languages {', '.join(LANGUAGES)}",
            )
        if not 0 <= weight <= 100:
            raise UsageError(f"--weight {name}={weight:g} is not between 0 and 100", "--weight assistant=2")
