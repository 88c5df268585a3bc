"""Attention for preference pairs that share one copy of their prompt: each pair is laid out as prompt + chosen reply +
rejected reply, and the rejected reply does not attend to the chosen one.

The result is the same as with two separate sequences, each with its own copy of the prompt. On the CPU there are two
attention calls per pair; on CUDA one FlexAttention call computes the whole micro-batch (speed not measured).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # number of queries, and of keys, in one block of FlexAttention's block mask


@dataclass(frozen=True)
class PairLayout:
    """The lengths and masks that attention needs for a micro-batch of pairs. sides: on the CPU one tuple per pair, the
    tokens of prompt, chosen and rejected reply, and a bool mask [rejected, prompt + rejected], True where a rejected
    token attends; empty on CUDA. block_mask: FlexAttention's mask on CUDA, else None. order, restore: always None;
    `Model.forward` can treat this class like `AttentionLayout`."""

    sides: list[tuple[int, int, int, Tensor]]
    block_mask: Any = None
    order: None = None
    restore: None = None


def make_pair_layout(lengths: Tensor, device: torch.device) -> PairLayout:
    """Return the layout of S pairs. lengths: int64 [S, 3] on the CPU, the number of tokens of prompt, chosen reply and
    rejected reply. device: where attention runs; the masks are made there."""
    if device.type == "cuda":
        return PairLayout([], block_mask(lengths.to(device)))
    sides = []
    for prompt, chosen, rejected in lengths.tolist():
        mask = torch.ones(rejected, prompt + rejected, dtype=torch.bool, device=device).tril(prompt)
        sides.append((prompt, chosen, rejected, mask))
    return PairLayout(sides)


def attend_pairs(q: Tensor, k: Tensor, v: Tensor, layout: PairLayout) -> Tensor:
    """Compute causal attention inside each pair; the rejected reply does not attend to the chosen one. q [T, H, D], k
    and v [T, KV, D] with KV key/value heads -> [T, H, D], for the T tokens of all pairs, laid end to end."""
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
    """Attention of q [Tq, H, D] over k, v [Tk, KV, D] -> [Tq, H, D]. mask: bool [Tq, Tk], True where a query attends to
    a key; None means causal, with Tq = Tk."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


# --- FlexAttention


def block_mask(lengths: Tensor) -> Any:
    """Return FlexAttention's BlockMask, on the device of `lengths`, for pairs laid end to end as prompt + chosen reply
    + rejected reply. lengths: int64 [S, 3], tokens of the three. For a block of queries, only the blocks of keys from
    the beginning of its first token's pair up to itself are computed: with pairs of about one size the cost is linear
    in the tokens."""
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
    """Return the compiled FlexAttention function; it is compiled once per process, with dynamic shapes."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """FlexAttention under the BlockMask `mask`, compiled on CUDA only: q [T, H, D], k and v [T, KV, D] -> [T, H, D]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    flex = _flex() if q.is_cuda else _eager_flex
    out = flex(q, k.to(q.dtype), v.to(q.dtype), block_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def _eager_flex(*heads: Tensor, **options: Any) -> Tensor:
    """Call FlexAttention without compiling it. Tests use this to check `block_mask` on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(*heads, **options)  # type: ignore[return-value]
