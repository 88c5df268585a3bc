"""Seconds of an optimizer step, and what stands in memory and in a checkpoint, by what is trained and by which optimizer.

    python tests/bench/adapters.py [--model minimind2-small] [--tokens 4096] [--rank 8] [--threads 2]

All take the same random documents of --length tokens, in turns; the best of --repeat steps counts. `update` is the optimizer
alone: what Muon costs more than AdamW whatever the batch.
"""

import argparse
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from mmdata.shards.loader import MicroBatch
from mmtrain.model import lora
from mmtrain.model.batch import Batch, to_device, token_logps_of
from mmtrain.model.model import Model
from mmtrain.shapes import MODEL_SHAPES, ModelConfig
from mmtrain.train.optim import flat_gradient, make, update


class Trained(NamedTuple):
    """A model being trained."""

    name: str
    model: Model
    optimizer: torch.optim.Optimizer
    gradient: torch.Tensor


def prepare(name: str, shape: ModelConfig, optimizer: str, rank: int) -> Trained:
    """A model with its optimizer; adapters where rank is not 0."""
    model = Model(shape)
    if rank:
        lora.adapt(model, rank)
    return Trained(name, model, make(model, optimizer, lr=1e-4, weight_decay=0.0), flat_gradient(model))


def documents(num_tokens: int, length: int, vocab_size: int) -> Batch:
    """One micro-batch of random documents, all but the first token of each trained."""
    draw = np.random.default_rng(0)
    num_documents = num_tokens // length
    mask = np.tile((np.arange(length) > 0).astype(np.uint8), num_documents)
    ids = draw.integers(0, vocab_size, num_documents * length).astype(np.int32)
    ends = (np.arange(num_documents + 1) * length).astype(np.int32)
    return to_device(MicroBatch(ids, mask, ends, length, np.arange(1), int(mask.sum())), torch.device("cpu"))


def step_s(trained: Trained, batch: Batch) -> tuple[float, float]:
    """Seconds of one whole step, and of the update in it."""
    begun = time.perf_counter()
    trained.gradient.zero_()
    (-token_logps_of(trained.model, batch).sum()).backward()
    updating = time.perf_counter()
    update(trained.optimizer, trained.gradient, lr=1e-4, count=batch.num_trained, clip=1.0)
    ended = time.perf_counter()
    return ended - begun, ended - updating


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minimind2-small", choices=list(MODEL_SHAPES))
    parser.add_argument("--vocab", type=int, default=6400, help="vocabulary of the presets that take the tokenizer's")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = MODEL_SHAPES[options.model]
    shape = shape if shape.vocab_size else replace(shape, vocab_size=options.vocab)
    cases = (("all weights, adamw", "adamw", 0), ("all weights, muon", "muon", 0))
    found = [
        prepare(*(case[0], shape, *case[1:])) for case in (*cases, (f"adapters {options.rank}", "adamw", options.rank))
    ]
    batch = documents(options.tokens, options.length, shape.vocab_size)
    times: dict[str, list[tuple[float, float]]] = {each.name: [] for each in found}
    for _ in range(options.repeat + 1):
        for each in found:
            times[each.name].append(step_s(each, batch))
    first = min(step for step, _ in times[found[0].name][1:])
    print(f"{options.model}: {shape.num_params:,} parameters, {batch.num_tokens:,} tokens, {options.threads} threads")
    print(
        f"{'trained':<22} {'parameters':>12} {'s/step':>8} {'ratio':>6} {'update s':>9} {'gradient and state MB':>22}"
    )
    for each in found:
        steps, updates = zip(*times[each.name][1:], strict=True)
        state = sum(v.nbytes for s in each.optimizer.state.values() for v in s.values()) + each.gradient.nbytes
        print(
            f"{each.name:<22} {each.gradient.numel():>12,} {min(steps):>8.3f} {min(steps) / first:>6.2f} "
            f"{min(updates):>9.3f} {state / 1e6:>22.1f}"
        )


if __name__ == "__main__":
    main()
