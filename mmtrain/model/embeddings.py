"""Enlarge the embedding matrix of a model for a tokenizer with added tokens; all other weights stay unchanged.

The vector of an added token is the mean of all old vectors, or of those of the old tokens that spell it. An output
projection that is not tied to the embedding grows alike. With the mean, the probabilities of the old tokens change only
by a bounded amount (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import added_ids, token_texts

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # the output projection; absent if it is tied to the embedding


@dataclass(frozen=True, slots=True)
class Growth:
    """A plan for enlarging an embedding matrix. method: "mean" or "subtoken". old_size: ids of the old tokenizer.
    vocab_size: rows of the new matrix. rows: added id -> ids of the old tokens whose vectors are averaged."""

    method: str  # mean or subtoken
    old_size: int
    vocab_size: int
    rows: Mapping[int, Sequence[int]]

    @property
    def added_ids(self) -> str:
        """Return the added ids as up to two ranges, smallest-largest, such as "300-301, 6400-6410", or "none": those
        below `old_size`, reserved in the old tokenizer, and those from it on. Ids in between may not be added."""
        ids = sorted(self.rows)
        spans = [[id for id in ids if id < self.old_size], [id for id in ids if id >= self.old_size]]
        return ", ".join(f"{span[0]}-{span[-1]}" for span in spans if span) or "none"


def plan_growth(method: str, old: Tokenizer, new: Tokenizer, num_rows: int) -> Growth:
    """Plan how to enlarge an embedding trained with tokenizer `old` for tokenizer `new`. method: "mean" averages all
    old tokens for every added token; "subtoken" those that spell it, or all if its text is not valid UTF-8. num_rows:
    of the present matrix, never reduced. Raises TokenizerError if an id of `old` means another token in `new`."""
    added = added_ids(old, new)
    all_ids = [id for id in range(old.vocab_size) if id not in added]
    texts = token_texts(new)
    rows = {id: all_ids if method == "mean" else _subtokens(old, texts[id]) or all_ids for id in added}
    return Growth(method, old.vocab_size, max(num_rows, new.vocab_size), rows)


def _subtokens(old: Tokenizer, content: bytes | None) -> list[int]:
    """Return the ids of the old tokens that spell a new one; empty if `content` is None or not valid UTF-8, such as a
    fragment of a multi-byte character."""
    try:
        text = (content or b"").decode("utf-8")
    except UnicodeDecodeError:
        return []
    return old.encode_batch([text])[0].tolist()


def grow(weights: Mapping[str, Tensor], growth: Growth) -> dict[str, Tensor]:
    """Return the weights with EMBEDDING and HEAD of [growth.vocab_size, C]; the other tensors are the same objects. Old
    rows are copied bit for bit, but rows of added ids are the mean of the rows that `growth.rows` lists. Appended rows
    that no added token uses are the mean of the whole old matrix."""
    return {**weights, **{name: _grown(weights[name], growth) for name in (EMBEDDING, HEAD) if name in weights}}


def _grown(old: Tensor, growth: Growth) -> Tensor:
    new = torch.empty(growth.vocab_size, old.shape[1], dtype=old.dtype)
    new[: len(old)] = old
    new[len(old) :] = old.mean(0)  # appended rows that no token uses
    for id, sources in growth.rows.items():
        new[id] = old[list(sources)].mean(0)
    return new
