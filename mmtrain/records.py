"""Records in the JSON files of a run: run.json, and the state.json of its checkpoints. Does not import torch.

Fields that are UNSET are not written. Fields with a default may be missing, so that runs of older versions open.
"""

from pathlib import Path
from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

from mmdata.errors import CheckpointError
from mmdata.io.records import read_record
from mmtrain.config import ModelConfig, SettingValues

RUN = "run.json"


class StartRecord(Struct):
    """The weights a run started from: checkpoint directory (empty for new weights), their hash, and with
    --resize-embeddings the method and the ids that were added."""

    dir: str
    weights_sha256: str
    resize_embeddings: str | UnsetType = UNSET
    added_ids: str | UnsetType = UNSET


# --- state.json -----------------------------------------------------------------------------------------------------


class FileRecord(Struct):
    """Size and sha256 of a file of a checkpoint."""

    bytes: int
    sha256: str


class BestRecord(Struct):
    """The step with the lowest val loss so far, and that loss."""

    step: int
    val_loss: float


class TrainedOn(Struct):
    """The data of a run: digest and directories of its datasets, their weights, their tokenizer; and the run's start."""

    digest: str = ""
    dirs: list[str] = []
    weights: list[float] | UnsetType | None = UNSET
    tokenizer_sha256: str = ""
    init: StartRecord | None = None


class CheckpointState(Struct):
    """state.json: what a checkpoint holds besides tensors. `files` are named relative to its directory."""

    format_version: int
    files: dict[str, FileRecord]
    step: int
    model: ModelConfig
    settings: SettingValues  # TrainSettings by name, and the stage
    data: TrainedOn
    best: BestRecord | None = None


# --- run.json -------------------------------------------------------------------------------------------------------


class SettingRecord(Struct):
    """The value of a setting and its origin: flag, checkpoint, preset or default."""

    value: Any
    origin: str = field(name="from")


class DataRecord(Struct, kw_only=True):
    """A dataset of a run; `share` is its share of the tokens of an epoch."""

    dir: str
    kind: str = ""
    digest: str
    share: float = 1.0


class ResumeRecord(Struct):
    """When, at which step and on what a run was resumed."""

    step: int
    time: float
    world_size: int
    device: str


class ReferenceRecord(StartRecord, kw_only=True):
    """The reference of dpo: its weights and shape; the file of its logps, and the precision they were computed in."""

    shape: ModelConfig
    path: str = ""
    precision: str = ""


class RunRecord(Struct):
    """run.json: what a run is, what it trains on, where each setting came from, and how it ended."""

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
    matmul_flops: float | UnsetType = UNSET  # of one large product, per second
    fill: float | UnsetType = UNSET  # share of tokens in padded rows, for comparison
    precision: str | UnsetType = UNSET
    world_size: int | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    preflight: dict[str, Any] | UnsetType = UNSET  # preflight.Needs
    trackers: dict[str, str] | UnsetType = UNSET  # name -> open, or why it failed
    reference: ReferenceRecord | UnsetType = UNSET
    forecast: dict[str, float] | UnsetType = UNSET
    start_val: dict[str, float] | UnsetType = UNSET  # held-out figures before the first step of dpo
    resumed: list[ResumeRecord] | UnsetType = UNSET
    final_step: int | UnsetType = UNSET
    result: dict[str, Any] | UnsetType = UNSET  # loop.TrainResult
    ended: float | UnsetType | None = UNSET
    imported: dict[str, str] | UnsetType = UNSET  # source of the weights of `mm import`


def read_run(run_dir: Path) -> RunRecord:
    """A run's run.json; CheckpointError when it is missing or unreadable."""
    return read_record(run_dir / RUN, RunRecord, CheckpointError, "give a run directory of `mm train`")
