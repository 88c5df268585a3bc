"""The records in the JSON files of a run: run.json, and state.json in each checkpoint. This module imports no torch.

A field that is UNSET is not written. A field with a default may be missing, so that files of older versions can be
read.
"""

from pathlib import Path
from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

from mmdata.errors import CheckpointError
from mmdata.io.records import read_record
from mmtrain.config import SettingValues
from mmtrain.shapes import ModelConfig

RUN = "run.json"


class StartRecord(Struct):
    """The weights that a run started from. dir: the checkpoint directory, empty for new weights. weights_sha256: their
    hash. With --resize-embeddings also the method and the added token ids as ranges, such as "300-301"."""

    dir: str
    weights_sha256: str
    resize_embeddings: str | UnsetType = UNSET
    added_ids: str | UnsetType = UNSET


# --- state.json


class FileRecord(Struct):
    """The size in bytes and the sha256 of a file that belongs to a checkpoint."""

    bytes: int
    sha256: str


class BestRecord(Struct):
    """The step with the lowest val loss so far, and that loss."""

    step: int
    val_loss: float


class TrainedOn(Struct):
    """What a run was trained on. digest: identifies the datasets with their weights. dirs: dataset directories.
    weights: the share of the tokens that each dataset provides; None if every sample is taken once per epoch.
    tokenizer_sha256: of the datasets' tokenizer. init: the weights the run started from."""

    digest: str = ""
    dirs: list[str] = []
    weights: list[float] | UnsetType | None = UNSET
    tokenizer_sha256: str = ""
    init: StartRecord | None = None


class CheckpointState(Struct):
    """state.json of a checkpoint: everything except tensors. files: size and hash of each file, by its path relative to
    the checkpoint directory. step: optimizer steps done. best: None without a validation."""

    format_version: int
    files: dict[str, FileRecord]
    step: int
    model: ModelConfig
    settings: SettingValues  # the fields of TrainSettings by name, and `stage`
    data: TrainedOn
    best: BestRecord | None = None


# --- run.json


class SettingRecord(Struct):
    """The value of a setting and where it came from ("from" in the file): flag, checkpoint, preset, default, or
    "data: RULE" for a default that follows from the size of the data (see mmtrain.sizing)."""

    value: Any
    origin: str = field(name="from")


class DataRecord(Struct, kw_only=True):
    """A dataset of a run. dir: its directory. kind: document, conversation or pair. digest: identifies its content.
    share: its share of the tokens of an epoch, 0 to 1."""

    dir: str
    kind: str = ""
    digest: str
    share: float = 1.0


class ResumeRecord(Struct):
    """One resumption of a run. step: optimizer steps done before it. time: when, in Unix time. world_size: number of
    ranks. device: such as "cpu" or "cuda:0"."""

    step: int
    time: float
    world_size: int
    device: str


class ReferenceRecord(StartRecord, kw_only=True):
    """The reference model of a dpo run; the inherited fields identify its weights. shape: its model shape. path: the
    file with its logps. precision: the type that they were computed in, such as "float32"."""

    shape: ModelConfig
    path: str = ""
    precision: str = ""


class RunRecord(Struct):
    """run.json: the settings of a run, its data, model and machine, and how it ended. started, ended: Unix time in
    seconds. num_steps: planned optimizer steps. final_step: those that were done."""

    stage: str = "?"
    status: str = "?"  # running, finished, interrupted or failed
    started: float | None = None
    settings: dict[str, SettingRecord] = {}
    model: ModelConfig | None = None
    num_params: int = 0
    num_steps: int = 0
    init: StartRecord | None = None
    data_digest: str | UnsetType = UNSET
    data: list[DataRecord] = []
    tokenizer_sha256: str | UnsetType = UNSET
    device: str | UnsetType = UNSET
    device_name: str | UnsetType = UNSET
    matmul_flops: float | UnsetType = UNSET  # operations per second, measured on one large matrix product
    fill: float | UnsetType = UNSET  # share of positions with tokens if samples were padded instead of packed
    precision: str | UnsetType = UNSET
    world_size: int | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    preflight: dict[str, Any] | UnsetType = UNSET  # memory, time and disk forecast, the fields of preflight.Needs
    trackers: dict[str, str] | UnsetType = UNSET  # name of the tracker -> "open", or why it failed
    reference: ReferenceRecord | UnsetType = UNSET
    forecast: dict[str, float] | UnsetType = UNSET
    start_val: dict[str, float] | UnsetType = UNSET  # metrics of the val split before the first step of dpo
    resumed: list[ResumeRecord] | UnsetType = UNSET
    final_step: int | UnsetType = UNSET
    result: dict[str, Any] | UnsetType = UNSET  # the fields of loop.TrainResult
    ended: float | UnsetType | None = UNSET
    imported: dict[str, str] | UnsetType = UNSET  # where `mm import` took the weights from


def read_run(run_dir: Path) -> RunRecord:
    """Read run.json of a run. Raises CheckpointError if it is missing, malformed or has fields of wrong types."""
    return read_record(run_dir / RUN, RunRecord, CheckpointError, "give a run directory of `mm train`")
