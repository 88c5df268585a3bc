"""A plan in, a run in progress out: its directory, model, optimizer and log, and a few lines on what is about to happen."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdata.shards.loader import MicroBatch
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint, distributed
from mmtrain.config import TrainOptions, as_json
from mmtrain.distributed import World
from mmtrain.log import metrics
from mmtrain.log.reporter import Reporter
from mmtrain.log.trackers import TrackedRun, Trackers
from mmtrain.log.trackers import check as check_trackers
from mmtrain.model import lora
from mmtrain.model.model import Model
from mmtrain.model.precision import LossScale, autocast, autocast_dtype
from mmtrain.train import embeddings, optim, preflight
from mmtrain.train.ema import Average
from mmtrain.train.facts import first_facts
from mmtrain.train.plan import Plan, make_plan, with_micro_tokens

STOP_FILE = "STOP"  # in the run directory: ends the run as SIGTERM does, and is removed when it starts again


class InFlight:
    """A step that has been given to the device: its figures are on their way to the host.

    `values` float64: loss, count, tokens, trained tokens, the stage's figures, wishes to stop, gradient norm, taken or not,
    the loss scale it was made with.
    """

    def __init__(self, step: int, lr: float, begun: float, values: Tensor):
        self.step, self.lr, self.begun = step, lr, begun
        self._values = values.to("cpu", non_blocking=True)
        self._event = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def figures(self) -> list[float]:
        """The values, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


@dataclass
class Run:
    """A run in progress."""

    plan: Plan
    world: World
    model: Model
    optimizer: torch.optim.Optimizer
    gradient: Tensor
    tokenizer: Tokenizer
    ref: dict[str, Tensor]
    log: metrics.MetricsLog
    facts: dict[str, Any]
    scale: LossScale
    lag: int  # steps whose figures may still be on their way: one on CUDA, which then never waits for us
    writer: checkpoint.Writer
    batches: Iterator[list[MicroBatch]] = field(default_factory=lambda: iter(()))  # of the steps to come
    average: Average | None = None
    trackers: Trackers | None = None
    val_losses: list[float] = field(default_factory=list)
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
    best: dict[str, Any] | None = None  # step and val_loss of the lowest val loss so far
    val: dict[str, float] = field(default_factory=dict)
    keeper: Reporter | None = None  # of the first rank's report and samples

    @property
    def out(self) -> Path:
        """The run directory."""
        return self.plan.config.out

    def write_facts(self, **changes: Any) -> None:
        """Bring run.json up to date; `ended` is set with every status but running."""
        if not self.world.is_first:
            return
        self.facts |= changes
        if self.trackers:
            self.facts["trackers"] |= self.trackers.failed
        if self.facts["status"] != "running":
            self.facts["ended"] = time.time()
        checkpoint.write_atomic(self.out / "run.json", json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")


def start(plan: Plan, world: World, say: Callable[[str], None] | None) -> Run:
    """Make the run directory and the model, and say what is about to happen."""
    config, settings = plan.config, plan.settings
    torch.set_float32_matmul_precision("high")  # TF32 where the card has it; the CPU computes fp32 as ever
    tokenizer = Tokenizer.load(plan.datasets[0].dir / "tokenizer")
    plan, model, needs, notes = _build(plan, world)
    if world.is_first:
        config.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(config.out / "tokenizer")
        (config.out / STOP_FILE).unlink(missing_ok=True)
    world.wait()
    settings = plan.settings
    if plan.stage.kind == "pair" and (plan.init_facts is None or plan.growth):
        facts = {**(plan.init_facts or {"dir": ""}), "weights_sha256": checkpoint.weights_digest(model)}
        plan = replace(plan, init_facts=facts)
    if settings.lora:
        _adapt(plan, world, model)
        model.to(world.device)
    optimizer = optim.make(
        model, settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay, beta2=settings.beta2
    )
    scale = LossScale(autocast_dtype(world.device), world.device)
    first_step, in_training = 0, {}
    if plan.resumed:
        in_training = checkpoint.restore(plan.resumed, model, optimizer)
        scale.restore(in_training)
        first_step = plan.resumed.step
    average = Average(model, settings.ema) if settings.ema else None
    if average and plan.resumed:
        average.go_on({name: in_training[name] for name in in_training if name not in scale.tensors()})
    facts = first_facts(plan, world, model) | {"preflight": needs.as_json()}
    trackers = _open_trackers(plan, world, facts, say or (lambda _: None))
    log = metrics.MetricsLog(
        config.out if world.is_first else None,
        num_steps=plan.num_steps,
        first_step=first_step,
        log_every=config.log_every,
        say=say,
        also=trackers.write if trackers else None,
    )
    writer = checkpoint.Writer(config.out, keep_last=settings.keep_last, is_active=world.is_first)
    world.wait()  # metrics.jsonl now ends at the first step
    gradient, lag = optim.flat_gradient(model), 1 if world.device.type == "cuda" else 0
    run = Run(plan, world, model, optimizer, gradient, tokenizer, {}, log, facts, scale, lag, writer)
    run.average, run.trackers = average, trackers
    run.val_losses = metrics.val_losses(config.out) if plan.resumed else []
    run.best = plan.resumed.state.get("best") if plan.resumed else None
    run.write_facts(status="running")
    if world.is_first:
        run.keeper = Reporter(config.out, first_step=first_step, with_report=config.report, with_samples=config.samples)
    for note in notes:
        run.log.say(note)
    _say_start(run)
    run.log.say(needs.line())
    return run


def _adapt(plan: Plan, world: World, model: Model) -> None:
    """Give the model adapters, and the run the weights they belong to."""
    out = plan.config.out
    if plan.resumed:
        checkpoint.load_base(out, model)
    elif world.is_first:
        checkpoint.save_base(out, model, plan.init)
    lora.adapt(model, plan.settings.lora)


def _open_trackers(plan: Plan, world: World, facts: dict[str, Any], say: Callable[[str], None]) -> Trackers | None:
    """Open the trackers asked for, or those the run had, on the first rank; None where there are none."""
    names = plan.config.trackers or tuple(facts.get("trackers", {}))
    facts["trackers"] = dict.fromkeys(names, "open")
    found: list[Trackers] = []

    def open_all() -> None:
        check_trackers(names)  # those of a resumed run too
        identity = hashlib.sha256(f"{facts['started']} {plan.config.out.name}".encode()).hexdigest()[:8]
        first_step = plan.resumed.step if plan.resumed else 0
        settings = {"stage": plan.stage.name, "num_params": facts["num_params"]} | as_json(plan.settings)
        found.append(Trackers(names, TrackedRun(plan.config.out, identity, first_step, settings), say))

    world.agree_on(open_all if names and world.is_first else lambda: None)
    return found[0] if found else None


def _build(plan: Plan, world: World) -> tuple[Plan, Model, preflight.Needs, list[str]]:
    """The model on its device and what the run will take; micro-batches that nobody chose are sized to fit. MMError, on all
    ranks, where it cannot fit. Writes nothing; the notes are to be said."""
    device, notes = world.device, []
    optim.make(torch.nn.Linear(1, 1), "adamw", lr=0.0, weight_decay=0.0)  # loads what torch loads late, 80 MB of it
    base = preflight.used_bytes(device)
    torch.manual_seed(plan.settings.seed)
    model = Model(plan.shape)
    if plan.init:
        checkpoint.load_weights(
            plan.init, model, change=partial(embeddings.grow, growth=plan.growth) if plan.growth else None
        )
    model.to(device)
    model.checkpoints_blocks = plan.config.checkpoint_activations
    if device.type == "cuda" and plan.config.compile:
        notes += compile_blocks(model)
    needs = preflight.measure(plan, model, base_bytes=base, world=world)
    if plan.origins["micro_tokens"] == "default":
        chosen = preflight.fitting(plan, needs, device)
        if chosen != plan.settings.micro_tokens:
            plan = with_micro_tokens(plan, chosen, world)
            needs = preflight.measure(plan, model, base_bytes=base, world=world)
    world.agree_on(lambda: preflight.check(needs, device))
    return plan, model, needs, notes


def compile_blocks(model: Model) -> list[str]:
    """Compile block by block: all share one graph. Where that fails the blocks run as they are; gives the reason why."""
    for block in model.model.layers:
        block.compile()
    ids = torch.zeros(64, dtype=torch.int64, device=model.head_weight.device)
    ends = torch.tensor([0, 64], dtype=torch.int32, device=ids.device)
    try:
        with autocast(ids.device):
            model(ids, torch.arange(64, device=ids.device), ends, 64).sum().backward()
    except Exception as error:  # whatever keeps a compiler from working: a missing gcc, an old card, its own faults
        for block in model.model.layers:
            block._compiled_call_impl = None
        return [f"not compiled, slower: {str(error).strip().splitlines()[0][:160]} (--no-compile leaves it out)"]
    finally:
        model.zero_grad(set_to_none=True)
    return []


def needs_of(config: TrainOptions) -> preflight.Needs:
    """What `train(config)` would take, measured and worked out; nothing is written. MMError as `train` would raise."""
    world = distributed.join(config.device)
    try:
        return _build(make_plan(config, world), world)[2]
    finally:
        distributed.leave()


def _say_start(run: Run) -> None:
    """Say what is about to happen, and what has been passed over."""
    plan, loader = run.plan, run.plan.loader
    source = plan.resumed or plan.init
    begin = f"from {source.run_dir} (step {source.step})" if source else f"from new weights ({plan.settings.model})"
    ranks = f" on {run.world.size} ranks" if run.world.size > 1 else ""
    run.log.say(
        f"{plan.stage.name} {begin}: {plan.shape.num_params:,} parameters, {loader.num_samples:,} samples and "
        f"{loader.tokens_per_epoch:,} tokens an epoch, {plan.num_steps:,} steps, {run.world.device.type}{ranks}"
    )
    if plan.growth:
        rows = f"ids {plan.growth.facts['added_ids']} are new, by {plan.growth.method}"
        run.log.say(f"the embedding has {plan.growth.vocab_size:,} rows: {rows}")
    if loader.weights or len(loader.shares) > 1:
        for share in loader.shares:
            run.log.say(
                f"{share.dataset.dir}: {100 * share.tokens:.1f}% of the tokens; an epoch takes each of its samples "
                f"{share.passes:.2f} times"
            )
    if source is None and plan.stage.starts_from:
        before = plan.stage.starts_from[-1]
        run.log.say(
            f"warning: {plan.stage.name} teaches a model that can already write; new weights are good for a trial only. "
            f"Train `mm train pretrain`{', then `mm train sft`' if before == 'sft' and plan.stage.name == 'dpo' else ''} "
            "first, or name a run with --init"
        )
    if plan.settings.lora:
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        run.log.say(f"adapters of rank {plan.settings.lora}: {trained:,} parameters are trained, the others stay")
    if plan.resumed:
        for damaged in checkpoint.newer_than(plan.resumed):
            run.log.say(f"{damaged} is damaged: going on from step {plan.resumed.step} instead")
    if not plan.val_loader.num_samples:
        run.log.say("the val split is empty: no held-out figures")
