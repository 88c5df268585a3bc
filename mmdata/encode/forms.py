"""The forms of conversations: of all conversations that differ only in what their texts say, the chat template's
rendering is learned once, with jinja2, and the others are written without it.

A form is the order of roles, which contents are empty, which messages have reasoning or tool calls, and the number of
tools. `Forms` renders stand-ins for the texts (module `template.stand_ins`) and cuts the rendering as that of any
conversation. A form whose rendering depends on more than the questions that are recorded, or leaves something out, is
not written without jinja2; nor is a row in which the template would find a string that it searches for.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np

from mmdata.encode.columns import ROLES, Conversations, byte_sizes
from mmdata.encode.rows import BadRow, Conversation, Message
from mmdata.encode.template import Segment, Template, stretches
from mmdata.encode.template.stand_ins import Edits, Record, RecordingEnvironment, Slot, StandIn, StandInObject
from mmdata.encode.template.traced import template_environment
from mmdata.io.records import JsonObject

Pieces = tuple[str | Slot, ...]
# A place in a rendering: the number of a control token, the first being 1, and a text. Without a text, the place is
# where the token begins, or the end of the rendering if there is no such token; with one, where the text ends that
# follows the token, or the beginning of the rendering if the number is 0.
Edge = tuple[int, str | None]
Key = tuple[bytes, int, bool, int]  # see `Forms.find`
ODD = -1
_EMPTY, _EXTRAS = len(ROLES), 2 * len(ROLES)  # added to the code of a role; the first code of messages with more
# The most forms that are learned, and one more for every 16 rows: learning one takes as long as encoding a few rows with
# jinja2. MOST_CODES: the most kinds of messages with reasoning or calls.
MOST, MOST_CODES = 256, 2**15


@dataclass(frozen=True)
class Form:
    """What the template writes for all conversations of one form. heads: before the content of each message, and after
    the last; slots are of texts that are no contents, by their index. edits: what it does to each content. literals:
    strings that a row of this form may not have. controls: the control tokens that it writes. spans: where trained
    ranges begin and end."""

    heads: tuple[Pieces, ...]
    edits: tuple[Edits, ...]
    literals: frozenset[str]
    controls: tuple[str, ...]
    spans: tuple[tuple[Edge, Edge], ...]

    @cached_property
    def fixed(self) -> list[str]:
        """The heads that are the same for all rows; "" for others."""
        return ["" if any(isinstance(p, Slot) for p in head) else "".join(map(str, head)) for head in self.heads]

    @cached_property
    def slotted(self) -> list[tuple[int, Pieces]]:
        """The heads that have slots, with their numbers."""
        return [(n, head) for n, head in enumerate(self.heads) if any(isinstance(piece, Slot) for piece in head)]

    def begins(self, other: "Form", number: int) -> bool:
        """Return whether this form, of the first `number` messages of another's conversations, is written as they begin,
        up to one of their control tokens."""
        end, (next, *_) = "".join(map(str, self.heads[-1])), (*other.heads[number], "")
        controls, spans = len(self.controls), len(self.spans)
        return (
            self.heads[:-1] == other.heads[:number]
            and self.edits == other.edits[:number]
            and isinstance(next, str)
            and next.startswith(end + (*other.controls[controls:], "\ue000")[0])
            and self.controls == other.controls[:controls]
            and self.spans == other.spans[:spans]
            and self.literals <= other.literals
        )


class Forms:
    """The forms of conversations that were found so far, learned from one template. train_on: see
    `Template.segments`."""

    def __init__(self, template: Template, train_on: str):
        self._template, self._train_on = template, train_on
        self._numbers: dict[Key, int] = {}
        self._rests: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._codes: dict[Any, int] = {}
        self._num_rows = 0
        self.forms: list[Form] = []

    @cached_property
    def _environment(self) -> RecordingEnvironment:
        return cast(RecordingEnvironment, template_environment(RecordingEnvironment))

    @cached_property
    def _recording(self) -> Template:
        return self._template.recording(self._environment)

    def find(self, columns: Conversations, keeps: np.ndarray, first_trained: np.ndarray) -> np.ndarray:
        """Return the number of each conversation's form, an index of `forms` or ODD (int64 [R]). keeps: bool [R],
        False for conversations without the empty think blocks that the template writes. first_trained: int64 [R], the
        first message that may be trained."""
        codes = columns.roles.astype(np.uint16)
        codes[byte_sizes(columns.contents) == 0] += _EMPTY
        odd_rows = set()
        for at, message in columns.extras.items():
            if message.has_marks or len(self._codes) == MOST_CODES:
                odd_rows.add(int(columns.row_of[at]))
            else:
                reasoning = message.reasoning_content and str
                kinds = codes[at], reasoning, tuple(map(_shape, message.tool_calls))
                codes[at] = self._codes.setdefault(kinds, _EXTRAS + len(self._codes))
        self._num_rows += len(columns)
        whole, ends = codes.tobytes(), np.cumsum(columns.counts).tolist()
        numbers = np.full(len(columns), ODD)
        rows = zip([0, *ends], ends, keeps.tolist(), first_trained.tolist(), strict=False)
        for row, (begin, end, keep, first) in enumerate(rows):
            tools = columns.tools[row].specs if row in columns.tools else ()
            if row not in odd_rows and all(tools):
                key = whole[2 * begin : 2 * end], len(tools), keep, first
                number = self._numbers.get(key)
                numbers[row] = self._learned(key, _row(columns, begin, end, tools)) if number is None else number
        return numbers

    def _learned(self, key: Key, example: Conversation) -> int:
        """Return the number of a new form, learned from a conversation, or ODD."""
        if len(self._numbers) > MOST + self._num_rows // 16:
            return ODD
        form = self._learn(key, example)
        self._numbers[key] = ODD if form is None else len(self.forms)
        self.forms += [] if form is None else [form]
        return self._numbers[key]

    def _control_in(self, text: str) -> int:
        """Return where the first control token in a text of the template begins; -1 without one."""
        found = self._template.control_tokens_in(text)
        return text.index(found[0]) if found else -1

    def rest(self, chosen: int, rejected: int, num_shared: int) -> tuple[int, int]:
        """Return the number of the form of a pair's rejected side without its beginning, which both sides write alike,
        up to a control token before the first message that differs, and how many control tokens the beginning has. The
        form itself and 0 if there is no such beginning."""
        key = chosen, rejected, num_shared
        if key not in self._rests:
            self._rests[key] = self._find_rest(self.forms[chosen], self.forms[rejected], num_shared) or (rejected, 0)
        return self._rests[key]

    def _find_rest(self, one: Form, other: Form, num_shared: int) -> tuple[int, int] | None:
        if (
            one.heads[: num_shared + 1] != other.heads[: num_shared + 1]
            or one.edits[:num_shared] != other.edits[:num_shared]
        ):
            return None
        *pieces, last = other.heads[num_shared] or ("",)
        begin = self._control_in(last) if isinstance(last, str) else -1
        shared = [*itertools.chain(*other.heads[:num_shared]), *pieces, str(last)[: max(begin, 0)]]
        skipped = sum(len(self._template.control_tokens_in(piece)) for piece in shared if isinstance(piece, str))
        is_before = any(number <= skipped + (text is None) for span in other.spans for number, text in span)
        if begin < 0 or not skipped or is_before:
            return None
        heads = (*[()] * num_shared, (str(last)[begin:],), *other.heads[num_shared + 1 :])
        spans = tuple(((a - skipped, b), (c - skipped, d)) for (a, b), (c, d) in other.spans)
        self.forms.append(replace(other, heads=heads, controls=other.controls[skipped:], spans=spans))
        return len(self.forms) - 1, skipped

    def _learn(self, key: Key, example: Conversation) -> Form | None:
        """Return the form of a conversation, or None if only jinja2 renders all conversations of the form rightly."""
        if "\ue000" in self._template.text:
            return None
        environment, template = self._environment, self._recording
        record = environment.record = Record()
        stand_ins = _stand_ins(record, example)
        try:
            segments = template.segments(
                stand_ins, train_on=self._train_on, first_trained=key[3], keep_empty_think=key[2]
            )
            if template.losses(stand_ins) or not record.is_exact:
                return None
        except BadRow:
            return None
        written = _heads(record.pieces("".join(part.text for part in segments)), example)
        spans = _spans(segments, lambda text: len(record.pieces(text)) == 1)
        if written is None or not spans:
            return None
        controls = tuple(part.text for part in segments if part.is_control)
        return Form(*written, frozenset(record.literals), controls, spans)


@lru_cache(maxsize=4)
def forms_of(template: Template, train_on: str) -> Forms:
    """Return the forms of a template, shared by calls with the same Template object."""
    return Forms(template, train_on)


def leaves(tools: Sequence[JsonObject], messages: Iterable[Message]) -> list[Any]:
    """Return the texts and objects that a conversation says besides contents: tools, then those of its messages."""
    values: list[Any] = [*tools]
    for message in messages:
        values += [message.reasoning_content] if message.reasoning_content else []
        for call in message.tool_calls:
            _add_leaves(call, values)
    return values


def _add_leaves(value: JsonObject, values: list[Any]) -> None:
    """Append the texts and objects of arguments in a part of a call, in the order of `_mapped`."""
    for key, item in value.items():
        if item and key != "type" and isinstance(item, str | dict):
            if key == "arguments" or isinstance(item, str):
                values.append(item)
            else:
                _add_leaves(item, values)


def _shape(value: JsonObject) -> tuple[Any, ...]:
    """Return what all parts of calls that differ only in their leaves have in common."""
    return tuple(
        (key, repr(item))
        if key == "type" or not item or not isinstance(item, str | dict)
        else (key, type(item) if key == "arguments" or isinstance(item, str) else _shape(item))
        for key, item in value.items()
    )


def _row(columns: Conversations, begin: int, end: int, tools: Sequence[JsonObject]) -> Conversation:
    """Return the conversation of the messages [begin, end), with "x" in place of contents."""
    sizes = byte_sizes(columns.contents)[begin:end].tolist()
    messages = [columns.extras.get(at) or Message(ROLES[columns.roles[at]], "") for at in range(begin, end)]
    contents = ("x" if size else "" for size in sizes)
    return Conversation(
        tuple(m._replace(content=text) for m, text in zip(messages, contents, strict=True)), tuple(tools)
    )


def _mapped(message: Message, of: Callable[[Any], Any]) -> Message:
    """Return a message with `of(value)` in place of each text and object of arguments, of its reasoning and calls."""

    def mapped(value: JsonObject) -> JsonObject:
        return {key: item if key == "type" else of_item(key, item) for key, item in value.items()}

    def of_item(key: str, item: Any) -> Any:
        if not isinstance(item, str | dict) or not item:
            return item
        return of(item) if isinstance(item, str) or key == "arguments" else mapped(item)

    reasoning = of(message.reasoning_content) if message.reasoning_content else message.reasoning_content
    return message._replace(reasoning_content=reasoning, tool_calls=tuple(map(mapped, message.tool_calls)))


def _stand_ins(record: Record, example: Conversation) -> Conversation:
    """Return a conversation of the same form with stand-ins. The leaves of contents have negative numbers."""
    numbers = itertools.count()

    def stand_in(value: Any) -> Any:
        return (StandIn.make if isinstance(value, str) else StandInObject)(record, Slot(next(numbers)))

    tools = tuple(map(stand_in, example.tools))
    messages = [
        _mapped(message, stand_in)._replace(content=message.content and StandIn.make(record, Slot(-1 - n)))
        for n, message in enumerate(example.messages)
    ]
    return Conversation(tuple(messages), tools)


def _heads(pieces: Sequence[str | Slot], example: Conversation) -> tuple[tuple[Pieces, ...], tuple[Edits, ...]] | None:
    """Return the `heads` and `edits` of a form from the pieces of a rendering; None if a content is not written once
    and in order, or another text not at all."""
    size = len(example.messages)
    heads: list[Pieces] = [()] * (size + 1)
    edits: list[Edits] = [()] * size
    head: list[str | Slot] = []
    written: set[int] = set()
    for piece in filter(None, pieces):
        if isinstance(piece, str) or piece.leaf >= 0:
            head.append(piece)
        elif (at := -1 - piece.leaf) <= max((-1 - leaf for leaf in written if leaf < 0), default=-1):
            return None
        else:
            heads[at], edits[at], head = tuple(head), piece.edits, []
        written |= {piece.leaf} if isinstance(piece, Slot) else set()
    heads[size] = tuple(head)
    contents = {-1 - n for n, message in enumerate(example.messages) if message.content}
    return (
        (tuple(heads), tuple(edits))
        if written == {*contents, *range(len(leaves(example.tools, example.messages)))}
        else None
    )


def _spans(segments: Sequence[Segment], is_fixed: Callable[[str], bool]) -> tuple[tuple[Edge, Edge], ...] | None:
    """Return the edges of trained ranges; None if an edge is inside a text whose beginning differs from row to row, as
    `is_fixed` says, or after other edges."""
    edges: list[Edge] = []
    number, is_trained = 0, False
    for group in stretches(segments):
        if len(group) > 2 or (len(group) == 2 and not is_fixed(group[0].text)):
            return None
        if group[0].is_control:
            number += 1
        places: list[Edge] = [(number, None)] if group[0].is_control else [(number, ""), (number, group[0].text)]
        for place, segment in zip(places, group, strict=False):
            if segment.is_trained != is_trained:
                edges.append(place)
                is_trained = not is_trained
    edges += [(number + 1, None)] * is_trained
    return tuple(zip(edges[0::2], edges[1::2], strict=True))
