"""Response bodies of OpenAI's HTTP API, built from an answer while it is generated. Does not use the server."""

import uuid
from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType, structs

from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import token_texts
from mmtrain.inference.chat import opening_of
from mmtrain.inference.engine import Delta, Token
from mmtrain.inference.replies import Piece, Splitter
from mmtrain.inference.serve.api import Request

# --- bodies, with the names of OpenAI's API reference; a field that is UNSET is not written


class Usage(Struct):
    """Token counts of a response."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FunctionCall(Struct):
    """The function that a tool call calls, and its arguments."""

    name: str
    arguments: str  # JSON text


class ToolCall(Struct):
    """A call of a tool by the model."""

    id: str
    function: FunctionCall
    type: str = "function"
    index: int | UnsetType = UNSET  # number of the call in the answer; only in streamed chunks


class ChatMessage(Struct):
    """A chat message or, in a streamed response, what one chunk adds to it."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class TokenLogprob(Struct):
    """A token's text and log-probability and, for a generated token, the most likely tokens at its position."""

    token: str
    logprob: float | None
    bytes: list[int] | None  # of its text, also where the token is a part of a character; null for an unused id
    top_logprobs: "list[TokenLogprob] | UnsetType" = UNSET


class ChatLogprobs(Struct):
    """Log-probabilities of the tokens of a chat's answer, or of one chunk of it."""

    content: list[TokenLogprob]


class CompletionLogprobs(Struct):
    """Log-probabilities of the tokens of a completion, or of one chunk of it: three lists, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]


class Choice(Struct):
    """One answer or, in a streamed response, what one chunk adds to it. Its text is in `message` (chat), `delta` (chunk
    of a chat) or `text` (completion); the other two are UNSET."""

    index: int
    finish_reason: str | None
    logprobs: ChatLogprobs | CompletionLogprobs | None
    message: ChatMessage | UnsetType = UNSET
    delta: ChatMessage | UnsetType = UNSET
    text: str | UnsetType = UNSET


class Completion(Struct):
    """A response body, or one event of a streamed response. `created` is a Unix time."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct):
    """The description of the model in /v1/models. context_length: the window in tokens. parameters: their number.
    prompts: what the chat page proposes to ask."""

    id: str
    created: int
    context_length: int
    knows_thinking: bool
    parameters: int
    vocab_size: int
    prompts: Sequence[str] = ()
    object: str = "model"
    owned_by: str = "mm"


# --- building them


class AnswerStream:
    """Builds the response for one answer while it is generated. index: position of the answer in the response.
    num_prompt, num_new: numbers of prompt and generated tokens."""

    def __init__(self, request: Request, index: int, prompt_ids: Sequence[int], tokenizer: Tokenizer):
        self.index, self.num_prompt, self.num_new = index, len(prompt_ids), 0
        self._tokenizer = tokenizer
        self._has_logprobs = request.sampling.logprobs is not None
        self._splitter = Splitter(with_calls=bool(request.tools)) if request.is_chat else None
        self._pieces: list[Piece] = []
        self._calls: list[ToolCall] = []
        self._tokens: list[Token] = []
        self._finish_reason: str | None = None
        if self._splitter:
            self._splitter.feed(opening_of(tokenizer, prompt_ids))

    def add(self, delta: Delta) -> list[Choice]:
        """Add what one step generated. Return the choices to stream for it, one per chunk; the first carries the
        log-probabilities, and the last of an answer carries only the finish reason."""
        self.num_new += len(delta.tokens)
        tokens = delta.tokens if self._has_logprobs else ()
        self._tokens += tokens
        if self._splitter is None:
            pieces = [Piece("content", delta.text)] if delta.text or delta.tokens else []
        else:
            pieces = self._splitter.feed(delta.text) + (self._splitter.close() if delta.finish_reason else [])
        self._pieces += pieces
        parts = [self._part(piece) for piece in pieces]
        if tokens and not parts:
            parts = [ChatMessage()]
        choices = [self._chunk(part, () if i else tokens) for i, part in enumerate(parts)]
        if delta.finish_reason:
            self._finish_reason = "tool_calls" if self._calls else delta.finish_reason
            choices.append(self._chunk(ChatMessage(), finish_reason=self._finish_reason))
        return choices

    def begin(self) -> Choice:
        """Return the choice of the first chunk of a streamed chat: the role "assistant" with an empty content."""
        return self._chunk(ChatMessage(role="assistant", content=""))

    def whole(self) -> Choice:
        """Return the choice of a response that is not streamed, once the answer has ended."""
        choice = Choice(self.index, self._finish_reason, self._logprobs(self._tokens) if self._has_logprobs else None)
        content, reasoning = ("".join(p.text for p in self._pieces if p.kind == k) for k in ("content", "reasoning"))
        if self._splitter is None:
            return structs.replace(choice, text=content)
        calls = [structs.replace(call, index=UNSET) for call in self._calls]
        return structs.replace(
            choice,
            message=ChatMessage("assistant", content or (None if calls else ""), reasoning or UNSET, calls or UNSET),
        )

    def _part(self, piece: Piece) -> ChatMessage:
        """Return a piece of a chat as a chunk's message; a tool call gets a new id and its number in the answer."""
        if piece.call:
            call = ToolCall(f"call_{uuid.uuid4().hex[:24]}", FunctionCall(**piece.call), index=len(self._calls))
            self._calls.append(call)
            return ChatMessage(tool_calls=[call])
        if piece.kind == "reasoning":
            return ChatMessage(reasoning_content=piece.text)
        return ChatMessage(content=piece.text)

    def _chunk(self, part: ChatMessage, tokens: Sequence[Token] = (), finish_reason: str | None = None) -> Choice:
        """Return the choice of one streamed chunk, which adds `part`, generated as `tokens`."""
        choice = Choice(self.index, finish_reason, self._logprobs(tokens) if tokens else None)
        if self._splitter is None:
            return structs.replace(choice, text=part.content or "")
        return structs.replace(choice, delta=part)

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | CompletionLogprobs:
        if self._splitter is None:
            texts, top = [self._text(token.id, "bytes:") for token in tokens], [self._top(token) for token in tokens]
            return CompletionLogprobs(texts, [token.logp for token in tokens], top)
        return ChatLogprobs(
            [
                structs.replace(self._logprob(t.id, t.logp), top_logprobs=[self._logprob(*top) for top in t.top])
                for t in tokens
            ]
        )

    def _top(self, token: Token) -> dict[str, float]:
        """Return the most likely tokens of a position, and the generated one, by text. A token whose text another one
        has already is named by its id."""
        top: dict[str, float] = {}
        for id, logp in dict([*token.top, (token.id, token.logp or 0.0)]).items():
            text = self._text(id, "bytes:")
            top[f"token_id:{id}" if text in top else text] = logp
        return top

    def _logprob(self, id: int, logp: float | None) -> TokenLogprob:
        data = token_texts(self._tokenizer)[id]
        return TokenLogprob(self._text(id), logp, None if data is None else list(data))

    def _text(self, id: int, prefix: str = "") -> str:
        """Return the text of a token; if it is a part of a character, `prefix` and its bytes, such as \\xf0\\x9f."""
        data = token_texts(self._tokenizer)[id] or b""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in data)
