"""An embedding grown for an extended tokenizer: old rows bit for bit, new ones as promised, and ids that must agree."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_data import Data, run_json
from train_runs import config_of

from mmdata.errors import CheckpointError, TokenizerError, UsageError
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.extend import extend
from mmtrain import checkpoint
from mmtrain.config import TrainOptions
from mmtrain.model.embeddings import EMBEDDING, Growth, grow
from mmtrain.train.loop import train

TOKENS = ["seven.", "<new>"]


@pytest.fixture(scope="module")
def more(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with shards of all kinds, packed with two tokens more."""
    root = tmp_path_factory.mktemp("more")
    extend(data.tokenizer, TOKENS, root / "tokenizer")
    for name in ("sft", "dpo"):
        source = data.tokenizer.parent / f"{name}.jsonl"
        pack([source], root / name, PackOptions(tokenizer=root / "tokenizer", max_len=128, val_fraction=0.1))
    return root


def sft_config(data: Data, runs: Path, more: Path, out: Path, method: str | None) -> TrainOptions:
    return replace(config_of("sft", data, out, init=runs / "pretrain", resize_embeddings=method), data=(more / "sft",))


@pytest.mark.parametrize("method", ["mean", "subtoken"])
def test_old_rows_stay_and_new_ones_are_means(data: Data, runs: Path, more: Path, tmp_path: Path, method: str) -> None:
    """With a rate of nearly 0, one step shows what the run began with."""
    settings = {"steps": 1, "lr": 1e-30, "weight_decay": 0.0}
    done = train(replace(sft_config(data, runs, more, tmp_path / "run", method), **settings, quiet=True))
    before, after = (checkpoint.load_model(path)[0].state_dict() for path in (runs / "pretrain", done.run_dir))
    old, new = before.pop(EMBEDDING), after.pop(EMBEDDING)
    assert new.shape == (302, old.shape[1]) and torch.equal(new[:300], old)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    tokenizer = Tokenizer.load(data.tokenizer)
    for row, token in enumerate(TOKENS, 300):
        ids = tokenizer.encode_batch([token])[0].tolist() if method == "subtoken" else list(range(300))
        torch.testing.assert_close(new[row], old[ids].mean(0))


def test_a_grown_run_goes_on_from_its_checkpoint_and_is_the_next_ones_start(
    data: Data, runs: Path, more: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    first = sft_config(data, runs, more, tmp_path / "sft", "mean")
    done = train(first, log=lines.append)
    assert any("has 302 rows: ids 300-301 are new" in line for line in lines)
    run = run_json(done.run_dir)
    assert run["model"]["vocab_size"] == 302 and run["init"]["resize_embeddings"] == "mean"
    assert (done.run_dir / "tokenizer" / "tokenizer.json").read_bytes() == (
        more / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    shutil.rmtree(done.run_dir / "checkpoints" / "step-7")  # as if killed after step 6
    again = train(replace(first, init=None, resize_embeddings=None, resume=True, quiet=True))
    one, other = (checkpoint.load_model(done.run_dir)[0].state_dict()[EMBEDDING], again.train_loss)
    assert len(one) == 302 and other == done.train_loss
    dpo = replace(config_of("dpo", data, tmp_path / "dpo", init=done.run_dir, quiet=True), data=(more / "dpo",))
    assert train(dpo).final_step == 7


def test_dpo_measures_from_the_grown_weights(data: Data, runs: Path, more: Path, tmp_path: Path) -> None:
    """Its first loss is ln 2 only if the reference is the grown model itself; the run checks that."""
    settings = replace(config_of("dpo", data, tmp_path / "dpo", init=runs / "sft", quiet=True), data=(more / "dpo",))
    done = train(replace(settings, resize_embeddings="subtoken"))
    assert checkpoint.load_model(done.run_dir)[1].vocab_size == 302
    assert train(replace(settings, init=None, resume=True)).final_step == 7


def test_what_does_not_extend_is_refused(data: Data, runs: Path, more: Path, tmp_path: Path) -> None:
    config = sft_config(data, runs, more, tmp_path / "run", "mean")
    with pytest.raises(TokenizerError, match="does not extend"):
        train(replace(config, data=(data.other,)))
    with pytest.raises(CheckpointError, match="packed with another tokenizer") as caught:
        train(replace(config, resize_embeddings=None))
    assert "--resize-embeddings" in caught.value.fix
    with pytest.raises(UsageError, match="--resize-embeddings most is unknown"):
        train(replace(config, resize_embeddings="most"))
    with pytest.raises(UsageError, match="starts from none"):
        train(replace(config, init=None, model="tiny"))
    with pytest.raises(UsageError, match="--lora leaves the embedding as it is"):
        train(replace(config, lora=4))
    with pytest.raises(TokenizerError, match="another tokenizer than"):
        train(replace(config, data=(more / "sft", data.sft)))
    assert not (tmp_path / "run").exists()


def test_rows_of_a_model_larger_than_its_tokenizer_are_kept_or_made() -> None:
    old = torch.arange(12.0).view(4, 3)
    found = grow({EMBEDDING: old, "x": old}, Growth("subtoken", 3, 6, {3: [0, 1], 4: [2]}))
    assert torch.equal(found[EMBEDDING][:3], old[:3]) and found["x"] is old
    assert torch.equal(found[EMBEDDING][3], old[:2].mean(0)) and torch.equal(found[EMBEDDING][4], old[2])
    assert torch.equal(found[EMBEDDING][5], old.mean(0))
    assert Growth("mean", 4, 4, {}).added_ids == "none"
    assert Growth("mean", 4, 6, {1: [], 2: [], 4: [], 5: []}).added_ids == "1-2, 4-5"
