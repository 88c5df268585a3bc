"""mm's trainer against MiniMind's own, on the same rows, model shape, batch and machine, on CPU.

    python tests/bench/minimind.py --minimind CHECKOUT --data DIR --tokenizer DIR [--only speed|quality] [--extra-path DIR]

CHECKOUT is a clone of MiniMind's public repository; its train_pretrain.py and train_full_sft.py are run as they are, in a
copy. DIR holds pretrain_hq.jsonl, sft_512.jsonl and sft_1024.jsonl. What they import beside torch (datasets,
transformers) must be installed, or stand under --extra-path.

speed: trained tokens a second between the second and the last step. One step is --rows rows of theirs, padded to the
length as they do, and as many positions of packs of ours.
quality: held-out bits per byte after one epoch over the same documents in as many steps, three seeds.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.shards.dataset import open_dataset
from mmdata.shards.loader import Loader
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.config import TrainOptions
from mmtrain.inference.evaluate import evaluate
from mmtrain.model.model import Model
from mmtrain.shapes import MODEL_SHAPES, ModelConfig
from mmtrain.train.loop import train

SMALL = (128, 2)  # width and layers of the models whose quality is compared
TRAINERS = {"pretrain": "train_pretrain.py", "sft": "train_full_sft.py"}
KEYS = ("role", "content", "reasoning_content", "tools", "tool_calls")

RUN = """
import runpy, sys
sys.path.insert(0, '..')
import trainer.trainer_utils as utils
seed = utils.setup_seed
utils.setup_seed = lambda number: seed(number + {seed})
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""
COUNT = """
import sys
sys.path.insert(0, '..')
from transformers import AutoTokenizer
from dataset.lm_dataset import PretrainDataset, SFTDataset
rows = {kind}({data!r}, AutoTokenizer.from_pretrained('../model'), max_length={length})
print(sum(int((rows[i][1][1:] != -100).sum()) for i in range(len(rows))) / len(rows))
"""


def shape_of(width: int, layers: int) -> ModelConfig:
    """The shape MiniMind makes of a width and a number of layers."""
    ffn = math.ceil(width * math.pi / 64) * 64
    return ModelConfig(6400, width, layers, 8, 4, ffn, norm_eps=1e-6, qk_norm=True)


def their_python(code: str, copy: Path, extra: Path | None) -> subprocess.Popen:
    """A process of MiniMind's, standing where its scripts expect to."""
    paths = [str(path) for path in (extra,) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-u", "-c", code], cwd=copy / "trainer", env=environment, stdout=subprocess.PIPE, text=True
    )


def their_options(shape: ModelConfig, data: Path, out: Path, length: int, rows: int) -> list[str]:
    options = {"hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_layers, "max_seq_len": length}
    options |= {"batch_size": rows, "device": "cpu", "num_workers": 1, "epochs": 1, "log_interval": 1}
    options |= {
        "accumulation_steps": 1,
        "from_weight": "none",
        "data_path": data,
        "save_dir": out,
        "save_interval": 10**9,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def their_speed(stage: str, data: Path, copy: Path, length: int, options: argparse.Namespace) -> float:
    """Trained tokens a second of their trainer, from when its step lines come."""
    kind = "PretrainDataset" if stage == "pretrain" else "SFTDataset"
    count = their_python(COUNT.format(kind=kind, data=str(data), length=length), copy, options.extra_path)
    trained_a_row = float(count.communicate()[0].split()[-1])
    argv = [
        TRAINERS[stage],
        *their_options(shape_of(options.width, options.layers), data, copy / "out", length, options.rows),
    ]
    process = their_python(RUN.format(argv=argv, seed=0), copy, options.extra_path)
    assert process.stdout is not None
    times = []
    for line in process.stdout:
        if line.startswith("Epoch:"):
            times.append(time.monotonic())
            if len(times) == options.steps:
                process.kill()
                break
    process.wait()
    return trained_a_row * options.rows * (len(times) - 1) / (times[-1] - times[0])


def our_speed(stage: str, shards: Path, out: Path, length: int, options: argparse.Namespace) -> float:
    """The same of ours, from metrics.jsonl; the first step is left out."""
    shutil.rmtree(out, ignore_errors=True)
    tokens = length * options.rows
    train(
        TrainOptions(
            stage, (shards,), out, model="bench", steps=options.steps, batch_tokens=tokens, device="cpu", quiet=True
        )
    )
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "trained_tokens" in step][1:]
    return sum(s["trained_tokens"] for s in steps) / sum(s["tokens"] / s["tokens_per_s"] for s in steps)


def for_them(source: Path, target: Path) -> Path:
    """Conversations with the keys their reader insists on."""
    with target.open("w", encoding="utf-8") as file:
        for line in source.read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["conversations"]
            rows = [{key: message.get(key) for key in KEYS} for message in messages]
            file.write(json.dumps({"conversations": rows}, ensure_ascii=False) + "\n")
    return target


def speed(options: argparse.Namespace, copy: Path, root: Path) -> None:
    """The table of speeds."""
    MODEL_SHAPES["bench"] = shape = shape_of(options.width, options.layers)
    print(f"{shape.num_params:,} parameters, {options.rows} rows a step, {torch.get_num_threads()} threads")
    print(f"{'data':<22} {'mm':>10} {'MiniMind':>10} {'ratio':>7}   (trained tokens/s)")
    for stage, name, length in (("sft", "sft_512", 512), ("sft", "sft_1024", 1024), ("pretrain", "pretrain_hq", 512)):
        source = options.data / f"{name}.jsonl"
        pack([source], root / name, PackOptions(tokenizer=options.tokenizer, max_len=length, val_fraction=0.0))
        ours = our_speed(stage, root / name, root / f"run-{name}", length, options)
        data = source if stage == "pretrain" else for_them(source, root / f"{name}.jsonl")
        theirs = their_speed(stage, data, copy, length, options)
        print(f"{name + ' at ' + str(length):<22} {ours:>10,.0f} {theirs:>10,.0f} {ours / theirs:>6.2f}x", flush=True)


def bits_per_byte(model: Model, val: Path) -> float:
    """Of a held-out dataset, all of its packs."""
    dataset = open_dataset(val)
    loader = Loader([dataset], split="train", batch_tokens=8192, micro_tokens=4096, seed=0)
    return evaluate(model.eval(), loader, Tokenizer.load(val / "tokenizer"))["bits_per_byte"]


def quality(options: argparse.Namespace, copy: Path, root: Path) -> None:
    """Held-out bits per byte of both after one epoch over the same documents."""
    MODEL_SHAPES["bench"] = shape = shape_of(*SMALL)
    tokenizer = Tokenizer.load(options.tokenizer)
    rows = (options.data / "pretrain_hq.jsonl").read_text(encoding="utf-8").splitlines()
    short = [row for row in rows if len(tokenizer.encode_batch([json.loads(row)["text"]])[0]) <= 500][
        : options.documents
    ]
    (root / "val.jsonl").write_text("\n".join(short[::10]) + "\n", encoding="utf-8")
    (root / "train.jsonl").write_text("\n".join(row for i, row in enumerate(short) if i % 10) + "\n", encoding="utf-8")
    for name in ("train", "val"):
        pack(
            [root / f"{name}.jsonl"],
            root / name,
            PackOptions(tokenizer=options.tokenizer, max_len=512, val_fraction=0.0),
        )
    num_steps = -(-(len(short) - len(short[::10])) // options.rows)
    num_tokens = Loader([open_dataset(root / "train")], batch_tokens=512, seed=0).tokens_per_epoch
    print(f"{shape.num_params:,} parameters, {num_tokens:,} tokens in about {num_steps} steps, bits per byte held out")
    print(f"{'seed':<6} {'mm, its lr 1e-3':>16} {'mm at 5e-4':>12} {'MiniMind, its 5e-4':>20}")
    for seed in range(3):
        found = []
        for lr in (1e-3, 5e-4):
            out = root / f"quality-{seed}-{lr}"
            batch = 512 * max(1, round(num_tokens / num_steps / 512))
            config = TrainOptions("pretrain", (root / "train",), out, model="bench", lr=lr, seed=seed)
            train(replace(config, batch_tokens=batch, epochs=1, device="cpu", quiet=True))
            model = Model(shape)
            model.load_state_dict(load_file(next(out.glob("checkpoints/step-*/model.safetensors"))))
            found.append(bits_per_byte(model, root / "val"))
        argv = [TRAINERS["pretrain"], *their_options(shape, root / "train.jsonl", copy / "out", 512, options.rows)]
        their_python(RUN.format(argv=argv, seed=seed), copy, options.extra_path).communicate()
        weights = torch.load(copy / "out" / f"pretrain_{shape.hidden_size}.pth")
        model = Model(shape)
        model.load_state_dict({k: v.float() for k, v in weights.items() if not re.match("lm_head", k)})
        found.append(bits_per_byte(model, root / "val"))
        print(f"{seed:<6} {found[0]:>16.4f} {found[1]:>12.4f} {found[2]:>20.4f}", flush=True)


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minimind", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--extra-path", type=Path)
    parser.add_argument("--only", choices=("speed", "quality"))
    parser.add_argument("--documents", type=int, default=400, help="documents of the comparison of quality")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        copy = root / "minimind"
        shutil.copytree(options.minimind, copy, ignore=shutil.ignore_patterns(".git", "images"))
        (copy / "out").mkdir(exist_ok=True)
        if options.only != "quality":
            speed(options, copy, root)
        if options.only != "speed":
            quality(options, copy, root)


if __name__ == "__main__":
    main()
