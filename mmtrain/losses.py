"""Tensors in, loss out. Log-probabilities are fp32 whatever the model computes in, and all logits are never held at once.

The shift by one stands here and nowhere else: the hidden state at position i - 1 predicts the token at i.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048  # rows of logits held at a time: 52 MB at 6,400 ids


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden weight^T)[target] row by row, in chunks. Backward computes each chunk's logits again, unless there
    is only one.

    Saved are the inputs, one fp32 number a row, and never more than one chunk of logits; gradients of both matrices are
    summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        low_hidden, low_weight = hidden.to(dtype), weight.to(dtype)
        lse = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        logps = torch.empty_like(lse)
        logits = None
        for begin in range(0, len(hidden), chunk):
            rows = slice(begin, begin + chunk)
            logits = _matmul(low_hidden[rows], low_weight.t())
            lse[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(-1, targets[rows, None])[:, 0] - lse[rows]
        ctx.save_for_backward(low_hidden, low_weight, targets, lse)
        ctx.chunk, ctx.dtypes = chunk, (hidden.dtype, weight.dtype)
        ctx.logits = logits if len(hidden) <= chunk else None
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """With p = softmax: d logp / d logits = onehot(target) - p."""
        hidden, weight, targets, lse = ctx.saved_tensors
        (grad,) = grads
        grad_hidden = torch.empty(hidden.shape, dtype=ctx.dtypes[0], device=hidden.device)
        is_frozen = not ctx.needs_input_grad[1]  # where adapters are trained alone
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=hidden.device) if not is_frozen else None
        for begin in range(0, len(hidden), ctx.chunk):
            rows = slice(begin, begin + ctx.chunk)
            logits = _matmul(hidden[rows], weight.t()) if ctx.logits is None else ctx.logits
            grad_logits = (logits - lse[rows, None]).exp_().mul_(-grad[rows, None])
            grad_logits.scatter_add_(-1, targets[rows, None], grad[rows, None])
            low = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = _matmul(low, weight)
            if grad_weight is not None:
                grad_weight += _matmul(low.t(), hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.dtypes[1]), None, None, None


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, summed up and returned in fp32. For half-width inputs CUDA does that in the kernel; elsewhere they are widened."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Log-probability of each target, fp32 [N]; gradients reach hidden and weight.

    hidden [N, C] stands at the targets' predecessors, weight is [V, C], targets int64 [N]. `dtype` is what the
    matrices are multiplied in; sums are fp32 in any case.
    """
    return _TokenLogps.apply(hidden, weight, targets, chunk, dtype)  # type: ignore[return-value]


def trained_logps(
    hidden: Tensor, weight: Tensor, ids: Tensor, trained: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Log-probabilities fp32 [N] of the tokens ids[trained]; hidden [T, C] of all positions. Here is the shift by one."""
    return token_logps(hidden.index_select(0, trained - 1), weight, ids[trained], dtype=dtype)


def sum_by_sequence(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Per-sequence sums [num_sequences] of token values [N]; a sequence without any has 0."""
    return logps.new_zeros(num_sequences).index_add(0, sequence_ids, logps)


def dpo_sigmoid(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Loss and reward margin of each pair, from summed logps [S]: -log sigmoid(margin), margin = beta * (difference of
    log ratios to the reference). Rafailov et al. 2023, eq. 7."""
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin), margin
