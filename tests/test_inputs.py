"""What a dataset becomes does not depend on the format of its input files; each file keeps a dataset of its own."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from command_line import Run, fine, refused
from pack_data import conversation, document, pack_with, pair, words, write_rows
from random_rows import maybe, random_row
from row_files import FLAT_FORMATS, jsonl, raw_table, typed_tables, write

from mmdata.commands.pack import dataset_names
from mmdata.encode.rows import BadRow, parse_row, row_hash
from mmdata.errors import InputError, UsageError
from mmdata.io.lines import iter_lines
from mmdata.pack import pipeline
from mmdata.pack.repair import repair
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.shards.verify import verify
from mmdata.stats.stats import measure_dataset, measure_file

Packer = Callable[..., pipeline.PackResult]
NESTED = ["rows.jsonl", "rows.jsonl.zst", "line.json", "pretty.json", "groups.parquet", "stream.arrow"]


@pytest.fixture
def pack_to(tmp_path: Path, tokenizer_dir: Path) -> Packer:
    def run(*inputs: Path, out: str = "out", **options: Any) -> pipeline.PackResult:
        defaults = {"tokenizer": tokenizer_dir, "max_len": 256, "max_bad": "100%"}
        return pack_with(inputs, tmp_path / out, **defaults | options)

    return run


def odd_document(draw: random.Random) -> dict[str, Any]:
    text = maybe(draw, document(draw)["text"], 0.9)
    return {"text": text, "source": maybe(draw, words(draw, 2)), "title": None}


def odd_conversation(draw: random.Random) -> dict[str, Any]:
    messages = [message | {"reasoning_content": None} for message in conversation(draw)["conversations"]]
    for message in messages:
        if message["role"] == "assistant":
            message["reasoning_content"] = maybe(draw, words(draw, 3), 0.3)
        message["tool_calls"] = None
    if draw.random() < 0.2:
        spoiled = draw.choice(messages)
        spoiled[draw.choice(["role", "content"])] = draw.choice([None, "", " ", "critic"])
    tool = {"type": "function", "function": {"name": words(draw, 1), "parameters": {"type": "object"}}}
    return {
        "conversations": maybe(draw, messages[: draw.choice([0, 1, 9, 9, 9, 9])], 0.95),
        "system": maybe(draw, words(draw, 4), 0.3),
        "tools": maybe(draw, json.dumps([tool]), 0.3),
        "id": maybe(draw, draw.randint(0, 2**40)),
        "score": maybe(draw, draw.random()),
    }


def odd_pair(draw: random.Random) -> dict[str, Any]:
    sides = pair(draw)
    return {name: maybe(draw, side, 0.95) for name, side in sides.items()} | {
        "prompt": None,
        "margin": maybe(draw, 0.5),
    }


def odd_alpaca(draw: random.Random) -> dict[str, Any]:
    return {
        "instruction": maybe(draw, words(draw, 6), 0.95),
        "input": maybe(draw, words(draw, 4)),
        "output": maybe(draw, words(draw, 6), 0.95),
        "history": maybe(draw, [[words(draw, 3), words(draw, 3)]], 0.2),
        "system": maybe(draw, words(draw, 3), 0.2),
    }


def odd_preference(draw: random.Random) -> dict[str, Any]:
    sides = [[{"role": "assistant", "content": maybe(draw, words(draw, 6), 0.95)}] for _ in range(2)]
    scores = {"score_chosen": maybe(draw, draw.random()), "score_rejected": maybe(draw, 1)}
    return {"prompt": words(draw, 4), "chosen": sides[0], "rejected": sides[1]} | scores


MAKERS = {
    "document": odd_document,
    "conversation": odd_conversation,
    "pair": odd_pair,
    "alpaca": odd_alpaca,
    "preference": odd_preference,
}


def outcome(result: pipeline.PackResult) -> tuple[Any, ...]:
    places = [row["line"] for row in source_rows(open_dataset(result.out))]
    return result.digest, result.rows, result.kept, result.left_out, result.cut, places


def outcomes(directory: Path, pack_to: Packer, kind: str, count: int, seed: int) -> None:
    """The same random rows in every format give the same dataset, and the same rows are left out for the same reasons."""
    draw = random.Random(seed)
    rows = [MAKERS[kind](draw) for _ in range(count)]
    formats = NESTED + (list(FLAT_FORMATS)[:2] if kind == "document" else [])
    found = {name: outcome(pack_to(write(directory, name, rows), out=f"{name}-{seed}")) for name in formats}
    expected = found["rows.jsonl"]
    assert expected[1] == count and 0.1 * count < expected[2] < count
    assert {name: result for name, result in found.items() if result != expected} == {}


@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_rows_give_the_same_dataset_in_every_format(tmp_path: Path, pack_to: Packer, kind: str) -> None:
    outcomes(tmp_path, pack_to, kind, 60, 0)


def texts_outcomes(directory: Path, pack_to: Packer, kind: str, count: int, seed: int) -> None:
    """Random rows of all schemas, some with wrong values, have the same outcome as text of any format and encoding."""
    draw = random.Random(seed)
    rows = [random_row(draw, kind) for _ in range(count)]
    files = {
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "b.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "c.json": json.dumps(rows, indent=1, ensure_ascii=False),
        "d.json": json.dumps(rows, ensure_ascii=False),
        "e.jsonl.zst": zstandard.compress(jsonl(rows)),
        "f.parquet": raw_table(rows),
    }
    found = {}
    for name, text in files.items():
        encoding = {"c.json": "gb18030", "d.json": "utf-16"}.get(name)
        (directory / name).write_bytes(text.encode(encoding or "utf-8") if isinstance(text, str) else text)
        result = pack_to(directory / name, out=f"{seed}-{name[0]}", encoding=encoding, kind=kind, max_bad="100%")
        assert result.rows == count == result.kept + sum(result.left_out.values())
        found[name] = outcome(result)
    assert found["a.jsonl"][2] > 0.4 * count and len(found["a.jsonl"][3]) > 2
    assert {name: result for name, result in found.items() if result != found["a.jsonl"]} == {}


def without_nulls(value: Any) -> Any:
    """The value without the keys of objects that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def typed_outcomes(directory: Path, kind: str, count: int, seed: int) -> None:
    """Random rows of all schemas in typed columns, in a file for each combination of types, are read as in jsonl."""

    def read(raw: bytes) -> tuple[str, bytes]:
        try:
            return "", row_hash(parse_row(raw, kind))
        except BadRow as bad:
            return bad.reason, b""

    draw = random.Random(seed)
    rows = [random_row(draw, kind) for _ in range(count)]
    files, others = typed_tables(rows)
    num_nulls = 0
    assert sum(len(at) for at, _ in files) + len(others) == count and len(others) < 0.35 * count
    for at, content in files:
        (directory / "typed.parquet").write_bytes(content)
        raws = [line.raw for line in iter_lines(directory / "typed.parquet")]
        assert len(raws) == len(at)
        for i, raw in zip(at, raws, strict=True):
            found, want = read(raw), read(json.dumps(rows[i]).encode())
            if found != want:  # a table cannot tell a null in a tool's definition from a key that is absent
                num_nulls += 1
                assert "tools" in rows[i] and found == read(json.dumps(without_nulls(rows[i])).encode()), (rows[i], raw)
    assert num_nulls <= 0.001 * count


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_rows_in_typed_columns_have_the_same_outcome(tmp_path: Path, kind: str) -> None:
    typed_outcomes(tmp_path, kind, 60, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_many_rows_in_typed_columns_have_the_same_outcome(tmp_path: Path, kind: str) -> None:
    typed_outcomes(tmp_path, kind, 7000, 1)


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_rows_of_all_schemas_have_the_same_outcome_in_every_encoding(
    tmp_path: Path, pack_to: Packer, kind: str
) -> None:
    texts_outcomes(tmp_path, pack_to, kind, 100, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_many_rows_of_all_schemas_have_the_same_outcome(tmp_path: Path, pack_to: Packer, kind: str) -> None:
    texts_outcomes(tmp_path, pack_to, kind, 7000, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_many_random_rows_give_the_same_dataset_in_every_format(tmp_path: Path, pack_to: Packer, kind: str) -> None:
    outcomes(tmp_path, pack_to, kind, 1000, 1)


def test_several_workers_share_one_table_array_or_csv(tmp_path: Path, pack_to: Packer) -> None:
    draw = random.Random(0)
    rows = [{"text": words(draw, 20)} for _ in range(200)]
    for name in ("rows.parquet", "pretty.json", "rows.csv", "stream.arrow"):
        path = write(tmp_path, name, rows)
        ticks: list[int] = []
        result = pack_to(
            path, out=f"out-{name}", part_bytes=4000, progress=lambda done, total, t=ticks: t.append(total - done)
        )
        dataset = open_dataset(result.out)
        assert len(dataset.parts) > 2 and result.kept == 200
        assert [row["line"] for row in source_rows(dataset)] == list(range(1, 201))
        assert ticks == sorted(ticks, reverse=True) and ticks[-1] == 0
        assert verify(result.out) == []


# --- provenance, rejected rows, and commands on datasets of tables


def test_a_row_of_a_table_is_found_again_by_its_number(tmp_path: Path, pack_to: Packer) -> None:
    rows = [{"text": None, "n": 1}, {"text": "sail", "n": None}, {"text": " ", "n": 2}, {"text": 'x":null', "n": 3}]
    path = write(tmp_path, "groups.parquet", rows)
    result = pack_to(path)
    assert [row["line"] for row in source_rows(open_dataset(result.out))] == [2, 4]
    records = [json.loads(line) for line in (result.out / "rejected/part-00000.jsonl").read_text().splitlines()]
    assert [(record["line"], json.loads(record["raw"])) for record in records] == [(1, {"n": 1}), (3, rows[2])]
    again = tmp_path / "again.jsonl"
    again.write_text("".join(record["raw"] + "\n" for record in records))
    with pytest.raises(InputError):
        pack_to(again, out="again")


@pytest.mark.parametrize("name", ["groups.parquet", "pretty.json", "rows.csv", "rows.jsonl.xz"])
def test_datasets_of_every_format_are_measured_and_repaired(
    tmp_path: Path, pack_to: Packer, tokenizer_dir: Path, name: str
) -> None:
    draw = random.Random(0)
    rows = [{"text": words(draw, 20)} for _ in range(60)]
    path = write(tmp_path, name, rows)
    result = pack_to(path, part_bytes=3000, dedup="exact")
    measured = measure_dataset(result.out)
    assert measured.figures["texts_from"] == "inputs" and measured.figures["rows"] == 60
    figures = measure_file(path, tokenizer_dir).figures
    assert (figures["kept"], figures["characters"]) == (60, sum(len(row["text"]) for row in rows))
    shard = sorted((result.out / "train").rglob("*.arrow"))[0]
    before = shard.read_bytes()
    shard.write_bytes(before[:-1] + b"x")
    assert repair(result.out) == [str(shard.relative_to(result.out))]
    assert shard.read_bytes() == before


def test_encoding_and_text_are_part_of_the_dataset(tmp_path: Path, pack_to: Packer) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("灯塔 one\n绳子 two\n".encode("gbk"))
    result = pack_to(path, encoding="gbk", text="line")
    manifest = json.loads((result.out / "manifest.json").read_text())
    assert (manifest["arguments"]["encoding"], manifest["arguments"]["text"]) == ("gbk", "line")
    assert pack_to(path, encoding="gbk", text="line").up_to_date
    assert measure_dataset(result.out).figures["texts_from"] == "inputs"
    (result.out / "stats.json").write_text("{}")
    assert repair(result.out) == ["stats.json"]
    whole = pack_to(path, encoding="gbk", text="file")
    assert (result.kept, whole.kept, whole.up_to_date) == (2, 1, False)
    plain = json.loads(
        (pack_to(write_rows(tmp_path / "a.jsonl", "document", 5), out="a").out / "manifest.json").read_text()
    )
    assert not {"encoding", "text"} & plain["arguments"].keys()


def test_texts_to_exclude_may_be_plain_or_a_table(tmp_path: Path, pack_to: Packer) -> None:
    text = "one two three four five six seven eight nine ten"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl([{"text": text}, {"text": "other"}]))
    (tmp_path / "bench.txt").write_text(f"\n{text}\n")
    for exclude in (tmp_path / "bench.txt", write(tmp_path, "rows.parquet", [{"question": text}])):
        assert pack_to(path, exclude=(exclude,), out=exclude.stem).left_out == {"overlaps an excluded text": 1}


# --- commands


def test_commands_read_every_format(home: Path, mm: Run) -> None:
    rows = [json.loads(line) for line in (home / "data/sft_512.jsonl").read_text().splitlines()]
    for name in ("groups.parquet", "pretty.json", "rows.jsonl.bz2"):
        path = write(home, name, rows)
        assert json.loads(fine(mm(f"validate {path} --json")).out)[0]["num_good"] == len(rows)
        shown = [json.loads(fine(mm(f"show {file} --index 3 --json")).out)[0] for file in (path, "data/sft_512.jsonl")]
        assert shown[0]["input_ids"] == shown[1]["input_ids"] and shown[0]["line"] == 4
        assert "240 rows" in fine(mm(f"pack {path} --plan")).out.replace("about ", "")
    write(home, "rows.csv", [{"text": f"text {n}"} for n in range(20)])
    compared = json.loads(fine(mm("tokenizer compare data/tokenizer data/tokenizer --data rows.csv --json")).out)
    assert compared


def test_encodings_by_the_command_line(home: Path, mm: Run) -> None:
    content = (home / "data/sft_512.jsonl").read_text() + json.dumps({"text": "x"})
    (home / "gbk.jsonl").write_bytes(content.replace("one", "海图").encode("gbk"))
    for command in ("pack gbk.jsonl", "validate gbk.jsonl", "stats gbk.jsonl", "show gbk.jsonl"):
        refused(mm(command), "fits gb18030", "iconv -f GB18030 -t UTF-8 gbk.jsonl > gbk.utf8.jsonl")
        ran = fine(mm(f"{command} --encoding gbk")) if not command.startswith("show") else None
        if command.startswith("validate") and ran:
            assert ran.err.endswith("next: mm pack gbk.jsonl --encoding gbk\n")
    assert (home / "shards/gbk/manifest.json").exists()


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/train.jsonl", "b/train.jsonl"], ["a-train", "b-train"]),
        (["x.json", "x.jsonl"], ["x-json", "x-jsonl"]),
        (["x.parquet", "x.csv", "y.csv"], ["x-parquet", "x-csv", "y"]),
        (["p/a/t.jsonl", "q/a/t.jsonl", "q/a/t.json.gz"], ["p-a-t", "q-a-t-jsonl", "q-a-t-json-gz"]),
        (["a/T.jsonl", "b/t.jsonl"], ["a-T", "b-t"]),  # one path on a file system that ignores case
        (["s3://x/a/t.jsonl", "s3://x/b/t.jsonl"], ["a-t", "b-t"]),
        (["data.v1.jsonl", "plain", "b.txt.zst"], ["data.v1", "plain", "b"]),
    ],
)
def test_files_of_equal_names_get_datasets_of_their_own(
    files: list[str], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dataset_names([Path(file) for file in files]) == names
    said = capsys.readouterr().err
    assert said.count("their datasets are") == (names != ["data.v1", "plain", "b"])


def test_files_that_cannot_be_told_apart_are_refused_before_anything_is_written(home: Path, mm: Run) -> None:
    with pytest.raises(UsageError, match="two files"):
        dataset_names([Path("a/t.jsonl"), Path("b/t.jsonl"), Path("a-t.jsonl")])
    refused(mm("pack data/sft_512.jsonl data/../data/sft_512.jsonl"), "two files", "--out DIR")
    assert not (home / "shards").exists()


def test_two_files_of_one_name_are_both_packed(home: Path, mm: Run) -> None:
    for number, name in enumerate("ab"):
        (home / name).mkdir()
        write_rows(home / name / "train.jsonl", "document", 5 + number)
    ran = fine(mm("pack a/train.jsonl b/train.jsonl"))
    assert "2 files are named train: their datasets are a-train, b-train" in ran.err
    for number, name in enumerate("ab"):
        manifest = json.loads((home / f"shards/{name}-train/manifest.json").read_text())
        assert manifest["totals"]["rows"] == 5 + number


def test_rows_selected_into_parquet_are_packed_as_before(home: Path, mm: Run) -> None:
    rows = [json.loads(line) for line in (home / "data/sft_512.jsonl").read_text().splitlines()]
    write(home, "groups.parquet", rows)
    fine(mm("select groups.parquet --out some.parquet --rest others.jsonl --where 'line > 0'"))
    for name in ("data/sft_512.jsonl", "groups.parquet", "some.parquet"):
        fine(mm(f"pack {name} --no-report"))
    manifests = [
        json.loads((home / f"shards/{name}/manifest.json").read_text()) for name in ("sft_512", "groups", "some")
    ]
    assert len({manifest["dataset_digest"] for manifest in manifests}) == 1
