"""Random rows in every schema, with the strings that each of them says, for tests that nothing is lost."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NULLS = (
    "text",
    "messages",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "history",
    "tools",
    "system",
    "input",
    "images",
)
METADATA = ("id", "source", "score", "prompt_id", "language")
UNKNOWN = ("mood", "label", "notes")
ODD: tuple[Any, ...] = (
    None,
    0,
    1.5,
    True,
    "",
    " ",
    [],
    {},
    [None],
    [[]],
    {"role": "user"},
    "\ud7ff",
    "[{",
    [{"type": "image_url"}],
    10**30,
)
PIECES = (
    "rope",
    "灯塔",
    "é",
    "\n",
    "\n\n",
    " ",
    "  ",
    "<|im_end|>",
    "</s>",
    "<think>",
    "{}",
    '"',
    "\\",
    "🙂",
    "\u2028",
    "0",
    "无",
    "<tool_call>",
)


@dataclass
class RandomRow:
    """A row as JSON and what it says. kind: its kind. said: its strings, each of which occurs once. untrained: those of
    them that are not to be trained. unknown: keys that no schema knows. is_mutated: some value was replaced by an odd one.
    """

    row: Any
    kind: str
    said: list[str]
    untrained: list[str]
    unknown: list[str]
    is_mutated: bool = False

    @property
    def raw(self) -> bytes:
        return json.dumps(self.row, ensure_ascii=bool(len(self.said) % 2)).encode()


@dataclass
class Maker:
    """Makes random rows. The same generator gives the same rows."""

    draw: random.Random
    pieces: tuple[str, ...] = PIECES
    said: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    number: int = 0

    def row(self, odd: float = 0.0) -> RandomRow:
        """Return a row; odd: the share of rows in which a value is replaced."""
        self.said, self.untrained = [], []
        kind, row = self.draw.choice(
            [
                self.messages,
                self.messages,
                self.bare,
                self.prompted,
                self.paired,
                self.full_pair,
                self.transcript,
                self.document,
            ]
        )()
        unknown = []
        is_lone = set(row) < {"dialog", "content", "body"} if isinstance(row, dict) else False
        if isinstance(row, dict):
            for name in self.draw.sample(NULLS, 2):
                row.setdefault(name, None)
            for name in self.draw.sample(METADATA, self.draw.randint(0, 2)):
                row[name] = self.draw.choice([7, 0.5, "x", ["x"]])
            if not is_lone:  # a further string would be another text
                unknown = self.draw.sample(UNKNOWN, self.draw.randint(0, 1))
                row |= {name: self.draw.choice(["good", 5, {"a": "b"}]) for name in unknown}
            row = dict(self.draw.sample(list(row.items()), len(row)))
        is_mutated = self.draw.random() < odd
        if is_mutated:
            row = self.mutated(row)
        return RandomRow(row, kind, self.said, self.untrained, unknown, is_mutated)

    def text(self, *, trained: bool = True) -> str:
        """Return a text that no other row has, and note that the row says it."""
        self.number += 1
        pieces = [self.draw.choice(self.pieces) for _ in range(self.draw.randint(0, 5))]
        text = f"{self.draw.choice(['', '', ' '])}t{self.number}t{''.join(pieces)}e{self.number}e"
        self.said.append(text)
        if not trained:
            self.untrained.append(text)
        return text

    def maybe(self, chance: float = 0.3) -> bool:
        return self.draw.random() < chance

    # --- messages

    def parts(self, text: str, is_plain: bool) -> Any:
        """Return a text as it is, or in parts."""
        if is_plain or not self.maybe(0.15):
            return text
        at = self.draw.randint(0, len(text))
        return [{"type": "text", "text": text[:at]}, self.draw.choice([text[at:], {"type": "text", "text": text[at:]}])]

    def call(self, name: str) -> dict[str, Any]:
        arguments: Any = {"where": self.text(), "n": [1, 2.5, None]}
        if self.maybe(0.5):
            arguments = json.dumps(arguments, ensure_ascii=self.maybe(0.5))
        function = {"name": name, "arguments": arguments}
        return {"id": f"c{self.number}", "type": "function", "function": function} if self.maybe(0.5) else function

    def turns(self, *, is_plain: bool = False) -> list[dict[str, Any]]:
        """Return messages that begin with the user and end with an answer."""
        messages: list[dict[str, Any]] = []
        for _ in range(self.draw.randint(1, 3)):
            messages.append({"role": "user", "content": self.parts(self.text(trained=False), is_plain)})
            if not is_plain and self.maybe(0.15):
                call = self.call("look")
                calls: Any = [call] if self.maybe(0.6) else json.dumps([call])
                messages.append({"role": "assistant", "content": self.draw.choice([None, ""]), "tool_calls": calls})
                messages.append({"role": "tool", "content": self.text(trained=False)})
            weight = self.draw.choice(
                [{}, {}, {"weight": 1}, {"weight": 0}, {"train": False}, {"loss": True}, {"masked": True}]
            )
            weight = {} if is_plain else weight
            is_trained = weight in ({}, {"weight": 1}, {"loss": True})
            answer = {"role": "assistant", "content": self.parts(self.text(trained=is_trained), is_plain), **weight}
            if not is_plain and self.maybe(0.15):
                answer["reasoning_content"] = self.text(trained=is_trained) if self.maybe(0.7) else None
            messages.append(answer)
        return messages

    def styled(self, messages: list[dict[str, Any]]) -> list[Any]:
        """Return the messages with other keys and roles."""
        match self.draw.randrange(4):
            case 0:
                roles = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
                keys = {"role": "from", "content": "value"}
                return [{keys.get(k, k): roles[v] if k == "role" else v for k, v in each.items()} for each in messages]
            case 1:
                return [{**each, "name": None, "tool_calls": each.get("tool_calls")} for each in messages]
            case 2:
                return [
                    {key.replace("reasoning_content", "thinking"): v for key, v in each.items()} for each in messages
                ]
        return messages

    def system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.text(trained=False)}] if self.maybe(0.3) else []

    def messages(self) -> tuple[str, Any]:
        row: dict[str, Any] = {}
        system = self.system()
        messages = system + self.turns()
        if self.maybe(0.2):
            tool = {"name": "look", "description": self.text(trained=False), "parameters": {}}
            row[self.draw.choice(["tools", "functions"])] = self.draw.choice([[tool], json.dumps([tool])])
        if not system and self.maybe(0.2):
            row["system"] = self.text(trained=False)
        if not system and self.maybe(0.1):
            row["history"] = self.history()
        row[self.draw.choice(["conversations", "messages", "conversation"])] = self.styled(messages)
        return "conversation", row

    def bare(self) -> tuple[str, Any]:
        return "conversation", self.styled(self.system() + self.turns())

    def history(self) -> Any:
        turns = [[self.text(trained=False), self.text()] for _ in range(self.draw.randint(0, 2))]
        if self.maybe(0.5):
            return turns
        roles = ("user", "assistant")
        return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]

    def context(self) -> dict[str, Any]:
        """Return the columns of a prompt, in one of their forms."""
        form = self.draw.randrange(4)
        if form == 0:
            return {
                self.draw.choice(["prompt", "input"]): [
                    *self.system(),
                    {"role": "user", "content": self.text(trained=False)},
                ]
            }
        row: dict[str, Any] = {
            self.draw.choice(["prompt", "instruction", "question", "query"]): self.text(trained=False)
        }
        if form == 1:
            row["input"] = self.text(trained=False) if self.maybe(0.5) else self.draw.choice([None, ""])
        if self.maybe(0.3):
            row["system"] = self.text(trained=False)
        if self.maybe(0.3):
            row["history"] = self.history()
        return row

    def prompted(self) -> tuple[str, Any]:
        row = self.context()
        answer: Any = self.text()
        if self.maybe(0.3):
            answer = [{"role": "assistant", "content": answer}]
        return "conversation", row | {self.draw.choice(["completion", "output", "response", "answer"]): answer}

    def sides(self) -> list[Any]:
        texts = [self.text(), self.text()]
        match self.draw.randrange(3):
            case 0:
                return texts
            case 1:
                return [{"from": "gpt", "value": text} for text in texts]
        return [[{"role": "assistant", "content": text}] for text in texts]

    def paired(self) -> tuple[str, Any]:
        names = self.draw.choice([("chosen", "rejected"), ("chosen_response", "rejected_response")])
        return "pair", self.context() | dict(zip(names, self.sides(), strict=True))

    def full_pair(self) -> tuple[str, Any]:
        prompt = self.system() + self.turns(is_plain=True)
        prompt.append({"role": "user", "content": self.text(trained=False)})
        self.untrained = list(self.said)
        answers = [{"role": "assistant", "content": self.text()} for _ in range(2)]
        row: dict[str, Any] = {"chosen": [*prompt, answers[0]], "rejected": [*prompt, answers[1]]}
        if self.maybe(0.5):
            row |= {"prompt": prompt[-1]["content"], "messages": row["chosen"], "score_chosen": 8.5}
        return "pair", row

    def transcript(self) -> tuple[str, Any]:
        """Return a transcript, or a pair of them. Their texts have no blank lines, which would look like another speaker."""

        def turns(count: int) -> str:
            texts = [self.text(trained=bool(i % 2)) for i in range(count)]
            return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(texts))

        if self.maybe(0.5):
            return "conversation", {self.draw.choice(["text", "dialog"]): turns(2 * self.draw.randint(1, 3))}
        prompt = turns(2 * self.draw.randint(0, 1) + 1)
        self.untrained = list(self.said)
        return "pair", {name: f"{prompt}\n\nAssistant: {self.text()}" for name in ("chosen", "rejected")}

    def document(self) -> tuple[str, Any]:
        return "document", {self.draw.choice(["text", "text", "content", "body"]): self.text()}

    # --- odd values

    def mutated(self, value: Any) -> Any:
        """Return a JSON value with one of its values, at any depth, replaced or removed."""
        if isinstance(value, dict) and value and self.maybe(0.85):
            key = self.draw.choice(list(value))
            if self.maybe(0.2):
                return {name: each for name, each in value.items() if name != key}
            return value | {key: self.mutated(value[key])}
        if isinstance(value, list) and value and self.maybe(0.8):
            at = self.draw.randrange(len(value))
            if self.maybe(0.2):
                return value[:at] + value[at + 1 :]
            return [*value[:at], self.mutated(value[at]), *value[at + 1 :]]
        return self.draw.choice(ODD)


def rows(number: int, seed: int = 0, odd: float = 0.3) -> Sequence[RandomRow]:
    """Return random rows; odd: the share of them with an odd value."""
    maker = Maker(random.Random(seed))
    return [maker.row(odd) for _ in range(number)]
