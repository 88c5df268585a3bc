"""The optimizer Muon: it orthogonalises the momentum of each hidden weight matrix; AdamW updates embedding and norms.

The update rule is that of torch.optim.Muon with adjust_lr_fn="match_rms_adamw", so learning rate and weight decay mean
the same as for AdamW. The state of a matrix takes 4 bytes per weight (AdamW: 8). A step costs about 15 (C + ffn_size)
multiplications per weight, which is negligible for large batches only.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Jordan et al. 2024: five iterations of this quintic map singular values above about 0.01 to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
CHUNK_ELEMENTS = 2**25  # largest size of a batched product, in elements: 64 MB in bf16, about four copies at a time


def orthogonalized(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrices of x [n, A, B] with singular values near 1, in type `dtype`; a zero matrix stays zero. Each
    matrix X (transposed if tall) is divided by its Frobenius norm. The Newton-Schulz iteration X <- a X + (b G + c G^2)
    X with G = X X^T, applied ITERATIONS times, maps each singular value s to a s + b s^3 + c s^5."""
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
    """Optimizer that updates `matrices` by Muon and the parameter groups `others` by fused AdamW, at one learning rate.
    weight_decay: of `matrices`; the groups of `others` carry their own. betas, eps: of `others`. As with fused AdamW,
    gradients are divided by `grad_scale`, and if `found_inf` is 1, the step changes neither weights nor state, if these
    tensors are set before. Neither makes the host wait for the device."""

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
        self.param_groups += self.adamw.param_groups  # the same dicts, so a learning rate set in them reaches AdamW

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters with their gradients. `closure` must be None."""
        assert closure is None
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        group = self.param_groups[0]
        for parameters in _of_one_shape(group["params"]):
            self._step_batch(parameters, group["lr"], group["weight_decay"])

    def _step_batch(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Update matrices of equal shape, all of which must have gradients."""
        buffers = [self._buffer(parameter) for parameter in parameters]
        gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
        is_taken = torch.ones((), device=gradient.device)
        if self.grad_scale is not None:
            gradient /= self.grad_scale
        if self.found_inf is not None:
            is_taken = 1 - self.found_inf
            gradient = torch.where(is_taken > 0, gradient, 0.0)  # not a product, because NaN times 0 is NaN
        momentum = torch.stack(buffers).lerp_(gradient, (1 - MOMENTUM) * is_taken)
        for buffer, value in zip(buffers, momentum, strict=True):
            buffer.copy_(value)
        update = orthogonalized(gradient.lerp_(momentum, MOMENTUM), _product_dtype(gradient.device))  # Nesterov's
        # The root mean square of an orthogonalised A x B matrix is 1 / sqrt(max(A, B)), that of an AdamW update about
        # 0.2 (Liu et al. 2025, eq. 4).
        rate = lr * 0.2 * math.sqrt(max(update.shape[-2:]))
        update, decay = update.float() * (rate * is_taken), 1 - lr * weight_decay * is_taken
        for parameter, value in zip(parameters, update, strict=True):
            parameter.mul_(decay).sub_(value)

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def _of_one_shape(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield lists of parameters of equal shape, of at most CHUNK_ELEMENTS elements or a single larger parameter."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    for shape, alike in by_shape.items():
        size = max(1, CHUNK_ELEMENTS // shape.numel())
        for begin in range(0, len(alike), size):
            yield alike[begin : begin + size]


def _product_dtype(device: torch.device) -> torch.dtype:
    """Return the type to orthogonalise in, which tolerates bf16's rounding: bf16 where it is native on CUDA, else
    fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32
