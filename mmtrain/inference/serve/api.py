"""OpenAI's request bodies -> what to generate; what was generated -> their response bodies. No server and no model here.

Every field is honoured or refused: what this server cannot do is an error that names the field, never ignored. Fields
that only label a request (`user`, `metadata`, …) are accepted. Beyond OpenAI's, sampling takes `top_k`, `min_p` and
`repetition_penalty`, under the names other local servers use.
"""

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdata.encode.template import Message

MAX_CHOICES = 16  # `n`
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 1000
ROLES = ("system", "developer", "user", "assistant", "tool")


class RequestError(Exception):
    """A request that cannot be served, as the client is told: HTTP status, sentence, the field it is about."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients expect it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. `messages` for a chat, else the texts in `prompts`; `logprobs` None: none, else how many
    alternatives a token gets."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    prompts: tuple[str, ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]
    n: int
    logprobs: int | None
    stream: bool
    include_usage: bool
    think: bool | None = None  # None: as the template does
    truncate: bool = False  # the oldest whole turns leave a conversation that is too long, instead of an error

    @property
    def is_chat(self) -> bool:
        """Whether messages are answered, or texts go on."""
        return bool(self.messages)


_LABELS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
_COMMON = {
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop", "n", "logprobs",
    "stream", "stream_options",
}  # fmt: skip
_CHAT = {
    "messages", "tools", "tool_choice", "max_completion_tokens", "top_logprobs", "response_format", "truncation",
    "chat_template_kwargs",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # accepted only where they ask for nothing
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}


def chat_request(body: Any, models: Sequence[str]) -> Request:
    """Read the body of /v1/chat/completions; RequestError names the field that cannot be used."""
    fields = _fields(body, _COMMON | _CHAT, models)
    if fields.get("response_format") not in (None, {"type": "text"}):
        raise RequestError("only response_format {'type': 'text'} is supported", param="response_format")
    choice = fields.get("tool_choice", "auto")
    if choice not in (None, "auto", "none"):
        raise RequestError("tool_choice must be 'auto' or 'none': a call cannot be forced", param="tool_choice")
    tools = () if choice == "none" else _tools(fields.get("tools"))
    logprobs = _boolean(fields, "logprobs", False)
    top = _number(fields, "top_logprobs", 0, low=0, high=MAX_TOP_LOGPROBS, whole=True)
    if top and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    longest = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    return Request(
        messages=_messages(fields.get("messages")),
        tools=tools,
        prompts=(),
        max_tokens=_max_tokens(fields, longest),
        logprobs=int(top) if logprobs else None,
        think=_thinking(fields.get("chat_template_kwargs")),
        truncate=_truncates(fields.get("truncation")),
        **_shared(fields),
    )


def completion_request(body: Any, models: Sequence[str]) -> Request:
    """Read the body of /v1/completions; RequestError names the field that cannot be used."""
    fields = _fields(body, _COMMON | {"prompt"}, models)
    prompt = fields.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(text, str) and text for text in prompts):
        raise RequestError("prompt must be a text or a list of texts, none of them empty", param="prompt")
    if len(prompts) > MAX_CHOICES:
        raise RequestError(f"at most {MAX_CHOICES} prompts a request", param="prompt")
    wanted = fields.get("logprobs")
    if isinstance(wanted, bool):
        raise RequestError("logprobs is a number here: how many alternatives a token gets", param="logprobs")
    top = _number(fields, "logprobs", 0, low=0, high=MAX_TOP_LOGPROBS, whole=True)
    return Request(
        messages=(),
        tools=(),
        prompts=tuple(prompts),
        max_tokens=_max_tokens(fields, "max_tokens") or 16,  # OpenAI's default here
        logprobs=int(top) if wanted is not None else None,
        **_shared(fields),
    )


# --- fields -----------------------------------------------------------------------------------------------------------


def _fields(body: Any, known: set[str], models: Sequence[str]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {_kind(body)}")
    for name, value in body.items():
        if name in _NEUTRAL and name not in known:
            if value not in _NEUTRAL[name]:
                raise RequestError(f"{name} is not supported here: leave it out", param=name)
        elif name not in known and name not in _LABELS:
            raise RequestError(f"unknown field {name!r}", param=name)
    model = body.get("model")
    if model is not None and model not in models:
        raise RequestError(
            f"no model {model!r} here; there is {', '.join(models)}", param="model", status=404, code="model_not_found"
        )
    return body


def _shared(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What chats and completions have in common."""
    options = fields.get("stream_options")
    stream = _boolean(fields, "stream", False)
    if options is not None and (
        not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}
    ):
        raise RequestError("stream_options takes include_usage", param="stream_options")
    if options is not None and not stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    seed = _number(fields, "seed", None, low=-(2**63), high=2**64 - 1, whole=True)
    return {
        "temperature": _number(fields, "temperature", 1.0, low=0, high=2),
        "top_p": _number(fields, "top_p", 1.0, low=0, high=1),
        "top_k": int(_number(fields, "top_k", 0, low=0, high=2**31, whole=True)),
        "min_p": _number(fields, "min_p", 0.0, low=0, high=1),
        "repetition_penalty": _number(fields, "repetition_penalty", 1.0, low=0.01, high=10),
        "seed": None if seed is None else int(seed),
        "stop": _stops(fields.get("stop")),
        "n": int(_number(fields, "n", 1, low=1, high=MAX_CHOICES, whole=True)),
        "stream": stream,
        "include_usage": bool((options or {}).get("include_usage")),
    }


def _number(
    fields: Mapping[str, Any], name: str, otherwise: Any, *, low: float, high: float, whole: bool = False
) -> Any:
    value = fields.get(name)
    if value is None:
        return otherwise
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise RequestError(f"{name} must be {kind} from {low:g} to {high:g}, not {_brief(value)}", param=name)
    return value


def _max_tokens(fields: Mapping[str, Any], name: str) -> int | None:
    value = _number(fields, name, None, low=1, high=2**31, whole=True)
    return None if value is None else int(value)


def _boolean(fields: Mapping[str, Any], name: str, otherwise: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {_brief(value)}", param=name)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
        raise RequestError(f"stop must be texts of 1 to {MAX_STOP_LENGTH} characters", param="stop")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"at most {MAX_STOPS} stop texts", param="stop")
    return tuple(stops)


def _thinking(value: Any) -> bool | None:
    """`enable_thinking` of chat_template_kwargs, as other local servers name it."""
    known = (
        isinstance(value, dict)
        and set(value) <= {"enable_thinking"}
        and type(value.get("enable_thinking", True)) is bool
    )
    if value is not None and not known:
        raise RequestError("chat_template_kwargs takes enable_thinking: true or false", param="chat_template_kwargs")
    return (value or {}).get("enable_thinking")


def _truncates(value: Any) -> bool:
    if value not in (None, "disabled", "auto"):
        raise RequestError("truncation must be 'auto' or 'disabled'", param="truncation")
    return value == "auto"


# --- messages and tools -----------------------------------------------------------------------------------------------


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list of at least one message", param="messages")
    if len(value) > MAX_MESSAGES:
        raise RequestError(f"at most {MAX_MESSAGES:,} messages", param="messages")
    messages = tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))
    if not any(message.role in ("user", "tool") for message in messages):
        raise RequestError("there is no user message to answer", param="messages")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RequestError(f"{where} must be an object with role and content, not {_kind(item)}", param=where)
    role = item.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {_brief(role)}; roles are {', '.join(ROLES)}", param=f"{where}.role")
    calls = tuple(_calls(item.get("tool_calls"), f"{where}.tool_calls"))
    if calls and role != "assistant":
        raise RequestError(f"{where}: only the assistant calls tools", param=f"{where}.tool_calls")
    content = _content(item.get("content"), f"{where}.content", may_be_none=bool(calls))
    reasoning = item.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise RequestError(f"{where}.reasoning_content must be a text", param=f"{where}.reasoning_content")
    return Message(
        "system" if role == "developer" else role, content, reasoning if role == "assistant" else None, calls
    )


def _content(value: Any, where: str, *, may_be_none: bool) -> str:
    """A text, or a list of text parts, in OpenAI's form."""
    if value is None and may_be_none:
        return ""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    texts = []
    for part in parts:
        if isinstance(part, dict) and part.get("type") not in (None, "text", "refusal"):
            raise RequestError(f"{where}: this model reads text only, not {_brief(part['type'])}", param=where)
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise RequestError(f"{where} must be a text, not {_kind(text)}", param=where)
        texts.append(text)
    said = "".join(texts)
    try:
        said.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where} holds half a character (a lone surrogate)", param=where) from None
    return said


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RequestError(f"{where} must be a list", param=where)
    calls = []
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}: each call needs function.name and function.arguments", param=where)
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                raise RequestError(
                    f"{where}: function.arguments is no JSON: {_brief(arguments)}", param=where
                ) from None
        calls.append({"name": function["name"], "arguments": arguments})
    return calls


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RequestError("tools must be a list", param="tools")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        is_function = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not is_function or tool.get("type", "function") != "function":
            raise RequestError(f"tools[{i}] must be a function with a name", param=f"tools[{i}]")
    return tuple(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _brief(value: Any) -> str:
    written = json.dumps(value, ensure_ascii=True, default=str)
    return written if len(written) <= 60 else written[:57] + "…"


# --- response bodies --------------------------------------------------------------------------------------------------


def new_id(is_chat: bool) -> str:
    """A name for a response."""
    return f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"


def tool_call(call: Mapping[str, str], index: int | None = None) -> dict[str, Any]:
    """A call of the model's, in OpenAI's form; with `index` as a streamed delta has it."""
    made = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": dict(call)}
    return made if index is None else {"index": index, **made}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Counts of tokens."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def response(request: Request, id: str, model: str, choices: list[dict[str, Any]], counts: dict[str, int]) -> dict:
    """The body of an answer that is not streamed."""
    kind = "chat.completion" if request.is_chat else "text_completion"
    return {"id": id, "object": kind, "created": int(time.time()), "model": model, "choices": choices, "usage": counts}


def chunk(
    request: Request, id: str, created: int, model: str, choices: list[dict], counts: dict | None = None
) -> dict[str, Any]:
    """One event of a streamed answer."""
    kind = "chat.completion.chunk" if request.is_chat else "text_completion"
    body = {"id": id, "object": kind, "created": created, "model": model, "choices": choices}
    return {**body, "usage": counts} if request.include_usage else body
