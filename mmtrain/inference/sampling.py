"""Choosing the next token from logits, with the settings in the order of transformers' logits processors: repetition
penalty, OpenAI's penalties and bias, temperature, top-k, top-p, min-p. Drawing a token takes one uniform random number from its row's generator, so
the same seed gives the same answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdata.errors import UsageError, needs
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.settings import Sampling

FEW = 256  # tokens are sorted first, then 16 times as many: top_p and min_p nearly always keep fewer than one of these


def penalize(logits: Tensor, token_ids: Sequence[int], penalty: float) -> Tensor:
    """Return logits [V] with the repetition penalty applied to `token_ids`: a positive logit is divided by `penalty`,
    any other multiplied by it. CTRL, Keskar et al. 2019, section 4.1, as implemented in transformers."""
    if penalty == 1 or not token_ids:
        return logits
    ids = torch.tensor(sorted(set(token_ids)), device=logits.device)
    chosen = logits[ids]
    return logits.index_put((ids,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def biased(logits: Tensor, options: Sampling, answer_ids: Sequence[int]) -> Tensor:
    """Return logits [V] with frequency penalty, presence penalty and `logit_bias` applied. answer_ids: those so far."""
    if answer_ids and (options.frequency_penalty or options.presence_penalty):
        counts = torch.bincount(torch.tensor(answer_ids), minlength=len(logits))
        logits = logits - options.frequency_penalty * counts - options.presence_penalty * (counts > 0)
    if options.logit_bias:
        ids, values = zip(*options.logit_bias, strict=True)
        logits = logits.index_add(0, torch.tensor(ids), torch.tensor(values, dtype=logits.dtype))
    return logits


def candidates(logits: Tensor, options: Sampling) -> tuple[Tensor, Tensor]:
    """Return the probabilities (fp64, descending, summing to 1) and the ids of the tokens, at least one, that may be
    drawn for logits [V] at a temperature above 0. Tokens of equal probability are in the order of their ids."""
    logits = logits.float() / options.temperature
    for count in [options.top_k] if options.top_k else [FEW, 16 * FEW, len(logits)]:
        values, ids = highest(logits, count)
        probs = (values.double() - (values if options.top_k else logits).double().logsumexp(-1)).exp()
        kept = probs.cumsum(-1) - probs < options.top_p  # the more likely tokens together have not reached top_p
        kept &= probs >= options.min_p * probs[0]
        num_kept = max(1, int(kept.sum()))  # the tokens that meet both conditions come first in the order
        if num_kept < len(ids):
            break
    return probs[:num_kept] / probs[:num_kept].sum(), ids[:num_kept]


def highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest of values [V], descending, and their indices, equal ones in the order of their
    indices: the beginning of a stable sort, without sorting the others."""
    if count < len(values):
        least = values.topk(count).values[-1]
        indices = (~(values < least)).nonzero()[:, 0]
    else:
        indices = torch.arange(len(values), device=values.device)
    values, order = values[indices].sort(descending=True, stable=True)
    return values[:count], indices[order[:count]]


def pick(
    logits: Tensor,
    options: Sampling,
    generator: torch.Generator,
    prompt_ids: Sequence[int] = (),
    answer_ids: Sequence[int] = (),
) -> int:
    """Choose the next token id for logits [V] on the CPU: the most likely token at temperature 0, else a random one,
    for which `generator` gives one number. prompt_ids, answer_ids: the tokens so far, for the penalties."""
    logits = penalize(logits, [*prompt_ids, *answer_ids], options.repetition_penalty)
    logits = biased(logits, options, answer_ids)
    if options.temperature == 0:
        return int(logits.argmax())
    probs, ids = candidates(logits, options)
    drawn = torch.rand(1, dtype=torch.float64, generator=generator)
    index = int(torch.searchsorted(probs.cumsum(-1), drawn, right=True))
    return int(ids[min(index, len(ids) - 1)])


def top_logps(logits: Tensor, id: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of token `id` under logits [V], and the `num_top` most likely ids with theirs,
    descending."""
    logps = logits.double().log_softmax(-1)
    values, ids = logps.topk(min(num_top, len(logps)))
    return float(logps[id]), list(zip(ids.tolist(), values.tolist(), strict=True))


# --- answers in JSON


class JsonGrammar:
    """Makes the guides of answers that must be JSON of a schema, by the package llguidance. ending_ids: tokens that end
    an answer. Raises UsageError if llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, ending_ids: Sequence[int]):
        with needs("answers in JSON need llguidance", "serve"):
            import llguidance
        self._matcher = llguidance.LLMatcher
        definition, size = tokenizer.native.to_str(), tokenizer.vocab_size
        self._tokenizer = llguidance.LLTokenizer(definition, n_vocab=size, eos_token=list(ending_ids))

    def guide(self, json_schema: str) -> "Guide":
        """Return the guide of one answer. Raise UsageError for a schema that cannot be followed."""
        try:
            # Without optional white space: a small model would fill its answer with it.
            grammar = self._matcher.grammar_from_json_schema(json_schema, {"whitespace_flexible": False})
            problem = self._matcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise UsageError(f"the schema cannot be followed: {problem}", "a schema of simpler types")
        return Guide(self._matcher(self._tokenizer, grammar))


class Guide:
    """Restricts each token of one answer to those that can be continued to JSON of a schema."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def limit(self, logits: Tensor) -> Tensor:
        """Return logits [V] with -inf for all tokens that may not come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, count=len(logits), bitorder="little"))
        return logits.masked_fill(allowed == 0, -torch.inf)

    def accept(self, id: int) -> bool:
        """Add the token that was chosen; return whether the answer is complete."""
        self._matcher.consume_token(id)
        return self._matcher.is_stopped()
