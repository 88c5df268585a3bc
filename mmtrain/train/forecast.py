"""How far dpo will move the margins, from a few probe steps before the first; and when it has begun to forget.

The probe is a trial of PROBES steps of the run's optimizer on the first micro-batches; then the weights are put back as they were. Until
then it keeps one copy of them in the machine's memory, and the optimizer's moments a little early.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from mmdata.shards.pairs import PairLoader
from mmtrain.config import TrainSettings
from mmtrain.distributed import World
from mmtrain.model.batch import Batch, counts_of, logps_of, to_device
from mmtrain.model.model import Model
from mmtrain.model.preference import Objective, pair_figures
from mmtrain.train import optim

PROBES = 4
PROBE_LR = (
    1e-6  # the least: below it a step's effect drowns in float32's rounding; effects are scaled to the run's rate
)
NOTHING = 0.02  # a margin that the whole run cannot reach even so: the loss would stay at ln 2 within 0.01
# Nats a token that held-out text may rise by. A guard rose by 0.013 or less in runs that moved held-out pairs the right
# way, by 0.056 in one that learned by heart (tests/bench/RESULTS.md); chosen replies fall a little in sound runs too.
FORGETTING = {"guard_loss": 0.05, "chosen_nll": 0.10}
WORSE = 0.03  # of the start's held-out loss: risen by this share (0.02 of ln 2), the run has done harm. Chosen, not measured


@dataclass(frozen=True)
class Forecast:
    """The margin a pair gains in a probe step per unit of learning rate, and what a whole run of such steps would come to."""

    margin_per_lr: float
    sum_of_rates: float

    @property
    def reach(self) -> float:
        """The mean margin if every step moved as the probe's do: an upper bound, as they agree best at the start."""
        return self.margin_per_lr * self.sum_of_rates


def forecast(
    model: Model,
    gradient: Tensor,
    loader: PairLoader,
    settings: TrainSettings,
    objective: Objective,
    num_steps: int,
    world: World,
    *,
    reference: Tensor | None,
    precision: Callable[[], AbstractContextManager],
) -> Forecast:
    """Probe on the first micro-batches of the first steps. The weights, `gradient` and torch's random state are as before."""
    kept = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    lr = max(settings.lr, PROBE_LR)
    optimizer = optim.make(model, settings.optimizer, lr=lr, weight_decay=0.0, beta2=settings.beta2)
    batches = [micros[0] for step in range(PROBES) if (micros := loader.batch(step))]
    probes = [to_device(micro, world.device, loader.limits) for micro in batches]

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        ref = None if reference is None else reference[batch.samples].to(world.device)
        with precision():
            loss, figures = pair_figures(
                objective, logps_of(model, batch).view(-1, 2), counts_of(batch).view(-1, 2), ref
            )
        return loss, figures["reward_margin"]

    def margin() -> float:
        with torch.no_grad():
            found = [run(batch)[1].double() for batch in probes]
        both = torch.stack([torch.cat(found).sum(), torch.tensor(float(sum(map(len, found))), device=world.device)])
        total, count = world.sum(both.double()).tolist()
        return total / max(1.0, count)

    before = margin()
    for i in range(PROBES):
        gradient.zero_()
        count = torch.zeros(1, dtype=torch.float64, device=world.device)
        if i < len(probes):
            loss, _ = run(probes[i])
            loss.sum().backward()
            count += len(loss)
        world.sum(gradient)
        optim.update(optimizer, gradient, lr=lr, count=max(1.0, world.sum(count).item()), clip=settings.clip)
    moved = margin() - before
    model.load_state_dict(kept)
    gradient.zero_()
    rates = (
        optim.learning_rate(step, num_steps, peak=settings.lr, schedule=settings.schedule, warmup=settings.warmup)
        for step in range(num_steps)
    )
    return Forecast(moved / (PROBES * lr), sum(rates))


def lines(found: Forecast, lr: float) -> list[str]:
    """What the forecast says to the user, and what to do when nothing will happen."""
    said = [
        f"forecast: lr x steps can move the mean margin by about {found.reach:.2g} at most, measured on {PROBES} probe steps"
    ]
    if found.reach < NOTHING:
        if found.reach > 0:
            better = f"--lr {lr / found.reach:.0e} or so could move the margin by 1"
        else:
            better = (
                "look at the data: the probe moved the margins the wrong way; try a larger --lr or more --batch-tokens"
            )
        said.append(
            f"warning: nothing will happen: accuracy and loss (ln 2 = 0.693) will stay where they are; {better}"
        )
    return said


def forgetting(start: Mapping[str, float], now: Mapping[str, float], objective: Objective) -> str | None:
    """A warning when held-out text has become less likely than at the start by more than FORGETTING, by name: the
    chosen replies, or a guard dataset's val split; or else when the held-out loss is WORSE than it began."""
    for name, what in (("guard_loss", "the guard's held-out text"), ("chosen_nll", "held-out chosen replies")):
        if name in start and name in now and now[name] - start[name] > FORGETTING[name]:
            helps = "a smaller --lr, a larger --beta"
            if objective.loss != "orpo":
                helps += f", or --sft-weight {max(0.2, 2 * objective.sft_weight):g}"
            return (
                f"warning: forgetting: {what} cost {now[name]:.2f} nats a token, {start[name]:.2f} at the start; {helps} "
                "holds the model closer"
            )
    if "loss" in start and "loss" in now and now["loss"] > start["loss"] * (1 + WORSE):
        return (
            f"warning: the held-out loss is {now['loss']:.3f}, {start['loss']:.3f} at the start: the run has made the preference "
            "worse or learns its pairs by heart; a smaller --lr or fewer --epochs"
        )
    return None
