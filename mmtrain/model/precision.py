"""The types that a device multiplies matrices and takes sums in, and a loss scale for fp16. Weights and gradients are
fp32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Initial loss scale of fp16. It can be small, because losses are sums over tokens, so gradients are not small.
SCALE = 256.0
WITHOUT_FP64 = ("mps",)  # device types that have no fp64
GROW_AFTER = 1000  # the loss scale doubles after this many steps without overflow


def autocast_dtype(device: torch.device) -> torch.dtype:
    """Return the type to multiply matrices in: bf16 on CUDA devices that support it natively (Ampere and later), fp16
    on those with fp16 matrix units (Volta, Turing), else fp32. Always fp32 on other devices."""
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32


def autocast(device: torch.device) -> AbstractContextManager:
    """Return torch.autocast to the type of `autocast_dtype`, for forward passes; it has no effect for fp32."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def is_autocast(device: torch.device) -> bool:
    """Return whether autocast is enabled for a device; False for a type of device that has none."""
    return device.type in ("cpu", "cuda", "mps") and torch.is_autocast_enabled(device.type)


def wide(values: Tensor) -> Tensor:
    """Return values in the type of sums over many tokens on their device (see `widest`)."""
    return values.to(widest(values.device))


def widest(device: torch.device) -> torch.dtype:
    """Return the type of sums over many tokens on a device: fp64, or fp32 where there is none."""
    return torch.float32 if device.type in WITHOUT_FP64 else torch.float64


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether device or machine is out of memory; only CUDA has an error type of its own."""
    texts = ("DefaultCPUAllocator: can't", "MPS backend out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


class LossScale:
    """Factor of the loss before the backward pass, so that fp16 gradients neither under- nor overflow; 1 for other
    types. value: fp32 scalar tensor on the device, a power of two, so scaling does not round. A step with overflow
    halves it (not below 1), and GROW_AFTER steps in a row without double it. The host never waits for the device."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.is_on = dtype == torch.float16
        self.value = torch.full((), SCALE if self.is_on else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, is_taken: Tensor) -> None:
        """Adjust the scale after an optimizer step (fp16 only). is_taken: scalar tensor, 1 if the gradient was finite,
        else 0."""
        if not self.is_on:
            return
        self.good_steps.add_(1).mul_(is_taken)
        grows = self.good_steps >= GROW_AFTER
        self.value.mul_(torch.where(is_taken > 0, 1.0 + grows.float(), 0.5)).clamp_(min=1.0)
        self.good_steps.mul_(~grows)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name, for a checkpoint; empty unless the type is fp16."""
        return {"scale/value": self.value, "scale/good_steps": self.good_steps} if self.is_on else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Copy the state from a checkpoint's tensors, in place; values without a tensor there stay."""
        for name, value in self.tensors().items():
            if name in tensors:
                value.copy_(tensors[name])
