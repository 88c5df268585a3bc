"""Random rows of all schemas, with nulls, parts, tools, weights and values of wrong types, for tests that compare ways."""

import json
import random
from collections.abc import Callable
from typing import Any

from pack_data import words

Row = Any  # an object, or a list of messages
Draw = random.Random
ODD = (
    None,
    True,
    3,
    2**70,
    1.5,
    "",
    " ",
    "\n",
    [],
    {},
    [[]],
    {"a": None},
    "critic",
    "😀",
    "<|im_end|>",
    "é灯\u2028\x00",
)


def maybe(draw: Draw, value: Any, share: float = 0.5) -> Any:
    """The value, or None for the rest of the rows."""
    return value if draw.random() < share else None


def present(draw: Draw, **values: Any) -> dict[str, Any]:
    """The keys with a value, and a third of those without one as nulls."""
    return {name: value for name, value in values.items() if value is not None or draw.random() < 0.3}


def tool(draw: Draw) -> dict[str, Any]:
    return {"type": "function", "function": {"name": draw.choice("xyz"), "parameters": {"type": "object"}}}


def call(draw: Draw) -> dict[str, Any]:
    arguments = {"place": words(draw, 2), "days": draw.randint(0, 9)}
    return {"type": "function", "function": {"name": "x", "arguments": draw.choice([arguments, json.dumps(arguments)])}}


def content(draw: Draw, most: int) -> Any:
    if draw.random() < 0.1:
        return [{"type": "text", "text": words(draw, most)} for _ in range(draw.randint(1, 2))]
    return words(draw, most)


def messages(draw: Draw, turns: int = 3) -> list[dict[str, Any]]:
    """Messages in OpenAI's or ShareGPT's names, some with reasoning, weights or tool calls."""
    role, text = draw.choice([("role", "content"), ("from", "value")])
    user, assistant = draw.choice([("user", "assistant"), ("human", "gpt")])
    found: list[dict[str, Any]] = []
    if draw.random() < 0.2:
        found.append({role: "system", text: words(draw, 5)})
    for _ in range(draw.randint(1, turns)):
        found.append({role: user, text: content(draw, 10)})
        extra = present(
            draw,
            reasoning_content=maybe(draw, words(draw, 4), 0.1),
            weight=maybe(draw, draw.choice([0, 1, 0.5]), 0.1),
            tool_calls=maybe(draw, [call(draw)], 0.05),
            name=maybe(draw, "bell", 0.05),
        )
        found.append({role: assistant, text: content(draw, 10), **extra})
    return found


def document(draw: Draw) -> Row:
    return {draw.choice(["text", "text", "content", "body"]): words(draw, 40)} | present(draw, id=maybe(draw, 7))


def conversation(draw: Draw) -> Row:
    which = draw.randrange(6)
    common = present(
        draw, system=maybe(draw, words(draw, 5), 0.2), source=maybe(draw, "sea"), tools=maybe(draw, [tool(draw)], 0.1)
    )
    if which < 2:
        return {draw.choice(["conversations", "messages", "dialogue"]): messages(draw)} | common
    if which == 2:
        return messages(draw)
    if which == 3:
        history = maybe(draw, [[words(draw, 3), words(draw, 3)]], 0.3)
        row = {"instruction": words(draw, 8), "input": draw.choice(["", words(draw, 4)]), "output": words(draw, 8)}
        return row | present(draw, history=history) | common
    if which == 4:
        return {
            draw.choice(["prompt", "question"]): words(draw, 8),
            draw.choice(["completion", "answer"]): words(draw, 8),
        } | common
    return {"text": f"\n\nHuman: {words(draw, 8)}\n\nAssistant: {words(draw, 8)}"}


def pair(draw: Draw) -> Row:
    prompt = messages(draw, 1)[-2:-1] or [{"role": "user", "content": "wind"}]
    replies = [words(draw, 9) for _ in range(2)]
    which = draw.randrange(4)
    scores = present(draw, score_chosen=maybe(draw, 4.5), score_rejected=maybe(draw, 1.0))
    if which == 0:
        sides = [[*prompt, {"role": "assistant", "content": reply}] for reply in replies]
        return dict(zip(("chosen", "rejected"), sides, strict=True)) | scores
    if which == 1:
        return {"prompt": words(draw, 5), "chosen": replies[0], "rejected": replies[1]} | scores
    if which == 2:
        sides = [[{"role": "assistant", "content": reply}] for reply in replies]
        return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]} | scores
    asked = f"\n\nHuman: {words(draw, 5)}\n\nAssistant: "
    return {"chosen": asked + replies[0], "rejected": asked + replies[1]}


MAKERS: dict[str, Callable[[Draw], Row]] = {"document": document, "conversation": conversation, "pair": pair}


def spoil(draw: Draw, value: Any) -> Any:
    """Replace one value somewhere inside by one of ODD, or remove it."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.2:
        return draw.choice(ODD)
    copy = value.copy()
    place = draw.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if draw.random() < 0.2:
        del copy[place]
    else:
        copy[place] = spoil(draw, copy[place])
    return copy


def random_row(draw: Draw, kind: str, spoiled: float = 0.2) -> Row:
    """A row of this kind; with the given probability one value in it is wrong, and rarely the row is of another kind."""
    row = MAKERS[kind if draw.random() > spoiled / 10 else draw.choice(list(MAKERS))](draw)
    return spoil(draw, row) if draw.random() < spoiled else row
