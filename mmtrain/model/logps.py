"""Log-probabilities of trained tokens, and the losses of pairs. Log-probabilities are fp32 in any precision of the model,
their sums float64; at most CHUNK rows of logits exist at a time.

The shift by one is here and nowhere else: the hidden state at position i - 1 predicts the token at i. Only the first token
of a reply that shares another's prompt is predicted from the end of the prompt (`predecessors`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048  # rows of logits held at a time: 52 MB at 6,400 ids


class _TokenLogps(torch.autograd.Function):
    """log softmax(hidden weight^T)[target] for each row, in chunks. The backward pass computes the logits of each chunk again,
    unless there is only one chunk.

    It saves the inputs, one fp32 number per row, and at most one chunk of logits; gradients are summed in fp32.
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
        is_frozen = not ctx.needs_input_grad[1]  # with adapters
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
        ctx.logits = None  # the graph may live longer than they are needed
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.dtypes[1]), None, None, None


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, summed and returned in fp32: for half-precision inputs by the kernel on CUDA, elsewhere by converting them."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Log-probability of each target, fp32 [N]; gradients reach hidden and weight.

    hidden [N, C] are the states at the targets' predecessors, weight is [V, C], targets int64 [N]. The matrices are
    multiplied in `dtype`; sums are fp32.
    """
    return _TokenLogps.apply(hidden, weight, targets, chunk, dtype)  # type: ignore[return-value]


def predecessors(trained: Tensor, shared: Tensor | None = None) -> Tensor:
    """Positions of the hidden states that predict the trained tokens, int64 [N]: one before each. This is the shift by one.

    trained int64 [N], ascending. With `shared` (int64 [S, 3]: lengths of prompt, chosen, rejected, end to end) the
    predecessor of the first token of a rejected reply is the last one of its prompt.
    """
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
    """Log-probabilities fp32 [N] of the tokens ids[trained]; hidden [T, C] at all positions. `shared`: see `predecessors`."""
    return token_logps(hidden.index_select(0, predecessors(trained, shared)), weight, ids[trained], dtype=dtype)


def sum_by_sequence(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sums float64 [num_sequences] of the token values [N] of each sequence; 0 for a sequence without trained tokens.

    float32 would round the thousands of nats of a long reply by 1e-4, as much as a margin may have moved.
    """
    return logps.new_zeros(num_sequences, dtype=torch.float64).index_add(0, sequence_ids, logps.double())


# --- losses of pairs, one value per pair -----------------------------------------------------------------------------
#
# delta [S] is the difference of log ratios, (log pi/ref of chosen) - (log pi/ref of rejected), of sums over the sequence or
# of means per token. epsilon is the share of labels assumed to be wrong.


def dpo_sigmoid(delta: Tensor, beta: float, epsilon: float = 0.0) -> Tensor:
    """-log sigmoid(beta delta): Rafailov et al. 2023, eq. 7. With epsilon the conservative loss of Mitchell 2023, eq. 3.

    With delta of means it is the length-normalised loss of Lambert et al. 2024 (Tülu 3), eq. 6.
    """
    return -(1 - epsilon) * F.logsigmoid(beta * delta) - epsilon * F.logsigmoid(-beta * delta)


def dpo_robust(delta: Tensor, beta: float, epsilon: float) -> Tensor:
    """The unbiased loss under labels flipped with probability epsilon < 0.5: Chowdhury et al. 2024, eq. 7."""
    return (-(1 - epsilon) * F.logsigmoid(beta * delta) + epsilon * F.logsigmoid(-beta * delta)) / (1 - 2 * epsilon)


def dpo_hinge(delta: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta delta): Zhao et al. 2023 (SLiC) in the form of Liu et al. 2024 (RSO), eq. 9."""
    return F.relu(1 - beta * delta)


def ipo(mean_delta: Tensor, tau: float) -> Tensor:
    """(delta - 1 / (2 tau))^2 with delta of means per token: Azar et al. 2023, eq. 17, averaged as its authors do."""
    return (mean_delta - 1 / (2 * tau)).square()


def simpo(mean_difference: Tensor, beta: float, gamma: float, epsilon: float = 0.0) -> Tensor:
    """-log sigmoid(beta (mean logp of chosen - of rejected) - gamma): Meng et al. 2024, eq. 6. Needs no reference."""
    logits = beta * mean_difference - gamma
    return -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)


def log_odds_ratio(mean_chosen: Tensor, mean_rejected: Tensor) -> Tensor:
    """log odds(chosen) - log odds(rejected), odds(p) = p / (1 - p) of the mean logps: Hong et al. 2024 (ORPO), eq. 4."""
    return (mean_chosen - mean_rejected) - (_log1mexp(mean_chosen) - _log1mexp(mean_rejected))


def orpo(mean_chosen: Tensor, mean_rejected: Tensor, weight: float) -> Tensor:
    """NLL per token of chosen - weight * log sigmoid(log odds ratio): Hong et al. 2024, eq. 6 and 7. Needs no reference."""
    return -mean_chosen - weight * F.logsigmoid(log_odds_ratio(mean_chosen, mean_rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends: Mächler 2012. x is clamped to -1e-6, where float32 still has precision."""
    x = x.clamp(max=-1e-6)
    small = x > -0.6931
    return torch.where(small, (-torch.expm1(x.where(small, x.new_tensor(-1.0)))).log(), (-x.exp()).log1p())
