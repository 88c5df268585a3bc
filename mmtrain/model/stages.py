"""The training stages pretrain, sft and dpo: the weights each starts from, its loss, and the check of dpo's step 0."""

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
    """The loss of a micro-batch: a scalar with gradient, summed over `count` trained tokens (dpo: pairs). figures:
    further sums over the same tokens or pairs, by name."""

    loss: Tensor
    count: int
    figures: Mapping[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """What differs between training stages. starts_from: stages whose newest finished run gives the initial weights,
    unless the user chooses them; empty for new weights. loss: called with (model, batch, ref, objective), of which only
    dpo uses ref, the reference model's logps of the pairs, float64 [S, 2], and objective. figures: names of the other
    sums of `loss`. check: called with (means, tolerance, objective), raises TrainError for an unexpected first step, or
    None."""

    name: str
    starts_from: tuple[str, ...]
    loss: Callable[[Model, Batch, Tensor | None, Objective], Outcome]
    figures: tuple[str, ...] = ()
    check: Callable[[Mapping[str, float], float, Objective], None] | None = None

    @property
    def kind(self) -> str:
        """Return the kind of rows that the stage trains on: "document", "conversation" or "pair"."""
        return STAGE_KINDS[self.name]


def next_token(model: Model, batch: Batch, ref: Tensor | None, objective: Objective) -> Outcome:
    """Return the cross-entropy in nats, summed over the trained tokens. ref, objective: not used."""
    return Outcome(-token_logps_of(model, batch).sum(), batch.num_trained, {})


def preference(model: Model, batch: Batch, ref: Tensor | None, objective: Objective) -> Outcome:
    """Return the objective's loss and the metrics of `FIGURES`, summed over the pairs of a batch, whose sequences
    alternate chosen, rejected. ref: float64 [S, 2], the reference model's summed logps of chosen and rejected, or None.
    """
    logps = logps_of(model, batch).view(-1, 2)
    loss, figures = pair_figures(objective, logps, counts_of(batch).view(-1, 2), ref)
    return Outcome(loss.sum(), len(loss), {name: values.sum() for name, values in figures.items()})


def _check_reference(means: Mapping[str, float], tolerance: float, objective: Objective) -> None:
    """Raise TrainError unless the policy equals its reference at step 0: reward margins 0, and the loss (without the
    `sft_weight` term) that of `loss_at_reference`. Otherwise the cached reference logps do not belong to the weights
    that the run starts from. If the reference is another run, `train.reference` checks its logps instead."""
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
    """Return the tolerance of the check at step 0: 1e-3 for fp32, 2e-2 for half precision, whose products round
    differently when tokens are batched differently."""
    return 1e-3 if dtype == torch.float32 else 2e-2


STAGES = {
    "pretrain": Stage("pretrain", (), next_token),
    "sft": Stage("sft", ("pretrain", "sft"), next_token),
    "dpo": Stage("dpo", ("sft",), preference, FIGURES, _check_reference),
}
