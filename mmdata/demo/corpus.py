"""The data of `mm demo`: four jsonl files generated from a seed, held-out questions and pairs.

An answer has two forms: bare ("700") or a whole sentence ("7 metres are 700 centimetres."). sft rows have both, and dpo
rows prefer the sentence. An answer counts as exact if it equals one of the two, spaces around it aside. In "recall"
questions, the messages between naming a boat and asking about it are made from training keys.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmdata.demo.items import (
    LANGUAGES,
    SUBJECTS,
    TALK,
    Item,
    Items,
    ItemSplits,
    demo_texts,
    make_splits,
    plain_text,
    spoken,
    word_items,
)
from mmdata.io.files import atomic_path
from mmdata.io.records import convert_record

Message = dict[str, str]  # role and content, as jsonl has them


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question: the messages up to and including the question, and the correct answer in both forms."""

    subject: str
    language: str
    messages: tuple[Message, ...]
    bare: str
    whole: str


LETTERS_REPEATED = 50  # how often the tokenizer's training texts repeat each text on a single letter
# Relative frequencies of the subjects in pretraining texts and in conversations. Texts are mostly about the islanders:
# they occur nowhere else in these texts. Conversations are mostly about the subjects that take longest to learn.
TEXT_WEIGHTS = {"islander": 4.0, "sum": 5.0, "compare": 0.5, "convert": 0.5, "spell": 1.2, "reverse": 1.2}
CHAT_WEIGHTS = {
    "sum": 16.0,
    "compare": 2.5,
    "convert": 0.6,
    "spell": 1.2,
    "reverse": 1.8,
    "islander": 2.0,
    "recall": 1.5,
    "talk": 3.5,
    "else": 4.5,
}


def documents(splits: ItemSplits, rng: random.Random, count: int) -> Iterator[dict]:
    """Yield `count` pretraining rows of four sentences on one subject in one language; on islanders of all facts, on
    other subjects of training items."""
    for _ in range(count):
        language = rng.choice(LANGUAGES)
        subject = _by_weight(rng, TEXT_WEIGHTS)
        pool = splits.islanders[language] if subject == "islander" else splits.train[language, subject]
        items = [rng.choice(pool) for _ in range(4)]
        sentences = [rng.choice([text for text in (item.whole, item.other) if text]) for item in items]
        yield {"text": (" " if language == "en" else "").join(sentences)}


def conversations(splits: ItemSplits, rng: random.Random, count: int, *, fewest: int, most: int) -> Iterator[dict]:
    """Yield `count` sft rows of `fewest` to `most` training items; each answer is randomly bare or a whole sentence."""
    for _ in range(count):
        yield {"conversations": _conversation(splits, rng, rng.randint(fewest, most))}


def _conversation(splits: ItemSplits, rng: random.Random, num_items: int) -> list[Message]:
    """Return the messages of a conversation about `num_items` random training items, in one language. Half of the time
    a follow-up follows. If the user names a boat, the last turn asks about it; a second boat is skipped."""
    language = rng.choice(LANGUAGES)
    messages: list[Message] = []
    recall: list[Message] = []
    for _ in range(num_items):
        subject = _by_weight(rng, CHAT_WEIGHTS)
        if subject == "recall" and recall:
            continue  # at most one boat per conversation, so that the question at its end has one answer
        item = rng.choice(splits.train[language, subject])
        messages += _turn(item, splits, rng)
        if subject == "recall":
            recall = _turn(rng.choice(item.then), splits, rng)
        elif item.then and rng.random() < 0.5:
            messages += _turn(rng.choice(item.then), splits, rng)
    return messages + recall


def pairs(asked: Iterable[Question]) -> Iterator[dict]:
    """Yield a dpo row for each question. `chosen` ends with the whole sentence, `rejected` with the bare answer."""
    for question in asked:
        sides = {"chosen": question.whole, "rejected": question.bare}
        yield {side: [*question.messages, {"role": "assistant", "content": answer}] for side, answer in sides.items()}


def questions(items: Items, splits: ItemSplits, rng: random.Random, each: int) -> list[Question]:
    """Return `each` different questions, made from `items`, for every language and subject. There must be as many.
    Unrelated turns before a "recall" question are drawn from `splits.train`."""
    unique: dict[str, Question] = {}
    for language in LANGUAGES:
        for subject in SUBJECTS:
            wanted = len(unique) + each
            while len(unique) < wanted:
                question = _question(items, splits, rng, language, subject)
                unique[json.dumps(question.messages)] = question
    return list(unique.values())


def _question(items: Items, splits: ItemSplits, rng: random.Random, language: str, subject: str) -> Question:
    """Return a random question on a subject: a "follow-up" after the turn it refers to, a "recall" after the turn that
    names the boat and 1 to 4 turns on other subjects from `splits.train`."""
    before: list[Message] = []
    if subject == "follow-up":
        base = rng.choice(("sum", "compare", "spell", "islander"))
        item = rng.choice([item for item in items[language, base] if item.then])
        before = _turn(item, splits, rng)
        item = rng.choice(item.then)
    elif subject == "recall":
        item = rng.choice(items[language, "recall"])
        before = _turn(item, splits, rng)
        for _ in range(rng.randint(1, 4)):
            other = rng.choice([subject for subject in CHAT_WEIGHTS if subject != "recall"])
            before += _turn(rng.choice(splits.train[language, other]), splits, rng)
        item = rng.choice(item.then)
    else:
        item = rng.choice(items[language, subject])
    return Question(subject, language, (*before, {"role": "user", "content": item.ask}), item.bare, item.whole)


def _turn(item: Item, splits: ItemSplits, rng: random.Random) -> list[Message]:
    """Return a question and its answer. The question is mostly in other words if it has any; those that people type
    first sometimes have words before and after them, and a quarter is carelessly typed, unless that gives a held-out
    question."""
    ask, texts = item.ask, demo_texts()
    if item.wordings and rng.random() < 0.8:
        ask = spoken(rng.choice(item.wordings), item.values, rng)
    if item.subject in ("sum", "talk", "else"):
        if rng.random() < 0.2:
            ask = rng.choice(texts.before[item.language]) + ask[0].lower() + ask[1:]
        if rng.random() < 0.2:
            ask = ask.rstrip("?!.？！。") + rng.choice(texts.after[item.language])
    if rng.random() < 0.25:
        ask = (ask[0].lower() + ask[1:]).rstrip("?!.？！。")
    if plain_text(ask) in splits.withheld:
        ask = item.ask
    answer = rng.choice((item.bare, item.whole))
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def _by_weight(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def tokenizer_texts(splits: ItemSplits) -> list[str]:
    """Return the texts that the demo's tokenizer is trained on: training items and facts, without words to spell, whose
    letters BPE would merge; each text once. Single letters, and the answers that many questions share, are repeated
    LETTERS_REPEATED times, so that each Chinese character (three bytes) becomes a token before phrases do."""
    texts = demo_texts()
    answers = [text for phrases in texts.phrases.values() for name in (*TALK, "else") for text in phrases[name][1:3]]
    lines = ["user\n", "assistant\n", *answers, *sorted(set("".join(answers)))] * LETTERS_REPEATED
    for language, letters in (("en", texts.consonants + texts.vowels), ("zh", texts.hanzi)):
        for items in word_items(letters, language).values():
            lines += [text for item in items for text in _texts_of(item)] * LETTERS_REPEATED
        for subject in ("sum", "compare", "convert", "islander", "recall", "talk", "else"):
            lines += dict.fromkeys(text for item in splits.train[language, subject] for text in _texts_of(item))
        lines += [text for item in splits.islanders[language] for text in (item.whole, item.other)]
    return lines


def _texts_of(item: Item) -> Iterator[str]:
    yield from (item.ask, item.bare, item.whole, item.other)
    yield from (text for follow_up in item.then[:1] for text in (follow_up.ask, follow_up.whole))


# --- scores


@dataclass(frozen=True, slots=True)
class Score:
    """How well questions were answered. `num_sentences` counts answers that end with a full stop, right or wrong."""

    num_questions: int
    num_exact: int
    num_sentences: int
    by_subject: dict[str, tuple[int, int]]  # subject -> exact, asked

    @property
    def exact(self) -> float:
        """Return the share of exact answers, 0 to 1. There must be at least one question."""
        return self.num_exact / self.num_questions

    @property
    def sentences(self) -> float:
        """Return the share of answers that are a sentence, which is the form that dpo prefers, 0 to 1."""
        return self.num_sentences / self.num_questions


def is_exact(question: Question, answer: str) -> bool:
    """Return whether the answer equals the bare answer or the whole sentence, white space around it aside."""
    return answer.strip() in (question.bare, question.whole)


def is_sentence(answer: str) -> bool:
    """Return whether the answer is a sentence: it ends with a full stop, which no bare answer does."""
    return answer.strip().endswith((".", "。"))


def score(asked: Sequence[Question], answers: Sequence[str]) -> Score:
    """Score the answers, `answers[i]` being the answer to `asked[i]`. Raises ValueError if the lengths differ."""
    num_asked = Counter(question.subject for question in asked)
    exact = Counter(q.subject for q, answer in zip(asked, answers, strict=True) if is_exact(q, answer))
    by_subject = {subject: (exact[subject], num_asked[subject]) for subject in SUBJECTS}
    return Score(len(asked), exact.total(), sum(map(is_sentence, answers)), by_subject)


def showcase(asked: Sequence[Question]) -> list[Question]:
    """Return five of the `questions` to print as examples, in both languages; one is within a conversation."""
    kinds = (("sum", "en"), ("reverse", "zh"), ("islander", "en"), ("islander", "zh"), ("recall", "en"))
    return [next(q for q in asked if (q.subject, q.language) == kind) for kind in kinds]


# --- the files


VOCAB_SIZE = 2048
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MINUTES = 3.1  # training time of the ROWS as they are, measured on two idle cores (tests/bench/RESULTS.md)
ROWS = {"pretrain_hq": 12_000, "sft_512": 31_000, "sft_1024": 2_500, "dpo": 2_600}  # of each file
NUM_EACH = 16  # held-out questions for each subject and language
NUM_PAIRS_EACH = 16  # held-out pairs for each subject and language


def scaled(minutes: float) -> dict[str, int]:
    """Return the rows of each file, at least 64, for about `minutes` of training; all of them take MINUTES."""
    return {name: max(64, round(rows * minutes / MINUTES)) for name, rows in ROWS.items()}


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The files that `write_corpus` wrote, the held-out questions, and the texts to train the tokenizer on."""

    files: dict[str, Path]  # file name without .jsonl -> path
    pairs_path: Path  # held-out pairs, in dpo.jsonl's schema
    questions: list[Question]
    tokenizer_texts: list[str]


def write_corpus(data_dir: Path, *, seed: int = 0, minutes: float = MINUTES) -> DemoFiles:
    """Write the four training files to `data_dir`, and held-out questions and pairs to `data_dir`/held_out. minutes:
    sets the numbers of rows (see `scaled`). The same seed and minutes give the same bytes."""
    splits = make_splits(seed)
    rng = random.Random(seed + 1)
    rows = scaled(minutes)
    asked = questions(splits.held_out, splits, rng, NUM_EACH)
    held_pairs = questions(splits.held_out, splits, rng, NUM_PAIRS_EACH)
    preferred = (
        _question(splits.train, splits, rng, rng.choice(LANGUAGES), rng.choice(SUBJECTS)) for _ in range(rows["dpo"])
    )
    _write(data_dir / "held_out" / "questions.jsonl", map(asdict, asked))
    pairs_path = _write(data_dir / "held_out" / "pairs.jsonl", pairs(held_pairs))
    content = {
        "pretrain_hq": documents(splits, rng, rows["pretrain_hq"]),
        "sft_512": conversations(splits, rng, rows["sft_512"], fewest=1, most=3),
        "sft_1024": conversations(splits, rng, rows["sft_1024"], fewest=4, most=24),
        "dpo": pairs(preferred),
    }
    files = {name: _write(data_dir / f"{name}.jsonl", lines) for name, lines in content.items()}
    return DemoFiles(files, pairs_path, asked, tokenizer_texts(splits))


def read_questions(data_dir: Path) -> list[Question]:
    """Return the held-out questions that `write_corpus` wrote to a directory."""
    lines = (data_dir / "held_out" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [convert_record(json.loads(line), Question) for line in lines]


def _write(path: Path, rows: Iterable[dict]) -> Path:
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
