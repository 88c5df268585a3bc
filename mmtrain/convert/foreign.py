"""Reads models of other programs: MiniMind's `.pth` files of any version, and Hugging Face directories of the model
types in `DEFAULTS`. `import_model` converts such a model to a run; `open_model` opens any model that a command accepts.

Reading is strict. A missing or additional tensor is an error, and so is a feature that our model does not have, such as
sliding windows. From pickle files only tensors are read; a file that would run code is refused. Values are
not changed, only converted to fp32.
"""

import hashlib
import pickle
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from msgspec import Struct
from torch import Tensor

from mmdata.errors import CheckpointError, TokenizerError, UsageError
from mmdata.io import files
from mmdata.io.records import read_record, write_record
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain import checkpoint
from mmtrain.convert.architectures import DEFAULTS, HFConfig, other_experts, read_config, shape_of_weights
from mmtrain.model.model import Model
from mmtrain.records import RUN, RunRecord, TrainedOn, read_run
from mmtrain.shapes import ModelConfig

STAGE = "imported"  # the stage in the run.json that `mm import` writes
PICKLES = (".pth", ".pt", ".bin")
SEED_ORIGIN = "MiniMind before April 2025, rotary interleaved"

# The names that MiniMind used until April 2025 ("seed" in this module) -> ours. Its later names are ours; it also has
# lm_head, the output projection, which is tied to the embedding.
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
# Buffers that can be computed from the shape.
_TABLES = re.compile(r"(^|\.)(pos_cis|freqs_cos|freqs_sin|mask|inv_freq)$")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # prefixes that DistributedDataParallel and torch.compile add


@dataclass(frozen=True)
class ForeignModel:
    """A model read from the file or directory `path` of another program. weights: fp32, under our names. shape: its
    configuration. tokenizer_dir: None if no tokenizer was found."""

    path: Path
    weights: dict[str, Tensor]
    shape: ModelConfig
    origin: str
    tokenizer_dir: Path | None


@dataclass(frozen=True)
class Imported:
    """Result of `import_model`. sha256: hash of the weights file; of several files, the hash of their concatenated
    hashes."""

    run_dir: Path
    origin: str
    shape: ModelConfig
    num_params: int
    tokenizer_dir: Path
    sha256: str


# --- reading


def is_foreign(path: Path) -> bool:
    """Return whether `path` looks like a model of another program: a file of weights by its
    name (some of which `read` refuses), or a directory with a config.json. Other paths are taken for runs or checkpoints."""
    return path.suffix in (*PICKLES, ".gguf", ".safetensors") or (path / "config.json").is_file()


def read(path: Path, *, num_heads: int | None = None) -> ForeignModel:
    """Read the weights of a torch file (suffix in PICKLES) or of a Hugging Face directory. num_heads: of queries,
    ignored if there are query norms; None for that of config.json (directories only), else MiniMind's 8. Raise
    CheckpointError if they cannot be read or mm has no such model."""
    if path.is_dir():
        config = read_config(path)
        tensors: dict[str, Tensor] = {}
        for file in _weight_files(path):
            tensors |= _load(file)
        tokenizer_dir = path if (path / "tokenizer.json").is_file() else None
    elif not path.exists():
        raise CheckpointError(f"{path}: no such file", "give a .pth file or a Hugging Face directory")
    elif path.suffix not in PICKLES:
        raise CheckpointError(
            f"{path} is neither a torch file ({', '.join(PICKLES)}) nor a directory",
            "of a GGUF file, give the Hugging Face directory that it was made from; of a safetensors file its directory",
        )
    else:
        config, tensors, tokenizer_dir = HFConfig("minimind"), _load(path), _tokenizer_beside(path)
    weights, is_seed = _our_names(tensors, path)
    shape = shape_of_weights(weights, path, config, num_heads)
    if config.model_type != "minimind":
        origin = f"Hugging Face {config.model_type}"
    else:
        origin = SEED_ORIGIN if is_seed else "MiniMind, named as in Hugging Face"
    return ForeignModel(path, _checked(weights, shape, is_seed, path), shape, origin, tokenizer_dir)


class _Index(Struct):
    """The content of NAME.index.json: which file has each tensor, for weights in several files."""

    weight_map: dict[str, str]


def _weight_files(path: Path) -> list[Path]:
    """Return the weight files of a Hugging Face directory, safetensors before pickles. Raise CheckpointError if there
    are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            index = read_record(path / f"{name}.index.json", _Index, CheckpointError, "copy or download it again")
            return [path / file for file in sorted(set(index.weight_map.values()))]
    raise CheckpointError(f"{path}: no model.safetensors and no pytorch_model.bin", "download the weights too")


def _load(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a weights file by name. Raise CheckpointError if it is not there or only its Git LFS pointer
    is, if it is damaged, or if it has other values than tensors."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, although the index beside it names it", "download it too")
    with path.open("rb") as file:
        head = file.read(200)
    files.refuse_pointer(path, head, CheckpointError)
    return checkpoint.read_tensors(path) if path.suffix == ".safetensors" else _load_pickle(path)


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a torch file by name; of a training state (such as MiniMind's *_resume.pth), those under
    "model" or "state_dict". Raise CheckpointError if the file is damaged or has other values than tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|global|class|function) [`'\"]?([\w.]+)", str(error))
        content = f"it asks for {match[1]}" if match else "its pickle holds more than tensors"
        raise CheckpointError(
            f"{path} holds more than weights: {content}; reading it would run its code",
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


# --- names and shapes


def _our_names(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors under our names, without wrappers' prefixes and buffers that follow from the shape, and
    whether they had MiniMind's names until April 2025. Raise CheckpointError for shared experts and LoRA adapters."""
    named = {_WRAPPERS.sub("", name): value for name, value in tensors.items()}
    named = {name: value for name, value in named.items() if not _TABLES.search(name)}
    if any("shared_expert" in name or "feed_forward.experts." in name for name in named):
        raise other_experts(path)
    if any(".lora" in name for name in named):
        raise CheckpointError(f"{path} holds LoRA adapters, not a model", "merge them into their model first")
    is_seed = "tok_embeddings.weight" in named
    return {_from_seed(name): value for name, value in named.items()} if is_seed else named, is_seed


def _from_seed(name: str) -> str:
    """Return our name for a name that MiniMind used until April 2025. An unknown one is unchanged; `_checked` refuses
    it."""
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
    if not match or match[2] not in _SEED_NAMES:
        return name
    prefix = f"model.{match[1]}" if match[1] else ""
    return f"{prefix}{_SEED_NAMES[match[2]]}.weight"


def _checked(weights: dict[str, Tensor], shape: ModelConfig, is_seed: bool, path: Path) -> dict[str, Tensor]:
    """Return the weights in fp32. Raise CheckpointError unless names and shapes are exactly those of a model of this
    shape and a tied output projection, if present, equals the embedding. is_seed: the weights are from MiniMind before
    April 2025, so rows of queries and keys are reordered by `_half_split`."""
    output = weights.pop("lm_head.weight", None) if shape.tied else None
    if output is not None and not torch.equal(output, weights["model.embed_tokens.weight"]):
        raise CheckpointError(
            f"{path}: its output matrix is not its embedding, although its configuration ties them",
            'if they are meant to differ, set "tie_word_embeddings": false in a config.json beside the weights',
        )
    with torch.device("meta"):
        expected = Model(shape).state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unexpected:
        problems = [
            f"{verb} {', '.join(names[:3])}" for verb, names in (("lacks", missing), ("has", unexpected)) if names
        ]
        rest = len(missing[3:]) + len(unexpected[3:])
        more = f" and {rest} more" if rest else ""
        message = f"{path}: {' and '.join(problems)}{more}: not a model of this kind"
        raise CheckpointError(message, f"import a model of type {', '.join(DEFAULTS)}")
    for name, value in weights.items():
        if value.shape != expected[name].shape or not value.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} is {value.dtype} {list(value.shape)}, expected {list(expected[name].shape)}",
                f"give the right --num-heads, or import a model of type {', '.join(DEFAULTS)}",
            )
        is_rotated = name.endswith(("q_proj.weight", "k_proj.weight"))
        weights[name] = _half_split(value, shape.head_size) if is_seed and is_rotated else value.float().contiguous()
    return weights


def _half_split(weight: Tensor, head_size: int) -> Tensor:
    """Reorder the rows of a query or key matrix [heads * D, C] for another convention of rotary embeddings: rows 2i and
    2i + 1 of each head were rotated together; afterwards rows i and i + D/2 are. This is exact, because the order of
    rows within a head only matters for the rotation, and queries and keys are reordered alike."""
    pairs = weight.float().unflatten(0, (-1, head_size // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def interleaved(weight: Tensor, head_size: int) -> Tensor:
    """Invert `_half_split`: rows 2i and 2i + 1 of each head are rotated together, as llama.cpp expects of Llama models."""
    halves = weight.unflatten(0, (-1, 2, head_size // 2))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


# --- tokenizer


def _tokenizer_beside(path: Path) -> Path | None:
    """Return the directory with the tokenizer of a weights file, or None. Searched are tokenizer/ beside the file, the
    file's directory, and model/ (used by MiniMind) and tokenizer/ in the directory above, in this order."""
    here = path.resolve().parent
    candidates = (here / "tokenizer", here, here.parent / "model", here.parent / "tokenizer")
    return next((directory for directory in candidates if (directory / "tokenizer.json").is_file()), None)


def tokenizer_for(foreign: ForeignModel, tokenizer_dir: Path | None = None) -> Tokenizer:
    """Return the tokenizer in `tokenizer_dir`, or the one found with the model if that is None. Raise TokenizerError if
    there is none or its vocabulary size is not the model's; that of a Hugging Face directory may be smaller, since
    embeddings are often padded."""
    fix = "name the one it was trained with: --tokenizer DIR"
    directory = tokenizer_dir or foreign.tokenizer_dir
    if directory is None:
        raise TokenizerError(f"{foreign.path} has no tokenizer beside it", fix)
    tokenizer = Tokenizer.load(directory)
    num_ids, vocab_size = tokenizer.vocab_size, foreign.shape.vocab_size
    # The embedding of a published model may have more rows than its tokenizer has ids.
    is_padded = foreign.path.is_dir() and tokenizer_dir is None
    if num_ids > vocab_size or (num_ids < vocab_size and not is_padded):
        ids = f"{num_ids:,} ids, the model {foreign.path} has {vocab_size:,}"
        raise TokenizerError(f"tokenizer {directory} is of another vocabulary: {ids}", fix)
    return tokenizer


def run_tokenizer(run_dir: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a run. Raise TokenizerError if its hash is not the one in run.json, or it has more than
    `vocab_size` ids, the rows of the model's embedding."""
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    expected = read_run(run_dir).tokenizer_sha256 or tokenizer.sha256
    if tokenizer.sha256 != expected or tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{tokenizer.dir} is not the tokenizer the run was trained with: {tokenizer.vocab_size:,} ids, "
            f"sha256 {tokenizer.sha256[:12]}, expected {expected[:12]}",
            "copy the right one back from the dataset the run was trained on: DATASET/tokenizer",
        )
    return tokenizer


# --- models and runs


def model_with(shape: ModelConfig, weights: Mapping[str, Tensor]) -> Model:
    """Return a model with these weights, which are not copied."""
    with torch.device("meta"):
        model = Model(shape)
    model.load_state_dict(weights, assign=True)
    return model


def open_model(path: Path, *, tokenizer_dir: Path | None = None) -> tuple[Model, Tokenizer]:
    """Return the model, in eval mode on the CPU, and the tokenizer of a run, checkpoint, `.pth` file or Hugging Face
    directory. tokenizer_dir: only for models of other programs. Raise CheckpointError or TokenizerError if one cannot
    be used."""
    if is_foreign(path):
        foreign = read(path)
        return model_with(foreign.shape, foreign.weights).eval(), tokenizer_for(foreign, tokenizer_dir)
    model = checkpoint.load_model(path)[0].eval()
    return model, run_tokenizer(checkpoint.find(path).run_dir, model.config.vocab_size)


def import_model(path: Path, out: Path, *, tokenizer_dir: Path | None = None, num_heads: int | None = None) -> Imported:
    """Write the model at `path`, a `.pth` file or a Hugging Face directory, to `out`, which appears complete or not at
    all, as a run trained for 0 steps, for all commands. tokenizer_dir, num_heads: see `tokenizer_for` and `read`. Raise
    UsageError if `out` is not empty, CheckpointError or TokenizerError if the model or its tokenizer cannot be used."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is already there", "choose another --out")
    foreign = read(path, num_heads=num_heads)
    tokenizer = tokenizer_for(foreign, tokenizer_dir)
    hashes = [files.sha256_of(file) for file in (_weight_files(path) if path.is_dir() else [path])]
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    model = model_with(foreign.shape, foreign.weights)
    now = time.time()
    run = RunRecord(
        stage=STAGE,
        status="finished",
        started=now,
        ended=now,
        model=foreign.shape,
        num_params=foreign.shape.num_params,
        final_step=0,
        imported={"from": str(path), "origin": foreign.origin, "sha256": sha256},
        tokenizer_sha256=tokenizer.sha256,
    )
    with files.new_directory(out) as partial:
        tokenizer.save(partial / "tokenizer")
        checkpoint.save(
            partial,
            model,
            torch.optim.SGD(model.parameters()),  # an optimizer without state
            step=0,
            settings={"stage": STAGE},
            data=TrainedOn(tokenizer_sha256=tokenizer.sha256),
            keep_last=1,
        )
        write_record(partial / RUN, run, indent=2)
    return Imported(out, foreign.origin, foreign.shape, foreign.shape.num_params, out / "tokenizer", sha256)
