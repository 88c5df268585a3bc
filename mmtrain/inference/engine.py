"""Batched generation with streaming: rows (one answer each) join and leave a shared batch between steps.

    engine = Engine(model, tokenizer, max_rows=16)     # not thread-safe: call it from one thread
    row = engine.submit(prompt_ids, Sampling(...))     # queued; UsageError when it cannot fit the window
    for delta in engine.step():                        # one forward pass: a new token for each running row, and up to
        delta.row, delta.text, delta.tokens            #   PREFILL_TOKENS prompt tokens of the rows that join
        delta.finish_reason                            # "stop" or "length" with a row's last delta, else None
    engine.cancel(row)                                 # removed before the next step; no effect on a finished row
    engine.is_idle                                     # nothing is running or queued; `step` would do nothing
    row.num_prompt, len(row.ids), row.text             # token counts and the text so far

`delta.text` holds whole characters, without what may still become a stop string, so a delta may have tokens and no text
or, at the end, text and no tokens. Prompt ids come from `Template.prompt_ids` or `chat.fit`. For several answers to one
prompt, submit it several times with different seeds.

An answer depends only on its prompt, settings and seed, not on other rows (see `decoder` for how exactly). With
`remember=n` the engine keeps the KV caches of the last n finished rows; a prompt that begins like one of them reuses that
part, and its logits may then differ in the last bits. Memory: `max_rows + remember` caches of at most a window each.

An answer ends at the tokenizer's end-of-turn token (which is not part of it), at a stop string, or after
`max_new_tokens`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.errors import UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.decoder import Decoder, KVCache
from mmtrain.inference.replies import tail_of_prefix
from mmtrain.inference.sampling import pick, top_logps
from mmtrain.inference.settings import Sampling
from mmtrain.model.model import Model

BATCH_ROWS = 64  # default of max_rows: large enough to keep a core busy with a small model's matrices
PREFILL_TOKENS = 512  # prompt tokens of one step; bounds how long a joining row delays the others


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token; where requested with its log-probability and the most likely ids with theirs."""

    id: int
    logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Row:
    """One answer being generated. `ids` and `text` hold it so far; `finish_reason` is None until it has ended."""

    def __init__(self, prompt_ids: Sequence[int], options: Sampling, tokenizer: Tokenizer, cache: KVCache):
        self.options = options
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.num_prompt = len(prompt_ids)
        self.num_reused = 0  # prompt tokens taken from a remembered cache
        self._prompt = list(prompt_ids)
        self._cache = cache
        self._generator = torch.Generator().manual_seed(options.seed)
        self._stream = TextStream(tokenizer, options.stop)

    @property
    def _new_ids(self) -> list[int]:
        """Input of the next forward pass: the newest token, or the next prompt tokens, cut at multiples of PREFILL_TOKENS."""
        done = self._cache.length
        if done >= self.num_prompt:
            return self.ids[-1:]
        return self._prompt[done : (done // PREFILL_TOKENS + 1) * PREFILL_TOKENS]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a row."""

    row: Row
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


class Engine:
    """Generates many answers with shared forward passes; see the module docstring for its use."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_rows: int = BATCH_ROWS,
        window: int | None = None,
        remember: int = 0,
    ):
        self.decoder = Decoder(model)
        self.tokenizer = tokenizer
        self.window = min(window or model.config.max_positions, model.config.max_positions)
        self._max_rows = max_rows
        self._remember = remember
        self._running: list[Row] = []
        self._waiting: list[Row] = []
        self._remembered: list[tuple[list[int], KVCache]] = []  # the newest last

    @property
    def is_idle(self) -> bool:
        """Whether no row is running or waiting."""
        return not self._running and not self._waiting

    @property
    def num_running(self) -> int:
        """Rows in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Submitted rows that are not in the batch yet."""
        return len(self._waiting)

    def submit(self, prompt_ids: Sequence[int], options: Sampling) -> Row:
        """Queue a new row; it joins as soon as there is room. UsageError when prompt and answer exceed the window."""
        if not prompt_ids:
            raise UsageError("the prompt is empty", "ask something")
        if len(prompt_ids) + options.max_new_tokens > self.window:
            raise UsageError(
                f"the question has {len(prompt_ids):,} tokens; with {options.max_new_tokens:,} for the answer "
                f"that exceeds the window of {self.window:,}",
                "ask a shorter question, or allow fewer new tokens",
            )
        row = Row(prompt_ids, options, self.tokenizer, self.decoder.new_cache())
        self._waiting.append(row)
        return row

    def cancel(self, row: Row) -> None:
        """Remove a row; its `ids` and `text` so far stay readable."""
        if row.finish_reason is None:
            row.finish_reason = "cancelled"
            self._running = [other for other in self._running if other is not row]
            self._waiting = [other for other in self._waiting if other is not row]
            self._keep_cache(row)

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        options: Sampling,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Row]:
        """Generate an answer to each prompt and return the finished rows in order. `progress(finished, all)` each step."""
        rows = [self.submit(prompt_ids, options) for prompt_ids in prompts]
        num_finished = 0
        while not self.is_idle:
            num_finished += sum(delta.finish_reason is not None for delta in self.step())
            if progress:
                progress(num_finished, len(rows))
        return rows

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """One forward pass. Returns a delta for each row that got a token; rows still reading their prompt have none."""
        self._admit()
        batch = self._next_batch()
        if not batch:
            return []
        logits = self.decoder.forward([(row._cache, row._new_ids) for row in batch]).float().cpu()
        ready = [(i, row) for i, row in enumerate(batch) if row._cache.length >= row.num_prompt]
        deltas = [self._extend(row, logits[i]) for i, row in ready]
        self._running = [row for row in self._running if row.finish_reason is None]
        return deltas

    def _admit(self) -> None:
        """Move waiting rows into free places, first come first served."""
        while self._waiting and len(self._running) < self._max_rows:
            row = self._waiting.pop(0)
            self._reuse_cache(row)
            self._running.append(row)

    def _next_batch(self) -> list[Row]:
        """All rows that continue, and joining rows as far as PREFILL_TOKENS allows."""
        batch, num_left = [], PREFILL_TOKENS
        for row in self._running:
            is_joining = row._cache.length < row.num_prompt
            size = len(row._new_ids) if is_joining else 0
            if size <= num_left:
                batch.append(row)
                num_left -= size
            else:
                num_left = 0  # later rows do not overtake this one
        return batch

    def _extend(self, row: Row, logits: Tensor) -> Delta:
        """Choose a row's next token from its logits [V], and end the row where that ends the answer."""
        options = row.options
        id = pick(logits, options, row._generator, row._prompt + row.ids)
        if id == self.tokenizer.eos_id:
            return self._end(row, "stop")
        token = Token(id)
        if options.logprobs is not None:
            logp, top = top_logps(logits, id, options.logprobs)
            token = Token(id, logp, tuple(top))
        row.ids.append(id)
        text = row._stream.feed(id)
        row.text += text
        if row._stream.is_stopped:
            return self._end(row, "stop", text, (token,))
        if len(row.ids) == options.max_new_tokens:
            return self._end(row, "length", text, (token,))
        return Delta(row, text, (token,))

    def _end(self, row: Row, reason: str, text: str = "", tokens: tuple[Token, ...] = ()) -> Delta:
        rest = row._stream.close()
        row.text += rest
        row.finish_reason = reason
        self._keep_cache(row)
        return Delta(row, text + rest, tokens, reason)

    def _keep_cache(self, row: Row) -> None:
        """Remember a row's cache in place of those that are a prefix of it; the oldest beyond `remember` are dropped."""
        ids = (row._prompt + row.ids)[: row._cache.length]
        if self._remember and ids:
            others = [(old, cache) for old, cache in self._remembered if old != ids[: len(old)]]
            self._remembered = [*others, (ids, row._cache)][-self._remember :]
        del row._cache

    def _reuse_cache(self, row: Row) -> None:
        """Copy the longest common prefix of a remembered row and this row's prompt, less its last token, into its cache."""
        same = [_common(ids, row._prompt[:-1]) for ids, _ in self._remembered]
        row.num_reused = max(same, default=0)
        if row.num_reused:
            row._cache.copy_from(self._remembered[same.index(row.num_reused)][1], row.num_reused)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix of two lists."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


class TextStream:
    """Decodes token ids to text as they arrive: in whole characters, holding back what may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._begin, self._read = 0, 0  # ids before _read have been returned; decoding starts again at _begin
        self._held = ""
        self.is_stopped = False

    def feed(self, id: int) -> str:
        """The text that is certain after this token."""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids[self._begin :])
        if text.endswith("\ufffd"):  # a later token may complete the character
            return ""
        return self._release(self._advance(text), is_last=False)

    def close(self) -> str:
        """The text held back, once the answer has ended."""
        if self.is_stopped:
            return ""
        return self._release(self._advance(self._tokenizer.decode(self._ids[self._begin :])), is_last=True)

    def _advance(self, text: str) -> str:
        """The part of `text`, decoded from `_begin`, that has not been returned. Some decoders write a token differently
        at the beginning of a text, so the ids returned last are decoded again as context."""
        context = self._tokenizer.decode(self._ids[self._begin : self._read])
        self._begin, self._read = self._read, len(self._ids)
        return text[len(context) :]

    def _release(self, text: str, *, is_last: bool) -> str:
        """Cut at the first stop string; else hold back the longest end that may become one."""
        text = self._held + text
        stops = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if stops:
            self.is_stopped = True
            self._held = ""
            return text[: min(stops)]
        num_held = 0 if is_last else max((tail_of_prefix(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]
