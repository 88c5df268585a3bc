"""Low-rank adapters (LoRA, Hu et al. 2021): y = x W^T + SCALE (x A^T) B^T, W frozen, for the linear layers of all
blocks.

A run with --lora RANK trains only A and B. Its checkpoints contain only these, in the format of the PEFT library;
RUN/base.safetensors contains W. Commands that load such a checkpoint add SCALE B A to W.
"""

import math
from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from mmdata.io.records import JsonObject

# LoRA's alpha / rank. alpha = 2 rank is a usual choice, so this factor is the same for every rank.
SCALE = 2.0
PEFT_PREFIX = "base_model.model."  # of parameter names in the PEFT library's files


class AdaptedLinear(nn.Linear):
    """A linear layer with adapters A [rank, in_features] and B [out_features, rank]. It shares weight and bias
    of `layer` instead of copying it; B starts at 0, so the output is at first that of `layer`."""

    def __init__(self, layer: nn.Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(
            layer.weight.new_zeros(layer.out_features, rank)
        )  # 0, so that B A = 0 and the first output is that of the layer alone
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # the initialisation that PEFT and nn.Linear use

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b + SCALE (x A^T) B^T, [..., out_features], for x = `input` [..., in_features]."""
        return F.linear(input, self.weight, self.bias) + F.linear(F.linear(input, self.lora_A), SCALE * self.lora_B)


def adapt(model: nn.Module, rank: int) -> None:
    """Freeze all parameters of a model and replace each linear layer of its blocks by an `AdaptedLinear`, in
    place. The matrices A are drawn from torch's global random state."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(module, name, AdaptedLinear(child, rank))


def is_adapter(name: str) -> bool:
    """Return whether a parameter's name, as in `named_parameters`, is that of an adapter matrix A or B."""
    return name.endswith((".lora_A", ".lora_B"))


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's own adapter matrices (no copies) by PEFT's names; empty for a model without adapters."""
    return {f"{PEFT_PREFIX}{name}.weight": value for name, value in model.state_dict().items() if is_adapter(name)}


def load_adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter matrices, by PEFT's names, into a model that has adapters. Raises RuntimeError if names or shapes
    are not those of the model's adapters."""
    adapters = adapters_of(model)
    if {name: value.shape for name, value in adapters.items()} != {
        name: value.shape for name, value in tensors.items()
    }:
        raise RuntimeError("the adapters are of other layers or another rank")
    for name, value in adapters.items():
        value.copy_(tensors[name])


def merge(weights: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with adapters (by PEFT's names) added: W + SCALE B A in fp32 for a matrix with adapters."""
    merged = dict(weights)
    for name, a, b in _pairs(adapters):
        merged[name] = weights[name].float() + SCALE * (b.float() @ a.float())
    return merged


def peft_config(adapters: Mapping[str, Tensor]) -> JsonObject:
    """Return PEFT's adapter_config.json for these adapters, which must not be empty and must all have one rank."""
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
    """Yield, for every layer with adapters, the name of its weight in the model, its matrix A and its matrix B."""
    for name, a in adapters.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            yield f"{layer.removeprefix(PEFT_PREFIX)}.weight", a, adapters[f"{layer}.lora_B.weight"]
