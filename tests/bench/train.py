"""Trained tokens a second of a packed step against a padded step of the same model on the same rows, on CPU.

    python tests/bench/train.py [--model demo] [--vocab 1536] [--tokens 4096] [--data shards/sft_512] [--threads 2]

Padded means one row a line, filled up to --max-len, as most trainers do. Both run our own model, loss and AdamW; only the
layout differs. Without --data the rows are random ids of the lengths in the table. The best of --repeat steps counts.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mmdata.shards.dataset import open_dataset
from mmdata.shards.loader import Loader, MicroBatch
from mmtrain.model.batch import Batch, to_device, token_logps_of
from mmtrain.model.model import Model
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.train.optim import flat_gradient, make, update

CPU = torch.device("cpu")
Rows = Sequence[tuple[np.ndarray, np.ndarray]]  # ids and loss mask


def random_rows(lengths: tuple[int, int], num_tokens: int, vocab_size: int) -> Rows:
    """Rows of evenly spread lengths; all but the first token of each is trained."""
    draw = np.random.default_rng(0)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    while sum(len(ids) for ids, _ in rows) < num_tokens:
        length = int(draw.integers(lengths[0], lengths[1] + 1))
        rows.append((draw.integers(0, vocab_size, length), (np.arange(length) > 0).astype(np.uint8)))
    return rows


def stored_rows(directory: Path, num_tokens: int) -> Rows:
    """The sequences of a packed dataset's first micro-batch of that many tokens."""
    loader = Loader([open_dataset(directory)], batch_tokens=num_tokens, micro_tokens=num_tokens, seed=0)
    micro = loader.batch(0)[0]
    cuts = micro.cu_seqlens[1:-1]
    return list(zip(np.split(micro.ids, cuts), np.split(micro.loss_mask, cuts), strict=True))


def micro_batch(rows: Rows, pad_to: int | None = None) -> MicroBatch:
    """Rows end to end, each first filled up to `pad_to` where given."""
    if pad_to is not None:
        rows = [tuple(np.pad(x[:pad_to], (0, max(0, pad_to - len(x)))) for x in row) for row in rows]  # type: ignore[misc]
    ids, masks = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    lengths = [len(row_ids) for row_ids, _ in rows]
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    return MicroBatch(ids.astype(np.int32), masks, cu_seqlens, max(lengths), np.arange(1), int(masks.sum()))


def best_step_s(model: Model, batches: Sequence[Batch], repeat: int) -> float:
    """Seconds of the fastest of `repeat` optimizer steps over these micro-batches."""
    gradient, optimizer = flat_gradient(model), make(model, "adamw", lr=1e-4, weight_decay=0.1)
    times = []
    for _ in range(repeat + 1):  # one to warm up
        begun = time.perf_counter()
        gradient.zero_()
        for batch in batches:
            (-token_logps_of(model, batch).sum()).backward()
        update(optimizer, gradient, lr=1e-4, count=sum(b.num_trained for b in batches), clip=1.0)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def measure(name: str, rows: Rows, options: argparse.Namespace, model: Model) -> None:
    """One line of the table."""
    num_tokens = sum(len(ids) for ids, _ in rows)
    packed = to_device(micro_batch(rows), CPU)
    per_micro = max(
        1, num_tokens // options.max_len
    )  # padded rows that fill as many positions as the packed micro-batch
    padded = [
        to_device(micro_batch(rows[i : i + per_micro], options.max_len), CPU) for i in range(0, len(rows), per_micro)
    ]
    packed_s, padded_s = (best_step_s(model, batches, options.repeat) for batches in ([packed], padded))
    fill = num_tokens / sum(batch.num_tokens for batch in padded)
    print(
        f"{name:<24} {len(rows):>5} {num_tokens:>7,} {100 * fill:>6.1f}% {packed.num_trained / packed_s:>11,.0f} "
        f"{packed.num_trained / padded_s:>11,.0f} {padded_s / packed_s:>7.2f}x"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=list(MODEL_SHAPES))
    parser.add_argument("--vocab", type=int, default=1536, help="vocabulary of the presets that take the tokenizer's")
    parser.add_argument("--tokens", type=int, default=4096, help="real tokens of a step")
    parser.add_argument("--max-len", type=int, default=512)
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = MODEL_SHAPES[options.model]
    vocab_size = max([options.vocab, *(open_dataset(path).vocab_size for path in options.data)])
    model = Model(shape if shape.vocab_size else replace(shape, vocab_size=vocab_size))
    print(
        f"{options.model}: {model.config.num_params:,} parameters, torch {torch.__version__}, {options.threads} threads"
    )
    print(f"{'rows':<24} {'rows':>5} {'tokens':>7} {'fill':>7} {'packed/s':>11} {'padded/s':>11} {'gain':>8}")
    cases = {"lengths 10-60": (10, 60), "lengths 50-300": (50, 300), f"all {options.max_len}": (options.max_len,) * 2}
    for name, lengths in cases.items():
        measure(name, random_rows(lengths, options.tokens, model.config.vocab_size), options, model)
    for path in options.data:
        measure(path.name, stored_rows(path, options.tokens), options, model)


if __name__ == "__main__":
    main()
