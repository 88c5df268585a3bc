"""The data of `mm demo`: four jsonl files generated from a seed, held-out questions and pairs, and the demo's settings.

The questions of each subject, such as sums, are made from keys: two numbers, a word, or a person and a trait. Some keys
are held out, and training rows are made from the others, so that neither a held-out question nor the fact that it asks
about is trained on. There are two exceptions. For the islanders (invented people) only a wording of the question is
held out: the fact is part of the pretraining text. And in "recall" questions, the messages between naming a boat and
asking about it are made from training keys. Two subjects are for what people type first: "talk" is greetings, thanks,
and questions about the model itself, and "else" is questions that the model has to say it cannot answer; of both,
wordings are held out. Sums of one-digit numbers, which people try first, are all trained on.
An answer has two forms: bare ("700") or a whole sentence ("7 metres are 700 centimetres."). sft rows have both, and dpo
rows prefer the sentence. An answer counts as exact if it equals one of the two, spaces around it aside.
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
SUBJECTS = ("sum", "compare", "convert", "spell", "reverse", "islander", "follow-up", "recall", "talk", "else")
TALK = ("hello", "thanks", "bye", "who", "can")  # the phrases of the subject "talk"


class DemoTexts(msgspec.Struct, frozen=True):
    """The content of demo.json: the phrases, names and words of the demo's data, in English and Chinese.

    `phrases` maps a language and a phrase name to format strings: the question, the bare answer, the whole sentence,
    the sentence in other words (may be empty), and for some phrases the question in other words, any number of them.
    "smaller", "more" and "turned" follow up a comparison, a sum and a spelling. "boat" tells the colour and name of a
    boat; "colour" and "name" ask for them.
    """

    phrases: dict[str, dict[str, list[str]]]
    people: list[tuple[str, str, str, str]]  # the islanders: English name and pronoun, Chinese name and pronoun
    traits: dict[str, list[tuple[str, str]]]  # trait -> its possible values, each in English and Chinese
    # Large and small unit in English, large and small unit in Chinese, number of small units in a large one.
    units: list[tuple[str, str, str, str, int]]
    consonants: str  # letters that the English words to spell are made of
    vowels: str
    hanzi: str  # characters that the Chinese words to spell are made of
    colours: list[tuple[str, str]]  # of boats, in English and Chinese
    birds: list[tuple[str, str]]  # names of boats, in English and Chinese
    things: list[tuple[str, str]]  # what the model knows nothing about, in English and Chinese; `places` likewise
    places: list[tuple[str, str]]


@cache
def demo_texts() -> DemoTexts:
    """Return the content of demo.json; the file is read once per process."""
    return convert_record(json.loads(Path(__file__).with_name("demo.json").read_text(encoding="utf-8")), DemoTexts)


@dataclass(frozen=True, slots=True)
class Item:
    """A question (`ask`) with its answers: `bare`, `whole` sentence, and that in other words (`other`, may be empty).

    `then` has the questions that may follow it in a conversation, `wordings` the question in other words that training
    rows use too. `language` is "en" or "zh".
    """

    subject: str
    language: str
    ask: str
    bare: str
    whole: str
    other: str
    then: tuple["Item", ...] = ()
    wordings: tuple[str, ...] = ()


Items = dict[tuple[str, str], list[Item]]  # by language and subject
Facts = dict[tuple[int, str], int]  # (index in people, trait) -> index in traits[trait]
Message = dict[str, str]  # role and content, as jsonl has them


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question: the messages up to and including the question, and the correct answer in both forms."""

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
    """Return the item made by filling the phrase named `phrase` with `values`. subject: empty for the phrase's name.
    wording: 0 for the usual question, 1, 2, … for its other words. then: items that may follow this one."""
    ask, bare, whole, other, *reworded = demo_texts().phrases[language][phrase]
    ask, bare, whole, other = (text.format(**values) for text in ([ask, *reworded][wording], bare, whole, other))
    return Item(subject or phrase, language, ask, bare, whole, other, tuple(then))


def sum_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Return a question "What is a + b?" for each key (a, b), with its other wordings. "And n more?", n below 10, may
    follow if (a + b, n) is among `keys` too, so that no held-out sum is asked for."""
    distinct = dict.fromkeys(keys)
    more: dict[int, list[Item]] = {}
    for total, n in sorted(distinct):
        if n < 10:
            more.setdefault(total, []).append(_sum("more", total, n, language, subject="follow-up"))
    items = {}
    for a, b in distinct:
        wordings = tuple(text.format(a=a, b=b) for text in demo_texts().phrases[language]["sum"][4:])
        items[a, b] = replace(_sum("sum", a, b, language), then=tuple(more.get(a + b, ())), wordings=wordings)
    return [items[key] for key in keys]


def _sum(phrase: str, a: int, b: int, language: str, subject: str = "") -> Item:
    return make_item(phrase, language, {"a": a, "b": b, "c": a + b}, subject=subject)


def compare_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Return two questions for each key (low, high): which is larger, in either order. Follow-up: which is smaller."""
    items = []
    for low, high in keys:
        for x, y in ((low, high), (high, low)):
            values = {"x": x, "y": y, "low": low, "high": high}
            smaller = make_item("smaller", language, values, subject="follow-up")
            items.append(make_item("compare", language, values, then=[smaller]))
    return items


def convert_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Return a question for each key (index into `DemoTexts.units`, n): how many small units n large units are."""
    place = 2 * LANGUAGES.index(language)
    items = []
    for index, n in keys:
        unit = demo_texts().units[index]
        big, small = unit[place : place + 2]
        items.append(make_item("convert", language, {"n": n, "big": big, "small": small, "m": n * unit[4]}))
    return items


def boat_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Return an item for each key, in which the user tells colour and name of a boat; follow-ups ask for one of them.

    A key is (index into `DemoTexts.colours`, index into `DemoTexts.birds`); boats are named after birds.
    """
    place, texts = LANGUAGES.index(language), demo_texts()
    items = []
    for colour, bird in keys:
        values = {"colour": texts.colours[colour][place], "bird": texts.birds[bird][place]}
        asked = [make_item(what, language, values, subject="recall") for what in ("colour", "name")]
        items.append(make_item("boat", language, values, subject="recall", then=asked))
    return items


def word_items(words: Sequence[str], language: str) -> dict[str, list[Item]]:
    """Return the items "spell" and "reverse" of each word, by subject. Follow-up of "spell": what it is backwards."""
    spell, reverse = [], []
    for word in words:
        values = {"word": word, "backwards": word[::-1], "spelled": "-".join(word)}
        turned = make_item("turned", language, values, subject="follow-up")
        spell.append(make_item("spell", language, values, then=[turned]))
        reverse.append(make_item("reverse", language, values))
    return {"spell": spell, "reverse": reverse}


def talk_items(keys: Sequence[tuple[str, int]], language: str) -> list[Item]:
    """Return the item of each key (phrase of TALK, wording)."""
    return [make_item(phrase, language, {}, subject="talk", wording=wording) for phrase, wording in keys]


def else_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Return the item of each key (wording, index of a thing or place)."""
    place, texts = LANGUAGES.index(language), demo_texts()
    items = []
    for wording, index in keys:
        values = {"thing": texts.things[index][place], "place": texts.places[index % len(texts.places)][place]}
        items.append(make_item("else", language, values, wording=wording))
    return items


def islander_items(facts: Facts, keys: Sequence[tuple[int, str, int]], language: str) -> list[Item]:
    """Return a question about a trait of an islander for each key (index into `DemoTexts.people`, trait, wording).
    facts: the value of each trait of each person. Follow-ups ask for each other trait of the same person, called he or
    she, that is in `keys`, so that no held-out question becomes one."""
    place, texts = LANGUAGES.index(language), demo_texts()

    def item_of(person: int, trait: str, wording: int, who: str, subject: str, then: Sequence[Item] = ()) -> Item:
        """Return the item about one trait of one person. who: the name or pronoun that the question uses."""
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
    """Items to train on and held-out ones, by language and subject. `islanders`: every fact about them once."""

    train: Items
    held_out: Items
    islanders: dict[str, list[Item]]


LETTERS_REPEATED = 50  # how often the tokenizer's training texts repeat each text on a single letter
# Number of keys held out, by subject, and of "words" (to spell and reverse), "talk" and "else" in each language.
NUM_HELD_OUT = {"sum": 120, "compare": 240, "convert": 60, "recall": 30, "words": 200, "talk": 24, "else": 100}
# How often a sum is among the sums to train on, by how many of its two numbers have one digit.
SUM_REPEATED = (1, 4, 30)


def make_splits(seed: int) -> ItemSplits:
    """Draw traits and words, hold out some keys (of the islanders 24), and return the items of both splits."""
    rng = random.Random(seed)
    texts = demo_texts()
    people, traits = range(len(texts.people)), texts.traits
    facts = {(person, trait): rng.randrange(len(traits[trait])) for person in people for trait in traits}
    asked = {(person, trait, wording) for person, trait in facts for wording in (0, 1)}
    held_asked = {
        (person, trait, rng.randrange(2)) for person in rng.sample(people, 12) for trait in rng.sample(list(traits), 2)
    }
    keys: dict[str, list] = {
        "sum": [(a, b) for a in range(100) for b in range(100)],
        "compare": [(low, high) for low in range(10, 99) for high in range(low + 1, 100)],
        "convert": [(unit, n) for unit in range(len(texts.units)) for n in range(10, 100)],
        "recall": [(colour, bird) for colour in range(len(texts.colours)) for bird in range(len(texts.birds))],
        **{f"words {name}": _words(rng, name) for name in LANGUAGES},
        **{
            f"talk {name}": [(phrase, n) for phrase in TALK for n in range(_num_asks(name, phrase))]
            for name in LANGUAGES
        },
        **{f"else {name}": list(_else_keys(name)) for name in LANGUAGES},
    }
    for all_keys in keys.values():
        rng.shuffle(all_keys)
    keys["sum"].sort(key=lambda key: max(key) < 10)  # none of one-digit numbers is held out
    num_held_out = {name: NUM_HELD_OUT[name.split()[0]] for name in keys}
    held_keys = {name: all_keys[: num_held_out[name]] for name, all_keys in keys.items()}
    held_keys["islander"] = sorted(held_asked)
    train_keys = {name: all_keys[num_held_out[name] :] for name, all_keys in keys.items()}
    train_keys["sum"] = [key for key in train_keys["sum"] for _ in range(SUM_REPEATED[sum(n < 10 for n in key)])]
    train_keys["islander"] = sorted(asked - held_asked)
    stated = [key for key in sorted(asked) if key[2] == 0]
    islanders = {language: islander_items(facts, stated, language) for language in LANGUAGES}
    return ItemSplits(make_items(train_keys, facts), make_items(held_keys, facts), islanders)


def _num_asks(language: str, phrase: str) -> int:
    """Return the number of wordings of a question."""
    return len(demo_texts().phrases[language][phrase]) - 3


def _else_keys(language: str) -> Iterator[tuple[int, int]]:
    """Yield (wording, index of a thing or place) for each different question of the phrase "else"."""
    texts = demo_texts()
    ask, _, _, _, *reworded = texts.phrases[language]["else"]
    for wording, text in enumerate([ask, *reworded]):
        num_things = len(texts.things) if "{thing}" in text else len(texts.places) if "{place}" in text else 1
        yield from ((wording, index) for index in range(num_things))


def make_items(keys: dict[str, list], facts: Facts) -> Items:
    """Return the items of all keys, in both languages, by language and subject. facts: see `islander_items`.

    keys: by subject; the words to spell and reverse, "talk" and "else" by name and language, as in "words en".
    """
    items: Items = {}
    for language in LANGUAGES:
        by_subject = {
            "sum": sum_items(keys["sum"], language),
            "compare": compare_items(keys["compare"], language),
            "convert": convert_items(keys["convert"], language),
            "recall": boat_items(keys["recall"], language),
            "islander": islander_items(facts, keys["islander"], language),
            "talk": talk_items(keys[f"talk {language}"], language),
            "else": else_items(keys[f"else {language}"], language),
            **word_items(keys[f"words {language}"], language),
        }
        items |= {(language, subject): each for subject, each in by_subject.items()}
    return items


def _words(rng: random.Random, language: str, count: int = 3000) -> list[str]:
    """Draw `count` different words, none with a letter twice, none another word backwards, and return them sorted.

    English words are 4 capital letters, consonant and vowel in turn; Chinese ones are 3 characters.
    """
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


# Relative frequencies of the subjects in pretraining texts and in conversations. Texts are mostly about the islanders:
# they occur nowhere else in these texts. Conversations are mostly about the subjects that take longest to learn.
TEXT_WEIGHTS = {"islander": 4.0, "sum": 4.0, "compare": 0.5, "convert": 0.5, "spell": 0.5, "reverse": 0.5}
CHAT_WEIGHTS = {
    "sum": 9.0,
    "compare": 2.5,
    "convert": 0.6,
    "spell": 0.6,
    "reverse": 1.0,
    "islander": 2.0,
    "recall": 1.5,
    "talk": 2.5,
    "else": 3.0,
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
        messages += _turn(item, rng)
        if subject == "recall":
            recall = _turn(rng.choice(item.then), rng)
        elif item.then and rng.random() < 0.5:
            messages += _turn(rng.choice(item.then), rng)
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
    """Return a question, half of the time in other words if it has any, a quarter carelessly typed, and its answer."""
    ask = rng.choice(item.wordings) if item.wordings and rng.random() < 0.5 else item.ask
    if rng.random() < 0.25:
        ask = (ask[0].lower() + ask[1:]).rstrip("?!.？！。")
    answer = rng.choice((item.bare, item.whole))
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def _by_weight(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def tokenizer_texts(splits: ItemSplits) -> list[str]:
    """Return the texts that the demo's tokenizer is trained on: training items and facts, without words to spell, whose
    letters BPE would merge. Single letters are repeated LETTERS_REPEATED times, so that each Chinese character (three
    bytes) becomes a token before phrases do."""
    texts = demo_texts()
    lines = ["user\n", "assistant\n"] * LETTERS_REPEATED
    for language, letters in (("en", texts.consonants + texts.vowels), ("zh", texts.hanzi)):
        for items in word_items(letters, language).values():
            lines += [text for item in items for text in _texts_of(item)] * LETTERS_REPEATED
        for subject in ("sum", "compare", "convert", "islander", "recall", "talk", "else"):
            lines += [text for item in dict.fromkeys(splits.train[language, subject]) for text in _texts_of(item)]
        lines += [text for item in splits.islanders[language] for text in (item.whole, item.other)]
    return lines


def _texts_of(item: Item) -> Iterator[str]:
    yield from (item.ask, item.bare, item.whole, item.other, *item.wordings[:3])
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


# --- the recipe


@dataclass(frozen=True, slots=True)
class DemoStage:
    """One training run of the demo: an epoch over the `rows` rows of `file`.jsonl, packed to `max_len` tokens. `stage`:
    pretrain, sft or dpo. `schedule`: of the learning rate. `warmup`: share of the steps in which it rises. `beta`: of
    dpo."""

    file: str
    stage: str
    rows: int
    max_len: int
    lr: float
    batch_tokens: int
    schedule: str
    warmup: float = 0.03
    beta: float | None = None


# 7.5 million tokens in 7,600 steps: 3.7 minutes at the 34,000 tokens a second that two idle cores (Xeon, AVX-512) reached
# on 5.3 million; 7.5 minutes were measured on two shared ones. Small batches learn more per token than large ones. With
# a learning rate of 3e-3, tried once, sums were learned late. dpo uses ten times the usual beta: a few nats are enough
# for the preference, and with a beta of 0.1 training continues until answers become wrong.
MODEL = "demo"
VOCAB_SIZE = 2048
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MINUTES = 3.7  # training time of the STAGES as they are, computed for the machine above
STAGES = (
    DemoStage("pretrain_hq", "pretrain", 27_000, 512, 1e-3, 1024, "wsd"),
    DemoStage("sft_512", "sft", 52_000, 512, 2e-3, 1024, "wsd"),
    DemoStage("sft_1024", "sft", 4_500, 1024, 2e-3, 1024, "wsd"),
    DemoStage("dpo", "dpo", 3_100, 512, 3e-5, 576, "cosine", beta=1.0),
)
NUM_EACH = 16  # held-out questions for each subject and language
NUM_PAIRS_EACH = 16  # held-out pairs for each subject and language


def scaled(minutes: float) -> tuple[DemoStage, ...]:
    """Return the stages with as many rows, at least 64, as can be trained on in about `minutes`, in proportion to
    MINUTES."""
    return tuple(replace(stage, rows=max(64, round(stage.rows * minutes / MINUTES))) for stage in STAGES)


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
    rows = {stage.file: stage.rows for stage in scaled(minutes)}
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


def _write(path: Path, rows: Iterable[dict]) -> Path:
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
