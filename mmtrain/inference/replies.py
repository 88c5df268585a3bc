"""Splits the text of a model's answer into reasoning (its think block), content and tool calls, while it is generated.

The text may arrive in pieces cut at any place. At most the length of a tag with the newlines before it is held back,
and a tool call until it is complete. One that is not valid JSON, or not closed, is returned as content, so that it is
not lost.
"""

import json
from dataclasses import dataclass

THINK, THINK_END, CALL, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Piece:
    """A consecutive stretch of an answer. kind: "reasoning", "content" or "call". call: the "name" of the called
    function and its "arguments" as JSON text; None for other kinds."""

    kind: str
    text: str
    call: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer. reasoning: None without a think block, or with an empty one. calls: see `Piece`."""

    reasoning: str | None
    content: str
    calls: list[dict[str, str]]


class Splitter:
    """Splits the text of one answer as it arrives. `<think>` is a tag only at the beginning of the answer (after
    whitespace), and `<tool_call>` only after the think block. with_calls: False leaves tool calls in the content."""

    def __init__(self, *, with_calls: bool = True):
        self._with_calls = with_calls
        # What the next text is: start, reasoning, gap (newlines after the think block), content or call.
        self._mode = "start"
        self._held = ""  # text that was received and not yet returned

    def feed(self, text: str) -> list[Piece]:
        """Add text and return the pieces that are known by now, without text that may turn out to be part of a tag."""
        self._held += text
        pieces: list[Piece] = []
        while (more := self._next()) is not None:
            pieces += more
        return [piece for piece in pieces if piece.text]

    def close(self) -> list[Piece]:
        """Return the text held back, once the answer has ended; a tool call without its closing tag becomes content."""
        held, self._held = self._held, ""
        if self._mode == "call":
            return [Piece("content", CALL + held)]
        if self._mode == "reasoning":
            held = held.rstrip("\n")
        return [Piece("reasoning" if self._mode == "reasoning" else "content", held)] if held else []

    def _next(self) -> list[Piece] | None:
        """Process the text held back up to the next tag or its end. Return the pieces, or None when more text is
        needed."""
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
        """Set the mode to "reasoning" if the text so far, after any whitespace, begins with the THINK tag, else to
        "content". Return [], or None while more text is needed. In "reasoning" the tag and the whitespace around it
        (behind it only newlines) are dropped."""
        text = self._held.lstrip()
        if text.startswith(THINK):
            inside = text[len(THINK) :].lstrip("\n")
            if not inside:
                return None
            self._mode, self._held = "reasoning", inside
        elif THINK.startswith(text):  # also true for an empty text
            return None
        else:
            self._mode = "content"
        return []

    def _release(self, tag: str) -> list[Piece] | None:
        """Return the text that cannot be part of `tag`, or of the newlines before it, as a piece; None if there is no
        such text or in a tool call, which is returned as a whole."""
        if self._mode == "call":
            return None
        end = len(self._held) - tail_of_prefix(self._held, tag)
        text = self._held[:end].rstrip("\n")
        self._held = self._held[len(text) :]
        return [Piece(self._mode, text)] if text else None


def tail_of_prefix(text: str, word: str) -> int:
    """Return the length of the longest end of `text` that is the beginning of `word`, but not all of it; 0 for none."""
    longest = min(len(word) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)


def _call(text: str) -> Piece:
    """Return the tool call in `text` (JSON between the tags) or, if it is not a valid one, text and tags as content."""
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
    """Split a complete answer. with_calls: False leaves tool calls in the content."""
    splitter = Splitter(with_calls=with_calls)
    pieces = splitter.feed(text) + splitter.close()
    reasoning, content = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("reasoning", "content"))
    return Reply(reasoning or None, content, [piece.call for piece in pieces if piece.call])
