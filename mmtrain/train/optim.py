"""The flat gradient, the optimizer (fused AdamW or Muon), its update, and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.config import BETA2
from mmtrain.model.precision import wide, widest
from mmtrain.train.muon import Muon

EPS = 1e-8
# Device types whose fused AdamW divides by `grad_scale` and obeys `found_inf`. On others the host does both, and waits.
TAKE_SCALE = ("cpu", "cuda")


def flat_gradient(model: nn.Module) -> Tensor:
    """Return a zeroed fp32 vector with one element per trainable parameter value, of which the parameters' gradients
    become views. Zeroing the gradients, summing them over ranks and computing their norm are then one call each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    return flat


def make(model: nn.Module, name: str, *, lr: float, weight_decay: float, beta2: float = BETA2) -> torch.optim.Optimizer:
    """Return the optimizer `name`, "adamw" or "muon", for all trainable parameters. weight_decay: of matrices only, not
    of norms. With "muon", Muon updates the hidden matrices, AdamW the embedding, the output projection, biases and
    norms. lr: replaced at every `update`. beta2: decay of AdamW's squared gradients."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    is_embedding = {n: name == "muon" and ("embed" in n or "lm_head" in n) for n in trained}
    hidden = [p for n, p in trained.items() if p.dim() >= 2 and not is_embedding[n]]
    embedding = [p for n, p in trained.items() if p.dim() >= 2 and is_embedding[n]]
    vectors = [p for p in trained.values() if p.dim() < 2]
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, beta2), "eps": EPS}
    if name == "muon":
        others = [{"params": embedding, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return Muon(hidden, others, weight_decay=weight_decay, **options)
    assert name == "adamw", name
    groups = [{"params": hidden, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True, **options)


def update(
    optimizer: torch.optim.Optimizer,
    gradient: Tensor,
    *,
    lr: float,
    count: Tensor | float,
    clip: float,
    is_finite: Tensor | bool = True,
) -> tuple[Tensor, Tensor]:
    """Make one optimizer step with the mean gradient `gradient` / `count`, clipped to norm `clip`. Return two float64
    scalars: the norm of the mean gradient before clipping, and 1 if the step was taken, else 0.

    gradient: the flat gradient, a sum over `count` trained tokens or pairs. count: may include a loss scale as a
    factor. The step is skipped, without changes, if the norm is not finite, `is_finite` is false or `count` is 0. On
    the devices of TAKE_SCALE the host does not wait for the device.
    """
    count = torch.as_tensor(count, dtype=widest(gradient.device), device=gradient.device)
    norm = wide(gradient.norm()) / count
    is_taken = torch.isfinite(norm) & is_finite & (count > 0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scale = torch.where(is_taken, count / (clip / norm).clamp(max=1.0), 1.0)
    if gradient.device.type in TAKE_SCALE:
        optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]
        optimizer.found_inf = 1 - is_taken.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif is_taken:
        gradient /= scale
        optimizer.step()
    return norm, wide(is_taken)


def learning_rate(step: int, num_steps: int, *, peak: float, schedule: str, warmup: float) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0. It rises linearly to `peak` over the share
    `warmup` (0 to below 1) of the steps, then follows `schedule`: "cosine" falls to a tenth of the peak, "wsd" falls
    linearly to 0 over the last fifth of the steps (enough, Hägele et al. 2024), "constant" stays."""
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
