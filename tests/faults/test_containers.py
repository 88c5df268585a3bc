"""Damaged checkpoints, records of runs, tables and tokenizers; and paths that are no regular files."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damage import SEED, attack, attack_record, refusal, torn
from row_files import array, arrow, parquet

from mmdata.encode.rows import parse_row
from mmdata.errors import CheckpointError, MMError
from mmdata.io.lines import iter_lines
from mmdata.io.records import write_record
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.records import RUN, DataRecord, RunRecord, SettingRecord, StartRecord, TrainedOn
from mmtrain.shapes import MODEL_SHAPES

SHARES = [0.15, pytest.param(1.0, marks=pytest.mark.slow)]
NUMBERS = [10, pytest.param(400, marks=pytest.mark.slow)]


# --- runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint of a small model."""
    import torch

    from mmtrain import checkpoint
    from mmtrain.config import stage_defaults
    from mmtrain.model.model import Model
    from mmtrain.train.optim import make

    torch.manual_seed(0)
    model = Model(replace(MODEL_SHAPES["tiny"], vocab_size=20, hidden_size=16, ffn_size=16))
    settings = {**stage_defaults("sft"), "stage": "sft"}
    data = TrainedOn("d", ["shards/sft"], None, "0" * 64, StartRecord("runs/pretrain", "0" * 64))
    optimizer = make(model, "adamw", lr=0.01, weight_decay=0.1)
    checkpoint.save(tmp_path / "run", model, optimizer, step=3, settings=settings, data=data, keep_last=1)
    recorded = {name: SettingRecord(value, "default") for name, value in settings.items() if name != "stage"}
    record = RunRecord("sft", "finished", 1.0, recorded, model.config, model.config.num_params, 3)
    record.init, record.data, record.final_step = data.init, [DataRecord(dir="shards/sft", digest="d")], 3
    write_record(tmp_path / "run" / RUN, record)
    (tmp_path / "run" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "tokens": 9, "trained_tokens": 9, "tokens_per_s": 1.0}\n'
    )
    return tmp_path / "run"


def weights_of(run: Path) -> Any:
    """What `mm eval`, `chat`, `export`, `train --init` and `--resume` take from a checkpoint."""
    import torch

    from mmtrain import checkpoint
    from mmtrain.model.model import Model
    from mmtrain.train.optim import make

    model, shape, state = checkpoint.load_model(run)
    found = checkpoint.find(run)
    checkpoint.restore(found, model, make(Model(shape), "adamw", lr=0.01, weight_decay=0.1))
    values = torch.cat([value.flatten() for value in model.state_dict().values()])
    return shape, state.settings, state.step, found.weights_sha256, values.sum().item()


def figures_of(run: Path) -> Any:
    """What `mm report`, and the search for a run to start from, take from run.json and the jsonl files of a run."""
    from mmtrain import checkpoint
    from mmtrain.log.history import chain

    found = checkpoint.find_run(run.parent, ("sft",))
    if found is None:
        raise CheckpointError("no finished run", "")
    return json.dumps([found.name, chain(run)], default=str)


@pytest.mark.parametrize("share", SHARES)
def test_a_damaged_state(run: Path, share: float) -> None:
    counts = attack_record(run / "checkpoints/step-3/state.json", lambda: weights_of(run), share)
    assert counts["refused"] > counts["other"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_damaged_weights(run: Path, name: str, number: int) -> None:
    path = run / "checkpoints/step-3" / name
    contents = (("torn", one) for one in torn(path.read_bytes(), random.Random(SEED), number))
    attack(path, contents, lambda: weights_of(run), may_differ=False)


@pytest.mark.parametrize("number", NUMBERS)
def test_damaged_tensors_without_a_hash(run: Path, number: int) -> None:
    from mmtrain import checkpoint

    path = run / "checkpoints/step-3/model.safetensors"
    for content in torn(path.read_bytes()[:600], random.Random(SEED), number):
        path.write_bytes(content)
        refusal(lambda: len(checkpoint.read_tensors(path)))


@pytest.mark.parametrize("share", SHARES)
def test_a_damaged_record_of_a_run(run: Path, share: float) -> None:
    attack_record(run / RUN, lambda: figures_of(run), share)


@pytest.mark.parametrize("number", NUMBERS)
def test_damaged_metrics_are_left_out(run: Path, number: int) -> None:
    path = run / "metrics.jsonl"
    contents = (("torn", one) for one in torn(path.read_bytes(), random.Random(SEED), number))
    attack(path, contents, lambda: figures_of(run), may_differ=True)


@pytest.mark.parametrize("field", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [1.5e30, float("nan"), -1.0, 0.0])
def test_impossible_numbers_of_a_shape_are_refused(run: Path, field: str, value: float) -> None:
    path = run / "checkpoints/step-3/state.json"
    state = json.loads(path.read_bytes())
    del state["record_sha256"]
    state["model"][field] = value
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=f"model.{field}: expected"):
        weights_of(run)


@pytest.mark.parametrize(
    "files", [{}, {"optimizer.safetensors": {"bytes": 1, "sha256": "0"}}, {"/dev/zero": {"bytes": 0, "sha256": "0"}}]
)
def test_a_state_that_does_not_name_its_weights_is_refused(run: Path, files: dict[str, Any]) -> None:
    path = run / "checkpoints/step-3/state.json"
    state = {**json.loads(path.read_bytes()), "files": files}
    del state["record_sha256"]
    path.write_text(json.dumps(state))
    with pytest.raises(
        CheckpointError, match=r"state\.json: (files|`model\.safetensors`|model\.safetensors)|its files"
    ):
        weights_of(run)


# --- inputs


ROWS = [{"text": f"a row, the {i}th", "n": i} for i in range(9)]


def ipc(make: str) -> bytes:
    import pyarrow as pa

    return arrow(ROWS, getattr(pa.ipc, make))


MADE: dict[str, Callable[[], bytes]] = {
    "rows.parquet": lambda: parquet(ROWS),
    "rows.arrow": lambda: ipc("new_file"),
    "stream.arrow": lambda: ipc("new_stream"),
    "rows.json": lambda: array(ROWS),
    "rows.csv": lambda: b"text,n\n" + b"".join(b"row,%d\n" % i for i in range(9)),
    "rows.jsonl.gz": lambda: __import__("gzip").compress(
        b"".join(b'{"text": "row %d"}\n' % i for i in range(9)), mtime=0
    ),
    "rows.jsonl.xz": lambda: __import__("lzma").compress(b"".join(b'{"text": "row %d"}\n' % i for i in range(9))),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", MADE)
def test_damaged_inputs(tmp_path: Path, name: str, number: int) -> None:
    """Other rows may come of damage that the format does not notice."""
    path = tmp_path / name
    path.write_bytes(MADE[name]())

    def use() -> Any:
        rows = []
        for line in iter_lines(path):
            try:
                rows.append(parse_row(line.raw, "document"))
            except Exception as error:  # a row that cannot be used
                if type(error).__name__ != "BadRow":
                    raise
        return repr(rows)

    contents = (("torn", one) for one in torn(path.read_bytes(), random.Random(SEED), number))
    attack(path, contents, use, may_differ=True)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_tokenizers(tokenizer_dir: Path, tmp_path: Path, name: str, number: int) -> None:
    copy = Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))

    def use() -> Any:
        from mmdata.encode.template import Template

        tokenizer = Tokenizer.load(copy)
        template = Template(tokenizer)
        return tokenizer.vocab_size, tokenizer.encode_batch(["tide 灯塔"])[0].tolist(), template.ends

    contents = (("torn", one) for one in torn((copy / name).read_bytes(), random.Random(SEED), number))
    attack(copy / name, contents, use, may_differ=True)


# --- no regular files


def test_pipes_devices_loops_and_sparse_files_are_refused(tokenizer_dir: Path, run: Path, tmp_path: Path) -> None:
    from mmtrain import checkpoint

    copy = Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(9 * 2**30)
    uses: dict[Path, Callable[[], Any]] = {
        copy / "tokenizer.json": lambda: Tokenizer.load(copy),
        run / RUN: lambda: figures_of(run),
        run / "checkpoints/step-3/state.json": lambda: weights_of(run),
        run / "checkpoints/step-3/model.safetensors": lambda: weights_of(run),
    }
    for path, use in uses.items():
        content = path.read_bytes()
        for odd in ("pipe", "loop", "sparse"):
            path.unlink()
            path.symlink_to(tmp_path / odd)
            assert refusal(use)[1], (path, odd)
        path.unlink()
        path.write_bytes(content)
        path.unlink()
        path.symlink_to("/dev/zero")
        assert refusal(use)[1], path
        path.unlink()
        path.write_bytes(content)
        use()
    assert checkpoint.find(run).step == 3
    with pytest.raises(MMError):
        Tokenizer.load(tmp_path / "pipe")
