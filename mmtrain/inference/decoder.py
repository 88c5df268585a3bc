"""Batched forward passes for generation: from the new token ids of several rows (a row is one answer being generated)
to the logits for the next token of each row.

Each row has its own KV cache. Rows share only the matrix products, so a row may join or leave the batch at any step,
and its logits do not depend on the other rows. On a CPU with oneDNN they are the same bit for bit: weights are
converted once to oneDNN's packed layout, of which it adds up a product of at least `LEAST_ROWS` matrix rows in the same
order for any number of rows (tested here, not documented by oneDNN). The packed weights take as much memory as the
model, which the caller can free afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.model.model import Model, Rotary, mix_experts, rotate
from mmtrain.shapes import ModelConfig

# Input matrices (one matrix row per token) are padded to this many rows. Fewer rows run in another kernel of oneDNN,
# which rounds differently and is no faster.
LEAST_ROWS = 4
KV_STEP = 256  # tokens; the capacity of a cache is a multiple of it

Linear = Callable[[Tensor], Tensor]


def _linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Return a function that computes x @ weight.T + bias. On the CPU in fp32, with oneDNN, it uses a packed copy of the
    weight: 0.75 of the time of F.linear for one row of x, half of it for four (model of 104M parameters, one thread).
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _has_packed_linear():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


def _has_packed_linear() -> bool:
    """Return whether torch has oneDNN's product with packed weights, which is not part of torch's public API."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


@dataclass(frozen=True)
class _Layer:
    """Weights of one transformer block; q, k and v are joined into one projection, and so are gate and up."""

    input_norm: Tensor
    qkv: Linear
    # [H + KV heads, D]: the weight of the query norm once per query head, then that of the key norm once per key head.
    # None for a model without norms on queries and keys.
    head_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    mlp: Linear  # the whole feed-forward layer


class KVCache:
    """The keys and values of one row, [layers, KV heads, capacity, D] each; the first `length` tokens are filled."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        shape = (config.num_layers, config.num_kv_heads, 0, config.head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Number of tokens for which memory is allocated."""
        return self.keys.shape[2]

    def reserve(self, num_tokens: int) -> None:
        """Make room for at least `num_tokens` tokens in total, in multiples of `KV_STEP`; the content stays."""
        if num_tokens > self.capacity:
            grown = -(-num_tokens // KV_STEP) * KV_STEP
            self.keys, self.values = (self._grown(x, grown) for x in (self.keys, self.values))

    def copy_from(self, other: "KVCache", num_tokens: int) -> None:
        """Replace the content by a copy of the first `num_tokens` tokens of another row's cache."""
        self.length = 0
        self.reserve(num_tokens)
        self.keys[:, :, :num_tokens] = other.keys[:, :, :num_tokens]
        self.values[:, :, :num_tokens] = other.values[:, :, :num_tokens]
        self.length = num_tokens

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        """Return a copy for `capacity` tokens; from `length` on it is uninitialised memory."""
        new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        return new


class Decoder:
    """A model's transformer prepared for generation. It has no state between calls: a `KVCache` has that of a row."""

    def __init__(self, model: Model):
        self.config = model.config
        weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.embedding = weights["model.embed_tokens.weight"]
        self.layers = [self._layer(weights, f"model.layers.{i}.") for i in range(self.config.num_layers)]
        self.norm = weights["model.norm.weight"]
        self.rotary = Rotary(self.config)
        self.head = _linear(model.head_weight.detach())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.device

    def new_cache(self) -> KVCache:
        """Return an empty cache for a new row, on the device and in the dtype of the weights."""
        return KVCache(self.config, self.device, self.embedding.dtype)

    def _layer(self, weights: dict[str, Tensor], prefix: str) -> _Layer:
        """Collect the weights of one block. prefix: of their names in the state dict, such as "model.layers.0."."""
        config = self.config

        def joined(*names: str) -> Linear:
            biases = [bias for name in names if (bias := weights.get(f"{prefix}{name}_proj.bias")) is not None]
            matrix = torch.cat([weights[f"{prefix}{name}_proj.weight"] for name in names])
            return _linear(matrix, torch.cat(biases) if biases else None)

        def mlp(name: str) -> Linear:
            gate_up, down = joined(f"{name}.gate", f"{name}.up"), joined(f"{name}.down")

            def layer(x: Tensor) -> Tensor:
                gate, up = gate_up(x).chunk(2, -1)
                return down(F.silu(gate).mul_(up))

            return layer

        def experts() -> Linear:
            gate = weights[f"{prefix}mlp.gate.weight"]
            each = [mlp(f"mlp.experts.{number}") for number in range(config.num_experts)]
            return lambda x: mix_experts(x, F.linear(x, gate), each, config)

        head_norm = None
        if config.qk_norm:
            norms = (weights[f"{prefix}self_attn.{x}_norm.weight"] for x in "qk")
            counts = (config.num_heads, config.num_kv_heads)
            head_norm = torch.cat([w.expand(n, -1) for w, n in zip(norms, counts, strict=True)])
        return _Layer(
            weights[f"{prefix}input_layernorm.weight"],
            joined("self_attn.q", "self_attn.k", "self_attn.v"),
            head_norm,
            joined("self_attn.o"),
            weights[f"{prefix}post_attention_layernorm.weight"],
            mlp("mlp") if not config.num_experts else experts(),
        )

    @torch.inference_mode()
    def forward(self, rows: Sequence[tuple[KVCache, Sequence[int]]]) -> Tensor:
        """Return the logits [rows, V] for the token after the last new one of each row. rows: for each row its cache,
        which is extended in place, and its new ids (at least one)."""
        counts = [len(ids) for _, ids in rows]
        starts = [cache.length for cache, _ in rows]
        positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
        num_pad = max(0, LEAST_ROWS - len(positions))
        ids = [id for _, new in rows for id in new]
        for cache, new in rows:
            cache.reserve(cache.length + len(new))
        x = self.embedding[torch.tensor(ids + [0] * num_pad, device=self.device)]
        table = self.rotary(torch.tensor(positions + [0] * num_pad, device=self.device), max(positions) + 1)
        for index, layer in enumerate(self.layers):
            x = x + layer.out(self._attend(layer, index, x, table, rows))
            x = x + layer.mlp(self._normed(x, layer.mlp_norm))
        for cache, new in rows:
            cache.length += len(new)
        last = torch.tensor(counts, device=self.device).cumsum(0) - 1
        last = F.pad(last, (0, max(0, LEAST_ROWS - len(rows))))
        return self.head(self._normed(x[last], self.norm))[: len(rows)]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return (x * scale.add_(self.config.norm_eps).rsqrt_()).mul_(weight)

    def _attend(
        self,
        layer: _Layer,
        index: int,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        rows: Sequence[tuple[KVCache, Sequence[int]]],
    ) -> Tensor:
        """Compute causal attention of all new tokens, each within its own row, and write their keys and values to the
        caches. index: of the layer. x: [T, C], hidden states of the new tokens, row after row, then padding. table:
        rotary cosines and sines. Return [T, H * D], before the output projection; zero for padding."""
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads
        heads = layer.qkv(self._normed(x, layer.input_norm)).unflatten(-1, (-1, config.head_size))
        rotated, values = heads[:, :num_rotated], heads[:, num_rotated:]
        if layer.head_norm is not None:
            rotated = self._normed(rotated, layer.head_norm)
        rotated = rotated if index in config.layers_without_rope else rotate(rotated, *table)
        queries, keys = rotated[:, : config.num_heads], rotated[:, config.num_heads :]
        out = torch.zeros_like(queries)
        begin = 0
        for cache, new in rows:
            new_rows, begin = slice(begin, begin + len(new)), begin + len(new)
            end = cache.length + len(new)
            cache.keys[index, :, cache.length : end] = keys[new_rows].transpose(0, 1)
            cache.values[index, :, cache.length : end] = values[new_rows].transpose(0, 1)
            out[new_rows] = _attend_row(queries[new_rows], cache.keys[index, :, :end], cache.values[index, :, :end])
        return out.flatten(1)


def _attend_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one row: queries q [t, H, D] of its last t tokens over k and v [KV heads, T, D] of all its T
    tokens -> [t, H, D]. For one new token, query heads are grouped by key head, so that these are read once."""
    num_new, num_heads, size = q.shape
    if num_new == 1:
        grouped = q.view(1, len(k), num_heads // len(k), size)
        return F.scaled_dot_product_attention(grouped, k[None], v[None]).view(1, num_heads, size)
    q, k, v = q.transpose(0, 1)[None], k[None], v[None]
    if num_new == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        mask = torch.ones(num_new, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - num_new)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)
