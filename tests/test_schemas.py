"""Rows in the schemas that people publish: each is read as the row that it stands for, and what is not read is counted."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mmdata.encode.rows import (
    BadRow,
    Columns,
    Conversation,
    Document,
    Message,
    Pair,
    explain,
    parse_row,
    row_hash,
    split_keys,
)
from mmdata.encode.rows.messages import ROLES
from mmdata.encode.rows.schemas import MESSAGE_FIELDS, ROW_FIELDS, SCHEMAS
from mmdata.errors import UsageError

CALL = {"id": "c1", "type": "function", "function": {"name": "temp", "arguments": {"town": "T0"}}}
TOOL = {"type": "function", "function": {"name": "temp", "parameters": {"type": "object", "properties": {}}}}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant: {}"


def talk(*said: str, system: str = "") -> Conversation:
    """A conversation in which user and assistant take turns."""
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    return Conversation(((Message("system", system),) if system else ()) + tuple(turns))


def pair(*said: str, system: str = "") -> Pair:
    """A pair whose replies are the last two texts."""
    *prompt, chosen, rejected = said
    return Pair(talk(*prompt, chosen, system=system), talk(*prompt, rejected, system=system))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PUBLISHED: dict[str, list[tuple[Any, Any]]] = {
    "MiniMind and OpenAI messages": [
        ({"conversations": [USER, ANSWER]}, talk("Hi", "Hello")),
        ({"messages": [said("developer", "Be brief."), USER, ANSWER]}, talk("Hi", "Hello", system="Be brief.")),
        ({"messages": [USER, {**ANSWER, "refusal": None, "tool_calls": None, "name": ""}]}, talk("Hi", "Hello")),
        ({"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": "Hel"}, "lo"]}]}, talk("Hi", "Hello")),
        ({"system_prompt": "Be brief.", "conversation": [USER, ANSWER]}, talk("Hi", "Hello", system="Be brief.")),
        ({"messages": json.dumps([USER, ANSWER])}, talk("Hi", "Hello")),
    ],
    "ShareGPT": [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, talk("Hi", "Hello")),
        ({"conversations": [{"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Hello"}]}, talk("Hi", "Hello")),
        ({"conversation": [{"human": "Hi", "assistant": "Hello"}]}, talk("Hi", "Hello")),
        ({"conversation": [{"input": "Hi", "output": "Hello"}], "source": "x"}, talk("Hi", "Hello")),
    ],
    "bare messages": [
        ([USER, ANSWER], talk("Hi", "Hello")),
        ([said("system", "Be brief."), USER, ANSWER], talk("Hi", "Hello", system="Be brief.")),
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], talk("Hi", "Hello")),
    ],
    "Alpaca": [
        ({"instruction": "Name a fruit.", "input": "It is red.", "output": "Cherry."}, talk("Name a fruit.\nIt is red.", "Cherry.")),
        ({"instruction": "Name a fruit.", "input": "", "output": "Cherry."}, talk("Name a fruit.", "Cherry.")),
        ({"instruction": "Name a fruit.", "input": None, "output": "Cherry.", "history": []}, talk("Name a fruit.", "Cherry.")),
        (
            {"instruction": "Tea?", "output": "Yes.", "system": "Be brief.", "history": [["Hi", "Hello"]]},
            talk("Hi", "Hello", "Tea?", "Yes.", system="Be brief."),
        ),
        ({"instruction": "", "input": "Hi", "output": "Hello"}, talk("Hi", "Hello")),
        ({"instruction": "Hi", "output": "Hello", "history": None, "text": "### Instruction: Hi"}, talk("Hi", "Hello")),
        ({"input": "Hi", "target": "Hello", "kind": "NLI"}, talk("Hi", "Hello")),
    ],
    "prompt and completion": [
        ({"prompt": "Hi", "completion": "Hello"}, talk("Hi", "Hello")),
        ({"prompt": [said("system", "Be brief."), USER], "completion": [ANSWER]}, talk("Hi", "Hello", system="Be brief.")),
        ({"prompt": [USER], "completion": "Hello"}, talk("Hi", "Hello")),
        ({"system_prompt": "Be brief.", "question": "Hi", "response": "Hello"}, talk("Hi", "Hello", system="Be brief.")),
        ({"question": "Hi", "answer": "Hello"}, talk("Hi", "Hello")),
        ({"query": "Hi", "response": "Hello", "history": [[" Q ", "A"]]}, talk(" Q ", "A", "Hi", "Hello")),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello"}, talk("Hi", " Hello")),
        ({"prompt": "Hi", "completion": TRANSCRIPT}, talk("Hi", TRANSCRIPT)),
        ({"input": {"messages": [USER], "tools": []}, "output": "Hello"}, talk("Hi", "Hello")),
    ],
    "chosen and rejected": [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, pair("Hi", "Hello", "No")),
        ({"instruction": "Hi", "input": "You.", "chosen": "Hello", "rejected": "No"}, pair("Hi\nYou.", "Hello", "No")),
        ({"system": "Be brief.", "question": "Hi", "chosen": "Hello", "rejected": "No"}, pair("Hi", "Hello", "No", system="Be brief.")),
        ({"system": "", "input": "Hi", "chosen": "Hello", "rejected": "No"}, pair("Hi", "Hello", "No")),
        (
            {"prompt": "Hi", "chosen_response": "Hello", "rejected_response": "No", "chosen_score": 4.5, "rejected_score": 1},
            pair("Hi", "Hello", "No"),
        ),
        (
            {"prompt": "Tea?", "history": [["Hi", "Hello"]], "chosen": "Yes", "rejected": "No"},
            pair("Hi", "Hello", "Tea?", "Yes", "No"),
        ),
        (
            {"history": [USER, ANSWER], "prompt": [said("system", "Be brief."), said("user", "Tea?")],
             "chosen": [said("assistant", "Yes")], "rejected": [said("assistant", "No")]},
            pair("Hi", "Hello", "Tea?", "Yes", "No", system="Be brief."),
        ),
        (
            {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [said("assistant", "No")]},
            pair("Hi", "Hello", "No"),
        ),
    ],
    "UltraFeedback and DPO-En-Zh": [
        (
            {"prompt": "Hi", "prompt_id": "f00", "chosen": [USER, ANSWER], "rejected": [USER, said("assistant", "No")],
             "messages": [USER, ANSWER], "score_chosen": 8.0, "score_rejected": 7.5},
            pair("Hi", "Hello", "No"),
        ),
        (
            {"prompt": "Hi", "messages": [USER, ANSWER], "chosen": "Hello", "rejected": "No", "score_chosen": 8.0},
            pair("Hi", "Hello", "No"),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
             "rejected": {"from": "gpt", "value": "No"}, "language": "en"},
            pair("Hi", "Hello", "No"),
        ),
        (
            {"system": "Be brief.", "conversations": [said("user", "Hi"), said("assistant", "Hello"), said("user", "Tea?")],
             "chosen": said("assistant", "Yes"), "rejected": said("assistant", "No")},
            pair("Hi", "Hello", "Tea?", "Yes", "No", system="Be brief."),
        ),
    ],
    "transcripts": [
        ({"chosen": TRANSCRIPT.format("Yes"), "rejected": TRANSCRIPT.format("No")}, pair("Hi", "Hello", "Tea?", "Yes", "No")),
        ({"text": TRANSCRIPT.format("Yes")}, talk("Hi", "Hello", "Tea?", "Yes")),
        ({"dialog": TRANSCRIPT.format("Yes").strip()}, talk("Hi", "Hello", "Tea?", "Yes")),
        ({"conversation": TRANSCRIPT.format("Yes: \n\n no")}, talk("Hi", "Hello", "Tea?", "Yes: \n\n no")),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant: ", "chosen": "Hello", "rejected": "No"},
            pair("Hi", "Hello", "No"),
        ),
    ],
    "text": [
        ({"text": "Water boils."}, Document("Water boils.")),
        ({"content": "Water boils."}, Document("Water boils.")),
        ({"body": "Water boils.", "id": "7", "url": "u", "title": "t", "score": 0.5}, Document("Water boils.")),
        ({"raw_content": "Water boils.", "meta": {"a": 1}, "n": 5}, Document("Water boils.")),
        ({"text": "Water boils.", "prompt": "Write.", "question": None}, Document("Water boils.")),
        ({"text": "Human: hi"}, Document("Human: hi")),
        ({"text": "The Human: says\n\nAssistant: no"}, Document("The Human: says\n\nAssistant: no")),
    ],
    "null is absent": [
        ({"conversations": None, "messages": [USER, ANSWER]}, talk("Hi", "Hello")),
        ({"messages": [USER, ANSWER], "chosen": None, "rejected": None, "prompt": None}, talk("Hi", "Hello")),
        ({"text": "Water boils.", "messages": None, "chosen": None}, Document("Water boils.")),
        ({"messages": [{**USER, "name": None, "weight": None, "tool_calls": None}, {"role": None, "content": None,
          "from": "gpt", "value": "Hello"}], "tools": None, "system": None}, talk("Hi", "Hello")),
        ({"prompt": "Hi", "completion": "Hello", "text": None}, talk("Hi", "Hello")),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(*case, id=f"{schema} {n}{' with history' * ('history' in case[0])}")
        for schema, cases in PUBLISHED.items()
        for n, case in enumerate(cases)
    ],
)
def test_a_row_of_a_published_schema_is_read_as_what_it_is(row: Any, expected: Any) -> None:
    found = parse_row(json.dumps(row).encode())
    assert found == expected
    assert row_hash(found) == row_hash(expected)


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"prompt": "a", "completion": "b", "history": [["c", "d"], ["e", 5]]}, "history: message 2: content"),
        ({"prompt": "a", "completion": "b", "history": "c"}, "history: found a string"),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"], ["e"]]}, "history: message 2: found a list"),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"], ["", "f"]], "system": "s"}, "history: message 3 (user)"),
        ({"prompt": "a", "completion": "b", "history": [said("assistant", "c")]}, "history: message 1 is from assistant"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "history": [["d", " "]]}, "history: message 2 (assistant)"),
        ({"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": 5}]}, "rejected: message 1: content"),
    ],
)  # fmt: skip
def test_an_error_in_a_history_or_side_names_it_and_the_message(row: Any, detail: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_row(json.dumps(row).encode())
    assert detail in caught.value.detail


def test_tools_and_calls_of_openai_are_kept_whole() -> None:
    as_text = {**CALL, "function": {"name": "temp", "arguments": '{"town": "T0"}'}}
    answer = said("tool", '{"c": 7}') | {"tool_call_id": "c1", "name": "temp"}
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [as_text]}, answer, ANSWER],
        "tools": [TOOL],
    }
    expected = (
        Message("user", "Hi"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", '{"c": 7}', name="temp", tool_call_id="c1"),
        Message("assistant", "Hello"),
    )
    assert parse_row(json.dumps(row).encode()) == Conversation(expected, (TOOL,))
    old = {**row, "tools": None, "functions": [TOOL]}
    old["messages"][1] = {"role": "assistant", "content": None, "function_call": as_text["function"]}
    found = parse_row(json.dumps(old).encode())
    assert isinstance(found, Conversation)
    assert found.messages[1].tool_calls == (CALL["function"],)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(key: str) -> None:
    found = parse_row(json.dumps({"messages": [USER, {**ANSWER, key: "Greet."}]}).encode())
    assert isinstance(found, Conversation)
    assert found.messages[1] == Message("assistant", "Hello", "Greet.")


# weights of two messages -> what is read, or None for a row that is refused
WEIGHTS: list[tuple[dict[str, Any], int | None]] = [
    ({"weight": 0}, 0), ({"weight": 1}, 1), ({"weight": False}, 0), ({"weight": 1.0}, 1), ({"train": False}, 0), ({"train": True}, 1),
    ({"loss": 0.0}, 0), ({"loss": True, "weight": 1}, 1), ({"masked": True}, 0), ({"masked": False}, 1), ({"weight": None}, 1),
    ({"masked": True, "train": 0}, 0), ({"weight": 0.5}, None), ({"weight": -1}, None), ({"weight": "0"}, None), ({"train": [1]}, None),
    ({"loss": True, "weight": 0}, None), ({"masked": True, "weight": 1}, None),
]  # fmt: skip


@pytest.mark.parametrize(("given", "weight"), WEIGHTS)
def test_the_weight_of_a_message_is_kept_or_refused(given: dict[str, Any], weight: int | None) -> None:
    raw = json.dumps({"messages": [USER, {**ANSWER, **given}]}).encode()
    if weight is None:
        with pytest.raises(BadRow, match="unusable weight"):
            parse_row(raw)
    else:
        found = parse_row(raw)
        assert isinstance(found, Conversation)
        assert found.messages[1].weight == weight


def rows_of(value: Any) -> list[bytes]:
    """The same content in a question, in an answer and in the prompt of a pair."""
    made = (
        {"messages": [{"role": "user", "content": value}, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": value}]},
    )
    as_prompt = {"prompt": [{"role": "user", "content": value}], "chosen": "a", "rejected": "b"}
    return [json.dumps(row).encode() for row in (*made, as_prompt)]


IMAGE = {"type": "image_url", "image_url": {"url": "u"}}


@pytest.mark.parametrize(
    "content", [[IMAGE], [{"type": "text", "text": "see"}, IMAGE], [{"type": "input_audio"}], [{"content": "a"}]]
)
def test_content_that_is_no_text_is_refused_by_that_name(content: Any) -> None:
    for raw in rows_of(content):
        with pytest.raises(BadRow, match="content is not text"):
            parse_row(raw)
    with pytest.raises(BadRow, match="content is not text"):
        parse_row(json.dumps({"messages": [USER, ANSWER], "images": ["a.png"]}).encode())
    assert parse_row(json.dumps({"messages": [USER, ANSWER], "images": []}).encode()) == talk("Hi", "Hello")


@pytest.mark.parametrize(
    "content",
    [
        [{"text": "a"}, {"type": None, "text": "b"}],
        [{"type": "text", "text": "ab"}, {"type": "text", "text": None}],
        {"type": "text", "text": "ab"},
        {"text": "ab"},
        ["a", {"type": "input_text", "text": "b", "annotations": []}],
    ],
)
def test_text_parts_are_text_however_they_are_given(content: Any) -> None:
    for raw in rows_of(content)[:2]:
        keys: Counter[str] = Counter()
        found = parse_row(raw, extra_keys=keys)
        assert isinstance(found, Conversation) and "ab" in [m.content for m in found.messages] and not keys


@pytest.mark.parametrize("name", ["tools", "tool_calls"])
@pytest.mark.parametrize("nothing", [None, "null", "[]", [], ""])
def test_no_tools_and_calls_are_given_in_several_ways(name: str, nothing: Any) -> None:
    on_row, on_message = ({name: nothing}, {}) if name == "tools" else ({}, {name: nothing})
    row = {"messages": [USER, {**ANSWER, **on_message}], **on_row}
    assert parse_row(json.dumps(row).encode()) == talk("Hi", "Hello")


@pytest.mark.parametrize(
    "arguments", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}, {"arguments": {}}]
)
def test_a_call_without_arguments_has_none(arguments: dict[str, Any]) -> None:
    for call in ({"name": "f", **arguments}, {"type": "function", "function": {"name": "f", **arguments}}):
        found = parse_row(json.dumps({"messages": [USER, {**ANSWER, "tool_calls": [call]}]}).encode())
        assert isinstance(found, Conversation)
        (made,) = found.messages[1].tool_calls
        assert made.get("function", made) == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    "row",
    [
        {"conversation_a": [USER, ANSWER], "conversation_b": [USER], "winner": "model_a"},
        {"turns_of_both": [{"user": "Hi"}], "remark": "good"},
        {"candidates": [{"reply": "a"}, {"reply": "b"}], "asked": "Which?"},
    ],
)
def test_a_lone_string_beside_lists_of_objects_is_no_document(row: Any) -> None:
    with pytest.raises(BadRow, match="unknown fields"):
        parse_row(json.dumps(row).encode())
    assert parse_row(json.dumps(row).encode(), columns=Columns({"text": list(row)[-1]})) == Document(
        list(row.values())[-1]
    )


# row -> keys that are ignored and counted
IGNORED: list[tuple[Any, dict[str, int]]] = [
    ({"messages": [USER, ANSWER], "mood": "good", "id": 7}, {"mood": 1, "id": 1}),
    ({"messages": [{**USER, "mood": 1}, {**ANSWER, "mood": 2, "id": 1}]}, {"mood": 2, "id": 1}),
    ({"messages": [{**USER, "text": "x"}, {**ANSWER, "from": "gpt"}]}, {"text": 1, "from": 1}),
    ({"conversations": [{**USER, "text": "x"}, ANSWER]}, {"text": 1}),
    ({"messages": [USER, ANSWER], "mood": None, "tools": [], "system": ""}, {}),
    ({"messages": [{**USER, "mood": "", "notes": []}, ANSWER], "mood": {}, "notes": "", "images": []}, {}),
    (
        {"messages": [{**USER, "content": [{"type": "text", "text": "Hi", "mood": 1, "cite": None}]}, ANSWER]},
        {"mood": 1},
    ),
    ({"text": "a", "mood": 1}, {"mood": 1}),
    ({"text": "a", "prompt": "Write."}, {"prompt": 1}),
    ({"prompt": "Hi", "messages": [USER, ANSWER]}, {}),  # it is said in the messages
    ({"prompt": "Bye", "messages": [USER, ANSWER]}, {"prompt": 1}),
    ({"prompt": "H", "messages": [USER, ANSWER]}, {"prompt": 1}),  # a part of a message is not the message
    ({"problem": "6 * 7?", "solution": "It is 42.", "answer": "42"}, {"solution": 1}),
    ({"prompt": "Hi", "messages": [USER, {**ANSWER, "content": "Hi"}], "completion": "Hi"}, {}),
    ({"history": [["Hi", "Hi"]], "messages": [USER, ANSWER], "instruction": "Hi"}, {}),
    ({"messages": [USER, ANSWER], "chosen": ["Hi", "Hi"]}, {"chosen": 1}),  # said twice here, and once there
    ({"messages": [USER, ANSWER], "tools": [TOOL], "functions": [{"name": "temp"}]}, {}),
    ({"messages": [USER, ANSWER], "tools": [TOOL], "functions": [{"name": "tem"}]}, {"functions": 1}),
    ({"prompt": "Hi", "instruction": "Hi", "completion": "Hello"}, {}),
    ({"prompt": "Hi", "instruction": "Bye", "completion": "Hello", "answer": 5}, {"instruction": 1, "answer": 1}),
    ({"system": "Be kind.", "messages": [said("system", "Be brief."), USER, ANSWER]}, {"system": 1}),
    ({"chosen": [USER, ANSWER], "rejected": [USER, said("assistant", "No")], "messages": [USER, ANSWER]}, {}),
    ({"chosen": [USER, ANSWER], "rejected": [USER, said("assistant", "No")], "history": [["a", "b"]]}, {"history": 1}),
    ({"chosen": "Hello", "rejected": "No", "prompt": "Hi", "text": "more"}, {"text": 1}),
    ({"messages": [{**said("system", ""), "tools": [TOOL]}, USER, ANSWER], "tools": [{"name": "other"}]}, {"tools": 1}),
]


@pytest.mark.parametrize(("row", "expected"), IGNORED)
def test_what_a_row_says_and_no_field_reads_is_counted(row: Any, expected: dict[str, int]) -> None:
    counted: Counter[str] = Counter()
    parse_row(json.dumps(row).encode(), extra_keys=counted)
    assert counted == expected


def test_metadata_is_told_from_keys_that_no_schema_knows() -> None:
    names = (
        "id",
        "source",
        "score",
        "prompt_id",
        "score_chosen",
        "chosen_model",
        "language",
        "Title",
        "num_turns",
        "__index_level_0__",
    )
    unknown = {"mood": 1, "label": 5, "notes": 5, "analysis": 1}
    assert split_keys({**dict.fromkeys(names, 1), **unknown}) == (
        {"label": 5, "notes": 5, "analysis": 1, "mood": 1},
        dict.fromkeys(sorted(names), 1),
    )


# --map options, a row that they make readable, and what it is
MAPPED: list[tuple[list[str], Any, Any]] = [
    (["prompt=ask", "chosen=good", "rejected=bad"], {"ask": "Hi", "good": "Hello", "bad": "No"}, pair("Hi", "Hello", "No")),
    (["text=body"], {"body": "Water.", "lead": "Boils."}, Document("Water.")),
    (["text=response"], {"prompt": "Hi", "response": "Hello"}, Document("Hello")),
    (["prompt=completion", "completion=prompt"], {"prompt": "Hello", "completion": "Hi"}, talk("Hi", "Hello")),
    (["completion=reply"], {"prompt": "Hi", "reply": "Hello", "completion": "x"}, talk("Hi", "Hello")),
    (["messages=turns", "role=who", "content=what"], {"turns": [{"who": "user", "what": "Hi"}, {"who": "bot", "what": "Hello"}]},
     talk("Hi", "Hello")),
    (["system=persona"], {"messages": [USER, ANSWER], "persona": "Be brief."}, talk("Hi", "Hello", system="Be brief.")),
    (["completion=final"], {"messages": [USER, ANSWER], "prompt": "Ask", "final": "Answer"}, talk("Ask", "Answer")),
]  # fmt: skip


@pytest.mark.parametrize(("options", "row", "expected"), MAPPED)
def test_map_names_the_column_of_a_field(options: list[str], row: Any, expected: Any) -> None:
    assert parse_row(json.dumps(row).encode(), columns=Columns.parse(options)) == expected


def test_a_mapped_field_is_read_from_no_other_column() -> None:
    with pytest.raises(BadRow, match="missing field"):
        parse_row(json.dumps({"question": "Hi", "response": "Hello"}).encode(), columns=Columns.parse(["prompt=ask"]))
    with pytest.raises(BadRow, match="message 1: no content, found `role`, `content`"):
        parse_row(json.dumps({"messages": [USER, ANSWER]}).encode(), columns=Columns.parse(["content=text"]))


@pytest.mark.parametrize("option", ["prompt", "prompt=", "=ask", "promt=ask", ""])
def test_a_mapping_that_is_none_is_an_error_that_lists_the_fields(option: str) -> None:
    with pytest.raises(UsageError, match="is not FIELD=COLUMN") as caught:
        Columns.parse([option])
    assert "messages, prompt" in str(caught.value.fix)
    with pytest.raises(UsageError, match="is given twice"):
        Columns.parse(["text=a", "text=b"])


# kind -> a row that can be read in several ways, and what it is then
MIXED = {
    "messages": [USER, ANSWER],
    "chosen": [USER, ANSWER],
    "rejected": [USER, said("assistant", "No")],
    "text": "Water.",
}


def test_a_row_is_read_as_the_kind_that_is_wanted_if_it_can_be() -> None:
    raw = json.dumps(MIXED).encode()
    assert parse_row(raw) == parse_row(raw, "pair") == pair("Hi", "Hello", "No")
    assert parse_row(raw, "conversation") == talk("Hi", "Hello")
    assert parse_row(raw, "document") == Document("Water.")
    transcript = json.dumps({"text": TRANSCRIPT.format("Yes")}).encode()
    assert parse_row(transcript, "document") == Document(TRANSCRIPT.format("Yes"))
    assert parse_row(transcript, "conversation") == talk("Hi", "Hello", "Tea?", "Yes")
    for row, kind in (
        ({"text": "a"}, "conversation"),
        ({"text": "a"}, "pair"),
        ({"messages": [USER, ANSWER]}, "document"),
    ):
        with pytest.raises(BadRow, match=f"another kind: found a .*, expected a {kind}"):
            parse_row(json.dumps(row).encode(), kind)


# a row that cannot be used, and what its error message says
EXPLAINED: list[tuple[Any, str]] = [
    ({"ask": "a", "reply": "b", "n": 1}, "unknown fields; it has `ask` (a string), `reply` (a string), `n` (a number); "
     "the nearest schema is prompt and completion and lacks `prompt`, `completion` (--map prompt=COLUMN --map completion=COLUMN)"),
    ({"turns": [1]}, "the nearest schema is messages and lacks `messages` (--map messages=COLUMN)"),
    ({"body": "a", "n": None, "lead": 5, "chosen": None, "more": "b"}, "nearest schema is prompt and completion and"),
    ({"ask": "a", "output": "b"}, "missing field; it has `ask` (a string), `output` (a string); the nearest schema is prompt and completion and lacks `prompt` (--map prompt=COLUMN)"),
    ({"prompt": "a", "better": "b", "rejected": "c"}, "nearest schema is chosen and rejected and lacks `chosen` (--map chosen=COLUMN)"),
    ({"question": "a"}, "prompt only; it has `question` (a string); the nearest schema is prompt and"),
    ({"messages": [ANSWER]}, "roles out of order: message 1 is from assistant at the beginning; it has `messages` (a list)"),
    ({"messages": [{"role": "user", "text": "Hi"}]}, "missing field: message 1: no content, found `role`, `text`"),
    ({"messages": [{"role": "user", "parts": ["Hi"], "content": None}]}, "missing field: message 1: no content, found `role`, `parts`"),
    ({}, "unknown fields; it is an empty object"),
    ([1], "not an object: found a list"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), EXPLAINED)
def test_an_error_names_the_fields_and_the_nearest_schema(row: Any, expected: str) -> None:
    raw = json.dumps(row).encode()
    with pytest.raises(BadRow) as caught:
        parse_row(raw)
    assert expected in explain(raw, caught.value)


TRANSCRIPTS_REFUSED = {
    "\n\nHuman: Hi\n\nHuman: Tea?\n\nAssistant: Yes": "roles out of order",
    "\n\nHuman: Hi\n\nAssistant: ": "empty content",
    "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: Tea?": "last turn not the assistant's",
}


@pytest.mark.parametrize("text", TRANSCRIPTS_REFUSED)
def test_a_transcript_with_a_gap_is_refused(text: str) -> None:
    with pytest.raises(BadRow, match=TRANSCRIPTS_REFUSED[text]):
        parse_row(json.dumps({"text": text}).encode())


def test_the_documentation_names_every_column_and_role() -> None:
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    columns = {column for fields in (ROW_FIELDS, MESSAGE_FIELDS) for names in fields.values() for column in names}
    assert [column for column in columns if f"`{column}`" not in text] == []
    roles = text[text.index("Roles are ") :].partition("\n\n")[0]
    assert [role for role in ROLES if role not in roles] == []
    assert [schema.name for schema in SCHEMAS if f"| {schema.name} " not in text] == []
