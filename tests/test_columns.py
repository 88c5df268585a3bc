"""Lines read straight into columns are what `parse_row` gives for them, line by line; every other line is left to it."""

import json
import sys
from pathlib import Path
from typing import Any

import eras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.encode.columns import ROLES, SPACE, Conversations, columns_of, read_lines
from mmdata.encode.encoder import EncodedRows, RowEncoder
from mmdata.encode.rows import BadRow, Conversation, Message, Pair, Row, num_characters, parse_row, row_hash
from mmdata.encode.sequences import is_equal
from mmdata.encode.validate import control_strings
from mmdata.tokenizer.encoders import choose

HERE = Path(__file__).resolve().parent
SPEC = [{"name": "add", "parameters": {"type": "object", "a": [1, 2.5]}}]
CALLS = [{"name": "add", "arguments": {"a": "é"}}]


def line(*messages: dict[str, Any], key: str = "conversations") -> bytes:
    return json.dumps({key: messages}, ensure_ascii=False).encode()


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, ANSWER = said("user", "hi"), said("assistant", "hello")
PLAIN = {
    "a turn": line(USER, ANSWER),
    "under messages": line(USER, ANSWER, key="messages"),
    "two turns after a system message": line(said("system", ""), USER, ANSWER, USER, ANSWER),
    "tools as a string": line(said("system", "s", tools=json.dumps(SPEC)), USER, ANSWER),
    "tools without a system message": line(said("user", "hi", tools=json.dumps(SPEC)), ANSWER),
    "no tools in a list": line(said("system", "s", tools="[]"), USER, ANSWER),
    "calls and their answers": line(
        USER, said("assistant", "", tool_calls=json.dumps(CALLS)), said("tool", ""), said("tool", "3"), ANSWER
    ),
    "reasoning": line(USER, said("assistant", "so", reasoning_content="why")),
    "fields that hold nothing": line(
        said("user", "hi", tools=None, tool_calls=""), said("assistant", "x", reasoning_content=None)
    ),
    "escapes": b'{"conversations": [{"role": "user", "content": "\\u0000\\ud83d\\ude00\\n"}, {"content": "b", "role": "assistant"}]}',
}


def rows_of(columns: Conversations) -> list[Row]:
    """The rows that columns hold."""
    contents = columns.contents.to_pylist()
    sides = []
    for row, (begin, count) in enumerate(zip(columns.begins.tolist(), columns.counts.tolist(), strict=True)):
        messages = [
            columns.extras.get(i) or Message(ROLES[columns.roles[i]], contents[i]) for i in range(begin, begin + count)
        ]
        sides.append(Conversation(tuple(messages), columns.tools[row].specs if row in columns.tools else ()))
    half = len(sides) // 2
    return [Pair(*both) for both in zip(sides[:half], sides[half:], strict=True)] if columns.is_pairs else [*sides]


def assert_as_parsed(raws: list[bytes], kind: str = "conversation") -> list[int]:
    """The indices of the plain lines; each of them is compared with `parse_row`."""
    at, columns = read_lines(raws, kind)
    rows = [parse_row(raws[i], kind) for i in at]
    assert rows_of(columns) == rows
    assert columns.hashes().tolist() == [list(row_hash(row)) for row in rows]
    assert columns.num_characters().tolist() == [num_characters(row) for row in rows]
    assert not any(control_strings(raws[i], row) for i, row in zip(at, rows, strict=True))
    pairs = [row for row in rows if isinstance(row, Pair)]
    assert not pairs or columns.num_shared.tolist() == [pair.num_shared for pair in pairs]
    return at.tolist()


@pytest.mark.parametrize("name", PLAIN)
def test_lines_of_minimind_and_the_like_are_plain(name: str) -> None:
    assert assert_as_parsed([PLAIN[name]]) == [0]


def test_all_the_hashes_of_a_batch_are_those_of_its_rows() -> None:
    raws = [raw for raw in PLAIN.values() if b'"messages"' not in raw]
    assert assert_as_parsed(raws * 3) == list(range(3 * len(raws)))
    rows = [parse_row(raw, "conversation") for raw in PLAIN.values()]
    columns = columns_of([row for row in rows if isinstance(row, Conversation)])
    assert columns.hashes().tolist() == [list(row_hash(row)) for row in rows]


@pytest.mark.parametrize(
    "raw",
    [
        PLAIN["a turn"] * 2, PLAIN["a turn"] + b" " + PLAIN["a turn"], PLAIN["a turn"] + b"x", b"  " + PLAIN["a turn"],
        line(USER, said("assistant", "</s>")), line(USER, said("assistant", "<|im_end|>")), line(USER, said("assistant", "无")),
        line(USER, said("assistant", " \u2003")), line(USER, said("assistant", 1)), line(USER, said("assistant", None)), line(USER),
        line(ANSWER, USER), line(USER, ANSWER, said("system", "x"), USER, ANSWER), line(USER, USER, ANSWER), line(), b"{}", b"[]",
        line(USER, said("assistant", "x", id=1)), line(USER, said("assistant", "x", tool_calls="{")), line(USER, said("assistant", "", tool_calls="[]")),
        line(USER, said("assistant", "x", tool_calls=CALLS)), line(said("user", "x", tool_calls=json.dumps(CALLS)), ANSWER),
        line(USER, said("assistant", "x", tools=json.dumps(SPEC))), line(said("system", "s", tools='[{"a": "\\u003c/s>"}]'), USER, ANSWER),
        line(said("system", "s", tools="3"), USER, ANSWER), line(USER, said("assistant", "x", reasoning_content="<s>")),
        line(USER, said("nobody", "x")), line(USER, said("tool", "x"), ANSWER), line(said("assistant", "x")),
        b'{"conversations": null}', b'{"conversations": [null]}', b'{"conversations": [{"role": "user", "content": NaN}]}',
        b'{"conversations": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        b'{"conversations": [], "conversations": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        *(b'{"conversations": [{"role": "user", "content": "%b"}, {"role": "assistant", "content": "c"}]}' % text
          for text in (b"\\ud800", b"\\udc00", b"\xff", b"\xed\xa0\x80", b"\x01", b"\t", b"\x00", b"\\x")),
    ],
)  # fmt: skip
def test_other_lines_are_left_to_parse_row_and_harm_no_neighbour(raw: bytes) -> None:
    many = [PLAIN["a turn"]] * 40
    assert [i for i in assert_as_parsed([*many, raw, *many]) if i < 20 or i > 60] == [*range(20), *range(61, 81)]
    assert 40 not in assert_as_parsed([*many, raw, *many])


def test_a_value_cannot_reach_into_the_next_line() -> None:
    two = PLAIN["a turn"] + PLAIN["a turn"]
    begin, end = b'{"conversations": [{"role": "user", "content": "a"}', b'{"role": "assistant", "content": "b"}]}'
    for raws in ([begin, end, two], [begin + b",", end, two], [two, begin, b"," + end], [begin, b"}", two]):
        assert assert_as_parsed(raws) == []


def test_no_bad_line_of_the_fixtures_is_plain() -> None:
    raws = [
        raw.split(b"\t", 2)[2]
        for raw in (HERE / "fixtures" / "left_out.tsv").read_bytes().splitlines()
        if raw[:1] != b"#"
    ]
    raws.sort(key=lambda raw: b'"messages"' in raw)
    assert_as_parsed(raws)
    for raw in raws:
        assert_as_parsed([raw])


def test_space_is_what_python_says() -> None:
    assert set(SPACE) == {chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()}


TEXT = st.text(max_size=6) | st.sampled_from(["<s>", "<|é|>", "无", "\n", "", "\\u003cs>", "</think>"])
FIELD = TEXT | st.none() | st.sampled_from([json.dumps(SPEC), json.dumps(CALLS), "[]", 3])
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, "user", "assistant", "human"]), "content": TEXT},
    optional={"tools": FIELD, "tool_calls": FIELD, "reasoning_content": FIELD, "name": TEXT},
)
ROW = st.lists(MESSAGE, max_size=4) | st.lists(TEXT.filter(str.strip), min_size=1, max_size=2).map(
    lambda texts: [said(role, text) for text in texts for role in ("user", "assistant")]
)


@examples(150)
@given(
    rows=st.lists(ROW, min_size=1, max_size=6), escapes=st.booleans(), cuts=st.lists(st.integers(0, 400), max_size=2)
)
def test_whatever_the_lines_hold_they_are_read_as_parse_row_does(
    rows: list[Any], escapes: bool, cuts: list[int]
) -> None:
    raws = [json.dumps({"conversations": row}, ensure_ascii=escapes).encode("utf-8", "surrogatepass") for row in rows]
    for cut in cuts:
        i = cut % len(raws)
        raws[i] = raws[i][: cut % len(raws[i])] + raws[i][cut % len(raws[i]) + 1 :]
    is_plain = set(assert_as_parsed(raws))
    for i, raw in enumerate(raws):
        try:
            parse_row(raw, "conversation")
        except BadRow:
            assert i not in is_plain


def assert_same(have: EncodedRows, want: EncodedRows) -> None:
    assert {i: str(bad) for i, bad in have.bad.items()} == {i: str(bad) for i, bad in want.bad.items()}
    assert is_equal(have.sequences, want.sequences) and have.num_sequences.tolist() == want.num_sequences.tolist()
    assert (have.num_tokens, have.cut, have.rows_cut) == (want.num_tokens, want.cut, want.rows_cut)
    assert np.array_equal(have.hashes, want.hashes) and np.array_equal(have.characters, want.characters)
    assert have.controls == want.controls


# ---- pairs


def pair_line(chosen: Any, rejected: Any, **more: Any) -> bytes:
    return json.dumps({"chosen": chosen, "rejected": rejected, **more}, ensure_ascii=False).encode()


def replies(*messages: dict[str, Any]) -> list[bytes]:
    """Pairs that share `messages`, and differ after them in one reply, in several turns, in reasoning or in a call."""
    yes, no = said("assistant", "yes"), said("assistant", "no")
    call = said("assistant", "", tool_calls=json.dumps(CALLS))
    return [
        pair_line([*messages, yes], [*messages, no]),
        pair_line([*messages, yes, USER, yes], [*messages, no]),
        pair_line([*messages, yes, USER, yes], [*messages, no, USER, yes]),
        pair_line([*messages, yes], [*messages, yes | {"reasoning_content": "so"}]),
        pair_line([*messages, call, said("tool", "3"), yes], [*messages, no]),
    ]


PLAIN_PAIRS = [*replies(USER), *replies(said("system", ""), USER, ANSWER, USER)]
TOOL_USER = said("user", "hi", tools=json.dumps(SPEC))
OTHER_PAIRS = [
    pair_line([USER, ANSWER], [USER, ANSWER]), pair_line([USER, ANSWER], [said("user", "ho"), ANSWER]),
    pair_line([USER, ANSWER], [USER, ANSWER, USER, ANSWER]), pair_line([TOOL_USER, ANSWER], [USER, said("assistant", "x")]),
    pair_line([USER, ANSWER], [USER]), pair_line([USER, ANSWER], []), pair_line([], []), pair_line(None, None),
    pair_line([USER, ANSWER], [USER, said("assistant", "x")], prompt="hi"), pair_line("yes", "no", prompt="hi"),
    pair_line([USER, ANSWER], [USER, said("assistant", "</s>")]), pair_line([ANSWER], [said("assistant", "x")], prompt=[USER]),
    b'{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}',
]  # fmt: skip


def test_pairs_that_share_their_first_messages_are_plain() -> None:
    assert assert_as_parsed(PLAIN_PAIRS, "pair") == list(range(len(PLAIN_PAIRS)))
    tools = pair_line([TOOL_USER, ANSWER], [TOOL_USER, said("assistant", "x")])
    swapped = b'{"rejected": %b, "chosen": %b}' % tuple(json.dumps([USER, said("assistant", x)]).encode() for x in "ab")
    assert assert_as_parsed([tools, swapped], "pair") == [0, 1]


@pytest.mark.parametrize("raw", OTHER_PAIRS)
def test_other_pairs_are_left_to_parse_row_and_harm_no_neighbour(raw: bytes) -> None:
    many = PLAIN_PAIRS * 4
    at = assert_as_parsed([*many, raw, *many], "pair")
    assert len(many) not in at and [i for i in at if i < 20 or i > 60] == [*range(20), *range(61, 81)]


@examples(100)
@given(rows=st.lists(st.tuples(ROW, ROW, ROW), min_size=1, max_size=5), escapes=st.booleans())
def test_whatever_pairs_hold_they_are_read_as_parse_row_does(rows: list[Any], escapes: bool) -> None:
    raws = [
        json.dumps({"chosen": shared + chosen, "rejected": shared + rejected}, ensure_ascii=escapes).encode()
        for shared, chosen, rejected in rows
    ]
    assert_as_parsed(raws, "pair")


# ---- lines to ids


LINES = {
    "conversation": [*PLAIN.values(), b"broken", line(USER, said("assistant", "</s>"))],
    "pair": [*PLAIN_PAIRS, *OTHER_PAIRS, pair_line([TOOL_USER, ANSWER], [TOOL_USER, said("assistant", "\nhello")])],
}


@pytest.mark.parametrize("kind", LINES)
@examples(60)
@given(
    data=st.data(),
    train_on=st.sampled_from(["assistant", "last", "all"]),
    name=st.sampled_from(["seed", "era2", "era3", "chatml", "llama3"]),
    max_len=st.sampled_from([12, 40, 999]),
)
def test_encoded_lines_are_those_of_the_reference(
    kind: str, data: st.DataObject, train_on: str, name: str, max_len: int
) -> None:
    raws = data.draw(st.lists(st.sampled_from(LINES[kind]), max_size=6))
    tokenizer = eras.tokenizer(name)
    options: Any = {"max_len": max_len, "train_on": train_on}
    fast = RowEncoder(tokenizer, encoder=choose(tokenizer), **options).encode_lines(raws, kind)
    slow = RowEncoder(tokenizer, is_reference=True, **options).encode_lines(raws, kind)
    assert_same(fast, slow)


def test_lines_too_large_for_a_column_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    raws = [PLAIN["a turn"], b"broken", PLAIN["calls and their answers"]]
    tokenizer = eras.tokenizer("era3")
    encoder = RowEncoder(tokenizer, max_len=999)
    whole = encoder.encode_lines(raws, "conversation")
    monkeypatch.setattr("mmdata.encode.encoder.MOST_BYTES", 10)
    monkeypatch.setattr("mmdata.encode.encoder.columns_of", None)
    alone = encoder.encode_lines(raws, "conversation")
    assert is_equal(whole.sequences, alone.sequences) and list(whole.bad) == list(alone.bad) == [1]
