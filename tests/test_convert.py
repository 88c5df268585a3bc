"""Models of other programs: read exactly, strictly, and without running anybody's code."""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import NORMED, SHAPE, make_tokenizer, seed_logits, seed_weights, weights

from mmdata.errors import CheckpointError, MMError, TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint
from mmtrain.convert.foreign import import_model, interleaved, model_with, open_model, read
from mmtrain.inference.engine import Engine
from mmtrain.inference.settings import Sampling
from mmtrain.shapes import ModelConfig


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        return model(ids, torch.arange(len(ids)), ends, len(ids)) @ model.head_weight.T


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def test_the_seeds_rotary_converts_exactly(tmp_path: Path) -> None:
    tensors = seed_weights(SHAPE)
    found = read(saved(tmp_path / "pretrain_64.pth", tensors))
    ids = torch.randint(300, (50,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        logits(model_with(found.shape, found.weights), ids), seed_logits(tensors, SHAPE, ids), atol=2e-5, rtol=1e-4
    )
    assert found.shape == SHAPE
    name = "model.layers.1.self_attn.k_proj.weight"  # and back: no value has changed, only its place
    assert torch.equal(interleaved(found.weights[name], SHAPE.head_size), tensors["layers.1.attention.wk.weight"])


@pytest.mark.parametrize("shape", [SHAPE, NORMED], ids=["2", "3"])
@pytest.mark.parametrize("wrap", ["plain", "module.", "_orig_mod.", "resume", "tables", "half"])
def test_later_eras_are_read_as_they_are(tmp_path: Path, shape: ModelConfig, wrap: str) -> None:
    tensors: dict[str, Any] = weights(shape)
    expected = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    if wrap.endswith("."):
        tensors = {wrap + name: value for name, value in tensors.items()}
    if wrap == "resume":
        tensors = {"model": tensors, "optimizer": {"state": {}}, "epoch": 1}
    if wrap == "tables":
        tensors = tensors | {"model.freqs_cos": torch.ones(4, 8), "model.freqs_sin": torch.ones(4, 8)}
    if wrap == "half":
        tensors = {name: value.half() for name, value in tensors.items()}
        expected = {name: value.half().float() for name, value in expected.items()}
    found = read(saved(tmp_path / "out" / "full_sft_64.pth", tensors))
    assert found.shape == shape
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("shape", [SHAPE, NORMED], ids=["llama", "qwen3"])
@pytest.mark.parametrize("shards", ["one", "several"])
def test_hugging_face_directories_give_the_logits_of_transformers(
    tmp_path: Path, shape: ModelConfig, shards: str
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, kind = (Qwen3Config, Qwen3ForCausalLM) if shape.qk_norm else (LlamaConfig, LlamaForCausalLM)
    torch.manual_seed(0)
    theirs = kind(
        config(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-4,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="100KB" if shards == "several" else "1GB")
    make_tokenizer(tmp_path / "hf")
    model, tokenizer = open_model(tmp_path / "hf")
    expected = ModelConfig(300, 64, 2, 4, 2, 96, 5000.0, 1e-4, qk_norm=shape.qk_norm, max_positions=512)
    assert (model.config, tokenizer.vocab_size) == (expected, 300)
    ids = torch.arange(40) * 7 % 300
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-4)


def test_minimind_directories_are_read_under_both_configurations(tmp_path: Path) -> None:
    for name, config, tensors in (
        ("seed", {"dim": 64, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-5, "max_seq_len": 512}, seed_weights(SHAPE)),
        ("since", {"num_attention_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}, weights(SHAPE)),
    ):
        saved(tmp_path / name / "pytorch_model.bin", tensors)
        (tmp_path / name / "config.json").write_text(
            json.dumps({"model_type": "minimind", "rope_theta": 1e6, **config})
        )
        found = read(tmp_path / name)
        assert found.shape == ModelConfig(300, 64, 2, 8, 2, 96, max_positions=512)
        assert found.origin.startswith("MiniMind")


def test_an_import_is_a_run(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model")  # where MiniMind keeps it
    path = saved(tmp_path / "out" / "full_sft_64.pth", weights(NORMED))
    made = import_model(path, tmp_path / "run")
    model, tokenizer = open_model(tmp_path / "run")
    found = checkpoint.find(tmp_path / "run")
    assert (made.num_params, model.config) == (NORMED.num_params, NORMED)
    assert found.state.data.tokenizer_sha256 == tokenizer.sha256
    assert checkpoint.find_run(tmp_path, ("imported",)) == tmp_path / "run"
    assert all(torch.equal(value, weights(NORMED)[name]) for name, value in model.state_dict().items())
    engine = Engine(model, tokenizer)
    row = engine.submit([1, 2, 3], Sampling(max_new_tokens=3))
    while not engine.is_idle:
        engine.step()
    assert row.ids
    with pytest.raises(UsageError, match="is already there"):
        import_model(path, tmp_path / "run")


class Code:
    """What a pickle can make the reader run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("RAN",)


def changed(**values: Any) -> dict[str, Any]:
    """A good state_dict with tensors replaced, or left out where None."""
    tensors = {**weights(SHAPE), **{name.replace("/", "."): value for name, value in values.items()}}
    return {name: value for name, value in tensors.items() if value is not None}


BAD = {
    "experts": (
        {**weights(SHAPE), "model.layers.0.mlp.shared_experts.0.up_proj.weight": torch.ones(2, 2)},
        r"\(MoE\) with another structure",
    ),
    "seed experts": (
        {**seed_weights(SHAPE), "layers.0.feed_forward.experts.0.w1.weight": torch.ones(2, 2)},
        r"\(MoE\)",
    ),
    "lora": ({"model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(2, 2)}, "LoRA adapters"),
    "missing": (changed(**{"model/norm/weight": None}), "lacks model.norm.weight"),
    "unexpected": (
        changed(**{"model/layers/1/self_attn/q_proj/bias": torch.ones(64)}),
        "has model.layers.1.self_attn.q_",
    ),
    "wrong shape": (
        changed(**{"model/layers/1/mlp/up_proj/weight": torch.ones(95, 64)}),
        r"up_proj.weight is .*\[95, 64\]",
    ),
    "untied": (changed(**{"lm_head/weight": torch.ones(300, 64)}), "is not its embedding"),
    "no heads": (changed(**{"model/layers/0/self_attn/k_proj/weight": torch.ones(15, 64)}), "no whole heads"),
    "integers": (changed(**{"model/norm/weight": torch.ones(64, dtype=torch.int64)}), "norm.weight is torch.int64"),
    "another model": ({"fc.weight": torch.ones(2, 2)}, "no model.embed_tokens.weight"),
    "no tensors": ({"epoch": 1}, "is no state_dict"),
    "empty": ({}, "is no state_dict"),
    "code": ({"weight": Code()}, "holds more than weights: it asks for posix.mkdir"),
    "a module": (torch.nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_model_is_refused_with_the_reason(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, reason = BAD[case]
    path = saved(tmp_path / "model.pth", content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(path)
    assert caught.value.fix
    assert not (tmp_path / "RAN").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pth", weights(SHAPE))
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "old.pth").write_bytes(pickle.dumps(Code()))
    for name in ("cut", "empty", "text", "old"):
        with pytest.raises(CheckpointError, match=f"{name}.pth"):
            read(tmp_path / f"{name}.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "none.pth")
    for name, fix in (("model.safetensors", "its directory"), ("model.gguf", "the Hugging Face directory that")):
        with pytest.raises(CheckpointError, match="neither a torch file") as caught:
            open_model(saved(tmp_path / name, {}))
        assert fix in str(caught.value.fix)


@pytest.mark.parametrize(
    "file", ["pointer.pth", "model.safetensors", "model-00001-of-00001.safetensors", "tokenizer.json"]
)
def test_git_lfs_pointers_are_named_with_the_command_that_fetches_the_file(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    if file.endswith("safetensors"):
        path = hf(tmp_path / "hf") / file
        if "-of-" in file:
            (path.parent / "model.safetensors").unlink()
            index = {"weight_map": {"model.norm.weight": file}}
            (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    elif file == "tokenizer.json":
        make_tokenizer(tmp_path)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 104857600\n")
    with pytest.raises((CheckpointError, TokenizerError), match=f"{file} is a Git LFS pointer") as caught:
        (Tokenizer.load if file == "tokenizer.json" else read)(path if file.endswith("pth") else path.parent)
    assert f"lfs pull --include {file}" in str(caught.value.fix)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = hf(tmp_path / "hf")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: no such file"):
        read(directory)


def hf(path: Path, **config: Any) -> Path:
    """A Hugging Face directory of the small Llama."""
    from safetensors.torch import save_file

    path.mkdir()
    save_file({k: v for k, v in weights(SHAPE).items() if k != "lm_head.weight"}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 8, **config}))
    return path


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "qwen2_moe"}, r"\(MoE\) with another structure"),
        ({"num_local_experts": 8}, r"\(MoE\) with another structure"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "experts in some of the layers only"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rotary scaling 'llama3'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"num_attention_heads": 7}, "no whole heads of 9"),
    ],
)
def test_configurations_of_other_models_are_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read(hf(tmp_path / "hf", **config))


def test_incomplete_directories_are_refused(tmp_path: Path) -> None:
    path = hf(tmp_path / "hf")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged or cut short"):
        read(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        read(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read(path)
    with pytest.raises(CheckpointError, match="neither a run nor a config"):
        read(tmp_path)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pth", weights(SHAPE))
    with pytest.raises(TokenizerError, match="has no tokenizer beside it"):
        import_model(path, tmp_path / "run")
    for size in (290, 303):
        make_tokenizer(tmp_path / f"t{size}", vocab_size=size)
        with pytest.raises(TokenizerError, match=f"another vocabulary: {size} ids, the model .* has 300"):
            import_model(path, tmp_path / "run", tokenizer_dir=tmp_path / f"t{size}")
    assert not (tmp_path / "run").exists()
    make_tokenizer(tmp_path / "tokenizer")
    import_model(path, tmp_path / "run")
    shutil.copytree(tmp_path / "t290", tmp_path / "run" / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(TokenizerError, match="not the tokenizer the run was trained with"):
        open_model(tmp_path / "run")


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(MMError, match="it holds no checkpoint"):
        open_model(tmp_path / "run")
