"""Parameters -> one flat gradient and an optimizer, fused AdamW or Muon; the learning rate as a function of the step. No
state of its own beyond the optimizer's."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.config import BETA2
from mmtrain.train.muon import Muon

EPS = 1e-8
OPTIMIZERS = ("adamw", "muon")


def flat_gradient(model: nn.Module) -> Tensor:
    """One fp32 vector of which the gradient of every parameter to be trained is a view: zeroed, summed over ranks and
    measured in one call."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    return flat


def make(model: nn.Module, name: str, *, lr: float, weight_decay: float, beta2: float = BETA2) -> torch.optim.Optimizer:
    """The optimizer called `name` for all parameters to be trained; only matrices decay, norms do not.

    muon takes the hidden matrices, AdamW then the embedding (which is the output too) and the norms.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = [p for n, p in trained.items() if p.dim() >= 2 and not (name == "muon" and "embed" in n)]
    embedding = [p for n, p in trained.items() if p.dim() >= 2 and name == "muon" and "embed" in n]
    vectors = [p for p in trained.values() if p.dim() < 2]
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, beta2), "eps": EPS}
    if name == "muon":
        others = [{"params": embedding, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return Muon(hidden, others, weight_decay=weight_decay, **options)
    assert name == "adamw", name
    groups = [{"params": hidden, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **options)


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Fused AdamW with the usual memory."""
    return make(model, "adamw", lr=lr, weight_decay=weight_decay)


def update(
    optimizer: torch.optim.Optimizer,
    gradient: Tensor,
    *,
    lr: float,
    count: Tensor | float,
    clip: float,
    is_finite: Tensor | bool = True,
) -> tuple[Tensor, Tensor]:
    """One step on `gradient`, a sum over `count` tokens or pairs : averaged, clipped to norm `clip`, applied.

    Gives the norm of the averaged gradient before clipping and whether the step was taken (float64 scalars, 1 or 0): where
    the norm is not finite, `is_finite` is false or there is nothing to average, weights and optimizer stay as they are.
    Averaging, clipping and skipping ride in the fused kernel's own scale and switch: they cost no pass over the gradient,
    and the device is not asked for anything.
    """
    count = torch.as_tensor(count, dtype=torch.float64, device=gradient.device)
    norm = gradient.norm().double() / count
    is_taken = torch.isfinite(norm) & is_finite & (count > 0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scale = torch.where(is_taken, count / (clip / norm).clamp(max=1.0), 1.0)
    optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]
    optimizer.found_inf = 1 - is_taken.float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm, is_taken.double()


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
