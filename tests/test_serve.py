"""The server answers as the engine does, tells mistakes apart, and stays up whatever a client does."""

import gc
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import endings
import openai
import pytest
from serving import SayingEngine, random_engine, served, small_tokenizer
from waiting import LONG_S, wait_until

from mmdata.encode.rows import Message
from mmdata.encode.template import Template
from mmdata.errors import UsageError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.engine import Delta, Token
from mmtrain.inference.serve import api, responses
from mmtrain.inference.serve.app import listen
from mmtrain.inference.settings import Sampling

HELLO: Any = [{"role": "user", "content": "Where does Pim live?"}]
CALL = '<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "find", "arguments": {"who": "Pim"}}\n</tool_call>'
TOOLS: Any = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def url(tokenizer: Tokenizer) -> Iterator[str]:
    """A model with random weights."""
    with served(random_engine(tokenizer, window=256, max_rows=4), max_body=20_000) as address:
        yield address


def client(address: str, key: str = "none") -> openai.OpenAI:
    CLIENTS.append(openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0))
    return CLIENTS[-1]


CLIENTS: list[openai.OpenAI] = []


@pytest.fixture(scope="module", autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def ask(address: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    """Status and JSON of a POST, or of a GET where there is no body."""
    content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, content, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=LONG_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def expected(tokenizer: Tokenizer, text: str, options: Sampling) -> str:
    engine = random_engine(tokenizer)
    row = engine.submit(Template(tokenizer).prompt_ids(tokenizer, [Message("user", text)]), options)
    while not engine.is_idle:
        engine.step()
    return row.text


# --- what is answered -------------------------------------------------------------------------------------------------


def test_openai_s_client_gets_the_engine_s_answer(url: str, tokenizer: Tokenizer) -> None:
    made = client(url).chat.completions.create(
        model="runs-a", messages=HELLO, temperature=0, max_tokens=12, extra_body={"repetition_penalty": 1.3}
    )
    said = expected(tokenizer, HELLO[0]["content"], Sampling(max_new_tokens=12, repetition_penalty=1.3))
    assert made.choices[0].message.content == said
    assert made.choices[0].finish_reason in ("stop", "length") and made.choices[0].logprobs is None
    num_prompt = len(Template(tokenizer).prompt_ids(tokenizer, [Message("user", HELLO[0]["content"])]))
    assert made.usage is not None and made.usage.prompt_tokens == num_prompt
    assert 0 < made.usage.completion_tokens <= 12


def test_a_stream_says_the_same_as_a_whole_answer(url: str) -> None:
    options: Any = {"model": "runs-a", "messages": HELLO, "temperature": 0.9, "seed": 3, "max_tokens": 20}
    whole = client(url).chat.completions.create(**options)
    chunks = list(client(url).chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_same_seed_gives_the_same_answer_in_any_company(url: str) -> None:
    options: Any = {"model": "runs-a", "messages": HELLO, "temperature": 1.0, "max_tokens": 16}

    def said(seed: int) -> str | None:
        return client(url).chat.completions.create(**options, seed=seed).choices[0].message.content

    alone = [said(seed) for seed in range(5)]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(said, range(5))) == alone
    assert len(set(alone)) > 1


def test_n_answers_are_those_of_n_seeds(url: str) -> None:
    options: Any = {"model": "runs-a", "messages": HELLO, "temperature": 1.0, "max_tokens": 8}
    three = client(url).chat.completions.create(**options, seed=5, n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    ones = [client(url).chat.completions.create(**options, seed=5 + i) for i in range(3)]
    assert [c.message.content for c in three.choices] == [one.choices[0].message.content for one in ones]
    assert three.usage and ones[0].usage and three.usage.prompt_tokens == ones[0].usage.prompt_tokens


def test_logprobs_are_the_model_s(url: str) -> None:
    options: Any = {"model": "runs-a", "messages": HELLO, "temperature": 0, "max_tokens": 6}
    made = client(url).chat.completions.create(**options, logprobs=True, top_logprobs=3)
    assert made.choices[0].logprobs and made.choices[0].logprobs.content and made.usage
    entries = made.choices[0].logprobs.content
    assert len(entries) == made.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob == entry.logprob < 0  # greedy
        text = bytes(entry.bytes or []).decode(errors="backslashreplace")
        assert text == entry.token
    streamed = client(url).chat.completions.create(**options, logprobs=True, top_logprobs=3, stream=True)
    found = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
    assert [entry for content in found for entry in content or []] == entries


@pytest.mark.parametrize("script", ["🦉皮 a", "😀", "𝛑 = 3"])
def test_tokens_that_are_parts_of_a_character_give_their_bytes(script: str, tokenizer: Tokenizer) -> None:
    with served(SayingEngine(tokenizer, script)) as address:
        made = client(address).chat.completions.create(
            model="runs-a", messages=HELLO, logprobs=True, top_logprobs=1, max_tokens=50
        )
        texts = client(address).completions.create(model="runs-a", prompt="a", logprobs=1, max_tokens=50)
    entries = made.choices[0].logprobs.content if made.choices[0].logprobs else []
    assert entries and b"".join(bytes(entry.bytes or []) for entry in entries).decode() == script
    parts = [f"\\x{byte:02x}" for byte in script[0].encode()]
    assert [entry.token for entry in entries[:4]] == parts
    assert all(entry.top_logprobs[0].bytes == entry.bytes for entry in entries)
    logprobs = texts.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.tokens[:2] == [f"bytes:{part}" for part in parts[:2]]
    assert logprobs.top_logprobs and logprobs.top_logprobs[0] == {f"bytes:{parts[0]}": -0.5}


def test_completions_give_as_many_top_logprobs_as_asked_for(
    tokenizer: Tokenizer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = client(url).completions.create(
        model="runs-a", prompt="皮姆 🦉", max_tokens=8, temperature=2, seed=3, logprobs=5
    )
    logprobs = made.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.top_logprobs and logprobs.token_logprobs
    for token, logp, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logp and len(top) == 5 + (logp < sorted(top.values())[-5])
    # Tokens of equal texts: ids without a token, and the same text twice in a vocabulary.
    monkeypatch.setattr(responses, "token_texts", lambda _: [None, None, b"a", b"a", b"b"])
    request = api.completion_request({"prompt": "x", "logprobs": 4}, [])
    stream = responses.AnswerStream(request, 0, [1], tokenizer)
    top = tuple((id, -float(id)) for id in range(4))
    (choice,) = stream.add(Delta(None, "a", (Token(3, -3.0, top),)))  # type: ignore[arg-type]
    assert isinstance(choice.logprobs, responses.CompletionLogprobs)
    assert choice.logprobs.top_logprobs == [{"": 0.0, "token_id:1": -1.0, "a": -2.0, "token_id:3": -3.0}]


def test_penalties_and_bias_change_the_answer(tokenizer: Tokenizer, url: str) -> None:
    body: Any = {"messages": HELLO, "temperature": 0, "max_tokens": 12}
    choices: tuple[dict[str, Any], ...] = (
        {"frequency_penalty": 2},
        {"presence_penalty": 1.5},
        {"logit_bias": ((40, 100.0), (41, 99.5)), "presence_penalty": 2},
    )
    for given in choices:
        sent = {name: dict(value) if isinstance(value, tuple) else value for name, value in given.items()}
        said = expected(tokenizer, HELLO[0]["content"], Sampling(max_new_tokens=12, **given))
        _, answer = ask(url, {**body, **sent})
        assert answer["choices"][0]["message"]["content"] == said
    for id in (-1, tokenizer.vocab_size):
        status, answer = ask(url, {**body, "logit_bias": {str(id): 1}})
        assert (status, answer["error"]["param"]) == (400, "logit_bias")


@pytest.mark.parametrize(("origins", "allowed"), [(("http://a.example:3000",), "http://a.example:3000"), (("*",), "*")])
def test_web_pages_of_the_origins_named_may_use_the_interface(
    tokenizer: Tokenizer, origins: tuple[str, ...], allowed: str
) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    with served(SayingEngine(tokenizer, "yes"), origins=origins, api_key="k") as address:
        for origin in ("http://a.example:3000", "http://b.example"):
            headers = {"Origin": origin, **asked}
            request = urllib.request.Request(f"{address}/v1/chat/completions", headers=headers, method="OPTIONS")
            try:
                with urllib.request.urlopen(request, timeout=LONG_S) as response:
                    found = response.headers
            except urllib.error.HTTPError as error:
                with error:
                    found = error.headers
            is_allowed = allowed in ("*", origin)
            assert found.get("Access-Control-Allow-Origin") == (allowed if is_allowed else None)
            if is_allowed:
                assert "x-stainless-os" in found["Access-Control-Allow-Headers"] and "POST" in str(found.items())
        request = urllib.request.Request(f"{address}/v1/models", headers={"Origin": "http://a.example:3000"})
        with pytest.raises(urllib.error.HTTPError) as refused:  # without the key, but the page may read why
            urllib.request.urlopen(request, timeout=LONG_S)
        assert refused.value.code == 401 and refused.value.headers["Access-Control-Allow-Origin"] == allowed
        refused.value.close()


def test_without_origins_no_other_page_may_read_an_answer(url: str) -> None:
    request = urllib.request.Request(f"{url}/v1/models", headers={"Origin": "http://a.example"})
    with urllib.request.urlopen(request, timeout=LONG_S) as response:
        assert "Access-Control-Allow-Origin" not in response.headers


def test_completions_go_on_from_texts(url: str) -> None:
    options: Any = {"model": "runs-a", "prompt": ["Where does", "皮姆"], "max_tokens": 5, "temperature": 0}
    made = client(url).completions.create(**options, logprobs=2)
    assert [choice.index for choice in made.choices] == [0, 1]
    assert made.choices[0].logprobs and len(made.choices[0].logprobs.tokens or []) == 5
    streamed = list(client(url).completions.create(**options, stream=True))
    for index in (0, 1):
        said = "".join(c.choices[0].text for c in streamed if c.choices and c.choices[0].index == index)
        assert said == made.choices[index].text


def test_a_stop_text_ends_the_answer(url: str, tokenizer: Tokenizer) -> None:
    whole = expected(tokenizer, HELLO[0]["content"], Sampling(max_new_tokens=12))
    made = client(url).chat.completions.create(
        model="runs-a", messages=HELLO, temperature=0, max_tokens=12, stop=[whole[3:5]]
    )
    assert made.choices[0].message.content == whole[: whole.index(whole[3:5])]
    assert made.choices[0].finish_reason == "stop"


SCHEMA: Any = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Pim", "皮姆"]},
        "alive": {"type": "boolean"},
        "ages": {"type": "array", "items": {"enum": [1, 12]}, "maxItems": 2},
    },
    "required": ["name", "alive", "ages"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_in_json_follows_its_schema(url: str, stream: bool) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "pim", "schema": SCHEMA}}
    for seed in range(3):
        answer: Any = client(url).chat.completions.create(
            model="runs-a", messages=HELLO, seed=seed, response_format=form, temperature=1, stream=stream
        )
        if stream:
            choices = [chunk.choices[0] for chunk in answer]
            text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        value = json.loads(text)
        assert reason == "stop" and list(value) == ["name", "alive", "ages"]
        assert value["name"] in ("Pim", "皮姆") and value["alive"] in (True, False)
        assert len(value["ages"]) <= 2 and set(value["ages"]) <= {1, 12}


def test_json_that_cannot_be_promised_is_refused(url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    status, body = ask(url, {"messages": HELLO, "response_format": form})
    assert status == 400 and body["error"]["param"] == "response_format" and "nonsense" in body["error"]["message"]
    status, body = ask(
        url, {"messages": HELLO, "response_format": {**form, "json_schema": {"schema": SCHEMA}}, "max_tokens": 3}
    )
    assert status == 200 and body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["content"].startswith("{")


def test_without_llguidance_json_is_refused_with_the_command_that_helps(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with served(random_engine(tokenizer, window=256)) as address:
        status, body = ask(address, {"messages": HELLO, "response_format": {"type": "json_object"}})
    assert status == 400 and "llguidance" in body["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_words_and_calls_stand_apart(tokenizer: Tokenizer, stream: bool) -> None:
    with served(SayingEngine(tokenizer, CALL)) as address:
        if not stream:
            message = client(address).chat.completions.create(model="runs-a", messages=HELLO, tools=TOOLS).choices[0]
            said, calls, reason = message.message, message.message.tool_calls or [], message.finish_reason
            words, thought = said.content, said.model_extra["reasoning_content"]  # type: ignore[index]
        else:
            chunks = list(
                client(address).chat.completions.create(model="runs-a", messages=HELLO, tools=TOOLS, stream=True)
            )
            deltas = [chunk.choices[0].delta for chunk in chunks]
            words = "".join(delta.content or "" for delta in deltas)
            thought = "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas)
            calls: Any = [call for delta in deltas for call in delta.tool_calls or []]
            reason = chunks[-1].choices[0].finish_reason
        assert (words, thought, reason) == ("I look.", "hm", "tool_calls")
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            ("find", {"who": "Pim"})
        ]
        plain = client(address).chat.completions.create(model="runs-a", messages=HELLO).choices[0]
        assert "<tool_call>" in (plain.message.content or "") and plain.finish_reason == "stop"


@pytest.mark.parametrize(("name", "is_said"), [("qwen_base", True), ("named", False)])
def test_tools_that_the_template_leaves_out_are_said(name: str, is_said: bool) -> None:
    with served(SayingEngine(endings.tokenizer(name), "yes", window=2048)) as address:
        for stream in (False, True):
            asked = client(address).chat.completions.with_raw_response
            headers = [
                asked.create(model="runs-a", messages=HELLO, stream=stream, **tools).headers
                for tools in ({"tools": TOOLS}, {})
            ]
            assert ["writes no tools" in one.get("warning", "") for one in headers] == [is_said, False]


def test_thinking_that_the_prompt_opened_is_told_apart(tokenizer: Tokenizer) -> None:
    with served(SayingEngine(tokenizer, "hm\n</think>\n\nYes.")) as address:
        body = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": True}}
        message = ask(address, body)[1]["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")


def test_models_and_health_are_told(url: str) -> None:
    assert [model.id for model in client(url).models.list()] == ["runs-a"]
    assert client(url).models.retrieve("runs-a").id == "runs-a"
    assert ask(url, None, "/health") == (200, {"status": "ok", "model": "runs-a", "running": 0, "waiting": 0})


def test_the_page_and_its_parts_are_whole_and_stay_here(url: str) -> None:
    for path, kind in (("/", "text/html"), ("/chat.js", "text/javascript"), ("/chat.css", "text/css")):
        with urllib.request.urlopen(url + path, timeout=LONG_S) as response:
            text = response.read().decode()
            assert response.headers["Content-Type"].startswith(kind)
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
            assert "http://" not in text and "https://" not in text, "the page asks nobody else"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 15_000, 400, "not JSON"),
        (b'{"messages": NaN}', 400, "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "not JSON"),  # half a character
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b'{"messages": "' + b"x" * 30_000 + b'"}', 413, "larger than 20,000 bytes"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": HELLO, "nonsense": 1}, 400, "unknown field 'nonsense'"),
        ({"messages": HELLO, "model": "gpt-4o"}, 404, "there is runs-a"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "window of 256"),
        ({"messages": HELLO, "max_tokens": 10_000}, 400, "window of 256"),
    ],
)
def test_a_bad_request_gets_one_clear_error(url: str, body: Any, status: int, said: str) -> None:
    found, answer = ask(url, body)
    assert found == status and said in answer["error"]["message"]
    assert ask(url, {"messages": HELLO, "max_tokens": 1})[0] == 200


def test_what_is_not_there_is_told_as_json(url: str) -> None:
    assert ask(url, None, "/v1/nothing")[0] == 404
    status, answer = ask(url, None, "/v1/chat/completions")
    assert status == 405 and "another method" in answer["error"]["message"]
    assert ask(url, {"messages": HELLO}, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(url, None, "/health", Host="evil.example")[0] == 403


def test_a_long_conversation_is_an_error_or_loses_its_oldest_turns(url: str) -> None:
    turn = [{"role": "user", "content": "word " * 20}, {"role": "assistant", "content": "yes"}]
    body = {"messages": [*turn * 8, *HELLO], "max_tokens": 4}
    status, answer = ask(url, body)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    status, answer = ask(url, body | {"truncation": "auto"})
    assert status == 200 and answer["usage"]["prompt_tokens"] <= 252


def test_an_api_key_guards_the_interface_but_not_the_page(tokenizer: Tokenizer) -> None:
    with served(SayingEngine(tokenizer, "yes"), api_key="s3cret") as address:
        for key in ("wrong", "s3cret2", ""):
            assert ask(address, {"messages": HELLO}, Authorization=f"Bearer {key}")[0] == 401
        assert client(address, "s3cret").models.list().data
        assert ask(address, None, "/health")[0] == 200
        with pytest.raises(openai.AuthenticationError):
            client(address, "wrong").models.list()


def test_too_many_at_once_are_turned_away_and_the_rest_answered(tokenizer: Tokenizer) -> None:
    engine = SayingEngine(tokenizer, "word " * 4, max_rows=2)
    engine.may_step.clear()
    with served(engine, max_waiting=2) as address, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, address, {"messages": HELLO}) for _ in range(8)]
        next(as_completed(answers))  # one that was turned away: nobody is answered before the next line
        engine.may_step.set()
        found = [answer.result()[0] for answer in answers]
    assert set(found) == {200, 503} and found.count(200) >= 2


def test_an_answer_that_takes_too_long_is_ended(tokenizer: Tokenizer) -> None:
    engine = SayingEngine(tokenizer, "word " * 100, pause_s=0.05)
    with served(engine, timeout=0.3) as address:
        status, answer = ask(address, {"messages": HELLO})
        assert status == 504 and "0.3 s" in answer["error"]["message"]
        with pytest.raises(openai.APIError, match="longer than"):
            list(client(address).chat.completions.create(model="runs-a", messages=HELLO, stream=True))
        wait_until(lambda: engine.is_idle)


def test_a_step_that_fails_ends_its_answers_only(tokenizer: Tokenizer) -> None:
    engine = SayingEngine(tokenizer, "yes")
    with served(engine) as address:
        engine.error = RuntimeError("out of memory")
        status, answer = ask(address, {"messages": HELLO})
        assert status == 503 and "out of memory" in answer["error"]["message"]
        assert ask(address, {"messages": HELLO})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(tokenizer: Tokenizer, stream: bool) -> None:
    engine = SayingEngine(tokenizer, "word " * 10_000, pause_s=0.02, window=100_000)  # minutes, if nobody left
    with served(engine) as address:
        body = json.dumps({"messages": HELLO, "stream": stream}).encode()
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as leaving:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            leaving.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: not engine.is_idle)
        wait_until(lambda: engine.is_idle)
        assert engine.num_cancelled == 1
        assert ask(address, None, "/health")[1]["running"] == 0


def test_a_server_that_stops_lets_answers_end(tokenizer: Tokenizer) -> None:
    engine = SayingEngine(tokenizer, "word " * 10, pause_s=0.02)
    found: list[tuple[int, Any]] = []
    with served(engine) as address:
        thread = threading.Thread(target=lambda: found.append(ask(address, {"messages": HELLO})))
        thread.start()
        wait_until(lambda: not engine.is_idle)
    thread.join()
    assert found[0][0] == 200 and found[0][1]["choices"][0]["finish_reason"] == "stop"


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(UsageError, match="no port"):
        listen("127.0.0.1", 70_000)
    with pytest.raises(UsageError, match="--host"):
        listen("no such host", 0)


@pytest.mark.slow
def test_memory_does_not_grow_over_1000_requests(tokenizer: Tokenizer) -> None:
    """Answered, streamed, refused and left alone: what they leave behind is not counted in megabytes."""
    import psutil

    process = psutil.Process()
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 1.0}
    kinds = [body, body | {"stream": True, "stream_options": {"include_usage": True}}, {"messages": []}, b"{"]

    def one(i: int) -> None:
        kind = kinds[i % 4]
        if i % 4 == 1:
            request = urllib.request.Request(
                f"{address}/v1/chat/completions", json.dumps(kind).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=LONG_S) as response:
                response.read(100 if i % 8 == 1 else -1)  # every second stream is left in the middle
        else:
            ask(address, kind)

    with served(random_engine(tokenizer, window=256, max_rows=8)) as address, ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(400)))
        wait_until(lambda: ask(address, None, "/health")[1]["running"] == 0)
        gc.collect()
        memory, objects = process.memory_info().rss, len(gc.get_objects())
        list(pool.map(one, range(1000)))
        wait_until(lambda: ask(address, None, "/health")[1]["running"] == 0)
        gc.collect()
        assert len(gc.get_objects()) - objects < 250  # a quarter of an object a request
        assert (
            process.memory_info().rss - memory < 48 * 2**20
        )  # the allocator's own habits: it levels off after some thousand
