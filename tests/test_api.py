"""OpenAI's bodies are read whole: every field honoured, or refused by name."""

import json
from typing import Any

import pytest

from mmdata.encode.rows import Conversation, Message, parse_row
from mmtrain.inference.serve import api
from mmtrain.inference.serve.api import Request, RequestError

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Request:
    return api.chat_request({"messages": HELLO} | fields, ["runs/a"])


def test_a_chat_request_is_read_with_openai_s_defaults() -> None:
    request = chat()
    assert [(m.role, m.content) for m in request.messages] == [("user", "hello")]
    assert (request.sampling.temperature, request.sampling.top_p, request.n, request.stream) == (1.0, 1.0, 1, False)
    assert request.max_tokens is request.seed is request.sampling.logprobs is None and request.is_chat


def test_every_sampling_field_arrives() -> None:
    given = {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 7, "n": 2}
    request = chat(**given, stop="end", max_completion_tokens=9, logprobs=True, top_logprobs=4)
    places = {name: request if name in ("seed", "n") else request.sampling for name in given}
    assert {name: getattr(place, name) for name, place in places.items()} == given
    assert (request.sampling.stop, request.max_tokens, request.sampling.logprobs) == (("end",), 9, 4)


def test_messages_of_every_kind_become_the_template_s() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    request = chat(
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"},
        ]
    )
    said = [(m.role, m.content, m.reasoning_content, m.tool_calls) for m in request.messages]
    assert said == [
        ("system", "be kind", None, ()),
        ("user", "1+1", None, ()),
        ("assistant", "", "hm", ({**call, "function": {"name": "add", "arguments": {"a": 1}}},)),
        ("tool", "2", None, ()),
    ]
    assert request.messages[3] == Message("tool", "2", None, (), "add", "c1")
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    packed = parse_row(json.dumps(row).encode(), "conversation")
    assert isinstance(packed, Conversation) and packed.messages[1].tool_calls == request.messages[2].tool_calls


def test_tool_choice_none_hides_the_tools() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert chat(tools=tools).tools == tuple(tools)
    assert chat(tools=tools, tool_choice="none").tools == ()


def test_fields_that_only_label_and_fields_that_ask_for_nothing_pass() -> None:
    labelled = {"user": "me", "metadata": {"a": 1}, "model": "runs/a"}
    no_effect = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "functions": [], "echo": False}
    no_effect |= {"modalities": ["text"], "function_call": "none", "best_of": 1, "suffix": "", "audio": None}
    assert chat(**labelled, **no_effect) == chat()
    assert chat(temperature=None, max_tokens=5.0, n=1.0, stop=None) == chat(max_tokens=5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages[0].tool_calls",
        ),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"top_p": 0}, "top_p"),
        ({"echo": True}, "echo"),
        ({"audio": {}}, "audio"),
        ({"nonsense": None}, "nonsense"),
        ({"chat_template_kwargs": {"other": 1}}, "chat_template_kwargs.other"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_object"}, "tools": [{"type": "function", "function": {"name": "f"}}]},
            "response_format",
        ),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"presence_penalty": "much"}, "presence_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert refused.value.param == param and refused.value.status == 400
    assert refused.value.body()["error"]["message"] == refused.value.message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": 3}, "temperature: expected a number <= 2.0"),
        ({"temperature": "hot"}, "temperature: expected a number, got a text"),
        ({"n": 1.5}, "n: expected a whole number"),
        ({"stop": 3}, "stop: expected a text or a list, got a whole number"),
        ({"frequency_penalty": 3}, "frequency_penalty: expected a number <= 2.0"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected a whole number, got a text"),
        ({"suffix": "end"}, "suffix is not supported here: leave it out"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type: expected text, json_object or json_schema, not 'xml'",
        ),
        ({"temprature": 1}, "unknown field 'temprature'"),
        (
            {"tool_choice": "required"},
            "tool_choice: expected auto or none, since a call cannot be forced, not 'required'",
        ),
        (
            {"messages": [{"role": "robot"}]},
            "messages[0].role: expected system, developer, user, assistant or tool, not 'robot'",
        ),
    ],
)
def test_an_error_says_what_was_expected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert refused.value.message == message


def test_another_model_is_not_found() -> None:
    with pytest.raises(RequestError) as refused:
        chat(model="gpt-4o")
    assert refused.value.status == 404 and "runs/a" in refused.value.message


@pytest.mark.parametrize("body", [None, [], "x", 3])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(RequestError, match="must be a JSON object"):
        api.chat_request(body, [])


def test_completions_take_texts() -> None:
    request = api.completion_request({"prompt": ["a", "b"], "logprobs": 2}, [])
    assert (request.prompts, request.max_tokens, request.sampling.logprobs) == (
        ("a", "b"),
        16,
        2,
    ) and not request.is_chat
    assert api.completion_request({"prompt": "a"}, []).sampling.logprobs is None
    for prompt in (None, "", [], [1, 2], ["a", ""], ["a"] * 17):
        with pytest.raises(RequestError, match="prompt"):
            api.completion_request({"prompt": prompt}, [])
