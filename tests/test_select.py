"""Rows chosen by conditions: those of a loop in Python, whole, in the asked order, and nothing is lost."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import zstandard
from command_line import Run, fine, refused
from pack_data import pack_with, write_rows
from test_frames import write

from mmdata.errors import InputError, UsageError
from mmdata.pack.filter.features import COLUMNS
from mmdata.pack.filter.select import Selection, select, sources_beside, write_selection
from mmdata.pack.filter.where import MOST_CHARACTERS, Where
from mmdata.pack.options import SelectOptions
from mmdata.pack.pipeline import PackResult
from mmdata.pack.repair import repair
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.stats.frames import rows
from mmdata.stats.stats import measure_file

Record = dict[str, Any]
CONDITIONS: dict[str, Callable[[Record], bool | None]] = {
    "characters > 100": lambda r: r["characters"] > 100,
    "characters between 20 and 60": lambda r: 20 <= r["characters"] <= 60,
    "not characters between 20 and 60": lambda r: not 20 <= r["characters"] <= 60,
    "language = 'Chinese'": lambda r: r["language"] == "Chinese",
    "language <> 'Chinese'": lambda r: r["language"] != "Chinese",
    "language in ('English', 'other')": lambda r: r["language"] in ("English", "other"),
    "language like 'E%'": lambda r: r["language"].startswith("E"),
    "upper(language) = 'ENGLISH'": lambda r: r["language"] == "English",
    "kind = 'conversation' and turns = 1": lambda r: r["kind"] == "conversation" and r["turns"] == 1,
    "turns >= 2 or characters < 30": lambda r: r["turns"] >= 2 or r["characters"] < 30,
    "(turns = 1 or turns = 3) and han < 0.2": lambda r: r["turns"] in (1, 3) and r["han"] < 0.2,
    "han > latin": lambda r: r["han"] > r["latin"],
    "han + kana > 0.25": lambda r: r["han"] + r["kana"] > 0.25,
    "punctuation = 0": lambda r: r["punctuation"] == 0,
    "repeated < 0.05": lambda r: r["repeated"] < 0.05,
    "tokens <= 60": lambda r: r["tokens"] <= 60,
    "tokens between 20 and 512 and repeated < 0.3": lambda r: 20 <= r["tokens"] <= 512 and r["repeated"] < 0.3,
    "trained_tokens > 0.5 * tokens": lambda r: r["trained_tokens"] > 0.5 * r["tokens"],
    "characters_per_token > 2.5": lambda r: r["characters_per_token"] > 2.5,
    "prompt_characters - answer_characters > 0": lambda r: r["prompt_characters"] > r["answer_characters"],
    "answer_characters - prompt_characters < -10": lambda r: r["answer_characters"] - r["prompt_characters"] < -10,
    "line % 7 = 3": lambda r: r["line"] % 7 == 3,
    "line < 5 or line > 90": lambda r: r["line"] < 5 or r["line"] > 90,
    "duplicate": lambda r: r["duplicate"],
    "not duplicate and not near_duplicate": lambda r: not r["duplicate"] and not r["near_duplicate"],
    "duplicate_group < 10": lambda r: r["duplicate_group"] < 10,
    "chosen_characters > 3": lambda r: None,
    "rejected_characters is null": lambda r: True,
    "case when has_tools then false else bytes > 200 end": lambda r: not r["has_tools"] and r["bytes"] > 200,
    "longest_line = characters": lambda r: r["longest_line"] == r["characters"],
    "has_system is not null and true": lambda r: True,
}


def chosen_lines(selection: Selection) -> list[int]:
    return selection.frame[selection.order]["line"].to_list()


def check_conditions(path: Path, tokenizer: Path) -> None:
    """Every condition, against a loop over the records of all rows."""
    records = rows(path, tokenizer=tokenizer).collect().to_dicts()
    for where, holds in CONDITIONS.items():
        found = select([path], SelectOptions(where=where, tokenizer=tokenizer))
        assert chosen_lines(found) == [record["line"] for record in records if holds(record)], where


def test_conditions_choose_what_a_loop_chooses(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "conversation", 150)
    with path.open("a") as file:
        file.write("not json\n" + "\n".join(path.read_text().splitlines()[:9]) + "\n")
    check_conditions(path, tokenizer_dir)
    records = rows(path).collect().to_dicts()
    mean = sum(record["characters"] for record in records) / len(records)
    found = select([path], SelectOptions(where="characters > avg(characters)"))
    assert chosen_lines(found) == [record["line"] for record in records if record["characters"] > mean]


@pytest.mark.slow
def test_conditions_choose_what_a_loop_chooses_of_5000_rows(tmp_path: Path, tokenizer_dir: Path) -> None:
    check_conditions(write_rows(tmp_path / "rows.jsonl", "conversation", 5000, seed=8), tokenizer_dir)


HOSTILE = [
    "1; drop", "1; drop table rows", "", " ", "*", "characters", "characters > 'x'", "foo(characters) > 1", "(characters > 1",
    "characters > 1)", "characters >", "select 1", "exists (select 1)", "characters > (select max(characters) from rows)",
    "null", "1", "charakters > 1", "rows.characters > 1", "characters.x > 1", "read_csv('/etc/passwd')", "\0", "'", "--", "$1",
    "duplicate + 1", "line > interval '1 day' + 'x'", "characters > 1 " * 1000, "(" * 900, "not " * 200 + "duplicate", "\ud83d\ude00",
    "characters between 20 and " * 11 + "5", "nullif(" * 40 + "line" + ", 1)" * 40 + " > 1", "least() = 1",
]  # fmt: skip


@pytest.mark.parametrize("where", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_condition_is_one_clear_error(where: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        Where(where)
    assert capfd.readouterr() == ("", "")
    assert len(caught.value.message) < 400 and "\n" not in caught.value.message and caught.value.fix


def test_an_unknown_column_lists_those_there_are() -> None:
    with pytest.raises(UsageError) as caught:
        Where("charakters > 1")
    assert all(name in caught.value.fix for name in COLUMNS)
    assert Where("characters > 1 or characters < 0 or line = 1").names == ("line", "characters")
    assert len("characters > 1 or " * 55 + "duplicate") <= MOST_CHARACTERS
    assert Where("characters > 1 or " * 55 + "duplicate").names == ("duplicate", "characters")


def read_lines(path: Path) -> list[bytes]:
    """The lines of a selection, whatever its format."""
    if path.suffix == ".parquet":
        return [row if isinstance(row, bytes) else row.encode() for row in pq.read_table(path)["row"].to_pylist()]
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if path.suffix == ".zst":
        content = zstandard.ZstdDecompressor().stream_reader(content).read()
    assert content.endswith(b"\n") or not content
    return content.split(b"\n")[:-1]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_line_is_in_one_of_both_files_as_it_was(tmp_path: Path, suffix: str) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", "conversation") for name in "ab"]
    with paths[0].open("ab") as file:
        file.write(b'\xff\n{"text": "x"}\r\n\n  \n{"conversations": [] }')
    lines = [line.rstrip(b"\r") for path in paths for line in path.read_bytes().split(b"\n") if line.strip()]
    for options in (
        SelectOptions(where="turns > 1"),
        SelectOptions(dedup="exact", shuffle=True),
        SelectOptions(sample="5"),
    ):
        selection = select(paths, options)
        out, rest = tmp_path / f"out{suffix}", tmp_path / f"rest{suffix}"
        write_selection(selection, out, rest)
        chosen, others = read_lines(out), read_lines(rest)
        assert Counter(chosen) + Counter(others) == Counter(lines) and chosen and others
        assert len(chosen) == len(selection.order)
        assert sum(selection.left_out().values()) == len(others)
        for path, found in ((out, chosen), (rest, others)):
            places = pl.read_parquet(path if suffix == ".parquet" else sources_beside(path))
            for name, number, line in zip(places["file"], places["line"], found, strict=True):
                assert Path(name).read_bytes().split(b"\n")[number - 1].rstrip(b"\r") == line


def test_a_parquet_file_of_a_selection_is_read_as_the_rows_it_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "conversation")
    write_selection(select([path], SelectOptions(where="line > 3", shuffle=True)), tmp_path / "out.parquet")
    again = select([tmp_path / "out.parquet"], SelectOptions())
    write_selection(again, tmp_path / "again.jsonl")
    assert read_lines(tmp_path / "again.jsonl") == read_lines(tmp_path / "out.parquet")
    assert again.left_out() == {}


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_workers_change_no_byte(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdata.pack.filter.select.PART_BYTES", 5000)
    paths = [write(tmp_path / f"{name}.jsonl", "conversation") for name in "ab"]
    written = []
    for workers in (1, 2):
        options = SelectOptions(where="turns > 1", dedup="near", sample="50%", shuffle=True, workers=workers)
        write_selection(select(paths, options), tmp_path / f"out{suffix}", tmp_path / "rest.jsonl")
        written.append(
            [(tmp_path / name).read_bytes() for name in (f"out{suffix}", "rest.jsonl", "rest.sources.parquet")]
        )
    assert written[0] == written[1]


def test_sample_sort_and_shuffle_are_seeded(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 200)
    every = rows(path).select("line", "characters").collect()
    by_length = every.sort("characters", maintain_order=True)["line"].to_list()
    assert chosen_lines(select([path], SelectOptions(sort="characters"))) == by_length
    falling = every.sort("characters", descending=True, maintain_order=True)["line"].to_list()
    assert chosen_lines(select([path], SelectOptions(sort="characters desc"))) == falling
    shuffled = chosen_lines(select([path], SelectOptions(shuffle=True)))
    assert sorted(shuffled) == list(range(1, 201)) and shuffled != sorted(shuffled)
    assert chosen_lines(select([path], SelectOptions(shuffle=True))) == shuffled
    assert chosen_lines(select([path], SelectOptions(shuffle=True, seed=1))) != shuffled
    for sample, number in (("7", 7), ("10%", 20), ("0.5", 100), ("1000", 200), ("0", 0), ("100%", 200)):
        drawn = chosen_lines(select([path], SelectOptions(sample=sample)))
        assert len(drawn) == number and drawn == sorted(drawn)
    for wrong in ("x", "-1", "1.5", "nan", "200%"):
        with pytest.raises(UsageError, match="--sample"):
            select([path], SelectOptions(sample=wrong))
    with pytest.raises(UsageError, match="two orders"):
        select([path], SelectOptions(sort="line", shuffle=True))
    with pytest.raises(UsageError, match="no column"):
        select([path], SelectOptions(sort="lime"))
    with pytest.raises(UsageError, match="tokenizer"):
        select([path], SelectOptions(where="tokens > 3"))


@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_duplicates_and_overlaps_are_those_that_packing_leaves_out(
    tmp_path: Path, tokenizer_dir: Path, dedup: str
) -> None:
    paths = [write_rows(tmp_path / f"{name}.jsonl", "document", 80, seed) for seed, name in enumerate("ab")]
    lines = paths[0].read_text().splitlines()
    paths[1].write_text(paths[1].read_text() + "\n".join([*lines[:9], lines[20].replace("tide", "tides", 1)]) + "\n")
    exam = tmp_path / "exam.jsonl"
    exam.write_text("\n".join(lines[40:43]) + "\n")
    where = "line > 3"
    found = select(paths, SelectOptions(where=where, dedup=dedup, exclude=(exam,)))
    settings = {"tokenizer": tokenizer_dir, "max_len": 256, "part_bytes": 4000, "dedup": dedup, "exclude": (exam,)}
    packed = pack_with(paths, tmp_path / "out", **settings, where=where, max_bad="0")
    kept = found.frame[found.order].select("file", "line").rows()
    assert sorted({(row["file"], row["line"]) for row in source_rows(open_dataset(packed.out))}) == kept
    assert found.left_out() == packed.left_out
    rejected = [json.loads(line) for each in packed.out.glob("rejected/*") for line in each.read_text().splitlines()]
    mine = found.frame.filter(pl.col("reason").is_not_null()).select("file", "line", "reason", "detail")
    assert sorted((r["file"], r["line"], r["reason"], r["detail"]) for r in rejected) == sorted(mine.rows())


def test_packing_with_a_condition_counts_and_repairs(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "conversation")
    options = {"tokenizer": tokenizer_dir, "max_len": 256, "part_bytes": 3000, "val_fraction": 0.1}
    where = "characters > avg(characters)"
    packed: PackResult = pack_with([path], tmp_path / "out", **options, where=where)
    expected = select([path], SelectOptions(where=where))
    assert packed.kept == len(expected.order) and packed.left_out == expected.left_out()
    assert packed.rows == packed.kept + sum(packed.left_out.values())
    shard = next(iter((tmp_path / "out/train").rglob("*.arrow")))
    before = shard.read_bytes()
    shard.unlink()
    assert repair(tmp_path / "out") == [str(shard.relative_to(tmp_path / "out"))] and shard.read_bytes() == before
    assert pack_with([path], tmp_path / "out", **options, where=where).up_to_date
    assert not pack_with([path], tmp_path / "out", **options, where="turns > 1").up_to_date
    with pytest.raises(InputError, match="not selected"):
        pack_with([path], tmp_path / "none", **options, where="turns > 100")
    with pytest.raises(UsageError, match="no column"):
        pack_with([path], tmp_path / "none", **options, where="turnz > 100")


def test_figures_with_a_condition_are_those_of_the_rows_it_selects(tmp_path: Path) -> None:
    path, chosen = write(tmp_path / "rows.jsonl", "pair"), tmp_path / "chosen.jsonl"
    where = "difference > 0"
    write_selection(select([path], SelectOptions(where=where)), chosen)
    some, whole = measure_file(path, where=where).figures, measure_file(chosen).figures
    same = (
        "kept",
        "characters",
        "bytes",
        "languages",
        "scripts",
        "turns",
        "pairs",
        "duplicates",
        "openings",
        "characters_by",
    )
    assert {name for name in same if some[name] != whole[name]} == set()
    assert some["rows"] == len(path.read_text().splitlines()) == some["kept"] + sum(some["left_out"].values())
    assert not any(warning["code"] == "left out" and "selected" in warning["text"] for warning in some["warnings"])


def test_the_command_writes_counts_and_refuses(home: Path, mm: Run) -> None:
    total = len((home / "data/sft_512.jsonl").read_text().splitlines())
    ran = fine(mm("select data/sft_512.jsonl --where 'line > 20' --out a.jsonl --rest b.jsonl --json"))
    found = json.loads(ran.out)
    assert found["rows"] == total == found["selected"] + sum(found["left_out"].values())
    assert found["conditions"] == {"line > 20": found["left_out"]["not selected"]}
    assert len(read_lines(home / "a.jsonl")) == found["selected"]
    assert (
        f"selected {found['selected']:,} of {total:,} rows"
        in fine(mm("select data/sft_512.jsonl --where 'line > 20'")).out
    )
    fine(mm("stats data/sft_512.jsonl --where 'line > 20'"))
    refused(mm("select data/sft_512.jsonl --where '1; drop'"), "--where")
    refused(mm("select data/sft_512.jsonl --out rows.csv"), ".jsonl", ".parquet")
    refused(mm("select data/sft_512.jsonl --out data/sft_512.jsonl"), "files to read")
    refused(mm("select data/sft_512.jsonl data/dpo.jsonl"), "dpo.jsonl")
    refused(mm("pack data/sft_512.jsonl --where 'tokenz > 1'"), "tokens")
