"""Figures of one or several tokenizers on the same text: `mm tokenizer eval`.

Takes about one second per megabyte of text and tokenizer. Bytes per token can be compared only on the same text.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from mmdata.io.files import Progress, no_progress
from mmdata.tokenizer.hostile import hostile_strings
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.sample import Stratum, TextSample
from mmdata.tokenizer.vocabulary import legible, token_texts

NUM_HOSTILE = 1000
NUM_SHOWN = 10
GIGABYTE = 1_000_000_000
EXCERPT = range(40, 161)  # characters of a text that is shown as each tokenizer splits it
_BATCH = 1000  # texts encoded by one native call
_HAN = re.compile(r"[\u3400-\u9fff]+")
_WORD = re.compile(r" ?[A-Za-z]+(?:'[a-z]+)?")
Groups = Sequence[tuple[Stratum, list[str]]]


@dataclass(frozen=True, slots=True)
class Shape:
    """The figures of a model preset that decide size and share of its embedding."""

    hidden_size: int  # width C of the embedding
    num_other_params: int  # parameters outside the embedding


@dataclass(frozen=True, slots=True)
class Rates:
    """The size of a text and how well it is compressed into tokens."""

    bytes: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float


@dataclass(frozen=True, slots=True)
class TokenUses:
    """One token in readable form, its number of bytes, and how often it occurs in the text."""

    id: int
    text: str
    bytes: int
    uses: int


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """How many texts and hostile strings change when encoded and decoded. `examples`: the three shortest, cut."""

    texts: int
    texts_changed: int
    hostile: int
    hostile_changed: int
    examples: list[str]


@dataclass(frozen=True, slots=True)
class EmbeddingShare:
    """Parameters of an embedding (input and output as one), its share of the model, and the model's parameters."""

    params: int
    share: float
    model_params: int


@dataclass(frozen=True, slots=True)
class TokenizerFigures:
    """All figures of one tokenizer; the field names are the keys of `mm tokenizer eval --json`."""

    name: str
    sha256: str
    vocab_size: int
    bytes: int
    tokens: int
    bytes_per_token: float
    characters_per_token: float
    by_language: dict[str, Rates]
    by_file: dict[str, Rates]
    tokens_per_word: float | None  # of words of Latin letters with the space before them; None if the text has none
    tokens_per_chinese_character: float | None  # None if the text has none
    byte_fallback_share: float  # share of the tokens that are a single byte of a longer character
    vocab_used: int
    vocab_used_share: float
    never_used: int  # tokens that do not occur in the text; added tokens and ids without a token are not counted
    never_used_bytes: int  # of these, single bytes, which are needed to encode any other text
    glitch_prone: int  # of these, all others: text to come may contain them, but their embedding is never trained
    glitch_prone_tokens: list[TokenUses]  # the NUM_SHOWN of them with the largest ids
    rarely_used: int  # tokens that occur 1 to 9 times
    longest_tokens: list[TokenUses]
    round_trip: RoundTrip
    encode_mb_per_cpu_s: float  # megabytes (10^6 bytes) per second of CPU time, all threads together
    decode_mb_per_cpu_s: float
    embedding: dict[str, EmbeddingShare]  # model preset -> its embedding with this vocabulary
    tokens_per_gigabyte: int  # tokens of 10^9 bytes of such text
    steps_per_gigabyte: int  # training steps that these tokens make
    splits: list[list[str]]  # the excerpts of the text as tokens, in readable form


@dataclass(frozen=True, slots=True)
class TextFigures:
    """The text drawn, out of `rows` rows with `found_bytes` bytes. `left_out`: file -> reason -> number of rows.
    `excerpts`: the beginning of a text in each language."""

    bytes: int
    characters: int
    texts: int
    rows: int
    left_out: dict[str, dict[str, int]]
    found_bytes: int
    excerpts: list[str]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` returns: figures of the text and each tokenizer. `step_tokens`: tokens of one training step."""

    text: TextFigures
    step_tokens: int
    tokenizers: list[TokenizerFigures]


def evaluate(
    tokenizers: Sequence[Tokenizer],
    sample: TextSample,
    *,
    shapes: Mapping[str, Shape],
    step_tokens: int,
    num_hostile: int = NUM_HOSTILE,
    progress: Progress = no_progress,
) -> Evaluation:
    """Measure every tokenizer on the whole sample. shapes: model presets by name. step_tokens: tokens of a training
    step. num_hostile: hostile strings to encode and decode. progress: called with the bytes measured so far and in all;
    the text counts once for each tokenizer."""
    groups = list(sample.groups())
    excerpts = _excerpts(groups)
    total = sample.drawn_bytes * len(tokenizers)
    figures = []
    for index, tokenizer in enumerate(tokenizers):
        tick = partial(lambda begin, done: progress(begin + done, total), index * sample.drawn_bytes)
        figures.append(_figures(tokenizer, groups, excerpts, shapes, step_tokens, num_hostile, tick))
    text = TextFigures(
        bytes=sample.drawn_bytes,
        characters=sum(len(text) for _, texts in groups for text in texts),
        texts=sum(len(texts) for _, texts in groups),
        rows=sample.num_rows,
        left_out={name: dict(counts) for name, counts in sample.left_out.items()},
        found_bytes=sum(stratum.found_bytes for stratum in sample.strata),
        excerpts=excerpts,
    )
    return Evaluation(text, step_tokens, figures)


class _Coder:
    """Encodes and decodes texts and counts: uses of each id, texts that are changed by it, CPU seconds."""

    def __init__(self, tokenizer: Tokenizer, tick: Callable[[int], None] = lambda _: None) -> None:
        self.tokenizer, self.tick = tokenizer, tick
        self.uses = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self.num_texts = self.num_bytes = 0
        self.changed: list[str] = []
        self.encode_s = self.decode_s = 0.0

    def run(self, texts: list[str]) -> np.ndarray:
        """Encode and decode texts. Returns their numbers of bytes, characters and tokens, int64 [3]. Calls `tick`, if
        given, with the bytes of all texts so far."""
        before, num_tokens = self.num_bytes, 0
        for begin in range(0, len(texts), _BATCH):
            batch = texts[begin : begin + _BATCH]
            started = time.process_time()
            flat, ends = self.tokenizer.encode_batch(batch)
            middle = time.process_time()
            ids = [part.tolist() for part in np.split(flat, ends[:-1])]
            decoded = self.tokenizer.native.decode_batch(ids, skip_special_tokens=False)
            self.encode_s += middle - started
            self.decode_s += time.process_time() - middle
            self.uses += np.bincount(flat, minlength=len(self.uses))
            self.changed += [text for text, back in zip(batch, decoded, strict=True) if text != back]
            self.num_bytes += sum(len(text.encode()) for text in batch)
            num_tokens += len(flat)
            self.tick(self.num_bytes)
        self.num_texts += len(texts)
        return np.array([self.num_bytes - before, sum(map(len, texts)), num_tokens])


def _figures(
    tokenizer: Tokenizer,
    groups: Groups,
    excerpts: list[str],
    shapes: Mapping[str, Shape],
    step_tokens: int,
    num_hostile: int,
    tick: Callable[[int], None],
) -> TokenizerFigures:
    """Measure one tokenizer; see `evaluate`. tick: called with the bytes measured so far."""
    coder, hostile = _Coder(tokenizer, tick), _Coder(tokenizer)
    sizes = [coder.run(texts) for _, texts in groups]
    hostile.run(list(hostile_strings(num_hostile, tokens=list(tokenizer.control_tokens))))
    whole = _rates(sum(sizes, np.zeros(3, np.int64)))
    words, runs = (_count(pattern, groups) for pattern in (_WORD, _HAN))
    uses, tokens = coder.uses, token_texts(tokenizer)
    lengths = np.array([len(token or b"") for token in tokens])
    is_ordinary = np.array([token is not None and id not in tokenizer.added for id, token in enumerate(tokens)])
    is_high_byte = np.array([len(token or b"") == 1 and (token or b"\0")[0] >= 0x80 for token in tokens])
    is_unused = is_ordinary & (uses == 0)
    glitch_prone = np.flatnonzero(is_unused & (lengths > 1)).tolist()
    longest = sorted(np.flatnonzero(is_ordinary).tolist(), key=lambda id: (-lengths[id], id))

    def shown(ids: list[int]) -> list[TokenUses]:
        return [TokenUses(id, legible(tokens[id] or b""), len(tokens[id] or b""), int(uses[id])) for id in ids]

    changed = sorted((*coder.changed, *hostile.changed), key=len)
    tokens_per_gigabyte = GIGABYTE * whole.tokens / whole.bytes
    return TokenizerFigures(
        name=str(tokenizer.dir),
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        **asdict(whole),
        by_language=dict(sorted(_rates_by([stratum.language for stratum, _ in groups], sizes).items())),
        by_file=_rates_by([stratum.file for stratum, _ in groups], sizes),
        tokens_per_word=_mean_tokens(tokenizer, words, words.total()),
        tokens_per_chinese_character=_mean_tokens(tokenizer, runs, sum(len(run) * n for run, n in runs.items())),
        byte_fallback_share=float(uses[is_ordinary & is_high_byte].sum()) / max(int(uses.sum()), 1),
        vocab_used=int((uses > 0).sum()),
        vocab_used_share=float((uses[is_ordinary] > 0).mean()),
        never_used=int(is_unused.sum()),
        never_used_bytes=int(is_unused.sum()) - len(glitch_prone),
        glitch_prone=len(glitch_prone),
        glitch_prone_tokens=shown(glitch_prone[-NUM_SHOWN:]),
        rarely_used=int((is_ordinary & (uses > 0) & (uses < 10)).sum()),
        longest_tokens=shown(longest[:NUM_SHOWN]),
        round_trip=RoundTrip(
            texts=coder.num_texts,
            texts_changed=len(coder.changed),
            hostile=hostile.num_texts,
            hostile_changed=len(hostile.changed),
            examples=[text[:200] for text in changed[:3]],
        ),
        encode_mb_per_cpu_s=whole.bytes / 1e6 / max(coder.encode_s, 1e-9),
        decode_mb_per_cpu_s=whole.bytes / 1e6 / max(coder.decode_s, 1e-9),
        embedding={name: _embedding(tokenizer.vocab_size, shape) for name, shape in shapes.items()},
        tokens_per_gigabyte=round(tokens_per_gigabyte),
        steps_per_gigabyte=round(tokens_per_gigabyte / step_tokens),
        splits=[[legible(tokens[id] or b"") for id in tokenizer.encode_batch([text])[0]] for text in excerpts],
    )


def _excerpts(groups: Groups) -> list[str]:
    """Return the beginning of the first text of each language that is not very short, as one line."""
    chosen: dict[str, str] = {}
    for stratum, texts in groups:
        for text in texts:
            line = " ".join(text[: 2 * EXCERPT.stop].split())[: EXCERPT[-1]]
            if stratum.language not in chosen and len(line) >= EXCERPT.start:
                chosen[stratum.language] = line
    return [chosen[language] for language in sorted(chosen)]


def _count(pattern: re.Pattern[str], groups: Groups) -> Counter[str]:
    return Counter(match for _, texts in groups for text in texts for match in pattern.findall(text))


def _rates(size: np.ndarray) -> Rates:
    """Return the rates of a text. size: its numbers of bytes, characters and tokens, int64 [3]."""
    num_bytes, num_characters, num_tokens = size.tolist()
    return Rates(num_bytes, num_tokens, num_bytes / max(num_tokens, 1), num_characters / max(num_tokens, 1))


def _rates_by(names: Sequence[str], sizes: Sequence[np.ndarray]) -> dict[str, Rates]:
    """Return the rates of each language or file in `names`, in order of first occurrence, from its added-up sizes."""
    sums: dict[str, np.ndarray] = {}
    for name, size in zip(names, sizes, strict=True):
        sums[name] = sums.get(name, 0) + size
    return {name: _rates(size) for name, size in sums.items()}


def _mean_tokens(tokenizer: Tokenizer, counted: Counter[str], total: int) -> float | None:
    """Return the mean tokens of strings encoded alone: their sum, weighted by count, over `total`; None if it is 0."""
    if not total:
        return None
    _, ends = tokenizer.encode_batch(list(counted))
    return float((np.diff(ends, prepend=0) * np.fromiter(counted.values(), np.int64, len(counted))).sum() / total)


def _embedding(vocab_size: int, shape: Shape) -> EmbeddingShare:
    params = vocab_size * shape.hidden_size
    model_params = params + shape.num_other_params
    return EmbeddingShare(params, params / model_params, model_params)
