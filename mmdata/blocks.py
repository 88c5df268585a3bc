"""Conversations put together without jinja, for templates that write every message as a block: open, role, newline, text, close.

MiniMind's three eras and the built-in ChatML do. Whether a template does, and with which words for tools, is learned from
probes: Blocks exists only where each probe's text and trained stretches are those of the jinja rendering, and it declines
any row that holds something the template looks for. About 2 microseconds a row; jinja takes 100 to 300.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmdata.rows import BadRow, Conversation, Message
from mmdata.template import EMPTY_THINK, TRAIN_ON, Segment, Template, merged

_to_json = json.JSONEncoder(ensure_ascii=False).encode  # as the template's filter writes it
HEAD, TAIL = "assistant\n", "\n"  # of a block: what stands before the trained text, and what is trained after its close


@dataclass(frozen=True, slots=True)
class Words:
    """What a template writes: `default_system` is the block without a system message; `tools` stands around the tools."""

    open: str
    close: str
    default_system: str
    thinks: bool  # whether answers open with a think block
    tools: tuple[str, str] | None = None
    has_calls: bool = False  # tool calls, and tool messages
    has_reasoning: bool = False
    has_late_system: bool = False


class Blocks:
    """Renders conversations. A rendering is its text and its pattern: a letter a block (s, u, a; t for tool answers)."""

    def __init__(self, words: Words, literals: Sequence[str]):
        self.words = words
        self._unusual = re.compile("|".join(map(re.escape, literals)) or r"(?!)").search
        self._is_found = literals[0][0] if literals and len({text[0] for text in literals}) == 1 else ""
        self._user = f"{words.open}user\n"
        self._system = f"{words.open}system\n"
        self._close = f"{words.close}{TAIL}"
        self._assistant = f"{words.open}{HEAD}"

    def render(self, conversation: Conversation, *, keep_empty_think: bool = True) -> tuple[str, str] | None:
        """Text and pattern; None where only the template itself can tell."""
        words, messages = self.words, conversation.messages
        pieces: list[str] = []
        pattern = ""
        first = messages[0]
        if conversation.tools:
            if words.tools is None:
                return None
            begin = f"{first.content}\n\n" if first.role == "system" else ""
            tools = "".join([f"\n{_to_json(tool)}" for tool in conversation.tools])
            pieces.append(f"{self._system}{begin}{words.tools[0]}{tools}{words.tools[1]}{self._close}")
            pattern = "s"
        elif first.role != "system" and words.default_system:
            pieces.append(words.default_system)
            pattern = "s"
        last = ""
        for message in messages:
            role, said = message.role, message.content
            if (not self._is_found or self._is_found in said) and self._unusual(said):
                return None
            if role == "assistant":
                answer = self._answer(message, keep_empty_think)
                if not answer:
                    return None
                pieces.append(f"{self._assistant}{answer}{self._close}")
                pattern += "a"
            elif role == "user":
                pieces.append(f"{self._user}{said}{self._close}")
                pattern += "u"
            elif role == "tool":
                if not words.has_calls:
                    return None
                if last == "tool":
                    pieces[-1] = pieces[-1].removesuffix(self._close)
                else:
                    pieces.append(f"{words.open}user")
                    pattern += "t"
                pieces.append(f"\n<tool_response>\n{said}\n</tool_response>{self._close}")
            elif message is first:
                if not conversation.tools:
                    pieces.append(f"{self._system}{said}{self._close}")
                    pattern += "s"
            elif not words.has_late_system:
                return None
            else:
                pieces.append(f"{self._system}{said}{self._close}")
                pattern += "s"
            last = role
        return "".join(pieces), pattern

    def _answer(self, message: Message, keep_empty_think: bool) -> str:
        """The text of an answer; empty where only the template can tell."""
        said, reasoning, words = message.content, message.reasoning_content, self.words
        if reasoning is not None and not words.has_reasoning:
            return ""
        calls = ""
        if words.thinks:
            said = said.lstrip("\n")
        if message.tool_calls:
            if not words.has_calls:
                return ""
            for call in message.tool_calls:
                call = call.get("function") or call
                if "arguments" not in call:
                    return ""
                arguments = call["arguments"]
                text = arguments if isinstance(arguments, str) else _to_json(arguments)
                before = "\n" if said or calls else ""
                calls += f'{before}<tool_call>\n{{"name": "{call["name"]}", "arguments": {text}}}\n</tool_call>'
        elif not said:
            return ""
        if not words.thinks:
            return said + calls
        thought = reasoning.strip("\n") if reasoning else ""
        if thought:
            return f"<think>\n{thought}\n</think>\n\n{said}{calls}"
        return f"{EMPTY_THINK}{said}{calls}" if keep_empty_think else said + calls

    def segments(self, text: str, pattern: str, train_on: str) -> list[Segment]:
        """A rendering as `Template.segments` gives it; for texts without control tokens of their own."""
        trained = [train_on == "all" or letter == "a" for letter in pattern]
        if train_on == "last":
            trained = [False] * pattern.rfind("a") + [True] + [False] * (len(pattern) - pattern.rfind("a") - 1)
        segments: list[Segment] = []
        for block, is_trained in zip(text.split(self.words.open)[1:], trained, strict=True):
            body, _, tail = block.partition(self.words.close)
            head = len(HEAD) if is_trained and train_on != "all" else 0
            segments.append(Segment(self.words.open, is_trained and not head, True))
            segments.append(Segment(body[:head], False, False))
            segments.append(Segment(body[head:], is_trained, False))
            segments.append(Segment(self.words.close, is_trained, True))
            segments.append(Segment(tail, is_trained, False))
        return merged([segment for segment in segments if segment.text])


# ---- learning


def learn(template: Template) -> Blocks | None:
    """What the template writes, if it writes blocks; the extras (tools, calls, …) that its probes do not bear out are off."""
    literals = template.literals
    if literals is None:
        return None
    try:
        asked = template.rendering([_USER])
        whole = template.rendering([_USER, _ANSWER])
    except BadRow:
        return None
    controls = template.control_tokens_in(whole)
    if len(controls) < 4 or set(controls[0::2]) != {controls[0]} or set(controls[1::2]) != {controls[1]}:
        return None
    words = Words(controls[0], controls[1], asked.partition(f"{controls[0]}user\n")[0], template.era == "3")
    if not _is_borne_out(template, words, literals, _PLAIN):
        return None
    extras: list[tuple[dict[str, Any], Sequence[Conversation]]] = [
        ({"tools": _learn_tools(template, words)}, _TOOLS),
        ({"has_calls": True}, _CALLS),
        ({"has_reasoning": True}, _REASONING),
        ({"has_late_system": True}, _LATE_SYSTEM),
    ]
    for extra, probes in extras:
        with_it = replace(words, **extra)
        if _is_borne_out(template, with_it, literals, probes):
            words = with_it
    return Blocks(words, literals)


def _learn_tools(template: Template, words: Words) -> tuple[str, str] | None:
    tool = {"name": "f"}
    try:
        text = template.rendering([_USER, _ANSWER], [tool])
    except BadRow:
        return None
    before, found, after = text.partition(f"\n{_to_json(tool)}")
    opening = f"{words.open}system\n"
    if not found or not before.startswith(opening):
        return None
    return before.removeprefix(opening), after.partition(words.close)[0]


def _is_borne_out(template: Template, words: Words, literals: Sequence[str], probes: Sequence[Conversation]) -> bool:
    """Whether blocks with these words give text and trained stretches of the jinja rendering, for every probe."""
    blocks = Blocks(words, literals)
    for probe, train_on, keep in itertools.product(probes, TRAIN_ON, (True, False)):
        found = blocks.render(probe, keep_empty_think=keep)
        try:
            expected = template.cut(probe, train_on=train_on, keep_empty_think=keep)
        except BadRow:
            return False
        if found is None or blocks.segments(*found, train_on) != expected:
            return False
    return True


_USER, _ANSWER = Message("user", "Ask 1?\n\n*2*"), Message("assistant", "a: [b]\n  c")
_RULE = Message("system", "Be\tkind.")
_EDGES = (Message("user", "\n a \n"), Message("assistant", "\n\n  b \n\n"))
_FUNCTION = {"name": "add", "arguments": {"a": 1, "b": ["é\n", None]}}
_CALL = Message("assistant", "", None, (_FUNCTION,))
_CALL_2 = Message("assistant", "so:", None, ({"function": _FUNCTION}, {"name": "f", "arguments": '{"x": "é"}'}))
_TOOL = Message("tool", '{"sum": "é"}\n')
_THOUGHT = (Message("assistant", "\nso", "\n\nwhy \n"), Message("assistant", "so", ""))


def _talks(*talks: Sequence[Message], tools: Sequence[dict] = ()) -> tuple[Conversation, ...]:
    return tuple(Conversation(tuple(talk), tuple(tools)) for talk in talks)


_PAIR = (_USER, _ANSWER)
_PLAIN = _talks(
    *([*_PAIR] * n for n in (1, 2, 3)), *([_RULE, *_PAIR * n] for n in (1, 2, 3)), _EDGES * 2,
    [Message("system", ""), *_PAIR], [Message("system", "\n x\n"), *_EDGES],
)  # fmt: skip
_SPECS = ({"name": "f", "é": {"a": [1, 2.5, True, None]}}, {"type": "function", "function": {"name": "<g>"}})
_TOOLS = (
    *_talks(_PAIR, [_RULE, *_PAIR], [Message("system", ""), *_PAIR * 2], tools=_SPECS[:1]),
    *_talks(_PAIR, [_RULE, *_EDGES], tools=_SPECS),
)
_CALLS = _talks(
    [_USER, _CALL, _TOOL, _ANSWER], [_USER, _CALL_2, _TOOL, _TOOL, _ANSWER, *_PAIR],
    [_RULE, *_PAIR, _USER, _CALL, _TOOL, _CALL_2, _TOOL, _TOOL, _TOOL, _ANSWER],
)  # fmt: skip
_REASONING = _talks([_USER, _THOUGHT[0]], [_USER, _THOUGHT[1], _USER, _THOUGHT[0]], [_RULE, *_PAIR, _USER, _THOUGHT[0]])
_LATE_SYSTEM = _talks([*_PAIR, _RULE, *_PAIR], [_RULE, _RULE, *_PAIR])
