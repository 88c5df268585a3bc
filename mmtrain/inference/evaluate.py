"""Held-out figures of a model during training, on the val split. Each rank computes its share of the split."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmdata.shards.loader import Loader
from mmdata.shards.pairs import PairLoader
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.distributed import World
from mmtrain.model.batch import Batch, counts_of, to_device, token_logps_of
from mmtrain.model.logps import sum_by_sequence
from mmtrain.model.model import Model
from mmtrain.model.preference import FIGURES, Objective, pair_figures

PER_DATASET = ("loss", "bits_per_byte", "accuracy")  # figures that are also computed for each dataset


@torch.no_grad()
def evaluate(
    model: Model,
    loader: Loader | PairLoader,
    tokenizer: Tokenizer,
    *,
    world: World | None = None,
    reference: Tensor | None = None,
    objective: Objective | None = None,
) -> dict[str, float]:
    """Held-out figures of the loader's split; empty for an empty split.

    loss (nats per trained token), bits_per_byte (over tokens that decode to bytes) and tokens (trained ones). For pairs,
    loss is the objective's and bits_per_byte that of the chosen replies, and `preference.FIGURES` are added. `reference`:
    reference logps float64 [num_samples, 2]; None stands for a reference under which all replies are equally likely.
    Several datasets add the figures of `PER_DATASET` for each as `loss/NAME`.
    """
    objective = objective or Objective()
    world = world or World(0, 1, model.head_weight.device)
    token_bytes = torch.from_numpy(np.asarray(tokenizer.token_bytes(), dtype=np.int64)).to(world.device)
    is_pairs = loader.kind == "pair"
    names = names_of([share.dataset.dir for share in loader.shares])
    sums = torch.zeros(len(names), 4 + (2 + len(FIGURES)) * is_pairs, dtype=torch.float64).to(world.device)
    for micro in loader.micro_batches():
        batch = to_device(micro, world.device, loader.limits)
        logps = token_logps_of(model, batch)
        batch_sums = _text_sums(batch, logps, token_bytes, chosen_only=is_pairs)
        if is_pairs:
            ref = None if reference is None else reference[batch.samples].to(world.device)
            batch_sums = torch.cat([batch_sums, _pair_sums(batch, logps, ref, objective)])
        sums[loader.dataset_of(micro)] += batch_sums
    sums = world.sum(sums).cpu()
    figures = _figures(sums.sum(0).tolist())
    if len(names) > 1:
        for name, own in zip(names, sums.tolist(), strict=True):
            figures |= {f"{figure}/{name}": value for figure, value in _figures(own).items() if figure in PER_DATASET}
    return figures


def names_of(dirs: Sequence[Path]) -> list[str]:
    """Short names of datasets: the names of their directories, with as many parent directories as make them unique."""
    for depth in range(1, 1 + max(len(path.parts) for path in dirs)):
        names = ["/".join(path.parts[-depth:]) for path in dirs]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name}-{number}" for number, path in enumerate(dirs, 1)]  # one dataset, listed twice


def _figures(sums: Sequence[float]) -> dict[str, float]:
    """Figures from the sums of `_text_sums` and, for pairs, `_pair_sums`; empty without trained tokens."""
    nats, trained, nats_of_bytes, num_bytes, *of_pairs = sums
    if not trained:
        return {}
    figures = {"loss": nats / trained, "bits_per_byte": nats_of_bytes / math.log(2) / max(num_bytes, 1)}
    if of_pairs:
        *values, num_pairs = of_pairs
        means = {name: value / num_pairs for name, value in zip(("loss", *FIGURES), values, strict=True)}
        figures |= {name: mean for name, mean in means.items() if math.isfinite(mean)}  # without reference: no drift
    return figures | {"tokens": int(trained)}


def _text_sums(batch: Batch, logps: Tensor, token_bytes: Tensor, *, chosen_only: bool) -> Tensor:
    """Nats, trained tokens, nats of tokens that decode to bytes, bytes: float64 [4]."""
    num_bytes = token_bytes[batch.ids[batch.trained]]
    is_counted = batch.sequence_ids % 2 == 0 if chosen_only else torch.ones_like(batch.sequence_ids, dtype=torch.bool)
    nats = -logps.double() * is_counted
    return torch.stack([nats.sum(), is_counted.sum(), (nats * (num_bytes > 0)).sum(), (num_bytes * is_counted).sum()])


def _pair_sums(batch: Batch, logps: Tensor, ref: Tensor | None, objective: Objective) -> Tensor:
    """Loss, FIGURES and number of pairs: float64 [2 + figures]."""
    sums = sum_by_sequence(logps, batch.sequence_ids, batch.num_sequences).view(-1, 2)
    loss, figures = pair_figures(objective, sums, counts_of(batch).view(-1, 2), ref)
    columns = (loss, *(figures[name] for name in FIGURES), torch.ones_like(loss))
    return torch.stack([column.double().sum() for column in columns])
