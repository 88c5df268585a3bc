"""The reference's summed logps of every pair: computed once before training, kept beside the run, never stale.

The file is bound to the weights, the dataset and the precision it was computed with, and to its own hash.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from mmdata.errors import CheckpointError
from mmdata.loader import Loader
from mmtrain.batch import logps_of, to_device
from mmtrain.distributed import World
from mmtrain.model import Model

FILE = "reference.safetensors"


def key_of(weights_sha256: str, loaders: Mapping[str, Loader], dtype: torch.dtype) -> dict[str, str]:
    """What the logps depend on: weights, datasets, precision, and that they are sums."""
    data = next(iter(loaders.values())).digest
    return {"weights": weights_sha256, "data": data, "precision": str(dtype), "reduction": "sum"}


def compute(
    model: Model, loader: Loader, world: World, *, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """Summed logps fp32 [num_samples, 2], chosen then rejected, of a whole split; every rank does its share, all get all."""
    logps = torch.zeros(loader.num_samples, 2, device=world.device)
    done = 0
    with torch.no_grad():
        for micro in loader.micro_batches():
            pairs = logps_of(model, to_device(micro, world.device)).view(-1, 2)
            logps[torch.from_numpy(micro.samples).to(world.device)] = pairs
            done += len(micro.samples)
            if progress is not None:
                progress(done * world.size, loader.num_samples)
    return world.sum(logps)


def save(path: Path, logps: Mapping[str, Tensor], key: Mapping[str, str]) -> None:
    """Write the logps of every split under their key, complete or not at all."""
    plain = {split: values.cpu().contiguous() for split, values in logps.items()}
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(serialize(plain, metadata={**key, "sha256": _digest(plain)}))
    temporary.replace(path)


def load(path: Path, key: Mapping[str, str]) -> dict[str, Tensor]:
    """Read logps back; CheckpointError when the file is missing, damaged, or belongs to other weights, data or precision."""
    fix = "start the run again with another --out: its reference is then computed anew"
    try:
        with safe_open(path, "pt") as file:
            logps = {split: file.get_tensor(split) for split in file.keys()}  # noqa: SIM118 (not a mapping)
            found = dict(file.metadata() or {})
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})", fix) from error
    if found.pop("sha256", None) != _digest(logps):
        raise CheckpointError(f"{path}: damaged, its content does not match its own hash", fix)
    for name, value in key.items():
        if found.get(name) != value:
            raise CheckpointError(f"{path}: computed with {name} {found.get(name)}, this run has {value}", fix)
    return logps


def _digest(logps: Mapping[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for split in sorted(logps):
        sha256.update(split.encode() + logps[split].numpy().tobytes())
    return sha256.hexdigest()
