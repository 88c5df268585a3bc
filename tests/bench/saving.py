"""How long a save keeps training waiting, and what kill -9 leaves behind.

    python tests/bench/saving.py [--model minimind2] [--kills 30] [--seconds 20] [--data shards/sft_512]

stall: the seconds `Writer.save` holds its caller at the model's real size, and those until the checkpoint is complete.
kills of the writer: a process saves that model again and again, every value of step N being N, and is killed at a random
moment of the time that --seconds gives it; the newest complete checkpoint must then be restored to a model and moments of
that one step, and be no older than the last one the process knew to be complete.
kills of a run (with --data): a tiny model is trained, saved at every step, killed and resumed; at the end its steps must
be those of a run nobody touched, to the last bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mmtrain import checkpoint
from mmtrain.checkpoint import Writer
from mmtrain.config import TrainOptions
from mmtrain.model.model import Model
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.train.loop import train
from mmtrain.train.optim import make

SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from mmtrain.checkpoint import Writer
from saving import fill, filled
root, name, first = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model, optimizer = filled(name, first)
writer = Writer(root, keep_last=1)
for step in range(first, first + 1000):
    print(step - 1, flush=True)  # of the steps that are complete the newest
    writer.settle()
    fill(model, optimizer, step)
    writer.save(model, optimizer, step=step, settings={}, data={})
    writer.wait()
"""
TRAIN = """
import sys
from pathlib import PosixPath
from mmtrain.config import TrainOptions
from mmtrain.train.loop import train
train(eval(sys.argv[1]), log=lambda text: print(text, flush=True))
"""


def filled(name: str, value: float) -> tuple[Model, torch.optim.Optimizer]:
    """A model and its optimizer's moments, every number of them `value`."""
    with torch.device("meta"):
        model = Model(MODEL_SHAPES[name])
    model.to_empty(device="cpu")
    optimizer = make(model, "adamw", lr=0.0, weight_decay=0.0)
    for parameter in model.parameters():
        moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    fill(model, optimizer, value)
    return model, optimizer


def fill(model: Model, optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set every number of a model and its optimizer to `value`."""
    with torch.no_grad():
        for tensor in numbers(model, optimizer):
            tensor.fill_(value)


def numbers(model: Model, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All tensors of a model and its optimizer."""
    for parameter in model.parameters():
        yield parameter
        yield from optimizer.state[parameter].values()


def stall(name: str, root: Path) -> None:
    """Print the seconds of three saves, each begun as training would: it goes on with a forward and backward pass, here of
    512 tokens, before weights change."""
    model, optimizer = filled(name, 0.01)
    ids = torch.arange(512)
    writer = Writer(root, keep_last=1)
    for step in range(1, 4):
        begun = time.monotonic()
        writer.save(model, optimizer, step=step, settings={}, data={})
        model(ids, ids, torch.tensor([0, 512], dtype=torch.int32), 512).sum().backward()
        writer.settle()
        writer.wait()
        total = time.monotonic() - begun
        print(
            f"save {step} of {model.config.num_params:,} parameters: training waits {writer.stalled_s:.3f} s, complete after {total:.2f} s"
        )


def kill_writers(name: str, kills: int, seconds: float, root: Path) -> None:
    """Kill a process that saves, again and again; check what is found."""
    draw, first, num_partial = random.Random(0), 1, 0
    for number in range(kills):
        argv = [sys.executable, "-c", SAVE_FOR_EVER, str(root), name, str(first)]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0.0, seconds))
        process.send_signal(signal.SIGKILL)
        complete = max([first - 1, *map(int, process.stdout.read().split())])
        process.wait()
        is_partial = any(root.glob("checkpoints/.step-*"))
        num_partial += is_partial
        checkpoint.recover(root)
        if complete == 0 and not any(root.glob("checkpoints/step-*")):
            print(f"kill {number + 1}: none is complete yet", flush=True)
            continue
        found = checkpoint.find(root)
        assert found.step >= complete, f"step {complete} was complete, {found.step} is the newest now"
        model, optimizer = filled(name, -1)
        checkpoint.restore(found, model, optimizer)
        assert all(bool((value == found.step).all()) for value in numbers(model, optimizer)), "torn"
        first = found.step + 1
        print(f"kill {number + 1}: step {found.step}{', another half-written' if is_partial else ''}", flush=True)
    print(
        f"{kills} kills of a writer, {num_partial} of them in the middle of a checkpoint: the newest complete one always "
        f"whole and restored to the last bit, {first - 1} steps saved in all"
    )


def kill_runs(data: Path, kills: int, root: Path) -> None:
    """Kill a run again and again; compare its steps with those of one left alone."""
    draw = random.Random(1)
    config = {
        "model": "tiny",
        "steps": 400,
        "batch_tokens": 2048,
        "save_every": 1,
        "val_every": 0,
        "log_every": 1,
        "device": "cpu",
    }
    whole = TrainOptions("sft", (data,), root / "whole", quiet=True, **config)
    train(whole)
    done = 0
    while done < kills:
        is_begun = (root / "broken" / "run.json").exists()
        broken = TrainOptions("sft", (data,), root / "broken", resume=is_begun, **config)
        process = subprocess.Popen([sys.executable, "-c", TRAIN, repr(broken)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(draw.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
    train(TrainOptions("sft", (data,), root / "broken", resume=True, quiet=True, **config))
    one, other = (
        [
            {k: v for k, v in json.loads(line).items() if k not in ("tokens_per_s", "memory_bytes")}
            for line in (root / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "broken")
    )
    assert one == other, "not the same run"
    weights = [checkpoint.read_weights(checkpoint.find(root / name)) for name in ("whole", "broken")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    print(
        f"{kills} kills of a run: its {len(one)} lines and its weights are those of a run left alone, to the last bit"
    )


def main() -> None:
    """Print what each came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="minimind2", choices=[name for name, shape in MODEL_SHAPES.items() if shape.vocab_size]
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20.0, help="the longest a writer lives: two saves, say")
    parser.add_argument("--only", choices=("stall", "writers", "runs"))
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory(dir=".") as temporary:
        root = Path(temporary)
        if options.only in (None, "stall"):
            stall(options.model, root / "stall")
        if options.only in (None, "writers"):
            kill_writers(options.model, options.kills, options.seconds, (root / "writers").absolute())
        if options.data and options.only in (None, "runs"):
            kill_runs(options.data, options.kills, (root / "runs").absolute())


if __name__ == "__main__":
    main()
