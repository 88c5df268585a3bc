"""Small models as other programs keep them: tensors by MiniMind's names, of the seed and since, and the tokenizer's files.

The seed's forward is written here anew, with rotary positions turning neighbours, to compare what is imported with.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdata.tokenizer.tokenizer import CHATML, Tokenizer, train_bpe
from mmtrain.shapes import ModelConfig

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHAPE = ModelConfig(300, 64, 2, 8, 2, 96)
NORMED = ModelConfig(300, 64, 2, 8, 4, 96, norm_eps=1e-6, qk_norm=True)


def make_tokenizer(out: Path, *, vocab_size: int = 300, split_digits: bool = True) -> Tokenizer:
    texts = ["user\n", "assistant\n", "Where does Pim live?", "皮姆住在哪里？", "17 + 25 = 42"] * 4
    return train_bpe(
        texts,
        vocab_size=vocab_size,
        control_tokens=CONTROL,
        chat_template=CHATML,
        out_dir=out,
        split_digits=split_digits,
    )


def weights(shape: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors by the names of MiniMind since April 2025, the output matrix beside its embedding; norms too vary."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * (2 * size[-1] ** -0.5 if len(size) > 1 else 0.2) + (
            len(size) == 1
        )

    width, kv = shape.hidden_size, shape.num_kv_heads * shape.head_size
    found = {"model.embed_tokens.weight": draw(shape.vocab_size, width)}
    for i in range(shape.num_layers):
        block = {
            "self_attn.q_proj": draw(width, width),
            "self_attn.k_proj": draw(kv, width),
            "self_attn.v_proj": draw(kv, width),
            "self_attn.o_proj": draw(width, width),
            "mlp.gate_proj": draw(shape.ffn_size, width),
            "mlp.up_proj": draw(shape.ffn_size, width),
            "mlp.down_proj": draw(width, shape.ffn_size),
            "input_layernorm": draw(width),
            "post_attention_layernorm": draw(width),
        }
        if shape.qk_norm:
            block |= {"self_attn.q_norm": draw(shape.head_size), "self_attn.k_norm": draw(shape.head_size)}
        found |= {f"model.layers.{i}.{name}.weight": value for name, value in block.items()}
    found["model.norm.weight"] = draw(width)
    return found | {"lm_head.weight": found["model.embed_tokens.weight"]}


SEED = {
    "model.embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "model.": "",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def seed_weights(shape: ModelConfig) -> dict[str, Tensor]:
    """The same by the names of MiniMind before April 2025."""
    renamed = {}
    for name, value in weights(shape).items():
        for ours, theirs in SEED.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def seed_logits(tensors: dict[str, Tensor], shape: ModelConfig, ids: Tensor) -> Tensor:
    """Logits [T, V] of ids [T] as the seed's model computes them: complex numbers turn the neighbours (2i, 2i + 1)."""
    size, num = shape.head_size, len(ids)
    speeds = shape.rope_theta ** -(torch.arange(0, size, 2) / size)
    angles = torch.outer(torch.arange(num), speeds)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def normed(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + shape.norm_eps).rsqrt() * tensors[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    x = tensors["tok_embeddings.weight"][ids]
    for i in range(shape.num_layers):
        part = {name: tensors[f"layers.{i}.{name}.weight"] for name in (*(f"attention.w{c}" for c in "qkvo"),)}
        h = normed(x, f"layers.{i}.attention_norm")
        q, k, v = ((h @ part[f"attention.w{c}"].T).unflatten(-1, (-1, size)) for c in "qkv")
        q, k = turned(q), turned(k)
        k, v = (y.repeat_interleave(shape.num_heads // shape.num_kv_heads, 1) for y in (k, v))
        scores = torch.einsum("thd,shd->hts", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(num, num, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", scores, v).flatten(1) @ part["attention.wo"].T
        h = normed(x, f"layers.{i}.ffn_norm")
        w1, w2, w3 = (tensors[f"layers.{i}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return normed(x, "norm") @ tensors["output.weight"].T


def transformers_model(
    model_type: str,
    out: Path,
    tokenizer: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shards: bool = False,
    **config: Any,
) -> Any:
    """A small random model of transformers, saved to `out` with a tokenizer of 300 ids: every weight is drawn, norms and
    biases too. config: overrides of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(std=scale, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1)
    model.to(dtype).save_pretrained(out, max_shard_size="50KB" if shards else "1GB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((tokenizer / file).read_bytes())
    return model


def make_sentencepiece(out: Path) -> int:
    """Write a tokenizer as transformers makes it of a SentencePiece model (Llama 2): a token for each byte, and a merge
    for every pair that makes a piece. Return its number of ids."""
    from tokenizers import AddedToken, decoders, models, normalizers, trainers
    from tokenizers import Tokenizer as Native

    texts = ["Where does Pim live? In a red house.", "皮姆住在哪里？", "17 + 25 = 42", " the weather is nice"] * 5
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made = Native(models.BPE())
    made.normalizer = normalizer
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = sorted(made.get_vocab(), key=lambda token: made.get_vocab()[token])
    special = ("<unk>", "<s>", "</s>")
    vocab = {token: id for id, token in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned])}
    known = set(learned)
    pairs = [(token[:k], token[k:]) for token in learned for k in range(1, len(token))]
    merges = [pair for pair in pairs if known.issuperset(pair)]
    native = Native(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    native.normalizer = normalizer
    native.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    native.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    out.mkdir(parents=True)
    native.save(str(out / "tokenizer.json"))
    user = "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    template = f"{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user}{{% else %}}"
    template += "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocab)
