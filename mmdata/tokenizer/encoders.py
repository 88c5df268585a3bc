"""The choice between the `tokenizers` library and a faster encoder that gives the same ids.

`tokenizers` is the reference. The faster encoder, fastokens, is used only after it gave the reference's ids on a fixed
set of difficult ("hostile") strings; packing also compares a sample of the rows of every part. So the ids of a dataset
do not depend on which encoder is installed, only the time does. Other encoders: tests/bench/RESULTS.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np

from mmdata.errors import TokenizerError, UsageError
from mmdata.tokenizer.hostile import hostile_strings
from mmdata.tokenizer.tokenizer import Tokenizer

Encode = Callable[[Sequence[str], bool], tuple[np.ndarray, np.ndarray]]

REFERENCE = "tokenizers"
NAMES = ("auto", REFERENCE, "fastokens")  # the choices of --encoder
NUM_HOSTILE = 1000
RENEWED = 2**26  # characters after which fastokens is loaded anew, which takes about 1 % of the time of encoding them
RENEWED_PER_ID = 6000  # the same for each token of a large vocabulary, which takes longer to load
_DISPUTED = "\u180e"  # white space in the regular expressions of one library and not in those of the other


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder of one tokenizer. `encode(texts, control)` returns what `Tokenizer.encode_batch` does. `warning`: why
    the reference replaces a faster encoder; empty for no warning."""

    name: str
    version: str
    encode: Encode
    warning: str = ""

    @property
    def is_reference(self) -> bool:
        """Whether this is the `tokenizers` library."""
        return self.name == REFERENCE


@dataclass(frozen=True, slots=True)
class EncoderCheck:
    """Result of comparing an encoder with the reference on `num_texts` texts. `version`: None if it is not installed.
    `difference`: a text with other ids, quoted, or why the encoder cannot be used; None if no difference was found."""

    name: str
    version: str | None
    num_texts: int
    difference: str | None

    @property
    def is_exact(self) -> bool:
        """Whether the encoder is installed and gave the reference's ids for all texts."""
        return self.version is not None and self.difference is None


def choose(tokenizer: Tokenizer, name: str = "auto") -> Encoder:
    """Return the encoder called `name`, one of NAMES. "auto" is fastokens if installed and exact, else the reference,
    with a warning if fastokens is not exact. Raises UsageError for an unknown or missing encoder, TokenizerError for
    other ids."""
    if name not in NAMES:
        raise UsageError(f"--encoder {name}: no such choice", f"choose one of {', '.join(NAMES)}")
    version = metadata.version("tokenizers")
    reference = Encoder(REFERENCE, version, lambda texts, control: tokenizer.encode_batch(texts, control=control))
    if name == REFERENCE:
        return reference
    result = _checked(tokenizer)
    if result.version is None:
        if name == "auto":
            return reference
        raise UsageError(f"--encoder {name}: {name} is not installed", "pip install 'mm-toolkit[fast]'")
    if result.difference is None:
        return Encoder(result.name, result.version, _fastokens(tokenizer))
    problem = f"{result.name} {result.version} gives other ids than tokenizers: {result.difference}"
    if name != "auto":
        raise TokenizerError(problem, "take --encoder auto, which falls back to tokenizers")
    warning = f"{problem}; packing with tokenizers, which is slower"
    return Encoder(REFERENCE, version, reference.encode, warning)


_checks: dict[str, EncoderCheck] = {}  # (hash of tokenizer.json, control tokens) as one string -> result of the check


def _checked(tokenizer: Tokenizer) -> EncoderCheck:
    """Return the result of `check` on hostile strings; a tokenizer is checked once per process."""
    key = f"{tokenizer.sha256} {sorted(tokenizer.control_tokens)}"
    if key not in _checks:
        _checks[key] = check(tokenizer)
    return _checks[key]


def check(tokenizer: Tokenizer, texts: Sequence[str] = ()) -> EncoderCheck:
    """Compare fastokens with the reference on hostile strings and on `texts`, with control=True and control=False.
    Problems of fastokens are described in the result and not raised."""
    try:
        version = metadata.version("fastokens")
    except metadata.PackageNotFoundError:
        return EncoderCheck("fastokens", None, 0, None)
    compared = [*hostile_texts(tokenizer.added_texts), *texts]
    try:
        difference = find_difference(tokenizer, _fastokens(tokenizer), compared)
    except ImportError as error:  # such as a wheel built for another CPU
        difference = f"it cannot be loaded here ({error})"
    except Exception as error:  # the native library refuses the tokenizer or a text; it raises bare Exception
        difference = f"it refuses this tokenizer ({str(error)[:200]})"
    return EncoderCheck("fastokens", version, len(compared), difference)


def hostile_texts(added: Sequence[str]) -> list[str]:
    """Return the fixed texts that encoders are compared on, the same everywhere. added: a tokenizer's added tokens."""
    pieces = (" ", "\n", "a", "ab", "9", "的", "-", *(added or ("<s>",))[:2])
    runs = [piece * count for piece in pieces for count in (200, 2000)]
    return ["", *runs, *hostile_strings(NUM_HOSTILE, seed=20, tokens=added)]


def find_difference(tokenizer: Tokenizer, encode: Encode, texts: Sequence[str]) -> str | None:
    """Return the shortest text to which `encode` gives other ids than the reference, quoted; None if there is none.
    Texts that differ only when encoded as one batch are described in words."""
    for control in (False, True):
        expected, expected_ends = tokenizer.encode_batch(texts, control=control)
        ids, ends = encode(texts, control)
        if np.array_equal(ids, expected) and np.array_equal(ends, expected_ends):
            continue
        alone = [
            text
            for text in texts
            if not np.array_equal(encode([text], control)[0], tokenizer.encode_batch([text], control=control)[0])
        ]
        return f"on {min(alone, key=len)[:60]!a}" if alone else "on some texts in a batch, on none alone"
    return None


@lru_cache(maxsize=1)
def _native(native: Any) -> Any:
    """Return fastokens' tokenizer, like this one of tokenizers. Cached: loading takes 0.05 s, and 3 s with a vocabulary
    of 150,000 tokens, and the check and the work after it both need it."""
    import fastokens

    return fastokens.Tokenizer.from_json_str(native.to_str())


def _fastokens(tokenizer: Tokenizer) -> Encode:
    """Return the `Encode` function of fastokens. Texts with the character _DISPUTED, which it splits differently, are
    encoded by the reference; all others in the batch are not, so that `check` compares them.

    fastokens remembers every word that it has seen, in about 95 bytes each, and does not say how many: so it is loaded
    anew after every RENEWED characters, and memory stays bounded.
    """
    native: Any = _native(tokenizer.native)
    left = most = max(RENEWED, RENEWED_PER_ID * tokenizer.vocab_size)

    def fast(texts: Sequence[str], control: bool) -> tuple[np.ndarray, np.ndarray]:
        nonlocal native, left
        if left < 0:
            native = None
            _native.cache_clear()
            native, left = _native(tokenizer.native), most
        left -= sum(map(len, texts))
        with tokenizer.refusing_panics():
            ids, offsets = native.encode_batch_flat(list(texts), split_special_tokens=not control)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)[1:].astype(np.int64)

    def encode(texts: Sequence[str], control: bool) -> tuple[np.ndarray, np.ndarray]:
        disputed = [i for i, text in enumerate(texts) if _DISPUTED in text]
        if not disputed:
            return fast(texts, control)
        others = sorted(set(range(len(texts))).difference(disputed))
        pieces: dict[int, np.ndarray] = {}
        for own, (ids, ends) in (
            (others, fast([texts[i] for i in others], control)),
            (disputed, tokenizer.encode_batch([texts[i] for i in disputed], control=control)),
        ):
            pieces |= zip(own, np.split(ids, ends[:-1]), strict=False)
        in_order = [pieces[i] for i in range(len(texts))]
        return np.concatenate(in_order), np.cumsum([len(ids) for ids in in_order])

    return encode
