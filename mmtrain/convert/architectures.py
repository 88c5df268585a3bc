"""The architectures of Hugging Face's transformers that our model can take: config.json to model shape and back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from msgspec import UNSET, Struct, UnsetType
from torch import Tensor

from mmdata.errors import CheckpointError
from mmdata.io.records import JsonObject, read_record
from mmtrain.shapes import ModelConfig, RopeScaling

# --- reading


class _Rope(Struct):
    """The settings of rotary embeddings in config.json: kind of scaling (under either name), base and factors."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float | None = None


class HFConfig(Struct):
    """The fields of config.json that decide the shape or that no model of ours has, under the names of Hugging Face and
    of MiniMind (`n_heads`, `norm_eps`, `max_seq_len`). `shape_of_weights` fills in missing ones."""

    model_type: str | None = None
    use_moe: bool | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    norm_topk_prob: bool | None = None
    mlp_only_layers: list[int] | None = None
    decoder_sparse_step: int | None = None
    num_attention_heads: int | None = None
    n_heads: int | None = None
    head_dim: int | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    rms_norm_eps: float | None = None
    norm_eps: float | None = None
    max_position_embeddings: int | None = None
    max_seq_len: int | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str = "silu"
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    sliding_window: int | UnsetType | None = UNSET
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None  # of each layer: 1 if it rotates queries and keys
    no_rope_layer_interval: int | None = None
    quantization_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Defaults:
    """What transformers, or MiniMind's code, takes for keys that config.json leaves out."""

    num_heads: int = 32
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    max_positions: int = 32768
    tied: bool = False
    sliding_window: int | None = None
    experts_per_token: int = 1
    norm_experts: bool = True


# The values of model_type that mm reads. (A MiniMind model with query norms has an epsilon of 1e-6.)
DEFAULTS = {
    "llama": _Defaults(max_positions=2048),
    "mistral": _Defaults(max_positions=131072, sliding_window=4096),
    "qwen2": _Defaults(),
    "qwen3": _Defaults(),
    "qwen3_moe": _Defaults(experts_per_token=8, norm_experts=False),
    "smollm3": _Defaults(num_heads=16, rope_theta=2e6, tied=True),
    "minimind": _Defaults(num_heads=8, rope_theta=1e6, norm_eps=1e-5, tied=True),
}


def read_config(path: Path) -> HFConfig:
    """Read the config.json of a directory. Raise CheckpointError if it is missing or describes a model unlike ours."""
    if not (path / "config.json").is_file():
        fix = "give a run, a .pth file or a Hugging Face directory"
        raise CheckpointError(f"{path} holds neither a run nor a config.json", fix)
    config = read_record(path / "config.json", HFConfig, CheckpointError, "copy or download it again")
    is_moe = "moe" in str(config.model_type) or config.num_local_experts
    if is_moe and config.model_type != "qwen3_moe":
        raise other_experts(path)
    if config.model_type not in DEFAULTS:
        problem = f"{path}: model_type {config.model_type!r} is not supported"
        raise CheckpointError(problem, f"import a model of type {', '.join(DEFAULTS)}")
    rope = _rope_of(config)
    kind, part = _rope_type(rope), rope.partial_rotary_factor or config.partial_rotary_factor or 1.0
    factors = (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings)
    window = DEFAULTS[config.model_type].sliding_window if config.sliding_window is UNSET else config.sliding_window
    if config.model_type != "mistral" and not config.use_sliding_window:
        window = None  # the other types have the key too, but use it only then
    max_positions = config.max_position_embeddings or DEFAULTS[config.model_type].max_positions
    for is_wrong, feature in (
        (kind not in ("default", "llama3"), f"rotary scaling {kind!r}"),
        (kind == "llama3" and None in factors, "rotary scaling 'llama3' without all its factors"),
        (part != 1, f"rotating a part ({part:g}) of each head"),
        (config.hidden_act not in ("silu", "swish"), f"activation {config.hidden_act!r}"),
        (config.attention_bias, "attention_bias (biases of all attention projections)"),
        (config.mlp_bias, "mlp_bias"),
        (config.mlp_only_layers or config.decoder_sparse_step not in (None, 1), "experts in some of the layers only"),
        (config.quantization_config is not None, "quantized weights"),
        (any(kind != "full_attention" for kind in config.layer_types or ()), "sliding window attention"),
        (
            window is not None and window < max_positions,
            f"sliding window attention (window {window}, below max_position_embeddings {max_positions})",
        ),
    ):
        if is_wrong:
            raise CheckpointError(f"{path}: {feature} is not supported", "import a model without it")
    return config


def _rope_of(config: HFConfig) -> _Rope:
    return config.rope_parameters or config.rope_scaling or _Rope()


def _rope_type(rope: _Rope) -> str:
    return rope.rope_type or rope.type or "default"


def shape_of_weights(weights: Mapping[str, Tensor], path: Path, config: HFConfig, num_heads: int | None) -> ModelConfig:
    """Return the shape of a model from its tensors, by mm's names, and from config.json, with the defaults of its
    `model_type`. num_heads: of queries; overrides config.json, ignored if there are query norms, whose length is the
    head size. path: for messages. Raise CheckpointError if a required tensor is missing, or the head size is odd or
    does not divide the query and key rows."""
    first = "model.layers.0."
    experts = {match[1] for name in weights if (match := re.match(rf"{re.escape(first)}mlp\.experts\.(\d+)\.", name))}
    mlp = "mlp.experts.0" if experts else "mlp"
    parts = ("self_attn.q_proj", "self_attn.k_proj", f"{mlp}.gate_proj")
    needed = ("model.embed_tokens", *(f"{first}{part}" for part in parts))
    if missing := [name for name in needed if f"{name}.weight" not in weights]:
        raise CheckpointError(f"{path}: no {missing[0]}.weight: not a model of this kind", "import a Llama-like model")
    embedding, q, k, gate = (weights[f"{name}.weight"] for name in needed)
    q_norm = weights.get(f"{first}self_attn.q_norm.weight")
    defaults, rope = DEFAULTS[str(config.model_type)], _rope_of(config)
    width = embedding.shape[1]
    own_size = len(q_norm) if q_norm is not None else None if num_heads else config.head_dim
    num_heads = num_heads or config.num_attention_heads or config.n_heads or defaults.num_heads
    head_size = own_size or len(q) // num_heads
    if not head_size or len(q) % head_size or len(k) % head_size or head_size % 2:
        raise CheckpointError(
            f"{path}: {len(q)} rows of queries and {len(k)} of keys make no whole heads of {head_size}",
            "give the right --num-heads",
        )
    num_heads = len(q) // head_size
    layers = [int(match[1]) for name in weights if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    scaling = None
    if _rope_type(rope) == "llama3":
        factors = (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings)
        scaling = RopeScaling(*cast(tuple[float, float, float, int], factors))
    norm_eps = 1e-6 if q_norm is not None else defaults.norm_eps
    return ModelConfig(
        vocab_size=len(embedding),
        hidden_size=width,
        num_layers=1 + max(layers),
        num_heads=num_heads,
        num_kv_heads=len(k) // head_size,
        ffn_size=len(gate),
        rope_theta=rope.rope_theta or config.rope_theta or defaults.rope_theta,
        norm_eps=config.rms_norm_eps or config.norm_eps or norm_eps,
        qk_norm=q_norm is not None,
        max_positions=config.max_position_embeddings or config.max_seq_len or defaults.max_positions,
        own_head_size=None if num_heads * head_size == width else head_size,
        tied=_is_tied(weights, config, defaults),
        qkv_bias=f"{first}self_attn.q_proj.bias" in weights,
        rope_scaling=scaling,
        layers_without_rope=_layers_without_rope(config, 1 + max(layers)),
        num_experts=len(experts),
        experts_per_token=(config.num_experts_per_tok or defaults.experts_per_token) if experts else 1,
        norm_experts=defaults.norm_experts if config.norm_topk_prob is None or not experts else config.norm_topk_prob,
    )


def _is_tied(weights: Mapping[str, Tensor], config: HFConfig, defaults: _Defaults) -> bool:
    """Return whether the output projection is the embedding: as config.json says, else as is the default, or if the
    file has no matrix for it."""
    if config.tie_word_embeddings is not None:
        return config.tie_word_embeddings
    return defaults.tied or "lm_head.weight" not in weights


def _layers_without_rope(config: HFConfig, num_layers: int) -> tuple[int, ...]:
    """Return the numbers of the layers that do not rotate, which only SmolLM3 has: every fourth by default."""
    if config.model_type != "smollm3":
        return ()
    every = config.no_rope_layer_interval or 4
    rotates = config.no_rope_layers or [(layer + 1) % every for layer in range(num_layers)]
    return tuple(layer for layer, does in enumerate(rotates[:num_layers]) if not does)


def other_experts(path: Path) -> CheckpointError:
    """Return the error for a mixture of experts other than minimind-3-moe's and Qwen3's. path: the checkpoint."""
    problem = f"{path} is a mixture of experts (MoE) with another structure than minimind-3-moe's"
    return CheckpointError(problem, "import minimind-3-moe, a model of type qwen3_moe, or a dense model")


# --- writing


def architecture_of(shape: ModelConfig) -> tuple[str, str]:
    """Return transformers' model type and class for a shape."""
    if shape.layers_without_rope:
        return "smollm3", "SmolLM3ForCausalLM"
    if shape.qk_norm:
        return "qwen3", "Qwen3ForCausalLM"
    return ("qwen2", "Qwen2ForCausalLM") if shape.qkv_bias else ("llama", "LlamaForCausalLM")


def config_of(shape: ModelConfig) -> JsonObject:
    """Return the content of config.json for a shape, with keys that both version 4 and version 5 of transformers read."""
    model_type, architecture = architecture_of(shape)
    config: JsonObject = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied,
        "initializer_range": (3 * shape.hidden_size) ** -0.5,
        "use_cache": True,
    }
    if scaling := shape.rope_scaling:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_positions,
        }
    if shape.layers_without_rope:
        config["no_rope_layers"] = [int(layer not in shape.layers_without_rope) for layer in range(shape.num_layers)]
    if model_type in ("llama", "smollm3"):
        config["mlp_bias"] = False
    return config
