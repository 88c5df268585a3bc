"""A checkpoint is complete and verified, or it is not there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdata.errors import CheckpointError
from mmtrain import checkpoint
from mmtrain.model.model import Model
from mmtrain.records import TrainedOn
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.train.optim import flat_gradient, make, update


def trained(steps: int = 2) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(replace(MODEL_SHAPES["tiny"], vocab_size=50))
    optimizer, gradient = make(model, "adamw", lr=0.01, weight_decay=0.1), flat_gradient(model)
    for _ in range(steps):
        gradient.normal_()
        update(optimizer, gradient, lr=0.01, count=1, clip=1.0)
    return model, optimizer


def save(run: Path, step: int, *, keep_last: int = 2) -> tuple[Model, torch.optim.Optimizer]:
    model, optimizer = trained(step)
    settings = {"stage": "sft"}
    checkpoint.save(run, model, optimizer, step=step, settings=settings, data=TrainedOn("d"), keep_last=keep_last)
    return model, optimizer


def test_restoring_brings_back_weights_moments_and_random_state(tmp_path: Path) -> None:
    model, optimizer = save(tmp_path, 2)
    expected = torch.rand(3)
    fresh = Model(model.config)
    fresh_optimizer = make(fresh, "adamw", lr=0.01, weight_decay=0.1)
    found = checkpoint.find(tmp_path)
    checkpoint.restore(found, fresh, fresh_optimizer)
    assert found.step == 2 and torch.equal(torch.rand(3), expected)
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh_optimizer.state[b][key]), (name, key)


def test_loading_gives_the_model_its_shape_and_the_state(tmp_path: Path) -> None:
    model, _ = save(tmp_path, 1)
    for path in (tmp_path, tmp_path / "checkpoints" / "step-1"):
        loaded, shape, state = checkpoint.load_model(path)
        assert shape == model.config and state.step == 1
        assert torch.equal(loaded.head_weight, model.head_weight)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-2"]
    assert checkpoint.find(tmp_path).dir.name == "step-10"


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_found(tmp_path: Path, file: str, harm: str) -> None:
    save(tmp_path, 1), save(tmp_path, 2)
    newest = tmp_path / "checkpoints" / "step-2"
    content = bytearray((newest / file).read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(content if harm == "flip" else content[:-10])
    with pytest.raises(CheckpointError, match=file):
        checkpoint.open_checkpoint(newest)
    found = checkpoint.find(tmp_path)
    assert found.step == 1 and checkpoint.newer_than(found) == [newest]


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step-2.partial").mkdir()
    (tmp_path / "checkpoints" / "step-3").mkdir()  # without state.json
    assert checkpoint.find(tmp_path).step == 1


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    model, optimizer = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    writer = checkpoint.Writer(tmp_path, keep_last=2)
    writer.save(model, optimizer, step=2, settings={}, data=TrainedOn())
    writer.settle()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    writer.wait()
    assert writer.last == tmp_path / "checkpoints" / "step-2"
    assert writer.last is not None
    saved = load_file(writer.last / "model.safetensors")
    assert set(saved) == set(before) and all(torch.equal(saved[name], value) for name, value in before.items())


def test_what_goes_wrong_in_the_thread_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left")

    model, optimizer = trained()
    writer = checkpoint.Writer(tmp_path, keep_last=2)
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    writer.save(model, optimizer, step=2, settings={}, data=TrainedOn())
    with pytest.raises(CheckpointError, match="could not be saved"):
        writer.save(model, optimizer, step=3, settings={}, data=TrainedOn())


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-1").rename(tmp_path / "checkpoints" / ".step-1.old")
    (tmp_path / "checkpoints" / ".step-2.partial").mkdir()
    checkpoint.recover(tmp_path)
    assert checkpoint.find(tmp_path).step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_tensors_of_every_type_read_back_as_written(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(7).view(1, 7).to(dtype) for dtype in checkpoint.DTYPES}
    tensors["scalar"], tensors["empty"] = torch.tensor(2.5), torch.zeros(0, 3)
    facts = checkpoint.write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert facts.bytes == (tmp_path / "x.safetensors").stat().st_size
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    model, _ = save(tmp_path, 1)
    other = Model(replace(model.config, hidden_size=32, ffn_size=88))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        checkpoint.load_weights(checkpoint.find(tmp_path), other)


def test_an_empty_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        checkpoint.find(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)


def test_the_newest_finished_run_of_a_stage_is_found(tmp_path: Path) -> None:
    runs = {
        "old": {"stage": "sft", "status": "finished", "ended": 1.0},
        "new": {"stage": "sft", "status": "finished", "ended": 2.0},
        "open": {"stage": "sft", "status": "interrupted", "ended": 3.0},
        "dpo": {"stage": "dpo", "status": "finished", "ended": 4.0},
    }
    for name, facts in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text("{")
    assert checkpoint.find_run(tmp_path, ("pretrain", "sft")) == tmp_path / "new"
    assert checkpoint.find_run(tmp_path, ("pretrain",)) is None
    assert checkpoint.find_run(tmp_path, ("pretrain", "sft"), "interrupted") == tmp_path / "open"
