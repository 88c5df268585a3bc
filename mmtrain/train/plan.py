"""Plan a run: data, start (a checkpoint or new weights), settings, model shape and loaders, in this order. Nothing is
written: wrong options and unfitting data are refused before the run directory is created."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from mmdata.encode.template import Template
from mmdata.errors import CheckpointError, DatasetError, TokenizerError, UsageError
from mmdata.shards.dataset import Dataset, open_dataset
from mmdata.shards.loader import BatchLoader
from mmdata.shards.pairs import make_loader, saved_share
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint, sizing
from mmtrain.checkpoint import Checkpoint
from mmtrain.config import STAGE_KINDS, TrainOptions, TrainSettings, shape_from, stage_of
from mmtrain.distributed import World, ranks_here
from mmtrain.log import trackers
from mmtrain.model import preference
from mmtrain.model.batch import pinned
from mmtrain.model.embeddings import Growth, plan_growth
from mmtrain.model.model import Model
from mmtrain.model.preference import Objective
from mmtrain.model.stages import STAGES, Stage
from mmtrain.records import RUN, StartRecord, TrainedOn
from mmtrain.resolve import resolve
from mmtrain.shapes import ModelConfig
from mmtrain.sizing import fit_to_data

# Computing the prompt of a pair once for both sides is faster if it saves at least this share of the tokens
# (tests/bench/dpo.py).
SHARE_FROM = 0.03


@dataclass(frozen=True)
class Start:
    """The weights that a run starts from; new ones if both `resumed` and `init` are None. resumed: the run's own newest
    checkpoint, if it is resumed. init: the checkpoint of another run. record: for run.json and checkpoints; None for
    new weights, whose hash is not known yet."""

    resumed: Checkpoint | None
    init: Checkpoint | None
    growth: Growth | None  # with --resize-embeddings, how the embedding of `init` is enlarged
    record: StartRecord | None

    @property
    def source(self) -> Checkpoint | None:
        """Return the checkpoint that shape and weights are taken from; None for new weights."""
        return self.resumed or self.init

    @property
    def step(self) -> int:
        """Return the number of optimizer steps already made; 0 unless resumed."""
        return self.resumed.step if self.resumed else 0


@dataclass(frozen=True)
class TrainPlan:
    """Everything that is known of a run before it starts. out: the run directory. shape: of the model. loader,
    val_loader: this rank's batches of the train and the val split. num_steps: optimizer steps of the whole run."""

    out: Path
    stage: Stage
    datasets: Sequence[Dataset]
    start: Start
    shape: ModelConfig
    settings: TrainSettings
    origins: dict[str, str]  # setting -> where its value came from: flag, checkpoint, preset, default or data
    objective: Objective  # the loss of dpo and its parameters; not used by other stages
    reference: Checkpoint | None  # the checkpoint named by dpo's --reference; None otherwise, or if resumed
    loader: BatchLoader
    val_loader: BatchLoader
    guard: BatchLoader | None  # the val split of the dataset of --guard
    num_steps: int

    @property
    def is_pairs(self) -> bool:
        """Return whether the stage trains on preference pairs (dpo)."""
        return self.stage.kind == "pair"

    @property
    def num_val_rows(self) -> int:
        """Return the number of rows that validations measure, over all datasets."""
        return sum(dataset.split("val").totals.rows for dataset in self.datasets)

    @property
    def data(self) -> TrainedOn:
        """Return the record of the run's data and start weights for its checkpoints."""
        dirs = [str(dataset.dir) for dataset in self.datasets]
        tokenizer_sha256 = self.datasets[0].tokenizer_sha256
        weights = None if self.loader.weights is None else list(self.loader.weights)
        return TrainedOn(self.loader.digest, dirs, weights, tokenizer_sha256, self.start.record)


def make_plan(options: TrainOptions, world: World) -> TrainPlan:
    """Open and check datasets and checkpoints, decide the settings, and return the plan. world: determines this rank's
    share of the batches. Raises UsageError, DatasetError, CheckpointError or TokenizerError, with what helps."""
    if options.stage not in STAGES:
        raise UsageError(f"stage {options.stage} is unknown", f"use one of {', '.join(STAGES)}")
    stage = STAGES[options.stage]
    trackers.check(options.trackers)
    resumed = _find_resumed(options, world)
    datasets, weights = _open_data(options, resumed)
    start = _find_start(options, stage, resumed, datasets)
    settings, origins = resolve(
        options,
        saved=resumed.state.settings if resumed else None,
        has_init=start.init is not None,
        device=world.device.type,
        share_prompt=stage.kind == "pair" and saved_share(datasets) >= SHARE_FROM,
    )
    _check_muon(options, settings, start)
    if not resumed:
        settings, origins = fit_to_data(
            settings,
            origins,
            stage=options.stage,
            tokens_per_epoch=sum(dataset.split("train").totals.model_tokens for dataset in datasets),
            vocab_size=datasets[0].vocab_size,
            least_batch_tokens=world.size * (2 if stage.kind == "pair" else 1) * datasets[0].max_len,
        )
    objective = Objective(**{field.name: getattr(settings, field.name) for field in fields(Objective)})
    reference = None
    if stage.kind == "pair":
        preference.check(objective)
        if objective.reference not in ("start", "none") and not resumed:  # for a resumed run, run.json has it
            reference = checkpoint.find(Path(objective.reference))
    for source in (None if start.growth else start.source, reference):
        if source:
            _check_fits(source, datasets)
    shape = _shape(start, settings, datasets)
    loader = _loader(datasets, "train", settings, world, weights)
    val_loader = _loader(datasets, "val", settings, world)
    _check_loaders(options, settings, resumed, loader, val_loader)
    num_steps = settings.steps or max(1, math.ceil((settings.epochs or 1) * loader.steps_per_epoch))
    if num_steps < start.step:
        raise UsageError(f"{options.out} has made {start.step:,} steps, more than {num_steps:,}", "give more --steps")
    guard = _guard_loader(settings, datasets, world)
    return TrainPlan(
        options.out,
        stage,
        datasets,
        start,
        shape,
        settings,
        origins,
        objective,
        reference,
        loader,
        val_loader,
        guard,
        num_steps,
    )


def _check_muon(options: TrainOptions, settings: TrainSettings, start: Start) -> None:
    """Raise UsageError for sft by muon of weights that another optimizer has trained."""
    is_muon = start.init and start.init.state.settings.get("optimizer") == "muon"
    if start.init and options.stage == "sft" and settings.optimizer == "muon" and not is_muon:
        raise UsageError(
            f"{start.init.dir} was not trained by muon, and --optimizer muon is for sft of weights that were",
            "leave --optimizer out",
        )


def with_micro_tokens(plan: TrainPlan, micro_tokens: int, world: World) -> TrainPlan:
    """Return the plan with another number of tokens per micro-batch. The samples of each step stay the same."""
    settings = replace(plan.settings, micro_tokens=micro_tokens)
    loader = _loader(plan.datasets, "train", settings, world, plan.loader.weights)
    val_loader = _loader(plan.datasets, "val", settings, world)
    return replace(plan, settings=settings, loader=loader, val_loader=val_loader)


# --- data


def _open_data(options: TrainOptions, resumed: Checkpoint | None) -> tuple[list[Dataset], Sequence[float] | None]:
    """Open the datasets; return them and their weights (shares of the tokens; None: every sample once per epoch). A
    resumed run uses those of its checkpoint unless --data is given. Raises UsageError if there is none, DatasetError if
    one is unreadable or has rows of another kind than the stage trains on."""
    paths, weights = options.data, options.weights
    if resumed and not paths:
        paths, weights = tuple(map(Path, resumed.state.data.dirs)), resumed.state.data.weights or None
    if not paths:
        raise UsageError("no dataset given", f"mm train {options.stage} --data shards/NAME")
    datasets = [open_dataset(path) for path in paths]
    for dataset in datasets:
        if dataset.kind != STAGE_KINDS[options.stage]:
            raise DatasetError(
                f"{dataset.dir} holds {dataset.kind} rows; {options.stage} trains on {STAGE_KINDS[options.stage]} rows",
                f"mm train {stage_of(dataset.kind)} --data {dataset.dir}",
            )
    return datasets, weights


def _loader(
    datasets: Sequence[Dataset],
    split: str,
    settings: TrainSettings,
    world: World,
    weights: Sequence[float] | None = None,
) -> BatchLoader:
    """Return the loader of this rank's batches of `split`, "train" or "val"; on CUDA its arrays are in page-locked
    memory. weights: the share of the tokens that each dataset provides; None takes every sample once per epoch."""
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


def _guard_loader(settings: TrainSettings, datasets: Sequence[Dataset], world: World) -> BatchLoader | None:
    """Return the loader of the val split of --guard, None without. Raises DatasetError if the dataset has pairs,
    another tokenizer than the run's data, or no val split."""
    if not settings.guard:
        return None
    dataset = open_dataset(Path(settings.guard))
    fix = "name a dataset of documents or conversations, packed with this tokenizer and a --val-fraction"
    if dataset.kind == "pair":
        raise DatasetError(f"--guard {settings.guard} holds pairs", fix)
    if dataset.tokenizer_sha256 != datasets[0].tokenizer_sha256:
        raise DatasetError(f"--guard {settings.guard} was packed with another tokenizer", fix)
    loader = _loader([dataset], "val", settings, world)
    if not loader.num_samples:
        raise DatasetError(f"--guard {settings.guard} has no val split", fix)
    return loader


def _check_loaders(
    options: TrainOptions,
    settings: TrainSettings,
    resumed: Checkpoint | None,
    loader: BatchLoader,
    val_loader: BatchLoader,
) -> None:
    """Raise DatasetError if the train split is empty; UsageError if --patience is given but no validation takes place;
    CheckpointError if a resumed run has other data or dataset weights than before, unless --other-data is given."""
    dirs = [share.dataset.dir for share in loader.shares]
    if not loader.num_samples:
        raise DatasetError(f"{dirs[0]}: the train split is empty", "pack more rows, or a smaller --val-fraction")
    if settings.patience and not (settings.val_every and val_loader.num_samples):
        raise UsageError(
            f"--patience {settings.patience} counts validations, and this run has none before its end",
            "give --val-every, and data packed with a val split; or leave --patience out",
        )
    if resumed and not options.other_data and resumed.state.data.digest != loader.digest:
        before = resumed.state.data
        weights = before.weights or [""] * len(before.dirs)
        same = [f"{path}:{weight}" if weight else path for path, weight in zip(before.dirs, weights, strict=True)]
        raise CheckpointError(
            f"{resumed.run_dir} was trained on dataset {before.digest[:12]}, "
            f"{', '.join(map(str, dirs))} is {loader.digest[:12]}",
            f"resume with the same data (--data {' --data '.join(same)}), with --other-data, or start a new --out",
        )


# --- start


def check_free(out: Path) -> None:
    """Raise UsageError if the directory of a new run already holds one."""
    if (out / RUN).exists():
        raise UsageError(f"{out} already holds a run", "add --resume to go on, or choose another --out")


def _find_resumed(options: TrainOptions, world: World) -> Checkpoint | None:
    """Return the newest undamaged checkpoint of the run --out if it is to be resumed; None for a new run, and for a run
    without any checkpoint. Raises UsageError if --out is a run and --resume is missing, or --init is given too;
    CheckpointError if --out is not a run, of another stage, or has only damaged checkpoints."""
    if not (options.out / RUN).exists():
        if options.resume:
            runs = sorted(str(path.parent) for path in options.out.parent.glob(f"*/{RUN}"))
            there = f"there is {', '.join(runs)}" if runs else f"there is none under {options.out.parent}/"
            is_one_machine = ranks_here(world) == world.size
            shared = "all machines need the run's directory, under the same path"
            fix = f"{there}; {'leave --resume out to start one' if is_one_machine else shared}"
            raise CheckpointError(f"{options.out}: no such run", fix)
        return None
    if not options.resume:
        check_free(options.out)
    if options.init is not None:
        raise UsageError("--init starts a run, --resume goes on with one", "leave one of them out")
    if not any(options.out.glob("checkpoints/step-*")):
        return None
    resumed = checkpoint.find(options.out)
    stage = resumed.state.settings["stage"]
    if stage != options.stage:
        raise CheckpointError(f"{options.out} is a {stage} run", f"mm train {stage} --out {options.out} --resume")
    return resumed


def _find_start(options: TrainOptions, stage: Stage, resumed: Checkpoint | None, datasets: Sequence[Dataset]) -> Start:
    """Return the weights to start from: the resumed checkpoint, that of --init, unless a new model is described the
    newest finished run under `runs_dir` of a stage in `stage.starts_from`, or else new weights. Raises UsageError if
    --init is given with an option for a new model."""
    init = None
    if options.init is not None:
        if flags := options.new_model_flags:
            problem = f"{flags[0]} is for new weights; with --init the checkpoint gives the shape"
            raise UsageError(problem, f"leave --init or {', '.join(flags)} out")
        init = checkpoint.find(options.init)
    elif not options.new_model_flags and not resumed:
        run = checkpoint.find_run(options.runs_dir, stage.starts_from)
        init = checkpoint.find(run) if run else None
    growth = _growth(options, init, datasets)
    if resumed:
        return Start(resumed, None, growth, resumed.state.data.init)
    record = StartRecord(str(init.dir), init.weights_sha256) if init else None
    if record and growth:
        record.resize_embeddings, record.added_ids = growth.method, growth.added_ids
    return Start(None, init, growth, record)


def _growth(options: TrainOptions, init: Checkpoint | None, datasets: Sequence[Dataset]) -> Growth | None:
    """Return how --resize-embeddings enlarges the embedding of `init` for the datasets' tokenizer. Raises UsageError
    without `init`, TokenizerError if the datasets' tokenizers differ or an old id means another token in the new
    one."""
    if options.resize_embeddings is None:
        return None
    if init is None:
        raise UsageError(
            "--resize-embeddings grows the embedding of an earlier run, and this run starts from none",
            "name one with --init; a resumed run has grown already, and new weights take the tokenizer's size",
        )
    for dataset in datasets[1:]:
        if dataset.tokenizer_sha256 != datasets[0].tokenizer_sha256:
            raise TokenizerError(
                f"{dataset.dir} was packed with another tokenizer than {datasets[0].dir}", "pack both with the same one"
            )
    old, new = (Tokenizer.load(directory / "tokenizer") for directory in (init.run_dir, datasets[0].dir))
    return plan_growth(options.resize_embeddings, old, new, init.model_config.vocab_size)


def _check_fits(source: Checkpoint, datasets: Sequence[Dataset]) -> None:
    """Raise CheckpointError if a dataset has another tokenizer than `source`, or token ids beyond its embedding."""
    for dataset in datasets:
        pack_again = f"mm pack FILE --tokenizer {source.run_dir / 'tokenizer'} --out {dataset.dir}"
        if dataset.tokenizer_sha256 != source.state.data.tokenizer_sha256:
            raise CheckpointError(
                f"{dataset.dir} was packed with another tokenizer than {source.run_dir} was trained with",
                f"--resize-embeddings mean if it only has more tokens; else {pack_again}",
            )
        if dataset.vocab_size > source.model_config.vocab_size:
            raise CheckpointError(
                f"{dataset.dir} has {dataset.vocab_size:,} ids, the model of {source.run_dir} only "
                f"{source.model_config.vocab_size:,}",
                pack_again,
            )


def _shape(start: Start, settings: TrainSettings, datasets: Sequence[Dataset]) -> ModelConfig:
    """Return the model's shape: the checkpoint's, its embedding enlarged if it grows, or that of the settings. Raises
    DatasetError if sequences are too long for the model, UsageError for an unsuitable --model."""
    if start.source:
        shape = start.source.model_config
        if shape.num_experts:
            problem = f"{start.source.run_dir} is a mixture of experts, which mm does not train"
            raise CheckpointError(problem, f"chat with it (mm chat {start.source.run_dir}), or train a dense model")
    else:
        shape = shape_from(settings, datasets[0].vocab_size)
    if start.growth:
        num_padding = max(0, start.growth.vocab_size - datasets[0].vocab_size) if shape.num_padding else 0
        shape = replace(shape, vocab_size=start.growth.vocab_size, num_padding=num_padding)
    if datasets[0].max_len > shape.max_positions:
        raise DatasetError(
            f"{datasets[0].dir} holds sequences of {datasets[0].max_len} tokens, the model takes {shape.max_positions}",
            f"pack with --max-len {shape.max_positions}, or train a new model with --max-positions {datasets[0].max_len}",
        )
    return shape


# --- what is said of a plan


def template_notes(datasets: Sequence[Dataset], tokenizer: Tokenizer) -> list[str]:
    """Return warnings about chat templates that write nothing after answers, which `mm pack` has not always refused, or
    differ; the run keeps the first dataset's (`tokenizer`)."""
    if datasets[0].kind == "document":
        return []
    notes = [
        f"warning: {dataset.dir} was packed with another chat template than {datasets[0].dir}, whose the run keeps"
        for dataset in datasets[1:]
        if dataset.manifest.tokenizer.template_sha256 != datasets[0].manifest.tokenizer.template_sha256
    ]
    if not Template(tokenizer).ends:
        token = f"mm pack --end-of-turn '{tokenizer.eos_token}'"
        notes.append(f"warning: the chat template writes nothing after answers, so the model will not stop: {token}")
    return notes


def start_lines(plan: TrainPlan, model: Model, world: World, runs_dir: Path) -> Iterator[str]:
    """Yield the console lines at the start: where the weights come from, sizes of model and data, and warnings.
    runs_dir: searched for an interrupted run that could have been the start."""
    loader, source, growth = plan.loader, plan.start.source, plan.start.growth
    begin = (
        f"from {source.run_dir} (step {source.step})"
        if source
        else f"from new weights ({plan.settings.model or plan.shape.text})"
    )
    ranks = f" on {world.size} ranks" if world.size > 1 else ""
    rows = sum(dataset.split("train").totals.rows for dataset in plan.datasets)
    yield f"{plan.stage.name} {begin}: {plan.shape.num_params:,} parameters, {world.device.type}{ranks}"
    name = f"{plan.datasets[0].dir}: " if len(plan.datasets) == 1 else ""
    yield (
        f"{name}{rows:,} rows, {loader.tokens_per_epoch:,} tokens and {loader.steps_per_epoch:,} steps an epoch; "
        f"{plan.num_steps:,} steps"
    )
    if growth:
        yield f"the embedding has {growth.vocab_size:,} rows: ids {growth.added_ids} are new, by {growth.method}"
    if loader.weights or len(loader.shares) > 1:
        for share in loader.shares:
            yield (
                f"{share.dataset.dir}: {100 * share.tokens:.1f}% of the tokens; an epoch takes each of its samples "
                f"{share.passes:.2f} times"
            )
    if source is None and plan.stage.starts_from:
        yield (
            f"warning: {plan.stage.name} teaches a model that can already write; new weights are good for a trial only. "
            f"Train `mm train pretrain`{', then `mm train sft`' if plan.is_pairs else ''} first, or name a run with --init"
        )
        if unfinished := checkpoint.find_run(runs_dir, plan.stage.starts_from, "interrupted"):
            stage = checkpoint.read_run(unfinished).stage
            yield (
                f"{unfinished} was interrupted: `mm train {stage} --out {unfinished} --resume` finishes it, and "
                f"`--init {unfinished}` takes it as it is"
            )
    yield from sizing.lines(
        plan.settings,
        plan.origins,
        tokens_per_epoch=loader.tokens_per_epoch,
        num_steps=plan.num_steps,
        new=plan.shape if source is None and plan.stage.name == "pretrain" else None,
    )
    if plan.settings.lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield f"adapters of rank {plan.settings.lora}: {trained:,} parameters are trained, the others stay"
    if plan.start.resumed:
        for damaged in checkpoint.newer_than(plan.start.resumed):
            yield f"{damaged} is damaged: going on from step {plan.start.step} instead"
    if not plan.val_loader.num_samples:
        yield "the val split is empty: no held-out figures"
