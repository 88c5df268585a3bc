"""Prompts in, answers out: many at once, each streamed, joining and leaving between steps.

For a server or any other caller of many answers:

    engine = Engine(model, tokenizer, max_rows=16)     # knows no clock, thread or socket; call it from one thread only
    row = engine.submit(prompt_ids, Sampling(...))     # waits for its turn; UsageError when it cannot fit the window
    for delta in engine.step():                        # one forward for all rows: a token for each that runs, and up to
        delta.row, delta.text, delta.tokens            #   PREFILL_TOKENS of the prompts of those that join
        delta.finish_reason                            # None while it goes on, then "stop" or "length", once
    engine.cancel(row)                                 # it leaves before the next step; harmless when it has ended
    engine.is_idle                                     # nothing runs or waits; `step` would do nothing
    row.num_prompt, len(row.ids), row.text             # for usage; of a row that ended, all it said

`delta.text` comes in whole characters, less what may still become a stop string, so a delta may hold tokens and no text
or, at the end, text and no token. `delta.tokens` are `Token(id, logp, top)`; logp and top only where asked for. `fit` and
`Template.prompt_ids` make prompt ids of messages; several answers to one prompt are several rows with seeds of their own.
What a row says follows from its prompt, settings and seed alone (see `decoder` for how exactly). With `remember` an engine
keeps the caches of so many ended rows, and a prompt that begins like one of them starts behind that beginning: what it
then says may differ in the last bits of its logits. Memory: caches of `max_rows + remember` rows, at most a window each.

An answer ends at the tokenizer's end-of-turn token, which is never shown, at a stop string, or after `max_new_tokens`.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdata.encode.template import Message, Template
from mmdata.errors import UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.decoder import Decoder, KVCache
from mmtrain.inference.sampling import Sampling, pick, top_logps
from mmtrain.model.model import Model

BATCH_ROWS = 64  # answered at once: a small model's matrices are then large enough to keep a core busy
PREFILL_TOKENS = 512  # prompt tokens of one step: a joining row holds the others up no longer than these take
WINDOW = 2048


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer; where asked for its log-probability and the likeliest ids with theirs."""

    id: int
    logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Row:
    """One answer in the making. `ids` and `text` are what it has said; `finish_reason` is None until it has ended."""

    def __init__(self, prompt_ids: Sequence[int], options: Sampling, tokenizer: Tokenizer, cache: KVCache):
        self.options = options
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.num_prompt = len(prompt_ids)
        self.num_reused = 0
        self._prompt = list(prompt_ids)
        self._cache = cache
        self._generator = torch.Generator().manual_seed(options.seed)
        self._stream = TextStream(tokenizer, options.stop)

    @property
    def _new_ids(self) -> list[int]:
        """What the next forward takes in: the newest token, or some of the prompt, cut at fixed places."""
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
    """Rows that share a model's forwards. See the module's beginning for how it is used."""

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
        """Whether no row runs or waits."""
        return not self._running and not self._waiting

    @property
    def num_running(self) -> int:
        """Rows that the next step goes on with."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Rows submitted for which there was no room yet."""
        return len(self._waiting)

    def submit(self, prompt_ids: Sequence[int], options: Sampling) -> Row:
        """A new row, which joins as soon as there is room; UsageError when prompt and answer exceed the window."""
        if not prompt_ids:
            raise UsageError("the prompt is empty", "ask something")
        if len(prompt_ids) + options.max_new_tokens > self.window:
            raise _too_long(len(prompt_ids), options.max_new_tokens, self.window)
        row = Row(prompt_ids, options, self.tokenizer, self.decoder.new_cache())
        self._waiting.append(row)
        return row

    def cancel(self, row: Row) -> None:
        """Let a row go; what it has said stays readable."""
        if row.finish_reason is None:
            row.finish_reason = "cancelled"
            self._running = [other for other in self._running if other is not row]
            self._waiting = [other for other in self._waiting if other is not row]
            self._keep(row)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """One forward; what each row that got a token says. Rows whose prompt is not through yet say nothing."""
        self._admit()
        batch = self._next_batch()
        if not batch:
            return []
        logits = self.decoder.forward([(row._cache, row._new_ids) for row in batch]).float().cpu()
        speaking = [(i, row) for i, row in enumerate(batch) if row._cache.length >= row.num_prompt]
        deltas = [self._say(row, logits[i]) for i, row in speaking]
        self._running = [row for row in self._running if row.finish_reason is None]
        return deltas

    def _admit(self) -> None:
        """Waiting rows take free places, in the order they came."""
        while self._waiting and len(self._running) < self._max_rows:
            row = self._waiting.pop(0)
            self._recall(row)
            self._running.append(row)

    def _next_batch(self) -> list[Row]:
        """All rows with a newest token, and joining ones as far as the step's prompt tokens go."""
        batch, num_left = [], PREFILL_TOKENS
        for row in self._running:
            is_joining = row._cache.length < row.num_prompt
            size = len(row._new_ids) if is_joining else 0
            if size <= num_left:
                batch.append(row)
                num_left -= size
            else:
                num_left = 0  # later ones do not overtake
        return batch

    def _say(self, row: Row, logits: Tensor) -> Delta:
        """Draw a row's next token from its logits [V]; what that adds, and whether the answer has ended."""
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
        self._keep(row)
        return Delta(row, text + rest, tokens, reason)

    # ---- the caches of rows that ended

    def _keep(self, row: Row) -> None:
        """Remember a row's cache instead of those it went on from, and forget the oldest ones beyond what may be kept."""
        ids = (row._prompt + row.ids)[: row._cache.length]
        if self._remember and ids:
            others = [(old, cache) for old, cache in self._remembered if old != ids[: len(old)]]
            self._remembered = [*others, (ids, row._cache)][-self._remember :]
        del row._cache

    def _recall(self, row: Row) -> None:
        """Begin with what a remembered row has in common with this one's prompt."""
        same = [_common(ids, row._prompt[:-1]) for ids, _ in self._remembered]  # one token is left to be asked
        row.num_reused = max(same, default=0)
        if row.num_reused:
            row._cache.copy_from(self._remembered[same.index(row.num_reused)][1], row.num_reused)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def _too_long(num_prompt: int, num_new: int, window: int) -> UsageError:
    return UsageError(
        f"the question has {num_prompt:,} tokens; with {num_new:,} for the answer the window holds {window:,}",
        "ask a shorter question, or allow fewer new tokens",
    )


class TextStream:
    """Token ids in, text out in whole characters; what may still become a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._begin, self._read = 0, 0  # ids from _begin are decoded anew, up to _read they have been given out
        self._held = ""
        self.is_stopped = False

    def feed(self, id: int) -> str:
        """The text that is certain once this token has come."""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids[self._begin :])
        if text.endswith("\ufffd"):  # a later token may complete the character
            return ""
        return self._release(self._advance(text), is_last=False)

    def close(self) -> str:
        """What was held back: the answer has ended."""
        return (
            ""
            if self.is_stopped
            else self._release(self._advance(self._tokenizer.decode(self._ids[self._begin :])), is_last=True)
        )

    def _advance(self, text: str) -> str:
        """What `text`, decoded from `_begin`, has beyond what was given out. The ids before it stay a while: some
        decoders write a token differently at the beginning of a text."""
        known = self._tokenizer.decode(self._ids[self._begin : self._read])
        self._begin, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _release(self, text: str, *, is_last: bool) -> str:
        """Cut at the first stop string; else hold back the longest end that one begins with."""
        text = self._held + text
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        kept = 0 if is_last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` a stop string, not whole, may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


# --- conversations ----------------------------------------------------------------------------------------------------


def fit(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    room: int,
    tools: Sequence[dict[str, Any]] = (),
    think: bool | None = None,
) -> list[int]:
    """Prompt ids of the longest end of the conversation, in whole turns, that has at most `room` tokens.

    The system message and the last question stay; UsageError when these alone have more.
    """
    kept = list(messages)
    while True:
        ids = template.prompt_ids(tokenizer, kept, tools, think=think)
        if len(ids) <= room:
            return ids
        starts = [i for i, message in enumerate(kept) if message.role == "user"]
        if len(starts) < 2:
            raise UsageError(
                f"the question has {len(ids):,} tokens, there is room for {max(room, 0):,}",
                "ask a shorter question, or allow fewer new tokens",
            )
        del kept[starts[0] : starts[1]]


class Chat:
    """One conversation with a model. Keeps the messages, and the keys and values of their tokens between turns.

    `window` is how many tokens a conversation and its next answer may have; the oldest whole turns leave it first. Without
    a template the model goes on with the last text alone: one that was only pretrained knows no turns.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, template: Template | None, *, window: int = WINDOW):
        self.engine = Engine(model, tokenizer, max_rows=1, window=window, remember=1)
        self.template = template
        self.messages: list[Message] = []
        self.row: Row | None = None  # of the newest answer
        self.opening = ""  # what of it the template has written: an open think block, or nothing

    def ask(self, text: str, options: Sampling, *, think: bool | None = None) -> Generator[str, None, None]:
        """Stream the answer to `text`, said after everything before. What cannot be asked raises and leaves no trace."""
        asked = [*self.messages, Message("user", text)]
        stream = self.reply(asked, options, think=think)
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:  # an answer cut short by the reader counts as far as it was read
            stream.close()
            self.messages += [asked[-1], Message("assistant", self.opening + "".join(pieces))]

    def reply(
        self, messages: Sequence[Message], options: Sampling, *, think: bool | None = None
    ) -> Generator[str, None, None]:
        """Stream the answer to `messages`, of which the oldest whole turns are left out when the window is full."""
        tokenizer, room = self.engine.tokenizer, self.engine.window - options.max_new_tokens
        if self.template is None:
            prompt = plain_prompt(tokenizer, messages[-1].content)
        else:
            prompt = fit(self.template, tokenizer, messages, room=room, think=think)
        self.opening = THINKING if self.template and tokenizer.decode(prompt[-8:]).endswith(THINKING) else ""
        self.row = self.engine.submit(prompt, options)
        return self._stream(self.row)

    def _stream(self, row: Row) -> Generator[str, None, None]:
        try:
            while row.finish_reason is None:
                yield from (delta.text for delta in self.engine.step() if delta.text)
        finally:
            self.engine.cancel(row)


def plain_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as a document begins, for a model to go on with."""
    begin = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    return begin + tokenizer.encode_batch([text])[0].tolist()


THINKING = "<think>\n"


def answer_batch(
    model: Model,
    tokenizer: Tokenizer,
    template: Template,
    questions: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """The greedy answer to each question (a text, or messages that end with the user's), in the order asked."""
    engine = Engine(model, tokenizer)
    options = Sampling(max_new_tokens=max_new_tokens)
    rows = [
        engine.submit(
            template.prompt_ids(tokenizer, [Message("user", question)] if isinstance(question, str) else question),
            options,
        )
        for question in questions
    ]
    while not engine.is_idle:
        engine.step()
    return [row.text for row in rows]
