"""Checkpoints in RUN/checkpoints/step-N: fp32 weights, optimizer state, step and random state. A run resumed from a
checkpoint continues exactly as it would have without the interruption.

A checkpoint is written to a hidden directory, flushed to disk, hashed and then renamed, so it is either complete or
absent; reading verifies the hashes. With AdamW it takes 12 bytes per parameter on disk, and as many in host memory.

A run with LoRA has only the adapters in its checkpoints, in the format of the PEFT library. The frozen weights that
they are added to are stored once, in RUN/base.safetensors.
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
from mmtrain.config import SettingValues
from mmtrain.model import lora
from mmtrain.model.model import Model
from mmtrain.records import (
    ADAPTERS,
    BASE,
    OPTIMIZER,
    RUN,
    WEIGHTS,
    BestRecord,
    CheckpointState,
    FileRecord,
    TrainedOn,
    checkpoints_of,
    read_run,
)
from mmtrain.shapes import ModelConfig

FORMAT_VERSION = 1
DTYPES = {  # torch type -> its name in safetensors files
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
STATE = "state.json"
ADAPTER_CONFIG = "adapter_config.json"  # the file name that the PEFT library looks for
EXTRA = "extra/"  # in the file OPTIMIZER: prefix of the names of tensors passed to `save` as `extra`


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified. dir: its directory. state: the content of its state.json."""

    dir: Path
    state: CheckpointState

    @property
    def step(self) -> int:
        """Return the number of optimizer steps that these weights were trained for."""
        return self.state.step

    @property
    def model_config(self) -> ModelConfig:
        """Return the shape of the model."""
        return self.state.model

    @property
    def weights_sha256(self) -> str:
        """Return the hash that identifies the weights; see `CheckpointState`."""
        return self.state.weights_sha256

    @property
    def is_adapted(self) -> bool:
        """Return whether the checkpoint contains LoRA adapters instead of weights."""
        return ADAPTERS in self.state.files

    @property
    def run_dir(self) -> Path:
        """Return the directory of the run that the checkpoint belongs to."""
        return self.dir.parent.parent


# --- writing


class Writer:
    """Saves the checkpoints of a run in a background thread, which first copies all tensors and then writes the copies.
    Call `settle` before changing weights or optimizer state; it rarely has to wait. An error in the thread is raised by
    the next `save` or `wait`. keep_last: number of newest checkpoints that are kept. is_active: True on the one rank
    that writes; it first cleans up after a killed process with `recover`."""

    def __init__(self, run_dir: Path, *, keep_last: int, is_active: bool = True):
        self.run_dir, self.keep_last = run_dir, keep_last
        self.last: Path | None = None  # the newest complete checkpoint that this Writer wrote
        self.stalled_s = 0.0  # seconds that the last save has blocked its callers so far
        self._copied = threading.Event()
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if is_active:
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
        """Start to write RUN/checkpoints/step-N with N = `step`, and return while a thread continues. Waits for an
        earlier save first, and raises its error: CheckpointError if its files could not be written. When the checkpoint
        is complete, all others but the newest `keep_last` and the `best` step are removed. No tensor may be changed
        until `settle` has returned. extra: further tensors by name, returned by `restore`."""
        self.wait()
        begun = time.monotonic()
        adapters = lora.adapters_of(model)
        weights = dict(adapters or model.state_dict())
        further = {f"{EXTRA}{name}": value for name, value in (extra or {}).items()}
        others = _optimizer_tensors(model, optimizer) | further
        devices = {value.device for value in weights.values() if value.device.type != "cpu"}
        if devices:  # copied here, on the stream that also runs the training step
            weights, others = self._copy("", weights), self._copy("optimizer/", others)
            torch.get_device_module(devices.pop()).synchronize()
        state = CheckpointState(FORMAT_VERSION, {}, step, model.config, dict(settings), data, best)
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=(weights, others, state), name="checkpoint")
        self._thread.start()
        self.stalled_s = time.monotonic() - begun

    def settle(self) -> None:
        """Wait until the thread has copied all tensors of the model and its optimizer, so that they may change."""
        if self._thread is not None and not self._copied.is_set():
            begun = time.monotonic()
            self._copied.wait()
            self.stalled_s += time.monotonic() - begun

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the thread's error: CheckpointError if writing files failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to host memory, reusing that of an earlier copy of equal shape and type; return the copies by
        name. Those from CUDA are asynchronous: the caller must synchronise. Copies made here are not copied again.
        prefix: separates groups of tensors."""
        for name, value in tensors.items():
            held = self._copies.get(prefix + name)
            if value is held:
                continue  # already copied
            if held is None or held.shape != value.shape or held.dtype != value.dtype:
                self._copies[prefix + name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._copies[prefix + name].copy_(value.detach(), non_blocking=value.is_cuda)
        return {name: self._copies[prefix + name] for name in tensors}

    def _run(self, weights: dict[str, Tensor], others: dict[str, Tensor], state: CheckpointState) -> None:
        """In the thread: copy the tensors, write the checkpoint, remove old ones. Errors are stored for `wait`."""
        with contextlib.suppress(OSError, AttributeError):  # lower the thread's priority where the system can
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            weights, others = self._copy("", weights), self._copy("optimizer/", others)
            self._copied.set()
            self.last = _write(self.run_dir, weights, others, state)
            kept = {self.last, *checkpoints_of(self.run_dir)[: self.keep_last]}
            if state.best is not None:
                kept.add(self.run_dir / "checkpoints" / f"step-{state.best.step}")
            for old in set(checkpoints_of(self.run_dir)) - kept:
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
    """Write RUN/checkpoints/step-N with N = `step`, wait until it is complete, and return its directory. All others of
    the run except the newest `keep_last` are removed. Raises OSError if files cannot be written."""
    writer = Writer(run_dir, keep_last=keep_last)
    writer.save(model, optimizer, step=step, settings=settings, data=data)
    try:
        writer.wait()
    except CheckpointError as error:
        raise error.__cause__ or error from None
    return run_dir / "checkpoints" / f"step-{step}"


def _write(run_dir: Path, weights: dict[str, Tensor], others: dict[str, Tensor], state: CheckpointState) -> Path:
    """Write the checkpoint of `state.step`, replacing any, with the tensors `weights` (or LoRA adapters) and `others`,
    fill in `state.files` and return its directory. On an error the incomplete directory is removed."""
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
    """Write RUN/base.safetensors, the frozen weights that a run's LoRA adapters are added to: if possible a hard link
    to the weights file of `init`, the checkpoint that the run starts from (None for new weights), else the weights of
    `model`, which has no adapters yet."""
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
    """Copy the weights of RUN/base.safetensors into a model without adapters."""
    model.load_state_dict(read_tensors(run_dir / BASE))


def recover(run_dir: Path) -> None:
    """Clean up after a killed process: remove incomplete checkpoints, and restore the old version of one that was being
    replaced unless the new version is complete."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        if path.suffix == ".old":
            files.restore_directory(path.with_name(path.name.removeprefix(".").removesuffix(".old")), path)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write contiguous CPU tensors as a safetensors file (length of the header in 8 bytes, JSON header, tensors), flush
    it to disk, and return its size and sha256. Unlike safetensors' own writer, this neither copies every tensor nor
    holds Python's global interpreter lock, and raises OSError for a full disk. metadata: texts for the header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, value in tensors.items():
        assert value.is_contiguous() and value.device.type == "cpu", name
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
    """Return the optimizer's state as STATE/PARAMETER, such as exp_avg/model.norm.weight, and torch's random state as
    rng/cpu and, if CUDA is available, rng/cuda."""
    tensors = {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


# --- reading


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name, on the CPU. Raises CheckpointError if it is damaged."""
    try:
        files.check_regular(path)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error})", "copy or download it again") from error


def restore(checkpoint: Checkpoint, model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Load a checkpoint's weights (or LoRA adapters), optimizer state and random state, in place. Return the `extra`
    tensors of `Writer.save`, by name. A model for adapters must have some already. Raises CheckpointError if the
    weights do not fit the model, or the random state is none, and RuntimeError if the adapters do not fit."""
    if checkpoint.is_adapted:
        lora.load_adapters(model, read_tensors(checkpoint.dir / ADAPTERS))
    else:
        load_weights(checkpoint, model)
    tensors = read_tensors(checkpoint.dir / OPTIMIZER)
    extra = {name.removeprefix(EXTRA): tensors.pop(name) for name in list(tensors) if name.startswith(EXTRA)}
    try:
        torch.set_rng_state(tensors.pop("rng/cpu"))
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.dir / OPTIMIZER}: its random state is missing or none ({error})") from error
    cuda_rng = tensors.pop("rng/cuda", None)
    if cuda_rng is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda_rng)
    for name, parameter in model.named_parameters():
        keys = {key.split("/")[0]: key for key in tensors if key.endswith(f"/{name}")}
        if keys:
            optimizer.state[parameter] = {part: tensors[key].to(parameter.device) for part, key in keys.items()}
    return extra


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read a checkpoint's weights, by name, on the CPU. LoRA adapters are added to the base weights."""
    if not checkpoint.is_adapted:
        return read_tensors(checkpoint.dir / WEIGHTS)
    return lora.merge(read_tensors(checkpoint.run_dir / BASE), read_tensors(checkpoint.dir / ADAPTERS))


def load_weights(
    checkpoint: Checkpoint, model: Model, *, change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
) -> None:
    """Copy a checkpoint's weights into a model, LoRA adapters added. change: maps the weights by name to those to copy,
    for example to enlarge the embedding. Raises CheckpointError if they do not fit the model or cannot be read."""
    try:
        weights = read_weights(checkpoint)
        model.load_state_dict(change(weights) if change else weights)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.dir}: its weights do not fit the model: {str(error).splitlines()[-1].strip()}",
            "train with the shape of this checkpoint, or choose another --init",
        ) from error


def weights_digest(model: Model) -> str:
    """Return the sha256 of names and fp32 values of a model's weights, to identify weights that are in no file."""
    sha256 = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha256.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[Model, ModelConfig, CheckpointState]:
    """Load a model without adapters; return it, its shape and the checkpoint's state.json. path: a checkpoint
    directory, or a run directory, whose newest undamaged checkpoint is used. Raises CheckpointError as `find` does."""
    checkpoint = find(path)
    with torch.device(device):
        model = Model(checkpoint.model_config)
    load_weights(checkpoint, model)
    return model, checkpoint.model_config, checkpoint.state


def find(path: Path) -> Checkpoint:
    """Open a checkpoint. path: a checkpoint directory, or a run directory, whose newest undamaged checkpoint is used.
    Raises CheckpointError if the checkpoint is damaged, or if the run has no undamaged one."""
    if (path / STATE).exists():
        return open_checkpoint(path)
    problem = "it holds no checkpoint" if path.exists() else "no such directory"
    for directory in checkpoints_of(path):
        try:
            return open_checkpoint(directory)
        except CheckpointError as error:
            if problem == "it holds no checkpoint":
                problem = f"none of its checkpoints is complete; of the newest: {error.message}"
    raise CheckpointError(
        f"{path}: {problem}", "give a run directory of `mm train`, or a checkpoints/step-N inside one"
    )


def newer_than(checkpoint: Checkpoint) -> list[Path]:
    """Return the checkpoint directories of the same run that are newer than `checkpoint`, newest first. If `find`
    returned this checkpoint, these are damaged."""
    newest_first = checkpoints_of(checkpoint.run_dir)
    return newest_first[: newest_first.index(checkpoint.dir)] if checkpoint.dir in newest_first else []


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint directory and verify the size and sha256 of each of its files. Raises CheckpointError, which
    names a missing or damaged file, also for another format version."""
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


def find_run(root: Path, stages: Sequence[str], status: str = "finished") -> Path | None:
    """Return the directory of the run that ended last, among runs of these stages and this status directly under
    `root`; None if there is none. Unreadable runs are skipped."""
    found: list[tuple[float, Path]] = []
    for path in root.glob(f"*/{RUN}"):
        with contextlib.suppress(CheckpointError):
            run = read_run(path.parent)
            if run.status == status and run.stage in stages:
                found.append((run.ended or 0.0, path.parent))
    return max(found)[1] if found else None


@cache
def _base_record(path: Path) -> FileRecord:
    """Return size and sha256 of a run's base weights, cached because a run never changes the file."""
    return FileRecord(*files.info_of(path))
