"""What a device multiplies in, and what keeps that safe: autocast's type by hardware, and a loss scale for fp16.

Weights, gradients and sums are fp32 in every case.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SCALE = 256.0  # of an fp16 loss at first: our losses are sums, so a token's gradient is of order 1 and needs little
GROW_AFTER = 1000  # steps without an overflow that double it


def autocast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on cards that have it (Ampere and later), fp16 on those with fp16 matrix units only (Volta, Turing), else fp32."""
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32


def autocast(device: torch.device) -> AbstractContextManager:
    """The precision forward passes run in."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has no memory left (the CPU allocator has no type for it)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: can't" in str(error)


class LossScale:
    """What a loss is multiplied by before backward, so that fp16 gradients neither vanish nor overflow; 1 for other types.

    `value` is an fp32 scalar on the device, a power of two: scaling and its undoing change no bit. A step that overflows
    halves it, GROW_AFTER steps that do not double it, without asking the device.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.is_on = dtype == torch.float16
        self.value = torch.full((), SCALE if self.is_on else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, is_taken: Tensor) -> None:
        """Learn from a step: `is_taken` is 1 where its gradient was finite."""
        if not self.is_on:
            return
        self.good_steps.add_(1).mul_(is_taken)
        grows = self.good_steps >= GROW_AFTER
        self.value.mul_(torch.where(is_taken > 0, 1.0 + grows.float(), 0.5)).clamp_(min=1.0)
        self.good_steps.mul_(~grows)

    def tensors(self) -> dict[str, Tensor]:
        """Its state for a checkpoint; nothing where it is off."""
        return {"scale/value": self.value, "scale/good_steps": self.good_steps} if self.is_on else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the state back from a checkpoint's tensors, where it stands in them."""
        for name, value in self.tensors().items():
            if name in tensors:
                value.copy_(tensors[name])
