"""Every format that rows come in gives the same rows; what cannot be read is named, with the command that helps."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import random
import sys
import tarfile
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from row_files import FLAT_FORMATS, FORMATS, array, arrow, jsonl, parquet, separated, write, zipped

from mmdata.encode.rows import BadRow, parse_row
from mmdata.errors import InputError, MMError, UsageError
from mmdata.io import lines, remote, tables
from mmdata.io.lines import format_of, iter_lines
from mmdata.io.options import ReadOptions
from mmdata.pack.inputs import plan

TEXTS = [
    "灯塔 and sea",
    'a "quoted", comma; semicolon\tand tab',
    "two\nlines\r\nand [brackets] {here}",
    "\\ \u2028 😀",
    "null",
    "7",
]
ROWS = [{"text": f"{text} {number}", "source": "a"} for number, text in enumerate(TEXTS * 3)]
TALKS: list[dict[str, Any]] = [
    {"conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": f'{n}: ":null,'}], "n": n}
    for n, text in enumerate(TEXTS * 2)
]


def rows_in(path: Path, **options: Any) -> list[Any]:
    found = list(iter_lines(path, options=ReadOptions(**options)))
    assert [line.number for line in found] == list(range(1, len(found) + 1))
    return [json.loads(line.raw) for line in found]


def refusal(path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        list(iter_lines(path, options=ReadOptions(**options)))
    assert str(path) in caught.value.message and caught.value.fix
    return caught.value


# --- formats


@pytest.mark.parametrize("name", [*FORMATS, *FLAT_FORMATS])
def test_every_format_gives_the_same_rows_whole_and_in_parts(tmp_path: Path, name: str) -> None:
    rows = ROWS if name in FLAT_FORMATS else [*ROWS[:4], *TALKS]
    path = write(tmp_path, name, rows)
    assert rows_in(path) == rows
    whole = list(iter_lines(path))
    for part_bytes in (1, 100, 300, 10**6):
        _, parts = plan([path], part_bytes)
        apart = [
            line for p in parts for line in iter_lines(path, p.begin, p.end, first_number=p.first_line, options=p.read)
        ]
        assert apart == whole
        assert (len(parts) == 1) == (part_bytes == 10**6)
        for part in parts:
            done = [
                part.bytes_done(line) for line in iter_lines(path, part.begin, part.end, first_number=part.first_line)
            ]
            assert done == sorted(done) and all(0 <= amount <= part.num_bytes for amount in done)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.jsonl", array(ROWS)),
        ("bom.jsonl", codecs.BOM_UTF8 + array(ROWS, 1)),
        ("lines.json", jsonl(ROWS)),
        ("lines.csv", jsonl(ROWS)),
        ("zipped.jsonl", gzip.compress(jsonl(ROWS))),
        ("table.jsonl", parquet(ROWS)),
        ("bom.csv", codecs.BOM_UTF8 + separated(ROWS)),
        ("several.json", array(ROWS[:5]) + b"\n" + array(ROWS[5:]) + b"\n[]"),
        ("each.jsonl", b"\n".join(array([row]) for row in ROWS)),
        ("comma.json", array(ROWS)[:-1] + b",\n]"),
        ("noname", array(ROWS)),
    ],
)
def test_the_content_decides_where_the_name_says_otherwise(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows_in(tmp_path / name) == ROWS


def test_lists_of_messages_are_rows_and_not_an_array_of_rows(tmp_path: Path) -> None:
    talks = [row["conversations"] for row in TALKS]
    path = tmp_path / "talks.jsonl"
    path.write_text("\n".join(json.dumps(talk) for talk in talks))
    assert rows_in(path) == talks
    path.write_text(json.dumps(talks))
    assert rows_in(path) == talks
    for odd in ([3, {"text": "a"}], [None, [], "a"]):
        for indent in (None, 1):
            (tmp_path / "odd.json").write_text(json.dumps(odd, indent=indent))
            assert rows_in(tmp_path / "odd.json") == odd
    path.write_text('[1, 2]\n["a"]\n{"text": "a"}\n')
    assert rows_in(path) == [[1, 2], ["a"], {"text": "a"}]
    path.write_text("[{}]\n" + json.dumps({"text": "a"}))  # a bad first row
    assert rows_in(path) == [[{}], {"text": "a"}]


@pytest.mark.parametrize("indent", [0, 2])
def test_lists_of_messages_over_several_lines_are_rows(
    tmp_path: Path, indent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks = [row["conversations"] for row in TALKS]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps(talks[0], indent=indent))
    assert rows_in(path) == talks[:1]
    path.write_bytes(codecs.BOM_UTF8 + "\n".join(json.dumps(talk, indent=indent) for talk in talks).encode())
    monkeypatch.setattr(lines, "BUFFER_BYTES", 50)
    assert rows_in(path) == talks
    _, parts = plan([path], 300)
    found = [line for p in parts for line in iter_lines(path, p.begin, p.end, first_number=p.first_line)]
    assert len(parts) > 2 and found == list(iter_lines(path))
    text = path.read_bytes()
    path.write_bytes(
        text.replace(b'"role": "user"', b'"role" "user"', 2).replace(b'"role" "user"', b'"role": "user"', 1)
    )
    kinds = [len(list(iter_lines(path))), sum(not lines._is_json(line.raw) for line in iter_lines(path))]
    assert kinds == [len(talks), 1]
    path.write_bytes(text[:-3])
    assert "damaged or cut off" in refusal(path).message
    path.write_bytes(text + b"\n{}")
    assert "text after the end" in refusal(path).message


@pytest.mark.parametrize("indent", [None, 2])
def test_bad_elements_of_an_array_are_rows_that_do_not_shift_the_others(tmp_path: Path, indent: int | None) -> None:
    good = json.dumps({"text": "a ] } , b"}, indent=indent)
    bad = ['{"text": 1 2}', '{"text" "a"}', "3", "null", '"a,b"', "[1, [2]]", '{"text": "\ttab"}', "{'a': [}}"]
    path = tmp_path / "rows.json"
    path.write_text(f"[{good}, " + ", ".join(f"{each}, {good}" for each in bad) + "]")
    raws = [line.raw.decode() for line in iter_lines(path)]
    assert raws[1::2] == bad and {json.loads(raw)["text"] for raw in raws[::2]} == {"a ] } , b"}
    assert not any("\n" in raw for raw in raws)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\[]{},:\n\r \u00e9灯'), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(JSON, min_size=1, max_size=8), indent=st.sampled_from([None, 0, 3]), data=st.data())
@examples(50)
def test_any_array_is_taken_apart_into_its_elements(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("array") / "rows.json"
    rows = [{"text": "first"}, *rows]
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=data.draw(st.booleans())))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BUFFER_BYTES", data.draw(st.integers(1, 30)))
        found = list(iter_lines(path))
    assert [json.loads(line.raw) for line in found] == rows
    content = path.read_bytes()
    for line in found:
        assert content[line.offset :].startswith(line.raw[:3].split()[0])
        (same,) = iter_lines(path, line.offset, line.offset + 1, first_number=line.number)
        assert same == line


def test_standard_input_may_be_an_array_or_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (array(ROWS), bz2.compress(array(ROWS, 1)), lzma.compress(jsonl(ROWS)), jsonl(ROWS)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
        assert rows_in(Path("-")) == ROWS
    for content in (parquet(ROWS), zipped(jsonl(ROWS), "a.jsonl")):
        pipe = io.BufferedReader(io.BytesIO(content))
        monkeypatch.setattr(pipe.raw, "seekable", lambda: False, raising=False)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        with pytest.raises(InputError):
            list(iter_lines(Path("-")))


# --- tables


def test_nulls_of_a_table_are_absent_keys_at_every_depth(tmp_path: Path) -> None:
    message = {
        "role": "user",
        "content": 'say ":null, and "a":null',
        "name": None,
        "tool": {"x": None, "y": {"z": None}},
    }
    row = {"first": None, "messages": [message, None], "empty": [], "last": None}
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet([row, {**row, "last": 'x":null', "first": "\\"}]))
    shared = {"role": "user", "content": message["content"], "tool": {"y": {}}}
    assert rows_in(path) == [
        {"messages": [shared, None], "empty": []},
        {"first": "\\", "messages": [shared, None], "empty": [], "last": 'x":null'},
    ]


@given(
    columns=st.dictionaries(
        st.text(st.sampled_from('ab"\\,:{ n'), min_size=1, max_size=4),
        st.lists(st.none() | st.text(st.sampled_from('a"\\,:{}null'), max_size=8), min_size=2, max_size=2),
        min_size=1,
        max_size=4,
    )
)
@examples(100)
def test_names_and_texts_of_a_table_survive_whatever_is_in_them(columns: dict[str, list[str | None]]) -> None:
    batch = pa.RecordBatch.from_pydict({name: pa.array(column, pa.string()) for name, column in columns.items()})
    found = [json.loads(raw) for raw in tables._json_rows(batch)]
    without = [{name: text for name, text in row.items() if text is not None} for row in batch.to_pylist()]
    assert [{name: text for name, text in row.items() if text is not None} for row in found] == without


MESSAGE = pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("n", pa.int64())])
ABSENT = object()
TYPES: list[tuple[Any, list[Any]]] = [  # a column, and its values as JSON has them
    (pa.array([0.1, None, float("nan")], pa.float32()), [0.1, ABSENT, ABSENT]),
    (pa.array([1e20, float("inf"), 0.1]), [1e20, ABSENT, 0.1]),
    (pa.array([2**64 - 1, None, 2**60], pa.uint64()), [2**64 - 1, ABSENT, 2**60]),
    (pa.array([True, False, None]), [True, False, ABSENT]),
    (pa.array([Decimal("1.50"), None, Decimal(2)]), ["1.50", ABSENT, "2.00"]),
    (pa.array([date(2026, 1, 2), None, None]), ["2026-01-02", ABSENT, ABSENT]),
    (pa.array(["灯".encode(), None, b""]), ["灯", ABSENT, ""]),
    (pa.array(["x", None, "y"]).dictionary_encode(), ["x", ABSENT, "y"]),
    (pa.array(["x", None, 'y"' * 20], pa.large_string()), ["x", ABSENT, 'y"' * 20]),
    (pa.nulls(3), [ABSENT, ABSENT, ABSENT]),
    (pa.array([[None], [], None], pa.list_(pa.null())), [[None], [], ABSENT]),
    (pa.array([["a", "b"], None, ["c", None]], pa.list_(pa.string(), 2)), [["a", "b"], ABSENT, ["c", None]]),
    (
        pa.array([[{"role": "user", "n": 1}, None], None, [{"role": None, "n": 2}]], pa.list_(MESSAGE)),
        [[{"role": "user", "n": 1}, None], ABSENT, [{"n": 2}]],
    ),
    (
        pa.array([[[{"role": "x"}], None], [None], [[None], []]], pa.large_list(pa.large_list(MESSAGE))),
        [[[{"role": "x"}], None], [None], [[None], []]],
    ),
    (pa.array([{}, None, {}], pa.struct([])), [{}, ABSENT, {}]),
    (pa.array([[("k", 1), ("j", None)], [], None], pa.map_(pa.string(), pa.int64())), [{"k": 1}, {}, ABSENT]),
    (pa.array([[("k", 1), ("k", 2)], [], None], pa.map_(pa.string(), pa.int32())), [[["k", 1], ["k", 2]], {}, ABSENT]),
    (
        pa.array([{"m": [("k", 1)]}, None, {"m": None}], pa.struct([("m", pa.map_(pa.string(), pa.int64()))])),
        [{"m": {"k": 1}}, ABSENT, {}],
    ),
]


@pytest.mark.parametrize(("column", "expected"), TYPES, ids=[str(column.type) for column, _ in TYPES])
def test_values_of_all_types_become_json(column: Any, expected: list[Any]) -> None:
    batch = pa.record_batch([column, pa.array(["0", "1", "2"])], names=["value", "row"])
    rows = [{"row": str(n)} if value is ABSENT else {"value": value, "row": str(n)} for n, value in enumerate(expected)]
    assert [json.loads(raw) for raw in tables._json_rows(batch)] == rows
    assert [json.loads(raw) for raw in tables._json_rows(batch.slice(1, 2))] == rows[1:]


def test_bytes_that_are_no_text_are_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"], "image": [b"\xff\xd8"]}), path)
    (line,) = iter_lines(path)
    with pytest.raises(BadRow, match="bad UTF-8"):
        parse_row(line.raw)


def test_a_row_group_larger_than_a_part_is_read_by_several(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    draw = random.Random(0)
    rows = [{"text": f"{number} {draw.random()}"} for number in range(5000)]
    for content in (parquet(rows), arrow(rows, pa.ipc.new_stream, 2000)):
        path.write_bytes(content)
        _, parts = plan([path], 20_000)
        assert len(parts) > 4 and [part.begin for part in parts[1:]] == [part.end for part in parts[:-1]]
        found = [line for p in parts for line in iter_lines(path, p.begin, p.end, first_number=p.first_line)]
        assert [json.loads(line.raw) for line in found] == rows
        assert [line.number for line in found] == list(range(1, 5001))


def test_the_parts_of_a_table_are_measured_as_json(tmp_path: Path) -> None:
    """Keys are stored once in a table, but read with each value."""
    path = tmp_path / "rows.parquet"
    messages = [{"role": role, "content": f"{role} {'says ' * 20}"} for role in ("user", "assistant")]
    for row in ({"conversations": messages * 3}, {"text": "says " * 99, "id": 7}):
        rows = [row | {"number": f"{number:09}"} for number in range(2000)]
        path.write_bytes(parquet(rows, row_group_size=500, use_dictionary=["number"]))
        (whole,) = tables.row_ranges(path, 2**30)
        assert 0.8 < whole.num_bytes / len(jsonl(rows)) < 1.2


def test_a_table_is_read_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(parquet([{"text": "x" * 1000 + str(number)} for number in range(3000)]))
    monkeypatch.setattr(tables, "BATCH_BYTES", 50_000)
    sizes = []
    real = tables._json_rows
    monkeypatch.setattr(tables, "_json_rows", lambda batch: sizes.append(batch.nbytes) or real(batch))
    assert len(rows_in(path)) == 3000
    assert max(sizes) < 70_000 and len(sizes) > 50


# --- csv and plain text


def test_cells_are_strings_and_empty_ones_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('instruction,input,output\n1,,"2\n3"\n"say ""hi""",  x,true\n\n')
    found = [{"instruction": "1", "output": "2\n3"}, {"instruction": 'say "hi"', "input": "  x", "output": "true"}]
    assert rows_in(path) == found
    path.write_bytes(b"text,n\n\xff,1\n" + b"ok,2\n" * 9)
    bad, good, *_ = (line.raw for line in iter_lines(path))
    assert parse_row(good).text == "ok"  # type: ignore[union-attr]
    with pytest.raises(BadRow, match="bad UTF-8"):
        parse_row(bad)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,n\na,1\nb\n", "line 3: 1 cells, its header names 2"),
        ("text,n\na,1\nb,c,2\n", "line 3: 3 cells, its header names 2"),
        ("text,text\na,b\n", "text twice"),
        ('text,n\n"a"b,1\n', "line 2"),
        ('text,n\n"never closed,1\nb,2\n', "line 3"),
    ],
)
def test_a_csv_that_is_no_table_is_refused_at_its_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    assert words in refusal(path).message


def test_a_csv_row_with_too_few_cells_is_told_of_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text;n\na;1\nb\n")
    assert refusal(path).fix.startswith("an empty cell needs its ';' too")
    path.write_text("text;n\na;1\nb;c;2\n")
    assert refusal(path).fix.startswith("put cells")


def test_columns_without_a_name_are_named_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for content, row in (
        (",text\n0,a\n", {"column 1": "0", "text": "a"}),
        ("text,,\na,b,c\n", {"text": "a", "column 2": "b", "column 3": "c"}),
        ("text,,\na,,\n", {"text": "a"}),
    ):
        path.write_text(content)
        assert rows_in(path) == [row]


def test_plain_text_is_read_when_an_option_says_how(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(codecs.BOM_UTF8 + '第一行\r\n\n{second} "line"\n\xe9\n'.encode() + b"\xff\n")
    error = refusal(path)
    assert "plain text" in error.message and "--text line" in error.fix
    found = list(iter_lines(path, options=ReadOptions(text="line")))
    assert [line.number for line in found] == [1, 3, 4, 5]
    assert [json.loads(line.raw)["text"] for line in found[:3]] == ["第一行", '{second} "line"', "é"]
    with pytest.raises(BadRow, match="bad UTF-8"):
        parse_row(found[3].raw)
    path.write_bytes(b"one\r\ntwo\n\nthree")
    assert rows_in(path, text="file") == [{"text": "one\ntwo\n\nthree"}]
    path.write_bytes(b" \n ")
    assert rows_in(path, text="file") == []
    path = tmp_path / "notes"
    path.write_text("[1] a reference\n{a} set\n")
    assert rows_in(path, text="line") == [{"text": "[1] a reference"}, {"text": "{a} set"}]
    path = tmp_path / "rows.txt"
    path.write_bytes(jsonl(ROWS))
    assert rows_in(path) == rows_in(path, text="line") == ROWS


# --- encodings

CHINESE = "".join('{"text": "今天天气很好，我们去公园散步吧。"}\n' for _ in range(3))
FRENCH = "".join('{"text": "Le café était fermé à Noël, où êtes-vous allés ? Ça va très bien."}\n' for _ in range(3))
GERMAN = "".join('{"text": "Die Straße ist schön und größer als früher, „sagt“ er – Übermut."}\n' for _ in range(3))
TRADITIONAL = "".join('{"text": "今天天氣很好，我們去公園散步吧。燈塔在海邊。"}\n' for _ in range(5))
JAPANESE = "".join('{"text": "今日はとても良い天気ですね。散歩に行きましょう。カメラを持って。"}\n' for _ in range(3))
KOREAN = "".join('{"text": "오늘은 날씨가 매우 좋습니다. 산책하러 갑시다."}\n' for _ in range(3))
ONE_WORD = "".join(
    json.dumps({"text": f"{word} and harbour"}, ensure_ascii=False) + "\n" for word in ("海图", "rope", "bell") * 5
)
RUSSIAN = "".join('{"text": "Привет, как дела? Сегодня хорошая погода, и мы идём гулять в парк."}\n' for _ in range(3))


@pytest.mark.parametrize(
    ("text", "encoding", "fits", "iconv"),
    [
        ("CHINESE", "gbk", "gb18030", "GB18030"),
        ("CHINESE", "gb18030", "gb18030", "GB18030"),
        ("CHINESE", "utf-16", "utf-16", "UTF-16"),
        ("CHINESE", "utf-16-le", "utf_16_le", "UTF-16LE"),
        ("CHINESE", "utf-16-be", "utf_16_be", "UTF-16BE"),
        ("CHINESE", "utf-32", "utf-32", "UTF-32"),
        ("FRENCH", "latin-1", "cp1252", "CP1252"),
        ("GERMAN", "cp1252", "cp1252", "CP1252"),
        ("RUSSIAN", "cp1251", "cp1251", "CP1251"),
        ("JAPANESE", "shift_jis", "cp932", "SHIFT_JIS"),
        ("JAPANESE", "iso2022_jp", "iso2022_jp", "ISO-2022-JP"),
        ("TRADITIONAL", "big5", "big5", "BIG5"),
        ("JAPANESE", "euc_jp", "euc_jis_2004", "EUC-JP"),
        ("KOREAN", "euc_kr", "cp949", "EUC-KR"),
        ("ONE_WORD", "gbk", "gb18030", "GB18030"),
    ],
)
def test_another_encoding_is_named_with_the_command_that_converts_it(
    tmp_path: Path, text: str, encoding: str, fits: str, iconv: str
) -> None:
    path, text = tmp_path / "my rows.jsonl", globals()[text]
    for content, command in (
        (text.encode(encoding), f"iconv -f {iconv} -t UTF-8 '{path}' > 'my rows.utf8.jsonl'"),
        (gzip.compress(text.encode(encoding)), f"gzip -dc '{path}' | iconv -f {iconv} -t UTF-8 > "),
    ):
        path.write_bytes(content)
        error = refusal(path)
        assert f"fits {fits}" in error.message and f"--encoding {fits}" in error.fix and command in error.fix
        read: dict[str, Any] = {"encoding": encoding if encoding.startswith("utf") else fits}
        assert rows_in(path, **read) == [json.loads(line) for line in text.splitlines()]
        assert not format_of(path, ReadOptions(**read)).is_plain


@pytest.mark.parametrize(
    ("text", "encoding", "fits"),
    [
        ("CHINESE", "gbk", "gb18030"),
        ("TRADITIONAL", "big5", "big5"),
        ("JAPANESE", "shift_jis", "cp932"),
        ("FRENCH", "latin-1", "cp1252"),
        ("KOREAN", "euc_kr", "cp949"),
    ],
)
def test_an_encoding_guessed_from_little_text_is_called_a_guess(
    tmp_path: Path, text: str, encoding: str, fits: str
) -> None:
    path, line = tmp_path / "rows.jsonl", globals()[text].partition("\n")[0] + "\n"
    for count, guess in ((1, ", as far as so little text shows: look at its rows"), (40, "")):
        path.write_bytes((line * count).encode(encoding))
        assert refusal(path).message == f"{path} is not UTF-8: it fits {fits}{guess}"
    for utf_16, known in (("utf-16", "utf-16"), ("utf-16-le", "utf_16_le")):  # by its zeros, no guess
        path.write_bytes(line.encode(utf_16))
        assert refusal(path).message == f"{path} is not UTF-8: it fits {known}"


def test_every_text_format_is_read_in_another_encoding(tmp_path: Path) -> None:
    for name, content in (("rows.json", array(ROWS, 1)), ("rows.csv", separated(ROWS)), ("rows.jsonl", jsonl(ROWS))):
        (tmp_path / name).write_bytes(content.decode().encode("utf-16"))
        assert rows_in(tmp_path / name, encoding="utf-16") == ROWS
    (tmp_path / "rows.txt").write_bytes("灯\n塔\n".encode("gbk"))
    assert rows_in(tmp_path / "rows.txt", encoding="gbk", kind="document") == [{"text": "灯"}, {"text": "塔"}]
    assert rows_in(tmp_path / "rows.txt", encoding="gbk", text="line") == [{"text": "灯"}, {"text": "塔"}]


def test_utf8_with_a_few_damaged_lines_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = '{"text": "灯塔"}\n'.encode()
    path.write_bytes(good * 10 + b'{"text": "\xff\xfe"}\n' + good * 10)
    assert len(list(iter_lines(path))) == 21
    path.write_bytes(b'{"text": "plain"}\n' * 50 + b'{"text": "caf\xe9"}\n')
    assert len(list(iter_lines(path))) == 51
    path.write_bytes(('{"text": "' + "灯" * 30_000 + '"}\n').encode())  # the head ends inside a character
    assert len(list(iter_lines(path))) == 1


def test_a_wrong_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(CHINESE)
    assert "is UTF-8, not gb18030" in refusal(path, encoding="gb18030").message
    assert rows_in(path, encoding="utf8") == [json.loads(line) for line in CHINESE.splitlines()]
    path.write_text(FRENCH, encoding="latin-1")
    assert "cannot be read as utf-16" in refusal(path, encoding="utf-16").message
    for name in ("nonsense", "base64"):
        with pytest.raises(UsageError, match="unknown"):
            list(iter_lines(path, options=ReadOptions(encoding=name)))


@pytest.mark.parametrize(
    "content",
    [b'{"text": "a"}\n\0\0\0\n{"text": "b"}\n', b'{"text": "a"}\n' + bytes(4096), b'{"text": "a\0b"}\n' * 9],
)
def test_zero_bytes_are_no_encoding(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert refusal(path).message == f"{path} is a binary file, no text: byte {content.index(0) + 1} is zero"


# --- what is no rows


def tar_of(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "word", "fix"),
    [
        (zipped(b"{}", "a.jsonl", "b.jsonl", "c.jsonl", ".hidden"), "3 files (a.jsonl, b.jsonl, c.jsonl)", "unzip"),
        (
            zipped(b"{}", *(f"{n}.jsonl" for n in range(9))),
            "9 files (0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl, …)",
            "",
        ),
        (zipped(jsonl(ROWS), "a.jsonl")[:-30], "damaged", "download"),
        (tar_of(jsonl(ROWS)), "tar archive", "tar -xf"),
        (gzip.compress(tar_of(jsonl(ROWS))), "tar archive", "tar -xf"),
        (gzip.compress(parquet(ROWS)), "table", "gzip -dc"),
        (lzma.compress(jsonl(ROWS))[:-20], "cut off", "download"),
        (bz2.compress(jsonl(ROWS))[:-20], "cut off", "download"),
        (parquet(ROWS)[:-20], "cut off", "download"),
        (arrow(ROWS, pa.ipc.new_stream)[:-200], "cut off", "download"),
        (array(ROWS)[:-200], "the JSON array does not end after 13 rows", "download"),
        (array(ROWS) + b"\nand more", "text after the end of the JSON array", "jsonl"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer", "lfs pull"),
        (b"FEA1" + bytes(100), "Feather file of version 1", "polars"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "binary file", "parquet"),
        (json.dumps(ROWS[0], indent=2).encode(), "spread over several lines", "jq -c ."),
    ],
)
def test_what_cannot_be_read_is_named_with_what_helps(tmp_path: Path, content: bytes, word: str, fix: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    error = refusal(path)
    assert word in error.message and fix in error.fix


def test_columns_of_equal_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    assert "text twice" in refusal(path).message


@given(
    content=st.binary(max_size=200),
    start=st.sampled_from([b"", b"[{", b'{"', b"PK\x03\x04", b"PAR1", b"BZh91AY&SY", b"ARROW1"]),
)
@examples(200)
def test_no_content_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.csv"
    path.write_bytes(start + content)
    try:
        for line in iter_lines(path):
            assert isinstance(line.raw, bytes)
    except MMError as error:
        assert error.fix


def test_a_table_at_a_url_is_read_by_its_parts(tmp_path: Path) -> None:
    for name in ("groups.parquet", "stream.arrow", "pretty.json", "rows.zip"):
        path = remote.file_at(f"file://{write(tmp_path, name, ROWS)}")
        _, parts = plan([path], 100)
        found = [line for p in parts for line in iter_lines(path, p.begin, p.end, first_number=p.first_line)]
        assert [json.loads(line.raw) for line in found] == ROWS
