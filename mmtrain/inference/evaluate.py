"""Metrics of a model on held-out data (the val split) during training, added over the ranks' shares of the split."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmdata.shards.loader import BatchLoader
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import token_bytes
from mmtrain.distributed import World
from mmtrain.model.batch import Batch, counts_of, to_device, token_logps_of
from mmtrain.model.logps import sum_by_sequence
from mmtrain.model.model import Model
from mmtrain.model.precision import wide, widest
from mmtrain.model.preference import FIGURES, Objective, pair_figures

PER_DATASET = ("loss", "bits_per_byte", "accuracy")  # metrics that are also computed for each dataset


@torch.no_grad()
def evaluate(
    model: Model,
    loader: BatchLoader,
    tokenizer: Tokenizer,
    *,
    world: World | None = None,
    reference: Tensor | None = None,
    objective: Objective | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Compute metrics of the model on the loader's split, by name; empty if the split has no trained tokens.

    They are loss (nats per trained token), bits_per_byte (over trained tokens that decode to at least one byte) and
    tokens (trained tokens). For pairs, loss is the mean of `objective`, the others are of the chosen replies only, and
    the finite means of `preference.FIGURES` are added. With several datasets, those in `PER_DATASET` are also returned
    for each as `loss/NAME`, with NAME of `names_of`. world: the ranks; by default this process alone. reference: the
    reference model's logps, float64 [num_samples, 2] (chosen, rejected); with None the objective uses 0, and metrics
    that compare with it are left out. progress: called as `progress(done, total)` with numbers of samples.
    """
    objective = objective or Objective()
    world = world or World(0, 1, model.head_weight.device)
    sizes = torch.from_numpy(token_bytes(tokenizer)).to(world.device)
    is_pairs = loader.kind == "pair"
    names = names_of([share.dataset.dir for share in loader.shares])
    sums = torch.zeros(len(names), 4 + (2 + len(FIGURES)) * is_pairs, dtype=widest(world.device), device=world.device)
    done = 0
    for micro in loader.micro_batches():
        progress(min(done * world.size, loader.num_samples), loader.num_samples)
        done += len(micro.samples)
        batch = to_device(micro, world.device, loader.limits)
        logps = token_logps_of(model, batch)
        batch_sums = _text_sums(batch, logps, sizes, chosen_only=is_pairs)
        if is_pairs:
            ref = None if reference is None else reference[batch.samples].to(world.device, widest(world.device))
            batch_sums = torch.cat([batch_sums, _pair_sums(batch, logps, ref, objective)])
        sums[loader.dataset_of(micro)] += batch_sums
    sums = world.sum(sums).cpu()
    figures = _figures(sums.sum(0).tolist())
    if len(names) > 1:
        for name, own in zip(names, sums.tolist(), strict=True):
            figures |= {f"{figure}/{name}": value for figure, value in _figures(own).items() if figure in PER_DATASET}
    return figures


def names_of(dirs: Sequence[Path]) -> list[str]:
    """Return a short unique name for each dataset directory: its own name, preceded by as many parent directories as
    make all names differ. If a directory is listed twice, the names are numbered from 1 instead."""
    for depth in range(1, 1 + max(len(path.parts) for path in dirs)):
        names = ["/".join(path.parts[-depth:]) for path in dirs]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name}-{number}" for number, path in enumerate(dirs, 1)]  # a dataset is listed twice


def _figures(sums: Sequence[float]) -> dict[str, float]:
    """Compute the metrics from the sums of `_text_sums` and, for pairs, `_pair_sums`; empty without trained tokens."""
    nats, trained, nats_of_bytes, num_bytes, *of_pairs = sums
    if not trained:
        return {}
    figures = {"loss": nats / trained, "bits_per_byte": nats_of_bytes / math.log(2) / max(num_bytes, 1)}
    if of_pairs:
        *values, num_pairs = of_pairs
        means = {name: value / num_pairs for name, value in zip(("loss", *FIGURES), values, strict=True)}
        # Without a reference, the drift from it is NaN.
        figures |= {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return figures | {"tokens": int(trained)}


def _text_sums(batch: Batch, logps: Tensor, token_bytes: Tensor, *, chosen_only: bool) -> Tensor:
    """Return sums over the trained tokens, float64 [4]: negative log-likelihood in nats, tokens, nats of tokens that
    decode to at least one byte, and bytes. logps: one per trained token. token_bytes: [V], bytes of each id.
    chosen_only: the batch has pairs, and only their chosen replies count."""
    num_bytes = token_bytes[batch.ids[batch.trained]]
    is_counted = batch.sequence_ids % 2 == 0 if chosen_only else torch.ones_like(batch.sequence_ids, dtype=torch.bool)
    nats = -wide(logps) * is_counted
    return torch.stack([nats.sum(), is_counted.sum(), (nats * (num_bytes > 0)).sum(), (num_bytes * is_counted).sum()])


def _pair_sums(batch: Batch, logps: Tensor, ref: Tensor | None, objective: Objective) -> Tensor:
    """Return sums over the pairs, float64 [2 + len(FIGURES)]: the objective's loss, each of FIGURES, and the number of
    pairs. logps: one per trained token. ref: [pairs, 2], the reference's logps of the two replies, or None."""
    sums = sum_by_sequence(logps, batch.sequence_ids, batch.num_sequences).view(-1, 2)
    loss, figures = pair_figures(objective, sums, counts_of(batch).view(-1, 2), ref)
    columns = (loss, *(figures[name] for name in FIGURES), torch.ones_like(loss))
    return torch.stack([wide(column).sum() for column in columns])
