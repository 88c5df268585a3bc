"""The reference model's log-probabilities of every pair, summed over the trained tokens of each side. They are computed
once, before the first step of dpo, and cached in a file, so that no second model stays in memory during training.

The cache `DATASET.reference/NAME.arrow` is an Arrow file with two float64 columns (float32 would round the sum of a
long reply by 1e-4 nats, more than a reward margin changes in the first steps). Its metadata has everything that the
logps depend on, hashed in NAME, and their sha256: other weights, data or precision use another file, a damaged file is
not used.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdata.errors import CheckpointError
from mmdata.io.arrow import read_arrow, write_arrow
from mmdata.io.files import Progress, no_progress
from mmdata.shards.pairs import PROMPT_TWICE, PairLoader
from mmtrain import checkpoint
from mmtrain.distributed import World
from mmtrain.log.console import Console, duration
from mmtrain.model.batch import logps_of, to_device
from mmtrain.model.model import Model
from mmtrain.model.precision import autocast, autocast_dtype, widest
from mmtrain.model.preference import uses_reference
from mmtrain.records import ReferenceRecord
from mmtrain.train.plan import TrainPlan

# Tokens per micro-batch on CUDA and elsewhere; more than in training, because without gradients they need less memory.
CUDA_TOKENS, TOKENS = 131_072, 8192
SPOT_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-2,
}  # largest relative difference, see `differs`
Say = Callable[[str], None]


def prepare(
    plan: TrainPlan, model: Model, world: World, saved: ReferenceRecord | None, console: Console
) -> tuple[dict[str, Tensor], ReferenceRecord | None]:
    """Return the reference model's logps by split ("train", "val"), each float64 [N, 2] (chosen, rejected) on the CPU,
    and its record for run.json, from the cache if possible, else computed and saved there; ({}, saved) if none are
    needed.

    The reference is `model` with its start weights, or the model of --reference. For a loss without reference only the
    val split's logps are computed, with the start weights, to measure drift. saved: the record of a resumed run, else
    None. Raises CheckpointError if the logps of a resumed run are lost and the reference weights no longer exist, or if
    cached logps of a --reference run do not match its weights.
    """
    pairs = _pairs(plan)
    if not pairs:
        return {}, saved
    record = saved or _record_of(plan)
    key, path, own = _places(plan, pairs, record, world)
    logps = _cached((path, own), key, world, console.say)
    is_start = plan.start.resumed is None and plan.reference is None
    if logps is None or plan.reference is not None:
        reference = model if is_start else _load(record, world)
        with autocast(world.device):
            if logps is None:
                logps = _compute_splits(reference, pairs, world, console)
                path = _save((path, own), logps, key, world, console.say)
            else:
                _check_spot(reference, pairs, logps, world, SPOT_TOLERANCE[autocast_dtype(world.device)], path)
    record.path, record.precision = str(path), key["precision"]
    return logps, record


def num_pending_tokens(plan: TrainPlan, world: World) -> int:
    """Return the tokens computed for the pairs whose logps `prepare` will not find in the cache."""
    pairs = _pairs(plan)
    if pairs and (plan.reference or plan.start.record):
        _, *places = _places(plan, pairs, _record_of(plan), world)
        if any(path.exists() for path in places):
            return 0
    tokens = (loader.computed_share * (loader.lengths @ PROMPT_TWICE).sum() for loader in pairs.values())
    return round(float(sum(tokens)))


def _pairs(plan: TrainPlan) -> dict[str, PairLoader]:
    """Return by split the loaders of the pairs whose logps are needed; empty if there are none."""
    loaders = {"train": plan.loader, "val": plan.val_loader}
    pairs = {split: loader for split, loader in loaders.items() if isinstance(loader, PairLoader)}
    if not uses_reference(plan.objective):
        pairs.pop("train", None)
    return pairs if any(loader.num_samples for loader in pairs.values()) else {}


def _places(
    plan: TrainPlan, pairs: Mapping[str, PairLoader], record: ReferenceRecord, world: World
) -> tuple[dict[str, str], Path, Path]:
    """Return the key of the logps, and where they are cached: beside the dataset, or else in the run directory."""
    # The digest identifies the datasets. That of the train loader also depends on their mixing weights, but the logps
    # do not, so the val loader's is used.
    shape = asdict(record.shape)
    key = key_of(record.weights_sha256, shape, plan.val_loader.digest, autocast_dtype(world.device))
    splits = {split: loader.num_samples for split, loader in pairs.items()}
    return key, cache_path(plan.datasets[0].dir, key, splits), plan.out / "reference.arrow"


def _record_of(plan: TrainPlan) -> ReferenceRecord:
    """Return the record of a new run's reference model: checkpoint directory (empty for new weights), hash, shape."""
    if plan.reference is not None:
        source = plan.reference
        return ReferenceRecord(str(source.dir), source.weights_sha256, shape=source.model_config)
    start = plan.start.record
    assert start is not None
    return ReferenceRecord(start.dir, start.weights_sha256, start.resize_embeddings, start.added_ids, shape=plan.shape)


# --- computing


def _load(record: ReferenceRecord, world: World) -> Model:
    """Load the reference model. Raises CheckpointError if the checkpoint is gone or has other weights than `record`."""
    directory = Path(record.dir)
    fix = "start the run again with another --out"
    if not record.dir or not (directory / checkpoint.STATE).exists():
        raise CheckpointError(
            f"the reference's log-probabilities are gone, and so are its weights ({record.dir or 'new weights'})", fix
        )
    if checkpoint.open_checkpoint(directory).weights_sha256 != record.weights_sha256:
        raise CheckpointError(f"{directory}: other weights than the run was started with as its reference", fix)
    return checkpoint.load_model(directory, world.device)[0]


def _compute_splits(model: Model, pairs: Mapping[str, PairLoader], world: World, console: Console) -> dict[str, Tensor]:
    """Compute the logps of every split, on the CPU, and show the progress."""
    begun = time.monotonic()
    total = sum(loader.num_samples for loader in pairs.values())
    logps: dict[str, Tensor] = {}
    with console.phase("reference logps", "pairs") as update:
        for split, loader in pairs.items():
            before = sum(map(len, logps.values()))
            logps[split] = compute(
                model, loader, world, progress=lambda done, _, before=before: update(before + done, total)
            ).cpu()
    console.say(f"reference logps of {total:,} pairs computed in {duration(time.monotonic() - begun)}")
    return logps


def compute(model: Model, loader: PairLoader, world: World, *, progress: Progress = no_progress) -> Tensor:
    """Return the summed logps of all pairs of the loader's split on the device: float64 [num_samples, 2], chosen first.
    Every rank must call this; each computes its share and gets all. progress: called as `progress(done, total)` with
    numbers of pairs after each micro-batch; done is estimated from this rank's share."""
    logps = torch.zeros(loader.num_samples, 2, dtype=widest(world.device), device=world.device)
    done = 0
    with torch.no_grad():
        limits = replace(loader.limits, tokens=CUDA_TOKENS if world.device.type == "cuda" else TOKENS)
        for micro in loader.micro_batches(limits.tokens):
            values = logps_of(model, to_device(micro, world.device, limits)).view(-1, 2)
            logps[torch.from_numpy(micro.samples).to(world.device)] = values
            done += len(micro.samples)
            progress(min(done * world.size, loader.num_samples), loader.num_samples)
    return world.sum(logps)


def differs(model: Model, loader: PairLoader, logps: Tensor, world: World) -> float:
    """Return the largest difference between given and new logps, on this rank's first micro-batch, divided by the given
    logp or by 1 nat if that is larger; 0.0 without pairs. logps: float64 [num_samples, 2] on the CPU."""
    micro = next(iter(loader.micro_batches()), None)
    if micro is None:
        return 0.0
    with torch.no_grad():
        now = logps_of(model, to_device(micro, world.device, loader.limits)).view(-1, 2).cpu()
    cached = logps[torch.from_numpy(micro.samples)]
    return ((now - cached).abs() / cached.abs().clamp(min=1)).max().item()


def _check_spot(
    model: Model,
    pairs: Mapping[str, PairLoader],
    logps: Mapping[str, Tensor],
    world: World,
    tolerance: float,
    path: Path,
) -> None:
    """Raise CheckpointError if cached logps of a --reference run differ by more than `tolerance` from those that its
    weights give, on a few pairs of each split. The check at step 0 of dpo cannot find this, because the policy starts
    from other weights. Every rank must call this; if any fails, all end. model: the reference. path: the cache file."""
    error = None
    for split, loader in pairs.items():
        gap = differs(model, loader, logps[split], world)
        if not gap <= tolerance:
            error = CheckpointError(
                f"{path}: its {split} log-probabilities are {gap:.3g} away from what the reference's weights give",
                f"remove {path}: it is then computed again",
            )
    world.agree(error)


# --- the cache


def key_of(weights_sha256: str, shape: Mapping[str, Any], data_digest: str, dtype: torch.dtype) -> dict[str, str]:
    """Return by name all that the logps depend on: hashes of weights, shape and datasets, precision, way of summing."""
    shape_sha256 = hashlib.sha256(json.dumps(dict(shape), sort_keys=True).encode()).hexdigest()
    precision = str(dtype).removeprefix("torch.")
    weights = {"weights": weights_sha256, "shape": shape_sha256}
    return weights | {"data": data_digest, "precision": precision, "reduction": "sum, float64"}


def cache_path(dataset_dir: Path, key: Mapping[str, str], splits: Mapping[str, int]) -> Path:
    """Return the path of the cache file, `DATASET.reference/NAME.arrow` beside the dataset. NAME is the first 16 hex
    digits of a hash of `key` and `splits`. key: from `key_of`. splits: number of pairs of each split."""
    name = hashlib.sha256(json.dumps([dict(key), dict(splits)], sort_keys=True).encode()).hexdigest()[:16]
    return dataset_dir.with_name(f"{dataset_dir.name}.reference") / f"{name}.arrow"


def _cached(paths: tuple[Path, ...], key: Mapping[str, str], world: World, say: Say) -> dict[str, Tensor] | None:
    """Return the logps from the first of `paths` that has a usable file with this key; None unless all ranks read the
    same one. Files that are damaged or have another key are reported and skipped."""
    logps, number = None, -1
    for i, path in enumerate(paths):
        if logps is None and path.exists():
            try:
                logps, number = load(path, key), i
            except CheckpointError as error:
                say(f"{error.message}: refused, and computed again")
    if len(set(world.gather(number))) > 1:  # ranks would use different files, so none is used
        return None
    if logps is not None:
        say(f"reference logps of {sum(map(len, logps.values())):,} pairs taken from {paths[number]}")
    return logps


def _save(
    paths: tuple[Path, Path], logps: Mapping[str, Tensor], key: Mapping[str, str], world: World, say: Say
) -> Path:
    """Save the logps on the first rank in `paths[0]`, or in `paths[1]` if that cannot be written; return the path."""
    if not world.is_first:
        return paths[0]
    try:
        save(paths[0], logps, key)
    except OSError as error:
        say(f"{paths[0].parent} cannot be written ({error.strerror}): the reference logps are kept in {paths[1]}")
        save(paths[1], logps, key)
        return paths[1]
    return paths[0]


def save(path: Path, logps: Mapping[str, Tensor], key: Mapping[str, str]) -> None:
    """Write the logps of every split and their key to an Arrow file, atomically. Raises OSError if that fails."""
    values = np.concatenate([each.cpu().numpy() for each in logps.values()]).astype(np.float64)
    columns = {"chosen": values[:, 0].copy(), "rejected": values[:, 1].copy()}
    splits = json.dumps({split: len(each) for split, each in logps.items()})
    write_arrow(path, columns, {**key, "splits": splits, "sha256": _digest(columns)}, len(values) + 1)


def load(path: Path, key: Mapping[str, str]) -> dict[str, Tensor]:
    """Read logps from a cache file, by split: float64 [N, 2] (chosen, rejected). Raises CheckpointError if the file is
    missing or damaged, or if its metadata differ from `key`."""
    fix = f"remove {path}: it is then computed again"
    try:
        file = read_arrow(path)
        columns = {name: np.array(file.column(name), np.float64) for name in ("chosen", "rejected")}
        metadata = {name.removeprefix("mm."): value for name, value in file.metadata.items()}
        splits: dict[str, int] = json.loads(metadata["splits"])
    except (OSError, ValueError, KeyError, IndexError) as error:  # pyarrow's own errors are ValueErrors
        raise CheckpointError(f"{path}: missing or damaged ({error})", fix) from error
    if metadata["sha256"] != _digest(columns) or sum(splits.values()) != len(columns["chosen"]):
        raise CheckpointError(f"{path}: damaged, its content does not match its own hash", fix)
    for name, value in key.items():
        if metadata.get(name) != value:
            raise CheckpointError(f"{path}: computed with {name} {metadata.get(name)}, this run has {value}", fix)
    values = torch.from_numpy(np.stack([columns["chosen"], columns["rejected"]], 1))
    return dict(zip(splits, values.split(list(splits.values())), strict=True))


def _digest(columns: Mapping[str, np.ndarray]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(columns):
        sha256.update(name.encode() + columns[name].astype("<f8").tobytes())
    return sha256.hexdigest()
