"""Chat with a model: messages become prompt ids that fit the context window, and generated text becomes a message."""

from collections.abc import Generator, Sequence

from mmdata.encode.rows import Message
from mmdata.encode.template import Template
from mmdata.errors import UsageError
from mmdata.io.records import JsonObject
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.engine import Engine, Row
from mmtrain.inference.settings import Sampling
from mmtrain.model.model import Model

WINDOW = 2048  # default of `Chat`'s `window`, in tokens
THINKING = "<think>\n"  # the end of a prompt whose chat template writes the beginning of the think block itself


class Chat:
    """A conversation with one model. It reuses the KV cache of the previous answer for the next prompt. window: the
    most tokens of a prompt and its answer; at most the model's `max_positions`. The oldest turns (a user message and
    its answer) of a longer conversation are left out of the prompt, but stay in `messages`. template: None for a model
    that was only pretrained, which continues the newest message's text alone."""

    def __init__(self, model: Model, tokenizer: Tokenizer, template: Template | None, *, window: int = WINDOW):
        self.engine = Engine(model, tokenizer, max_rows=1, window=window, remember=1)
        self.template = template
        self.messages: list[Message] = []
        self.row: Row | None = None  # the newest answer; None before the first one
        self.opening = ""  # THINKING if the prompt already contains the beginning of the newest answer's think block

    def ask(self, text: str, options: Sampling, *, think: bool | None = None) -> Generator[str, None, None]:
        """Yield the answer to `text` in pieces while it is generated, and append question and answer to `messages` at
        the end, also if the caller stops early or generation fails. think: request an answer with (True) or without
        (False) a think block; None uses the chat template's default. Errors before generation leave `messages`
        unchanged: UsageError if the question does not fit the window, TokenizerError if the chat template refuses the
        messages."""
        messages = [*self.messages, Message("user", text)]
        stream = self.reply(messages, options, think=think)
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:  # also when the caller closes the generator early
            stream.close()
            self.messages += [messages[-1], Message("assistant", self.opening + "".join(pieces))]

    def reply(
        self, messages: Sequence[Message], options: Sampling, *, think: bool | None = None
    ) -> Generator[str, None, None]:
        """Return a generator of the answer to `messages`, which must end with the user's, in pieces of text.
        `self.messages` stays as it is. think: see `ask`, whose errors this call raises before the generator is used."""
        tokenizer, room = self.engine.tokenizer, self.engine.window - options.max_new_tokens
        if self.template is None:
            prompt = plain_prompt(tokenizer, messages[-1].content)
        else:
            prompt = fit(self.template, tokenizer, messages, room=room, think=think)
        self.opening = opening_of(tokenizer, prompt) if self.template else ""
        self.row = self.engine.submit(prompt, options)
        return self._stream(self.row)

    def _stream(self, row: Row) -> Generator[str, None, None]:
        """Yield the text of `row` until it has ended. Cancel the row if the caller stops early."""
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
    tools: Sequence[JsonObject] = (),
    think: bool | None = None,
) -> list[int]:
    """Return the prompt ids of a conversation, without as many of its oldest turns (a user message and all up to the
    next one) as make them at most `room` tokens. Messages before the first user message, such as the system message,
    and the last turn always stay; UsageError if these alone are too long. tools: function definitions for the chat
    template. think: see `Chat.ask`."""
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
    """Return the prompt ids of a conversation of one user message; without a template, those of `plain_prompt`."""
    if template is None:
        return plain_prompt(tokenizer, question)
    return template.prompt_ids(tokenizer, [Message("user", question)])


def plain_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the prompt ids of a text for the model to continue: the BOS token, if there is one, and the text's ids."""
    begin = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    return begin + tokenizer.encode_batch([text])[0].tolist()


def opening_of(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> str:
    """Return the beginning of the answer that the prompt already contains: `THINKING` or ""."""
    return THINKING if tokenizer.decode(list(prompt_ids)[-8:]).endswith(THINKING) else ""


def answer_batch(
    model: Model,
    tokenizer: Tokenizer,
    template: Template,
    questions: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 64,
) -> list[str]:
    """Answer independent questions in one batch by greedy decoding. A question is a text (one user message) or messages
    that end with the user's. Raise UsageError when a prompt and its answer may exceed the model's `max_positions`."""
    conversations = [[Message("user", question)] if isinstance(question, str) else question for question in questions]
    prompts = [template.prompt_ids(tokenizer, messages) for messages in conversations]
    rows = Engine(model, tokenizer).answer(prompts, Sampling(max_new_tokens=max_new_tokens))
    return [row.text for row in rows]
