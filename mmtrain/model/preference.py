"""The objective of dpo: one of seven losses with its parameters, and figures of what training does to the pairs.

A loss accepts only the options that its paper defines; others are refused.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.errors import UsageError
from mmtrain.model import logps as losses


@dataclass(frozen=True)
class PairLogps:
    """Values [S] of S pairs: summed logps of both sides by the policy and the reference (0 without one); trained tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    num_chosen: Tensor
    num_rejected: Tensor

    @property
    def delta(self) -> Tensor:
        """Difference of the log ratios of sums."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    @property
    def mean_delta(self) -> Tensor:
        """Difference of the log ratios of means per token."""
        chosen, rejected = self.chosen - self.ref_chosen, self.rejected - self.ref_rejected
        return chosen / self.num_chosen - rejected / self.num_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The policy's mean logps per token of chosen and rejected."""
        return self.chosen / self.num_chosen, self.rejected / self.num_rejected


@dataclass(frozen=True)
class Objective:
    """A loss and its parameters. `reference`: "start" (the weights the run starts from), "none", or the path of a run."""

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0  # simpo's target margin
    sft_weight: float = 0.0
    reference: str = "start"


@dataclass(frozen=True)
class PairLoss:
    """A loss: `loss(logps, objective)` and its reward margin, both [S], and the options it accepts."""

    loss: Callable[[PairLogps, Objective], Tensor]
    margin: Callable[[PairLogps, Objective], Tensor]
    takes_smoothing: bool = False
    needs_reference: bool = True


def _margin_of_sums(p: PairLogps, o: Objective) -> Tensor:
    return o.beta * p.delta


def _margin_of_means(p: PairLogps, o: Objective) -> Tensor:
    return o.beta * p.mean_delta


LOSSES = {
    "sigmoid": PairLoss(lambda p, o: losses.dpo_sigmoid(p.delta, o.beta, o.label_smoothing), _margin_of_sums, True),
    "sigmoid_norm": PairLoss(
        lambda p, o: losses.dpo_sigmoid(p.mean_delta, o.beta, o.label_smoothing), _margin_of_means, True
    ),
    "robust": PairLoss(lambda p, o: losses.dpo_robust(p.delta, o.beta, o.label_smoothing), _margin_of_sums, True),
    "hinge": PairLoss(lambda p, o: losses.dpo_hinge(p.delta, o.beta), _margin_of_sums),
    "ipo": PairLoss(lambda p, o: losses.ipo(p.mean_delta, o.beta), _margin_of_means),
    "simpo": PairLoss(
        lambda p, o: losses.simpo(p.means[0] - p.means[1], o.beta, o.gamma, o.label_smoothing),
        lambda p, o: o.beta * (p.means[0] - p.means[1]),
        True,
        needs_reference=False,
    ),
    "orpo": PairLoss(
        lambda p, o: losses.orpo(*p.means, o.beta),
        lambda p, o: o.beta * losses.log_odds_ratio(*p.means),
        needs_reference=False,
    ),
}
TIE = 1e-4  # smaller margins are rounding errors: the pair counts half, and a policy equal to its reference has accuracy 0.5
FIGURES = (
    "reward_margin",
    "margin_size",
    "accuracy",
    "chosen_logps",
    "rejected_logps",
    "chosen_nll",
    "chosen_drift",
    "rejected_drift",
    "flipped_right",
    "flipped_wrong",
)


def check(objective: Objective) -> None:
    """UsageError for a combination of options that no paper defines."""
    if objective.loss not in LOSSES:
        raise UsageError(f"--loss {objective.loss} is unknown", f"use one of {', '.join(LOSSES)}")
    loss, name = LOSSES[objective.loss], objective.loss
    if not 0 <= objective.label_smoothing < 0.5:
        raise UsageError(
            f"--label-smoothing {objective.label_smoothing} must be a share of wrong labels, 0 to below 0.5", "try 0.1"
        )
    if objective.label_smoothing and not loss.takes_smoothing:
        able = ", ".join(other for other, its in LOSSES.items() if its.takes_smoothing)
        raise UsageError(f"--label-smoothing is not defined for --loss {name}", f"leave it out, or use one of {able}")
    if name == "robust" and not objective.label_smoothing:
        raise UsageError(
            "--loss robust needs --label-smoothing, the share of labels assumed to be wrong",
            "try --label-smoothing 0.1",
        )
    if objective.gamma and name != "simpo":
        raise UsageError(f"--gamma is simpo's margin; --loss {name} has none", "leave --gamma out, or use --loss simpo")
    if objective.sft_weight < 0 or objective.gamma < 0:
        raise UsageError("--sft-weight and --gamma cannot be negative", "leave them out for 0")
    if objective.sft_weight and name == "orpo":
        raise UsageError("--loss orpo has the chosen reply's NLL in it already", "leave --sft-weight out")
    if not loss.needs_reference and objective.reference not in ("start", "none"):
        raise UsageError(f"--loss {name} has no reference", "leave --reference out")


def uses_reference(objective: Objective) -> bool:
    """Whether the loss uses a reference's logps."""
    return LOSSES[objective.loss].needs_reference and objective.reference != "none"


def loss_at_reference(objective: Objective) -> float:
    """The loss of a pair for a policy equal to its reference, without the term of --sft-weight: ln 2 for the sigmoid losses."""
    zero, one = torch.zeros(1), torch.ones(1)
    return LOSSES[objective.loss].loss(PairLogps(zero, zero, zero, zero, one, one), objective).item()


def pair_figures(
    objective: Objective, logps: Tensor, counts: Tensor, reference: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [S] of S pairs, with gradient, and the FIGURES by name, each [S] and detached.

    logps float64 [S, 2] are sums for chosen and rejected, counts [S, 2] their trained tokens. reference [S, 2] are logps to
    measure drift from and, for losses with a reference, its logps. Without them drift and flips are NaN, and the loss uses
    logps of 0.
    """
    chosen, rejected = logps.T
    ref = reference if uses_reference(objective) and reference is not None else torch.zeros_like(logps)
    pairs = PairLogps(chosen, rejected, *ref.T, *counts.clamp(min=1).T)
    kind = LOSSES[objective.loss]
    loss = kind.loss(pairs, objective)
    nll = -pairs.means[0]
    if objective.sft_weight:
        loss = loss + objective.sft_weight * nll
    drift = (logps - reference if reference is not None else torch.full_like(logps, math.nan)).detach()
    was_right = (reference[:, 0] > reference[:, 1]) if reference is not None else None
    is_right = chosen.detach() > rejected.detach()
    unknown = torch.full_like(chosen.detach(), math.nan)
    margin = kind.margin(pairs, objective).detach()
    figures = {
        "reward_margin": margin,
        "margin_size": margin.abs(),
        "accuracy": (margin > TIE).float() + 0.5 * (margin.abs() <= TIE),
        "chosen_logps": chosen.detach(),
        "rejected_logps": rejected.detach(),
        "chosen_nll": nll.detach(),
        "chosen_drift": drift[:, 0],
        "rejected_drift": drift[:, 1],
        "flipped_right": unknown if was_right is None else (is_right & ~was_right).float(),
        "flipped_wrong": unknown if was_right is None else (~is_right & was_right).float(),
    }
    return loss, figures
