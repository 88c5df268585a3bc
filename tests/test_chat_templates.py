"""The templates a new tokenizer may be given write what MiniMind's write, told by whole renderings, and by transformers."""

import tomllib
from pathlib import Path
from typing import Any

import eras
import pytest
import text_data

from mmdata.encode.rows import Conversation, Message
from mmdata.encode.template import Template
from mmdata.encode.template.traced import template_environment
from mmdata.tokenizer.toolkit.layouts import LAYOUTS

CALL = {"function": {"name": "f", "arguments": {"x": "é<1>"}}}
TOOLS = [{"name": "f", "description": "does"}, {"name": "g"}]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Rule."},
    {"role": "user", "content": "Ask"},
    {"role": "assistant", "content": "Let me see.", "reasoning_content": "\nHm\n", "tool_calls": [CALL, {"name": "g", "arguments": "{}"}]},
    {"role": "tool", "content": "one"},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "<think>\nSo\n</think>\n\nDone."},
    {"role": "system", "content": "Another."},
    {"role": "user", "content": "More"},
    {"role": "assistant", "content": None},
]  # fmt: skip
TOOL_BLOCK = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"name": "f", "description": "does"}
{"name": "g"}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
"""
CALLS = """<tool_call>
{"name": "f", "arguments": {"x": "é<1>"}}
</tool_call>
<tool_call>
{"name": "g", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
one
</tool_response>
<tool_response>
two
</tool_response><|im_end|>
"""


def render(name: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return template_environment().from_string(LAYOUTS[name].template).render(messages=messages, **options)


def test_minimind3_writes_every_role() -> None:
    expected = (
        f"<|im_start|>system\nRule.\n\n{TOOL_BLOCK}<|im_start|>user\nAsk<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nHm\n</think>\n\nLet me see.\n{CALLS}"
        "<|im_start|>assistant\n<think>\nSo\n</think>\n\nDone.<|im_end|>\n"
        "<|im_start|>system\nAnother.<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n<|im_end|>\n"
    )
    assert render("minimind3", MESSAGES, tools=TOOLS) == expected
    asked = MESSAGES[:2]
    head = "<|im_start|>system\nRule.<|im_end|>\n<|im_start|>user\nAsk<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert render("minimind3", asked, add_generation_prompt=True) == head + "\n</think>\n\n"
    assert render("minimind3", asked, add_generation_prompt=True, open_thinking=True) == head
    assert render("minimind3", asked[1:]).startswith("<|im_start|>user")


def test_minimind2_writes_every_role() -> None:
    expected = (
        f"<|im_start|>system\nRule.\n\n{TOOL_BLOCK}<|im_start|>user\nAsk<|im_end|>\n"
        f"<|im_start|>assistant\nLet me see.\n{CALLS}"
        "<|im_start|>assistant\n<think>\nSo\n</think>\n\nDone.<|im_end|>\n"
        "<|im_start|>system\nAnother.<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )
    assert render("minimind2", MESSAGES, tools=TOOLS) == expected
    head = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nAsk<|im_end|>\n<|im_start|>assistant\n"
    asked = MESSAGES[1:2]
    assert render("minimind2", asked, add_generation_prompt=True) == head
    assert (
        render("minimind2", asked, add_generation_prompt=True, enable_thinking=False)
        == head + "<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(("name", "era"), [("minimind2", "era2"), ("minimind3", "era3")])
def test_renderings_equal_those_of_the_templates_tests_hold_of_each_era(name: str, era: str) -> None:
    theirs = template_environment().from_string(eras.tokenizer(era).chat_template or "")
    for messages in (MESSAGES[:2], MESSAGES[:3], [*MESSAGES[:2], MESSAGES[5]]):
        for prompt in (False, True):
            ours = render(name, messages, add_generation_prompt=prompt)
            assert ours == theirs.render(messages=messages, add_generation_prompt=prompt)


def test_transformers_renders_the_same(tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("theirs")
    theirs = AutoTokenizer.from_pretrained(text_data.trained(root).dir)
    text = theirs.apply_chat_template(MESSAGES[:-1], tools=TOOLS, tokenize=False)
    assert text == render("minimind3", MESSAGES[:-1], tools=TOOLS)


@pytest.mark.parametrize(("name", "era"), [("chatml", "2"), ("minimind2", "2"), ("minimind3", "3")])
def test_a_tokenizer_with_each_template_cuts_rows(tmp_path: Path, name: str, era: str) -> None:
    template = Template(text_data.trained(tmp_path, template=name))
    row = Conversation((Message("user", "Ask"), Message("assistant", "Tell")))
    trained = "".join(part.text for part in template.segments(row) if part.is_trained)
    assert template.era == era and trained.endswith("Tell<|im_end|>\n")


def test_control_tokens_lie_as_minimind_lays_them_out() -> None:
    layout = LAYOUTS["minimind3"]
    assert layout.tokens[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert (len(layout.control), len(layout.tokens)) == (21, 36)
    places = {token: id for id, token in enumerate(layout.tokens)}
    assert (places["<|object_ref_start|>"], places["<|vision_pad|>"], places["<|audio_pad|>"]) == (3, 11, 16)
    assert (places["<tts_text_bos_single>"], places["<tool_call>"], places["</think>"]) == (20, 21, 26)
    assert (places["<|buffer1|>"], places["<|buffer9|>"]) == (27, 35)


def test_the_templates_are_part_of_the_package() -> None:
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["package-data"]["mmdata.tokenizer.toolkit"] == ["templates/*"]
