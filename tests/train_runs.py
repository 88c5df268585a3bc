"""Short runs on the data of train_data.py for the trainer's tests: their options, their metrics, and ways to end them; and run
directories written by hand, for the tests of what is read from them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from train_data import Data

from mmtrain.config import TrainOptions
from mmtrain.shapes import ModelConfig


def config_of(stage: str, data: Data, out: Path, **settings: Any) -> TrainOptions:
    """Seven steps of a stage, saved every third; without sample answers and report.html."""
    base: dict[str, Any] = {"steps": 7, "batch_tokens": 512, "micro_tokens": 256, "lr": 2e-3, "save_every": 3}
    base |= {"device": "cpu", "val_every": 3, "log_every": 1, "runs_dir": out.parent, "report": False, "samples": False}
    return TrainOptions(stage, (getattr(data, stage),), out, **(base | settings))


def lines(run: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl without speed and memory, which differ between equal runs."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("tokens_per_s", "memory_bytes")} for record in records]


def steps(run: Path) -> list[dict[str, Any]]:
    """Records of training steps, without those of validations."""
    return [line for line in lines(run) if "loss" in line]


def at_step(step: int, act: Callable[[], None]) -> Callable[[str], None]:
    """A `log` function for `train` that calls `act` when the line of `step` is printed."""

    def log(text: str) -> None:
        if text.startswith(f"step {step}/") and "val" not in text:
            act()

    return log


def interrupt() -> None:
    raise KeyboardInterrupt


def refused_run(error: type[Exception], match: str, fix: str, run: TrainOptions) -> None:
    """Assert that the run ends with this error, and that its fix contains `fix`."""
    from mmtrain.train.loop import train

    with pytest.raises(error, match=match) as caught:
        train(replace(run, quiet=True))
    assert fix in caught.value.fix  # type: ignore[attr-defined]


def three_stages(data: Data, root: Path) -> None:
    """Train pretrain, sft and dpo for two epochs into directories of these names in `root`, each from the one before."""
    import torch

    from mmtrain.train.loop import train

    torch.set_num_threads(1)
    for stage, source, settings in (
        ("pretrain", data.pretrain, {"model": "tiny", "lr": 3e-3}),
        ("sft", data.sft, {"lr": 3e-3}),
        ("dpo", data.dpo, {"lr": 3e-4}),
    ):
        base = TrainOptions(stage, (source,), root / stage, epochs=2, batch_tokens=1024, device="cpu", runs_dir=root)
        train(replace(base, **settings, quiet=True))


def make_run(path: Path, number: int, *, stage: str = "sft", init: str = "", **facts: Any) -> list[dict[str, Any]]:
    """A run directory with `number` steps, the figures of each a function of its step; gives its step records."""
    (path / "checkpoints").mkdir(parents=True)
    run = {"stage": stage, "status": "finished", "num_steps": number, "num_params": 1000, "world_size": 1, **facts}
    run |= {"model": asdict(ModelConfig(10, 20, 1, 2, 1, 8))}
    run |= {"init": {"dir": init, "weights_sha256": "0" * 64} if init else None}
    run["settings"] = {"lr": {"value": 0.1, "from": "flag"}, "epochs": {"value": None, "from": "default"}}
    (path / "run.json").write_text(json.dumps(run))
    records = []
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, number + 1):
            record = {
                "step": step,
                "loss": 5 - math.log(step),
                "lr": 0.1 / step,
                "grad_norm": 1.0,
                "tokens": 100 + step,
                "trained_tokens": 50,
                "tokens_per_s": 10.0 * (1 + step % 3),
                "skipped": int(step > 7),
                "memory_bytes": 10**9,
            }
            records.append(record)
            file.write(json.dumps(record) + "\n")
            if step % 5 == 0:
                file.write(json.dumps({"step": step, "val_loss": 6 - math.log(step), "val_bits_per_byte": 1.0}) + "\n")
    return records


def resumption(step: int, device: str = "cpu") -> dict[str, Any]:
    """An entry of `resumed` in run.json."""
    return {"step": step, "time": 0.0, "world_size": 1, "device": device}
