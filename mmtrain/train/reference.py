"""The reference's summed logps of every pair: computed once, kept beside the dataset for later runs, never stale.

A cache is one Arrow file of two float64 columns, `DATASET.reference/KEY.arrow` (16 bytes a pair: float32 would round a
long reply's sum by 1e-4 nats, more than a margin moves at first). Its name and its metadata hold all that the logps depend
on, and the sha256 of the values: another weight, dataset, precision or reduction has another file, and a
damaged one is not used. No second model stays in memory.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdata.errors import CheckpointError
from mmdata.io.arrow import read_arrow, write_arrow
from mmdata.shards.pairs import PairLoader
from mmtrain.distributed import World
from mmtrain.model.batch import logps_of, to_device
from mmtrain.model.model import Model

# Tokens run at once: without gradients a token takes a fraction of the memory it does in training.
TOKENS = {"cpu": 8192, "cuda": 131_072}


def key_of(weights_sha256: str, shape: Mapping[str, Any], data_digest: str, dtype: torch.dtype) -> dict[str, str]:
    """What the logps depend on: weights and shape of the model, datasets, precision, and how they are summed."""
    shape_sha256 = hashlib.sha256(json.dumps(dict(shape), sort_keys=True).encode()).hexdigest()
    precision = str(dtype).removeprefix("torch.")
    weights = {"weights": weights_sha256, "shape": shape_sha256}
    return weights | {"data": data_digest, "precision": precision, "reduction": "sum, float64"}


def cache_path(dataset_dir: Path, key: Mapping[str, str], splits: Mapping[str, int]) -> Path:
    """Where the logps of these splits (name -> pairs) under this key are kept, beside the dataset."""
    name = hashlib.sha256(json.dumps([dict(key), dict(splits)], sort_keys=True).encode()).hexdigest()[:16]
    return dataset_dir.with_name(f"{dataset_dir.name}.reference") / f"{name}.arrow"


def compute(
    model: Model, loader: PairLoader, world: World, *, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Summed logps float64 [num_samples, 2], chosen then rejected, of a whole split; every rank does its share, all get all."""
    logps = torch.zeros(loader.num_samples, 2, dtype=torch.float64, device=world.device)
    done = 0
    with torch.no_grad():
        limits = replace(loader.limits, tokens=TOKENS[world.device.type])
        for micro in loader.micro_batches(limits.tokens):
            pairs = logps_of(model, to_device(micro, world.device, limits)).view(-1, 2)
            logps[torch.from_numpy(micro.samples).to(world.device)] = pairs
            done += len(micro.samples)
            if progress is not None:
                progress(min(done * world.size, loader.num_samples), loader.num_samples)
    return world.sum(logps)


def save(path: Path, logps: Mapping[str, Tensor], key: Mapping[str, str]) -> None:
    """Write the logps of every split under their key, complete or not at all. OSError where the place cannot be written."""
    values = np.concatenate([each.cpu().numpy() for each in logps.values()]).astype(np.float64)
    columns = {"chosen": values[:, 0].copy(), "rejected": values[:, 1].copy()}
    splits = json.dumps({split: len(each) for split, each in logps.items()})
    write_arrow(path, columns, {**key, "splits": splits, "sha256": _digest(columns)}, len(values) + 1)


def load(path: Path, key: Mapping[str, str]) -> dict[str, Tensor]:
    """Read logps back: split -> float64 [N, 2]. CheckpointError when the file is missing, truncated, damaged, or computed from
    other weights or data or in another precision."""
    fix = f"remove {path}: it is then computed anew"
    try:
        file = read_arrow(path)
        columns = {name: np.array(file.column(name), np.float64) for name in ("chosen", "rejected")}
        found = {name.removeprefix("mm."): value for name, value in file.metadata.items()}
        splits: dict[str, int] = json.loads(found["splits"])
    except (OSError, ValueError, KeyError, IndexError) as error:  # pyarrow's own errors are ValueErrors
        raise CheckpointError(f"{path}: missing or damaged ({error})", fix) from error
    if found["sha256"] != _digest(columns) or sum(splits.values()) != len(columns["chosen"]):
        raise CheckpointError(f"{path}: damaged, its content does not match its own hash", fix)
    for name, value in key.items():
        if found.get(name) != value:
            raise CheckpointError(f"{path}: computed with {name} {found.get(name)}, this run has {value}", fix)
    values = torch.from_numpy(np.stack([columns["chosen"], columns["rejected"]], 1))
    return dict(zip(splits, values.split(list(splits.values())), strict=True))


def _digest(columns: Mapping[str, np.ndarray]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(columns):
        sha256.update(name.encode() + columns[name].astype("<f8").tobytes())
    return sha256.hexdigest()


def differs(model: Model, loader: PairLoader, logps: Tensor, world: World) -> float:
    """The largest difference, relative to 1 nat or the logp's size, between logps and those of the first pairs computed now."""
    micro = next(iter(loader.micro_batches()), None)
    if micro is None:
        return 0.0
    with torch.no_grad():
        now = logps_of(model, to_device(micro, world.device, loader.limits)).view(-1, 2).cpu()
    kept = logps[torch.from_numpy(micro.samples)]
    return ((now - kept).abs() / kept.abs().clamp(min=1)).max().item()
