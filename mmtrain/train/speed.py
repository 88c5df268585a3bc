"""How fast this device multiplies matrices: what a run's use of the hardware (MFU) is measured against."""

import time

import torch


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of one square product, the best of a few: some 20 ms on a CPU core, less on a card.

    The size is one at which the device is busy: a rate above it would need larger matrices than models of this class have.
    """
    size = 4096 if device.type == "cuda" else 512
    one = torch.ones(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        _wait(device)
        begun = time.perf_counter()
        torch.mm(one, one)
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
