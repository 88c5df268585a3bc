"""A model's answer as it is written in; its thinking, its words and its tool calls out, told apart.

Works on pieces cut anywhere: at most the length of a mark is held back. Nothing said is lost: a call that is no JSON, or
never ends, comes out as the words it is written in.
"""

import json
from dataclasses import dataclass
from typing import Any

THINK, THINK_END, CALL, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer. `kind` is reasoning, content or call; only a call has `call`: name and arguments (JSON)."""

    kind: str
    text: str
    call: dict[str, str] | None = None


class Splitter:
    """Splits one answer. A `<think>` block counts only where the answer begins; tool calls anywhere in the words."""

    def __init__(self, *, with_calls: bool = True):
        self._with_calls = with_calls
        self._mode = "start"  # start, reasoning, gap (the newlines after it), content, call
        self._held = ""  # read, not yet given out

    def feed(self, text: str) -> list[Piece]:
        """What is certain once `text` has come."""
        self._held += text
        found: list[Piece] = []
        while (more := self._next()) is not None:
            found += more
        return [piece for piece in found if piece.text]

    def close(self) -> list[Piece]:
        """What was held back: the answer has ended."""
        held, self._held = self._held, ""
        if self._mode == "call":
            return [Piece("content", CALL + held)]
        if self._mode == "reasoning":
            held = held.rstrip("\n")
        return [Piece("reasoning" if self._mode == "reasoning" else "content", held)] if held else []

    def _next(self) -> list[Piece] | None:
        """One step through what is held; None when more text is needed first."""
        if self._mode == "start":
            return self._begin()
        if self._mode == "gap":
            self._held = self._held.lstrip("\n")
            if not self._held:
                return None
            self._mode = "content"
        mark = {"reasoning": THINK_END, "call": CALL_END, "content": CALL}[self._mode]
        at = self._held.find(mark) if self._with_calls or self._mode == "reasoning" else -1
        if at < 0:
            return self._give_out(mark)
        before, self._held = self._held[:at], self._held[at + len(mark) :]
        if self._mode == "call":
            self._mode = "content"
            return [_call(before)]
        found = Piece(self._mode, before.rstrip("\n"))
        self._mode = "gap" if self._mode == "reasoning" else "call"
        return [found]

    def _begin(self) -> list[Piece] | None:
        """Whether the answer opens with a think block."""
        said = self._held.lstrip()
        if said.startswith(THINK):
            inside = said[len(THINK) :].lstrip("\n")
            if not inside:
                return None
            self._mode, self._held = "reasoning", inside
        elif THINK.startswith(said):  # also while nothing is said
            return None
        else:
            self._mode = "content"
        return []

    def _give_out(self, mark: str) -> list[Piece] | None:
        """All that cannot be the beginning of the mark, or of the newlines before it."""
        if self._mode == "call":
            return None
        longest = min(len(mark) - 1, len(self._held))
        kept = next((n for n in range(longest, 0, -1) if mark.startswith(self._held[-n:])), 0)
        words = self._held[: len(self._held) - kept].rstrip("\n")
        self._held = self._held[len(words) :]
        return [Piece(self._mode, words)] if words else None


def _call(text: str) -> Piece:
    """A tool call; as words when it is none."""
    try:
        found = json.loads(text)
        name, arguments = found["name"], found.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError):
        return Piece("content", CALL + text + CALL_END)
    if not isinstance(name, str) or not isinstance(arguments, (dict, str)):
        return Piece("content", CALL + text + CALL_END)
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Piece("call", text, {"name": name, "arguments": written})


def split(text: str, *, with_calls: bool = True) -> dict[str, Any]:
    """A whole answer: `reasoning` (None when there was no think block), `content`, `calls`."""
    splitter = Splitter(with_calls=with_calls)
    pieces = splitter.feed(text) + splitter.close()
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    return {
        "reasoning": reasoning or None,
        "content": "".join(piece.text for piece in pieces if piece.kind == "content"),
        "calls": [piece.call for piece in pieces if piece.call],
    }
