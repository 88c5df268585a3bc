"""What ends an answer is found from the template, and everything that packs, generates and exports keeps to it."""

import json
import pickle
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import endings
import pytest
from msgspec import UNSET

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import Conversation, Message
from mmdata.encode.template import Template, ending_of
from mmdata.errors import TokenizerError, UsageError
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.pack.repair import repair
from mmdata.shards.dataset import open_dataset, sample_rows
from mmdata.shards.manifest import read_manifest
from mmdata.tokenizer.chat_template import DATE
from mmdata.tokenizer.tokenizer import Tokenizer

TWO_TURNS = Conversation(
    tuple(Message(role, text) for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True))
)


@cache
def theirs(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def as_dicts(row: Conversation) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in row.messages]


def trained(template: Template, row: Conversation = TWO_TURNS) -> str:
    """The rendering, with what is trained in brackets."""
    text = "".join(f"[{part.text}]" if part.is_trained else part.text for part in template.segments(row))
    return text.replace("][", "")


# --- found from the template


@pytest.mark.parametrize("name", endings.KINDS)
def test_what_the_template_writes_after_an_answer_ends_it(name: str) -> None:
    kind, tokenizer = endings.KINDS[name], endings.tokenizer(name)
    assert Template(tokenizer).ends == kind.ends
    ending = ending_of(tokenizer)
    tokens = [end for end in kind.ends if end in tokenizer.control_tokens]
    assert [tokenizer.native.id_to_token(id) for id in ending.ids] == list(dict.fromkeys([*tokens, kind.eos]))
    assert ending.texts == tuple(end for end in kind.ends if end not in tokens)


@pytest.mark.parametrize("name", endings.KINDS)
def test_ids_are_those_of_transformers_and_ends_are_trained(name: str) -> None:
    tokenizer = endings.tokenizer(name).amended(date=DATE)
    encoder = RowEncoder(tokenizer, max_len=512)
    encoded = encoder.encode([TWO_TURNS])
    assert not encoded.bad
    sequence: Any = encoded.sequences[0]
    rendered = theirs(tokenizer.dir).apply_chat_template(as_dicts(TWO_TURNS), tokenize=False)
    if name != "dated":
        ids = theirs(tokenizer.dir)(rendered, add_special_tokens=False)["input_ids"]
        assert sequence.ids.tolist() == ids
    text = tokenizer.decode(sequence.ids[sequence.loss_mask == 1])
    for end in endings.KINDS[name].ends[:1]:
        assert text.count(end) >= 1


READS = {
    "glm4": "[gMASK]<sop><|user|>\na<|assistant|>\n[b]<|user|>\nc<|assistant|>\n[d]",
    "phi3": "<|user|>\na<|end|>\n<|assistant|>\n[b<|end|>\n]<|user|>\nc<|end|>\n<|assistant|>\n[d<|end|>\n]<|endoftext|>",
    "eos_at_the_very_end": "<|user|>\na<|assistant|>\n[b]<|user|>\nc<|assistant|>\n[d<|endoftext|>]",
    "another_end_for_the_last": "<|start|>user<|message|>a<|end|><|start|>assistant<|message|>[b<|end|>]"
    "<|start|>user<|message|>c<|end|><|start|>assistant<|message|>[d<|return|>]",
    "channels": "<|start|>user<|message|>a<|end|><|start|>assistant[<|channel|>final<|message|>b<|end|>]"
    "<|start|>user<|message|>c<|end|><|start|>assistant[<|channel|>final<|message|>d<|return|>]",
    "ends_with_text": "### user:\na\n### end\n\n### assistant:\n[b\n### end\n\n]"
    "### user:\nc\n### end\n\n### assistant:\n[d\n### end\n\n]",
}


@pytest.mark.parametrize("name", READS)
def test_the_end_is_trained_with_its_answer(name: str) -> None:
    assert trained(Template(endings.tokenizer(name))) == READS[name]


@pytest.mark.parametrize(
    ("calls", "ends"),
    [
        ("<|call|>", ("<|call|>",)),  # as gpt-oss: another end than an answer's
        (
            "<|call_end|><|calls_end|><|im_end|>\n",
            ("<|im_end|>",),
        ),  # as DeepSeek: more calls may follow the first token
        ("<|im_end|>\n", ("<|im_end|>",)),
    ],
)
def test_an_answer_that_calls_a_tool_may_end_in_its_own_way(calls: str, ends: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(endings.directory("qwen_base"), tmp_path / "t")
    parts = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    for mark in ("<|call|>", "<|call_end|>", "<|calls_end|>"):
        id = parts["added_tokens"][-1]["id"] + 1
        parts["added_tokens"].append({**parts["added_tokens"][0], "id": id, "content": mark})
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}"
        "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
        "{{ '" + calls.replace("\n", "\\n") + "' }}{% else %}<|im_end|>\n{% endif %}{% endfor %}" + endings.ASSISTANT
    )
    tokenizer = Tokenizer.load(tmp_path / "t")
    template = Template(tokenizer)
    assert (template.ends, template.call_ends) == (("<|im_end|>",), ends)
    assert set(ending_of(tokenizer).ids) == {2, 0, *(tokenizer.control_tokens[end] for end in ends)}


def test_a_phi3_conversation_may_begin_with_the_assistant_or_stop_before_its_answer() -> None:
    template = Template(endings.tokenizer("phi3"))
    row = Conversation(
        (Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"), Message("user", "e"))
    )
    assert trained(template, row) == (
        "<|assistant|>\n[b<|end|>\n]<|user|>\nc<|end|>\n<|assistant|>\n[d<|end|>\n]<|user|>\ne<|end|>\n<|endoftext|>"
    )


def test_without_a_usable_template_the_eos_token_ends_an_answer(tmp_path: Path) -> None:
    shutil.copytree(endings.directory("qwen_base"), tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ broken")
    assert ending_of(Tokenizer.load(tmp_path / "t")).ids == (0,)


def test_eos_tokens_of_generation_config_end_an_answer_too(tmp_path: Path) -> None:
    shutil.copytree(endings.directory("glm4"), tmp_path / "t")
    ids = endings.tokenizer("glm4").control_tokens
    more = [ids["<|endoftext|>"], ids["<|user|>"], 10**9, "x", None, True]
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert ending_of(tokenizer).ids == (ids["<|endoftext|>"], ids["<|user|>"])
    tokenizer.save(tmp_path / "again")
    assert (tmp_path / "again" / "generation_config.json").is_file()
    for wrong in ("[1]", "{"):
        (tmp_path / "t" / "generation_config.json").write_text(wrong)
        with pytest.raises(TokenizerError, match=r"generation_config\.json"):
            Tokenizer.load(tmp_path / "t")


# --- a token after each answer


@pytest.mark.parametrize("name", ["glm4", "only_a_newline"])
def test_a_token_can_be_added_after_each_answer(name: str, tmp_path: Path) -> None:
    tokenizer = endings.tokenizer(name).amended(end_of_turn="<|endoftext|>")
    template = Template(tokenizer)
    assert template.ends == ("<|endoftext|>",) and ending_of(tokenizer).ids == (0,)
    between = "" if name == "glm4" else "\n"
    assert f"b<|endoftext|>{between}" in trained(template) and f"d<|endoftext|>{between}]" in trained(template)
    assert trained(template).replace("<|endoftext|>", "") == trained(Template(endings.tokenizer(name)))
    tokenizer.save(tmp_path)
    rendered = theirs(tmp_path).apply_chat_template(as_dicts(TWO_TURNS), tokenize=False)
    assert rendered == "".join(part.text for part in template.segments(TWO_TURNS))
    again = Tokenizer.load(tmp_path)
    assert again.amended(end_of_turn="<|endoftext|>").files == again.files == tokenizer.files
    assert pickle.loads(pickle.dumps(RowEncoder(tokenizer, max_len=99))).tokenizer.files == tokenizer.files


def test_an_added_token_stands_in_prompts_after_earlier_answers_only() -> None:
    tokenizer = endings.tokenizer("glm4").amended(end_of_turn="<|endoftext|>")
    ids = Template(tokenizer).prompt_ids(tokenizer, TWO_TURNS.messages[:3])
    assert tokenizer.decode(ids) == "[gMASK]<sop><|user|>\na<|assistant|>\nb<|endoftext|><|user|>\nc<|assistant|>\n"


@pytest.mark.parametrize("start", ["\n", "  {% if true %}x{% endif %}", " \n {#- a -#}  ", "-", "{{ '' }}\n"])
def test_a_changed_template_reads_the_rest_as_before(start: str, tmp_path: Path) -> None:
    shutil.copytree(endings.directory("glm4"), tmp_path / "t")
    text = start + endings.KINDS["glm4"].template + "{{ strftime_now('') }}"
    (tmp_path / "t" / "chat_template.jinja").write_text(text.replace("('')", "('%Y')"))
    tokenizer = Tokenizer.load(tmp_path / "t")
    changed = tokenizer.amended(end_of_turn='"\\é', date="2001-02-03")
    before = Template(tokenizer).render(TWO_TURNS.messages, is_prompt=True)
    after = Template(changed).render(TWO_TURNS.messages, is_prompt=True)
    assert after.replace('"\\é', "").removesuffix("2001") == before[:-4] and after.count('"\\é') == 2


# --- a fixed date


def test_the_date_is_fixed_for_rows_and_todays_for_others(tmp_path: Path) -> None:
    tokenizer = endings.tokenizer("dated")
    text = "".join(part.text for part in RowEncoder(tokenizer, max_len=99).segments(TWO_TURNS)[0])
    assert "Today is 26 Jul 2024.<|eot_id|>" in text
    prompt = tokenizer.decode(Template(tokenizer).prompt_ids(tokenizer, TWO_TURNS.messages[:1]))
    assert prompt == theirs(tokenizer.dir).apply_chat_template(
        as_dicts(TWO_TURNS)[:1], tokenize=False, add_generation_prompt=True
    )
    fixed = tokenizer.amended(date="2031-12-01")
    assert fixed.asks_for_date is False and fixed.amended(date="1999-01-01") is fixed
    prompt = fixed.decode(Template(fixed).prompt_ids(fixed, TWO_TURNS.messages[:1]))
    assert "Today is 01 Dec 2031." in prompt
    fixed.save(tmp_path)
    assert prompt == theirs(tmp_path).apply_chat_template(
        as_dicts(TWO_TURNS)[:1], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("date", ["2024-13-01", "26 Jul 2024", "2024-07-26T00:00", "today"])
def test_what_is_no_date_is_refused(date: str) -> None:
    with pytest.raises(UsageError, match=f"--date {date} is no date"):
        endings.tokenizer("dated").amended(date=date)
    assert endings.tokenizer("phi3").amended(date=date) is endings.tokenizer("phi3")


def test_a_guarded_date_and_several_formats_are_fixed_and_a_computed_format_is_refused(tmp_path: Path) -> None:
    shutil.copytree(endings.directory("dated"), tmp_path / "t")
    guarded = (
        '{% if strftime_now is defined %}{% set date = strftime_now( "%Y-%m-%d" ) %}{% endif %}{{ date }}'
        "{% macro inner() %}{{ strftime_now('%A %-d') }}{% endmacro %}{{ inner() }}"
    )
    for text, expected in ((guarded, "2024-07-26Friday 26"), ("{{ strftime_now(format) }}", None)):
        (tmp_path / "t" / "chat_template.jinja").write_text(text + endings.LLAMA)
        tokenizer = Tokenizer.load(tmp_path / "t")
        if expected:
            assert Template(tokenizer.amended(date=DATE)).render(TWO_TURNS.messages).startswith(expected + "<|start")
        else:
            with pytest.raises(TokenizerError, match="computes the format of the date"):
                tokenizer.amended(date=DATE)


# --- several templates

TOOLS = ({"name": "add", "parameters": {}},)


def in_config(directory: Path) -> None:
    """Leave the templates where they are."""


def in_files(directory: Path) -> None:
    """Move the templates to chat_template.jinja and additional_chat_templates/."""
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "additional_chat_templates").mkdir()
    for template in config.pop("chat_template"):
        is_default = template["name"] == "default"
        path = "chat_template.jinja" if is_default else f"additional_chat_templates/{template['name']}.jinja"
        (directory / path).write_text(template["template"])
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "not this one"}))


@pytest.mark.parametrize("move", [in_config, in_files])
def test_conversations_with_tools_take_the_template_of_that_name(move: Any, tmp_path: Path) -> None:
    shutil.copytree(endings.directory("named"), tmp_path / "t")
    move(tmp_path / "t")
    tokenizer = Tokenizer.load(tmp_path / "t")
    assert tokenizer.template_sha256 == endings.tokenizer("named").template_sha256
    assert tokenizer.template_sha256 != endings.tokenizer("qwen_base").template_sha256
    called = (Message("user", "a"), Message("assistant", "", None, ({"name": "add", "arguments": {"x": 1}},)))
    encoder = RowEncoder(tokenizer, max_len=512)
    for row in (
        TWO_TURNS,
        Conversation(TWO_TURNS.messages, TOOLS),
        Conversation((*called, *TWO_TURNS.messages), TOOLS),
    ):
        dicts = [{**d, "tool_calls": list(m.tool_calls)} for d, m in zip(as_dicts(row), row.messages, strict=True)]
        tools = list(row.tools) or None
        expected = theirs(tokenizer.dir).apply_chat_template(dicts, tools=tools, tokenize=False)
        encoded = encoder.encode([row])
        assert not encoded.bad
        assert tokenizer.decode(encoded.sequences[0].ids) == expected  # type: ignore[union-attr]
        prompt = tokenizer.decode(Template(tokenizer).prompt_ids(tokenizer, row.messages[:1], row.tools))
        assert prompt == theirs(tokenizer.dir).apply_chat_template(
            dicts[:1], tools=tools, tokenize=False, add_generation_prompt=True
        )
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").chat_templates == tokenizer.chat_templates
    changed = tokenizer.amended(end_of_turn="<s>")
    assert all(text.startswith("{%- set mm") for text in changed.chat_templates.values())


def test_several_templates_of_which_none_is_the_default_are_refused(tmp_path: Path) -> None:
    shutil.copytree(endings.directory("named"), tmp_path / "t")
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "rag", "template": "x"},
        {"name": "tool_use", "template": "y"},
        "z",
        {"name": 1},
    ]
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="templates rag, tool_use, none is named default"):
        Template(Tokenizer.load(tmp_path / "t"))


# --- mm pack

ROW = {"conversations": [{"role": m.role, "content": m.content} for m in TWO_TURNS.messages]}
PAIR = {
    "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}],
}


def packed(root: Path, name: str, *rows: dict[str, Any], **options: Any) -> tuple[Path, list[str]]:
    """Pack rows with the tokenizer of that name; return the dataset and what was said."""
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    chosen = PackOptions(tokenizer=endings.directory(name), max_len=64, val_fraction=0, workers=1, **options)
    pack([root / "rows.jsonl"], root / "out", chosen, note=said.append)
    return root / "out", said


@pytest.mark.parametrize("row", [ROW, PAIR])
@pytest.mark.parametrize("name", ["glm4", "only_a_newline"])
def test_a_template_that_ends_no_answer_is_refused(row: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="writes nothing after an answer") as caught:
        packed(tmp_path, name, row)
    assert "--end-of-turn '<|endoftext|>'" in caught.value.fix
    assert not (tmp_path / "out").exists()
    packed(tmp_path, name, {"text": "documents need no template"})


def test_the_appended_token_is_trained_recorded_and_repaired(tmp_path: Path) -> None:
    out, said = packed(tmp_path, "glm4", ROW, end_of_turn="<|endoftext|>")
    manifest = read_manifest(out)
    tokenizer = Tokenizer.load(out / "tokenizer")
    assert (manifest.arguments.end_of_turn, manifest.arguments.date) == ("<|endoftext|>", UNSET) and not said
    assert manifest.tokenizer.template_sha256 == tokenizer.template_sha256 != endings.tokenizer("glm4").template_sha256
    (record,) = sample_rows(open_dataset(out), "train", 0)
    trained = [id for id, is_trained in zip(record["input_ids"], record["loss_mask"], strict=True) if is_trained]
    assert tokenizer.decode(trained) == "b<|endoftext|>d<|endoftext|>"
    for path in ("train/b0064/part-00000.arrow", "tokenizer/tokenizer_config.json"):
        (out / path).write_bytes(b"")
    assert len(repair(out, tokenizer_dir=endings.directory("glm4"))) == 2
    again = PackOptions(tokenizer=out / "tokenizer", max_len=64, val_fraction=0, workers=1, end_of_turn="<|endoftext|>")
    assert pack([tmp_path / "rows.jsonl"], tmp_path / "again", again).digest == manifest.dataset_digest


def test_an_eos_token_that_ends_no_answer_is_said_once(tmp_path: Path) -> None:
    _, said = packed(tmp_path, "qwen_base", ROW)
    assert said == ["answers end with '<|im_end|>', documents with the eos token '<|endoftext|>': both stop generation"]
    assert packed(tmp_path, "qwen_base", {"text": "a document"})[1] == []


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("glm4", {"end_of_turn": "<|stop|>"}, r"--end-of-turn <\|stop\|> is no special token"),
        ("phi3", {"end_of_turn": "<|endoftext|>"}, r"template writes '<\|end\|>' after answers"),
        ("phi3", {"date": "2024-01-01"}, "writes no date"),
        ("dated", {"date": "yesterday"}, "--date yesterday is no date"),
    ],
)
def test_options_that_do_not_fit_the_template_are_refused(name: str, options: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        packed(tmp_path, name, ROW, **options)


@pytest.mark.parametrize(("date", "day"), [(None, "26 Jul 2024"), ("2019-02-03", "03 Feb 2019")])
def test_the_date_is_recorded_and_stands_in_the_datasets_template(date: str | None, day: str, tmp_path: Path) -> None:
    out, _ = packed(tmp_path, "dated", ROW, date=date)
    assert read_manifest(out).arguments.date == (date or DATE)
    tokenizer = Tokenizer.load(out / "tokenizer")
    (record,) = sample_rows(open_dataset(out), "train", 0)
    rendered = theirs(out / "tokenizer").apply_chat_template(ROW["conversations"], tokenize=False)
    assert tokenizer.decode(record["input_ids"]) == rendered and f"Today is {day}." in rendered


def test_ordinary_manifests_have_no_new_fields(tmp_path: Path) -> None:
    out, said = packed(tmp_path, "mistral", ROW)
    assert (
        not {"end_of_turn", "date"} & json.loads((out / "manifest.json").read_text())["arguments"].keys() and not said
    )


@pytest.mark.parametrize("move", [in_config, in_files])
def test_a_dataset_holds_all_templates(move: Any, tmp_path: Path) -> None:
    shutil.copytree(endings.directory("named"), tmp_path / "t")
    move(tmp_path / "t")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"messages": ROW["conversations"], "tools": list(TOOLS)}) + "\n" + json.dumps(ROW) + "\n"
    )
    options = PackOptions(tokenizer=tmp_path / "t", max_len=256, val_fraction=0, workers=1)
    assert pack([tmp_path / "rows.jsonl"], tmp_path / "out", options).kept == 2
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    assert tokenizer.chat_templates == endings.tokenizer("named").chat_templates
    texts = [tokenizer.decode(r["input_ids"]) for r in sample_rows(open_dataset(tmp_path / "out"), "train", 0)]
    assert sorted('Tools:{"name": "add", "parameters": {}}' in text for text in texts) == [False, True]


def test_a_template_without_generation_prompt_gets_one(tmp_path: Path) -> None:
    header = "<|im_start|>assistant\n"
    assert Template(endings.tokenizer("no_generation_prompt")).missing_prompt == header
    assert not any(Template(endings.tokenizer(name)).missing_prompt for name in ("mistral", "channels", "vicuna"))
    out, said = packed(tmp_path, "no_generation_prompt", ROW)
    assert said == [f"the chat template does not begin answers in prompts: {header!r} is added to it"]
    assert read_manifest(out).arguments.generation_prompt == header
    tokenizer, original = Tokenizer.load(out / "tokenizer"), endings.tokenizer("no_generation_prompt")
    for is_prompt in (False, True):
        rendered = theirs(out / "tokenizer").apply_chat_template(
            ROW["conversations"][:3], tokenize=False, add_generation_prompt=is_prompt
        )
        before = theirs(original.dir).apply_chat_template(ROW["conversations"][:3], tokenize=False)
        assert rendered == before + header * is_prompt
        assert Template(tokenizer).render(TWO_TURNS.messages[:3], is_prompt=is_prompt) == rendered
    (out / "tokenizer" / "tokenizer_config.json").unlink()
    assert repair(out, tokenizer_dir=original.dir) == ["tokenizer/tokenizer_config.json"]
    assert packed(tmp_path, "no_generation_prompt", {"text": "a"})[1] == []


# --- mm train


def test_training_warns_of_other_templates_and_of_one_that_ends_no_answer(tmp_path: Path) -> None:
    from mmtrain.train.plan import template_notes

    datasets = []
    for name, date in (("a", None), ("b", "2020-01-01"), ("c", None)):
        (tmp_path / name).mkdir()
        datasets.append(open_dataset(packed(tmp_path / name, "dated", ROW, date=date)[0]))
    tokenizer = Tokenizer.load(datasets[0].tokenizer_dir)
    (warning,) = template_notes(datasets, tokenizer)
    assert warning.startswith(
        f"warning: {datasets[1].dir} was packed with another chat template than {datasets[0].dir}"
    )
    (warning,) = template_notes(datasets[:1], endings.tokenizer("glm4"))
    assert warning.endswith("so the model will not stop: mm pack --end-of-turn '<|endoftext|>'")
    (tmp_path / "d").mkdir()
    assert template_notes([open_dataset(packed(tmp_path / "d", "glm4", {"text": "a"})[0])], tokenizer) == []
