"""The rules of --quality, each on texts made to break that rule alone, and against definitions written out in Python."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from command_line import Run, fine
from text_data import WORDS

from mmdata.encode.rows import Document
from mmdata.pack.filter import quality
from mmdata.pack.filter.features import RowBatch
from mmdata.pack.filter.select import select
from mmdata.pack.filter.where import Where
from mmdata.pack.options import QUALITY, SelectOptions

SOME_WORDS = [*WORDS, "the", "of", "and", "that"]


def sentence(draw: random.Random, number: int) -> str:
    return " ".join(draw.choice(SOME_WORDS) for _ in range(number)).capitalize() + "."


def article(seed: int = 0) -> str:
    """A text that meets every rule: lines of different sentences."""
    draw = random.Random(seed)
    words = [f"{draw.choice(SOME_WORDS)}{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(160)]
    for i in range(0, 160, 5):
        words[i] = ("the", "of", "and", "that")[i // 5 % 4]
    return "\n".join(" ".join(words[i : i + 16]) + "." for i in range(0, 160, 16))


def broken(preset: str, text: str) -> list[str]:
    """The rules that a text breaks."""
    rules = {name: Where(rule) for name, rule in quality.PRESETS[preset].items()}
    frame = RowBatch([Document(text)]).columns(sorted({name for where in rules.values() for name in where.names}))
    return [name for name, where in rules.items() if not where.holds(frame)[0]]


def lines(text: str) -> list[str]:
    return text.split("\n")


BREAKS = [
    ("gopher", "too few words", "The river and the stone."),
    ("gopher", "mean word length", article().replace(" ", "ab" * 5 + " ")),
    ("gopher", "hash signs", article() + " #" * 30),
    ("gopher", "ellipses", article().replace(" ", "… ", 30)),
    ("gopher", "bullet lines", "\n".join(f"- {line}" for line in lines(article()))),
    ("gopher", "ellipsis lines", "\n".join(line[:-1] + "..." for line in lines(article())[:5]) + "\n" + article(1)),
    ("gopher", "alphabetic words", article() + " 1 22 333" * 25),
    ("gopher", "repeated lines", "\n".join([*lines(article()), *lines(article())])),
    ("gopher", "repeated paragraphs", "\n\n".join([article(), article()])),
    ("gopher", "most frequent 2-gram", article() + " blue moon" * 40),
    ("gopher", "repeated 5-grams", article() + " a yellow rose in spring" * 20),
    ("c4", "lorem ipsum", article() + "\nHere Lorem Ipsum stands too."),
    ("c4", "curly bracket", article() + "\nA line with { in it."),
    ("c4", "too few sentences", "\n".join(lines(article())[:4]) + "\nno mark at the end of this"),
    ("c4", "too few sentences", "\n".join(f"{line[:-1]} needs JavaScript." for line in lines(article()))),
    ("c4", "too few sentences", "One. Two.\n" * 9),
    ("fineweb", "lines without a final mark", article().replace(".", "")),
    ("fineweb", "short lines", "\n".join(f"The {word} of the {word[::-1]}." for word in article().split()[:30])),
    ("fineweb", "repeated lines", article() + "\n" + lines(article())[0]),
    ("fineweb", "line ends", "\n".join(f"{word}\n\n" for word in article().split()[:40]) + "."),
]


def test_an_article_breaks_no_rule() -> None:
    assert set(QUALITY) == set(quality.PRESETS)
    for preset in QUALITY:
        assert broken(preset, article()) == []


@pytest.mark.parametrize(("preset", "rule", "text"), BREAKS)
def test_each_rule_is_broken_by_a_text_made_for_it(preset: str, rule: str, text: str) -> None:
    assert rule in broken(preset, text)


def test_chinese_text_is_judged_by_its_characters() -> None:
    draw = random.Random(4)
    text = "\n".join("".join(chr(0x4E00 + draw.randrange(3000)) for _ in range(24)) + "。" for _ in range(8))
    for preset in QUALITY:
        assert broken(preset, text) == []
    assert "too few words" in broken("gopher", text[:30])
    assert "short lines" in broken("fineweb", text.replace("。", "").replace("\n", "")[:9] + "\n" + "春江花月夜。")


def test_grams_are_those_of_the_definitions() -> None:
    draw = random.Random(6)
    texts = [
        " ".join(draw.choice("abcdefgh") * draw.randint(1, 3) for _ in range(draw.randint(0, 60))) for _ in range(60)
    ]
    found = quality.Words(texts).gram_frame()
    for i, text in enumerate(texts):
        words = text.split()
        for n in quality.TOP_GRAMS:
            grams = Counter(" ".join(words[k : k + n]) for k in range(len(words) - n + 1))
            most = grams.most_common(1)[0] if grams else ("", 0)
            assert found[f"top_{n}_gram"][i] == pytest.approx(len(most[0]) * most[1] / max(len(text), 1))
        for n in quality.REPEATED_GRAMS:
            seen, characters, at = set(), 0, 0
            while at + n <= len(words):
                gram = tuple(words[at : at + n])
                if gram in seen:
                    characters += len("".join(gram))
                    at += n
                else:
                    seen.add(gram)
                    at += 1
            assert found[f"repeated_{n}_grams"][i] == pytest.approx(characters / max(len(text), 1))


def test_the_command_counts_and_shows_what_each_rule_leaves_out(tmp_path: Path, home: Path, mm: Run) -> None:
    texts = [article(i) for i in range(5)] + [text for preset, _, text in BREAKS if preset == "fineweb"]
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = select([home / "texts.jsonl"], SelectOptions(quality="fineweb"))
    assert len(found.order) == 5 and sum(found.details().values()) == 4
    assert set(found.details()) < {f"fineweb: {rule}" for rule in quality.PRESETS["fineweb"]}
    assert {name: len(rows) for name, rows in found.examples().items()} == found.details()
    ran = fine(mm("select texts.jsonl --quality fineweb --explain"))
    assert "fineweb: repeated lines: 1 rows" in ran.out and "texts.jsonl line 8" in ran.out
