"""Parsing of jsonl lines: one line becomes a `Document`, a `Conversation` or a `Pair`, or raises `BadRow` with the reason.

A line is parsed on its own; nothing in it affects the rows beside it.
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
from mmdata.io.lines import is_seekable as is_seekable
from mmdata.io.records import JsonObject

KINDS = ("document", "conversation", "pair")

REASONS = {  # reason -> what helps
    "bad UTF-8": "the line is not UTF-8 text; save the file as UTF-8",
    "not json": "the line is not one JSON value; look for a cut line, a missing comma or quote",
    "not an object": 'a row is a JSON object such as {"text": "…"}',
    "lone surrogate": r"half of an escape pair such as \ud83d\ude00 stands alone; fix the program that wrote the file",
    "unknown fields": "a row has `text`, `conversations` or `messages`, or `chosen` and `rejected`",
    "another kind": "the file's other rows are of another kind; keep each kind in its own file",
    "prompt only": "the row has a prompt without an answer (data for reinforcement learning); mm packs answered rows",
    "wrong types": "a field is not of the type its schema names",
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

# Reasons of options such as --dedup; the row itself is valid.
DUPLICATE, NEAR_DUPLICATE, OVERLAP = "duplicate", "near duplicate", "overlaps an excluded text"
SCREENED = {
    DUPLICATE: "an earlier row has the same content",
    NEAR_DUPLICATE: "an earlier row has nearly the same content",
    OVERLAP: "the row's text also stands in a file given with --exclude",
}
HELP = REASONS | SCREENED

# Reasons that depend on the tokenizer or the options; they do not count as broken data.
OF_THE_RUN = frozenset(
    {"too long", "no place in the template", "template refuses", "template cannot be cut", *SCREENED}
)
DEFAULT_MAX_BAD = 0.05  # the share of bad rows that ends a run, without --max-bad
FEW_BAD_ROWS = 100  # this many bad rows never end a run without --max-bad, however small the file

_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "developer": "system", "human": "user", "gpt": "assistant", "observation": "tool", "function": "tool",
    "function_call": "assistant",
}  # fmt: skip
_PLAIN_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "role", "content", "from", "value", "reasoning_content", "tool_calls", "tools", "functions",
}  # fmt: skip
_ROW_KEYS = {
    "document": {"text"},
    "conversation": {"conversations", "messages", "system", "tools", "functions"},
    "pair": {"chosen", "rejected", "prompt", "conversations", "messages", "system", "tools", "functions"},
}
# Marks between documents that pretraining files have in their text: those of the seed era, and later ones.
_MARKS = tuple(  # opening mark, closing mark, and a pattern for the end of one document and the beginning of the next
    (opening, closing, re.compile(re.escape(closing) + r"\s*" + re.escape(opening)))
    for opening, closing in (("<s>", "</s>"), ("<|im_start|>", "<|im_end|>"))
)
PLACEHOLDER = "无"  # in place of the answer in MiniMind's rlaif files
_MAX_DEPTH = 64  # nesting of tools and tool calls; far above any schema, far below Python's recursion limit
LOOK_AT = 100  # rows from which a file's kind is determined
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Document:
    """A pretraining text, which may hold several documents: see `split_documents`."""

    text: str


class Message(NamedTuple):
    """`role` is system, user, assistant or tool; `reasoning_content` is None where the row has none."""

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in a valid order, the last of them the assistant's, and the tools that the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations that differ first in a message of the assistant."""

    chosen: Conversation
    rejected: Conversation

    @property
    def num_shared(self) -> int:
        """Number of leading messages that both sides share: the prompt."""
        sides = zip(self.chosen.messages, self.rejected.messages, strict=False)
        return next(
            (i for i, (a, b) in enumerate(sides) if a != b),
            min(map(len, (self.chosen.messages, self.rejected.messages))),
        )


Row = Document | Conversation | Pair


class BadRow(ValueError):
    """A row that cannot be used: `reason` is a key of HELP; `detail` says what was found, and where in the row."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in HELP, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def parse_row(raw: bytes, kind: str | None = None, *, extra_keys: Counter[str] | None = None) -> Row:
    """Parse one line; BadRow with the reason when it is no valid row, or with `kind` one of another kind.

    Unknown keys are ignored, and counted in `extra_keys`. Of a key that stands twice, the last value counts.
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
    """The kind of a file's first rows; InputError when none can be read, or when kinds are mixed."""
    return kind_of_lines(islice(iter_lines(path), LOOK_AT), path)


def kind_of_lines(lines: Iterable[Line], path: Path) -> str:
    """The kind of at least nine in ten of the valid rows among these lines; InputError when there is none."""
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
    """The name of a row's kind, one of KINDS."""
    return {Document: "document", Conversation: "conversation", Pair: "pair"}[type(row)]


def row_hash(row: Row) -> bytes:
    """sha256 (32 bytes) of the row's content: equal for equal rows, whatever their key order, spacing or schema."""
    return hashlib.sha256(_canonical(row)).digest()


def check_budget(
    counts: Mapping[str, int],
    num_rows: int,
    max_bad: float | None = None,
    per_reason: Mapping[str, float] | None = None,
) -> None:
    """InputError when more than the share `max_bad` of `num_rows` is bad, or more of one reason than its own share.

    counts: rows by reason. Reasons in OF_THE_RUN count only against a share of their own. Without `max_bad`, the limit is
    DEFAULT_MAX_BAD, and at least FEW_BAD_ROWS rows.
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
    """The documents of a pretraining text: split at its marks when it is wrapped in them, else the whole text.

    A text is wrapped when it begins with an opening mark and has a closing one at its end or before another opening one
    (texts that were cut off lack the last). A mark inside a sentence is text.
    """
    stripped = text.strip()
    for opening, closing, between in _MARKS:
        if stripped.startswith(opening):
            parts = between.split(stripped.removeprefix(opening))
            if len(parts) > 1 or stripped.endswith(closing):
                parts[-1] = parts[-1].removesuffix(closing)
                return [part for part in parts if part and not part.isspace()]
    return [text]


def join_documents(documents: Sequence[str]) -> str:
    """The inverse of `split_documents`; a single document gets no marks."""
    opening, closing, _ = _MARKS[0]
    return documents[0] if len(documents) == 1 else "".join(f"{opening}{one}{closing}" for one in documents)


def texts_of(row: Row) -> Iterator[str]:
    """All text of a row, in order: documents, contents, reasoning, and tool calls and tools as JSON; a pair's prompt once."""
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
        if row.tools:
            yield json.dumps(row.tools, ensure_ascii=False)


def num_characters(row: Row) -> int:
    """Characters of contents and reasoning, without template and tools; a pair's prompt counts once."""
    if isinstance(row, Document):
        return len(row.text)
    if isinstance(row, Conversation):
        return _num_characters(row, 0)
    return _num_characters(row.chosen, 0) + _num_characters(row.rejected, row.num_shared)


def _num_characters(conversation: Conversation, begin: int) -> int:
    return sum(len(m.content) + len(m.reasoning_content or "") for m in conversation.messages[begin:])


def _load(raw: bytes) -> Any:
    """The JSON value of one line as `_load_strictly` reads it; by orjson, which is faster, where both read the same."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _load_strictly(raw)
    return value if _is_exact(value) else _load_strictly(raw)


def _is_exact(value: Any, levels: int = _MAX_DEPTH) -> bool:
    """Whether orjson reads this as json does: orjson makes floats of large integers, and nests less deep."""
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
    """The JSON value of one line: without NaN, Infinity or lone surrogates, and within Python's limits of digits and depth."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise BadRow("not json", "nested too deep") from None
    except ValueError as error:  # JSONDecodeError, NaN, or an integer past Python's digit limit
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
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _kind_of(fields: JsonObject) -> str:
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
    if type(value) is not str:
        raise BadRow("wrong types", f"{where}: found {_json_type(value)}, expected a string")
    if not value or value.isspace():
        raise BadRow("empty content", where)
    return value


def _conversation(fields: JsonObject, extra_keys: Counter[str] | None) -> Conversation:
    raw_messages = fields["conversations"] if "conversations" in fields else fields["messages"]
    messages, tools = _messages(raw_messages, "conversation", extra_keys)
    if len(fields) > 1:
        messages, tools = _with_row_fields(fields, messages, tools)
    if messages[-1].content == PLACEHOLDER and messages[-1].role == "assistant":
        raise BadRow("prompt only", f"the last answer is the placeholder {PLACEHOLDER}")
    _check_turns(messages, "")
    return Conversation(messages, tools)


def _pair(fields: JsonObject, extra_keys: Counter[str] | None) -> Pair:
    """Sides are whole message lists, or replies to a shared `prompt`, `conversations` or `messages`."""
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
    """BadRow when the sides are equal, have different tools, or differ first elsewhere than in an answer."""
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
    """Messages and tools of a list; with `reply_role`, a string or a single message stands for a list of one."""
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
            messages.append(Message(item["role"], content))  # most messages
            continue
        messages.append(_message(item, number))
        if len(item) > 2:
            if item_tools := item.get("tools") or item.get("functions"):
                tools += objects_of(item_tools, f"message {number}: tools")
            if extra_keys is not None:
                extra_keys.update(item.keys() - _MESSAGE_KEYS)
    return tuple(messages), tools


def _message(item: JsonObject, number: int) -> Message:
    name = item["role"] if "role" in item else item.get("from")
    if type(name) is not str:
        raise BadRow("wrong types", f"message {number}: role: found {_json_type(name)}, expected a string")
    if name not in _ROLES:
        raise BadRow("unknown role", f'message {number}: found "{name[:50]}"')
    content = item["content"] if "content" in item else item.get("value")
    if type(content) is not str:
        content = _content_of_parts(content, number, may_be_none="tool_calls" in item)
    reasoning, calls = None, ()
    if len(item) > 2:
        reasoning = item.get("reasoning_content")
        if reasoning is not None and type(reasoning) is not str:
            raise BadRow("wrong types", f"message {number}: reasoning_content: found {_json_type(reasoning)}")
        if item.get("tool_calls"):
            calls = calls_of(item["tool_calls"], f"message {number}: tool_calls")
    if name == "function_call":
        content, calls = "", calls_of(content, f"message {number}: function_call")
    return Message(_ROLES[name], content, reasoning, calls)


def _content_of_parts(content: Any, number: int, *, may_be_none: bool) -> str:
    """Content given as a list of text parts, or as null beside tool calls."""
    if content is None and may_be_none:
        return ""
    if type(content) is list and all(
        type(p) is dict and p.get("type") == "text" and type(p.get("text")) is str for p in content
    ):
        return "".join(part["text"] for part in content)
    raise BadRow("wrong types", f"message {number}: content: found {_json_type(content)}, expected a string")


def objects_of(value: Any, where: str) -> tuple[JsonObject, ...]:
    """Tools or tool calls: a list of objects or one object, as JSON or as a string of JSON. BadRow when they are none."""
    if type(value) is str:
        try:
            value = _load(value.encode("utf-8"))
        except BadRow as bad:
            raise BadRow("wrong types", f"{where}: a string that is {bad.reason}") from None
    if type(value) is dict:
        value = [value]
    if type(value) is not list or not all(type(item) is dict for item in value):
        raise BadRow("wrong types", f"{where}: found {_json_type(value)}, expected a list of objects")
    if _is_deep(value, _MAX_DEPTH):
        raise BadRow("wrong types", f"{where}: nested deeper than {_MAX_DEPTH} levels")
    return tuple(value)


def calls_of(value: Any, where: str) -> tuple[JsonObject, ...]:
    """Tool calls, each with a name, which may stand inside `function`. BadRow when they are none."""
    calls = objects_of(value, where)
    for call in calls:
        function = call.get("function") or call
        if type(function) is not dict or type(function.get("name")) is not str:
            raise BadRow("wrong types", f"{where}: a call without a name")
    return calls


def _is_deep(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested deeper than `levels`."""
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
    """Add the fields that a row may have beside its messages: `system`, and `tools` or `functions`."""
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
    """BadRow when roles do not follow user assistant (tool* assistant)* user …, with system messages anywhere."""
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


_MAY_FOLLOW = {"user": ("", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def _canonical(row: Row) -> bytes:
    """The row's content, each string preceded by its length, so that no two rows give the same bytes.

    `columns.Conversations.hashes` makes the same bytes for many rows.
    """
    if isinstance(row, Document):
        return b"document " + row.text.encode()
    if isinstance(row, Pair):
        chosen, rejected = _canonical(row.chosen), _canonical(row.rejected)
        return b"pair %d:%b%b" % (len(chosen), chosen, rejected)
    messages = "".join([f"{m.role} {counted(m.content)}{canonical_calls(m)}" for m in row.messages])
    return f"conversation {messages}{canonical_tools(row.tools)}".encode()


def counted(text: str) -> str:
    """A string preceded by its length in bytes."""
    return f"{len(text.encode())}:{text}"


def canonical_calls(message: Message) -> str:
    """The reasoning and tool calls of a message in the form that is hashed."""
    thought = message.reasoning_content
    reasoning = "" if thought is None else f" reasoning {counted(thought)}"
    return reasoning + (f" calls {counted(_SORTED.encode(message.tool_calls))}" if message.tool_calls else "")


def canonical_tools(tools: tuple[JsonObject, ...]) -> str:
    """The tools of a conversation in the form that is hashed, with sorted keys."""
    return f" tools {counted(_SORTED.encode(tools))}" if tools else ""


_SORTED = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
