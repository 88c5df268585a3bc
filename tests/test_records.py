"""Typed JSON records (mmdata/io/records.py)."""

import json
import math
from pathlib import Path

import msgspec
import pytest

from mmdata.errors import DatasetError
from mmdata.io.records import decode_record, plain, read_record, write_record


class Inner(msgspec.Struct):
    rows: int
    name: str = "default"


class Outer(msgspec.Struct):
    by_length: dict[int, int]
    inners: list[Inner]
    loss: float = 0.0


def test_a_record_is_read_back_as_written_and_has_plain_keys(tmp_path: Path) -> None:
    record = Outer({512: 3}, [Inner(1, "雪")], math.inf)
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json", Outer, DatasetError, "") == record
    assert plain(record) == {"by_length": {"512": 3}, "inners": [{"rows": 1, "name": "雪"}], "loss": math.inf}
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        json.dumps(plain(record), ensure_ascii=False, indent=1) + "\n"
    )


def test_unknown_keys_are_ignored_and_missing_ones_take_their_defaults() -> None:
    old = decode_record(
        '{"by_length": {}, "inners": [{"rows": 1}], "from": "another version"}', Outer, "", DatasetError, ""
    )
    assert old == Outer({}, [Inner(1)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.json: not valid JSON"),
        ("\xff", "a.json: not valid JSON"),
        ("[]", "a.json: expected `object`, got `array`"),
        ('{"inners": []}', "a.json: object missing required field `by_length`"),
        ('{"by_length": {}, "inners": [{"rows": "1"}]}', "a.json: inners[0].rows: expected `int`, got `str`"),
        ('{"by_length": {"x": 1}, "inners": []}', "a.json: a key of by_length: expected `int`, got `str`"),
    ],
)
def test_a_wrong_record_names_file_and_field(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DatasetError) as caught:
        read_record(tmp_path / "a.json", Outer, DatasetError, "pack it again")
    assert message in caught.value.message and caught.value.fix == "pack it again"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.json: No such file"):
        read_record(tmp_path / "a.json", Outer, DatasetError, "")
