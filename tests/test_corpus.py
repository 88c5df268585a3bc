"""Drawing text evenly over files and languages, the same way each time, within a limit."""

import json
from collections import Counter
from pathlib import Path

import pytest
import text_data

from mmdata.encode.rows import parse_row
from mmdata.errors import InputError, UsageError
from mmdata.tokenizer.toolkit.sample import PIECE, TextSample, draw, fields_of, water_level


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return list(text_data.make(tmp_path_factory.mktemp("corpus"), num_rows=400).values())


def texts(found: TextSample) -> list[str]:
    return [text for _, each in found.groups() for text in each]


def test_without_a_limit_every_text_is_drawn_once(files: list[Path]) -> None:
    found = draw(files, limit_bytes=10**9)
    expected = [
        text for path in files for line in path.read_bytes().splitlines() for _, text in fields_of(parse_row(line))
    ]
    assert sorted(texts(found)) == sorted(expected)
    assert found.drawn_bytes == sum(len(text.encode()) for text in expected)
    assert found.num_rows == 1200 and not found.left_out


def test_the_limit_is_shared_evenly_over_files_and_languages(files: list[Path]) -> None:
    everything = draw(files, limit_bytes=10**9)
    limit = everything.drawn_bytes // 4
    found = draw(files, limit_bytes=limit)
    assert 0.97 * limit < found.drawn_bytes <= limit
    level = max(stratum.drawn_bytes for stratum in found.strata)
    for part, whole in zip(found.strata, everything.strata, strict=True):
        assert part.found_bytes == whole.found_bytes == whole.drawn_bytes
        assert part.drawn_bytes == whole.found_bytes or part.drawn_bytes > level - 300  # one text short at most


def _sizes(corpus: TextSample) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for stratum in corpus.strata:
        sizes[stratum.language] += stratum.drawn_bytes
    return sizes


def _two_languages(root: Path, *, num_english: int) -> list[Path]:
    rows = [{"text": "今天天气很好我们去公园散步吧" * 2 + str(number)} for number in range(100)]
    rows += [
        {"text": f"The river and the garden of the people, number {number}, are small."}
        for number in range(num_english)
    ]
    return [text_data.write(root / "two.jsonl", rows)]


def test_the_smaller_language_counts_more_often_until_it_is_level(tmp_path: Path) -> None:
    files = _two_languages(tmp_path, num_english=300)
    plain, evened = draw(files, limit_bytes=10**6), draw(files, limit_bytes=10**6, evened=True)
    before, after = _sizes(plain), _sizes(evened)
    assert before["Chinese"] * 2 < before["English"] == after["English"]
    assert 0 <= after["English"] - after["Chinese"] < 200, "to within a text"
    assert {text for _, texts in plain.groups() for text in texts} == {
        text for _, texts in evened.groups() for text in texts
    }


def test_evening_out_stops_at_three_times_and_at_the_limit(tmp_path: Path) -> None:
    files = _two_languages(tmp_path, num_english=3000)
    before = _sizes(draw(files, limit_bytes=10**6))
    assert _sizes(draw(files, limit_bytes=10**6, evened=True))["Chinese"] == 3 * before["Chinese"]
    limit = sum(before.values()) + before["Chinese"] // 2
    after = draw(files, limit_bytes=limit, evened=True)
    assert limit - 200 < after.drawn_bytes <= limit


@pytest.mark.parametrize("weights", [{"Chinese": 1.0}, {"code": 2.0}])
def test_a_weight_for_a_language_leaves_all_as_they_come(tmp_path: Path, weights: dict[str, float]) -> None:
    files = _two_languages(tmp_path, num_english=300)
    assert _sizes(draw(files, limit_bytes=10**6, weights=weights, evened=True)) == _sizes(
        draw(files, limit_bytes=10**6)
    )


def test_one_language_alone_is_drawn_as_it_comes(tmp_path: Path) -> None:
    files = [text_data.write(tmp_path / "one.jsonl", [{"text": "今天天气很好我们去公园散步吧" * 2}] * 50)]
    assert _sizes(draw(files, limit_bytes=10**6, evened=True)) == _sizes(draw(files, limit_bytes=10**6))


def test_the_same_seed_draws_the_same_and_another_another(files: list[Path]) -> None:
    first, again, other = (draw(files, limit_bytes=9000, seed=seed) for seed in (1, 1, 2))
    assert texts(first) == texts(again) != texts(other)


def test_paring_on_the_way_draws_what_paring_at_the_end_draws(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays near the limit, and the result is the same."""
    paring = draw(files, limit_bytes=9000)
    monkeypatch.setattr("mmdata.tokenizer.toolkit.sample._SLACK", 1e9)
    assert texts(draw(files, limit_bytes=9000)) == texts(paring)


def test_draws_within_a_language_are_uniform(tmp_path: Path) -> None:
    """Every text has the same chance: the mean place of the texts drawn is the middle of the file."""
    path = text_data.write(tmp_path / "a.jsonl", [{"text": f"word number {n:05d}"} for n in range(1000)])
    places = [
        int(text.rpartition(" ")[2]) for seed in range(10) for text in texts(draw([path], limit_bytes=1700, seed=seed))
    ]
    # 1,000 draws of a uniform on 0..999: the mean's deviation is 289 / sqrt(1000) = 9
    assert len(places) == 1000 and abs(sum(places) / len(places) - 500) < 5 * 9


@pytest.mark.parametrize("name", ["system", "Chinese", "file"])
def test_a_weight_of_0_leaves_out_2_counts_twice(files: list[Path], name: str) -> None:
    chats = files[1]
    key = str(chats) if name == "file" else name

    def size(weights: dict[str, float]) -> int:
        return draw([chats, files[0]], limit_bytes=10**9, weights=weights).drawn_bytes

    once, none, twice = size({}), size({key: 0}), size({key: 2})
    assert none < once and twice - once == once - none
    half = size({key: 0.5})
    assert none < half < once


def test_weights_scale_a_files_claim(files: list[Path]) -> None:
    found = draw(files[:2], limit_bytes=6000, weights={str(files[0]): 3})
    sizes = {(Path(one.file).stem, one.language): one.drawn_bytes for one in found.strata}
    assert sizes["document", "English"] > 2 * sizes["conversation", "English"]


def test_releasing_empties_the_sample(files: list[Path]) -> None:
    found = draw(files, limit_bytes=5000)
    before = texts(found)
    assert sorted(found.release()) == sorted(before)
    assert texts(found) == []


def test_long_texts_are_cut_without_losing_a_character(tmp_path: Path) -> None:
    long = "".join(f"word {n}\n" for n in range(9000)) + "x" * 40_000
    path = text_data.write(tmp_path / "a.jsonl", [{"text": long}])
    pieces = texts(draw([path], limit_bytes=10**9))
    assert sorted("".join(pieces)) == sorted(long) and max(map(len, pieces)) <= PIECE
    assert sum(piece.endswith("\n") for piece in pieces) >= len(pieces) - 4


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good words"}\n{broken\n{"text": ""}\n')
    found = draw([path], limit_bytes=1000)
    assert found.left_out == {str(path): {"not json": 1, "empty content": 1}} and found.num_rows == 3
    path.write_text("{broken\n")
    with pytest.raises(InputError, match="no text can be used of 1 rows"):
        draw([path], limit_bytes=1000)


def test_every_field_of_a_row_has_its_name() -> None:
    call = {"name": "f", "arguments": {"x": "é"}}
    row = {
        "tools": [{"name": "f"}],
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [call]},
            {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "a"},
        ],
    }
    found = list(fields_of(parse_row(json.dumps(row).encode())))
    names = ["system", "user", "reasoning", "calls", "tool", "assistant", "tools"]
    assert [name for name, _ in found] == names
    assert found[3][1] == '{"name": "f", "arguments": {"x": "é"}}'
    pair = {"prompt": "p", "chosen": "c", "rejected": "d"}
    assert list(fields_of(parse_row(json.dumps(pair).encode()))) == [
        ("user", "p"),
        ("assistant", "c"),
        ("rejected", "d"),
    ]


@pytest.mark.parametrize("weights", [{"nobody": 1.0}, {"user": -1.0}, {"user": 1e9}])
def test_a_weight_that_cannot_be_is_refused(files: list[Path], weights: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="--weight"):
        draw(files, limit_bytes=1000, weights=weights)


@pytest.mark.parametrize(
    ("sizes", "limit", "level"),
    [
        ([(5, 1), (5, 1)], 20, float("inf")),
        ([(5, 1), (50, 1), (50, 1)], 45, 20),
        ([(50, 1), (50, 2)], 30, 10),
        ([(3, 3), (50, 1)], 10, 7),
    ],
)
def test_water_level(sizes: list[tuple[float, float]], limit: float, level: float) -> None:
    assert water_level(sizes, limit) == level
    assert sum(min(size, level * weight) for size, weight in sizes) <= limit
