"""The transformer, a Llama-like decoder: from flat token ids and the ends of the sequences in them to one hidden state
per token. Logits are computed in `logps.py`.

Sequences are laid end to end without padding; attention never crosses the end of a sequence. Parameters have the names
of Llama checkpoints, so that exporting needs no renaming. What differs between architectures is in `ModelConfig`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from mmtrain.model.attention import PairLayout, attend_pairs, make_pair_layout
from mmtrain.shapes import ModelConfig, RopeScaling


class _RMSNorm(torch.autograd.Function):
    """RMSNorm for the CPU, where torch's own version reads and writes memory many times. Forward and backward together
    take about half the time of F.rms_norm (measured at 2,048 x 256 with two threads)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale and incoming gradient g: dx = scale * (g w - n mean(g w n)), dw = sum over rows of g n."""
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        n = x * scale
        product = grad * n
        mean = (product @ weight).unsqueeze(-1).div_(-x.shape[-1])
        return torch.addcmul(grad * weight, n, mean).mul_(scale), product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """Normalise the last dimension to root mean square 1: x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x: by torch's kernel on CUDA, by `_RMSNorm` elsewhere."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return cast(Tensor, _RMSNorm.apply(x, self.weight, self.eps))


def rope_divisors(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the numbers, from 1 to `scaling.factor`, that Llama 3's scaling divides the rotary frequencies by."""
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - kept) / scaling.factor + kept)


def rotary_table(
    position_ids: Tensor, head_size: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles of positions [...], each fp32 [..., 1, D] with D = `head_size`.
    theta: base of the frequencies. The second half of the last dimension repeats the first, for the half-split form of
    Llama checkpoints (dimension i is rotated together with i + D / 2)."""
    frequencies = rope_frequencies(head_size, theta, position_ids.device)
    if scaling:
        frequencies = frequencies / rope_divisors(frequencies, scaling)
    angles = position_ids[..., None].float() * frequencies
    return torch.cat((angles, angles), -1).cos().unsqueeze(-2), torch.cat((angles, angles), -1).sin().unsqueeze(-2)


def rope_frequencies(head_size: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Return the rotary frequencies of a head, fp32 [D / 2], in radians per position."""
    return theta ** -(torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)


class Rotary:
    """Tables of the cosines and sines of rotary position embeddings per device, computed at first use and again with at
    least twice the length when needed. Not part of state_dict; 25 MB for 32,768 positions with head width 96."""

    def __init__(self, config: ModelConfig):
        self._frequencies = config.head_size, config.rope_theta, config.rope_scaling
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, position_ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, each fp32 [..., 1, D], for `position_ids` [...]. end: a number greater than every
        position; finding the largest on the device would make the host wait."""
        device = position_ids.device
        cos, sin = self._tables.get(device) or (torch.empty(0), torch.empty(0))
        if len(cos) < end:
            with torch.inference_mode(False):  # a table made in inference mode could not be used in training later
                positions = torch.arange(max(end, 2 * len(cos)), device=device)
                cos, sin = self._tables[device] = rotary_table(positions, *self._frequencies)
        return cos[position_ids], sin[position_ids]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to x [..., H, D]: x cos + rotate_half(x) sin, in the type of x. cos, sin: [..., 1, D]."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


# --- attention inside sequences


@dataclass(frozen=True)
class AttentionLayout:
    """Where attention finds the sequences among the flat tokens, and the order of the tokens inside the blocks. order:
    int64 [T], tokens are permuted to x[order] before the first block; None keeps their order. restore: the inverse, or
    None. groups: (number of sequences, length) for each run of neighbouring sequences of equal length, in the permuted
    order; empty if attention uses the CUDA kernel for sequences of varying length, which reads `cu_seqlens` (int32 [n +
    1]) and `max_seqlen`."""

    order: Tensor | None
    restore: Tensor | None
    groups: list[tuple[int, int]]
    cu_seqlens: Tensor
    max_seqlen: int


def make_layout(cu_seqlens: Tensor, max_seqlen: int, device: torch.device) -> AttentionLayout:
    """Return the attention layout for n sequences. cu_seqlens: int32 [n + 1], their ends, beginning with 0. max_seqlen:
    an upper bound of their lengths. device: that of the tokens. On CUDA under autocast, torch's kernel for sequences of
    varying length is used, if there is one (half precision only; its speed has not been measured). Otherwise sequences
    are sorted by length, once for all blocks, so that equally long ones share one attention call without copies or
    padding."""
    if device.type == "cuda" and torch.is_autocast_enabled("cuda") and _varlen() is not None:
        return AttentionLayout(None, None, [], cu_seqlens.to(device), max_seqlen)
    ends = cu_seqlens.to("cpu", torch.int64)
    lengths = ends.diff()
    by_length = lengths.argsort(stable=True)
    sizes, counts = torch.unique_consecutive(lengths[by_length], return_counts=True)
    groups = [(n, size) for n, size in zip(counts.tolist(), sizes.tolist(), strict=True) if size]
    if torch.equal(by_length, torch.arange(len(lengths))):
        return AttentionLayout(None, None, groups, cu_seqlens, max_seqlen)
    sorted_lengths = lengths[by_length]
    starts = sorted_lengths.cumsum(0) - sorted_lengths
    shift = torch.repeat_interleave(ends[:-1][by_length] - starts, sorted_lengths)
    order = (torch.arange(len(shift)) + shift).to(device)
    return AttentionLayout(order, torch.argsort(order), groups, cu_seqlens, max_seqlen)


@cache
def _varlen() -> tuple | None:
    """Return torch's attention function for sequences of varying length and its parameters by name; None if it has
    none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, inspect.signature(varlen_attn).parameters


def attend(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout | PairLayout) -> Tensor:
    """Compute causal attention inside each sequence: q [T, H, D], k and v [T, KV, D] -> [T, H, D] with KV key/value
    heads. With a `PairLayout`, each sequence is a pair, and the rejected reply does not attend to the chosen reply."""
    if isinstance(layout, PairLayout):
        return attend_pairs(q, k, v, layout)
    if not layout.groups:
        return _attend_varlen(q, k, v, layout)
    sizes = [n * length for n, length in layout.groups]
    out = [
        _attend_equal(*(x.view(n, length, *x.shape[1:]) for x in parts))
        for (n, length), *parts in zip(layout.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    ]
    return torch.cat(out)


def _attend_equal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention for n sequences of length L: q [n, L, H, D], k and v [n, L, KV, D] -> [n L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """Causal attention by torch's CUDA kernel, half precision only: q [T, H, D], k and v [T, KV, D] -> [T, H, D]. In
    the kernel's terms, `window_size` (-1, 0) means causal."""
    kernel = _varlen()
    assert kernel is not None
    varlen_attn, accepted = kernel
    if "enable_gqa" in accepted:
        options = {"enable_gqa": True}
    else:  # torch 2.11 and 2.12 need as many key heads as query heads
        options = {}
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    ends, longest = layout.cu_seqlens, layout.max_seqlen
    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **options)


# --- the decoder


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return the outputs of several linear layers, all with or all without bias, for one input x [..., C]. In training
    they are one product with the concatenated weights: 3 % less time on the CPU, five kernels fewer per block on CUDA.
    For the few tokens of a decoding step, without gradients, concatenating costs more than it saves, so the layers are
    computed one by one, like those with LoRA adapters."""
    weights = [layer.weight for layer in layers if type(layer) is nn.Linear]
    if not torch.is_grad_enabled() or len(weights) < len(layers):
        return [layer(x) for layer in layers]
    biases = [layer.bias for layer in layers if isinstance(layer.bias, Tensor)]
    bias = torch.cat(biases) if biases else None
    return list(F.linear(x, torch.cat(weights), bias).split([len(weight) for weight in weights], -1))


def spares(x: Tensor) -> bool:
    """Return whether blocks compute some activations again in the backward pass to save memory, for input x: True on
    CUDA, where memory limits the micro-batch; on the CPU it would cost more than 2 % of a step."""
    return x.is_cuda


class Attention(nn.Module):
    """Grouped-query attention; with `config.qk_norm`, q and k are RMS-normalised before the rotary embeddings, which
    the layers in `config.layers_without_rope` do not have. layer: number of the layer, from 0."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.head_size = config.head_size
        self.rotates = layer not in config.layers_without_rope
        q_size, kv_size = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [..., H, D], k and v [..., KV, D] for x [..., C], with q and k rotated, if this layer
        rotates. cos, sin: [..., 1, D]."""
        parts = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in parts)
        if spares(x):
            v = (
                v.contiguous()
            )  # as a view it would keep the product of all three layers in memory until the backward pass
        q, k = self.q_norm(q), self.k_norm(k)
        return (rotate(q, cos, sin), rotate(k, cos, sin), v) if self.rotates else (q, k, v)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout | PairLayout) -> Tensor:
        """Return the attention output [T, C], after the output projection, for x [T, C]. cos, sin: [T, 1, D]."""
        q, k, v = self.heads(x, cos, sin)
        return self.o_proj(attend(q, k, v, layout).flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward layer: down(silu(gate(x)) * up(x)). In training on CUDA only gate(x) and up(x) are kept and
    their product is computed again, which halves the memory of the layer for two more passes over these tensors."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., C] for x [..., C]."""
        gate, up = project(x, self.gate_proj, self.up_proj)
        if spares(x) and torch.is_grad_enabled():
            return cast(Tensor, recompute(self._down, gate, up, use_reentrant=False, preserve_rng_state=False))
        return self._down(gate, up)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)


class Experts(nn.Module):
    """Mixture of experts: several MLPs, of which each token goes through a few (see `mix_experts`). Not trained by mm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [T, C] for x [T, C]."""
        return mix_experts(x, self.gate(x), list(self.experts), self.config)


def mix_experts(
    x: Tensor, scores: Tensor, experts: Sequence[Callable[[Tensor], Tensor]], config: ModelConfig
) -> Tensor:
    """Return for each row of x [T, C] the sum of the outputs of its `experts_per_token` most likely experts, weighted by
    their probabilities, the softmax of `scores` [T, number of experts]; with `norm_experts` these add up to 1."""
    weights, chosen = scores.softmax(-1, dtype=torch.float32).topk(config.experts_per_token)
    if config.norm_experts:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        rows, places = (chosen == number).nonzero(as_tuple=True)
        if len(rows):
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None].to(x.dtype))
    return out


class Block(nn.Module):
    """One transformer block with pre-normalisation: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = Experts(config) if config.num_experts else MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout | PairLayout) -> Tensor:
        """Return the block's output [T, C] for x [T, C]. cos, sin: [T, 1, D], of these positions."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, blocks and final norm; a module of its own only so that parameter names begin with `model.`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Model(nn.Module):
    """The language model up to the final hidden states; the loss multiplies only those that it needs by `head_weight`.
    checkpoints_blocks: training keeps only the input of each block and recomputes its activations in the backward pass,
    with equal results, for a third more time and about a tenth of the memory of activations."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size > 0 and config.head_size % 2 == 0, config
        self.config = config
        self.model = Transformer(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoints_blocks = False
        self.rotary = Rotary(config)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every matrix from N(0, 1 / (3 C)), where C is `hidden_size`, and set biases to 0; norm weights stay as
        they are (1 in a new model). Logits start near 0 and the loss near ln V. This is the variance of torch's default
        for a linear layer with C inputs; the standard deviation is 0.021 at C = 768. A fixed 0.02 is too small for
        narrow models: the demo model, with C = 128, learned more slowly with it."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=(3 * self.config.hidden_size) ** -0.5)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    @property
    def head_weight(self) -> Tensor:
        """Return the output projection [V, C]; if it is tied, this is the embedding."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, shared: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states [T, C], after the final norm, of flat token ids [T]. cu_seqlens: int32 [n + 1], the
        ends of the n sequences, beginning with 0. position_ids: int64 [T], restarting at 0 in each sequence, below
        `max_seqlen`. shared: int64 [n, 3] on the CPU, tokens of the three if each sequence is a pair laid out as prompt
        + chosen + rejected. Then the position ids of rejected continue from the prompt's end, and rejected does not
        attend to chosen."""
        if shared is None:
            layout = make_layout(cu_seqlens, max_seqlen, ids.device)
        else:
            layout = make_pair_layout(shared, ids.device)
        if layout.order is not None:
            ids, position_ids = ids[layout.order], position_ids[layout.order]
        x = self.model.embed_tokens(ids)
        cos, sin = self.rotary(position_ids, max_seqlen)
        for block in self.model.layers:
            if self.checkpoints_blocks and torch.is_grad_enabled():
                x = cast(Tensor, recompute(block, x, cos, sin, layout, use_reentrant=False))
            else:
                x = block(x, cos, sin, layout)
        x = self.model.norm(x)
        return x if layout.restore is None else x.index_select(0, layout.restore)
