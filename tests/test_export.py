"""Exports are what was trained: transformers, gguf and llama.cpp read the same model, and what comes back is the same."""

import importlib.util
import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import endings
import pytest
import torch
from foreign import NORMED, SHAPE, make_tokenizer, weights
from train_data import Data

from mmdata.encode.rows import Message
from mmdata.encode.template import Template
from mmdata.errors import CheckpointError, TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.options import TokenizerOptions
from mmdata.tokenizer.toolkit.train import train_to
from mmtrain.config import TrainOptions
from mmtrain.convert import export as export_module
from mmtrain.convert.export import export
from mmtrain.convert.foreign import import_model, open_model, read
from mmtrain.convert.gguf import pre_tokenizer_name
from mmtrain.inference.engine import Engine
from mmtrain.inference.settings import Sampling
from mmtrain.train.loop import train

SHAPES = {"llama": SHAPE, "qwen3": NORMED}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each architecture."""
    root = tmp_path_factory.mktemp("runs")
    make_tokenizer(root / "tokenizer")
    for name, shape in SHAPES.items():
        torch.save(weights(shape), root / f"{name}.pth")
        import_model(root / f"{name}.pth", root / name)
    return {name: root / name for name in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_answers_with_the_same_tokens(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = export(runs[name], tmp_path / "hf", format="hf")
    assert made.architecture == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[name]
    assert made.max_logit_difference is not None and made.max_logit_difference < 1e-4
    assert "logits differ by at most" in made.checks[0] and "prompt ids are the same" in made.checks[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert (type(theirs).__name__, theirs.dtype) == (made.architecture, torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token == "<|im_end|>"
    model, tokenizer = open_model(runs[name])
    engine = Engine(model, tokenizer)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 60, (50,), generator=generator).tolist()
    prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]
    rows = [engine.submit(prompt, Sampling(max_new_tokens=10)) for prompt in prompts]
    while not engine.is_idle:
        engine.step()
    for prompt, row in zip(prompts, rows, strict=True):
        mask = torch.ones(1, len(prompt), dtype=torch.int64)
        said = theirs.generate(torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=10)
        answer = said[0, len(prompt) :].tolist()
        assert answer == row.ids + [tokenizer.eos_id] * (row.finish_reason == "stop")


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_exported_comes_back_bit_for_bit(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    before = open_model(runs[name])[0].state_dict()
    export(runs[name], tmp_path / "hf", format="hf")
    import_model(tmp_path / "hf", tmp_path / "again")
    model, tokenizer = open_model(tmp_path / "again")
    assert model.config == SHAPES[name]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert tokenizer.sha256 == open_model(runs[name])[1].sha256
    export(tmp_path / "again", tmp_path / "twice", format="hf")
    first, second = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("hf", "twice"))
    assert first == second


def test_what_ends_an_answer_goes_out_and_comes_back(tmp_path: Path) -> None:
    import gguf

    source = tmp_path / "tokenizer"
    shutil.copytree(endings.directory("named"), source)
    ids = Tokenizer.load(source).control_tokens
    end, eos, third = ids["<|im_end|>"], ids["<|endoftext|>"], ids["</s>"]
    config = json.loads((source / "tokenizer_config.json").read_text())
    templates = {each["name"]: each["template"] for each in config.pop("chat_template")}
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    (source / "chat_template.jinja").write_text(templates["default"])
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(templates["tool_use"])
    given = {"eos_token_id": [third, eos], "temperature": 0.3, "max_new_tokens": 7}
    (source / "generation_config.json").write_text(json.dumps(given))
    torch.save(weights(replace(SHAPE, vocab_size=Tokenizer.load(source).vocab_size)), tmp_path / "model.pth")
    import_model(tmp_path / "model.pth", tmp_path / "run", tokenizer_dir=source)
    export(tmp_path / "run", tmp_path / "hf", format="hf")
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert written.items() >= {"temperature": 0.3, "max_new_tokens": 7}.items() and "top_p" not in written
    assert written["eos_token_id"] == [end, eos, third]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [end, eos, third]
    import_model(tmp_path / "hf", tmp_path / "again")
    model, tokenizer = open_model(tmp_path / "again")
    assert tokenizer.chat_templates == templates and Engine(model, tokenizer).ending.ids == (end, eos, third)
    export(tmp_path / "again", tmp_path / "gguf", format="gguf")
    fields = gguf.GGUFReader(tmp_path / "gguf" / "again-f32.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end
    assert fields["tokenizer.chat_template"].contents() == templates["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == templates["tool_use"]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == eos
    assert "`<|im_end|>` or `<|endoftext|>` or `</s>`" in (tmp_path / "hf" / "README.md").read_text()


def test_halves_are_stored_as_halves(runs: dict[str, Path], tmp_path: Path) -> None:
    made = export(runs["llama"], tmp_path / "hf", format="hf", dtype="f16")
    found = read(tmp_path / "hf")
    before = open_model(runs["llama"])[0].state_dict()
    assert all(torch.equal(value, before[key].half().float()) for key, value in found.weights.items())
    assert made.num_bytes < 3 * SHAPE.num_params


def test_an_export_that_differs_is_not_published(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(runs["llama"], tmp_path / "hf", format="hf", dtype="f16")
    before = (tmp_path / "hf" / "model.safetensors").read_bytes()
    monkeypatch.setattr(export_module, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match="reads the export differently"):
        export(runs["llama"], tmp_path / "hf", format="hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_earlier_export_is_replaced_and_nothing_else(runs: dict[str, Path], tmp_path: Path) -> None:
    export(runs["llama"], tmp_path / "out", format="gguf")
    export(runs["llama"], tmp_path / "out", format="hf", dtype="bf16")
    assert not list((tmp_path / "out").glob("*.gguf"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="no export of mm"):
        export(runs["llama"], tmp_path / "mine", format="hf")
    with pytest.raises(UsageError, match="--format onnx"):
        export(runs["llama"], tmp_path / "out", format="onnx")
    with pytest.raises(UsageError, match="--dtype q8_0 is unknown"):
        export(runs["llama"], tmp_path / "out", format="hf", dtype="q8_0")


@pytest.mark.parametrize("format", ["hf", "gguf", "minimind", "import"])
def test_a_full_disk_leaves_nothing_and_the_next_try_works(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(SHAPE, vocab_size=6400, ffn_size=192)  # 1.8 MB
    torch.save(weights(shape), tmp_path / "model.pth")
    _minimind_tokenizer(tmp_path / "tokenizer")
    import_model(tmp_path / "model.pth", tmp_path / "run")
    out = tmp_path / "new" / "out"

    def write() -> None:
        export(tmp_path / "run", out, format=format) if format != "import" else import_model(
            tmp_path / "model.pth", out
        )

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # no file may be larger
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.parent.iterdir())
    write()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_minimind_gets_its_own_file_back(tmp_path: Path) -> None:
    for name, shape in (
        ("2", replace(SHAPE, vocab_size=6400, ffn_size=192)),
        ("3", replace(NORMED, vocab_size=6400, ffn_size=256)),
    ):
        before = weights(shape)
        torch.save(before, tmp_path / f"full_sft_{name}.pth")
        (tmp_path / name).mkdir()
        made = tmp_path / f"run_{name}"
        _minimind_tokenizer(tmp_path / "tokenizer")
        import_model(tmp_path / f"full_sft_{name}.pth", made)
        done = export(made, tmp_path / f"out_{name}", format="minimind")
        after = torch.load(tmp_path / f"out_{name}" / "full_sft_64.pth", weights_only=True)
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in after.items())
        assert "--hidden_size 64 --num_hidden_layers 2" in done.checks[0]


def _minimind_tokenizer(out: Path) -> Tokenizer:
    """One of 6,400 ids: a few learned, the rest made up."""
    tokenizer = make_tokenizer(out)
    parts = json.loads(tokenizer.files["tokenizer.json"])
    parts["model"]["vocab"] |= {f"unused{id}": id for id in range(300, 6400)}
    (out / "tokenizer.json").write_text(json.dumps(parts))
    return Tokenizer.load(out)


def test_a_shape_that_minimind_cannot_make_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"vocab_size 300 \(only 6400\), ffn_size 96 \(only 192\)"):
        export(runs["llama"], tmp_path / "out", format="minimind")
    assert not list(tmp_path.iterdir())


def test_the_card_names_data_and_lineage(data: Data, tmp_path: Path) -> None:
    for stage, init in (("pretrain", None), ("sft", tmp_path / "pretrain-1")):
        train(
            TrainOptions(
                stage,
                (getattr(data, stage),),
                tmp_path / f"{stage}-1",
                model=None if init else "tiny",
                init=init,
                steps=1,
                device="cpu",
                quiet=True,
            )
        )
    export(tmp_path / "sft-1", tmp_path / "out", format="hf")
    card = (tmp_path / "out" / "README.md").read_text()
    manifest = json.loads((data.sft / "manifest.json").read_text())
    assert f"| sft-1 | sft | 1 | shards_sft (`{manifest['dataset_digest'][:16]}`)" in card
    assert "| pretrain-1 | pretrain | 1 | shards_pretrain" in card
    assert card.index("| sft-1 |") < card.index("| pretrain-1 |")
    assert str(tmp_path) not in card


def test_adapters_are_exported_merged(data: Data, tmp_path: Path) -> None:
    for out, init, lora in (("base", None, None), ("adapted", tmp_path / "base", 4)):
        train(
            TrainOptions(
                "sft",
                (data.sft,),
                tmp_path / out,
                model=None if init else "tiny",
                init=init,
                lora=lora,
                steps=2,
                lr=1e-2,
                device="cpu",
                quiet=True,
            )
        )
    base, merged = (open_model(tmp_path / run)[0].state_dict() for run in ("base", "adapted"))
    made = export(tmp_path / "adapted", tmp_path / "out", format="hf")
    found = read(tmp_path / "out").weights
    assert made.max_logit_difference is not None
    assert all(torch.equal(value, merged[name]) for name, value in found.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[name], base[name])


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("dtype", "largest"), [("f32", 0.0), ("f16", 5e-4), ("q8_0", 6e-3)])
def test_gguf_files_hold_the_weights_and_the_tokenizer(
    runs: dict[str, Path], name: str, dtype: str, largest: float, tmp_path: Path
) -> None:
    import gguf

    made = export(runs[name], tmp_path / "out", format="gguf", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / f"{name}-{dtype}.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tokenizer = Tokenizer.load(runs[name] / "tokenizer")
    assert fields["general.architecture"] == name
    assert fields[f"{name}.attention.head_count_kv"] == SHAPES[name].num_kv_heads
    assert fields["tokenizer.ggml.pre"] == "smollm"  # digits apart, then as GPT-2
    assert fields["tokenizer.ggml.tokens"] == [tokenizer.native.id_to_token(i) for i in range(300)]
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # control, control, control, normal
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    for theirs, ours in (
        ("token_embd", "model.embed_tokens"),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("output_norm", "model.norm"),
    ):
        expected = weights(SHAPES[name])[f"{ours}.weight"].numpy()
        assert abs(stored[f"{theirs}.weight"] - expected).max() <= largest * abs(expected).max()
    assert made.checks[0].startswith("read back: every tensor is the checkpoint's")


@pytest.mark.parametrize(
    ("name", "written"), [("Phi-3-mine", "phi 3-mine"), ("my_phi3", "my_phi 3"), ("delphi-4", "delphi-4")]
)
def test_no_name_makes_llama_cpp_strip_white_space(
    name: str, written: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    import gguf

    export(shutil.copytree(runs["llama"], tmp_path / name), tmp_path / "out", format="gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / f"{name}-f32.gguf").fields
    assert fields["general.name"].contents() == written


def test_tokenizers_are_named_by_how_they_cut(tmp_path: Path) -> None:
    assert pre_tokenizer_name(make_tokenizer(tmp_path / "a")) == "smollm"
    plain = make_tokenizer(tmp_path / "b", split_digits=False)
    assert pre_tokenizer_name(plain) == "gpt-2"
    parts = json.loads(plain.files["tokenizer.json"])
    for change in (
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {**parts["pre_tokenizer"], "add_prefix_space": True}},
    ):
        (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(parts | change))
        with pytest.raises(TokenizerError, match=r"llama\.cpp has no name"):
            pre_tokenizer_name(Tokenizer.load(tmp_path / "b"))


def test_of_tokenizers_that_mm_trains_llama_cpp_knows_the_pattern_gpt2(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one and two is 3. " * 50}))
    for pattern in ("gpt2", "digits"):
        train_to([tmp_path / "rows.jsonl"], tmp_path / pattern, TokenizerOptions(320, pattern=pattern))
    assert pre_tokenizer_name(Tokenizer.load(tmp_path / "gpt2")) == "gpt-2"
    with pytest.raises(TokenizerError) as refused:
        pre_tokenizer_name(Tokenizer.load(tmp_path / "digits"))
    assert "--pattern gpt2" in refused.value.fix


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (it is built from source)"
)
@pytest.mark.parametrize("split_digits", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_answers_with_the_same_tokens(name: str, split_digits: bool, tmp_path: Path) -> None:
    import llama_cpp

    make_tokenizer(tmp_path / "tokenizer", split_digits=split_digits)
    torch.save(weights(SHAPES[name]), tmp_path / "model.pth")
    import_model(tmp_path / "model.pth", tmp_path / "run")
    model, tokenizer = open_model(tmp_path / "run")
    template = Template(tokenizer)
    answers = {}
    for dtype in ("f32", "f16", "q8_0"):
        export(tmp_path / "run", tmp_path / dtype, format="gguf", dtype=dtype)
        theirs = llama_cpp.Llama(
            str(tmp_path / dtype / f"run-{dtype}.gguf"),
            n_ctx=512,
            n_threads=1,
            type_k=llama_cpp.GGML_TYPE_F32,  # its caches are halves unless told
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
        answers[dtype] = []
        for text in ("Hi", "17 + 25 = 42?", "皮姆住在哪里？  x", "a\n\n b\t1984 it's", "🦉 naïve"):
            prompt = template.prompt_ids(tokenizer, [Message("user", text)])
            rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
            assert theirs.tokenize(rendered.encode(), add_bos=True, special=True) == prompt
            said = []
            for id in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
                if id == tokenizer.eos_id or len(said) == 24:
                    break
                said.append(id)
            answers[dtype].append(said)
            chat = theirs.create_chat_completion([{"role": "user", "content": text}], temperature=0.0, max_tokens=24)
            assert chat["usage"]["prompt_tokens"] == len(prompt)  # type: ignore[index]
        theirs.close()
    engine = Engine(model, tokenizer)
    rows = [
        engine.submit(template.prompt_ids(tokenizer, [Message("user", text)]), Sampling(max_new_tokens=24))
        for text in ("Hi", "17 + 25 = 42?", "皮姆住在哪里？  x", "a\n\n b\t1984 it's", "🦉 naïve")
    ]
    while not engine.is_idle:
        engine.step()
    assert answers["f32"] == [row.ids for row in rows]
    assert all(len(said) == len(row.ids) for said, row in zip(answers["f16"], rows, strict=True))
