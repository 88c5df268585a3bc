"""Settings by name: what a preset, an optimizer or adapters change of a stage's defaults. Tables only; flags win over them.

The two presets are MiniMind's own defaults, read in its trainers of 2025-04-04 (minimind2) and 2026-08-21 (minimind3), so
that a run can be compared with it. Batches are its micro-batch x accumulation x length: as many positions, of which ours
all hold tokens and its own about half. Its weight decay also shrinks norms, ours never does; the earlier trainer's rate
begins at 1.1 times the one given and ends at 0.1, ours at 1.0. What mm takes without a preset stands in stages.py.
"""

from collections.abc import Mapping
from typing import Any

from mmdata.errors import UsageError
from mmtrain.config import TrainConfig

_TORCHS_ADAMW = {"schedule": "cosine", "warmup": 0.0, "weight_decay": 0.01, "beta2": 0.999, "clip": 1.0}

_PAIR = 880  # tokens of a pair of its dpo.jsonl on average, prompt counted twice, of those that fit 1,024

# preset -> stage, or lora for a stage with adapters
TABLE: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "minimind2": {
        "pretrain": {"model": "minimind2", "epochs": 1.0, "batch_tokens": 32 * 8 * 512, "lr": 5e-4},
        "sft": {"model": "minimind2", "epochs": 1.0, "batch_tokens": 32 * 512, "lr": 5e-5},
        "dpo": {
            "model": "minimind2",
            "epochs": 2.0,
            "batch_tokens": 4 * _PAIR,
            "lr": 1e-8,
            "loss": "sigmoid_norm",
            "beta": 0.1,
        },
        "lora": {"model": "minimind2", "epochs": 50.0, "batch_tokens": 16 * 512, "lr": 5e-5},
    },
    "minimind3": {
        "pretrain": {"model": "minimind3", "epochs": 2.0, "batch_tokens": 32 * 8 * 340, "lr": 5e-4},
        "sft": {"model": "minimind3", "epochs": 2.0, "batch_tokens": 16 * 768, "lr": 1e-5},
        "dpo": {
            "model": "minimind3",
            "epochs": 1.0,
            "batch_tokens": 4 * _PAIR,
            "lr": 4e-8,
            "loss": "sigmoid",
            "beta": 0.15,
        },
        "lora": {"model": "minimind3", "epochs": 10.0, "batch_tokens": 32 * 340, "lr": 1e-4},
    },
}

# From the flat optimum of a small model, tests/bench/RESULTS.md; at 26M to 104M parameters not measured.
MUON = {"lr": 4e-3}
# Chosen, not measured.
LORA = {"lr": 2e-3, "weight_decay": 0.0}


def preset_of(config: TrainConfig) -> Mapping[str, Any]:
    """The values of the preset asked for; none without one."""
    if config.preset is None:
        return {}
    if config.preset not in TABLE:
        raise UsageError(f"--preset {config.preset} is unknown", f"use one of {', '.join(TABLE)}")
    values = dict(TABLE[config.preset]["lora" if config.lora else config.stage])
    if config.lora and config.stage == "dpo":
        values |= {key: TABLE[config.preset]["dpo"][key] for key in ("epochs", "batch_tokens", "loss", "beta")}
    return _TORCHS_ADAMW | values


def defaults_of(config: TrainConfig, stage: Mapping[str, Any]) -> Mapping[str, Any]:
    """A stage's defaults as the optimizer or adapters asked for change them."""
    if config.lora:
        return {**stage, **LORA}
    return {**stage, **MUON} if config.optimizer == "muon" else stage
