"""Batched text generation with streaming. A row is one answer being generated; rows join and leave a shared batch
between steps.

    engine = Engine(model, tokenizer, max_rows=16)     # not thread-safe: call it from one thread
    row = engine.submit(prompt_ids, Sampling(...))     # queue a row; UsageError when it cannot fit the window
    for delta in engine.step():                        # one forward pass: a new token for each row in generation, and
        delta.row, delta.text, delta.tokens            #   up to PREFILL_TOKENS prompt tokens of rows that have joined
        delta.finish_reason                            # "stop" or "length" in a row's last delta, else None
    engine.cancel(row)                                 # remove it before the next step; no effect on a finished row
    engine.is_idle                                     # True if no row is running or waiting: `step` would do nothing
    row.num_prompt, len(row.ids), row.text             # numbers of prompt and answer tokens, and the text so far

`delta.text` has whole characters only, and no text that may still become part of a stop string. So a delta may have
tokens and no text or, at the end, text and no tokens. Prompt ids come from `Template.prompt_ids` or `chat.fit`. To get
several answers to one prompt, submit it several times with different seeds.

An answer depends only on its prompt, settings and seed, not on other rows (the module `decoder` says how exactly). With
`remember=n` the engine stores the KV caches of the last n rows that ended. A prompt that begins with the same tokens as
one of them reuses that part of the cache, and its logits may then differ in the last bits. Memory: at most `max_rows +
remember` caches, each of at most `window` tokens.

An answer ends at the tokenizer's EOS token, at what its chat template writes after answers (`template.ending_of`), at a
stop string, none of which is part of the answer, or after `max_new_tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mmdata.encode.template import ending_of
from mmdata.errors import UsageError
from mmdata.io.files import Progress, no_progress
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.decoder import Decoder, KVCache
from mmtrain.inference.replies import tail_of_prefix
from mmtrain.inference.sampling import Guide, JsonGrammar, pick, top_logps
from mmtrain.inference.settings import Sampling
from mmtrain.model.model import Model

BATCH_ROWS = 64  # default of max_rows: large enough to keep a core busy with a small model's matrices
PREFILL_TOKENS = 512  # the most prompt tokens in one step: limits how long a row that joins delays the others


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token, its log-probability and the most likely ids with theirs, descending; None and empty without
    `Sampling.logprobs`."""

    id: int
    logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Row:
    """One answer being generated. ids, text: the answer so far. finish_reason: None until the answer has ended, then
    "stop" (EOS token, end of turn or stop string), "length" (`max_new_tokens`) or "cancelled"."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        options: Sampling,
        stream: "TextStream",
        cache: KVCache,
        guide: Guide | None = None,
    ):
        self.options = options
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.num_prompt = len(prompt_ids)
        self.num_reused = 0  # prompt tokens whose keys and values were copied from the cache of an earlier row
        self._prompt = list(prompt_ids)
        self._cache = cache
        self._generator = torch.Generator().manual_seed(options.seed)
        self._stream = stream
        self._guide = guide

    @property
    def _new_ids(self) -> list[int]:
        """The ids for the next forward pass: prompt ids that have not been read, up to the next multiple of
        PREFILL_TOKENS; after that the newest token of the answer."""
        done = self._cache.length
        if done >= self.num_prompt:
            return self.ids[-1:]
        return self._prompt[done : (done // PREFILL_TOKENS + 1) * PREFILL_TOKENS]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a row, and the finish reason if the row has ended ("stop" or "length")."""

    row: Row
    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: str | None = None


class Engine:
    """Generates many answers with shared forward passes; see the module. max_rows: the most rows in the batch, others
    wait. window: the most tokens of a prompt and its answer; default and upper limit are the model's `max_positions`.
    remember: number of ended rows whose KV caches are kept. ending: what ends an answer."""

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
        self.ending = ending_of(tokenizer)
        self.num_params = model.config.num_params
        self.window = min(window or model.config.max_positions, model.config.max_positions)
        self._max_rows = max_rows
        self._remember = remember
        self._running: list[Row] = []
        self._waiting: list[Row] = []
        self._remembered: list[tuple[list[int], KVCache]] = []  # ids of ended rows and their caches, the newest last

    @property
    def is_idle(self) -> bool:
        """Whether no row is running or waiting."""
        return not self._running and not self._waiting

    @cached_property
    def json_grammar(self) -> JsonGrammar:
        """What restricts answers to JSON. Raise UsageError if llguidance is not installed."""
        return JsonGrammar(self.tokenizer, self.ending.ids)

    @property
    def num_running(self) -> int:
        """Number of rows in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Number of submitted rows that are not in the batch yet."""
        return len(self._waiting)

    def submit(self, prompt_ids: Sequence[int], options: Sampling) -> Row:
        """Queue a new row; it joins the batch when there is a free place. Raise UsageError when the prompt is empty, or
        when prompt and `max_new_tokens` together exceed the window, or when JSON of the schema cannot be generated."""
        if not prompt_ids:
            raise UsageError("the prompt is empty", "ask something")
        if len(prompt_ids) + options.max_new_tokens > self.window:
            raise UsageError(
                f"the question has {len(prompt_ids):,} tokens; with {options.max_new_tokens:,} for the answer "
                f"that exceeds the window of {self.window:,}",
                "ask a shorter question, or allow fewer new tokens",
            )
        stream = TextStream(self.tokenizer, (*options.stop, *self.ending.texts))
        guide = self.json_grammar.guide(options.json_schema) if options.json_schema else None
        row = Row(prompt_ids, options, stream, self.decoder.new_cache(), guide)
        self._waiting.append(row)
        return row

    def cancel(self, row: Row) -> None:
        """End a row with finish reason "cancelled"; `ids` and `text` stay readable. No effect on an ended row."""
        if row.finish_reason is None:
            row.finish_reason = "cancelled"
            self._running = [other for other in self._running if other is not row]
            self._waiting = [other for other in self._waiting if other is not row]
            self._keep_cache(row)

    def answer(
        self, prompts: Sequence[Sequence[int]], options: Sampling, *, progress: Progress = no_progress
    ) -> list[Row]:
        """Generate an answer to each prompt, with the same settings. progress: called with (finished answers, prompts)
        after each step. Raise UsageError as `submit` does."""
        rows = [self.submit(prompt_ids, options) for prompt_ids in prompts]
        num_finished = 0
        while not self.is_idle:
            num_finished += sum(delta.finish_reason is not None for delta in self.step())
            progress(num_finished, len(rows))
        return rows

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Run one forward pass over the batch, after moving waiting rows into free places. Return a delta for each row
        that got a token; rows that are still reading their prompt have none."""
        self._admit()
        batch = self._next_batch()
        if not batch:
            return []
        logits = self.decoder.forward([(row._cache, row._new_ids) for row in batch]).float().cpu()
        logits = logits[:, : self.tokenizer.vocab_size]  # rows of the embedding beyond the tokenizer's ids mean nothing
        ready = [(i, row) for i, row in enumerate(batch) if row._cache.length >= row.num_prompt]
        deltas = [self._extend(row, logits[i]) for i, row in ready]
        self._running = [row for row in self._running if row.finish_reason is None]
        return deltas

    def _admit(self) -> None:
        """Move waiting rows into the batch, first come first served, until it has `max_rows` rows."""
        while self._waiting and len(self._running) < self._max_rows:
            row = self._waiting.pop(0)
            self._reuse_cache(row)
            self._running.append(row)

    def _next_batch(self) -> list[Row]:
        """Return the rows of the next forward pass: all whose prompt has been read, and those that still read it, in
        the order of their arrival, as long as they add at most PREFILL_TOKENS prompt tokens."""
        batch, num_left = [], PREFILL_TOKENS
        for row in self._running:
            is_joining = row._cache.length < row.num_prompt
            size = len(row._new_ids) if is_joining else 0
            if size <= num_left:
                batch.append(row)
                num_left -= size
            else:
                num_left = 0  # rows that arrived later do not overtake this one
        return batch

    def _extend(self, row: Row, logits: Tensor) -> Delta:
        """Choose the next token of a row from its logits [V], and end the row if this token ends the answer."""
        options = row.options
        allowed = row._guide.limit(logits) if row._guide else logits
        id = pick(allowed, options, row._generator, row._prompt, row.ids)
        is_complete = row._guide is not None and row._guide.accept(id)
        if id in self.ending.ids:
            return self._end(row, "stop")
        token = Token(id)
        if options.logprobs is not None:
            logp, top = top_logps(logits, id, options.logprobs)
            token = Token(id, logp, tuple(top))
        row.ids.append(id)
        text = row._stream.feed(id)
        row.text += text
        if row._stream.is_stopped or is_complete:
            return self._end(row, "stop", text, (token,))
        if len(row.ids) == options.max_new_tokens:
            return self._end(row, "length", text, (token,))
        return Delta(row, text, (token,))

    def _end(self, row: Row, reason: str, text: str = "", tokens: tuple[Token, ...] = ()) -> Delta:
        """End a row and release the text that its stream held back. text, tokens: what this step has already added to
        it."""
        rest = row._stream.close()
        row.text += rest
        row.finish_reason = reason
        self._keep_cache(row)
        return Delta(row, text + rest, tokens, reason)

    def _keep_cache(self, row: Row) -> None:
        """Take the cache from an ended row and store it with its ids for later prompts, if `remember` is above 0.
        Stored caches whose ids are a prefix of these are dropped, and so are the oldest beyond `remember`."""
        ids = (row._prompt + row.ids)[: row._cache.length]
        if self._remember and ids:
            others = [(old, cache) for old, cache in self._remembered if old != ids[: len(old)]]
            self._remembered = [*others, (ids, row._cache)][-self._remember :]
        del row._cache

    def _reuse_cache(self, row: Row) -> None:
        """Copy the longest prefix that this row's prompt shares with a remembered row into its cache. The last prompt
        token is never copied, since the forward pass needs at least one."""
        same = [_common(ids, row._prompt[:-1]) for ids, _ in self._remembered]
        row.num_reused = max(same, default=0)
        if row.num_reused:
            row._cache.copy_from(self._remembered[same.index(row.num_reused)][1], row.num_reused)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


class TextStream:
    """Decodes token ids to text as they arrive. It returns whole characters only, and holds back text that may still
    become part of a stop string. is_stopped: set at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._begin, self._read = 0, 0  # the text of ids before _read has been returned; decoding starts at _begin
        self._held = ""  # decoded text that is not returned yet
        self.is_stopped = False

    def feed(self, id: int) -> str:
        """Add a token id and return the text that can be shown now, maybe none. It ends before a stop string."""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids[self._begin :])
        if text.endswith("\ufffd"):  # a later token may complete the character
            return ""
        return self._release(self._advance(text), is_last=False)

    def close(self) -> str:
        """Return the text still held back, once the answer has ended; empty after a stop string."""
        if self.is_stopped:
            return ""
        return self._release(self._advance(self._tokenizer.decode(self._ids[self._begin :])), is_last=True)

    def _advance(self, text: str) -> str:
        """Return the end of `text`, decoded from the ids from `_begin` on, that was not returned yet. Some decoders
        write a first token differently: ids returned last are decoded again and their text cut off."""
        context = self._tokenizer.decode(self._ids[self._begin : self._read])
        self._begin, self._read = self._read, len(self._ids)
        return text[len(context) :]

    def _release(self, text: str, *, is_last: bool) -> str:
        """Append `text` to the text held back, and return all before the first stop string or, without one, all but the
        longest end that may become a stop string. is_last: hold nothing back."""
        text = self._held + text
        stops = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if stops:
            self.is_stopped = True
            self._held = ""
            return text[: min(stops)]
        num_held = 0 if is_last else max((tail_of_prefix(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]
