"""Muon: the momentum of every hidden matrix is orthogonalised before it is applied; embedding and norms go by AdamW.

Matrices of one shape are orthogonalised in one batched product. Holds 4 bytes a matrix weight instead of AdamW's 8, and
costs about 15 (C + ffn) multiplications a weight and step, which large batches hide and small ones do not. Same rule as
torch.optim.Muon with adjust_lr_fn="match_rms_adamw", so that AdamW's rates and decay keep their meaning.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Jordan et al. 2024: a quintic whose fifth iterate brings singular values from about 0.01 on to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
CHUNK_ELEMENTS = 2**25  # of one batched product: 64 MB in bf16 and about four such copies at a time


def orthogonalized(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each matrix of x [n, A, B] with its singular values brought near 1, in `dtype`; a zero matrix stays zero.

    Newton-Schulz: X <- a X + (b G + c G^2) X with G = X X^T, on the wide side. With singular values s that is
    s <- a s + b s^3 + c s^5, begun at s / ||X||.
    """
    a, b, c = COEFFICIENTS
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.to(dtype)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, fused AdamW for the groups of `others`; all share one rate, set in every group.

    Like fused AdamW it honours two tensors set on it before a step: gradients are divided by `grad_scale`, and where
    `found_inf` is 1 the step leaves weights and state as they are, without asking the device.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Sequence[Mapping[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__([{"params": list(matrices)}], {"lr": lr, "weight_decay": weight_decay})
        self.adamw = torch.optim.AdamW([dict(group) for group in others], lr=lr, betas=betas, eps=eps, fused=True)
        self.adamw.state = self.state
        self.param_groups += self.adamw.param_groups  # the same dicts: a rate set here is AdamW's too

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients that stand in the parameters."""
        assert closure is None
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        group = self.param_groups[0]
        for parameters in _of_one_shape(group["params"]):
            self._step_batch(parameters, group["lr"], group["weight_decay"])

    def _step_batch(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        """The same for equally shaped matrices."""
        buffers = [self._buffer(parameter) for parameter in parameters]
        gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
        is_taken = torch.ones((), device=gradient.device)
        if self.grad_scale is not None:
            gradient /= self.grad_scale
        if self.found_inf is not None:
            is_taken = 1 - self.found_inf
            gradient = torch.where(is_taken > 0, gradient, 0.0)  # a NaN times 0 would still be one
        momentum = torch.stack(buffers).lerp_(gradient, (1 - MOMENTUM) * is_taken)
        for buffer, value in zip(buffers, momentum, strict=True):
            buffer.copy_(value)
        update = orthogonalized(gradient.lerp_(momentum, MOMENTUM), _product_dtype(gradient.device))  # Nesterov's
        # The spread of an orthogonal A x B matrix is 1 / sqrt(max(A, B)), AdamW's about 0.2: Liu et al. 2025, eq. 4.
        rate = lr * 0.2 * math.sqrt(max(update.shape[-2:]))
        update, kept = update.float() * (rate * is_taken), 1 - lr * weight_decay * is_taken
        for parameter, value in zip(parameters, update, strict=True):
            parameter.mul_(kept).sub_(value)

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        """A matrix's momentum, 0 before its first step."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def _of_one_shape(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in batches of equal shape, none larger than CHUNK_ELEMENTS unless a single matrix is."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in by_shape.items():
        size = max(1, CHUNK_ELEMENTS // shape.numel())
        for begin in range(0, len(alike), size):
            yield alike[begin : begin + size]


def _product_dtype(device: torch.device) -> torch.dtype:
    """bf16 on cards that have it (the iteration forgives its rounding), fp32 elsewhere: CPUs without it are slower in it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32
