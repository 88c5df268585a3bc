"""The options of `mm tokenizer train`. Imports nothing heavy, so `mm --help` is fast."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mmdata.io.options import ReadOptions
from mmdata.options import INT64, option

ALGORITHMS = ("bpe", "unigram")
TEMPLATES = ("chatml", "minimind2", "minimind3")
PATTERNS = ("digits", "gpt2")
TOKENIZER, TEXTS = "Tokenizer", "Choice of texts"


@dataclass(frozen=True, slots=True)
class TokenizerOptions(ReadOptions):
    """How to train a tokenizer. `special`: control tokens after the template's own. `weights`: as in `sample.draw`."""

    vocab_size: int = option(6400, "Number of tokens, control and reserved ones included.", TOKENIZER, least=1)
    algorithm: str = option(
        "bpe", "Training algorithm; both give byte-level tokenizers.", TOKENIZER, choices=ALGORITHMS
    )
    template: str = option(
        "minimind3", "Chat template of the tokenizer; its control tokens are added.", TOKENIZER, choices=TEMPLATES
    )
    special: tuple[str, ...] = option((), "Add a further control token; may be repeated.", TOKENIZER, metavar="TOKEN")
    pattern: str = option(
        "digits",
        "How text is split before training; digits: each digit and newline alone; gpt2: as in MiniMind.",
        TOKENIZER,
        choices=PATTERNS,
    )
    limit_bytes: int = option(
        100_000_000,
        "Largest amount of text in bytes, drawn evenly over files and languages; takes 12 times as much memory.",
        TEXTS,
        least=1,
    )
    weights: Mapping[str, float] = field(default_factory=dict)
    seed: int = option(0, "Seed of the random choice of texts, where not all are taken.", TEXTS, **INT64)
