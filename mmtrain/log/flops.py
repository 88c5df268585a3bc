"""Floating-point operations of training, and the rates of graphics cards by their datasheets. Does not import torch."""

import re

import numpy as np

from mmtrain.shapes import ModelConfig

# TFLOP/s of dense products in half precision with sums in fp32, by a pattern of torch's device name; the first counts.
PEAKS = {
    "GB200": 2500,
    "B200": 2250,
    "H[12]00 NVL": 835,
    "H100 PCIe": 756,
    "H[12]00": 989,
    "A[18]00": 312,
    "A40": 149.7,
    "A30": 165,
    "L40S": 362,
    "L4": 121,
    "V100": 125,
    "T4": 65,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the operations per second that the datasheet of a card promises in half precision; None for a card that is
    not in PEAKS and for other precisions. device_name: torch's. precision: such as "bfloat16"."""
    if precision not in ("bfloat16", "float16"):
        return None
    found = (rate for name, rate in PEAKS.items() if re.search(rf"\b{name}\b(?! (Ti|D|Laptop)\b)", device_name))
    return next((1e12 * rate for rate in found), None)


def weight_flops(shape: ModelConfig | None, num_params: int, tokens: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Return the operations of each step: 6 for each weight and token (2 forward, 4 backward); for the output projection
    only trained tokens count, since this trainer computes it only for these. An embedding of its own is read, not
    multiplied. shape: None if it is not known; then every token counts for all `num_params` weights."""
    head = shape.vocab_size * shape.hidden_size if shape else 0
    lookup = 0 if shape is None or shape.tied else head
    return 6.0 * (max(num_params - head - lookup, 0) * tokens + head * trained)


def attention_flops(shape: ModelConfig, length: float) -> float:
    """Return the operations of attention's products for a token in a sequence of `length` tokens, as others count them
    (PaLM, Chowdhery et al. 2022, appendix B): each token attends to all; half of that is done under a causal mask."""
    return 12.0 * shape.num_layers * shape.num_heads * shape.head_size * length
