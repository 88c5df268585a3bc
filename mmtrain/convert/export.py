"""Exports the model of a run for other programs: as a Hugging Face directory (`hf`), as a GGUF file for llama.cpp
(`gguf`), or as a `.pth` file for MiniMind's scripts (`minimind`).

The format `hf` is a standard model of transformers (see `architecture_of`), without custom code. If transformers is installed, it loads this export, and its logits and prompt ids are compared with ours; an export that
differs is deleted. LoRA adapters are merged into the weights.
"""

import errno
import importlib.util
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import jinja2
import torch
from torch import Tensor

from mmdata.encode.rows import Message
from mmdata.encode.template import Template, ending_of
from mmdata.errors import CheckpointError, UsageError
from mmdata.io.files import new_directory, sha256_of, write_json, write_text
from mmdata.io.records import JsonObject, write_record
from mmdata.tokenizer.chat_template import CHATML
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint
from mmtrain.checkpoint import Checkpoint
from mmtrain.convert import gguf
from mmtrain.convert.architectures import architecture_of, config_of
from mmtrain.convert.foreign import model_with, run_tokenizer
from mmtrain.lineage import EXPORT, ExportRecord, run_origin
from mmtrain.model.embeddings import EMBEDDING, HEAD
from mmtrain.model.model import Model
from mmtrain.records import RunRecord, read_run
from mmtrain.shapes import ModelConfig

# By format: name of the dtype in the file -> dtype to which the weights are converted. The first one is the default.
DTYPES = {
    "hf": {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16},
    "gguf": {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.float32},
    "minimind": {"f32": torch.float32, "f16": torch.float16},
}
MODELFILE = "Modelfile"  # what `ollama create` reads
TOLERANCE = 1e-4  # the largest allowed difference between logits in fp32, or share of the largest logit if that is more


@dataclass(frozen=True)
class Exported:
    """Result of `export`. files: paths relative to `out`. num_bytes: their total size. checks: sentences for the user
    about what was compared. max_logit_difference: largest absolute difference from transformers' logits; None if they
    were not compared."""

    out: Path
    format: str
    dtype: str
    architecture: str
    files: list[str]
    num_bytes: int
    num_params: int
    max_logit_difference: float | None
    checks: list[str]


@dataclass(frozen=True)
class _Source:
    """The model to export, with its checkpoint, its tokenizer and the record of its run."""

    checkpoint: Checkpoint
    run: RunRecord
    model: Model
    tokenizer: Tokenizer

    @property
    def shape(self) -> ModelConfig:
        return self.model.config

    @property
    def architecture(self) -> str:
        """The class of transformers that has this architecture."""
        return architecture_of(self.shape)[1]

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: value.detach().to(dtype).contiguous() for name, value in self.model.state_dict().items()}


def export(path: Path, out: Path, *, format: str, dtype: str | None = None) -> Exported:
    """Write the model of a run or checkpoint directory, `path`, to the directory `out` in one of the formats of
    `DTYPES`. `out` appears only when the export is complete, in place of an earlier one. dtype: None for the format's
    first. Raise UsageError for an unknown format or dtype, other files in `out`, or a model that the format cannot
    represent; TokenizerError if the tokenizer is not the run's or llama.cpp cannot read it; CheckpointError if there is
    no complete checkpoint or transformers computes something else from the export."""
    dtype = dtype or next(iter(DTYPES.get(format, {"": None})))
    if format not in DTYPES or dtype not in DTYPES[format]:
        choices = "; ".join(f"--format {name} --dtype {'|'.join(dtypes)}" for name, dtypes in DTYPES.items())
        raise UsageError(f"--format {format} --dtype {dtype} is unknown", choices)
    if out.exists() and not (out / EXPORT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty and no export of mm", "choose another --out")
    weights = checkpoint.find(path)
    model = _without_padding(checkpoint.load_model(weights.dir)[0].eval())
    if model.config.num_experts:
        raise UsageError(
            f"{path} is a mixture of experts, which mm does not export", "use the files it was imported from"
        )
    tokenizer = run_tokenizer(weights.run_dir, model.config.vocab_size)
    source = _Source(weights, read_run(weights.run_dir), model, tokenizer)
    writer: Callable[[_Source, Path, str], tuple[list[str], float | None]]
    writer = {"hf": _write_hf, "gguf": _write_gguf, "minimind": _write_minimind}[format]
    with new_directory(out) as partial:
        checks, difference = writer(source, partial, dtype)
        checks += _ending_notes(tokenizer, format)
        paths = [path for suffix in ("safetensors", "gguf", "pth") for path in partial.glob(f"*.{suffix}")]
        record = ExportRecord(
            format=format,
            dtype=dtype,
            weights_sha256=weights.weights_sha256,
            step=weights.step,
            run=str(weights.run_dir),
            files={path.name: sha256_of(path) for path in paths},
        )
        write_record(partial / EXPORT, record, indent=2)
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file() and file.name != EXPORT)
    if not files:
        raise FileNotFoundError(errno.ENOENT, "was removed while it was written", str(out))
    num_bytes = sum((out / file).stat().st_size for file in files)
    num_params = source.shape.num_params
    return Exported(out, format, dtype, source.architecture, files, num_bytes, num_params, difference, checks)


def _without_padding(model: Model) -> Model:
    """Return a model without the rows of the embedding that --pad-vocab added; the same model if it has none."""
    shape = model.config
    if not shape.num_padding:
        return model
    rows = shape.vocab_size - shape.num_padding
    weights = {name: value[:rows] if name in (EMBEDDING, HEAD) else value for name, value in model.state_dict().items()}
    return model_with(replace(shape, vocab_size=rows, num_padding=0), weights)


def _ending_notes(tokenizer: Tokenizer, format: str) -> list[str]:
    """Return sentences about what ends an answer that the format cannot hold."""
    ids, texts = ending_of(tokenizer)
    notes = [f"answers end with the text {text!r}: give it to what generates as a stop string" for text in texts]
    if format == "minimind" and ids[0] != tokenizer.eos_id:
        end = tokenizer.native.id_to_token(ids[0])
        notes.append(f"answers end with {end!r}, MiniMind's scripts stop at the eos token {tokenizer.eos_token!r} only")
    return notes


# --- Hugging Face


def _write_hf(source: _Source, out: Path, dtype: str) -> tuple[list[str], float | None]:
    """Write weights, configs, tokenizer with chat template and model card; return the results of `_compare_hf`."""
    weights = source.weights(DTYPES["hf"][dtype])
    checkpoint.write_tensors(out / "model.safetensors", weights, metadata={"format": "pt"})
    write_json(out / "config.json", _hf_config(source, dtype), indent=2)
    _write_tokenizer(source.tokenizer, out)
    ids = {name: id for name, id in _special_ids(source.tokenizer).items() if id is not None}
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    imported = json.loads(source.tokenizer.files.get("generation_config.json", json.dumps(sampling)))
    write_json(out / "generation_config.json", {**imported, **ids}, indent=2)
    write_text(out / "README.md", model_card(source, dtype))
    return _compare_hf(source, weights, out)


def _hf_config(source: _Source, dtype: str) -> JsonObject:
    torch_dtype = str(DTYPES["hf"][dtype]).removeprefix("torch.")
    return {**config_of(source.shape), "torch_dtype": torch_dtype, **_special_ids(source.tokenizer)}


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int] | None]:
    """Return the ids as config.json and generation_config.json name them; all that end an answer, in a list, as eos."""
    ends = list(ending_of(tokenizer).ids)
    eos = ends if len(ends) > 1 else ends[0]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}


def _write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the tokenizer's files, with a tokenizer class that every version of transformers has, and with the ChatML
    template if the tokenizer has no chat template."""
    tokenizer.save(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if tokenizer.chat_template is None:
        config["chat_template"] = CHATML
    write_json(path, config, indent=2)


@torch.no_grad()
def _compare_hf(source: _Source, weights: dict[str, Tensor], out: Path) -> tuple[list[str], float | None]:
    """Load the export with transformers in fp32, and compare its logits for random ids, and its prompt ids for a
    message, with ours. weights: the exported weights, which our model uses too. Return sentences for the user and the
    largest difference between logits (None if transformers is not installed). Raise CheckpointError when logits differ
    by more than TOLERANCE allows or prompt ids differ."""
    if importlib.util.find_spec("transformers") is None:
        return ["not compared: transformers is not installed (pip install 'mm-toolkit[hf]')"], None
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True).eval()
    ours = model_with(source.shape, {name: value.float() for name, value in weights.items()})
    generator = torch.Generator().manual_seed(0)
    num_tokens = min(128, source.shape.max_positions)
    ids = torch.randint(source.shape.vocab_size, (num_tokens,), generator=generator)
    hidden = ours(ids, torch.arange(num_tokens), torch.tensor([0, num_tokens], dtype=torch.int32), num_tokens)
    expected = theirs(ids[None]).logits[0]
    difference = float((hidden @ ours.head_weight.T - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    name = f"transformers {version('transformers')}"
    if not difference <= allowed:
        raise CheckpointError(
            f"{name} reads the export differently: logits differ by {difference:.2g}, allowed are {allowed:.2g}",
            "nothing was written; please report this with the model's shape",
        )
    text = "1 + 2 = ?  你好，世界\n"
    prompt = AutoTokenizer.from_pretrained(out, local_files_only=True).apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    if prompt != Template(source.tokenizer).prompt_ids(source.tokenizer, [Message("user", text)]):
        problem = f"{name} makes other prompt ids with the tokenizer"
        raise CheckpointError(problem, "nothing was written; please report this")
    check = f"logits differ by at most {difference:.1e} over {num_tokens} tokens, prompt ids are the same"
    return [f"{name} loads it: {check}"], difference


# --- GGUF


def _write_gguf(source: _Source, out: Path, dtype: str) -> tuple[list[str], float | None]:
    """Write RUN-DTYPE.gguf, read it again to compare each tensor, and write Ollama's Modelfile and the model card.
    Return sentences for the user, and None, since no logits are compared."""
    name = re.sub(r"[^\w.-]+", "-", source.checkpoint.run_dir.resolve().name) or "model"
    path = out / f"{name}-{dtype}.gguf"
    checks = gguf.write(path, source.model.state_dict(), source.shape, source.tokenizer, dtype=dtype, name=name)
    ids, texts = ending_of(source.tokenizer)
    stops = [json.dumps(end, ensure_ascii=False) for end in [*map(source.tokenizer.native.id_to_token, ids), *texts]]
    write_text(
        out / MODELFILE, "\n".join([f"FROM ./{path.name}", *(f"PARAMETER stop {stop}" for stop in stops)]) + "\n"
    )
    write_text(out / "README.md", model_card(source, dtype, gguf_file=path.name))
    return checks, None


# --- MiniMind's scripts


def _write_minimind(source: _Source, out: Path, dtype: str) -> tuple[list[str], float | None]:
    """Write STAGE_WIDTH.pth, the file name that MiniMind's scripts use, and the tokenizer in model/. Return a sentence
    for the user about where the files go, and None, since no logits are compared. Raise UsageError for a shape that
    MiniMind's code cannot build."""
    shape = source.shape
    if wrong := _not_minimind(shape):
        problem = f"MiniMind's code makes no model with {', '.join(wrong)}"
        raise UsageError(problem, "mm export RUN --format hf keeps any shape")
    weights = source.weights(DTYPES["minimind"][dtype])
    # MiniMind loads strictly and needs both names of this matrix.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    stage = {"pretrain": "pretrain", "dpo": "dpo"}.get(source.run.stage, "full_sft")
    name = f"{stage}_{shape.hidden_size}.pth"
    try:
        with (out / name).open("wb") as file:
            torch.save(weights, file)
    except RuntimeError as error:  # torch's reaction to an error of the file, which says more
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    source.tokenizer.save(out / "model")
    since = "2026 (eval_llm.py)" if shape.qk_norm else "April to December 2025 (eval_model.py)"
    options = f"--hidden_size {shape.hidden_size} --num_hidden_layers {shape.num_layers}"
    return [f"for MiniMind of {since}: {name} goes to out/, the files of model/ to model/; run it with {options}"], None


def _not_minimind(shape: ModelConfig) -> list[str]:
    """Describe the values of a configuration with which MiniMind's code cannot build the model, such as "num_heads 6
    (only 8)". MiniMind has fixed rules for all values except width and number of layers."""
    width = shape.hidden_size
    ffn_size = 64 * math.ceil((width * math.pi if shape.qk_norm else int(width * 8 / 3)) / 64)
    expected = {
        "vocab_size": 6400,
        "num_heads": 8,
        "num_kv_heads": 4 if shape.qk_norm else 2,
        "ffn_size": ffn_size,
        "rope_theta": 1e6,
        "norm_eps": 1e-6 if shape.qk_norm else 1e-5,
        "own_head_size": None,
        "tied": True,
        "qkv_bias": False,
        "rope_scaling": None,
        "layers_without_rope": (),
    }
    return [
        f"{name} {_plain(getattr(shape, name))} (only {_plain(value)})"
        for name, value in expected.items()
        if getattr(shape, name) != value
    ]


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- the model card


def model_card(source: _Source, dtype: str, *, gguf_file: str | None = None) -> str:
    """Return the README.md of an export: shape, hashes, training data and use. gguf_file: its name if the format is
    GGUF."""
    text = resources.files("mmtrain.convert").joinpath("templates/model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    ids, texts = ending_of(source.tokenizer)
    origin = run_origin(source.checkpoint.run_dir, source.checkpoint.weights_sha256)
    datasets, files = origin.all("dataset"), origin.all("file")
    return environment.from_string(text).render(
        source=source,
        ends=" or ".join(f"`{end}`" for end in [*map(source.tokenizer.native.id_to_token, ids), *map(repr, texts)]),
        shape=source.shape,
        name=source.checkpoint.run_dir.resolve().name,
        origin=origin,
        datasets=datasets,
        files=files,
        languages=sorted({language for dataset in datasets for language in dataset.facts.get("languages", [])}),
        licences=sorted({file.facts["licence"] for file in files if "licence" in file.facts}),
        dtype=dtype,
        gguf_file=gguf_file,
    )
