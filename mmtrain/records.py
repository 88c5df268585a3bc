"""The records in the JSON files of a run: run.json, and state.json in each checkpoint. This module imports no torch.

A field that is UNSET is not written. A field with a default may be missing, so that files of older versions can be
read.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType, field

from mmdata.errors import CheckpointError, UsageError
from mmdata.io.records import Count, Finite, PathText, Positive, Share, read_record
from mmtrain.config import SettingValues, check_values
from mmtrain.shapes import ModelConfig, check_heads

RUN = "run.json"
WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
ADAPTERS = "adapter_model.safetensors"  # the file name that the PEFT library looks for
BASE = "base.safetensors"  # in the run directory: the frozen weights of a run with LoRA


class StartRecord(Struct):
    """The weights that a run started from. dir: the checkpoint directory, empty for new weights. weights_sha256: their
    hash. With --resize-embeddings also the method and the added token ids as ranges, such as "300-301"."""

    dir: PathText
    weights_sha256: str
    resize_embeddings: str | UnsetType = UNSET
    added_ids: str | UnsetType = UNSET


# --- state.json


class FileRecord(Struct):
    """The size in bytes and the sha256 of a file that belongs to a checkpoint."""

    bytes: Count
    sha256: str


class BestRecord(Struct):
    """The step with the lowest val loss so far, and that loss. since: validations after it; older states lack it."""

    step: Count
    val_loss: Finite
    since: Count | UnsetType = UNSET


class TrainedOn(Struct):
    """What a run was trained on. digest: identifies the datasets with their weights. dirs: dataset directories.
    weights: the share of the tokens that each dataset provides; None if every sample is taken once per epoch.
    tokenizer_sha256: of the datasets' tokenizer. init: the weights the run started from."""

    digest: str = ""
    dirs: list[PathText] = []
    weights: list[Finite] | UnsetType | None = UNSET
    tokenizer_sha256: str = ""
    init: StartRecord | None = None


class CheckpointState(Struct):
    """state.json of a checkpoint: everything except tensors. files: size and hash of each file, by its path relative to
    the checkpoint directory. step: optimizer steps done. best: None without a validation."""

    format_version: int
    files: Annotated[dict[PathText, FileRecord], Meta(min_length=2)]
    step: Count
    model: ModelConfig
    settings: SettingValues  # the fields of TrainSettings by name, and `stage`
    data: TrainedOn
    best: BestRecord | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if a setting has no allowed value, the model's shape is impossible, or the files, if they are
        known already, lack the weights of that shape or the optimizer's state."""
        _check(self.model, self.settings)
        if not self.files:
            return
        if not isinstance(self.settings.get("stage"), str):
            raise ValueError("the setting stage is missing or not a text")
        weights = self.files.get(f"../../{BASE}" if ADAPTERS in self.files else WEIGHTS)
        if weights is None or OPTIMIZER not in self.files:
            raise ValueError(f"{WEIGHTS} or {OPTIMIZER} is not among its files")
        if weights.bytes < 4 * self.model.num_params:
            raise ValueError(
                f"a model of this shape has {self.model.num_params:,} parameters, more than its weights file"
            )

    @property
    def weights_sha256(self) -> str:
        """Return a hash that identifies the weights: the sha256 of the weights file, or, with adapters, of the
        concatenated hex hashes of the base weights file and the adapters file."""
        if ADAPTERS not in self.files:
            return self.files[WEIGHTS].sha256
        both = self.files[f"../../{BASE}"].sha256 + self.files[ADAPTERS].sha256
        return hashlib.sha256(both.encode()).hexdigest()


# --- run.json


class SettingRecord(Struct):
    """The value of a setting and where it came from ("from" in the file): flag, checkpoint, preset, default, or
    "data: RULE" for a default that follows from the size of the data (see mmtrain.sizing)."""

    value: Any
    origin: str = field(name="from")


class DataRecord(Struct, kw_only=True):
    """A dataset of a run. dir: its directory. kind: document, conversation or pair. digest: identifies its content.
    share: its share of the tokens of an epoch, 0 to 1."""

    dir: PathText
    kind: str = ""
    digest: str
    share: Share = 1.0


class ResumeRecord(Struct):
    """One resumption of a run. step: optimizer steps done before it. time: when, in Unix time. world_size: number of
    ranks. device: such as "cpu" or "cuda:0"."""

    step: Count
    time: Finite
    world_size: Positive
    device: str


class ReferenceRecord(StartRecord, kw_only=True):
    """The reference model of a dpo run; the inherited fields identify its weights. shape: its model shape. path: the
    file with its logps. precision: the type that they were computed in, such as "float32"."""

    shape: ModelConfig
    path: PathText = ""
    precision: str = ""


class RunRecord(Struct):
    """run.json: the settings of a run, its data, model and machine, and how it ended. started, ended: Unix time in
    seconds. num_steps: planned optimizer steps. final_step: those that were done."""

    stage: str = "?"
    status: str = "?"  # running, finished, interrupted or failed
    started: Finite | None = None
    settings: dict[str, SettingRecord] = {}
    model: ModelConfig | None = None
    num_params: Count = 0
    num_steps: Count = 0
    init: StartRecord | None = None
    data_digest: str | UnsetType = UNSET
    data: list[DataRecord] = []
    tokenizer_sha256: str | UnsetType = UNSET
    device: str | UnsetType = UNSET
    device_name: str | UnsetType = UNSET
    matmul_flops: Finite | UnsetType = UNSET  # operations per second, measured on one large matrix product
    sequence_length: Finite | UnsetType = UNSET  # mean over the tokens of a batch of their sequence's length in tokens
    fill: Share | UnsetType = UNSET  # share of positions with tokens if samples were padded instead of packed
    precision: str | UnsetType = UNSET
    world_size: Positive | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    preflight: dict[str, Any] | UnsetType = UNSET  # memory, time and disk forecast, the fields of preflight.Needs
    trackers: dict[str, str] | UnsetType = UNSET  # name of the tracker -> "open", or why it failed
    reference: ReferenceRecord | UnsetType = UNSET
    forecast: dict[str, float] | UnsetType = UNSET
    start_val: dict[str, float] | UnsetType = UNSET  # metrics of the val split before the first step of dpo
    resumed: list[ResumeRecord] | UnsetType = UNSET
    final_step: Count | UnsetType = UNSET
    result: dict[str, Any] | UnsetType = UNSET  # the fields of loop.TrainResult
    ended: Finite | UnsetType | None = UNSET
    imported: dict[str, str] | UnsetType = UNSET  # where `mm import` took the weights from

    def __post_init__(self) -> None:
        """Raise ValueError as that of `CheckpointState` does."""
        _check(self.model, {name: record.value for name, record in self.settings.items()})


def _check(shape: ModelConfig | None, settings: SettingValues) -> None:
    try:
        check_values(settings)
        if shape:
            check_heads(shape)
    except UsageError as error:
        raise ValueError(error.message) from error


# --- course.json, the record of `mm run`


class StepRecord(Struct, kw_only=True):
    """The last execution of a step of a recipe. key: hash of its words and inputs. status: running, done, interrupted or
    failed. begun: Unix time. seconds: of all attempts. process: id and creation time while it runs. outputs: hash of
    each path it wrote. bytes: size of these. printed: its output, if that is kept."""

    key: str
    status: str = "running"
    argv: list[str] = []
    begun: float = 0.0
    seconds: float = 0.0
    attempts: int = 1
    process: tuple[Positive, float] | None = None
    outputs: dict[str, str] = {}
    bytes: int = 0
    printed: str = ""


class CourseRecord(Struct, kw_only=True):
    """The steps of a recipe that were executed, by name. files: size, mtime (ns) and sha256 of files, by path."""

    recipe: str
    steps: dict[str, StepRecord] = {}
    files: dict[str, tuple[int, int, str]] = {}


def newest_state(run_dir: Path) -> CheckpointState | None:
    """Read state.json of a run's newest checkpoint; None if it has none. Raises CheckpointError if it is damaged."""
    paths = [path / "state.json" for path in checkpoints_of(run_dir) if (path / "state.json").exists()]
    return read_record(paths[0], CheckpointState, CheckpointError, "mm train --resume") if paths else None


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Return a run's checkpoint directories, complete or damaged, newest first."""
    steps = [(int(p.name[5:]), p) for p in run_dir.glob("checkpoints/step-*") if p.name[5:].isdecimal()]
    return [path for _, path in sorted(steps, reverse=True)]


def read_run(run_dir: Path) -> RunRecord:
    """Read run.json of a run. Raises CheckpointError if it is missing, malformed or has fields of wrong types."""
    return read_record(run_dir / RUN, RunRecord, CheckpointError, "give a run directory of `mm train`")
