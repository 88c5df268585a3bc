"""The stages pretrain, sft and dpo: the runs they start from, their losses, and the check of their first step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.errors import TrainError
from mmtrain.config import STAGE_KINDS
from mmtrain.model.batch import Batch, counts_of, logps_of, token_logps_of
from mmtrain.model.model import Model
from mmtrain.model.preference import FIGURES, Objective, loss_at_reference, pair_figures, uses_reference


@dataclass(frozen=True)
class Outcome:
    """The loss of a micro-batch, summed over `count` trained tokens or pairs, and further sums by name."""

    loss: Tensor
    count: int
    figures: Mapping[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """What distinguishes a stage in training.

    `starts_from` names the stages whose newest finished run it begins with (none: new weights). `loss(model, batch, ref,
    objective)` is its loss; `figures` are the names of the other sums that it returns. `check(means, tolerance, objective)`
    raises if the means of the very first step are not those expected. Only dpo uses the reference logps and the objective.
    """

    name: str
    starts_from: tuple[str, ...]
    loss: Callable[[Model, Batch, Tensor | None, Objective], Outcome]
    figures: tuple[str, ...] = ()
    check: Callable[[Mapping[str, float], float, Objective], None] | None = None

    @property
    def kind(self) -> str:
        """The kind of rows that the stage trains on."""
        return STAGE_KINDS[self.name]


def next_token(model: Model, batch: Batch, ref: Tensor | None, objective: Objective) -> Outcome:
    """Cross-entropy of the trained tokens, in nats."""
    return Outcome(-token_logps_of(model, batch).sum(), batch.num_trained, {})


def preference(model: Model, batch: Batch, ref: Tensor | None, objective: Objective) -> Outcome:
    """The objective's loss of each pair. Sequences alternate chosen, rejected; ref float64 [S, 2] are the reference's logps."""
    logps = logps_of(model, batch).view(-1, 2)
    loss, figures = pair_figures(objective, logps, counts_of(batch).view(-1, 2), ref)
    return Outcome(loss.sum(), len(loss), {name: values.sum() for name, values in figures.items()})


def _check_reference(means: Mapping[str, float], tolerance: float, objective: Objective) -> None:
    """TrainError unless the policy equals its reference before the first update: every margin 0, and the loss that of such a
    policy (ln 2 for the sigmoid losses). Otherwise the reference logps are stale. Those of another run as reference are
    checked when they are read."""
    if objective.reference != "start" or not uses_reference(objective):
        return
    expected = loss_at_reference(objective)
    loss = means["loss"] - objective.sft_weight * means["chosen_nll"]
    if not (abs(loss - expected) <= tolerance * max(1.0, expected) and means["margin_size"] <= tolerance):
        raise TrainError(
            f"step 0: dpo loss {loss:.5f} (expected {'ln 2 = ' if objective.loss != 'ipo' else ''}{expected:.5f}), mean "
            f"margin size {means['margin_size']:.5f} (expected 0): the reference's log-probabilities are not those of the "
            "weights the run starts from",
            "remove the dataset's .reference directory and start the run again; if it stays, report it",
        )


def step_zero_tolerance(dtype: torch.dtype) -> float:
    """Tolerance of the check at step 0: half-precision products round differently when tokens are batched differently."""
    return 1e-3 if dtype == torch.float32 else 2e-2


STAGES = {
    "pretrain": Stage("pretrain", (), next_token),
    "sft": Stage("sft", ("pretrain", "sft"), next_token),
    "dpo": Stage("dpo", ("sft",), preference, FIGURES, _check_reference),
}
