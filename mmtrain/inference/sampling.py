"""Chooses the next token from logits.

The settings are applied in the order of transformers' logits processors: repetition penalty, temperature, top-k, top-p,
min-p. Each token takes one uniform number from the row's own generator, so the same seed gives the same answer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtrain.inference.settings import Sampling


def penalize(logits: Tensor, token_ids: Sequence[int], penalty: float) -> Tensor:
    """Apply the repetition penalty to logits [V]: those of `token_ids` are divided by it where positive, else multiplied
    (CTRL, Keskar et al. 2019, section 4.1, as implemented in transformers)."""
    if penalty == 1 or not token_ids:
        return logits
    ids = torch.tensor(sorted(set(token_ids)), device=logits.device)
    chosen = logits[ids]
    return logits.index_put((ids,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def candidates(logits: Tensor, options: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (fp64, descending, summing to 1) and ids of the tokens that may be drawn for logits [V].

    At least one token is kept. Tokens of equal probability are in the order of their ids.
    """
    values, ids = (logits.float() / options.temperature).sort(descending=True, stable=True)
    if options.top_k:
        values, ids = values[: options.top_k], ids[: options.top_k]
    probs = values.double().softmax(-1)
    kept = probs.cumsum(-1) - probs < options.top_p  # the sum before this token has not reached p
    kept &= probs >= options.min_p * probs[0]
    num_kept = max(1, int(kept.sum()))  # both conditions hold for a prefix of the descending order
    return probs[:num_kept] / probs[:num_kept].sum(), ids[:num_kept]


def pick(logits: Tensor, options: Sampling, generator: torch.Generator, token_ids: Sequence[int] = ()) -> int:
    """The next token id for logits [V] on the CPU: the most likely one at temperature 0, else a random draw.

    `token_ids`: prompt and answer so far, for the repetition penalty.
    """
    logits = penalize(logits, token_ids, options.repetition_penalty)
    if options.temperature == 0:
        return int(logits.argmax())
    probs, ids = candidates(logits, options)
    drawn = torch.rand(1, dtype=torch.float64, generator=generator)
    index = int(torch.searchsorted(probs.cumsum(-1), drawn, right=True))
    return int(ids[min(index, len(ids) - 1)])


def top_logps(logits: Tensor, id: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of token `id` under logits [V], and the `num_top` most likely ids with theirs, descending."""
    logps = logits.double().log_softmax(-1)
    values, ids = logps.topk(min(num_top, len(logps)))
    return float(logps[id]), list(zip(ids.tolist(), values.tolist(), strict=True))
