"""Grow the embedding of a model for a tokenizer with added tokens; all other weights stay as they are.

The row of a new token (of the tied embedding, so of the output too) is a mean of existing rows: of all of them, or of the
old tokens that spell the new one. The mean bounds how far the probabilities of the other tokens move (Hewitt 2021,
"Initializing New Word Embeddings for Pretrained Language Models"). Both methods are exact and need no seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import added_ids, token_texts

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Growth:
    """How an embedding of `old_size` rows grows to `vocab_size` rows: for each added id the old rows that it averages."""

    method: str  # mean or subtoken
    old_size: int
    vocab_size: int
    rows: Mapping[int, Sequence[int]]

    @property
    def added_ids(self) -> str:
        """The added ids as ranges, such as "300-301"; those in place of unused old ids come first."""
        ids = sorted(self.rows)
        spans = [[id for id in ids if id < self.old_size], [id for id in ids if id >= self.old_size]]
        return ", ".join(f"{span[0]}-{span[-1]}" for span in spans if span) or "none"


def plan_growth(method: str, old: Tokenizer, new: Tokenizer, num_rows: int) -> Growth:
    """The growth of an embedding with `num_rows` rows, trained with tokenizer `old`, for tokenizer `new`.

    TokenizerError when an id of `old` has another meaning in `new`.
    """
    added = added_ids(old, new)
    all_ids = [id for id in range(old.vocab_size) if id not in added]
    texts = token_texts(new)
    rows = {id: all_ids if method == "mean" else _subtokens(old, texts[id]) or all_ids for id in added}
    return Growth(method, old.vocab_size, max(num_rows, new.vocab_size), rows)


def _subtokens(old: Tokenizer, content: bytes | None) -> list[int]:
    """The old tokens that spell a new token; empty if it is not valid UTF-8, such as a part of a character."""
    try:
        text = (content or b"").decode("utf-8")
    except UnicodeDecodeError:
        return []
    return old.encode_batch([text])[0].tolist()


def grow(weights: Mapping[str, Tensor], growth: Growth) -> dict[str, Tensor]:
    """The weights with an embedding [growth.vocab_size, C]; existing rows are copied bit for bit."""
    old = weights[EMBEDDING]
    new = torch.empty(growth.vocab_size, old.shape[1], dtype=old.dtype)
    new[: len(old)] = old
    new[len(old) :] = old.mean(0)  # for rows that no token uses, where a model has more rows than its tokenizer tokens
    for id, sources in growth.rows.items():
        new[id] = old[list(sources)].mean(0)
    return {**weights, EMBEDDING: new}
