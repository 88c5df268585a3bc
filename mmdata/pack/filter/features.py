"""The columns of rows: what is known of each row of a file, computed in batches of about a million characters.

`COLUMNS` declares all of them. A column is computed only if it is asked for, together with those that share its work.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import polars as pl

from mmdata.encode.rows import Conversation, Document, Pair, Row, kind_of, split_documents
from mmdata.io.records import JsonObject
from mmdata.pack.filter import quality
from mmdata.pack.filter.grams import gram_hashes, jaccard, shingles
from mmdata.tokenizer.scripts import LANGUAGES, SCRIPTS, code_points, count_scripts, languages_of, scripts_of

TOKENS, EXACT, NEAR = "tokens", "exact", "near"  # in place of the maker of columns that `frames` adds
KINDS = ("document", "conversation", "pair")
GRAM_UNITS = 5  # n of the n-grams of the column `repeated`
ANSWERS = ("document", "assistant", "chosen", "rejected")  # roles whose texts are trained on
_SHARE_OF = {"digit": "digits", "mark": "punctuation"}  # names of columns that differ from the scripts'


class ColumnInfo(NamedTuple):
    """A column of rows: its polars type and what it says. maker: the method of `RowBatch` that computes it, or TOKENS,
    EXACT or NEAR for columns that need a tokenizer or all rows; empty for the place of a row."""

    dtype: pl.DataType | type[pl.DataType]
    help: str
    maker: str = ""


_COUNT, _FLAG, _SHARE = pl.Int64, pl.Boolean, pl.Float64
_GROUPS: dict[str, dict[str, tuple[pl.DataType | type[pl.DataType], str]]] = {  # by maker
    "": {
        "file": (pl.String, "path of the input"),
        "line": (_COUNT, "number of the line, or of the row of a table, from 1"),
    },
    TOKENS: {
        "tokens": (_COUNT, "tokens of the row's sequences (of a pair, the prompt and both replies)"),
        "trained_tokens": (_COUNT, "tokens that are trained on"),
        "characters_per_token": (_SHARE, "characters a token"),
    },
    EXACT: {
        "duplicate": (_FLAG, "whether an earlier row has the same content"),
        "duplicate_group": (_COUNT, "number of the first row with the same content, from 0"),
    },
    NEAR: {
        "near_duplicate": (_FLAG, "whether an earlier row has nearly the same content"),
        "near_group": (_COUNT, "number of the first row that has nearly the same content, from 0"),
    },
    "_sizes": {
        "kind": (pl.Enum(KINDS), "document, conversation or pair"),
        "bytes": (_COUNT, "bytes of the line"),
        "characters": (_COUNT, "characters of the texts and reasoning"),
    },
    "_languages": {
        "language": (pl.Enum(LANGUAGES), "Chinese, English, code or other"),
        **{_SHARE_OF.get(script, script): (_SHARE, f"share of {script} characters") for script in SCRIPTS},
    },
    "_structure": {
        "messages": (_COUNT, "messages, of a pair those of the chosen side"),
        "turns": (_COUNT, "messages of the user"),
        "has_system": (_FLAG, "whether there is a system prompt"),
        "has_reasoning": (_FLAG, "whether an answer has reasoning"),
        "reasoning_messages": (_COUNT, "messages with reasoning"),
        "has_tools": (_FLAG, "whether tools are defined"),
        "tool_calls": (_COUNT, "tool calls"),
    },
    "_answers": {
        "trained_characters": (_COUNT, "characters of documents and answers"),
        "prompt_characters": (_COUNT, "characters before the last answer, of a pair before the replies"),
        "answer_characters": (_COUNT, "characters of the last answer, of a pair of the chosen reply"),
        "chosen_characters": (_COUNT, "characters of a pair's chosen reply"),
        "rejected_characters": (_COUNT, "characters of a pair's rejected reply"),
        "difference": (_COUNT, "characters of the chosen reply minus those of the rejected one"),
    },
    "_lines": {
        "lines": (_COUNT, "lines of text that are not blank"),
        "longest_line": (_COUNT, "characters of the longest line"),
    },
    "_repeated": {"repeated": (_SHARE, f"share of the {GRAM_UNITS}-grams that repeat an earlier one of the row")},
    "_similarity": {"similarity": (_SHARE, "Jaccard index of the 8-character pieces of a pair's replies")},
    "_quality_of_lines": {name: (_SHARE, help) for name, help in quality.LINES.items()},
    "_quality_of_words": {name: (_SHARE, help) for name, help in quality.WORDS.items()},
    "_quality_of_grams": {name: (_SHARE, help) for name, help in quality.GRAMS.items()},
}
COLUMNS = {
    name: ColumnInfo(dtype, help, maker) for maker, group in _GROUPS.items() for name, (dtype, help) in group.items()
}


def schema(names: Collection[str]) -> pl.Schema:
    """Return the polars types of these columns."""
    return pl.Schema({name: COLUMNS[name].dtype for name in names})


# --- texts


def pieces_of(row: Row) -> Iterator[tuple[str, str]]:
    """Yield the texts of a row in order, as (role, text): of a document those between its marks, as "document"; of a
    message its reasoning followed by its content, unless both are missing; of a pair the messages of the shared prompt
    once, then each reply as one text, as "chosen" and "rejected"."""
    if isinstance(row, Document):
        yield from (("document", text) for text in split_documents(row.text))
    elif isinstance(row, Conversation):
        yield from _texts(row, 0, len(row.messages))
    else:
        yield from _texts(row.chosen, 0, row.num_shared)
        yield "chosen", _reply(row.chosen, row.num_shared)
        yield "rejected", _reply(row.rejected, row.num_shared)


def _texts(conversation: Conversation, begin: int, end: int) -> Iterator[tuple[str, str]]:
    """Yield (role, text) of the messages from `begin` to `end` (exclusive), omitting messages without text."""
    for message in conversation.messages[begin:end]:
        if message.content or message.reasoning_content:
            yield message.role, (message.reasoning_content or "") + message.content


def _reply(side: Conversation, begin: int) -> str:
    """Return the reply of one side of a pair: the texts from message number `begin` on, joined by newlines."""
    return "\n".join(text for _, text in _texts(side, begin, len(side.messages)))


def conversation_of(row: Row) -> Conversation:
    """Return a conversation, the chosen side of a pair, or a conversation without messages for a document."""
    return row if isinstance(row, Conversation) else row.chosen if isinstance(row, Pair) else Conversation(())


def tool_name(tool: JsonObject) -> str:
    """Return the name, up to 80 characters, in {"function": {"name": …}} or {"name": …}; "None" if there is none."""
    function = tool.get("function")
    return str(function.get("name") if isinstance(function, dict) else tool.get("name"))[:80]


MESSAGE_COLUMNS = {
    "file": ColumnInfo(pl.String, "path of the input"),
    "line": ColumnInfo(pl.Int64, "line number of the row, from 1"),
    "message": ColumnInfo(pl.Int64, "number of the message in its row or side, from 1; of a document in its row"),
    "side": ColumnInfo(
        pl.Enum(("", "chosen", "rejected")), "side of a pair; empty for the shared prompt and other rows"
    ),
    "role": ColumnInfo(pl.String, "system, user, assistant, tool or document"),
    "content": ColumnInfo(pl.String, "the text"),
    "reasoning": ColumnInfo(pl.String, "the reasoning before the text, or null"),
    "characters": ColumnInfo(pl.Int64, "characters of text and reasoning"),
    "tool_calls": ColumnInfo(pl.Int64, "tool calls"),
}


def message_frame(rows: Sequence[Row], lines: Sequence[int]) -> pl.DataFrame:
    """Return a frame with a row per message or document and MESSAGE_COLUMNS except file. lines: line number of each
    row."""
    found: list[tuple[int, int, str, str, str, str | None, int]] = []
    for row, line in zip(rows, lines, strict=True):
        if isinstance(row, Document):
            texts = enumerate(split_documents(row.text), 1)
            found += [(line, number, "", "document", text, None, 0) for number, text in texts]
            continue
        shared = row.num_shared if isinstance(row, Pair) else len(row.messages)
        sides = [("chosen", row.chosen), ("rejected", row.rejected)] if isinstance(row, Pair) else [("", row)]
        for side, conversation in sides:
            for number, message in enumerate(conversation.messages, 1):
                if number > shared or side != "rejected":
                    place = (line, number, "" if number <= shared else side, message.role)
                    found.append((*place, message.content, message.reasoning_content, len(message.tool_calls)))
    names = [name for name in MESSAGE_COLUMNS if name not in ("file", "characters")]
    types = {name: MESSAGE_COLUMNS[name].dtype for name in names}
    characters = pl.col("content").str.len_chars() + pl.col("reasoning").str.len_chars().fill_null(0)
    return pl.DataFrame(found, types, orient="row").with_columns(characters=characters.cast(pl.Int64))


# --- a batch of rows


class RowBatch:
    """A batch of rows and the columns computed of them. raws: the line of each row, if read from a file. texts: the
    (role, text) pairs of each row, from `pieces_of`."""

    def __init__(self, rows: Sequence[Row], raws: Sequence[bytes] = ()):
        self.rows, self.raws = rows, raws
        self.texts = [list(pieces_of(row)) for row in rows]

    def columns(self, names: Collection[str]) -> pl.DataFrame:
        """Return a frame with these columns of `COLUMNS`, one row per row of the batch. KeyError if one has no maker."""
        makers: list[Callable[[RowBatch], pl.DataFrame]] = [
            getattr(RowBatch, maker) for maker in dict.fromkeys(COLUMNS[name].maker for name in names)
        ]
        frames = [make(self) for make in makers]
        return pl.concat(frames, how="horizontal").select(names).cast(dict(schema(names)))  # type: ignore[arg-type]

    @cached_property
    def whole(self) -> list[str]:
        """The text of each row: all of its texts joined."""
        return ["".join([text for _, text in of_row]) for of_row in self.texts]

    @cached_property
    def pieces(self) -> pl.DataFrame:
        """A frame with one row per text: row (its index in the batch), role, text, characters."""
        pieces = [piece for of_row in self.texts for piece in of_row]
        columns = {
            "row": np.repeat(np.arange(len(self.texts), dtype=np.uint32), [len(of_row) for of_row in self.texts]),
            "role": pl.Series([role for role, _ in pieces], dtype=pl.String),
            "text": pl.Series([text for _, text in pieces], dtype=pl.String),
        }
        return pl.DataFrame(columns).with_columns(characters=pl.col("text").str.len_chars())

    @cached_property
    def lengths(self) -> np.ndarray:
        """The number of characters of each row's texts: int64 [rows]."""
        return np.fromiter(map(len, self.whole), np.int64, len(self.whole))

    @cached_property
    def points(self) -> np.ndarray:
        """The code points of all texts end to end: uint32 [characters]."""
        return code_points("".join(self.whole))

    @cached_property
    def script_counts(self) -> np.ndarray:
        """The number of characters of each script in each row: int64 [rows, scripts]."""
        return count_scripts(scripts_of(self.points), self.lengths)

    def hashes(self) -> np.ndarray:
        """Return a hash of each row's roles and texts, equal for equal rows: uint64 [rows]."""
        joined = ["\0".join([word for piece in of_row for word in piece]) for of_row in self.texts]
        return pl.Series(joined, dtype=pl.String).hash().to_numpy()

    def _sizes(self) -> pl.DataFrame:
        num_bytes = [len(raw) for raw in self.raws] or [None] * len(self.rows)
        return pl.DataFrame({"kind": list(map(kind_of, self.rows)), "bytes": num_bytes, "characters": self.lengths})

    def _languages(self) -> pl.DataFrame:
        languages = np.array(LANGUAGES)[languages_of(self.script_counts, self.whole)]
        shares = self.script_counts / np.maximum(self.lengths, 1)[:, None]
        names = [_SHARE_OF.get(script, script) for script in SCRIPTS]
        return pl.DataFrame({"language": languages, **dict(zip(names, shares.T, strict=True))})

    def _structure(self) -> pl.DataFrame:
        conversations = list(map(conversation_of, self.rows))
        messages = [conversation.messages for conversation in conversations]
        return pl.DataFrame(
            {
                "messages": list(map(len, messages)),
                "turns": [sum(message.role == "user" for message in each) for each in messages],
                "has_system": [any(m.role == "system" and m.content.strip() for m in each) for each in messages],
                "reasoning_messages": [sum(bool(m.reasoning_content) for m in each) for each in messages],
                "has_tools": [bool(conversation.tools) for conversation in conversations],
                "tool_calls": [sum(len(message.tool_calls) for message in each) for each in messages],
            }
        ).with_columns(has_reasoning=pl.col("reasoning_messages") > 0)

    def _answers(self) -> pl.DataFrame:
        role, length = pl.col("role"), pl.col("characters")
        chosen, rejected = (length.filter(role == side).last() for side in ("chosen", "rejected"))
        answer = length.filter(role.is_in(["document", "assistant", "chosen"])).last()
        of_reply = role.is_in(["chosen", "rejected"])
        of_row = (
            pl.when(role.is_in(["chosen"]).any())
            .then(length.filter(~of_reply).sum())
            .otherwise(length.sum() - length.filter(role == "document").sum() - answer.fill_null(0))
        )
        found = self.pieces.group_by("row").agg(
            trained_characters=length.filter(role.is_in(ANSWERS)).sum(),
            prompt_characters=pl.when((role == "document").any()).then(0).otherwise(of_row),
            answer_characters=pl.when((role == "document").any()).then(length.sum()).otherwise(answer),
            chosen_characters=chosen,
            rejected_characters=rejected,
            difference=chosen.cast(pl.Int64) - rejected.cast(pl.Int64),
        )
        return self._of_rows(found)

    def _lines(self) -> pl.DataFrame:
        lines = self.pieces.select("row", line=pl.col("text").str.split("\n")).explode("line")
        is_text = pl.col("line").str.strip_chars() != ""
        length = pl.col("line").str.strip_chars_end("\r").str.len_chars()
        return self._of_rows(lines.group_by("row").agg(lines=is_text.sum(), longest_line=length.max()))

    def _of_rows(self, found: pl.DataFrame) -> pl.DataFrame:
        """Return a frame of columns by `row` in the order of the rows; rows without a text have nulls."""
        every = pl.DataFrame({"row": np.arange(len(self.rows), dtype=np.uint32)})
        return every.join(found, on="row", how="left", maintain_order="left").drop("row")

    def _repeated(self) -> pl.DataFrame:
        hashes, ends = gram_hashes([" ".join(text for _, text in of_row) for of_row in self.texts], GRAM_UNITS)
        grams = pl.DataFrame(
            {"row": np.repeat(np.arange(len(self.rows), dtype=np.uint32), np.diff(ends)), "gram": hashes}
        )
        share = 1 - pl.col("gram").n_unique() / pl.len()
        return self._of_rows(grams.group_by("row").agg(repeated=share)).fill_null(0)

    def _similarity(self) -> pl.DataFrame:
        places = [i for i, row in enumerate(self.rows) if isinstance(row, Pair)]
        sides = [text for i in places for _, text in self.texts[i][-2:]]  # the chosen and the rejected reply
        lengths = np.fromiter(map(len, sides), np.int64, len(sides))
        found = jaccard(*shingles(code_points("".join(sides)), lengths), len(places))
        return self._of_rows(pl.DataFrame({"row": np.array(places, np.uint32), "similarity": found}))

    @cached_property
    def _paragraphs(self) -> list[str]:
        """The texts of each row on lines of their own."""
        return ["\n".join([text for _, text in of_row]) for of_row in self.texts]

    def _quality_of_lines(self) -> pl.DataFrame:
        return quality.lines_frame(self._paragraphs)

    @cached_property
    def _words(self) -> quality.Words:
        return quality.Words(self._paragraphs)

    def _quality_of_words(self) -> pl.DataFrame:
        return self._words.frame()

    def _quality_of_grams(self) -> pl.DataFrame:
        return self._words.gram_frame()
