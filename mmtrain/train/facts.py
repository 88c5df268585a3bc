"""What run.json says of a run: where every value came from, what it trains on, on what, and with which versions."""

import math
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmtrain import checkpoint
from mmtrain.config import as_json
from mmtrain.distributed import World
from mmtrain.model.model import Model
from mmtrain.model.precision import autocast_dtype
from mmtrain.train.plan import Plan
from mmtrain.train.speed import matmul_flops


def first_facts(plan: Plan, world: World, model: Model) -> dict[str, Any]:
    """What run.json says from the start. A resumed run keeps what it said before and adds when it went on."""
    now = time.time()
    if plan.resumed:
        facts = checkpoint.read_run(plan.config.out)
        again = {"step": plan.resumed.step, "time": now, "world_size": world.size, "device": str(world.device)}
        return facts | {"resumed": [*facts.get("resumed", []), again]}
    return {
        "stage": plan.stage.name,
        "status": "running",
        "started": now,
        "settings": {
            name: {"value": value, "from": plan.origins[name]} for name, value in as_json(plan.settings).items()
        },
        "model": as_json(plan.shape),
        "num_params": sum(p.numel() for p in model.parameters()),
        "num_steps": plan.num_steps,
        "init": plan.init_facts,
        "data_digest": plan.loader.digest,
        "data": [
            {"dir": str(s.dataset.dir), "kind": s.dataset.kind, "digest": s.dataset.digest, "share": s.tokens}
            for s in plan.loader.shares
        ],
        "tokenizer_sha256": plan.datasets[0].tokenizer_sha256,
        "device": str(world.device),
        **_speed_facts(plan, world),
        "precision": str(autocast_dtype(world.device)).removeprefix("torch."),
        "world_size": world.size,
        "versions": {name: _version(name) for name in ("mm-toolkit", "torch", "numpy", "pyarrow", "tokenizers")},
    }


def _speed_facts(plan: Plan, world: World) -> dict[str, Any]:
    """What the report measures speed against: the device's name and rate, and how full padded rows would be."""
    if not (plan.config.report and world.is_first):
        return {}
    shards = [shard for dataset in plan.datasets for shard in dataset.manifest["shards"] if shard["split"] == "train"]
    sides = 2 if plan.stage.kind == "pair" else 1
    positions = sum(sides * shard["samples"] * shard["bucket"] for shard in shards)
    is_cuda = world.device.type == "cuda"
    return {
        "device_name": torch.cuda.get_device_name(world.device) if is_cuda else "CPU",
        "matmul_flops": matmul_flops(world.device, autocast_dtype(world.device)),
        "fill": sum(shard["model_tokens"] for shard in shards) / max(1, positions),
    }


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Paths as strings, what is not finite as null."""
    texts = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in texts.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
