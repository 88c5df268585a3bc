"""Lines in, rows or named reasons out."""

import gzip
import hashlib
import io
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.encode.columns import read_lines
from mmdata.encode.rows import (
    FEW_BAD_ROWS,
    HELP,
    OF_THE_RUN,
    REASONS,
    BadRow,
    Conversation,
    Document,
    Message,
    Pair,
    check_budget,
    find_kind,
    kind_of,
    parse_row,
    row_hash,
    split_documents,
    texts_of,
)
from mmdata.encode.rows.load import load as load_fast
from mmdata.encode.rows.load import load_strictly
from mmdata.errors import InputError
from mmdata.io.lines import format_of, iter_lines

HERE = Path(__file__).resolve().parent
LEFT_OUT = [
    line.split(b"\t", 2)
    for line in (HERE / "fixtures" / "left_out.tsv").read_bytes().splitlines()
    if not line.startswith(b"#")
]
ASK, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TALK = Conversation((Message("user", "hi"), Message("assistant", "hello")))


def parse(row: Any, kind: str | None = None) -> Any:
    return parse_row(json.dumps(row).encode(), kind)


@pytest.mark.parametrize(("reason", "where", "raw"), LEFT_OUT)
def test_every_bad_line_is_left_out_for_its_reason(reason: bytes, where: bytes, raw: bytes) -> None:
    if where not in (b"-", b"document"):
        parse_row(raw)  # good in itself: test_encode.py shows what a tokenizer makes of it
        return
    with pytest.raises(BadRow) as caught:
        parse_row(raw, None if where == b"-" else where.decode())
    assert caught.value.reason == reason.decode()


def test_the_fixture_has_a_line_for_every_reason() -> None:
    assert {reason.decode() for reason, _, _ in LEFT_OUT} == REASONS.keys()
    assert HELP.keys() > OF_THE_RUN


SAME_TALK = [
    {"conversations": [ASK, ANSWER]},
    {"messages": [ASK, ANSWER]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]},
    {"id": 7, "conversations": [ASK, {**ANSWER, "weight": 1}], "source": {"any": ["thing"]}},
]


@pytest.mark.parametrize("row", SAME_TALK)
def test_every_schema_of_a_conversation_gives_the_same_row(row: dict[str, Any]) -> None:
    assert parse(row) == TALK
    assert row_hash(parse(row)) == row_hash(TALK)


SAME_PAIR = [
    {"chosen": [ASK, ANSWER], "rejected": [ASK, {"role": "assistant", "content": "no"}]},
    {"prompt": "hi", "chosen": "hello", "rejected": "no"},
    {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "no"}]},
    {"prompt": "hi", "chosen": [ASK, ANSWER], "rejected": [ASK, {"role": "assistant", "content": "no"}]},
    {
        "conversations": [{"from": "human", "value": "hi"}],
        "chosen": {"from": "gpt", "value": "hello"},
        "rejected": {"from": "gpt", "value": "no"},
    },
]


@pytest.mark.parametrize("row", SAME_PAIR)
def test_every_schema_of_a_pair_gives_the_same_row(row: dict[str, Any]) -> None:
    assert parse(row) == Pair(TALK, Conversation((Message("user", "hi"), Message("assistant", "no"))))
    assert parse(row).num_shared == 1


def test_the_rows_that_the_documentation_shows_are_rows() -> None:
    blocks = (HERE.parent / "docs" / "data.md").read_text(encoding="utf-8").split("\n```")
    kinds: Counter[str] = Counter()
    for block in (block.partition("\n")[2] for block in blocks if block.partition("\n")[2].startswith("{")):
        text = block.replace("[…]", '[{"role": "assistant", "content": "no"}]').replace(
            "{…}", '{"from": "gpt", "value": "no"}'
        )
        while text.strip().startswith("{"):
            row, end = json.JSONDecoder().raw_decode(text.strip())
            kinds[kind_of(parse(row))] += 1
            text = text.strip()[end:].partition("\n")[2]
    assert kinds == {"document": 3, "conversation": 4, "pair": 4}


CALL = {"name": "add", "arguments": {"a": 1}}
TOOL = {"name": "add", "parameters": {}}


@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("as_string", [False, True])
@pytest.mark.parametrize("on_row", [False, True])
def test_tools_and_their_calls_may_be_strings_or_lists(key: str, as_string: bool, on_row: bool) -> None:
    def shape(value: Any) -> Any:
        return json.dumps(value) if as_string else value

    system = {"role": "system", "content": ""}
    calls = {"role": "assistant", "content": "", "tool_calls": shape([CALL])}
    row: dict[str, Any] = {"conversations": [system, ASK, calls, {"role": "tool", "content": "2"}, ANSWER]}
    (row if on_row else system)[key] = shape([TOOL])
    found = parse(row)
    assert found.tools == (TOOL,)
    assert found.messages[2].tool_calls == (CALL,)


def test_a_message_keeps_its_name_ids_and_weight() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {**ASK, "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {**ANSWER, "weight": 1.0, "train": True, "loss": None},
    ]
    found = parse({"messages": turns}).messages
    assert found[0] == Message("user", "hi", name="Ann")
    decoded = {**call, "function": {"name": "add", "arguments": {"a": 1}}}
    assert found[1] == Message("assistant", "", tool_calls=(decoded,), weight=0)
    assert found[2] == Message("tool", "2", name="add", tool_call_id="c1")
    assert found[3] == Message("assistant", "hello")


@pytest.mark.parametrize("arguments", ['{"a": 1}', '{ "a":1 }', {"a": 1}])
def test_arguments_are_the_same_as_text_and_as_an_object(arguments: Any) -> None:
    turns = [ASK, {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": arguments}]}]
    assert parse({"messages": turns}).messages[1].tool_calls == (CALL,)


def test_a_sharegpt_function_call_is_a_tool_call() -> None:
    turns = [("human", "hi"), ("function_call", json.dumps(CALL)), ("observation", "2"), ("gpt", "hello")]
    found = parse({"system": "be kind", "conversations": [{"from": who, "value": said} for who, said in turns]})
    assert [message.role for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2] == Message("assistant", "", None, (CALL,))


def test_a_system_message_may_stand_anywhere() -> None:
    system = {"role": "system", "content": "brief now"}
    assert len(parse({"conversations": [system, ASK, system, ANSWER, system, ASK, ANSWER]}).messages) == 7


def test_extra_keys_are_ignored_and_counted() -> None:
    extra: Counter[str] = Counter()
    parse_row(
        json.dumps({"id": 1, "conversations": [{**ASK, "id": 2, "name": "x"}, ANSWER]}).encode(), extra_keys=extra
    )
    assert extra == {"id": 2}


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "text": "b"}',
        '{"text" : "a", "text":"b"}',
        r'{"text": "a", "te\u0078t": "b"}',
        r'{"text": "\"a\": b", "text": "b", "x\\": 1}',
        '{"text": "b", "id": 1, "score": 0.5, "id": 2}',
        '{"text": "b", "meta": {"a": [{"b": 1, "b": null}]}}',
        '{"conversations": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}], "messages": []}',
        r'{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": '
        r'"[{\"name\": \"f\", \"arguments\": {\"x\": 1, \"x\": 2}}]"}]}',
    ],
)
def test_a_key_with_two_values_is_named(line: str) -> None:
    with pytest.raises(BadRow, match="repeated key"):
        parse_row(line.encode())
    at, _ = read_lines(40 * [line.encode()], "conversation")  # Arrow's reader refuses such a line, too
    assert not len(at) or "arguments" in line


def test_a_key_given_twice_with_one_value_loses_nothing() -> None:
    assert parse_row(b'{"text": "b", "text": "b"}') == Document("b")
    assert parse_row(b'{"text": "\\"a\\": b", "\\\\": 1}') == Document('"a": b')


def test_the_hash_tells_rows_apart_by_what_they_say() -> None:
    rows = [
        Document("hi"),
        TALK,
        Conversation(TALK.messages, (TOOL,)),
        Conversation((Message("system", ""), *TALK.messages)),
        Conversation((TALK.messages[0], Message("assistant", "hello", ""))),
        *(
            Conversation((TALK.messages[0], TALK.messages[1]._replace(**said)))
            for said in ({"name": "x"}, {"tool_call_id": "x"}, {"weight": 0})
        ),
        parse(SAME_PAIR[0]),
    ]
    assert len({row_hash(row) for row in rows}) == len(rows)
    assert row_hash(parse({"text": "hi"})) == row_hash(Document("hi"))


WRAPPED = {
    "<s>a</s> <s>b</s>": ["a", "b"],
    "<|im_start|>a<|im_end|>\n<|im_start|>b<|im_end|> ": ["a", "b"],
    "<s>a</s> <s>b": ["a", "b"],  # cut off by its author
    "<s>a</s> <s> </s>": ["a"],
    "<s>only one</s>": ["only one"],
    "the price was <s>10</s> 8": ["the price was <s>10</s> 8"],
    "<s>old</s> and new": ["<s>old</s> and new"],
    "<s>a <|im_end|> b</s>": ["a <|im_end|> b"],
    " plain ": [" plain "],
}


@pytest.mark.parametrize("text", WRAPPED)
def test_documents_are_split_at_their_own_marks_only(text: str) -> None:
    assert split_documents(text) == WRAPPED[text]


def test_texts_of_a_pair_name_the_prompt_once() -> None:
    assert list(texts_of(parse(SAME_PAIR[0]))) == ["hi", "hello", "no"]
    assert list(texts_of(Conversation(TALK.messages[:1], (TOOL,)))) == ["hi", json.dumps([TOOL])]


# ---- lines

TEXT = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "\xc3\xa9"}\n\xef\xbb\xbf{"text": "last"}'
LINES = [(1, 0, b'{"text": "a"}'), (4, 24, b'{"text": "\xc3\xa9"}'), (5, 39, b'{"text": "last"}')]


def compressed(how: str) -> bytes:
    if how == "zstd":
        import zstandard

        half = len(TEXT) // 2
        return zstandard.compress(TEXT[:half]) + zstandard.compress(TEXT[half:])
    return gzip.compress(TEXT) if how == "gzip" else TEXT


@pytest.mark.parametrize("how", ["plain", "gzip", "zstd"])
def test_lines_are_the_same_however_the_file_is_written(tmp_path: Path, how: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(compressed(how))
    assert [(line.number, line.offset, line.raw) for line in iter_lines(path)] == LINES
    assert format_of(path).is_lines == (how == "plain")


def test_standard_input_is_read_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(compressed("gzip")))))
    assert [(line.number, line.offset, line.raw) for line in iter_lines(Path("-"))] == LINES
    assert not format_of(Path("-")).is_lines


def test_byte_ranges_together_give_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXT)
    starts = [0, 18, 39, len(TEXT)]  # line starts
    numbers = [1, 2, 5]
    found = [
        (line.number, line.offset, line.raw)
        for number, begin, end in zip(numbers, starts, starts[1:], strict=False)
        for line in iter_lines(path, begin, end, first_number=number)
    ]
    assert found == LINES


@pytest.mark.parametrize("how", ["gzip", "zstd"])
def test_a_compressed_file_that_was_cut_off_is_an_error(tmp_path: Path, how: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(compressed(how)[:-4])
    with pytest.raises(InputError, match="cut off"):
        list(iter_lines(path))


def test_a_long_line_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 5_000_000 + b'"}\n{"text": "b"}')
    assert [len(parse_row(line.raw).text) for line in iter_lines(path)] == [5_000_000, 1]  # type: ignore[union-attr]


def test_an_answer_labelled_true_is_an_answer() -> None:
    row = {"prompt": "a", "completion": "b"}
    assert parse(row | {"label": True}) == parse(row)


def test_the_kind_is_told_from_the_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row in ({"text": "a"}, SAME_TALK[0], SAME_PAIR[0]):
        path.write_text("broken\n" + json.dumps(row))
        assert find_kind(path) == kind_of(parse(row))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("hello\nworld", "not json"),
        ('{"prompt": "a"}\n', "prompt only"),
        ('{"text": "a"}\n' + json.dumps(SAME_TALK[0]), "mixes kinds"),
    ],
)
def test_a_file_without_a_kind_is_an_error_that_says_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        find_kind(path)
    assert caught.value.fix


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    for read in (find_kind, format_of):
        with pytest.raises(InputError, match="No such file"):
            read(tmp_path / "none.jsonl")


def test_budgets_stop_a_run_whose_data_is_mostly_broken() -> None:
    check_budget({"not json": 5}, 100, 0.05)
    check_budget({"too long": 49, "not json": 1}, 100, 0.05)  # too long is no fault of the data
    with pytest.raises(InputError, match=r"6 of 100 rows cannot be used .*5 not json"):
        check_budget({"not json": 5, "empty content": 1}, 100, 0.05)
    with pytest.raises(InputError, match=r"2 of 100 rows: too long"):
        check_budget({"too long": 2}, 100, 0.05, {"too long": 0.01})
    with pytest.raises(InputError, match="empty content"):
        check_budget({"empty content": 1}, 100, 0.05, {"empty content": 0.0})
    check_budget({"not json": 50}, 100)  # by default few bad rows do not stop a run, unless they are most
    with pytest.raises(InputError, match=r"101 of 1,000 rows .*allowed: 5\.00%"):
        check_budget({"not json": 101}, 1_000)


@pytest.mark.parametrize("reason", ["too long", "template refuses", "not json", "no trained token"])
@pytest.mark.parametrize("num_rows", [1, 3, 7, 1000])
def test_more_than_half_of_the_rows_are_too_many_whatever_the_reason(reason: str, num_rows: int) -> None:
    most = num_rows // 2 + 1
    for max_bad in (None, 0.3, 0.5):
        with pytest.raises(InputError, match=f"{most:,} of {num_rows:,} rows cannot be used"):
            check_budget({reason: most}, num_rows, max_bad)
    check_budget({reason: most}, num_rows, 1.0)
    check_budget({reason: min(num_rows // 2, FEW_BAD_ROWS)}, num_rows)
    if reason in OF_THE_RUN:
        check_budget({reason: most}, num_rows, None, {reason: 1.0})


def test_rows_that_were_to_be_left_out_do_not_count_as_bad() -> None:
    check_budget({"duplicate": 90}, 100)
    check_budget({"another kind": 90}, 100, kind="pair")
    for counts, kind in (({"duplicate": 90, "too long": 6}, None), ({"another kind": 90, "not json": 6}, "pair")):
        with pytest.raises(InputError, match="6 of 10 rows"):
            check_budget(counts, 100, kind=kind)
    with pytest.raises(InputError, match=r"90 of 100 rows cannot be used .*another kind"):
        check_budget({"another kind": 90}, 100)


# ---- 10,000 corrupted lines

HOSTILE = [
    b"\x00", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\\udc00\\ud800", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"1e999",
    b"-Infinity", b"null", b"true", b'"text": 1,', b'"role": {},', b'"content": [],', b'"conversations": {},', b"\\u0000",
    b"<|im_end|>", b"</s>", b"\xef\xbb\xbf", b"\xf4\x8f\xbf\xbf", b"\\", b'"', b"}", b"]", b",", b"\r", b"\x1a", b"\xe2\x80\xa8",
]  # fmt: skip


def corrupted(rng: random.Random, line: bytes) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(line) + 1)
        match rng.randrange(5):
            case 0:
                line = line[:at]
            case 1:
                line = line[:at] + bytes([rng.randrange(256)]) + line[at + 1 :]
            case 2:
                line = line[:at] + rng.choice(HOSTILE) + line[at:]
            case 3:
                line = line[:at] + line[at + rng.randrange(20) :]
            case 4:
                line = line.replace(
                    *rng.choice([(b'"hi"', b"[1]"), (b"user", b"User"), (b":", b"::"), (b"content", b"role")])
                )
    return line.replace(b"\n", b" ")


def test_ten_thousand_corrupted_lines_are_rows_or_have_a_reason_and_harm_no_neighbour(tmp_path: Path) -> None:
    rng = random.Random(1)
    seeds = [json.dumps(row, ensure_ascii=False).encode() for row in [{"text": "héllo"}, *SAME_TALK, *SAME_PAIR]]
    lines = [corrupted(rng, rng.choice(seeds)) for _ in range(10_000)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(line + b'\n{"text": "good"}\n' for line in lines))
    reasons: Counter[str] = Counter()
    good = 0
    for line in iter_lines(path):
        if line.number % 2 == 0:
            assert parse_row(line.raw) == Document("good")
            good += 1
            continue
        try:
            row = parse_row(line.raw)
            assert len(row_hash(row)) == 32
            "".join(texts_of(row)).encode()
        except BadRow as bad:
            reasons[bad.reason] += 1
    assert good == 10_000
    assert 5_000 < reasons.total() < 10_000
    assert len(reasons) >= 9


# ---- orjson is asked first

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def both(raw: bytes) -> list[Any]:
    found = []
    for load in (load_fast, load_strictly):
        try:
            found.append(load(raw))
        except BadRow as bad:
            found.append(str(bad))
    return found


@examples(300)
@given(JSON, st.booleans())
def test_every_json_value_is_read_as_the_standard_library_reads_it(value: Any, is_ascii: bool) -> None:
    raw = json.dumps(value, ensure_ascii=is_ascii).encode("utf-8", errors="surrogatepass")
    fast, strict = both(raw)
    assert repr(fast) == repr(strict)  # 1 and 1.0 are equal, -0.0 and 0.0 too


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": 1e999}', b'{"a": -0}', b'{"a": 18446744073709551616}', b"\xef\xbb\xbf{}",
        b'{"a": "\xed\xa0\x80"}', b'{"a": "\\ud800"}', b'{"a": "\\ud83d\\ude00"}', b'{"a": "\x01"}', b"[" * 2000 + b"]" * 2000,
        b'{"a": ' + b"[" * 70 + b"1.5" + b"]" * 70 + b"}", b'{"a": 01}', b'{"a": 1}x', b'{"a": "\xff"}', b" {} ", b"", b'"x"',
    ],
)  # fmt: skip
def test_what_json_readers_disagree_on_keeps_its_verdict(raw: bytes) -> None:
    fast, strict = both(raw)
    assert repr(fast) == repr(strict)


@examples(200)
@given(st.text(), st.none() | st.text(), st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=2))
def test_the_hash_is_that_of_all_the_row_says_behind_lengths(
    said: str, thought: str | None, objects: list[dict]
) -> None:
    def counted(text: str) -> str:
        return f"{len(text.encode())}:{text}"

    row = Conversation((Message("user", said), Message("assistant", said, thought, tuple(objects))), tuple(objects))
    written = counted(json.dumps(objects, ensure_ascii=False, sort_keys=True))
    reasoning = "" if thought is None else f" reasoning {counted(thought)}"
    calls, tools = (f" {name} {written}" if objects else "" for name in ("calls", "tools"))
    want = f"conversation user {counted(said)}assistant {counted(said)}{reasoning}{calls}{tools}"
    assert row_hash(row) == hashlib.sha256(want.encode()).digest()
    assert row_hash(Document(said)) == hashlib.sha256(f"document {said}".encode()).digest()
    other = f"conversation user {counted(said)}"
    pair = f"pair {counted(want)}{other}"
    assert row_hash(Pair(row, Conversation(row.messages[:1]))) == hashlib.sha256(pair.encode()).digest()
