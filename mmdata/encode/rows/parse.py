"""Parsing of lines to rows, and the kind of a file."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmdata.encode.rows.load import MAX_DEPTH, json_type, load
from mmdata.encode.rows.reasons import REASONS, BadRow
from mmdata.encode.rows.row import Conversation, Document, Message, Pair, Row
from mmdata.errors import InputError
from mmdata.io.lines import Line, iter_lines
from mmdata.io.records import JsonObject

_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "developer": "system", "human": "user", "gpt": "assistant", "observation": "tool", "function": "tool",
    "function_call": "assistant",
}  # fmt: skip
_PLAIN_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "role", "content", "from", "value", "reasoning_content", "tool_calls", "tools", "functions", "name", "tool_call_id",
    "weight", "train", "loss",
}  # fmt: skip
_ROW_KEYS = {
    "document": {"text"},
    "conversation": {"conversations", "messages", "system", "tools", "functions"},
    "pair": {"chosen", "rejected", "prompt", "conversations", "messages", "system", "tools", "functions"},
}
PLACEHOLDER = "无"  # the last answer in MiniMind's rlaif files (prompts for reinforcement learning)
LOOK_AT = 100  # number of lines at the beginning of a file from which its kind is determined


def parse_row(raw: bytes, kind: str | None = None, *, extra_keys: Counter[str] | None = None) -> Row:
    """Parse one line (without its newline). Raises BadRow if it is not a valid row, or not of the given kind.

    kind: "document", "conversation", "pair" or None (any). extra_keys: counts unknown keys, which are ignored. If a key
    occurs twice in an object, the last value is used.
    """
    fields = load(raw)
    if type(fields) is not dict:
        raise BadRow("not an object", f"found {json_type(fields)}")
    own_kind = _kind_of(fields)
    if kind is not None and own_kind != kind:
        raise BadRow("another kind", f"found a {own_kind}, expected a {kind}")
    extra = fields.keys() - _ROW_KEYS[own_kind]
    if "gt" in extra and own_kind == "conversation":
        raise BadRow("prompt only", "found `gt`, the answer a reward is computed from")
    if extra_keys is not None:
        extra_keys.update(extra)
    if own_kind == "document":
        return Document(_text(fields["text"], "text"))
    return (_conversation if own_kind == "conversation" else _pair)(fields, extra_keys)


def find_kind(path: Path) -> str:
    """Return the kind of rows in a file, from its first LOOK_AT lines. Raises InputError if the file cannot be read or
    is empty, if none of these lines is a valid row, or if kinds are mixed.
    """
    return kind_of_lines(islice(iter_lines(path), LOOK_AT), path)


def kind_of_lines(lines: Iterable[Line], path: Path) -> str:
    """Return the kind ("document", "conversation" or "pair") of at least 90% of the valid rows among these lines.
    Raises InputError if there are no lines or no valid rows, or if no kind has 90%.

    path: the file, for error messages.
    """
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    first = None
    for line in lines:
        first = first or line
        try:
            kinds[kind_of(parse_row(line.raw))] += 1
        except BadRow as bad:
            reasons[bad.reason] += 1
    if first is None:
        raise InputError(
            f"{path} is empty", "give a file with one JSON object a line; `mm fetch` downloads the known ones"
        )
    if not kinds:
        reason = reasons.most_common(1)[0][0]
        raise InputError(f"{path}: none of its first {reasons.total()} rows can be used ({reason})", REASONS[reason])
    kind, count = kinds.most_common(1)[0]
    if count < 0.9 * kinds.total():
        counts = ", ".join(f"{n} {k}" for k, n in kinds.most_common())
        raise InputError(
            f"{path} mixes kinds of rows: {counts} in its first rows", "put each kind in a file of its own"
        )
    return kind


def kind_of(row: Row) -> str:
    """Return the kind of a row: "document", "conversation" or "pair"."""
    return {Document: "document", Conversation: "conversation", Pair: "pair"}[type(row)]


def _kind_of(fields: JsonObject) -> str:
    """Return the kind of a row by its keys. Raises BadRow if no key tells it."""
    if "chosen" in fields or "rejected" in fields:
        return "pair"
    if "conversations" in fields or "messages" in fields:
        return "conversation"
    if "text" in fields:
        return "document"
    if "prompt" in fields:
        raise BadRow("prompt only", "found `prompt` without `chosen` and `rejected`")
    raise BadRow("unknown fields", "found " + (", ".join(f"`{key}`" for key in list(fields)[:5])[:200] or "no key"))


def _text(value: Any, where: str) -> str:
    """Return `value` if it is a string that is not blank, else raise BadRow with the field's name, `where`."""
    if type(value) is not str:
        raise BadRow("wrong types", f"{where}: found {json_type(value)}, expected a string")
    if not value or value.isspace():
        raise BadRow("empty content", where)
    return value


def _conversation(fields: JsonObject, extra_keys: Counter[str] | None) -> Conversation:
    """Return a row's conversation. Raises BadRow if it is not valid, or has a placeholder as its last answer."""
    raw_messages = fields["conversations"] if "conversations" in fields else fields["messages"]
    messages, tools = _messages(raw_messages, "conversation", extra_keys)
    if len(fields) > 1:
        messages, tools = _with_row_fields(fields, messages, tools)
    if messages[-1].content == PLACEHOLDER and messages[-1].role == "assistant":
        raise BadRow("prompt only", f"the last answer is the placeholder {PLACEHOLDER}")
    _check_turns(messages, "")
    return Conversation(messages, tools)


def _pair(fields: JsonObject, extra_keys: Counter[str] | None) -> Pair:
    """Return the pair in a row's fields. Raises BadRow if it is not valid.

    A side is a list of all its messages, or it is a reply: a list without a user message, a single message, or a
    string. The messages under `conversations`, `messages` or `prompt` are put before a reply.
    """
    shared: tuple[Message, ...] = ()
    tools: tuple[JsonObject, ...] = ()
    key = next((key for key in ("conversations", "messages", "prompt") if key in fields), None)
    if key:
        shared, tools = _messages(fields[key], key, extra_keys, reply_role="user")
    sides = []
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise BadRow("wrong types", f"`{name}` is missing")
        messages, side_tools = _messages(fields[name], name, extra_keys, reply_role="assistant")
        if not any(message.role == "user" for message in messages):
            messages = shared + messages
        messages, side_tools = _with_row_fields(fields, messages, side_tools or tools)
        _check_turns(messages, f"{name}: ")
        sides.append(Conversation(messages, side_tools))
    pair = Pair(*sides)
    _check_sides(pair)
    return pair


def _check_sides(pair: Pair) -> None:
    """Raise BadRow if both sides are equal, have different tools, or first differ in a message not the assistant's."""
    chosen, rejected = pair.chosen.messages, pair.rejected.messages
    if pair.chosen == pair.rejected:
        raise BadRow("chosen equal to rejected")
    first = pair.num_shared
    if pair.chosen.tools != pair.rejected.tools:
        raise BadRow("different prompts", "the tools differ")
    if first == min(len(chosen), len(rejected)) or not chosen[first].role == rejected[first].role == "assistant":
        raise BadRow("different prompts", f"message {first + 1} differs, and is not the assistant's on both sides")


def _messages(
    value: Any, where: str, extra_keys: Counter[str] | None, *, reply_role: str | None = None
) -> tuple[tuple[Message, ...], tuple[JsonObject, ...]]:
    """Return the messages in a JSON list, and the tools that are defined in them. Raises BadRow if the list is empty, a
    field has a wrong type, or a role is unknown. Blank contents and the order of roles are not checked here.

    where: the name of the field, for errors. reply_role: if given, a single message may take the place of the list, as
    an object or as a string, which becomes the content of a message with this role.
    """
    if reply_role and type(value) is str:
        value = [{"role": reply_role, "content": value}]
    elif reply_role and type(value) is dict:
        value = [value]
    if type(value) is not list:
        raise BadRow("wrong types", f"{where}: found {json_type(value)}, expected a list of messages")
    if not value:
        raise BadRow("no messages", where)
    messages = []
    tools: tuple[JsonObject, ...] = ()
    for number, item in enumerate(value, 1):
        if type(item) is not dict:
            raise BadRow("wrong types", f"message {number}: found {json_type(item)}, expected an object")
        content = item.get("content")
        if len(item) == 2 and type(content) is str and item.get("role") in _PLAIN_ROLES:
            messages.append(Message(item["role"], content))  # a faster path for most messages
            continue
        messages.append(_message(item, number))
        if len(item) > 2:
            if item_tools := item.get("tools") or item.get("functions"):
                tools += objects_of(item_tools, f"message {number}: tools")
            if extra_keys is not None:
                extra_keys.update(item.keys() - _MESSAGE_KEYS)
    return tuple(messages), tools


def _message(item: JsonObject, number: int) -> Message:
    """Return a message from an object with `role` and `content` or ShareGPT's `from` and `value`. Raises BadRow if a
    field has a wrong type or the role is unknown. number: the 1-based number of the message, for errors.
    """
    name = item["role"] if "role" in item else item.get("from")
    if type(name) is not str:
        raise BadRow("wrong types", f"message {number}: role: found {json_type(name)}, expected a string")
    if name not in _ROLES:
        raise BadRow("unknown role", f'message {number}: found "{name[:50]}"')
    content = item["content"] if "content" in item else item.get("value")
    if type(content) is not str:
        content = _content_of_parts(content, number, may_be_none="tool_calls" in item)
    calls, texts, weight = (), {}, 1
    if len(item) > 2:
        texts = {key: item.get(key) for key in ("reasoning_content", "name", "tool_call_id")}
        for key, text in texts.items():
            if text is not None and type(text) is not str:
                raise BadRow("wrong types", f"message {number}: {key}: found {json_type(text)}, expected a string")
        if item.get("tool_calls"):
            calls = calls_of(item["tool_calls"], f"message {number}: tool_calls")
        weight = _weight(item, number)
    if name == "function_call":
        content, calls = "", calls_of(content, f"message {number}: function_call")
    return Message(_ROLES[name], content, tool_calls=calls, weight=weight, **texts)


def _weight(item: JsonObject, number: int) -> int:
    """Return whether a message may be trained on, as 0 or 1; 1 if it does not say. Raises BadRow for other values."""
    given = {key: item[key] for key in ("weight", "train", "loss") if item.get(key) is not None}
    for key, value in given.items():
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise BadRow("unusable weight", f"message {number}: {key}: found {json.dumps(value)[:50]}, expected 0 or 1")
    if len(set(given.values())) > 1:
        raise BadRow("unusable weight", f"message {number}: {' and '.join(given)} differ")
    return int(next(iter(given.values()), 1))


def _content_of_parts(content: Any, number: int, *, may_be_none: bool) -> str:
    """Join a list of text parts; null becomes "" if `may_be_none`. Raises BadRow for anything else."""
    if content is None and may_be_none:
        return ""
    if type(content) is list and all(
        type(p) is dict and p.get("type") == "text" and type(p.get("text")) is str for p in content
    ):
        return "".join(part["text"] for part in content)
    raise BadRow("wrong types", f"message {number}: content: found {json_type(content)}, expected a string")


def objects_of(value: Any, where: str) -> tuple[JsonObject, ...]:
    """Return tools or tool calls as a tuple of JSON objects, from a list of objects, one object, or a string with the
    JSON of either. Raises BadRow for anything else, or if it is nested deeper than MAX_DEPTH levels.

    where: the name of the field, for errors.
    """
    if type(value) is str:
        value = _from_text(value, where)
    if type(value) is dict:
        value = [value]
    if type(value) is not list or not all(type(item) is dict for item in value):
        raise BadRow("wrong types", f"{where}: found {json_type(value)}, expected a list of objects")
    if _is_deep(value, MAX_DEPTH):
        raise BadRow("wrong types", f"{where}: nested deeper than {MAX_DEPTH} levels")
    return tuple(value)


def calls_of(value: Any, where: str) -> tuple[JsonObject, ...]:
    """Return tool calls as `objects_of` does, with arguments that are JSON text decoded. Raises BadRow also for a call
    without a name, and for arguments that are a string but not JSON.
    """
    calls = []
    for call in objects_of(value, where):
        function = call.get("function") or call
        if type(function) is not dict or type(function.get("name")) is not str:
            raise BadRow("wrong types", f"{where}: a call without a name")
        if type(text := function.get("arguments")) is str:
            decoded = {**function, "arguments": _from_text(text or "{}", f"{where}: arguments")}
            call = decoded if function is call else {**call, "function": decoded}
        calls.append(call)
    return tuple(calls)


def _from_text(text: str, where: str) -> Any:
    """Return the value of a JSON text. Raises BadRow if it is none."""
    try:
        return load(text.encode("utf-8"))
    except BadRow as bad:
        raise BadRow("wrong types", f"{where}: a string that is {bad.reason}") from None


def _is_deep(value: Any, levels: int) -> bool:
    """Return whether a JSON value has more than `levels` levels of nested lists and objects."""
    if type(value) is dict:
        value = value.values()
    elif type(value) is not list:
        return False
    if not levels:
        return True
    for item in value:  # noqa: SIM110 - half the time of any()
        if type(item) is not str and _is_deep(item, levels - 1):
            return True
    return False


def _with_row_fields(
    fields: JsonObject, messages: tuple[Message, ...], tools: tuple[JsonObject, ...]
) -> tuple[tuple[Message, ...], tuple[JsonObject, ...]]:
    """Add a row's `system` to the messages if the first is not a system message, and its `tools` or `functions` if
    there are no tools yet. Raises BadRow if a field has a wrong type.
    """
    system = fields.get("system")
    if system is not None and type(system) is not str:
        raise BadRow("wrong types", f"system: found {json_type(system)}, expected a string")
    if system and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    row_tools = fields.get("tools") or fields.get("functions")
    if row_tools and not tools:
        tools = objects_of(row_tools, "tools")
    return messages, tools


def _is_blank(message: Message) -> bool:
    return not message.tool_calls and not message.content.strip() and not (message.reasoning_content or "").strip()


def _check_turns(messages: Sequence[Message], where: str) -> None:
    """Raise BadRow if the roles are not in the order user, assistant, user, assistant, …, ending with the assistant, or
    if a user message or an answer is blank (no tool calls, and only white space as content and reasoning). Tool
    messages may follow an answer, and are then followed by another answer. System messages may be anywhere.

    where: a text that is put before the detail of errors, such as "chosen: ".
    """
    last = ""
    for number, message in enumerate(messages, 1):
        role = message.role
        if role == "system":
            continue
        if last not in _MAY_FOLLOW[role]:
            before = f"after {last}" if last else "at the beginning"
            raise BadRow("roles out of order", f"{where}message {number} is from {role} {before}")
        if role != "tool" and (not message.content or message.content.isspace()) and _is_blank(message):
            raise BadRow("empty content", f"{where}message {number} ({role})")
        last = role
    if last != "assistant":
        has_one = any(message.role == "assistant" for message in messages)
        raise BadRow("last turn not the assistant's" if has_one else "no assistant", where.rstrip(": "))


# role -> the roles that may come directly before it; "" is the beginning of the conversation
_MAY_FOLLOW = {"user": ("", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
