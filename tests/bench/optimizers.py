"""Held-out loss over steps of AdamW and Muon, with and without an average of the weights, on packed documents.

    python tests/bench/optimizers.py --data shards/pretrain_hq --run adamw:1e-3 --run muon:2e-3 [--steps 150] [--seed 0]

One line a run: the val loss (nats a token) every --val-every steps, and at which step it passed the first run's last. A run
is optimizer:rate[:key=value...], where a key is any setting of mm train, such as ema=0.98 or schedule=wsd. The model is
--width x --layers with the tokenizer's vocabulary, warmed up over a tenth of the steps.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mmtrain.config import TrainOptions
from mmtrain.shapes import MODEL_SHAPES, ModelConfig
from mmtrain.train.loop import train


def settings_of(text: str) -> dict[str, Any]:
    """optimizer:rate:key=value... as settings."""
    optimizer, rate, *others = text.split(":")
    settings: dict[str, Any] = {"optimizer": optimizer, "lr": float(rate)}
    for key, value in (other.split("=") for other in others):
        settings[key] = value if key == "schedule" else type(PLAIN.get(key, 0.0))(float(value))
    return settings


PLAIN: dict[str, Any] = {"batch_tokens": 1, "steps": 1}  # settings that are whole numbers


def losses(options: argparse.Namespace, text: str) -> tuple[dict[int, float], float]:
    """Val loss by step of one run, and its seconds a step."""
    with tempfile.TemporaryDirectory() as directory:
        base: dict[str, Any] = {
            "steps": options.steps,
            "batch_tokens": options.batch_tokens,
            "micro_tokens": 4096,
            "warmup": 0.1,
            "val_every": options.val_every,
            "save_every": 10**9,
        }
        base |= {"model": "bench", "seed": options.seed, "device": "cpu", "quiet": True}
        run = TrainOptions("pretrain", tuple(options.data), Path(directory) / "run", **(base | settings_of(text)))
        begun = time.monotonic()
        train(run)
        seconds = (time.monotonic() - begun) / options.steps
        lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--run", action="append", required=True, metavar="OPTIMIZER:LR[:KEY=VALUE]")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--val-every", type=int, default=25)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ffn = 64 * round(options.width * 8 / 3 / 64)
    MODEL_SHAPES["bench"] = ModelConfig(0, options.width, options.layers, 8, 2, ffn)
    first = None
    for text in options.run:
        found, seconds = losses(options, text)
        first = first or list(found.values())[-1]
        passed = next((step for step, loss in found.items() if loss <= first), None)
        curve = " ".join(f"{step}:{loss:.3f}" for step, loss in found.items())
        print(f"{text:<34} {curve} | {seconds:.2f} s/step | first run's last loss at step {passed}", flush=True)


if __name__ == "__main__":
    main()
