"""pretrain, sft, dpo: for each the row kind it trains on, where it starts from, its loss and its defaults."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdata.errors import TrainError
from mmtrain.batch import Batch, logps_of, token_logps_of
from mmtrain.losses import dpo_sigmoid
from mmtrain.model import Model
from mmtrain.optim import BETA2


@dataclass(frozen=True)
class Outcome:
    """A micro-batch's loss summed over `count` tokens or pairs, and further sums by name."""

    loss: Tensor
    count: int
    figures: Mapping[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """What sets one stage apart. `loss(model, batch, ref, beta)`; `check` looks at the very first step's means."""

    name: str
    kind: str
    starts_from: tuple[str, ...]  # stages whose newest finished run it begins with; none: from new weights
    loss: Callable[[Model, Batch, Tensor | None, float], Outcome]
    figures: tuple[str, ...]
    check: Callable[[Mapping[str, float], float], None]
    defaults: Mapping[str, Any]


def next_token(model: Model, batch: Batch, ref: Tensor | None, beta: float) -> Outcome:
    """Cross-entropy of the trained tokens, in nats."""
    return Outcome(-token_logps_of(model, batch).sum(), batch.num_trained, {})


def preference(model: Model, batch: Batch, ref: Tensor | None, beta: float) -> Outcome:
    """The sigmoid loss of each pair; sequences alternate chosen, rejected. ref: the reference's logps [S, 2]."""
    assert ref is not None
    chosen, rejected = logps_of(model, batch).view(-1, 2).T
    ref_chosen, ref_rejected = ref.T
    loss, margin = dpo_sigmoid(chosen, rejected, ref_chosen, ref_rejected, beta)
    figures = {
        "reward_margin": margin,
        "margin_size": margin.abs(),
        "accuracy": (margin > 0).float(),
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_drift": chosen - ref_chosen,
        "rejected_drift": rejected - ref_rejected,
    }
    return Outcome(loss.sum(), len(loss), {name: values.detach().sum() for name, values in figures.items()})


def _no_check(means: Mapping[str, float], tolerance: float) -> None:
    """Any first loss will do."""


def _check_reference(means: Mapping[str, float], tolerance: float) -> None:
    """Before the first update the policy is the reference: its loss is ln 2 and every margin 0, or the logps are stale."""
    gap = abs(means["loss"] - math.log(2))
    if not (gap <= tolerance and means["margin_size"] <= tolerance):
        raise TrainError(
            f"step 0: dpo loss {means['loss']:.5f} (expected ln 2 = {math.log(2):.5f}), mean margin size "
            f"{means['margin_size']:.5f} (expected 0): the reference's log-probabilities are not those of the "
            "weights the run starts from",
            "remove the run's reference.safetensors and start the run again; if it stays, report it",
        )


def step_zero_tolerance(dtype: torch.dtype) -> float:
    """How far step 0 may be from ln 2: half-width products round differently when tokens are batched differently."""
    return 1e-3 if dtype == torch.float32 else 2e-2


_COMMON = {
    "preset": None,
    "model": "minimind2-small",
    "steps": None,
    "optimizer": "adamw",
    "beta2": BETA2,
    "schedule": "cosine",
    "beta": 0.0,
    "lora": 0,
    "ema": 0.0,
    "patience": 0,
    "clip": 1.0,
    "seed": 42,
    "max_skipped": 10,
    "val_every": 200,
    "save_every": 500,
    "keep_last": 2,
}

# Rates: for models of 26M to 135M parameters. Pretraining 1e-3 lies between MiniMind's 5e-4 and SmolLM-135M's 3e-3 (larger
# batches). sft 3e-4 is a third of it, as SmolLM2-135M's recipe (1e-3 after 3e-3). dpo: 5e-6 is Zephyr's 5e-7 for 7B raised
# for the size, as SmolLM2's 1e-6 at beta 0.5; MiniMind's 1e-8 moves nothing. Two passes over instructions and one over the
# rest follow the same recipes. Batches: MiniMind's pretraining step holds 131k positions, about half of them padding.
_PRETRAIN = {"epochs": 1.0, "batch_tokens": 65_536, "lr": 1e-3, "warmup": 0.02, "weight_decay": 0.1}
_SFT = {"epochs": 2.0, "batch_tokens": 32_768, "lr": 3e-4, "warmup": 0.03, "weight_decay": 0.0}
_DPO = {"epochs": 1.0, "batch_tokens": 32_768, "lr": 5e-6, "warmup": 0.1, "weight_decay": 0.0, "beta": 0.1}
_PAIR_FIGURES = (
    "reward_margin",
    "margin_size",
    "accuracy",
    "chosen_logps",
    "rejected_logps",
    "chosen_drift",
    "rejected_drift",
)

STAGES = {
    "pretrain": Stage("pretrain", "document", (), next_token, (), _no_check, _COMMON | _PRETRAIN),
    "sft": Stage("sft", "conversation", ("pretrain", "sft"), next_token, (), _no_check, _COMMON | _SFT),
    "dpo": Stage("dpo", "pair", ("sft",), preference, _PAIR_FIGURES, _check_reference, _COMMON | _DPO),
}
