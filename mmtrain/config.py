"""Training options: every option of `mm train`, and its default for each stage. `TrainSettings` defines a run and is
recorded with it; `TrainOptions` adds what is of a single call, such as the data and the run directory. A setting that
the user did not give is None until `resolve.resolve` sets it. Imports no torch and reads no files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from mmdata.errors import UsageError
from mmdata.options import INT64, check_value, flag_of, option, options_of
from mmtrain.shapes import MODEL_SHAPES, ModelConfig, check_heads, ffn_for, shape_of, shape_of_depth

SettingValues = dict[str, Any]  # settings by name, as run.json and checkpoints record them
STAGE_KINDS = {"pretrain": "document", "sft": "conversation", "dpo": "pair"}  # stage -> kind of rows it trains on

# --- options

# Headings that group the options in `mm train --help`.
HEADINGS = (
    *("Data", "Model", "Length of the run", "Optimizer", "Preferences"),
    *("Adapters", "Checkpoints", "Logging", "Hardware"),
)
DATA, MODEL, LENGTH, OPTIMIZER, PREFERENCES, ADAPTERS, CHECKPOINTS, LOGGING, HARDWARE = HEADINGS

# Value used for pretraining GPT-3 and Llama. It averages over fewer steps than torch's default 0.999.
BETA2 = 0.95
# Default beta of each dpo loss. The values of sigmoid, simpo and orpo are those of their papers; that of sigmoid_norm
# is Tülu 3's. For ipo, beta is the paper's tau: with 1.0 the loss aims at a margin of 1 / (2 tau) = 0.5 nats per token.
LOSS_BETAS = {"sigmoid": 0.1, "sigmoid_norm": 5.0, "robust": 0.1, "hinge": 0.1, "ipo": 1.0, "simpo": 2.0, "orpo": 0.1}
SIMPO_GAMMA = 1.0  # half of simpo's beta, the ratio in Table 8 of the SimPO paper for most models
# First value on CUDA, replaced by what fits in memory. A 104M model needs about 11 GB with it (computed, not measured).
CUDA_MICRO_TOKENS = 16_384


def _setting(default: Any, help: str, group: str, *, free: bool = False, **declaration: Any) -> Any:
    """Return a dataclass field for a setting; its own default is None, which means that the user did not give it.
    default: for all stages, or a mapping from each stage. group: heading in --help. free: whether a resumed run may use
    another value. declaration: further fields of `mmdata.options.Option`, such as `least`."""
    by_stage = default if isinstance(default, Mapping) else dict.fromkeys(STAGE_KINDS, default)
    return option(None, help, group, by_stage=by_stage, may_change_on_resume=free, **declaration)


def _shape_setting(help: str, **declaration: Any) -> Any:
    """Return a dataclass field for a setting that changes the shape of a new model; None leaves the shape as it is."""
    return _setting(None, help, MODEL, **{"metavar": "N", **declaration})


def _dpo_setting(default: Any, unused: Any, help: str, **declaration: Any) -> Any:
    """Return a dataclass field for a setting that only the stage dpo accepts. default: of dpo. unused: the value that
    the other stages record. help: shown after "dpo: ". declaration: further arguments of `_setting`."""
    by_stage = {"pretrain": unused, "sft": unused, "dpo": default}
    return _setting(by_stage, f"dpo: {help}", PREFERENCES, stages=("dpo",), **declaration)


# Sources of the defaults, for models of 26M to 135M parameters. Pretraining: 1e-3 lies between the learning rates of
# MiniMind (5e-4) and SmolLM-135M (3e-3, with larger batches). sft: 3e-4 is about a third of that, the ratio in
# SmolLM2-135M's recipe (3e-3 for pretraining, 1e-3 for sft). That recipe also makes two passes over instruction data
# and one over other data, as the defaults of --epochs do. dpo: Zephyr used 5e-7 for a 7B model and SmolLM2 1e-6 at beta
# 0.5; smaller models need more. 5e-6 is the low end of the range with equal results in a short sweep (docs/dpo.md).
# With MiniMind's 1e-8 the model does not change measurably. Batch size: a pretraining step of MiniMind has 131k
# positions, of which about half are padding.
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """The settings that define a run, recorded in run.json and in every checkpoint. Each field's type is that of its
    value after `resolve`; before, None means that the user did not give the setting."""

    preset: str | None = _setting(
        None,
        "Use MiniMind's own settings for the stage.",
        MODEL,
        choices=("minimind2", "minimind3"),
        default_text="mm's own settings",
    )
    # None if the model's shape comes from a checkpoint, or by --depth.
    model: str | None = _setting(
        "minimind2-small",
        f"Shape of a new model: {', '.join(MODEL_SHAPES)}.",
        MODEL,
        default_text="minimind2-small; for small data a smaller one",
    )
    depth: int | None = _shape_setting(
        "Make a new model of N layers, 64 N wide, with N heads, instead of --model (nanochat's proportion; the loss depends "
        "little on it, Kaplan et al. 2020).",
        least=1,
    )
    layers: int | None = _shape_setting("Layers, instead of those of --model.", least=1)
    width: int | None = _shape_setting("Width of the model.", least=2)
    heads: int | None = _shape_setting("Query heads.", least=1)
    kv_heads: int | None = _shape_setting("Key and value heads.", least=1)
    head_size: int | None = _shape_setting("Width of a head.", least=2, default_text="width / heads")
    ffn: int | None = _shape_setting(
        "Inner width of the feed-forward layer.", least=1, default_text="with --width 8/3 of it, to a multiple of 64"
    )
    rope_theta: float | None = _shape_setting("Base of the rotary frequencies.", least=1)
    norm_eps: float | None = _shape_setting("Epsilon of RMSNorm.", above=0, below=1)
    qk_norm: bool | None = _shape_setting("Normalise queries and keys.", metavar=None)
    untie: bool | None = _shape_setting("Give the output a matrix of its own, not the embedding.", metavar=None)
    max_positions: int | None = _shape_setting("Largest sequence length in tokens.", least=1)
    pad_vocab: int | None = _shape_setting(
        "Round the rows of the embedding up to a multiple of N, such as 64, for speed on a GPU.", least=1
    )
    steps: int | None = _setting(
        None, "Number of optimizer steps, instead of --epochs.", LENGTH, least=1, default_text="by --epochs"
    )
    epochs: float | None = _setting(
        {"pretrain": 1.0, "sft": 2.0, "dpo": 1.0},
        "Number of passes over the training data.",
        LENGTH,
        above=0,
        default_text="pretrain 1, sft 2, dpo 1; more for small data",
    )
    batch_tokens: int = _setting(
        {"pretrain": 65_536, "sft": 32_768, "dpo": 16_384},
        "Tokens of one optimizer step, over all ranks.",
        OPTIMIZER,
        least=1,
        default_text="pretrain 65536, sft 32768, dpo 16384; fewer for small data",
    )
    # On the CPU more than 1,024 tokens are no faster but take more memory (2.8 GB for a 104M model). A pair with 1,024
    # tokens on each side has 2,048 tokens.
    micro_tokens: int = _setting(
        {"pretrain": 2048, "sft": 2048, "dpo": 4096},
        "Tokens that one rank runs at once; determines memory and speed, not the gradient.",
        HARDWARE,
        free=True,
        least=1,
        default_text="2048 on the CPU (dpo 4096); on CUDA what fits",
    )
    optimizer: str = _setting(
        "adamw",
        "adamw; or muon, which needs fewer steps to the same loss: for pretrain, and for sft of weights so trained.",
        OPTIMIZER,
        choices=("adamw", "muon"),
    )
    lr: float = _setting(
        {"pretrain": 1e-3, "sft": 3e-4, "dpo": 5e-6},
        "Peak learning rate.",
        OPTIMIZER,
        above=0,
        default_text="pretrain 0.001, sft 0.0003, dpo 5e-06; with muon 0.004 and 0.0012, with --lora 0.002",
    )
    beta2: float = _setting(BETA2, "AdamW's decay rate of the squared gradients.", OPTIMIZER, least=0, below=1)
    schedule: str = _setting(
        "cosine",
        "Learning rate after the warmup: cosine (to a tenth), wsd (constant, then to 0 over the last fifth) or constant.",
        OPTIMIZER,
        choices=("cosine", "wsd", "constant"),
    )
    warmup: float = _setting(
        {"pretrain": 0.02, "sft": 0.03, "dpo": 0.1},
        "Share of the steps over which the learning rate rises to its peak.",
        OPTIMIZER,
        least=0,
        below=1,
    )
    weight_decay: float = _setting(
        {"pretrain": 0.1, "sft": 0.0, "dpo": 0.0},
        "Weight decay of the weight matrices; norms have none.",
        OPTIMIZER,
        least=0,
    )
    clip: float = _setting(1.0, "Largest gradient norm; larger ones are scaled down.", OPTIMIZER, above=0)
    loss: str = _dpo_setting("sigmoid", "", "loss function.", choices=tuple(LOSS_BETAS))
    beta: float = _dpo_setting(
        LOSS_BETAS["sigmoid"],
        0.0,
        "how strongly the loss holds the model to the reference model.",
        above=0,
        default_text=", ".join(f"{loss} {beta:g}" for loss, beta in LOSS_BETAS.items()),
    )
    label_smoothing: float = _dpo_setting(
        0.0, 0.0, "share of the pairs assumed to have chosen and rejected swapped.", least=0, below=0.5
    )
    gamma: float = _dpo_setting(
        0.0,
        0.0,
        "target margin between chosen and rejected, for simpo.",
        least=0,
        default_text=f"{SIMPO_GAMMA:g} for simpo",
    )
    sft_weight: float = _dpo_setting(
        0.0, 0.0, "weight of the chosen reply's negative log-likelihood in the loss.", least=0
    )
    # "start" (the weights the run starts from), "none" (no reference), or the path of a run or checkpoint
    reference: str = _dpo_setting(
        "start",
        "",
        "run or checkpoint of the reference model.",
        metavar="RUN",
        default_text="the weights the run starts from",
    )
    share_prompt: bool = _dpo_setting(
        False,
        False,
        "compute a pair's prompt once for both replies.",
        free=True,
        flag="--share-prompt/--no-share-prompt",
        default_text="where it is faster",
    )
    guard: str = _dpo_setting(
        "",
        "",
        "packed dataset of documents or conversations; its val loss shows what the model forgets.",
        free=True,
        metavar="DIR",
        default_text="none",
    )
    lora: int = _setting(
        0,
        "Train LoRA adapters of this rank and leave the weights as they are; 0: train all weights.",
        ADAPTERS,
        metavar="RANK",
        least=0,
    )
    ema: float = _setting(
        0.0,
        "Average the weights over the steps with this decay, such as 0.999, and save the average; 0: none.",
        OPTIMIZER,
        metavar="DECAY",
        least=0,
        below=1,
    )
    patience: int = _setting(
        0,
        "End the run after N validations without a lower val loss; 0: never.",
        LENGTH,
        free=True,
        metavar="N",
        least=0,
    )
    seed: int = _setting(42, "Seed of new weights and of the order of the data.", DATA, **INT64)
    max_skipped: int = _setting(
        10,
        "End the run after this many steps in a row with a loss or gradient that is not finite.",
        LENGTH,
        free=True,
        least=1,
    )
    val_every: int = _setting(
        200,
        "Steps between validations; 0: only at the end.",
        LOGGING,
        free=True,
        least=0,
        default_text="200, or a tenth of a shorter run",
    )
    save_every: int = _setting(500, "Steps between checkpoints; 0: only at the end.", CHECKPOINTS, free=True, least=0)
    keep_last: int = _setting(
        2,
        "Number of newest checkpoints to keep, besides the one with the lowest val loss.",
        CHECKPOINTS,
        free=True,
        least=1,
    )


@dataclass(frozen=True, slots=True)
class TrainOptions(TrainSettings):
    """All options of one call of `mm train`. stage: pretrain, sft or dpo. data: dataset directories. out: the run
    directory. weights: the share of the training tokens that each dataset provides; None: an epoch takes every sample
    once. runs_dir: searched for a finished run to start from if neither `init` nor `model` is given."""

    stage: str
    data: tuple[Path, ...]
    out: Path
    weights: tuple[float, ...] | None = None
    init: Path | None = option(
        None,
        "Run or checkpoint to start from.",
        MODEL,
        metavar="RUN",
        default_text="the newest finished run that fits the stage",
    )
    resize_embeddings: str | None = option(
        None,
        "Add rows for the new tokens of the data's extended tokenizer to --init's embedding: mean of all rows (mean) "
        "or of the rows of the old tokens that spell the new one (subtoken).",
        MODEL,
        choices=("mean", "subtoken"),
    )
    log_every: int = option(10, "Steps between printed lines.", LOGGING, least=1)
    trackers: tuple[str, ...] = option(
        (),
        "Write the metrics to this tracker too; may be repeated.",
        LOGGING,
        flag="--log",
        choices=("tensorboard", "wandb", "swanlab", "trackio"),
    )
    device: str = option("auto", "Device to train on.", HARDWARE, choices=("auto", "cpu", "cuda", "mps"))
    compile: bool = option(
        True,
        "Do not compile the model's blocks with torch.compile, which happens on CUDA only.",
        HARDWARE,
        flag="--no-compile",
    )
    checkpoint_activations: bool = option(
        False,
        "Recompute the activations in the backward pass: a third more time, about a tenth of their memory.",
        HARDWARE,
    )
    resume: bool = option(False, "Continue from the run's last checkpoint.", CHECKPOINTS)
    other_data: bool = option(False, "With --resume: continue although the data has changed.", DATA)
    quiet: bool = option(False, "Print no lines for steps.", LOGGING)
    report: bool = option(True, "Do not write RUN/report.html.", LOGGING, flag="--no-report")
    samples: bool = option(
        True, "Do not let the model answer prompts of the validation rows.", LOGGING, flag="--no-samples"
    )
    runs_dir: Path = Path("runs")

    @property
    def new_model_flags(self) -> list[str]:
        """Return the flags given that describe a new model, such as --model and --layers."""
        names = ("model", "depth", *SHAPE_SETTINGS, "untie", "pad_vocab")
        return [
            flag_of(name, known)
            for name, known in options_of(self)
            if name in names and getattr(self, name) is not None
        ]


# --- the shape of a new model

# Setting -> the field of a shape that it replaces. --untie and --pad-vocab are treated by `shape_from`.
SHAPE_SETTINGS = {
    "layers": "num_layers",
    "width": "hidden_size",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_size": "own_head_size",
    "ffn": "ffn_size",
    "rope_theta": "rope_theta",
    "norm_eps": "norm_eps",
    "qk_norm": "qk_norm",
    "max_positions": "max_positions",
}


def shape_from(settings: TrainSettings, vocab_size: int) -> ModelConfig:
    """Return the shape of a new model, for a tokenizer with `vocab_size` tokens: that called `settings.model` or of
    `settings.depth`, with the fields in SHAPE_SETTINGS replaced by those given. With a new width the feed-forward width
    follows `ffn_for` unless given. Raises UsageError, which says what fits, if the numbers fit no model."""
    name, depth = str(settings.model), settings.depth
    shape = shape_of(name, vocab_size) if depth is None else shape_of_depth(depth, vocab_size)
    given = {field: getattr(settings, name) for name, field in SHAPE_SETTINGS.items()}
    given = {field: value for field, value in given.items() if value is not None}
    if "hidden_size" in given:
        given = {"ffn_size": ffn_for(given["hidden_size"]), **given}
    if settings.untie is not None:
        given["tied"] = not settings.untie
    if settings.pad_vocab:
        given["num_padding"] = -vocab_size % settings.pad_vocab
        given["vocab_size"] = vocab_size + given["num_padding"]
    shape = replace(shape, **given)
    check_heads(shape)
    return shape


# --- by stage


def stage_of(kind: str) -> str:
    """Return the stage (pretrain, sft or dpo) that trains on rows of this kind (document, conversation or pair)."""
    return next(stage for stage, stage_kind in STAGE_KINDS.items() if stage_kind == kind)


def stage_defaults(stage: str) -> SettingValues:
    """Return the default of every setting for a stage, by name."""
    return {name: known.by_stage[stage] for name, known in options_of(TrainSettings) if known.by_stage is not None}


def check_values(values: SettingValues) -> None:
    """Raise UsageError for the first setting, of those that this version knows, whose recorded value is of another type
    or not allowed."""
    kinds = get_type_hints(TrainSettings)
    for name, known in options_of(TrainSettings):
        if values.get(name) is not None:
            try:
                msgspec.convert(values[name], kinds[name])
            except msgspec.ValidationError as error:
                raise UsageError(f"the setting {name}: {error}") from error
            if values[name] not in (known.by_stage or {}).values():  # such as the empty loss of another stage than dpo
                check_value(f"the setting {name}", values[name], known)
        elif name in values and type(None) not in get_args(kinds[name]):
            raise UsageError(f"the setting {name} is null")
