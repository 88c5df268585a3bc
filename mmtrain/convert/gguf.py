"""Writes a model and its tokenizer to one GGUF file for llama.cpp, reads it again and compares the tensors. Needs
`gguf`.

llama.cpp identifies the architecture of a model, and the pre-tokenizer (how a tokenizer splits text before merging), by
name. A pre-tokenizer for which llama.cpp has no known name is refused.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmdata.encode.template import ending_of
from mmdata.errors import TokenizerError, UsageError, needs
from mmdata.tokenizer.chat_template import CHATML, DEFAULT
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.convert.architectures import architecture_of
from mmtrain.convert.foreign import interleaved
from mmtrain.model.model import rope_divisors, rope_frequencies
from mmtrain.shapes import ModelConfig

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_REGEX = _QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(regex: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_PRE_TOKENIZERS = {  # llama.cpp's name -> steps of the pre-tokenizer in tokenizer.json, without "trim_offsets"
    "gpt-2": [_GPT2],  # used by MiniMind
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "qwen2": [_split(_QWEN2_REGEX), _BYTES],
    "llama-bpe": [_split(_LLAMA3_REGEX), _BYTES],
}
# The normalizer of tokenizers that were made of SentencePiece's, as those of Llama 2, TinyLlama and Mistral. They have no
# pre-tokenizer, and a token for each byte; llama.cpp merges by the scores of tokens instead of a list of merges.
_SENTENCEPIECE = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
_SENTENCEPIECE_NAME = "default"
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_Q8_BLOCK = 32  # q8_0 stores one scale for each 32 consecutive values of a matrix row


def write(
    path: Path, weights: Mapping[str, Tensor], shape: ModelConfig, tokenizer: Tokenizer, *, dtype: str, name: str
) -> list[str]:
    """Write a GGUF file and compare its tensors with the weights. Return sentences for the user about this and the
    precision. Raise UsageError if `gguf` is not installed or llama.cpp has no such model, TokenizerError if it does not
    know the pre-tokenizer.
    weights: the state dict. dtype: "f32", "f16" or "q8_0", for matrices; norms are always f32, and a matrix whose rows
    q8_0 cannot divide into blocks is f16. name: the model's name in the file."""
    with needs("writing GGUF needs the gguf package", "gguf"):
        import gguf

    pre_tokenizer = pre_tokenizer_name(tokenizer)
    writer = gguf.GGUFWriter(path, _architecture(shape))
    _add_shape(writer, shape, name)
    file_types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[file_types[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, gguf.TokenType, tokenizer, shape.vocab_size, pre_tokenizer)
    kept_wide = []
    for tensor_name, values in tensors(weights, shape):
        kind = "F32" if values.ndim == 1 else dtype.upper()
        if kind == "Q8_0" and values.shape[-1] % _Q8_BLOCK:
            kind = "F16"
            kept_wide.append(tensor_name)
        quant = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(tensor_name, gguf.quants.quantize(values, quant), raw_dtype=quant)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:  # a full disk: what is still buffered cannot be written either
        for file in writer.fout or ():
            with suppress(OSError):
                file.close()
        if error.errno is None:  # numpy only says how many bytes it could write
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    writer.close()
    worst = _read_back(path, weights, shape)
    precision = "bit for bit" if dtype == "f32" else f"to {worst:.1e}"
    checks = [f"read back: every tensor is the checkpoint's, {precision}; text is split as by {pre_tokenizer!r}"]
    if kept_wide:
        checks.append(f"{len(kept_wide)} matrices whose rows are no multiple of {_Q8_BLOCK} stay f16")
    return checks


def tensors(weights: Mapping[str, Tensor], shape: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor's name in llama.cpp and its values in fp32. For Llama and SmolLM3 llama.cpp rotates adjacent
    rows of each head, so the rows of their query and key matrices are reordered. Llama 3's scaling of the rotary
    frequencies is a tensor too: the number that divides each of them."""
    rotates_adjacent = _architecture(shape) in ("llama", "smollm3")
    if shape.rope_scaling:
        frequencies = rope_frequencies(shape.head_size, shape.rope_theta)
        yield "rope_freqs.weight", rope_divisors(frequencies, shape.rope_scaling).numpy()
    for name, value in weights.items():
        if rotates_adjacent and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = interleaved(value, shape.head_size)
        yield _name(name), value.detach().float().contiguous().numpy()


def _name(name: str) -> str:
    """Return llama.cpp's name of a tensor, given its name in mm's state dict."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_NAMES[module]}.{kind}"


def _architecture(shape: ModelConfig) -> str:
    """Return llama.cpp's name of the architecture, which is transformers' model type. Raise UsageError for a SmolLM3
    whose layers without rotary positions are not every fourth one, which llama.cpp takes for granted."""
    name = architecture_of(shape)[0]
    if name == "smollm3" and shape.layers_without_rope != tuple(range(3, shape.num_layers, 4)):
        layers = ", ".join(map(str, shape.layers_without_rope))
        raise UsageError(
            f"llama.cpp's smollm3 has no rotary positions in every fourth layer; this model in layers {layers}",
            "--format hf keeps any",
        )
    return name


def _add_shape(writer: Any, shape: ModelConfig, name: str) -> None:
    # By these names llama.cpp takes a tokenizer for that of Phi-3, and strips white space behind special tokens.
    writer.add_name(re.sub("phi-?3", "phi 3", name, flags=re.IGNORECASE))
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)


def _add_tokenizer(writer: Any, types: Any, tokenizer: Tokenizer, vocab_size: int, pre_tokenizer: str) -> None:
    """Write vocabulary, merges, special ids and chat template as metadata. Ids below `vocab_size` (the rows of the
    embedding) that have no token are marked unused. types: the enumeration gguf.TokenType."""
    model = json.loads(tokenizer.files["tokenizer.json"])["model"]
    by_id = {id: token for token, id in tokenizer.native.get_vocab(with_added_tokens=True).items()}
    is_sentencepiece = pre_tokenizer == _SENTENCEPIECE_NAME

    def type_of(id: int) -> Any:
        if is_sentencepiece and id in by_id and by_id[id] == model["unk_token"]:
            return types.UNKNOWN
        if is_sentencepiece and re.fullmatch("<0x[0-9A-F]{2}>", by_id.get(id, "")):
            return types.BYTE
        if added := tokenizer.added.get(id):
            return types.CONTROL if added.special else types.USER_DEFINED
        return types.NORMAL if id in by_id else types.UNUSED

    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    writer.add_tokenizer_model("llama" if is_sentencepiece else "gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([by_id.get(id, f"[PAD{id}]") for id in range(vocab_size)])
    writer.add_token_types([type_of(id) for id in range(vocab_size)])
    if is_sentencepiece:  # the earlier two tokens are merged, the higher the score of the result
        ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(ranks.get(by_id.get(id, ""), 0)) for id in range(vocab_size)])
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    for id, add in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (tokenizer.eos_id, writer.add_eos_token_id),
        (ending_of(tokenizer).ids[0], writer.add_eot_token_id),  # llama.cpp stops at eos and at eot
        (tokenizer.pad_id, writer.add_pad_token_id),
    ):
        if id is not None:
            add(id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(is_sentencepiece)
    templates = tokenizer.chat_templates or {DEFAULT: CHATML}
    writer.add_chat_template([{"name": name, "template": template} for name, template in templates.items()])


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """Return llama.cpp's name for a pre-tokenizer. Raise TokenizerError if it is none of `_PRE_TOKENIZERS`, or the
    tokenizer is not BPE or has a normalizer other than NFC or `_SENTENCEPIECE`."""
    parts = json.loads(tokenizer.files["tokenizer.json"])
    model, normalizers = parts["model"], (parts.get("normalizer") or {}).get("normalizers")
    if model.get("byte_fallback") and normalizers == _SENTENCEPIECE and not parts.get("pre_tokenizer"):
        return _SENTENCEPIECE_NAME
    root = parts.get("pre_tokenizer") or {}
    steps = root.get("pretokenizers", [root])
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    normalizer = (parts.get("normalizer") or {}).get("type")
    # NFC is accepted although llama.cpp does not apply it: its callers have to.
    if model["type"] == "BPE" and normalizer in (None, "NFC"):
        for name, expected in _PRE_TOKENIZERS.items():
            if steps == expected:
                return name
    raise TokenizerError(
        f"{tokenizer.dir}: llama.cpp has no name for its pre-tokenizer ({json.dumps(steps)[:200]})",
        f"supported are those of {', '.join(_PRE_TOKENIZERS)}: train one with `mm tokenizer train --pattern gpt2`; "
        "--format hf keeps any tokenizer",
    )


def _read_back(path: Path, weights: Mapping[str, Tensor], shape: ModelConfig) -> float:
    """Return the largest difference of a GGUF file's tensors from the weights, relative to the tensor's largest
    absolute value."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst, names = 0.0, set()
    for name, values in tensors(weights, shape):
        read = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type).reshape(values.shape)
        worst = max(worst, float(np.abs(read - values).max() / max(float(np.abs(values).max()), 1e-30)))
        names.add(name)
    assert names == stored.keys(), names ^ stored.keys()
    return worst
