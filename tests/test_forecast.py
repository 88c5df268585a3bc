"""What a run of dpo says before it starts, and when it forgets."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_data import Data, run_json

from mmdata.errors import DatasetError
from mmtrain import checkpoint
from mmtrain.config import TrainOptions
from mmtrain.model.preference import Objective
from mmtrain.train.forecast import Forecast, forgetting, lines
from mmtrain.train.loop import train


@pytest.fixture(scope="module")
def sft(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short sft run to start from."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("sft") / "run"
    config = TrainOptions("sft", (data.sft,), out, model="tiny", steps=12, batch_tokens=1024, lr=3e-3, device="cpu")
    train(replace(config, quiet=True))
    return out


def dpo(data: Data, sft: Path, out: Path, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """What a run of dpo said, and its run.json."""
    said: list[str] = []
    base: dict[str, Any] = {"steps": 12, "batch_tokens": 1024, "lr": 1e-3, "init": sft, "device": "cpu", "log_every": 1}
    train(TrainOptions("dpo", (data.dpo,), out, **(base | options)), log=said.append)
    return said, run_json(out)


def test_a_rate_that_moves_nothing_is_said_before_the_first_step(data: Data, sft: Path, tmp_path: Path) -> None:
    said, facts = dpo(data, sft, tmp_path / "run", preset="minimind3", steps=12, lr=None)
    first_step = next(i for i, line in enumerate(said) if line.startswith("step 1/"))
    warned = next(i for i, line in enumerate(said) if "nothing will happen" in line)
    assert warned < first_step and "--lr" in said[warned] and 0 < facts["forecast"]["reach"] < 1e-3
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-2]
    assert abs(last["reward_margin"]) < 1e-3  # and nothing did


def test_a_rate_that_moves_something_is_forecast_within_its_bound(data: Data, sft: Path, tmp_path: Path) -> None:
    said, facts = dpo(data, sft, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    margin = [record["reward_margin"] for record in records if "reward_margin" in record][-1]
    assert 0.3 * margin < facts["forecast"]["reach"] and any("forecast: " in line for line in said)
    assert not any("nothing will happen" in line for line in said)
    assert facts["start_val"]["chosen_drift"] == pytest.approx(0, abs=1e-3)


def test_the_probe_leaves_no_trace(data: Data, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dpo(data, sft, tmp_path / "with")
    monkeypatch.setattr("mmtrain.train.loop._forecast", lambda run: None)
    dpo(data, sft, tmp_path / "without")
    one, other = (checkpoint.find(tmp_path / name).weights_sha256 for name in ("with", "without"))
    assert one == other


def test_forgetting_is_said_with_what_helps(data: Data, sft: Path, tmp_path: Path) -> None:
    said, facts = dpo(data, sft, tmp_path / "run", lr=3e-2, guard=str(data.sft), val_every=4)
    assert facts["start_val"]["guard_loss"] > 0
    assert any("forgetting" in line and "--sft-weight" in line for line in said)
    assert any("guard" in line for line in said if line.startswith("step 4/"))


def test_a_guard_that_cannot_guard_is_refused(data: Data, sft: Path, tmp_path: Path) -> None:
    for guard, match in ((data.dpo, "holds pairs"), (data.other, "another tokenizer")):
        with pytest.raises(DatasetError, match=match):
            dpo(data, sft, tmp_path / "run", guard=str(guard))


def test_forgetting_and_forecast_by_figures() -> None:
    start, objective = {"chosen_nll": 1.0, "guard_loss": 2.0}, Objective()
    assert forgetting(start, {"chosen_nll": 1.09, "guard_loss": 2.04}, objective) is None
    assert "guard" in str(forgetting(start, {"chosen_nll": 1.0, "guard_loss": 2.06}, objective))
    assert "sft-weight" not in str(forgetting(start, {"chosen_nll": 1.2}, Objective("orpo")))
    assert forgetting({}, {}, objective) is None
    assert forgetting({"loss": 0.693}, {"loss": 0.70}, objective) is None
    assert "memorises" in str(forgetting({"loss": 0.693}, {"loss": 0.75}, objective))
    assert forgetting({"loss": 25.0}, {"loss": 25.5}, Objective("ipo")) is None, "a share: ipo's loss has another scale"
    assert "--lr 1e-05" in lines(Forecast(100.0, 1e-5), 1e-8)[1]
    assert "wrong way" in lines(Forecast(-1.0, 1.0), 1e-5)[1] and len(lines(Forecast(1.0, 1.0), 1e-5)) == 1
