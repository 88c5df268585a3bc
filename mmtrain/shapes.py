"""Model shapes: the numbers that define a model, known models by name, and what fits together. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Annotated

from msgspec import Meta

from mmdata.errors import UsageError

# The ranges hold for shapes that are read from files.
Count = Annotated[int, Meta(ge=0, le=2**31)]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
Ratio = Annotated[float, Meta(gt=0, le=1e30)]
Epsilon = Annotated[float, Meta(gt=0, lt=1)]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies: wavelengths above `original_positions / low_freq_factor` tokens
    become `factor` times as long, those below `original_positions / high_freq_factor` stay; between, they are
    interpolated."""

    factor: Ratio
    low_freq_factor: Ratio
    high_freq_factor: Ratio
    original_positions: Positive


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a model.

    vocab_size: rows of the embedding, `num_padding` included; in MODEL_SHAPES the published size, 0 if there is none.
    hidden_size: model width C. ffn_size: inner width of the feed-forward layer. num_kv_heads: key/value heads (grouped-
    query attention). rope_theta: base of the rotary frequencies. norm_eps: epsilon of RMSNorm. qk_norm: whether queries
    and keys are normalised too. max_positions: largest sequence length in tokens. own_head_size: width of a head if it
    is not `hidden_size / num_heads`. tied: whether the output projection is the embedding. qkv_bias: whether the
    projections to queries, keys and values have biases. layers_without_rope: numbers of the layers, from 0, that do not
    rotate queries and keys. num_padding: last rows of the embedding, which no token uses. num_experts: feed-forward layers
    of a mixture of experts in each block, of which each token takes `experts_per_token`; 0 for a dense model. norm_experts:
    whether the weights of a token's experts add up to 1.
    """

    vocab_size: Count
    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    ffn_size: Positive
    rope_theta: Ratio = 1e6
    norm_eps: Epsilon = 1e-5
    qk_norm: bool = False
    max_positions: Positive = 32768
    own_head_size: Positive | None = None
    tied: bool = True
    qkv_bias: bool = False
    rope_scaling: RopeScaling | None = None
    layers_without_rope: tuple[Count, ...] = ()
    num_padding: Count = 0
    num_experts: Count = 0
    experts_per_token: Positive = 1
    norm_experts: bool = True

    @property
    def head_size(self) -> int:
        """Return the width D of one attention head."""
        return self.own_head_size or self.hidden_size // self.num_heads

    @property
    def text(self) -> str:
        """Return the sizes in words."""
        experts = f"{self.num_experts} experts of " if self.num_experts else ""
        return (
            f"{self.num_layers} layers, width {self.hidden_size}, {self.num_heads} query and {self.num_kv_heads} key heads "
            f"of {self.head_size}, feed-forward {experts}{self.ffn_size}, vocabulary {self.vocab_size:,}"
        )

    @property
    def num_params(self) -> int:
        """Return the number of parameters; an embedding used for input and output is counted once."""
        width, q_size, kv_size = (self.hidden_size, *(n * self.head_size for n in (self.num_heads, self.num_kv_heads)))
        attention = 2 * width * (q_size + kv_size) + 2 * self.head_size * self.qk_norm
        attention += (q_size + 2 * kv_size) * self.qkv_bias
        block = attention + 3 * width * self.ffn_size * max(1, self.num_experts) + width * (2 + self.num_experts)
        return self.vocab_size * width * (2 - self.tied) + self.num_layers * block + width


# The first three are the published shapes of the project MiniMind, the next three those of other known models; GPT-2's
# (124M) is in Llama's form, with rotary positions, RMSNorm and SwiGLU. The last three are for small data, the
# demo and the tests.
MODEL_SHAPES: dict[str, ModelConfig] = {
    "minimind2": ModelConfig(6400, 768, 16, 8, 2, 2048),
    "minimind2-small": ModelConfig(6400, 512, 8, 8, 2, 1408),
    "minimind3": ModelConfig(6400, 768, 8, 8, 4, 2432, norm_eps=1e-6, qk_norm=True),
    "smollm2-135m": ModelConfig(49152, 576, 30, 9, 3, 1536, rope_theta=1e5, max_positions=8192),
    "qwen3-0.6b": ModelConfig(
        *(151936, 1024, 28, 16, 8, 3072), norm_eps=1e-6, qk_norm=True, max_positions=40960, own_head_size=128
    ),
    "gpt2-124m-like": ModelConfig(50257, 768, 12, 12, 12, 2048, rope_theta=1e4),
    "mini": ModelConfig(0, 256, 4, 4, 2, 704, rope_theta=1e4, qk_norm=True),
    "demo": ModelConfig(0, 128, 2, 4, 2, 352, rope_theta=1e4, qk_norm=True),
    "tiny": ModelConfig(0, 64, 2, 4, 2, 176, rope_theta=1e4),
}
# The width of nanochat's models (its --aspect-ratio 64). Kaplan et al. 2020 (figure 5) measured that at a fixed number of
# parameters without the embedding the losses of 48 layers of width 1,600 and 6 of 4,288, 33 and 715 per layer, differ by
# less than 3 %. Heads of 64 as in GPT-2, SmolLM2 and Llama 3.2 1B.
WIDTH_PER_LAYER = HEAD_SIZE = 64
TOKENS_PER_PARAM = 20  # of a compute-optimal pretraining run: Hoffmann et al. 2022 (Chinchilla), table 3


def shape_of(name: str, vocab_size: int) -> ModelConfig:
    """Return the shape called `name` with `vocab_size` rows. Raises UsageError if the name is unknown."""
    if name not in MODEL_SHAPES:
        raise UsageError(f"--model {name} is unknown", f"use one of {', '.join(MODEL_SHAPES)}")
    return replace(MODEL_SHAPES[name], vocab_size=vocab_size)


def shape_of_depth(depth: int, vocab_size: int) -> ModelConfig:
    """Return a shape of `depth` layers, WIDTH_PER_LAYER times as wide, with as many key heads as query heads."""
    width = WIDTH_PER_LAYER * depth
    heads = width // HEAD_SIZE
    return ModelConfig(vocab_size, width, depth, heads, heads, ffn_for(width))


def ffn_for(width: int) -> int:
    """Return the inner width of a SwiGLU layer with about the parameters of a plain layer of 4 x `width` (Shazeer
    2020): 8/3 x `width`, rounded up to a multiple of 64, as in Llama and MiniMind2."""
    return 64 * -(-(8 * width // 3) // 64)


def check_heads(shape: ModelConfig) -> None:
    """Raise UsageError with what fits unless heads have one even width and key heads divide query heads."""
    width, heads, kv_heads = shape.hidden_size, shape.num_heads, shape.num_kv_heads
    if heads % kv_heads:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        problem = f"{kv_heads} key/value heads do not divide {heads} query heads"
        raise UsageError(problem, f"--kv-heads {_listed(fitting)} fits")
    if shape.own_head_size is None and width % (2 * heads):
        multiples = range(kv_heads, width // 2 + 1, kv_heads)
        fitting = sorted((n for n in multiples if width % (2 * n) == 0), key=lambda n: abs(n - heads))
        below, above = width // (2 * heads) * 2 * heads, -(-width // (2 * heads)) * 2 * heads
        options = [f"--heads {_listed(fitting[:3])}"] if fitting else []
        options.append(f"--width {_listed([size for size in (below, above) if size])}")
        problem = f"width {width} is not {heads} heads of an even width"
        raise UsageError(problem, f"{' or '.join(options)} fits; or give --head-size")
    if shape.head_size % 2:
        problem = f"--head-size {shape.head_size} is odd; rotary positions turn pairs of numbers"
        raise UsageError(problem, f"--head-size {shape.head_size - 1 or 2} or {shape.head_size + 1} fits")


def _listed(numbers: list[int]) -> str:
    """Return numbers in ascending order, such as "1, 2 or 4"."""
    *most, last = map(str, sorted(numbers))
    return f"{', '.join(most)} or {last}" if most else last
