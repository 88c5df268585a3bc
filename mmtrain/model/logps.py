"""Log-probabilities of trained tokens: fp32 whatever the precision of the model, their sums float64. Few rows
of logits exist at a time (see `chunk_rows`), so that memory does not grow with the number of tokens."""

from typing import Any

import torch
from torch import Tensor

from mmtrain.model.precision import wide

CHUNK = 2048  # most rows of logits in memory at a time: 52 MB in fp32 for a vocabulary of 6,400 tokens
MOST_LOGITS = 2**26  # most logits in memory at a time, 268 MB in fp32: fewer rows from a vocabulary of 32,768 on


def chunk_rows(vocab_size: int) -> int:
    """Return how many rows of logits are computed at a time."""
    return max(1, min(CHUNK, MOST_LOGITS // vocab_size))


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden weight^T)[target] of each row, computed in chunks of rows. The backward pass computes the
    logits of each chunk again, unless there is only one, whose logits are saved. Gradients are summed in fp32."""

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
        """Return the gradients of hidden and weight (None if frozen), by d logp / d logits = onehot(target) -
        softmax(logits)."""
        hidden, weight, targets, lse = ctx.saved_tensors
        (grad,) = grads
        grad_hidden = torch.empty(hidden.shape, dtype=ctx.dtypes[0], device=hidden.device)
        is_frozen = not ctx.needs_input_grad[1]  # the embedding is frozen when only LoRA adapters are trained
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
        ctx.logits = None  # free this memory even if the autograd graph lives longer
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.dtypes[1]), None, None, None


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in fp32, with sums in fp32. CUDA has a kernel with fp32 output for half-precision inputs; elsewhere
    the inputs are converted first."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute the log-probability of each target token, fp32 [N], with gradients to `hidden` and `weight`. hidden: [N,
    C], for each target the hidden state that predicts it. weight: output embedding [V, C]. targets: int64 [N], token
    ids. chunk: rows of logits at a time; None for `chunk_rows`. dtype: matrices are multiplied in it; sums are fp32."""
    return _TokenLogps.apply(hidden, weight, targets, chunk or chunk_rows(len(weight)), dtype)  # type: ignore[return-value]


def predecessors(trained: Tensor, shared: Tensor | None = None) -> Tensor:
    """Return the position of the hidden state that predicts each trained token, int64 [N]: in general the position
    before it. This is the only place where inputs and targets are shifted by one. trained: int64 [N], positions of the
    trained tokens, ascending. shared: int64 [S, 3], tokens of prompt, chosen and rejected if the tokens are pairs laid
    end to end. Then the first token of a rejected reply is predicted from the last token of its prompt, not of
    chosen."""
    before = trained - 1
    if shared is None:
        return before
    ends = shared.sum(1).cumsum(0)
    first_rejected = ends - shared[:, 2]
    prompt_end = ends - shared.sum(1) + shared[:, 0] - 1
    at = torch.searchsorted(first_rejected, trained, right=True) - 1
    is_first = (at >= 0) & (first_rejected[at.clamp(min=0)] == trained)
    return torch.where(is_first, prompt_end[at.clamp(min=0)], before)


def trained_logps(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    trained: Tensor,
    *,
    shared: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the log-probabilities of the trained tokens, fp32 [N]. hidden: [T, C], of all positions. weight: output
    embedding [V, C]. ids: int64 [T]. trained, shared: see `predecessors`. dtype: matrices are multiplied in it."""
    return token_logps(hidden.index_select(0, predecessors(trained, shared)), weight, ids[trained], dtype=dtype)


def sum_by_sequence(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sum the values [N] of the trained tokens by sequence: float64 [num_sequences], as a float32 sum of thousands of
    nats has a rounding error of 1e-4, as large as a small change of a reward margin. sequence_ids: int64 [N]."""
    return wide(logps.new_zeros(num_sequences)).index_add(0, sequence_ids, wide(logps))
