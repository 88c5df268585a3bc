"""Forecast, before the first step, how much memory, time and disk space a run will need. A probe runs the model forward
and backward on some tokens of the run's data, counts the bytes that autograd keeps per token and measures the
speed. It changes no weights, draws no random numbers, and takes at most PROBE_S seconds on a CPU."""

import math
import shutil
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from mmdata.errors import DiskError, TrainError
from mmdata.shards.loader import Loader, MicroBatch
from mmtrain.distributed import World, ranks_here
from mmtrain.log.console import duration
from mmtrain.log.metrics import short
from mmtrain.model.batch import cut, to_device, token_logps_of
from mmtrain.model.logps import chunk_rows
from mmtrain.model.model import Model
from mmtrain.model.precision import autocast
from mmtrain.shapes import TOKENS_PER_PARAM, ModelConfig, shape_of
from mmtrain.sizing import MODELS
from mmtrain.train.plan import TrainPlan

PROBE_TOKENS = (64, 256, 1024, 4096)  # sizes of the probe's passes
MEMORY_TOKENS = 256  # largest size of the probe on which memory is measured
PASSES = 3  # passes of the probe's last size, of which the median counts
# Longest time of the probe in seconds, and of dpo's trial steps, these also as a share of the run if that is more.
PROBE_S, PROBE_SHARE = 5.0, 0.03
NUM_TRIALS = 4  # trial steps of dpo's forecast
LONG_S, SENSIBLE_S = 2 * 3600.0, 1800.0  # a run on the CPU that gets a warning, and one that is proposed, in seconds
# Memory that glibc's allocator holds without using it, relative to activations and logits. Measured: 0.34 for a model
# of 1M, 0.5 for one of 26M parameters.
SLACK = 0.4
HEADROOM = 0.95  # share of the free memory that a plan may use
MOST_MICRO_TOKENS = 131_072  # larger micro-batches are not faster on any GPU
# The same limit with --checkpoint-activations, which is used to save memory; enough to keep a GPU busy.
MOST_CHECKPOINTED_TOKENS = 8192


@dataclass(frozen=True)
class Needs:
    """What a run will need on one rank.

    run_tokens: tokens of all steps. optimal_tokens: of a compute-optimal pretraining run; 0 for other stages. parts:
    bytes of memory at the peak by purpose, such as "optimizer". free_bytes: memory that this rank may use. seconds: of
    the rest of the run, with reference_s (the reference model's logps) and forecast_s (dpo's trial steps).
    tokens_per_s: of all ranks together. disk_bytes: of all its checkpoints at most. largest_micro_tokens: the largest
    micro-batch that fits; 0 if not even one sample does.
    """

    shape: ModelConfig
    num_params: int
    tokens_per_epoch: int
    num_steps: int
    run_tokens: int
    optimal_tokens: int
    batch_tokens: int
    micro_tokens: int
    parts: Mapping[str, int]
    free_bytes: int
    seconds: float
    tokens_per_s: float
    disk_bytes: int
    free_disk_bytes: int
    largest_micro_tokens: int
    reference_s: float = 0.0
    forecast_s: float = 0.0
    advice: str = ""  # a warning of a run that is too long for the machine

    @property
    def peak_bytes(self) -> int:
        """Return the peak memory in bytes."""
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """Return memory, disk space and duration as lines for the console."""
        parts = {"reference logps": self.reference_s, "forecast": self.forecast_s}
        before = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 1)
        return [
            f"takes about {duration(self.seconds)} at {short(self.tokens_per_s)} tokens/s{f' ({before})' if before else ''}",
            f"memory {self.peak_bytes / 1e9:.1f} of {self.free_bytes / 1e9:.1f} GB at {self.micro_tokens:,} tokens at once; "
            f"disk {self.disk_bytes / 1e9:.2f} of {self.free_disk_bytes / 1e9:.0f} GB",
            *([self.advice] if self.advice else []),
        ]

    def probe_tokens(self) -> int:
        """Return how many tokens the trial steps of dpo may take: those of PROBE_SHARE of the run, or PROBE_S."""
        return int(max(PROBE_S, PROBE_SHARE * self.seconds) * self.tokens_per_s * 3 / 5)

    def as_json(self) -> dict[str, Any]:
        """Return all fields and `peak_bytes` by name."""
        return asdict(self) | {"peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class Memory:
    """The memory of one rank as a function of the tokens run at once. fixed: bytes by purpose that do not depend on
    them. kept: bytes per token that a forward pass keeps for the backward pass. trained_share: share of the tokens with
    logits. slack: memory that the allocator holds without using it, relative to activations and logits."""

    fixed: Mapping[str, int]
    kept: float
    trained_share: float
    shape: ModelConfig
    slack: float

    def parts(self, micro_tokens: int) -> dict[str, int]:
        """Return the bytes by purpose with `micro_tokens` tokens at once."""
        rows = min(chunk_rows(self.shape.vocab_size), micro_tokens * self.trained_share)
        head = 2 * 4 * rows * self.shape.vocab_size + 2 * 4 * self.shape.vocab_size * self.shape.hidden_size
        sizes = {"activations": int(self.kept * micro_tokens), "logits and their gradient": int(head)}
        return {**self.fixed, **sizes, "allocator's slack": int(self.slack * sum(sizes.values()))}

    def largest(self, cell_tokens: int, free: int, *, width: float = 1.0) -> int:
        """Return the largest `cell_tokens` times a power of two, up to MOST_MICRO_TOKENS, that needs at most `free`
        bytes; 0 if `cell_tokens` themselves do not fit. width: tokens actually run per token of this nominal size."""
        largest, tokens = 0, cell_tokens
        while tokens <= MOST_MICRO_TOKENS and sum(self.parts(int(tokens * width)).values()) <= free:
            largest, tokens = tokens, 2 * tokens
        return largest


def measure(
    plan: TrainPlan, model: Model, probed: "Probed", *, base_bytes: int, world: World, reference_tokens: int = 0
) -> Needs:
    """Return what the run will need. model: on its device. base_bytes: memory in use before it was built.
    reference_tokens: of pairs whose reference logps are to be computed. Ranks on a CPU share its memory equally."""
    device, settings, kept = world.device, plan.settings, probed.kept
    if model.checkpoints_blocks:  # memory: the input of every block, and the activations of one block
        kept = kept / plan.shape.num_layers + 4 * plan.shape.hidden_size * plan.shape.num_layers
    fixed, saved = _fixed_bytes(plan, model, base_bytes, probed.weights_copy)
    is_cuda = device.type == "cuda"
    memory = Memory(fixed, kept, probed.trained_share, plan.shape, 0.0 if is_cuda else SLACK)
    free = int(HEADROOM * free_bytes(device)) // (1 if is_cuda else ranks_here(world))
    cell = plan.loader.cell_tokens if isinstance(plan.loader, Loader) else 2 * plan.datasets[0].max_len
    width = 1.0 if is_cuda else micro_width(plan)  # on CUDA micro-batches are padded to the nominal size
    epoch_tokens = plan.loader.tokens_per_epoch
    run_tokens = round(plan.num_steps * epoch_tokens / max(1, plan.loader.steps_per_epoch))
    num_left = plan.num_steps - plan.start.step
    validations = (-(-num_left // settings.val_every) if settings.val_every else 1) + plan.is_pairs
    held_out = plan.val_loader.tokens_per_epoch + (plan.guard.tokens_per_epoch if plan.guard else 0)
    val_tokens = held_out * validations / 3  # a forward pass is a third of the work
    tokens_per_s = world.size / probed.seconds_per_token
    run_s = plan.loader.computed_share * (run_tokens * num_left / plan.num_steps + val_tokens) / tokens_per_s
    reference_s = reference_tokens / 3 / tokens_per_s
    forecast_s = 0.0
    if plan.is_pairs and not plan.start.resumed:  # every trial step is a step and two forward passes
        trial_s = NUM_TRIALS * min(settings.micro_tokens, settings.batch_tokens) * 5 / 3 / tokens_per_s * world.size
        forecast_s = min(trial_s, max(PROBE_S, PROBE_SHARE * run_s))
    root = next(path for path in (plan.out, *plan.out.absolute().parents) if path.exists())
    needs = Needs(
        shape=plan.shape,
        num_params=plan.shape.num_params,
        tokens_per_epoch=epoch_tokens,
        num_steps=plan.num_steps,
        run_tokens=run_tokens,
        optimal_tokens=TOKENS_PER_PARAM * plan.shape.num_params * (plan.stage.name == "pretrain"),
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        parts=memory.parts(int(settings.micro_tokens * width)),
        free_bytes=free,
        seconds=run_s + reference_s + forecast_s,
        tokens_per_s=tokens_per_s,
        disk_bytes=saved * (settings.keep_last + 2),  # 2 more: the best checkpoint, and the one being written
        free_disk_bytes=shutil.disk_usage(root).free,
        largest_micro_tokens=memory.largest(cell, free, width=width),
        reference_s=reference_s,
        forecast_s=forecast_s,
    )
    return replace(needs, advice=too_long(plan, needs, device))


def too_long(plan: TrainPlan, needs: Needs, device: torch.device) -> str:
    """Return a warning if a run on the CPU takes more than LONG_S, with a choice that takes about SENSIBLE_S; else
    ""."""
    if device.type != "cpu" or needs.seconds <= LONG_S:
        return ""
    text = f"warning: {short(needs.num_params)} parameters on this CPU take {duration(needs.seconds)}"
    steps = max(1, int((plan.num_steps - plan.start.step) * SENSIBLE_S / needs.seconds))
    choices = [f"--steps {plan.start.step + steps}: {duration(SENSIBLE_S)}"]
    if plan.start.source is None:
        sizes = {name: shape_of(name, plan.shape.vocab_size).num_params for name in MODELS}
        times = {
            name: needs.seconds * size / needs.num_params for name, size in sizes.items() if size < needs.num_params
        }
        name = next(
            (name for name, seconds in times.items() if seconds <= SENSIBLE_S),
            min(times, key=lambda name: times[name], default=""),
        )
        choices = [f"--model {name}: {duration(times[name])}", *choices] if name else choices
    return f"{text}; {', or '.join(choices)}"


def check(needs: Needs, device: torch.device) -> None:
    """Raise TrainError, which names the largest micro-batch that fits, if the run does not fit in memory, and DiskError
    if its checkpoints do not fit on the disk."""
    if needs.peak_bytes > needs.free_bytes:
        largest = needs.largest_micro_tokens
        raise TrainError(
            f"{needs.micro_tokens:,} tokens at once need about {needs.peak_bytes / 1e9:.1f} GB of memory, "
            f"{needs.free_bytes / 1e9:.1f} GB are free on {device.type}",
            f"--micro-tokens {largest} is the largest that fits; the gradient is the same"
            if largest
            else "--checkpoint-activations, a smaller --model, or pack with a smaller --max-len",
        )
    if needs.disk_bytes > needs.free_disk_bytes:
        raise DiskError(
            f"checkpoints need up to {needs.disk_bytes / 1e9:.1f} GB of disk, "
            f"{needs.free_disk_bytes / 1e9:.1f} GB are free",
            "free disk space, keep fewer (--keep-last 1), or choose another --out",
        )


def fitting(plan: TrainPlan, needs: Needs, model: Model) -> int:
    """Return the tokens of a micro-batch for a run without --micro-tokens: on the CPU the default, on CUDA the largest
    useful number; at most what fits in memory, and a batch (or the longest sequence). The present value if nothing
    fits."""
    on_cuda = MOST_CHECKPOINTED_TOKENS if model.checkpoints_blocks else MOST_MICRO_TOKENS
    most = on_cuda if model.head_weight.is_cuda else needs.micro_tokens
    most = min(most, max(plan.settings.batch_tokens, plan.datasets[0].max_len))
    return min(most, needs.largest_micro_tokens) or needs.micro_tokens


def _fixed_bytes(plan: TrainPlan, model: Model, base_bytes: int, weights_copy: int) -> tuple[dict[str, int], int]:
    """Return the bytes of memory, by purpose, that do not depend on the micro-batch, and the bytes of one checkpoint on
    disk. base_bytes: in use before the model was built. weights_copy: bytes of half-precision copies of the weights."""
    settings, num_params = plan.settings, plan.shape.num_params
    num_trainable = sum(p.numel() for p in model.parameters())
    if settings.lora:
        linear = [layer for layer in model.model.modules() if isinstance(layer, torch.nn.Linear)]
        num_trainable = sum(settings.lora * (layer.in_features + layer.out_features) for layer in linear)
    optimizer = 8 * num_trainable
    if settings.optimizer == "muon":
        optimizer = 4 * (num_trainable + (2 - plan.shape.tied) * model.head_weight.numel())
    average = 4 * num_trainable if settings.ema else 0
    saved = 4 * (num_trainable if settings.lora else num_params) + optimizer + average
    fixed = {
        "program and data": base_bytes,
        "weights": 4 * num_params,
        "gradient": 4 * num_trainable,
        "optimizer": optimizer,
        "average of the weights": average,
        "low-precision weights": weights_copy,
        "checkpoint copy": 0 if model.head_weight.is_cuda else saved,
    }
    return fixed, saved


def micro_width(plan: TrainPlan) -> float:
    """Return the tokens in a micro-batch per token of its nominal size, measured on the first step's largest one: a
    little below 1 for packs, which are nearly full, and 1 for pairs, whose tokens are counted exactly."""
    if not isinstance(plan.loader, Loader):
        return 1.0
    micros = plan.loader.batch(0)
    cell = plan.loader.cell_tokens
    nominal = max(min(plan.settings.micro_tokens, plan.settings.batch_tokens) // cell, 1) * cell
    return max((len(micro.ids) for micro in micros), default=nominal) / nominal


# --- the probe


@dataclass(frozen=True)
class Probed:
    """What the probe has measured. kept: bytes per token that autograd keeps. weights_copy: bytes of half-precision
    copies of the weights. trained_share: share of the tokens with logits. seconds_per_token: of a forward and backward
    pass."""

    kept: float
    weights_copy: int
    trained_share: float
    seconds_per_token: float


def probe(plan: TrainPlan, model: Model) -> Probed:
    """Run the model on the beginning of the run's first step, on more of it each time. On a CPU no pass is begun that
    is expected to end after PROBE_S seconds. Leaves no gradients."""
    micro = (plan.loader.batch(0) or [next(plan.loader.micro_batches())])[0]
    end = time.perf_counter() + PROBE_S if model.head_weight.device.type == "cpu" else math.inf
    part = half = beginning(micro, PROBE_TOKENS[0] // 2, plan.is_pairs)
    kept = [(len(half.ids), kept_bytes(model, half))]
    count, times = 0, [0.0]
    for tokens in PROBE_TOKENS:
        larger = beginning(micro, tokens, plan.is_pairs)
        size = len(larger.ids)
        if size <= count or time.perf_counter() + 4 / 3 * times[0] * size / max(1, count) > end:
            break
        part, count = larger, size
        if tokens <= MEMORY_TOKENS:
            kept.append((count, kept_bytes(model, part)))
        times = [_pass_seconds(model, part)]
    while len(times) < PASSES and time.perf_counter() + times[-1] <= end:
        times.append(_pass_seconds(model, part))
    (few, least), (many, most) = kept[-2:]
    per_token = (most - least) / (many - few) if many > few else most / many
    trained = beginning(micro, max(PROBE_TOKENS), plan.is_pairs)
    return Probed(
        per_token,
        max(0, int(most - per_token * many)),
        trained.num_loss_tokens / len(trained.ids),
        statistics.median_low(times) / count,
    )


def beginning(micro: MicroBatch, tokens: int, is_pairs: bool) -> MicroBatch:
    """Return the first whole sequences or pairs of a micro-batch that have at most `tokens` tokens together. If the
    first one alone has more, it is cut, a pair to one sequence, and its last token is trained."""
    first = cut(micro, tokens, is_pairs)[0]
    if len(first.ids) <= tokens:
        return first
    mask = first.loss_mask[:tokens].copy()
    mask[-1] = 1
    ends = np.array([0, tokens], np.int32)
    return MicroBatch(first.ids[:tokens], mask, ends, tokens, first.samples[:1], int(mask.sum()))


def _pass_seconds(model: Model, micro: MicroBatch) -> float:
    """Return the seconds of a forward and backward pass."""
    device = model.head_weight.device
    batch = to_device(micro, device)
    begun = time.perf_counter()
    with autocast(device):
        loss = -token_logps_of(model, batch).sum()
    loss.backward()
    _synchronize(device)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - begun


def kept_bytes(model: Model, micro: MicroBatch) -> int:
    """Return the bytes that the model's forward pass keeps for its backward pass, without the weights themselves and
    the logits. Blocks are not checkpointed during the measurement."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    batch = to_device(micro, model.head_weight.device)

    def note(tensor: Tensor) -> Tensor:
        """Count the storage of a saved tensor once, unless it belongs to a weight."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # returning the tensor itself would create a reference cycle with its autograd graph

    checkpoints_blocks, model.checkpoints_blocks = model.checkpoints_blocks, False
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(batch.ids.device):
        hidden = model(batch.ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    del hidden
    model.checkpoints_blocks = checkpoints_blocks
    return sum(kept.values())


# --- the machine


@cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of a square matrix product in `dtype`, for the report's model FLOPs utilization
    (MFU): the best of four, about 20 ms on a CPU core. Measured once per process."""
    size = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        _synchronize(device)
        begun = time.perf_counter()
        torch.mm(matrix, matrix)
        _synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best


def used_bytes(device: torch.device) -> int:
    """Return the bytes of memory in use now: allocated by torch on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that this process may use, including those it uses already: on CUDA the free ones and
    those torch has reserved, else the smallest limit of machine, container (cgroup) and process (rlimits)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    memory = psutil.virtual_memory()
    limits = [memory.total, memory.available + used_bytes(device)]
    limit, current = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and current and limit[0].isdigit():
        limits.append(int(limit[0]) - int(current[0]) + used_bytes(device))
    with suppress(ImportError):  # Windows has no such limits
        import resource

        softs = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        limits += [soft for soft in softs if soft != resource.RLIM_INFINITY]
    return min(limits)


def _lines(path: str) -> list[str]:
    """Return the lines of a text file; empty if it cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
