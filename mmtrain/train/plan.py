"""A TrainOptions in, a Plan out: datasets, checkpoints and settings read and checked, nothing written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from mmdata.errors import CheckpointError, DatasetError, UsageError
from mmdata.shards.dataset import Dataset, open_dataset
from mmdata.shards.loader import Loader
from mmdata.shards.pairs import PairLoader, make_loader, saved_share
from mmtrain import checkpoint
from mmtrain.checkpoint import Checkpoint
from mmtrain.config import ModelConfig, TrainOptions, TrainSettings, resolve, shape_from
from mmtrain.distributed import World
from mmtrain.log import trackers
from mmtrain.model import preference
from mmtrain.model.batch import pinned
from mmtrain.model.preference import Objective
from mmtrain.model.stages import STAGES, Stage
from mmtrain.train.embeddings import Growth, plan_growth

SHARE_FROM = (
    0.03  # of the tokens saved, from where a prompt computed once for both sides is faster (tests/bench/dpo.py)
)


@dataclass(frozen=True)
class Plan:
    """A run as it will be: everything read and checked, nothing written."""

    config: TrainOptions
    settings: TrainSettings
    origins: dict[str, str]
    stage: Stage
    datasets: Sequence[Dataset]
    loader: Loader | PairLoader
    val_loader: Loader | PairLoader
    shape: ModelConfig
    num_steps: int
    init: Checkpoint | None  # the checkpoint of an earlier run it starts from
    resumed: Checkpoint | None  # its own checkpoint it goes on from
    init_facts: dict[str, str] | None
    objective: Objective  # of dpo
    reference: Checkpoint | None = None  # another run's weights as dpo's reference
    guard: Loader | PairLoader | None = None  # held-out text that dpo must not forget
    growth: Growth | None = None  # of the embedding, where the datasets' tokenizer has more tokens than init's


def make_plan(config: TrainOptions, world: World) -> Plan:
    """Read and check datasets, checkpoints and settings. MMError names what does not fit and what helps; writes nothing."""
    if config.stage not in STAGES:
        raise UsageError(f"stage {config.stage} is unknown", f"use one of {', '.join(STAGES)}")
    stage = STAGES[config.stage]
    trackers.check(config.trackers)
    resumed = _find_resumed(config)
    saved = resumed.state["settings"] if resumed else None
    if saved and saved["stage"] != stage.name:
        raise CheckpointError(f"{config.out} is a {saved['stage']} run", f"mm train {saved['stage']} --resume")
    paths = config.data or tuple(Path(path) for path in (resumed.state["data"]["dirs"] if resumed else ()))
    weights = resumed.state["data"].get("weights") if resumed and not config.data else config.weights
    datasets = _open_datasets(stage, paths)
    init = None if resumed else _find_init(config, stage)
    is_pairs = stage.kind == "pair"
    settings, origins = resolve(
        config,
        saved=saved,
        has_init=init is not None,
        device=world.device.type,
        share_prompt=is_pairs and saved_share(datasets) >= SHARE_FROM,
    )
    objective = Objective(**{field.name: getattr(settings, field.name) for field in fields(Objective)})
    reference = None
    if is_pairs:
        preference.check(objective)
        reference = _find_reference(objective, resumed)
    source = resumed or init
    growth = _find_growth(config, init, datasets)
    for each in (None if growth else source, reference):
        if each:
            _check_fits(each, datasets)
    shape = source.model_config if source else shape_from(str(settings.model), datasets[0].vocab_size)
    shape = replace(shape, vocab_size=growth.vocab_size) if growth else shape
    if datasets[0].max_len > shape.max_positions:
        raise DatasetError(
            f"{datasets[0].dir} holds sequences of {datasets[0].max_len} tokens, the model takes {shape.max_positions}",
            f"pack with --max-len {shape.max_positions}",
        )
    loader = _make_loader(datasets, "train", settings, world, weights)
    val_loader = _make_loader(datasets, "val", settings, world)
    if not loader.num_samples:
        raise DatasetError(f"{paths[0]}: the train split is empty", "pack more rows, or a smaller --val-fraction")
    if settings.patience and not (settings.val_every and val_loader.num_samples):
        raise UsageError(
            f"--patience {settings.patience} counts validations, and there are none on the way",
            "give --val-every, and data packed with a val split; or leave --patience out",
        )
    if resumed and not config.other_data:
        _check_same_data(resumed, loader, paths)
    num_steps = settings.steps or max(1, math.ceil((settings.epochs or 1) * loader.steps_per_epoch))
    facts = {"dir": str(init.dir), "weights_sha256": init.weights_sha256} if init else None
    facts = {**facts, **growth.facts} if facts and growth else facts
    init_facts = resumed.state["data"]["init"] if resumed else facts
    return Plan(
        config,
        settings,
        origins,
        stage,
        datasets,
        loader,
        val_loader,
        shape,
        num_steps,
        init,
        resumed,
        init_facts,
        objective,
        reference,
        _guard_loader(settings, datasets, world),
        growth,
    )


def _find_reference(objective: Objective, resumed: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint of --reference RUN; a resumed run knows which one that was."""
    if objective.reference in ("start", "none") or resumed:
        return None
    return checkpoint.find(Path(objective.reference))


def _guard_loader(settings: TrainSettings, datasets: Sequence[Dataset], world: World) -> Loader | PairLoader | None:
    """The val split of --guard; it must have one, of texts or conversations, and the run's tokenizer."""
    if not settings.guard:
        return None
    dataset = open_dataset(Path(settings.guard))
    fix = "name a dataset of documents or conversations, packed with this tokenizer and a --val-fraction"
    if dataset.kind == "pair":
        raise DatasetError(f"--guard {settings.guard} holds pairs", fix)
    if dataset.tokenizer_sha256 != datasets[0].tokenizer_sha256:
        raise DatasetError(f"--guard {settings.guard} was packed with another tokenizer", fix)
    loader = _make_loader([dataset], "val", settings, world)
    if not loader.num_samples:
        raise DatasetError(f"--guard {settings.guard} has no val split", fix)
    return loader


def _find_growth(config: TrainOptions, init: Checkpoint | None, datasets: Sequence[Dataset]) -> Growth | None:
    """How the embedding of the run started from has to grow; None unless asked for."""
    if config.resize_embeddings is None:
        return None
    if init is None:
        raise UsageError(
            "--resize-embeddings grows the embedding of an earlier run, and this run starts from none",
            "name one with --init; a resumed run has grown already, and new weights take the tokenizer's size",
        )
    return plan_growth(config.resize_embeddings, init, datasets)


def with_micro_tokens(plan: Plan, micro_tokens: int, world: World) -> Plan:
    """The same plan with micro-batches of another size: the same batches, cut elsewhere."""
    settings = replace(plan.settings, micro_tokens=micro_tokens)
    loader = _make_loader(plan.datasets, "train", settings, world, plan.loader.weights)
    return replace(
        plan, settings=settings, loader=loader, val_loader=_make_loader(plan.datasets, "val", settings, world)
    )


def _make_loader(
    datasets: Sequence[Dataset],
    split: str,
    settings: TrainSettings,
    world: World,
    weights: Sequence[float] | None = None,
) -> Loader | PairLoader:
    """This rank's batches of a split, in buffers that its device can copy from while it computes."""
    return make_loader(
        datasets,
        share_prompt=settings.share_prompt,
        split=split,
        weights=weights,
        allocate=pinned if world.device.type == "cuda" else np.empty,
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        seed=settings.seed,
        rank=world.rank,
        world_size=world.size,
    )


def _check_same_data(resumed: Checkpoint, loader: Loader | PairLoader, paths: Sequence[Path]) -> None:
    """A run goes on with the tokens it began with."""
    begun = resumed.state["data"]
    if begun["digest"] != loader.digest:
        weights = begun.get("weights") or [""] * len(begun["dirs"])
        same = [f"{path}:{w}" if w else path for path, w in zip(begun["dirs"], weights, strict=True)]
        raise CheckpointError(
            f"{resumed.run_dir} was trained on dataset {begun['digest'][:12]}, "
            f"{', '.join(map(str, paths))} is {loader.digest[:12]}",
            f"resume with the same data (--data {' --data '.join(same)}), with --other-data, or start a new --out",
        )


def _find_resumed(config: TrainOptions) -> Checkpoint | None:
    """The run's own newest checkpoint when resuming; None for a new run or one that ended before its first checkpoint."""
    if not (config.out / "run.json").exists():
        if config.resume and config.out.exists():
            raise CheckpointError(f"{config.out} is not a run", "leave --resume out to start one in a new --out")
        return None
    if not config.resume:
        raise UsageError(f"{config.out} already holds a run", "add --resume to go on, or choose another --out")
    if config.init is not None:
        raise UsageError("--init starts a run, --resume goes on with one", "leave one of them out")
    return checkpoint.find(config.out) if any(config.out.glob("checkpoints/step-*")) else None


def _open_datasets(stage: Stage, paths: Sequence[Path]) -> list[Dataset]:
    """Open the datasets, all of the stage's row kind."""
    if not paths:
        raise UsageError("no dataset given", f"mm train {stage.name} --data shards/NAME")
    datasets = [open_dataset(path) for path in paths]
    for dataset in datasets:
        dataset.check_bytes()
        if dataset.kind != stage.kind:
            right = next(other.name for other in STAGES.values() if other.kind == dataset.kind)
            raise DatasetError(
                f"{dataset.dir} holds {dataset.kind} rows; {stage.name} trains on {stage.kind} rows",
                f"mm train {right} --data {dataset.dir}",
            )
    return datasets


def _find_init(config: TrainOptions, stage: Stage) -> Checkpoint | None:
    """The checkpoint a new run starts from: as given, else of the newest finished run of the stages before.

    None for new weights: asked for by --model, or because no such run is there (the run then begins with a warning).
    """
    if config.init is not None:
        if config.model is not None:
            raise UsageError("--model is for new weights; with --init the checkpoint gives the shape", "leave one out")
        return checkpoint.find(config.init)
    found = checkpoint.find_run(config.runs_dir, stage.starts_from) if config.model is None else None
    return checkpoint.find(found) if found else None


def _check_fits(source: Checkpoint, datasets: Sequence[Dataset]) -> None:
    """A checkpoint and its data must share the tokenizer, and its vocabulary must have room."""
    for dataset in datasets:
        if dataset.tokenizer_sha256 != source.state["data"]["tokenizer_sha256"]:
            raise CheckpointError(
                f"{dataset.dir} was packed with another tokenizer than {source.run_dir} was trained with",
                f"--resize-embeddings mean if it only has tokens more; else mm pack FILE --tokenizer {source.run_dir / 'tokenizer'} --out {dataset.dir}",
            )
        if dataset.vocab_size > source.model_config.vocab_size:
            raise CheckpointError(
                f"{dataset.dir} has {dataset.vocab_size:,} ids, the model of {source.run_dir} only "
                f"{source.model_config.vocab_size:,}",
                f"mm pack FILE --tokenizer {source.run_dir / 'tokenizer'} --out {dataset.dir}",
            )
