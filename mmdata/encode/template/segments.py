"""Segments: pieces of a rendered conversation, which are trained on or not, and ranges of its text."""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mmdata.encode.template.traced import Rendering


class Segment(NamedTuple):
    """A piece of a rendered conversation, which is trained on or not. text: if `is_control`, one special token that the
    template wrote, encoded as one control id; otherwise encoded as ordinary text, whatever strings it contains."""

    text: str
    is_trained: bool
    is_control: bool


def stretches(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Group segments that are encoded as one string: each control token alone, and all text between two of them."""
    return [
        group
        for is_control, run in itertools.groupby(segments, key=lambda segment: segment.is_control)
        for group in ([[segment] for segment in run] if is_control else [list(run)])
    ]


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbouring segments of ordinary text of which both or none are trained on. Control tokens stay alone."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last and not last.is_control and not segment.is_control and last.is_trained == segment.is_trained:
            merged[-1] = Segment(last.text + segment.text, last.is_trained, False)
        else:
            merged.append(segment)
    return merged


def span_of(rendering: Rendering, message: int) -> tuple[int, int]:
    """Return the range [begin, end) of what the template writes of a message; empty if that is nothing."""
    own = [origin for origin in rendering.origins if origin.source.message == message]
    return (own[0].begin, own[-1].end) if own else (0, 0)


def without(whole: tuple[int, int], holes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges that are left of a range without others."""
    begin, end = whole
    parts = []
    for first, last in sorted(holes):
        parts.append((begin, first))
        begin = max(begin, last)
    return [(b, e) for b, e in [*parts, (begin, end)] if b < e]
