"""The one training loop: a TrainConfig in, a run directory out. It reads as the story of a step; stages differ in their
row kind and loss only.

Planning reads and checks everything and writes nothing; then the run starts, steps, and ends finished or interrupted,
in either case with a checkpoint of its last step.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdata import pair_checks
from mmdata.errors import MMError, TrainError
from mmdata.loader import MicroBatch, ahead
from mmdata.pairs import PairLoader
from mmdata.tokenizer import Tokenizer
from mmtrain import checkpoint, distributed, forecast, lora, metrics, optim, resize
from mmtrain.batch import to_device
from mmtrain.config import TrainConfig, as_json
from mmtrain.distributed import StopSignals, World
from mmtrain.ema import Average
from mmtrain.evaluate import evaluate
from mmtrain.keeper import Keeper
from mmtrain.model import Model
from mmtrain.plan import Plan, make_plan
from mmtrain.prelude import reference_logps
from mmtrain.speed import matmul_flops
from mmtrain.stages import step_zero_tolerance
from mmtrain.trackers import Tracked, Trackers
from mmtrain.trackers import check as check_trackers


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. `seconds` and the token counts are of this session; `val` is empty without a val split."""

    run_dir: Path
    checkpoint: Path
    stage: str
    num_params: int
    first_step: int
    final_step: int
    num_steps: int
    seconds: float
    train_loss: float | None
    val: dict[str, float]
    tokens: int
    trained_tokens: int
    num_skipped: int
    is_interrupted: bool
    early_stop: str  # why it ended before its last step by --patience; empty when it did not


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
    log: metrics.Log
    facts: dict[str, Any]
    batches: Iterator[list[MicroBatch]] = field(default_factory=lambda: iter(()))  # of the steps to come
    average: Average | None = None
    trackers: Trackers | None = None
    val_losses: list[float] = field(default_factory=list)
    num_skipped: int = 0
    num_skipped_in_a_row: int = 0
    last_checkpoint: Path | None = None
    val: dict[str, float] = field(default_factory=dict)
    keeper: Keeper | None = None  # of the first rank's report and samples

    @property
    def out(self) -> Path:
        """The run directory."""
        return self.plan.config.out


def train(config: TrainConfig, *, log: Callable[[str], None] = metrics.print_line) -> TrainResult:
    """Train one stage as `config` says, from its start or with `resume` from its newest checkpoint.

    Under torchrun or `distributed.launch` every rank calls this. `log` takes the console lines of the first rank.
    SIGINT and SIGTERM end the run after the step in progress, saved. MMError for what a user can cause.
    """
    world = distributed.join(config.device)
    try:
        result = _train(config, world, log)
    except BaseException:
        distributed.leave(is_failed=True)
        raise
    distributed.leave()
    return result


def _train(config: TrainConfig, world: World, say: Callable[[str], None]) -> TrainResult:
    """Plan, start, step, and write down how it ended."""
    plan, error = None, None
    try:
        plan = make_plan(config, world)
    except MMError as found:
        error = found
    world.agree(error)
    assert plan is not None
    run = _start(plan, world, say if world.is_first and not config.quiet else None)
    try:
        if plan.stage.kind == "pair":
            _prepare_pairs(run)
        with StopSignals() as stop:
            result = _run_steps(run, stop)
    except BaseException:
        if run.trackers:
            run.trackers.close(is_failed=True)
        _write_facts(run, status="failed")
        raise
    finally:
        run.log.close()
        if run.trackers:
            run.trackers.close()
    status = "interrupted" if result.is_interrupted else "finished"
    news = {"final_step": result.final_step, "result": _plain(asdict(result))}
    _write_facts(run, status=status, **(news if result.final_step > result.first_step else {}))
    if run.keeper:
        run.keeper.write()
    world.wait()
    return result


# --- the start ------------------------------------------------------------------------------------------------------


def _start(plan: Plan, world: World, say: Callable[[str], None] | None) -> Run:
    """Make the run directory and the model, and say what is about to happen."""
    config, settings = plan.config, plan.settings
    torch.set_float32_matmul_precision("high")  # TF32 where the card has it; the CPU computes fp32 as ever
    tokenizer = Tokenizer.load(plan.datasets[0].dir / "tokenizer")
    if world.is_first:
        config.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(config.out / "tokenizer")
    world.wait()
    torch.manual_seed(settings.seed)
    model = Model(plan.shape)
    if plan.init:
        checkpoint.load_weights(
            plan.init, model, change=partial(resize.grow, growth=plan.growth) if plan.growth else None
        )
    if plan.stage.kind == "pair" and (plan.init_facts is None or plan.growth):
        facts = {**(plan.init_facts or {"dir": ""}), "weights_sha256": checkpoint.weights_digest(model)}
        plan = replace(plan, init_facts=facts)
    if settings.lora:
        _adapt(plan, world, model)
    model.to(world.device)
    if config.compile:  # block by block: all share one compiled graph; not measured
        for block in model.model.layers:
            block.compile()
    optimizer = optim.make(
        model, settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay, beta2=settings.beta2
    )
    first_step, in_training = 0, {}
    if plan.resumed:
        in_training = checkpoint.restore(plan.resumed, model, optimizer)
        first_step = plan.resumed.step
    average = Average(model, settings.ema) if settings.ema else None
    if average and plan.resumed:
        average.go_on(in_training)
    facts = _first_facts(plan, world, model)
    trackers = _open_trackers(plan, world, facts, say or (lambda _: None))
    log = metrics.Log(
        config.out if world.is_first else None,
        num_steps=plan.num_steps,
        first_step=first_step,
        log_every=config.log_every,
        say=say,
        also=trackers.write if trackers else None,
    )
    world.wait()  # metrics.jsonl now ends at the first step
    run = Run(plan, world, model, optimizer, optim.flat_gradient(model), tokenizer, {}, log, facts)
    run.average, run.trackers = average, trackers
    run.val_losses = metrics.val_losses(config.out) if plan.resumed else []
    run.last_checkpoint = plan.resumed.dir if plan.resumed else None
    _write_facts(run, status="running")
    if world.is_first:
        run.keeper = Keeper(config.out, first_step=first_step, with_report=config.report, with_samples=config.samples)
    _say_start(run)
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
        found.append(Trackers(names, Tracked(plan.config.out, identity, first_step, settings), say))

    _agree_on(world, open_all if names and world.is_first else lambda: None)
    return found[0] if found else None


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


def _prepare_pairs(run: Run) -> None:
    """What dpo does before its first step: look at the pairs, get the reference's logps, forecast, and measure the start."""
    device, plan = run.world.device, run.plan
    if run.world.is_first and not plan.resumed:
        for line in pair_checks.lines(pair_checks.pair_figures(plan.datasets)):
            run.log.say(line)
    run.ref = reference_logps(
        run.plan,
        run.model,
        run.world,
        run.facts,
        dtype=autocast_dtype(device),
        precision=partial(autocast, device),
        say=run.log.say,
    )
    if not plan.resumed:
        _forecast(run)
        run.facts["start_val"] = _held_out(run)
        if run.facts["start_val"]:
            run.log.say(f"start val | {metrics.val_line(run.facts['start_val'])}")
    _write_facts(run)


def _forecast(run: Run) -> None:
    """Say how far the run can move the margins."""
    plan = run.plan
    assert isinstance(plan.loader, PairLoader)
    found = forecast.forecast(
        run.model,
        run.gradient,
        plan.loader,
        plan.settings,
        plan.objective,
        plan.num_steps,
        run.world,
        reference=run.ref.get("train"),
        precision=partial(autocast, run.world.device),
    )
    run.facts["forecast"] = asdict(found) | {"reach": found.reach}
    for line in forecast.lines(found, plan.settings.lr):
        run.log.say(line)


def autocast_dtype(device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: bf16 on cards that have it, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def autocast(device: torch.device) -> AbstractContextManager:
    """The precision forward passes run in; weights and sums stay fp32."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


# --- the steps ------------------------------------------------------------------------------------------------------


def _run_steps(run: Run, stop: StopSignals) -> TrainResult:
    """Step until the plan is done or a signal came; validate and save on the way and at the end."""
    settings, num_steps = run.plan.settings, run.plan.num_steps
    first_step = step = run.plan.resumed.step if run.plan.resumed else 0
    begun, totals, loss = time.monotonic(), [0, 0], None
    is_stopping = False
    run.log.start_clock()
    early_stop = _early_stop(run)
    with closing(ahead(run.plan.loader.batch, range(step, num_steps))) as run.batches:
        while step < num_steps and not is_stopping and not early_stop:
            record, is_stopping = _run_step(run, step, stop)
            step += 1
            loss = record["loss"]
            totals = [totals[0] + record["tokens"], totals[1] + record["trained_tokens"]]
            run.log.step(record)
            is_last = step == num_steps
            if is_last or (settings.val_every and step % settings.val_every == 0):
                _validate(run, step)
                early_stop = "" if is_last else _early_stop(run)
                if run.keeper:
                    is_end = bool(is_last or early_stop)
                    run.keeper.validated(step, run.model, run.tokenizer, run.plan.stage.name, is_last=is_end)
            if is_last or is_stopping or early_stop or (settings.save_every and step % settings.save_every == 0):
                _save(run, step)
    assert run.last_checkpoint is not None
    return TrainResult(
        run_dir=run.out,
        checkpoint=run.last_checkpoint,
        stage=run.plan.stage.name,
        num_params=run.plan.shape.num_params,
        first_step=first_step,
        final_step=step,
        num_steps=num_steps,
        seconds=time.monotonic() - begun,
        train_loss=loss,
        val=run.val,
        tokens=totals[0],
        trained_tokens=totals[1],
        num_skipped=run.num_skipped,
        is_interrupted=step < num_steps and not early_stop,
        early_stop=early_stop,
    )


def _run_step(run: Run, step: int, stop: StopSignals) -> tuple[dict[str, Any], bool]:
    """One optimizer step: batch, forward, loss, backward, sum over ranks, clip, update. Gives its record and whether any
    rank was asked to stop."""
    begun = time.monotonic()
    settings, stage = run.plan.settings, run.plan.stage
    sums = _accumulate(run)
    asked = torch.tensor([float(stop.is_set)], dtype=torch.float64, device=run.world.device)
    *figures, num_stops = run.world.sum(torch.cat([sums, asked])).tolist()
    run.world.sum(run.gradient)
    loss, count, tokens, trained, *others = figures
    means = dict(
        zip(("loss", *stage.figures), (x / count if count else math.nan for x in (loss, *others)), strict=True)
    )
    if step == 0 and count and math.isfinite(loss):
        _agree_on(
            run.world,
            partial(stage.check, means, step_zero_tolerance(autocast_dtype(run.world.device)), run.plan.objective),
        )
    lr = optim.learning_rate(
        step, run.plan.num_steps, peak=settings.lr, schedule=settings.schedule, warmup=settings.warmup
    )
    norm = _update(run, step, lr, means["loss"], count)
    if run.average:
        run.average.update(step)
    seconds = time.monotonic() - begun
    record = {
        "step": step + 1,
        "epoch": round((step + 1) / run.plan.loader.steps_per_epoch, 4),
        **means,
        "lr": lr,
        "grad_norm": norm,
        "tokens": int(tokens),
        "trained_tokens": int(trained),
        "tokens_per_s": round(tokens / seconds, 1),
        "skipped": run.num_skipped,
    }
    return record, num_stops > 0


def _accumulate(run: Run) -> Tensor:
    """Forward and backward of this rank's micro-batches; gradients add up in `run.gradient`.

    Gives float64 sums: loss, count, tokens, trained tokens, then the stage's figures.
    """
    stage, device = run.plan.stage, run.world.device
    sums = torch.zeros(4 + len(stage.figures), dtype=torch.float64, device=device)
    run.gradient.zero_()
    for micro in next(run.batches):
        batch = to_device(micro, device)
        ref = run.ref["train"][batch.samples].to(device) if "train" in run.ref else None
        with autocast(device):
            outcome = stage.loss(run.model, batch, ref, run.plan.objective)
        outcome.loss.backward()
        counts = torch.tensor([outcome.count, batch.num_tokens, batch.num_trained], dtype=torch.float64, device=device)
        figures = [outcome.figures[name].double().view(1) for name in stage.figures]
        sums += torch.cat([outcome.loss.detach().double().view(1), counts, *figures])
    return sums


def _update(run: Run, step: int, lr: float, loss: float, count: float) -> float:
    """Apply the summed gradient; gives its norm. A step without trained tokens changes nothing; one that is not finite
    is skipped and counted, and too many in a row end the run."""
    if not count:
        return math.nan
    norm, is_taken = math.nan, False
    if math.isfinite(loss):
        norm, is_taken = optim.update(run.optimizer, run.gradient, lr=lr, count=count, clip=run.plan.settings.clip)
    if is_taken:
        run.num_skipped_in_a_row = 0
        return norm
    run.num_skipped += 1
    run.num_skipped_in_a_row += 1
    run.log.say(f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}: skipped, the weights stay as they are")
    if run.num_skipped_in_a_row >= run.plan.settings.max_skipped:
        good = run.last_checkpoint or "none"
        error = TrainError(
            f"step {step + 1}: {run.num_skipped_in_a_row} steps in a row were not finite; last good checkpoint: {good}",
            "start again with a smaller --lr or more --warmup",
        )
        run.world.agree(error)
    return norm


def _agree_on(world: World, check: Callable[[], None]) -> None:
    """Run a check on all ranks; one of them raises what it finds."""
    error = None
    try:
        check()
    except MMError as found:
        error = found
    world.agree(error)


def _validate(run: Run, step: int) -> None:
    """Measure the val split and write a line of val_ figures; nothing when it is empty. Pairs are held against the start."""
    run.val = _held_out(run)
    if "loss" in run.val:
        run.val_losses.append(run.val["loss"])
    if run.val:
        run.log.val({"step": step} | {f"val_{name}": value for name, value in run.val.items()})
    if warning := forecast.forgetting(run.facts.get("start_val", {}), run.val, run.plan.objective):
        run.log.say(warning)


def _held_out(run: Run) -> dict[str, float]:
    """Figures of the val split, and of dpo's guard where there is one."""
    plan, found = run.plan, {}
    with autocast(run.world.device), _offered(run):
        if plan.val_loader.num_samples:
            ref = run.ref.get("val")
            found = evaluate(
                run.model, plan.val_loader, run.tokenizer, world=run.world, reference=ref, objective=plan.objective
            )
        if plan.guard is not None:
            found["guard_loss"] = evaluate(run.model, plan.guard, run.tokenizer, world=run.world)["loss"]
    return found


def _offered(run: Run) -> AbstractContextManager[dict[str, Tensor]]:
    """While open the model holds the weights the run offers, their average where it keeps one; gives those in training."""
    return run.average.in_place() if run.average else nullcontext({})


def _early_stop(run: Run) -> str:
    """Why the run ends before its last step: its val loss has not become better for as long as --patience allows."""
    patience = run.plan.settings.patience
    if not patience or metrics.num_since_best(run.val_losses) < patience:
        return ""
    best = min((loss for loss in run.val_losses if math.isfinite(loss)), default=math.nan)
    return f"no better val loss in {patience} validations; the best was {best:.4g}"


def _save(run: Run, step: int) -> None:
    """Write the checkpoint of `step` on the first rank; the others wait."""
    plan = run.plan
    if run.keeper:
        run.keeper.event(step, "save")
    if run.world.is_first:
        data = {
            "digest": plan.loader.digest,
            "dirs": [str(dataset.dir) for dataset in plan.datasets],
            "weights": plan.loader.weights,
            "tokenizer_sha256": plan.datasets[0].tokenizer_sha256,
            "init": plan.init_facts,
        }
        with _offered(run) as in_training:
            checkpoint.save(
                run.out,
                run.model,
                run.optimizer,
                step=step,
                settings={"stage": plan.stage.name} | as_json(plan.settings),
                data=data,
                keep_last=plan.settings.keep_last,
                extra=in_training,
            )
    run.last_checkpoint = run.out / "checkpoints" / f"step-{step}"
    run.world.wait()


# --- run.json -------------------------------------------------------------------------------------------------------


def _first_facts(plan: Plan, world: World, model: Model) -> dict[str, Any]:
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


def _write_facts(run: Run, **changes: Any) -> None:
    """Bring run.json up to date; `ended` is set with every status but running."""
    if not run.world.is_first:
        return
    run.facts |= changes
    if run.trackers:
        run.facts["trackers"] |= run.trackers.failed
    if run.facts["status"] != "running":
        run.facts["ended"] = time.time()
    checkpoint.write_atomic(run.out / "run.json", json.dumps(run.facts, indent=2, ensure_ascii=False) + "\n")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Paths as strings, what is not finite as null."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
