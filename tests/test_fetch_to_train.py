"""From the hub to a trained model: what `mm fetch` brings, `mm pack` and `mm train` take without another word."""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakehub import FakeHub
from train_data import Data

import cli
from mmdata.hub import catalog
from mmtrain.shapes import MODEL_SHAPES

DATASET = catalog.DATASET_REPO["hf"]


@pytest.fixture
def hub(data: Data, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has small files under the real names, and a tokenizer trained on them."""
    from huggingface_hub.utils import close_session

    stages = {"pretrain_t2t_mini": "pretrain", "sft_t2t_mini": "sft", "dpo": "dpo"}
    with FakeHub() as hub:
        hub.put(
            DATASET,
            {f"{key}.jsonl": first_lines(data.tokenizer.parent / f"{stage}.jsonl") for key, stage in stages.items()},
        )
        hub.put(
            "jingyaogong/minimind-3", {path.name: path.read_bytes() for path in data.tokenizer.iterdir()}, kind="models"
        )
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield hub
        close_session()


def first_lines(path: Path) -> bytes:
    """Few rows: the model is the default one, of 26M parameters."""
    return b"".join(path.read_bytes().splitlines(keepends=True)[:24])


@pytest.mark.parametrize("is_small", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_was_fetched_is_packed_and_trained_on_without_further_arguments(
    is_small: bool, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the default model of 26M parameters if slow tests run, and with a narrow one under its name always."""
    if is_small:
        default = MODEL_SHAPES["minimind2-small"]
        narrow = replace(default, hidden_size=64, num_layers=2, num_heads=4, ffn_size=176)
        monkeypatch.setitem(MODEL_SHAPES, "minimind2-small", narrow)
    monkeypatch.chdir(tmp_path)

    def mm(line: str) -> str:
        monkeypatch.setattr(sys, "argv", ["mm", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr()
        assert not ended.value.code, f"mm {line}\n{said.err}"
        return said.out

    assert mm("fetch").count("fetched data/") == 5
    mm("pack --max-len 1024")
    mm("train dpo --steps 1")  # from new weights, with a warning: no earlier run is here
    assert (tmp_path / "runs" / "dpo-1" / "checkpoints" / "step-1" / "model.safetensors").is_file()
    asked = len(hub.requests)
    assert mm("fetch").count("kept data/") == 5
    assert len(hub.requests) == asked
