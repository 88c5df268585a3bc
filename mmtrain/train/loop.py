"""The training loop of all stages: options in, a run directory out. Only the kind of rows and the loss differ by stage.

The run is planned first, which opens and checks everything and writes nothing; then it is started, makes its steps, and
ends as "finished" or "interrupted", in both cases with a checkpoint of its last step.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdata.errors import MMError, TrainError
from mmdata.shards.checks import figures_of_pairs, pair_lines
from mmdata.shards.loader import MicroBatch, ahead
from mmtrain import distributed
from mmtrain.config import TrainOptions
from mmtrain.distributed import StopSignals, World
from mmtrain.inference.evaluate import evaluate
from mmtrain.log import metrics
from mmtrain.log.console import Console, print_line
from mmtrain.model.batch import cut, to_device
from mmtrain.model.precision import autocast, autocast_dtype, is_out_of_memory, wide, widest
from mmtrain.model.stages import step_zero_tolerance
from mmtrain.records import BestRecord
from mmtrain.train import forecast, optim, reference
from mmtrain.train.plan import TrainPlan, make_plan
from mmtrain.train.run import STOP_FILE, ActiveRun, InFlight, console_of, facts_of, start

STOPPING = "stopping after this step, saving; again: stop now"


@dataclass(frozen=True)
class TrainResult:
    """The outcome of one call of `train`. first_step: optimizer steps done before. final_step: after it. num_steps:
    planned for the run. seconds, tokens, trained_tokens, num_skipped (not finite): of this call only. train_loss: mean
    of the last step; None without a step. val: metrics of the last validation. best_checkpoint: None without a
    validation."""

    run_dir: Path
    checkpoint: Path
    best_checkpoint: Path | None  # the one with the lowest val loss
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
    early_stop: str  # why --patience ended the run before its last step; empty if it did not
    peak_bytes: int  # peak memory of this rank


def train(options: TrainOptions, *, log: Callable[[str], None] = print_line) -> TrainResult:
    """Train one stage, from its start or, with `options.resume`, from the run's newest checkpoint; return how it ended.

    Under torchrun or `distributed.launch` every rank calls this. log: called with each console line, on the first rank
    only, and not with `options.quiet`. SIGINT and SIGTERM end the run after the current step, with a checkpoint. Raises
    an MMError for every problem that a user can cause.
    """
    try:
        with distributed.signals_end_it(), ExitStack() as held:
            world = distributed.join(options.device)
            result = _train(options, world, console_of(options, world, log), held)
    except BaseException:
        distributed.leave(is_failed=True)
        raise
    distributed.leave()
    return result


def _train(options: TrainOptions, world: World, console: Console, held: ExitStack) -> TrainResult:
    """Plan and start the run, make its steps, and record in run.json how it ended. Raises the error that ended it.
    held: keeps the lock of the run's directory."""
    plans: list[TrainPlan] = []
    with console.phase("open the data and checkpoints"):
        world.agree_on(lambda: plans.append(make_plan(options, world)))
        if world.size > 1:
            world.agree_same(facts_of(plans[0]))
    run = start(plans[0], options, world, console, held)
    try:
        if run.plan.is_pairs:
            _prepare_pairs(run)
        with StopSignals(partial(console.answer, STOPPING)) as stop, distributed.last_words(partial(_give_up, run)):
            result = _run_steps(run, stop)
    except BaseException:
        if run.trackers:
            run.trackers.close(is_failed=True)
        with contextlib.suppress(MMError):  # raise the first error, not one of the writer
            run.writer.wait()
        run.write_record("failed")
        raise
    finally:
        run.log.close()
        if run.trackers:
            run.trackers.close()
    if result.final_step > result.first_step:
        run.record.final_step, run.record.result = result.final_step, _json_values(asdict(result))
    run.write_record("interrupted" if result.is_interrupted else "finished")
    if run.reporter:
        run.reporter.write()
    world.wait()
    return result


def _give_up(run: ActiveRun) -> str:
    """Record that the run has failed, when its main thread is blocked, and return which checkpoint is the last."""
    run.write_record("failed")
    with contextlib.suppress(MMError):  # of the writer, which has no more to say than that the last one is older
        run.writer.wait()
    return f"last checkpoint: {_last_checkpoint(run) or 'none'}"


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with paths as strings, and None for floats that are not finite, which JSON does not have."""
    texts = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in texts.items()}


def _prepare_pairs(run: ActiveRun) -> None:
    """Before the first step of dpo: report statistics of the pairs, get the reference model's logps, forecast the
    reward margins, and validate the start weights. A resumed run only gets the logps."""
    plan, record, say = run.plan, run.record, run.console.say
    if run.world.is_first and not plan.start.resumed:
        for line in pair_lines(figures_of_pairs(plan.datasets)):
            say(line)
    run.ref, known = reference.prepare(plan, run.model, run.world, record.reference or None, run.console)
    record.reference = known or record.reference
    if not plan.start.resumed:
        _forecast(run)
        record.start_val = _held_out(run)
        if record.start_val:
            say(f"start val | {metrics.val_line(record.start_val, run.plan.num_val_rows)}")
    run.write_record()


def _forecast(run: ActiveRun) -> None:
    with run.console.phase("forecast", seconds=run.needs.forecast_s):
        outlook = forecast.forecast(
            run.plan, run.model, run.gradient, run.world, run.ref.get("train"), most_tokens=run.needs.probe_tokens()
        )
    run.record.forecast = asdict(outlook) | {"reach": outlook.reach}
    for line in forecast.lines(outlook, run.plan.settings.lr):
        run.console.say(line)


# --- the steps


def _run_steps(run: ActiveRun, stop: StopSignals) -> TrainResult:
    """Make steps until all are done, a signal or stop request has come, or --patience ends the run. Validate and save
    every --val-every and --save-every steps and at the end; save also after the lowest val loss so far."""
    plan, settings, num_steps = run.plan, run.plan.settings, run.plan.num_steps
    first_step = step = plan.start.step
    begun = time.monotonic()
    run.log.start_clock()
    early_stop = _early_stop(run)
    with closing(ahead(plan.loader.batch, range(step, num_steps))) as run.batches:
        while step < num_steps and not run.is_stopping and not early_stop:
            run.in_flight.append(_run_step(run, step, stop))
            step += 1
            is_last = step == num_steps
            is_val = is_last or (settings.val_every and step % settings.val_every == 0)
            is_save = is_last or (settings.save_every and step % settings.save_every == 0)
            _read(run, 0 if is_val or is_save or step == first_step + 1 else run.lag)
            is_best = is_val and _validate(run, step)
            early_stop = _early_stop(run) if is_val and not is_last else early_stop
            if is_val and run.reporter:
                is_end = bool(is_last or early_stop)
                run.reporter.validated(step, run.model, run.tokenizer, plan.stage.name, is_last=is_end)
            if is_save or is_best or early_stop:
                _save(run, step)
    _read(run, 0)
    if run.is_stopping and run.last_saved != step:
        _save(run, step)
    last = _last_checkpoint(run) or (plan.start.resumed.dir if plan.start.resumed else None)
    assert last is not None
    return TrainResult(
        run_dir=plan.out,
        checkpoint=last,
        best_checkpoint=plan.out / "checkpoints" / f"step-{run.best.step}" if run.best else None,
        stage=plan.stage.name,
        num_params=plan.shape.num_params,
        first_step=first_step,
        final_step=step,
        num_steps=num_steps,
        seconds=time.monotonic() - begun,
        train_loss=run.loss,
        val=run.val,
        tokens=run.num_tokens,
        trained_tokens=run.num_trained,
        num_skipped=run.num_skipped,
        is_interrupted=step < num_steps and not early_stop,
        early_stop=early_stop,
        peak_bytes=metrics.memory_bytes(),
    )


def _run_step(run: ActiveRun, step: int, stop: StopSignals) -> InFlight:
    """Make optimizer step `step`, counted from 0: forward and backward passes, sum over ranks, clip, update. It never
    waits for the device; its numbers are read later from the InFlight returned. A request to stop on any rank (a
    signal, or the file STOP_FILE) is summed with them, so that all ranks stop after the same step."""
    begun, run.step = time.monotonic(), step
    settings = run.plan.settings
    sums = _accumulate(run, step)
    is_asked = stop.is_set or (run.world.is_first and (run.plan.out / STOP_FILE).exists())
    asked = torch.tensor([float(is_asked)], dtype=sums.dtype).to(sums.device, non_blocking=sums.is_cuda)
    run.gradient_sum.finish()
    figures = run.world.sum(torch.cat([sums, asked]))
    lr = optim.learning_rate(
        step, run.plan.num_steps, peak=settings.lr, schedule=settings.schedule, warmup=settings.warmup
    )
    count, scale = figures[1], wide(run.scale.value)
    run.writer.settle()  # the checkpoint thread may still be copying the weights that `update` changes
    norm, is_taken = optim.update(
        run.optimizer,
        run.gradient,
        lr=lr,
        count=count * scale,
        clip=settings.clip,
        is_finite=torch.isfinite(figures[0]),
    )
    run.scale.update(is_taken.masked_fill(count == 0, 1.0).float())
    if run.average:
        run.average.update(step)
    return InFlight(step, lr, begun, torch.cat([figures, torch.stack([norm, is_taken, scale])]))


def _accumulate(run: ActiveRun, step: int) -> Tensor:
    """Run the forward and backward passes of this rank's micro-batches of a step; `run.gradient` gets the sum, which
    `run.gradient_sum` begins to sum over ranks during the last pass. Returns float64 sums [4 + number of the stage's
    figures]: loss, count (trained tokens or pairs), tokens, trained tokens, then the figures. If memory runs out, the
    largest allowed micro-batch is halved and the step run again, with the same gradient, as it is a sum. Raises
    TrainError if a single sequence does not fit in memory."""
    micros, num_halved = next(run.batches), 0
    while True:
        try:
            sums = _add_up(run, micros)
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        run.gradient_sum.run_again()
        _halve(run, reason)  # not in the except block, where the error still keeps tensors in memory
        num_halved += 1
    if num_halved:
        times = f" (halved {num_halved} times)" if num_halved > 1 else ""
        run.console.warn(
            f"out of memory on rank {run.world.rank}: micro-batches are cut to {run.most_tokens:,} tokens from here on"
            f"{times}, the global batch stays as it is"
        )
        run.event(step + 1, "halved", f"{run.most_tokens:,} tokens")
    return sums


def _add_up(run: ActiveRun, micros: Sequence[MicroBatch]) -> Tensor:
    """Zero `run.gradient`, run the passes of `micros` in pieces of at most `run.most_tokens`; return `_accumulate`'s
    sums."""
    stage, device = run.plan.stage, run.world.device
    sums = torch.zeros(4 + len(stage.figures), dtype=widest(device), device=device)
    limits = run.plan.loader.limits
    limits = replace(limits, tokens=run.most_tokens or limits.tokens)
    run.gradient.zero_()
    pieces = [piece for whole in micros for piece in cut(whole, run.most_tokens, run.plan.is_pairs)]
    for number, micro in enumerate(pieces):
        run.log.within(run.step, number / len(pieces))
        run.largest_micro = max(run.largest_micro, len(micro.ids))
        batch = to_device(micro, device, limits)
        ref = run.ref["train"][batch.samples].to(device, widest(device)) if "train" in run.ref else None
        with autocast(device):
            outcome = stage.loss(run.model, batch, ref, run.plan.objective)
        if number == len(pieces) - 1:
            run.gradient_sum.start()
        (outcome.loss * run.scale.value if run.scale.is_on else outcome.loss).backward()
        counts = torch.tensor([outcome.count, batch.num_tokens, batch.num_trained], dtype=widest(device))
        figures = [wide(outcome.figures[name]).view(1) for name in stage.figures]
        loss = wide(outcome.loss.detach()).view(1)
        sums += torch.cat([loss, counts.to(device, non_blocking=device.type == "cuda"), *figures])
    return sums


def _halve(run: ActiveRun, reason: str) -> None:
    """Halve the largest number of tokens that this rank runs at once. Raises TrainError, with torch's message `reason`,
    if it is already below half of the longest possible sequence."""
    if run.most_tokens is not None and run.most_tokens < run.plan.datasets[0].max_len // 2:
        raise TrainError(
            f"out of memory with one document at a time ({reason})",
            "pack with a smaller --max-len, or choose a smaller --model",
        )
    run.most_tokens = (run.most_tokens or run.largest_micro) // 2
    if run.world.device.type != "cpu":
        torch.get_device_module(run.world.device).empty_cache()


# --- figures


def _read(run: ActiveRun, lag: int) -> None:
    """Read the numbers of all steps in flight except the newest `lag`: check the first step of dpo, count skipped
    steps, log the step, and set `run.is_stopping` if any rank was asked to stop."""
    stage = run.plan.stage
    while len(run.in_flight) > lag:
        done = run.in_flight.pop(0)
        loss, count, tokens, trained, *others, num_stops, norm, is_taken, scale = done.figures()
        names = ("loss", *stage.figures)
        means = {n: x / count if count else math.nan for n, x in zip(names, (loss, *others), strict=True)}
        if stage.check and done.step == 0 and count and math.isfinite(loss):
            tolerance = step_zero_tolerance(autocast_dtype(run.world.device))
            run.world.agree_on(partial(stage.check, means, tolerance, run.plan.objective))
        if count:
            _count_skipped(run, done.step, means["loss"], norm, scale, is_skipped=not is_taken)
        now = time.monotonic()
        seconds, run.last_read = now - max(done.begun, run.last_read), now
        record = {
            "step": done.step + 1,
            "epoch": round((done.step + 1) / run.plan.loader.steps_per_epoch, 4),
            **means,
            "lr": done.lr,
            "grad_norm": norm if count else math.nan,
            "tokens": int(tokens),
            "trained_tokens": int(trained),
            "tokens_per_s": round(tokens / seconds, 1),
            "skipped": run.num_skipped,
            **({"loss_scale": scale} if run.scale.is_on else {}),
        }
        run.log.step(record)
        run.loss = means["loss"]
        run.num_tokens += int(tokens)
        run.num_trained += int(trained)
        run.is_stopping = run.is_stopping or num_stops > 0


def _count_skipped(run: ActiveRun, step: int, loss: float, norm: float, scale: float, *, is_skipped: bool) -> None:
    """Report and count a step skipped because its loss or gradient was not finite; without `is_skipped` restart the
    count. After --max-skipped in a row raises TrainError on the first rank, SystemExit on the others. A mere overflow
    of the fp16 gradient (finite loss, loss scale above 1) does not count, because halving the scale is the remedy.
    step: counted from 0. loss: mean. norm: of the gradient. scale: loss scale."""
    if not is_skipped:
        run.num_skipped_in_a_row = 0
        return
    run.num_skipped += 1
    is_overflow = math.isfinite(loss) and scale > 1
    run.num_skipped_in_a_row += not is_overflow
    why = f", too large for fp16 at a loss scale of {scale:g}" if is_overflow else ""
    run.console.say(
        f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}{why}: skipped, the weights stay as they are"
    )
    if run.num_skipped_in_a_row >= run.plan.settings.max_skipped:
        good = _last_checkpoint(run) or "none"
        error = TrainError(
            f"step {step + 1}: {run.num_skipped_in_a_row} steps in a row were not finite; last good checkpoint: {good}",
            "start again with a smaller --lr or more --warmup",
        )
        run.world.agree(error)


def _validate(run: ActiveRun, step: int) -> bool:
    """Log the metrics of the val split after `step` steps, and warn if the model forgets. Return whether the val loss
    is finite and the lowest so far; `run.best` is then updated."""
    run.val = _held_out(run)
    run.last_read = time.monotonic()
    if run.val:
        record = {"step": step} | {f"val_{name}": value for name, value in run.val.items()}
        run.log.val(record, run.plan.num_val_rows)
    if warning := forecast.forgetting(run.record.start_val or {}, run.val, run.plan.objective):
        run.console.say(warning)
    loss = run.val.get("loss", math.nan)
    is_best = math.isfinite(loss) and (run.best is None or loss < run.best.val_loss)
    run.since_best = 0 if is_best else run.since_best + ("loss" in run.val)
    if is_best:
        run.best = BestRecord(step, loss, 0)
    elif run.best:
        run.best = BestRecord(run.best.step, run.best.val_loss, run.since_best)
    return is_best


def _held_out(run: ActiveRun) -> dict[str, float]:
    """Return the metrics of the val split and, as "guard_loss", the loss on --guard. With --ema of the averaged
    weights."""
    plan, world, figures = run.plan, run.world, {}
    measure = partial(evaluate, run.model, tokenizer=run.tokenizer, world=world)
    with autocast(world.device), _final_weights(run):
        if plan.val_loader.num_samples:
            ref = run.ref.get("val")
            with run.console.phase("validation", "samples") as update:
                figures = measure(plan.val_loader, reference=ref, objective=plan.objective, progress=update)
        if plan.guard is not None:
            with run.console.phase("validation on --guard", "samples") as update:
                figures["guard_loss"] = measure(plan.guard, progress=update)["loss"]
    return figures


def _final_weights(run: ActiveRun) -> AbstractContextManager[dict[str, Tensor]]:
    """Context manager inside which the model has the weights that are validated and saved: the average with --ema. It
    then yields the weights that the optimizer updates, by name, and puts them back on leaving; else it yields {}."""
    if run.average is None:
        return nullcontext({})
    run.writer.settle()
    return run.average.in_place()


def _early_stop(run: ActiveRun) -> str:
    """Return why --patience ends the run (no val loss below the best in the last N), or an empty string."""
    patience = run.plan.settings.patience
    if not patience or run.since_best < patience:
        return ""
    best = run.best.val_loss if run.best else math.nan
    return f"no better val loss in {patience} validations; the best was {best:.4g}"


# --- checkpoints


def _save(run: ActiveRun, step: int) -> None:
    """Start to write the checkpoint of `step`, on the first rank only. Training continues while a thread writes it."""
    run.event(step, "save")
    run.last_saved = step
    if not run.world.is_first:
        return
    with _final_weights(run) as in_training:
        run.writer.save(
            run.model,
            run.optimizer,
            step=step,
            settings={"stage": run.plan.stage.name} | asdict(run.plan.settings),
            data=run.plan.data,
            best=run.best,
            extra={**in_training, **run.scale.tensors()},
        )
        if run.average:  # the copies must be complete before the average is swapped out of the model
            run.writer.settle()
    run.last_read = time.monotonic()


def _last_checkpoint(run: ActiveRun) -> Path | None:
    """Wait until nothing is being written, and return the run's newest complete checkpoint, on the first rank possibly
    the one resumed from. Other ranks return that of the last save during this call of `train`. None without one."""
    run.writer.wait()
    if run.world.is_first:
        return run.writer.last or (run.plan.start.resumed.dir if run.plan.start.resumed else None)
    saved = run.last_saved if run.last_saved >= 0 else None  # by the first rank
    return run.plan.out / "checkpoints" / f"step-{saved}" if saved is not None else None
