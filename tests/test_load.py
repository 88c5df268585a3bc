"""`mmdata.load`: the same tokens, labels and order for torch, polars and Hugging Face as `mm show` and `mm train` have."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import mmdata
from mmdata.errors import DatasetError, UsageError
from mmdata.pack.pipeline import PackResult
from mmdata.shards.dataset import open_dataset, sample_rows
from mmdata.shards.pairs import make_loader

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("document", "conversation", "pair")


def expected(record: dict[str, Any]) -> dict[str, Any]:
    """What `mm show --json` says of a sequence, with labels instead of masks."""
    columns = {name: value for name, value in record.items() if not name.endswith("_mask")}
    sides = [("input_ids", "loss_mask", "labels")] if "loss_mask" in record else []
    sides += [(f"{s}_ids", f"{s}_mask", f"{s}_labels") for s in ("chosen", "rejected") if f"{s}_mask" in record]
    for ids, mask, labels in sides:
        columns[labels] = [i if m else -100 for i, m in zip(record[ids], record[mask], strict=True)]
    return columns


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_the_samples_of_the_dataset(kind: str, packed: dict[str, PackResult]) -> None:
    dataset = open_dataset(packed[kind].out)
    for split in ("train", "val"):
        data = mmdata.load(str(packed[kind].out), split)
        every = [row for number in range(len(data)) for row in sample_rows(dataset, split, number)]
        wanted = [expected(row) for row in every]
        names = list(wanted[0])
        found = data.polars().select(names).collect().to_dicts()
        order = [(row["file"], row["line"], str(row)) for row in found]
        assert sorted(order) == sorted((row["file"], row["line"], str(row)) for row in wanted)
        lines = data.polars().filter(pl.col("line") == 5).select("line").collect()  # one column, without the others
        assert len(lines) == sum(row["line"] == 5 for row in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_loader(kind: str, packed: dict[str, PackResult]) -> None:
    batches = mmdata.load(packed[kind].out).torch(batch_tokens=1500, epochs=2, seed=3)
    size = 2**30 if kind == "pair" else 1500
    loader = make_loader([open_dataset(packed[kind].out)], batch_tokens=1500, micro_tokens=size, seed=3)
    assert len(batches) == 2 * loader.steps_per_epoch
    for step, batch in enumerate(batches):
        [micro] = loader.batch(step)
        ids, labels, positions = (batch[name][0].numpy() for name in ("input_ids", "labels", "position_ids"))
        assert np.array_equal(ids, micro.ids)
        assert np.array_equal(labels, np.where(micro.loss_mask == 1, ids, -100))
        assert np.array_equal(np.flatnonzero(positions == 0), micro.cu_seqlens[:-1])
        assert set(np.diff(positions[1:])[np.diff(positions[1:]) != 1].tolist()) <= {1 - n for n in range(2, 5000)}
    assert step == len(batches) - 1


def test_wrong_use_is_an_error_that_says_what_helps(packed: dict[str, PackResult], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no split 'test'"):
        mmdata.load(packed["pair"].out, "test")
    with pytest.raises(DatasetError):
        mmdata.load(tmp_path / "none")
    with pytest.raises(UsageError, match="3 is no path"):
        mmdata.load(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_tokens is 'many'"):
        mmdata.load(packed["pair"].out).torch("many")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_tokens is 0"):
        mmdata.load(packed["pair"].out).torch(0)


@pytest.mark.slow
def test_workers_of_a_data_loader_share_the_batches(packed: dict[str, PackResult]) -> None:
    from torch.utils.data import DataLoader

    batches = mmdata.load(packed["conversation"].out).torch(batch_tokens=1000)
    alone = [batch["input_ids"].tolist() for batch in batches]
    shared = [batch["input_ids"].tolist() for batch in DataLoader(batches, batch_size=None, num_workers=2)]
    assert shared == alone


@pytest.mark.slow
def test_a_model_of_transformers_computes_the_loss_of_each_sequence_alone(packed: dict[str, PackResult]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, **shape)).eval()
    batch = next(iter(mmdata.load(packed["conversation"].out).torch(batch_tokens=1000)))
    begins = torch.nonzero(batch["position_ids"][0] == 0)[:, 0].tolist()
    assert len(begins) > 1
    total = count = 0.0
    with torch.no_grad():
        whole = model(**batch, use_cache=False).loss
        for begin, end in zip(begins, [*begins[1:], batch["labels"].shape[1]], strict=True):
            labels = batch["labels"][:, begin:end]
            number = int((labels[:, 1:] >= 0).sum())
            total += float(model(input_ids=batch["input_ids"][:, begin:end], labels=labels).loss) * number
            count += number
    assert float(whole) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for an argument that TRL sets
def test_the_examples_of_the_documentation_run(
    packed: dict[str, PackResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/sft_512").symlink_to(packed["conversation"].out)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(block, scope)
    data = scope["data"]
    assert data.hf().to_dict() == data.polars().collect().to_dict(as_series=False)
    assert data.hf().cache_files  # mapped, not copied into memory
    pairs = mmdata.load(packed["pair"].out)
    assert pairs.hf().to_dict() == pairs.polars().collect().to_dict(as_series=False)
    files = "shards/sft_512/train/*/*.arrow"
    of_datasets = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert of_datasets.num_rows == len(pl.scan_ipc(files).collect()) == len(data)
