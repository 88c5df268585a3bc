"""Start a planned run: its directory, model, optimizer, log and run.json, and a few lines on what is about to happen."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from mmdata.io.records import write_record
from mmdata.shards.loader import MicroBatch
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint, distributed
from mmtrain.config import TrainOptions
from mmtrain.distributed import World
from mmtrain.log import metrics, trackers
from mmtrain.log.reporter import Reporter
from mmtrain.model import embeddings, lora
from mmtrain.model.model import Model
from mmtrain.model.precision import LossScale, autocast, autocast_dtype
from mmtrain.records import (
    RUN,
    BestRecord,
    DataRecord,
    ResumeRecord,
    RunRecord,
    SettingRecord,
    StartRecord,
    read_run,
)
from mmtrain.train import optim, preflight
from mmtrain.train.ema import Average
from mmtrain.train.plan import TrainPlan, make_plan, with_micro_tokens

STOP_FILE = "STOP"  # in the run directory: ends the run as SIGTERM does, and is removed when the run starts
PACKAGES = ("mm-toolkit", "torch", "numpy", "pyarrow", "tokenizers")  # their versions stand in run.json


class InFlight:
    """A step that the device works on, and its figures on their way to the host.

    `values` float64: loss, count, tokens, trained tokens, the stage's figures, requests to stop, gradient norm, whether the
    step was taken, and its loss scale.
    """

    def __init__(self, step: int, lr: float, begun: float, values: Tensor):
        self.step, self.lr, self.begun = step, lr, begun
        self._values = values.to("cpu", non_blocking=True)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def figures(self) -> list[float]:
        """The values; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


@dataclass
class ActiveRun:
    """The state of a run in progress."""

    plan: TrainPlan
    world: World
    model: Model
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    gradient: Tensor  # flat, see optim.flat_gradient
    scale: LossScale
    average: Average | None  # with --ema
    log: metrics.MetricsLog
    trackers: trackers.Trackers | None  # of the first rank, as reporter
    reporter: Reporter | None
    writer: checkpoint.Writer
    record: RunRecord
    val_losses: list[float]
    best: BestRecord | None
    ref: dict[str, Tensor] = field(default_factory=dict)  # the reference's logps by split
    batches: Iterator[list[MicroBatch]] = field(default_factory=lambda: iter(()))  # of the steps to come
    in_flight: list[InFlight] = field(default_factory=list)
    is_stopping: bool = False
    most_tokens: int | None = None  # of a micro-batch, once memory has run out
    largest_micro: int = 0  # tokens
    loss: float | None = None
    num_tokens: int = 0
    num_trained: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    last_read: float = 0.0
    last_saved: int = -1
    val: dict[str, float] = field(default_factory=dict)

    @property
    def lag(self) -> int:
        """Steps whose figures may still be on their way: one on CUDA, so that the device never waits for the host."""
        return 1 if self.world.device.type == "cuda" else 0

    def event(self, step: int, event: str, note: str = "") -> None:
        """Record an event for the report, on the first rank."""
        if self.reporter:
            self.reporter.event(step, event, note)

    def write_record(self, status: str | None = None) -> None:
        """Update run.json on the first rank, with a new status where one is given; `ended` is set unless it is running."""
        if not self.world.is_first:
            return
        self.record.status = status or self.record.status
        if self.trackers and self.record.trackers:
            self.record.trackers |= self.trackers.failed
        if self.record.status != "running":
            self.record.ended = time.time()
        write_record(self.plan.out / RUN, self.record, indent=2)


def start(plan: TrainPlan, options: TrainOptions, world: World, say: Callable[[str], None] | None) -> ActiveRun:
    """Make the run directory, the model and its optimizer, and print what is about to happen."""
    torch.set_float32_matmul_precision("high")  # TF32 on cards that have it; the CPU computes in fp32
    tokenizer = Tokenizer.load(plan.datasets[0].dir / "tokenizer")
    plan, model, needs, notes = _build(plan, options, world)
    out, settings, resumed = plan.out, plan.settings, plan.start.resumed
    if world.is_first:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out / "tokenizer")
        (out / STOP_FILE).unlink(missing_ok=True)
    world.wait()
    if plan.is_pairs and (plan.start.record is None or plan.start.growth):
        plan = _with_digest(plan, model)
    if settings.lora:
        _adapt(plan, world, model)
    optimizer = optim.make(
        model, settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay, beta2=settings.beta2
    )
    scale = LossScale(autocast_dtype(world.device), world.device)
    extra = checkpoint.restore(resumed, model, optimizer) if resumed else {}
    scale.restore(extra)
    average = Average(model, settings.ema) if settings.ema else None
    if average and resumed:
        average.resume({name: value for name, value in extra.items() if name not in scale.tensors()})
    record = _resumed_record(plan, world) if resumed else _new_record(plan, world, model, options.report)
    record.preflight = needs.as_json()
    open_trackers = _open_trackers(plan, options, world, record, say or (lambda _: None))
    log = metrics.MetricsLog(
        out if world.is_first else None,
        num_steps=plan.num_steps,
        first_step=plan.start.step,
        log_every=options.log_every,
        say=say,
        also=open_trackers.write if open_trackers else None,
    )
    writer = checkpoint.Writer(out, keep_last=settings.keep_last, is_active=world.is_first)
    world.wait()  # metrics.jsonl now ends at the first step
    reporter = None
    if world.is_first:
        reporter = Reporter(out, first_step=plan.start.step, with_report=options.report, with_samples=options.samples)
    run = ActiveRun(
        plan,
        world,
        model,
        tokenizer,
        optimizer,
        optim.flat_gradient(model),
        scale,
        average,
        log,
        open_trackers,
        reporter,
        writer,
        record,
        val_losses=metrics.val_losses(out) if resumed else [],
        best=resumed.state.best if resumed else None,
    )
    run.write_record("running")
    for line in (*notes, *_start_lines(plan, model, world), needs.line()):
        log.say(line)
    return run


def needs_of(options: TrainOptions) -> preflight.Needs:
    """What `train(options)` would take; nothing is written. MMError as `train` would raise."""
    world = distributed.join(options.device)
    try:
        return _build(make_plan(options, world), options, world)[2]
    finally:
        distributed.leave()


# --- the model ------------------------------------------------------------------------------------------------------


def _build(plan: TrainPlan, options: TrainOptions, world: World) -> tuple[TrainPlan, Model, preflight.Needs, list[str]]:
    """The model on its device and what the run will take. Micro-batches whose size was not given are sized to fit. MMError,
    on all ranks, if the run cannot fit. Writes nothing; the notes are to be printed."""
    device, notes = world.device, []
    optim.make(torch.nn.Linear(1, 1), "adamw", lr=0.0, weight_decay=0.0)  # loads what torch loads late, 80 MB of it
    base = preflight.used_bytes(device)
    torch.manual_seed(plan.settings.seed)
    model = Model(plan.shape)
    if plan.start.init:
        growth = plan.start.growth
        checkpoint.load_weights(
            plan.start.init, model, change=partial(embeddings.grow, growth=growth) if growth else None
        )
    model.to(device)
    model.checkpoints_blocks = options.checkpoint_activations
    if device.type == "cuda" and options.compile:
        notes = compile_blocks(model)
    needs = preflight.measure(plan, model, base_bytes=base, world=world)
    if plan.origins["micro_tokens"] == "default":
        micro_tokens = preflight.fitting(plan, needs, model)
        if micro_tokens != plan.settings.micro_tokens:
            plan = with_micro_tokens(plan, micro_tokens, world)
            needs = preflight.measure(plan, model, base_bytes=base, world=world)
    world.agree_on(lambda: preflight.check(needs, device))
    return plan, model, needs, notes


def compile_blocks(model: Model) -> list[str]:
    """Compile block by block: all share one graph. If that fails the blocks run uncompiled; returns a line with the reason."""
    for block in model.model.layers:
        block.compile()
    ids = torch.zeros(64, dtype=torch.int64, device=model.head_weight.device)
    ends = torch.tensor([0, 64], dtype=torch.int32, device=ids.device)
    try:
        with autocast(ids.device):
            model(ids, torch.arange(64, device=ids.device), ends, 64).sum().backward()
    except Exception as error:  # whatever keeps the compiler from working: a missing gcc, an old card, its own errors
        for block in model.model.layers:
            block._compiled_call_impl = None
        return [f"not compiled, slower: {str(error).strip().splitlines()[0][:160]} (--no-compile leaves it out)"]
    finally:
        model.zero_grad(set_to_none=True)
    return []


def _with_digest(plan: TrainPlan, model: Model) -> TrainPlan:
    """The plan with the hash of start weights that are in no file, new or grown ones, which the reference's cache needs."""
    sha256 = checkpoint.weights_digest(model)
    before = plan.start.record
    record = StartRecord("", sha256)
    if before:
        record = StartRecord(before.dir, sha256, before.resize_embeddings, before.added_ids)
    return replace(plan, start=replace(plan.start, record=record))


def _adapt(plan: TrainPlan, world: World, model: Model) -> None:
    """Add adapters to the model, and keep the weights that they belong to in the run."""
    if plan.start.resumed:
        checkpoint.load_base(plan.out, model)
    elif world.is_first:
        checkpoint.save_base(plan.out, model, plan.start.init)
    lora.adapt(model, plan.settings.lora)
    model.to(world.device)


# --- run.json and trackers ------------------------------------------------------------------------------------------


def _resumed_record(plan: TrainPlan, world: World) -> RunRecord:
    """run.json of a run that is resumed: as before, and when it was resumed."""
    record = read_run(plan.out)
    again = ResumeRecord(plan.start.step, time.time(), world.size, str(world.device))
    record.resumed = [*(record.resumed or []), again]
    return record


def _new_record(plan: TrainPlan, world: World, model: Model, with_speed: bool) -> RunRecord:
    """run.json of a new run; `with_speed` measures the device, which the report compares the run's speed with."""
    record = RunRecord(
        stage=plan.stage.name,
        status="running",
        started=time.time(),
        settings={name: SettingRecord(v, plan.origins[name]) for name, v in asdict(plan.settings).items()},
        model=plan.shape,
        num_params=sum(p.numel() for p in model.parameters()),
        num_steps=plan.num_steps,
        init=plan.start.record,
        data_digest=plan.loader.digest,
        data=[
            DataRecord(
                dir=str(share.dataset.dir),
                kind=share.dataset.kind,
                digest=share.dataset.digest,
                share=share.tokens,
            )
            for share in plan.loader.shares
        ],
        tokenizer_sha256=plan.datasets[0].tokenizer_sha256,
        device=str(world.device),
        precision=str(autocast_dtype(world.device)).removeprefix("torch."),
        world_size=world.size,
        versions={name: _version(name) for name in PACKAGES},
    )
    if with_speed and world.is_first:
        is_cuda = world.device.type == "cuda"
        record.device_name = torch.cuda.get_device_name(world.device) if is_cuda else "CPU"
        record.matmul_flops = preflight.matmul_flops(world.device, autocast_dtype(world.device))
        record.fill = _padded_fill(plan)
    return record


def _padded_fill(plan: TrainPlan) -> float:
    """Share of the positions that would hold tokens if every sample were padded to its bucket."""
    shards = [shard for dataset in plan.datasets for shard in dataset.manifest.shards if shard.split == "train"]
    positions = sum((2 if plan.is_pairs else 1) * shard.samples * shard.bucket for shard in shards)
    return sum(shard.model_tokens for shard in shards) / max(1, positions)


def _version(package: str) -> str:
    """The installed version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _open_trackers(
    plan: TrainPlan, options: TrainOptions, world: World, record: RunRecord, say: Callable[[str], None]
) -> trackers.Trackers | None:
    """Open the trackers asked for, or those that the run had, on the first rank; None if there are none."""
    names = options.trackers or tuple(record.trackers or ())
    record.trackers = dict.fromkeys(names, "open")
    opened: list[trackers.Trackers] = []

    def open_all() -> None:
        trackers.check(names)  # those of a resumed run too
        identity = hashlib.sha256(f"{record.started} {plan.out.name}".encode()).hexdigest()[:8]
        settings = {"stage": plan.stage.name, "num_params": record.num_params} | asdict(plan.settings)
        tracked = trackers.TrackedRun(plan.out, identity, plan.start.step, settings)
        opened.append(trackers.Trackers(names, tracked, say))

    world.agree_on(open_all if names and world.is_first else lambda: None)
    return opened[0] if opened else None


def _start_lines(plan: TrainPlan, model: Model, world: World) -> Iterator[str]:
    """What is about to happen, for the console: start, size, data, and warnings."""
    loader, source, growth = plan.loader, plan.start.source, plan.start.growth
    begin = f"from {source.run_dir} (step {source.step})" if source else f"from new weights ({plan.settings.model})"
    ranks = f" on {world.size} ranks" if world.size > 1 else ""
    yield (
        f"{plan.stage.name} {begin}: {plan.shape.num_params:,} parameters, {loader.num_samples:,} samples and "
        f"{loader.tokens_per_epoch:,} tokens an epoch, {plan.num_steps:,} steps, {world.device.type}{ranks}"
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
    if plan.settings.lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield f"adapters of rank {plan.settings.lora}: {trained:,} parameters are trained, the others stay"
    if plan.start.resumed:
        for damaged in checkpoint.newer_than(plan.start.resumed):
            yield f"{damaged} is damaged: going on from step {plan.start.step} instead"
    if not plan.val_loader.num_samples:
        yield "the val split is empty: no held-out figures"
