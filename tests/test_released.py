"""Released architectures: what mm computes, trains and exports is what transformers does, on small random models."""

import importlib.util
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import make_sentencepiece, make_tokenizer, transformers_model
from published import RELEASED
from train_data import Data
from train_runs import config_of

from mmdata.errors import CheckpointError, UsageError
from mmtrain.convert.architectures import DEFAULTS, read_config, shape_of_weights
from mmtrain.convert.export import export
from mmtrain.convert.foreign import import_model, open_model, read
from mmtrain.distributed import World
from mmtrain.inference.engine import Engine
from mmtrain.inference.settings import Sampling
from mmtrain.model.model import Model
from mmtrain.train.loop import train
from mmtrain.train.optim import learning_rate
from mmtrain.train.plan import make_plan


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        return model(ids, torch.arange(len(ids)), ends, len(ids)) @ model.head_weight.T


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


@pytest.mark.parametrize("name", RELEASED)
def test_published_configurations_give_every_tensor_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """In full size on torch's meta device; the numbers of parameters are the published ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = RELEASED[name]
    (tmp_path / "config.json").write_text(json.dumps(known.published))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known.published)).state_dict()
        shape = shape_of_weights(theirs, tmp_path, read_config(tmp_path), None)
        ours = Model(shape).state_dict()
    assert shape.num_params == known.num_params
    if shape.tied:
        del theirs["lm_head.weight"]
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", RELEASED)
def test_logits_answers_and_exports_are_those_of_transformers(name: str, tokenizer: Path, tmp_path: Path) -> None:
    known = RELEASED[name]
    theirs = transformers_model(known.model_type, tmp_path / "hf", tokenizer, **known.config)
    import_model(tmp_path / "hf", tmp_path / "run")
    model, tok = open_model(tmp_path / "run")
    assert {field: getattr(model.config, field) for field in known.shape} == known.shape
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params == theirs.num_parameters()
    ids = torch.randint(300, (120,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert (logits(model, ids) - expected).abs().max() < 1e-4

    row = Engine(model, tok).answer([ids[:70].tolist()], Sampling(max_new_tokens=8, temperature=0))[0]
    said = theirs.generate(ids[None, :70], do_sample=False, max_new_tokens=8, eos_token_id=tok.eos_id, pad_token_id=0)
    assert said[0, 70:].tolist() == row.ids + [tok.eos_id] * (row.finish_reason == "stop")

    made = export(tmp_path / "run", tmp_path / "out", format="hf")
    assert made.max_logit_difference is not None and made.max_logit_difference < 1e-4
    again = read(tmp_path / "out")
    assert again.shape == model.config
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.weights.items())


@pytest.mark.parametrize(
    "experts",
    [
        {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "norm_topk_prob": True,
            "moe_intermediate_size": 96,
            "head_dim": 16,
        },
        {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False, "moe_intermediate_size": 48},
    ],
)
def test_mixtures_of_experts_answer_as_in_transformers_and_are_not_trained_or_exported(
    experts: dict[str, Any], data: Data, tmp_path: Path
) -> None:
    """The first is minimind-3-moe's structure, also read from MiniMind's own file of weights."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = {"tie_word_embeddings": True, "rope_parameters": rope, "max_position_embeddings": 32768, **experts}
    theirs = transformers_model("qwen3_moe", tmp_path / "hf", data.tokenizer, **config)
    made = import_model(tmp_path / "hf", tmp_path / "run")
    assert made.num_params == made.shape.num_params == theirs.num_parameters()
    model, tok = open_model(tmp_path / "run")
    assert sum(p.numel() for p in model.parameters()) == made.num_params
    ids = torch.randint(300, (90,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert (logits(model, ids) - expected).abs().max() < 1e-4
    row = Engine(model, tok).answer([ids[:70].tolist()], Sampling(max_new_tokens=8, temperature=0))[0]
    said = theirs.generate(ids[None, :70], do_sample=False, max_new_tokens=8, eos_token_id=tok.eos_id, pad_token_id=0)
    assert said[0, 70:].tolist() == row.ids + [tok.eos_id] * (row.finish_reason == "stop")
    if experts["norm_topk_prob"]:
        torch.save(model.state_dict(), tmp_path / "full_sft_64_moe.pth")
        assert open_model(tmp_path / "full_sft_64_moe.pth", tokenizer_dir=data.tokenizer)[0].config == model.config
    with pytest.raises(UsageError, match="is a mixture of experts, which mm does not export"):
        export(tmp_path / "run", tmp_path / "out", format="hf")
    with pytest.raises(CheckpointError, match="is a mixture of experts, which mm does not train"):
        train(config_of("sft", data, tmp_path / "sft", init=tmp_path / "run", model=None))


@pytest.mark.parametrize("name", ["llama-3.2", "llama-2", "smollm3", "qwen2.5", "qwen3"])
def test_gguf_files_name_the_architecture_and_hold_every_tensor(name: str, tokenizer: Path, tmp_path: Path) -> None:
    import gguf

    known = RELEASED[name]
    transformers_model(known.model_type, tmp_path / "hf", tokenizer, **known.config)
    import_model(tmp_path / "hf", tmp_path / "run")
    made = export(tmp_path / "run", tmp_path / "out", format="gguf")
    assert made.checks[0].startswith("read back: every tensor is the checkpoint's, bit for bit")
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    assert reader.fields["general.architecture"].contents() == known.model_type
    names = {tensor.name: tensor for tensor in reader.tensors}
    assert ("output.weight" in names) == (not known.shape.get("tied", True))
    assert ("blk.1.attn_q.bias" in names) == (name == "qwen2.5")
    if name == "llama-3.2":  # the reference is transformers' own rope initialisation
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig.from_pretrained(tmp_path / "hf")
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
        stored = torch.from_numpy(names["rope_freqs.weight"].data.copy())
        torch.testing.assert_close(plain / stored, scaled, rtol=1e-5, atol=0)
        assert stored.min() == 1 and stored.max() > 31


def test_a_smollm3_with_other_layers_than_llama_cpps_is_refused_as_gguf(tokenizer: Path, tmp_path: Path) -> None:
    transformers_model("smollm3", tmp_path / "hf", tokenizer, num_hidden_layers=3, no_rope_layers=[0, 1, 1])
    import_model(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(UsageError, match=r"every fourth layer; this model in layers 0"):
        export(tmp_path / "run", tmp_path / "out", format="gguf")


# What a configuration must say at least; transformers has a default for everything else.
NEEDED = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}


@pytest.mark.parametrize("model_type", [name for name in DEFAULTS if name != "minimind"])
def test_missing_keys_take_transformers_defaults(model_type: str, tokenizer: Path, tmp_path: Path) -> None:
    window = {"sliding_window": None} if model_type == "mistral" else {}
    sizes = {"num_key_value_heads": 4, **({"head_dim": 128} if "qwen3" in model_type else {}), **window}
    if model_type == "qwen3_moe":
        sizes |= {"num_experts": 10, "moe_intermediate_size": 96}
    theirs = transformers_model(model_type, tmp_path / "hf", tokenizer, **sizes)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key in {*NEEDED, *window}}))
    model = open_model(tmp_path / "hf")[0]
    ids = torch.arange(40) * 7 % 300
    with torch.no_grad():
        assert (logits(model, ids) - theirs(ids[None]).logits[0]).abs().max() < 1e-4
    default, known = type(theirs.config)(), DEFAULTS[model_type]
    assert model.config.max_positions == known.max_positions == default.max_position_embeddings
    assert (known.num_heads, known.tied) == (default.num_attention_heads, default.tie_word_embeddings)
    assert (known.norm_eps, known.rope_theta) == (default.rms_norm_eps, default.default_theta)
    if model_type == "qwen3_moe":
        assert (known.experts_per_token, known.norm_experts) == (default.num_experts_per_tok, default.norm_topk_prob)
    assert known.sliding_window == (default.sliding_window if model_type == "mistral" else None)


def test_a_file_without_an_output_matrix_is_tied_unless_its_configuration_says_no(
    tokenizer: Path, tmp_path: Path
) -> None:
    transformers_model("llama", tmp_path / "hf", tokenizer, tie_word_embeddings=True)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    assert read(tmp_path / "hf").shape.tied
    path.write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        read(tmp_path / "hf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe", [True, False])
def test_halves_and_shards_are_read_value_for_value(
    dtype: torch.dtype, safe: bool, tokenizer: Path, tmp_path: Path
) -> None:
    theirs = transformers_model("qwen2", tmp_path / "hf", tokenizer, dtype=dtype, shards=safe)
    if not safe:  # as torch.save wrote it before safetensors
        for file in (tmp_path / "hf").glob("*.safetensors*"):
            file.unlink()
        torch.save(theirs.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    found = read(tmp_path / "hf").weights
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1 or not safe
    assert all(torch.equal(value, theirs.state_dict()[name].float()) for name, value in found.items())


REFUSED = {
    "gemma3": ({"model_type": "gemma3_text"}, "model_type 'gemma3_text' is not supported"),
    "yarn": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary scaling 'yarn'"),
    "half-known llama3": ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'llama3' without all its factors"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "mlp biases": ({"mlp_bias": True}, "mlp_bias"),
    "partial": ({"partial_rotary_factor": 0.5}, r"rotating a part \(0.5\)"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
    "window": (
        {"model_type": "mistral", "sliding_window": 128, "max_position_embeddings": 512},
        "window 128, below max_position_embeddings 512",
    ),
    "window by default": ({"model_type": "mistral"}, "window 4096, below max_position_embeddings 131072"),
    "qwen window": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_position_embeddings": 512},
        "window 64, below",
    ),
    "layers with windows": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
        "sliding window attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mm_has_not_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4, **config}))
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(tmp_path)
    assert caught.value.fix


def test_a_window_as_long_as_the_model_is_none(tokenizer: Path, tmp_path: Path) -> None:
    theirs = transformers_model("mistral", tmp_path / "hf", tokenizer, sliding_window=512)
    ids = torch.arange(100) * 7 % 300
    with torch.no_grad():
        assert (logits(open_model(tmp_path / "hf")[0], ids) - theirs(ids[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_ten_training_steps_have_the_losses_of_a_plain_transformers_loop(name: str, data: Data, tmp_path: Path) -> None:
    """The reference runs each document of a batch alone, with torch's AdamW, clipping and the same learning rates."""
    known = RELEASED[name]
    theirs = transformers_model(known.model_type, tmp_path / "hf", data.tokenizer, **known.config).train()
    import_model(tmp_path / "hf", tmp_path / "start")
    options = config_of("sft", data, tmp_path / "run", init=tmp_path / "start", model=None, steps=10, lr=1e-3)
    options = replace(options, weight_decay=0.1, quiet=True)
    train(options)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    ours = [line["loss"] for line in lines if "loss" in line]

    plan = make_plan(replace(options, out=tmp_path / "plan"), World(0, 1, torch.device("cpu")))
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, plan.settings.beta2), eps=1e-8)
    expected = []
    for step in range(10):
        micros = plan.loader.batch(step)
        count = sum(int(micro.loss_mask.sum()) for micro in micros)
        total = torch.zeros(())
        for micro in micros:
            for begin, end in itertools.pairwise(micro.cu_seqlens.tolist()):
                ids = torch.from_numpy(micro.ids[begin:end].astype("int64"))
                mask = torch.from_numpy(micro.loss_mask[begin:end].astype("bool"))[1:]
                if not mask.any():
                    continue
                logits = theirs(ids[None]).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(logits[mask], ids[1:][mask], reduction="sum")
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), plan.settings.clip)
        settings = plan.settings
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 10, peak=settings.lr, schedule=settings.schedule, warmup=settings.warmup)
        optimizer.step()
        expected.append(loss.item())
    assert ours == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize(
    "name", [name if name == "qwen2.5" else pytest.param(name, marks=pytest.mark.slow) for name in RELEASED]
)
def test_adapters_and_preferences_train_on_released_architectures(name: str, data: Data, tmp_path: Path) -> None:
    """The check at step 0 of dpo and the comparison of the export with transformers raise if a part was left out."""
    known = RELEASED[name]
    transformers_model(known.model_type, tmp_path / "hf", data.tokenizer, **known.config)
    import_model(tmp_path / "hf", tmp_path / "start")
    options = config_of("sft", data, tmp_path / "sft", init=tmp_path / "start", model=None, steps=2, lora=4, lr=1e-2)
    train(options)
    before, after = (open_model(tmp_path / run)[0].state_dict() for run in ("start", "sft"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    train(config_of("dpo", data, tmp_path / "dpo", init=tmp_path / "sft", model=None, steps=2))
    architecture = {"qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}.get(known.model_type, "Llama")
    assert export(tmp_path / "dpo", tmp_path / "out", format="hf").architecture == f"{architecture}ForCausalLM"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (it is built from source)"
)
@pytest.mark.parametrize("name", RELEASED)
def test_llama_cpp_computes_the_same_logits(name: str, tokenizer: Path, tmp_path: Path) -> None:
    import llama_cpp

    known = RELEASED[name]
    transformers_model(known.model_type, tmp_path / "hf", tokenizer, **known.config)
    import_model(tmp_path / "hf", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", format="gguf")
    theirs = llama_cpp.Llama(
        str(tmp_path / "out" / "run-f32.gguf"),
        n_ctx=256,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,  # its caches are halves unless told
        type_v=llama_cpp.GGML_TYPE_F32,
        logits_all=True,
        verbose=False,
    )
    model, _ = open_model(tmp_path / "run")
    ids = torch.randint(3, 300, (120,), generator=torch.Generator().manual_seed(1))
    theirs.eval(ids.tolist())
    expected = torch.from_numpy(theirs.scores[: len(ids)].copy())
    ours = logits(model, ids)
    assert (ours - expected).abs().max() < 1e-3 * max(1.0, float(expected.abs().max()))
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    theirs.close()


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a Llama with a tokenizer made of SentencePiece's, and its GGUF file in gguf/."""
    root = tmp_path_factory.mktemp("sentencepiece")
    num_ids = make_sentencepiece(root / "tokenizer")
    transformers_model("llama", root / "hf", root / "tokenizer", vocab_size=num_ids)
    import_model(root / "hf", root / "run")
    export(root / "run", root / "gguf", format="gguf")
    return root


def test_tokenizers_of_sentencepiece_are_written_with_scores_and_bytes(sentencepiece: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(sentencepiece / "gguf" / "run-f32.gguf")
    fields = {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in reader.fields.items()}
    model = json.loads((sentencepiece / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert (fields["model"], fields["pre"], fields["add_space_prefix"]) == ("llama", "default", True)
    assert fields["token_type"][:5] == [2, 3, 3, 6, 6]  # unknown, control, control, byte, byte
    scores = [fields["scores"][model["vocab"]["".join(pair)]] for pair in model["merges"]]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 50


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (it is built from source)"
)
def test_llama_cpp_splits_text_as_a_tokenizer_of_sentencepiece(sentencepiece: Path) -> None:
    import llama_cpp

    theirs = llama_cpp.Llama(str(sentencepiece / "gguf" / "run-f32.gguf"), n_ctx=256, n_threads=1, verbose=False)
    native = open_model(sentencepiece / "run")[1].native
    draw = random.Random(0)
    pieces = [*"aehoiwtnsr  .,?17+=2 皮姆住在é🦉\n", "the ", "house", "</s>"]
    for _ in range(1000):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 40)))
        expected = native.encode(text, add_special_tokens=False).ids
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == expected, text
    theirs.close()
