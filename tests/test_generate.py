"""Generation: a cache changes nothing, company changes nothing, and streams never break a character."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from mmdata.encode.rows import Message
from mmdata.encode.template import Template
from mmdata.errors import UsageError
from mmdata.tokenizer.tokenizer import CHATML, Tokenizer, train_bpe
from mmtrain.inference import decoder as decoder_module
from mmtrain.inference import engine as engine_module
from mmtrain.inference.chat import Chat, answer_batch, fit
from mmtrain.inference.decoder import KV_STEP, Decoder
from mmtrain.inference.engine import Engine, Row, TextStream, Token
from mmtrain.inference.settings import Sampling
from mmtrain.model.model import Model
from mmtrain.shapes import ModelConfig

TEXTS = ["user\n", "assistant\n", "Where does Pim live?", "皮姆住在哪里？"] * 4
QUESTIONS = ["Hi", "Where does Pim live?", "皮姆住在哪里？", "What is 17 + 5? And then?", "🦉"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(
        TEXTS,
        vocab_size=300,
        control_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        chat_template=CHATML,
        out_dir=tmp_path_factory.mktemp("tokenizer"),
    )


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> Template:
    return Template(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    """Random weights, spread so that no two tokens tie and now and then a turn ends early."""
    torch.manual_seed(5)
    model = Model(ModelConfig(tokenizer.vocab_size, 48, 2, 4, 2, 64, rope_theta=1e4, qk_norm=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval()


def uncached(model: Model, ids: list[int]) -> torch.Tensor:
    """Logits after `ids`, all positions computed anew by the training path."""
    position_ids = torch.arange(len(ids))
    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        return model(torch.tensor(ids), position_ids, ends, len(ids))[-1] @ model.head_weight.T


def greedy_uncached(model: Model, tokenizer: Tokenizer, template: Template, question: str, num: int) -> str:
    ids = template.prompt_ids(tokenizer, [Message("user", question)])
    answer: list[int] = []
    while len(answer) < num:
        token = int(uncached(model, ids + answer).argmax())
        if token == tokenizer.eos_id:
            break
        answer.append(token)
    return tokenizer.decode(answer)


def prompts_of(tokenizer: Tokenizer, template: Template) -> list[list[int]]:
    return [template.prompt_ids(tokenizer, [Message("user", question)]) for question in QUESTIONS]


def rest(engine: Engine) -> dict[Row, list[Token]]:
    """Step until all have ended; the tokens that come."""
    tokens: dict[Row, list[Token]] = defaultdict(list)
    while not engine.is_idle:
        for delta in engine.step():
            tokens[delta.row] += delta.tokens
    return tokens


def run(engine: Engine, rows: list[Row]) -> dict[Row, list[Token]]:
    """The same for rows not yet begun: deltas must add up to what the rows then hold."""
    tokens: dict[Row, list[Token]] = {row: [] for row in rows}
    texts = dict.fromkeys(rows, "")
    while not engine.is_idle:
        for delta in engine.step():
            tokens[delta.row] += delta.tokens
            texts[delta.row] += delta.text
    assert texts == {row: row.text for row in rows}
    assert {row: [token.id for token in tokens[row]] for row in rows} == {row: row.ids for row in rows}
    return tokens


@pytest.mark.parametrize("is_packed", [True, False])
def test_the_decoder_gives_the_logits_of_a_whole_forward(
    model: Model, tokenizer: Tokenizer, template: Template, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the tokens are cut into forwards, alone or beside others, and over a growth of the cache."""
    if not is_packed:  # as where torch has no oneDNN
        monkeypatch.setattr(decoder_module, "_has_packed_linear", lambda: False)
    decoder = Decoder(model)
    ids = (template.prompt_ids(tokenizer, [Message("user", QUESTIONS[3])]) * 20)[: KV_STEP + 30]
    one, other = decoder.new_cache(), decoder.new_cache()
    begin = 0
    for end in (3, 4, 5, 90, KV_STEP, KV_STEP + 1, len(ids)):
        logits = decoder.forward([(one, ids[begin:end]), (other, [ids[begin], ids[end - 1]])])
        torch.testing.assert_close(logits[0], uncached(model, ids[:end]), atol=1e-4, rtol=1e-4)
        begin = end
    assert (one.length, one.capacity, other.capacity) == (len(ids), 2 * KV_STEP, KV_STEP)


def test_a_batch_answers_as_one_by_one_and_as_without_a_cache(
    model: Model, tokenizer: Tokenizer, template: Template
) -> None:
    together = answer_batch(model, tokenizer, template, QUESTIONS, max_new_tokens=24)
    alone = [answer_batch(model, tokenizer, template, [question], max_new_tokens=24)[0] for question in QUESTIONS]
    assert together == alone
    assert together == [greedy_uncached(model, tokenizer, template, question, 24) for question in QUESTIONS]


@pytest.mark.parametrize("chunk", [512, 7])
def test_company_changes_nothing_of_an_answer(
    model: Model, tokenizer: Tokenizer, template: Template, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that join and leave at different steps say the same, with the same log-probabilities, as each one alone."""
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", chunk)
    prompts = prompts_of(tokenizer, template)
    settings = [
        Sampling(temperature=temperature, top_p=0.95, seed=i, max_new_tokens=6 + 5 * i, logprobs=2)
        for i, temperature in enumerate((0.0, 1.0, 0.0, 0.8, 1.2))
    ]
    alone = []
    for prompt, options in zip(prompts, settings, strict=True):
        engine = Engine(model, tokenizer)
        row = engine.submit(prompt, options)
        alone.append(run(engine, [row])[row])
    engine = Engine(model, tokenizer, max_rows=3)
    rows: list[Row] = []
    tokens: dict[Row, list[Token]] = {}
    for prompt, options in zip(prompts, settings, strict=True):
        rows.append(engine.submit(prompt, options))
        tokens[rows[-1]] = []
        for delta in engine.step() + engine.step():
            tokens[delta.row] += delta.tokens
        assert engine.num_running <= 3
    for row, found in rest(engine).items():
        tokens[row] += found
    if torch.backends.mkldnn.is_available():
        assert [tokens[row] for row in rows] == alone  # to the last bit of every log-probability
    assert [row.ids for row in rows] == [[token.id for token in found] for found in alone]


def test_a_greedy_stream_joined_is_the_batched_answer(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    batched = answer_batch(model, tokenizer, template, QUESTIONS, max_new_tokens=24)
    chat = Chat(model, tokenizer, template)
    options = Sampling(max_new_tokens=24)
    assert ["".join(chat.reply([Message("user", q)], options)) for q in QUESTIONS] == batched


@pytest.mark.parametrize("text", ["皮姆养了一只猫头鹰。", "an owl 🦉, a fox 🦊", "naïve café", "tail \ufffd end", ""])
@pytest.mark.parametrize("stop", [(), ("owl on", "\u2603"), ("。。", "end of")])
def test_streams_come_in_whole_characters(tokenizer: Tokenizer, text: str, stop: tuple[str, ...]) -> None:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.feed(id) for id in tokenizer.encode_batch([text])[0].tolist()] + [stream.close()]
    assert "".join(pieces) == text
    assert not stream.is_stopped
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_stream_cut_within_a_character_still_ends(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode_batch(["ok 🦉"])[0].tolist()[:-1]
    assert "".join([*(stream.feed(id) for id in ids), stream.close()]).startswith("ok ")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("owl",), "a big "),
        (("fox", "g o"), "a bi"),
        (("a",), ""),
        (("x!",), "a big owl, a fo"),
        (("big", "a big"), ""),
    ],
)
def test_nothing_of_a_stop_string_is_ever_shown(tokenizer: Tokenizer, stop: tuple[str, ...], expected: str) -> None:
    stream = TextStream(tokenizer, stop)
    shown = ""
    for id in tokenizer.encode_batch(["a big owl, a fox!"])[0].tolist():
        shown += stream.feed(id)
        assert expected.startswith(shown)
        if stream.is_stopped:
            break
    assert stream.is_stopped
    assert shown + stream.close() == expected


def test_an_answer_ends_at_a_stop_string_or_its_length(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    engine = Engine(model, tokenizer)
    prompt = prompts_of(tokenizer, template)[1]
    whole = engine.submit(prompt, Sampling(max_new_tokens=20))
    run(engine, [whole])
    cut = engine.submit(prompt, Sampling(max_new_tokens=20, stop=(whole.text[5:8],)))
    run(engine, [cut])
    assert (whole.finish_reason, len(whole.ids)) == ("length", 20)
    assert (cut.finish_reason, cut.text) == ("stop", whole.text[: whole.text.find(whole.text[5:8])])


def test_logprobs_are_the_models_own(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    engine = Engine(model, tokenizer)
    prompt = prompts_of(tokenizer, template)[0]
    row = engine.submit(prompt, Sampling(temperature=2.0, top_k=5, seed=4, max_new_tokens=6, logprobs=3))
    for i, token in enumerate(run(engine, [row])[row]):
        logps = uncached(model, prompt + row.ids[:i]).log_softmax(-1)
        assert token.logp == pytest.approx(float(logps[token.id]), abs=1e-4)
        values, ids = logps.topk(3)
        assert [id for id, _ in token.top] == ids.tolist()
        assert [logp for _, logp in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_cancelled_row_leaves_and_the_others_go_on(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    prompts = prompts_of(tokenizer, template)[:3]
    options = Sampling(max_new_tokens=12)
    engine = Engine(model, tokenizer)
    alone = [engine.submit(prompt, options) for prompt in prompts]
    run(engine, alone)
    expected = [row.text for row in alone]
    engine = Engine(model, tokenizer, max_rows=2)
    rows = [engine.submit(prompt, options) for prompt in prompts]
    engine.step()
    engine.cancel(rows[0])
    engine.cancel(rows[0])
    assert (rows[0].finish_reason, len(rows[0].ids)) == ("cancelled", 1)
    run_rest = [engine.step() for _ in range(30)]
    assert engine.is_idle and run_rest[-1] == []
    assert [row.text for row in rows[1:]] == expected[1:]


def test_an_engine_remembers_so_many_rows_and_reuses_what_is_the_same(
    model: Model, tokenizer: Tokenizer, template: Template
) -> None:
    fresh, engine = Engine(model, tokenizer), Engine(model, tokenizer, remember=2)
    options = Sampling(max_new_tokens=8)
    prompts = prompts_of(tokenizer, template)
    reused = []
    for prompt in [*prompts, *prompts[-2:], prompts[0]]:
        rows = [one.submit(prompt, options) for one in (fresh, engine)]
        for one in (fresh, engine):
            while not one.is_idle:
                one.step()
        assert rows[0].ids == rows[1].ids
        assert len(engine._remembered) <= 2
        reused.append(rows[1].num_reused)
    assert reused[-3:-1] == [len(prompt) - 1 for prompt in prompts[-2:]]  # both still there, whole
    assert 0 < reused[-1] < len(prompts[0]) - 1  # forgotten; only the header is common to all


def test_history_is_kept_and_the_answer_read_so_far_counts(
    model: Model, tokenizer: Tokenizer, template: Template
) -> None:
    chat = Chat(model, tokenizer, template)
    first = "".join(chat.ask("Hi", Sampling(max_new_tokens=8)))
    stream = chat.ask("And?", Sampling(max_new_tokens=8))
    piece = next(stream)
    stream.close()
    assert chat.messages == [
        Message("user", "Hi"),
        Message("assistant", first),
        Message("user", "And?"),
        Message("assistant", piece),
    ]
    assert chat.engine.is_idle
    "".join(chat.ask("More?", Sampling(max_new_tokens=8)))
    assert chat.row is not None and chat.row.num_reused > 20  # what was said before is not computed again


def test_the_oldest_whole_turns_leave_a_full_window(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    messages = [Message("system", "Be kind.")]
    for i in range(12):
        messages += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
    messages.append(Message("user", "last"))
    whole = template.prompt_ids(tokenizer, messages)
    ids = fit(template, tokenizer, messages, room=len(whole) // 2 - 8)
    assert len(ids) + 8 <= len(whole) // 2
    kept = tokenizer.decode(ids)
    assert "Be kind." in kept
    assert "question 0<" not in kept
    assert "answer 11" in kept
    assert kept.count("question") == kept.count("answer ")
    assert kept.endswith(tokenizer.decode(whole[-40:]))
    chat = Chat(model, tokenizer, template, window=len(whole) // 2)
    "".join(chat.reply(messages, Sampling(max_new_tokens=8)))
    assert chat.row is not None and chat.row.num_prompt == len(ids)


def test_a_question_larger_than_the_window_is_refused_and_leaves_no_trace(
    model: Model, tokenizer: Tokenizer, template: Template
) -> None:
    chat = Chat(model, tokenizer, template, window=32)
    with pytest.raises(UsageError, match="there is room for 24"):
        list(chat.ask("word " * 40, Sampling(max_new_tokens=8)))
    assert chat.messages == []
    with pytest.raises(UsageError, match="the window of 32"):
        chat.engine.submit([3] * 30, Sampling(max_new_tokens=8))
    with pytest.raises(UsageError, match="the prompt is empty"):
        chat.engine.submit([], Sampling(max_new_tokens=8))


def test_the_same_seed_draws_the_same_answer(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    chat = Chat(model, tokenizer, template)
    draws = [
        "".join(chat.reply([Message("user", "Hi")], Sampling(max_new_tokens=20, temperature=1.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_generation_never_trains(model: Model, tokenizer: Tokenizer, template: Template, tmp_path: Path) -> None:
    answer_batch(model, tokenizer, template, ["Hi"], max_new_tokens=4)
    assert all(parameter.grad is None for parameter in model.parameters())
