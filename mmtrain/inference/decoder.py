"""A model's weights, laid out for generation: new tokens of several rows in, the logits after each row's last one out.

Rows have each a KV cache of their own and share only the matrix products, so they may join and leave at any step.
What comes out for a row does not depend on what else is in the step, to the last bit on a CPU with oneDNN: there the
weights are packed once for products of at least `LEAST_ROWS` rows, whose sums oneDNN takes in one order whatever the
number of rows (tested, not promised by it). Costs a second copy of the weights while the model they came from lives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config import ModelConfig
from mmtrain.model.model import Model, Rotary, rotate

LEAST_ROWS = 4  # fewer are padded: one row goes through another kernel, with other sums, and no faster
KV_STEP = 256  # a cache grows by so many tokens

Linear = Callable[[Tensor], Tensor]


def _linear(weight: Tensor) -> Linear:
    """x -> x @ weight.T. On the CPU with weights packed for oneDNN: 0.75 of F.linear's time on one row of the 104M
    model's matrices, half of it on four (one thread)."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not _has_packed_linear():
        return lambda x: F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, None, "none", [], "")


def _has_packed_linear() -> bool:
    """Whether this torch has oneDNN and its packed product, which is not part of torch's public interface."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


@dataclass(frozen=True)
class _Layer:
    """A block's weights: q, k and v as one matrix, gate and up as one."""

    input_norm: Tensor
    qkv: Linear
    head_norm: Tensor | None  # [H + KV, D]: the q norm's weight for every query head, the k norm's for every key head
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class KVCache:
    """Keys and values of one row's tokens: [layers, KV, capacity, D] each, of which `length` columns are filled."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        shape = (config.num_layers, config.num_kv_heads, 0, config.head_size)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[2]

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many tokens in all, by whole steps."""
        if num_tokens > self.capacity:
            grown = -(-num_tokens // KV_STEP) * KV_STEP
            self.keys, self.values = (self._grown(x, grown) for x in (self.keys, self.values))

    def copy_from(self, other: "KVCache", num_tokens: int) -> None:
        """Hold the first tokens of another row's cache, and nothing else."""
        self.length = 0
        self.reserve(num_tokens)
        self.keys[:, :, :num_tokens] = other.keys[:, :, :num_tokens]
        self.values[:, :, :num_tokens] = other.values[:, :, :num_tokens]
        self.length = num_tokens

    def _grown(self, old: Tensor, capacity: int) -> Tensor:
        new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
        new[:, :, : self.length] = old[:, :, : self.length]
        return new


class Decoder:
    """The transformer for generation. Holds no state of any row: their caches do."""

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
        """Where the weights are."""
        return self.embedding.device

    def new_cache(self) -> KVCache:
        """The cache of a row without tokens."""
        return KVCache(self.config, self.device, self.embedding.dtype)

    def _layer(self, weights: dict[str, Tensor], prefix: str) -> _Layer:
        """Take one block's weights by their checkpoint names."""
        config = self.config

        def joined(*names: str) -> Linear:
            return _linear(torch.cat([weights[f"{prefix}{name}_proj.weight"] for name in names]))

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
            joined("mlp.gate", "mlp.up"),
            joined("mlp.down"),
        )

    @torch.inference_mode()
    def forward(self, rows: Sequence[tuple[KVCache, Sequence[int]]]) -> Tensor:
        """Take each row's new tokens, at least one, into its cache; gives the logits [rows, V] after the last of each."""
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
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, -1)
            x = x + layer.down(F.silu(gate).mul_(up))
        for cache, new in rows:
            cache.length += len(new)
        last = torch.tensor(counts, device=self.device).cumsum(0) - 1
        last = F.pad(last, (0, max(0, LEAST_ROWS - len(rows))))
        return self.head(self._normed(x[last], self.norm))[: len(rows)]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) * weight."""
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
        """Attention of the new tokens x [T, C] to their own row's tokens up to themselves: [T, H * D] for the output."""
        config = self.config
        num_turned = config.num_heads + config.num_kv_heads
        heads = layer.qkv(self._normed(x, layer.input_norm)).unflatten(-1, (-1, config.head_size))
        turned, values = heads[:, :num_turned], heads[:, num_turned:]
        if layer.head_norm is not None:
            turned = self._normed(turned, layer.head_norm)
        turned = rotate(turned, *table)
        queries, keys = turned[:, : config.num_heads], turned[:, config.num_heads :]
        out = torch.zeros_like(queries)
        begin = 0
        for cache, new in rows:
            here, begin = slice(begin, begin + len(new)), begin + len(new)
            there = slice(cache.length, cache.length + len(new))
            cache.keys[index, :, there] = keys[here].transpose(0, 1)
            cache.values[index, :, there] = values[here].transpose(0, 1)
            out[here] = _attend_row(
                queries[here], cache.keys[index, :, : there.stop], cache.values[index, :, : there.stop]
            )
        return out.flatten(1)


def _attend_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [t, H, D] are the last t of the tokens in k and v [KV, T, D]; gives [t, H, D].

    One new token sees all: its query heads are laid beside each other, and each key and value is read once.
    """
    num_new, num_heads, size = q.shape
    if num_new == 1:
        grouped = q.view(1, len(k), num_heads // len(k), size)
        return F.scaled_dot_product_attention(grouped, k[None], v[None]).view(1, num_heads, size)
    q, k, v = q.transpose(0, 1)[None], k[None], v[None]
    if num_new == k.shape[2]:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        seen = torch.ones(num_new, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - num_new)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    return out[0].transpose(0, 1)
