"""Forecast how far dpo will move the margins, from a few trial steps before the first; and warn of forgetting.

The trial takes PROBES steps of the run's optimizer on the first micro-batches and then restores the weights. Meanwhile it
keeps a copy of them in host memory, and a second optimizer state.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.shards.pairs import PairLoader
from mmtrain.distributed import World
from mmtrain.model.batch import Batch, counts_of, logps_of, to_device
from mmtrain.model.model import Model
from mmtrain.model.precision import autocast
from mmtrain.model.preference import Objective, pair_figures
from mmtrain.train import optim
from mmtrain.train.plan import TrainPlan

PROBES = 4
PROBE_LR = (
    1e-6  # the least: below it a step's effect is lost in float32's rounding; effects are scaled to the run's rate
)
NO_EFFECT = 0.02  # a run whose margin cannot reach this changes nothing: its loss stays at ln 2 within 0.01
# Nats per token that held-out text may get worse by. A guard rose by 0.013 or less in runs that moved held-out pairs the
# right way, by 0.056 in one that memorised (tests/bench/RESULTS.md); chosen replies get a little worse in good runs too.
FORGETTING = {"guard_loss": 0.05, "chosen_nll": 0.10}
WORSE = 0.03  # share by which the held-out loss may rise above that at the start (0.02 of ln 2). Chosen, not measured


@dataclass(frozen=True)
class Forecast:
    """Margin that a pair gains in a trial step per unit of learning rate, and the sum of the rates of all steps."""

    margin_per_lr: float
    sum_of_rates: float

    @property
    def reach(self) -> float:
        """The mean margin if every step moved it as the trial's do: an upper bound, as steps agree most at the start."""
        return self.margin_per_lr * self.sum_of_rates


def forecast(plan: TrainPlan, model: Model, gradient: Tensor, world: World, reference: Tensor | None) -> Forecast:
    """Try PROBES steps on the first micro-batches. Weights, `gradient` and torch's random state are restored."""
    settings, loader = plan.settings, plan.loader
    assert isinstance(loader, PairLoader)
    weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    lr = max(settings.lr, PROBE_LR)
    optimizer = optim.make(model, settings.optimizer, lr=lr, weight_decay=0.0, beta2=settings.beta2)
    micros = [micros[0] for step in range(PROBES) if (micros := loader.batch(step))]
    batches = [to_device(micro, world.device, loader.limits) for micro in micros]

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        ref = None if reference is None else reference[batch.samples].to(world.device)
        with autocast(world.device):
            logps, counts = logps_of(model, batch).view(-1, 2), counts_of(batch).view(-1, 2)
            loss, figures = pair_figures(plan.objective, logps, counts, ref)
        return loss, figures["reward_margin"]

    def mean_margin() -> float:
        with torch.no_grad():
            margins = [run(batch)[1].double() for batch in batches]
        num_pairs = torch.tensor(float(sum(map(len, margins))), device=world.device)
        total, count = world.sum(torch.stack([torch.cat(margins).sum(), num_pairs]).double()).tolist()
        return total / max(1.0, count)

    before = mean_margin()
    for i in range(PROBES):
        gradient.zero_()
        count = torch.zeros(1, dtype=torch.float64, device=world.device)
        if i < len(batches):
            loss, _ = run(batches[i])
            loss.sum().backward()
            count += len(loss)
        world.sum(gradient)
        optim.update(optimizer, gradient, lr=lr, count=max(1.0, world.sum(count).item()), clip=settings.clip)
    moved = mean_margin() - before
    model.load_state_dict(weights)
    gradient.zero_()
    rates = (
        optim.learning_rate(step, plan.num_steps, peak=settings.lr, schedule=settings.schedule, warmup=settings.warmup)
        for step in range(plan.num_steps)
    )
    return Forecast(moved / (PROBES * lr), sum(rates))


def lines(forecast: Forecast, lr: float) -> list[str]:
    """The forecast for the console, with a warning and what helps when the run will change nothing."""
    reach = forecast.reach
    text = (
        f"forecast: lr x steps can move the mean margin by about {reach:.2g} at most, measured on {PROBES} probe steps"
    )
    if reach >= NO_EFFECT:
        return [text]
    helps = "look at the data: the probe moved the margins the wrong way; try a larger --lr or more --batch-tokens"
    if reach > 0:
        helps = f"--lr {lr / reach:.0e} or so could move the margin by 1"
    return [text, f"warning: nothing will happen: accuracy and loss (ln 2 = 0.693) will stay where they are; {helps}"]


def forgetting(start: Mapping[str, float], now: Mapping[str, float], objective: Objective) -> str | None:
    """A warning when the held-out figures `now` are worse than at the `start`: the loss of the guard's text or of the chosen
    replies by more than FORGETTING, or else the held-out loss by the share WORSE. None where they are not, or are missing."""
    for name, text in (("guard_loss", "the guard's held-out text"), ("chosen_nll", "held-out chosen replies")):
        if name in start and name in now and now[name] - start[name] > FORGETTING[name]:
            helps = "a smaller --lr, a larger --beta"
            if objective.loss != "orpo":
                helps += f", or --sft-weight {max(0.2, 2 * objective.sft_weight):g}"
            return (
                f"warning: forgetting: {text} cost {now[name]:.2f} nats a token, {start[name]:.2f} at the start; {helps} "
                "holds the model closer"
            )
    if "loss" in start and "loss" in now and now["loss"] > start["loss"] * (1 + WORSE):
        return (
            f"warning: the held-out loss is {now['loss']:.3f}, {start['loss']:.3f} at the start: the run has made the "
            "preference worse or memorises its pairs; a smaller --lr or fewer --epochs"
        )
    return None
