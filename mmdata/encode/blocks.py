"""Conversations put together without jinja, for templates that write every message as a block: open, role, newline, text, close.

MiniMind's three eras and the built-in ChatML do. Whether a template does, and with which words for tools, is learned from
probes: Blocks exists only where each probe's text and trained stretches are those of the jinja rendering, and it declines
any row that holds something the template looks for. Whole batches are put together by
Arrow, under a microsecond a row; jinja takes 100 to 300.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmdata.encode.rows import BadRow, Conversation, Message
from mmdata.encode.talks import (
    ASSISTANT,
    ROLES,
    SYSTEM,
    TOOL,
    Strings,
    Talks,
    as_numpy,
    compute,
    join,
    replaced,
    talks_of,
    to_json,
    truths,
)
from mmdata.encode.template import EMPTY_THINK, TRAIN_ON, Segment, Template, merged

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


@dataclass(frozen=True, slots=True)
class Renderings:
    """Texts of the rows that are not odd, in their order, each of `num_blocks` (int64) blocks.

    letters: uint8, of all blocks: s, u, a; t for tool answers. is_odd: bool [R], only the template itself can tell.
    """

    texts: list[str]
    letters: np.ndarray
    num_blocks: np.ndarray
    is_odd: np.ndarray


class Blocks:
    """Renders conversations."""

    def __init__(self, words: Words, literals: Sequence[str]):
        self.words = words
        self._literals = "|".join(map(re.escape, literals))
        self._user = f"{words.open}user\n"
        self._system = f"{words.open}system\n"
        self._close = f"{words.close}{TAIL}"
        self._assistant = f"{words.open}{HEAD}"
        response = "\n<tool_response>\n"
        self._heads = (self._system, self._user, self._assistant, f"{words.open}user{response}", response)
        self._tails = (self._close, f"\n</tool_response>{self._close}", "\n</tool_response>")

    def render(self, talks: Talks, keeps: np.ndarray) -> Renderings:
        """keeps: bool [R], whether a row keeps the empty think blocks that the template writes."""
        pc = compute()
        is_odd, said = self._odd(talks), talks.contents
        is_answer = talks.roles == ASSISTANT
        changed = dict.fromkeys(talks.extras, "")
        if self.words.thinks:
            changed |= dict.fromkeys(np.flatnonzero(is_answer & as_numpy(pc.starts_with(said, "\n"))).tolist(), "")
        for at in changed:
            message = talks.extras.get(at) or Message(ROLES[talks.roles[at]], said[at].as_py())
            text = self._answer(message, bool(keeps[talks.row_of[at]])) if is_answer[at] else message.content
            is_odd[at] |= not text
            changed[at] = text
        heads, tails = self._edges(talks, keeps & self.words.thinks, changed)
        letters, num_blocks = self._letters(talks)
        is_odd_row = np.bincount(talks.row_of[is_odd], minlength=len(talks)) > 0
        if changed:
            said = replaced(said, changed)
        texts = join(talks.counts, heads.array(), said, tails.array())
        if is_odd_row.any():
            letters, num_blocks = letters[np.repeat(~is_odd_row, num_blocks)], num_blocks[~is_odd_row]
            texts = texts.filter(truths(~is_odd_row))
        return Renderings(texts.to_pylist(), letters, num_blocks, is_odd_row)

    def _odd(self, talks: Talks) -> np.ndarray:
        """bool [M]: makes its row one that only the template can tell about, as far as columns say."""
        pc = compute()
        words, roles, said = self.words, talks.roles, talks.contents
        is_odd = (roles == SYSTEM) & ~talks.is_first if not words.has_late_system else np.zeros(len(roles), bool)
        if not words.has_calls:
            is_odd = is_odd | (roles == TOOL)
        if self._literals:
            is_odd |= as_numpy(pc.match_substring_regex(said, self._literals))
        is_empty = as_numpy(pc.binary_length(said)) == 0
        is_empty[list(talks.extras)] = False
        is_odd |= is_empty & (roles == ASSISTANT)
        if words.tools is None:
            is_odd[talks.begins[list(talks.tools)]] = True
        return is_odd

    def _edges(self, talks: Talks, keeps: np.ndarray, changed: Iterable[int]) -> tuple[Strings, Strings]:
        """What stands before and after each message's text."""
        words, roles = self.words, talks.roles
        is_tool = roles == TOOL
        is_next_tool = self._is_next_tool(talks)
        heads = Strings((*self._heads, f"{self._assistant}{EMPTY_THINK}"), len(roles))
        tails = Strings(self._tails, len(roles))
        heads.codes[:] = roles + is_next_tool
        thinks = (roles == ASSISTANT) & keeps[talks.row_of]
        thinks[list(changed)] = False  # these have their thoughts in their text
        heads.codes[thinks] = len(self._heads)
        tails.codes[is_tool] = 1
        tails.codes[np.roll(is_next_tool, -1)] = 2
        has_system = roles[talks.begins] == SYSTEM
        if words.default_system:
            is_default = ~has_system
            is_default[list(talks.tools)] = False
            heads.prepend(talks.begins[is_default], words.default_system)
        before, after = words.tools or ("", "")
        for row, tools in talks.tools.items():
            at = int(talks.begins[row])
            block = f"{before}{tools.rendered}{after}{self._close}"
            if has_system[row]:
                tails.set(at, f"\n\n{block}")
            else:
                heads.set(at, f"{self._system}{block}{heads.table[heads.codes[at]]}")
        return heads, tails

    @staticmethod
    def _is_next_tool(talks: Talks) -> np.ndarray:
        """bool [M]: a tool's answer after another one, in the same block."""
        is_tool = talks.roles == TOOL
        return is_tool & np.roll(is_tool, 1) & ~talks.is_first

    def _letters(self, talks: Talks) -> tuple[np.ndarray, np.ndarray]:
        """Letters of all blocks, and how many each row has."""
        roles = talks.roles
        letters = np.frombuffer(b"suat", np.uint8)[roles]
        opens = ~self._is_next_tool(talks)
        num_blocks = np.bincount(talks.row_of[opens], minlength=len(talks))
        more = roles[talks.begins] != SYSTEM
        if not self.words.default_system:
            has_tools = np.zeros(len(talks), bool)
            has_tools[list(talks.tools)] = True
            more &= has_tools
        places = np.cumsum(opens)[talks.begins[more]] - 1
        return np.insert(letters[opens], places, ord("s")), num_blocks + more

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
                text = arguments if isinstance(arguments, str) else to_json(arguments)
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
    before, found, after = text.partition(f"\n{to_json(tool)}")
    opening = f"{words.open}system\n"
    if not found or not before.startswith(opening):
        return None
    return before.removeprefix(opening), after.partition(words.close)[0]


def _is_borne_out(template: Template, words: Words, literals: Sequence[str], probes: Sequence[Conversation]) -> bool:
    """Whether blocks with these words give text and trained stretches of the jinja rendering, for every probe."""
    blocks = Blocks(words, literals)
    patterns: list[list[str]] = []
    texts: list[list[str]] = []
    for keep in (True, False):
        found = blocks.render(talks_of(probes), np.full(len(probes), keep))
        if found.is_odd.any():
            return False
        patterns.append(split_letters(found))
        texts.append(found.texts)
    for (i, probe), keep, train_on in itertools.product(enumerate(probes), (True, False), TRAIN_ON):
        try:
            expected = template.cut(probe, train_on=train_on, keep_empty_think=keep)
        except BadRow:
            return False
        if blocks.segments(texts[not keep][i], patterns[not keep][i], train_on) != expected:
            return False
    return True


def split_letters(found: Renderings) -> list[str]:
    """The pattern of each text."""
    ends = np.cumsum(found.num_blocks).tolist()
    letters = found.letters.tobytes().decode()
    return [letters[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


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
