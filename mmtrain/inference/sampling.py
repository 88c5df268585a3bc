"""How the next token is chosen from logits: the sampling settings of one answer, and the draw itself.

The settings have the order and meaning of transformers' logits processors: repetition penalty, temperature, top-k,
top-p, min-p. Each token takes one uniform number from the row's own generator, so the same seed gives the same answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.errors import UsageError
from mmdata.options import check, option


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings and stopping conditions of one answer. By default greedy, until the end-of-turn token.

    `logprobs` None reports no log-probabilities; a number reports each token's own and those of that many of the most
    likely tokens, taken from the model's logits before any of the other settings. UsageError for values out of range.
    """

    temperature: float = option(0.0, help="0 takes the most likely token.", least=0)
    top_k: int = option(0, help="Sample from this many of the most likely tokens; 0: all.", least=0)
    top_p: float = option(
        1.0, help="Sample from the fewest most likely tokens whose probabilities reach this sum.", above=0, most=1
    )
    min_p: float = option(
        0.0, help="Sample from tokens at least this probable relative to the most likely one.", least=0, most=1
    )
    repetition_penalty: float = option(1.0, help="Above 1 makes tokens of prompt and answer less likely.", above=0)
    seed: int = option(0, help="The same seed gives the same answer.", least=-(2**63), most=2**63 - 1)
    max_new_tokens: int = option(512, help="Maximum tokens of an answer.", least=1)
    stop: tuple[str, ...] = option((), help="Strings that end the answer and are not part of it.")
    logprobs: int | None = option(None, help="Log-probabilities of this many of the most likely tokens.", least=0)

    def __post_init__(self) -> None:
        check(self)
        if not all(self.stop):
            raise UsageError("a stop string must not be empty", "leave --stop out, or give it a text")


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
