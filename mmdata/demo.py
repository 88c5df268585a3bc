"""The data of `mm demo`: four jsonl files made from a seed, held-out questions and held-out pairs, and the demo's settings.

Every subject has a set of keys (two numbers, a word, a person and a trait). Some keys are held out before anything is written
and training rows are drawn from the others, so that neither a held-out question nor the relation it asks about is trained on.
There are two exceptions. Of the islanders a wording is held out: the fact stands in the pretraining text and is asked about in
other words. And the messages between naming a boat and asking for its name may be training items.

An answer has two forms: bare ("700") or a whole sentence ("7 metres are 700 centimetres."). sft rows have both, dpo rows
prefer the sentence. An answer is exact if it is one of the two, letter for letter.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import msgspec

from mmdata.io.files import atomic_path
from mmdata.io.records import convert_record

LANGUAGES = ("en", "zh")
SUBJECTS = ("sum", "compare", "convert", "spell", "reverse", "islander", "follow-up", "recall")


class DemoTexts(msgspec.Struct, frozen=True):
    """demo.json: the phrases, names and words of the demo, in English and Chinese.

    `phrases`: by language and name: question, bare answer, whole sentence, other words for the sentence, and for some other
    words for the question. "smaller", "more" and "turned" follow up a comparison, a sum and a spelling; "colour" and "name" ask
    about the boat that was named.
    """

    phrases: dict[str, dict[str, list[str]]]
    people: list[tuple[str, str, str, str]]  # of the Lumi Isles: name and pronoun in English and in Chinese
    traits: dict[str, list[tuple[str, str]]]
    units: list[tuple[str, str, str, str, int]]  # large and small unit in both languages, small ones in a large one
    consonants: str
    vowels: str
    hanzi: str
    colours: list[tuple[str, str]]
    birds: list[tuple[str, str]]


@cache
def demo_texts() -> DemoTexts:
    """The content of demo.json."""
    return convert_record(json.loads(Path(__file__).with_name("demo.json").read_text(encoding="utf-8")), DemoTexts)


@dataclass(frozen=True, slots=True)
class Item:
    """A question, its answer in both forms and in other words (`other`), and the questions that may follow it (`then`)."""

    subject: str
    language: str
    ask: str
    bare: str
    whole: str
    other: str
    then: tuple["Item", ...] = ()


Items = dict[tuple[str, str], list[Item]]  # by language and subject
Facts = dict[tuple[int, str], int]  # (index in people, trait) -> index in traits[trait]
Message = dict[str, str]  # role and content, as jsonl has them


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question: the messages before the answer, and the answer in both forms."""

    subject: str
    language: str
    messages: tuple[Message, ...]
    bare: str
    whole: str


def make_item(
    phrase: str,
    language: str,
    values: Mapping[str, object],
    *,
    subject: str = "",
    wording: int = 0,
    then: Sequence[Item] = (),
) -> Item:
    """The item of the phrase named `phrase`, filled with `values`. `wording`: 1 takes the question in other words."""
    ask, bare, whole, other, *reworded = (text.format(**values) for text in demo_texts().phrases[language][phrase])
    return Item(subject or phrase, language, reworded[0] if wording else ask, bare, whole, other, tuple(then))


def sum_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Sums of pairs of numbers; "and n more?" follows if the second sum is among `keys` too."""
    items = []
    for a, b in keys:
        more = [n for total, n in keys if total == a + b]
        then = [_sum("more", a + b, n, language, subject="follow-up") for n in more]
        items.append(replace(_sum("sum", a, b, language), then=tuple(then)))
    return items


def _sum(phrase: str, a: int, b: int, language: str, subject: str = "") -> Item:
    return make_item(phrase, language, {"a": a, "b": b, "c": a + b}, subject=subject)


def compare_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Which of two numbers is larger, in both orders; the smaller one is asked for next."""
    items = []
    for low, high in keys:
        for x, y in ((low, high), (high, low)):
            values = {"x": x, "y": y, "low": low, "high": high}
            smaller = make_item("smaller", language, values, subject="follow-up")
            items.append(make_item("compare", language, values, then=[smaller]))
    return items


def convert_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Conversions of a large unit to a smaller one; a key is (index in units, how many)."""
    place = 2 * LANGUAGES.index(language)
    items = []
    for index, n in keys:
        unit = demo_texts().units[index]
        big, small = unit[place : place + 2]
        items.append(make_item("convert", language, {"n": n, "big": big, "small": small, "m": n * unit[4]}))
    return items


def boat_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Statements of a boat's colour and name (indices in colours and birds); the follow-ups ask for them."""
    place, texts = LANGUAGES.index(language), demo_texts()
    items = []
    for colour, bird in keys:
        values = {"colour": texts.colours[colour][place], "bird": texts.birds[bird][place]}
        asked = [make_item(what, language, values, subject="recall") for what in ("colour", "name")]
        items.append(make_item("boat", language, values, subject="recall", then=asked))
    return items


def word_items(words: Sequence[str], language: str) -> dict[str, list[Item]]:
    """Spelling and reversing words; a spelled word may be reversed next."""
    spell, reverse = [], []
    for word in words:
        values = {"word": word, "backwards": word[::-1], "spelled": "-".join(word)}
        turned = make_item("turned", language, values, subject="follow-up")
        spell.append(make_item("spell", language, values, then=[turned]))
        reverse.append(make_item("reverse", language, values))
    return {"spell": spell, "reverse": reverse}


def islander_items(facts: Facts, keys: Sequence[tuple[int, str, int]], language: str) -> list[Item]:
    """Traits of the islanders; a key is (index in people, trait, wording of the question).

    The follow-up asks for another trait of the same person, whom it calls he or she; its key is among `keys` too.
    """
    place, texts = LANGUAGES.index(language), demo_texts()

    def item_of(person: int, trait: str, wording: int, who: str, subject: str, then: Sequence[Item] = ()) -> Item:
        name, value = texts.people[person][2 * place], texts.traits[trait][facts[person, trait]][place]
        values = {"name": name, "who": who, "value": value}
        return make_item(trait, language, values, subject=subject, wording=wording, then=then)

    items = []
    for person, trait, wording in keys:
        name, pronoun = texts.people[person][2 * place : 2 * place + 2]
        then = []
        for other in [key for key in keys if key[0] == person and key[1] != trait]:
            item = item_of(*other, pronoun, "follow-up")
            asked = f"And {item.ask[0].lower()}{item.ask[1:]}" if language == "en" else f"那{item.ask}"
            then.append(replace(item, ask=asked))
        items.append(item_of(person, trait, wording, name, "islander", then))
    return items


@dataclass(frozen=True, slots=True)
class ItemSplits:
    """Items to train on and held-out ones, by language and subject; and all facts of the islanders, by language."""

    train: Items
    held_out: Items
    islanders: dict[str, list[Item]]


LETTERS_REPEATED = 50  # in the texts that the tokenizer is trained on
NUM_HELD_OUT = {"sum": 120, "compare": 240, "convert": 60, "recall": 30, "en": 200, "zh": 200}


def make_splits(seed: int) -> ItemSplits:
    """Draw the islanders' traits and the words, hold keys out, and build the items of both splits."""
    rng = random.Random(seed)
    texts = demo_texts()
    people, traits = range(len(texts.people)), texts.traits
    facts = {(person, trait): rng.randrange(len(traits[trait])) for person in people for trait in traits}
    asked = {(person, trait, wording) for person, trait in facts for wording in (0, 1)}
    held_asked = {
        (person, trait, rng.randrange(2)) for person in rng.sample(people, 12) for trait in rng.sample(list(traits), 2)
    }
    keys: dict[str, list] = {
        "sum": [(a, b) for a in range(10, 98) for b in range(2, min(10, 100 - a))],
        "compare": [(low, high) for low in range(10, 99) for high in range(low + 1, 100)],
        "convert": [(unit, n) for unit in range(len(texts.units)) for n in range(10, 100)],
        "recall": [(colour, bird) for colour in range(len(texts.colours)) for bird in range(len(texts.birds))],
        "en": _words(rng, "en"),
        "zh": _words(rng, "zh"),
    }
    for all_keys in keys.values():
        rng.shuffle(all_keys)
    held_keys = {name: all_keys[: NUM_HELD_OUT[name]] for name, all_keys in keys.items()} | {
        "islander": sorted(held_asked)
    }
    train_keys = {name: all_keys[NUM_HELD_OUT[name] :] for name, all_keys in keys.items()}
    train_keys["islander"] = sorted(asked - held_asked)
    stated = [key for key in sorted(asked) if key[2] == 0]
    islanders = {language: islander_items(facts, stated, language) for language in LANGUAGES}
    return ItemSplits(make_items(train_keys, facts), make_items(held_keys, facts), islanders)


def make_items(keys: dict[str, list], facts: Facts) -> Items:
    """The items of all keys, in both languages."""
    items: Items = {}
    for language in LANGUAGES:
        by_subject = {
            "sum": sum_items(keys["sum"], language),
            "compare": compare_items(keys["compare"], language),
            "convert": convert_items(keys["convert"], language),
            "recall": boat_items(keys["recall"], language),
            "islander": islander_items(facts, keys["islander"], language),
            **word_items(keys[language], language),
        }
        items |= {(language, subject): each for subject, each in by_subject.items()}
    return items


def _words(rng: random.Random, language: str, count: int = 3000) -> list[str]:
    """Different words of 4 letters, or of 3 Chinese characters; no letter is in a word twice, and no word is another reversed."""
    words: set[str] = set()
    texts = demo_texts()
    while len(words) < count:
        if language == "zh":
            word = "".join(rng.sample(texts.hanzi, 3))
        else:
            first, second = rng.sample(texts.consonants, 2), rng.sample(texts.vowels, 2)
            word = first[0] + second[0] + first[1] + second[1]
        if word[::-1] not in words:
            words.add(word)
    return sorted(words)


# How often a subject is drawn. Texts are mostly about the islanders, who occur nowhere else in them; chats mostly about what takes
# longest to learn.
TEXT_WEIGHTS = {"islander": 4.0, "sum": 1.0, "compare": 0.5, "convert": 0.5, "spell": 0.5, "reverse": 0.5}
CHAT_WEIGHTS = {
    "sum": 3.0,
    "compare": 2.5,
    "convert": 0.6,
    "spell": 0.6,
    "reverse": 1.0,
    "islander": 2.0,
    "recall": 1.5,
}


def documents(splits: ItemSplits, rng: random.Random, count: int) -> Iterator[dict]:
    """Pretraining rows: four sentences on one subject in one language. Those on islanders cover all facts."""
    for _ in range(count):
        language = rng.choice(LANGUAGES)
        subject = _by_weight(rng, TEXT_WEIGHTS)
        pool = splits.islanders[language] if subject == "islander" else splits.train[language, subject]
        items = [rng.choice(pool) for _ in range(4)]
        sentences = [rng.choice([text for text in (item.whole, item.other) if text]) for item in items]
        yield {"text": (" " if language == "en" else "").join(sentences)}


def conversations(splits: ItemSplits, rng: random.Random, count: int, *, fewest: int, most: int) -> Iterator[dict]:
    """sft rows of `fewest` to `most` items; the form of each answer is drawn."""
    for _ in range(count):
        yield {"conversations": _conversation(splits, rng, rng.randint(fewest, most))}


def _conversation(splits: ItemSplits, rng: random.Random, num_items: int) -> list[Message]:
    """Items one after another, half of them with a follow-up; a boat that was named is asked about at the end."""
    language = rng.choice(LANGUAGES)
    messages: list[Message] = []
    recall: list[Message] = []
    for _ in range(num_items):
        subject = _by_weight(rng, CHAT_WEIGHTS)
        if subject == "recall" and recall:
            continue  # one boat a conversation
        item = rng.choice(splits.train[language, subject])
        messages += _turn(item, rng)
        if subject == "recall":
            recall = _turn(rng.choice(item.then), rng)
        elif item.then and rng.random() < 0.5:
            messages += _turn(rng.choice(item.then), rng)
    return messages + recall


def pairs(asked: Iterable[Question]) -> Iterator[dict]:
    """dpo rows: the whole sentence is preferred to the bare answer; both are correct."""
    for question in asked:
        sides = {"chosen": question.whole, "rejected": question.bare}
        yield {side: [*question.messages, {"role": "assistant", "content": answer}] for side, answer in sides.items()}


def questions(items: Items, splits: ItemSplits, rng: random.Random, each: int) -> list[Question]:
    """`each` different questions about `items` for every subject and language; messages in between are training items."""
    unique: dict[str, Question] = {}
    for language in LANGUAGES:
        for subject in SUBJECTS:
            wanted = len(unique) + each
            while len(unique) < wanted:
                question = _question(items, splits, rng, language, subject)
                unique[json.dumps(question.messages)] = question
    return list(unique.values())


def _question(items: Items, splits: ItemSplits, rng: random.Random, language: str, subject: str) -> Question:
    """One question; before a follow-up or recall come the turns that it refers to."""
    before: list[Message] = []
    if subject == "follow-up":
        base = rng.choice(("sum", "compare", "spell", "islander"))
        item = rng.choice([item for item in items[language, base] if item.then])
        before = _turn(item, rng)
        item = rng.choice(item.then)
    elif subject == "recall":
        item = rng.choice(items[language, "recall"])
        before = _turn(item, rng)
        for _ in range(rng.randint(1, 4)):
            other = rng.choice([subject for subject in CHAT_WEIGHTS if subject != "recall"])
            before += _turn(rng.choice(splits.train[language, other]), rng)
        item = rng.choice(item.then)
    else:
        item = rng.choice(items[language, subject])
    return Question(subject, language, (*before, {"role": "user", "content": item.ask}), item.bare, item.whole)


def _turn(item: Item, rng: random.Random) -> list[Message]:
    """The question, and its answer in one of the two forms."""
    answer = rng.choice((item.bare, item.whole))
    return [{"role": "user", "content": item.ask}, {"role": "assistant", "content": answer}]


def _by_weight(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def tokenizer_texts(splits: ItemSplits) -> list[str]:
    """The texts that the tokenizer is trained on: all training text, except that words to spell are left out.

    Trained on these words the tokenizer would merge their letters, and the model could not see them. Single letters are repeated
    so often that each Chinese character, of three bytes, becomes a token before the phrases do.
    """
    texts = demo_texts()
    lines = ["user\n", "assistant\n"] * LETTERS_REPEATED
    for language, letters in (("en", texts.consonants + texts.vowels), ("zh", texts.hanzi)):
        for items in word_items(letters, language).values():
            lines += [text for item in items for text in _texts_of(item)] * LETTERS_REPEATED
        for subject in ("sum", "compare", "convert", "islander", "recall"):
            lines += [text for item in splits.train[language, subject] for text in _texts_of(item)]
        lines += [text for item in splits.islanders[language] for text in (item.whole, item.other)]
    return lines


def _texts_of(item: Item) -> Iterator[str]:
    """All texts of an item and of its first follow-up."""
    yield from (item.ask, item.bare, item.whole, item.other)
    yield from (text for follow_up in item.then[:1] for text in (follow_up.ask, follow_up.whole))


# --- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Score:
    """Questions asked, answers that are exact, answers that are a sentence, and exact answers by subject."""

    num_questions: int
    num_exact: int
    num_sentences: int
    by_subject: dict[str, tuple[int, int]]  # subject -> exact, asked

    @property
    def exact(self) -> float:
        """Share of exact answers."""
        return self.num_exact / self.num_questions

    @property
    def sentences(self) -> float:
        """Share of answers in the preferred form."""
        return self.num_sentences / self.num_questions


def is_exact(question: Question, answer: str) -> bool:
    """Whether the answer is one of the two forms, letter for letter except for surrounding spaces."""
    return answer.strip() in (question.bare, question.whole)


def is_sentence(answer: str) -> bool:
    """Whether the answer is a sentence: it ends with a full stop, which no bare answer has."""
    return answer.strip().endswith((".", "。"))


def score(asked: Sequence[Question], answers: Sequence[str]) -> Score:
    """Score the answers, one for each question."""
    num_asked = Counter(question.subject for question in asked)
    exact = Counter(q.subject for q, answer in zip(asked, answers, strict=True) if is_exact(q, answer))
    by_subject = {subject: (exact[subject], num_asked[subject]) for subject in SUBJECTS}
    return Score(len(asked), exact.total(), sum(map(is_sentence, answers)), by_subject)


def showcase(asked: Sequence[Question]) -> list[Question]:
    """Five questions to print: in both languages, one of them within a conversation."""
    kinds = (("sum", "en"), ("reverse", "zh"), ("islander", "en"), ("islander", "zh"), ("recall", "en"))
    return [next(q for q in asked if (q.subject, q.language) == kind) for kind in kinds]


# --- the recipe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DemoStage:
    """One training run of the demo: one epoch over a file of `rows` rows, packed to `max_len`."""

    file: str
    stage: str
    rows: int
    max_len: int
    lr: float
    batch_tokens: int
    schedule: str
    warmup: float = 0.03
    beta: float | None = None


# Measured on 2 idle cores (Xeon, AVX-512): 2.6 minutes in all, 5.3 million tokens in 5,300 steps. Small batches learn more from
# a token than large ones; with a learning rate of 3e-3, tried once, sums were learned late. dpo uses ten times the usual beta:
# the preference needs a few nats, and with 0.1 training goes on until answers become wrong.
MODEL = "demo"
VOCAB_SIZE = 1600
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MINUTES = 2.6
STAGES = (
    DemoStage("pretrain_hq", "pretrain", 18_600, 512, 1e-3, 1024, "wsd"),
    DemoStage("sft_512", "sft", 42_000, 512, 2e-3, 1024, "wsd"),
    DemoStage("sft_1024", "sft", 4_500, 1024, 2e-3, 1024, "wsd"),
    DemoStage("dpo", "dpo", 3_100, 512, 5e-5, 576, "cosine", beta=1.0),
)
NUM_EACH = 16  # held-out questions for each subject and language
NUM_PAIRS_EACH = 16


def scaled(minutes: float) -> tuple[DemoStage, ...]:
    """The stages with as many rows as fit into `minutes`."""
    return tuple(replace(stage, rows=max(64, round(stage.rows * minutes / MINUTES))) for stage in STAGES)


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The files written, and what the tokenizer and the scores need of them."""

    files: dict[str, Path]  # file name without .jsonl -> path
    pairs_path: Path  # held-out pairs, in dpo.jsonl's schema
    questions_path: Path  # held-out questions, with both answers
    questions: list[Question]
    tokenizer_texts: list[str]


def write_corpus(data_dir: Path, *, seed: int = 0, minutes: float = MINUTES) -> DemoFiles:
    """Write the four files to `data_dir` and held-out ones to `data_dir`/held_out. The same seed gives the same bytes."""
    splits = make_splits(seed)
    rng = random.Random(seed + 1)
    rows = {stage.file: stage.rows for stage in scaled(minutes)}
    asked = questions(splits.held_out, splits, rng, NUM_EACH)
    held_pairs = questions(splits.held_out, splits, rng, NUM_PAIRS_EACH)
    preferred = (
        _question(splits.train, splits, rng, rng.choice(LANGUAGES), rng.choice(SUBJECTS)) for _ in range(rows["dpo"])
    )
    questions_path = _write(data_dir / "held_out" / "questions.jsonl", map(asdict, asked))
    pairs_path = _write(data_dir / "held_out" / "pairs.jsonl", pairs(held_pairs))
    content = {
        "pretrain_hq": documents(splits, rng, rows["pretrain_hq"]),
        "sft_512": conversations(splits, rng, rows["sft_512"], fewest=1, most=3),
        "sft_1024": conversations(splits, rng, rows["sft_1024"], fewest=4, most=24),
        "dpo": pairs(preferred),
    }
    files = {name: _write(data_dir / f"{name}.jsonl", lines) for name, lines in content.items()}
    return DemoFiles(files, pairs_path, questions_path, asked, tokenizer_texts(splits))


def _write(path: Path, rows: Iterable[dict]) -> Path:
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
