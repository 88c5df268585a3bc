"""Tokenizers whose chat templates end an answer in different ways: own reductions of published ones, and made-up ones.

The vocabulary is that of golden/tokenizer, with the special tokens that a template writes.
"""

import functools
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eras

from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.convert.gguf import _LLAMA3_REGEX

ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASSISTANT
TOOL_USE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "<call>{{ (call.function or call) | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}" + ASSISTANT
)
LLAMA = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A chat template, its eos token and, in the order of preference, what ends an answer."""

    template: Any
    eos: str
    ends: tuple[str, ...]


KINDS = {
    "glm4": Kind(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|endoftext|>",
        (),
    ),
    "only_a_newline": Kind(
        "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}",
        "<|endoftext|>",
        (),
    ),
    "qwen_base": Kind(CHATML, "<|endoftext|>", ("<|im_end|>",)),
    "llama3": Kind("{{ bos_token }}" + LLAMA, "<|end_of_text|>", ("<|eot_id|>",)),
    "dated": Kind(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday is {{ strftime_now('%d %b %Y') }}.<|eot_id|>"
        + LLAMA,
        "<|eot_id|>",
        ("<|eot_id|>",),
    ),
    "phi3": Kind(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        ("<|end|>",),
    ),
    "mistral": Kind(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
        ("</s>",),
    ),
    "vicuna": Kind(
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
        "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        "</s>",
        ("</s>",),
    ),
    "eos_at_the_very_end": Kind(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|endoftext|>",
        ("<|endoftext|>",),
    ),
    "another_end_for_the_last": Kind(
        "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
        "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}",
        "<|return|>",
        ("<|return|>", "<|end|>"),
    ),
    "channels": Kind(  # <|end|> ends a channel, so the answer goes on after it
        "{% for m in messages %}{% if m.role != 'assistant' %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% else %}"
        "{% if m.reasoning_content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
        "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>",
        ("<|return|>",),
    ),
    "ends_with_text": Kind(
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n### end\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}",
        "<|endoftext|>",
        ("\n### end",),
    ),
    "no_generation_prompt": Kind(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\n",
        "<|im_end|>",
        ("<|im_end|>",),
    ),
    "named": Kind(
        [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOL_USE}],
        "<|im_end|>",
        ("<|im_end|>",),
    ),
}  # fmt: skip
PRE_TOKENIZER = {  # that of Llama 3: "\n\n" is encoded alike whatever follows it
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3_REGEX}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
SPECIAL = re.compile(r"<\|[\w]+\|>|\[gMASK\]|<sop>|</s>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mm-test-")


@functools.cache
def directory(name: str) -> Path:
    """The directory of a tokenizer with the template of that name."""
    kind = KINDS[name]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>" if "<s>" in str(kind.ends) + kind.eos else "<|begin_of_text|>",
        "eos_token": kind.eos,
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": kind.template,
    }
    out = Path(_scratch().name) / name
    out.mkdir()
    parts = json.loads((eras.HERE / "golden" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    parts["pre_tokenizer"] = PRE_TOKENIZER
    known = {token["content"] for token in parts["added_tokens"]}
    marks = [*SPECIAL.findall(json.dumps(kind.template)), kind.eos, *(ROLES if "<|{{" in str(kind.template) else ())]
    for mark in dict.fromkeys(marks):
        if mark not in known:
            known.add(mark)
            id = parts["added_tokens"][-1]["id"] + 1
            parts["added_tokens"].append({**parts["added_tokens"][0], "id": id, "content": mark})
    (out / "tokenizer.json").write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return out


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """As `directory`, loaded."""
    return Tokenizer.load(directory(name))
