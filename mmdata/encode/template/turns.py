"""What a chat template writes around answers, learned from renderings of a short test conversation."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mmdata.encode.rows import BadRow, Message
from mmdata.encode.template.traced import Rendering

EMPTY_THINK = "<think>\n\n</think>\n\n"
TURN = [Message("user", "Ask"), Message("assistant", "Tell")]  # the test conversation
Render = Callable[[Sequence[Message], bool], Rendering]
Pieces = Callable[[str], list[str]]


class Turn(NamedTuple):
    r"""What a template writes around an answer. header: before the trained part, such as "<|im_start|>assistant\n".
    end: after the content up to the next message, such as "<|im_end|>\n"; last_end: after the last message. era: see
    `Template.era`. missing_prompt: the header, if the template does not write it when asked for a prompt, else ""."""

    header: str
    end: str
    last_end: str
    era: str
    missing_prompt: str = ""


def learn_turn(render: Render, pieces: Pieces) -> Turn:
    """Return what a template writes around an answer. Raises BadRow if messages are missing or out of order. render:
    renders messages, with True a generation prompt after them. pieces: divides a text at control tokens."""
    two = TURN * 2
    gaps = _gaps(render, two)
    after_user = _gaps(render, two[:1])[-1]
    prompt = _gaps(render, two[:1], True)[-1]
    # The header is the end of a prompt. The text before an answer can be longer if the model must write its last
    # part.
    header = prompt if gaps[1].startswith(prompt) and prompt != after_user else gaps[1]
    header = header.partition("<think>")[0]
    era, missing_prompt = "seed" if prompt == after_user == gaps[1] else "2", ""
    if era != "seed":
        own = header.removeprefix(common_prefix(pieces(header), pieces(after_user)))
        missing_prompt = own if own.strip() and prompt == after_user else ""
        # A space alone, as Mistral's templates write, is no header: it is also in other places.
        header = own if own.strip() else after_user
    if gaps[1].endswith(EMPTY_THINK) and gaps[3].endswith(EMPTY_THINK):
        era = "3"
    last_end = _gaps(render, two[:2])[-1]
    end = common_prefix(pieces(last_end), pieces(gaps[2]))
    if end.strip():
        last_end = end
    else:  # nothing in common: an earlier answer ends before the header of the next message
        end = _end_before_prompt(render, header)
        if not end or not gaps[2].startswith(end):
            first, later = (pieces(gap)[::-1] for gap in (gaps[0], gaps[2]))
            end = gaps[2][: len(gaps[2]) - len(common_prefix(first, later))]
    return Turn(header, end, last_end, era, missing_prompt)


def _end_before_prompt(render: Render, header: str) -> str:
    """Return what the template writes between an answer and `header`, a generation prompt; "" if that is unknown."""
    with contextlib.suppress(BadRow):
        end = _gaps(render, TURN, True)[-1]
        return end.removesuffix(header) if header and end.endswith(header) else ""
    return ""


def _gaps(render: Render, messages: Sequence[Message], is_prompt: bool = False) -> list[str]:
    """Return the texts that the template writes before, between and after the contents. Raises BadRow if the rendering
    does not show every content once and in order."""
    text, origins, _ = render(messages, is_prompt)
    if [origin.source.message for origin in origins] != list(range(len(messages))):
        raise BadRow("template cannot be cut", "it does not show the messages of a plain conversation once, in order")
    edges = [0, *(edge for origin in origins for edge in origin[:2]), len(text)]
    return [str.__getitem__(text, slice(*edges[n : n + 2])) for n in range(0, len(edges), 2)]


def common_prefix(one: Sequence[str], other: Sequence[str]) -> str:
    """Return the pieces with which both lists begin, joined."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(piece for piece, _ in same)
