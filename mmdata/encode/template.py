"""A conversation in; its rendering out, cut into segments that are each trained or not and each control or plain text.

The rendering is the tokenizer's own chat template's, character for character. Where a message's text stands in it comes
from traced strings (see `traced`), never from searching for it; where a turn begins and ends comes from what the template
writes around two-word probe conversations. A row whose rendering cannot be cut this way is refused with the reason.

jinja2 takes about 0.1 ms a row. Templates that write a fixed text between each two roles are learned as such from the
probes, and plain rows are then put together directly.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

from mmdata.encode.rows import BadRow, Conversation, Message, texts_of
from mmdata.encode.traced import GENERATION, TOOLS, Run, template_environment, traced
from mmdata.errors import TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import CHATML, Tokenizer

ERAS = ("seed", "2", "3")
TRAIN_ON = ("all", "assistant", "last")
EMPTY_THINK = "<think>\n\n</think>\n\n"
_RENDER_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
_CONTENT, _REASONING, _CALLS = range(3)  # a message's fields: source = 3 * message + field


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of rendered text; `is_control` ones are exactly one special token."""

    text: str
    is_trained: bool
    is_control: bool


class _Turn(NamedTuple):
    """What a template writes around the assistant's turns: the header before, the end of turn after, and the era's habit."""

    header: str
    end: str
    era: str


class Template:
    """A tokenizer's chat template (the built-in ChatML when it has none), compiled once."""

    def __init__(self, tokenizer: Tokenizer, *, era: str = "auto", only_jinja: bool = False):
        """`only_jinja`: every row is rendered by jinja2, also one that could be put together directly."""
        self.text = tokenizer.chat_template or CHATML
        self.name = str(tokenizer.dir)
        self._special = tokenizer.special_tokens
        self._last: tuple[Conversation, str] | None = None  # rendered by `cut`: a probe is cut in several ways
        if tokenizer.chat_template is None and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.control_tokens.keys():
            raise TokenizerError(
                f"{self.name} has no chat template, and no <|im_start|> and <|im_end|> for the built-in one",
                'add a "chat_template" to tokenizer_config.json',
            )
        longest_first = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        try:
            environment = template_environment()
            self._compiled = environment.from_string(self.text)
            self._turn = self._learn_turn()
            self.literals = None if only_jinja else _literals(environment.parse(self.text))
            self._plan = self._learn_plan(self.literals)
        except (jinja2.TemplateError, BadRow) as error:
            raise TokenizerError(
                f"{self.name}: its chat template cannot be used: {error}", "try another template"
            ) from error
        if era not in ("auto", self._turn.era):
            raise UsageError(
                f"--era {era}, but the template of {self.name} is of era {self._turn.era}", "leave --era at auto"
            )

    @property
    def era(self) -> str:
        """seed: the assistant's header ends the user's turn; 3: every answer opens with a think block; 2: neither."""
        return self._turn.era

    def segments(
        self,
        conversation: Conversation,
        *,
        train_on: str = "assistant",
        first_trained: int = 0,
        keep_empty_think: bool = True,
    ) -> list[Segment]:
        """Cut a conversation's rendering; the segments joined are the rendering. Raises BadRow when it cannot be cut.

        Trained are the assistant's turns from message `first_trained` on: reasoning, content, tool calls, the end of turn
        and the newline after it. `train_on` "last" keeps the last of them, "all" trains everything from that message on.
        Without `keep_empty_think`, think blocks that the template wrote and the data did not are left out.
        """
        assert train_on in TRAIN_ON
        if self._plan and self._plan.covers(conversation):
            return self._plan.segments(conversation.messages, train_on, first_trained, keep_empty_think)
        return self.cut(conversation, train_on, first_trained, keep_empty_think)

    def prompt_ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        think: bool | None = None,
    ) -> list[int]:
        """Ids of messages with the header of the answer to come, as a model is asked; content never becomes control.

        `think` asks for an answer with or without thinking, from templates that know the difference (None: their habit).
        Raises TokenizerError when the template refuses the messages.
        """
        try:
            segments = self._assemble(self._render(messages, tools, is_prompt=True, think=think), [], [])
        except BadRow as bad:
            raise TokenizerError(f"{self.name}: its chat template cannot show these messages: {bad.detail}") from None
        ids: list[int] = []
        for group in stretches(segments):
            text = "".join(segment.text for segment in group)
            is_control = group[0].is_control
            ids += [tokenizer.control_tokens[text]] if is_control else tokenizer.encode_batch([text])[0].tolist()
        return ids

    # ---- rendering

    def rendering(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """What jinja2 writes for these messages; BadRow when the template refuses them."""
        return self._render(messages, tools)

    def control_tokens_in(self, text: str) -> list[str]:
        """The tokenizer's special tokens that stand in `text`, in order."""
        return self._control.findall(text)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        is_prompt: bool = False,
        think: bool | None = None,
    ) -> str:
        # MiniMind-3's name for it and Qwen3's
        thinking = {} if think is None else {"open_thinking": think, "enable_thinking": think}
        try:
            return self._compiled.render(
                messages=[_as_dict(message, i) for i, message in enumerate(messages)],
                tools=[traced(tool, TOOLS) for tool in tools] or None,
                documents=None,
                add_generation_prompt=is_prompt,
                **thinking,
                **self._special,
            )
        except _RENDER_ERRORS as error:
            raise BadRow("template refuses", str(error)[:200]) from None

    def cut(
        self,
        conversation: Conversation,
        train_on: str = "assistant",
        first_trained: int = 0,
        keep_empty_think: bool = True,
    ) -> list[Segment]:
        """As `segments`, always by jinja2."""
        messages = conversation.messages
        last = self._last
        if last is None or last[0] is not conversation:
            last = self._last = conversation, self._render(messages, conversation.tools)
        text = last[1]
        runs = sorted(run for run in getattr(text, "runs", ()) if run.source != GENERATION)
        self._check_complete(messages, runs)
        self._check_content_stays_plain(conversation, text)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        turns = self._turns(text, runs, answers)
        dropped = [] if keep_empty_think else self._empty_thinks(text, runs, turns)
        turns = [turn for i, turn in zip(answers, turns, strict=True) if i >= first_trained]
        if train_on == "last":
            turns = turns[-1:]
        elif train_on == "all":
            turns = [(turns[0][0] if first_trained else 0, len(text))]
        return merged(self._assemble(text, turns, dropped))

    def _turns(self, text: str, runs: list[Run], answers: list[int]) -> list[tuple[int, int]]:
        """The stretch of `text` each of these assistant messages is trained on."""
        marked = [run for run in getattr(text, "runs", ()) if run.source == GENERATION]
        turns = []
        for i in answers:
            mine = [n for n, run in enumerate(runs) if run.source >= 0 and run.source // 3 == i]
            first, last = mine[0], mine[-1]
            begin, end = runs[first].begin, runs[last].end
            if marked:
                around = [run for run in marked if run.begin <= begin and end <= run.end]
                if not around:
                    raise BadRow("template cannot be cut", f"message {i + 1} is outside the generation blocks")
                turns.append((around[0].begin, around[0].end))
                continue
            before = runs[first - 1].end if first else 0
            after = runs[last + 1].begin if last + 1 < len(runs) else len(text)
            header = text.rfind(self._turn.header, before, begin)
            close = text.find(self._turn.end, end, after)
            if header < 0 or close < 0:
                raise BadRow(
                    "template cannot be cut", f"message {i + 1} has not the assistant's header and end of turn"
                )
            turns.append((header + len(self._turn.header), close + len(self._turn.end)))
        return turns

    @staticmethod
    def _empty_thinks(text: str, runs: list[Run], turns: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Think blocks at the beginning of turns that hold no text of the data."""
        blocks = [(begin, begin + len(EMPTY_THINK)) for begin, _ in turns if text.startswith(EMPTY_THINK, begin)]
        return [(b, e) for b, e in blocks if not any(run.begin < e and run.end > b for run in runs)]

    def _assemble(self, text: str, turns: list[tuple[int, int]], dropped: list[tuple[int, int]]) -> list[Segment]:
        """Cut `text` at the ends of turns and around the control tokens that the template itself wrote."""
        plain = str.__getitem__(text, slice(None))
        control = self._template_control(text)
        cuts = sorted({0, len(plain), *itertools.chain(*turns, *dropped, *control)})
        starts = {begin for begin, _ in control}
        gone = {begin for begin, _ in dropped}
        segments = []
        for begin, end in itertools.pairwise(cuts):
            if begin not in gone:
                is_trained = any(b <= begin < e for b, e in turns)
                segments.append(Segment(plain[begin:end], is_trained, begin in starts))
        return segments

    def _template_control(self, text: str) -> list[tuple[int, int]]:
        """Where control tokens stand outside of what came from the conversation."""
        found = []
        position = 0
        runs = sorted(run for run in getattr(text, "runs", ()) if run.source != GENERATION)
        for begin, end in [*((run.begin, run.end) for run in runs), (len(text), len(text))]:
            found.extend(match.span() for match in self._control.finditer(text, position, max(position, begin)))
            position = max(position, end)
        return found

    # ---- checks

    @staticmethod
    def _check_complete(messages: Sequence[Message], runs: list[Run]) -> None:
        shown = {run.source for run in runs}
        for i, message in enumerate(messages):
            if message.content.strip() and 3 * i + _CONTENT not in shown:
                raise BadRow("no place in the template", f"message {i + 1} ({message.role})")
            if message.tool_calls and 3 * i + _CALLS not in shown:
                raise BadRow("no place in the template", f"message {i + 1}: tool calls")
            if message.role == "assistant" and not shown & {3 * i + field for field in range(3)}:
                raise BadRow("no place in the template", f"message {i + 1}: nothing of the answer is shown")

    def _check_content_stays_plain(self, conversation: Conversation, text: str) -> None:
        """A template's operation that traced strings do not follow must not turn content into control tokens."""
        if not self.control_strings(conversation):
            return
        harmless = _map_text(conversation, lambda said: self._control.sub("x", said))
        expected = self._template_control(self._render(harmless.messages, harmless.tools))
        if len(self._template_control(text)) != len(expected):
            raise BadRow("template cannot be cut", "control strings in content cannot be told from the template's own")

    def control_strings(self, conversation: Conversation) -> list[str]:
        """The tokenizer's special-token strings that stand in what the conversation says."""
        return [string for text in texts_of(conversation) for string in self._control.findall(text)]

    # ---- what the template writes around turns

    def _learn_turn(self) -> _Turn:
        two = [Message("user", "Ask"), Message("assistant", "Tell")] * 2
        gaps = self._gaps(two)
        after_user = self._gaps(two[:1])[-1]
        prompt = self._gaps(two[:1], is_prompt=True)[-1]
        end = _common_prefix(self._gaps(two[:2])[-1], gaps[2])
        # A template may leave part of what stands before an answer for the model to write: that part is no header.
        header = prompt if gaps[1].startswith(prompt) and prompt != after_user else gaps[1]
        header = header.partition("<think>")[0]
        era = "seed" if prompt == after_user == gaps[1] else "2"
        if era != "seed":
            header = header.removeprefix(after_user)
        if gaps[1].endswith(EMPTY_THINK) and gaps[3].endswith(EMPTY_THINK):
            era = "3"
        return _Turn(header, end, era)

    def _gaps(self, messages: Sequence[Message], *, is_prompt: bool = False) -> list[str]:
        """What the template writes before, between and after the contents of these messages."""
        text = self._render(messages, is_prompt=is_prompt)
        runs = sorted(run for run in getattr(text, "runs", ()) if run.source != GENERATION)
        if [run.source for run in runs] != [3 * i for i in range(len(messages))]:
            raise BadRow(
                "template cannot be cut", "it does not show a plain conversation's messages once each, in order"
            )
        edges = [0, *(edge for run in runs for edge in run[:2]), len(text)]
        return [str.__getitem__(text, slice(*edges[n : n + 2])) for n in range(0, len(edges), 2)]

    def _learn_plan(self, literals: list[str] | None) -> "_Plan | None":
        """The fixed texts between roles, if cutting probes with and without them gives the same segments."""
        if literals is None:
            return None
        rule = Message("system", "Be\tkind.")
        ask, tell = Message("user", "Ask 1?\n\n*2*"), Message("assistant", "a: [b]\n  c" * 9)
        probes = [[ask, tell] * n for n in (1, 2, 3)] + [[rule, *[ask, tell] * n] for n in (1, 2, 3)]
        gaps: dict[tuple[str, str], tuple[str, int, int]] = {}
        try:
            for messages in probes[1], probes[4]:
                roles = ["", *(message.role for message in messages), ""]
                for pair, gap in zip(itertools.pairwise(roles), self._gaps(messages), strict=True):
                    head = gap.rfind(self._turn.header) + len(self._turn.header) if pair[1] == "assistant" else len(gap)
                    gaps[pair] = (gap, len(self._turn.end) if pair[0] == "assistant" else 0, head)
            plan = _Plan(self._control, gaps, literals)
            talks = [Conversation(tuple(messages)) for messages in probes]
            for talk, train_on, is_reply, keep in itertools.product(talks, TRAIN_ON, (False, True), (True, False)):
                options = train_on, len(talk.messages) - 1 if is_reply else 0, keep
                if plan.segments(talk.messages, *options) != self.cut(talk, *options):
                    return None
        except BadRow:
            return None
        return plan


class _Plan:
    """Puts plain conversations together from the fixed texts a template writes between each two roles."""

    def __init__(
        self, control: re.Pattern[str], gaps: dict[tuple[str, str], tuple[str, int, int]], literals: list[str]
    ):
        self._control = control
        self._gaps = gaps
        self._unusual = re.compile("|".join(map(re.escape, literals)) or r"(?!)")
        self._cache: dict[tuple[str, str, bool, bool, bool], list[Segment]] = {}

    def covers(self, conversation: Conversation) -> bool:
        """Whether no test or strip that the template makes could change how this conversation is written."""
        if conversation.tools:
            return False
        last = ""
        for message in conversation.messages:
            said = message.content
            if message.reasoning_content is not None or message.tool_calls or (last, message.role) not in self._gaps:
                return False
            if not said or said[0].isspace() or said[-1].isspace() or self._unusual.search(said):
                return False
            last = message.role
        return (last, "") in self._gaps

    def segments(
        self, messages: Sequence[Message], train_on: str, first_trained: int, keep_empty_think: bool
    ) -> list[Segment]:
        """As `Template.segments`."""
        trained = [train_on == "all" or message.role == "assistant" for message in messages]
        trained[:first_trained] = [False] * first_trained
        if train_on == "last":
            trained = [False] * (len(messages) - 1) + trained[-1:]
        pieces: list[Segment] = []
        before, was_trained = "", train_on == "all" and not first_trained
        for message, is_trained in zip(messages, trained, strict=True):
            pieces += self._gap(before, message.role, was_trained, is_trained, keep_empty_think)
            pieces.append(Segment(message.content, is_trained, False))
            before, was_trained = message.role, is_trained
        return merged(pieces + self._gap(before, "", was_trained, train_on == "all", keep_empty_think))

    def _gap(
        self, before: str, role: str, was_trained: bool, is_trained: bool, keep_empty_think: bool
    ) -> list[Segment]:
        key = (before, role, was_trained, is_trained, keep_empty_think)
        if key not in self._cache:
            gap, tail, head = self._gaps[before, role]
            begin = head + len(EMPTY_THINK) if not keep_empty_think and gap.startswith(EMPTY_THINK, head) else head
            pieces = [
                (gap[:tail], was_trained),
                (gap[tail:head], was_trained and is_trained),
                (gap[begin:], is_trained),
            ]
            self._cache[key] = [
                Segment(text, trained, n % 2 == 1)  # splitting by a group puts what matched at odd places
                for piece, trained in pieces
                for n, text in enumerate(self._control.split(piece))
                if text
            ]
        return self._cache[key]


def stretches(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Group segments into what is encoded as one: each control token alone, and the plain text between two of them."""
    return [
        group
        for is_control, found in itertools.groupby(segments, key=lambda segment: segment.is_control)
        for group in ([[segment] for segment in found] if is_control else [list(found)])
    ]


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """Join plain neighbours that are trained alike."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and not last.is_control and not segment.is_control and last.is_trained == segment.is_trained:
            merged[-1] = Segment(last.text + segment.text, last.is_trained, False)
        else:
            merged.append(segment)
    return merged


def _common_prefix(one: str, other: str) -> str:
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return one[:same]


def _as_dict(message: Message, index: int) -> dict[str, Any]:
    """The message as a template sees it, its texts traced to it."""
    found: dict[str, Any] = {"role": message.role, "content": traced(message.content, 3 * index + _CONTENT)}
    if message.reasoning_content is not None:
        found["reasoning_content"] = traced(message.reasoning_content, 3 * index + _REASONING)
    if message.tool_calls:
        found["tool_calls"] = traced(message.tool_calls, 3 * index + _CALLS)
    return found


def _map_text(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with every string it says, JSON keys included, changed."""

    def of(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {change(key): of(item) for key, item in value.items()}
        return [of(item) for item in value] if isinstance(value, (list, tuple)) else value

    messages = (
        Message(m.role, of(m.content), of(m.reasoning_content), tuple(of(m.tool_calls))) for m in conversation.messages
    )
    return Conversation(tuple(messages), tuple(of(conversation.tools)))


# What a template may do to a text for `_literals` to tell all it depends on: its edges, and strings found in it.
_EDGE_AND_SEARCH = {"strip", "lstrip", "rstrip", "split", "startswith", "endswith", "replace"}
_TYPE_TESTS = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "true", "false", "boolean"}


def _literals(tree: nodes.Template) -> list[str] | None:
    """Strings that a template searches messages for, or None when it does more with text than search and strip."""
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
