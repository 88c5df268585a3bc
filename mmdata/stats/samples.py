"""Convert rows to the records that the report draws as chats: messages cut into tokens, with the trained tokens marked.
Tokens that together form one character are one piece. Only the beginning of a long row is included."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import BadRow, texts_of
from mmdata.encode.sequences import PairSequence, Sequences, TokenSequence
from mmdata.pack.filter.features import COLUMNS, TOKENS, pieces_of
from mmdata.pack.filter.frames import PartColumns, RowReader, token_columns
from mmdata.stats.scan import SampleRow
from mmdata.stats.tokens import Vocabulary

SampleRecord = dict[str, Any]  # JSON object for page.js: a row, a section of a row (`parts`), or a message
MOST_TOKENS = 400  # tokens shown of a sequence, or of a pair's prompt and of each of its replies
MOST_CHARACTERS = 1500  # characters shown of a row without tokens
MOST_TABLED, ROWS_AT_ONCE = 160, 256  # characters of a row's text in the table, rows whose columns are computed at once
TABLED = (
    "_sizes",
    "_languages",
    "_structure",
    "_answers",
    "_lines",
    "_repeated",
    "_similarity",
)  # makers of its columns
MOST_SEQUENCES = 4  # sequences shown of a row that is encoded as several
PLAIN, TRAINED, CONTROL = (
    "0",
    "1",
    "2",
)  # marks of a piece: text, trained text, control token; "3": trained control token


def records(
    samples: Sequence[SampleRow], vocabulary: Vocabulary | None, encoder: RowEncoder | None = None
) -> list[SampleRecord]:
    """Return one record per row, for page.js; rows that can no longer be parsed are omitted.

    A record has why, file, line, characters and, if measured, loss, tokens and trained. Its `parts` are sections:
    [{"name", "messages", "hidden"}], one for each side of a pair and its prompt, or one for each sequence; `hidden`
    tokens (without tokens: characters) are not shown. A message is {"role", "text", "ids", "marks"}: a list of pieces,
    the token ids of each, and one character per piece: PLAIN, TRAINED, CONTROL, or "3" for a trained control token.
    Rows not encoded yet are encoded with `encoder`. Without encoder or vocabulary, or if it rejects the row
    (`set_aside` says why), each message is one piece without ids.
    """
    drawn = []
    for row in samples:
        try:
            drawn.append(_record(row, vocabulary, encoder))
        except BadRow:
            continue  # the row was valid when it was counted; its line is only parsed again here
    return drawn


def row_frame(
    samples: Sequence[SampleRow],
    kind: str,
    repeats: pl.DataFrame,
    losses: pl.DataFrame | None,
    tokenizer_dir: Path | None,
) -> pl.DataFrame:
    """Return a frame of rows, one record each, with the beginning of the text and the columns of `features.COLUMNS` except
    those on quality and groups. repeats: the file and line of rows that repeat an earlier one. losses: as
    `figures.read_losses`. tokenizer_dir: gives the tokens of rows that are not encoded; None if all are, or tokens are not counted.
    """
    makers = (TOKENS,) if tokenizer_dir else ()
    names = [name for name, column in COLUMNS.items() if column.maker in (*makers, *TABLED)]
    read, frames = PartColumns(RowReader(kind, tuple(names), tokenizer_dir)), []
    for begin in range(0, len(samples), ROWS_AT_ONCE):
        shown = samples[begin : begin + ROWS_AT_ONCE]
        rows = [one.parsed() for one in shown]
        texts = [" ".join("\n".join(texts_of(row))[: 2 * MOST_TABLED].split())[:MOST_TABLED] for row in rows]
        place = {"file": [one.file for one in shown], "line": [one.line for one in shown], "text": texts}
        columns = read.of_rows(rows, [one.raw for one in shown if one.raw])
        if any(one.encoded for one in shown):
            sums = [
                [int(one.encoded.lengths.sum()), int(one.encoded.num_loss.sum())] if one.encoded else [0, 0]
                for one in shown
            ]
            tokens, trained = np.array(sums).T
            columns = columns.hstack(token_columns(tokens, trained, columns["characters"].to_numpy()))
        frames.append(pl.DataFrame(place).hstack(columns))
    if not frames:
        return pl.DataFrame()
    frame = pl.concat(frames, how="diagonal")
    frame = frame.join(repeats.with_columns(duplicate=True), on=["file", "line"], how="left", maintain_order="left")
    if losses is not None:
        means = losses.select("file", "line", loss=pl.col("nll") / pl.col("tokens"))
        frame = frame.join(means, on=["file", "line"], how="left", maintain_order="left")
    return frame.with_columns(pl.col("duplicate").fill_null(False))


def _record(shown: SampleRow, vocabulary: Vocabulary | None, encoder: RowEncoder | None) -> SampleRecord:
    """Return the record of one row; see `records`. Raise BadRow if its line cannot be parsed."""
    row = shown.parsed()
    record: SampleRecord = {"why": shown.why, "file": shown.file, "line": shown.line, "characters": shown.characters}
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
    """Return the sections of a row without tokens, at most MOST_CHARACTERS characters in all: one, or prompt and
    replies of a pair. pieces: from `pieces_of`."""
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
    """Return the sections of an encoded row; each also has `num_trained`, its number of trained tokens."""
    first = sequences[0]
    if isinstance(first, PairSequence):
        lists = [
            ("prompt", first.prompt, first.chosen_spans[:0]),
            ("chosen", first.chosen, first.chosen_spans),
            ("rejected", first.rejected, first.rejected_spans),
        ]
    else:
        lists = [
            ("", one.ids, one.spans) for one in islice(sequences, MOST_SEQUENCES) if isinstance(one, TokenSequence)
        ]
    parts = []
    for name, ids, spans in lists:
        mask = np.zeros(len(ids), bool)
        for begin, end in spans.tolist():
            mask[begin:end] = True
        most = MOST_TOKENS if len(lists) <= 3 else MOST_TOKENS // 2
        messages = _messages(ids[:most].tolist(), mask, vocabulary, "assistant" if name in _SIDES else "document")
        parts.append(
            {"name": name, "messages": messages, "hidden": max(0, len(ids) - most), "num_trained": int(mask.sum())}
        )
    return parts


_SIDES = ("chosen", "rejected")


def _messages(ids: Sequence[int], mask: np.ndarray, vocabulary: Vocabulary, first_role: str) -> list[SampleRecord]:
    """Split ids at the control tokens with which messages begin, and return the messages' records, without these
    tokens, the role names after them, and messages without visible text. mask: bool, whether each token is trained.
    first_role: of the tokens before the first such control token."""
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
    """Append the token at position `at` to a message as a piece, and return the position of the next. If it ends inside
    a character, up to three more tokens that complete it are included."""
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
    """Return whether the bytes are valid UTF-8, and so do not end inside a character."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
