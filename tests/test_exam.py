"""Questions are scored as people would: by words, not by their dress; and choices by their log-probability."""

from pathlib import Path

import pytest
import torch
from foreign import NORMED, make_tokenizer

from mmdata.encode.template import Template
from mmdata.errors import InputError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.chat import answer_batch, prompt_of
from mmtrain.inference.exam import ExamQuestion, ask, choose, normalized, read_choices, read_questions, summary
from mmtrain.model.model import Model


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("Forty-two.", "forty-two", True),
        ("  The   answer\n", "the answer", True),
        ("４２。", "42", True),
        ("“北京”", "北京", True),
        ("Straße", "STRASSE", True),
        ("3.5", "35", False),
        ("-1", "1", True),  # a sign at the edge counts as punctuation: write "minus one", or choices
        ("not it", "it", False),
        ("?!", "?!", True),
        ("?!", "...", False),
        ("", "x", False),
    ],
)
def test_answers_are_compared_by_their_words(one: str, other: str, is_same: bool) -> None:
    assert (normalized(one) == normalized(other)) is is_same


def test_files_are_read_with_every_way_to_name_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a?", "answer": "b"}\n\n{"question": "c?", "answer": "d", "more": 1}\n')
    assert read_questions(path) == [ExamQuestion(1, "a?", "b"), ExamQuestion(3, "c?", "d")]
    choices = '"choices": ["red", "blue", "C"]'
    path.write_text(
        "".join(f'{{"question": "q", {choices}, "answer": {a}}}\n' for a in ("1", '"B"', '"b"', '"C"', '"blue"'))
    )
    assert [item.answer for item in read_choices(path)] == [1, 1, 1, 2, 1]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected `object`, got `array`"),
        ('{"question": "q"}', "line 2: object missing required field `answer`"),
        ('{"question": "q", "answer": 3}', "line 2: answer: expected `str`, got `int`"),
        ('{"question": " ", "answer": "a"}', "line 2: question: expected `str` matching"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "q.jsonl").write_text(f'{{"question": "q", "answer": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=reason):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ('"answer": 0', "line 1: object missing required field `choices`"),
        ('"choices": ["a"], "answer": 0', "line 1: choices: expected `array` of length >= 2"),
        ('"choices": ["a", ""], "answer": 0', r"line 1: choices\[1\]: expected `str` of length >= 1"),
        ('"choices": ["a", "b"], "answer": 2', "is no number, letter or text"),
        ('"choices": ["a", "b"], "answer": "C"', "is no number, letter or text"),
        ('"choices": ["a", "b"], "answer": true', r"line 1: answer: expected `int \| str`, got `bool`"),
        ('"choices": ["a", "b"]', "line 1: object missing required field `answer`"),
    ],
)
def test_a_bad_choice_is_named(tmp_path: Path, rest: str, reason: str) -> None:
    (tmp_path / "q.jsonl").write_text(f'{{"question": "q", {rest}}}\n')
    with pytest.raises(InputError, match=reason):
        read_choices(tmp_path / "q.jsonl")


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no question"):
        read_questions(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(NORMED).eval()


def test_an_answer_counts_when_its_words_are_the_same(model: Model, tokenizer: Tokenizer) -> None:
    template = Template(tokenizer)
    said = answer_batch(model, tokenizer, template, ["Hi", "Where?"], max_new_tokens=5)
    items = [ExamQuestion(1, "Hi", said[0].upper() + " ."), ExamQuestion(2, "Where?", "something else")]
    outcomes = ask(model, tokenizer, template, items, max_new_tokens=5)
    assert [outcome.said for outcome in outcomes] == said
    assert [outcome.is_right for outcome in outcomes] == [
        normalized(said[0]) == normalized(said[0].upper() + " ."),
        False,
    ]
    assert summary(outcomes)["asked"] == 2


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_likeliest_choice_is_chosen(model: Model, tokenizer: Tokenizer, is_chat: bool) -> None:
    template = Template(tokenizer) if is_chat else None
    items = [
        ExamQuestion(n, f"Where does Pim live {n}?", n % 2, ("in the forest", "by the lake, in a house"))
        for n in range(60)
    ]
    outcomes = choose(model, tokenizer, template, items)
    for item, outcome in zip(items, outcomes, strict=True):
        logps = []
        for choice in item.choices:
            prompt = prompt_of(tokenizer, template, item.question)
            own = tokenizer.encode_batch([choice if is_chat else f" {choice}"])[0].tolist()
            ids = torch.tensor(prompt + own)
            ends = torch.tensor([0, len(ids)], dtype=torch.int32)
            with torch.no_grad():
                all_logps = (model(ids, torch.arange(len(ids)), ends, len(ids)) @ model.head_weight.T).log_softmax(-1)
            logps.append(float(all_logps[torch.arange(len(prompt) - 1, len(ids) - 1), own].sum()))
        best = logps.index(max(logps))
        assert outcome.said == item.choices[best]
        assert outcome.is_right == (best == item.answer)
    found = summary(outcomes)
    assert found["accuracy"] == sum(outcome.is_right for outcome in outcomes) / 60
    assert 0 <= found["accuracy_per_byte"] <= 1
