"""A chat template's rendering of a conversation, cut into segments: trained or not, control token or plain text.

The rendering is the tokenizer's own chat template's, character for character. Where a message's text stands in it is known
from traced strings (module `traced`), never by searching for the text. Where a turn begins and ends is learned from what the
template writes around the contents of a short probe conversation. A row whose rendering cannot be cut in this way is refused
with the reason. jinja2 takes 0.1 to 0.3 ms a row; `blocks` renders the usual templates without it.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

from mmdata.encode.rows import BadRow, Conversation, JsonObject, Message, texts_of
from mmdata.encode.traced import GENERATION, TOOLS, Origin, origins_of, template_environment, traced
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
    """A piece of rendered text; with `is_control` it is exactly one special token."""

    text: str
    is_trained: bool
    is_control: bool


class _Turn(NamedTuple):
    """The header that a template writes before an answer, the end of turn after it, and the template's era."""

    header: str
    end: str
    era: str


class Template:
    """A tokenizer's chat template (the built-in ChatML when it has none), compiled once."""

    def __init__(self, tokenizer: Tokenizer, *, era: str = "auto"):
        """TokenizerError when the template cannot be used; UsageError when it is not of the `era` asked for."""
        self.text = tokenizer.chat_template or CHATML
        self.name = str(tokenizer.dir)
        self._special = tokenizer.special_tokens
        self._last: tuple[Conversation, str] | None = None  # the last rendering: a probe is cut in several ways
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
            self.literals = _literals(environment.parse(self.text))
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
        """seed: the end of a user's turn is the assistant's header; 3: every answer opens with a think block; 2: neither."""
        return self._turn.era

    def segments(
        self,
        conversation: Conversation,
        *,
        train_on: str = "assistant",
        first_trained: int = 0,
        keep_empty_think: bool = True,
    ) -> list[Segment]:
        """Cut a conversation's rendering by jinja2; the segments joined are the rendering. BadRow when it cannot be cut.

        Trained are the assistant's turns from message `first_trained` on: reasoning, content, tool calls, the end of turn
        and the newline after it. `train_on` "last" trains only the last of them, "all" everything from that message on.
        Without `keep_empty_think`, think blocks that the template wrote and the data did not are left out.
        """
        assert train_on in TRAIN_ON
        messages = conversation.messages
        last = self._last
        if last is None or last[0] is not conversation:
            last = self._last = conversation, self.render(messages, conversation.tools)
        text = last[1]
        origins = origins_of(text)
        self._check_complete(messages, origins)
        self._check_content_stays_plain(conversation, text)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        turns = self._turns(text, origins, answers)
        dropped = [] if keep_empty_think else self._empty_thinks(text, origins, turns)
        turns = [turn for i, turn in zip(answers, turns, strict=True) if i >= first_trained]
        if train_on == "last":
            turns = turns[-1:]
        elif train_on == "all":
            turns = [(turns[0][0] if first_trained else 0, len(text))]
        return merged(self._assemble(text, turns, dropped))

    def prompt_ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[JsonObject] = (),
        *,
        think: bool | None = None,
    ) -> list[int]:
        """Prompt ids: the messages, then the header of the answer to come. Control strings in contents stay plain text.

        `think` asks for an answer with or without thinking where the template has that choice (None: its default).
        TokenizerError when the template refuses the messages.
        """
        try:
            segments = self._assemble(self.render(messages, tools, is_prompt=True, think=think), [], [])
        except BadRow as bad:
            raise TokenizerError(f"{self.name}: its chat template refuses these messages: {bad.detail}") from None
        ids: list[int] = []
        for group in stretches(segments):
            text = "".join(segment.text for segment in group)
            is_control = group[0].is_control
            ids += [tokenizer.control_tokens[text]] if is_control else tokenizer.encode_batch([text])[0].tolist()
        return ids

    # ---- rendering

    def control_tokens_in(self, text: str) -> list[str]:
        """The tokenizer's special tokens that stand in `text`, in order."""
        return self._control.findall(text)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonObject] = (),
        *,
        is_prompt: bool = False,
        think: bool | None = None,
    ) -> str:
        """The text that jinja2 renders, traced; BadRow when the template refuses. is_prompt: with the next answer's header."""
        # the variables of MiniMind-3's template and of Qwen3's
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

    def _turns(self, text: str, origins: list[Origin], answers: list[int]) -> list[tuple[int, int]]:
        """The characters of `text` that each of these assistant messages is trained on: (begin, end)."""
        marked = [origin for origin in getattr(text, "origins", ()) if origin.source == GENERATION]
        turns = []
        for i in answers:
            own = [n for n, origin in enumerate(origins) if origin.source >= 0 and origin.source // 3 == i]
            first, last = own[0], own[-1]
            begin, end = origins[first].begin, origins[last].end
            if marked:
                around = [block for block in marked if block.begin <= begin and end <= block.end]
                if not around:
                    raise BadRow("template cannot be cut", f"message {i + 1} is outside the generation blocks")
                turns.append((around[0].begin, around[0].end))
                continue
            before = origins[first - 1].end if first else 0
            after = origins[last + 1].begin if last + 1 < len(origins) else len(text)
            header = text.rfind(self._turn.header, before, begin)
            close = text.find(self._turn.end, end, after)
            if header < 0 or close < 0:
                detail = f"message {i + 1} has not the assistant's header and end of turn"
                raise BadRow("template cannot be cut", detail)
            turns.append((header + len(self._turn.header), close + len(self._turn.end)))
        return turns

    @staticmethod
    def _empty_thinks(text: str, origins: list[Origin], turns: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Empty think blocks at the beginning of turns in which nothing comes from the data: (begin, end)."""
        blocks = [(begin, begin + len(EMPTY_THINK)) for begin, _ in turns if text.startswith(EMPTY_THINK, begin)]
        return [(b, e) for b, e in blocks if not any(origin.begin < e and origin.end > b for origin in origins)]

    def _assemble(self, text: str, turns: list[tuple[int, int]], dropped: list[tuple[int, int]]) -> list[Segment]:
        """Cut `text` at the edges of turns and of the control tokens that the template wrote; leave out `dropped` ranges."""
        plain = str.__getitem__(text, slice(None))
        control = self._template_control(text)
        cuts = sorted({0, len(plain), *itertools.chain(*turns, *dropped, *control)})
        control_begins = {begin for begin, _ in control}
        dropped_begins = {begin for begin, _ in dropped}
        segments = []
        for begin, end in itertools.pairwise(cuts):
            if begin not in dropped_begins:
                is_trained = any(b <= begin < e for b, e in turns)
                segments.append(Segment(plain[begin:end], is_trained, begin in control_begins))
        return segments

    def _template_control(self, text: str) -> list[tuple[int, int]]:
        """The control tokens in `text` that the template itself wrote: (begin, end)."""
        spans: list[tuple[int, int]] = []
        position = 0
        for begin, end in [*((origin.begin, origin.end) for origin in origins_of(text)), (len(text), len(text))]:
            spans.extend(match.span() for match in self._control.finditer(text, position, max(position, begin)))
            position = max(position, end)
        return spans

    # ---- checks

    @staticmethod
    def _check_complete(messages: Sequence[Message], origins: list[Origin]) -> None:
        """BadRow when the rendering leaves out a content, tool calls, or a whole answer."""
        shown = {origin.source for origin in origins}
        for i, message in enumerate(messages):
            if message.content.strip() and 3 * i + _CONTENT not in shown:
                raise BadRow("no place in the template", f"message {i + 1} ({message.role})")
            if message.tool_calls and 3 * i + _CALLS not in shown:
                raise BadRow("no place in the template", f"message {i + 1}: tool calls")
            if message.role == "assistant" and not shown & {3 * i + field for field in range(3)}:
                raise BadRow("no place in the template", f"message {i + 1}: nothing of the answer is shown")

    def _check_content_stays_plain(self, conversation: Conversation, text: str) -> None:
        """BadRow when control strings in content cannot be told from the template's own.

        That happens when the template handles text by an operation that traced strings do not follow.
        """
        if not self.control_strings(conversation):
            return
        harmless = _map_text(conversation, lambda text: self._control.sub("x", text))
        expected = self._template_control(self.render(harmless.messages, harmless.tools))
        if len(self._template_control(text)) != len(expected):
            raise BadRow("template cannot be cut", "control strings in content cannot be told from the template's own")

    def control_strings(self, conversation: Conversation) -> list[str]:
        """The tokenizer's special-token strings in the conversation's own text."""
        return [string for text in texts_of(conversation) for string in self._control.findall(text)]

    # ---- the template's texts around turns

    def _learn_turn(self) -> _Turn:
        """Header, end of turn and era, from a probe of two turns."""
        two = [Message("user", "Ask"), Message("assistant", "Tell")] * 2
        gaps = self._gaps(two)
        after_user = self._gaps(two[:1])[-1]
        prompt = self._gaps(two[:1], is_prompt=True)[-1]
        end = _common_prefix(self._gaps(two[:2])[-1], gaps[2])
        # The header is what a prompt ends with; a part of the text before an answer may be left for the model to write.
        header = prompt if gaps[1].startswith(prompt) and prompt != after_user else gaps[1]
        header = header.partition("<think>")[0]
        era = "seed" if prompt == after_user == gaps[1] else "2"
        if era != "seed":
            header = header.removeprefix(after_user)
        if gaps[1].endswith(EMPTY_THINK) and gaps[3].endswith(EMPTY_THINK):
            era = "3"
        return _Turn(header, end, era)

    def _gaps(self, messages: Sequence[Message], *, is_prompt: bool = False) -> list[str]:
        """The texts that the template writes before, between and after the contents of these messages."""
        text = self.render(messages, is_prompt=is_prompt)
        origins = origins_of(text)
        if [origin.source for origin in origins] != [3 * i for i in range(len(messages))]:
            raise BadRow(
                "template cannot be cut", "it does not show the messages of a plain conversation once, in order"
            )
        edges = [0, *(edge for origin in origins for edge in origin[:2]), len(text)]
        return [str.__getitem__(text, slice(*edges[n : n + 2])) for n in range(0, len(edges), 2)]


def stretches(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Group segments into the units of encoding: each control token alone, and all plain text between two of them."""
    return [
        group
        for is_control, run in itertools.groupby(segments, key=lambda segment: segment.is_control)
        for group in ([[segment] for segment in run] if is_control else [list(run)])
    ]


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbouring plain segments that are both trained or both not."""
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


def _as_dict(message: Message, index: int) -> JsonObject:
    """The message as a template gets it, its texts traced to it."""
    fields: JsonObject = {"role": message.role, "content": traced(message.content, 3 * index + _CONTENT)}
    if message.reasoning_content is not None:
        fields["reasoning_content"] = traced(message.reasoning_content, 3 * index + _REASONING)
    if message.tool_calls:
        fields["tool_calls"] = traced(message.tool_calls, 3 * index + _CALLS)
    return fields


def _map_text(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with `change` applied to every string in it, JSON keys included."""

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


# The operations on text after which `_literals` still lists everything that a rendering depends on: they strip its edges or
# search for a constant string.
_EDGE_AND_SEARCH = {"strip", "lstrip", "rstrip", "split", "startswith", "endswith", "replace"}
_TYPE_TESTS = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "true", "false", "boolean"}


def _literals(tree: nodes.Template) -> list[str] | None:
    """The strings that a template searches messages for; None when it does more with text than search and strip."""
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
