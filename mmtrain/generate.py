"""Answers from a model: one streamed with its conversation remembered, or many at once, greedily. All through a KV cache.

An answer ends at the tokenizer's end-of-turn token, which is never shown, or after `max_new_tokens`.
"""

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdata.errors import UsageError
from mmdata.template import Message, Template
from mmdata.tokenizer import Tokenizer
from mmtrain.model import KVCache, Model

BATCH_ROWS = 64  # answered at once: a small model's matrices are then large enough to keep a core busy
MAX_NEW_TOKENS = 512


def pick(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """A token id for fp32 logits [V]: the likeliest at temperature 0, else drawn.

    `top_k` keeps the k likeliest (0: all), `top_p` the fewest whose probabilities reach p, always at least one.
    """
    if temperature == 0:
        return int(logits.argmax())
    values, ids = (logits.float() / temperature).sort(descending=True)
    if top_k:
        values, ids = values[:top_k], ids[:top_k]
    probs = values.softmax(-1)
    probs = probs * (probs.cumsum(-1) - probs < top_p)  # what comes before a token has not yet reached p
    return int(ids[torch.multinomial(probs, 1, generator=generator)])


class Chat:
    """One conversation with a model. Keeps the messages, and the keys and values of their tokens between turns.

    `window` is how many tokens a conversation and its next answer may have; the oldest whole turns leave it first.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, template: Template, *, window: int = 2048):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.window = min(window, model.config.max_positions)
        self.messages: list[Message] = []
        self.device = model.head_weight.device
        self.cache = KVCache(model.config, self.window, torch.zeros(1, dtype=torch.int64, device=self.device))
        self.cached_ids: list[int] = []

    def ask(self, text: str, **options: Any) -> Generator[str, None, None]:
        """Stream the answer to `text`, said after everything before; options as in `reply`."""
        asked = [*self.messages, Message("user", text)]
        pieces: list[str] = []
        self.fit(asked, options.get("max_new_tokens", MAX_NEW_TOKENS))  # what cannot be asked leaves no trace
        try:
            for piece in self.reply(asked, **options):
                pieces.append(piece)
                yield piece
        finally:  # an answer cut short by the reader counts as far as it was read
            self.messages += [asked[-1], Message("assistant", "".join(pieces))]

    def reply(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Generator[str, None, None]:
        """Stream the answer to `messages` as text in whole characters; the same seed gives the same answer."""
        prompt = self.fit(messages, max_new_tokens)
        generator = torch.Generator().manual_seed(seed)
        answer: list[int] = []
        num_shown = 0
        text = ""
        while len(answer) < max_new_tokens:
            logits = self.logits(prompt + answer)
            token = pick(logits.cpu(), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if token == self.tokenizer.eos_id:
                break
            answer.append(token)
            text = self.tokenizer.decode(answer)
            whole = len(text.rstrip("\ufffd"))  # what a later token may still complete is held back
            if whole > num_shown:
                yield text[num_shown:whole]
                num_shown = whole
        if len(text) > num_shown:
            yield text[num_shown:]

    def fit(self, messages: Sequence[Message], max_new_tokens: int) -> list[int]:
        """Prompt ids of the longest end of the conversation, in whole turns, that leaves room for the answer."""
        kept = list(messages)
        while True:
            ids = self.template.prompt_ids(self.tokenizer, kept)
            if len(ids) + max_new_tokens <= self.window:
                return ids
            starts = [i for i, message in enumerate(kept) if message.role == "user"]
            if len(starts) < 2:
                raise UsageError(
                    f"the question has {len(ids):,} tokens; with {max_new_tokens:,} for the answer the window holds {self.window:,}",
                    "ask a shorter question, or allow fewer new tokens",
                )
            del kept[starts[0] : starts[1]]

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits [V] of the token after `ids`; only tokens the cache does not hold are computed."""
        same = 0
        for old, new in zip(self.cached_ids, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        self.cache.length = same
        new_ids = torch.tensor([list(ids[same:])], device=self.device)
        hidden = self.model.decode(new_ids, self.cache)
        self.cached_ids = list(ids)
        return (hidden[0, -1] @ self.model.head_weight.T).float().detach()


def answer_batch(
    model: Model,
    tokenizer: Tokenizer,
    template: Template,
    questions: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """The greedy answer to each question (a text, or messages that end with the user's), in the order asked."""
    prompts = [
        template.prompt_ids(tokenizer, [Message("user", question)] if isinstance(question, str) else question)
        for question in questions
    ]
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for begin in range(0, len(by_length), BATCH_ROWS):
        chosen = by_length[begin : begin + BATCH_ROWS]
        found = greedy(model, [prompts[i] for i in chosen], eos_id=tokenizer.eos_id, max_new_tokens=max_new_tokens)
        for i, answer in zip(chosen, found, strict=True):
            answers[i] = answer
    return [tokenizer.decode(answer) for answer in answers]


@torch.no_grad()
def greedy(
    model: Model, prompts: Sequence[Sequence[int]], *, eos_id: int | None, max_new_tokens: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without the end token; prompts are padded on the left to one length."""
    device = model.head_weight.device
    longest = max(len(prompt) for prompt in prompts)
    num_pad = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    cache = KVCache(model.config, longest + max_new_tokens, num_pad)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        newest = (model.decode(ids, cache)[:, -1] @ model.head_weight.T).argmax(-1)
        going = newest != eos_id
        if not going.all():
            cache.keep(going.nonzero()[:, 0])
            rows = [row for row, goes_on in zip(rows, going.tolist(), strict=True) if goes_on]
            newest = newest[going]
        if not rows:
            break
        for row, token in zip(rows, newest.tolist(), strict=True):
            answers[row].append(token)
        ids = newest[:, None]
    return answers
