"""Statistics of the text of rows: rows are put into polars frames and counted by polars expressions.

This module reads no files and no tokens. Rows are counted in batches of about a million characters. Memory: 8 bytes per
row for its hash, and 32 bytes more for each row with a MinHash signature.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import polars as pl

from mmdata.encode.rows import BadRow, Conversation, Document, Pair, Row, split_documents
from mmdata.encode.validate import control_strings
from mmdata.io.lines import Line
from mmdata.io.records import JsonObject
from mmdata.stats.shingles import GRAM, jaccard, shingles, signatures
from mmdata.stats.tally import NUM_EXAMPLES, Tally
from mmdata.tokenizer.scripts import LANGUAGES, code_points, count_scripts, languages_of, scripts_of

ROWS_FOR_NEAR = 2_000_000  # rows that get a MinHash signature, to find near duplicates: 64 MB
OPENING = 20  # characters at the beginning of a document or answer that are counted as its opening
NUM_TURNS = 8  # answers of later turns are counted as answers of this turn
RAW_SHOWN = 600  # bytes of a left-out row that the report shows
LONGER_BY = 3  # pairs are counted whose one reply is more than this many times as long as the other
GRAM_UNITS = 8  # n of the n-grams among which `repeated_phrases` looks for repeated ones, in units
_UNITS = re.compile(r"[A-Za-z\u00C0-\u024F\u0370-\u052F]+|\d+|[^\s]")
STRINGS = ("opening", "system", "tool")  # figures whose keys are strings from the data; these are trimmed
_ANSWERS = ("document", "assistant", "chosen", "rejected")


# --- frames


def text_frame(texts_of_rows: Sequence[Sequence[tuple[str, str]]]) -> pl.DataFrame:
    """Return a frame with one row per text: row (index into `texts_of_rows`), role, text and characters (its length).
    texts_of_rows: for each row its (role, text) pairs, as `pieces_of` yields them.
    """
    pieces = [piece for texts_of_row in texts_of_rows for piece in texts_of_row]
    columns = {
        "row": np.repeat(np.arange(len(texts_of_rows)), [len(texts_of_row) for texts_of_row in texts_of_rows]),
        "role": pl.Series([role for role, _ in pieces], dtype=pl.String),
        "text": pl.Series([text for _, text in pieces], dtype=pl.String),
    }
    return pl.DataFrame(columns).with_columns(characters=pl.col("text").str.len_chars())


def message_frame(conversations: Sequence[Conversation]) -> pl.DataFrame:
    """Return a frame with one row per message: row (index of the conversation), role, content, calls (number),
    has_reasoning.
    """
    messages = [message for conversation in conversations for message in conversation.messages]
    columns = {
        "row": np.repeat(np.arange(len(conversations)), [len(each.messages) for each in conversations]),
        "role": pl.Series([message.role for message in messages], dtype=pl.String),
        "content": pl.Series([message.content for message in messages], dtype=pl.String),
        "calls": pl.Series([len(message.tool_calls) for message in messages], dtype=pl.Int64),
        "has_reasoning": pl.Series([bool(message.reasoning_content) for message in messages], dtype=pl.Boolean),
    }
    return pl.DataFrame(columns)


def pieces_of(row: Row) -> Iterator[tuple[str, str]]:
    """Yield the texts of a row in order, as (role, text). The text of a document row is split at the marks between
    documents, with the role "document". A message's text is its reasoning followed by its content; messages without
    either are omitted. Of a pair, the messages of the shared prompt come once, then each reply as one text, with the
    roles "chosen" and "rejected".
    """
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


# --- counting


def set_aside(tally: Tally, line: Line, bad: BadRow, file: str) -> None:
    """Count a row that is left out, by reason; the first NUM_EXAMPLES of each reason become examples, with the path
    `file`.
    """
    tally.sums["rows"] += 1
    tally.counters["left_out"][bad.reason] += 1
    examples = tally.examples.setdefault(bad.reason, [])
    if len(examples) < NUM_EXAMPLES:
        raw = line.raw[:RAW_SHOWN].decode("utf-8", errors="replace")
        examples.append({"file": file, "line": line.number, "detail": bad.detail, "raw": raw})


def count_rows(
    tally: Tally, rows: Sequence[Row], raws: Sequence[bytes], *, most_signed: int = ROWS_FOR_NEAR
) -> np.ndarray:
    """Count the texts of a batch of valid rows in `tally`. Return the number of characters of each row, int64 [rows].
    raws: the jsonl line of each row, to count bytes and control strings; empty if the rows were not read from a file.
    most_signed: MinHash signatures, which find near duplicates, are computed until the tally has this many.
    """
    tally.sums.update({"rows": len(rows), "kept": len(rows), "bytes": sum(map(len, raws))})
    for row, raw in zip(rows, raws, strict=False):
        if strings := control_strings(raw, row):
            tally.counters["control_strings"].update(strings)
            tally.sums["rows_with_control"] += 1
    texts_of_rows = [list(pieces_of(row)) for row in rows]
    pieces = text_frame(texts_of_rows)
    lengths = np.bincount(pieces["row"], weights=pieces["characters"], minlength=len(rows)).astype(np.int64)
    tally.count("characters", pl.DataFrame({"characters": lengths}), value=pl.col("characters"))
    whole = ["".join([text for _, text in texts_of_row]) for texts_of_row in texts_of_rows]
    _count_scripts(tally, whole, lengths, most_signed)
    _count_pieces(tally, pieces, texts_of_rows)
    conversations = [
        row if isinstance(row, Conversation) else row.chosen for row in rows if not isinstance(row, Document)
    ]
    if conversations:
        _count_conversations(tally, conversations)
    if pairs := [row for row in rows if isinstance(row, Pair)]:
        _count_pairs(tally, pairs)
    return lengths


def _count_scripts(tally: Tally, whole: Sequence[str], lengths: np.ndarray, most_signed: int) -> None:
    """Count characters by script and rows by language, and append the MinHash signatures of the rows, unless the tally
    has at least `most_signed`. whole: the text of each row. lengths: int64 [rows], its characters.
    """
    points = code_points("".join(whole))
    counts = count_scripts(scripts_of(points), lengths)
    tally.add("scripts", counts.sum(axis=0))
    tally.add("languages", np.bincount(languages_of(counts, whole), minlength=len(LANGUAGES)))
    if tally.sums["signed"] < most_signed:
        hashes, text = shingles(points, lengths)
        tally.columns["signatures"].append(signatures(hashes, text, len(whole)))
        tally.sums["signed"] += len(whole)


def _count_pieces(tally: Tally, pieces: pl.DataFrame, texts_of_rows: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Count characters by role and by turn, count openings (the first OPENING characters of a document or answer), and
    append a hash of each row's roles and texts, which finds exact duplicates. pieces: `text_frame(texts_of_rows)`.
    """
    tally.count("characters by role", pieces, key=pl.col("role"), value=pl.col("characters"))
    number = pl.int_range(1, pl.len() + 1).over("row").clip(upper_bound=NUM_TURNS)
    answers = pieces.filter(pl.col("role") == "assistant").with_columns(turn=number)
    tally.count("characters by turn", answers, key=pl.col("turn"), value=pl.col("characters"))
    openings = [
        " ".join(text[: 2 * OPENING].split())[:OPENING]
        for texts_of_row in texts_of_rows
        for role, text in texts_of_row
        if role in _ANSWERS
    ]
    tally.count("opening", pl.DataFrame({"opening": openings}, {"opening": pl.String}), key=pl.col("opening"))
    joined = ["\0".join([word for piece in texts_of_row for word in piece]) for texts_of_row in texts_of_rows]
    tally.columns["hashes"].append(pl.Series(joined, dtype=pl.String).hash().to_numpy())


def _count_conversations(tally: Tally, conversations: Sequence[Conversation]) -> None:
    """Count turns, system prompts, tools, tool calls and reasoning. conversations: one per row, of pairs the chosen
    side.
    """
    messages = message_frame(conversations)
    users = (pl.col("role") == "user").sum()
    tally.count("turns", messages.group_by("row").agg(turns=users), value=pl.col("turns"))
    content = pl.col("content")
    systems = messages.filter(pl.col("role") == "system").filter(content.str.strip_chars() != "")
    tally.count("system", systems, key=content.str.slice(0, 200))
    tools = [name for conversation in conversations for name in map(_tool_name, conversation.tools)]
    tally.count("tool", pl.DataFrame({"name": tools}, {"name": pl.String}), key=pl.col("name"))
    tally.sums.update(
        {
            "rows_with_system": systems["row"].n_unique(),
            "rows_with_tools": sum(bool(conversation.tools) for conversation in conversations),
            "calls": int(messages["calls"].sum()),
            "reasoning": int(messages["has_reasoning"].sum()),
        }
    )


def _tool_name(tool: JsonObject) -> str:
    """Return the name, up to 80 characters, in {"function": {"name": …}} or {"name": …}; "None" if there is none."""
    function = tool.get("function")
    return str(function.get("name") if isinstance(function, dict) else tool.get("name"))[:80]


def _count_pairs(tally: Tally, pairs: Sequence[Pair]) -> None:
    """Count how the lengths (in characters) of the two replies of each pair differ, and how similar they are. The
    similarity is the Jaccard index of the runs of 8 characters of both replies, counted in 10 bins. The ratio chosen /
    rejected is counted as 2 log2(ratio), rounded, from -8 (1/16) to 8 (16).
    """
    sides = [_reply(side, pair.num_shared) for pair in pairs for side in (pair.chosen, pair.rejected)]
    lengths = np.fromiter(map(len, sides), np.int64, len(sides))
    hashes, text = shingles(code_points("".join(sides)), lengths)
    alike = jaccard(hashes, text, len(pairs))
    tally.add("likeness", np.bincount(np.minimum(alike * 10, 9).astype(np.int64), minlength=10))
    frame = pl.DataFrame({"chosen": lengths[::2], "rejected": lengths[1::2]})
    chosen, rejected = pl.col("chosen"), pl.col("rejected")
    longer = {
        "chosen": chosen > rejected,
        "rejected": chosen < rejected,
        "equal": chosen == rejected,
        "chosen by 3": chosen > LONGER_BY * rejected,
        "rejected by 3": rejected > LONGER_BY * chosen,
    }
    tally.counters["longer"].update(
        frame.select(**{key: is_so.sum() for key, is_so in longer.items()}).row(0, named=True)
    )
    tally.count("margin", frame, value=(chosen - rejected).abs())
    half_octaves = (2 * (chosen.clip(1) / rejected.clip(1)).log(2)).round().clip(-8, 8)
    tally.count("ratio", frame, value=half_octaves)


# --- repeated phrases


def repeated_phrases(whole: Sequence[str], number: int) -> list[JsonObject]:
    """Return at most `number` phrases that occur in several texts, the commonest first: [{"text", "count"}].

    A unit is a word, a number, or any other single character (such as a Chinese one). Candidates are all n-grams of
    GRAM_UNITS units that occur in at least two texts; `count` is the number of these texts. Overlapping n-grams of
    nearly equal counts are joined to one longer phrase. Memory: about 16 bytes per unit.
    """
    ids: dict[str, int] = {}
    stream: list[int] = []
    ends = []
    for text in whole:
        stream += [ids.setdefault(unit, len(ids)) for unit in _UNITS.findall(text)]
        ends.append(len(stream))
    lengths = np.diff(ends, prepend=0).astype(np.int64)
    hashes, text = shingles(np.array(stream, np.uint64), lengths)
    shortfall = np.minimum(lengths, GRAM - 1)  # the last units of each text, at which no n-gram begins
    at = np.arange(len(text)) + (np.cumsum(shortfall) - shortfall)[text]
    grams = pl.DataFrame({"gram": hashes, "text": text, "at": at}).filter(pl.col("gram").is_duplicated())
    often = grams.group_by("gram").agg(pl.col("at").min(), count=pl.col("text").n_unique()).filter(pl.col("count") >= 2)
    often = often.sort("count", "at", descending=[True, False]).head(40 * number)
    phrases = _join_grams(often.select("at", "count").rows(), stream, number)
    return [{"text": _original(whole, ends, begin, end), "count": count} for begin, end, count in phrases]


def _join_grams(grams: Sequence[tuple[int, int]], stream: Sequence[int], number: int) -> list[list[int]]:
    """Join n-grams to at most `number` phrases [begin, end, count], where begin and end (exclusive) index `stream`. An
    n-gram is joined to a phrase if their counts differ by at most 5 % and it lies inside the phrase or exceeds it by
    one unit at one end. An n-gram that shares a run of more than half its units with an earlier phrase is omitted.
    grams: (position in `stream`, count), by descending count. stream: the ids of the units of all texts.
    """
    phrases: list[list[int]] = []
    for at, count in grams:
        window = stream[at : at + GRAM_UNITS]
        for phrase in phrases:
            if abs(phrase[2] - count) <= 0.05 * phrase[2] and phrase[0] - 1 <= at <= phrase[1] - GRAM_UNITS + 1:
                phrase[0], phrase[1] = min(phrase[0], at), max(phrase[1], at + GRAM_UNITS)
                break
        else:
            if len(phrases) < number and not any(_overlap(stream[p[0] : p[1]], window) for p in phrases):
                phrases.append([at, at + GRAM_UNITS, count])
    return phrases


def _overlap(units: Sequence[int], window: Sequence[int], least: int = GRAM_UNITS // 2 + 1) -> bool:
    """Return whether a run of `least` consecutive units occurs in both."""
    runs = {tuple(window[i : i + least]) for i in range(len(window) - least + 1)}
    return any(tuple(units[i : i + least]) in runs for i in range(len(units) - least + 1))


def _original(whole: Sequence[str], ends: Sequence[int], begin: int, end: int) -> str:
    """Return the original text of the units of one text from `begin` to `end` (exclusive), cut to 300 characters.
    whole: the texts that were split into units. ends: the position in the stream of units at which each of them ends.
    """
    number = bisect_right(ends, begin)
    first = ends[number - 1] if number else 0
    spans = [match.span() for match in islice(_UNITS.finditer(whole[number]), begin - first, end - first)]
    return whole[number][spans[0][0] : spans[-1][1]][:300]
