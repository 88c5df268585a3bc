"""What a run will take, before its first step: memory by part, time, disk. A short measured probe, then arithmetic.

The probe runs the model forward and backward on a few hundred of the run's own tokens: what autograd keeps a token is
counted, not guessed, and the pace is timed. It changes no weight and draws no random number. Costs a second or a few.
"""

import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdata.errors import DiskError, TrainError
from mmdata.shards.loader import Loader, MicroBatch
from mmtrain.config import ModelConfig
from mmtrain.distributed import World, ranks_here
from mmtrain.log.metrics import duration
from mmtrain.model.batch import cut, to_device, token_logps_of
from mmtrain.model.logps import CHUNK
from mmtrain.model.model import Model
from mmtrain.model.precision import autocast
from mmtrain.train.plan import Plan

PROBE_TOKENS = 512
SLACK = 0.4  # of what comes and goes, glibc keeps beside: measured 0.34 at 1M, 0.5 at 26M parameters
HEADROOM = 0.95  # of the free memory may be planned for
MOST_MICRO_TOKENS = 131_072  # more makes no card faster
MOST_CHECKPOINTED_TOKENS = (
    8192  # who asks for --checkpoint-activations wants little memory, and fills a card with these too
)


@dataclass(frozen=True)
class Needs:
    """What a rank will take. Memory in bytes by part; `largest_micro_tokens` is what fits (0: not one sample)."""

    num_params: int
    tokens_per_epoch: int
    num_steps: int
    batch_tokens: int
    micro_tokens: int
    parts: Mapping[str, int]
    free_bytes: int
    seconds: float
    tokens_per_s: float
    disk_bytes: int
    free_disk_bytes: int
    largest_micro_tokens: int

    @property
    def peak_bytes(self) -> int:
        """Memory at its highest."""
        return sum(self.parts.values())

    def line(self) -> str:
        """The forecast in a line."""
        return (
            f"takes: {self.peak_bytes / 1e9:.1f} of {self.free_bytes / 1e9:.1f} GB memory at {self.micro_tokens:,} tokens "
            f"at once, {self.disk_bytes / 1e9:.2f} of {self.free_disk_bytes / 1e9:.0f} GB disk, about "
            f"{duration(self.seconds)} at {self.tokens_per_s:,.0f} tokens/s"
        )

    def as_json(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self) | {"peak_bytes": self.peak_bytes}


@dataclass(frozen=True)
class Memory:
    """What a rank's memory is made of, in bytes: parts that are there in any case, and what a token at once adds.

    `kept` are the bytes a token that a forward pass keeps, `trained_share` the tokens that meet the output matrix;
    `slack` is the share of what comes and goes that the allocator keeps beside.
    """

    fixed: Mapping[str, int]
    kept: float
    trained_share: float
    shape: ModelConfig
    slack: float

    def parts(self, micro_tokens: int) -> dict[str, int]:
        """Bytes by part with this many tokens at once."""
        rows = min(CHUNK, micro_tokens * self.trained_share)
        head = 2 * 4 * rows * self.shape.vocab_size + 2 * 4 * self.shape.vocab_size * self.shape.hidden_size
        sizes = {"activations": int(self.kept * micro_tokens), "logits and their gradient": int(head)}
        return {**self.fixed, **sizes, "allocator's slack": int(self.slack * sum(sizes.values()))}

    def largest(self, cell_tokens: int, free: int, *, width: float = 1.0) -> int:
        """The most tokens at once, a power of two times `cell_tokens`, that take no more than `free` bytes (0: not even one
        cell); `width` real tokens stand for one of them."""
        found, tokens = 0, cell_tokens
        while tokens <= MOST_MICRO_TOKENS and sum(self.parts(int(tokens * width)).values()) <= free:
            found, tokens = tokens, 2 * tokens
        return found


def used_bytes(device: torch.device) -> int:
    """Memory in use now: allocated on the CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the most so far, which at a run's start is about the same
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: of the CUDA device, else of the machine, its container and this process's own limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024 + used_bytes(device))
    limit, current = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and current and limit[0].isdigit():
        limits.append(int(limit[0]) - int(current[0]) + used_bytes(device))
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft = resource.getrlimit(kind)[0]
        limits += [soft] if soft != resource.RLIM_INFINITY else []
    return min(limits)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def measure(plan: Plan, model: Model, *, base_bytes: int, world: World) -> Needs:
    """Needs a run of `model`, which stands on its device. `base_bytes` were in use before it was built; the run's
    ranks on this machine share its memory."""
    device, settings = model.head_weight.device, plan.settings
    micro = _probe_batch(plan)
    tokens = len(micro.ids)
    kept, weights_copy, seconds = _probe(model, micro, plan.stage.kind == "pair")
    if model.checkpoints_blocks:  # every block's input, and one block's insides at a time
        kept = kept / plan.shape.num_layers + 4 * plan.shape.hidden_size * plan.shape.num_layers
    num_trainable = sum(p.numel() for p in model.parameters())
    if settings.lora:
        linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
        num_trainable = sum(settings.lora * (layer.in_features + layer.out_features) for layer in linear)
    state = {"adamw": 8, "muon": 4}.get(settings.optimizer, 8) * num_trainable
    if settings.optimizer == "muon":
        state += 4 * model.head_weight.numel()
    average = 4 * num_trainable if settings.ema else 0
    saved = 4 * (num_trainable if settings.lora else plan.shape.num_params) + state + average
    is_cuda = device.type == "cuda"
    fixed = {
        "program and data": base_bytes,
        "weights": 4 * plan.shape.num_params,
        "gradient": 4 * num_trainable,
        "optimizer": state,
        "average of the weights": average,
        "low-precision weights": weights_copy,
        "checkpoint copy": 0 if is_cuda else saved,
    }
    memory = Memory(fixed, kept, micro.num_loss_tokens / tokens, plan.shape, 0.0 if is_cuda else SLACK)
    free = int(HEADROOM * free_bytes(device)) // (1 if is_cuda else ranks_here(world))
    cell = plan.loader.cell_tokens if isinstance(plan.loader, Loader) else 2 * plan.datasets[0].max_len
    nominal = 1.0 if is_cuda else micro_width(plan)  # there micro-batches are filled up
    epoch_tokens = plan.loader.tokens_per_epoch
    run_tokens = plan.num_steps * epoch_tokens / max(1, plan.loader.steps_per_epoch)
    validations = 1 + (plan.num_steps // settings.val_every if settings.val_every else 0)
    val_tokens = plan.val_loader.tokens_per_epoch * validations / 3  # a forward pass is a third of the work
    pace = tokens / seconds * world.size
    root = next(path for path in (plan.config.out, *plan.config.out.absolute().parents) if path.exists())
    return Needs(
        num_params=plan.shape.num_params,
        tokens_per_epoch=epoch_tokens,
        num_steps=plan.num_steps,
        batch_tokens=settings.batch_tokens,
        micro_tokens=settings.micro_tokens,
        parts=memory.parts(int(settings.micro_tokens * nominal)),
        free_bytes=free,
        seconds=(run_tokens + val_tokens) / pace,
        tokens_per_s=pace,
        disk_bytes=saved * (settings.keep_last + 2),  # the best, and the one being written
        free_disk_bytes=shutil.disk_usage(root).free,
        largest_micro_tokens=memory.largest(cell, free, width=nominal),
    )


def micro_width(plan: Plan) -> float:
    """Real tokens a nominal token of a micro-batch stands for: packs are nearly full; pairs are counted as they are."""
    if not isinstance(plan.loader, Loader):
        return 1.0
    micros = plan.loader.batch(0)
    cell = plan.loader.cell_tokens
    nominal = max(min(plan.settings.micro_tokens, plan.settings.batch_tokens) // cell, 1) * cell
    return max((len(micro.ids) for micro in micros), default=nominal) / nominal


def check(needs: Needs, device: torch.device) -> None:
    """Refuse a run that cannot fit its memory or its disk; the error names the largest micro-batch that does."""
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
            "make room, keep fewer (--keep-last 1), or choose another --out",
        )


def fitting(plan: Plan, needs: Needs, device: torch.device) -> int:
    """The micro-batch a run gets that was given none: on CUDA the largest that fits, at most the batch (with checkpointed
    activations MOST_CHECKPOINTED_TOKENS); on the CPU, where more than MICRO_TOKENS is no faster, no more than those."""
    on_cuda = MOST_CHECKPOINTED_TOKENS if plan.config.checkpoint_activations else MOST_MICRO_TOKENS
    usual = needs.micro_tokens if device.type == "cpu" else on_cuda
    most = min(usual, max(plan.settings.batch_tokens, plan.datasets[0].max_len))
    return min(most, needs.largest_micro_tokens) or needs.micro_tokens


def _probe_batch(plan: Plan) -> MicroBatch:
    """About PROBE_TOKENS of the run's first step, documents left whole."""
    micros = plan.loader.batch(0) or [next(plan.loader.micro_batches())]
    return cut(micros[0], PROBE_TOKENS, plan.stage.kind == "pair")[0]


def _probe(model: Model, micro: MicroBatch, is_pairs: bool) -> tuple[float, int, float]:
    """Bytes autograd keeps a token, bytes it keeps whatever the tokens (low-precision weights), seconds of a forward and
    backward. The gradients it leaves are zeroed by the first step."""
    device = model.head_weight.device
    half = cut(micro, max(1, len(micro.ids) // 2), is_pairs)[0]
    few, many = (kept_bytes(model, part) for part in (half, micro))
    grown = len(micro.ids) - len(half.ids)
    per_token = (many - few) / grown if grown else many / len(micro.ids)
    batch = to_device(micro, device)
    times = []
    for _ in range(2):  # the first warms up
        begun = time.perf_counter()
        with autocast(device):
            loss = -token_logps_of(model, batch).sum()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    model.zero_grad(set_to_none=True)
    return per_token, max(0, int(many - per_token * len(micro.ids))), min(times)


def kept_bytes(model: Model, micro: MicroBatch) -> int:
    """Bytes of the tensors a forward pass keeps for its backward, weights and head left out."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    batch = to_device(micro, model.head_weight.device)

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold on to its own graph for ever

    checkpoints_blocks, model.checkpoints_blocks = model.checkpoints_blocks, False
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(batch.ids.device):
        hidden = model(batch.ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    del hidden
    model.checkpoints_blocks = checkpoints_blocks
    return sum(kept.values())
