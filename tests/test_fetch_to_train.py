"""From the hub to a trained model: what `mm fetch` brings, `mm pack` and `mm train` take without another word."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakehub import FakeHub
from train_data import Data

import cli
from mmdata.hub import catalog

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


def test_what_was_fetched_is_packed_and_trained_on_without_further_arguments(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
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
    mm("train dpo --steps 5")  # from new weights, with a warning: no earlier run is here
    assert (tmp_path / "runs" / "dpo-1" / "checkpoints" / "step-5" / "model.safetensors").is_file()
    asked = len(hub.requests)
    assert mm("fetch").count("kept data/") == 5
    assert len(hub.requests) == asked
