"""Conversations: messages become prompt ids that fit the window, and answers become messages.

`Chat` is one conversation with history. `fit` drops the oldest turns of a conversation that is too long.
`answer_batch` answers many independent questions at once.
"""

from collections.abc import Generator, Sequence
from typing import Any

from mmdata.encode.template import Message, Template
from mmdata.errors import UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.engine import Engine, Row
from mmtrain.inference.settings import Sampling
from mmtrain.model.model import Model

WINDOW = 2048
THINKING = "<think>\n"  # ends the prompt where the chat template opens the think block itself


class Chat:
    """One conversation with a model. Keeps its messages, and the KV cache of their tokens between turns.

    `window` bounds the tokens of the conversation and the next answer; the oldest turns are dropped first. Without a
    template (a model that was only pretrained) the model continues the last text alone.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, template: Template | None, *, window: int = WINDOW):
        self.engine = Engine(model, tokenizer, max_rows=1, window=window, remember=1)
        self.template = template
        self.messages: list[Message] = []
        self.row: Row | None = None  # of the newest answer
        self.opening = ""  # THINKING where the template has opened the think block of the newest answer

    def ask(self, text: str, options: Sampling, *, think: bool | None = None) -> Generator[str, None, None]:
        """Stream the answer to `text` and add both to the messages. An error before the answer leaves them unchanged."""
        messages = [*self.messages, Message("user", text)]
        stream = self.reply(messages, options, think=think)
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:  # where the reader stops early, the message holds what was read
            stream.close()
            self.messages += [messages[-1], Message("assistant", self.opening + "".join(pieces))]

    def reply(
        self, messages: Sequence[Message], options: Sampling, *, think: bool | None = None
    ) -> Generator[str, None, None]:
        """Stream the answer to `messages`, without adding to this conversation."""
        tokenizer, room = self.engine.tokenizer, self.engine.window - options.max_new_tokens
        if self.template is None:
            prompt = plain_prompt(tokenizer, messages[-1].content)
        else:
            prompt = fit(self.template, tokenizer, messages, room=room, think=think)
        self.opening = opening_of(tokenizer, prompt) if self.template else ""
        self.row = self.engine.submit(prompt, options)
        return self._stream(self.row)

    def _stream(self, row: Row) -> Generator[str, None, None]:
        try:
            while row.finish_reason is None:
                yield from (delta.text for delta in self.engine.step() if delta.text)
        finally:
            self.engine.cancel(row)


def fit(
    template: Template,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    room: int,
    tools: Sequence[dict[str, Any]] = (),
    think: bool | None = None,
) -> list[int]:
    """Prompt ids of a conversation, less its oldest turns where it has more than `room` tokens.

    The system message and the last question are kept; UsageError when these alone exceed `room`.
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


def prompt_of(tokenizer: Tokenizer, template: Template | None, question: str) -> list[int]:
    """Prompt ids of a conversation's first question; without a template those of the text itself, to be continued."""
    if template is None:
        return plain_prompt(tokenizer, question)
    return template.prompt_ids(tokenizer, [Message("user", question)])


def plain_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text for the model to continue: the BOS token, where the tokenizer has one, and the text."""
    begin = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    return begin + tokenizer.encode_batch([text])[0].tolist()


def opening_of(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> str:
    """The beginning of the answer that the prompt itself contains: an open think block, or nothing."""
    return THINKING if tokenizer.decode(list(prompt_ids)[-8:]).endswith(THINKING) else ""


def answer_batch(
    model: Model,
    tokenizer: Tokenizer,
    template: Template,
    questions: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """The greedy answer to each question (a text, or messages that end with the user's), in order."""
    conversations = [[Message("user", question)] if isinstance(question, str) else question for question in questions]
    prompts = [template.prompt_ids(tokenizer, messages) for messages in conversations]
    rows = Engine(model, tokenizer).answer(prompts, Sampling(max_new_tokens=max_new_tokens))
    return [row.text for row in rows]
