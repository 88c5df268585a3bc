"""Files with something odd in them, as programs and people write them: every row is read or counted, or one error says what helps."""

from pathlib import Path

import pytest
from row_files import zipped

from mmdata.encode.validate import validate
from mmdata.errors import InputError

READ: dict[str, tuple[bytes, int, dict[str, int]]] = {  # file: its content, rows that are read, those that are left out
    "bom, semicolons and line breaks in cells.csv": ('\ufeffprompt;completion\r\n"a; b";c\r\nd;"e\r\nf"\r\n'.encode(), 2, {}),
    "commas in a file with semicolons.csv": (b'prompt;completion\n"a, b, c";d\n', 1, {}),
    "columns without names.csv": (b"prompt;completion;;\r\na;b;;\r\n", 1, {}),
    "blank lines and a row of empty cells.csv": (b"prompt,completion\n\na,b\n\n,\nc,d\n", 2, {"unknown fields": 1}),
    "an index column.csv": (b",prompt,completion\n0,a,b\n1,c,d\n", 2, {}),
    "words for null and false.csv": (b"prompt,completion,label\na,b,NULL\nc,d,nan\ne,f,False\n", 2, {"unwanted answer": 1}),
    "labels of 0 and 1.csv": (b"prompt,completion,label\na,b,0\nc,d,1\n", 1, {"unwanted answer": 1}),
    "quotes inside cells.tsv": (b'prompt\tcompletion\nsay "a"\tb "c\nd\te\n', 2, {}),
    "carriage returns and empty lines.jsonl": (b'{"text":"a"}\r\n\r\n{"text":"b"}\r\n', 2, {}),
    "unicode line separators in strings.jsonl": ('{"text":"a\u2028b"}\n{"text":"c\x85d"}\n'.encode(), 2, {}),
    "a mark on every line.jsonl": (b'\xef\xbb\xbf{"text":"a"}\n\xef\xbb\xbf{"text":"b"}\n', 2, {}),
    "a null row.jsonl": (b'{"text":"a"}\nnull\n{"text":"b"}\n', 2, {"not an object": 1}),
    "a comment.jsonl": (b'// export\n{"text":"a"}\n{"text":"b"}\n', 2, {"not json": 1}),
    "a number that is none.jsonl": (b'{"text":"a","score":NaN}\n' + b'{"text":"b"}\n' * 30, 30, {"not json": 1}),
    "a cut line.jsonl": (b'{"text":"a"}\n{"text":"b', 1, {"not json": 1}),
    "figures beside the text.jsonl": (b'{"raw_content":"a b","quality_signals":{"n":1,"spans":[[0,1,2]]}}\n' * 2, 2, {}),
    "an array of lines.jsonl": (b'[\n{"text":"a"},\n{"text":"b"}\n]\n', 2, {}),
    "a comma before the end of the array.json": (b'[{"text":"a"},{"text":"b"},]', 2, {}),
    "two arrays.json": (b'[{"text":"a"}][{"text":"b"}]', 2, {}),
}  # fmt: skip
REFUSED: dict[str, tuple[bytes, str, str]] = {  # file: its content, words of the error, words of what helps
    "a line that names the separator.csv": (b"sep=;\r\nprompt;completion\r\na;b\r\n", "row 1 is left out: unknown fields; it has `sep=`", "--map"),
    "spaces in the header.csv": (b"prompt, completion\na, b\n", "it has `prompt` (a string), ` completion` (a string)", "answer"),
    "a header alone.csv": (b"prompt,completion\n", "is empty", ""),
    "utf-16.csv": ("prompt\tcompletion\r\na\tb\r\n".encode("utf-16"), "fits utf-16", "--encoding utf-16"),
    "carriage returns alone.jsonl": (b'{"text":"a"}\r{"text":"b"}\r', "not json: Extra data, at character 14", "jq -c . FILE"),
    "objects without line breaks.jsonl": (b'{"text":"a"}{"text":"b"}', "not json: Extra data, at character 13", "jq -c . FILE"),
    "a comma after every row.jsonl": (b'{"text":"a"},\n{"text":"b"},\n', "not json: Extra data, at character 13", ""),
    "rows over several lines.jsonl": (b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n', "spread over several lines", "jq -c . "),
    "an array that is cut.json": (b'[{"text":"a"},{"text":"b"}', "does not end after 1 rows", "download"),
    "rows inside an object.json": (b'{"data":[{"text":"a"}],"version":"1"}', "if the rows are inside: jq -c '.data[]' FILE", "--map"),
    "a row inside each row.jsonl": (b'{"row_idx":0,"row":{"text":"a"}}\n', "if the rows are inside: jq -c '.row' FILE", "--map"),
    "requests.jsonl": (b'{"custom_id":"r1","method":"POST","url":"/v1","body":{"messages":[]}}\n', "jq -c '.body' FILE", "--map"),
    "columns.json": (b'{"text":{"0":"a","1":"b"}}', "text: found an object, expected a string", "type"),
    "numbers that are none.jsonl": (b'{"text":"a","score":NaN}\n' * 3, "not json: NaN is not JSON", "JSON"),
    "events of a server.jsonl": (b'data: {"text":"a"}\n\ndata: [DONE]\n', "not json: Expecting value, at character 1", "JSON"),
    "a page.jsonl": (b"<!DOCTYPE html><html>Not Found</html>", "not json: Expecting value, at character 1", "JSON"),
    "blank lines alone.jsonl": (b"\n\n \n", "is empty", ""),
    "zeros at the end.jsonl": (b'{"text":"a"}\n' + bytes(50), "byte 14 is zero", "jsonl"),
    "two kinds.jsonl": (b'{"text":"a"}\n' * 5 + b'{"prompt":"b","completion":"c"}\n' * 5, "5 document, 5 conversation", "--kind document"),
    "a workbook.xlsx": (zipped(b"", "[Content_Types].xml", "xl/workbook.xml"), "is an Excel workbook", "csv"),
    "a database.db": (b"SQLite format 3\0" + bytes(50), "is a binary file", "jsonl"),
    "an object of Python.pkl": (b"\x80\x04\x95" + bytes(40), "is a binary file", "jsonl"),
    "text.md": (b"# a\n\nb\n", "is plain text", "--text line"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_row_of_an_odd_file_is_read_or_counted(name: str, tmp_path: Path) -> None:
    content, num_read, left_out = READ[name]
    (tmp_path / name).write_bytes(content)
    found = validate(tmp_path / name)
    assert (found.num_good, dict(found.reasons)) == (num_read, left_out)
    assert found.num_rows == num_read + sum(left_out.values())


@pytest.mark.parametrize("name", REFUSED)
def test_an_odd_file_that_is_refused_is_told_why_and_what_helps(name: str, tmp_path: Path) -> None:
    content, words, fix = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        validate(tmp_path / name)
    assert words in caught.value.message and fix in caught.value.fix
