"""Splits a model's answer into its thinking, its content and its tool calls, while the text streams in.

The text may arrive cut anywhere; at most the length of a tag is held back. No text is lost: a tool call that is not
valid JSON, or is never closed, is returned as content.
"""

import json
from dataclasses import dataclass

THINK, THINK_END, CALL, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer. `kind` is reasoning, content or call; `call` (name, and arguments as JSON) only for a call."""

    kind: str
    text: str
    call: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer. `reasoning` is None without a think block; each call has a name and arguments as JSON."""

    reasoning: str | None
    content: str
    calls: list[dict[str, str]]


class Splitter:
    """Splits one answer. A `<think>` block counts only at the beginning of the answer, tool calls anywhere after it."""

    def __init__(self, *, with_calls: bool = True):
        self._with_calls = with_calls
        self._mode = "start"  # start, reasoning, gap (newlines after the think block), content, call
        self._held = ""  # received and not yet returned

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are certain after `text`."""
        self._held += text
        pieces: list[Piece] = []
        while (more := self._next()) is not None:
            pieces += more
        return [piece for piece in pieces if piece.text]

    def close(self) -> list[Piece]:
        """The text held back, once the answer has ended."""
        held, self._held = self._held, ""
        if self._mode == "call":
            return [Piece("content", CALL + held)]
        if self._mode == "reasoning":
            held = held.rstrip("\n")
        return [Piece("reasoning" if self._mode == "reasoning" else "content", held)] if held else []

    def _next(self) -> list[Piece] | None:
        """Process the held text by one step; None when more text is needed."""
        if self._mode == "start":
            return self._begin()
        if self._mode == "gap":
            self._held = self._held.lstrip("\n")
            if not self._held:
                return None
            self._mode = "content"
        tag = {"reasoning": THINK_END, "call": CALL_END, "content": CALL}[self._mode]
        at = self._held.find(tag) if self._with_calls or self._mode == "reasoning" else -1
        if at < 0:
            return self._release(tag)
        before, self._held = self._held[:at], self._held[at + len(tag) :]
        if self._mode == "call":
            self._mode = "content"
            return [_call(before)]
        piece = Piece(self._mode, before.rstrip("\n"))
        self._mode = "gap" if self._mode == "reasoning" else "call"
        return [piece]

    def _begin(self) -> list[Piece] | None:
        """Decide whether the answer opens with a think block."""
        text = self._held.lstrip()
        if text.startswith(THINK):
            inside = text[len(THINK) :].lstrip("\n")
            if not inside:
                return None
            self._mode, self._held = "reasoning", inside
        elif THINK.startswith(text):  # also while there is no text
            return None
        else:
            self._mode = "content"
        return []

    def _release(self, tag: str) -> list[Piece] | None:
        """Return all text that cannot be the beginning of the tag or of the newlines before it."""
        if self._mode == "call":
            return None
        end = len(self._held) - tail_of_prefix(self._held, tag)
        text = self._held[:end].rstrip("\n")
        self._held = self._held[len(text) :]
        return [Piece(self._mode, text)] if text else None


def tail_of_prefix(text: str, word: str) -> int:
    """Length of the longest end of `text` that is a beginning of `word` but not all of it."""
    longest = min(len(word) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)


def _call(text: str) -> Piece:
    """The tool call in `text`, or its text with the tags as content when it is not one."""
    try:
        values = json.loads(text)
        name, arguments = values["name"], values.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError):
        name = arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict | str):
        return Piece("content", CALL + text + CALL_END)
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Piece("call", text, {"name": name, "arguments": written})


def split(text: str, *, with_calls: bool = True) -> Reply:
    """Split a complete answer."""
    splitter = Splitter(with_calls=with_calls)
    pieces = splitter.feed(text) + splitter.close()
    reasoning, content = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content"))
    return Reply(reasoning or None, content, [piece.call for piece in pieces if piece.call])
