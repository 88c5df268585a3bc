"""`mm chat`: talk with trained models at a terminal, or answer questions that come through a pipe, one on each line.

Only answers go to stdout; reasoning, speed and notes go to stderr. With --compare several models answer each question,
their answers are printed side by side, and each model remembers its own answers only.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdata.commands.options import RUNS_DIR
from mmdata.commands.terminal import json_text, result, say
from mmdata.errors import CheckpointError, MMError, UsageError, shown
from mmdata.options import Option
from mmtrain.commands.eval import run_metadata
from mmtrain.commands.other_flags import OTHER_FLAGS
from mmtrain.config import STAGE_KINDS
from mmtrain.inference.settings import ChatSampling, Sampling

if TYPE_CHECKING:
    from mmdata.encode.rows import Message
    from mmtrain.inference.chat import Chat

__all__ = ["OTHER_FLAGS", "chat"]
CONVERSATION, MODEL = "Conversation", "Model"  # groups of options in --help
HELP = """/reset          forget the conversation
/system TEXT    set the system prompt and forget; without TEXT show it
/regen          answer the last question again, with another seed
/save [FILE]    write the conversation as a row that mm pack takes
/quit           leave (also Ctrl-D); Ctrl-C cuts an answer short"""
DIM, PLAIN = "\033[2m", "\033[0m"
MIN_COLUMN = 30  # characters in a model's column; on a terminal too narrow for that there are no columns


def chat(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Run, checkpoint, .pth or Hugging Face directory; several with --compare. [default: the newest run]",
        ),
    ] = None,
    prompt: Annotated[
        str | None, Option("Ask this one question, print the answer and end.", CONVERSATION, metavar="TEXT")
    ] = None,
    compare: Annotated[
        bool, Option("Let several models answer, and print their answers side by side.", CONVERSATION)
    ] = False,
    system: Annotated[str | None, Option("System prompt.", CONVERSATION, metavar="TEXT")] = None,
    think: Annotated[
        bool | None, Option("Answer with or without reasoning, if the chat template supports it.", CONVERSATION)
    ] = None,
    plain: Annotated[
        bool,
        Option("Continue the text without the chat template.", CONVERSATION, default_text="only for pretrain runs"),
    ] = False,
    window: Annotated[
        int,
        Option("Largest number of tokens of conversation and answer; the oldest turns are dropped.", MODEL, least=2),
    ] = 2048,
    tokenizer: Annotated[
        Path | None,
        Option("Tokenizer directory for a .pth file, if mm finds none next to it.", MODEL, metavar="DIR"),
    ] = None,
    sampling: ChatSampling = ChatSampling(),
    as_json: Annotated[
        bool, Option("Print answers as JSON, one per line; needs --prompt or a pipe.", flag="--json")
    ] = False,
) -> None:
    """Talk with a trained model. Answers are streamed, and the conversation is remembered. The lines of a pipe are one
    conversation.

    Example: mm chat runs/dpo-1 --prompt 'What is 3 + 4?'    mm chat --compare runs/pretrain-1 runs/sft-1 runs/dpo-1
    """
    is_typed = prompt is None and sys.stdin.isatty()
    if as_json and is_typed:
        raise UsageError("--json needs --prompt or lines on standard input", "mm chat --prompt TEXT --json")
    if compare and len(runs or ()) < 2:
        raise UsageError("--compare needs two models or more", "mm chat --compare RUN_A RUN_B")
    if not compare and len(runs or ()) > 1:
        raise UsageError("several models are for --compare", "mm chat --compare RUN_A RUN_B, or name one")
    runs = runs or [newest_finished_run("chat", (*STAGE_KINDS, "imported"))]
    say(f"loading {' and '.join(map(str, runs))}")  # before torch is, which takes seconds
    speakers = [open_speaker(path, tokenizer, plain, window) for path in runs]
    session = Session(speakers, sampling, system, think, as_json)
    if prompt is not None:
        session.ask(prompt)
        return
    if is_typed:
        say(f"{' and '.join(s.name for s in speakers)}: ask anything; /help shows the commands, Ctrl-D ends")
    session.run(typed_lines() if is_typed else piped_lines(), is_lenient=is_typed)


def newest_finished_run(command: str, stages: Sequence[str]) -> Path:
    """Return the run under runs/ that finished last, of these stages. Raise CheckpointError if there is none.
    command: such as "chat", for the message."""
    from mmtrain.checkpoint import find_run

    run = find_run(RUNS_DIR, tuple(stages))
    if run is None:
        fix = f"`mm demo` trains one in minutes, or name one: mm {command} RUN"
        if unfinished := find_run(RUNS_DIR, tuple(stages), "interrupted"):
            fix = f"{unfinished} was interrupted; its last checkpoint serves too: mm {command} {unfinished}"
        raise CheckpointError(f"no finished run under {RUNS_DIR}/", fix)
    return run


def open_speaker(path: Path, tokenizer_dir: Path | None, is_plain: bool, window: int) -> "Speaker":
    """Load a run, checkpoint, .pth file or Hugging Face directory as a `Speaker`.
    tokenizer_dir: tokenizer of a .pth file; None takes the one in the file's directory, in tokenizer/ there, or in
    model/ or tokenizer/ one level above. is_plain: continue text without a chat template; runs of the pretrain stage
    always do. window: largest number of tokens of conversation and answer."""
    from mmdata.encode.template import Template
    from mmtrain.convert.foreign import open_model
    from mmtrain.inference.chat import Chat

    model, tokenizer = open_model(path, tokenizer_dir=tokenizer_dir)
    is_plain = is_plain or run_metadata(path).stage == "pretrain"
    return Speaker(str(path), Chat(model, tokenizer, None if is_plain else Template(tokenizer), window=window))


# --- the conversation


@dataclass
class Speaker:
    """A model that takes part in the conversation. name: its path as given, printed with its answers. chat: its
    messages."""

    name: str
    chat: "Chat"


@dataclass(frozen=True)
class Answer:
    """One answer of one model.
    text: the answer without reasoning and tool calls. reasoning: None without a think block. calls: each with a name,
    and arguments as JSON. tokens: number generated. seconds: time for the whole answer. seconds_to_first: time until
    its first text, None if there was none. finish_reason: "stop", "length" or "cancelled"."""

    text: str
    reasoning: str | None
    calls: list[dict[str, str]]
    tokens: int
    seconds: float
    seconds_to_first: float | None
    finish_reason: str | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated per second after the first text; 0.0 for fewer than two tokens."""
        if self.seconds_to_first is None or self.tokens < 2 or self.seconds <= self.seconds_to_first:
            return 0.0
        return (self.tokens - 1) / (self.seconds - self.seconds_to_first)

    def record(self) -> dict[str, Any]:
        """Return the answer as a dictionary for `--json`."""
        return {
            "answer": self.text,
            "reasoning": self.reasoning,
            "tool_calls": self.calls,
            "tokens": self.tokens,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "seconds": round(self.seconds, 3),
            "finish_reason": self.finish_reason,
        }

    def lines(self) -> list[str]:
        """Return the answer as texts to print one below the other: reasoning (if any), text, and each tool call."""
        reasoning = [f"thinking: {self.reasoning}"] if self.reasoning else []
        return [*reasoning, self.text, *(f"tool call: {call['name']} {call['arguments']}" for call in self.calls)]


@dataclass
class Session:
    """A conversation of the user with one model, or with several that are asked the same questions.
    options: sampling settings. system: system prompt. think: answers with (True) or without (False) reasoning; None
    leaves this to the chat template. is_json: print answers as JSON lines."""

    speakers: Sequence[Speaker]
    options: Sampling
    system: str | None = None
    think: bool | None = None
    is_json: bool = False
    num_again: int = field(default=0, init=False)  # number of /regen so far; added to the seed for another answer

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Remove all messages except the system prompt from the conversations of all models."""
        from mmdata.encode.rows import Message

        for speaker in self.speakers:
            speaker.chat.messages[:] = [Message("system", self.system)] if self.system else []

    def run(self, lines: Iterator[str], *, is_lenient: bool) -> None:
        """Answer each line until the last one or /quit; a line that begins with "/" is a command, and empty lines are
        skipped. is_lenient: print an MMError and go on with the next line, instead of raising it."""
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
                say(f"error: {error.message}\nfix: {error.fix}")

    def command(self, name: str, argument: str = "") -> None:
        """Run the command `name`, such as /reset, with its argument. Raise UsageError if there is no such command."""
        if name == "/reset":
            self.reset()
            say("forgotten")
        elif name == "/system":
            if argument:
                self.system = argument
                self.reset()
            say(f"system prompt: {self.system or 'none'}")
        elif name == "/regen":
            self.ask_again()
        elif name == "/save":
            self.save(argument)
        elif name == "/help":
            say(HELP)
        else:
            raise UsageError(f"{name} is no command", "/help shows them")

    def ask_again(self) -> None:
        """Ask the last question again, with another seed. Raise UsageError if nothing was answered yet."""
        messages = self.speakers[0].chat.messages
        if not messages or messages[-1].role != "assistant":
            raise UsageError("there is no answer yet", "ask something first")
        question = messages[-2].content
        for speaker in self.speakers:
            del speaker.chat.messages[-2:]
        self.num_again += 1
        self.ask(question)

    def save(self, name: str) -> None:
        """Write the conversation to the jsonl file `name` (empty: chat-DATE-TIME.jsonl in the current directory), one
        row for each model. Raise UsageError if the file exists or cannot be written, or if nothing was answered yet."""
        from mmdata.io.files import write_text

        path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser()
        if path.exists():
            raise UsageError(f"{path} is already there", "give another name: /save FILE")
        rows = [{"conversations": [as_row(message) for message in one.chat.messages]} for one in self.speakers]
        if not any(message.role == "assistant" for message in self.speakers[0].chat.messages):
            raise UsageError("there is nothing to save yet", "ask something first")
        try:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", "give another name: /save FILE") from error
        say(f"wrote {path}")

    def ask(self, question: str) -> None:
        """Ask all models one question. The answer of a single model is printed while it is generated; those of several
        models, or as JSON, when all are complete."""
        options = replace(self.options, seed=self.options.seed + self.num_again)
        if len(self.speakers) == 1 and not self.is_json:
            print_speed(self._answer(self.speakers[0], question, options, StreamPrinter()))
            return
        answers = {speaker.name: self._answer(speaker, question, options) for speaker in self.speakers}
        records = {name: answer.record() for name, answer in answers.items()}
        if not self.is_json:
            print_side_by_side(answers)
        elif len(records) == 1:
            result(json_text({"prompt": question, **next(iter(records.values()))}))
        else:
            result(json_text({"prompt": question, "answers": records}))

    def _answer(
        self, speaker: Speaker, question: str, options: Sampling, printer: "StreamPrinter | None" = None
    ) -> Answer:
        """Let one model answer, and return the complete answer, which `printer` prints while it is generated. Ctrl-C
        ends the answer early; what was generated so far stays in the conversation."""
        from mmtrain.inference.replies import Splitter, split

        show = printer.show if printer else lambda pieces: None
        start, first = time.monotonic(), None
        stream = speaker.chat.ask(question, options, think=self.think)
        splitter = Splitter()
        try:
            for text in stream:
                if first is None:
                    first = time.monotonic() - start
                    opened = speaker.chat.opening
                    show(splitter.feed(opened) if opened else [])
                show(splitter.feed(text))
        except KeyboardInterrupt:
            stream.close()
        show(splitter.close())
        if printer:
            printer.end()
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


def as_row(message: "Message") -> dict[str, Any]:
    """Return a message as in a jsonl row: role and content, and for an answer with a think block its reasoning_content.
    Tool calls stay in the content as text."""
    from mmtrain.inference.replies import split

    if message.role != "assistant":
        return {"role": message.role, "content": message.content}
    parts = split(message.content, with_calls=False)
    reasoning = {"reasoning_content": parts.reasoning} if parts.reasoning else {}
    return {"role": "assistant", "content": parts.content, **reasoning}


# --- the terminal


class StreamPrinter:
    """Prints an answer while it is generated: content and tool calls to stdout; reasoning, dimmed, to stderr."""

    def __init__(self) -> None:
        self._kind = ""

    def show(self, pieces: Sequence[Any]) -> None:
        """Print the next pieces of the answer (`mmtrain.inference.replies.Piece`)."""
        for piece in pieces:
            if piece.kind != self._kind:
                self._begin(piece.kind)
            if piece.kind == "reasoning":
                print(shown(piece.text), end="", file=sys.stderr, flush=True)
            elif piece.kind == "call":
                result(f"tool call: {piece.call['name']} {piece.call['arguments']}")
                self._kind = "called"
            else:
                print(shown(piece.text), end="", flush=True)

    def _begin(self, kind: str) -> None:
        """End the line being printed, if any, and begin one of this kind: reasoning, content, call, or "" for none."""
        is_colored = sys.stderr.isatty()
        if self._kind == "reasoning":
            say(PLAIN if is_colored else "", is_styled=True)
        elif self._kind == "content":
            result()
        if kind == "reasoning":
            print(f"{DIM if is_colored else ''}thinking: ", end="", file=sys.stderr, flush=True)
        self._kind = kind

    def end(self) -> None:
        """End the last line of the answer."""
        self._begin("")


def print_speed(answer: Answer) -> None:
    """Print the number of tokens and the speed of an answer to stderr, if it is a terminal and a token was generated."""
    if sys.stderr.isatty() and answer.seconds_to_first is not None:
        cut = {"length": ", cut at its longest", "cancelled": ", cut short"}.get(answer.finish_reason or "", "")
        speed = f"{answer.tokens_per_s:.1f} tokens/s, {answer.seconds_to_first:.2f} s to the first"
        tokens = f"{answer.tokens} token{'s' if answer.tokens != 1 else ''}"
        say(f"{DIM}[{tokens}, {speed}{cut}]{PLAIN}", is_styled=True)


def print_side_by_side(answers: dict[str, Answer]) -> None:
    """Print the answers of several models, given by name, in one column each; one below the other if stdout is no
    terminal, or too narrow for columns of MIN_COLUMN characters."""
    from rich.console import Console
    from rich.table import Table

    texts = {name: "\n".join(answer.lines()) for name, answer in answers.items()}
    console = Console(highlight=False, markup=False)
    if not console.is_terminal or console.width < MIN_COLUMN * len(texts):
        for name, text in texts.items():
            result(f"== {name}\n{text}")
        return
    grid = Table(expand=True, show_lines=False)
    for name, answer in answers.items():
        grid.add_column(f"{name} ({answer.tokens_per_s:.1f} tokens/s)", ratio=1, overflow="fold")
    grid.add_row(*map(shown, texts.values()))
    console.print(grid)


def typed_lines() -> Iterator[str]:
    """Yield the lines typed at the terminal, with line editing and history. Ctrl-C discards a line, Ctrl-D ends."""
    with suppress(ImportError):  # Windows has line editing of its own
        import readline  # noqa: F401 - input() uses it once it is imported
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            result()
            continue
        except EOFError:
            result()
            return
        yield without_surrogates(line).strip()


def piped_lines() -> Iterator[str]:
    """Yield the lines of standard input without surrounding whitespace; bytes that are not UTF-8 become U+FFFD."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", errors="replace").strip()


def without_surrogates(line: str) -> str:
    """Return a typed line with U+FFFD in place of the lone surrogates that `input` makes of bytes outside UTF-8."""
    return line.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
