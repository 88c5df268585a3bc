"""Which value each setting of a run gets: that of its flag, the run being resumed, MiniMind's preset, or the default."""

from collections.abc import Mapping

from mmdata.errors import CheckpointError, UsageError
from mmdata.options import check, flag_of, options_of
from mmtrain.config import (
    CUDA_MICRO_TOKENS,
    LOSS_BETAS,
    SIMPO_GAMMA,
    SettingValues,
    TrainOptions,
    TrainSettings,
    stage_defaults,
)

# The defaults of the project MiniMind, from its trainers of 2025-04-04 (minimind2) and 2026-08-21 (minimind3), so that
# results can be compared with it. `batch_tokens` is MiniMind's micro-batch size x accumulation x sequence length. mm
# fills nearly all of these positions with tokens, MiniMind about half of them. Two differences remain: MiniMind also
# applies weight decay to norm weights, and the learning rate of its earlier trainer begins at 1.1 times --lr instead of
# 1.0 times.
_TORCH_ADAMW = {"schedule": "cosine", "warmup": 0.0, "weight_decay": 0.01, "beta2": 0.999, "clip": 1.0}
# Mean number of tokens per pair in MiniMind's dpo.jsonl, among pairs that fit in 1,024 tokens; the prompt counts twice.
_PAIR_TOKENS = 880
_DPO2 = {"epochs": 2.0, "batch_tokens": 4 * _PAIR_TOKENS, "loss": "sigmoid_norm", "beta": 0.1}
_DPO3 = {"epochs": 1.0, "batch_tokens": 4 * _PAIR_TOKENS, "loss": "sigmoid", "beta": 0.15}

# preset -> stage -> settings; the stage is "lora" for sft and dpo with --lora
PRESET_SETTINGS: Mapping[str, Mapping[str, SettingValues]] = {
    "minimind2": {
        "pretrain": {"model": "minimind2", "epochs": 1.0, "batch_tokens": 32 * 8 * 512, "lr": 5e-4},
        "sft": {"model": "minimind2", "epochs": 1.0, "batch_tokens": 32 * 512, "lr": 5e-5},
        "dpo": {"model": "minimind2", "lr": 1e-8} | _DPO2,
        "lora": {"model": "minimind2", "epochs": 50.0, "batch_tokens": 16 * 512, "lr": 5e-5},
    },
    "minimind3": {
        "pretrain": {"model": "minimind3", "epochs": 2.0, "batch_tokens": 32 * 8 * 340, "lr": 5e-4},
        "sft": {"model": "minimind3", "epochs": 2.0, "batch_tokens": 16 * 768, "lr": 1e-5},
        "dpo": {"model": "minimind3", "lr": 4e-8} | _DPO3,
        "lora": {"model": "minimind3", "epochs": 10.0, "batch_tokens": 32 * 340, "lr": 1e-4},
    },
}
# Defaults with --optimizer muon and with --lora. muon's learning rate for pretrain was measured on a small model
# (tests/bench/RESULTS.md), not at 26M to 104M parameters; that for sft is smaller as AdamW's is. The latter and the
# values for LoRA were chosen without measuring.
MUON_RATES = {"pretrain": 4e-3, "sft": 1.2e-3}
LORA_DEFAULTS = {"lr": 2e-3, "weight_decay": 0.0}


def preset_settings(options: TrainOptions) -> SettingValues:
    """Return the settings of the preset `options.preset` for the stage, by name; empty without a preset. With --lora
    these are its LoRA settings; for dpo its dpo settings (except the learning rate) override them."""
    if options.preset is None:
        return {}
    stages = PRESET_SETTINGS[options.preset]
    if not options.lora:
        return {**_TORCH_ADAMW, **stages[options.stage]}
    pairs = {"dpo": _DPO2 if options.preset == "minimind2" else _DPO3}.get(options.stage, {})
    return {**_TORCH_ADAMW, **stages["lora"], **pairs}


def resolve(
    options: TrainOptions,
    *,
    saved: SettingValues | None = None,
    has_init: bool = False,
    device: str = "cpu",
    share_prompt: bool = False,
) -> tuple[TrainSettings, dict[str, str]]:
    """Decide every setting: the first that exists of flag, checkpoint being resumed, preset, and default of the stage.
    Return the settings and, by name, where each came from: "flag", "checkpoint", "preset" or "default".

    saved: recorded settings of the run being resumed, else None. has_init: whether a checkpoint gives the model's
    shape; `model` is then None unless given by flag. device, share_prompt (computing shared prompts once is faster for
    this data): for the defaults that depend on them. With --steps, `epochs` is None. Raises UsageError as
    `check_options` does, and CheckpointError if a flag changes a setting of the run being resumed that may not change.
    """
    check_options(options)
    preset, defaults = preset_settings(options), stage_defaults(options.stage)
    if options.lora:
        defaults |= LORA_DEFAULTS
    elif options.optimizer == "muon":
        defaults["lr"] = MUON_RATES[options.stage]
    if device == "cuda":
        defaults["micro_tokens"] = CUDA_MICRO_TOKENS
    if options.stage == "dpo":
        loss = options.loss or preset.get("loss") or defaults["loss"]
        defaults |= {"beta": LOSS_BETAS[loss], "gamma": SIMPO_GAMMA if loss == "simpo" else 0.0}
        defaults["share_prompt"] = share_prompt
    # These schedules do not depend on the length of the run before their end, so that it may be changed.
    has_free_length = saved is not None and saved.get("schedule") in ("wsd", "constant")
    values: SettingValues = {}
    origins: dict[str, str] = {}
    for name, known in options_of(TrainSettings):
        value = getattr(options, name)
        if value is not None:
            may_change = known.may_change_on_resume or (name in ("steps", "epochs") and has_free_length)
            if saved is not None and not may_change and saved.get(name) != value:
                raise CheckpointError(
                    f"{options.out}: the run was started with {name} {saved.get(name)}, now {value} is asked for",
                    f"resume without {flag_of(name, known)}, or start a new run with another --out",
                )
            values[name], origins[name] = value, "flag"
        elif saved is not None and name in saved:
            values[name], origins[name] = saved[name], "checkpoint"
        elif name == "model" and has_init:
            values[name], origins[name] = None, "checkpoint"
        elif name == "model" and options.depth:
            values[name], origins[name] = None, "default"
        elif name in preset:
            values[name], origins[name] = preset[name], "preset"
        else:
            values[name], origins[name] = defaults[name], "default"
    if options.steps is not None:
        values["epochs"] = None  # --steps replaces --epochs
    elif options.epochs is not None:
        values["steps"] = None  # also that of a run being resumed
    return TrainSettings(**values), origins


def check_options(options: TrainOptions) -> None:
    """Raise UsageError if a value is out of range, does not apply to the stage, or two options exclude each other."""
    check(options)
    for name, known in options_of(options):
        if known.stages and options.stage not in known.stages and getattr(options, name) is not None:
            flag = flag_of(name, known).split("/")[0]
            raise UsageError(
                f"{flag} belongs to {', '.join(known.stages)}, not to {options.stage}", f"leave {flag} out"
            )
    if options.steps is not None and options.epochs is not None:
        raise UsageError("--steps and --epochs contradict each other", "give one of them")
    if options.depth and (other := next((n for n in ("model", "layers", "width") if getattr(options, n)), None)):
        raise UsageError(f"--depth and --{other} both say how large the model is", "give one of them")
    if options.optimizer == "muon" and (options.stage == "dpo" or options.lora):
        raise UsageError("--optimizer muon is for pretrain and sft, without --lora", "leave --optimizer out")
    if options.lora and options.stage == "pretrain":
        raise UsageError("--lora adapts a trained model; pretraining trains all weights", "leave --lora out")
    if options.resize_embeddings and options.lora:
        raise UsageError(
            "--lora leaves the embedding as it is, so the new tokens would never be learned",
            "leave --lora out of this run, and adapt the run that comes of it",
        )
    if options.other_data and not options.resume:
        raise UsageError("--other-data goes with --resume", "leave it out: a new run takes any data")
