"""pretrain, sft, dpo: for each the row kind it trains on, where it starts from, its loss and its defaults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdata.errors import TrainError
from mmtrain.model.batch import Batch, counts_of, logps_of, token_logps_of
from mmtrain.model.model import Model
from mmtrain.model.preference import FIGURES, GAMMA, LOSSES, Objective, loss_at_reference, pair_figures, uses_reference
from mmtrain.train.optim import BETA2


@dataclass(frozen=True)
class Outcome:
    """A micro-batch's loss summed over `count` tokens or pairs, and further sums by name."""

    loss: Tensor
    count: int
    figures: Mapping[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """What sets one stage apart. `loss(model, batch, ref, objective)`; `check` looks at the very first step's means.

    `objective` is what pairs are trained for; the other stages do not look at it.
    """

    name: str
    kind: str
    starts_from: tuple[str, ...]  # stages whose newest finished run it begins with; none: from new weights
    loss: Callable[[Model, Batch, Tensor | None, Objective], Outcome]
    figures: tuple[str, ...]
    check: Callable[[Mapping[str, float], float, Objective], None]
    defaults: Mapping[str, Any]


def next_token(model: Model, batch: Batch, ref: Tensor | None, objective: Objective) -> Outcome:
    """Cross-entropy of the trained tokens, in nats."""
    return Outcome(-token_logps_of(model, batch).sum(), batch.num_trained, {})


def preference(model: Model, batch: Batch, ref: Tensor | None, objective: Objective) -> Outcome:
    """The objective's loss of each pair; sequences alternate chosen, rejected. ref: the reference's logps [S, 2]."""
    logps = logps_of(model, batch).view(-1, 2)
    loss, figures = pair_figures(objective, logps, counts_of(batch).view(-1, 2), ref)
    return Outcome(loss.sum(), len(loss), {name: values.sum() for name, values in figures.items()})


def _no_check(means: Mapping[str, float], tolerance: float, objective: Objective) -> None:
    """Any first loss will do."""


def _check_reference(means: Mapping[str, float], tolerance: float, objective: Objective) -> None:
    """Before the first update the policy is its reference: every margin is 0 and the loss what it is there (ln 2 for the
    sigmoid losses), or the logps are stale. Another run's weights as reference are checked when they are read."""
    if objective.reference != "start" or not uses_reference(objective):
        return
    expected = loss_at_reference(objective)
    found = means["loss"] - objective.sft_weight * means["chosen_nll"]
    if not (abs(found - expected) <= tolerance * max(1.0, expected) and means["margin_size"] <= tolerance):
        raise TrainError(
            f"step 0: dpo loss {found:.5f} (expected {'ln 2 = ' if objective.loss != 'ipo' else ''}{expected:.5f}), mean "
            f"margin size {means['margin_size']:.5f} (expected 0): the reference's log-probabilities are not those of the "
            "weights the run starts from",
            "remove the dataset's .reference directory and start the run again; if it stays, report it",
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
    "loss": "",
    "beta": 0.0,
    "label_smoothing": 0.0,
    "gamma": 0.0,
    "sft_weight": 0.0,
    "reference": "",
    "share_prompt": False,
    "guard": "",
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
# for the size, as SmolLM2's 1e-6 at beta 0.5, and the low end of what a short sweep found flat (docs/dpo.md); MiniMind's 1e-8
# moves nothing. Two passes over instructions and one over the rest follow the same recipes. Batches: MiniMind's pretraining step holds 131k positions, about half of them padding.
_PRETRAIN = {"epochs": 1.0, "batch_tokens": 65_536, "lr": 1e-3, "warmup": 0.02, "weight_decay": 0.1}
_SFT = {"epochs": 2.0, "batch_tokens": 32_768, "lr": 3e-4, "warmup": 0.03, "weight_decay": 0.0}
_DPO = {"epochs": 1.0, "batch_tokens": 16_384, "lr": 5e-6, "warmup": 0.1, "weight_decay": 0.0}
_PAIRS = {"loss": "sigmoid", "reference": "start"}


def pair_defaults(loss: str) -> dict[str, float]:
    """What a loss's own strengths are unless told; an unknown loss has none."""
    return {"beta": LOSSES[loss].beta, "gamma": GAMMA if loss == "simpo" else 0.0} if loss in LOSSES else {}


STAGES = {
    "pretrain": Stage("pretrain", "document", (), next_token, (), _no_check, _COMMON | _PRETRAIN),
    "sft": Stage("sft", "conversation", ("pretrain", "sft"), next_token, (), _no_check, _COMMON | _SFT),
    "dpo": Stage("dpo", "pair", ("sft",), preference, FIGURES, _check_reference, _COMMON | _DPO | _PAIRS),
}
