"""Everything needed to go on as if never stopped, in RUN/checkpoints/step-N: fp32 weights, optimizer, step, random state.

A checkpoint is written beside, flushed, hashed and renamed: it is complete or not there. Reading verifies the hashes.
Costs 12 bytes a parameter on disk, and as many in host memory: a Writer copies, and writes while training goes on. Of an
adapted model it holds the adapters alone, in PEFT's format; the weights they belong to stand once in
RUN/base.safetensors, and reading gives both merged.
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
from mmtrain.config import ModelConfig, as_json, model_config_from
from mmtrain.model import lora
from mmtrain.model.model import Model

FORMAT_VERSION = 1
DTYPES = {  # safetensors' names of the types that stand in a checkpoint
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the names peft looks for
BASE = "base.safetensors"  # beside run.json
EXTRA = "extra/"  # before the names of further tensors in OPTIMIZER


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its directory and what its state.json holds."""

    dir: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps behind these weights."""
        return self.state["step"]

    @property
    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        return model_config_from(self.state["model"])

    @property
    def weights_sha256(self) -> str:
        """Hash of the weights file; of an adapted model, of the hashes of its two."""
        files = self.state["files"]
        if not self.is_adapted:
            return files[WEIGHTS]["sha256"]
        both = files[f"../../{BASE}"]["sha256"] + files[ADAPTERS]["sha256"]
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def is_adapted(self) -> bool:
        """Whether it holds adapters instead of weights."""
        return ADAPTERS in self.state["files"]

    @property
    def run_dir(self) -> Path:
        """The run it belongs to."""
        return self.dir.parent.parent


class Writer:
    """Saves a run's checkpoints beside its training: a thread copies everything, then writes it.

    `settle` before weights or moments change returns once they are copied: they stand still through a step's forward and
    backward passes, so there is seldom anything to wait for. The copies are kept from save to save. What goes wrong in the
    thread is raised by the next `save` or `wait`.
    """

    def __init__(self, run_dir: Path, *, keep_last: int, is_active: bool = True):
        self.run_dir, self.keep_last = run_dir, keep_last
        self.last: Path | None = None  # the newest complete one this Writer made
        self.stalled_s = 0.0  # how long the last save has kept its caller so far
        self._copied = threading.Event()
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if is_active:  # one rank writes
            recover(run_dir)

    def save(
        self,
        model: Model,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        settings: Mapping[str, Any],
        data: Mapping[str, Any],
        best: Mapping[str, Any] | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin RUN/checkpoints/step-N; once it is complete, all but the newest `keep_last` and the best are removed.

        Nothing given may change before `settle` has returned. settings, data and best ({"step", "val_loss"}) are plain JSON values, kept in state.json; `extra` are further
        tensors by name, which `restore` gives back. Waits for the save before, should that still be running.
        """
        self.wait()
        begun = time.monotonic()
        adapters = lora.adapters_of(model)
        weights = dict(adapters or model.state_dict())
        further = {f"{EXTRA}{name}": value for name, value in (extra or {}).items()}
        others = _optimizer_tensors(model, optimizer) | further
        if any(value.is_cuda for value in weights.values()):  # copied in the order of the device's own work
            weights, others = self._copy("", weights), self._copy("optimizer/", others)
            torch.cuda.synchronize()
        state = {"step": step, "model": as_json(model.config), "settings": settings, "data": data, "best": best}
        arguments = (step, weights, others, state, bool(adapters))
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint")
        self._thread.start()
        self.stalled_s = time.monotonic() - begun

    def settle(self) -> None:
        """Return when nothing more is read from the model and its optimizer."""
        if self._thread is not None and not self._copied.is_set():
            begun = time.monotonic()
            self._copied.wait()
            self.stalled_s += time.monotonic() - begun

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Host copies of these tensors, in memory kept for them."""
        for name, value in tensors.items():
            if value is self._copies.get(prefix + name):
                continue  # already copied
            held = self._copies.get(prefix + name)
            if held is None or held.shape != value.shape or held.dtype != value.dtype:
                self._copies[prefix + name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._copies[prefix + name].copy_(value.detach(), non_blocking=True)
        return {name: self._copies[prefix + name] for name in tensors}

    def _run(
        self,
        step: int,
        weights: dict[str, Tensor],
        others: dict[str, Tensor],
        state: dict[str, Any],
        is_adapted: bool,
    ) -> None:
        """The thread: write, then remove what is old."""
        with contextlib.suppress(
            OSError, AttributeError
        ):  # where threads have a niceness of their own, training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            weights, others = self._copy("", weights), self._copy("optimizer/", others)
            self._copied.set()
            self.last = _write(self.run_dir, step, weights, others, state, is_adapted)
            kept = {self.last, *_directories(self.run_dir)[: self.keep_last]}
            if state["best"] is not None:
                kept.add(self.run_dir / "checkpoints" / f"step-{state['best']['step']}")
            for old in set(_directories(self.run_dir)) - kept:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            self._error = CheckpointError(
                f"{self.run_dir}: step {step} could not be saved: {error}",
                "make room on the disk (or mend it), then go on with --resume from the checkpoint before",
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
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    keep_last: int,
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write RUN/checkpoints/step-N at once, and remove all but the newest `keep_last`; gives the new directory."""
    writer = Writer(run_dir, keep_last=keep_last)
    writer.save(model, optimizer, step=step, settings=settings, data=data, extra=extra)
    writer.wait()
    return run_dir / "checkpoints" / f"step-{step}"


def _write(
    run_dir: Path,
    step: int,
    weights: dict[str, Tensor],
    others: dict[str, Tensor],
    state: dict[str, Any],
    is_adapted: bool,
) -> Path:
    """Write one checkpoint beside its place and rename it; gives its directory. On a failure nothing half-written stays."""
    root = run_dir / "checkpoints"
    final, temporary, replaced = (
        root / name for name in (f"step-{step}", f".step-{step}.partial", f".step-{step}.old")
    )
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        names = {OPTIMIZER: others, ADAPTERS if is_adapted else WEIGHTS: weights}
        files = {name: write_tensors(temporary / name, tensors) for name, tensors in names.items()}
        if is_adapted:
            text = json.dumps(lora.peft_config(weights), indent=2) + "\n"
            (temporary / ADAPTER_CONFIG).write_text(text)
            flush(temporary / ADAPTER_CONFIG)
            files |= {
                ADAPTER_CONFIG: _facts(temporary / ADAPTER_CONFIG),
                f"../../{BASE}": _facts_of_base(run_dir / BASE),
            }
        whole = {"format_version": FORMAT_VERSION, "files": files, **state}
        (temporary / STATE).write_text(json.dumps(whole, indent=2))
        for path in (temporary / STATE, temporary):
            flush(path)
        if final.exists():  # the same step saved before; `recover` brings it back if we are killed between the two
            final.rename(replaced)
        temporary.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        flush(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def save_base(run_dir: Path, model: Model, init: Checkpoint | None) -> None:
    """Keep the weights a run adapts as RUN/base.safetensors: the very file of `init` by another name where that can be,
    else the model's, which are those of `init` merged, or new."""
    path = run_dir / BASE
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if init is not None and not init.is_adapted:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(init.dir / WEIGHTS, path)
            return
    temporary = path.with_name(f".{BASE}.partial")
    write_tensors(temporary, {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    temporary.replace(path)


def load_base(run_dir: Path, model: Model) -> None:
    """Copy RUN/base.safetensors into a model without adapters."""
    model.load_state_dict(load_file(run_dir / BASE))


def recover(run_dir: Path) -> None:
    """Tidy up after a kill: a checkpoint that was about to be replaced is brought back, half-written ones are removed."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if path.suffix == ".old" and not final.exists():
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write host tensors as a safetensors file, flushed; gives its length and sha256.

    safetensors' own writer copies every tensor once more and holds Python's lock meanwhile; this one streams them, hashing on
    the way, and lets others run. The format: 8 bytes of header length, a JSON header, then the bytes of each tensor.
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
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "sha256": sha256.hexdigest()}


def _optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments and steps by parameter name, and torch's random state."""
    tensors = {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore(checkpoint: Checkpoint, model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Put a checkpoint's weights or adapters, moments and random state back in place; gives the `extra` it was saved with."""
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
    """A checkpoint's weights fp32 by name, adapters merged into them."""
    if not checkpoint.is_adapted:
        return load_file(checkpoint.dir / WEIGHTS)
    return lora.merge(load_file(checkpoint.run_dir / BASE), load_file(checkpoint.dir / ADAPTERS))


def load_weights(
    checkpoint: Checkpoint, model: Model, *, change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
) -> None:
    """Copy a checkpoint's weights, changed by `change`, into a model; CheckpointError where names or shapes differ."""
    try:
        weights = read_weights(checkpoint)
        model.load_state_dict(change(weights) if change else weights)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint.dir}: its weights do not fit the model: {str(error).splitlines()[-1].strip()}",
            "train with the shape of this checkpoint, or choose another --init",
        ) from error


def weights_digest(model: Model) -> str:
    """sha256 over names and fp32 values of a model's weights: the identity of weights that stand in no file."""
    sha256 = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha256.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[Model, ModelConfig, dict[str, Any]]:
    """The model of a run's newest complete checkpoint, or of the checkpoint directory itself; with its shape and state."""
    checkpoint = find(path)
    with torch.device(device):
        model = Model(checkpoint.model_config)
    load_weights(checkpoint, model)
    return model, checkpoint.model_config, checkpoint.state


def find(path: Path) -> Checkpoint:
    """The checkpoint at `path`, a checkpoint directory or a run; of a run the newest complete one."""
    if (path / STATE).exists():
        return open_checkpoint(path)
    for directory in _directories(path):
        with contextlib.suppress(CheckpointError):
            return open_checkpoint(directory)
    found = "none of its checkpoints is whole" if _directories(path) else "it holds no checkpoint"
    raise CheckpointError(f"{path}: {found}", "give a run directory of `mm train`, or a checkpoints/step-N inside one")


def newer_than(checkpoint: Checkpoint) -> list[Path]:
    """Checkpoint directories of the same run that `find` has passed over as damaged."""
    newest_first = _directories(checkpoint.run_dir)
    return newest_first[: newest_first.index(checkpoint.dir)] if checkpoint.dir in newest_first else []


def latest(run_dir: Path) -> Path:
    """Directory of a run's newest complete checkpoint."""
    return find(run_dir).dir


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify one checkpoint directory; CheckpointError names the file that is missing or damaged."""
    fix = "use an older checkpoint of the run, or train again"
    try:
        state = json.loads((directory / STATE).read_text())
        files = state["files"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory}: no {STATE}; not a complete checkpoint", fix) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / STATE}: not readable ({error})", fix) from error
    if state["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory}: checkpoint format {state['format_version']}, expected {FORMAT_VERSION}",
            "use the version of mm that wrote it",
        )
    for name, expected in files.items():
        path = directory / name
        if not path.exists() or path.stat().st_size != expected["bytes"]:
            found = f"{path.stat().st_size} bytes" if path.exists() else "nothing"
            raise CheckpointError(f"{path}: expected {expected['bytes']} bytes, found {found}", fix)
        if _facts(path)["sha256"] != expected["sha256"]:
            raise CheckpointError(f"{path}: damaged, its sha256 is not the one in {STATE}", fix)
    return Checkpoint(directory, state)


def read_run(run_dir: Path) -> dict[str, Any]:
    """A run's run.json; CheckpointError when it is missing or unreadable."""
    try:
        return json.loads((run_dir / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_dir}: no readable run.json", "give a run directory of `mm train`") from error


def find_run(root: Path, stages: Sequence[str]) -> Path | None:
    """The newest finished run of one of these stages directly under `root`; None where there is none."""
    found: list[tuple[float, Path]] = []
    for path in root.glob("*/run.json"):
        with contextlib.suppress(CheckpointError):
            run = read_run(path.parent)
            if run.get("status") == "finished" and run.get("stage") in stages:
                found.append((run.get("ended", 0.0), path.parent))
    return max(found)[1] if found else None


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file beside its place, flush it and rename it."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    temporary.replace(path)


def _directories(run_dir: Path) -> list[Path]:
    """A run's checkpoint directories, newest first."""
    steps = [(int(p.name[5:]), p) for p in (run_dir / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return [path for _, path in sorted(steps, reverse=True)]


@cache
def _facts_of_base(path: Path) -> dict[str, Any]:
    """The facts of a run's base weights, hashed once: a run never changes them."""
    return _facts(path)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def flush(path: Path) -> None:
    """Bring a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
