"""The objective of the dpo stage: one of seven losses with its parameters, and per-pair metrics. A loss accepts only
the options that its paper defines; `check` raises UsageError for others."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdata.errors import UsageError


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities and token counts of S pairs; every field is a tensor [S]. chosen, rejected: the policy's logps,
    summed over the trained tokens. ref_chosen, ref_rejected: those of the reference model, 0 if there is none.
    num_chosen, num_rejected: numbers of trained tokens, at least 1."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    num_chosen: Tensor
    num_rejected: Tensor

    @property
    def delta(self) -> Tensor:
        """Return (logp - ref_logp) of chosen minus (logp - ref_logp) of rejected, [S], from summed logps."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    @property
    def mean_delta(self) -> Tensor:
        """Return `delta` with the logps of each side averaged over its trained tokens, [S]."""
        chosen, rejected = self.chosen - self.ref_chosen, self.rejected - self.ref_rejected
        return chosen / self.num_chosen - rejected / self.num_rejected

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Return the policy's mean logps per trained token of chosen and of rejected, [S] each."""
        return self.chosen / self.num_chosen, self.rejected / self.num_rejected


@dataclass(frozen=True)
class Objective:
    """The name of a loss of `LOSSES` and its parameters. label_smoothing: assumed share of pairs whose labels are
    swapped. sft_weight: weight of the chosen reply's negative log-likelihood per token, added to the loss. reference:
    "start" for the weights the run starts from, "none", or the path of a run or checkpoint."""

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0  # target margin of the loss simpo
    sft_weight: float = 0.0
    reference: str = "start"


@dataclass(frozen=True)
class PairLoss:
    """One entry of `LOSSES`. loss, margin: from (PairLogps, Objective) to [S], the loss of each pair and its reward
    margin, which is positive if the policy prefers chosen (for losses with a reference: more than the reference does).
    takes_smoothing: accepts label smoothing. needs_reference: is defined with reference logps."""

    loss: Callable[[PairLogps, Objective], Tensor]
    margin: Callable[[PairLogps, Objective], Tensor]
    takes_smoothing: bool = False
    needs_reference: bool = True


def _margin_of_sums(p: PairLogps, o: Objective) -> Tensor:
    return o.beta * p.delta


def _margin_of_means(p: PairLogps, o: Objective) -> Tensor:
    return o.beta * p.mean_delta


LOSSES = {
    "sigmoid": PairLoss(lambda p, o: dpo_sigmoid(p.delta, o.beta, o.label_smoothing), _margin_of_sums, True),
    "sigmoid_norm": PairLoss(lambda p, o: dpo_sigmoid(p.mean_delta, o.beta, o.label_smoothing), _margin_of_means, True),
    "robust": PairLoss(lambda p, o: dpo_robust(p.delta, o.beta, o.label_smoothing), _margin_of_sums, True),
    "hinge": PairLoss(lambda p, o: dpo_hinge(p.delta, o.beta), _margin_of_sums),
    "ipo": PairLoss(lambda p, o: ipo(p.mean_delta, o.beta), _margin_of_means),
    "simpo": PairLoss(
        lambda p, o: simpo(p.means[0] - p.means[1], o.beta, o.gamma, o.label_smoothing),
        lambda p, o: o.beta * (p.means[0] - p.means[1]),
        True,
        needs_reference=False,
    ),
    "orpo": PairLoss(
        lambda p, o: orpo(*p.means, o.beta), lambda p, o: o.beta * log_odds_ratio(*p.means), needs_reference=False
    ),
}
# Margins up to this size may be rounding errors. Such a pair counts as half right, so that a policy equal to its
# reference has accuracy 0.5.
TIE = 1e-4
FIGURES = (
    "reward_margin",  # see PairLoss
    "margin_size",  # absolute value of the reward margin
    "accuracy",  # 1 if the reward margin is positive, 0.5 if it is about 0, else 0
    "chosen_logps",  # the policy's logp of the chosen reply, summed over its tokens
    "rejected_logps",
    "chosen_nll",  # negative log-likelihood of the chosen reply, nats per token
    "chosen_drift",  # the policy's summed logp of the chosen reply minus the reference's
    "rejected_drift",
    "flipped_right",  # 1 if the policy gives chosen a higher summed logp than rejected and the reference does not
    "flipped_wrong",  # 1 if the reference gives chosen a higher summed logp than rejected and the policy does not
)


def check(objective: Objective) -> None:
    """Raise UsageError if the loss is unknown, a parameter out of range, or an option not defined for the loss."""
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
    """Return whether the loss needs the logps of a reference model and `objective.reference` is not "none"."""
    return LOSSES[objective.loss].needs_reference and objective.reference != "none"


def loss_at_reference(objective: Objective) -> float:
    """Return the loss of a pair, without the SFT term, if the policy equals its reference; ln 2 for sigmoid losses."""
    zero, one = torch.zeros(1), torch.ones(1)
    return LOSSES[objective.loss].loss(PairLogps(zero, zero, zero, zero, one, one), objective).item()


def pair_figures(
    objective: Objective, logps: Tensor, counts: Tensor, reference: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each pair, [S] with gradient, including the `sft_weight` term, and the metrics in FIGURES,
    each [S] without gradient. logps: float64 [S, 2], the policy's summed logps of chosen and rejected. counts: [S, 2],
    their trained tokens. reference: [S, 2], the reference model's summed logps; a loss without reference uses them only
    for the metrics drift and flips. With None these are NaN, and a loss with reference uses 0."""
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


# --- the loss functions, one value per pair
#
# delta [S], one value per pair, is (logp - ref_logp) of chosen minus (logp - ref_logp) of rejected. logp is that of the
# policy, ref_logp that of the reference model. Both are sums over the trained tokens; for mean_delta they are means.
# epsilon is the assumed probability that chosen and rejected were swapped by mistake.


def dpo_sigmoid(delta: Tensor, beta: float, epsilon: float = 0.0) -> Tensor:
    """Return the DPO loss of each pair, [S]: -log sigmoid(beta delta), Rafailov et al. 2023, eq. 7. With a delta of
    means per token it is the length-normalised loss of Lambert et al. 2024 (Tülu 3), eq. 6; with epsilon above 0 the
    conservative DPO loss of Mitchell 2023, eq. 3."""
    return -(1 - epsilon) * F.logsigmoid(beta * delta) - epsilon * F.logsigmoid(-beta * delta)


def dpo_robust(delta: Tensor, beta: float, epsilon: float) -> Tensor:
    """Return the robust DPO loss of each pair, [S]: an unbiased estimate of the DPO loss when labels are swapped with
    probability `epsilon`, 0 <= epsilon < 0.5. Chowdhury et al. 2024, eq. 7."""
    return (-(1 - epsilon) * F.logsigmoid(beta * delta) + epsilon * F.logsigmoid(-beta * delta)) / (1 - 2 * epsilon)


def dpo_hinge(delta: Tensor, beta: float) -> Tensor:
    """Return the hinge loss, [S]: max(0, 1 - beta delta). Zhao et al. 2023 (SLiC), Liu et al. 2024 (RSO), eq. 9."""
    return F.relu(1 - beta * delta)


def ipo(mean_delta: Tensor, tau: float) -> Tensor:
    """Return the IPO loss of each pair, [S]: (mean_delta - 1 / (2 tau))^2, Azar et al. 2023, eq. 17, on means over the
    trained tokens, as in the authors' own implementation. The smaller tau > 0, the larger the margin aimed for."""
    return (mean_delta - 1 / (2 * tau)).square()


def simpo(mean_difference: Tensor, beta: float, gamma: float, epsilon: float = 0.0) -> Tensor:
    """Return the SimPO loss of each pair, [S]: -log sigmoid(beta mean_difference - gamma), Meng et al. 2024, eq. 6.
    mean_difference: [S], the policy's mean logp per token of chosen minus rejected. gamma: target margin, >= 0."""
    logits = beta * mean_difference - gamma
    return -(1 - epsilon) * F.logsigmoid(logits) - epsilon * F.logsigmoid(-logits)


def log_odds_ratio(mean_chosen: Tensor, mean_rejected: Tensor) -> Tensor:
    """Return log odds(chosen) - log odds(rejected), [S], with odds(p) = p / (1 - p). Hong et al. 2024 (ORPO), eq. 4.
    mean_chosen, mean_rejected: [S], log p as the mean logp per token; must be negative."""
    return (mean_chosen - mean_rejected) - (_log1mexp(mean_chosen) - _log1mexp(mean_rejected))


def orpo(mean_chosen: Tensor, mean_rejected: Tensor, weight: float) -> Tensor:
    """Return the ORPO loss of each pair, [S]: -mean_chosen - weight * log sigmoid(log odds ratio). Hong et al. 2024,
    eq. 6 and 7; the first term is the cross-entropy of the chosen reply, weight is lambda in the paper."""
    return -mean_chosen - weight * F.logsigmoid(log_odds_ratio(mean_chosen, mean_rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, without cancellation (Mächler 2012). x is clamped to at most -1e-6, because
    nearer to 0 float32 logps have no precision left."""
    x = x.clamp(max=-1e-6)
    small = x > -0.6931
    return torch.where(small, (-torch.expm1(x.where(small, x.new_tensor(-1.0)))).log(), (-x.exp()).log1p())
