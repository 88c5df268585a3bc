"""Parsing of jsonl lines. One line becomes a `Document`, a `Conversation` or a `Pair`, or raises `BadRow`. Each line is
parsed independently of all others.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from mmdata.errors import InputError
from mmdata.io.lines import Line, iter_lines
from mmdata.io.records import JsonObject

REASONS = {  # reason why a row is left out -> explanation and remedy, shown to the user
    "bad UTF-8": "the line is not UTF-8 text; save the file as UTF-8",
    "not json": "the line is not one JSON value; look for a cut line, a missing comma or quote",
    "not an object": 'a row is a JSON object such as {"text": "…"}',
    "lone surrogate": r"half of an escape pair such as \ud83d\ude00 stands alone; fix the program that wrote the file",
    "unknown fields": "a row has `text`, `conversations` or `messages`, or `chosen` and `rejected`",
    "another kind": "the file's other rows are of another kind; keep each kind in its own file",
    "prompt only": "the row has a prompt without an answer (data for reinforcement learning); mm packs answered rows",
    "wrong types": "a field is not of the type its schema names",
    "unusable weight": "`weight`, `train` or `loss` of a message is 1 or true (trained), or 0 or false (not trained)",
    "no messages": "the list of messages is empty",
    "empty content": "a message or text holds nothing but whitespace",
    "unknown role": "roles are system, user, assistant and tool (ShareGPT: human, gpt, observation, function_call)",
    "roles out of order": "user and assistant take turns, beginning with the user; tool answers follow the assistant",
    "no assistant": "no message is the assistant's, so there is nothing to train on",
    "last turn not the assistant's": "the conversation ends without an answer",
    "chosen equal to rejected": "the two sides are equal, so there is no preference to learn",
    "different prompts": "the two sides differ before the first reply",
    "no place in the template": "the tokenizer's chat template leaves out a message or tool call; use a template with tools",
    "template refuses": "the tokenizer's chat template raised an error on the row",
    "template cannot be cut": "with this template and tokenizer the assistant's tokens cannot be told exactly from the others",
    "no trained token": "no token of the row would be trained on",
    "too long": "the row does not fit --max-len; take a larger one",
}

# Reasons why options such as --dedup leave out a row that is valid in itself.
DUPLICATE, NEAR_DUPLICATE, OVERLAP = "duplicate", "near duplicate", "overlaps an excluded text"
SCREENED = {
    DUPLICATE: "an earlier row has the same content",
    NEAR_DUPLICATE: "an earlier row has nearly the same content",
    OVERLAP: "the row's text also stands in a file given with --exclude",
}
HELP = REASONS | SCREENED

# Reasons that depend on the tokenizer or the options. Rows left out for them do not count as bad in `check_budget`.
OF_THE_RUN = frozenset(
    {"too long", "no place in the template", "template refuses", "template cannot be cut", *SCREENED}
)
DEFAULT_MAX_BAD = 0.05  # without --max-bad, a larger share of bad rows is an error
FEW_BAD_ROWS = 100  # without --max-bad, this number of bad rows is never an error, however small the file

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
# Marks around documents in the texts of pretraining files: those of MiniMind's first tokenizer and of its later ones.
_MARKS = tuple(  # opening mark, closing mark, and a pattern that matches a closing mark followed by an opening one
    (opening, closing, re.compile(re.escape(closing) + r"\s*" + re.escape(opening)))
    for opening, closing in (("<s>", "</s>"), ("<|im_start|>", "<|im_end|>"))
)
PLACEHOLDER = "无"  # the last answer in MiniMind's rlaif files (prompts for reinforcement learning)
_MAX_DEPTH = 64  # nesting of tools and tool calls; far above any schema, far below Python's recursion limit
LOOK_AT = 100  # number of lines at the beginning of a file from which its kind is determined
# An escape of half of a surrogate pair: \ud800 to \udfff.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Document:
    """A text for pretraining, which may contain several documents between marks; see `split_documents`."""

    text: str


class Message(NamedTuple):
    """One message of a conversation.

    role: "system", "user", "assistant" or "tool".
    content: may be empty in an answer with tool calls or reasoning, and in system and tool messages.
    reasoning_content: the thoughts before an answer; None if the row has none.
    tool_calls: the functions that an answer calls, as JSON objects. Arguments given as JSON text are decoded.
    name: the name of the speaker or of the tool. tool_call_id: the call that a tool message answers; None without.
    weight: 0 if the row says that the message is not to be trained on; 1 otherwise.
    """

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[JsonObject, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: int = 1

    @property
    def has_extras(self) -> bool:
        """Whether the message says more than a role and a content."""
        return self[2:] != _NO_EXTRAS


_NO_EXTRAS = (None, (), None, None, 1)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation whose messages are in a valid order and end with an answer.

    messages: at least a user message and an answer. tools: definitions of functions, as JSON objects.
    """

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen (preferred) and a rejected conversation with equal tools, which first differ in the assistant's
    messages.
    """

    chosen: Conversation
    rejected: Conversation

    @property
    def num_shared(self) -> int:
        """The number of leading messages that are equal on both sides: the messages of the prompt."""
        sides = zip(self.chosen.messages, self.rejected.messages, strict=False)
        return next(
            (i for i, (a, b) in enumerate(sides) if a != b),
            min(map(len, (self.chosen.messages, self.rejected.messages))),
        )


Row = Document | Conversation | Pair


class BadRow(ValueError):
    """Raised for a row that cannot be used.

    reason: a key of HELP, by which bad rows are counted. detail: what was found, and where in the row; may be empty.
    """

    def __init__(self, reason: str, detail: str = ""):
        assert reason in HELP, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def parse_row(raw: bytes, kind: str | None = None, *, extra_keys: Counter[str] | None = None) -> Row:
    """Parse one line (without its newline). Raises BadRow if it is not a valid row, or not of the given kind.

    kind: "document", "conversation", "pair" or None (any). extra_keys: counts unknown keys, which are ignored. If a key
    occurs twice in an object, the last value is used.
    """
    fields = _load(raw)
    if type(fields) is not dict:
        raise BadRow("not an object", f"found {_json_type(fields)}")
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


def row_hash(row: Row) -> bytes:
    """Return the SHA-256 digest (32 bytes) of a row's content. It does not depend on white space, on the order of keys,
    or on which names for keys and roles the file uses.
    """
    return hashlib.sha256(_canonical(row)).digest()


def check_budget(
    counts: Mapping[str, int],
    num_rows: int,
    max_bad: float | None = None,
    per_reason: Mapping[str, float] | None = None,
) -> None:
    """Raise InputError if too many rows of a file or dataset are bad.

    counts: the number of bad rows by reason. num_rows: the number of all rows.
    max_bad: the largest allowed share of bad rows, in [0, 1]. Reasons in OF_THE_RUN are not counted. None allows
    DEFAULT_MAX_BAD of the rows, or FEW_BAD_ROWS rows if that is more.
    per_reason: reason -> the largest allowed share of rows with this reason, in addition to `max_bad`.
    """
    bad = {reason: count for reason, count in counts.items() if reason not in OF_THE_RUN and count}
    num_bad = sum(bad.values())
    allowed = max(DEFAULT_MAX_BAD * num_rows, FEW_BAD_ROWS) if max_bad is None else max_bad * num_rows
    if num_bad > allowed:
        max_bad = DEFAULT_MAX_BAD if max_bad is None else max_bad
        reason = max(bad, key=lambda r: bad[r])
        raise InputError(
            f"{num_bad:,} of {num_rows:,} rows cannot be used (allowed: {max_bad:.2%}); most: {counts[reason]:,} {reason}",
            f"{REASONS[reason]}; or raise --max-bad",
        )
    for reason, share in (per_reason or {}).items():
        if counts.get(reason, 0) > share * num_rows:
            raise InputError(
                f"{counts[reason]:,} of {num_rows:,} rows: {reason} (allowed: {share:.2%})",
                f"{HELP[reason]}; or raise --max-bad for this reason",
            )


def split_documents(text: str) -> list[str]:
    """Split a pretraining text at the marks <s>…</s> or <|im_start|>…<|im_end|>, and return its documents without the
    marks. Blank documents are left out, so the list may be empty.

    The marks count only if the text begins with an opening mark, and a closing mark is at its end or before another
    opening mark, with only white space between them. (A text that was truncated has no closing mark at its end.) A mark
    elsewhere is part of the text, and a text without such marks is the only document, unchanged.
    """
    stripped = text.strip()
    for opening, closing, between in _MARKS:
        if stripped.startswith(opening):
            body = stripped.removeprefix(opening)
            parts = between.split(body) if opening in body else [body]
            if len(parts) > 1 or stripped.endswith(closing):
                parts[-1] = parts[-1].removesuffix(closing)
                return [part for part in parts if part and not part.isspace()]
    return [text]


def join_documents(documents: Sequence[str]) -> str:
    """Put <s> and </s> around each document, but not around one alone: the inverse of `split_documents`."""
    opening, closing, _ = _MARKS[0]
    return documents[0] if len(documents) == 1 else "".join(f"{opening}{one}{closing}" for one in documents)


def texts_of(row: Row) -> Iterator[str]:
    """Yield all texts of a row: the documents, or for each message its content, reasoning, tool calls (as JSON), name and
    tool call id, then the tools (as JSON). For a pair, the messages that both sides share and the tools are yielded once.
    """
    if isinstance(row, Document):
        yield from split_documents(row.text)
    elif isinstance(row, Pair):
        yield from texts_of(row.chosen)
        yield from texts_of(Conversation(row.rejected.messages[row.num_shared :]))
    else:
        for message in row.messages:
            yield message.content
            if message.reasoning_content:
                yield message.reasoning_content
            if message.tool_calls:
                yield json.dumps(message.tool_calls, ensure_ascii=False)
            yield from filter(None, (message.name, message.tool_call_id))
        if row.tools:
            yield json.dumps(row.tools, ensure_ascii=False)


def num_characters(row: Row) -> int:
    """Return the number of characters of a row's contents and reasoning, without tools, tool calls and what the chat
    template adds. The messages that both sides of a pair share are counted once.
    """
    if isinstance(row, Document):
        return len(row.text)
    if isinstance(row, Conversation):
        return _num_characters(row, 0)
    return _num_characters(row.chosen, 0) + _num_characters(row.rejected, row.num_shared)


def _num_characters(conversation: Conversation, begin: int) -> int:
    return sum(len(m.content) + len(m.reasoning_content or "") for m in conversation.messages[begin:])


def _load(raw: bytes) -> Any:
    """Return the same value or error as `_load_strictly`, but use orjson where possible, because it is faster."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _load_strictly(raw)
    return value if _is_exact(value) else _load_strictly(raw)


def _is_exact(value: Any, levels: int = _MAX_DEPTH) -> bool:
    """Return whether a value from orjson is certain to be what Python's json gives. It is not if it contains a float,
    because orjson turns large integers into floats, or if it is nested deeper than `levels`.
    """
    kind = type(value)
    if kind is str:
        return True
    if kind is dict:
        value = value.values()
    elif kind is not list:
        return kind is not float
    for item in value:  # noqa: SIM110 - half the time of all()
        if type(item) is not str and not (levels and _is_exact(item, levels - 1)):
            return False
    return True


def _load_strictly(raw: bytes) -> Any:
    """Return the JSON value of one line, parsed by Python's json. Raises BadRow if the line is not UTF-8 or not JSON,
    contains NaN, Infinity or half of a surrogate pair, or exceeds Python's limits on nesting and on digits.
    """
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise BadRow("not json", "nested too deep") from None
    except ValueError as error:  # JSONDecodeError, NaN, or an integer with too many digits
        raise BadRow("not json", str(error)[:200]) from None
    if b"\\u" in raw and _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("lone surrogate", f"found \\u{ord(error.object[error.start]):04x}") from None
        except RecursionError:
            raise BadRow("not json", "nested too deep") from None
    return value


def _refuse_constant(name: str) -> None:
    """Raise ValueError: the JSON decoder calls this for NaN and Infinity."""
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


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
        raise BadRow("wrong types", f"{where}: found {_json_type(value)}, expected a string")
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
        raise BadRow("wrong types", f"{where}: found {_json_type(value)}, expected a list of messages")
    if not value:
        raise BadRow("no messages", where)
    messages = []
    tools: tuple[JsonObject, ...] = ()
    for number, item in enumerate(value, 1):
        if type(item) is not dict:
            raise BadRow("wrong types", f"message {number}: found {_json_type(item)}, expected an object")
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
        raise BadRow("wrong types", f"message {number}: role: found {_json_type(name)}, expected a string")
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
                raise BadRow("wrong types", f"message {number}: {key}: found {_json_type(text)}, expected a string")
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
    raise BadRow("wrong types", f"message {number}: content: found {_json_type(content)}, expected a string")


def objects_of(value: Any, where: str) -> tuple[JsonObject, ...]:
    """Return tools or tool calls as a tuple of JSON objects, from a list of objects, one object, or a string with the
    JSON of either. Raises BadRow for anything else, or if it is nested deeper than _MAX_DEPTH levels.

    where: the name of the field, for errors.
    """
    if type(value) is str:
        value = _from_text(value, where)
    if type(value) is dict:
        value = [value]
    if type(value) is not list or not all(type(item) is dict for item in value):
        raise BadRow("wrong types", f"{where}: found {_json_type(value)}, expected a list of objects")
    if _is_deep(value, _MAX_DEPTH):
        raise BadRow("wrong types", f"{where}: nested deeper than {_MAX_DEPTH} levels")
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
        return _load(text.encode("utf-8"))
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
        raise BadRow("wrong types", f"system: found {_json_type(system)}, expected a string")
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


def _canonical(row: Row) -> bytes:
    """Return the bytes of which `row_hash` is the digest. Each string is preceded by its length, so that different rows
    never give the same bytes. `columns.Conversations.hashes` makes the same bytes for many rows.
    """
    if isinstance(row, Document):
        return b"document " + row.text.encode()
    if isinstance(row, Pair):
        chosen, rejected = _canonical(row.chosen), _canonical(row.rejected)
        return b"pair %d:%b%b" % (len(chosen), chosen, rejected)
    messages = "".join([f"{m.role} {counted(m.content)}{canonical_calls(m)}" for m in row.messages])
    return f"conversation {messages}{canonical_tools(row.tools)}".encode()


def counted(text: str) -> str:
    """Return the text preceded by its number of UTF-8 bytes and a colon."""
    return f"{len(text.encode())}:{text}"


def canonical_calls(message: Message) -> str:
    """Return what a message says besides role and content in the form that is hashed; "" if that is nothing."""
    if not message.has_extras:
        return ""
    named = zip(
        ("reasoning", "name", "id"), (message.reasoning_content, message.name, message.tool_call_id), strict=True
    )
    reasoning, *others = ["" if text is None else f" {key} {counted(text)}" for key, text in named]
    calls = f" calls {counted(_SORTED.encode(message.tool_calls))}" if message.tool_calls else ""
    return "".join((reasoning, calls, *others, "" if message.weight else " weight 0"))


def canonical_tools(tools: tuple[JsonObject, ...]) -> str:
    """Return tools in the form that is hashed: JSON with sorted keys, preceded by its length; "" without tools."""
    return f" tools {counted(_SORTED.encode(tools))}" if tools else ""


_SORTED = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


def _json_type(value: Any) -> str:
    """Return the name of a JSON value's type for error messages, such as "a list"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
