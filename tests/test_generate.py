"""Generation: a cache changes nothing, batches answer as one by one, and streams never break a character."""

from pathlib import Path

import pytest
import torch

from mmdata.errors import UsageError
from mmdata.template import Message, Template
from mmdata.tokenizer import CHATML, Tokenizer, train_bpe
from mmtrain.config import ModelConfig
from mmtrain.generate import Chat, answer_batch, pick
from mmtrain.model import Model

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


def test_the_cache_gives_the_logits_of_a_whole_forward(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    chat = Chat(model, tokenizer, template)
    ids = template.prompt_ids(tokenizer, [Message("user", QUESTIONS[3])])
    for end in (3, 4, 5, len(ids), 6, len(ids)):  # forwards, and back to a shorter text
        torch.testing.assert_close(chat.logits(ids[:end]), uncached(model, ids[:end]), atol=1e-4, rtol=1e-4)
    other = [*ids[:6], ids[0], *ids[7:]]
    torch.testing.assert_close(chat.logits(other), uncached(model, other), atol=1e-4, rtol=1e-4)


def test_a_batch_answers_as_one_by_one_and_as_without_a_cache(
    model: Model, tokenizer: Tokenizer, template: Template
) -> None:
    together = answer_batch(model, tokenizer, template, QUESTIONS, max_new_tokens=24)
    alone = [answer_batch(model, tokenizer, template, [question], max_new_tokens=24)[0] for question in QUESTIONS]
    assert together == alone
    assert together == [greedy_uncached(model, tokenizer, template, question, 24) for question in QUESTIONS]


def test_a_greedy_stream_joined_is_the_batched_answer(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    batched = answer_batch(model, tokenizer, template, QUESTIONS, max_new_tokens=24)
    chat = Chat(model, tokenizer, template)
    assert ["".join(chat.reply([Message("user", q)], max_new_tokens=24)) for q in QUESTIONS] == batched


class Scripted(Chat):
    """A chat whose model says the given tokens and then ends its turn."""

    script: list[int]
    said = 0

    def logits(self, ids: object) -> torch.Tensor:
        tokens = [*self.script, self.tokenizer.eos_id]
        logits = torch.zeros(self.model.config.vocab_size)
        logits[tokens[self.said]] = 1.0
        self.said += 1
        return logits


@pytest.mark.parametrize("text", ["皮姆养了一只猫头鹰。", "an owl 🦉, a fox 🦊", "naïve café", "tail \ufffd end", ""])
def test_streams_come_in_whole_characters(model: Model, tokenizer: Tokenizer, template: Template, text: str) -> None:
    chat = Scripted(model, tokenizer, template)
    chat.script = tokenizer.encode_batch([text])[0].tolist()
    pieces = list(chat.reply([Message("user", "?")], max_new_tokens=200))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(chat.script) >= len(pieces)


def test_a_stream_cut_within_a_character_still_ends(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    chat = Scripted(model, tokenizer, template)
    chat.script = tokenizer.encode_batch(["ok 🦉"])[0].tolist()[:-1]
    assert "".join(chat.reply([Message("user", "?")])).startswith("ok ")


def test_history_is_kept_and_the_answer_read_so_far_counts(
    model: Model, tokenizer: Tokenizer, template: Template
) -> None:
    chat = Chat(model, tokenizer, template)
    first = "".join(chat.ask("Hi", max_new_tokens=8))
    stream = chat.ask("And?", max_new_tokens=8)
    piece = next(stream)
    stream.close()
    assert chat.messages == [
        Message("user", "Hi"),
        Message("assistant", first),
        Message("user", "And?"),
        Message("assistant", piece),
    ]


def test_the_oldest_whole_turns_leave_a_full_window(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    messages = [Message("system", "Be kind.")]
    for i in range(12):
        messages += [Message("user", f"question {i}"), Message("assistant", f"answer {i}")]
    messages.append(Message("user", "last"))
    whole = template.prompt_ids(tokenizer, messages)
    chat = Chat(model, tokenizer, template, window=len(whole) // 2)
    kept = tokenizer.decode(chat.fit(messages, 8))
    assert len(chat.fit(messages, 8)) + 8 <= chat.window
    assert "Be kind." in kept
    assert "question 0<" not in kept
    assert "answer 11" in kept
    assert kept.count("question") == kept.count("answer ")
    assert "".join(chat.reply(messages, max_new_tokens=8)) is not None


def test_a_question_larger_than_the_window_is_refused_and_leaves_no_trace(
    model: Model, tokenizer: Tokenizer, template: Template
) -> None:
    chat = Chat(model, tokenizer, template, window=32)
    with pytest.raises(UsageError, match="the window holds 32"):
        list(chat.ask("word " * 40, max_new_tokens=8))
    assert chat.messages == []


def test_the_same_seed_draws_the_same_answer(model: Model, tokenizer: Tokenizer, template: Template) -> None:
    chat = Chat(model, tokenizer, template)
    draws = [
        "".join(chat.reply([Message("user", "Hi")], max_new_tokens=20, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"temperature": 0.0}, {2}),
        ({"temperature": 1.0, "top_k": 1}, {2}),
        ({"temperature": 1.0, "top_p": 0.0001}, {2}),
        ({"temperature": 1.0, "top_k": 2}, {2, 0}),
        ({"temperature": 1.0, "top_p": 0.7}, {2, 0}),  # 0.64 alone does not reach 0.7
        ({"temperature": 1.0}, {0, 1, 2, 3}),
    ],
)
def test_only_tokens_that_top_k_and_top_p_keep_are_drawn(options: dict, allowed: set[int]) -> None:
    logits = torch.tensor([0.23, 0.09, 0.64, 0.04]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = {pick(logits, generator=generator, **options) for _ in range(300)}
    assert drawn == allowed


def test_generation_never_trains(model: Model, tokenizer: Tokenizer, template: Template, tmp_path: Path) -> None:
    answer_batch(model, tokenizer, template, ["Hi"], max_new_tokens=4)
    "".join(Chat(model, tokenizer, template).reply([Message("user", "Hi")], max_new_tokens=4))
    assert all(parameter.grad is None for parameter in model.parameters())
