"""What a large vocabulary costs: the loss's memory and time, and the time to choose a token. One thread, CPU time.

    python tests/bench/vocabulary.py [--rows DIR --tokenizers DIR...] [--megabytes 30] [--rounds 3]

With --rows, instead the rate of `mm pack` with each of the tokenizers, MB of jsonl per second of CPU time from start to
exit with one worker: the best of --rounds by turns, on real rows varied as in pack.py.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pack import pack, write_corpus
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.sampling import pick
from mmtrain.inference.settings import Sampling
from mmtrain.model.logps import chunk_rows, token_logps

SIZES = {"MiniMind": (6400, 512), "SmolLM2-135M": (49152, 576), "Qwen3-0.6B": (151936, 1024)}  # vocabulary, width
TOKENS, TIMED_TOKENS = 2048, 512  # of a micro-batch on the CPU, all trained, for memory; of the timed one


class LargestTensors(TorchDispatchMode):
    """Notes the largest number of bytes of any tensor made while it is active."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def cpu_ms(times: int, work: Callable[..., object], *inputs: Any) -> float:
    """The least CPU time of one call, in milliseconds."""
    best = float("inf")
    for _ in range(times):
        begun = time.process_time()
        work(*inputs)
        best = min(best, time.process_time() - begun)
    return 1e3 * best


def inputs(num_tokens: int, vocab_size: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, output projection and targets."""
    hidden = torch.randn(num_tokens, width, device=device, requires_grad=True)
    weight = (torch.randn(vocab_size, width, device=device) * width**-0.5).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (num_tokens,), device=device)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    token_logps(hidden, weight, targets).sum().backward()


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()


def packing(rows: Path, tokenizers: list[Path], megabytes: float, rounds: int) -> None:
    """Print the rate and the tokens of packing the same documents with each tokenizer."""
    print("\n| tokenizer | mm pack, MB per CPU second | bytes per token | bytes of an id |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        path, seconds = Path(directory) / "pretrain.jsonl", dict.fromkeys(tokenizers, float("inf"))
        write_corpus(sorted(rows.glob("pretrain*.jsonl")), path, int(megabytes * 1e6))
        size, figures = path.stat().st_size, {}
        for _ in range(rounds):
            for each in tokenizers:
                begun = sum(os.times()[2:4])  # CPU seconds of the processes that have ended
                figures[each] = pack(path, Path(directory) / each.name, each, 1)[2]
                seconds[each] = min(seconds[each], sum(os.times()[2:4]) - begun)
        for each in tokenizers:
            vocab_size, rate = Tokenizer.load(each).vocab_size, size / 1e6 / seconds[each]
            id_bytes = 2 if vocab_size <= 2**16 else 4
            print(f"| {each.name}, {vocab_size:,} | {rate:.1f} | {size / figures[each]['tokens']:.2f} | {id_bytes} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--tokenizers", type=Path, nargs="+", default=[])
    parser.add_argument("--megabytes", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.rows:
        packing(options.rows, options.tokenizers, options.megabytes, options.rounds)
        return
    torch.set_num_threads(1)
    print(
        "| vocabulary | all logits of 2,048 tokens, MB | largest tensor of the loss, MB | loss, ms per 1,000 tokens | "
        "x F.cross_entropy | greedy, ms | top-p 0.9, ms | top-k 50, ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (vocab_size, width) in SIZES.items():
        torch.manual_seed(0)
        with LargestTensors() as seen:
            ours(*inputs(TOKENS, vocab_size, width, "meta"))
        loss, plain = (cpu_ms(2, work, *inputs(TIMED_TOKENS, vocab_size, width, "cpu")) for work in (ours, reference))
        logits = 3 * torch.randn(vocab_size)
        generator = torch.Generator().manual_seed(0)
        choices = (Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9), Sampling(temperature=0.7, top_k=50))
        picks = [cpu_ms(20, pick, logits, options, generator) for options in choices]
        figures = (4e-6 * TOKENS * vocab_size, seen.largest / 1e6, loss * 1000 / TIMED_TOKENS, loss / plain)
        print(
            f"| {name}, {vocab_size:,} x {width} | {figures[0]:,.0f} | {figures[1]:,.0f} ({chunk_rows(vocab_size):,} rows) "
            f"| {figures[2]:,.0f} | {figures[3]:.2f} | {' | '.join(f'{value:.2f}' for value in picks)} |"
        )


if __name__ == "__main__":
    main()
