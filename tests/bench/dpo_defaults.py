"""Which rate, beta and --sft-weight `mm train dpo` should have unless told, on a small model and MiniMind's own files. On CPU.

    python tests/bench/dpo_defaults.py --rows DIR --tokenizer DIR --work DIR [--width 128] [--layers 4]
                                       [--run LR[:KEY=VALUE...]]... [--seeds 0,1] [--jobs 2]
    python tests/bench/dpo_defaults.py --demo DIR --work DIR [--run LR[:KEY=VALUE...]]...

--rows holds pretrain_hq, pretrain_t2t_mini, sft_512, sft_t2t_mini and dpo.jsonl. A base is pretrained and taught once and
kept in --work; each run is then dpo on three quarters of the pairs that fit 1,024 tokens a side, at the default batch, a
line each: held-out figures at its end, and how much dearer held-out text of sft has become. A KEY is any setting of mm
train, such as beta=0.2 or epochs=2; --jobs runs go at once, each with one thread.
"""

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdata.demo import Question
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards.dataset import open_dataset
from mmdata.shards.pairs import PairLoader
from mmtrain.checkpoint import load_model
from mmtrain.config import TrainOptions
from mmtrain.distributed import World
from mmtrain.shapes import MODEL_SHAPES, ModelConfig
from mmtrain.train import reference
from mmtrain.train.loop import train

SOURCES = {
    "pretrain": (("pretrain_hq", "pretrain_t2t_mini"), 512, 0.05),
    "sft": (("sft_512", "sft_t2t_mini"), 1024, 0.1),
    "dpo": (("dpo",), 1024, 0.25),
}
RUNS = [
    *(f"{lr}:epochs={epochs}" for epochs in (1, 2) for lr in ("1e-6", "5e-6", "2e-5", "5e-5", "1e-4", "2e-4", "5e-4")),
    *(f"{lr}:epochs=2:beta=0.2" for lr in ("5e-5", "1e-4", "2e-4")),
    *(f"{lr}:epochs=2:sft_weight={weight}" for weight in (0.1, 1) for lr in ("5e-5", "1e-4", "2e-4")),
]
QUIET: dict[str, Any] = {"device": "cpu", "save_every": 10**9, "samples": False, "report": False}


def shape_of(options: argparse.Namespace) -> ModelConfig:
    """MiniMind HEAD's shape at this width, with the tokenizer's vocabulary."""
    ffn = -(-int(options.width * np.pi + 0.9999) // 64) * 64
    return ModelConfig(0, options.width, options.layers, 8, 4, ffn, norm_eps=1e-6, qk_norm=True)


def prepare(options: argparse.Namespace) -> Path:
    """Pack the files and train the base, unless they are in --work; gives the sft run."""
    for name, (files, max_len, val) in SOURCES.items():
        out = options.work / "shards" / name
        if not out.exists():
            paths = [options.rows / f"{file}.jsonl" for file in files]
            pack(paths, out, PackOptions(tokenizer=options.tokenizer, max_len=max_len, val_fraction=val))
    base = options.work / f"base-{options.width}x{options.layers}"
    pretrain = TrainOptions(
        "pretrain",
        (options.work / "shards" / "pretrain",),
        base / "pretrain",
        model="bench",
        optimizer="muon",
        epochs=options.epochs,
        batch_tokens=8192,
        log_every=50,
        **QUIET,
    )
    sft = TrainOptions(
        "sft",
        (options.work / "shards" / "sft",),
        base / "sft",
        init=pretrain.out,
        epochs=options.epochs,
        batch_tokens=8192,
        lr=1e-3,
        log_every=50,
        **QUIET,
    )
    for config in (pretrain, sft):
        if not (config.out / "done").exists():
            shutil.rmtree(config.out, ignore_errors=True)
            found = train(config).val
            (config.out / "done").touch()
            print(f"{config.stage}: val loss {found['loss']:.3f}", flush=True)
    return sft.out


def describe(options: argparse.Namespace, sft: Path) -> None:
    """What can be said of the pairs before any preference is trained: by length, and by the base's log-probabilities."""
    dataset, model = open_dataset(options.work / "shards" / "dpo"), load_model(sft)[0]
    for split in ("train", "val"):
        loader = PairLoader([dataset], split=split, batch_tokens=2**14, micro_tokens=4096, seed=0, share_prompt=True)
        logps = reference.compute(model, loader, World(0, 1, torch.device("cpu")))
        lengths = torch.from_numpy(loader.lengths[:, 1:])
        longer = (lengths[:, 0] > lengths[:, 1]).double().mean()
        by_sum, by_mean = ((each[:, 0] > each[:, 1]).double().mean() for each in (logps, logps / lengths))
        print(
            f"{split}: {len(lengths)} pairs, chosen longer in {100 * longer:.0f} %, replies of {lengths.double().mean():.0f} tokens; "
            f"the base ranks {100 * by_sum:.1f} % right by the sum, {100 * by_mean:.1f} % by the mean"
        )


def settings_of(text: str) -> dict[str, Any]:
    """LR:KEY=VALUE... as settings."""
    lr, *others = text.split(":")
    settings: dict[str, Any] = {"lr": float(lr)}
    for key, value in (other.split("=") for other in others):
        settings[key] = value if key == "loss" else int(value) if key in ("steps", "batch_tokens") else float(value)
    return settings


def dpo(init: Path, data: Path, guard: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Train a run of dpo; its held-out figures at the end and at the start, its steps, its accuracy over the last five."""
    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    base = {"val_every": 0, "log_every": 1, "guard": str(guard), "init": init}
    result = train(TrainOptions("dpo", (data,), out, quiet=True, **(QUIET | base | settings)))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [line["accuracy"] for line in steps if "accuracy" in line][-5:]
    start = json.loads((out / "run.json").read_text())["start_val"]
    return {"val": result.val, "start": start, "steps": result.num_steps, "train": sum(last) / len(last)}


def real(options: argparse.Namespace, text: str, seed: int) -> dict[str, Any]:
    """A run on MiniMind's pairs."""
    name = f"{options.width}x{options.layers}"
    out = options.work / "runs" / f"{name}-{text.replace(':', '-')}-{seed}"
    init, shards = options.work / f"base-{name}" / "sft", options.work / "shards"
    found = dpo(init, shards / "dpo", shards / "sft", out, seed=seed, **settings_of(text))
    shutil.rmtree(out)
    return found


def demo(options: argparse.Namespace, text: str, seed: int) -> dict[str, Any]:
    """A run on the demo's pairs, and the share of its questions answered exactly."""
    from mmtrain.commands.demo import score_demo

    rows = (options.demo / "data" / "held_out" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    shards, out = options.demo / "shards", options.work / "runs" / f"demo-{text.replace(':', '-')}-{seed}"
    init, settings = options.demo / "runs" / "sft_1024", {"batch_tokens": 576, "warmup": 0.03, **settings_of(text)}
    found = dpo(init, shards / "dpo", shards / "sft_512", out, seed=seed, **settings)
    scored = score_demo(out, [Question(**json.loads(row)) for row in rows], shards / "held_out_pairs")
    shutil.rmtree(out)
    return found | {"exact": scored["exact"], "ranked": scored["preference_accuracy"]}


def line(text: str, seed: int, found: Mapping[str, Any]) -> str:
    """A row of the table."""
    now, start = found["val"], found["start"]
    exact = f" {100 * found['exact']:>6.1f}% {100 * found['ranked']:>6.1f}%" if "exact" in found else ""
    return (
        f"{text:<30} {seed:>4} {found['steps']:>5} {100 * found['train']:>6.0f}% {100 * now['accuracy']:>7.1f}% "
        f"{now['reward_margin']:>+8.3f} {now['chosen_drift']:>+8.1f} {now['rejected_drift']:>+8.1f} "
        f"{now['chosen_nll'] - start['chosen_nll']:>+8.4f} {now['guard_loss'] - start['guard_loss']:>+8.4f}{exact}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("rows", "tokenizer", "demo"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=4, help="of the base's two stages")
    parser.add_argument("--run", action="append", metavar="LR[:KEY=VALUE]")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.jobs)
    if not options.demo:
        MODEL_SHAPES["bench"] = shape_of(options)
        describe(options, prepare(options))
    wanted = [(text, int(seed)) for text in options.run or RUNS for seed in options.seeds.split(",")]
    print(
        f"{'run':<30} {'seed':>4} {'steps':>5} {'train':>7} {'held out':>8} {'margin':>8} {'chosen':>8} {'rejected':>8} "
        f"{'nll':>8} {'guard':>8} {'exact   ranked' if options.demo else ''}",
        flush=True,
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        task = demo if options.demo else real
        pending = [(text, seed, pool.apply_async(task, (options, text, seed))) for text, seed in wanted]
        for text, seed, result in pending:
            print(line(text, seed, result.get()), flush=True)


if __name__ == "__main__":
    main()
