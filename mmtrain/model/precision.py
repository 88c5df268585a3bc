"""Mixed precision: the type that a device multiplies matrices in, and a loss scale for fp16.

Weights, gradients and sums are always fp32.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SCALE = 256.0  # initial loss scale of fp16; losses are sums, so gradients per token are of order 1 and need little
GROW_AFTER = 1000  # steps without overflow after which it doubles


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on cards that have it (Ampere and later), fp16 on those with fp16 matrix units (Volta, Turing), else fp32."""
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32


def autocast(device: torch.device) -> AbstractContextManager:
    """The context for forward passes: autocast to `autocast_dtype`, no effect for fp32."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the device or the machine (the CPU allocator has no error type)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: can't" in str(error)


class LossScale:
    """Factor of the loss in the backward pass, so that fp16 gradients neither underflow nor overflow; 1 for other types.

    `value` is an fp32 scalar on the device and a power of two, so scaling is exact. A step that overflows halves it,
    GROW_AFTER steps without overflow double it; the host never waits for the device.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.is_on = dtype == torch.float16
        self.value = torch.full((), SCALE if self.is_on else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, is_taken: Tensor) -> None:
        """Update after a step; `is_taken` is 1 if its gradient was finite, else 0."""
        if not self.is_on:
            return
        self.good_steps.add_(1).mul_(is_taken)
        grows = self.good_steps >= GROW_AFTER
        self.value.mul_(torch.where(is_taken > 0, 1.0 + grows.float(), 0.5)).clamp_(min=1.0)
        self.good_steps.mul_(~grows)

    def tensors(self) -> dict[str, Tensor]:
        """The state for a checkpoint; empty if it is off."""
        return {"scale/value": self.value, "scale/good_steps": self.good_steps} if self.is_on else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state from a checkpoint's tensors, if they hold it."""
        for name, value in self.tensors().items():
            if name in tensors:
                value.copy_(tensors[name])
