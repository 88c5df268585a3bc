"""The questions and answers of the demo, made from keys: two numbers, a word, or a person and a trait.

Some keys are held out, and training rows are made from the others, so that neither a held-out question nor the fact that
it asks about is trained on. For the islanders (invented people) only a wording of the question is held out: the fact is
part of the pretraining text. Two subjects are for what people type first: "talk" is greetings, thanks, and questions
about the model itself, and "else" is questions that the model has to say it cannot answer; of both, some of the questions
that are drawn from their wordings are held out. Sums of one-digit numbers, which people try first, are all trained on.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import msgspec

from mmdata.io.records import convert_record

LANGUAGES = ("en", "zh")
SUBJECTS = ("sum", "compare", "convert", "spell", "reverse", "islander", "follow-up", "recall", "talk", "else")
TALK = ("hello", "thanks", "bye", "who", "can")  # the phrases of the subject "talk"
# Questions of the subjects "talk" and "else" drawn from a wording: if it is one question, has fields, has alternatives.
NUM_ASKED = (10, 30, 150)
ALTERNATIVES = re.compile(r"\(([^()|]*\|[^()]*)\)")


class DemoTexts(msgspec.Struct, frozen=True):
    """The content of demo.json: the phrases, names and words of the demo's data, in English and Chinese.

    `phrases` maps a language and a phrase name to format strings: the question, the bare answer, the whole sentence,
    the sentence in other words (may be empty), and for some phrases the question in other words, any number of them,
    in which "(a|b|)" stands for a, b or nothing. "smaller", "more" and "turned" follow up a comparison, a sum and a spelling. "boat" tells the colour and name of a
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
    # By language: what may stand before and after a question, the numbers from 0 in words, and for questions that the
    # model cannot answer nouns, verbs, and syllables of words that do not exist.
    before: dict[str, list[str]]
    after: dict[str, list[str]]
    numbers: dict[str, list[str]]
    nouns: dict[str, list[str]]
    verbs: dict[str, list[str]]
    syllables: dict[str, list[str]]


@cache
def demo_texts() -> DemoTexts:
    """Return the content of demo.json; the file is read once per process."""
    return convert_record(json.loads(Path(__file__).with_name("demo.json").read_text(encoding="utf-8")), DemoTexts)


@dataclass(frozen=True, slots=True)
class Item:
    """A question (`ask`) with its answers: `bare`, `whole` sentence, and that in other words (`other`, may be empty).

    `then` has the questions that may follow it in a conversation, `wordings` the question in other words that training
    rows use too, to be filled with `values` by `spoken`. `language` is "en" or "zh".
    """

    subject: str
    language: str
    ask: str
    bare: str
    whole: str
    other: str
    then: tuple["Item", ...] = ()
    wordings: tuple[str, ...] = ()
    values: Mapping[str, object] = field(default_factory=dict, compare=False)


Items = dict[tuple[str, str], list[Item]]  # by language and subject
Facts = dict[tuple[int, str], int]  # (index in people, trait) -> index in traits[trait]


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


def spoken(wording: str, values: Mapping[str, object], rng: random.Random) -> str:
    """Return a wording with one of each group of alternatives "(a|b|)", and with `values` in its fields."""
    while ALTERNATIVES.search(wording):
        wording = ALTERNATIVES.sub(lambda match: rng.choice(match[1].split("|")), wording)
    return wording.format_map(values).strip()


def plain_text(text: str) -> str:
    """Return a text without its case, spaces and punctuation, by which questions are compared."""
    return "".join(character for character in text.casefold() if character.isalnum() or character in "+=")


def sum_items(keys: Sequence[tuple[int, int]], language: str) -> list[Item]:
    """Return a question "What is a + b?" for each key (a, b), with its other wordings. "And n more?", n below 10, may
    follow if (a + b, n) is among `keys` too, so that no held-out sum is asked for."""
    distinct = dict.fromkeys(keys)
    more: dict[int, list[Item]] = {}
    for total, n in sorted(distinct):
        if n < 10:
            more.setdefault(total, []).append(_sum("more", total, n, language, subject="follow-up"))
    items = {}
    wordings = tuple(demo_texts().phrases[language]["sum"][4:])
    words = dict(enumerate(demo_texts().numbers[language]))
    for a, b in distinct:
        values = {"a": a, "b": b, "A": words.get(a, a), "B": words.get(b, b)}
        then = tuple(more.get(a + b, ()))
        items[a, b] = replace(_sum("sum", a, b, language), then=then, wordings=wordings, values=values)
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


def asked_items(keys: Sequence[tuple[str, str]], language: str, subject: str) -> list[Item]:
    """Return the item of each key (phrase, question)."""
    phrases = demo_texts().phrases[language]
    return [Item(subject, language, ask, phrases[phrase][1], phrases[phrase][2], "") for phrase, ask in keys]


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
    """Items to train on and held-out ones, by language and subject. `islanders`: every fact about them once. `withheld`:
    the held-out questions of "talk" and "else" as `plain_text`."""

    train: Items
    held_out: Items
    islanders: dict[str, list[Item]]
    withheld: frozenset[str]


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
        **{f"talk {name}": _asked_keys(rng, name, TALK) for name in LANGUAGES},
        **{f"else {name}": _asked_keys(rng, name, ("else",)) for name in LANGUAGES},
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
    asked_about = [f"{subject} {name}" for subject in ("talk", "else") for name in LANGUAGES]
    withheld = frozenset(plain_text(ask) for name in asked_about for _, ask in held_keys[name])
    for name in asked_about:
        train_keys[name] = [key for key in train_keys[name] if plain_text(key[1]) not in withheld]
    stated = [key for key in sorted(asked) if key[2] == 0]
    islanders = {language: islander_items(facts, stated, language) for language in LANGUAGES}
    return ItemSplits(make_items(train_keys, facts), make_items(held_keys, facts), islanders, withheld)


def _asked_keys(rng: random.Random, language: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Draw NUM_ASKED questions from each wording of the phrases `names`; return (phrase, question) of each, equal ones
    several times."""
    texts = demo_texts()

    def values() -> dict[str, object]:
        """Draw what the fields of a wording may hold."""
        place, small = LANGUAGES.index(language), {name: rng.randrange(100) for name in "abc"}
        kinds = {"thing": texts.things, "place": texts.places}
        drawn = {name: rng.choice(pairs)[place] for name, pairs in kinds.items()}
        drawn |= {"verb": rng.choice(texts.verbs[language]), "noun": rng.choice(texts.nouns[language])}
        noise = "".join(rng.choice(texts.syllables[language]) for _ in range(rng.randint(2, 4)))
        return {**small, **drawn, "noise": noise, "big": rng.randint(100, 9999), "year": rng.randint(1000, 2100)}

    keys = []
    for name in names:
        ask, _, _, _, *reworded = texts.phrases[language][name]
        for text in (ask, *reworded):
            number = NUM_ASKED[2 if "|" in text else 1 if "{" in text else 0]
            keys += [(name, spoken(text, values(), rng)) for _ in range(number)]
    return keys


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
            **{name: asked_items(keys[f"{name} {language}"], language, name) for name in ("talk", "else")},
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
