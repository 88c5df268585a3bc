"""fp16 on the CPU: the loss scale falls on an overflow and grows again, and neither ends a run or is lost by a resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_data import Data, run_json
from train_runs import at_step, config_of, interrupt, lines, steps

from mmdata.errors import TrainError
from mmtrain import checkpoint
from mmtrain.config import TrainOptions
from mmtrain.model import precision
from mmtrain.model.batch import Batch
from mmtrain.model.model import Model
from mmtrain.model.precision import LossScale
from mmtrain.model.preference import Objective
from mmtrain.model.stages import STAGES, Outcome, next_token
from mmtrain.train.loop import train


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Every device computes in fp16, as cards without bf16 do."""
    for name in ("model.precision", "train.run", "train.reference", "train.loop"):
        monkeypatch.setattr(f"mmtrain.{name}.autocast_dtype", lambda device: torch.float16)
    return monkeypatch


def half(data: Data, out: Path, **settings: Any) -> TrainOptions:
    options = {"batch_tokens": 256, "val_every": 0, "report": False, "samples": False, **settings}
    return config_of("sft", data, out, model="tiny", **options)


def test_a_scale_that_is_off_is_one_and_stays_so() -> None:
    scale = LossScale(torch.bfloat16, torch.device("cpu"))
    scale.update(torch.tensor(0.0))
    assert not scale.is_on and scale.value == 1 and scale.tensors() == {}


def test_the_scale_never_falls_below_one() -> None:
    scale = LossScale(torch.float16, torch.device("cpu"))
    for _ in range(12):
        scale.update(torch.tensor(0.0))
    assert scale.value == 1


def test_fp16_learns_what_fp32_learns(data: Data, tmp_path: Path, fp16: pytest.MonkeyPatch) -> None:
    train(half(data, tmp_path / "fp16", quiet=True))
    fp16.undo()
    train(half(data, tmp_path / "fp32", quiet=True))
    found, exact = steps(tmp_path / "fp16"), steps(tmp_path / "fp32")
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in exact], rel=5e-3)
    assert found != exact and all(line["loss_scale"] == precision.SCALE for line in found)
    assert not any("loss_scale" in line for line in exact)
    assert run_json(tmp_path / "fp16")["precision"] == "float16"


def test_an_overflow_skips_steps_and_halves_the_scale_until_gradients_fit(
    data: Data, tmp_path: Path, fp16: pytest.MonkeyPatch
) -> None:
    """More overflows in a row than --max-skipped allows of diverging steps: they are none."""
    fp16.setattr(precision, "SCALE", 2.0**18)
    run = half(data, tmp_path / "run", steps=20, max_skipped=2)
    said: list[str] = []
    result = train(run, log=said.append)
    found = steps(run.out)
    num_skipped = result.num_skipped
    assert 2 < num_skipped < 18 and found[-1]["skipped"] == num_skipped
    assert [line["loss_scale"] for line in found[: num_skipped + 1]] == [
        2.0 ** (18 - k) for k in range(num_skipped + 1)
    ]
    assert [line["grad_norm"] is None for line in found] == [True] * num_skipped + [False] * (20 - num_skipped)
    assert len({line["loss"] for line in found[:4]}) > 1  # other batches, the same weights
    assert found[-1]["loss"] < 0.95 * found[0]["loss"]
    assert sum("too large for fp16 at a loss scale of" in line for line in said) == num_skipped


def test_a_loss_that_is_not_finite_still_ends_the_run(data: Data, tmp_path: Path, fp16: pytest.MonkeyPatch) -> None:
    """Divergence is one whatever the scale."""
    run = half(data, tmp_path / "run", lr=1e30, warmup=0.0, clip=1e30, steps=20, max_skipped=3, quiet=True)
    with pytest.raises(TrainError, match="3 steps in a row were not finite"):
        train(run)


def test_the_scale_grows_after_good_steps_and_survives_a_resume(
    data: Data, tmp_path: Path, fp16: pytest.MonkeyPatch
) -> None:
    fp16.setattr(precision, "GROW_AFTER", 4)
    whole, broken = (half(data, tmp_path / name) for name in ("whole", "broken"))
    train(whole, log=lambda line: None)
    assert [line["loss_scale"] for line in steps(whole.out)] == [256.0] * 4 + [512.0] * 3
    with pytest.raises(KeyboardInterrupt):
        train(broken, log=at_step(4, interrupt))  # the last checkpoint, of step 3, has three good steps of four
    saved = load_file(checkpoint.find(broken.out).dir / "optimizer.safetensors")
    assert [float(value) for name, value in sorted(saved.items()) if "scale/" in name] == [3.0, 256.0]
    train(TrainOptions("sft", (), broken.out, resume=True, device="cpu", quiet=True, report=False, samples=False))
    assert lines(broken.out) == lines(whole.out)
    assert checkpoint.find(broken.out).weights_sha256 == checkpoint.find(whole.out).weights_sha256


def test_a_batch_without_trained_tokens_leaves_the_scale_alone(
    data: Data, tmp_path: Path, fp16: pytest.MonkeyPatch
) -> None:
    def nothing(model: Model, batch: Batch, ref: None, objective: Objective) -> Outcome:
        none = replace(batch, trained=batch.trained[:0], sequence_ids=batch.sequence_ids[:0], num_trained=0)
        return next_token(model, none, ref, objective)

    fp16.setitem(STAGES, "sft", replace(STAGES["sft"], loss=nothing))
    result = train(half(data, tmp_path / "run", quiet=True))
    assert result.num_skipped == 0 and {line["loss_scale"] for line in steps(tmp_path / "run")} == {256.0}
