"""Log-probabilities of trained tokens, and the loss functions for preference pairs.

Log-probabilities are fp32 whatever the precision of the model, and their sums are float64. At most CHUNK rows of logits
exist at a time, so that memory does not grow with the number of tokens.

The shift between input and target by one token is made in `predecessors` and nowhere else: the hidden state at position
i - 1 predicts the token at position i. The exception is the first token of a rejected reply that shares one copy of the
prompt with the chosen reply: the hidden state of the prompt's last token predicts it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2048  # rows of logits in memory at a time: 52 MB in fp32 for a vocabulary of 6,400 tokens


class _TokenLogps(torch.autograd.Function):
    """Autograd function that returns log softmax(hidden weight^T)[target] for each row, computed in chunks of rows.

    The backward pass computes the logits of each chunk again, unless there is only one chunk, whose logits are saved.
    For the backward pass it saves the inputs (converted to `dtype`), one fp32 number per row (logsumexp), and at most
    one chunk of logits. Gradients are summed in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        """Compute the log-probability of each target, fp32 [N]; the arguments are those of `token_logps`."""
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
        """Return the gradients of hidden and weight; None for weight if it is frozen. Uses d logp / d logits =
        onehot(target) - p with p = softmax(logits)."""
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
    """Return the matrix product a b in fp32, with sums in fp32.

    For half-precision inputs CUDA has a kernel with fp32 output; elsewhere the inputs are converted to fp32 first.
    """
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute the log-probability of each target token, fp32 [N]. Gradients flow to `hidden` and `weight`.

    `hidden`: [N, C], for each target the hidden state that predicts it. `weight`: output embedding [V, C]. `targets`:
    int64 [N], token ids. `chunk`: rows of logits computed at a time. `dtype`: type that the matrices are multiplied in;
    sums are fp32 in any case.
    """
    return _TokenLogps.apply(hidden, weight, targets, chunk, dtype)  # type: ignore[return-value]


def predecessors(trained: Tensor, shared: Tensor | None = None) -> Tensor:
    """Return the position of the hidden state that predicts each trained token, int64 [N]: the position before it, in
    general.

    `trained`: int64 [N], positions of the trained tokens, ascending. `shared`: int64 [S, 3] if the tokens are pairs
    laid end to end as prompt + chosen + rejected, the number of tokens of the three. With `shared`, the first token of
    a rejected reply is predicted from the last token of its prompt, not from the last token of the chosen reply before
    it.

    This is the only place where inputs and targets are shifted by one.
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
    """Return the log-probabilities of the trained tokens, fp32 [N].

    `hidden`: hidden states [T, C] of all positions. `weight`: output embedding [V, C]. `ids`: int64 [T]. `trained`:
    int64 [N], positions of the trained tokens, ascending. `shared`: int64 [S, 3], the number of tokens of prompt,
    chosen and rejected if pairs share one copy of the prompt, else None. `dtype`: type that the matrices are multiplied
    in.
    """
    return token_logps(hidden.index_select(0, predecessors(trained, shared)), weight, ids[trained], dtype=dtype)


def sum_by_sequence(logps: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """Sum per-token values by sequence; return float64 [num_sequences], 0 for a sequence without trained tokens.

    `logps`: values [N] of the trained tokens. `sequence_ids`: int64 [N], the sequence of each. The sum is float64
    because a float32 sum of thousands of nats has a rounding error of 1e-4, as large as a small change of a reward
    margin.
    """
    return logps.new_zeros(num_sequences, dtype=torch.float64).index_add(0, sequence_ids, logps.double())


# --- losses of pairs, one value per pair
#
# delta [S], one value per pair, is (logp - ref_logp) of chosen minus (logp - ref_logp) of rejected. logp is that of the
# policy, ref_logp that of the reference model. Both are sums over the trained tokens; for mean_delta they are means.
# epsilon is the assumed probability that chosen and rejected were swapped by mistake.


def dpo_sigmoid(delta: Tensor, beta: float, epsilon: float = 0.0) -> Tensor:
    """Return the DPO loss of each pair, [S]: -log sigmoid(beta delta), Rafailov et al. 2023, eq. 7.

    `delta`: [S], (logp - ref_logp) of chosen minus that of rejected, from logps summed over the sequence. With means
    per token it is the length-normalised loss of Lambert et al. 2024 (Tülu 3), eq. 6. `epsilon`: assumed probability
    that the two labels are swapped; above 0 it is the conservative DPO loss of Mitchell 2023, eq. 3.
    """
    return -(1 - epsilon) * F.logsigmoid(beta * delta) - epsilon * F.logsigmoid(-beta * delta)


def dpo_robust(delta: Tensor, beta: float, epsilon: float) -> Tensor:
    """Return the robust DPO loss of each pair, [S]: an unbiased estimate of the DPO loss when labels are swapped with
    probability `epsilon`, 0 <= epsilon < 0.5. Chowdhury et al. 2024, eq. 7.

    `delta`: [S], (logp - ref_logp) of chosen minus that of rejected, from summed logps.
    """
    return (-(1 - epsilon) * F.logsigmoid(beta * delta) + epsilon * F.logsigmoid(-beta * delta)) / (1 - 2 * epsilon)


def dpo_hinge(delta: Tensor, beta: float) -> Tensor:
    """Return the hinge loss of each pair, [S]: max(0, 1 - beta delta). Zhao et al. 2023 (SLiC) in the form of Liu et
    al. 2024 (RSO), eq. 9.

    `delta`: [S], (logp - ref_logp) of chosen minus that of rejected, from summed logps.
    """
    return F.relu(1 - beta * delta)


def ipo(mean_delta: Tensor, tau: float) -> Tensor:
    """Return the IPO loss of each pair, [S]: (mean_delta - 1 / (2 tau))^2, Azar et al. 2023, eq. 17.

    `mean_delta`: [S], (logp - ref_logp) of chosen minus that of rejected, from logps averaged over the trained tokens,
    as in the authors' own implementation. `tau` > 0: the smaller, the larger the margin that is aimed for.
    """
    return (mean_delta - 1 / (2 * tau)).square()


def simpo(mean_difference: Tensor, beta: float, gamma: float, epsilon: float = 0.0) -> Tensor:
    """Return the SimPO loss of each pair, [S]: -log sigmoid(beta mean_difference - gamma), Meng et al. 2024, eq. 6.

    `mean_difference`: [S], mean logp per token of chosen minus that of rejected, by the policy; no reference model is
    needed. `gamma`: target margin, >= 0. `epsilon`: assumed probability that the two labels are swapped.
    """
    logits = beta * mean_difference - gamma
    return -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)


def log_odds_ratio(mean_chosen: Tensor, mean_rejected: Tensor) -> Tensor:
    """Return log odds(chosen) - log odds(rejected), [S], with odds(p) = p / (1 - p). Hong et al. 2024 (ORPO), eq. 4.

    `mean_chosen`, `mean_rejected`: [S], log p as the mean logp per token; must be negative.
    """
    return (mean_chosen - mean_rejected) - (_log1mexp(mean_chosen) - _log1mexp(mean_rejected))


def orpo(mean_chosen: Tensor, mean_rejected: Tensor, weight: float) -> Tensor:
    """Return the ORPO loss of each pair, [S]: -mean_chosen - weight * log sigmoid(log odds ratio). Hong et al. 2024,
    eq. 6 and 7.

    `mean_chosen`, `mean_rejected`: [S], mean logp per token by the policy; no reference model is needed. The first term
    is the cross-entropy of the chosen reply; `weight` is lambda in the paper.
    """
    return -mean_chosen - weight * F.logsigmoid(log_odds_ratio(mean_chosen, mean_rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, without cancellation for x near 0 or far below it (Mächler 2012).

    x above -1e-6 is clamped to -1e-6, because nearer to 0 float32 logps have no precision left.
    """
    x = x.clamp(max=-1e-6)
    small = x > -0.6931
    return torch.where(small, (-torch.expm1(x.where(small, x.new_tensor(-1.0)))).log(), (-x.exp()).log1p())
