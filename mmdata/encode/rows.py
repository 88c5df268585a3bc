"""One jsonl line in; `Document`, `Conversation` or `Pair` out, or a `BadRow` that names why not.

A line is judged on its own: whatever it holds, the rows beside it are read as if it were not there.
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

JsonObject = dict[str, Any]  # as it stands in a line, of any shape
KINDS = ("document", "conversation", "pair")

REASONS = {
    "bad UTF-8": "the line is not UTF-8 text; save the file as UTF-8",
    "not json": "the line is not one JSON value; look for a cut line, a missing comma or quote",
    "not an object": 'a row is a JSON object such as {"text": "…"}',
    "lone surrogate": r"half of a \ud800-style escape pair stands alone and is no character; repair what wrote it",
    "unknown fields": "a row has `text`, `conversations` or `messages`, or `chosen` and `rejected`",
    "another kind": "the file's other rows are of another kind; keep each kind in its own file",
    "prompt only": "the row asks without answering (data for reinforcement learning); mm packs answered rows",
    "wrong types": "a field is not of the type its schema names",
    "no messages": "the list of messages is empty",
    "empty content": "a message or text holds nothing but whitespace",
    "unknown role": "roles are system, user, assistant and tool (ShareGPT: human, gpt, observation, function_call)",
    "roles out of order": "user and assistant take turns, beginning with the user; tool answers follow the assistant",
    "no assistant": "no message is the assistant's, so there is nothing to train on",
    "last turn not the assistant's": "the conversation ends without an answer",
    "chosen equal to rejected": "the two sides say the same, so there is nothing to prefer",
    "different prompts": "the two sides differ before the first reply",
    "no place in the template": "the tokenizer's chat template leaves a message or tool call out; use a template with tools",
    "template refuses": "the tokenizer's chat template raised an error on the row",
    "template cannot be cut": "which tokens the assistant's are cannot be told exactly with this template and tokenizer",
    "no trained token": "no token of the row would be trained on",
    "too long": "the row does not fit --max-len; take a larger one",
}

# What a row is left out for when that is asked for: nothing is wrong with it.
DUPLICATE, NEAR_DUPLICATE, OVERLAP = "duplicate", "near duplicate", "overlaps an excluded text"
SCREENED = {
    DUPLICATE: "an earlier row says the same",
    NEAR_DUPLICATE: "an earlier row says nearly the same",
    OVERLAP: "the row says what a file given with --exclude says",
}
HELP = REASONS | SCREENED

# These say that a row does not fit the tokenizer, --max-len or what was asked for, not that the data is broken.
OF_THE_RUN = frozenset(
    {"too long", "no place in the template", "template refuses", "template cannot be cut", *SCREENED}
)
DEFAULT_MAX_BAD = 0.05  # the share of bad rows that ends a run unless it is told otherwise …
FEW_BAD_ROWS = 100  # … but so few never do: a small file with some bad rows is packed, and they are counted

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
# Boundaries that the authors of pretraining files wrote into the text: seed-era and later.
_MARKS = tuple(  # opening and closing mark, and how one document ends and the next begins
    (opening, closing, re.compile(re.escape(closing) + r"\s*" + re.escape(opening)))
    for opening, closing in (("<s>", "</s>"), ("<|im_start|>", "<|im_end|>"))
)
PLACEHOLDER = "无"  # stands for the answer in MiniMind's rlaif files
_MAX_DEPTH = 64  # of tools and tool calls; far above any schema, far below Python's recursion limit
LOOK_AT = 100  # rows that tell a file's kind
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Document:
    text: str


class Message(NamedTuple):
    """`role` is system, user, assistant or tool; `reasoning_content` is None where the row has none."""

    role: str
    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    chosen: Conversation
    rejected: Conversation

    @property
    def num_shared(self) -> int:
        """Leading messages both sides share: the prompt."""
        sides = zip(self.chosen.messages, self.rejected.messages, strict=False)
        return next(
            (i for i, (a, b) in enumerate(sides) if a != b),
            min(map(len, (self.chosen.messages, self.rejected.messages))),
        )


Row = Document | Conversation | Pair


class BadRow(ValueError):
    """A row that cannot be used: `reason` is a key of REASONS, `detail` says what was found where."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in HELP, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def parse_row(raw: bytes, kind: str | None = None, *, extra_keys: Counter[str] | None = None) -> Row:
    """Turn one line into a row; raises BadRow with the reason. With `kind`, a row of another kind is a BadRow too.

    Keys no schema knows are ignored, and counted in `extra_keys` when given. Of a key given twice the last stands.
    """
    found = _load(raw)
    if type(found) is not dict:
        raise BadRow("not an object", f"found {_json_type(found)}")
    is_kind = _kind_of(found)
    if kind is not None and is_kind != kind:
        raise BadRow("another kind", f"found a {is_kind}, expected a {kind}")
    extra = found.keys() - _ROW_KEYS[is_kind]
    if "gt" in extra and is_kind == "conversation":
        raise BadRow("prompt only", "found `gt`, the answer a reward is computed from")
    if extra_keys is not None:
        extra_keys.update(extra)
    if is_kind == "document":
        return Document(_text(found["text"], "text"))
    if is_kind == "conversation":
        return _conversation(found, extra_keys)
    return _pair(found, extra_keys)


def find_kind(path: Path) -> str:
    """Tell a file's row kind from its first rows; InputError when none can be read or kinds are mixed."""
    return kind_of_lines(islice(iter_lines(path), LOOK_AT), path)


def kind_of_lines(lines: Iterable[Line], path: Path) -> str:
    """The row kind at least nine in ten of these lines' readable rows have; InputError when there is none."""
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
        found = ", ".join(f"{n} {k}" for k, n in kinds.most_common())
        raise InputError(f"{path} mixes kinds of rows: {found} in its first rows", "put each kind in a file of its own")
    return kind


def kind_of(row: Row) -> str:
    """The kind's word for a row."""
    return {Document: "document", Conversation: "conversation", Pair: "pair"}[type(row)]


def row_hash(row: Row) -> bytes:
    """32-byte sha256 of what the row says: equal for equal rows, whatever their key order, spacing or schema."""
    return hashlib.sha256(_canonical(row)).digest()


def check_budget(
    counts: Mapping[str, int],
    num_rows: int,
    max_bad: float | None = None,
    per_reason: Mapping[str, float] | None = None,
) -> None:
    """Raise InputError when more than the share `max_bad` of `num_rows` is bad, or a reason passes its own share.

    Reasons that lie in the run's settings (OF_THE_RUN) count only against a share of their own. Without `max_bad` the
    default share holds, from FEW_BAD_ROWS on.
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
    """Documents of a pretraining text: split at its own marks when it is wrapped in them, else the whole text.

    Wrapped is a text that begins with an opening mark, and has a closing one at its end or before another opening one
    (rows cut off by their author lack the last). A mark inside a sentence is text.
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
    """A text that `split_documents` splits into these; a single document stands alone."""
    opening, closing, _ = _MARKS[0]
    return documents[0] if len(documents) == 1 else "".join(f"{opening}{one}{closing}" for one in documents)


def texts_of(row: Row) -> Iterator[str]:
    """Everything a row says, in order: documents, contents, reasoning, and tools and their calls as JSON."""
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
    """Characters of a row's own text: what people wrote, without template and tools; a pair's prompt counts once."""
    if isinstance(row, Document):
        return len(row.text)
    if isinstance(row, Conversation):
        return _num_characters(row, 0)
    return _num_characters(row.chosen, 0) + _num_characters(row.rejected, row.num_shared)


def _num_characters(conversation: Conversation, begin: int) -> int:
    return sum(len(m.content) + len(m.reasoning_content or "") for m in conversation.messages[begin:])


def _load(raw: bytes) -> Any:
    """JSON of one line, as `_load_strictly` reads it. orjson is asked first: what it reads, and this decides, is the same."""
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _load_strictly(raw)
    return found if _is_exact(found) else _load_strictly(raw)


def _is_exact(found: Any, levels: int = _MAX_DEPTH) -> bool:
    """Whether orjson is known to read it as json does: it makes floats of large integers, and has other limits of depth."""
    kind = type(found)
    if kind is str:
        return True
    if kind is dict:
        found = found.values()
    elif kind is not list:
        return kind is not float
    for item in found:  # noqa: SIM110 - half the time of all()
        if type(item) is not str and not (levels and _is_exact(item, levels - 1)):
            return False
    return True


def _load_strictly(raw: bytes) -> Any:
    """JSON of one line, strictly: no NaN or Infinity, no lone surrogates, and numbers and depth that Python can hold."""
    try:
        found = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("bad UTF-8", f"byte {error.start}: {error.reason}") from None
    except RecursionError:
        raise BadRow("not json", "nested too deep") from None
    except ValueError as error:  # JSONDecodeError, NaN, or an integer past Python's digit limit
        raise BadRow("not json", str(error)[:200]) from None
    if b"\\u" in raw and _SURROGATE.search(raw):
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("lone surrogate", f"found \\u{ord(error.object[error.start]):04x}") from None
        except RecursionError:
            raise BadRow("not json", "nested too deep") from None
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _kind_of(found: JsonObject) -> str:
    if "chosen" in found or "rejected" in found:
        return "pair"
    if "conversations" in found or "messages" in found:
        return "conversation"
    if "text" in found:
        return "document"
    if "prompt" in found:
        raise BadRow("prompt only", "found `prompt` without `chosen` and `rejected`")
    raise BadRow("unknown fields", "found " + (", ".join(f"`{key}`" for key in list(found)[:5])[:200] or "no key"))


def _text(found: Any, where: str) -> str:
    if type(found) is not str:
        raise BadRow("wrong types", f"{where}: found {_json_type(found)}, expected a string")
    if not found or found.isspace():
        raise BadRow("empty content", where)
    return found


def _conversation(found: JsonObject, extra_keys: Counter[str] | None) -> Conversation:
    raw_messages = found["conversations"] if "conversations" in found else found["messages"]
    messages, tools = _messages(raw_messages, "conversation", extra_keys)
    if len(found) > 1:
        messages, tools = _with_row_fields(found, messages, tools)
    if messages[-1].content == PLACEHOLDER and messages[-1].role == "assistant":
        raise BadRow("prompt only", f"the last answer is the placeholder {PLACEHOLDER}")
    _check_turns(messages, "")
    return Conversation(messages, tools)


def _pair(found: JsonObject, extra_keys: Counter[str] | None) -> Pair:
    """Sides are whole message lists, or replies to a shared `prompt`, `conversations` or `messages`."""
    shared: tuple[Message, ...] = ()
    tools: tuple[JsonObject, ...] = ()
    key = next((key for key in ("conversations", "messages", "prompt") if key in found), None)
    if key:
        shared, tools = _messages(found[key], key, extra_keys, reply_role="user")
    sides = []
    for name in ("chosen", "rejected"):
        if name not in found:
            raise BadRow("wrong types", f"`{name}` is missing")
        messages, side_tools = _messages(found[name], name, extra_keys, reply_role="assistant")
        if not any(message.role == "user" for message in messages):
            messages = shared + messages
        messages, side_tools = _with_row_fields(found, messages, side_tools or tools)
        _check_turns(messages, f"{name}: ")
        sides.append(Conversation(messages, side_tools))
    pair = Pair(*sides)
    _check_sides(pair)
    return pair


def _check_sides(pair: Pair) -> None:
    chosen, rejected = pair.chosen.messages, pair.rejected.messages
    if pair.chosen == pair.rejected:
        raise BadRow("chosen equal to rejected")
    first = pair.num_shared
    if pair.chosen.tools != pair.rejected.tools:
        raise BadRow("different prompts", "the tools differ")
    if first == min(len(chosen), len(rejected)) or not chosen[first].role == rejected[first].role == "assistant":
        raise BadRow("different prompts", f"message {first + 1} differs, and is not the assistant's on both sides")


def _messages(
    found: Any, where: str, extra_keys: Counter[str] | None, *, reply_role: str | None = None
) -> tuple[tuple[Message, ...], tuple[JsonObject, ...]]:
    """Messages and tools of a list; with `reply_role`, a string or a single message stands for a list of one."""
    if reply_role and type(found) is str:
        found = [{"role": reply_role, "content": found}]
    elif reply_role and type(found) is dict:
        found = [found]
    if type(found) is not list:
        raise BadRow("wrong types", f"{where}: found {_json_type(found)}, expected a list of messages")
    if not found:
        raise BadRow("no messages", where)
    messages = []
    tools: tuple[JsonObject, ...] = ()
    for number, item in enumerate(found, 1):
        if type(item) is not dict:
            raise BadRow("wrong types", f"message {number}: found {_json_type(item)}, expected an object")
        content = item.get("content")
        if len(item) == 2 and type(content) is str and item.get("role") in _PLAIN_ROLES:
            messages.append(Message(item["role"], content))  # nothing more to look at: so are most messages
            continue
        messages.append(_message(item, number))
        if len(item) > 2:
            given = item.get("tools") or item.get("functions")
            if given:
                tools += _objects(given, f"message {number}: tools")
            if extra_keys is not None:
                extra_keys.update(item.keys() - _MESSAGE_KEYS)
    return tuple(messages), tools


def _message(item: JsonObject, number: int) -> Message:
    said = item["role"] if "role" in item else item.get("from")
    role = _ROLES.get(said) if type(said) is str else None
    if role is None:
        if type(said) is str:
            raise BadRow("unknown role", f'message {number}: found "{said[:50]}"')
        raise BadRow("wrong types", f"message {number}: role: found {_json_type(said)}, expected a string")
    content = item["content"] if "content" in item else item.get("value")
    if type(content) is not str:
        content = _content_of_parts(content, number, may_be_none="tool_calls" in item)
    reasoning, calls = None, ()
    if len(item) > 2:
        reasoning = item.get("reasoning_content")
        if reasoning is not None and type(reasoning) is not str:
            raise BadRow("wrong types", f"message {number}: reasoning_content: found {_json_type(reasoning)}")
        if item.get("tool_calls"):
            calls = _calls(item["tool_calls"], f"message {number}: tool_calls")
    if said == "function_call":
        content, calls = "", _calls(content, f"message {number}: function_call")
    return Message(role, content, reasoning, calls)


def _content_of_parts(content: Any, number: int, *, may_be_none: bool) -> str:
    """Content given as a list of text parts, or as null beside tool calls."""
    if content is None and may_be_none:
        return ""
    if type(content) is list and all(
        type(p) is dict and p.get("type") == "text" and type(p.get("text")) is str for p in content
    ):
        return "".join(part["text"] for part in content)
    raise BadRow("wrong types", f"message {number}: content: found {_json_type(content)}, expected a string")


def _objects(found: Any, where: str) -> tuple[JsonObject, ...]:
    """Tools or tool calls: a list of objects or one object, as JSON or as a string of JSON."""
    if type(found) is str:
        try:
            found = _load(found.encode("utf-8"))
        except BadRow as bad:
            raise BadRow("wrong types", f"{where}: a string that is {bad.reason}") from None
    if type(found) is dict:
        found = [found]
    if type(found) is not list or not all(type(item) is dict for item in found):
        raise BadRow("wrong types", f"{where}: found {_json_type(found)}, expected a list of objects")
    if _is_deep(found, _MAX_DEPTH):
        raise BadRow("wrong types", f"{where}: nested deeper than {_MAX_DEPTH} levels")
    return tuple(found)


def _calls(found: Any, where: str) -> tuple[JsonObject, ...]:
    """Tool calls, each with a name, which may stand inside `function`."""
    calls = _objects(found, where)
    for call in calls:
        function = call.get("function") or call
        if type(function) is not dict or type(function.get("name")) is not str:
            raise BadRow("wrong types", f"{where}: a call without a name")
    return calls


def tools_of(text: str) -> tuple[JsonObject, ...]:
    """Tools given as a string of JSON; BadRow when they are none."""
    return _objects(text, "tools")


def calls_of(text: str) -> tuple[JsonObject, ...]:
    """Tool calls given as a string of JSON; BadRow when they are none."""
    return _calls(text, "tool_calls")


def _is_deep(found: Any, levels: int) -> bool:
    if type(found) is dict:
        found = found.values()
    elif type(found) is not list:
        return False
    if not levels:
        return True
    for item in found:  # noqa: SIM110 - half the time of any()
        if type(item) is not str and _is_deep(item, levels - 1):
            return True
    return False


def _with_row_fields(
    found: JsonObject, messages: tuple[Message, ...], tools: tuple[JsonObject, ...]
) -> tuple[tuple[Message, ...], tuple[JsonObject, ...]]:
    """Add what the row itself names beside its messages: `system`, and `tools` or `functions`."""
    system = found.get("system")
    if system is not None and type(system) is not str:
        raise BadRow("wrong types", f"system: found {_json_type(system)}, expected a string")
    if system and messages[0].role != "system":
        messages = (Message("system", system), *messages)
    given = found.get("tools") or found.get("functions")
    if given and not tools:
        tools = _objects(given, "tools")
    return messages, tools


def _says_nothing(message: Message) -> bool:
    return not message.tool_calls and not message.content.strip() and not (message.reasoning_content or "").strip()


def _check_turns(messages: Sequence[Message], where: str) -> None:
    """Hold the order system* user assistant (tool* assistant)* user …, with a system message anywhere."""
    last = ""
    for number, message in enumerate(messages, 1):
        role = message.role
        if role == "system":
            continue
        if last not in _MAY_FOLLOW[role]:
            before = f"after {last}" if last else "at the beginning"
            raise BadRow("roles out of order", f"{where}message {number} is from {role} {before}")
        if role != "tool" and (not message.content or message.content.isspace()) and _says_nothing(message):
            raise BadRow("empty content", f"{where}message {number} ({role})")
        last = role
    if last != "assistant":
        has_one = any(message.role == "assistant" for message in messages)
        raise BadRow("last turn not the assistant's" if has_one else "no assistant", where.rstrip(": "))


_MAY_FOLLOW = {"user": ("", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def _canonical(row: Row) -> bytes:
    """All that a row says, each string behind its length, so that no two rows share one. `talks` writes the same in bulk."""
    if isinstance(row, Document):
        return b"document " + row.text.encode()
    if isinstance(row, Pair):
        chosen, rejected = _canonical(row.chosen), _canonical(row.rejected)
        return b"pair %d:%b%b" % (len(chosen), chosen, rejected)
    said = "".join([f"{m.role} {counted(m.content)}{canonical_calls(m)}" for m in row.messages])
    return f"conversation {said}{canonical_tools(row.tools)}".encode()


def counted(text: str) -> str:
    """A string behind the number of its bytes."""
    return f"{len(text.encode())}:{text}"


def canonical_calls(message: Message) -> str:
    """The reasoning and tool calls of a message, as they are hashed."""
    thought = message.reasoning_content
    reasoning = "" if thought is None else f" reasoning {counted(thought)}"
    return reasoning + (f" calls {counted(_SORTED.encode(message.tool_calls))}" if message.tool_calls else "")


def canonical_tools(tools: tuple[JsonObject, ...]) -> str:
    """The tools of a conversation, as they are hashed: keys sorted."""
    return f" tools {counted(_SORTED.encode(tools))}" if tools else ""


_SORTED = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


def _json_type(found: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(found), "null")
