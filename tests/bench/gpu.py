"""Every figure that needs a CUDA card, in one call of a few minutes, as one table.

    python tests/bench/gpu.py [--minimind CHECKOUT] [--fill 0.5] [--rehearse]

The card's matmul rate, then: pretraining minimind2 at 512 in bf16 with compiled blocks as a share of that rate (causal
FLOPs: 6 for every matrix weight and 6 L C T for attention, a token) and as the usual MFU (of the datasheet's peak, without
attention and with 12 L C T for it), recompilations over micro-batches whose documents
differ in number and length, its memory beside what preflight counts, dpo's memory for 8 pairs of 1,024 a side, the time to
sum gradients with nccl where two cards are there, and with a CHECKOUT MiniMind's own model on padded rows
of which --fill is useful. --rehearse runs the same code on the CPU with the smallest sizes: its figures mean nothing.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdata.shards.loader import Limits, MicroBatch
from mmtrain.distributed import World
from mmtrain.log.flops import attention_flops, peak_flops
from mmtrain.log.metrics import memory_bytes
from mmtrain.model.batch import Batch, logps_of, to_device, token_logps_of
from mmtrain.model.logps import CHUNK
from mmtrain.model.model import Model
from mmtrain.model.precision import autocast, autocast_dtype
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.train.optim import flat_gradient, make, update
from mmtrain.train.preflight import kept_bytes
from mmtrain.train.run import compile_blocks


def best_s(step: Callable[[], Any], device: torch.device, repeat: int = 10, warmup: int = 4) -> float:
    """Mean seconds of `repeat` steps after `warmup`."""
    for k in range(warmup + repeat):
        if k == warmup:
            synchronize(device)
            begun = time.perf_counter()
        step()
    synchronize(device)
    return (time.perf_counter() - begun) / repeat


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def documents(length: int, count: int, vocab_size: int) -> MicroBatch:
    """Random documents of one length, all trained but their first tokens."""
    ids = np.random.default_rng(0).integers(0, vocab_size, length * count, dtype=np.int32)
    mask = (np.arange(length * count) % length > 0).astype(np.uint8)
    ends = np.arange(count + 1, dtype=np.int32) * length
    return MicroBatch(ids, mask, ends, length, np.arange(count), int(mask.sum()))


def ragged(longest: int, tokens: int, vocab_size: int, seed: int) -> MicroBatch:
    """Random documents of 2 to `longest` tokens that come to at most `tokens`, all trained but their first tokens."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, longest + 1, 2 * tokens // longest)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    ends = ends[ends <= tokens].astype(np.int32)
    mask = np.ones(ends[-1], np.uint8)
    mask[ends[:-1]] = 0
    ids = draw.integers(0, vocab_size, ends[-1], dtype=np.int32)
    return MicroBatch(ids, mask, ends, int(np.diff(ends).max()), np.arange(1), int(mask.sum()))


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOPs a second of square products in autocast's type."""
    a, b = (torch.randn(size, size, device=device, dtype=autocast_dtype(device)) for _ in range(2))
    return 2 * size**3 / best_s(lambda: a @ b, device)


def row(name: str, value: str) -> None:
    """One line of the table."""
    print(f"| {name} | {value} |", flush=True)


def pretrain(name: str, device: torch.device, length: int, tokens: int, rate: float) -> None:
    """Speed, share of the rate, recompilations and memory of pretraining steps."""
    model = Model(
        MODEL_SHAPES[name] if MODEL_SHAPES[name].vocab_size else replace(MODEL_SHAPES[name], vocab_size=300)
    ).to(device)
    notes = compile_blocks(model) if device.type == "cuda" else ["not compiled on the CPU"]
    micro = documents(length, tokens // length, model.config.vocab_size)
    kept = kept_bytes(model, micro)
    gradient, optimizer = flat_gradient(model), make(model, "adamw", lr=1e-4, weight_decay=0.1)
    limits = Limits(tokens, length)
    full = to_device(micro, device, limits)

    def step(batch: Batch = full) -> None:
        gradient.zero_()
        with autocast(device):
            loss = -token_logps_of(model, batch).sum()
        loss.backward()
        update(optimizer, gradient, lr=1e-4, count=batch.num_trained, clip=1.0)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = best_s(step, device)
    memory = memory_bytes()
    step(to_device(ragged(length, tokens, model.config.vocab_size, 0), device, limits))
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(1, 20):
        step(to_device(ragged(length, tokens, model.config.vocab_size, seed), device, limits))
    shape, matrices = model.config, sum(p.numel() for p in model.parameters() if p.dim() == 2)
    flops = 6 * matrices + 6 * shape.num_layers * shape.hidden_size * length
    predicted = 16 * shape.num_params + kept + 8 * CHUNK * shape.vocab_size
    row(f"pretrain {name} at {length}, {tokens:,} tokens a step", f"{tokens / seconds:,.0f} tokens/s")
    row("share of the matmul rate, causal FLOPs", f"{100 * flops * tokens / seconds / rate:.1f} %")
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if peak := peak_flops(card, str(autocast_dtype(device)).removeprefix("torch.")):
        counted = (6 * matrices, 6 * matrices + attention_flops(shape, length))
        plain, full = (f"{100 * each * tokens / seconds / peak:.1f} %" for each in counted)
        row(f"MFU of the datasheet's {peak / 1e12:.0f} TFLOP/s, attention not counted, counted", f"{plain}, {full}")
    else:
        row("MFU of the datasheet's peak", f"no peak is known of {card}")
    recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
    row("recompilations over 19 ragged micro-batches", str(recompiled))
    row("memory: predicted, measured", f"{predicted / 1e9:.2f} GB, {memory / 1e9:.2f} GB")
    for note in notes:
        row("note", note)


def preferences(name: str, device: torch.device, length: int) -> None:
    """Peak memory of a dpo step over 8 pairs."""
    model = Model(
        MODEL_SHAPES[name] if MODEL_SHAPES[name].vocab_size else replace(MODEL_SHAPES[name], vocab_size=300)
    ).to(device)
    gradient, optimizer = flat_gradient(model), make(model, "adamw", lr=1e-6, weight_decay=0.0)
    batch = to_device(documents(length, 16, model.config.vocab_size), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with autocast(device):
        chosen, rejected = logps_of(model, batch).view(-1, 2).T
    (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum()).backward()
    update(optimizer, gradient, lr=1e-6, count=8, clip=1.0)
    synchronize(device)
    row(f"dpo {name}: 8 pairs of {length} a side, memory", f"{memory_bytes() / 1e9:.2f} GB")


def sum_over_ranks(rank: int, store: str, kind: str, size: int) -> None:
    """One of two ranks: sum vectors of a model's size as training does, check the sum and print the time."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    backend = "nccl" if kind == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2)
    world, gradient = World(rank, 2, device), torch.full((size,), rank + 1.0, device=device)
    world.sum(gradient)
    assert bool((gradient == 3).all())
    seconds = best_s(lambda: world.sum(gradient), device)
    if world.is_first:
        row(f"sum of {size:,} gradients over two ranks, {backend}", f"{1e3 * seconds:.1f} ms")
    torch.distributed.destroy_process_group()


def theirs(checkout: Path, device: torch.device, length: int, rows: int, fill: float) -> None:
    """MiniMind's own model of that shape (width 768, 16 layers), forward, backward, clip and AdamW as its trainer does."""
    sys.path.insert(0, str(checkout))
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM  # type: ignore[import-not-found]

    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=768, num_hidden_layers=16)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 6400, (rows, length), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    pace = rows * length / best_s(step, device)
    row(f"MiniMind, width 768, 16 layers at {length}", f"{pace:,.0f} positions/s, {fill * pace:,.0f} useful tokens/s")


def main() -> None:
    """Print the table, or that there is no card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path)
    parser.add_argument("--fill", type=float, default=0.5)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        print("no CUDA card here: nothing measured")
        return
    device = torch.device("cpu" if options.rehearse else "cuda")
    torch.set_float32_matmul_precision("high")
    card = "CPU, a rehearsal" if options.rehearse else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}\n\n| what | figure |\n|---|---|")
    rate = matmul_rate(device, 256 if options.rehearse else 8192)
    row(f"matmul rate, {autocast_dtype(device)}", f"{rate / 1e12:.1f} TFLOP/s")
    name, tokens = ("tiny", 256) if options.rehearse else ("minimind2", 65_536)
    pretrain(name, device, 64 if options.rehearse else 512, tokens, rate)
    preferences(name, device, 16 if options.rehearse else 1024)
    if options.rehearse or torch.cuda.device_count() > 1:
        with tempfile.TemporaryDirectory() as directory:
            size = MODEL_SHAPES["minimind2" if not options.rehearse else "demo"].num_params
            arguments = (f"{directory}/store", device.type, size)
            torch.multiprocessing.spawn(sum_over_ranks, arguments, nprocs=2)
    else:
        row("two ranks, nccl", "one card here: not measured")
    if options.minimind:
        theirs(options.minimind, device, 512, 128, options.fill)


if __name__ == "__main__":
    main()
