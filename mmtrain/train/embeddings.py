"""Weights and a tokenizer with more tokens in; the same weights with a longer embedding out. Every other number stays.

A new token's row (of the tied embedding, so of the output too) is the mean of rows the model has: of all of them, or of
those of the tokens that its text was before (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models",
for the mean: it bounds how far the other tokens' probabilities move). Both are exact and need no seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.errors import TokenizerError, UsageError
from mmdata.shards.dataset import Dataset
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import added_ids, token_texts
from mmtrain.checkpoint import Checkpoint

METHODS = ("mean", "subtoken")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class Growth:
    """How an embedding grows: to `vocab_size` rows, and from which old rows each added id's is made."""

    method: str
    old_size: int
    vocab_size: int
    rows: Mapping[int, Sequence[int]]

    @property
    def facts(self) -> dict[str, str]:
        """For run.json."""
        ids = sorted(self.rows)
        spans = [[id for id in ids if at(id)] for at in (lambda id: id < self.old_size, lambda id: id >= self.old_size)]
        added = ", ".join(f"{span[0]}-{span[-1]}" for span in spans if span) or "none"
        return {"resize_embeddings": self.method, "added_ids": added}


def plan_growth(method: str, init: Checkpoint, datasets: Sequence[Dataset]) -> Growth:
    """What a run's embedding needs for datasets packed with an extended tokenizer.

    UsageError for an unknown method; TokenizerError when an id of the run's tokenizer means something else in a dataset's.
    """
    if method not in METHODS:
        raise UsageError(f"--resize-embeddings {method} is unknown", f"use one of {', '.join(METHODS)}")
    old = Tokenizer.load(init.run_dir / "tokenizer")
    new = Tokenizer.load(datasets[0].dir / "tokenizer")
    for dataset in datasets[1:]:
        if dataset.tokenizer_sha256 != new.sha256:
            raise TokenizerError(
                f"{dataset.dir} was packed with another tokenizer than {datasets[0].dir}", "pack both with the same one"
            )
    added = added_ids(old, new)
    every = [id for id in range(old.vocab_size) if id not in added]
    texts = token_texts(new)
    rows = {id: every if method == "mean" else _pieces(old, texts[id]) or every for id in added}
    return Growth(method, old.vocab_size, max(init.model_config.vocab_size, new.vocab_size), rows)


def _pieces(old: Tokenizer, text: bytes | None) -> list[int]:
    """The old tokens that a new token's text was; none where it is no text of its own (part of a character)."""
    try:
        said = (text or b"").decode("utf-8")
    except UnicodeDecodeError:
        return []
    return old.encode_batch([said])[0].tolist()


def grow(weights: Mapping[str, Tensor], growth: Growth) -> dict[str, Tensor]:
    """The weights with the embedding [old V, C] grown to [growth.vocab_size, C]; the old rows are copied, bit for bit."""
    old = weights[EMBEDDING]
    new = torch.empty(growth.vocab_size, old.shape[1], dtype=old.dtype)
    new[: len(old)] = old
    # Rows past the old ones that no token uses (none, unless a model is larger than its tokenizer) get the mean as well.
    new[len(old) :] = old.mean(0)
    for id, sources in growth.rows.items():
        new[id] = old[list(sources)].mean(0)
    return {**weights, EMBEDDING: new}
