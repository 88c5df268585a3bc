"""Weights of other programs in; this model's weights, shape and tokenizer out. `mm import`, and whatever takes a PATH.

Read are MiniMind's `.pth` of every era and Hugging Face directories of Llama, Qwen3 and MiniMind. Strictly: a tensor too
many or too few is an error, and so is all this model has not (experts, biases, an output matrix of its own). Pickles are
read for tensors alone; one that wants to run code is refused. Values are not changed, only widened to fp32.
"""

import hashlib
import json
import pickle
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmdata.errors import CheckpointError, TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint
from mmtrain.config import ModelConfig, as_json
from mmtrain.model.model import Model

STAGE = "imported"  # what run.json calls a run that `mm import` made
NUM_HEADS = 8  # of MiniMind's models in every era; no tensor's shape tells it where queries and keys have no norm
PICKLES = (".pth", ".pt", ".bin")

# The seed's names (until April 2025) and ours; those since then are ours but for the output matrix.
_SEED_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "norm": "model.norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_TABLES = re.compile(r"(^|\.)(pos_cis|freqs_cos|freqs_sin|mask|inv_freq)$")  # buffers that follow from the shape
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # DistributedDataParallel's and torch.compile's


@dataclass(frozen=True)
class Found:
    """A model read from elsewhere: weights fp32 under our names, its shape, what it was, and where its tokenizer stands."""

    path: Path
    weights: dict[str, Tensor]
    shape: ModelConfig
    origin: str
    tokenizer_dir: Path | None


@dataclass(frozen=True)
class Imported:
    """What `mm import` made."""

    run_dir: Path
    origin: str
    shape: ModelConfig
    num_params: int
    tokenizer_dir: Path
    sha256: str


# --- reading ----------------------------------------------------------------------------------------------------------


def is_foreign(path: Path) -> bool:
    """Whether a path looks like a model of another program rather than a run of ours."""
    return path.suffix in PICKLES or (path / "config.json").is_file()


def read(path: Path, *, num_heads: int | None = None) -> Found:
    """The model at `path`: a `.pth` file or a Hugging Face directory. CheckpointError says what does not fit."""
    if path.is_dir():
        return _read_directory(path, num_heads)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file", "give a .pth file or a Hugging Face directory")
    if path.suffix not in PICKLES:
        raise CheckpointError(
            f"{path} is neither a torch file ({', '.join(PICKLES)}) nor a directory",
            "of a safetensors file, give the directory that holds its config.json",
        )
    named, origin = _our_names(_load_pickle(path), path)
    shape = _shape_of(named, path, num_heads=num_heads)
    return Found(path, _checked(named, shape, origin, path), shape, origin, _tokenizer_beside(path))


def _read_directory(path: Path, num_heads: int | None) -> Found:
    """A Hugging Face directory: config.json, weights in one file or several, its own tokenizer."""
    config = _read_config(path)
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(path):
        tensors |= _load_safetensors(file) if file.suffix == ".safetensors" else _load_pickle(file)
    named, origin = _our_names(tensors, path)
    heads = num_heads or config.get("num_attention_heads") or config.get("n_heads")
    rope = config.get("rope_parameters") or {}
    shape = _shape_of(
        named,
        path,
        num_heads=heads,
        rope_theta=config.get("rope_theta") or rope.get("rope_theta"),
        norm_eps=config.get("rms_norm_eps") or config.get("norm_eps"),
        max_positions=config.get("max_position_embeddings") or config.get("max_seq_len"),
    )
    kind = config.get("model_type")
    origin = origin if kind == "minimind" else f"Hugging Face {kind}"
    tokenizer_dir = path if (path / "tokenizer.json").is_file() else None
    return Found(path, _checked(named, shape, origin, path), shape, origin, tokenizer_dir)


def _read_config(path: Path) -> dict[str, Any]:
    """config.json, if it describes a model like ours."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} holds neither a run nor a config.json", "give a run, a .pth file or a Hugging Face directory"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path / 'config.json'} is not json: {error}", "copy or download it again") from None
    kind = config.get("model_type")
    if config.get("use_moe") or "moe" in str(kind) or config.get("num_local_experts"):
        raise _moe(path)
    if kind not in ("llama", "qwen3", "minimind"):
        raise CheckpointError(
            f"{path}: model_type {kind!r} is not known here", "import a llama, qwen3 or minimind model"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    for is_right, what in (
        (scaling == "default", f"rotary scaling {scaling!r}"),
        (config.get("hidden_act", "silu") == "silu", f"activation {config.get('hidden_act')!r}"),
        (not config.get("use_sliding_window"), "sliding window attention"),
    ):
        if not is_right:
            raise CheckpointError(f"{path}: {what} is something this model has not", "import a model without it")
    return config


def _weight_files(path: Path) -> list[Path]:
    """The files a Hugging Face directory's weights stand in; safetensors first."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            index = json.loads((path / f"{name}.index.json").read_text(encoding="utf-8"))
            return [path / file for file in sorted(set(index["weight_map"].values()))]
    raise CheckpointError(f"{path}: no model.safetensors and no pytorch_model.bin", "download the weights too")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error})", "copy or download it again") from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file; of a training state (MiniMind's *_resume.pth) those of its model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, to the user no news
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class|function) [`'\"]?([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found else "its pickle holds more than tensors"
        raise CheckpointError(
            f"{path} holds more than weights: {what}; reading it would run its code",
            "save the state_dict alone: torch.save(model.state_dict(), FILE)",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = re.split(r"[.\n] ?", f"{error or type(error).__name__}", maxsplit=1)[0]
        raise CheckpointError(f"{path}: damaged or cut short ({reason})", "copy or download it again") from error
    for name in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} is no state_dict: tensors by name", "torch.save(model.state_dict(), FILE)")
    return loaded


# --- names and shapes -------------------------------------------------------------------------------------------------


def _our_names(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str]:
    """The same tensors under our names, less tables that follow from the shape; and whose names they were."""
    named = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
    named = {name: value for name, value in named.items() if not _TABLES.search(name)}
    if any("experts." in name or name.endswith("mlp.gate.weight") for name in named):
        raise _moe(path)
    if any(".lora" in name for name in named):
        raise CheckpointError(f"{path} holds LoRA adapters, not a model", "merge them into their model first")
    if "tok_embeddings.weight" not in named:
        return named, "MiniMind, named as in Hugging Face"
    return {_from_seed(name): value for name, value in named.items()}, "MiniMind before April 2025, rotary interleaved"


def _from_seed(name: str) -> str:
    """A seed name in ours; an unknown one stays, and is then refused."""
    found = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
    if not found or found[2] not in _SEED_NAMES:
        return name
    prefix = f"model.{found[1]}" if found[1] else ""
    return f"{prefix}{_SEED_NAMES[found[2]]}.weight"


def _shape_of(
    named: Mapping[str, Tensor],
    path: Path,
    *,
    num_heads: int | None = None,
    rope_theta: float | None = None,
    norm_eps: float | None = None,
    max_positions: int | None = None,
) -> ModelConfig:
    """The shape that the tensors have. What they do not tell and nobody gives is MiniMind's."""
    first = "model.layers.0."
    needed = ("model.embed_tokens", *(f"{first}{x}" for x in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj")))
    if missing := [name for name in needed if f"{name}.weight" not in named]:
        raise CheckpointError(f"{path}: no {missing[0]}.weight: not a model of this kind", "import a Llama-like model")
    embedding, q, k, gate = (named[f"{name}.weight"] for name in needed)
    has_norm = f"{first}self_attn.q_norm.weight" in named
    head_size = len(named[f"{first}self_attn.q_norm.weight"]) if has_norm else len(q) // (num_heads or NUM_HEADS)
    width = embedding.shape[1]
    if not head_size or len(q) != width or len(q) % head_size or len(k) % head_size or head_size % 2:
        raise CheckpointError(
            f"{path}: {len(q)} rows of queries and {len(k)} of keys at width {width} make no whole heads of {head_size}",
            "give the right --num-heads; heads wider than width / heads are not supported",
        )
    layers = [int(found[1]) for name in named if (found := re.match(r"model\.layers\.(\d+)\.", name))]
    return ModelConfig(
        vocab_size=len(embedding),
        hidden_size=width,
        num_layers=1 + max(layers),
        num_heads=len(q) // head_size,
        num_kv_heads=len(k) // head_size,
        ffn_size=len(gate),
        rope_theta=float(rope_theta or 1e6),
        norm_eps=float(norm_eps or (1e-6 if has_norm else 1e-5)),
        qk_norm=has_norm,
        max_positions=int(max_positions or 32768),
    )


def _checked(named: dict[str, Tensor], shape: ModelConfig, origin: str, path: Path) -> dict[str, Tensor]:
    """Weights fp32 as a model of this shape takes them: every name there, none beside, every shape right."""
    output = named.pop("lm_head.weight", None)
    if output is not None and not torch.equal(output, named["model.embed_tokens.weight"]):
        raise CheckpointError(
            f"{path}: its output matrix is not its embedding; this model has one for both",
            "import a model with tied embeddings",
        )
    with torch.device("meta"):
        expected = Model(shape).state_dict()
    missing, unexpected = sorted(expected.keys() - named.keys()), sorted(named.keys() - expected.keys())
    if missing or unexpected:
        what = [
            f"{label} {', '.join(names[:3])}" for label, names in (("lacks", missing), ("has", unexpected)) if names
        ]
        rest = len(missing[3:]) + len(unexpected[3:])
        more = f" and {rest} more" if rest else ""
        raise CheckpointError(
            f"{path}: {' and '.join(what)}{more}: not a model of this kind", "import a Llama-like model"
        )
    for name, value in named.items():
        if value.shape != expected[name].shape or not value.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {value.dtype} {list(value.shape)}, expected {list(expected[name].shape)}",
                "give the right --num-heads, or import a Llama-like model",
            )
    is_interleaved = "interleaved" in origin
    return {
        name: _half_split(value, shape.head_size) if is_interleaved and _is_turned(name) else value.float().contiguous()
        for name, value in named.items()
    }


def _is_turned(name: str) -> bool:
    """Whether rotary positions turn what a matrix makes."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def _half_split(weight: Tensor, head_size: int) -> Tensor:
    """Rows for rotary of neighbours (2i, 2i + 1) in the order for rotary of halves (i, i + D/2); exact, nothing is computed.

    Attention multiplies queries and keys of one head, so that the order of both matters to nothing else.
    """
    pairs = weight.float().unflatten(0, (-1, head_size // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def interleaved(weight: Tensor, head_size: int) -> Tensor:
    """The inverse of the order above: rows for rotary of neighbours, which llama.cpp wants of a Llama."""
    halves = weight.unflatten(0, (-1, 2, head_size // 2))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _moe(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a mixture of experts (MoE), which this model is not",
        "import a dense model (MiniMind: without _moe)",
    )


# --- a tokenizer for it -----------------------------------------------------------------------------------------------


def _tokenizer_beside(path: Path) -> Path | None:
    """A tokenizer where MiniMind keeps it (`out/x.pth` and `model/`), or in the file's own directory."""
    here = path.resolve().parent
    candidates = (here / "tokenizer", here, here.parent / "model", here.parent / "tokenizer")
    return next((found for found in candidates if (found / "tokenizer.json").is_file()), None)


def tokenizer_for(found: Found, given: Path | None = None) -> Tokenizer:
    """The tokenizer named, else the model's own; TokenizerError when there is none or it is of another vocabulary."""
    directory = given or found.tokenizer_dir
    if directory is None:
        raise TokenizerError(
            f"{found.path} has no tokenizer beside it", "name the one it was trained with: --tokenizer DIR"
        )
    tokenizer = Tokenizer.load(directory)
    num_ids, vocab_size = tokenizer.vocab_size, found.shape.vocab_size
    is_padded = found.path.is_dir() and given is None  # a published model may have rows to spare
    if num_ids > vocab_size or (num_ids < vocab_size and not is_padded):
        raise TokenizerError(
            f"tokenizer {directory} is of another vocabulary: {num_ids:,} ids, the model {found.path} has {vocab_size:,}",
            "name the one it was trained with: --tokenizer DIR",
        )
    return tokenizer


def model_of(found: Found) -> Model:
    """A model with these weights."""
    with torch.device("meta"):
        model = Model(found.shape)
    model.load_state_dict(found.weights, assign=True)
    return model


# --- a run of it ------------------------------------------------------------------------------------------------------


def import_model(path: Path, out: Path, *, tokenizer_dir: Path | None = None, num_heads: int | None = None) -> Imported:
    """Read the model at `path` and write it as a run that chat, eval, export and `--init` take. `out` must be new."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is already there", "choose another --out")
    found = read(path, num_heads=num_heads)
    tokenizer = tokenizer_for(found, tokenizer_dir)
    sha256 = _sha256(_weight_files(path) if path.is_dir() else [path])
    model = model_of(found)
    tokenizer.save(out / "tokenizer")
    checkpoint.save(
        out,
        model,
        torch.optim.SGD(model.parameters()),  # no optimizer has touched these weights: one without state
        step=0,
        settings={"stage": STAGE},
        data={"tokenizer_sha256": tokenizer.sha256, "init": None, "dirs": [], "digest": ""},
        keep_last=1,
    )
    now = time.time()
    facts = {
        "stage": STAGE,
        "status": "finished",
        "started": now,
        "ended": now,
        "settings": {},
        "model": as_json(found.shape),
        "num_params": found.shape.num_params,
        "num_steps": 0,
        "final_step": 0,
        "init": None,
        "imported": {"from": str(path), "origin": found.origin, "sha256": sha256},
        "data": [],
        "tokenizer_sha256": tokenizer.sha256,
    }
    checkpoint.write_atomic(out / "run.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return Imported(out, found.origin, found.shape, found.shape.num_params, tokenizer.dir, sha256)


def _sha256(files: list[Path]) -> str:
    """Hash of one file, or over the hashes of several."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_model(path: Path, *, tokenizer_dir: Path | None = None) -> tuple[Model, Tokenizer]:
    """The model and tokenizer at `path`, ready to answer: a run, a checkpoint, a `.pth` file or a Hugging Face directory."""
    if is_foreign(path):
        found = read(path)
        return model_of(found).eval(), tokenizer_for(found, tokenizer_dir)
    model = checkpoint.load_model(path)[0].eval()
    run_dir = checkpoint.find(path).run_dir
    return model, run_tokenizer(run_dir, model.config.vocab_size)


def run_tokenizer(run_dir: Path, vocab_size: int) -> Tokenizer:
    """A run's tokenizer; TokenizerError when it is not the one the run was trained with."""
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    expected = checkpoint.read_run(run_dir).get("tokenizer_sha256", tokenizer.sha256)
    if tokenizer.sha256 != expected or tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{tokenizer.dir} is not the tokenizer the run was trained with: {tokenizer.vocab_size:,} ids, "
            f"sha256 {tokenizer.sha256[:12]}, expected {expected[:12]}",
            "copy the right one back: it stands in the dataset the run was trained on, DATASET/tokenizer",
        )
    return tokenizer
