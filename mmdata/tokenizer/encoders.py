"""Who turns text into ids: the `tokenizers` library, or a faster encoder that gave the same ids wherever it was held to it.

`tokenizers` is the judge. A faster encoder is taken only after it gave the judge's ids on a fixed set of hostile strings
(HOSTILE: random Unicode, whitespace, long runs, special tokens and pieces of them); packing then compares a sample of
every part as well. The ids of a dataset therefore never depend on which encoder is installed, only the time does.
fastokens was the fastest of those that agreed everywhere; tests/bench/RESULTS.md has the figures.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from typing import Any

import numpy as np

from mmdata.errors import TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import Tokenizer

Encode = Callable[[Sequence[str], bool], tuple[np.ndarray, np.ndarray]]

JUDGE = "tokenizers"
NAMES = ("auto", JUDGE, "fastokens")  # the choices of --encoder
NUM_HOSTILE = 1000


@dataclass(frozen=True, slots=True)
class Encoder:
    """`encode(texts, control)`: flat uint32 ids and int64 ends, as `Tokenizer.encode_batch`; texts in one native call.

    `warning` says why a faster one was not taken.
    """

    name: str
    version: str
    encode: Encode
    warning: str = ""

    @property
    def is_judge(self) -> bool:
        return self.name == JUDGE


@dataclass(frozen=True, slots=True)
class Check:
    """An encoder held to the judge. `version` None: not installed; `difference`: the first text with other ids, quoted."""

    name: str
    version: str | None
    num_texts: int
    difference: str | None

    @property
    def is_exact(self) -> bool:
        return self.version is not None and self.difference is None


def choose(tokenizer: Tokenizer, name: str = "auto") -> Encoder:
    """The encoder to use: with auto the fastest that is installed and exact; else the named one.

    UsageError: no such encoder, or not installed. TokenizerError: the one asked for gives other ids than `tokenizers`.
    """
    if name not in NAMES:
        raise UsageError(f"--encoder {name}: no such choice", f"choose one of {', '.join(NAMES)}")
    judge = Encoder(JUDGE, metadata.version("tokenizers"), lambda texts, c: tokenizer.encode_batch(texts, control=c))
    if name == JUDGE:
        return judge
    found = _checked(tokenizer)
    if found.is_exact:
        return Encoder(found.name, found.version or "", _fastokens(tokenizer))
    if found.version is None:
        if name == "auto":
            return judge
        raise UsageError(f"--encoder {name}: {name} is not installed", "pip install 'mm-toolkit[fast]'")
    problem = f"{found.name} {found.version} gives other ids than tokenizers: {found.difference}"
    if name != "auto":
        raise TokenizerError(problem, "take --encoder auto, which falls back to tokenizers")
    return Encoder(judge.name, judge.version, judge.encode, f"{problem}; packing with tokenizers, which is slower")


_found: dict[str, Check] = {}  # by tokenizer.json's and the control tokens' hash: a process checks a tokenizer once


def _checked(tokenizer: Tokenizer) -> Check:
    key = f"{tokenizer.sha256} {sorted(tokenizer.control_tokens)}"
    if key not in _found:
        _found[key] = check(tokenizer)
    return _found[key]


def check(tokenizer: Tokenizer, texts: Sequence[str] = ()) -> Check:
    """Hold the fast encoder to the judge on the hostile strings and `texts`, with control tokens and with them as text."""
    try:
        version = metadata.version("fastokens")
    except metadata.PackageNotFoundError:
        return Check("fastokens", None, 0, None)
    found = [*hostile(tuple(tokenizer.added_texts)), *texts]
    try:
        encode = _fastokens(tokenizer)
        difference = first_difference(tokenizer, encode, found)
    except ImportError as error:  # built for another machine
        difference = f"it cannot be loaded here ({error})"
    except Exception as error:  # a native library's refusal: of the tokenizer, or of a text
        difference = f"it refuses this tokenizer ({str(error)[:200]})"
    return Check("fastokens", version, len(found), difference)


def first_difference(tokenizer: Tokenizer, encode: Encode, texts: Sequence[str]) -> str | None:
    """The first text to which `encode` gives other ids than the judge, quoted; None when all agree."""
    for control in (False, True):
        want, want_ends = tokenizer.encode_batch(texts, control=control)
        ids, ends = encode(texts, control)
        if np.array_equal(ids, want) and np.array_equal(ends, want_ends):
            continue
        for text in texts:  # rare: say which
            (ids, _), (want, _) = encode([text], control), tokenizer.encode_batch([text], control=control)
            if not np.array_equal(ids, want):
                return f"on {text[:60]!a}"
        return "on some texts in a batch, on none alone"
    return None


@lru_cache(maxsize=1)
def _native(tokenizer_json: str) -> Any:
    """Made once for the check and the work after it: a twentieth of a second."""
    import fastokens

    return fastokens.Tokenizer.from_json_str(tokenizer_json)


def _fastokens(tokenizer: Tokenizer) -> Encode:
    native = _native(tokenizer.native.to_str())

    def encode(texts: Sequence[str], control: bool) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = native.encode_batch_flat(list(texts), split_special_tokens=not control)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)[1:].astype(np.int64)

    return encode


# ---- hostile strings

_RANGES = (
    (0, 0x80), (0x80, 0x250), (0x300, 0x370), (0x370, 0x600), (0x600, 0x780), (0x900, 0xE80), (0x1100, 0x1200),
    (0x1E00, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3130), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0xE000, 0xE010),
    (0xF900, 0xFB00), (0xFE00, 0xFFFE), (0x10000, 0x10400), (0x1F300, 0x1FAFF), (0x20000, 0x20100), (0xE0000, 0xE0080),
)  # fmt: skip
_SPACES = (
    " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000\u200b\u200d\ufeff"
)
_PIECES = (
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "\u2019s", "don't", "12,345.67", "\u0664\u0662", "\u00bd", "x\u00b2",
    "e\u0301", "\u0301\u0301", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e8\U0001f1f3", "\u2764\ufe0f",
    "\u4f60\u597d", "\uff0c\u3002", "\u0e01\u0e33", "\u0915\u094d\u0937", "\u0644\u0627", "if (x <= 3) {\n\treturn;\n}\n",
    "<|", "|>", "</", "<think>", "</think>", "<tool_call>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "{{", "\\n",
    "the ", " of", "  ", "\n\n", "\r\n", "\x00", "\x7f", "\xad",
)  # fmt: skip


@cache
def hostile(added: tuple[str, ...]) -> tuple[str, ...]:
    """The fixed set: the same strings for the same added tokens, on any machine."""
    draw = random.Random(20)
    tokens = added or ("<s>",)

    def of_range() -> str:
        low, high = draw.choice(_RANGES)
        return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randint(1, 12)))

    def of_token() -> str:
        token = draw.choice(tokens)
        begin = draw.randrange(len(token) + 1)
        return draw.choice((token, token[:begin], token[begin:], token[:begin] + token, token.upper()))

    makers: tuple[Callable[[], str], ...] = (
        of_range,
        of_token,
        lambda: "".join(draw.choice(_SPACES) for _ in range(draw.randint(1, 9))),
        lambda: draw.choice(_PIECES),
        lambda: draw.choice((" ", "a", "0", "\n", "=", "\u7684", "\U0001f600")) * draw.randint(1, 40),
    )
    strings = ["".join(draw.choice(makers)() for _ in range(draw.randint(1, 8))) for _ in range(NUM_HOSTILE)]
    runs = [piece * count for piece in (" ", "\n", "a", "ab", "9", "\u7684", "-", *tokens[:2]) for count in (200, 2000)]
    return ("", *runs, *strings)
