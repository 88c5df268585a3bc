"""Rendering of conversations by the tokenizer's chat template with jinja2, and cutting of the text into segments.

The text is that of transformers' `apply_chat_template`, character for character. Which part of it came from which
message, and what is left out, is known from strings that record their origin (module `traced`), not from searching for
the messages' text. What the template writes around an answer is found by rendering a short test conversation. A row
whose rendering cannot be cut by these rules raises `BadRow`. jinja2 takes 0.1 to 0.3 ms per row; the module `forms`
learns from one rendering those of all rows that differ only in what their texts say.
"""

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

from mmdata.encode.rows import BadRow, Conversation, Message, texts_of
from mmdata.encode.template.calls import CallForm, nested
from mmdata.encode.template.limits import BoundedEnvironment, bounded
from mmdata.encode.template.losses import Loss, loss_of, markup_of
from mmdata.encode.template.segments import Segment, merged, span_of, stretches, without
from mmdata.encode.template.stand_ins import RecordingEnvironment
from mmdata.encode.template.traced import (
    GENERATION,
    Rendering,
    SourceText,
    missing_parts,
    origins_of,
    plain_names,
    template_environment,
    traced,
)
from mmdata.encode.template.turns import EMPTY_THINK, TURN, common_prefix, learn_turn
from mmdata.errors import TokenizerError, UsageError
from mmdata.io.records import JsonObject
from mmdata.tokenizer.chat_template import CHATML, DEFAULT, TOOL_USE
from mmdata.tokenizer.tokenizer import Tokenizer

ERAS = ("seed", "2", "3")
TRAIN_ON = ("all", "assistant", "last")
_RENDER_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip
_MOST_CHARACTERS = 2**18  # of a template; published ones have at most 30,000, and compiling a large one takes minutes
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")  # what templates call the reasoning of an answer


class Ending(NamedTuple):
    """What ends a generated answer, and is no part of it: one of these token ids, or of these texts, which are no
    token."""

    ids: tuple[int, ...]
    texts: tuple[str, ...] = ()


class Template:
    """The compiled chat template of a tokenizer, or the built-in ChatML template if it has none. ends: what the
    template writes after an answer, control tokens or other texts; may be empty. call_ends: the same after an answer
    that calls tools. missing_prompt: the beginning of answers, if the template does not write it at the end of
    prompts."""

    def __init__(self, tokenizer: Tokenizer, *, era: str = "auto", name: str = DEFAULT):
        """Compile the template and find out what it writes around answers. name: one of several templates; as in
        transformers, conversations with tools take TOOL_USE, if the tokenizer has it, and all others DEFAULT. Raises
        TokenizerError if it cannot be used, and UsageError if it is not of the required era ("auto": any)."""
        self.text = tokenizer.chat_templates.get(name) or CHATML
        self.name = str(tokenizer.dir)
        self._special = tokenizer.special_tokens
        self._last: tuple[Conversation, Rendering] | None = None  # the newest; a row is asked for several times
        self.for_tools: Template | None = None
        if tokenizer.chat_templates and DEFAULT not in tokenizer.chat_templates:
            names = ", ".join(tokenizer.chat_templates)
            raise TokenizerError(
                f"{self.name} has the chat templates {names}, none is named {DEFAULT}", f"name one of them {DEFAULT}"
            )
        if not tokenizer.chat_templates and not {"<|im_start|>", "<|im_end|>"} <= tokenizer.control_tokens.keys():
            raise TokenizerError(
                f"{self.name} has no chat template, and no <|im_start|> and <|im_end|> for the built-in one",
                'add a "chat_template" to tokenizer_config.json',
            )
        longest_first = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        # Cached, because a template writes few different texts between messages.
        self._find_control = lru_cache(1024)(lambda text: [match.span() for match in self._control.finditer(text)])
        try:
            environment = template_environment()
            if "\0" in self.text:
                raise jinja2.TemplateError("it contains a NUL character")
            if len(self.text) > _MOST_CHARACTERS:
                raise jinja2.TemplateError(f"it has {len(self.text):,} characters, more than {_MOST_CHARACTERS:,}")
            self._compile(environment)
            tree = environment.parse(self.text)
            self._markup = markup_of(tree)
            names = {node.attr for node in tree.find_all(nodes.Getattr)} | {n.value for n in tree.find_all(nodes.Const)}
            self._reasoning_name = next((n for n in _REASONING_NAMES if n in names), _REASONING_NAMES[0])
            self._call_form, self._has_nested_tools = CallForm(), False
            self._turn = learn_turn(lambda some, is_prompt: self._render(some, is_prompt=is_prompt), self._pieces)
            self.missing_prompt = "" if "add_generation_prompt" in self.text else self._turn.missing_prompt
            self._call_form, self._has_nested_tools = self._learn_call_form(), self._learn_nested_tools()
            self.ends = self._learn_ends()
        except (jinja2.TemplateError, BadRow, RecursionError, SyntaxError, MemoryError) as error:  # nested too deep
            raise TokenizerError(
                f"{self.name}: its chat template cannot be used: {error}", "try another template"
            ) from error
        if era not in ("auto", self._turn.era):
            raise UsageError(
                f"--era {era}, but the template of {self.name} is of era {self._turn.era}", "leave --era at auto"
            )
        if name == DEFAULT and TOOL_USE in tokenizer.chat_templates:
            self.for_tools = Template(tokenizer, name=TOOL_USE)
            self.ends = tuple(dict.fromkeys([*self.ends, *self.for_tools.ends]))
        self.call_ends = self._learn_call_ends()

    @property
    def era(self) -> str:
        """The kind of the template, by how it begins an answer, named after generations of MiniMind's tokenizers.
        "seed": the assistant's header directly follows each user message, even without a generation prompt. "3": every
        answer begins with a think block, empty without reasoning. "2": all other templates."""
        return self._turn.era

    def segments(
        self,
        conversation: Conversation,
        *,
        train_on: str = "assistant",
        first_trained: int = 0,
        keep_empty_think: bool = True,
    ) -> list[Segment]:
        """Render a conversation with jinja2 and cut the text into segments. Joined, they are the rendering, unless
        empty think blocks are left out; neighbours of ordinary text differ in `is_trained`. Raises BadRow if the
        template refuses the messages, or writes a text that cannot be cut.

        train_on: "assistant" trains every answer: reasoning, content, tool calls, the end-of-turn token and the newline
        after it; "last" only the last of these; "all" everything. Messages of weight 0 are never trained: "all" leaves
        out what "assistant" trains of an answer, and of other messages the content. first_trained: the first message
        that may be trained; in pairs, the number of shared messages. With "all", everything from the first answer at or
        after it is trained. keep_empty_think: False leaves out empty think blocks that the template wrote by itself.
        """
        assert train_on in TRAIN_ON
        if self.for_tools and conversation.tools:
            return self.for_tools.segments(
                conversation, train_on=train_on, first_trained=first_trained, keep_empty_think=keep_empty_think
            )
        messages = conversation.messages
        rendering = self._rendering(conversation)
        text = rendering.text
        self._check_places(messages, rendering)
        self._check_content_stays_plain(conversation, text)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        turns = dict(zip(answers, self._turns(conversation, rendering, answers), strict=True))
        dropped = [] if keep_empty_think else self._empty_thinks(rendering, list(turns.values()))
        late = [turns[i] for i in answers if i >= first_trained]
        trained = [turns[i] for i in answers if i >= first_trained and messages[i].weight]
        if train_on == "last":
            trained = trained[-1:]
        elif train_on == "all":
            skipped = [
                turns[i] if i in turns else [span_of(rendering, i)] for i, m in enumerate(messages) if not m.weight
            ]
            begin = late[0][0][0] if first_trained else 0
            trained = [without((begin, len(text)), itertools.chain(*skipped))]
        return merged(self._assemble(text, list(itertools.chain(*trained)), dropped))

    def losses(self, conversation: Conversation) -> list[Loss]:
        """Return what the template does not write of a conversation, except white space, strings that the template
        itself searches for, such as "<think>", and those that only say how tools are described. Raises BadRow if the
        template refuses the messages."""
        if self.for_tools and conversation.tools:
            return self.for_tools.losses(conversation)
        rendering = self._rendering(conversation)
        found = (
            loss_of(source, part, conversation.messages, self._writes_last_reasoning)
            for source, part in missing_parts(rendering.text, rendering.sources)
            if not self._markup.fullmatch(part)
        )
        return list(dict.fromkeys(loss for loss in found if loss))

    def prompt_ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[JsonObject] = (),
        *,
        think: bool | None = None,
    ) -> list[int]:
        """Return the token ids of a generation prompt: the messages, special-token strings as ordinary text, then the
        header of the next answer. tools: definitions of functions, as JSON objects. think: with or without thinking, if
        the template has the choice; None for its default. Raises TokenizerError if the template refuses the
        messages."""
        try:
            text = self._render(messages, tools, is_prompt=True, think=think).text
        except BadRow as bad:
            raise TokenizerError(f"{self.name}: its chat template refuses these messages: {bad.detail}") from None
        ids: list[int] = []
        for group in stretches(self._assemble(text, [], [])):
            text = "".join(segment.text for segment in group)
            is_control = group[0].is_control
            ids += [tokenizer.control_tokens[text]] if is_control else tokenizer.encode_batch([text])[0].tolist()
        return ids

    # --- rendering

    def _compile(self, environment: BoundedEnvironment) -> None:
        self._compiled = environment.from_string(self.text)
        # jinja2 copies these for each rendering, which is slow for the ChainMap that they are.
        self._compiled.globals = dict(self._compiled.globals)

    def recording(self, environment: RecordingEnvironment) -> "Template":
        """Return a copy that renders in an environment which records what the template asks of stand-ins."""
        template = copy.copy(self)
        template._last, template._writes_last_reasoning = None, self._writes_last_reasoning
        template.for_tools = self.for_tools and self.for_tools.recording(environment)
        template._compile(environment)
        return template

    def control_tokens_in(self, text: str) -> list[str]:
        """Return the tokenizer's special tokens that occur in `text`, in order of position."""
        return self._control.findall(text)

    def render(self, messages: Sequence[Message], tools: Sequence[JsonObject] = (), *, is_prompt: bool = False) -> str:
        """Render messages with jinja2 and return the text. Raises BadRow if the template raises an error. is_prompt:
        end with the header of the next answer."""
        return self._render(messages, tools, is_prompt=is_prompt).text

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[JsonObject] = (),
        *,
        is_prompt: bool = False,
        think: bool | None = None,
    ) -> Rendering:
        """Render messages with jinja2. Raises BadRow if the template raises an error. is_prompt: end with the header of
        the next answer. think: value of the template variables that switch thinking; None does not pass them."""
        if self.for_tools and tools:
            return self.for_tools._render(messages, tools, is_prompt=is_prompt, think=think)
        # The first variable is that of MiniMind-3's template, the second that of Qwen3's.
        thinking = {} if think is None else {"open_thinking": think, "enable_thinking": think}
        sources: list[SourceText] = []
        try:
            variables = {
                "messages": [self._as_dict(message, i, sources) for i, message in enumerate(messages)],
                "tools": traced([*map(nested, tools)] if self._has_nested_tools else tools, sources, -1, "tools")
                or None,
                "documents": None,
                "add_generation_prompt": is_prompt,
                **thinking,
                **self._special,
            }
            with bounded(sum(len(source.text) for source in sources)):
                text = self._compiled.render(variables)
        except _RENDER_ERRORS as error:
            raise BadRow("template refuses", plain_names(str(error))[:200]) from None
        return Rendering(text, origins_of(text), sources)

    def _as_dict(self, message: Message, index: int, sources: list[SourceText]) -> JsonObject:
        """Return the message as the template gets it, with traced strings, and append their sources to `sources`."""
        fields = {
            "content": message.content,
            self._reasoning_name: message.reasoning_content,
            "tool_calls": tuple(map(self._call_form.of, message.tool_calls)),
            "name": message.name,
            "tool_call_id": message.tool_call_id,
        }
        said = {name: value for name, value in fields.items() if name == "content" or value not in (None, ())}
        return {"role": message.role, **{name: traced(value, sources, index, name) for name, value in said.items()}}

    def _rendering(self, conversation: Conversation) -> Rendering:
        last = self._last
        if last is None or last[0] is not conversation:
            last = self._last = conversation, self._render(conversation.messages, conversation.tools)
        return last[1]

    def _turns(
        self, conversation: Conversation, rendering: Rendering, answers: list[int]
    ) -> list[list[tuple[int, int]]]:
        """Return the ranges [begin, end) of each answer that may be trained on: from after the header to after the end
        of turn, or its {% generation %} blocks if there are any. Raises BadRow if they are not found."""
        text, origins, _ = rendering
        # A template may repeat the name of a called function before the tool's answer, as that of gpt-oss does.
        first_shown = sorted({(o.source, o.first): n for n, o in reversed([*enumerate(origins)])}.values())
        marked = [origin for origin in getattr(text, "origins", ()) if origin.source is GENERATION]
        turns = []
        for i in answers:
            own = [n for n in first_shown if origins[n].source.message == i and origins[n].source.field != "name"]
            if not own:
                raise BadRow("template cannot be cut", f"message {i + 1}: nothing of the answer is written")
            first, last = own[0], own[-1]
            begin, end = origins[first].begin, origins[last].end
            before = origins[first - 1].end if first else 0
            after = origins[last + 1].begin if last + 1 < len(origins) else len(text)
            if marked:
                blocks = [(block.begin, block.end) for block in marked if before <= block.begin and block.end <= after]
                if not all(any(b <= origins[n].begin and origins[n].end <= e for b, e in blocks) for n in own):
                    raise BadRow("template cannot be cut", f"message {i + 1} is outside the generation blocks")
                turns.append(sorted(blocks))
                continue
            header = text.rfind(self._turn.header, before, begin)
            begin = header + len(self._turn.header) if header >= 0 else self._begin(conversation, i, before, begin)
            expected = self._turn.end if last + 1 < len(origins) else self._turn.last_end
            calls_tools = bool(conversation.messages[i].tool_calls)
            close = text.find(expected, end, after) if expected or not calls_tools else -1
            # An answer that calls tools may end in its own way: with <|call|> (gpt-oss), with <|observation|> (GLM-4).
            control = self._control.search(text, end, after) if close < 0 else None
            if close < 0 and control is None:
                raise BadRow("template cannot be cut", f"message {i + 1} has not the end of an answer")
            turns.append([(begin, control.end() if control else close + len(expected))])
        return turns

    def _begin(self, conversation: Conversation, index: int, before: int, begin: int) -> int:
        """Return where the trained part of an answer without the usual header begins, for instance after a tool's
        answer: after the text with which a prompt of the messages before it ends. Raises BadRow if that is not there.
        before, begin: the text between these positions is what the template writes before the answer."""
        gap = self._rendering(conversation).text[before:begin]
        prompt = self._render(conversation.messages[:index], conversation.tools, is_prompt=True)
        tail = prompt.text[prompt.origins[-1].end if prompt.origins else 0 :]
        shared = common_prefix(self._pieces(gap), self._pieces(tail))
        if shared not in (gap, tail):
            raise BadRow("template cannot be cut", f"message {index + 1} has not the assistant's header")
        return before + len(shared)

    @staticmethod
    def _empty_thinks(rendering: Rendering, turns: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
        """Return the ranges of empty think blocks with which turns begin, if the template wrote them and not the data."""
        text, origins, _ = rendering
        begins = [ranges[0][0] for ranges in turns if text.startswith(EMPTY_THINK, ranges[0][0])]
        blocks = [(begin, begin + len(EMPTY_THINK)) for begin in begins]
        return [(b, e) for b, e in blocks if not any(origin.begin < e and origin.end > b for origin in origins)]

    def _assemble(self, text: str, turns: list[tuple[int, int]], dropped: list[tuple[int, int]]) -> list[Segment]:
        """Cut `text` at the ends of `turns` (trained), of `dropped` (left out) and of the template's control tokens."""
        plain = str.__getitem__(text, slice(None))
        control = self._template_control(text)
        cuts = sorted({0, len(plain), *itertools.chain(*turns, *dropped, *control)})
        control_begins = {begin for begin, _ in control}
        dropped_begins = {begin for begin, _ in dropped}
        turn_ends = dict(sorted(turns))
        trained_end = 0
        segments = []
        for begin, end in itertools.pairwise(cuts):
            trained_end = max(trained_end, turn_ends.get(begin, 0))
            if begin not in dropped_begins:
                segments.append(Segment(plain[begin:end], begin < trained_end, begin in control_begins))
        return segments

    def _template_control(self, text: str) -> list[tuple[int, int]]:
        """Return the ranges [begin, end) of those control tokens in `text` that the template wrote, not the data."""
        plain = str.__getitem__(text, slice(None))
        spans: list[tuple[int, int]] = []
        position = 0
        for begin, end in [*(origin[:2] for origin in origins_of(text)), (len(text), len(text))]:
            if position < begin:
                spans += [(position + b, position + e) for b, e in self._find_control(plain[position:begin])]
            position = max(position, end)
        return spans

    # --- checks

    @staticmethod
    def _check_places(messages: Sequence[Message], rendering: Rendering) -> None:
        """Raise BadRow if a part of a message is written twice, or before a message that comes earlier. System messages
        may be anywhere; names and ids may be repeated, as that of a called function before the tool's answer."""
        place, shown = 0, dict[SourceText, int]()
        for _, _, source, first, last in rendering.origins:
            is_name = source.field in ("name", "tool_call_id") or (
                source.field == "tool_calls" and "arguments" not in source.path
            )
            if source.message < 0 or is_name:
                continue
            is_system = messages[source.message].role == "system"
            if (source.message < place and not is_system) or first < shown.get(source, 0):
                detail = f"message {source.message + 1} is written twice, or out of its place"
                raise BadRow("template cannot be cut", detail)
            place, shown[source] = place if is_system else source.message, last

    def _check_content_stays_plain(self, conversation: Conversation, text: str) -> None:
        """Raise BadRow if control tokens that the template wrote cannot be told from special-token strings in the
        conversation's own text, because an operation of the template loses the origins."""
        if not self.control_strings(conversation):
            return
        harmless = _map_text(conversation, lambda text: self._control.sub("x", text))
        expected = self._template_control(self.render(harmless.messages, harmless.tools))
        if len(self._template_control(text)) != len(expected):
            raise BadRow("template cannot be cut", "control strings in content cannot be told from the template's own")

    def control_strings(self, conversation: Conversation) -> list[str]:
        """Return the special-token strings that occur in the conversation's own text, one entry per occurrence."""
        return [string for text in texts_of(conversation) for string in self._control.findall(text)]

    # --- what the template does

    @cached_property
    def _writes_last_reasoning(self) -> dict[str, bool]:
        """Whether the template writes the reasoning of an answer that ends a conversation, by the field that has it."""
        answers = {
            self._reasoning_name: Message("assistant", "Tell", "Why"),
            "content": Message("assistant", "<think>\nWhy\n</think>\n\nTell"),
        }
        written = dict.fromkeys(answers, False)
        for field, answer in answers.items():
            with contextlib.suppress(BadRow):
                text, _, sources = self._render([TURN[0], answer])
                written[field] = all("Why" not in part for _, part in missing_parts(text, sources))
        return written

    # --- the template's texts around turns

    def _learn_call_form(self) -> CallForm:
        """Return the first form in which the template takes a tool call that is given as name and arguments."""
        call = {"name": "f", "arguments": {"a": "b"}, "id": "call00001"}
        for form in (CallForm(), CallForm(True), CallForm(True, True)):
            with contextlib.suppress(BadRow):
                self._render([TURN[0], Message("assistant", "", None, (form.of(call),))])
                return form
        return CallForm()

    def _learn_nested_tools(self) -> bool:
        """Return whether the template takes tools in OpenAI's form only, and not name and parameters alone."""
        tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
        for is_nested in (False, True):
            with contextlib.suppress(BadRow):
                self._render(TURN, [nested(tool) if is_nested else tool])
                return is_nested
        return False

    def _learn_ends(self) -> tuple[str, ...]:
        """Return the texts that end an answer, the last one or an earlier one: the first control token after it or else
        the text that the template writes there. A token that also ends reasoning, as <|end|> of gpt-oss, is not one of
        them."""
        ends: list[str] = []
        for messages in (TURN, TURN * 2):
            conversation = Conversation(tuple(messages))
            text, origins, _ = rendering = self._rendering(conversation)
            (ranges,) = self._turns(conversation, rendering, [1])
            after = str.__getitem__(text, slice(origins[1].end, ranges[-1][1]))
            ends += self.control_tokens_in(after)[:1] or [after.rstrip()] * bool(after.strip())
        inner: list[str] = []
        with contextlib.suppress(BadRow):
            text, origins, _ = self._render([TURN[0], Message("assistant", "Tell", "Why")])
            for origin, following in itertools.pairwise(origins):
                if origin.source.field == self._reasoning_name:
                    inner = self.control_tokens_in(str.__getitem__(text, slice(origin.end, following.begin)))
        return tuple(dict.fromkeys([end for end in ends if end not in inner] or ends))

    def _learn_call_ends(self) -> tuple[str, ...]:
        """Return the last control token that the template writes after an answer that calls a tool; empty if there is
        none."""
        if self.for_tools:
            return self.for_tools.call_ends
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
        calling = TURN[0], Message("assistant", "", None, (call,)), Message("tool", "c", None, (), "f", "call00001")
        conversation = Conversation((*calling, TURN[1]), (call,))
        with contextlib.suppress(BadRow):
            text, origins, _ = rendering = self._rendering(conversation)
            (ranges,) = self._turns(conversation, rendering, [1])
            begin = max(origin.end for origin in origins if origin.source.message == 1 and origin.end <= ranges[-1][1])
            return tuple(self.control_tokens_in(str.__getitem__(text, slice(begin, ranges[-1][1])))[-1:])
        return ()

    def _pieces(self, text: str) -> list[str]:
        """Divide a text into control tokens and the characters between them."""
        pieces = self._control.split(text)  # control tokens have odd indices
        return [part for i, piece in enumerate(pieces) for part in ([piece] if i % 2 else piece)]


@lru_cache(maxsize=8)
def ending_of(tokenizer: Tokenizer) -> Ending:
    """Return what ends an answer of a model with this tokenizer: its eos tokens, and what its chat template, if usable,
    writes after answers."""
    ends: tuple[str, ...] = ()
    with contextlib.suppress(TokenizerError):
        template = Template(tokenizer)
        ends = *template.ends, *template.call_ends
    ids = [tokenizer.control_tokens[end] for end in ends if end in tokenizer.control_tokens]
    texts = tuple(end for end in ends if end not in tokenizer.control_tokens)
    return Ending(tuple(dict.fromkeys([*ids, *tokenizer.eos_ids])), texts)


def _map_text(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """Return a copy with `change` applied to every string except roles, and to the keys in tools and tool calls."""

    def of(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {change(key): of(item) for key, item in value.items()}
        return type(value)(map(of, value)) if isinstance(value, (list, tuple)) else value

    messages = tuple(Message(m.role, *map(of, m[1:])) for m in conversation.messages)
    return Conversation(messages, of(conversation.tools))
