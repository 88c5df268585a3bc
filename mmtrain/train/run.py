"""Start a planned run: make its directory, model, optimizer, log and run.json, and print a few lines about the run."""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from msgspec import UnsetType
from torch import Tensor

from mmdata.io.files import alone, write_bytes
from mmdata.io.records import write_record
from mmdata.shards.loader import MicroBatch
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint, distributed
from mmtrain.config import TrainOptions
from mmtrain.distributed import World
from mmtrain.log import metrics, trackers
from mmtrain.log.console import Console, print_line
from mmtrain.log.reporter import Reporter, prompts_of
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
from mmtrain.train import optim, preflight, reference
from mmtrain.train.ema import Average
from mmtrain.train.plan import TrainPlan, check_free, make_plan, start_lines, template_notes, with_micro_tokens

STOP_FILE = "STOP"  # a file of this name in the run directory ends the run as SIGTERM does; removed at the start
PACKAGES = ("mm-toolkit", "torch", "numpy", "pyarrow", "tokenizers")  # packages whose versions are recorded in run.json


def facts_of(plan: TrainPlan) -> dict[str, object]:
    """Return what must be equal on all ranks before a run starts, without paths, which may differ between nodes."""
    code = hashlib.sha256(torch.__version__.encode())
    for package in ("mmdata", "mmtrain"):
        for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            code.update(path.read_bytes())
    loaders = (plan.loader, plan.val_loader, plan.guard)
    sources = [source.state.files for source in (plan.start.source, plan.reference) if source]
    reference = plan.settings.reference if plan.settings.reference in ("start", "none") else "a path"
    settings = asdict(replace(plan.settings, guard="", reference=reference))
    return {
        "data": [loader.digest for loader in loaders if loader],
        "step": plan.start.step,
        "weights": [sorted((name, file.sha256) for name, file in files.items()) for files in sources],
        "settings": {
            "stage": plan.stage.name,
            **settings,
            "steps in all": plan.num_steps,
            **{f"shape {name}": value for name, value in asdict(plan.shape).items()},
        },
        "code": code.hexdigest(),
    }


class InFlight:
    """An optimizer step that the device may still be computing; its numbers are copied to the host in the background.
    step: counted from 0. begun: by time.monotonic(). values: float64 vector of loss, count (trained tokens or pairs),
    tokens, trained tokens, the stage's figures, ranks asked to stop, gradient norm, 1 if the step was taken (else 0),
    and loss scale. Loss and figures are sums over all ranks."""

    def __init__(self, step: int, lr: float, begun: float, values: Tensor):
        self.step, self.lr, self.begun = step, lr, begun
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def figures(self) -> list[float]:
        """Wait until the values have arrived on the host, and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


@dataclass
class ActiveRun:
    """The state of a run in progress. Counts are of this call of `train`.

    since_best: validations since the best, as --patience counts. loss: mean loss of the last step read. val: metrics of
    the last validation. num_tokens, num_trained: of all ranks. num_skipped: steps skipped as not finite. last_read: the
    time.monotonic() from which the duration of the next step is measured. last_saved: step of the last checkpoint, -1
    before the first.
    """

    plan: TrainPlan
    world: World
    model: Model
    tokenizer: Tokenizer
    optimizer: torch.optim.Optimizer
    gradient: Tensor  # one vector with the gradients of all trainable parameters
    gradient_sum: distributed.GradientSum  # over all ranks
    scale: LossScale
    average: Average | None  # None without --ema
    log: metrics.MetricsLog
    trackers: trackers.Trackers | None  # None if no tracker is used, and on all ranks but the first
    reporter: Reporter | None  # None on all ranks but the first
    writer: checkpoint.Writer
    record: RunRecord
    since_best: int
    best: BestRecord | None
    needs: preflight.Needs
    ref: dict[str, Tensor] = field(default_factory=dict)  # the reference model's logps by split, float64 [N, 2]
    batches: Iterator[list[MicroBatch]] = field(default_factory=lambda: iter(()))  # this rank's, for each step
    in_flight: list[InFlight] = field(default_factory=list)  # steps whose numbers have not been read yet
    step: int = 0  # that is being made, counted from 0
    is_stopping: bool = False
    most_tokens: int | None = None  # largest micro-batch after memory has run out; None before
    largest_micro: int = 0  # tokens of the largest micro-batch so far
    loss: float | None = None
    num_tokens: int = 0
    num_trained: int = 0
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    last_read: float = 0.0
    last_saved: int = -1
    val: dict[str, float] = field(default_factory=dict)

    @property
    def console(self) -> Console:
        """Return the output of this rank."""
        return self.log.console

    @property
    def lag(self) -> int:
        """Return how many newest steps are not read yet: 1 on CUDA, so that the device never waits; 0 on the CPU."""
        return 1 if self.world.device.type == "cuda" else 0

    def event(self, step: int, event: str, note: str = "") -> None:
        """Record an event of `step`, such as "save", for the report, on the first rank only."""
        if self.reporter:
            self.reporter.event(step, event, note)

    def write_record(self, status: str | None = None) -> None:
        """Write run.json on the first rank, with a new `status` if given: running, finished, interrupted or failed. The
        end time is set unless it is running."""
        if not self.world.is_first:
            return
        self.record.status = status or self.record.status
        if self.trackers and self.record.trackers:
            self.record.trackers |= self.trackers.failed
        if self.record.status != "running":
            self.record.ended = time.time()
        write_record(self.plan.out / RUN, self.record, indent=2)


def console_of(options: TrainOptions, world: World, log: Callable[[str], None]) -> Console:
    """Return the console of this rank. log: prints a line, on the first rank only and not with `options.quiet`."""
    is_live = log is print_line and sys.stderr.isatty()
    return Console(log if world.is_first and not options.quiet else None, is_live=is_live)


def start(plan: TrainPlan, options: TrainOptions, world: World, console: Console, held: ExitStack) -> ActiveRun:
    """Make the run directory, model and optimizer of a planned run, restore them if it is resumed, write run.json, and
    print what is about to happen. Return the state of the run. Every rank calls this. held: keeps the directory's lock
    on the first rank. Raises an MMError if the run cannot fit in memory or on the disk, a checkpoint does not fit the
    model, or another process trains the run."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; fp32 on the CPU
    tokenizer = Tokenizer.load(plan.datasets[0].dir / "tokenizer")
    plan, model, needs, notes = _build(plan, options, world, console)
    out, settings, resumed = plan.out, plan.settings, plan.start.resumed
    world.agree_on(lambda: _make_directory(plan, options, tokenizer, held) if world.is_first else None)
    notes += _unseen_notes(out, world)
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
    if world.size > 1:
        world.agree_same({"weights": checkpoint.weights_digest(model)})
    record = _resumed_record(plan, world) if resumed else _new_record(plan, world, model, options.report)
    record.preflight = needs.as_json()
    gradient = optim.flat_gradient(model)
    writer = checkpoint.Writer(out, keep_last=settings.keep_last, is_active=world.is_first)
    run = ActiveRun(
        plan,
        world,
        model,
        tokenizer,
        optimizer,
        gradient,
        distributed.GradientSum(world, gradient, [p for p in model.parameters() if p.requires_grad]),
        scale,
        average,
        *_open_logs(plan, options, world, record, console, tokenizer),
        writer,
        record,
        since_best=_since_best(resumed) if resumed else 0,
        best=resumed.state.best if resumed else None,
        needs=needs,
    )
    run.write_record("running")
    notes += template_notes(plan.datasets, tokenizer)
    for line in (*notes, *start_lines(plan, model, world, options.runs_dir), *needs.lines()):
        console.say(line)
    return run


def _make_directory(plan: TrainPlan, options: TrainOptions, tokenizer: Tokenizer, held: ExitStack) -> None:
    """Make and lock the run directory, with its tokenizer and without a stop request. Raises UsageError if another
    process trains the run, or began it after this one was planned."""
    held.enter_context(alone(plan.out, "mm train"))
    if not options.resume:
        check_free(plan.out)
    tokenizer.save(plan.out / "tokenizer")
    (plan.out / STOP_FILE).unlink(missing_ok=True)


def _unseen_notes(out: Path, world: World) -> list[str]:
    """Return a note if ranks on other nodes do not see the directory of the run that the first rank has made. Every rank
    must call this."""
    if distributed.ranks_here(world) == world.size:
        return []
    mark = f".{out.name}.rank-0-"
    number = int.from_bytes(os.urandom(7)) if world.is_first else 0
    if world.is_first:
        write_bytes(out.parent / f"{mark}{number}", b"")
    (number,) = world.gather(number)[0]
    seen = world.gather((out.parent / f"{mark}{number}").exists())
    if world.is_first:
        (out.parent / f"{mark}{number}").unlink()
    unseen = ", ".join(f"rank {rank}" for rank, (is_seen,) in enumerate(seen) if not is_seen)
    what = f"{out}, which rank 0 writes, is not on the machine of {unseen}"
    return [f"note: {what}: to resume the run it must be there too, under the same path"] if unseen else []


def _since_best(resumed: checkpoint.Checkpoint) -> int:
    """Return how many validations a run has made after the best one."""
    best = resumed.state.best
    if best is None or isinstance(best.since, UnsetType):  # none was finite, or an older version's state
        return metrics.num_since_best(metrics.val_losses(resumed.dir.parents[1]))
    return best.since


def _open_logs(
    plan: TrainPlan, options: TrainOptions, world: World, record: RunRecord, console: Console, tokenizer: Tokenizer
) -> tuple[metrics.MetricsLog, trackers.Trackers | None, Reporter | None]:
    """Open metrics.jsonl, the trackers and, on the first rank, the reporter."""
    open_trackers = _open_trackers(plan, options, world, record, console.say)
    log = metrics.MetricsLog(
        plan.out if world.is_first else None,
        num_steps=plan.num_steps,
        first_step=plan.start.step,
        log_every=options.log_every,
        console=console,
        also=open_trackers.write if open_trackers else None,
    )
    world.wait()  # until the first rank has cut metrics.jsonl at the step that the run starts from
    reporter = None
    if world.is_first:
        prompts = prompts_of(plan.datasets, tokenizer, plan.stage.name) if options.samples else []
        reporter = Reporter(plan.out, first_step=plan.start.step, with_report=options.report, prompts=prompts)
    return log, open_trackers, reporter


def needs_of(options: TrainOptions, log: Callable[[str], None] = print_line) -> preflight.Needs:
    """Return the memory, time and disk space that `train(options)` would need, without writing anything. Raises the
    MMErrors that `train` would raise before its first step."""
    world = distributed.join(options.device)
    try:
        return _build(make_plan(options, world), options, world, console_of(options, world, log))[2]
    finally:
        distributed.leave()


# --- the model


def _build(
    plan: TrainPlan, options: TrainOptions, world: World, console: Console
) -> tuple[TrainPlan, Model, preflight.Needs, list[str]]:
    """Build the model on its device and forecast what the run will need. Return plan, model, forecast, console lines.
    Writes nothing. Unless the user, a preset or a checkpoint chose the tokens per micro-batch, the plan gets a number
    that fits in memory. Raises TrainError or DiskError, and ends all ranks, if the run cannot fit."""
    device, notes = world.device, []
    # The first optimizer makes torch load 80 MB of code. It is loaded now, so that `base` includes it.
    optim.make(torch.nn.Linear(1, 1), "adamw", lr=0.0, weight_decay=0.0)
    base = preflight.used_bytes(device)
    torch.manual_seed(plan.settings.seed)
    model = Model(plan.shape)
    if plan.start.init:
        growth = plan.start.growth
        with console.phase(f"load {plan.start.init.dir}"):
            checkpoint.load_weights(
                plan.start.init, model, change=partial(embeddings.grow, growth=growth) if growth else None
            )
    model.to(device)
    model.checkpoints_blocks = options.checkpoint_activations
    if device.type == "cuda" and options.compile:
        with console.phase("compile the model"):
            notes = compile_blocks(model)
    pending = reference.num_pending_tokens(plan, world) if plan.is_pairs else 0
    with console.phase("measure speed and memory", seconds=preflight.PROBE_S):
        probed = preflight.probe(plan, model)
    needs = preflight.measure(plan, model, probed, base_bytes=base, world=world, reference_tokens=pending)
    if plan.origins["micro_tokens"] == "default":
        micro_tokens = preflight.fitting(plan, needs, model)
        if micro_tokens != plan.settings.micro_tokens:
            plan = with_micro_tokens(plan, micro_tokens, world)
            needs = preflight.measure(plan, model, probed, base_bytes=base, world=world, reference_tokens=pending)
    world.agree_on(lambda: preflight.check(needs, device))
    return plan, model, needs, notes


def compile_blocks(model: Model) -> list[str]:
    """Compile the transformer blocks on CUDA one by one; being alike, they share one compiled graph. Returns an empty
    list, or a line with the reason if compiling fails; the blocks then run uncompiled."""
    for block in model.model.layers:
        block.compile()
    ids = torch.zeros(64, dtype=torch.int64, device=model.head_weight.device)
    ends = torch.tensor([0, 64], dtype=torch.int32, device=ids.device)
    try:
        with autocast(ids.device):
            model(ids, torch.arange(64, device=ids.device), ends, 64).sum().backward()
    except Exception as error:  # any failure of the compiler, such as a missing gcc, an old GPU or a bug
        for block in model.model.layers:
            block._compiled_call_impl = None
        return [f"not compiled, slower: {str(error).strip().splitlines()[0][:160]} (--no-compile leaves it out)"]
    finally:
        model.zero_grad(set_to_none=True)
    return []


def _with_digest(plan: TrainPlan, model: Model) -> TrainPlan:
    """Return the plan with the hash of `model`'s start weights, which identifies the reference logps in their cache.
    Needed for weights that are in no file: new ones, or loaded ones whose embedding was enlarged."""
    sha256 = checkpoint.weights_digest(model)
    before = plan.start.record
    record = StartRecord("", sha256)
    if before:
        record = StartRecord(before.dir, sha256, before.resize_embeddings, before.added_ids)
    return replace(plan, start=replace(plan.start, record=record))


def _adapt(plan: TrainPlan, world: World, model: Model) -> None:
    """Add LoRA adapters to the model. A new run first writes the model's weights to RUN/base.safetensors, on the first
    rank; a resumed run loads them from it."""
    if plan.start.resumed:
        checkpoint.load_base(plan.out, model)
    elif world.is_first:
        checkpoint.save_base(plan.out, model, plan.start.init)
    lora.adapt(model, plan.settings.lora)
    model.to(world.device)


# --- run.json and trackers


def _resumed_record(plan: TrainPlan, world: World) -> RunRecord:
    """Return run.json of a run that is being resumed, with this resumption added."""
    record = read_run(plan.out)
    again = ResumeRecord(plan.start.step, time.time(), world.size, str(world.device))
    record.resumed = [*(record.resumed or []), again]
    record.num_steps = plan.num_steps
    for name, value in asdict(plan.settings).items():
        if plan.origins[name] == "flag":
            record.settings[name] = SettingRecord(value, "flag")
    return record


def _new_record(plan: TrainPlan, world: World, model: Model, with_speed: bool) -> RunRecord:
    """Return run.json of a new run. with_speed: also measure, on the first rank, the speed of the device's matrix
    products, which the report compares the run's speed with."""
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
        names = {"cpu": "CPU", "mps": "Apple GPU (MPS)"}
        record.device_name = names.get(world.device.type) or torch.cuda.get_device_name(world.device)
        record.matmul_flops = preflight.matmul_flops(world.device, autocast_dtype(world.device))
        record.fill = _padded_fill(plan)
        lengths = np.concatenate([np.diff(micro.cu_seqlens) for micro in plan.loader.batch(0)] or [np.ones(1)])
        record.sequence_length = float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())
    return record


def _padded_fill(plan: TrainPlan) -> float:
    """Return the share of positions that would hold tokens if every sample of the train split (for pairs, every side)
    were padded to its bucket instead of packed."""
    shards = [shard for dataset in plan.datasets for shard in dataset.shards("train")]
    positions = sum((2 if plan.is_pairs else 1) * shard.samples * shard.bucket for shard in shards)
    return sum(shard.model_tokens for shard in shards) / max(1, positions)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _open_trackers(
    plan: TrainPlan, options: TrainOptions, world: World, record: RunRecord, say: Callable[[str], None]
) -> trackers.Trackers | None:
    """Open the trackers of --log, or those that a resumed run used before, and note them in run.json (`record`), on the
    first rank. Return None without trackers and on the other ranks. say: called with console lines."""
    names = options.trackers or tuple(record.trackers or ())
    record.trackers = dict.fromkeys(names, "open")
    opened: list[trackers.Trackers] = []

    def open_all() -> None:
        trackers.check(names)  # also if they come from run.json of a resumed run
        identity = hashlib.sha256(f"{record.started} {plan.out.name}".encode()).hexdigest()[:8]
        settings = {"stage": plan.stage.name, "num_params": record.num_params} | asdict(plan.settings)
        tracked = trackers.TrackedRun(plan.out, identity, plan.start.step, settings)
        opened.append(trackers.Trackers(names, tracked, say))

    world.agree_on(open_all if names and world.is_first else lambda: None)
    return opened[0] if opened else None
