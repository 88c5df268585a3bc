"""Parameters -> one flat gradient and a fused AdamW; the learning rate as a function of the step. No state of its own beyond
AdamW's."""

import math

import torch
from torch import Tensor, nn

BETAS = (
    0.9,
    0.95,
)  # GPT-3's and Llama's for pretraining; a shorter memory than 0.999 forgives the noise of small batches
EPS = 1e-8


def flat_gradient(model: nn.Module) -> Tensor:
    """One fp32 vector of which every parameter's gradient is a view: zeroed, summed over ranks and measured in one call."""
    parameters = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    return flat


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW; only matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True)


def update(
    optimizer: torch.optim.AdamW, gradient: Tensor, *, lr: float, count: float, clip: float
) -> tuple[float, bool]:
    """One step on `gradient`, a sum over `count` tokens or pairs: averaged, clipped to norm `clip`, applied.

    Gives the norm of the averaged gradient before clipping and whether the step was taken: where the norm is not
    finite, weights and optimizer stay as they are. Averaging and clipping ride in the fused kernel's own scale, so
    they cost no pass over the gradient.
    """
    norm = gradient.norm().item() / count
    if not math.isfinite(norm):
        return norm, False
    for group in optimizer.param_groups:
        group["lr"] = lr
    shrink = min(1.0, clip / norm) if norm > 0 else 1.0
    optimizer.grad_scale = torch.tensor(count / shrink, device=gradient.device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.zeros((), device=gradient.device)  # type: ignore[attr-defined]
    optimizer.step()
    return norm, True


def learning_rate(step: int, num_steps: int, *, peak: float, schedule: str, warmup: float) -> float:
    """Rate of 0-based optimizer step `step`: a linear rise over the share `warmup`, then the schedule.

    cosine falls to a tenth of the peak; wsd holds the peak and falls linearly to 0 over the last fifth (Hägele et al.
    2024 find 20 % enough); constant stays.
    """
    num_rising = math.ceil(warmup * num_steps)
    if step < num_rising:
        return peak * (step + 1) / num_rising
    if schedule == "cosine":
        done = (step - num_rising) / max(1, num_steps - num_rising)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
    if schedule == "wsd":
        num_falling = max(1, math.ceil(0.2 * num_steps))
        return peak * min(1.0, (num_steps - step) / num_falling)
    return peak
