"""Reading of messages, tools and tool calls from the values of a row. All forms of a message become a `Message`."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mmdata.encode.rows.load import MAX_DEPTH, json_type, load
from mmdata.encode.rows.reasons import BadRow
from mmdata.encode.rows.row import Message
from mmdata.encode.rows.schemas import MEDIA, Columns, is_metadata
from mmdata.io.records import JsonObject

_PLAIN_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = ("human", "gpt", "system", "observation")
_CALL_ROLES = ("function_call", "tool_call")  # the content is a tool call, as JSON
ROLES = {role: role for role in _PLAIN_ROLES} | {
    "developer": "system",
    "human": "user", "prompter": "user",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool", "ipython": "tool",
    **dict.fromkeys(_CALL_ROLES, "assistant"),
}  # fmt: skip
EMPTY: tuple[Any, ...] = ("", [], {})  # values that say nothing, like null
_TEXT_PARTS = ("text", "input_text", "output_text")
_WEIGHTS = {"weight": 1, "train": 1, "loss": 1, "masked": 0}  # field -> its value for a message that is trained on
# A speaker at the beginning of a line in a transcript, as in Anthropic's hh-rlhf files.
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


Messages = tuple[tuple[Message, ...], tuple[JsonObject, ...]]  # messages, and the tools that are defined in them


class MessageReader:
    """Reads the messages of a row. keys: collects the keys of messages that no field is read from."""

    def __init__(self, columns: Columns):
        self._columns = columns
        self.keys: list[str] = []

    def read(self, value: Any, where: str, reply_role: str | None = None) -> Messages:
        """Return the messages in a JSON list, or in a transcript, and the tools that are defined in them. Blank
        contents and the order of roles are not checked. An item of the list is a message, or a question and its answer,
        as an object or two strings. where: the column, for errors. reply_role: a single message may take the place of
        the list, as an object or as a string, the content of a message with this role. Raises BadRow if there are no
        messages, a field has a wrong type, a role is unknown, or a content is no text."""
        tools: tuple[JsonObject, ...] = ()
        if type(value) is not list:
            value, tools = self._list_of(value, where, reply_role)
        if not value:
            raise BadRow("no messages", where)
        messages = []
        is_usual = not self._columns.mapping
        for number, item in enumerate(value, 1):
            if type(item) is dict:
                if is_usual and len(item) == 2:  # a faster path for most messages
                    if type(item.get("content")) is str and item.get("role") in _PLAIN_ROLES:
                        messages.append(Message(item["role"], item["content"]))
                        continue
                    if type(item.get("value")) is str and item.get("from") in _SHAREGPT_ROLES:
                        messages.append(Message(ROLES[item["from"]], item["value"]))
                        continue
                tools += self._add(item, number, messages)
            elif type(item) is list and len(item) == 2:
                messages += [
                    Message("user", self._content(item[0], number)),
                    Message("assistant", self._content(item[1], number)),
                ]
            else:
                raise BadRow("wrong types", f"message {number}: found {json_type(item)}, expected an object")
        return tuple(messages), tools

    def _list_of(self, value: Any, where: str, reply_role: str | None) -> tuple[list[Any], tuple[JsonObject, ...]]:
        """Return the list of messages that another JSON value stands for, and its tools: a transcript, a JSON text, one
        message, or an object {"messages": […], "tools": […]}, as in OpenAI's preference files."""
        tools: tuple[JsonObject, ...] = ()
        if type(value) is str:
            value = self._of_text(value, where, reply_role)
        elif type(value) is dict and "messages" in value:
            tools = objects_of(value.get("tools") or [], f"{where}: tools")
            self.keys += [key for key in value if key not in ("messages", "tools")]
            value = value["messages"]
        elif type(value) is dict and reply_role:
            value = [value]
        if type(value) is not list:
            expected = "a string or a list of messages" if reply_role else "a list of messages"
            raise BadRow("wrong types", f"{where}: found {json_type(value)}, expected {expected}")
        return value, tools

    @staticmethod
    def _of_text(value: str, where: str, reply_role: str | None) -> Any:
        """Return the list of messages that a string stands for: a transcript, JSON, or the content of one message."""
        if is_transcript(value):
            turns = transcript(value)
            if reply_role == "user" and not turns[-1]["content"]:
                del turns[-1]  # a prompt that ends with the header of the answer
            return turns
        if reply_role:
            return [{"role": reply_role, "content": value}]
        return _from_text(value, where) if value.lstrip().startswith("[") else value

    def _add(self, item: JsonObject, number: int, messages: list[Message]) -> tuple[JsonObject, ...]:
        """Append the message, or the question and answer, in an object to `messages`. Return the tools it defines."""
        found, others = self._columns.of_message(item)
        if "role" not in found:
            turn, others = self._columns.of_turn(item)
            if len(turn) == 2:
                messages.append(Message("user", self._content(item[turn["prompt"]], number)))
                messages.append(Message("assistant", self._content(item[turn["completion"]], number)))
                self._ignore(item, others)
                return ()
            raise BadRow("wrong types", f"message {number}: no role, found " + (", ".join(item)[:100] or "no key"))
        if others:
            if media := [key for key in others if key in MEDIA and item[key]]:
                raise BadRow("content is not text", f"message {number}: `{media[0]}`")
            is_empty = found.keys().isdisjoint(("content", "tool_calls", "reasoning_content"))
            if is_empty and not all(map(is_metadata, others)):
                listed = ", ".join(f"`{key}`" for key in (*found.values(), *others))[:200]
                raise BadRow("missing field", f"message {number}: no content, found {listed}")
            self._ignore(item, others)
        messages.append(self._message(item, found, number))
        if "tools" in found and item[found["tools"]]:
            return objects_of(item[found["tools"]], f"message {number}: tools")
        return ()

    def _message(self, item: JsonObject, found: Mapping[str, str], number: int) -> Message:
        """Return a message from an object. Raises BadRow if a field has a wrong type or the role is unknown. found: field
        (MESSAGE_FIELDS) -> its key. number: of the message, from 1, for errors."""
        name = item[found["role"]]
        if type(name) is not str:
            raise BadRow("wrong types", f"message {number}: role: found {json_type(name)}, expected a string")
        if name not in ROLES:
            name = name.lower()
            if name not in ROLES:
                raise BadRow("unknown role", f'message {number}: found "{name[:50]}"')
        content = item[found["content"]] if "content" in found else None
        calls = None
        if name in _CALL_ROLES:
            content, calls = "", calls_of(content, f"message {number}: {name}")
        elif type(content) is not str:
            content = self._content(content, number)
        if len(found) == 2 and "content" in found and not calls:
            return Message(ROLES[name], content)
        reasoning = _string(item, found, "reasoning_content", number) if "reasoning_content" in found else None
        speaker = _string(item, found, "name", number) or None if "name" in found else None
        call_id = _string(item, found, "tool_call_id", number) or None if "tool_call_id" in found else None
        if "tool_calls" in found and item[found["tool_calls"]]:
            calls = joined(calls or (), calls_of(item[found["tool_calls"]], f"message {number}: tool_calls"))
        weight = 1 if _WEIGHTS.keys().isdisjoint(found) else _weight(item, found, number)
        return Message(ROLES[name], content, reasoning, calls or (), speaker, call_id, weight)

    def _content(self, value: Any, where: int | str) -> str:
        """Return a content as text: a string, null (empty), a text part, or a list of strings and text parts, joined.
        where: the number of its message, or its column, for errors. Raises BadRow otherwise."""
        if type(value) is str:
            return value
        if value is None:
            return ""
        where = f"message {where}: content" if isinstance(where, int) else where
        if type(value) is dict and "text" in value:
            value = [value]
        if type(value) is not list:
            raise BadRow("wrong types", f"{where}: found {json_type(value)}, expected a string")
        texts = []
        for part in value:
            text = part
            if type(part) is dict:
                if (form := part.get("type") or ("text" if "text" in part else None)) not in _TEXT_PARTS:
                    raise BadRow("content is not text", f"{where}: a part of type {json.dumps(form)[:50]}")
                self._ignore(part, part.keys() - {"type", "text"})
                text = part.get("text")
            if text is None and part is not None:
                continue
            if type(text) is not str:
                raise BadRow("wrong types", f"{where}: a part with {json_type(text)}, expected a string")
            texts.append(text)
        return "".join(texts)

    def _ignore(self, item: JsonObject, keys: Iterable[str]) -> None:
        """Note the keys of a message or content part that say something and are not read."""
        self.keys += [key for key in keys if item[key] is not None and item[key] not in EMPTY]


def is_transcript(text: str) -> bool:
    """Return whether a text is a transcript: it begins with "Human:", and has an answer after "Assistant:"."""
    first = _SPEAKER.match(text)
    return bool(first) and first[1] == "Human" and "\n\nAssistant:" in text


def transcript(text: str) -> list[JsonObject]:
    """Return the messages of a transcript, as objects; white space around each is removed."""
    _, *parts = _SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _string(item: JsonObject, found: Mapping[str, str], field: str, number: int) -> str:
    text = item[found[field]]
    if type(text) is not str:
        raise BadRow("wrong types", f"message {number}: {field}: found {json_type(text)}, expected a string")
    return text


def _weight(item: JsonObject, found: Mapping[str, str], number: int) -> int:
    """Return whether a message may be trained on, as 0 or 1. Raises BadRow if a value is neither, or they differ."""
    given = {field: item[found[field]] for field in _WEIGHTS if field in found}
    for key, value in given.items():
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise BadRow("unusable weight", f"message {number}: {key}: found {json.dumps(value)[:50]}, expected 0 or 1")
    weights = {int(value == _WEIGHTS[key]) for key, value in given.items()}
    if len(weights) > 1:
        raise BadRow("unusable weight", f"message {number}: {' and '.join(given)} differ")
    return weights.pop()


def objects_of(value: Any, where: str) -> tuple[JsonObject, ...]:
    """Return tools or tool calls as a tuple of JSON objects, from a list of objects, one object, null, or the JSON text
    of one of these. Raises BadRow for anything else, or if it is nested deeper than MAX_DEPTH levels. where: the field, for
    errors."""
    if type(value) is str:
        value = _from_text(value, where)
    if type(value) is dict:
        value = [value]
    if value is None:
        return ()
    if type(value) is not list or not all(type(item) is dict for item in value):
        raise BadRow("wrong types", f"{where}: found {json_type(value)}, expected a list of objects")
    if _is_deep(value, MAX_DEPTH):
        raise BadRow("wrong types", f"{where}: nested deeper than {MAX_DEPTH} levels")
    return tuple(value)


def joined(*several: tuple[JsonObject, ...]) -> tuple[JsonObject, ...]:
    """Return the objects of several tuples, such as tools, in one; equal ones once."""
    first, *others = several
    for objects in others:
        first += tuple(each for each in objects if each not in first)
    return first


def calls_of(value: Any, where: str) -> tuple[JsonObject, ...]:
    """Return tool calls as `objects_of` does, with JSON text in arguments decoded, and no arguments as an empty object.
    Arguments may be named `parameters`, as Llama 3 writes them. Raises BadRow also for a call without a name, and for
    arguments that are another string."""
    calls = []
    for call in objects_of(value, where):
        function = call.get("function") or call
        if type(function) is not dict or type(function.get("name")) is not str:
            raise BadRow("wrong types", f"{where}: a call without a name")
        if "parameters" in function and "arguments" not in function:
            named = {"arguments" if key == "parameters" else key: value for key, value in function.items()}
            call, function = (named if function is call else {**call, "function": named}), named
        if (text := function.get("arguments")) is None or type(text) is str:
            decoded = {**function, "arguments": _from_text(text or "{}", f"{where}: arguments")}
            call = decoded if function is call else {**call, "function": decoded}
        calls.append(call)
    return tuple(calls)


def _from_text(text: str, where: str) -> Any:
    """Return the value of a JSON text. Raises BadRow if it is none."""
    try:
        return load(text.encode("utf-8"))
    except BadRow as bad:
        if bad.reason == "repeated key":
            raise BadRow(bad.reason, f"{where}: {bad.detail}") from None
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
