"""Accuracy on questions with known answers: by the text of the answer, or by the most likely of several choices.

Both read jsonl: `{"question", "answer"}`, for choices `{"question", "choices": [...], "answer"}`, where the answer is a
choice's number from 0, its letter from A, or its text. Nothing is downloaded, and nothing is random.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import torch

from mmdata.encode.template import Template
from mmdata.errors import InputError
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
    """A question; `answer` is its text or, with `choices`, the index of the right one."""

    line: int
    question: str
    answer: str | int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExamAnswer:
    """The model's answer to one question (`said`), the right one (`expected`), and whether they are the same."""

    line: int
    question: str
    expected: str
    said: str
    is_right: bool
    is_right_per_byte: bool | None = None  # of choices: by log-probability per byte


def normalized(text: str) -> str:
    """A text as answers are compared: NFKC (full-width forms made narrow), case folded, whitespace collapsed, and
    punctuation at both ends removed, unless nothing else would be left."""
    kept = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    words = [i for i, character in enumerate(kept) if not _is_edge(character)]
    return kept[words[0] : words[-1] + 1] if words else kept


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def summary(answers: Sequence[ExamAnswer]) -> dict[str, int | float]:
    """How many questions were asked and the share answered right; for choices also by log-probability per byte."""
    figures: dict[str, int | float] = {
        "asked": len(answers),
        "accuracy": sum(a.is_right for a in answers) / len(answers),
    }
    if answers[0].is_right_per_byte is not None:
        figures["accuracy_per_byte"] = sum(bool(a.is_right_per_byte) for a in answers) / len(answers)
    return figures


# --- reading ----------------------------------------------------------------------------------------------------------


FORMAT = 'one a line: {"question": "...", "answer": "..."}, for --choices with "choices": ["...", "..."] too'
Text = Annotated[str, msgspec.Meta(pattern=r"\S")]  # not blank


class _QuestionLine(msgspec.Struct):
    question: Text
    answer: Text


class _ChoicesLine(msgspec.Struct):
    question: Text
    choices: Annotated[list[Annotated[str, msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=2)]
    answer: str | int

    def index(self) -> int | None:
        """Index of the choice that `answer` names; None where it names none."""
        answer = self.answer
        if isinstance(answer, str) and answer in self.choices:
            return self.choices.index(answer)
        if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
            answer = ord(answer.upper()) - ord("A")
        return answer if isinstance(answer, int) and 0 <= answer < len(self.choices) else None


def read_questions(path: Path) -> list[ExamQuestion]:
    """Read questions with the texts of their answers; InputError names a line that cannot be used."""
    return [ExamQuestion(number, line.question, line.answer) for number, line in _lines(path, _QuestionLine)]


def read_choices(path: Path) -> list[ExamQuestion]:
    """Read questions with their choices; InputError names a line that cannot be used."""
    questions = []
    for number, line in _lines(path, _ChoicesLine):
        index = line.index()
        if index is None:
            problem = f"answer: {line.answer!r} is no number, letter or text of its choices"
            raise InputError(f"{path} line {number}: {problem}", FORMAT)
        questions.append(ExamQuestion(number, line.question, index, tuple(line.choices)))
    return questions


def _lines(path: Path, kind: type[Record]) -> Iterator[tuple[int, Record]]:
    """Number and record of each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", f"`ls {path.parent}` shows what is there") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})", "save it as UTF-8") from None
    if not any(line.strip() for line in lines):
        raise InputError(f"{path} holds no question", FORMAT)
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, decode_record(line, kind, f"{path} line {number}", InputError, FORMAT)


# --- asking -----------------------------------------------------------------------------------------------------------


def ask(
    model: Model,
    tokenizer: Tokenizer,
    template: Template | None,
    questions: Sequence[ExamQuestion],
    *,
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[ExamAnswer]:
    """The greedy answer to each question, compared with the expected one as `normalized`."""
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
    progress: Callable[[int, int], None] | None = None,
) -> list[ExamAnswer]:
    """The choice with the highest summed log-probability as the answer and, separately, per byte of its text."""
    sequences = [
        _sequence(prompt_of(tokenizer, template, one.question), _answer_ids(tokenizer, template, choice))
        for one in questions
        for choice in one.choices
    ]
    logps: list[float] = []
    for micro in micro_batches(sequences):
        logps += logps_of(model, to_device(micro, model.head_weight.device)).tolist()
        if progress:
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
    """Ids of a choice as an answer; without a template it follows the question after a space."""
    return tokenizer.encode_batch([choice if template is not None else f" {choice}"])[0].tolist()


def _sequence(prompt: list[int], answer: list[int]) -> LaidOut:
    """A prompt and its answer as one sequence with loss on the answer."""
    mask = np.array([0] * len(prompt) + [1] * len(answer), dtype=np.uint8)
    return LaidOut(np.array(prompt + answer), mask, [len(mask)])
