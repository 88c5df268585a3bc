"""Parsing of lines to rows, and the kind of a file."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmdata.encode.rows.load import json_type, load
from mmdata.encode.rows.messages import EMPTY, MessageReader, Messages, is_transcript, joined, objects_of
from mmdata.encode.rows.reasons import REASONS, BadRow
from mmdata.encode.rows.row import Conversation, Document, Message, Pair, Row, split_documents
from mmdata.encode.rows.schemas import DEFAULT_COLUMNS, MEDIA, ROW_FIELDS, Columns, describe
from mmdata.errors import InputError
from mmdata.io.lines import Line, iter_lines, unit_of
from mmdata.io.options import DEFAULT_READING, ReadOptions
from mmdata.io.records import JsonObject

PLACEHOLDER = "无"  # the last answer in MiniMind's rlaif files (prompts for reinforcement learning)
_VERDICTS = ("label", "kto_tag")  # columns that are false, or 0, beside an answer that a model should not give
LOOK_AT = 100  # number of lines at the beginning of a file from which its kind is determined


def parse_row(
    raw: bytes, kind: str | None = None, *, extra_keys: Counter[str] | None = None, columns: Columns = DEFAULT_COLUMNS
) -> Row:
    """Parse one line (without its newline). Raises BadRow if it is no valid row, or none of the given kind. kind:
    "document", "conversation", "pair" or None (any). extra_keys: counts the keys of valid rows that say something and
    are ignored, metadata included. columns: those that hold the fields."""
    values = load(raw)
    if type(values) is dict and len(values) == 1 and not columns.mapping and (row := _plain(values, kind)):
        return row
    if type(values) is list and _is_message_list(values, columns):
        values = {columns.mapping.get("messages", "messages"): values}
    if type(values) is not dict:
        raise BadRow("not an object", f"found {json_type(values)}")
    found, others, schema = columns.of_row(values, kind)
    if schema.kind == "document":
        text = values[found["text"]]
        if kind == "document" or type(text) is not str or not is_transcript(text):
            row = Document(_text(text, found["text"]))
            if kind == "conversation":
                raise BadRow("another kind", "found a document, expected a conversation")
            if extra_keys is not None and len(found) + len(others) > 1:
                left = [column for field, column in found.items() if field != "text"]
                _count_ignored(values, others + left, columns, row, extra_keys)
            return row
        found = {"messages" if field == "text" else field: column for field, column in found.items()}
    if others:
        _check_others(values, others, schema.kind)
    dialogue = _Dialogue(values, found, columns)
    row = dialogue.pair() if schema.kind == "pair" else dialogue.conversation(is_prompted="prompt" in schema.required)
    if extra_keys is not None and (others or dialogue.keys or len(found) > len(dialogue.used)):
        for key in dialogue.keys:
            extra_keys[key] += 1
        left = others
        if len(found) > len(dialogue.used):
            left = others + [column for field, column in found.items() if field not in dialogue.used]
        _count_ignored(values, left, columns, row, extra_keys)
    return row


def _plain(values: JsonObject, kind: str | None) -> Document | Conversation | None:
    """Return the row of an object with one key, as in most files of MiniMind, for speed; None if it needs a closer
    look."""
    ((column, value),) = values.items()
    if column == "text" and kind != "conversation" and kind != "pair" and type(value) is str:
        is_whole = value and not value.isspace() and (kind == "document" or not is_transcript(value))
        return Document(value) if is_whole else None
    if column in ROW_FIELDS["messages"] and kind != "document" and kind != "pair" and type(value) is list:
        reader = MessageReader(DEFAULT_COLUMNS)
        messages, tools = reader.read(value, column)
        if reader.keys or messages[-1].content == PLACEHOLDER:
            return None
        _check_turns(messages, "")
        return Conversation(messages, tools)
    return None


def find_kind(path: Path, read: ReadOptions = DEFAULT_READING) -> str:
    """Return the kind of rows in a file: what the options ask for, or else that of its first LOOK_AT lines. Raises
    InputError if it cannot be read or is empty, if none of these lines is a valid row, or if kinds are mixed."""
    if read.kind:
        return read.kind
    return kind_of_lines(islice(iter_lines(path, options=read), LOOK_AT), path, read)


def kind_of_lines(lines: Iterable[Line], path: Path, read: ReadOptions = DEFAULT_READING) -> str:
    """Return the kind ("document", "conversation" or "pair") of at least 90% of the valid rows among these lines. path,
    read: for messages. Raises InputError if there are no lines or valid rows, or if no kind has 90%."""
    columns = Columns.parse(read.mapping)
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    first = None
    for line in lines:
        try:
            kinds[kind_of(parse_row(line.raw, columns=columns))] += 1
        except BadRow as bad:
            first = first or (line, bad)
            reasons[bad.reason] += 1
    if not kinds and not first:
        raise InputError(
            f"{path} is empty", "give a file with one JSON object a line; `mm fetch` downloads the known ones"
        )
    if first and not kinds:
        line, bad = first
        message = f"{path}: none of its first {reasons.total()} rows can be used"
        fix = REASONS[bad.reason]
        if unused := columns.unused:
            fix = f"--map {unused[0]}: no row has a value in this column; write its name as the file does"
        raise InputError(f"{message}; {unit_of(path, read)} {line.number} {explain(line.raw, bad, columns)}", fix)
    kind, count = kinds.most_common(1)[0]
    if count < 0.9 * kinds.total():
        counts = ", ".join(f"{n} {k}" for k, n in kinds.most_common())
        raise InputError(
            f"{path} mixes kinds of rows: {counts} in its first rows",
            f"--kind {kind} takes these and sets the others aside; or put each kind in a file of its own",
        )
    return kind


def explain(raw: bytes, bad: BadRow, columns: Columns = DEFAULT_COLUMNS) -> str:
    """Return why a line cannot be used, the fields that it has, and, if no schema fits, the nearest and what it lacks."""
    try:
        values = load(raw)
    except BadRow:
        values = None
    return f"is left out: {describe(values, bad, columns) if type(values) is dict else bad}"


def kind_of(row: Row) -> str:
    """Return the kind of a row: "document", "conversation" or "pair"."""
    return {Document: "document", Conversation: "conversation", Pair: "pair"}[type(row)]


def _is_message_list(value: Any, columns: Columns) -> bool:
    """Return whether a JSON value is a list of messages with roles, which may stand in place of a row."""
    first = value[0] if type(value) is list and value else None
    return type(first) is dict and "role" in columns.of_message(first)[0]


def _text(value: Any, where: str) -> str:
    """Return `value` if it is a string that is not blank, else raise BadRow with the field's name, `where`."""
    if type(value) is not str:
        raise BadRow("wrong types", f"{where}: found {json_type(value)}, expected a string")
    if not value or value.isspace():
        raise BadRow("empty content", where)
    return value


def _check_others(values: JsonObject, others: Iterable[str], kind: str) -> None:
    """Raise BadRow if a row with messages has keys without which the messages are not complete."""
    if "gt" in others and kind == "conversation":
        raise BadRow("prompt only", "found `gt`, the answer a reward is computed from")
    if not MEDIA.isdisjoint(others) and (media := [name for name in others if name in MEDIA and values[name]]):
        raise BadRow("content is not text", f"`{media[0]}`")


def _count_ignored(values: JsonObject, keys: Iterable[str], columns: Columns, row: Row, counts: Counter[str]) -> None:
    """Count the keys that say something else than the row. A column that could hold a field is not ignored if each of
    its strings is a whole string of the row, as `prompt` is that repeats the first message."""
    own: Counter[str] = Counter()
    for key in keys:
        value = values[key]
        if type(value) is not int and value in EMPTY:
            continue
        if columns.known(key) and not isinstance(value, int | float):
            own = own or Counter(_strings(row))
            if Counter(_strings(value)) <= own:
                continue
        counts[key] += 1


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a row, or in a JSON value, that are not blank, without white space around them, and without
    roles. What both sides of a pair share is yielded once."""
    if isinstance(value, Document):
        value = split_documents(value.text)
    elif isinstance(value, Pair):
        value = (value.chosen, Conversation(value.rejected.messages[value.num_shared :]))
    elif isinstance(value, Conversation):
        value = (*value.messages, value.tools)
    elif isinstance(value, Message):
        value = value[1:]
    elif type(value) is dict:
        value = [item for key, item in value.items() if key not in ("role", "from")]
    if type(value) is str:
        if said := value.strip():
            yield said
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


class _Dialogue(MessageReader):
    """Makes a conversation or pair of a row's fields. used: the fields that became part of it."""

    def __init__(self, values: JsonObject, found: Mapping[str, str], columns: Columns):
        super().__init__(columns)
        self._values, self._found = values, found
        self.used: set[str] = set()
        self._history: tuple[Message, ...] = ()

    def conversation(self, *, is_prompted: bool) -> Conversation:
        """Return the conversation in the messages, or in a prompt and its completion. Raises BadRow if it is invalid or
        ends with a placeholder."""
        for key in _VERDICTS:
            value = self._values.get(key)
            if str(value).lower() in ("false", "0", "0.0") and key not in self._found.values():
                raise BadRow("unwanted answer", f"`{key}` is {json.dumps(value)}")
        if is_prompted:
            messages, tools = self._context()
            reply, reply_tools = self._field("completion", "assistant")
            messages, tools = messages + reply, joined(tools, reply_tools)
        else:
            messages, tools = self._field("messages")
            if messages[-1].content == PLACEHOLDER and messages[-1].role == "assistant":
                raise BadRow("prompt only", f"the last answer is the placeholder {PLACEHOLDER}")
            messages, tools = self._with_history(messages, tools)
        if len(self._found) > 1:
            messages, tools = self._with_row_fields(messages, tools)
        _check_turns(messages, "", self._history)
        return Conversation(messages, tools)

    def pair(self) -> Pair:
        """Return the pair. Raises BadRow if it is not valid. A side is a list of all its messages, a transcript, or a
        reply: a list without a user message, a single message, or a string, put behind the history, and the prompt or
        the messages."""
        context = None
        sides = []
        for field in ("chosen", "rejected"):
            messages, tools = self._field(field, "assistant")
            if messages[0].role != "user" and not any(message.role == "user" for message in messages):
                context = context or self._context()
                messages, tools = context[0] + messages, joined(context[1], tools)
            if len(self._found) > 2:
                messages, tools = self._with_row_fields(messages, tools)
            _check_turns(messages, f"{self._found[field]}: ", self._history)
            sides.append(Conversation(messages, tools))
        pair = Pair(*sides)
        _check_sides(pair)
        return pair

    def _field(self, field: str, reply_role: str | None = None) -> Messages:
        """Return the messages in the column of a field, and the tools that are defined in them."""
        self.used.add(field)
        column = self._found[field]
        value = self._values[column]
        if reply_role and type(value) is str and (field == "completion" or not is_transcript(value)):
            return (Message(reply_role, value),), ()  # a completion also if it looks like a transcript
        try:
            return self.read(value, column, reply_role)
        except BadRow as bad:
            if field == "messages" or not bad.detail.startswith("message "):
                raise
            raise BadRow(bad.reason, f"{column}: {bad.detail}") from None

    def _context(self) -> Messages:
        """Return the messages before a reply, and their tools: the history, then the prompt with its input. A pair may
        have messages that end with the user in place of a prompt, or besides it."""
        messages, tools = (), ()
        if "messages" in self._found:
            messages, tools = self._field("messages", "user")
            if messages[-1].role == "assistant" and "prompt" in self._found:
                self.used.remove("messages")
                messages = ()
        if not messages:
            if "prompt" not in self._found:
                raise BadRow("missing field", "a reply without `prompt` or another column that holds the question")
            messages, tools = self._prompt()
        return self._with_history(messages, tools)

    def _prompt(self) -> Messages:
        """Return the messages of the prompt. An `input` that is text is put on a line after the prompt's text."""
        prompt = self._values[self._found["prompt"]]
        addition = self._values[self._found["input"]] if "input" in self._found else None
        if type(prompt) is not str or type(addition) is not str or not addition.strip():
            return self._field("prompt", "user")
        self.used |= {"prompt", "input"}
        return self.read(f"{prompt}\n{addition}" if prompt.strip() else addition, self._found["prompt"], "user")

    def _with_history(self, messages: tuple[Message, ...], tools: tuple[JsonObject, ...]) -> Messages:
        """Put the messages of the history, and its tools, before the others, but after a system message."""
        if "history" not in self._found or not self._values[self._found["history"]]:
            return messages, tools
        self._history, earlier = self._field("history")
        begin = int(messages[0].role == "system" and self._history[0].role != "system")
        return messages[:begin] + self._history + messages[begin:], joined(earlier, tools)

    def _with_row_fields(self, messages: tuple[Message, ...], tools: tuple[JsonObject, ...]) -> Messages:
        """Add a row's `system` to messages that do not begin with one, and its `tools` if there are none yet. Raises
        BadRow if a field has a wrong type."""
        values, found = self._values, self._found
        if column := found.get("system"):
            system = self._content(values[column], column)
            if system and messages[0].role != "system":
                messages = (Message("system", system), *messages)
                self.used.add("system")
        if (column := found.get("tools")) and values[column]:
            objects = objects_of(values[column], column)
            if not tools or tools == objects:
                tools = objects
                self.used.add("tools")
        return messages, tools


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


def _is_blank(message: Message) -> bool:
    return not message.tool_calls and not message.content.strip() and not (message.reasoning_content or "").strip()


def _check_turns(messages: Sequence[Message], where: str, history: Sequence[Message] = ()) -> None:
    """Raise BadRow if the roles are not in the order user, assistant, user, assistant, …, ending with the assistant, or
    if a user message or an answer is blank (no tool calls, only white space as content and reasoning). Tool messages
    may follow an answer, and are then followed by another answer. System messages may be anywhere. where: begins the
    detail of errors, such as "chosen: ". history: those of `messages` that were in the row's history."""

    def place(number: int) -> str:
        in_history = next((n for n, each in enumerate(history, 1) if each is messages[number - 1]), None)
        return f"{where}history: message {in_history}" if in_history else f"{where}message {number}"

    last = ""
    for number, message in enumerate(messages, 1):
        role = message.role
        if role == "system":
            continue
        if last not in _MAY_FOLLOW[role]:
            before = f"after {last}" if last else "at the beginning"
            raise BadRow("roles out of order", f"{place(number)} is from {role} {before}")
        if role != "tool" and (not message.content or message.content.isspace()) and _is_blank(message):
            raise BadRow("empty content", f"{place(number)} ({role})")
        last = role
    if last != "assistant":
        has_one = any(message.role == "assistant" for message in messages)
        raise BadRow("last turn not the assistant's" if has_one else "no assistant", where.rstrip(": "))


# role -> the roles that may come directly before it; "" is the beginning of the conversation
_MAY_FOLLOW = {"user": ("", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
