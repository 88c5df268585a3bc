"""The transformer, a Llama-like decoder: flat token ids and document ends in, one hidden state per token out.

Documents lie end to end without padding; attention never crosses their ends. Parameters have the names of Llama checkpoints,
so that an export is a copy. The output matrix is the embedding (`head_weight`).
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from mmtrain.config import ModelConfig
from mmtrain.model.attention import PairLayout, attend_pairs, make_pair_layout


class _RMSNorm(torch.autograd.Function):
    """RMSNorm for the CPU, where torch's own consists of many passes: takes about half the time of F.rms_norm, forward and
    backward (2,048 x 256, two threads)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale: dx = scale * (g w - n mean(g w n)), dw = sum over rows of g n."""
        (grad,) = grads
        x, weight, scale = ctx.saved_tensors
        n = x * scale
        product = grad * n
        mean = (product @ weight).unsqueeze(-1).div_(-x.shape[-1])
        return torch.addcmul(grad * weight, n, mean).mul_(scale), product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return cast(Tensor, _RMSNorm.apply(x, self.weight, self.eps))


def rotary_table(position_ids: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each fp32 [..., 1, D], of positions [...]; the second half repeats the first (half-split rotary)."""
    frequencies = theta ** -(torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size)
    angles = position_ids[..., None].float() * frequencies
    return torch.cat((angles, angles), -1).cos().unsqueeze(-2), torch.cat((angles, angles), -1).sin().unsqueeze(-2)


class Rotary:
    """Rotary tables, made once per device and at least doubled when longer ones are needed; not in state_dict. 25 MB for
    32,768 positions of width 96."""

    def __init__(self, config: ModelConfig):
        self._head_size, self._theta = config.head_size, config.rope_theta
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, position_ids: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """`rotary_table` of these positions, which are all below `end`; passed so as not to wait for the device."""
        device = position_ids.device
        cos, sin = self._tables.get(device) or (torch.empty(0), torch.empty(0))
        if len(cos) < end:
            with torch.inference_mode(False):  # also usable in training later
                positions = torch.arange(max(end, 2 * len(cos)), device=device)
                cos, sin = self._tables[device] = rotary_table(positions, self._head_size, self._theta)
        return cos[position_ids], sin[position_ids]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to heads [..., H, D]: x cos + rotate_half(x) sin."""
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


# --- attention inside documents -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionLayout:
    """The order of documents on the flat axis inside the blocks.

    `order` int64 [T] permutes the tokens before the blocks (None: no permutation), `restore` undoes it. `groups` are (number
    of documents, length) of neighbours of equal length; empty if a varlen kernel uses `cu_seqlens`.
    """

    order: Tensor | None
    restore: Tensor | None
    groups: list[tuple[int, int]]
    cu_seqlens: Tensor
    max_seqlen: int


def make_layout(cu_seqlens: Tensor, max_seqlen: int, device: torch.device) -> AttentionLayout:
    """The layout for documents with these ends. CUDA under autocast has a kernel for varying lengths (half precision only; not
    measured). Elsewhere documents are sorted by length once for all blocks, so that neighbours of equal length share one
    attention call on a view, without copies or padding.
    """
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
    """(varlen_attn, its parameters by name); None if this torch has no such kernel."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, inspect.signature(varlen_attn).parameters


def attend(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout | PairLayout) -> Tensor:
    """Causal attention inside each document. q [T, H, D], k and v [T, KV, D] -> [T, H, D]."""
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
    """Attention for n documents of one length: [n, L, H, D] -> [n * L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
    """Attention by the CUDA kernel for documents of varying length; `window_size` (-1, 0) means causal."""
    kernel = _varlen()
    assert kernel is not None
    varlen_attn, accepted = kernel
    if "enable_gqa" in accepted:
        options = {"enable_gqa": True}
    else:  # torch 2.11 and 2.12 want as many key as query heads
        options = {}
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    ends, longest = layout.cu_seqlens, layout.max_seqlen
    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), **options)


# --- the decoder ----------------------------------------------------------------------------------------------------


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """The output of each linear layer for x [..., C]. In training it is one product with the concatenated weights: x is read
    once, and its gradient is one product (3 % less time on the CPU, five kernels fewer per block on CUDA).

    Decoding multiplies one by one, as concatenating costs more than it saves for a token or two; so do layers with adapters.
    """
    weights = [layer.weight for layer in layers if type(layer) is nn.Linear]
    if not torch.is_grad_enabled() or len(weights) < len(layers):
        return [layer(x) for layer in layers]
    return list(F.linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1))


def spares(x: Tensor) -> bool:
    """Whether a block recomputes parts of x in its backward pass to keep less memory: on CUDA, where memory limits the
    micro-batch. On the CPU it costs more than 2 % of a step."""
    return x.is_cuda


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, where the shape has it, RMSNorm on each head's q and k."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_size = config.head_size
        kv_size = config.num_kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else nn.Identity()

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., H, D], k and v [..., KV, D] of x [..., C]."""
        parts = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in parts)
        if spares(x):
            v = v.contiguous()  # the only view of the three: it would keep the whole product for the backward pass
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout | PairLayout) -> Tensor:
        q, k, v = self.heads(x, cos, sin)
        return self.o_proj(attend(q, k, v, layout).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Where training `spares` memory it keeps gate(x) and up(x) alone and computes what
    stands between them and the last product again: half the bytes for two more passes over them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        if spares(x) and torch.is_grad_enabled():
            return cast(Tensor, recompute(self._down, gate, up, use_reentrant=False, preserve_rng_state=False))
        return self._down(gate, up)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each applied to the normalised stream and added to it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout | PairLayout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """Embedding, blocks and last norm; a separate module so that names begin with `model.`, as in Llama checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Model(nn.Module):
    """The language model without logits: the loss multiplies only the positions that it needs by `head_weight`.

    With `checkpoints_blocks`, training keeps only the input of each block and recomputes the rest in the backward pass: the
    same values in a third more time and about a tenth of the memory.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size > 0 and config.head_size % 2 == 0, config
        self.config = config
        self.model = Transformer(config)
        self.checkpoints_blocks = False
        self.rotary = Rotary(config)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every matrix from N(0, 1 / 3C), the variance of torch's default for a linear layer of width C (0.021 at 768). A
        fixed 0.02 is small for narrow models: the demo, at width 128, learned slower with it. Logits start near 0, the loss
        near ln V."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=(3 * self.config.hidden_size) ** -0.5)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, C]: the embedding, tied."""
        return self.model.embed_tokens.weight

    def forward(
        self, ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, shared: Tensor | None = None
    ) -> Tensor:
        """Hidden states [T, C] of flat ids [T]. cu_seqlens int32 [n + 1] are the ends of the documents, beginning with 0;
        positions restart at each and are below max_seqlen.

        With `shared` (int64 [n, 3], on the CPU) each document is a pair: prompt, chosen and rejected of these lengths, and
        the positions of rejected continue from the prompt's.
        """
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
