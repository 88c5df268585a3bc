"""Reads and checks the request bodies of OpenAI's HTTP API. Uses neither the server nor the model.

Every field either takes effect or is refused with an error that names it, except those that label a request (`LABELS`).
Fields that OpenAI's API does not have are top_k, min_p, repetition_penalty, truncation and chat_template_kwargs, named
as in other local servers. A field whose value is null gets its default.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from mmdata.encode.rows import Message
from mmdata.io.records import JsonObject, convert_record, explain
from mmtrain.inference.settings import Sampling

MAX_CHOICES = 16  # the largest `n`, and the most prompts of a completion
MAX_TOP_LOGPROBS = 20  # the most likely tokens that can be reported with each token

# Whole numbers are declared as float, since clients also write 5.0.
Count = Annotated[float, Meta(ge=1, le=2**31, multiple_of=1)]
Choices = Annotated[float, Meta(ge=1, le=MAX_CHOICES, multiple_of=1)]
TopLogprobs = Annotated[float, Meta(ge=0, le=MAX_TOP_LOGPROBS, multiple_of=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Text = Annotated[str, Meta(min_length=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]

LABELS = {  # fields that are accepted and have no effect
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
}
_CHOICES = {  # the values a field may have; msgspec's message about a wrong value does not list them
    "messages.role": "system, developer, user, assistant or tool",
    "tool_choice": "auto or none, since a call cannot be forced",
    "tools.type": "function",
    "response_format.type": "text, json_object or json_schema",
    "truncation": "auto or disabled",
}
_TYPES = {  # msgspec's names of types, in words
    "float": "a number",
    "int": "a whole number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}


class RequestError(Exception):
    """A request that cannot be served. message: for the client. param: name of the field at fault. status: HTTP status.
    code: error code of OpenAI's API, None if there is none."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the error as a response body in the form of OpenAI's API."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate: `n` answers to the conversation `messages` (a chat), or `n` continuations of each text in
    `prompts` (a completion). Seed and length limit are in `seed` and `max_tokens`, not in `sampling`."""

    sampling: Sampling
    max_tokens: int | None  # the most tokens of an answer; None: as many as the window and the server allow
    seed: int | None  # None: a random seed is drawn
    n: int  # number of answers to each prompt
    stream: bool
    include_usage: bool  # end a streamed response with the token counts
    messages: tuple[Message, ...] = ()
    tools: tuple[JsonObject, ...] = ()
    prompts: tuple[str, ...] = ()
    think: bool | None = None  # answer with or without a think block; None: the chat template's default
    truncate: bool = False  # drop the oldest turns of a conversation that is too long; False: raise an error

    @property
    def is_chat(self) -> bool:
        """Whether the request is a chat; otherwise it is a completion."""
        return bool(self.messages)


# --- bodies


class _Unsupported(Struct, kw_only=True):
    """Fields of OpenAI's API that are accepted only with a value that has no effect, such as an empty suffix."""

    functions: Annotated[list[str], Meta(max_length=0)] = []
    function_call: Literal["none"] = "none"
    modalities: list[Literal["text"]] = []
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    suffix: Literal[""] = ""
    echo: bool = False
    best_of: Literal[1] = 1


class _StreamOptions(Struct, forbid_unknown_fields=True):
    """The field stream_options; include_obfuscation has no effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Body(_Unsupported, kw_only=True):
    """The fields that the bodies of chats and completions have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[float, Meta(ge=0, le=2**31, multiple_of=1)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] = 1.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[int, Bias], Meta(max_length=1024)] = {}  # token id -> what to add to its logit
    seed: int | Annotated[float, Meta(multiple_of=1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=16)] = []
    n: Choices = 1
    stream: bool = False
    stream_options: _StreamOptions | None = None

    def request(self, *, logprobs: float | None, max_tokens: float | None) -> Request:
        """Return the request with the fields that chats and completions share. Raise RequestError for `echo`, and for
        `stream_options` without `stream`. logprobs: most likely tokens to report with each; None reports no
        log-probabilities."""
        if self.echo:
            raise RequestError("echo is not supported here: leave it out", param="echo")
        if self.stream_options and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        sampling = Sampling(
            temperature=self.temperature,
            top_k=int(self.top_k),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            logprobs=None if logprobs is None else int(logprobs),
        )
        return Request(
            sampling,
            max_tokens=None if max_tokens is None else int(max_tokens),
            seed=None if self.seed is None else int(self.seed),
            n=int(self.n),
            stream=self.stream,
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
        )


class _Part(Struct):
    """An element of a message's content where the content is a list, such as {"type": "text", "text": "hello"}."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None


class _CalledFunction(Struct):
    """The function that a tool call of an earlier answer calls."""

    name: str
    arguments: Any = "{}"  # a JSON value, or a text that is to be decoded from JSON


class _ToolCall(Struct):
    """A tool call of an earlier answer."""

    function: _CalledFunction
    id: str | None = None
    type: str | None = None


class _Message(Struct):
    """A message of a chat, as OpenAI's API writes it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None
    name: str | None = None
    tool_call_id: str | None = None

    def message(self, place: str) -> Message:
        """Return the message for the chat template: the role "developer" becomes "system", and only answers keep their
        `reasoning_content`. place: names the message in errors, such as "messages[0]". Raise RequestError without
        content and tool calls, for content that is not text, calls of another role, or arguments that are not JSON."""
        calls = tuple(self._call(call, f"{place}.tool_calls") for call in self.tool_calls or ())
        if calls and self.role != "assistant":
            raise RequestError(f"{place}: only the assistant calls tools", param=f"{place}.tool_calls")
        reasoning = self.reasoning_content if self.role == "assistant" else None
        role = "system" if self.role == "developer" else self.role
        content = "" if self.content is None and calls else self._text(f"{place}.content")
        return Message(role, content, reasoning, calls, self.name, self.tool_call_id)

    def _text(self, place: str) -> str:
        """Return the content as one text; the elements of a list are joined. Raise RequestError if it is no text."""
        parts = self.content if isinstance(self.content, list) else [_Part("text", self.content)]
        for part in parts:
            if part.type not in (None, "text", "refusal"):
                raise RequestError(f"{place}: this model reads text only, not {part.type!r}", param=place)
            if part.text is None and part.refusal is None:
                raise RequestError(f"{place}: expected a text", param=place)
        return "".join(part.refusal or "" if part.text is None else part.text for part in parts)

    @staticmethod
    def _call(call: _ToolCall, place: str) -> JsonObject:
        """Return a tool call as rows have it, its arguments decoded if given as text; RequestError if not JSON."""
        arguments = call.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise RequestError(f"{place}: function.arguments is not JSON ({error})", param=place) from None
        given = {name: value for name in ("id", "type") if (value := getattr(call, name)) is not None}
        return {**given, "function": {"name": call.function.name, "arguments": arguments}}


class _Function(Struct):
    """The part of a tool's definition that is checked; the chat template gets all of it."""

    name: str


class _Tool(Struct):
    """A tool's definition, as far as it is checked."""

    function: _Function
    type: Literal["function"] = "function"


class _JsonSchema(Struct, forbid_unknown_fields=True):
    """The schema of response_format; name, description and strict have no effect: answers always follow it."""

    schema: JsonObject
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class _ResponseFormat(Struct, forbid_unknown_fields=True):
    """The field response_format: any text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None

    def schema(self) -> str:
        """Return the JSON schema, in JSON; empty for a text. Raise RequestError if the type needs one and has none."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            problem = "expected a schema" if self.type == "json_schema" else f"does not go with type {self.type}"
            raise RequestError(f"response_format.json_schema: {problem}", param="response_format.json_schema")
        if self.type == "text":
            return ""
        return json.dumps(self.json_schema.schema if self.json_schema else {"type": "object"})


class _TemplateOptions(Struct, forbid_unknown_fields=True, frozen=True):
    """The field chat_template_kwargs: whether to think, or None for the chat template's default."""

    enable_thinking: bool | None = None


class _ChatBody(_Body, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[_Message], Meta(max_length=1000)] = []
    tools: list[JsonObject] = []  # passed to the chat template as they are
    tool_choice: Literal["auto", "none"] = "auto"
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0
    response_format: _ResponseFormat | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    chat_template_kwargs: _TemplateOptions = _TemplateOptions()


class _CompletionBody(_Body, kw_only=True):
    """The body of /v1/completions."""

    prompt: Text | Annotated[list[Text], Meta(min_length=1, max_length=MAX_CHOICES)]
    logprobs: TopLogprobs | None = None


def chat_request(body: Any, models: Sequence[str]) -> Request:
    """Read the body of /v1/chat/completions, decoded from JSON. models: the names allowed in the field model. Raise
    RequestError, naming the field, for an unusable value, an unknown field or an unknown model (status 404)."""
    chat = _read(body, _ChatBody, models)
    if not any(message.role in ("user", "tool") for message in chat.messages):
        problem = "there is no user message to answer" if chat.messages else "expected at least one message"
        raise RequestError(f"messages: {problem}", param="messages")
    if chat.top_logprobs and not chat.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    _convert(chat.tools, list[_Tool], "tools")
    logprobs = chat.top_logprobs if chat.logprobs else None
    tools = () if chat.tool_choice == "none" else tuple(chat.tools)
    schema = chat.response_format.schema() if chat.response_format else ""
    if schema and (tools or chat.chat_template_kwargs.enable_thinking):
        problem = "JSON goes neither with tools nor with thinking"
        raise RequestError(f"response_format: {problem}", param="response_format")
    request = chat.request(logprobs=logprobs, max_tokens=chat.max_completion_tokens or chat.max_tokens)
    return replace(
        request,
        sampling=replace(request.sampling, json_schema=schema),
        messages=tuple(message.message(f"messages[{i}]") for i, message in enumerate(chat.messages)),
        tools=tools,
        think=False if schema else chat.chat_template_kwargs.enable_thinking,
        truncate=chat.truncation == "auto",
    )


def completion_request(body: Any, models: Sequence[str]) -> Request:
    """Read the body of /v1/completions; arguments and errors are those of `chat_request`."""
    completion = _read(body, _CompletionBody, models)
    prompts = (completion.prompt,) if isinstance(completion.prompt, str) else tuple(completion.prompt)
    max_tokens = completion.max_tokens or 16  # OpenAI's default for completions
    return replace(completion.request(logprobs=completion.logprobs, max_tokens=max_tokens), prompts=prompts)


BodyT = TypeVar("BodyT", bound=_Body)
Converted = TypeVar("Converted")


def _read(body: Any, kind: type[BodyT], models: Sequence[str]) -> BodyT:
    """Convert a body to the type `kind`, without fields that are null (they get their default) or in `LABELS`. Raise
    RequestError for a body that is no JSON object, an unknown field, an unfit value, or a model not in `models`."""
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    for name in body:
        if name not in LABELS and name not in kind.__struct_fields__:
            raise RequestError(f"unknown field {name!r}", param=name)
    fields = {name: value for name, value in body.items() if value is not None and name not in LABELS}
    read = _convert(fields, kind)
    if read.model is not None and read.model not in models:
        message = f"no model {read.model!r} here; there is {', '.join(models)}"
        raise RequestError(message, param="model", status=404, code="model_not_found")
    return read


def _convert(value: Any, kind: type[Converted], place: str = "") -> Converted:
    """Convert a value decoded from JSON. If it does not fit, raise a RequestError that names the field at fault and
    says what was expected. place: the field that the value is from; empty for the whole body."""
    try:
        return convert_record(value, kind)
    except msgspec.ValidationError as error:
        below = re.search(r" - at (?:`key` in )?`\$\.?(.*)`$", str(error))
        name = re.search(r"(?:missing required|unknown) field `(.*?)`", str(error))
        param = place + (below[1] if below else "")
        if re.split(r"\W", param)[0] in _Unsupported.__struct_fields__:
            raise RequestError(f"{param} is not supported here: leave it out", param=param) from None
        problem = explain(error).removeprefix("a key of ").removeprefix(f"{below[1]}: " if below else "")
        if choices := _CHOICES.get(re.sub(r"\[\d+\]", "", param)):
            problem = re.sub("invalid enum value", f"expected {choices}, not", problem)
        problem = re.sub(r"`([a-z |]+)`", lambda match: _in_words(match[1]), problem)
        problem = problem.replace("a number that's a multiple of 1.0", "a whole number")
        message = f"{param}: {problem}" if param else problem
        raise RequestError(message, param=".".join(filter(None, (param, name and name[1])))) from None


def _in_words(types: str) -> str:
    """Return the types that msgspec joins, such as "float | null", in words ("a number"); null only if it is alone."""
    names = types.split(" | ")
    return " or ".join(_TYPES.get(name, name) for name in names if name != "null" or len(names) == 1)
