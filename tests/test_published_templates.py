"""Ids and masks with reductions of the chat templates that models are published with, against transformers.

The first line of each fixture names the model. They write what the published files do, apart from longer sentences: those
of Qwen, Llama, Gemma, Phi-3, GLM and gpt-oss were compared with the copies in huggingface/trl (trl/chat_templates), row by
row; Mistral's, Phi-4's, SmolLM's and DeepSeek's with copies in other repositories, by reading. Phi-4's and SmolLM3's marks
of what is generated are those of the published files: SmolLM3's include the header of an answer.
"""

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import eras
import pytest

from mmdata.encode.encoder import EncodedRows, RowEncoder
from mmdata.encode.rows import EARLIER_REASONING, TOOL_REFERENCES, BadRow, Conversation, Message, parse_row
from mmdata.encode.sequences import TokenSequence, is_equal
from mmdata.encode.template import Template
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.check import _check_template

PUBLISHED = {path.stem: path.read_text(encoding="utf-8") for path in sorted((eras.HERE / "fixtures" / "published").iterdir())}  # fmt: skip
MARK = re.compile(r"<\|\w+\|>|<｜[^<｜]+｜>|\[/?[A-Z_]{4,}\]|\[gMASK\]|<(?:start|end)_of_turn>|<sop>|</?s>")


def directory(root: Path, template: str, normalizer: str | None = None) -> Path:
    """A tokenizer with this template, of which the tokens that it writes are special."""
    data = json.loads((eras.HERE / "golden" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    known = {token["content"]: token for token in data["added_tokens"]}
    free = 1 + max(*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"]))
    names = [name for name in dict.fromkeys([*MARK.findall(template), "<|system|>", "<|user|>", "<|assistant|>"]) if name not in known]  # fmt: skip
    data["added_tokens"] += [{**known["<s>"], "id": free + n, "content": name} for n, name in enumerate(names)]
    data["normalizer"] = normalizer and {"type": normalizer}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": template}  # fmt: skip
    root.mkdir(exist_ok=True)
    (root / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (root / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return root


@cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.load(directory(Path(eras._scratch().name) / f"published-{name}", PUBLISHED[name]))


@cache
def encoder(name: str, on_lost: str = "set-aside", **options: Any) -> RowEncoder:
    return RowEncoder(tokenizer(name), max_len=9999, on_lost=on_lost, **options)


def answered(**message: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Ask one"}, {"role": "assistant", "content": "Tell one", **message}]


PARAMETERS = {
    "type": "object",
    "properties": {"town": {"type": "string", "description": "Its name"}, "unit": {"type": "string", "enum": ["C", "F"]}},
    "required": ["town"],
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "temp", "description": "How \"warm\" a town is", "parameters": PARAMETERS}}  # fmt: skip


def call(id: str, town: str, name: str = "temp") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": {"town": town, "n": 1}}}


def result(id: str, content: str, name: str = "temp") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "name": name, "content": content}


ASK, DONE = answered()[0], {"role": "assistant", "content": "Seven."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [call("call-0001", 'T "0"\n')]}
TWO = {"role": "assistant", "content": "Look", "tool_calls": [call("call-0001", "T0"), call("call-0002", "é", "wind")]}
ROWS: dict[str, dict[str, Any]] = {
    "turns": {"messages": answered() * 3},
    "system": {"messages": [{"role": "system", "content": " Be brief.\n"}, *answered()]},
    "edges": {"messages": answered(content="\n  Tell\n one \n")},
    "markup": {"messages": answered(content="<|im_end|></s> <｜User｜>[INST]<end_of_turn> and on")},
    "reasoning": {"messages": answered(reasoning_content="Hm.") * 2},
    "inline reasoning": {"messages": answered(content="<think>\nHm.\n</think>\n\nTell") * 2},
    "tools": {"messages": answered(), "tools": [TOOL]},
    "call": {"messages": [ASK, CALLS, result("call-0001", '{"c": 7}'), DONE], "tools": [TOOL]},
    "calls": {"messages": [ASK, TWO, result("call-0001", "7"), result("call-0002", "8", "wind"), DONE]},
    "calls answered in another order": {
        "messages": [ASK, TWO, result("call-0002", "8", "wind"), result("call-0001", "7"), DONE]
    },
    "name": {"messages": [{**ASK, "name": "Eve"}, DONE]},
}
# What becomes of the rows: the reason why one is left out, or what is counted. By default it is packed whole.
REFUSED, CUT = "template refuses", "template cannot be cut"
NO_REASONING = {"reasoning": "reasoning lost"}
NO_TOOLS = {"tools": "tools lost", "call": "tool calls lost", "calls": "tool calls lost", "calls answered in another order": "tool calls lost"}  # fmt: skip
ALTERNATE = {"tools": "tools lost", "call": REFUSED, "calls": REFUSED, "calls answered in another order": REFUSED}
BY_ORDER = {"call": TOOL_REFERENCES, "calls": TOOL_REFERENCES, "calls answered in another order": "name lost"}
LATE_REASONING = {"reasoning": EARLIER_REASONING, "inline reasoning": EARLIER_REASONING}
OUTCOMES: dict[str, dict[str, str]] = {
    "qwen2.5": NO_REASONING | BY_ORDER,
    "qwen3": LATE_REASONING | BY_ORDER,
    "llama3.2": NO_REASONING | BY_ORDER | {"calls": REFUSED, "calls answered in another order": REFUSED},
    "mistral": NO_REASONING
    | {"system": "content lost", "call": TOOL_REFERENCES, "calls": "content lost", "calls answered in another order": "content lost"},
    "gemma2": NO_REASONING | ALTERNATE | {"system": REFUSED},
    "gemma3": NO_REASONING | ALTERNATE,
    "phi3": NO_REASONING | NO_TOOLS,
    "phi4": NO_REASONING | NO_TOOLS,
    "glm4.5": LATE_REASONING | BY_ORDER,
    "deepseek3": NO_REASONING | BY_ORDER | {"tools": "tools lost", "call": "tools lost"},
    "smollm2": NO_REASONING | NO_TOOLS,
    "smollm3": NO_REASONING | NO_TOOLS,
    "gpt-oss": {
        "reasoning": EARLIER_REASONING,
        "call": TOOL_REFERENCES,
        "calls": "content lost",
        "calls answered in another order": "content lost",
    },
}  # fmt: skip


def outcome(name: str, row: str) -> str:
    return OUTCOMES[name].get(row, "name lost" if row == "name" else "")


def parsed(row: dict[str, Any]) -> Conversation:
    found = parse_row(json.dumps(row).encode())
    assert isinstance(found, Conversation)
    return found


def their_messages(name: str, messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages under the names, and with the arguments, that this template reads."""
    for message in messages:
        one = json.loads(json.dumps(message))
        if name == "gpt-oss" and "reasoning_content" in one:
            one["thinking"] = one.pop("reasoning_content")
        for each in one.get("tool_calls", ()) if name == "deepseek3" else ():
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"], ensure_ascii=False)
        yield one


@cache
def theirs(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer(name).dir)


def their_ids(name: str, row: dict[str, Any], **options: Any) -> list[int]:
    """What transformers gives for the template with the date that `mm pack` fixes."""
    options = {"tools": row.get("tools"), "chat_template": encoder(name).template.text, **options}
    return theirs(name).apply_chat_template([*their_messages(name, row["messages"])], tokenize=True, **options)["input_ids"]  # fmt: skip


def test_every_template_has_its_outcomes() -> None:
    assert OUTCOMES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_are_packed_or_set_aside_for_the_true_reason(name: str) -> None:
    for title, row in ROWS.items():
        encoded, reason = encoder(name).encode([parsed(row)]), outcome(name, title)
        if reason in ("", EARLIER_REASONING, TOOL_REFERENCES):
            assert not encoded.bad, (title, encoded.bad)
            assert set(encoded.not_written) == {reason} - {""}, title
        else:
            assert encoded.bad[0].reason == reason, (title, encoded.bad)


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_transformers(name: str) -> None:
    import jinja2

    for title, row in ROWS.items():
        encoded = encoder(name, "warn").encode([parsed(row)])
        if encoded.bad and encoded.bad[0].reason == REFUSED:
            with pytest.raises((jinja2.TemplateError, TypeError)):
                their_ids(name, row)
        elif not encoded.bad and title != "markup":
            assert ids_of(encoded) == their_ids(name, row), title
        else:
            assert title == "markup" or encoded.bad[0].reason == CUT


def ids_of(encoded: EncodedRows) -> list[int]:
    (sequence,) = encoded.sequences
    assert isinstance(sequence, TokenSequence)
    return sequence.ids.tolist()


@pytest.mark.parametrize("name", ["phi4", "smollm3"])
def test_masks_are_transformers_where_templates_mark_what_is_generated(name: str) -> None:
    for row in (row for title, row in ROWS.items() if title != "markup" and outcome(name, title) == ""):
        encoded = encoder(name).encode([parsed(row)]).sequences[0]
        assert isinstance(encoded, TokenSequence)
        want = theirs(name).apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            chat_template=encoder(name).template.text,
        )
        assert (encoded.ids.tolist(), encoded.loss_mask.tolist()) == (want["input_ids"], want["assistant_masks"])


# The trained parts of the row "call" and of the last answer of the row "reasoning".
TRAINED = {
    "qwen2.5": ['<tool_call>\n{"name": "temp", "arguments": ARGS}\n</tool_call><|im_end|>\n', "Seven.<|im_end|>\n", "Tell one<|im_end|>\n"],
    "qwen3": ['<tool_call>\n{"name": "temp", "arguments": ARGS}\n</tool_call><|im_end|>\n', "<think>\n\n</think>\n\nSeven.<|im_end|>\n", "<think>\nHm.\n</think>\n\nTell one<|im_end|>\n"],
    "llama3.2": ['{"name": "temp", "parameters": ARGS}<|eot_id|>', "Seven.<|eot_id|>", "Tell one<|eot_id|>"],
    "mistral": ['[TOOL_CALLS] [{"name": "temp", "arguments": ARGS, "id": "call-0001"}]</s>', " Seven.</s>", " Tell one</s>"],
    "glm4.5": ['\n<think></think>\n<tool_call>temp\n<arg_key>town</arg_key>\n<arg_value>T "0"\n</arg_value>\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>', "\n<think></think>\nSeven.", "\n<think>Hm.</think>\nTell one"],
    "deepseek3": ["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>temp\n```json\nARGS\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>", "Seven.<｜end▁of▁sentence｜>", "Tell one<｜end▁of▁sentence｜>"],
    "gpt-oss": [" to=functions.temp<|channel|>commentary json<|message|>ARGS<|call|>", "<|channel|>final<|message|>Seven.<|return|>", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Tell one<|return|>"],
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_trained_are_the_answers_with_calls_and_reasoning(name: str) -> None:
    arguments = json.dumps(CALLS["tool_calls"][0]["function"]["arguments"])
    said = [text.replace("ARGS", arguments) for text in TRAINED[name]]
    template = encoder(name).template
    assert trained_parts(template, parsed(ROWS["call"])) == said[:2]
    assert trained_parts(template, parsed(ROWS["reasoning"]))[-1] == said[2]


def trained_parts(template: Template, row: Conversation) -> list[str]:
    """The runs of trained segments, each joined."""
    parts = [""]
    for segment in template.segments(row):
        parts[-1] += segment.text if segment.is_trained else ""
        parts += [""] if parts[-1] and not segment.is_trained else []
    return [part for part in parts if part]


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_are_the_beginning_of_what_is_trained(name: str) -> None:
    """What `mm chat` and `mm serve` give a model is what stands before the trained part of the next answer."""
    if name == "smollm3":  # headers are marked as generated
        return
    template = encoder(name).template
    for messages in (answered(), ROWS["call"]["messages"]):
        row = parsed({"messages": messages})
        if len(messages) > 2 and outcome(name, "call") != TOOL_REFERENCES:
            continue
        segments = template.segments(row)
        while not segments[-1].is_trained:
            segments.pop()
        while segments[-1].is_trained:
            segments.pop()
        prompt = template.prompt_ids(tokenizer(name), row.messages[:-1])
        assert tokenizer(name).decode(prompt) == "".join(segment.text for segment in segments)


@pytest.mark.parametrize("name", PUBLISHED)
def test_arguments_given_as_text_are_rendered_as_objects_are(name: str) -> None:
    for title in ("call", "calls"):
        row = json.loads(json.dumps(ROWS[title]))
        for each in row["messages"][1]["tool_calls"]:
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
        found, want = (encoder(name, "warn").encode([parsed(one)]) for one in (row, ROWS[title]))
        assert is_equal(found.sequences, want.sequences) and found.bad.keys() == want.bad.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_check_of_a_tokenizer_finds_nothing_wrong_with_its_template(name: str) -> None:
    found = {finding.check: finding.found for finding in _check_template(tokenizer(name)) if finding.level == "error"}
    no_system, no_end = "template: system" in found, "template: end of turn" in found
    assert found.keys() <= {"template: system", "template: end of turn"}
    assert (no_system, no_end) == (name in ("gemma2", "mistral"), name == "glm4.5")


@pytest.mark.parametrize("name", ["llama3.2", "deepseek3", "mistral", "qwen3", "gpt-oss"])
def test_calls_and_tools_as_minimind_writes_them_are_rendered_as_openais_are(name: str) -> None:
    """Where a template reads `function`, a call of name and arguments alone is given as one, and so is a tool."""
    flat = {**CALLS, "tool_calls": [{"id": "call-0001", **CALLS["tool_calls"][0]["function"]}]}
    rows = [{"messages": [ASK, calls, result("call-0001", "7"), DONE]} for calls in (CALLS, flat)]
    if name not in ("llama3.2", "deepseek3", "qwen3"):  # these write tools as they are, or none
        rows[0]["tools"], rows[1]["tools"] = [TOOL], [TOOL["function"]]
    nested, found = (encoder(name).encode([parsed(row)]) for row in rows)
    assert not found.bad and is_equal(found.sequences, nested.sequences)


def test_an_added_end_of_turn_stands_after_the_calls_that_end_a_row() -> None:
    own = tokenizer("glm4.5").amended(end_of_turn="</s>")
    row = parsed({"messages": [ASK, CALLS, result("call-0001", "7"), DONE, ASK, CALLS]})
    assert RowEncoder(tokenizer("glm4.5"), max_len=999).encode([row]).bad[0].reason == CUT
    assert not RowEncoder(own, max_len=999).encode([row]).bad
    calls, answer, last = trained_parts(Template(own), row)
    assert (
        calls.endswith("</tool_call><|observation|>")
        and answer.endswith("Seven.</s>")
        and last.endswith("</tool_call></s>")
    )


def test_an_error_of_a_template_names_what_it_was_given() -> None:
    row = parsed({"messages": [ASK, {**CALLS, "tool_calls": [{"name": "f"}]}, result("x", "7"), DONE]})
    assert encoder("mistral").encode([row]).bad[0].detail == "ids have length 9"
    row = parsed({"messages": answered(), "tools": [{"type": "function", "function": {"name": "f"}}]})
    assert encoder("gpt-oss").encode([row]).bad[0].detail == "'dict object' has no attribute 'description'"


# --- rows in columns

# What a template may strip, search for, split or escape, and what tokenizers join or compose.
PIECES = [
    "a",
    "b c",
    "\n",
    "\n\n",
    " ",
    "\t",
    "é",
    "e\u0301",
    "\u0338",
    "한",
    "👩‍👩‍👧",
    "\u2028",
    "{",
    '"',
    "\\",
    "<",
    ">",
    "|>",
    "<think>",
    "</think>",
]
PIECES += ["<tool_response>", "</tool_response>", "/think", "/no_think", "<|im_end|>", "</s>", "[INST]", "<|eot_id|>", "<end_of_turn>"]  # fmt: skip


def random_rows(seed: int, number: int) -> list[Conversation]:
    """Rows with up to four turns, a system message or none, and hostile contents, some of them with reasoning."""
    draw = random.Random(seed)

    def text() -> str:
        pieces = PIECES[: draw.choice((4, 18, 18, len(PIECES)))]
        return "".join(draw.choices(pieces, k=draw.choice((1, 2, 3, 9))))

    rows = []
    for _ in range(number):
        messages = [Message("system", draw.choice(("", text())))] if draw.random() < 0.4 else []
        for _ in range(draw.choice((1, 1, 2, 4))):
            reasoning = draw.choice((None, None, None, None, None, "", "Hm.\n"))
            messages += [Message("user", f"{text()}x"), Message("assistant", f"{text()}y{text()}", reasoning)]
        rows.append(Conversation(tuple(messages)))
    return rows


@pytest.mark.parametrize("name", PUBLISHED)
def test_random_rows_are_encoded_in_columns_as_one_by_one_and_by_transformers(name: str) -> None:
    rows = random_rows(7, 40)
    for max_len, train_on in ((9999, "assistant"), (70, "last"), (9999, "all")):
        options: Any = {"max_len": max_len, "train_on": train_on, "on_lost": "warn"}
        have, want = (RowEncoder(tokenizer(name), is_reference=slow, **options).encode(rows) for slow in (False, True))
        assert {n: str(bad) for n, bad in have.bad.items()} == {n: str(bad) for n, bad in want.bad.items()}
        assert is_equal(have.sequences, want.sequences)
        assert (have.num_tokens, have.cut, have.not_written) == (want.num_tokens, want.cut, want.not_written)
    used = [row for n, row in enumerate(rows) if have.num_sequences[n]]
    for row, sequence in zip(used, have.sequences, strict=True):
        assert isinstance(sequence, TokenSequence)
        if not encoder(name).template.control_strings(row):
            messages = [
                {key: value for key, value in message._asdict().items() if value not in (None, ()) and key != "weight"}
                for message in row.messages
            ]
            assert sequence.ids.tolist() == their_ids(name, {"messages": messages})


@pytest.mark.parametrize("name", ["qwen3", "llama3.2", "mistral"])
def test_rows_of_a_tokenizer_that_composes_characters_are_encoded_in_pieces_as_at_once(
    name: str, tmp_path: Path
) -> None:
    """Normalized to NFC, as Qwen's tokenizers do; also with characters that would be composed with a token's last one."""
    from transformers import AutoTokenizer

    own, whole = (Tokenizer.load(directory(tmp_path, PUBLISHED[name], "NFC")) for _ in range(2))
    whole.__dict__["is_exact"] = False
    rows = [row for row in random_rows(9, 40) if not encoder(name).template.control_strings(row)]
    have, want = (RowEncoder(each, max_len=9999, on_lost="warn").encode(rows) for each in (own, whole))
    assert own.is_exact and have.bad.keys() == want.bad.keys() and is_equal(have.sequences, want.sequences)
    native = AutoTokenizer.from_pretrained(tmp_path)
    used = [row for n, row in enumerate(rows) if have.num_sequences[n]]
    for row, sequence in zip(used, have.sequences, strict=True):
        text = "".join(part.text for part in encoder(name).template.segments(row))
        assert isinstance(sequence, TokenSequence)
        assert sequence.ids.tolist() == native(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", PUBLISHED)
def test_plain_rows_are_not_rendered_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = RowEncoder(tokenizer(name), max_len=9999)
    system = [] if name in ("gemma2", "mistral") else [{"role": "system", "content": "Be brief."}]
    lines = [
        json.dumps({"messages": [*first, *answered() * turns]}).encode()
        for first in ([], system)
        for turns in (1, 2, 3)
    ]
    assert not own.encode_lines(lines, "conversation").bad
    monkeypatch.setattr(own._reference, "encode", lambda rows, _: [BadRow("wrong types")] * len(rows))
    assert not own.encode_lines(lines, "conversation").bad
