"""Fast rendering of many conversations without jinja2, for chat templates that write each message as a block: an open
token, the role, a newline, the text, a close token and a newline, as ChatML and MiniMind's templates do.

`learn` finds out with test conversations ("probes") whether a template is of this kind, and what it writes around
tools. A conversation for which the template could do something that the probes did not show, such as one whose text
contains a string that the template searches for, is marked as odd, and the caller renders it with jinja2. Arrow joins
the texts of a whole batch in less than 1 microsecond per row; jinja2 takes 100 to 300.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jinja2 import nodes

from mmdata.encode.columns import (
    ASSISTANT,
    ROLES,
    SYSTEM,
    TOOL,
    Conversations,
    TextCodes,
    as_numpy,
    byte_sizes,
    columns_of,
    compute,
    join_messages,
    strings,
    to_json,
    truths,
)
from mmdata.encode.rows import BadRow, Conversation, Message
from mmdata.encode.template import EMPTY_THINK, Template
from mmdata.encode.template.losses import SEARCHES
from mmdata.io.records import JsonObject

_FUNCTION_KEYS = {"name", "arguments"}
_CALL_KEYS = {*_FUNCTION_KEYS, "type", "function"}  # a call with others, such as an id, is rendered with jinja2
# In the block of an answer: the text between the open token and the trained part, and the text after the close token.
HEAD, TAIL = "assistant\n", "\n"


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """The texts that a chat template writes around messages. The `has_` fields and `tools` are set only if `learn`
    found renderings of such conversations equal to jinja2's."""

    open: str  # the control token that begins a block, such as <|im_start|>
    close: str  # the control token that ends a block, such as <|im_end|>
    default_system: str  # the block written for a conversation without system message and tools; may be empty
    thinks: bool  # the template begins every answer with a think block, an empty one if there is no reasoning
    tools: tuple[str, str] | None = None  # the texts before and after the list of tools; None: no tools
    has_calls: bool = False  # tool calls and tool messages
    has_reasoning: bool = False  # `reasoning_content` of messages
    has_late_system: bool = False  # system messages that are not the first message


@dataclass(frozen=True, slots=True)
class Renderings:
    """The rendered texts of R conversations, or of the R = 2P sides of P pairs.

    texts: of rows not in `is_odd`, in order; for pairs of all chosen, then of all rejected sides, of which only the
    messages after the shared ones. roles: int8 [total blocks], the role of every block of all texts, as an index of
    ROLES. num_blocks: int64 [texts], blocks of each text. first_trained: int64 [texts], the first block that may be
    trained: 0, but in a chosen text the number of blocks before the first message that differs. is_odd: bool [R], or
    [P] for pairs: only jinja2 renders the row correctly.
    """

    texts: list[str]
    roles: np.ndarray
    num_blocks: np.ndarray
    first_trained: np.ndarray
    is_odd: np.ndarray


class Blocks:
    """Renders conversations in one `BlockFormat`, many at a time, except those with one of the template's `literals`."""

    def __init__(self, format: BlockFormat, literals: Sequence[str]):
        self.format = format
        self._literals = "|".join(map(re.escape, literals))
        self._system = f"{format.open}system\n"
        self._close = f"{format.close}{TAIL}"
        self._assistant = f"{format.open}{HEAD}"
        response = "\n<tool_response>\n"
        self._heads = (
            self._system, f"{format.open}user\n", self._assistant, f"{format.open}user{response}", response,
            f"{self._assistant}{EMPTY_THINK}",
        )  # fmt: skip
        self._tails = (self._close, f"\n</tool_response>{self._close}", "\n</tool_response>")

    def render(self, columns: Conversations, keeps: np.ndarray) -> Renderings:
        """Render conversations, or both sides of pairs, except odd ones. keeps: bool [R], False for conversations
        without the empty think blocks that the template writes."""
        pc = compute()
        is_odd, contents = self._odd(columns), columns.contents
        is_answer = columns.roles == ASSISTANT
        changed = dict.fromkeys(columns.extras, "")
        if self.format.thinks:
            starts = as_numpy(pc.starts_with(contents, "\n"))
            changed |= dict.fromkeys(np.flatnonzero(is_answer & starts).tolist(), "")
        for at in changed:
            message = columns.extras.get(at) or Message(ROLES[columns.roles[at]], contents[at].as_py())
            text = self._answer(message, bool(keeps[columns.row_of[at]])) if is_answer[at] else message.content
            is_odd[at] |= not text
            changed[at] = text
        heads, tails = self._edges(columns, keeps & self.format.thinks, changed)
        if changed:
            is_changed = np.zeros(len(contents), bool)
            is_changed[list(changed)] = True
            texts = strings([changed[at] for at in sorted(changed)])
            contents = pc.replace_with_mask(contents, truths(is_changed), texts)
        is_odd_row = np.bincount(columns.row_of[is_odd], minlength=len(columns)) > 0
        if columns.is_pairs:
            is_odd_row = np.tile(is_odd_row.reshape(2, -1).any(axis=0), 2)
        is_written = ~(columns.is_repeated | is_odd_row[columns.row_of])
        roles, num_blocks, first_trained = self._blocks(columns, is_written)
        counts = np.bincount(columns.row_of[is_written], minlength=len(columns))[~is_odd_row]
        if not is_written.all():
            heads.codes, tails.codes = heads.codes[is_written], tails.codes[is_written]
            contents = contents.filter(truths(is_written))
        texts = join_messages(counts, heads.array(), contents, tails.array()).to_pylist()
        is_odd_row, is_good = is_odd_row[: len(keeps) // (1 + columns.is_pairs)], ~is_odd_row
        return Renderings(texts, roles, num_blocks[is_good], first_trained[is_good], is_odd_row)

    def _odd(self, columns: Conversations) -> np.ndarray:
        """Return bool [M]: True for messages with names or ids or not trained, which jinja2 must render or cut.
        Reasoning and calls are left to `_answer`."""
        pc = compute()
        format, roles, contents = self.format, columns.roles, columns.contents
        is_odd = np.zeros(len(roles), bool) if format.has_late_system else (roles == SYSTEM) & ~columns.is_first
        if not format.has_calls:
            is_odd |= roles == TOOL
        if self._literals:
            is_odd |= as_numpy(pc.match_substring_regex(contents, self._literals))
        is_odd[[at for at, message in columns.extras.items() if message.has_marks]] = True
        is_empty = byte_sizes(contents) == 0
        is_empty[list(columns.extras)] = False
        is_odd |= is_empty & (roles == ASSISTANT)
        if format.tools is None:
            is_odd[columns.begins[list(columns.tools)]] = True
        return is_odd

    def _edges(self, columns: Conversations, keeps: np.ndarray, changed: Iterable[int]) -> tuple[TextCodes, TextCodes]:
        """Return two columns of M texts: those that the template writes before and after the content of each message.
        keeps: see `render`. changed: indices of messages whose text `render` has made, with the think block."""
        format, roles = self.format, columns.roles
        is_next_tool = self._is_next_tool(columns)
        heads, tails = TextCodes(self._heads, len(roles)), TextCodes(self._tails, len(roles))
        heads.codes[:] = roles + is_next_tool
        thinks = (roles == ASSISTANT) & keeps[columns.row_of]
        thinks[list(changed)] = False
        heads.codes[thinks] = len(self._heads) - 1
        tails.codes[roles == TOOL] = 1
        tails.codes[np.roll(is_next_tool, -1)] = 2
        has_system = roles[columns.begins] == SYSTEM
        if format.default_system:
            is_default = ~has_system
            is_default[list(columns.tools)] = False
            heads.prepend(columns.begins[is_default], format.default_system)
        before, after = format.tools or ("", "")
        for row, tools in columns.tools.items():
            at = int(columns.begins[row])
            block = f"{before}{tools.rendered}{after}{self._close}"
            if has_system[row]:
                tails.set(at, f"\n\n{block}")
            else:
                heads.set(at, f"{self._system}{block}{heads.table[heads.codes[at]]}")
        return heads, tails

    @staticmethod
    def _is_next_tool(columns: Conversations) -> np.ndarray:
        """Return bool [M]: True for tool messages directly after another one; both are written in one block."""
        is_tool = columns.roles == TOOL
        return is_tool & np.roll(is_tool, 1) & ~columns.is_first

    def _blocks(self, columns: Conversations, is_written: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the role of every block written (int8), and for each conversation its number of blocks and the first
        that may be trained (both int64 [R]). is_written: bool [M], False for odd rows and a rejected side's copies of
        shared messages."""
        opens = ~self._is_next_tool(columns) & is_written
        # A conversation without a system message may get a block for the default one or for its tools.
        has_more = (columns.roles[columns.begins] != SYSTEM) & is_written[columns.begins]
        if not self.format.default_system:
            has_tools = np.zeros(len(columns), bool)
            has_tools[list(columns.tools)] = True
            has_more &= has_tools
        before = np.cumsum(opens) - opens  # number of blocks before each message, without those extra ones
        roles = np.insert(columns.roles[opens], before[columns.begins[has_more]], SYSTEM)
        first_trained = np.zeros(len(columns), np.int64)
        if columns.is_pairs:
            half = len(columns) // 2
            begins = columns.begins[:half]
            first_trained[:half] = before[begins + columns.num_shared] - before[begins] + has_more[:half]
        num_blocks = np.bincount(columns.row_of[opens], minlength=len(columns)) + has_more
        return roles, num_blocks, first_trained

    def _answer(self, message: Message, keep_empty_think: bool) -> str:
        """Return what the template writes for an answer with reasoning, tool calls, or newlines that it strips, after
        its header (think block, content and tool calls); "" if jinja2 must render it."""
        content, reasoning, format = message.content, message.reasoning_content, self.format
        if reasoning is not None and not format.has_reasoning:
            return ""
        calls = ""
        if format.thinks:
            content = content.lstrip("\n")
            if message.content and not content:
                return ""
        if message.tool_calls:
            if not format.has_calls:
                return ""
            for call in message.tool_calls:
                function = call.get("function") or call
                if function.keys() != _FUNCTION_KEYS or not call.keys() <= _CALL_KEYS:
                    return ""
                call = function
                arguments = call["arguments"]
                text = arguments if isinstance(arguments, str) else to_json(arguments)
                before = "\n" if content or calls else ""
                calls += f'{before}<tool_call>\n{{"name": "{call["name"]}", "arguments": {text}}}\n</tool_call>'
        elif not content:
            return ""
        if not format.thinks:
            return content + calls
        thought = reasoning.strip("\n") if reasoning else ""
        if thought:
            return f"<think>\n{thought}\n</think>\n\n{content}{calls}"
        return f"{EMPTY_THINK}{content}{calls}" if keep_empty_think else content + calls

    def marked(self, text: str, roles: Sequence[int]) -> str:
        """Return a rendered text with "[" and "]" around the trained part of each answer. roles: of the text's blocks,
        indices of ROLES. The contents of the messages must not contain the open token."""
        blocks = [self.format.open + block for block in text.split(self.format.open)[1:]]
        for i in (i for i, role in enumerate(roles) if role == ASSISTANT):
            blocks[i] = f"{self._assistant}[{blocks[i].removeprefix(self._assistant)}]"
        return "".join(blocks)


# --- learning


def learn(template: Template) -> Blocks | None:
    """Return a `Blocks` object that renders as the template does, or None if the template does not write blocks. Tools,
    tool calls, reasoning, and system messages after the first message are tested one by one: each is supported only if
    text and trained ranges of its test conversations equal those of jinja2."""
    literals = _literals(template.tree)
    if literals is None:
        return None
    try:
        prompt = template.render([_USER])
        whole = template.render([_USER, _ANSWER])
    except BadRow:
        return None
    controls = template.control_tokens_in(whole)
    if len(controls) < 4 or set(controls[0::2]) != {controls[0]} or set(controls[1::2]) != {controls[1]}:
        return None
    format = BlockFormat(controls[0], controls[1], prompt.partition(f"{controls[0]}user\n")[0], template.era == "3")
    if not _agrees(template, Blocks(format, literals), _PLAIN):
        return None
    extras: list[tuple[dict[str, Any], Sequence[Conversation]]] = [
        ({"tools": _learn_tools(template, format)}, _TOOLS),
        ({"has_calls": True}, _CALLS),
        ({"has_reasoning": True}, _REASONING),
        ({"has_late_system": True}, _LATE_SYSTEM),
    ]
    for extra, probes in extras:
        extended = replace(format, **extra)
        if _agrees(template, Blocks(extended, literals), probes):
            format = extended
    return Blocks(format, literals)


def _learn_tools(template: Template, format: BlockFormat) -> tuple[str, str] | None:
    """Return the texts before and after the list of tools in the system block of a conversation without a system
    message. None if the template does not write each tool as one line of JSON there, or conversations with tools have
    their own."""
    if template.for_tools:
        return None
    tool = {"name": "f"}
    try:
        text = template.render([_USER, _ANSWER], [tool])
    except BadRow:
        return None
    before, rendered, after = text.partition(f"\n{to_json(tool)}")
    opening = f"{format.open}system\n"
    if not rendered or not before.startswith(opening):
        return None
    return before.removeprefix(opening), after.partition(format.close)[0]


def _agrees(template: Template, blocks: Blocks, probes: Sequence[Conversation]) -> bool:
    """Return whether the template leaves out nothing of the probes, and their text and trained ranges equal jinja2's,
    with and without empty think blocks."""
    columns = columns_of(probes)
    renderings = {keep: blocks.render(columns, np.full(len(probes), keep)) for keep in (True, False)}
    if any(rendered.is_odd.any() for rendered in renderings.values()):
        return False
    roles = np.split(renderings[True].roles, np.cumsum(renderings[True].num_blocks)[:-1])
    for (i, probe), keep in itertools.product(enumerate(probes), renderings):
        try:
            segments = template.segments(probe, keep_empty_think=keep)
            if template.losses(probe):
                return False
        except BadRow:
            return False
        expected = "".join(f"[{part.text}]" if part.is_trained else part.text for part in segments).replace("][", "")
        if blocks.marked(renderings[keep].texts[i], roles[i].tolist()) != expected:
            return False
    return True


# Methods of strings that a template may use on text: they strip its edges or search for a constant string, so that the
# rendering depends on no other strings than `_literals` returns.
_EDGE_AND_SEARCH = {"strip", "lstrip", "rstrip", *SEARCHES}
_TYPE_TESTS = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "true", "false", "boolean"}


def _literals(tree: nodes.Template) -> list[str] | None:
    """Return the string constants that a template searches or compares messages with by a method call, `in` or `not
    in`, sorted. None if its rendering could depend on more, by an operation on text other than stripping and
    searching."""
    for node in tree.find_all((nodes.Filter, nodes.Test, nodes.Getitem, nodes.Call)):
        match node:
            case nodes.Filter(name="trim" | "tojson"):
                continue
            case nodes.Filter(name="length", node=nodes.Name(name="messages" | "loop_messages" | "tools")):
                continue
            case nodes.Test(name=name) if name in _TYPE_TESTS:
                continue
            case nodes.Getitem(arg=nodes.Slice(), node=nodes.Name(name="messages" | "loop_messages")):
                continue
            case nodes.Getitem(arg=nodes.Slice()):
                return None
            case nodes.Getitem() | nodes.Call(node=nodes.Name()):
                continue
            case nodes.Call(node=nodes.Getattr(attr=name)) if name in _EDGE_AND_SEARCH:
                continue
            case _:
                return None
    literals = []
    for node in tree.find_all((nodes.Compare, nodes.Call)):
        if isinstance(node, nodes.Call) or any(operand.op in ("in", "notin") for operand in node.ops):
            literals += [const.value for const in node.find_all(nodes.Const) if isinstance(const.value, str)]
    return sorted({literal for literal in literals if literal.strip()})


# The probes. Their texts have newlines and spaces at the edges, escapes and non-ASCII characters, because templates
# differ in how they strip and escape text. No text contains a control token.
_USER, _ANSWER = Message("user", "Ask 1?\n\n*2*"), Message("assistant", "a: [b]\n  c")
_RULE = Message("system", "Be\tkind.")
_EDGES = (Message("user", "\n a \n"), Message("assistant", "\n\n  b \n\n"))
_FUNCTION = {"name": "add", "arguments": {"a": 1, "b": ["é\n", None]}}
_CALL = Message("assistant", "", None, (_FUNCTION,))
_CALL_2 = Message("assistant", "so:", None, ({"function": _FUNCTION}, {"name": "f", "arguments": '{"x": "é"}'}))
_TOOL = Message("tool", '{"sum": "é"}\n')
_THOUGHT = (Message("assistant", "\nso", "\n\nwhy \n"), Message("assistant", "so", ""))
_TURN = (_USER, _ANSWER)


def _probes(*messages: Sequence[Message], tools: Sequence[JsonObject] = ()) -> tuple[Conversation, ...]:
    """Return one conversation for each list of messages, all with the same tools."""
    return tuple(Conversation(tuple(one), tuple(tools)) for one in messages)


_PLAIN = _probes(
    *([*_TURN] * n for n in (1, 2, 3)), *([_RULE, *_TURN * n] for n in (1, 2, 3)), _EDGES * 2,
    [Message("system", ""), *_TURN], [Message("system", "\n x\n"), *_EDGES],
)  # fmt: skip
_SPECS = ({"name": "f", "é": {"a": [1, 2.5, True, None]}}, {"type": "function", "function": {"name": "<g>"}})
_TOOLS = (
    *_probes(_TURN, [_RULE, *_TURN], [Message("system", ""), *_TURN * 2], tools=_SPECS[:1]),
    *_probes(_TURN, [_RULE, *_EDGES], tools=_SPECS),
)
_CALLS = _probes(
    [_USER, _CALL, _TOOL, _ANSWER], [_USER, _CALL_2, _TOOL, _TOOL, _ANSWER, *_TURN],
    [_RULE, *_TURN, _USER, _CALL, _TOOL, _CALL_2, _TOOL, _TOOL, _TOOL, _ANSWER],
)  # fmt: skip
_REASONING = _probes(
    [_USER, _THOUGHT[0]], [_USER, _THOUGHT[1], _USER, _THOUGHT[0]], [_RULE, *_TURN, _USER, _THOUGHT[0]]
)
_LATE_SYSTEM = _probes([*_TURN, _RULE, *_TURN], [_RULE, _RULE, *_TURN])
