"""Attention for pairs laid out as prompt + chosen + rejected: the prompt is computed once, rejected does not see chosen.

On the CPU there is one call per reply; that of the rejected reply uses the prompt's keys and values again. On CUDA one
FlexAttention call takes the whole micro-batch (not measured). Both are exact: each reply sees what it would see alone.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries and keys of a FlexAttention block


@dataclass(frozen=True)
class PairLayout:
    """Where the three pieces of each pair lie. On CUDA it is FlexAttention's `block_mask`; on the CPU `sides`: for every pair
    the lengths of prompt, chosen and rejected, and the mask [rejected, prompt + rejected] of what rejected sees.

    `order` and `restore`, as in `AttentionLayout`, are None: tokens keep their order.
    """

    sides: list[tuple[int, int, int, Tensor]]
    block_mask: Any = None
    order: None = None
    restore: None = None


def make_pair_layout(lengths: Tensor, device: torch.device) -> PairLayout:
    """The layout of pairs of these lengths, int64 [S, 3] on the CPU: prompt, chosen, rejected."""
    if device.type == "cuda":
        return PairLayout([], block_mask(lengths.to(device)))
    sides = []
    for prompt, chosen, rejected in lengths.tolist():
        mask = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=device).tril(prompt)
        sides.append((prompt, chosen, rejected, mask))
    return PairLayout(sides)


def attend_pairs(q: Tensor, k: Tensor, v: Tensor, layout: PairLayout) -> Tensor:
    """Attention inside each pair. q [T, H, D], k and v [T, KV, D] -> [T, H, D]."""
    if layout.block_mask is not None:
        return _attend_flex(q, k, v, layout.block_mask)
    sizes = [size for prompt, chosen, rejected, _ in layout.sides for size in (prompt + chosen, rejected)]
    pieces = [x.split(sizes) for x in (q, k, v)]
    out = []
    for i, (prompt, _, _, mask) in enumerate(layout.sides):
        (q1, q2), (k1, k2), (v1, v2) = (piece[2 * i : 2 * i + 2] for piece in pieces)
        out.append(_attend(q1, k1, v1, None))
        out.append(_attend(q2, torch.cat((k1[:prompt], k2)), torch.cat((v1[:prompt], v2)), mask))
    return torch.cat(out)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of one document, q [T, H, D]; causal without a mask."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


# --- FlexAttention --------------------------------------------------------------------------------------------------


def block_mask(lengths: Tensor) -> Any:
    """FlexAttention's mask for pairs of lengths int64 [S, 3] on the flat axis: a token sees earlier tokens of its own pair, and
    a rejected one no chosen ones. Blocks of keys begin with the first pair of a block of queries, so that the cost is linear
    in tokens for pairs of one size."""
    from torch.nn.attention.flex_attention import BlockMask

    device, totals = lengths.device, lengths.sum(1)
    num_tokens = int(totals.sum())
    pair = torch.repeat_interleave(torch.arange(len(lengths), device=device), totals)
    start = (totals.cumsum(0) - totals)[pair]
    place = torch.arange(num_tokens, device=device) - start
    piece = (place >= lengths[pair, 0]).long() + (place >= lengths[pair, 0] + lengths[pair, 1]).long()

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        crosses = (piece[query] == 2) & (piece[key] == 1)
        return (pair[query] == pair[key]) & (key <= query) & ~crosses

    num_blocks = -(-num_tokens // BLOCK)
    rows = torch.arange(num_blocks, device=device)
    first = start[rows * BLOCK] // BLOCK
    indices = first[:, None] + rows[None]
    counts = rows - first + 1
    indices = torch.where(rows[None] < counts[:, None], indices, 0)
    return BlockMask.from_kv_blocks(
        counts.int()[None, None],
        indices.int()[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(num_tokens, num_tokens),
    )


@cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    flex = _flex() if q.is_cuda else _eager_flex
    out = flex(q, k.to(q.dtype), v.to(q.dtype), block_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _eager_flex(*heads: Tensor, **options: Any) -> Tensor:
    """FlexAttention without the compiler, to test the mask on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(*heads, **options)  # type: ignore[return-value]
