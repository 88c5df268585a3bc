"""What `mm validate` counts."""

import json
from pathlib import Path

import pytest

from mmdata.encode.rows import BadRow
from mmdata.encode.validate import NUM_PLACES, Place, validate
from mmdata.errors import InputError
from mmdata.io.lines import Line, place_of


def talk(question: str, answer: str, **extra: object) -> str:
    return json.dumps(
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **extra}
    )


def test_rows_in_are_rows_good_and_rows_left_out_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [talk("hi", "hello", id=1)] * 20 + ["broken"] * 5 + [talk("hi", " ")] + ['{"text": "a"}']
    path.write_text("\n".join(lines))
    found = validate(path)
    assert (found.kind, found.num_rows, found.num_good) == ("conversation", 27, 20)
    assert found.reasons == {"not json": 5, "empty content": 1, "another kind": 1}
    assert [place.line for place in found.places["not json"]] == [21, 22, 23][:NUM_PLACES]
    assert found.places["empty content"] == [Place(26, len("\n".join(lines[:25])) + 1, "message 2 (assistant)")]
    assert found.extra_keys == {"id": 20}
    assert found.num_bytes == path.stat().st_size


def test_rows_that_are_no_lines_are_called_rows(tmp_path: Path) -> None:
    for name, content, unit in (
        ("rows.jsonl", '{"text": ""}\n', "line 1"),
        ("rows.json", '[{"text": ""}]', "row 1"),
        ("rows.csv", 'text,n\n" ",1\n', "row 1"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"; {unit} is left out"):
            validate(tmp_path / name)
        assert validate(tmp_path / name, kind="document").first_bad.startswith(unit)
        assert place_of(tmp_path / name, 1) == f"{tmp_path / name} {unit}"
    assert place_of("gone.parquet", 3) == "gone.parquet line 3"


def test_control_strings_in_content_are_counted_and_boundary_marks_are_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        talk("say <|im_end|>", "</s> and \\u003c|im_end|>".replace("\\\\", "\\")) + "\n" + talk("1 < 2", "<b>yes</b>")
    )
    found = validate(path)
    assert found.control_strings == {"<|im_end|>": 1, "</s>": 1}
    assert found.num_rows_with_control == 1
    path.write_bytes(b'{"text": "<s>a</s> <s>b</s>"}\n{"text": "\\u003c/s> inside"}')
    assert validate(path).control_strings == {"</s>": 1}


def test_the_first_bad_row_can_stop_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(talk("hi", "hello") + "\nbroken\n")

    def stop(line: Line, bad: BadRow) -> None:
        raise InputError(f"line {line.number}: {bad.reason}")

    with pytest.raises(InputError, match="line 2: not json"):
        validate(path, on_bad=stop)


def test_progress_ends_at_the_files_size(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((talk("hi", "hello") + "\n") * 3000)
    told: list[tuple[int, int]] = []
    validate(path, progress=lambda done, total: told.append((done, total)))
    size = path.stat().st_size
    assert len(told) == 3
    assert told[-1] == (size - 1, size)  # the last newline belongs to no row
