"""When a run ends early, and that it is said, resumed and recorded."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from train_data import Data, pack_to, run_json
from train_runs import config_of, lines, refused_run

from mmdata.errors import UsageError
from mmtrain import checkpoint
from mmtrain.config import TrainOptions
from mmtrain.log import metrics
from mmtrain.log.console import Console
from mmtrain.train.loop import train


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], 0),
        ([2.0], 0),
        ([2.0, 1.0], 0),
        ([1.0, 2.0], 1),
        ([1.0, 1.0, 1.0], 2),
        ([3.0, 1.0, 2.0, 1.5], 2),
        ([math.nan], 1),
        ([math.nan, 2.0], 0),
        ([2.0, math.nan, math.nan], 2),
    ],
)
def test_counting_since_the_best(losses: list[float], expected: int) -> None:
    assert metrics.num_since_best(losses) == expected


def test_val_losses_are_read_back_exactly(tmp_path: Path) -> None:
    log = metrics.MetricsLog(tmp_path, num_steps=9, first_step=0, log_every=1, console=Console(None))
    for step, loss in enumerate((0.1 + 0.2, math.nan, 1e-300)):
        log.val({"step": step, "val_loss": loss})
    log.close()
    first, second, third = metrics.val_losses(tmp_path)
    assert (first, third) == (0.1 + 0.2, 1e-300) and math.isnan(second)
    assert metrics.val_losses(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("margin", "printed"), [(-1e-6, "+0.000"), (-0.0006, "-0.001"), (1.25, "+1.250"), (-12.34, "-12.3")]
)
def test_a_margin_has_its_sign_unless_it_is_printed_as_zero(margin: float, printed: str) -> None:
    assert f"margin {printed}" in metrics.val_line({"val_accuracy": 0.5, "val_reward_margin": margin})


def test_a_run_that_gets_no_better_ends_early_and_stays_ended(data: Data, tmp_path: Path) -> None:
    """With a rate this small no weight moves, so that no validation is better than the first."""
    base = config_of("sft", data, tmp_path / "run", model="tiny", val_every=1, lr=1e-30, patience=2)
    said: list[str] = []
    result = train(base, log=said.append)
    assert (result.final_step, result.num_steps, result.is_interrupted) == (3, 7, False)
    assert "no better val loss in 2 validations" in result.early_stop
    facts = run_json(base.out)
    assert facts["status"] == "finished" and facts["result"]["early_stop"] == result.early_stop
    assert checkpoint.find(base.out).step == 3
    written = (base.out / "metrics.jsonl").read_bytes()
    (base.out / "metrics.jsonl").write_bytes(b"")  # decides nothing
    again = train(TrainOptions("sft", (), base.out, resume=True, device="cpu", quiet=True))
    (base.out / "metrics.jsonl").write_bytes(written)
    assert (again.first_step, again.final_step, again.early_stop) == (3, 3, result.early_stop)
    further = train(TrainOptions("sft", (), base.out, resume=True, device="cpu", quiet=True, patience=0))
    assert (further.first_step, further.final_step, further.early_stop) == (3, 7, "")
    assert len(lines(base.out)) == 14


def test_a_run_that_gets_better_is_not_ended(data: Data, tmp_path: Path) -> None:
    result = train(config_of("sft", data, tmp_path / "run", model="tiny", val_every=1, patience=1, quiet=True))
    assert result.final_step == 7 and result.early_stop == ""


def test_patience_without_validations_is_refused(data: Data, tmp_path: Path) -> None:
    base = config_of("sft", data, tmp_path / "run", model="tiny", patience=2)
    refused_run(UsageError, "--patience 2 counts validations", "--val-every", replace(base, val_every=0))
    pack_to(data, "sft", tmp_path / "no_val", val_fraction=0.0)
    refused_run(UsageError, "--patience 2 counts validations", "val split", replace(base, data=(tmp_path / "no_val",)))
