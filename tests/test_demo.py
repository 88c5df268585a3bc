"""The demo's corpus: what is held out stays held out, every row is a row, and scores count what they say."""

import json
import pickle
import random
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mmdata.demo import corpus as demo
from mmdata.demo.items import plain_text, spoken
from mmdata.encode import rows
from mmdata.io.lines import iter_lines
from mmdata.tokenizer.tokenizer import CHATML, Tokenizer, train_bpe

SEED, MINUTES = 3, 0.6


@dataclass(frozen=True)
class Built:
    """What `write_corpus` returned, the splits of the same seed, and a tokenizer trained as the demo's."""

    corpus: demo.DemoFiles
    splits: demo.ItemSplits
    tokenizer: Tokenizer


def build(out: Path) -> None:
    corpus = demo.write_corpus(out / "data", seed=SEED, minutes=MINUTES)
    tokenizer = train_bpe(
        corpus.tokenizer_texts,
        vocab_size=demo.VOCAB_SIZE,
        control_tokens=demo.CONTROL_TOKENS,
        chat_template=CHATML,
        out_dir=out / "tokenizer",
    )
    (out / "built.pickle").write_bytes(pickle.dumps(Built(corpus, demo.make_splits(SEED), tokenizer)))


@pytest.fixture(scope="module")
def built(built_once: Callable[..., Path]) -> Built:
    return pickle.loads((built_once("demo", build) / "built.pickle").read_bytes())


@pytest.fixture(scope="module")
def corpus(built: Built) -> demo.DemoFiles:
    return built.corpus


@pytest.fixture(scope="module")
def splits(built: Built) -> demo.ItemSplits:
    return built.splits


@pytest.fixture(scope="module")
def tokenizer(built: Built) -> Tokenizer:
    return built.tokenizer


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conversations_of(row: dict) -> list[list[dict]]:
    return [messages for messages in row.values() if isinstance(messages, list)]


def asked_in(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(corpus: demo.DemoFiles, tmp_path: Path) -> None:
    one, two = corpus, demo.write_corpus(tmp_path / "two", seed=SEED, minutes=MINUTES)
    other = demo.write_corpus(tmp_path / "other", seed=SEED + 1, minutes=MINUTES)
    for name in one.files:
        assert one.files[name].read_bytes() == two.files[name].read_bytes()
        assert one.files[name].read_bytes() != other.files[name].read_bytes()
    assert one.questions == two.questions
    assert one.pairs_path.read_bytes() == two.pairs_path.read_bytes()
    assert one.tokenizer_texts == two.tokenizer_texts


def test_files_carry_the_datasets_names_and_rows_of_their_kind(corpus: demo.DemoFiles) -> None:
    kinds = {"pretrain_hq": "document", "sft_512": "conversation", "sft_1024": "conversation", "dpo": "pair"}
    assert corpus.files.keys() == kinds.keys()
    for name, path in [*corpus.files.items(), ("dpo", corpus.pairs_path)]:
        assert path.name == (f"{name}.jsonl" if path != corpus.pairs_path else "pairs.jsonl")
        for line in iter_lines(path):
            assert rows.kind_of(rows.parse_row(line.raw)) == kinds[name]


def test_held_out_files_lie_where_packing_the_folder_does_not_find_them(corpus: demo.DemoFiles) -> None:
    data_dir = corpus.files["dpo"].parent
    assert sorted(path.stem for path in data_dir.glob("*.jsonl")) == sorted(corpus.files)


def test_no_held_out_question_occurs_in_training(corpus: demo.DemoFiles) -> None:
    trained = [messages for path in corpus.files.values() for row in read(path) for messages in conversations_of(row)]
    singles = {question for messages in trained for question in asked_in(messages)}
    sequences = {tuple(m["content"] for m in messages[:k]) for messages in trained for k in range(1, len(messages), 2)}
    held = [(question.subject, list(question.messages)) for question in corpus.questions]
    held += [("", row["chosen"][:-1]) for row in read(corpus.pairs_path)]
    for subject, messages in held:
        assert tuple(m["content"] for m in messages) not in sequences
        if len(messages) == 1:
            assert messages[0]["content"] not in singles
        if subject == "follow-up":
            assert messages[0]["content"] not in singles  # already what it refers to was never asked


@pytest.mark.slow
def test_none_of_the_first_questions_of_the_benchmark_is_trained_on(tmp_path: Path) -> None:
    first = json.loads((Path(__file__).parent / "bench/first_questions.json").read_text(encoding="utf-8"))
    files = demo.write_corpus(tmp_path).files.values()
    trained = [messages for path in files for row in read(path) for messages in conversations_of(row)]
    asked = {plain_text(question) for messages in trained for question in asked_in(messages)}
    assert sum(question["set"] != "tuned" for question in first) >= 60
    assert not {plain_text(question["ask"]) for question in first} & asked


def test_a_wording_with_alternatives_gives_each_of_them_and_nothing_else() -> None:
    draw = random.Random(0)
    asked = {spoken("(Hi|Oh (yes|no)|), {a} (+|plus) 1(?|)", {"a": 3}, draw) for _ in range(300)}
    starts = ("Hi, ", "Oh yes, ", "Oh no, ", ", ")
    assert asked == {f"{start}3 {plus} 1{end}" for start in starts for plus in ("+", "plus") for end in ("?", "")}


def test_every_wording_can_be_filled(splits: demo.ItemSplits) -> None:
    asked = [item.ask for key, items in splits.train.items() if key[1] in ("talk", "else") for item in items]
    sums = splits.train["en", "sum"][:1] + splits.train["zh", "sum"][:1]
    asked += [spoken(wording, item.values, random.Random(0)) for item in sums for wording in item.wordings]
    assert all(ask and not set(ask) & set("{}|") for ask in asked)


def test_no_relation_that_is_held_out_is_stated_in_training(corpus: demo.DemoFiles) -> None:
    text = "\n".join(row["text"] for row in read(corpus.files["pretrain_hq"]))
    trained = [messages for path in corpus.files.values() for row in read(path) for messages in conversations_of(row)]
    said = {message["content"] for messages in trained for message in messages}
    for question in corpus.questions:
        if question.subject in ("sum", "compare", "convert", "spell", "reverse"):
            assert question.whole not in said
            assert not any(before + question.whole.rstrip(".。") in text for before in (" ", "\n", "。"))


def test_no_word_to_spell_is_another_one_backwards(splits: demo.ItemSplits) -> None:
    for items in splits.train, splits.held_out:
        words = {item.bare for language in demo.LANGUAGES for item in items[language, "reverse"]}
        assert not words & {word[::-1] for word in words}


def test_what_is_asked_about_the_islanders_stands_in_the_pretraining_text(splits: demo.ItemSplits) -> None:
    for language in demo.LANGUAGES:
        stated = {item.whole for item in splits.islanders[language]}
        assert {item.whole for item in splits.held_out[language, "islander"]} <= stated


def test_held_out_questions_cover_every_subject_in_both_languages(corpus: demo.DemoFiles) -> None:
    counts = {(q.subject, q.language): 0 for q in corpus.questions}
    for question in corpus.questions:
        counts[question.subject, question.language] += 1
    assert set(counts) == {(subject, language) for subject in demo.SUBJECTS for language in demo.LANGUAGES}
    assert min(counts.values()) == demo.NUM_EACH
    assert len(corpus.questions) >= 200


def test_some_long_conversations_are_longer_than_512_tokens(corpus: demo.DemoFiles, tokenizer: Tokenizer) -> None:
    lengths = {}
    for name in ("sft_512", "sft_1024"):
        texts = ["\n".join(m["content"] for m in row["conversations"]) for row in read(corpus.files[name])]
        ends = tokenizer.encode_batch(texts)[1].tolist()
        lengths[name] = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    assert max(lengths["sft_512"]) < 512
    assert max(lengths["sft_1024"]) > 512


def test_words_to_spell_stay_single_letters_for_the_model(corpus: demo.DemoFiles, tokenizer: Tokenizer) -> None:
    for question in corpus.questions:
        if question.subject == "reverse":
            assert len(tokenizer.encode_batch([question.bare])[0]) == len(question.bare)


def test_both_sides_of_a_pair_are_right_and_only_the_chosen_one_is_a_sentence(corpus: demo.DemoFiles) -> None:
    for row in read(corpus.files["dpo"]):
        chosen, rejected = row["chosen"], row["rejected"]
        assert chosen[:-1] == rejected[:-1]
        assert demo.is_sentence(chosen[-1]["content"])
        assert not demo.is_sentence(rejected[-1]["content"])


SUM = demo.Question("sum", "en", ({"role": "user", "content": "What is 12 + 5?"},), "17", "12 + 5 = 17.")
REVERSE = demo.Question("reverse", "zh", ({"role": "user", "content": "…"},), "月花山", "“山花月”倒过来是“月花山”。")


@pytest.mark.parametrize(
    ("question", "answer", "is_exact", "is_sentence"),
    [
        (SUM, "17", True, False),
        (SUM, " 17\n", True, False),
        (SUM, "12 + 5 = 17.", True, True),
        (SUM, "12 + 5 = 18.", False, True),
        (SUM, "17.", False, True),
        (SUM, "117", False, False),
        (SUM, "", False, False),
        (REVERSE, "月花山", True, False),
        (REVERSE, "“山花月”倒过来是“月花山”。", True, True),
        (REVERSE, "山花月", False, False),
    ],
)
def test_an_answer_is_exact_letter_for_letter_in_either_manner(
    question: demo.Question, answer: str, is_exact: bool, is_sentence: bool
) -> None:
    assert demo.is_exact(question, answer) == is_exact
    assert demo.is_sentence(answer) == is_sentence


def test_scores_add_up_over_subjects(corpus: demo.DemoFiles) -> None:
    answers = [q.whole if q.subject == "sum" else q.bare if q.subject == "recall" else "?" for q in corpus.questions]
    score = demo.score(corpus.questions, answers)
    each = 2 * demo.NUM_EACH
    assert score.by_subject["sum"] == score.by_subject["recall"] == (each, each)
    assert score.by_subject["spell"] == (0, each)
    assert score.exact == pytest.approx(2 / len(demo.SUBJECTS))
    assert score.sentences == pytest.approx(1 / len(demo.SUBJECTS))


def test_five_questions_are_shown_in_both_languages_and_within_a_conversation(corpus: demo.DemoFiles) -> None:
    shown = demo.showcase(corpus.questions)
    assert len(shown) == 5
    assert {question.language for question in shown} == set(demo.LANGUAGES)
    assert any(len(question.messages) > 1 for question in shown)


def test_minutes_scale_the_rows_of_every_stage() -> None:
    half = demo.scaled(demo.MINUTES / 2)
    assert half == {name: pytest.approx(rows / 2, abs=1) for name, rows in demo.ROWS.items()}


def test_the_texts_are_part_of_the_package() -> None:
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["package-data"]["mmdata.demo"] == ["demo.json"]
