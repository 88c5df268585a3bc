"""Pair losses against float64 references written from the papers, and against TRL; options that no paper defines."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmdata.errors import UsageError
from mmtrain.config import LOSS_BETAS
from mmtrain.model.preference import LOSSES, Objective, check, log_odds_ratio, loss_at_reference, pair_figures

COUNTS = torch.tensor([[3.0, 5.0], [40.0, 7.0], [11.0, 90.0], [1.0, 1.0], [25.0, 25.0], [9.0, 300.0]])


def logps(seed: int) -> torch.Tensor:
    """Plausible summed logps [6, 2]: 0.2 to 4 nats a token."""
    draw = torch.rand(6, 2, generator=torch.Generator().manual_seed(seed))
    return -COUNTS * (0.2 + 3.8 * draw)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def smooth(x: float, e: float) -> float:
    return -(1 - e) * math.log(sigmoid(x)) - e * math.log(sigmoid(-x))


def odds(mean: float) -> float:
    return mean - math.log1p(-math.exp(mean))


Scalars = tuple[float, float, float, float, float, float]  # chosen, rejected, ref chosen, ref rejected, tokens of each
REFERENCES: dict[str, tuple[Objective, Callable[[Scalars], float]]] = {
    "sigmoid": (Objective("sigmoid", 0.1), lambda s: smooth(0.1 * (s[0] - s[2] - s[1] + s[3]), 0)),
    "smoothed": (
        Objective("sigmoid", 0.2, label_smoothing=0.1),
        lambda s: smooth(0.2 * (s[0] - s[2] - s[1] + s[3]), 0.1),
    ),
    "sigmoid_norm": (
        Objective("sigmoid_norm", 5.0),
        lambda s: smooth(5 * ((s[0] - s[2]) / s[4] - (s[1] - s[3]) / s[5]), 0),
    ),
    "robust": (
        Objective("robust", 0.1, label_smoothing=0.2),
        lambda s: (0.8 * smooth(x := 0.1 * (s[0] - s[2] - s[1] + s[3]), 0) - 0.2 * smooth(-x, 0)) / 0.6,
    ),
    "hinge": (Objective("hinge", 0.1), lambda s: max(0.0, 1 - 0.1 * (s[0] - s[2] - s[1] + s[3]))),
    "ipo": (Objective("ipo", 0.7), lambda s: ((s[0] - s[2]) / s[4] - (s[1] - s[3]) / s[5] - 1 / 1.4) ** 2),
    "simpo": (Objective("simpo", 2.0, gamma=1.0), lambda s: smooth(2 * (s[0] / s[4] - s[1] / s[5]) - 1.0, 0)),
    "orpo": (
        Objective("orpo", 0.3),
        lambda s: -s[0] / s[4] - 0.3 * math.log(sigmoid(odds(s[0] / s[4]) - odds(s[1] / s[5]))),
    ),
    "sft": (
        Objective("sigmoid", 0.1, sft_weight=0.5),
        lambda s: smooth(0.1 * (s[0] - s[2] - s[1] + s[3]), 0) - 0.5 * s[0] / s[4],
    ),
}


@pytest.mark.parametrize("name", list(REFERENCES))
def test_a_loss_and_its_gradient_equal_a_float64_reference(name: str) -> None:
    objective, expected = REFERENCES[name]
    check(objective)
    policy, reference = logps(1).requires_grad_(), logps(2)
    loss, _ = pair_figures(objective, policy, COUNTS, reference)
    loss.sum().backward()
    assert policy.grad is not None
    for i in range(6):
        point = [*policy[i].double().tolist(), *reference[i].double().tolist(), *COUNTS[i].tolist()]
        value = expected(tuple(point))  # type: ignore[arg-type]
        assert loss[i].item() == pytest.approx(value, rel=1e-5, abs=1e-6)
        for side in (0, 1):
            h = 1e-5
            up, down = (expected(tuple(x + d * (j == side) for j, x in enumerate(point))) for d in (h, -h))  # type: ignore[arg-type]
            assert policy.grad[i, side].item() == pytest.approx((up - down) / (2 * h), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.needs_reference])
def test_the_loss_at_the_reference_is_the_one_step_0_must_show(name: str) -> None:
    objective = Objective(name, LOSS_BETAS[name], label_smoothing=0.1 if name == "robust" else 0.0)
    loss, figures = pair_figures(objective, logps(1), COUNTS, logps(1))
    assert torch.allclose(loss, torch.full((6,), loss_at_reference(objective))) and not figures["margin_size"].any()
    if name.startswith("sigmoid") or name == "robust":
        assert loss_at_reference(objective) == pytest.approx(math.log(2))


def test_without_a_reference_there_is_no_drift_but_a_margin() -> None:
    loss, figures = pair_figures(Objective("sigmoid", 0.1, reference="none"), logps(1), COUNTS, None)
    zero, _ = pair_figures(Objective("sigmoid", 0.1), logps(1), COUNTS, torch.zeros(6, 2))
    assert (
        torch.equal(loss, zero) and figures["chosen_drift"].isnan().all() and figures["reward_margin"].isfinite().all()
    )


def test_flips_count_pairs_whose_order_is_no_longer_the_references() -> None:
    reference = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-2.0, -1.0], [-1.0, -2.0]])
    policy = torch.tensor([[-2.0, -1.0], [-1.0, -2.0], [-2.0, -1.0], [-1.0, -2.0]])
    _, figures = pair_figures(Objective(), policy, torch.ones(4, 2), reference)
    assert figures["flipped_wrong"].tolist() == [1, 0, 0, 0] and figures["flipped_right"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("mean", [-1e-8, -1e-4, -0.6, -0.7, -30.0, -200.0])
def test_the_odds_ratio_stays_finite_and_right_at_both_ends(mean: float) -> None:
    chosen = torch.tensor([mean], requires_grad=True)
    found = log_odds_ratio(chosen, torch.tensor([-1.0]))
    found.sum().backward()
    assert chosen.grad is not None and chosen.grad.isfinite().all()
    assert found.item() == pytest.approx(odds(min(mean, -1e-6)) - odds(-1.0), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (Objective("dpo"), "unknown"),
        (Objective("hinge", label_smoothing=0.1), "not defined for --loss hinge"),
        (Objective("ipo", label_smoothing=0.1), "not defined"),
        (Objective("orpo", label_smoothing=0.1), "not defined"),
        (Objective("sigmoid", label_smoothing=0.5), "below 0.5"),
        (Objective("robust"), "needs --label-smoothing"),
        (Objective("sigmoid", gamma=1.0), "simpo's margin"),
        (Objective("orpo", sft_weight=0.1), "NLL in it already"),
        (Objective("sigmoid", sft_weight=-1.0), "negative"),
        (Objective("simpo", reference="runs/sft-1"), "no reference"),
    ],
)
def test_what_no_paper_defines_is_refused(objective: Objective, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        check(objective)
    assert caught.value.fix


# --- TRL ------------------------------------------------------------------------------------------------------------


def trl_loss(kind: str, policy: torch.Tensor, reference: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """TRL's own DPO loss of these pairs: its _compute_loss on a model that answers with the given log-probabilities, each
    sequence's spread evenly over its trained tokens behind one of prompt."""
    from trl.trainer.dpo_trainer import DPOTrainer

    width = int(COUNTS.max()) + 1
    counts = COUNTS.T.reshape(-1, 1)
    mask = (torch.arange(width)[None] >= 1) & (torch.arange(width)[None] <= counts)
    spread = ((policy / COUNTS).T.reshape(-1, 1) * mask)[:, 1:]
    zeros = torch.zeros_like(spread.detach())
    ids = torch.ones_like(mask, dtype=torch.int64)
    outputs = SimpleNamespace(log_probs=spread, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    alike = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=alike,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask.long()}
    inputs |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "beta", "smoothing"),
    [("sigmoid", 0.1, 0), ("sigmoid_norm", 5.0, 0), ("robust", 0.1, 0.2), ("hinge", 0.05, 0), ("ipo", 0.7, 0)],
)
def test_losses_and_gradients_are_trls(kind: str, beta: float, smoothing: float) -> None:
    for seed in range(10):
        mine, theirs = (logps(seed).requires_grad_() for _ in range(2))
        reference = logps(seed + 100)
        loss, _ = pair_figures(Objective(kind, beta, smoothing), mine, COUNTS, reference)
        other = trl_loss(kind, theirs, reference, beta, smoothing)
        loss.mean().backward()
        other.backward()
        assert loss.mean().item() == pytest.approx(other.item(), rel=1e-5)
        assert mine.grad is not None and theirs.grad is not None
        assert (mine.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "smoothing"), [("simpo", 0.0), ("simpo", 0.1), ("orpo", 0.0)])
def test_reference_free_losses_are_trls(kind: str, smoothing: float) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    alike = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(
        accelerator=alike, alpha=0.0, loss_type=kind, beta=0.4, simpo_gamma=1.2, label_smoothing=smoothing
    )
    for seed in range(10):
        policy = logps(seed)
        means = (policy / COUNTS).T
        gamma = 1.2 if kind == "simpo" else 0.0
        loss, _ = pair_figures(Objective(kind, 0.4, smoothing, gamma), policy, COUNTS, None)
        if kind == "simpo":
            expected = CPOTrainer.cpo_loss(trainer, *means)[0]
        else:
            expected = -means[0] - ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
        assert torch.allclose(loss, expected, rtol=1e-5, atol=1e-6)
