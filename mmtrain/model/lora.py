"""Low-rank adapters: y = x W^T + 2 (x A^T) B^T with W frozen, for every matrix of the blocks (Hu et al. 2021).

A run with --lora RANK trains only A and B. Its checkpoints hold them in PEFT's format, a few MB; RUN/base.safetensors holds
the weights they belong to. Loading such a checkpoint (chat, eval, export, --init) merges them.
"""

import math
from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from mmdata.io.records import JsonObject

# alpha / rank, for any rank: alpha = 2 rank is the usual choice
SCALE = 2.0
PEFT_PREFIX = "base_model.model."


class AdaptedLinear(nn.Linear):
    """A linear layer without bias, with adapters A [rank, in] and B [out, rank]; shares the frozen weight of `layer`."""

    def __init__(self, layer: nn.Linear, rank: int):
        assert layer.bias is None
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, None
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(
            layer.weight.new_zeros(layer.out_features, rank)
        )  # B A = 0: starts as the layer alone
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT and nn.Linear do

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight) + F.linear(F.linear(input, self.lora_A), SCALE * self.lora_B)


def adapt(model: nn.Module, rank: int) -> None:
    """Freeze a model and add adapters to each of its linear layers. They are drawn from torch's random state: seed it first."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, AdaptedLinear(child, rank))


def is_adapter(name: str) -> bool:
    """Whether a parameter name is that of an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's adapters under PEFT's names; empty for a model without adapters."""
    return {f"{PEFT_PREFIX}{name}.weight": value for name, value in model.state_dict().items() if is_adapter(name)}


def load_adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapters under PEFT's names into a model with adapters. RuntimeError if layers or rank differ."""
    adapters = adapters_of(model)
    if {name: value.shape for name, value in adapters.items()} != {
        name: value.shape for name, value in tensors.items()
    }:
        raise RuntimeError("the adapters are of other layers or another rank")
    for name, value in adapters.items():
        value.copy_(tensors[name])


def merge(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New weights W + SCALE B A in fp32, for adapters under PEFT's names."""
    merged = dict(weights)
    for name, a, b in _pairs(adapters):
        merged[name] = weights[name].float() + SCALE * (b.float() @ a.float())
    return merged


def peft_config(adapters: Mapping[str, Tensor]) -> JsonObject:
    """adapter_config.json for these adapters, as peft reads it."""
    pairs = list(_pairs(adapters))
    rank = pairs[0][1].shape[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.split(".")[-2] for name, _, _ in pairs}),
    }


def _pairs(adapters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name of the weight, A and B of every layer with adapters."""
    for name, a in adapters.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            yield f"{layer.removeprefix(PEFT_PREFIX)}.weight", a, adapters[f"{layer}.lora_B.weight"]
