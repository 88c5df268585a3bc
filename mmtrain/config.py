"""What a run is made of: model shapes, training settings, and where each value came from (flag, checkpoint, default).

Nothing here touches files or torch. A setting left at None is one the user did not give; `resolve` fills it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmdata.errors import CheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a model. `vocab_size` 0 in a preset means: as large as the tokenizer's vocabulary."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    qk_norm: bool = False
    max_positions: int = 32768

    @property
    def head_size(self) -> int:
        """Width D of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def num_params(self) -> int:
        """Weights in all, the tied embedding counted once."""
        kv_size = self.num_kv_heads * self.head_size
        attention = 2 * self.hidden_size * (self.hidden_size + kv_size) + 2 * self.head_size * self.qk_norm
        block = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        return self.vocab_size * self.hidden_size + self.num_layers * block + self.hidden_size


# The first three are MiniMind's published shapes (its 6,400 token vocabulary); the last two are ours, for the demo and tests.
PRESETS: dict[str, ModelConfig] = {
    "minimind2": ModelConfig(6400, 768, 16, 8, 2, 2048),
    "minimind2-small": ModelConfig(6400, 512, 8, 8, 2, 1408),
    "minimind3": ModelConfig(6400, 768, 8, 8, 4, 2432, norm_eps=1e-6, qk_norm=True),
    "demo": ModelConfig(0, 128, 2, 4, 2, 352, rope_theta=1e4, qk_norm=True),
    "tiny": ModelConfig(0, 64, 2, 4, 2, 176, rope_theta=1e4),
}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One `mm train`: the stage, its data, and every setting; None where the user gave nothing.

    `warmup` is a share of all steps, `batch_tokens` the tokens of one step over all ranks, `micro_tokens` those one
    rank runs at once. `val_every`, `save_every` and `log_every` count steps; `val_every` 0 measures only at the end.
    """

    stage: str
    data: tuple[Path, ...]
    out: Path
    weights: tuple[float, ...] | None = None  # of `data`, as shares of the tokens; None: every dataset once an epoch
    preset: str | None = None  # minimind2 | minimind3: its defaults for the stage
    model: str | None = None
    init: Path | None = None
    resize_embeddings: str | None = None  # mean | subtoken: grow init's embedding to the data's tokenizer
    steps: int | None = None
    epochs: float | None = None
    batch_tokens: int | None = None
    micro_tokens: int | None = None
    optimizer: str | None = None  # adamw | muon
    lr: float | None = None
    beta2: float | None = None  # of AdamW
    schedule: str | None = None  # cosine | wsd | constant
    warmup: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    lora: int | None = None  # rank of the adapters; 0 trains all weights
    ema: float | None = None  # decay of the weights' average; 0 keeps none
    patience: int | None = None  # validations without a better val loss that end the run; 0: none do
    loss: str | None = None  # this and the next eight: dpo only
    beta: float | None = None
    label_smoothing: float | None = None
    gamma: float | None = None
    sft_weight: float | None = None
    reference: str | None = None  # "start", "none", or a run
    share_prompt: bool | None = None  # None: where the prompts' share makes it faster
    guard: str | None = None  # a packed dataset whose val split shows forgetting
    seed: int | None = None
    max_skipped: int | None = None  # this many non-finite steps in a row end the run
    val_every: int | None = None
    save_every: int | None = None
    keep_last: int | None = None
    log_every: int = 10
    trackers: tuple[str, ...] = ()  # tensorboard, wandb, swanlab, trackio, beside metrics.jsonl
    device: str = "auto"  # auto | cpu | cuda
    compile: bool = True  # on CUDA; elsewhere nothing is compiled
    checkpoint_activations: bool = False  # keep each block's input only and compute the rest again
    resume: bool = False
    other_data: bool = False  # go on although the data is not what the run began with
    quiet: bool = False
    report: bool = True  # keep RUN/report.html fresh at each validation
    samples: bool = True  # and let the model answer a few fixed prompts then
    runs_dir: Path = Path("runs")  # where an earlier run is looked for when `init` is not given


@dataclass(frozen=True, slots=True)
class Settings:
    """The same settings with every value decided. `model` is None where a checkpoint gives the shape; of `steps` and
    `epochs` one may be None."""

    preset: str | None
    model: str | None
    steps: int | None
    epochs: float | None
    batch_tokens: int
    micro_tokens: int
    optimizer: str
    lr: float
    beta2: float
    schedule: str
    warmup: float
    weight_decay: float
    clip: float
    loss: str
    beta: float
    label_smoothing: float
    gamma: float
    sft_weight: float
    reference: str
    share_prompt: bool
    guard: str
    lora: int
    ema: float
    patience: int
    seed: int
    max_skipped: int
    val_every: int
    save_every: int
    keep_last: int


DPO_ONLY = ("loss", "beta", "label_smoothing", "gamma", "sft_weight", "reference", "share_prompt", "guard")

# May differ when a run is resumed; with any other setting changed it would not be the same run.
FREE_ON_RESUME = {
    "micro_tokens",
    "share_prompt",
    "guard",
    "patience",
    "max_skipped",
    "val_every",
    "save_every",
    "keep_last",
}


def resolve(
    config: TrainConfig,
    defaults: Mapping[str, Any],
    saved: Mapping[str, Any] | None = None,
    preset: Mapping[str, Any] | None = None,
) -> tuple[Settings, dict[str, str]]:
    """Decide every setting: flag first, then the checkpoint being resumed, then the preset, then the stage's default.

    Gives the settings and, by name, where each came from. A flag that contradicts a resumed run is refused.
    """
    _check(config)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name in (field.name for field in fields(Settings)):
        given = getattr(config, name)
        if given is not None and saved is not None and name not in FREE_ON_RESUME and saved.get(name) != given:
            raise CheckpointError(
                f"{config.out}: the run was started with {name} {saved.get(name)}, now {given} is asked for",
                f"resume without --{name.replace('_', '-')}, or start a new run with another --out",
            )
        if given is not None:
            values[name], origins[name] = given, "flag"
        elif saved is not None and name in saved:
            values[name], origins[name] = saved[name], "checkpoint"
        elif preset is not None and name in preset:
            values[name], origins[name] = preset[name], "preset"
        else:
            values[name], origins[name] = defaults[name], "default"
    if config.steps is not None:
        values["epochs"] = None  # steps alone decide
    return Settings(**values), origins


def _check(config: TrainConfig) -> None:
    """Refuse flags no run can have."""
    if config.stage != "dpo":
        for name in DPO_ONLY:
            if getattr(config, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} belongs to dpo, not to {config.stage}", f"leave {flag} out")
    if config.schedule not in (None, "cosine", "wsd", "constant"):
        raise UsageError(f"--schedule {config.schedule} is unknown", "use cosine, wsd or constant")
    if config.steps is not None and config.epochs is not None:
        raise UsageError("--steps and --epochs contradict each other", "give one of them")
    positive = ("steps", "epochs", "batch_tokens", "micro_tokens", "lr", "clip", "beta", "max_skipped", "keep_last")
    for name in (*positive, "log_every"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} {value} must be greater than 0", f"leave --{flag} out for the default")
    if config.optimizer not in (None, "adamw", "muon"):
        raise UsageError(f"--optimizer {config.optimizer} is unknown", "use adamw or muon")
    if config.optimizer == "muon" and (config.stage != "pretrain" or config.lora):
        raise UsageError(
            "--optimizer muon is for pretraining: weights that AdamW trained, and adapters, are better left to it",
            "leave --optimizer out",
        )
    for name in ("beta2", "ema"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"--{name} {value} must be at least 0 and below 1", f"leave --{name} out for the default")
    for name in ("lora", "patience"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UsageError(f"--{name} {value} must not be negative", f"leave --{name} out, or give 0, for none")
    if config.lora and config.stage == "pretrain":
        raise UsageError("--lora adapts a trained model; pretraining trains all weights", "leave --lora out")
    if config.warmup is not None and not 0 <= config.warmup < 1:
        raise UsageError(f"--warmup {config.warmup} must be a share of all steps, 0 to 1", "try --warmup 0.03")


def shape_from(name: str, vocab_size: int) -> ModelConfig:
    """A preset's shape for a tokenizer of `vocab_size` ids; UsageError for an unknown name or a too large vocabulary."""
    if name not in PRESETS:
        raise UsageError(f"--model {name} is unknown", f"use one of {', '.join(PRESETS)}")
    shape = PRESETS[name]
    if shape.vocab_size == 0:
        return replace(shape, vocab_size=vocab_size)
    if vocab_size > shape.vocab_size:
        raise UsageError(
            f"the tokenizer has {vocab_size:,} ids, model {name} only {shape.vocab_size:,}",
            "pack with a smaller tokenizer, or use --model demo, which takes the tokenizer's size",
        )
    return shape


def as_json(config: Settings | ModelConfig) -> dict[str, Any]:
    """The values by name, as JSON holds them."""
    return asdict(config)


def model_config_from(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from `as_json`'s values; unknown keys are an error of ours."""
    assert set(values) <= {field.name for field in fields(ModelConfig)}, sorted(values)
    return ModelConfig(**values)
