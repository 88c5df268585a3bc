"""Which value wins, and what is refused before anything begins."""

import math
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from mmdata.errors import CheckpointError, UsageError
from mmdata.options import options_of
from mmtrain.config import LOSS_BETAS, STAGE_KINDS, TrainOptions, TrainSettings, stage_defaults
from mmtrain.model.preference import LOSSES
from mmtrain.resolve import PRESET_SETTINGS, check_options, resolve
from mmtrain.shapes import MODEL_SHAPES


def decide(stage: str, saved: dict[str, Any] | None = None, **given: Any) -> tuple[TrainSettings, dict[str, str]]:
    return resolve(TrainOptions(stage, (), Path("run"), **given), saved=saved)


@pytest.mark.parametrize("preset", PRESET_SETTINGS)
@pytest.mark.parametrize("stage", STAGE_KINDS)
def test_a_preset_stands_between_flags_and_defaults(preset: str, stage: str) -> None:
    settings, origins = decide(stage, preset=preset, epochs=3.0)
    expected = PRESET_SETTINGS[preset][stage]
    assert (settings.lr, origins["lr"]) == (expected["lr"], "preset") and settings.beta2 == 0.999
    assert (settings.epochs, origins["epochs"]) == (3.0, "flag")
    assert (settings.keep_last, origins["keep_last"]) == (stage_defaults(stage)["keep_last"], "default")
    assert settings.model == preset and settings.preset == preset


def test_every_preset_names_settings_and_a_shape_that_exist() -> None:
    names = {field.name for field in fields(TrainSettings)}
    for preset in PRESET_SETTINGS.values():
        assert set(preset) == {*STAGE_KINDS, "lora"}
        for values in preset.values():
            assert set(values) <= names and values["model"] in MODEL_SHAPES


def test_adapters_have_settings_of_their_own() -> None:
    assert decide("sft", lora=8)[0].lr > decide("sft")[0].lr
    settings = decide("sft", lora=16, preset="minimind3")[0]
    assert (settings.lr, settings.batch_tokens, settings.epochs) == (1e-4, 10_880, 10.0)
    pairs = decide("dpo", lora=8, preset="minimind3")[0]
    assert (pairs.beta, pairs.epochs, pairs.lora) == (0.15, 1.0, 8)


def test_what_a_run_was_started_with_stays() -> None:
    saved = asdict(decide("pretrain", preset="minimind2", optimizer="muon")[0])
    settings, origins = decide("pretrain", saved)
    assert asdict(settings) == saved and set(origins.values()) == {"checkpoint"}
    assert decide("pretrain", saved, patience=3)[0].patience == 3  # may be asked for later
    for name, value in (("preset", "minimind3"), ("optimizer", "adamw"), ("ema", 0.9)):
        with pytest.raises(CheckpointError, match=f"started with {name}"):
            decide("pretrain", saved, **{name: value})


@pytest.mark.parametrize("schedule", ["wsd", "constant", "cosine"])
def test_a_run_whose_schedule_does_not_depend_on_its_length_may_be_lengthened(schedule: str) -> None:
    saved = asdict(decide("sft", steps=4, schedule=schedule)[0])
    if schedule == "cosine":
        with pytest.raises(CheckpointError, match="started with steps 4, now 8"):
            decide("sft", saved, steps=8)
        return
    settings, origins = decide("sft", saved, steps=8)
    assert (settings.steps, settings.epochs, origins["steps"]) == (8, None, "flag")
    settings = decide("sft", saved, epochs=3.0)[0]
    assert (settings.steps, settings.epochs) == (None, 3.0)


def test_a_run_of_before_a_setting_was_there_takes_its_default() -> None:
    saved = {k: v for k, v in asdict(decide("sft")[0]).items() if k not in ("ema", "optimizer")}
    settings, origins = decide("sft", saved)
    assert settings.optimizer == "adamw" and origins["optimizer"] == "default" and origins["lr"] == "checkpoint"


@pytest.mark.parametrize(
    ("stage", "given", "what"),
    [
        ("pretrain", {"preset": "gpt4"}, "--preset gpt4 is unknown"),
        ("pretrain", {"optimizer": "sgd"}, "--optimizer sgd is unknown"),
        ("dpo", {"optimizer": "muon"}, "is for pretrain and sft"),
        ("pretrain", {"lora": 8}, "pretraining trains all weights"),
        ("sft", {"lora": -1}, "--lora -1"),
        ("sft", {"ema": 1.0}, "--ema 1.0"),
        ("sft", {"beta2": -0.1}, "--beta2 -0.1"),
        ("sft", {"patience": -2}, "--patience -2"),
    ],
)
def test_what_no_run_can_have_is_refused(stage: str, given: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        decide(stage, **given)
    assert caught.value.fix


LEAST = {name: known.least for name, known in options_of(TrainOptions) if known.least is not None}


@pytest.mark.parametrize("name", LEAST)
def test_no_number_that_is_not_finite_or_too_small_passes(name: str) -> None:
    for value in (math.nan, math.inf, LEAST[name] - 1):
        with pytest.raises(UsageError, match=re.escape(f"--{name.replace('_', '-')} {value}")):
            check_options(TrainOptions("dpo", (), Path("run"), **{name: value}))


@pytest.mark.parametrize("name", ["epochs", "lr", "clip", "beta"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, -math.inf])
def test_rates_are_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name} {value}"):
        check_options(TrainOptions("dpo", (), Path("run"), **{name: value}))


def test_every_setting_says_what_it_does_and_has_a_default_for_every_stage() -> None:
    for name, known in options_of(TrainOptions):
        assert known.help and known.group, name
    for name, known in options_of(TrainSettings):
        assert known.by_stage is not None and known.by_stage.keys() == STAGE_KINDS.keys(), name
    assert set(LOSS_BETAS) == set(LOSSES)
