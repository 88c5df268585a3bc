"""Forecast, before the first step of dpo, how far the run will move the reward margins; warn when the model forgets.

PROBES trial steps are made with the run's optimizer, on the first micro-batch of each of the first steps; then the
weights are restored. This takes a copy of the weights in host memory, and a second optimizer state.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.shards.loader import MicroBatch
from mmdata.shards.pairs import PairLoader
from mmtrain.distributed import World
from mmtrain.model.batch import Batch, counts_of, cut, logps_of, to_device
from mmtrain.model.model import Model
from mmtrain.model.precision import autocast, wide, widest
from mmtrain.model.preference import Objective, pair_figures
from mmtrain.train import optim, preflight
from mmtrain.train.plan import TrainPlan

PROBES = preflight.NUM_TRIALS
PROBE_LR = 1e-6  # smallest learning rate of the trial steps; below it, fp32 rounding hides the effect of a step
NO_EFFECT = 0.02  # if the mean margin cannot reach this, the loss stays within 0.01 of ln 2 and the run has no effect
# `forgetting` warns if a val loss rises by more than this, in nats per token. guard_loss (the val loss on the dataset
# of --guard) rose by at most 0.013 in runs that improved on held-out pairs, and by 0.056 in a run that memorised its
# pairs (tests/bench/RESULTS.md). The threshold of chosen_nll is higher, because it rises a little in good runs too.
FORGETTING = {"guard_loss": 0.05, "chosen_nll": 0.10}
WORSE = 0.03  # relative rise of the val loss above its start value that brings a warning (0.02 at ln 2); not measured


@dataclass(frozen=True)
class Forecast:
    """The result of `num_probes` trial steps. margin_per_lr: change of the mean reward margin per trial step and unit
    of learning rate. sum_of_rates: sum of the learning rates of all steps of the run."""

    margin_per_lr: float
    sum_of_rates: float
    num_probes: int = PROBES

    @property
    def reach(self) -> float:
        """Return an upper bound of the change of the mean reward margin: later steps change it less than trial
        steps."""
        return self.margin_per_lr * self.sum_of_rates


def forecast(
    plan: TrainPlan,
    model: Model,
    gradient: Tensor,
    world: World,
    reference: Tensor | None,
    *,
    most_tokens: int | None = None,
) -> Forecast:
    """Make at most PROBES trial steps, restore the weights and return the forecast. Every rank must call this.
    gradient: the flat gradient of the trainable parameters, zeroed at the end. reference: the reference model's logps
    of the train split, float64 [N, 2] on the CPU; None for a loss without reference. most_tokens: of all trial steps
    together on this rank, at least one pair; None for no limit."""
    settings, loader = plan.settings, plan.loader
    assert isinstance(loader, PairLoader)
    weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    lr = max(settings.lr, PROBE_LR)
    optimizer = optim.make(model, settings.optimizer, lr=lr, weight_decay=0.0, beta2=settings.beta2)
    micros = [micros[0] for step in range(PROBES) if (micros := loader.batch(step))]
    if most_tokens is not None:
        micros = _within(micros, most_tokens)
    num_probes = max(1, *(number for (number,) in world.gather(len(micros))))
    batches = [to_device(micro, world.device, loader.limits) for micro in micros]

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss [S] with gradient and the reward margin [S] of S pairs."""
        ref = None if reference is None else reference[batch.samples].to(world.device, widest(world.device))
        with autocast(world.device):
            logps, counts = logps_of(model, batch).view(-1, 2), counts_of(batch).view(-1, 2)
            loss, figures = pair_figures(plan.objective, logps, counts, ref)
        return loss, figures["reward_margin"]

    def mean_margin() -> float:
        """Return the mean reward margin over the trial batches of all ranks."""
        with torch.no_grad():
            margins = [wide(run(batch)[1]) for batch in batches]
        num_pairs = torch.tensor(float(sum(map(len, margins))), device=world.device)
        total, count = world.sum(wide(torch.stack([torch.cat(margins).sum(), num_pairs]))).tolist()
        return total / max(1.0, count)

    before = mean_margin()
    for i in range(num_probes):
        gradient.zero_()
        count = torch.zeros(1, dtype=widest(world.device), device=world.device)
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
    return Forecast(moved / (num_probes * lr), sum(rates), num_probes)


def _within(micros: list[MicroBatch], most_tokens: int) -> list[MicroBatch]:
    """Return the first pairs of each micro-batch, all together of about `most_tokens` tokens; of fewer micro-batches if
    their first pairs alone are more, but of one at least."""
    cuts = [cut(micro, most_tokens // len(micros), is_pairs=True)[0] for micro in micros]
    kept: list[MicroBatch] = []
    for micro in cuts:
        if not kept or sum(len(each.ids) for each in (*kept, micro)) <= most_tokens:
            kept.append(micro)
    return kept


def lines(forecast: Forecast, lr: float) -> list[str]:
    """Return the forecast as console lines, with a warning if the run can hardly have an effect. lr: peak learning
    rate."""
    reach = forecast.reach
    text = f"forecast: the mean margin can move by about {reach:.2g} at most ({forecast.num_probes} trial steps)"
    if reach >= NO_EFFECT:
        return [text]
    helps = "look at the data: the probe moved the margins the wrong way; try a larger --lr or more --batch-tokens"
    if reach > 0:
        helps = f"--lr {lr / reach:.0e} or so could move the margin by 1"
    return [text, f"warning: nothing will happen: accuracy and loss (ln 2 = 0.693) will stay where they are; {helps}"]


def forgetting(start: Mapping[str, float], now: Mapping[str, float], objective: Objective) -> str | None:
    """Return a warning if the val metrics `now` are worse than those at the `start` of dpo, else None: "guard_loss"
    (loss on the guard dataset) or "chosen_nll" (negative log-likelihood of the chosen replies) by more than FORGETTING
    nats per token, or "loss" by more than the share WORSE. Only the first of these is reported; missing metrics are
    skipped."""
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
