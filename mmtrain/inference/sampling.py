"""Logits in, a token out: the settings of one answer, and how its next token is drawn.

Order and meaning of the settings are those of transformers' logits processors: repetition penalty, temperature, top-k,
top-p, min-p. One uniform number a token, from the row's own generator: the same seed draws the same answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer is drawn and when it ends. The defaults take the likeliest token until the turn ends.

    `top_k` keeps the k likeliest tokens (0: all), `top_p` the fewest whose probabilities reach p, `min_p` those at least
    min_p times as probable as the likeliest. `repetition_penalty` above 1 makes tokens of the prompt and the answer
    less likely. `stop`: strings that end the answer and are not part of it. `logprobs`: None for none, else the
    number of likeliest alternatives to tell beside each token's own; they are those of the model, before the settings.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """UsageError for settings nothing can be drawn with."""
        for is_right, what in (
            (0 <= self.temperature < float("inf"), f"temperature {self.temperature} must be 0 or more"),
            (self.top_k >= 0, f"top-k {self.top_k} must be 0 or more"),
            (0 < self.top_p <= 1, f"top-p {self.top_p} must be more than 0 and at most 1"),
            (0 <= self.min_p <= 1, f"min-p {self.min_p} must be 0 to 1"),
            (
                0 < self.repetition_penalty < float("inf"),
                f"repetition-penalty {self.repetition_penalty} must be more than 0",
            ),
            (-(2**63) <= self.seed < 2**63, f"seed {self.seed} must fit in 64 bits"),
            (self.max_new_tokens >= 1, f"max-new-tokens {self.max_new_tokens} must be at least 1"),
            (all(self.stop), "a stop string must not be empty"),
            (self.logprobs is None or self.logprobs >= 0, f"logprobs {self.logprobs} must be 0 or more"),
        ):
            if not is_right:
                raise UsageError(what, "give another value, or leave it out for the default")


def penalize(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Logits [V] with those of seen ids made less likely: divided by the penalty where positive, else multiplied by it
    (CTRL, Keskar et al. 2019, section 4.1, as transformers applies it)."""
    if penalty == 1 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    chosen = logits[ids]
    return logits.index_put((ids,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def candidates(logits: Tensor, options: Sampling) -> tuple[Tensor, Tensor]:
    """What may be drawn for logits [V]: probabilities (fp64, descending, summing to 1) and the ids they belong to.

    At least one token stays. Equally likely tokens stand in the order of their ids.
    """
    scaled = logits.float() / options.temperature
    values, ids = scaled.sort(descending=True, stable=True)
    if options.top_k:
        values, ids = values[: options.top_k], ids[: options.top_k]
    probs = values.double().softmax(-1)
    keeps = probs.cumsum(-1) - probs < options.top_p  # what comes before a token has not yet reached p
    keeps &= probs >= options.min_p * probs[0]
    num_kept = max(1, int(keeps.sum()))  # both hold for a beginning of the descending order
    return probs[:num_kept] / probs[:num_kept].sum(), ids[:num_kept]


def pick(logits: Tensor, options: Sampling, generator: torch.Generator, seen: Sequence[int] = ()) -> int:
    """The next token id for logits [V] on the CPU: the likeliest at temperature 0, else drawn. `seen`: ids so far."""
    logits = penalize(logits, seen, options.repetition_penalty)
    if options.temperature == 0:
        return int(logits.argmax())
    probs, ids = candidates(logits, options)
    drawn = torch.rand(1, dtype=torch.float64, generator=generator)
    index = int(torch.searchsorted(probs.cumsum(-1), drawn, right=True))
    return int(ids[min(index, len(ids) - 1)])


def top_logps(logits: Tensor, id: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a token under logits [V], and the `num_top` likeliest ids with theirs, descending."""
    logps = logits.double().log_softmax(-1)
    values, ids = logps.topk(min(num_top, len(logps)))
    return float(logps[id]), list(zip(ids.tolist(), values.tolist(), strict=True))
