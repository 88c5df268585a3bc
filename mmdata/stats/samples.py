"""Records of rows that a page draws as chats: messages cut into tokens, the trained ones marked.

A token that holds part of a character is shown together with those that complete it. Of long rows the beginning is shown.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import BadRow
from mmdata.encode.sequences import PairSequence, Sequences
from mmdata.encode.sequences import Sequence as Ids
from mmdata.stats.frames import pieces_of
from mmdata.stats.scan import SampleRow
from mmdata.stats.tokens import Vocabulary

SampleRecord = dict[str, Any]  # a row, a part of it or a message, as page.js draws it
MOST_TOKENS = 400  # of a row, or of a pair's prompt and of each of its replies
MOST_CHARACTERS = 1500  # of a row shown without tokens
MOST_SEQUENCES = 4  # of a document cut into several
PLAIN, TRAINED, CONTROL = "0", "1", "2"  # "3": a control token that is trained


def records(
    samples: Sequence[SampleRow], vocabulary: Vocabulary | None, encoder: RowEncoder | None = None
) -> list[SampleRecord]:
    """One record a row: why, file, line, characters, and `parts`: [{"name", "messages", "hidden" tokens}].

    A message is {"role", "text": [pieces], "ids": [[id, …] of each], "marks": one character a piece}. A row without
    ids is encoded; if it cannot be, or there is no encoder, there is one piece a message and no ids.
    """
    drawn = []
    for row in samples:
        try:
            drawn.append(_record(row, vocabulary, encoder))
        except BadRow:
            continue  # it was usable when it was kept: another template or length limit now
    return drawn


def _record(shown: SampleRow, vocabulary: Vocabulary | None, encoder: RowEncoder | None) -> SampleRecord:
    row = shown.parsed()
    record: SampleRecord = {
        "why": shown.why,
        "file": shown.file,
        "line": shown.line,
        "characters": shown.characters,
    }
    if shown.nll is not None:
        record["loss"] = shown.nll
    sequences = shown.encoded
    num_tokens = int(sequences.lengths.sum()) if sequences else 0
    if not sequences and encoder:
        encoded = encoder.encode([row])
        sequences, num_tokens = encoded.sequences, encoded.num_tokens
        if encoded.bad:
            record["set_aside"] = str(encoded.bad[0])
    if vocabulary and sequences:
        parts = _token_parts(sequences, vocabulary)
        record |= {"tokens": num_tokens, "trained": sum(part.pop("num_trained") for part in parts)}
        return record | {"parts": parts}
    return record | {"parts": _plain_parts(list(pieces_of(row)))}


def _plain_parts(pieces: Sequence[tuple[str, str]]) -> list[SampleRecord]:
    """Parts of a row without tokens."""
    parts: dict[str, list[SampleRecord]] = {}
    left = MOST_CHARACTERS
    hidden = 0
    for role, text in pieces:
        side = role if role in ("chosen", "rejected") else ""
        shown = text[: max(left, 0)]
        left, hidden = left - len(shown), hidden + len(text) - len(shown)
        name = "assistant" if side else role
        mark = TRAINED if name in ("assistant", "document") else PLAIN
        parts.setdefault(side, []).append({"role": name, "text": [shown], "ids": [], "marks": mark})
    return [{"name": name, "messages": messages, "hidden": hidden} for name, messages in parts.items()]


def _token_parts(sequences: Sequences, vocabulary: Vocabulary) -> list[SampleRecord]:
    first = sequences[0]
    if isinstance(first, PairSequence):
        lists = [
            ("prompt", first.prompt, first.chosen_spans[:0]),
            ("chosen", first.chosen, first.chosen_spans),
            ("rejected", first.rejected, first.rejected_spans),
        ]
    else:
        lists = [("", one.ids, one.spans) for one in islice(sequences, MOST_SEQUENCES) if isinstance(one, Ids)]
    parts = []
    for name, ids, spans in lists:
        mask = np.zeros(len(ids), bool)
        for begin, end in spans.tolist():
            mask[begin:end] = True
        most = MOST_TOKENS if len(lists) <= 3 else MOST_TOKENS // 2
        messages = _messages(ids[:most].tolist(), mask, vocabulary, "assistant" if name in _SIDES else "document")
        parts.append(
            {
                "name": name,
                "messages": messages,
                "hidden": max(0, len(ids) - most),
                "num_trained": int(mask.sum()),
            }
        )
    return parts


_SIDES = ("chosen", "rejected")


def _messages(ids: Sequence[int], mask: np.ndarray, vocabulary: Vocabulary, first_role: str) -> list[SampleRecord]:
    """Ids cut at the control tokens that open a message; what names its role is not shown again."""
    messages = [{"role": first_role, "text": [], "ids": [], "marks": ""}]
    at = 0
    while at < len(ids):
        header = vocabulary.header(ids, at)
        if header:
            role, at = header
            messages.append({"role": role, "text": [], "ids": [], "marks": ""})
            continue
        at = _add_piece(messages[-1], ids, at, mask, vocabulary)
    return [message for message in messages if "".join(message["text"]).strip()]


def _add_piece(message: SampleRecord, ids: Sequence[int], at: int, mask: np.ndarray, vocabulary: Vocabulary) -> int:
    """Add the token at `at`, with those after it that complete its last character; gives where the next piece begins."""
    if vocabulary.control[ids[at]]:
        text, end = vocabulary.tokenizer.native.id_to_token(ids[at]) or "", at + 1
    else:
        end, content = at + 1, vocabulary.pieces[ids[at]]
        while not _is_whole(content) and end < min(len(ids), at + 4) and not vocabulary.control[ids[end]]:
            content += vocabulary.pieces[ids[end]]
            end += 1
        text = content.decode("utf-8", errors="replace")
    message["text"].append(text)
    message["ids"].append(list(ids[at:end]))
    message["marks"] += str(int(mask[at]) + 2 * bool(vocabulary.control[ids[at]]))
    return end


def _is_whole(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
