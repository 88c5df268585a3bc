"""The config.json of published models (what decides their shape), their numbers of parameters, and the same cut small."""

from dataclasses import dataclass, field
from typing import Any

from mmtrain.shapes import RopeScaling

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SIZES += ("vocab_size", "max_position_embeddings")  # type: ignore[assignment]


@dataclass(frozen=True)
class Released:
    """A published model: its type, its sizes in the order of SIZES, the rest of its config.json, its parameters (a tied
    matrix once), what replaces entries where it is cut small, and what the shape of the small one then has."""

    model_type: str
    sizes: tuple[int, ...]
    rest: dict[str, Any]
    num_params: int
    cut: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def published(self) -> dict[str, Any]:
        """The published config.json."""
        return {"model_type": self.model_type, **dict(zip(SIZES, self.sizes, strict=True)), **self.rest}

    @property
    def config(self) -> dict[str, Any]:
        """What the small model's configuration says besides its sizes."""
        return self.rest | self.cut


def _plain(theta: float, eps: float, *, tied: bool, **more: Any) -> dict[str, Any]:
    """Entries that most config.json have."""
    more = {"rope_theta": theta, "rms_norm_eps": eps, "tie_word_embeddings": tied, **more}
    return {"hidden_act": "silu", "rope_scaling": None, "attention_bias": False, **more}


_QWEN = {"use_sliding_window": False, "hidden_act": "silu"}
RELEASED = {
    "llama-2": Released(  # Llama-2-7b
        "llama",
        (4096, 11008, 32, 32, 32, 32000, 4096),
        {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False},
        6_738_415_616,
        {"num_key_value_heads": 4},
        {"tied": False, "norm_eps": 1e-5, "num_kv_heads": 4, "rope_theta": 1e4},
    ),
    "tinyllama": Released(  # TinyLlama-1.1B
        "llama",
        (2048, 5632, 22, 32, 4, 32000, 2048),
        _plain(1e4, 1e-5, tied=False),
        1_100_048_384,
        {"num_key_value_heads": 1},
        {"num_kv_heads": 1, "tied": False},
    ),
    "llama-3.2": Released(  # Llama-3.2-1B; cut, the scaling begins after fewer tokens, so that it counts
        "llama",
        (2048, 8192, 16, 32, 8, 128256, 131072),
        _plain(5e5, 1e-5, tied=True, head_dim=64, mlp_bias=False)
        | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}},
        1_235_814_400,
        {"head_dim": 16, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        {"tied": True, "rope_theta": 5e5, "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 64)},
    ),
    "smollm2": Released(  # SmolLM2-135M
        "llama",
        (576, 1536, 30, 9, 3, 49152, 8192),
        _plain(1e5, 1e-5, tied=True, mlp_bias=False, rope_interleaved=False),
        134_515_008,
        {},
        {"tied": True, "rope_theta": 1e5},
    ),
    "smollm3": Released(  # SmolLM3-3B
        "smollm3",
        (2048, 11008, 36, 16, 4, 128256, 65536),
        _plain(5e6, 1e-6, tied=True, mlp_bias=False, **_QWEN, sliding_window=None)
        | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36},
        3_075_098_624,
        {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "layer_types": ["full_attention"] * 5},
        {"layers_without_rope": (3,), "tied": True, "rope_theta": 5e6},
    ),
    "qwen2.5": Released(  # Qwen2.5-0.5B
        "qwen2",
        (896, 4864, 24, 14, 2, 151936, 32768),
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "sliding_window": 32768, **_QWEN},
        494_032_768,
        {},
        {"qkv_bias": True, "tied": True, "rope_theta": 1e6},
    ),
    "qwen2.5-7b": Released(
        "qwen2",
        (3584, 18944, 28, 28, 4, 152064, 131072),
        {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "sliding_window": 131072, **_QWEN},
        7_615_616_512,
        {},
        {"qkv_bias": True, "tied": False},
    ),
    "qwen3": Released(  # Qwen3-0.6B
        "qwen3",
        (1024, 3072, 28, 16, 8, 151936, 40960),
        _plain(1e6, 1e-6, tied=True, head_dim=128, sliding_window=None, use_sliding_window=False),
        596_049_920,
        {"head_dim": 24},
        {"own_head_size": 24, "qk_norm": True, "rope_theta": 1e6},
    ),
    "mistral": Released(  # Mistral-7B-v0.3
        "mistral",
        (4096, 14336, 32, 32, 8, 32768, 32768),
        {"hidden_act": "silu", "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None}
        | {"tie_word_embeddings": False},
        7_248_023_552,
        {"head_dim": 12},
        {"own_head_size": 12, "tied": False, "rope_theta": 1e6},
    ),
}
