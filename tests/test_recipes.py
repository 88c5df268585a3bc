"""Every recipe runs from its first line to its last, on a hub of loopback that has small files under the real names."""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Run, refused
from fakehub import Bytes, FakeHub
from train_data import Data

import cli
from mmdata.hub import catalog
from mmtrain.shapes import MODEL_SHAPES

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
DATASET = catalog.DATASET_REPO["hf"]
ROWS = 60


@pytest.fixture
def hub(data: Data, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the files of the catalog, each with rows of its stage, and both of its dpo.jsonl in the history."""
    from huggingface_hub.utils import close_session

    sources = {"pretrain": "pretrain", "sft": "sft", "lora": "sft", "dpo": "dpo"}
    known = [known for known in catalog.FILES if known.stage in sources]
    contents = {
        each.key: b"".join(
            (data.tokenizer.parent / f"{sources[each.stage]}.jsonl").read_bytes().splitlines(keepends=True)[: ROWS + n]
        )
        for n, each in enumerate(known)
    }
    sizes = {
        each.key: replace(each, num_bytes=len(content), about_bytes=None, sha256=Bytes(content).sha256, revisions={})
        for each, content in zip(known, contents.values(), strict=True)
    }
    monkeypatch.setattr(catalog, "FILES", tuple(sizes.get(each.key, each) for each in catalog.FILES))
    with FakeHub() as hub:
        hub.put(DATASET, {each.path: contents[each.key] for each in known}, commit=catalog.OLD["hf"])
        hub.put(DATASET, {each.path: contents[each.key] for each in known if each.key != "dpo_v1"})
        for name in ("minimind-2", "minimind-3"):
            tokenizer = catalog.find_tokenizer(name)
            assert tokenizer
            files: dict[str, bytes | Bytes] = {path.name: path.read_bytes() for path in data.tokenizer.iterdir()}
            hub.put(tokenizer.repo["hf"], files, kind="models", commit=tokenizer.revision or "")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield hub
        close_session()


@pytest.mark.slow
@pytest.mark.parametrize("recipes", [["minimind2.sh", "lora.sh"], ["minimind3.sh"]], ids=str)
def test_a_recipe_runs_to_its_end(
    recipes: list[str],
    hub: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As it stands, with narrow models under the models' names; the chats at its end read an empty standard input."""
    for name, shape in MODEL_SHAPES.items():
        narrow = replace(shape, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, ffn_size=64)
        monkeypatch.setitem(MODEL_SHAPES, name, narrow)
    monkeypatch.chdir(tmp_path)
    for recipe in recipes:
        lines = [line for line in (RECIPES / recipe).read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]
        assert lines[0] == "set -euo pipefail" and all(line.startswith("mm ") for line in lines[1:])
        for line in lines[1:]:
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            with pytest.raises(SystemExit) as ended, (tmp_path / "empty").open("w+") as nothing:
                monkeypatch.setattr(sys, "stdin", nothing)
                cli.main()
            assert not ended.value.code, f"{line}\n{capfd.readouterr().err}"
    stages = ["dpo-1", "pretrain-1", "sft-1", "sft-2", "sft-3", "sft-4", "sft-5"]
    expected = stages if "lora.sh" in recipes else ["dpo-1", "pretrain-1", "sft-1"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == expected
    assert (tmp_path / "data" / "dpo_v1.jsonl").exists() == ("lora.sh" in recipes)


def test_a_file_that_is_not_there_is_answered_with_the_one_of_nearly_its_name(home: Path, mm: Run) -> None:
    (home / "data/dpo.jsonl").rename(home / "data/dpo_v1.jsonl")
    refused(mm("pack data/dpo.jsonl --max-len 1024"), "data/dpo.jsonl: no such file", "there is data/dpo_v1.jsonl\n")
