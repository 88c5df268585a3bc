"""Before the first step of dpo: the reference's logps, from the cache beside the dataset or computed once."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdata.errors import CheckpointError
from mmdata.shards.pairs import PairLoader
from mmtrain import checkpoint
from mmtrain.config import as_json
from mmtrain.distributed import World
from mmtrain.log import metrics
from mmtrain.model.model import Model
from mmtrain.model.preference import uses_reference
from mmtrain.train import reference
from mmtrain.train.plan import Plan

TELL_EVERY_S = 10  # between lines about work before the first step
SPOT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # of a cached reference's first logps, computed again


def reference_logps(
    plan: Plan,
    model: Model,
    world: World,
    facts: dict[str, Any],
    *,
    dtype: torch.dtype,
    precision: Callable[[], AbstractContextManager],
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    """The reference's logps by split, each float64 [N, 2] on the CPU; and in facts["reference"] whose they are and where.

    Of the weights the run starts from, or of --reference RUN. Where the loss has no reference, only the val split's, of the
    start weights: drift is measured from them. A resumed run finds its own again, or computes them anew while their weights
    are still there.
    """
    loaders = {"train": plan.loader, "val": plan.val_loader}
    pairs = {name: each for name, each in loaders.items() if isinstance(each, PairLoader)}
    if not uses_reference(plan.objective):
        del pairs["train"]
    splits = {name: each.num_samples for name, each in pairs.items()}
    if not any(splits.values()):
        return {}
    source = facts.get("reference") if plan.resumed else None
    source = source or _source(plan)
    key = reference.key_of(
        source["weights_sha256"], source["shape"], plan.val_loader.digest, dtype
    )  # the val loader's has no weights in it
    path = reference.cache_path(plan.datasets[0].dir, key, splits)
    own = plan.config.out / "reference.arrow"
    logps = _cached((path, own), key, world, say)
    is_start = plan.resumed is None and plan.reference is None
    if logps is None or (plan.reference is not None and plan.resumed is None):
        its_model = model if is_start else _load(source, world)
        with precision():
            if logps is None:
                logps = _compute(its_model, pairs, world, say)
                path = _save((path, own), logps, key, world, say)
            else:
                _check_spot(its_model, pairs, logps, world, dtype, path)
        del its_model
    facts["reference"] = source | {"path": str(path), "precision": key["precision"]}
    return logps


def _source(plan: Plan) -> dict[str, Any]:
    """Whose logps: a checkpoint's directory (empty for new weights), the hash of its weights, and their shape."""
    if plan.reference is not None:
        return {
            "dir": str(plan.reference.dir),
            "weights_sha256": plan.reference.weights_sha256,
            "shape": plan.reference.state["model"],
        }
    assert plan.init_facts is not None
    return {**plan.init_facts, "shape": as_json(plan.shape)}


def _cached(
    paths: tuple[Path, ...], key: Mapping[str, str], world: World, say: Callable[[str], None]
) -> dict[str, Tensor] | None:
    """The logps of the first of these files that holds them; what cannot be used is said. All ranks find the same."""
    logps, at = None, -1
    for i, path in enumerate(paths):
        if logps is None and path.exists():
            try:
                logps, at = reference.load(path, key), i
            except CheckpointError as error:
                say(f"{error.message}: refused, and computed again")
    found = torch.zeros(world.size, device=world.device)
    found[world.rank] = at + 1
    if len(set(world.sum(found).tolist())) > 1:  # a rank saw a file another did not: nobody takes one
        return None
    if logps is not None:
        say(f"reference logps of {sum(map(len, logps.values())):,} pairs taken from {paths[at]}")
    return logps


def _load(source: Mapping[str, Any], world: World) -> Model:
    """The reference's model, if it is still where it was."""
    directory = Path(source["dir"])
    fix = "start the run again with another --out"
    if not source["dir"] or not (directory / checkpoint.STATE).exists():
        raise CheckpointError(
            f"the reference's log-probabilities are gone, and so are its weights ({directory or 'new weights'})", fix
        )
    found = checkpoint.open_checkpoint(directory)
    if found.weights_sha256 != source["weights_sha256"]:
        raise CheckpointError(f"{directory}: other weights than the run was started with as its reference", fix)
    return checkpoint.load_model(directory, world.device)[0]


def _compute(
    model: Model, pairs: Mapping[str, PairLoader], world: World, say: Callable[[str], None]
) -> dict[str, Tensor]:
    begun = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_EVERY_S:
            last = time.monotonic()
            say(f"reference logps: {done:,} of {total:,} pairs, {metrics.duration(last - begun)}")

    logps = {split: reference.compute(model, each, world, progress=tell).cpu() for split, each in pairs.items()}
    total = sum(map(len, logps.values()))
    say(f"reference logps of {total:,} pairs computed in {metrics.duration(time.monotonic() - begun)}")
    return logps


def _save(
    paths: tuple[Path, Path],
    logps: Mapping[str, Tensor],
    key: Mapping[str, str],
    world: World,
    say: Callable[[str], None],
) -> Path:
    """Keep the logps beside the dataset, or in the run where that cannot be written; gives where."""
    if not world.is_first:
        return paths[0]
    try:
        reference.save(paths[0], logps, key)
    except OSError as error:
        say(f"{paths[0].parent} cannot be written ({error.strerror}): the reference logps are kept in {paths[1]}")
        reference.save(paths[1], logps, key)
        return paths[1]
    return paths[0]


def _check_spot(
    model: Model,
    pairs: Mapping[str, PairLoader],
    logps: Mapping[str, Tensor],
    world: World,
    dtype: torch.dtype,
    path: Path,
) -> None:
    """A cached reference is held against its own weights on a few pairs: step 0 cannot show that it is another's."""
    error = None
    for split, each in pairs.items():
        gap = reference.differs(model, each, logps[split], world)
        if not gap <= SPOT_TOLERANCE[dtype]:
            error = CheckpointError(
                f"{path}: its {split} log-probabilities are {gap:.3g} away from what the reference's weights give",
                f"remove {path}: it is then computed anew",
            )
    world.agree(error)
