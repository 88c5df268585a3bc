"""Columns of rows, messages and samples, against a slow count in Python; nothing is computed that is not asked for."""

import json
import random
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pack_data import words, write_rows
from test_report import tool_rows

from mmdata.encode.rows import Document, Pair, parse_row, split_documents
from mmdata.pack.filter.features import COLUMNS, MESSAGE_COLUMNS, RowBatch
from mmdata.pack.filter.grams import num_units
from mmdata.pack.pipeline import PackResult
from mmdata.shards.dataset import open_dataset, source_rows
from mmdata.stats.frames import SAMPLE_COLUMNS, messages, rows, samples

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("document", "conversation", "pair", "tools")


def write(path: Path, kind: str) -> Path:
    """Rows of a kind, some of them twice, one that is not a row, one that is written otherwise but says the same."""
    write_rows(path, "conversation" if kind == "tools" else kind, 60)
    if kind == "tools":
        path.write_text("".join(json.dumps(row) + "\n" for row in tool_rows()))
    lines = path.read_text().splitlines()
    lines += ["not json", lines[3], json.dumps(json.loads(lines[4]), indent=None, separators=(" ,", ":  "))]
    path.write_text("\n".join(lines) + "\n")
    return path


def slow(raw: str) -> dict[str, Any]:
    """Some columns of a row, counted one by one."""
    row = parse_row(raw.encode())
    if isinstance(row, Document):
        texts = [("document", text) for text in split_documents(row.text)]
        turns = calls = 0
    else:
        shared = row.num_shared if isinstance(row, Pair) else 10**9
        main = row.chosen if isinstance(row, Pair) else row
        texts = [(m.role, (m.reasoning_content or "") + m.content) for m in main.messages[:shared]]
        texts = [(role, text) for role, text in texts if text]
        if isinstance(row, Pair):
            for side, of in (("chosen", row.chosen), ("rejected", row.rejected)):
                texts.append((side, "\n".join(m.content for m in of.messages[shared:])))
        turns = sum(m.role == "user" for m in main.messages)
        calls = sum(len(m.tool_calls) for m in main.messages)
    whole = "".join(text for _, text in texts)
    lines = [line for _, text in texts for line in text.split("\n")]
    trained = sum(len(text) for role, text in texts if role in ("document", "assistant", "chosen", "rejected"))
    return {
        "bytes": len(raw.encode()),
        "characters": len(whole),
        "turns": turns,
        "tool_calls": calls,
        "trained_characters": trained,
        "lines": sum(bool(line.strip()) for line in lines),
        "longest_line": max(map(len, lines)),
        "han": sum("\u4e00" <= c <= "\u9fff" for c in whole) / len(whole),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_those_of_a_count_in_python(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "rows.jsonl", kind)
    found = rows(path).collect()
    lines = path.read_text().splitlines()
    usable = [number for number, line in enumerate(lines, 1) if line != "not json"]
    assert found["line"].to_list() == usable and found["file"].unique().to_list() == [str(path)]
    for record in found.iter_rows(named=True):
        expected = slow(lines[record["line"] - 1])
        assert {name: record[name] for name in expected} == pytest.approx(expected)
    later = found.filter("duplicate")["line"].to_list()
    assert set(usable[-2:]) <= set(later)
    assert found["duplicate_group"].to_list()[-2:] == [3, 4]
    near = found.filter(~pl.col("duplicate"))
    assert (near["near_group"] <= near["duplicate_group"]).all()


def test_prompt_and_answers_of_each_kind() -> None:
    ask, said = {"role": "user", "content": "tide?"}, {"role": "assistant", "content": "high"}
    no = {"role": "assistant", "content": "no tide"}
    lines = [{"text": "a\nbc"}, {"messages": [ask, said, ask, no]}, {"chosen": [ask, said], "rejected": [ask, no]}]
    batch = RowBatch([parse_row(json.dumps(line).encode()) for line in lines])
    names = [f"{name}_characters" for name in ("trained", "prompt", "answer", "chosen", "rejected")]
    assert batch.columns([*names, "difference"]).rows() == [
        (4, 0, 4, None, None, None),
        (11, 14, 7, None, None, None),
        (11, 5, 4, 4, 7, -3),
    ]


def test_repeated_is_the_share_of_5_grams_that_came_before() -> None:
    draw = random.Random(3)
    texts = [words(draw, 40) for _ in range(20)] + ["one two three four five " * 10, "short"]
    found = RowBatch([Document(text) for text in texts]).columns(["repeated"])["repeated"]
    for text, share in zip(texts, found, strict=True):
        units = re.findall(r"[a-z]+|[\u4e00-\u9fff]", text)
        assert len(units) == num_units(text)
        grams = [tuple(units[i : i + 5]) for i in range(max(1, len(units) - 4))]
        assert share == pytest.approx(1 - len(set(grams)) / len(grams))


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_a_dataset_has_its_files_columns_and_the_tokens_of_its_shards(
    packed: dict[str, PackResult], tokenizer_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(packed[kind].out)
    found = rows(packed[kind].out).collect()
    tokens: dict[int, int] = {}
    for row in source_rows(dataset):
        ids = [row.get(name, ()) for name in ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")]
        tokens[row["line"]] = tokens.get(row["line"], 0) + sum(map(len, ids))
    assert dict(found.select("line", "tokens").rows()) == tokens
    assert found["trained_tokens"].sum() == packed[kind].loss_tokens
    of_file = rows(dataset.inputs[0], tokenizer=tokenizer_dir).collect()
    if kind != "document":  # a long document is cut, which adds tokens
        assert found.equals(of_file)
    monkeypatch.setattr("mmdata.stats.frames._plan_of", lambda _: ([], []))
    decoded = rows(packed[kind].out).collect()
    assert decoded.drop("bytes").equals(found.drop("bytes")) and decoded["bytes"].null_count() == len(found)


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_samples_are_those_of_the_shards(packed: dict[str, PackResult], kind: str) -> None:
    dataset, found = open_dataset(packed[kind].out), samples(packed[kind].out).collect()
    totals = dataset.manifest.totals
    assert found.columns == list(SAMPLE_COLUMNS)
    sums = found.select(pl.len(), pl.sum("sequences", "tokens", "trained_tokens")).row(0)
    assert sums == (totals.samples, totals.sequences, totals.tokens, totals.loss_tokens)
    positions = sum(entry.samples * entry.bucket for entry in dataset.shards()) * (2 if kind == "pair" else 1)
    assert found["padding"].sum() == positions - sum(entry.model_tokens for entry in dataset.shards())


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_those_of_the_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "rows.jsonl", kind)
    found = messages(path).collect()
    assert found.columns == list(MESSAGE_COLUMNS)
    if kind != "pair":  # whose replies of several messages are joined by newlines in the columns of rows
        by_row = found.group_by("line").agg(pl.sum("characters")).sort("line")
        assert by_row.rows() == rows(path).select("line", "characters").collect().rows()
    users = pl.col("role") == "user"
    assert messages(path).filter(users).select("content").collect().equals(found.filter(users).select("content"))


def test_only_what_a_query_names_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", "conversation")
    made = []
    for maker in {column.maker for column in COLUMNS.values() if column.maker.startswith("_")}:
        make = getattr(RowBatch, maker)
        monkeypatch.setattr(RowBatch, maker, lambda self, make=make, maker=maker: made.append(maker) or make(self))
    found = rows(path).filter(pl.col("turns") > 1).select("characters").head(3).collect()
    assert len(found) == 3 and set(made) == {"_sizes", "_structure"}


def test_the_examples_of_the_documentation_run(
    packed: dict[str, PackResult], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sft_512.jsonl").write_bytes(Path(open_dataset(packed["conversation"].out).inputs[0]).read_bytes())
    (tmp_path / "data/tokenizer").symlink_to(tokenizer_dir)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/sft_512").symlink_to(packed["conversation"].out)
    scored = pl.DataFrame(
        {"file": "data/sft_512.jsonl", "line": [1, 1, 2], "tokens": [3, 4, 5], "nll": [1.5, 2.0, 4.0]}
    )
    scored.write_parquet(tmp_path / "losses.parquet")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/frames.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, scope)
    assert len(scope["joined"].collect()) == 2
    assert {f"`{name}`" for name in COLUMNS} <= set(re.findall(r"`\w+`", text))
