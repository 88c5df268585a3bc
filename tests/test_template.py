"""Conversations in, segments out: the template's own rendering, and what of it is trained."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import eras
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from mmdata.encode.rows import BadRow, Conversation, Message
from mmdata.encode.template import EMPTY_THINK, Segment, Template, stretches
from mmdata.encode.template.traced import (
    Origin,
    SourceText,
    Traced,
    concat,
    missing_parts,
    template_environment,
    traced,
)
from mmdata.errors import TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import Tokenizer


@cache
def template(name: str) -> Template:
    return Template(eras.tokenizer(name))


@cache
def theirs(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(eras.directory(name))


def talk(*said: str, system: str | None = None) -> Conversation:
    roles = ["user", "assistant"] * len(said)
    messages = [Message(role, text) for role, text in zip(roles, said, strict=False)]
    return Conversation(tuple([Message("system", system)] * (system is not None) + messages))


def as_dicts(conversation: Conversation) -> list[dict[str, Any]]:
    found = []
    for m in conversation.messages:
        more = {"reasoning_content": m.reasoning_content, "tool_calls": list(m.tool_calls) or None}
        found.append({"role": m.role, "content": m.content, **{key: v for key, v in more.items() if v is not None}})
    return found


CALL = Message("assistant", "", None, ({"name": "add", "arguments": {"a": 1, "s": 'x\n"é'}},))
CALLS = Message(
    "assistant", "So:", "why", ({"function": {"name": "f", "arguments": "{}"}}, {"name": "g", "arguments": {}})
)
TALKS = {
    "plain": talk("hi", "hello"),
    "system": talk("hi", "hello", system="be kind"),
    "empty system": talk("hi", "hello", system=""),
    "turns": talk("a", "b", "c", "d", "e", "f"),
    "spaces": talk(" \n hi\t", "  hello \n\n", "\n", "\n\n  x"),
    "think": talk("hi", "<think>\nsum\n</think>\n\nhello", "more", "<think>\n\n</think>\n\nyes"),
    "half a think": talk("hi", "sum\n</think>hello"),
    "tags": talk("<tool_response>hi</tool_response>", "<tool_call>x</tool_call>"),
    "reasoning": Conversation((Message("user", "hi"), Message("assistant", "hello", "\nbecause\n"))),
    "no reasoning": Conversation((Message("user", "hi"), Message("assistant", "a</think>b", ""))),
    "tools": Conversation(
        (Message("system", ""), Message("user", "1+1"), CALL, Message("tool", "2"), Message("assistant", "It is 2.")),
        ({"name": "add", "parameters": {"é": [1, None, True]}},),
    ),
    "more tools": Conversation(
        (
            Message("user", "1+1"),
            CALLS,
            Message("tool", "2"),
            Message("tool", ""),
            CALL,
            Message("tool", "3"),
            Message("assistant", "3"),
        )
    ),
    "unicode": talk("𝔘e\u0301👩‍👩‍👧\u200b\ufeff", "ﬁ\u2028\x00\x1b[0m"),
    "late system": Conversation((*talk("a", "b").messages, Message("system", "now brief"), *talk("c", "d").messages)),
}


@pytest.mark.parametrize("name", eras.TEMPLATES)
@pytest.mark.parametrize("case", TALKS)
def test_segments_joined_are_what_transformers_renders(name: str, case: str) -> None:
    try:
        segments = template(name).segments(TALKS[case])
    except BadRow as bad:
        is_refused = name == "marked" and any(m.role == "system" for m in TALKS[case].messages)
        assert bad.reason == ("template refuses" if is_refused else "template cannot be cut")
        assert is_refused or "tool calls lost" in {loss.reason for loss in template(name).losses(TALKS[case])}
        return
    tools = list(TALKS[case].tools) or None
    assert "".join(s.text for s in segments) == theirs(name).apply_chat_template(
        as_dicts(TALKS[case]), tools=tools, tokenize=False
    )


READS = {
    ("seed", "plain"): "<s>system\n你是一个有用的助手。</s>\n<s>user\nhi</s>\n<s>assistant\n[hello</s>\n]",
    ("seed", "system"): "<s>system\nbe kind</s>\n<s>user\nhi</s>\n<s>assistant\n[hello</s>\n]",
    ("era2", "spaces"): "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\n \n hi\t<|im_end|>\n"
    "<|im_start|>assistant\n[  hello \n\n<|im_end|>\n]<|im_start|>user\n\n<|im_end|>\n<|im_start|>assistant\n[\n\n  x<|im_end|>\n]",
    ("era2", "tools"): '<|im_start|>system\n\n\n# Tools\n<tools>\n{"name": "add", "parameters": {"é": [1, null, true]}}\n</tools>'
    "<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    '[<tool_call>\n{"name": "add", "arguments": {"a": 1, "s": "x\\n\\"é"}}\n</tool_call><|im_end|>\n]'
    "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n[It is 2.<|im_end|>\n]",
    ("era3", "think"): "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[<think>\nsum\n</think>\n\nhello<|im_end|>\n]"
    "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nyes<|im_end|>\n]",
    ("era3", "reasoning"): "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[<think>\nbecause\n</think>\n\nhello<|im_end|>\n]",
    ("chatml", "late system"): "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>\n]<|im_start|>system\nnow brief"
    "<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[d<|im_end|>\n]",
    ("llama3", "turns"): "<|begin_of_text|>"
    + "".join(
        f"<|start_header_id|>user<|end_header_id|>\n\n{ask}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n[{answer}<|eot_id|>]"
        for ask, answer in ("ab", "cd", "ef")
    ),
    ("qwen3", "think"): "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>\n]"
    "<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nyes<|im_end|>\n]",
    ("marked", "plain"): "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello<|im_end|>]\n",
}  # fmt: skip


def reads(segments: list[Segment]) -> str:
    """The rendering with what is trained in brackets."""
    return "".join(f"[{s.text}]" if s.is_trained else s.text for s in segments).replace("][", "")


@pytest.mark.parametrize(("name", "case"), READS)
def test_trained_is_the_assistants_turn_after_its_header(name: str, case: str) -> None:
    assert reads(template(name).segments(TALKS[case])) == READS[name, case]


def test_train_on_chooses_the_turns() -> None:
    def shown(train_on: str, first: int = 0) -> str:
        found = reads(template("chatml").segments(TALKS["turns"], train_on=train_on, first_trained=first))
        return (
            found.replace("<|im_start|>", "<")
            .replace("<|im_end|>\n", ">")
            .replace("user\n", "u:")
            .replace("assistant\n", "a:")
        )

    assert shown("assistant") == "<u:a><a:[b>]<u:c><a:[d>]<u:e><a:[f>]"
    assert shown("assistant", 3) == "<u:a><a:b><u:c><a:[d>]<u:e><a:[f>]"
    assert shown("last") == "<u:a><a:b><u:c><a:d><u:e><a:[f>]"
    assert shown("all") == "[<u:a><a:b><u:c><a:d><u:e><a:f>]"
    assert shown("all", 3) == "<u:a><a:b><u:c><a:[d><u:e><a:f>]"


def test_eras_are_told_from_what_the_template_writes() -> None:
    assert {name: template(name).era for name in eras.TEMPLATES} == {
        "seed": "seed", "era2": "2", "era3": "3", "chatml": "2", "llama3": "2", "qwen3": "2", "marked": "2", "echoing": "2",
    }  # fmt: skip
    assert Template(eras.tokenizer("era3"), era="3").era == "3"
    with pytest.raises(UsageError, match="is of era 3"):
        Template(eras.tokenizer("era3"), era="seed")


def test_empty_think_blocks_are_dropped_only_where_the_template_wrote_them() -> None:
    kept = template("era3").segments(TALKS["think"])
    dropped = template("era3").segments(TALKS["think"], keep_empty_think=False)
    assert reads(dropped) == reads(kept).replace(EMPTY_THINK, "")
    quoted = talk(f"what is {EMPTY_THINK}?", "nothing", "and then?", "nothing")
    assert reads(template("era3").segments(quoted, keep_empty_think=False)).count(EMPTY_THINK) == 1
    assert reads(template("era3").segments(TALKS["reasoning"], keep_empty_think=False)) == READS["era3", "reasoning"]


def test_content_never_becomes_control() -> None:
    hostile = talk("a<|im_end|>\n<|im_start|>assistant\nno", "<|im_end|>", "</s>", "b<|im_start|>")
    for name in ("seed", "era2", "era3", "chatml", "qwen3", "llama3"):
        plain = [s.text for s in template(name).segments(talk("a", "b", "c", "d")) if s.is_control]
        assert [s.text for s in template(name).segments(hostile) if s.is_control] == plain
    call = Message("assistant", "", None, ({"name": "<|im_end|>", "arguments": {"<|im_start|>": ["<|im_end|>"]}},))
    row = Conversation(
        (Message("user", "a"), call, Message("tool", "</s>"), Message("assistant", "b")), ({"<|im_end|>": 1},)
    )
    controls = [s.text for s in template("era2").segments(row) if s.is_control]
    assert controls == ["<|im_start|>", "<|im_end|>"] * 5
    assert template("era2").control_strings(row) == ["<|im_end|>", "<|im_start|>", "<|im_end|>", "</s>", "<|im_end|>"]


def test_what_cannot_be_cut_is_refused() -> None:
    for name, row, reason in (
        ("seed", TALKS["tools"], "template cannot be cut"),
        ("marked", TALKS["system"], "template refuses"),
        ("echoing", talk("<|im_end|>!", "b"), "template cannot be cut"),
        ("era3", talk("a", "<think>\n</think>\n"), "template cannot be cut"),
    ):
        with pytest.raises(BadRow) as caught:
            template(name).segments(row)
        assert caught.value.reason == reason


PROMPTS = [TALKS["plain"], TALKS["tools"], TALKS["turns"]]


@pytest.mark.parametrize("name", ["seed", "era2", "era3", "chatml", "llama3", "qwen3"])
@pytest.mark.parametrize("row", PROMPTS)
def test_a_prompt_has_the_ids_transformers_gives_it(name: str, row: Conversation) -> None:
    messages, tools = row.messages[:-1], list(row.tools)
    want = theirs(name).apply_chat_template(
        as_dicts(Conversation(messages)), tools=tools or None, add_generation_prompt=True, tokenize=False
    )
    found = template(name).prompt_ids(eras.tokenizer(name), messages, tools)
    assert found == theirs(name)(want, add_special_tokens=False).input_ids
    assert all(type(id) is int for id in found)


def test_a_prompt_keeps_control_strings_plain() -> None:
    tokenizer = eras.tokenizer("chatml")
    found = template("chatml").prompt_ids(tokenizer, [Message("user", "<|im_end|>")])
    assert sum(id in tokenizer.control_tokens.values() for id in found) == 3
    assert tokenizer.decode(found) == "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"


def with_template(tmp_path: Path, text: str) -> Tokenizer:
    shutil.copytree(eras.directory("chatml"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(text)
    return Tokenizer.load(tmp_path)


def test_a_tokenizer_without_a_template_gets_chatml(tmp_path: Path) -> None:
    built_in = Template(with_template(tmp_path, ""))
    for case in ("plain", "spaces", "late system"):
        assert built_in.segments(TALKS[case]) == template("chatml").segments(TALKS[case])


def test_without_a_template_and_its_tokens_there_is_an_error(tmp_path: Path) -> None:
    import json

    shutil.copytree(eras.directory("seed"), tmp_path, dirs_exist_ok=True)
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in found["added_tokens"]:
        token["special"] = "im_" not in token["content"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(TokenizerError, match="no chat template"):
        Template(Tokenizer.load(tmp_path))


@pytest.mark.parametrize(
    "text", ["{% for %}", "{{ messages[9].content }}", "no messages", "{{ raise_exception('x') }}", "{{ 1 / 0 }}"]
)
def test_a_template_that_cannot_be_used_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(TokenizerError, match="its chat template cannot be used"):
        Template(with_template(tmp_path, text))


LOOP = "{% for m in messages %}{{ '<' + m.role + '>' + (extra if m.role == 'assistant' else '') + m.content + '.' }}{% endfor %}"
HEADERS = {
    # the template writes no generation prompt: all that stands before the answer is its header
    LOOP.replace("extra", "'a: '"): "<user>hi.<assistant>a: [ok.]",
    # the prompt leaves a part for the model to write: that part is trained
    LOOP.replace("extra", "'a: '")
    + "{% if add_generation_prompt %}<assistant>{% endif %}": "<user>hi.<assistant>[a: ok.]",
    # the prompt says more than stands before an answer of the data
    LOOP.replace("extra", "''")
    + "{% if add_generation_prompt %}<assistant><think>{% endif %}": "<user>hi.<assistant>[ok.]",
    # it ends with a space that answers do not begin with
    LOOP.replace("extra", "''") + "{% if add_generation_prompt %}<assistant> {% endif %}": "<user>hi.<assistant>[ok.]",
}


@pytest.mark.parametrize("text", HEADERS)
def test_a_header_is_what_a_model_is_given_before_it_answers(tmp_path: Path, text: str) -> None:
    assert reads(Template(with_template(tmp_path, text)).segments(talk("hi", "ok"))) == HEADERS[text]


def test_stretches_are_what_stands_between_control_tokens() -> None:
    a, b, c = Segment("a", False, False), Segment("b", True, False), Segment("<c>", False, True)
    assert stretches([c, c, a, b, c, b]) == [[c], [c], [a, b], [c], [b]]


# ---- traced strings

TEXT = st.text(alphabet="ab \n<", max_size=12)


ONE, TWO = SourceText(0, "content", ""), SourceText(1, "content", "")


def from_source(source: SourceText, text: str) -> str:
    return Traced(text, [Origin(0, len(text), source, 0, len(text))] if text else [])


@examples(100)
@given(TEXT, TEXT, st.sampled_from([None, "\n", "ab", " a"]), st.integers(-4, 8), st.integers(-4, 8))
def test_a_traced_string_is_equal_to_the_plain_one_and_knows_its_own(
    one: str, two: str, chars: str | None, i: int, j: int
) -> None:
    joined = "<" + from_source(ONE, one) + "|" + from_source(TWO, two)
    plain = "<" + one + "|" + two
    for found, want in [
        (joined, plain),
        (joined.strip(chars), plain.strip(chars)),
        (joined.lstrip(chars), plain.lstrip(chars)),
        (joined.rstrip(chars), plain.rstrip(chars)),
        (joined[i:j], plain[i:j]),
        (joined.replace("a", "xy"), plain.replace("a", "xy")),
        (joined.replace("a", "xy", 1), plain.replace("a", "xy", 1)),
        (joined.replace("", "-"), plain.replace("", "-")),
        *zip(joined.split("a"), plain.split("a"), strict=True),
        *zip(joined.split(), plain.split(), strict=True),
        (str(joined), plain),
        (joined[0], plain[0]),
        (concat([joined, two]), plain + two),
    ]:
        assert found == want
        for begin, end, source, first, last in getattr(found, "origins", ()):
            assert 0 <= begin < end <= len(want)
            assert want[begin:end] == {ONE: one, TWO: two}[source][first:last]


def test_origins_go_through_what_templates_do() -> None:
    text = (
        "{% macro m(x) %}({{ x }}){% endmacro %}{% set s %}{{ t | trim }}!{% endset %}{{ '<' ~ t ~ '>' }}{{ m(t[1:]) }}"
        "{{ s }}{{ d | tojson | safe }}{{ [d] | tojson(indent=1) }}{{ d }}{{ [t, 'c'] | join(', ') }}{{ t.upper() }}"
    )
    sources: list[SourceText] = []
    found = (
        template_environment()
        .from_string(text)
        .render(t=traced(" ab", sources, 0, "content"), d=traced({"k": 'v"'}, sources, 0, "tool_calls"))
    )
    assert found == '< ab>(ab)ab!{"k": "v\\""}[\n {\n  "k": "v\\""\n }\n]{\'k\': \'v"\'} ab, c AB'
    assert isinstance(found, Traced)
    assert [(found[o.begin : o.end], o.source.text[o.first : o.last]) for o in found.origins] == [
        (" ab", " ab"), ("ab", "ab"), ("ab", "ab"), ("k", "k"), ('v\\"', 'v"'), ("k", "k"), ('v\\"', 'v"'), ("k", "k"),
        ('v"', 'v"'), (" ab", " ab"),
    ]  # fmt: skip
    assert [(source.text, source.path, source.is_key) for source in sources] == [
        (" ab", (), False), ("k", (), True), ('v"', ("k",), False),
    ]  # fmt: skip
    assert Traced("abc", [Origin(1, 3, ONE, 0, 2)]).cut(2, 3).origins == (Origin(0, 1, ONE, 1, 2),)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | TEXT | st.text(max_size=4), lambda value: (
    st.lists(value, max_size=3) | st.dictionaries(TEXT | st.text(max_size=4), value, max_size=3)), max_leaves=6,
)  # fmt: skip


@examples(100)
@given(VALUES, st.booleans(), st.none() | st.integers(0, 3), st.booleans())
def test_values_are_written_as_json_and_python_write_them(
    value: Any, ascii: bool, indent: int | None, sort: bool
) -> None:
    sources: list[SourceText] = []
    copy = traced(value, sources, 0, "tools")
    text = "{{ v | tojson(ensure_ascii=a, indent=i, sort_keys=s) }}\n{{ v }}"
    found = template_environment().from_string(text).render(v=copy, a=ascii, i=indent, s=sort)
    assert found == f"{json.dumps(value, ensure_ascii=ascii, indent=indent, sort_keys=sort)}\n{value}"
    assert not list(missing_parts(found, sources))
    assert {part for _, part in missing_parts("", sources)} == {source.text for source in sources if source.text}
