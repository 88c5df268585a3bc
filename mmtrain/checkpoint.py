"""Checkpoints in RUN/checkpoints/step-N: fp32 weights, optimizer state, step and random state, to resume a run exactly.

A checkpoint is written to a hidden directory, synced, hashed and renamed: it is complete or absent. Reading verifies the
hashes. It takes 12 bytes per parameter on disk and as many in host memory: `Writer` copies the tensors and writes them while
training continues. A checkpoint of a run with LoRA holds the adapters only, in PEFT's format; the weights they belong to
stand once in RUN/base.safetensors, and reading merges both.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdata.errors import CheckpointError
from mmdata.io import files
from mmdata.io.records import read_record, write_record
from mmtrain.config import ModelConfig, SettingValues
from mmtrain.model import lora
from mmtrain.model.model import Model
from mmtrain.records import RUN, BestRecord, CheckpointState, FileRecord, TrainedOn, read_run

FORMAT_VERSION = 1
DTYPES = {  # safetensors' names of the types in a checkpoint
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the names that peft looks for
BASE = "base.safetensors"  # beside run.json
EXTRA = "extra/"  # prefix of the names of further tensors in OPTIMIZER


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its directory and its state.json."""

    dir: Path
    state: CheckpointState

    @property
    def step(self) -> int:
        """Number of optimizer steps these weights were trained for."""
        return self.state.step

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return self.state.model

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights file; with adapters, of the hashes of the base weights and the adapters."""
        recorded = self.state.files
        if not self.is_adapted:
            return recorded[WEIGHTS].sha256
        both = recorded[f"../../{BASE}"].sha256 + recorded[ADAPTERS].sha256
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def is_adapted(self) -> bool:
        """Whether it holds adapters instead of weights."""
        return ADAPTERS in self.state.files

    @property
    def run_dir(self) -> Path:
        """The run it belongs to."""
        return self.dir.parent.parent


# --- writing --------------------------------------------------------------------------------------------------------


class Writer:
    """Saves the checkpoints of a run in a thread, which first copies all tensors and then writes them.

    Call `settle` before weights or optimizer state change: it returns once they are copied. They do not change during the
    forward and backward passes of a step, so it rarely has to wait. The memory of the copies is reused. An error in the
    thread is raised by the next `save` or `wait`.
    """

    def __init__(self, run_dir: Path, *, keep_last: int, is_active: bool = True):
        self.run_dir, self.keep_last = run_dir, keep_last
        self.last: Path | None = None  # the newest complete checkpoint of this Writer
        self.stalled_s = 0.0  # how long the last save has blocked its caller so far
        self._copied = threading.Event()
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if is_active:  # only one rank writes
            recover(run_dir)

    def save(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        settings: SettingValues,
        data: TrainedOn,
        best: BestRecord | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start to write RUN/checkpoints/step-N. When it is complete, all but the newest `keep_last` checkpoints and that of
        the `best` step are removed.

        Waits for a save that is still running. No tensor may change before `settle` has returned. `extra` are further
        tensors by name, which `restore` returns.
        """
        self.wait()
        begun = time.monotonic()
        adapters = lora.adapters_of(model)
        weights = dict(adapters or model.state_dict())
        further = {f"{EXTRA}{name}": value for name, value in (extra or {}).items()}
        others = _optimizer_tensors(model, optimizer) | further
        if any(value.is_cuda for value in weights.values()):  # copied in the order of the device's other work
            weights, others = self._copy("", weights), self._copy("optimizer/", others)
            torch.cuda.synchronize()
        state = CheckpointState(FORMAT_VERSION, {}, step, model.config, dict(settings), data, best)
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=(weights, others, state), name="checkpoint")
        self._thread.start()
        self.stalled_s = time.monotonic() - begun

    def settle(self) -> None:
        """Return when nothing more is read from the model and its optimizer."""
        if self._thread is not None and not self._copied.is_set():
            begun = time.monotonic()
            self._copied.wait()
            self.stalled_s += time.monotonic() - begun

    def wait(self) -> None:
        """Return when nothing is being written; raises an error of the thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Host copies of these tensors, in memory that is kept from save to save."""
        for name, value in tensors.items():
            held = self._copies.get(prefix + name)
            if value is held:
                continue  # already copied
            if held is None or held.shape != value.shape or held.dtype != value.dtype:
                self._copies[prefix + name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._copies[prefix + name].copy_(value.detach(), non_blocking=True)
        return {name: self._copies[prefix + name] for name in tensors}

    def _run(self, weights: dict[str, Tensor], others: dict[str, Tensor], state: CheckpointState) -> None:
        """The thread: copy, write, remove old checkpoints."""
        with contextlib.suppress(OSError, AttributeError):  # a lower priority than training, on systems that have it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            weights, others = self._copy("", weights), self._copy("optimizer/", others)
            self._copied.set()
            self.last = _write(self.run_dir, weights, others, state)
            kept = {self.last, *_directories(self.run_dir)[: self.keep_last]}
            if state.best is not None:
                kept.add(self.run_dir / "checkpoints" / f"step-{state.best.step}")
            for old in set(_directories(self.run_dir)) - kept:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            self._error = CheckpointError(
                f"{self.run_dir}: step {state.step} could not be saved: {error}",
                "free disk space or repair the disk, then continue with --resume from the checkpoint before",
            )
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error
        finally:
            self._copied.set()


def save(
    run_dir: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    settings: SettingValues,
    data: TrainedOn,
    keep_last: int,
) -> Path:
    """Write RUN/checkpoints/step-N and remove all but the newest `keep_last`; returns the new directory."""
    writer = Writer(run_dir, keep_last=keep_last)
    writer.save(model, optimizer, step=step, settings=settings, data=data)
    writer.wait()
    return run_dir / "checkpoints" / f"step-{step}"


def _write(run_dir: Path, weights: dict[str, Tensor], others: dict[str, Tensor], state: CheckpointState) -> Path:
    """Write one checkpoint and fill in the files of its state; returns its directory. Nothing is left behind on failure."""
    is_adapted = all(lora.is_adapter(name.removesuffix(".weight")) for name in weights)
    final = run_dir / "checkpoints" / f"step-{state.step}"
    temporary, aside = (final.with_name(f".{final.name}.{suffix}") for suffix in ("partial", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensors = {OPTIMIZER: others, ADAPTERS if is_adapted else WEIGHTS: weights}
        state.files = {name: write_tensors(temporary / name, named) for name, named in tensors.items()}
        if is_adapted:
            written = files.write_json(temporary / ADAPTER_CONFIG, lora.peft_config(weights), indent=2)
            state.files |= {
                ADAPTER_CONFIG: FileRecord(*written),
                f"../../{BASE}": _base_record(run_dir / BASE),
            }
        write_record(temporary / STATE, state, indent=2)
        files.replace_directory(temporary, final, aside)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def save_base(run_dir: Path, model: Model, init: Checkpoint | None) -> None:
    """Keep the weights that a run adapts as RUN/base.safetensors: a hard link to the file of `init` where possible, else the
    weights of the model, which are those of `init` merged, or new ones."""
    path = run_dir / BASE
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if init is not None and not init.is_adapted:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(init.dir / WEIGHTS, path)
            return
    with files.atomic_path(path) as partial:
        write_tensors(partial, {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})


def load_base(run_dir: Path, model: Model) -> None:
    """Copy RUN/base.safetensors into a model without adapters."""
    model.load_state_dict(load_file(run_dir / BASE))


def recover(run_dir: Path) -> None:
    """Clean up after a killed process: restore a checkpoint that was about to be replaced, remove incomplete ones."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        if path.suffix == ".old":
            files.restore_directory(path.with_name(path.name.removeprefix(".").removesuffix(".old")), path)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write host tensors as a safetensors file and sync it; returns its size and hash.

    safetensors' own writer copies every tensor and holds Python's global lock meanwhile; this one streams and hashes them.
    The format: 8 bytes with the length of the header, a JSON header, then the bytes of each tensor.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, value in tensors.items():
        assert value.is_contiguous() and not value.is_cuda, name
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pieces = (value.reshape(-1).view(torch.uint8).numpy().data for value in tensors.values())
    sha256, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text, *pieces):
            sha256.update(piece)
            num_bytes += file.write(piece)
    files.sync(path)
    return FileRecord(num_bytes, sha256.hexdigest())


def _optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, such as exp_avg/model.norm.weight, and torch's random state."""
    tensors = {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


# --- reading --------------------------------------------------------------------------------------------------------


def restore(checkpoint: Checkpoint, model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Load a checkpoint's weights or adapters, optimizer state and random state; returns the `extra` tensors of `save`."""
    if checkpoint.is_adapted:
        lora.load_adapters(model, load_file(checkpoint.dir / ADAPTERS))
    else:
        load_weights(checkpoint, model)
    tensors = load_file(checkpoint.dir / OPTIMIZER)
    extra = {name.removeprefix(EXTRA): tensors.pop(name) for name in list(tensors) if name.startswith(EXTRA)}
    torch.set_rng_state(tensors.pop("rng/cpu"))
    cuda_rng = tensors.pop("rng/cuda", None)
    if cuda_rng is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_rng)
    for name, parameter in model.named_parameters():
        keys = {key.split("/")[0]: key for key in tensors if key.endswith(f"/{name}")}
        if keys:
            optimizer.state[parameter] = {part: tensors[key].to(parameter.device) for part, key in keys.items()}
    return extra


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's weights by name, fp32, with adapters merged into them."""
    if not checkpoint.is_adapted:
        return load_file(checkpoint.dir / WEIGHTS)
    return lora.merge(load_file(checkpoint.run_dir / BASE), load_file(checkpoint.dir / ADAPTERS))


def load_weights(
    checkpoint: Checkpoint, model: Model, *, change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
) -> None:
    """Copy a checkpoint's weights, passed through `change`, into a model. CheckpointError if names or shapes differ."""
    try:
        weights = read_weights(checkpoint)
        model.load_state_dict(change(weights) if change else weights)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.dir}: its weights do not fit the model: {str(error).splitlines()[-1].strip()}",
            "train with the shape of this checkpoint, or choose another --init",
        ) from error


def weights_digest(model: Model) -> str:
    """sha256 of the names and fp32 values of a model's weights, to identify weights that are in no file."""
    sha256 = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha256.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[Model, ModelConfig, CheckpointState]:
    """The model of a run's newest complete checkpoint, or of the checkpoint directory `path`, with its shape and state."""
    checkpoint = find(path)
    with torch.device(device):
        model = Model(checkpoint.model_config)
    load_weights(checkpoint, model)
    return model, checkpoint.model_config, checkpoint.state


def find(path: Path) -> Checkpoint:
    """Open the checkpoint directory `path`, or the newest complete checkpoint of the run `path`."""
    if (path / STATE).exists():
        return open_checkpoint(path)
    for directory in _directories(path):
        with contextlib.suppress(CheckpointError):
            return open_checkpoint(directory)
    problem = "none of its checkpoints is complete" if _directories(path) else "it holds no checkpoint"
    raise CheckpointError(
        f"{path}: {problem}", "give a run directory of `mm train`, or a checkpoints/step-N inside one"
    )


def newer_than(checkpoint: Checkpoint) -> list[Path]:
    """Newer checkpoint directories of the same run, which `find` skipped because they are damaged."""
    newest_first = _directories(checkpoint.run_dir)
    return newest_first[: newest_first.index(checkpoint.dir)] if checkpoint.dir in newest_first else []


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify one checkpoint directory; CheckpointError names the file that is missing or damaged."""
    fix = "use an older checkpoint of the run, or train again"
    if not (directory / STATE).exists():
        raise CheckpointError(f"{directory}: no {STATE}; not a complete checkpoint", fix)
    state = read_record(directory / STATE, CheckpointState, CheckpointError, fix)
    if state.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory}: checkpoint format {state.format_version}, expected {FORMAT_VERSION}",
            "use the version of mm that wrote it",
        )
    for name, expected in state.files.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else None
        if size != expected.bytes:
            actual = "it is missing" if size is None else f"it has {size}"
            raise CheckpointError(f"{path}: expected {expected.bytes} bytes, {actual}", fix)
        if files.sha256_of(path) != expected.sha256:
            raise CheckpointError(f"{path}: damaged, its sha256 is not the one in {STATE}", fix)
    return Checkpoint(directory, state)


def find_run(root: Path, stages: Sequence[str]) -> Path | None:
    """The newest finished run of one of these stages directly under `root`; None if there is none."""
    finished: list[tuple[float, Path]] = []
    for path in root.glob(f"*/{RUN}"):
        with contextlib.suppress(CheckpointError):
            run = read_run(path.parent)
            if run.status == "finished" and run.stage in stages:
                finished.append((run.ended or 0.0, path.parent))
    return max(finished)[1] if finished else None


def _directories(run_dir: Path) -> list[Path]:
    """A run's checkpoint directories, newest first."""
    steps = [(int(p.name[5:]), p) for p in (run_dir / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return [path for _, path in sorted(steps, reverse=True)]


@cache
def _base_record(path: Path) -> FileRecord:
    """Size and hash of a run's base weights, computed once: a run never changes them."""
    return FileRecord(*files.info_of(path))
