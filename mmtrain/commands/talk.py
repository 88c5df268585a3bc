"""Talking with models at a terminal or through a pipe: `mm chat`. Prints, and is imported by cli alone.

On stdout stand the answers, and nothing else that a script would have to cut away: thinking, speed and notes go to stderr.
Several models answer the same questions side by side, each with a history of its own.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmdata.encode.template import Message
from mmdata.errors import MMError, UsageError
from mmtrain.checkpoint import write_atomic
from mmtrain.inference.chat import Chat
from mmtrain.inference.replies import Splitter, split
from mmtrain.inference.sampling import Sampling

HELP = """/reset          forget the conversation
/system TEXT    set the system prompt and forget; without TEXT show it
/regen          answer the last question again, otherwise
/save [FILE]    write the conversation as a row that mm pack takes
/quit           leave (also Ctrl-D); Ctrl-C cuts an answer short"""
DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass
class Speaker:
    """A model in the conversation, under the name its answers carry."""

    name: str
    chat: Chat


@dataclass(frozen=True)
class Answer:
    """One answer with its figures. `seconds_to_first` is None when nothing was said."""

    text: str
    reasoning: str | None
    calls: list[dict[str, str]]
    tokens: int
    seconds: float
    seconds_to_first: float | None
    finish_reason: str | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second once the first had come."""
        if self.seconds_to_first is None or self.tokens < 2 or self.seconds <= self.seconds_to_first:
            return 0.0
        return (self.tokens - 1) / (self.seconds - self.seconds_to_first)

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "answer": self.text,
            "reasoning": self.reasoning,
            "tool_calls": self.calls,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "seconds": round(self.seconds, 3),
            "finish_reason": self.finish_reason,
        }


@dataclass
class Session:
    """A conversation with one model, or the same with several. `think` asks for thinking where a template knows it."""

    speakers: Sequence[Speaker]
    options: Sampling
    system: str | None = None
    think: bool | None = None
    is_json: bool = False
    num_again: int = field(default=0, init=False)  # every /regen draws with another seed

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        for speaker in self.speakers:
            speaker.chat.messages[:] = [Message("system", self.system)] if self.system else []

    def run(self, lines: Iterator[str], *, is_lenient: bool) -> None:
        """Answer line after line until they end or /quit. `is_lenient`: a question that cannot be asked ends nothing."""
        for line in lines:
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(*line.split(maxsplit=1))
                elif line:
                    self.ask(line)
            except MMError as error:
                if not is_lenient:
                    raise
                _say(f"error: {error.message}\nfix: {error.fix}")

    # ---- commands

    def command(self, name: str, rest: str = "") -> None:
        """Do what a line that begins with / says."""
        if name == "/reset":
            self.reset()
            _say("forgotten")
        elif name == "/system":
            if rest:
                self.system = rest
                self.reset()
            _say(f"system prompt: {self.system or 'none'}")
        elif name == "/regen":
            self.again()
        elif name == "/save":
            self.save(rest)
        elif name == "/help":
            _say(HELP)
        else:
            raise UsageError(f"{name} is no command", "/help shows them")

    def again(self) -> None:
        """Take the last question back and ask it anew."""
        messages = self.speakers[0].chat.messages
        if not messages or messages[-1].role != "assistant":
            raise UsageError("there is no answer yet", "ask something first")
        question = messages[-2].content
        for speaker in self.speakers:
            del speaker.chat.messages[-2:]
        self.num_again += 1
        self.ask(question)

    def save(self, name: str) -> None:
        """Write the conversation, of several models one row each, as jsonl."""
        path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser()
        if path.exists():
            raise UsageError(f"{path} is already there", "give another name: /save FILE")
        rows = [{"conversations": [_as_row(m) for m in speaker.chat.messages]} for speaker in self.speakers]
        if not any(message.role == "assistant" for message in self.speakers[0].chat.messages):
            raise UsageError("there is nothing to save yet", "ask something first")
        try:
            write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", "give another name: /save FILE") from error
        _say(f"wrote {path}")

    # ---- asking

    def ask(self, question: str) -> None:
        """Answer one question and show it, as it comes or, of several models, side by side."""
        options = replace(self.options, seed=self.options.seed + self.num_again)
        if len(self.speakers) == 1 and not self.is_json:
            answer = self._answer(self.speakers[0], question, options, is_shown=True)
            _say_speed(answer)
            return
        answers = {s.name: self._answer(s, question, options, is_shown=False) for s in self.speakers}
        if not self.is_json:
            _print_beside(answers)
        elif len(answers) == 1:
            print(json.dumps({"prompt": question, **next(iter(answers.values())).record()}, ensure_ascii=False))
        else:
            records = {name: answer.record() for name, answer in answers.items()}
            print(json.dumps({"prompt": question, "answers": records}, ensure_ascii=False))

    def _answer(self, speaker: Speaker, question: str, options: Sampling, *, is_shown: bool) -> Answer:
        """Let one model answer; Ctrl-C cuts it short, and what it has said stays said."""
        start, first = time.monotonic(), None
        stream = speaker.chat.ask(question, options, think=self.think)
        splitter, shown = Splitter(), _Shown(is_shown)
        try:
            for text in stream:
                if first is None:
                    first = time.monotonic() - start
                    opened = speaker.chat.opening
                    shown.show(splitter.feed(opened) if opened else [])
                shown.show(splitter.feed(text))
        except KeyboardInterrupt:
            stream.close()
        shown.show(splitter.close())
        shown.end()
        row = speaker.chat.row
        assert row is not None
        parts = split(speaker.chat.messages[-1].content)
        return Answer(
            parts.content,
            parts.reasoning,
            parts.calls,
            len(row.ids),
            time.monotonic() - start,
            first,
            row.finish_reason,
        )


def _as_row(message: Message) -> dict[str, Any]:
    """A message as jsonl rows hold it, its thinking apart."""
    if message.role != "assistant":
        return {"role": message.role, "content": message.content}
    parts = split(message.content, with_calls=False)
    thinking = {"reasoning_content": parts.reasoning} if parts.reasoning else {}
    return {"role": "assistant", "content": parts.content, **thinking}


# --- the terminal -----------------------------------------------------------------------------------------------------


class _Shown:
    """Writes an answer as it comes: words to stdout; thinking, dimmed, to stderr; each tool call on a line of its own."""

    def __init__(self, is_shown: bool):
        self._is_shown = is_shown
        self._kind = ""

    def show(self, pieces: Sequence[Any]) -> None:
        for piece in pieces if self._is_shown else ():
            if piece.kind != self._kind:
                self._turn_to(piece.kind)
            if piece.kind == "reasoning":
                print(piece.text, end="", file=sys.stderr, flush=True)
            elif piece.kind == "call":
                print(f"tool call: {piece.call['name']} {piece.call['arguments']}", flush=True)
                self._kind = "called"
            else:
                print(piece.text, end="", flush=True)

    def _turn_to(self, kind: str) -> None:
        """End what was being written, and begin the next part."""
        is_colored = sys.stderr.isatty()
        if self._kind == "reasoning":
            print(PLAIN if is_colored else "", file=sys.stderr, flush=True)
        elif self._kind == "content":
            print(flush=True)
        if kind == "reasoning":
            print(f"{DIM if is_colored else ''}thinking: ", end="", file=sys.stderr, flush=True)
        self._kind = kind

    def end(self) -> None:
        """The answer has ended: so has its last line."""
        if self._is_shown and self._kind != "called":
            self._turn_to("end")
            if self._kind == "end":
                self._kind = ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_speed(answer: Answer) -> None:
    """A dimmed line about the answer, on a terminal only."""
    if sys.stderr.isatty() and answer.seconds_to_first is not None:
        cut = {"length": ", cut at its longest", "cancelled": ", cut short"}.get(answer.finish_reason or "", "")
        speed = f"{answer.tokens_per_s:.1f} tokens/s, {answer.seconds_to_first:.2f} s to the first"
        _say(f"{DIM}[{answer.tokens} tokens, {speed}{cut}]{PLAIN}")


def _print_beside(answers: dict[str, Answer]) -> None:
    """Answers in columns on a terminal wide enough; else one below the other."""
    from rich.console import Console
    from rich.table import Table

    texts = {name: "\n".join(_parts(answer)) for name, answer in answers.items()}
    console = Console(highlight=False, markup=False)
    if not console.is_terminal or console.width < 30 * len(texts):
        for name, text in texts.items():
            print(f"== {name}\n{text}", flush=True)
        return
    grid = Table(expand=True, show_lines=False)
    for name, answer in answers.items():
        grid.add_column(f"{name} ({answer.tokens_per_s:.1f} tokens/s)", ratio=1, overflow="fold")
    grid.add_row(*texts.values())
    console.print(grid)


def _parts(answer: Answer) -> list[str]:
    """An answer's thinking, words and calls, each told apart."""
    thinking = [f"thinking: {answer.reasoning}"] if answer.reasoning else []
    calls = [f"tool call: {call['name']} {call['arguments']}" for call in answer.calls]
    return [*thinking, answer.text, *calls]


def typed_lines() -> Iterator[str]:
    """Lines a person types, edited and recalled as in a shell; Ctrl-C leaves a line, Ctrl-D ends."""
    with suppress(ImportError):  # Windows has line editing of its own
        import readline  # noqa: F401 - gives it to input()
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            print(flush=True)
            continue
        except EOFError:
            print(flush=True)
            return
        yield _whole(line).strip()


def piped_lines() -> Iterator[str]:
    """Lines of a pipe; bytes that are no UTF-8 become U+FFFD."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace").strip()


def _whole(line: str) -> str:
    """A typed line without halves of characters, which terminals can send and no tokenizer takes."""
    return line.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
