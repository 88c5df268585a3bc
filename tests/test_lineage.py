"""What models and datasets were made from: the tree, its comparison with the disk, and the cards."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from command_line import Run, fine, refused
from train_data import Data

from mmdata.hub import catalog
from mmdata.hub.lockfile import LockEntry, write_entry
from mmdata.io.files import sha256_of
from mmtrain.convert.export import export
from mmtrain.lineage import CHANGED, MISSING, SAME, origin_of


@pytest.fixture
def project(home: Path, data: Data, mm: Run) -> Path:
    """Two stages trained in a project whose sft rows were fetched."""
    entry = LockEntry(
        num_bytes=(home / "data/sft_512.jsonl").stat().st_size,
        sha256=sha256_of(home / "data/sft_512.jsonl"),
        num_lines=240,
        ends_with_newline=True,
        mtime_ns=0,
        ctime_ns=0,
        source="hf",
        endpoint="",
        repo=catalog.DATASET_REPO["hf"],
        repo_kind="dataset",
        revision="main",
        commit="c" * 40,
        path="sft_512.jsonl",
        is_verified=True,
    )
    write_entry(home / "data", "sft_512.jsonl", entry)
    fine(mm("pack data/pretrain_hq.jsonl data/sft_512.jsonl --max-len 128"))
    fine(mm("train pretrain --out runs/pretrain --model tiny --steps 1 --quiet --data shards/pretrain_hq --no-samples"))
    fine(
        mm(
            "train sft --out runs/sft --init runs/pretrain --steps 1 --lr 0.01 --quiet --data shards/sft_512 --no-samples"
        )
    )
    return home


def test_a_model_is_traced_to_its_raw_files_and_compared_with_the_disk(project: Path, mm: Run) -> None:
    export(Path("runs/sft"), Path("exports/sft-gguf"), format="gguf")
    tree = origin_of(Path("exports/sft-gguf"), is_checked=True)
    assert {node.state for node in tree.walk()} == {SAME}
    run = tree.sources[0]
    manifest = json.loads((project / "shards/sft_512/manifest.json").read_text())
    record = json.loads((project / "runs/sft/run.json").read_text())
    assert tree.sha256 == run.sha256 and run.facts["samples"] == record["data_digest"]
    assert run.facts["settings"]["lr"] == 0.01 and run.facts["versions"] == record["versions"]
    dataset, parent = run.sources
    assert dataset.sha256 == manifest["dataset_digest"] and parent.sha256 == record["init"]["weights_sha256"]
    file, tokenizer = dataset.sources
    assert file.sha256 == manifest["inputs"][0]["sha256"] == sha256_of(project / "data/sft_512.jsonl")
    assert file.facts["source"] == f"{catalog.DATASET_REPO['hf']}@{'c' * 40}"
    assert tokenizer.facts["template"] == manifest["tokenizer"]["template_sha256"]
    assert {node.name for node in tree.all("file")} == {"sft_512.jsonl", "pretrain_hq.jsonl"}

    shown = fine(mm("lineage exports/sft-gguf --check"))
    assert shown.out.count("same") == len(list(tree.walk())) and f"from {catalog.DATASET_REPO['hf']}" in shown.out
    assert json.loads(fine(mm("lineage runs/sft --json")).out)["sources"][0]["sha256"] == dataset.sha256
    (project / "data/pretrain_hq.jsonl").unlink()
    shown = fine(mm("lineage runs/sft --check"))
    assert "MISSING" in shown.out and "1 are not here any more" in shown.err
    for path, kind in (("runs/pretrain/checkpoints/step-1/model.safetensors", "run"), ("data/sft_512.jsonl", "file")):
        kept = (project / path).read_bytes()
        (project / path).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert CHANGED in {node.state for node in origin_of(Path("runs/sft"), is_checked=True).all(kind)}
        assert mm("lineage runs/sft --check").code == 1
        (project / path).write_bytes(kept)
    fine(mm("pack data/sft_512.jsonl --max-len 64"))  # another dataset in the place of the one trained on
    (changed,) = (node for node in origin_of(Path("runs/sft"), is_checked=True).sources if node.kind == "dataset")
    assert changed.state == CHANGED and changed.sha256 == dataset.sha256 and not changed.facts
    (project / "runs/pretrain/run.json").write_text("{")
    assert origin_of(Path("runs/sft"), is_checked=True).sources[1].state == MISSING
    shutil.rmtree(project / "runs/pretrain")
    assert origin_of(Path("runs/sft"), is_checked=True).sources[1].state == MISSING
    refused(mm("lineage data"), "data is no run, export or packed dataset")


def test_cards_say_licence_languages_data_counts_evaluation_and_how_to_load(project: Path, mm: Run) -> None:
    export(Path("runs/sft"), Path("exports/sft"), format="gguf")
    card = (project / "exports/sft/README.md").read_text(encoding="utf-8")
    totals = json.loads((project / "shards/sft_512/manifest.json").read_text())["totals"]
    for text in (
        "language:\n- en\n",
        "license: other",
        catalog.LICENCE,
        f"| sft_512 | {totals['kept']} | 0 | {totals['tokens']:,} | {totals['loss_tokens']:,} | en |",
        f"| sft_512.jsonl | `{sha256_of(project / 'data/sft_512.jsonl')[:16]}` | {catalog.DATASET_REPO['hf']}@",
    ):
        assert text in card
    loss = json.loads((project / "runs/sft/run.json").read_text())["result"]["val"]["loss"]
    assert f"| sft | {loss:.4f} |" in card and card.count("```") == 6
    dataset = (project / "shards/sft_512/README.md").read_text(encoding="utf-8")
    assert dataset.startswith("---\nlanguage:\n- en\n") and f"{totals['kept']} rows of kind conversation" in dataset
    rows = pl.scan_ipc("shards/sft_512/train/*/*.arrow").collect()
    stats = json.loads((project / "shards/sft_512/stats.json").read_text())
    assert len(rows) == stats["splits"]["train"]["samples"]
    assert rows["ids"].list.len().sum() == stats["splits"]["train"]["tokens"]
    fine(mm("verify shards/sft_512"))  # the card is no part of the dataset
