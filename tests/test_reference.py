"""The reference's logps: right for every pair, and refused when they are another's or damaged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_data import Data, make

from mmdata.errors import CheckpointError
from mmdata.loader import Loader
from mmdata.shards import open_dataset
from mmtrain import reference
from mmtrain.batch import logps_of, to_device
from mmtrain.config import PRESETS
from mmtrain.distributed import World
from mmtrain.model import Model

KEY = {"weights": "w", "data": "d", "precision": "torch.float32", "reduction": "sum"}
LOGPS = {"train": torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), "val": torch.zeros(0, 2)}
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Small packed datasets of all three row kinds."""
    return make(tmp_path_factory.getbasetemp() / "train_data")


def test_every_pair_gets_its_own_logps_whatever_the_cut(data: Data) -> None:
    dataset = open_dataset(data.dpo)
    torch.manual_seed(0)
    model = Model(replace(PRESETS["tiny"], vocab_size=dataset.vocab_size))
    cuts = [Loader([dataset], batch_tokens=1024, seed=1, micro_tokens=n, shuffle=False) for n in (256, 8192)]
    one, many = (reference.compute(model, loader, World(0, 1, CPU)) for loader in cuts)
    assert (one - many).abs().max() < 1e-4 and (one < 0).all()
    for micro in cuts[1].batch(3):
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


@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_a_damaged_file_is_refused(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "r"
    reference.save(path, LOGPS, KEY)
    content = path.read_bytes()
    path.unlink()
    if harm != "remove":
        path.write_bytes(content[:-3] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        reference.load(path, KEY)
