"""Defaults that follow from the size of the data, where the stage's own would give a run of a few steps.

A setting is only changed if it has its stage's default, and none is changed for data that gives LEAST_STEPS steps with
these defaults and a token for every parameter, except that a run of fewer than 2,000 steps is validated more often.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from mmtrain.config import STAGE_KINDS, TrainSettings, shape_from, stage_defaults
from mmtrain.shapes import ModelConfig, shape_of

# New weights need more steps: after 130 steps on 0.5M tokens of text a model of 0.5M parameters is still at 7 nats.
LEAST_STEPS = {"pretrain": 300, "sft": 100, "dpo": 100}
SHORT_STEPS = 50  # a run of fewer steps gets a warning
LEAST_BATCH_TOKENS = {"pretrain": 4096, "sft": 2048, "dpo": 4096}
# Where even the most epochs give fewer than FEW_STEPS steps of LEAST_BATCH_TOKENS, batches become smaller still.
FEW_STEPS, FEWEST_BATCH_TOKENS = 100, 512
MOST_EPOCHS = {"pretrain": 10.0, "sft": 20.0, "dpo": 3.0}
VALIDATIONS = 10  # of a run of fewer than VALIDATIONS times the default --val-every steps
MODELS = ("minimind2-small", "mini", "demo", "tiny")  # from the largest to the smallest
# More than about four passes over the same text teach little more (Muennighoff et al. 2023).
USEFUL_PASSES = 4


def fit_to_data(
    settings: TrainSettings,
    origins: Mapping[str, str],
    *,
    stage: str,
    tokens_per_epoch: int,
    vocab_size: int,
    least_batch_tokens: int = 0,
) -> tuple[TrainSettings, dict[str, str]]:
    """Return the settings with batch, epochs, validations and, for pretraining, a model that fit the data, and where
    each came from ("data: RULE" if changed here). tokens_per_epoch: of the train splits. vocab_size: of their
    tokenizer. least_batch_tokens: the smallest batch that gives every rank a sequence."""
    origins = dict(origins)
    # With --steps the batch is that of a run without it, not one that needs many passes over small data.
    passes = settings.epochs or stage_defaults(stage).get("epochs") or 1.0
    batch, least_steps = settings.batch_tokens, LEAST_STEPS[stage]

    def steps() -> int:
        return math.ceil(passes * tokens_per_epoch / batch)

    if origins["batch_tokens"] == "default":
        least = max(LEAST_BATCH_TOKENS[stage], least_batch_tokens)
        batch = halved(batch, round(passes * tokens_per_epoch), least_steps, least)
        if batch != settings.batch_tokens:
            origins["batch_tokens"] = f"data: about {least_steps} steps"
    if steps() < least_steps and origins["epochs"] == "default":
        needed = math.ceil(least_steps * batch / max(1, tokens_per_epoch))
        passes = max(passes, min(MOST_EPOCHS[stage], needed))
        if settings.steps is None:
            origins["epochs"] = f"data: about {least_steps} steps, at most {MOST_EPOCHS[stage]:g} epochs"
        least = max(FEWEST_BATCH_TOKENS, least_batch_tokens)
        smaller = halved(batch, round(passes * tokens_per_epoch), FEW_STEPS, least)
        if smaller != batch and origins["batch_tokens"].startswith("data"):
            batch = smaller
            origins["batch_tokens"] = f"data: about {FEW_STEPS} steps, at least {FEWEST_BATCH_TOKENS} tokens"
    settings = replace(settings, batch_tokens=batch, epochs=None if settings.steps else passes)
    num_steps = settings.steps or steps()
    if origins["val_every"] == "default" and 2 * VALIDATIONS <= num_steps < VALIDATIONS * settings.val_every:
        settings = replace(settings, val_every=num_steps // VALIDATIONS)
        origins["val_every"] = f"data: {VALIDATIONS} validations"
    is_default = settings.model and origins["model"] == "default"
    if (
        stage == "pretrain"
        and is_default
        and shape_from(settings, vocab_size) == shape_of(str(settings.model), vocab_size)
    ):
        fitting = (name for name in MODELS if shape_of(name, vocab_size).num_params <= tokens_per_epoch)
        model = next(fitting, MODELS[-1])
        if model != settings.model:
            settings, origins["model"] = replace(settings, model=model), "data: no more parameters than tokens"
    return settings, origins


def settings_for(stage: str, tokens_per_epoch: int, *, max_len: int = 0, **given: Any) -> TrainSettings:
    """Return what `fit_to_data` decides for a run of one rank with only these settings `given`. max_len: of its data."""
    settings = TrainSettings(**{**stage_defaults(stage), **given})
    return fit_to_data(
        replace(settings, model=None, epochs=None if settings.steps else settings.epochs),
        {name: "flag" if name in given else "default" for name in TrainSettings.__dataclass_fields__},
        stage=stage,
        tokens_per_epoch=tokens_per_epoch,
        vocab_size=0,
        least_batch_tokens=max_len * (2 if STAGE_KINDS[stage] == "pair" else 1),
    )[0]


def halved(batch: int, num_tokens: int, num_steps: int, least: int) -> int:
    """Return `batch`, halved until `num_tokens` tokens give `num_steps` steps, but not below `least`."""
    while num_tokens / batch <= num_steps - 1 and batch // 2 >= least:
        batch //= 2
    return batch


def lines(
    settings: TrainSettings,
    origins: Mapping[str, str],
    *,
    tokens_per_epoch: int,
    num_steps: int,
    new: ModelConfig | None,
) -> Iterator[str]:
    """Yield console lines: the settings that follow from the data, and warnings of a run that is too short or a model
    that is too large for it. new: the shape of a model that is trained from scratch, else None."""
    values = {
        "batch_tokens": f"batches of {settings.batch_tokens:,} tokens",
        "epochs": f"{settings.epochs or 0:g} epochs",
        "val_every": f"a validation every {settings.val_every:,} steps",
        "model": f"--model {settings.model}",
    }
    if chosen := [text for name, text in values.items() if origins[name].startswith("data")]:
        yield f"for {tokens_per_epoch:,} tokens: {', '.join(chosen)}"
    if settings.steps is None and num_steps < SHORT_STEPS:
        yield f"warning: {num_steps:,} steps teach a model little: train on more rows, or with more --epochs"
    if new and new.num_params > USEFUL_PASSES * tokens_per_epoch:
        yield (
            f"warning: {new.num_params:,} parameters are many for {tokens_per_epoch:,} tokens, which the model will only "
            "memorise: train on more rows, or a smaller --model"
        )
