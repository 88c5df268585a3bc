"""Typed JSON records (mmdata/io/records.py)."""

import json
import math
import os
from pathlib import Path

import msgspec
import pytest

from mmdata.errors import DatasetError
from mmdata.io.records import decode_record, plain, read_record, sealed, write_record


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
        json.dumps(sealed(record), ensure_ascii=False, indent=1) + "\n"
    )


def test_a_record_edited_since_it_was_written_is_refused_and_one_without_a_hash_is_read(tmp_path: Path) -> None:
    path, record = tmp_path / "a.json", Outer({}, [Inner(1, "雪")])
    write_record(path, record)
    path.write_text(path.read_text().replace('"rows": 1', '"rows": 2'))
    with pytest.raises(DatasetError, match=r"a\.json: damaged or edited: its record_sha256 is"):
        read_record(path, Outer, DatasetError, "")
    path.write_text(json.dumps(plain(record)))
    assert read_record(path, Outer, DatasetError, "") == record


def test_only_regular_files_of_a_plausible_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(9 * 2**30)
    for name, message in (
        ("pipe", "not a regular file"),
        ("loop", "Too many levels of symbolic links"),
        ("sparse", "has 9,663,676,416 bytes, expected at most 536,870,912"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_record(tmp_path / name, Outer, DatasetError, "")


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
