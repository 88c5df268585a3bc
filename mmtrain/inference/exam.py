"""Questions with known answers in; the share answered right out: by the exact words, or by the likeliest of given choices.

Both read jsonl: `{"question", "answer"}`, and for choices `{"question", "choices": [...], "answer"}` with the answer's
number from 0, its letter from A, or its text. Nothing is fetched and nothing is drawn: the same model gives the same figures.
"""

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdata.encode.template import Message, Template
from mmdata.errors import InputError
from mmdata.shards.loader import MicroBatch
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.engine import Engine, plain_prompt
from mmtrain.inference.sampling import Sampling
from mmtrain.model.batch import logps_of, to_device
from mmtrain.model.model import Model

MICRO_TOKENS = 2048


@dataclass(frozen=True)
class Item:
    """A question; `answer` is its text or, with `choices`, the number of the right one."""

    line: int
    question: str
    answer: str | int
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How one question went. `said` is the answer given, `expected` the right one."""

    line: int
    question: str
    expected: str
    said: str
    is_right: bool
    is_right_per_byte: bool | None = None


def normalized(text: str) -> str:
    """A text as answers are compared: full-width forms made narrow (NFKC), case folded, blanks made one space, and
    punctuation and blanks at both ends left out."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    kept = " ".join(words)
    begin, end = 0, len(kept)
    while begin < end and _is_edge(kept[begin]):
        begin += 1
    while end > begin and _is_edge(kept[end - 1]):
        end -= 1
    return kept[begin:end] or kept


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many were asked and answered right; of choices also by log-probability a byte."""
    found: dict[str, Any] = {"asked": len(outcomes), "accuracy": sum(o.is_right for o in outcomes) / len(outcomes)}
    if outcomes[0].is_right_per_byte is not None:
        found["accuracy_per_byte"] = sum(bool(o.is_right_per_byte) for o in outcomes) / len(outcomes)
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[Item]:
    """The file's questions with their answers; InputError names the line that is none."""
    return [
        Item(number, _text(row, "question", path, number), _text(row, "answer", path, number))
        for number, row in _rows(path)
    ]


def read_choices(path: Path) -> list[Item]:
    """The file's questions with their choices; InputError names the line that is none."""
    items = []
    for number, row in _rows(path):
        choices = row.get("choices")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise _bad(path, number, '"choices" must be two or more texts')
        answer = _choice(row.get("answer"), choices)
        if answer is None:
            raise _bad(path, number, f'"answer" {row.get("answer")!r} is no number, letter or text of its choices')
        items.append(Item(number, _text(row, "question", path, number), answer, tuple(choices)))
    return items


def _choice(answer: Any, choices: list[str]) -> int | None:
    """Which choice is meant."""
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer.isascii() and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if isinstance(answer, bool) or not isinstance(answer, int):
        return None
    return answer if 0 <= answer < len(choices) else None


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", f"`ls {path.parent}` shows what is there") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})", "save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _bad(path, number, f"not json ({error})") from None
        if not isinstance(row, dict):
            raise _bad(path, number, "not an object")
        found.append((number, row))
    if not found:
        raise InputError(f"{path} holds no question", 'one a line: {"question": "...", "answer": "..."}')
    return found


def _text(row: dict[str, Any], key: str, path: Path, number: int) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _bad(path, number, f'"{key}" must be a text')
    return value


def _bad(path: Path, number: int, what: str) -> InputError:
    return InputError(
        f"{path} line {number}: {what}",
        'one a line: {"question": "...", "answer": "..."}, for --choices with "choices": ["...", "..."] too',
    )


# --- asking -----------------------------------------------------------------------------------------------------------


def prompt_of(tokenizer: Tokenizer, template: Template | None, question: str) -> list[int]:
    """The question as a conversation's first turn; without a template (a model that only continues text) as text alone."""
    if template is None:
        return plain_prompt(tokenizer, question)
    return template.prompt_ids(tokenizer, [Message("user", question)])


def ask(
    model: Model,
    tokenizer: Tokenizer,
    template: Template | None,
    items: Sequence[Item],
    *,
    max_new_tokens: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """The likeliest answer to each question, compared as `normalized`."""
    engine = Engine(model, tokenizer)
    options = Sampling(max_new_tokens=max_new_tokens)
    rows = [engine.submit(prompt_of(tokenizer, template, item.question), options) for item in items]
    done = 0
    while not engine.is_idle:
        done += sum(delta.finish_reason is not None for delta in engine.step())
        if progress:
            progress(done, len(rows))
    return [
        Outcome(
            item.line, item.question, str(item.answer), row.text, normalized(row.text) == normalized(str(item.answer))
        )
        for item, row in zip(items, rows, strict=True)
    ]


@torch.no_grad()
def choose(
    model: Model,
    tokenizer: Tokenizer,
    template: Template | None,
    items: Sequence[Item],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """The choice whose text is likeliest as the answer, by summed log-probability and, besides, by that per byte."""
    sequences = [
        (prompt_of(tokenizer, template, item.question), _answer_ids(tokenizer, template, choice))
        for item in items
        for choice in item.choices
    ]
    logps: list[float] = []
    for micro in _micro_batches(sequences):
        logps += logps_of(model, to_device(micro, model.head_weight.device)).tolist()
        if progress:
            progress(len(logps), len(sequences))
    outcomes, begin = [], 0
    for item in items:
        own = logps[begin : begin + len(item.choices)]
        begin += len(own)
        per_byte = [logp / len(choice.encode()) for logp, choice in zip(own, item.choices, strict=True)]
        best, best_per_byte = int(np.argmax(own)), int(np.argmax(per_byte))
        expected = item.choices[int(item.answer)]
        is_right = best == item.answer
        outcomes.append(
            Outcome(item.line, item.question, expected, item.choices[best], is_right, best_per_byte == item.answer)
        )
    return outcomes


def _answer_ids(tokenizer: Tokenizer, template: Template | None, choice: str) -> list[int]:
    """A choice as an answer begins: behind text, after a space."""
    return tokenizer.encode_batch([choice if template is not None else f" {choice}"])[0].tolist()


def _micro_batches(sequences: Sequence[tuple[list[int], list[int]]]) -> list[MicroBatch]:
    """Prompts and answers end to end, the answers marked; about MICRO_TOKENS in each."""
    groups: list[list[tuple[list[int], list[int]]]] = [[]]
    size = 0
    for prompt, answer in sequences:
        if groups[-1] and size + len(prompt) + len(answer) > MICRO_TOKENS:
            groups.append([])
            size = 0
        groups[-1].append((prompt, answer))
        size += len(prompt) + len(answer)
    batches = []
    for group in groups:
        lengths = [len(prompt) + len(answer) for prompt, answer in group]
        mask = [bit for prompt, answer in group for bit in [0] * len(prompt) + [1] * len(answer)]
        batches.append(
            MicroBatch(
                ids=np.array([id for prompt, answer in group for id in prompt + answer], dtype=np.int32),
                loss_mask=np.array(mask, dtype=np.uint8),
                cu_seqlens=np.array([0, *np.cumsum(lengths)], dtype=np.int32),
                max_seqlen=max(lengths),
                samples=np.arange(len(group)),
                num_loss_tokens=sum(mask),
            )
        )
    return batches
