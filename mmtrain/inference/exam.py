"""Accuracy on questions with known answers: the text of a generated answer is compared, or the most likely of several
choices is the answer. Questions are read from jsonl, one a line: `{"question", "answer"}`, or `{"question", "choices":
[...], "answer"}`, with a choice's number from 0, its letter from A, or its text. Nothing is random."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch

from mmdata.encode.template import Template
from mmdata.errors import InputError
from mmdata.io.files import Progress, no_progress, read_bytes
from mmdata.io.records import Record, decode_record
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.chat import prompt_of
from mmtrain.inference.engine import Engine
from mmtrain.inference.score import LaidOut, micro_batches
from mmtrain.inference.settings import Sampling
from mmtrain.model.batch import logps_of, to_device
from mmtrain.model.model import Model


@dataclass(frozen=True)
class ExamQuestion:
    """A question from `line` of its file, counted from 1. answer: the right text or, with choices, the right one's
    index."""

    line: int
    question: str
    answer: str | int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExamAnswer:
    """The model's answer to one question (`said`), the right answer (`expected`), and whether they are the same."""

    line: int
    question: str
    expected: str
    said: str
    is_right: bool
    # Whether the choice with the highest log-probability per byte is the right one; None for questions without choices.
    is_right_per_byte: bool | None = None


def normalized(text: str) -> str:
    """Return a text in the form in which answers are compared: Unicode NFKC (full-width characters become narrow), case
    folded, whitespace runs as one space, without punctuation and spaces at both ends (unless it is all)."""
    kept = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    words = [i for i, character in enumerate(kept) if not _is_edge(character)]
    return kept[words[0] : words[-1] + 1] if words else kept


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def summary(answers: Sequence[ExamAnswer]) -> dict[str, int | float]:
    """Return the number of questions (asked) and the share answered right (accuracy, from 0 to 1); for questions with
    choices also accuracy_per_byte (see `choose`). `answers` must not be empty."""
    figures: dict[str, int | float] = {
        "asked": len(answers),
        "accuracy": sum(a.is_right for a in answers) / len(answers),
    }
    if answers[0].is_right_per_byte is not None:
        figures["accuracy_per_byte"] = sum(bool(a.is_right_per_byte) for a in answers) / len(answers)
    return figures


# --- reading


FORMAT = 'one a line: {"question": "...", "answer": "..."}, for --choices with "choices": ["...", "..."] too'
Text = Annotated[str, msgspec.Meta(pattern=r"\S")]  # not blank


class _QuestionLine(msgspec.Struct):
    """A line of a file of questions whose answers are texts."""

    question: Text
    answer: Text


class _ChoicesLine(msgspec.Struct):
    """A line of a file of questions with choices; `answer` names the right choice."""

    question: Text
    choices: Annotated[list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=2)]
    answer: str | int

    def index(self) -> int | None:
        """Return the index of the choice that `answer` names by text, letter or number, in this order, or None."""
        answer = self.answer
        if isinstance(answer, str) and answer in self.choices:
            return self.choices.index(answer)
        if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
            answer = ord(answer.upper()) - ord("A")
        return answer if isinstance(answer, int) and 0 <= answer < len(self.choices) else None


def read_questions(path: Path) -> list[ExamQuestion]:
    """Read questions whose answers are texts. Raise InputError for a file that is missing, not UTF-8 or without
    questions, and for a line that does not have the expected fields."""
    return [ExamQuestion(number, line.question, line.answer) for number, line in _lines(path, _QuestionLine)]


def read_choices(path: Path) -> list[ExamQuestion]:
    """Read questions with choices. Raise InputError as `read_questions` does, and for an answer that is no choice."""
    questions = []
    for number, line in _lines(path, _ChoicesLine):
        index = line.index()
        if index is None:
            problem = f"answer: {line.answer!r} is no number, letter or text of its choices"
            raise InputError(f"{path} line {number}: {problem}", FORMAT)
        questions.append(ExamQuestion(number, line.question, index, tuple(line.choices)))
    return questions


def _lines(path: Path, kind: type[Record]) -> Iterator[tuple[int, Record]]:
    """Yield number, counted from 1, and record of each line that is not blank. Raise InputError for a file or line that
    cannot be read."""
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", f"`ls {path.parent}` shows what is there") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})", "save it as UTF-8") from None
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} holds no question", FORMAT)
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, decode_record(line, kind, f"{path} line {number}", InputError, FORMAT)


# --- asking


def ask(
    model: Model,
    tokenizer: Tokenizer,
    template: Template | None,
    questions: Sequence[ExamQuestion],
    *,
    max_new_tokens: int = 64,
    progress: Progress = no_progress,
) -> list[ExamAnswer]:
    """Generate a greedy answer to each question; it is right if it equals the expected one, both `normalized`.
    template: None for a model that was only pretrained, which continues the question as a text. progress: called with
    (finished answers, all answers) after each step."""
    prompts = [prompt_of(tokenizer, template, one.question) for one in questions]
    rows = Engine(model, tokenizer).answer(prompts, Sampling(max_new_tokens=max_new_tokens), progress=progress)
    return [
        ExamAnswer(
            one.line, one.question, str(one.answer), row.text, normalized(row.text) == normalized(str(one.answer))
        )
        for one, row in zip(questions, rows, strict=True)
    ]


@torch.no_grad()
def choose(
    model: Model,
    tokenizer: Tokenizer,
    template: Template | None,
    questions: Sequence[ExamQuestion],
    *,
    progress: Progress = no_progress,
) -> list[ExamAnswer]:
    """Take the choice with the highest log-probability, summed over its tokens, as the answer to its question; for
    `is_right_per_byte` that with the highest one per UTF-8 byte. template: None for a model that was only pretrained;
    the choice then follows the question after a space. progress: called with (scored choices, all choices) after each
    pass."""
    sequences = [
        _sequence(prompt_of(tokenizer, template, one.question), _answer_ids(tokenizer, template, choice))
        for one in questions
        for choice in one.choices
    ]
    logps: list[float] = []
    for micro in micro_batches(sequences):
        logps += logps_of(model, to_device(micro, model.head_weight.device)).tolist()
        progress(len(logps), len(sequences))
    answers, begin = [], 0
    for one in questions:
        own = logps[begin : begin + len(one.choices)]
        begin += len(own)
        per_byte = [logp / len(choice.encode()) for logp, choice in zip(own, one.choices, strict=True)]
        best, best_per_byte, expected = int(np.argmax(own)), int(np.argmax(per_byte)), int(one.answer)
        texts = one.question, one.choices[expected], one.choices[best]
        answers.append(ExamAnswer(one.line, *texts, best == expected, best_per_byte == expected))
    return answers


def _answer_ids(tokenizer: Tokenizer, template: Template | None, choice: str) -> list[int]:
    """Return the ids of a choice; without a template it begins with the space that separates it from the question."""
    return tokenizer.encode_batch([choice if template is not None else f" {choice}"])[0].tolist()


def _sequence(prompt: list[int], answer: list[int]) -> LaidOut:
    mask = np.array([0] * len(prompt) + [1] * len(answer), dtype=np.uint8)
    return LaidOut(np.array(prompt + answer), mask, [len(mask)])
