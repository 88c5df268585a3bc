"""Settings that follow from small data, and only from small data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_data import Data, run_json
from train_runs import config_of

from mmtrain.config import STAGE_KINDS, TrainOptions, TrainSettings
from mmtrain.resolve import resolve
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.sizing import LEAST_STEPS, MODELS, MOST_EPOCHS, fit_to_data, lines, settings_for


def fitted(stage: str, tokens: int, least: int = 0, **given: Any) -> tuple[TrainSettings, dict[str, str]]:
    settings, origins = resolve(TrainOptions(stage, (), Path("run"), **given))
    return fit_to_data(
        settings, origins, stage=stage, tokens_per_epoch=tokens, vocab_size=6400, least_batch_tokens=least
    )


@pytest.mark.parametrize("stage", STAGE_KINDS)
def test_nothing_changes_for_large_data_or_what_was_given(stage: str) -> None:
    large = resolve(TrainOptions(stage, (), Path("run")))
    assert fitted(stage, 10**9) == large
    told: dict[str, Any] = {"batch_tokens": 32_768, "epochs": 1.0, "val_every": 7, "model": "minimind2"}
    for options in (told, told | {"epochs": None, "steps": 50}):
        assert fitted(stage, 30_000, **options) == resolve(TrainOptions(stage, (), Path("run"), **options))


@pytest.mark.parametrize("stage", STAGE_KINDS)
@pytest.mark.parametrize("given", [{}, {"epochs": 2.0}, {"steps": 40}, {"batch_tokens": 8192}])
def test_a_plan_of_data_and_a_run_decide_the_same(stage: str, given: dict[str, Any]) -> None:
    for tokens in (3000, 40_000, 700_000, 10**8):
        run = fitted(stage, tokens, least=512 * (1 + (stage == "dpo")), **given)[0]
        plan = settings_for(stage, tokens, max_len=512, **given)
        assert (plan.batch_tokens, plan.epochs, plan.steps) == (run.batch_tokens, run.epochs, run.steps)


@pytest.mark.parametrize("stage", STAGE_KINDS)
@pytest.mark.parametrize("tokens", [10_000, 60_000, 300_000, 2_000_000, 6_000_000])
def test_small_data_gives_enough_steps_or_the_most_passes(stage: str, tokens: int) -> None:
    settings, origins = fitted(stage, tokens)
    assert settings.epochs
    steps = settings.epochs * tokens / settings.batch_tokens
    default = resolve(TrainOptions(stage, (), Path("run")))[0]
    assert steps > LEAST_STEPS[stage] - 1 or settings.epochs == MOST_EPOCHS[stage]
    assert steps < 2 * LEAST_STEPS[stage] + 1 or settings.batch_tokens == default.batch_tokens
    assert default.epochs
    is_changed = default.epochs * tokens / default.batch_tokens <= LEAST_STEPS[stage] - 1
    assert origins["batch_tokens"].startswith("data") == is_changed
    if steps > 20:
        assert 10 <= steps / settings.val_every < 20


@pytest.mark.parametrize(("stage", "tokens"), [("sft", 4000), ("dpo", 18_000), ("pretrain", 6000)])
def test_very_short_rows_give_smaller_batches_where_the_most_epochs_do_not_give_100_steps(
    stage: str, tokens: int
) -> None:
    settings, origins = fitted(stage, tokens)
    assert settings.epochs == MOST_EPOCHS[stage] and settings.batch_tokens in (512, 1024)
    assert 100 <= settings.epochs * tokens / settings.batch_tokens < 200
    assert origins["batch_tokens"] == "data: about 100 steps, at least 512 tokens"
    assert fitted(stage, tokens // 20)[0].batch_tokens == 512
    assert fitted(stage, tokens, batch_tokens=8192)[0].batch_tokens == 8192


@pytest.mark.parametrize("stage", STAGE_KINDS)
@pytest.mark.parametrize("tokens", [4000, 60_000, 2_000_000, 10**9])
def test_with_steps_the_batch_is_that_of_a_run_without(stage: str, tokens: int) -> None:
    settings, origins = fitted(stage, tokens, steps=60)
    assert settings.batch_tokens == fitted(stage, tokens)[0].batch_tokens
    assert settings.steps == 60 and settings.epochs is None and not origins["epochs"].startswith("data")
    assert fitted(stage, tokens, steps=60, batch_tokens=8192)[0].batch_tokens == 8192


def test_every_rank_gets_a_sequence() -> None:
    assert fitted("sft", 10_000, least=8192)[0].batch_tokens == 8192


def test_a_new_model_has_no_more_parameters_than_the_data_tokens() -> None:
    sizes = [replace(MODEL_SHAPES[name], vocab_size=6400).num_params for name in MODELS]
    assert sizes == sorted(sizes, reverse=True)
    for name, size in zip(MODELS, sizes, strict=True):
        assert fitted("pretrain", size)[0].model == name
    assert fitted("pretrain", 100)[0].model == MODELS[-1]
    assert fitted("sft", 100)[0].model == MODELS[0]
    assert fitted("pretrain", 100, layers=3)[0].model == MODELS[0]  # the user has chosen a shape
    assert fitted("pretrain", 100, depth=2)[0].depth == 2 and "model" in fitted("pretrain", 100, depth=2)[1]


def test_a_run_says_what_the_data_decided_and_what_it_cannot_teach(data: Data, tmp_path: Path) -> None:
    from mmtrain.train.loop import train

    said: list[str] = []
    options = config_of("pretrain", data, tmp_path / "run", steps=None, val_every=None)
    trained = train(replace(options, samples=False, report=False), log=said.append)
    assert 20 <= trained.num_steps < 100 and trained.final_step == trained.num_steps
    settings = run_json(tmp_path / "run")["settings"]
    assert settings["epochs"] == {"value": 10.0, "from": "data: about 300 steps, at most 10 epochs"}
    assert settings["model"]["value"] == "tiny" and settings["batch_tokens"] == {"value": 512, "from": "flag"}
    every = settings["val_every"]["value"]
    assert f"10 epochs, a validation every {every} steps, --model tiny" in "\n".join(said)
    assert len([line for line in said if " val " in line]) >= 10


def test_warnings_of_a_short_run_and_of_a_large_model() -> None:
    settings, origins = resolve(TrainOptions("pretrain", (), Path("run"), epochs=1.0, model="minimind2"))
    shape = MODEL_SHAPES["minimind2"]

    def warnings(num_steps: int, tokens: int) -> list[str]:
        found = lines(settings, origins, tokens_per_epoch=tokens, num_steps=num_steps, new=shape)
        return [line.split()[2] for line in found if line.startswith("warning: ")]

    assert warnings(49, 10**6) == ["steps", "parameters"]
    assert warnings(50, shape.num_params // 4 + 1) == []
