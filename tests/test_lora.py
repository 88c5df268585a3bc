"""Adapters: their gradients against full fine-tuning's, merging, peft's own reading of them, and runs of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_data import Data
from train_runs import at_step, config_of, interrupt, lines, steps

from mmdata.errors import CheckpointError
from mmdata.io.arrow import read_arrow
from mmdata.shards.dataset import open_dataset
from mmdata.shards.loader import Loader
from mmdata.shards.pairs import PairLoader
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint
from mmtrain.checkpoint import BASE, OPTIMIZER, WEIGHTS
from mmtrain.config import TrainOptions
from mmtrain.inference.evaluate import evaluate
from mmtrain.model.batch import logps_of, to_device, token_logps_of
from mmtrain.model.lora import SCALE, adapt, adapters_of, is_adapter, load_adapters, merge, peft_config
from mmtrain.model.model import Model
from mmtrain.shapes import ModelConfig
from mmtrain.train.loop import train

SHAPE = ModelConfig(300, 32, 2, 4, 2, 48, rope_theta=1e4, qk_norm=True)


@pytest.fixture(scope="module")
def base(data: Data, built_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A trained model to adapt."""

    def build(root: Path) -> None:
        train(config_of("sft", data, root / "sft", model="tiny", steps=20, lr=3e-3, quiet=True))

    return built_once("lora_base", build) / "sft"


def adapted(seed: int = 0, rank: int = 3) -> Model:
    """A model whose adapters do something."""
    torch.manual_seed(seed)
    model = Model(SHAPE)
    adapt(model, rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def merged(model: Model) -> Model:
    """The same function with whole weights, all of them to be trained."""
    whole = Model(SHAPE)
    weights = {name: value for name, value in model.state_dict().items() if not is_adapter(name)}
    whole.load_state_dict(merge(weights, adapters_of(model)))
    return whole


def batch_of(data: Data, number: int = 0):
    loader = Loader([open_dataset(data.sft)], batch_tokens=512, seed=number)
    return to_device(loader.batch(0)[0], torch.device("cpu"))


def test_an_adapted_model_begins_as_the_one_it_adapts(data: Data) -> None:
    torch.manual_seed(0)
    model = Model(SHAPE)
    before = token_logps_of(model, batch_of(data))
    adapt(model, 4)
    after = token_logps_of(model, batch_of(data))  # apart from the order of sums: plain layers share one product
    assert torch.allclose(after, before, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in model.state_dict() if is_adapter(name)
    }
    assert len(adapters_of(model)) == 2 * 7 * SHAPE.num_layers


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_are_those_of_full_fine_tuning_by_the_chain_rule(data: Data, seed: int) -> None:
    """y = x (W + s B A)^T, so with G the gradient of the merged weight: dA = s B^T G, dB = s G A^T."""
    model = adapted(seed)
    whole = merged(model)
    batch = batch_of(data, seed)
    losses = [-token_logps_of(each, batch).sum() for each in (model, whole)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    full = {name: p.grad for name, p in whole.named_parameters()}
    parameters = dict(model.named_parameters())
    num_checked = 0
    for name, a in parameters.items():
        if name.endswith("lora_A"):
            layer = name.removesuffix(".lora_A")
            b, gradient = parameters[f"{layer}.lora_B"], full[f"{layer}.weight"]
            assert gradient is not None and a.grad is not None and b.grad is not None
            for found, expected in ((a.grad, SCALE * b.T @ gradient), (b.grad, SCALE * gradient @ a.T)):
                assert (found - expected).norm() < 1e-4 * expected.norm(), name
            num_checked += 1
    assert num_checked == 7 * SHAPE.num_layers
    assert all(p.grad is None for name, p in parameters.items() if not is_adapter(name))


def test_merging_changes_nothing_that_was_given(data: Data) -> None:
    model = adapted()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    merged(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_adapters_of_another_rank_do_not_load() -> None:
    with pytest.raises(RuntimeError, match="another rank"):
        load_adapters(adapted(rank=3), adapters_of(adapted(rank=4)))


def test_the_configuration_names_what_peft_asks_for() -> None:
    found = peft_config(adapters_of(adapted(rank=5)))
    assert (found["r"], found["lora_alpha"], found["peft_type"]) == (5, 10.0, "LORA")
    assert found["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_of_adapters_learns_and_gives_merged_weights(data: Data, base: Path, tmp_path: Path) -> None:
    run = config_of("sft", data, tmp_path / "lora", init=base, lora=4, lr=5e-3, steps=24)
    said: list[str] = []
    train(run, log=said.append)
    assert any(line.startswith("adapters of rank 4: ") for line in said)
    losses = [line["loss"] for line in steps(run.out)]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])
    found = checkpoint.find(run.out)
    assert found.is_adapted and not (found.dir / WEIGHTS).exists()
    before, after = (checkpoint.read_weights(each) for each in (checkpoint.find(base), found))
    assert load_file(run.out / BASE).keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in load_file(run.out / BASE).items())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if "_proj" in name}
    loader = Loader([open_dataset(data.sft)], split="val", batch_tokens=1024, seed=0)
    figures = evaluate(checkpoint.load_model(run.out)[0], loader, Tokenizer.load(run.out / "tokenizer"))
    assert figures["loss"] == pytest.approx(lines(run.out)[-1]["val_loss"], rel=1e-5)
    sizes = [(each.dir / OPTIMIZER).stat().st_size for each in (checkpoint.find(base), found)]
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_a_run_of_adapters_resumes_to_the_last_bit(data: Data, base: Path, tmp_path: Path, ema: float) -> None:
    whole, broken = (
        config_of("sft", data, tmp_path / name, init=base, lora=4, ema=ema) for name in ("whole", "broken")
    )
    train(replace(whole, quiet=True))
    with pytest.raises(KeyboardInterrupt):
        train(broken, log=at_step(5, interrupt))
    train(TrainOptions("sft", (), broken.out, resume=True, device="cpu", quiet=True))
    assert lines(broken.out) == lines(whole.out)
    ends = [checkpoint.find(run.out) for run in (whole, broken)]
    assert ends[0].state.files == ends[1].state.files


def test_pairs_on_adapters_begin_at_ln_2_and_their_reference_is_the_base(
    data: Data, base: Path, tmp_path: Path
) -> None:
    data = replace(data, dpo=shutil.copytree(data.dpo, tmp_path / "pairs"))  # with a reference of its own beside it
    run = config_of("dpo", data, tmp_path / "dpo", init=base, lora=4, lr=2e-3)
    with pytest.raises(KeyboardInterrupt):
        train(run, log=at_step(5, interrupt))
    train(TrainOptions("dpo", (), run.out, resume=True, device="cpu", quiet=True))
    assert steps(run.out)[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert steps(run.out)[-1]["reward_margin"] > 0
    (cached,) = (tmp_path / "pairs.reference").glob("*.arrow")
    logps = np.stack([read_arrow(cached).column(side) for side in ("chosen", "rejected")], 1)
    model = checkpoint.load_model(base)[0]
    loader = PairLoader([open_dataset(data.dpo)], batch_tokens=2048, seed=0)
    batch = to_device(loader.batch(0)[0], torch.device("cpu"))
    with torch.no_grad():
        assert np.allclose(logps_of(model, batch).view(-1, 2), logps[batch.samples], atol=1e-3)


def test_a_stage_begins_from_merged_adapters(data: Data, base: Path, tmp_path: Path) -> None:
    """Full training, and adapters anew; both runs then stand without the first one's directory."""
    first = config_of("sft", data, tmp_path / "first", init=base, lora=2, quiet=True)
    train(first)
    weights = checkpoint.read_weights(checkpoint.find(first.out))
    dpo = config_of("dpo", data, tmp_path / "dpo", init=first.out, quiet=True, lr=1e-30)
    train(dpo)
    again = config_of("sft", data, tmp_path / "again", init=first.out, lora=2, quiet=True, lr=1e-30)
    train(again)
    shutil.rmtree(first.out)
    for run in (dpo, again):
        found = checkpoint.read_weights(checkpoint.find(run.out))
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in weights.items())


def test_a_damaged_base_is_noticed(data: Data, base: Path, tmp_path: Path) -> None:
    run = config_of("sft", data, tmp_path / "run", init=base, lora=2, quiet=True)
    train(run)
    whole = (run.out / BASE).read_bytes()
    (run.out / BASE).unlink()  # it is another name of the first run's file
    (run.out / BASE).write_bytes(whole[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError):
        checkpoint.find(run.out)
    with pytest.raises(CheckpointError, match=r"base\.safetensors: damaged"):
        checkpoint.open_checkpoint(run.out / "checkpoints" / "step-7")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
def test_peft_loads_a_checkpoint_and_computes_the_same_logits(data: Data, base: Path, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    run = config_of("sft", data, tmp_path / "run", init=base, lora=4, lr=5e-3, quiet=True)
    train(run)
    found = checkpoint.find(run.out)
    shape = found.model_config
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
    )
    llama = transformers.LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(load_file(run.out / BASE), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    theirs = peft.PeftModel.from_pretrained(llama, found.dir).eval()
    ours = checkpoint.load_model(run.out)[0].eval()
    ids = torch.randint(0, shape.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = ours(ids, torch.arange(40), torch.tensor([0, 40], dtype=torch.int32), 40)
        logits = hidden @ ours.head_weight.T
        assert (theirs(ids[None]).logits[0] - logits).abs().max() < 1e-4
        merged_theirs = theirs.merge_and_unload()
        assert (merged_theirs(ids[None]).logits[0] - logits).abs().max() < 1e-4
    assert json.loads((found.dir / "adapter_config.json").read_text())["r"] == 4
