"""The reference's logps: right for every pair, and refused when they are another's or damaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_data import Data

from mmdata.errors import CheckpointError
from mmdata.shards.dataset import open_dataset
from mmdata.shards.pairs import PairLoader
from mmtrain.distributed import World
from mmtrain.model.batch import logps_of, to_device
from mmtrain.model.model import Model
from mmtrain.shapes import MODEL_SHAPES
from mmtrain.train import reference

KEY = {"weights": "w", "shape": "s", "data": "d", "precision": "float32", "reduction": "sum"}
LOGPS = {
    "train": torch.tensor([[-1.0, -2.0], [-4321.0987654321, -4.0]], dtype=torch.float64),  # float32 has no room for it
    "val": torch.zeros(0, 2, dtype=torch.float64),
}
CPU = torch.device("cpu")


def test_every_pair_gets_its_own_logps_whatever_the_cut(data: Data) -> None:
    dataset = open_dataset(data.dpo)
    torch.manual_seed(0)
    model = Model(replace(MODEL_SHAPES["tiny"], vocab_size=dataset.vocab_size))
    cuts = [
        PairLoader([dataset], batch_tokens=1024, seed=1, micro_tokens=n, share_prompt=n == 256) for n in (256, 8192)
    ]
    one, many = (reference.compute(model, loader, World(0, 1, CPU)) for loader in cuts)
    assert reference.differs(model, cuts[0], one, World(0, 1, CPU)) < 1e-5
    assert reference.differs(model, cuts[0], one + 0.1, World(0, 1, CPU)) > 1e-3
    assert (one - many).abs().max() < 1e-4 and (one < 0).all()
    for micro in cuts[1].batch(1):
        with torch.no_grad():
            again = logps_of(model, to_device(micro, CPU)).view(-1, 2)
        assert (one[micro.samples] - again).abs().max() < 1e-4


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    reference.save(tmp_path / "r", LOGPS, KEY)
    loaded = reference.load(tmp_path / "r", KEY)
    assert all(torch.equal(loaded[split], values) for split, values in LOGPS.items())


@pytest.mark.parametrize("name", list(KEY))
def test_logps_of_other_weights_data_or_precision_are_refused(tmp_path: Path, name: str) -> None:
    reference.save(tmp_path / "r", LOGPS, KEY)
    with pytest.raises(CheckpointError, match=name):
        reference.load(tmp_path / "r", KEY | {name: "other"})


@pytest.mark.parametrize("harm", ["cut", "half", "empty", "flip", "value", "remove"])
def test_a_damaged_file_is_refused(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "r"
    reference.save(path, LOGPS, KEY)
    content = path.read_bytes()
    path.unlink()
    at = content.index(b"\x00\x00\x00\x00\x00\x00\xf0\xbf")  # -1.0, the first value
    harmed = {
        "cut": content[:-3],
        "half": content[: len(content) // 2],
        "empty": b"",
        "flip": content[:-1] + bytes([content[-1] ^ 1]),
        "value": content[:at] + b"\x01" + content[at + 1 :],
    }
    if harm != "remove":
        path.write_bytes(harmed[harm])
    with pytest.raises(CheckpointError, match="damaged"):
        reference.load(path, KEY)


def test_a_cache_stands_beside_its_dataset_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    splits = {"train": 2, "val": 0}
    found = {reference.cache_path(tmp_path / "dpo", KEY | {name: "other"}, splits) for name in KEY}
    found |= {reference.cache_path(tmp_path / "dpo", KEY, each) for each in (splits, {"val": 2})}
    assert len(found) == len(KEY) + 2 and {path.parent for path in found} == {tmp_path / "dpo.reference"}
