"""--map and --kind, the keys that are ignored, and files of which most rows cannot be used, on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import row_files
import schema_rows
from command_line import Run, fine, refused
from msgspec import UNSET
from msgspec.structs import replace

from mmdata.pack.staging import PackKey
from mmdata.shards.manifest import DatasetHeader, read_manifest


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Ten questions with better and worse answers under names that no schema has."""
    rows = [{"ask": f"rope {i}?", "good": f"yes {i}", "bad": f"no {i}", "mood": "fair", "id": i} for i in range(10)]
    return write(tmp_path / "asked.jsonl", rows)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Twelve documents, eight conversations and four pairs."""
    conversations = [{"prompt": f"rope {i}?", "completion": f"sail {i}"} for i in range(8)]
    pairs = [{"prompt": f"rope {i}?", "chosen": f"sail {i}", "rejected": "no"} for i in range(4)]
    return write(tmp_path / "mixed.jsonl", [{"text": f"boat {i}"} for i in range(12)] + conversations + pairs)


MAP = "--map prompt=ask --map chosen=good --map rejected=bad"


def test_a_mapped_column_that_no_row_has_is_said(home: Path, mm: Run, asked: Path) -> None:
    said = "--map system=frame: no row has a value in this column"
    assert said in fine(mm(f"validate {asked} {MAP} --map system=frame")).out
    assert said in fine(mm(f"pack {asked} {MAP} --map system=frame --out shards/s --workers 2 --no-report")).err
    for command in ("stats", "stats --workers 2"):
        assert said in fine(mm(f"{command} {asked} {MAP} --map system=frame")).out
    figures = json.loads(fine(mm(f"stats {asked} {MAP} --map system=frame --json")).out)[str(asked)]
    assert figures["unused_columns"] == ["system=frame"]
    for command in ("validate", "stats"):
        assert "no row has a value" not in fine(mm(f"{command} {asked} {MAP} --map system=mood")).out


def test_a_place_in_a_table_is_a_row(home: Path, mm: Run, tmp_path: Path) -> None:
    """In figures of a file and of its dataset, and in the report's samples; a place in jsonl stays a line."""
    rows = [{"text": "boat"}] * 4 + [{"text": " "}, {"text": "rope"}]
    for name, unit in (("rows.parquet", "row"), ("pretty.json", "row"), ("rows.jsonl", "line")):
        path = row_files.write(tmp_path, name, rows)
        assert f"{path} {unit} 5" in fine(mm(f"stats {path} --html page.html")).out
        assert ('"unit":"row"' in Path("page.html").read_text()) == (unit == "row")
        fine(mm(f"pack {path} --out shards/{name} --no-report"))
        assert f"{path} {unit} 5" in fine(mm(f"stats shards/{name}")).out
        assert f"{unit} 5" in fine(mm(f"validate {path}")).out


def test_a_column_whose_name_has_spaces_is_quoted_in_the_next_command(home: Path, mm: Run) -> None:
    (home / "shop.csv").write_text("a question,an answer\n" + "hi,hello\n" * 20)
    flags = "--map 'prompt=a question' --map 'completion=an answer'"
    assert fine(mm(f"validate shop.csv {flags}")).err.endswith(f"next: mm pack shop.csv {flags}\n")
    assert f"next: mm stats shop.csv {flags} --html stats.html\n" in fine(mm(f"stats shop.csv {flags}")).err


def test_the_next_command_keeps_the_options(home: Path, mm: Run, tmp_path: Path) -> None:
    path = write(home / "some rows.jsonl", [{"text": "boat " * n} for n in range(1, 20)])
    tokenizer = (home / "data" / "tokenizer").rename(home / "tok")
    kept = f"'{path}' --kind document --tokenizer {tokenizer}"
    assert f"next: mm stats {kept} --exact --html stats.html\n" in fine(mm(f"stats {kept} --exact")).err
    ran = fine(mm(f"validate {kept} --max-bad 80%"))
    assert ran.err.endswith(f"next: mm pack {kept} --max-bad 80%\n")
    fine(mm(f"pack {kept} --out shards/some --max-len 32 --no-report"))
    assert fine(mm("show shards/some --split train --ids")).err.endswith("shards/some --split train --ids --index 1\n")
    assert fine(mm(f"select {kept}")).err.endswith(f"next: mm select {kept} --out FILE.jsonl\n")
    assert fine(mm(f"select {kept} --out chosen.jsonl")).err.endswith(
        f"next: mm pack chosen.jsonl --kind document --tokenizer {tokenizer}\n"
    )


def test_stats_of_a_file_of_which_most_rows_cannot_be_used_is_an_error(home: Path, mm: Run, tmp_path: Path) -> None:
    half = write(tmp_path / "half.jsonl", [{"text": "boat"}, {"text": ""}] * 4)
    most = write(tmp_path / "most.jsonl", [{"text": "boat"}, {"text": ""}, {"text": None}] * 4)
    fine(mm(f"stats {half}"))
    refused(mm(f"stats {most}"), "8 of 12 rows cannot be used")
    fine(mm(f"stats {most} --max-bad 70%"))
    refused(mm(f"stats {half} --max-bad '90%,empty content=0'"), "4 of 8 rows: empty content")


def test_a_mapping_is_recorded_and_decides_what_is_up_to_date(home: Path, mm: Run, asked: Path) -> None:
    told = refused(
        mm(f"pack {asked} --out shards/asked"), "asked.jsonl: none of its first 10 rows", "line 1", "`ask` (a string)"
    ).err
    assert "--map" in told
    refused(mm(f"validate {asked} --map chosen=Good"), "fix: --map chosen=Good: no row has a value in this column")
    packed = fine(mm(f"pack {asked} --out shards/asked {MAP} --workers 1 --no-report"))
    assert "kept 10 of 10 rows" in packed.out
    assert "keys ignored: mood (10)\nmetadata ignored: id (10)\n" in packed.out
    manifest = read_manifest(home / "shards/asked")
    assert manifest.arguments.map == {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert manifest.totals.extra_keys == {"id": 10, "mood": 10}
    header = DatasetHeader(**{name: getattr(manifest, name) for name in DatasetHeader.__struct_fields__})
    unmapped = replace(header, arguments=replace(header.arguments, map=UNSET))
    assert "--map was " in " ".join(PackKey.of(header).differences(PackKey.of(unmapped)))
    assert "up to date" in fine(mm(f"pack {asked} --out shards/asked {MAP} --no-report")).out
    swapped = fine(
        mm(f"pack {asked} --out shards/asked --map prompt=ask --map chosen=bad --map rejected=good --no-report")
    )
    assert "kept 10" in swapped.out and read_manifest(home / "shards/asked").dataset_digest != manifest.dataset_digest
    shard = next((home / "shards/asked/train").rglob("*.arrow"))
    content = shard.read_bytes()
    shard.write_bytes(b"damaged")
    fine(mm("verify shards/asked --repair"))
    assert shard.read_bytes() == content
    shown = json.loads(fine(mm("stats shards/asked --json")).out)["shards/asked"]
    assert shown["extra_keys"] == {"id": 10, "mood": 10} and shown["kept"] == 10


def test_without_the_options_the_manifest_does_not_name_them(home: Path, mm: Run, mixed: Path) -> None:
    fine(mm("pack data/sft_512.jsonl --no-report"))
    arguments = json.loads((home / "shards/sft_512/manifest.json").read_text())["arguments"]
    assert not {"kind", "map"} & arguments.keys()


@pytest.mark.parametrize(("kind", "kept"), [("document", 12), ("conversation", 8), ("pair", 4)])
def test_one_kind_of_a_mixed_file_is_taken_and_the_others_counted(
    home: Path, mm: Run, mixed: Path, kind: str, kept: int
) -> None:
    refused(mm(f"validate {mixed}"), "mixes kinds", "--kind document")
    line = fine(mm(f"validate {mixed} --kind {kind}")).out
    assert f"24 rows, kind {kind}; {kept} good, {24 - kept} cannot be used" in line and "another kind" in line
    packed = fine(mm(f"pack {mixed} --out shards/mixed --kind {kind} --on-bad fail --no-report"))
    assert f"kept {kept} of 24 rows; left out {24 - kept} ({24 - kept} another kind)" in packed.out
    assert read_manifest(home / "shards/mixed").arguments.kind == kind
    figures = json.loads(fine(mm(f"stats {mixed} --kind {kind} --json")).out)[str(mixed)]
    assert (figures["kind"], figures["kept"], figures["left_out"]) == (kind, kept, {"another kind": 24 - kept})
    shown = fine(mm(f"show {mixed} --kind {kind} --index 0")).out
    assert ("boat 0" in shown and "another kind" not in shown) == (kind == "document")
    refused(mm("validate data/sft_512.jsonl --kind pair"), "no row can be used", "another kind: found a conversation")
    refused(mm(f"pack {mixed} --kind pairs"), "--kind pairs is unknown")


def test_show_and_stats_read_by_the_mapping_too(home: Path, mm: Run, asked: Path) -> None:
    shown = fine(mm(f"show {asked} {MAP} --index 3")).out
    assert "rope 3?" in shown and "yes 3" in shown and "keys ignored: mood (1)" in shown
    figures = json.loads(fine(mm(f"stats {asked} {MAP} --json")).out)[str(asked)]
    assert (figures["kind"], figures["kept"], figures["extra_keys"]) == ("pair", 10, {"mood": 10, "id": 10})
    printed = fine(mm(f"stats {asked} {MAP}")).out
    assert "Keys of rows that are ignored" in printed and "mood" in printed
    told = fine(mm(f"validate {asked} {MAP}")).out
    assert "mood (10)" in told and "metadata ignored: id (10)" in told
    refused(mm(f"stats {asked} --map prompt:ask"), "--map prompt:ask is not FIELD=COLUMN")


@pytest.mark.parametrize(
    "kind", ["conversation", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pair", "document"))]
)
def test_validate_pack_and_stats_count_the_same(home: Path, mm: Run, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"".join(one.raw + b"\n" for one in schema_rows.rows(100, 5)))
    options = f"{path} --kind {kind} --tokenizer data/tokenizer --max-bad 100% --json"
    (validated,) = json.loads(fine(mm(f"validate {options}")).out)
    (packed,) = json.loads(fine(mm(f"pack {options} --out shards/mixed --no-report --max-len 4096")).out)
    stats = json.loads(fine(mm(f"stats {options}")).out)[str(path)]
    stored = json.loads(fine(mm("stats shards/mixed --json")).out)["shards/mixed"]
    assert len(packed["left_out"]) > 2 and packed["extra_keys"]
    assert packed["left_out"] == validated["reasons"] == stats["left_out"] == stored["left_out"]
    assert packed["not_written"] == validated["not_written"] == stats.get("not_written", {})
    assert packed["extra_keys"] == validated["extra_keys"]
    assert stats["extra_keys"].items() <= packed["extra_keys"].items()


def test_stats_and_validate_say_what_a_tokenizer_leaves_out(home: Path, mm: Run, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "rope?"}, {"role": "assistant", "content": "sail", "reasoning_content": "wind"}]
    path = write(tmp_path / "reasons.jsonl", [{"messages": talk}] * 3)
    fine(mm(f"validate {path}"))
    for command in ("validate", "stats"):
        told = refused(
            mm(f"{command} {path} --tokenizer data/tokenizer"), "no row can be used", "reasoning lost", "wind"
        )
    assert f"mm validate {path} --tokenizer data/tokenizer" in told.err


def test_when_every_row_fails_the_first_is_explained(home: Path, mm: Run, tmp_path: Path) -> None:
    lacking = write(tmp_path / "rows.jsonl", [{"mood": "fair", "instruction": "rope?", "reply": "sail"}] * 3)
    words = (
        "line 1",
        "`mood` (a string), `instruction` (a string), `reply` (a string)",
        "lacks `completion` (--map completion=COLUMN)",
    )
    for command in ("validate", "stats", "pack"):
        refused(mm(f"{command} {lacking}"), *words)
    long = write(tmp_path / "long.jsonl", [{"prompt": "rope " * 50, "completion": "sail"}] * 3)
    refused(
        mm(f"pack {long} --out shards/long --max-len 32 --workers 1"),
        "all 3 rows are left out, most for: too long", "long.jsonl line 1", "`prompt` (a string), `completion` (a string)",
    )  # fmt: skip
    assert not (home / "shards/long").exists()


def test_most_rows_failing_ends_with_an_error_unless_max_bad_allows_it(home: Path, mm: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "rope " * 50, "completion": "sail"}] * 2 + [{"prompt": "rope?", "completion": "sail"}]
    long = write(tmp_path / "long.jsonl", rows)
    pack = f"pack {long} --out shards/long --max-len 32 --workers 1 --no-report"
    refused(mm(pack), "2 of 3 rows cannot be used (allowed: 50.00%); most: 2 too long", "--max-bad")
    refused(mm(f"{pack} --max-bad 60%"), "allowed: 60.00%")
    assert "kept 1 of 3" in fine(mm(f"{pack} --max-bad 'too long=70%'")).out
    assert "kept 1 of 3" in fine(mm(f"{pack} --max-bad 70%")).out
    broken = write(tmp_path / "broken.jsonl", [{"prompt": "rope?", "completion": "sail"}, {"prompt": "rope?"}, 5])
    refused(mm(f"validate {broken}"), "2 of 3 rows cannot be used")
    fine(mm(f"validate {broken} --max-bad 70%"))
