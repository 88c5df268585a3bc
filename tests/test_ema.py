"""The running average: its rule, and that a run offers the average and goes on with the weights in training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_data import Data
from train_runs import at_step, config_of, interrupt, lines

from mmdata.shards.dataset import open_dataset
from mmdata.shards.loader import Loader
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint
from mmtrain.config import TrainOptions
from mmtrain.inference.evaluate import evaluate
from mmtrain.train.ema import Average
from mmtrain.train.loop import train


def test_the_average_follows_its_rule() -> None:
    model = nn.Linear(3, 2)
    average = Average(model, 0.5)
    expected = model.weight.detach().double()
    for step in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.full((2, 3), float(step)))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.in_place():
        assert torch.allclose(model.weight.double(), expected, atol=1e-5)


def test_in_place_brings_the_weights_back_even_after_an_error() -> None:
    model = nn.Linear(3, 2)
    average = Average(model, 0.9)
    before = model.weight.clone()
    place = model.weight.data_ptr()
    with torch.no_grad():
        model.weight += 1
    with pytest.raises(RuntimeError, match="mine"), average.in_place() as in_training:
        assert torch.equal(model.weight, before) and torch.equal(in_training["weight"], before + 1)
        raise RuntimeError("mine")
    assert torch.equal(model.weight, before + 1) and model.weight.data_ptr() == place


def test_frozen_parameters_are_not_copied() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    with Average(model, 0.9).in_place() as in_training:
        assert set(in_training) == {"bias"}


def test_a_run_offers_its_average_and_trains_as_without(data: Data, tmp_path: Path) -> None:
    plain = config_of("sft", data, tmp_path / "plain", model="tiny", quiet=True)
    averaged = replace(plain, out=tmp_path / "averaged", ema=0.8)
    train(plain)
    train(averaged)
    trained = [[line["loss"] for line in lines(run.out) if "loss" in line] for run in (plain, averaged)]
    assert trained[0] == trained[1]
    found = checkpoint.find(averaged.out)
    weights, optimizer = load_file(found.dir / checkpoint.WEIGHTS), load_file(found.dir / checkpoint.OPTIMIZER)
    for name, value in checkpoint.load_model(plain.out)[0].state_dict().items():
        assert torch.equal(optimizer[f"extra/{name}"], value) and not torch.equal(weights[name], value)
    loader = Loader([open_dataset(data.sft)], split="val", batch_tokens=1024, seed=0)
    figures = evaluate(checkpoint.load_model(averaged.out)[0], loader, Tokenizer.load(averaged.out / "tokenizer"))
    assert figures["loss"] == pytest.approx(lines(averaged.out)[-1]["val_loss"], rel=1e-6)


def test_an_averaged_run_resumes_to_the_last_bit(data: Data, tmp_path: Path) -> None:
    whole, broken = (config_of("sft", data, tmp_path / name, model="tiny", ema=0.7) for name in ("whole", "broken"))
    train(replace(whole, quiet=True))
    with pytest.raises(KeyboardInterrupt):
        train(broken, log=at_step(5, interrupt))
    train(TrainOptions("sft", (), broken.out, resume=True, device="cpu", quiet=True))
    assert lines(broken.out) == lines(whole.out)
    ends = [checkpoint.find(run.out) for run in (whole, broken)]
    assert ends[0].state.files == ends[1].state.files
